"""A model's files: config.json, the weights in *.safetensors, and generation_config.json.

A model is a folder in the Hugging Face layout: config.json (the model's shape), *.safetensors (the
weights, by name), generation_config.json (the tokens that end an answer, and how to sample).
WeightLoader writes down the architecture: each tensor is taken by name, and its shape checked. A
Mistral is a Llama. A Qwen 2 or 2.5 has a bias on q, k and v. A Qwen 3 norms each head of q and k.

Two changes are made on the way to the device:
- q, k and v are products with the same input, so the matrices are stacked into one, like gate and
  up. A layer then has two large products instead of five smaller products.
- In front of both stands an RMSNorm, x / rms(x) * g. The weight g is multiplied into the matrix,
  since (x * g) @ W.T = x @ (W * g).T. The remaining factor, 1 / rms(x), is one scalar per token;
  the kernel behind the product multiplies by this scalar, before a bias is added. So 2 L of the
  2 L + 1 norms need no kernel. The roundings differ from Hugging Face: W * g is rounded to
  bfloat16, once, where Hugging Face rounds x * g.

Letters for sizes are those of tinyvllm.py.
"""
import errno
import json
import os
import re
import sys
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from device import BFLOAT16, FOLDER, TinyVLLMError, check, first_line, is_int
from fp8 import E4M3, dequantize, quantize
from sampling import SamplingParams
from tokenizer import check_regular

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
    name = str(name)
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        shapes = f", or a shape: {', '.join(SHAPES)}" if load_format == "dummy" else ""
        raise TinyVLLMError("model: expected a folder with config.json, or a Hugging Face id like "
                            f"{HUB_MODEL}{shapes}, got {name}")
    return download(name)


def download(repo, local_files_only=False):
    """The local folder of a Hugging Face model. local_files_only: None instead of a download."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    advice = {
        GatedRepoError: f"accept its license at https://huggingface.co/{repo} and run `hf auth login`",
        RepositoryNotFoundError: "no such model, or a private one: check the id, and run `hf auth login`"}
    patterns = ["*.json", "*.jinja", "model*.safetensors"]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=local_files_only))
    except Exception as error:      # the hub, the HTTP client and the disk raise many kinds
        if local_files_only:
            return None
        what = advice.get(type(error), "check the network, or give the folder of a model that is here")
        if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):     # the disk's
            what = "set HF_HOME to a folder with room that you may write"
        raise TinyVLLMError(f"cannot download {repo} ({first_line(error):.120}): {what}") from None


def read_json(path, is_optional=False):
    """The dict in a JSON file. Of an optional file that is not there: an empty dict."""
    try:
        check_regular(path)
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if is_optional:
            return {}
        raise TinyVLLMError(f"no {path.name} in {path.parent}: expected a model folder, with config.json, "
                            "tokenizer.json and *.safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TinyVLLMError(f"cannot read {path} ({error}): expected valid JSON, in a file that you may "
                            "read") from None
    return check(path, value, lambda value: isinstance(value, dict), "a JSON object (download it again)")


def positive(settings, name, file, kind=int):
    """settings[name]. Raises TinyVLLMError unless it is an int, or kind=float a number, above 0."""
    expected = "a whole number above 0" if kind is int else "a number above 0"
    return check(f"{file}: {name}", settings.get(name),
                 lambda value: type(value) in (int, kind) and 0 < float(value) < 2**63, expected)


# Fields of config.json and the values supported by this engine. None: the field is absent.
SUPPORTED = {
    "architectures": [[f"{family}ForCausalLM"] for family in ("Llama", "Mistral", "Qwen2", "Qwen3")],
    "hidden_act": ("silu", None),
    "rope_type": ("llama3", "default", None),
    "attention_bias": (True, False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (True, False, None),
    "tie_word_embeddings": (True, False, None)}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, under the names of config.json."""
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
    eos_token_ids: frozenset            # each id ends an answer
    attention_bias: bool = False        # on q, k and v
    attention_out_bias: bool = False    # on o
    qk_norm: bool = False               # an RMSNorm on each head of q and k, before RoPE
    sliding_window: int | None = None   # a token sees so many keys, its own and those before
    num_ranks: int = 1                  # GPUs that share the model: H, K and F are a rank's part
    quantization: str | None = None     # "fp8": matrices are E4M3, by the caller's wish or the model's files
    kv_cache_dtype: str = "auto"        # "fp8": keys and values are E4M3; "auto": bfloat16. The caller's wish

    def of_rank(self, num_ranks):
        """The config of each of several ranks: a part of the heads and of the ffn. A rank's head has a part
        of the vocabulary, but each rank gets all logits."""
        expected = f"a multiple of tensor_parallel_size, {num_ranks}"
        for name in "num_attention_heads", "num_key_value_heads":
            check(name, getattr(self, name), lambda n: n % num_ranks == 0, expected)
        check("intermediate_size", self.intermediate_size, lambda n: n % (8 * num_ranks) == 0,
              f"a multiple of 8 times tensor_parallel_size, {8 * num_ranks}")
        check("vocab_size", self.vocab_size, lambda n: num_ranks == 1 or n % (2 * num_ranks) == 0,
              f"a multiple of 2 times tensor_parallel_size, {2 * num_ranks}")
        return replace(
            self, num_ranks=num_ranks,
            num_attention_heads=self.num_attention_heads // num_ranks,
            num_key_value_heads=self.num_key_value_heads // num_ranks,
            intermediate_size=self.intermediate_size // num_ranks)

    @property
    def kv_dtype(self):
        """The dtype of a key's and a value's numbers in the cache: E4M3 codes are uint8."""
        return np.dtype(np.uint8) if self.kv_cache_dtype == "fp8" else BFLOAT16

    @property
    def heads_size(self):
        """H h: the size of a token's attention output."""
        return self.num_attention_heads * self.head_dim

    @property
    def qkv_size(self):
        """(H + 2K) h: the size of a token's queries, keys and values."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @classmethod
    def from_folder(cls, folder):
        """Reads config.json and generation_config.json. Raises TinyVLLMError unless supported."""
        file = folder / "config.json"
        settings = {name: value for name, value in read_json(file).items() if value is not None}
        # rope_parameters is the new name, rope_scaling the old. The oldest files say "type".
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
        whole_numbers = {name: positive(settings, name, file) for name in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings")}
        config = cls(
            **whole_numbers,
            rms_norm_eps=positive(settings, "rms_norm_eps", file, float),
            rope_theta=positive(settings, "rope_theta", file, float),
            rope_scaling=cls.read_rope_scaling(settings, file),
            tie_word_embeddings=bool(settings.get("tie_word_embeddings")),
            eos_token_ids=cls.read_eos_token_ids(settings, folder),
            quantization=cls.read_quantization(settings, file),
            **cls.read_attention(settings, file))
        config.check_kernel_limits(file)
        return config

    @staticmethod
    def read_attention(settings, file):
        """The fields in which architectures differ, as in Transformers: attention_bias speaks of o too,
        but a Qwen2 always has the bias on q, k and v alone; and a Qwen's window has a switch."""
        [architecture] = settings["architectures"]
        is_qwen2 = architecture == "Qwen2ForCausalLM"       # and 2.5
        has_bias = settings.get("attention_bias", False)
        slides = settings.get("use_sliding_window", not architecture.startswith("Qwen"))
        has_window = slides and "sliding_window" in settings
        return {"attention_bias": has_bias or is_qwen2,
                "attention_out_bias": has_bias and not is_qwen2,
                "qk_norm": architecture == "Qwen3ForCausalLM",
                "sliding_window": positive(settings, "sliding_window", file) if has_window else None}

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
    def read_quantization(settings, file):
        """fp8 for weights in E4M3, as the package compressed-tensors writes them. None for a file without
        quantization_config. Raises TinyVLLMError for any other."""
        if "quantization_config" not in settings:
            return None
        name = f"{file}: quantization_config"
        method = settings["quantization_config"]
        check(name, method, lambda method: isinstance(method, dict), "a dict")
        check(f"{name}: quant_method", method.get("quant_method"),
              lambda method: method == "compressed-tensors", "compressed-tensors, or no quantization_config")
        check(f"{name}: config_groups", method.get("config_groups"),
              lambda groups: groups and all(group.get("weights").get for group in groups.values()),
              "a dict of groups, each with a dict of weights")
        for group in method["config_groups"].values():
            kind = [group["weights"].get(key) for key in ("num_bits", "type", "strategy")]
            check(f"{name}: num_bits, type and strategy of weights", kind,
                  lambda kind: kind in ([8, "float", "channel"], [8, "float", "tensor"]),
                  "[8, 'float', 'channel'] or [8, 'float', 'tensor']")
        return "fp8"

    @staticmethod
    def read_eos_token_ids(settings, folder):
        """The ids that end an answer: those of config.json and those of generation_config.json."""
        ids = []
        generation = read_json(folder / "generation_config.json", is_optional=True)
        for eos in settings.get("eos_token_id"), generation.get("eos_token_id"):
            ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
        check(f"{folder}: eos_token_id", ids, lambda ids: all(is_int(i, 0) for i in ids),
              "a token id or a list of token ids")
        return frozenset(ids)

    def check_kernel_limits(self, file):
        """Raises TinyVLLMError for sizes beyond the limits of kernels.cu."""
        kv_heads = self.num_key_value_heads
        check(f"{file}: num_attention_heads", self.num_attention_heads,
              lambda heads: heads in range(kv_heads, 16 * kv_heads + 1, kv_heads),
              f"1 to 16 for each of num_key_value_heads, {kv_heads}")
        check(f"{file}: head_dim", self.head_dim, lambda h: h in range(32, 257, 16),
              "32 to 256 in steps of 16")
        for name in "hidden_size", "intermediate_size":
            check(f"{file}: {name}", getattr(self, name), lambda n: n % 8 == 0, "a multiple of 8")


def generation_defaults(folder):
    """How the model's makers sample: arguments of SamplingParams, from generation_config.json."""
    file = folder / "generation_config.json"
    settings = read_json(file, is_optional=True)
    names = "temperature", "top_p", "top_k", "min_p", "repetition_penalty"
    defaults = {name: settings[name] for name in names if settings.get(name) is not None}
    do_sample = check(f"{file}: do_sample", settings.get("do_sample"),
                      lambda value: value in (True, False, None), "true or false")
    if do_sample:
        defaults.setdefault("temperature", 1.0)
    elif do_sample is not None:
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults)
    except TinyVLLMError as error:
        raise TinyVLLMError(f"{file}: {error}") from None
    return defaults


def llama_3_shape(*sizes, rope_factor, tied=True):
    """The ModelConfig of a Llama 3.1 or 3.2. sizes: see SHAPES. tied: tie_word_embeddings."""
    scaling = {"factor": rope_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    return ModelConfig(*sizes, vocab_size=128256, max_position_embeddings=131072, rms_norm_eps=1e-5,
                       rope_theta=500000.0, rope_scaling=scaling, tie_word_embeddings=tied,
                       eos_token_ids=frozenset([128001, 128008, 128009]))


def qwen_shape(*sizes, context=40960, tied=True, **others):
    """The ModelConfig of a Qwen 2.5 or 3. context: max_position_embeddings."""
    return ModelConfig(*sizes, vocab_size=151936, max_position_embeddings=context, rms_norm_eps=1e-6,
                       rope_theta=1000000.0, rope_scaling=None, tie_word_embeddings=tied,
                       eos_token_ids=frozenset([151643, 151645]), **others)


SHAPES = {          # for --load-format dummy: models without a download. The sizes are D, F, L, H, K, h
    "llama-3.2-1b": llama_3_shape(2048, 8192, 16, 32, 8, 64, rope_factor=32.0),
    "llama-3.2-3b": llama_3_shape(3072, 8192, 28, 24, 8, 128, rope_factor=32.0),
    "llama-3.1-8b": llama_3_shape(4096, 14336, 32, 32, 8, 128, rope_factor=8.0, tied=False),
    "llama-3.1-70b": llama_3_shape(8192, 28672, 80, 64, 8, 128, rope_factor=8.0, tied=False),
    "qwen2.5-1.5b": qwen_shape(1536, 8960, 28, 12, 2, 128, context=32768, attention_bias=True),
    "qwen3-0.6b": qwen_shape(1024, 3072, 28, 16, 8, 128, qk_norm=True),
    "qwen3-8b": qwen_shape(4096, 12288, 36, 32, 8, 128, tied=False, qk_norm=True)}

# The same arithmetic gives the memory for a model and the bytes that a decode step must read: bytes
# over the memory's bandwidth are the step's floor. Biases and head norms are too small to count.
BYTES = 2                               # of a bfloat16


def decode_weight_bytes(config):
    """Bytes of weights read by a decode step (of a rank): each weight once. An untied embedding table is
    left out: a step reads only a row of the table per token."""
    c = config
    layer = c.hidden_size * (c.qkv_size + c.heads_size + 3 * c.intermediate_size)
    head = c.hidden_size * c.vocab_size // c.num_ranks
    numbers = c.num_hidden_layers * layer + head
    norm = BYTES * c.hidden_size                            # the last norm's weight
    if not c.quantization:
        return BYTES * numbers + norm
    layer_rows = c.qkv_size + 2 * c.hidden_size + 2 * c.intermediate_size
    rows = c.num_hidden_layers * layer_rows + c.vocab_size // c.num_ranks
    return numbers + 4 * rows + norm                        # E4M3, and a float32 for each row


def weight_bytes(config):
    """Bytes of all weights (of a rank). The embedding table is whole in every rank, and bfloat16; a tied head
    is a part of the table, or its copy in E4M3."""
    c = config
    embedding = c.hidden_size * c.vocab_size
    is_shared = c.tie_word_embeddings and not c.quantization
    shared = embedding // c.num_ranks if is_shared else 0
    return decode_weight_bytes(c) + BYTES * (embedding - shared)


def kv_bytes_per_token(config):
    """Bytes of the KV cache for one token: a key and a value, in each layer, for each kv head."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return config.kv_dtype.itemsize * numbers


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights, on the device. The first four are each a matrix or, quantized, an Fp8Matrix."""
    qkv: object                         # [(H + 2K) h, D], multiplied by the weight of the preceding norm
    o: object                           # [D, H h]
    gate_up: object                     # [2F, D], multiplied by the weight of the preceding norm
    down: object                        # [D, F]
    qkv_bias: object                    # [(H + 2K) h]; this and the others: None for a model without
    o_bias: object                      # [D, 1]
    qk_norm: object                     # [2h]: the weights of the norm of q's heads, and of k's heads


@dataclass(frozen=True)
class Weights:
    """The model's weights, on the device, read-only."""
    embed: object                       # [V, D]
    layers: list                        # L LayerWeights
    norm: object                        # [D]
    head: object                        # [V, D]; tied weights: the memory of `embed`, unless quantized


Tensor = namedtuple("Tensor", "dtype shape data")       # the dtype's name, a tuple, uint8 [bytes]


class Checkpoint:
    """The safetensors files of a folder: one file, or the shards in model.safetensors.index.json.

    A safetensors file is the length of the header in 8 bytes, the header in JSON: {name: {"dtype",
    "shape", "data_offsets": [begin, end]}}, and the numbers. The package validates the header. The
    numbers are mapped, not read: the operating system copies a tensor from its file cache to the
    device, five times as fast as the package does."""
    DTYPES = {"BF16": BFLOAT16, "F16": np.dtype(np.float16), "F32": np.dtype(np.float32), "F8_E4M3": E4M3}

    def __init__(self, folder):
        self.folder = folder
        self.tensors = {}               # name -> Tensor, of all tensors not yet taken
        index = folder / "model.safetensors.index.json"
        weight_map = {"every tensor": "model.safetensors"}
        if index.exists():
            weight_map = read_json(index).get("weight_map")
        check(f"{index}: weight_map", weight_map,
              lambda files: all(name and Path(name).name == name for name in files.values()),
              "a dict {tensor: file}, of files in the index's own folder")
        for name in sorted(set(weight_map.values())):
            try:
                self.open(folder / name)
            except FileNotFoundError:
                raise TinyVLLMError(f"no {name} in {folder}: {self.advice(name)}") from None
            except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                raise TinyVLLMError(f"{folder / name} is no valid safetensors file ({error}): download it "
                                    "again") from None

    def advice(self, name):
        """What to do about a file of weights that is not there."""
        patterns = "model-*.safetensors", "consolidated*", "*.pth", "*.bin", "*.gguf"
        found = [path.name for pattern in patterns for path in sorted(self.folder.glob(pattern))]
        if name != "model.safetensors" or not found:
            return "download the model's *.safetensors (other formats must be converted)"
        if found[0].startswith("model-"):
            return f"download model.safetensors.index.json too, the list of {found[0]} and others"
        return f"convert {found[0]} to the Hugging Face layout, *.safetensors, or download the model so"

    def open(self, path):
        """Validates and maps a file, and finds its tensors."""
        check_regular(path)
        with safe_open(path, framework="numpy"):    # raises for overlaps, holes and wrong sizes
            pass
        data = np.memmap(path, np.uint8, "r")
        header_end = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:header_end].tobytes())
        header.pop("__metadata__", None)
        numbers = data[header_end:]
        for name, tensor in header.items():
            if name in self.tensors:
                raise TinyVLLMError(f"{self.folder}: expected each tensor in one file, found {name} in two")
            begin, end = tensor["data_offsets"]
            self.tensors[name] = Tensor(tensor["dtype"], tuple(tensor["shape"]), numbers[begin:end])

    def take(self, name, *shape):
        """The tensor of this name and shape, as in the file. A tensor can be taken only once."""
        if name not in self.tensors:
            raise TinyVLLMError(f"{self.folder}: expected a tensor {name} in the weights, found none: are "
                                "the weights of another model than config.json?")
        tensor = self.tensors.pop(name)
        check(f"{self.folder}: the shape of {name}", tensor.shape, lambda its: its == shape,
              f"{shape}, by config.json")
        check(f"{self.folder}: the dtype of {name}", tensor.dtype, lambda dtype: dtype in self.DTYPES,
              " or ".join(self.DTYPES))
        return tensor.data.view(self.DTYPES[tensor.dtype]).reshape(shape)

    def take_scales(self, name, rows):
        """The scales of a matrix in E4M3: one for each row, [rows, 1], or one for all, [1]."""
        tensor = self.tensors.get(f"{name}.weight_scale")
        shape = (1,) if tensor and tensor.shape == (1,) else (rows, 1)
        return self.take(f"{name}.weight_scale", *shape)


class DummyCheckpoint:
    """Random weights in place of a Checkpoint's, made on the device, the same each time: matrices
    and biases with the spread of a trained model's matrices, norms of 1."""

    def __init__(self, device):
        self.xp = device.xp
        self.random = device.xp.random.default_rng(0)
        self.tensors = {}

    def take(self, name, *shape):
        if name.endswith("norm.weight"):
            return self.xp.ones(shape, BFLOAT16)
        return (0.02 * self.random.standard_normal(shape, np.float32)).astype(BFLOAT16)


def load_weights(checkpoint, config, device, rank=0, kernels=None):
    """The Weights of a checkpoint, on the device. See WeightLoader for the arguments."""
    loader = WeightLoader(checkpoint, config, device, rank, kernels)
    D = config.hidden_size
    V = config.vocab_size
    embed = loader.take("model.embed_tokens", V, D)
    layers = [loader.layer(i) for i in range(config.num_hidden_layers)]
    norm = loader.take("model.norm", D)
    head = loader.part(embed, 0) if config.tie_word_embeddings else loader.take("lm_head", V, D, axis=0)
    # An untaken tensor, such as a bias, would be missing from the answers. Two untaken names are only
    # copies: a tied head, and RoPE's table of frequencies. And our activations find their own scales.
    left = [name for name in checkpoint.tensors if name != "lm_head.weight"
            and not name.endswith(("rotary_emb.inv_freq", "input_scale"))]
    if left:
        raise TinyVLLMError(f"{checkpoint.folder}: expected the tensors of config.json's architecture, got "
                            f"{len(left)} others, such as {left[0]}: another architecture, or quantized?")
    return Weights(embed, layers, norm, loader.ready(head))


@dataclass
class WeightLoader:
    """Makes a rank's weights of a checkpoint's tensors. A rank has parts of the rows of q, k, v, gate, up and
    head, and of the columns of o and down."""
    checkpoint: object                  # a Checkpoint or a DummyCheckpoint
    config: ModelConfig                 # of the model or, if several ranks share it, of a rank
    device: object
    rank: int
    kernels: object                     # of kernels.cu, for a config with quantization

    def layer(self, i):
        """The LayerWeights of layer i."""
        c = self.config
        D = c.hidden_size
        h = c.head_dim
        F = c.intermediate_size * c.num_ranks               # of the whole model, like all sizes in a file
        q_rows = c.heads_size * c.num_ranks
        kv_rows = c.num_key_value_heads * h * c.num_ranks
        attention = f"model.layers.{i}.self_attn"
        mlp = f"model.layers.{i}.mlp"
        q, k, v, o = [f"{attention}.{name}_proj" for name in "qkvo"]
        # The cache holds codes of k / k_scale and v / v_scale, so q and the output of attention have to be
        # multiplied by the scales. A norm of q's and k's heads would undo such a factor of the matrix.
        k_scale = self.cache_scale(f"{attention}.k_scale")
        v_scale = self.cache_scale(f"{attention}.v_scale")
        qk_factors = (k_scale, 1 / k_scale)                 # of the last weight before RoPE
        factors = (1, 1, 1 / v_scale) if c.qk_norm else (*qk_factors, 1 / v_scale)
        return LayerWeights(
            qkv=self.stack(f"model.layers.{i}.input_layernorm",
                           (q, q_rows, D), (k, kv_rows, D), (v, kv_rows, D), factors=factors),
            o=self.ready(times(self.take(o, D, q_rows, axis=1), v_scale)),
            gate_up=self.stack(f"model.layers.{i}.post_attention_layernorm",
                               (f"{mlp}.gate_proj", F, D), (f"{mlp}.up_proj", F, D), factors=(1, 1)),
            down=self.ready(self.take(f"{mlp}.down_proj", D, F, axis=1)),
            qkv_bias=self.join((q, q_rows), (k, kv_rows), (v, kv_rows), factors=factors, kind="bias", axis=0)
            if c.attention_bias else None,
            o_bias=self.take(o, D, kind="bias")[:, None] if c.attention_out_bias else None,
            qk_norm=self.join((f"{attention}.q_norm", h), (f"{attention}.k_norm", h), factors=qk_factors)
            if c.qk_norm else None)

    def stack(self, norm, *parts, factors):
        """A matrix of several (name, rows, columns), each times its factor and the norm's weight."""
        g = self.take(norm, self.config.hidden_size).astype(np.float32)
        # The number stands first: at the first array * number CuPy imports SciPy, which takes 0.4 seconds.
        return self.ready(self.join(*parts, factors=[factor * g for factor in factors], axis=0))

    def join(self, *parts, factors, **options):
        """Several tensors (name, *shape), one behind the other, each times its factor. options: of take. Each
        tensor goes to the device alone: the host never holds all of them."""
        scaled = [times(self.take(*part, **options), factor) for part, factor in zip(parts, factors)]
        return self.device.xp.concatenate(scaled)

    def take(self, name, *shape, kind="weight", axis=None):
        """A tensor. axis: see part. Parts by rows read nothing else of a mapped file, parts by columns do."""
        tensor = self.part(self.checkpoint.take(f"{name}.{kind}", *shape), axis)
        if tensor.dtype == E4M3:
            scales = np.broadcast_to(self.checkpoint.take_scales(name, shape[0]), shape)
            return dequantize(tensor, self.part(scales, axis)[:, 0], self.device)
        return self.device.to_device(tensor).astype(BFLOAT16, copy=False)

    def part(self, array, axis):
        """The rank's part of an array. axis: the divided dimension. None: all of the array."""
        return array if axis is None else np.split(array, self.config.num_ranks, axis)[self.rank]

    def ready(self, matrix):
        """The matrix, or the Fp8Matrix made of it."""
        return quantize(matrix, self.device, self.kernels) if self.config.quantization else matrix

    def cache_scale(self, name):
        """The scale of a layer's keys or values in a cache of codes: 1 unless the checkpoint has one."""
        checkpoint = self.checkpoint
        if name not in checkpoint.tensors:
            return 1.0
        shape = checkpoint.tensors[name].shape
        check(f"{checkpoint.folder}: the shape of {name}", shape, lambda its: its in ((), (1,)), "() or (1,)")
        scale = float(checkpoint.take(name, *shape).astype(np.float32).item())
        check(f"{checkpoint.folder}: {name}", scale, lambda s: 2**-40 < s < 2**40, "a number above 0")
        return scale if self.config.kv_cache_dtype == "fp8" else 1.0


def times(tensor, factor):
    """tensor * factor, bfloat16. A factor of 1 costs no copy: few checkpoints have scales of the cache."""
    if isinstance(factor, (int, float)) and factor == 1:
        return tensor
    return (factor * tensor.astype(np.float32)).astype(BFLOAT16)
