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
from pathlib import Path


class ViewsError(Exception):
    """A user's mistake, in one line."""


def cdiv(a, b):
    return -(-a // b)


PARTS = {"queued": "waiting for pages and a place in a step",
         "prefill": "steps that computed a piece of its prompt",
         "decode": "steps that computed one token of its answer",
         "stalled": "in decode steps that others' prefill shared: the time beyond its median decode step without any",
         "preempted": "waiting again, after its pages were taken",
         "recomputed": "steps that computed again what it had before"}


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
    start: int                          # position of the first token it computed
    count: int                          # tokens it computed; 0: it waited
    sampled: int = 0                    # tokens of the answer that this brought


class Request:
    """A sequence as seen from outside. Its segments lie end to end, from its arrival to `since`."""

    def __init__(self, number, sequence, arrival_step):
        """arrival_step: the next one to be planned."""
        self.number, self.sequence, self.output, self.arrival_step = number, sequence, sequence.output, arrival_step
        self.state, self.since, self.segments = "queued", sequence.output.arrival_time, []
        self.table, self.num_pages = sequence.block_table, 0    # which array it is, and how many pages of it have been seen
        self.high_water = 0                     # tokens that were computed at least once
        self.alone, self.beside = [], []        # seconds of its decode steps: without others' prefill, and with

    def spend(self, kind, first, last, until, start=0, count=0):
        """Its time up to `until`, and these steps, went into `kind`."""
        before = self.segments[-1] if self.segments else None
        if before and before.kind == kind == "decode" and before.last == first - 1:
            before.last, before.end, before.count = last, until, before.count + count
        else:
            self.segments.append(Segment(kind, first, last, self.since, until, start, count))
        self.since = until

    def wait(self, step, until):
        """It was in no step before this one, until then."""
        kind, first = ("preempted", self.segments[-1].last + 1) if self.segments else ("queued", self.arrival_step)
        self.spend(kind, first, step - 1, until)

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
    """An observer of the engine, from when no request runs on: keeps what happens, and when."""

    def __init__(self, llm):
        self.llm, self.scheduler, self.allocator = llm, llm.engine.scheduler, llm.engine.scheduler.allocator
        self.start, self.last_end = time.perf_counter(), 0.0
        self.requests, self.live = [], {}                   # all of them; sequence -> Request, of those that have not ended
        self.steps, self.planned = [], None
        self.in_flight = deque(Step(-1, 0.0, (), 0, 0, 0, 0, 0) for _ in llm.engine.in_flight)      # of surplus tokens, from before
        self.events = []                                    # (name, time, step)
        self.users, self.shared, self.kept = {}, set(), set()       # page -> numbers of its requests; pages of several; cached pages
        self.changes = []       # (step, request number, pages that it got); or -1 - n for pages: it gave all back, the first n stay cached

    def told(self, event, what):
        """From Engine.tell. schedule, launch, wait and read begin an activity of the engine; launched and done end one."""
        now, step = time.perf_counter(), len(self.steps)
        if event == "schedule":
            for sequence in self.scheduler.waiting:
                if sequence not in self.live:
                    self.live[sequence] = Request(len(self.requests) + 1, sequence, step)
                    self.requests.append(self.live[sequence])
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
            for request in (self.live[sequence] for sequence in what):
                request.segments[-1].sampled += 1
                if request.output.finish_reason:
                    self.end_request(request, request.output.finish_time)
            self.look_at_pages(now)
        self.events.append((event, now, step))

    def look_at_pages(self, now):
        """Finds what has changed in the block tables: one grows, or is gone, and then the sequence has another list."""
        for request in self.live.values():
            if request.output.finish_reason and request.state != "done":
                self.end_request(request, now)                                          # given up by the caller
            if request.sequence.block_table is not request.table:
                pages = list(request.table[:request.num_pages])
                findable = [page in self.allocator.chains for page in pages]            # of a text the last pages are evicted first
                kept = (findable + [False]).index(False)
                if pages:
                    self.changes.append((len(self.steps), request.number, -1 - kept))
                for i, page in enumerate(pages):
                    self.users[page].remove(request.number)
                    (self.kept.add if i < kept and not self.users[page] else self.kept.discard)(page)
                self.shared.difference_update(page for page in pages if len(self.users[page]) < 2)
                request.table, request.num_pages = request.sequence.block_table, 0
                if pages and request.state != "done":
                    request.state = "preempted"
        for request in self.live.values():              # only now: what one gave back may be another's already
            if len(request.table) > request.num_pages:
                new, request.num_pages = list(request.table[request.num_pages:]), len(request.table)
                self.changes.append((len(self.steps), request.number, new))
                for page in new:
                    self.users.setdefault(page, []).append(request.number)
                self.kept.difference_update(new)
                self.shared.update(page for page in new if len(self.users[page]) > 1)
        for request in [request for request in self.live.values() if request.state == "done"]:
            del self.live[request.sequence]

    def plan(self, scheduled, now):
        """Notes the next step. scheduled: [(sequence, number of its tokens)]."""
        entries = []
        for sequence, count in scheduled:
            request, start = self.live[sequence], sequence.num_computed_tokens
            is_prompt = start < len(request.output.prompt_token_ids)
            request.state = "recomputed" if start < request.high_water else "prefill" if is_prompt else "decode"
            request.high_water = max(request.high_water, start + count)
            entries.append((request, request.state, start, count))
        decode, total = sum(kind == "decode" for _, kind, _, _ in entries), sum(count for _, count in scheduled)
        used = self.allocator.num_blocks - len(self.allocator.free)
        self.planned = Step(len(self.steps), now, entries, decode, total - decode, used, len(self.shared), len(self.kept))

    def account_step(self, step, now):
        """The tokens of a step are there: whose time was it?"""
        end = step.launched if self.llm.device.is_simulated else now
        step.begin, step.end = max(step.planned, self.last_end), end
        for request, kind, start, count in step.scheduled:
            if request.state == "done":                 # with the step before, which was seen too late: a surplus token
                continue
            if request.since != self.last_end:          # it was not in the step before
                request.wait(step.number, max(step.begin, request.since))
            if kind == "decode":
                (request.beside if step.prefill else request.alone).append(end - request.since)
            request.spend(kind, step.number, step.number, end, start, count)
        step.scheduled, self.last_end = (), end

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
        self.events.append(("close", now, len(self.steps)))
        while self.in_flight:
            self.account_step(self.in_flight.popleft(), now)
        for request in self.live.values():
            self.end_request(request, now)
        self.look_at_pages(now)
        self.start = min([self.start, *(request.output.arrival_time for request in self.requests)])


@contextlib.contextmanager
def looking_inside(llm, args):
    """Observes the engine while the block runs, in the ways that the options ask for; afterwards, also after Ctrl-C, come the reports."""
    recorder, observers = Recorder(llm), llm.engine.observers
    observers.append(recorder)
    try:
        with Watch(recorder) if args.watch else contextlib.nullcontext():
            yield recorder
    finally:
        observers.remove(recorder)
        recorder.close()
        if args.trace:
            text = html_trace(recorder) if args.trace.endswith(".html") else json.dumps(chrome_trace(recorder))
            Path(args.trace).write_text(text, "utf-8")
        if args.stats:
            print("\n".join(account_table(recorder.requests)), file=sys.stderr)


# ======================================================================================================================
# Accounts and traces
# ======================================================================================================================
def account_table(requests):
    """Lines: where each request's time went."""
    lines = ["Where the time went, in seconds that add up to wall, and tokens (cached: these did not have to be computed):",
             "  ".join(f"{name:>10}" for name in ("request", *PARTS, "wall", "prompt", "cached", "answer"))]
    for request in requests:
        o, seconds = request.output, request.output.account.values()
        cells = [f"{request.number}", *(f"{value:.3f}" for value in (*seconds, sum(seconds)))]
        cells += map(str, (len(o.prompt_token_ids), o.num_cached_tokens, len(o.token_ids)))
        lines.append("  ".join(f"{cell:>10}" for cell in cells))
    return lines + [f"{part:>10}: {what}" for part, what in PARTS.items()]


def check_writable(option, path):
    """Raises ViewsError if a file cannot be written there: better now than after a run. Leaves none."""
    is_new = not os.path.exists(path)
    try:
        open(path, "a").close()
    except OSError as error:
        raise ViewsError(f"{option} cannot write {path} ({error.strerror}): expected is a file that you may write") from None
    if is_new:
        os.remove(path)


def check_trace_path(path):
    """Raises ViewsError if a trace cannot be written there."""
    if not path.endswith((".json", ".html")):
        raise ViewsError(f"--trace is {path}, expected is a file that ends in .json or .html")
    check_writable("--trace", path)


def chrome_trace(recorder):
    """The run in Chrome's trace format, for ui.perfetto.dev: a track for the engine, one for each request, and counters."""
    zero, events = recorder.start, []

    def add(phase, name, process, thread, at, args, **more):
        events.append({"ph": phase, "name": name, "pid": process, "tid": thread, "ts": (at - zero) * 1e6, "args": args} | more)

    def count(at, used, shared, cached, prefill, decode):
        add("C", "pages", 1, 0, at, {"used": used, "shared": shared, "cached": cached})
        add("C", "tokens of the step", 1, 0, at, {"prefill": prefill, "decode": decode})

    add("M", "process_name", 1, 0, zero, {"name": "engine"})
    add("M", "process_name", 2, 0, zero, {"name": "requests"})
    for (name, begin, step), (_, end, _) in zip(recorder.events, recorder.events[1:]):
        if name in ("schedule", "launch", "wait", "read"):
            add("X", name, 1, 1, begin, {"step": step}, dur=(end - begin) * 1e6)
    for r in recorder.requests:
        add("M", "thread_name", 2, r.number, zero, {"name": f"{r.number}: {r.output.text[:40]}"})
        for s in r.segments:
            add("X", s.kind, 2, r.number, s.begin, dur=(s.end - s.begin) * 1e6, args={
                "first_step": s.first, "last_step": s.last, "first_token": s.start, "tokens": s.count, "new_tokens": s.sampled})
    for s in recorder.steps:
        count(s.planned, s.used, s.shared, s.cached, s.prefill, s.decode)
    count(max([r.since for r in recorder.requests], default=zero), 0, 0, len(recorder.kept), 0, 0)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def html_trace(recorder, max_steps=20_000, max_requests=300):
    """The run as a page. Changes from step to step are stored, not states, and of a long run only the beginning, lest it have tens of MB."""
    requests, steps = recorder.requests[:max_requests], recorder.steps[:max_steps]
    zero = recorder.start
    data = {
        "device": recorder.llm.device.name, "num_blocks": recorder.allocator.num_blocks, "block_size": recorder.allocator.block_size,
        "budget": recorder.scheduler.max_num_batched_tokens, "num_requests": len(recorder.requests), "num_steps": len(recorder.steps),
        "requests": [{"text": r.output.text[:80], "new": len(r.output.token_ids),
                      "segments": [[s.kind, s.first, min(s.last, len(steps) - 1)] for s in r.segments if s.first < len(steps)]} for r in requests],
        "steps": [[round((s.begin - zero) * 1e6), round((s.end - zero) * 1e6), s.prefill, s.decode, s.used, s.shared, s.cached] for s in steps],
        "changes": [change for change in recorder.changes if change[0] <= len(steps) and change[1] <= len(requests)]}
    return PAGE.replace("@DATA@", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))     # no text ends the script


# ======================================================================================================================
# Watch
# ======================================================================================================================
SMALLEST = 60, 16                               # columns and lines of a terminal
COLOURS = 75, 214, 77, 211, 227, 141, 44, 173, 154, 180         # of the 256 that terminals have; black text is legible on each


def mark(number, text="", width=1):
    """Text on the colour of a request; default: its letter."""
    text = text or chr(ord("A") + (number - 1) % 26)
    return f"\x1b[30;48;5;{COLOURS[(number - 1) % len(COLOURS)]}m{text:<{width}}\x1b[0m"


def tail(text, columns):
    """The end of a text, as wide as that: East Asian characters take two columns, and control characters could do harm."""
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
            columns, lines = self.size = os.get_terminal_size(self.terminal.fileno())
            if columns >= SMALLEST[0] and lines >= SMALLEST[1]:
                return True
            why = f"the terminal has {columns} columns and {lines} lines, {SMALLEST[0]} and {SMALLEST[1]} are needed"
        print(f"tiny-vLLM: --watch is off: {why}", file=sys.stderr)
        return False

    def told(self, event, what):
        """Draws after a step is launched or read, 15 times a second at most."""
        now = time.perf_counter()
        if event not in ("launched", "done") or now - self.drawn < 1 / 15:
            return
        self.drawn, before = now, self.size
        if not self.fits():                     # any more; it is said when the screen is closed, for stderr is held
            return self.held.close()
        tokens = sum(len(request.output.token_ids) for request in self.recorder.requests)
        self.history.append((now, tokens, self.engine.stats.decode_bytes, self.engine.stats.decode_seconds))
        clear = "\x1b[2J" if before != self.size else ""                # each line clears its rest, the last one the lines below
        self.write(clear + "\x1b[H" + "\x1b[K\r\n".join(self.frame(*self.size)) + "\x1b[K\x1b[J")

    def frame(self, columns, lines):
        """Lines of text, with colours."""
        recorder, legend = self.recorder, f"{mark(1)} a page of A   {mark(1, '2')} shared by two   + cached   . free"
        frame = [*self.head(columns // 5), *self.grid(columns - 2, lines // 3), legend, ""]
        shown = [*recorder.live.values(), *(request for request in reversed(recorder.requests) if request.state == "done")]
        room, size = lines - len(frame) - 1, columns // 4               # cells of a bar; of a table of more pages the last are shown
        for request in shown[:room]:
            known = len(request.output.prompt_token_ids) + len(request.output.token_ids)
            progress = f" {request.sequence.num_computed_tokens}/{known}" if request.state in ("prefill", "recomputed") else ""
            lead = f" {request.state + progress:<18}{known:>6} tokens "
            bar = mark(request.number, "|" * min(request.num_pages, size) or " ") + " " * (size - max(request.num_pages, 1))
            frame.append(f"{mark(request.number)}{lead}{bar} {tail(request.output.text, columns - len(lead) - size - 4)}")
        return frame + ([f"and {len(shown) - room} more"] if len(shown) > room else [])

    def head(self, size):
        """What the engine does, and its latest step: the tokens against the budget, as a bar of so many cells."""
        recorder, (now, *latest), (then, *first) = self.recorder, self.history[-1], self.history[0]
        tokens, num_bytes, seconds = (a - b for a, b in zip(latest, first))
        live, waiting, peak = len(recorder.live), len(recorder.scheduler.waiting), recorder.llm.device.memory_bandwidth
        step, budget = recorder.steps[-1], recorder.scheduler.max_num_batched_tokens
        decode = cdiv(step.decode * size, budget)
        prefill = min(cdiv(step.prefill * size, budget), size - decode)
        share = f"  {num_bytes / seconds / peak:.0%} of {peak / 1e9:.0f} GB/s" if peak and seconds else ""
        return [f"\x1b[1mtiny-vLLM\x1b[0m  step {len(recorder.steps)}  {live - waiting} running, {waiting} waiting, "
                f"{len(recorder.requests) - live} done  {tokens / max(now - then, 1e-3):.0f} tokens/s",
                f"[\x1b[42m{' ' * decode}\x1b[43m{' ' * prefill}\x1b[0m{' ' * (size - decode - prefill)}] "
                f"\x1b[32m{step.decode} decode\x1b[0m + \x1b[33m{step.prefill} prefill\x1b[0m of {budget} tokens{share}", ""]

    def grid(self, width, rows):
        """Lines of the page pool, a cell for a page, or for several: then it shows one that has a user, or is cached, if any is."""
        users, kept, pages = self.recorder.users, self.recorder.kept, self.recorder.allocator.num_blocks
        wide = 2 if 2 * pages <= width * rows else 1        # columns of a cell
        each, cells = cdiv(pages, width * rows), []
        for first in range(0, pages, each):
            group = range(first, min(first + each, pages))
            numbers = max((users.get(page, []) for page in group), key=len)
            sign = "+" if any(page in kept for page in group) else "."
            cells.append(mark(numbers[0], str(min(len(numbers), 9)) if len(numbers) > 1 else "", wide) if numbers else sign.ljust(wide))
        note = (f"{sum(map(bool, users.values()))} of {pages} pages in use, {len(self.recorder.shared)} shared, {len(kept)} cached"
                + (f"; {each} pages a cell" if each > 1 else ""))
        return [note, *("".join(cells[i:i + width // wide]) for i in range(0, len(cells), width // wide))]


# ======================================================================================================================
# The page of --trace FILE.html
# ======================================================================================================================
PAGE = r"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>tiny-vLLM: a run</title>
<style>
:root { color-scheme: light dark; --back: #fbfaf7; --card: #fff; --ink: #22262c; --soft: #667080; --line: #d9dce1; --warn: #c2410c; --mark: #1d4ed8 }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171c; --card: #1c2027; --ink: #e6e8ec; --soft: #98a1ae; --line: #3a424e; --warn: #fb923c; --mark: #7aa2ff } }
body { margin: 0 auto; max-width: 1180px; padding: 20px; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 17px; margin: 0 } p { margin: 2px 0 10px; color: var(--soft) } p b { color: var(--ink) }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; margin: 14px 0 }
#bar { position: sticky; top: 0; z-index: 1 } #bar input { width: 100%; margin: 0; accent-color: var(--mark) }
i { font: 12px/24px system-ui; text-align: center; color: #10131a; background: var(--c) } .legend { display: flex; flex-wrap: wrap; gap: 4px 18px }
.legend i { display: inline-block; width: 28px; height: 24px; vertical-align: middle; margin-right: 6px }
#time { position: relative; --left: 190px; cursor: pointer } .row { display: flex; height: 24px } .row.many { height: 5px; font-size: 0 }
.row > span { flex: 0 0 calc(var(--left) - 8px); margin-right: 8px; overflow: hidden; white-space: nowrap; font: 12px/24px system-ui }
.row > span i { display: inline-block; width: 26px; line-height: 18px; margin-right: 6px } .many > span { visibility: hidden }
.strip { height: 54px; margin-top: 12px } .strip.row > span { white-space: normal; line-height: 18px }
.row div, .row svg { flex: 1; position: relative; min-width: 0; height: 100% } .row div i { position: absolute; top: 8%; height: 84%; min-width: 1px }
#cursor { position: absolute; top: 0; bottom: 0; min-width: 2px; outline: 2px solid var(--mark); pointer-events: none }
i.prefill { box-shadow: inset -1px 0 var(--card) } i.decode { opacity: .5 }
i.recomputed { background: repeating-linear-gradient(135deg, var(--c) 0 4px, var(--warn) 4px 6px) }
i.queued, i.preempted { background: linear-gradient(90deg, var(--soft) 60%, transparent 0) 0 50% / 6px 2px repeat-x }
i.preempted { background-image: linear-gradient(90deg, var(--warn) 60%, transparent 0) }
#map { display: flex; flex-wrap: wrap; gap: 2px }
i.page { position: relative; width: 34px; height: 32px; line-height: 38px; border-radius: 3px; box-shadow: inset 0 0 0 1px var(--line) }
.page::before { content: attr(data-page); position: absolute; left: 3px; top: 1px; font: 9px/11px system-ui }
.many .page { width: 10px; height: 10px; font-size: 0 } .many .page::before { display: none } i.free { color: var(--soft) }
i.cached { color: var(--ink); background: repeating-linear-gradient(135deg, var(--c) 0 2px, transparent 2px 6px) }
i.page.shared, .table i.shared { box-shadow: inset 0 0 0 2px var(--ink) }
.table { display: flex; gap: 10px } .table span { flex: 0 0 260px } .table div { display: flex; flex-wrap: wrap; gap: 2px; padding: 2px 0 }
.table i { padding: 0 5px; min-width: 18px; line-height: 20px; border-radius: 3px }
</style></head><body>
<h1>One run of tiny-vLLM, step by step</h1><p id="facts"></p>
<section id="bar"><input id="slider" type="range" min="0" aria-label="step"><span id="now"></span></section>
<section><h2>Who computes what, and when</h2><p>A row is a <b>request</b>, a column a <b>step</b>: one pass of the model over tokens of many
requests. A prompt is read in one step or a few (<b>prefill</b>); then each step brings one token of the answer (<b>decode</b>). A request that
ends makes room for the next at once. Click on a step to see it below.</p>
<p class="legend" style="--c: #5b9bea"><span><i class="prefill"></i>prefill</span><span><i class="decode"></i>decode</span>
<span><i class="queued"></i>queued</span>
<span><i class="preempted"></i>preempted: its pages were taken</span><span><i class="recomputed"></i>computed again</span></p>
<div id="time"></div></section>
<section><h2>Where keys and values live: the page pool</h2><p>The model remembers each token as a key and a value. They lie in <b>pages</b> of
<span id="size"></span> tokens, anywhere in memory. A cell is a page, with its number above, and its owner's colour and number. Requests that
begin alike <b>share</b> pages; a page that nobody needs stays <b>cached</b> until its room is wanted. <b id="pool"></b></p>
<p class="legend" id="states"></p><div class="pages" id="map"></div></section>
<section><h2>Block tables: which page comes next?</h2><p>This list is all that keeps a text together: the numbers of its pages, first tokens first.
Framed pages have several users.</p><div id="tables"></div></section>
<script id="data" type="application/json">@DATA@</script>
<script>
"use strict";
const $ = id => document.getElementById(id), D = JSON.parse($("data").textContent), N = D.steps.length, R = D.requests;
const HUES = ["#5b9bea", "#f0a04b", "#4fb57c", "#e578a5", "#d8bb3a", "#a184e6", "#3bb4c1", "#e07563", "#9bbd4a", "#bd9272"];
const hue = r => HUES[(r - 1) % HUES.length];
let step = 0, applied = -1, users, cached, tables;

function make(tag, kind, text, style, ...children) {
  const element = document.createElement(tag);
  element.className = kind; element.textContent = text; element.style.cssText = style; element.append(...children); return element;
}
function cell(owners, kept, page) {                     // a page of the pool
  const kind = owners.length > 1 ? "shared" : owners.length ? "used" : kept ? "cached" : "free";
  const stripes = owners.map((r, i) => `${hue(r)} ${100 * i / owners.length}% ${100 * (i + 1) / owners.length}%`).join(", ");
  const element = make("i", "page " + kind, owners.length > 1 ? "\u00d7" + owners.length : owners[0] || "",
    owners.length ? `background: linear-gradient(90deg, ${stripes})` : kept ? `--c: ${hue(kept)}` : "");
  element.dataset.page = page;
  element.title = `page ${page}, reference count ${owners.length}: ` + {shared: `shared by requests ${owners.join(", ")}`,
    used: `used by request ${owners}`, cached: `filled by request ${kept}, free, and found again by whoever begins alike`, free: "free"}[kind];
  return element;
}
function apply(to) {                                    // block tables as they are in that step; N: after the last
  if (to < applied || applied < 0) { users = Array.from({length: D.num_blocks}, () => []); cached = []; tables = {}; applied = -1; }
  for (const [at, r, pages] of D.changes.filter(([at]) => at > applied && at <= to)) {
    if (typeof pages == "number") {
      tables[r].forEach((p, i) => { users[p] = users[p].filter(u => u != r); cached[p] = i < -1 - pages && r; });
      delete tables[r];
    } else { tables[r] = (tables[r] || []).concat(pages); pages.forEach(p => users[p].push(r)); }
  }
  applied = to;
}
function strip(unit, tallest, ...parts) {               // stacked bars, one for each step; parts: [colour, name, its value in a step]
  const low = (s, i) => parts.slice(0, i).reduce((sum, part) => sum + part[2](s), 0) / tallest;
  const paths = parts.map(([color, , value], i) => `<path fill="${color}" d="` +
    D.steps.map((s, x) => `M${x},${1 - low(s, i)}h1v${-value(s) / tallest}h-1z`).join("") + `"/>`);
  const names = parts.flatMap(([color, name]) => [make("b", "", "\u25a0 ", `color: ${color}`), name + " "]);
  const row = make("div", "row strip", "", "", make("span", "", "", "", ...names, unit));
  row.insertAdjacentHTML("beforeend", `<svg viewBox="0 0 ${N} 1" preserveAspectRatio="none">${paths.join("")}</svg>`); return row;
}
function timeline() {
  $("time").append(...R.map((request, i) => make("div", R.length > 40 ? "row many" : "row", "", `--c: ${hue(i + 1)}`,
    make("span", "", "", "", make("i", "", i + 1, ""), request.text),
    make("div", "", "", "", ...request.segments.filter(([, first, last]) => last >= first).map(([kind, first, last]) =>
      make("i", kind, "", `left: ${100 * first / N}%; width: ${100 * (last - first + 1) / N}%`))))),
    strip("tokens", D.steps.reduce((most, s) => Math.max(most, s[2] + s[3]), 1),
      [HUES[0], "decode", s => s[3]], [HUES[1], "prefill", s => s[2]]),
    strip("pages", D.num_blocks, [HUES[2], "own", s => s[4] - s[5]], ["var(--ink)", "shared", s => s[5]], ["var(--line)", "cached", s => s[6]]),
    Object.assign(make("div", "", "", ""), {id: "cursor"}));
}
function go(to) {
  step = Math.max(0, Math.min(N, +to || 0)); $("slider").value = step; apply(step);
  $("cursor").style.cssText = `left: calc(var(--left) + (100% - var(--left)) * ${step / (N || 1)}); width: calc((100% - var(--left)) / ${N || 1})`;
  const s = D.steps[step], shown = Math.min(D.num_blocks, 5000);
  const [used, shared, kept] = s ? s.slice(4) : [0, 0, users.filter((u, p) => cached[p]).length];
  $("now").textContent = !s ? "After the last step: every page has been given back." :
    `Step ${step + 1} of ${N}: ${s[3]} decode + ${s[2]} prefill tokens of at most ${D.budget}, ${((s[1] - s[0]) / 1000).toFixed(2)} ms, ` +
    `${(s[0] / 1e6).toFixed(3)} s after the start`;
  $("pool").textContent = `Now ${used} of ${D.num_blocks} pages are in use, ${shared} of them shared, and ${kept} are cached.` +
    (shown < D.num_blocks ? ` The first ${shown} are drawn.` : "");
  $("map").replaceChildren(...users.slice(0, shown).map((u, p) => cell(u, cached[p], p)));
  $("tables").replaceChildren(...Object.keys(tables).slice(0, 60).map(r => {
    const [kind] = R[r - 1].segments.find(([, first, last]) => first <= step && step <= last) || ["has ended, seen a step late"];
    return make("div", "table", "", `--c: ${hue(r)}`, make("span", "", `request ${r}: ${kind}`, ""),
      make("div", "", "", "", ...tables[r].map(p => make("i", users[p].length > 1 ? "shared" : "", p, ""))));
  }));
}
$("facts").textContent = `${D.num_requests} requests, ${R.reduce((n, r) => n + r.new, 0)} new tokens, ${D.num_steps} steps, ` +
  `a pool of ${D.num_blocks} pages of ${D.block_size} tokens, on ${D.device}.` +
  (N < D.num_steps || R.length < D.num_requests ? ` Shown are ${N} steps and ${R.length} requests.` : "");
$("size").textContent = D.block_size; $("slider").max = N; $("map").classList.toggle("many", D.num_blocks > 600);
for (const [name, ...page] of [["used by request 1", [1], 0, 7], ["shared by two: its reference count is 2", [1, 2], 0, 8],
    ["cached, filled by 3", [], 3, 9], ["free", [], 0, 10]])
  $("states").append(make("span", "", "", "", cell(...page), name));
$("slider").oninput = event => go(event.target.value);
$("time").onclick = event => go(Math.floor((event.clientX - $("time").getBoundingClientRect().x - 190) / ($("time").clientWidth - 190) * N));
timeline(); go(location.hash.slice(1));
</script></body></html>
"""
