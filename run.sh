#!/usr/bin/env bash
# ./run.sh "What is a KV cache?"    set-up, then: python tinyvllm.py "What is a KV cache?"
# ./run.sh --chat [OPTION ...]      set-up, then: python chat.py [OPTION ...]
# ./run.sh                          set-up, then the whole check, in minutes: all tests and recitations
# ./run.sh --serve                  set-up, then an OpenAI-compatible server: python server.py
# ./run.sh --quick                  set-up, then a check of about a minute: a few tests, one recitation
#
# A check prints a table; its last line says passed or failed.
# Needed: Python 3.10 or newer, and an NVIDIA GPU or a C++ compiler. The set-up puts packages into
# .venv beside this script, once. TINYVLLM_PYTHON=/path/to/python names an interpreter that has the
# packages: then there is no set-up.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
venv=$here/.venv

fail() { echo "run.sh: $*" >&2; exit 2; }

check_version() {       # of the interpreter $1
    local version
    version=$("$1" -V 2>&1) || fail "expected Python 3.10 or newer, but $1 does not run (${version##*: })"
    if ! [[ $version =~ ([0-9]+)\.([0-9]+) ]] || (( BASH_REMATCH[1] * 100 + BASH_REMATCH[2] < 310 )); then
        fail "expected Python 3.10 or newer, but $1 is $version"
    fi
}

cupy_wheel() {          # the wheel for this machine's driver; nothing where there is no GPU
    [[ $(nvidia-smi 2>/dev/null) =~ CUDA[A-Za-z\ ]*:\ *([0-9]+) ]] || return 0
    case ${BASH_REMATCH[1]} in
        ? | 10 | 11)
            echo "run.sh: no GPU is used: expected a driver with CUDA 12, got ${BASH_REMATCH[1]}" >&2 ;;
        12) echo "cupy-cuda12x[ctk]" ;;         # [ctk]: with CUDA's libraries and headers
        *)  echo "cupy-cuda13x[ctk]" ;;
    esac
}

nccl_wheel() {          # NCCL for the CuPy wheel $1, where there are several GPUs
    if [[ $1 =~ cuda([0-9]+)x ]] && (( $(nvidia-smi -L | wc -l) > 1 )); then
        echo "nvidia-nccl-cu${BASH_REMATCH[1]}"
    fi
}

install() {             # packages into $venv
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@" >&2 ||
        fail "pip could not install the packages: check the network, and run this again"
}

set_up() {              # makes $venv, unless its stamp names this Python and these packages
    local wheel nccl wanted found
    wheel=$(cupy_wheel)
    nccl=$(nccl_wheel "$wheel")
    wanted="$wheel${nccl:+ $nccl} $(cat "$here/requirements.txt")"
    found=$(cat "$venv/stamp" 2>/dev/null) || true
    if [[ $found == "$("$venv/bin/python" -V 2>/dev/null) $wanted" ]]; then return; fi

    command -v python3 >/dev/null || fail "expected Python 3.10 or newer, but there is no python3"
    check_version python3
    python3 -c 'import venv, ensurepip' 2>/dev/null ||
        fail "python3 has no venv module: install it (apt install python3-venv)"
    # An interrupted set-up starts over. A .venv that works, if only for other requirements, is kept.
    if [[ $found == unfinished ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        rm -rf "$venv"
    fi
    if "$venv/bin/python" -c 'import cupy' 2>/dev/null; then wheel=; fi
    echo "run.sh: installing ${wheel:+$wheel (1 to 2 GB) and }requirements.txt into $venv, once" >&2
    mkdir -p "$venv" || fail "cannot make $venv"
    echo unfinished > "$venv/stamp"
    [[ -e $venv/bin/python ]] || python3 -m venv "$venv" || fail "cannot make $venv"
    install -r "$here/requirements.txt" ${wheel:+"$wheel"} ${nccl:+"$nccl"}
    echo "$("$venv/bin/python" -V) $wanted" > "$venv/stamp"
}

check=
if (( $# == 0 )); then check=whole; fi
if [[ $* == --quick ]]; then check=quick; fi

python=${TINYVLLM_PYTHON:-$venv/bin/python}
if [[ $python == "$venv/bin/python" ]]; then
    set_up
    if [[ $check ]] && ! "$python" -c 'import pytest, xdist, openai, llguidance' 2>/dev/null; then
        install pytest pytest-xdist openai llguidance
    fi
else
    check_version "$python"
    needed="numpy, ml_dtypes, safetensors, tokenizers, jinja2${check:+, pytest, xdist}"
    error=$("$python" -c "import $needed" 2>&1) ||
        fail "$python needs the packages of requirements.txt${check:+, and pytest-xdist}: ${error##*$'\n'}"
fi
if [[ ${1:-} == --chat ]]; then exec "$python" "$here/chat.py" "${@:2}"; fi
if [[ ${1:-} == --serve ]]; then exec "$python" "$here/server.py" "${@:2}"; fi
if [[ ! $check ]]; then exec "$python" "$here/tinyvllm.py" "$@"; fi

exec "$python" - "$here" "$check" <<'EOF_PYTHON'
import json
import os
import re
import signal
import subprocess
import sys
import time

folder, check = sys.argv[1:]
os.chdir(folder)
sys.path.insert(0, folder)
from device import TinyVLLMError, open_device

LIMIT = 1800            # seconds for one part: more is a hang
QUICK_TESTS = ["test_gather_rows", "test_rope_and_cache", "test_attention_one_sequence", "test_silu_mul",
               "test_greedy", "test_forward_equals_numpy", "test_scheduler_random_events"]
with open("parrot/texts.json", encoding="utf-8") as file:
    ANSWERS = {text["questions"][0]: "\n".join(text["answer"]) for text in json.load(file)}
ALONE = ["Who are you?", "What is a KV cache?", "Recite Basho's frog.", "Recite Ozymandias.",
         "Recite The Raven."]
failed = []             # names of parts


def run(arguments, **options):
    """A process of this Python: (its error or "", its stdout, the last line of its stderr)."""
    try:
        done = subprocess.run([sys.executable, *arguments], timeout=LIMIT, **options)
    except subprocess.TimeoutExpired:
        return f"no end in {LIMIT} s", b"", ""
    last_line = (done.stderr or b"").decode(errors="replace").strip().split("\n")[-1]
    error = f"exit code {done.returncode} {last_line}".strip() if done.returncode else ""
    return error, done.stdout, last_line


def print_row(part, device, start, error, rate=""):
    """One part's line of the table. start: when the part began; rate: tokens a second, as text."""
    if error:
        failed.append(part)
    result = f"FAILED: {error}" if error else "passed"
    print(f"{part:<27} {device:<29} {time.time() - start:>7.1f} {rate:>8}  {result}", flush=True)


def recite(part, prompt, stdin, expected):
    """The real command line in a process of its own; its stdout must be `expected`, byte for byte."""
    start = time.time()
    wanted = expected.encode()
    command = ["tinyvllm.py", "--model", "parrot", prompt]
    error, out, last_line = run(command, input=stdin.encode(), capture_output=True)
    if not error and out != wanted:
        at = len(os.path.commonprefix([out, wanted]))
        expected_here, got = (text[at:at + 24].decode(errors="replace") for text in (wanted, out))
        error = f"at byte {at}: expected {expected_here!r}, got {got!r}"
    found = re.search(r"([\d.]+) tokens/s.* \| (.+)", last_line)
    rate, device = found.groups() if found else ("", "?")
    print_row(part, device, start, error, rate)


signal.signal(signal.SIGINT, signal.SIG_DFL)            # Ctrl-C ends the check without a traceback
try:
    device = open_device().name
except TinyVLLMError as error:                          # no GPU and no compiler, for example
    print(f"tinyvllm: {error}", file=sys.stderr)
    sys.exit(2)

start = time.time()
if check == "quick":
    part = f"{len(QUICK_TESTS)} of the tests"
    options = ["-k", " or ".join(QUICK_TESTS)]
else:
    part = "the tests (pytest -q -n 2)"
    options = ["-n", "2"]
error, _, _ = run(["-m", "pytest", "-q", *options], stdin=subprocess.DEVNULL)
if error:
    error += ", see above"
print(f"\n{'part':<27} {'on':<29} {'seconds':>7} {'tokens/s':>8}")
print_row(part, device, start, error)
for question in ALONE[:1] if check == "quick" else ALONE:
    recite(question, question, "", f"{ANSWERS[question]}\n")
if check == "whole":
    everything = "".join(f"> {question}\n{answer}\n\n" for question, answer in ANSWERS.items())
    recite(f"all {len(ANSWERS)} texts at once", "-", "\n".join(ANSWERS), everything)
print(f"failed: {', '.join(failed)}" if failed else "passed: everything")
sys.exit(bool(failed))
EOF_PYTHON
