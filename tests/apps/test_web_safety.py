"""The page in headless Chromium: what a hostile user, file or text tries, and what happens when the model fails."""

from __future__ import annotations

import io
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser_user import LEAK, MARKS, SENTENCE, WAIT, Page, endless_answers

from vlm.apps.address import bind
from vlm.apps.web.app import RunningPage, WebOptions, serve
from vlm.apps.web.guard import COOKIE
from vlm.apps.web.models import ModelStore, find_exports
from vlm.generation.generate import GenerationSettings

pytest_plugins = ["browser_user"]
pytestmark = MARKS


def upload(url: str, name: str, content: bytes) -> httpx.Response:
    """As a program sends it, past the page."""
    return httpx.post(f"{url}gradio_api/upload", files={"files": (name, io.BytesIO(content))}, timeout=60)


def files_of(running: RunningPage) -> set[Path]:
    """All files below its folder; one that the server removes meanwhile is no error, as it would be for `rglob`."""
    return {Path(folder, name) for folder, _, names in os.walk(running.folder) for name in names}


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # the other upload's, removed since it was listed
        return 0


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
    (of_anna,), (of_bert,) = anna.images(), bert.images()
    assert anna.page.request.get(of_anna).body() == (root / "cat.png").read_bytes()
    assert bert.page.request.get(of_bert).body() == (root / "dog.png").read_bytes()
    assert bert.page.request.get(of_anna).status == 403
    assert httpx.get(of_anna).status_code == 403


def test_a_message_that_names_anothers_image_is_refused(
    visit: Callable[..., Page], running: RunningPage, root: Path, capfd: pytest.CaptureFixture[str]
):
    anna, bert = visit(), visit()
    anna.ask("Mine", root / "cat.png")
    (of_anna,) = anna.images()
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


def test_a_file_that_is_no_image_is_refused_in_words(visit: Callable[..., Page], running: RunningPage):
    user = visit()
    user.add({"name": "notes.png", "mimeType": "image/png", "buffer": b"<html><script>alert(1)</script></html>"})
    told = user.toast()
    assert "notes.png is no image that can be read" in told
    assert not LEAK.search(told)
    assert user.page.locator("#box img").count() == 0
    user.ask("Hello")  # the page goes on
    assert [path for path in files_of(running) if path.name == "notes.png"] == []


@pytest.mark.parametrize("name", ["x.svg", "x.html", "x.png", "x.xhtml"])
def test_markup_is_never_kept_or_served(running: RunningPage, name: str):
    answer = upload(running.url, name, b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    assert answer.status_code == 415
    assert answer.headers["content-type"].startswith("text/plain")
    assert f"{name} is no image" in answer.text
    assert not LEAK.search(answer.text)
    assert [path for path in files_of(running) if path.name == name] == []


def test_an_image_is_served_as_an_image_that_may_run_nothing(running: RunningPage, root: Path):
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
    before = files_of(running)
    answer = upload(running.url, "large.png", bytes(60 * 2**20))
    assert answer.status_code == 413
    assert answer.text.startswith("The file is larger than 20 MB.")
    assert files_of(running) == before
    host, port = running.url.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port))) as connection:  # it is refused by its length, before it is sent
        head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}\r\nContent-Length: {2**30}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(20).startswith(b"HTTP/1.1 413")


def emptied(running: RunningPage, before: set[Path]) -> bool:
    """Whether the folder becomes again what it was."""
    end = time.monotonic() + 20
    while files_of(running) != before and time.monotonic() < end:
        time.sleep(0.05)
    return files_of(running) == before


def test_parts_of_an_upload_that_are_no_files_of_the_page_leave_nothing(running: RunningPage, root: Path):
    before = files_of(running)
    other = [("other", (f"{number}.html", io.BytesIO(b"<html>" + bytes(2**20)))) for number in range(4)]
    assert httpx.post(f"{running.url}gradio_api/upload", files=other, timeout=60).json() == []
    assert files_of(running) == before
    cat = ("files", ("cat.png", io.BytesIO((root / "cat.png").read_bytes())))
    (path,) = httpx.post(f"{running.url}gradio_api/upload", files=[cat, *other], timeout=60).json()
    assert files_of(running) - before == {Path(path)}
    folders = {path for path in running.folder.iterdir() if path.name.startswith("upload-")}
    assert all(any(file.is_relative_to(folder) for file in files_of(running)) for folder in folders)


@pytest.mark.parametrize("field", ["files", "other"])
def test_an_upload_that_breaks_off_leaves_nothing(running: RunningPage, field: str):
    before = files_of(running)
    address = running.url.removeprefix("http://").rstrip("/")
    host, port = address.split(":")
    part = f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="a.png"\r\n\r\n'.encode()
    head = (
        f"POST /gradio_api/upload HTTP/1.1\r\nHost: {address}\r\nContent-Length: {15 * 2**20}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + part + bytes(5 * 2**20))
        end = time.monotonic() + 20
        while sum(size_of(path) for path in files_of(running) - before) < 2**20:
            assert time.monotonic() < end  # it is being written
            time.sleep(0.05)
        # another upload that begins and ends meanwhile removes none of it
        assert upload(running.url, "x.png", b"no").status_code == 415
        assert len(files_of(running) - before) == 1
    assert emptied(running, before)


def test_the_page_of_another_site_can_upload_nothing(
    visit: Callable[..., Page], running: RunningPage, elsewhere: tuple[str, list[str]]
):
    """A form of many parts needs no consent of the server: what the browser says of its origin has to be looked at."""
    before = files_of(running)
    user = visit()
    tried = user.context.new_page()
    tried.goto(elsewhere[0] + "/page")
    with user.context.expect_event("response", lambda answer: answer.url.endswith("/gradio_api/upload")) as answer:
        tried.evaluate(
            "url => { const form = new FormData(); form.append('other', new Blob(['<html>']), 'x.html');"
            " fetch(url, {method: 'POST', mode: 'no-cors', credentials: 'include', body: form}).catch(() => 0); }",
            f"{running.url}gradio_api/upload",
        )
    assert answer.value.status == 403
    assert files_of(running) == before


def test_an_error_of_the_model_is_told_without_details(
    visit: Callable[..., Page], root: Path, monkeypatch: pytest.MonkeyPatch
):
    user = visit()
    user.ask("Before")

    def fail(*_: Any) -> None:
        raise RuntimeError("tensor at 0x7f001234 in /srv/secret/model.py")

    with monkeypatch.context() as patch:
        patch.setattr("vlm.inference.load.generate", fail)
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


@pytest.mark.slow
@pytest.mark.thorough
def test_a_page_that_is_closed_makes_room_for_the_next(visit: Callable[..., Page]):
    gone, next_one = visit(), visit()
    gone.ask("Hello")
    with endless_answers():
        gone.type(SENTENCE)
        gone.see_it_grow()
    gone.page.close()
    next_one.ask("My turn")


class CountedModels(ModelStore):
    """Knows how many answers wait for their turn."""

    num_waiting = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        self.num_waiting += 1
        with super().turn():
            self.num_waiting -= 1
            yield


@pytest.mark.slow
@pytest.mark.thorough
def test_more_questions_than_may_wait_are_refused_and_can_be_asked_again(
    chromium: Any, root: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    models = CountedModels(find_exports(None, root / "runs"), device="cpu")
    running = serve(models, WebOptions(port=0, max_waiting=1, settings=GenerationSettings(max_new_tokens=4)))
    users = [Page(chromium, running.url) for _ in range(3)]
    try:
        users[0].ask("Hello")
        with models.turn():  # somebody is being answered
            users[0].type("I am next")
            users[0].until(lambda: models.num_waiting == 1)  # out of the queue
            with users[1].page.expect_response("**/gradio_api/queue/join**"):
                users[1].type("I wait")
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


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
def test_any_loopback_address_can_be_listened_at(host: str, root: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    if host == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 on this machine")
    running = serve(ModelStore(find_exports(None, root / "runs"), device="cpu"), WebOptions(host=host, port=0))
    try:
        assert httpx.get(f"{running.url}config").status_code == 200
        assert httpx.get(f"{running.url}config", headers={"Host": "evil.example"}).status_code == 403
    finally:
        running.close()


def test_a_port_that_is_taken_at_another_address_is_free_at_this_one(root: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    models = ModelStore(find_exports(None, root / "runs"), device="cpu")
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        running = serve(models, WebOptions(host="127.0.0.3", port=port))
        try:
            assert running.url == f"http://127.0.0.3:{port}/"
            assert httpx.get(f"{running.url}config").status_code == 200
        finally:
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


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """The address of another server, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
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
    user = visit(locale="en-US")  # a browser of their own, which has nothing yet
    url, asked = elsewhere
    user.ask(f"![x]({url}/1.png) <img src='{url}/2.png'> <script>fetch('{url}/3')</script>", root / "cat.png")
    user.page.wait_for_timeout(1000)
    assert asked == []  # a text cannot make the page ask for it
    own = (running.url, "data:", "blob:")
    assert [address for address in user.requests if not address.startswith((*own, url))] == []
    assert len(user.requests) > 20
