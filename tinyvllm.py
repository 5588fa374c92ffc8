#!/usr/bin/env python3
"""tiny-vLLM: an LLM inference engine that one person can read, from top to bottom.

    python tinyvllm.py "What is a KV cache?"            from tinyvllm import LLM, SamplingParams

The life of a request:
  1. tokenizer.py turns a prompt into token ids. The prompt becomes a Sequence and waits in the
     scheduler's queue.
  2. At every step the scheduler picks the tokens to compute: one token of each sequence that is
     already answering (decode), and pieces of the prompts of new sequences (prefill). A sequence
     joins when there are pages for its keys and values.
  3. The chosen tokens of all sequences are laid one after the other: a ragged batch of T tokens.
     Arrays beside the batch say where each token stands in its text, and into which slot of the
     paged KV cache its key and value go.
  4. The forward pass takes the batch through the model's layers. Attention finds each sequence's
     earlier keys and values through the sequence's block table.
  5. For each sequence whose last token was in the batch, the sampler picks the next token from the
     logits.
  6. The next token is appended and its text streamed. A sequence that is done frees its pages, and
     the next sequence comes in.
When the pages run out, the youngest sequence gives its pages back and is computed again later.

Letters for sizes: T tokens of a step, S sequences of a step, R rows to sample (sequences that get a
token in this step), L layers, D hidden size, H query heads, K key/value heads, h head_dim, F ffn
size, V vocabulary, N pages of the cache, B tokens of a page (block_size). Weights and activations
are bfloat16. A matrix is stored as [out, in], so a product is x @ w.T.

Sections: Config and weights, Pages, Sequences and scheduler, Forward pass, Memory, Engine, API,
Command line. device.py, beside this file, starts kernels on a GPU or in a simulator.
"""
import argparse
import contextlib
import gc
import itertools
import json
import math
import os
import re
import sys
import time
from array import array as int_array
from collections import Counter, OrderedDict, deque, namedtuple
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

# NumPy's idle threads are to sleep, not to spin: the simulator needs the cores.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
try:
    import numpy as np
    from safetensors import SafetensorError, safe_open
    from tqdm import tqdm

    import views
    from device import (BFLOAT16, DECODE_KERNEL, FOLDER, KERNELS, MAX_GRID_YZ, TinyVLLMError, compile_kernels,
                        first_line, open_device, paste)
    from tokenizer import StreamDecoder, Tokenizer, TokenizerError
except ModuleNotFoundError as error:
    if Path(sys.argv[0]).resolve().parent != Path(__file__).resolve().parent:   # no program of this folder
        raise
    sys.exit(f"tinyvllm: expected the Python package {error.name}, found none: ./run.sh installs all "
             "packages into .venv, then use .venv/bin/python")

__version__ = "0.1.0"


def check(name, value, is_good, expected):
    """Returns the value of an option or a field. Raises TinyVLLMError unless is_good(value).

    is_good may raise TypeError or AttributeError for a value of a wrong type.
    """
    with contextlib.suppress(TypeError, AttributeError):
        if is_good(value):
            return value
    raise TinyVLLMError(f"{name}: expected {expected}, got {value!r:.60}")


def is_int(value, least=1, most=math.inf):
    """Whether the value is a whole number from `least` to `most`."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and least <= value <= most


def cdiv(a, b):
    """a / b, rounded up: the number of pages of b tokens that hold a tokens."""
    return -(-a // b)


# ======================================================================================================
# Config and weights
#
# A model is a folder in the Hugging Face layout: config.json (the model's shape), *.safetensors (the
# weights, by name), generation_config.json (the tokens that end an answer). The architecture is
# written down where the weights are read: each tensor is taken by its name, with the shape that the
# tensor must have.
#
# Two changes are made on the way to the device:
# - q, k and v are products with the same input, so their matrices are stacked into one matrix, and so
#   are gate and up. A layer then has two large products instead of five smaller ones.
# - In front of both stands an RMSNorm, x / rms(x) * g. The weight g is multiplied into the matrix,
#   since (x * g) @ W.T = x @ (W * g).T. The remaining factor, 1 / rms(x), is one scalar per token; the
#   kernel that reads the product multiplies by it. W * g is rounded to bfloat16: one rounding more
#   than Hugging Face does. In return 2 L of the 2 L + 1 norms need no kernel.
# ======================================================================================================
HUB_MODEL = "meta-llama/Llama-3.2-1B-Instruct"


def find_model(name=None, load_format="auto"):
    """The folder of a model. name: a folder or a Hugging Face id. None: Llama-3.2-1B-Instruct if it
    was downloaded before, else Parrot, the model in this project's folder."""
    if not name:
        folder = download(HUB_MODEL, local_files_only=True)
        if folder and (folder / "config.json").exists() and any(folder.glob("model*.safetensors")):
            return folder
        print("tiny-vLLM: using the bundled Parrot, which can only recite. For a real model: --model "
              f"{HUB_MODEL} (2.5 GB; accept its license on huggingface.co and run `hf auth login` first)",
              file=sys.stderr)
        return FOLDER / "parrot"
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        shapes = f", or a shape: {', '.join(SHAPES)}" if load_format == "dummy" else ""
        raise TinyVLLMError("model: expected a folder with config.json, or a Hugging Face id like "
                            f"{HUB_MODEL}{shapes}, got {name}")
    return download(name)


def download(repo, local_files_only=False):
    """The local folder of a Hugging Face model. With local_files_only: None if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    advice = {
        GatedRepoError: f"accept its license at https://huggingface.co/{repo} and run `hf auth login`",
        RepositoryNotFoundError: "no such model, or a private one: check the id, and run `hf auth login`"}
    patterns = ["*.json", "*.jinja", "model*.safetensors"]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=local_files_only))
    except Exception as error:      # the hub, its HTTP client and the disk raise many kinds
        if local_files_only:
            return None
        what = advice.get(type(error), "check the network, or give the folder of a model that is here")
        raise TinyVLLMError(f"cannot download {repo} ({first_line(error):.120}): {what}") from None


def read_json(path):
    """The dict in a JSON file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise TinyVLLMError(f"no {path.name} in {path.parent}: expected a model folder, with config.json, "
                            "tokenizer.json and *.safetensors") from None
    except (OSError, ValueError) as error:
        raise TinyVLLMError(f"cannot read {path} ({error}): expected valid JSON, in a file that you may "
                            "read") from None
    return check(path, value, lambda value: isinstance(value, dict), "a JSON object (download it again)")


def positive(settings, name, file, kind=int):
    """settings[name]. Raises TinyVLLMError unless it is an int above 0, or, with kind=float, any
    number above 0."""
    def is_good(value):
        return type(value) in (int, kind) and 0 < value < math.inf
    return check(f"{file}: {name}", settings.get(name), is_good,
                 "a whole number above 0" if kind is int else "a number above 0")


SUPPORTED = {       # fields of config.json and the values that this engine computes; None: not there
    "architectures": (["LlamaForCausalLM"], ["MistralForCausalLM"]),
    "hidden_act": ("silu", None),
    "rope_type": ("llama3", "default", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "tie_word_embeddings": (True, False, None)}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama, under the names of config.json."""
    hidden_size: int                    # D
    intermediate_size: int              # F
    num_hidden_layers: int              # L
    num_attention_heads: int            # H
    num_key_value_heads: int            # K
    head_dim: int                       # h
    vocab_size: int                     # V
    max_position_embeddings: int        # tokens of context
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None           # Llama 3's four numbers, see rope_frequencies
    tie_word_embeddings: bool           # whether the head is the embedding table
    eos_token_ids: frozenset            # each of them ends an answer

    @property
    def heads_size(self):
        """Numbers of a token's attention output, H h."""
        return self.num_attention_heads * self.head_dim

    @property
    def qkv_size(self):
        """Numbers of a token's queries, keys and values, (H + 2K) h."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @classmethod
    def from_folder(cls, folder):
        """Reads config.json and generation_config.json. Raises TinyVLLMError for a model that this
        engine would compute wrongly."""
        file = folder / "config.json"
        settings = {name: value for name, value in read_json(file).items() if value is not None}
        # Newer files have rope_parameters, older ones rope_scaling; the oldest call rope_type "type".
        rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
        check(f"{file}: rope_scaling", rope, lambda rope: isinstance(rope, dict), "a dict")
        settings |= rope
        settings.setdefault("rope_type", rope.get("type"))
        for name, values in SUPPORTED.items():
            check(f"{file}: {name}", settings.get(name), lambda value, values=values: value in values,
                  " or ".join(map(str, values)))
        heads = positive(settings, "num_attention_heads", file)
        hidden_size = positive(settings, "hidden_size", file)
        defaults = {"num_key_value_heads": heads, "head_dim": hidden_size // heads, "rope_theta": 10000.0}
        settings = defaults | settings
        config = cls(
            hidden_size=hidden_size,
            intermediate_size=positive(settings, "intermediate_size", file),
            num_hidden_layers=positive(settings, "num_hidden_layers", file),
            num_attention_heads=heads,
            num_key_value_heads=positive(settings, "num_key_value_heads", file),
            head_dim=positive(settings, "head_dim", file),
            vocab_size=positive(settings, "vocab_size", file),
            max_position_embeddings=positive(settings, "max_position_embeddings", file),
            rms_norm_eps=positive(settings, "rms_norm_eps", file, float),
            rope_theta=positive(settings, "rope_theta", file, float),
            rope_scaling=cls.read_rope_scaling(settings, file),
            tie_word_embeddings=bool(settings.get("tie_word_embeddings")),
            eos_token_ids=cls.read_eos_token_ids(settings, folder))
        config.check_kernel_limits(file)
        return config

    @staticmethod
    def read_rope_scaling(settings, file):
        """The four numbers of Llama 3's RoPE scaling. None for plain RoPE."""
        if settings["rope_type"] != "llama3":
            return None
        names = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
        scaling = {name: positive(settings, name, file, float) for name in names}
        high = scaling["high_freq_factor"]
        check(f"{file}: low_freq_factor", scaling["low_freq_factor"], lambda low: low < high,
              f"less than high_freq_factor, {high}")
        return scaling

    @staticmethod
    def read_eos_token_ids(settings, folder):
        """The ids that end an answer. generation_config.json, where it exists, goes before config.json."""
        eos = settings.get("eos_token_id", [])
        generation = folder / "generation_config.json"
        if generation.exists():
            eos = read_json(generation).get("eos_token_id", eos)
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        check(f"{folder}: eos_token_id", ids, lambda ids: all(is_int(i, 0) for i in ids),
              "a token id or a list of token ids")
        return frozenset(ids)

    def check_kernel_limits(self, file):
        """Raises TinyVLLMError for sizes that kernels.cu is not written for."""
        kv_heads = self.num_key_value_heads
        check(f"{file}: num_attention_heads", self.num_attention_heads,
              lambda heads: heads in range(kv_heads, 16 * kv_heads + 1, kv_heads),
              f"1 to 16 for each of num_key_value_heads, {kv_heads}")
        check(f"{file}: head_dim", self.head_dim, lambda h: h in range(32, 257, 16),
              "32 to 256 in steps of 16")
        for name in "hidden_size", "intermediate_size":
            check(f"{file}: {name}", getattr(self, name), lambda n: n % 8 == 0, "a multiple of 8")


def llama_3_shape(rope_factor, **sizes):
    """The ModelConfig of a Llama 3.1 or 3.2, whose sizes differ and little else."""
    scaling = {"factor": rope_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    return ModelConfig(num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072,
                       rms_norm_eps=1e-5, rope_theta=500000.0, rope_scaling=scaling,
                       eos_token_ids=frozenset([128001, 128008, 128009]), **sizes)


SHAPES = {          # for --load-format dummy: models that need no download
    "llama-3.2-1b": llama_3_shape(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
        rope_factor=32.0, tie_word_embeddings=True),
    "llama-3.2-3b": llama_3_shape(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128,
        rope_factor=32.0, tie_word_embeddings=True),
    "llama-3.1-8b": llama_3_shape(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, head_dim=128,
        rope_factor=8.0, tie_word_embeddings=False)}


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights, on the device."""
    qkv: object                         # [(H + 2K) h, D], multiplied by the weight of the norm before it
    o: object                           # [D, H h]
    gate_up: object                     # [2F, D], multiplied by the weight of the norm before it
    down: object                        # [D, F]

    @property
    def matrices(self):
        """The layer's matrices in the order of the forward pass."""
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True)
class Weights:
    """The model's weights, on the device. Nothing changes them."""
    embed: object                       # [V, D]
    layers: list                        # L LayerWeights
    norm: object                        # [D]
    head: object                        # [V, D]; the very array `embed` if the two are tied


Tensor = namedtuple("Tensor", "dtype shape data")       # the dtype's name, a tuple, uint8 [bytes]


class Checkpoint:
    """The safetensors files of a folder: one file, or the shards in model.safetensors.index.json.

    A safetensors file is 8 bytes with the length of the header, then the header, JSON: {name: {"dtype",
    "shape", "data_offsets": [begin, end]}}, then the numbers. The package validates the header. The
    numbers are mapped, not read: the operating system copies a tensor out of its page cache when the
    tensor goes to the device, five times as fast as the package does.
    """
    DTYPES = {"BF16": BFLOAT16, "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}

    def __init__(self, folder):
        self.folder = folder
        self.tensors = {}               # name -> Tensor, of those that nobody has taken
        index = folder / "model.safetensors.index.json"
        weight_map = {"every tensor": "model.safetensors"}
        if index.exists():
            weight_map = read_json(index).get("weight_map")
        check(f"{index}: weight_map", weight_map,
              lambda files: all(isinstance(name, str) for name in files.values()), "a dict {tensor: file}")
        for name in sorted(set(weight_map.values())):
            try:
                self.open(folder / name)
            except FileNotFoundError:
                raise TinyVLLMError(f"no {name} in {folder}: download the model's *.safetensors") from None
            except (SafetensorError, OSError) as error:
                raise TinyVLLMError(f"{folder / name} is no valid safetensors file ({error}): download it "
                                    "again") from None

    def open(self, path):
        """Validates a file, maps it and finds its tensors."""
        with safe_open(path, framework="numpy"):    # raises for overlaps, holes, sizes that do not fit
            pass
        data = np.memmap(path, np.uint8, "r")
        header_end = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:header_end].tobytes())
        header.pop("__metadata__", None)
        numbers = data[header_end:]
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            self.tensors[name] = Tensor(tensor["dtype"], tuple(tensor["shape"]), numbers[begin:end])

    def take(self, name, *shape):
        """The tensor of this name and shape, as it lies in the file. Nobody can take it again."""
        if name not in self.tensors:
            raise TinyVLLMError(f"{self.folder}: expected a tensor {name} in the weights, found none: are "
                                "the weights of another model than config.json?")
        tensor = self.tensors.pop(name)
        check(f"{self.folder}: the shape of {name}", tensor.shape, lambda its: its == shape,
              f"{shape}, by config.json")
        check(f"{self.folder}: the dtype of {name}", tensor.dtype, lambda dtype: dtype in self.DTYPES,
              " or ".join(self.DTYPES))
        return tensor.data.view(self.DTYPES[tensor.dtype]).reshape(shape)


class DummyCheckpoint:
    """Random weights in place of a Checkpoint's, made on the device and the same each time: matrices
    with the spread of a trained model's, norms of 1."""

    def __init__(self, device):
        self.xp = device.xp
        self.random = device.xp.random.default_rng(0)
        self.tensors = {}

    def take(self, name, *shape):
        """A tensor of this shape, whatever the name."""
        if len(shape) == 1:
            return self.xp.ones(shape, BFLOAT16)
        return (0.02 * self.random.standard_normal(shape, np.float32)).astype(BFLOAT16)


def load_weights(checkpoint, config, device):
    """The model's weights on the device, bfloat16."""
    c = config
    D, F, V, h = c.hidden_size, c.intermediate_size, c.vocab_size, c.head_dim
    q_rows, kv_rows = c.heads_size, c.num_key_value_heads * h

    def take(name, *shape):
        return device.to_device(checkpoint.take(name + ".weight", *shape)).astype(BFLOAT16, copy=False)

    def stack(norm, *parts):
        """One matrix of several (name, rows, columns), below one another, times the norm's weight. Each
        part goes to the device by itself, so that the host never holds the stack."""
        g = take(norm, D).astype(np.float32)
        scaled = [(take(*part).astype(np.float32) * g).astype(BFLOAT16) for part in parts]
        return device.xp.concatenate(scaled)

    def layer(i):
        attention = f"model.layers.{i}.self_attn"
        mlp = f"model.layers.{i}.mlp"
        return LayerWeights(
            qkv=stack(f"model.layers.{i}.input_layernorm", (f"{attention}.q_proj", q_rows, D),
                      (f"{attention}.k_proj", kv_rows, D), (f"{attention}.v_proj", kv_rows, D)),
            o=take(f"{attention}.o_proj", D, q_rows),
            gate_up=stack(f"model.layers.{i}.post_attention_layernorm", (f"{mlp}.gate_proj", F, D),
                          (f"{mlp}.up_proj", F, D)),
            down=take(f"{mlp}.down_proj", D, F))

    embed = take("model.embed_tokens", V, D)
    layers = [layer(i) for i in range(c.num_hidden_layers)]
    norm = take("model.norm", D)
    head = embed if c.tie_word_embeddings else take("lm_head", V, D)
    # A tensor that nobody took, such as a bias, would be missing from the answers. Two are known to be
    # copies of other data: a tied head, and RoPE's table of frequencies.
    left = [name for name in checkpoint.tensors
            if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise TinyVLLMError(f"{checkpoint.folder}: expected the tensors of a Llama with this config.json, "
                            f"got {len(left)} others, such as {left[0]}: another architecture, or quantized?")
    return Weights(embed, layers, norm, head)


# ======================================================================================================
# Pages
#
# The KV cache keeps each token's key and value in every layer, so that later tokens need not compute
# them again. The keys and values of all sequences live in one pool of N pages (vLLM: blocks) of B tokens
# each. A sequence holds a list of page numbers, its block table. Token number p of the sequence has the
# slot block_table[p // B] * B + p % B. Pages are taken as the text grows and may lie anywhere in the
# pool, so the only waste is the unfilled part of each sequence's last page.
#
# Prefix caching: a full page never changes, and its content depends on nothing but its own tokens and
# the tokens before it. So every sequence with the same beginning (a system prompt, the turns of a chat
# so far) can use the same page. A page counts its users. A page without users keeps its content until an
# allocation needs room; the page that was used least recently goes first.
#
# A chain is a run of full pages from the beginning of a text. Each distinct chain has a number; 0 is the
# empty chain. A dict finds a page: (number of the chain before the page, the page's tokens) -> page.
# Equal keys mean equal texts, where a hash of all earlier tokens could collide.
#
# This is bookkeeping on the CPU. Kernels write and read the keys and values themselves.
# ======================================================================================================
class BlockAllocator:
    """Hands out pages by number, 0 to num_blocks - 1."""

    def __init__(self, num_blocks, block_size, prefix_caching=True):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.free = OrderedDict.fromkeys(range(num_blocks))     # pages without users; the first goes first
        self.ref_counts = [0] * num_blocks
        self.cached = {}                                            # (chain before, tokens) -> page
        self.chains = {}                                            # page -> (its key in cached, its chain)
        self.new_chain = itertools.count(1).__next__

    def allocate(self, count):
        """`count` page numbers. The caller has seen that len(free) >= count."""
        assert count <= len(self.free), f"{count} pages were asked for, {len(self.free)} are free"
        blocks = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.ref_counts[block] = 1
            if block in self.chains:
                key, _ = self.chains.pop(block)
                if self.cached.get(key) == block:
                    del self.cached[key]
        return blocks

    def release(self, blocks):
        """A user gives pages back. The last pages of a text are queued for eviction before its first: a
        page is of no use without the pages before it."""
        for block in reversed(blocks):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free[block] = None
                if block not in self.chains:
                    self.free.move_to_end(block, last=False)        # nobody can find it: reuse it first

    def register(self, block, before, tokens):
        """Makes a full page findable. before: the page before it, or None; tokens: a tuple."""
        chain_before = 0
        if before is not None:
            _, chain_before = self.chains[before]
        key = (chain_before, tokens)
        # Two sequences may have filled a page each with the same tokens at the same time. The first one
        # stays in `cached`; the second has the same chain, so that the pages after it can be found.
        first = self.cached.setdefault(key, block)
        if first == block:
            chain = self.new_chain()
        else:
            _, chain = self.chains[first]
        self.chains[block] = (key, chain)

    def find(self, token_ids):
        """The cached pages of the longest known beginning. The page of the last token is never among
        them: its logits are not cached, so at least one token must be computed."""
        blocks = []
        chain = 0
        size = self.block_size
        for start in range(0, len(token_ids) - size, size):
            block = self.cached.get((chain, tuple(token_ids[start:start + size])))
            if block is None:
                break
            blocks.append(block)
            _, chain = self.chains[block]
        return blocks

    def share(self, blocks):
        """Adds a user to pages that find() returned."""
        for block in blocks:
            self.ref_counts[block] += 1
            self.free.pop(block, None)

    def check_integrity(self, block_tables):
        """A page has as many users as there are block tables with the page, a page is free exactly if it
        has no user, and every cached page knows its key."""
        users = Counter(block for table in block_tables for block in table)
        pages = range(self.num_blocks)
        assert self.ref_counts == [users[page] for page in pages], f"{self.ref_counts} users, not {users}"
        assert set(self.free) == {page for page in pages if not users[page]}, (
            f"{list(self.free)} are free, but used are {users}")
        assert all(self.chains[page][0] == key for key, page in self.cached.items())


# ======================================================================================================
# Sequences and scheduler
#
# Continuous batching: the tokens that run are chosen anew at every step. The scheduler knows tokens and
# pages, and no arrays; it can be tested without a model.
#   waiting   sequences without pages, in order of arrival. A preempted sequence, whose pages were taken
#             for others, goes to the front
#   running   sequences with pages, in order of arrival. Admission gives a sequence pages for all tokens
#             that it has; decode adds a page whenever the last page is full
#
# A sequence's tokens are its prompt and its answer so far. The keys and values of the first
# num_computed_tokens tokens are in the cache:
#
#   token_ids    [ prompt .................... | answer so far ]
#                [ computed: in the cache ...... | remaining    ]   the next token can be sampled once
#                                                                   nothing remains
#
# One token remains in decode, more after arrival or preemption: prefill and decode differ in nothing else.
# ======================================================================================================
@dataclass
class SamplingParams:
    """How to choose tokens and when to stop, under vLLM's names. Raises TinyVLLMError for nonsense."""
    temperature: float = 0.0            # 0: greedy
    top_k: int = 0                      # keep the k most probable tokens; 0 or -1: all
    top_p: float = 1.0                  # of the kept tokens, keep the most probable that together reach p
    seed: int | None = None             # None: another seed for every request
    max_tokens: int | None = 256        # None: as many as the context holds
    ignore_eos: bool = False            # go on after the model's own end of an answer
    stop_token_ids: tuple = ()          # end the answer, beside the model's own eos tokens
    logprobs: int | None = None         # report each token's log-probability, and the n best tokens'

    def __post_init__(self):
        def want(name, is_good, expected):
            check(name, getattr(self, name), is_good, expected)
        largest = np.finfo(np.float32).max
        want("temperature", lambda t: 0 <= t <= largest, "0 (greedy) or more")
        want("top_k", lambda k: is_int(k, -1), "a whole number of 1 or more, or 0 for all")
        want("top_p", lambda p: 0 < p <= 1, "more than 0 and at most 1")
        want("seed", lambda seed: seed is None or is_int(seed, 0, 2**64 - 1),
             "a whole number from 0 to 2^64 - 1")
        want("max_tokens", lambda n: n is None or is_int(n), "a whole number of 1 or more")
        want("stop_token_ids", lambda ids: not isinstance(ids, str) and all(is_int(i, 0) for i in ids),
             "a list of token ids")
        want("logprobs", lambda n: n is None or is_int(n, 0), "a whole number of 0 or more")


@dataclass
class RequestOutput:
    """A request's answer. It grows while the request runs, and is final once finish_reason is set."""
    prompt_token_ids: list
    text: str = ""
    token_ids: list = field(default_factory=list)
    # "stop": an eos or stop token (the last of token_ids); "length": a limit; "error"; "abort": given up
    finish_reason: str | None = None
    error: str | None = None            # why the request was refused
    logprobs: list | None = None        # for each token {token id: log-probability}, its own and the best'
    delta: str = ""                     # the new text since LLM.run or .stream last yielded this output
    num_cached_tokens: int = 0          # tokens found in the prefix cache, summed over all admissions
    num_preemptions: int = 0
    arrival_time: float = 0.0           # in seconds of time.perf_counter(), as the next two
    first_token_time: float = 0.0
    finish_time: float = 0.0
    account: dict | None = None         # {part: seconds} of the time in between, if a views.Recorder observed


class Sequence:
    """A request inside the engine: its tokens, its pages, how far it is computed."""

    def __init__(self, params, output, decoder, max_len):
        """max_len: the sequence ends when prompt and answer together have so many tokens."""
        self.params = params
        self.output = output
        self.decoder = decoder
        self.max_len = max_len
        # array("i"): four bytes a token, whose slices Batch.build joins without looking at each number.
        self.token_ids = int_array("i", output.prompt_token_ids)
        self.num_computed_tokens = 0
        self.block_table = int_array("i")
        self.num_registered_blocks = 0      # of its pages, how many others can find
        self.seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little")

    @property
    def remaining(self):
        """The number of tokens that are not yet computed."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_complete(self):
        """Whether the sequence has all its tokens. The last one may still be a placeholder (see Engine)."""
        return len(self.token_ids) == self.max_len


class Scheduler:
    """Decides which tokens run in the next step, and gives them their pages."""

    def __init__(self, allocator, max_num_batched_tokens, max_num_seqs, chunked_prefill=True,
                 static_batching=False):
        """max_num_batched_tokens: the token budget of a step. max_num_seqs: how many sequences may run at
        once. Without chunked_prefill a prompt runs in one step. static_batching: a batch is admitted
        together, and the next batch when all of it is done."""
        self.allocator = allocator
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.chunked_prefill = chunked_prefill
        self.static_batching = static_batching
        self.waiting = deque()
        self.running = []

    def schedule(self):
        """[(sequence, number of its tokens to compute)]: decodes, then prefill as the budget allows."""
        scheduled = []
        prefills = []
        budget = self.max_num_batched_tokens
        # 1. Running sequences, oldest first: one token of each that decodes. A prompt that is not finished
        #    has had all its pages since admission. A decode that needs a page and finds none preempts the
        #    youngest sequence, which this loop has not reached yet. The budget covers all decodes, since
        #    max_num_seqs is no greater than the budget.
        for sequence in list(self.running):
            if not sequence.block_table:
                break                                   # just preempted, and so are all sequences after it
            if sequence.remaining > 1:
                prefills.append(sequence)
            elif not sequence.is_complete and self.grow(sequence):
                scheduled.append((sequence, 1))
                budget -= 1
        # 2. Waiting sequences, in order of arrival.
        planned = sum(sequence.remaining for sequence in prefills)
        was_idle = not self.running
        while self.waiting and self.has_room(planned, budget, was_idle) and self.admit(self.waiting[0]):
            sequence = self.running[-1]
            prefills.append(sequence)
            planned += sequence.remaining
        # 3. Prompts, as far as the budget goes.
        for sequence in prefills:
            chunk = min(sequence.remaining, budget)
            if chunk < sequence.remaining and not self.chunked_prefill:
                break                                   # until there is a step in which it fits whole
            if chunk:
                scheduled.append((sequence, chunk))
                budget -= chunk
        return scheduled

    def has_room(self, planned, budget, was_idle):
        """Whether a step with so many planned prompt tokens can take in the first waiting sequence."""
        if self.waiting[0].is_complete:
            return False        # preempted with its last token in flight: nothing is left to compute
        if len(self.running) >= self.max_num_seqs:
            return False
        return was_idle if self.static_batching else planned < budget

    def admit(self, sequence):
        """Gives the first waiting sequence pages for all its tokens, and runs it. False if there are too few
        pages.

        One page is left for each running sequence. Otherwise the running sequences would soon need them
        and preempt the newcomer, and its prefill would be wasted.
        """
        allocator = self.allocator
        cached = allocator.find(sequence.token_ids)
        num_tokens = len(sequence.token_ids) + 1        # with the token that prefill will sample
        needed = cdiv(num_tokens, allocator.block_size) - len(cached)
        # A cached page without users is free, too, but is about to be used.
        free = len(allocator.free) - sum(block in allocator.free for block in cached)
        if needed + len(self.running) > free:
            return False
        allocator.share(cached)
        sequence.block_table = int_array("i", cached + allocator.allocate(needed))
        sequence.num_registered_blocks = len(cached)
        sequence.num_computed_tokens = len(cached) * allocator.block_size
        sequence.output.num_cached_tokens += sequence.num_computed_tokens
        self.running.append(self.waiting.popleft())
        return True

    def grow(self, sequence):
        """Adds a page for the next token if the sequence's pages are full. False if the sequence itself is
        the youngest and was preempted."""
        # A loop: the victim's pages may be shared, and then preemption frees none.
        while sequence.num_computed_tokens == len(sequence.block_table) * self.allocator.block_size:
            if self.allocator.free:
                sequence.block_table.extend(self.allocator.allocate(1))
            else:
                victim = self.running[-1]
                self.preempt(victim)
                if victim is sequence:
                    return False
        return True

    def preempt(self, sequence):
        """Takes a sequence's pages. The sequence keeps its tokens; their keys and values will be computed
        again, or found if they are still cached."""
        self.remove(sequence)
        sequence.num_computed_tokens = 0
        sequence.output.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def remove(self, sequence):
        """Forgets a sequence that is done or given up, running or waiting."""
        queue = self.running if sequence in self.running else self.waiting
        queue.remove(sequence)
        self.register_full_blocks(sequence)
        self.allocator.release(sequence.block_table)
        sequence.block_table = int_array("i")
        sequence.num_registered_blocks = 0

    def register_full_blocks(self, sequence):
        """Registers the sequence's full pages, so that other sequences can share them. To be called after
        the launch of the step that fills them: a sequence that finds such a page runs in a later step, so
        its kernels read after the write."""
        if not self.allocator.prefix_caching:
            return
        size = self.allocator.block_size
        table = sequence.block_table
        for number in range(sequence.num_registered_blocks, sequence.num_computed_tokens // size):
            tokens = tuple(sequence.token_ids[number * size:(number + 1) * size])
            if tokens[-1] < 0:              # a placeholder, see Engine: wait until the token is known
                break
            before = table[number - 1] if number > 0 else None
            self.allocator.register(table[number], before, tokens)
            sequence.num_registered_blocks += 1

    def check_integrity(self):
        """What always holds between two steps."""
        self.allocator.check_integrity([s.block_table for s in self.running])
        assert not any(s.block_table or s.num_computed_tokens for s in self.waiting)
        for s in self.running:
            assert s.num_computed_tokens <= len(s.block_table) * self.allocator.block_size
            assert s.remaining >= 1
            assert s.num_registered_blocks <= s.num_computed_tokens // self.allocator.block_size


# ======================================================================================================
# Forward pass
#
# forward() computes every step: T tokens in a row. It does not know which sequence brings a chunk of its
# prompt and which a single token. What the kernels need to know of sequences is data, in the Batch:
#
#   sequence 0 brings 5 tokens (a chunk from position 16 on), sequence 1 brings 1 (decode), sequence 2
#   brings 3:
#   token_ids    a a a a a b c c c       T = 9
#   positions   16 17 18 19 20 41 0 1 2
#   cu_seqlens   0         5 6     9     where each sequence begins ("cu": cumulative)
#   context_lens 21 42 3                 tokens in the cache after this step
#   block_tables 7 2 | 5 3 9 | 4         the pages of each sequence; cu_blocks 0 2 5 6
#
# Steps in which every sequence decodes run as CUDA graphs, since the CPU takes longer to start their
# kernels than the GPU to run them. There is a graph for each of a few batch sizes; a batch is padded to
# the next size with rows that nobody reads (vLLM: cudagraph_capture_sizes, and enforce_eager for no
# graphs). For the smallest sizes decode.cu computes the whole step in one kernel, on cards that can
# (decode(), below): the one other path of this engine, tested against forward().
# ======================================================================================================
GRAPH_SIZES = (1, 2, 4, 6, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256)
MAX_SPLITS = 32                         # thread blocks that share a context; merging reads what each leaves


def cumulative(counts):
    """int32 [n + 1]: 0, then the sums of the first 1, 2, ... n counts."""
    return np.cumsum([0, *counts], dtype=np.int32)


@dataclass
class Batch:
    """A step's tokens, and all that the kernels must know about them, in the host's memory.

    The arrays stand in the order of the upload (StepBuffer): arrays with entries of 8 bytes first, so
    that every array is aligned, and block_tables last, since its size does not follow from T, S and R.
    """
    sampled: list                       # R Sequences: those of which nothing remains after this step
    slot_mapping: np.ndarray            # [T] int64: where each token's key and value go; -1: nowhere
    seeds: np.ndarray                   # [R] uint64
    token_ids: np.ndarray               # [T] int32
    positions: np.ndarray               # [T] int32
    cu_seqlens: np.ndarray              # [S + 1] int32
    context_lens: np.ndarray            # [S] int32
    last_tokens: np.ndarray             # [R] int32: index in the batch of each sampled sequence's last token
    lengths: np.ndarray                 # [R] int32: tokens of each sampled sequence, the new one's position
    temperatures: np.ndarray            # [R] float32
    top_ks: np.ndarray                  # [R] int32
    top_ps: np.ndarray                  # [R] float32
    tiles: np.ndarray                   # [2A] int32: the work of attention, see attention_tiles
    cu_blocks: np.ndarray               # [S + 1] int32
    block_tables: np.ndarray            # [pages of all S] int32: sequence s has those from cu_blocks[s] on

    @classmethod
    def build(cls, scheduled, block_size, group, tile_rows):
        """The batch for a list of (sequence, number of tokens). group, tile_rows: see attention_tiles."""
        sequences = [sequence for sequence, _ in scheduled]
        counts = np.array([count for _, count in scheduled], np.int32)                  # [S]
        starts = np.array([s.num_computed_tokens for s in sequences], np.int32)         # [S]
        lengths = np.array([len(s.token_ids) for s in sequences], np.int32)             # [S]
        context_lens = starts + counts                                                  # [S]
        cu_seqlens = cumulative(counts)                                                 # [S + 1]

        chunks = [s.token_ids[s.num_computed_tokens:s.num_computed_tokens + count] for s, count in scheduled]
        token_ids = np.frombuffer(b"".join(chunks), np.int32)                           # [T]
        index_in_chunk = np.arange(len(token_ids), dtype=np.int32) - np.repeat(cu_seqlens[:-1], counts)
        positions = np.repeat(starts, counts) + index_in_chunk                          # [T]

        tables = [s.block_table for s in sequences]
        cu_blocks = cumulative([len(table) for table in tables])                        # [S + 1]
        block_tables = np.frombuffer(b"".join(tables), np.int32)
        pages = block_tables[np.repeat(cu_blocks[:-1], counts) + positions // block_size]       # [T]
        slot_mapping = pages.astype(np.int64) * block_size + positions % block_size     # [T]

        rows = np.flatnonzero(context_lens == lengths)          # [R] of the S sequences: nothing remains
        sampled = [sequences[row] for row in rows]
        params = [s.params for s in sampled]
        return cls(
            sampled=sampled,
            slot_mapping=slot_mapping,
            seeds=np.array([s.seed for s in sampled], np.uint64),
            token_ids=token_ids,
            positions=positions,
            cu_seqlens=cu_seqlens,
            context_lens=context_lens,
            last_tokens=cu_seqlens[rows + 1] - 1,
            lengths=lengths[rows],
            temperatures=np.array([p.temperature for p in params], np.float32),
            top_ks=np.array([min(p.top_k, 2**31 - 1) for p in params], np.int32),
            top_ps=np.array([p.top_p for p in params], np.float32),
            tiles=attention_tiles(counts, context_lens, group, tile_rows),
            cu_blocks=cu_blocks,
            block_tables=block_tables)

    @property
    def is_decode(self):
        """Whether every sequence brings one token and gets one: T = S = R."""
        return len(self.token_ids) == len(self.context_lens) == len(self.sampled)

    def padded(self, size):
        """A batch of decodes with rows added, up to `size`: sequences of one token that write to no slot
        and see no key."""
        count = len(self.token_ids)
        if count == size:
            return self

        def fill(array, value=0):
            return np.concatenate([array, np.full(size - count, value, array.dtype)])
        rows = np.arange(size + 1, dtype=np.int32)
        new_rows = rows[count:-1]
        new_tiles = np.stack([new_rows, np.zeros_like(new_rows)], 1)        # (sequence, first row 0)
        return Batch(
            sampled=self.sampled,
            slot_mapping=fill(self.slot_mapping, -1),
            seeds=fill(self.seeds),
            token_ids=fill(self.token_ids),
            positions=fill(self.positions),
            cu_seqlens=rows,
            context_lens=fill(self.context_lens),
            last_tokens=rows[:-1],
            lengths=fill(self.lengths),
            temperatures=fill(self.temperatures),
            top_ks=fill(self.top_ks),
            top_ps=fill(self.top_ps),
            tiles=np.concatenate([self.tiles, new_tiles.ravel()]),
            cu_blocks=fill(self.cu_blocks, self.cu_blocks[-1]),
            block_tables=self.block_tables)


BATCH_ARRAYS = [f.name for f in fields(Batch) if f.name != "sampled"]
DeviceBatch = namedtuple("DeviceBatch", BATCH_ARRAYS)       # a Batch's arrays in the device's memory


def attention_tiles(counts, context_lens, group, tile_rows):
    """[2A] int32: A tiles, each (sequence, first row). A thread block of attention computes one tile for
    one kv head: at most tile_rows rows of one sequence. A row is one query token and one of the `group`
    query heads that share a kv head; row r is token r // group of the chunk, head r % group.

    counts [S]: query tokens. Tiles that see the most keys come first: one of them, begun last, would run
    alone at the end.
    """
    rows = counts * group                                                   # [S]
    num_tiles = cdiv(rows, tile_rows)                                       # [S]
    sequences = np.repeat(np.arange(len(counts)), num_tiles)                # [A]
    first_tiles = np.cumsum(num_tiles) - num_tiles                          # [S]
    tiles_in_sequence = np.arange(len(sequences)) - np.repeat(first_tiles, num_tiles)
    first_rows = tiles_in_sequence * tile_rows                              # [A]
    end_rows = np.minimum(first_rows + tile_rows, rows[sequences])          # [A]
    keys_seen = (context_lens - counts)[sequences] + end_rows // group      # [A] by the tile's last row
    order = np.argsort(-keys_seen, kind="stable")
    return np.stack([sequences, first_rows], 1)[order].astype(np.int32).ravel()


class StepBuffer:
    """The memory through which host and device exchange a step: its batch, in one copy to the device, and
    the sampled tokens, in one copy back.

    An array's place in the buffer depends only on T, S and R. A CUDA graph that was recorded with one
    batch therefore finds the arrays of every later batch of the same size at the same addresses.
    """
    TOKEN_BYTES = 8 + 4 + 4 + 2         # slot, id, position; a tile, 8 bytes, has 64 rows: 4 tokens or more
    SEQUENCE_BYTES = 8 + 8 * 4 + 8      # seed, eight arrays of 4 bytes, a last tile that is not full

    def __init__(self, device, max_tokens, max_seqs, max_blocks):
        """max_blocks: entries of all block tables. Sequences share pages, so there may be more entries than
        pages."""
        # max_seqs + 1: cu_seqlens and cu_blocks have S + 1 entries.
        num_bytes = self.TOKEN_BYTES * max_tokens + self.SEQUENCE_BYTES * (max_seqs + 1) + 4 * max_blocks
        self.device = device
        self.target = device.empty(num_bytes, np.uint8)
        # Two sources, used in turn: the copy of the step before may still read the other one.
        self.sources = [device.pinned(num_bytes), device.pinned(num_bytes)]
        # Of the latest step: [0] token ids, [1] their log-probabilities, float32 seen as int32.
        self.sampled = device.empty((2, max_seqs), np.int32)

    def upload(self, batch):
        """Copies a Batch to the device. Returns the DeviceBatch."""
        self.sources.reverse()
        source = self.sources[0]
        arrays = {}
        end = 0
        for name in BATCH_ARRAYS:
            array = getattr(batch, name)
            start = end
            end += array.nbytes
            source[start:end] = array.view(np.uint8)
            arrays[name] = self.target[start:end].view(array.dtype)
        self.device.copy(self.target[:end], source[:end])
        return DeviceBatch(**arrays)


def rope_frequencies(config):
    """Radians per position by which RoPE turns each of a head's pairs (i, i + h/2), float64 [h/2].

    RoPE (arXiv:2104.09864): pair i turns by theta^(-2i/h). Llama 3.1 stretched the context
    (arXiv:2407.21783): pairs that turn less than low_freq_factor times within the original context are
    slowed by `factor`, pairs that turn more than high_freq_factor times stay as they are, and between
    the two the factor is blended.
    """
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_scaling is None:
        return frequencies
    scaling = config.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling["factor"]


class Model:
    """Config, weights, kernels and the KV cache, on a device."""

    def __init__(self, config, weights, device, num_blocks, max_model_len, buffer, args):
        """num_blocks: pages of the KV cache. max_model_len: positions that can occur. buffer: a
        StepBuffer. args: block_size, enforce_eager and fused_decode of EngineArgs."""
        c = config
        self.config = config
        self.weights = weights
        self.device = device
        self.buffer = buffer
        self.graph_sizes = () if args.enforce_eager else GRAPH_SIZES
        self.graphs = {}                    # size -> replay(), see device.record
        self.group = c.num_attention_heads // c.num_key_value_heads
        # Of 1 / sqrt(h), and of log2(e), because the kernels' softmax takes powers of 2.
        self.query_scale = math.log2(math.e) / math.sqrt(c.head_dim)
        has_decode_kernel = args.fused_decode and device.runs_decode
        code = paste(KERNELS, DECODE_KERNEL) if has_decode_kernel else paste(KERNELS)
        self.kernels = compile_kernels(device, {            # with this model's sizes as constants
            "HIDDEN": c.hidden_size, "FFN": c.intermediate_size, "NUM_LAYERS": c.num_hidden_layers,
            "NUM_HEADS": c.num_attention_heads, "NUM_KV_HEADS": c.num_key_value_heads, "HEAD_DIM": c.head_dim,
            "VOCAB": c.vocab_size, "BLOCK_SIZE": args.block_size, "RMS_EPS": f"{c.rms_norm_eps:e}f"}, code)
        # The greatest batch that decode() computes; 0 for a model whose sizes decode.cu cannot divide.
        self.decode_batch = self.kernels.DECODE_BATCH if has_decode_kernel else 0
        matrices = [matrix for layer in weights.layers for matrix in layer.matrices]
        addresses = [device.address(matrix) for matrix in [*matrices, weights.head]]
        self.addresses = device.to_device(np.array(addresses, np.uint64))               # [4L + 1]
        # Keys are kv_cache[l, 0], values kv_cache[l, 1] of layer l. Within a page each head's tokens are
        # consecutive.
        self.kv_cache = device.empty(
            (c.num_hidden_layers, 2, num_blocks, c.num_key_value_heads, args.block_size, c.head_dim))
        angles = np.arange(max_model_len)[:, None] * rope_frequencies(c)                # [max_model_len, h/2]
        cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], 1, dtype=np.float32)
        self.cos_sin = device.to_device(cos_sin)                                        # [max_model_len, h]

    def graph_size(self, batch):
        """The size of the CUDA graph that runs this batch. None: the batch runs without a graph."""
        if not batch.is_decode:
            return None
        return next((size for size in self.graph_sizes if size >= len(batch.token_ids)), None)

    def launch(self, batch):
        """Starts a step and does not wait for it.

        Returns the logits [R, V], valid until the next step, which may overwrite them, and get_tokens().
        get_tokens() waits and returns the sampled sequences' next tokens, int32, and the tokens'
        log-probabilities, float32. All three may have more than R rows: ignore the rows of the padding.
        """
        size = self.graph_size(batch)
        b = self.buffer.upload(batch if size is None else batch.padded(size))
        if size is None:
            logits = self.forward(b)
        elif size in self.graphs:
            logits = self.graphs[size]()
        else:
            run = self.decode if size <= self.decode_batch else self.forward
            logits, self.graphs[size] = self.device.record(lambda: run(b))
        wait = self.device.fetch(self.buffer.sampled)

        def get_tokens():
            tokens, logprobs = wait()
            return tokens, logprobs.view(np.float32)
        return logits, get_tokens

    def forward(self, b):
        """Puts the new tokens' keys and values into the cache and the sampled sequences' next tokens into
        the step buffer. Returns the logits [R, V] that chose the tokens. b: a DeviceBatch."""
        c, w, kernels, linear = self.config, self.weights, self.kernels, self.device.linear
        T, R, num_tiles = len(b.token_ids), len(b.last_tokens), len(b.tiles) // 2
        D, F, H, K, h = (c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads,
                         c.head_dim)
        # Attention needs two thread blocks for each multiprocessor to keep the memory busy. A small batch
        # has fewer, one for each tile and kv head, so its contexts are split. The number of splits depends
        # on the batch's size and not on its contexts: a CUDA graph repeats the grid of its recording.
        splits = max(1, min(MAX_SPLITS, 2 * self.device.multiprocessors // (num_tiles * K)))
        partial = self.device.empty((T, H, splits, h + 2), np.float32) if splits > 1 else None
        # The same attention; the one for single queries needs fewer registers, so more of it runs at once.
        attend = kernels.decode_attention if T == len(b.context_lens) else kernels.paged_attention
        residual = self.device.empty((T, D))
        attention = self.device.empty((T, H * h))
        activation = self.device.empty((T, F))

        # The embedding. A placeholder ~row among the token ids stands for the step before's sampled[0][row].
        kernels.gather_rows((T,), residual, w.embed, b.token_ids, self.buffer.sampled[0])
        for layer, (k_cache, v_cache) in zip(w.layers, self.kv_cache):
            # residual += attention(norm(residual)) @ o. rope_and_cache applies the norm's factor.
            qkv = linear(residual, layer.qkv)                                           # [T, (H + 2K) h]
            kernels.rope_and_cache((T,), qkv, residual, self.cos_sin, b.positions, b.slot_mapping, k_cache,
                                   v_cache, self.query_scale)
            attend((K * splits, num_tiles), attention, qkv, k_cache, v_cache, b.block_tables, b.cu_blocks,
                   b.cu_seqlens, b.context_lens, b.tiles, partial)
            linear(attention, layer.o, add_to=residual)

            # residual += (silu(norm(residual) @ gate) * (norm(residual) @ up)) @ down. silu_mul applies the
            # norm's factor.
            gate_up = linear(residual, layer.gate_up)                                   # [T, 2F]
            kernels.silu_mul((cdiv(F, kernels.SILU_COLUMNS), T), activation, gate_up, residual)
            linear(activation, layer.down, add_to=residual)

        if R == 0:
            return None
        x = self.device.empty((R, D))                       # only these rows: the head is large
        kernels.rms_norm((R,), x, residual, b.last_tokens, w.norm)
        logits = linear(x, w.head)
        return self.sample(logits, b)

    def decode(self, b):
        """forward() for a few sequences that bring one token each, in one kernel (decode.cu)."""
        c, w, kernels = self.config, self.weights, self.kernels
        S = len(b.token_ids)
        splits = kernels.DECODE_SPLITS // S                 # of a context, at most
        # The memory in which thread blocks hand results to each other, 0 at first: see Vectors in decode.cu.
        words_per_layer = S * (kernels.DECODE_VECTOR_WORDS + splits * kernels.DECODE_PARTIAL_WORDS)
        num_words = kernels.DECODE_TICKET_WORDS + (c.num_hidden_layers + 1) * words_per_layer
        words = self.device.xp.zeros(num_words, np.int32)
        logits = self.device.empty((S, c.vocab_size))
        num_blocks = self.kv_cache.shape[2]
        kernels.decode((self.device.multiprocessors,), logits, w.embed, w.norm, b.token_ids,
                       self.buffer.sampled[0], self.addresses, c.num_hidden_layers, self.cos_sin,
                       b.positions, b.slot_mapping, self.kv_cache, num_blocks, b.block_tables, b.cu_blocks,
                       b.context_lens, self.query_scale, words, S, splits)
        return self.sample(logits, b)

    def sample(self, logits, b):
        """Puts the next tokens into the step buffer and returns the logits. The noise of a draw depends on
        the request's seed and the token's position alone."""
        tokens, logprobs = self.buffer.sampled
        self.kernels.sample((len(logits),), tokens, logprobs.view(np.float32), logits, b.temperatures,
                            b.top_ks, b.top_ps, b.seeds, b.lengths)
        return logits


# ======================================================================================================
# Memory
#
# The card's memory holds the weights, the arrays of a step, and the KV cache, which gets whatever is left
# of the share that the engine may use. The same arithmetic says how many bytes a decode step must read:
# bytes over the memory's bandwidth are the step's floor.
# ======================================================================================================
BYTES = 2                               # of a bfloat16
CUBLAS_AND_CODE_BYTES = 2**28           # cuBLAS's workspace, and the kernels


def decode_weight_bytes(config):
    """Bytes of weights that a decode step reads: each weight once. An embedding table that is not the
    head is left out: a step reads one row of it per token."""
    c = config
    layer = c.hidden_size * (c.qkv_size + c.heads_size + 3 * c.intermediate_size)
    head = c.hidden_size * c.vocab_size
    return BYTES * (c.num_hidden_layers * layer + head + c.hidden_size)     # the last: the last norm's weight


def weight_bytes(config):
    """Bytes of all weights."""
    embedding = 0 if config.tie_word_embeddings else BYTES * config.vocab_size * config.hidden_size
    return decode_weight_bytes(config) + embedding


def kv_bytes_per_token(config):
    """Bytes of the KV cache for one token: a key and a value, in each layer, for each kv head."""
    return 2 * BYTES * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def step_bytes(config, args, max_model_len):
    """Bytes of all arrays that steps need beside weights and KV cache."""
    c = config
    per_token = c.hidden_size + c.qkv_size + c.heads_size + 3 * c.intermediate_size
    # Twice the largest step, since CuPy's pool may still hold the arrays of the step before; and the
    # largest graph, whose arrays all graphs share.
    tokens = 2 * args.max_num_batched_tokens + GRAPH_SIZES[-1]
    # Logits: twice the largest, and those of each graph.
    graph_rows = sum(size for size in GRAPH_SIZES if size < 2 * args.max_num_seqs)
    rows = 2 * args.max_num_seqs + graph_rows
    angles = 4 * c.head_dim * max_model_len
    activations = BYTES * (tokens * per_token + rows * (c.vocab_size + c.hidden_size))
    return activations + angles + CUBLAS_AND_CODE_BYTES


def kv_cache_blocks(config, memory, args):
    """The number of pages that fit into memory, (free, total) bytes, of which the share
    args.gpu_memory_utilization may be used."""
    free, total = memory
    weights = weight_bytes(config)
    arrays = step_bytes(config, args, args.max_model_len or config.max_position_embeddings)
    usable = free - (1 - args.gpu_memory_utilization) * total
    left = usable - weights - arrays
    context = args.max_model_len or args.block_size         # tokens that must fit
    page_bytes = args.block_size * kv_bytes_per_token(config)
    needed = cdiv(context, args.block_size) * page_bytes
    if left < needed:
        raise TinyVLLMError(
            f"too little memory: expected {(weights + arrays + needed) / 1e9:.3f} GB ({weights / 1e9:.3f} "
            f"for the weights, {arrays / 1e9:.3f} for a step, {needed / 1e9:.3f} for a context of {context} "
            f"tokens), got {max(usable, 0) / 1e9:.3f} GB: raise gpu_memory_utilization, lower max_model_len, "
            "or take a smaller model")
    return int(left // page_bytes)


def plan_pool(config, device, args):
    """(num_blocks, max_model_len): the pages of the KV cache, and the tokens of prompt and answer that a
    sequence may have. A sequence that fits the pool (and, without chunked prefill, a step) alone always
    finishes, since all others can be preempted: max_model_len is the one limit for requests."""
    limit = args.max_model_len or config.max_position_embeddings
    check("max_model_len", limit, lambda n: n <= config.max_position_embeddings,
          f"at most the model's {config.max_position_embeddings}")
    if not args.enable_chunked_prefill:
        check("max_model_len", args.max_model_len or 1, lambda n: n <= args.max_num_batched_tokens,
              f"at most max_num_batched_tokens, {args.max_num_batched_tokens}, without chunked prefill")
    fitting = kv_cache_blocks(config, device.memory(), args)
    pages = cdiv(limit, args.block_size)
    num_blocks = args.num_blocks
    if num_blocks is None:
        num_blocks = min(fitting, args.max_num_seqs * pages)        # more could never be used
    if num_blocks > fitting:
        raise TinyVLLMError(f"num_blocks: expected at most {fitting}, which memory holds, got {num_blocks}")
    if args.max_model_len and num_blocks < pages:
        raise TinyVLLMError(f"num_blocks: expected {pages} or more, to hold max_model_len, got {num_blocks}")
    max_model_len = min(limit, num_blocks * args.block_size)
    holder = "memory"
    if not args.enable_chunked_prefill and args.max_num_batched_tokens < max_model_len:
        max_model_len = args.max_num_batched_tokens
        holder = "a step without chunked prefill"
    if max_model_len < limit:
        print(f"tiny-vLLM: {holder} holds a context of {max_model_len} tokens, the model could have {limit}",
              file=sys.stderr)
    return num_blocks, max_model_len


# ======================================================================================================
# Engine
#
# A model, a scheduler, and the loop between them. Everything that a server does happens in step().
#
# The GPU takes a millisecond for a step, and Python half a millisecond to plan the next step and to hand
# out tokens. Done in turn, the GPU would be idle for a third of the time. So step n + 1 is launched
# first, and the tokens of step n are read after that (vLLM: async scheduling):
#
#            launch 1   launch 2        read 1   launch 3        read 2   ...
#   GPU                 | step 1 ............... | step 2 ............... | step 3
#
# To plan step n + 1 the CPU needs the number of step n's new tokens, not their ids. Until an id is known,
# the sequence holds a placeholder: ~row, a negative number, where row is the token's row among step n's
# sampled tokens. On the GPU, gather_rows looks the id up in that row.
#
# The CPU notices the end of an answer one step late. Step n + 1 has then computed one token too many,
# which finish() drops. The key and value of that token go to a page that may have a new owner by then.
# They do no harm: the GPU runs steps in order, so the new owner writes later.
# ======================================================================================================
@dataclass
class Stats:
    """What decode steps (steps in which every sequence brings one token) have done so far. Memory limits
    such a step, so the bytes that it must read, over its time, can be held against the card's bandwidth."""
    decode_bytes: int = 0               # weights once a step, keys and values of every sequence's context
    decode_seconds: float = 0.0
    last_time: float = 0.0              # when the tokens of the latest step were read

    def add(self, flight, config):
        """Counts a step whose tokens have just been read. Its time runs from its launch, or from the moment
        when the previous step's tokens were read if that was later. The time includes Python and the
        recording of new CUDA graphs, so a short run shows less than the card does."""
        now = time.perf_counter()
        batch = flight.batch
        if len(batch.token_ids) == len(batch.context_lens):
            context_bytes = kv_bytes_per_token(config) * int(batch.context_lens.sum())
            self.decode_bytes += decode_weight_bytes(config) + context_bytes
            self.decode_seconds += now - max(flight.start, self.last_time)
        self.last_time = now


# A step whose tokens are not read yet. logits, get_tokens: see Model.launch; start: when it was launched.
Flight = namedtuple("Flight", "batch logits get_tokens start")


class Engine:
    """Runs requests by continuous batching."""

    def __init__(self, model, scheduler, overlap):
        """overlap: start a step before the tokens of the step before are read, so that the GPU never waits
        for Python."""
        self.model = model
        self.scheduler = scheduler
        self.overlap = overlap
        self.stats = Stats()
        self.in_flight = deque()            # of Flights, oldest first
        self.observers = []                 # objects with told(event, what), such as views.Recorder

    def tell(self, event, what=None):
        """Tells the observers what begins or has ended just now."""
        for observer in self.observers:
            observer.told(event, what)

    def step(self):
        """Starts a step and returns the sequences that got a token: from this step or, with overlap, from
        the step before. Call it while there is work."""
        try:
            self.tell("schedule")
            scheduled = self.scheduler.schedule()
            if scheduled:
                self.launch(scheduled)
            num_unread = self.num_unread(scheduled)
            got_token = []
            while len(self.in_flight) > num_unread:
                got_token += self.finish()
            return got_token
        except BaseException:
            # Ctrl-C can come between any two statements. All tokens in flight are read, so that no
            # placeholder is left. Then each running sequence gets at least its last token to compute: to
            # compute a token again writes the same key and value.
            while self.in_flight:
                self.finish()
            for sequence in self.scheduler.running:
                sequence.num_computed_tokens = min(sequence.num_computed_tokens, len(sequence.token_ids) - 1)
            raise

    def num_unread(self, scheduled):
        """How many steps may stay in flight when step() returns."""
        if not self.overlap or not scheduled:
            return 0
        # The log-probabilities of the best tokens are computed from logits that the next step overwrites.
        needs_logits = any(s.params.logprobs for s in self.in_flight[-1].batch.sampled)
        return 0 if needs_logits else 1

    def launch(self, scheduled):
        """Starts a step and books its tokens: their number is known, so the next step can be planned."""
        start = time.perf_counter()
        self.tell("launch", scheduled)
        model = self.model
        block_size = self.scheduler.allocator.block_size
        batch = Batch.build(scheduled, block_size, model.group, model.kernels.ATTENTION_ROWS)
        logits, get_tokens = model.launch(batch)
        self.in_flight.append(Flight(batch, logits, get_tokens, start))
        for sequence, count in scheduled:
            sequence.num_computed_tokens += count
            self.scheduler.register_full_blocks(sequence)
        for row, sequence in enumerate(batch.sampled):
            sequence.token_ids.append(~row)                     # a placeholder
        self.tell("launched")

    def finish(self):
        """Waits for the oldest step in flight, gives its tokens to their sequences, and returns those. A
        sequence that ended or was given up meanwhile has no use for its token."""
        flight = self.in_flight[0]
        self.tell("wait")
        tokens, logprobs = (array.tolist() for array in flight.get_tokens())
        self.tell("read")
        got_token = []
        positions = flight.batch.lengths.tolist()
        for row, (sequence, position) in enumerate(zip(flight.batch.sampled, positions)):
            # No placeholder: Ctrl-C interrupted an earlier finish() of this step after it came here.
            has_placeholder = position < len(sequence.token_ids) and sequence.token_ids[position] < 0
            if not has_placeholder or sequence.output.finish_reason:
                continue
            count = sequence.params.logprobs
            if count is not None:
                best = self.best_logprobs(flight.logits[row], count) if count else {}
                # The token itself may be none of the best.
                sequence.output.logprobs.append(best | {tokens[row]: logprobs[row]})
            self.append(sequence, position, tokens[row])
            got_token.append(sequence)
        self.in_flight.popleft()
        self.stats.add(flight, self.model.config)
        self.tell("done", got_token)
        return got_token

    def append(self, sequence, position, token):
        """Gives a sequence its new token: text, and whether the answer ends."""
        output = sequence.output
        params = sequence.params
        sequence.token_ids[position] = token
        output.token_ids.append(token)
        output.first_token_time = output.first_token_time or time.perf_counter()
        is_eos = token in self.model.config.eos_token_ids and not params.ignore_eos
        if is_eos or token in params.stop_token_ids:
            output.finish_reason = "stop"                       # the token's own text is not in the answer
        else:
            output.text += sequence.decoder.push(token)
            if position + 1 == sequence.max_len:
                output.finish_reason = "length"
        if output.finish_reason:
            output.text += sequence.decoder.flush()
            output.finish_time = time.perf_counter()
            self.scheduler.remove(sequence)

    def best_logprobs(self, logits, count):
        """{token id: log-probability} of the `count` most probable tokens. logits: [V], on the device."""
        logits = self.model.device.fetch(logits)().astype(np.float32)
        best = np.argsort(-logits, kind="stable")[:count]
        shifted = logits - logits.max()
        logprobs = shifted[best] - np.log(np.exp(shifted).sum())
        return dict(zip(best.tolist(), logprobs.tolist()))


# ======================================================================================================
# API
#
# What a program calls, named as in vLLM. There is no thread: whoever wants tokens steps the engine. Each
# step serves all requests, also those of other callers (two streams, say), who find their tokens when
# they look. A request that its caller gives up frees its pages at once. A prompt that can never be
# answered is refused before it takes any page, as an output with an error: the others of its list go on.
# ======================================================================================================
def option(default, text, flag=None, **arguments):
    """A field of EngineArgs. text: its help; flag: its spelling on the command line, if not its own name;
    arguments: more of argparse's add_argument."""
    return field(default=default, metadata={"text": text, "flag": flag, "arguments": arguments})


@dataclass(frozen=True)
class EngineArgs:
    """The engine's options. LLM() takes them as keyword arguments, every program as command-line options.
    Raises TinyVLLMError for nonsense."""
    model: str | None = option(
        None, "a folder or a Hugging Face id (default: $TINYVLLM_MODEL, else Llama-3.2-1B-Instruct if it was "
        "downloaded before, else the bundled Parrot)")
    device: str = option(
        "auto", "auto: a GPU if there is one, else the simulator", choices=("auto", "cpu", "cuda"))
    load_format: str = option(
        "auto", f"dummy: random weights, for a --model that may also be one of {', '.join(SHAPES)}",
        choices=("auto", "dummy"))
    max_model_len: int | None = option(
        None, "tokens of prompt and answer together (default: the model's limit)", type=int, metavar="N")
    gpu_memory_utilization: float = option(0.9, "share of the GPU's memory to use", type=float, metavar="X")
    block_size: int = option(16, "tokens of a page of the KV cache", type=int, metavar="N")
    num_blocks: int | None = option(
        None, "pages of the KV cache (default: as many as the memory holds)", type=int, metavar="N")
    max_num_batched_tokens: int = option(4096, "token budget of a step", type=int, metavar="N")
    max_num_seqs: int = option(256, "sequences that run at once", type=int, metavar="N")
    enforce_eager: bool = option(False, "launch every kernel by itself", "--no-cuda-graphs")
    fused_decode: bool = option(
        True, "compute steps of a few sequences by many kernels, not by decode.cu's one", "--no-fused-decode")
    overlap: bool = option(True, "read a step's tokens before the next step is launched", "--no-overlap")
    enable_prefix_caching: bool = option(
        True, "compute every prompt whole, even if an earlier one began with the same tokens",
        "--no-prefix-caching")
    enable_chunked_prefill: bool = option(
        True, "compute a prompt in one step, or let it wait", "--no-chunked-prefill")
    static_batching: bool = option(
        False, "admit a batch of requests together, and the next batch when all of it is done",
        "--static-batching")

    def __post_init__(self):
        def want(name, is_good, expected):
            check(name, getattr(self, name), is_good, expected)
        want("device", lambda name: name in ("auto", "cpu", "cuda"), "auto, cpu or cuda")
        want("load_format", lambda name: name in ("auto", "dummy"), "auto or dummy")
        want("gpu_memory_utilization", lambda share: 0 < share <= 1, "more than 0 and at most 1")
        want("block_size", lambda n: n in (8, 16, 32, 64, 128), "8, 16, 32, 64 or 128")
        for name in "max_model_len", "num_blocks":
            want(name, lambda n: n is None or is_int(n), "a whole number of 1 or more")
        for name in "max_num_batched_tokens", "max_num_seqs":
            want(name, lambda n: is_int(n, 1, MAX_GRID_YZ),
                 f"a whole number from 1 to {MAX_GRID_YZ}, the most thread blocks of a grid in y and z")

    @classmethod
    def add_to(cls, parser):
        """Adds the options to an argparse parser. A flag without a value turns its field's default around."""
        for f in fields(cls):
            text = f.metadata["text"]
            flag = f.metadata["flag"] or "--" + f.name.replace("_", "-")
            if isinstance(f.default, bool):
                parser.add_argument(flag, dest=f.name, action="store_const", const=not f.default,
                                    default=f.default, help=text)
            else:
                shown = text if f.default is None else f"{text} (default: {f.default})"
                parser.add_argument(flag, dest=f.name, default=f.default, help=shown,
                                    **f.metadata["arguments"])

    @classmethod
    def from_namespace(cls, namespace):
        """The options that a parser has read."""
        return cls(**{f.name: getattr(namespace, f.name) for f in fields(cls)})


def open_config(args):
    """(folder, ModelConfig) of the model. A shape by name has Parrot's folder: any tokenizer would do."""
    name = args.model or os.environ.get("TINYVLLM_MODEL")
    if args.load_format == "dummy" and name in SHAPES:
        return FOLDER / "parrot", SHAPES[name]
    folder = find_model(name, args.load_format)
    return folder, ModelConfig.from_folder(folder)


class LLM:
    """A model, ready to answer:

        LLM("parrot").generate(["Once upon a time"], SamplingParams(max_tokens=20))[0].text
    """

    def __init__(self, model=None, **options):
        """options: EngineArgs' fields."""
        args = EngineArgs(model, **options)
        folder, self.config = open_config(args)
        self.tokenizer = Tokenizer(folder)
        self.device = open_device(args.device)
        num_blocks, self.max_model_len = plan_pool(self.config, self.device, args)
        checkpoint = DummyCheckpoint(self.device) if args.load_format == "dummy" else Checkpoint(folder)
        weights = load_weights(checkpoint, self.config, self.device)
        max_tokens = max(args.max_num_batched_tokens, *GRAPH_SIZES)
        max_seqs = max(args.max_num_seqs, *GRAPH_SIZES)
        max_blocks = args.max_num_seqs * cdiv(self.max_model_len, args.block_size)
        buffer = StepBuffer(self.device, max_tokens, max_seqs, max_blocks)
        model = Model(self.config, weights, self.device, num_blocks, self.max_model_len, buffer, args)
        allocator = BlockAllocator(num_blocks, args.block_size, args.enable_prefix_caching)
        scheduler = Scheduler(allocator, args.max_num_batched_tokens, args.max_num_seqs,
                              args.enable_chunked_prefill, args.static_batching)
        self.engine = Engine(model, scheduler, args.overlap)

    def generate(self, prompts, sampling_params=None):
        """Answers prompts, all at once. Returns a RequestOutput for each, in order.

        prompts: a text or a list of token ids, or a list of several. Texts are taken as they are: for a
        chat, pass the ids of tokenizer.chat(messages). sampling_params: one for all, or a list. A prompt
        that cannot be answered does not stop the others: its output has finish_reason "error" and says why
        in `error`. A prompt that stands alone raises the error.
        """
        is_text = isinstance(prompts, str)
        is_alone = is_text or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer)))
        outputs = self.submit([prompts] if is_alone else prompts, sampling_params)
        if is_alone and outputs[0].error:
            raise TinyVLLMError(outputs[0].error)
        for _ in self.finished(outputs):
            pass
        return outputs

    def stream(self, prompt, sampling_params=None):
        """Yields the prompt's RequestOutput after each token; output.delta is the new text."""
        [output] = self.submit([prompt], sampling_params)
        if output.error:
            raise TinyVLLMError(output.error)
        yield from self.run([output])

    def submit(self, prompts, sampling_params=None):
        """Queues prompts and returns their RequestOutputs, for run()."""
        if not isinstance(sampling_params, (list, tuple)):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        are_params = all(isinstance(params, SamplingParams) for params in sampling_params)
        if len(sampling_params) != len(prompts) or not are_params:
            raise TinyVLLMError(f"sampling_params: expected a SamplingParams, or one for each of "
                                f"{len(prompts)} prompts, got {len(sampling_params)} in the list")
        return [self.add_request(prompt, params) for prompt, params in zip(prompts, sampling_params)]

    def add_request(self, prompt, params):
        """Queues one prompt. Returns its RequestOutput, with an error if the prompt can never be answered."""
        output = RequestOutput([], arrival_time=time.perf_counter())
        if params.logprobs is not None:
            output.logprobs = []
        try:
            output.prompt_token_ids = self.encode_prompt(prompt)
            num_tokens = len(output.prompt_token_ids)
            max_len = min(self.max_model_len, num_tokens + (params.max_tokens or self.max_model_len))
            sequence = Sequence(params, output, StreamDecoder(self.tokenizer), max_len)
        except (TinyVLLMError, TokenizerError) as error:
            output.finish_reason = "error"
            output.error = str(error)
            return output
        self.engine.scheduler.waiting.append(sequence)
        return output

    def encode_prompt(self, prompt):
        """The token ids of a prompt. Raises TinyVLLMError if they can never be answered."""
        check("the prompt", prompt, lambda prompt: isinstance(prompt, (str, list, tuple, np.ndarray)),
              "a text or a list of token ids")
        if len(prompt) == 0:
            raise TinyVLLMError("the prompt: expected at least one token, got none")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if len(ids) >= self.max_model_len:
            raise TinyVLLMError(
                f"the prompt: expected less than {self.max_model_len} tokens, to leave room for one more, "
                f"got {len(ids)} (the model's limit is {self.config.max_position_embeddings}; see "
                "max_model_len, gpu_memory_utilization, --no-chunked-prefill)")
        vocab_size = self.config.vocab_size
        try:
            tokens = np.frombuffer(int_array("i", ids), np.int32)       # a prompt of 16,384 ids in 0.3 ms
            are_known = tokens.min() >= 0 and tokens.max() < vocab_size
        except (TypeError, OverflowError):                              # an id is no integer, or a large one
            are_known = False
        if not are_known:
            wrong = next(i for i in ids if not (isinstance(i, (int, np.integer)) and 0 <= i < vocab_size))
            raise TinyVLLMError(f"the prompt: expected token ids from 0 to {vocab_size - 1}, got {wrong!r}")
        return ids

    def run(self, outputs):
        """Steps the engine until these outputs are final. Yields each output after its new tokens (several,
        if another caller stepped in between), and once when it is final. If the caller stops early (an
        exception, Ctrl-C, a closed generator), the requests are given up and their pages freed."""
        # Outputs change, so dicts know them by id(). unseen: those not yet yielded as final.
        unseen = {id(output): output for output in outputs if not output.finish_reason}
        num_shown = dict.fromkeys(unseen, 0)                            # characters that were yielded
        try:
            while unseen:
                # Another caller's steps may have ended some.
                ended = [output for output in unseen.values() if output.finish_reason]
                for output in ended or [sequence.output for sequence in self.engine.step()]:
                    key = id(output)
                    if key not in unseen:
                        continue
                    output.delta = output.text[num_shown[key]:]
                    num_shown[key] = len(output.text)
                    if output.finish_reason:
                        del unseen[key]
                    yield output
        finally:
            self.abort(outputs)

    def finished(self, outputs, bar=True):
        """run(), but yields each output when it is final. bar: count outputs on stderr, if there are several
        and stderr is a terminal."""
        is_hidden = not bar or len(outputs) < 2 or not sys.stderr.isatty()
        with tqdm(total=len(outputs), unit="answer", disable=is_hidden) as count:
            for output in self.run(outputs):
                if output.finish_reason:
                    count.update()
                    yield output

    def abort(self, outputs):
        """Gives up requests that still run or wait, and frees their pages."""
        mine = {id(output) for output in outputs}
        scheduler = self.engine.scheduler
        for sequence in [*scheduler.running, *scheduler.waiting]:
            if id(sequence.output) in mine:
                sequence.output.finish_reason = "abort"
                sequence.output.finish_time = time.perf_counter()
                scheduler.remove(sequence)


# ======================================================================================================
# Command line
#
# stdout gets answers and nothing else; notices, errors and statistics go to stderr.
# ======================================================================================================
EXAMPLES = """examples:
  python tinyvllm.py "What is a KV cache?"                      one answer, streamed
  python tinyvllm.py "Recite Ozymandias." "Who are you?"        several at once, by continuous batching
  python tinyvllm.py --model meta-llama/Llama-3.2-1B-Instruct --temperature 0.7 --top-p 0.9 --seed 1 \\
      "Tell me a story."
"""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with errors of one line: its own print the usage, too."""

    def error(self, message):
        raise TinyVLLMError(f"{message} (--help shows the options and examples)")


def check_writable(name, path):
    """Raises TinyVLLMError if a file cannot be written there: better before a run than after. Leaves none."""
    is_new = not os.path.exists(path)
    try:
        open(path, "a").close()
    except OSError as error:
        raise TinyVLLMError(f"{name}: expected a file that you may write, got {path} "
                            f"({error.strerror})") from None
    if is_new:
        os.remove(path)


def parse_arguments(argv):
    """The command line as a namespace."""
    parser = ArgumentParser(prog="tinyvllm.py", description="Answer prompts with a Llama model.",
                            epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT",
        help='a prompt; several run together; "-" reads a prompt from each line of stdin')
    add("--max-tokens", type=int, metavar="N",
        help="longest answer, in tokens (default: what the context allows)")
    add("--temperature", type=float, default=SamplingParams.temperature, metavar="T",
        help="0 takes the most probable token (default), 1 samples as the model says")
    add("--top-k", type=int, default=SamplingParams.top_k, metavar="K",
        help="sample from the K most probable tokens (default: all)")
    add("--top-p", type=float, default=SamplingParams.top_p, metavar="P",
        help="sample from the most probable tokens that together reach P (default: 1)")
    add("--seed", type=int, metavar="N", help="makes sampling repeatable")
    add("--system", metavar="TEXT", help="a system prompt")
    add("--raw", action="store_true", help="no chat template: continue the prompt as it stands")
    EngineArgs.add_to(parser)
    add("--watch", action="store_true", help="a live view of pages, requests and steps, on stderr")
    add("--trace", metavar="FILE",
        help="write what happened and when: FILE.html is a page to look at, FILE.json opens in Perfetto")
    add("--stats", action="store_true", help="a table of where each request's time went, on stderr")
    add("--version", action="version", version=f"tiny-vLLM {__version__}")
    args = parser.parse_args(argv)
    if args.trace:
        check("--trace", args.trace, lambda path: path.endswith((".json", ".html")),
              "a file that ends in .json or .html")
        check_writable("--trace", args.trace)
    return args


def open_llm(args):
    """The LLM of EngineArgs, for a program that keeps it to its end."""
    llm = LLM(**asdict(args))
    # What exists now stays. Each full garbage collection would look through it and delay a step by 10 ms.
    gc.collect()
    gc.freeze()
    return llm


def prompt_ids(llm, text, args):
    """Token ids of a prompt as the model wants it: in its chat format, or raw."""
    if not text.strip():
        raise TinyVLLMError("the prompt is empty: expected some text")
    if args.raw or not llm.tokenizer.has_chat_template:
        return llm.tokenizer.encode(text)
    system = [{"role": "system", "content": args.system}] if args.system else []
    return llm.tokenizer.chat([*system, {"role": "user", "content": text}])


def answer(llm, texts, args, params):
    """Runs prompts together and returns their outputs. The answer to a single prompt is streamed. Of
    several, each answer is printed whole under its prompt, in input order, as soon as all before it are.
    A prompt that is refused is reported in its place, and the others go on."""
    def submit(text):
        try:
            return llm.add_request(prompt_ids(llm, text, args), params)
        except (TinyVLLMError, TokenizerError) as error:
            return RequestOutput([], finish_reason="error", error=str(error))

    outputs = [submit(text) for text in texts]
    is_alone = len(texts) == 1
    finished = llm.finished(outputs, bar=not sys.stdout.isatty())
    for text, output in zip(texts, outputs):
        if output.error:
            prompt = "" if is_alone else f"{text[:60]!r}: "
            print(f"tinyvllm: {prompt}{as_flags(output.error)}", file=sys.stderr)
        elif is_alone:
            for _ in llm.run(outputs):
                print(output.delta, end="", flush=True)
            print(flush=True)
        else:
            while not output.finish_reason:
                next(finished)
            print(f"> {text}\n{output.text}\n", flush=True)
    return outputs


def statistics(llm, outputs):
    """One line: what came in, what went out, how fast."""
    done = [output for output in outputs if not output.error]
    num_prompt = sum(len(output.prompt_token_ids) for output in done)
    num_new = sum(len(output.token_ids) for output in done)
    num_cached = sum(output.num_cached_tokens for output in done)
    seconds = max(output.finish_time for output in done) - min(output.arrival_time for output in done)
    first = np.median([output.first_token_time - output.arrival_time for output in done])
    cached = f" ({num_cached} cached)" if num_cached else ""
    median = "median " if len(done) > 1 else ""
    line = (f"{num_prompt} prompt tokens{cached}, {num_new} new tokens, {median}time to first token "
            f"{first:.3f} s, {num_new / seconds:.1f} tokens/s")
    stats = llm.engine.stats
    peak = llm.device.memory_bandwidth
    if peak and stats.decode_seconds:
        rate = stats.decode_bytes / stats.decode_seconds
        line += f", decode read {rate / 1e9:.0f} GB/s ({rate / peak:.0%} of the memory's {peak / 1e9:.0f})"
    return f"{line} | {llm.device.name}"


def main(argv=None):
    """Answers the prompts of the command line. Returns the exit code."""
    args = parse_arguments(argv)
    params = SamplingParams(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
                            max_tokens=args.max_tokens)
    texts = []
    for prompt in args.prompts:
        if prompt == "-":
            texts += [line for line in sys.stdin.read().splitlines() if line.strip()]
        else:
            texts.append(prompt)
    if not texts:
        raise TinyVLLMError("there is no prompt: expected at least one line of text on stdin")
    llm = open_llm(EngineArgs.from_namespace(args))
    if args.system and not args.raw and not llm.tokenizer.has_chat_template:
        raise TinyVLLMError("--system needs a chat format that is known, and this model has none: use --raw "
                            "and write the system prompt into the prompt")
    has_view = args.watch or args.trace or args.stats
    with views.looking_inside(llm, args) if has_view else contextlib.nullcontext():
        outputs = answer(llm, texts, args, params)
    if not all(output.error for output in outputs):
        print(f"tiny-vLLM: {statistics(llm, outputs)}", file=sys.stderr)
    return 2 if any(output.error for output in outputs) else 0


def as_flags(message):
    """An error's text with options as a command line spells them: max_model_len becomes --max-model-len."""
    names = [f.name for f in (*fields(EngineArgs), *fields(SamplingParams))]
    long_names = "|".join(name for name in names if "_" in name)
    all_names = "|".join(names)
    return re.sub(rf"\b(?:{long_names})\b|^(?:{all_names})(?=:)",
                  lambda name: "--" + name[0].replace("_", "-"), message)


def run_program(main, argv=None):
    """Runs main(argv) as a program and exits: with main's exit code, 2 for a user's mistake (one line on
    stderr), 130 for Ctrl-C."""
    # Characters that stdout's encoding lacks are printed as "?". Bytes of stdin that are no text are kept,
    # for the tokenizer to refuse that prompt.
    for stream, errors in (sys.stdout, "replace"), (sys.stdin, "surrogateescape"):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    try:
        sys.exit(main(argv))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except MemoryError as error:
        print(f"tinyvllm: out of memory ({first_line(error)}): lower --gpu-memory-utilization or "
              "--max-model-len", file=sys.stderr)
    except BrokenPipeError:                     # whoever read our output has seen enough: | head
        discard_stdout()
        sys.exit(0)
    except OSError as error:                    # the disk is full, the cache folder is not ours, ...
        print(f"tinyvllm: {error}", file=sys.stderr)
        discard_stdout()
    except (TinyVLLMError, TokenizerError) as error:
        print(f"tinyvllm: {as_flags(str(error))}", file=sys.stderr)
    sys.exit(2)


def discard_stdout():
    """Leaves nothing for Python to flush at exit, which would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_program(main)
