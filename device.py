"""How Python compiles and starts kernels: on an NVIDIA GPU, or in a simulator on the CPU.

CudaDevice and CpuDevice have the same members. Above this module nothing depends on the kind:

    device.xp                           cupy or numpy: the same functions on the device's arrays
    device.linear(x, w)                 the only product of matrices
    device.fetch(array)                 starts a copy to the host; returns wait(), to get the copy
    device.record(function)             the kernels started by function(), recorded as a CUDA graph
    kernels = compile_kernels(device, {"HEAD_DIM": 64}, paste(KERNELS))
                                        the kernels in CUDA source text, compiled for one model
    kernels.rms_norm((T,), out, ...)    starts T thread blocks. compile_kernels reads the number of
                                        threads and the arguments' types from the source text alone
"""
import contextlib
import ctypes
import math
import os
import re
import sys
import tempfile
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np

import simulator

FOLDER = Path(__file__).resolve().parent        # holds kernels.cu, ptx.h, parrot/ ...
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class TinyVLLMError(Exception):
    """A user's mistake, in one line: what was expected, what came, what to do."""


def first_line(error, word=""):
    """The first line of an error's text with `word`, else the first line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if word in line), lines[0]).strip()


def check(name, value, is_good, expected):
    """Returns the value. Raises TinyVLLMError if is_good(value) is false or the type wrong."""
    with contextlib.suppress(TypeError, AttributeError, ValueError, OverflowError):
        if is_good(value):
            return value
    raise TinyVLLMError(f"{name}: expected {expected}, got {shown(value)}")


def shown(value):
    """A value in the text of an error: one line of 60 characters at most."""
    try:
        return first_line(repr(value))[:60]
    except ValueError:                      # an int of more digits than Python prints
        return f"a {type(value).__name__}"


def is_int(value, least=1, most=math.inf):
    """Whether the value is a whole number from `least` to `most`."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and least <= value <= most


def is_number(value, least, most):
    """Whether the value is a number from `least` to `most`."""
    is_real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return is_real and least <= float(value) <= most


# --------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------
KERNELS = FOLDER / "kernels.cu"
DECODE_KERNEL = FOLDER / "decode.cu"
PARAMETER_TYPES = {"bf16": BFLOAT16, "float": np.dtype(np.float32), "int": np.dtype(np.int32),
                   "long long": np.dtype(np.int64), "u8": np.dtype(np.uint8), "u64": np.dtype(np.uint64)}
MAX_GRID_YZ = 65535                     # thread blocks that CUDA allows in y and in z


def paste(*paths):
    """The joined text of CUDA files. Compilers report each file's own name and line numbers."""
    return "".join(f'#line 1 "{path.name}"\n{path.read_text()}\n' for path in paths)


def compile_kernels(device, defines, code):
    """Compiles CUDA source text for a device and returns its Kernels. defines: {macro: value}.

    kernels.NAME(grid, *args) starts a kernel; kernels.NAME is also an EXPORTed constant. A new
    kernel or constant in the text needs no change here. Headers are pasted, never included: CuPy's
    cache of compiled kernels goes by the text and would not notice a change in an included file.
    """
    code = paste(*device.headers) + code
    declarations = find_declarations(code)
    types = PARAMETER_TYPES | {"kv": PARAMETER_TYPES["u8" if defines.get("FP8_CACHE") else "bf16"]}
    options = ["-std=c++17", *(f"-D{name}={value}" for name, value in defines.items())]
    try:
        module = device.load_module(code, options, [name for _, name, _ in declarations])
        return Kernels(module, device.xp.ndarray, code, declarations, types)
    except device.CompileError as error:
        raise TinyVLLMError(f"kernels do not compile for this model: {first_line(error, 'error')}") from None


def find_declarations(code):
    """[(number of threads or its name, kernel name, text of the parameters)] of the kernels in CUDA
    source text. kernels.cu states the form of a declaration."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", code, flags=re.S)
    form = r'extern "C" __global__ __launch_bounds__\((\w+)[^)]*\)\s*void (\w+)\(([^)]*)\)'
    declarations = re.findall(form, code)
    count = code.count("__global__")
    assert len(declarations) == count, (
        f'expected {count} kernels, extern "C" __global__ __launch_bounds__(THREADS) void name(parameters), '
        f"found {len(declarations)}: {[name for _, name, _ in declarations]}")
    return declarations


def parse_parameter(text, types):
    """"const bf16* x" -> ("x", bfloat16, True): name, dtype, is a pointer. types: {name: dtype}."""
    plain = text.replace("unsigned long long", "u64").replace("__restrict__", "")
    match = re.fullmatch(r"\s*(?:const )?([\w ]+?)\s*(\*?)\s*(\w+)\s*", plain)
    assert match and match[1] in types, (
        f"expected a kernel's parameter of type {', '.join(types)} or a pointer to it, got{text}")
    return match[3], types[match[1]], bool(match[2])


class Kernels:
    """The attributes are a Kernel for each kernel's name and an int for each EXPORTed name."""

    def __init__(self, module, array_type, code, declarations, types):
        self.module = module
        for name in re.findall(r"^EXPORT\((\w+),", code, re.M):
            value = array_type((), np.int32, module.get_global(f"exported_{name}"))
            setattr(self, name, int(value))
        for threads, name, parameters in declarations:
            function = module.get_function(name)
            # Shared memory beyond 48 KB must be allowed here and requested at each launch.
            shared_bytes = getattr(self, f"{name}_shared_bytes", 0)
            function.max_dynamic_shared_size_bytes = shared_bytes
            parameters = [parse_parameter(text, types) for text in parameters.split(",")]
            threads = int(threads) if threads.isdigit() else getattr(self, threads)
            setattr(self, name, Kernel(name, function, threads, shared_bytes, parameters, array_type))


class Kernel:
    """One kernel, ready to be started."""

    def __init__(self, name, function, threads, shared_bytes, parameters, array_type):
        """threads: of a thread block. shared_bytes: dynamic shared memory of a thread block.
        parameters: see parse_parameter. array_type: the device's."""
        self.name = name
        self.function = function
        self.block = (threads, 1, 1)
        self.shared_bytes = shared_bytes
        self.parameters = parameters
        self.array_type = array_type

    def __call__(self, grid, *args):
        """Starts the kernel. grid: thread blocks in x, y, z (1 to 3 ints). args: arrays, numbers,
        or None for a null pointer."""
        assert len(args) == len(self.parameters), (
            f"{self.name} takes {len(self.parameters)} arguments, got {len(args)}")
        # For an empty grid CuPy would start one thread block.
        assert min(grid) >= 1 and max(grid[1:], default=1) <= MAX_GRID_YZ, (
            f"{self.name}: grid {grid} is beyond 1 to {MAX_GRID_YZ}")
        values = [self.checked(arg, *parameter) for arg, parameter in zip(args, self.parameters)]
        self.function((*grid, 1, 1)[:3], self.block, values, shared_mem=self.shared_bytes)

    def checked(self, arg, parameter, dtype, is_pointer):
        """The argument in the form for a launch. A kernel sees bare addresses: nothing after this
        check would notice a wrong type."""
        if not is_pointer:
            return dtype.type(arg)
        if arg is None:
            return np.uint64(0)
        assert isinstance(arg, self.array_type), (
            f"{self.name}: {parameter} must be an array of this device, got {type(arg)}")
        assert arg.dtype == dtype and arg.flags.c_contiguous, (
            f"{self.name}: {parameter} must be contiguous {dtype}, got {arg.dtype}, {arg.strides}")
        return arg


# --------------------------------------------------------------------------------------------------
# Devices
# --------------------------------------------------------------------------------------------------
# Numbers of cuBLAS's interface.
CUDA_R_16BF = 14                        # bfloat16
CUBLAS_COMPUTE_32F = 68                 # sums in float32
CUBLAS_OP_N = 0                         # not transposed
CUBLAS_OP_T = 1                         # transposed
CUBLAS_GEMM_DEFAULT = -1                # cuBLAS chooses the algorithm
ONE = ctypes.byref(ctypes.c_float(1))
ZERO = ctypes.byref(ctypes.c_float(0))
# Numbers of cudaDeviceGetAttribute.
MEMORY_CLOCK_RATE = 36                  # kHz; two transfers a clock
GLOBAL_MEMORY_BUS_WIDTH = 37            # bits
MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97  # bytes


def open_cublas(cupy):
    """(cublasGemmEx, cublasSetStream, a handle) of the cuBLAS loaded by CuPy. CuPy's own matmul is
    the same product, but cannot be recorded in a CUDA graph."""
    cupy.cuda.device.get_cublas_handle()                            # loads the library
    with open("/proc/self/maps") as maps:
        path = next(line.split(maxsplit=5)[-1].strip() for line in maps if "libcublas.so" in line)
    library = ctypes.CDLL(path)
    handle = ctypes.c_void_p()
    status = library.cublasCreate_v2(ctypes.byref(handle))
    if status != 0:
        raise cupy.cuda.cublas.CUBLASError(status)
    number, pointer = ctypes.c_int, ctypes.c_void_p
    library.cublasSetStream_v2.argtypes = [pointer, pointer]
    library.cublasGemmEx.argtypes = [
        pointer, number, number, number, number, number, pointer,   # handle, two operations, m, n, k, alpha
        pointer, number, number, pointer, number, number,           # a, its type and stride; the same of b
        pointer, pointer, number, number, number, number]           # beta; c, type, stride; sums, algorithm
    return library.cublasGemmEx, library.cublasSetStream_v2, handle


def check_cupy_cache():
    """Raises TinyVLLMError if CuPy cannot store compiled kernels. Some versions fail at the import."""
    folder = os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise TinyVLLMError(f"CuPy's cache of kernels: expected a folder with room that you may write, got "
                            f"{folder} ({error.strerror}): set CUPY_CACHE_DIR to another") from None


@contextlib.contextmanager
def recording(device):
    """Sets device.is_recording in the block: not every kernel may be a part of a CUDA graph."""
    device.is_recording = True
    try:
        yield
    finally:
        device.is_recording = False


class CudaDevice:
    """An NVIDIA GPU, through CuPy."""
    is_simulated = False
    is_recording = False                            # whether record() runs
    headers = (FOLDER / "ptx.h",)

    def __init__(self, number=None):
        """number: of the GPU; None: CuPy's current one."""
        import cupy
        self.xp = cupy
        if number is not None:
            cupy.cuda.Device(number).use()
        self.CompileError = cupy.cuda.compiler.CompileException
        runtime = cupy.cuda.runtime
        number = runtime.getDevice()
        self.number = number
        properties = runtime.getDeviceProperties(number)
        self.name = properties["name"].decode()
        major, minor = properties["major"], properties["minor"]
        if major < 8:
            raise TinyVLLMError("expected a GPU of compute capability 8.0 or newer, for bfloat16 (RTX 30 "
                                f"series, A100, ...), got {self.name} with {major}.{minor}: use --device cpu "
                                "or another GPU")
        self.count = runtime.getDeviceCount() - number          # GPUs from this one on
        check_cupy_cache()
        self.gemm, self.set_stream, self.cublas = open_cublas(cupy)
        self.graph_pool = cupy.cuda.MemoryPool()
        self.graph_stream = cupy.cuda.Stream()
        self.multiprocessors = properties["multiProcessorCount"]
        self.runs_fp8 = (major, minor) >= (8, 9)
        # decode.cu needs bulk copies, and 227 KB of shared memory for a thread block.
        shared_bytes = runtime.deviceGetAttribute(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, number)
        self.runs_decode = major >= 9 and shared_bytes >= 227 << 10
        # The "a" admits wgmma and setmaxnreg (registers change warps), which later GPUs may lack.
        self.options = [f"-arch=sm_{major}{minor}a"] if self.runs_decode else []
        clock = 1e3 * runtime.deviceGetAttribute(MEMORY_CLOCK_RATE, number)
        width = runtime.deviceGetAttribute(GLOBAL_MEMORY_BUS_WIDTH, number) / 8
        self.memory_bandwidth = 2 * clock * width or None           # bytes/s at best; some drivers say 0

    def load_module(self, code, options, kernel_names):
        """The code, compiled by NVRTC for this very GPU. CuPy caches in ~/.cupy/kernel_cache."""
        return self.xp.RawModule(code=code, options=(*self.options, *options), backend="nvrtc")

    def empty(self, shape, dtype=BFLOAT16):
        """An array of the device with arbitrary content."""
        return self.xp.empty(shape, dtype)

    def to_device(self, array):
        """A copy of an array on the device."""
        return self.xp.array(array, order="C")

    def address(self, array):
        """The address of an array of the device, for kernels that read addresses from an array."""
        return array.data.ptr

    def memory(self):
        """Bytes: (free, total). Memory freed into CuPy's pool counts as free."""
        free, total = self.xp.cuda.runtime.memGetInfo()
        return free + self.xp.get_default_memory_pool().free_bytes(), total

    def pinned(self, num_bytes):
        """Host memory for direct reads and writes by the GPU, uint8."""
        return np.frombuffer(self.xp.cuda.alloc_pinned_memory(num_bytes), np.uint8, num_bytes)

    def copy(self, target, source):
        """Starts a copy of pinned memory to an array of the device. Returns wait(): until the copy is
        done, the source must not change."""
        event = self.xp.cuda.Event(disable_timing=True)
        target.data.copy_from_host_async(source.ctypes.data, source.nbytes)
        event.record()
        return event.synchronize

    def fetch(self, array):
        """Starts a copy to the host. Returns wait(), which waits and returns a NumPy array."""
        host = self.pinned(array.nbytes)
        event = self.xp.cuda.Event(disable_timing=True)
        array.data.copy_to_host_async(host.ctypes.data, array.nbytes)
        event.record()

        def wait():
            event.synchronize()
            return host.view(array.dtype).reshape(array.shape)
        return wait

    def linear(self, x, w, add_to=None):
        """x [T, in] @ w [out, in] transposed -> [T, out] in bfloat16, with sums in float32. add_to:
        an array [T, out]; the product is added to this array, and the array returned."""
        # cuBLAS stores matrices by columns: our x [T, in] is x' [in, T] for cuBLAS. cuBLAS computes
        # w x'; the columns of w x' are our rows of [T, out].
        T, columns = x.shape
        rows = len(w)
        out = self.empty((T, rows)) if add_to is None else add_to
        beta = ZERO if add_to is None else ONE
        self.set_stream(self.cublas, self.xp.cuda.get_current_stream().ptr)
        status = self.gemm(
            self.cublas, CUBLAS_OP_T, CUBLAS_OP_N, rows, T, columns, ONE,
            w.data.ptr, CUDA_R_16BF, columns, x.data.ptr, CUDA_R_16BF, columns,
            beta, out.data.ptr, CUDA_R_16BF, rows, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT)
        if status != 0:                             # after an error of a kernel, for one
            raise self.xp.cuda.cublas.CUBLASError(status)
        return out

    def record(self, function):
        """Runs function() once, captures the kernels as a CUDA graph, and returns (result, replay).
        replay() costs one launch, overwrites the result's arrays, and returns the same arrays.

        The CPU needs some microseconds to start a kernel, and a decode step has more than a hundred
        kernels. A CUDA graph starts all at once, with the arguments of the recording: everything
        that changes from step to step must be data at fixed addresses.
        """
        # The graph's stream does not wait for the current stream, which writes function()'s input.
        self.xp.cuda.get_current_stream().synchronize()
        # A graph's arrays must not be reused while the graph may run: their pool lives as long as
        # the device. All graphs share the pool: graphs run in turn, and each result stays taken.
        with (recording(self), self.xp.cuda.using_allocator(self.graph_pool.malloc),
              self.graph_stream as stream):
            first = function()                      # compiles, loads and allocates everything
            stream.begin_capture()
            try:
                result = function()
            finally:                                # also after Ctrl-C, or the stream would stay in capture
                graph = stream.end_capture()
            stream.synchronize()

        def replay():
            graph.launch(self.xp.cuda.get_current_stream())
            return result
        return first, replay


class CpuDevice:
    """A CPU with the kernels in the simulator, and with the members of CudaDevice."""
    is_simulated = True
    is_recording = False
    headers = ()                                    # simulator.py puts simulator.h in front
    CompileError = simulator.CompileError
    number = 0
    count = math.inf                                # of GPUs: as many processes as one likes
    runs_fp8 = True
    memory_bandwidth = None                         # no figure of the simulator's speed means anything
    has_warned = False

    def __init__(self):
        if not simulator.find_compiler():
            raise TinyVLLMError("expected an NVIDIA GPU or a C++ compiler, found none: install g++ (apt "
                                "install g++), check $CXX if it is set, or run where there is a GPU")
        self.xp = np
        self.name = f"simulated GPU on {os.cpu_count()} CPU cores"
        self.multiprocessors = 1 if simulator.is_sanitizing() else 2        # thread blocks that run at once
        self.runs_decode = False                    # decode.cu would be no faster here; tests set it
        self.float32_weights = {}                   # id of a weight -> its copy in float32
        if not CpuDevice.has_warned:
            print("tiny-vLLM: no GPU is used; the kernels run in a CPU simulator, slowly.", file=sys.stderr)
            CpuDevice.has_warned = True

    def load_module(self, code, options, kernel_names):
        return simulator.RawModule(code, options, kernel_names)

    def empty(self, shape, dtype=BFLOAT16):
        return np.empty(shape, dtype)

    def to_device(self, array):
        return np.array(array, order="C")           # a copy, as on a GPU: the caller may change `array`

    def address(self, array):
        return array.ctypes.data

    def memory(self):
        # A third of the machine's memory: the float32 copies of the weights take two thirds.
        third = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 3
        return third, third

    def pinned(self, num_bytes):
        return np.empty(num_bytes, np.uint8)

    def copy(self, target, source):
        target[:] = source
        return lambda: None

    def fetch(self, array):
        host = np.array(array)                      # a launch returns when the kernel is done
        return lambda: host

    def linear(self, x, w, add_to=None):
        # For bfloat16 NumPy has no BLAS. Each weight is converted only once: weights never change.
        if id(w) not in self.float32_weights:
            self.float32_weights[id(w)] = w.astype(np.float32)
            weakref.finalize(w, self.float32_weights.pop, id(w))
        out = x.astype(np.float32) @ self.float32_weights[id(w)].T
        if add_to is None:
            return out.astype(BFLOAT16)
        add_to[:] = out + add_to
        return add_to

    def record(self, function):
        def replay():
            with recording(self):                   # as on a GPU, where a replay repeats the recording
                return function()
        return replay(), replay


def open_device(name="auto", number=None):
    """name: "cuda", "cpu", or "auto": a GPU if there is one. number: of the GPU; None: the current one."""
    if name not in ("auto", "cpu", "cuda"):
        raise TinyVLLMError(f"device: expected auto, cpu or cuda, got {name!r:.60}")
    if name == "cpu":
        return CpuDevice()
    try:
        import cupy
        cupy.cuda.runtime.getDeviceCount()          # raises without a driver or a GPU
    except Exception as error:                      # CuPy raises many kinds; an import can fail half-way
        if isinstance(error, OSError):
            check_cupy_cache()
        problem = f"no NVIDIA GPU can be used ({first_line(error)})"
        if name == "cuda":
            raise TinyVLLMError(f"{problem}: check nvidia-smi and `pip install cupy-cuda12x`, or use "
                                "--device cpu") from None
        if not isinstance(error, ModuleNotFoundError):
            print(f"tiny-vLLM: CuPy is here, but {problem}", file=sys.stderr)
        return CpuDevice()
    return CudaDevice(number)
