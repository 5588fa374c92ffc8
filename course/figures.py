"""The figures, tables and quoted code of README.md and the chapters: everything that a mark may name.

A measured figure comes from h200.json, or from the file that its mark names; a prediction from the
engine's own scheduler and arithmetic; a moment of a run from Parrot in the simulator; a quotation from
the source. So nobody types a figure, and
a change of the engine changes the course.
"""
import ast
import contextlib
import io
import json
import re
import shlex
import sys
import textwrap
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tinyvllm
import views
from bench import bench_rows, step_at_best
from tinyvllm import BlockAllocator, RequestOutput, SamplingParams, Scheduler, Sequence, cdiv
from tinyvllm import decode_weight_bytes, kv_bytes_per_token        # noqa: F401, for the chapters' marks
from weights import SHAPES

COURSE = Path(__file__).resolve().parent
ROOT = COURSE.parent
COMMAND = (".venv/bin/python bench.py --model llama-3.2-1b --load-format dummy "
           "--json course/h200.json")           # wrote h200.json
MEASURED = json.loads((COURSE / "h200.json").read_text("utf-8"))
CARD = MEASURED["card"]
ROWS = MEASURED["rows"]                         # name -> figures
BENCH = bench_rows()                            # name -> what is measured
ABLATION = [name for name, row in BENCH.items() if name in ROWS and row.setup.keys() >= {"off", "prefixes"}]
MIX = BENCH["mix"].requests                     # (prompt tokens, new tokens) of each
LLAMA = SHAPES["llama-3.2-1b"]                  # the model of h200.json


# ======================================================================================================
# Measured figures
# ======================================================================================================
def figure(row, key="value", scale=1, digits=0):
    """A figure of h200.json."""
    return f"{ROWS[row][key] * scale:,.{digits}f}"


def ms(row):
    """A row's milliseconds."""
    assert ROWS[row]["unit"] == "ms"
    return figure(row, digits=2)


def rate(row):
    """A row's tokens a second."""
    key = "value" if ROWS[row]["unit"] == "tokens/s" else "tokens_per_second"
    return figure(row, key)


def times(row, other, key="value"):
    """How many times as large a row's figure is as another row's."""
    return f"{ROWS[row][key] / ROWS[other][key]:.1f}"


def reads(card=CARD):
    """The card's bandwidth."""
    return f"{card['bytes_per_second'] / 1e9:,.0f} GB/s"


def multiplies(card=CARD):
    """The card's rate of bfloat16 arithmetic."""
    return f"{card['operations_per_second'] / 1e12:,.0f} TFLOP/s"


def crossing():
    """Tokens in a step from which on arithmetic takes longer than reading the weights: for each weight,
    a step reads two bytes and computes two operations a token."""
    return round(CARD["operations_per_second"] / CARD["bytes_per_second"])


def shown(figures):
    """A row's value and unit, without digits that nobody has measured."""
    digits = None if figures["unit"] == "tokens/s" else 3
    return f"{round(figures['value'], digits):,} {figures['unit']}"


def table(columns, rule, rows, above=None):
    """A table in Markdown. columns, rule: its first two lines; rows: lists of cells; above: a text."""
    text = [] if above is None else ["", textwrap.fill(above, 100, break_on_hyphens=False)]
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([*text, "", columns, rule, *lines, ""])


def bench_table(*names, rows=ROWS):
    """Rows as bench.py prints them."""
    lines = []
    for name in names:
        row = rows[name]
        digits = 0 if row["unit"] == "tokens/s" else 3
        best = f"{row['best']:,.{digits}f} | {row['share']:.0%}" if "best" in row else "|"
        lines.append([f"`{name}`", BENCH[name].what, shown(row), best])
    return table("| row | | measured | at best | share |", "| --- | --- | ---: | ---: | ---: |", lines)


def kept(name):
    """The content of a file with figures beside this one."""
    return json.loads((COURSE / name).read_text("utf-8"))


def readme_table():
    """The cards, and the rows of README.md: of a small model, and of a large one."""
    names = ["start", "decode-1-128", "decode-64-4000", "decode-256-1000", "batch-32", "batch-256",
             "prefill-1-2048", "prefill-1-16384", "mix"]
    head = (f"Some rows of {MEASURED['model']} on an {CARD['name']} (reads {reads()}, multiplies "
            f"{multiplies()} in bf16; {MEASURED['date']}):")
    return f"\n{head}\n{bench_table(*names)}{large_table('h100-8b.json')}"


def large_table(name):
    """The rows of a file, under a line on card, model and date."""
    large = kept(name)
    card = large["card"]
    names = ["decode-1-128", "decode-64-4000", "decode-256-1000", "batch-256", "prefill-1-2048", "mix"]
    head = (f"And of {large['model']} on an {card['name']} (reads {reads(card)}, multiplies "
            f"{multiplies(card)} in bf16; {large['date']}):")
    return f"\n{head}\n{bench_table(*names, rows=large['rows'])}"


def times_as_fast(unit, before, after):
    """How many times as fast a figure is as another: a rate in tokens/s, or a time."""
    ratio = after / before if unit == "tokens/s" else before / after
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def peers_table(ours_name, peers_name, *names):
    """Two engines on rows that both files have, of one card and one model. No names: all such rows. In
    brackets: the ratio on another card, where the second file has rates of both engines there."""
    ours = kept(ours_name)
    peers = kept(peers_name)
    assert (ours["card"]["name"], ours["model"]) == (peers["card"]["name"], peers["model"]), "two cards"
    head = f"{peers['model']} on an {peers['card']['name']}, {peers['date']}. {peers.get('note', '')}"
    rows = []
    for name in names or [name for name in BENCH if name in ours["rows"] and name in peers["rows"]]:
        our = ours["rows"][name]
        their = peers["rows"][name]
        assert our["unit"] == their["unit"], name
        ratio = times_as_fast(our["unit"], their["value"], our["value"])
        if "elsewhere" in their:
            ratio += f" ({times_as_fast(our['unit'], *their['elsewhere'])})"
        rows.append([f"`{name}`", BENCH[name].what, shown(our), shown(their), ratio])
    return table(f"| row | | tiny-vLLM | {peers['engine']} {peers['version']} | times as fast |",
                 "| --- | --- | ---: | ---: | ---: |", rows, head)


def server_table(name, *chosen):
    """Rows of a file on the server: the lowest and the highest rate of some runs each. chosen: their
    numbers."""
    found = kept(name)
    head = f"{found['model']} on an {found['card']['name']}, {found['date']}. {found['note']}"
    rows = []
    for row in [found["rows"][i] for i in chosen]:
        rates = sorted({row["lowest"], row["highest"]})
        rows.append([row["what"], " to ".join(f"{rate:,}" for rate in rates)])
    return table("| where the engine steps | tokens/s |", "| --- | ---: |", rows, head)


def ranks_table(name, *chosen):
    """Rows of a file on one GPU and on two, with the second figure's gain. chosen: their numbers; none: all
    rows."""
    found = kept(name)
    head = f"{found['model']} on {found['card']['name']} cards, {found['date']}. {found['note']}"
    rows = []
    for row in [found["rows"][i] for i in chosen] or found["rows"]:
        cells = [shown({"value": value, "unit": row["unit"]}) for value in row["values"]]
        rows.append([row["what"], *cells, times_as_fast(row["unit"], *row["values"])])
    return table("| | 1 GPU | 2 GPUs | times as fast |", "| --- | ---: | ---: | ---: |", rows, head)


def fp8_table(name, *models, chosen=()):
    """Rows of a file on FP8: in bfloat16, with FP8 weights, and with an FP8 cache besides. A table for
    each model; no models: all of the file. chosen: numbers of rows; none: all rows. A dash: not measured."""
    found = kept(name)
    tables = ""
    for model in models or found["models"]:
        head = f"{model} on an {found['card']['name']}, {found['date']}. {found['note']}"
        rows = []
        every = found["models"][model]
        for row in [every[i] for i in chosen] or every:
            cells = ["-" if value is None else shown({"value": value, "unit": row["unit"]})
                     for value in row["values"]]
            rows.append([row["what"], *cells])
        tables += table("| | bfloat16 | FP8 weights | FP8 weights and cache |",
                        "| --- | ---: | ---: | ---: |", rows, head)
    return tables


def accuracy_table(name):
    """The rows of a file on accuracy, as `bench.py accuracy --json` writes them."""
    found = kept(name)
    rows = [[row["what"], f"{row['value']:.3f} nats", f"{row['perplexity']:.2f}",
             f"{row['perplexity_bf16']:.2f}", f"{row['same_best_token']:.0%}"] for row in found["rows"]]
    return table("| | mean KL divergence | perplexity | perplexity in bfloat16 | same most probable token |",
                 "| --- | ---: | ---: | ---: | ---: |", rows, found["note"])


def fp8_gain(name, model, row, column):
    """How many times as fast FP8 is as bfloat16 in a row of a file on FP8. column: 1 or 2, of the values."""
    found = kept(name)["models"][model][row]
    return times_as_fast(found["unit"], found["values"][0], found["values"][column])


def fp8_attention_table(name):
    """The attention kernels of a file on FP8, with a cache in bfloat16 and in FP8."""
    rows = [[f"`{row['kernel']}`", row["what"], *(f"{value} \u00b5s" for value in row["values"])]
            for row in kept(name)["attention"]]
    return table("| kernel | work | cache in bfloat16 | cache in FP8 |", "| --- | --- | ---: | ---: |", rows)


def sums_table(name):
    """The rows of a file on sums over two GPUs: by the engine's own kernel, and by NCCL."""
    found = kept(name)
    head = f"Two {found['card']['name']}, {found['date']}. {found['note']}"
    rows = [[f"{row['bytes']:,}", f"{row['ours']:g} \u00b5s", f"{row['nccl']:g} \u00b5s"]
            for row in found["rows"]]
    return table("| bytes | all_reduce of kernels.cu | NCCL |", "| ---: | ---: | ---: |", rows, head)


def sums_ms(name, model, by):
    """Milliseconds for the sums of a decode step of a sequence: two in a layer, each as slow as the smallest
    sum of the file. by: "ours" or "nccl"."""
    layers = SHAPES[model].num_hidden_layers
    return f"{2 * layers * kept(name)['rows'][0][by] / 1e3:.2f}"


def gain(name, row):
    """How many times as fast two GPUs are in a row of a file on ranks, in tokens/s or in steps."""
    found = kept(name)["rows"][row]
    return times_as_fast(found["unit"], *found["values"])


def num_chapters():
    """How many chapters the course has."""
    return len(list(COURSE.glob("*.md")))


def num_words():
    """The words of the chapters, without code and tables, rounded to thousands."""
    texts = [path.read_text("utf-8") for path in COURSE.glob("*.md")]
    other = r"^```.*?^```|^\|.*?$|<!--=.*?-->"
    words = sum(len(re.sub(other, "", text, flags=re.S | re.M).split()) for text in texts)
    return f"{round(words, -3):,}"


def command():
    """The command that wrote h200.json."""
    return f"\n```sh\n{COMMAND}\n```\n"


# ======================================================================================================
# The scheduler without a model
# ======================================================================================================
def new_sequence(token_ids, max_len):
    """A request, as the scheduler knows it."""
    return Sequence(SamplingParams(), RequestOutput(token_ids), None, max_len)


def compute(scheduler, scheduled):
    """Does to the sequences of a step what the engine does; each new token is 0."""
    for sequence, count in scheduled:
        sequence.num_computed_tokens += count
        scheduler.register_full_blocks(sequence)
        if not sequence.remaining:
            sequence.token_ids.append(0)
            if sequence.is_complete:
                scheduler.remove(sequence)


def plan(requests, budget, max_seqs, num_blocks=9999, **options):
    """The steps of requests (prompt tokens, new tokens, step of its arrival): a list of
    {request number: (tokens computed, whether this is decode)}. options: of the Scheduler."""
    scheduler = Scheduler(BlockAllocator(num_blocks, 16), budget, max_seqs, **options)
    steps = []
    arrivals = list(enumerate(requests, 1))
    numbers = {}                                # sequence -> its request's number
    while arrivals or scheduler.waiting or scheduler.running:
        while arrivals and arrivals[0][1][2] <= len(steps):
            number, (prompt, new, _) = arrivals.pop(0)
            sequence = new_sequence([number] * prompt, prompt + new)
            scheduler.waiting.append(sequence)
            numbers[sequence] = number
        step = {}
        scheduled = scheduler.schedule()
        for sequence, count in scheduled:
            is_decode = sequence.num_computed_tokens >= len(sequence.output.prompt_token_ids)
            step[numbers[sequence]] = count, is_decode
        steps.append(step)
        compute(scheduler, scheduled)
    return steps


WAVES = [(20, new, 0) for new in (4, 22, 9, 14, 18, 6, 11, 16, 5, 20, 8, 12)]
STALL = [(24, 60, 0), (30, 60, 0), (18, 60, 0), (600, 10, 8)]


def batching_steps(static):
    """The steps of the twelve requests of WAVES, four at a time."""
    return plan(WAVES, 256, 4, static_batching=static)


def waste():
    """(tokens of the mix at its end, slots if each request reserves the longest context, 2,048, slots in
    pages of 16)."""
    lengths = [prompt + new for prompt, new in MIX]
    return sum(lengths), 2048 * len(lengths), sum(16 * cdiv(n, 16) for n in lengths)


# ======================================================================================================
# The ablation, predicted
#
# The scheduler runs for real. Each of its steps takes the time of chapter 1's roofline: a card on which
# nothing costs anything but bytes and operations.
# ======================================================================================================
# The other ideas move no byte and save no operation.
PREDICTABLE = {"chunked-prefill", "prefix-caching", "continuous-batching"}


def predicted(name):
    """(tokens a second, 99th percentile of the milliseconds between two tokens) of an ablation's row."""
    return predicted_without(frozenset(BENCH[name].setup["off"]) & PREDICTABLE)


@cache
def predicted_without(off):
    """predicted(), with these ideas turned off."""
    row = BENCH["ablation-all-on"]
    setup = row.setup
    is_chunked = "chunked-prefill" not in off
    allocator = BlockAllocator(50_000, 16, "prefix-caching" not in off)
    budget = setup["budget" if is_chunked else "whole"]
    scheduler = Scheduler(allocator, budget, setup["seqs"], is_chunked, "continuous-batching" in off)
    for i, (prompt, new) in enumerate(row.requests):
        shared = [1000 + i % setup["prefixes"]] * setup["shared"]
        own = [i] * (prompt - setup["shared"])
        scheduler.waiting.append(new_sequence(shared + own, prompt + new))
    gaps = []                                   # seconds between two tokens of a request
    total = 0.0
    while scheduler.waiting or scheduler.running:
        scheduled = scheduler.schedule()
        seconds, decodes = step_seconds(scheduled)
        total += seconds
        gaps += [seconds] * decodes
        compute(scheduler, scheduled)
    return sum(new for _, new in row.requests) / total, 1e3 * float(np.percentile(gaps, 99))


def step_seconds(scheduled):
    """(seconds that a step must take, number of its decodes)."""
    tokens = rows = pairs = context = decodes = 0
    for sequence, count in scheduled:
        start = sequence.num_computed_tokens
        tokens += count
        pairs += count * start + count * (count + 1) / 2
        context += start + count
        if count == sequence.remaining:
            rows += 1
            if start >= len(sequence.output.prompt_token_ids):
                decodes += 1
    return step_at_best(LLAMA, CARD, tokens, rows, pairs, context), decodes


def share_predicted(name):
    """What is left of the predicted rate of all ideas, in an ablation's row."""
    return f"{predicted(name)[0] / predicted('ablation-all-on')[0]:.0%}"


def share_measured(name):
    """The same of the measured rates."""
    return f"{ROWS[name]['value'] / ROWS['ablation-all-on']['value']:.0%}"


def ablation_table():
    """The worth of each idea, predicted and measured."""
    rows = []
    all_on = ROWS["ablation-all-on"]["value"]
    for name in ABLATION:
        what = BENCH[name].what.partition(": ")[2]
        rate, gap = predicted(name)
        value = ROWS[name]["value"]
        measured_gap = ROWS[name]["between_tokens_p99_ms"]
        rows.append([what, f"{rate:,.0f}", f"{gap:.2f} ms", f"{value:,.0f}", f"{value / all_on:.0%}",
                     f"{measured_gap:.2f} ms"])
    return table("| row | predicted tokens/s | p99 between two tokens | measured tokens/s | of all on | "
                 "p99 between two tokens |", "| --- | ---: | ---: | ---: | ---: | ---: |", rows)


# ======================================================================================================
# A moment of a real run
# ======================================================================================================
MOMENT = 84                 # a step of the run in which most of what can happen has just happened


@cache
def demonstration():
    """The run of README.md's section Looking inside, at the launch of step MOMENT: (facts of the recorder,
    the frame of --watch)."""
    readme = (ROOT / "README.md").read_text("utf-8")
    command = re.search(r"tinyvllm\.py --watch(.*?)\n```", readme, re.S)[1].replace("\\\n", " ")
    model = ["--model", str(ROOT / "parrot"), "--device", "cpu"]
    args = tinyvllm.parse_arguments([*model, *shlex.split(command)])
    args.watch = False
    args.trace = None
    args.stats = False
    with contextlib.redirect_stderr(io.StringIO()):
        llm = tinyvllm.open_llm(tinyvllm.EngineArgs.from_namespace(args))
        params = SamplingParams(max_tokens=None)
        outputs = [llm.submit([tinyvllm.prompt_ids(llm, text, args)], params)[0] for text in args.prompts]
        with views.looking_inside(llm, args) as recorder:
            watch = views.Watch(recorder)
            watch.history.append((0, 0, 0, 0))
            while len(recorder.steps) < MOMENT:
                llm.engine.step()
            facts = SimpleNamespace(
                tables={r.number: (list(r.table), r.state) for r in recorder.live.values()},
                users={page: list(users) for page, users in recorder.users.items() if users},
                kept=set(recorder.kept), num_blocks=recorder.allocator.num_blocks, step=recorder.steps[-1])
            frame = watch.frame(100, 24)
            llm.abort(outputs)
    return facts, frame


def moment():
    """tables: {request number: (pages, state)}; users: {page: request numbers}; kept: cached pages without
    a user; num_blocks; step: of the recorder."""
    facts, _ = demonstration()
    return facts


# ======================================================================================================
# The source
# ======================================================================================================
def lines_of(name):
    """How many lines a file has."""
    return f"{len((ROOT / name).read_text('utf-8').splitlines()):,}"


def with_lines(table):
    """A table of files, with the lines of each file in the column behind its link."""
    return re.sub(r"\]\(([\w./]+)\) \| [\d,]* \|", lambda m: f"]({m[1]}) | {lines_of(m[1])} |", table)


def length(name, function):
    """How many lines a function has."""
    tree = ast.parse((ROOT / name).read_text("utf-8"))
    [node] = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function]
    return node.end_lineno - node.lineno + 1


def code(name, first, last=None):
    """Lines of a source file: from the text `first` to the next line with `last`. Without `last`: the line
    of `first` and everything that is indented under this line."""
    text = (ROOT / name).read_text("utf-8")
    assert text.count(first) == 1, f"{name} has {first!r} {text.count(first)} times, expected once"
    lines = text[text.rfind("\n", 0, text.index(first)) + 1:].splitlines()
    if last is None:
        end = end_of_block(lines)
    else:
        end = 1 + next(i for i, line in enumerate(lines) if last in line)
    quoted = textwrap.dedent("\n".join(lines[:end])).strip("\n")
    language = "python" if name.endswith(".py") else "cpp"
    return f"\n```{language}\n{quoted}\n```\n"


def end_of_block(lines):
    """The index behind the lines that are indented under lines[0] (or under the line after a comment that
    begins there), and behind a closing brace."""
    def depth(line):
        return len(line) - len(line.lstrip())

    end = 1
    while lines[end - 1].lstrip().startswith(("//", "#")):
        end += 1
    while end < len(lines) and (not lines[end].strip() or depth(lines[end]) > depth(lines[0])):
        end += 1
    if end < len(lines) and lines[end].strip() == "}":
        end += 1
    return end
