"""The server: real clients, and broken ones.

Two servers run for the whole module: Parrot in the simulator, with texts that are known to the last
character, and reference.StandIn, a model without kernels that makes hundreds of steps a second. Each
answer is parsed by openai's own strict models, or read from a raw socket. Signals and exit codes are
tested on processes.

    what is shared    answers    streams    stop strings    log-probabilities    refusals    who may ask
    broken clients    limits    metrics and log    processes    replicas
"""
import asyncio
import base64
import contextlib
import enum
import http.client
import itertools
import json
import logging
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated
from urllib.request import urlopen

import numpy as np
import openai
import pydantic
import pydantic_core
import pytest

import completions
import load
import server
import worker
from reference import PARROT, ROOT, StandIn, expected
from tinyvllm import (LLM, BlockAllocator, Engine, EngineArgs, ModelConfig, SamplingParams, Scheduler,
                      TinyVLLMError)
from tokenizer import Tokenizer

TOKENIZER = Tokenizer(PARROT)
TEXTS = json.loads((PARROT / "texts.json").read_text("utf-8"))
ANSWERS = {question: "\n".join(text["answer"]) for text in TEXTS for question in text["questions"]}
QUESTION = "Who are you?"
ANSWER = ANSWERS[QUESTION]


# --------------------------------------------------------------------------------------------------
# What is shared
# --------------------------------------------------------------------------------------------------
class SlowStandIn(StandIn):
    """A stand-in whose steps take as long as a GPU's, and whose log-probabilities may be infinite."""
    pause = 0.0
    logprob = 0.0

    def launch(self, batch):
        time.sleep(self.pause)
        logits, get_tokens = super().launch(batch)
        tokens, logprobs = get_tokens()
        return logits, lambda: (tokens, logprobs + np.float32(self.logprob))


def stub_llm(num_blocks=20_000, block_size=16, budget=4096, max_seqs=64, end_every=0):
    """An LLM over the stand-in."""
    llm = LLM.__new__(LLM)
    llm.config = ModelConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=32, vocab_size=2048, max_position_embeddings=1 << 20, rms_norm_eps=1e-5, rope_theta=1e4,
        rope_scaling=None, tie_word_embeddings=True, eos_token_ids=frozenset([2047]))
    llm.tokenizer = TOKENIZER
    llm.max_logprobs = 20
    llm.default_sampling = {}
    llm.advice = ""
    llm.max_model_len = num_blocks * block_size
    model = SlowStandIn(llm.config, num_blocks * block_size, block_size, end_every)
    llm.device = model.device
    llm.engine = Engine(model, Scheduler(BlockAllocator(num_blocks, block_size), budget, max_seqs), True)
    return llm


class Running:
    """A server in a thread of this process."""

    def __init__(self, llm, **options):
        self.llm = llm
        self.app = server.build_app(llm, ("model", "org/model"), **options)
        self.service = self.app.state.service
        self.socket = server.open_socket("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.server = server.Server(self.app, shutdown_timeout=0)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        wait_for(lambda: self.server.started)

    def close(self):
        self.server.handle_exit(signal.SIGTERM, None)
        self.thread.join(20)
        self.socket.close()
        assert not self.thread.is_alive() and self.service.reading.done()

    def client(self, kind=openai.OpenAI, **options):
        return kind(base_url=self.url, api_key="key", max_retries=0, _strict_response_validation=True,
                    **options)

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), 20)

    def request(self, method, path, body=None, headers=()):
        """(status, headers, body) of a request by hand. body: bytes, or a value for JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            headers = {"Content-Type": "application/json"} | dict(headers)
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def post(self, path, body, headers=()):
        return self.request("POST", path, body, headers)

    def complete(self, **body):
        """The JSON of an answer that must be there."""
        status, _, data = self.post("/v1/completions", body)
        assert status == 200, data
        return json.loads(data)

    def is_idle(self):
        """Whether nothing is left of any request."""
        scheduler = self.llm.engine.scheduler
        return not (self.service.calls or self.service.num_unfinished or self.service.choices
                    or self.llm.engine.sequences or self.llm.engine.in_flight
                    or scheduler.running or scheduler.waiting) and (
                        len(scheduler.allocator.free) == scheduler.allocator.num_blocks)


def wait_for(condition, seconds=20):
    """Waits until the condition holds. The time is a limit for a hang, and no measurement."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@contextlib.contextmanager
def running(llm, **options):
    it = Running(llm, **options)
    try:
        yield it
    finally:
        it.close()


@pytest.fixture(scope="module")
def parrot_llm():
    return LLM("parrot", device="cpu")


@pytest.fixture(scope="module")
def parrot(parrot_llm):
    with running(parrot_llm) as it:
        yield it


@pytest.fixture(scope="module")
def module_stub():
    with running(stub_llm()) as it:
        yield it


@pytest.fixture
def stub(module_stub):
    """The stand-in's server, which each test leaves as idle as it was."""
    yield module_stub
    module_stub.llm.engine.model.pause = 0.0
    module_stub.llm.engine.model.logprob = 0.0
    wait_for(module_stub.is_idle)


def user(text):
    return [{"role": "user", "content": text}]


def events(data):
    """The objects of a stream of server-sent events, and whether [DONE] ends it."""
    parts = data.decode().removesuffix("\n\n").split("\n\n")
    assert data.endswith(b"\n\n")
    parts = [part for part in parts if part != ": ping"]
    assert all(part.startswith("data: ") for part in parts)
    is_done = parts[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:len(parts) - is_done]], is_done


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def send_post(client, body, headers=b""):
    """Sends a request for a completion over a raw socket."""
    data = json.dumps(body).encode()
    client.sendall(HEAD + headers + b"Content-Length: %d\r\n\r\n" % len(data) + data)


def read_response(client):
    """(status, body) of a response on a raw socket."""
    response = http.client.HTTPResponse(client)
    response.begin()
    return response.status, response.read()


def hang_up(client, is_reset):
    """Closes a raw socket by FIN or by RST."""
    if is_reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def stub_answer(prompt, index=0, **params):
    """(text, finish reason) of the stand-in."""
    params = SamplingParams(temperature=1.0, **params)
    params.seed += index
    tokens, reason = expected(prompt, params, 10**6)
    return TOKENIZER.decode(tokens), reason


# --------------------------------------------------------------------------------------------------
# Answers: openai's clients, curl
# --------------------------------------------------------------------------------------------------
def test_openai_whole(parrot):
    answer = parrot.client().chat.completions.create(model="model", messages=user(QUESTION), temperature=0)
    [choice] = answer.choices
    assert (choice.message.content, choice.finish_reason) == (ANSWER, "stop")
    assert choice.message.refusal is None and answer.object == "chat.completion" and answer.model == "model"
    prompt = TOKENIZER.chat(user(QUESTION))
    num_tokens = len(TOKENIZER.encode(ANSWER, add_bos=False)) + 1       # and the end token
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), num_tokens)
    assert answer.usage.total_tokens == len(prompt) + num_tokens
    completion = parrot.client().completions.create(
        model="model", prompt=prompt, temperature=0, max_tokens=999)
    assert completion.choices[0].text == ANSWER and completion.object == "text_completion"


def test_openai_streams(parrot):
    stream = parrot.client().chat.completions.create(
        model="org/model", messages=user(QUESTION), temperature=0, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert {(chunk.id, chunk.model, chunk.object) for chunk in chunks} == {
        (chunks[0].id, "org/model", "chat.completion.chunk")}
    with parrot.client().chat.completions.stream(model="model", messages=user(QUESTION), temperature=0) as s:
        assert s.get_final_completion().choices[0].message.content == ANSWER


def test_openai_async(parrot):
    """Several questions at once. An emoji of several tokens comes in one piece."""
    questions = list(dict.fromkeys(text["questions"][0] for text in TEXTS if len(text["answer"]) == 1))[:4]

    async def ask(client, question):
        stream = await client.chat.completions.create(
            model="model", messages=user(question), temperature=0, stream=True)
        return [chunk.choices[0].delta.content or "" async for chunk in stream]

    async def ask_all():
        async with parrot.client(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(ask(client, question) for question in questions))
    answers = asyncio.run(ask_all())
    assert ["".join(pieces) for pieces in answers] == [ANSWERS[question] for question in questions]
    assert any("🦜" in piece for pieces in answers for piece in pieces)
    assert not any("\ufffd" in piece for pieces in answers for piece in pieces)


def test_curl_and_the_greeting(parrot):
    """The command that the greeting shows works as it stands."""
    args = SimpleNamespace(api_key=None)
    text = server.greeting(args, ("127.0.0.1", parrot.port), "model", True, "a device")
    command = text.split("\n")[1].replace('"messages"', '"temperature": 0, "messages"')
    answer = json.loads(subprocess.check_output(command, shell=True, stderr=subprocess.DEVNULL))
    assert answer["choices"][0]["message"]["content"] == ANSWER
    assert "http://[::1]:80/v1" in server.greeting(args, ("::", 80), "model", True, "a device")


def test_readme(parrot, capsys):
    """The examples of curl and of openai-python work. The table of options is the command line's."""
    readme = (ROOT / "README.md").read_text("utf-8").replace("127.0.0.1:8000", f"127.0.0.1:{parrot.port}")
    [command] = re.findall(r"^```sh\n(curl .*?)```", readme, re.S | re.M)
    answer = json.loads(subprocess.check_output(command, shell=True, stderr=subprocess.DEVNULL))
    assert answer["choices"][0]["message"]["content"] == ANSWER
    [code] = re.findall(r"^```python\n(from openai .*?)```", readme, re.S | re.M)
    exec(code, {})
    assert capsys.readouterr().out == ANSWER
    names = {program: subprocess.check_output([sys.executable, program, "--help"], cwd=ROOT, text=True)
             for program in ("server.py", "tinyvllm.py")}
    options = {program: set(re.findall(r"^  (--[\w-]+)", text, re.M)) for program, text in names.items()}
    table = readme[readme.index("| server option |"):].split("\n\n")[0]
    assert set(re.findall(r"`(--[\w-]+)`", table)) == options["server.py"] - options["tinyvllm.py"]


def test_variables_of_the_chat_template(parrot, monkeypatch):
    """As clients of Qwen3 turn thinking off. The server's own variables stay."""
    templates = parrot.llm.tokenizer._templates
    monkeypatch.setitem(templates, "default", templates["default"] + "{{ '' if thinks is false else ' Hm' }}")
    for body, end in [({}, " Hm"), ({"chat_template_kwargs": {"thinks": False}}, "")]:
        body = body | {"messages": user("Hi"), "max_tokens": 1}
        status, _, data = parrot.post("/v1/chat/completions", body)
        prompt = TOKENIZER.chat(user("Hi")) + TOKENIZER.encode(end, add_bos=False)
        assert status == 200 and json.loads(data)["usage"]["prompt_tokens"] == len(prompt)
        _, _, data = parrot.post("/tokenize", body)
        assert json.loads(data)["tokens"] == prompt
    for variables in [1], {"messages": []}, {"bos_token": "x"}:
        refusal(parrot, "/v1/chat/completions", {"messages": user("Hi"), "chat_template_kwargs": variables})


def test_models(parrot):
    client = parrot.client()
    cards = client.models.list().data
    assert [card.id for card in cards] == ["model", "org/model"] and cards[0].max_model_len == 4096
    assert client.models.retrieve("org/model").object == "model"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="expected model or org/model, got 'gpt-4'"):
        client.chat.completions.create(model="gpt-4", messages=user("Hi"))


def test_a_request_without_a_model(stub):
    assert stub.complete(prompt=[1, 2], max_tokens=1)["model"] == "model"
    assert stub.complete(prompt=[1, 2], max_tokens=1, model=None)["model"] == "model"


def test_tokenize(parrot):
    for text in "Hi, I am a 🦜.", "<|eot_id|>":
        status, _, data = parrot.post("/tokenize", {"prompt": text})
        tokens = json.loads(data)
        assert status == 200
        assert tokens == {"tokens": TOKENIZER.encode(text), "count": len(TOKENIZER.encode(text)),
                          "max_model_len": 4096}
        _, _, data = parrot.post("/detokenize", {"tokens": tokens["tokens"]})
        assert json.loads(data) == {"prompt": text}
    status, _, data = parrot.post("/detokenize", {"tokens": [1] * 4097})
    assert status == 400 and "4096 token ids at most" in json.loads(data)["error"]["message"]
    _, _, data = parrot.post("/tokenize", {"prompt": "Hi", "add_special_tokens": False})
    assert json.loads(data)["tokens"] == TOKENIZER.encode("Hi", add_bos=False)
    body = {"messages": user("Hi"), "add_special_tokens": False, "add_generation_prompt": True}
    for chat in body, {"messages": user("Hi")}:
        _, _, data = parrot.post("/tokenize", chat)
        assert json.loads(data)["tokens"] == TOKENIZER.chat(user("Hi"))
    for name, value in [("add_special_tokens", True), ("add_generation_prompt", False),
                        ("continue_final_message", True), ("chat_template", "{{ messages }}"),
                        ("chat_template_kwargs", [1]), ("documents", [{"text": "a"}])]:
        assert refusal(parrot, "/tokenize", body | {name: value})["param"] == name


def test_prompts_of_four_forms(stub):
    """One text, several, token ids, several lists of token ids: choices in the order of prompts."""
    texts = ["Once upon", "a time"]
    ids = [TOKENIZER.encode(text) for text in texts]
    answers = [stub_answer(prompt, seed=1, max_tokens=16)[0] for prompt in ids]
    for prompt, wanted in (texts[0], answers[:1]), (texts, answers), (ids[0], answers[:1]), (ids, answers):
        answer = stub.complete(prompt=prompt, seed=1)
        assert [choice["text"] for choice in answer["choices"]] == wanted
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * len(wanted)
        num_prompt = sum(map(len, ids[:len(wanted)]))
        assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (
            num_prompt, 16 * len(wanted))
    answer = stub.complete(prompt="a time", add_special_tokens=False, seed=1, max_tokens=3)
    assert answer["choices"][0]["text"] == stub_answer(ids[1][1:], seed=1, max_tokens=3)[0]


def test_defaults(stub):
    """What a request leaves out: temperature 1, the model's own sampling, 16 tokens of a completion."""
    prompt = [5, 6, 7]
    assert stub.complete(prompt=prompt, seed=9)["choices"][0]["text"] == stub_answer(
        prompt, seed=9, max_tokens=16)[0]
    stub.llm.default_sampling = {"temperature": 0.0}
    try:
        answer = stub.complete(prompt=prompt, seed=9)
    finally:
        stub.llm.default_sampling = {}
    greedy, _ = expected(prompt, SamplingParams(max_tokens=16), 10**6)
    assert answer["choices"][0]["text"] == TOKENIZER.decode(greedy)


def test_max_tokens(parrot):
    """max_completion_tokens goes first. More than the context holds is cut."""
    def ask(**options):
        answer = parrot.client().chat.completions.create(
            model="model", messages=user(QUESTION), temperature=0, **options)
        return answer.usage.completion_tokens, answer.choices[0].finish_reason
    assert ask(max_tokens=3) == (3, "length")
    assert ask(max_tokens=3, max_completion_tokens=2) == (2, "length")
    assert ask(max_tokens=10**9)[1] == "stop"


def test_n_and_seeds(parrot):
    """n answers of one seed differ, and come again."""
    def ask(**options):
        answer = parrot.client().completions.create(model="model", prompt="A", n=3, max_tokens=12, **options)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage.prompt_tokens == len(TOKENIZER.encode("A"))
        return [choice.text for choice in answer.choices]
    texts = ask(seed=42, temperature=1)
    assert len(set(texts)) == 3 and ask(seed=42, temperature=1) == texts
    assert len(set(ask(temperature=0))) == 1


def test_negative_seeds(stub):
    answer = stub.complete(prompt=[1], seed=-1, n=2, max_tokens=5)
    texts = [TOKENIZER.decode(expected([1], SamplingParams(temperature=1, seed=seed, max_tokens=5), 99)[0])
             for seed in (2**64 - 1, 0)]
    assert [choice["text"] for choice in answer["choices"]] == texts


def test_one_beginning_of_text(parrot):
    """A chat is as tokenizer.chat makes it. The text of a completion gets one BOS."""
    bos = TOKENIZER.encode("")
    assert len(bos) == 1
    usage = parrot.complete(prompt="Once upon a time", max_tokens=1)["usage"]
    assert usage["prompt_tokens"] == 1 + len(TOKENIZER.encode("Once upon a time", add_bos=False))


def test_contents_of_messages(parrot):
    """Parts of text are one text. An assistant without content counts as one who said nothing. A
    developer is a system."""
    def count(*messages):
        answer = parrot.client().chat.completions.create(model="model", messages=messages, max_tokens=1)
        return answer.usage.prompt_tokens
    text = user("Who are you?")[0]
    parts = {"role": "user", "content": [{"type": "text", "text": text} for text in ("Who are", " you?")]}
    assert count(parts) == count(text)
    silent = [{"role": "assistant", "content": content} for content in (None, "")]
    assert count(text, silent[0], text) == count(text, silent[1], text) > 2 * count(text) - 3
    assert count({"role": "developer", "content": "Be brief."}, text) == count(
        {"role": "system", "content": "Be brief."}, text)
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
    with pytest.raises(openai.BadRequestError):
        count(image)


def test_unknown_fields_and_neutral_values(stub):
    """What LangChain and vllm bench send, and fields from the future."""
    stub.complete(prompt=[1], max_tokens=2, temperature=0.7, top_p=1, n=1, frequency_penalty=0,
                  presence_penalty=0, seed=None, logprobs=None, best_of=1, logit_bias={}, stop=None,
                  suffix=None, user="me", metadata={"a": "b"}, store=False, service_tier="auto",
                  safety_identifier="x", parallel_tool_calls=True, reasoning_effort="low",
                  verbosity="low", repetition_penalty=1.0, skip_special_tokens=True,
                  min_p=0, min_tokens=0, ignore_eos=True, stop_token_ids=[], echo=False, tools=[],
                  tool_choice="none", response_format={"type": "text"}, from_the_future={"x": [1]})
    status, _, data = stub.post("/v1/chat/completions", {
        "messages": [{**user("Hi")[0], "id": 7, "opts": {}}], "max_tokens": 1, "tool_choice": "auto",
        "modalities": ["text"], "top_logprobs": None, "logprobs": False, "functions": None})
    assert status == 200, data


# --------------------------------------------------------------------------------------------------
# Structured output
# --------------------------------------------------------------------------------------------------
class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Bird(pydantic.BaseModel):
    name: Annotated[str, pydantic.Field(max_length=12)]
    color: Color
    age: Annotated[int, pydantic.Field(ge=0, le=99)] | None
    chicks: Annotated[list[bool], pydantic.Field(max_length=2)]


def test_parse(parrot):
    """openai's parse() makes the schema of a pydantic model, and reads the answer into the model. Beside it,
    a recitation goes on unharmed, and streams give the same text as whole answers."""
    pytest.importorskip("llguidance")
    client = parrot.client()
    for seed in range(4):
        asked = dict(model="model", messages=user("A bird, please."), temperature=2, seed=seed)
        with ThreadPoolExecutor() as pool:
            recited = pool.submit(recite, client)
            answer = client.chat.completions.parse(**asked, response_format=Bird)
            assert recited.result() == ANSWER
        assert isinstance(answer.choices[0].message.parsed, Bird), answer
        assert answer.choices[0].finish_reason == "stop"
        with client.chat.completions.stream(**asked, response_format=Bird) as stream:
            streamed = stream.get_final_completion()
        assert streamed.choices[0].message.content == answer.choices[0].message.content


def recite(client):
    answer = client.chat.completions.create(model="model", messages=user(QUESTION), temperature=0)
    return answer.choices[0].message.content


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_json_object(parrot, path):
    """A cut answer says so. n answers have a grammar each."""
    pytest.importorskip("llguidance")
    asked = {"messages": user("JSON"), "prompt": "JSON", "response_format": {"type": "json_object"}, "n": 4,
             "temperature": 1.5, "seed": 1, "max_tokens": 40}
    status, _, data = parrot.post(path, asked)
    assert status == 200, data
    for choice in json.loads(data)["choices"]:
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        value = pydantic_core.from_json(text, allow_partial="trailing-strings")
        assert isinstance(value, dict) and choice["finish_reason"] in ("stop", "length")
        assert choice["finish_reason"] == "length" or json.loads(text) == value


def test_refused_schemas(parrot, monkeypatch):
    """With llguidance's reason, in one line, or with the name of the package that is not there."""
    pytest.importorskip("llguidance")

    def refused(schema):
        body = {"prompt": [1], "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
        error = refusal(parrot, "/v1/completions", body)
        assert error["param"] == "response_format"
        return error["message"]
    assert "Invalid type: foo" in refused({"type": "foo"})
    assert "look-ahead" in refused({"type": "string", "pattern": "(?=a)b"})
    assert "Unknown format" in refused({"type": "string", "format": "x" * 5000})
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert "pip install --upgrade llguidance" in refused({"type": "integer", "maximum": 31})
    assert parrot.complete(prompt=[1], max_tokens=1)


def test_echo(stub):
    for prompt, text in ("Once upon a time", "Once upon a time"), (TOKENIZER.encode("a time"), "a time"):
        ids = TOKENIZER.encode(text)
        wanted = text + stub_answer(ids, seed=4, max_tokens=8)[0]
        assert stub.complete(prompt=prompt, echo=True, seed=4, max_tokens=8)["choices"][0]["text"] == wanted
        _, _, data = stub.post("/v1/completions",
                               {"prompt": prompt, "echo": True, "seed": 4, "max_tokens": 8, "stream": True})
        assert "".join(event["choices"][0]["text"] for event in events(data)[0]) == wanted


def test_cached_tokens(stub):
    prompt = list(range(100, 164))
    stub.complete(prompt=prompt, max_tokens=1)
    usage = stub.complete(prompt=[prompt + [1], prompt + [2]], n=2, max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 128} and usage["prompt_tokens"] == 130


# --------------------------------------------------------------------------------------------------
# Streams
# --------------------------------------------------------------------------------------------------
def stream(running, path, **body):
    """(events without usage, usage events) of a stream that ends as it should."""
    status, headers, data = running.post(path, body | {"stream": True})
    assert status == 200, data
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache" and headers["x-accel-buffering"] == "no"
    parts, is_done = events(data)
    assert is_done
    return [part for part in parts if part["choices"]], [part for part in parts if not part["choices"]]


def test_the_order_of_a_stream(parrot):
    """The role with the first token, text that is never empty, the end by itself, no usage unasked."""
    parts, usage = stream(parrot, "/v1/chat/completions", messages=user(QUESTION), temperature=0)
    assert usage == [] and not any("usage" in part for part in parts)
    [first, *middle, last] = [part["choices"][0] for part in parts]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert all(list(choice["delta"]) == ["content"] and choice["delta"]["content"] for choice in middle)
    assert all(choice["finish_reason"] is None for choice in [first, *middle])
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")
    assert "".join(choice["delta"]["content"] for choice in middle) == ANSWER


@pytest.mark.parametrize("options, has_usage", [
    (None, False), ({}, False), ({"include_usage": False}, False), ({"include_usage": None}, False),
    ({"include_usage": True}, True)])
def test_usage_of_a_stream(stub, options, has_usage):
    parts, usage = stream(stub, "/v1/completions", prompt=[1, 2, 3], max_tokens=5, stream_options=options)
    assert len(usage) == has_usage
    assert all(("usage" in part) == has_usage and part.get("usage") is None for part in parts)
    if has_usage:
        assert usage[0]["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8,
                                     "prompt_tokens_details": {"cached_tokens": 0}}


def test_running_usage(stub):
    parts, _ = stream(stub, "/v1/completions", prompt=[1, 2, 3], max_tokens=50,
                      stream_options={"continuous_usage_stats": True})
    counts = [part["usage"]["completion_tokens"] for part in parts]
    assert counts == sorted(counts) and counts[-1] == 50


def test_several_prompts_and_choices_in_a_stream(stub):
    prompts = [[1, 2, 3], [4, 5]]
    parts, usage = stream(stub, "/v1/completions", prompt=prompts, n=3, seed=7, max_tokens=40,
                          stream_options={"include_usage": True})
    choices = [part["choices"][0] for part in parts]
    for index in range(6):
        mine = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in mine) == stub_answer(
            prompts[index // 3], index % 3, seed=7, max_tokens=40)[0]
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["length"]
        assert all(choice["text"] for choice in mine[:-1]) and mine[-1]["text"] == ""
    assert usage[0]["usage"]["completion_tokens"] == 240 and usage[0]["usage"]["prompt_tokens"] == 5
    parts, _ = stream(stub, "/v1/chat/completions", messages=user("Hi"), n=3, max_tokens=5)
    roles = [part["choices"][0]["index"] for part in parts if "role" in part["choices"][0]["delta"]]
    assert sorted(roles) == [0, 1, 2]


def test_streams_of_random_bytes(stub):
    """The stand-in's tokens are bytes of any kind: halves of characters, and no characters at all."""
    for seed in range(20):
        parts, _ = stream(stub, "/v1/completions", prompt=[seed], seed=seed, max_tokens=60)
        whole = stub.complete(prompt=[seed], seed=seed, max_tokens=60)["choices"][0]["text"]
        assert "".join(part["choices"][0]["text"] for part in parts) == whole
        assert whole == stub_answer([seed], seed=seed, max_tokens=60)[0]


def test_a_slow_client_gets_larger_chunks():
    """The client reads nothing until the answers are made. Then all text comes, in fewer chunks."""
    with running(stub_llm()) as it, socket.socket() as client:
        it.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)       # of accepted sockets too
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        client.connect(("127.0.0.1", it.port))
        send_post(client, {"prompt": [3], "seed": 3, "max_tokens": 100, "n": 64, "stream": True})
        wait_for(lambda: it.service.metrics.counts["generation_tokens"] == 6400)
        parts, is_done = events(read_response(client)[1])
    texts = [""] * 64
    for part in parts:
        texts[part["choices"][0]["index"]] += part["choices"][0]["text"]
    assert is_done and texts == [stub_answer([3], i, seed=3, max_tokens=100)[0] for i in range(64)]
    assert len(parts) < 6400 / 2


def test_a_ping_where_nothing_happens(stub, monkeypatch):
    monkeypatch.setattr(completions, "PING_SECONDS", 0.05)
    stub.llm.engine.model.pause = 0.5
    status, _, data = stub.post("/v1/completions", {"prompt": [1], "max_tokens": 2, "stream": True})
    assert status == 200 and data.startswith(b": ping\n\n") and data.endswith(b"data: [DONE]\n\n")
    stub.llm.engine.model.pause = 0.0
    assert b"ping" not in stub.post("/v1/completions", {"prompt": [1], "max_tokens": 2, "stream": True})[2]


def test_a_long_prompt_stops_nobody(stub):
    """While 200,000 tokens are encoded, the event loop answers and the engine makes steps."""
    llm = stub.llm
    prompt = "hello world " * 50_000
    reached = []
    encode = llm.tokenizer.encode

    def watched(text, *arguments):
        before = len(llm.engine.model.steps)
        ids = encode(text, *arguments)
        reached.append(len(llm.engine.model.steps) - before)
        return ids
    llm.engine.model.pause = 0.002
    streaming = threading.Thread(target=stub.complete, kwargs=dict(prompt=[1], max_tokens=600))
    streaming.start()
    wait_for(lambda: llm.engine.scheduler.running)
    llm.tokenizer.encode = watched
    long = threading.Thread(target=stub.post, args=("/tokenize", {"prompt": prompt}))
    try:
        long.start()
        num_healthy = 0
        while long.is_alive():
            assert stub.request("GET", "/health")[0] == 200
            num_healthy += 1
        long.join()
    finally:
        del llm.tokenizer.encode
    streaming.join()
    assert num_healthy >= 5 and reached[0] >= 5


# --------------------------------------------------------------------------------------------------
# Stop strings
# --------------------------------------------------------------------------------------------------
def test_stop_strings(parrot):
    """No character of a stop string is sent, wherever tokens end. The earliest one counts."""
    for stop in "language model of 1.2", ["word for word", "rrot: a"], ["z" * 99, "I am a parrot"], "🦜":
        stops = [stop] if isinstance(stop, str) else stop
        wanted = ANSWER[:min(ANSWER.index(text) for text in stops if text in ANSWER)]
        answer = parrot.client().chat.completions.create(
            model="model", messages=user(QUESTION), temperature=0, stop=stop)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (wanted, "stop")
        assert answer.choices[0].stop_reason in stops
        parts, _ = stream(parrot, "/v1/chat/completions", messages=user(QUESTION), temperature=0, stop=stop)
        pieces = [part["choices"][0]["delta"].get("content") for part in parts[1:-1]]
        assert "".join(pieces) == wanted and all(pieces)


def test_half_a_stop_string_at_the_end(parrot):
    """Text that was held back is sent when the answer ends without the rest of the stop string."""
    answer = parrot.complete(prompt=TOKENIZER.chat(user(QUESTION)), temperature=0, max_tokens=5)
    text = answer["choices"][0]["text"]
    parts, _ = stream(parrot, "/v1/completions", prompt=TOKENIZER.chat(user(QUESTION)), temperature=0,
                      max_tokens=5, stop=text[-3:] + "and more")
    assert "".join(part["choices"][0]["text"] for part in parts) == text
    assert parts[-1]["choices"][0]["finish_reason"] == "length"


def test_stop_tokens(stub):
    tokens, _ = expected([1], SamplingParams(max_tokens=9), 99)
    answer = stub.complete(prompt=[1], temperature=0, max_tokens=9, stop_token_ids=[tokens[4]])
    [choice] = answer["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", tokens[4])
    assert choice["text"] == TOKENIZER.decode(tokens[:4]) and answer["usage"]["completion_tokens"] == 5


# --------------------------------------------------------------------------------------------------
# Log-probabilities
# --------------------------------------------------------------------------------------------------
def test_logprobs_of_a_chat(parrot):
    """Joined tokens are the text, in bytes too. The best come first."""
    options = dict(model="model", messages=user(QUESTION), temperature=0, max_tokens=20, logprobs=True,
                   top_logprobs=3)
    [choice] = parrot.client().chat.completions.create(**options).choices
    entries = choice.logprobs.content
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == choice.message.content
    assert len(entries) == 20 and ANSWER.startswith(choice.message.content)
    for entry in entries:
        best = [top.logprob for top in entry.top_logprobs]
        assert len(best) == 3 and best == sorted(best, reverse=True) and best[0] == entry.logprob
        assert entry.top_logprobs[0].token == entry.token
    chunks = list(parrot.client().chat.completions.create(**options, stream=True))
    streamed = []
    for chunk in chunks:
        if chunk.choices[0].logprobs:
            data = bytes(byte for entry in chunk.choices[0].logprobs.content for byte in entry.bytes)
            assert data.decode() == chunk.choices[0].delta.content
            streamed += chunk.choices[0].logprobs.content
    assert streamed == entries
    [choice] = parrot.client().chat.completions.create(**options | {"top_logprobs": None}).choices
    assert {len(entry.top_logprobs) for entry in choice.logprobs.content} == {0}


def test_logprobs_of_a_completion(parrot):
    prompt = TOKENIZER.chat(user("What is a KV cache?"))
    for count in 0, 2:
        options = dict(model="model", prompt=prompt, temperature=0, max_tokens=20, logprobs=count)
        [choice] = parrot.client().completions.create(**options).choices
        logprobs = choice.logprobs
        assert "".join(logprobs.tokens) == choice.text and len(logprobs.tokens) == 20
        assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(20)]
        for token, logprob, best in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
            assert best[token] == logprob and len(best) == max(count, 1)
        parts, _ = stream(parrot, "/v1/completions", **options)     # the strict model knows no null
        choices = [part["choices"][0] for part in parts if part["choices"][0]["logprobs"]]
        assert all("".join(choice["logprobs"]["tokens"]) == choice["text"] for choice in choices)
        for name in "tokens", "token_logprobs", "top_logprobs", "text_offset":
            joined = [item for choice in choices for item in choice["logprobs"][name]]
            assert joined == getattr(logprobs, name)


LOGPROBS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def echoed(running, **options):
    """The JSON of an echoed completion. All but null of a prompt's first token is as openai's models say."""
    answer = running.complete(echo=True, temperature=0, **options)
    typed = json.loads(json.dumps(answer))
    for choice in typed["choices"]:
        logprobs = choice["logprobs"]
        assert len({len(logprobs[name]) for name in LOGPROBS}) == 1
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        logprobs["token_logprobs"][0] = 0.0
        logprobs["top_logprobs"][0] = {}
    openai.types.Completion.model_validate(typed, strict=True)
    return answer


@pytest.mark.parametrize("count", [0, 3])
def test_logprobs_of_an_echo(parrot, parrot_llm, count):
    """The prompt's numbers are the engine's own, which test_sampling.py checks. Then the answer's come."""
    text = "Who are you? 🦜 I am"
    ids = TOKENIZER.encode(text)
    [output] = parrot_llm.generate([ids], SamplingParams(max_tokens=4, logprobs=count, prompt_logprobs=count))
    for prompt in text, ids:
        answer = echoed(parrot, prompt=prompt, max_tokens=4, logprobs=count)
        [choice] = answer["choices"]
        logprobs = choice["logprobs"]
        assert choice["text"] == text + output.text
        assert answer["usage"]["completion_tokens"] == 4 and len(logprobs["tokens"]) == len(ids) + 4
        data = [TOKENIZER.token_bytes(token) for token in ids + output.token_ids]
        assert data[0] == b"" and logprobs["tokens"] == [
            part.decode("utf-8", "replace") for part in data]
        # The text before a token ends with the last whole character.
        assert logprobs["text_offset"] == [
            len(b"".join(data[:i]).decode("utf-8", "ignore")) for i in range(len(data))]
        best = output.prompt_logprobs + output.logprobs
        assert logprobs["token_logprobs"][1:] == pytest.approx(
            [row[token] for row, token in zip(best[1:], (ids + output.token_ids)[1:])], abs=1e-4)
        for row, top in zip(best[1:], logprobs["top_logprobs"][1:]):
            assert max(top.values()) == pytest.approx(max(row.values()), abs=1e-4)
            assert len(top) == len({TOKENIZER.token_bytes(token).decode("utf-8", "replace") for token in row})


def test_echo_without_an_answer(parrot):
    """max_tokens: 0 gives the prompt alone, whole or streamed, however the answer would begin."""
    prompts = [TOKENIZER.encode(text) for text in ("Once upon a time", "Hi")]
    firsts = [output.token_ids[0] for output in parrot.llm.generate(prompts, SamplingParams(max_tokens=1))]
    for end in {}, {"stop": list("aeiou ")}, {"stop_token_ids": firsts}:
        options = dict(prompt=prompts, n=2, max_tokens=0, logprobs=1, **end)
        answer = echoed(parrot, **options)
        assert (answer["usage"]["completion_tokens"], answer["usage"]["total_tokens"]) == (
            0, sum(map(len, prompts)))
        for choice, ids in zip(answer["choices"], [prompts[0]] * 2 + [prompts[1]] * 2):
            assert choice["text"] == TOKENIZER.decode(ids)
            assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
            assert len(choice["logprobs"]["tokens"]) == len(ids)
        parts, [usage] = stream(parrot, "/v1/completions", echo=True, temperature=0,
                                stream_options={"include_usage": True}, **options)
        assert usage["usage"]["completion_tokens"] == 0
        assert "".join(part["choices"][0]["text"] for part in parts) == "".join(
            choice["text"] for choice in answer["choices"])
        assert {part["choices"][0]["finish_reason"] for part in parts} == {None, "length"}
    answer = parrot.complete(prompt="Hi", echo=True, max_completion_tokens=0)
    assert (answer["choices"][0]["text"], answer["choices"][0]["logprobs"]) == ("Hi", None)
    assert answer["usage"]["completion_tokens"] == 0


def test_streams_with_logprobs_of_an_echo(parrot):
    """The opening chunk holds the prompt. The chunks together are the whole answer, to its end token."""
    prompts = [TOKENIZER.chat(user(QUESTION)), TOKENIZER.encode("A")]
    end = TOKENIZER.encode(ANSWER, add_bos=False)[12]
    options = dict(prompt=prompts, n=2, max_tokens=20, logprobs=2, stop_token_ids=[end])
    answer = echoed(parrot, **options)
    assert answer["choices"][0]["stop_reason"] == end
    num_tokens = sum(map(len, prompts)) * 2 + answer["usage"]["completion_tokens"]
    assert sum(len(choice["logprobs"]["tokens"]) for choice in answer["choices"]) == num_tokens
    parts, _ = stream(parrot, "/v1/completions", echo=True, temperature=0, **options)
    for whole in answer["choices"]:
        ids = prompts[whole["index"] // 2]
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == whole["index"]]
        assert mine[0]["text"] == TOKENIZER.decode(ids) and len(mine[0]["logprobs"]["tokens"]) == len(ids)
        assert "".join(choice["text"] for choice in mine) == whole["text"]
        for name in LOGPROBS:
            joined = [item for choice in mine if choice["logprobs"] for item in choice["logprobs"][name]]
            assert joined == whole["logprobs"][name]


def test_an_end_token_has_a_logprob_after_an_echo(parrot):
    """lm_eval asks for one token and drops the last entry, whatever the token is."""
    for end in TOKENIZER.encode("A") + sorted(parrot.llm.config.eos_token_ids):
        if end < parrot.llm.config.vocab_size:
            answer = echoed(parrot, prompt="A time", max_tokens=1, logprobs=1, logit_bias={str(end): 100})
            num_prompt = answer["usage"]["prompt_tokens"]
            assert answer["usage"]["completion_tokens"] == 1
            assert len(answer["choices"][0]["logprobs"]["tokens"]) == num_prompt + 1


def test_offsets_of_an_echo_where_the_first_space_is_dropped(parrot, monkeypatch):
    """As SentencePiece does: the first token is " a", and the text begins with "a"."""
    monkeypatch.setattr(parrot.llm.tokenizer, "drops_first_space", True)
    ids = parrot.llm.tokenizer.encode(" a time", add_bos=False)
    [choice] = echoed(parrot, prompt=ids, max_tokens=1, logprobs=0)["choices"]
    tokens = choice["logprobs"]["tokens"]
    assert choice["text"] == "a time" + tokens[-1] and tokens[0].startswith(" ")
    starts = [len("".join(tokens[:i])) - 1 for i in range(len(tokens))]
    assert choice["logprobs"]["text_offset"] == [0, *starts[1:]]


def test_two_tokens_of_one_text(parrot):
    """Most bytes are no text, and look alike. top_logprobs has the most probable: lm_eval asks for it."""
    halves = [i for i in range(2048) if b"\x80" <= TOKENIZER.token_bytes(i)[:1] < b"\xc0"
              and len(TOKENIZER.token_bytes(i)) == 1][:3]
    ids = [*TOKENIZER.encode("A"), *halves]
    answer = parrot.complete(prompt=ids, max_tokens=1, temperature=0, logprobs=3,
                             logit_bias={str(token): 100 for token in halves})
    [top] = answer["choices"][0]["logprobs"]["top_logprobs"]
    [output] = parrot.llm.generate([ids], SamplingParams(
        max_tokens=1, logprobs=3, logit_bias=dict.fromkeys(halves, 100)))
    [best] = output.logprobs
    texts = [TOKENIZER.token_bytes(token).decode("utf-8", "replace") for token in best]
    pairs = sorted(zip(best.values(), texts))
    assert len(pairs) > len(top) and top == pytest.approx({text: value for value, text in pairs}, abs=1e-4)


def test_no_logprobs_of_a_stop_string(parrot):
    stop = " language model of 1.2"         # a token begins here
    [choice] = parrot.client().chat.completions.create(
        model="model", messages=user(QUESTION), temperature=0, logprobs=True, stop=stop).choices
    data = bytes(byte for entry in choice.logprobs.content for byte in entry.bytes)
    assert data.decode() == ANSWER[:ANSWER.index(stop)]


@pytest.mark.parametrize("logprob", [-np.inf, -1e30])
def test_logprobs_that_json_cannot_hold(stub, logprob):
    stub.llm.engine.model.logprob = logprob
    answer = stub.complete(prompt=[1], max_tokens=2, logprobs=0)
    assert set(answer["choices"][0]["logprobs"]["token_logprobs"]) == {-9999.0}


def test_an_error_of_the_model(stub):
    """Logits that are NaN end a request with an error, whole or streamed."""
    stub.llm.engine.model.logprob = np.nan
    with pytest.raises(openai.InternalServerError, match="NaN"):
        stub.client().completions.create(model="model", prompt=[1])
    with pytest.raises(openai.APIError, match="NaN"):
        list(stub.client().completions.create(model="model", prompt=[1], stream=True))
    _, _, data = stub.post("/v1/completions", {"prompt": [1], "stream": True})
    assert list(events(data)[0][-1]) == ["error"] and not events(data)[1]


# --------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------
def refusal(running, path, body, status=400, headers=()):
    """The error of a request that must be refused, in OpenAI's shape."""
    got, _, data = running.post(path, body, headers)
    assert got == status, data
    assert len(data) <= 1024
    value = json.loads(data)
    assert list(value) == ["error"] and list(value["error"]) == ["message", "type", "param", "code"]
    assert value["error"]["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert "\n" not in value["error"]["message"]
    return value["error"]


@pytest.mark.parametrize("param, body", [
    ("prompt", {"prompt": ""}), ("prompt", {"prompt": []}), ("prompt", {"prompt": [""]}),
    ("prompt", {"prompt": [[]]}), ("prompt", {"prompt": None}), ("prompt", {"prompt": [[1], ""]}),
    ("prompt", {"prompt": [2048]}), ("prompt", {"prompt": [-1]}), ("prompt", {"prompt": [1.5]}),
    ("prompt", {"prompt": [2**70]}), ("prompt", {"prompt": {"a": 1}}), ("prompt", {"prompt": [1, "a"]}),
    ("prompt", {"prompt": "\ud83e"}), ("n", {"prompt": [[1]] * 100, "n": 3}), ("n", {"n": 257}),
    ("max_tokens", {"max_tokens": 0}), ("max_completion_tokens", {"max_completion_tokens": 1.5}),
    ("temperature", {"temperature": 2.1}), ("top_p", {"top_p": 0}), ("top_k", {"top_k": -2}),
    ("seed", {"seed": 2**70}), ("seed", {"seed": 1.0}), ("min_p", {"min_p": 2}),
    ("frequency_penalty", {"frequency_penalty": 3}), ("presence_penalty", {"presence_penalty": "1"}),
    ("repetition_penalty", {"repetition_penalty": 0}), ("min_tokens", {"min_tokens": 99, "max_tokens": 9}),
    ("logit_bias", {"logit_bias": {"5": 101}}), ("logit_bias", {"logit_bias": {"x": 1}}),
    ("logit_bias", {"logit_bias": {str(2**70): 1}}), ("logit_bias", {"logit_bias": [1]}),
    ("stop", {"stop": ["a"] * 17}), ("stop", {"stop": "a" * 257}), ("stop", {"stop": [""]}),
    ("stop", {"stop": {"a": 1}}), ("stop_token_ids", {"stop_token_ids": [2**70]}),
    ("logprobs", {"logprobs": 21}), ("logprobs", {"logprobs": True}),
    ("echo", {"echo": 1}), ("logprobs", {"echo": True, "logprobs": 21}),
    ("max_tokens", {"echo": False, "max_tokens": 0}), ("max_tokens", {"echo": True, "max_tokens": -1}),
    ("skip_special_tokens", {"skip_special_tokens": False}), ("stream", {"stream": "true"}),
    ("stream_options", {"stream_options": {"include_usage": True}}), ("suffix", {"suffix": "x"}),
    ("best_of", {"best_of": 2}), ("tools", {"tools": [{"type": "function"}]}),
    ("cache_salt", {"cache_salt": "x"}), ("tool_choice", {"tool_choice": "required"}),
    ("response_format", {"response_format": {"type": "regex"}}), ("model", {"model": 5}),
    ("response_format", {"response_format": {}}), ("response_format", {"response_format": "json_object"}),
    ("response_format", {"response_format": {"type": "json_schema"}}),
    ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"schema": "{}"}}}),
    ("prompt_logprobs", {"prompt_logprobs": 1})])
def test_bad_fields(stub, param, body):
    error = refusal(stub, "/v1/completions", {"prompt": [1]} | body)
    assert error["param"] == param


@pytest.mark.parametrize("param, body", [
    ("messages", {"messages": []}), ("messages", {"messages": "Hi"}), ("messages", {"messages": [5]}),
    ("messages", {"messages": None}), ("messages", {"messages": user("\ud83e")}),
    ("messages", {"messages": [{"role": "user", "content": 5}]}),
    ("messages[1].content", {"messages": [*user("Look"), {"role": "user", "content": [
        {"type": "text", "text": "at"}, {"type": "image_url", "image_url": {"url": "data:,"}}]}]}),
    ("top_logprobs", {"top_logprobs": 2}), ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("logprobs", {"logprobs": 1}), ("echo", {"echo": True}), ("functions", {"functions": [{"name": "f"}]}),
    ("audio", {"audio": {"voice": "x"}}), ("modalities", {"modalities": ["audio"]}),
    ("max_tokens", {"max_tokens": 0}), ("parallel_tool_calls", {"parallel_tool_calls": 0}),
    ("skip_special_tokens", {"skip_special_tokens": False})])
def test_bad_fields_of_a_chat(stub, param, body):
    assert refusal(stub, "/v1/chat/completions", {"messages": user("Hi")} | body)["param"] == param


@pytest.mark.parametrize("body", [
    b"", b"{", b"nonsense", b"[1]", b"5", b'"text"', b"\xff\xfe", b'{"prompt": "\xff"}',
    b'{"temperature": NaN}', b'{"temperature": Infinity}', b"[" * 100_000, b'{"a":' * 100_000,
    b'{"seed": ' + b"1" * 5000 + b"}",
    b'{"prompt": "\\ud83e"}', b'{"prompt": [1], "temperature": 1e999}',
    b'{"prompt": [1], "of_the_future": -1e999}'])
def test_bodies_that_are_no_request(stub, body):
    """Each is refused, and the next request is answered."""
    for path in "/v1/completions", "/tokenize":
        if path == "/tokenize" and b"prompt" in body and b"temperature" in body:
            continue
        refusal(stub, path, body)
    stub.complete(prompt=[1], max_tokens=1)


def test_values_of_many_levels(stub):
    """Whether a value is too deep to be read, or to be shown, or neither: 400."""
    for depth in range(10, 1100, 11):
        for field in "stream", "temperature", "prompt", "tools":
            data = f'{{"prompt": [1], "{field}": {"[" * depth}{"]" * depth}}}'
            refusal(stub, "/v1/completions", data.encode())


def test_every_field_with_every_value():
    """No value of any field makes the server fail, and no error is long."""
    deep = []
    for _ in range(500):
        deep = [deep]
    values = [None, "", "1", -1, 0, 2**70, 1e308, [], {}, [None], {"a": {}}, deep, "x" * 5000, True]
    fields = [*completions.SAMPLING_FIELDS, *completions.NEUTRAL_VALUES, *completions.NEUTRAL_CHAT_VALUES,
              "model", "n", "stream", "stream_options", "max_tokens", "max_completion_tokens", "logprobs",
              "top_logprobs", "echo", "user", "prompt", "messages", "response_format", "chat_template_kwargs"]
    statuses = set()
    with running(stub_llm(num_blocks=8)) as it:         # answers are short
        connection = http.client.HTTPConnection("127.0.0.1", it.port, timeout=30)
        paths = ["/v1/completions", "/v1/chat/completions"]
        for field, value, path in itertools.product(fields, values, paths):
            body = {"prompt": [1], "messages": user("Hi"), "max_completion_tokens": 1, field: value}
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
            statuses.add(response.status)
            assert response.status in (200, 400, 404), (field, value, data)
            assert response.status == 200 or (len(data) <= 1024 and json.loads(data)["error"]["message"])
        connection.close()
    assert statuses == {200, 400, 404}


def test_prompts_that_are_too_long(parrot):
    """Both numbers are in the message. Nobody waits for the tokens of a text that cannot fit."""
    for prompt in [7] * 5000, "abc " * 5000, "x" * 10**6:
        error = refusal(parrot, "/v1/completions", {"prompt": prompt})
        assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
        assert "this model's maximum context length is 4096 tokens" in error["message"]     # LiteLLM's sign
        assert re.search(r"got \d{4,} (tokens|characters)$", error["message"])
    error = refusal(parrot, "/v1/chat/completions", {"messages": user("abc " * 5000)})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


def test_openai_sees_our_sentences(stub):
    client = stub.client()
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="model", prompt="")
    assert "none of them empty" in error.value.message and error.value.param == "prompt"
    with pytest.raises(openai.NotFoundError, match="POST /v1/chat/completions"):
        client.responses.create(model="model", input="Hi")
    with pytest.raises(openai.NotFoundError, match="expected one of"):
        client.embeddings.create(model="model", input="Hi")


def test_paths_and_methods(stub):
    for method, path, status in [("GET", "/v1/nothing", 404),
                                 ("DELETE", "/v1/models", 405),
                                 ("GET", "/v1/completions", 405), ("POST", "/health", 405),
                                 ("GET", "/v1/models/", 404), ("OPTIONS", "/v1/completions", 405),
                                 ("GET", "/%0a" + "x" * 5000, 404)]:
        got, headers, data = stub.request(method, path)
        assert got == status and len(data) <= 1024
        assert json.loads(data)["error"]["type"] == "invalid_request_error"
        assert headers["content-type"] == "application/json"
        if status == 405:
            assert headers["allow"]
    assert json.loads(stub.request("GET", "/version")[2]) == {"version": server.__version__}


def test_a_body_of_another_type(stub):
    for kind in "text/plain", "application/x-www-form-urlencoded", "":
        refusal(stub, "/v1/completions", {"prompt": [1]}, 415, {"Content-Type": kind})
    kind = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert stub.post("/v1/completions", {"prompt": [1], "max_tokens": 1}, kind)[0] == 200


# --------------------------------------------------------------------------------------------------
# Who may ask
# --------------------------------------------------------------------------------------------------
def basic(text):
    """The header of a browser whose user has typed NAME and PASSWORD. text: NAME:PASSWORD"""
    return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}


def test_api_key():
    """Without the key 401 on every route but /health. A program is told to send Bearer, a browser is told
    to ask its user."""
    with running(stub_llm(), api_key="s3cr\xe9t") as it:
        bad = [{}, basic("s3cr\xe9t"), basic(":wrong"), basic("s3cr\xe9t:")]
        bad += [{"Authorization": text} for text in (
            "Bearer", "Bearer wrong", "s3cr\xe9t", "Basic s3cr\xe9t", "Basic x",
            "Bearer s3cr\xe9t".encode() + b"\xe9")]
        for route, headers in itertools.product(it.app.routes, bad):
            path = route.path.replace("{name:path}", "model")
            for method in route.methods:
                status, answer, data = it.request(method, path, b"{}", headers)
                if path == "/health":
                    assert status == 200
                    continue
                assert status == 401 and answer["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    assert json.loads(data)["error"]["code"] == "invalid_api_key"
        assert {"/", "/debug/pool"} < {route.path for route in it.app.routes}
        browser = {"Accept": "text/html,*/*;q=0.8"}
        status, answer, _ = it.request("GET", "/", headers=browser)
        assert (status, answer["www-authenticate"]) == (401, 'Basic realm="tiny-vLLM"')
        for headers in basic(":s3cr\xe9t"), basic("anyone:s3cr\xe9t"), {
                "Authorization": "Bearer s3cr\xe9t".encode()}:
            assert it.request("GET", "/", headers=browser | headers)[0] == 200
            assert it.post("/v1/completions", {"prompt": [1], "max_tokens": 1}, headers)[0] == 200
        with pytest.raises(openai.AuthenticationError):
            it.client().models.list()
    with running(stub_llm(), api_key="s3cret:x") as it:
        good = openai.OpenAI(base_url=it.url, api_key="s3cret:x", max_retries=0)
        assert good.completions.create(model="model", prompt=[1], max_tokens=1).choices
        assert it.request("GET", "/", headers=basic("anyone:s3cret:x"))[0] == 200


def test_foreign_hosts_and_origins(stub):
    """A server on loopback answers to its own names only. CORS headers come only if asked for."""
    origin = {"Origin": "https://evil.example"}
    _, headers, _ = stub.request("GET", "/v1/models", headers=origin)
    assert not any(name.lower().startswith("access-control") for name in headers)
    with running(stub_llm(), hosts=("localhost", "127.0.0.1", "[::1]"), api_key="key",
                 allow_origins=["https://good.example"]) as it:
        key = {"Authorization": "Bearer key"}
        for host, status in [("evil.example", 403), ("evil.example:80", 403), ("localhost", 200),
                             ("LOCALHOST:5", 200), ("127.0.0.1:80", 200), ("[::1]:80", 200)]:
            got, _, data = it.request("GET", "/v1/models", headers={"Host": host} | key)
            assert got == status and len(data) <= 1024
        for name, allowed in ("https://good.example", "https://good.example"), ("https://evil.example", None):
            preflight = {"Origin": name, "Access-Control-Request-Method": "POST",
                         "Access-Control-Request-Headers": "authorization,content-type"}
            status, headers, _ = it.request("OPTIONS", "/v1/chat/completions", headers=preflight)
            assert (status == 200) == bool(allowed) and headers["access-control-allow-origin"] == allowed
            assert headers["access-control-allow-credentials"] is None      # a browser sends no key along
            _, headers, _ = it.request("GET", "/v1/models", headers={"Origin": name} | key)
            assert headers["access-control-allow-origin"] == allowed


def test_request_ids(stub):
    for given, is_kept in [("abc-1.2_3", True), ("x" * 64, True), ("x" * 65, False), ("a b", False),
                           ("", False)]:
        _, headers, _ = stub.request("GET", "/health", headers={"X-Request-ID": given})
        assert (headers["x-request-id"] == given) == is_kept
        assert re.fullmatch("[A-Za-z0-9._-]{1,64}", headers["x-request-id"])


# --------------------------------------------------------------------------------------------------
# Broken clients
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def guarded():
    """A server with every option that stands between a client and the app."""
    with running(stub_llm(), api_key="key", allow_origins=["*"], hosts=("localhost",)) as it:
        it.llm.engine.model.pause = 0.001
        yield it


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("is_reset", [True, False])
def test_clients_that_go_away(guarded, is_stream, is_reset):
    """Pages are free again soon after a client has gone, while it decodes."""
    clients = [guarded.connect() for _ in range(8)]
    for client in clients:
        send_post(client, {"prompt": [1, 2, 3], "max_tokens": 100_000, "stream": is_stream, "n": 2},
                  b"Authorization: Bearer key\r\nOrigin: https://good.example\r\n")
    wait_for(lambda: len(guarded.llm.engine.scheduler.running) == 16)
    before = guarded.service.metrics.reasons["abort"]
    for client in clients:
        hang_up(client, is_reset)
    wait_for(guarded.is_idle)
    assert guarded.service.metrics.reasons["abort"] == before + 16


def test_clients_that_go_away_early(stub):
    """In the queue, in prefill, and while the body comes: such a request never gets a token."""
    llm = stub.llm
    llm.engine.model.pause = 0.02
    before = stub.service.metrics.counts["generation_tokens"]
    runners = [threading.Thread(target=stub.complete, kwargs=dict(prompt=[i], max_tokens=40))
               for i in range(64)]
    for runner in runners:
        runner.start()
    wait_for(lambda: len(llm.engine.scheduler.running) == 64)
    queued = [stub.connect() for _ in range(4)]
    for number, client in enumerate(queued):
        send_post(client, {"prompt": [9], "max_tokens": 50, "stream": number % 2 == 0})
    wait_for(lambda: len(llm.engine.scheduler.waiting) == 4)
    for number, client in enumerate(queued):
        hang_up(client, number % 2 == 0)
    wait_for(lambda: not llm.engine.scheduler.waiting)
    assert len(llm.engine.scheduler.running) == 64
    for runner in runners:
        runner.join()
    wait_for(stub.is_idle)
    assert stub.service.metrics.counts["generation_tokens"] - before == 64 * 40

    with stub.connect() as client:
        send_post(client, {"prompt": list(range(2000)) * 20, "max_tokens": 5})
        wait_for(lambda: llm.engine.scheduler.running)
    wait_for(stub.is_idle)
    with stub.connect() as client:
        client.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
    assert stub.service.metrics.counts["generation_tokens"] - before == 64 * 40
    stub.complete(prompt=[1], max_tokens=1)


def test_killed_clients_disturb_nobody(stub):
    """50 among 256 clients vanish in mid-stream. The other answers are exact."""
    stub.llm.engine.model.pause = 0.002

    async def client(number, is_killed):
        reader, writer = await asyncio.open_connection("127.0.0.1", stub.port)
        body = json.dumps({"prompt": [number], "seed": number, "max_tokens": 60, "stream": True}).encode()
        writer.write(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        if is_killed:
            await reader.readuntil(b"data: ")
            writer.transport.abort()
            return None
        data = await reader.read()
        writer.close()
        lines = [line.removeprefix(b"data: ") for line in data.splitlines() if line.startswith(b"data: {")]
        return "".join(json.loads(line)["choices"][0]["text"] for line in lines)

    async def all_clients():
        return await asyncio.gather(*(client(number, number % 5 == 0) for number in range(256)))
    texts = asyncio.run(all_clients())
    for number, text in enumerate(texts):
        if number % 5:
            assert text == stub_answer([number], seed=number, max_tokens=60)[0]
    wait_for(stub.is_idle)


def test_a_reader_that_reads_nothing(monkeypatch):
    """It is cut off in the end. In the meantime nothing piles up, and another client is served."""
    monkeypatch.setattr(server, "WRITE_SECONDS", 0.5)
    with running(stub_llm()) as it, it.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        send_post(client, {"prompt": [3], "max_tokens": 100_000, "n": 64, "stream": True})
        wait_for(lambda: it.llm.engine.scheduler.running)
        it.complete(prompt=[4], max_tokens=5)
        wait_for(it.is_idle, 60)
        assert it.service.metrics.reasons["abort"] == 64


def test_slow_senders(monkeypatch):
    """A request that does not come in time closes its connection, and others are served meanwhile. An
    idle connection stays."""
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.5)
    with running(stub_llm()) as it:
        idle = http.client.HTTPConnection("127.0.0.1", it.port, timeout=20)
        idle.request("GET", "/health")
        assert idle.getresponse().read()
        clients = [it.connect() for _ in range(50)]
        length = b"Content-Length: 50\r\n\r\n"
        beginnings = [b"", b"P", HEAD, HEAD + length, HEAD + length + b"{"]
        for number, client in enumerate(clients):
            client.sendall(beginnings[number % len(beginnings)])
        with it.connect() as client:        # a whole request, and the beginning of another
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + beginnings[-1])
            assert read_response(client)[0] == 200 and client.recv(100) == b""
        it.complete(prompt=[1], max_tokens=1)
        for client in clients:
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(100) == b""
            client.close()
        idle.request("GET", "/health")
        assert idle.getresponse().status == 200
        idle.close()
        wait_for(lambda: not it.server.server_state.connections)


def test_garbage(stub):
    """No HTTP, endless headers, two requests at once: an error in OpenAI's shape, or an answer."""
    # One packet, over the limit. A server that closes while more comes in would send RST after its answer.
    endless = b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 20_000
    for data in b"\x16\x03\x01\x02\x00\x01\x00", b"HELLO\r\n\r\n", endless, b"GET / HTTP/1.1\r\n\r\n":
        with stub.connect() as client:
            client.sendall(data)
            status, body = read_response(client)
            assert status == 400 and json.loads(body)["error"]["type"] == "invalid_request_error"
    with stub.connect() as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
        assert read_response(client)[0] == 200
    with stub.connect() as client:              # one large packet, in a head and behind a body
        client.sendall(endless[:17_000] + b"\r\n\r\n")
        assert read_response(client)[0] == 400
    with stub.connect() as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: 123456789\r\n" * 2000)
        assert read_response(client)[0] == 400


def test_an_upgrade_is_not_taken(stub):
    """Java's client asks for HTTP/2 with its first request. The answer comes by HTTP/1.1, in any pieces."""
    data = json.dumps({"prompt": [1], "max_tokens": 2}).encode()
    request = (HEAD + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
               b"Content-Length: %d\r\n\r\n" % len(data) + data)
    for size in len(request), 50:
        with stub.connect() as client:
            for start in range(0, len(request), size):
                client.sendall(request[start:start + size])
                time.sleep(0.002)
            status, body = read_response(client)
            assert status == 200 and json.loads(body)["usage"]["completion_tokens"] == 2


def test_a_client_that_has_asked_twice_goes_away(stub):
    """Two requests on one connection: the pages of the first are free, too."""
    stub.llm.engine.model.pause = 0.002
    before = stub.service.metrics.reasons["abort"]
    with stub.connect() as client:
        send_post(client, {"prompt": [5], "max_tokens": 100_000, "stream": True})
        client.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_for(lambda: stub.llm.engine.scheduler.running)
    wait_for(stub.is_idle)
    assert stub.service.metrics.reasons["abort"] == before + 1


# --------------------------------------------------------------------------------------------------
# Limits
# --------------------------------------------------------------------------------------------------
def test_large_bodies():
    """413, by the length that is announced or by what has come, to a client that still sends too."""
    with running(stub_llm(), max_body=100_000) as it:
        body = {"prompt": [1], "max_tokens": 1, "user": "x" * 99_000}
        assert it.post("/v1/completions", body)[0] == 200
        for size in 101_000, 9 * 2**20:
            error = refusal(it, "/v1/completions", body | {"user": "x" * size}, 413)
            assert error["code"] == "body_too_large" and "100000" in error["message"]
        with pytest.raises(openai.APIStatusError, match="--max-body") as error:
            it.client().completions.create(model="model", prompt="x" * 200_000)
        assert error.value.status_code == 413
        parts = (b"x" * 1000 for _ in range(2000))
        connection = http.client.HTTPConnection("127.0.0.1", it.port, timeout=20)
        connection.request("POST", "/v1/completions", parts, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 413
        connection.close()
        with it.connect() as client:        # announced, but not sent without an answer
            client.sendall(HEAD + b"Content-Length: 999999\r\nExpect: 100-continue\r\n\r\n")
            assert read_response(client)[0] == 413
        assert it.post("/v1/completions", body)[0] == 200


def test_a_full_queue():
    """Of five sequences one runs and four may wait. The sixth is refused, and may come again."""
    with running(stub_llm(max_seqs=1), max_waiting=4) as it:
        it.llm.engine.model.pause = 0.02
        first = threading.Thread(target=it.complete, kwargs=dict(prompt=[1], max_tokens=60))
        first.start()
        wait_for(lambda: it.service.load[0])
        second = threading.Thread(target=it.complete, kwargs=dict(prompt=[[1], [2]], n=2, max_tokens=2))
        second.start()
        wait_for(lambda: len(it.llm.engine.scheduler.waiting) == 4)
        error = refusal(it, "/v1/completions", {"prompt": [1]}, 503)
        assert error["code"] == "overloaded"
        assert it.post("/v1/completions", {"prompt": [1]})[1]["retry-after"] == "1"
        assert it.request("GET", "/health")[0] == 200
        first.join()
        second.join()
        it.complete(prompt=[1], max_tokens=1)
        it.complete(prompt=[1], max_tokens=1, n=4)
        error = refusal(it, "/v1/completions", {"prompt": [1], "n": 5})         # no later time would help
        assert error["param"] == "n" and "expected 4 or less answers" in error["message"]


def test_health(stub):
    """A server that drains is not healthy."""
    assert stub.request("GET", "/health")[0] == 200
    stub.service.is_draining = True
    stub.server.deadline = float("inf")
    stub.server.service = SimpleNamespace(is_draining=False, error=None, look_for_silence=lambda: None)
    try:
        assert stub.request("GET", "/health")[0] == 503
        assert refusal(stub, "/v1/completions", {"prompt": [1]}, 503)["code"] == "shutting_down"
    finally:
        stub.service.is_draining = False
        stub.server.service = stub.service


def test_a_step_that_hangs(monkeypatch):
    """Streams get an error, and the server ends."""
    monkeypatch.setattr(server, "STUCK_SECONDS", 0.3)
    with running(stub_llm()) as it:
        it.llm.engine.model.pause = 1.5
        stream = it.client().completions.create(model="model", prompt=[1], stream=True)
        with pytest.raises(openai.APIError, match="the engine has failed"):
            list(stream)
        assert "no step has ended" in it.service.error
        it.thread.join(20)
        assert not it.thread.is_alive()


# --------------------------------------------------------------------------------------------------
# Metrics and log
# --------------------------------------------------------------------------------------------------
def figures(running):
    """{name with labels: value} of /metrics, by Prometheus' own grammar of a line."""
    _, headers, data = running.request("GET", "/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    for line in data.decode().splitlines():
        if not line.startswith("# TYPE vllm:"):
            name, value = re.fullmatch(r'(vllm:\w+\{(?:\w+="[^"]*",?)+\}) (\S+)', line).groups()
            values[name.replace('model_name="model"', "").replace("{}", "").replace("{,", "{")] = float(value)
    return values


def test_metrics():
    """The figures agree with what the clients saw. Odd requests add no line."""
    with running(stub_llm()) as it:
        before = figures(it)
        assert before["vllm:kv_cache_usage_perc"] == 0
        it.complete(prompt=list(range(64)), max_tokens=5)
        it.complete(prompt=[[1, 2], [3] * 40], n=2, max_tokens=7)
        stream(it, "/v1/completions", prompt=list(range(64)), max_tokens=5)
        after = figures(it)
        assert set(after) == set(before)
        assert after["vllm:generation_tokens_total"] == 5 + 28 + 5
        assert after["vllm:prompt_tokens_total"] == 64 + 2 * (2 + 40) + 64
        assert after["vllm:prefix_cache_hits_total"] == 32 + 48
        assert after['vllm:request_success_total{finished_reason="length"}'] == 6
        for name, count in [("time_to_first_token_seconds", 6), ("e2e_request_latency_seconds", 6),
                            ("inter_token_latency_seconds", 38 - 6)]:
            assert after[f"vllm:{name}_count"] == after[f'vllm:{name}_bucket{{le="+Inf"}}'] == count
            buckets = [value for key, value in after.items() if key.startswith(f"vllm:{name}_bucket")]
            assert buckets == sorted(buckets)
        connection = http.client.HTTPConnection("127.0.0.1", it.port)
        for number in range(300):
            connection.request("GET", f"/{number}?x={number}", headers={"X-Request-ID": f"n{number}"})
            connection.getresponse().read()
        connection.close()
        it.post("/v1/completions", {"prompt": [1], "model": "odd", "user": "odd"})
        assert set(figures(it)) == set(before)


def test_the_log(stub, caplog):
    """A line for each answer, with an id and counts, and without text of the client's."""
    caplog.set_level(logging.INFO, "tinyvllm.server")
    _, headers, _ = stub.post("/v1/completions", {"prompt": "a secret", "max_tokens": 3})
    wait_for(lambda: caplog.records)
    [line] = [record.getMessage() for record in caplog.records]
    num_tokens = len(TOKENIZER.encode("a secret"))
    assert re.fullmatch(rf"{headers['x-request-id']} POST /v1/completions 200, {num_tokens} tokens in "
                        r"\(0 cached\), 3 out, \d+\.\d{3} s", line)
    stub.post("/%0aforged%20line", {}, {"X-Request-ID": "forged line"})
    wait_for(lambda: len(caplog.records) == 2)
    line = caplog.records[1].getMessage()
    assert re.fullmatch(r"[0-9a-f]{32} POST /%0Aforged%20line 404, \d\.\d{3} s", line)


# --------------------------------------------------------------------------------------------------
# Processes: signals, exit codes, the command line
# --------------------------------------------------------------------------------------------------
POEM = "Recite Ozymandias."


class Process:
    """A server in a process of its own, with Parrot."""

    def __init__(self, *arguments, program=("server.py",)):
        options = ["--model", "parrot", "--device", "cpu", "--port", "0"]
        command = [sys.executable, *program, *options, *arguments]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.lines = []
        for line in self.process.stderr:
            self.lines.append(line)
            address = re.search(r"parrot at (http://127.0.0.1:\d+/v1)", line)
            if address:
                break
        self.client = openai.OpenAI(base_url=address[1], api_key="key", max_retries=0)

    def poem(self):
        return self.client.chat.completions.create(
            model="parrot", messages=user(POEM), temperature=0, stream=True)

    def end(self):
        """(exit code, the rest of stderr)."""
        _, rest = self.process.communicate(timeout=60)
        return self.process.returncode, rest


def text_of(chunk):
    return chunk.choices[0].delta.content or ""


def test_sigterm_lets_streams_end():
    it = Process("--num-blocks", "600")
    stream = it.poem()
    text = text_of(next(stream))
    os.kill(worker_of(it.process), signal.SIGTERM)          # some send the signal to all processes
    it.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.InternalServerError) as error:
        while True:
            it.client.models.retrieve("parrot")         # answered, as no work
            it.client.completions.create(model="parrot", prompt="Hi", max_tokens=1)
    assert error.value.status_code == 503 and error.value.code == "shutting_down"
    chunks = list(stream)
    assert text + "".join(map(text_of, chunks)) == ANSWERS[POEM]
    assert chunks[-1].choices[0].finish_reason == "stop"
    code, rest = it.end()
    assert code == 0 and "Traceback" not in rest and "Try:" in "".join(it.lines)
    assert "600 pages of 16 tokens, 9,600 in all, room for 2 requests of 4,096 tokens" in "".join(it.lines)


def test_sigterm_with_a_timeout():
    """A stream that does not end in time ends with an error."""
    it = Process("--shutdown-timeout", "0.2")
    stream = it.poem()
    next(stream)
    it.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    code, rest = it.end()
    assert code == 0 and "Traceback" not in rest


def test_two_interrupts():
    it = Process("--shutdown-timeout", "1000")
    stream = it.poem()
    next(stream)
    it.process.send_signal(signal.SIGINT)
    with pytest.raises(openai.InternalServerError):
        while True:
            it.client.completions.create(model="parrot", prompt="Hi", max_tokens=1)
    it.process.send_signal(signal.SIGINT)
    code, rest = it.end()
    assert code == 130 and "Traceback" not in rest


# In place of worker.py
FAILING = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from multiprocessing.connection import Connection
import tinyvllm, worker
step = tinyvllm.Engine.step
def failing(engine):
    if any(len(sequence.output.token_ids) == 5 for sequence in engine.sequences.values()):
        raise RuntimeError("the device is gone")
    return step(engine)
tinyvllm.Engine.step = failing
worker.main(Connection(int(sys.argv[1])))
"""


def test_an_exception_in_a_step(tmp_path):
    """Every stream gets an error, and the process exits with 1."""
    failing = tmp_path / "failing.py"
    failing.write_text(FAILING)
    code = (f"import sys, server, tinyvllm, worker; worker.__file__ = {str(failing)!r}; "
            "tinyvllm.run_program(server.main, sys.argv[1:])")
    it = Process(program=("-c", code))
    streams = [it.poem() for _ in range(2)]
    for stream in streams:
        with pytest.raises(openai.APIError, match="the engine has failed"):
            list(stream)
    code, rest = it.end()
    assert code == 1 and "the device is gone" in rest


def test_a_dead_engine():
    """503 from /health, and to whoever asks."""
    with running(stub_llm()) as it:
        it.llm.engine.step = None           # not to be called
        with pytest.raises(openai.InternalServerError, match="the engine has failed"):
            it.client().completions.create(model="model", prompt=[1])
        assert it.request("GET", "/health")[0] == 503
        it.thread.join(20)                  # the server has ended by itself


def worker_of(process):
    """The process id of a server's worker."""
    [_, pid] = load.with_children(process.pid)
    return pid


def test_a_worker_that_is_killed():
    """Every stream gets an error, and the process exits with 1."""
    it = Process()
    stream = it.poem()
    next(stream)
    os.kill(worker_of(it.process), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="the engine has failed"):
        list(stream)
    code, rest = it.end()
    assert code == 1 and "the worker has ended" in rest


def test_a_rank_that_is_killed():
    """Of two GPUs' processes, one ends while there is nothing to do: the server ends, with a line."""
    it = Process("--tensor-parallel-size", "2")
    answer = it.client.completions.create(model="parrot", prompt="Hi", max_tokens=1)
    assert answer.usage.completion_tokens == 1
    [_, rank] = load.with_children(worker_of(it.process))
    os.kill(rank, signal.SIGKILL)
    code, rest = it.end()
    assert code == 1 and "rank 1 was killed by signal 9" in rest and "Traceback" not in rest


def test_a_server_that_is_killed():
    """The worker ends by itself, also in the middle of an answer."""
    it = Process()
    stream = it.poem()
    next(stream)
    stat = Path(f"/proc/{worker_of(it.process)}/stat")
    it.process.kill()
    it.process.communicate()
    wait_for(lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_worker_that_does_not_start(tmp_path, monkeypatch):
    program = tmp_path / "worker.py"
    program.write_text("")
    monkeypatch.setattr(worker, "__file__", str(program))
    with pytest.raises(TinyVLLMError, match="has ended before the model was loaded"):
        with worker.worker_process(EngineArgs()):
            raise AssertionError


@pytest.mark.parametrize("arguments, message", [
    (["--port", "70000"], "--port: expected a number from 0 to 65535, got 70000"),
    (["--host", "no.such.host.invalid"], "expected a free address"),
    (["--max-waiting", "0"], "--max-waiting"),
    (["--num-blocks", "0"], "--num-blocks: expected a whole number"), (["--nonsense"], "--nonsense"),
    (["--model", "parrot", "--num-blocks", "1", "--max-model-len", "100"], "--num-blocks: expected 7 or")])
def test_mistakes_on_the_command_line(arguments, message):
    done = subprocess.run([sys.executable, "server.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("tinyvllm: ")]
    assert done.returncode == 2 and len(lines) == 1 and message in lines[0] and "Traceback" not in done.stderr


def test_an_address_in_use(stub):
    done = subprocess.run([sys.executable, "server.py", "--port", str(stub.port)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Address already in use" in done.stderr


# --------------------------------------------------------------------------------------------------
# Replicas: what the course's chapter shows, where the router is installed
# --------------------------------------------------------------------------------------------------
CHAPTER = (ROOT / "course" / "15-server.md").read_text("utf-8")
ROUTER = Path(sys.executable).with_name("vllm-router")


def file_of_chapter(name):
    """The block of the chapter whose first line has the file's name."""
    [text] = re.findall(rf"^```\w+\n(# {re.escape(name)}: .*?)^```$", CHAPTER, re.S | re.M)
    return text


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def with_ports(text, ports):
    """The text with other ports in place of 8000, 8001 and 8002."""
    for old, new in zip(("8000", "8001", "8002"), ports):
        assert old in text
        text = re.sub(rf"\b{old}\b", str(new), text)
    return text


@contextlib.contextmanager
def replicas():
    """Two servers, and the port of the router to come."""
    with running(stub_llm()) as first, running(stub_llm()) as second:
        for it in first, second:
            it.llm.engine.model.pause = 0.002
        yield [first, second], [free_port(), first.port, second.port]


@contextlib.contextmanager
def router(command, port, folder):
    """A process that answers at the port after a while."""
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)

    def is_ready():
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            return urlopen(f"http://127.0.0.1:{port}/health").status == 200
    try:
        wait_for(is_ready, 120)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def num_tokens(it):
    return it.service.metrics.counts["generation_tokens"]


def check_streams(port):
    """Asks 32 questions over the router, eight at a time. Every text must be exact."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="key", max_retries=0)

    def ask(number):
        chunks = client.completions.create(model="model", prompt=[number], seed=number, max_tokens=40,
                                           stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks)
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(32)))
    assert texts == [stub_answer([number], seed=number, max_tokens=40)[0] for number in range(32)]


def check_replicas(servers, port):
    """Both replicas have some of the streams. A client that hangs up gives its pages back. What a full
    replica refuses, the other answers."""
    full, other = servers
    check_streams(port)
    assert num_tokens(full) and num_tokens(other) and num_tokens(full) + num_tokens(other) == 32 * 40
    for is_stream in True, False:
        with socket.create_connection(("127.0.0.1", port), 20) as client:
            send_post(client, {"model": "model", "prompt": [1], "max_tokens": 100_000, "stream": is_stream})
            wait_for(lambda: any(it.llm.engine.scheduler.running for it in servers))
        wait_for(lambda: all(it.is_idle() for it in servers))
    assert sum(it.service.metrics.reasons["abort"] for it in servers) == 2
    before = num_tokens(other)
    full.service.num_unfinished += 1024
    check_streams(port)
    full.service.num_unfinished -= 1024
    assert num_tokens(other) == before + 32 * 40


def nginx(ports, folder):
    """The chapter's nginx as a router, at the first of the ports."""
    text = with_ports(file_of_chapter("replicas.conf"), ports)
    paths = "".join(f"{name}_temp_path {folder}/{name};\n"      # the default ones are root's
                    for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    text = text.replace("http {\n", f"http {{\naccess_log off;\n{paths}")
    (folder / "replicas.conf").write_text(text)
    command = ["nginx", "-p", folder, "-c", "replicas.conf", "-e", "stderr",
               "-g", f"daemon off; pid {folder}/pid;"]
    return router(command, ports[0], folder)


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_behind_nginx(tmp_path):
    with replicas() as (servers, ports), nginx(ports, tmp_path):
        check_replicas(servers, ports[0])
        before = num_tokens(servers[0])         # which was full a moment ago
        check_streams(ports[0])
        assert num_tokens(servers[0]) > before


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_nginx_with_a_machine_that_is_off(tmp_path):
    """A replica that never answers a connect: the other replica answers every request."""
    with running(stub_llm()) as server, socket.socket() as off, contextlib.ExitStack() as stack:
        off.bind(("127.0.0.1", 0))
        off.listen(0)
        for _ in range(4):                      # the queue of connections is full: no more get an answer
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(off.getsockname())
        ports = [free_port(), server.port, off.getsockname()[1]]
        with nginx(ports, tmp_path):
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{ports[0]}/v1", api_key="key", max_retries=0)
            for _ in range(2):                  # nginx tries the replicas in turn: one of two waits first
                answer = client.completions.create(model="model", prompt=[1], max_tokens=2)
                assert answer.usage.completion_tokens == 2


@pytest.mark.skipif(not ROUTER.exists(), reason="vllm-router is not installed")
def test_behind_vllm_router(tmp_path):
    with replicas() as (servers, ports):
        [line] = re.findall(r"^vllm-router (.*?)\n```", CHAPTER, re.S | re.M)
        line = with_ports(line, ports).replace("cache_aware", "round_robin")
        options = line.replace("\\\n", " ").split()
        with router([ROUTER, *options, "--prometheus-port", str(free_port())], ports[0], tmp_path):
            check_replicas(servers, ports[0])


RAY = """
import sys
from ray import serve
import replicas
serve.start(http_options={"port": int(sys.argv[1])})
serve.run(replicas.replicas, blocking=True)
"""


@pytest.mark.skipif(not find_spec("ray"), reason="Ray Serve is not installed")
def test_behind_ray_serve(tmp_path):
    """Parrot's texts, streamed, from two replicas without a GPU."""
    text = file_of_chapter("replicas.py")
    assert '"num_gpus": 1' in text
    (tmp_path / "replicas.py").write_text(text.replace('"num_gpus": 1', '"num_cpus": 0.1'))
    port = free_port()
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = ["env", f"PYTHONPATH={path}", "RAY_USAGE_STATS_ENABLED=0", sys.executable, "-c", RAY, str(port)]
    with router(command, port, tmp_path):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="key", max_retries=0)

        def ask(question):
            stream = client.chat.completions.create(
                model="parrot", messages=user(question), temperature=0, stream=True)
            return "".join(map(text_of, stream))
        questions = [text["questions"][0] for text in TEXTS if len(text["answer"]) == 1][:24]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, questions)) == [ANSWERS[question] for question in questions]
        figures = {urlopen(f"http://127.0.0.1:{port}/metrics").read() for _ in range(40)}
        made = [float(re.search(rb"generation_tokens_total\{.*\} (\S+)", text)[1]) for text in figures]
        assert len(made) == 2 and all(made)
