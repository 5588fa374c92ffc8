#!/usr/bin/env python3
"""python course/make.py: draws the course's pictures and fills in its figures, tables and code.

In README.md and the chapters, what stands between <!--= EXPRESSION --> and <!--/--> is the value of that expression: a figure that
course/h200.json holds, a table of them, arithmetic of the engine's own functions, or lines of the source. So nothing there is typed by hand, and
a test runs this again and finds nothing to change. The pictures (*.svg) are drawn from runs of Parrot in the simulator, of the scheduler or
the allocator alone, and from h200.json. That file is what `python tinyvllm.py --bench --model llama-3.2-1b --load-format dummy --json
course/h200.json` wrote on an NVIDIA H200: to have all of it for another card, run that there, and then this.
"""
import ast
import contextlib
import html
import io
import json
import math
import re
import shlex
import sys
import textwrap
import unicodedata
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np

COURSE = Path(__file__).resolve().parent
ROOT = COURSE.parent
sys.path.insert(0, str(ROOT))

import tinyvllm                                         # noqa: E402
import views                                            # noqa: E402
from bench import bench_rows, seconds_at_best, step_at_best         # noqa: E402
from tinyvllm import (SHAPES, BlockAllocator, RequestOutput, SamplingParams, Scheduler, Sequence, cdiv, decode_weight_bytes,        # noqa: E402
                      kv_bytes_per_token, rope_frequencies)

MEASURED = json.loads((COURSE / "h200.json").read_text("utf-8"))
CARD, ROWS = MEASURED["card"], MEASURED["rows"]
COMMAND = ".venv/bin/python tinyvllm.py --bench --model llama-3.2-1b --load-format dummy --json course/h200.json"
LLAMA = SHAPES["llama-3.2-1b"]
BENCH = bench_rows()
MIX = BENCH["mix"].requests


# ======================================================================================================================
# Figures, tables, code
# ======================================================================================================================
def figure(row, key="value", scale=1, digits=0):
    """A figure of h200.json."""
    return f"{ROWS[row][key] * scale:,.{digits}f}"


def ms(row):
    """A row's milliseconds."""
    assert ROWS[row]["unit"] == "ms"
    return figure(row, digits=2)


def rate(row):
    """A row's tokens a second."""
    return figure(row) if ROWS[row]["unit"] == "tokens/s" else figure(row, "tokens_per_second")


def share(row):
    """How much of its floor or ceiling a row reaches."""
    return f"{ROWS[row]['share']:.0%}"


def times(row, other, key="value"):
    """How many times as large one row's figure is as another's."""
    return f"{ROWS[row][key] / ROWS[other][key]:.1f}"


def reads():
    """The card's bandwidth."""
    return f"{CARD['bytes_per_second'] / 1e9:,.0f} GB/s"


def multiplies():
    """The card's rate of bfloat16 arithmetic."""
    return f"{CARD['operations_per_second'] / 1e12:,.0f} TFLOP/s"


def floor_ms(requests, config=LLAMA):
    """Milliseconds that a decode step must take, by the card's rates. requests: contexts."""
    return 1e3 * seconds_at_best(config, CARD, [(context, 2) for context in requests])[1]


def crossing():
    """Tokens in a step from which on arithmetic takes longer than reading the weights: one has two bytes, and two operations a token."""
    return round(CARD["operations_per_second"] / CARD["bytes_per_second"])


def unit_digits(row):
    return 0 if row["unit"] == "tokens/s" else 3


def bench_table(*names):
    """Rows as --bench prints them."""
    lines = ["", "| row | | measured | at best | share |", "| --- | --- | ---: | ---: | ---: |"]
    for name in names:
        row = ROWS[name]
        digits, has_best = unit_digits(row), "best" in row
        best = f"{row['best']:,.{digits}f} | {row['share']:.0%}" if has_best else "|"
        lines.append(f"| `{name}` | {BENCH[name].what} | {row['value']:,.{digits}f} {row['unit']} | {best} |")
    return "\n".join([*lines, ""])


def compute(scheduler, scheduled):
    """A step without a model: what the engine does to its sequences, of which each gets token 0."""
    for sequence, count in scheduled:
        sequence.num_computed_tokens += count
        scheduler.register_full_blocks(sequence)
        if not sequence.remaining:
            sequence.token_ids.append(0)
            if sequence.is_full:
                scheduler.remove(sequence)


def predicted(name):
    """(tokens a second, 99th percentile of the milliseconds between two tokens) of an ablation's row on a card that does nothing but read
    and multiply at its rates: the scheduler runs for real, and each of its steps takes what chapter 1 says."""
    off = BENCH[name].setup["off"]
    return predicted_without(tuple(idea for idea in off if idea not in ("cuda-graphs", "overlap")))        # these are all the same to it


@lru_cache(maxsize=None)
def predicted_without(off):
    """The same, without these ideas."""
    row = BENCH["ablation-all-on"]
    setup = row.setup
    scheduler = Scheduler(BlockAllocator(50_000, 16, "prefix-caching" not in off), setup["whole" if "chunked-prefill" in off else "budget"],
                          setup["seqs"], "chunked-prefill" not in off, "continuous-batching" in off)
    for i, (prompt, new) in enumerate(row.requests):
        ids = [1000 + i % setup["prefixes"]] * setup["shared"] + [i] * (prompt - setup["shared"])
        scheduler.waiting.append(Sequence(SamplingParams(), RequestOutput(ids), None, prompt + new))
    gaps, seconds = [], 0.0
    while scheduler.waiting or scheduler.running:
        tokens = rows = pairs = read = decodes = 0
        scheduled = scheduler.schedule()
        for sequence, count in scheduled:
            start, gets_token = sequence.num_computed_tokens, count == sequence.remaining
            tokens, read, pairs = tokens + count, read + start + count, pairs + count * start + count * (count + 1) / 2
            rows += gets_token
            decodes += gets_token and start >= len(sequence.output.prompt_token_ids)
        compute(scheduler, scheduled)
        step = step_at_best(LLAMA, CARD, tokens, rows, pairs, read)
        seconds += step
        gaps += [step] * decodes
    return sum(new for _, new in row.requests) / seconds, 1e3 * float(np.percentile(gaps, 99))


def ablation_table():
    """What each idea is worth: predicted, and, where h200.json has the rows, measured."""
    names, is_measured = [name for name in BENCH if name.startswith("ablation-")], "ablation-all-on" in ROWS
    lines = ["", "| row | predicted tokens/s | p99 between two tokens |", "| --- | ---: | ---: |"]
    if is_measured:
        lines = ["", f"{lines[1]} measured tokens/s | of all on | p99 between two tokens |", f"{lines[2]} ---: | ---: | ---: |"]
    for name in names:
        rate, gap = predicted(name)
        line = f"| {BENCH[name].what.partition(': ')[2]} | {rate:,.0f} | {gap:.2f} ms |"
        if name in ROWS:
            value = ROWS[name]["value"]
            line += f" {value:,.0f} | {value / ROWS['ablation-all-on']['value']:.0%} | {ROWS[name]['between_tokens_p99_ms']:.2f} ms |"
        lines.append(line)
    return "\n".join([*lines, ""])


def command():
    """What wrote h200.json."""
    return f"\n```sh\n{COMMAND}\n```\n"


def lines_of(name):
    """How many lines a file has."""
    return f"{len((ROOT / name).read_text('utf-8').splitlines()):,}"


def length(name, function):
    """How many lines a function has."""
    [node] = [node for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8"))) if isinstance(node, ast.FunctionDef) and node.name == function]
    return node.end_lineno - node.lineno + 1


def code(name, first, last=None):
    """Lines of a source file: from where the text `first` is to the next line that has `last`; default: all that is indented under it."""
    text = (ROOT / name).read_text("utf-8")
    assert text.count(first) == 1, f"{name} has {first!r} {text.count(first)} times, expected is once"
    lines = text[text.rfind("\n", 0, text.index(first)) + 1:].splitlines()
    if last is None:
        depth = len(lines[0]) - len(lines[0].lstrip())
        inside = [not line.strip() or len(line) - len(line.lstrip()) > depth for line in lines[1:]] + [False]
        end = 1 + inside.index(False) + (lines[1 + inside.index(False)].strip() == "}")
    else:
        end = 1 + next(i for i, line in enumerate(lines) if last in line)
    quoted = textwrap.dedent("\n".join(lines[:end])).strip("\n")
    return f"\n```{'python' if name.endswith('.py') else 'cpp'}\n{quoted}\n```\n"


# ======================================================================================================================
# Drawing
# ======================================================================================================================
HUES = re.findall(r'"(#\w+)"', re.search(r"const HUES = \[(.*?)\]", views.PAGE)[1])
STYLE = """text{font:13px system-ui,sans-serif;fill:#24292f}.s{font-size:11px;fill:#57606a}.d{fill:#10131a}.m{font-family:ui-monospace,monospace}
.l{stroke:#8c959f;fill:none}.f{fill:#d0d7de}.k{fill:#24292f}.r{stroke:#c2410c;fill:none}.t{text-anchor:middle}.e{text-anchor:end}.b{font-weight:600}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.s{fill:#9da7b1}.d{fill:#10131a}.f{fill:#3a424e}.k{fill:#e6edf3}.r{stroke:#fb923c}}"""


def attribute(name, value):
    """ name="value", or nothing."""
    return f' {name}="{value}"' if value else ""


class Picture:
    """An SVG that reads well on light and on dark."""

    def __init__(self, width, height, title):
        self.width, self.height, self.title, self.parts = width, height, title, []

    def rect(self, x, y, width, height, fill=None, kind="", more=""):
        color = attribute("fill", fill) + attribute("class", kind)
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"{color}{more}/>')

    def text(self, x, y, text, kind=""):
        self.parts.append(f'<text x="{x:g}" y="{y:g}"{attribute("class", kind)}>{html.escape(str(text), quote=False)}</text>')

    def line(self, points, kind="l", width=1, more=""):
        points = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline points="{points}" class="{kind}" stroke-width="{width}"{more}/>')

    def cell(self, x, y, width, height, fill, text="", kind="t d"):
        """A box with a text in its middle."""
        self.rect(x, y, width, height, fill, "" if fill else "f", ' rx="2"')
        if text != "":
            self.text(x + width / 2, y + height / 2 + 4, text, kind)

    def __str__(self):
        return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}" '
                f'role="img"><title>{html.escape(self.title, quote=False)}</title><style>{STYLE}</style>\n' + "\n".join(self.parts) + "\n</svg>\n")


def hue(number):
    """The colour of a request, from 1 on."""
    return HUES[(number - 1) % len(HUES)]


def letter(number):
    return chr(ord("A") + (number - 1) % 26)


@lru_cache(maxsize=None)
def demonstration(step):
    """The run of README.md's first command, as it stood when a step was launched: (recorder's facts then, the frame of --watch)."""
    command = re.search(r"tinyvllm\.py --watch(.*?)\n```", (ROOT / "README.md").read_text("utf-8"), re.S)[1].replace("\\\n", " ")
    args = tinyvllm.parse_arguments(["--model", str(ROOT / "parrot"), "--device", "cpu", *shlex.split(command)])
    args.watch = args.trace = None
    args.stats = False
    with contextlib.redirect_stderr(io.StringIO()):
        llm = tinyvllm.open_llm(args)
        [*outputs] = [llm.add_request(tinyvllm.prompt_ids(llm, text, args), SamplingParams(max_tokens=None)) for text in args.prompts]
        with views.looking_inside(llm, args) as recorder:
            watch = views.Watch(recorder)
            watch.history.append((0, 0, 0, 0))
            while len(recorder.steps) < step:
                llm.engine.step()
            tables = {r.number: (list(r.table), r.state) for r in recorder.live.values()}
            facts = SimpleNamespace(tables=tables, users={page: list(users) for page, users in recorder.users.items() if users},
                                    kept=set(recorder.kept), num_blocks=recorder.allocator.num_blocks, step=recorder.steps[-1])
            frame = watch.frame(100, 24)
            llm.abort(outputs)
    return facts, frame


MOMENT = 84                             # a step of that run in which most of what can happen has just happened


def moment():
    """The facts of that step."""
    return demonstration(MOMENT)[0]


def draw_pool():
    """The page pool and the block tables, as they stood."""
    facts = moment()
    picture, size, across = Picture(860, 268, "The page pool at one moment of a run, and the block tables of the requests"), 34, 10
    picture.text(0, 16, f"The pool: {facts.num_blocks} pages of 16 tokens", "b")
    for page in range(facts.num_blocks):
        x, y, users = page % across * size, 30 + page // across * size, facts.users.get(page, [])
        for i, user in enumerate(users):
            picture.rect(x + i * (size - 3) / len(users), y, (size - 3) / len(users), size - 3, hue(user))
        if not users:
            picture.rect(x, y, size - 3, size - 3, None, "f", ' opacity="0.45"' if page not in facts.kept else "")
        label = f"\u00d7{len(users)}" if len(users) > 1 else letter(users[0]) if users else "+" if page in facts.kept else ""
        picture.text(x + (size - 3) / 2, y + 25, label, "t d" if users else "t")
        picture.text(x + 3, y + 10, page, "s d" if users else "s")
    y = 30 + cdiv(facts.num_blocks, across) * size + 20
    for i, text in enumerate(["A cell is a page, with its number and its owner's letter.",
                              "\u00d7n: n requests that begin alike share it.", "+: nobody's, but its text can still be found.",
                              f"This step computes {facts.step.decode} decode and {facts.step.prefill} prefill tokens."]):
        picture.text(0, y + 18 * i, text, "s")
    left = across * size + 40
    picture.text(left, 16, "Block tables: which page comes next?", "b")
    for row, (number, (table, state)) in enumerate(sorted(facts.tables.items())):
        y = 30 + row * 32
        picture.cell(left, y, 24, 24, hue(number), letter(number))
        picture.text(left + 32, y + 17, state, "s")
        for i, page in enumerate(table):
            picture.cell(left + 115 + i * 34, y, 31, 24, hue(number), page)
        if not table:
            picture.text(left + 115, y + 17, "no pages: it waits", "s")
    return picture


def xterm(number):
    """A colour of the 256 that terminals have, from 16 on."""
    if number >= 232:
        return "#" + f"{8 + 10 * (number - 232):02x}" * 3
    levels = [0, 95, 135, 175, 215, 255]
    return "#" + "".join(f"{levels[(number - 16) // n % 6]:02x}" for n in (36, 6, 1))


def draw_watch():
    """What --watch showed at that moment. How fast it went is left out: that is the machine's, not the run's."""
    _, frame = demonstration(MOMENT)
    picture = Picture(830, 17 * len(frame) + 26, "--watch: the page pool, the requests and the step, in a terminal")
    picture.rect(0, 0, picture.width, picture.height, "#16181d", "", ' rx="8"')
    for row, line in enumerate(frame):
        x, y, back, ink = 13, 17 * row + 26, None, "#e6e8ec"
        for part in re.split(r"(\x1b\[[0-9;]*m)", re.sub(r"  [\d.]+ tokens/s", "", line)):
            if code := re.fullmatch(r"\x1b\[([0-9;]*)m", part):
                numbers = [int(n or 0) for n in code[1].split(";")]
                back = xterm(numbers[3]) if numbers[1:3] == [48, 5] else {42: "#4e9a06", 43: "#c4a000"}.get(numbers[0])
                ink = "#10131a" if numbers[0] == 30 else {32: "#8ae234", 33: "#fce94f"}.get(numbers[0], "#e6e8ec")
            elif part:
                width = 8 * sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in part)
                if back:
                    picture.rect(x, y - 13, width, 17, back)
                picture.parts.append(f'<text x="{x}" y="{y}" class="m" xml:space="preserve" textLength="{width}" '
                                     f'style="fill:{ink};white-space:pre">{html.escape(part, quote=False)}</text>')
                x += width
    return picture


def draw_roofline():
    """The floor of a step against its tokens, both axes logarithmic, and measured steps of decode."""
    picture, most = Picture(760, 330, "How long a step of Llama-3.2-1B must take on this card, against the tokens in it"), 4096
    weights = decode_weight_bytes(LLAMA)

    def at(tokens, milliseconds):
        return 60 + 640 * math.log(tokens) / math.log(most), 270 - 240 * math.log(milliseconds / 0.25) / math.log(20 / 0.25)

    for value in 0.25, 0.5, 1, 2, 5, 10, 20:
        picture.line([at(1, value), at(most, value)], more=' opacity="0.3"')
        picture.text(52, at(1, value)[1] + 4, f"{value:g}", "s e")
    for tokens in 1, 4, 16, 64, 256, 1024, 4096:
        picture.text(at(tokens, 0.25)[0], 287, tokens, "s t")
    memory, arithmetic = 1e3 * weights / CARD["bytes_per_second"], 1e3 * weights / CARD["operations_per_second"]
    picture.line([at(1, memory), at(most, memory)], more=' stroke-dasharray="4 3"')
    picture.line([at(0.25 / arithmetic, 0.25), at(most, most * arithmetic)], more=' stroke-dasharray="4 3"')
    picture.line([at(1, memory), at(memory / arithmetic, memory), at(most, most * arithmetic)], "r", 3)
    picture.text(at(2, memory)[0], at(1, memory)[1] + 18, f"read all weights: {memory:.2f} ms, however few tokens share it")
    picture.text(at(1500, 1)[0], at(1, 7.2)[1], "multiply each token with them", "e")
    picture.text(at(memory / arithmetic, memory)[0] + 8, at(1, memory)[1] + 40, f"the two meet at {crossing()} tokens")
    for name, row in ROWS.items():
        if name in ("decode-1-128", "decode-8-128", "batch-32", "batch-128"):
            batch = len(BENCH[name].requests)
            value = row["value"] if row["unit"] == "ms" else 1e3 * row["time_per_output_token_p50"]
            x, y = at(batch, value)
            picture.rect(x - 4, y - 4, 8, 8, hue(1))
    picture.rect(60, 303, 8, 8, hue(1))
    picture.text(74, 312, "measured decode steps of 1, 8, 32 and 128 sequences, contexts of a few hundred tokens", "s")
    picture.text(8, 14, "ms a step", "s")
    picture.text(700, 312, "tokens in the step", "s e")
    return picture


def draw_tokens():
    """A text, cut by Parrot's tokenizer."""
    text, tokenizer = "A parrot repeats: \U0001f99c!", tinyvllm.Tokenizer(ROOT / "parrot")
    picture, x = Picture(760, 92, "A text in tokens: ids and their bytes"), 0
    for i, token in enumerate(tokenizer.encode(text, add_bos=False)):
        data = tokenizer.token_bytes(token)
        shown = data.decode() if data.isascii() else " ".join(f"{byte:02X}" for byte in data)
        width = max(30, 9 * len(shown) + 12)
        picture.cell(x, 8, width - 3, 30, hue(i + 1), shown.replace(" ", "\u2423") if data.isascii() else shown, "t d m")
        picture.text(x + width / 2, 54, token, "s t")
        x += width
    picture.text(0, 80, "Above: the bytes of each token (\u2423 is a space). Below: its id. The parrot is four bytes, F0 9F A6 9C.", "s")
    return picture


def draw_bf16():
    """12.34 in float32, and in bfloat16."""
    picture = Picture(760, 120, "12.34 as float32 and as bfloat16")
    bits = f"{np.float32(12.34).view(np.uint32):032b}"
    rounded = f"{np.float32(12.34).astype(tinyvllm.BFLOAT16).view(np.uint16):016b}"
    for row, (name, word) in enumerate([("float32", bits), ("bfloat16", rounded)]):
        picture.text(0, 27 + 40 * row, name)
        for i, bit in enumerate(word):
            picture.cell(75 + 21 * i, 10 + 40 * row, 19, 26, hue(1 if i == 0 else 2 if i < 9 else 3), bit, "t d m")
    value = float(np.float32(12.34).astype(tinyvllm.BFLOAT16))
    for i, text in enumerate(["sign, 8 bits of exponent, then the fraction: 23 bits or 7", f"= {value:g}"]):
        picture.text(75 + 345 * i, 67 if i else 108, text, "s" if not i else "")
    return picture


def draw_rope():
    """How often each pair turns within the original context, and what Llama 3.2 slows it by."""
    picture = Picture(760, 270, "RoPE: which pairs of a head are slowed down in Llama 3.2")
    scaled = rope_frequencies(LLAMA)
    plain = rope_frequencies(tinyvllm.replace(LLAMA, rope_scaling=None))
    slower = plain / scaled
    for i, by in enumerate(slower):
        height = 12 + 160 * math.log2(by) / 5
        picture.rect(40 + 22 * i, 210 - height, 18, height, hue(3 if by < 1.001 else 5 if by < 31.9 else 8))
        picture.text(49 + 22 * i, 226, i, "s t")
        if 1.001 < by < 31.9 or i in (0, 31):
            picture.text(49 + 22 * i, 202 - height, f"{by:.3g}", "s t")
    kept, all_slowed = int((slower < 1.001).sum()), int((slower < 31.9).sum())
    for number, x, text in ((3, 40, f"pairs 0-{kept - 1}: unchanged"), (5, 250, f"{kept}-{all_slowed - 1}: blended"),
                            (8, 430, f"{all_slowed}-31: divided by {LLAMA.rope_scaling['factor']:g}")):
        picture.rect(x, 240, 12, 12, hue(number))
        picture.text(x + 18, 251, text)
    picture.text(0, 16, "slowed down by (logarithmic)", "s")
    return picture


def draw_butterfly():
    """The sums of eight lanes in three steps."""
    picture, values = Picture(760, 220, "A butterfly: eight lanes add up in three steps"), [3, 1, 4, 1, 5, 9, 2, 6]
    for step, distance in enumerate([0, 4, 2, 1]):
        y = 20 + 60 * step
        if distance:
            values = [values[i] + values[i ^ distance] for i in range(8)]
            picture.text(610, y - 12, f"lane i adds lane i xor {distance}", "s")
        for i, value in enumerate(values):
            if distance:
                picture.line([(80 + 65 * i, y - 46), (80 + 65 * i, y - 12)])
                picture.line([(80 + 65 * (i ^ distance), y - 46), (80 + 65 * i, y - 12)], "r")
            picture.cell(62 + 65 * i, y - 12, 36, 26, hue(1 if step < 3 else 3), value)
    picture.text(0, 25, "lane 0 to 7", "s")
    picture.text(0, 205, "all know it", "s")
    return picture


def draw_step_bytes():
    """What decode steps read: weights, keys and values; and how long they took."""
    names = [name for name in ROWS if name.startswith("decode-")]
    picture = Picture(760, 30 * len(names) + 60, "What a decode step reads, and how long it takes")
    longest = max(ROWS[name]["value"] for name in names)
    for i, name in enumerate(names):
        y, requests = 10 + 30 * i, BENCH[name].requests
        weights, best, measured = 1e3 * decode_weight_bytes(LLAMA) / CARD["bytes_per_second"], ROWS[name]["best"], ROWS[name]["value"]
        picture.text(175, y + 15, f"{len(requests)} x context {requests[0][0]:,}", "e")
        scale = 520 / longest
        picture.rect(185, y, weights * scale, 12, hue(1))
        picture.rect(185 + weights * scale, y, max(best - weights, 0) * scale, 12, hue(2))
        picture.rect(185, y + 12, measured * scale, 6, None, "k")
        picture.text(190 + measured * scale, y + 19, f"{measured:.2f} ms", "s")
    y = 30 * len(names) + 30
    for x, number, text in (185, 1, "reading the weights"), (345, 2, "reading keys and values"), (530, 0, "measured"):
        picture.rect(x, y, 12, 12, hue(number) if number else None, "" if number else "k")
        picture.text(x + 18, y + 11, text)
    return picture


def waste():
    """(tokens of the mix at its end, slots reserved if each gets the longest context of 2,048, slots in pages of 16)."""
    lengths = [prompt + new for prompt, new in MIX]
    return sum(lengths), 2048 * len(lengths), sum(16 * cdiv(n, 16) for n in lengths)


def draw_waste():
    """The mix's caches, reserved whole and in pages."""
    used, reserved, paged = waste()
    picture = Picture(760, 120, "Memory for 256 requests: a reserved context each, or pages")
    for row, (name, slots) in enumerate([("2,048 slots each", reserved), ("pages of 16", paged)]):
        y, scale = 10 + 40 * row, 560 / reserved
        picture.text(120, y + 20, name, "e")
        picture.rect(130, y, slots * scale, 28, None, "f")
        picture.rect(130, y, used * scale, 28, hue(3))
        picture.text(130 + slots * scale + 8 if row else 560, y + 19, f"{1 - used / slots:.1%} wasted")
    picture.text(130, 108, f"green: the {used:,} tokens of the bench's mix when each request has its last one", "s")
    return picture


def draw_pages():
    """37 tokens in pages of 16, and where number 35 is."""
    allocator, picture = BlockAllocator(8, 16), Picture(760, 210, "A text of 37 tokens in three pages")
    allocator.allocate(2)
    table = allocator.allocate(1)
    allocator.allocate(2)
    table += allocator.allocate(2)
    picture.text(0, 16, f"block_table = {table}", "m")
    for i, page in enumerate(table):
        for offset in range(16):
            filled = 16 * i + offset < 37
            picture.cell(70 + 41 * offset, 34 + 48 * i, 38, 30, hue(5 if 16 * i + offset == 35 else 1) if filled else None,
                         16 * i + offset if filled else "", "t d")
        picture.text(0, 54 + 48 * i, f"page {page}", "b")
    slot = table[35 // 16] * 16 + 35 % 16
    picture.text(0, 196, f"token 35: page number 35 // 16 = 2 of the table is {table[2]}; slot {table[2]} * 16 + 35 % 16 = {slot}", "m")
    return picture


def draw_online():
    """Sixteen scores in four tiles: maximum, sum, and what the sum is rescaled by."""
    scores = [1.0, 0.2, 1.4, 0.7, 0.4, 2.3, 1.1, 0.5, 0.9, 0.3, 1.6, 1.2, 3.0, 0.8, 1.9, 0.6]
    picture, m, total = Picture(760, 270, "Online softmax: the running maximum and sum, tile by tile"), -math.inf, 0.0
    for tile in range(4):
        part = scores[4 * tile:4 * tile + 4]
        new = max(m, *part)
        rescale = math.exp(m - new)
        total, m = total * rescale + sum(math.exp(score - new) for score in part), new
        left = 60 + 175 * tile
        for i, score in enumerate(part):
            picture.rect(left + 38 * i, 170 - 45 * score, 32, 45 * score, hue(tile + 1))
            picture.text(left + 38 * i + 16, 165 - 45 * score, f"{score:g}", "s t")
        picture.line([(left - 8, 170 - 45 * m), (left + 152, 170 - 45 * m)], "r", 2)
        for row, text in enumerate([f"m = {m:g}", f"l \u00d7 {rescale:.3f}", f"l = {total:.3f}"]):
            picture.text(left + 10, 195 + 18 * row, text, "m")
    picture.text(0, 262, f"All at once: the sum of exp(s - {max(scores):g}) is {sum(math.exp(s - max(scores)) for s in scores):.3f}. The same.", "s")
    return picture


def plan(requests, budget, max_seqs, num_blocks=9999, **options):
    """Steps of the scheduler alone: a list of {request number: (tokens computed, was it decode)}. requests: (prompt tokens, new tokens, arrival)."""
    scheduler, steps, arrivals, numbers = Scheduler(BlockAllocator(num_blocks, 16), budget, max_seqs, **options), [], list(enumerate(requests, 1)), {}
    while arrivals or scheduler.waiting or scheduler.running:
        while arrivals and arrivals[0][1][2] <= len(steps):
            number, (prompt, new, _) = arrivals.pop(0)
            scheduler.waiting.append(Sequence(SamplingParams(), RequestOutput([number] * prompt), None, prompt + new))
            numbers[scheduler.waiting[-1]] = number
        steps.append({})
        scheduled = scheduler.schedule()
        for sequence, count in scheduled:
            steps[-1][numbers[sequence]] = count, sequence.num_computed_tokens >= len(sequence.output.prompt_token_ids)
        compute(scheduler, scheduled)
    return steps


WAVES = [(20, new, 0) for new in (4, 22, 9, 14, 18, 6, 11, 16, 5, 20, 8, 12)]


def batching_steps(static):
    """Steps that twelve requests take, four at a time."""
    return plan(WAVES, 256, 4, static_batching=static)


def draw_batching():
    """Twelve requests, four at a time: static and continuous."""
    picture, y = Picture(760, 300, "Static and continuous batching: twelve requests, four at a time"), 8
    for name, static in ("static", True), ("continuous", False):
        steps = batching_steps(static)
        picture.text(0, y + 12, f"{name}: {len(steps)} steps", "b")
        rows = [None] * 4                                       # whose row it is
        for x, step in enumerate(steps):
            for number in step:
                if number not in rows:
                    rows[next(i for i, owner in enumerate(rows) if owner not in step)] = number
            for i, number in enumerate(rows):
                width = 720 / 70
                if number in step:
                    picture.rect(width * x, y + 22 + 26 * i, width - 1, 22, hue(number), "", "" if step[number][1] else ' opacity="0.6"')
                else:
                    picture.rect(width * x, y + 22 + 26 * i, width - 1, 22, None, "f", ' opacity="0.4"')
        y += 142
    picture.text(0, 292, "A row is a place in the batch, a column a step, a colour a request; pale: its prompt. Grey: an empty place.", "s")
    return picture


STALL = [(24, 60, 0), (30, 60, 0), (18, 60, 0), (600, 10, 8)]


def draw_chunks():
    """Three requests decode, and a prompt of 600 tokens comes: in one step, and in chunks."""
    picture, y = Picture(760, 300, "A long prompt, whole and in chunks: tokens of each step"), 6
    for name, budget, options in ("whole", 1024, {"chunked_prefill": False}), ("in chunks, budget 64", 64, {}):
        steps = plan(STALL, budget, 8, **options)[:24]
        picture.text(0, y + 12, name, "b")
        for x, step in enumerate(steps):
            base = y + 126
            for decode in True, False:
                tokens = sum(count for count, is_decode in step.values() if is_decode == decode)
                height = tokens / 640 * 105 if tokens else 0
                if tokens:
                    picture.rect(30 * x, base - max(height, 1.5), 24, max(height, 1.5), hue(3 if decode else 2))
                    base -= max(height, 1.5)
            picture.text(30 * x + 12, base - 3, sum(count for count, _ in step.values()), "s t")
        y += 142
    picture.text(0, 292, "Orange: prefill tokens of the step; green: decode. While a high column is computed, everybody waits for it.", "s")
    return picture


def draw_prefix():
    """Three chats with one system prompt: block tables, and the chain."""
    allocator, picture = BlockAllocator(20, 4), Picture(760, 200, "Three requests that begin alike share their first pages")
    scheduler = Scheduler(allocator, 64, 8)
    system = [1, 2, 3, 4, 5, 6, 7, 8]
    for row, own in enumerate([[11, 12, 13, 14, 15], [21, 22, 23], [31, 32, 33, 34, 35, 36]]):
        sequence = Sequence(SamplingParams(), RequestOutput(system + own), None, 99)
        scheduler.waiting.append(sequence)
        for scheduled, count in scheduler.schedule():
            scheduled.num_computed_tokens += count
            scheduler.register_full_blocks(scheduled)
            scheduled.token_ids.append(0) if not scheduled.remaining else None
        y, x = 30 + 46 * row, 100
        picture.text(0, y + 20, f"request {letter(row + 1)}", "b")
        for i, page in enumerate(sequence.block_table):
            tokens = (system + own)[4 * i:4 * i + 4]
            shared = allocator.ref_counts[page] > 1
            picture.cell(x, y, 142, 32, hue(7) if shared or i < 2 else hue(row + 1), f"page {page}: {' '.join(map(str, tokens)) or 'next'}", "t d")
            x += 148
    picture.text(0, 16, "pages of 4 tokens; the system prompt is tokens 1 to 8", "s")
    counts = [allocator.ref_counts[page] for page in scheduler.running[0].block_table[:2]]
    picture.text(0, 185, f"Pages 0 and 1 (turquoise) are in three block tables: their reference counts are {counts[0]} and {counts[1]}.", "s")
    return picture


def draw_sampling():
    """Ten logits: probabilities at three temperatures, and where top-k and top-p cut."""
    logits, picture = np.array([4.0, 3.4, 3.0, 2.1, 1.8, 1.2, 0.9, 0.3, -0.4, -1.0]), Picture(760, 210, "Temperature, top-k and top-p on ten logits")
    for panel, temperature in enumerate([0.5, 1.0, 2.0]):
        weights = np.exp((logits - logits.max()) / temperature)
        p, left = weights / weights.sum(), 255 * panel
        nucleus = int(np.searchsorted(np.cumsum(p), 0.8) + 1)
        picture.text(left, 16, f"temperature {temperature:g}", "b")
        for i, value in enumerate(p):
            color = 3 if i < min(nucleus, 4) else 2 if i < nucleus else 1 if i < 4 else 10
            picture.rect(left + 23 * i, 150 - 150 * value, 20, max(150 * value, 1), hue(color))
        picture.line([(left + 92 - 1.5, 30), (left + 92 - 1.5, 156)], "l", 1, ' stroke-dasharray="3 3"')
        picture.line([(left + 23 * nucleus - 1.5, 40), (left + 23 * nucleus - 1.5, 156)], "r", 2)
        picture.text(left, 172, f"top_p 0.8 keeps {nucleus} (red line)", "s")
    picture.text(0, 200, "Dashed: top_k 4. Green: what both keep.", "s")
    return picture


def draw_floor():
    """Decode steps and whole runs: how much of the best that the card's rates allow is reached."""
    names = [name for name, row in ROWS.items() if "share" in row]
    picture = Picture(760, 22 * len(names) + 40, "How near to what the card's rates allow")
    for i, name in enumerate(names):
        y, part = 6 + 22 * i, ROWS[name]["share"]
        picture.text(150, y + 13, name, "e s")
        picture.rect(160, y, 540, 16, None, "f", ' opacity="0.5"')
        picture.rect(160, y, 540 * part, 16, hue(1))
        picture.text(708, y + 13, f"{part:.0%}", "s")
    picture.text(160, 22 * len(names) + 28, "the whole bar: the bytes over the card's bandwidth, or the operations over its rate", "s")
    return picture


def draw_ablation():
    """Tokens a second with one idea off at a time: predicted, and measured where h200.json has it."""
    names = [name for name in BENCH if name.startswith("ablation-")]
    picture, most = Picture(760, 40 * len(names) + 36, "What each idea is worth, in tokens a second"), max(predicted(name)[0] for name in names)
    for i, name in enumerate(names):
        picture.text(150, 25 + 40 * i, BENCH[name].what.partition(": ")[2], "e")
        for y, value, color in ((8, predicted(name)[0], None), (23, ROWS[name]["value"] if name in ROWS else 0, hue(1))):
            if value:
                picture.rect(160, y + 40 * i, 520 * value / most, 13, color, "" if color else "f")
                picture.text(166 + 520 * value / most, y + 11 + 40 * i, f"{value:,.0f}", "s")
    y = 40 * len(names) + 14
    for x, color, text in ((160, None, "predicted by the roofline"), (380, hue(1), "measured")):
        picture.rect(x, y, 12, 12, color, "" if color else "f")
        picture.text(x + 18, y + 11, text)
    return picture


PICTURES = {f"{name[5:].replace('_', '-')}.svg": draw for name, draw in list(globals().items()) if name.startswith("draw_")}
MARKED = re.compile(r"(<!--= (.+?) -->).*?(<!--/-->)", re.S)


def fill_in(text):
    """The text with the value of each expression in its place."""
    return MARKED.sub(lambda match: match[1] + str(eval(match[2], globals())) + match[3], text)


def made():
    """{path: content} of all that this script writes."""
    files = {COURSE / name: str(draw()) for name, draw in PICTURES.items()}
    for path in [ROOT / "README.md", *sorted(COURSE.glob("*.md"))]:
        try:
            files[path] = fill_in(path.read_text("utf-8"))
        except Exception as error:
            raise SystemExit(f"{path.name}: {type(error).__name__}: {error}") from error
    return files


def main():
    """Writes what has changed."""
    for path, content in made().items():
        if not path.exists() or path.read_text("utf-8") != content:
            path.write_text(content, "utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
