"""Many clients at once, clients that leave, a full queue, a model that fails, and time that runs out."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from api_server import NAME, SMALL, Running, ask, make_service, on_port, user

from vlm.apps.api import answers
from vlm.apps.api.app import build_app
from vlm.apps.api.service import Service
from vlm.inference.load import LoadedModel

pytestmark = pytest.mark.slow  # servers with a model

CHAT = "/v1/chat/completions"
ENDLESS = {"max_tokens": 900, "logit_bias": {"2": -100}}  # token 2 would end the reply
SECRET = "CUDA error at 0xdeadbeef in /opt/secret/kernel.cu"
Image = Callable[[int], str]


class Gate:
    """Lets a server's model write only while it is open."""

    def __init__(self, service: Service) -> None:
        self.open = threading.Event()
        self._step = service.scheduler._generator.step
        service.scheduler._generator.step = self._wait  # type: ignore[method-assign]

    def _wait(self) -> bool:
        while not self.open.wait(0.01):
            return True  # the thread must hear of cancelled replies meanwhile
        return self._step()


@contextmanager
def gated(loaded: LoadedModel, **limits: Any) -> Iterator[tuple[Running, Gate]]:
    service = make_service(loaded, replace(SMALL, **limits))
    gate = Gate(service)
    with on_port(service) as server:
        yield server, gate
        gate.open.set()


def in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Starts; the result waits for it."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return lambda: future.result(60)


def complete(server: Running, text: str = "What is this?", *urls: str, **settings: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": 6} | settings
    return server.openai().chat.completions.create(model=NAME, messages=user(text, *urls), **settings)


def test_fifty_clients_at_once_each_get_their_own_reply(loaded: LoadedModel, image: Image):
    """Histories and images must not cross: every reply is the greedy one that its own conversation gets alone."""
    conversations: list[list[dict[str, Any]]] = []
    for number in range(50):
        history: list[dict[str, Any]] = user(f"My number is {number}.", *([image(number % 6)] if number % 3 else []))
        if number % 2:
            history += [{"role": "assistant", "content": f"{number}"}, *user("And this?", image((number + 1) % 6))]
        conversations.append(history)
    expected = [loaded.chat(messages, max_new_tokens=10) for messages in conversations]
    assert len(set(expected)) > 40  # else crossing would not show

    def talk(client: openai.OpenAI, number: int) -> str:
        settings: Any = {"model": NAME, "messages": conversations[number], "temperature": 0, "max_tokens": 10}
        if number % 4 == 0:
            return client.chat.completions.create(**settings).choices[0].message.content or ""
        chunks = client.chat.completions.create(stream=True, **settings)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    most_running = 0

    def watch(service: Service) -> bool:
        nonlocal most_running
        most_running = max(most_running, service.scheduler.num_running)
        return done.is_set()

    with on_port(make_service(loaded, replace(SMALL, max_queued=64))) as server, ThreadPoolExecutor(50) as pool:
        done = threading.Event()
        client = server.openai()
        replies = [pool.submit(talk, client, number) for number in range(50)]
        for reply in replies:
            reply.add_done_callback(lambda _: all(one.done() for one in replies) and done.set())
        server.wait_until(watch, seconds=120)
        assert [reply.result().strip() for reply in replies] == expected
        server.wait_until(lambda service: service.num_open == 0)
    assert most_running == 8


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(loaded: LoadedModel, stream: bool):
    """The slot is the only one, and its reply would take minutes."""
    with gated(loaded, max_running=1) as (server, gate):
        step, generator = gate._step, server.service.scheduler._generator
        gate._step = lambda: time.sleep(0.1) or step()  # type: ignore[func-returns-value]
        gate.open.set()

        def talk() -> None:
            with httpx.stream("POST", f"{server.url}{CHAT}", json=ask(**ENDLESS, stream=stream), timeout=60) as answer:
                for _ in answer.iter_bytes():
                    return

        if stream:
            talk()  # the first bytes, then gone
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}{CHAT}", json=ask(**ENDLESS), timeout=httpx.Timeout(60, read=1))
        server.wait_until(lambda service: not generator.running and service.num_open == 0)
        assert complete(server).choices[0].message.content
        assert b"vlm_cancelled_total 1.0" in httpx.get(f"{server.url}/metrics").content


def test_a_client_that_leaves_the_queue_is_forgotten(loaded: LoadedModel):
    with gated(loaded, max_running=1) as (server, gate):
        first = in_thread(lambda: complete(server))
        server.wait_until(lambda service: service.num_open == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}{CHAT}", json=ask(**ENDLESS), timeout=httpx.Timeout(60, read=0.5))
        server.wait_until(lambda service: service.num_open == 1)
        gate.open.set()
        assert first().choices[0].message.content
        server.wait_until(lambda service: service.scheduler.num_waiting == service.scheduler.num_running == 0)


def test_a_full_queue_sends_clients_away_until_there_is_room(loaded: LoadedModel):
    with gated(loaded, max_running=1, max_queued=2) as (server, gate):
        taken = [in_thread(lambda: complete(server)) for _ in range(3)]
        server.wait_until(lambda service: service.num_open == 3)
        refused = httpx.post(f"{server.url}{CHAT}", json=ask())
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "overloaded"
        with pytest.raises(openai.InternalServerError):
            complete(server)
        assert httpx.get(f"{server.url}/health").status_code == 200  # busy is not ill
        gate.open.set()
        assert all(answer().choices[0].message.content for answer in taken)
        assert complete(server).choices[0].message.content
        assert b"vlm_queue_full_total 2.0" in httpx.get(f"{server.url}/metrics").content


def test_several_choices_wait_for_slots_too(loaded: LoadedModel):
    with gated(loaded, max_running=2) as (server, gate):
        gate.open.set()
        choices = complete(server, n=5).choices
        assert len({choice.message.content for choice in choices}) == 1
        assert len(choices) == 5


def no_detail(text: str) -> bool:
    return not re.search(r"0x[0-9a-f]+|/opt|secret|CUDA|RuntimeError|Traceback|\.py", text)


def test_an_error_of_the_model_is_told_in_general_and_to_its_own_client(
    loaded: LoadedModel, image: Image, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """One image breaks the encoder, while other replies are being written."""
    encode, broken = loaded.model.encode_images, threading.Event()

    def fail(pixel_values: Any) -> Any:
        if len(pixel_values) == 2:
            broken.set()
            raise RuntimeError(SECRET)
        return encode(pixel_values)

    expected = loaded.chat(user("Hello"), max_new_tokens=200)
    monkeypatch.setattr(loaded.model, "encode_images", fail)
    with gated(loaded) as (server, gate):
        others = [in_thread(lambda: complete(server, "Hello", max_tokens=200)) for _ in range(3)]
        server.wait_until(lambda service: service.num_open == 3)
        bad = in_thread(lambda: httpx.post(f"{server.url}{CHAT}", json=ask(messages=user("a", image(0), image(1)))))
        server.wait_until(lambda service: service.num_open == 4)
        gate.open.set()
        answer = bad()
        assert broken.is_set()
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert no_detail(answer.text + str(answer.headers))
        assert [other().choices[0].message.content.strip() for other in others] == [expected] * 3
        with pytest.raises(openai.APIError) as caught:  # in a stream it is an event
            list(complete(server, "a", image(0), image(1), stream=True))
        assert no_detail(str(caught.value) + str(caught.value.body))
    assert SECRET in capsys.readouterr().err


def test_an_error_of_the_whole_batch_ends_it_and_not_the_server(
    loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
):
    with gated(loaded) as (server, gate):
        step = gate._step

        def fail() -> bool:
            raise RuntimeError(SECRET)

        running = [in_thread(lambda: httpx.post(f"{server.url}{CHAT}", json=ask())) for _ in range(2)]
        server.wait_until(lambda service: service.scheduler.num_waiting == 2)
        gate._step = fail
        gate.open.set()
        for answer in running:
            assert answer().status_code == 500
            assert no_detail(answer().text)
        gate._step = step  # the second request may have come to the model after the first error
        assert complete(server).choices[0].message.content
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    assert SECRET in capsys.readouterr().err


def test_an_error_of_our_own_code_is_told_in_general(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> Any:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(Service, "start", fail)
    with on_port(make_service(loaded)) as server:
        answer = httpx.post(f"{server.url}{CHAT}", json=ask())
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert no_detail(answer.text)
        assert server.service.num_open == 0
        counted = httpx.get(f"{server.url}/metrics").text
        assert f'vlm_requests_total{{path="{CHAT}",status="500"}} 1.0' in counted
        assert "vlm_failed_total 1.0" in counted


def test_a_request_that_takes_too_long_is_ended(loaded: LoadedModel):
    with gated(loaded, request_seconds=3.0) as (server, gate):
        waiting = httpx.post(f"{server.url}{CHAT}", json=ask())
        assert waiting.status_code == 504
        assert waiting.json()["error"]["code"] == "timeout"
        gate._step, step = lambda: time.sleep(0.05) or step(), gate._step  # type: ignore[func-returns-value]
        gate.open.set()
        pieces: list[Any] = []
        stream = complete(server, stream=True, **ENDLESS)
        with pytest.raises(openai.APIError, match=r"longer than the 3 seconds"):
            pieces.extend(stream)
        assert len(pieces) > 1
        server.wait_until(lambda service: not service.scheduler.num_running and service.num_open == 0)
        gate._step = step
        assert complete(server).choices[0].message.content


def test_a_client_that_does_not_read_holds_its_place_no_longer_than_allowed(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(answers, "_GRACE_SECONDS", 0.3)
    service = make_service(loaded, replace(SMALL, request_seconds=0.3))
    body = httpx.Request("POST", "http://localhost", json=ask(**ENDLESS, stream=True)).content
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        for message in messages:
            return message
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    async def talk() -> float:
        app = build_app(service)
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"",
                 "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": ""}  # fmt: skip
        async with app.router.lifespan_context(app):
            started = time.monotonic()
            await app(scope, receive, send)
            return time.monotonic() - started

    assert asyncio.run(talk()) < 30  # it would take 60
    assert service.num_open == 0


def test_a_server_that_shuts_down_finishes_and_takes_nothing_new(loaded: LoadedModel):
    with gated(loaded) as (server, gate):
        running = in_thread(lambda: complete(server))
        server.wait_until(lambda service: service.num_open == 1)
        server.service.draining = True
        refused = httpx.post(f"{server.url}{CHAT}", json=ask())
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        health = httpx.get(f"{server.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        gate.open.set()
        assert running().choices[0].message.content


def test_a_thread_that_died_is_told_by_health(loaded: LoadedModel):
    with on_port(make_service(loaded)) as server:
        server.service.scheduler.stop()
        assert httpx.get(f"{server.url}/health").json()["status"] == "failed"
        refused = httpx.post(f"{server.url}{CHAT}", json=ask())
        assert refused.status_code == 503
