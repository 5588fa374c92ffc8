#!/usr/bin/env python3
"""An OpenAI-compatible server, on Starlette and uvicorn.

    python server.py            then point any client of OpenAI's API at http://127.0.0.1:8000/v1

The life of a request:
  1. The event loop, in the main thread, reads the request and checks its fields: class Call.
  2. A helper thread encodes the prompt. A long prompt takes a third of a second, and neither the
     event loop nor the engine may wait for it.
  3. The engine thread takes the sequences from an inbox, and steps the engine: class Service. After
     each step it hands the news to the event loop, all sequences in one callback. The news are
     snapshots (Progress) that no later step changes.
  4. The event loop sends the text that is new since it sent last. There is no queue of tokens: a
     client that reads slowly gets fewer and larger chunks, and costs no memory.
A client that goes away gives its request up, at whatever point, and the next step frees the pages.

Sections: Errors, Requests and answers, Engine thread, Metrics, Page, App, Process.
What is not supported is refused with the name of the field, and never ignored in silence.
"""
import asyncio
import bisect
import contextlib
import hmac
import ipaddress
import itertools
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections import Counter, deque, namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import quote
from weakref import WeakKeyDictionary

try:
    import h11
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"tinyvllm: expected the Python package {error.name}, found none: ./run.sh installs all "
             "packages into .venv, then use .venv/bin/python")

from device import FOLDER, TinyVLLMError, check, first_line, is_int, is_number, shown
from sampling import SamplingParams
from tinyvllm import ArgumentParser, EngineArgs, __version__, open_llm, run_program
from tokenizer import StreamDecoder, TokenizerError
from views import Recorder, picture
from weights import HUB_MODEL

MEBIBYTE = 2**20
MAX_CHOICES = 256               # sequences of one HTTP request
REQUEST_SECONDS = 10            # for a whole request to come in, and a second more for each MiB
WRITE_SECONDS = 60              # for a client to read anything at all
PING_SECONDS = 15               # a stream without text for so long shows that it is alive
LINGER_SECONDS = 1              # of silence, until the rest of a refused body counts as sent
STUCK_SECONDS = 60              # a step that takes longer has failed
STOP_SECONDS = 10               # for the last step to end
LOGGER = logging.getLogger("tinyvllm.server")


# --------------------------------------------------------------------------------------------------
# Errors: one shape for all, that of OpenAI
# --------------------------------------------------------------------------------------------------
class RequestError(Exception):
    """An answer with an error's status. param: the field at fault; code: a word for programs."""

    def __init__(self, message, status=400, param=None, code=None):
        line = " ".join(str(message).split()).encode("utf-8", "replace")[:700]
        super().__init__(line.decode("utf-8", "ignore"))
        self.status = status
        self.param = param
        self.code = code

    @property
    def body(self):
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self):
        headers = {401: {"WWW-Authenticate": "Bearer"}, 413: {"Connection": "close"},
                   503: {"Retry-After": "1"}}.get(self.status)
        kind = TooLarge if self.status == 413 else Response
        return kind(to_json(self.body), self.status, headers, "application/json")


JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def to_json(value):
    """JSON as bytes. Half of a surrogate pair, which UTF-8 cannot hold, becomes "?"."""
    return JSON.encode(value).encode("utf-8", "replace")


def json_response(value):
    return Response(to_json(value), media_type="application/json")


def want(name, value, is_good, expected):
    """The value. Raises RequestError with the field's name for a bad one."""
    try:
        return check(name, value, is_good, expected)
    except TinyVLLMError as error:
        raise RequestError(error, param=name) from None


class TooLarge(Response):
    """The 413 for a body over the limit: sent at once. Then the rest of the body is read and dropped: a
    client that is still sending would see a broken connection, and no answer."""

    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(asyncio.TimeoutError):
            while (await asyncio.wait_for(receive(), LINGER_SECONDS)).get("more_body"):
                pass
        await send({"type": "http.response.body"})


# --------------------------------------------------------------------------------------------------
# Requests and answers: from the fields of a JSON object to SamplingParams and token ids, and back
# --------------------------------------------------------------------------------------------------
# Fields that SamplingParams has too. Where the server knows no more, SamplingParams checks them.
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
                   "repetition_penalty", "logit_bias", "seed", "min_tokens", "ignore_eos", "stop",
                   "stop_token_ids")
# Fields that would change an answer and are not supported, and the values that ask for nothing.
NEUTRAL_VALUES = {
    "response_format": (None, {"type": "text"}), "structured_outputs": (None,),
    "guided_json": (None,), "guided_regex": (None,), "guided_choice": (None,), "guided_grammar": (None,),
    "tools": (None, []), "tool_choice": (None, "none", "auto"),
    "functions": (None, []), "function_call": (None, "none", "auto"),
    "modalities": (None, [], ["text"]), "audio": (None,), "web_search_options": (None,),
    "prediction": (None,), "best_of": (None, 1), "suffix": (None, ""), "use_beam_search": (None, False),
    "prompt_logprobs": (None,), "include_stop_str_in_output": (None, False),
    "return_token_ids": (None, False), "cache_salt": (None,), "truncate_prompt_tokens": (None,),
    "bad_words": (None, []), "allowed_token_ids": (None,)}
NEUTRAL_CHAT_VALUES = {
    "echo": (None, False), "add_special_tokens": (None, False), "add_generation_prompt": (None, True),
    "continue_final_message": (None, False), "chat_template": (None,), "chat_template_kwargs": (None, {}),
    "documents": (None, [])}


def is_stop(value):
    """Whether the value is a stop string or a list of them."""
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and len(texts) <= 16 and all(
        isinstance(text, str) and 1 <= len(text) <= 256 for text in texts)


async def read_json(request, limit):
    """The JSON object in a request's body. Raises RequestError for anything else."""
    kind = request.headers.get("content-type", "none").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"Content-Type: expected application/json, got {shown(kind)}", 415)
    body = bytearray()
    too_large = RequestError(f"the body: expected {limit} bytes or less: shorten the prompt, or start the "
                             "server with a larger --max-body", 413, code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise too_large

    def refuse(name):
        raise ValueError(f"{name} is no JSON")
    try:
        value = json.loads(body, parse_constant=refuse)
    except ValueError as error:             # no JSON, no UTF-8, a number of 5,000 digits
        raise RequestError(f"the body: expected JSON, got {len(body)} bytes that are none "
                           f"({first_line(error):.100})") from None
    return want("the body", value, lambda value: isinstance(value, dict), "a JSON object")


def flag(body, name, default=False):
    """A boolean field; null is the default."""
    value = body.get(name)
    return default if value is None else want(name, value, lambda v: isinstance(v, bool), "true or false")


def texts_of(messages):
    """All texts of a chat, whose contents are texts or lists of parts."""
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        parts = content if isinstance(content, list) else [content]
        for part in parts:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text


def encode_chat(llm, body):
    """The token ids of a chat."""
    messages = want("messages", body.get("messages"), lambda m: isinstance(m, list) and m,
                    "a list of one message or more")
    return encoded(llm, "".join(texts_of(messages)), lambda _: llm.tokenizer.chat(messages), "messages")


def encode_text(llm, prompt, add_bos):
    """The token ids of a prompt, which is a text or ids already."""
    want("prompt", prompt, lambda p: isinstance(p, (str, list)) and p,
         "a text, a list of token ids, or a list of several, none of them empty")
    if isinstance(prompt, list):
        return encoded(llm, "", lambda _: prompt, "prompt")
    return encoded(llm, prompt, lambda text: llm.tokenizer.encode(text, add_bos), "prompt")


def encoded(llm, text, encode, param):
    """The ids of encode(text), if they fit into the context. Runs in a thread of its own."""
    def too_long(got):
        # Clients know the error by this phrase, or by its code.
        return RequestError(f"{param}: expected less, since this model's maximum context length is "
                            f"{llm.max_model_len} tokens, got {got}", param=param,
                            code="context_length_exceeded")
    try:
        llm.check_length(text)
    except TinyVLLMError:
        raise too_long(f"{len(text)} characters") from None
    try:
        ids = encode(text)
    except TokenizerError as error:
        raise RequestError(error, param=param) from None
    if len(ids) >= llm.max_model_len:
        raise too_long(f"{len(ids)} tokens")
    return ids


async def disconnection(receive):
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Call:
    """A request for completions, and its response: the fields, and the choices, which are the answers."""

    def __init__(self, service, body):
        """Checks all fields but the prompt. Raises RequestError."""
        self.service = service
        self.body = body
        self.start = time.perf_counter()
        self.created = int(time.time())
        self.id = self.prefix + os.urandom(16).hex()
        self.model = service.model_name(body.get("model"))
        self.refuse_unsupported()
        self.is_stream = flag(body, "stream")
        options = want("stream_options", body.get("stream_options"), lambda options: options is None or (
            isinstance(options, dict) and self.is_stream), "an object, and only with stream") or {}
        self.has_usage = flag(options, "include_usage")
        self.has_running_usage = flag(options, "continuous_usage_stats")
        n = body.get("n")
        self.n = 1 if n is None else want("n", n, lambda n: is_int(n, 1, MAX_CHOICES),
                                          f"a whole number from 1 to {MAX_CHOICES}")
        self.prompts = self.read_prompts()
        self.num_choices = len(self.prompts) * self.n
        if self.num_choices > MAX_CHOICES:
            raise RequestError(f"n: expected {MAX_CHOICES} or less answers of one request, got "
                               f"{len(self.prompts)} prompts * {self.n}", param="n")
        self.params = self.read_params()
        self.event_head = JSON.encode(self.head(self.chunk_kind)).removesuffix("}")
        self.choices = []
        self.news = asyncio.Event()     # set when a choice has made progress
        self.num_sends = 0              # of chunks
        self.num_sends_seen = 0         # by look_for_silence
        self.is_quiet = False           # a stream that must show that it is alive

    def refuse_unsupported(self):
        """Raises RequestError for a field that asks for what the server cannot do."""
        for name, values in (NEUTRAL_VALUES | self.neutral_values).items():
            value = self.body.get(name)
            if value not in values:
                raise RequestError(f"{name}: expected nothing, since this server does not support it, got "
                                   f"{shown(value)}: leave the field out", param=name)

    def read_params(self):
        """SamplingParams of the request. What the request leaves out is as generation_config.json says."""
        llm = self.service.llm
        given = {name: self.body[name] for name in SAMPLING_FIELDS if self.body.get(name) is not None}

        def look(name, is_good, expected):
            if name in given:
                want(name, given[name], is_good, expected)

        def is_token(token):
            return is_int(token, 0, llm.config.vocab_size - 1)
        look("temperature", lambda t: is_number(t, 0, 2), "a number from 0 to 2")
        look("seed", lambda s: is_int(s, -2**63, 2**64 - 1), "a whole number of 64 bits")
        look("stop", is_stop, "a text of 1 to 256 characters, or a list of 16 such texts or less")
        look("stop_token_ids", lambda ids: isinstance(ids, list) and len(ids) <= 1024 and all(
            map(is_token, ids)), "a list of 1,024 token ids or less")
        look("logit_bias", lambda biases: len(biases) <= 1024 and all(
            is_token(int(token)) for token in biases.keys()), "an object {token id: number} of 1,024 or less")
        if "seed" in given:
            given["seed"] %= 2**64
        if "logit_bias" in given:
            given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
        given["max_tokens"] = self.read_max_tokens()
        given["logprobs"] = self.read_logprobs()
        try:
            return llm.copied(SamplingParams(**({"temperature": 1.0} | llm.default_sampling | given)))
        except TinyVLLMError as error:
            raise RequestError(error, param=str(error).partition(":")[0]) from None

    def read_max_tokens(self):
        for name in "max_completion_tokens", "max_tokens":
            if self.body.get(name) is not None:
                return want(name, self.body[name], is_int, "a whole number of 1 or more")
        return self.default_max_tokens

    def read_count(self, name):
        """The number of most probable tokens to report; None if none is asked for."""
        count = self.body.get(name)
        return want(name, count, lambda n: n is None or is_int(n, 0, 20), "a whole number from 0 to 20")

    def prepare(self):
        """Encodes the prompts, and makes the choices: for each prompt n, with seeds one after another."""
        llm = self.service.llm
        for prompt in self.prompts:
            ids = self.encode(prompt)
            for i in range(self.n):
                params = self.params
                if self.n > 1 and params.seed is not None:
                    params = replace(params, seed=(params.seed + i) % 2**64)
                sequence = llm.prepare(ids, params)
                if sequence.output.error:
                    raise RequestError(sequence.output.error, param="prompt")
                self.choices.append(Choice(self, len(self.choices), sequence, self.lead(prompt)))
        self.body = self.prompts = None     # a client may have sent megabytes

    @property
    def is_final(self):
        """Whether the engine is done with all choices."""
        return all(choice.progress.reason for choice in self.choices)

    @property
    def is_sent(self):
        return all(choice.has_end for choice in self.choices)

    @property
    def failure(self):
        """Why there is no answer, as a RequestError; None if there is no such reason."""
        if self.service.error:
            return self.service.trouble
        for choice in self.choices:
            if choice.progress.reason == "abort":           # and not by the client, who would not ask
                return RequestError("the server is shutting down", 503, code="shutting_down")
            if choice.progress.reason == "error":
                return RequestError(choice.progress.error, 500)
        return None

    async def __call__(self, scope, receive, send):
        """The response, as an ASGI app. It watches for the client to go away all the while."""
        work = self.stream(send) if self.is_stream else self.send_whole(scope, receive, send)
        work = asyncio.create_task(work)
        gone = asyncio.create_task(disconnection(receive))
        try:
            while not work.done() and not gone.done():
                await asyncio.wait((work, gone), timeout=PING_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                self.look_for_silence()
            if work.done():
                work.result()               # raises what has failed
        finally:
            work.cancel()
            gone.cancel()
            self.service.calls.discard(self)
            self.service.abort(self)

    async def send_whole(self, scope, receive, send):
        """Sends the answer in one piece."""
        while not self.is_final and not self.failure:
            await self.news.wait()
            self.news.clear()
        response = self.failure.response if self.failure else json_response(self.whole())
        await response(scope, receive, send)

    async def stream(self, send):
        """Sends the answer as server-sent events, each time all that is new. An error is the last event,
        without the [DONE] of a whole answer."""
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache",
                   "x-accel-buffering": "no"}
        raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw_headers})
        while not self.failure and not self.is_sent:
            text = self.new_events()
            if not text and self.is_quiet:
                text = ": ping\n\n"
            if text:
                self.is_quiet = False
                self.num_sends += 1
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            else:
                await self.news.wait()
                self.news.clear()
        text = f"data: {JSON.encode(self.failure.body)}\n\n" if self.failure else self.last_events()
        await send({"type": "http.response.body", "body": text.encode()})

    def look_for_silence(self):
        """Called every few seconds: wakes a stream that has sent nothing since the last call."""
        self.is_quiet = self.num_sends == self.num_sends_seen
        self.num_sends_seen = self.num_sends
        if self.is_quiet:
            self.news.set()

    @property
    def usage(self):
        """The tokens of each prompt, once, and of all answers so far."""
        outputs = [choice.output for choice in self.choices[::self.n]]
        lengths = [len(output.prompt_token_ids) for output in outputs]
        # A preempted sequence finds tokens again, so the sum over its admissions could be larger.
        num_cached = sum(min(output.num_cached_tokens, length) for output, length in zip(outputs, lengths))
        num_new = sum(choice.progress.num_tokens for choice in self.choices)
        return {"prompt_tokens": sum(lengths), "completion_tokens": num_new,
                "total_tokens": sum(lengths) + num_new,
                "prompt_tokens_details": {"cached_tokens": num_cached}}

    def head(self, kind):
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "system_fingerprint": f"tiny-vllm-{__version__}"}

    def whole(self):
        """The answer that is not streamed."""
        choices = [choice.whole() for choice in self.choices]
        return self.head(self.kind) | {"choices": choices, "usage": self.usage}

    def event(self, choices, usage):
        """An event of a stream. JSON by hand, since a stream sends one for each token."""
        usage = f',"usage":{usage}' if self.has_usage or self.has_running_usage else ""
        return f'data: {self.event_head},"choices":[{choices}]{usage}}}\n\n'

    def new_events(self):
        """The events for all that is new."""
        usage = JSON.encode(self.usage) if self.has_running_usage else "null"
        return "".join(self.event(f'{{"index":{choice.index},{piece}}}', usage)
                       for choice in self.choices for piece in choice.pieces())

    def last_events(self):
        """The end of a stream."""
        usage = self.event("", JSON.encode(self.usage)) if self.has_usage else ""
        return f"{usage}data: [DONE]\n\n"


class ChatCall(Call):
    """POST /v1/chat/completions"""
    prefix = "chatcmpl-"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    neutral_values = NEUTRAL_CHAT_VALUES
    default_max_tokens = None           # what the context allows

    def read_prompts(self):
        return [self.body]

    def read_logprobs(self):
        count = self.read_count("top_logprobs")
        has_logprobs = flag(self.body, "logprobs")
        if count and not has_logprobs:
            raise RequestError("top_logprobs: expected logprobs: true beside it", param="top_logprobs")
        return (count or 0) if has_logprobs else None

    def encode(self, body):
        return encode_chat(self.service.llm, body)

    def logprobs(self, entries):
        """The log-probabilities of (token, offset, {token: logprob}) entries."""
        def entry(token, logprob):
            data = self.service.llm.tokenizer.token_bytes(token)
            return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}
        count = self.params.logprobs
        content = [entry(token, best[token]) | {"top_logprobs": [
            entry(*pair) for pair in list(best.items())[:count]]} for token, _, best in entries]
        return {"content": content, "refusal": None}

    def lead(self, prompt):
        return ""

    def answer(self, text):
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def opening(self, lead):
        return '"delta":{"role":"assistant","content":""}'

    def piece(self, text):
        return f'"delta":{{"content":{JSON.encode(text)}}}' if text else '"delta":{}'


class TextCall(Call):
    """POST /v1/completions"""
    prefix = "cmpl-"
    kind = "text_completion"
    chunk_kind = "text_completion"
    neutral_values = {}
    default_max_tokens = 16

    def read_prompts(self):
        """The prompts: one text, several, one list of token ids, or several."""
        prompt = self.body.get("prompt")
        self.has_echo = flag(self.body, "echo")
        if self.has_echo and self.body.get("logprobs") is not None:
            raise RequestError("echo: expected false beside logprobs, since this server has no "
                               "log-probabilities of prompts", param="echo")
        self.add_bos = flag(self.body, "add_special_tokens", True)
        is_several = isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list))
        return prompt if is_several else [prompt]

    def read_logprobs(self):
        return self.read_count("logprobs")

    def encode(self, prompt):
        return encode_text(self.service.llm, prompt, self.add_bos)

    def logprobs(self, entries):
        """The log-probabilities of (token, offset, {token: logprob}) entries."""
        def text(token):
            return self.service.llm.tokenizer.token_bytes(token).decode("utf-8", "replace")
        return {"tokens": [text(token) for token, _, _ in entries],
                "token_logprobs": [finite(best[token]) for token, _, best in entries],
                "top_logprobs": [{text(other): finite(logprob) for other, logprob in best.items()}
                                 for _, _, best in entries],
                "text_offset": [offset for _, offset, _ in entries]}

    def lead(self, prompt):
        """What the answer begins with: the prompt's text, if it must."""
        if not self.has_echo:
            return ""
        return prompt if isinstance(prompt, str) else self.service.llm.tokenizer.decode(prompt)

    def answer(self, text):
        return {"text": text}

    def opening(self, lead):
        return self.piece(lead) if lead else None

    def piece(self, text):
        return f'"text":{JSON.encode(text)}'


# What the event loop may know of a sequence: text, number of tokens, finish reason, error. The first
# num_tokens entries of the output's token_ids and logprobs do not change any more either.
Progress = namedtuple("Progress", "text num_tokens reason error")


class Choice:
    """One answer of a call: how far the engine is, and how much of it the client has."""

    def __init__(self, call, index, sequence, lead):
        """lead: the text before the answer's own."""
        self.call = call
        self.index = index
        self.lead = lead
        self.sequence = sequence
        self.output = sequence.output
        self.progress = Progress("", 0, None, None)
        self.last_time = call.start         # of the latest token, for the metrics
        # Sent, or made ready to be sent
        self.has_opening = False
        self.num_characters = 0
        self.has_end = False
        # Tokens whose log-probabilities were reported, and the characters of these tokens
        self.num_tokens = 0
        self.num_token_characters = 0
        self.decoder = StreamDecoder(call.service.llm.tokenizer)

    @property
    def num_ready(self):
        """The number of characters that no stop string can take back: all, or without the longest end
        of the text that begins a stop string."""
        text = self.progress.text
        ready = len(text)
        if self.progress.reason:
            return ready
        for stop in self.call.params.stop:
            start = text.find(stop[0], max(len(text) - len(stop) + 1, 0), ready)
            while start >= 0:
                if stop.startswith(text[start:]):
                    ready = start
                start = text.find(stop[0], start + 1, ready)
        return ready

    @property
    def stop_reason(self):
        """The stop string or token id that ended the answer, as vLLM says it; None for an eos token."""
        if self.progress.reason != "stop":
            return None
        last = self.output.token_ids[-1]
        if last in self.call.params.stop_token_ids:
            return last
        text = self.call.service.llm.tokenizer.decode(self.output.token_ids)
        return next((stop for stop in self.call.params.stop
                     if text.startswith(stop, len(self.progress.text))), None)

    def take_logprobs(self, end):
        """The log-probabilities of tokens that begin before the character `end`, in the endpoint's
        shape; None if none are asked for. No token is taken twice, and none of a stop string at all."""
        if self.call.params.logprobs is None:
            return None
        entries = []
        while self.num_tokens < self.progress.num_tokens and self.num_token_characters < end:
            token = self.output.token_ids[self.num_tokens]
            entries.append((token, self.num_token_characters, self.output.logprobs[self.num_tokens]))
            self.num_token_characters += len(self.decoder.push(token))
            self.num_tokens += 1
        return self.call.logprobs(entries)

    def whole(self):
        """The choice of an answer that is not streamed."""
        progress = self.progress
        return {"index": self.index, **self.call.answer(self.lead + progress.text),
                "logprobs": self.take_logprobs(len(progress.text)), "finish_reason": progress.reason,
                "stop_reason": self.stop_reason}

    def pieces(self):
        """Yields what is new as JSON, the inside of choices of a stream: the opening, with the first
        token; text; the end by itself, as OpenAI does."""
        progress = self.progress
        if not self.has_opening and (progress.num_tokens or progress.reason):
            self.has_opening = True
            opening = self.call.opening(self.lead)
            if opening:
                yield f'{opening},"logprobs":null,"finish_reason":null'
        end = self.num_ready
        if end > self.num_characters:
            piece = self.call.piece(progress.text[self.num_characters:end])
            logprobs = self.take_logprobs(end)
            self.num_characters = end
            yield f'{piece},"logprobs":{JSON.encode(logprobs) if logprobs else "null"},"finish_reason":null'
        if progress.reason and not self.has_end:
            self.has_end = True
            reasons = f'"finish_reason":"{progress.reason}","stop_reason":{JSON.encode(self.stop_reason)}'
            yield f'{self.call.piece("")},"logprobs":null,{reasons}'


def finite(logprob):
    """The log-probability in JSON's numbers, which have no infinity and no NaN."""
    return logprob if logprob > -9999 else -9999.0


# --------------------------------------------------------------------------------------------------
# Engine thread
#
# The thread does nothing but step the engine, so the GPU never waits for HTTP. What the event loop
# wants of the engine comes through an inbox, in order: an abort never overtakes its request.
# --------------------------------------------------------------------------------------------------
class Service:
    """The engine thread, and what the event loop knows of it."""

    def __init__(self, llm, model_names, max_waiting, max_body):
        self.llm = llm
        self.model_names = model_names
        self.max_waiting = max_waiting
        self.max_body = max_body
        self.metrics = Metrics()
        self.started = int(time.time())
        # Of the event loop
        self.loop = None
        self.calls = set()                  # unfinished HTTP requests for answers
        self.num_unfinished = 0             # their sequences that have not ended
        self.is_draining = False            # no new requests: the process is about to end
        self.error = None                   # why the engine thread has died
        # Of both threads
        self.condition = threading.Condition()
        self.inbox = []                     # (function, argument): calls for the engine thread
        self.is_stopped = False
        self.step_began = None              # time.monotonic(); None between steps
        # Of the engine thread
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.choices = {}                   # id(output) -> Choice of all unfinished sequences
        self.news = deque()                 # outputs with a new token or an end: the engine's listener
        self.names = WeakKeyDictionary()    # sequence -> id and index of its answer, for the page

    @contextlib.asynccontextmanager
    async def lifespan(self, app):
        """Runs the engine thread for as long as the app runs."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()
        yield
        await asyncio.to_thread(self.stop)

    def stop(self):
        """Ends the engine thread after its step."""
        with self.condition:
            self.is_stopped = True
            self.condition.notify()
        self.thread.join(STOP_SECONDS)

    def tell_engine(self, function, argument):
        """Calls the function in the engine thread, before the next step."""
        with self.condition:
            self.inbox.append((function, argument))
            self.condition.notify()

    def run(self):
        """The engine thread."""
        engine = self.llm.engine

        def has_work():
            return self.inbox or engine.sequences or engine.in_flight or self.is_stopped
        try:
            while True:
                with self.condition:
                    self.condition.wait_for(has_work)
                    inbox = self.inbox
                    self.inbox = []
                if self.is_stopped:
                    return
                for function, argument in inbox:
                    function(argument)
                if not engine.sequences and not engine.in_flight:
                    continue                # somebody looked at an idle engine
                self.step_began = time.monotonic()
                engine.step()
                self.step_began = None
                self.hand_over()
        except BaseException as error:      # nobody else would notice
            LOGGER.critical("the engine has failed", exc_info=error)
            self.post(self.fail, error)

    def add(self, choices):
        """Queues sequences. In the engine thread."""
        for choice in choices:
            self.choices[id(choice.output)] = choice
            choice.sequence.listeners.append(self.news)
            self.names[choice.sequence] = [choice.call.id, choice.index]
        self.llm.engine.add([choice.sequence for choice in choices])

    def hand_over(self):
        """Gives the news of a step to the event loop, in one callback. In the engine thread."""
        outputs = {}
        while self.news:
            output = self.news.popleft()
            outputs[id(output)] = output
        batch = []
        for key, output in outputs.items():
            choice = self.choices.pop(key) if output.finish_reason else self.choices[key]
            batch.append((choice, Progress(output.text, len(output.token_ids), output.finish_reason,
                                           output.error)))
        if batch:
            self.post(self.deliver, batch, time.perf_counter())

    def post(self, function, *arguments):
        """Calls the function in the event loop, if there still is one."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *arguments)

    def deliver(self, batch, now):
        """Takes the news in. In the event loop, like all methods from here on."""
        self.metrics.add(batch, now)
        for choice, progress in batch:
            choice.progress = progress
            choice.call.news.set()
            if progress.reason:
                self.num_unfinished -= 1

    def fail(self, error):
        """Ends all calls: the engine thread has died."""
        self.error = error
        for call in self.calls:
            call.news.set()

    @property
    def trouble(self):
        """Why no request can be answered, as a RequestError; None if one can."""
        began = self.step_began
        if self.error or (began is not None and time.monotonic() - began > STUCK_SECONDS):
            return RequestError("the engine has failed: the server must be started anew", 503)
        if self.is_draining:
            return RequestError("the server is shutting down: send the request to another, or later", 503,
                                code="shutting_down")
        return None

    def model_name(self, name):
        """The name that the answer gives: as asked for, if it is one of ours."""
        name = self.model_names[0] if name is None else name
        want("model", name, lambda name: isinstance(name, str), "a text")
        if name not in self.model_names:
            raise RequestError(f"model: expected {' or '.join(self.model_names)}, got {shown(name)}", 404,
                               param="model", code="model_not_found")
        return name

    async def submit(self, call):
        """Encodes and queues the call's prompts. Raises RequestError if the queue is full."""
        num_waiting = self.num_unfinished - len(self.llm.engine.scheduler.running)
        if num_waiting + call.num_choices > self.max_waiting:
            raise RequestError(f"overloaded: {num_waiting} requests wait already, of {self.max_waiting} at "
                               "most: try again later", 503, code="overloaded")
        self.num_unfinished += call.num_choices
        self.calls.add(call)
        try:
            await asyncio.to_thread(call.prepare)
        except BaseException:
            self.num_unfinished -= call.num_choices
            self.calls.discard(call)
            raise
        self.tell_engine(self.add, call.choices)

    def abort(self, call):
        """Gives the sequences up that have not ended."""
        if not call.is_final:
            self.tell_engine(self.llm.abort, [choice.output for choice in call.choices])


# --------------------------------------------------------------------------------------------------
# Metrics, in Prometheus' text format and under vLLM's names, so that vLLM's dashboards show them
# --------------------------------------------------------------------------------------------------
BUCKETS = [factor * 10**power for power in range(-3, 3) for factor in (1, 2.5, 5)]      # seconds
HISTOGRAMS = ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds")
REASONS = ("stop", "length", "abort", "error")


class Metrics:
    """Counters and histograms. Only the event loop touches them."""

    def __init__(self):
        self.counts = Counter()
        self.reasons = Counter()
        self.buckets = {name: [0] * (len(BUCKETS) + 1) for name in HISTOGRAMS}
        self.sums = Counter()

    def observe(self, name, seconds, times=1):
        self.buckets[name][bisect.bisect_left(BUCKETS, seconds)] += times
        self.sums[name] += seconds * times

    def add(self, batch, now):
        """Counts the news of a step, before the choices have them."""
        gaps = Counter()                    # seconds since the latest token -> tokens. Most are equal
        for choice, progress in batch:
            output = choice.output
            num_new = progress.num_tokens - choice.progress.num_tokens
            if num_new and choice.progress.num_tokens:
                gaps[(now - choice.last_time) / num_new] += num_new
            elif num_new:
                num_prompt = len(output.prompt_token_ids)
                self.counts["prompt_tokens"] += num_prompt
                self.counts["prefix_cache_queries"] += num_prompt
                self.counts["prefix_cache_hits"] += min(output.num_cached_tokens, num_prompt)
                self.observe("time_to_first_token_seconds", now - choice.call.start)
            if num_new:
                choice.last_time = now
                self.counts["generation_tokens"] += num_new
            if progress.reason:
                self.reasons[progress.reason] += 1
                self.counts["num_preemptions"] += output.num_preemptions
                self.observe("e2e_request_latency_seconds", now - choice.call.start)
        for gap, num_tokens in gaps.items():
            self.observe("inter_token_latency_seconds", gap, num_tokens)

    def text(self, scheduler, model_name):
        """All figures, at this moment."""
        label = f"model_name={JSON.encode(model_name)}"
        allocator = scheduler.allocator
        used = 1 - len(allocator.free) / allocator.num_blocks
        lines = []

        def add(name, kind, *values):
            lines.append(f"# TYPE vllm:{name} {kind}")
            lines.extend(f"vllm:{name}{suffix}{{{label}{more}}} {value}" for suffix, more, value in values)
        add("num_requests_running", "gauge", ("", "", len(scheduler.running)))
        add("num_requests_waiting", "gauge", ("", "", len(scheduler.waiting)))
        add("kv_cache_usage_perc", "gauge", ("", "", used))
        for name in ("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits",
                     "num_preemptions"):
            add(f"{name}_total", "counter", ("", "", self.counts[name]))
        add("request_success_total", "counter", *(
            ("", f',finished_reason="{reason}"', self.reasons[reason]) for reason in REASONS))
        for name in HISTOGRAMS:
            counts = list(itertools.accumulate(self.buckets[name]))
            bounds = [f"{bound:g}" for bound in BUCKETS] + ["+Inf"]
            add(name, "histogram", *(("_bucket", f',le="{bound}"', n) for bound, n in zip(bounds, counts)),
                ("_sum", "", self.sums[name]), ("_count", "", counts[-1]))
        return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------
# Page: what a browser gets, and the live page pool beside the chat
# --------------------------------------------------------------------------------------------------
PAGE = FOLDER / "server.html"
PAGE_HEADERS = {        # the page talks to its own server only, and stands in no other page
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
                               "img-src data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "cache-control": "no-cache", "vary": "Accept"}
INTRODUCTION = ("tiny-vLLM serves OpenAI's API under /v1: GET /v1/models, POST /v1/chat/completions. "
                "A browser gets a page here.\n")
PICTURE_SECONDS = 0.1           # between two pictures of the pool
NUM_FINISHED = 32               # finished requests that a picture tells of


class PoolWatch:
    """Shows the page pool to watchers. Between two steps, the engine thread makes a picture when a
    watcher wants one. There is one picture for all watchers, and the engine is recorded only while
    somebody watches."""

    def __init__(self, service):
        self.service = service
        self.num_watchers = 0
        self.is_asked = False               # a picture is on its way
        self.asked_at = 0.0
        self.event = ""                     # the latest picture, as a server-sent event
        self.recorder = None                # of the engine thread

    def ask(self):
        """Wants a new picture, unless the latest is new or a picture is on its way."""
        now = time.monotonic()
        if not self.is_asked and now - self.asked_at >= PICTURE_SECONDS:
            self.is_asked = True
            self.asked_at = now
            self.service.tell_engine(self.look, self.service.llm)

    def look(self, llm):
        """Makes the picture. In the engine thread, which a mistake here must not end; like stop()."""
        try:
            if self.recorder not in llm.engine.observers:
                self.recorder = Recorder(llm, keep=NUM_FINISHED)
                self.recorder.join(time.perf_counter())
                llm.engine.observers.append(self.recorder)
            self.service.post(self.take, picture(self.recorder, self.service.names))
        except Exception:
            LOGGER.exception("the page pool is not shown any more")

    def take(self, value):
        self.event = f"data: {JSON.encode(value)}\n\n"
        self.is_asked = False

    def stop(self, llm):
        if self.recorder in llm.engine.observers:
            llm.engine.observers.remove(self.recorder)
        self.recorder = None

    async def events(self):
        """The stream of a watcher: each time the latest picture, if there is a new one. A slow watcher
        gets fewer."""
        sent = ""
        while not self.service.trouble:
            self.ask()
            await asyncio.sleep(PICTURE_SECONDS)
            if self.event != sent:
                sent = self.event
                yield sent


class PoolStream(StreamingResponse):
    """The response to a watcher. The last one who goes ends the recording."""

    def __init__(self, watch):
        super().__init__(watch.events(), 200, {"cache-control": "no-store"}, "text/event-stream")
        self.watch = watch

    async def __call__(self, scope, receive, send):
        watch = self.watch
        watch.num_watchers += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            watch.num_watchers -= 1
            if not watch.num_watchers:
                watch.event = ""
                watch.service.tell_engine(watch.stop, watch.service.llm)


def is_local(client):
    """Whether a request comes from this machine. client: (address, port) or None, as in ASGI."""
    try:
        return ipaddress.ip_address(client[0].removeprefix("::ffff:")).is_loopback
    except (TypeError, ValueError):
        return False


# --------------------------------------------------------------------------------------------------
# App: the endpoints, and who may use them
# --------------------------------------------------------------------------------------------------
class Endpoints:
    """The functions behind the paths."""

    def __init__(self, service):
        self.service = service
        self.pool_watch = PoolWatch(service)

    def routes(self):
        functions = {
            "GET /": self.page, "GET /debug/pool": self.pool,
            "GET /v1/models": self.models, "GET /v1/models/{name:path}": self.model,
            "GET /health": self.health, "GET /metrics": self.metrics, "GET /version": self.version,
            "POST /v1/chat/completions": partial(self.complete, ChatCall),
            "POST /v1/completions": partial(self.complete, TextCall),
            "POST /tokenize": self.tokenize, "POST /detokenize": self.detokenize}
        return [Route(name.split()[1], function, methods=name.split()[:1])
                for name, function in functions.items()]

    async def complete(self, kind, request):
        service = self.service
        body = await read_json(request, service.max_body)
        if service.trouble:
            raise service.trouble
        call = kind(service, body)
        request.state.call = call           # for the log
        await service.submit(call)
        return call

    def card(self, name):
        return {"id": name, "object": "model", "created": self.service.started, "owned_by": "tiny-vllm",
                "max_model_len": self.service.llm.max_model_len}

    async def models(self, request):
        cards = [self.card(name) for name in self.service.model_names]
        return json_response({"object": "list", "data": cards})

    async def model(self, request):
        return json_response(self.card(self.service.model_name(request.path_params["name"])))

    async def health(self, request):
        if self.service.trouble:
            raise self.service.trouble
        return json_response({"status": "ok"})

    async def metrics(self, request):
        service = self.service
        text = service.metrics.text(service.llm.engine.scheduler, service.model_names[0])
        return Response(text, media_type="text/plain; version=0.0.4")

    async def version(self, request):
        return json_response({"version": __version__})

    async def page(self, request):
        """The page for a browser, one line for others."""
        if "text/html" in request.headers.get("accept", ""):
            return Response(PAGE.read_bytes(), headers=PAGE_HEADERS, media_type="text/html")
        return Response(INTRODUCTION, headers={"vary": "Accept"}, media_type="text/plain")

    async def pool(self, request):
        """The live page pool. It tells how busy others are, so this machine alone may look."""
        if not is_local(request.scope.get("client")):
            raise RequestError("the page pool: expected a client on the server's own machine, got another: "
                               "watch the engine there", 403)
        if self.service.trouble:
            raise self.service.trouble
        return PoolStream(self.pool_watch)

    async def tokenize(self, request):
        """The token ids of a prompt or of messages."""
        llm = self.service.llm
        body = await read_json(request, self.service.max_body)
        self.service.model_name(body.get("model"))
        if body.get("messages") is not None:
            ids = await asyncio.to_thread(encode_chat, llm, body)
        else:
            prompt = want("prompt", body.get("prompt"), lambda prompt: isinstance(prompt, str), "a text")
            ids = await asyncio.to_thread(encode_text, llm, prompt, flag(body, "add_special_tokens", True))
        return json_response({"tokens": ids, "count": len(ids), "max_model_len": llm.max_model_len})

    async def detokenize(self, request):
        """The text of token ids."""
        llm = self.service.llm
        body = await read_json(request, self.service.max_body)
        self.service.model_name(body.get("model"))
        last = llm.config.vocab_size - 1
        ids = want("tokens", body.get("tokens"), lambda ids: isinstance(ids, list) and all(
            is_int(i, 0, last) for i in ids), f"a list of token ids from 0 to {last}")
        return json_response({"prompt": await asyncio.to_thread(llm.tokenizer.decode, ids)})


class Guard:
    """Stands before the app: gives each request an id, checks who may ask, writes the log, and turns
    every exception into an answer."""

    def __init__(self, app, api_key, hosts):
        self.app = app
        self.api_key = api_key
        self.hosts = hosts

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", request_id):
            request_id = os.urandom(16).hex()
        start = time.perf_counter()
        status = None

        async def send_with_id(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)
        try:
            self.check(scope["path"], headers)
            await self.app(scope, receive, send_with_id)
        except (ClientDisconnect, asyncio.CancelledError):
            pass                            # gone while the request came in; the process ends
        except Exception as error:
            if status is not None:
                raise                       # in the middle of an answer: the connection is closed
            await self.explain(error).response(scope, receive, send_with_id)
        finally:
            self.log(scope, request_id, status or "gone", time.perf_counter() - start)

    def check(self, path, headers):
        """Raises RequestError for a request that nobody may make."""
        # A web page can make a browser call this server under the page's own name (DNS rebinding).
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self.hosts and host and host not in self.hosts:
            raise RequestError(f"Host: expected {' or '.join(self.hosts)}, since the server listens on "
                               f"loopback only, got {shown(host)}: start it with another --host", 403)
        given = headers.get("authorization", "").encode("utf-8", "replace")
        wanted = f"Bearer {self.api_key}".encode()
        # The page holds no secrets, and asks for the key itself.
        if self.api_key and path not in ("/health", "/") and not hmac.compare_digest(given, wanted):
            raise RequestError("Authorization: expected Bearer and the server's API key", 401,
                               code="invalid_api_key")

    def explain(self, error):
        """The RequestError for an exception."""
        if isinstance(error, RequestError):
            return error
        if isinstance(error, RecursionError):           # read, or shown in the text of another error
            return RequestError("the body: expected JSON, got too many levels of it")
        LOGGER.error("an error of the server itself", exc_info=error)
        return RequestError("an error of the server itself: its log says more", 500)

    def log(self, scope, request_id, status, seconds):
        """A line without any text of the client's."""
        call = scope.get("state", {}).get("call")
        tokens = ""
        if call:
            usage = call.usage
            tokens = (f", {usage['prompt_tokens']} tokens in "
                      f"({usage['prompt_tokens_details']['cached_tokens']} cached), "
                      f"{usage['completion_tokens']} out")
        LOGGER.log(logging.INFO if scope["method"] == "POST" else logging.DEBUG, "%s %s %s %s%s, %.3f s",
                   request_id, scope["method"], quote(scope["path"])[:60], status, tokens, seconds)


async def refuse_path(request, error):
    """The answer to a path or a method that is not there."""
    known = ", ".join(f"{'POST' if 'POST' in route.methods else 'GET'} {route.path.replace(':path', '')}"
                      for route in request.app.routes)
    path = quote(request.url.path)[:60]
    message = f"expected one of {known}; got {request.method} {path}"
    response = RequestError(message, error.status_code).response
    response.headers.update(error.headers or {})
    return response


def build_app(llm, model_names=("tiny-vllm",), api_key=None, max_waiting=1024, max_body=8 * MEBIBYTE,
              allow_origins=(), hosts=()):
    """The ASGI app of an LLM, for uvicorn, Ray Serve or another host. Its lifespan runs the engine.

    model_names: what clients may call the model; the answers to a request without a name have the
    first. max_waiting: sequences without pages, more are refused. max_body: bytes. allow_origins: web
    pages that may use the server, "*" for all. hosts: what the Host header may say, () for anything."""
    service = Service(llm, list(model_names), max_waiting, max_body)
    middleware = [Middleware(Guard, api_key, hosts)]
    if allow_origins:                       # before the guard, since a preflight has no key
        cors = Middleware(CORSMiddleware, allow_origins=allow_origins, allow_methods=["GET", "POST"],
                          allow_headers=["*"], expose_headers=["x-request-id"])
        middleware.insert(0, cors)
    app = Starlette(routes=Endpoints(service).routes(), middleware=middleware, lifespan=service.lifespan,
                    exception_handlers={HTTPException: refuse_path})
    app.router.redirect_slashes = False
    app.state.service = service
    return app


# --------------------------------------------------------------------------------------------------
# Process: connections, signals, the command line
# --------------------------------------------------------------------------------------------------
class Connection(H11Protocol):
    """A connection that closes when the client does not send its request, or reads no answer. Nothing in
    ASGI can see such a client."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.begin = self.loop.time()       # of the request that is coming in; None: nothing is
        self.num_bytes = 0                  # of the request
        self.num_unsent = 0                 # bytes of answers
        self.last_progress = self.begin     # when num_unsent was seen to change
        self.watch()

    def data_received(self, data):
        self.begin = self.begin or self.loop.time()
        self.num_bytes += len(data)
        super().data_received(data)
        if self.conn.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED):
            self.begin = None
            self.num_bytes = 0

    def on_response_complete(self):
        super().on_response_complete()      # and the next request may have come with this one, in part
        if self.conn.their_state is h11.SEND_BODY:
            self.begin = self.begin or self.loop.time()

    def watch(self):
        """Looks at the connection now and then, until the connection is lost."""
        if self not in self.connections:
            return
        now = self.loop.time()
        num_unsent = self.transport.get_write_buffer_size()
        if num_unsent != self.num_unsent or not num_unsent:
            self.num_unsent = num_unsent
            self.last_progress = now
        late = self.begin and now - self.begin > REQUEST_SECONDS + self.num_bytes / MEBIBYTE
        if late or now - self.last_progress > WRITE_SECONDS:
            self.transport.abort()
        self.loop.call_later(REQUEST_SECONDS / 10, self.watch)

    def send_400_response(self, message):
        super().send_400_response(to_json(RequestError(message).body).decode())


class Server(uvicorn.Server):
    """uvicorn's server, but a signal lets the answers come to their ends."""

    def __init__(self, app, greeting="", shutdown_timeout=30):
        # Clients keep a connection for up to 90 s: close an idle one later than they do.
        config = uvicorn.Config(app, http=Connection, ws="none", loop="asyncio", lifespan="on",
                                access_log=False, log_config=None, server_header=False, backlog=2048,
                                timeout_keep_alive=120, timeout_graceful_shutdown=5)
        super().__init__(config)
        self.service = app.state.service
        self.greeting = greeting
        self.shutdown_timeout = shutdown_timeout
        self.deadline = None
        self.exit_code = 0

    async def startup(self, sockets=None):
        await super().startup(sockets)
        if self.greeting:
            print(self.greeting, file=sys.stderr, flush=True)

    def handle_exit(self, number, frame):
        """The first signal: no new requests, and the others get time to end. The second: at once."""
        if self.service.is_draining:
            self.should_exit = True
            self.force_exit = True
            self.exit_code = 128 + number
            logging.disable()               # each task that is cut off would show a traceback
        self.service.is_draining = True
        self.deadline = time.monotonic() + self.shutdown_timeout

    async def on_tick(self, counter):
        """Ten times a second."""
        service = self.service
        is_late = service.is_draining and time.monotonic() > self.deadline
        if is_late:
            for call in service.calls:
                service.abort(call)
        if service.error or is_late or (service.is_draining and not service.calls):
            self.should_exit = True
        return await super().on_tick(counter)


def parse_arguments(argv):
    """The command line as a namespace."""
    parser = ArgumentParser(prog="server.py", description="Serve a model by OpenAI's API.")
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine only)")
    add("--port", type=int, default=8000, metavar="N", help="(default: %(default)s; 0: any free port)")
    add("--api-key", default=os.environ.get("TINYVLLM_API_KEY"), metavar="KEY",
        help="what clients must send (default: $TINYVLLM_API_KEY, else nothing)")
    add("--served-model-name", nargs="+", metavar="NAME", help="what clients may call the model")
    add("--max-waiting", type=int, default=1024, metavar="N",
        help="sequences that wait for pages; more are refused with 503 (default: %(default)s)")
    add("--max-body", type=int, default=8 * MEBIBYTE, metavar="N",
        help="the most bytes of a request (default: %(default)s)")
    add("--shutdown-timeout", type=float, default=30, metavar="S",
        help="seconds for running answers to end after SIGTERM or Ctrl-C (default: %(default)s)")
    add("--allow-origin", nargs="+", default=(), metavar="ORIGIN",
        help="web pages of other origins that may use the server, * for all")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"),
        help="info: a line for each answer (default); debug: for each request")
    EngineArgs.add_to(parser)
    args = parser.parse_args(argv)
    for name in "max_waiting", "max_body":
        check("--" + name.replace("_", "-"), getattr(args, name), is_int, "a whole number of 1 or more")
    check("--port", args.port, lambda port: is_int(port, 0, 65535), "a number from 0 to 65535")
    return args


def public_name(args, llm):
    """What clients call the model: the Hugging Face id, or the name of the folder."""
    given = args.model or os.environ.get("TINYVLLM_MODEL")
    if not given:
        return "parrot" if llm.folder == FOLDER / "parrot" else HUB_MODEL
    folder = Path(given).expanduser()
    return folder.resolve().name if folder.is_dir() else given


def open_socket(host, port):
    """A socket at the address. Before the model is loaded: an address in use is noticed at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except OSError as error:
        raise TinyVLLMError(f"expected a free address of this machine, got --host {host} --port {port} "
                            f"({error.strerror}): give others") from None


def greeting(args, address, name, llm):
    """Where the server is, and a command to try."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
    url = f"http://[{host}]:{address[1]}" if ":" in host else f"http://{host}:{address[1]}"
    key = ' -H "Authorization: Bearer $TINYVLLM_API_KEY"' if args.api_key else ""
    path = "chat/completions" if llm.tokenizer.has_chat_template else "completions"
    body = ('{"messages": [{"role": "user", "content": "Who are you?"}]}' if path.startswith("chat")
            else '{"prompt": "Once upon a time"}')
    return (f"tiny-vLLM: {name} at {url}/v1 on {llm.device.name}. Try:\n"
            f"  curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d '{body}'")


def main(argv=None):
    """Serves until a signal comes. Returns the exit code."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    LOGGER.setLevel(args.log_level.upper())
    with open_socket(args.host, args.port) as listener:
        address = listener.getsockname()
        is_loopback = ipaddress.ip_address(address[0]).is_loopback
        if not is_loopback and not args.api_key:
            print("tiny-vLLM: anyone who reaches this machine may use the server: consider --api-key",
                  file=sys.stderr)
        llm = open_llm(EngineArgs.from_namespace(args))
        names = args.served_model_name or [public_name(args, llm)]
        hosts = ("localhost", "127.0.0.1", "[::1]", args.host.lower()) if is_loopback else ()
        app = build_app(llm, names, args.api_key, args.max_waiting, args.max_body, args.allow_origin, hosts)
        server = Server(app, greeting(args, address, names[0], llm), args.shutdown_timeout)
        server.run([listener])
        app.state.service.stop()
    return 1 if server.service.error else server.exit_code


if __name__ == "__main__":
    run_program(main)
