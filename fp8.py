"""Weights and activations in 8 bits: --quantization fp8.

E4M3 (arXiv:2209.05433) is a number in 8 bits, a *code*: a sign, 4 bits of exponent, 3 of mantissa. The
greatest is 448. A matrix of weights is quantized row by row: the scale of a row is max |w| / 448, and
w[r, c] is about codes[r, c] * scales[r]. Codes are half the bytes of bfloat16. Each is off by 6% at most,
or, below 2^-6, by 2^-10.

Both factors of a product are codes. cuBLASLt multiplies codes at twice the speed of bfloat16, and is
told no scales: it knows one for a whole matrix, and only on some GPUs one for each row, more slowly. But
the scale of a weight's row belongs to a column of the product, and the scale of a token to a row of the
product. The kernel behind the product multiplies by both. The tokens' codes come in two ways:

    input of qkv and gate_up       x / rms(x) is sqrt(D) at most: a constant is the scale of all tokens
    input of o, down and the head  a token's greatest number gets the code 448

A token's codes depend on this token alone, never on the others of the step. But a step of a few single
tokens runs in decode.cu, which takes weights in codes and tokens in bfloat16: there, a token is not rounded
to codes. So an answer can change with the size of its batch by more than bfloat16 would change it.
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
    """Raises TinyVLLMError if the config of a rank wants 8 bits, and device or sizes do not fit."""
    if not config.quantization:
        return
    if not device.runs_fp8:
        raise TinyVLLMError("quantization: for fp8, expected a GPU of compute capability 8.9 or newer (RTX "
                            f"40 series, L4, H100, ...), got {device.name}: use another GPU, or bfloat16")
    sizes = {"hidden_size": config.hidden_size, "intermediate_size of a rank": config.intermediate_size,
             "vocab_size of a rank": config.vocab_size / config.num_ranks}
    for name, size in sizes.items():
        check(f"quantization: for fp8, {name}", size, lambda n: n % MULTIPLE == 0,
              f"a multiple of {MULTIPLE}")


def empty_matrix(rows, columns, device):
    """An Fp8Matrix with arbitrary content."""
    return Fp8Matrix(device.empty((rows, columns), np.uint8), device.empty(rows, np.float32))


def quantize(x, device, kernels):
    """The Fp8Matrix of a bfloat16 matrix on the device. kernels: of kernels.cu, with FP8_WEIGHTS."""
    rows, columns = x.shape
    matrix = empty_matrix(rows, columns, device)
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
        self.library = NumpyCodes() if device.is_simulated else CublasLt(device)

    def linear(self, codes, w):
        """The product of codes [T, in] with w's, in bfloat16, not yet scaled."""
        return self.library.multiply(codes, w.codes)

    def first_input(self, residual):
        """The codes of the normed tokens [T, D]."""
        codes = self.device.empty(residual.shape, np.uint8)
        self.kernels.add_residual((len(codes),), codes, None, residual, None, None, None, None)
        return codes

    def row_scales(self, w):
        return w.scales

    def empty_activation(self, tokens, columns):
        return empty_matrix(tokens, columns, self.device)

    def silu_mul(self, activation, gate_up, residual, w):
        self.kernels.silu_mul((1, len(gate_up)), None, gate_up, None, *activation, w.scales)

    def add(self, residual, x, w, bias=None):
        """(residual + x @ w.T + bias, the codes of the normed sum). x: bfloat16, or silu_mul's Fp8Matrix."""
        if not isinstance(x, Fp8Matrix):
            x = quantize(x, self.device, self.kernels)
        product = self.linear(x.codes, w)
        tokens = len(product)
        if self.communicator.size == 1:
            codes = self.device.empty(product.shape, np.uint8)
            self.kernels.add_residual((tokens,), codes, residual, residual, product, w.scales, x.scales, bias)
            return residual, codes
        if self.communicator.rank > 0:              # residual and bias come into the sum once
            residual = bias = None
        self.kernels.add_residual((tokens,), None, product, residual, product, w.scales, x.scales, bias)
        residual = self.communicator.all_reduce(product)
        return residual, self.first_input(residual)

    def logits(self, x, head):
        x = quantize(x, self.device, self.kernels)
        logits = self.linear(x.codes, head)
        rows, columns = logits.shape
        grid = (-(-columns // self.kernels.SCALE_COLUMNS), rows)
        self.kernels.scale_logits(grid, logits, head.scales, x.scales, columns)
        return logits


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
    _fields_ = [("algorithm", ctypes.c_uint64 * 8), ("workspace_bytes", ctypes.c_size_t),
                ("status", ctypes.c_int), ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4)]


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
        """(layouts of w, x and the result, Heuristic) for a product. cuBLASLt stores matrices by columns, so
        our x [T, in] is [in, T] there, see CudaDevice.linear."""
        w = Layout(self, CUDA_R_8F_E4M3, columns, rows)
        x = Layout(self, CUDA_R_8F_E4M3, columns, tokens)
        out = Layout(self, CUDA_R_16BF, rows, tokens)
        result = Heuristic()
        count = ctypes.c_int()
        self.call("MatmulAlgoGetHeuristic", self.handle, self.product, w.pointer, x.pointer, out.pointer,
                  out.pointer, self.preference, 1, ctypes.byref(result), ctypes.byref(count))
        if count.value == 0 or result.status != 0:
            raise RuntimeError(f"cuBLASLt: no E4M3 product [{tokens}, {columns}] @ [{columns}, {rows}]")
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
