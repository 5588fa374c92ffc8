#!/usr/bin/env python3
"""A chat in the terminal: `python chat.py`. Or `python chat.py < file`: each line is a message.

A model remembers nothing: each message goes to the engine together with the whole conversation before
it. Prefix caching finds the pages of the earlier messages, so only the new tokens are computed: the
line under an answer counts both. stdout gets answers and nothing else.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C during the imports: no traceback

import contextlib
import sys
import time

with contextlib.suppress(ModuleNotFoundError):          # a Python without readline has no history
    import readline                                     # input() finds the module by itself
    readline.parse_and_bind("set enable-bracketed-paste on")    # a pasted text is one message

from tinyvllm import (ArgumentParser, EngineArgs, TinyVLLMError, TokenizerError, add_sampling_options,
                      as_flags, given_sampling, open_llm, run_program, sampling_params)

HELP = """\
/reset          begins a new conversation; the system prompt stays
/system TEXT    sets the system prompt, without TEXT removes it; the conversation goes on
/help           shows this list
Ctrl-C          stops an answer, and the conversation keeps its text so far; clears a line
Ctrl-D          leaves"""


class CtrlC(KeyboardInterrupt):
    """Ctrl-C. SIGTERM and SIGHUP raise a plain KeyboardInterrupt, which ends the program."""


def notice(text):
    """Prints a text that is no answer: on stderr, and dim on a terminal."""
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


class Chat:
    """A conversation with a model."""

    def __init__(self, llm, params, system):
        self.llm = llm
        self.params = params
        self.turns = []                 # messages of the user and of the assistant, alternating
        self.is_wanted = False          # an answer is on its way, and nobody has pressed Ctrl-C
        self.can_break = False          # Ctrl-C raises CtrlC
        self.set_system(system)
        signal.signal(signal.SIGALRM, lambda number, frame: None)       # see turn

    def on_ctrl_c(self, number, frame):
        """Handles SIGINT. An answer's first Ctrl-C waits for the next token: the engine loses all cached
        pages if a step is broken off. The second Ctrl-C does not wait, for a step may be slow."""
        if self.is_wanted:
            self.is_wanted = False
        elif self.can_break:
            self.can_break = False      # once: a third Ctrl-C must not disturb what follows
            raise CtrlC

    def turn(self, prompt):
        """Reads a line and takes it. Ctrl-C has an effect only here."""
        try:
            self.can_break = True
            # input() overlooks a signal in the moment before it waits, until the next signal: SIGALRM.
            signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
            line = input(prompt)
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.take(line.removesuffix("\r"))
        finally:
            self.is_wanted = False
            self.can_break = False

    def set_system(self, text):
        """Sets the system prompt, or "" for none. Raises an error if the chat template takes none."""
        self.llm.check_length(text)
        system = [{"role": "system", "content": text}] if text else []
        self.llm.tokenizer.chat([*system, {"role": "user", "content": "Hi"}])
        self.system = system

    def take(self, line):
        """Obeys a command or answers a message."""
        command, _, text = line.partition(" ")
        if not line.startswith("/"):
            if line.strip():
                self.answer(line)
        elif command == "/reset":
            self.turns = []
            notice("a new conversation begins")
        elif command == "/system":
            self.set_system(text.strip())
            state = "set" if self.system else "removed"
            notice(f"the system prompt is {state}, the conversation goes on (/reset begins a new one)")
        elif command == "/help":
            notice(HELP)
        else:
            raise TinyVLLMError(f"expected /reset, /system or /help, got {command:.40} (Ctrl-D leaves; a "
                                "message that begins with / needs a space before it)")

    def answer(self, text):
        """Streams the answer to a message. A refused message leaves the conversation as it was."""
        llm = self.llm
        llm.check_length(text)
        question = {"role": "user", "content": text}
        before = len(self.turns)
        ids = llm.tokenizer.chat([*self.system, *self.turns, question])
        if before and len(ids) >= llm.max_model_len:
            raise TinyVLLMError(f"the context is full: expected less than {llm.max_model_len} tokens, got "
                                f"{len(ids)}: /reset begins a new conversation ({llm.advice})")
        self.is_wanted = True
        for output in llm.stream(ids, self.params):
            print(output.delta, end="", flush=True)
            if output.text:             # some chat templates refuse an empty answer
                self.turns[before:] = [question, {"role": "assistant", "content": output.text}]
            if not self.is_wanted:
                break
        print(flush=True)
        if output.error:
            del self.turns[before:]
            raise TinyVLLMError(output.error)
        self.report(output)

    def report(self, output):
        """Says what an answer took, and what cut it short."""
        num_prompt = len(output.prompt_token_ids)
        num_new = len(output.token_ids)
        rate = num_new / (time.perf_counter() - output.arrival_time)
        notice(f"{num_prompt} prompt tokens ({output.num_cached_tokens} cached), {num_new} new tokens, "
               f"{rate:.1f} tokens/s")
        limit = self.llm.max_model_len
        if output.finish_reason is None:
            notice("stopped")
        elif output.finish_reason == "length" and num_prompt + num_new == limit:
            notice(f"cut short: the context of {limit} tokens is full, /reset begins a new conversation")
        elif output.finish_reason == "length":
            notice(f"cut short by --max-tokens {num_new}")
        if not output.text:
            notice("an empty answer: the conversation goes on without this message")


def converse(chat, is_terminal):
    """Takes lines up to the end of stdin. Returns the exit code: 2 if a line of a file was refused."""
    code = 0
    while True:
        try:
            chat.turn("> " if is_terminal else "")
        except EOFError:
            if not is_terminal:
                return code
            notice("")                  # the shell's prompt begins a line
            return 0
        except CtrlC:
            notice("\nCtrl-D leaves, /help shows the commands")
        except (TinyVLLMError, TokenizerError) as error:
            code = 2
            print("tinyvllm:", *as_flags(str(error)).splitlines(), file=sys.stderr, flush=True)


def main(argv=None):
    """Holds a conversation. Returns the exit code."""
    parser = ArgumentParser(prog="chat.py", description="Chat with a model. /help shows the commands.")
    add_sampling_options(parser)
    EngineArgs.add_to(parser)
    args = parser.parse_args(argv)
    given_sampling(args)                # raises for nonsense before the model is loaded
    llm = open_llm(EngineArgs.from_namespace(args))
    if not llm.tokenizer.has_chat_template:
        raise TinyVLLMError("expected a model with a chat template, got one without: tinyvllm.py --raw "
                            "lets it continue a text")
    chat = Chat(llm, sampling_params(llm, args), args.system or "")
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, chat.on_ctrl_c)
    notice(f"{llm.device.name}, {llm.max_model_len} tokens of context; /help shows the commands")
    return converse(chat, is_terminal)


if __name__ == "__main__":
    run_program(main)
