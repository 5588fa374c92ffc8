#!/usr/bin/env python3
"""An OpenAI-compatible server, on Starlette and uvicorn.

    python server.py            then point any client of OpenAI's API at http://127.0.0.1:8000/v1

The life of a request:
  1. The event loop reads the request and checks its fields: class Call, in completions.py.
  2. The event loop encodes a short prompt. Some hundred thousand characters take a third of a second, and all
     streams would stand still: a helper thread encodes the long prompt.
  3. The worker, a process of its own, queues the sequences and steps the engine: worker.py. After each step
     the worker sends the news of all sequences in one message: Service.deliver takes the message.
  4. The event loop sends the client all that is new since the last chunk. There is no queue of tokens: a
     client that reads slowly gets fewer and larger chunks, and costs no memory. (A client that reads nothing
     for WRITE_SECONDS is cut off.)
A client may leave at any point. Then the worker gives the sequences up, and the next step frees the pages.

Sections: Service, Metrics, Page, App, Process.
"""
import asyncio
import base64
import bisect
import contextlib
import hmac
import ipaddress
import itertools
import logging
import math
import multiprocessing.connection
import os
import pickle
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from urllib.parse import quote

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"tinyvllm: expected the Python package {error.name}, found none: ./run.sh installs all "
             "packages into .venv, then use .venv/bin/python")

from completions import (JSON, NEUTRAL_CHAT_VALUES, ChatCall, RequestError, TextCall, encode_chat,
                         encode_text, flag, json_response, read_json, read_tools, refuse_unsupported,
                         to_json, want)
from device import FOLDER, TinyVLLMError, check, is_int, shown
from tinyvllm import ArgumentParser, EngineArgs, __version__, run_program
from weights import HUB_MODEL
from worker import STOP_SECONDS, Worker, worker_process

MEBIBYTE = 2**20
MAX_HEAD = 2**14                # bytes of a request's header
SHORT_BODY = 2**14              # bytes of a body: its prompts are encoded in some milliseconds
REQUEST_SECONDS = 10            # for a whole request to come in, and a second more for each MiB
WRITE_SECONDS = 60              # for a client to read anything at all
STUCK_SECONDS = 60              # a worker that says nothing for so long has failed
CHUNK_SECONDS = 0.0002          # between two chunks of a stream, for each unfinished sequence
# Connections taken in at a turn of the event loop. All requests of a turn are read before the first of them
# goes on to the worker: of 256 in one turn, none would reach the worker before all 256 are read.
MAX_ACCEPTS = 8
UPGRADE = re.compile(rb"(?im)^upgrade:.*\r\n")
LOGGER = logging.getLogger("tinyvllm.server")


# --------------------------------------------------------------------------------------------------
# Service: between the HTTP requests and the worker. All of this runs in the event loop.
# --------------------------------------------------------------------------------------------------
class Service:
    """All unfinished calls, and the connection to the worker."""

    def __init__(self, llm, model_names, max_waiting, max_body, pipe):
        """llm: an LLM, to be stepped by a worker in this process. Or an InputProcessor, and then pipe is a
        socket to the worker, which is elsewhere."""
        self.llm = llm
        self.model_names = model_names
        self.max_waiting = max_waiting
        self.max_body = max_body
        self.pipe = pipe
        self.metrics = Metrics()
        self.pool_watch = PoolWatch(self)
        self.started = int(time.time())
        self.loop = None
        self.writer = None                  # of messages to the worker
        self.reading = None                 # the task that takes the worker's messages
        self.is_stopping = False            # the worker is to end
        self.is_draining = False            # no new requests: the process is about to end
        self.error = None                   # why the engine has failed
        self.compiling = {}                 # number -> Future of an error or None: grammars in the making
        self.calls = set()                  # unfinished HTTP requests for answers
        self.num_unfinished = 0             # their sequences that have not ended
        self.keys = itertools.count()       # of choices and grammars
        self.choices = {}                   # key -> Choice, of all that the worker has
        self.load = (0, 0, 0.0)             # see Worker.hand_over
        self.last_heard = 0.0               # time.monotonic() when the worker was seen to be alive
        self.with_news = set()              # calls to be told of news at the next waking
        self.last_waking = 0.0              # of the loop's time
        self.is_waking = False              # a waking is planned

    @contextlib.asynccontextmanager
    async def lifespan(self, app):
        """Talks with the worker for as long as the app runs."""
        self.loop = asyncio.get_running_loop()
        pipe = self.pipe
        if pipe is None:
            pipe, theirs = socket.socketpair()
            worker = Worker(self.llm, multiprocessing.connection.Connection(theirs.detach()))
            threading.Thread(target=worker.run, name="worker", daemon=True).start()
        reader, self.writer = await asyncio.open_connection(sock=pipe)
        self.reading = asyncio.create_task(self.read(reader))
        yield
        self.is_stopping = True
        self.tell_worker("stop")
        if not self.error:
            await asyncio.wait((self.reading,), timeout=STOP_SECONDS)
        self.writer.close()

    def tell_worker(self, *message):
        """Sends a message, as multiprocessing's Connection does: the length, and a pickle."""
        data = pickle.dumps(message)
        if not self.error:
            self.writer.write(struct.pack("!i", len(data)) + data)

    async def read(self, reader):
        """Takes the messages of the worker, until it ends."""
        functions = {"deliver": self.deliver, "compiled": self.take_grammar, "show": self.pool_watch.show,
                     "fail": self.fail}
        try:
            while True:
                [length] = struct.unpack("!i", await reader.readexactly(4))
                name, *arguments = pickle.loads(await reader.readexactly(length))
                self.last_heard = time.monotonic()
                functions[name](*arguments)
        except (asyncio.IncompleteReadError, ConnectionError):
            reason = "the worker has ended"
        except Exception as error:          # nobody else would notice
            LOGGER.critical("an error of the server itself", exc_info=error)
            reason = "an error of the server itself"
        if not (self.is_stopping or self.error):
            self.fail(reason)

    def deliver(self, now, load, news):
        """Takes the news of a step, see Worker.hand_over. now: time.perf_counter() at the step's end."""
        self.load = load
        gaps = Counter()                    # seconds since the latest token -> tokens. Most are equal
        for key, text, token_ids, more in zip(*news):
            choice = self.choices[key]
            output = choice.output
            is_first = not output.token_ids
            if token_ids and not is_first:
                gaps[(now - choice.last_time) / len(token_ids)] += len(token_ids)
            choice.last_time = now
            output.text += text
            output.token_ids += token_ids
            if more:
                self.take_more(choice, now, *more)
            if token_ids and is_first:
                self.metrics.count_first_token(choice, now)
            if is_first or output.finish_reason:
                choice.call.news.set()
            else:
                self.with_news.add(choice.call)
        self.metrics.count_gaps(gaps)
        if self.with_news and not self.is_waking:
            self.is_waking = True
            pause = CHUNK_SECONDS * self.num_unfinished
            self.loop.call_at(self.last_waking + pause, self.wake)

    def take_more(self, choice, now, logprobs, prompt_logprobs, num_cached_tokens, num_preemptions,
                  finish_reason, error):
        """Takes the rarer news of an answer."""
        output = choice.output
        output.num_cached_tokens = num_cached_tokens
        output.num_preemptions = num_preemptions
        output.finish_reason = finish_reason
        output.error = error
        if logprobs:
            output.logprobs += logprobs
        if prompt_logprobs:
            output.prompt_logprobs = prompt_logprobs
        if choice.call.is_prompt_only:
            choice.drop_answer()
        if finish_reason:
            self.metrics.count_end(choice, now)
            self.num_unfinished -= 1
            del self.choices[choice.key]

    def wake(self):
        """Tells calls of their news. The pause between two wakings grows with the number of unfinished
        sequences: a chunk of ten tokens costs as much as a chunk of one, and all chunks have to fit."""
        self.is_waking = False
        self.last_waking = self.loop.time()
        for call in self.with_news:
            call.news.set()
        self.with_news.clear()

    def fail(self, reason):
        """Ends all calls: there will be no more news."""
        LOGGER.critical("the engine has failed: %s", reason)
        self.error = reason
        for call in self.calls:
            call.news.set()
        for number in list(self.compiling):
            self.take_grammar(number, None)

    def look_for_silence(self):
        """Gives up a worker that says nothing for too long: its step will not end."""
        silence = time.monotonic() - self.last_heard
        if self.choices and silence > STUCK_SECONDS and not self.error:
            self.fail(f"no step has ended for {silence:.0f} s")

    @property
    def trouble(self):
        """Why no request can be answered, as a RequestError; None if one can."""
        if self.error:
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

    def check_room(self, num_sequences):
        """Raises RequestError if too many sequences wait already."""
        num_waiting = self.num_unfinished - self.load[0]
        if num_waiting + num_sequences > self.max_waiting:
            raise RequestError(f"overloaded: {num_waiting} sequences wait already, of {self.max_waiting} at "
                               "most: try again later", 503, code="overloaded")

    async def in_thread(self, function, *arguments):
        """What the function returns. It runs in a thread of its own, and counts as a waiting sequence."""
        self.check_room(1)
        self.num_unfinished += 1
        try:
            return await asyncio.to_thread(function, *arguments)
        finally:
            self.num_unfinished -= 1

    async def submit(self, call):
        """Encodes the call's prompts, and gives them to the worker. Raises RequestError."""
        self.calls.add(call)
        self.check_room(call.num_choices)
        self.num_unfinished += call.num_choices
        try:
            if call.params.structured_outputs:
                await self.compile(call)
            if call.is_short:               # encoded in about the time that a thread takes to begin
                call.prepare()
            else:
                await asyncio.to_thread(call.prepare)
            if self.trouble:                # since complete() has looked
                raise self.trouble
            for choice in call.choices:
                choice.key = next(self.keys)
            self.tell_worker("add", [(choice.key, [call.id, choice.index], choice.output.prompt_token_ids,
                                      choice.params) for choice in call.choices])
        except BaseException:
            self.num_unfinished -= call.num_choices
            raise
        if not self.choices:
            self.last_heard = time.monotonic()      # an idle worker has nothing to say
        self.choices |= {choice.key: choice for choice in call.choices}

    async def compile(self, call):
        """Lets the worker make the call's grammar, which may take seconds. Raises RequestError."""
        number = next(self.keys)
        self.compiling[number] = self.loop.create_future()
        self.tell_worker("compile", number, call.params.structured_outputs)
        error = await self.compiling[number]
        if error:
            raise RequestError(error, param="tools" if call.tools else "response_format")

    def take_grammar(self, number, error):
        future = self.compiling.pop(number)
        if not future.done():               # the client may have gone
            future.set_result(error)

    def abort(self, call):
        """Gives the sequences up that have not ended."""
        if not call.is_final:
            self.tell_worker("abort", [choice.key for choice in call.choices])


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

    def count_first_token(self, choice, now):
        output = choice.output
        num_prompt = len(output.prompt_token_ids)
        self.counts["prompt_tokens"] += num_prompt
        self.counts["prefix_cache_queries"] += num_prompt
        self.counts["prefix_cache_hits"] += min(output.num_cached_tokens, num_prompt)
        self.counts["generation_tokens"] += len(output.token_ids)
        self.observe("time_to_first_token_seconds", now - choice.call.start)

    def count_gaps(self, gaps):
        """gaps: {seconds between two tokens of an answer: how many tokens came so}"""
        for gap, num_tokens in gaps.items():
            self.counts["generation_tokens"] += num_tokens
            self.observe("inter_token_latency_seconds", gap, num_tokens)

    def count_end(self, choice, now):
        self.reasons[choice.output.finish_reason] += 1
        self.counts["num_preemptions"] += choice.output.num_preemptions
        self.observe("e2e_request_latency_seconds", now - choice.call.start)

    def text(self, load, model_name):
        """All figures, at this moment. load: see Worker.hand_over."""
        label = f"model_name={JSON.encode(model_name)}"
        num_running, num_waiting, used = load
        lines = []

        def add(name, kind, *values):
            lines.append(f"# TYPE vllm:{name} {kind}")
            lines.extend(f"vllm:{name}{suffix}{{{label}{more}}} {value}" for suffix, more, value in values)
        add("num_requests_running", "gauge", ("", "", num_running))
        add("num_requests_waiting", "gauge", ("", "", num_waiting))
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


class PoolWatch:
    """Shows the page pool to watchers. There is one picture for all of them, from the worker."""

    def __init__(self, service):
        self.service = service
        self.num_watchers = 0
        self.next_time = 0.0                # of a picture; infinite while a picture is on its way
        self.event = ""                     # the latest picture, as a server-sent event

    def show(self, picture):
        self.event = f"data: {JSON.encode(picture)}\n\n"
        self.next_time = time.monotonic() + PICTURE_SECONDS

    async def events(self):
        """The stream of a watcher: each time the latest picture, if there is a new one. A slow watcher
        gets fewer."""
        sent = ""
        while not self.service.trouble:
            if time.monotonic() >= self.next_time:
                self.next_time = math.inf
                self.service.tell_worker("watch")
            await asyncio.sleep(PICTURE_SECONDS)
            if self.event != sent:
                sent = self.event
                yield sent

    async def __call__(self, scope, receive, send):
        """The response to a watcher, as an ASGI app. The last one who goes ends the recording."""
        self.num_watchers += 1
        try:
            headers = {"cache-control": "no-store"}
            await StreamingResponse(self.events(), 200, headers, "text/event-stream")(scope, receive, send)
        finally:
            self.num_watchers -= 1
            if not self.num_watchers:
                self.event = ""
                self.service.tell_worker("unwatch")


def is_local(client):
    """Whether a request comes from this machine. client: (address, port) or None, as in ASGI."""
    return bool(client and re.fullmatch(r"(::ffff:)?127(\.\d+){3}|::1", client[0]))


# --------------------------------------------------------------------------------------------------
# App: the endpoints, and who may use them
# --------------------------------------------------------------------------------------------------
class Endpoints:
    """The functions behind the paths."""

    def __init__(self, service):
        self.service = service

    def routes(self):
        functions = {                   # looked through in order: the paths of most requests first
            "POST /v1/chat/completions": partial(self.complete, ChatCall),
            "POST /v1/completions": partial(self.complete, TextCall),
            "GET /": self.page, "GET /debug/pool": self.pool,
            "GET /v1/models": self.models, "GET /v1/models/{name:path}": self.model,
            "GET /health": self.health, "GET /metrics": self.metrics, "GET /version": self.version,
            "POST /tokenize": self.tokenize, "POST /detokenize": self.detokenize}
        return [Route(name.split()[1], function, methods=name.split()[:1])
                for name, function in functions.items()]

    async def complete(self, kind, request):
        service = self.service
        body = await read_json(request, service.max_body)
        if service.trouble:
            raise service.trouble
        call = kind(service, body)
        call.is_short = int(request.headers.get("content-length", MEBIBYTE)) <= SHORT_BODY
        request.state.call = call           # for the log
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
        text = service.metrics.text(service.load, service.model_names[0])
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
        return self.service.pool_watch

    async def tokenize(self, request):
        """The token ids of a prompt or of messages."""
        llm = self.service.llm
        body = await read_json(request, self.service.max_body)
        self.service.model_name(body.get("model"))
        if body.get("messages") is not None:
            refuse_unsupported(body, NEUTRAL_CHAT_VALUES)
            ids = await self.service.in_thread(encode_chat, llm, body, read_tools(llm, body))
        else:
            prompt = want("prompt", body.get("prompt"), lambda prompt: isinstance(prompt, str), "a text")
            add_bos = flag(body, "add_special_tokens", True)
            ids = await self.service.in_thread(encode_text, llm, prompt, add_bos)
        return json_response({"tokens": ids, "count": len(ids), "max_model_len": llm.max_model_len})

    async def detokenize(self, request):
        """The text of token ids."""
        llm = self.service.llm
        body = await read_json(request, self.service.max_body)
        self.service.model_name(body.get("model"))
        last = llm.config.vocab_size - 1
        limit = llm.max_model_len
        ids = want("tokens", body.get("tokens"),
                   lambda ids: isinstance(ids, list) and len(ids) <= limit and all(
                       is_int(i, 0, last) for i in ids),
                   f"a list of {limit} token ids at most, from 0 to {last}")
        return json_response({"prompt": await self.service.in_thread(llm.tokenizer.decode, ids)})


def given_key(headers):
    """The API key of a request. A program sends Bearer KEY. A browser asks its user for a name and a
    password, and sends Basic and base64 of NAME:KEY with every request of the page."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.encode("latin-1")
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):       # no base64
            return base64.b64decode(value).partition(b":")[2]
    return b""


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
            response = self.explain(error).response
            if response.status_code == 401 and "text/html" in headers.get("accept", ""):
                response.headers["www-authenticate"] = 'Basic realm="tiny-vLLM"'
            await response(scope, receive, send_with_id)
        finally:
            self.log(scope, request_id, status or "gone", time.perf_counter() - start)

    def check(self, path, headers):
        """Raises RequestError for a request that nobody may make."""
        # A web page can make a browser call this server under the page's own name (DNS rebinding).
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self.hosts and host and host not in self.hosts:
            raise RequestError(f"Host: expected {' or '.join(self.hosts)}, since the server listens on "
                               f"loopback only, got {shown(host)}: start the server with another --host, or "
                               "let the proxy set Host: localhost", 403)
        is_open = not self.api_key or path == "/health"
        if not is_open and not hmac.compare_digest(given_key(headers), self.api_key.encode()):
            raise RequestError("Authorization: expected Bearer and the server's API key, or any name and the "
                               "key as the password", 401, code="invalid_api_key")

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
        if call and call.is_gone:
            status = "gone"
        if call and call.choices:
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
              allow_origins=(), hosts=(), pipe=None):
    """The ASGI app of an LLM, for uvicorn, Ray Serve or another host. Its lifespan runs the engine.

    model_names: what clients may call the model; the answers to a request without a name have the
    first. max_waiting: sequences without pages, more are refused. max_body: bytes. allow_origins: web
    pages that may use the server, "*" for all. hosts: what the Host header may say, () for anything.
    pipe: to the worker that steps the engine, see worker_process; None: the worker is a thread."""
    service = Service(llm, list(model_names), max_waiting, max_body, pipe)
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
class Connection(HttpToolsProtocol):
    """A connection that closes when the client does not send its request, or reads no answer. Nothing in
    ASGI can see such a client."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.begin = self.loop.time()       # of the request that is coming in; None: nothing is
        self.num_bytes = 0                  # of the request
        self.head = b""                     # of the request, as long as it is not whole
        self.has_head = False
        self.num_head_bytes = 0             # of all headers, also behind a body
        self.running = None                 # uvicorn's object for the request that is being answered
        self.num_unsent = 0                 # bytes of answers
        self.last_progress = self.begin     # when num_unsent was seen to change
        self.watch()

    def data_received(self, data):
        """Gives data to the parser, the header of a request as a whole."""
        self.num_bytes += len(data)
        if self.has_head:
            return super().data_received(data)
        self.begin = self.begin or self.loop.time()
        self.head += data
        end = self.head.find(b"\r\n\r\n") + 4
        is_whole = end >= 4
        if (end if is_whole else len(self.head)) > MAX_HEAD:
            self.send_400_response(f"the header: expected {MAX_HEAD} bytes or less")
        elif is_whole:
            # Java's client asks for HTTP/2 by Upgrade, and the parser would lose the body.
            data = UPGRADE.sub(b"", self.head[:end]) + self.head[end:]
            self.head = b""
            super().data_received(data)
        elif not self.head[:1].isalpha():       # no HTTP: the parser refuses it at once
            self.head = b""
            super().data_received(data)

    def on_message_begin(self):
        super().on_message_begin()
        self.begin = self.begin or self.loop.time()

    def on_header(self, name, value):
        self.num_head_bytes += len(name) + len(value)
        if self.num_head_bytes > MAX_HEAD:
            raise ValueError("too long a header")               # becomes a 400, like the next
        super().on_header(name, value)

    def on_headers_complete(self):
        self.has_head = True
        if self.parser.get_http_version() == "1.1" and b"host" not in dict(self.headers):
            raise ValueError("HTTP/1.1 asks for a Host")
        super().on_headers_complete()
        if not self.pipeline:
            self.running = self.cycle

    def on_message_complete(self):
        super().on_message_complete()
        self.begin = None
        self.num_bytes = 0
        self.has_head = False
        self.num_head_bytes = 0

    def on_response_complete(self):
        if self.pipeline:
            self.running = self.pipeline[-1][0]
        super().on_response_complete()

    def connection_lost(self, error):
        super().connection_lost(error)      # tells the newest request alone that its client has gone
        if self.running and not self.running.response_complete:
            self.running.disconnected = True
            self.running.message_event.set()

    def watch(self):
        """Looks at the connection now and then, until the connection is lost."""
        if self not in self.connections:
            return
        now = self.loop.time()
        if self.begin and self.flow.read_paused:
            self.begin = now                # it is the server that does not read
        num_unsent = self.transport.get_write_buffer_size()
        if num_unsent != self.num_unsent or not num_unsent:
            self.num_unsent = num_unsent
            self.last_progress = now
        late = self.begin and now - self.begin > REQUEST_SECONDS + self.num_bytes / MEBIBYTE
        if late or now - self.last_progress > WRITE_SECONDS:
            self.transport.abort()
        self.loop.call_later(REQUEST_SECONDS / 10, self.watch)

    def send_400_response(self, message):
        body = to_json(RequestError(message).body)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
                             b"connection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, but a signal lets the answers come to their ends."""

    def __init__(self, app, shutdown_timeout=30):
        # Clients keep a connection for up to 90 s: close an idle one later than they do.
        config = uvicorn.Config(app, http=Connection, ws="none", loop="asyncio", lifespan="on",
                                access_log=False, log_config=None, server_header=False, backlog=MAX_ACCEPTS,
                                timeout_keep_alive=120, timeout_graceful_shutdown=5)
        super().__init__(config)
        self.service = app.state.service
        self.shutdown_timeout = shutdown_timeout
        self.deadline = None
        self.exit_code = 0

    async def startup(self, sockets=None):
        """asyncio takes in `backlog` connections a turn, and lets no more wait: here, more may wait."""
        await super().startup(sockets)
        sockets[0].listen(2048)

    def handle_exit(self, number, frame):
        """The first signal: no new requests, and the others get time to end. The second: at once."""
        if self.service.is_draining:
            self.service.reading.cancel()   # and the wait for the worker's end
            self.should_exit = True
            self.force_exit = True
            self.exit_code = 128 + number
            logging.disable()               # each task that is cut off would show a traceback
        self.service.is_draining = True
        self.deadline = time.monotonic() + self.shutdown_timeout

    async def on_tick(self, counter):
        """Ten times a second."""
        service = self.service
        service.look_for_silence()
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
        help="info: a line for each POST (default); debug: for each request")
    EngineArgs.add_to(parser)
    args = parser.parse_args(argv)
    for name in "max_waiting", "max_body":
        check("--" + name.replace("_", "-"), getattr(args, name), is_int, "a whole number of 1 or more")
    check("--port", args.port, lambda port: is_int(port, 0, 65535), "a number from 0 to 65535")
    return args


def public_name(args, llm):
    """What clients call the model: the Hugging Face id, or the name of the folder."""
    default = "parrot" if llm.folder == FOLDER / "parrot" else HUB_MODEL
    name = args.model or os.environ.get("TINYVLLM_MODEL") or default
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name


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


def greeting(args, address, name, has_chat, device_name):
    """Where the server is, and what to try."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
    url = f"http://[{host}]:{address[1]}" if ":" in host else f"http://{host}:{address[1]}"
    key = ' -H "Authorization: Bearer $TINYVLLM_API_KEY"' if args.api_key else ""
    path = "chat/completions" if has_chat else "completions"
    body = ('{"messages": [{"role": "user", "content": "Who are you?"}]}' if has_chat
            else '{"prompt": "Once upon a time"}')
    password = " The page's password is the key, under any name." if args.api_key else ""
    return (f"tiny-vLLM: {name} at {url}/v1 on {device_name}. Try:\n"
            f"  curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d '{body}'\n"
            f"Or open {url} in a browser.{password}")


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
        # A dict, for each name once.
        hosts = dict.fromkeys(("localhost", "127.0.0.1", "[::1]", args.host.lower())) if is_loopback else ()
        with worker_process(EngineArgs.from_namespace(args)) as (inputs, device_name, num_blocks, pipe):
            names = args.served_model_name or [public_name(args, inputs)]
            app = build_app(inputs, names, args.api_key, args.max_waiting, args.max_body, args.allow_origin,
                            hosts, pipe)
            server = Server(app, args.shutdown_timeout)
            listener.listen()               # whoever follows the greeting waits a moment, and is not refused
            num_tokens = num_blocks * args.block_size
            print(f"KV cache: {num_blocks:,} pages of {args.block_size} tokens, {num_tokens:,} in all, room "
                  f"for {num_tokens // inputs.max_model_len:,} requests of {inputs.max_model_len:,} tokens",
                  greeting(args, address, names[0], inputs.tokenizer.has_chat_template, device_name),
                  sep="\n", file=sys.stderr, flush=True)
            server.run([listener])
    return 1 if server.service.error else server.exit_code


if __name__ == "__main__":
    run_program(main)
