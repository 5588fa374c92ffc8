#!/usr/bin/env python3
"""python course/exercises.py [CHAPTER ...]: does each exercise of the course break what it says?

Every chapter ends with changes that damage the engine, and names the tests that then fail. This program
makes each change in a copy of the project and runs the named tests there. A test that passes all the
same is an error. All exercises take a minute or two. A chapter is given by the beginning of its name.
"""
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXERCISE = re.compile(r"```diff\n# (\S+)\n(.*?)```(.*?)(?=```diff|\Z)", re.S)
CHANGE = re.compile(r"```patch\n# (\S+)\n(.*?)```", re.S)
FAILS = re.compile(r"`(test_\w+)`[^.`]*\bfails?\b")


def exercises(text):
    """(file, old lines, new lines, names of the tests that then fail) of each exercise of a chapter."""
    for name, diff, after in EXERCISE.findall(text):
        yield name, *old_and_new(diff), FAILS.findall(after)


def changes(text):
    """(file, old lines, new lines) of each change that a chapter makes to the engine."""
    for name, diff in CHANGE.findall(text):
        yield name, *old_and_new(diff)


def old_and_new(diff):
    """The lines of a diff before and after the change."""
    lines = diff.splitlines()
    return ("".join(line[1:] + "\n" for line in lines if line[0] in "- "),
            "".join(line[1:] + "\n" for line in lines if line[0] in "+ "))


def copied(folder):
    """A copy of the project, in a folder."""
    copy = Path(folder) / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))
    return copy


def fails(test, folder):
    """Whether a test of the project in this folder fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", test]
    some_failed = 1                                         # pytest's exit code; 5: there is no such test
    return subprocess.run(command, cwd=folder, capture_output=True).returncode == some_failed


def try_exercise(chapter, exercise, copy):
    """Makes an exercise's change in the copy, and takes it back. Returns the number of its tests that do
    not fail."""
    name, old, new, tests = exercise
    file = copy / name
    source = file.read_text("utf-8")
    file.write_text(source.replace(old, new), "utf-8")
    harmless = 0
    for test in tests:
        if fails(test, copy):
            result = "fails, as it should"
        else:
            result = "DOES NOT FAIL"
            harmless += 1
        print(f"{chapter:<26} {test:<64} {result}", flush=True)
    file.write_text(source, "utf-8")
    return harmless


def main(names):
    """Tries the exercises; the exit code is the number of tests that should fail and do not."""
    harmless = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(folder)
        for chapter in sorted((ROOT / "course").glob("*.md")):
            if not names or chapter.name.startswith(tuple(names)):
                for exercise in exercises(chapter.read_text("utf-8")):
                    harmless += try_exercise(chapter.name, exercise, copy)
    return harmless


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
