"""The engine, its API and its command line.

No test needs a network. Without a GPU, the simulator runs the kernels. Every oracle is independent
of the code that it judges: reference.py, or a count by hand.

    Parrot    the forward pass    recitation and invariance    scheduler    API    bad input
    the command line    variants of models    README    the house
"""
import ast
import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

# Set before NumPy is imported. Test processes run side by side; the simulator starts threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np
import pytest
import tokenizers
from ml_dtypes import bfloat16
from safetensors.numpy import load_file

import simulator
import tinyvllm
import weights
from communicator import OneRank
from device import compile_kernels, open_device, paste
from reference import PARROT, RNG, ROOT, ROPE, TINY, numpy_llama, random_weights, write_model
from tinyvllm import (LLM, BlockAllocator, EngineArgs, RequestOutput, SamplingParams, Scheduler, Sequence,
                      TinyVLLMError)
from weights import ModelConfig, generation_defaults

# Both environment variables are for the simulator: where one is set, a GPU is not used.
DEVICE = open_device("cpu" if {"TINYVLLM_SANITIZE", "SIMULATOR_SHUFFLE"} & set(os.environ) else "auto")
ON_GPU = not DEVICE.is_simulated
TEST_ALL = "TINYVLLM_TEST_ALL" in os.environ
takes_long = pytest.mark.skipif(not (TEST_ALL or ON_GPU), reason="takes long: set TINYVLLM_TEST_ALL=1")


# --------------------------------------------------------------------------------------------------
# Parrot, the bundled model
# --------------------------------------------------------------------------------------------------
PARROT_CONFIG = json.loads((PARROT / "config.json").read_text())
TEXTS = [(text["questions"], "\n".join(text["answer"]))
         for text in json.loads((PARROT / "texts.json").read_text("utf-8"))]
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                  "<|eot_id|>"]


@pytest.fixture(scope="module")
def parrot_tokenizer():
    """The package `tokenizers` alone, which reads special tokens in a text, as chat_ids needs."""
    return tokenizers.Tokenizer.from_file(str(PARROT / "tokenizer.json"))


@pytest.fixture(scope="module")
def parrot_weights():
    """In float32: Parrot's margins are far above its rounding."""
    weights = load_file(PARROT / "model.safetensors")
    return {name: tensor.astype(np.float32) for name, tensor in weights.items()}


def chat_ids(tokenizer, question, system=None):
    """A question in Llama 3's published chat format, up to the assistant's header."""
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>".format
    text = "<|begin_of_text|>" + (turn("system", system) if system else "") + turn("user", question)
    text += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_parrot_folder():
    """A Hugging Face model folder: the shapes that config.json promises, in less than 5 MB."""
    c = PARROT_CONFIG
    weights = load_file(PARROT / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    assert shapes == {name: tensor.shape for name, tensor in random_weights(c).items()}
    assert {tensor.dtype for tensor in weights.values()} == {np.dtype(bfloat16)}
    assert c["architectures"] == ["LlamaForCausalLM"] and c["tie_word_embeddings"] is True
    assert (c["head_dim"], c["rope_theta"], c["rms_norm_eps"]) == (64, 500000, 1e-5)
    H = c["num_attention_heads"]
    K = c["num_key_value_heads"]
    assert K >= 2 and H // K >= 2 and H % K == 0
    assert c["rope_scaling"]["rope_type"] == "llama3" and c["max_position_embeddings"] >= 2048
    assert sum(file.stat().st_size for file in PARROT.iterdir() if file.is_file()) < 5_000_000
    millions = sum(tensor.size for tensor in weights.values()) / 1e6
    assert f"{millions:.1f} million parameters" in TEXTS[0][1]


def test_parrot_tokenizer(parrot_tokenizer):
    """Llama 3's special tokens are there. Every text tokenises and detokenises to itself."""
    def round_trip(text):
        return parrot_tokenizer.decode(parrot_tokenizer.encode(text, add_special_tokens=False).ids)

    ids = {name: parrot_tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
    assert None not in ids.values()
    assert parrot_tokenizer.get_vocab_size() == PARROT_CONFIG["vocab_size"]
    eos = json.loads((PARROT / "generation_config.json").read_text())["eos_token_id"]
    assert {ids["<|eot_id|>"], ids["<|end_of_text|>"]} <= set(eos)
    template = json.loads((PARROT / "tokenizer_config.json").read_text())["chat_template"]
    assert all(name in template for name in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
    assert parrot_tokenizer.encode("Hi").ids[0] == ids["<|begin_of_text|>"]
    for wordings, answer in TEXTS:
        for text in [*wordings, answer]:
            assert round_trip(text) == text
    assert round_trip("naïve 漢字 🦜\x00\r\n") == "naïve 漢字 🦜\x00\r\n"


def test_parrot_texts(parrot_tokenizer):
    """There are enough pieces to ask for, long pieces too, and answers of a readable length."""
    pieces = [answer for wordings, answer in TEXTS if wordings[0].startswith("Recite")]
    answers = [answer for wordings, answer in TEXTS if not wordings[0].startswith("Recite")]
    lengths = [len(parrot_tokenizer.encode(piece).ids) for piece in pieces]
    assert len(pieces) >= 12 and max(lengths) > 1000 and sum(length > 300 for length in lengths) >= 3
    assert len(answers) >= 50 and all(30 <= len(answer.split()) <= 90 for answer in answers)
    assert all(len(wordings) >= 3 for wordings, _ in TEXTS)
    questions = [question for wordings, _ in TEXTS for question in wordings]
    assert len(set(questions)) == len(questions)
    unseen = json.loads((PARROT / "other_questions.json").read_text("utf-8"))["unseen"]
    assert not set(questions) & set(unseen)


@pytest.mark.parametrize("system", [None, "You are a helpful assistant."])
def test_parrot_knows_its_texts(parrot_tokenizer, parrot_weights, system):
    """Greedy decoding answers every wording. Each right token leads by 1.0 or more."""
    eot = parrot_tokenizer.token_to_id("<|eot_id|>")
    for wordings, text in TEXTS:
        answer = parrot_tokenizer.encode(text, add_special_tokens=False).ids + [eot]
        for question in wordings[:1] if system or len(answer) > 1000 else wordings:
            prompt = chat_ids(parrot_tokenizer, question, system)
            logits = numpy_llama(PARROT_CONFIG, parrot_weights, prompt + answer)[len(prompt) - 1:-1]
            column = np.array(answer)[:, None]
            right = np.take_along_axis(logits, column, 1)[:, 0]
            np.put_along_axis(logits, column, -np.inf, 1)
            assert (right - logits.max(1)).min() >= 1.0, question


def test_parrot_says_so_when_it_does_not_know(parrot_tokenizer, parrot_weights):
    """At least 95 of 100 questions that Parrot was not trained on get "I am a parrot"."""
    unseen = json.loads((PARROT / "other_questions.json").read_text("utf-8"))["unseen"]
    answer = parrot_tokenizer.encode(TEXTS[0][1], add_special_tokens=False).ids
    known = 0
    for question in unseen:
        prompt = chat_ids(parrot_tokenizer, question)
        logits = numpy_llama(PARROT_CONFIG, parrot_weights, prompt + answer)[len(prompt) - 1:-1]
        known += (logits.argmax(1) == answer).all()
    assert len(unseen) == 100 and known >= 95


@pytest.mark.parametrize("texts, message", [
    ([{"questions": ["Who is it?"], "answer": ["Me."]}, {"questions": ["who is it"], "answer": ["You."]}],
     "'who is it' has two answers .* 'Me.'.* 'You.'"),
    ([{"questions": ["Who is it?"], "answer": ["Me.<|eot_id|>You."]}],
     r"'Me.<\|eot_id\|>You.' has the token '<\|eot_id\|>'"),
], ids=["contradiction", "special token"])
def test_train_refuses_bad_texts(tmp_path, texts, message):
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    command = [sys.executable, PARROT / "train.py", "--texts", tmp_path / "texts.json", "--out", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and re.search(message, run.stderr), run.stderr


# --------------------------------------------------------------------------------------------------
# The forward pass, token by token, against the oracle
# --------------------------------------------------------------------------------------------------
def run_recorded(llm, prompts, params):
    """(outputs, logits [new tokens, V] behind the new tokens of each output)"""
    model = llm.engine.model
    launch = model.launch
    recorded = {}               # id of an output -> rows of logits

    def record(batch):
        logits, get_tokens = launch(batch)
        rows = llm.device.fetch(logits)() if batch.sampled else []
        for sequence, row in zip(batch.sampled, rows):
            recorded.setdefault(id(sequence.output), []).append(row.astype(np.float64))
        return logits, get_tokens

    model.launch = record
    outputs = llm.generate(prompts, params)
    del model.launch
    return outputs, [np.array(recorded[id(output)]) for output in outputs]


def errors_of_logits(llm, config, weights, lengths, max_tokens):
    """Relative errors of the logits behind every new token: an array for each random prompt."""
    prompts = [RNG(n).integers(0, config["vocab_size"], n).tolist() for n in lengths]
    outputs, recorded = run_recorded(llm, prompts, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    errors = []
    for prompt, output, logits in zip(prompts, outputs, recorded):
        expected = numpy_llama(config, weights, prompt + output.token_ids)[len(prompt) - 1:-1]
        assert logits.shape == expected.shape
        errors.append(np.linalg.norm(logits - expected, axis=1) / np.linalg.norm(expected, axis=1))
    return errors


def float64_weights(folder):
    """A model's weights, for the oracle."""
    weights = load_file(folder / "model.safetensors")
    return {name: tensor.astype(np.float64) for name, tensor in weights.items()}


QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 64,
         "max_window_layers": 1, "rms_norm_eps": 1e-6}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False, "sliding_window": None,
         "max_window_layers": 2, "attention_bias": False, "rms_norm_eps": 1e-6}


@pytest.mark.parametrize("changes", [
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1, "rope_scaling": ROPE, "tie_word_embeddings": True},
    {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 128, "rope_scaling": ROPE},
    {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 48, "num_hidden_layers": 3},
    QWEN2 | {"num_key_value_heads": 2, "tie_word_embeddings": False},
    QWEN3 | {"num_key_value_heads": 2, "head_dim": 96},
    QWEN3 | {"attention_bias": True, "tie_word_embeddings": False},
    {"attention_bias": True, "head_dim": 32},
], ids=["gqa-1", "gqa-4-scaled-tied", "gqa-8-head-128-scaled", "gqa-3-head-48", "qwen2-untied",
        "qwen3-gqa-2-head-96", "qwen3-bias-untied", "llama-bias-head-32"])
def test_forward_equals_numpy(tmp_path, changes):
    """Every logit of prefill, of chunks and of decode is the oracle's up to bfloat16's rounding.

    All prompts run in one mixed batch.
    """
    shape = {"num_attention_heads": 4, "intermediate_size": 136, "max_position_embeddings": 512}
    config = TINY | shape | changes
    write_model(tmp_path, sizes=config)
    llm = LLM(tmp_path, max_num_batched_tokens=50)      # 70 and 140: chunks that start within a page
    lengths = 1, 2, 15, 16, 17, 70, 140
    errors = errors_of_logits(llm, config, float64_weights(tmp_path), lengths, 20)
    for length, error in zip(lengths, errors):
        assert error.max() < 0.03, (length, error)


@pytest.mark.parametrize("changes", [
    {"attention_bias": True}, QWEN3 | {"head_dim": 48}], ids=["llama-bias", "qwen3-head-48"])
def test_scales_of_a_cache_of_codes(tmp_path, changes):
    """Keys and values beyond an E4M3's 448 need the checkpoint's scales. A cache of bf16 does not.

    The model: all keys times 3,000, all values times 2,000, undone by queries and by o.
    """
    config = TINY | {"num_attention_heads": 4, "num_key_value_heads": 2} | changes
    last = "norm" if "Qwen3ForCausalLM" in config["architectures"] else "proj"      # weight before RoPE
    factors = {f"q_{last}.weight": 1 / 3000, f"k_{last}.weight": 3000, f"q_{last}.bias": 1 / 3000,
               f"k_{last}.bias": 3000, "v_proj.weight": 2000, "v_proj.bias": 2000, "o_proj.weight": 1 / 2000}
    tensors = {}
    for name, tensor in random_weights(config).items():
        factor = factors.get(name.split(".", 4)[-1], 1)
        tensors[name] = (np.float64(tensor) * factor).astype(bfloat16)
    scales = {}
    for i in range(config["num_hidden_layers"]):
        scales[f"model.layers.{i}.self_attn.k_scale"] = np.array([3000], np.float32)
        scales[f"model.layers.{i}.self_attn.v_scale"] = np.array(2000, bfloat16)
    with_scales = write_model(tmp_path / "with", sizes=config, weights=tensors | scales)
    without = write_model(tmp_path / "without", sizes=config, weights=tensors)
    worst = []
    for folder, dtype in (with_scales, "auto"), (with_scales, "fp8"), (without, "fp8"):
        llm = LLM(folder, kv_cache_dtype=dtype, max_num_batched_tokens=50)
        errors = errors_of_logits(llm, config, float64_weights(without), (1, 17, 70), 10)
        worst.append(max(error.max() for error in errors))
    assert worst[0] < 0.03 and worst[1] < 0.1 and worst[2] > 0.3


@pytest.mark.parametrize("scale", [[1.0, 1.0], [0.0], [-1.0], [np.nan]], ids=str)
def test_a_scale_is_a_number_above_0(tmp_path, scale):
    write_model(tmp_path, weights={"model.layers.1.self_attn.v_scale": np.array(scale, np.float32)})
    with pytest.raises(TinyVLLMError, match=r"model\.layers\.1\.self_attn\.v_scale: expected .*, got "):
        LLM(tmp_path)


@pytest.fixture
def one_kernel(monkeypatch):
    """Lets small batches of decodes run in decode.cu's one kernel, in the simulator too.

    Returns a list of the batch sizes in that kernel. Skips the test if the GPU cannot run it.
    """
    if ON_GPU and not DEVICE.runs_decode:
        pytest.skip("this GPU cannot run decode.cu")
    device = open_device("auto" if ON_GPU else "cpu")
    device.runs_decode = True
    decode = tinyvllm.Model.decode
    sizes = []

    def watched_decode(model, b):
        sizes.append(len(b.token_ids))
        return decode(model, b)

    monkeypatch.setattr(tinyvllm, "open_device", lambda name: device)
    monkeypatch.setattr(tinyvllm.Model, "decode", watched_decode)
    return sizes


QUARTERS = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 6144}


@pytest.mark.parametrize("changes", [
    QUARTERS | {"rope_scaling": ROPE},
    {"hidden_size": 3072, "num_attention_heads": 8, "head_dim": 128, "intermediate_size": 1024,
     "vocab_size": 512, "num_hidden_layers": 1},
], ids=["gqa-2-quarters", "gqa-8-head-128-halves"])
def test_decode_equals_numpy(tmp_path, one_kernel, changes):
    """The logits of decode.cu's kernel for a whole step are the oracle's too.

    Batches of 1 to 8, contexts of several pages and splits, several steps in a row.
    """
    config = TINY | {"max_position_embeddings": 512} | changes
    write_model(tmp_path, sizes=config)
    weights = float64_weights(tmp_path)
    llm = LLM(tmp_path)
    for lengths in (15,), (1, 140), (300, 3, 32, 16), (30, 1, 90, 16, 40), (20, 1, 2, 33, 16, 5, 7):
        for length, error in zip(lengths, errors_of_logits(llm, config, weights, lengths, 3)):
            assert error.max() < 0.04, (length, error)
    assert {1, 2, 4, 6, 8} == set(one_kernel)


@pytest.mark.parametrize("changes", [QWEN3, {"attention_bias": True}], ids=["qwen3", "llama-bias"])
def test_no_decode_kernel_for_head_norms_or_a_bias_on_o(tmp_path, one_kernel, changes):
    """Such a model's steps of one token are forward()'s, and right: see test_forward_equals_numpy."""
    config = TINY | QUARTERS | {"intermediate_size": 512, "num_hidden_layers": 1} | changes
    write_model(tmp_path, sizes=config)
    llm = LLM(tmp_path)
    [error] = errors_of_logits(llm, config, float64_weights(tmp_path), (5,), 3)
    assert error.max() < 0.03
    assert llm.engine.model.decode_batch == 0 and not one_kernel


def test_decode_gives_the_same_bits(tmp_path, one_kernel):
    """The same bits, whichever thread comes first. Without fused_decode, the kernel stays unused.

    Each seed gives the simulator another order of threads, and shared memory full of NaNs.
    """
    write_model(tmp_path, sizes=TINY | QUARTERS | {"num_hidden_layers": 1})
    prompts = [[1] * 5, [2] * 90, [3] * 31]
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    # With prefix caching, the second run's prefill would be another product.
    llm = LLM(tmp_path, prefix_caching=False)
    runs = []
    for seed in 0, 1, 2:
        shuffle(llm, seed)
        runs.append(run_recorded(llm, prompts, params)[1])
    shuffle(llm, 0)
    assert set(one_kernel) == {4}
    assert all((a == b).all() for run in runs[1:] for a, b in zip(runs[0], run))
    one_kernel.clear()
    LLM(tmp_path, fused_decode=False).generate(prompts, params)
    assert not one_kernel


def shuffle(llm, seed):
    """Threads of the simulator run in another order; a GPU's order is its own."""
    if not ON_GPU:
        llm.engine.model.kernels.module.shuffle(seed)


# --------------------------------------------------------------------------------------------------
# Recitation and invariance: an answer does not depend on company, chunks, pages or preemption
# --------------------------------------------------------------------------------------------------
def chats(llm, texts):
    """The prompts of the texts' first questions, as token ids."""
    return [llm.tokenizer.chat([{"role": "user", "content": wordings[0]}]) for wordings, _ in texts]


@pytest.fixture(scope="module")
def parrot():
    return LLM(PARROT)


def text_of(question):
    """The text with this first question."""
    return next(text for text in TEXTS if text[0][0] == question)


def recite(llm, texts):
    """Outputs of the texts, run together. Every one is exact, and nothing is left behind."""
    outputs = llm.generate(chats(llm, texts), SamplingParams(max_tokens=None))
    for output, (wordings, answer) in zip(outputs, texts):
        assert (output.text, output.finish_reason) == (answer, "stop"), wordings[0]
    llm.engine.scheduler.check_integrity()
    assert not llm.engine.scheduler.running and not llm.engine.scheduler.waiting
    return outputs


def test_recitation_alone_and_all_at_once():
    """Every third text alone, and all texts together.

    In three processes: a text alone keeps no more than one core busy.
    """
    alone = "[t.recite(llm, [text]) for text in t.TEXTS[{}::6]]"
    together = "assert not any(output.num_preemptions for output in t.recite(llm, t.TEXTS))"
    code = "import test_tinyvllm as t; llm = t.LLM(t.PARROT); "
    runs = together, alone.format(0), alone.format(3)
    processes = [subprocess.Popen([sys.executable, "-c", code + run], cwd=ROOT) for run in runs]
    assert [process.wait() for process in processes] == [0, 0, 0]


def test_a_start_imports_no_scipy():
    """On a GPU, CuPy would import SciPy at the first array times a number, for 0.4 seconds."""
    code = "import sys, tinyvllm; tinyvllm.LLM('parrot'); assert 'cupyx.scipy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


SOME = [text for text in TEXTS if 300 < len(text[1]) < 700][::9]


@pytest.mark.parametrize("options", [
    {"max_num_batched_tokens": 1}, {"max_num_batched_tokens": 7}, {"max_num_batched_tokens": 33},
    {"max_num_seqs": 2}, {"block_size": 8}, {"block_size": 64}, {"enforce_eager": True}, {"overlap": False},
    {"enable_chunked_prefill": False, "max_num_batched_tokens": 300},
    {"static_batching": True, "max_num_seqs": 2},
    {"kv_cache_dtype": "fp8", "max_num_batched_tokens": 33},
], ids=lambda options: "-".join(f"{name}-{value}" for name, value in options.items()))
def test_recitation_with_odd_limits(options):
    """With chunks and pages of any size, few sequences at once, static batches, the plain loop."""
    recite(LLM(PARROT, **options), SOME)


@pytest.mark.parametrize("options", [
    {}, {"overlap": False}, {"prefix_caching": False},
    pytest.param({"kv_cache_dtype": "fp8"}, marks=takes_long),
    {"enable_chunked_prefill": False, "max_num_batched_tokens": 300, "static_batching": True}], ids=str)
def test_preempted_and_resumed(options):
    """In too small a pool, sequences are preempted, computed again, and say the same."""
    llm = LLM(PARROT, num_blocks=28, **options)
    find = llm.engine.scheduler.allocator.find
    found = []
    llm.engine.scheduler.allocator.find = lambda token_ids: found.append(find(token_ids)) or found[-1]
    outputs = recite(llm, SOME)
    assert sum(output.num_preemptions for output in outputs) >= 3
    assert any(found) == ("prefix_caching" not in options)
    # Pages that a request finds again after a preemption are not counted again.
    assert all(output.num_cached_tokens < len(output.prompt_token_ids) for output in outputs)


def test_prefix_caching(parrot_tokenizer):
    """A known beginning is found again, with a conversation's answers, and the text is the same.

    The last token is never found: its logits must be computed.
    """
    llm = LLM(PARROT)
    answer = TEXTS[1][1]
    prompt = chat_ids(parrot_tokenizer, TEXTS[1][0][0], "You are a helpful assistant.")
    first, again = llm.generate([prompt, prompt])       # the second waits for the first one's pages
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, (len(prompt) - 1) // 16 * 16)
    assert first.text == again.text == answer
    [later] = llm.generate(prompt)
    assert later.num_cached_tokens == (len(prompt) - 1) // 16 * 16 > 0 and later.text == answer
    one = SamplingParams(max_tokens=1)
    [two_pages] = llm.generate((prompt + first.token_ids)[:32], one)
    assert two_pages.num_cached_tokens == 16
    [turn] = llm.generate(prompt + first.token_ids + [7] * 3, one)
    computed = len(prompt) + len(first.token_ids) - 1       # the answer's last token never ran
    assert turn.num_cached_tokens >= computed // 16 * 16
    [without] = LLM(PARROT, prefix_caching=False).generate([prompt], one)
    assert without.num_cached_tokens == 0 and without.token_ids == first.token_ids[:1]
    llm.engine.scheduler.check_integrity()


def test_shared_pages_stand_in_many_block_tables():
    """Block tables with shared pages may have more entries than the pool has pages.

    The step buffer must have room for all entries.
    """
    llm = LLM(PARROT, num_blocks=24, max_num_batched_tokens=8)
    [prompt] = chats(llm, [text_of("Recite Jabberwocky.")])
    tokens = llm.generate(prompt, SamplingParams(max_tokens=200))[0].token_ids
    room = llm.engine.model.buffer.target.nbytes // 4
    assert room > 256 * 24
    outputs = llm.generate([prompt + tokens[:-8]] * 6, SamplingParams(max_tokens=8))
    assert all(output.token_ids == tokens[-8:] and output.num_cached_tokens > 100 for output in outputs)


def test_long_steps_recite_the_same():
    """The budget grows while nobody decodes: the texts are the same as with any other chunks."""
    llm = LLM(PARROT, max_num_batched_tokens=16)
    llm.engine.scheduler.max_prefill_tokens = 64
    recite(llm, SOME)


def test_join_while_others_run(parrot):
    """A late request starts with the next step, and may end before an earlier, longer request.

    With overlap, the second call of step() brings the first token.
    """
    prompts = chats(parrot, [text_of("Recite Jabberwocky."), TEXTS[0]])
    long, short = parrot.submit(prompts, SamplingParams(max_tokens=None))
    scheduler = parrot.engine.scheduler
    late = scheduler.waiting.pop()                          # put aside: not arrived yet
    for _ in range(20):
        parrot.engine.step()
    scheduler.waiting.append(late)
    got_token = [[sequence.output for sequence in parrot.engine.step()] for _ in range(2)]
    assert got_token == [[long], [long, short]] and len(long.token_ids) > 15
    ended = [output for output in parrot.run([long, short]) if output.finish_reason]
    assert ended == [short, long] and short.text == TEXTS[0][1]


def test_seed_decides_whatever_the_batch(parrot):
    """A seed gives the same tokens alone and in a crowd; another seed gives different tokens."""
    prompts = chats(parrot, TEXTS[:6])
    hot = [SamplingParams(temperature=4.0, seed=seed, max_tokens=8) for seed in range(6)]
    together = [output.token_ids for output in parrot.generate(prompts, hot)]
    alone = [parrot.generate(prompt, params)[0].token_ids for prompt, params in zip(prompts, hot)]
    assert together == alone
    assert len({tuple(parrot.generate(prompts[0], params)[0].token_ids) for params in hot}) > 3


def test_noise_depends_on_position_and_on_the_seed(parrot):
    """Each position has its own noise, in prompt and answer alike. Without a seed, noise differs.

    At this temperature, noise alone decides.
    """
    prompt = chats(parrot, TEXTS)[0]
    noise = SamplingParams(temperature=1e6, seed=7, max_tokens=8, ignore_eos=True)
    tokens = parrot.generate(prompt, noise)[0].token_ids
    assert len(set(tokens)) > 4
    assert parrot.generate(prompt + tokens[:3], noise)[0].token_ids[:5] == tokens[3:]
    free = SamplingParams(temperature=1e6, max_tokens=4, ignore_eos=True)
    assert parrot.generate(prompt, free)[0].token_ids != parrot.generate(prompt, free)[0].token_ids


# --------------------------------------------------------------------------------------------------
# Allocator and scheduler, under thousands of random events, with no model
# --------------------------------------------------------------------------------------------------
def test_attention_tiles():
    """Every row of every sequence is in one tile. Tiles with the most keys come first."""
    tiles = tinyvllm.attention_tiles(np.array([1, 100, 1]), np.array([50, 400, 900]), 3, 128)
    assert tiles.reshape(-1, 2).tolist() == [[2, 0], [1, 256], [1, 128], [1, 0], [0, 0]]


class RandomLoad:
    """A scheduler of random sizes, and requests that come, run and go at random."""

    def __init__(self, seed, overlap):
        rng = RNG(seed)
        self.rng = rng
        self.overlap = overlap
        self.block_size = int(rng.choice([1, 4, 16]))
        num_blocks = int(rng.integers(8, 60))
        self.budget = int(rng.integers(1, 70))
        self.max_seqs = int(rng.integers(1, 12))
        self.chunked = seed % 3 != 1
        self.static = seed % 3 == 2
        self.limit = min(num_blocks * self.block_size, math.inf if self.chunked else self.budget)
        allocator = BlockAllocator(num_blocks, self.block_size)
        self.prefill_budget = self.budget * (1 + seed % 2)
        self.scheduler = Scheduler(allocator, self.budget, self.max_seqs, self.chunked, self.static,
                                   self.prefill_budget)
        self.live = []          # sequences in order of arrival
        self.in_flight = []     # for each step, [(sampled sequence, whether it stops by itself)]
        self.memory = {}        # (page, offset) -> hash of the text on which key and value depend

    def arrive(self):
        """A request. Most prompts begin alike."""
        length = int(self.rng.integers(1, self.limit))
        prompt = [1] * length
        if self.rng.random() < 0.3:
            prompt = self.rng.integers(0, 3, length).tolist()
        max_len = int(self.rng.integers(length + 1, self.limit + 1))
        self.live.append(Sequence(SamplingParams(), RequestOutput(prompt), None, max_len))
        self.scheduler.waiting.append(self.live[-1])

    def give_up(self):
        self.scheduler.remove(self.live.pop(int(self.rng.integers(len(self.live)))))

    def step(self):
        """A step as the engine takes it, with the promises of the scheduler checked."""
        scheduler = self.scheduler
        was_idle = not scheduler.running
        num_waiting = len(scheduler.waiting)
        ready = [sequence for sequence in scheduler.running if sequence.remaining == 1]
        scheduled = scheduler.schedule()
        # A static batch gets no newcomer.
        assert was_idle or not self.static or len(scheduler.waiting) >= num_waiting
        self.check_plan(scheduled)
        if any(sequence in ready for sequence, _ in scheduled):
            assert sum(count for _, count in scheduled) <= self.budget
        for sequence, count in scheduled:
            self.compute(sequence, count)
            scheduler.register_full_blocks(sequence)
        sampled = [sequence for sequence, _ in scheduled if sequence.remaining == 0]
        for sequence in sampled:
            sequence.token_ids.append(1)
            assert len(sequence.token_ids) <= sequence.max_len
        self.in_flight.append([(sequence, self.rng.random() < 0.01) for sequence in sampled])
        if len(self.in_flight) > self.overlap:
            for sequence, stops in self.in_flight.pop(0):
                if sequence in self.live and (stops or sequence.is_complete):
                    scheduler.remove(sequence)
                    self.live.remove(sequence)
        order = [self.live.index(sequence) for sequence in [*scheduler.running, *scheduler.waiting]]
        assert order == sorted(order)       # first come, first served, preempted sequences too
        scheduler.check_integrity()

    def check_plan(self, scheduled):
        """The step moves on, within its budget."""
        assert self.chunked or all(count == sequence.remaining for sequence, count in scheduled)
        assert scheduled or not self.live or self.in_flight
        assert all(count >= 1 for _, count in scheduled)
        assert sum(count for _, count in scheduled) <= self.prefill_budget
        assert len({id(sequence) for sequence, _ in scheduled}) == len(scheduled)
        assert len(self.scheduler.running) <= min(self.max_seqs, self.budget)

    def compute(self, sequence, count):
        """Writes new tokens to slots. Each slot of the sequence must hold the sequence's text."""
        start = sequence.num_computed_tokens
        sequence.num_computed_tokens += count
        assert sequence.num_computed_tokens <= len(sequence.block_table) * self.block_size
        text = 0
        for p, token in enumerate(sequence.token_ids[:sequence.num_computed_tokens]):
            text = hash((text, token))
            place = sequence.block_table[p // self.block_size], p % self.block_size
            if p >= start:
                self.memory[place] = text
            assert self.memory[place] == text


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("seed", range(6))
def test_scheduler_random_events(seed, overlap):
    """Pages are never lost or wrongly shared, budgets hold, and every request is served.

    With overlap, a sequence's end is seen one step late.
    """
    load = RandomLoad(seed, overlap)
    for _ in range(800):
        event = load.rng.random()
        if event < 0.06:
            load.arrive()
        elif event < 0.07 and load.live:
            load.give_up()
        else:
            load.step()
    for _ in range(200_000):
        if not load.live:
            break
        load.step()
    allocator = load.scheduler.allocator
    assert not load.live and len(allocator.free) == allocator.num_blocks


def planned_steps(**options):
    """Tokens computed in each step for four prompts of 6 tokens, with answers of 1, 2, 3 and 1.

    Two sequences run at a time, with 8 tokens a step.
    """
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
                if sequence.is_complete:
                    scheduler.remove(sequence)
    return plan


def test_static_batching_and_whole_prompts():
    assert planned_steps() == [[6, 2], [4, 4], [1, 2], [1, 6], [1]]
    assert planned_steps(chunked_prefill=False) == [[6], [6], [1, 6], [1, 6], [1]]
    assert planned_steps(static_batching=True) == [[6, 2], [4], [1], [6, 2], [1, 4], [1]]


def test_switches_reach_the_engine():
    """Each switch turns off its own idea and no more."""
    def state(*options):
        arguments = tinyvllm.parse_arguments(["--model", str(PARROT), *options, "Hi"])
        engine = tinyvllm.open_llm(EngineArgs.from_namespace(arguments)).engine
        scheduler = engine.scheduler
        return [scheduler.allocator.prefix_caching, scheduler.chunked_prefill,
                bool(engine.model.graph_sizes), engine.overlap, not scheduler.static_batching]

    switches = ["--no-prefix-caching", "--no-chunked-prefill", "--no-cuda-graphs", "--no-overlap",
                "--static-batching"]
    assert all(state()) and not any(state(*switches))
    for number, switch in enumerate(switches):
        assert state(switch) == [other != number for other in range(5)]


def test_a_newcomer_leaves_a_page_for_each_that_runs():
    """With a next token, two prompts take all four pages: soon both would want a fifth."""
    scheduler = Scheduler(BlockAllocator(4, 4), 99, 9)
    for _ in range(2):
        scheduler.waiting.append(Sequence(SamplingParams(), RequestOutput([1] * 4), None, 16))
    assert len(scheduler.schedule()) == 1 and len(scheduler.waiting) == 1


def test_pages_are_found_again_until_they_are_needed():
    """A page is found by its tokens and all tokens before.

    The page that was used least recently goes first; of one text, the last page.
    """
    text = [0, 0, 1, 1, 2, 2, 9]
    allocator = BlockAllocator(6, 2)
    first = allocator.allocate(3)
    second = allocator.allocate(1)
    for i, block in enumerate(first):
        allocator.register(block, first[i - 1] if i else None, (i, i))
    allocator.register(second[0], None, (0, 0))                     # the same tokens: the first page is found
    assert allocator.find(text) == first
    assert allocator.find(text[:6]) == first[:2]                    # the last token must be computed
    assert allocator.find([1, 1, 2, 2, 9]) == []                    # another beginning
    assert allocator.find([0, 0, 2, 2, 9]) == first[:1]
    allocator.share(first[:1])
    allocator.release(first)
    allocator.check_integrity([first[:1], second])
    assert allocator.find(text) == first
    assert len(allocator.allocate(3)) == 3                          # two empty pages, and the text's last
    assert allocator.find(text) == first[:2]
    allocator.allocate(1)
    assert allocator.find(text) == first[:1] and not allocator.free


def test_allocator_notices_what_is_wrong():
    allocator = BlockAllocator(4, 16)
    table = allocator.allocate(2)
    allocator.check_integrity([table])
    for wrong in [], [table, table], [table[:1]]:
        with pytest.raises(AssertionError):
            allocator.check_integrity(wrong)
    with pytest.raises(AssertionError):
        allocator.allocate(3)


# --------------------------------------------------------------------------------------------------
# API
# --------------------------------------------------------------------------------------------------
def test_stream_gives_the_text_in_pieces(parrot):
    """The deltas add up, and characters of several bytes come whole.

    A stream that is given up frees its pages with the next step.
    """
    texts = [text_of(q) for q in ("Who are you?", "Recite Basho's frog.", "Recite Goethe's Night Song.")]
    for prompt, (_, answer) in zip(chats(parrot, texts), texts):
        deltas = [output.delta for output in parrot.stream(prompt)]
        assert "".join(deltas) == answer and "\ufffd" not in "".join(deltas) and len(deltas) > 10
    stream = parrot.stream(chats(parrot, TEXTS)[1])
    next(stream)
    scheduler = parrot.engine.scheduler
    assert scheduler.running
    stream.close()
    parrot.engine.step()
    assert not scheduler.running and len(scheduler.allocator.free) == scheduler.allocator.num_blocks


def test_callers_that_step_for_one_another(parrot):
    """Two streams in turn, and generate() inside a stream: every caller gets all of its text."""
    prompts = chats(parrot, TEXTS[1:4])
    answers = [answer for _, answer in TEXTS[1:4]]
    streams = [parrot.stream(prompt) for prompt in prompts[:2]]
    texts = ["", ""]
    for turn in [0] * 30 + [1] * 500 + [0] * 500:
        texts[turn] += getattr(next(streams[turn], None), "delta", "")
    assert texts == answers[:2]
    text = ""
    for number, output in enumerate(parrot.stream(prompts[0])):
        text += output.delta
        if number == 3:
            assert [output.text for output in parrot.generate(prompts[1:])] == answers[1:]
    assert text == answers[0]
    parrot.engine.scheduler.check_integrity()


def interrupted_once(function):
    """The function, interrupted by Ctrl-C at its first call."""
    interrupts = [KeyboardInterrupt]

    def call(*args):
        if interrupts:
            raise interrupts.pop()
        return function(*args)
    return call


@pytest.mark.parametrize("where", ["before the launch", "after the launch", "half booked", "waiting", "read"])
def test_an_interrupted_step_can_be_repeated(parrot, monkeypatch, where):
    """Ctrl-C, while one caller waits for its token, leaves the other caller's request unharmed."""
    prompts = chats(parrot, TEXTS[1:3])
    stream = parrot.stream(prompts[0])
    text = next(stream).delta
    engine = parrot.engine
    launch = engine.model.launch
    fetch = parrot.device.fetch

    def interrupted_launch(batch):
        if where == "after the launch":
            launch(batch)
        raise KeyboardInterrupt

    replaced = {
        "before the launch": (engine.model, "launch", interrupted_launch),
        "after the launch": (engine.model, "launch", interrupted_launch),
        "half booked": (engine.scheduler, "register_full_blocks",
                        interrupted_once(engine.scheduler.register_full_blocks)),
        "waiting": (parrot.device, "fetch", lambda array: interrupted_once(fetch(array))),
        "read": (engine, "append", interrupted_once(engine.append))}
    with monkeypatch.context() as patch:
        patch.setattr(*replaced[where])
        with pytest.raises(KeyboardInterrupt):
            parrot.generate(prompts[1])
    assert text + "".join(output.delta for output in stream) == TEXTS[1][1]
    engine.scheduler.check_integrity()
    assert not engine.scheduler.waiting


def test_when_an_answer_ends(parrot):
    prompt = chats(parrot, TEXTS)[1]
    eot = parrot.tokenizer.token_id("<|eot_id|>")

    def answer(llm=parrot, **params):
        return llm.generate(prompt, SamplingParams(**params))[0]

    whole = answer()
    tokens = whole.token_ids
    assert (whole.finish_reason, whole.text) == ("stop", TEXTS[1][1]) and tokens[-1] == eot
    half_an_emoji = parrot.generate(chats(parrot, TEXTS)[0], SamplingParams(max_tokens=2))[0]
    assert half_an_emoji.text == "\ufffd"
    short = answer(max_tokens=5)
    assert (short.finish_reason, short.token_ids) == ("length", tokens[:5])
    stopped = answer(stop_token_ids=[tokens[7]])
    at = tokens.index(tokens[7])
    assert stopped.finish_reason == "stop" and stopped.token_ids == tokens[:at + 1]
    assert stopped.text == parrot.tokenizer.decode(tokens[:at])         # without the stop token's own text
    longer = answer(ignore_eos=True, max_tokens=len(tokens) + 3)
    assert longer.finish_reason == "length" and longer.token_ids[:len(tokens)] == tokens
    small = answer(LLM(PARROT, max_model_len=len(prompt) + 4))
    assert (small.finish_reason, small.token_ids) == ("length", tokens[:4])
    assert whole.arrival_time < whole.first_token_time < whole.finish_time


def test_logprobs(parrot, parrot_weights):
    """Of the chosen token and of the best tokens, against the oracle's log-softmax."""
    prompt = chats(parrot, TEXTS)[1]
    params = SamplingParams(logprobs=3, max_tokens=10, temperature=3.0, seed=1)
    output = parrot.generate(prompt, params)[0]
    logits = numpy_llama(PARROT_CONFIG, parrot_weights, prompt + output.token_ids)[len(prompt) - 1:-1]
    shifted = logits - logits.max(1, keepdims=True)
    expected = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    for token, reported, row in zip(output.token_ids, output.logprobs, expected):
        best = max(reported, key=reported.get)
        assert token in reported and len(reported) in (3, 4) and best == row.argmax()
        assert all(abs(reported[i] - row[i]) < 0.02 * abs(row).max() for i in reported)
    assert parrot.generate(prompt, SamplingParams(max_tokens=1))[0].logprobs is None


def test_bad_prompts_do_not_stop_the_good_ones(parrot):
    good = chats(parrot, TEXTS)[1]
    outputs = parrot.generate([good, [1, 2048], [1] * 4096, [], [1.5], good])
    reasons = [output.finish_reason for output in outputs]
    assert reasons == ["stop", "error", "error", "error", "error", "stop"]
    parts = ["to 2047, got 2048", "less than 4096 tokens", "at least one token, got none", "got 1.5"]
    assert all(part in output.error for part, output in zip(parts, outputs[1:]))
    assert outputs[0].text == outputs[-1].text == TEXTS[1][1]
    with pytest.raises(TinyVLLMError, match="expected at least one token"):
        parrot.generate("")
    wrong, _ = parrot.generate([None, np.array(good)], SamplingParams(max_tokens=1))
    assert wrong.error == "the prompt: expected a text or a list of token ids, got None"
    with pytest.raises(TinyVLLMError, match="SamplingParams"):
        parrot.generate([good, good], [SamplingParams(), {}])
    with pytest.raises(TinyVLLMError, match=r"prompts: expected a text, .*, got None"):
        parrot.generate(None)
    assert not parrot.engine.scheduler.waiting


@pytest.mark.parametrize("options, message", [
    ({"num_blocks": 10**9}, "num_blocks: expected at most .*, got 1000000000"),
    ({"num_blocks": 4, "max_model_len": 512}, "num_blocks: expected 32 or more, .*, got 4"),
    ({"num_blocks": 0}, "num_blocks: expected .*, got 0"),
    ({"max_num_seqs": 2.5}, "max_num_seqs: expected .*, got 2.5")], ids=str)
def test_pool_limits(options, message):
    """A pool that does not fit is refused, with the numbers."""
    with pytest.raises(TinyVLLMError, match=message):
        LLM(PARROT, **options)


@pytest.mark.parametrize("shape, gigabytes, options, tokens", [
    ("llama-3.2-1b", 80, {}, 16384),
    ("llama-3.1-8b", 80, {}, 16384),
    ("llama-3.2-1b", 80, {"max_num_batched_tokens": 8192}, 8192),       # the limit of all steps
    ("llama-3.2-1b", 80, {"max_num_batched_tokens": 40000}, 40000),
    ("llama-3.2-1b", 80, {"num_blocks": 100}, 16384),
    ("llama-3.2-1b", 10, {"max_model_len": 16384}, range(9000, 9600)),  # 4,096 and an eighth of 5.3 GB
    ("llama-3.2-1b", 6.3, {}, 4096)], ids=str)                          # the pages of a context come first
def test_long_steps_are_counted(shape, gigabytes, options, tokens):
    """Weights, pages, and the largest step's arrays fit into memory together."""
    config = weights.SHAPES[shape]
    args = EngineArgs(**options)
    total = int(gigabytes * 1e9)
    device = SimpleNamespace(memory=lambda: (total, total))
    num_blocks, num_tokens, max_model_len, _ = tinyvllm.plan_pool(config, device, args, OneRank())
    assert num_tokens in tokens if isinstance(tokens, range) else num_tokens == tokens
    D, F, H, K, h = (config.hidden_size, config.intermediate_size, config.num_attention_heads,
                     config.num_key_value_heads, config.head_dim)
    weights_bytes = weights.weight_bytes(config)
    # Of forward(): residual, attention, activation; the results of two layers' qkv and gate_up.
    step = 2 * num_tokens * (D + H * h + F + 2 * (H + 2 * K) * h + 2 * 2 * F)
    pool = num_blocks * 16 * 2 * config.num_hidden_layers * 2 * K * h
    assert weights_bytes + step + pool <= 0.9 * total
    if "num_blocks" not in options:         # and the memory is used, in pools that do not hold all requests
        assert weights_bytes + 2 * step + pool >= 0.8 * total
    assert num_blocks * 16 >= (options.get("max_model_len") or max_model_len)


def test_a_cache_of_codes_holds_twice_the_tokens(monkeypatch):
    config = weights.SHAPES["llama-3.1-8b"]
    codes = dataclasses.replace(config, kv_cache_dtype="fp8")
    assert weights.kv_bytes_per_token(config) == 2 * 2 * 32 * 8 * 128 == 2 * weights.kv_bytes_per_token(codes)
    args = EngineArgs()
    memory = 60 * 10**9, 60 * 10**9
    pages, twice = [tinyvllm.kv_cache_blocks(c, memory, args) for c in (config, codes)]
    assert twice in (2 * pages, 2 * pages + 1)
    device = open_device("auto" if ON_GPU else "cpu")
    device.runs_fp8 = False
    monkeypatch.setattr(tinyvllm, "open_device", lambda name: device)
    with pytest.raises(TinyVLLMError, match=r"^kv_cache_dtype: expected auto on .*8.9.*, got 'fp8'$"):
        LLM(PARROT, kv_cache_dtype="fp8")


@pytest.mark.parametrize("options, limit, advice", [
    ({}, 4096, ""),
    ({"num_blocks": 4}, 64, "raise num_blocks; "),
    ({"max_model_len": 20}, 20, "raise max_model_len; "),
    ({"enable_chunked_prefill": False, "max_num_batched_tokens": 40}, 40,
     "raise max_num_batched_tokens, or leave --no-chunked-prefill out; "),
    ({"gpu_memory_utilization": 0.5}, 32, "raise gpu_memory_utilization; ")], ids=str)
def test_who_limits_a_context(options, limit, advice, monkeypatch):
    if "gpu_memory_utilization" in options:
        monkeypatch.setattr(tinyvllm, "kv_cache_blocks", lambda config, memory, args: 2)
    llm = LLM(PARROT, **options)
    assert (llm.max_model_len, llm.advice) == (limit, f"{advice}the model's limit is 4096")


@pytest.mark.parametrize("name, value", [
    ("model", 123), ("model", ""), ("block_size", 16.0), ("device", "gpu"), ("overlap", "no"),
    ("gpu_memory_utilization", True), ("gpu_memory_utilization", np.ones(2)), ("max_num_seqs", True)])
def test_options_of_the_wrong_kind(name, value):
    with pytest.raises(TinyVLLMError, match=f"^{name}: expected .*, got {re.escape(repr(value))}$"):
        LLM(**{"model": PARROT, name: value})


def test_an_error_shows_any_value_in_one_line():
    assert tinyvllm.shown(np.zeros((2, 2))) == "array([[0., 0.],"
    assert tinyvllm.shown(10**5000) == "a int" and tinyvllm.shown("x" * 99) == "'" + "x" * 59


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name, value", [
    ("temperature", -0.1), ("temperature", float("nan")), ("temperature", "hot"), ("temperature", 1e39),
    ("temperature", np.float64(1e39)), ("temperature", True), ("temperature", np.ones(2)), ("top_p", 0),
    ("top_p", 1.5), ("top_k", -2), ("top_k", 2.5), ("top_k", True), ("max_tokens", 0), ("seed", -1),
    ("logprobs", -1), ("stop_token_ids", 7), ("stop_token_ids", "")])
def test_sampling_params_refuse_nonsense(name, value):
    with pytest.raises(TinyVLLMError, match=f"^{name}: expected .*, got {re.escape(repr(value))}$"):
        SamplingParams(**{name: value})


# --------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2
# --------------------------------------------------------------------------------------------------
def run_main(*args, stdin="", program=tinyvllm):
    """(exit code, stdout, error lines) of a command line in this process."""
    out = io.StringIO()
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            tinyvllm.run_program(program.main, [str(arg) for arg in args])
    return exit_.value.code, out.getvalue(), error_lines(err.getvalue())


def error_lines(stderr):
    """The error lines. Every other line must be a notice, and no traceback or warning."""
    lines = stderr.splitlines()
    assert all(line.startswith(("tinyvllm: ", "tiny-vLLM: ")) for line in lines), stderr
    return [line for line in lines if line.startswith("tinyvllm: ")]


def start(*args, **env):
    """A process of the command line, without a network. On Parrot, unless env names a model."""
    defaults = {"TINYVLLM_MODEL": str(PARROT), "HF_ENDPOINT": "http://127.0.0.1:9",
                "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(
        [sys.executable, ROOT / "tinyvllm.py", *args], env=os.environ | defaults | env,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell makes a process in the background, such as "pytest &", ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def run_process(*args, **env):
    """(exit code, stdout, stderr) of the command line in a process of its own."""
    process = start(*args, **env)
    out, err = process.communicate(timeout=120)
    return process.returncode, out.decode(), err.decode()


def assert_refused(result, *parts):
    """Exit code 2, nothing on stdout, and one line on stderr that contains all parts."""
    code, out, errors = result
    assert code == 2 and out == "" and len(errors) == 1, result
    assert all(part in errors[0] for part in parts), errors[0]


def recitation(question):
    """The answer to a question of parrot/texts.json."""
    return next(answer for wordings, answer in TEXTS if question in wordings)


@pytest.mark.parametrize("change, parts", [
    ({"architectures": ["GPT2LMHeadModel"]},
     ["architectures: expected ['LlamaForCausalLM'] or", "got ['GPT2LMHeadModel']"]),
    ({"architectures": ["MistralForCausalLM"], "sliding_window": 64},
     ["--max-model-len: expected at most the model's sliding_window, 64 (pass --max-model-len=64), got 128"]),
    ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": "64"},
     ["sliding_window: expected a whole number above 0, got '64'"]),
    ({"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": "no"},
     ["use_sliding_window: expected True or False", "got 'no'"]),
    ({"attention_bias": 1.5}, ["attention_bias: expected True or False", "got 1.5"]),
    ({"mlp_bias": True}, ["mlp_bias: expected False or None, got True"]),
    ({"architectures": ["Qwen2MoeForCausalLM"]}, ["or ['Qwen3ForCausalLM'], got ['Qwen2MoeForCausalLM']"]),
    ({"quantization_config": {"bits": 4}},
     ["quant_method: expected compressed-tensors, or no quantization_config, got None"]),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_type: expected llama3 or", "got 'yarn'"]),
    ({"rope_scaling": "llama3"}, ["rope_scaling: expected a dict, got 'llama3'"]),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
     ["low_freq_factor: expected a number above 0, got None"]),
    ({"rope_scaling": ROPE | {"factor": "8"}}, ["factor: expected a number above 0, got '8'"]),
    ({"rope_scaling": ROPE | {"high_freq_factor": 1.0}},
     ["low_freq_factor: expected less than high_freq_factor, 1.0, got 1.0"]),
    ({"hidden_size": None}, ["hidden_size: expected a whole number above 0, got None"]),
    ({"hidden_size": "128"}, ["hidden_size: expected a whole number above 0, got '128'"]),
    ({"num_hidden_layers": 0}, ["num_hidden_layers: expected a whole number above 0, got 0"]),
    ({"num_attention_heads": 17},
     ["num_attention_heads: expected 1 to 16 for each of num_key_value_heads, 1, got 17"]),
    ({"vocab_size": -2048}, ["vocab_size: expected a whole number above 0, got -2048"]),
    ({"vocab_size": True}, ["vocab_size: expected a whole number above 0, got True"]),
    ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps: expected a number above 0, got '1e-5'"]),
    ({"rms_norm_eps": math.nan}, ["rms_norm_eps: expected a number above 0, got nan"]),
    ({"rope_theta": 10**400}, ["rope_theta: expected a number above 0, got 1000"]),
    ({"head_dim": 60}, ["head_dim: expected 32 to 256 in steps of 16, got 60"]),
    ({"intermediate_size": 63}, ["intermediate_size: expected a multiple of 8, got 63"]),
    ({"tie_word_embeddings": "false"}, ["tie_word_embeddings: expected True or False", "got 'false'"]),
    ({"eos_token_id": "</s>"}, ["eos_token_id: expected a token id or a list of token ids", "</s>"]),
    ({"vocab_size": 2040},
     ["the shape of model.embed_tokens.weight: expected (2040, 128)", "got (2048, 128)"]),
    ({"num_hidden_layers": 1}, ["got 9 others", "model.layers.1."]),
    ({"vocab_size": 10**12}, ["too little memory", "256000.000 for the weights", "--gpu-memory-utilization"]),
], ids=str)
def test_config_that_is_not_supported(change, parts, tmp_path):
    assert_refused(run_main("--model", write_model(tmp_path, change), "Hi"), *parts)


UP = "model.layers.1.mlp.up_proj.weight"
DTYPES = f"the dtype of {UP}: expected BF16 or F16 or F32"


@pytest.mark.parametrize("change, parts", [
    ({UP: None}, [f"expected a tensor {UP}", "found none"]),
    ({UP: np.zeros((64, 127), np.float16)}, [f"the shape of {UP}: expected (64, 128)", "got (64, 127)"]),
    ({UP: np.zeros((64, 128), np.int8)}, [DTYPES, "got 'I8'"]),
    ({UP: np.zeros((64, 128), np.float64)}, [DTYPES, "got 'F64'"]),
    ({UP.replace("weight", "bias"): np.ones(64, np.float16)}, ["got 1 others", "up_proj.bias"]),
    ({"model.layers.0.self_attn.q_norm.weight": np.ones(64, np.float16)}, ["got 1 others", "q_norm.weight"]),
], ids=["missing", "shape", "int8", "float64", "bias", "head norm"])
def test_weights_that_do_not_fit(change, parts, tmp_path):
    assert_refused(run_main("--model", write_model(tmp_path, weights=change), "Hi"), *parts)


@pytest.mark.parametrize("written, read, message", [
    (QWEN2, {"architectures": ["LlamaForCausalLM"]}, "got 6 others, such as model.layers.0.self_attn."),
    (QWEN2, {"architectures": ["LlamaForCausalLM"], "attention_bias": True},
     "expected a tensor model.layers.0.self_attn.o_proj.bias in the weights, found none"),
    (QWEN2, {"architectures": ["Qwen3ForCausalLM"]},
     "expected a tensor model.layers.0.self_attn.q_norm.weight in the weights, found none"),
    (QWEN3, {"architectures": ["Qwen2ForCausalLM"]},
     "expected a tensor model.layers.0.self_attn.q_proj.bias in the weights, found none"),
    (QWEN3, {"attention_bias": True},
     "expected a tensor model.layers.0.self_attn.q_proj.bias in the weights, found none"),
    ({"attention_bias": True}, {"architectures": ["Qwen2ForCausalLM"]},
     "got 2 others, such as model.layers.0.self_attn.o_proj.bias"),
], ids=str)
def test_weights_of_another_architecture(written, read, message, tmp_path):
    """config.json and weights disagree about a bias or a head norm."""
    model = write_model(tmp_path, read, random_weights(TINY | written))
    assert_refused(run_main("--model", model, "Hi"), message)


@pytest.mark.parametrize("changes, window", [
    ({"sliding_window": None}, None),
    ({"sliding_window": 4096}, 4096),
    ({"architectures": ["MistralForCausalLM"], "sliding_window": 128}, 128),
    ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64}, None),
    ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "use_sliding_window": False}, None),
    ({"architectures": ["Qwen3ForCausalLM"], "sliding_window": 64, "use_sliding_window": True}, 64),
], ids=str)
def test_sliding_window(changes, window, tmp_path):
    """As in Transformers, a Qwen's window slides only if use_sliding_window says so."""
    folder = write_model(tmp_path, changes)
    assert ModelConfig.from_folder(folder).sliding_window == window


def test_a_window_as_long_as_the_context_does_nothing(tmp_path):
    full = greedy(write_model(tmp_path / "full"), max_model_len=64)
    assert greedy(write_model(tmp_path / "slides", {"sliding_window": 64}), max_model_len=64) == full
    with pytest.raises(TinyVLLMError, match="expected at most the model's sliding_window, 64"):
        LLM(tmp_path / "slides", max_model_len=65)


@pytest.mark.parametrize("config, generation, ids", [
    (None, None, set()),
    (5, None, {5}),
    (5, {}, {5}),
    (5, {"eos_token_id": None}, {5}),
    (5, {"eos_token_id": 6}, {5, 6}),
    ([5, 7], {"eos_token_id": [6, 5]}, {5, 6, 7}),
    (None, {"eos_token_id": 6}, {6}),
], ids=str)
def test_eos_of_both_files(config, generation, ids, tmp_path):
    folder = write_model(tmp_path, {"eos_token_id": config})
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert ModelConfig.from_folder(folder).eos_token_ids == ids


@pytest.mark.parametrize("content, defaults", [
    (None, {}),
    ({}, {}),
    ({"eos_token_id": 5, "transformers_version": "4.51.0", "temperature": None, "top_k": None}, {}),
    ({"do_sample": True}, {"temperature": 1.0}),
    ({"do_sample": False}, {"temperature": 0.0}),
    ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
    ({"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
     {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}),
    ({"temperature": 0.6, "min_p": 0.1}, {"temperature": 0.6, "min_p": 0.1}),
], ids=str)
def test_generation_defaults(content, defaults, tmp_path):
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert generation_defaults(tmp_path) == defaults


@pytest.mark.parametrize("content, message", [
    ({"temperature": "hot"}, "temperature: expected 0 .greedy. or more, .*, got 'hot'"),
    ({"top_p": 1.5}, "top_p: expected more than 0 and at most 1, got 1.5"),
    ({"do_sample": "yes"}, "do_sample: expected true or false, got 'yes'"),
], ids=str)
def test_generation_defaults_that_make_no_sense(content, message, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(TinyVLLMError, match=f"generation_config.json: {message}$"):
        generation_defaults(tmp_path)


def test_parrot_is_greedy():
    assert generation_defaults(PARROT) == {"temperature": 0.0}


@pytest.mark.parametrize("files, advice", [
    ([], "download the model's *.safetensors"),
    (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
     "download model.safetensors.index.json too, the list of model-00001-of-00002.safetensors and others"),
    (["consolidated.safetensors"], "convert consolidated.safetensors to the Hugging Face layout"),
    (["pytorch_model.bin", "training_args.bin"], "convert pytorch_model.bin to the Hugging Face layout"),
    (["consolidated.00.pth", "tokenizer.model"], "convert consolidated.00.pth to the Hugging Face layout"),
], ids=str)
def test_weights_that_are_elsewhere(files, advice, tmp_path):
    """What to do is said for what is there: shards without their list, or another format."""
    folder = write_model(tmp_path)
    (folder / "model.safetensors").unlink()
    for name in files:
        (folder / name).write_bytes(b"\0")
    assert_refused(run_main("--model", folder, "Hi"), f"no model.safetensors in {folder}: {advice}")


NESTED = b"[" * 100_000 + b"]" * 100_000
NO_VOCABULARY = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}


@pytest.mark.parametrize("name, content, parts", [
    ("config.json", None, ["no config.json"]),
    ("tokenizer.json", None, ["tokenizer.json", "No such file"]),
    ("model.safetensors", None, ["no model.safetensors"]),
    ("config.json", b"<html>", ["cannot read", "config.json", "valid JSON"]),
    ("config.json", b"[]", ["config.json: expected a JSON object", "got []"]),
    ("generation_config.json", b"{", ["generation_config.json", "valid JSON"]),
    ("tokenizer.json", b"{}", ["tokenizer.json", "got: "]),
    ("tokenizer_config.json", b"[]", ["tokenizer_config.json"]),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1",
     ["model.safetensors", "no valid safetensors"]),
    ("model.safetensors", "truncated", ["model.safetensors", "no valid safetensors"]),
    ("model.safetensors", b"", ["model.safetensors", "no valid safetensors"]),
    ("model.safetensors", b"\x02\0\0\0\0\0\0\0[]", ["model.safetensors", "no valid safetensors"]),
    ("model.safetensors.index.json", b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
     ["no model-00001-of-00002.safetensors"]),
    ("model.safetensors.index.json", b'{"weight_map": []}',
     ["model.safetensors.index.json: weight_map: expected a dict", "got []"]),
    ("model.safetensors.index.json", b'{"weight_map": {"a": "../model.safetensors"}}',
     ["files in the index's own folder", "got {'a': '../model.safetensors'}"]),
    ("model.safetensors.index.json", b'{"weight_map": {"a": "/model.safetensors"}}', ["own folder"]),
    ("model.safetensors.index.json", b'{"weight_map": {"a": ""}}', ["own folder"]),
    ("config.json", "nested", ["cannot read", "config.json", "recursion"]),
    ("generation_config.json", "nested", ["cannot read", "generation_config.json", "recursion"]),
    ("tokenizer_config.json", "nested", ["tokenizer_config.json", "recursion"]),
    ("tokenizer_config.json", b'{"bos_token": 5}', ["tokenizer_config.json", "the bos_token 5"]),
    ("tokenizer.json", json.dumps(NO_VOCABULARY).encode(), ["expected a vocabulary", "tokenizer.json"]),
    ("model.safetensors", "nested header", ["no valid safetensors"]),
])
def test_files_that_are_missing_or_broken(name, content, parts, tmp_path):
    file = write_model(tmp_path) / name
    if content is None:
        file.unlink()
    elif content == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif content == "nested":
        file.write_bytes(NESTED)
    elif content == "nested header":
        file.write_bytes(len(NESTED).to_bytes(8, "little") + NESTED)
    else:
        file.write_bytes(content)
    assert_refused(run_main("--model", tmp_path, "Hi"), *parts)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, partial(os.symlink, "/dev/zero")])
@pytest.mark.parametrize("name", [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "model.safetensors", "model.safetensors.index.json"])
def test_files_that_are_no_regular_files(name, make, tmp_path):
    """To read from a FIFO would take for ever."""
    file = write_model(tmp_path) / name
    file.unlink(missing_ok=True)
    make(file)
    assert_refused(run_main("--model", tmp_path, "Hi"), name, "expected a regular file")


def test_a_tensor_in_two_files(tmp_path):
    for name in "a.safetensors", "b.safetensors":
        write_safetensors(tmp_path / name, 8, a=(0, 8))
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TinyVLLMError, match="expected each tensor in one file, found a in two"):
        tinyvllm.Checkpoint(tmp_path)


def write_safetensors(path, num_bytes, **spans):
    """A safetensors file with `num_bytes` of numbers, and a uint8 tensor for each (begin, end)."""
    header = json.dumps({name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
                         for name, (begin, end) in spans.items()}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(num_bytes))


@pytest.mark.parametrize("num_bytes, spans", [
    (8, {"a": (0, 6), "b": (4, 8)}), (8, {"a": (0, 2), "b": (4, 8)}), (8, {"a": (-4, 4), "b": (4, 8)}),
    (8, {"a": (0, 4), "b": (4, 9)}), (9, {"a": (0, 4), "b": (4, 8)}),
], ids=["overlap", "hole", "negative", "beyond the end", "bytes of no tensor"])
def test_tensors_that_lie_wrong_in_their_file(num_bytes, spans, tmp_path):
    """Such a file is refused when opened: a tensor would get the numbers of another place."""
    write_safetensors(tmp_path / "model.safetensors", 8, a=(0, 4), b=(4, 8))
    assert sorted(tinyvllm.Checkpoint(tmp_path).tensors) == ["a", "b"]
    write_safetensors(tmp_path / "model.safetensors", num_bytes, **spans)
    with pytest.raises(TinyVLLMError, match="is no valid safetensors file") as error:
        tinyvllm.Checkpoint(tmp_path)
    assert "\n" not in str(error.value)


RAVEN = "Recite The Raven by Edgar Allan Poe, all of it, from the start."


@pytest.mark.parametrize("args, parts", [
    (["--model", "/no/such/folder", "Hi"], ["--model: expected a folder", "got /no/such/folder"]),
    (["--model", ROOT, "Hi"], ["no config.json", "tokenizer.json and *.safetensors"]),
    (["--model", PARROT / "config.json", "Hi"], ["--model: expected a folder", "parrot/config.json"]),
    ([""], ["the prompt is empty"]),
    (["-"], ["no prompt", "stdin"]),
    (["--raw", "word " * 5000], ["expected less than 4096 tokens", "got 50", "limit is 4096"]),
    (["--max-model-len", "20", RAVEN], ["expected less than 20 tokens", "limit is 4096"]),
    (["--max-model-len", "5000", "Hi"], ["--max-model-len: expected at most the model's 4096, got 5000"]),
    (["--gpu-memory-utilization", "1e-6", "Hi"],
     ["too little memory: expected ", " GB", "--gpu-memory-utilization", "--max-model-len"]),
    (["--no-such-option", "Hi"], ["--no-such-option", "--help"]),
    ([], ["a prompt, got none", "chat.py"]),
    (["--no-chunked-prefill", "--max-num-batched-tokens", "20", RAVEN],
     ["expected less than 20 tokens", "--no-chunked-prefill"]),
    (["--no-chunked-prefill", "--max-num-batched-tokens", "40", "--max-model-len", "41", "Hi"],
     ["--max-model-len: expected at most --max-num-batched-tokens, 40", "got 41"]),
    (["--load-format", "dummy", "--model", "llama-9", "Hi"],
     ["llama-9", "llama-3.2-1b, llama-3.2-3b, llama-3.1-8b"]),
    (["--load-format", "zip", "Hi"], ["--load-format", "'zip'", "dummy"]),
    (["--max-tokens", "many", "Hi"], ["--max-tokens", "'many'"]),
    (["--device", "tpu", "Hi"], ["--device", "tpu", "cuda"]),
    (["--raw", "--system", "X", "Hi"], ["--raw takes no --system"]),
    (["--trace", "", "Hi"], ["--trace: expected a file that ends in", "got ''"]),
    (["--model", "", "Hi"], ["--model: expected a folder", "got ''"]),
    (["--model", "a\nb", "Hi"], ["--model: expected a folder", "got a b"]),
], ids=lambda value: " ".join(map(str, value))[:40])
def test_options_and_prompts_that_make_no_sense(args, parts):
    assert_refused(run_main("--model", PARROT, *args), *parts)


@pytest.mark.parametrize("name, values, expected", [
    ("max-tokens", ["0", "-1"], "a whole number of 1 or more"),
    ("temperature", ["-0.1", "nan", "inf"], "0 (greedy) or more"),
    ("top-p", ["0.0", "1.01", "nan"], "more than 0 and at most 1"),
    ("top-k", ["-2"], "a whole number of 1 or more, or 0 for all"),
    ("seed", ["-1"], "a whole number from 0 to 2^64 - 1"),
    ("block-size", ["17"], "8, 16, 32"),
    ("num-blocks", ["0"], "a whole number of 1 or more"),
    ("max-num-batched-tokens", ["0", "65536"], "a whole number from 1 to 65535"),
    ("max-num-seqs", ["0"], "a whole number from 1 to 65535"),
    ("gpu-memory-utilization", ["1.5", "0.0"], "more than 0 and at most 1")])
def test_options_out_of_their_range(name, values, expected):
    for value in values:
        result = run_main("--model", PARROT, f"--{name}", value, "Hi")
        assert_refused(result, f"--{name}: expected {expected}", f"got {value}")


def test_one_bad_prompt_among_good_ones():
    prompts = "What is RoPE?", "", "word " * 5000, "What is RMSNorm?"
    code, out, errors = run_main("--model", PARROT, "--max-tokens", "8", *prompts)
    assert code == 2 and len(errors) == 2 and "empty" in errors[0] and "4096" in errors[1]
    assert out.startswith("> What is RoPE?\nRoPE tells") and "\n> What is RMSNorm?\nRMSNorm keeps" in out


@pytest.mark.parametrize("args", [[], ["--raw"], ["--system", "x" * 10**6]])
def test_a_text_that_cannot_fit_is_never_tokenised(args, monkeypatch):
    encode = tinyvllm.Tokenizer.encode
    lengths = []

    def watched(self, text, **options):
        lengths.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(tinyvllm.Tokenizer, "encode", watched)
    long = "a" + " " * 10**6 + "b"
    code, out, errors = run_main("--model", PARROT, "--max-tokens", "1", *args, "-", stdin=f"{long}\nHi\n")
    num_refused = 2 if "--system" in args else 1
    assert code == 2 and len(errors) == num_refused and "characters or less, got " in errors[0]
    assert out.count("> ") == 2 - num_refused
    assert max(lengths, default=0) < 1000
    with pytest.raises(TinyVLLMError, match="got 1000002 characters"):
        LLM(PARROT).generate(long)


def fake_cupy(error=None):
    """A module `cupy` that finds an old GPU, or raises this error."""
    def get_device_count():
        if error:
            raise error if isinstance(error, Exception) else RuntimeError(error)

    old = {"name": b"Old GPU", "major": 7, "minor": 5}
    runtime = SimpleNamespace(getDeviceCount=get_device_count, getDevice=lambda: 0,
                              getDeviceProperties=lambda number: old)
    compiler = SimpleNamespace(CompileException=RuntimeError)
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, compiler=compiler))


@pytest.mark.parametrize("device, cupy, parts", [
    ("auto", fake_cupy(), ["Old GPU", "7.5", "8.0", "--device cpu"]),
    ("cuda", fake_cupy("cudaErrorNoDevice: no CUDA-capable device is detected\nmore"),
     ["no CUDA-capable device", "--device cpu"]),
    ("cuda", fake_cupy(" "), ["no NVIDIA GPU", "RuntimeError"]),
    ("cuda", None, ["no NVIDIA GPU", "cupy"]),              # None in sys.modules: the import fails
    ("auto", fake_cupy(PermissionError()), ["CuPy's cache", "got /proc/none", "set CUPY_CACHE_DIR"]),
], ids=["too old", "no GPU", "no reason", "no CuPy", "no cache"])
def test_gpu_that_cannot_be_used(device, cupy, parts, monkeypatch):
    monkeypatch.setenv("CUPY_CACHE_DIR", "/proc/none")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert_refused(run_main("--model", PARROT, "--device", device, "Hi"), *parts)


def test_no_gpu_and_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert_refused(run_main("--model", PARROT, "Hi"),
                   "expected an NVIDIA GPU or a C++ compiler, found none", "install g++")


def test_a_kernel_that_does_not_compile(tmp_path):
    code = 'extern "C" __global__ __launch_bounds__(32)\nvoid broken(int* x) { x = missing_name; }\n'
    (tmp_path / "broken.cu").write_text(code)
    with pytest.raises(TinyVLLMError, match=r"do not compile.*error.*missing_name") as error:
        compile_kernels(DEVICE, {}, paste(tmp_path / "broken.cu"))
    assert "\n" not in str(error.value)


NOTHING = 'extern "C" __global__ __launch_bounds__(32)\nvoid nothing(int* x) {}\n'


@pytest.mark.parametrize("name, value, parts", [
    ("XDG_CACHE_HOME", "/proc/none", ["/proc/none", "$XDG_CACHE_HOME"]),
    ("CXX", "true", ["expected true to be a C++ compiler", "$CXX"]),
    ("CXX", "false", ["gives no reason"]), ("CXX", "no-such-compiler", ["$CXX"])], ids=str)
def test_compilers_and_caches_that_do_not_work(name, value, parts, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(name, value)
    with pytest.raises(TinyVLLMError, match=".*".join(map(re.escape, parts))) as error:
        compile_kernels(open_device("cpu"), {}, NOTHING)
    assert "\n" not in str(error.value)


def test_a_library_that_was_cut_is_made_anew(monkeypatch, tmp_path):
    """To load such a library would end the process by SIGBUS."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    simulator.RawModule(NOTHING)
    [library] = tmp_path.glob("tinyvllm/*.so")
    whole = library.stat().st_size
    for size in 0, whole // 2, whole - 1:
        cut = tmp_path / "cut"
        cut.write_bytes(library.read_bytes()[:size])
        os.replace(cut, library)            # a new file: the old one is loaded in this process
        simulator.RawModule(NOTHING)
        assert library.stat().st_size == whole


def test_an_interrupted_compiler_leaves_nothing(monkeypatch, tmp_path):
    """Neither the compiler's own child processes nor temporary files."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\n[ "$2" = -E ] && exit\nsleep 1000 > {fifo} & touch $TMPDIR/x; wait\n')
    script.chmod(0o755)
    communicate = subprocess.Popen.communicate

    def interrupted(process, source):
        if source:
            fifo.open().close()             # waits for `sleep` to open the other end
            raise KeyboardInterrupt
        return communicate(process, source)

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        simulator.RawModule(NOTHING)
    assert [path.suffix for path in (tmp_path / "tinyvllm").iterdir()] == [".lock"]     # empty
    end = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    for _ in range(100):                    # a killed process closes its files a moment later
        with contextlib.suppress(BlockingIOError):      # while `sleep` has the other end
            assert os.read(end, 1) == b""
            break
        time.sleep(0.05)
    else:
        raise AssertionError("`sleep` still runs")
    os.close(end)


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("question", ["Who are you?", "Recite a poem in Japanese."])
def test_one_prompt_in_a_pipe(question):
    """Both answers have characters of several tokens."""
    code, out, err = run_process(question)
    assert code == 0 and out == recitation(question) + "\n" and not error_lines(err)
    last = err.splitlines()[-1]
    assert last.startswith("tiny-vLLM: ") and "new tokens" in last and "tokens/s" in last


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_prompt_streams_and_ctrl_c_ends_it(number):
    process = start("Recite The Raven.")
    first = process.stdout.read1(100)
    assert process.poll() is None                   # text has come, and the process is still at work
    assert first and recitation("Recite The Raven.").encode().startswith(first)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "Traceback" not in err.decode() and len(out) < 5000


def test_several_prompts_are_answered_in_input_order():
    questions = ["Recite Ozymandias.", "What is RoPE?", "Recite a poem in Japanese."]
    stdin = "\n".join(["", *questions[1:], "  "])
    code, out, errors = run_main("--model", PARROT, questions[0], "-", stdin=stdin)
    assert code == 0 and not errors
    assert out == "".join(f"> {question}\n{recitation(question)}\n\n" for question in questions)


@pytest.mark.parametrize("env", [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=str)
def test_stdout_that_is_not_utf8(env):
    code, out, err = run_process("Who are you?", **env)
    assert code == 0 and out == "?" + recitation("Who are you?")[1:] + "\n" and not error_lines(err)


def test_a_closed_pipe_ends_it():
    process = start("Recite The Raven.")
    process.stdout.read1(10)
    process.stdout.close()
    assert process.wait(timeout=30) == 0 and not error_lines(process.stderr.read().decode())


def test_ctrl_c_during_the_imports(tmp_path):
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)")
    code, out, err = run_process("Hi", PYTHONPATH=str(tmp_path))
    assert (code, out, err) == (-signal.SIGINT, "", "")


def run(main):
    """(exit code, lines of stderr) of run_program(main)."""
    err = io.StringIO()
    with pytest.raises(SystemExit) as exit_, contextlib.redirect_stderr(err):
        tinyvllm.run_program(main)
    return exit_.value.code, err.getvalue().splitlines()


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_does_not_disturb_the_end(first):
    steps = []
    before = signal.getsignal(first)

    def main(argv):
        try:
            os.kill(os.getpid(), first)
            steps.append("not reached")
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("tidied")

    assert run(main) == (128 + first, [""]) and steps == ["tidied"]
    assert signal.getsignal(first) == before


def test_a_signal_that_the_parent_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(lambda argv: os.kill(os.getpid(), signal.SIGHUP)) == (None, [])
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_prints_the_answers_that_are_done(monkeypatch, capsys):
    step = tinyvllm.Engine.step

    def interrupted(engine):
        got_token = step(engine)
        if len(engine.sequences) == 2:                              # the two long recitations
            raise KeyboardInterrupt
        return got_token

    monkeypatch.setattr(tinyvllm.Engine, "step", interrupted)
    short = "What is RoPE?", "Who are you?"
    questions = "Recite The Raven.", short[0], "Recite The Raven.", short[1]
    code, _ = run(lambda argv: tinyvllm.main(["--model", str(PARROT), *questions]))
    assert code == 130
    assert capsys.readouterr().out == "".join(f"> {text}\n{recitation(text)}\n\n" for text in short)


@pytest.mark.parametrize("module, message", [
    ("cupy_backends.cuda.api.runtime", "the GPU has failed (x): start the program anew"),
    ("simulator", "the GPU has failed (x): start the program anew"), ("builtins", None)])
def test_a_gpu_that_fails_ends_the_program_with_a_line(module, message, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    error = type("CUDARuntimeError", (RuntimeError,), {"__module__": module})

    def main(argv):
        raise error("x\ny")

    if message:
        assert run(main) == (2, [f"tinyvllm: {message}"])
    else:                                                           # a mistake of this project
        with pytest.raises(error):
            tinyvllm.run_program(main)


@pytest.mark.parametrize("name, code", [("stdin", 2), ("stdout", 0), ("stderr", 0)])
def test_closed_streams(name, code, monkeypatch, capsys):
    """Python has None for a closed stream. print(file=None) would print to stdout."""
    monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as exit_:
        tinyvllm.run_program(tinyvllm.main, ["--model", str(PARROT), "--max-tokens", "1"] + (
            ["-"] if name == "stdin" else ["Hi"]))
    out, err = capsys.readouterr()
    assert exit_.value.code == code and "Traceback" not in err
    assert out == {"stdin": "", "stdout": "", "stderr": "\ufffd\n"}[name]
    assert len(error_lines(err)) == (code == 2)


def test_a_full_disk(monkeypatch):
    full = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stdout", full)
    assert run(lambda argv: print("Hi")) == (2, ["tinyvllm: [Errno 28] No space left on device"])
    full.close()                            # run_program has sent the text that cannot be written elsewhere
    monkeypatch.undo()
    full = open("/dev/full", "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", full)
    with pytest.raises(SystemExit) as exit_:
        tinyvllm.run_program(lambda argv: print("Hi", file=sys.stderr))
    assert exit_.value.code == 2
    full.close()


def test_a_trace_into_a_fifo_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    assert_refused(run_main("--trace", tmp_path / "x.json", "Hi"), "--trace: expected a file")


def test_only_a_newline_ends_a_line_of_stdin():
    lines = "a\x0cb", "a\u2028b", "a\x0bb", "a\x85b", "a\rb", "a\x1cb"
    code, out, errors = run_main("--model", PARROT, "--max-tokens", "1", "-",
                                 stdin="\n".join(lines) + "\r\n \r\n\nlast\r\n")
    assert code == 0 and not errors
    assert [text.split("\n")[0] for text in out.split("> ")[1:]] == [*lines, "last"]


@pytest.mark.parametrize("args, part", [
    (["--num-blocks", "2"], "2 of 2 answers, at 32 tokens of prompt and answer: raise --num-blocks"),
    (["--num-blocks", "2", "--max-tokens", "4"], None), (["--max-model-len", "32"], "raise --max-model-len"),
    ([], None)], ids=str)
def test_an_answer_cut_by_the_context_says_so(args, part, capsys):
    code = tinyvllm.main(["--model", str(PARROT), *args, "Who are you?", "Hi" if args else "What is RoPE?"])
    err = capsys.readouterr().err
    assert code == 0 and ("cut short" in err) == (part is not None) and (part or "") in err


def test_no_network_for_a_hugging_face_id(tmp_path):
    caches = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path)}
    code, out, err = run_process("--model", "nobody/nothing", "Hi", **caches)
    assert_refused((code, out, error_lines(err)), "nobody/nothing", "check the network", "folder")


@pytest.mark.parametrize("error, advice", [
    (PermissionError(errno.EACCES, "no", "/x"), "set HF_HOME"),
    (OSError(errno.ENOSPC, "full"), "set HF_HOME"),
    (ConnectionError("no"), "check the network")], ids=repr)
def test_a_download_that_fails(error, advice, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=error))
    assert_refused(run_main("--model", "nobody/nothing", "Hi"), "cannot download nobody/nothing", advice)


def test_default_model(tmp_path):
    """$TINYVLLM_MODEL, else Llama-3.2-1B-Instruct if it is in the cache, else Parrot."""
    assert "/no/such/folder" in run_process("Hi", TINYVLLM_MODEL="/no/such/folder")[2]
    env = {"TINYVLLM_MODEL": "", "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path)}
    answer = recitation("What is RoPE?") + "\n"
    code, out, err = run_process("What is RoPE?", **env)
    assert code == 0 and out == answer
    [notice] = [line for line in err.splitlines() if "Parrot" in line]
    assert weights.HUB_MODEL in notice and "hf auth login" in notice
    repo = tmp_path / f"models--{weights.HUB_MODEL.replace('/', '--')}"        # Parrot plays the 1B
    shutil.copytree(PARROT, repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    for args in [], ["--model", weights.HUB_MODEL]:                            # without a network
        code, out, err = run_process("What is RoPE?", *args, **env)
        assert code == 0 and out == answer and "Parrot" not in err and not error_lines(err)


def test_version_and_help():
    assert run_main("--version") == (0, f"tiny-vLLM {tinyvllm.__version__}\n", [])
    code, out, errors = run_main("--help")
    assert code == 0 and not errors
    assert "examples:\n  python tinyvllm.py " in out and "--gpu-memory-utilization X" in out


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
    hot = "--model", model, "--temperature", "5", "--max-tokens", "20"
    first, again, other = (run_main(*hot, "--seed", seed, "Hi") for seed in (1, 1, 2))
    assert first == again != other and first[0] == 0
    (model / "tokenizer_config.json").unlink()
    assert_refused(run_main("--model", model, "--system", "Be brief.", "Hi"), "--system", "chat format")


# --------------------------------------------------------------------------------------------------
# Variants of a model: each answers like its twin, the same weights in bfloat16 in one file
# --------------------------------------------------------------------------------------------------
EMBED = random_weights(TINY)["model.embed_tokens.weight"]
HEAD = {"lm_head.weight": EMBED[::-1].copy()}


def weights_as(dtype):
    return {name: weight.astype(dtype) for name, weight in random_weights(TINY).items()}


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INV_FREQ = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(32, np.float32)}
VARIANTS = {                    # arguments of write_model, for the variant and for its twin
    "fp16": ([{}, weights_as(np.float16)], []),
    "fp32": ([{}, weights_as(np.float32)], []),
    "shards": ([{}, {}, SHARDS], []),
    "rope_parameters": ([{"rope_theta": None, "rope_parameters": ROPE | {"rope_theta": 5e5}}],
                        [{"rope_scaling": ROPE, "rope_theta": 5e5}]),
    "default rope": ([{"rope_theta": None, "rope_scaling": {"rope_type": "default"}}], []),
    "Mistral": ([{"architectures": ["MistralForCausalLM"]}], []),
    "head_dim derived": ([{"head_dim": None}], []),
    "head not tied": ([{"tie_word_embeddings": False}, {"lm_head.weight": EMBED}], []),
    "lm_head though tied": ([{}, HEAD], []),
    "inv_freq of old files": ([{}, INV_FREQ], []),
}


def greedy(folder, **options):
    """24 greedy tokens, and their log-probabilities."""
    params = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=0)
    [output] = LLM(folder, **options).generate([[2042, 5, 900, 77, 1500, 3]], params)
    return output.token_ids, output.logprobs


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_answers_like_its_twin(name, tmp_path):
    for_variant, for_twin = VARIANTS[name]
    variant = write_model(tmp_path / "variant", *for_variant)
    twin = write_model(tmp_path / "twin", *for_twin)
    assert greedy(variant) == greedy(twin)


def test_untied_head_and_rope_scaling_are_used(tmp_path):
    tied = greedy(write_model(tmp_path / "tied"))
    untied = greedy(write_model(tmp_path / "untied", {"tie_word_embeddings": False}, HEAD))
    scaled = greedy(write_model(tmp_path / "scaled", {"rope_scaling": ROPE}))
    assert untied[0][0] == 2047 - tied[0][0]        # the rows of HEAD stand in reverse order
    assert scaled[1] != tied[1]


def test_dummy_weights_are_the_same_each_time(tmp_path):
    write_model(tmp_path)
    assert greedy(tmp_path, load_format="dummy") == greedy(tmp_path, load_format="dummy")


@pytest.mark.parametrize("name, billions", [
    ("llama-3.2-1b", 1.24), ("llama-3.2-3b", 3.21), ("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.6),
    ("qwen2.5-1.5b", 1.54), ("qwen3-0.6b", 0.596), ("qwen3-8b", 8.19)])
def test_shapes_have_the_parameters_of_their_models(name, billions):
    """The counts are those that the makers publish; biases and head norms are too few to show."""
    parameters = weights.weight_bytes(weights.SHAPES[name]) / 2e9
    assert abs(parameters / billions - 1) < 0.005


def test_dummy_biases_are_no_norms():
    dummy = weights.DummyCheckpoint(DEVICE)
    bias, norm = (DEVICE.fetch(dummy.take(f"model.layers.0.self_attn.{name}", 64))()
                  for name in ("q_proj.bias", "q_norm.weight"))
    assert (norm == 1).all() and 0 < np.abs(np.float32(bias)).max() < 0.1


# --------------------------------------------------------------------------------------------------
# README
# --------------------------------------------------------------------------------------------------
README = (ROOT / "README.md").read_text("utf-8")


def test_readme_links_and_options():
    """Links resolve. The table of options is the command line's, the map is tinyvllm.py's."""
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
    """The Python example runs as it stands. The quick start shows Parrot's answer."""
    [code] = re.findall(r"```python\n(from tinyvllm .*?)```", README, re.S)
    monkeypatch.chdir(ROOT)
    exec(code, {})
    out = capsys.readouterr().out
    assert out.startswith(recitation("What is PagedAttention?") + "\n") and out.count("length") == 2
    assert recitation("What is a KV cache?") in " ".join(README.split())


# --------------------------------------------------------------------------------------------------
# The house: the arrows between modules, and the sizes of files
#
# Each check returns a list of faults, and also gets a house with a fault: a check that cannot fail
# checks nothing.
# --------------------------------------------------------------------------------------------------
LEAVES = {"tokenizer", "views", "simulator"}
# Module: our modules for import. A program, such as bench, may import all modules of this table.
MAY_IMPORT = {"tokenizer": set(), "views": set(), "simulator": set(), "load": set(), "reference": set(),
              "device": {"simulator"}, "fp8": {"device"}, "sampling": {"device"},
              "weights": {"device", "fp8", "sampling", "tokenizer"},
              "grammar": {"device"}, "communicator": {"device"},
              "program": {"device", "sampling", "tokenizer", "weights"},
              "tinyvllm": LEAVES | {"communicator", "device", "fp8", "grammar", "program", "sampling",
                                    "weights"},
              "tools": {"device", "grammar"},
              "completions": {"device", "grammar", "sampling", "tinyvllm", "tokenizer", "tools"},
              "worker": {"communicator", "device", "program", "tinyvllm", "views"}}
MAY_COME_LATE = {"cupy", "huggingface_hub", "llguidance"}      # in a function: not every run has or needs it
MOST_LINES = {"tinyvllm.py": 1825, "program.py": 275, "sampling.py": 180, "weights.py": 566, "device.py": 465,
              "communicator.py": 445, "kernels.cu": 1525, "ptx.h": 360, "decode.cu": 1350, "simulator.h": 630,
              "simulator.py": 160, "tokenizer.py": 360, "views.py": 820, "bench.py": 810, "load.py": 630,
              "reference.py": 280, "chat.py": 180, "grammar.py": 115, "tools.py": 130, "server.py": 880,
              "completions.py": 755, "worker.py": 245, "fp8.py": 240}
ROOMS = set(MOST_LINES) | {
    "views.html", "server.html", "test_server.py", "test_page.py",
    "test_tinyvllm.py", "test_kernels.py", "test_tokenizer.py", "test_views.py",
    "test_bench.py", "test_chat.py", "test_course.py", "test_faults.py", "test_sampling.py",
    "test_grammar.py", "test_tools.py", "test_communicator.py", "test_fp8.py",
    "run.sh", "README.md", "course", "parrot", "pyproject.toml", "requirements.txt", "LICENSE", ".ci",
    ".gitignore"}
PATTERNS = ["*.py", "*.cu", "*.h", "*.html", "*.sh", "*.md", "*.toml", "course/*.py", "course/*.md",
            "parrot/*.py", ".ci/run"]


def imported(node):
    """The modules of an import statement, without submodules."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [node.module.split(".")[0]] if isinstance(node, ast.ImportFrom) else []


def wrong_imports(sources):
    """Imports against the arrows, and imports in functions. sources: {module: its text}."""
    ours = set(MAY_IMPORT) | set(sources)
    wrong = []
    for module, text in sources.items():
        tree = ast.parse(text)
        allowed = MAY_IMPORT.get(module, set(MAY_IMPORT))
        for node in ast.walk(tree):
            wrong += [f"{module} imports {name}" for name in imported(node) if name in ours - allowed]
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.modules":
                wrong.append(f"{module} looks into sys.modules")
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                late = {name for inner in ast.walk(node) for name in imported(inner)}
                wrong += [f"{module}.{node.name} imports {name}" for name in late - MAY_COME_LATE]
    return wrong


def wide_lines(texts):
    """Lines over 110 columns. In Markdown, code, tables, marks and addresses may be wider."""
    wrong = []
    for name, text in texts.items():
        if name.endswith(".md"):
            text = re.sub(r"^```.*?^```|^\|.*?$|^<!--=.*?$|https?://\S+", "", text, flags=re.S | re.M)
        wrong += [f"{name}: {line[:80]}" for line in text.splitlines() if len(line) > 110]
    return wrong


def large_files(texts):
    """Files that have outgrown their size."""
    return [f"{name}: {len(text.splitlines())} lines" for name, text in texts.items()
            if len(text.splitlines()) > MOST_LINES.get(name, math.inf)]


def test_the_house():
    texts = {str(path.relative_to(ROOT)): path.read_text("utf-8")
             for pattern in PATTERNS for path in ROOT.glob(pattern)}
    sources = {name.removesuffix(".py"): text for name, text in texts.items()
               if name.endswith(".py") and "/" not in name and not name.startswith("test_")}
    assert wrong_imports(sources) == []
    assert wide_lines(texts) == []
    assert large_files(texts) == []


@pytest.mark.parametrize("module, text", [
    ("views", "import tinyvllm"), ("simulator", "from device import FOLDER"), ("device", "import tokenizer"),
    ("tinyvllm", "import bench"), ("bench", "import chat"), ("tinyvllm", "def f():\n    import json"),
    ("bench", "import sys\nsys.modules['cupy'] = None")])
def test_a_wrong_import_is_noticed(module, text):
    good = {"bench": "import tinyvllm", "chat": "from tinyvllm import LLM",
            "device": "def f():\n    import cupy"}
    assert wrong_imports(good) == []
    assert len(wrong_imports(good | {module: text})) == 1


def test_a_wide_line_and_a_large_file_are_noticed():
    wide = "x" * 111
    good = f"```\n{wide}\n```\n| {wide} |\n<!--= {wide} -->\nhttps://{wide}\n"
    assert wide_lines({"a.md": good, "a.py": "x" * 110}) == []
    assert len(wide_lines({"a.md": good + wide, "a.py": wide})) == 2
    assert large_files({"ptx.h": "\n" * 360, "new.py": "\n" * 9999}) == []
    assert large_files({"ptx.h": "\n" * 361}) == ["ptx.h: 361 lines"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_nothing_else_stands_in_the_root():
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    assert {file.split("/")[0] for file in files} <= ROOMS
