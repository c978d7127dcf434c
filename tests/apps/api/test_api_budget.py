"""The budget of the cache, and a model thread that goes on, or says so, whatever a request does to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from api_server import SMALL, ask, make_service, user, without_port

from vlm.apps.api.limits import Access, Limits, Media
from vlm.apps.api.scheduler import Job, Scheduler
from vlm.apps.api.server import serve
from vlm.errors import ConfigError
from vlm.generation.batched import BatchedGenerator, Reply
from vlm.generation.sampling import SamplingSettings
from vlm.inference import budget as memory
from vlm.inference.load import LoadedModel

CHAT = "/v1/chat/completions"
Post = Callable[[dict[str, Any]], httpx.Response]


class Ends:
    """Replies to one prompt, and how they ended."""

    def __init__(self, count: int, *, tokens: int = 4) -> None:
        self.ends: list[Any] = []
        settings = SamplingSettings()
        self.job = Job(
            [Reply([2, 3], None, tokens, (), settings, lambda token: True, self.ends.append) for _ in range(count)]
        )


def make_scheduler(loaded: LoadedModel) -> Scheduler:
    return Scheduler(BatchedGenerator(loaded.model, max_tokens=128), loaded.autocast)


@pytest.mark.one_in(3)
@pytest.mark.slow
@pytest.mark.parametrize("budget", [1000, 1023, 100])
def test_whatever_the_prompt_lets_through_has_room(loaded: LoadedModel, budget: int):
    """The cache grows by 64 tokens, and no budget here is a multiple of that."""

    async def inside() -> list[httpx.Response]:
        limits = replace(SMALL, max_tokens=budget, request_seconds=60)
        async with without_port(make_service(loaded, limits)) as client:
            largest = {"max_tokens": budget // 64 * 64, "logit_bias": {"5": 100}, "stop": "never"}
            return [
                await client.post(CHAT, json=ask(max_tokens=budget)),
                await client.post(CHAT, json=ask(**largest, messages=user("a"))),
                await client.get("/health"),
                await client.get("/metrics"),
            ]

    refused, largest, health, metrics = asyncio.run(inside())
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "too_many")
    assert largest.status_code == 200
    usage = largest.json()["usage"]
    assert usage["total_tokens"] == budget // 64 * 64
    assert health.json()["status"] == "ok"
    assert f"vlm_cache_tokens_limit {budget // 64 * 64}.0" in metrics.text


def test_the_default_budget_is_a_multiple_of_what_the_cache_grows_by(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "bytes_per_token", lambda model: 1000)
    monkeypatch.setattr(memory, "free_memory", lambda loaded: 4 * 1000 * 999)  # a quarter of it holds 999
    assert make_service(loaded, Limits()).scheduler.max_tokens == 960
    monkeypatch.setattr(memory, "free_memory", lambda loaded: 1 << 40)
    assert memory.fitting_tokens(loaded, max_running=3) == 3 * 1024


def test_a_budget_for_no_conversation_is_refused_before_the_model_is_loaded():
    def load() -> LoadedModel:
        raise AssertionError

    with pytest.raises(ConfigError, match="--max-tokens 63: expected at least 64"):
        serve(load, "tiny", "127.0.0.1", 0, limits=Limits(max_tokens=63), media=Media(), access=Access())


def test_an_error_in_taking_a_reply_in_is_that_replys_own(loaded: LoadedModel):
    scheduler = make_scheduler(loaded)
    too_large, good = Ends(2, tokens=1000), Ends(1)
    scheduler.submit(too_large.job)
    scheduler.submit(good.job)
    scheduler.start()
    wait_for(lambda: bool(good.ends))
    assert [type(end) for end in too_large.ends] == [ValueError, ValueError]
    assert good.ends == ["length"]
    assert scheduler.is_alive
    scheduler.stop()


def test_an_error_in_cancelling_ends_what_runs_and_not_the_thread(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(reply: Reply) -> None:
        raise RuntimeError("cannot move")

    scheduler = make_scheduler(loaded)
    monkeypatch.setattr(scheduler._generator, "cancel", fail)
    broken, later = Ends(1), Ends(1)
    scheduler.submit(broken.job)
    scheduler.cancel(broken.job)
    scheduler.submit(later.job)
    scheduler.start()
    wait_for(lambda: bool(later.ends))
    assert [str(end) for end in broken.ends] == ["cannot move"]
    assert later.ends == ["length"]
    assert "cannot move" in capsys.readouterr().err
    scheduler.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_ended(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    def die() -> bool:
        scheduler.submit(pending.job)
        raise SystemExit  # no error that is caught

    scheduler = make_scheduler(loaded)
    running, pending, late = Ends(2), Ends(1), Ends(1)
    monkeypatch.setattr(scheduler._generator, "step", die)
    scheduler.submit(running.job)
    scheduler.start()
    wait_for(lambda: not scheduler.is_alive)
    assert [str(end) for end in (*running.ends, *pending.ends)] == ["the server ends"] * 3
    scheduler.submit(late.job)
    assert [str(end) for end in late.ends] == ["the server ends"]


def test_choices_share_their_prompt(
    call: Callable[..., httpx.Response],
    loaded: LoadedModel,
    image: Callable[[int], str],
    monkeypatch: pytest.MonkeyPatch,
):
    encoded = []
    encode = loaded.model.encode_images
    monkeypatch.setattr(loaded.model, "encode_images", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    body = ask(messages=user("What?", image(0)), n=8, temperature=2, seed=1, logit_bias={"2": -100})
    choices = call("POST", CHAT, json=body).json()["choices"]
    assert encoded == [1]
    assert len({choice["message"]["content"] for choice in choices}) > 4


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
