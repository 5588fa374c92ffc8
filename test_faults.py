"""What must not break: the engine, its scheduler and its API under interrupts, aborts and threads.

Nearly all tests run over reference.StandIn, a model without kernels that checks every key that is
read, and whose answers are known beforehand. An interrupt may come between any two lines.

    what is shared    given up    parameters    interrupts    orphans    threads    NaN
    shared beginnings    steps and budgets    fuzz

TINYVLLM_FUZZ=N in the environment: interrupts at every line instead of some, and N rounds of fuzz.
"""
import contextlib
import gc
import itertools
import json
import math
import os
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import tinyvllm
from reference import END, PARROT, StandIn, expected
from tinyvllm import (LLM, BlockAllocator, Engine, ModelConfig, RequestOutput, SamplingParams, Scheduler,
                      Sequence, TinyVLLMError)
from tokenizer import Tokenizer

ROUNDS = int(os.environ.get("TINYVLLM_FUZZ", 0))
TOKENIZER = Tokenizer(PARROT)


# --------------------------------------------------------------------------------------------------
# What is shared
# --------------------------------------------------------------------------------------------------
CONFIG = ModelConfig(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
    head_dim=32, vocab_size=2048, max_position_embeddings=1 << 20, rms_norm_eps=1e-5, rope_theta=1e4,
    rope_scaling=None, tie_word_embeddings=True, eos_token_ids=frozenset([END]))


class CountedEngine(Engine):
    """An engine whose callers do not wait for ever."""
    steps_left = 20_000

    def step(self):
        self.steps_left -= 1
        assert self.steps_left > 0, "a caller waits for ever"
        return super().step()


def fake_llm(num_blocks=64, block_size=4, budget=16, max_seqs=8, overlap=True, prefix_caching=True,
             chunked=True, static=False, end_every=0):
    """An LLM over the stand-in. budget: max_num_batched_tokens; end_every: see next_token."""
    llm = LLM.__new__(LLM)
    llm.config = CONFIG
    llm.tokenizer = TOKENIZER
    llm.max_logprobs = 20
    llm.max_model_len = num_blocks * block_size if chunked else min(num_blocks * block_size, budget)
    model = StandIn(CONFIG, num_blocks * block_size, block_size, end_every)
    llm.device = model.device
    allocator = BlockAllocator(num_blocks, block_size, prefix_caching)
    llm.engine = CountedEngine(model, Scheduler(allocator, budget, max_seqs, chunked, static), overlap)
    return llm


def assert_exact(llm, prompt, params, output):
    """The output is the stand-in's answer, or its beginning if the request was given up."""
    tokens, reason = expected(prompt, params, llm.max_model_len, llm.engine.model.end_every)
    if output.finish_reason == "abort":
        tokens = tokens[:len(output.token_ids)]
    else:
        assert output.finish_reason == reason
    assert output.token_ids == tokens
    ended = output.finish_reason == "stop"
    assert output.text == llm.tokenizer.decode(tokens[:-1] if ended else tokens)


def generate_exactly(llm, prompts, params):
    for prompt, output in zip(prompts, llm.generate(prompts, params)):
        assert_exact(llm, prompt, params, output)


def assert_settled(llm):
    """After the steps that end abandoned requests, nothing is left of any request."""
    engine = llm.engine
    for _ in range(3):
        engine.step()
    scheduler = engine.scheduler
    scheduler.check_integrity()
    assert not (scheduler.waiting or scheduler.running or engine.in_flight or engine.sequences)
    assert len(scheduler.allocator.free) == scheduler.allocator.num_blocks


@contextlib.contextmanager
def at_each_line(function):
    """Within the block, calls function(frame) before each line of tinyvllm.py that runs."""
    def trace(frame, event, argument):
        if frame.f_code.co_filename != tinyvllm.__file__:
            return None
        if event == "line":
            function(frame)
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


@contextlib.contextmanager
def at_line(number, action):
    """Within the block, calls action() before the n-th line. Yields a list: the place, once reached."""
    count = itertools.count(1)
    place = []

    def reached(frame):
        if next(count) == number:
            place.append(f"{frame.f_code.co_name}, line {frame.f_lineno}")
            action()

    with at_each_line(reached):
        yield place


def interrupt(*args):
    raise KeyboardInterrupt


def calls(function, interrupts):
    """The function, interrupted before its first calls, or after: interrupts is a list of both words."""
    def call(*args):
        when = interrupts.pop(0) if interrupts else None
        if when == "before":
            raise KeyboardInterrupt
        result = function(*args)
        if when == "after":
            raise KeyboardInterrupt
        return result
    return call


def random_prompts(seed, count, longest=30):
    rng = random.Random(seed)
    return [[rng.randrange(2000) for _ in range(rng.randint(1, longest))] for _ in range(count)]


class Client:
    """Holds a stream, and itself: only the garbage collector closes the stream, at any moment."""

    def __init__(self, stream):
        self.stream = stream
        self.me = self


# --------------------------------------------------------------------------------------------------
# Given up: streams that nobody holds, aborts at any moment and from any thread
# --------------------------------------------------------------------------------------------------
def test_the_garbage_collector_closes_streams_in_mid_step():
    """Clients vanish while others are served. No page that a step has planned is taken away."""
    gc.collect()
    threshold = gc.get_threshold()
    gc.set_threshold(100, 10, 10)
    try:
        for seed in range(6):
            llm = fake_llm(num_blocks=400, block_size=8, budget=256, max_seqs=64)
            clients = []
            for prompt in random_prompts(seed, 30):
                clients.append(Client(llm.stream(prompt, SamplingParams(max_tokens=500))))
                next(clients[-1].stream)
            prompts = random_prompts(-seed, 8)
            params = SamplingParams(max_tokens=40)
            outputs = llm.submit(prompts, params)
            for number, _ in enumerate(llm.run(outputs)):
                if number % 7 == 0 and clients:
                    clients.pop()
            for prompt, output in zip(prompts, outputs):
                assert_exact(llm, prompt, params, output)
            clients.clear()
            gc.collect()
            assert_settled(llm)
    finally:
        gc.set_threshold(*threshold)


def test_aborts_from_another_thread():
    """A thread gives up every other request while the requests run. The rest get their answers."""
    llm = fake_llm(num_blocks=100, max_seqs=16)
    prompts = random_prompts(0, 60)
    params = SamplingParams(max_tokens=20)
    outputs = llm.submit(prompts, params)

    def abort():
        for output in outputs[::2]:
            llm.abort([output])
            time.sleep(0)                   # the other thread's turn

    thread = threading.Thread(target=abort)
    with switching_often():
        thread.start()
        for _ in llm.run(outputs):
            pass
        thread.join()
    for prompt, output in zip(prompts, outputs):
        assert_exact(llm, prompt, params, output)
    assert all(output.finish_reason == "length" for output in outputs[1::2])
    assert any(output.finish_reason == "abort" for output in outputs)
    assert_settled(llm)


def test_aborts_that_change_nothing():
    """Aborted twice, after the end, never queued, of another LLM: nobody notices."""
    llm = fake_llm()
    prompts = [[1, 2], [3, 4], [5, 6]]
    params = SamplingParams(max_tokens=9)
    done, twice, alive = [llm.submit([prompt], params)[0] for prompt in prompts]
    for _ in llm.run([done]):
        if len(done.token_ids) == 5:
            llm.abort([twice, twice])
            llm.abort([twice])
    llm.abort([done, twice, RequestOutput([1])])
    llm.abort(fake_llm().submit([[1]]))
    for _ in llm.run([alive, twice]):
        pass
    assert (done.finish_reason, twice.finish_reason, alive.finish_reason) == ("length", "abort", "length")
    for prompt, output in zip(prompts, [done, twice, alive]):
        assert_exact(llm, prompt, params, output)
    assert_settled(llm)


# --------------------------------------------------------------------------------------------------
# Parameters: each request keeps the values that it came with
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, value", [
    ("logprobs", 1), ("temperature", None), ("top_p", "x"), ("seed", -1), ("max_tokens", -5),
    ("stop_token_ids", None), ("ignore_eos", None)])
def test_parameters_changed_after_submit(name, value):
    """Neither the request nor its neighbour sees the change, even to nonsense."""
    llm = fake_llm()
    prompts = [[1, 2, 3], [9, 9]]
    params = SamplingParams(max_tokens=5, temperature=1.0, seed=1)
    outputs = llm.submit(prompts[:1], params) + llm.submit(prompts[1:], replace(params))
    setattr(params, name, value)
    for _ in llm.run(outputs):
        pass
    for prompt, output in zip(prompts, outputs):
        assert_exact(llm, prompt, SamplingParams(max_tokens=5, temperature=1.0, seed=1), output)


@pytest.mark.parametrize("name, value", [
    ("temperature", None), ("temperature", math.nan), ("max_tokens", -5), ("max_tokens", 0),
    ("stop_token_ids", b"abc"), ("stop_token_ids", "abc"), ("stop_token_ids", [1.5]), ("seed", 2**64)])
def test_parameters_changed_before_submit(name, value):
    """Nonsense is refused as when the object was made, and no prompt of the call is queued."""
    llm = fake_llm()
    params = SamplingParams()
    setattr(params, name, value)
    with pytest.raises(TinyVLLMError, match=f"^{name}: expected"):
        llm.generate([[1], [2]], [SamplingParams(), params])
    assert_settled(llm)


def test_outputs_that_a_caller_changes():
    """A rebuild takes the known tokens from the sequence, never from an object that a caller holds."""
    llm = fake_llm()
    prompts = [[1, 2, 3], [9, 9]]
    params = SamplingParams(max_tokens=12)
    outputs = llm.submit(prompts, params)
    for _ in range(5):
        llm.engine.step()
    outputs[0].token_ids[:] = ["nonsense"]
    outputs[0].prompt_token_ids.clear()
    llm.engine.is_torn = True               # as after an interrupt
    for _ in llm.run(outputs):
        pass
    for prompt, output in zip(prompts, outputs):
        assert_exact(llm, prompt, params, output)


@pytest.mark.parametrize("kind", [list, tuple, set, iter, np.array, lambda ids: (i for i in ids)])
@pytest.mark.parametrize("when", ["made", "changed"])
def test_any_collection_of_stop_token_ids(kind, when):
    """A generator, too, serves for several prompts."""
    llm = fake_llm()
    tokens, _ = expected([1, 2, 3], SamplingParams(max_tokens=9), llm.max_model_len)
    params = SamplingParams(max_tokens=9, stop_token_ids=kind(tokens[2:3]))
    if when == "changed":
        params = SamplingParams(max_tokens=9)
        params.stop_token_ids = kind(tokens[2:3])
    for output in llm.generate([[1, 2, 3], [1, 2, 3]], params):
        assert (output.token_ids, output.finish_reason) == (tokens[:3], "stop")


@pytest.mark.parametrize("name", ["temperature", "top_p"])
@pytest.mark.parametrize("value", [np.array([0.5]), np.array([]), [0.5], 1j])
def test_an_array_is_no_number(name, value):
    """One request with an array would break every batch that has the request."""
    with pytest.raises(TinyVLLMError, match=name):
        SamplingParams(**{name: value})


def test_small_integers_do_not_overflow():
    """A prompt of 200 tokens and 100 new tokens are more than an int8 holds."""
    llm = fake_llm(num_blocks=100)
    [output] = llm.generate([[7] * 200], SamplingParams(max_tokens=np.int8(100)))
    assert_exact(llm, [7] * 200, SamplingParams(max_tokens=100), output)


# --------------------------------------------------------------------------------------------------
# Interrupts
# --------------------------------------------------------------------------------------------------
class Scene:
    """A caller has begun a stream, another client has vanished. At a line of a third caller's
    generate(), something happens."""

    def __init__(self, overlap, length):
        """length: of the stream's answer. With 2, the stream ends in the third caller's steps."""
        self.llm = fake_llm(num_blocks=14, overlap=overlap)
        self.client = self.llm.stream([1, 2, 3, 4], SamplingParams(max_tokens=None))
        self.given_up = next(self.client)
        self.prompt = [7, 8, 9, 10, 11, 12]
        self.params = SamplingParams(max_tokens=length)
        self.stream = self.llm.stream(self.prompt, self.params)
        self.output = next(self.stream)
        self.text = self.output.delta
        self.prompts = [[1, 2, 3], [4, 5]]
        self.own_params = SamplingParams(max_tokens=4)

    def generate(self):
        self.llm.generate(self.prompts, self.own_params)

    def check(self):
        """The stream gets its answer, later requests get theirs, and nothing else is left."""
        self.llm.abort([self.given_up])
        self.llm.engine.steps_left = 300
        self.text += "".join(output.delta for output in self.stream)
        assert_exact(self.llm, self.prompt, self.params, self.output)
        assert self.text == self.output.text
        assert_settled(self.llm)
        assert self.given_up.finish_reason == "abort"
        longer = [[1, 2, 3, 9, 9, 9], self.prompt + [1] * 4, self.prompt + self.output.token_ids]
        generate_exactly(self.llm, self.prompts + longer, self.own_params)
        assert_settled(self.llm)


def chosen_lines(scene):
    """Numbers of lines that generate() runs: of each line of code that runs four times or less all,
    else one. All numbers, if TINYVLLM_FUZZ is set."""
    places = []
    with at_each_line(lambda frame: places.append((frame.f_code, frame.f_lineno))):
        scene.generate()
    scene.check()
    numbers = {}
    for number, place in enumerate(places, 1):
        numbers.setdefault(place, []).append(number)
    assert len(places) > 1000 and len(numbers) > 150
    rng = random.Random(0)
    if ROUNDS:
        return range(1, len(places) + 1)
    return [number for times in numbers.values()
            for number in (times if len(times) <= 4 else rng.sample(times, 1))]


SCENES = [("interrupt", True, 2), ("interrupt", False, 9), ("close", True, 9)]
ALL_SCENES = list(itertools.product(("interrupt", "close"), (True, False), (2, 9)))


@pytest.mark.parametrize("kind, overlap, length", ALL_SCENES if ROUNDS else SCENES)
def test_something_happens_at_any_line(kind, overlap, length):
    """Ctrl-C, or the garbage collector closes a stream, at any line of the API and of the engine."""
    def begin():
        scene = Scene(overlap, length)
        if kind == "interrupt":
            scene.llm.abort([scene.given_up])       # the next step has somebody to drop
        return scene

    for number in chosen_lines(begin()):
        scene = begin()
        with at_line(number, interrupt if kind == "interrupt" else scene.client.close) as place:
            with contextlib.suppress(KeyboardInterrupt):
                scene.generate()
        assert place
        notes = [id(output) for output in scene.llm.engine.aborted]
        try:
            assert scene.given_up.finish_reason or id(scene.given_up) in notes, "an abort was lost"
            scene.check()
        except BaseException as error:
            raise AssertionError(f"{kind} at line event {number}: {place}") from error


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("moments", ["before", "after", "before after", "after before after"])
@pytest.mark.parametrize("call", ["launch", "get_tokens"])
def test_interrupts_at_calls_of_the_device(call, moments, overlap):
    """Several in a row, too: while step() recovers from the first, the second comes."""
    scene = Scene(overlap, 9)
    interrupts = moments.split()
    model = scene.llm.engine.model
    launch = model.launch

    def launch_with_bad_wait(batch):
        logits, get_tokens = launch(batch)
        return logits, calls(get_tokens, interrupts)

    model.launch = calls(launch, interrupts) if call == "launch" else launch_with_bad_wait
    for _ in moments.split():
        with pytest.raises(KeyboardInterrupt):
            scene.generate()
    assert not interrupts
    scene.check()


# --------------------------------------------------------------------------------------------------
# Orphans: what a call that fails leaves behind
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [
    np.array(5), [[1], [2]], np.zeros((2, 2), int), None, 7, [None], [-1], [2**40], [], b"x", {1: 2}, [1.5]],
    ids=repr)
def test_a_bad_prompt_among_good_ones(bad):
    """The bad prompt gets an error, whatever it is. The others get their answers."""
    llm = fake_llm()
    outputs = llm.generate([[1, 2], bad, [5, 6]], SamplingParams(max_tokens=3))
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert_settled(llm)


def test_a_text_without_tokens(monkeypatch):
    """A tokenizer without BOS may find no token in a text of spaces."""
    llm = fake_llm()
    monkeypatch.setattr(llm, "tokenizer", SimpleNamespace(
        encode=lambda text: TOKENIZER.encode(text.strip(), add_bos=False), longest_token=100,
        **{name: getattr(TOKENIZER, name) for name in ("token_bytes", "drops_first_space", "decode")}))
    outputs = llm.generate(["Hi there", "  ", "you"], SamplingParams(max_tokens=3))
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]


def test_an_interrupt_while_prompts_are_queued(monkeypatch):
    """The prompts of the interrupted call never run: the next call has all steps for itself."""
    llm = fake_llm()
    monkeypatch.setattr(llm, "encode_prompt", calls(llm.encode_prompt, [None] * 20 + ["after"]))
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["some text"] * 30)
    num_steps = len(llm.engine.model.steps)
    generate_exactly(llm, [[1, 2, 3]], SamplingParams(max_tokens=5))
    assert len(llm.engine.model.steps) == num_steps + 5
    assert_settled(llm)


def test_run_yields_what_others_have_finished():
    """Submitted here, finished by the steps of another caller."""
    llm = fake_llm()
    outputs = llm.submit([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=3))
    llm.generate([[6]], SamplingParams(max_tokens=20))
    assert list(llm.run(outputs)) == outputs and all(output.delta == output.text for output in outputs)
    assert list(llm.run(outputs)) == outputs            # again: still final


def test_run_refuses_what_will_never_end():
    """Outputs of another LLM, or of none. No step is taken, and the own request goes on."""
    llm = fake_llm()
    [own] = llm.submit([[1, 2]], SamplingParams(max_tokens=3))
    for foreign in fake_llm().submit([[1, 2]]) + [RequestOutput([1])]:
        with pytest.raises(TinyVLLMError, match="expected outputs of this LLM"):
            list(llm.run([foreign]))
    assert not llm.engine.model.steps
    assert list(llm.run([own]))[-1].finish_reason == "length"


def test_run_takes_any_collection_of_outputs():
    """An early end gives up the requests of a generator, too."""
    llm = fake_llm()
    run = llm.run(iter(llm.submit([[1], [2]], SamplingParams(max_tokens=9))))
    next(run)
    run.close()
    assert_settled(llm)


# --------------------------------------------------------------------------------------------------
# Threads and processes
# --------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def switching_often():
    """Threads take turns after a few bytecodes each."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def in_threads(count, function):
    """Runs function(0), function(1) ... at the same time. Raises the first exception of any."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, range(count)))


def test_threads_generate_stream_and_abort():
    """Eight threads share an engine. Everybody gets exactly the own answer."""
    llm = fake_llm(num_blocks=60, end_every=40)

    def work(number):
        rng = random.Random(number)
        for prompt in random_prompts(number, 12):
            params = SamplingParams(max_tokens=rng.randint(1, 20), temperature=1.0, seed=number)
            action = rng.choice(["generate", "stream", "give up"])
            if action == "generate":
                generate_exactly(llm, [prompt, [number]], params)
                continue
            output = None
            text = ""
            for output in llm.stream(prompt, params):
                text += output.delta
                if action == "give up":
                    break
            assert action == "give up" or text == output.text
            if output.finish_reason:
                assert_exact(llm, prompt, params, output)

    with switching_often():
        in_threads(8, work)
    gc.collect()
    assert_settled(llm)


def short_recitations(llm):
    """Questions as token ids, and Parrot's answers, the shortest first."""
    texts = json.loads((PARROT / "texts.json").read_text("utf-8"))
    pairs = [(text["questions"][0], "\n".join(text["answer"])) for text in texts]
    pairs.sort(key=lambda pair: len(pair[1]))
    return [(llm.tokenizer.chat([{"role": "user", "content": question}]), text) for question, text in pairs]


def test_threads_and_a_fork_with_parrot():
    """The same over real kernels. In the simulator, a fork goes on as well (CUDA knows no forks)."""
    llm = LLM(PARROT)
    recitations = short_recitations(llm)

    def work(number):
        prompt, text = recitations[number]
        assert llm.generate(prompt, SamplingParams(max_tokens=None))[0].text == text

    in_threads(3, work)
    llm.engine.scheduler.check_integrity()
    if llm.device.is_simulated:
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                work(0)
                code = 0
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        work(0)


# --------------------------------------------------------------------------------------------------
# NaN
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("overlap", [True, False])
def test_nan_ends_a_request_and_no_other(overlap):
    """A log-probability that is no number is an error, and never a token."""
    llm = fake_llm(overlap=overlap)
    prompts = [[1, 2, 3], [4, 5], [6]]
    params = SamplingParams(max_tokens=9, logprobs=0)
    outputs = llm.submit(prompts, params)
    launch = llm.engine.model.launch

    def launch_with_nan(batch):
        logits, get_tokens = launch(batch)
        is_bad = [s.output is outputs[1] and len(s.token_ids) > 4 for s in batch.sampled]
        return logits, lambda: (get_tokens()[0], np.where(is_bad, np.nan, 0).astype(np.float32))

    llm.engine.model.launch = launch_with_nan
    for _ in llm.run(outputs):
        pass
    good, bad, other = outputs
    assert bad.finish_reason == "error" and "NaN" in bad.error
    assert len(bad.token_ids) == len(bad.logprobs) == 3
    for prompt, output in (prompts[0], good), (prompts[2], other):
        assert_exact(llm, prompt, params, output)
    assert_settled(llm)


# --------------------------------------------------------------------------------------------------
# Shared beginnings
# --------------------------------------------------------------------------------------------------
def tokens_computed(llm, prompts, **params):
    """The number of tokens that the model computes for prompts, all at once. The answers are exact."""
    num_steps = len(llm.engine.model.steps)
    generate_exactly(llm, prompts, SamplingParams(**params))
    return sum(llm.engine.model.steps[num_steps:])


@pytest.mark.parametrize("together", [True, False])
def test_a_twin_page_is_found(together):
    """A and B compute the same beginning. A ends, its pages are needed, B's are still there for C."""
    llm = fake_llm(num_blocks=60, block_size=16, budget=512)
    llm.engine.scheduler.is_worth_waiting = lambda *args: False
    prompt = list(range(200))
    if together:
        llm.submit([prompt + [1]], SamplingParams(max_tokens=1))
    outputs = llm.submit([prompt + [2]], SamplingParams(max_tokens=300))
    for _ in range(4):
        llm.engine.step()
    for number in range(3):                                 # others need pages
        llm.generate([[500 + number] * 480], SamplingParams(max_tokens=1))
    [output] = llm.generate([prompt + [3]], SamplingParams(max_tokens=1))
    assert outputs[0].finish_reason is None and output.num_cached_tokens == 192


def test_pages_of_twins_computed_in_the_same_step():
    """Two sequences fill pages with the same text. The pages of either find those that follow."""
    allocator = BlockAllocator(8, 2)
    first, second = allocator.allocate(2), allocator.allocate(3)
    for pages in first, second:
        for number, page in enumerate(pages):
            allocator.register(page, pages[number - 1] if number else None, (number, number))
    allocator.release(first)
    allocator.allocate(5)                                   # takes the pages of the first
    assert allocator.find([0, 0, 1, 1, 2, 2, 9]) == second


def test_equal_prompts_are_computed_once():
    """Sixteen prompts with the same 1,000 tokens at once: one is computed, then the others' ends."""
    beginning = [token % 2000 for token in range(1000)]
    prompts = [beginning + [number] for number in range(16)]
    options = dict(num_blocks=2000, block_size=16, budget=4096, max_seqs=64)
    assert tokens_computed(fake_llm(**options), prompts, max_tokens=1) == 1001 + 15 * 9
    assert tokens_computed(fake_llm(**options, prefix_caching=False), prompts, max_tokens=1) == 16 * 1001


def test_half_a_prompt_is_worth_a_step():
    """A prompt waits for pages that spare half of its tokens, and for no fewer."""
    leader = list(range(64))
    assert tokens_computed(fake_llm(budget=200), [leader, leader[:32] + [9] * 30], max_tokens=1) == 64 + 30
    assert tokens_computed(fake_llm(budget=200), [leader, leader[:28] + [9] * 40], max_tokens=1) == 64 + 68


@pytest.mark.parametrize("options", [
    {}, {"overlap": False}, {"static": True}, {"static": True, "max_seqs": 1}, {"budget": 1}, {"max_seqs": 2},
    {"chunked": False, "budget": 70}, {"num_blocks": 20}, {"num_blocks": 18, "budget": 3}], ids=str)
def test_a_follower_never_waits_for_ever(options):
    """The leader is chunked, preempted, or cannot take the follower into its batch."""
    llm = fake_llm(**options)
    prompts = [list(range(60)) + [number] for number in range(6)]
    generate_exactly(llm, [[5, 6], *prompts], SamplingParams(max_tokens=5))
    assert_settled(llm)


@pytest.mark.parametrize("steps", range(4))
def test_the_leader_is_given_up(steps):
    """Then a follower leads."""
    llm = fake_llm(budget=16)
    prompts = [list(range(60)) + [number] for number in range(4)]
    params = SamplingParams(max_tokens=5)
    outputs = llm.submit(prompts, params)
    for _ in range(steps):
        llm.engine.step()
    llm.abort(outputs[:1])
    for _ in llm.run(outputs[1:]):
        pass
    for prompt, output in zip(prompts, outputs):
        assert_exact(llm, prompt, params, output)
    assert_settled(llm)


def test_static_batching_takes_twins_together():
    """There, a follower would wait for the end of the leader's whole batch."""
    llm = fake_llm(budget=200, static=True)
    prompts = [list(range(60)) + [number] for number in range(3)]
    generate_exactly(llm, prompts, SamplingParams(max_tokens=8))
    assert len(llm.engine.model.steps) in (8, 9)            # with overlap, one step for nobody


# --------------------------------------------------------------------------------------------------
# Steps and budgets
# --------------------------------------------------------------------------------------------------
def test_a_blocked_head_of_the_queue_is_looked_up_once(monkeypatch):
    """Not at every step: with 130,000 tokens a look-up takes milliseconds."""
    llm = fake_llm(num_blocks=20, budget=64)
    allocator = llm.engine.scheduler.allocator
    lookups = []
    find = allocator.find
    monkeypatch.setattr(allocator, "find", lambda ids: lookups.append(len(ids)) or find(ids))
    outputs = llm.submit([[1] * 40, [2] * 70], SamplingParams(max_tokens=30))
    steps_until(llm, lambda: outputs[0].finish_reason)
    assert lookups == [40, 70] and len(llm.engine.model.steps) == 30
    steps_until(llm, lambda: outputs[1].finish_reason)
    assert lookups == [40, 70, 70]


def test_a_step_does_no_work_for_those_who_wait():
    """A step of run() takes as many lines with 1,000 requests in the queue as with 10."""
    def lines(num_waiting):
        llm = fake_llm(max_seqs=2)
        run = llm.run(llm.submit([[1, 2, 3]] * num_waiting, SamplingParams(max_tokens=30)))
        for _ in range(10):
            next(run)
        frames = []
        with at_each_line(frames.append):
            for _ in range(20):
                next(run)
        return len(frames)

    assert lines(1000) == lines(10) > 100


def steps_until(llm, is_done):
    """The number of steps until is_done()."""
    for number in range(5000):
        if is_done():
            return number
        llm.engine.step()
    raise AssertionError("not done after 5,000 steps")


def test_many_decodes_leave_a_prompt_its_share():
    """255 answers and a budget of 256: a prompt of 1,000 tokens gets a quarter of the budget."""
    llm = fake_llm(num_blocks=20_000, budget=256, max_seqs=256)
    others = llm.submit([[number] for number in range(255)], SamplingParams(max_tokens=200))
    steps_until(llm, lambda: all(output.token_ids for output in others))
    [output] = llm.submit([list(range(1000))])
    lengths = [len(other.token_ids) for other in others]
    assert steps_until(llm, lambda: output.token_ids) <= 18
    grown = [len(other.token_ids) - length for other, length in zip(others, lengths)]
    assert min(grown) >= 11 and max(llm.engine.model.steps) <= 256        # three quarters of 16 steps


@pytest.mark.parametrize("overlap", [True, False])
def test_steps_are_long_while_nobody_decodes(overlap):
    """A step has up to 64 tokens while no sequence decodes, else 16. The tokens stay the same."""
    llm = fake_llm(num_blocks=1000, budget=16, overlap=overlap)
    llm.engine.scheduler.max_prefill_tokens = 64
    steps = llm.engine.model.steps
    first_prompt, second_prompt = [7] * 150, [8] * 40
    three = SamplingParams(max_tokens=3, ignore_eos=True)
    [first] = llm.submit([first_prompt], three)
    for _ in range(3):
        llm.engine.step()
    assert steps == [64, 64, 22]
    # From here on the first sequence decodes, also while its token is not yet read.
    [second] = llm.submit([second_prompt], three)
    while not second.finish_reason:
        llm.engine.step()
    # 1 + 15 twice. The last 10 tokens of the second prompt come alone: the first answer has all its tokens.
    assert steps == [64, 64, 22, 16, 16, 10, 1, 1]
    assert_exact(llm, first_prompt, three, first)
    assert_exact(llm, second_prompt, three, second)
    steps.clear()
    many = [[9, number] * 15 for number in range(5)]
    outputs = llm.submit(many, SamplingParams(max_tokens=1))
    while not all(output.finish_reason for output in outputs):
        llm.engine.step()
    assert sum(steps) == 5 * 30 and max(steps) == 64
    for prompt, output in zip(many, outputs):
        assert_exact(llm, prompt, SamplingParams(max_tokens=1), output)


def test_a_sequence_that_waits_for_a_grammar_decodes():
    """Its next token comes with the next step: a long step would delay the token."""
    scheduler = Scheduler(BlockAllocator(99, 4), 16, 8, max_prefill_tokens=64)
    guided = Sequence(SamplingParams(), RequestOutput([1]), None, 9, matcher=object())
    scheduler.waiting.append(guided)
    assert scheduler.schedule() == [(guided, 1)]
    guided.num_computed_tokens = 1
    guided.token_ids.append(-1)             # a placeholder
    prompt = Sequence(SamplingParams(), RequestOutput([2] * 100), None, 200)
    scheduler.waiting.append(prompt)
    assert scheduler.schedule() == [(prompt, 16)]
    scheduler.remove(guided)
    assert scheduler.schedule() == [(prompt, 64)]


def test_decodes_take_turns_while_others_come_and_go():
    """Six of seven run in a step, the oldest ends, a new one comes: nobody is left out twice in a row."""
    scheduler = fake_llm().engine.scheduler
    decodes = [Sequence(SamplingParams(), RequestOutput([1]), None, 9) for _ in range(7)]
    skipped = []
    for _ in range(20):
        chosen = scheduler.take_turns(decodes, 6)
        [left_out] = [sequence for sequence in decodes if sequence not in chosen]
        skipped.append(left_out)
        assert len(skipped) < 2 or skipped[-2] is not left_out
        newcomer = Sequence(SamplingParams(), RequestOutput([1]), None, 9)
        newcomer.last_turn = scheduler.turn
        decodes = [*decodes[1:], newcomer]


def test_a_short_prompt_passes_several_long_ones():
    llm = fake_llm(num_blocks=1000, budget=16)
    llm.submit([[number] * 320 for number in range(1, 4)])
    [short] = llm.submit([[7, 7, 7]])
    assert steps_until(llm, lambda: short.token_ids) <= 6


def test_a_blocked_prompt_is_asked_again_when_its_beginning_is_cached():
    """Too few pages for all of it, but enough as soon as another request's pages can be shared."""
    llm = fake_llm(num_blocks=15, block_size=4, budget=16)
    shared = list(range(16))
    first, second = llm.submit([shared + [50] * 8, shared + [60] * 23], SamplingParams(max_tokens=20))
    steps_until(llm, lambda: second.token_ids)
    assert first.finish_reason is None


def test_short_prompts_pass_a_long_one():
    """A short prompt waits for few steps. Any number of them leaves the long one half of each step."""
    llm = fake_llm(num_blocks=20_000, budget=64, max_seqs=256)
    [long] = llm.submit([[7] * 6400])
    one = SamplingParams(max_tokens=1)
    for number in range(10):
        [short] = llm.submit([[number, *range(20)]], one)
        assert steps_until(llm, lambda short=short: short.finish_reason) <= 4
    shorts = llm.submit([[number, *range(30)] for number in range(600)], one)
    steps_until(llm, lambda: long.token_ids)
    assert len(llm.engine.model.steps) <= 6400 / 32 + 1
    assert sum(bool(short.finish_reason) for short in shorts) > 100


ODD_OPTIONS = [
    {}, {"budget": 1}, {"budget": 2}, {"budget": 3}, {"budget": 7, "max_seqs": 2}, {"static": True},
    {"static": True, "budget": 3}, {"chunked": False, "budget": 64},
    {"chunked": False, "static": True, "budget": 64},
    {"num_blocks": 17}, {"num_blocks": 17, "budget": 2}, {"num_blocks": 20, "overlap": False},
    {"num_blocks": 17, "prefix_caching": False}, {"budget": 40, "max_seqs": 40}]


@pytest.mark.parametrize("options", ODD_OPTIONS, ids=str)
def test_nobody_starves(options):
    """Requests come without end. The oldest moves on every few steps, so each becomes the oldest."""
    llm = fake_llm(**options)
    rng = random.Random(0)
    params = SamplingParams(max_tokens=20)
    outputs = []
    stuck = Counter()                       # id of the oldest request -> steps without progress
    before = None
    for number in range(600):
        if number < 400 and len(llm.engine.sequences) < 12:
            prompt = list(range(rng.randint(0, 3))) + [1] * rng.choice([1, 3, 40])
            outputs += llm.submit([prompt], params)
        llm.engine.step()
        assert max(llm.engine.model.steps) <= llm.engine.scheduler.max_num_batched_tokens
        llm.engine.scheduler.check_integrity()
        oldest = next(iter(llm.engine.sequences.values()), None)
        if oldest is None:
            continue
        now = (oldest, len(oldest.output.token_ids), oldest.num_computed_tokens)
        stuck[id(oldest)] = stuck[id(oldest)] + 1 if now == before else 0
        assert stuck[id(oldest)] <= llm.engine.scheduler.max_num_seqs + 2
        before = now
    for _ in llm.run(outputs):
        pass
    for output in outputs:
        assert_exact(llm, output.prompt_token_ids, params, output)
    assert_settled(llm)


# --------------------------------------------------------------------------------------------------
# Fuzz: random engines, callers, aborts and exceptions. Every answer must be exact in the end.
# --------------------------------------------------------------------------------------------------
class Caller:
    """A caller who does as LLM.generate() does, but pauses at each output of run()."""

    def __init__(self, llm, prompts, params):
        self.llm = llm
        self.prompts = prompts
        self.params = params
        self.outputs = []
        self.texts = {}                     # id of an output -> the deltas so far
        self.talk = self.talking()
        self.me = self                      # see Client

    def talking(self):
        try:
            self.outputs = self.llm.submit(self.prompts, self.params)
            self.texts = {id(output): "" for output in self.outputs}
            for output in self.llm.run(self.outputs):
                self.texts[id(output)] += output.delta
                yield output
        finally:
            self.llm.abort(self.outputs)

    def check(self):
        """All outputs are final and exact, and the deltas were the whole text."""
        assert len(self.outputs) == len(self.prompts)
        for prompt, params, output in zip(self.prompts, self.params, self.outputs):
            assert output.text == self.texts[id(output)]
            assert_exact(self.llm, prompt, params, output)


class Fuzz:
    """One engine of random sizes, and random events. `counts` counts the kinds of events."""

    def __init__(self, seed, counts):
        rng = random.Random(seed)
        self.rng = rng
        self.counts = counts
        self.chunked = rng.random() < 0.8
        block_size = rng.choice([1, 2, 4, 8])
        num_blocks = rng.randint(48, 160) // block_size
        budget = rng.choice([1, 2, 3, 7, 16, 64]) if self.chunked else rng.randint(32, 80)
        self.llm = fake_llm(
            num_blocks, block_size, budget, rng.choice([1, 2, 5, 40]), overlap=rng.random() < 0.7,
            prefix_caching=rng.random() < 0.8, chunked=self.chunked, static=rng.random() < 0.15,
            end_every=rng.choice([0, 10, 40]))
        self.callers = []
        self.interrupts = []                # for the next calls of the device
        model = self.llm.engine.model
        launch = calls(model.launch, self.interrupts)

        def launch_and_wait(batch):
            logits, get_tokens = launch(batch)
            return logits, calls(get_tokens, self.interrupts)

        model.launch = launch_and_wait

    def prompt(self):
        """Many prompts begin alike."""
        rng = self.rng
        longest = self.llm.max_model_len - 1
        beginning = [rng.choice([1, 1, 1, 2])] * rng.randint(1, 30)
        return (beginning + [rng.randint(1, 3) for _ in range(rng.randint(0, 9))])[:longest]

    def parameters(self):
        rng = self.rng
        return SamplingParams(max_tokens=rng.choice([1, 2, 8, 30, None]), temperature=rng.choice([0, 1.0]),
                              seed=rng.randint(0, 9), ignore_eos=rng.random() < 0.2,
                              stop_token_ids=[END - 1] if rng.random() < 0.5 else [])

    def arrive(self):
        count = self.rng.randint(1, 4)
        prompts = [self.prompt() for _ in range(count)]
        self.callers.append(Caller(self.llm, prompts, [self.parameters() for _ in range(count)]))

    def refused(self):
        """A call with one impossible parameter queues nothing."""
        params = self.parameters()
        params.max_tokens = -1
        with pytest.raises(TinyVLLMError):
            self.llm.submit([[1], [2]], [self.parameters(), params])

    def take(self):
        caller = self.rng.choice(self.callers)
        for _ in range(self.rng.randint(1, 8)):
            if next(caller.talk, None) is None:
                self.callers.remove(caller)
                caller.check()
                break

    def abort(self):
        self.llm.abort(self.rng.choice(self.callers).outputs[:2])

    def close(self):
        self.callers.pop(self.rng.randrange(len(self.callers))).talk.close()

    def drop(self):
        """The garbage collector finds the caller at some time."""
        self.callers.pop(self.rng.randrange(len(self.callers)))

    def interrupted(self, event):
        """The event, interrupted at a random line, or at a call of the device, or at both. Whoever
        was interrupted gives up."""
        rng = self.rng
        if rng.random() < 0.5:
            self.interrupts[:] = rng.choices([None, "before", "after"], [4, 1, 1], k=3)
        line = int(rng.expovariate(1 / 300)) if rng.random() < 0.8 else 0
        known = list(self.callers)
        action = rng.choice([interrupt, interrupt, gc.collect])
        try:
            with at_line(line, action) as place:
                event()
        except KeyboardInterrupt:
            self.counts["interrupts"] += 1
            self.counts["of these at a line"] += bool(place)
            self.callers = [caller for caller in known if caller.talk.gi_frame]
        self.interrupts.clear()

    def event(self):
        rng = self.rng
        self.counts["events"] += 1
        events = [self.arrive, self.refused, self.llm.engine.step]
        weights = [8 if len(self.callers) < 6 else 0, 1, 5]
        if self.callers:
            events += [self.take, self.abort, self.close, self.drop]
            weights += [40, 1, 1, 1]
        [event] = rng.choices(events, weights)
        if rng.random() < 0.15:
            self.interrupted(event)
        else:
            event()
        if not self.llm.engine.is_torn:
            self.llm.engine.scheduler.check_integrity()
        assert max(self.llm.engine.model.steps, default=0) <= self.llm.engine.scheduler.max_num_batched_tokens

    def finish(self):
        """All callers get their answers, and nothing is left."""
        while self.callers:
            self.take()
        gc.collect()
        assert_settled(self.llm)
        self.counts["steps"] += CountedEngine.steps_left - self.llm.engine.steps_left


def test_random_events():
    """Exceptions and closed streams anywhere: those who go on get exactly their answers."""
    counts = Counter()
    gc.collect()
    gc.freeze()                             # gc.collect() looks at the objects of this test alone
    gc.disable()                            # and no call is left to chance
    try:
        for seed in range(max(ROUNDS, 40)):
            try:
                fuzz = Fuzz(seed, counts)
                for _ in range(150):
                    fuzz.event()
                fuzz.finish()
            except BaseException as error:
                raise AssertionError(f"seed {seed}") from error
    finally:
        gc.enable()
        gc.unfreeze()
        print(dict(counts))
    assert counts["interrupts"] > 100
