#!/usr/bin/env python3
"""python course/make.py: draws the course's pictures and fills in its figures, tables and code.

In README.md and the chapters, the text between <!--= EXPRESSION --> and <!--/--> is the value of the
expression, under the names of figures.py. An expression that is a function gets the text that stands
there and returns the new text. A test runs make.py again and finds nothing to change.

The measured figures are those of h200.json, from an NVIDIA H200. To have all of them for another card,
run figures.COMMAND there, and then this program.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))       # where a test has loaded this file
import figures
from figures import COURSE, ROOT
from pictures import PICTURES

MARKED = re.compile(r"(<!--= (.+?) -->)(.*?)(<!--/-->)", re.S)


def fill_in(text):
    """The text with the value of each expression in its place."""
    def filled(match):
        begin, expression, content, end = match.groups()
        value = eval(expression, vars(figures))
        if callable(value):
            value = value(content)
        return f"{begin}{value}{end}"

    return MARKED.sub(filled, text)


def made():
    """{path: content} of every file that this program writes."""
    files = {COURSE / name: str(draw()) for name, draw in PICTURES.items()}
    for path in [ROOT / "README.md", *sorted(COURSE.glob("*.md"))]:
        try:
            files[path] = fill_in(path.read_text("utf-8"))
        except Exception as error:
            raise SystemExit(f"{path.name}: {type(error).__name__}: {error}") from error
    return files


def main():
    """Writes the files that have changed."""
    for path, content in made().items():
        if not path.exists() or path.read_text("utf-8") != content:
            path.write_text(content, "utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
