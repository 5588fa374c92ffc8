"""Matrices in 8 bits: --quantization fp8, and checkpoints of compressed-tensors.

The oracle quantizes by ml_dtypes, row by row, and multiplies in float64, with activations that are not
quantized. The kernels' own tests stand in test_kernels.py.

    the forward pass    recitation    checkpoints    memory    refusals
"""
import json
import os
from types import SimpleNamespace

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np
import pytest
from ml_dtypes import bfloat16, float8_e4m3fn

import tinyvllm
from communicator import OneRank
from device import CpuDevice, open_device
from fp8 import Fp8Matrix
from reference import PARROT, TINY, random_weights, write_model
from test_tinyvllm import ON_GPU, SOME, TEXTS, errors_of_logits, recite, run_main, takes_long
from tinyvllm import LLM, EngineArgs, SamplingParams, TinyVLLMError, compile_model
from weights import SHAPES, Checkpoint, ModelConfig, decode_weight_bytes, load_weights, weight_bytes

DEVICE = open_device()
pytestmark = pytest.mark.skipif(not DEVICE.runs_fp8, reason="needs a GPU of compute capability 8.9 or newer")
RANKS = [1, pytest.param(2, marks=pytest.mark.skipif(ON_GPU and DEVICE.count < 2, reason="needs two GPUs"))]
BIASED = TINY | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "attention_bias": True,
                 "tie_word_embeddings": False, "max_position_embeddings": 512}


def quantized(matrix, rows=True):
    """(codes, scales [rows, 1], or [1] for the whole matrix) of a matrix, by ml_dtypes."""
    greatest = np.abs(np.float32(matrix)).max(1, keepdims=True)
    scales = greatest / 448 if rows else greatest.max(keepdims=True)[0] / 448
    return (np.float32(matrix) / scales).astype(float8_e4m3fn), scales


def is_matrix(name):
    return name.endswith("proj.weight") or name == "lm_head.weight"


def norm_before(name):
    """The name of the norm in front of a matrix of a layer, or None."""
    layer = name.split(".self_attn.")[0].split(".mlp.")[0]
    if any(part in name for part in ("q_proj.weight", "k_proj.weight", "v_proj.weight")):
        return f"{layer}.input_layernorm.weight"
    if any(part in name for part in ("gate_proj.weight", "up_proj.weight")):
        return f"{layer}.post_attention_layernorm.weight"
    return None


def oracle_weights(config):
    """The random weights of write_model in float64: matrices are rounded to codes behind the norms."""
    weights = {name: np.float64(tensor) for name, tensor in random_weights(config).items()}
    for name in filter(is_matrix, weights):
        before = norm_before(name)
        folded = weights[name] * (weights[before] if before else 1)
        codes, scales = quantized(folded.astype(bfloat16))
        weights[name] = np.float64(codes) * scales
    for name in weights:
        if name.endswith("layernorm.weight"):
            weights[name] = np.ones_like(weights[name])
    return weights


# --------------------------------------------------------------------------------------------------
# The forward pass
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", RANKS)
def test_logits(tmp_path, size):
    """Prefill, chunks and decode, with biases. Codes of activations are off by 6% at most each."""
    write_model(tmp_path, sizes=BIASED)
    llm = LLM(tmp_path, quantization="fp8", max_num_batched_tokens=50, tensor_parallel_size=size)
    for error in errors_of_logits(llm, BIASED, oracle_weights(BIASED), (1, 17, 70), 6):
        assert error.max() < 0.07
    assert isinstance(llm.engine.model.weights.head, Fp8Matrix)


# --------------------------------------------------------------------------------------------------
# Recitation: an answer does not depend on company, chunks, pages, preemption or ranks
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("texts, options", [
    (TEXTS if ON_GPU else SOME, {}),
    (SOME[:2], {"max_num_batched_tokens": 7, "max_num_seqs": 1, "enforce_eager": True}),
    pytest.param(SOME, {"num_blocks": 28, "overlap": False}, marks=takes_long)],
    ids=["together", "alone", "preempted"])
def test_recitation(texts, options):
    outputs = recite(LLM(PARROT, quantization="fp8", **options), texts)
    assert (sum(output.num_preemptions for output in outputs) >= 3) == ("num_blocks" in options)


@pytest.mark.skipif(ON_GPU and DEVICE.count < 2, reason="needs two GPUs")
def test_recitation_of_two_ranks():
    recite(LLM(PARROT, quantization="fp8", tensor_parallel_size=2), SOME[:3])


# --------------------------------------------------------------------------------------------------
# Checkpoints of compressed-tensors
# --------------------------------------------------------------------------------------------------
def quantization_config(**weights):
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True} | weights
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "dynamic": True}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
            "config_groups": {"group_0": group}, "kv_cache_scheme": None}


def write_compressed(folder, strategy, config=BIASED):
    """Two folders: a compressed-tensors model, and a twin with the same numbers in bfloat16."""
    changes = {}
    twin = {}
    for name, tensor in random_weights(config).items():
        if name.endswith("proj.weight"):
            codes, scales = quantized(tensor, rows=strategy == "channel")
            scales = scales.astype(bfloat16)
            changes |= {name: codes, f"{name}_scale": scales}
            twin[name] = (np.float32(codes) * np.float32(scales)).astype(bfloat16)
    changes["model.layers.0.mlp.down_proj.input_scale"] = np.ones(1, bfloat16)
    compressed = {"quantization_config": quantization_config(strategy=strategy)}
    return (write_model(folder / "compressed", compressed, changes, sizes=config),
            write_model(folder / "twin", (), twin, sizes=config))


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_compressed_tensors(tmp_path, strategy):
    """The same answers as from the twin with the same numbers, with and without the option."""
    folder, twin = write_compressed(tmp_path, strategy)
    params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=2)
    answers = []
    for model, options in (folder, {}), (folder, {"quantization": "fp8"}), (twin, {"quantization": "fp8"}):
        [output] = LLM(model, **options).generate([[2042, 5, 900, 77, 1500, 3]], params)
        answers.append((output.token_ids, output.logprobs))
    assert answers[0] == answers[1] == answers[2]


def loaded(folder, rank=0, **changes):
    """(weights, config of a rank) of a folder, in 8 bits."""
    config = ModelConfig.from_folder(folder)
    config = tinyvllm.replace(config, quantization="fp8").of_rank(changes.get("ranks", 1))
    kernels = compile_model(config, DEVICE, EngineArgs(), OneRank())
    return load_weights(Checkpoint(folder), config, DEVICE, rank, kernels), config


def test_parts_of_matrices(tmp_path):
    """A rank's rows are rows of the whole. Of o and down a rank has columns, and scales of its own."""
    folder, _ = write_compressed(tmp_path, "channel")
    whole, _ = loaded(folder)
    for rank in range(2):
        part, _ = loaded(folder, rank, ranks=2)
        for layer, mine in zip(whole.layers, part.layers):
            rows = np.r_[64 * rank:64 * rank + 64, 128 + 32 * rank:160 + 32 * rank,
                         192 + 32 * rank:224 + 32 * rank]
            for of_whole, of_part in zip(layer.qkv, mine.qkv):
                assert (DEVICE.fetch(of_whole)()[rows] == DEVICE.fetch(of_part)()).all()
            for name in "o", "down":
                got = numbers(getattr(mine, name))
                want = numbers(getattr(layer, name))[:, len(got[0]) * rank:len(got[0]) * (rank + 1)]
                assert (np.abs(got - want) <= np.abs(want) / 8 + 1e-4).all()
        for of_whole, of_part in zip(whole.head, part.head):
            assert (DEVICE.fetch(of_whole)()[1024 * rank:1024 * rank + 1024] == DEVICE.fetch(of_part)()).all()


def numbers(matrix):
    """An Fp8Matrix in float32."""
    codes = DEVICE.fetch(matrix.codes)().view(float8_e4m3fn)
    return codes.astype(np.float32) * DEVICE.fetch(matrix.scales)()[:, None]


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_weight_bytes(tmp_path, tied):
    """What is counted is what is there, but for biases."""
    write_model(tmp_path, sizes=BIASED | {"tie_word_embeddings": tied})
    weights, config = loaded(tmp_path)
    matrices = [weights.head]
    for layer in weights.layers:
        matrices += [layer.qkv, layer.o, layer.gate_up, layer.down]
    arrays = [array for matrix in matrices for array in matrix] + [weights.norm]
    assert decode_weight_bytes(config) == sum(array.nbytes for array in arrays)
    assert weight_bytes(config) == decode_weight_bytes(config) + weights.embed.nbytes
    assert weights.embed.dtype == bfloat16


def test_8b_fits_into_16_gb():
    config = tinyvllm.replace(SHAPES["llama-3.1-8b"], quantization="fp8")
    assert 8.5e9 < weight_bytes(config) < 8.6e9             # 8.03 billion, half a billion in bfloat16
    device = SimpleNamespace(memory=lambda: (int(15.5e9), int(16e9)))
    args = EngineArgs(max_model_len=8192)
    num_blocks, num_tokens, *_ = tinyvllm.plan_pool(config, device, args, OneRank())
    assert num_blocks * 16 >= 8192 and num_tokens >= args.token_budget
    with pytest.raises(TinyVLLMError, match="too little memory"):
        tinyvllm.plan_pool(tinyvllm.replace(config, quantization=None), device, args, OneRank())


# --------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------
def test_a_gpu_without_fp8(monkeypatch):
    monkeypatch.setattr(CpuDevice, "runs_fp8", False)
    with pytest.raises(TinyVLLMError, match=r"capability 8.9 or newer .*, got simulated GPU .*bfloat16$"):
        LLM(PARROT, quantization="fp8", device="cpu")


@pytest.mark.parametrize("changes, ranks, message", [
    ({"intermediate_size": 136}, 1, "intermediate_size of a rank: expected a multiple of 16, got 136"),
    ({"hidden_size": 136}, 1, "hidden_size: expected a multiple of 16, got 136"),
    ({"intermediate_size": 48}, 2, "intermediate_size of a rank: expected a multiple of 16, got 24"),
    ({"vocab_size": 2056}, 1, "vocab_size of a rank: expected a multiple of 16, got 2056"),
], ids=["ffn", "hidden", "ffn of 2", "vocabulary"])
def test_sizes_that_do_not_fit(tmp_path, changes, ranks, message):
    write_model(tmp_path, sizes=BIASED | changes)
    with pytest.raises(TinyVLLMError, match=message):
        LLM(tmp_path, quantization="fp8", device="cpu", tensor_parallel_size=ranks)


@pytest.mark.parametrize("settings, message", [
    ({"quant_method": "gptq", "bits": 4}, "quant_method: expected compressed-tensors, .*, got 'gptq'"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quant_method: expected .*, got 'fp8'"),
    ("awq", "quantization_config: expected a dict, got 'awq'"),
    (quantization_config(num_bits=4, type="int"), r"expected \[8, 'float', 'channel'\] or .* got \[4, 'int'"),
    (quantization_config(strategy="block"), "got .8, 'float', 'block'."),
    (quantization_config() | {"config_groups": {"g": {}}}, "config_groups: expected a dict of groups, .*"),
    (quantization_config() | {"config_groups": None}, "config_groups: expected a dict .* got None"),
], ids=["gptq", "fp8 by blocks", "no dict", "int4", "blocks", "no weights", "no groups"])
def test_other_formats(tmp_path, settings, message):
    write_model(tmp_path, {"quantization_config": settings}, sizes=TINY)
    code, _, errors = run_main("--model", tmp_path, "Hi")
    assert code == 2 and len(errors) == 1
    with pytest.raises(TinyVLLMError, match=message):
        LLM(tmp_path, device="cpu")


def test_no_scales_in_the_file(tmp_path):
    folder, _ = write_compressed(tmp_path, "channel")
    config = json.loads((folder / "config.json").read_text())
    weights = {f"model.layers.0.{name}.weight_scale": None for name in ("self_attn.o_proj", "mlp.gate_proj")}
    codes = {name: quantized(tensor)[0] for name, tensor in random_weights(BIASED).items()
             if name.endswith("proj.weight")}
    write_model(folder, config, codes | weights, sizes=BIASED)
    with pytest.raises(TinyVLLMError, match=r"expected a tensor .*_proj.weight_scale in .*, found none"):
        LLM(folder, device="cpu")
