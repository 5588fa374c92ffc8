"""Looking inside a run: tinyvllm.py --watch, --trace FILE.json, --trace FILE.html or --stats.

The engine tells its observers when an activity begins or ends (Engine.tell). The Recorder is an
observer and keeps the facts: the tokens of each step, the pages of each request, and the times.
Every view is made from a Recorder: the live view on a terminal, the two kinds of trace, the table
of times.

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
import statistics
import sys
import time
import unicodedata
from collections import deque
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

PARTS = {       # of a request's time
    "queued": "waiting for pages and for a place in a step",
    "prefill": "steps that computed a piece of its prompt",
    "decode": "steps that computed one token of its answer",
    "stalled": "time that other requests' prefill added to its decode steps, "
               "beyond its median step without prefill",
    "preempted": "waiting again, after its pages were taken",
    "recomputed": "steps that computed tokens again, after their pages were taken"}
MAX_STEPS = 20_000              # of a page, lest it have tens of MB, and of a Recorder that forgets
PAGE = Path(__file__).with_name("views.html")


# ==================================================================================================
# The facts
#
# All times are in seconds of time.perf_counter(). Requests are numbered from 1, steps from 0.
# ==================================================================================================
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
    """A sequence as seen from outside. The segments lie end to end, from the arrival to `since`."""

    def __init__(self, number, sequence, arrival_step):
        """arrival_step: the next step to be planned."""
        self.number = number
        self.sequence = sequence
        self.output = sequence.output
        self.arrival_step = arrival_step
        self.state = "queued"                   # a key of PARTS, or "done"
        self.since = self.output.arrival_time
        self.segments = []
        self.table = sequence.block_table       # the very array: a new one means that the pages went
        self.num_pages = 0                      # pages of the table that the Recorder has seen
        self.high_water = 0                     # tokens that were computed at least once
        self.alone = []                         # seconds of decode steps without others' prefill
        self.beside = []                        # seconds of decode steps with others' prefill

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
        self.since = until

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
    number: int = -1
    planned: float = 0.0
    scheduled: tuple = ()       # of (request, kind, start, count), until the tokens arrive
    decode: int = 0             # tokens
    prefill: int = 0            # tokens, recomputed tokens too
    used: int = 0               # pages that requests have
    shared: int = 0             # pages that several requests have
    cached: int = 0             # pages without a request whose tokens can still be found
    launched: float = 0.0       # when the launch had returned
    begin: float = 0.0
    end: float = 0.0            # when the step's tokens arrived


class Recorder:
    """An observer of the engine that keeps the facts. To be added while no request runs."""

    def __init__(self, llm, keep=None):
        """keep: how many of the finished requests to remember; None: all. See forget()."""
        self.llm = llm
        self.keep = keep
        self.scheduler = llm.engine.scheduler
        self.allocator = self.scheduler.allocator
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
        # Steps whose tokens are not read. At first: steps of requests that have ended, if any.
        self.in_flight = deque(Step() for _ in llm.engine.in_flight)
        self.last_end = 0.0                 # of the latest step whose tokens have arrived
        self.events = deque()               # (name, time, step)
        # Pages now
        self.users = {}                     # page -> numbers of the requests that have it
        self.shared = set()                 # pages of several requests
        self.kept = set()                   # cached pages
        # Changes of block tables. (step, request number, pages): new pages of the request, just before
        # the step's launch. (step, request number, -1 - n): the request gave all pages back, and the
        # first n stay cached.
        self.changes = deque()
        # The pages before the first of the changes
        self.old_tables = {}                # request number -> pages
        self.old_cached = {}                # page -> number of the request that filled the page

    def told(self, event, what):
        """From Engine.tell. schedule, launch, wait and read begin an activity; launched and done
        end an activity."""
        now = time.perf_counter()
        step = self.num_steps
        if event == "schedule":
            self.look_at_arrivals()
        elif event == "launch":
            self.look_at_pages(now)
            self.plan(what, now)
        elif event == "launched":
            self.planned.launched = now
            self.steps.append(self.planned)
            self.in_flight.append(self.planned)
            self.num_steps += 1
        elif event == "done":
            self.look_at_tokens(what)
            self.look_at_pages(now)
        elif self.in_flight:                # wait, read
            step = self.in_flight[0].number
            if event == "read":
                self.account_step(self.in_flight.popleft(), now)
        self.events.append((event, now, step))
        if self.keep is not None:
            self.forget()

    def look_at_arrivals(self):
        """Gives each new sequence a number."""
        for sequence in self.scheduler.waiting:
            if sequence not in self.live:
                self.num_requests += 1
                request = Request(self.num_requests, sequence, self.num_steps)
                self.live[sequence] = request
                self.requests.append(request)

    def look_at_tokens(self, sampled):
        """Each of the sampled sequences has a new token."""
        self.num_tokens += len(sampled)
        for sequence in sampled:
            request = self.live[sequence]
            request.segments[-1].sampled += 1
            if request.output.finish_reason:
                self.end_request(request, request.output.finish_time)

    def look_at_pages(self, now):
        """Finds the changes of the block tables since the last look, and the end of requests."""
        for request in self.live.values():
            if request.output.finish_reason and request.state != "done":    # given up by the caller
                self.end_request(request, now)
            if request.sequence.block_table is not request.table:
                self.give_back(request)
        # A second loop: a page that one request gave back may belong to another already.
        for request in self.live.values():
            if len(request.table) > request.num_pages:
                self.take(request)
        for request in [request for request in self.live.values() if request.state == "done"]:
            del self.live[request.sequence]

    def give_back(self, request):
        """The request's table is gone: each page in the table has a user less."""
        pages = list(request.table[:request.num_pages])
        request.table = request.sequence.block_table
        request.num_pages = 0
        if not pages:
            return
        # The allocator evicts the last pages of a text first: findable pages are at the beginning.
        findable = [page in self.allocator.chains for page in pages] + [False]
        num_cached = findable.index(False)
        self.changes.append((self.num_steps, request.number, -1 - num_cached))
        for i, page in enumerate(pages):
            self.users[page].remove(request.number)
            if len(self.users[page]) < 2:
                self.shared.discard(page)
            if i < num_cached and not self.users[page]:
                self.kept.add(page)
            else:
                self.kept.discard(page)
        if request.state != "done":
            request.state = "preempted"

    def take(self, request):
        """The request's table has grown."""
        new = list(request.table[request.num_pages:])
        request.num_pages = len(request.table)
        self.changes.append((self.num_steps, request.number, new))
        self.kept.difference_update(new)
        for page in new:
            users = self.users.setdefault(page, [])
            users.append(request.number)
            if len(users) > 1:
                self.shared.add(page)

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
        self.planned = Step(self.num_steps, now, entries, decode, prefill, used, shared, cached)

    def account_step(self, step, now):
        """The tokens of a step have arrived: gives the time of the step to the requests in it."""
        step.begin = max(step.planned, self.last_end)
        step.end = step.launched if self.llm.device.is_simulated else now
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

    def end_request(self, request, now):
        """A request has ended: in a wait, or just after a step, which includes handing out the
        token."""
        if request.segments and request.since == self.last_end:
            request.segments[-1].end = now
            request.since = now
        else:
            request.wait(self.num_steps, now)
        request.state = "done"
        request.output.account = request.account()
        self.finished.append(request)

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
        for i, page in enumerate(self.old_tables.pop(number)):
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
        for request in self.live.values():
            self.end_request(request, now)
        self.look_at_pages(now)
        self.start = min([self.start, *(request.output.arrival_time for request in self.requests)])


@contextlib.contextmanager
def looking_inside(llm, args):
    """Observes the engine while the block runs, in the ways that the options ask for. The reports
    follow, also after Ctrl-C."""
    recorder = Recorder(llm)
    llm.engine.observers.append(recorder)
    try:
        with Watch(recorder) if args.watch else contextlib.nullcontext():
            yield recorder
    finally:
        llm.engine.observers.remove(recorder)
        recorder.close()
        if args.trace:
            is_page = args.trace.endswith(".html")
            text = html_trace(recorder) if is_page else json.dumps(chrome_trace(recorder))
            Path(args.trace).write_text(text, "utf-8")
        if args.stats:
            print("\n".join(account_table(recorder.requests)), file=sys.stderr)


# ==================================================================================================
# Accounts and traces
# ==================================================================================================
def account_table(requests):
    """Lines: where the time of each request went."""
    names = ("request", *PARTS, "wall", "prompt", "cached", "answer")
    lines = ["Where the time went, in seconds that add up to wall, and tokens (cached: found, not computed):",
             "  ".join(f"{name:>10}" for name in names)]
    for request in requests:
        output = request.output
        seconds = output.account.values()
        tokens = len(output.prompt_token_ids), output.num_cached_tokens, len(output.token_ids)
        times = [f"{value:.3f}" for value in (*seconds, sum(seconds))]
        lines.append("  ".join(f"{cell:>10}" for cell in (request.number, *times, *tokens)))
    return lines + [f"{part:>10}: {meaning}" for part, meaning in PARTS.items()]


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
    for (name, begin, step), (_, end, _) in pairwise(recorder.events):
        if name in ("schedule", "launch", "wait", "read"):
            add("X", name, 1, 1, begin, {"step": step}, dur=(end - begin) * 1e6)
    for request in recorder.requests:
        title = f"{request.number}: {request.output.text[:40]}"
        add("M", "thread_name", 2, request.number, zero, {"name": title})
        for s in request.segments:
            args = {"first_step": s.first, "last_step": s.last, "first_token": s.start, "tokens": s.count,
                    "new_tokens": s.sampled}
            add("X", s.kind, 2, request.number, s.begin, args, dur=(s.end - s.begin) * 1e6)
    for s in recorder.steps:
        count(s.planned, s.used, s.shared, s.cached, s.prefill, s.decode)
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
        return {"number": request.number, "text": request.output.text[:80], "segments": segments,
                "new": len(request.output.token_ids)}

    def figures(s):
        return [microseconds(s.begin), microseconds(s.end), s.prefill, s.decode, s.used, s.shared, s.cached]

    data = {
        "device": recorder.llm.device.name,
        "num_blocks": recorder.allocator.num_blocks,
        "block_size": recorder.allocator.block_size,
        "budget": recorder.scheduler.max_num_batched_tokens,
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
    """Text on the colour of a request; default: the request's letter."""
    text = text or chr(ord("A") + (number - 1) % 26)
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
        self.held = contextlib.ExitStack()
        self.drawn = 0.0
        self.size = None                        # columns and lines of the terminal
        self.history = deque(maxlen=30)         # (time, tokens, bytes and seconds of decode) of frames

    def __enter__(self):
        if not self.fits():
            return
        self.engine.observers.append(self)
        self.held.callback(self.engine.observers.remove, self)
        self.hold_back(sys.stdout, contextlib.redirect_stdout)
        self.hold_back(sys.stderr, contextlib.redirect_stderr)
        self.held.callback(self.write, CLOSE)       # undone in reverse: the screen closes first
        self.write(OPEN)

    def __exit__(self, *error):
        self.held.close()

    def hold_back(self, stream, redirect):
        """Collects the text for a terminal until the second screen is closed."""
        if stream.isatty():
            text = io.StringIO()
            self.held.callback(lambda: print(text.getvalue(), end="", file=stream, flush=True))
            self.held.enter_context(redirect(text))

    def write(self, text):
        self.terminal.write(text)
        self.terminal.flush()

    def fits(self):
        """Whether there is a terminal, and large enough; else says so."""
        why = "stderr is no terminal"
        if self.terminal.isatty():
            self.size = os.get_terminal_size(self.terminal.fileno())
            columns, lines = self.size
            if columns >= SMALLEST[0] and lines >= SMALLEST[1]:
                return True
            needed = f"{SMALLEST[0]} and {SMALLEST[1]} are needed"
            why = f"the terminal has {columns} columns and {lines} lines, {needed}"
        print(f"tiny-vLLM: --watch is off: {why}", file=sys.stderr)
        return False

    def told(self, event, what):
        """Draws when a step has been launched or read."""
        now = time.perf_counter()
        if event not in ("launched", "done") or now - self.drawn < 1 / FRAMES_A_SECOND:
            return
        self.drawn = now
        before = self.size
        if not self.fits():     # any more; the notice appears when the second screen is closed
            self.held.close()
            return
        stats = self.engine.stats
        self.history.append((now, self.recorder.num_tokens, stats.decode_bytes, stats.decode_seconds))
        clear = "\x1b[2J" if before != self.size else ""
        # \x1b[K clears the rest of a line, \x1b[J the lines below.
        picture = "\x1b[K\r\n".join(self.frame(*self.size))
        self.write(clear + "\x1b[H" + picture + "\x1b[K\x1b[J")

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
        """A request: letter, state and tokens, a bar of pages, and the end of the answer."""
        known = len(request.output.prompt_token_ids) + len(request.output.token_ids)
        state = request.state
        if state in ("prefill", "recomputed"):
            state += f" {request.sequence.num_computed_tokens}/{known}"
        lead = f" {state:<18}{known:>6} tokens "
        size = columns // 4                     # of the bar; a longer table fills it
        bar = mark(request.number, "|" * min(request.num_pages, size) or " ")
        space = " " * (size - max(request.num_pages, 1))
        text = tail(request.output.text, columns - len(lead) - size - 4)
        return f"{mark(request.number)}{lead}{bar}{space} {text}"

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
        budget = recorder.scheduler.max_num_batched_tokens
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
        pages = recorder.allocator.num_blocks
        wide = 2 if 2 * pages <= width * rows else 1        # columns of a cell
        each = math.ceil(pages / (width * rows))            # pages of a cell
        groups = [range(first, min(first + each, pages)) for first in range(0, pages, each)]
        cells = [self.cell(group, wide) for group in groups]
        used = sum(map(bool, recorder.users.values()))
        note = f"{used} of {pages} pages in use, {len(recorder.shared)} shared, {len(recorder.kept)} cached"
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
