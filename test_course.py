"""The course is kept true: its code is quoted from the source, its examples run, the things that it names
exist, and its figures come from course/h200.json.

A check returns a list of mistakes. Each check also gets a text with a mistake in it: a check that cannot
fail checks nothing.

Sections: Code, Names and links, Figures.
"""
import ast
import contextlib
import doctest
import io
import re
import shlex
import subprocess
import sys
from functools import cache
from itertools import dropwhile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "course"))
import bench
import communicator
import completions
import device
import exercises
import figures
import fp8
import make
import pictures
import program
import sampling
import server
import simulator
import tinyvllm
import tokenizer
import views
import weights
import worker

ROOT = Path(__file__).parent
MODULES = [tinyvllm, program, sampling, weights, device, bench, views, tokenizer, simulator, server,
           completions, worker, communicator, fp8]
CUDA_FILES = sorted(path.name for path in ROOT.iterdir() if path.suffix in (".cu", ".h"))
SOURCES = [*(f"{module.__name__}.py" for module in MODULES), *CUDA_FILES]
TEXT = {name: (ROOT / name).read_text("utf-8") for name in SOURCES}
CUDA = "\n".join(TEXT[name] for name in CUDA_FILES)
TESTS = "\n".join(path.read_text("utf-8") for path in [*ROOT.glob("test_*.py"), *ROOT.glob("reference.py")])
CHAPTERS = sorted(path.name for path in (ROOT / "course").glob("*.md"))
PAGES = {name: (ROOT / name).read_text("utf-8")
         for name in ["README.md", *(f"course/{chapter}" for chapter in CHAPTERS)]}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
HEADINGS = ["It fails", "The idea", "The code", "The test", "The price", "What vLLM does", "Break it"]
CHANGING = "course/19-changing-the-engine.md"       # its examples run in a changed copy of the project
PARROT = (ROOT / "parrot" / "texts.json").read_text("utf-8")


def prose(text, foreign=True):
    """The text without fenced blocks and marked spots. foreign=False: also without the sections on other
    engines."""
    text = re.sub(r"<!--=.*?<!--/-->", "", FENCE.sub("", text), flags=re.S)
    if foreign:
        return text
    return re.sub(r"^## (What vLLM does|The dictionary)\n.*?(?=^## )", "", text, flags=re.S | re.M)


def changed(page, old, new):
    """PAGES with a mistake in one of them."""
    assert PAGES[page].count(old) >= 1, f"{page} has no {old!r} any more: change this test's mistake"
    return PAGES | {page: PAGES[page].replace(old, new)}


@cache
def options(program):
    """The options of a program, as its --help prints them."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        program.main(["--help"])
    return set(re.findall(r"^  (?:-h, )?(--[\w-]+)", out.getvalue(), re.M)) | {"-h"}


# ======================================================================================================
# Code
# ======================================================================================================
def is_quoted(code):
    """Whether the lines stand in a source file, one after the other, perhaps further to the right."""
    lines = code.rstrip("\n").split("\n")
    for spaces in range(0, 21, 4):
        indented = "\n".join(" " * spaces + line if line.strip() else "" for line in lines)
        if any(f"\n{indented}\n" in f"\n{source}" for source in TEXT.values()):
            return True
    return False


def bad_command(line):
    """A list with the mistake of a command line of ours, or an empty list."""
    words = shlex.split(line.split(" < ")[0])
    program, *arguments = dropwhile(lambda word: "=" in word, words)         # NAME=VALUE before a command
    if program in ("git", "curl", "vllm-router", ".venv/bin/hf", ".venv/bin/pip"):
        return []
    if program == "./run.sh":
        is_known = arguments in ([], ["--quick"], ["--chat"], ["--serve"])
        return [] if is_known else bad_arguments(line, arguments)
    if program not in (".venv/bin/python", "python3"):
        return [f"unknown command: {line}"]
    if arguments[0] == "tinyvllm.py":
        return bad_arguments(line, arguments[1:])
    if arguments[0] in ("bench.py", "server.py"):
        known = options(bench if arguments[0] == "bench.py" else server)
        unknown = [word for word in arguments if word.startswith("--") and word not in known]
        return [f"{line}: no option {word}" for word in unknown]
    if arguments[:2] == ["-m", "pytest"]:
        names = arguments[arguments.index("-k") + 1:] if "-k" in arguments else []
        return [f"{line}: no test {name}" for name in names if f"def {name}(" not in TESTS]
    is_ours = arguments[0] == "-m" or (ROOT / arguments[0]).exists()
    return [] if is_ours else [f"unknown command: {line}"]


def bad_arguments(line, arguments):
    """A list with the mistake in the arguments of tinyvllm.py, or an empty list."""
    try:
        tinyvllm.parse_arguments(arguments)
    except tinyvllm.TinyVLLMError as error:
        return [f"{line}: {error}"]
    return []


def bad_block(page, language, code):
    """The mistakes of a fenced block: it must be commands, an example, an exercise, a change, lines of the
    source, an answer of Parrot's, or a file of the chapter on the server, which test_server.py runs."""
    if language == "sh" or code.startswith((".venv", "./run.sh", "python3 -m venv")):
        lines = code.replace("\\\n", " ").splitlines()
        return [mistake for line in lines for part in line.split(" && ") for mistake in bad_command(part)]
    is_example = code.startswith(">>> ") or (page, language) == ("README.md", "python")
    is_answer = language == "" and " ".join(code.split()) in PARROT
    is_file = page == "course/15-server.md" and code.startswith("# replicas.")
    if language in ("diff", "patch") or is_example or is_answer or is_file or is_quoted(code):
        return []
    return [f"{page}: {code}"]


def wrong_code(pages):
    """Mistakes in the fenced blocks: see bad_block. An exercise changes lines that a file has once, and
    names a test. A change also changes such lines."""
    wrong = []
    for page, text in pages.items():
        found = list(exercises.exercises(text))
        for name, old, _, tests in found:
            if TEXT.get(name, "").count(old) != 1 or not tests:
                wrong.append(f"{page}: exercise {old!r}")
        changes = list(exercises.changes(text))
        wrong += [f"{page}: change {old!r}" for name, old, _ in changes if TEXT.get(name, "").count(old) != 1]
        if len(found) != text.count("```diff") or len(changes) != text.count("```patch"):
            wrong.append(f"{page}: an exercise or a change names no file")
        for language, code in FENCE.findall(text):
            wrong += bad_block(page, language, code)
    return wrong


def test_code_is_quoted():
    """Word for word; and commands have options that exist."""
    assert wrong_code(PAGES) == []
    for page, old, new in [
            ("course/10-memory.md", "self.waiting.appendleft(sequence)", "self.waiting.append(sequence)"),
            ("course/05-kernels.md", "(size_t)blockIdx.x * HIDDEN;\n    for",
             "blockIdx.x * HIDDEN;\n    for"),
            ("course/10-memory.md", "-                victim = self.running[-1]",
             "-                victim = self.running[-2]"),
            ("course/10-memory.md", "# tinyvllm.py\n-", "-"),
            ("course/10-memory.md", "`test_scheduler_random_events` fails", "It fails"),
            ("course/00-run-it.md", "./run.sh --trace run.html", "./run.sh --traces run.html"),
            ("course/00-run-it.md", "-k test_forward_equals_numpy\n", "-k test_forward_is_numpy\n"),
            ("course/15-server.md", "server.py --port 8001", "server.py --ports 8001"),
            ("course/15-server.md", "# replicas.py: serve", "# a file: serve"),
            (CHANGING, "-            chunk = min(", "-            chunks = min("),
            (CHANGING, "# server.py\n", ""),
            ("README.md", "bench.py --model", "bench.py --models"),
            ("README.md", "A KV cache keeps the key", "A KV cache keeps a key")]:
        assert wrong_code(changed(page, old, new)), (page, old)


def failed_examples(page, text):
    """(number of a page's >>> examples that print something else, the report)."""
    test = doctest.DocTestParser().get_doctest(text.replace("\n```\n", "\n\n"), {}, page, page, 0)
    out = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(test, out=out.write)
    return runner.failures, out.getvalue()


@pytest.mark.parametrize("page", [page for page in PAGES if ">>> " in PAGES[page] and page != CHANGING])
def test_examples_run(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    failures, out = failed_examples(page, PAGES[page])
    assert not failures, out


def test_a_wrong_example_is_noticed():
    page = "course/09-batching.md"
    wrong = changed(page, "88 places in the batch, 49 tokens", "88 places in the batch, 48 tokens")
    failures, _ = failed_examples(page, wrong[page])
    assert failures == 1


def report_of_changes(text, folder):
    """Makes a page's changes in a copy of the project, and runs its examples there. Returns what doctest
    prints: nothing, if all is well."""
    copy = exercises.copied(folder)
    for name, old, new in exercises.changes(text):
        file = copy / name
        file.write_text(file.read_text("utf-8").replace(old, new), "utf-8")
    (copy / "page.txt").write_text(text.replace("\n```\n", "\n\n"), "utf-8")
    command = [sys.executable, "-m", "doctest", "page.txt"]
    return subprocess.run(command, cwd=copy, capture_output=True, text=True).stdout


def test_changes_work(tmp_path):
    """The last chapter's changes. Without a line of them, an example fails."""
    assert report_of_changes(PAGES[CHANGING], tmp_path / "good") == ""
    bad = changed(CHANGING, "room, self.longest_chunk)", "room)")[CHANGING]
    assert "[30]" in report_of_changes(bad, tmp_path / "bad")


# ======================================================================================================
# Names and links
# ======================================================================================================
@cache
def functions():
    """Names of the functions and kernels in the source."""
    python = re.findall(r"\bdef (\w+)\(", "\n".join(TEXT.values()) + TESTS)
    cuda = re.findall(r"[ *&](\w+)\([^;{]*\) ?\{", CUDA) + re.findall(r"void (\w+)\(", CUDA)
    return {*python, *cuda, "__syncthreads"}


def has_attribute(path):
    """Whether NAME or CLASS.NAME is in one of our modules."""
    name, _, member = path.partition(".")
    for module in MODULES:
        thing = getattr(module, name, None)
        if thing is None:
            continue
        fields = getattr(thing, "__dataclass_fields__", {})
        is_assigned = f"self.{member} = " in TEXT[f"{module.__name__}.py"]
        if not member or hasattr(thing, member) or member in fields or is_assigned:
            return True
    return False


def is_unknown(name):
    """Whether a name in backticks looks like an option, a function, a member or a file, but we have none."""
    if name.startswith("--"):
        return name.split()[0] not in options(tinyvllm) | options(bench) | options(server)
    if re.fullmatch(r"\w+\(\)", name):
        return name[:-2] not in functions()
    if re.fullmatch(r"[A-Z]\w*[a-z]\w*\.[a-z_]+", name):
        return not has_attribute(name)
    is_file = re.fullmatch(r"\w+\.(py|cu|h|md|sh)", name)
    return bool(is_file) and not (ROOT / name).exists()


def first_column(page, heading):
    """The names in backticks in the first column of the table below this header."""
    table = page[page.index(heading):].split("\n\n")[0]
    cells = [re.match(r"\| (.*?) \|", line)[1] for line in table.splitlines()[2:]]
    return re.findall(r"`([^`]+)`", " ".join(cells))


def missing_names(pages):
    """Tests, options, functions, members and files in backticks that do not exist. In the sections on other
    engines only tests are ours. Our column of the dictionary, and README.md's table of places to touch, name
    nothing else than ours."""
    missing = []
    for page, text in pages.items():
        names = re.findall(r"`([^`\n]+)`", prose(text, foreign=False))
        tests = re.findall(r"`(test_\w+)`", text)
        missing += [f"{page}: {name}" for name in tests if f"def {name}(" not in TESTS]
        missing += [f"{page}: {name}" for name in names if is_unknown(name)]
    dictionary = first_column(pages["course/18-real-engines.md"], "| here | vLLM |")
    readme = pages["README.md"]
    places = re.findall(r"`([^`]+)`", readme[readme.index("| to add |"):].split("\n\n")[0])
    for name in dictionary + places:
        is_ours = has_attribute(name) or name in functions() or (ROOT / name).exists()
        if not is_ours and name not in options(tinyvllm) | {"block_table", "slot_mapping"}:
            missing.append(f"a table: {name}")
    return missing


def test_named_things_exist():
    """Tests, options, functions and files that the text names; in two tables, everything."""
    assert missing_names(PAGES) == []
    for page, old, new in [
            ("course/07-pages.md", "`test_scheduler_random_events` fails",
             "`test_scheduler_random_event` fails"),
            ("course/07-pages.md", "`--block-size` lets", "`--block-sizes` lets"),
            ("course/04-forward.md", "`numpy_llama()`", "`numpy_lama()`"),
            ("course/04-forward.md", "`forward()`", "`forwards()`"),
            ("course/05-kernels.md", "`simulator.h`", "`simulators.h`"),
            ("course/18-real-engines.md", "| `Scheduler.preempt` |", "| `Scheduler.evict` |"),
            ("course/18-real-engines.md", "| `--no-overlap` |", "| `--not-overlap` |"),
            ("README.md", "`SUPPORTED`", "`SUPPORT`")]:
        assert missing_names(changed(page, old, new)), (page, old)


def anchors(text):
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(pages):
    """Links and pictures that lead nowhere, and chapters and pictures that nothing leads to."""
    wrong = []
    reached = set()
    for page, text in pages.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("https://"):
                continue
            target, _, anchor = link.partition("#")
            path = ((ROOT / page).parent / target if target else ROOT / page).resolve()
            reached.add(path)
            if not path.exists():
                wrong.append(f"{page}: {link}")
            elif anchor and anchor not in anchors(pages.get(str(path.relative_to(ROOT.resolve())), "")):
                wrong.append(f"{page}: {link}")
    parts = [*(ROOT / "course").glob("*.svg"), *(ROOT / "course").glob("*.md")]
    return wrong + [f"nothing leads to {path.name}" for path in parts if path.resolve() not in reached]


def test_links_resolve():
    assert broken_links(PAGES) == []
    for page, old, new in [("course/00-run-it.md", "(02-text.md)", "(02-texts.md)"),
                           ("course/00-run-it.md", "#looking-inside)", "#looking-outside)"),
                           ("course/07-pages.md", "![Reserved and paged](waste.svg)", "")]:
        assert broken_links(changed(page, old, new)), (page, old)


def wrong_shape(pages):
    """Chapters that lack a part, a picture, or the way to the next; and a list of chapters in README.md that
    is not the folder's. A chapter has the number of its file."""
    listed = re.findall(r"^\| \[\d+\. .*?\]\(course/(\d\d-.*?)\) \|", pages["README.md"], re.M)
    wrong = [] if listed == CHAPTERS else [f"README.md lists {listed}"]
    for name, next_page in zip(CHAPTERS, [*CHAPTERS[1:], "../README.md"]):
        number = int(name[:2])
        text = pages[f"course/{name}"]
        headings = [heading for heading in re.findall(r"^## (.+)$", text, re.M) if heading in HEADINGS]
        expected = {0: ["The test", "Break it"], 18: ["Break it"], 19: ["The test", "Break it"]}.get(
            number, HEADINGS)
        if headings != expected:
            wrong.append(f"{name}: {headings}")
        if not re.match(rf"# {number}\. .+\n\n\*[^*]+\?[^*]*\*\n", re.sub(r"<!--.*?-->", "", text)):
            wrong.append(f"{name}: begins with {text[:60]!r}")
        if not re.search(r"!\[|^\| --- ", text, re.M):
            wrong.append(f"{name} has no picture")
        if f"]({next_page})" not in text:
            wrong.append(f"{name} does not lead on")
        wrong += [f"{name} says {word}" for word in ("TODO", "Incoming") if word in text]
    return wrong


def test_every_chapter_is_whole():
    assert wrong_shape(PAGES) == []
    assert wrong_shape(changed("README.md", "| [7. Pages](course/07-pages.md) |", "| Pages |"))
    for old, new in [("## The price", "## What it costs"), ("](08-attention.md)", "](09-batching.md)"),
                     ("*How long will this answer be?*", ""), ("That one line", "TODO")]:
        assert wrong_shape(changed("course/07-pages.md", old, new)), old


def test_quick_check_runs_tests_that_exist():
    """run.sh --quick picks its tests by name."""
    script = (ROOT / "run.sh").read_text("utf-8")
    names = re.findall(r'"(test_\w+)"', script)
    assert names and all(f"def {name}(" in TESTS for name in names)


# ======================================================================================================
# Figures
# ======================================================================================================
def test_make_finds_nothing_to_change(monkeypatch):
    """Pictures, figures, tables and quoted code are what course/make.py makes of source and h200.json."""
    assert set(figures.ROWS) <= set(figures.BENCH)
    assert f"--model {figures.MEASURED['model']} " in figures.COMMAND
    stale = [path.name for path, content in make.made().items() if path.read_text("utf-8") != content]
    assert stale == [], "run: python course/make.py"
    monkeypatch.setitem(figures.ROWS, "mix", figures.ROWS["mix"] | {"value": 1.0, "share": 0.5})
    assert make.fill_in(PAGES["README.md"]) != PAGES["README.md"]
    assert str(pictures.draw_floor()) != (ROOT / "course" / "floor.svg").read_text("utf-8")
    with pytest.raises(AssertionError, match="0 times"):
        figures.code("tinyvllm.py", "no such line")


def typed_figures(pages):
    """Measured figures and counts of lines outside the spots that make.py fills, and lines that begin with
    a filled spot, which Markdown takes for HTML."""
    figure = r"\d[\d,.]* ?(?:ms|tokens/s|GB/s|TB/s|TFLOP/s|lines)\b"
    wrong = []
    for page, text in pages.items():
        wrong += [f"{page}: {found}" for found in re.findall(figure, prose(text))]
        wrong += [f"{page}: a line begins with a figure: {line}" for line in text.splitlines()
                  if re.match(r"<!--= .* -->.+", line)]
    return wrong


def test_no_figure_is_typed():
    old = "This picture is called"
    assert typed_figures(PAGES) == []
    assert typed_figures(changed("course/01-cost.md", old, "It takes 1.07 ms. This picture is called"))
    assert typed_figures(changed("course/01-cost.md", old, "<!--= reads() -->4<!--/--> is called"))


def test_pictures_are_small_and_readable_in_the_dark():
    files = list((ROOT / "course").glob("*.svg"))
    for path in files:
        text = path.read_text("utf-8")
        assert len(text) < 40_000, path.name
        assert "prefers-color-scheme:dark" in text and "<title>" in text, path.name
    assert {path.name for path in files} == set(pictures.PICTURES)


def test_functions_of_the_course_have_docstrings():
    """figures.py and pictures.py are read by whoever wants to know where a figure is from."""
    for path in (ROOT / "course").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 12:
                assert ast.get_docstring(node) and node.end_lineno - node.lineno < 60, (path.name, node.name)
