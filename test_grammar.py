"""Structured output: whatever the model would say, an answer with a grammar follows the grammar.

The model has random weights, and temperature 2 makes its choices wilder still. The oracles are Python's
json, a check of each schema written by hand, and pydantic for the beginnings of cut answers.
"""
import contextlib
import itertools
import json
import random
import re
import sys

import pytest
from pydantic_core import from_json

from reference import write_model
from sampling import SamplingParams
from test_faults import assert_settled, at_line, interrupt
from tinyvllm import LLM, TinyVLLMError

pytest.importorskip("llguidance")

CONTEXT = 512


def is_person(value):
    return (list(value) == ["name", "age"] and type(value["age"]) is int and 0 <= value["age"] <= 150
            and isinstance(value["name"], str) and len(value["name"]) <= 12)


def is_tree(value):
    return value in (True, False, None) or (
        type(value) is dict and set(value) <= {"left", "right"} and all(map(is_tree, value.values())))


# Schemas whose values have a largest size, and a check of a value of each.
PERSON = {"type": "object", "required": ["name", "age"], "additionalProperties": False, "properties": {
    "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}}}
SCHEMAS = [
    (PERSON, is_person),
    ({"enum": ["red", "grün", "🦜", 7, None]}, lambda value: value in ("red", "grün", "🦜", 7, None)),
    ({"const": ["<|eot_id|>"]}, lambda value: value == ["<|eot_id|>"]),     # ten characters, and no token
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
     lambda value: 2 <= len(value) <= 3 and all(type(item) is bool for item in value)),
    ({"type": "string", "pattern": "^[a-f]{3}-[0-9]{2}$"},
     lambda value: len(value) == 6 and set(value[:3]) <= set("abcdef") and value[3] == "-"
     and value[4:].isdecimal()),
    ({"type": "object", "properties": {"x": {"const": [1, {"y": "z"}]}}, "required": ["x"],
      "additionalProperties": False}, lambda value: value == {"x": [1, {"y": "z"}]}),
    ({"anyOf": [{"type": "null"}, PERSON]}, lambda value: value is None or is_person(value)),
]
# A schema whose values have none: the limit of tokens may cut such an answer.
OPEN_SCHEMAS = [
    ({"type": "object"}, lambda value: type(value) is dict),
    ({"type": "array", "items": {"type": "number"}},
     lambda value: all(type(item) in (int, float) for item in value)),
    ({"$ref": "#/$defs/tree", "$defs": {"tree": {"anyOf": [{"type": ["boolean", "null"]}, {
        "type": "object", "additionalProperties": False,
        "properties": {side: {"$ref": "#/$defs/tree"} for side in ("left", "right")}}]}}}, is_tree)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny") / "model", {"max_position_embeddings": CONTEXT})


def asked(schema, seed, **options):
    return SamplingParams(**{"temperature": 2.0, "max_tokens": None, "seed": seed,
                             "structured_outputs": {"json": schema}, **options})


def assert_follows(output, is_right):
    """The answer is right, or cut and the beginning of some JSON."""
    assert output.error is None
    if output.finish_reason == "length":
        from_json(output.text, allow_partial="trailing-strings")
    else:
        assert output.finish_reason == "stop"
        assert is_right(json.loads(output.text)), output.text


def mixed(n):
    """(prompts, params, checks) of n requests with all schemas and of as many without."""
    rng = random.Random(5)
    prompts = [[rng.randrange(2000) for _ in range(rng.randrange(1, 40))] for _ in range(2 * n)]
    params = []
    checks = []
    for seed, (schema, is_right) in zip(range(n), itertools.cycle(SCHEMAS + OPEN_SCHEMAS)):
        params.append(asked(schema, seed, max_tokens=60, top_p=rng.choice([1.0, 0.9])))
        params.append(SamplingParams(temperature=1.5, seed=seed, max_tokens=30, ignore_eos=True))
        checks += [is_right, None]
    return prompts, params, checks


ENGINES = {"overlapped": {}, "plain": {"overlap": False},
           "preempted": {"num_blocks": 12, "max_model_len": 128}, "few at a time": {"max_num_seqs": 3}}


@pytest.fixture(scope="module")
def wanted(folder):
    """The answers to mixed(10), each request alone in its engine."""
    prompts, params, _ = mixed(10)
    llm = LLM(folder, block_size=16, num_blocks=256, overlap=False, max_num_seqs=1)
    return [output.token_ids for output in llm.generate(prompts, params)]


@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
def test_mixed_requests(folder, wanted, options):
    """All answers follow their grammars, and no answer depends on its company."""
    llm = LLM(folder, **{"block_size": 16, "num_blocks": 256, **options})
    prompts, params, checks = mixed(10)
    outputs = llm.generate(prompts, params)
    assert [output.token_ids for output in outputs] == wanted
    for output, is_right in zip(outputs, checks):
        if is_right:
            assert_follows(output, is_right)
    assert any(output.num_preemptions for output in outputs) == ("num_blocks" in options)
    llm.engine.scheduler.check_integrity()


def test_answers_always_end(folder):
    """With room enough, every answer with a largest size parses, also the most probable one."""
    llm = LLM(folder)
    cases = [(asked(schema, 7, temperature=temperature), is_right) for schema, is_right in SCHEMAS
             for temperature in (0.0, 0.7, 2.0)]
    outputs = llm.generate([[seed] for seed in range(len(cases))], [params for params, _ in cases])
    for (_, is_right), output in zip(cases, outputs):
        assert output.finish_reason == "stop", output
        assert is_right(json.loads(output.text)), output.text


def test_others_run_while_an_answer_waits_for_its_token(folder):
    """Overlapped, a request with a grammar sits out every other step. Its neighbour does not."""
    llm = LLM(folder)
    params = [asked(PERSON, 1, max_tokens=20), SamplingParams(max_tokens=60, ignore_eos=True)]
    constrained, free = outputs = llm.submit([[1], [2]], params)
    counts = []
    while not free.finish_reason:
        llm.engine.step()
        counts.append([len(output.token_ids) for output in outputs])
    assert len(counts) <= 62
    waits = [count for count, _ in counts[:40]]
    assert waits[-1] == 20 == len(set(waits[:-1])) and constrained.finish_reason == "length"


@pytest.mark.parametrize("overlap", [True, False])
def test_interrupts_lose_nothing(folder, overlap):
    """Ctrl-C at many lines of a step: the answers are those of a run without."""
    cases = [(asked(schema, 3, max_tokens=24), is_right) for schema, is_right in SCHEMAS[:4]]
    prompts = [[number, 9] for number in range(4)]
    params = [params for params, _ in cases]
    llm = LLM(folder, num_blocks=64, overlap=overlap)
    wanted = [output.token_ids for output in llm.generate(prompts, params)]
    rng = random.Random(overlap)
    for _ in range(3):
        outputs = llm.submit(prompts, params)
        num_interrupts = 0
        while not all(output.finish_reason for output in outputs):
            # Whether a step is cut at its beginning, at its end, or not at all
            with contextlib.suppress(KeyboardInterrupt), at_line(rng.randrange(40, 2500), interrupt) as place:
                for _ in range(4):
                    llm.engine.step()
            num_interrupts += len(place)
        assert [output.token_ids for output in outputs] == wanted
        assert num_interrupts > 2
    assert_settled(llm)


def test_reported_log_probabilities_know_no_grammar(folder):
    """The best tokens are mostly banned ones. A row without and with a grammar reports the same."""
    llm = LLM(folder)
    greedy = {"temperature": 0.0, "max_tokens": 1, "logprobs": 3}
    free, bound = llm.generate([[5, 6, 7]] * 2, [SamplingParams(**greedy), asked(PERSON, 0, **greedy)])
    [free_report], [bound_report] = free.logprobs, bound.logprobs
    best = list(free_report)[:3]
    assert bound.text == "{" and bound.token_ids[0] not in best
    assert {token: bound_report[token] for token in best} == free_report
    assert bound_report[bound.token_ids[0]] < min(free_report.values())


def test_an_impossible_answer_is_an_error_of_its_request(folder):
    """All tokens that the grammar allows are banned: the request ends, and its neighbour goes on."""
    llm = LLM(folder)
    brace = llm.tokenizer.token_id("{")
    others = [asked(PERSON, 1), SamplingParams(max_tokens=9)]
    wanted = llm.generate([[2], [3]], others)
    banned = asked({"type": "object"}, 0, stop_token_ids=[brace], min_tokens=5)     # the object's beginning
    outputs = llm.generate([[1], [2], [3]], [banned, *others])
    assert outputs[0].finish_reason == "error" and not outputs[0].text
    assert outputs[0].error == "structured output: no token that the grammar allows is possible"
    assert [output.token_ids for output in outputs[1:]] == [output.token_ids for output in wanted]


# --------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wanted", [
    {}, {"json": PERSON, "grammar": "start: \"a\""}, {"json": "{}"}, {"json": None}, {"regex": "a"}, "json",
    [], {"grammar": {}}, 7])
def test_no_grammar(wanted):
    with pytest.raises(TinyVLLMError, match="structured_outputs: expected a dict"):
        SamplingParams(structured_outputs=wanted)


CIRCLE = {}
CIRCLE["properties"] = CIRCLE


@pytest.mark.parametrize("schema, reason", [
    ({"type": "foo"}, "Invalid type: foo"), ({"not": {}}, "not"), ({"$ref": "#/nowhere"}, "nowhere"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"), ({"minimum": "x"}, "f64"),
    ({"enum": []}, "anyOf is empty"), ({"type": "string", "format": "x" * 9999}, "Unknown format"),
    ({"const": float("nan")}, "expected"), ({"const": b"x"}, "bytes"), (CIRCLE, "ircular")])
def test_a_refused_schema(folder, schema, reason):
    """One line for this request alone, before the request is queued."""
    llm = LLM(folder)
    bad, good = llm.generate([[1], [2]], [asked(schema, 0), asked({"const": 1}, 0)])
    assert bad.finish_reason == "error" and not bad.token_ids and good.text == "1"
    assert reason in bad.error and "\n" not in bad.error and len(bad.error) < 500


def test_a_grammar_in_larks_form(folder):
    grammar = 'start: "a" /[bc]{3}/ ("d" | "e")'
    params = SamplingParams(temperature=2.0, seed=1, structured_outputs={"grammar": grammar})
    output = LLM(folder).generate([1, 2], params)[0]
    assert re.fullmatch("a[bc]{3}[de]", output.text)
    with pytest.raises(TinyVLLMError, match="unknown name"):
        LLM(folder).generate([1], SamplingParams(structured_outputs={"grammar": "start: x"}))


def test_without_the_package(folder, monkeypatch):
    """The engine runs without it; a request for it is told what to install."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    llm = LLM(folder)
    assert llm.generate([1], SamplingParams(max_tokens=3))[0].finish_reason == "length"
    with pytest.raises(TinyVLLMError, match="pip install --upgrade llguidance"):
        llm.generate([1], asked(PERSON, 0))
