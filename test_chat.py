"""chat.py: in a pseudo-terminal, with lines in a pipe, and in this process.

Parrot answers in the simulator: a GPU recites faster than a test can press Ctrl-C. The oracles are
Parrot's texts, and prompts in Llama 3's published format, counted by the package `tokenizers`.
"""
import contextlib
import fcntl
import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios

import pytest
import tokenizers

import chat
from reference import PARROT, ROOT
from tinyvllm import LLM, RequestOutput, SamplingParams, TinyVLLMError, TokenizerError

TEXTS = json.loads((PARROT / "texts.json").read_text("utf-8"))
ANSWERS = {question: "\n".join(text["answer"]) for text in TEXTS for question in text["questions"]}
FROG = "Recite Basho's frog."
WHO = "Who are you?"
RAVEN = "Recite The Raven."
TOKENIZER = tokenizers.Tokenizer.from_file(str(PARROT / "tokenizer.json"))
COMMAND = [sys.executable, str(ROOT / "chat.py"), "--model", str(PARROT), "--device", "cpu"]
LIMIT = 60                      # seconds without a sign of life: a hang


def count(text):
    """The number of tokens of a text. Special tokens in the text count as one."""
    return len(TOKENIZER.encode(text, add_special_tokens=False).ids)


def prompt_size(turns, question, system=None):
    """The number of tokens of a prompt in Llama 3's format. turns: [(question, answer), ...]."""
    messages = [("system", system)] if system else []
    for earlier, answer in turns:
        messages += [("user", earlier), ("assistant", answer)]
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    text = "".join(header(role) + content.strip() + "<|eot_id|>"
                   for role, content in [*messages, ("user", question)])
    return count("<|begin_of_text|>" + text + header("assistant"))


class Terminal:
    """chat.py in a terminal of its own."""

    def __init__(self, *args):
        self.master, self.slave = pty.openpty()
        self.settings = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [*COMMAND, *args], stdin=self.slave, stdout=self.slave, stderr=self.slave,
            env=os.environ | {"PYTHONIOENCODING": "utf-8", "TERM": "xterm", "INPUTRC": "/dev/null"},
            start_new_session=True, preexec_fn=self.own)
        self.sent = b""
        self.start = self.prompt()

    def own(self):
        """In the new process: Ctrl-C in the terminal goes to this process."""
        fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def read(self, pattern):
        """What the terminal shows until the pattern matches, without codes and carriage returns."""
        data = b""
        shown = ""
        while not re.search(pattern, shown):
            assert select.select([self.master], [], [], LIMIT)[0], shown
            piece = os.read(self.master, 65536)
            self.sent += piece
            data += piece
            shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\a", "", data.decode(errors="ignore"))
        return shown

    def prompt(self):
        """What is shown up to the prompt."""
        return self.read(r"(^|\n)> $").removesuffix("> ")

    def send(self, keys):
        os.write(self.master, keys.encode())

    def ask(self, line):
        """What is shown after a line, without the line."""
        self.send(line + "\n")
        shown = self.prompt()
        assert shown.startswith(line + "\n"), shown
        return shown[len(line) + 1:]

    def end(self):
        """The exit code. The terminal is as it was."""
        code = self.process.wait(LIMIT)
        assert termios.tcgetattr(self.slave) == self.settings
        os.close(self.slave)
        os.close(self.master)
        return code


def split(shown):
    """(answer, tokens of the prompt, cached tokens, new tokens, the lines after) of what is shown."""
    line = r"(\d+) prompt tokens \((\d+) cached\), (\d+) new tokens, [\d.]+ tokens/s"
    found = re.fullmatch(rf"(.*)\n{line}\n(.*)", shown, re.S)
    assert found, shown
    answer, *numbers, after = found.groups()
    return answer, *map(int, numbers), after


def pages(num_tokens):
    """Tokens in whole pages: the text of an earlier turn without its last token, which is not computed."""
    return (num_tokens - 1) // 16 * 16


def test_a_conversation():
    """Exact answers. Each prompt has the whole conversation, and finds its pages."""
    terminal = Terminal()
    assert "4096 tokens of context" in terminal.start
    answer, prompt, cached, new, after = split(terminal.ask(WHO))
    assert (answer, prompt, cached, after) == (ANSWERS[WHO], prompt_size([], WHO), 0, "")
    assert new == count(ANSWERS[WHO]) + 1                       # and the end of the turn
    turns = [(WHO, ANSWERS[WHO])]

    answer, prompt, cached, _, _ = split(terminal.ask(FROG))
    assert (answer, prompt) == (ANSWERS[FROG], prompt_size(turns, FROG))
    assert cached == pages(prompt_size([], WHO) + new) > 0
    turns.append((FROG, ANSWERS[FROG]))

    system = "You are a helpful assistant."
    assert terminal.ask(f"/system {system} ").startswith("the system prompt is set, the conversation goes on")
    answer, prompt, cached, _, _ = split(terminal.ask("What is RoPE?"))
    assert (answer, prompt) == (ANSWERS["What is RoPE?"], prompt_size(turns, "What is RoPE?", system))
    assert cached == 0                                          # the prompt begins in another way

    assert terminal.ask("/reset") == "a new conversation begins\n"
    assert split(terminal.ask(FROG))[:2] == (ANSWERS[FROG], prompt_size([], FROG, system))
    assert terminal.ask("/system").startswith("the system prompt is removed")
    assert terminal.ask("/reset") == "a new conversation begins\n"

    terminal.send("\x1b[A\x1b[A\x1b[A\n")                       # three lines back: the frog
    shown = terminal.prompt().partition(FROG + "\n")[2]
    assert split(shown)[:2] == (ANSWERS[FROG], prompt_size([], FROG))
    assert terminal.ask("/bye").startswith("tinyvllm: expected /reset, /system or /help, got /bye (Ctrl-D ")
    assert terminal.ask("/help") == chat.HELP + "\n" and terminal.ask("  ") == ""

    assert terminal.sent.endswith(b"\x1b[?2004h> ")              # the terminal is to mark pasted texts
    terminal.send("\x1b[200~What is\n RoPE?\x1b[201~")            # a pasted text is one message
    terminal.read(r"RoPE\?")
    terminal.send("\n")
    size = prompt_size([(FROG, ANSWERS[FROG])], "What is\n RoPE?")
    assert f"\n{size} prompt tokens" in terminal.prompt()
    terminal.send("\x04")
    assert terminal.end() == 0


def test_ctrl_c():
    """Ctrl-C stops an answer and clears a line. The conversation and the cached pages stay."""
    terminal = Terminal()
    terminal.send("half a question")
    terminal.read("half a question")
    terminal.send("\x03")
    assert terminal.prompt().endswith("\nCtrl-D leaves, /help shows the commands\n")

    first = "Once upon a midnight dreary"
    terminal.send(RAVEN + "\n")
    shown = terminal.read(first)
    terminal.send("\x03")
    shown, _, _, new, after = split(shown + terminal.prompt())
    answer = shown.removeprefix(f"{RAVEN}\n").replace("^C", "")
    assert ANSWERS[RAVEN].startswith(answer) and len(answer) < 1000 and after == "stopped\n"

    shown, prompt, cached, _, _ = split(terminal.ask(FROG))
    assert (shown, prompt) == (ANSWERS[FROG], prompt_size([(RAVEN, answer)], FROG))
    assert cached >= pages(prompt_size([], RAVEN) + new - 1) > 0

    terminal.send(RAVEN + "\n")
    terminal.read(first)
    terminal.send("\x03")
    assert terminal.prompt().endswith("\nstopped\n")
    terminal.send("\x03")                                       # who presses twice has not left either
    assert terminal.prompt().endswith("\nCtrl-D leaves, /help shows the commands\n")
    assert split(terminal.ask(WHO))[0] == ANSWERS[WHO]
    terminal.send("\x04")
    assert terminal.end() == 0


@pytest.mark.parametrize("where", ["in an answer", "after Ctrl-C"])
def test_sigterm_ends_the_program(where):
    terminal = Terminal()
    if where == "in an answer":
        terminal.send(RAVEN + "\n")
        terminal.read("Once upon")
    else:
        terminal.send("\x03")
        terminal.prompt()
    terminal.process.terminate()
    assert terminal.end() == 143


def piped(stdin, *command):
    """(exit code, stdout, lines of stderr after those of the start). run.sh may install packages first."""
    done = subprocess.run(
        command, input=stdin.encode(errors="surrogateescape"), capture_output=True, timeout=LIMIT,
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "TINYVLLM_PYTHON": sys.executable})
    lines = done.stderr.decode().splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith("/help shows the commands"))
    return done.returncode, done.stdout.decode(), lines[start + 1:]


def test_lines_in_a_pipe():
    """Through run.sh. A refused line has one line on stderr, and leaves the conversation as it was."""
    lines = f"{FROG}\n\n\udcff\r\n{WHO}\r\n/reset\n{FROG}"
    system = "You are a helpful assistant."
    code, out, errors = piped(lines, ROOT / "run.sh", "--chat", *COMMAND[2:], "--system", system)
    assert (code, out) == (2, f"{ANSWERS[FROG]}\n{ANSWERS[WHO]}\n{ANSWERS[FROG]}\n")
    frog, refused, who, reset, frog_again = errors
    assert frog.startswith(f"{prompt_size([], FROG, system)} prompt tokens")
    assert refused.startswith("tinyvllm: expected") and "Unicode" in refused
    assert who.startswith(f"{prompt_size([(FROG, ANSWERS[FROG])], WHO, system)} prompt tokens")
    assert reset == "a new conversation begins"
    assert frog_again.startswith(f"{prompt_size([], FROG, system)} prompt tokens")


def test_a_full_context():
    """The answer that fills the context says so. The next message is refused, until /reset."""
    lines = f"{WHO}\n{FROG}\n/reset\n{FROG}\n/reset\n{'word ' * 70}\n"
    code, out, errors = piped(lines, *COMMAND, "--max-model-len", "64")
    cut, frog = out.split("\n", 1)
    assert code == 2 and ANSWERS[WHO].startswith(cut) and count(cut) == 64 - prompt_size([], WHO)
    assert frog == ANSWERS[FROG] + "\n"
    assert errors[1] == "cut short: the context of 64 tokens is full, /reset begins a new conversation"
    size = prompt_size([(WHO, cut)], FROG)
    assert errors[2].startswith("tinyvllm: the context is full: expected less than 64 tokens, got "
                                f"{size}: /reset begins a new conversation (raise --max-model-len")
    # A message that is too long by itself: /reset would not help.
    assert errors[-1].startswith("tinyvllm: the prompt: expected less than 64 tokens")


# --------------------------------------------------------------------------------------------------
# In this process
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def llm():
    return LLM(PARROT, device="cpu")


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_during_a_step(llm, monkeypatch, capsys, presses):
    """The first Ctrl-C lets the step end, the second breaks it, and the engine forgets its pages. What
    was shown stays in the conversation, and the next answer is right. A third Ctrl-C does nothing."""
    conversation = chat.Chat(llm, SamplingParams(max_tokens=None), "")
    lines = iter([RAVEN + "\r", WHO])
    steps = itertools.count()
    schedule = llm.engine.scheduler.schedule
    abort = llm.abort

    def read_line(prompt):
        assert signal.getitimer(signal.ITIMER_REAL)[1] == 0.2
        return next(lines)

    def schedule_and_press():
        assert signal.getitimer(signal.ITIMER_REAL)[1] == 0     # no timer disturbs the engine
        if next(steps) == 9:
            for _ in range(presses):
                conversation.on_ctrl_c(signal.SIGINT, None)
        return schedule()

    def press_and_abort(outputs):
        if presses == 2 and len(conversation.turns) == 2:
            conversation.on_ctrl_c(signal.SIGINT, None)
        abort(outputs)

    monkeypatch.setattr("builtins.input", read_line)
    monkeypatch.setattr(llm.engine.scheduler, "schedule", schedule_and_press)
    monkeypatch.setattr(llm, "abort", press_and_abort)
    with pytest.raises(chat.CtrlC) if presses == 2 else contextlib.nullcontext():
        conversation.turn("")
    conversation.on_ctrl_c(signal.SIGINT, None)                 # between two lines: nothing to break off
    shown, lines_after = capsys.readouterr()
    answer = shown.removesuffix("\n")
    assert ANSWERS[RAVEN].startswith(answer) and answer and ("stopped" in lines_after) == (presses == 1)
    assert [message["content"] for message in conversation.turns] == [RAVEN, answer]
    conversation.turn("")
    shown, lines_after = capsys.readouterr()
    assert shown == ANSWERS[WHO] + "\n" and ("(0 cached)" in lines_after) == (presses == 2)
    assert not llm.engine.sequences                             # the request was given up


def test_answers_that_are_not_whole(llm, monkeypatch, capsys):
    conversation = chat.Chat(llm, SamplingParams(max_tokens=3), "")
    conversation.take(WHO)
    assert capsys.readouterr().err.endswith("\ncut short by --max-tokens 3\n")
    before = list(conversation.turns)
    for line in "x" * 10**5, "/system " + "x" * 10**5:          # refused before anybody counts its tokens
        with pytest.raises(TinyVLLMError, match="got 100000 characters"):
            conversation.take(line)

    monkeypatch.setattr(llm, "stream", lambda ids, params: [RequestOutput([1], finish_reason="stop")])
    conversation.take(FROG)
    assert "\nan empty answer: the conversation goes on without" in capsys.readouterr().err

    outputs = [RequestOutput([1], text="Hal", delta="Hal"),
               RequestOutput([1], text="Hal", finish_reason="error", error="the logits are NaN")]
    monkeypatch.setattr(llm, "stream", lambda ids, params: outputs)
    with pytest.raises(TinyVLLMError, match="NaN"):
        conversation.take(FROG)
    assert conversation.turns == before and len(before) == 2


def test_a_template_without_a_system_prompt(llm, monkeypatch):
    """The error comes with /system, and not with every later message."""
    def no_system(messages):
        if messages[0]["role"] == "system":
            raise TokenizerError("System role not supported")
        return [1]

    monkeypatch.setattr(llm.tokenizer, "chat", no_system)
    conversation = chat.Chat(llm, SamplingParams(), "")
    with pytest.raises(TokenizerError, match="System role"):
        conversation.take("/system Be brief.")
    assert conversation.system == []


def test_what_cannot_be_a_chat(tmp_path):
    """Wrong options are refused before the model is opened, and a model without a chat template after."""
    with pytest.raises(TinyVLLMError, match="temperature: expected"):
        chat.main(["--temperature", "-1", "--model", "no/folder"])
    for file in PARROT.glob("*.*"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(TinyVLLMError, match=r"chat template.*tinyvllm\.py --raw"):
        chat.main(["--model", str(tmp_path), "--device", "cpu"])
