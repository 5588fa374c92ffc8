"""Weights and activations in 8 bits, with --quantization fp8. A reader of the bfloat16 engine needs none of it.

E4M3 (arXiv:2209.05433) is a number in 8 bits: a sign, 4 bits of exponent, 3 of mantissa. The greatest is 448.
A matrix is quantised row by row. The scale of a row is max |w| / 448, a number is a *code* times the scale:

    w[r, c] = codes[r, c] * scales[r]           half the bytes of bfloat16, with an error of 3% at most

Both factors of a product are codes: cuBLASLt multiplies codes, at twice the speed of bfloat16, and
knows no scales. A scale belongs to a row of the result (the token's) or to a column (the weight's row), so
the next kernel multiplies by both. (cuBLASLt knows scales of rows too, but is slower with them for few tokens,
and takes them on GPUs of compute capability 9.0 alone.)

    input of qkv, gate_up       x / rms(x): at most sqrt(D), so one constant is the scale of all tokens
    input of o, down, the head  a scale for each token: its greatest number gets the code 448

A token's codes depend on this token alone, never on the others of the step.
"""
import ctypes
import weakref
from collections import namedtuple
from functools import lru_cache

import ml_dtypes
import numpy as np

from device import BFLOAT16, CUBLAS_COMPUTE_32F, CUBLAS_OP_T, CUDA_R_16BF, ONE, ZERO, TinyVLLMError, check

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
MULTIPLE = 16                           # cuBLASLt wants such sizes of matrices of codes

# A matrix in 8 bits a number: the number [r, c] is codes[r, c] * scales[r]. codes: uint8 [rows, columns],
# E4M3; scales: float32 [rows].
Fp8Matrix = namedtuple("Fp8Matrix", "codes scales")


def check_fp8_model(config, device):
    """Raises TinyVLLMError if the model (of a rank) cannot run in 8 bits on this device."""
    if not device.runs_fp8:
        raise TinyVLLMError("quantization: fp8 expected a GPU of compute capability 8.9 or newer (RTX 40 series, "
                            f"L4, H100, ...), got {device.name}: use another GPU, or leave the option out")
    ranks = config.num_ranks
    part = f", divided by tensor_parallel_size, {ranks}" if ranks > 1 else ""
    for name, size in (("hidden_size", config.hidden_size), ("intermediate_size", config.intermediate_size),
                       ("vocab_size", config.vocab_size / ranks)):
        check(f"quantization fp8: {name}{part}", size, lambda n: n % MULTIPLE == 0, f"a multiple of {MULTIPLE}")


def quantize(x, device, kernels):
    """The Fp8Matrix of a bfloat16 matrix on the device. kernels: of kernels.cu, with FP8_WEIGHTS."""
    rows, columns = x.shape
    matrix = Fp8Matrix(device.empty((rows, columns), np.uint8), device.empty(rows, np.float32))
    kernels.quantize((rows,), *matrix, x, columns)
    return matrix


def dequantize(codes, scales, device):
    """The bfloat16 matrix on the device. codes: E4M3 [rows, columns]; scales: [rows or 1], as in a file."""
    numbers = device.to_device(np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32))
    scales = device.to_device(scales.astype(np.float32))
    return (numbers[device.to_device(codes.view(np.uint8))] * scales[:, None]).astype(BFLOAT16)


class Fp8Products:
    """The same members as Products in tinyvllm.py, for matrices in 8 bits."""

    def __init__(self, device, kernels, communicator):
        self.device = device
        self.kernels = kernels
        self.communicator = communicator
        multiply = (NumpyCodes() if device.is_simulated else CublasLt(device)).multiply
        self.linear = lambda codes, w: multiply(codes, w.codes)         # rope_and_cache and silu_mul scale it

    def first_input(self, residual):
        """The codes of the normed tokens [T, D]."""
        codes = self.device.empty(residual.shape, np.uint8)
        self.kernels.add_residual((len(codes),), codes, None, residual, None, None, None, None)
        return codes

    def row_scales(self, w):
        return w.scales

    def empty_activation(self, tokens, columns):
        """Room for what silu_mul() makes."""
        return Fp8Matrix(self.device.empty((tokens, columns), np.uint8), self.device.empty(tokens, np.float32))

    def silu_mul(self, activation, gate_up, residual, w):
        """Fills in the activation [T, F], as codes and scales."""
        tokens, columns = activation.codes.shape
        self.kernels.silu_mul((-(-columns // self.kernels.SILU_COLUMNS), tokens), None, gate_up, None,
                              *activation, w.scales)

    def add(self, residual, x, w, bias=None):
        """(residual + x @ w.T + bias, the codes of the normed sum). See Products.add."""
        if not isinstance(x, Fp8Matrix):
            x = quantize(x, self.device, self.kernels)
        product = self.linear(x.codes, w)
        codes = self.device.empty(product.shape, np.uint8)
        is_first = self.communicator.rank == 0
        is_only = self.communicator.size == 1
        self.kernels.add_residual((len(codes),), codes if is_only else None, product, residual if is_first else None,
                                  product, w.scales, x.scales, bias if is_first else None)
        residual = self.communicator.all_reduce(product)
        return residual, codes if is_only else self.first_input(residual)

    def logits(self, x, head):
        """x @ head.T, for normed tokens in bfloat16."""
        x = quantize(x, self.device, self.kernels)
        product = self.linear(x.codes, head)
        rows, columns = product.shape
        self.kernels.scale_logits((-(-columns // self.kernels.SCALE_COLUMNS), rows), product, head.scales, x.scales,
                                  columns)
        return product


class NumpyCodes:
    """What CublasLt does, on the CPU."""

    def __init__(self):
        self.float32_weights = {}       # id of the codes of a weight -> its numbers in float32

    def multiply(self, x, w):
        if id(w) not in self.float32_weights:
            self.float32_weights[id(w)] = w.view(E4M3).astype(np.float32)
            weakref.finalize(w, self.float32_weights.pop, id(w))
        return (x.view(E4M3).astype(np.float32) @ self.float32_weights[id(w)].T).astype(BFLOAT16)


# --------------------------------------------------------------------------------------------------
# cuBLASLt, through ctypes
# --------------------------------------------------------------------------------------------------
# Numbers of cuBLASLt's interface (cublasLt.h, the same in CUDA 12 and 13).
CUDA_R_32F = 0
CUDA_R_8F_E4M3 = 28
DESC_TRANSA = 3                         # of a product: whether the first matrix is transposed, int32
DESC_FAST_ACCUM = 25                    # of a product: sums with fewer bits, int8
PREF_MAX_WORKSPACE_BYTES = 1            # uint64
WORKSPACE_BYTES = 32 << 20              # NVIDIA's advice for compute capability 9.0
# Tensor cores add E4M3 products with few bits. 0: every so many sums, cuBLASLt adds up in float32.
FAST_ACCUM = 0
MOST_PLANS = 4096
# The types of the functions' arguments. p: a pointer, i: an int, q: 64 bits.
ARGUMENTS = {
    "Create": "p", "MatmulDescCreate": "pii", "MatmulDescSetAttribute": "pipq", "MatrixLayoutCreate": "piqqq",
    "MatrixLayoutDestroy": "p", "MatmulPreferenceCreate": "p", "MatmulPreferenceSetAttribute": "pipq",
    "MatmulAlgoGetHeuristic": "pppppppipp", "Matmul": "ppppppppppppppqp"}
TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "q": ctypes.c_int64}


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""
    _fields_ = [("algorithm", ctypes.c_uint64 * 8), ("workspace_bytes", ctypes.c_size_t), ("status", ctypes.c_int),
                ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4)]


class CublasLt:
    """Products of matrices of codes, by the cuBLASLt that CuPy's cuBLAS has loaded."""

    def __init__(self, device):
        self.device = device
        with open("/proc/self/maps") as maps:
            path = next(line.split(maxsplit=5)[-1].strip() for line in maps if "libcublasLt.so" in line)
        library = ctypes.CDLL(path)
        self.functions = {name: getattr(library, f"cublasLt{name}") for name in ARGUMENTS}
        for name, types in ARGUMENTS.items():
            self.functions[name].argtypes = [TYPES[letter] for letter in types]
        self.handle = self.create("Create")
        self.product = self.create("MatmulDescCreate", CUBLAS_COMPUTE_32F, CUDA_R_32F)
        self.set("MatmulDescSetAttribute", self.product, DESC_TRANSA, ctypes.c_int32(CUBLAS_OP_T))
        self.set("MatmulDescSetAttribute", self.product, DESC_FAST_ACCUM, ctypes.c_int8(FAST_ACCUM))
        self.preference = self.create("MatmulPreferenceCreate")
        self.set("MatmulPreferenceSetAttribute", self.preference, PREF_MAX_WORKSPACE_BYTES,
                 ctypes.c_uint64(WORKSPACE_BYTES))
        self.workspace = device.empty(WORKSPACE_BYTES, np.uint8)
        # The algorithm for a product. To ask for it takes longer than to start the product, and is not
        # allowed in a capture: device.record() runs each product once before.
        self.plan = lru_cache(MOST_PLANS)(self.make_plan)

    def call(self, name, *arguments):
        """Calls cublasLt<name>."""
        status = self.functions[name](*arguments)
        if status != 0:
            raise self.device.xp.cuda.cublas.CUBLASError(status)

    def create(self, name, *arguments):
        """A new object of cuBLASLt's."""
        pointer = ctypes.c_void_p()
        self.call(name, ctypes.byref(pointer), *arguments)
        return pointer

    def set(self, name, target, attribute, value):
        """Sets an attribute of a product or of a preference."""
        self.call(name, target, attribute, ctypes.byref(value), ctypes.sizeof(value))

    def make_plan(self, tokens, rows, columns):
        """(layouts of w, x and the result, algorithm) for a product. cuBLASLt stores matrices by columns, so our
        x [T, in] is [in, T] there, see CudaDevice.linear."""
        sizes = [(CUDA_R_8F_E4M3, columns, rows), (CUDA_R_8F_E4M3, columns, tokens), (CUDA_R_16BF, rows, tokens)]
        w, x, out = [Layout(self, *size) for size in sizes]
        result = Heuristic()
        count = ctypes.c_int()
        self.call("MatmulAlgoGetHeuristic", self.handle, self.product, w.pointer, x.pointer, out.pointer,
                  out.pointer, self.preference, 1, ctypes.byref(result), ctypes.byref(count))
        if count.value == 0 or result.status != 0:
            raise RuntimeError(f"cuBLASLt has no algorithm for {tokens} x {columns} @ {columns} x {rows} in E4M3")
        return w, x, out, result

    def multiply(self, x, w):
        """x [T, in] @ w [out, in] transposed -> [T, out] in bfloat16. x and w: codes."""
        tokens, columns = x.shape
        rows = len(w)
        out = self.device.empty((tokens, rows))
        w_layout, x_layout, out_layout, plan = self.plan(tokens, rows, columns)
        self.call("Matmul", self.handle, self.product, ONE, w.data.ptr, w_layout.pointer, x.data.ptr,
                  x_layout.pointer, ZERO, out.data.ptr, out_layout.pointer, out.data.ptr, out_layout.pointer,
                  ctypes.byref(plan.algorithm), self.workspace.data.ptr, WORKSPACE_BYTES,
                  self.device.xp.cuda.get_current_stream().ptr)
        return out


class Layout:
    """How a matrix lies in memory: its columns one behind the other."""

    def __init__(self, library, dtype, rows, columns):
        self.pointer = library.create("MatrixLayoutCreate", dtype, rows, columns, rows)
        weakref.finalize(self, library.functions["MatrixLayoutDestroy"], self.pointer).atexit = False
