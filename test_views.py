"""What can be seen of a run: the views."""
import contextlib
import fcntl
import itertools
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import pytest

import tinyvllm
import views
from device import CpuDevice
from reference import PARROT, RNG, ROOT
from test_tinyvllm import (TEXTS, assert_refused, chats, recitation, run_main, run_process,
                           start)
from tinyvllm import (LLM, BlockAllocator, RequestOutput, SamplingParams,
                      Scheduler, Sequence)


# --------------------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------------------
QUESTIONS = ["What is RoPE?", "What is PagedAttention?", "What is a KV cache?", "Recite Basho's frog.",
             "What is RMSNorm?", "Who are you?"]


def pool_of(allocator):
    """(reference count of each page, cached pages without users), now."""
    return list(allocator.ref_counts), {page for page in allocator.free if page in allocator.chains}


def looked_inside(llm):
    """looking_inside() with a recorder and no view."""
    return views.looking_inside(llm, SimpleNamespace(watch=False, trace=None, stats=False))


def watched_run(**options):
    """(recorder, outputs, pool at each step's launch) of six requests.

    The pool is too small for all six at once.
    """
    llm = LLM(PARROT, num_blocks=14, max_num_batched_tokens=40, **options)
    pools = []

    def told(event, what):
        if event == "launch":
            pools.append(pool_of(llm.engine.scheduler.allocator))

    llm.engine.observers.append(SimpleNamespace(told=told))
    system = {"role": "system", "content": "You are a helpful assistant."}
    prompts = [llm.tokenizer.chat([system, {"role": "user", "content": question}]) for question in QUESTIONS]
    with looked_inside(llm) as recorder:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=36))
    for question, output in zip(QUESTIONS, outputs):
        assert recitation(question).startswith(output.text)
    assert len(llm.engine.observers) == 1
    return recorder, outputs, pools


@pytest.fixture(scope="module")
def watched():
    return watched_run()


def assert_accounts(recorder):
    """A request's segments lie end to end, so the parts of its account add up to its time.

    Every token is in exactly one step.
    """
    for request in recorder.requests:
        o = request.output
        segments = request.segments
        ends = [o.arrival_time, *(s.end for s in segments)]
        assert [s.begin for s in segments] == ends[:-1] and ends == sorted(ends)
        assert min(o.account.values()) >= 0
        assert math.isclose(sum(o.account.values()), ends[-1] - o.arrival_time, abs_tol=1e-9)
        steps = [step for s in segments if s.count for step in range(s.first, s.last + 1)]
        assert len(steps) == len(set(steps)) and sum(s.sampled for s in segments) == len(o.token_ids)
        if o.finish_reason in (None, "abort"):
            continue
        assert all(s.count == s.sampled == s.last - s.first + 1 for s in segments if s.kind == "decode")
        assert ends[-1] == o.finish_time and o.num_cached_tokens < len(o.prompt_token_ids)
        prefilled = sum(s.count for s in segments if s.kind == "prefill")
        assert prefilled + o.num_cached_tokens == len(o.prompt_token_ids) or o.num_preemptions


@pytest.mark.parametrize("overlap, simulated", [(True, True), (True, False), (False, True)])
def test_views_account(watched, monkeypatch, overlap, simulated):
    """All of a request's time is accounted for. Only a preempted request has a part "preempted"."""
    if (overlap, simulated) != (True, True):
        if not simulated:                       # as on a GPU: a step takes time after its launch
            monkeypatch.setattr(CpuDevice, "is_simulated", False)
        watched = watched_run(overlap=overlap)
    recorder, outputs, _ = watched
    assert_accounts(recorder)
    assert [r.output for r in recorder.requests] == outputs
    assert all(r.segments[-1].end == r.output.finish_time for r in recorder.requests)
    assert [o.account["preempted"] > 0 for o in outputs] == [o.num_preemptions > 0 for o in outputs]
    assert any(o.num_preemptions for o in outputs)
    assert any(o.account["recomputed"] for o in outputs) and all(o.account["prefill"] for o in outputs)
    # Unless simulated, views count the slow launch to the step before: nothing is stalled.
    assert any(o.account["stalled"] for o in outputs) or not simulated


def test_views_stalled():
    """Decode steps of 1 s, and three of 5, 1 and 0.5 s beside others' prefill: 4 s of stall."""
    sequence = SimpleNamespace(block_table=[], output=RequestOutput([1], arrival_time=10.0))
    request = views.Request(1, sequence, 0)
    request.wait(2, 11.0)
    request.spend("prefill", 2, 2, 13.0, 0, 1)
    request.spend("decode", 3, 8, 22.5, 1, 6)
    request.alone = [1.0, 1.0, 1.0]
    request.beside = [5.0, 1.0, 0.5]
    assert request.account() == {"queued": 1, "prefill": 2, "decode": 5.5, "stalled": 4, "preempted": 0,
                                 "recomputed": 0}


def embedded(page):
    """The data that an HTML page holds."""
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])


def replayed(data):
    """[(block tables, reference counts, cached pages without users)] of each step, and of the end.

    Computed from the changes of the block tables that a page holds.
    """
    states = []
    tables = {}
    cached = set()
    changes = list(data["changes"])
    for step in range(len(data["steps"]) + 1):
        while changes and changes[0][0] <= step:
            _, request, pages = changes.pop(0)
            if isinstance(pages, int):      # given back: all pages but the last `pages + 1` stay cached
                given_back = tables.pop(request)
                cached = cached - set(given_back) | set(given_back[:-1 - pages])
            else:
                tables[request] = tables.get(request, []) + pages
        counts = [sum(page in table for table in tables.values()) for page in range(data["num_blocks"])]
        states.append((dict(tables), counts, {page for page in cached if not counts[page]}))
    assert not changes
    return states


def assert_pools(data, pools):
    """The changes of the block tables give each step's reference counts and cached pages."""
    states = replayed(data)[:-1]
    assert [(counts, kept) for _, counts, kept in states] == pools[data["first_step"]:]
    for (_, counts, kept), step in zip(states, data["steps"]):
        used = sum(count > 0 for count in counts)
        shared = sum(count > 1 for count in counts)
        assert step[4:] == [used, shared, len(kept)]


def assert_pools_of_a_full_run(data, pools):
    """Pages were shared, and all were in use at once. In the end all are given back."""
    assert_pools(data, pools)
    assert max(step[5] for step in data["steps"]) > 0
    assert max(step[4] for step in data["steps"]) == data["num_blocks"]
    assert replayed(data)[-1][0] == {}


def test_views_pages(watched):
    assert_pools_of_a_full_run(embedded(views.html_trace(watched[0])), watched[2])


class RandomRun:
    """Requests that often begin alike come, are preempted, end and are given up at random.

    There is no model: every sampled token is 1. `tell` gets the events that an engine would tell.
    """
    NUM_BLOCKS = 20

    def __init__(self, seed):
        self.rng = RNG(seed)
        self.scheduler = Scheduler(BlockAllocator(self.NUM_BLOCKS, 4), 24, 8)
        self.pools = []         # pool_of the allocator, as each step was launched
        device = SimpleNamespace(name="none", is_simulated=False, memory_bandwidth=None)
        engine = SimpleNamespace(scheduler=self.scheduler, in_flight=[], sequences={})
        tokenizer = SimpleNamespace(token_bytes=lambda token: b"a", decode=lambda tokens: "a")
        self.llm = SimpleNamespace(device=device, engine=engine, tokenizer=tokenizer)

    def end(self, sequence, reason, tell):
        sequence.output.finish_reason = reason
        sequence.output.finish_time = views.time.perf_counter()
        self.scheduler.remove(sequence)
        tell("ended", sequence)

    def come_or_go(self, tell):
        """Now and then a request arrives, or is given up while it runs or waits."""
        running = self.scheduler.running
        waiting = self.scheduler.waiting
        if self.rng.random() < 0.3 and len(running) + len(waiting) < 12:
            prompt = [1] * int(self.rng.integers(1, 30))
            output = RequestOutput(prompt, arrival_time=views.time.perf_counter())
            max_len = len(prompt) + int(self.rng.integers(1, 40))
            waiting.append(Sequence(SamplingParams(), output, None, max_len))
        elif self.rng.random() < 0.05 and running:
            self.end(running[int(self.rng.integers(len(running)))], "abort", tell)
        elif self.rng.random() < 0.05 and waiting:
            self.end(waiting[-1], "abort", tell)

    def step(self, tell):
        """A step as the engine takes it."""
        tell("schedule", None)
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return
        tell("launch", scheduled)
        self.pools.append(pool_of(self.scheduler.allocator))
        for sequence, count in scheduled:
            sequence.num_computed_tokens += count
            self.scheduler.register_full_blocks(sequence)
        for event in "launched", "wait", "read":
            tell(event, None)
        sampled = [sequence for sequence, _ in scheduled if sequence.remaining == 0]
        for sequence in sampled:
            sequence.token_ids.append(1)
            sequence.output.token_ids.append(1)
            if sequence.is_complete:
                self.end(sequence, "length", tell)
        tell("done", sampled)


@pytest.mark.parametrize("seed", range(3))
def test_views_random_events(seed):
    """Accounts and pages are right, whatever happens to the requests."""
    run = RandomRun(seed)
    recorder = views.Recorder(run.llm)
    for _ in range(400):
        run.come_or_go(recorder.told)
        run.step(recorder.told)
    for sequence in [*run.scheduler.running, *run.scheduler.waiting]:
        run.end(sequence, "abort", recorder.told)
    recorder.close()
    assert_accounts(recorder)
    assert_pools_of_a_full_run(embedded(views.html_trace(recorder, max_requests=1000)), run.pools)
    kinds = {s.kind for request in recorder.requests for s in request.segments}
    assert {"queued", "prefill", "decode", "preempted", "recomputed"} == kinds


def forgetting_run(monkeypatch, seed, keep, num_iterations, look):
    """(recorder that keeps all, recorder that forgets, pool at each step's launch) of a RandomRun.

    The clock counts events, so that both recorders see the same times. look(recorder that forgets,
    pools so far) is called after each event.
    """
    clock = [0.0]
    monkeypatch.setattr(views, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    run = RandomRun(seed)
    whole = views.Recorder(run.llm)
    recorder = views.Recorder(run.llm, keep)

    def tell(event, what):
        clock[0] += 1
        whole.told(event, what)
        recorder.told(event, what)
        look(recorder, run.pools)

    for _ in range(num_iterations):
        run.come_or_go(tell)
        run.step(tell)
    return whole, recorder, run.pools


@pytest.mark.parametrize("keep, max_steps", [(0, 999), (1, 999), (7, 999), (7, 20), (9999, 9999)])
def test_views_forgotten_requests(monkeypatch, keep, max_steps):
    """A Recorder that forgets remembers the same facts as a Recorder that keeps all."""
    monkeypatch.setattr(views, "MAX_STEPS", max_steps)
    num_looks = itertools.count()

    def look(recorder, pools):
        are_launched = len(pools) == recorder.num_steps
        if next(num_looks) % 23 == 0 and are_launched and keep < 100:
            assert_pools(embedded(views.html_trace(recorder, max_requests=10**6)), pools)

    whole, recorder, pools = forgetting_run(monkeypatch, 5, keep, 900, look)
    ended = [request.number for request in whole.finished]
    latest = ended[-keep:] if keep else []
    running = [request.number for request in whole.live.values()]
    assert running and [request.number for request in recorder.finished] == latest
    whole.close()
    recorder.close()
    assert [request.number for request in recorder.requests] == sorted(latest + running)
    assert not recorder.live
    known = {request.number: request for request in whole.requests}
    for request in recorder.requests:
        assert request.account() == known[request.number].account() == request.output.account
        assert request.segments == known[request.number].segments
    lines = views.account_table(recorder.requests)
    assert set(lines) <= set(views.account_table(whole.requests))
    assert len(lines) == len(recorder.requests) + 8
    assert_same_page(whole, recorder, pools, keep, max_steps)
    assert_same_trace(whole, recorder, pools)


def assert_same_page(whole, recorder, pools, keep, max_steps):
    """The page of the remembered steps: numbers, segments, block tables and cached pages."""
    data = embedded(views.html_trace(recorder, max_requests=10**6))
    wanted = embedded(views.html_trace(whole, max_requests=10**6))
    first = data["first_step"]
    assert first == len(pools) - len(data["steps"]) and (first > 0) == (keep < 9999)
    num_tokens = sum(len(request.output.token_ids) for request in whole.requests)
    assert data["num_requests"] == len(whole.requests) and data["num_tokens"] == num_tokens
    assert data["num_steps"] == len(pools)
    assert data["steps"] == wanted["steps"][first:] and len(data["steps"]) <= max_steps
    for request in data["requests"]:
        all_segments = wanted["requests"][request["number"] - 1]["segments"]
        shown = [(kind, start - first, last - first) for kind, start, last in all_segments]
        shown = [[kind, max(start, 0), last] for kind, start, last in shown if last >= -1]
        assert request["segments"] == shown
    assert_pools(data, pools)
    assert replayed(data) == replayed(wanted)[first:]


def assert_same_trace(whole, recorder, pools):
    """The Chrome trace of the remembered requests and steps."""
    events = views.chrome_trace(recorder)["traceEvents"]
    all_events = views.chrome_trace(whole)["traceEvents"]
    numbers = {request.number for request in recorder.requests}
    tracks = [event for event in events if event["pid"] == 2 and event["tid"]]
    assert tracks == [event for event in all_events if event["pid"] == 2 and event["tid"] in numbers]
    steps = {event["args"]["step"] for event in events if event["pid"] == 1 and event["ph"] == "X"}
    assert set(range(len(pools) - len(recorder.steps), len(pools))) <= steps


def num_remembered(recorder):
    """Entries of all containers of a Recorder, and of its requests' containers."""
    total = sum(len(value) for value in vars(recorder).values() if hasattr(value, "__len__"))
    total += sum(len(pages) for pages in [*recorder.old_tables.values(), *recorder.users.values()])
    total += sum(len(pages) for _, _, pages in recorder.changes if isinstance(pages, list))
    for request in {*recorder.requests, *recorder.live.values(), *recorder.finished}:
        total += len(request.segments) + len(request.alone) + len(request.beside)
    return total


@pytest.mark.parametrize("max_steps", [9999, 40])
def test_views_memory_is_bounded(monkeypatch, max_steps):
    """After thousands of requests, a Recorder that forgets holds no more than after some hundred.

    The view on a terminal can be drawn at any time.
    """
    monkeypatch.setattr(views, "MAX_STEPS", max_steps)
    sizes = []

    def look(recorder, _):
        sizes.append(num_remembered(recorder))
        if len(sizes) % 500 == 0:
            watch = views.Watch(recorder)
            watch.history.append((0.0, 0, 0, 0))
            watch.history.append((1.0, recorder.num_tokens, 0, 0))
            head, _, _, note, *_ = watch.frame(100, 24)
            assert f"step {recorder.num_steps} " in head and f"{recorder.num_tokens:.0f} tokens/s" in head
            assert f"{recorder.num_requests - len(recorder.live)} done" in head
            assert f"of {RandomRun.NUM_BLOCKS} pages in use" in note

    whole, recorder, _ = forgetting_run(monkeypatch, 6, 10, 9_000, look)
    assert recorder.num_requests > 2000 and len(whole.steps) > 8000
    assert max(sizes) < 1.3 * max(sizes[:len(sizes) // 5])
    assert num_remembered(whole) > 20 * max(sizes)


def test_views_traces(watched):
    """The Chrome trace is valid; a track ends when its request ends. The page holds the same."""
    recorder, outputs, _ = watched
    events = json.loads(json.dumps(views.chrome_trace(recorder)))["traceEvents"]
    data = embedded(views.html_trace(recorder))
    for event in events:
        assert event["ph"] in "MXC" and event["ts"] >= 0 and event.get("dur", 0) >= 0
        assert {"name", "pid", "tid", "args"} <= event.keys()
    engine = [event for event in events if event["ph"] == "X" and event["pid"] == 1]
    assert {event["name"] for event in engine} == {"schedule", "launch", "wait", "read"}
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in itertools.pairwise(engine))
    reads = [event["args"]["step"] for event in engine if event["name"] == "read"]
    assert max(reads) >= data["num_steps"] - 2                  # the very last step may be a surplus
    for number, (output, request) in enumerate(zip(outputs, data["requests"]), 1):
        track = [event for event in events
                 if event["ph"] == "X" and (event["pid"], event["tid"]) == (2, number)]
        end = track[-1]["ts"] + track[-1]["dur"]
        assert abs(track[0]["ts"] / 1e6 - (output.arrival_time - recorder.start)) < 1e-6
        assert abs(end / 1e6 - (output.finish_time - recorder.start)) < 1e-6
        assert sum(event["args"]["new_tokens"] for event in track) == len(output.token_ids) == request["new"]
        assert output.text.startswith(request["text"])
        assert request["prompt"] == QUESTIONS[number - 1]
        assert {"name": f"{'ABCDEF'[number - 1]}: {request['prompt']}"} in [event["args"] for event in events]
        assert request["segments"] == [
            [event["name"], event["args"]["first_step"], event["args"]["last_step"]] for event in track]
    for name, keys, columns in (("pages", ["used", "shared", "cached"], slice(4, 7)),
                                ("tokens of the step", ["prefill", "decode"], slice(2, 4))):
        counters = [[event["args"][key] for key in keys] for event in events if event["name"] == name]
        assert counters[:-1] == [step[columns] for step in data["steps"]] and sum(counters[-1][:2]) == 0
    for _, _, prefill, decode, used, _, cached in data["steps"]:
        assert decode + prefill <= data["budget"] and used + cached <= data["num_blocks"]


def test_views_page_of_a_long_run_is_cut(watched):
    """The page holds the first steps and requests, and the counts of all.

    A text cannot end the script that holds the text.
    """
    recorder = watched[0]
    whole = embedded(views.html_trace(recorder))
    output = recorder.requests[0].output
    text = output.text
    output.text = "</script><b>"
    data = embedded(views.html_trace(recorder, max_steps=50, max_requests=3))
    output.text = text
    assert data["requests"][0]["text"] == "</script><b>"
    assert data["steps"] == whole["steps"][:50] and data["num_steps"] == len(whole["steps"])
    assert len(data["requests"]) == 3
    assert all(last < 50 for request in data["requests"] for _, _, last in request["segments"])
    assert data["changes"] == [change for change in whole["changes"] if change[0] <= 50 and change[1] <= 3]


def in_browser(file, step, folder):
    """The page as a browser shows it, at the step that the address names."""
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}",
               "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", f"file://{file}#{step}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in result.stderr and "Uncaught" not in result.stderr
    return result.stdout


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium")
@pytest.mark.parametrize("step", [30, None])
def test_views_page_in_a_browser(watched, tmp_path, step):
    """The page loads without an error, with no steps too, and shows the pool of its step. Of a large
    pool, only the first pages are shown."""
    recorder = watched[0] if step else views.Recorder(LLM(PARROT, num_blocks=1000))
    (tmp_path / "run.html").write_text(views.html_trace(recorder), "utf-8")
    page = in_browser(tmp_path / "run.html", step, tmp_path)
    pool = page[page.index('id="map"'):page.index("Block tables")]
    counts = [int(count) for count in re.findall(r"reference count (\d+)", pool)]
    if not step:
        assert counts == [0] * 64 and "0 requests" in page and "The last 936 were never used" in page
        return
    data = embedded(page)
    _, _, prefill, decode, _, shared, cached = data["steps"][step]
    assert counts == watched[2][step][0]
    assert pool.count('class="page cached"') == cached and pool.count('class="page shared"') == shared
    assert f"Step {step + 1} of {len(data['steps'])}: {decode} decode + {prefill} prefill tokens" in page
    table = page[page.index('id="tables"'):page.index('<script id="data"')]
    named = re.findall(r"request [A-F]: (?:decode|prefill|has ended)", table)
    assert len(re.findall(r"<i ", table)) == sum(counts)
    assert table.count('class="table"') == len(named) > 2
    assert page.count('class="preempted"') > 1
    assert all(f"</i>{question}</span>" in page for question in QUESTIONS)
    assert page[page.index('id="time"'):].count('class="decode"') >= 6


# --------------------------------------------------------------------------------------------------
# A terminal
# --------------------------------------------------------------------------------------------------
def on_terminal(columns, lines, *args, act=None):
    """(exit code, text) that the command line sends to a terminal of this size.

    act(process, resize) is called once, when the run is under way. Always in the simulator: a GPU is
    done before the second picture.
    """
    master, slave = pty.openpty()

    def resize(columns, lines):
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    resize(columns, lines)
    command = [sys.executable, ROOT / "tinyvllm.py", "--model", PARROT, "--device", "cpu", *args]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave,
                               env=os.environ | {"PYTHONIOENCODING": "utf-8"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    sent = b""
    with contextlib.suppress(OSError):      # a terminal's end of file: its other end is closed, reading fails
        while True:
            if act and b"tokens/s" in sent:
                act(process, resize)
                act = None
            if process.poll() is not None and slave:
                os.close(slave)
                slave = None
            readable, _, _ = select.select([master], [], [], 0.1)
            if readable:
                sent += os.read(master, 65536)
    os.close(master)
    return process.wait(), sent.decode().replace("\r\n", "\n")


def plain(text):
    """The text without the codes that move the cursor and set colours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


ENTER = "\x1b[?1049h"
LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"
POOL = ["--num-blocks", "12", "--max-num-batched-tokens", "40"]


def test_views_watch():
    """--watch draws pages, requests and steps, no line too long, and leaves.

    Then the terminal holds the answers and nothing else.
    """
    code, sent = on_terminal(80, 24, "--watch", *POOL, *QUESTIONS[:3], "")
    before, view = sent.split(ENTER)
    view, after = view.split(LEAVE)
    errors = [line for line in after.splitlines() if line.startswith("tinyvllm: ")]
    assert code == 2 and "\x1b" not in before + after
    assert errors == ["tinyvllm: '': the prompt is empty: expected some text"]      # said after the view
    assert all(f"> {question}\n{recitation(question)}\n" in after for question in QUESTIONS[:3])
    frames = [plain(frame).splitlines() for frame in view.split("\x1b[H")[1:]]
    assert len(frames) > 5
    assert all(len(frame) <= 24 and max(len(line) for line in frame) <= 80 for frame in frames)
    text = "\n".join("\n".join(frame) for frame in frames)
    for part in ("of 40 tokens", "of 12 pages in use", "A decode", "C preempted", "prefill",
                 "2 running, 1 waiting, 0 done", "tokens/s", "A B "):
        assert part in text, part
    cells = next(line for line in frames[-1] if re.fullmatch(r"([A-C1-9+.] ){12}", line))
    assert f"{sum(c.isalpha() for c in cells)} of 12 pages in use" in "\n".join(frames[-1])


def interrupt(process, resize):
    process.send_signal(signal.SIGINT)


def terminate(process, resize):
    process.send_signal(signal.SIGTERM)


def shrink_for_a_moment(process, resize):
    resize(59, 24)
    time.sleep(0.3)
    resize(80, 24)


@pytest.mark.parametrize("lines, act, size", [
    (15, None, "80 columns and 15 lines"), (24, shrink_for_a_moment, "59 columns and 24 lines"),
    (24, interrupt, ""), (24, terminate, "")],
    ids=["too small", "too small for a moment", "Ctrl-C", "SIGTERM"])
def test_views_watch_in_trouble(lines, act, size):
    """Too small a terminal gets one line and the answer. A small moment interrupts the view, and
    Ctrl-C leaves a restored terminal."""
    code, sent = on_terminal(80, lines, "--watch", "Recite Ozymandias.", act=act)
    view, _, after = sent.rpartition(LEAVE)
    assert "\x1b" not in after and "Traceback" not in sent
    assert code == {interrupt: 130, terminate: 143}.get(act, 0)
    why = f"the terminal has {size}, 60 and 16 are needed"
    if act == shrink_for_a_moment:
        _, *views_after = view.split(why[:59])
        assert "--watch" not in after and "pages in use" in views_after[-1]
    elif size:
        assert f"tiny-vLLM: --watch is off: {why}\n" in after
    assert (view == "") == (lines == 15) and (recitation("Recite Ozymandias.") in after) == (code == 0)


def test_views_watch_loses_its_terminal(tmp_path):
    """The run goes on: the answer and the trace are whole."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, ROOT / "tinyvllm.py", "--model", PARROT, "--device", "cpu", "--watch",
               "--trace", tmp_path / "run.json", QUESTIONS[0]]
    with open(tmp_path / "answer", "w") as answer:
        process = subprocess.Popen(command, stdout=answer, stderr=slave,
                                   env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    os.close(slave)
    while b"tokens/s" not in os.read(master, 65536):
        pass
    os.close(master)
    process.wait(60)
    assert (tmp_path / "answer").read_text("utf-8") == recitation(QUESTIONS[0]) + "\n"
    assert json.loads((tmp_path / "run.json").read_text("utf-8"))["traceEvents"]


def test_views_watch_wants_a_terminal():
    code, out, err = run_process("--watch", QUESTIONS[3])
    assert (code, out) == (0, recitation(QUESTIONS[3]) + "\n")
    assert err.count("--watch is off: stderr is no terminal\n") == 1 and "\x1b" not in err


def test_views_watch_many_pages_and_a_wild_text():
    """Several pages share a cell. Control characters stay out, and a wide text has its width."""
    recorder = views.Recorder(LLM(PARROT, num_blocks=5000))
    recorder.users = {77: [3], 4999: [1, 2]}
    recorder.shared = {4999}
    recorder.kept = {78, 200}
    recorder.highest = 4999
    note, *lines = views.Watch(recorder).grid(100, 7)
    assert note == "2 of 5000 pages in use, 1 shared, 2 cached; 8 pages a cell" and len(lines) == 7
    cells = plain("".join(lines))
    assert len(cells) == 625 and cells[9] == "C" and cells[25] == "+" and cells[-1] == "2"
    assert cells.count(".") == 622
    recorder.users = {77: [30]}
    recorder.highest = 200
    note, *lines = views.Watch(recorder).grid(100, 7)
    assert note == "1 of 5000 pages in use, 1 shared, 2 cached, 4799 never used"
    cells = plain("".join(lines))
    assert len(cells) == 402 and cells[154:158] == "AD+ " and cells[-2:] == "+ "
    assert views.tail("ab\x1b[2Jc\n", 4) == "2Jc " and views.tail("古池や", 5) == "池や"


@pytest.mark.parametrize("name, number", [("run.json", signal.SIGINT), ("run.html", signal.SIGTERM)])
def test_views_interrupted_run(tmp_path, name, number):
    """After Ctrl-C or SIGTERM the file is there and valid. The request's track ends with the run."""
    process = start("--trace", str(tmp_path / name), "--stats", "Recite The Raven.")
    process.stdout.read1(100)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    text = (tmp_path / name).read_text("utf-8")
    assert process.returncode == 128 + number and "Traceback" not in err.decode() and "decode" in err.decode()
    if name == "run.json":
        names = {event["name"] for event in json.loads(text)["traceEvents"]}
        assert {"prefill", "decode", "launch", "read"} <= names
    else:
        [request] = embedded(text)["requests"]
        assert [kind for kind, _, _ in request["segments"]] == ["queued", "prefill", "decode"]


@pytest.mark.parametrize("num_steps", [0, 1, 2, 9])
@pytest.mark.parametrize("overlap", [True, False])
def test_views_given_up_requests(num_steps, overlap):
    """The time of a request that is given up is accounted for, even if the request never ran, or
    nobody made a step for a while."""
    llm = LLM(PARROT, num_blocks=14, overlap=overlap)
    with looked_inside(llm) as recorder:
        outputs = llm.submit(chats(llm, TEXTS[:4]))
        for _ in range(num_steps):
            llm.engine.step()
        time.sleep(0.2)
        llm.abort(outputs)
        llm.generate([[4, 5]], SamplingParams(max_tokens=2))
        late = llm.submit(chats(llm, TEXTS[2:3]))
    assert_accounts(recorder)
    assert [r.output.finish_reason for r in recorder.requests] == ["abort"] * 4 + ["length"]
    assert not late[0].account and not recorder.live and not any(recorder.users.values())
    for output in outputs:
        seconds = output.finish_time - output.arrival_time
        assert seconds > 0.2 and math.isclose(sum(output.account.values()), seconds, abs_tol=1e-9)
        # The pool has room for two: the others never left the queue.
        assert (output.account["queued"] > 0.2) == (num_steps == 0 or output.account["prefill"] == 0)
    assert any(output.account["prefill"] for output in outputs) == (num_steps > 0)


@pytest.mark.parametrize("num_steps", [1, 2, 40])
def test_views_recorder_in_mid_run(num_steps):
    """A Recorder may come while requests run, wait again, or wait. Their accounts add up too."""
    llm = LLM(PARROT, num_blocks=9)
    outputs = llm.submit(chats(llm, TEXTS[:4]), SamplingParams(max_tokens=40))
    for _ in range(num_steps):
        llm.engine.step()
    pools = []
    watcher = SimpleNamespace(told=lambda event, what: event == "launch"
                              and pools.append(pool_of(llm.engine.scheduler.allocator)))
    llm.engine.observers.append(watcher)
    with looked_inside(llm) as recorder:
        outputs += llm.submit([[4, 5]], SamplingParams(max_tokens=2))
        for _ in llm.run(outputs):
            pass
    assert [r.output for r in recorder.requests] == outputs
    for output, (_, answer) in zip(outputs, TEXTS[:4]):
        assert answer.startswith(output.text) and output.account["decode"] > 0
    for output in outputs:
        seconds = output.finish_time - output.arrival_time
        assert math.isclose(sum(output.account.values()), seconds, abs_tol=1e-9)
    assert_pools(embedded(views.html_trace(recorder)), pools)


def interrupted_run(llm, at):
    """A run with an interruption where a signal is taken: after the call of number `at` inside the
    Recorder, or, for None, while the engine reads a step. Returns the number of calls.

    The run so far can be reported. The rest of the run is right, and so are all accounts.
    """
    calls = itertools.count(1)

    def after_call(frame, event, _):
        is_views = frame.f_code.co_filename == views.__file__
        if is_views and event in ("c_return", "return") and next(calls) == at:
            raise KeyboardInterrupt

    def told(event, what):
        sys.setprofile(after_call)
        try:
            views.Recorder.told(recorder, event, what)
        finally:
            sys.setprofile(None)

    def finish():
        while not all(output.finish_reason for output in outputs):
            llm.engine.step()
            if at is None and recorder.num_steps == 20:
                llm.engine.in_flight.append(None)           # fails when the step is read
        raise KeyboardInterrupt                             # there was no call of number `at`

    with looked_inside(llm) as recorder:
        recorder.told = told
        prompts = [llm.tokenizer.encode(question) for question in QUESTIONS[:3]]
        outputs = llm.submit(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
        with pytest.raises((KeyboardInterrupt, TypeError)):
            finish()
        assert replayed(embedded(views.html_trace(recorder)))
        with pytest.raises(KeyboardInterrupt):
            finish()
    for request in recorder.requests:
        o = request.output
        assert len(o.token_ids) == sum(s.sampled for s in request.segments) == 12
        assert math.isclose(sum(o.account.values()), o.finish_time - o.arrival_time, abs_tol=1e-9)
        assert min(o.account.values()) >= 0
    assert [step.number for step in recorder.steps] == list(range(recorder.num_steps))
    assert replayed(embedded(views.html_trace(recorder)))[-1][0] == {}
    times = [(event["ts"], event.get("dur", 0)) for event in views.chrome_trace(recorder)["traceEvents"]]
    assert min(min(time) for time in times) >= 0 and views.account_table(recorder.requests)
    return next(calls)


def test_views_interrupted_anywhere():
    llm = LLM(PARROT, num_blocks=4, max_num_batched_tokens=8, block_size=8)
    num_calls = interrupted_run(llm, None)
    for at in range(1, num_calls, num_calls // 7):
        interrupted_run(llm, at)


def test_views_stats():
    """The parts of a request add up to its wall time; the tokens agree with the last line."""
    code, _, err = run_process("--stats", "--num-blocks", "9", "--max-tokens", "40", *QUESTIONS[:3])
    lines = err.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:3] == ["req", "queued", "prefill"])
    names, *columns = zip(*[line.split() for line in lines[head + 1:head + 4]])
    rows = [[float(cell) for cell in row] for row in zip(*columns)]
    assert code == 0 and names == ("A", "B", "C")
    assert all(abs(sum(row[:6]) - row[6]) < 0.005 for row in rows) and rows[2][4] > 0
    prompt, cached, new = (int(sum(column)) for column in list(zip(*rows))[7:10])
    assert cached == 0 and f"{prompt} prompt tokens, {new} new" in lines[-1]
    assert [line.split(":")[0].strip() for line in lines[head + 4:-1]] == list(views.PARTS)


def test_views_stats_fit_80_columns():
    output = RequestOutput([1] * 131072, account=dict.fromkeys(views.PARTS, 1234.5678),
                           token_ids=[1] * 100000, num_cached_tokens=131056)
    lines = views.account_table([SimpleNamespace(number=9999, output=output)])
    assert max(map(len, lines)) == 80
    assert lines[2].split() == ["NTO", *["1234.56"] * 6, "7407.40", "131072", "131056", "100000"]


def test_views_on_a_full_disk(tmp_path):
    """The answer and the statistics are there. The exit code tells of the lost trace."""
    (tmp_path / "run.json").symlink_to("/dev/full")
    code, out, err = run_process("--stats", "--trace", str(tmp_path / "run.json"), QUESTIONS[0])
    assert code == 2 and out == recitation(QUESTIONS[0]) + "\n" and "Traceback" not in err
    assert f"tinyvllm: --trace: {tmp_path}/run.json is incomplete: No space left on device\n" in err
    assert "stalled:" in err and " new tokens" in err.splitlines()[-1]


def test_views_failing_observer(capsys):
    """An observer that fails is dropped, with a line. The run goes on."""
    llm = LLM(PARROT)
    llm.engine.observers.append(SimpleNamespace(told=lambda event, what: 1 // 0))
    assert llm.generate(QUESTIONS[0])[0].finish_reason
    assert capsys.readouterr().err.count("SimpleNamespace is off: ZeroDivisionError") == 1


@pytest.mark.parametrize("path, parts", [
    ("trace.txt", ["trace.txt", ".json or .html"]), ("none/trace.json", ["none/trace.json", "No such file"]),
    (".html", [".html", "Is a directory"])])
def test_views_refuse_a_bad_path(tmp_path, monkeypatch, path, parts):
    """The path is refused before the model is loaded, and the check leaves no file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".html").mkdir()
    assert_refused(run_main("--model", tmp_path, "--trace", path, "Hi"), "--trace", *parts)
    tinyvllm.check_writable("--trace", "new.json")
    assert [file.name for file in tmp_path.iterdir()] == [".html"]
