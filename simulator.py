"""No GPU? Then the kernels run on the CPU: simulator.h gives a C++ compiler what CUDA has, and this is the device that calls it.

Slow, but the very same kernels.cu, with every access to memory checked if you like (TINYVLLM_SANITIZE=1).
"""
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import numpy as np

from tinyvllm import BFLOAT16, FOLDER, Kernels, TinyVLLMError, first_line, kernel_declarations


class CpuDevice:
    """The members of CudaDevice, with NumPy's arrays and the kernels in the simulator."""
    FLAGS = ["-O3", "-march=native", "-std=c++17", "-fno-strict-aliasing", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread", "-w"]
    SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    address = staticmethod(lambda array: array.ctypes.data)
    warned = False

    def __init__(self):
        self.xp = np
        self.compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
        if not self.compiler:
            raise TinyVLLMError("no NVIDIA GPU and no C++ compiler: install g++ (apt install g++), or run where there is a GPU")
        self.memory_bandwidth, self.runs_decode = None, False   # the simulator could, but would be no faster by it: for tests
        self.float32_weights = {}           # id of a weight -> the same in float32
        # TINYVLLM_SANITIZE=1 finds out-of-bounds accesses; AddressSanitizer must be there before Python's first malloc.
        sanitize = os.environ.get("TINYVLLM_SANITIZE", "") not in ("", "0")
        self.flags = self.FLAGS + (self.SANITIZE if sanitize else [])
        self.name, self.multiprocessors = f"simulated GPU on {os.cpu_count()} CPU cores", 1 if sanitize else 2    # blocks at once
        if sanitize and not hasattr(ctypes.CDLL(None), "__asan_init"):
            raise TinyVLLMError('TINYVLLM_SANITIZE=1 needs LD_PRELOAD="$(g++ -print-file-name=libasan.so) '
                                '$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0')
        if not CpuDevice.warned:
            print("tiny-vLLM: no GPU is used; the kernels run in a CPU simulator, slowly.", file=sys.stderr)
            CpuDevice.warned = True

    def empty(self, shape, dtype=BFLOAT16):
        return np.empty(shape, dtype)

    def to_device(self, array):
        return np.array(array, order="C")   # a copy, as on a GPU: the caller may change its own

    def memory(self):
        """Bytes: (free, total). A third of the machine's memory: the weights' float32 copies are twice their size."""
        third = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 3
        return third, third

    def pinned(self, num_bytes):
        return np.empty(num_bytes, np.uint8)

    def copy(self, target, source):
        target[:] = source

    def fetch(self, array):
        host = np.array(array)
        return lambda: host                 # a launch returns when it is done

    def record(self, function):
        return function(), function

    def linear(self, x, w, add_to=None):
        # NumPy multiplies bfloat16 element by element, without BLAS. A weight is converted once and must not change after.
        if id(w) not in self.float32_weights:
            self.float32_weights[id(w)] = w.astype(np.float32)
            weakref.finalize(w, self.float32_weights.pop, id(w))
        out = x.astype(np.float32) @ self.float32_weights[id(w)].T
        if add_to is None:
            return out.astype(BFLOAT16)
        add_to[:] = out + add_to
        return add_to

    def compile(self, defines, *paths):
        """g++ compiles the files behind simulator.h into a shared library, once for each content, flags and machine."""
        source = "".join(path.read_text() for path in paths)
        exports = "".join(f"SIMULATOR_EXPORT({name})\n" for _, name, _ in kernel_declarations(source))
        wrapper = "".join(f'#include "{path}"\n' for path in ("simulator.h", *paths)) + exports
        flags = self.flags + [f"-D{name}={value}" for name, value in defines.items()]
        # What the compiler says of itself, and of what "native" means on this machine.
        version = subprocess.run([self.compiler, "-march=native", "-E", "-v", "-"], input="", capture_output=True, text=True).stderr
        parts = [(FOLDER / "simulator.h").read_text(), source, wrapper, version, *flags]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyvllm"
        binary = cache / (hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32] + ".so")
        if not binary.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                command = [self.compiler, *flags, f"-I{FOLDER}", "-x", "c++", "-", "-o", f"{folder}/kernels.so"]
                result = subprocess.run(command, input=wrapper, capture_output=True, text=True)
                if result.returncode:
                    raise TinyVLLMError(f"kernels do not compile for this model: {first_line(result.stderr or 'no reason given', 'error')}")
                os.replace(f"{folder}/kernels.so", binary)          # at once: another process sees all of the file or none of it
        library = ctypes.CDLL(str(binary))
        library.simulator_error.restype = ctypes.c_char_p
        kernels = Kernels(source, np.ndarray, lambda name: self.get_launch(library, getattr(library, f"{name}_launch")))
        kernels.simulator_shuffle = library.simulator_shuffle       # for tests: threads in another order, see simulator.h
        return kernels

    def get_launch(self, library, entry):
        """A function (grid, block, values) that runs the kernel behind `entry`; values as checked_launch gives them."""
        def launch(grid, block, values):
            # As cuLaunchKernel wants it: an array of pointers, each to an argument's value. The 0-d arrays hold these values.
            slots = [np.array(value.ctypes.data if isinstance(value, np.ndarray) else value) for value in values]
            pointers = (ctypes.c_void_p * len(slots))(*(slot.ctypes.data for slot in slots))
            if entry((ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), pointers):
                raise TinyVLLMError(library.simulator_error().decode())
        return launch
