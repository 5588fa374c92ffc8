"""Several GPUs of one machine: a process for each, the channel between the processes, and sums over all.

Tensor parallelism: each process, a *rank*, has a GPU and a part of every large matrix. Rank 0 is the
user's own process. Rank 0 alone knows requests, pages and text. Before rank 0 launches a step, it sends
the step's arrays to the other ranks, and they launch the same step:

    rank 0      schedule   send   launch ................ read the tokens
    rank 1                        receive   launch

Twice in each layer, the ranks add up their products: all_reduce. Before sampling, they put together the
logits: all_gather. For few numbers, both are kernels of our own, which write to the memory of the other
GPUs (kernels.cu). For many numbers, both are NVIDIA's library NCCL, but never in a CUDA graph: NCCL's end
waits for the end of all graphs with NCCL's kernels. In a step of a few sequences, decode.cu's kernel adds
the products up itself. The results have the same bits in all ranks. So all ranks sample the same tokens,
each has the tokens that its next step needs, and rank 0 gets no message during a run.

In the simulator the ranks are processes on the CPU. The very same kernels run, in shared memory.

All ranks end together. When rank 0 ends, for whatever reason, the system closes its connections, and a
thread of each other rank ends that rank (watch). When another rank ends, a thread of rank 0 sets the word
`stop`: no kernel waits for that rank any longer, and check() raises an error before a token is used.
"""
import contextlib
import mmap
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref

import numpy as np

from device import TinyVLLMError, first_line

# An inbox holds so many bytes of numbers, divided by the number of other ranks: each sends as many. Between
# two H200, NCCL takes twice the time of our kernels for so many bytes, and less time for 16 times as many.
INBOX_BYTES = 2 << 20
NCCL_SUM = 0                            # numbers of NCCL's interface
NCCL_BFLOAT16 = 9
COMPARE_STEPS = 64                      # after so many steps, the ranks compare the sampled tokens
END_SECONDS = 5                         # for the other ranks to end, before they are killed
KILL_SECONDS = 2                        # for killed ranks to end, and for NCCL
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# --------------------------------------------------------------------------------------------------
# Processes and their channel
# --------------------------------------------------------------------------------------------------
class Failure:
    """A message of a rank that ends: the reason, in one line."""

    def __init__(self, line):
        self.line = line


def wait_for(processes, seconds):
    """Waits until the processes have ended, for so many seconds at most."""
    deadline = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0, deadline - time.monotonic()))


class Channel:
    """The connections of a rank: rank 0 has one to each other rank, the others one to rank 0. A message
    is any object that can be pickled."""

    def __init__(self, sockets, processes=()):
        """processes: of the other ranks, in rank 0."""
        self.sockets = sockets
        self.readers = [connection.makefile("rb") for connection in sockets]
        self.processes = processes
        self.process_id = os.getpid()
        self.is_closed = False
        self.failure = None             # why the ranks cannot go on, in one line
        self.stop = np.zeros(1, np.uint64)      # not 0: no kernel may wait for another rank
        self.nccl = None
        self.has_failed = threading.Event()
        # At its end, Python starts no thread, so this thread waits from the beginning.
        self.aborter = threading.Thread(target=self.abort_nccl, daemon=True)
        self.aborter.start()

    def send(self, message):
        """Sends a message over each connection."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        for connection in self.sockets:
            connection.sendall(data)

    def receive(self):
        """The next message of each connection, a list."""
        messages = []
        for number, reader in enumerate(self.readers):
            message = self.load(number, reader)
            if isinstance(message, Failure):
                raise TinyVLLMError(message.line)
            messages.append(message)
        return messages

    def load(self, number, reader):
        """The next message of a connection: a Failure if the rank has ended."""
        try:
            return pickle.load(reader)
        except (OSError, EOFError, pickle.UnpicklingError):     # the end, or the end in the middle
            if not self.processes:
                os._exit(1)             # rank 0 has ended
            wait_for([self.processes[number]], END_SECONDS)
            code = self.processes[number].returncode
            if code is None:
                how = "has closed its connection"
            else:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return Failure(f"rank {number + 1} {how}: start the program anew")

    def watch(self):
        """Waits for the end of a connection, in a thread of its own. (The system could also kill a rank when
        rank 0 dies, PR_SET_PDEATHSIG. But that goes by the thread of rank 0 that has started the rank.)"""
        poll = select.poll()
        for connection in self.sockets:
            poll.register(connection, select.POLLIN if self.processes else select.POLLRDHUP)
        [(descriptor, _), *_] = poll.poll()
        if not self.processes:
            self.stop[0] = 1
            os._exit(1)
        if self.is_closed:
            return
        number = [connection.fileno() for connection in self.sockets].index(descriptor)
        self.fail(self.load(number, self.readers[number]).line)

    def fail(self, line):
        """Ends the other ranks, and the waiting for them."""
        self.failure = self.failure or line
        self.stop[0] = 1
        for process in self.processes:
            process.kill()
        self.has_failed.set()
        self.aborter.join(KILL_SECONDS)

    def abort_nccl(self):
        """Ends NCCL after a failure, once, in a thread of its own: the end may wait for ever."""
        self.has_failed.wait()
        if self.nccl:
            self.nccl.abort()

    def check(self):
        """Raises TinyVLLMError if a rank has ended: what was computed since may be wrong."""
        if self.stop[0]:
            raise TinyVLLMError(self.failure)

    def close(self):
        """In rank 0: ends the other ranks, each after the steps that were launched."""
        if os.getpid() != self.process_id:              # a fork of rank 0 ends
            return
        self.is_closed = True
        for connection in self.sockets:
            connection.settimeout(END_SECONDS)
        with contextlib.suppress(OSError):
            self.send(None)
        wait_for(self.processes, END_SECONDS)
        self.fail("the ranks have ended")
        wait_for(self.processes, KILL_SECONDS)
        for end in *self.readers, *self.sockets:
            end.close()


def start_process(command, inherited=(), **options):
    """Returns (a new process, a socket to the process). The command's last words are the numbers of the
    process's own socket and of the inherited files. A session of its own: a terminal's Ctrl-C reaches the
    caller alone. options: of Popen."""
    ours, theirs = socket.socketpair()
    with theirs:
        numbers = theirs.fileno(), *inherited
        process = subprocess.Popen([*command, *map(str, numbers)], pass_fds=numbers, start_new_session=True,
                                   **options)
    return process, ours


def start_ranks(size, command):
    """Starts the ranks 1 to size - 1, by a command that calls follow(). Returns rank 0's Communicator."""
    if size == 1:
        return OneRank()
    sockets = []
    processes = []
    memory = os.memfd_create("tinyvllm")
    for rank in range(1, size):
        process, ours = start_process([*command, str(rank), str(size)], [memory], stdin=subprocess.DEVNULL,
                                      stdout=subprocess.DEVNULL)
        processes.append(process)
        sockets.append(ours)
    return Communicator(0, size, Channel(sockets, processes), memory)


def follow(main):
    """Runs main(communicator) in a process that start_ranks() has started. Rank 0 learns of an error."""
    for number in SIGNALS:              # rank 0 decides when all end
        signal.signal(number, signal.SIG_IGN)
    rank, size, descriptor, memory = map(int, sys.argv[-4:])
    channel = Channel([socket.socket(fileno=descriptor)])
    threading.Thread(target=channel.watch, daemon=True).start()
    try:
        main(Communicator(rank, size, channel, memory))
        os._exit(0)                     # NCCL's own end would wait for the other ranks
    except BaseException as error:
        kind = "" if isinstance(error, TinyVLLMError) else f"{type(error).__name__}: "
        with contextlib.suppress(OSError):
            channel.send(Failure(f"rank {rank}: {kind}{first_line(error)}"))
        os._exit(1)


@contextlib.contextmanager
def uninterrupted():
    """Signals that come in the block take effect at its end. Only the main thread handles signals."""
    came = []
    handlers = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if callable(signal.getsignal(number)):
                    handlers[number] = signal.getsignal(number)
                    signal.signal(number, lambda *arguments: came.append(arguments))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in came:
            handlers[number](number, frame)


# --------------------------------------------------------------------------------------------------
# What the engine calls
# --------------------------------------------------------------------------------------------------
class OneRank:
    """The Communicator of an engine with one GPU: there is nothing to do."""
    rank = 0
    size = 1
    fits_graphs = True
    word_addresses = None

    def exchange(self, value):
        return [value]

    def connect(self, device, kernels, num_words):
        pass

    def announce(self, size, arrays):
        return contextlib.nullcontext()

    def keep(self, tokens):
        pass

    def check(self):
        pass

    def all_reduce(self, x):
        return x

    def all_gather(self, x):
        return x


class Communicator:
    """What one rank has of the others. All ranks call connect(), exchange(), all_reduce() and all_gather() in
    the same order, with arrays of the same shapes."""

    def __init__(self, rank, size, channel, memory):
        """memory: a file of shared memory, for the simulator."""
        self.rank = rank
        self.size = size
        self.channel = channel
        self.memory = memory
        self.num_steps = 0
        self.get_kept = None            # see keep()
        if rank == 0:                   # called at the latest when the LLM is gone, or the program ends
            self.close = weakref.finalize(self, channel.close)

    def exchange(self, value):
        """[the value of each rank], in every rank."""
        if self.rank > 0:
            self.channel.send(value)
            return self.channel.receive()[0]
        values = [value, *self.channel.receive()]
        self.channel.send(values)
        return values

    def connect(self, device, kernels, num_words=0, inbox_bytes=INBOX_BYTES):
        """Gets ready for all_reduce() and all_gather(), at the end of loading. kernels: of kernels.cu.
        num_words: of a rank, for decode.cu."""
        self.device = device
        self.kernels = kernels
        self.most_blocks = kernels.EXCHANGE_BLOCKS * min(self.exchange(device.multiprocessors))
        num_pieces = inbox_bytes // (self.size - 1) // (4 * kernels.EXCHANGE_THREADS)
        self.capacity = num_pieces * kernels.EXCHANGE_THREADS           # words of four bytes, two numbers
        self.calls = device.xp.zeros(num_pieces, np.int32)
        stop = device.pinned(8).view(np.uint64)         # the kernels read it, too
        stop[0] = 0
        self.channel.stop = stop
        num_bytes = 2 * self.size * self.capacity * 8   # of an inbox: two buffers, with numbers of calls
        # Behind each rank's inbox lie the rank's words for decode.cu.
        if device.is_simulated:
            inboxes = self.map_inboxes(num_bytes + 4 * num_words)
        else:
            self.open_nccl()
            inboxes = self.open_inboxes(num_bytes + 4 * num_words)
        os.close(self.memory)
        self.fits_graphs = bool(inboxes)                # without inboxes, only NCCL is left
        words = [inbox + num_bytes for inbox in inboxes]
        self.addresses = device.to_device(np.array([*inboxes, stop.ctypes.data], np.uint64))
        self.word_addresses = device.to_device(np.array([*words, stop.ctypes.data], np.uint64))
        self.exchange("ready")
        if self.rank == 0:
            self.watcher = threading.Thread(target=self.channel.watch, daemon=True)
            self.watcher.start()

    def map_inboxes(self, num_bytes):
        """The addresses of all inboxes, in the memory that the simulator's processes share."""
        os.ftruncate(self.memory, self.size * num_bytes)        # zeros, where the file gets longer
        self.inboxes = np.frombuffer(mmap.mmap(self.memory, self.size * num_bytes), np.uint8)
        return [self.inboxes.ctypes.data + rank * num_bytes for rank in range(self.size)]

    def open_inboxes(self, num_bytes):
        """The addresses of all inboxes, each in the memory of a GPU. [] where a GPU cannot reach another. An
        inbox is no part of CuPy's pool: other processes can open whole allocations only."""
        runtime = self.device.xp.cuda.runtime
        mine = self.device.number
        others = set(self.exchange(mine)) - {mine}
        reaches = all(runtime.deviceCanAccessPeer(mine, other) for other in others)
        if not all(self.exchange(reaches)):
            if not self.channel.nccl:
                raise TinyVLLMError("tensor_parallel_size: expected GPUs that can read one another's memory, "
                                    "or NCCL, found neither: pip install nvidia-nccl-cu12 (or -cu13)")
            return []
        inbox = runtime.malloc(num_bytes)
        runtime.memset(inbox, 0, num_bytes)
        runtime.deviceSynchronize()
        handles = self.exchange(runtime.ipcGetMemHandle(inbox))
        return [inbox if rank == self.rank else runtime.ipcOpenMemHandle(handle)
                for rank, handle in enumerate(handles)]

    def open_nccl(self):
        """Makes NCCL's communicator, unless a rank lacks the library."""
        from cupy.cuda import nccl
        if all(self.exchange(nccl.available)):
            name = self.exchange(nccl.get_unique_id() if self.rank == 0 else None)[0]
            self.channel.nccl = nccl.NcclCommunicator(self.size, name, self.rank)

    # ---- Steps ----
    @contextlib.contextmanager
    def announce(self, size, arrays):
        """In rank 0: sends a step to the other ranks; the block launches the same step. No signal interrupts
        the block. After an error in the block, all ranks end, since the others would wait for kernels that
        rank 0 has not launched. size: of the step's CUDA graph, or None."""
        with uninterrupted():
            self.check()
            kept = self.get_kept() if self.get_kept and self.num_steps % COMPARE_STEPS == 2 else None
            layout = [(array.dtype.str, array.shape) for array in arrays]
            data = b"".join(arrays)
            try:
                self.channel.send((size, layout, data, kept))
                yield
            except BaseException as error:
                if isinstance(error, ConnectionError):  # the watcher knows why the connection has ended
                    self.watcher.join(END_SECONDS + KILL_SECONDS)
                self.check()                            # the end of a rank can be the reason for any error
                self.channel.fail(f"rank 0: {first_line(error)}: start the program anew")
                raise

    def receive_step(self):
        """In another rank: (size, arrays) of the next step; None at the end."""
        message = self.channel.receive()[0]
        if message is None:
            self.device.fetch(self.calls)()             # waits for all steps
            return None
        size, layout, data, kept = message
        if kept is not None and (kept != self.get_kept()).any():
            raise TinyVLLMError("expected the tokens of rank 0, sampled others: start the program anew")
        arrays = []
        start = 0
        for dtype, shape in layout:
            count = int(np.prod(shape))
            array = np.frombuffer(data, dtype, count, start).reshape(shape)
            arrays.append(array)
            start += array.nbytes
        return size, arrays

    def keep(self, tokens):
        """Called after each launch. Keeps the tokens of every 64th step. Two steps later, rank 0 has read
        them and sends them with the step, and the other ranks compare. tokens: an array of the device."""
        self.num_steps += 1
        if self.num_steps % COMPARE_STEPS == 0:
            self.get_kept = self.device.fetch(tokens)

    def check(self):
        """Raises TinyVLLMError if a rank has ended."""
        self.channel.check()

    # ---- Sums and parts ----
    def is_for_nccl(self, x):
        """Whether NCCL takes so many numbers."""
        is_large = x.size > 2 * self.capacity or not self.fits_graphs
        return self.channel.nccl and is_large and not self.device.is_recording

    def call_nccl(self, name, *arguments):
        """Calls a function of NCCL, on the current stream. After the end of a rank, another thread frees
        NCCL's memory."""
        self.check()
        getattr(self.channel.nccl, name)(*arguments, self.device.xp.cuda.get_current_stream().ptr)

    def parts(self, count):
        """Yields (first, count, grid): so many numbers, in parts that fit into an inbox."""
        most = 2 * self.capacity
        for first in range(0, count, most):
            part = min(most, count - first)
            num_pieces = -(-part // (2 * self.kernels.EXCHANGE_THREADS))
            yield first, part, (min(num_pieces, self.most_blocks),)

    def all_reduce(self, x):
        """Replaces x by the sum over the ranks, and returns it. x: bfloat16, an even number of them."""
        if self.is_for_nccl(x):
            self.call_nccl("allReduce", x.data.ptr, x.data.ptr, x.size, NCCL_BFLOAT16, NCCL_SUM)
            return x
        numbers = x.reshape(-1)
        for first, count, grid in self.parts(x.size):
            self.kernels.all_reduce(grid, numbers[first:first + count], count, self.addresses,
                                    self.rank, self.size, self.capacity, self.calls)
        return x

    def all_gather(self, x):
        """[R, ranks * columns]: the ranks' x [R, columns], side by side. columns: even."""
        rows, columns = x.shape
        if self.is_for_nccl(x):
            parts = self.device.empty((self.size, rows, columns))
            self.call_nccl("allGather", x.data.ptr, parts.data.ptr, x.size, NCCL_BFLOAT16)
            return self.device.xp.ascontiguousarray(parts.transpose(1, 0, 2)).reshape(rows, -1)
        out = self.device.empty((rows, self.size * columns))
        for first, count, grid in self.parts(x.size):
            self.kernels.all_gather(grid, out, x, columns, first, count, self.addresses, self.rank,
                                    self.size, self.capacity, self.calls)
        return out
