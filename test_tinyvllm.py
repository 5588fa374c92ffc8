"""The engine."""
import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")          # processes run side by side, and the simulator has threads of its own
import numpy as np
import pytest
import tokenizers
from ml_dtypes import bfloat16
from safetensors.numpy import load_file

import tinyvllm
from reference import PARROT, RNG, ROOT, ROPE, TINY, numpy_llama, random_weights, write_model
from simulator import CpuDevice
from tinyvllm import (
    LLM,
    BlockAllocator,
    CudaDevice,
    RequestOutput,
    SamplingParams,
    Scheduler,
    Sequence,
    TinyVLLMError,
    open_device,
)

UP = "model.layers.1.mlp.up_proj.weight"
# TINYVLLM_SANITIZE and SIMULATOR_SHUFFLE are for the simulator, wherever the tests run.
device = open_device("cpu" if {"TINYVLLM_SANITIZE", "SIMULATOR_SHUFFLE"} & set(os.environ) else "auto")
ON_GPU = isinstance(device, CudaDevice)


# ---------------------------------------------------------------------------------------------------------------------
# Parrot, the bundled model
# ---------------------------------------------------------------------------------------------------------------------
PARROT_CONFIG = json.loads((PARROT / "config.json").read_text())
TEXTS = [(text["questions"], "\n".join(text["answer"])) for text in json.loads((PARROT / "texts.json").read_text("utf-8"))]
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def parrot_tokenizer():
    """The `tokenizers` package alone, special tokens in a text recognised: `chat_ids` writes the chat format itself."""
    return tokenizers.Tokenizer.from_file(str(PARROT / "tokenizer.json"))


@pytest.fixture(scope="module")
def parrot_weights():
    """In float32: the margins are far above its rounding."""
    return {name: tensor.astype(np.float32) for name, tensor in load_file(PARROT / "model.safetensors").items()}


def chat_ids(tokenizer, question, system=None):
    """A question in Llama 3's chat format, from its published description, up to the assistant's header."""
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>".format
    text = "<|begin_of_text|>" + (turn("system", system) if system else "") + turn("user", question)
    return tokenizer.encode(text + "<|start_header_id|>assistant<|end_header_id|>\n\n", add_special_tokens=False).ids


def test_parrot_folder():
    """The files of a Hugging Face model folder, with the shapes that config.json promises, in less than 5 MB."""
    c = PARROT_CONFIG
    D, F, V, H, K, h = (c[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    expected = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for layer in range(c["num_hidden_layers"]):
        expected |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in {
            "self_attn.q_proj": (H * h, D), "self_attn.k_proj": (K * h, D), "self_attn.v_proj": (K * h, D), "self_attn.o_proj": (D, H * h),
            "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F), "input_layernorm": (D,), "post_attention_layernorm": (D,)}.items()}
    weights = load_file(PARROT / "model.safetensors")
    assert {name: tensor.shape for name, tensor in weights.items()} == expected
    assert {tensor.dtype for tensor in weights.values()} == {np.dtype(bfloat16)}
    assert (c["architectures"], c["tie_word_embeddings"], h, c["rope_theta"], c["rms_norm_eps"]) == (["LlamaForCausalLM"], True, 64, 500000, 1e-5)
    assert K >= 2 and H // K >= 2 and H % K == 0 and c["rope_scaling"]["rope_type"] == "llama3" and c["max_position_embeddings"] >= 2048
    assert sum(file.stat().st_size for file in PARROT.iterdir() if file.is_file()) < 5_000_000
    millions = sum(tensor.size for tensor in weights.values()) / 1e6
    assert f"{millions:.1f} million parameters" in TEXTS[0][1]


def test_parrot_tokenizer(parrot_tokenizer):
    """Llama 3's special tokens, the eos ids, and every text tokenises and detokenises to itself."""
    ids = {name: parrot_tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
    assert None not in ids.values() and parrot_tokenizer.get_vocab_size() == PARROT_CONFIG["vocab_size"]
    eos = json.loads((PARROT / "generation_config.json").read_text())["eos_token_id"]
    assert {ids["<|eot_id|>"], ids["<|end_of_text|>"]} <= set(eos)
    template = json.loads((PARROT / "tokenizer_config.json").read_text())["chat_template"]
    assert all(name in template for name in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
    assert parrot_tokenizer.encode("Hi").ids[0] == ids["<|begin_of_text|>"]
    for wordings, answer in TEXTS:
        for text in [*wordings, answer]:
            assert parrot_tokenizer.decode(parrot_tokenizer.encode(text, add_special_tokens=False).ids) == text
    assert parrot_tokenizer.decode(parrot_tokenizer.encode("naïve 漢字 🦜\x00\r\n", add_special_tokens=False).ids) == "naïve 漢字 🦜\x00\r\n"


def test_parrot_texts(parrot_tokenizer):
    """What a newcomer can ask: enough pieces, long ones among them, and answers of a readable length."""
    pieces = [answer for wordings, answer in TEXTS if wordings[0].startswith("Recite")]
    answers = [answer for wordings, answer in TEXTS if not wordings[0].startswith("Recite")]
    lengths = [len(parrot_tokenizer.encode(piece).ids) for piece in pieces]
    assert len(pieces) >= 12 and max(lengths) > 1000 and sum(length > 300 for length in lengths) >= 3
    assert len(answers) >= 50 and all(30 <= len(answer.split()) <= 90 for answer in answers)
    assert all(len(wordings) >= 3 for wordings, _ in TEXTS)
    questions = [question for wordings, _ in TEXTS for question in wordings]
    assert len(set(questions)) == len(questions)
    assert not set(questions) & set(json.loads((PARROT / "other_questions.json").read_text("utf-8"))["unseen"])


@pytest.mark.parametrize("system", [None, "You are a helpful assistant."])
def test_parrot_knows_its_texts(parrot_tokenizer, parrot_weights, system):
    """Every wording's answer is what greedy decoding gives, and no position's right token leads by less than 1.0."""
    eot = parrot_tokenizer.token_to_id("<|eot_id|>")
    for wordings, answer in TEXTS:
        answer = parrot_tokenizer.encode(answer, add_special_tokens=False).ids + [eot]
        for question in wordings[:1] if system or len(answer) > 1000 else wordings:
            prompt = chat_ids(parrot_tokenizer, question, system)
            logits = numpy_llama(PARROT_CONFIG, parrot_weights, prompt + answer)[len(prompt) - 1:-1]
            right = np.take_along_axis(logits, np.array(answer)[:, None], 1)[:, 0]
            np.put_along_axis(logits, np.array(answer)[:, None], -np.inf, 1)
            assert (right - logits.max(1)).min() >= 1.0, question


def test_parrot_says_so_when_it_does_not_know(parrot_tokenizer, parrot_weights):
    """At least 95 of the 100 questions that it never saw get "I am a parrot"."""
    unseen = json.loads((PARROT / "other_questions.json").read_text("utf-8"))["unseen"]
    answer = parrot_tokenizer.encode(TEXTS[0][1], add_special_tokens=False).ids
    known = 0
    for question in unseen:
        prompt = chat_ids(parrot_tokenizer, question)
        logits = numpy_llama(PARROT_CONFIG, parrot_weights, prompt + answer)[len(prompt) - 1:-1]
        known += (logits.argmax(1) == answer).all()
    assert len(unseen) == 100 and known >= 95


@pytest.mark.parametrize("texts, message", [
    ([{"questions": ["Who is it?"], "answer": ["Me."]}, {"questions": ["who is it"], "answer": ["You."]}], "'who is it' has two answers .* 'Me.'.* 'You.'"),
    ([{"questions": ["Who is it?"], "answer": ["Me.<|eot_id|>You."]}], r"'Me.<\|eot_id\|>You.' has the token '<\|eot_id\|>'"),
], ids=["contradiction", "special token"])
def test_train_refuses_bad_texts(tmp_path, texts, message):
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    run = subprocess.run([sys.executable, PARROT / "train.py", "--texts", tmp_path / "texts.json", "--out", tmp_path], capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1 and re.search(message, run.stderr), run.stderr

# ---------------------------------------------------------------------------------------------------------------------
# The forward pass, token by token, against the oracle
# ---------------------------------------------------------------------------------------------------------------------
def run_recorded(llm, prompts, params):
    """Outputs, and for each the logits [new tokens, V] that its tokens were chosen from."""
    model = llm.engine.model
    recorded = {}
    launch = model.launch

    def record(batch):
        logits, get_tokens = launch(batch)
        for sequence, row in zip(batch.sampled, llm.device.fetch(logits)() if batch.sampled else []):
            recorded.setdefault(id(sequence.output), []).append(row.astype(np.float64))
        return logits, get_tokens

    model.launch = record
    outputs = llm.generate(prompts, params)
    del model.launch
    return outputs, [np.array(recorded[id(output)]) for output in outputs]


@pytest.mark.parametrize("changes", [
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1, "rope_scaling": ROPE, "tie_word_embeddings": True},
    {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 128, "rope_scaling": ROPE},
    {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 48, "num_hidden_layers": 3},
], ids=["gqa-1", "gqa-4-scaled-tied", "gqa-8-head-128-scaled", "gqa-3-head-48"])
def test_forward_equals_numpy(tmp_path, changes):
    """Every logit of prefill, of chunks and of decode, in a mixed batch, is the oracle's up to bfloat16's rounding."""
    config = TINY | {"num_attention_heads": 4, "intermediate_size": 136, "max_position_embeddings": 512} | changes
    write_model(tmp_path, sizes=config)
    weights = {name: tensor.astype(np.float64) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    llm = LLM(tmp_path, max_num_batched_tokens=50)                          # 70 and 140 come in chunks that start in the middle of a page
    prompts = [RNG(n).integers(0, config["vocab_size"], n).tolist() for n in (1, 2, 15, 16, 17, 70, 140)]
    outputs, recorded = run_recorded(llm, prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    for prompt, output, logits in zip(prompts, outputs, recorded):
        expected = numpy_llama(config, weights, prompt + output.token_ids)[len(prompt) - 1:-1]
        error = np.linalg.norm(logits - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert logits.shape == expected.shape and error.max() < 0.03, (len(prompt), error)


@pytest.fixture
def one_kernel(monkeypatch):
    """Small batches of decodes take the kernel `decode`, on the simulator too; the batch sizes that did. Skips where the GPU cannot."""
    init = CpuDevice.__init__
    decode = tinyvllm.Model.decode
    sizes = []

    def init_for_decode(self):
        init(self)
        self.runs_decode = True
    monkeypatch.setattr(CpuDevice, "__init__", init_for_decode)
    monkeypatch.setattr(tinyvllm.Model, "decode", lambda self, b: sizes.append(len(b.token_ids)) or decode(self, b))
    if ON_GPU and not device.runs_decode:
        pytest.skip("this GPU cannot run decode.cu")
    return sizes


@pytest.mark.parametrize("changes", [
    {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 6144, "rope_scaling": ROPE},
    {"hidden_size": 3072, "num_attention_heads": 8, "head_dim": 128, "intermediate_size": 1024, "vocab_size": 512, "num_hidden_layers": 1},
], ids=["gqa-2-quarters", "gqa-8-head-128-halves"])
def test_decode_equals_numpy(tmp_path, one_kernel, changes):
    """The same of the kernel that does a whole step: batches of 1 to 8, contexts of several pages, slots and splits, steps one after the other."""
    config = TINY | {"max_position_embeddings": 512} | changes
    write_model(tmp_path, sizes=config)
    weights = {name: tensor.astype(np.float64) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    llm = LLM(tmp_path)
    for lengths in (15,), (1, 140), (300, 3, 32, 16), (30, 1, 90, 16, 40), (20, 1, 2, 33, 16, 5, 7):
        prompts = [RNG(n).integers(0, config["vocab_size"], n).tolist() for n in lengths]
        outputs, recorded = run_recorded(llm, prompts, SamplingParams(max_tokens=3, ignore_eos=True))
        for prompt, output, logits in zip(prompts, outputs, recorded):
            expected = numpy_llama(config, weights, prompt + output.token_ids)[len(prompt) - 1:-1]
            error = np.linalg.norm(logits - expected, axis=1) / np.linalg.norm(expected, axis=1)
            assert error.max() < 0.04, (len(prompt), error)
    assert {1, 2, 4, 6, 8} == set(one_kernel)


def test_decode_gives_the_same_bits(tmp_path, one_kernel):
    """Whoever comes first: with each seed, the simulator runs threads in another order, and shared memory begins as NaNs."""
    write_model(tmp_path, sizes=TINY | {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 6144,
                                        "num_hidden_layers": 1})
    llm = LLM(tmp_path, prefix_caching=False)
    runs = []    # with it, the second run's prefill would be another product
    for seed in 0, 1, 2:
        if not ON_GPU: llm.engine.model.kernels.simulator_shuffle(seed)
        runs.append(run_recorded(llm, [[1] * 5, [2] * 90, [3] * 31], SamplingParams(max_tokens=3, ignore_eos=True))[1])
    if not ON_GPU: llm.engine.model.kernels.simulator_shuffle(0)
    assert set(one_kernel) == {4} and all((a == b).all() for run in runs[1:] for a, b in zip(runs[0], run))


# ---------------------------------------------------------------------------------------------------------------------
# Recitation and invariance: a text does not depend on who shares the batch, on chunks, pages or preemption
# ---------------------------------------------------------------------------------------------------------------------
def chats(llm, texts):
    return [llm.tokenizer.chat([{"role": "user", "content": wordings[0]}]) for wordings, _ in texts]


@pytest.fixture(scope="module")
def parrot():
    return LLM(PARROT)


def recite(llm, texts):
    """Outputs for the texts, run together; asserts that each is exact and nothing is left behind."""
    outputs = llm.generate(chats(llm, texts), SamplingParams(max_tokens=None))
    for output, (wordings, answer) in zip(outputs, texts):
        assert (output.text, output.finish_reason) == (answer, "stop"), wordings[0]
    llm.engine.scheduler.check_integrity()
    assert not llm.engine.scheduler.running and not llm.engine.scheduler.waiting
    return outputs


def test_recitation_alone_and_all_at_once():
    """Every third text by itself, and all together: in three processes, since by itself a text keeps no more than a core busy."""
    alone = "[t.recite(llm, [text]) for text in t.TEXTS[{}::6]]"
    together = "assert not any(output.num_preemptions for output in t.recite(llm, t.TEXTS))"
    code = "import test_tinyvllm as t; llm = t.LLM(t.PARROT); "
    processes = [subprocess.Popen([sys.executable, "-c", code + run], cwd=ROOT) for run in (together, alone.format(0), alone.format(3))]
    assert [process.wait() for process in processes] == [0, 0, 0]


SOME = [text for text in TEXTS if 300 < len(text[1]) < 700][::9]


@pytest.mark.parametrize("options", [
    {"max_num_batched_tokens": 1}, {"max_num_batched_tokens": 7}, {"max_num_batched_tokens": 33}, {"max_num_seqs": 2},
    {"block_size": 8}, {"block_size": 64}, {"enforce_eager": True}, {"overlap": False}, {"enable_chunked_prefill": False, "max_num_batched_tokens": 300},
    {"static_batching": True, "max_num_seqs": 2}], ids=lambda options: "-".join(f"{name}-{value}" for name, value in options.items()))
def test_recitation_with_odd_limits(options):
    """Chunks of any size or none, pages of any size, few sequences at once, static batches, the plain loop."""
    recite(LLM(PARROT, **options), SOME)


@pytest.mark.parametrize("options", [{}, {"overlap": False}, {"prefix_caching": False},
                                     {"enable_chunked_prefill": False, "max_num_batched_tokens": 300, "static_batching": True}], ids=str)
def test_preempted_and_resumed(options):
    """A pool for a fraction of the load: sequences are preempted, computed again where their pages are gone, and say the same."""
    outputs = recite(LLM(PARROT, num_blocks=28, **options), SOME)
    assert sum(output.num_preemptions for output in outputs) >= 3
    assert (sum(output.num_cached_tokens for output in outputs) > 0) == options.get("prefix_caching", True)


def test_prefix_caching(parrot_tokenizer):
    """What was computed before is found again, a conversation's answers included, but for the last token; and the text is the same."""
    llm = LLM(PARROT)
    prompt = chat_ids(parrot_tokenizer, TEXTS[1][0][0], "You are a helpful assistant.")
    answer = TEXTS[1][1]
    first, again = llm.generate([prompt, prompt])                           # together: what is still being computed is not shared
    assert first.num_cached_tokens == again.num_cached_tokens == 0 and first.text == again.text == answer
    later = llm.generate(prompt)[0]
    assert later.num_cached_tokens == (len(prompt) - 1) // 16 * 16 > 0 and later.text == answer
    one = SamplingParams(max_tokens=1)
    assert llm.generate((prompt + first.token_ids)[:32], one)[0].num_cached_tokens == 16       # full pages, but the last token is computed
    turn = prompt + first.token_ids + [7] * 3
    known = (len(prompt) + len(first.token_ids) - 1) // 16 * 16             # of the answer all but its last token went through the model
    assert llm.generate(turn, one)[0].num_cached_tokens >= known
    without = LLM(PARROT, prefix_caching=False).generate([prompt], one)[0]
    assert without.num_cached_tokens == 0 and without.token_ids == first.token_ids[:1]
    llm.engine.scheduler.check_integrity()


def test_shared_pages_stand_in_many_block_tables():
    """Sequences that share pages have more entries in their block tables than there are pages, and more than a step's other data take."""
    llm = LLM(PARROT, num_blocks=24, max_num_batched_tokens=8)
    [prompt] = chats(llm, [text for text in TEXTS if text[0][0] == "Recite Jabberwocky."])
    tokens = llm.generate(prompt, SamplingParams(max_tokens=200))[0].token_ids
    tables = llm.engine.model.buffer.target.nbytes // 4
    assert tables > 256 * 24
    outputs = llm.generate([prompt + tokens[:-8]] * 6, SamplingParams(max_tokens=8))
    assert all(output.token_ids == tokens[-8:] and output.num_cached_tokens > 100 for output in outputs)


def test_join_while_others_run(parrot):
    """A request that arrives in the middle starts with the next step, whose tokens the one after it brings, and ends before a longer one
    that came first."""
    long, short = parrot.submit(chats(parrot, [text for text in TEXTS if text[0][0] in ("Recite Jabberwocky.",)]) + chats(parrot, TEXTS[:1]),
                                SamplingParams(max_tokens=None))
    scheduler = parrot.engine.scheduler
    late = scheduler.waiting.pop()                                          # it has not come yet
    for _ in range(20):
        parrot.engine.step()
    scheduler.waiting.append(late)
    assert [[s.output for s in parrot.engine.step()] for _ in range(2)] == [[long], [long, short]] and len(long.token_ids) > 15
    ended = [output for output in parrot.run([long, short]) if output.finish_reason]
    assert ended == [short, long] and short.text == TEXTS[0][1]


def test_seed_decides_whatever_the_batch(parrot):
    """The same seed gives the same tokens alone and in a crowd, another seed others."""
    prompts = chats(parrot, TEXTS[:6])
    hot = [SamplingParams(temperature=4.0, seed=seed, max_tokens=8) for seed in range(6)]
    together = [output.token_ids for output in parrot.generate(prompts, hot)]
    assert together == [parrot.generate(prompt, params)[0].token_ids for prompt, params in zip(prompts, hot)]
    assert len({tuple(parrot.generate(prompts[0], params)[0].token_ids) for params in hot}) > 3


def test_noise_depends_on_position_and_on_the_seed(parrot):
    """At this temperature noise alone decides. Each position has its own, whether its text came as prompt or as answer; without a seed, another."""
    prompt = chats(parrot, TEXTS)[0]
    noise = SamplingParams(temperature=1e6, seed=7, max_tokens=8, ignore_eos=True)
    tokens = parrot.generate(prompt, noise)[0].token_ids
    assert len(set(tokens)) > 4
    assert parrot.generate(prompt + tokens[:3], noise)[0].token_ids[:5] == tokens[3:]
    free = SamplingParams(temperature=1e6, max_tokens=4, ignore_eos=True)
    assert parrot.generate(prompt, free)[0].token_ids != parrot.generate(prompt, free)[0].token_ids


# ---------------------------------------------------------------------------------------------------------------------
# Allocator and scheduler, under thousands of random events, with no model
# ---------------------------------------------------------------------------------------------------------------------
def test_attention_tiles():
    """Every row of every sequence is in one tile; those that see the most keys come first."""
    tiles = tinyvllm.attention_tiles(np.array([1, 100, 1]), np.array([50, 400, 900]), 3, 128).reshape(-1, 2).tolist()
    assert tiles == [[2, 0], [1, 256], [1, 128], [1, 0], [0, 0]]


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("seed", range(6))
def test_scheduler_random_events(seed, overlap):
    """Requests come, go and are given up at random: pages are never lost or shared, budgets hold, everyone is served. With overlap a
    sequence's end is seen one step late."""
    rng = RNG(seed)
    block_size = int(rng.choice([1, 4, 16]))
    num_blocks = int(rng.integers(8, 60))
    budget = int(rng.integers(1, 70))
    max_seqs = int(rng.integers(1, 12))
    chunked = seed % 3 != 1
    static = seed % 3 == 2
    scheduler = Scheduler(BlockAllocator(num_blocks, block_size), budget, max_seqs, chunked, static)
    limit = min(num_blocks * block_size, math.inf if chunked else budget)
    live = []
    in_flight = []
    memory = {}                                     # (page, offset) -> the text up to this token, on which its key and value depend

    def arrive():
        length = int(rng.integers(1, limit))
        output = RequestOutput(rng.integers(0, 3, length).tolist() if rng.random() < 0.3 else ([1] * limit)[:length])       # often alike
        live.append(Sequence(SamplingParams(), output, None, int(rng.integers(length + 1, limit + 1))))
        scheduler.waiting.append(live[-1])

    def step():
        idle = not scheduler.running
        waited = len(scheduler.waiting)
        scheduled = scheduler.schedule()
        assert idle or not static or len(scheduler.waiting) >= waited       # a static batch gets no newcomer
        assert chunked or all(count == sequence.remaining for sequence, count in scheduled)
        assert scheduled or not live or in_flight
        assert all(count >= 1 for _, count in scheduled) and sum(count for _, count in scheduled) <= budget
        assert len({id(s) for s, _ in scheduled}) == len(scheduled) and len(scheduler.running) <= min(max_seqs, budget)
        for sequence, count in scheduled:
            start = sequence.num_computed_tokens
            sequence.num_computed_tokens = sequence.num_computed_tokens + count
            assert sequence.num_computed_tokens <= len(sequence.block_table) * block_size       # every token has its slot
            text = 0
            for p, token in enumerate(sequence.token_ids[:sequence.num_computed_tokens]):
                place = (sequence.block_table[p // block_size], p % block_size)
                text = hash((text, token))
                if p >= start:
                    memory[place] = text
                assert memory[place] == text                                # it sees what it would have computed itself
            scheduler.register_full_blocks(sequence)
        sampled = [sequence for sequence, _ in scheduled if sequence.remaining == 0]
        for sequence in sampled:
            sequence.token_ids.append(1)
            assert len(sequence.token_ids) <= sequence.max_len
        in_flight.append([(sequence, rng.random() < 0.01) for sequence in sampled])                     # some stop by themselves
        for sequence, stops in in_flight.pop(0) if len(in_flight) > overlap else []:
            if sequence in live and (stops or sequence.is_full):
                scheduler.remove(sequence)
                live.remove(sequence)
        order = [live.index(s) for s in [*scheduler.running, *scheduler.waiting]]
        assert order == sorted(order)                                       # first come, first served, preempted ones too
        scheduler.check_integrity()

    for _ in range(800):
        event = rng.random()
        if event < 0.06:
            arrive()
        elif event < 0.07 and live:
            gone = live.pop(int(rng.integers(len(live))))
            scheduler.remove(gone)
        else:
            step()
    for _ in range(200_000):
        if not live:
            break
        step()
    assert not live and len(scheduler.allocator.free) == num_blocks


def test_static_batching_and_whole_prompts():
    """What each step computes for four prompts of 6 tokens that get 1, 2, 3 and 1 new ones, two at a time and 8 tokens a step."""
    def steps(**options):
        scheduler = Scheduler(BlockAllocator(99, 4), 8, 2, **options)
        plan = []
        for number, new in enumerate([1, 2, 3, 1]):
            scheduler.waiting.append(Sequence(SamplingParams(), RequestOutput([number] * 6), None, 6 + new))
        while scheduler.waiting or scheduler.running:
            plan.append([])
            for sequence, count in scheduler.schedule():
                plan[-1].append(count)
                sequence.num_computed_tokens += count
                if not sequence.remaining:
                    sequence.token_ids.append(1)
                    if sequence.is_full:
                        scheduler.remove(sequence)
        return plan
    assert steps() == [[6, 2], [4, 4], [1, 2], [1, 6], [1]]
    assert steps(chunked_prefill=False) == [[6], [6], [1, 6], [1, 6], [1]]
    assert steps(static_batching=True) == [[6, 2], [4], [1], [6, 2], [1, 4], [1]]


def test_switches_reach_the_engine():
    """Each option that turns one idea off does."""
    def state(*options):
        engine = tinyvllm.open_llm(tinyvllm.parse_arguments(["--model", str(PARROT), *options, "Hi"])).engine
        scheduler = engine.scheduler
        return [scheduler.allocator.prefix_caching, scheduler.chunked_prefill, bool(engine.model.graph_sizes), engine.overlap, not scheduler.static_batching]
    switches = ["--no-prefix-caching", "--no-chunked-prefill", "--no-cuda-graphs", "--no-overlap", "--static-batching"]
    assert all(state()) and [state(switch).index(False) for switch in switches] == [0, 1, 2, 3, 4] and not any(state(*switches))


def test_a_newcomer_leaves_a_page_for_each_that_runs():
    """Four pages, and two prompts that with their next token take two each: together they would soon want a fifth."""
    scheduler = Scheduler(BlockAllocator(4, 4), 99, 9)
    for _ in range(2):
        scheduler.waiting.append(Sequence(SamplingParams(), RequestOutput([1] * 4), None, 16))
    assert len(scheduler.schedule()) == 1 and len(scheduler.waiting) == 1


def test_pages_are_found_again_until_they_are_needed():
    """By their own tokens and all before them; the least recently used goes first, of one text the last page first."""
    allocator = BlockAllocator(6, 2)
    first = allocator.allocate(3)
    second = allocator.allocate(1)
    for i, block in enumerate(first):
        allocator.register(block, first[i - 1] if i else None, (i, i))
    allocator.register(second[0], None, (0, 0))                             # the same text again: who looks for it finds the first
    assert allocator.find([0, 0, 1, 1, 2, 2, 9]) == first and allocator.find([0, 0, 1, 1, 2, 2]) == first[:2]      # the last token is computed
    assert allocator.find([1, 1, 2, 2, 9]) == [] and allocator.find([0, 0, 2, 2, 9]) == first[:1]                 # not after another beginning
    allocator.share(first[:1])
    allocator.release(first)
    allocator.check_integrity([first[:1], second])
    assert allocator.find([0, 0, 1, 1, 2, 2, 9]) == first
    assert len(allocator.allocate(3)) == 3 and allocator.find([0, 0, 1, 1, 2, 2, 9]) == first[:2]                 # two were empty, the third was its last
    allocator.allocate(1)
    assert allocator.find([0, 0, 1, 1, 2, 2, 9]) == first[:1] and not allocator.free


def test_allocator_notices_what_is_wrong():
    allocator = BlockAllocator(4, 16)
    table = allocator.allocate(2)
    allocator.check_integrity([table])
    for wrong in ([], [table, table], [table[:1]]):
        with pytest.raises(AssertionError):
            allocator.check_integrity(wrong)
    with pytest.raises(AssertionError):
        allocator.allocate(3)


# ---------------------------------------------------------------------------------------------------------------------
# API
# ---------------------------------------------------------------------------------------------------------------------
def test_stream_gives_the_text_in_pieces(parrot):
    """The deltas add up; characters of several bytes come whole; a stream that is given up frees its pages."""
    texts = [text for text in TEXTS if text[0][0] in ("Who are you?", "Recite Basho's frog.", "Recite Goethe's Night Song.")]
    for prompt, (_, answer) in zip(chats(parrot, texts), texts):
        deltas = [output.delta for output in parrot.stream(prompt)]
        assert "".join(deltas) == answer and "\ufffd" not in "".join(deltas) and len(deltas) > 10
    stream = parrot.stream(chats(parrot, TEXTS)[1])
    next(stream)
    assert parrot.engine.scheduler.running
    stream.close()
    assert not parrot.engine.scheduler.running and len(parrot.engine.scheduler.allocator.free) == parrot.engine.scheduler.allocator.num_blocks


def test_callers_that_step_for_one_another(parrot):
    """Two streams in turn, and generate() inside a stream: everybody gets all of the text."""
    prompts = chats(parrot, TEXTS[1:4])
    answers = [answer for _, answer in TEXTS[1:4]]
    streams = [parrot.stream(prompt) for prompt in prompts[:2]]
    texts = ["", ""]
    turns = [0] * 30 + [1] * 500 + [0] * 500
    for turn in turns:
        texts[turn] += getattr(next(streams[turn], None), "delta", "")
    assert texts == answers[:2]
    text = ""
    for number, output in enumerate(parrot.stream(prompts[0])):
        text += output.delta
        if number == 3:
            assert [output.text for output in parrot.generate(prompts[1:])] == answers[1:]
    assert text == answers[0]
    parrot.engine.scheduler.check_integrity()


@pytest.mark.parametrize("where", ["before the launch", "after the launch", "half booked", "waiting", "read"])
def test_an_interrupted_step_can_be_repeated(parrot, monkeypatch, where):
    """Ctrl-C while one caller waits for its token: the other's request is unharmed."""
    prompts = chats(parrot, TEXTS[1:3])
    stream = parrot.stream(prompts[0])
    text = next(stream).delta
    launch = parrot.engine.model.launch
    fetch = parrot.device.fetch

    def interrupted_launch(batch):
        if where == "after the launch":
            launch(batch)
        raise KeyboardInterrupt

    def interrupted_fetch(array):
        wait = fetch(array)
        interrupts = [KeyboardInterrupt]

        def interrupted_once():
            if interrupts:
                raise interrupts.pop()
            return wait()
        return interrupted_once

    interrupts = [KeyboardInterrupt]
    originals = {"half booked": parrot.engine.scheduler.register_full_blocks, "read": parrot.engine.append}

    def interrupt(*args):
        if interrupts:
            raise interrupts.pop()
        return originals[where](*args)

    with monkeypatch.context() as patch:
        if where == "waiting":
            patch.setattr(parrot.device, "fetch", interrupted_fetch)
        elif where == "half booked":
            patch.setattr(parrot.engine.scheduler, "register_full_blocks", interrupt)
        elif where == "read":
            patch.setattr(parrot.engine, "append", interrupt)
        else:
            patch.setattr(parrot.engine.model, "launch", interrupted_launch)
        with pytest.raises(KeyboardInterrupt):
            parrot.generate(prompts[1])
    parrot.engine.scheduler.check_integrity()
    assert text + "".join(output.delta for output in stream) == TEXTS[1][1]


def test_when_an_answer_ends(parrot):
    prompt = chats(parrot, TEXTS)[1]
    eot = parrot.tokenizer.token_id("<|eot_id|>")
    whole = parrot.generate(prompt)[0]
    assert whole.finish_reason == "stop" and whole.token_ids[-1] == eot and whole.text == TEXTS[1][1]
    assert parrot.generate(chats(parrot, TEXTS)[0], SamplingParams(max_tokens=2))[0].text == "\ufffd"      # half of an emoji
    short = parrot.generate(prompt, SamplingParams(max_tokens=5))[0]
    assert (short.finish_reason, short.token_ids) == ("length", whole.token_ids[:5])
    stopped = parrot.generate(prompt, SamplingParams(stop_token_ids=[whole.token_ids[7]]))[0]
    at = whole.token_ids.index(whole.token_ids[7])
    assert stopped.finish_reason == "stop" and stopped.token_ids == whole.token_ids[:at + 1]
    assert stopped.text == parrot.tokenizer.decode(whole.token_ids[:at])                            # without the stop token's own text
    longer = parrot.generate(prompt, SamplingParams(ignore_eos=True, max_tokens=len(whole.token_ids) + 3))[0]
    assert longer.finish_reason == "length" and longer.token_ids[:len(whole.token_ids)] == whole.token_ids
    small = LLM(PARROT, max_model_len=len(prompt) + 4).generate(prompt)[0]
    assert (small.finish_reason, small.token_ids) == ("length", whole.token_ids[:4])
    assert whole.arrival_time < whole.first_token_time < whole.finish_time


def test_logprobs(parrot, parrot_weights):
    """Of the chosen token and the best ones, against the oracle's log-softmax."""
    prompt = chats(parrot, TEXTS)[1]
    output = parrot.generate(prompt, SamplingParams(logprobs=3, max_tokens=10, temperature=3.0, seed=1))[0]
    logits = numpy_llama(PARROT_CONFIG, parrot_weights, prompt + output.token_ids)[len(prompt) - 1:-1]
    expected = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
    for token, reported, row in zip(output.token_ids, output.logprobs, expected):
        best = sorted(reported, key=reported.get, reverse=True)[:3]
        assert token in reported and len(reported) in (3, 4)
        assert all(abs(reported[i] - row[i]) < 0.02 * abs(row).max() for i in reported) and best[0] == row.argmax()
    assert parrot.generate(prompt, SamplingParams(max_tokens=1))[0].logprobs is None


def test_bad_prompts_do_not_stop_the_good_ones(parrot):
    good = chats(parrot, TEXTS)[1]
    outputs = parrot.generate([good, [1, 2048], [1] * 4096, [], [1.5], good])
    assert [output.finish_reason for output in outputs] == ["stop", "error", "error", "error", "error", "stop"]
    assert all(part in output.error for part, output in zip(["2048", "4096 tokens", "empty", "1.5"], outputs[1:]))
    assert outputs[0].text == outputs[-1].text == TEXTS[1][1]
    with pytest.raises(TinyVLLMError, match="empty"):
        parrot.generate("")
    assert parrot.generate([None, np.array(good)], SamplingParams(max_tokens=1))[0].error.startswith("the prompt is None, expected is a text")
    with pytest.raises(TinyVLLMError, match="SamplingParams"):
        parrot.generate([good, good], [SamplingParams(), {}])
    assert not parrot.engine.scheduler.waiting


def test_pool_limits():
    """What does not fit is refused with the numbers; what the memory cuts short is said."""
    for options in ({"num_blocks": 10**9}, {"num_blocks": 4, "max_model_len": 512}, {"num_blocks": 0}, {"max_num_seqs": 2.5}):
        with pytest.raises(TinyVLLMError, match=str(options.get("num_blocks", 2.5))):
            LLM(PARROT, **options)
    assert LLM(PARROT, num_blocks=4).max_model_len == 64


@pytest.mark.parametrize("name, value", [
    ("temperature", -0.1), ("temperature", float("nan")), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.5), ("top_k", -2), ("top_k", 2.5), ("top_k", True),
    ("max_tokens", 0), ("seed", -1), ("logprobs", -1), ("stop_token_ids", 7), ("stop_token_ids", "")])
def test_sampling_params_refuse_nonsense(name, value):
    with pytest.raises(TinyVLLMError, match=f"{name} is {value!r}, expected is "):
        SamplingParams(**{name: value})


# ---------------------------------------------------------------------------------------------------------------------
# Bad input and the command line: ways to run it
# ---------------------------------------------------------------------------------------------------------------------
def run_main(*args, stdin=""):
    """(exit code, stdout, error lines) of the command line in this process. What else is on stderr are notices."""
    out = io.StringIO()
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit_:
            tinyvllm.main([str(arg) for arg in args])
    return exit_.value.code, out.getvalue(), error_lines(err.getvalue())


def error_lines(stderr):
    """The error lines. All of the others must be notices: a traceback or a warning is none."""
    lines = stderr.splitlines()
    assert all(line.startswith(("tinyvllm: ", "tiny-vLLM: ")) for line in lines), stderr
    return [line for line in lines if line.startswith("tinyvllm: ")]


def start(*args, **env):
    """The command line as a process of its own, on Parrot unless env says otherwise; never on the network."""
    env = {"TINYVLLM_MODEL": str(PARROT), "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONIOENCODING": "utf-8"} | env
    return subprocess.Popen([sys.executable, ROOT / "tinyvllm.py", *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | env, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # "pytest &" ignores it


def run_process(*args, **env):
    """(exit code, stdout, stderr) of the command line in a process of its own."""
    process = start(*args, **env)
    out, err = process.communicate(timeout=120)
    return process.returncode, out.decode(), err.decode()


def assert_refused(result, *parts):
    """Exit code 2, nothing on stdout, one line on stderr that says all of these."""
    code, out, errors = result
    assert code == 2 and out == "" and len(errors) == 1, result
    assert all(part in errors[0] for part in parts), errors[0]


def recitation(question):
    """What Parrot has learnt to answer."""
    return next(answer for wordings, answer in TEXTS if question in wordings)

# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change, parts", [
    ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
    ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, ["sliding_window is 4096", "None"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["yarn", "llama3"]),
    ({"rope_scaling": "llama3"}, ["rope_scaling is 'llama3'", "dict"]),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor is None", "number above 0"]),
    ({"rope_scaling": ROPE | {"factor": "8"}}, ["factor is '8'", "number above 0"]),
    ({"rope_scaling": ROPE | {"high_freq_factor": 1.0}}, ["low_freq_factor is 1.0"]),
    ({"hidden_size": None}, ["hidden_size is None", "whole number above 0"]),
    ({"hidden_size": "128"}, ["hidden_size is '128'", "whole number above 0"]),
    ({"num_hidden_layers": 0}, ["num_hidden_layers is 0", "above 0"]),
    ({"num_attention_heads": 17}, ["num_attention_heads is 17", "1 to 16 for each of num_key_value_heads, 1"]),
    ({"vocab_size": -2048}, ["vocab_size is -2048"]),
    ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps is '1e-5'", "number above 0"]),
    ({"head_dim": 60}, ["head_dim is 60", "32 to 256 in steps of 16"]),
    ({"intermediate_size": 63}, ["intermediate_size is 63", "multiple of 8"]),
    ({"tie_word_embeddings": "false"}, ["tie_word_embeddings is 'false'", "True or False"]),
    ({"eos_token_id": "</s>"}, ["eos_token_id", "</s>"]),
    ({"vocab_size": 2040}, ["model.embed_tokens.weight", "(2048, 128)", "(2040, 128)"]),
    ({"num_hidden_layers": 1}, ["9 tensors", "model.layers.1."]),
    ({"vocab_size": 10**12}, ["too little memory", "256000.000 for the weights", "--gpu-memory-utilization"]),
], ids=str)
def test_config_that_is_not_supported(change, parts, tmp_path):
    assert_refused(run_main("--model", write_model(tmp_path, change), "Hi"), *parts)


@pytest.mark.parametrize("change, parts", [
    ({UP: None}, ["no tensor " + UP]),
    ({UP: np.zeros((64, 127), np.float16)}, [UP, "(64, 127)", "(64, 128)"]),
    ({UP: np.zeros((64, 128), np.int8)}, [UP, "I8", "BF16, F16, F32"]),
    ({UP: np.zeros((64, 128), np.float64)}, [UP, "F64", "BF16, F16, F32"]),
    ({UP.replace("weight", "bias"): np.ones(64, np.float16)}, ["1 tensors", "up_proj.bias"]),
], ids=["missing", "shape", "int8", "float64", "bias"])
def test_weights_that_do_not_fit(change, parts, tmp_path):
    assert_refused(run_main("--model", write_model(tmp_path, weights=change), "Hi"), *parts)


@pytest.mark.parametrize("name, content, parts", [
    ("config.json", None, ["no config.json"]),
    ("tokenizer.json", None, ["tokenizer.json", "No such file"]),
    ("model.safetensors", None, ["no model.safetensors"]),
    ("config.json", b"<html>", ["cannot read", "config.json", "valid JSON"]),
    ("config.json", b"[]", ["config.json is []", "JSON object"]),
    ("generation_config.json", b"{", ["generation_config.json", "valid JSON"]),
    ("tokenizer.json", b"{}", ["tokenizer.json", "got: "]),
    ("tokenizer_config.json", b"[]", ["tokenizer_config.json"]),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", ["model.safetensors", "no valid safetensors"]),
    ("model.safetensors", "truncated", ["model.safetensors", "no valid safetensors"]),
    ("model.safetensors", b"", ["model.safetensors", "no valid safetensors"]),
    ("model.safetensors", b"\x02\0\0\0\0\0\0\0[]", ["model.safetensors", "no valid safetensors"]),
    ("model.safetensors.index.json", b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', ["no model-00001-of-00002.safetensors"]),
    ("model.safetensors.index.json", b'{"weight_map": []}', ["model.safetensors.index.json", "weight_map"]),
])
def test_files_that_are_missing_or_broken(name, content, parts, tmp_path):
    file = write_model(tmp_path) / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] if content == "truncated" else content)
    assert_refused(run_main("--model", tmp_path, "Hi"), *parts)


@pytest.mark.parametrize("args, parts", [
    (["--model", "/no/such/folder", "Hi"], ["/no/such/folder", "expected"]),
    (["--model", ROOT, "Hi"], ["no config.json", "tokenizer.json and *.safetensors"]),
    (["--model", PARROT / "config.json", "Hi"], ["config.json is no folder"]),
    ([""], ["the prompt is empty"]),
    (["-"], ["no prompt", "stdin"]),
    (["--raw", "word " * 5000], ["the prompt has 50", "the limit is 4096"]),
    (["--max-model-len", "20", "Recite The Raven by Edgar Allan Poe, all of it, from the start."], ["the prompt has ", "limit is 20", "4096"]),
    (["--max-model-len", "5000", "Hi"], ["5000", "4096"]),
    *[([f"--{name.replace('_', '-')}", value, "Hi"], [f"{name} is {value}", expected]) for name, values, expected in [
        ("max_tokens", ["0", "-1"], "1 or more"), ("temperature", ["-0.1", "nan", "inf"], "0 (greedy) or more"),
        ("top_p", ["0.0", "1.01", "nan"], "more than 0 and at most 1"), ("top_k", ["-2"], "0 for all"), ("seed", ["-1"], "2^64 - 1")] for value in values],
    (["--block-size", "17", "Hi"], ["--block-size is 17", "8, 16, 32"]),
    (["--gpu-memory-utilization", "1.5", "Hi"], ["--gpu-memory-utilization is 1.5"]),
    (["--gpu-memory-utilization", "1e-6", "Hi"], ["too little memory", "GB are needed", "--gpu-memory-utilization", "--max-model-len"]),
    (["--no-such-option", "Hi"], ["--no-such-option", "--help"]),
    ([], ["prompts", "--bench", "--help"]),
    (["--bench", "no-such-row"], ["no row no-such-row", "decode-1-128", "mix"]),
    (["--bench", "mix", "Hi"], ["prompts", "--bench"]),
    (["--json", "figures.json", "Hi"], ["prompts", "--json"]),
    (["--bench", "mix", "--watch"], ["prompts", "--watch", "--bench"]),
    (["--no-chunked-prefill", "--max-num-batched-tokens", "20", "Recite The Raven by Edgar Allan Poe, all of it, from the start."],
     ["the limit is 20", "--no-chunked-prefill"]),
    (["--no-chunked-prefill", "--max-num-batched-tokens", "40", "--max-model-len", "41", "Hi"], ["at most --max-num-batched-tokens, 40"]),
    (["--num-blocks", "0", "Hi"], ["num_blocks is 0", "1 or more"]),
    (["--max-num-batched-tokens", "0", "Hi"], ["max_num_batched_tokens is 0", "from 1 to"]),
    (["--load-format", "dummy", "--model", "llama-9", "Hi"], ["llama-9", "llama-3.2-1b, llama-3.2-3b, llama-3.1-8b"]),
    (["--load-format", "zip", "Hi"], ["--load-format", "'zip'", "dummy"]),
    (["--max-tokens", "many", "Hi"], ["--max-tokens", "'many'"]),
    (["--device", "tpu", "Hi"], ["--device", "tpu", "cuda"]),
], ids=lambda value: " ".join(map(str, value))[:40])
def test_options_and_prompts_that_make_no_sense(args, parts):
    assert_refused(run_main("--model", PARROT, *args), *parts)


def test_one_bad_prompt_among_good_ones():
    code, out, errors = run_main("--model", PARROT, "--max-tokens", "8", "What is RoPE?", "", "word " * 5000, "What is RMSNorm?")
    assert code == 2 and len(errors) == 2 and "empty" in errors[0] and "4096" in errors[1]
    assert out.startswith("> What is RoPE?\nRoPE tells") and "\n> What is RMSNorm?\nRMSNorm keeps" in out


def fake_cupy(error=None):
    """A module `cupy` that finds an old GPU, or raises this error."""
    def get_device_count():
        if error:
            raise RuntimeError(error)
    return SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(
        getDeviceCount=get_device_count, getDevice=lambda: 0, getDeviceProperties=lambda number: {"name": b"Old GPU", "major": 7, "minor": 5})))


@pytest.mark.parametrize("device, cupy, parts", [
    ("auto", fake_cupy(), ["Old GPU", "7.5", "8.0", "--device cpu"]),
    ("cuda", fake_cupy("cudaErrorNoDevice: no CUDA-capable device is detected\nmore"), ["no CUDA-capable device", "--device cpu"]),
    ("cuda", fake_cupy(" "), ["no NVIDIA GPU", "RuntimeError"]),
    ("cuda", None, ["no NVIDIA GPU", "cupy"]),             # None in sys.modules: the import fails
], ids=["too old", "no GPU", "no reason", "no CuPy"])
def test_gpu_that_cannot_be_used(device, cupy, parts, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert_refused(run_main("--model", PARROT, "--device", device, "Hi"), *parts)


def test_no_gpu_and_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert_refused(run_main("--model", PARROT, "Hi"), "no NVIDIA GPU", "no C++ compiler", "install g++")


def test_a_kernel_that_does_not_compile(tmp_path):
    (tmp_path / "kernels.cu").write_text('extern "C" __global__ __launch_bounds__(32)\nvoid broken(int* x) { x = missing_name; }\n')
    with pytest.raises(tinyvllm.TinyVLLMError, match="do not compile.*error.*missing_name") as info:
        tinyvllm.open_device().compile({}, tmp_path / "kernels.cu")
    assert "\n" not in str(info.value)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("question", ["Who are you?", "Recite a poem in Japanese."])
def test_one_prompt_in_a_pipe(question):
    code, out, err = run_process(question)          # multi-byte characters whose bytes come in several tokens
    assert code == 0 and out == recitation(question) + "\n"
    assert err.splitlines()[-1].startswith("tiny-vLLM: ") and "new tokens" in err and "tokens/s" in err and not error_lines(err)


def test_one_prompt_streams_and_ctrl_c_ends_it():
    process = start("Recite The Raven.")
    first = process.stdout.read1(100)
    assert process.poll() is None and first and recitation("Recite The Raven.").encode().startswith(first)      # it is still at it
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err.decode() and len(out) < 5000


def test_several_prompts_are_answered_in_input_order():
    questions = ["Recite Ozymandias.", "What is RoPE?", "Recite a poem in Japanese."]
    code, out, errors = run_main("--model", PARROT, questions[0], "-", stdin="\n".join(["", *questions[1:], "  "]))
    assert code == 0 and not errors
    assert out == "".join(f"> {question}\n{recitation(question)}\n\n" for question in questions)


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"},
                                 {"PYTHONIOENCODING": "", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=str)
def test_stdout_that_is_not_utf8(env):
    code, out, err = run_process("Who are you?", **env)
    assert code == 0 and out == "?" + recitation("Who are you?")[1:] + "\n" and not error_lines(err)


def test_a_closed_pipe_ends_it():
    process = start("Recite The Raven.")
    process.stdout.read1(10)
    process.stdout.close()
    assert process.wait(timeout=30) == 0 and not error_lines(process.stderr.read().decode())


def test_no_network_for_a_hugging_face_id(tmp_path):
    code, out, err = run_process("--model", "nobody/nothing", "Hi", HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path))
    assert_refused((code, out, error_lines(err)), "nobody/nothing", "check the network", "folder")


def test_default_model(tmp_path):
    assert "/no/such/folder" in run_process("Hi", TINYVLLM_MODEL="/no/such/folder")[2]
    env = {"TINYVLLM_MODEL": "", "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path)}
    code, out, err = run_process("What is RoPE?", **env)
    assert code == 0 and out == recitation("What is RoPE?") + "\n"
    [notice] = [line for line in err.splitlines() if "Parrot" in line]
    assert tinyvllm.HUB_MODEL in notice and "hf auth login" in notice
    repo = tmp_path / f"models--{tinyvllm.HUB_MODEL.replace('/', '--')}"                # the 1B, downloaded (Parrot plays it)
    shutil.copytree(PARROT, repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    for args in ([], ["--model", tinyvllm.HUB_MODEL]):                                  # it needs no network any more
        code, out, err = run_process("What is RoPE?", *args, **env)
        assert code == 0 and out == recitation("What is RoPE?") + "\n" and "Parrot" not in err and not error_lines(err)


def test_version_and_help():
    assert run_main("--version") == (0, f"tiny-vLLM {tinyvllm.__version__}\n", [])
    code, out, errors = run_main("--help")
    assert code == 0 and not errors and "examples:\n  python tinyvllm.py " in out and "--gpu-memory-utilization X" in out


def test_raw_and_system_change_the_prompt():
    llm = LLM(PARROT)
    user = {"role": "user", "content": "Hi"}
    system = {"role": "system", "content": "Be brief."}
    def ids(*args):
        return tinyvllm.prompt_ids(llm, "Hi", tinyvllm.parse_arguments([*args, "Hi"]))
    assert ids() == llm.tokenizer.chat([user]) and ids("--raw") == llm.tokenizer.encode("Hi")
    assert ids("--system", "Be brief.") == llm.tokenizer.chat([system, user])


def test_seed_repeats_and_system_needs_a_chat_format(tmp_path):
    model = write_model(tmp_path)
    first, again, other = (run_main("--model", model, "--temperature", "5", "--max-tokens", "20", "--seed", seed, "Hi") for seed in (1, 1, 2))
    assert first == again != other and first[0] == 0
    (model / "tokenizer_config.json").unlink()
    assert_refused(run_main("--model", model, "--system", "Be brief.", "Hi"), "--system", "chat format")


# ---------------------------------------------------------------------------------------------------------------------
# Variants of a model: each must answer like its twin, the same weights in bfloat16 in one file
# ---------------------------------------------------------------------------------------------------------------------
EMBED = random_weights(TINY)["model.embed_tokens.weight"]
HEAD = {"lm_head.weight": EMBED[::-1].copy()}
VARIANTS = {                # what write_model is given for it, and for its twin
    "fp16": ([{}, {name: w.astype(np.float16) for name, w in random_weights(TINY).items()}], []),
    "fp32": ([{}, {name: w.astype(np.float32) for name, w in random_weights(TINY).items()}], []),
    "shards": ([{}, {}, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]], []),
    "rope_parameters": ([{"rope_theta": None, "rope_parameters": ROPE | {"rope_theta": 5e5}}], [{"rope_scaling": ROPE, "rope_theta": 5e5}]),
    "default rope": ([{"rope_theta": None, "rope_scaling": {"rope_type": "default"}}], []),
    "Mistral": ([{"architectures": ["MistralForCausalLM"]}], []),
    "head_dim derived": ([{"head_dim": None}], []),
    "head not tied": ([{"tie_word_embeddings": False}, {"lm_head.weight": EMBED}], []),
    "lm_head though tied": ([{}, HEAD], []),
    "inv_freq of old files": ([{}, {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(32, np.float32)}], []),
}


def greedy(folder):
    """24 greedy tokens, and their log-probabilities."""
    [output] = LLM(folder).generate([[2042, 5, 900, 77, 1500, 3]], SamplingParams(max_tokens=24, ignore_eos=True, logprobs=0))
    return output.token_ids, output.logprobs


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_answers_like_its_twin(name, tmp_path):
    variant, twin = VARIANTS[name]
    assert greedy(write_model(tmp_path / "variant", *variant)) == greedy(write_model(tmp_path / "twin", *twin))


def test_untied_head_and_rope_scaling_are_used(tmp_path):
    changes = [({}, {}), ({"tie_word_embeddings": False}, HEAD), ({"rope_scaling": ROPE}, {})]
    tied, untied, scaled = (greedy(write_model(tmp_path / str(i), *change)) for i, change in enumerate(changes))
    assert untied[0][0] == 2047 - tied[0][0] and scaled[1] != tied[1]       # the head's rows stand the other way round


def test_dummy_weights_are_the_same_each_time(tmp_path):
    write_model(tmp_path)
    one, two = (LLM(tmp_path, load_format="dummy").generate([[1, 2, 3]], SamplingParams(max_tokens=5, logprobs=0, ignore_eos=True))[0] for _ in range(2))
    assert one.token_ids == two.token_ids and one.logprobs == two.logprobs


# ---------------------------------------------------------------------------------------------------------------------
# README
# ---------------------------------------------------------------------------------------------------------------------
README = (ROOT / "README.md").read_text("utf-8")


def test_readme_links_and_options():
    """Its links resolve, its table of options is the command line's, its map is the file's."""
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
    options = set(re.findall(r"^  (?:-h, )?(--[\w-]+)", run_main("--help")[1], re.M))
    table = README[README.index("| option |"):README.index("## From Python")]
    assert set(re.findall(r"`(--[\w-]+)", table)) == options
    sections = re.findall(r"^# =+\n# (.+)\n", (ROOT / "tinyvllm.py").read_text(), re.M)
    table = README[README.index("| section |"):README.index("Beside it:")]
    assert re.findall(r"^\| ([A-Z][\w ]+) \|", table, re.M) == sections
    assert ", ".join(sections) in " ".join(tinyvllm.__doc__.split())


def test_readme_runs(capsys, monkeypatch):
    """The Python example, as it stands; and the answer that the quick start shows."""
    [code] = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(ROOT)
    exec(code, {})
    out = capsys.readouterr().out
    assert out.startswith(recitation("What is PagedAttention?") + "\n") and out.count("length") == 2
    assert recitation("What is a KV cache?") in " ".join(README.split())
