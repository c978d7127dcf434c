"""The page in headless Chromium, with tiny models: what a user does, and what a hostile one tries."""

from __future__ import annotations

import io
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_export import model_config, write_llm, write_picture, write_run

from vlm.chat.web import RunningPage, WebOptions, serve
from vlm.chat.web_guard import COOKIE
from vlm.chat.web_models import ModelStore, find_exports
from vlm.data.config import SourceConfig
from vlm.data.conversation import IMAGE
from vlm.data.records import parse_record
from vlm.export.weights import export_run
from vlm.models.generate import GenerationSettings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)"),
]
WAIT = 60_000  # milliseconds; two busy cores
LEAK = re.compile(r"0x[0-9a-f]{4}|/tmp|/home|/root|Traceback|PIL|\.py")
SENTENCE = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("web")
    write_llm(root / "llm", max_positions=100_000)
    for seed, name in enumerate(("first", "second"), 1):
        write_run(root / "runs" / name, model_config(root), seed=seed)
        export_run(root / "runs" / name)
    for seed, name in enumerate(("cat.png", "dog.png", "example.png"), 1):
        write_picture(root / name, seed=seed)
    return root


@pytest.fixture(scope="module")
def running(root: Path) -> Iterator[RunningPage]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
            patch.setenv(name, "")  # what `serve` sets is undone at the end
        models = ModelStore(find_exports(None, root / "runs"), device="cpu")
        options = WebOptions(
            port=0,
            max_file_mb=20,
            settings=GenerationSettings(max_new_tokens=12),
            examples=(("Which animal?", root / "example.png"), ("Hello there", None)),
        )
        running = serve(models, options)
        yield running
        running.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """A user in a browser of their own."""

    def __init__(self, chromium: Any, url: str, **context: Any) -> None:
        self.context = chromium.new_context(**({"locale": "en-US"} | context))
        self.context.set_default_timeout(WAIT)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.url = url
        self.open()

    def open(self) -> None:
        self.page.goto(self.url)
        self.page.wait_for_selector("#box textarea:not([placeholder=''])")
        self.page.wait_for_function("document.documentElement.dataset.started === 'yes'")

    def add(self, *files: Path | dict[str, Any]) -> None:
        self.page.set_input_files("#box input[type=file]", list(files))

    def attach(self, *files: Path) -> None:
        """Add pictures and wait until they are there."""
        self.add(*files)
        self.page.wait_for_function(f"document.querySelectorAll('#box img').length === {len(files)}")

    def type(self, text: str) -> None:
        self.page.fill("#box textarea", text)
        self.page.press("#box textarea", "Enter")

    def ask(self, text: str, *files: Path) -> str:
        before = len(self.stats())
        if files:
            self.attach(*files)
        self.type(text)
        self.answered(before + 1)
        return self.stats()[-1]

    def answered(self, count: int) -> None:
        """Wait for the n-th answer to be complete and the box to be ready."""
        self.page.wait_for_function(f"document.querySelectorAll('#chat .stats').length === {count}")
        self.ready()

    def ready(self) -> None:
        self.page.wait_for_selector("#box button[data-name=Submit]")

    def click(self, name: str, nth: int = -1) -> None:
        buttons = self.page.locator(f"#chat button[data-name='{name}']:visible")
        buttons.nth(nth if nth >= 0 else buttons.count() - 1).click()

    def stats(self) -> list[str]:
        return self.page.locator("#chat .stats").all_inner_texts()

    def questions(self) -> list[str]:
        texts = self.page.locator("#chat [data-testid=user] .md, #chat [data-testid=user] .prose").all_inner_texts()
        return list(dict.fromkeys(text.strip() for text in texts))

    def pictures(self) -> list[str]:
        return [image.get_attribute("src") for image in self.page.locator("#chat img").all()]

    def toast(self) -> str:
        self.page.wait_for_selector(".toast-text, .toast-body")
        return self.page.locator(".toast-body").first.inner_text()

    def notice(self) -> str:
        """Why the page refused something; waits for it."""
        self.page.wait_for_selector("#notice [role=alert]")
        return self.page.inner_text("#notice")

    def set_length(self, tokens: int) -> None:
        self.page.locator("#set-max_new_tokens input[type=number]").evaluate(
            "(input, value) => { input.value = value;"
            " for (const name of ['input', 'change', 'blur']) input.dispatchEvent(new Event(name)); }",
            tokens,
        )

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def visit(chromium: Any, running: RunningPage) -> Iterator[Callable[..., Page]]:
    pages: list[Page] = []

    def visit(**context: Any) -> Page:
        pages.append(Page(chromium, running.url, **context))
        return pages[-1]

    yield visit
    for page in pages:
        page.close()


def test_upload_ask_and_see_the_answer_with_its_numbers(visit: Callable[..., Page], root: Path):
    user = visit()
    stats = user.ask("What is this?", root / "cat.png", root / "dog.png")
    assert re.fullmatch(r"first · \d+ tokens · .+ s · \d+ tokens/s · first after .+ s( · cut at .+)?", stats)
    assert len(user.pictures()) == 2
    assert "What is this?" in user.page.inner_text("#chat")
    assert user.page.input_value("#box textarea") == ""
    assert user.page.locator("#box img").count() == 0
    assert user.problems == []


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """The address of another server, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_nothing_is_asked_of_any_other_machine(
    visit: Callable[..., Page], running: RunningPage, root: Path, elsewhere: tuple[str, list[str]]
):
    user = visit()
    url, asked = elsewhere
    user.ask(f"![x]({url}/1.png) <img src='{url}/2.png'> <script>fetch('{url}/3')</script>", root / "cat.png")
    user.page.wait_for_timeout(1000)
    assert asked == []  # a text cannot make the page ask for it
    own = (running.url, "data:", "blob:")
    assert [address for address in user.requests if not address.startswith((*own, url))] == []
    assert len(user.requests) > 20


def test_the_answer_streams_and_stop_keeps_what_was_written(visit: Callable[..., Page]):
    user = visit()
    user.ask("Hello")
    user.set_length(4096)
    user.type(SENTENCE)
    user.page.wait_for_selector("#box button[data-name=Stop]")
    sizes = set()
    while len(sizes) < 3:
        sizes.add(len(user.page.inner_text("#chat")))
        user.page.wait_for_timeout(100)
    user.page.click("#box button[data-name=Stop]")
    user.answered(2)
    assert user.stats()[1].endswith("stopped")
    tokens = int(re.search(r"(\d+) tokens", user.stats()[1]).group(1))
    assert 0 < tokens < 4000
    user.set_length(4)
    user.ask("And now?")  # the next answer is not stopped
    assert not user.stats()[2].endswith("stopped")


def test_retry_undo_and_edit(visit: Callable[..., Page], root: Path):
    user = visit()
    user.ask("First question", root / "cat.png")
    user.ask("Second question")
    user.click("Retry")
    user.page.wait_for_function("document.querySelectorAll('#chat .stats').length === 1")
    user.answered(2)
    assert "Second question" in user.page.inner_text("#chat")
    user.click("Undo")
    user.page.wait_for_function("document.querySelectorAll('#chat .stats').length === 1")
    assert user.page.input_value("#box textarea") == "Second question"
    assert "Second question" not in user.page.inner_text("#chat")
    user.click("Edit")
    user.page.locator("#chat textarea").last.fill("Edited question")
    user.click("Submit")
    user.page.wait_for_function("document.querySelector('#chat').innerText.includes('Edited question')")
    user.answered(1)
    assert "First question" not in user.page.inner_text("#chat")
    assert len(user.pictures()) == 1  # the picture stayed
    user.page.fill("#box textarea", "")
    user.click("Undo")
    user.page.wait_for_function("document.querySelectorAll('#box img').length === 1")
    assert user.page.input_value("#box textarea") == "Edited question"


def test_clear_begins_a_new_conversation(visit: Callable[..., Page], root: Path):
    user = visit()
    user.ask("What is this?", root / "cat.png")
    user.page.click("#clear")
    user.page.wait_for_selector("#chat .example")
    assert user.stats() == []
    user.ask("Hello")
    assert user.pictures() == []


def test_another_model_goes_on(visit: Callable[..., Page]):
    user = visit()
    assert user.ask("Hello").startswith("first")
    open_panel(user)
    user.page.click("#model input")
    user.page.locator("#model [role=option]").filter(has_text="second").click()
    seen = user.page.evaluate_handle(
        "() => { const seen = []; new MutationObserver(() => { const bar = document.querySelector('#chat progress');"
        " if (bar) seen.push(bar.value); }).observe(document.body, {subtree: true, childList: true, attributes: true});"
        " return seen; }"
    )
    assert user.ask("Hello again").startswith("second")
    assert user.stats()[0].startswith("first")
    assert seen.json_value()  # the bar was there while it loaded


def test_all_texts_change_with_the_language_and_stay_so(visit: Callable[..., Page]):
    user = visit()
    user.ask("Hello")
    english = texts(user)
    assert not any(re.search("[一-鿿]", text) for text in english - {"中文"})
    user.page.click("#language")
    user.page.wait_for_function("document.documentElement.lang === 'zh'")
    user.page.wait_for_timeout(600)
    left = {text for text in texts(user) & english if re.search("[A-Za-z]{2}", text)}
    assert left <= {"Hello", "first", "Top-p", "Top-k", *user.page.locator("#chat .md").all_inner_texts()}
    assert "个词元" in user.stats()[0]
    user.open()  # a reload remembers
    assert user.page.inner_text("#language").strip() == "English"
    user.page.click("#language")
    user.page.wait_for_function("document.documentElement.lang === 'en'")


def texts(user: Page) -> set[str]:
    """Every text and name of a button that a reader meets."""
    found = user.page.evaluate(
        "() => [...document.querySelectorAll('button, label, h2, textarea, small, .md, span, .info')]"
        ".flatMap(e => [e.title, e.placeholder, e.getAttribute('aria-label'),"
        " e.children.length ? '' : e.textContent]).filter(Boolean).map(text => text.trim())"
    )
    return {text for text in found if text}


def test_a_chinese_browser_sees_chinese(visit: Callable[..., Page]):
    user = visit(locale="zh-CN")
    assert user.page.inner_text("#clear").strip() == "新对话"
    user.page.wait_for_function("document.querySelector('#box button[title=\"提交\"]') !== null")


def test_an_example_is_asked_at_once(visit: Callable[..., Page], root: Path):
    user = visit()
    user.page.locator("#chat .example").first.click()
    user.answered(1)
    assert "Which animal?" in user.page.inner_text("#chat")
    (source,) = user.pictures()
    assert user.page.request.get(source).body() == (root / "example.png").read_bytes()
    assert str(root) not in user.page.content()


def test_the_conversation_is_saved_as_a_training_record(visit: Callable[..., Page], root: Path):
    user = visit()
    open_panel(user)
    user.page.fill("#system textarea", "Be brief.")
    user.page.click("#save")
    assert "There is no answer to save yet." in user.notice()
    user.ask("What is this?", root / "cat.png")
    with user.page.expect_download() as download:
        user.page.click("#save")
    assert download.value.suggested_filename == "conversation.jsonl"
    record = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    conversation = parse_record(record, SourceConfig(path="x"))
    assert [turn.role for turn in conversation.turns] == ["system", "user", "assistant"]
    assert conversation.turns[1].parts == (IMAGE, "\nWhat is this?")
    assert conversation.images == ((root / "cat.png").read_bytes(),)


def open_panel(user: Page) -> None:
    if user.page.locator("#panel.open").count() == 0:
        user.page.click("#panel .toggle-button")
        user.page.wait_for_selector("#panel.open")


def test_dark_and_light_are_remembered(visit: Callable[..., Page]):
    user = visit(color_scheme="dark")
    is_dark = "document.body.classList.contains('dark')"
    assert user.page.evaluate(is_dark)
    user.page.click("#theme")
    assert not user.page.evaluate(is_dark)
    user.open()
    assert not user.page.evaluate(is_dark)


def test_a_phone_shows_all_of_it(visit: Callable[..., Page], root: Path):
    user = visit(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    user.ask("What is this?", root / "cat.png")
    assert user.page.evaluate("document.documentElement.scrollWidth") <= 390
    for selector in ("#box textarea", "#clear", "#language", "#theme", "#box button[data-name=Submit]"):
        box = user.page.locator(selector).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        assert box["y"] + box["height"] <= 844
    open_panel(user)
    user.page.wait_for_timeout(600)  # it slides in
    box = user.page.locator("#model").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390


# What must not happen


def cookie_of(user: Page) -> str:
    return next(cookie["value"] for cookie in user.context.cookies() if cookie["name"] == COOKIE)


def upload(url: str, name: str, content: bytes, owner: str | None = None) -> httpx.Response:
    cookies = {COOKIE: owner} if owner else {}
    return httpx.post(f"{url}gradio_api/upload", files={"files": (name, io.BytesIO(content))}, cookies=cookies)


def test_two_browsers_at_once_see_nothing_of_each_other(visit: Callable[..., Page], root: Path):
    anna, bert = visit(), visit()
    anna.attach(root / "cat.png")
    bert.attach(root / "dog.png")
    anna.type("Anna asks")
    bert.type("Bert asks")
    anna.answered(1)
    bert.answered(1)
    for count in (2, 3):  # both go on, each with its own history
        anna.type("Anna goes on")
        bert.type("Bert goes on")
        anna.answered(count)
        bert.answered(count)
    assert "Bert" not in anna.page.content()
    assert "Anna" not in bert.page.content()
    (of_anna,), (of_bert,) = anna.pictures(), bert.pictures()
    assert anna.page.request.get(of_anna).body() == (root / "cat.png").read_bytes()
    assert bert.page.request.get(of_bert).body() == (root / "dog.png").read_bytes()
    assert bert.page.request.get(of_anna).status == 403
    assert httpx.get(of_anna).status_code == 403


def test_a_message_that_names_anothers_picture_is_refused(
    visit: Callable[..., Page], running: RunningPage, root: Path, capfd: pytest.CaptureFixture[str]
):
    anna, bert = visit(), visit()
    anna.ask("Mine", root / "cat.png")
    (of_anna,) = anna.pictures()
    path = of_anna.split("file=", 1)[1]
    swap = {path: path}  # by what Bert's own upload is replaced in his request

    def tamper(route: Any) -> None:
        body = route.request.post_data or ""
        own = re.search(r'"path":\s*"([^"]+)"', body)
        route.continue_(post_data=body.replace(own.group(1), next(iter(swap.values()))) if own else body)

    bert.page.route("**/gradio_api/run/**", tamper)
    bert.page.route("**/gradio_api/queue/join**", tamper)
    bert.attach(root / "dog.png")
    bert.type("Show me")
    assert "was not uploaded here" in bert.notice()
    assert bert.stats() == []
    for elsewhere in ("/etc/passwd", str(root / "cat.png"), "http://127.0.0.1:1/x.png"):
        swap[path] = elsewhere
        bert.open()
        bert.attach(root / "dog.png")
        bert.type("Show me")
        bert.page.wait_for_timeout(1000)
        assert bert.stats() == []
        assert bert.page.locator("#chat [data-testid=user]").count() == 0
    bert.page.unroute_all()
    bert.open()
    bert.ask("Mine", root / "dog.png")  # his own is fine


def test_a_file_that_is_no_picture_is_refused_in_words(visit: Callable[..., Page], running: RunningPage):
    user = visit()
    user.add({"name": "notes.png", "mimeType": "image/png", "buffer": b"<html><script>alert(1)</script></html>"})
    told = user.toast()
    assert "notes.png is no picture that can be read" in told
    assert not LEAK.search(told)
    assert user.page.locator("#box img").count() == 0
    user.ask("Hello")  # the page goes on
    left = [path for path in running.folder.rglob("*") if path.name == "notes.png"]
    assert left == []


@pytest.mark.parametrize("name", ["x.svg", "x.html", "x.png", "x.xhtml"])
def test_markup_is_never_kept_or_served(running: RunningPage, name: str):
    answer = upload(running.url, name, b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    assert answer.status_code == 415
    assert answer.headers["content-type"].startswith("text/plain")
    assert f"{name} is no picture" in answer.text
    assert not LEAK.search(answer.text)
    assert [path for path in running.folder.rglob(name) if path.is_file()] == []


def test_a_picture_is_served_as_a_picture_that_may_run_nothing(running: RunningPage, root: Path):
    answer = upload(running.url, "cat.png", (root / "cat.png").read_bytes())
    owner = answer.cookies[COOKIE]
    served = httpx.get(f"{running.url}gradio_api/file={answer.json()[0]}", cookies={COOKIE: owner})
    assert served.status_code == 200
    assert served.headers["content-type"] == "image/png"
    assert "sandbox" in served.headers["content-security-policy"]
    assert served.headers["x-content-type-options"] == "nosniff"


def test_a_file_of_60_mb_is_refused_in_words(visit: Callable[..., Page], running: RunningPage, tmp_path: Path):
    user = visit()
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(60 * 2**20)
    user.add(large)
    told = user.toast()
    assert re.search(r"(?i)larger than|maximum allowed size|exceeds", told)
    assert not LEAK.search(told)
    assert user.page.locator("#box img").count() == 0
    user.ask("Hello")


def test_60_mb_and_1_gb_past_the_page_are_refused_too(running: RunningPage):
    before = {path for path in running.folder.rglob("*") if path.is_file()}
    answer = upload(running.url, "large.png", bytes(60 * 2**20))
    assert answer.status_code == 413
    assert answer.text.startswith("The file is larger than 20 MB.")
    assert {path for path in running.folder.rglob("*") if path.is_file()} == before
    host, port = running.url.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port))) as connection:  # it is refused by its length, before it is sent
        head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}\r\nContent-Length: {2**30}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(20).startswith(b"HTTP/1.1 413")


def test_an_error_of_the_model_is_told_without_details(
    visit: Callable[..., Page], root: Path, monkeypatch: pytest.MonkeyPatch
):
    user = visit()
    user.ask("Before")

    def fail(*_: Any) -> None:
        raise RuntimeError("tensor at 0x7f001234 in /srv/secret/model.py")

    with monkeypatch.context() as patch:
        patch.setattr("vlm.export.load.generate", fail)
        user.type("Now it fails")
        assert "The answer failed. The server's log says why." in user.notice()
        user.ready()
    content = user.page.content()
    assert "secret" not in content
    assert "0x7f001234" not in content
    assert user.page.input_value("#box textarea") == "Now it fails"  # to try again
    assert len(user.stats()) == 1
    user.page.press("#box textarea", "Enter")
    user.answered(2)


def test_a_page_that_is_closed_makes_room_for_the_next(visit: Callable[..., Page]):
    gone, next_one = visit(), visit()
    gone.ask("Hello")
    gone.set_length(4096)
    gone.type(SENTENCE)
    gone.page.wait_for_timeout(1500)
    gone.page.close()
    begun = time.monotonic()
    next_one.ask("My turn")
    assert time.monotonic() - begun < 30


def test_more_questions_than_may_wait_are_refused_and_can_be_asked_again(
    chromium: Any, root: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    models = ModelStore(find_exports(None, root / "runs"), device="cpu")
    running = serve(models, WebOptions(port=0, max_waiting=1, settings=GenerationSettings(max_new_tokens=4)))
    users = [Page(chromium, running.url) for _ in range(3)]
    try:
        users[0].ask("Hello")
        with models.turn():  # somebody is being answered
            users[0].type("I am next")
            users[0].page.wait_for_timeout(700)
            users[1].type("I wait")
            users[1].page.wait_for_timeout(700)
            users[2].type("One too many")
            assert "Too many questions wait." in users[2].notice()
            users[2].page.wait_for_function("document.querySelector('#box textarea').value === 'One too many'")
            assert "Waiting for its turn" in users[1].page.inner_text("#chat")
        users[0].answered(2)
        users[1].answered(1)
        users[2].page.press("#box textarea", "Enter")
        users[2].answered(1)
    finally:
        for user in users:
            user.close()
        running.close()


def test_with_a_password_nothing_is_there_before_the_login(chromium: Any, root: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    models = ModelStore(find_exports(None, root / "runs"), device="cpu")
    options = WebOptions(port=0, auth=("me", "secret"), settings=GenerationSettings(max_new_tokens=4))
    running = serve(models, options)
    context = chromium.new_context(locale="en-US")
    try:
        assert upload(running.url, "cat.png", (root / "cat.png").read_bytes()).status_code == 401
        assert httpx.get(f"{running.url}config").status_code == 401
        assert httpx.post(f"{running.url}login", data={"username": "me", "password": "wrong"}).status_code == 400
        page = context.new_page()
        answered_by: list[str] = []
        page.on("response", lambda answer: answered_by.append(answer.url))
        page.goto(running.url)
        page.locator("input").nth(0).fill("me")
        page.locator("input[type=password]").fill("secret")
        page.locator("button").filter(has_text=re.compile("log", re.I)).click()
        page.wait_for_selector("#box textarea", timeout=WAIT)
        page.wait_for_function("document.documentElement.dataset.started === 'yes'")
        page.fill("#box textarea", "Hello")
        page.press("#box textarea", "Enter")
        page.wait_for_selector("#chat .stats", timeout=WAIT)
        assert [url for url in answered_by if not url.startswith((running.url, "data:", "blob:"))] == []
    finally:
        context.close()
        running.close()
