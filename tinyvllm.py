#!/usr/bin/env python3
"""tiny-vLLM: an LLM inference engine that one person can read. Top to bottom, this file is a server's inner life.

    python tinyvllm.py "What is a KV cache?"                        from tinyvllm import LLM, SamplingParams

The life of a request:
  1. A prompt becomes token ids (tokenizer.py) and, as a Sequence, waits in the scheduler's queue.
  2. At every step the scheduler picks the tokens to compute: one for each sequence that is already answering (decode), and
     pieces of the prompts of new ones (prefill). A sequence joins when there are pages for its keys and values.
  3. The chosen tokens of all sequences are laid one after the other: a ragged batch of T tokens. Where each token stands
     in its text, and in which slot of the paged KV cache its key and value go, is data beside it.
  4. The forward pass takes the batch through the model's layers. Attention finds each sequence's earlier keys and values
     through its block table.
  5. For each sequence whose last token was in the batch, the sampler picks the next one from the logits.
  6. It is appended and its text streamed; a sequence that is done frees its pages, which lets the next one in.
When the pages run out, the youngest sequence gives its own back and is computed again later.

Shapes: T tokens of a step, S sequences of a step, R rows to sample (sequences that get a token), L layers, D hidden size,
H query heads, K key/value heads, h head_dim, F ffn size, V vocabulary, N pages of the cache, B tokens a page (block_size).
Weights and activations are bfloat16. A matrix is stored as [out, in], so a product is x @ w.T.

Sections: Config and weights, Device, Pages, Sequences and scheduler, Forward pass, Memory, Engine, API, Command line.
"""
import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import math
import os
import re
import sys
import time
from array import array as int_array
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")       # NumPy's idle threads shall sleep, not spin: the simulator wants the cores
import ml_dtypes
import numpy as np

from tokenizer import StreamDecoder, Tokenizer, TokenizerError

__version__ = "0.1.0"
FOLDER = Path(__file__).resolve().parent        # kernels.cu, simulator.h and parrot/ lie beside this file
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class TinyVLLMError(Exception):
    """An error that the user can act on, in one line: what was expected, what came, what to do."""


def check(name, value, good, expected):
    """The value of an option or a field. Raises TinyVLLMError unless good(value), which may itself fail on a wrong type."""
    with contextlib.suppress(TypeError, AttributeError):
        if good(value):
            return value
    raise TinyVLLMError(f"{name} is {value!r:.60}, expected is {expected}")


def is_int(value, least=1, most=math.inf):
    """Whether it is a whole number from `least` to `most`."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and least <= value <= most


def cdiv(a, b):
    """a / b, rounded up: how many pages of b tokens hold a tokens, how many tiles of b queries hold a queries."""
    return -(-a // b)


# ======================================================================================================================
# Config and weights
#
# A model is a folder in the Hugging Face layout: config.json (its shape), *.safetensors (its weights, by name),
# generation_config.json (the tokens that end an answer). Reading the weights is where the architecture is written down:
# each tensor is taken by name with the shape it must have. q, k and v are multiplied by the same input, so their
# matrices are stacked into one, and so are gate and up: two large products a layer instead of five smaller ones. In front of each
# stands an RMSNorm, x / rms(x) * g. Its weight g goes into the matrix: (x * g) @ W.T is x @ (W * g).T. What is left of the norm, one
# number a token, is applied to the product's results, where these are used.
# ======================================================================================================================
HUB_MODEL = "meta-llama/Llama-3.2-1B-Instruct"


def find_model(name=None, load_format="auto"):
    """The folder of a model. name: a folder or a Hugging Face id. None: Llama-3.2-1B-Instruct if it was downloaded before, else
    Parrot, which comes with this project."""
    name = os.path.expanduser(name or "")
    if not name:
        folder = download(HUB_MODEL, local_files_only=True)
        if folder and (folder / "config.json").exists() and any(folder.glob("model*.safetensors")):
            return folder
        print(f"tiny-vLLM: using the bundled Parrot, which can only recite. For a real model: --model {HUB_MODEL} (2.5 GB; accept its "
              "license on huggingface.co and run `hf auth login` first)", file=sys.stderr)
        return FOLDER / "parrot"
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        shapes = f", or a shape: {', '.join(SHAPES)}" if load_format == "dummy" else ""
        raise TinyVLLMError(f"{name} is no folder and no Hugging Face id: expected is a folder with config.json, or an id "
                            f"like {HUB_MODEL}{shapes}")
    return download(name)


def download(repo, local_files_only=False):
    """The local folder of a Hugging Face model. local_files_only: None if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    advice = {GatedRepoError: f"accept its license at https://huggingface.co/{repo} and log in with `hf auth login`",
              RepositoryNotFoundError: "there is no such model, or it is private: check the id, and `hf auth login`"}
    try:
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*.jinja", "model*.safetensors"], local_files_only=local_files_only))
    except Exception as error:      # the hub, its HTTP client and the disk have many kinds
        if local_files_only:
            return None
        what = advice.get(type(error), "check the network, or give the folder of a model that is already here")
        raise TinyVLLMError(f"cannot download {repo} ({first_line(error):.120}): {what}") from None


SUPPORTED = {                           # fields of config.json, with the values that this engine computes; None: not there
    "architectures": (["LlamaForCausalLM"], ["MistralForCausalLM"]), "hidden_act": ("silu", None), "rope_type": ("llama3", "default", None),
    "attention_bias": (False, None), "mlp_bias": (False, None), "sliding_window": (None,), "quantization_config": (None,),
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
    rope_scaling: dict | None           # Llama 3's, else None
    tie_word_embeddings: bool           # the head is the embedding table
    eos_token_ids: frozenset            # any of them ends an answer

    @property
    def qkv_size(self):
        """Columns of qkv: a token's queries, keys and values."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @classmethod
    def from_folder(cls, folder):
        """Reads config.json and generation_config.json; says what is not supported rather than computing something else."""
        file, generation = folder / "config.json", folder / "generation_config.json"
        c = read_json(file)
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}              # the new and the old way to write it
        c |= check(f"{file}: rope_scaling", rope, lambda rope: isinstance(rope, dict), "a dict")
        c["rope_type"] = c.get("rope_type") or c.get("type")                        # likewise
        for name, values in SUPPORTED.items():
            check(f"{file}: {name}", c.get(name), lambda value: value in values, " or ".join(map(str, values)))

        def number(name, kind=int):
            """A field that must be a number above 0."""
            expected = "a whole number above 0" if kind is int else "a number above 0"
            return check(f"{file}: {name}", c.get(name), lambda n: type(n) in (int, kind) and 0 < n < math.inf, expected)

        heads = number("num_attention_heads")
        defaults = {"num_key_value_heads": heads, "head_dim": number("hidden_size") // heads, "rope_theta": 10000.0}
        c = defaults | {name: value for name, value in c.items() if value is not None}
        scaling, eos = None, c.get("eos_token_id")
        if c.get("rope_type") == "llama3":
            scaling = {name: number(name, float) for name in (
                "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
            check(f"{file}: low_freq_factor", scaling["low_freq_factor"], lambda low: low < scaling["high_freq_factor"],
                  f"less than high_freq_factor, {scaling['high_freq_factor']}")
        if generation.exists():
            eos = read_json(generation).get("eos_token_id", eos)
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        check(f"{folder}: eos_token_id", eos, lambda ids: all(is_int(i, 0) for i in ids), "a token id or a list of them")
        config = cls(**{f.name: number(f.name, f.type) for f in fields(cls) if f.type in (int, float)}, rope_scaling=scaling,
                     tie_word_embeddings=bool(c.get("tie_word_embeddings")), eos_token_ids=frozenset(eos))

        kv_heads = config.num_key_value_heads                                       # from here on: what kernels.cu is written for
        check(f"{file}: num_attention_heads", heads, lambda n: n in range(kv_heads, 16 * kv_heads + 1, kv_heads),
              f"1 to 16 for each of num_key_value_heads, {kv_heads}")
        check(f"{file}: head_dim", config.head_dim, lambda n: n in range(32, 257, 16), "32 to 256 in steps of 16")
        for name in "hidden_size", "intermediate_size":
            check(f"{file}: {name}", c[name], lambda n: n % 8 == 0, "a multiple of 8")
        return config


SHAPES = {                              # for --load-format dummy: models that need no download
    name: ModelConfig(D, F, L, H, 8, h, 128256, 131072, 1e-5, 500000.0, {
        "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        tied, frozenset([128001, 128008, 128009]))
    for name, D, F, L, H, h, factor, tied in [("llama-3.2-1b", 2048, 8192, 16, 32, 64, 32.0, True),
                                              ("llama-3.2-3b", 3072, 8192, 28, 24, 128, 32.0, True),
                                              ("llama-3.1-8b", 4096, 14336, 32, 32, 128, 8.0, False)]}


def read_json(path):
    """The dict in a JSON file."""
    try:
        return check(path, json.loads(path.read_text("utf-8")), lambda value: isinstance(value, dict), "a JSON object: download it again")
    except FileNotFoundError:
        raise TinyVLLMError(f"no {path.name} in {path.parent}: a model folder has config.json, tokenizer.json and *.safetensors") from None
    except (OSError, ValueError) as error:
        raise TinyVLLMError(f"cannot read {path} ({error}): expected is valid JSON, in a file that you may read") from None


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights, on the device."""
    qkv: object                         # [(H + 2K) h, D], times the weight of the norm before it
    o: object                           # [D, H h]
    gate_up: object                     # [2F, D], likewise
    down: object                        # [D, F]


@dataclass(frozen=True)
class Weights:
    """The model's weights, on the device. Nothing changes them."""
    embed: object                       # [V, D]
    layers: list
    norm: object                        # [D]
    head: object                        # [V, D]; the very array `embed` if they are tied


class Checkpoint:
    """The safetensors files of a folder: one, or shards that model.safetensors.index.json lists.

    Such a file is 8 bytes that say how long the header is; the header, JSON: {name: {"dtype", "shape", "data_offsets": [from, to]}}; and the
    numbers. Files are mapped, not read: the kernel copies a tensor from its page cache when it goes to the device.
    """
    DTYPES = {"BF16": BFLOAT16, "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}

    def __init__(self, folder):
        self.folder, index = folder, folder / "model.safetensors.index.json"
        weight_map = read_json(index).get("weight_map") if index.exists() else {"every tensor": "model.safetensors"}
        check(f"{index}: weight_map", weight_map, lambda m: all(isinstance(name, str) for name in m.values()), "a dict {tensor: file}")
        self.tensors = {}                                           # name -> (dtype's name, shape, array on the file)
        for name in sorted(set(weight_map.values())):
            try:
                self.open(folder / name)
            except FileNotFoundError:
                raise TinyVLLMError(f"there is no {name} in {folder}: download the model's *.safetensors") from None
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise TinyVLLMError(f"{folder / name} is no valid safetensors file ({error}): download it again") from None

    def open(self, path):
        """Maps a file and finds its tensors."""
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        for name, tensor in json.loads(data[8:start].tobytes()).items():
            if name != "__metadata__":
                dtype, shape, (begin, end) = tensor["dtype"], tuple(tensor["shape"]), tensor["data_offsets"]
                array = data[start + begin:start + end]
                self.tensors[name] = dtype, shape, array.view(self.DTYPES[dtype]).reshape(shape) if dtype in self.DTYPES else array

    def take(self, name, *shape):
        """The tensor, of exactly this shape, as it lies in the file."""
        if name not in self.tensors:
            raise TinyVLLMError(f"{self.folder}: the weights have no tensor {name}: are they of another model than config.json?")
        dtype, its_shape, array = self.tensors.pop(name)
        check(f"{self.folder}: the shape of {name}", its_shape, lambda its: its == shape, f"{shape}, by config.json")
        check(f"{self.folder}: the dtype of {name}", dtype, lambda dtype: dtype in self.DTYPES, ", ".join(self.DTYPES))
        return array


class DummyCheckpoint(Checkpoint):
    """Random weights instead of a checkpoint's, made on the device, the same each time: normal, as wide as a trained model's; norms 1."""

    def __init__(self, device):
        self.xp, self.random, self.tensors = device.xp, device.xp.random.default_rng(0), {}

    def take(self, name, *shape):
        if len(shape) == 1:
            return self.xp.ones(shape, BFLOAT16)
        return (0.02 * self.random.standard_normal(shape, np.float32)).astype(BFLOAT16)


def load_weights(checkpoint, config, device):
    """The model's weights on the device, bfloat16."""
    c = config
    D, F, V, h = c.hidden_size, c.intermediate_size, c.vocab_size, c.head_dim
    q_rows, kv_rows = c.num_attention_heads * h, c.num_key_value_heads * h

    def take(name, *shape):
        return device.to_device(checkpoint.take(name + ".weight", *shape)).astype(BFLOAT16, copy=False)

    def stack(norm, *parts):
        """One matrix of several, below one another, times the weight of the norm before it; each goes to the device by itself."""
        g = take(norm, D).astype(np.float32)
        return device.xp.concatenate([(take(*part).astype(np.float32) * g).astype(BFLOAT16) for part in parts])

    def layer(i):
        p = f"model.layers.{i}"
        return LayerWeights(
            qkv=stack(f"{p}.input_layernorm", (f"{p}.self_attn.q_proj", q_rows, D), (f"{p}.self_attn.k_proj", kv_rows, D),
                      (f"{p}.self_attn.v_proj", kv_rows, D)),
            o=take(f"{p}.self_attn.o_proj", D, q_rows),
            gate_up=stack(f"{p}.post_attention_layernorm", (f"{p}.mlp.gate_proj", F, D), (f"{p}.mlp.up_proj", F, D)),
            down=take(f"{p}.mlp.down_proj", D, F))

    embed = take("model.embed_tokens", V, D)
    weights = Weights(embed, [layer(i) for i in range(c.num_hidden_layers)], take("model.norm", D),
                      embed if c.tie_word_embeddings else take("lm_head", V, D))
    # A tensor that is left, such as a bias: without it the answers would be wrong.
    left = [name for name in checkpoint.tensors if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise TinyVLLMError(f"{checkpoint.folder}: the weights have {len(left)} tensors that no Llama of this config.json has, {left[0]} for "
                            "one: is it another architecture, or quantized?")
    return weights


# ======================================================================================================================
# Device
#
# The engine runs on an NVIDIA GPU, or on a CPU that simulates one (simulator.py). Both are classes
# with the same members, so that nothing below this section asks which of them it has:
#
#   device.xp                          cupy or numpy: the same functions on the device's arrays
#   device.compile({"HEAD_DIM": 64}, path)  kernels.cu, for one model: its sizes become constants
#   kernels.rms_norm((T,), out, ...)   a launch, T blocks; block size and argument types are
#                                      read from kernels.cu itself, so they stand in one place
#   device.linear(x, w)                the one place that multiplies matrices
#   device.fetch(array)                a copy to the host that somebody will wait for, later
#   device.record(function)            the kernels that function() starts, as one thing to start: a CUDA graph
# ======================================================================================================================
KERNEL_TYPES = {"bf16": BFLOAT16, "float": np.dtype(np.float32), "int": np.dtype(np.int32),
                "long long": np.dtype(np.int64), "u64": np.dtype(np.uint64)}
MAX_GRID = 65535                        # blocks in y and in z


def checked_launch(name, threads, parameters, array_type, launch):
    """kernels.NAME. threads: of a block; parameters: a list of (name, dtype, is_pointer); launch(grid, block, values) starts the kernel."""
    def check(arg, parameter, dtype, is_pointer):
        """The argument, ready for launch. A kernel sees bare addresses: nothing after this would notice a wrong type."""
        if not is_pointer:
            return dtype.type(arg)
        if arg is None:
            return np.uint64(0)
        assert isinstance(arg, array_type), f"{name}: {parameter} must be an array of this device, got {type(arg)}"
        assert arg.dtype == dtype and arg.flags.c_contiguous, f"{name}: {parameter} must be contiguous {dtype}, got {arg.dtype}, {arg.strides}"
        return arg

    def start(grid, *args):
        """grid: blocks in x, y and z (1 to 3 ints). args: arrays (None is a null pointer) and numbers."""
        assert len(args) == len(parameters), f"{name} takes {len(parameters)} arguments, got {len(args)}"
        # CuPy would make one block of none.
        assert min(grid) >= 1 and max(grid[1:], default=1) <= MAX_GRID, f"{name}: grid {grid} is beyond 1 to {MAX_GRID}"
        launch((*grid, 1, 1)[:3], (threads, 1, 1), [check(arg, *parameter) for arg, parameter in zip(args, parameters)])
    return start


class Kernels:
    """What compile() returns: kernels.NAME(grid, *args), and the file's constants, such as kernels.ATTENTION_ROWS."""

    def __init__(self, source, array_type, get_launch):
        """get_launch: name -> a function (grid, block, values) that starts this kernel."""
        for name, number in re.findall(r"^constexpr int (\w+) = (\d+);", source, re.M):
            setattr(self, name, int(number))
        for threads, name, parameters in kernel_declarations(source):
            threads = int(threads) if threads.isdigit() else getattr(self, threads)
            parameters = [parse_parameter(p) for p in parameters.split(",")]
            setattr(self, name, checked_launch(name, threads, parameters, array_type, get_launch(name)))


def kernel_declarations(source):
    """(threads, name, parameters) of each `extern "C" __global__` kernel, as text."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.S)
    return re.findall(r'extern "C" __global__ __launch_bounds__\((\w+)[^)]*\)\s*void (\w+)\(([^)]*)\)', code)


def parse_parameter(text):
    """"const bf16* x" -> ("x", bfloat16, True)"""
    text = text.replace("unsigned long long", "u64").replace("__nv_bfloat16", "bf16").replace("__restrict__", "")
    ctype, pointer, name = re.fullmatch(r"\s*(?:const )?([\w ]+?)\s*(\*?)\s*(\w+)\s*", text).groups()
    return name, KERNEL_TYPES[ctype], bool(pointer)


CUDA_BF16, CUBLAS_COMPUTE_32F = 14, 68          # of cuBLAS's enumerations
ONE, ZERO = ctypes.byref(ctypes.c_float(1)), ctypes.byref(ctypes.c_float(0))


def open_cublas(cupy):
    """(cublasGemmEx, cublasSetStream, a handle) from the cuBLAS that CuPy has loaded. CuPy's own matmul does the same product,
    but refuses to be recorded in a CUDA graph."""
    cupy.cuda.device.get_cublas_handle()                            # loads the library
    path = next(line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps") if "libcublas.so" in line)
    library, handle = ctypes.CDLL(path), ctypes.c_void_p()
    status = library.cublasCreate_v2(ctypes.byref(handle))
    assert status == 0, f"cuBLAS answers {status} to cublasCreate"
    number, pointer = ctypes.c_int, ctypes.c_void_p
    library.cublasSetStream_v2.argtypes = [pointer, pointer]
    library.cublasGemmEx.argtypes = [pointer, *[number] * 5, pointer, pointer, number, number, pointer, number, number, pointer,
                                     pointer, number, number, number, number]
    return library.cublasGemmEx, library.cublasSetStream_v2, handle


class CudaDevice:
    """An NVIDIA GPU, through CuPy."""
    address = staticmethod(lambda array: array.data.ptr)            # for kernels that find arrays in an array

    def __init__(self):
        import cupy
        self.xp = cupy
        runtime = cupy.cuda.runtime
        number = runtime.getDevice()
        properties = runtime.getDeviceProperties(number)
        self.name, capability = properties["name"].decode(), (properties["major"], properties["minor"])
        if capability < (8, 0):
            raise TinyVLLMError(f"{self.name} has compute capability {capability[0]}.{capability[1]}, needed is 8.0 or newer, for "
                                "bfloat16 (RTX 30 series, A100, ...): use --device cpu or another GPU")
        self.gemm, self.set_stream, self.cublas = open_cublas(cupy)
        self.graph_pool, self.graph_stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream()
        self.multiprocessors = properties["multiProcessorCount"]
        # decode.cu wants bulk copies, and 227 KB of shared memory for a block. (Attribute 97: the most that it may have.)
        self.runs_decode = capability >= (9, 0) and runtime.deviceGetAttribute(97, number) >= 227 << 10
        # "a": also what later generations may lack again: wgmma on 9.0, and registers that go from warp to warp.
        self.options = [f"-arch=sm_{capability[0]}{capability[1]}a"] * self.runs_decode
        clock, width = runtime.deviceGetAttribute(36, number), runtime.deviceGetAttribute(37, number)       # in kHz, in bits; two moves a clock
        self.memory_bandwidth = 2e3 * clock * width / 8 or None     # bytes/s at best; some drivers say 0

    def empty(self, shape, dtype=BFLOAT16):
        return self.xp.empty(shape, dtype)

    def to_device(self, array):
        return self.xp.asarray(array)

    def memory(self):
        """Bytes: (free, total). CuPy's pool keeps what was freed; it counts as free."""
        free, total = self.xp.cuda.runtime.memGetInfo()
        return free + self.xp.get_default_memory_pool().free_bytes(), total

    def pinned(self, num_bytes):
        """Host memory that the GPU can read and write by itself, uint8."""
        return np.frombuffer(self.xp.cuda.alloc_pinned_memory(num_bytes), np.uint8, num_bytes)

    def copy(self, target, source):
        """Starts a copy of pinned memory to an array of the device; source must stay as it is until it is done."""
        target.data.copy_from_host_async(source.ctypes.data, source.nbytes)

    def fetch(self, array):
        """Starts a copy to the host; returns a function that waits for it and returns the NumPy array."""
        host, event = self.pinned(array.nbytes), self.xp.cuda.Event(disable_timing=True)
        array.data.copy_to_host_async(host.ctypes.data, array.nbytes)
        event.record()

        def wait():
            event.synchronize()
            return host.view(array.dtype).reshape(array.shape)
        return wait

    def linear(self, x, w, add_to=None):
        """x [T, in] @ w [out, in] transposed -> [T, out]; bf16, accumulated in float32. add_to: added to what is there already."""
        # cuBLAS counts columns first: what is x [T, in] to us is in x T to it, and it gives out x T = w' x, our [T, out].
        (T, columns), rows = x.shape, len(w)
        out = self.empty((T, rows)) if add_to is None else add_to
        self.set_stream(self.cublas, self.xp.cuda.get_current_stream().ptr)
        status = self.gemm(self.cublas, 1, 0, rows, T, columns, ONE, w.data.ptr, CUDA_BF16, columns, x.data.ptr, CUDA_BF16, columns,
                           ZERO if add_to is None else ONE, out.data.ptr, CUDA_BF16, rows, CUBLAS_COMPUTE_32F, -1)
        assert status == 0, f"cuBLAS answers {status} to a product of {x.shape} and {w.shape}"
        return out

    def record(self, function):
        """What function() returns, and a function that does on the GPU the same again, for the price of one launch, and returns
        what that gives, in the same arrays each time.

        Starting a kernel costs the CPU some microseconds, and a decode step has more than a hundred. A CUDA graph starts them
        all at once, with the arguments they were recorded with: what changes from step to step must be data at fixed addresses.
        """
        self.xp.cuda.get_current_stream().synchronize()     # another stream records: what this one was given must be there
        # What a graph writes to must be nobody else's as long as it may run: hence a pool that lives as long as the device.
        # Graphs may share it: they run one after the other, and their results stay taken.
        with self.xp.cuda.using_allocator(self.graph_pool.malloc), self.graph_stream as stream:
            first = function()                      # for real: now all is compiled, loaded and allocated
            stream.begin_capture()
            result = function()
            graph = stream.end_capture()
            stream.synchronize()

        def run():
            graph.launch(self.xp.cuda.get_current_stream())
            return result
        return first, run

    def compile(self, defines, *paths):
        """NVRTC compiles for this very GPU; CuPy caches the result in ~/.cupy/kernel_cache."""
        source = "".join(path.read_text() for path in (FOLDER / "ptx.h", *paths))
        options = ("-std=c++17", *self.options, *(f"-D{name}={value}" for name, value in defines.items()))
        module = self.xp.RawModule(code=source, options=options, backend="nvrtc")       # compiles at the first get_function
        def get_launch(name):                               # shared memory beyond 48 KB must be asked for, at each launch as well
            function, size = module.get_function(name), f"{name}_shared_bytes"
            num_bytes = int(self.xp.ndarray((), np.int32, module.get_global(size))) if size in source else 0
            function.max_dynamic_shared_size_bytes = num_bytes
            return lambda grid, block, values: function(grid, block, values, shared_mem=num_bytes)
        try:
            return Kernels(source, self.xp.ndarray, get_launch)
        except self.xp.cuda.compiler.CompileException as error:
            raise TinyVLLMError(f"kernels do not compile for this model: {first_line(error, 'error')}") from None


def first_line(error, word=""):
    """The first line of an error's text that has this word in it, else the first of all; the error's type if it has no text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if word in line), lines[0]).strip()


def open_device(name="auto"):
    """name: "cuda", "cpu", or "auto": a GPU if there is one."""
    if name != "cpu":
        try:
            import cupy
            cupy.cuda.runtime.getDeviceCount()      # raises where there is no driver or no GPU
        except Exception as error:                  # CuPy has many kinds, an import that half works included
            problem = f"no NVIDIA GPU can be used ({first_line(error)})"
            if name == "cuda":
                raise TinyVLLMError(f"{problem}: check nvidia-smi and `pip install cupy-cuda12x`, or use --device cpu") from None
            if not isinstance(error, ModuleNotFoundError):
                print(f"tiny-vLLM: CuPy is here, but {problem}", file=sys.stderr)
        else:
            return CudaDevice()
    from simulator import CpuDevice                 # here, since it imports this module
    return CpuDevice()


# ======================================================================================================================
# Pages
#
# The keys and values of all sequences live in one pool of N pages (vLLM: blocks) of B tokens each. A sequence holds a list
# of pages, its block table; token number p of it has slot block_table[p // B] * B + p % B. Pages are taken as the text
# grows and may lie anywhere, so the only waste is the unfilled part of each sequence's last page.
#
# Prefix caching: a full page never changes, and depends on nothing but its tokens and those before it. So whoever has the same
# beginning (a system prompt, the turns of a chat so far) can use it as well. Pages count their users; one that has none
# stays as it is until an allocation needs it, the least recently used first. A page is found by its tokens and the chain of
# pages before it, of which each distinct one has a number: (number of the page before, tokens) -> page.
# This is bookkeeping on the CPU: the bytes themselves are written and read by kernels.
# ======================================================================================================================
class BlockAllocator:
    """Hands out pages by number, 0 to num_blocks - 1."""

    def __init__(self, num_blocks, block_size, prefix_caching=True):
        self.num_blocks, self.block_size, self.prefix_caching = num_blocks, block_size, prefix_caching
        self.free = OrderedDict.fromkeys(range(num_blocks))         # pages that nobody uses; the first goes first
        self.ref_counts = [0] * num_blocks
        self.cached = {}                                            # (chain of the page before, tokens) -> page
        self.chains = {}                                            # page -> (its key in cached, its chain)
        self.new_chain = itertools.count(1).__next__                # 0: a text's beginning

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
        """A user gives pages back. The last ones of a text will be evicted before its first: without these they are of no use."""
        for block in reversed(blocks):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free[block] = None
                if block not in self.chains:
                    self.free.move_to_end(block, last=False)        # it holds nothing that anyone could want

    def register(self, block, before, tokens):
        """A page is full: from now on it can be found. before: the page before it, or None; tokens: the tuple of its tokens."""
        key = self.chains[before][1] if before is not None else 0, tokens
        twin = self.cached.setdefault(key, block)                   # another request may have filled one with the same
        self.chains[block] = key, self.chains[twin][1] if twin != block else self.new_chain()

    def find(self, token_ids):
        """The full pages that are there already, from the beginning on, without the last token's: it must be computed."""
        blocks, chain, size = [], 0, self.block_size
        for start in range(0, len(token_ids) - size, size):
            block = self.cached.get((chain, tuple(token_ids[start:start + size])))
            if block is None:
                break
            blocks.append(block)
            chain = self.chains[block][1]
        return blocks

    def share(self, blocks):
        """One more user for pages that find() found."""
        for block in blocks:
            self.ref_counts[block] += 1
            self.free.pop(block, None)

    def check_integrity(self, block_tables):
        """A page has as many users as block tables name it, is free if there are none, and what is cached is found."""
        users = Counter(block for table in block_tables for block in table)
        assert self.ref_counts == [users[block] for block in range(self.num_blocks)], f"{self.ref_counts} users, but {users} are known"
        assert set(self.free) == {block for block in range(self.num_blocks) if not users[block]}, f"{list(self.free)} are free, but used are {users}"
        assert all(self.chains[block][0] == key for key, block in self.cached.items())


# ======================================================================================================================
# Sequences and scheduler
#
# Continuous batching: which tokens run is decided anew at every step. The scheduler knows tokens and pages, and no arrays;
# it can be tested without a model.
#   waiting   has no pages yet, in order of arrival; a preempted sequence goes back to the front
#   running   has pages for the tokens it had on admission, and gets one more whenever decode has filled the last;
#             in order of arrival
# A sequence's tokens are its prompt and its answer so far. The first num_computed_tokens of them have their keys and values
# in the cache. What remains to be computed is 1 in decode, and more after arrival or preemption: prefill and decode differ
# in nothing else.
#
#   token_ids    [ prompt .................... | answer so far ]
#                [ computed: in the cache ...... | remaining    ]   the next token can be sampled once nothing remains
# ======================================================================================================================
@dataclass
class SamplingParams:
    """How to choose tokens and when to stop, under vLLM's names. Raises TinyVLLMError for values that make no sense."""
    temperature: float = 0.0            # 0: greedy
    top_k: int = 0                      # keep the k most probable tokens; 0 or -1: all
    top_p: float = 1.0                  # of these, keep the most probable that together reach this
    seed: int | None = None             # None: another one for every request
    max_tokens: int | None = 256        # None: as many as the context holds
    ignore_eos: bool = False
    stop_token_ids: tuple = ()          # end the answer, beside the model's own eos tokens
    logprobs: int | None = None         # report the log-probability of each token, and of so many best ones

    def __post_init__(self):
        def want(name, good, expected):
            check(name, getattr(self, name), good, expected)
        want("temperature", lambda t: 0 <= t <= np.finfo(np.float32).max, "0 (greedy) or more")
        want("top_k", lambda k: is_int(k, -1), "a whole number of 1 or more, or 0 for all")
        want("top_p", lambda p: 0 < p <= 1, "more than 0 and at most 1")
        want("seed", lambda seed: seed is None or is_int(seed, 0, 2**64 - 1), "a whole number from 0 to 2^64 - 1")
        want("max_tokens", lambda n: n is None or is_int(n), "a whole number of 1 or more")
        want("stop_token_ids", lambda ids: not isinstance(ids, str) and all(is_int(i, 0) for i in ids), "a list of token ids")
        want("logprobs", lambda n: n is None or is_int(n, 0), "a whole number of 0 or more")


@dataclass
class RequestOutput:
    """A request's answer. It grows while the request runs, and is final when finish_reason is set."""
    prompt_token_ids: list
    text: str = ""
    token_ids: list = field(default_factory=list)
    finish_reason: str | None = None    # "stop": an eos or stop token (the last of token_ids); "length": a limit; "error"; "abort": given up
    error: str | None = None            # why the request was refused
    logprobs: list | None = None        # for each token a dict {token id: log-probability}: the token's and the best ones'
    delta: str = ""                     # the text that is new since LLM.run or .stream last gave this output
    num_cached_tokens: int = 0          # whose pages were there on admission, and again after each preemption
    num_preemptions: int = 0
    arrival_time: float = 0.0           # seconds of time.perf_counter()
    first_token_time: float = 0.0
    finish_time: float = 0.0
    account: dict | None = None         # where the time in between went, in seconds, if a views.Recorder has looked on


class Sequence:
    """A request inside the engine: its tokens, its pages, how far it is computed."""

    def __init__(self, params, output, decoder, max_len):
        """max_len: tokens of prompt and answer at which it ends, whatever comes."""
        self.params, self.output, self.decoder, self.max_len = params, output, decoder, max_len
        self.token_ids = int_array("i", output.prompt_token_ids)
        self.num_computed_tokens = 0
        self.block_table = int_array("i")
        self.num_registered_blocks = 0      # pages of it that others can find
        self.seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little")

    @property
    def remaining(self):
        """Tokens that are not yet computed."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_full(self):
        """Whether it has its last token, and only waits to learn which."""
        return len(self.token_ids) == self.max_len


class Scheduler:
    """Decides which tokens run in the next step, and gives them their pages."""

    def __init__(self, allocator, max_num_batched_tokens, max_num_seqs, chunked_prefill=True, static_batching=False):
        """max_num_batched_tokens: the token budget of a step. max_num_seqs: how many sequences may run at once. Without chunked_prefill a
        prompt runs in one step. static_batching: a batch is admitted together, and the next one when all of it is done."""
        self.allocator, self.max_num_batched_tokens, self.max_num_seqs = allocator, max_num_batched_tokens, min(max_num_seqs, max_num_batched_tokens)
        self.chunked_prefill, self.static_batching = chunked_prefill, static_batching
        self.waiting, self.running = deque(), []

    def schedule(self):
        """[(sequence, number of its tokens to compute)]: decodes first, then prefill as far as the budget goes."""
        scheduled, prefills, budget = [], [], self.max_num_batched_tokens
        # 1. Those that run, the oldest first: decodes, and prompts that are under way, whose pages are theirs since admission. To find a
        #    page for a decode, the youngest are preempted: those that this loop has not come to yet.
        #    The budget is enough for all decodes: admission, below, never lets more sequences run than it has tokens.
        for sequence in list(self.running):
            if not sequence.block_table:
                break                                                   # it has just been preempted, and so have all after it
            if sequence.remaining > 1:
                prefills.append(sequence)
            elif not sequence.is_full and self.grow(sequence):
                scheduled.append((sequence, 1))
                budget -= 1
        # 2. New ones, in order of arrival, while there are pages for all the tokens they have, and one to spare for each
        #    sequence that runs: else these would soon preempt the newcomer, and its prefill would be for nothing.
        planned, is_idle = sum(s.remaining for s in prefills), not self.running
        while (self.waiting and not self.waiting[0].is_full and len(self.running) < self.max_num_seqs
               and (is_idle if self.static_batching else planned < budget)):
            sequence = self.waiting[0]
            cached = self.allocator.find(sequence.token_ids)
            needed = cdiv(len(sequence.token_ids) + 1, self.allocator.block_size) - len(cached)     # + 1: the token that it will get
            free = len(self.allocator.free) - sum(block in self.allocator.free for block in cached)
            if needed + len(self.running) > free:
                break
            self.allocator.share(cached)
            sequence.block_table = int_array("i", cached + self.allocator.allocate(needed))
            sequence.num_registered_blocks = len(cached)
            sequence.num_computed_tokens = len(cached) * self.allocator.block_size
            sequence.output.num_cached_tokens += sequence.num_computed_tokens
            self.running.append(self.waiting.popleft())
            prefills.append(sequence)
            planned += sequence.remaining
        for sequence in prefills:
            chunk = min(sequence.remaining, budget)
            if chunk < sequence.remaining and not self.chunked_prefill:
                break                                                   # until there is a step in which it fits whole
            if chunk:
                scheduled.append((sequence, chunk))
                budget -= chunk
        return scheduled

    def grow(self, sequence):
        """A page for the next token if its pages are full. False if the sequence itself is the youngest and had to go."""
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
        """Takes a sequence's pages. It keeps its tokens; their keys and values will be computed again, or found if they are still there."""
        self.remove(sequence)
        sequence.num_computed_tokens = 0
        sequence.output.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def remove(self, sequence):
        """Forgets a sequence that is done or given up, running or waiting."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.register_full_blocks(sequence)
        self.allocator.release(sequence.block_table)
        sequence.block_table, sequence.num_registered_blocks = int_array("i"), 0

    def register_full_blocks(self, sequence):
        """Lets others find the pages that a sequence has filled. Not before the step that does is launched: who finds them runs later."""
        size, table = self.allocator.block_size, sequence.block_table
        while self.allocator.prefix_caching and sequence.num_registered_blocks < sequence.num_computed_tokens // size:
            number = sequence.num_registered_blocks
            tokens = tuple(sequence.token_ids[number * size:(number + 1) * size])
            if tokens[-1] < 0:              # a token that is not known yet: next time
                break
            self.allocator.register(table[number], table[number - 1] if number else None, tokens)
            sequence.num_registered_blocks += 1

    def check_integrity(self):
        """What always holds between two steps."""
        self.allocator.check_integrity([s.block_table for s in self.running])
        assert not any(s.block_table or s.num_computed_tokens for s in self.waiting)
        for s in self.running:
            assert s.num_computed_tokens <= len(s.block_table) * self.allocator.block_size and s.remaining >= 1
            assert s.num_registered_blocks <= s.num_computed_tokens // self.allocator.block_size


# ======================================================================================================================
# Forward pass
#
# One function for every step: it takes T tokens in a row and does not know which sequence brings a chunk of its prompt and
# which a single token. What the kernels need to know about that is data, in the Batch.
#
#   sequence 0 brings 5 tokens (a chunk that starts at position 16), sequence 1 brings 1 (decode), sequence 2 brings 3:
#   token_ids    a a a a a b c c c       T = 9
#   positions   16 17 18 19 20 41 0 1 2
#   cu_seqlens   0         5 6     9     where each sequence begins
#   context_lens 21 42 3                 tokens in the cache after this step
#   block_tables 7 2 | 5 3 9 | 4         the pages of each sequence; cu_blocks 0 2 5 6
#
# Steps in which every sequence decodes are run as CUDA graphs, since the CPU takes longer to start their kernels than the GPU to run
# them. There is one for each of a few batch sizes (the smallest: as one kernel, decode.cu), to which a batch is padded with rows that
# nobody reads (vLLM: cudagraph_capture_sizes; enforce_eager is without).
# ======================================================================================================================
GRAPH_SIZES = (1, 2, 4, 6, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256)


@dataclass
class Batch:
    """A step's tokens, and all that the kernels must know about them. The arrays are the host's or, after StepBuffer.upload,
    the device's. Those of 8 bytes an entry come first, so that all are aligned; that of unforeseeable size comes last."""
    sampled: list                       # R of the S sequences: those of which nothing remains after this step
    slot_mapping: np.ndarray            # [T] int64: where each token's key and value go; -1: nowhere
    seeds: np.ndarray                   # [R] uint64
    token_ids: np.ndarray               # [T] int32
    positions: np.ndarray               # [T] int32
    cu_seqlens: np.ndarray              # [S + 1] int32
    context_lens: np.ndarray            # [S] int32
    last_tokens: np.ndarray             # [R] int32: where among the T the last tokens of the sampled are
    lengths: np.ndarray                 # [R] int32: how many tokens they have, which is the new one's position
    temperatures: np.ndarray            # [R] float32
    top_ks: np.ndarray                  # [R] int32
    top_ps: np.ndarray                  # [R] float32
    tiles: np.ndarray                   # [2A] int32: the work of attention, see attention_tiles
    cu_blocks: np.ndarray               # [S + 1] int32
    block_tables: np.ndarray            # [pages of all S] int32: sequence s has those from cu_blocks[s] on

    @classmethod
    def build(cls, scheduled, block_size, group, tile_rows):
        """The batch for a list of (sequence, number of tokens). group, tile_rows: see attention_tiles."""
        ints, floats = np.int32, np.float32
        counts, starts = np.array([(count, s.num_computed_tokens) for s, count in scheduled], ints).T
        token_ids = np.frombuffer(b"".join([s.token_ids[s.num_computed_tokens:s.num_computed_tokens + count] for s, count in scheduled]), ints)
        cu_seqlens = np.cumsum([0, *counts], dtype=ints)
        positions = np.arange(len(token_ids), dtype=ints) + np.repeat(starts - cu_seqlens[:-1], counts)
        tables = [s.block_table for s, _ in scheduled]
        cu_blocks = np.cumsum([0, *map(len, tables)], dtype=ints)
        block_tables = np.frombuffer(b"".join(tables), ints)
        blocks = block_tables[np.repeat(cu_blocks[:-1], counts) + positions // block_size]         # the page of each token
        lengths = np.array([len(s.token_ids) for s, _ in scheduled], ints)
        rows = np.flatnonzero(starts + counts == lengths)                                           # those with nothing left
        sampled = [scheduled[row][0] for row in rows]
        params = [s.params for s in sampled]
        return cls(
            sampled=sampled, slot_mapping=blocks.astype(np.int64) * block_size + positions % block_size,
            seeds=np.array([s.seed for s in sampled], np.uint64), token_ids=token_ids, positions=positions,
            cu_seqlens=cu_seqlens, context_lens=starts + counts, last_tokens=cu_seqlens[1:][rows] - 1,
            lengths=lengths[rows], temperatures=np.array([p.temperature for p in params], floats),
            top_ks=np.array([min(p.top_k, 2**31 - 1) for p in params], ints), top_ps=np.array([p.top_p for p in params], floats),
            tiles=attention_tiles(counts, starts + counts, group, tile_rows), cu_blocks=cu_blocks, block_tables=block_tables)

    @property
    def is_decode(self):
        """Whether every sequence brings one token and gets one: T = S = R."""
        return len(self.token_ids) == len(self.context_lens) == len(self.sampled)

    def padded(self, size):
        """A batch of decodes with rows added, up to `size`: sequences of one token that write to no slot and see no key."""
        def fill(array, value=0):
            return np.concatenate([array, np.full(more, value, array.dtype)])
        more, rows = size - len(self.token_ids), np.arange(size + 1, dtype=np.int32)
        if more == 0:
            return self
        zeros = ("seeds", "token_ids", "positions", "context_lens", "lengths", "temperatures", "top_ks", "top_ps")
        tiles = np.concatenate([self.tiles, np.repeat(rows[size - more:-1], 2) * np.tile([1, 0], more).astype(np.int32)])
        return replace(self, slot_mapping=fill(self.slot_mapping, -1), cu_seqlens=rows, last_tokens=rows[:-1], tiles=tiles,
                       cu_blocks=fill(self.cu_blocks, self.cu_blocks[-1]), **{name: fill(getattr(self, name)) for name in zeros})


def attention_tiles(counts, context_lens, group, tile_rows):
    """[2A] int32: (sequence, first row) of each tile of at most tile_rows rows. A row is a query and one of the `group` heads that share a
    kv head. counts [S]: queries. The tiles that see the most keys come first, so that none of these is the last to begin."""
    tiles = cdiv(counts * group, tile_rows)
    sequences = np.repeat(np.arange(len(counts)), tiles)
    rows = (np.arange(len(sequences)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * tile_rows
    seen = (context_lens - counts)[sequences] + np.minimum(rows + tile_rows, (counts * group)[sequences]) // group
    return np.stack([sequences, rows], 1)[np.argsort(-seen, kind="stable")].astype(np.int32).ravel()


class StepBuffer:
    """What travels between host and device: a step's batch there, in one copy, and the sampled tokens back. Where an array of a batch
    arrives depends on T, S and R alone: a CUDA graph that was recorded for one batch finds the next of these sizes at the same addresses."""
    ARRAYS = [f.name for f in fields(Batch) if f.type is np.ndarray]

    def __init__(self, device, max_tokens, max_seqs, max_blocks):
        """max_blocks: entries of all block tables. Sequences share pages, so it may be more than there are."""
        # A token: slot 8, id 4, position 4, and up to a quarter of a tile (8). A sequence: seed 8, eight arrays of 4, of which two have
        # one entry more than S, and a tile that is not full.
        num_bytes = 18 * max_tokens + 48 * (max_seqs + 1) + 4 * max_blocks
        self.device, self.target = device, device.empty(num_bytes, np.uint8)
        self.sources = deque(device.pinned(num_bytes) for _ in range(2))    # two: the step before may still be copying from one
        self.sampled = device.empty((2, max_seqs), np.int32)                # of the latest step: tokens, bits of their log-probabilities

    def upload(self, batch):
        """The batch, with its arrays on the device."""
        self.sources.rotate()
        arrays, end = {}, 0
        for name in self.ARRAYS:
            array = getattr(batch, name)
            start, end = end, end + array.nbytes
            self.sources[0][start:end] = array.view(np.uint8)
            arrays[name] = self.target[start:end].view(array.dtype)
        self.device.copy(self.target[:end], self.sources[0][:end])
        return replace(batch, **arrays)


def rope_frequencies(config):
    """Radians that each of a head's h/2 pairs turns a position, float64 [h/2].

    RoPE (arXiv:2104.09864): pair i turns by theta^(-2i/h). Llama 3.1 stretched the context (arXiv:2407.21783): pairs that
    turn less than low_freq_factor times within the original context are slowed by `factor`, those that turn more than
    high_freq_factor times stay as they are, and between the two the factor is blended.
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

    def __init__(self, config, weights, device, num_blocks, block_size, max_model_len, step_buffer, enforce_eager):
        """max_model_len: positions that can occur. step_buffer: for its batches. enforce_eager: no CUDA graphs."""
        c = config
        self.config, self.weights, self.device, self.buffer = c, weights, device, step_buffer
        self.graph_sizes, self.graphs = () if enforce_eager else GRAPH_SIZES, {}       # size -> what device.record returned
        # decode.cu deals out columns in 512s, of a row, a half or a quarter, and rows in 8s; G heads are at most 8.
        whole = all(n % (512 << (n > 2048) + (n > 4096)) == 0 for n in (c.hidden_size, c.num_attention_heads * c.head_dim, c.intermediate_size))
        fits = (whole and device.runs_decode and c.hidden_size <= 4096 and c.num_hidden_layers <= 64 and c.head_dim in (64, 128)
                and c.vocab_size % 8 == 0 and c.num_attention_heads <= 8 * c.num_key_value_heads)
        self.kernels = device.compile({                                                 # with this model's sizes as constants
            "HIDDEN": c.hidden_size, "NUM_HEADS": c.num_attention_heads, "NUM_KV_HEADS": c.num_key_value_heads, "HEAD_DIM": c.head_dim,
            "FFN": c.intermediate_size, "VOCAB": c.vocab_size, "BLOCK_SIZE": block_size, "RMS_EPS": f"{c.rms_norm_eps:e}f"},
            FOLDER / "kernels.cu", *[FOLDER / "decode.cu"] * fits)
        # Sequences up to which decode() is used.
        self.decode_batch = min(self.kernels.DECODE_BATCH, self.kernels.DECODE_NUMBERS // c.intermediate_size) if fits else 0
        matrices = [w for layer in weights.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)] + [weights.head]
        self.addresses = device.to_device(np.array([device.address(w) for w in matrices], np.uint64))
        # For attention_tiles; how many rows a block of attention owns, see kernels.cu.
        self.tiling = c.num_attention_heads // c.num_key_value_heads, self.kernels.ATTENTION_ROWS * (2 if c.head_dim <= 128 else 1)
        # Keys are cache[l, 0], values cache[l, 1] of layer l. Within a page each head's tokens are consecutive.
        self.kv_cache = device.empty((c.num_hidden_layers, 2, num_blocks, c.num_key_value_heads, block_size, c.head_dim))
        angles = np.arange(max_model_len)[:, None] * rope_frequencies(c)
        self.cos_sin = device.to_device(np.concatenate([np.cos(angles), np.sin(angles)], 1, dtype=np.float32))    # [max_model_len, h]

    def launch(self, batch):
        """Starts a step and does not wait for it. Returns the logits [R, V], good until the next step (a graph overwrites its own), and
        a function that waits and returns the sampled sequences' next tokens and these tokens' log-probabilities, int32 and
        float32. All may be longer than R, by padding."""
        size = next((size for size in self.graph_sizes if size >= len(batch.token_ids)), None) if batch.is_decode else None
        b = self.buffer.upload(batch.padded(size) if size else batch)
        if size in self.graphs:
            logits = self.graphs[size]()
        elif size:
            logits, self.graphs[size] = self.device.record(lambda: (self.decode if size <= self.decode_batch else self.forward)(b))
        else:
            logits = self.forward(b)
        wait = self.device.fetch(self.buffer.sampled)

        def get_tokens():
            tokens, logprobs = wait()
            return tokens, logprobs.view(np.float32)
        return logits, get_tokens

    def forward(self, b):
        """Puts the new tokens' keys and values into the cache and the sampled sequences' next tokens into the step buffer; returns
        the logits [R, V] that chose them. b: a batch on the device."""
        c, w, kernels, linear = self.config, self.weights, self.kernels, self.device.linear
        T, R, tiles = len(b.token_ids), len(b.last_tokens), len(b.tiles) // 2
        D, F, heads_size = c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim
        H, K = c.num_attention_heads, c.num_key_value_heads
        # Two blocks of attention for each multiprocessor keep the memory busy: where there are fewer, split the contexts (by 32
        # at most: merging reads them all). By the batch's size alone, not by its contexts: a CUDA graph keeps its grids.
        splits = max(1, min(32, 2 * self.device.multiprocessors // (tiles * K)))
        partial = self.device.empty((T, H, splits, c.head_dim + 2), np.float32) if splits > 1 else None
        attend = kernels.decode_attention if T == len(b.context_lens) else kernels.paged_attention
        query_scale = math.log2(math.e) / math.sqrt(c.head_dim)                         # see paged_attention
        residual, attention, activation = (self.device.empty((T, size)) for size in (D, heads_size, F))

        kernels.gather_rows((T,), residual, w.embed, b.token_ids, self.buffer.sampled[0])       # the embedding
        for layer, (k_cache, v_cache) in zip(w.layers, self.kv_cache):
            # residual += attention(norm(residual)) @ o. The norm: its weight is in qkv, the rest is done by rope_and_cache.
            qkv = linear(residual, layer.qkv)                                           # [T, (H + 2K) h]
            kernels.rope_and_cache((T,), qkv, residual, self.cos_sin, b.positions, b.slot_mapping, k_cache, v_cache, query_scale)
            attend((K * splits, tiles), attention, qkv, k_cache, v_cache, b.block_tables, b.cu_blocks, b.cu_seqlens,
                   b.context_lens, b.tiles, partial)
            linear(attention, layer.o, add_to=residual)

            # residual += silu(norm(residual) @ gate) * (norm(residual) @ up) @ down. The norm: likewise.
            gate_up = linear(residual, layer.gate_up)                                   # [T, 2F]
            kernels.silu_mul((cdiv(F, kernels.SILU_COLUMNS), T), activation, gate_up, residual)
            linear(activation, layer.down, add_to=residual)

        if R == 0:
            return None
        x = self.device.empty((R, D))
        kernels.rms_norm((R,), x, residual, b.last_tokens, w.norm)                      # the head is large: only these rows need it
        logits = linear(x, w.head)
        return self.sample(logits, b)

    def decode(self, b):
        """forward() for a few sequences that bring one token each, in one kernel."""
        c, w, S, splits = self.config, self.weights, len(b.token_ids), 32 // len(b.token_ids)      # splits of a context, at most
        # What blocks hand to each other, 0 at first: two words a number of Vectors (see decode.cu), for each layer and once more.
        numbers = 2 * c.hidden_size + c.qkv_size + c.num_attention_heads * (c.head_dim + splits * (c.head_dim + 8)) + c.intermediate_size
        words, logits = self.device.xp.zeros(4 + (c.num_hidden_layers + 1) * S * numbers // 2, np.int32), self.device.empty((S, c.vocab_size))
        self.kernels.decode((self.device.multiprocessors,), logits, w.embed, w.norm, b.token_ids, self.buffer.sampled[0], self.addresses,
                            len(w.layers), self.cos_sin, b.positions, b.slot_mapping, self.kv_cache, self.kv_cache.shape[2], b.block_tables,
                            b.cu_blocks, b.context_lens, c.head_dim ** -0.5, words, S, splits)
        return self.sample(logits, b)

    def sample(self, logits, b):
        """Puts the next tokens into the step buffer; returns the logits. The noise depends on a request's seed and the token's position alone."""
        self.kernels.sample((len(logits),), self.buffer.sampled[0], self.buffer.sampled[1].view(np.float32), logits, b.temperatures, b.top_ks,
                            b.top_ps, b.seeds, b.lengths)
        return logits


# ======================================================================================================================
# Memory
#
# The card's memory holds the weights, the arrays of a step, and the KV cache, which gets all that is left of the share
# that we may use. The same arithmetic says what a decode step must read: that over the memory's bandwidth is its floor.
# ======================================================================================================================
BYTES = 2                               # of a bfloat16


def decode_weight_bytes(config):
    """Bytes of weights that a decode step reads: each once. (Of an embedding table that is not the head, next to nothing.)"""
    c = config
    layer = c.hidden_size * (c.qkv_size + c.num_attention_heads * c.head_dim + 3 * c.intermediate_size)
    return BYTES * (c.num_hidden_layers * layer + c.hidden_size * (c.vocab_size + 1))


def weight_bytes(config):
    """Bytes of all weights."""
    return decode_weight_bytes(config) + (0 if config.tie_word_embeddings else BYTES * config.vocab_size * config.hidden_size)


def kv_bytes_per_token(config):
    """Bytes of the KV cache for one token: a key and a value, in each layer, for each kv head."""
    return 2 * BYTES * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def kv_cache_blocks(config, memory, utilization, block_size, max_num_batched_tokens, max_num_seqs, max_model_len):
    """How many pages of KV cache fit into `memory`, (free, total) bytes, of which `utilization` (0 to 1) may be used. max_model_len:
    tokens that must fit; None: one page's worth."""
    c, (free, total), weights = config, memory, weight_bytes(config)
    # A step needs the arrays of forward() at their largest, twice, since the allocator keeps old ones; the CUDA graphs', and logits for
    # each of these; the table of angles; and 256 MB for cuBLAS and the kernels.
    a_token = c.hidden_size + c.qkv_size + c.num_attention_heads * c.head_dim + 3 * c.intermediate_size
    tokens, rows = 2 * max_num_batched_tokens + GRAPH_SIZES[-1], 2 * max_num_seqs + sum(n for n in GRAPH_SIZES if n < 2 * max_num_seqs)
    angles = 4 * c.head_dim * (max_model_len or c.max_position_embeddings)
    activations = BYTES * (tokens * a_token + rows * (c.vocab_size + c.hidden_size)) + angles + 2**28
    left = free - (1 - utilization) * total - weights - activations
    block_bytes = block_size * kv_bytes_per_token(config)
    needed = cdiv(max_model_len or 1, block_size) * block_bytes
    if left < needed:
        raise TinyVLLMError(
            f"too little memory: {(weights + activations + needed) / 1e9:.3f} GB are needed ({weights / 1e9:.3f} for the weights, "
            f"{activations / 1e9:.3f} for a step, {needed / 1e9:.3f} for a context of {max_model_len or block_size} tokens), "
            f"{max(left + weights + activations, 0) / 1e9:.3f} GB may be used: raise --gpu-memory-utilization, lower --max-model-len, "
            "or take a smaller model")
    return int(left // block_bytes)


# ======================================================================================================================
# Engine
#
# A model, a scheduler, and the loop between them. Everything that a server does happens in step().
#
# The GPU takes a millisecond for a step, and Python half of one to plan the next and to hand out tokens: done in turn, the
# GPU would be idle for a third of the time. So step n + 1 is launched first, and then the tokens of step n are read (vLLM:
# async scheduling). What step n + 1 must know of step n's tokens is that there is one for each sampled sequence. Which, it
# finds on the GPU: a token that is not known here is ~row, its row among the sampled. A text's end is seen one step late,
# and the surplus token is dropped; the pages it wrote to are free by then, but on the GPU whoever gets them writes later.
#
#            launch 1   launch 2        read 1   launch 3        read 2   ...
#   GPU                 | step 1 ............... | step 2 ............... | step 3
# ======================================================================================================================
@dataclass
class Stats:
    """What the decode steps have done so far, those in which every sequence brings one token: they are bound by memory, so
    bytes read over time can be held against what the card can do."""
    decode_bytes: int = 0               # weights once a step, keys and values of every sequence's context
    decode_seconds: float = 0.0
    last_time: float = 0.0              # when the tokens of the latest step were read

    def add(self, batch, start, config):
        """Counts a step that was launched at `start` and whose tokens have just been read. Its time begins with its launch, or
        when those of the step before were read; Python is in it, and the recording of a new CUDA graph: a short run shows less than the
        card does."""
        now = time.perf_counter()
        if len(batch.token_ids) == len(batch.context_lens):
            self.decode_bytes += decode_weight_bytes(config) + kv_bytes_per_token(config) * int(batch.context_lens.sum())
            self.decode_seconds += now - max(start, self.last_time)
        self.last_time = now


class Engine:
    """Runs requests by continuous batching."""

    def __init__(self, model, scheduler, overlap):
        """overlap: start a step before the tokens of the one before are read, so that the GPU never waits for Python."""
        self.model, self.scheduler, self.overlap, self.stats = model, scheduler, overlap, Stats()
        self.in_flight = deque()            # of (batch, logits, get_tokens, when it was launched): steps whose tokens are not read
        self.observers = []                 # of whoever looks inside (views.py)

    def tell(self, event, what=None):
        """Tells the observers what begins or has ended just now."""
        for observer in self.observers:
            observer.told(event, what)

    def step(self):
        """Starts a step and returns the sequences that got a token: from this one or, with overlap, from the one before. Call it
        while there is work."""
        try:
            self.tell("schedule")
            scheduled = self.scheduler.schedule()
            if scheduled:
                self.launch(scheduled)
            wait = not self.overlap or not scheduled or any(s.params.logprobs for s in self.in_flight[-1][0].sampled)
            got_token = []
            while len(self.in_flight) > (0 if wait else 1):
                got_token += self.finish()
            return got_token
        except BaseException:               # Ctrl-C: the step may be computed again, from tokens that are known
            while self.in_flight:
                self.finish()
            for sequence in self.scheduler.running:
                sequence.num_computed_tokens = min(sequence.num_computed_tokens, len(sequence.token_ids) - 1)
            raise

    def launch(self, scheduled):
        """Starts a step. Its tokens are not known, but that they will come is, so the next step can be planned."""
        start = time.perf_counter()
        self.tell("launch", scheduled)
        batch = Batch.build(scheduled, self.scheduler.allocator.block_size, *self.model.tiling)
        logits, get_tokens = self.model.launch(batch)
        self.in_flight.append((batch, logits, get_tokens, start))
        for sequence, count in scheduled:
            sequence.num_computed_tokens += count
            self.scheduler.register_full_blocks(sequence)
        for row, sequence in enumerate(batch.sampled):
            sequence.token_ids.append(~row)                                     # the next step finds it on the device, in this row
        self.tell("launched")

    def finish(self):
        """Waits for the oldest step in flight and gives its tokens to their sequences, which are returned. A sequence that ended, or was
        given up, while the step was under way has no use for its token."""
        batch, logits, get_tokens, start = self.in_flight[0]
        self.tell("wait")
        tokens, logprobs = (array.tolist() for array in get_tokens())
        self.tell("read")
        sampled = []
        for row, (sequence, position) in enumerate(zip(batch.sampled, batch.lengths.tolist())):
            waits = position < len(sequence.token_ids) and sequence.token_ids[position] < 0         # not if an interrupted finish() came here
            if waits and not sequence.output.finish_reason:
                token, count = tokens[row], sequence.params.logprobs
                if count is not None:
                    best = self.best_logprobs(logits[row], count) if count else {}
                    sequence.output.logprobs.append(best | {token: logprobs[row]})      # the token may be none of the best
                self.append(sequence, position, token)
                sampled.append(sequence)
        self.in_flight.popleft()
        self.stats.add(batch, start, self.model.config)
        self.tell("done", sampled)
        return sampled

    def append(self, sequence, position, token):
        """A sequence's new token: text, and whether it is the last one."""
        output, params = sequence.output, sequence.params
        sequence.token_ids[position] = token
        output.token_ids.append(token)
        output.first_token_time = output.first_token_time or time.perf_counter()
        if token in params.stop_token_ids or (token in self.model.config.eos_token_ids and not params.ignore_eos):
            output.finish_reason = "stop"                                       # the token's own text is no part of the answer
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
        return dict(zip(best.tolist(), (shifted[best] - np.log(np.exp(shifted).sum())).tolist()))


# ======================================================================================================================
# API
#
# What a program calls, named as in vLLM. There is no thread: whoever wants tokens steps the engine, and each step serves all
# requests, also those of other callers (two streams, say), which find their tokens when they look. A request that its
# caller gives up frees its pages at once. A prompt that can never be answered is refused before it takes any, as an output
# with an error, so that the others of its list go on.
# ======================================================================================================================
class LLM:
    """A model, ready to answer: LLM("parrot").generate(["Once upon a time"], SamplingParams(max_tokens=20))[0].text"""

    def __init__(self, model=None, *, device="auto", max_model_len=None, gpu_memory_utilization=0.9, block_size=16,
                 max_num_batched_tokens=4096, max_num_seqs=256, num_blocks=None, enforce_eager=False, overlap=True,
                 prefix_caching=True, enable_chunked_prefill=True, static_batching=False, load_format="auto"):
        """model: a folder or a Hugging Face id; None: $TINYVLLM_MODEL, or see find_model. max_model_len: tokens of prompt and answer together;
        default: the model's limit. num_blocks: pages of the KV cache; default: as many as the memory share holds.
        enforce_eager: launch every kernel by itself rather than by CUDA graphs. overlap: see Engine. prefix_caching: keep pages for
        requests that begin alike. enable_chunked_prefill, static_batching: see Scheduler. load_format: "dummy" is random weights, for which
        `model` may also be one of SHAPES."""
        check("--gpu-memory-utilization", gpu_memory_utilization, lambda share: 0 < share <= 1, "more than 0 and at most 1")
        check("--block-size", block_size, lambda n: n in (8, 16, 32, 64, 128), "8, 16, 32, 64 or 128")
        for name, value in {"--max-model-len": max_model_len, "num_blocks": num_blocks}.items():
            check(name, value, lambda n: n is None or is_int(n), "a whole number of 1 or more")
        for name, value in {"max_num_batched_tokens": max_num_batched_tokens, "max_num_seqs": max_num_seqs}.items():
            check(name, value, lambda n: is_int(n, 1, MAX_GRID), f"a whole number from 1 to {MAX_GRID}, the most blocks of a grid in y and z")
        check("load_format", load_format, lambda format: format in ("auto", "dummy"), "auto or dummy")
        model = model or os.environ.get("TINYVLLM_MODEL")
        if load_format == "dummy" and model in SHAPES:
            folder, config = FOLDER / "parrot", SHAPES[model]                           # Parrot's tokenizer: any would do
        else:
            folder = find_model(model, load_format)
            config = ModelConfig.from_folder(folder)
        self.config, self.tokenizer, self.device = config, Tokenizer(folder), open_device(device)
        limit = max_model_len or config.max_position_embeddings
        check("--max-model-len", limit, lambda n: n <= config.max_position_embeddings, f"at most the model's {config.max_position_embeddings}")
        fitting = kv_cache_blocks(config, self.device.memory(), gpu_memory_utilization, block_size,
                                  max_num_batched_tokens, max_num_seqs, max_model_len)
        if num_blocks is None:
            num_blocks = min(fitting, max_num_seqs * cdiv(limit, block_size))           # more could never be used
        if num_blocks > fitting or (max_model_len and max_model_len > num_blocks * block_size):
            raise TinyVLLMError(f"num_blocks is {num_blocks}: memory holds {fitting}, {limit} tokens need {cdiv(limit, block_size)}")
        whole = math.inf if enable_chunked_prefill else max_num_batched_tokens          # tokens of the longest prompt that a step can compute
        check("--max-model-len", max_model_len or 1, lambda n: n <= whole, f"at most --max-num-batched-tokens, {whole}, without chunked prefill")
        # A sequence that fits the pool (and a step) alone always gets through, so this is the one limit that requests are held against.
        self.max_model_len = min(limit, num_blocks * block_size, whole)
        if self.max_model_len < limit:
            holds = "a step without chunked prefill" if self.max_model_len == whole else "memory"
            print(f"tiny-vLLM: {holds} holds a context of {self.max_model_len} tokens, the model could have {limit}", file=sys.stderr)
        weights = load_weights(DummyCheckpoint(self.device) if load_format == "dummy" else Checkpoint(folder), config, self.device)
        buffer = StepBuffer(self.device, max(max_num_batched_tokens, *GRAPH_SIZES), max(max_num_seqs, *GRAPH_SIZES),
                            max_num_seqs * cdiv(self.max_model_len, block_size))
        model = Model(config, weights, self.device, num_blocks, block_size, self.max_model_len, buffer, enforce_eager)
        allocator = BlockAllocator(num_blocks, block_size, prefix_caching)
        scheduler = Scheduler(allocator, max_num_batched_tokens, max_num_seqs, enable_chunked_prefill, static_batching)
        self.engine = Engine(model, scheduler, overlap)

    def generate(self, prompts, sampling_params=None):
        """Answers prompts, all at once; returns a RequestOutput for each, in order.

        prompts: a text or a list of token ids, or a list of such. Texts are taken as they are: for a chat, pass the ids of
        tokenizer.chat(messages). sampling_params: one for all, or a list. A prompt that cannot be answered does not stop
        the others: its output has finish_reason "error" and says why in `error`. A prompt that stands alone raises it.
        """
        alone = isinstance(prompts, str) or len(prompts) > 0 and isinstance(prompts[0], (int, np.integer))
        outputs = self.submit([prompts] if alone else prompts, sampling_params)
        if alone and outputs[0].error:
            raise TinyVLLMError(outputs[0].error)
        for _ in self.finished(outputs):
            pass
        return outputs

    def stream(self, prompt, sampling_params=None):
        """Yields the prompt's RequestOutput after each token; output.delta is the text that is new."""
        [output] = self.submit([prompt], sampling_params)
        if output.error:
            raise TinyVLLMError(output.error)
        yield from self.run([output])

    def submit(self, prompts, sampling_params=None):
        """Queues prompts and returns their RequestOutputs, for run()."""
        if not isinstance(sampling_params, (list, tuple)):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if len(sampling_params) != len(prompts) or not all(isinstance(params, SamplingParams) for params in sampling_params):
            raise TinyVLLMError(f"{len(sampling_params)} sampling_params for {len(prompts)} prompts: expected is a SamplingParams, or one each")
        return [self.add_request(prompt, params) for prompt, params in zip(prompts, sampling_params)]

    def add_request(self, prompt, params):
        """Queues one prompt; an output with an error if it can never be answered."""
        output = RequestOutput([], arrival_time=time.perf_counter(), logprobs=None if params.logprobs is None else [])
        try:
            check("the prompt", prompt, lambda prompt: isinstance(prompt, (str, list, tuple, np.ndarray)), "a text or a list of token ids")
            if len(prompt) == 0:
                raise TinyVLLMError("the prompt is empty: expected at least one token")
            output.prompt_token_ids = ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            if len(ids) >= self.max_model_len:
                raise TinyVLLMError(
                    f"the prompt has {len(ids)} tokens, and with one new token the limit is {self.max_model_len} (the model's is "
                    f"{self.config.max_position_embeddings}; see --max-model-len, --gpu-memory-utilization, --no-chunked-prefill)")
            max_len = min(self.max_model_len, len(ids) + (params.max_tokens or self.max_model_len))
            try:
                sequence = Sequence(params, output, StreamDecoder(self.tokenizer), max_len)
                tokens = np.frombuffer(sequence.token_ids, np.int32)
                known = tokens.min() >= 0 and tokens.max() < self.config.vocab_size
            except (TypeError, OverflowError):      # an id is no integer, or a large one
                known = False
            if not known:
                wrong = [i for i in ids if not (isinstance(i, (int, np.integer)) and 0 <= i < self.config.vocab_size)]
                raise TinyVLLMError(f"the prompt has the token id {wrong[0]!r}, the vocabulary has 0 to {self.config.vocab_size - 1}")
        except (TinyVLLMError, TokenizerError) as error:
            output.finish_reason, output.error = "error", str(error)
            return output
        self.engine.scheduler.waiting.append(sequence)
        return output

    def run(self, outputs):
        """Steps the engine until these outputs are final. Yields each after its new tokens (several, if another caller
        stepped in between), and once when it is final. If the caller stops early (an exception, Ctrl-C, a closed generator),
        the requests are given up and their pages freed."""
        unseen = {id(output): output for output in outputs if not output.finish_reason}      # not yet yielded as final
        shown = dict.fromkeys(unseen, 0)                                                     # characters of each that were
        try:
            while unseen:
                ended = [output for output in unseen.values() if output.finish_reason]       # by another caller's steps
                for output in ended or [s.output for s in self.engine.step()]:
                    if id(output) in unseen:
                        output.delta, shown[id(output)] = output.text[shown[id(output)]:], len(output.text)
                        if output.finish_reason:
                            del unseen[id(output)]
                        yield output
        finally:
            self.abort(outputs)

    def finished(self, outputs, bar=True):
        """run(), but yields each when it is final. bar: count them on stderr, if they are several and somebody watches."""
        from tqdm import tqdm
        with tqdm(total=len(outputs), unit="answer", disable=not bar or len(outputs) < 2 or not sys.stderr.isatty()) as count:
            for output in self.run(outputs):
                if output.finish_reason:
                    count.update()
                    yield output

    def abort(self, outputs):
        """Gives up requests that still run or wait, and frees their pages."""
        mine, scheduler = {id(output) for output in outputs}, self.engine.scheduler
        for sequence in [*scheduler.running, *scheduler.waiting]:
            if id(sequence.output) in mine:
                sequence.output.finish_reason, sequence.output.finish_time = "abort", time.perf_counter()
                scheduler.remove(sequence)


# ======================================================================================================================
# Command line
#
# stdout gets answers and nothing else; notices, errors and statistics go to stderr. A mistake of the user's is one line.
# ======================================================================================================================
EXAMPLES = """examples:
  python tinyvllm.py "What is a KV cache?"                      one answer, streamed
  python tinyvllm.py "Recite Ozymandias." "Who are you?"        several at once, by continuous batching
  python tinyvllm.py --model meta-llama/Llama-3.2-1B-Instruct --temperature 0.7 --top-p 0.9 --seed 1 "Tell me a story."
"""


def parse_arguments(argv):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(prog="tinyvllm.py", description="Answer prompts with a Llama model.", epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help='a prompt; several run together; "-" reads one a line from stdin')
    add("--model", help="a folder or a Hugging Face id (default: $TINYVLLM_MODEL, else Llama-3.2-1B-Instruct if it was downloaded "
                        "before, else the bundled Parrot)")
    add("--max-tokens", type=int, metavar="N", help="longest answer, in tokens (default: as long as the context allows)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the most probable token (default), 1 samples as the model says")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K most probable tokens (default: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the most probable tokens that together reach P (default: 1)")
    add("--seed", type=int, metavar="N", help="makes sampling repeatable")
    add("--system", metavar="TEXT", help="a system prompt")
    add("--raw", action="store_true", help="no chat template: continue the prompt as it stands")
    add("--max-model-len", type=int, metavar="N", help="tokens of prompt and answer together (default: the model's limit)")
    add("--gpu-memory-utilization", type=float, default=0.9, metavar="X", help="share of the GPU's memory to use (default: 0.9)")
    add("--block-size", type=int, default=16, metavar="N", help="tokens a page of the KV cache (default: 16)")
    add("--no-prefix-caching", action="store_true", help="compute every prompt whole, even if an earlier one began with the same tokens")
    add("--no-chunked-prefill", action="store_true", help="compute a prompt in one step, or let it wait")
    add("--no-cuda-graphs", action="store_true", help="launch every kernel by itself")
    add("--no-overlap", action="store_true", help="read a step's tokens before the next one is launched")
    add("--static-batching", action="store_true", help="admit a batch of requests together, and the next one when all of it is done")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if there is one, else the simulator")
    add("--load-format", choices=["auto", "dummy"], default="auto",
        help=f"dummy: random weights, for a --model that may also be one of {', '.join(SHAPES)}")
    add("--num-blocks", type=int, metavar="N", help="pages of the KV cache (default: as many as the memory holds)")
    add("--max-num-batched-tokens", type=int, default=4096, metavar="N", help="token budget of a step (default: 4096)")
    add("--watch", action="store_true", help="a live view of pages, requests and steps, on stderr")
    add("--trace", metavar="FILE", help="write what happened and when: FILE.html is a page to look at, FILE.json opens in Perfetto")
    add("--stats", action="store_true", help="a table of where each request's time went, on stderr")
    add("--bench", nargs="?", const="all", metavar="ROW",
        help="measure speed on a GPU, against what the card could do: all rows of a table, one, or a group, such as ablation")
    add("--json", metavar="FILE", help="where --bench writes its figures")
    add("--version", action="version", version=f"tiny-vLLM {__version__}")

    def error(message):             # argparse's own prints the usage too: many lines, of which the last counts
        raise TinyVLLMError(f"{message} (--help shows the options and examples)")
    parser.error = error
    args = parser.parse_args(argv)
    if bool(args.prompts) == bool(args.bench) or args.json and not args.bench or args.bench and (args.watch or args.trace or args.stats):
        error("expected are prompts (and with them --watch, --trace, --stats), or --bench (and with it --json)")
    return args


def open_llm(args):
    """The engine that the options ask for."""
    llm = LLM(args.model, device=args.device, max_model_len=args.max_model_len, gpu_memory_utilization=args.gpu_memory_utilization,
              block_size=args.block_size, load_format=args.load_format, num_blocks=args.num_blocks, overlap=not args.no_overlap,
              max_num_batched_tokens=args.max_num_batched_tokens, prefix_caching=not args.no_prefix_caching, enforce_eager=args.no_cuda_graphs,
              enable_chunked_prefill=not args.no_chunked_prefill, static_batching=args.static_batching)
    gc.collect()            # What is there now will stay. Were it looked through again in each full collection, a step would wait for some 10 ms.
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
    """Runs prompts together; returns their outputs. One alone is streamed; of several, each answer is printed whole under its prompt,
    in input order, as soon as it can. A prompt that is refused is reported in its place, and the others go on."""
    def submit(text):
        try:
            return llm.add_request(prompt_ids(llm, text, args), params)
        except (TinyVLLMError, TokenizerError) as error:
            return RequestOutput([], finish_reason="error", error=str(error))

    outputs, alone = [submit(text) for text in texts], len(texts) == 1
    finished = llm.finished(outputs, bar=not sys.stdout.isatty())
    for text, output in zip(texts, outputs):
        if output.error:
            print(f"tinyvllm: {'' if alone else f'{text[:60]!r}: '}{output.error}", file=sys.stderr)
        elif alone:
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
    prompt, new = sum(len(o.prompt_token_ids) for o in done), sum(len(o.token_ids) for o in done)
    cached = sum(o.num_cached_tokens for o in done)
    seconds = max(o.finish_time for o in done) - min(o.arrival_time for o in done)
    first = np.median([o.first_token_time - o.arrival_time for o in done])
    line = (f"{prompt} prompt tokens{f' ({cached} cached)' if cached else ''}, {new} new tokens, {'median ' if len(done) > 1 else ''}"
            f"time to first token {first:.3f} s, {new / seconds:.1f} tokens/s")
    stats, peak = llm.engine.stats, llm.device.memory_bandwidth
    if peak and stats.decode_seconds:
        rate = stats.decode_bytes / stats.decode_seconds
        line += f", decode read {rate / 1e9:.0f} GB/s ({rate / peak:.0%} of the memory's {peak / 1e9:.0f})"
    return f"{line} | {llm.device.name}"


def run_command(args):
    """Answers the prompts of the command line; returns the exit code."""
    params = SamplingParams(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed, max_tokens=args.max_tokens)
    texts = []
    for prompt in args.prompts:
        texts += filter(str.strip, sys.stdin.read().splitlines()) if prompt == "-" else [prompt]
    if not texts:
        raise TinyVLLMError("there is no prompt: expected at least one line of text on stdin")
    views = None
    if args.watch or args.trace or args.stats:
        import views
        if args.trace:
            views.check_trace_path(args.trace)
    llm = open_llm(args)
    if args.system and not args.raw and not llm.tokenizer.has_chat_template:
        raise TinyVLLMError("--system needs a chat format that is known, and this model has none: use --raw and write it into the prompt")
    with views.looking_inside(llm, args) if views else contextlib.nullcontext():
        outputs = answer(llm, texts, args, params)
    if not all(output.error for output in outputs):
        print(f"tiny-vLLM: {statistics(llm, outputs)}", file=sys.stderr)
    return 2 if any(output.error for output in outputs) else 0


def main(argv=None):
    """The command line: exit code 0, 2 for a mistake of the user's (with one line on stderr), 130 for Ctrl-C."""
    # What stdout cannot say in its encoding is a "?". Bytes of stdin that are no text are kept, for the tokenizer to refuse that prompt.
    for stream, errors in (sys.stdout, "replace"), (sys.stdin, "surrogateescape"):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    try:
        args = parse_arguments(argv)
        sys.modules.setdefault("tinyvllm", sys.modules[__name__])           # bench and views import this very module, no second copy
        if args.bench:
            from bench import run_bench
        sys.exit(run_bench(args) if args.bench else run_command(args))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except MemoryError as error:
        print(f"tinyvllm: out of memory ({first_line(error)}): lower --gpu-memory-utilization or --max-model-len", file=sys.stderr)
        sys.exit(2)
    except (TinyVLLMError, TokenizerError, OSError) as error:                   # an OSError: the disk is full, the cache folder is not ours
        has_seen_enough = isinstance(error, BrokenPipeError)                    # `| head`
        if not has_seen_enough:
            print(f"tinyvllm: {error}", file=sys.stderr)
        if isinstance(error, OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # leave nothing for Python to flush at exit
        sys.exit(0 if has_seen_enough else 2)


if __name__ == "__main__":
    main()
