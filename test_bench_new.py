"""Tests of bench.py: to be folded into test_views.py."""
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import bench
import tinyvllm
from device import CpuDevice
from tinyvllm import LLM, EngineArgs, ModelConfig, SamplingParams, TinyVLLMError, compile_kernels

PARROT = Path(__file__).parent / "parrot"


def test_stream_read():
    """Each thread's exclusive or of what it reads: four words of two numbers a round."""
    device = tinyvllm.open_device()
    kernels = compile_kernels(device, {}, bench.STREAM_READ)
    threads = kernels.READ_THREADS
    x = np.random.default_rng(0).integers(0, 2**64, (3, 4, 2 * threads, 2), np.uint64)
    out = device.empty(2 * threads, np.uint64)
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


@pytest.fixture
def as_if_on_gpu(monkeypatch):
    """The bench in the simulator: its logic, not its figures."""
    card = {"name": "a card", "bytes_per_second": 1e9, "operations_per_second": 1e9}
    monkeypatch.setattr(CpuDevice, "is_simulated", False)
    monkeypatch.setattr(bench, "measure_card", lambda device: card)
    monkeypatch.setattr(bench.measure_decode, "__defaults__", (3,))         # steps


def is_off(engine, idea):
    """Whether the engine runs without an idea."""
    return {"cuda-graphs": engine.model.graph_sizes == (), "fused-decode": engine.model.decode_batch == 0,
            "overlap": not engine.overlap, "chunked-prefill": not engine.scheduler.chunked_prefill,
            "prefix-caching": not engine.scheduler.allocator.prefix_caching,
            "continuous-batching": engine.scheduler.static_batching}[idea]


def test_bench_ablation(monkeypatch, tmp_path, capsys, as_if_on_gpu):
    """The logic, in the simulator on a small load: each row has its ideas off while it runs and all on afterwards, and is run twice."""
    rows = bench.bench_rows()
    small = {"prefixes": 1, "shared": 18, "seqs": 2, "budget": 16, "whole": 64}
    for row in rows.values():
        if row.measure is bench.measure_ablation:
            row.requests = [(20, 2), (21, 3), (20, 5)]
            row.setup |= small
        elif "off" in row.setup:
            row.requests = [(3, 256)] * len(row.requests)
    seen = []
    submit = LLM.submit

    def watched_submit(llm, prompts, params):
        engine = llm.engine
        if not seen:
            engine.model.decode_batch = 8       # as on a GPU that runs decode.cu
        off = [idea for idea in bench.IDEAS if is_off(engine, idea)]
        graphs = engine.model.graphs
        outputs = submit(llm, prompts, params)
        seen.append((off, graphs, engine.scheduler.max_num_batched_tokens, outputs, engine))
        return outputs

    monkeypatch.setattr(LLM, "submit", watched_submit)
    monkeypatch.setattr(bench, "bench_rows", lambda: rows)
    monkeypatch.setattr(tinyvllm.Model, "decode", tinyvllm.Model.forward)
    file = tmp_path / "figures.json"
    assert bench.main(["ablation", "--model", str(PARROT), "--json", str(file), "--max-num-batched-tokens", "64"]) == 0
    out = capsys.readouterr().out
    figures = json.loads(file.read_text())["rows"]
    assert list(figures) == [name for name in rows if name.startswith("ablation-")] and len(figures) == 12
    twice = [name for name in figures for _ in range(2)]
    assert [off for off, *_ in seen] == [list(rows[name].setup["off"]) for name in twice]
    own_graphs = seen[0][4].model.graphs
    for name, (off, graphs, budget, outputs, _) in zip(twice, seen):
        assert (graphs is own_graphs) != ("fused-decode" in off), name
        if rows[name].measure is bench.measure_ablation:
            assert budget == (64 if "chunked-prefill" in off else 16)
            assert [len(output.token_ids) for output in outputs] == [2, 3, 5], name
            assert (outputs[-1].num_cached_tokens == 16) != ("prefix-caching" in off)
            assert outputs[0].num_cached_tokens == 0
            assert f"p99 between tokens {figures[name]['between_tokens_p99_ms']:,.2f} ms" in out
        else:
            assert len(outputs) in (1, 8) and all(output.finish_reason == "abort" for output in outputs)
            assert f"{figures[name]['tokens_per_second']:,.0f} tokens/s" in out
        assert figures[name]["value"] > 0
    engine = seen[0][4]
    assert not any(is_off(engine, idea) for idea in bench.IDEAS) and list(bench.switches(engine)) == bench.IDEAS
    assert (engine.scheduler.max_num_batched_tokens, engine.scheduler.max_num_seqs) == (64, 64)


class Cuda:
    """CuPy's events, as far as the bench needs them."""
    class Event:
        def record(self):
            pass

    get_elapsed_time = staticmethod(lambda before, after: 1.0)


def test_bench_measures_in_the_simulator(monkeypatch, tmp_path, capsys, as_if_on_gpu):
    """A row of each kind with small requests: the lines of the table, and the reason of a row that this engine cannot run."""
    names = ["decode-4-128", "batch-8", "prefill-16-1024", "prefill-1-16384", "mix", "mix-sampled", "mix-small-pool", "shared-prefix",
             "long-prompt-stall-512", "long-prompt-stall-4096"]
    rows = bench.bench_rows()
    rows = {name: rows[name] for name in names}
    for name, row in rows.items():
        row.requests = [(10, min(new, 14)) for _, new in row.requests[:3]]
        small = {"prompt": 40, "shared": 9, "pool": 0.6}
        row.setup |= {key: value for key, value in small.items() if key in row.setup}
    rows["prefill-1-16384"].requests = [(16384, 1)]
    monkeypatch.setattr(np, "cuda", Cuda, raising=False)
    monkeypatch.setattr(bench, "bench_rows", lambda: rows)
    file = tmp_path / "figures.json"
    assert bench.main(["--model", str(PARROT), "--json", str(file), "--max-num-batched-tokens", "2048"]) == 0
    out = capsys.readouterr().out
    figures = json.loads(file.read_text())["rows"]
    refused = {"prefill-1-16384": "not measured: a context of 16385 is needed, this engine has 4096",
               "long-prompt-stall-4096": "not measured: a --max-num-batched-tokens of 4096 is needed, this engine has 2048"}
    assert set(rows) - set(figures) == set(refused)
    for name, row in rows.items():
        [line] = [line for line in out.splitlines() if line.startswith(f"{name} ")]
        assert row.what in line
        if name in refused:
            assert refused[name] in line
        else:
            digits = 0 if figures[name]["unit"] == "tokens/s" else 3
            assert f" {figures[name]['value']:,.{digits}f} {figures[name]['unit']}" in line and figures[name]["value"] > 0
    assert out.count("GPU busy") == 3 and figures["mix-small-pool"]["preemptions"] > 0 == figures["mix"]["preemptions"]


def test_bench_start_from_file(monkeypatch, tmp_path, capsys, as_if_on_gpu):
    """A new process reads the random weights from a folder, and they are those of --load-format dummy."""
    rows = {"start-from-file": bench.bench_rows()["start-from-file"]}
    monkeypatch.setattr(bench, "bench_rows", lambda: rows)
    assert bench.main(["--model", str(PARROT), "--load-format", "dummy"]) == 0
    assert " s" in capsys.readouterr().out.splitlines()[-1].split("cache warm)")[1]
    assert bench.main(["--model", str(PARROT)]) == 0
    assert "not measured: row start reads weights from files" in capsys.readouterr().out.splitlines()[-1]

    args = EngineArgs(str(PARROT), load_format="dummy")
    bench.write_model(args, tmp_path)
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_folder(PARROT)
    shapes = {name: tensor.shape for name, tensor in load_file(PARROT / "model.safetensors").items()}
    assert {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()} == shapes
    one = SamplingParams(max_tokens=5, logprobs=0, ignore_eos=True)
    written, made = (LLM(**options).generate([[1, 2, 3]], one)[0].logprobs for options in (
        {"model": str(tmp_path)}, {"model": str(PARROT), "load_format": "dummy"}))
    assert written == made

    monkeypatch.setattr(bench.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 10**6}))
    with pytest.raises(TinyVLLMError, match="the weights have 0.002 GB, .* has 0.001 GB of free space: set TMPDIR"):
        bench.write_model(args, tmp_path)
