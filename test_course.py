"""The course is kept true: its code is the source's, its examples run, what it names exists, and its figures come from course/h200.json.

Each check returns what it finds wrong, and is also given a text in which something is: a check that cannot fail checks nothing.
"""
import ast
import contextlib
import doctest
import io
import re
import shlex
import sys
from functools import lru_cache
from pathlib import Path

import pytest

import tinyvllm

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "course"))
import exercises                                            # noqa: E402
import make                                                 # noqa: E402

SOURCES = ["tinyvllm.py", "bench.py", "views.py", "tokenizer.py", "simulator.py", "simulator.h", *sorted(path.name for path in ROOT.glob("*.cu"))]
CUDA = "\n".join(path.read_text("utf-8") for path in ROOT.glob("*.cu"))
TEXT = {name: (ROOT / name).read_text("utf-8") for name in SOURCES}
TESTS = "\n".join(path.read_text("utf-8") for path in ROOT.glob("test_*.py"))
CHAPTERS = sorted(path.name for path in (ROOT / "course").glob("*.md"))
PAGES = {"README.md": (ROOT / "README.md").read_text("utf-8")} | {f"course/{name}": (ROOT / "course" / name).read_text("utf-8") for name in CHAPTERS}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
HEADINGS = ["It fails", "The idea", "The code", "The test", "The price", "What vLLM does", "Break it"]


def prose(text, foreign=True):
    """The text without fenced blocks and marked spots; without what it says of other engines, too, unless foreign."""
    text = re.sub(r"<!--=.*?<!--/-->", "", FENCE.sub("", text), flags=re.S)
    return text if foreign else re.sub(r"^## (What vLLM does|The dictionary)\n.*?(?=^## )", "", text, flags=re.S | re.M)


def changed(page, old, new):
    """PAGES with an error in one of them."""
    assert PAGES[page].count(old) >= 1, f"{page} has no {old!r} any more: change this test's error"
    return PAGES | {page: PAGES[page].replace(old, new)}


@lru_cache(maxsize=None)
def options():
    """The command line's."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        tinyvllm.main(["--help"])
    return set(re.findall(r"^  (?:-h, )?(--[\w-]+)", out.getvalue(), re.M)) | {"-h"}


# ---------------------------------------------------------------------------------------------------------------------
# Code
# ---------------------------------------------------------------------------------------------------------------------
def is_quoted(code):
    """Whether the lines stand in a source file, one after the other, perhaps further to the right."""
    lines = code.rstrip("\n").split("\n")
    indented = ("\n".join(" " * n + line if line.strip() else "" for line in lines) for n in range(0, 21, 4))
    return any(f"\n{text}\n" in f"\n{source}" for text in indented for source in TEXT.values())


def bad_command(line):
    """What is wrong with a command line of ours."""
    words = shlex.split(line.split(" < ")[0])
    if words[0] == "git":
        return []
    python = words[0] in (".venv/bin/python", "python3", "./run.sh", ".venv/bin/hf", ".venv/bin/pip")
    if words[0] == "./run.sh" or words[1:2] == ["tinyvllm.py"]:
        try:
            tinyvllm.parse_arguments(words[1 if words[0] == "./run.sh" else 2:] or ["Hi"])
        except tinyvllm.TinyVLLMError as error:
            return [f"{line}: {error}"]
    elif words[1:3] == ["-m", "pytest"]:
        names = words[words.index("-k") + 1:] if "-k" in words else []
        return [f"{line}: no test {name}" for name in names if f"def {name}(" not in TESTS]
    return [] if python and (words[1:2] != ["course/make.py"] or (ROOT / words[1]).exists()) else [f"unknown command: {line}"]


def wrong_code(pages):
    """Blocks that are no lines of the source, no example, no exercise, no command of ours and nothing that Parrot says."""
    wrong = []
    for page, text in pages.items():
        wrong += [f"{page}: exercise {old!r}" for name, old, _, tests in exercises.exercises(text) if TEXT.get(name, "").count(old) != 1 or not tests]
        wrong += [f"{page}: an exercise names no file"] if len(list(exercises.exercises(text))) != text.count("```diff") else []
        for language, code in FENCE.findall(text):
            if language == "sh" or code.startswith((".venv", "./run.sh", "python3 -m venv")):
                lines = code.replace("\\\n", " ").splitlines()
                wrong += [problem for line in lines for part in line.split(" && ") for problem in bad_command(part)]
            elif language == "" and not is_quoted(code):
                said = (ROOT / "parrot" / "texts.json").read_text("utf-8")
                wrong += [] if " ".join(code.split()) in said else [f"{page}: {code}"]
            elif language not in ("", "diff") and not code.startswith(">>> ") and page != "README.md" and not is_quoted(code):
                wrong.append(f"{page}: {code}")
    return wrong


def test_code_is_quoted():
    """Word for word, and commands have options that exist."""
    assert wrong_code(PAGES) == []
    for page, old, new in [("course/10-memory.md", "self.waiting.appendleft(sequence)", "self.waiting.append(sequence)"),
                           ("course/05-kernels.md", "(size_t)blockIdx.x * HIDDEN;\n    for", "blockIdx.x * HIDDEN;\n    for"),
                           ("course/10-memory.md", "-                victim = self.running[-1]", "-                victim = self.running[-2]"),
                           ("course/10-memory.md", "# tinyvllm.py\n-", "-"),
                           ("course/10-memory.md", "`test_scheduler_random_events` fails", "It fails"),
                           ("course/00-run-it.md", "./run.sh --trace run.html", "./run.sh --traces run.html"),
                           ("course/00-run-it.md", "-k test_forward_equals_numpy\n", "-k test_forward_is_numpy\n"),
                           ("README.md", "A KV cache keeps the key", "A KV cache keeps a key")]:
        assert wrong_code(changed(page, old, new)), (page, old)


def failed_examples(page, text):
    """How many of a page's >>> examples print something else."""
    test = doctest.DocTestParser().get_doctest(text.replace("\n```\n", "\n\n"), {}, page, page, 0)
    out = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(test, out=out.write)
    return runner.failures, out.getvalue()


@pytest.mark.parametrize("page", [page for page in PAGES if ">>> " in PAGES[page]])
def test_examples_run(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    failures, out = failed_examples(page, PAGES[page])
    assert not failures, out


def test_a_wrong_example_is_noticed():
    wrong = changed("course/09-batching.md", "88 places in the batch, 49 tokens", "88 places in the batch, 48 tokens")
    assert failed_examples("course/09-batching.md", wrong["course/09-batching.md"])[0] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Names and links
# ---------------------------------------------------------------------------------------------------------------------
def has_attribute(path):
    """Whether Class.name, or a name alone, is in one of our modules."""
    import bench
    import tokenizer
    import views
    name, *rest = path.split(".")
    for module in tinyvllm, bench, views, tokenizer:
        thing = getattr(module, name, None)
        if thing is not None and (not rest or hasattr(thing, rest[0]) or f"self.{rest[0]} = " in TEXT[f"{module.__name__}.py"]
                                  or rest[0] in getattr(thing, "__dataclass_fields__", {})):
            return True
    return False


def missing_names(pages):
    """Tests, options, functions, classes and files in backticks that do not exist. Of other engines, only tests are ours."""
    functions = set(re.findall(r"\bdef (\w+)\(", "\n".join(TEXT.values()) + TESTS)) | set(re.findall(r"[ *&](\w+)\([^;{]*\) ?\{", CUDA))
    functions |= set(re.findall(r"void (\w+)\(", CUDA)) | {"__syncthreads"}
    missing = []
    for page, text in pages.items():
        names = re.findall(r"`([^`\n]+)`", prose(text, foreign=False))
        tests = [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in TESTS]
        wrong = [name for name in names if name.startswith("--") and name.split()[0] not in options()]
        wrong += [name for name in names if re.fullmatch(r"\w+\(\)", name) and name[:-2] not in functions]
        wrong += [name for name in names if re.fullmatch(r"[A-Z]\w*[a-z]\w*\.[a-z_]+", name) and not has_attribute(name)]
        wrong += [name for name in names if re.fullmatch(r"[\w/]+\.(py|cu|h|md|sh)", name) and not list(ROOT.glob(name)) and "/" not in name]
        missing += [f"{page}: {name}" for name in tests + wrong]
    own = [re.match(r"\| (.*?) \|", line)[1] for line in pages["course/15-real-engines.md"].splitlines() if line.startswith("| `")]
    for name in re.findall(r"`([^`]+)`", " ".join(own)):
        ours = name in options() if name.startswith("--") else has_attribute(name) or name in functions or name in ("block_table", "slot_mapping")
        missing += [] if ours else [f"the dictionary: {name}"]
    return missing


def test_named_things_exist():
    """Tests, options, functions and files that the text names; in the dictionary, all of our column."""
    assert missing_names(PAGES) == []
    for page, old, new in [("course/07-pages.md", "`test_scheduler_random_events` fails", "`test_scheduler_random_event` fails"),
                           ("course/07-pages.md", "`--block-size` lets", "`--block-sizes` lets"),
                           ("course/04-forward.md", "`numpy_llama()`", "`numpy_lama()`"),
                           ("course/04-forward.md", "`forward()`", "`forwards()`"), ("course/05-kernels.md", "`simulator.h`", "`simulators.h`"),
                           ("course/15-real-engines.md", "| `Scheduler.preempt` |", "| `Scheduler.evict` |"),
                           ("course/15-real-engines.md", "| `--no-overlap` |", "| `--not-overlap` |")]:
        assert missing_names(changed(page, old, new)), (page, old)


def broken_links(pages):
    """Links and pictures that lead nowhere, and chapters and pictures that nothing leads to."""
    wrong, reached = [], set()
    for page, text in pages.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            target, _, anchor = link.partition("#")
            if link.startswith("https://"):
                continue
            path = (ROOT / page).parent / target if target else ROOT / page
            reached.add(path.resolve())
            text_there = pages.get(str(path.resolve().relative_to(ROOT.resolve())), "") if path.exists() else ""
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text_there, re.M)}
            wrong += [] if path.exists() and (not anchor or anchor in anchors) else [f"{page}: {link}"]
    parts = [*(ROOT / "course").glob("*.svg"), *(ROOT / "course").glob("*.md")]
    return wrong + [f"nothing leads to {path.name}" for path in parts if path.resolve() not in reached]


def test_links_resolve():
    assert broken_links(PAGES) == []
    for page, old, new in [("course/00-run-it.md", "(02-text.md)", "(02-texts.md)"), ("course/00-run-it.md", "#looking-inside)", "#looking-outside)"),
                           ("course/07-pages.md", "![Reserved and paged](waste.svg)", "")]:
        assert broken_links(changed(page, old, new)), (page, old)


def wrong_shape(pages):
    """Chapters that lack a part, a picture, or the way to the next."""
    wrong = []
    for i, name in enumerate(CHAPTERS):
        text = pages[f"course/{name}"]
        headings = [h for h in re.findall(r"^## (.+)$", text, re.M) if h in HEADINGS]
        wrong += [f"{name}: {headings}"] if headings != (["The test", "Break it"] if i == 0 else HEADINGS if i < 15 else ["Break it"]) else []
        wrong += [] if re.match(rf"# {i}\. .+\n\n\*.+\?.*\*\n", re.sub(r"<!--.*?-->", "", text)) else [f"{name}: begins with {text[:60]!r}"]
        wrong += [] if re.search(r"!\[|^\| --- ", text, re.M) else [f"{name} has no picture"]
        wrong += [] if f"]({(CHAPTERS + ['../README.md'])[i + 1]})" in text else [f"{name} does not lead on"]
        wrong += [f"{name} says {word}" for word in ("TODO", "Incoming") if word in text]
    return wrong + ([] if len(CHAPTERS) == 16 else [f"{len(CHAPTERS)} chapters"])


def test_every_chapter_is_whole():
    assert wrong_shape(PAGES) == []
    for old, new in [("## The price", "## What it costs"), ("](08-attention.md)", "](09-batching.md)"), ("*How long will this answer be?*", ""),
                     ("That one line", "TODO")]:
        assert wrong_shape(changed("course/07-pages.md", old, new)), old


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------
def test_make_finds_nothing_to_change(monkeypatch):
    """Pictures, figures, tables and quoted code are what course/make.py makes of the source and of h200.json."""
    assert set(make.ROWS) <= set(make.BENCH) and f"--model {make.MEASURED['model']} " in make.COMMAND
    stale = [path.name for path, content in make.made().items() if path.read_text("utf-8") != content]
    assert stale == [], "run: python course/make.py"
    monkeypatch.setitem(make.ROWS, "mix", make.ROWS["mix"] | {"value": 1.0, "share": 0.5})
    assert make.fill_in(PAGES["README.md"]) != PAGES["README.md"] and str(make.draw_floor()) != (ROOT / "course" / "floor.svg").read_text("utf-8")
    with pytest.raises(AssertionError, match="0 times"):
        make.code("tinyvllm.py", "no such line")


def typed_figures(pages):
    """Measured figures and counts of lines outside the spots that make.py fills, and markers that Markdown would not see as such."""
    figure = r"\d[\d,.]* ?(?:ms|tokens/s|GB/s|TB/s|TFLOP/s|lines)\b"
    wrong = [f"{page}: {found}" for page, text in pages.items() for found in re.findall(figure, prose(text))]
    return wrong + [f"{page}: a line begins with an inline figure: {line}" for page, text in pages.items() for line in text.splitlines()
                    if re.match(r"<!--= .* -->.+", line)]


def test_no_figure_is_typed():
    assert typed_figures(PAGES) == []
    assert typed_figures(changed("course/01-cost.md", "This picture is called", "It takes 1.07 ms. This picture is called"))
    assert typed_figures(changed("course/01-cost.md", "This picture is called", "<!--= reads() -->4<!--/--> is called"))


def test_pictures_are_small_and_readable_in_the_dark():
    for path in (ROOT / "course").glob("*.svg"):
        text = path.read_text("utf-8")
        assert len(text) < 40_000 and "prefers-color-scheme:dark" in text and "<title>" in text, path.name
    assert {path.name for path in (ROOT / "course").glob("*.svg")} == set(make.PICTURES)


def test_functions_of_the_course_have_docstrings():
    """make.py is read by whoever wants to know where a figure is from."""
    for node in ast.walk(ast.parse((ROOT / "course" / "make.py").read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 12:
            assert ast.get_docstring(node) and node.end_lineno - node.lineno < 60, node.name
