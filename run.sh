#!/usr/bin/env bash
# ./run.sh "What is a KV cache?"    sets up what is needed, then: python tinyvllm.py "What is a KV cache?"
# ./run.sh                          sets up likewise, then checks it all, end to end; the last line says passed or failed
#
# Needed: Python 3.10 or newer, and an NVIDIA GPU or a C++ compiler. Packages go to .venv beside this script, once.
# TINYVLLM_PYTHON=/path/to/python takes an interpreter that has them already, as it is.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
venv=$here/.venv

fail() { echo "run.sh: $*" >&2; exit 2; }

check_version() {       # of the interpreter $1
    local version
    version=$("$1" -V 2>&1) || fail "$1 does not run (${version##*: }), needed is Python 3.10 or newer"
    if ! [[ $version =~ ([0-9]+)\.([0-9]+) ]] || (( BASH_REMATCH[1] * 100 + BASH_REMATCH[2] < 310 )); then
        fail "$1 is $version, needed is Python 3.10 or newer"
    fi
}

cupy_wheel() {          # the one for this machine's driver; nothing where there is no GPU
    [[ $(nvidia-smi 2>/dev/null) =~ CUDA[A-Za-z\ ]*:\ *([0-9]+) ]] || return 0
    case ${BASH_REMATCH[1]} in
        ? | 10 | 11) echo "run.sh: no GPU is used: its driver has CUDA ${BASH_REMATCH[1]}, needed is 12 or newer" >&2 ;;
        12) echo "cupy-cuda12x[ctk]" ;;         # [ctk]: with the CUDA libraries, and the headers that kernels.cu includes
        *)  echo "cupy-cuda13x[ctk]" ;;
    esac
}

set_up() {              # makes $venv, unless its stamp says that it is just what is wanted
    local wheel wanted found
    wheel=$(cupy_wheel)
    wanted="$wheel $(cat "$here/requirements.txt")"
    found=$(cat "$venv/stamp" 2>/dev/null) || true
    if [[ $found == "$("$venv/bin/python" -V 2>/dev/null) $wanted" ]]; then return; fi

    command -v python3 >/dev/null || fail "there is no python3, needed is Python 3.10 or newer"
    check_version python3
    python3 -c 'import venv, ensurepip' 2>/dev/null || fail "python3 has no venv module: install it (apt install python3-venv)"
    # A set-up that was interrupted is started over. A .venv that works, if only for other requirements, is kept.
    if [[ $found == unfinished ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then rm -rf "$venv"; fi
    if "$venv/bin/python" -c 'import cupy' 2>/dev/null; then wheel=; fi
    echo "run.sh: installing ${wheel:+$wheel (1 to 2 GB) and }the packages of requirements.txt into $venv, once" >&2
    mkdir -p "$venv" || fail "cannot make $venv"
    echo unfinished > "$venv/stamp"
    [[ -e $venv/bin/python ]] || python3 -m venv "$venv" || fail "cannot make $venv"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check -r "$here/requirements.txt" ${wheel:+"$wheel"} >&2 ||
        fail "pip could not install the packages: check the network, and run this again"
    echo "$("$venv/bin/python" -V) $wanted" > "$venv/stamp"
}

python=${TINYVLLM_PYTHON:-$venv/bin/python}
if [[ $python == "$venv/bin/python" ]]; then
    set_up
else
    check_version "$python"
    error=$("$python" -c 'import numpy, ml_dtypes, safetensors, tokenizers' 2>&1) ||
        fail "$python needs the packages of requirements.txt: ${error##*$'\n'}"
fi
if (( $# )); then exec "$python" "$here/tinyvllm.py" "$@"; fi

exec "$python" - "$here" <<'EOF'
import json, os, re, signal, subprocess, sys, time
os.chdir(sys.argv[1])
sys.path.insert(0, sys.argv[1])
from tinyvllm import TinyVLLMError, open_device

LIMIT = 1800            # seconds for one part: more is a hang
ANSWERS = {text["questions"][0]: "\n".join(text["answer"]) for text in json.load(open("parrot/texts.json", encoding="utf-8"))}
ALONE = ["Who are you?", "What is a KV cache?", "Recite Basho's frog.", "Recite Ozymandias.", "Recite The Raven."]
failed = []


def run(arguments, **options):
    """A process of this Python: (what went wrong, stdout, last line of stderr)."""
    try:
        done = subprocess.run([sys.executable, *arguments], timeout=LIMIT, **options)
    except subprocess.TimeoutExpired:
        return f"no end in {LIMIT} s", b"", ""
    last = (done.stderr or b"").decode(errors="replace").strip().split("\n")[-1]
    return f"exit code {done.returncode} {last}".strip() if done.returncode else "", done.stdout, last


def row(part, device, start, error, rate=""):
    failed.extend([part] * bool(error))
    print(f"{part:<27} {device:<29} {time.time() - start:>7.1f} {rate:>8}  {'FAILED: ' + error if error else 'passed'}", flush=True)


def recite(part, prompt, stdin, expected):
    """The real command line in a process of its own: what it prints must be `expected`, byte for byte."""
    start, expected = time.time(), expected.encode()
    error, out, last = run(["tinyvllm.py", "--model", "parrot", prompt], input=stdin.encode(), capture_output=True)
    if not error and out != expected:
        at = len(os.path.commonprefix([out, expected]))
        got, wanted = (text[at:at + 24].decode(errors="replace") for text in (out, expected))
        error = f"at byte {at} {got!r}, expected {wanted!r}"
    rate, device = (re.findall(r"([\d.]+) tokens/s.* \| (.+)", last) or [("", "?")])[0]
    row(part, device, start, error, rate)


signal.signal(signal.SIGINT, signal.SIG_DFL)            # Ctrl-C ends it without a traceback
try:
    device = open_device().name
except TinyVLLMError as error:                          # no GPU and no compiler, for one
    print(f"tinyvllm: {error}", file=sys.stderr)
    sys.exit(2)
start = time.time()
error = run(["-m", "pytest", "-q"], stdin=subprocess.DEVNULL)[0]
print(f"\n{'part':<27} {'on':<29} {'seconds':>7} {'tokens/s':>8}")
row("the tests (pytest -q)", device, start, error and f"{error}, see above")
for question in ALONE:
    recite(question, question, "", ANSWERS[question] + "\n")
recite(f"all {len(ANSWERS)} texts at once", "-", "\n".join(ANSWERS), "".join(f"> {q}\n{a}\n\n" for q, a in ANSWERS.items()))
print(f"failed: {', '.join(failed)}" if failed else "passed: everything")
sys.exit(bool(failed))
EOF
