"""What the tests share: a Llama (and a Qwen) in NumPy, from the equations, models with random weights, and a
stand-in for a model, without kernels.

Nothing here comes from the engine: an error there cannot hide behind the same error here.

Letters as in tinyvllm.py: T tokens, H query heads, K key-value heads, h head_dim, D hidden size,
F ffn size, V vocabulary.
"""
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

ROOT = Path(__file__).parent
PARROT = ROOT / "parrot"
RNG = np.random.default_rng


# --------------------------------------------------------------------------------------------------
# A Llama in NumPy
# --------------------------------------------------------------------------------------------------
def rope_frequencies(config):
    """Radians a position for each pair, [h/2].

    With rope_type "llama3", slow pairs are slowed down further, as in the Llama 3.1 report.
    """
    h = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequencies = config["rope_theta"] ** (-np.arange(0, h, 2) / h)
    scaling = config.get("rope_scaling")
    if not scaling:
        return frequencies
    original_length = scaling["original_max_position_embeddings"]
    turns = original_length * frequencies / (2 * np.pi)     # of each pair within the original context
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0, 1)      # 1: the pair turns often and keeps its speed
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def numpy_llama(config, weights, ids):
    """Logits [T, V] for token ids [T], in the dtype of the weights: float64 for a reference.

    A projection has a bias, and a layer norms the heads of q and k, if there are weights for it.
    """
    T = len(ids)
    H = config["num_attention_heads"]
    K = config["num_key_value_heads"]
    h = config.get("head_dim") or config["hidden_size"] // H
    dtype = weights["model.norm.weight"].dtype
    angles = np.arange(T)[:, None] * rope_frequencies(config)               # [T, h/2]
    cos = np.tile(np.cos(angles), 2)[:, None].astype(dtype)                 # [T, 1, h]
    sin = np.tile(np.sin(angles), 2)[:, None].astype(dtype)
    future = np.triu(np.ones((T, T), bool), 1)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[name]

    def rope(x):                                            # [T, heads, h]; the pairs are (i, i + h/2)
        return x * cos + np.concatenate([-x[..., h // 2:], x[..., :h // 2]], -1) * sin

    def project(x, name):
        return x @ weights[f"{name}_proj.weight"].T + weights.get(f"{name}_proj.bias", 0)

    x = weights["model.embed_tokens.weight"][ids]                           # [T, D]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        y = norm(x, name + "input_layernorm.weight")
        q, k, v = (project(y, f"{name}self_attn.{part}").reshape(T, -1, h) for part in "qkv")
        if name + "self_attn.q_norm.weight" in weights:                     # Qwen 3
            q = norm(q, name + "self_attn.q_norm.weight")
            k = norm(k, name + "self_attn.k_norm.weight")
        q = rope(q).transpose(1, 0, 2)                                      # [H, T, h]
        k = rope(k).transpose(1, 2, 0).repeat(H // K, 0)                    # [H, h, T]
        v = v.transpose(1, 0, 2).repeat(H // K, 0)                          # [H, T, h]
        scores = q @ k / h ** 0.5                                           # [H, T, T]
        scores[:, future] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = scores / scores.sum(-1, keepdims=True) @ v                      # [H, T, h]
        y = y.transpose(1, 0, 2).reshape(T, H * h)
        x = x + project(y, name + "self_attn.o")
        y = norm(x, name + "post_attention_layernorm.weight")
        gate = project(y, name + "mlp.gate")                                # [T, F]
        x = x + project(gate / (1 + np.exp(-gate)) * project(y, name + "mlp.up"), name + "mlp.down")
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm.weight") @ weights[head].T


# --------------------------------------------------------------------------------------------------
# Small models with random weights
# --------------------------------------------------------------------------------------------------
TINY = {"architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
        "vocab_size": 2048, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "eos_token_id": 2047}
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}


def random_weights(config):
    """Random multiples of 1/128: bfloat16, float16 and float32 all hold them exactly."""
    [architecture] = config["architectures"]
    D = config["hidden_size"]
    F = config["intermediate_size"]
    q_size = config["num_attention_heads"] * config["head_dim"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens": (config["vocab_size"], D)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (config["vocab_size"], D)
    # As in Transformers: attention_bias decides about q, k, v and o. A Qwen 2 has a bias on three.
    with_bias = "qkvo" if config.get("attention_bias") else ""
    if architecture == "Qwen2ForCausalLM":
        with_bias = "qkv"
    norms = {"model.norm": D}
    biases = {}
    for i in range(config["num_hidden_layers"]):
        layer = {"self_attn.q_proj": (q_size, D), "self_attn.k_proj": (kv_size, D),
                 "self_attn.v_proj": (kv_size, D), "self_attn.o_proj": (D, q_size),
                 "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        norms |= {f"model.layers.{i}.{name}_layernorm": D for name in ("input", "post_attention")}
        if architecture == "Qwen3ForCausalLM":
            norms |= {f"model.layers.{i}.self_attn.{part}_norm": config["head_dim"] for part in "qk"}
        biases |= {f"model.layers.{i}.self_attn.{part}_proj": layer[f"self_attn.{part}_proj"][0]
                   for part in with_bias}
    rng = RNG(0)

    def random(shape):
        return rng.integers(-16, 17, shape) / 128

    weights = {f"{name}.weight": random(shape) for name, shape in shapes.items()}
    weights |= {f"{name}.weight": 1 + random(size) for name, size in norms.items()}
    weights |= {f"{name}.bias": 8 * random(shape) for name, shape in biases.items()}    # as large as q, k, v
    return {name: weight.astype(bfloat16) for name, weight in weights.items()}


def write_model(folder, config=(), weights=(), files=("model.safetensors",), sizes=TINY):
    """Writes a model folder: `sizes` as config.json, random weights, and Parrot's tokenizer.

    `config` and `weights` change entries; the value None removes an entry. The files get the
    tensors in turn.
    """
    def changed(entries, changes):
        return {name: value for name, value in (entries | dict(changes)).items() if value is not None}

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(changed(sizes, config)))
    weights = changed(random_weights(sizes), weights)
    for i, file in enumerate(files):
        save_file(dict(list(weights.items())[i::len(files)]), folder / file)
    if len(files) > 1:
        index = {"weight_map": {name: files[i % len(files)] for i, name in enumerate(weights)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PARROT / name, folder)
    return folder


# --------------------------------------------------------------------------------------------------
# A stand-in for the model, without kernels
#
# The engine runs over the stand-in at thousands of steps a second. A slot of the cache holds a
# digest: one number for a whole text, up to the slot's token. The next token is a function of the
# digest. So every answer is known beforehand, and whatever is wrong, a page, a position, a token
# or a moment, either breaks the chain of digests that attention reads, or changes the answer.
# --------------------------------------------------------------------------------------------------
END = 2047                              # the stand-in's eos token


def extended(digest, token):
    """The digest of a text with one more token. The empty text has the digest 0."""
    return hash((digest, token))


def next_token(digest, seed, temperature, end_every):
    """The token after a text. One in `end_every` is END, none if `end_every` is 0."""
    draw = hash((digest, seed if temperature > 0 else 0, -5))
    return END if end_every and draw % end_every == 0 else draw // 64 % 2000


def expected(prompt, params, max_model_len, end_every=0):
    """(token ids, finish reason): the right answer to a request."""
    digest = 0
    for token in prompt:
        digest = extended(digest, token)
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else {END})
    room = max_model_len - len(prompt)
    limit = room if params.max_tokens is None else min(room, params.max_tokens)
    answer = []
    while len(answer) < limit:
        answer.append(next_token(digest, params.seed, params.temperature, end_every))
        if answer[-1] in ends:
            return answer, "stop"
        digest = extended(digest, answer[-1])
    return answer, "length"


class StandIn:
    """Takes the place of tinyvllm.Model: launch() reads a Batch as kernels would, and checks all."""
    tiling = (2, 128)

    def __init__(self, config, num_slots, block_size, end_every=0):
        self.config = config
        self.block_size = block_size
        self.end_every = end_every
        self.device = SimpleNamespace(name="stand-in", memory_bandwidth=None)
        self.communicator = SimpleNamespace(check=lambda: None)
        self.cache = [(None, None)] * num_slots     # (digest of the text before the token, with the token)
        self.sampled = []                           # tokens of the latest step, as in StepBuffer
        self.steps = []                             # the number of tokens of each step

    def launch(self, batch):
        """Runs a step at once. Returns (no logits, get_tokens)."""
        # A placeholder ~row stands for a token of the latest step. One of an older step would be
        # wrong here or past the end.
        token_ids = [self.sampled[~token] if token < 0 else token for token in batch.token_ids.tolist()]
        ends = batch.cu_seqlens.tolist()
        lengths = batch.context_lens.tolist()
        tables = self.block_tables(batch)
        slots = set(batch.slot_mapping.tolist())
        assert len(slots) == len(token_ids) == ends[-1], "two tokens share a slot"
        for sequence, table in enumerate(tables):
            chunk = range(ends[sequence], ends[sequence + 1])
            self.write(batch, chunk, token_ids, table, lengths[sequence] - len(chunk))
        digests = {}                                # index of a sequence's last token -> digest
        for end, table, length in zip(ends[1:], tables, lengths):
            digests[end - 1] = self.attend(table, length)
        self.sampled = []
        for last, seed, temperature in zip(batch.last_tokens.tolist(), batch.seeds.tolist(),
                                           batch.temperatures.tolist()):
            self.sampled.append(next_token(digests[last], seed, temperature, self.end_every))
        self.steps.append(len(token_ids))
        tokens = np.array(self.sampled, np.int32)
        return None, lambda: (tokens, np.zeros(len(tokens), np.float32))

    def block_tables(self, batch):
        """The block table of each sequence, long enough for its context."""
        ends = batch.cu_blocks.tolist()
        pages = batch.block_tables.tolist()
        tables = [pages[start:end] for start, end in itertools.pairwise(ends)]
        assert ends[-1] == len(pages)
        assert all(len(table) * self.block_size >= length
                   for table, length in zip(tables, batch.context_lens.tolist()))
        return tables

    def slots(self, table, start, end):
        """The slots of a sequence's tokens from `start` to `end`."""
        size = self.block_size
        return [table[position // size] * size + position % size for position in range(start, end)]

    def write(self, batch, chunk, token_ids, table, start):
        """Writes the keys of a sequence's chunk: the tokens from position `start` on."""
        end = start + len(chunk)
        slots = self.slots(table, start, end)
        assert batch.positions[chunk.start:chunk.stop].tolist() == list(range(start, end))
        assert batch.slot_mapping[chunk.start:chunk.stop].tolist() == slots
        digest = self.cache[self.slots(table, start - 1, start)[0]][1] if start else 0
        assert digest is not None, "the text before was never computed"
        for slot, token in zip(slots, token_ids[chunk.start:chunk.stop]):
            before, digest = digest, extended(digest, token)
            self.cache[slot] = (before, digest)

    def attend(self, table, length):
        """Reads all keys of a context. They must be the digests of one text, token by token."""
        digest = 0
        for position, slot in enumerate(self.slots(table, 0, length)):
            before, with_token = self.cache[slot]
            assert before == digest, f"the key at position {position} of {length} is of another text"
            digest = with_token
        return digest
