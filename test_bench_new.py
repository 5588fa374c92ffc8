"""Tests of bench.py: rows, refusals, switches, the start from a folder."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import bench
import tinyvllm
from device import CpuDevice
from tinyvllm import LLM, EngineArgs, Model, ModelConfig, SamplingParams, TinyVLLMError, open_device

ROOT = Path(__file__).parent
PARROT = ROOT / "parrot"
ON_GPU = not open_device().is_simulated


def test_stream_read():
    """Each thread's exclusive or of what it reads: four words of two numbers a round."""
    device = open_device()
    kernels = tinyvllm.compile_kernels(device, {}, bench.STREAM_READ)
    threads = 2 * kernels.READ_THREADS
    x = np.random.default_rng(0).integers(0, 2**64, (3, 4, threads, 2), np.uint64)
    out = device.empty(threads, np.uint64)
    kernels.stream_read((2,), out, device.to_device(x), 3)
    assert np.array_equal(device.fetch(out)(), np.bitwise_xor.reduce(x, (0, 1, 3)))


@pytest.mark.parametrize("arguments, parts", [
    (["no-such-row"], ["no row no-such-row", "decode-1-128", "mix"]),
    (["mix", "decode"], ["unrecognized arguments: decode", "--help"]),
    (["mix", "--json", "no/such/figures.json"], ["--json", "no/such/figures.json", "No such file"]),
    (["--device", "cpu", "mix"], ["the bench needs an NVIDIA GPU", "simulator"])])
def test_bench_refuses(capsys, arguments, parts):
    """One line, exit code 2."""
    with pytest.raises(SystemExit) as end:
        tinyvllm.run_program(bench.main, arguments)
    out, error = capsys.readouterr()
    lines = [line for line in error.splitlines() if not line.startswith("tiny-vLLM:")]
    assert end.value.code == 2 and out == "" and len(lines) == 1, error
    assert all(part in lines[0] for part in parts), error


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
    """In the simulator, on a small load: each row runs twice with the row's ideas off, and afterwards all
    ideas are on."""
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
        assert f"p99 between tokens {figures[name]['between_tokens_p99_ms']:,.2f} ms" in line
    assert ideas_off(engine) == []
    assert (engine.scheduler.max_num_batched_tokens, engine.scheduler.max_num_seqs) == (64, 64)


class Cuda:
    """CuPy's events, as far as the bench uses them."""
    class Event:
        def record(self):
            pass

    get_elapsed_time = staticmethod(lambda before, after: 1.0)


def test_bench_table(monkeypatch, tmp_path, capsys, as_if_on_gpu):
    """A row of each kind, in the simulator, on small requests; and rows that the engine is too small for."""
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
    """A new process reads weights from a folder: the weights of --load-format dummy, if the disk has room."""
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
    with pytest.raises(TinyVLLMError, match="weights have 0.002 GB, .* 0.001 GB of free space: set TMPDIR"):
        bench.write_model(dummy, tmp_path)
