"""What all programs of this folder share: options, signals, exit codes.

A program (tinyvllm.py, chat.py, server.py, bench.py) has a main(argv) that returns an exit code. It
ends with run_program(main). The engine's options are one class, EngineArgs: keyword arguments of LLM(),
and options of every program. Errors are one line on stderr, in the spelling of the command line.
"""
import argparse
import atexit
import contextlib
import math
import os
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass, field, fields

from device import MAX_GRID_YZ, TinyVLLMError, check, first_line, is_int, is_number
from sampling import SamplingParams
from tokenizer import TokenizerError
from weights import SHAPES


# --------------------------------------------------------------------------------------------------
# Options
# --------------------------------------------------------------------------------------------------
STEP_TOKENS = 4096                      # of a step, at most, where max_num_batched_tokens is not given
LONG_STEP_TOKENS = 16384                # the same of a step in which no sequence decodes


def option(default, text, flag=None, **arguments):
    """A field of EngineArgs. text: the help; flag: the command line's spelling, if not the name;
    arguments: more of argparse's add_argument."""
    return field(default=default, metadata={"text": text, "flag": flag, "arguments": arguments})


@dataclass(frozen=True)
class EngineArgs:
    """The engine's options: keyword arguments of LLM(), command-line options of every program. The
    text of a bool says what its flag does: the opposite of the default. A new option is a field
    here, a check in __post_init__ (a bool needs none), and a use, mostly through LLM.__init__."""
    model: str | None = option(
        None, "a folder or a Hugging Face id (default: $TINYVLLM_MODEL, else Llama-3.2-1B-Instruct if it was "
        "downloaded before, else the bundled Parrot)")
    device: str = option(
        "auto", "auto: a GPU if there is one, else the simulator", choices=("auto", "cpu", "cuda"))
    tensor_parallel_size: int = option(1, "GPUs that share the model", type=int, metavar="N")
    load_format: str = option(
        "auto", f"dummy: random weights, for a --model that may also be one of {', '.join(SHAPES)}",
        choices=("auto", "dummy"))
    quantization: str | None = option(
        None, "fp8: matrices in 8 bits a weight, made while loading (default: as the model's files)",
        choices=("fp8",))
    kv_cache_dtype: str = option("auto", "fp8: keys and values in 8 bits", choices=("auto", "fp8"))
    max_model_len: int | None = option(
        None, "tokens of prompt and answer together (default: the model's limit)", type=int, metavar="N")
    gpu_memory_utilization: float = option(0.9, "share of the GPU's memory to use", type=float, metavar="X")
    block_size: int = option(16, "tokens of a page of the KV cache", type=int, metavar="N")
    num_blocks: int | None = option(
        None, "pages of the KV cache (default: as many as the memory holds)", type=int, metavar="N")
    max_num_batched_tokens: int | None = option(
        None, f"token budget of a step (default: {STEP_TOKENS}, and up to {LONG_STEP_TOKENS} while no "
        "sequence decodes)", type=int, metavar="N")
    max_num_seqs: int = option(256, "sequences that run at once", type=int, metavar="N")
    max_logprobs: int = option(20, "the most logprobs of a request; -1: no limit", type=int, metavar="N")
    enforce_eager: bool = option(False, "launch every kernel by itself", "--no-cuda-graphs")
    fused_decode: bool = option(
        True, "compute steps of a few sequences by many kernels, not by decode.cu's one", "--no-fused-decode")
    overlap: bool = option(True, "read a step's tokens before the next step is launched", "--no-overlap")
    prefix_caching: bool = option(
        True, "compute every prompt whole, even if an earlier one began with the same tokens",
        "--no-prefix-caching")
    enable_chunked_prefill: bool = option(
        True, "compute a prompt in one step, or let it wait", "--no-chunked-prefill")
    static_batching: bool = option(
        False, "admit a batch of requests together, and the next batch when all of it is done")

    def __post_init__(self):
        def want(name, is_good, expected):
            check(name, getattr(self, name), is_good, expected)
        want("model", lambda name: name is None or (isinstance(name, (str, os.PathLike)) and str(name)),
             "a folder or a Hugging Face id")
        want("device", lambda name: name in ("auto", "cpu", "cuda"), "auto, cpu or cuda")
        want("load_format", lambda name: name in ("auto", "dummy"), "auto or dummy")
        want("quantization", lambda name: name in (None, "fp8"), "fp8 or None")
        want("kv_cache_dtype", lambda name: name in ("auto", "fp8"), "auto or fp8")
        want("gpu_memory_utilization", lambda share: is_number(share, 0, 1) and share > 0,
             "more than 0 and at most 1")
        want("tensor_parallel_size", is_int, "a whole number of 1 or more")
        want("block_size", lambda n: is_int(n) and n in (8, 16, 32, 64, 128), "8, 16, 32, 64 or 128")
        for f in fields(self):
            if isinstance(f.default, bool):
                want(f.name, lambda value: isinstance(value, bool), "True or False")
        for name in "max_model_len", "num_blocks":
            want(name, lambda n: n is None or is_int(n), "a whole number of 1 or more")
        want("max_logprobs", lambda n: is_int(n, -1), "a whole number of 0 or more, or -1 for no limit")
        limit = f"a whole number from 1 to {MAX_GRID_YZ}, the most thread blocks of a grid in y and z"
        want("max_num_batched_tokens", lambda n: n is None or is_int(n, 1, MAX_GRID_YZ), limit)
        want("max_num_seqs", lambda n: is_int(n, 1, MAX_GRID_YZ), limit)

    @property
    def token_budget(self):
        """The most tokens of a step in which a sequence decodes."""
        return self.max_num_batched_tokens or STEP_TOKENS

    @property
    def prefill_budget(self):
        """The most tokens of a step in which no sequence decodes. Little memory may mean less."""
        return self.max_num_batched_tokens or LONG_STEP_TOKENS

    @classmethod
    def add_to(cls, parser):
        """Adds the options to an argparse parser. A flag without a value inverts the default."""
        for f in fields(cls):
            text = f.metadata["text"]
            flag = f.metadata["flag"] or "--" + f.name.replace("_", "-")
            if isinstance(f.default, bool):
                parser.add_argument(flag, dest=f.name, action="store_const", const=not f.default,
                                    default=f.default, help=text)
            else:
                shown = text if f.default is None else f"{text} (default: {f.default})"
                parser.add_argument(flag, dest=f.name, default=f.default, help=shown,
                                    **f.metadata["arguments"])

    @classmethod
    def from_namespace(cls, namespace):
        """The options in the namespace of a parser."""
        return cls(**{f.name: getattr(namespace, f.name) for f in fields(cls)})


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, but errors are one line, without the usage."""

    def error(self, message):
        raise TinyVLLMError(f"{message} (--help shows the options and examples)")


def check_writable(name, path):
    """Raises TinyVLLMError before a run, not after, for an unwritable path. Leaves no file."""
    path = os.path.realpath(path)
    is_new = not os.path.exists(path)
    try:            # not to wait for a FIFO's reader: O_NONBLOCK
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666))
    except OSError as error:
        raise TinyVLLMError(f"{name}: expected a file that you may write, got {path} "
                            f"({error.strerror})") from None
    if is_new:
        os.remove(path)


SAMPLING_OPTIONS = {        # of SamplingParams; unset: the model's generation_config.json, else its default
    "max_tokens": (int, "N", "longest answer, in tokens (default: what the context allows)"),
    "temperature": (float, "T", "0 takes the most probable token, 1 samples as the model says (default: 0)"),
    "top_k": (int, "K", "sample from the K most probable tokens (default: all)"),
    "top_p": (float, "P", "sample from the most probable tokens that together reach P (default: 1)"),
    "min_p": (float, "P", "drop tokens less probable than P times the best token (default: 0)"),
    "presence_penalty": (float, "X", "lower the logits of tokens in the answer by X (default: 0)"),
    "frequency_penalty": (float, "X", "... by X for each time that the token is there (default: 0)"),
    "repetition_penalty": (float, "X", "divide the logits of tokens in prompt and answer by X (default: 1)"),
    "seed": (int, "N", "makes sampling repeatable")}


def add_sampling_options(parser):
    """Adds the options of a request to an argparse parser. Unset options are None."""
    for name, (kind, metavar, text) in SAMPLING_OPTIONS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=text)
    parser.add_argument("--stop", action="append", metavar="TEXT",
                        help="end the answer before this text; may be given several times")
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")


def given_sampling(args):
    """{name of SamplingParams: value} of the options that are set. Raises TinyVLLMError for nonsense."""
    given = {name: getattr(args, name) for name in (*SAMPLING_OPTIONS, "stop")}
    given = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**given)
    return given


def sampling_params(llm, args):
    """The SamplingParams of a program: options, else the model's own defaults, else greedy."""
    return SamplingParams(**{"max_tokens": None} | llm.default_sampling | given_sampling(args))


def as_flags(message):
    """An error's text in the spelling of a command line: max_model_len becomes --max-model-len."""
    names = [f.name for f in (*fields(EngineArgs), *fields(SamplingParams))]
    long_names = "|".join(name for name in names if "_" in name)
    all_names = "|".join(names)
    return re.sub(rf"\b(?:{long_names})\b|^(?:{all_names})(?=:)",
                  lambda name: "--" + name[0].replace("_", "-"), message)


# --------------------------------------------------------------------------------------------------
# Signals and exit codes
# --------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def caught_signals():
    """Makes SIGTERM and SIGHUP what Ctrl-C is: a KeyboardInterrupt. For a second after the exception
    further signals are ignored, so that a second Ctrl-C does not break off what the first began."""
    last = -math.inf

    def stop(number, frame):
        nonlocal last
        now = time.monotonic()
        if now - last > 1:
            last = now
            raise KeyboardInterrupt(number)

    is_main = threading.current_thread() is threading.main_thread()     # only there Python handles signals
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if is_main else ()
    # What the parent ignores (nohup, a background job) stays ignored.
    handlers = {number: signal.signal(number, stop) for number in numbers
                if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
            atexit.register(signal.signal, number, signal.SIG_IGN)      # nothing disturbs Python's own end


def outcome(main, argv):
    """Runs main(argv). Returns the exit code, and a line for stderr or None."""
    try:
        try:
            code = main(argv)
        except SystemExit as done:              # --help
            code = done.code
        sys.stdout.flush()
        return code, None
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        return 128 + number, ""
    except BrokenPipeError:                     # the reader of our output has seen enough: | head
        return 0, None
    except MemoryError as error:
        return 2, (f"tinyvllm: out of memory ({first_line(error)}): lower --gpu-memory-utilization or "
                   "--max-model-len")
    except OSError as error:                    # the disk is full, the cache folder is not ours, ...
        return 2, f"tinyvllm: {error}"
    except (TinyVLLMError, TokenizerError) as error:
        return 2, f"tinyvllm: {as_flags(str(error))}"
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("cupy", "cupy_backends", "simulator"):
            raise
        sys.unraisablehook = lambda _: None     # CuPy's objects cannot be freed on a GPU that has failed
        return 2, f"tinyvllm: the GPU has failed ({first_line(error)}): start the program anew"


def run_program(main, argv=None):
    """Runs main(argv) and exits with main's exit code, 2 for a user's mistake, 128 and the number
    of a signal: 130 for Ctrl-C, 143 for SIGTERM."""
    # A stream that was closed (>&-): else the next file opened would get its number, and its text.
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    # Characters beyond stdout's encoding become "?". Bytes of stdin that are no text are kept for
    # the tokenizer, to refuse the prompt. newline: a line of stdin ends with \n, not with \r.
    for stream, errors in (sys.stdout, "replace"), (sys.stdin, "surrogateescape"):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors, newline="\n")
    with caught_signals():
        code, line = outcome(main, argv)
        with contextlib.suppress(OSError):
            if line is not None:
                print(*line.splitlines(), file=sys.stderr)      # one line, whatever a path holds
        for stream in sys.stdout, sys.stderr:
            try:
                stream.flush()
            except OSError:                     # Python's own flush at exit would fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
