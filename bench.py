"""The engine's speed on an NVIDIA GPU, beside the speed that the card allows.

    python bench.py --model llama-3.2-1b --load-format dummy        every row of the table
    python bench.py mix                                             one row
    python bench.py ablation --json figures.json                    the rows with names that begin so

First the card is measured: bytes read from memory a second, and operations of matrix products a
second. A kernel takes at least the longer of two times: its bytes over the first rate, and its
operations over the second rate. The kernels of a step run one after another, so the floor of a step is
the sum over its kernels. The table shows each figure beside its floor. A step of 256 sequences with a
context of 1,001 (Llama-3.2-1B; 4,532 GB/s and 734 TFLOP/s of an H200; the longer time counts):

    products of 16 layers     1.95 GB: 0.43 ms      498 G operations: 0.68 ms
    attention                 8.40 GB: 1.85 ms       34 G operations: 0.05 ms
    head                      0.53 GB: 0.12 ms      135 G operations: 0.18 ms       sum: 2.72 ms

The rows serve-* put a load on server.py, and check that nothing is lost and nothing leaks. These rows
also run in the simulator, small: python bench.py serve-soak --soak 1200 --device cpu --model parrot

Row accuracy tells what FP8 costs, on any model and text, and runs in the simulator, too:

    python bench.py accuracy --model meta-llama/Llama-3.2-1B-Instruct --quantization fp8 --text FILE

Sections: Card and floors, Rows, Measurements, New processes, Load on the server, Program.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import load
import tinyvllm
from tinyvllm import (BYTES, DummyCheckpoint, EngineArgs, SamplingParams, TinyVLLMError, cdiv,
                      kv_bytes_per_token, weight_bytes)

# ======================================================================================================
# Card and floors
# ======================================================================================================
STREAM_READ = """
// stream_read: reads memory as fast as the card can. No kernel bound by memory can be faster.
//
//   out [grid * READ_THREADS]: each thread's exclusive or of all numbers read, so that the compiler
//     can leave out no load.
//   x [rounds, 4, grid * READ_THREADS, 2]: each round, a thread loads four words of 16 bytes. All
//     four loads are in flight together.
//   Grid (any).
EXPORT(READ_THREADS, 512);

extern "C" __global__ __launch_bounds__(READ_THREADS) void stream_read(u64* out, const u64* x, int rounds) {
    struct alignas(16) Word { u64 v[2]; };
    const size_t threads = gridDim.x * READ_THREADS;
    const size_t me = blockIdx.x * READ_THREADS + threadIdx.x;
    const Word* word = reinterpret_cast<const Word*>(x) + me;
    u64 all = 0;
    for (int round = 0; round < rounds; ++round, word += 4 * threads) {
        Word loaded[4];
        for (int j = 0; j < 4; ++j) loaded[j] = word[j * threads];
        for (int j = 0; j < 4; ++j) all ^= loaded[j].v[0] ^ loaded[j].v[1];
    }
    out[me] = all;
}
"""


def measure_card(device):
    """The device's name, the rate of reading memory (bytes/s), and the rate of multiplying bfloat16
    matrices (operations/s)."""
    kernels = tinyvllm.compile_kernels(device, {}, STREAM_READ)
    rounds = 64
    thread_blocks = 4 * device.multiprocessors
    out = device.empty(thread_blocks * kernels.READ_THREADS, np.uint64)
    x = device.xp.arange(8 * rounds * out.size, dtype=np.uint64)        # 1.1 GB on an H200
    size = 8192
    checkpoint = DummyCheckpoint(device)
    a = checkpoint.take("", size, size)
    b = checkpoint.take("", size, size)

    def fastest(start_kernel):
        """Seconds of a kernel: four times the mean of 20 runs, and the least of the four."""
        means = []
        for _ in range(4):
            start = time.perf_counter()
            for _ in range(20):
                start_kernel()
            device.fetch(out[:1])()             # waits: the copy comes behind all kernels on the device
            means.append((time.perf_counter() - start) / 20)
        return min(means)

    reading = fastest(lambda: kernels.stream_read((thread_blocks,), out, x, rounds))
    multiplying = fastest(lambda: device.linear(a, b))
    return {"name": device.name, "bytes_per_second": x.nbytes / reading,
            "operations_per_second": 2 * size**3 / multiplying}


def of_several(card, count):
    """The card's figures, for `count` such cards together: each has a part of every matrix."""
    rates = {name: count * card[name] for name in ("bytes_per_second", "operations_per_second")}
    return {"name": f"{count} x {card['name']}", **rates} if count > 1 else card


def step_at_best(config, card, tokens, rows, pairs, context):
    """The least time of a step, in seconds, on a card of the given rates. tokens: of the whole step.
    rows: tokens that go through the head. pairs: how often a query meets a key. context: tokens with
    keys and values that attention reads from the cache."""
    c = config
    D = c.hidden_size
    F = c.intermediate_size

    def kernel(num_bytes, operations):
        return max(num_bytes / card["bytes_per_second"], operations / card["operations_per_second"])

    def product(num_tokens, rows, columns):
        """A weight has two bytes, and takes a multiplication and an addition for each token. In E4M3, it has
        half the bytes, and tensor cores multiply twice as fast."""
        ratio = 2 if c.quantization else 1
        return kernel(BYTES * rows * columns / ratio, 2 * num_tokens * rows * columns / ratio)

    qkv = product(tokens, c.qkv_size, D)
    # Query times key, then probability times value: two operations for each of head_dim numbers.
    attention = kernel(kv_bytes_per_token(c) / c.num_hidden_layers * context, 4 * c.heads_size * pairs)
    o = product(tokens, D, c.heads_size)
    gate_up = product(tokens, 2 * F, D)
    down = product(tokens, D, F)
    norm = kernel(BYTES * D, 0)
    head = product(rows, c.vocab_size, D)
    return c.num_hidden_layers * (qkv + attention + o + gate_up + down) + norm + head


def seconds_at_best(config, card, requests):
    """(prefill, decode): the least time, in seconds, of requests of (prompt tokens, new tokens) on a card
    of the given rates. One step computes all prompts; then all unfinished requests decode together."""
    tokens = sum(prompt for prompt, _ in requests)
    pairs = sum(prompt * (prompt + 1) / 2 for prompt, _ in requests)
    prefill = step_at_best(config, card, tokens, len(requests), pairs, context=0)
    decode = 0
    for i in range(1, max(new for _, new in requests)):
        contexts = [prompt + i for prompt, new in requests if new > i]
        batch = len(contexts)
        decode += step_at_best(config, card, batch, batch, pairs=sum(contexts), context=sum(contexts))
    return prefill, decode


def row_at_best(config, card, row):
    """The value of a row that a card of the given rates allows: milliseconds of a decode step, or tokens
    a second of a whole run."""
    if row.measure is measure_decode:
        return 1e3 * seconds_at_best(config, card, [(prompt, 2) for prompt, _ in row.requests])[1]
    return row.num_tokens / sum(seconds_at_best(config, card, row.requests))


# ======================================================================================================
# Rows
#
# A row of the table is a load and a function that measures the load. Each load runs twice, and the
# second run counts: the first run compiles kernels, records CUDA graphs and fills caches.
# ======================================================================================================
@dataclass
class BenchRow:
    """A load, and how to measure the load. All requests arrive together, and none stops early.

    measure: function (llm, row, card) -> figures: "value", "unit", and more. Rows with a floor have
    "best", the value that the card's rates allow, and "share", the part of "best" that is reached.
    measure_start and measure_accuracy take (engine_args, row), and the rows serve-* take a LoadTest: an
    LLM would hold the memory that new processes need.
    """
    measure: object
    what: str                   # for the table
    requests: list              # (prompt tokens, new tokens) of each
    params: dict = field(default_factory=dict)      # of SamplingParams; none: greedy
    setup: dict = field(default_factory=dict)       # more for `measure`; "off": ideas to turn off

    @property
    def num_tokens(self):
        """The tokens that count: of the answers, or of the prompts if each answer is only one token."""
        new = sum(new for _, new in self.requests)
        return new if new > len(self.requests) else sum(prompt for prompt, _ in self.requests)


def bench_rows():
    """{name: BenchRow}, in the order of the table."""
    rows = {}

    def add(name, measure, what, requests, params=None, **setup):
        rows[name] = BenchRow(measure, what, requests, params or {}, setup)

    mix = mix_requests()
    add("start", measure_start, "new process to first token, kernels compiled before", [])
    add("start-compiling", measure_start, "the same, kernels not compiled before", [], compiling=True)
    add("start-from-file", measure_start, "as start, weights from a folder (page cache warm)", [],
        from_file=True)
    add("accuracy", measure_accuracy, "FP8 against bfloat16, on a text: mean KL divergence", [])
    rows |= server_rows(load.Sizes())
    shapes = [(1, 128), (1, 640), (1, 2048), (1, 16384), (4, 128), (8, 128), (64, 4000), (256, 1000)]
    for batch, context in shapes:
        what = f"a decode step, {batch} x context {context:,}"
        add(f"decode-{batch}-{context}", measure_decode, what, [(context, 256)] * batch)
    for batch in 8, 32, 128, 256:
        add(f"batch-{batch}", measure_run, f"{batch} x (prompt 128, 256 new)", [(128, 256)] * batch)
    add("batch-256-sampled", measure_run, "the same, temperature 0.8, top_p 0.95, top_k 50",
        [(128, 256)] * 256, {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": 1})
    for batch, prompt in (1, 2048), (1, 3500), (1, 8192), (1, 16384), (16, 1024):
        what = f"{batch} x (prompt {prompt:,}, 1 new)"
        add(f"prefill-{batch}-{prompt}", measure_run, what, [(prompt, 1)] * batch)
    add("mix", measure_run, "256 x (prompt 100 to 1,024, 100 to 1,024 new)", mix)
    add("mix-sampled", measure_run, "the same, temperature 0.6", mix, {"temperature": 0.6, "seed": 1})
    add("mix-small-pool", measure_run, "the mix in a tenth of the pages that it fills", mix, pool=0.1)
    add("shared-prefix", measure_shared_prefix, "63 x (prompt 2,000 cached + 32): last one's first token",
        [(2032, 1)] * 63, shared=2000)
    for budget in 512, 1024, 2048, 4096:
        what = f"32 decode, 16,384 come in, {budget:,} a step: p99 a token"
        add(f"long-prompt-stall-{budget}", measure_stall, what, [(128, 1024)] * 32,
            budget=budget, prompt=16384)
    return rows | ablation_rows(mix)


def mix_requests():
    """The lengths of nano-vllm's benchmark. That program draws the ids of each prompt after the
    prompt's length, and the lengths of all answers after all prompts."""
    draw = random.Random(0).randint
    prompts = []
    for _ in range(256):
        prompt = draw(100, 1024)
        prompts.append(prompt)
        for _ in range(prompt):
            draw(0, 10000)
    return [(prompt, draw(100, 1024)) for prompt in prompts]


def ablation_rows(mix):
    """A load with all ideas, without each idea, without any; and decode steps of small batches.

    The load is half of the mix. Each prompt begins with a system prompt of 1,536 tokens, and every fourth
    prompt has a document of 1,400 tokens. Only 48 requests may run at once, so that others always wait.
    48 sequences are too many for decode.cu: the small batches show the worth of fused decode.
    """
    load = []
    for i, (prompt, new) in enumerate(mix[:128]):
        document = 1400 if i % 4 == 0 else 0
        load.append((1536 + prompt + document, new))
    setup = {"prefixes": 4, "shared": 1536, "seqs": 48, "budget": 512, "whole": 4096}
    rows = {}
    for name, off in {"all-on": [], **{f"no-{idea}": [idea] for idea in IDEAS}, "all-off": IDEAS}.items():
        what = name.replace("-", " ").replace("cuda", "CUDA").replace("no continuous", "static")
        rows[f"ablation-{name}"] = BenchRow(
            measure_ablation, f"half of the mix, prefixes, documents: {what}", load,
            setup=setup | {"off": off})
    for batch in 1, 8:
        for name, off in ("", []), ("-no-fused-decode", ["fused-decode"]):
            what = f"a decode step, {batch} x context 128: {'no fused decode' if off else 'all on'}"
            rows[f"ablation-decode-{batch}{name}"] = BenchRow(
                measure_decode, what, [(128, 256)] * batch, setup={"off": off})
    return rows


# Ideas that a row can turn off.
IDEAS = ["cuda-graphs", "fused-decode", "overlap", "chunked-prefill", "prefix-caching", "continuous-batching"]


def switches(engine):
    """{idea: [(object, attribute, value while the idea is off)]}, for all IDEAS."""
    model = engine.model
    scheduler = engine.scheduler
    return {
        "cuda-graphs": [(model, "graph_sizes", ())],
        # The recorded graphs start decode.cu's kernel: without the idea, other graphs are recorded.
        "fused-decode": [(model, "decode_batch", 0), (model, "graphs", {})],
        "overlap": [(engine, "overlap", False)],
        "chunked-prefill": [(scheduler, "chunked_prefill", False)],
        "prefix-caching": [(scheduler.allocator, "prefix_caching", False)],
        "continuous-batching": [(scheduler, "static_batching", True)]}


@contextlib.contextmanager
def switched(*settings):
    """Sets attributes, by triples (object, attribute, value), for as long as the block runs."""
    with contextlib.ExitStack() as stack:
        for thing, name, value in settings:
            stack.callback(setattr, thing, name, getattr(thing, name))
            setattr(thing, name, value)
        yield


# ======================================================================================================
# Measurements
# ======================================================================================================
def random_prompt(llm, count):
    """`count` random token ids: no two prompts are alike, in this row or in another."""
    return np.random.default_rng().integers(0, llm.config.vocab_size, count).tolist()


def random_prompts(llm, row):
    """A random prompt for each of a row's requests."""
    need("context", max(prompt + new for prompt, new in row.requests), llm.max_model_len)
    return [random_prompt(llm, prompt) for prompt, _ in row.requests]


def need(what, needed, has):
    """Raises TinyVLLMError if the engine has less of something than a row needs."""
    if has < needed:
        raise TinyVLLMError(f"a {what} of {needed} is needed, this engine has {has}")


def submit(llm, row, prompts):
    """Queues a row's requests; returns the RequestOutputs."""
    params = [SamplingParams(max_tokens=new, ignore_eos=True, **row.params) for _, new in row.requests]
    return llm.submit(prompts, params)


def step_until_all_decode(llm, outputs):
    """Steps the engine until each request has more than four tokens: all prompts are read."""
    while not all(len(output.token_ids) > 4 for output in outputs):
        llm.engine.step()


def measure_decode(llm, row, card, steps=64):
    """The time of a decode step: the mean of `steps`, after all prompts are read."""
    outputs = submit(llm, row, random_prompts(llm, row))
    step_until_all_decode(llm, outputs)
    start = time.perf_counter()
    for _ in range(steps):
        llm.engine.step()
    seconds = (time.perf_counter() - start) / steps
    running = len(llm.engine.scheduler.running)
    llm.abort(outputs)
    llm.engine.step()                   # ends the aborted requests
    need("batch", len(outputs), running)
    best = row_at_best(llm.config, card, row)
    return {"value": 1e3 * seconds, "unit": "ms", "best": best, "share": best / (1e3 * seconds),
            "tokens_per_second": len(outputs) / seconds}


def measure_run(llm, row, card):
    """Tokens a second, from the first arrival to the last token; and the times of the requests."""
    seconds, busy, outputs = time_run(llm, row)
    best = row_at_best(llm.config, card, row)
    value = row.num_tokens / seconds
    figures = {"value": value, "unit": "tokens/s", "best": best, "share": value / best,
               "gpu_busy": busy / seconds, "preemptions": sum(o.num_preemptions for o in outputs)}
    first = [o.first_token_time - o.arrival_time for o in outputs]
    each = [(o.finish_time - o.first_token_time) / max(len(o.token_ids) - 1, 1) for o in outputs]
    for name, values in ("time_to_first_token", first), ("time_per_output_token", each):
        for percent in 50, 99:
            figures[f"{name}_p{percent}"] = float(np.percentile(values, percent))
    return figures


def time_run(llm, row):
    """Runs a row's requests; returns (seconds from the first arrival to the last token, seconds for
    which the device was busy, outputs). row.setup["pool"]: free pages, as a share of the pages that all
    requests fill together; not given: all pages of the engine."""
    model = llm.engine.model
    allocator = llm.engine.scheduler.allocator
    cuda = llm.device.xp.cuda
    launch = model.launch
    marks = []                                  # events on the device: (before, after) each step

    def marked_launch(batch):
        marks.append((cuda.Event(), cuda.Event()))
        before, after = marks[-1]
        before.record()
        result = launch(batch)
        after.record()
        return result

    prompts = random_prompts(llm, row)
    held = []
    if "pool" in row.setup:
        filled = sum(cdiv(prompt + new, allocator.block_size) for prompt, new in row.requests)
        held = allocator.allocate(max(0, len(allocator.free) - int(row.setup["pool"] * filled)))
    with switched((model, "launch", marked_launch)):
        start = time.perf_counter()
        outputs = submit(llm, row, prompts)
        for _ in llm.run(outputs):
            pass
        seconds = time.perf_counter() - start
    allocator.release(held)
    busy = sum(cuda.get_elapsed_time(before, after) for before, after in marks) / 1e3
    return seconds, busy, outputs


def measure_shared_prefix(llm, row, card):
    """Time until every request has a first token. All prompts begin with the same tokens, and the cache
    has the keys and values of these tokens."""
    shared = row.setup["shared"]
    one = SamplingParams(max_tokens=1, ignore_eos=True)
    prefix = random_prompt(llm, shared)
    llm.generate(prefix + random_prompt(llm, 1), one)
    outputs = llm.submit([prefix + random_prompt(llm, prompt - shared) for prompt, _ in row.requests], one)
    for _ in llm.run(outputs):
        pass
    return {"value": 1e3 * max(o.first_token_time - o.arrival_time for o in outputs), "unit": "ms"}


def measure_stall(llm, row, card):
    """How long a long prompt holds up the running requests, with row.setup["budget"] tokens a step: the
    99th percentile of the time between two tokens of a request while the prompt comes in."""
    scheduler = llm.engine.scheduler
    budget = row.setup["budget"]
    prompt = row.setup["prompt"]
    need("--max-num-batched-tokens", budget, scheduler.max_num_batched_tokens)
    need("context", prompt + 1, llm.max_model_len)
    with switched((scheduler, "max_num_batched_tokens", budget), (scheduler, "max_prefill_tokens", budget)):
        running = submit(llm, row, random_prompts(llm, row))
        step_until_all_decode(llm, running)
        [long] = llm.submit([random_prompt(llm, prompt)], SamplingParams(max_tokens=1, ignore_eos=True))
        times = [time.perf_counter()]
        while not long.finish_reason:
            llm.engine.step()                   # brings every running request a token
            times.append(time.perf_counter())
        llm.abort(running)
        llm.engine.step()                   # ends the aborted requests
    return {"value": 1e3 * float(np.percentile(np.diff(times), 99)), "unit": "ms",
            "long_prompt_first_token_ms": 1e3 * (long.first_token_time - long.arrival_time)}


def measure_ablation(llm, row, card):
    """New tokens a second, and the 99th percentile of the time between two tokens of a request.

    A few prefixes take turns at the beginning of the prompts. With chunks a step has
    row.setup["budget"] tokens. Without chunks a step must hold the longest prompt beside the decodes:
    row.setup["whole"] tokens.
    """
    scheduler = llm.engine.scheduler
    setup = row.setup
    need("--max-num-batched-tokens", setup["whole"], scheduler.max_num_batched_tokens)
    need("--max-num-seqs", setup["seqs"], scheduler.max_num_seqs)
    prefixes = [random_prompt(llm, setup["shared"]) for _ in range(setup["prefixes"])]
    prompts = random_prompts(llm, row)
    for i, prompt in enumerate(prompts):
        prompt[:setup["shared"]] = prefixes[i % len(prefixes)]
    budget = setup["budget"] if scheduler.chunked_prefill else setup["whole"]
    last_times = {}                             # id of an output -> time of the latest token
    gaps = []
    with switched((scheduler, "max_num_batched_tokens", budget), (scheduler, "max_prefill_tokens", budget),
                  (scheduler, "max_num_seqs", setup["seqs"])):
        start = time.perf_counter()
        for output in llm.run(submit(llm, row, prompts)):
            now = time.perf_counter()
            if id(output) in last_times:
                gaps.append(now - last_times[id(output)])
            last_times[id(output)] = now
        seconds = time.perf_counter() - start
    return {"value": sum(new for _, new in row.requests) / seconds, "unit": "tokens/s",
            "between_tokens_p99_ms": 1e3 * float(np.percentile(gaps, 99))}


# ======================================================================================================
# New processes
# ======================================================================================================
def measure_start(engine_args, row):
    """Time from the start of a new process to the first token. The first of two processes fills the
    caches of kernels and files; the second process counts. row.setup["compiling"]: each process has an
    empty cache of compiled kernels. row.setup["from_file"]: the weights come from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        if "from_file" in row.setup:
            if engine_args.load_format != "dummy":
                raise TinyVLLMError("row start reads weights from files already, this row needs "
                                    "--load-format dummy")
            in_new_process(write_model, engine_args, Path(folder))
            engine_args = replace(engine_args, model=folder, load_format="auto")
        for cache in "first", "second":
            environment = {"CUPY_CACHE_DIR": f"{folder}/{cache}"} if "compiling" in row.setup else {}
            seconds = time_start(engine_args, environment)
    return {"value": seconds, "unit": "s"}


def time_start(engine_args, environment):
    """Seconds from the start of a new process to the first token."""
    command = [sys.executable, tinyvllm.__file__, "--raw", "--max-tokens", "1", "Once upon a time",
               *command_line(engine_args)]
    pipe = subprocess.PIPE
    start = time.perf_counter()
    with subprocess.Popen(command, env=os.environ | environment, stdout=pipe, stderr=pipe) as process:
        process.stdout.read(1)
        seconds = time.perf_counter() - start
        _, error = process.communicate()
    if process.returncode:
        last_line = error.decode(errors="replace").strip().rpartition("\n")[2]
        raise TinyVLLMError(last_line.removeprefix("tinyvllm: "))
    return seconds


NUM_BEST = 100                  # tokens whose probabilities are compared at each place of a text
WINDOW = 1024                   # tokens of a text that are one prompt


def measure_accuracy(engine_args, row):
    """What the options of FP8 do to a model's probabilities at each token of row.setup["text"]: the
    mean KL divergence from bfloat16, in nats. Tokens among the NUM_BEST of both are compared one by
    one, all others as one. So the figure is a lower bound, and close: little probability is left over."""
    plain = replace(engine_args, quantization=None, kv_cache_dtype="auto")
    if plain == engine_args:
        raise TinyVLLMError("row accuracy compares FP8 with bfloat16: expected --quantization fp8, "
                            "--kv-cache-dtype fp8 or both, got neither")
    text = row.setup["text"]
    ids, changed = in_new_process(score_text, engine_args, text)
    _, exact = in_new_process(score_text, plain, text)
    places = list(zip(ids, exact, changed))
    divergence = float(np.mean([kl_divergence(p, q) for _, p, q in places]))
    same = float(np.mean([max(p, key=p.get) == max(q, key=q.get) for _, p, q in places]))
    before = float(np.exp(-np.mean([p[i] for i, p, _ in places])))
    after = float(np.exp(-np.mean([q[i] for i, _, q in places])))
    note = (f"perplexity {after:,.3f}, bfloat16 {before:,.3f}; the most probable token is the same at "
            f"{same:.2%} of {len(ids):,} places")
    return {"value": divergence, "unit": "nats", "same_best_token": same, "perplexity": after,
            "perplexity_bf16": before, "num_tokens": len(ids), "note": note}


def score_text(engine_args, text):
    """(token ids, {token: log-probability} at each: the best tokens and the text's own), of all tokens of a
    text but the first of each window."""
    llm = tinyvllm.open_llm(replace(engine_args, max_logprobs=NUM_BEST))
    size = min(WINDOW, llm.max_model_len - 1)
    text_ids = llm.tokenizer.encode(text)
    windows = [text_ids[start:start + size] for start in range(0, len(text_ids), size)]
    ids = []
    scores = []
    for output in llm.generate(windows, SamplingParams(max_tokens=1, prompt_logprobs=NUM_BEST)):
        ids += output.prompt_token_ids[1:]
        scores += output.prompt_logprobs[1:]
    return ids, scores


def kl_divergence(p, q):
    """sum p log(p / q), over the tokens that both know, and over all others as one. p, q: {token:
    log-probability}."""
    known = p.keys() & q.keys()
    log_p = np.array([p[i] for i in known])
    log_q = np.array([q[i] for i in known])
    rest_p = max(1 - np.exp(log_p).sum(), 1e-9)
    rest_q = max(1 - np.exp(log_q).sum(), 1e-9)
    return np.exp(log_p) @ (log_p - log_q) + rest_p * np.log(rest_p / rest_q)


def command_line(engine_args):
    """The engine's options as words of a command line."""
    words = []
    for option in fields(engine_args):
        value = getattr(engine_args, option.name)
        if value != option.default:
            words.append(option.metadata["flag"] or "--" + option.name.replace("_", "-"))
            if not isinstance(value, bool):
                words.append(str(value))
    return words


def in_new_process(function, *arguments):
    """function(*arguments), computed by a new process: as it ends, the card's memory is free again."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def write_model(engine_args, folder):
    """Writes the model of --load-format dummy into a folder, in the Hugging Face layout."""
    config = write_config(engine_args, folder)
    free = shutil.disk_usage(folder).free
    if weight_bytes(config) > 0.9 * free:
        raise TinyVLLMError(
            f"the weights have {weight_bytes(config) / 1e9:.3f} GB, {folder.parent} has {free / 1e9:.3f} GB "
            "of free space: set TMPDIR to a folder on another disk")
    device = tinyvllm.open_device(engine_args.device)
    checkpoint = DummyCheckpoint(device)
    take = checkpoint.take
    tensors = {}

    def take_and_keep(name, *shape):
        tensor = take(name, *shape)
        tensors[name] = device.fetch(tensor)()
        return tensor

    checkpoint.take = take_and_keep
    tinyvllm.load_weights(checkpoint, config, device)           # takes every tensor of the model
    save_file(tensors, folder / "model.safetensors")


def write_config(engine_args, folder):
    """Writes the configuration of a model and its tokenizer into a folder, and returns the ModelConfig.
    A shape has more ids than Parrot's tokenizer: the others get a text, too, or a stream of random
    tokens would have nothing to send."""
    source, config = tinyvllm.open_config(replace(engine_args, quantization=None))
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **asdict(config)}
    values["eos_token_id"] = sorted(values.pop("eos_token_ids"))
    if config.rope_scaling:
        values["rope_scaling"]["rope_type"] = "llama3"
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    tokenizer = json.loads((source / "tokenizer.json").read_text("utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab.update({token["content"]: token["id"] for token in tokenizer["added_tokens"]})    # keeps the ids
    known = set(vocab.values())
    vocab.update({f"\u0120t{i}": i for i in range(config.vocab_size) if i not in known})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    shutil.copy(source / "tokenizer_config.json", folder)
    return config


# ======================================================================================================
# Load on the server
#
# server.py runs in a process of its own, and client processes put the load on it: see load.py. A row
# fails if an answer is lost or wrong, or if the server keeps anything when the load is over.
# ======================================================================================================
def server_rows(sizes):
    """{name: BenchRow} of the load on the server. sizes: load.Sizes."""
    return {f"serve-{name}": BenchRow(measure, what, [], setup=setup)
            for name, measure, what, setup in load.rows(sizes)}


@contextlib.contextmanager
def server_test(engine_args, sizes):
    """A LoadTest with the bench's model."""
    with tempfile.TemporaryDirectory() as folder:
        if engine_args.load_format == "dummy":
            write_config(engine_args, Path(folder))
            engine_args = replace(engine_args, model=folder)
        engine_args = replace(engine_args, num_blocks=engine_args.num_blocks or sizes.num_blocks)
        offline = in_new_process(measure_offline, engine_args, sizes)
        command = [sys.executable, str(Path(__file__).with_name("server.py")), "--port", "0", "--log-level",
                   "error", "--max-waiting", str(sizes.streams), *command_line(engine_args)]
        with load.LoadTest(command, offline, sizes) as test:
            yield test


def measure_offline(engine_args, sizes):
    """What the engine does without a server: load.Offline."""
    llm = tinyvllm.open_llm(engine_args)
    row = BenchRow(None, "", [(sizes.prompt, sizes.new)] * sizes.streams)
    runs = []
    for _ in range(1 + load.NUM_RUNS):
        prompts = random_prompts(llm, row)
        start = time.perf_counter()
        for _ in llm.run(submit(llm, row, prompts)):
            pass
        runs.append(time.perf_counter() - start)
    seconds = float(np.median(runs[1:]))            # the first records CUDA graphs
    first = []
    short = SamplingParams(max_tokens=2, ignore_eos=True)
    for _ in range(20):
        [output] = llm.generate([random_prompt(llm, sizes.prompt)], short)
        first.append(output.first_token_time - output.arrival_time)
    as_chat = argparse.Namespace(raw=False, system=None)
    prompts = [tinyvllm.prompt_ids(llm, question, as_chat) for question in load.QUESTIONS]
    params = SamplingParams(max_tokens=sizes.new // 2)
    together = llm.generate(prompts * cdiv(sizes.streams, len(prompts)), params)
    questions = []
    for i, ids in enumerate(prompts):
        [alone] = llm.generate([ids], params)
        is_sure = all(output.text == alone.text for output in together[i::len(prompts)])
        answer = (alone.text, alone.finish_reason, len(alone.token_ids))
        questions.append((ids, answer if is_sure else None))
    return load.Offline(row.num_tokens / seconds, 1e3 * float(np.median(first)), llm.config.vocab_size,
                        questions)


# ======================================================================================================
# Program
# ======================================================================================================
def measure_warm(llm, row, card):
    """A row's figures, of the second run."""
    off = []
    for idea in row.setup.get("off", []):
        off += switches(llm.engine)[idea]
    with switched(*off):
        row.measure(llm, row, card)
        return row.measure(llm, row, card)


def print_head(card, model, config):
    """The lines above the table."""
    line = card["name"]
    if "bytes_per_second" in card:
        line += (f": reads {card['bytes_per_second'] / 1e9:,.0f} GB/s, multiplies "
                 f"{card['operations_per_second'] / 1e12:,.0f} TFLOP/s in bf16")
    print(f"{line}; {model or 'default model'} has {weight_bytes(config) / 1e9:.2f} GB of weights\n\n"
          f"{'row':<34} {'':<56} {'measured':>10} {'':<8}{'at best':>10} {'share':>6}", flush=True)


def print_row(name, row, figures):
    """A line of the table, and for some rows a second line."""
    line = f"{name:<34} {row.what:<56} "
    if "error" in figures:
        print(f"{line}{figures['error']}", flush=True)
        return
    digits = 0 if figures["unit"] == "tokens/s" else 3
    line += f"{figures['value']:>10,.{digits}f} {figures['unit']:<8}"
    if "best" in figures:
        line += f"{figures['best']:>10,.{digits}f} {figures['share']:>6.0%}"
    for key, text in {"tokens_per_second": "  {:,.0f} tokens/s",
                      "long_prompt_first_token_ms": "the long one's first token after {:,.0f} ms",
                      "between_tokens_p99_ms": "p99 between tokens {:,.2f} ms"}.items():
        if key in figures:
            line += text.format(figures[key])
    print(line.rstrip(), flush=True)
    if "note" in figures:
        print(f"{'':<34} {figures['note']}", flush=True)
    if name.startswith("mix"):
        first = percentiles(figures, "time_to_first_token")
        each = percentiles(figures, "time_per_output_token")
        print(f"{'':<34} ms to first token {first}; ms a token {each}; {figures['preemptions']} preemptions; "
              f"GPU busy {figures['gpu_busy']:.1%}", flush=True)


def percentiles(figures, time):
    """Two percentiles of a time, in milliseconds, as text."""
    return ", ".join(f"p{percent} {1e3 * figures[f'{time}_p{percent}']:,.1f}" for percent in (50, 99))


def chosen_rows(name):
    """{name: row} of a row or of a group, the rows with names that begin so. name: None for all rows but
    accuracy, which is no speed."""
    rows = bench_rows()
    if name is None:
        rows.pop("accuracy", None)
        return rows
    if name in rows:
        return {name: rows[name]}
    group = {key: row for key, row in rows.items() if key.startswith(f"{name}-")}
    if not group:
        raise TinyVLLMError(f"the bench has no row {name}, known rows are {', '.join(rows)}")
    return group


def main(argv=None):
    """Measures rows and prints the table; returns the exit code."""
    parser = tinyvllm.ArgumentParser(prog="bench.py", description="Measure the engine's speed.")
    parser.add_argument("row", nargs="?", metavar="ROW",
                        help="a row of the table, or a group such as ablation (default: all)")
    parser.add_argument("--json", metavar="FILE", help="where to write the figures")
    parser.add_argument("--soak", type=float, default=20, metavar="S",
                        help="seconds of row serve-soak (default: %(default)s)")
    parser.add_argument("--text", metavar="FILE", default=str(tinyvllm.FOLDER / "README.md"),
                        help="of row accuracy (default: the README)")
    EngineArgs.add_to(parser)
    args = parser.parse_args(argv)
    engine_args = EngineArgs.from_namespace(args)
    rows = chosen_rows(args.row)
    if args.json:
        tinyvllm.check_writable("--json", args.json)
    device = tinyvllm.open_device(engine_args.device)
    sizes = load.Sizes()
    card = {"name": device.name}
    if not device.is_simulated:
        card = of_several(measure_card(device), engine_args.tensor_parallel_size)
    elif all(name.startswith("serve-") for name in rows):
        sizes = load.SIMULATED
        rows = {name: server_rows(sizes)[name] for name in rows}
    elif list(rows) != ["accuracy"]:
        raise TinyVLLMError("the bench needs an NVIDIA GPU: figures from the simulator say nothing (but "
                            "`bench.py serve` checks the server there, too)")
    if "accuracy" in rows:
        try:
            rows["accuracy"].setup["text"] = Path(args.text).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise TinyVLLMError(f"--text: expected a file of text, got {args.text} ({error})") from None
    if "serve-soak" in rows:
        rows["serve-soak"].setup["seconds"] = args.soak
    print_head(card, args.model, tinyvllm.open_config(engine_args)[1])
    results = measure_rows(rows, engine_args, card, sizes)
    if args.json:
        figures = {name: result for name, result in results.items() if "error" not in result}
        date = time.strftime("%Y-%m-%d")
        text = json.dumps({"card": card, "model": args.model, "date": date, "rows": figures}, indent=2)
        Path(args.json).write_text(text, "utf-8")
    return int(any(result.get("error", "").startswith("FAILED") for result in results.values()))


def measure_rows(rows, engine_args, card, sizes):
    """Measures and prints rows; returns {name: figures, or {"error": reason}}. Rows with processes of their
    own come first, while no LLM holds the card's memory."""
    results = {}

    def measure(name, function, *arguments):
        try:
            results[name] = function(*arguments)
        except TinyVLLMError as error:
            results[name] = {"error": f"not measured: {error}"}
        except load.LoadError as error:
            results[name] = {"error": f"FAILED: {error}"}
        print_row(name, rows[name], results[name])

    for name, row in rows.items():
        if row.measure in (measure_start, measure_accuracy):
            measure(name, row.measure, engine_args, row)
    served = [name for name in rows if name.startswith("serve-")]
    if served:
        with server_test(engine_args, sizes) as test:
            for name in served:
                measure(name, test.measure, rows[name].measure, rows[name].setup)
    others = [name for name in rows if name not in results]
    if others:
        llm = tinyvllm.open_llm(engine_args)
        for name in others:
            measure(name, measure_warm, llm, rows[name], card)
    return results


if __name__ == "__main__":
    tinyvllm.run_program(main)
