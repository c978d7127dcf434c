"""Models that are named, where no hub can be reached."""

from __future__ import annotations

import logging

import pytest
from huggingface_hub import constants

from vlm.errors import CheckpointError
from vlm.models import hub


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A hub that cannot be reached; gives the addresses that were asked."""
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append((url, timeout))
            raise OSError("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(hub, "_reached", set())
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    return asked


def test_a_hub_that_does_not_answer_is_asked_twice_and_named(asked):
    with pytest.raises(CheckpointError) as caught:
        hub.check_hub("Qwen/Qwen3-8B", "model.llm.path")
    assert str(caught.value).startswith("model.llm.path: Qwen/Qwen3-8B is no folder in ")
    assert f"{constants.ENDPOINT} cannot be reached (Name or service not known)" in str(caught.value)
    assert asked == [(constants.ENDPOINT, 5.0)] * 2


def test_a_timeout_that_the_user_has_set_holds(asked, monkeypatch):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "30")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 30)
    with pytest.raises(CheckpointError):
        hub.check_hub("Qwen/Qwen3-8B", "model.llm.path")
    assert {timeout for _, timeout in asked} == {30}


def test_what_lies_here_or_was_downloaded_asks_nobody(asked, tmp_path, monkeypatch):
    hub.check_hub(str(tmp_path), "model.llm.path")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: "config.json")
    hub.check_hub("Qwen/Qwen3-8B", "model.llm.path")
    assert asked == []


def test_a_path_that_is_no_name_is_said_without_asking(asked):
    with pytest.raises(CheckpointError, match=r"models/qwen/7b does not exist in .* and it is no name for a model hub"):
        hub.check_hub("models/qwen/7b", "model.llm.path")
    assert asked == []


def test_lines_of_retries_are_dropped_and_others_stay(monkeypatch, caplog):
    for name in ("HF_HUB_VERBOSITY", "HF_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    hub.quiet_retries()
    logger = logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        logger.warning("'[Errno -2]' thrown while requesting HEAD https://hub/config.json")
        logger.warning("Retrying in 1s [Retry 1/5].")
        logger.warning("Rate limited. Waiting 60s before retry [Retry 1/5].")
    assert caplog.messages == ["Rate limited. Waiting 60s before retry [Retry 1/5]."]
