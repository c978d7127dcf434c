"""Small records, and what becomes of them."""

from __future__ import annotations

import base64

import pytest

from vlm.data.config import SourceConfig
from vlm.data.conversation import Conversation
from vlm.data.parse import parse_record
from vlm.errors import RecordError

PIXEL = "data:image/png;base64," + base64.b64encode(b"\x89PNG...").decode()


def parse(record: dict, image_placement: str = "auto", **config) -> Conversation:
    return parse_record(record, SourceConfig(path="x.json", **config), image_placement)


def rule_of(record: dict, image_placement: str = "auto", **config) -> str:
    with pytest.raises(RecordError) as caught:
        parse(record, image_placement, **config)
    assert len(caught.value.message) < 400
    return caught.value.rule


def llava(*texts: str, **more) -> dict:
    """Texts of human and gpt in turns."""
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"conversations": turns, **more}


def said(conversation: Conversation) -> list[tuple]:
    """[("user", IMAGE, "What?"), ...], to be read at a glance."""
    return [(turn.role, *turn.parts) for turn in conversation.turns]
