"""A load on an OpenAI-compatible server: client processes, and what must hold when they are done.

    server = Server(["python", "server.py", "--port", "0"])
    before = server.state()
    replies = Load(server, [[Job({"prompt": "Once", "max_tokens": 9})]]).wait()
    server.check(before, replies)

One asyncio client cannot read what 256 streams bring. The load therefore comes from several processes,
and their CPU time is part of the result: a client that is always busy measures itself. The clients speak
HTTP/1.1 over plain sockets and import nothing but the standard library.

The latency of a request counts from the *intended* start. A client that waits for a slow answer before
its next request would otherwise leave out the time for which the next request was late.

Sections: Jobs and replies, Client, Client processes, Server, Loads.
"""
import asyncio
import contextlib
import json
import os
import pickle
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

clock = time.monotonic                  # the same clock in all processes of a machine
PATIENCE = 300                          # seconds that a client waits for an answer
SLOW_BYTES = 1024                       # a slow client reads so much a second
SETTLE_SECONDS = 10                     # from the last answer until the server must be idle
SPARE_MEGABYTES = 20                    # that a server may hold more after a load than before
VICTIM_TOKENS = 3000                    # of an answer whose client is killed: the answer must not end before
NUM_RUNS = 5                            # of rows that compare the server with the engine alone
POOL_THREADS = min(32, os.cpu_count() + 4)      # of asyncio.to_thread, which starts them when needed


class LoadError(Exception):
    """An answer is lost or wrong, or the server has kept something: one line."""


# --------------------------------------------------------------------------------------------------
# Jobs and replies
# --------------------------------------------------------------------------------------------------
LEAVING = ("gone", "reset")             # kinds of clients that do not read to the end
STATUS = {"garbage": 400, "large": 413, "stranger": 401}        # of the answers to broken requests


@dataclass
class Job:
    """A request, and how its client behaves.

    kind: "whole" reads the answer; "slow" reads SLOW_BYTES a second; "gone" closes the connection after
    a while, "reset" breaks it off; "half" sends half of a request and then nothing; "garbage" sends no
    HTTP, "large" 9 MiB, "stranger" a wrong key."""
    body: dict                          # of POST /v1/completions
    due: float | None = None            # seconds after the load's start; None: as the job before ends
    expected: tuple | None = None       # (text, finish reason, tokens) of the answer, where known
    kind: str = "whole"
    stays: float = 0.0                  # seconds until a client of LEAVING leaves
    excused: tuple = ()                 # statuses that will do as well: 503, the server is full; 0, nothing

    def request(self, key):
        """The bytes that the client sends."""
        if self.kind == "garbage":
            return bytes(range(256)) + b"\r\n\r\n"
        body = json.dumps(self.body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
        if self.kind == "large":
            body = b" " * (9 << 20)
        if self.kind == "stranger":
            key = "a wrong key"
        head = (f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n")
        request = head.encode() + body
        return request[:len(request) // 2] if self.kind == "half" else request


@dataclass
class Reply:
    """What a client has got for a job. Times are clock()'s."""
    job: Job
    due: float                          # the intended start
    first: float | None = None          # of the answer's first event
    end: float | None = None
    status: int = 0                     # of HTTP; 0: nothing came
    answer: tuple | None = None         # (text, finish reason, tokens) of an answer that came whole
    num_prompt_tokens: int = 0
    error: str = ""

    def read(self, data):
        """Takes status and answer from the bytes of a connection."""
        head, _, body = data.partition(b"\r\n\r\n")
        self.status = int(head.split(maxsplit=2)[1])
        if b"chunked" in head:
            body = b"".join(chunks(body))
        events = [event[6:] for event in body.split(b"\n\n") if event.startswith(b"data: ")]
        if events and events[-1] == b"[DONE]":
            *pieces, last = json.loads(b"[%s]" % b",".join(events[:-1]))
            choices = [piece["choices"][0] for piece in pieces]
            usage = last["usage"]
            text = "".join(choice["text"] for choice in choices)
            self.answer = (text, choices[-1]["finish_reason"], usage["completion_tokens"])
            self.num_prompt_tokens = usage["prompt_tokens"]

    def fault(self):
        """What is wrong with the reply, as text; "" if nothing is."""
        job = self.job
        if job.kind in LEAVING or self.status in job.excused:
            return ""
        status = 0 if job.kind == "half" else STATUS.get(job.kind, 200)
        if self.status != status or self.end - self.due > PATIENCE:
            return f"a client of kind {job.kind} expected status {status}, got {self.status} {self.error}"
        if status != 200:
            return ""
        if not self.answer:
            return f"an answer is cut short {self.error}"
        most = job.body["max_tokens"]
        expected = job.expected or (self.answer[0], "length", most)
        may_stop = not job.expected and not job.body.get("ignore_eos") and self.answer[1] == "stop"
        if self.answer != expected and not may_stop:
            return (f"an answer is wrong: expected {expected[1:]}, {expected[0]!r:.40}, got "
                    f"{self.answer[1:]}, {self.answer[0]!r:.40}")
        return ""


def chunks(body):
    """The chunks of a body with Transfer-Encoding: chunked, as far as the body goes."""
    start = 0
    while start < len(body):
        line, _, _ = body[start:start + 20].partition(b"\r\n")
        size = int(line, 16)
        start += len(line) + 2
        yield body[start:start + size]
        start += size + 2


# --------------------------------------------------------------------------------------------------
# Client
# --------------------------------------------------------------------------------------------------
async def exchange(address, request, reply):
    """Sends a job's request, and reads until the connection ends. Returns the bytes."""
    job = reply.job
    is_slow = job.kind == "slow"
    connection = socket.socket()
    connection.setblocking(False)
    if is_slow:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    if job.kind == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    data = bytearray()
    with connection:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, address)
        sending = asyncio.create_task(loop.sock_sendall(connection, request))
        try:
            while part := await loop.sock_recv(connection, SLOW_BYTES if is_slow else 65536):
                data += part
                if reply.first is None and b"data: " in data:
                    reply.first = clock()
                if is_slow:
                    await asyncio.sleep(1)
        except ConnectionError as error:            # the server may end a connection so
            reply.error = f"({error})"
        finally:
            sending.cancel()
    return data


async def run_job(address, key, job, start):
    """Does a job. Returns the reply."""
    due = clock() if job.due is None else start + job.due
    await asyncio.sleep(max(0, due - clock()))
    reply = Reply(job, due)
    request = job.request(key)
    seconds = job.stays if job.kind in LEAVING else PATIENCE
    try:
        data = await asyncio.wait_for(exchange(address, request, reply), seconds)
        reply.end = clock()
        if data and job.kind not in LEAVING:
            reply.read(bytes(data))
    except (OSError, asyncio.TimeoutError, ValueError, LookupError) as error:
        reply.error = f"({type(error).__name__} {error})"
    reply.end = reply.end or clock()
    return reply


async def run_stream(address, key, jobs, start):
    """Does jobs one after another. Returns the replies."""
    return [await run_job(address, key, job, start) for job in jobs]


async def run_streams(address, key, streams, start):
    """Does the jobs of all streams at once. Returns all replies."""
    done = await asyncio.gather(*(run_stream(address, key, jobs, start) for jobs in streams))
    return [reply for replies in done for reply in replies]


def client():
    """A client process: says that it is there, reads its streams from stdin, writes the replies and its
    CPU seconds to stdout."""
    sys.stdout.buffer.write(b".")
    sys.stdout.buffer.flush()
    arguments = pickle.load(sys.stdin.buffer)
    before = time.process_time()
    replies = asyncio.run(run_streams(*arguments))
    pickle.dump((replies, time.process_time() - before), sys.stdout.buffer)


# --------------------------------------------------------------------------------------------------
# Client processes
# --------------------------------------------------------------------------------------------------
class Load:
    """Client processes that do the jobs of streams: lists of jobs, each list one after another."""

    def __init__(self, server, streams, num_processes=8):
        num_processes = min(num_processes, len(streams))
        self.processes = [
            subprocess.Popen([sys.executable, "-c", "import load; load.client()"], cwd=Path(__file__).parent,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(num_processes)]
        for process in self.processes:
            process.stdout.read(1)                  # the process is there
        self.start = clock() + 0.1
        for i, process in enumerate(self.processes):
            arguments = (server.address, server.key, streams[i::num_processes], self.start)
            pickle.dump(arguments, process.stdin)
            process.stdin.flush()

    def kill(self):
        """Kills the processes, as kill -9 does: the system closes their connections."""
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait(self):
        """Waits for the end of all jobs. Returns the replies; self.cpu: CPU seconds of each process."""
        results = [pickle.load(process.stdout) for process in self.processes]
        for process in self.processes:
            process.communicate()
        self.cpu = [cpu for _, cpu in results]
        return [reply for replies, _ in results for reply in replies]


def check_replies(replies):
    """Raises LoadError for a reply with a fault."""
    faults = [fault for fault in (reply.fault() for reply in replies) if fault]
    if faults:
        raise LoadError(f"{len(faults)} of {len(replies)} requests: {faults[0]}")


# --------------------------------------------------------------------------------------------------
# Server
# --------------------------------------------------------------------------------------------------
def with_children(pid):
    """The numbers of a process and of its children."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):          # it has just ended
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                children.append(int(stat.parent.name))
    return [pid, *children]


@dataclass
class State:
    """A server's processes at a moment."""
    held: dict                          # {what: how much}
    metrics: dict                       # {name: value}


class Server:
    """A server in processes of its own, and what can be seen of them from outside."""

    def __init__(self, command):
        """command: starts a server that says on stderr where it listens."""
        self.key = os.urandom(8).hex()
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(command, stderr=self.log, stdout=self.log,
                                        env=os.environ | {"TINYVLLM_API_KEY": self.key})
        while not (match := re.search(r"http://([\d.]+):(\d+)/v1", self.output())):
            if self.process.poll() is not None:
                raise LoadError(f"the server has not started: {self.output().strip().rpartition(chr(10))[2]}")
            time.sleep(0.02)
        self.address = (match[1], int(match[2]))
        self.pids = with_children(self.process.pid)     # the server's own, and its worker's

    def output(self):
        """What the process has written so far."""
        return os.pread(self.log.fileno(), 1 << 20, 0).decode("utf-8", "replace")

    def stop(self):
        """Ends the process by SIGTERM. Returns the exit code."""
        self.process.terminate()
        return self.process.wait()

    def metrics(self):
        """{name: value} of /metrics; finish reasons are part of the name."""
        url = f"http://{self.address[0]}:{self.address[1]}/metrics"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self.key}"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                text = response.read().decode()
        except OSError as error:
            raise LoadError(f"the server does not answer any more ({error})") from None
        values = {}
        for name, labels, value in re.findall(r"^vllm:(\w+)\{(.*)\} (\S+)$", text, re.M):
            reason = re.search('finished_reason="(.*?)"', labels)
            values[f"{name} {reason[1]}" if reason else name] = float(value)
        return values

    def state(self):
        """What the processes hold, and what the server has counted."""
        held = Counter()
        for pid in self.pids:
            folder = Path(f"/proc/{pid}")
            status = dict(re.findall(r"(\w+):\s+(\d+)", (folder / "status").read_text()))
            held["MB of memory"] += int(status["VmRSS"]) / 1024
            held["threads"] += int(status["Threads"])
            held["file descriptors"] += len(list((folder / "fd").iterdir()))
        return State(dict(held), self.metrics())

    def cpu_seconds(self):
        """CPU time of each process so far."""
        seconds = []
        for pid in self.pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            seconds.append((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
        return seconds

    def check(self, before, replies, some_left=False):
        """Raises LoadError if an answer is lost or wrong, or if the server keeps anything. before: its
        state() before the load. some_left: whether clients without a reply have left."""
        check_replies(replies)
        end = clock() + SETTLE_SECONDS
        while leak := self.leak(before.held):
            if clock() > end:
                raise LoadError(leak)
            time.sleep(0.05)
        whole = [reply for reply in replies if reply.answer]
        counts = {"request_success_total stop": sum(reply.answer[1] == "stop" for reply in whole),
                  "request_success_total length": sum(reply.answer[1] == "length" for reply in whole),
                  "generation_tokens_total": sum(reply.answer[2] for reply in whole),
                  "prompt_tokens_total": sum(reply.num_prompt_tokens for reply in whole)}
        # A client that leaves counts nothing, but the server counts what it has done until then.
        some_left = some_left or any(reply.job.kind in LEAVING for reply in replies)
        metrics = self.metrics()
        for name, count in counts.items():
            grown = metrics[name] - before.metrics[name]
            if grown < count or (grown > count and not some_left):
                raise LoadError(f"{name}: expected {count} more, as the clients count, got {grown:.0f}")

    def leak(self, before):
        """What the idle server still holds, as text; "" if nothing. before: State.held."""
        state = self.state()
        for name in "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc":
            if state.metrics[name]:
                return f"{name}: expected 0 after the load, got {state.metrics[name]}"
        spare = {"MB of memory": SPARE_MEGABYTES, "threads": POOL_THREADS, "file descriptors": 0}
        for what, value in state.held.items():
            if value > before[what] + spare[what]:
                return f"{what}: expected {before[what]:.0f} as before the load, got {value:.0f}"
        return ""


# --------------------------------------------------------------------------------------------------
# Loads
# --------------------------------------------------------------------------------------------------
# Parrot knows the answers, and is so sure of each token that an answer does not depend on the batch.
QUESTIONS = ("Who are you?", "Recite Ozymandias.", "What is a KV cache?", "Recite The Tyger.",
             "What is preemption?", "Recite Jabberwocky.", "What is a warp?", "Recite If.")
BROKEN = {"gone": 0.1, "reset": 0.1, "half": 0.05, "garbage": 0.02, "large": 0.02, "stranger": 0.02}


@dataclass
class Sizes:
    """How large the loads are; by default for a GPU."""
    streams: int = 256                  # that run at once
    prompt: int = 128                   # tokens of a prompt
    new: int = 256                      # new tokens; of an answer to QUESTIONS half as many, at most
    seconds: float = 5                  # for which requests arrive
    kill_seconds: float = 1             # until the pages of killed clients must be free
    # Pages of the KV cache, unless an option says otherwise. The prefix cache remembers the tokens of each
    # page, and a simulated page is the process's own memory. So memory grows until each page was used once:
    # a small pool is soon as large as it gets, and no growth is mistaken for a leak.
    num_blocks: int = 16_384
    warm_ups: int = 5                   # loads that use each page once


SIMULATED = Sizes(streams=8, prompt=16, new=16, seconds=10, kill_seconds=10, num_blocks=256, warm_ups=1)


@dataclass
class Offline:
    """What the engine does without a server."""
    tokens_per_second: float            # new tokens of all streams at once, the median of NUM_RUNS
    first_token_ms: float               # of a lone request
    vocab_size: int
    questions: list                     # (ids of one of QUESTIONS, answer): the answer is (text, finish
                                        # reason, tokens), or None if it depends on the batch


class LoadTest:
    """A server, and loads on it."""

    def __init__(self, command, offline, sizes):
        self.command = command          # starts the server
        self.offline = offline
        self.sizes = sizes
        self.random = random.Random(0)
        self.capacity = None            # answers a second, see measure_capacity

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    @cached_property
    def server(self):
        """The running server, its kernels compiled, its CUDA graphs recorded, its caches full. In a load, one
        answer ends after another, so the batch has every size once."""
        server = Server(self.command)
        streams = self.sizes.streams
        for _ in range(self.sizes.warm_ups):
            ends = [[self.random_job(1 + i * self.sizes.new // streams)] for i in range(streams)]
            check_replies(Load(server, ends).wait())
        check_replies(Load(server, self.rounds(streams, 2)).wait())
        return server

    def stop(self):
        """Ends the server; the next use starts another. Returns the exit code."""
        server = self.__dict__.pop("server", None)
        return server.stop() if server else 0

    def measure(self, function, arguments):
        """The figures of a row: function(self, **arguments)."""
        try:
            return function(self, **arguments)
        except LoadError:
            self.stop()                 # the rest of the load may still run
            raise

    def random_job(self, new, due=None):
        """A request with a random prompt."""
        ids = [self.random.randrange(self.offline.vocab_size) for _ in range(self.sizes.prompt)]
        return Job({"prompt": ids, "max_tokens": new, "temperature": 0, "ignore_eos": True}, due)

    def question(self, due=None, **more):
        """A request with a known answer. more: fields of the Job."""
        ids, answer = self.random.choice(self.offline.questions)
        return Job({"prompt": ids, "max_tokens": self.sizes.new // 2, "temperature": 0}, due, answer, **more)

    def rounds(self, streams, count):
        """Streams that ask `count` questions, one after another."""
        return [[self.question() for _ in range(count)] for _ in range(streams)]

    def arrivals(self, rate, seconds, kinds, excused=(503,)):
        """Streams of one question each, which arrive at random: a Poisson process of `rate` a second.
        kinds: {kind of client: share}. The first client, at least, reads a whole answer. excused: 503, since
        chance can fill the server's queue."""
        streams = []
        due = 0.0
        kind = "whole"
        while due < seconds:
            stays = self.random.uniform(0, 2 * self.sizes.streams / self.capacity)
            streams.append([self.question(due, kind=kind, stays=stays, excused=excused)])
            due += self.random.expovariate(rate)
            [kind] = self.random.choices([*kinds, "whole"], [*kinds.values(), 1 - sum(kinds.values())])
        return streams

    def play(self, streams):
        """Does a load and checks what is left of it. Returns (replies, seconds, a note on the load)."""
        server = self.server
        before = server.state()
        cpu = server.cpu_seconds()
        load = Load(server, streams)
        replies = load.wait()
        seconds = max(reply.end for reply in replies) - load.start
        shares = [f"{(end - start) / seconds:.0%}" for start, end in zip(cpu, server.cpu_seconds())]
        server.check(before, replies)
        whole = [reply for reply in replies if reply.answer]
        compared = sum(reply.job.expected is not None for reply in whole)
        return replies, seconds, (f"{len(whole)} answers, {compared} compared; CPU of a client process "
                                  f"{max(load.cpu) / seconds:.0%} at most, of the server "
                                  f"{' and of its worker '.join(shares)}")


def milliseconds(replies, time, percent):
    """A percentile of the time from the intended starts. time: "first" or "end"."""
    values = sorted(1e3 * (getattr(reply, time) - reply.due) for reply in replies)
    return values[min(len(values) * percent // 100, len(values) - 1)]


def measure_batch(test):
    """New tokens a second of all streams at once: the median of some runs."""
    runs = []
    for _ in range(NUM_RUNS):
        streams = [[test.random_job(test.sizes.new, due=0.0)] for _ in range(test.sizes.streams)]
        runs.append(test.play(streams)[1:])
    seconds, note = sorted(runs)[NUM_RUNS // 2]
    value = test.sizes.streams * test.sizes.new / seconds
    best = test.offline.tokens_per_second
    return {"value": value, "unit": "tokens/s", "best": best, "share": value / best, "note": note}


def measure_first_token(test):
    """The median time to the first token of a request with the server to itself."""
    replies, _, note = test.play([[test.random_job(2) for _ in range(20)]])
    value = milliseconds(replies, "first", 50)
    best = test.offline.first_token_ms
    return {"value": value, "unit": "ms", "best": best, "share": best / value,
            "note": f"{value - best:.2f} ms above offline; {note}"}


def measure_capacity(test):
    """New tokens a second of streams that ask one question after another: a closed loop."""
    replies, seconds, note = test.play(test.rounds(test.sizes.streams, 3))
    test.capacity = len(replies) / seconds
    value = sum(reply.answer[2] for reply in replies) / seconds
    return {"value": value, "unit": "tokens/s", "note": f"{test.capacity:,.1f} answers/s; {note}"}


def measure_arrivals(test, share, seconds, kinds, is_compared=False, is_ended=False):
    """The 99th percentile of the time to the end of an answer, in an open loop. Only clients that read a
    whole answer count.

    share: of the capacity. kinds: see arrivals(). is_compared: beside the same without other kinds of
    clients. is_ended: the server is ended under load afterwards."""
    if test.capacity is None:
        measure_capacity(test)
    rate = share * test.capacity

    def measure(kinds):
        replies, _, note = test.play(test.arrivals(rate, seconds, kinds))
        counted = [reply for reply in replies if reply.answer and reply.job.kind == "whole"]
        refused = sum(reply.status == 503 for reply in replies)
        if refused > len(replies) / 2:
            raise LoadError(f"the server has refused {refused} of {len(replies)} requests")
        return milliseconds(counted, "end", 99), (
            f"p50 {milliseconds(counted, 'end', 50):,.0f} ms, first token p99 "
            f"{milliseconds(counted, 'first', 99):,.0f} ms, {refused} refused; {note}")

    figures = {"unit": "ms"}
    if is_compared:
        figures["best"], _ = measure({})
    figures["value"], figures["note"] = measure(kinds)
    if is_compared:
        figures["share"] = figures["best"] / figures["value"]
    if is_ended:
        end_under_load(test, rate)
    return figures


def end_under_load(test, rate, seconds=4):
    """Ends the server in the middle of a load. Answers that have begun must end whole; other requests may
    be refused."""
    load = Load(test.server, test.arrivals(rate, seconds, {}, excused=(0, 503)))
    time.sleep(seconds / 2)
    code = test.stop()
    check_replies(load.wait())
    if code:
        raise LoadError(f"the server's exit code: expected 0 after SIGTERM, got {code}")


def measure_kill(test):
    """Milliseconds from the kill -9 of a fifth of the clients until the server has given their requests up.
    The other clients must not notice."""
    count = test.sizes.streams // 5
    server = test.server
    before = server.state()

    def wait_for(name, value, limit):
        """Seconds until a figure of /metrics has grown by a value."""
        start = clock()
        while server.metrics()[name] - before.metrics[name] < value:
            if clock() - start > limit:
                raise LoadError(f"{name}: expected {value} more within {limit} s")
            time.sleep(0.005)
        return clock() - start

    victims = Load(server, [[test.random_job(VICTIM_TOKENS)] for _ in range(count)], num_processes=1)
    wait_for("num_requests_running", count, limit=60)
    others = Load(server, test.rounds(test.sizes.streams - count, 3), num_processes=7)
    time.sleep(test.sizes.seconds / 10)
    victims.kill()
    seconds = wait_for("request_success_total abort", count, test.sizes.kill_seconds)
    replies = others.wait()
    server.check(before, replies, some_left=True)
    return {"value": 1e3 * seconds, "unit": "ms", "note": f"{len(replies)} answers of the others"}


def rows(sizes):
    """[(name, function, what is measured, further arguments of the function)]"""
    streams = sizes.streams
    seconds = sizes.seconds
    loads = [(f"open-{percent}", measure_arrivals, f"requests arrive at {percent}% of C: p99 of an answer",
              {"share": percent / 100, "seconds": seconds, "kinds": {}})
             for percent in (25, 50, 75, 100, 120)]
    return [
        ("batch", measure_batch,
         f"{streams} x (prompt {sizes.prompt}, {sizes.new} new); at best: offline", {}),
        ("first-token", measure_first_token, "a lone request's first token; at best: offline", {}),
        ("closed", measure_capacity, f"{streams} clients, one question after another: C", {}),
        *loads,
        ("slow", measure_arrivals, "50% of C, a tenth reads 1 KB/s; at best: without",
         {"share": 0.5, "seconds": seconds, "kinds": {"slow": 0.1}, "is_compared": True}),
        ("broken", measure_arrivals, "100% of C, a third of the clients broken: p99",
         {"share": 1, "seconds": seconds, "kinds": BROKEN}),
        ("kill", measure_kill, f"kill -9 of {streams // 5} of {streams} clients: until pages are free", {}),
        ("soak", measure_arrivals, "80% of C, all kinds of clients, then SIGTERM: p99",
         {"share": 0.8, "seconds": seconds, "kinds": BROKEN | {"slow": 0.1}, "is_ended": True})]
