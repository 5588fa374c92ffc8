"""The NumPy Llama of the tests, from the equations, and small models with random weights.

It shares no code with the engine.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

ROOT = Path(__file__).parent
PARROT = ROOT / "parrot"
RNG = np.random.default_rng


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
    turns = (
        scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    )  # within the original context
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0, 1)  # 1: turns often, stays as it is
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def numpy_llama(config, weights, ids):
    """Logits [T, V] of one sequence of token ids [T], in the dtype of the weights (float64 for a reference)."""
    T = len(ids)
    H = config["num_attention_heads"]
    K = config["num_key_value_heads"]
    h = config.get("head_dim") or config["hidden_size"] // H
    angles = np.arange(T)[:, None] * rope_frequencies(config)  # [T, h/2]
    cos, sin = (
        np.tile(f(angles), 2)[:, None].astype(weights["model.norm.weight"].dtype) for f in (np.cos, np.sin)
    )

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[name]

    def rope(x):  # [T, heads, h]: pairs are (i, i + h/2)
        return x * cos + np.concatenate([-x[..., h // 2 :], x[..., : h // 2]], -1) * sin

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        matrix = lambda part: weights[f"{name}{part}_proj.weight"].T
        y = norm(x, name + "input_layernorm.weight")
        q, k, v = ((y @ matrix(f"self_attn.{part}")).reshape(T, -1, h) for part in "qkv")
        q = rope(q).transpose(1, 0, 2)
        k = rope(k).transpose(1, 2, 0)  # [H, T, h] and [K, h, T]
        scores = q @ k.repeat(H // K, 0) / h**0.5
        scores[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf  # the future
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = scores / scores.sum(-1, keepdims=True) @ v.transpose(1, 0, 2).repeat(H // K, 0)
        x = x + y.transpose(1, 0, 2).reshape(T, H * h) @ matrix("self_attn.o")
        y = norm(x, name + "post_attention_layernorm.weight")
        gate = y @ matrix("mlp.gate")
        x = x + (gate / (1 + np.exp(-gate)) * (y @ matrix("mlp.up"))) @ matrix("mlp.down")
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm.weight") @ weights[head].T


# ---------------------------------------------------------------------------------------------------------------------
# Small models with random weights
# ---------------------------------------------------------------------------------------------------------------------
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 2048,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2047,
}
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def random_weights(config):
    """Random multiples of 1/128, which bfloat16, float16 and float32 all hold exactly."""
    D, F, V, H, K, h = (
        config[name]
        for name in (
            "hidden_size",
            "intermediate_size",
            "vocab_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
    )
    shapes = {"model.embed_tokens": (V, D)} | ({} if config["tie_word_embeddings"] else {"lm_head": (V, D)})
    norms = ["model.norm"]
    for i in range(config["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (H * h, D),
            "self_attn.k_proj": (K * h, D),
            "self_attn.v_proj": (K * h, D),
            "self_attn.o_proj": (D, H * h),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        norms += [f"model.layers.{i}.{name}_layernorm" for name in ("input", "post_attention")]
    rng = RNG(0)
    random = lambda shape: rng.integers(-16, 17, shape) / 128
    weights = {name: random(shape) for name, shape in shapes.items()} | {
        name: 1 + random(D) for name in norms
    }
    return {f"{name}.weight": weight.astype(bfloat16) for name, weight in weights.items()}


def write_model(folder, config={}, weights={}, files=["model.safetensors"], sizes=TINY):
    """A model folder: `sizes` and random weights for it, with these changes; a value of None removes the entry. The tensors are dealt to the files."""
    folder.mkdir(exist_ok=True)
    config, weights = (
        {name: value for name, value in entries.items() if value is not None}
        for entries in (sizes | config, random_weights(sizes) | weights)
    )
    (folder / "config.json").write_text(json.dumps(config))
    for i, file in enumerate(files):
        save_file(dict(list(weights.items())[i :: len(files)]), folder / file)
    if len(files) > 1:
        index = {"weight_map": {name: files[i % len(files)] for i, name in enumerate(weights)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PARROT / name, folder)
    return folder
