"""Several GPUs: the tokens of several ranks are those of one, and all ranks end together.

Without two GPUs the ranks are processes in the simulator. Every oracle is independent of the code
that it judges: NumPy, Parrot's texts, the operating system's list of processes.

    sums and parts    the model's parts    the engine    one kernel a rank    the end
"""
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np
import pytest
from ml_dtypes import bfloat16

import communicator
import simulator
import tinyvllm
from communicator import start_ranks
from device import KERNELS, CpuDevice, CudaDevice, compile_kernels, open_device, paste
from load import with_children
from reference import PARROT, RNG, ROOT, TINY, numpy_llama, write_model
from test_fp8 import oracle_weights
from test_tinyvllm import (QWEN3, SOME, TEXTS, chats, errors_of_logits, float64_weights, recite, takes_long,
                           text_of)
from tinyvllm import LLM, SamplingParams, TinyVLLMError
from weights import Checkpoint, DummyCheckpoint, ModelConfig, load_weights

GPUS = 0 if open_device().is_simulated else open_device().count


def device_for(size):
    """Where so many ranks run: on GPUs, or in the simulator if there are too few."""
    return "cuda" if size <= GPUS else "cpu"


DEVICE = device_for(2)


def command(function):
    """Starts a rank that runs a function of this file."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import test_communicator; "
            f"from communicator import follow; follow(test_communicator.{function})")
    return [sys.executable, "-c", code]


# --------------------------------------------------------------------------------------------------
# Sums and parts
# --------------------------------------------------------------------------------------------------
SIZES = {"HIDDEN": 64, "FFN": 64, "NUM_LAYERS": 1, "NUM_HEADS": 1, "NUM_KV_HEADS": 1, "HEAD_DIM": 32,
         "VOCAB": 64, "BLOCK_SIZE": 8, "RMS_EPS": "1e-5f", "QKV_BIAS": 0, "O_BIAS": 0, "QK_NORM": 0,
         "FP8_WEIGHTS": 0, "FP8_CACHE": 0}


def exchange_at_random(ranks, calls=120):
    """In every rank: sums and parts of random numbers, of random sizes, in random order. Every result
    is NumPy's, bit for bit. The largest do not fit into an inbox. Some are recorded, and played again."""
    device = open_device(device_for(ranks.size), ranks.rank)
    ranks.connect(device, compile_kernels(device, SIZES, paste(KERNELS)), inbox_bytes=24 << 10)

    def add(x):
        return ranks.all_reduce(x.copy())                   # a recording runs more than once

    for call in range(calls):
        rng = RNG(call)                                     # the same in every rank
        rows = int(rng.integers(1, 9))
        columns = 2 * int(2 ** rng.uniform(0, 10))
        # So far apart that a sum depends on the order of its numbers.
        parts = [np.ldexp(normal, own.integers(-12, 13, normal.shape)).astype(bfloat16)
                 for own in (RNG((call, rank)) for rank in range(ranks.size))
                 for normal in [own.standard_normal((rows, columns))]]
        if ranks.is_for_nccl(parts[0]):                     # which rounds in between: exact sums
            parts = [np.sign(part) for part in parts]
        x = device.to_device(parts[ranks.rank])
        if rng.random() < 0.5:
            want = sum(part.astype(np.float32) for part in parts).astype(bfloat16)
            exchange = partial(add, x)
        else:
            want = np.concatenate(parts, 1)
            exchange = partial(ranks.all_gather, x)
        if rng.random() < 0.5:
            results = [exchange()]
        else:
            first, replay = device.record(exchange)
            results = [first, replay()]
        for result in results:
            got = device.fetch(result)()
            ranks.check()
            assert got.shape == want.shape and got.tobytes() == want.tobytes(), (call, rows, columns)
    if ranks.rank > 0:
        assert ranks.receive_step() is None


@pytest.mark.parametrize("size", [2, 4])
def test_sums_and_parts(size):
    ranks = start_ranks(size, command("exchange_at_random"))
    exchange_at_random(ranks)
    ranks.close()
    assert [process.returncode for process in ranks.channel.processes] == [0] * (size - 1)


def record_large_ones(ranks):
    """In every rank: NCCL takes large sums and parts, but none that a CUDA graph repeats."""
    device = open_device(DEVICE, ranks.rank)
    ranks.connect(device, compile_kernels(device, SIZES, paste(KERNELS)), inbox_bytes=24 << 10)
    ranks.channel.nccl = ranks.channel.nccl or SimpleNamespace(abort=lambda: None)
    ranks.call_nccl = lambda name, *arguments: pytest.fail(f"{name} in a CUDA graph")
    x = device.to_device(np.ones((1, 5 * ranks.capacity), bfloat16))
    first, replay = device.record(lambda: ranks.all_gather(ranks.all_reduce(x.copy())))
    for result in first, replay():
        assert (device.fetch(result)() == 2).all()
    with pytest.raises(ZeroDivisionError):
        device.record(lambda: 1 / 0)
    assert ranks.is_for_nccl(x)             # now there is no recording
    if ranks.rank > 0:
        assert ranks.receive_step() is None


def test_no_nccl_in_graphs():
    ranks = start_ranks(2, command("record_large_ones"))
    record_large_ones(ranks)
    ranks.close()
    assert ranks.channel.processes[0].returncode == 0


def test_no_graphs_where_sums_are_nccls(monkeypatch):
    monkeypatch.setattr(communicator.OneRank, "fits_graphs", False)
    monkeypatch.setattr(CpuDevice, "record", None)
    monkeypatch.setattr(CudaDevice, "record", None)
    recite(LLM(PARROT), SOME[:1])


# --------------------------------------------------------------------------------------------------
# The model's parts
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_parts_make_the_whole(tmp_path, tied):
    """Each number of each matrix is in one rank, at its place, from a file and from random weights."""
    sizes = TINY | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
                    "attention_bias": True, "tie_word_embeddings": tied}
    write_model(tmp_path, sizes=sizes)
    config = ModelConfig.from_folder(tmp_path)
    device = CpuDevice()

    def rows(whole, sizes, rank):
        """A rank's rows of matrices below one another."""
        parts = np.split(whole, np.cumsum(sizes)[:-1])
        return np.concatenate([part[rank * len(part) // 4:(rank + 1) * len(part) // 4] for part in parts])

    for checkpoint in (lambda: Checkpoint(tmp_path)), (lambda: DummyCheckpoint(device)):
        whole = load_weights(checkpoint(), config, device)
        for rank in range(4):
            part = load_weights(checkpoint(), config.of_rank(4), device, rank)
            for layer, mine in zip(whole.layers, part.layers):
                qkv = 8 * 32, 4 * 32, 4 * 32
                assert (mine.qkv == rows(layer.qkv, qkv, rank)).all()
                assert (mine.qkv_bias == rows(layer.qkv_bias, qkv, rank)).all()
                assert (mine.gate_up == rows(layer.gate_up, (64, 64), rank)).all()
                assert (mine.o == layer.o[:, 64 * rank:64 * rank + 64]).all()
                assert (mine.down == layer.down[:, 16 * rank:16 * rank + 16]).all()
                assert (mine.o_bias == layer.o_bias).all()
            assert (part.head == whole.head[512 * rank:512 * rank + 512]).all()
            assert (part.embed == whole.embed).all() and (part.norm == whole.norm).all()


@pytest.mark.parametrize("changes, message", [
    ({}, "num_attention_heads: expected a multiple of tensor_parallel_size, 3, got 4"),
    ({"num_attention_heads": 6},
     "num_key_value_heads: expected a multiple of tensor_parallel_size, 3, got 2"),
    ({"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 72, "vocab_size": 2048},
     "vocab_size: expected a multiple of 2 times tensor_parallel_size, 6, got 2048"),
    ({"num_attention_heads": 6, "num_key_value_heads": 3},
     "intermediate_size: expected a multiple of 8 times tensor_parallel_size, 24, got 64"),
], ids=["heads", "kv heads", "vocabulary", "ffn"])
def test_sizes_that_do_not_divide(tmp_path, changes, message):
    write_model(tmp_path, sizes=TINY | {"num_attention_heads": 4, "num_key_value_heads": 2} | changes)
    with pytest.raises(TinyVLLMError, match=message):
        LLM(tmp_path, device="cpu", tensor_parallel_size=3)


@pytest.mark.parametrize("changes, size", [
    ({"attention_bias": True, "num_key_value_heads": 2, "tie_word_embeddings": False}, 2),
    (QWEN3 | {"num_key_value_heads": 4}, 4)], ids=["bias-untied-2", "qwen3-4"])
def test_logits_of_several_ranks(tmp_path, changes, size):
    """Prefill, chunks and decode: the oracle's logits, up to bfloat16's rounding."""
    config = TINY | {"num_attention_heads": 4, "max_position_embeddings": 512, "head_dim": 32} | changes
    write_model(tmp_path, sizes=config)
    llm = LLM(tmp_path, device=device_for(size), max_num_batched_tokens=50, tensor_parallel_size=size)
    for error in errors_of_logits(llm, config, float64_weights(tmp_path), (1, 17, 70), 6):
        assert error.max() < 0.03


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(CpuDevice, "count", 1)
    message = "tensor_parallel_size: expected at most 1, the number of GPUs, got 2"
    with pytest.raises(TinyVLLMError, match=message):
        LLM(PARROT, device="cpu", tensor_parallel_size=2)


# --------------------------------------------------------------------------------------------------
# The engine
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pair():
    return LLM(PARROT, device=DEVICE, tensor_parallel_size=2)


def test_recitation(pair):
    """Several texts together, and a conversation whose beginning is found in the prefix cache."""
    recite(pair, SOME[:4])
    wordings, answer = TEXTS[1]
    messages = [{"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": wordings[0]}]
    for num_cached in 0, 16:
        [output] = pair.generate([pair.tokenizer.chat(messages)], SamplingParams(max_tokens=None))
        assert output.text == answer and output.num_cached_tokens >= num_cached


def test_preemption():
    """In a pool that is too small, without prefix caching, by eager steps of few tokens."""
    llm = LLM(PARROT, device=DEVICE, tensor_parallel_size=2, num_blocks=18, max_num_batched_tokens=40,
              enforce_eager=True, prefix_caching=False)
    outputs = recite(llm, SOME[:4])
    assert sum(output.num_preemptions for output in outputs) >= 1


def test_sampling_and_stop_strings(pair):
    """Draws, penalties, a bias, log-probabilities and a stop text: the answers of one rank."""
    one = LLM(PARROT, device=DEVICE)
    prompts = chats(one, TEXTS[1:5])
    params = [SamplingParams(temperature=1.5, seed=1, max_tokens=12, logprobs=3),
              SamplingParams(repetition_penalty=1.3, max_tokens=12, logit_bias={7: 2.5}),
              SamplingParams(max_tokens=40, stop=[" the"], prompt_logprobs=2),
              SamplingParams(temperature=0.7, seed=2, top_k=5, top_p=0.9, max_tokens=12)]
    for want, got in zip(one.generate(prompts, params), pair.generate(prompts, params)):
        assert (got.text, got.token_ids, got.finish_reason) == (want.text, want.token_ids, want.finish_reason)
        for a, b in zip(want.logprobs or [], got.logprobs or []):
            # A log-probability of -13 is the difference of bf16 logits that are 0.125 apart, both rounded.
            assert a.keys() == b.keys()
            assert all(math.isclose(a[k], b[k], rel_tol=0.04, abs_tol=0.2) for k in a)


def test_ranks_draw_the_same_tokens(pair):
    """Nearly every token is likely here, so ranks with other noise would draw others, and notice."""
    params = SamplingParams(temperature=30.0, seed=3, max_tokens=communicator.COMPARE_STEPS + 10,
                            ignore_eos=True)
    [output] = pair.generate([[1, 2, 3]], params)
    assert len(set(output.token_ids)) > 60


def test_aborts_and_interrupts(pair):
    """Requests that are given up, and Ctrl-C in the middle of a launch, disturb no other request."""
    prompts = chats(pair, TEXTS[1:4])
    stream = pair.stream(prompts[0])
    text = next(stream).delta
    for _ in pair.stream(prompts[1]):
        break                                   # given up after a token
    model = pair.engine.model
    execute = model.execute
    came = []

    def interrupted(batch, size):
        os.kill(os.getpid(), signal.SIGINT)     # Python's handler runs between two statements
        result = execute(batch, size)
        came.append("the whole step")
        return result

    model.execute = interrupted
    with pytest.raises(KeyboardInterrupt):
        pair.generate(prompts[2])
    del model.execute
    assert came == ["the whole step"]
    assert text + "".join(output.delta for output in stream) == TEXTS[1][1]
    pair.engine.scheduler.check_integrity()


def test_tokens_are_compared():
    """A rank that samples another token than rank 0 ends the run."""
    llm = LLM(PARROT, device=DEVICE, tensor_parallel_size=2)
    ranks = llm.engine.model.communicator
    keep = ranks.keep

    def keep_others(tokens):
        keep(tokens + 1)

    ranks.keep = keep_others
    with pytest.raises(TinyVLLMError, match="rank 1: expected the tokens of rank 0, sampled others"):
        llm.generate(chats(llm, [text_of("Recite The Raven.")]), SamplingParams(max_tokens=None))


# --------------------------------------------------------------------------------------------------
# One kernel a rank: small batches of decodes, by decode.cu
# --------------------------------------------------------------------------------------------------
QUICK_FLAGS = ["-O1" if flag == "-O3" else flag for flag in simulator.FLAGS]      # quick to compile


def open_decoding(*arguments):
    """A device that runs decode.cu, in the simulator too."""
    simulator.FLAGS = QUICK_FLAGS
    device = open_device(*arguments)
    device.runs_decode = True
    return device


def run_with_decode(ranks):
    tinyvllm.open_device = open_decoding
    tinyvllm.run_rank(ranks)


def exit_before_a_step(ranks):
    """A rank that is killed. Rank 0 waits for the rank's words, in the middle of a kernel."""
    execute = tinyvllm.Model.execute

    def execute_or_exit(model, batch, size):
        if ranks.num_steps == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return execute(model, batch, size)

    tinyvllm.Model.execute = execute_or_exit
    run_with_decode(ranks)


@pytest.fixture
def one_kernel(monkeypatch):
    """Lets all ranks run decode.cu. Returns a list of the batch sizes in that kernel."""
    if DEVICE == "cuda" and not open_device().runs_decode:
        pytest.skip("this GPU cannot run decode.cu")
    monkeypatch.setattr(simulator, "FLAGS", QUICK_FLAGS)        # which ends with the test
    monkeypatch.setattr(tinyvllm, "open_device", open_decoding)
    monkeypatch.setattr(tinyvllm, "RANK_COMMAND", command("run_with_decode"))
    decode = tinyvllm.Model.decode
    sizes = []

    def watched_decode(model, b):
        sizes.append(len(b.token_ids))
        return decode(model, b)

    monkeypatch.setattr(tinyvllm.Model, "decode", watched_decode)
    return sizes


HALVES = TINY | {"hidden_size": 512, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 512,
                 "intermediate_size": 1024, "max_position_embeddings": 512}
# 2,560 is a multiple of 512, but its half is not.
QUARTERS = HALVES | {"hidden_size": 2560, "head_dim": 128, "intermediate_size": 2048, "num_hidden_layers": 1}


@pytest.mark.parametrize("config, size, batches, quantization, most", [
    (HALVES, 2, [(15,), (270, 3, 32), (20, 1, 2, 3, 16, 5, 7)], None, 0.06),
    (HALVES, 2, [(3, 32), (20, 1, 2, 3, 16, 5, 7)], "fp8", 0.3),      # E4M3 rounds 16 times as coarsely
    pytest.param(QUARTERS, 4, [(16,), (1, 5, 2, 3, 17)], None, 0.06, marks=takes_long)],
    ids=["2", "2-fp8", "4"])
def test_decode_of_several_ranks(tmp_path, one_kernel, config, size, batches, quantization, most):
    """Batches of 1 to 8, contexts of several splits, several steps in a row: the oracle's logits."""
    write_model(tmp_path, sizes=config)
    weights = oracle_weights(config) if quantization else float64_weights(tmp_path)
    llm = LLM(tmp_path, device=device_for(size), tensor_parallel_size=size, quantization=quantization)
    for lengths in batches:
        for length, error in zip(lengths, errors_of_logits(llm, config, weights, lengths, 4)):
            assert error.max() < most, (length, error)
    assert set(one_kernel) == {min(n for n in tinyvllm.GRAPH_SIZES if n >= len(b)) for b in batches}


def test_decode_after_aborts_and_preemptions(tmp_path, one_kernel):
    """Steps of many kernels and of one kernel, in turn. Every token is the oracle's best, or as good."""
    write_model(tmp_path, sizes=HALVES)
    weights = float64_weights(tmp_path)
    llm = LLM(tmp_path, device=DEVICE, tensor_parallel_size=2, num_blocks=10, block_size=8, max_model_len=64,
              prefix_caching=False)
    prompts = [RNG(n).integers(0, 512, n).tolist() for n in (5, 20, 21, 22)]
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    stream = llm.stream(prompts[0], params)
    next(stream)
    for _ in llm.stream(prompts[1], params):
        break                                   # given up after a token
    outputs = llm.generate(prompts[1:], params)
    *_, first = stream
    assert sum(output.num_preemptions for output in outputs) >= 1
    assert {1, 2} <= set(one_kernel)
    for output in first, *outputs:
        known = len(output.prompt_token_ids)
        logits = numpy_llama(HALVES, weights, output.prompt_token_ids + output.token_ids)[known - 1:-1]
        chosen = logits[np.arange(16), output.token_ids]
        assert (logits.max(1) - chosen < 0.05 * logits.std()).all()


def test_no_decode_kernel_waits_for_a_killed_rank(tmp_path, one_kernel, monkeypatch):
    write_model(tmp_path, sizes=HALVES)
    monkeypatch.setattr(tinyvllm, "RANK_COMMAND", command("exit_before_a_step"))
    llm = LLM(tmp_path, device=DEVICE, tensor_parallel_size=2)
    with pytest.raises(TinyVLLMError, match="rank 1 was killed by signal 9: start the program anew"):
        llm.generate([[1] * 5], SamplingParams(max_tokens=50, ignore_eos=True))
    assert one_kernel


# --------------------------------------------------------------------------------------------------
# The end
# --------------------------------------------------------------------------------------------------
def fail_while_loading(ranks):
    raise TinyVLLMError("expected a good rank, got a bad one")


def fail_in_a_step(ranks):
    execute = tinyvllm.Model.execute

    def execute_or_fail(model, batch, size):
        if ranks.num_steps == 5:
            raise ValueError("the sixth step\nis bad")
        return execute(model, batch, size)

    tinyvllm.Model.execute = execute_or_fail
    tinyvllm.run_rank(ranks)


@pytest.mark.parametrize("function, message", [
    ("fail_while_loading", "rank 1: expected a good rank, got a bad one"),
    ("fail_in_a_step", "rank 1: ValueError: the sixth step")])
def test_an_error_of_a_rank(monkeypatch, function, message):
    """The error is rank 0's, and the engine says the same when it is asked again."""
    monkeypatch.setattr(tinyvllm, "RANK_COMMAND", command(function))
    with pytest.raises(TinyVLLMError, match=message):
        llm = LLM(PARROT, device=DEVICE, tensor_parallel_size=2)
        with pytest.raises(TinyVLLMError, match=message):
            llm.generate(chats(llm, TEXTS[1:3]))
        llm.generate(chats(llm, TEXTS[1:3]))


def test_an_error_of_rank_0():
    """The other ranks would wait for rank 0's kernels: they end."""
    llm = LLM(PARROT, device=DEVICE, tensor_parallel_size=2)
    [process] = llm.engine.model.communicator.channel.processes
    llm.engine.model.forward = lambda b: 1 / 0
    with pytest.raises(ZeroDivisionError):
        llm.generate(chats(llm, TEXTS[1:2]))
    with pytest.raises(TinyVLLMError, match="rank 0: division by zero"):
        llm.generate(chats(llm, TEXTS[1:2]))
    assert process.wait(10) == -signal.SIGKILL


def begin(tokens):
    """A program with two ranks, in the middle of an answer: (its Popen, the id of rank 1)."""
    command = [sys.executable, str(ROOT / "tinyvllm.py"), "--model", str(PARROT), "--device", DEVICE,
               "--tensor-parallel-size", "2", "Recite The Raven."]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.read(tokens)
    _, rank = with_children(program.pid)
    return program, rank


def is_gone(number):
    """Whether the process ends within ten seconds. A zombie has ended."""
    for _ in range(100):
        try:
            with open(f"/proc/{number}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("victim, number, code, message", [
    (1, signal.SIGKILL, 2, "tinyvllm: rank 1 was killed by signal 9: start the program anew"),
    (0, signal.SIGKILL, -signal.SIGKILL, None),
    (0, signal.SIGINT, 130, ""), (0, signal.SIGTERM, 143, "")],
    ids=["rank 1 killed", "rank 0 killed", "Ctrl-C", "SIGTERM"])
def test_all_ranks_end_together(victim, number, code, message):
    """Within ten seconds, with the right exit code, one line at most, and no process left."""
    program, rank = begin(tokens=20)
    os.kill((program.pid, rank)[victim], number)
    _, errors = program.communicate(timeout=10)
    assert program.returncode == code
    lines = [line for line in errors.decode().splitlines() if "simulator" not in line]
    assert lines == [line for line in [message] if line is not None]
    assert is_gone(rank)


def sleep_for_long(ranks):
    time.sleep(1000)


def test_a_rank_that_does_not_end(monkeypatch):
    monkeypatch.setattr(communicator, "END_SECONDS", 1)
    ranks = start_ranks(2, command("sleep_for_long"))
    ranks.close()
    assert ranks.channel.processes[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize("line", ["", "llm.engine.model.communicator.channel.fail('a rank has ended')"],
                         ids=["an exit", "an exit after a failure"])
def test_no_end_waits_for_nccl(line):
    """NCCL's end may wait for ever. It is called once, also when Python ends while there is an LLM."""
    code = f"""
import time, tinyvllm
from types import SimpleNamespace
llm = tinyvllm.LLM({str(PARROT)!r}, device="cpu", tensor_parallel_size=2)
abort = lambda: (print("abort", flush=True), time.sleep(1000))
llm.engine.model.communicator.channel.nccl = SimpleNamespace(abort=abort)
{line}
"""
    program = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, timeout=60)
    assert (program.returncode, program.stdout) == (0, b"abort\n")


def test_a_forgotten_llm_ends_its_ranks():
    llm = LLM(PARROT, device=DEVICE, tensor_parallel_size=2)
    [process] = llm.engine.model.communicator.channel.processes
    del llm
    assert process.returncode == 0


