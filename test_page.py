"""The server's page and its stream of the page pool.

The page runs in headless chromium, which is told by the DevTools protocol what to type and to press.
Servers are processes of their own, with Parrot in the simulator. The stream alone is read from the
app without a server.

    a browser    the page    the stream
"""
import asyncio
import contextlib
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

import server
import views
from reference import PARROT, ROOT
from tinyvllm import LLM, SamplingParams

CHROMIUM = shutil.which("chromium")
SECONDS = 60                    # until something that must happen counts as never happening
PARROT_TEXTS = json.loads((PARROT / "texts.json").read_text("utf-8"))
ANSWERS = {question: "\n".join(text["answer"]) for text in PARROT_TEXTS for question in text["questions"]}
TYPED = "Recite Goethe's Night Song."


# --------------------------------------------------------------------------------------------------
# A browser
# --------------------------------------------------------------------------------------------------
class Browser:
    """Chromium with one tab, over a pair of pipes. A message is JSON with a zero byte at its end."""

    def __init__(self, folder, width=1280, height=800, dark=False):
        commands, self.commands = os.pipe()
        self.messages, messages = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                   f"--user-data-dir={folder}", "--no-first-run"]
        shell = f'exec "$0" "$@" 3<&{commands} 4>&{messages}'
        self.process = subprocess.Popen(["bash", "-c", shell, CHROMIUM, *options],
                                        pass_fds=(commands, messages), stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(messages)
        self.received = b""
        self.num_sent = 0
        self.session = {}
        self.events = []        # (method, parameters) of what the tab tells by itself
        self.password = None    # what the user types when the browser asks for a name and a password
        self.num_asked = 0      # how often it has asked
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        for domain in "Page", "Runtime", "Network", "Log":
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def read(self):
        """The next message."""
        while b"\0" not in self.received:
            assert select.select([self.messages], [], [], SECONDS)[0], "chromium is silent"
            data = os.read(self.messages, 65536)
            assert data, "chromium has ended"
            self.received += data
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def send(self, method, **parameters):
        """The result of a command."""
        number = self.post(method, parameters)
        while True:
            answer = self.read()
            if answer.get("id") == number:
                assert "result" in answer, answer
                return answer["result"]
            if "method" in answer:
                self.events.append((answer["method"], answer["params"]))
                self.authenticate(*self.events[-1])

    def post(self, method, parameters):
        """The number of a command on its way."""
        self.num_sent += 1
        message = {"id": self.num_sent, "method": method, "params": parameters} | self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        return self.num_sent

    def authenticate(self, method, event):
        """Does what the browser's user does when the browser asks for a name and a password."""
        if method == "Fetch.requestPaused":
            self.post("Fetch.continueRequest", {"requestId": event["requestId"]})
        if method == "Fetch.authRequired":
            assert event["authChallenge"]["scheme"] == "basic"
            self.num_asked += 1
            answer = {"response": "ProvideCredentials", "username": "anyone", "password": self.password}
            self.post("Fetch.continueWithAuth", {"requestId": event["requestId"],
                                                 "authChallengeResponse": answer})

    def value(self, expression):
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression):
        """Waits until a JavaScript expression is true, and returns its value."""
        end = time.monotonic() + SECONDS
        while not (value := self.value(expression)):
            assert time.monotonic() < end, (expression, self.value("document.body.innerText"))
            time.sleep(0.05)
        return value

    def open(self, url):
        self.send("Page.navigate", url=url)
        self.wait_for("document.readyState == 'complete' && location.href != 'about:blank'")

    def press(self, key, code, text="", modifiers=0):
        """A key goes down and up. modifiers: 8 is Shift."""
        key = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **key)
        self.send("Input.dispatchKeyEvent", type="keyUp", **key)

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.commands)
        os.close(self.messages)


@contextlib.contextmanager
def serving(*options):
    """The address of a server process, which must survive, and end well at SIGTERM."""
    command = [sys.executable, ROOT / "server.py", "--model", PARROT, "--device", "cpu", "--port", "0"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if found := re.search(r"(http://127.0.0.1:\d+)/v1 ", line):
                break
        yield found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0, process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@contextlib.contextmanager
def browsing(url, folder, password=None, **options):
    """A browser with the page open. The page may ask for nothing elsewhere, and complain of nothing."""
    browser = Browser(folder, **options)
    try:
        if password:
            browser.password = password
            browser.send("Fetch.enable", handleAuthRequests=True)
        browser.send("Page.navigate", url=url)
        browser.wait_for("document.readyState == 'complete' && location.href != 'about:blank'")
        yield browser
        browser.value("0")          # the events until now
        for method, event in browser.events:
            if method == "Network.requestWillBeSent":
                assert event["request"]["url"].startswith((f"{url}/", "data:")), event
            is_complaint = method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled") or (
                method == "Log.entryAdded" and event["entry"]["level"] != "verbose")
            assert not is_complaint, event
    finally:
        browser.close()


def get(url, **headers):
    """(status, headers, text)"""
    try:
        with urlopen(Request(url, headers=headers), timeout=SECONDS) as response:
            return response.status, response.headers, response.read().decode()
    except HTTPError as error:
        return error.code, error.headers, error.read().decode()


def metric(url, name):
    return float(re.search(rf"^vllm:{name}\{{.*\}} (.+)$", get(f"{url}/metrics")[2], re.M)[1])


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def url():
    with serving() as address:
        yield address


needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium")
TEXTS = "[...document.querySelectorAll('.answer .text')].map(text => text.textContent)"
NUM_USED = "document.querySelectorAll('#map .used, #map .shared').length"


def ask(browser, question):
    """Types a question into the box, and presses Enter."""
    browser.value("find('text').focus()")
    browser.send("Input.insertText", text=question)
    browser.press("Enter", 13, "\r")


@needs_chromium
def test_page_streams(url, tmp_path):
    """The text grows to Parrot's answer, and pages fill meanwhile. The account below has the engine's
    figures. A second question finds the pages of the first."""
    with browsing(url, tmp_path) as browser:
        browser.wait_for("!find('engine').hidden && find('model').textContent.startsWith('parrot, ')")
        browser.value("find('temperature').value = 0")
        ask(browser, TYPED)
        lengths = set()
        most_used = 0
        while browser.value("running !== null"):
            lengths.add(browser.value(f"{TEXTS}[0].length"))
            most_used = max(most_used, browser.value(NUM_USED))
        assert browser.value(TEXTS) == [ANSWERS[TYPED]]
        assert len(lengths) > 3 and most_used > 2
        account = browser.wait_for("document.querySelector('.account span')?.textContent")
        counts = re.fullmatch(r"first token after .+: .+ queued, .+ prefill \((\d+) tokens, 0 cached\) "
                              r"· then \d+ tokens a second, (\d+) in all", account).groups()
        assert int(counts[0]) == metric(url, "prompt_tokens_total")
        assert int(counts[1]) == metric(url, "generation_tokens_total")
        browser.wait_for(f"{NUM_USED} == 0")
        assert browser.value("document.querySelectorAll('#map .cached').length") > 2
        ask(browser, "Recite Basho's frog.")
        browser.wait_for("document.querySelectorAll('.account span').length == 2")
        assert browser.value(f"{TEXTS}[1]") == ANSWERS["Recite Basho's frog."]
        account = browser.value("document.querySelectorAll('.account')[1].textContent")
        num_found = int(re.search(r"(\d+) cached", account)[1])
        assert num_found == metric(url, "prefix_cache_hits_total") > 0


@needs_chromium
def test_page_stops(url, tmp_path):
    """Escape and the button stop an answer: its pages are free at once, in the picture and in the
    server's own figures. Markup in a question is text, and Shift with Enter begins a line."""
    poem = ANSWERS["Recite The Raven."]
    with browsing(url, tmp_path, width=390, dark=True) as browser:
        browser.wait_for("!find('engine').hidden")
        browser.value("find('temperature').value = 0")
        for stop in "browser.press('Escape', 27)", "browser.value(\"find('stop').click()\")":
            ask(browser, "Recite The Raven.")
            browser.wait_for(f"{NUM_USED} > 2 && {TEXTS}.at(-1).length > 40")
            assert browser.value("document.documentElement.scrollWidth") <= 390
            eval(stop)
            browser.wait_for(f"running === null && {NUM_USED} == 0")
            text = browser.value(f"{TEXTS}.at(-1)")
            assert poem.startswith(text) and 40 < len(text) < len(poem)
            assert metric(url, "num_requests_running") == metric(url, "kv_cache_usage_perc") == 0
            browser.value("find('new').click()")
        browser.send("Input.insertText", text="<img src=x onerror=alert(1)>")
        browser.press("Enter", 13, "\r", 8)
        browser.send("Input.insertText", text="<b>")
        browser.press("Enter", 13, "\r")
        browser.wait_for("running !== null")
        browser.press("Escape", 27)
        shown = browser.value("document.querySelector('.question span').textContent")
        assert shown == "<img src=x onerror=alert(1)>\n<b>"
        assert browser.value("document.querySelectorAll('#log img, .question b').length") == 0


@needs_chromium
def test_page_asks_eight_at_once(url, tmp_path):
    """Eight requests run in the same steps, each answer in its own place, and the eight share the
    pages of the conversation so far."""
    with browsing(url, tmp_path) as browser:
        browser.wait_for("!find('engine').hidden")
        browser.value("find('temperature').value = 0")
        ask(browser, TYPED)
        browser.wait_for("running === null")
        browser.value("find('max_tokens').value = 12")
        browser.value("find('eight').click()")
        browser.wait_for("document.querySelectorAll('#rows p').length == 8")
        browser.wait_for("[...document.querySelectorAll('#map .shared')].some(page => page.textContent == 8)")
        browser.wait_for("find('work').textContent.includes(' 8 decode + 0 prefill tokens')")
        browser.wait_for("document.querySelectorAll('.account span').length == 9")
        questions = browser.value("EIGHT")
        for question, text in zip(questions, browser.value(TEXTS)[1:]):
            assert len(text) > 20 and ANSWERS[question].startswith(text)
        names = "[...document.querySelectorAll('.eight .name')].map(name => name.textContent)"
        assert browser.value(names) == list("BCDEFGHI")


@needs_chromium
def test_page_with_a_key(tmp_path):
    """The browser asks its user for the key, once, and sends the key with all that the page asks for.
    Where the engine is not seen, the page's own times stand below an answer."""
    with serving("--api-key", "sesame") as url, browsing(url, tmp_path, "sesame") as browser:
        browser.wait_for("!find('engine').hidden && find('model').textContent.startsWith('parrot, ')")
        browser.value("watching.abort(); find('engine').hidden = true; find('temperature').value = 0")
        ask(browser, "Recite Basho's frog.")
        account = browser.wait_for("document.querySelector('.account span')?.textContent")
        assert browser.value(TEXTS) == [ANSWERS["Recite Basho's frog."]]
        assert re.match(r"first token after .+, as this page measured \(\d+ tokens, 0 cached\)", account)
        assert browser.num_asked == 1


def test_page_for_browsers_only(url):
    """curl gets a line of text. A foreign name of this machine, as in DNS rebinding, opens nothing."""
    status, headers, text = get(url, Accept="*/*")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    assert text.count("\n") == 1 and "/v1/chat/completions" in text
    status, headers, text = get(url, Accept="text/html,application/xhtml+xml,*/*;q=0.8")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert text == (ROOT / "server.html").read_text("utf-8")
    assert "default-src 'none'" in headers["content-security-policy"]
    for path in "/", "/debug/pool":
        assert get(url + path, Host="evil.example")[0] == 403


# --------------------------------------------------------------------------------------------------
# The stream
# --------------------------------------------------------------------------------------------------
class Client:
    """A client that calls the app itself, and takes no message before it is told to."""

    def __init__(self, app, path="/debug/pool", body=None, address=("127.0.0.1", 1)):
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST" if body else "GET", "path": path, "query_string": b"",
                 "headers": headers, "http_version": "1.1", "client": address,
                 "asgi": {"version": "3.0", "spec_version": "2.3"}}
        self.body = json.dumps(body).encode()
        self.messages = asyncio.Queue(1)
        self.is_gone = asyncio.Event()
        self.task = asyncio.create_task(app(scope, self.receive, self.messages.put))

    async def receive(self):
        if self.body:
            body = self.body
            self.body = b""
            return {"type": "http.request", "body": body}
        await self.is_gone.wait()
        return {"type": "http.disconnect"}

    async def read(self):
        """The status of the answer, or the JSON in the next part of its body."""
        message = await asyncio.wait_for(self.messages.get(), SECONDS)
        if message["type"] == "http.response.start":
            return message["status"]
        return json.loads(message["body"].removeprefix(b"data: "))

    async def leave(self):
        self.is_gone.set()
        await asyncio.wait_for(self.task, SECONDS)


def in_app(test):
    """Runs test(app, llm), a coroutine, beside a worker in a thread."""
    async def run():
        llm = LLM(PARROT, device="cpu", num_blocks=200)
        app = server.build_app(llm)
        async with app.state.service.lifespan(app):
            await test(app, llm)
    asyncio.run(run())


@pytest.mark.parametrize("address, status", [
    (("127.0.0.1", 5), 200), (("::1", 5), 200), (("::ffff:127.0.0.2", 5), 200), (("10.0.0.1", 5), 403),
    (("::ffff:10.0.0.1", 5), 403), (("localhost.evil.example", 5), 403), (None, 403)])
def test_pool_is_for_loopback_only(address, status):
    async def test(app, llm):
        client = Client(app, address=address)
        assert await client.read() == status
        answer = await client.read()
        assert answer["num_blocks"] == 200 if status == 200 else "own machine" in answer["error"]["message"]
        await client.leave()
    in_app(test)


def test_pool_is_recorded_only_while_watched():
    """One Recorder serves all watchers, and none is left after the last. An idle engine takes no steps
    for them, and the stream says nothing twice."""
    async def test(app, llm):
        observers = llm.engine.observers
        assert observers == []
        watchers = [Client(app), Client(app)]
        for watcher in watchers:
            assert await watcher.read() == 200
            assert (await watcher.read())["cells"] == [0] * 64
        [recorder] = observers
        assert isinstance(recorder, views.Recorder)
        await asyncio.sleep(5 * server.PICTURE_SECONDS)
        assert all(watcher.messages.empty() for watcher in watchers) and not recorder.events
        await watchers[0].leave()
        await asyncio.sleep(2 * server.PICTURE_SECONDS)
        assert observers == [recorder]
        await watchers[1].leave()
        end = time.monotonic() + SECONDS
        while observers:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
    in_app(test)


def test_pool_has_no_backlog_and_no_text():
    """A watcher that reads nothing during a request then gets two old pictures at most, and the latest,
    with the request's account. No picture has a word of the prompt or of the answer."""
    async def test(app, llm):
        watcher = Client(app)
        assert await watcher.read() == 200
        client = Client(app, "/v1/chat/completions", {
            "messages": [{"role": "user", "content": TYPED}], "temperature": 0})
        assert await client.read() == 200
        answer = await client.read()
        assert answer["choices"][0]["message"]["content"] == ANSWERS[TYPED]
        await asyncio.sleep(3 * server.PICTURE_SECONDS)
        pictures = [await watcher.read()]
        while not pictures[-1]["finished"]:
            pictures.append(await watcher.read())
        assert len(pictures) <= 3
        [row] = pictures[-1]["finished"]
        assert (row["name"], row["letters"], row["state"]) == ([answer["id"], 0], "A", "done")
        usage = answer["usage"]
        counts = row["prompt"], row["answer"], row["found"], row["pages"]
        assert counts == (usage["prompt_tokens"], usage["completion_tokens"], 0, 0)
        assert row["account"]["prefill"] > 0 and row["account"]["decode"] > 0
        assert set(row) == {"name", "letters", "number", "state", "pages", "shared", "prompt", "found",
                            "answer", "account"}
        words = set(re.findall("[a-z]{3,}", TYPED + ANSWERS[TYPED]))
        assert not words & set(re.findall("[a-z]{3,}", json.dumps(pictures)))
        await watcher.leave()
        await client.leave()
    in_app(test)


def assert_picture(recorder, owners, max_cells):
    """The cells are the pages of the allocator. owners: for each page the numbers of its requests.
    A cell of several pages shows the page with the most owners."""
    allocator = recorder.allocator
    picture = views.picture(recorder, {})
    each = math.ceil(len(owners) / max_cells)
    groups = [range(first, min(first + each, len(owners))) for first in range(0, len(owners), each)]
    assert picture["pages_a_cell"] == each and len(picture["cells"]) == len(groups)
    for cell, group in zip(picture["cells"], groups):
        most = max(len(owners[page]) for page in group)
        if most:
            assert len(cell) == most and set(cell) in [owners[page] for page in group]
        else:
            is_cached = any(page in allocator.free and page in allocator.chains for page in group)
            assert cell == (-1 if is_cached else 0)
    assert picture["used"] == sum(map(bool, owners)) == len(owners) - len(allocator.free)
    assert picture["shared"] == sum(len(numbers) > 1 for numbers in owners)
    assert picture["cached"] == sum(page in allocator.chains for page in allocator.free)
    return picture


def test_picture(monkeypatch):
    """The picture between two steps is the engine's: owners, shared and cached pages, in a pool that is
    too small for all requests at once."""
    llm = LLM(PARROT, device="cpu", num_blocks=14, max_num_batched_tokens=40)
    recorder = views.Recorder(llm, keep=2)
    llm.engine.observers.append(recorder)
    system = {"role": "system", "content": "You are a helpful assistant. You answer every question well."}
    prompts = [llm.tokenizer.chat([system, {"role": "user", "content": f"What is {thing}?"}])
               for thing in ("a token", "decode", "prefill", "attention")]
    outputs = llm.submit(prompts, SamplingParams(max_tokens=24))
    numbers = {id(output): number for number, output in enumerate(outputs, 1)}
    scheduler = llm.engine.scheduler
    seen = set()
    while llm.engine.sequences or llm.engine.in_flight:
        llm.engine.step()
        owners = [set() for _ in range(14)]
        for sequence in scheduler.running:
            for page in sequence.block_table:
                owners[page].add(numbers[id(sequence.output)])
        for max_cells in 5, 1024:
            monkeypatch.setattr(views, "MAX_CELLS", max_cells)
            picture = assert_picture(recorder, owners, max_cells)
        seen |= {"used" if isinstance(cell, list) else cell for cell in picture["cells"]}
        seen |= {"shared"} if picture["shared"] else set()
        assert picture["running"] == len(scheduler.running) and picture["waiting"] == len(scheduler.waiting)
        pages = {numbers[id(sequence.output)]: len(sequence.block_table) for sequence in scheduler.running}
        assert {row["number"]: row["pages"] for row in picture["requests"] if row["pages"]} == pages
    assert seen == {"used", "shared", 0, -1}
    assert len(picture["finished"]) == 2 and picture["requests"] == []
    assert picture["num_tokens"] == sum(len(output.token_ids) for output in outputs) == 4 * 24
