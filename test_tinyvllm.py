"""All tests of tiny-vLLM: pytest. They need no GPU and no network.

The oracles are independent of the code they judge: NumPy twins written from the equations, in float64.
"""
import json
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer as HFTokenizer

ROOT = Path(__file__).parent
PARROT = ROOT / "parrot"


# ---------------------------------------------------------------------------------------------------------------------
# The oracle: a Llama in NumPy, straight from the equations
# ---------------------------------------------------------------------------------------------------------------------
def rope_frequencies(config):
    """Radians a position for each pair [h/2], slowed down for long contexts as in the Llama 3.1 report (rope_type "llama3")."""
    h = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequencies = config["rope_theta"] ** (-np.arange(0, h, 2) / h)
    scaling = config.get("rope_scaling")
    if not scaling:
        return frequencies
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)      # within the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0, 1)                                   # 1: turns often, stays as it is
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def numpy_llama(config, weights, ids):
    """Logits [T, V] of one sequence of token ids [T], in the dtype of the weights (float64 for a reference)."""
    T, H, K = len(ids), config["num_attention_heads"], config["num_key_value_heads"]
    h = config.get("head_dim") or config["hidden_size"] // H
    angles = np.arange(T)[:, None] * rope_frequencies(config)                            # [T, h/2]
    cos, sin = (np.tile(f(angles), 2)[:, None].astype(weights["model.norm.weight"].dtype) for f in (np.cos, np.sin))

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[name]

    def rope(x):                                                                         # [T, heads, h]: pairs are (i, i + h/2)
        return x * cos + np.concatenate([-x[..., h // 2:], x[..., :h // 2]], -1) * sin

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        matrix = lambda part: weights[f"{name}{part}_proj.weight"].T
        y = norm(x, name + "input_layernorm.weight")
        q, k, v = ((y @ matrix(f"self_attn.{part}")).reshape(T, -1, h) for part in "qkv")
        q, k = rope(q).transpose(1, 0, 2), rope(k).transpose(1, 2, 0)                    # [H, T, h] and [K, h, T]
        scores = q @ k.repeat(H // K, 0) / h ** 0.5
        scores[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf                           # the future
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = scores / scores.sum(-1, keepdims=True) @ v.transpose(1, 0, 2).repeat(H // K, 0)
        x = x + y.transpose(1, 0, 2).reshape(T, H * h) @ matrix("self_attn.o")
        y = norm(x, name + "post_attention_layernorm.weight")
        gate = y @ matrix("mlp.gate")
        x = x + (gate / (1 + np.exp(-gate)) * (y @ matrix("mlp.up"))) @ matrix("mlp.down")
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm.weight") @ weights[head].T


# ---------------------------------------------------------------------------------------------------------------------
# Parrot, the bundled model
# ---------------------------------------------------------------------------------------------------------------------
PARROT_CONFIG = json.loads((PARROT / "config.json").read_text())
TEXTS = [(text["questions"], "\n".join(text["answer"])) for text in json.loads((PARROT / "texts.json").read_text("utf-8"))]
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def parrot_tokenizer():
    """The `tokenizers` package alone, special tokens in a text recognised: `chat_ids` writes the chat format itself."""
    return HFTokenizer.from_file(str(PARROT / "tokenizer.json"))


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
    assert {tensor.dtype for tensor in weights.values()} == {np.dtype(ml_dtypes.bfloat16)}
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
