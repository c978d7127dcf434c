"""`vlm serve` as a process: its port, its signals, its exit codes."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_server import user
from warm import Ranks, started

from vlm.apps.address import bind
from vlm.apps.api.server import default_name
from vlm.cli.main import main
from vlm.errors import ConfigError

CHAT = "/v1/chat/completions"
slow = pytest.mark.slow
FLAGS = ["--port", "0", "--device", "cpu", "--model-name", "tiny"]


def serve(*arguments: str) -> None:
    main(["serve", *arguments])


class Process:
    """A running `vlm serve`."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        deadline = time.monotonic() + 120
        found = None
        while found is None:
            assert ranks.codes == [None], ranks.output
            assert time.monotonic() < deadline, ranks.output
            time.sleep(0.02)
            found = re.search(r"^serving .* (http://127\.0\.0\.1:\d+)/v1 .*\n", ranks.output, re.MULTILINE)
        self.line, self.url = found[0], found[1]

    def stream(self, max_tokens: int, **settings: Any) -> tuple[Any, Callable[[], str]]:
        """Starts a reply and waits for its first bytes; then the thread that reads it and the text so far."""
        body = {"model": "tiny", "messages": user("Hello"), "max_tokens": max_tokens, "stream": True}
        body |= {"temperature": 0, "logit_bias": {"2": -100}} | settings
        text, started = [], threading.Event()

        def read() -> None:
            try:
                with httpx.stream("POST", self.url + CHAT, json=body, timeout=60) as answer:
                    assert answer.status_code == 200
                    for part in answer.iter_text():
                        text.append(part)
                        started.set()
            except httpx.HTTPError:
                text.append("<cut>")

        thread = threading.Thread(target=read)
        thread.start()
        assert started.wait(60)
        return thread, lambda: "".join(text)

    def send(self, number: int) -> None:
        os.kill(self.ranks.processes[0].pid, number)

    def wait(self) -> int | None:
        """The exit status."""
        self.ranks.processes[0].join(60)
        return self.ranks.codes[0]

    def end(self, *signals: int) -> int | None:
        for number in signals:
            self.send(number)
            time.sleep(0.3)
        return self.wait()


@pytest.fixture
def start(export: Path) -> Iterator[Callable[..., Process]]:
    with ExitStack() as stack:
        yield lambda *flags: Process(stack.enter_context(started(serve, str(export), *FLAGS, *flags)))


@slow
def test_sigterm_finishes_what_is_written_and_refuses_the_rest(start: Callable[..., Process]):
    server = start("--max-running", "4")
    assert re.match(r"serving tiny at http://127\.0\.0\.1:\d+/v1 ", server.line)
    threads = [server.stream(600) for _ in range(4)]
    server.send(signal.SIGTERM)
    deadline = time.monotonic() + 30
    while httpx.get(f"{server.url}/health").status_code == 200:
        assert time.monotonic() < deadline
    refused = httpx.post(server.url + CHAT, json={"model": "tiny", "messages": user("Hello")})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert server.wait() == 0
    for thread, text in threads:
        thread.join(10)
        assert text().endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in text()


LONG = {"n": 8}  # one after the other: 7,200 tokens


def was_cut(text: str) -> bool:
    """The client was told, and did not get all."""
    return "this server is shutting down" in text and text.count('"finish_reason":"length"') < 8


@pytest.mark.one_in(2)
@slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_cuts_replies_off(start: Callable[..., Process], number: int, code: int):
    server = start("--max-running", "1")
    thread, text = server.stream(900, **LONG)
    assert server.end(number, number) == code
    thread.join(10)
    assert was_cut(text())
    assert "Traceback" not in server.ranks.output


@slow
def test_the_time_to_finish_is_bounded(start: Callable[..., Process]):
    server = start("--max-running", "1", "--drain-seconds", "0.5")
    thread, text = server.stream(900, **LONG)
    assert server.end(signal.SIGTERM) == 143
    thread.join(10)
    assert was_cut(text())


@pytest.mark.one_in(2)
@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(start: Callable[..., Process], number: int):
    server = start()
    keep = httpx.Client()
    keep.get(f"{server.url}/health")  # a connection that stays open holds nothing up
    assert server.end(number) == 0
    assert "Traceback" not in server.ranks.output


@slow
def test_the_key_may_come_from_the_environment(start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLM_API_KEY", "key-from-the-environment")
    server = start()
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    headers = {"Authorization": "Bearer key-from-the-environment"}
    assert httpx.get(f"{server.url}/v1/models", headers=headers).json()["data"][0]["id"] == "tiny"


def test_a_port_in_use_ends_the_command_before_a_model_is_loaded(
    export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("vlm.inference.load.load", lambda *_: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as end:
            main(["serve", str(export), "--port", str(port)])
    assert end.value.code == 2
    error = f"error: port {port} of 127.0.0.1 is in use; choose another with --port, or --port 0 for any free one\n"
    assert capsys.readouterr().err == error


def test_a_free_port_is_taken_at_once_so_that_two_cannot_have_it():
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert port > 0
        with pytest.raises(ConfigError, match="in use"):
            bind("127.0.0.1", port)
    with bind("127.0.0.1", port):  # free again, without waiting for the old connections to be forgotten
        pass


@pytest.mark.parametrize(("host", "match"), [("no.such.host.invalid", "no address"), ("203.0.113.9", "cannot listen")])
def test_an_address_that_is_not_ours_is_refused_in_one_line(host: str, match: str):
    with pytest.raises(ConfigError, match=match):
        bind(host, 0)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--media-root", "no-such-folder"], "--media-root no-such-folder is no folder"),
        (["--precision", "fp8"], "--precision fp8"),
        (["--allow-media-domain", "10.0.0.1"], "--allow-media-domain"),
        (["--api-key", "short"], "--api-key"),
        (["--allow-origin", "*"], "--allow-origin"),
    ],
)
def test_wrong_flags_end_the_command_with_2(
    export: Path, capsys: pytest.CaptureFixture[str], flags: list[str], match: str
):
    with pytest.raises(SystemExit) as end:
        main(["serve", str(export), *flags])
    assert end.value.code == 2
    assert match in capsys.readouterr().err


def test_a_folder_that_is_no_export_ends_the_command_with_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(SystemExit) as end:
            main(["serve", str(folder), "--port", "0"])
        assert end.value.code == 5


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/a/cache/runs/quickstart/finetune/export", "quickstart-finetune"),
        ("/a/runs/mine/export", "mine"),
        ("/a/models/my-model", "my-model"),
    ],
)
def test_a_model_is_named_after_its_run(folder: str, name: str):
    assert default_name(Path(folder)) == name
