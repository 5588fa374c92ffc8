"""A Recorder that forgets."""
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

import views
from tinyvllm import BlockAllocator, RequestOutput, SamplingParams, Scheduler, Sequence


def embedded(page):
    """The data of a page."""
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])


def end(sequence, reason, scheduler):
    sequence.output.finish_reason = reason
    sequence.output.finish_time = views.time.perf_counter()
    scheduler.remove(sequence)


def come_or_go(rng, scheduler):
    """Now and then a request arrives, or is given up while it runs or waits."""
    if rng.random() < 0.3 and len(scheduler.running) + len(scheduler.waiting) < 12:
        output = RequestOutput([1] * int(rng.integers(1, 30)), arrival_time=views.time.perf_counter())
        length = len(output.prompt_token_ids) + int(rng.integers(1, 40))
        scheduler.waiting.append(Sequence(SamplingParams(), output, None, length))
    elif rng.random() < 0.05 and scheduler.running:
        end(scheduler.running[int(rng.integers(len(scheduler.running)))], "abort", scheduler)
    elif rng.random() < 0.05 and scheduler.waiting:
        end(scheduler.waiting[-1], "abort", scheduler)


def forgetting_run(monkeypatch, seed, keep, num_iterations, look):
    """(recorder that keeps all, recorder that forgets, [(reference counts, cached pages)] of each step).
    Requests that often begin alike come, are preempted, end and are given up. There is no model, and
    the clock counts the events, so that both recorders see the same times. look(recorder that forgets,
    pools so far): called after each event."""
    clock = [0.0]
    monkeypatch.setattr(views, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    rng = np.random.default_rng(seed)
    allocator = BlockAllocator(20, 4)
    scheduler = Scheduler(allocator, 24, 8)
    device = SimpleNamespace(name="none", is_simulated=False, memory_bandwidth=None)
    llm = SimpleNamespace(device=device, engine=SimpleNamespace(scheduler=scheduler, in_flight=[]))
    recorders = views.Recorder(llm), views.Recorder(llm, keep)
    pools = []

    def tell(event, what=None):
        clock[0] += 1
        for recorder in recorders:
            recorder.told(event, what)
        look(recorders[1], pools)

    for _ in range(num_iterations):
        come_or_go(rng, scheduler)
        tell("schedule")
        scheduled = scheduler.schedule()
        if not scheduled:
            continue
        tell("launch", scheduled)
        cached = {page for page in allocator.free if page in allocator.chains}
        pools.append((list(allocator.ref_counts), cached))
        for sequence, count in scheduled:
            sequence.num_computed_tokens += count
            scheduler.register_full_blocks(sequence)
        for event in "launched", "wait", "read":
            tell(event)
        sampled = [sequence for sequence, _ in scheduled if sequence.remaining == 0]
        for sequence in sampled:
            sequence.token_ids.append(1)
            sequence.output.token_ids.append(1)
            if sequence.is_full:
                end(sequence, "length", scheduler)
        tell("done", sampled)
    return *recorders, pools


def num_remembered(recorder):
    """Entries of all containers of a Recorder, and of those of its requests."""
    total = sum(len(value) for value in vars(recorder).values() if hasattr(value, "__len__"))
    total += sum(len(pages) for pages in [*recorder.old_tables.values(), *recorder.users.values()])
    total += sum(len(pages) for _, _, pages in recorder.changes if isinstance(pages, list))
    for request in {*recorder.requests, *recorder.live.values(), *recorder.finished}:
        total += len(request.segments) + len(request.alone) + len(request.beside)
    return total


def replayed(data):
    """[(block tables, reference counts, cached pages)] of each step, from a page's changes."""
    states = []
    tables = {}
    cached = set()
    changes = iter([*data["changes"], (len(data["steps"]) + 1, None, None)])
    at, request, pages = next(changes)
    for step in range(len(data["steps"]) + 1):
        while at <= step:
            if isinstance(pages, int):
                given_back = tables.pop(request)
                cached -= set(given_back)
                cached |= set(given_back[:-1 - pages])
            else:
                tables[request] = tables.get(request, []) + pages
            at, request, pages = next(changes)
        counts = [sum(page in table for table in tables.values()) for page in range(data["num_blocks"])]
        states.append((dict(tables), counts, {page for page in cached if not counts[page]}))
    return states


def assert_remembered_pools(recorder, pools):
    """Block tables give the reference counts and the cached pages of each remembered step."""
    data = embedded(views.html_trace(recorder, max_requests=10**6))
    states = [(counts, cached) for _, counts, cached in replayed(data)[:-1]]
    assert states == pools[data["first_step"]:]


@pytest.mark.parametrize("keep, max_steps", [(0, 999), (1, 999), (7, 999), (7, 20), (9999, 9999)])
def test_views_forgotten_requests(monkeypatch, keep, max_steps):
    """The remembered facts are the same as those of a Recorder that keeps all: accounts, segments,
    numbers of requests and steps, and the block tables and cached pages of each step."""
    monkeypatch.setattr(views, "MAX_STEPS", max_steps)
    looks = iter(range(10**9))

    def look(recorder, pools):
        if next(looks) % 23 == 0 and len(pools) == recorder.num_steps and keep < 100:   # all are launched
            assert_remembered_pools(recorder, pools)
    whole, recorder, pools = forgetting_run(monkeypatch, 5, keep, 900, look)
    ended = [request.number for request in whole.finished]
    latest = ended[-keep:] if keep else []
    running = [request.number for request in whole.live.values()]
    assert running and [request.number for request in recorder.finished] == latest
    for each in whole, recorder:
        each.close()
    assert [request.number for request in recorder.requests] == sorted(latest + running)
    assert not recorder.live
    known = {request.number: request for request in whole.requests}
    for request in recorder.requests:
        assert request.account() == known[request.number].account() == request.output.account
        assert request.segments == known[request.number].segments
    lines = views.account_table(recorder.requests)
    assert set(lines) <= set(views.account_table(whole.requests)) and len(lines) == len(recorder.requests) + 8

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
    assert_remembered_pools(recorder, pools)
    assert replayed(data) == replayed(wanted)[first:]

    events = views.chrome_trace(recorder)["traceEvents"]
    all_events = views.chrome_trace(whole)["traceEvents"]
    numbers = {request.number for request in recorder.requests}
    tracks = [event for event in events if event["pid"] == 2 and event["tid"]]
    assert tracks == [event for event in all_events if event["pid"] == 2 and event["tid"] in numbers]
    steps = {event["args"]["step"] for event in events if event["pid"] == 1 and event["ph"] == "X"}
    assert set(range(first, len(pools))) <= steps


@pytest.mark.parametrize("max_steps", [9999, 40])
def test_views_memory_is_bounded(monkeypatch, max_steps):
    """Thousands of requests: a Recorder that forgets holds no more after all of them than after the
    first few hundred. The view on a terminal can be drawn at any time."""
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
            assert "of 20 pages in use" in note
    whole, recorder, _ = forgetting_run(monkeypatch, 6, 10, 9_000, look)
    assert recorder.num_requests > 2000 and len(whole.steps) > 8000
    assert max(sizes) < 1.3 * max(sizes[:len(sizes) // 5]) and num_remembered(whole) > 20 * max(sizes)
