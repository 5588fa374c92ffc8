"""What a request asks for: penalties, biases, bans, stop texts, log-probabilities of the prompt.

The kernel alone is tested in test_kernels.py. Here the whole engine is: what the host tells the kernel, in
plain and in overlapped steps. The oracle works on dense arrays over the vocabulary, from vLLM's rules.
"""
import itertools
import random
from collections import Counter

import numpy as np
import pytest

from reference import PARROT, RNG, TINY, numpy_llama, write_model
from sampling import ABSENT, ENTRY_INTS, Adjustments
from test_tinyvllm import PARROT_CONFIG, TEXTS, chats, float64_weights, run_recorded
from tinyvllm import LLM, SamplingParams, TinyVLLMError

V = TINY["vocab_size"]
EOS = TINY["eos_token_id"]


# --------------------------------------------------------------------------------------------------
# The entries
# --------------------------------------------------------------------------------------------------
def read(entries):
    """{token: (count, bias)}; the spare entry has the token -1."""
    rows = np.array(entries, np.int32).reshape(-1, ENTRY_INTS)
    found = {token: (count, bias) for token, count, bias in zip(
        rows[:, 0].tolist(), rows[:, 1].tolist(), rows[:, 2].view(np.float32).tolist())}
    assert len(found) == len(rows), "a token has two entries"
    return found


def expected_entries(params, end_ids, prompt, answer):
    """The entries for the token after the text, by definition."""
    biases = {token: float(np.float32(bias)) for token, bias in params.logit_bias.items()}
    if len(answer) < params.min_tokens:
        biases |= dict.fromkeys(end_ids, -np.inf)
    counts = Counter()
    if params.has_penalty:
        counts.update(token for token in answer if token >= 0)
    in_prompt = set(prompt) if params.repetition_penalty != 1 else set()
    tokens = {*biases, *counts, *in_prompt}
    found = {token: (counts[token] if token in counts or token in in_prompt else ABSENT, biases.get(token, 0))
             for token in tokens}
    if params.has_penalty and (answer or prompt)[-1] < 0:
        found[-1] = (ABSENT, 0)
    return found


@pytest.mark.parametrize("options", [
    {"frequency_penalty": 0.5}, {"repetition_penalty": 1.2, "logit_bias": {3: -1.5, 900: 7}},
    {"presence_penalty": -1, "min_tokens": 9}, {"logit_bias": {4: 100, 5: -100}, "min_tokens": 4},
    {"repetition_penalty": 0.9, "min_tokens": 5, "logit_bias": {1: 2, 2: 3}}])
def test_entries_follow_the_text(options):
    """Token by token, as in plain steps, in overlapped steps, and again after a restart."""
    rng = random.Random(1)
    params = SamplingParams(max_tokens=20, **options)
    end_ids = {2, 7}
    for _ in range(20):
        prompt = [rng.randrange(12) for _ in range(rng.randrange(1, 9))]
        adjustments = Adjustments(params, end_ids)
        answer = []
        while len(answer) < 20:
            answer.append(rng.randrange(12))
            # Overlapped: the newest token is a placeholder, and is known one step later.
            newest = -1 if rng.random() < 0.5 else answer[-1]
            seen = [*answer[:-1], newest]
            if rng.random() < 0.1:
                adjustments.restart()
            assert read(adjustments.up_to([*prompt, *seen], len(prompt))) == expected_entries(
                params, end_ids, prompt, seen)


# --------------------------------------------------------------------------------------------------
# The choice of a token, by the engine
# --------------------------------------------------------------------------------------------------
def changed(logits, params, end_ids, prompt, answer):
    """A row of float32 logits [V] after bias, bans and penalties."""
    logits = logits.astype(np.float32)
    for token, bias in params.logit_bias.items():
        logits[token] += np.float32(bias)
    if len(answer) < params.min_tokens:
        logits[list(end_ids)] = -np.inf
    counts = np.bincount(answer, minlength=len(logits)).astype(np.float32)
    known = np.bincount([*prompt, *answer], minlength=len(logits)) > 0
    penalty = np.float32(params.repetition_penalty)
    logits = np.where(known, np.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits - np.float32(params.frequency_penalty) * counts
    return logits - np.float32(params.presence_penalty) * (counts > 0)


ASKED = [
    {}, {"frequency_penalty": 1.5}, {"presence_penalty": 2.0}, {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "frequency_penalty": -0.5}, {"logit_bias": {11: 100}, "frequency_penalty": 2},
    {"logit_bias": {5: 30, 6: 30.5, EOS: 40}, "min_tokens": 6}, {"logit_bias": {EOS: 100}, "min_tokens": 11},
    {"presence_penalty": -2.0, "repetition_penalty": 1.1, "logit_bias": {1: -100, 2: 5}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


def ask(folder, options, **engine):
    """(prompts, params, outputs, logits) of a mixed batch, greedy."""
    rng = RNG(3)
    llm = LLM(folder, num_blocks=64, block_size=8, **engine)
    prompts = [rng.integers(0, 40, length).tolist() for length in rng.integers(1, 40, len(options))]
    params = [SamplingParams(max_tokens=24, logprobs=2, **asked) for asked in options]
    return prompts, params, *run_recorded(llm, prompts, params)


@pytest.mark.parametrize("engine", [{}, {"overlap": False}, {"enforce_eager": True}, {"max_num_seqs": 2}],
                         ids=["overlapped", "plain", "eager", "two at a time"])
def test_greedy_choice_by_changed_logits(folder, engine):
    """Each token is the greatest of the changed logits. Reported log-probabilities are of the raw ones."""
    for prompt, params, output, logits in zip(*ask(folder, ASKED, **engine)):
        answer = output.token_ids
        for i, token in enumerate(answer):
            row = changed(logits[i], params, {EOS}, prompt, answer[:i])
            assert token == row.argmax(), (params, i)
            shifted = logits[i] - logits[i].max()
            raw = shifted - np.log(np.exp(shifted).sum())
            assert all(abs(value - raw[t]) < 1e-4 for t, value in output.logprobs[i].items())
        assert EOS not in answer[:params.min_tokens]
    assert answer


def test_changed_logits_do_not_depend_on_company(folder):
    """Sampled answers are the same overlapped, plain, preempted, and each alone."""
    asked = [{**options, "temperature": 1.5, "seed": seed, "min_p": 0.01, "top_p": 0.98}
             for seed, options in enumerate(ASKED)]
    answers = []
    for engine in {}, {"overlap": False}, {"max_num_seqs": 1}, {"max_num_batched_tokens": 16}:
        _, _, outputs, _ = ask(folder, asked, **engine)
        answers.append([output.token_ids for output in outputs])
    assert answers[1:] == answers[:1] * 3
    llm = LLM(folder, num_blocks=9, block_size=8)       # too few pages for all: some are preempted
    prompts, params, _, _ = ask(folder, asked)
    outputs = llm.generate(prompts, params)
    assert [output.token_ids for output in outputs] == answers[0]
    assert any(output.num_preemptions for output in outputs)


def test_many_changed_logits_outgrow_the_step_buffer(folder):
    """The lists of a step have no limit: the buffer grows, and the graphs are recorded anew."""
    llm = LLM(folder, num_blocks=64, block_size=8)
    wanted = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=8, logit_bias={11: 9.0}))[0].token_ids
    room = len(llm.engine.model.buffer.target)
    bias = {token: -9.0 if token != 11 else 0.0 for token in range(V)}      # the same choice, by a long list
    params = [SamplingParams(max_tokens=8, logit_bias=bias) for _ in range(1 + room // (12 * V))]
    outputs = llm.generate([[5, 6, 7]] * len(params), params)
    assert len(llm.engine.model.buffer.target) > room
    assert all(output.token_ids == wanted for output in outputs)


@pytest.mark.parametrize("name, value", [
    ("min_p", -0.1), ("min_p", 1.5), ("presence_penalty", 2.5), ("frequency_penalty", float("nan")),
    ("repetition_penalty", 0), ("repetition_penalty", -1.0), ("logit_bias", [1]), ("logit_bias", {1: 101}),
    ("logit_bias", {-1: 1}), ("logit_bias", {"1": 1}), ("min_tokens", -1), ("min_tokens", 257), ("stop", ""),
    ("stop", ["a", ""]), ("stop", 7), ("stop", [7]), ("prompt_logprobs", -1)])
def test_requests_that_make_no_sense(name, value):
    with pytest.raises(TinyVLLMError, match=f"^{name}: expected .*, got "):
        SamplingParams(**{name: value})


def test_a_bias_beyond_the_vocabulary_and_a_changed_dict(folder):
    llm = LLM(folder, num_blocks=8)
    with pytest.raises(TinyVLLMError, match=f"^logit_bias: expected token ids below {V}, got {V}$"):
        llm.generate([1], SamplingParams(logit_bias={V: 1.0}))
    params = SamplingParams(max_tokens=3, logit_bias={9: 100.0})
    [output] = llm.submit([[1, 2]], params)
    params.logit_bias[9] = "nonsense"                   # the engine has a copy
    for _ in llm.run([output]):
        pass
    assert output.token_ids == [9, 9, 9]


# --------------------------------------------------------------------------------------------------
# Log-probabilities of the prompt
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def parrot():
    return LLM(PARROT)


@pytest.mark.parametrize("engine", [
    {}, {"overlap": False}, {"max_num_batched_tokens": 24}, {"max_num_seqs": 3},
    {"enable_chunked_prefill": False, "max_num_seqs": 5, "max_model_len": 512}],
    ids=["whole", "plain", "chunks", "few rows", "few rows without chunks"])
def test_prompt_logprobs(parrot, engine):
    """All of the prompt's tokens but the first, by the oracle, whatever the company and the chunks."""
    llm = LLM(PARROT, **engine)
    weights = float64_weights(PARROT)
    prompts = [ids[:70] for ids in chats(parrot, TEXTS[1:3])]
    llm.generate(prompts, SamplingParams(max_tokens=1))         # cached pages, which have no logits
    params = [SamplingParams(max_tokens=3, prompt_logprobs=2), SamplingParams(max_tokens=3),
              SamplingParams(max_tokens=3, prompt_logprobs=0)]
    outputs = llm.generate([prompts[0], prompts[0], prompts[1]], params)
    assert outputs[1].prompt_logprobs is None and outputs[0].token_ids == outputs[1].token_ids
    for output, count in (outputs[0], 2), (outputs[2], 0):
        prompt = output.prompt_token_ids
        logits = numpy_llama(PARROT_CONFIG, weights, prompt)
        shifted = logits - logits.max(1, keepdims=True)
        wanted = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
        for token, row, reported in zip(prompt[1:], wanted, output.prompt_logprobs[1:]):
            assert token in reported and count <= len(reported) <= count + 1
            assert all(abs(value - row[i]) < 0.02 * abs(row).max() for i, value in reported.items())


def test_rows_of_logits_have_a_limit(folder):
    """Sampled and scored rows together are at most max_num_seqs, and every prompt gets on."""
    llm = LLM(folder, num_blocks=64, block_size=8, max_num_seqs=6)
    rows = []
    launch = llm.engine.model.launch

    def counted(batch):
        rows.append(len(batch.last_tokens))
        return launch(batch)
    llm.engine.model.launch = counted
    params = [SamplingParams(max_tokens=5, prompt_logprobs=0 if i % 2 else None) for i in range(12)]
    outputs = llm.generate([RNG(i).integers(0, V, 30).tolist() for i in range(12)], params)
    assert max(rows) == 6
    assert all(None not in output.prompt_logprobs[1:] for output in outputs[1::2])
    assert llm.engine.scheduler.allocator.free.keys() == set(range(64))


# --------------------------------------------------------------------------------------------------
# Stop texts
# --------------------------------------------------------------------------------------------------
def cut(text, stops):
    """The text before the earliest stop text."""
    return text[:min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def test_stop_texts_end_an_answer(parrot):
    """Random pieces of the answer as stop texts: nothing of them is streamed, the rest comes whole."""
    rng = random.Random(0)
    _, answer = TEXTS[1]
    [prompt] = chats(parrot, TEXTS[1:2])
    for _ in range(10):
        starts = [rng.randrange(len(answer) - 4) for _ in range(2)]
        stops = [answer[start:start + rng.randrange(1, 12)] for start in starts] + ["not in the answer"]
        text = ""
        for output in parrot.stream(prompt, SamplingParams(max_tokens=None, stop=stops)):
            text += output.delta
            assert cut(answer, stops).startswith(text)
        assert text == output.text == cut(answer, stops) and output.finish_reason == "stop"
    [output] = parrot.generate([prompt], SamplingParams(max_tokens=None, stop=answer[-5:] + "!"))
    assert output.text == answer            # what was held back comes at the end


def test_min_tokens_puts_stop_texts_off(parrot):
    _, answer = TEXTS[1]
    [prompt] = chats(parrot, TEXTS[1:2])
    [plain] = parrot.generate([prompt], SamplingParams(max_tokens=None))
    letter = answer[0]
    [output] = parrot.generate([prompt], SamplingParams(max_tokens=None, stop=letter))
    assert output.text == ""
    count = 5
    [output] = parrot.generate([prompt], SamplingParams(max_tokens=None, stop=letter, min_tokens=count))
    assert len(output.token_ids) > count
    head = parrot.tokenizer.decode(plain.token_ids[:count])
    assert output.text == head + cut(answer[len(head):], [letter])


def test_stop_texts_after_an_interrupted_step(parrot):
    """rebuild() reads the known tokens again: held-back text is neither lost nor doubled."""
    _, answer = TEXTS[1]
    [prompt] = chats(parrot, TEXTS[1:2])
    stop = answer[20:30]
    [output] = parrot.submit([prompt], SamplingParams(max_tokens=None, stop=stop))
    for step in itertools.count(1):
        if output.finish_reason:
            break
        parrot.engine.step()
        parrot.engine.is_torn = step % 4 == 0       # a step that is launched and not read is lost
    assert output.text == cut(answer, [stop])
