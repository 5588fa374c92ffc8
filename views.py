"""Looking inside a run: python tinyvllm.py --watch, --trace FILE.json, --trace FILE.html or --stats, with prompts.

The engine tells its observers what it does (Engine.tell). The Recorder keeps the facts: what each step computed, who had which pages, and
when. All views are made of these: the live one on a terminal, the two kinds of trace, and the account of a request's time.

Whose is a moment? A step owns the time from when the tokens of the step before were there (or, if none was under way, from its own launch)
until its own are there; the simulator has them when the launch returns. So steps lie end to end, though the engine launches one before it
reads the other. A request spends the time of a step on what it brought to it, and the time between its steps waiting: no moment is
counted twice, and none is left out.
"""
import contextlib
import io
import json
import os
import statistics
import sys
import time
import unicodedata
from collections import deque
from dataclasses import dataclass

from tinyvllm import CpuDevice, TinyVLLMError, cdiv

PARTS = {"queued": "waiting for pages and a place in a step",
         "prefill": "steps that computed a piece of its prompt",
         "decode": "steps that computed one token of its answer",
         "stalled": "in decode steps that others' prefill shared: the time beyond its median decode step without any",
         "preempted": "waiting again, after its pages were taken",
         "recomputed": "steps that computed again what it had before"}
MAX_STEPS, MAX_REQUESTS = 20_000, 300           # what FILE.html holds at most, lest it grow to tens of MB


# ======================================================================================================================
# The facts
# ======================================================================================================================
@dataclass
class Segment:
    """What a request did from step `first` to step `last`. Decode steps in a row are one segment, a prefill chunk is one of its own."""
    kind: str                           # of PARTS; not "stalled", which is within decode
    first: int
    last: int
    begin: float                        # in seconds of time.perf_counter(), as all times here
    end: float
    start: int = 0                      # position of the first token it computed
    count: int = 0                      # tokens it computed; 0: it waited
    sampled: int = 0                    # tokens of the answer that this brought


class Request:
    """A sequence as seen from outside. Its segments lie end to end, from its arrival to `since`."""

    def __init__(self, number, sequence, arrival_step):
        self.number, self.sequence, self.output, self.arrival_step = number, sequence, sequence.output, arrival_step
        self.state, self.since, self.segments = "queued", sequence.output.arrival_time, []
        self.pages, self.high_water = [], 0     # its block table, as last seen; how many of its tokens were computed at least once
        self.alone, self.beside = [], []        # seconds of its decode steps: without others' prefill, and with

    def kind_of(self, start):
        """What it does in a step that computes its tokens from position `start` on."""
        return "recomputed" if start < self.high_water else "prefill" if start < len(self.output.prompt_token_ids) else "decode"

    def wait(self, step, until):
        """It was in no step before this one, until then."""
        first = self.segments[-1].last + 1 if self.segments else self.arrival_step
        self.segments.append(Segment("preempted" if self.segments else "queued", first, step - 1, self.since, until))
        self.since = until

    def work(self, kind, step, until, start, count):
        """It computed `count` tokens in this step, whose tokens were there then."""
        before = self.segments[-1] if self.segments else None
        if before and before.kind == kind == "decode" and before.last == step - 1:
            before.last, before.end, before.count = step, until, before.count + count
        else:
            self.segments.append(Segment(kind, step, step, self.since, until, start, count))
        self.since = until

    def account(self):
        """{part: seconds}, which add up to the time from arrival to finish."""
        parts = dict.fromkeys(PARTS, 0.0)
        for segment in self.segments:
            parts[segment.kind] += segment.end - segment.begin
        usual = statistics.median(self.alone or [float("inf")])
        parts["stalled"] = sum(max(seconds - usual, 0.0) for seconds in self.beside)
        parts["decode"] -= parts["stalled"]
        return parts


@dataclass
class Step:
    """What was planned as one step, and the pool at that moment."""
    number: int
    planned: float
    scheduled: list                     # (request, kind, start, count)
    decode: int                         # tokens
    prefill: int                        # tokens; recomputed ones too
    used: int                           # pages that requests have
    shared: int                         # of these, pages that several have
    cached: int                         # pages that nobody has, whose tokens can still be found
    launched: float = 0.0               # when the launch had returned
    begin: float = 0.0
    end: float = 0.0                    # when its tokens were there


class Recorder:
    """An observer of the engine, from when it is idle on: keeps what happens, and when."""

    def __init__(self, llm):
        self.llm, self.scheduler, self.allocator = llm, llm.engine.scheduler, llm.engine.scheduler.allocator
        self.start, self.last_end, self.doing = time.perf_counter(), 0.0, None
        self.requests, self.live = [], {}                   # all of them; sequence -> Request, of those that have not ended
        self.steps, self.in_flight, self.planned = [], deque(), None
        self.activities = []                                # of the engine: (name, begin, end, step)
        self.users, self.kept = {}, set()                   # page -> numbers of its requests; pages that are cached
        self.changes = []       # (step, request number, pages that it got), or, instead of pages, -1 - n: it gave all back, and its first n stay cached

    def told(self, event, what):
        """From Engine.tell. schedule, launch, wait and read begin an activity of the engine; launched and done end one."""
        now, step = time.perf_counter(), len(self.steps)
        self.end_activity(now)
        if event == "schedule":
            self.find_new_requests()
        elif event == "launch":
            self.look_at_pages(now)
            self.plan(what, now)
        elif event == "launched":
            self.planned.launched = now
            self.steps.append(self.planned)
            self.in_flight.append(self.planned)
        elif self.in_flight and event in ("wait", "read"):
            step = self.in_flight[0].number
            if event == "read":
                self.account_step(self.in_flight.popleft(), now)
        elif event == "done":
            self.count_tokens(what)
            self.look_at_pages(now)
        self.doing = (event, now, step) if event not in ("launched", "done") else None

    def end_activity(self, now):
        """What the engine was doing has ended."""
        if self.doing:
            name, begin, step = self.doing
            self.activities.append((name, begin, now, step))

    def find_new_requests(self):
        """They stand at the end of the queue. At its front may be some that were preempted, which are known."""
        new = []
        for sequence in reversed(self.scheduler.waiting):
            if sequence in self.live:
                break
            new.insert(0, sequence)
        for sequence in new:
            self.live[sequence] = Request(len(self.requests) + 1, sequence, len(self.steps))
            self.requests.append(self.live[sequence])

    def look_at_pages(self, now):
        """Compares the block tables with those last seen: a table grows, or is gone (and may be there again, another one)."""
        for request in self.live.values():
            if request.output.finish_reason and request.state != "done":
                self.end_request(request, now)                                          # given up by the caller
            if request.sequence.block_table[:len(request.pages)] != request.pages:
                findable = [page in self.allocator.chains for page in request.pages]    # of a text the last pages are evicted first
                kept = (findable + [False]).index(False)
                self.changes.append((len(self.steps), request.number, -1 - kept))
                for page in request.pages:
                    self.users[page].remove(request.number)
                self.kept.difference_update(request.pages)
                self.kept.update(page for page in request.pages[:kept] if not self.users[page])
                request.pages, request.state = [], "done" if request.state == "done" else "preempted"
        for request in self.live.values():              # only now: what one gave back may be another's already
            new = request.sequence.block_table[len(request.pages):]
            if new:
                self.changes.append((len(self.steps), request.number, new))
                for page in new:
                    self.users.setdefault(page, []).append(request.number)
                self.kept.difference_update(new)
                request.pages = request.pages + new
        self.live = {sequence: request for sequence, request in self.live.items() if request.state != "done"}

    def plan(self, scheduled, now):
        """Notes the next step. scheduled: [(sequence, number of its tokens)]."""
        entries = []
        for sequence, count in scheduled:
            request, start = self.live[sequence], sequence.num_computed_tokens
            request.state = request.kind_of(start)
            request.high_water = max(request.high_water, start + count)
            entries.append((request, request.state, start, count))
        decode, total = sum(kind == "decode" for _, kind, _, _ in entries), sum(count for _, count in scheduled)
        shared = sum(len(numbers) > 1 for numbers in self.users.values())
        used = self.allocator.num_blocks - len(self.allocator.free)
        self.planned = Step(len(self.steps), now, entries, decode, total - decode, used, shared, len(self.kept))

    def account_step(self, step, now):
        """The tokens of a step are there: whose time was it?"""
        end = step.launched if isinstance(self.llm.device, CpuDevice) else now
        step.begin, step.end = max(step.planned, self.last_end), end
        for request, kind, start, count in step.scheduled:
            if request.state == "done":                 # with the step before, which was seen too late: a surplus token
                continue
            if request.since != self.last_end:          # it was not in the step before
                request.wait(step.number, max(step.begin, request.since))
            if kind == "decode":
                (request.beside if step.prefill else request.alone).append(end - request.since)
            request.work(kind, step.number, end, start, count)
        step.scheduled, self.last_end = (), end         # it names sequences, which are large

    def count_tokens(self, sampled):
        """These sequences got a token in the step that was read last. Some ended with it."""
        for request in (self.live[sequence] for sequence in sampled):
            request.segments[-1].sampled += 1
            if request.output.finish_reason:
                self.end_request(request, request.output.finish_time)

    def end_request(self, request, now):
        """A request has ended, just after a step (handing out its token is part of the step), or while it waited."""
        if request.segments and request.since == self.last_end:
            request.segments[-1].end = request.since = now
        else:
            request.wait(len(self.steps), now)
        request.state, request.output.account = "done", request.account()

    def close(self):
        """The run is over, perhaps by Ctrl-C: what is under way ends now."""
        now = time.perf_counter()
        self.end_activity(now)
        while self.in_flight:
            self.account_step(self.in_flight.popleft(), now)
        for request in self.live.values():
            request.output.finish_reason = request.output.finish_reason or "abort"
        self.look_at_pages(now)


@contextlib.contextmanager
def looking_inside(llm, args):
    """Observes the engine while the block runs, in the ways that the options ask for; afterwards, also after an error, come the reports."""
    recorder, observers = Recorder(llm), llm.engine.observers
    observers.append(recorder)
    watch = Watch(recorder) if args.watch else contextlib.nullcontext()
    try:
        with watch:
            yield recorder
    finally:
        observers.remove(recorder)
        recorder.close()
        if args.trace:
            with open(args.trace, "w", encoding="utf-8") as file:
                file.write(html_trace(recorder) if args.trace.endswith(".html") else json.dumps(chrome_trace(recorder)))
        if args.stats:
            print("\n".join(account_table(recorder.requests)), file=sys.stderr)


# ======================================================================================================================
# Accounts and traces
# ======================================================================================================================
def account_table(requests):
    """Lines: where each request's time went, in seconds."""
    lines = ["  ".join(f"{name:>10}" for name in ("request", *PARTS, "wall", "prompt", "cached", "answer"))]
    for request in requests:
        o, account = request.output, request.output.account
        numbers = len(o.prompt_token_ids), o.num_cached_tokens, len(o.token_ids)
        lines.append("  ".join([f"{request.number:10}", *(f"{seconds:10.3f}" for seconds in (*account.values(), sum(account.values()))),
                                *(f"{number:10}" for number in numbers)]))
    return ["Where the time went, in seconds that add up to wall, and tokens (cached: that it did not have to compute):", *lines,
            *(f"{part:>10}: {what}" for part, what in PARTS.items())]


def check_trace_path(path):
    """Raises TinyVLLMError if a trace cannot be written there, and leaves no file."""
    if not path.endswith((".json", ".html")):
        raise TinyVLLMError(f"--trace {path}: expected is a file that ends in .json or .html")
    is_new = not os.path.exists(path)
    try:
        open(path, "a").close()
    except OSError as error:
        raise TinyVLLMError(f"--trace cannot write {path} ({error.strerror}): expected is a file that you may write") from None
    if is_new:
        os.remove(path)


def chrome_trace(recorder):
    """The run in Chrome's trace format (ui.perfetto.dev opens it): a track for the engine, one for each request, and counters."""
    zero = min([recorder.start, *(request.output.arrival_time for request in recorder.requests)])
    events = []

    def add(phase, name, process, thread=0, at=zero, **more):
        events.append({"ph": phase, "name": name, "pid": process, "tid": thread, "ts": (at - zero) * 1e6, **more})

    add("M", "process_name", 1, args={"name": "engine"})
    add("M", "process_name", 2, args={"name": "requests"})
    for name, begin, end, step in recorder.activities:
        add("X", name, 1, 1, begin, dur=(end - begin) * 1e6, args={"step": step})
    for request in recorder.requests:
        add("M", "thread_name", 2, request.number, args={"name": f"{request.number}: {request.output.text[:40]}"})
        for s in request.segments:
            add("X", s.kind, 2, request.number, s.begin, dur=(s.end - s.begin) * 1e6,
                args={"first_step": s.first, "last_step": s.last, "first_token": s.start, "tokens": s.count, "new_tokens": s.sampled})
    for step in recorder.steps:
        add("C", "pages", 1, 0, step.planned, args={"used": step.used, "shared": step.shared, "cached": step.cached})
        add("C", "batch", 1, 0, step.begin, args={"prefill tokens": step.prefill, "decode tokens": step.decode})
    end = max([request.since for request in recorder.requests], default=zero)
    add("C", "pages", 1, 0, end, args={"used": 0, "shared": 0, "cached": len(recorder.kept)})
    add("C", "batch", 1, 0, end, args={"prefill tokens": 0, "decode tokens": 0})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


# ======================================================================================================================
# Watch
# ======================================================================================================================
SMALLEST = 60, 16                               # columns and lines of a terminal
COLOURS = 75, 214, 77, 211, 227, 141, 44, 173, 154, 180         # of the 256 that terminals have; black text is legible on each
MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def mark(request_number, text=None):
    """A character on the request's colour: its letter, if nothing else."""
    return f"\x1b[30;48;5;{COLOURS[(request_number - 1) % len(COLOURS)]}m{text or MARKS[(request_number - 1) % len(MARKS)]}\x1b[0m"


def tail(text, columns):
    """The end of a text, as wide as that: East Asian characters take two columns; control characters may do harm."""
    text = "".join(c if c.isprintable() else " " for c in text[-columns:])
    while sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text) > columns:
        text = text[1:]
    return text


class Watch:
    """An observer that draws what a Recorder knows on stderr's terminal, on its second screen. Meanwhile stderr is held back, and
    stdout too if it is a terminal: that is printed afterwards."""

    def __init__(self, recorder):
        self.recorder, self.engine, self.terminal, self.held = recorder, recorder.llm.engine, sys.stderr, contextlib.ExitStack()
        self.drawn, self.size = 0.0, None
        self.history = deque(maxlen=30)         # (time, new tokens, bytes and seconds of decode) of the latest frames

    def __enter__(self):
        if not self.fits():
            return
        self.engine.observers.append(self)
        self.held.callback(self.engine.observers.remove, self)
        for stream, redirect in (sys.stdout, contextlib.redirect_stdout), (sys.stderr, contextlib.redirect_stderr):
            if stream.isatty():
                text = io.StringIO()
                self.held.callback(lambda stream=stream, text=text: print(text.getvalue(), end="", file=stream, flush=True))
                self.held.enter_context(redirect(text))
        self.held.callback(self.write, "\x1b[?7h\x1b[?25h\x1b[?1049l")         # undone in reverse: this comes first
        self.write("\x1b[?1049h\x1b[?25l\x1b[?7l")                            # the second screen, no cursor, no wrapping

    def __exit__(self, *error):
        self.held.close()

    def write(self, text):
        self.terminal.write(text)
        self.terminal.flush()

    def fits(self):
        """Whether there is a terminal that is large enough; else says so."""
        why = "stderr is no terminal"
        if self.terminal.isatty():
            self.size = os.get_terminal_size(self.terminal.fileno())
            why = f"the terminal has {self.size.columns} columns and {self.size.lines} lines, {SMALLEST[0]} and {SMALLEST[1]} are needed"
            if self.size.columns >= SMALLEST[0] and self.size.lines >= SMALLEST[1]:
                return True
        print(f"tiny-vLLM: --watch is off: {why}", file=sys.stderr)
        return False

    def told(self, event, what):
        """Draws after a step is launched or read, 15 times a second at most."""
        now = time.perf_counter()
        if event not in ("launched", "done") or now - self.drawn < 1 / 15:
            return
        self.drawn, before = now, self.size
        if not self.fits():                     # now: stderr is held, so the line comes when the screen is closed
            return self.held.close()
        stats = self.engine.stats
        tokens = sum(len(request.output.token_ids) for request in self.recorder.requests)
        self.history.append((now, tokens, stats.decode_bytes, stats.decode_seconds))
        lines = "\x1b[K\r\n".join(self.frame(*self.size)) + "\x1b[K\x1b[J"       # each line clears its rest, the last the lines below
        self.write(("\x1b[2J" if before != self.size else "") + "\x1b[H" + lines)

    def frame(self, columns, lines):
        """Lines of text, with colours."""
        recorder, width = self.recorder, columns - 2
        frame = [self.headline(), self.step_line(width), "", *self.grid(width, max(lines // 3, 4)),
                 f"{mark(1)} a page of request A   {mark(1, '2')} a page that two share   + cached: free, and found again   . free", ""]
        shown = [*recorder.live.values()]
        shown += [request for request in reversed(recorder.requests) if request.state == "done"]       # if there is room
        room = lines - len(frame) - 1
        for request in shown[:room]:
            computed, known = request.sequence.num_computed_tokens, len(request.output.prompt_token_ids) + len(request.output.token_ids)
            state = f"{request.state} {computed}/{known}" if request.state in ("prefill", "recomputed") else request.state
            size = columns // 4                     # cells of the bar; a table of more pages shows its last
            bar = "".join(mark(request.number, "|") for page in request.pages[-size:]) + " " * (size - len(request.pages))
            lead = f" {state:<19}{known:>5} tokens "
            frame.append(f"{mark(request.number)}{lead}{bar} {tail(request.output.text, columns - len(lead) - size - 3)}")
        return frame + ([f"and {len(shown) - room} more"] if len(shown) > room else [])

    def headline(self):
        """What the whole engine does."""
        recorder, (now, *latest), (then, *first) = self.recorder, self.history[-1], self.history[0]
        tokens, num_bytes, seconds = (a - b for a, b in zip(latest, first))
        waiting, peak = len(recorder.scheduler.waiting), recorder.llm.device.memory_bandwidth
        parts = [f"step {len(recorder.steps)}", f"{len(recorder.live) - waiting} running, {waiting} waiting, {len(recorder.requests) - len(recorder.live)} done",
                 f"{tokens / max(now - then, 1e-3):.0f} tokens/s"]
        if peak and seconds:
            parts.append(f"{num_bytes / seconds / peak:.0%} of {peak / 1e9:.0f} GB/s")
        return "\x1b[1mtiny-vLLM\x1b[0m   " + "   ".join(parts)

    def step_line(self, width):
        """The latest step's tokens, against the budget."""
        step, budget = self.recorder.steps[-1], self.recorder.scheduler.max_num_batched_tokens
        size = width // 3
        cells = [min(cdiv(tokens * size, budget), size) for tokens in (step.decode, step.prefill)]
        cells[1] = min(cells[1], size - cells[0])
        bar = f"\x1b[42m{' ' * cells[0]}\x1b[43m{' ' * cells[1]}\x1b[0m{' ' * (size - sum(cells))}"
        return f"[{bar}]  \x1b[32m{step.decode} decode\x1b[0m + \x1b[33m{step.prefill} prefill\x1b[0m of {budget} tokens a step"

    def grid(self, width, rows):
        """Lines of the page pool, a cell for a page, or for several: then it shows one that has a user, or is cached, if any is."""
        recorder, pages = self.recorder, self.recorder.allocator.num_blocks
        each = cdiv(pages, width * rows)
        cells = []
        for first in range(0, pages, each):
            group = range(first, min(first + each, pages))
            users = max((recorder.users.get(page, []) for page in group), key=len)
            cells.append(mark(users[0], str(min(len(users), 9)) if len(users) > 1 else None) if users
                         else "+" if any(page in recorder.kept for page in group) else "\x1b[2m.\x1b[0m")
        used, shared = (sum(len(users) > n for users in recorder.users.values()) for n in (0, 1))
        note = f"{used} of {pages} pages in use, {shared} shared, {len(recorder.kept)} cached" + (f"; {each} pages a cell" if each > 1 else "")
        return [note, *("".join(cells[i:i + width]) for i in range(0, len(cells), width))]


# ======================================================================================================================
# The page
# ======================================================================================================================
def html_trace(recorder):
    """The run as a page. Changes from step to step are stored, not states, and of a very long run only the beginning."""
    requests, steps = recorder.requests[:MAX_REQUESTS], recorder.steps[:MAX_STEPS]
    zero = min([recorder.start, *(request.output.arrival_time for request in requests)])

    def micros(seconds):
        return round((seconds - zero) * 1e6)

    data = {
        "device": recorder.llm.device.name, "num_blocks": recorder.allocator.num_blocks, "block_size": recorder.allocator.block_size,
        "budget": recorder.scheduler.max_num_batched_tokens, "num_requests": len(recorder.requests), "num_steps": len(recorder.steps),
        "requests": [{"number": r.number, "prompt": len(r.output.prompt_token_ids), "cached": r.output.num_cached_tokens,
                      "new": len(r.output.token_ids), "text": r.output.text[:80], "reason": r.output.finish_reason, "account": r.output.account,
                      "segments": [[s.kind, s.first, s.last, s.start, s.count, s.sampled] for s in r.segments if s.first <= len(steps)]}
                     for r in requests],
        "steps": [[micros(s.begin), micros(s.end), s.prefill, s.decode, s.used, s.shared, s.cached] for s in steps],
        "changes": [change for change in recorder.changes if change[0] <= len(steps) and change[1] <= len(requests)]}
    return PAGE.replace("@DATA@", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


PAGE = r"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>tiny-vLLM: a run</title>
<style>
:root { color-scheme: light dark; --back: #fbfaf7; --card: #fff; --ink: #22262c; --soft: #6b7280; --line: #dfe1e5; --warn: #c2410c; --mark: #1d4ed8 }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --card: #1c2027; --ink: #e6e8ec; --soft: #98a1ae; --line: #333a45; --warn: #fb923c;
  --mark: #7aa2ff } }
body { margin: 0 auto; max-width: 1180px; padding: 20px; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 17px; margin: 0 } p { margin: 2px 0 12px; color: var(--soft); max-width: 52em }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; margin: 14px 0 }
canvas { display: block; width: 100%; cursor: pointer } input { flex: 1; accent-color: var(--mark) } b { font-weight: 600; color: var(--ink) }
#bar { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: center }
#bar input { min-width: 200px } #now { flex-basis: 100%; font-variant-numeric: tabular-nums }
button { font: inherit; width: 5em; border: 1px solid var(--line); border-radius: 6px; background: var(--back); color: var(--ink); cursor: pointer }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; color: var(--soft); margin-bottom: 8px } .legend canvas { display: inline-block; width: 26px;
  height: 16px; vertical-align: -3px; margin-right: 6px }
.table { display: flex; gap: 10px; align-items: baseline; margin: 3px 0 } .table > b { flex: 0 0 13em; font-weight: 400 } .table i { display: inline-block;
  font: 12px/18px ui-monospace, monospace; min-width: 26px; text-align: center; border-radius: 3px; margin: 0 2px 2px 0; color: #10131a }
.table i.shared { outline: 2px solid var(--ink); outline-offset: -2px }
</style></head><body>
<h1>One run of tiny-vLLM, step by step</h1><p id="facts"></p>
<section id="bar"><button id="play">Play</button><input id="slider" type="range" min="0" value="0" aria-label="step"><span id="now"></span></section>
<section><h2>Who computes what, and when</h2><p>A row is a <b>request</b>, a column a <b>step</b>: one pass of the model over some tokens of many
requests. A prompt is read in a few steps (<b>prefill</b>); then each step brings one token of the answer (<b>decode</b>). When one
request ends, the next joins: nobody waits for the whole batch. Click on a step to see it below.</p>
<div class="legend" id="kinds"></div><canvas id="time"></canvas></section>
<section><h2>Where keys and values live: the page pool</h2><p>The model remembers each token as a key and a value. They lie in <b>pages</b> of
<span id="size"></span> tokens, anywhere in memory. A cell is a page, with its owner's colour and number. Requests that begin alike <b>share</b> pages; a page
that nobody needs any more stays <b>cached</b> until the room is wanted. <b id="pool"></b></p>
<div class="legend" id="states"></div><canvas id="map"></canvas><p id="page">Point at a page.</p></section>
<section><h2>Block tables: which page comes next?</h2><p>The only order there is: each request's list of its pages, first tokens first. (Outlined: the page has several users.)</p>
<div id="tables"></div></section>
<script id="data" type="application/json">@DATA@</script>
<script>
"use strict";
const D = JSON.parse(document.getElementById("data").textContent), $ = id => document.getElementById(id), N = D.steps.length, R = D.requests;
const HUES = ["#5b9bea", "#f0a04b", "#4fb57c", "#e578a5", "#d8bb3a", "#a184e6", "#3bb4c1", "#e07563", "#9bbd4a", "#bd9272"];
const hue = r => HUES[(r - 1) % HUES.length], css = name => getComputedStyle(document.body).getPropertyValue(name);
const states = {prefill: "prefill", decode: "decode", queued: "queued", preempted: "preempted: its pages were taken", recomputed: "computed again"};
let step = 0, users = [], cached = [], tables = {}, applied = 0, timer = 0;

function canvas(c, height) {                            // sharp on any screen
  const scale = devicePixelRatio || 1, width = c.clientWidth, g = c.getContext("2d");
  c.width = width * scale; c.height = height * scale; c.style.height = height + "px"; g.scale(scale, scale); g.font = "12px system-ui, sans-serif";
  return [g, width];
}
function hatch(g, x, y, w, h, color) {
  g.save(); g.beginPath(); g.rect(x, y, w, h); g.clip(); g.strokeStyle = color; g.lineWidth = 1.5; g.beginPath();
  for (let i = x - h; i < x + w; i += 6) { g.moveTo(i, y + h); g.lineTo(i + h, y); }
  g.stroke(); g.restore();
}
function segment(g, kind, x, y, w, h, color) {
  if (kind == "queued" || kind == "preempted") {
    g.strokeStyle = css(kind == "queued" ? "--soft" : "--warn"); g.lineWidth = 2; g.setLineDash([3, 3]); g.beginPath();
    g.moveTo(x, y + h / 2); g.lineTo(x + w, y + h / 2); g.stroke(); g.setLineDash([]); return;
  }
  g.globalAlpha = kind == "decode" ? 0.5 : 1; g.fillStyle = color; g.fillRect(x, y, Math.max(w - (w > 3 ? 1 : 0), 1), h); g.globalAlpha = 1;
  if (kind == "recomputed") hatch(g, x, y, Math.max(w - 1, 1), h, css("--warn"));
}
function cell(g, x, y, w, h, owners, kept, page) {
  g.fillStyle = css("--back"); g.fillRect(x, y, w, h);
  owners.forEach((r, i) => { g.fillStyle = hue(r); g.fillRect(x + w * i / owners.length, y, w / owners.length, h); });
  if (!owners.length && kept) hatch(g, x, y, w, h, hue(kept));
  g.strokeStyle = css(owners.length > 1 ? "--ink" : "--line"); g.lineWidth = owners.length > 1 ? 2 : 1; g.strokeRect(x + .5, y + .5, w - 1, h - 1);
  g.textAlign = "center"; g.fillStyle = "#10131a";
  if (owners.length && w >= 14) g.fillText(owners.length > 1 ? "\u00d7" + owners.length : owners[0], x + w / 2, y + h / 2 + 4);
  g.textAlign = "left";
}
function timeline() {
  const row = Math.max(5, Math.min(24, 640 / R.length)), left = 190, rows = R.length * row, [g, width] = canvas($("time"), rows + 150);
  const column = (width - left - 4) / Math.max(N, 1), at = s => left + s * column;
  R.forEach((r, i) => {
    const y = i * row;
    if (row >= 12) {
      g.fillStyle = hue(r.number); g.fillRect(0, y + row / 2 - 6, 24, 13); g.fillStyle = "#10131a"; g.textAlign = "center";
      g.fillText(r.number, 12, y + row / 2 + 5); g.textAlign = "left"; g.fillStyle = css("--soft");
      g.save(); g.beginPath(); g.rect(30, y, left - 40, row); g.clip(); g.fillText(r.text, 30, y + row / 2 + 5); g.restore();
    }
    for (const [kind, first, last] of r.segments)
      if (last >= first) segment(g, kind, at(first), y + 2, (Math.min(last, N - 1) - first + 1) * column, row - 4, hue(r.number));
  });
  const most = Math.max(1, ...D.steps.map(s => s[2] + s[3]));
  strip(g, rows + 14, "tokens of the step", "up to " + most, at, column, s => [[s[3] / most, hue(1), 0], [s[2] / most, hue(2), 0]]);
  strip(g, rows + 84, "pages in use and cached", "of " + D.num_blocks, at, column,
        s => [[(s[4] - s[5]) / D.num_blocks, hue(3), 0], [s[5] / D.num_blocks, css("--ink"), 0], [s[6] / D.num_blocks, css("--line"), 0]]);
  g.strokeStyle = css("--mark"); g.lineWidth = 2; g.strokeRect(at(step), 1, Math.max(column, 2), rows + 144);
}
function strip(g, y, title, note, at, column, parts) {  // stacked bars, 56 high, one for each step
  g.fillStyle = css("--ink"); g.fillText(title, 0, y + 24); g.fillStyle = css("--soft"); g.fillText(note, 0, y + 40);
  D.steps.forEach((s, i) => {
    let top = y + 56;
    for (const [share, color] of parts(s)) { g.fillStyle = color; top -= share * 56; g.fillRect(at(i), top, Math.max(column - (column > 3 ? 1 : 0), .5), share * 56); }
  });
}
function apply(to) {                                    // the block tables as they are in that step; after the last, what is left
  if (to < applied || !applied) { users = Array.from({length: D.num_blocks}, () => []); cached = []; tables = {}; applied = 0; }
  const from = applied; applied = to + 1;
  for (const [at, r, pages] of D.changes) {
    if (at < from || at > to) continue;
    if (typeof pages == "number") {
      tables[r].forEach((p, i) => { users[p] = users[p].filter(u => u != r); cached[p] = i < -1 - pages ? r : 0; });
      delete tables[r];
    } else { tables[r] = (tables[r] || []).concat(pages); pages.forEach(p => users[p].push(r)); }
  }
}
function layout(width) {                                // of the map: pages that the run never touched are left out if they are many
  const touched = Math.max(0, ...D.changes.map(c => typeof c[2] == "number" ? 0 : Math.max(...c[2]))) + 1;
  const shown = D.num_blocks <= 512 ? D.num_blocks : Math.min(touched, 6000), size = shown <= 150 ? 34 : shown <= 600 ? 24 : shown <= 2500 ? 14 : 9;
  return [shown, size, Math.floor(width / size)];
}
function map() {
  const [shown, size, columns] = layout($("map").clientWidth), [g] = canvas($("map"), Math.ceil(shown / columns) * size);
  for (let p = 0; p < shown; p++) cell(g, p % columns * size, Math.floor(p / columns) * size, size - 2, size - 2, users[p], cached[p]);
  const s = D.steps[step] || [0, 0, 0, 0, users.filter(u => u.length).length, 0, users.filter((u, p) => !u.length && cached[p]).length];
  $("pool").textContent = `Now ${s[4]} of ${D.num_blocks} pages are in use, ${s[5]} of them shared, and ${s[6]} are cached.` +
    (shown < D.num_blocks ? ` (The first ${shown} are drawn.)` : "");
}
function rows() {
  $("tables").replaceChildren(...Object.keys(tables).slice(0, 60).map(r => {
    const div = document.createElement("div"), name = document.createElement("b"), request = R[r - 1];
    const [kind] = request.segments.find(s => s[1] <= step && step <= s[2]) || ["ends"];
    div.className = "table"; name.textContent = `request ${r}: ${states[kind] || kind}`; div.append(name, document.createElement("span"));
    div.lastChild.append(...tables[r].slice(0, 300).map(p => {
      const chip = document.createElement("i");
      chip.textContent = p; chip.style.background = hue(r); chip.className = users[p].length > 1 ? "shared" : ""; return chip;
    }));
    return div;
  }));
}
function go(to) {
  step = Math.max(0, Math.min(N, +to || 0)); $("slider").value = step; apply(step); timeline(); map(); rows();
  const s = D.steps[step];
  $("now").textContent = !s ? "After the last step: every page has been given back." : `Step ${step + 1} of ${N}: ${s[3]} decode + ${s[2]} prefill tokens ` +
    `(at most ${D.budget}), ${((s[1] - s[0]) / 1000).toFixed(2)} ms, ${(s[0] / 1e6).toFixed(3)} s after the start`;
}
function legend(id, entries) {
  for (const [name, draw] of entries) {
    const span = document.createElement("span"), c = document.createElement("canvas");
    span.append(c, name); $(id).append(span); draw(canvas(c, 16)[0]);
  }
}
function redraw() {
  $("kinds").replaceChildren(); $("states").replaceChildren();
  legend("kinds", Object.entries(states).map(([kind, name]) => [name, g => segment(g, kind, 0, 1, 26, 14, hue(1))]));
  legend("states", [["used by request 1", [1], 0], ["shared by two (\u00d72: its reference count)", [1, 2], 0], ["cached, last used by 3", [], 3], ["free", [], 0]]
    .map(([name, owners, kept]) => [name, g => cell(g, 0, 0, 26, 16, owners, kept)]));
  go(step);
}
$("facts").textContent = `${D.num_requests} requests, ${R.reduce((n, r) => n + r.new, 0)} new tokens, ${D.num_steps} steps, a pool of ${D.num_blocks} pages of ` +
  `${D.block_size} tokens, on ${D.device}.` + (N < D.num_steps || R.length < D.num_requests ? ` The page holds the first ${N} steps and ${R.length} requests.` : "");
$("size").textContent = D.block_size; $("slider").max = N; step = +location.hash.slice(1) || 0;
$("slider").oninput = event => go(event.target.value);
$("time").onclick = event => go(Math.floor((event.offsetX - 190) / (event.target.clientWidth - 194) * N));
$("map").onmousemove = event => {
  const [shown, size, columns] = layout(event.target.clientWidth), p = Math.floor(event.offsetY / size) * columns + Math.floor(event.offsetX / size);
  if (p < shown) $("page").textContent = `Page ${p}: reference count ${users[p].length}` + (users[p].length ? `, used by ${users[p].join(", ")}.` :
    cached[p] ? `, cached: request ${cached[p]} filled it, and whoever begins alike will find it.` : ", free.");
};
$("play").onclick = () => {
  if (timer) { clearInterval(timer); timer = 0; } else { if (step >= N) go(0); timer = setInterval(() => step < N ? go(step + Math.ceil(N / 400)) : $("play").click(), 60); }
  $("play").textContent = timer ? "Pause" : "Play";
};
addEventListener("resize", redraw); matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw); redraw();
</script></body></html>
"""
