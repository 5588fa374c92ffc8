"""python tinyvllm.py --bench: how fast is it, and how fast could it be?

First the card itself is measured: how fast it reads memory, how fast it multiplies. A step must read all weights, and the keys and values
of its sequences, and it must multiply each token with all weights: the bytes over the one rate or the operations over the
other, whichever takes longer, are its floor, and each row of the table shows how near to it the engine comes.
"""
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import tinyvllm
from simulator import CpuDevice
from tinyvllm import (BYTES, DummyCheckpoint, SamplingParams, TinyVLLMError, cdiv, decode_weight_bytes, kv_bytes_per_token,
                      weight_bytes)
from views import check_writable


@dataclass
class BenchRow:
    """One measurement: requests of (prompt tokens, new tokens), which come together and never stop early."""
    measure: object                     # function (llm, row, card) -> figures: "value" and "unit", perhaps "best", what the card's rates
                                        # allow, and "share", how much of that is reached, and more
    what: str
    requests: list
    params: dict = field(default_factory=dict)      # of the sampling; none: greedy
    setup: dict = field(default_factory=dict)       # what else its function wants to know


def bench_rows():
    """{name: BenchRow}, in the order of the table."""
    rows = {"start": BenchRow(measure_start, "new process to first token, kernels compiled before", []),
            "start-compiling": BenchRow(measure_start, "the same, kernels not compiled before", [], setup={"compiling": True})}
    for batch, context in (1, 128), (1, 640), (1, 2048), (1, 16384), (4, 128), (8, 128), (64, 4000), (256, 1000):
        rows[f"decode-{batch}-{context}"] = BenchRow(measure_decode, f"a decode step, {batch} x context {context:,}", [(context, 256)] * batch)
    for batch in 8, 32, 128, 256:
        rows[f"batch-{batch}"] = BenchRow(measure_output, f"{batch} x (prompt 128, 256 new)", [(128, 256)] * batch)
    sampled = dict(temperature=0.8, top_p=0.95, top_k=50, seed=1)
    rows["batch-256-sampled"] = BenchRow(measure_output, "the same, temperature 0.8, top_p 0.95, top_k 50", [(128, 256)] * 256, sampled)
    for batch, prompt in (1, 2048), (1, 3500), (1, 8192), (1, 16384), (16, 1024):
        rows[f"prefill-{batch}-{prompt}"] = BenchRow(measure_prefill, f"{batch} x (prompt {prompt:,}, 1 new)", [(prompt, 1)] * batch)
    # The lengths of nano-vllm's benchmark. It draws each prompt's ids after its length, and all new lengths after the prompts.
    draw, prompts = random.Random(0).randint, []
    for _ in range(256):
        prompts.append(draw(100, 1024))
        for _ in range(prompts[-1]):
            draw(0, 10000)
    mix = [(prompt, draw(100, 1024)) for prompt in prompts]
    rows["mix"] = BenchRow(measure_output, "256 x (prompt 100 to 1,024, 100 to 1,024 new)", mix)
    rows["mix-sampled"] = BenchRow(measure_output, "the same, temperature 0.6", mix, dict(temperature=0.6, seed=1))
    rows["mix-small-pool"] = BenchRow(measure_output, "the mix in a tenth of the pages that it fills", mix, setup={"pool": 0.1})
    rows["shared-prefix"] = BenchRow(measure_shared_prefix, "63 x (prompt 2,000 cached + 32): last one's first token", [(2032, 1)] * 63,
                                     setup={"shared": 2000})
    for budget in 512, 1024, 2048, 4096:
        rows[f"long-prompt-stall-{budget}"] = BenchRow(measure_stall, f"32 decode, 16,384 come in, {budget:,} a step: p99 a token",
                                                       [(128, 1024)] * 32, setup={"budget": budget, "prompt": 16384})
    # Half of the mix, behind four system prompts of 1,536 tokens, and every fourth with a document of 1,400. 48 may run at once: some always wait.
    load = [(1536 + prompt + 1400 * (i % 4 == 0), new) for i, (prompt, new) in enumerate(mix[:128])]
    ideas = [name for name, *_ in switches(None)]
    for name, off in {"all-on": [], **{f"no-{idea}": [idea] for idea in ideas}, "all-off": ideas}.items():
        what = "static batching" if off == ideas[-1:] else name.replace("-", " ").replace("cuda", "CUDA")
        rows[f"ablation-{name}"] = BenchRow(measure_ablation, f"half of the mix, prefixes, documents: {what}", load,
                                            setup={"off": off, "prefixes": 4, "shared": 1536, "seqs": 48, "budget": 512, "whole": 4096})
    return rows


def measure_card(llm):
    """The device's name, and the rates at which it reads memory, bytes/s, and multiplies bfloat16 matrices, operations/s."""
    device, kernels = llm.device, llm.engine.model.kernels
    rounds, blocks, size = 64, 4 * device.multiprocessors, 8192
    out = device.empty(blocks * kernels.READ_THREADS, np.uint64)
    x = device.xp.arange(8 * rounds * out.size, dtype=np.uint64)               # 1.1 GB on an H200
    a, b = (DummyCheckpoint(device).take("", size, size) for _ in range(2))

    def best(function, repeats=20):
        """Seconds of a call: of four rounds the fastest."""
        def seconds():
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            device.fetch(out[:1])()                                 # behind them all on the device
            return (time.perf_counter() - start) / repeats
        return min(seconds() for _ in range(4))

    return {"name": device.name, "bytes_per_second": x.nbytes / best(lambda: kernels.stream_read((blocks,), out, x, rounds)),
            "operations_per_second": 2 * size**3 / best(lambda: device.linear(a, b))}


def step_at_best(config, card, tokens, rows, pairs, context):
    """Seconds that a step must take on a card of these rates. Of `tokens`, `rows` go through the head; queries meet keys in `pairs`; `context`
    tokens are read from the cache."""
    c, head = config, config.vocab_size * config.hidden_size
    layers = decode_weight_bytes(c) / BYTES - head                              # weights that every token is multiplied with
    a_pair = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim       # operations for a query and a key with its value
    num_bytes = decode_weight_bytes(c) + kv_bytes_per_token(c) * context
    operations = 2 * (tokens * layers + rows * head) + a_pair * pairs
    return max(num_bytes / card["bytes_per_second"], operations / card["operations_per_second"])


def seconds_at_best(config, card, requests):
    """(prefill, decode): what requests of (prompt tokens, new tokens) must take on a card of these rates, if first all prompts come in one
    step, and then all that are not done decode together."""
    pairs = sum(p * (p + 1) / 2 for p, _ in requests)
    prefill = step_at_best(config, card, sum(p for p, _ in requests), len(requests), pairs, 0)
    contexts = [[p + i for p, new in requests if new > i] for i in range(1, max(new for _, new in requests))]
    return prefill, sum(step_at_best(config, card, len(context), len(context), sum(context), sum(context)) for context in contexts)


def random_prompt(llm, count):
    """So many random token ids: no two prompts are alike, in this row or another."""
    return np.random.default_rng().integers(0, llm.config.vocab_size, count).tolist()


def random_prompts(llm, row):
    """A random prompt for each of a row's requests."""
    longest = max(prompt + new for prompt, new in row.requests)
    if longest > llm.max_model_len:
        raise TinyVLLMError(f"it needs a context of {longest} tokens, this model has {llm.max_model_len}")
    return [random_prompt(llm, prompt) for prompt, _ in row.requests]


def submit(llm, row, prompts):
    """Queues a row's requests."""
    return llm.submit(prompts, [SamplingParams(max_tokens=new, ignore_eos=True, **row.params) for _, new in row.requests])


def time_decode(llm, row, steps=64):
    """Seconds of a decode step, the mean of some, when every request has had its prompt read."""
    outputs = submit(llm, row, random_prompts(llm, row))
    while not all(len(output.token_ids) > 4 for output in outputs):
        llm.engine.step()
    start = time.perf_counter()
    for _ in range(steps):
        llm.engine.step()
    seconds, running = (time.perf_counter() - start) / steps, len(llm.engine.scheduler.running)
    llm.abort(outputs)
    if running < len(outputs):
        raise TinyVLLMError(f"only {running} of {len(outputs)} ran to the end: the cache does not hold them together")
    return seconds


def time_run(llm, row):
    """(seconds from the first arrival to the last token, more figures): all of a row's requests, in a "pool" of that share of the pages
    which they all together fill, or in all that there are."""
    cuda, model, marks, allocator = llm.device.xp.cuda, llm.engine.model, [], llm.engine.scheduler.allocator
    launch, pages = model.launch, sum(cdiv(prompt + new, allocator.block_size) for prompt, new in row.requests)
    held = allocator.allocate(max(0, len(allocator.free) - int(pages * row.setup["pool"])) if "pool" in row.setup else 0)

    def marked_launch(batch):               # events on the device before and after each step say how long it was busy
        marks.append((cuda.Event(), cuda.Event()))
        marks[-1][0].record()
        result = launch(batch)
        marks[-1][1].record()
        return result

    prompts = random_prompts(llm, row)
    model.launch, start = marked_launch, time.perf_counter()
    try:
        outputs = submit(llm, row, prompts)
        for _ in llm.run(outputs):
            pass
    finally:
        model.launch = launch
        allocator.release(held)
    seconds = time.perf_counter() - start
    first = [output.first_token_time - output.arrival_time for output in outputs]
    each = [(o.finish_time - o.first_token_time) / max(len(o.token_ids) - 1, 1) for o in outputs]
    figures = {"gpu_busy": sum(cuda.get_elapsed_time(*pair) for pair in marks) / 1e3 / seconds,
               "preemptions": sum(output.num_preemptions for output in outputs)}
    for name, values in ("time_to_first_token", first), ("time_per_output_token", each):
        figures |= {f"{name}_p{percent}": float(np.percentile(values, percent)) for percent in (50, 99)}
    return seconds, figures


def time_shared_prefix(llm, row):
    """Seconds until the last of the row's requests has its first token. They begin alike, and that beginning has been computed before."""
    shared, one = row.setup["shared"], SamplingParams(max_tokens=1, ignore_eos=True)
    prefix = random_prompt(llm, shared)
    llm.generate(prefix + random_prompt(llm, 1), one)
    outputs = llm.submit([prefix + random_prompt(llm, prompt - shared) for prompt, _ in row.requests], one)
    for _ in llm.run(outputs):
        pass
    return max(output.first_token_time - output.arrival_time for output in outputs)


def time_stall(llm, row):
    """(99th percentile of the seconds between two tokens of the row's requests while a long prompt comes in, seconds until that has its
    first token), with row.setup["budget"] tokens a step."""
    long, scheduler = BenchRow(None, "", [(row.setup["prompt"], 1)]), llm.engine.scheduler
    largest, budget = scheduler.max_num_batched_tokens, row.setup["budget"]
    if budget > largest or row.setup["prompt"] >= llm.max_model_len:
        raise TinyVLLMError(f"it needs a budget of {budget} and a context of {row.setup['prompt'] + 1}, here are {largest} and {llm.max_model_len}")
    with switched((scheduler, "max_num_batched_tokens", budget)):
        running = submit(llm, row, random_prompts(llm, row))
        while not all(len(output.token_ids) > 4 for output in running):
            llm.engine.step()
        [long] = submit(llm, long, random_prompts(llm, long))
        times = [time.perf_counter()]
        while not long.finish_reason:
            llm.engine.step()                                       # each brings every running request a token
            times.append(time.perf_counter())
        llm.abort(running)
    return float(np.percentile(np.diff(times), 99)), long.first_token_time - long.arrival_time


def switches(engine):
    """(idea, the object that its switch is in, the switch, what it is set to when the idea is off), of each. engine: None for the names."""
    model, scheduler, allocator = (engine.model, engine.scheduler, engine.scheduler.allocator) if engine else [None] * 3
    return [("cuda-graphs", model, "graph_sizes", ()), ("overlap", engine, "overlap", False),
            ("chunked-prefill", scheduler, "chunked_prefill", False), ("prefix-caching", allocator, "prefix_caching", False),
            ("continuous-batching", scheduler, "static_batching", True)]


@contextlib.contextmanager
def switched(*settings):
    """(object, attribute, value)s that hold while the block runs."""
    with contextlib.ExitStack() as stack:
        for thing, name, value in settings:
            stack.callback(setattr, thing, name, getattr(thing, name))
            setattr(thing, name, value)
        yield


def time_ablation(llm, row):
    """(seconds from the first arrival to the last token, the seconds between two tokens of a request, all of them), with the ideas
    row.setup["off"] turned off. Prompts begin with one of a few prefixes, in turn. With chunks a step has row.setup["budget"] tokens; without
    them it must hold the longest prompt, and the decodes beside it."""
    engine, scheduler, setup = llm.engine, llm.engine.scheduler, row.setup
    whole = "chunked-prefill" in setup["off"]
    if setup["whole"] > scheduler.max_num_batched_tokens or setup["seqs"] > scheduler.max_num_seqs:
        raise TinyVLLMError(f"it needs {setup['whole']} tokens a step and {setup['seqs']} sequences, here are {scheduler.max_num_batched_tokens} "
                            f"and {scheduler.max_num_seqs}")
    prefixes = [random_prompt(llm, setup["shared"]) for _ in range(setup["prefixes"])]
    prompts = [prefixes[i % len(prefixes)] + prompt[setup["shared"]:] for i, prompt in enumerate(random_prompts(llm, row))]
    off = [switch for idea, *switch in switches(engine) if idea in setup["off"]]
    with switched((scheduler, "max_num_batched_tokens", setup["whole" if whole else "budget"]), (scheduler, "max_num_seqs", setup["seqs"]), *off):
        start, last, gaps = time.perf_counter(), {}, []
        for output in llm.run(submit(llm, row, prompts)):
            now = time.perf_counter()
            if id(output) in last:
                gaps.append(now - last[id(output)])
            last[id(output)] = now
    return time.perf_counter() - start, gaps


def time_start(args, compiling):
    """Seconds from the start of a new process to its first token. compiling: with an empty cache of compiled kernels."""
    command = [sys.executable, tinyvllm.__file__, "--raw", "--max-tokens", "1", "--load-format", args.load_format, "Once upon a time"]
    command += ["--model", args.model] if args.model else []
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | ({"CUPY_CACHE_DIR": folder} if compiling else {})
        start = time.perf_counter()
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.read(1)
            seconds, error = time.perf_counter() - start, process.communicate()[1]
    if process.returncode:
        raise TinyVLLMError(error.decode(errors="replace").strip().rpartition("\n")[2].removeprefix("tinyvllm: "))
    return seconds


# ======================================================================================================================
# Rows: what is measured, and what stands in the table
# ======================================================================================================================
def measure_start(args, row, card):
    """Of the command line's args; there is no llm yet, which would hold the card's memory."""
    return {"value": time_start(args, "compiling" in row.setup), "unit": "s"}


def measure_decode(llm, row, card):
    """A decode step late in the run, against its floor."""
    batch, seconds = len(row.requests), time_decode(llm, row)
    best = seconds_at_best(llm.config, card, [(prompt, 2) for prompt, _ in row.requests])[1]
    return {"value": 1e3 * seconds, "unit": "ms", "best": 1e3 * best, "share": best / seconds, "tokens_per_second": batch / seconds}


def measure_output(llm, row, card):
    """New tokens of the whole run, a second."""
    return throughput(llm, row, card, sum(new for _, new in row.requests))


def measure_prefill(llm, row, card):
    """Prompt tokens of the whole run, a second."""
    return throughput(llm, row, card, sum(prompt for prompt, _ in row.requests))


def throughput(llm, row, card, tokens):
    """So many tokens over the time of the whole run."""
    seconds, figures = time_run(llm, row)
    best = sum(seconds_at_best(llm.config, card, row.requests))
    return {"value": tokens / seconds, "unit": "tokens/s", "best": tokens / best, "share": best / seconds, **figures}


def measure_shared_prefix(llm, row, card):
    """Time to the last first token."""
    return {"value": 1e3 * time_shared_prefix(llm, row), "unit": "ms"}


def measure_stall(llm, row, card):
    """How long a long prompt holds up the others."""
    between, first = time_stall(llm, row)
    return {"value": 1e3 * between, "unit": "ms", "long_prompt_first_token_ms": 1e3 * first}


def measure_ablation(llm, row, card):
    """New tokens a second, and the 99th percentile of the time between two of a request."""
    seconds, gaps = time_ablation(llm, row)
    return {"value": sum(new for _, new in row.requests) / seconds, "unit": "tokens/s", "between_tokens_p99_ms": 1e3 * float(np.percentile(gaps, 99))}


def measure(row, llm, card=None):
    """A row's figures, of its second run: the first one warms up."""
    row.measure(llm, row, card)
    return row.measure(llm, row, card)


def print_row(name, row, figures):
    """One line of the table; two for the mix."""
    digits = 0 if figures["unit"] == "tokens/s" else 3
    best = f"{figures['best']:>10,.{digits}f} {figures['share']:>6.0%}" if "best" in figures else ""
    more = {"tokens_per_second": "  {:,.0f} tokens/s", "long_prompt_first_token_ms": "the long one's first token after {:,.0f} ms",
            "between_tokens_p99_ms": "p99 between tokens {:,.2f} ms"}
    rate = "".join(text.format(figures[key]) for key, text in more.items() if key in figures)
    print(f"{name:<30} {row.what:<56} {figures['value']:>10,.{digits}f} {figures['unit']:<8}{best}{rate}".rstrip(), flush=True)
    if name.startswith("mix"):
        def percentiles(time):
            return ", ".join(f"p{percent} {1e3 * figures[f'{time}_p{percent}']:,.1f}" for percent in (50, 99))
        print(f"{'':<30} ms to first token {percentiles('time_to_first_token')}; ms a token {percentiles('time_per_output_token')}; "
              f"{figures['preemptions']} preemptions; GPU busy {figures['gpu_busy']:.1%}", flush=True)


def run_bench(args):
    """Measures all rows, one, or those whose names begin alike, and prints a table; returns the exit code."""
    rows = bench_rows()
    if args.bench != "all":
        rows = {name: row for name, row in rows.items() if name == args.bench or args.bench not in rows and name.startswith(f"{args.bench}-")}
    if not rows:
        raise TinyVLLMError(f"--bench has no row {args.bench}, known are {', '.join(bench_rows())}")
    if args.json:
        check_writable("--json", args.json)
    if isinstance(tinyvllm.open_device(args.device), CpuDevice):
        raise TinyVLLMError("--bench wants an NVIDIA GPU: in the simulator its figures would say nothing")
    # New processes first, while this one does not hold the card's memory.
    results = {name: measure(row, args) for name, row in rows.items() if row.measure is measure_start}
    llm = tinyvllm.open_llm(args)
    card = measure_card(llm)
    print(f"{card['name']}: reads {card['bytes_per_second'] / 1e9:,.0f} GB/s, multiplies {card['operations_per_second'] / 1e12:,.0f} TFLOP/s in "
          f"bf16; {args.model or 'default model'} has {weight_bytes(llm.config) / 1e9:.2f} GB of weights\n\n"
          f"{'row':<30} {'':<56} {'measured':>10} {'':<8}{'at best':>10} {'share':>6}", flush=True)
    for name, row in rows.items():
        try:
            results[name] = results.get(name) or measure(row, llm, card)
            print_row(name, row, results[name])
        except TinyVLLMError as error:
            print(f"{name:<30} {row.what:<56} not measured: {error}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"card": card, "model": args.model, "rows": results}, indent=2), "utf-8")
    return 0
