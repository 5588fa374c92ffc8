"""The kernels, each against its twin, and the simulator that runs them on a CPU.

A twin is the kernel's equation in NumPy and float64, with no thought of speed.

Letters as in kernels.cu: T tokens, S sequences, H query heads, K key-value heads, h head_dim,
V vocabulary, B tokens a page, N pages.
"""
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
from ml_dtypes import bfloat16, float8_e4m3fn

import simulator
from device import KERNELS, CpuDevice, compile_kernels, open_device, paste
from fp8 import Fp8Matrix
from reference import PARROT, RNG, ROOT
from simulator import LaunchError
from test_tinyvllm import DEVICE, ON_GPU, TEST_ALL, run_recorded
from tinyvllm import (LLM, Batch, EngineArgs, Model, RequestOutput, SamplingParams, Sequence, StepBuffer,
                      TinyVLLMError, cdiv)
from weights import DummyCheckpoint, LayerWeights, ModelConfig, Weights, load_weights

# --------------------------------------------------------------------------------------------------
# Kernels
#
# Outputs are poisoned before each run. So is all memory that a kernel must not read: unused slots
# of pages, unused entries of block tables, the keys and values in qkv.
# --------------------------------------------------------------------------------------------------
def sizes(D, H, K, h, F, V, B):
    return dict(HIDDEN=D, NUM_HEADS=H, NUM_KV_HEADS=K, HEAD_DIM=h, FFN=F, VOCAB=V, BLOCK_SIZE=B,
                RMS_EPS="1e-05f", QKV_BIAS=0, QK_NORM=0, FP8_WEIGHTS=0, FP8_CACHE=0)


# Each model costs a compilation, so a few models share out the odd sizes.
BASE = sizes(144, 4, 1, 64, 344, 1001, 16)
MODELS = [
    BASE,
    sizes(8, 2, 2, 64, 8, 5, 8),
    sizes(2048, 8, 1, 128, 2056, 128256, 32),
    sizes(4104, 3, 1, 48, 344, 7, 8),
    sizes(144, 16, 1, 256, 344, 8, 16),
    sizes(264, 4, 2, 32, 4096, 4096, 16),
    sizes(144, 6, 2, 80, 344, 100, 64),
    sizes(144, 5, 1, 208, 344, 999, 8),
]
MODEL_NAMES = ["-".join(str(size) for size in list(model.values())[:7]) for model in MODELS]
FP8 = BASE | {"FP8_WEIGHTS": 1}
LARGE_FP8 = MODELS[2] | {"FP8_WEIGHTS": 1, "FFN": 28672, "QKV_BIAS": 1, "QK_NORM": 1}
every_model = pytest.mark.parametrize("model", MODELS, ids=MODEL_NAMES)
# With a cache of codes: 4, 8, 3, 16 and 13 parts of 16 bytes in a key.
CODE_MODELS = [MODELS[i] | {"FP8_CACHE": 1} for i in ((0, 2, 3, 4, 7) if TEST_ALL else (0, 3, 7))]
CODES = CODE_MODELS[0]
every_cache = pytest.mark.parametrize("model", MODELS + CODE_MODELS, ids=MODEL_NAMES + [
    f"codes-{model['HEAD_DIM']}" for model in CODE_MODELS])
NAN = np.float32("nan")


@cache
def compiled_once(items):
    return compile_kernels(DEVICE, dict(items), paste(KERNELS))


def compiled(model):
    """kernels.cu, compiled for the model, once in a session."""
    return compiled_once(tuple(model.items()))


def launch(model, name, grid, *args):
    """Runs a kernel on NumPy arrays. Afterwards the arrays hold the kernel's results."""
    def is_small(a):                # a huge array is not copied: most of its pages were never touched
        return isinstance(a, np.ndarray) and a.nbytes < 1 << 30

    on_device = [DEVICE.to_device(a) if is_small(a) else a for a in args]
    getattr(compiled(model), name)(grid, *on_device)
    for a, d in zip(args, on_device):
        if is_small(a):
            a[...] = DEVICE.fetch(d)()


def randn(rng, *shape, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(bfloat16)


def poison(*shape, dtype=bfloat16):
    return np.full(shape, NAN if dtype in (bfloat16, np.float32) else -77, dtype)


def ints(values):
    return np.array(values, np.int32)


def floats(values):
    return np.array(values, np.float32)


def close(got, want, tolerance=2.0 ** -8, floor=1e-3):
    got = np.float64(got)
    want = np.float64(want)
    assert not np.isnan(got).any(), "NaN, or not written"
    error = np.abs(got - want) - (tolerance * np.abs(want) + floor)
    place = np.unravel_index(error.argmax(), error.shape)
    assert (error <= 0).all(), f"off by {np.abs(got - want).max():.3g} at {place}"


# Compilation
@pytest.mark.parametrize("model, rows", [(MODELS[0], 128), (MODELS[4], 64)], ids=["head 64", "head 256"])
def test_exported_constants(model, rows):
    """kernels.NAME equals NAME in the compiled code: a kernel writes down every constant."""
    names = re.findall(r"^EXPORT\((\w+),", KERNELS.read_text(), re.M)
    writes = "".join(f"out[{i}] = {name}; " for i, name in enumerate(names))
    code = f'extern "C" __global__ __launch_bounds__(1) void constants(int* out) {{ {writes}}}\n'
    kernels = compile_kernels(DEVICE, model, paste(KERNELS) + code)
    out = DEVICE.empty(len(names), np.int32)
    kernels.constants((1,), out)
    assert [getattr(kernels, name) for name in names] == DEVICE.fetch(out)().tolist()
    assert kernels.ATTENTION_ROWS == rows
    assert kernels.rms_norm.block == (kernels.ROW_THREADS, 1, 1)
    assert kernels.paged_attention.shared_bytes == kernels.paged_attention_shared_bytes > 0


POWERS = """
import numpy as np
from device import compile_kernels, open_device
code = '''
extern "C" __global__ __launch_bounds__(32) void powers(float* out) {
    out[threadIdx.x] = exp2_approx(threadIdx.x);
}
'''
device = open_device(DEVICE)
out = device.empty(32, np.float32)
compile_kernels(device, {}, code).powers((1,), out)
print(device.fetch(out)().tolist())
"""


def test_a_changed_header_is_compiled_again(tmp_path):
    """The cache of compiled kernels knows the headers too: an edit of a header takes effect."""
    header = tmp_path / ("ptx.h" if ON_GPU else "simulator.h")
    for name in "device.py", "simulator.py", "ptx.h", "simulator.h":
        shutil.copy(ROOT / name, tmp_path)
    code = POWERS.replace("DEVICE", repr("cuda" if ON_GPU else "cpu"))
    cache = tmp_path / "cache"
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "CUPY_CACHE_DIR": str(cache)}

    def num_cached():
        return sum(path.is_file() for path in cache.rglob("*"))

    def assert_powers(first):
        command = [sys.executable, "-c", code]
        output = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)
        assert np.allclose(json.loads(output), 2.0 ** np.arange(first, first + 32))

    original = header.read_text()
    assert_powers(0)
    begin = re.search(r"float exp2_approx\(float x\) \{", original).end()
    header.write_text(f"{original[:begin]} x += 1; {original[begin:]}")
    assert_powers(1)
    header.write_text(original)
    before = num_cached()
    assert_powers(0)
    assert num_cached() == before > 0           # nothing was compiled: the cache is in use


E4M3 = """
extern "C" __global__ __launch_bounds__(32) void to_e4m3(u8* out, const float* x, int n) {
    for (int i = 2 * threadIdx.x; i < n; i += 64) {
        const unsigned short both = pack_e4m3x2(x[i], x[i + 1]);
        out[i] = both;
        out[i + 1] = both >> 8;
    }
}
// out [256]: the number of each code
extern "C" __global__ __launch_bounds__(32) void from_e4m3(bf16* out) {
    for (int i = 2 * threadIdx.x; i < 256; i += 64)
        *reinterpret_cast<unsigned*>(out + i) = unpack_e4m3x2(i << 8 | (i + 1) << 24 | 0x00a500a5);
}
// out [256]: the f16 of each code
extern "C" __global__ __launch_bounds__(32) void e4m3_to_f16(int* out) {
    for (int i = threadIdx.x; i < 128; i += 32) out[i] = e4m3x2_to_f16x2(2 * i | (2 * i + 1) << 8);
}
// out [n]: f16
extern "C" __global__ __launch_bounds__(32) void to_f16(int* out, const float* x, int n) {
    for (int i = threadIdx.x; i < n / 2; i += 32) out[i] = pack_f16x2(x[2 * i], x[2 * i + 1]);
}
"""


@pytest.mark.skipif(not DEVICE.runs_fp8, reason="needs a GPU of compute capability 8.9 or newer")
def test_e4m3_conversions_equal_those_of_ml_dtypes():
    kernels = compile_kernels(DEVICE, {}, E4M3)
    codes = np.arange(256, dtype=np.uint8).view(float8_e4m3fn).astype(np.float32)
    is_nan = np.isnan(codes)
    assert np.flatnonzero(is_nan).tolist() == [0x7f, 0xff]
    numbers = DEVICE.empty(256)
    kernels.from_e4m3((1,), numbers)
    numbers = DEVICE.fetch(numbers)().astype(np.float32)
    assert numbers[~is_nan].tolist() == codes[~is_nan].tolist()
    assert np.signbit(numbers[[0x00, 0x80]]).tolist() == [False, True]
    assert numbers[is_nan].tolist() == [480, -480]      # see the hazard in ptx.h

    # Every code, the middle between each two codes, and the floats beside both; then random numbers.
    exact = np.unique(codes[~is_nan])
    edges = np.concatenate([exact, (exact[1:] + exact[:-1]) / 2])
    rng = RNG(3)
    others = rng.standard_normal(4000) * 2.0 ** rng.integers(-14, 14, 4000)
    x = np.concatenate([edges, np.nextafter(edges, np.inf), np.nextafter(edges, -np.inf), others,
                        [1e-30, 449, 464, 480, 1e30, np.inf, -449, -1e30, -np.inf, -0.0]]).astype(np.float32)
    x = np.append(x, [np.float32(np.nan)] * (2 - len(x) % 2))
    got = DEVICE.empty(len(x), np.uint8)
    kernels.to_e4m3((1,), got, DEVICE.to_device(x), len(x))
    got = DEVICE.fetch(got)()
    # ml_dtypes rounds numbers beyond 448 to NaN.
    want = np.clip(x, -448, 448).astype(float8_e4m3fn).view(np.uint8)
    want[np.isnan(x)] = 0x7f
    assert got.tolist() == want.tolist()


@pytest.mark.skipif(ON_GPU and not DEVICE.runs_decode, reason="this GPU cannot run decode.cu")
def test_f16_conversions_equal_those_of_numpy():
    kernels = compile_kernels(DEVICE, {}, E4M3)
    codes = np.arange(256, dtype=np.uint8).view(float8_e4m3fn).astype(np.float16)
    numbers = DEVICE.empty(128, np.int32)
    kernels.e4m3_to_f16((1,), numbers)
    numbers = DEVICE.fetch(numbers)().view(np.float16)
    np.testing.assert_array_equal(numbers, codes)       # NaN is NaN
    assert np.signbit(numbers[[0x00, 0x80]]).tolist() == [False, True]

    # Numbers of f16, the middle between each two, and the floats beside both; then random numbers.
    exact = np.arange(0x7bff, dtype=np.uint16).view(np.float16).astype(np.float32)
    edges = np.concatenate([exact[::7], (exact[1:] + exact[:-1]) / 2])
    rng = RNG(4)
    others = rng.standard_normal(4000) * 2.0 ** rng.integers(-30, 15, 4000)
    x = np.concatenate([edges, -edges[::3], np.nextafter(edges, np.inf), np.nextafter(edges, -np.inf), others,
                        [65504, 65519, 65520, 1e30, np.inf, -1e30, -np.inf, -0.0]]).astype(np.float32)
    x = x[len(x) % 2:]
    got = DEVICE.empty(len(x) // 2, np.int32)
    kernels.to_f16((1,), got, DEVICE.to_device(x), len(x))
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    assert DEVICE.fetch(got)().view(np.uint16).tolist() == want.view(np.uint16).tolist()


# quantize
@pytest.mark.skipif(not DEVICE.runs_fp8, reason="needs a GPU of compute capability 8.9 or newer")
@pytest.mark.parametrize("columns", [8, 144, 2056, 14336])
def test_quantize(columns):
    rng = RNG(2)
    x = (randn(rng, 5, columns) * floats([[1], [1e-20], [0], [1], [1]])).astype(bfloat16)
    x[3, 2] = np.inf
    x[4, 5] = NAN
    codes = np.full(x.shape, 77, np.uint8)
    scales = poison(len(x), dtype=np.float32)
    launch(BASE | {"FP8_WEIGHTS": 1}, "quantize", (len(x),), codes, scales, x, columns)
    want = np.abs(np.float32(x[:3])).max(1) / 448
    want[2] = 1
    np.testing.assert_allclose(scales[:3], want, rtol=1e-6)
    got = codes.view(float8_e4m3fn).astype(np.float32)
    assert np.abs(got[:2]).max(1).tolist() == [448, 448]
    error = np.abs(np.float64(got[:3]) - np.float64(x[:3]) / want[:, None])
    assert (error <= np.maximum(np.abs(got[:3]) * 2.0 ** -4, 2.0 ** -10) * 1.001).all()     # half a step
    assert np.isnan(got[3, 2]) and np.isnan(got[4, 5])


# add_residual, scale_logits, and silu_mul with FP8 weights
def positive_floats(rng, *shape):
    return rng.uniform(0.5, 2, shape).astype(np.float32)


def numbers_of(codes):
    return np.float64(codes.view(float8_e4m3fn))


def close_codes(codes, want):
    """want, in float64, is rounded to the next code: by half a step at most, and a bit more for bfloat16."""
    got = numbers_of(codes)
    assert (np.abs(got - want) <= np.maximum(np.abs(want) * 2.0 ** -4, 2.0 ** -10) * 1.07).all()


@pytest.mark.skipif(not DEVICE.runs_fp8, reason="needs a GPU of compute capability 8.9 or newer")
@pytest.mark.parametrize("model", [FP8, LARGE_FP8], ids=["144", "2048"])
@pytest.mark.parametrize("absent", [
    (), ("residual", "bias"), ("codes",), ("product", "bias", "out")], ids=str)
def test_add_residual(model, absent):
    rng = RNG(4)
    D = model["HIDDEN"]
    args = {"codes": np.full((3, D), 77, np.uint8), "out": poison(3, D),
            "residual": randn(rng, 3, D, scale=5),
            "product": randn(rng, 3, D, scale=900), "row_scales": positive_floats(rng, D) / 100,
            "token_scales": positive_floats(rng, 3) / 10, "bias": randn(rng, D)}
    args["residual"][1] *= 1e-4
    args["product"][1] = 0
    args["residual"][2] = 0
    args["product"][2] = [3e5] + [0] * (D - 1)      # one number alone gets the greatest code, and no more
    args |= dict.fromkeys(absent)
    want = np.zeros((3, D))
    if "product" not in absent:
        want += np.float64(args["product"]) * args["row_scales"] * args["token_scales"][:, None]
    for name in "residual", "bias":
        if name not in absent:
            want += np.float64(args[name])
    launch(model, "add_residual", (3,), *args.values())
    if "out" not in absent:
        close(args["out"], want, floor=1e-6)
    if "codes" not in absent:
        sums = np.float64(want.astype(bfloat16))
        rms = np.sqrt((sums ** 2).mean(1, keepdims=True) + 1e-5)
        close_codes(args["codes"], sums / rms * 448 / D ** 0.5)
        if "bias" in absent and "product" not in absent:
            assert numbers_of(args["codes"])[2].tolist() == [448 * np.sign(want[2, 0])] + [0] * (D - 1)


@pytest.mark.skipif(not DEVICE.runs_fp8, reason="needs a GPU of compute capability 8.9 or newer")
def test_a_token_has_the_same_codes_in_any_company():
    """Alone, and among 63 tokens with outliers: of the residual stream, of any row, and of silu_mul."""
    rng = RNG(5)
    D = FP8["HIDDEN"]
    F = FP8["FFN"]
    company = (rng.standard_normal((64, 2 * F)) * 10.0 ** rng.uniform(-3, 5, (64, 1))).astype(bfloat16)
    company[::3, 17] = 3e38
    company[5] = NAN
    mine = randn(rng, 2 * F)
    row_scales = positive_floats(rng, 2 * F)

    def codes_of(place, x):
        T = len(x)
        x[place] = mine
        narrow = np.ascontiguousarray(x[:, :D])
        residual = np.full((T, D), 77, np.uint8)
        rows = np.full((T, 2 * F), 77, np.uint8)
        activation = np.full((T, F), 77, np.uint8)
        scales = poison(2, T, dtype=np.float32)
        launch(FP8, "add_residual", (T,), residual, None, narrow, None, None, None, None)
        launch(FP8, "quantize", (T,), rows, scales[0], x, 2 * F)
        launch(FP8, "silu_mul", (1, T), None, x, None, activation, scales[1], row_scales)
        return [array[place].tolist() for array in (residual, rows, activation, scales[0], scales[1])]

    alone = codes_of(0, np.zeros((1, 2 * F), bfloat16))
    assert all(len(set(codes)) > 50 for codes in alone[:3])
    for place in 0, 40, 63:
        assert codes_of(place, company.copy()) == alone


@pytest.mark.skipif(not DEVICE.runs_fp8, reason="needs a GPU of compute capability 8.9 or newer")
@pytest.mark.parametrize("model", [FP8, LARGE_FP8], ids=["344", "28672"])
def test_silu_mul_with_fp8_weights(model):
    rng = RNG(6)
    F = model["FFN"]
    gate_up = randn(rng, 3, 2 * F, scale=500)
    gate_up[0, :4] = [-1e30, 1e5, -100, 0]
    gate_up[1, F:] = 0
    row_scales = positive_floats(rng, 2 * F)
    codes = np.full((4, F), 77, np.uint8)
    scales = poison(4, dtype=np.float32)
    gate, up = np.split(np.float64(gate_up) * row_scales * model["HIDDEN"] ** 0.5 / 448, 2, -1)
    assert compiled(model).SILU_COLUMNS >= F
    launch(model, "silu_mul", (1, 3), None, gate_up, None, codes, scales, row_scales)
    with np.errstate(over="ignore"):
        want = gate / (1 + np.exp(-gate)) * up
    want_scales = np.abs(want).max(1) / 448
    want_scales[1] = 1
    np.testing.assert_allclose(scales[:3], want_scales, rtol=1e-5)
    close_codes(codes[:3], want / want_scales[:, None])
    assert (codes[3] == 77).all() and np.isnan(scales[3])


@pytest.mark.parametrize("columns", [8, 2048, 4104])
def test_scale_logits(columns):
    rng = RNG(7)
    logits = randn(rng, 3, columns, scale=4000)
    row_scales = positive_floats(rng, columns)
    token_scales = positive_floats(rng, 3)
    want = np.float64(logits) * row_scales * token_scales[:, None]
    grid = (-(-columns // compiled(FP8).SCALE_COLUMNS), 3)
    launch(FP8, "scale_logits", grid, logits, row_scales, token_scales, columns)
    close(logits, want)


# gather_rows
@every_model
def test_gather_rows(model):
    rng = RNG(1)
    hidden = model["HIDDEN"]
    table = randn(rng, 50, hidden)
    rows = ints([49, 0, 7, 7, 31])
    pending = ints([49, ~2, 7, ~0, 31])     # ~i stands for entry i of `sampled`
    for given, sampled in (rows, None), (pending, ints([7, 99, 0])):
        out = poison(len(rows) + 1, hidden)
        launch(model, "gather_rows", (len(rows),), out, table, given, sampled)
        assert (out[:-1] == table[rows]).all() and np.isnan(np.float32(out[-1])).all()
        assert (given == rows).all()        # for `sample`


# rms_norm
def rms_norm_twin(x, weight=1, eps=1e-5):
    x = np.float64(x)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * np.float64(weight)


def inverse_rms_twin(x):
    """1 / rms(x) of each row, [T, 1]: the normed row over the row."""
    return (rms_norm_twin(x) / np.float64(x))[:, :1]


@every_model
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_rms_norm(model, scale):
    rng = RNG(2)
    hidden = model["HIDDEN"]
    residual = randn(rng, 5, hidden, scale=scale)
    weight = randn(rng, hidden)
    rows = ints([4, 1, 1])
    residual[1] = 0                         # in a row of zeros, eps alone prevents 0 / 0
    out = poison(4, hidden)
    launch(model, "rms_norm", (3,), out, residual, rows, weight)
    close(out[:-1], rms_norm_twin(residual[rows], weight))
    assert np.isnan(np.float32(out[-1])).all()


TWO_REDUCTIONS = """
extern "C" __global__ __launch_bounds__(256) void two(float* out, const float* x) {
    const float first = block_reduce(x[threadIdx.x], Sum());
    const float second = block_reduce(x[256 + threadIdx.x], Sum());
    out[threadIdx.x] = first;
    out[256 + threadIdx.x] = second;
}
"""


def test_two_reductions_in_a_row():
    """A slow warp still reads the first reduction's partial results: the second must not write."""
    kernels = compile_kernels(DEVICE, BASE, paste(KERNELS) + TWO_REDUCTIONS)
    x = DEVICE.to_device(np.repeat(floats([1, 3]), 256))
    out = DEVICE.empty(512, np.float32)
    kernels.two((1,), out, x)
    assert (DEVICE.fetch(out)() == np.repeat([256, 768], 256)).all()


# rope_and_cache
def to_codes(x):
    """[..., h], rounded to bfloat16, as the E4M3 codes of a cache: in the order 0, h/2, 1, h/2 + 1, ...,
    at most +-448."""
    rounded = np.float32(np.asarray(x, bfloat16))
    codes = np.clip(rounded, -448, 448).astype(float8_e4m3fn).view(np.uint8)
    return np.stack(np.split(codes, 2, -1), -1).reshape(codes.shape)


def from_codes(codes):
    """The numbers [..., h] of a cache's codes."""
    numbers = np.ascontiguousarray(codes).view(float8_e4m3fn).astype(np.float32)
    return np.concatenate([numbers[..., ::2], numbers[..., 1::2]], -1)


def poisoned_cache(model, *shape):
    """A cache of NaN. (The kernels read the code of NaN as 480, far from all numbers of the tests.)"""
    return np.full(shape, 0x7f, np.uint8) if model["FP8_CACHE"] else poison(*shape)


def attention_sizes(model):
    return [model[name] for name in ("NUM_HEADS", "NUM_KV_HEADS", "HEAD_DIM", "BLOCK_SIZE")]


def rope_twin(x, cos, sin):
    """x [T, heads, h], turned by the angles of cos and sin [T, 1, h/2]."""
    a, b = np.split(np.float64(x), 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def rope_table(length, h):
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, h, 2) / h)
    return np.concatenate([np.cos(angles), np.sin(angles)], -1).astype(np.float32)


def rope_and_cache_twin(model, rows, positions, table, norm=None):
    """(q, turned and times 0.3; k, turned; v), [T, heads, h] each. rows [T, (H + 2K) h]: the product with
    the norm's factor and the bias. norm [2h]: the weights of the norms of q's and k's heads."""
    H, K, h, _ = attention_sizes(model)
    q, k, v = np.split(rows.reshape(len(rows), H + 2 * K, h), [H, H + K], 1)
    if norm is not None:
        q = rms_norm_twin(q, norm[:h])
        k = rms_norm_twin(k, norm[h:])
    cos, sin = np.split(np.float64(table[positions])[:, None], 2, -1)
    return 0.3 * rope_twin(q, cos, sin), rope_twin(k, cos, sin), v


@every_model
@pytest.mark.parametrize("T", [1, 19])
def test_rope_and_cache(model, T):
    rng = RNG(3)
    H, K, h, B = attention_sizes(model)
    qkv = randn(rng, T, (H + 2 * K) * h)
    table = rope_table(500, h)
    positions = ints(rng.integers(0, 500, T))
    x = randn(rng, T, model["HIDDEN"], scale=3)
    slots = rng.permutation(8 * B)[:T].astype(np.int64)
    if T > 1:
        slots[5] = -1                       # padding
    caches = poison(2, 8, K, B, h)
    q, k, v = rope_and_cache_twin(model, qkv * inverse_rms_twin(x), positions, table)
    launch(model, "rope_and_cache", (T,),
           qkv, x, table, positions, slots, caches[0], caches[1], np.float32(0.3), None, None, None)
    used = slots >= 0
    close(qkv.reshape(T, H + 2 * K, h)[used, :H], q[used])
    pages = slots[used] // B
    offsets = slots[used] % B
    close(caches[0][pages, :, offsets], k[used])
    close(caches[1][pages, :, offsets], v[used])
    caches[:, pages, :, offsets] = NAN
    assert np.isnan(np.float32(caches)).all(), "written outside of the slots"


@pytest.mark.parametrize("model", [
    BASE | {"QKV_BIAS": 1, "QK_NORM": 1}, MODELS[3] | {"QK_NORM": 1}, MODELS[7] | {"QKV_BIAS": 1},
    FP8, LARGE_FP8,
], ids=["144-4-1, bias, norm", "head 48, norm", "head 208, bias", "fp8", "fp8, bias, norm"])
def test_rope_and_cache_with_bias_and_head_norm(model):
    """rope_and_cache scales, adds the bias, and then norms each head of q and k, before both turn.

    The three threads of a head of 48 can belong to two warps. With FP8 weights, x is not read.
    """
    rng = RNG(3)
    H, K, h, B = attention_sizes(model)
    T = 7
    qkv = randn(rng, T, (H + 2 * K) * h)
    x = randn(rng, T, model["HIDDEN"], scale=3)
    bias = randn(rng, (H + 2 * K) * h) if model["QKV_BIAS"] else None
    weight = randn(rng, 2 * h) if model["QK_NORM"] else None
    table = rope_table(500, h)
    positions = ints(rng.integers(0, 500, T))
    slots = rng.permutation(B)[:T].astype(np.int64)
    slots[2] = -1
    caches = poison(2, 1, K, B, h)
    scales = None
    factor = inverse_rms_twin(x)
    if model["FP8_WEIGHTS"]:
        scales = positive_floats(rng, (H + 2 * K) * h)
        factor = np.float64(scales) * model["HIDDEN"] ** 0.5 / 448
        x[...] = NAN
    rows = qkv * factor + (0 if bias is None else np.float64(bias))
    q, k, v = rope_and_cache_twin(model, rows, positions, table, weight)
    launch(model, "rope_and_cache", (T,),
           qkv, x, table, positions, slots, caches[0], caches[1], np.float32(0.3), bias, weight, scales)
    used = slots >= 0
    close(qkv.reshape(T, H + 2 * K, h)[used, :H], q[used])
    close(caches[0][0, :, slots[used]], k[used])
    close(caches[1][0, :, slots[used]], v[used])


@pytest.mark.parametrize("model", [CODES, CODE_MODELS[2] | {"QK_NORM": 1}], ids=["64", "48, norm"])
def test_rope_and_cache_writes_codes(model):
    """Keys and values are rounded to bfloat16, then to the nearest code, and beyond 448 to 448."""
    rng = RNG(3)
    H, K, h, B = attention_sizes(model)
    T = 19
    qkv = randn(rng, T, (H + 2 * K) * h)
    qkv[3] *= 500                           # an outlier among its neighbours
    qkv[4] /= 256                           # half of them below the least normal number, 2^-6
    x = randn(rng, T, model["HIDDEN"])
    weight = randn(rng, 2 * h, scale=150) if model["QK_NORM"] else None
    table = rope_table(500, h)
    positions = ints(rng.integers(0, 500, T))
    slots = rng.permutation(8 * B)[:T].astype(np.int64)
    slots[5] = -1
    caches = poisoned_cache(model, 2, 8, K, B, h)
    q, k, v = rope_and_cache_twin(model, qkv * inverse_rms_twin(x), positions, table, weight)
    launch(model, "rope_and_cache", (T,),
           qkv, x, table, positions, slots, caches[0], caches[1], np.float32(0.3), None, weight, None)
    used = slots >= 0
    close(qkv.reshape(T, H + 2 * K, h)[used, :H], q[used])
    pages = slots[used] // B
    offsets = slots[used] % B
    for which, want in enumerate((k[used], v[used])):
        got = caches[which, pages, :, offsets]
        # The kernel's rounding to float32 may take a number over a border of two codes.
        slack = 1e-5 * abs(want) + 1e-6
        below = to_codes(want - slack)
        above = to_codes(want + slack)
        assert ((got == below) | (got == above)).all() and np.mean(below == above) > 0.99
        assert abs(want).max() > 448 and abs(from_codes(got)).max() == 448
    caches[:, pages, :, offsets] = 0x7f
    assert (caches == 0x7f).all(), "written outside of the slots"


# paged_attention
def attention_twin(q, keys, values):
    """[h], for one head's query at position p: q [h], keys and values [p + 1, h].

    q is already multiplied by log2(e) / sqrt(h).
    """
    scores = np.float64(keys) @ np.float64(q)
    p = np.exp2(scores - scores.max())
    return p / p.sum() @ np.float64(values)


RAGGED = [(1, 1), (1, 16), (5, 5), (1, 17), (13, 300), (1, 129), (8, 8), (9, 41), (0, 33), (17, 64), (1, 0),
          (5, 3), (1, 601), (9, 530)]       # (queries, context) of each sequence


def paged_cache(model, batch, rng, scale):
    """(caches [2, N, K, B, h], tables [S, pages], keys, values) of sequences with shuffled pages.

    Slots without an owner are NaN. Unused table entries point nowhere.
    """
    _, K, h, B = attention_sizes(model)
    counts = [-(-context // B) for _, context in batch]
    N = sum(counts) + 3
    max_blocks = max(counts) + 2
    pages = iter(rng.permutation(N).tolist())
    caches = poisoned_cache(model, 2, N, K, B, h)
    tables = np.full((len(batch), max_blocks), -(1 << 30), np.int32)
    keys = []
    values = []
    for s, (_, context) in enumerate(batch):
        tables[s, :counts[s]] = [next(pages) for _ in range(counts[s])]
        keys.append(randn(rng, context, K, h, scale=scale))
        values.append(randn(rng, context, K, h))
        for which, numbers in enumerate((keys, values)):
            stored = to_codes(numbers[s]) if model["FP8_CACHE"] else numbers[s]
            for t in range(context):
                caches[which, tables[s, t // B], :, t % B] = stored[t]
            if model["FP8_CACHE"]:
                numbers[s] = from_codes(stored)
    return caches, tables, keys, values


def check_attention(model, batch, scale=1.0, splits=1):
    """A launch for a batch of (queries, context) equals the twin in each query and head."""
    rng = RNG(4)
    H, K, h, _ = attention_sizes(model)
    T = sum(queries for queries, _ in batch)
    caches, tables, keys, values = paged_cache(model, batch, rng, scale)
    S, max_blocks = tables.shape
    qkv = poison(T, H + 2 * K, h)
    qkv[:, :H] = randn(rng, T, H, h, scale=scale * np.log2(np.e) / np.sqrt(h))
    out = poison(T + 1, H, h)
    partial = poison(T, H, splits, h + 2, dtype=np.float32)
    cu_seqlens = ints(np.cumsum([0] + [queries for queries, _ in batch]))
    name = "decode_attention" if all(queries == 1 for queries, _ in batch) else "paged_attention"
    rows = compiled(model).ATTENTION_ROWS
    tiles = [(s, row) for s, (queries, _) in enumerate(batch) for row in range(0, queries * H // K, rows)]
    table_starts = ints(range(0, S * max_blocks + 1, max_blocks))
    contexts = ints([context for _, context in batch])

    def attend(k_cache, v_cache):
        launch(model, name, (K * splits, len(tiles)), out, qkv, k_cache, v_cache, tables, table_starts,
               cu_seqlens, contexts, ints(tiles).ravel(), partial)

    def shuffle(seed):
        if not ON_GPU:
            compiled(model).module.shuffle(seed)

    # The first launch leaves NaN in shared memory for the next one.
    attend(*poisoned_cache(model, *caches.shape))
    out[...] = NAN
    attend(*caches)
    if splits > 1:      # thread blocks in another order, as a GPU promises none: the same bits
        first = out.copy()
        shuffle(1)
        attend(*caches)
        shuffle(int(os.environ.get("SIMULATOR_SHUFFLE", 0)))
        assert first.tobytes() == out.tobytes()
    want = np.zeros((T, H, h))
    for s, (queries, context) in enumerate(batch):
        for i in range(queries):
            t = cu_seqlens[s] + i
            seen = context - queries + i + 1                # keys up to the query's own position
            for head in range(H if seen > 0 else 0):
                kv = head // (H // K)
                want[t, head] = attention_twin(qkv[t, head], keys[s][:seen, kv], values[s][:seen, kv])
    close(out[:T], want, floor=4e-3)
    assert np.isnan(np.float32(out[T])).all()


@every_cache
@pytest.mark.parametrize("splits", [1, 3])
def test_attention_ragged(model, splits):
    check_attention(model, RAGGED, splits=splits)
    decodes = [(queries, context) for queries, context in RAGGED if queries == 1]
    check_attention(model, decodes, splits=splits)          # by decode_attention


@pytest.mark.parametrize("queries, context", [
    (1, 1), (1, 15), (1, 16), (1, 17), (1, 127), (1, 128), (1, 129), (16, 16), (17, 17), (7, 135), (8, 129),
    (130, 130), (33, 257), (1, 1800)])
def test_attention_one_sequence(queries, context):
    for model in BASE, CODES:
        check_attention(model, [(queries, context)])
        check_attention(model, [(queries, context)], splits=7)


@pytest.mark.parametrize("model, scale", [
    (BASE, 3.0), (BASE, 30.0), (BASE, 1e9), (MODELS[2], 30.0), (MODELS[4], 30.0), (CODES, 30.0),
    (CODES, 1e9)])
def test_attention_extreme_scores(model, scale):
    """Scores differ by thousands: one key gets all the weight, and nothing overflows on the way."""
    check_attention(model, RAGGED, scale)
    check_attention(model, RAGGED, scale, splits=2)


@pytest.mark.skipif(ON_GPU, reason="would copy gigabytes; in the simulator, untouched memory costs nothing")
def test_offsets_need_64_bits():
    """The last page of a cache, and the last row of a table, of more than 2^31 elements."""
    H, K, h, B = attention_sizes(BASE)
    N = 2 ** 31 // (K * B * h) + 2
    cache = np.empty((N, K, B, h), bfloat16)
    T = 3
    page = N - 1
    rng = RNG(5)
    qkv = randn(rng, T, H + 2 * K, h)
    x = randn(rng, T, BASE["HIDDEN"])
    slots = np.int64(page) * B + np.arange(T)
    v = (qkv[:, -1] * inverse_rms_twin(x)).astype(bfloat16)
    launch(BASE, "rope_and_cache", (T,),
           qkv, x, rope_table(T, h), ints(range(T)), slots, np.empty_like(cache), cache, np.float32(1),
           None, None, None)
    close(cache[page, 0, :T], v)
    out = poison(T, H, h)
    launch(BASE, "paged_attention", (K, 1), out, qkv, cache, cache, ints([page]), ints([0, 1]), ints([0, T]),
           ints([T]), ints([0, 0]), None)
    close(out[-1], [attention_twin(q, v, v) for q in qkv[-1, :H]], floor=4e-3)
    table = np.empty((2 ** 31 // 144 + 2, 144), bfloat16)
    row = randn(rng, 144)
    one = poison(1, 144)
    table[-1] = row
    launch(BASE, "gather_rows", (1,), one, table, ints([len(table) - 1]), None)
    assert (one[0] == row).all()


# silu_mul
@every_model
def test_silu_mul(model):
    rng = RNG(6)
    ffn = model["FFN"]
    gate_up = randn(rng, 3, 2 * ffn, scale=12)
    x = randn(rng, 3, model["HIDDEN"], scale=3)
    out = poison(4, ffn)
    gate_up[0, :4] = [-1e30, 1e30, -100, 0]
    gate, up = np.split(gate_up * inverse_rms_twin(x), 2, -1)
    grid = (-(-ffn // compiled(model).SILU_COLUMNS), 3)
    launch(model, "silu_mul", grid, out, gate_up, x, None, None, None)
    with np.errstate(over="ignore"):
        close(out[:3], gate / (1 + np.exp(-gate)) * up)
    assert np.isnan(np.float32(out[3])).all()


# sample
NEUTRAL = (0, 0, 1)                         # presence, frequency and repetition penalty
ENTRY = np.dtype([("token", np.int32), ("count", np.int32), ("bias", np.float32)])


def changed_twin(logits, entries, newest, penalties):
    """The logits [V] for the choice, in float32. entries: [(token, count, bias)]; newest: -1, or a token
    that the entries do not count."""
    bias = np.zeros(len(logits), np.float32)
    count = np.full(len(logits), -1)        # of the answer; 0: in the prompt alone; -1: nowhere
    for token, number, added in entries:
        bias[token] = added
        count[token] = number
    if newest >= 0:
        count[newest] = max(count[newest], 0) + 1
    presence, frequency, repetition = floats(penalties)
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.float32(logits) + bias
        x = np.where(count < 0, x, np.where(x > 0, x / repetition, x * repetition))
        x = x - frequency * np.float32(np.maximum(count, 0)) - presence * (count > 0)
        return np.minimum(x, np.float32(3.4e38))


def kept_twin(logits, temperature, k, p, min_p=0.0):
    """Probabilities [V] after min_p, top-k and top-p, in this order; a token that one cuts off has 0."""
    x = np.float64(logits)
    with np.errstate(divide="ignore"):
        keep = (x.max() - x) / temperature <= -np.log(min_p)
    if 0 < k < len(x):
        keep &= x >= np.sort(x[keep])[-min(k, keep.sum())]
    weights = np.where(keep, np.exp((x - x.max()) / temperature), 0)
    if p < 1:
        falling = np.sort(x[keep])[::-1]
        mass = np.cumsum(np.exp((falling - x.max()) / temperature))
        lowest = falling[np.argmax(mass >= max(p * mass[-1], 1e-12))]
        weights[x < lowest] = 0
    return weights / weights.sum()


def noise_twin(seed, position, tokens):
    """For each token, -log of an exponential random number."""
    u64 = np.uint64
    golden = u64(0x9e3779b97f4a7c15)

    def scramble(z):
        z = (z ^ z >> u64(32)) * u64(0xdca4631cfa6051f5)
        z = (z ^ z >> u64(29)) * u64(0x8de1134a212a3ef5)
        return z ^ z >> u64(32)

    with np.errstate(over="ignore", divide="ignore"):
        stream = scramble(scramble(u64(seed) + golden) + u64(position))
        bits = scramble(stream + tokens.astype(u64) * golden) | u64(1)
        return -np.log(-np.log1p(-bits.astype(np.float64) * 2.0 ** -64))


def assert_drawn(token, logits, temperature, k, p, seed, position, min_p=0.0):
    """Of the tokens that min_p, top-k and top-p keep, `token` has the greatest sum of logit and noise.
    Where the temperature is 0, `token` has the greatest logit: of several, it is the lowest token."""
    x = np.float64(logits)
    if temperature == 0:
        assert token == x.argmax(), (token, x.argmax())
        return
    t = np.float64(np.float32(temperature))
    noise = noise_twin(seed, position, np.arange(len(x)))
    kept = kept_twin(x, t, k, np.float32(p), np.float32(min_p)) > 0
    score = np.where(kept, (x - x.max()) / t + noise, -np.inf)
    assert score[token] > score.max() - 1e-4, (token, score.argmax())


def log_softmax_twin(logits):
    """Of each row of logits [S, V]. NaN for a row with a NaN, a +inf, or nothing above -inf."""
    x = np.float64(logits)
    with np.errstate(invalid="ignore"):
        shifted = x - x.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def model_of(V):
    """The model with this vocabulary."""
    return next(model for model in MODELS if model["VOCAB"] == V)


def with_masks(lists, allowed):
    """(lists with masks behind, where each mask begins or -1). Bits past the vocabulary are random."""
    parts = [lists]
    starts = []
    for mask in allowed:
        starts.append(-1 if mask is None else sum(map(len, parts)))
        if mask is not None:
            bits = np.concatenate([mask, RNG(1).random(-len(mask) % 32) < 0.5])
            weights = np.uint32(1) << np.arange(32, dtype=np.uint32)
            parts.append((bits.reshape(-1, 32) * weights).sum(1, dtype=np.uint32).view(np.int32))
    return np.concatenate(parts), ints(starts)


def sample(logits, temperature, k=0, p=1.0, seed=0, position=0, *, min_p=0.0, given=-1, penalties=NEUTRAL,
           entries=None, newest=-1, allowed=None):
    """(tokens [S], log-probabilities [S]) for logits [S, V]. entries: of S requests, see changed_twin.
    allowed: of S requests, the tokens [V] that a mask allows, or None for no mask.

    Each other argument is one value for every request, or S of them.
    """
    logits = np.atleast_2d(np.asarray(logits, bfloat16))
    S, V = logits.shape

    def column(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype), S).copy()

    token_ids = column(newest, np.int32)[::-1].copy()                   # in another order than the rows
    index = np.where(token_ids[::-1] < 0, -1, np.arange(S)[::-1]).astype(np.int32)
    spare = (-1, -1, 0)
    rows = [[*row, spare] if i >= 0 else row for row, i in zip(entries or [[]] * S, index)]
    guard = (1, 2, 3)
    lists = np.array([guard, *itertools.chain(*rows), guard], ENTRY)
    cu_entries = ints(np.cumsum([3] + [3 * len(row) for row in rows]))
    lists, mask_starts = with_masks(lists.view(np.int32), allowed or [None] * S)
    token = poison(S + 1, dtype=np.int32)
    logprob = np.full(S + 1, 77, np.float32)
    want = log_softmax_twin(logits)
    before = logits.tobytes()
    launch(model_of(V), "sample", (S,), token, logprob, logits, column(temperature, np.float32),
           column(k, np.int32), column(p, np.float32), column(min_p, np.float32), column(seed, np.uint64),
           column(position, np.int32), column(given, np.int32),
           np.broadcast_to(floats(penalties), (S, 3)).copy(), lists, cu_entries, index, token_ids,
           mask_starts)
    assert token[S] == -77 and logprob[S] == 77
    assert lists[:3].tobytes() == lists[cu_entries[-1]:][:3].tobytes() == np.array(guard, ENTRY).tobytes()
    assert logits.tobytes() == before
    token = token[:S]
    assert ((token >= 0) & (token < V)).all(), token
    want = want[np.arange(S), token]
    assert np.allclose(logprob[:S], want, rtol=1e-5, atol=1e-5, equal_nan=True), (logprob[:S], want)
    return token, logprob[:S]


@every_model
def test_greedy(model):
    rng = RNG(7)
    V = model["VOCAB"]
    logits = randn(rng, 9, V, scale=3)
    logits[1] = -5                          # all are equal: the first wins
    logits[2, [V // 2, V - 1]] = 90         # two are equal: the first wins
    logits[3] = -np.inf
    logits[3, V - 2] = -1e30
    logits[4] = -1
    logits[4, [1, 3]] = [-0.0, 0.0]
    logits[5] = 3e38
    logits[5, 4] = 3.3e38
    token, _ = sample(logits, 0.0, k=3, p=0.5)
    assert (token == np.argmax(np.float64(logits), -1)).all()


def rows_to_sample(rng):
    """(logits [24, 1001], temperatures, seeds, positions): rows with ties, and rows with few tokens."""
    S = 24
    V = 1001
    logits = randn(rng, S, V, scale=2)
    logits[1::4] = np.round(np.float32(logits[1::4]))       # many ties
    logits[2::4, rng.random(V) < 0.9] = -np.inf             # fewer than k are left
    temperature = rng.uniform(0.3, 2, S)
    seed = rng.integers(0, 1 << 63, S)
    position = rng.integers(0, 10 ** 6, S)
    return logits, temperature, seed, position


@pytest.mark.parametrize("k, p", [
    (0, 1.0), (1, 1.0), (7, 1.0), (5000, 1.0), (1001, 1.0), (1000, 1.0), (0, 0.0), (0, 1e-9), (0, 0.3),
    (0, 0.9), (0, 0.999), (0, 0.9999999), (50, 0.8), (3, 0.5), (1, 0.01), (300, 0.95)])
def test_sample_equals_its_twin(k, p):
    logits, temperature, seed, position = rows_to_sample(RNG(8))
    token, _ = sample(logits, temperature, k, p, seed, position)
    for s in range(len(logits)):
        assert_drawn(token[s], logits[s], temperature[s], k, p, seed[s], position[s])


def test_sample_keeps_ties_together():
    logits = np.full(1001, -3.0)
    logits[[5, 600, 900, 1000]] = 2.0
    logits[[0, 7]] = 1.0
    seeds = np.arange(100)

    def seen(**cut):
        return set(sample(np.tile(logits, (100, 1)), 1.0, seed=seeds, **cut)[0].tolist())

    assert seen(k=1) == seen(k=4) == seen(p=0.01) == {5, 600, 900, 1000}
    assert seen(k=5) == seen(k=6) == {0, 5, 7, 600, 900, 1000}
    zeros = np.full(1001, -9.0)
    zeros[3] = 0.0
    zeros[4] = -0.0                         # equal to 0.0, with other bits
    assert set(sample(np.tile(zeros, (40, 1)), 1.0, k=1, seed=seeds[:40])[0].tolist()) == {3, 4}


def test_sample_at_extreme_temperatures_and_logits():
    rng = RNG(9)
    logits = randn(rng, 12, 1001, scale=3)
    logits[:, 77] = 40
    logits[6:] *= bfloat16(1e30)
    for temperature in 1e-4, 1e-30, 1e-45:
        for cut in {}, {"k": 5, "p": 0.9}:
            token, _ = sample(logits, temperature, seed=range(12), **cut)
            assert (token == np.argmax(np.float64(logits), -1)).all()
    hot, _ = sample(logits[:6], 1e30, k=0, seed=range(6))
    assert len(set(hot.tolist())) > 3


def test_sample_depends_on_seed_and_position_alone():
    """The same bits for a request in every row of a batch, at every alignment, in any company."""
    rng = RNG(10)
    mine = randn(rng, 1001, scale=2)
    S = 16
    token, logprob = sample(np.tile(mine, (S, 1)), 0.8, k=400, p=0.95, seed=123, position=45)
    assert len(set(token.tolist())) == 1 and len(set(logprob.tolist())) == 1
    batch = randn(rng, S, 1001, scale=2)
    seed = np.full(S, 9)
    position = np.arange(S)
    k = np.full(S, 3)
    batch[11] = mine
    seed[11] = 123
    position[11] = 45
    k[11] = 400
    assert sample(batch, 0.8, k, 0.95, seed, position)[0][11] == token[0]
    other, _ = sample(np.tile(mine, (S, 1)), 1.0, seed=5, position=range(S))
    assert len(set(other.tolist())) > S // 2


@pytest.mark.parametrize("by", ["seed", "position"])
def test_sample_draws_the_distribution(by):
    """Chi-square of 3,000 draws over about 20 kept tokens.

    At 5 sigma, a right sampler fails for one set of numbers in a million.
    """
    rng = RNG(11)
    n = 3000
    logits = randn(rng, 1001, scale=2)
    p = kept_twin(logits, 1.3, 25, np.float32(0.9))
    token, _ = sample(np.tile(logits, (n, 1)), 1.3, 25, 0.9, **{by: np.arange(n)})
    counts = np.bincount(token, minlength=1001)
    kept = p > 0
    assert not counts[~kept].any()
    chi2 = ((counts - n * p)[kept] ** 2 / (n * p[kept])).sum()
    freedom = kept.sum() - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom), (chi2, freedom)


def test_noise_is_exact_in_the_tail():
    """100,000 tokens at exp(-25) share 1e-6 of the mass; noise of 24 bits gives them more."""
    tokens = np.arange(1, 100_001)
    first = np.zeros(1, int)
    wins = sum(noise_twin(seed, 0, tokens).max() - 25 > noise_twin(seed, 0, first)[0] for seed in range(500))
    assert wins <= 1
    uniform = np.exp(-np.exp(-noise_twin(3, 4, np.arange(1 << 17))))
    counts = np.histogram(uniform, 64, (0, 1))[0]
    assert ((counts - 2048.0) ** 2 / 2048).sum() < 63 + 5 * math.sqrt(126)


# Changed logits
def random_changes(rng, logits, most=40, step=1 / 64):
    """Arguments of sample() for logits [S, V]: up to `most` entries in most rows, penalties, and a newest
    token. Most of the tokens are probable ones.

    Biases and penalties are multiples of `step`: float32 sums have no rounding, but ties.
    """
    S, V = logits.shape
    entries = []
    newest = []
    for row in np.float32(logits):
        tokens = np.argsort(-row - 4 * rng.standard_normal(V))[:min(V, most)]
        tokens = rng.permutation(tokens)[:rng.integers(0, len(tokens) + 1) * (rng.random() < 0.8)]
        counts = rng.integers(-1, 4, len(tokens))
        biases = step * np.round(rng.uniform(-2, 2, len(tokens)) / step) * (rng.random(len(tokens)) < 0.5)
        biases[rng.random(len(tokens)) < 0.1] = -np.inf
        entries.append(list(zip(tokens, counts, biases)))
        newest.append(rng.choice([-1, row.argmax(), *tokens[:3]]))      # with an entry, or without
    penalties = step * np.round(rng.uniform(-2, 2, (S, 3)) / step)
    penalties[:, 2] = rng.choice([0.5, 0.75, 1, 1.25, 2], S)
    return dict(entries=entries, newest=newest, penalties=penalties)


def changed_rows(logits, entries, newest, penalties):
    return np.stack([changed_twin(*row) for row in zip(logits, entries, newest, penalties)])


@pytest.mark.parametrize("entries, newest, want", [
    ([], -1, 8), ([(10, -1, 0)], -1, 8), ([(10, 0, 0)], -1, 4), ([(10, 2, 0)], -1, 3),
    ([], 10, 3.25), ([(10, -1, 0)], 10, 3.25), ([(10, 0, 0)], 10, 3.25), ([(10, 2, 0)], 10, 2.75),
    ([(10, -1, 1)], 10, 3.75), ([(10, 1, -16)], -1, -16.75), ([(9, 4, 9), (11, 0, 0)], 10, 3.25)])
def test_sample_changes_a_logit(entries, newest, want):
    """A logit of 8, by hand: plus bias; halved in a text, or doubled below 0; minus 0.5 and 0.25 a count."""
    logits = np.full((2, 1001), -100, np.float32)
    logits[:, 10] = 8
    logits[:, 700] = [want - 0.125, want + 0.125]
    token, _ = sample(logits, 0.0, entries=[entries] * 2, newest=newest, penalties=(0.5, 0.25, 2))
    assert token.tolist() == [10, 700]


@every_model
def test_sample_greedily_of_changed_logits(model):
    """Rows with and without entries together. Of equal logits, changed or not, the lowest token wins."""
    rng = RNG(20)
    V = model["VOCAB"]
    S = 24
    logits = np.round(2 * rng.standard_normal((S, V))).astype(bfloat16)
    changes = random_changes(rng, logits, most=2000, step=1)
    changed = changed_rows(logits, **changes)
    token, _ = sample(logits, 0.0, k=3, p=0.5, min_p=0.5, **changes)
    assert (token == changed.argmax(-1)).all()
    assert (changed.argmax(-1) != np.float32(logits).argmax(-1)).any()


@pytest.mark.parametrize("k, p, min_p", [
    (0, 1.0, 0), (0, 1.0, 0.05), (0, 1.0, 1), (7, 1.0, 0), (1000, 1.0, 0), (1000, 1.0, 0.01), (40, 1.0, 0.3),
    (0, 0.9, 0), (0, 0.0, 0), (0, 0.999, 1e-4), (50, 0.8, 0), (3, 0.5, 0.2), (300, 0.95, 0.01)])
def test_sample_of_changed_logits_equals_its_twin(k, p, min_p):
    rng = RNG(21)
    logits, temperature, seed, position = rows_to_sample(rng)
    changes = random_changes(rng, logits, most=logits.shape[1])
    token, _ = sample(logits, temperature, k, p, seed, position, min_p=min_p, **changes)
    for s, changed in enumerate(changed_rows(logits, **changes)):
        assert_drawn(token[s], changed, temperature[s], k, p, seed[s], position[s], min_p)


def test_sample_with_entries_in_any_order_and_company():
    """The same token, wherever entries stand; a row's log-probabilities are those of the raw logits."""
    rng = RNG(22)
    S = 16
    logits = np.tile(randn(rng, 1001, scale=2), (S, 1))
    own = [(t, rng.integers(-1, 4), rng.uniform(-2, 2)) for t in rng.permutation(1001)[:300]]
    penalties = (0.5, -0.25, 1.25)
    for newest in -1, own[5][0], 1000:
        entries = [[own[i] for i in rng.permutation(len(own))] for _ in range(S)]
        token, logprob = sample(logits, 0.8, 400, 0.95, 123, 45, min_p=1e-3, entries=entries, newest=newest,
                                penalties=penalties)
        assert len(set(token.tolist())) == 1 and len(set(logprob.tolist())) == 1
        other = random_changes(rng, logits, most=300)
        for name, value in dict(entries=entries[0], newest=newest, penalties=penalties).items():
            other[name][11] = value
        assert sample(logits, 0.8, 400, 0.95, 123, 45, min_p=1e-3, **other)[0][11] == token[0]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("k, p, min_p", [(0, 1.0, 0), (30, 1.0, 0), (0, 0.9, 0), (30, 0.9, 0.01)])
def test_sample_with_entries_that_change_nothing(temperature, k, p, min_p):
    """Such a row passes through float32 keys, and gives the token of a row without entries."""
    rng = RNG(23)
    S = 40
    logits = randn(rng, S, 1001)
    logits[0] = 1
    plain = sample(logits, temperature, k, p, range(S), min_p=min_p)
    entries = [[(t, rng.integers(-1, 3), 0) for t in rng.permutation(1001)[:n]]
               for n in rng.integers(1, 1002, S)]
    entries[0] = [(t, -1, 0) for t in range(0, 1001, 2)]    # a thread that has token 0 also has token 1
    listed = sample(logits, temperature, k, p, range(S), min_p=min_p, entries=entries,
                    newest=rng.integers(-1, 1001, S))
    assert (plain[0] == listed[0]).all() and (plain[1] == listed[1]).all()


def test_sample_with_thousands_of_entries():
    """Thousands of entries. best_logprobs reads the row after `sample`: it finds the raw logits."""
    rng = RNG(24)
    V = 128256
    logits = randn(rng, 4, V, scale=3)
    order = np.argsort(-np.float64(logits), -1, kind="stable")
    entries = [[(t, 1, bias) for t in row[1:n]]             # the most probable tokens, but for the first
               for row, n, bias in zip(order, [20_000, 3000, 0, 1026], [-50, -0.1, 0, -1])]
    newest = [order[0, 0], order[1, 2], -1, order[3, 0]]    # without an entry, with one, none, without
    changes = dict(entries=entries, newest=newest, penalties=[[0.5, 0.25, 3]] * 4)
    temperature = [100, 0.0, 1.0, 1.0]
    k = [1000, 0, 40, 1]                    # of the 1,000 best in the first row, none was near the best
    p = [1.0, 1.0, 0.9, 1.0]
    token, _ = sample(logits, temperature, k, p, 9, range(4), **changes)
    for s, changed in enumerate(changed_rows(logits, **changes)):
        assert_drawn(token[s], changed, temperature[s], k[s], p[s], 9, s)
    best = poison(4, 5, dtype=np.int32)
    launch(model_of(V), "best_logprobs", (4,), best, np.zeros((4, 5), np.float32), logits, 5)
    assert (best == order[:, :5]).all()


def test_sample_counts_changes_below_a_step_of_bf16():
    """Penalties and biases count in full: logits of 20 are 0.125 apart."""
    logits = np.full((6, 1001), -5, np.float32)
    logits[:, 10] = 20
    logits[:3, 700] = 20
    logits[3:, 700] = 20 - 0.125
    one = [(10, 1, 0)]
    biased = [(10, -1, -0.05)]
    entries = [one, biased, [], one, biased, []]
    token, _ = sample(logits, 0.0, entries=entries, penalties=(0.05, 0, 1))
    assert token.tolist() == [700, 700, 10, 10, 10, 10]
    # 0.1 after a temperature of 0.01 is a factor of exp(10).
    many = dict(seed=range(50), entries=[one] * 50)
    token, _ = sample(np.tile(logits[0], (50, 1)), 0.005, penalties=(0, 0.1, 1), **many)
    assert (token == 700).all()             # exp(0.1 / 0.005) times as probable as token 10
    token, _ = sample(np.tile(logits[0], (50, 1)), 1.0, k=1, penalties=(-2.0 ** -15, 0, 1), **many)
    assert (token == 10).all()              # the logits are not equal any more: 20 + 2^-15 is a float32


@pytest.mark.parametrize("V", [5, 7, 1001])
@pytest.mark.parametrize("temperature, k, p", [(0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 2, 0.9)])
def test_sample_with_bans(V, temperature, k, p):
    """A banned token is not chosen while another is left; if all are banned, no harm is done."""
    rng = RNG(25)
    S = 20
    logits = randn(rng, S, V)
    left = rng.integers(0, V, S)
    banned = [[(t, -1, -np.inf) for t in rng.permutation(V) if t != left[s]] for s in range(S)]
    logits[np.arange(S), left] = -30        # improbable before
    for newest in -1, left:                 # the ban stays, whether the spare entry is used or not
        token, _ = sample(logits, temperature, k, p, range(S), entries=banned, newest=newest, min_p=0.5)
        assert (token == left).all()
    all_banned = [(t, 0, -np.inf) for t in range(V)]
    _, logprob = sample(logits, temperature, k, p, range(S), entries=[all_banned] * S)
    assert np.isfinite(logprob).all()
    finite = logits.copy()
    finite[:, 1:] = -np.inf                 # the only token of the model is banned
    sample(finite, temperature, k, p, range(S), entries=[[(0, -1, -np.inf)]] * S)


@pytest.mark.parametrize("position, left", [(7710, 940), (341137, 478)])
def test_sample_never_draws_a_banned_token(position, left):
    """Of the noise of the only token that is left, 1 - u is so near to 0 that as a float32 u would be 1."""
    assert noise_twin(0, position, np.array([left])) < np.log(1 / -np.log(2.0 ** -25))
    logits = np.zeros((3, 1001))
    logits[0, np.arange(1001) != left] = -np.inf
    masks = [None, np.arange(1001) == left, None]
    biases = [(t, -1, -np.inf) for t in range(1001) if t != left]
    token, _ = sample(logits, 1.0, seed=0, position=position, allowed=masks, entries=[[], [], biases])
    assert token.tolist() == [left] * 3


def test_sample_with_extreme_repetition_penalties():
    """x / 1e-40 would be inf, and inf - inf NaN: such tokens are equal, and the only ones to be drawn."""
    logits = np.full((30, 1001), 3.0)
    logits[:, 8] = -2
    entries = [[(500, 0, 0), (40, 3, 0), (8, 1, 0)]] * 30
    for repetition in 1e-40, 3.4e38:
        seen = set()
        for cut in {}, {"k": 1}, {"p": 0.5}, {"min_p": 0.9}, {"temperature": 0.0}:
            cut = {"temperature": 1.0} | cut
            token, _ = sample(logits, seed=range(30), entries=entries, penalties=(0, 0, repetition), **cut)
            seen |= set(token.tolist())
            if cut["temperature"] == 0:
                assert (token == (40 if repetition < 1 else 0)).all()
        assert seen == {40, 500} if repetition < 1 else not seen & {8, 40, 500}


def test_sample_of_given_tokens():
    """The log-probability of a token that is not chosen, beside rows that are drawn."""
    rng = RNG(26)
    S = 30
    logits = randn(rng, S, 1001, scale=2)
    logits[0, 5] = -np.inf
    free = sample(logits, 0.7, 40, 0.9, range(S))[0]
    given = np.where(np.arange(S) % 3 == 0, rng.integers(0, 1001, S), -1)
    given[0] = 5
    token, logprob = sample(logits, 0.7, 40, 0.9, range(S), given=given)
    assert (token == np.where(given < 0, free, given)).all() and logprob[0] == -np.inf


def test_sample_draws_the_changed_distribution():
    """Chi-square of draws of one row with penalties, as in test_sample_draws_the_distribution."""
    rng = RNG(27)
    n = 1500
    logits = randn(rng, 1001, scale=2)
    order = np.argsort(-np.float32(logits))
    entries = [(order[0], 2, 0), (order[1], 0, 0), (order[3], -1, -0.7), (order[4], -1, -np.inf),
               (order[60], -1, 3)]
    penalties = (0.1, 0.2, 1.05)
    p = kept_twin(changed_twin(logits, entries, order[2], penalties), 1.3, 25, np.float32(0.9), 0.03)
    token, _ = sample(np.tile(logits, (n, 1)), 1.3, 25, 0.9, range(n), min_p=0.03, entries=[entries] * n,
                      newest=order[2], penalties=penalties)
    counts = np.bincount(token, minlength=1001)
    kept = p > 0
    assert not counts[~kept].any() and kept[order[[0, 1, 2, 3, 60]]].all()
    chi2 = ((counts - n * p)[kept] ** 2 / (n * p[kept])).sum()
    freedom = kept.sum() - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom), (chi2, freedom)


# Masks
def masked(logits, allowed):
    """float32 logits [S, V], -inf for the tokens that a mask bans."""
    return np.stack([np.float32(row) if mask is None else np.where(mask, row, -np.inf).astype(np.float32)
                     for row, mask in zip(logits, allowed)])


def random_masks(rng, S, V):
    """Masks of all densities, of a single token, and none."""
    masks = [rng.random(V) < rng.choice([0.003, 0.1, 0.5, 0.99]) for _ in range(S)]
    for mask in masks:
        mask[rng.integers(V)] = True
    masks[0] = np.arange(V) == V - 1
    masks[1] = np.arange(V) == 0
    return [None if rng.random() < 0.2 else mask for mask in masks]


@every_model
def test_sample_greedily_of_allowed_tokens(model):
    """Rows with and without masks together, with and without entries. Rows lie at odd addresses too."""
    rng = RNG(30)
    V = model["VOCAB"]
    S = 20
    logits = np.round(2 * rng.standard_normal((S, V))).astype(bfloat16)
    logits[2] = logits[3] = -1e38           # far below the logits, but above -inf
    masks = random_masks(rng, S, V)
    token, _ = sample(logits, 0.0, allowed=masks)
    assert (token == masked(logits, masks).argmax(-1)).all()
    changes = random_changes(rng, logits, most=200, step=1)
    token, _ = sample(logits, 0.0, allowed=masks, **changes)
    changed = masked(changed_rows(logits, **changes), masks)
    possible = changed.max(-1) > -np.inf
    assert (token == changed.argmax(-1))[possible].all() and possible.sum() >= 10


@pytest.mark.parametrize("k, p, min_p", [
    (0, 1.0, 0), (0, 1.0, 0.05), (7, 1.0, 0), (1000, 1.0, 0), (1, 1.0, 0), (0, 0.9, 0), (0, 0.0, 0),
    (0, 0.999, 1e-4), (50, 0.8, 0), (300, 0.95, 0.01)])
def test_sample_of_allowed_tokens_equals_its_twin(k, p, min_p):
    """The cuts see allowed tokens only. Rows without a mask are drawn as without such company."""
    rng = RNG(31)
    S = 24
    V = 1001
    logits = randn(rng, S, V, scale=2)
    logits[1::4] = np.round(np.float32(logits[1::4]))       # many ties
    temperature = rng.uniform(0.3, 2, S)
    seed = rng.integers(0, 1 << 63, S)
    position = rng.integers(0, 10 ** 6, S)
    masks = random_masks(rng, S, V)
    drawn = (temperature, k, p, seed, position)
    token, _ = sample(logits, *drawn, min_p=min_p, allowed=masks)
    for s, row in enumerate(masked(logits, masks)):
        assert_drawn(token[s], row, temperature[s], k, p, seed[s], position[s], min_p)
    free = np.array([mask is None for mask in masks])
    assert (token == sample(logits, *drawn, min_p=min_p)[0])[free].all() and free.any()
    changes = random_changes(rng, logits, most=V)
    token, _ = sample(logits, *drawn, min_p=min_p, allowed=masks, **changes)
    for s, row in enumerate(masked(changed_rows(logits, **changes), masks)):
        if row.max() > -np.inf:
            assert_drawn(token[s], row, temperature[s], k, p, seed[s], position[s], min_p)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_sample_with_a_mask_that_allows_all_or_nothing(temperature):
    """All: the token of a row without a mask. Nothing: some token, whose log-probability is right."""
    rng = RNG(32)
    logits = randn(rng, 16, 999)
    every = [np.ones(999, bool)] * 16
    for cut in {}, {"k": 30}, {"p": 0.9, "min_p": 0.01}:
        plain = sample(logits, temperature, seed=range(16), **cut)
        listed = sample(logits, temperature, seed=range(16), allowed=every, **cut)
        assert (plain[0] == listed[0]).all() and (plain[1] == listed[1]).all()
        sample(logits, temperature, seed=range(16), allowed=[~every[0]] * 16, **cut)


def test_sample_random_rows():
    """Fuzz: rows of all kinds beside one another, each drawn as its twin says.

    TINYVLLM_FUZZ=N makes N rounds.
    """
    for number in range(int(os.environ.get("TINYVLLM_FUZZ", 0)) or 8):
        rng = RNG(number)
        V = int(rng.choice([5, 8, 100, 1001]))
        S = 12
        # Few distinct values make ties; a wide spread makes weights that vanish.
        logits = np.float32(rng.standard_normal((S, V)) * 10.0 ** rng.uniform(-2, 3, (S, 1)))
        logits = np.where(rng.random((S, 1)) < 0.3, np.round(logits), logits).astype(bfloat16)
        logits[rng.random((S, V)) < 0.1] = -np.inf
        logits[:, 0] = 0                            # never nothing but -inf
        bad = rng.random(S) < 0.2
        logits[bad, rng.integers(0, V)] = rng.choice([np.nan, np.inf])
        temperature = np.where(rng.random(S) < 0.3, 0, 10.0 ** rng.uniform(-3, 2, S))
        k = rng.integers(-1, V + 2, S)
        p = np.where(rng.random(S) < 0.3, 1, rng.random(S))
        seed = rng.integers(0, 2**63, S)
        position = rng.integers(0, 100_000, S)
        min_p = np.where(rng.random(S) < 0.5, 0, rng.random(S))
        changes = random_changes(rng, logits)
        masks = random_masks(rng, S, V)
        tokens, logprobs = sample(logits, temperature, k, p, seed, position, min_p=min_p, allowed=masks,
                                  **changes)
        assert (np.isnan(logprobs) == bad).all(), number
        for row, changed in enumerate(masked(changed_rows(logits, **changes), masks)):
            if not bad[row] and changed.max() > -np.inf:        # else there is nothing to choose from
                assert_drawn(tokens[row], changed, temperature[row], k[row], p[row], seed[row],
                             position[row], min_p[row])


def test_sample_large_vocabulary():
    rng = RNG(12)
    logits = randn(rng, 3, 128256, scale=3)
    token, _ = sample(logits, [0.0, 0.7, 1.0], [0, 40, 0], [1.0, 1.0, 0.9], [1, 2, 3], [4, 5, 6])
    assert token[0] == np.argmax(np.float64(logits[0]))
    assert_drawn(token[1], logits[1], 0.7, 40, 1.0, seed=2, position=5)
    assert_drawn(token[2], logits[2], 1.0, 0, 0.9, seed=3, position=6)


# decode: a whole step of a few sequences, against forward(), which calls the kernels above
DECODE_SHAPES = list(itertools.product((8, 16, 32, 64, 128), (64, 128), (512, 1024, 1536, 2048, 3072, 4096)))
# Every ninth: a minute on two cores. Number 12 has a wide F. With TINYVLLM_TEST_ALL=1: all.
CHOSEN_SHAPES = range(len(DECODE_SHAPES)) if TEST_ALL else range(3, len(DECODE_SHAPES), 9)


def decode_config(number):
    """(ModelConfig, block_size) of DECODE_SHAPES[number]. The other sizes are drawn. Half have a bias."""
    block_size, h, hidden_size = DECODE_SHAPES[number]
    rng = RNG(number)
    ffn_sizes = [F for F in (512, 1536, 3072, 6144, 10240) if F * hidden_size <= 10240 * 512]
    heads = int(rng.choice([512, 1024, 1536])) // h
    group = int(rng.choice([G for G in range(1, 9) if heads % G == 0]))
    return ModelConfig(
        hidden_size=hidden_size, intermediate_size=int(rng.choice(ffn_sizes)), num_attention_heads=heads,
        num_key_value_heads=heads // group, head_dim=h, num_hidden_layers=1 + number % 2, vocab_size=64,
        max_position_embeddings=1024, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
        tie_word_embeddings=True, eos_token_ids=frozenset(), attention_bias=number % 4 < 2), block_size


def decode_batch(contexts, block_size, rng):
    """[(sequence, 1)] for sequences that bring the last token of their contexts, with shuffled pages."""
    counts = [-(-context // block_size) for context in contexts]
    pages = rng.permutation(sum(counts)).tolist()
    scheduled = []
    for context, count in zip(contexts, counts):
        output = RequestOutput(rng.integers(0, 64, context).tolist())
        sequence = Sequence(SamplingParams(), output, None, context + 1)
        sequence.num_computed_tokens = context - 1
        sequence.block_table.extend(pages.pop() for _ in range(count))
        scheduled.append((sequence, 1))
    return scheduled


def check_decode(number):
    """decode() of a shape gives the logits, keys and values of forward(). Returns the batches' sizes."""
    config, B = decode_config(number)
    device = open_device("auto" if ON_GPU else "cpu")
    device.runs_decode = True
    weights = load_weights(DummyCheckpoint(device), config, device)
    for layer in weights.layers:
        if config.attention_bias:                       # as large as q, k and v
            layer.qkv_bias[...] = device.to_device(randn(RNG(number), config.qkv_size))
    N = cdiv(700, B) + cdiv(290, B) + 6
    model = Model(config, weights, device, N, 1024, StepBuffer(device, 16, 16, 512), EngineArgs(block_size=B))
    if not ON_GPU:
        model.kernels.module.shuffle(number + 1)
    batches = [(700,), (B, 290, 3 * B + 1), (1, 5, 2, 33, 3)][:model.decode_batch // 2]
    for contexts in batches:
        rng = RNG(number)
        batch = Batch.build(decode_batch(contexts, B, rng), B, *model.tiling)
        pages, offsets = np.divmod(batch.slot_mapping, B)
        batch = batch.padded(model.graph_size(batch))
        scale = 100 / math.sqrt(config.hidden_size)     # few keys get most of the weight
        old = randn(rng, *model.kv_cache.shape, scale=scale)
        old[:, :, pages, :, offsets] = NAN              # nobody may read the new token's slot too early
        results = []
        for run in model.forward, model.decode:
            model.kv_cache[...] = device.to_device(old)
            model.buffer.upload(batch)
            logits = device.fetch(run(model.buffer.device_batch(batch)))()
            cache = device.fetch(model.kv_cache)()
            new = cache[:, :, pages, :, offsets].reshape(len(contexts), -1)         # [S, 2 L K h]
            cache[:, :, pages, :, offsets] = NAN
            assert cache.tobytes() == old.tobytes(), "written outside of the slots"
            results.append((np.float64(logits), np.float64(new)))
        for want, got in zip(*results):
            error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
            assert error.max() < 0.03, (DECODE_SHAPES[number], contexts, error)
        if number == CHOSEN_SHAPES[0] and len(contexts) == 3:     # a key of NaN spoils its own sequence alone
            old[0, 0, batch.block_tables[batch.cu_blocks[1]], :, 0] = NAN
            model.kv_cache[...] = device.to_device(old)
            spoilt = device.fetch(model.decode(model.buffer.device_batch(batch)))()
            assert np.isnan(spoilt[1]).all()
            assert spoilt[[0, 2]].tobytes() == logits[[0, 2]].tobytes()
    return [len(contexts) for contexts in batches]


@pytest.mark.skipif(ON_GPU and not DEVICE.runs_decode, reason="this GPU cannot run decode.cu")
def test_decode_takes_every_shape(monkeypatch):
    """Every page, head and hidden size, with contexts of several stages and several splits.

    Alone for pages of 128 keys of 128 numbers and more than four queries a kv head, shared memory has
    no room: such a model runs without decode.cu.
    """
    monkeypatch.setattr(simulator, "FLAGS", ["-O1" if flag == "-O3" else flag for flag in simulator.FLAGS])
    with ThreadPoolExecutor(1 if ON_GPU else os.cpu_count()) as pool:
        sizes = dict(zip(CHOSEN_SHAPES, pool.map(check_decode, CHOSEN_SHAPES)))
    for number, batch_sizes in sizes.items():
        config, block_size = decode_config(number)
        group = config.num_attention_heads // config.num_key_value_heads
        has_room = block_size * config.head_dim < 128 * 128 or group <= 4
        assert batch_sizes == ([1, 3, 5] if has_room else [])


# decode with codes, against a twin: B, h, D, F, H, K, and whether the cache has codes, too. The comments
# say how the matrices are cut, see decode.cu.
FP8_SHAPES = [
    (16, 64, 512, 10240, 8, 2, True),       # two tiles a piece; F: quarters of rows; 5 sequences: half an h
    (8, 64, 1024, 5120, 8, 1, True),        # F: half rows
    (32, 128, 3072, 1536, 12, 4, True),     # whole rows, one tile; h of 128
    (64, 128, 5120, 512, 4, 4, False),      # D: half rows
]
CHOSEN_FP8_SHAPES = range(len(FP8_SHAPES)) if TEST_ALL or ON_GPU else [0]      # half a minute each


def random_codes(rng, rows, columns):
    """(the same as float64) of codes of each exponent: 16 in turn, row by row, and the exponents
    beside. The scales make up for the exponents, so that the least codes matter as much as the greatest."""
    exponents = np.clip(np.arange(rows)[:, None] % 16 + rng.integers(-1, 2, (rows, columns)), 0, 15)
    mantissas = np.minimum(rng.integers(0, 8, (rows, columns)), np.where(exponents == 15, 6, 7))    # no NaN
    codes = np.uint8(rng.integers(0, 2, (rows, columns)) << 7 | exponents << 3 | mantissas)
    scales = np.float32(2.0 ** -np.maximum(np.arange(rows) % 16, 1))
    return Fp8Matrix(codes, scales), np.float64(codes.view(float8_e4m3fn)) * scales[:, None]


def decode_twin(config, matrices, biases, embed, norm, batch, cache):
    """The logits [S, V] of a step. matrices: as in Model.addresses. cache [L, 2, N, K, B, h]: gets the step's
    keys and values, rounded as its dtype says."""
    H, K, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    S, B = len(batch.token_ids), cache.shape[4]
    pages, offsets = np.divmod(batch.slot_mapping, B)
    cos, sin = np.split(rope_table(1024, h)[batch.positions][:, None], 2, -1)
    x = np.float64(embed)[batch.token_ids]
    for layer, (keys_and_values, bias) in enumerate(zip(cache, biases)):
        qkv, o, gate_up, down = matrices[4 * layer:4 * layer + 4]
        q, k, v = np.split((rms_norm_twin(x) @ qkv.T + bias).reshape(S, H + 2 * K, h), [H, H + K], 1)
        q = rope_twin(q, cos, sin) * (math.log2(math.e) / math.sqrt(h))
        new = np.stack([rope_twin(k, cos, sin), v], 1)                              # [S, 2, K, h]
        keys_and_values[:, pages, :, offsets] = new.astype(bfloat16).astype(cache.dtype)
        attention = np.zeros((S, H, h))
        for s, length in enumerate(batch.context_lens):
            table = batch.block_tables[batch.cu_blocks[s]:]
            where = np.arange(length)
            context = keys_and_values[:, table[where // B], :, where % B]           # [length, 2, K, h]
            for head in range(H):
                keys, values = context[:, :, head // (H // K)].swapaxes(0, 1)
                attention[s, head] = attention_twin(q[s, head], keys, values)
        x = x + attention.reshape(S, H * h) @ o.T
        gate, up = np.split(rms_norm_twin(x) @ gate_up.T, 2, -1)
        x = x + gate / (1 + np.exp(-gate)) * up @ down.T
    return rms_norm_twin(x, norm) @ matrices[-1].T


def in_cache_order(x):
    """Numbers [.., h] in the order of rope_and_cache's codes: 0, h/2, 1, h/2 + 1, ..."""
    return x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)


def check_fp8_decode(number):
    """decode() of a shape gives the twin's logits, keys and values. Returns the greatest batch."""
    B, h, D, F, H, K, has_codes = FP8_SHAPES[number]
    rng = RNG(number)
    L = 2 - number % 2
    config = ModelConfig(
        hidden_size=D, intermediate_size=F, num_attention_heads=H, num_key_value_heads=K, head_dim=h,
        num_hidden_layers=L, vocab_size=64, max_position_embeddings=1024, rms_norm_eps=1e-5, rope_theta=1e4,
        rope_scaling=None, tie_word_embeddings=True, eos_token_ids=frozenset(), quantization="fp8",
        attention_bias=number % 2 == 0, kv_cache_dtype="fp8" if has_codes else "auto")
    device = open_device("auto" if ON_GPU else "cpu")
    device.runs_decode = True
    shapes = [(config.qkv_size, D), (D, H * h), (2 * F, D), (D, F)] * L + [(64, D)]
    codes, matrices = zip(*(random_codes(rng, *shape) for shape in shapes))
    codes = [Fp8Matrix(*map(device.to_device, matrix)) for matrix in codes]
    biases = randn(rng, L, config.qkv_size) * config.attention_bias
    embed, norm = randn(rng, 64, D), randn(rng, D)
    layers = [LayerWeights(*codes[4 * i:4 * i + 4], device.to_device(biases[i]), None, None)
              for i in range(L)]
    weights = Weights(device.to_device(embed), layers, device.to_device(norm), codes[-1])
    N = cdiv(700, B) + cdiv(290, B) + 6
    model = Model(config, weights, device, N, 1024, StepBuffer(device, 16, 16, 512), EngineArgs(block_size=B))
    if not ON_GPU:
        model.kernels.module.shuffle(number + 1)
    for contexts in [(700,), (B, 290, 3 * B + 1), (1, 5, 2, 33, 3)][:model.decode_batch // 2]:
        S = len(contexts)
        batch = Batch.build(decode_batch(contexts, B, rng), B, *model.tiling)
        pages, offsets = np.divmod(batch.slot_mapping, B)
        old = randn(rng, *model.kv_cache.shape, scale=100 / math.sqrt(D))
        cache = old.astype(float8_e4m3fn) if has_codes else old
        cache[:, :, pages, :, offsets] = NAN            # nobody may read the new token's slot too early
        in_memory = in_cache_order(cache).view(np.uint8) if has_codes else cache
        model.kv_cache[...] = device.to_device(in_memory)
        padded = batch.padded(model.graph_size(batch))
        model.buffer.upload(padded)
        logits = device.fetch(model.decode(model.buffer.device_batch(padded)))()[:S]
        got = device.fetch(model.kv_cache)()
        want_logits = decode_twin(config, matrices, biases, embed, norm, batch, cache)
        want = (in_cache_order(cache) if has_codes else cache)[:, :, pages, :, offsets].reshape(S, -1)
        new = got.view(want.dtype)[:, :, pages, :, offsets].reshape(S, -1)          # [S, 2 L K h]
        for a, b in (logits, want_logits), (new, np.float64(want)):
            error = np.linalg.norm(np.float64(a) - b, axis=1) / np.linalg.norm(b, axis=1)
            assert error.max() < 0.03, (FP8_SHAPES[number], contexts, error)
        got[:, :, pages, :, offsets] = in_memory[:, :, pages, :, offsets]
        assert got.tobytes() == in_memory.tobytes(), "written outside of the slots"
    return model.decode_batch


@pytest.mark.skipif(ON_GPU and not DEVICE.runs_decode, reason="this GPU cannot run decode.cu")
def test_decode_with_codes(monkeypatch):
    """FP8 weights of all codes but NaN, the least ones too; a cache of bf16 and of codes."""
    monkeypatch.setattr(simulator, "FLAGS", ["-O1" if flag == "-O3" else flag for flag in simulator.FLAGS])
    with ThreadPoolExecutor(1 if ON_GPU else os.cpu_count()) as pool:
        sizes = list(pool.map(check_fp8_decode, CHOSEN_FP8_SHAPES))
    assert sizes == [8] * len(CHOSEN_FP8_SHAPES)


@pytest.mark.parametrize("V", [1001, 5, 8])
@pytest.mark.parametrize("temperature, k, p", [(0.0, 0, 1.0), (0.7, 0, 1.0), (0.7, 3, 1.0), (0.7, 0, 0.9),
                                               (0.7, 3, 0.9)])
def test_sample_notices_rows_without_a_softmax(V, temperature, k, p):
    """A NaN or +inf wherever it stands, or nothing but -inf: the log-probability is NaN.

    The other rows do not change, and -inf in a part of a row is no error.
    """
    good = randn(RNG(13), 6, V, scale=3)
    good[1, :-1] = -np.inf
    good[3, ::2] = -np.inf
    bad = np.tile(good[0], (14, 1))
    for row, wrong in enumerate([np.nan, -np.nan, np.inf]):
        bad[row, 0] = bad[row + 3, V // 2] = bad[row + 6, -1] = wrong
        bad[row + 9] = wrong
    bad[12] = -np.inf
    bad[13, [0, -1]] = np.inf
    is_bad = RNG(14).permutation(np.arange(20) < 14)
    logits = np.empty((20, V), bfloat16)
    logits[is_bad] = bad
    logits[~is_bad] = good
    token, logprob = sample(logits, temperature, k, p, seed=range(20))
    assert (np.isnan(logprob) == is_bad).all()
    logits[is_bad] = good[0]
    without_bad = sample(logits, temperature, k, p, seed=range(20))
    assert (token == without_bad[0])[~is_bad].all() and (logprob == without_bad[1])[~is_bad].all()


# best_logprobs
@pytest.mark.parametrize("V, count", [
    (1001, 1), (1001, 20), (1001, 1001), (5, 5), (8, 3), (7, 7), (4096, 20), (128256, 3)])
def test_best_logprobs(V, count):
    """The greatest logits in order, of equal logits the lower token first, as a stable sort has them."""
    logits = randn(RNG(15), 6, V, scale=3)
    logits[1] = -2                          # all are equal
    logits[2] = np.round(np.float32(logits[2]))
    logits[3, ::2] = -np.inf
    logits[4] = -np.inf
    logits[4, V - 2] = -1e30
    logits[5] = -1
    logits[5, [1, 3]] = [-0.0, 0.0]         # equal, with other bits
    S = len(logits)
    tokens = poison(S + 1, count, dtype=np.int32)
    logprobs = np.full((S + 1, count), 77, np.float32)
    launch(model_of(V), "best_logprobs", (S,), tokens, logprobs, logits, count)
    order = np.argsort(-np.float64(logits), -1, kind="stable")[:, :count]
    assert (tokens[:S] == order).all() and (tokens[S] == -77).all() and (logprobs[S] == 77).all()
    want = np.take_along_axis(log_softmax_twin(logits), order, 1)
    assert np.allclose(logprobs[:S], want, rtol=1e-5, atol=1e-5)


def test_best_logprobs_of_requests():
    """Requests with and without log-probabilities run together, and the overlapped loop goes on.

    Three sequences: the graph's batch of four has a padded row.
    """
    prompts = [[5, 6, 7], list(range(300)), [9] * 40]
    params = [SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.9, seed=s, logprobs=n)
              for s, n in enumerate([4, None, 0])]
    results = []
    for overlap in True, False:
        llm = LLM(PARROT, overlap=overlap)
        engine = llm.engine
        best_logprobs = engine.model.best_logprobs
        calls = []                          # (steps in flight, count)

        def watched(logits, count, calls=calls, engine=engine, best_logprobs=best_logprobs):
            calls.append((len(engine.in_flight), count))
            return best_logprobs(logits, count)

        engine.model.best_logprobs = watched
        outputs, recorded = run_recorded(llm, prompts, params)
        assert max(calls) == (overlap, 4) and min(calls) == (0, 4)
        results.append([(output.token_ids, output.logprobs) for output in outputs])
        assert outputs[1].logprobs is None
        for row in 0, 2:
            for token, found, logits in zip(outputs[row].token_ids, outputs[row].logprobs, recorded[row]):
                best = np.argsort(-logits, kind="stable")[:params[row].logprobs].tolist()
                assert list(found) == best + [token] * (token not in best)
                want = log_softmax_twin(logits[None])[0, list(found)]
                assert np.allclose(list(found.values()), want, rtol=1e-4, atol=1e-4)
    assert results[0] == results[1]


def test_max_logprobs():
    """More logprobs than max_logprobs are refused before anything runs; -1 allows the whole vocabulary."""
    with pytest.raises(TinyVLLMError, match=r"^logprobs: expected at most max_logprobs, 20, got 21$"):
        LLM(PARROT).generate([[1], [2]], [SamplingParams(), SamplingParams(logprobs=21)])
    output = LLM(PARROT, max_logprobs=-1).generate([1, 2], SamplingParams(logprobs=10 ** 9, max_tokens=2))[0]
    for found in output.logprobs:
        assert sorted(found) == list(range(2048)) and list(found.values()) == sorted(found.values())[::-1]
        assert abs(sum(map(math.exp, found.values())) - 1) < 1e-4


def sanitizer_environment():
    """The environment of a process whose kernels AddressSanitizer checks.

    The sanitizer must be loaded before the process's first malloc. NumPy's arrays are guarded
    too, from exactly where the data end.
    """
    libraries = [subprocess.check_output(["g++", f"-print-file-name=lib{name}.so"], text=True).strip()
                 for name in ("asan", "stdc++")]
    return {"TINYVLLM_SANITIZE": "1", "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


@pytest.mark.parametrize("mode", ["shuffled", "sanitizer"])
def test_kernels_again(mode):
    """Every kernel equals its twin with threads in random order, and with every access checked."""
    environment = {"SIMULATOR_SHUFFLE": "3"} if mode == "shuffled" else sanitizer_environment()
    chosen = "gather_rows or test_rms_norm or rope_and_cache or attention_ragged or silu_mul or test_greedy"
    chosen = f"({chosen}) and (144-4-1 or codes-64) or equals_its_twin and 0-0.9"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 13, run.stdout


# --------------------------------------------------------------------------------------------------
# Simulator: the results of a GPU, and errors for the mistakes that simulator.h promises to find
# --------------------------------------------------------------------------------------------------
TEST_KERNELS = r"""
EXPORT(THREADS, 256);

// out [grid] = sums of the rows of x [grid, n]. Right only with the barrier.
extern "C" __global__ __launch_bounds__(THREADS)
void row_sum(float* out, const float* x, int n, int with_barrier) {
    __shared__ float partial[THREADS / 32];
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) sum += x[blockIdx.x * n + i];
    for (int bit = 16; bit; bit /= 2) sum += __shfl_xor_sync(~0u, sum, bit);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    if (with_barrier) __syncthreads();
    if (threadIdx.x < 32) {
        sum = threadIdx.x < THREADS / 32 ? partial[threadIdx.x] : 0;
        for (int bit = 16; bit; bit /= 2) sum += __shfl_xor_sync(~0u, sum, bit);
        if (threadIdx.x == 0) out[blockIdx.x] = sum;
    }
}

// out [32]: a shuffle of 8 bytes. votes [32]: whether lane 20 is in the lane's half of the warp.
extern "C" __global__ __launch_bounds__(32) void warp(long long* out, int* votes) {
    int lane = threadIdx.x;
    long long x = 1000000000000ll + lane;
    out[lane] = __shfl_xor_sync(~0u, x, 5);
    votes[lane] = lane < 16 ? __any_sync(0xffff, lane == 20) : __any_sync(0xffff0000, lane == 20);
}

// out [256]: what each thread learned from two votes: 2 if a thread from `first` on was there,
// plus 1 if a thread after 300 was.
extern "C" __global__ __launch_bounds__(THREADS) void block_vote(int* out, int first) {
    const int any = __syncthreads_or(threadIdx.x >= first);
    out[threadIdx.x] = 2 * any + __syncthreads_or(threadIdx.x > 300);
}

// count [1] += the number of threads; turns [1] counts threads from 0 to 999, again and again;
// total [1] += 0.5 a thread
extern "C" __global__ __launch_bounds__(THREADS) void atomics(int* count, int* turns, float* total) {
    atomicAdd(count, 1);
    atomicInc((unsigned*)turns, 999u);
    atomicAdd(total, 0.5f);
}

// d [16, 16] = a [16, 32] @ b [32, 16] + d, or a @ b.T + d with b [16, 32].
// The fragments are laid out as in the PTX manual.
template <bool TRANSPOSED> __device__ void multiply(float* d, const bf16* a, const bf16* b) {
    constexpr int COLUMNS = TRANSPOSED ? 32 : 16;
    alignas(16) __shared__ bf16 tile[512];
    for (int i = threadIdx.x; i < 512; i += 32) tile[i] = b[i];
    __syncwarp();
    const int row = threadIdx.x / 4;
    const int column = threadIdx.x % 4 * 2;
    auto place = [=](int e) { return (row + e % 4 / 2 * 8) * 16 + e / 4 * 8 + column + e % 2; };
    unsigned fa[2][1][4];
    float fd[1][2][4];
    for (int r = 0; r < 8; r++)
        fa[r / 4][0][r % 4] = *(const unsigned*)(a + (row + r % 2 * 8) * 32 + column + r / 2 * 8);
    for (int e = 0; e < 8; e++) fd[0][e / 4][e % 4] = d[place(e)];
    auto fragments = [&](int step) -> auto& { return fa[step]; };
    auto at = [=](int row, int part) { return tile + row * COLUMNS + part * 8; };
    mma_shared<TRANSPOSED, COLUMNS / 8, 2>(fd, fragments, at);
    for (int e = 0; e < 8; e++) d[place(e)] = fd[0][e / 4][e % 4];
}
extern "C" __global__ __launch_bounds__(32) void mma(float* d, const bf16* a, const bf16* b, int transposed) {
    if (transposed) multiply<true>(d, a, b);
    else multiply<false>(d, a, b);
}

// out [2, 128] = x [2, 128], one group of copies a row.
// After the wait, `groups` groups may still be under way.
extern "C" __global__ __launch_bounds__(32) void copy(float* out, const float* x, int groups) {
    alignas(16) __shared__ float rows[2][128];
    for (int r = 0; r < 2; r++)
        for (int i = 0; i < 4; i++) rows[r][threadIdx.x * 4 + i] = -1;
    for (int r = 0; r < 2; r++) {
        cp_async_16(&rows[r][threadIdx.x * 4], x + r * 128 + threadIdx.x * 4);
        cp_async_commit();
    }
    if (groups == 0) cp_async_wait<0>();
    else cp_async_wait<1>();
    __syncthreads();
    for (int r = 0; r < 2; r++)
        for (int i = threadIdx.x; i < 128; i += 32) out[r * 128 + i] = rows[r][(i + 32) % 128];
}

// out [1] = a shared variable, which nobody has written unless `write`
extern "C" __global__ __launch_bounds__(32) void uninitialised(float* out, int write) {
    __shared__ float x;
    if (write) x = 1;
    *out = x;
}

// out [grid]: 1 + the number of the thread block before; for the first block, 1 + `first`.
// The number 0 means "not written yet": whoever reads it waits, and after first = -1 waits in vain.
extern "C" __global__ __launch_bounds__(256) void relay(int* out, int first) {
    if (threadIdx.x != 255) return;
    int before = first;
    while (blockIdx.x && !(before = __atomic_load_n(out + blockIdx.x - 1, __ATOMIC_RELAXED))) relax();
    __atomic_store_n(out + blockIdx.x, before + 1, __ATOMIC_RELAXED);
}

// Some threads of the second thread block make the mistake number `which`.
extern "C" __global__ __launch_bounds__(64) void mistakes(float* x, int which) {
    __shared__ float shared[64];
    bool mine = blockIdx.x == 1 && threadIdx.x >= 40;
    if (which == 0 && mine) __shfl_xor_sync(~0u, 1.0f, 1);                       // LANES
    if (which == 1 && mine) __syncthreads();                                     // BARRIER
    if (which == 2 && mine) return;
    if (which == 3 && mine) assert(x == nullptr);                                // ASSERT
    if (which == 4 && mine) shared[threadIdx.x + 24] = 1;                        // SHARED
    if (which == 5 && mine) x[threadIdx.x - 40 + 101] = 1;                       // GLOBAL
    if (which == 6 && mine) x[0] = __shfl_xor_sync(0xff00u << 16, 1u, 11);       // SOURCE
    __syncthreads();                                                             // END
    if (which == 7 && blockIdx.x == 1 && threadIdx.x < 20) __syncwarp();         // EXITED
    x[threadIdx.x] = shared[threadIdx.x % 40];
}
"""


def line_of(mark):
    return next(i for i, line in enumerate(TEST_KERNELS.splitlines(), 1) if f"// {mark}" in line)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "test.cu"
    path.write_text(TEST_KERNELS)
    return path


@pytest.fixture(scope="module", params=["hand-written switch", "ucontext"])
def kernels(request, path):
    """TEST_KERNELS, with each of the simulator's ways to switch between the threads' stacks."""
    defines = {"SIMULATOR_UCONTEXT": 1} if request.param == "ucontext" else {}
    return compile_kernels(CpuDevice(), defines, paste(path))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("blocks, n", [(1, 1), (100, 4000)])        # the second spreads over all cores
def test_sums(kernels, blocks, n, seed):
    x = RNG(0).integers(-9, 9, (blocks, n)).astype(np.float32)
    out = np.zeros(blocks, np.float32)
    kernels.module.shuffle(seed)
    kernels.row_sum((blocks,), out, x, n, 1)
    kernels.module.shuffle(0)
    assert (out == x.sum(1)).all()


def test_shuffling_finds_a_missing_barrier_or_initialisation(kernels):
    x = np.ones((1, 256), np.float32)
    out = np.zeros(1, np.float32)
    wrong = 0
    for seed in range(1, 21):       # the same data each time: leftovers of the last launch must not help
        kernels.module.shuffle(seed)
        kernels.row_sum((1,), out, x, 256, 0)
        wrong += out[0] != 256
    kernels.uninitialised((3,), out, 0)
    kernels.module.shuffle(0)
    assert wrong > 10 and np.isnan(out[0])


def test_warp_shuffles_and_votes(kernels):
    out = np.zeros(32, np.int64)
    votes = np.zeros(32, np.int32)
    kernels.warp((1,), out, votes)
    lane = np.arange(32)
    assert (out - 10 ** 12 == lane ^ 5).all()
    assert (votes == (lane >= 16)).all()


def test_block_votes(kernels):
    for first in 0, 255, 256:
        out = np.full(256, -1, np.int32)
        kernels.block_vote((1,), out, first)
        assert (out == 2 * (first < 256)).all()


def test_atomics_across_cores(kernels):
    count = np.zeros(1, np.int32)
    turns = np.zeros(1, np.int32)
    total = np.zeros(1, np.float32)
    kernels.atomics((300,), count, turns, total)
    assert (count[0], turns[0], total[0]) == (300 * 256, 300 * 256 % 1000, 300 * 128)


@pytest.mark.parametrize("transposed", [False, True])
def test_mma_fragments(kernels, transposed):
    rng = RNG(0)
    a = randn(rng, 16, 32)
    b = randn(rng, 16, 32) if transposed else randn(rng, 32, 16)
    c = rng.standard_normal((16, 16)).astype(np.float32)
    d = c.copy()
    kernels.mma((1,), d, a, b, int(transposed))
    b = b.astype(np.float64)
    want = a.astype(np.float64) @ (b.T if transposed else b) + c
    np.testing.assert_allclose(d, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups, arrived", [(0, [True, True]), (1, [True, False])])
def test_cp_async_copies_at_the_wait(kernels, groups, arrived):
    x = np.arange(256, dtype=np.float32).reshape(2, 128)
    out = np.zeros((2, 128), np.float32)
    kernels.copy((1,), out, x, groups)
    assert (out == np.where(np.array(arrived)[:, None], np.roll(x, -32, 1), -1)).all()


def test_blocks_that_wait_for_one_another(kernels):
    out = np.zeros(2, np.int32)
    kernels.relay((2,), out, 5)
    assert out.tolist() == [6, 7]
    with pytest.raises(LaunchError, match=r"block .1, 0, 0., .* waits in vain"):
        kernels.relay((2,), np.zeros(2, np.int32), -1)


@pytest.mark.parametrize("which, thread, mark, message", [
    (0, 40, "LANES", "waits for lanes 0xffffffff, but 0x000000ff returned or are at a barrier"),
    (1, 40, "BARRIER", f"__syncthreads() while others wait at the one in line {line_of('END')}"),
    (3, 40, "ASSERT", "assertion failed: x == nullptr"),
    (6, 40, "SOURCE", "reads lane 3, not in its mask 0xff000000"),
    (7, 0, "EXITED", "waits for lanes 0xffffffff, but 0xfff00000 returned or are at a barrier"),
])
def test_mistakes_are_errors_and_do_not_hang(kernels, which, thread, mark, message):
    x = np.zeros(101, np.float32)
    with pytest.raises(LaunchError) as error:
        kernels.mistakes((4,), x, which)
    place = f"block (1, 0, 0), thread ({thread}, 0, 0), line {line_of(mark)}"
    assert str(error.value) == f"kernel mistakes, {place}: {message}"
    kernels.mistakes((4,), x, 2)    # a good launch follows: a thread that has returned misses no barrier


@pytest.mark.parametrize("which, finding, mark", [
    (99, "", ""), (4, "index 64 out of bounds", "SHARED"), (5, "heap-buffer-overflow", "GLOBAL")])
def test_sanitizer(path, which, finding, mark):
    code = f"""
from pathlib import Path
import numpy as np
from device import CpuDevice, compile_kernels, paste
kernels = compile_kernels(CpuDevice(), {{}}, paste(Path({str(path)!r})))
kernels.mistakes((4,), np.zeros(101, np.float32), {which})"""
    environment = os.environ | sanitizer_environment() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (result.returncode == 0) == (finding == ""), result.stderr
    assert finding in result.stderr, result.stderr
    assert not mark or f"test.cu:{line_of(mark)}" in result.stderr, result.stderr
