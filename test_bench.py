"""The bench and its load on the server, in the simulator: figures are compared, never judged.

    floors    rows    measurements    the load: clients, checks, and a server that fails them
"""
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import bench
import load
import tinyvllm
from device import CpuDevice, compile_kernels
from load import Job, Load, LoadError, Offline, Reply, Server, Sizes, State
from reference import PARROT, RNG, ROOT, numpy_llama
from test_tinyvllm import DEVICE, ON_GPU, PARROT_CONFIG, assert_refused, float64_weights, run_main
from tinyvllm import LLM, EngineArgs, Model, ModelConfig, SamplingParams, TinyVLLMError, Tokenizer


# --------------------------------------------------------------------------------------------------
# Floors and rows
# --------------------------------------------------------------------------------------------------
def test_bench_floor_against_counting():
    """The floor of a step, counted tensor by tensor and pair of query and key by pair."""
    c = tinyvllm.SHAPES["llama-3.1-8b"]
    matrices = 32 * (4096 * 4096 * 2 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    head = 128256 * 4096
    weights = 2 * (matrices + head + 4096)          # only the last norm keeps weights of its own
    cache = 2 * 2 * 32 * 1024                       # of a token: K and V, 2 bytes, 32 layers, 8 heads of 128
    slow_memory = {"bytes_per_second": 1.0, "operations_per_second": 1e30}
    prefill, decode = bench.seconds_at_best(c, slow_memory, [(10, 3), (20, 2)])
    assert prefill == weights and decode == 2 * weights + cache * (11 + 21 + 12)
    slow_matrices = {"bytes_per_second": 1e30, "operations_per_second": 1.0}
    prefill, decode = bench.seconds_at_best(c, slow_matrices, [(3, 2)])
    pair = 2 * 2 * 32 * 32 * 128                    # q . k and p v, 32 layers, 32 heads of 128
    norms = 2 * 4096                                # counted as a matrix by the floor: next to nothing
    assert abs(prefill - (2 * (3 * matrices + head) + 6 * pair)) <= 3 * norms
    assert abs(decode - (2 * (matrices + head) + 4 * pair)) <= norms


def test_bench_floor_of_several_cards():
    """Two cards read and multiply twice as fast together."""
    c = tinyvllm.SHAPES["llama-3.1-8b"]
    card = {"name": "Card", "bytes_per_second": 3e12, "operations_per_second": 7e14}
    one = bench.seconds_at_best(c, card, [(100, 3)] * 4)
    two = bench.seconds_at_best(c, bench.of_several(card, 2), [(100, 3)] * 4)
    assert np.allclose(one, 2 * np.array(two), rtol=1e-12)
    assert [bench.of_several(card, n)["name"] for n in (1, 2)] == ["Card", "2 x Card"]


def test_kl_divergence():
    """Of two distributions known whole: the definition. Of their best tokens: all others are one."""
    p, q = (x / x.sum() for x in RNG(5).exponential(size=(2, 50)) ** 3)

    def of_best(count):
        best = [{i: np.log(x[i]) for i in np.argsort(-x)[:count].tolist()} for x in (p, q)]
        return bench.kl_divergence(*best)

    whole = (p * np.log(p / q)).sum()
    assert np.isclose(of_best(50), whole)
    known = np.intersect1d(np.argsort(-p)[:20], np.argsort(-q)[:20])
    p_joined, q_joined = (np.append(x[known], 1 - x[known].sum()) for x in (p, q))
    assert np.isclose(of_best(20), (p_joined * np.log(p_joined / q_joined)).sum())
    assert 0 < of_best(20) < whole


def test_scores_of_a_text_in_windows(monkeypatch):
    """Row accuracy's log-probabilities of a text's own tokens, against the reference."""
    monkeypatch.setattr(bench, "WINDOW", 16)
    text = "All the world's a stage, " * 4
    ids, scores = bench.score_text(EngineArgs(PARROT, device="cuda" if ON_GPU else "cpu"), text)
    text_ids = Tokenizer(PARROT).encode(text)
    windows = [text_ids[start:start + 16] for start in range(0, len(text_ids), 16)]
    assert len(windows) > 1 and ids == [i for window in windows for i in window[1:]]
    weights = float64_weights(PARROT)
    want = []
    for window in windows:
        logits = numpy_llama(PARROT_CONFIG, weights, window)[:-1]
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        want += logits[np.arange(len(window) - 1), window[1:]].tolist()
    assert np.allclose([score[i] for i, score in zip(ids, scores)], want, rtol=0.03, atol=0.1)


def test_bench_floor_adds_up_kernels():
    """Two rows on an H200, kernel by kernel and by hand: of each kernel, the longer of its two times."""
    c = tinyvllm.SHAPES["llama-3.2-1b"]
    card = {"bytes_per_second": 4.532e12, "operations_per_second": 734e12}
    _, decode = bench.seconds_at_best(c, card, [(1000, 2)] * 256)
    products = 2 * 256 * 16 * (3072 * 2048 + 2048 * 2048 + 2 * 8192 * 2048 + 8192 * 2048) / 734e12
    keys_and_values = 256 * 1001 * 16 * 2 * 8 * 64 * 2 / 4.532e12
    head = 2 * 256 * 128256 * 2048 / 734e12
    assert [round(1e3 * part, 2) for part in (products, keys_and_values, head)] == [0.68, 1.85, 0.18]
    assert abs(decode - (products + keys_and_values + head)) < 1e-8         # the last norm's weight: 4 KB
    prefill, _ = bench.seconds_at_best(c, card, [(16384, 1)])
    products *= 64                                                          # 16,384 tokens are 64 times 256
    attention = 16384 * 16385 / 2 * 16 * 32 * 2 * 2 * 64 / 734e12
    head = 128256 * 2048 * 2 / 4.532e12                                     # of the last token only: bytes
    assert [round(1e3 * part, 1) for part in (products, attention, head)] == [43.4, 24.0, 0.1]
    assert abs(prefill - (products + attention + head)) < 1e-8


@pytest.mark.parametrize("file", sorted((ROOT / "course").glob("h?00*.json")), ids=lambda file: file.name)
def test_kept_floors(file):
    """Each floor of the files that the course shows is this bench's."""
    kept = json.loads(file.read_text("utf-8"))
    config = tinyvllm.SHAPES[kept["model"]]
    rows = {name: row for name, row in kept["rows"].items() if "best" in row}
    for name, figures in rows.items():
        best = bench.row_at_best(config, kept["card"], bench.bench_rows()[name])
        share = figures["value"] / best if figures["unit"] == "tokens/s" else best / figures["value"]
        assert (figures["best"], figures["share"]) == pytest.approx((best, share), rel=1e-6), name
    assert rows


def test_bench_rows():
    """The mix is the load of nano-vllm's benchmark."""
    rows = bench.bench_rows()
    mix = rows["mix"].requests
    assert len(mix) == 256 and [sum(column) for column in zip(*mix)] == [142_827, 133_966]
    assert rows["mix-sampled"].requests == mix
    assert rows["decode-64-4000"].requests == [(4000, 256)] * 64
    assert rows["prefill-1-8192"].requests == [(8192, 1)]


def test_stream_read():
    """Each thread's exclusive or of all numbers read: four words of two numbers a round."""
    kernels = compile_kernels(DEVICE, {}, bench.STREAM_READ)
    threads = 2 * kernels.READ_THREADS
    x = RNG(0).integers(0, 2**64, (3, 4, threads, 2), np.uint64)
    out = DEVICE.empty(threads, np.uint64)
    kernels.stream_read((2,), out, DEVICE.to_device(x), 3)
    assert np.array_equal(DEVICE.fetch(out)(), np.bitwise_xor.reduce(x, (0, 1, 3)))


@pytest.mark.parametrize("arguments, parts", [
    (["no-such-row"], ["no row no-such-row", "decode-1-128", "mix"]),
    (["mix", "decode"], ["unrecognized arguments: decode", "--help"]),
    (["mix", "--json", "no/such/figures.json"], ["--json", "no/such/figures.json", "No such file"]),
    (["--device", "cpu", "mix"], ["the bench needs an NVIDIA GPU", "simulator"]),
    (["accuracy", "--text", "no-such-file"], ["--text: expected a file of text", "no-such-file"])])
def test_bench_refuses(arguments, parts):
    assert_refused(run_main(*arguments, program=bench), *parts)


# --------------------------------------------------------------------------------------------------
# Measurements
# --------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not ON_GPU, reason="the bench needs a GPU")
@pytest.mark.parametrize("row, unit", [
    ("decode-1-640", "ms"), ("ablation-decode-8-no-fused-decode", "ms"), ("batch-8", "tokens/s"),
    ("start", "s"), ("start-from-file", "s")])
def test_bench_measures(tmp_path, row, unit):
    """A row on Parrot: a line of the table, and the same figure in the file."""
    file = tmp_path / "figures.json"
    command = [sys.executable, ROOT / "bench.py", row, "--json", file]
    command += ["--model", PARROT, "--load-format", "dummy"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = json.loads(file.read_text())["rows"]
    [line] = [line for line in out.splitlines() if line.startswith(f"{row} ")]
    value = figures[row]["value"]
    digits = 0 if unit == "tokens/s" else 3
    assert list(figures) == [row] and f"{value:,.{digits}f} {unit}" in line and value > 0


@pytest.fixture
def as_if_on_gpu(monkeypatch):
    """The bench in the simulator, for its logic: the figures say nothing."""
    card = {"name": "a card", "bytes_per_second": 1e9, "operations_per_second": 1e9}
    monkeypatch.setattr(CpuDevice, "is_simulated", False)
    monkeypatch.setattr(bench, "measure_card", lambda device: card)
    monkeypatch.setattr(bench.measure_decode, "__defaults__", (3,))         # steps


def run_bench(capsys, file, *arguments):
    """(lines of the table, the figures in the file)"""
    assert bench.main([*arguments, "--json", str(file)]) == 0
    return capsys.readouterr().out.splitlines(), json.loads(file.read_text())["rows"]


def ideas_off(engine):
    """The ideas that the engine runs without."""
    scheduler = engine.scheduler
    off = {"cuda-graphs": engine.model.graph_sizes == (), "fused-decode": engine.model.decode_batch == 0,
           "overlap": not engine.overlap, "chunked-prefill": not scheduler.chunked_prefill,
           "prefix-caching": not scheduler.allocator.prefix_caching,
           "continuous-batching": scheduler.static_batching}
    assert list(off) == bench.IDEAS == list(bench.switches(engine))
    return [idea for idea in off if off[idea]]


def test_bench_ablation(monkeypatch, tmp_path, capsys, as_if_on_gpu):
    """Each row runs twice with the row's ideas off, and afterwards all ideas are on.

    In the simulator, on a small load.
    """
    rows = bench.bench_rows()
    for row in rows.values():
        if row.measure is bench.measure_ablation:
            row.requests = [(20, 2), (21, 3), (20, 5)]
            row.setup |= {"prefixes": 1, "shared": 18, "seqs": 2, "budget": 16, "whole": 64}
        elif "off" in row.setup:
            row.requests = [(3, 20)] * len(row.requests)
    seen = []
    submit = LLM.submit

    def watched_submit(llm, prompts, params):
        if not seen:
            llm.engine.model.decode_batch = 8           # as on a GPU that runs decode.cu
        off = ideas_off(llm.engine)
        graphs = llm.engine.model.graphs
        outputs = submit(llm, prompts, params)
        seen.append((off, graphs, llm.engine.scheduler.max_num_batched_tokens, outputs, llm.engine))
        return outputs

    monkeypatch.setattr(LLM, "submit", watched_submit)
    monkeypatch.setattr(Model, "decode", Model.forward)
    monkeypatch.setattr(bench, "bench_rows", lambda: rows)
    lines, figures = run_bench(capsys, tmp_path / "figures.json", "ablation", "--model", str(PARROT),
                               "--max-num-batched-tokens", "64")
    assert list(figures) == [name for name in rows if name.startswith("ablation-")] and len(figures) == 12
    twice = [name for name in figures for _ in range(2)]
    assert [off for off, *_ in seen] == [rows[name].setup["off"] for name in twice]
    engine = seen[0][-1]
    for name, (off, graphs, budget, outputs, _) in zip(twice, seen):
        [line] = [line for line in lines if line.startswith(f"{name} ")]
        assert figures[name]["value"] > 0 and (graphs is engine.model.graphs) != ("fused-decode" in off), name
        if rows[name].measure is bench.measure_decode:
            assert len(outputs) in (1, 8) and all(output.finish_reason == "abort" for output in outputs)
            continue
        assert budget == (64 if "chunked-prefill" in off else 16)
        assert [len(output.token_ids) for output in outputs] == [2, 3, 5], name
        assert (outputs[-1].num_cached_tokens == 16) != ("prefix-caching" in off)
        assert outputs[0].num_cached_tokens == 0
        latency = figures[name]["between_tokens_p99_ms"]
        assert latency > 0 and f"p99 between tokens {latency:,.2f} ms" in line
    assert ideas_off(engine) == []
    assert (engine.scheduler.max_num_batched_tokens, engine.scheduler.max_num_seqs) == (64, 64)


class Cuda:
    """CuPy's events, as far as the bench uses events."""
    class Event:
        def record(self):
            pass

    get_elapsed_time = staticmethod(lambda before, after: 1.0)


def test_bench_table(monkeypatch, tmp_path, capsys, as_if_on_gpu):
    """A row of each kind, in the simulator, on small requests. Two rows need a larger engine."""
    rows = bench.bench_rows()
    refused = {"prefill-1-16384": "a context of 16385 is needed, this engine has 4096",
               "long-prompt-stall-4096": "a --max-num-batched-tokens of 4096 is needed, this engine has 2048"}
    measured = ["decode-4-128", "batch-8", "prefill-16-1024", "mix", "mix-sampled", "mix-small-pool",
                "shared-prefix", "long-prompt-stall-512"]
    rows = {name: row for name, row in rows.items() if name in refused or name in measured}
    small = {"prompt": 40, "shared": 9, "pool": 0.6}
    for name in measured:
        row = rows[name]
        row.requests = [(10, min(new, 14)) for _, new in row.requests[:3]]
        row.setup |= {key: value for key, value in small.items() if key in row.setup}
    monkeypatch.setattr(np, "cuda", Cuda, raising=False)
    monkeypatch.setattr(bench, "bench_rows", lambda: rows)
    lines, figures = run_bench(capsys, tmp_path / "figures.json", "--model", str(PARROT),
                               "--max-num-batched-tokens", "2048")
    assert list(figures) == measured
    for name, row in rows.items():
        [line] = [line for line in lines if line.startswith(f"{name} ")]
        assert row.what in line
        if name in refused:
            assert f"not measured: {refused[name]}" in line
        else:
            value = figures[name]["value"]
            digits = 0 if figures[name]["unit"] == "tokens/s" else 3
            assert f" {value:,.{digits}f} {figures[name]['unit']}" in line and value > 0
    assert sum("GPU busy" in line for line in lines) == 3
    assert figures["mix-small-pool"]["preemptions"] > 0 == figures["mix"]["preemptions"]


def test_bench_start_from_file(monkeypatch, tmp_path, capsys, as_if_on_gpu):
    """A new process reads --load-format dummy's weights from a folder, if the disk has room."""
    rows = {"start-from-file": bench.bench_rows()["start-from-file"]}
    monkeypatch.setattr(bench, "bench_rows", lambda: rows)
    file = tmp_path / "figures.json"
    lines, figures = run_bench(capsys, file, "--model", str(PARROT), "--load-format", "dummy")
    assert f"{figures['start-from-file']['value']:,.3f} s" in lines[-1]
    lines, figures = run_bench(capsys, file, "--model", str(PARROT))
    assert "not measured: row start reads weights from files" in lines[-1] and figures == {}

    dummy = EngineArgs(str(PARROT), load_format="dummy")
    bench.write_model(dummy, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    trained = load_file(PARROT / "model.safetensors")
    assert {name: w.shape for name, w in written.items()} == {name: w.shape for name, w in trained.items()}
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_folder(PARROT)
    params = SamplingParams(max_tokens=5, logprobs=0, ignore_eos=True)
    [from_file] = LLM(tmp_path).generate([[1, 2, 3]], params)
    [made] = LLM(PARROT, load_format="dummy").generate([[1, 2, 3]], params)
    assert from_file.logprobs == made.logprobs

    monkeypatch.setattr(bench.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 10**6}))
    bench.write_config(EngineArgs("llama-3.2-1b", load_format="dummy"), tmp_path)
    tokenizer = tinyvllm.Tokenizer(tmp_path)            # Parrot's, with a text for every further id
    assert [tokenizer.decode([i]) for i in (300, 100_000, 128_255)] == ["ch", " t100000", " t128255"]
    assert tokenizer.encode("Hello") == tinyvllm.Tokenizer(PARROT).encode("Hello")

    with pytest.raises(TinyVLLMError, match=r"weights have 0.002 GB, .* 0.001 GB of free space: set TMPDIR"):
        bench.write_model(dummy, tmp_path)


# --------------------------------------------------------------------------------------------------
# The load on the server
# --------------------------------------------------------------------------------------------------
HELLO = {"prompt": "Hello", "max_tokens": 2}
DONE = (b'data: {"choices":[{"text":"a\\n\\nb","finish_reason":null}],"usage":null}\n\n: ping\n\n',
        b'data: {"choices":[{"text":"c","finish_reason":"length"}],"usage":null}\n\nda',
        b'ta: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n', b"data: [DONE]\n\n")


def response(*parts, status=200):
    """An answer of a server in chunks, as bytes."""
    head = f"HTTP/1.1 {status} OK\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))


@pytest.mark.parametrize("job, data, fault", [
    (Job(HELLO), response(*DONE), ""),
    (Job(HELLO, expected=("a\n\nbc", "length", 2)), response(*DONE), ""),
    (Job(HELLO, expected=("a\n\nbd", "length", 2)), response(*DONE), "an answer is wrong: expected .*bd.*bc"),
    (Job(HELLO | {"max_tokens": 3}), response(*DONE), r"expected \('length', 3\).* got \('length', 2\)"),
    (Job(HELLO), response(*DONE[:3]), "cut short"),
    (Job(HELLO), response(*DONE)[:250], "cut short"),
    (Job(HELLO), response(status=503), "expected status 200, got 503"),
    (Job(HELLO, excused=(503,)), response(status=503), ""),
    (Job(HELLO, excused=(503,)), b"", "expected status 200, got 0"),
    (Job(HELLO, kind="large"), response(status=413), ""),
    (Job(HELLO, kind="large"), response(*DONE), "of kind large expected status 413, got 200"),
    (Job(HELLO, kind="half"), b"", ""),
    (Job(HELLO, kind="half"), response(status=400), "of kind half expected status 0, got 400"),
    (Job(HELLO, kind="gone"), response(*DONE)[:250], "")])
def test_load_reads_answers(job, data, fault):
    """What a client makes of the bytes that a server sends."""
    reply = Reply(job, due=0.0, end=1.0)
    if data:
        reply.read(data)
    assert re.search(fault, reply.fault()) if fault else reply.fault() == ""


def test_load_notices_a_leak(monkeypatch):
    """A server that keeps something when the load is over, or counts otherwise than the clients."""
    monkeypatch.setattr(load, "SETTLE_SECONDS", 0)
    idle = {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0}
    counts = {"request_success_total stop": 0, "request_success_total length": 5,
              "generation_tokens_total": 90, "prompt_tokens_total": 40}
    held = {"MB of memory": 100, "threads": 3, "file descriptors": 9}
    before = State(held, idle | counts)
    counts = {name: value + more for (name, value), more in zip(counts.items(), (0, 1, 2, 3))}
    reply = Reply(Job(HELLO), due=0.0, end=1.0)
    reply.read(response(*DONE))
    server = object.__new__(Server)

    def check(replies=(reply,), **changes):
        """Checks a server whose state has changed so; changes of numbers have the names' first words."""
        def changed(values):
            return {name: value + changes.get(name.split()[0], 0) for name, value in values.items()}
        server.state = lambda: State(changed(held), changed(idle | counts))
        server.metrics = lambda: server.state().metrics
        server.check(before, replies)

    check(MB=19, threads=5)
    for change, message in [({"num_requests_running": 1}, "num_requests_running: expected 0"),
                            ({"num_requests_waiting": 2}, "num_requests_waiting: expected 0"),
                            ({"kv_cache_usage_perc": 0.01}, "kv_cache_usage_perc: expected 0"),
                            ({"MB": 21}, "MB of memory: expected 100 as before the load, got 121"),
                            ({"file": 1}, "file descriptors: expected 9 as before the load, got 10"),
                            ({"threads": 99}, "threads: expected 3"),
                            ({"prompt_tokens_total": -1}, "prompt_tokens_total: expected 3 more.* got 2"),
                            ({"generation_tokens_total": 1}, "generation_tokens_total: expected 2 more")]:
        with pytest.raises(LoadError, match=message):
            check(**change)
    left = Reply(Job(HELLO, kind="gone"), due=0.0, end=1.0)
    check((reply, left), generation_tokens_total=1)         # of the client that has left
    with pytest.raises(LoadError, match=r"1 of 2 requests: .* expected status 200, got 0"):
        check((reply, Reply(Job(HELLO), due=0.0, end=1.0)))


def test_every_kind_of_client(request):
    """One client of each kind at once, in two processes. Only who reads to the end gets an answer; the
    server keeps nothing of the others, ends by SIGTERM, and then no longer answers."""
    command = [sys.executable, str(ROOT / "server.py"), "--port", "0", "--device", "cpu"]
    command += ["--model", str(PARROT)]
    server = Server(command)
    request.addfinalizer(server.process.kill)
    [known] = LLM(PARROT, device="cpu").generate([[1, 2, 3]], SamplingParams(max_tokens=20, ignore_eos=True))
    body = {"prompt": [1, 2, 3], "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    jobs = [Job(body, due=0.1, kind=kind, expected=(known.text, "length", 20))
            for kind in ("whole", "slow", "half", *load.STATUS)]
    jobs += [Job(body | {"max_tokens": 2000}, due=0.1, kind=kind, stays=0.3) for kind in load.LEAVING]
    Load(server, [[Job(body), Job(body, kind="large")]]).wait()
    before = server.state()
    clients = Load(server, [[job] for job in jobs], num_processes=2)
    replies = clients.wait()
    server.check(before, replies)
    assert {reply.job.kind for reply in replies if reply.answer} == {"whole", "slow"}
    assert {reply.job.kind: reply.status for reply in replies if reply.status != 200} == {
        "gone": 0, "reset": 0, "half": 0, **load.STATUS}
    assert len(clients.cpu) == 2 and min(clients.cpu) > 0
    assert len(server.pids) == 2 and min(server.cpu_seconds()) > 0
    assert all(reply.due == clients.start + 0.1 for reply in replies)           # the intended start
    aborted = "request_success_total abort"
    assert server.metrics()[aborted] == before.metrics[aborted] + 2
    assert server.stop() == 0
    with pytest.raises(LoadError, match="the server does not answer"):
        server.metrics()
    with pytest.raises(LoadError, match=r"the server has not started: .*expected a free address"):
        Server([*command, "--host", "no.such.host.invalid"])


def test_bench_load(monkeypatch, tmp_path, capsys):
    """Rows of the load in the simulator: lines of the table, figures in the file, and a row that fails. The
    model is Parrot's shape with random weights."""
    monkeypatch.setattr(load, "SIMULATED", Sizes(
        streams=5, prompt=4, new=4, seconds=1, kill_seconds=60, num_blocks=256, warm_ups=1))
    kept = ("batch", "first-token", "closed", "kill", "slow", "soak")
    rows = [row for row in load.rows(load.SIMULATED) if row[0] in kept]
    for *_, setup in rows:
        if "kinds" in setup:                    # the others take long, see test_every_kind_of_client
            setup["kinds"] = {"gone": 0.2, "reset": 0.2, "garbage": 0.1, "stranger": 0.1}

    def fail(test):
        raise LoadError("an answer is lost")

    lost = ("closed", fail, "a row that fails", {})
    monkeypatch.setattr(load, "rows", lambda sizes: [lost if row[0] == "closed" else row for row in rows])
    file = tmp_path / "figures.json"
    arguments = ["serve", "--device", "cpu", "--model", str(PARROT), "--load-format", "dummy", "--soak", "2"]
    assert bench.main([*arguments, "--json", str(file)]) == 1
    out = capsys.readouterr().out
    figures = json.loads(file.read_text())["rows"]
    assert list(figures) == ["serve-batch", "serve-first-token", "serve-slow", "serve-kill", "serve-soak"]
    for name, row in figures.items():
        assert row["value"] > 0 and f"{name} " in out and row["note"] in out
    assert re.search(r"serve-closed +a row that fails +FAILED: an answer is lost\n", out)
    for name in "serve-batch", "serve-first-token", "serve-slow":
        assert f" {figures[name]['share']:.0%}\n" in out
    assert re.search(r"\d+ answers, \d+ compared; CPU of a client process \d+% at most, of the server \d+% "
                     r"and of its worker \d+%", figures["serve-soak"]["note"])


def test_arrivals_are_a_poisson_process():
    """The gaps have mean and spread of an exponential distribution, and the shares are those asked for."""
    test = load.LoadTest([], Offline(1.0, 1.0, 100, [([1], None)]), Sizes(streams=4))
    test.capacity = 50.0
    jobs = [job for [job] in test.arrivals(rate=50, seconds=100, kinds={"gone": 0.2}, excused=(0,))]
    gaps = np.diff([job.due for job in jobs])
    assert abs(np.mean(gaps) - 0.02) < 0.001 and abs(np.std(gaps) - 0.02) < 0.002 and min(gaps) > 0
    assert abs(sum(job.kind == "gone" for job in jobs) / len(jobs) - 0.2) < 0.03
    assert jobs[0].kind == "whole" and all(job.excused == (0,) for job in jobs)


# --------------------------------------------------------------------------------------------------
# vLLM on the bench's rows
# --------------------------------------------------------------------------------------------------
FAKE_VLLM = '''
from types import SimpleNamespace
__version__ = "9.9"
def SamplingParams(**fields):
    assert fields.keys() <= {"temperature", "max_tokens", "ignore_eos", "detokenize", "top_p", "top_k"}
    return SimpleNamespace(**fields)
class LLM:
    def __init__(self, model, max_model_len, **options):
        self.longest = max_model_len
    def generate(self, prompts, params, use_tqdm):
        assert all(len(p["prompt_token_ids"]) + q.max_tokens <= self.longest for p, q in zip(prompts, params))
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * q.max_tokens)]) for q in params]
'''


def test_peers(tmp_path):
    """peers.py measures the rows of bench.py with the `vllm` that is there, or says that none is."""
    command = [sys.executable, str(ROOT / "course" / "peers.py"), "--json", str(tmp_path / "peers.json")]
    none = subprocess.run(command, capture_output=True, text=True)
    assert none.returncode == 2 and "vLLM: expected it in this Python" in none.stderr.splitlines()[-1]
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    (tmp_path / "torch.py").write_text("from unittest.mock import MagicMock\n"
                                       "cuda = MagicMock(get_device_name=lambda: 'a card')\n")
    fake = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert fake.returncode == 0, fake.stderr
    peers = json.loads((tmp_path / "peers.json").read_text())
    assert (peers["card"]["name"], peers["engine"], peers["version"]) == ("a card", "vLLM", "9.9")
    rows = bench.bench_rows()
    assert {"start", "decode-1-16384", "batch-256-sampled", "prefill-16-1024", "mix", "shared-prefix"} \
        <= peers["rows"].keys() <= rows.keys()
    assert all(peers["rows"][name]["unit"] == "tokens/s" for name in ("mix", "prefill-1-2048", "batch-8"))
