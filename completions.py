"""Completions, as OpenAI's API has them: from a JSON request to tokens, and back to JSON.

A Call is a request to /v1/chat/completions (ChatCall) or /v1/completions (TextCall), and the response to
the request: an ASGI app. A Choice is one answer of a call. server.py gives the choices their news, step by
step; a choice remembers how much of the answer the client has.

A known field that is not supported is refused by its name. Unknown fields are ignored.
"""
import asyncio
import contextlib
import itertools
import json
import math
import os
import time
from dataclasses import replace
from functools import cached_property

from starlette.responses import Response

from device import TinyVLLMError, check, first_line, is_int, is_number, shown
from sampling import SamplingParams
from tinyvllm import RequestOutput, __version__
from tokenizer import StreamDecoder, TokenizerError
from tools import Tools, with_arguments

MAX_CHOICES = 256               # sequences of one HTTP request
PING_SECONDS = 15               # a stream without text for so long shows that it is alive
LINGER_SECONDS = 1              # of silence, until the rest of a refused body counts as sent


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
    "structured_outputs": (None,),
    "guided_json": (None,), "guided_regex": (None,), "guided_choice": (None,), "guided_grammar": (None,),
    "functions": (None, []), "function_call": (None, "none", "auto"),
    "modalities": (None, [], ["text"]), "audio": (None,), "web_search_options": (None,),
    "prediction": (None,), "best_of": (None, 1), "suffix": (None, ""), "use_beam_search": (None, False),
    "prompt_logprobs": (None,), "include_stop_str_in_output": (None, False),
    "return_token_ids": (None, False), "cache_salt": (None,), "truncate_prompt_tokens": (None,),
    "bad_words": (None, []), "allowed_token_ids": (None,), "skip_special_tokens": (None, True)}
# The same for fields that would change the token ids of a chat.
NEUTRAL_CHAT_VALUES = {
    "add_special_tokens": (None, False), "add_generation_prompt": (None, True),
    "continue_final_message": (None, False), "chat_template": (None,), "documents": (None, [])}


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

    def finite_float(text):
        number = float(text)
        return number if math.isfinite(number) else refuse(text)
    try:
        value = json.loads(body, parse_constant=refuse, parse_float=finite_float)
    except ValueError as error:             # no JSON, no UTF-8, a number of 5,000 digits
        raise RequestError(f"the body: expected JSON, got {len(body)} bytes that are none "
                           f"({first_line(error):.100})") from None
    return want("the body", value, lambda value: isinstance(value, dict), "a JSON object")


def read_response_format(body):
    """SamplingParams.structured_outputs, from the field response_format."""
    given = body.get("response_format")
    if given is None:
        return None
    kinds = ("text", "json_object", "json_schema")
    want("response_format", given, lambda given: given.get("type") in kinds,
         f"an object of type {' or '.join(kinds)}")
    if given["type"] == "text":
        return None
    if given["type"] == "json_object":
        return {"json": {"type": "object"}}
    inner = want("response_format", given.get("json_schema"), lambda inner: isinstance(
        inner.get("schema"), dict), "json_schema, an object with a schema that is an object")
    return {"json": inner["schema"]}


def refuse_unsupported(body, neutral_values):
    """Raises RequestError for a field that asks for what the server cannot do. neutral_values: {field:
    values that ask for nothing}."""
    for name, values in neutral_values.items():
        value = body.get(name)
        if value not in values:
            raise RequestError(f"{name}: expected nothing, since this server does not support it, got "
                               f"{shown(value)}: leave the field out", param=name)


def flag(body, name, default=False):
    """A boolean field; null is the default."""
    value = body.get(name)
    return default if value is None else want(name, value, lambda v: isinstance(v, bool), "true or false")


def texts_of(messages):
    """All texts of a chat, whose contents are texts or lists of parts, and the calls in it. Raises
    RequestError for an image."""
    for i, message in enumerate(messages):
        fields = message if isinstance(message, dict) else {}
        if fields.get("tool_calls"):
            yield JSON.encode(fields["tool_calls"])
        content = fields.get("content")
        parts = content if isinstance(content, list) else [content]
        for part in parts:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            name = f"messages[{i}].content"
            want(name, kind, lambda kind: kind in ("text", "input_text", "refusal"),
                 "parts of type text, since the model reads nothing else")
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text


def read_tools(llm, body):
    """The Tools of a chat, None without. Raises RequestError."""
    choice = body.get("tool_choice") or ("auto" if body.get("tools") else "none")
    if choice == "none" or (choice == "auto" and not body.get("tools")):
        return None
    try:
        return Tools(body.get("tools"), choice, llm.tokenizer)
    except TinyVLLMError as error:
        raise RequestError(error, param=str(error).partition(":")[0]) from None


def encode_chat(llm, body, tools):
    """The token ids of a chat. tools: see read_tools."""
    messages = want("messages", body.get("messages"), lambda m: isinstance(m, list) and m,
                    "a list of one message or more")
    definitions = tools.definitions if tools else None
    variables = want("chat_template_kwargs", body.get("chat_template_kwargs"),
                     lambda kwargs: kwargs is None or isinstance(kwargs, dict), "an object")
    try:
        messages = with_arguments(messages)
    except (TypeError, ValueError, LookupError, AttributeError):
        raise RequestError('messages: expected tool_calls as a list of {"function": {"name": word, '
                           '"arguments": text of an object}}', param="messages") from None
    text = "".join(texts_of(messages)) + JSON.encode([definitions, variables])
    return encoded(llm, text, lambda _: llm.tokenizer.chat(
        messages, tools=definitions, variables=variables), "messages")


def encode_text(llm, prompt, add_bos):
    """The token ids of a prompt, which is a text or ids already."""
    want("prompt", prompt, lambda p: isinstance(p, (str, list)) and p,
         "a text, a list of token ids, or a list of several, none of them empty")
    if isinstance(prompt, list):
        return encoded(llm, "", lambda _: prompt, "prompt")
    return encoded(llm, prompt, lambda text: llm.tokenizer.encode(text, add_bos), "prompt")


def encoded(llm, text, encode, param):
    """The ids of encode(text), if they fit into the context. A long text takes a third of a second."""
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


class Call:
    """A request for completions, and its response: the fields, and the choices, which are the answers."""
    tools = None                        # the Tools of a chat
    has_echo = False                    # the answer begins with the prompt

    def __init__(self, service, body):
        """Checks all fields but the prompt. Raises RequestError."""
        self.service = service
        self.body = body
        self.start = time.perf_counter()
        self.created = int(time.time())
        self.id = self.prefix + os.urandom(16).hex()
        self.model = service.model_name(body.get("model"))
        refuse_unsupported(body, NEUTRAL_VALUES | self.neutral_values)
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
        most = min(MAX_CHOICES, service.max_waiting)        # more would never find room in the queue
        if self.num_choices > most:
            raise RequestError(f"n: expected {most} or less answers of one request, by this server's "
                               f"limits, got {len(self.prompts)} prompts * {self.n}", param="n")
        self.params = self.read_params()
        self.event_head = JSON.encode(self.head(self.chunk_kind)).removesuffix("}")
        self.choices = []
        self.news = asyncio.Event()     # set when a choice has made progress
        self.is_short = False           # the prompts are encoded in the event loop
        self.is_gone = False            # the client has left
        self.num_sends = 0              # of chunks
        self.num_sends_seen = 0         # by ping
        self.is_quiet = False           # a stream that must show that it is alive
        self.timer = None               # of the next ping

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
        max_tokens = self.read_max_tokens()
        self.is_prompt_only = max_tokens == 0
        given["max_tokens"] = 1 if self.is_prompt_only else max_tokens      # the engine makes one in any case
        given["logprobs"] = self.read_logprobs()
        given["prompt_logprobs"] = given["logprobs"] if self.has_echo else None
        given["structured_outputs"] = self.read_grammar()
        try:
            params = SamplingParams(**({"temperature": 1.0} | llm.default_sampling | given))
            llm.check_limits(params)
            return params
        except TinyVLLMError as error:
            raise RequestError(error, param=str(error).partition(":")[0]) from None

    def read_grammar(self):
        """SamplingParams.structured_outputs: of a required call, or of response_format."""
        grammar = read_response_format(self.body)
        if grammar and self.tools:
            raise RequestError("response_format: expected none beside tools", param="response_format")
        return self.tools.structured_outputs if self.tools else grammar

    def read_max_tokens(self):
        least = 0 if self.has_echo else 1
        for name in "max_completion_tokens", "max_tokens":
            if self.body.get(name) is not None:
                return want(name, self.body[name], lambda n: is_int(n, least),
                            f"a whole number of {least} or more")
        return self.default_max_tokens

    def read_count(self, name):
        """The number of most probable tokens to report; None if none is asked for."""
        count = self.body.get(name)
        return want(name, count, lambda n: n is None or is_int(n, 0, 20), "a whole number from 0 to 20")

    def prepare(self):
        """Encodes the prompts, and makes the choices: for each prompt n, with seeds one after another.
        Raises RequestError."""
        llm = self.service.llm
        try:
            prompts = [(llm.encode_prompt(self.encode(prompt)), self.lead(prompt)) for prompt in self.prompts]
        except TinyVLLMError as error:
            raise RequestError(error, param="prompt") from None
        for ids, lead in prompts:
            for i in range(self.n):
                params = self.params
                if self.n > 1 and params.seed is not None:
                    params = replace(params, seed=(params.seed + i) % 2**64)
                self.choices.append(Choice(self, len(self.choices), ids, params, lead))
        self.body = self.prompts = None     # a client may have sent megabytes

    @property
    def is_final(self):
        """Whether the engine is done with all choices."""
        return all(choice.output.finish_reason for choice in self.choices)

    @property
    def is_sent(self):
        return all(choice.has_end for choice in self.choices)

    @property
    def failure(self):
        """Why there is no answer, as a RequestError; None if there is no such reason."""
        if self.service.error and not self.is_final:
            return self.service.trouble
        for choice in self.choices:
            if choice.output.finish_reason == "abort":      # and not by the client, who would not ask
                return RequestError("the server is shutting down", 503, code="shutting_down")
            if choice.output.finish_reason == "error":
                return RequestError(choice.output.error, 500)
        return None

    async def __call__(self, scope, receive, send):
        """The response, as an ASGI app. It watches for the client to go away all the while."""
        watching = asyncio.create_task(self.watch(receive, asyncio.current_task()))
        self.timer = self.service.loop.call_later(PING_SECONDS, self.ping)
        try:
            await self.respond(scope, receive, send)
        finally:
            watching.cancel()
            self.timer.cancel()
            self.service.calls.discard(self)
            self.service.abort(self)

    async def watch(self, receive, response):
        """Cancels the response, a task, when the client is gone."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        response.cancel()

    async def respond(self, scope, receive, send):
        await self.service.submit(self)
        if self.is_stream:
            await self.stream(send)
        else:
            await self.send_whole(scope, receive, send)

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
        is_over = False
        while not is_over:
            await self.news.wait()
            self.news.clear()
            failure = self.failure
            if failure:
                text = f"data: {JSON.encode(failure.body)}\n\n"
            else:
                text = self.new_events() or (": ping\n\n" if self.is_quiet else "")
            is_over = failure is not None or self.is_sent
            if self.is_sent:
                text += self.last_events()
            if text:
                self.is_quiet = False
                self.num_sends += 1
                data = text.encode("utf-8", "replace")      # arguments of a call may hold half a surrogate
                await send({"type": "http.response.body", "body": data, "more_body": not is_over})

    def ping(self):
        """Called every PING_SECONDS: wakes a stream that has sent nothing since the last call."""
        self.is_quiet = self.num_sends == self.num_sends_seen
        self.num_sends_seen = self.num_sends
        if self.is_quiet:
            self.news.set()
        self.timer = self.service.loop.call_later(PING_SECONDS, self.ping)

    @property
    def usage(self):
        """The tokens of each prompt, once, and of all answers so far."""
        outputs = [choice.output for choice in self.choices[::self.n]]
        lengths = [len(output.prompt_token_ids) for output in outputs]
        # A preempted sequence finds tokens again, so the sum over its admissions could be larger.
        num_cached = sum(min(output.num_cached_tokens, length) for output, length in zip(outputs, lengths))
        num_new = sum(len(choice.output.token_ids) for choice in self.choices)
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
    neutral_values = NEUTRAL_CHAT_VALUES | {"echo": (None, False)}
    default_max_tokens = None           # what the context allows

    def read_prompts(self):
        self.tools = read_tools(self.service.llm, self.body)
        self.max_calls = None if flag(self.body, "parallel_tool_calls", True) else 1
        return [self.body]

    def read_logprobs(self):
        count = self.read_count("top_logprobs")
        has_logprobs = flag(self.body, "logprobs")
        if count and not has_logprobs:
            raise RequestError("top_logprobs: expected logprobs: true beside it", param="top_logprobs")
        return (count or 0) if has_logprobs else None

    def encode(self, body):
        return encode_chat(self.service.llm, body, self.tools)

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

    def answer(self, text, tool_calls):
        message = {"role": "assistant", "content": text, "refusal": None}
        if tool_calls:
            message |= {"content": text.strip() or None, "tool_calls": tool_calls}
        return {"message": message}

    def opening(self, lead):
        return '"delta":{"role":"assistant","content":""}'

    def piece(self, text):
        return f'"delta":{{"content":{JSON.encode(text)}}}' if text else '"delta":{}'

    def calls_piece(self, tool_calls):
        numbered = [{"index": index} | call for index, call in enumerate(tool_calls)]
        return f'"delta":{JSON.encode({"tool_calls": numbered})}'


class TextCall(Call):
    """POST /v1/completions"""
    prefix = "cmpl-"
    kind = "text_completion"
    chunk_kind = "text_completion"
    neutral_values = {"tools": (None, []), "tool_choice": (None, "none", "auto")}
    default_max_tokens = 16

    def read_prompts(self):
        """The prompts: one text, several, one list of token ids, or several."""
        prompt = self.body.get("prompt")
        self.has_echo = flag(self.body, "echo")
        self.add_bos = flag(self.body, "add_special_tokens", True)
        is_several = isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list))
        return prompt if is_several else [prompt]

    def read_logprobs(self):
        return self.read_count("logprobs")

    def encode(self, prompt):
        return encode_text(self.service.llm, prompt, self.add_bos)

    def logprobs(self, entries):
        """The log-probabilities of (token, offset, {token: logprob}) entries. A prompt's first token has
        None in the place of the dict."""
        def text(token):
            return self.service.llm.tokenizer.token_bytes(token).decode("utf-8", "replace")

        def by_text(best):
            values = {}
            for token, logprob in best.items():
                values.setdefault(text(token), finite(logprob))     # of tokens with one text, the best
            return values
        return {"tokens": [text(token) for token, _, _ in entries],
                "token_logprobs": [best and finite(best[token]) for token, _, best in entries],
                "top_logprobs": [best and by_text(best) for _, _, best in entries],
                "text_offset": [offset for _, offset, _ in entries]}

    def lead(self, prompt):
        """What the answer begins with: the prompt's text, if it must."""
        if not self.has_echo:
            return ""
        return prompt if isinstance(prompt, str) else self.service.llm.tokenizer.decode(prompt)

    def answer(self, text, tool_calls):
        return {"text": text}

    def opening(self, lead):
        return self.piece(lead) if self.has_echo else None

    def piece(self, text):
        return f'"text":{JSON.encode(text)}'


class Choice:
    """One answer of a call: how far the engine is, and how much of it the client has."""

    def __init__(self, call, index, prompt_token_ids, params, lead):
        """lead: the text before the answer's own."""
        self.call = call
        self.index = index
        self.params = params
        self.lead = lead
        self.key = None                     # of the worker's messages
        self.output = RequestOutput(prompt_token_ids, logprobs=None if params.logprobs is None else [])
        self.last_time = call.start         # of the latest token, for the metrics
        # Sent, or made ready to be sent
        self.has_opening = False
        self.num_characters = 0
        self.has_end = False
        # Tokens whose log-probabilities were reported, and the characters of these tokens
        self.has_prompt_logprobs = False
        self.num_tokens = 0
        self.num_token_characters = 0
        self.decoder = StreamDecoder(call.service.llm.tokenizer)

    @cached_property
    def tool_calls(self):
        """The calls in the whole answer."""
        return self.call.tools.calls(self.output.text)[:self.call.max_calls] if self.call.tools else []

    @property
    def finish_reason(self):
        is_call = self.output.finish_reason == "stop" and self.tool_calls
        return "tool_calls" if is_call else self.output.finish_reason

    @property
    def num_ready(self):
        """The number of characters that are the client's for good: all, or without what may be a call of
        a tool."""
        text = self.output.text
        if not self.call.tools or (self.output.finish_reason and not self.tool_calls):
            return len(text)
        return self.call.tools.start(text)

    @property
    def stop_reason(self):
        """The stop string or token id that ended the answer, as vLLM says it; None for an eos token."""
        if self.output.finish_reason != "stop":
            return None
        last = self.output.token_ids[-1]
        if last in self.call.params.stop_token_ids:
            return last
        stops = self.call.params.stop
        if not stops:
            return None
        decoder = StreamDecoder(self.call.service.llm.tokenizer)
        text = "".join(map(decoder.push, self.output.token_ids)) + decoder.flush()
        return next((stop for stop in stops if text.startswith(stop, len(self.output.text))), None)

    def drop_answer(self):
        """Leaves out the token that the engine has made although only the prompt is wanted."""
        output = self.output
        output.text = ""
        output.token_ids = []
        output.logprobs = None if output.logprobs is None else []
        if output.finish_reason == "stop":
            output.finish_reason = "length"

    @property
    def logprobs_end(self):
        """The log-probabilities of a whole answer are those of the tokens that begin before this character.
        Beside an echo, these are all tokens, even an end token without text: a client (lm_eval) cuts the
        lists by the numbers of tokens. The tokens of a stop string are left out in any case."""
        has_all = self.call.has_echo and not isinstance(self.stop_reason, str)
        return math.inf if has_all else len(self.output.text)

    def prompt_entries(self):
        """(token, offset in the lead, {token: logprob}) of the prompt's tokens."""
        tokenizer = self.call.service.llm.tokenizer
        ids = self.output.prompt_token_ids
        texts = list(map(StreamDecoder(tokenizer).push, ids))
        is_shifted = tokenizer.drops_first_space and "".join(texts).startswith(" ")     # see Tokenizer.decode
        ends = itertools.accumulate(map(len, texts), initial=-1 if is_shifted else 0)
        offsets = (min(max(0, end), len(self.lead)) for end in ends)
        return list(zip(ids, offsets, self.output.prompt_logprobs))

    def take_logprobs(self, end):
        """The log-probabilities of an echoed prompt, and of tokens that begin before the answer's character
        `end`, in the endpoint's shape; None if none are asked for. No token is taken twice."""
        if self.call.params.logprobs is None:
            return None
        entries = []
        if self.call.has_echo and not self.has_prompt_logprobs:
            self.has_prompt_logprobs = True
            entries = self.prompt_entries()
        while self.num_tokens < len(self.output.token_ids) and self.num_token_characters < end:
            token = self.output.token_ids[self.num_tokens]
            offset = len(self.lead) + self.num_token_characters
            entries.append((token, offset, self.output.logprobs[self.num_tokens]))
            self.num_token_characters += len(self.decoder.push(token))
            self.num_tokens += 1
        return self.call.logprobs(entries)

    def whole(self):
        """The choice of an answer that is not streamed."""
        output = self.output
        text = self.lead + output.text[:self.num_ready]
        return {"index": self.index, **self.call.answer(text, self.tool_calls),
                "logprobs": self.take_logprobs(self.logprobs_end), "finish_reason": self.finish_reason,
                "stop_reason": self.stop_reason}

    def pieces(self):
        """Yields what is new as JSON, the inside of choices of a stream: the opening, with the first
        token; text; the end by itself, as OpenAI does."""
        output = self.output
        if not self.has_opening and (output.token_ids or output.finish_reason):
            self.has_opening = True
            opening = self.call.opening(self.lead)
            if opening:
                logprobs = self.take_logprobs(0) if self.call.has_echo else None
                yield f'{opening},"logprobs":{JSON.encode(logprobs)},"finish_reason":null'
        end = self.num_ready
        if end > self.num_characters:
            piece = self.call.piece(output.text[self.num_characters:end])
            logprobs = self.take_logprobs(end)
            self.num_characters = end
            yield f'{piece},"logprobs":{JSON.encode(logprobs)},"finish_reason":null'
        if output.finish_reason and not self.has_end:
            self.has_end = True
            if self.tool_calls:
                piece = self.call.calls_piece(self.tool_calls)
                logprobs = self.take_logprobs(len(output.text))
                yield f'{piece},"logprobs":{JSON.encode(logprobs)},"finish_reason":null'
            rest = self.take_logprobs(self.logprobs_end) if self.call.has_echo else None
            reasons = f'"finish_reason":"{self.finish_reason}","stop_reason":{JSON.encode(self.stop_reason)}'
            yield f'{self.call.piece("")},"logprobs":{JSON.encode(rest)},{reasons}'


def finite(logprob):
    """The log-probability in JSON's numbers, which have no infinity and no NaN."""
    return logprob if logprob > -9999 else -9999.0
