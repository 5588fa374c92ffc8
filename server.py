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

completions.py knows the fields of requests and the shape of answers.
Sections: Engine thread, Metrics, Page, App, Process.
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
import os
import re
import socket
import sys
import threading
import time
from collections import Counter, deque
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

from completions import (JSON, ChatCall, Progress, RequestError, TextCall, encode_chat, encode_text, flag,
                         json_response, read_json, to_json, want)
from device import FOLDER, TinyVLLMError, check, is_int, shown
from tinyvllm import ArgumentParser, EngineArgs, __version__, open_llm, run_program
from views import Recorder, picture
from weights import HUB_MODEL

MEBIBYTE = 2**20
REQUEST_SECONDS = 10            # for a whole request to come in, and a second more for each MiB
WRITE_SECONDS = 60              # for a client to read anything at all
STUCK_SECONDS = 60              # a step that takes longer has failed
STOP_SECONDS = 10               # for the last step to end
LOGGER = logging.getLogger("tinyvllm.server")


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
            raise RequestError(f"overloaded: {num_waiting} sequences wait already, of {self.max_waiting} at "
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
        self.next_time = 0.0                # of a picture; infinite while a picture is on its way
        self.event = ""                     # the latest picture, as a server-sent event
        self.recorder = None                # of the engine thread

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
        self.next_time = time.monotonic() + PICTURE_SECONDS

    def stop(self, llm):
        if self.recorder in llm.engine.observers:
            llm.engine.observers.remove(self.recorder)
        self.recorder = None

    async def events(self):
        """The stream of a watcher: each time the latest picture, if there is a new one. A slow watcher
        gets fewer."""
        sent = ""
        while not self.service.trouble:
            if time.monotonic() >= self.next_time:
                self.next_time = math.inf
                self.service.tell_engine(self.look, self.service.llm)
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
                self.service.tell_engine(self.stop, self.service.llm)


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
        return self.pool_watch

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
        limit = llm.max_model_len
        ids = want("tokens", body.get("tokens"),
                   lambda ids: isinstance(ids, list) and len(ids) <= limit and all(
                       is_int(i, 0, last) for i in ids),
                   f"a list of {limit} token ids at most, from 0 to {last}")
        return json_response({"prompt": await asyncio.to_thread(llm.tokenizer.decode, ids)})


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
                               f"loopback only, got {shown(host)}: start it with another --host", 403)
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

    def __init__(self, app, shutdown_timeout=30):
        # Clients keep a connection for up to 90 s: close an idle one later than they do.
        config = uvicorn.Config(app, http=Connection, ws="none", loop="asyncio", lifespan="on",
                                access_log=False, log_config=None, server_header=False, backlog=2048,
                                timeout_keep_alive=120, timeout_graceful_shutdown=5)
        super().__init__(config)
        self.service = app.state.service
        self.shutdown_timeout = shutdown_timeout
        self.deadline = None
        self.exit_code = 0

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


def greeting(args, address, name, llm):
    """Where the server is, and what to try."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
    url = f"http://[{host}]:{address[1]}" if ":" in host else f"http://{host}:{address[1]}"
    key = ' -H "Authorization: Bearer $TINYVLLM_API_KEY"' if args.api_key else ""
    path = "chat/completions" if llm.tokenizer.has_chat_template else "completions"
    body = ('{"messages": [{"role": "user", "content": "Who are you?"}]}' if path.startswith("chat")
            else '{"prompt": "Once upon a time"}')
    password = " The page's password is the key, under any name." if args.api_key else ""
    return (f"tiny-vLLM: {name} at {url}/v1 on {llm.device.name}. Try:\n"
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
        llm = open_llm(EngineArgs.from_namespace(args))
        names = args.served_model_name or [public_name(args, llm)]
        hosts = ("localhost", "127.0.0.1", "[::1]", args.host.lower()) if is_loopback else ()
        app = build_app(llm, names, args.api_key, args.max_waiting, args.max_body, args.allow_origin, hosts)
        server = Server(app, args.shutdown_timeout)
        listener.listen()                   # whoever follows the greeting waits a moment, and is not refused
        print(greeting(args, address, names[0], llm), file=sys.stderr, flush=True)
        server.run([listener])
        app.state.service.stop()
    return 1 if server.service.error else server.exit_code


if __name__ == "__main__":
    run_program(main)
