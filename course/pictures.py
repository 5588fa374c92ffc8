"""The pictures of the course (*.svg), drawn from figures.py's figures and runs, and from the allocator."""
import html
import math
import re
import unicodedata
from dataclasses import replace

import numpy as np

import figures
from figures import BENCH, CARD, LLAMA, ROOT, ROWS
from device import BFLOAT16
from fp8 import E4M3
from tinyvllm import BlockAllocator, Scheduler, Tokenizer, cdiv, decode_weight_bytes, rope_frequencies
from views import PAGE

HUES = re.findall(r'"(#\w+)"', re.search(r"const HUES = \[(.*?)\]", PAGE.read_text("utf-8"), re.S)[1])
STYLE = """\
text{font:13px system-ui,sans-serif;fill:#24292f}.s{font-size:11px;fill:#57606a}.d{fill:#10131a}\
.m{font-family:ui-monospace,monospace}
.l{stroke:#8c959f;fill:none}.f{fill:#d0d7de}.k{fill:#24292f}.r{stroke:#c2410c;fill:none}\
.t{text-anchor:middle}.e{text-anchor:end}.b{font-weight:600}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.s{fill:#9da7b1}.d{fill:#10131a}.f{fill:#3a424e}\
.k{fill:#e6edf3}.r{stroke:#fb923c}}"""
DARK = "#10131a"            # of a terminal's ink on a coloured ground


def attribute(name, value):
    """ name="value", or nothing."""
    return f' {name}="{value}"' if value else ""


class Picture:
    """An SVG that reads well on light and on dark."""

    def __init__(self, width, height, title):
        self.width = width
        self.height = height
        self.title = title
        self.parts = []

    def rect(self, x, y, width, height, fill=None, kind="", more=""):
        """fill: a colour; kind: classes of STYLE; more: further attributes."""
        color = attribute("fill", fill) + attribute("class", kind)
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"{color}{more}/>')

    def text(self, x, y, text, kind=""):
        escaped = html.escape(str(text), quote=False)
        self.parts.append(f'<text x="{x:g}" y="{y:g}"{attribute("class", kind)}>{escaped}</text>')

    def line(self, points, kind="l", width=1, more=""):
        points = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline points="{points}" class="{kind}" stroke-width="{width}"{more}/>')

    def cell(self, x, y, width, height, fill, text="", kind="t d"):
        """A box with a text in its middle; grey without `fill`."""
        self.rect(x, y, width, height, fill, "" if fill else "f", ' rx="2"')
        if text != "":
            self.text(x + width / 2, y + height / 2 + 4, text, kind)

    def legend(self, x, y, color, text):
        """A small box and its meaning. color None: grey; "k": as text."""
        kinds = {None: "f", "k": "k"}
        self.rect(x, y, 12, 12, None if color in kinds else color, kinds.get(color, ""))
        self.text(x + 18, y + 11, text)

    def __str__(self):
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" role="img">')
        title = f"<title>{html.escape(self.title, quote=False)}</title>"
        return "\n".join([f"{head}{title}<style>{STYLE}</style>", *self.parts, "</svg>", ""])


def hue(number):
    """The colour of a request, from 1 on."""
    return HUES[(number - 1) % len(HUES)]


def letter(number):
    """The letter of a request, from 1 on."""
    return chr(ord("A") + (number - 1) % 26)


# ======================================================================================================
# A moment of a run
# ======================================================================================================
def draw_pool():
    """The page pool and the block tables."""
    facts = figures.moment()
    picture = Picture(860, 268, "The page pool at one moment of a run, and the block tables of the requests")
    size = 34                               # of a page's cell, with its margin
    across = 10                             # pages in a row
    picture.text(0, 16, f"The pool: {facts.num_blocks} pages of 16 tokens", "b")
    for page in range(facts.num_blocks):
        add_page(picture, page % across * size, 30 + page // across * size, size - 3, page, facts)
    y = 30 + cdiv(facts.num_blocks, across) * size + 20
    step = facts.step
    for i, text in enumerate(["A cell is a page, with its number and its owner's letter.",
                              "\u00d7n: n requests that begin alike share it.",
                              "+: nobody's, but its text can still be found.",
                              f"This step computes {step.decode} decode and {step.prefill} prefill tokens."]):
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


def add_page(picture, x, y, size, page, facts):
    """A page of the pool: a stripe for each user, its number, and its owner."""
    users = facts.users.get(page, [])
    is_cached = page in facts.kept
    for i, user in enumerate(users):
        picture.rect(x + i * size / len(users), y, size / len(users), size, hue(user))
    if not users:
        picture.rect(x, y, size, size, None, "f", "" if is_cached else ' opacity="0.45"')
    if len(users) > 1:
        label = f"\u00d7{len(users)}"
    elif users:
        label = letter(users[0])
    else:
        label = "+" if is_cached else ""
    picture.text(x + size / 2, y + 25, label, "t d" if users else "t")
    picture.text(x + 3, y + 10, page, "s d" if users else "s")


def draw_watch():
    """The frame of --watch, without its speed, which is the machine's and not the run's."""
    _, frame = figures.demonstration()
    picture = Picture(830, 17 * len(frame) + 26,
                      "--watch: the page pool, the requests and the step, in a terminal")
    picture.rect(0, 0, picture.width, picture.height, "#16181d", "", ' rx="8"')
    for row, line in enumerate(frame):
        x = 13
        y = 17 * row + 26
        back = None
        ink = "#e6e8ec"
        for part in re.split(r"(\x1b\[[0-9;]*m)", re.sub(r"  [\d.]+ tokens/s", "", line)):
            if code := re.fullmatch(r"\x1b\[([0-9;]*)m", part):
                back, ink = terminal_colors([int(n or 0) for n in code[1].split(";")])
            elif part:
                width = 8 * sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in part)
                if back:
                    picture.rect(x, y - 13, width, 17, back)
                picture.parts.append(
                    f'<text x="{x}" y="{y}" class="m" xml:space="preserve" textLength="{width}" '
                    f'style="fill:{ink};white-space:pre">{html.escape(part, quote=False)}</text>')
                x += width
    return picture


def terminal_colors(numbers):
    """(background or None, ink) after a terminal's escape code of these numbers."""
    if numbers[1:3] == [48, 5]:
        back = xterm(numbers[3])
    else:
        back = {42: "#4e9a06", 43: "#c4a000"}.get(numbers[0])
    ink = {30: DARK, 32: "#8ae234", 33: "#fce94f"}.get(numbers[0], "#e6e8ec")
    return back, ink


def xterm(number):
    """A colour of the 256 that terminals have, from 16 on."""
    if number >= 232:
        return "#" + f"{8 + 10 * (number - 232):02x}" * 3
    levels = [0, 95, 135, 175, 215, 255]
    return "#" + "".join(f"{levels[(number - 16) // n % 6]:02x}" for n in (36, 6, 1))


# ======================================================================================================
# Chapters 1 to 5
# ======================================================================================================
def draw_roofline():
    """The floor of a step against its tokens, both axes logarithmic, and measured decode steps."""
    most = 4096
    picture = Picture(760, 330, "How long a step of Llama-3.2-1B must take on this card, "
                                "against the tokens in it")

    def at(tokens, milliseconds):
        return (60 + 640 * math.log(tokens) / math.log(most),
                270 - 240 * math.log(milliseconds / 0.25) / math.log(20 / 0.25))

    for value in 0.25, 0.5, 1, 2, 5, 10, 20:
        picture.line([at(1, value), at(most, value)], more=' opacity="0.3"')
        picture.text(52, at(1, value)[1] + 4, f"{value:g}", "s e")
    for tokens in 1, 4, 16, 64, 256, 1024, 4096:
        picture.text(at(tokens, 0.25)[0], 287, tokens, "s t")
    memory = 1e3 * decode_weight_bytes(LLAMA) / CARD["bytes_per_second"]            # ms
    arithmetic = 1e3 * decode_weight_bytes(LLAMA) / CARD["operations_per_second"]   # ms a token
    corner = at(memory / arithmetic, memory)
    end = at(most, most * arithmetic)
    picture.line([at(1, memory), at(most, memory)], more=' stroke-dasharray="4 3"')
    picture.line([at(0.25 / arithmetic, 0.25), end], more=' stroke-dasharray="4 3"')
    picture.line([at(1, memory), corner, end], "r", 3)
    floor_y = corner[1]
    picture.text(at(2, memory)[0], floor_y + 18,
                 f"read all weights: {memory:.2f} ms, however few tokens share it")
    picture.text(at(1500, 1)[0], at(1, 7.2)[1], "multiply each token with them", "e")
    picture.text(corner[0] + 8, floor_y + 40, f"the two meet at {figures.crossing()} tokens")
    for name, row in ROWS.items():
        if name in ("decode-1-128", "decode-8-128", "batch-32", "batch-128"):
            is_step = row["unit"] == "ms"
            milliseconds = row["value"] if is_step else 1e3 * row["time_per_output_token_p50"]
            x, y = at(len(BENCH[name].requests), milliseconds)
            picture.rect(x - 4, y - 4, 8, 8, hue(1))
    picture.rect(60, 303, 8, 8, hue(1))
    picture.text(74, 312,
                 "measured decode steps of 1, 8, 32 and 128 sequences, contexts of a few hundred tokens", "s")
    picture.text(8, 14, "ms a step", "s")
    picture.text(700, 312, "tokens in the step", "s e")
    return picture


def draw_tokens():
    """A text, cut by Parrot's tokenizer."""
    tokenizer = Tokenizer(ROOT / "parrot")
    picture = Picture(760, 92, "A text in tokens: ids and their bytes")
    x = 0
    for i, token in enumerate(tokenizer.encode("A parrot repeats: \U0001f99c!", add_bos=False)):
        data = tokenizer.token_bytes(token)
        shown = data.decode() if data.isascii() else " ".join(f"{byte:02X}" for byte in data)
        width = max(30, 9 * len(shown) + 12)
        if data.isascii():
            shown = shown.replace(" ", "\u2423")
        picture.cell(x, 8, width - 3, 30, hue(i + 1), shown, "t d m")
        picture.text(x + width / 2, 54, token, "s t")
        x += width
    picture.text(0, 80, "Above: the bytes of each token (\u2423 is a space). Below: its id. "
                        "The parrot is four bytes, F0 9F A6 9C.", "s")
    return picture


def draw_bf16():
    """12.34 in float32, and in bfloat16."""
    picture = Picture(760, 120, "12.34 as float32 and as bfloat16")
    single = np.float32(12.34)
    half = single.astype(BFLOAT16)
    words = {"float32": f"{single.view(np.uint32):032b}", "bfloat16": f"{half.view(np.uint16):016b}"}
    for row, (name, word) in enumerate(words.items()):
        picture.text(0, 27 + 40 * row, name)
        for i, bit in enumerate(word):
            part = 1 if i == 0 else 2 if i < 9 else 3           # sign, exponent, fraction
            picture.cell(75 + 21 * i, 10 + 40 * row, 19, 26, hue(part), bit, "t d m")
    picture.text(75, 108, "sign, 8 bits of exponent, then the fraction: 23 bits or 7", "s")
    picture.text(420, 67, f"= {float(half):g}")
    return picture


def draw_e4m3():
    """The positive codes of E4M3 up to 16, then E4M3 and bfloat16 between 1 and 2."""
    picture = Picture(860, 196, "The numbers of E4M3 on a line, and those of E4M3 and bfloat16 from 1 to 2")
    left = 100
    width = 730
    codes = np.arange(127, dtype=np.uint8).view(E4M3).astype(float)
    rows = [(40, "E4M3", codes, 0, 16, [0, 1, 2, 4, 8, 16]),
            (105, "E4M3", codes, 1, 2, [1, 1.25, 1.5, 1.75, 2]),
            (160, "bfloat16", 1 + np.arange(129) / 128, 1, 2, [])]
    for y, name, numbers, first, last, labels in rows:
        picture.text(0, y + 5, name)
        picture.line([(left, y), (left + width, y)])
        for number in numbers[(numbers >= first) & (numbers <= last)]:
            x = left + width * (number - first) / (last - first)
            picture.line([(x, y - 10), (x, y + 10)], "r")
        for label in labels:
            picture.text(left + width * (label - first) / (last - first), y + 26, label, "s t")
    picture.text(left, 18, "From 0 to 16: eight numbers from each power of two to the next", "s")
    picture.text(left, 90, "From 1 to 2: eight steps in E4M3, 128 in bfloat16", "s")
    return picture


def draw_rope():
    """How often each pair turns within the original context, and what Llama 3.2 slows it by."""
    picture = Picture(760, 270, "RoPE: which pairs of a head are slowed down in Llama 3.2")
    plain = rope_frequencies(replace(LLAMA, rope_scaling=None))
    slower = plain / rope_frequencies(LLAMA)                    # [h/2]: factor of each pair
    is_kept = slower < 1.001
    is_slowed = slower >= 31.9
    for i, by in enumerate(slower):
        height = 12 + 160 * math.log2(by) / 5
        color = hue(3 if is_kept[i] else 8 if is_slowed[i] else 5)
        picture.rect(40 + 22 * i, 210 - height, 18, height, color)
        picture.text(49 + 22 * i, 226, i, "s t")
        if not (is_kept[i] or is_slowed[i]) or i in (0, 31):
            picture.text(49 + 22 * i, 202 - height, f"{by:.3g}", "s t")
    kept = int(is_kept.sum())
    slowed = int((~is_slowed).sum())                            # the first pair that is slowed in full
    picture.legend(40, 240, hue(3), f"pairs 0-{kept - 1}: unchanged")
    picture.legend(250, 240, hue(5), f"{kept}-{slowed - 1}: blended")
    picture.legend(430, 240, hue(8), f"{slowed}-31: divided by {LLAMA.rope_scaling['factor']:g}")
    picture.text(0, 16, "slowed down by (logarithmic)", "s")
    return picture


def draw_butterfly():
    """The sums of eight lanes in three steps."""
    picture = Picture(760, 220, "A butterfly: eight lanes add up in three steps")
    values = [3, 1, 4, 1, 5, 9, 2, 6]
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


# ======================================================================================================
# Chapters 6 to 8
# ======================================================================================================
def draw_step_bytes():
    """What decode steps read: weights, keys and values; and how long they took."""
    names = [name for name in ROWS if name.startswith("decode-")]
    picture = Picture(760, 30 * len(names) + 60, "What a decode step reads, and how long it takes")
    scale = 520 / max(ROWS[name]["value"] for name in names)
    weights = 1e3 * decode_weight_bytes(LLAMA) / CARD["bytes_per_second"]           # ms
    for i, name in enumerate(names):
        y = 10 + 30 * i
        requests = BENCH[name].requests
        cache = max(ROWS[name]["best"] - weights, 0)                                # ms
        measured = ROWS[name]["value"]
        picture.text(175, y + 15, f"{len(requests)} x context {requests[0][0]:,}", "e")
        picture.rect(185, y, weights * scale, 12, hue(1))
        picture.rect(185 + weights * scale, y, cache * scale, 12, hue(2))
        picture.rect(185, y + 12, measured * scale, 6, None, "k")
        picture.text(190 + measured * scale, y + 19, f"{measured:.2f} ms", "s")
    y = 30 * len(names) + 30
    picture.legend(185, y, hue(1), "reading the weights")
    picture.legend(345, y, hue(2), "reading keys and values")
    picture.legend(530, y, "k", "measured")
    return picture


def draw_waste():
    """The mix's caches, reserved whole and in pages."""
    used, reserved, paged = figures.waste()
    picture = Picture(760, 120, "Memory for 256 requests: a reserved context each, or pages")
    scale = 560 / reserved
    for y, name, slots in (10, "2,048 slots each", reserved), (50, "pages of 16", paged):
        picture.text(120, y + 20, name, "e")
        picture.rect(130, y, slots * scale, 28, None, "f")
        picture.rect(130, y, used * scale, 28, hue(3))
        x = 560 if slots == reserved else 130 + slots * scale + 8
        picture.text(x, y + 19, f"{1 - used / slots:.1%} wasted")
    picture.text(130, 108,
                 f"green: the {used:,} tokens of the bench's mix when each request has its last one", "s")
    return picture


def draw_pages():
    """37 tokens in pages of 16, and where number 35 is."""
    picture = Picture(760, 210, "A text of 37 tokens in three pages")
    allocator = BlockAllocator(8, 16)
    allocator.allocate(2)                                       # of others
    table = allocator.allocate(1)
    allocator.allocate(2)                                       # of others
    table += allocator.allocate(2)
    picture.text(0, 16, f"block_table = {table}", "m")
    for i, page in enumerate(table):
        for offset in range(16):
            token = 16 * i + offset
            x = 70 + 41 * offset
            y = 34 + 48 * i
            if token < 37:
                picture.cell(x, y, 38, 30, hue(5 if token == 35 else 1), token)
            else:
                picture.cell(x, y, 38, 30, None)
        picture.text(0, 54 + 48 * i, f"page {page}", "b")
    slot = table[35 // 16] * 16 + 35 % 16
    picture.text(0, 196, f"token 35: page number 35 // 16 = 2 of the table is {table[2]}; "
                         f"slot {table[2]} * 16 + 35 % 16 = {slot}", "m")
    return picture


def draw_online():
    """Sixteen scores in four tiles: maximum, sum, and what the sum is rescaled by."""
    picture = Picture(760, 270, "Online softmax: the running maximum and sum, tile by tile")
    scores = [1.0, 0.2, 1.4, 0.7, 0.4, 2.3, 1.1, 0.5, 0.9, 0.3, 1.6, 1.2, 3.0, 0.8, 1.9, 0.6]
    m = -math.inf
    total = 0.0
    for tile in range(4):
        part = scores[4 * tile:4 * tile + 4]
        new = max(m, *part)
        rescale = math.exp(m - new)
        total = total * rescale + sum(math.exp(score - new) for score in part)
        m = new
        left = 60 + 175 * tile
        for i, score in enumerate(part):
            picture.rect(left + 38 * i, 170 - 45 * score, 32, 45 * score, hue(tile + 1))
            picture.text(left + 38 * i + 16, 165 - 45 * score, f"{score:g}", "s t")
        picture.line([(left - 8, 170 - 45 * m), (left + 152, 170 - 45 * m)], "r", 2)
        for row, text in enumerate([f"m = {m:g}", f"l \u00d7 {rescale:.3f}", f"l = {total:.3f}"]):
            picture.text(left + 10, 195 + 18 * row, text, "m")
    at_once = sum(math.exp(score - max(scores)) for score in scores)
    picture.text(0, 262, f"All at once: the sum of exp(s - {max(scores):g}) is {at_once:.3f}. The same.", "s")
    return picture


# ======================================================================================================
# Chapters 9 to 12
# ======================================================================================================
def draw_batching():
    """Twelve requests, four at a time: static and continuous."""
    picture = Picture(760, 300, "Static and continuous batching: twelve requests, four at a time")
    width = 720 / 70                                            # of a step
    for y, name, static in (8, "static", True), (150, "continuous", False):
        steps = figures.batching_steps(static)
        picture.text(0, y + 12, f"{name}: {len(steps)} steps", "b")
        owners = [None] * 4                                     # of the four rows: request numbers
        for x, step in enumerate(steps):
            for number in step:
                if number not in owners:
                    owners[next(i for i, owner in enumerate(owners) if owner not in step)] = number
            for i, number in enumerate(owners):
                place = width * x, y + 22 + 26 * i, width - 1, 22
                if number in step:
                    _, is_decode = step[number]
                    picture.rect(*place, hue(number), "", "" if is_decode else ' opacity="0.6"')
                else:
                    picture.rect(*place, None, "f", ' opacity="0.4"')
    picture.text(0, 292, "A row is a place in the batch, a column a step, a colour a request; "
                         "pale: its prompt. Grey: an empty place.", "s")
    return picture


def draw_chunks():
    """Three requests decode, and a prompt of 600 tokens comes: in one step, and in chunks."""
    picture = Picture(760, 300, "A long prompt, whole and in chunks: tokens of each step")
    for y, name, budget, options in ((6, "whole", 1024, {"chunked_prefill": False}),
                                     (148, "in chunks, budget 64", 64, {})):
        picture.text(0, y + 12, name, "b")
        for x, step in enumerate(figures.plan(figures.STALL, budget, 8, **options)[:24]):
            top = y + 126
            decode = sum(count for count, is_decode in step.values() if is_decode)
            prefill = sum(count for count, is_decode in step.values() if not is_decode)
            for tokens, color in (decode, hue(3)), (prefill, hue(2)):
                if tokens:
                    height = max(tokens / 640 * 105, 1.5)
                    picture.rect(30 * x, top - height, 24, height, color)
                    top -= height
            picture.text(30 * x + 12, top - 3, decode + prefill, "s t")
    picture.text(0, 292, "Orange: prefill tokens of the step; green: decode. "
                         "While a high column is computed, everybody waits for it.", "s")
    return picture


def draw_prefix():
    """Three chats with one system prompt: block tables, and the chain."""
    picture = Picture(760, 200, "Three requests that begin alike share their first pages")
    allocator = BlockAllocator(20, 4)
    scheduler = Scheduler(allocator, 64, 8)
    system = [1, 2, 3, 4, 5, 6, 7, 8]
    for row, own in enumerate([[11, 12, 13, 14, 15], [21, 22, 23], [31, 32, 33, 34, 35, 36]]):
        sequence = figures.new_sequence(system + own, 99)
        scheduler.waiting.append(sequence)
        figures.compute(scheduler, scheduler.schedule())
        y = 30 + 46 * row
        picture.text(0, y + 20, f"request {letter(row + 1)}", "b")
        for i, page in enumerate(sequence.block_table):
            tokens = " ".join(map(str, (system + own)[4 * i:4 * i + 4])) or "next"
            picture.cell(100 + 148 * i, y, 142, 32, hue(7 if i < 2 else row + 1), f"page {page}: {tokens}")
    picture.text(0, 16, "pages of 4 tokens; the system prompt is tokens 1 to 8", "s")
    first, second = (allocator.ref_counts[page] for page in scheduler.running[0].block_table[:2])
    picture.text(0, 185, "Pages 0 and 1 (turquoise) are in three block tables: "
                         f"their reference counts are {first} and {second}.", "s")
    return picture


def draw_sampling():
    """Ten logits: probabilities at three temperatures, and where top-k and top-p cut."""
    picture = Picture(760, 210, "Temperature, top-k and top-p on ten logits")
    logits = np.array([4.0, 3.4, 3.0, 2.1, 1.8, 1.2, 0.9, 0.3, -0.4, -1.0])
    top_k = 4
    for panel, temperature in enumerate([0.5, 1.0, 2.0]):
        left = 255 * panel
        weights = np.exp((logits - logits.max()) / temperature)
        p = weights / weights.sum()
        nucleus = int(np.searchsorted(np.cumsum(p), 0.8) + 1)   # tokens that top-p keeps
        picture.text(left, 16, f"temperature {temperature:g}", "b")
        for i, value in enumerate(p):
            kept_by = i < top_k, i < nucleus
            color = {(True, True): 3, (False, True): 2, (True, False): 1, (False, False): 10}[kept_by]
            picture.rect(left + 23 * i, 150 - 150 * value, 20, max(150 * value, 1), hue(color))
        x = left + 23 * top_k - 1.5
        picture.line([(x, 30), (x, 156)], "l", 1, ' stroke-dasharray="3 3"')
        x = left + 23 * nucleus - 1.5
        picture.line([(x, 40), (x, 156)], "r", 2)
        picture.text(left, 172, f"top_p 0.8 keeps {nucleus} (red line)", "s")
    picture.text(0, 200, "Dashed: top_k 4. Green: what both keep.", "s")
    return picture


# ======================================================================================================
# Chapters 13 and 14
# ======================================================================================================
def draw_floor():
    """Decode steps and whole runs: how much of the best that the card's rates allow is reached."""
    names = [name for name, row in ROWS.items() if "share" in row]
    picture = Picture(760, 22 * len(names) + 40, "How near to what the card's rates allow")
    for i, name in enumerate(names):
        y = 6 + 22 * i
        share = ROWS[name]["share"]
        picture.text(150, y + 13, name, "e s")
        picture.rect(160, y, 540, 16, None, "f", ' opacity="0.5"')
        picture.rect(160, y, 540 * share, 16, hue(1))
        picture.text(708, y + 13, f"{share:.0%}", "s")
    picture.text(160, 22 * len(names) + 28, "the whole bar: the bytes over the card's bandwidth, "
                                            "or the operations over its rate", "s")
    return picture


def draw_ablation():
    """Tokens a second with one idea off at a time: predicted and measured."""
    names = figures.ABLATION
    picture = Picture(760, 40 * len(names) + 36, "What each idea is worth, in tokens a second")
    scale = 520 / max(figures.predicted(name)[0] for name in names)
    for i, name in enumerate(names):
        picture.text(150, 25 + 40 * i, BENCH[name].what.partition(": ")[2], "e")
        rate, _ = figures.predicted(name)
        picture.rect(160, 8 + 40 * i, rate * scale, 13, None, "f")
        picture.text(166 + rate * scale, 19 + 40 * i, f"{rate:,.0f}", "s")
        rate = ROWS[name]["value"]
        picture.rect(160, 23 + 40 * i, rate * scale, 13, hue(1))
        picture.text(166 + rate * scale, 34 + 40 * i, f"{rate:,.0f}", "s")
    y = 40 * len(names) + 14
    picture.legend(160, y, None, "predicted by the roofline")
    picture.legend(380, y, hue(1), "measured")
    return picture


def chunks(seconds, num_tokens):
    """(start, number of tokens) of each chunk to a client that reads a chunk in so many seconds. A token
    comes every second, and a chunk holds all that have come."""
    now = 0.0
    num_sent = 0
    while num_sent < num_tokens:
        now = max(now, num_sent + 1)
        num_here = min(int(now), num_tokens)
        yield now, num_here - num_sent
        num_sent = num_here
        now += seconds


def draw_server():
    """The steps of the worker, and the chunks of three clients who read at different speeds."""
    num_steps = 13
    width = 40
    left = 170
    picture = Picture(left + width * (num_steps + 4), 190, "Steps, and the chunks of three clients")
    picture.text(0, 24, "The worker steps", "b")
    for step in range(num_steps):
        picture.cell(left + step * width, 8, width - 3, 24, None, step + 1, "t")
    for number, (name, seconds) in enumerate([("reads at once", 0.3), ("takes 1.5 steps", 1.5),
                                              ("takes 4 steps", 4.0)], 1):
        y = 14 + 38 * number
        picture.text(0, y + 17, f"Client {letter(number)} {name}")
        for start, num_tokens in chunks(seconds, num_steps):
            picture.cell(left + start * width, y, max(seconds * width - 3, 14), 24, hue(number), num_tokens)
    picture.text(0, 180, "A box is a chunk with its number of tokens, as long as the client reads it.", "s")
    return picture


# ======================================================================================================
# README.md and chapter 16
# ======================================================================================================
def draw_overview():
    """The life of a request: a box is a room of the house, with its work below its name."""
    picture = Picture(860, 246, "The life of a request, from a prompt to an answer")
    width = 174
    height = 66
    columns = [4 + 220 * number for number in range(4)]
    rows = [26, 146]
    ground = 2 * width + 46 + 24
    picture.rect(columns[2] - 12, rows[1] - 14, ground, height + 46, None, "f", ' rx="6" opacity="0.5"')
    picture.text(columns[3] + width, rows[1] + height + 22, "on the GPU, or in the simulator", "s e")
    boxes = [
        (0, 0, 1, ["server.py", "tinyvllm.py, chat.py", "take a prompt"]),
        (1, 0, 2, ["tokenizer.py", "Tokenizer", "text to token ids"]),
        (2, 0, 3, ["Scheduler", "BlockAllocator", "which tokens, in which pages"]),
        (3, 0, 4, ["Batch", "StepBuffer", "arrays, in one copy"]),
        (3, 1, 5, ["Model.forward", "kernels.cu, decode.cu", "all layers, then the logits"]),
        (2, 1, 6, ["sample", "kernels.cu", "logits to the next token"]),
        (1, 1, 2, ["tokenizer.py", "StreamDecoder", "token ids to text"]),
        (0, 1, 1, ["server.py", "tinyvllm.py, chat.py", "stream the answer"])]
    for column, row, color, lines in boxes:
        picture.rect(columns[column], rows[row], width, height, hue(color), "", ' rx="4"')
        for number, (line, kind) in enumerate(zip(lines, ("d b t", "d t", "d s t"))):
            picture.text(columns[column] + width / 2, rows[row] + 19 + 19 * number, line, kind)
    for left in columns[:3]:
        add_arrow(picture, (left + width + 4, rows[0] + height / 2), (left + 216, rows[0] + height / 2))
        add_arrow(picture, (left + 216, rows[1] + height / 2), (left + width + 4, rows[1] + height / 2))
    x = columns[3] + width / 2
    add_arrow(picture, (x, rows[0] + height + 4), (x, rows[1] - 4))
    x = columns[2] + width / 2
    add_arrow(picture, (x, rows[1] - 4), (x, rows[0] + height + 4))
    picture.text(x - 10, rows[0] + height + 28, "a step for each token of the answer", "s e")
    picture.text(columns[0], 15, "The life of a request", "b")
    return picture


def add_arrow(picture, start, end):
    """A horizontal or vertical line from start to end, with a head."""
    (x0, y0), (x1, y1) = start, end
    dx = (x1 > x0) - (x1 < x0)
    dy = (y1 > y0) - (y1 < y0)
    back_x = x1 - 7 * dx
    back_y = y1 - 7 * dy
    head = [(back_x + 4 * dy, back_y + 4 * dx), end, (back_x - 4 * dy, back_y - 4 * dx)]
    picture.line([start, end], "l", 2)
    picture.line(head, "l", 2)


def draw_ranks():
    """The matrices of a layer, each with the parts of two ranks. Not to scale."""
    picture = Picture(832, 274, "The matrices of a layer on two GPUs: by rows, then by columns")
    hidden = 84
    ffn = 108
    top = 40

    def matrix(x, name, shape, parts, across):
        """parts: (name, size) of the matrices below one another, or beside one another where `across`."""
        picture.text(x, 16, name, "b")
        picture.text(x, 31, shape, "s")
        start = 0
        for part, size in parts:
            for rank in range(2):
                place = start + rank * size / 2
                label = f"{part}{rank}"
                if across:
                    picture.cell(x + place, top, size / 2 - 2, hidden, hue(rank + 1), label)
                else:
                    picture.cell(x, top + place, hidden, size / 2 - 2, hue(rank + 1), label)
            start += size

    matrix(0, "qkv: rows", "[(H + 2K) h, D]", [("q", 84), ("k", 44), ("v", 44)], False)
    matrix(204, "o: columns", "[D, H h]", [("o", 84)], True)
    matrix(438, "gate_up: rows", "[2F, D]", [("gate ", ffn), ("up ", ffn)], False)
    matrix(642, "down: columns", "[D, F]", [("down ", ffn)], True)
    middle = top + hidden / 2
    for left, right, text in [(88, 200, "attention"), (526, 638, "silu, times up")]:
        add_arrow(picture, (left, middle), (right, middle))
        picture.text((left + right) / 2, middle - 8, text, "s t")
        picture.text((left + right) / 2, middle + 18, "no message", "s t")
    for left, right in (292, 434), (754, 826):
        add_arrow(picture, (left, middle), (right, middle))
        picture.text((left + right) / 2, middle - 8, "all_reduce", "b t")
        picture.text((left + right) / 2, middle + 18, "D a token", "s t")
    picture.legend(204, 186, hue(1), "rank 0")
    picture.legend(284, 186, hue(2), "rank 1")
    picture.text(0, 268, "Rows of q, k, v are heads: a rank computes the attention of its own heads. "
                         "Not to scale.", "s")
    return picture


PICTURES = {f"{name.removeprefix('draw_').replace('_', '-')}.svg": draw
            for name, draw in list(globals().items()) if name.startswith("draw_")}
