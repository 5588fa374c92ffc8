"""Looking inside a run: tinyvllm.py --watch, --trace FILE.json, --trace FILE.html or --stats, and
the page of server.py.

The engine tells its observers when an activity begins or ends (Engine.tell). The Recorder is an
observer and keeps the facts: the tokens of each step, the pages of each request, and the times.
Every view is made from a Recorder: the live view on a terminal, the two kinds of trace, the table
of times, the live picture on the server's page.

Which step owns a moment? Steps lie end to end, although the engine launches step n + 1 before the
tokens of step n are read. The time of step n begins when the tokens of step n - 1 arrive, or with
the launch of step n if no step is in flight. The time ends when the tokens of step n arrive; in the
simulator, when the launch returns. A request spends the time of a step on the tokens that the
request brought to the step, and the time between two steps waiting. So no moment counts twice, and
no moment is left out.
"""
import contextlib
import io
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
import unicodedata
from collections import deque
from dataclasses import dataclass
from itertools import groupby, islice, pairwise, takewhile
from pathlib import Path

PARTS = {       # of a request's time
    "queued": "waiting for pages and for a place in a step",
    "prefill": "steps that computed a piece of its prompt",
    "decode": "steps that computed one token of its answer",
    "stalled": "extra time of decode steps that also computed others' prompts",
    "preempted": "waiting again, after its pages were taken",
    "recomputed": "steps that computed tokens again, after their pages were taken"}
MAX_STEPS = 20_000              # of a page, lest it have tens of MB, and of a Recorder that forgets
MIN_PAGES = 64                  # a view shows this number of pages at least, used or not
PAGE = Path(__file__).with_name("views.html")


# ==================================================================================================
# The facts
#
# All times are in seconds of time.perf_counter(). Requests are numbered from 1, steps from 0. Each
# view writes a request's number as letters.
#
# A signal can interrupt told() after any call. Assignments that belong together therefore have no
# call between them. After an interruption the engine tells "rebuilt", or the run is closed; both
# start from the segments and the changes.
# ==================================================================================================
def name_of(number):
    """A request's name: A to Z, then AA, AB, ..."""
    letter = chr(ord("A") + (number - 1) % 26)
    return name_of((number - 1) // 26) + letter if number > 26 else letter


@dataclass
class Segment:
    """How a request spent the steps `first` to `last`. Decode steps in a row are one segment; a
    prefill chunk is a segment of its own."""
    kind: str                   # a key of PARTS, but not "stalled": account() takes that from decode
    first: int
    last: int                   # first - 1 for a wait that ended before a whole step had passed
    begin: float
    end: float
    start: int                  # position of the first token that was computed
    count: int                  # tokens that were computed; 0 in a wait
    sampled: int = 0            # tokens of the answer that came out


class Request:
    """A sequence as seen from outside. The segments lie end to end, from the arrival on."""

    def __init__(self, number, sequence, arrival_step, start=0.0):
        """arrival_step: the next step to be planned. start: when the Recorder joined a run with the
        request at work. How it spent the time before is unknown, and counts as what it does now."""
        self.number = number
        self.sequence = sequence
        self.output = sequence.output
        self.arrival_step = arrival_step
        self.state = "queued"                   # a key of PARTS, or "done"
        self.segments = []
        self.table = sequence.block_table       # the very array: a new one means that the pages went
        self.num_pages = 0                      # pages of the table that the Recorder has seen
        self.num_tokens = len(self.output.token_ids)    # tokens of the answer that it has seen
        self.high_water = 0                     # tokens that were computed at least once
        self.alone = []                         # seconds of decode steps without others' prefill
        self.beside = []                        # seconds of decode steps with others' prefill
        if sequence.block_table:
            self.high_water = sequence.num_computed_tokens
            self.state = self.kind_of(self.high_water)
        elif self.output.num_preemptions:
            self.high_water = len(sequence.token_ids)
            self.state = "preempted"
        if self.high_water:
            self.spend(self.state, 0, -1, start)

    @property
    def since(self):
        """The time of the request is booked up to here."""
        return self.segments[-1].end if self.segments else self.output.arrival_time

    def kind_of(self, start):
        """The kind of a step that begins with the token at position `start`."""
        if start < self.high_water:
            return "recomputed"
        return "prefill" if start < len(self.output.prompt_token_ids) else "decode"

    def spend(self, kind, first, last, until, start=0, count=0):
        """The time from `since` to `until`, and the steps, went into `kind`."""
        before = self.segments[-1] if self.segments else None
        if before and before.kind == kind == "decode" and before.last == first - 1:
            before.last = last
            before.end = until
            before.count += count
        else:
            self.segments.append(Segment(kind, first, last, self.since, until, start, count))

    def wait(self, step, until):
        """The request was in no step since the latest segment and before `step`."""
        if self.segments:
            self.spend("preempted", self.segments[-1].last + 1, step - 1, until)
        else:
            self.spend("queued", self.arrival_step, step - 1, until)

    def account(self):
        """{part: seconds}. The parts add up to the time from arrival to finish."""
        parts = dict.fromkeys(PARTS, 0.0)
        for segment in self.segments:
            parts[segment.kind] += segment.end - segment.begin
        usual = statistics.median(self.alone or [math.inf])
        parts["stalled"] = sum(max(seconds - usual, 0.0) for seconds in self.beside)
        parts["decode"] -= parts["stalled"]
        return parts


@dataclass
class Step:
    """The plan of a step, and the pool at that moment."""
    number: int = -1            # of a step launched before the Recorder came
    scheduled: tuple = ()       # of (request, kind, start, count), until the tokens arrive
    decode: int = 0             # tokens
    prefill: int = 0            # tokens, recomputed tokens too
    used: int = 0               # pages that requests have
    shared: int = 0             # pages that several requests have
    cached: int = 0             # pages without a request whose tokens can still be found
    begin: float = 0.0          # the time of the plan, and of the step once its tokens have arrived
    end: float = 0.0            # the end of the launch, later of the step


class Recorder:
    """An observer of the engine that keeps the facts."""

    def __init__(self, llm, keep=None):
        """keep: how many of the finished requests to remember; None: all. See forget()."""
        self.llm = llm
        self.keep = keep
        self.has_failed = False             # the trace could not be written
        self.scheduler = llm.engine.scheduler
        self.start = time.perf_counter()
        # Counts of the whole run, with forgotten requests and steps
        self.num_requests = 0
        self.num_steps = 0                  # launched; also the number of the next step
        self.num_tokens = 0                 # of answers
        # Requests and steps
        self.requests = []                  # in order of arrival
        self.finished = deque()             # requests that are not live, in order of their ends
        self.live = {}                      # sequence -> Request
        self.steps = deque()
        self.planned = Step()               # the latest plan
        self.in_flight = deque()            # steps with unread tokens
        self.last_end = 0.0                 # of the latest step whose tokens have arrived
        self.events = deque()               # (name, time, step)
        # Pages now
        self.running = []                   # the requests that had pages at the last look
        self.users = {}                     # page -> numbers of the requests that have it
        self.shared = set()                 # pages of several requests
        self.kept = set()                   # cached pages
        self.highest = -1                   # of all pages ever used
        # Changes of block tables. (step, request number, pages): new pages of the request, just before
        # the step's launch. (step, request number, -1 - n): the request gave all pages back, and the
        # first n stay cached.
        self.changes = deque()
        # The pages before the first of the changes
        self.old_tables = {}                # request number -> pages
        self.old_cached = {}                # page -> number of the request that filled the page, or 0
        self.has_joined = False             # the run, which may have begun long before

    @property
    def allocator(self):
        """The allocator of now: an interrupted step leaves the scheduler with another."""
        return self.scheduler.allocator

    @property
    def num_shown(self):
        """The number of pages that views show: up to the highest ever used."""
        return min(self.allocator.num_blocks, max(self.highest + 1, MIN_PAGES))

    def told(self, event, what):
        """From Engine.tell. schedule, launch, wait and read begin an activity; launched and done
        end an activity."""
        now = time.perf_counter()
        step = self.num_steps
        if event == "ended":
            self.end_request(what, now)
        elif event == "schedule" and not self.has_joined:
            self.join(now)
        if event == "ended" or not self.has_joined:
            return
        if event == "schedule":
            self.look_at_arrivals()
        elif event == "launch":
            self.look_at_pages()
            self.plan(what, now)
        elif event == "launched":
            self.planned.end = now
            self.num_steps += 1
            self.steps.append(self.planned)
            self.in_flight.append(self.planned)
        elif event == "done":
            self.look_at_tokens(what)
        elif event == "rebuilt":
            self.begin_again(now)
        elif self.in_flight:                # wait, read
            step = self.in_flight[0].number
            if event == "read":
                self.account_step(self.in_flight.popleft(), now)
        self.events.append((event, now, step))
        if self.keep is not None:
            self.forget()

    def join(self, now):
        """Takes in the state of the engine, just before it plans a step."""
        self.kept = {page for page in self.allocator.free if page in self.allocator.chains}
        self.highest = max(self.kept, default=-1)
        self.old_cached = dict.fromkeys(self.kept, 0)
        self.in_flight = deque(Step() for _ in self.llm.engine.in_flight)
        self.last_end = now
        for sequence in self.llm.engine.sequences.values():
            self.meet(sequence)
        self.look_at_pages()
        self.has_joined = True

    def meet(self, sequence):
        """The Request of a sequence; a new sequence gets a number."""
        if sequence not in self.live:
            self.num_requests += 1
            request = Request(self.num_requests, sequence, self.num_steps, self.last_end)
            self.live[sequence] = request
            self.requests.append(request)
        return self.live[sequence]

    def look_at_arrivals(self):
        """Meets the new sequences, which are the last in the queue."""
        new = takewhile(lambda sequence: sequence not in self.live, reversed(self.scheduler.waiting))
        for sequence in reversed(list(new)):
            self.meet(sequence)

    def look_at_tokens(self, sequences):
        """Counts new tokens of live sequences."""
        for sequence in sequences:
            request = self.live.get(sequence)
            new = len(sequence.output.token_ids) - request.num_tokens if request else 0
            if new:
                request.num_tokens += new
                self.num_tokens += new
                request.segments[-1].sampled += new

    def look_at_pages(self):
        """Finds the changes of the block tables since the last look."""
        for request in self.running:
            if request.sequence.block_table is not request.table:
                self.give_back(request)
        # A second loop: a page that one request gave back may belong to another already.
        self.running = [self.live[sequence] for sequence in self.scheduler.running]
        for request in self.running:
            if len(request.sequence.block_table) > request.num_pages:
                self.take(request)

    def give_back(self, request):
        """The request's table is gone: each page in the table has a user less."""
        pages = list(request.table[:request.num_pages])
        if not pages:
            return
        # The allocator evicts the last pages of a text first: findable pages are at the beginning.
        findable = [page in self.allocator.chains for page in pages] + [False]
        num_cached = findable.index(False)
        if request.state != "done":
            request.state = "preempted"
        request.num_pages = 0
        self.changes.append((self.num_steps, request.number, -1 - num_cached))
        for i, page in enumerate(pages):
            users = [user for user in self.users.get(page, ()) if user != request.number]
            self.users[page] = users
            if len(users) < 2:
                self.shared.discard(page)
            if i < num_cached and not users:
                self.kept.add(page)
            else:
                self.kept.discard(page)

    def take(self, request):
        """The request's table has grown."""
        request.table = request.sequence.block_table
        new = list(request.table[request.num_pages:])
        self.highest = max(self.highest, *new)
        request.num_pages += len(new)
        self.changes.append((self.num_steps, request.number, new))
        self.kept.difference_update(new)
        for page in new:
            users = self.users.setdefault(page, [])
            users.append(request.number)
            if len(users) > 1:
                self.shared.add(page)

    def begin_again(self, now):
        """A step was interrupted: no request has pages, no page is cached, no step is in flight."""
        for request in self.running:
            self.give_back(request)
        # In the changes, request 0 takes the cached pages and loses them.
        self.changes += (self.num_steps, 0, list(self.kept)), (self.num_steps, 0, -1)
        for pages_or_steps in self.users, self.shared, self.kept, self.in_flight:
            pages_or_steps.clear()
        self.last_end = now
        self.look_at_tokens(self.live)
        for sequence in [sequence for sequence in self.live if sequence.output.finish_reason]:
            self.end_request(sequence, now)
        for request in self.live.values():
            request.state = "preempted" if request.high_water else "queued"

    def plan(self, scheduled, now):
        """Notes the next step. scheduled: [(sequence, number of its tokens)]."""
        entries = []
        decode = 0
        for sequence, count in scheduled:
            request = self.live[sequence]
            start = sequence.num_computed_tokens
            request.state = request.kind_of(start)
            request.high_water = max(request.high_water, start + count)
            entries.append((request, request.state, start, count))
            decode += request.state == "decode"
        prefill = sum(count for _, count in scheduled) - decode
        used = self.allocator.num_blocks - len(self.allocator.free)
        shared = len(self.shared)
        cached = len(self.kept)
        self.planned = Step(self.num_steps, entries, decode, prefill, used, shared, cached, now)

    def account_step(self, step, now):
        """The tokens of a step have arrived: gives the time of the step to the requests in it."""
        if step.number < 0:
            return
        step.begin = max(step.begin, self.last_end)
        if not self.llm.device.is_simulated:
            step.end = now
        for request, kind, start, count in step.scheduled:
            if request.state == "done":             # since the step before: a surplus token
                continue
            if request.since != self.last_end:      # the request was not in the step before
                request.wait(step.number, max(step.begin, request.since))
            if kind == "decode":
                seconds = request.beside if step.prefill else request.alone
                seconds.append(step.end - request.since)
            request.spend(kind, step.number, step.number, step.end, start, count)
        step.scheduled = ()
        self.last_end = step.end

    def end_request(self, sequence, now):
        """Ends the account of a request: within an abandoned step, after a step (which includes
        handing out the token), or in a wait."""
        request = self.meet(sequence)
        end = request.output.finish_time or now
        in_flight = [(kind, step.number, start, count) for step in self.in_flight
                     for other, kind, start, count in step.scheduled if other is request]
        if in_flight and request.output.finish_reason == "abort":
            kind, step, start, count = in_flight[0]
            request.spend(kind, step, step, end, start, count)
        elif request.segments and request.since == self.last_end:
            request.segments[-1].end = end
        else:
            request.wait(self.num_steps, end)
        self.look_at_tokens([sequence])
        request.state = "done"
        request.output.account = request.account()
        self.give_back(request)
        self.finished.append(self.live.pop(sequence))

    def forget(self):
        """Remembers the latest `keep` of the finished requests, and the steps, events and changes
        since the first arrival of a remembered request, but of MAX_STEPS steps at most. So a server
        can be recorded for days."""
        while len(self.finished) > self.keep:
            self.requests.remove(self.finished.popleft())
        first = self.requests[0].arrival_step if self.requests else self.num_steps
        first = max(first, self.num_steps - MAX_STEPS)
        while self.steps and self.steps[0].number < first:
            self.steps.popleft()
        while self.events and self.events[0][2] < first:
            self.events.popleft()
        while self.changes and self.changes[0][0] < first:
            self.forget_change(*self.changes.popleft())

    def forget_change(self, _, number, pages):
        """Moves the old tables and the old cached pages on by a change."""
        if isinstance(pages, list):
            self.old_tables.setdefault(number, []).extend(pages)
            return
        num_cached = -1 - pages
        for i, page in enumerate(self.old_tables.pop(number, ())):
            if i < num_cached:
                self.old_cached[page] = number
            else:
                self.old_cached.pop(page, None)

    def all_changes(self):
        """The old tables and cached pages, as changes before the first step, then the changes."""
        first = self.num_steps - len(self.steps)
        for page, number in self.old_cached.items():
            yield first, number, [page]
            yield first, number, -2
        for number, pages in self.old_tables.items():
            yield first, number, pages
        yield from self.changes

    def close(self):
        """The run is over, perhaps by Ctrl-C: steps in flight and live requests end now."""
        now = time.perf_counter()
        self.events.append(("close", now, self.num_steps))
        while self.in_flight:
            self.account_step(self.in_flight.popleft(), now)
        for sequence in list(self.live):
            self.end_request(sequence, now)
        self.start = min([self.start, *(request.output.arrival_time for request in self.requests)])


@contextlib.contextmanager
def looking_inside(llm, args):
    """Observes the engine while the block runs, in the ways that the options ask for. The reports
    follow, also after Ctrl-C."""
    recorder = Recorder(llm)
    watch = Watch(recorder)
    observers = llm.engine.observers
    observers.append(recorder)
    try:
        with watch.on_second_screen() if args.watch else contextlib.nullcontext():
            yield recorder
    finally:
        with uninterrupted():
            observers[:] = [observer for observer in observers if observer not in (recorder, watch)]
            recorder.close()
            if args.trace:
                write_trace(recorder, args.trace)
            if args.stats:
                print("\n".join(account_table(recorder.requests)), file=sys.stderr)


@contextlib.contextmanager
def uninterrupted():
    """Ctrl-C and its like are ignored while the block runs. Only the main thread can be interrupted."""
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if is_main else ()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_trace(recorder, path):
    """Writes the page or the Chrome trace. A full disk costs the trace, not the statistics."""
    text = html_trace(recorder) if path.endswith(".html") else json.dumps(chrome_trace(recorder))
    try:
        Path(path).write_text(text, "utf-8")
    except OSError as error:
        recorder.has_failed = True
        print(f"tinyvllm: --trace: {path} is incomplete: {error.strerror}", file=sys.stderr)


# ==================================================================================================
# Accounts and traces
# ==================================================================================================
def account_table(requests):
    """Lines of at most 80 columns: where the time of each request went."""
    lines = ["Where the seconds went, all in wall, and tokens (cached: found, not computed):",
             "req  queued prefill  decode stalled preempt  recomp    wall prompt cached answer"]
    for request in requests:
        output = request.output
        seconds = output.account.values()
        times = [f" {value:7.3f}"[:8] for value in (*seconds, sum(seconds))]
        tokens = len(output.prompt_token_ids), output.num_cached_tokens, len(output.token_ids)
        counts = [f" {count:6}" for count in tokens]
        lines.append("".join([f"{name_of(request.number):>3}", *times, *counts]))
    return lines + [f"{part:>10}: {meaning}" for part, meaning in PARTS.items()]


def title_of(request, tokenizer):
    """The beginning of the prompt, but in a chat, of the last message."""
    parts = groupby(request.output.prompt_token_ids, lambda token: tokenizer.token_bytes(token) == b"")
    texts = [tokenizer.decode(islice(part, 80)).strip() for is_special, part in parts if not is_special]
    messages = [text.removeprefix("user\n") for text in texts if text not in ("", "assistant")]
    return " ".join(messages[-1].split())[:80] if messages else ""


def chrome_trace(recorder):
    """The run in Chrome's trace format, for ui.perfetto.dev: a track for the engine, a track for
    each request, and counters. The format's times are microseconds."""
    zero = recorder.start
    trace = []

    def add(phase, name, process, thread, at, args, **more):
        event = {"ph": phase, "name": name, "pid": process, "tid": thread, "ts": (at - zero) * 1e6}
        trace.append(event | {"args": args} | more)

    def count(at, used, shared, cached, prefill, decode):
        add("C", "pages", 1, 0, at, {"used": used, "shared": shared, "cached": cached})
        add("C", "tokens of the step", 1, 0, at, {"prefill": prefill, "decode": decode})

    add("M", "process_name", 1, 0, zero, {"name": "engine"})
    add("M", "process_name", 2, 0, zero, {"name": "requests"})
    for (name, begin, step), (next_name, end, _) in pairwise(recorder.events):
        if name in ("schedule", "launch", "wait", "read") and next_name != "rebuilt":
            add("X", name, 1, 1, begin, {"step": step}, dur=(end - begin) * 1e6)
    for request in recorder.requests:
        title = title_of(request, recorder.llm.tokenizer)
        track = {"name": f"{name_of(request.number)}: {title}"}
        add("M", "thread_name", 2, request.number, zero, track)
        for s in request.segments:
            args = {"first_step": s.first, "last_step": s.last, "first_token": s.start, "tokens": s.count,
                    "new_tokens": s.sampled}
            add("X", s.kind, 2, request.number, s.begin, args, dur=(s.end - s.begin) * 1e6)
    for s in recorder.steps:
        count(s.begin, s.used, s.shared, s.cached, s.prefill, s.decode)
    end = max([request.since for request in recorder.requests], default=zero)
    count(end, 0, 0, len(recorder.kept), 0, 0)
    return {"traceEvents": trace, "displayTimeUnit": "ms"}


def html_trace(recorder, max_steps=MAX_STEPS, max_requests=300):
    """The run as a page: the first of the remembered steps and requests. The page counts steps from
    the first remembered step. Its block tables are stored as changes, and replayed."""
    requests = recorder.requests[:max_requests]
    steps = list(islice(recorder.steps, max_steps))
    first = recorder.num_steps - len(recorder.steps)
    end = first + len(steps)
    left_out = {request.number for request in recorder.requests[max_requests:]}

    def microseconds(at):
        return round((at - recorder.start) * 1e6)

    def describe(request):
        segments = [[s.kind, max(s.first, first) - first, min(s.last, end - 1) - first]
                    for s in request.segments if first <= s.last + 1 and s.first < end]
        return {"number": request.number, "prompt": title_of(request, recorder.llm.tokenizer),
                "text": request.output.text[:80], "new": len(request.output.token_ids),
                "segments": segments}

    def figures(s):
        return [microseconds(s.begin), microseconds(s.end), s.prefill, s.decode, s.used, s.shared, s.cached]

    data = {
        "device": recorder.llm.device.name,
        "num_blocks": recorder.allocator.num_blocks,
        "num_shown": recorder.num_shown,
        "block_size": recorder.allocator.block_size,
        "budget": recorder.scheduler.max_prefill_tokens,
        "num_requests": recorder.num_requests,
        "num_tokens": recorder.num_tokens,
        "num_steps": recorder.num_steps,
        "first_step": first,
        "requests": [describe(request) for request in requests],
        "steps": [figures(step) for step in steps],
        "changes": [[step - first, number, pages] for step, number, pages in recorder.all_changes()
                    if step <= end and number not in left_out]}
    text = json.dumps(data, separators=(",", ":"))
    text = text.replace("<", "\\u003c")         # an answer with </script> must not end the script
    return PAGE.read_text("utf-8").replace("@DATA@", text)


# ==================================================================================================
# Watch
# ==================================================================================================
SMALLEST = 60, 16               # columns and lines of a terminal
FRAMES_A_SECOND = 15            # at most
COLOURS = 75, 214, 77, 211, 227, 141, 44, 173, 154, 180     # of 256; black is legible on each
OPEN = "\x1b[?1049h\x1b[?25l\x1b[?7l"       # the second screen, no cursor, no wrapping
CLOSE = "\x1b[?7h\x1b[?25h\x1b[?1049l"      # undoes all three


def mark(number, text="", width=1):
    """Text on the colour of a request; default: the end of its name."""
    text = text or name_of(number)[-width:]
    return f"\x1b[30;48;5;{COLOURS[(number - 1) % len(COLOURS)]}m{text:<{width}}\x1b[0m"


def tail(text, columns):
    """The end of a text, at most `columns` wide. East Asian characters take two columns. Control
    characters could harm the terminal and become spaces."""
    text = "".join(c if c.isprintable() else " " for c in text[-columns:])
    while sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text) > columns:
        text = text[1:]
    return text


class Watch:
    """An observer that draws a Recorder's facts on the second screen of stderr's terminal. Text for
    a terminal, stderr and mostly stdout, is held back until the second screen is closed."""

    def __init__(self, recorder):
        self.recorder = recorder
        self.engine = recorder.llm.engine
        self.terminal = sys.stderr
        self.drawn = 0.0
        self.size = None                        # columns and lines of the terminal
        self.history = deque(maxlen=30)         # (time, tokens, bytes and seconds of decode) of frames

    @contextlib.contextmanager
    def on_second_screen(self):
        """Draws while the block runs, if there is a terminal, and large enough; else says so."""
        why = self.too_small() if self.terminal.isatty() else "stderr is no terminal"
        if why:
            print(f"tiny-vLLM: --watch is off: {why}", file=sys.stderr)
            yield
            return
        with contextlib.ExitStack() as undo:        # in reverse: the screen closes first
            for stream, redirect in ((sys.stdout, contextlib.redirect_stdout),
                                     (sys.stderr, contextlib.redirect_stderr)):
                if stream.isatty():
                    held = io.StringIO()
                    undo.callback(lambda stream=stream, held=held:
                                  print(held.getvalue(), end="", file=stream, flush=True))
                    undo.enter_context(redirect(held))
            undo.callback(self.write, CLOSE)
            self.write(OPEN)
            self.engine.observers.append(self)
            yield

    def write(self, text):
        """A terminal that has gone away does not end the run."""
        with contextlib.suppress(OSError):
            self.terminal.write(text)
            self.terminal.flush()

    def too_small(self):
        """Measures the terminal. Returns why it is too small, or ""."""
        with contextlib.suppress(OSError):      # gone away
            self.size = os.get_terminal_size(self.terminal.fileno())
        columns, lines = self.size
        if columns >= SMALLEST[0] and lines >= SMALLEST[1]:
            return ""
        return (f"the terminal has {columns} columns and {lines} lines, {SMALLEST[0]} and {SMALLEST[1]} "
                "are needed")

    def told(self, event, what):
        """Draws when a step has been launched or read."""
        now = time.perf_counter()
        if event not in ("launched", "done") or now - self.drawn < 1 / FRAMES_A_SECOND:
            return
        self.drawn = now
        stats = self.engine.stats
        self.history.append((now, self.recorder.num_tokens, stats.decode_bytes, stats.decode_seconds))
        before = self.size
        why = self.too_small()
        frame = [why[:self.size[0]]] if why else self.frame(*self.size)
        clear = "\x1b[2J" if before != self.size else ""
        # \x1b[K clears the rest of a line, \x1b[J the lines below.
        self.write(clear + "\x1b[H" + "\x1b[K\r\n".join(frame) + "\x1b[K\x1b[J")

    def frame(self, columns, lines):
        """The whole picture: lines of text, with colours."""
        legend = f"{mark(1)} a page of A   {mark(1, '2')} shared by two   + cached   . free"
        frame = [*self.head(columns // 5), *self.grid(columns - 2, lines // 3), legend, ""]
        done = (request for request in reversed(self.recorder.requests) if request.state == "done")
        shown = [*self.recorder.live.values(), *done]
        room = lines - len(frame) - 1
        frame += [self.row(request, columns) for request in shown[:room]]
        if len(shown) > room:
            frame.append(f"and {len(shown) - room} more")
        return frame

    def row(self, request, columns):
        """A request: name, state and tokens, a bar of pages, and the end of the answer."""
        known = len(request.output.prompt_token_ids) + len(request.output.token_ids)
        state = request.state
        if state in ("prefill", "recomputed"):
            state += f" {request.sequence.num_computed_tokens}/{known}"
        name = name_of(request.number)
        lead = f" {state:<{19 - len(name)}}{known:>6} tokens "
        size = columns // 4                     # of the bar; a longer table fills it
        bar = mark(request.number, "|" * min(request.num_pages, size) or " ")
        space = " " * (size - max(request.num_pages, 1))
        text = tail(request.output.text, columns - len(name + lead) - size - 3)
        return f"{mark(request.number, name)}{lead}{bar}{space} {text}"

    def head(self, size):
        """The run so far; the latest step as a bar, `size` cells for the budget; an empty line."""
        recorder = self.recorder
        now, *latest = self.history[-1]
        then, *oldest = self.history[0]
        tokens, num_bytes, seconds = (a - b for a, b in zip(latest, oldest))
        live = len(recorder.live)
        waiting = len(recorder.scheduler.waiting)
        peak = recorder.llm.device.memory_bandwidth
        share = f"  {num_bytes / seconds / peak:.0%} of {peak / 1e9:.0f} GB/s" if peak and seconds else ""
        step = recorder.planned
        scheduler = recorder.scheduler
        budget = scheduler.max_num_batched_tokens if step.decode else scheduler.max_prefill_tokens
        decode = math.ceil(step.decode * size / budget)
        prefill = min(math.ceil(step.prefill * size / budget), size - decode)
        rate = tokens / max(now - then, 1e-3)
        bar = f"\x1b[42m{' ' * decode}\x1b[43m{' ' * prefill}\x1b[0m{' ' * (size - decode - prefill)}"
        return [f"\x1b[1mtiny-vLLM\x1b[0m  step {recorder.num_steps}  {live - waiting} running, "
                f"{waiting} waiting, {recorder.num_requests - live} done  {rate:.0f} tokens/s",
                f"[{bar}] \x1b[32m{step.decode} decode\x1b[0m + \x1b[33m{step.prefill} prefill\x1b[0m "
                f"of {budget} tokens{share}",
                ""]

    def grid(self, width, rows):
        """The page pool: a line of figures, then lines of cells. A cell stands for a page, or, in a
        large pool, for several pages."""
        recorder = self.recorder
        pages = recorder.num_shown
        wide = 2 if 2 * pages <= width * rows else 1        # columns of a cell
        each = math.ceil(pages / (width * rows))            # pages of a cell
        groups = [range(first, min(first + each, pages)) for first in range(0, pages, each)]
        cells = [self.cell(group, wide) for group in groups]
        used = sum(map(bool, recorder.users.values()))
        total = recorder.allocator.num_blocks
        note = f"{used} of {total} pages in use, {len(recorder.shared)} shared, {len(recorder.kept)} cached"
        if pages < total:
            note += f", {total - pages} never used"
        if each > 1:
            note += f"; {each} pages a cell"
        across = width // wide
        return [note, *("".join(cells[i:i + across]) for i in range(0, len(cells), across))]

    def cell(self, group, wide):
        """The cell of a group of pages: the page with the most users, or cached, or free."""
        numbers = max((self.recorder.users.get(page, []) for page in group), key=len)
        if not numbers:
            sign = "+" if any(page in self.recorder.kept for page in group) else "."
            return sign.ljust(wide)
        text = str(min(len(numbers), 9)) if len(numbers) > 1 else ""
        return mark(numbers[0], text, wide)


# ==================================================================================================
# The picture of now, for the server's page
# ==================================================================================================
MAX_CELLS = 1024                # a cell of a larger pool stands for several pages
MAX_LOOKS = 4096                # pages of requests that one picture looks at
MAX_ROWS = 64                   # live requests
NUM_BARS = 60                   # of the latest steps


def picture(recorder, names):
    """The pool, the requests and the latest steps, as values for JSON and without any text. The cost
    is bounded, whatever the pool's size. names: {sequence: what the caller calls the request}."""
    live = list(recorder.live.values())
    with_pages = [request for request in live if request.num_pages]
    without = [request for request in live if not request.num_pages]
    steps = [(step.decode, step.prefill) for step in islice(reversed(recorder.steps), NUM_BARS)]

    def describe(request):
        output = request.output
        shared = takewhile(recorder.shared.__contains__, request.table[:request.num_pages])
        return {"letters": name_of(request.number), "number": request.number,
                "name": names.get(request.sequence), "state": request.state, "pages": request.num_pages,
                "shared": sum(1 for _ in shared), "prompt": len(output.prompt_token_ids),
                "found": output.num_cached_tokens, "answer": len(output.token_ids),
                "account": output.account}

    return {"block_size": recorder.allocator.block_size,
            "num_blocks": recorder.allocator.num_blocks,
            "num_shown": recorder.num_shown,
            "pages_a_cell": pages_of_a_cell(recorder),
            "cells": picture_cells(recorder),
            "used": recorder.allocator.num_blocks - len(recorder.allocator.free),
            "shared": len(recorder.shared),
            "cached": len(recorder.kept),
            "running": len(recorder.scheduler.running),
            "waiting": len(recorder.scheduler.waiting),
            "num_steps": recorder.num_steps,
            "num_tokens": recorder.num_tokens,
            "budget": recorder.scheduler.max_prefill_tokens,
            "steps": steps[::-1],
            "requests": [describe(request) for request in (with_pages + without)[:MAX_ROWS]],
            "finished": [describe(request) for request in recorder.finished]}


def pages_of_a_cell(recorder):
    return math.ceil(recorder.num_shown / MAX_CELLS)


def picture_cells(recorder):
    """The cells of the pool, in order: 0 for free, -1 for cached, else the numbers of the requests
    that have the page, of nine at most. A cell of several pages shows the page with most requests."""
    each = pages_of_a_cell(recorder)
    stride = 1 + sum(request.num_pages for request in recorder.running) // MAX_LOOKS
    users = {}                  # cell -> numbers of requests
    for request in recorder.running:
        for page in request.table[:request.num_pages:stride]:
            cell = page // each
            if len(recorder.users[page]) > len(users.get(cell, ())):
                users[cell] = recorder.users[page]
    cells = []
    for first in range(0, recorder.num_shown, each):
        if first // each in users:
            cells.append(users[first // each][:9])
        else:
            cells.append(-int(any(page in recorder.kept for page in range(first, first + each))))
    return cells
