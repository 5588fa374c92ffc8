#!/usr/bin/env python3
"""python course/exercises.py [CHAPTER ...]: does each exercise of the course break what it says?

Every chapter ends with changes that damage the engine, and names the tests that then fail. Each is made in a copy of the project, and these tests
are run there. A test that passes all the same is an error. It takes a minute or two; chapters are given by the beginnings of their names.
"""
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXERCISE = re.compile(r"```diff\n# (\S+)\n(.*?)```(.*?)(?=```diff|\Z)", re.S)
FAILS = re.compile(r"`(test_\w+)`[^.`]*\bfails?\b")


def exercises(text):
    """(file, its lines that go, the lines that come, tests that fail then) of each exercise in a chapter."""
    for name, diff, after in EXERCISE.findall(text):
        old, new = ("".join(line[1:] + "\n" for line in diff.splitlines() if line[0] in sign) for sign in ("- ", "+ "))
        yield name, old, new, FAILS.findall(after)


def main(names):
    """Tries the exercises; the exit code is how many did no harm."""
    harmless = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))
        for chapter in sorted((ROOT / "course").glob("*.md")):
            wanted = not names or chapter.name.startswith(tuple(names))
            for name, old, new, tests in exercises(chapter.read_text("utf-8")) if wanted else ():
                source = (copy / name).read_text("utf-8")
                (copy / name).write_text(source.replace(old, new), "utf-8")
                for test in tests:
                    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", test]
                    failed = subprocess.run(command, cwd=copy, capture_output=True).returncode == 1
                    harmless += not failed
                    print(f"{chapter.name:<22} {test:<64} {'fails, as it should' if failed else 'DOES NOT FAIL'}", flush=True)
                (copy / name).write_text(source, "utf-8")
    return harmless


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
