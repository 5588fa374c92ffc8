"""A stand-in for cupy.RawModule on a machine without a GPU.

simulator.h gives a C++ compiler the words that CUDA adds to C++. RawModule compiles the text of .cu
files behind simulator.h into a shared library and calls the kernels in the library:

    module = RawModule(code, options=("-DHEAD_DIM=64",), kernel_names=["rms_norm"])
    rms_norm = module.get_function("rms_norm")
    rms_norm((num_rows, 1, 1), (256, 1, 1), [out, residual, rows, weight])      # NumPy arrays

The kernels are the very same as on a GPU, but slow. With TINYVLLM_SANITIZE=1 in the environment
AddressSanitizer checks every access to memory.
"""
import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import numpy as np

HEADER = Path(__file__).resolve().parent / "simulator.h"
FLAGS = ["-O3", "-march=native", "-fno-strict-aliasing", "-shared", "-fPIC", "-fvisibility=hidden",
         "-pthread", "-w"]
SANITIZER_FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
                   "-fno-sanitize-recover=undefined"]


class CompileError(Exception):
    """The code does not compile, or there is nothing to compile it with. The text is the compiler's."""


class LaunchError(Exception):
    """A thread of a kernel made a mistake. The text names kernel, thread block, thread and line."""


def find_compiler():
    """The command of a C++ compiler, a list: $CXX, else g++ or clang++. None if there is none."""
    wanted = os.environ.get("CXX", "").split()
    commands = [wanted] if wanted else [["g++"], ["clang++"]]
    return next((command for command in commands if shutil.which(command[0])), None)


def is_sanitizing():
    """Whether the environment asks for AddressSanitizer."""
    return os.environ.get("TINYVLLM_SANITIZE", "") not in ("", "0")


class RawModule:
    """CUDA source text, compiled for this CPU. The shared library is cached by its content."""

    def __init__(self, code, options=(), kernel_names=()):
        """options: of the compiler, such as -DNAME=VALUE. kernel_names: the kernels to be called."""
        compiler = find_compiler()
        if compiler is None:
            raise CompileError("expected a C++ compiler, found none: install g++ (apt install g++)")
        # AddressSanitizer must be loaded before Python allocates memory for the first time.
        if is_sanitizing() and not hasattr(ctypes.CDLL(None), "__asan_init"):
            raise CompileError('TINYVLLM_SANITIZE=1 needs LD_PRELOAD="$(g++ -print-file-name=libasan.so) '
                               '$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0')
        sanitizer_flags = SANITIZER_FLAGS if is_sanitizing() else []
        flags = [*FLAGS, *sanitizer_flags, *options]
        exports = "".join(f"SIMULATOR_EXPORT({name})\n" for name in kernel_names)
        source = HEADER.read_text() + code + "\n" + exports
        try:
            self.library = ctypes.CDLL(str(compile_library(compiler, flags, source)))
        except (OSError, RuntimeError) as error:        # RuntimeError: there is no home
            raise CompileError(f"{error}: expected {compiler[0]} to be a C++ compiler (see $CXX), and room "
                               "in a folder that you may write, $XDG_CACHE_HOME or ~/.cache") from None
        self.library.simulator_error.restype = ctypes.c_char_p

    def get_function(self, name):
        """The kernel of this name, to be called as Function.__call__ says."""
        return Function(self.library, name)

    def get_global(self, name):
        """The memory of a global int: a buffer for np.ndarray."""
        return ctypes.c_int.in_dll(self.library, name)

    def shuffle(self, seed):
        """Runs threads in another order from now on, which finds missing barriers. 0: in order."""
        self.library.simulator_shuffle(ctypes.c_ulonglong(seed))


class Function:
    """A kernel of a RawModule."""
    max_dynamic_shared_size_bytes = 0           # a caller may set it; the size stands in the kernel itself

    def __init__(self, library, name):
        self.library = library
        self.entry = getattr(library, f"{name}_launch")

    def __call__(self, grid, block, args, shared_mem=0):
        """Runs the kernel to its end. grid, block: three ints each. args: arrays and NumPy scalars."""
        # The entry takes an array of pointers to the arguments' values, as cuLaunchKernel does.
        # `values` keeps these alive during the call.
        values = [np.array(arg.ctypes.data if isinstance(arg, np.ndarray) else arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        if self.entry((ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), pointers):
            raise LaunchError(self.library.simulator_error().decode())


def compile_library(compiler, flags, source):
    """The path of the shared library that the source makes with these flags on this machine."""
    # -march=native means another thing on another machine: the compiler says which.
    machine, _ = run_compiler([*compiler, "-march=native", "-E", "-v", "-"], "")
    content = "\0".join([source, machine, *flags])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyvllm"
    library = cache / (hashlib.sha256(content.encode()).hexdigest()[:32] + ".so")
    if not is_whole(library):
        cache.mkdir(parents=True, exist_ok=True)
        with open(library.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)    # of several processes that want the library, one compiles
            if not is_whole(library):
                make_library([*compiler, *flags], source, library)
    return library


def make_library(command, source, library):
    """Compiles the source and writes the library."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder, "kernels.so")
        errors, code = run_compiler([*command, "-x", "c++", "-", "-o", str(made)], source, folder)
        if code:
            raise CompileError(errors or "the compiler gives no reason")
        data = made.read_bytes()
        made.write_bytes(data + hashlib.sha256(data).digest())
        os.replace(made, library)               # in one go: another process sees the whole file or none


def is_whole(library):
    """Whether the library is there, with the digest of its content as its last bytes. Half a
    library (a full disk, a copy that was cut) would end the process without a word, by SIGBUS."""
    data = library.read_bytes() if library.exists() else b""
    return data[-32:] == hashlib.sha256(data[:-32]).digest()


def run_compiler(command, source, folder=None):
    """(the compiler's stderr, its exit code). folder: for temporary files. An exception, such as
    Ctrl-C, also ends the compiler's own child processes."""
    environment = dict(os.environ, TMPDIR=folder) if folder else None
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          encoding="utf-8", errors="replace", env=environment,
                          start_new_session=True) as process:
        try:
            _, errors = process.communicate(source)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return errors, process.returncode
