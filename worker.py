"""A worker steps the engine of an LLM for a server. The server is at the other end of a pipe.

The worker of `python server.py` is a process of its own. In one process, Python runs one thread at a time,
and HTTP for 256 streams keeps a thread busy: the engine would wait for HTTP, and the GPU for the engine.
A program that has an LLM already and makes an app of it (server.build_app) has the worker in a thread.

A new worker process first gets EngineArgs, and loads the model: see greet. Any worker then takes messages
between two steps. A message is a tuple: the name of the method that takes the message, and the method's
arguments. A key is the server's number of a sequence.

    to the worker     ("add", [(key, [id, index], prompt token ids, SamplingParams)])
                      ("abort", [key])                   the client has left
                      ("compile", number, SamplingParams.structured_outputs)     for an "add" to come
                      ("watch",), ("unwatch",)           somebody wants a picture; nobody looks any more
                      ("stop",)
    to the server     ("deliver", time, load, news)      after each step: see Worker.hand_over
                      ("compiled", number, error)        None: the grammar is ready, and so "add" is quick
                      ("show", picture)                  of the page pool: see views.picture
                      ("fail", reason)                   the last message: the engine has failed

[id, index]: the request, and the number of the answer in the request. A picture names sequences so.
"""
import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from multiprocessing.connection import Connection
from weakref import WeakKeyDictionary

from communicator import start_process
from device import TinyVLLMError
from program import outcome
from tinyvllm import open_llm
from views import Recorder, picture

STOP_SECONDS = 10               # for the last step to end
IDLE_MILLISECONDS = 1000        # between two looks at the other GPUs, where there is nothing to do
NUM_FINISHED = 32               # finished requests that a picture tells of
LOGGER = logging.getLogger("tinyvllm.worker")


class Answer:
    """A sequence's output, and how much of the output the server has."""

    def __init__(self, key, output):
        self.key = key
        self.output = output
        self.num_characters = 0
        self.num_tokens = 0


class Worker:
    """Takes messages, steps the engine, and hands the news over, in turn."""

    def __init__(self, llm, connection):
        self.llm = llm
        self.connection = connection
        self.lock = threading.Lock()        # held while a message is sent
        self.is_stopped = False
        self.answers = {}                   # id(output) -> Answer of all unfinished sequences
        self.updates = deque()              # outputs with a new token or an end: the engine's listener
        self.names = WeakKeyDictionary()    # sequence -> id and index of the answer, for the page
        self.recorder = None                # while somebody watches

    def run(self):
        """Serves until the message "stop" comes, the server is gone, or the engine has failed."""
        with self.connection:
            try:
                self.loop()
            except (EOFError, ConnectionError):
                pass                        # the server is gone
            except TinyVLLMError as error:  # another GPU's process has ended
                self.send("fail", str(error))
            except BaseException as error:  # nobody else would notice
                LOGGER.critical("the engine has failed", exc_info=error)
                self.send("fail", repr(error))

    def loop(self):
        """All messages that have come, then a step, and so on."""
        engine = self.llm.engine
        messages = select.poll()
        messages.register(self.connection.fileno(), select.POLLIN)
        while not self.is_stopped:
            is_idle = not (engine.sequences or engine.in_flight)
            if messages.poll(IDLE_MILLISECONDS if is_idle else 0):
                name, *arguments = self.connection.recv()
                getattr(self, name)(*arguments)
            elif is_idle:
                engine.model.communicator.check()           # of several GPUs, one may have failed
            else:
                engine.step()
                self.hand_over()

    def send(self, *message):
        with self.lock:
            self.connection.send(message)

    def compile(self, number, structured_outputs):
        """Makes a grammar for a request that will come. In a thread, since the first grammar of a model takes
        a second, and a large one nearly as long."""
        def work():
            error = None
            try:
                self.llm.grammars.matcher(structured_outputs)
            except TinyVLLMError as refusal:
                error = str(refusal)
            except Exception as mistake:                # somebody waits for an answer in any case
                LOGGER.exception("a grammar cannot be made")
                error = f"structured output: {mistake!r:.200}"
            with contextlib.suppress(OSError):          # the server is gone
                self.send("compiled", number, error)
        threading.Thread(target=work, daemon=True).start()

    def add(self, requests):
        """Gives sequences to the engine. A refused one is final already."""
        sequences = []
        for key, name, ids, params in requests:
            sequence = self.llm.prepare(ids, params)
            output = sequence.output
            self.answers[id(output)] = Answer(key, output)
            self.names[sequence] = name
            sequence.listeners.append(self.updates)
            if output.error:
                self.updates.append(output)
            else:
                sequences.append(sequence)
        self.llm.engine.add(sequences)
        if self.updates:
            self.hand_over()

    def abort(self, keys):
        self.llm.abort([answer.output for answer in self.answers.values() if answer.key in keys])

    def stop(self):
        self.is_stopped = True

    def hand_over(self):
        """Sends the server all that is new since the last time. The message's arguments:

        the time; the load: (running sequences, waiting ones, share of pages in use); and four lists: keys,
        new texts, lists of new token ids, and for most answers None. Where an answer begins, ends or has
        log-probabilities: (these, those of the prompt where the answer begins, number of cached tokens, of
        preemptions, finish reason, error)."""
        outputs = {}
        while self.updates:
            output = self.updates.popleft()
            outputs[id(output)] = output
        keys, texts, token_ids, more = [], [], [], []
        for number, output in outputs.items():
            answer = self.answers[number]
            first = answer.num_tokens
            keys.append(answer.key)
            texts.append(output.text[answer.num_characters:])
            token_ids.append(output.token_ids[first:])
            answer.num_characters = len(output.text)
            answer.num_tokens = len(output.token_ids)
            if first and not output.finish_reason and not output.logprobs:
                more.append(None)
            else:
                logprobs = output.logprobs and output.logprobs[first:]
                prompt_logprobs = None if first else output.prompt_logprobs     # complete by now
                more.append((logprobs, prompt_logprobs, output.num_cached_tokens, output.num_preemptions,
                             output.finish_reason, output.error))
            if output.finish_reason:
                del self.answers[number]
        scheduler = self.llm.engine.scheduler
        allocator = scheduler.allocator
        used = 1 - len(allocator.free) / allocator.num_blocks
        load = (len(scheduler.running), len(scheduler.waiting), used)
        self.send("deliver", time.perf_counter(), load, (keys, texts, token_ids, more))

    def watch(self):
        """Sends a picture of the page pool. The engine is recorded from the first picture on. A mistake here
        must not end the engine."""
        engine = self.llm.engine
        try:
            if self.recorder not in engine.observers:
                self.recorder = Recorder(self.llm, keep=NUM_FINISHED)
                self.recorder.join(time.perf_counter())
                engine.observers.append(self.recorder)
            view = picture(self.recorder, self.names)
        except Exception:
            LOGGER.exception("the page pool is not shown any more")
            return
        self.send("show", view)

    def unwatch(self):
        if self.recorder in self.llm.engine.observers:
            self.llm.engine.observers.remove(self.recorder)
        self.recorder = None


@contextlib.contextmanager
def worker_process(args):
    """A worker in a process of its own. Yields (an InputProcessor, the device's name, the number of pages, a
    socket for messages) when the model is loaded. Raises TinyVLLMError if the model cannot be loaded."""
    process, ours = start_process([sys.executable, __file__])      # Ctrl-C: the server lets answers end
    with ours:
        try:
            with Connection(os.dup(ours.fileno())) as connection:
                inputs, device_name, num_blocks = greet(connection, args)
            yield inputs, device_name, num_blocks, ours
            ours.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        finally:
            process.kill()
            process.wait()


def greet(connection, args):
    """Sends a new worker its EngineArgs, and takes its answer. Raises TinyVLLMError if it has no LLM."""
    try:
        connection.send(args)
        inputs, device_name, num_blocks, refusal = connection.recv()
    except (EOFError, ConnectionError):
        raise TinyVLLMError("the worker process has ended before the model was loaded") from None
    if refusal:
        raise TinyVLLMError(refusal)
    return inputs, device_name, num_blocks


def main(connection):
    """The worker process. Returns the exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)       # some send it to all processes: the server decides
    llm = open_llm(connection.recv())
    num_blocks = llm.engine.scheduler.allocator.num_blocks
    connection.send((llm, llm.device.name, num_blocks, ""))     # of an LLM, pickle takes the InputProcessor
    Worker(llm, connection).run()
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    pipe = Connection(int(sys.argv[1]))
    exit_code, line = outcome(main, pipe)
    if line:
        pipe.send((None, None, None, line.removeprefix("tinyvllm: ")))
    sys.exit(exit_code)
