"""The record of a conversation is read back as what the model saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_export import write_image

from vlm.apps.record import record_line, training_record
from vlm.apps.session import Exchange
from vlm.data.config import SourceConfig
from vlm.data.conversation import IMAGE
from vlm.data.records import open_source, parse_record
from vlm.errors import RecordError


class Said:
    def __init__(self, *exchanges: Exchange, system: str | None = None) -> None:
        self.system = system
        self.exchanges = list(exchanges)


def read(said: Said, tmp_path: Path):
    """As `vlm data check` reads it: from a file, by the source's own settings."""
    file = tmp_path / "conversation.jsonl"
    file.write_text(record_line(said), encoding="utf-8")
    return open_source(SourceConfig(path=str(file)), tmp_path / "cache").conversation(0)


def test_images_and_turns_come_back_in_order(tmp_path: Path):
    cat, dog = write_image(tmp_path / "cat.png"), write_image(tmp_path / "dog.jpg", seed=2)
    said = Said(
        Exchange("What are these?", (str(cat), dog.read_bytes()), "A cat\nand a dog."),
        Exchange("哪个更大？", (), "狗。"),
        system="Be brief.",
    )
    conversation = read(said, tmp_path)
    assert [turn.role for turn in conversation.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert conversation.turns[1].parts == (IMAGE, IMAGE, "\nWhat are these?")
    assert conversation.turns[2].text == "A cat\nand a dog."
    assert conversation.turns[3].parts == ("哪个更大？",)
    assert conversation.images == (cat.read_bytes(), dog.read_bytes())


def test_an_image_without_words_is_a_question(tmp_path: Path):
    cat = write_image(tmp_path / "cat.png")
    assert read(Said(Exchange("", (str(cat),), "A cat.")), tmp_path).turns[0].parts == (IMAGE,)


@pytest.mark.parametrize("where", ["question", "reply", "system"])
def test_a_typed_mark_is_no_image(tmp_path: Path, where: str):
    cat = write_image(tmp_path / "cat.png")
    texts = {"question": "What?", "reply": "That.", "system": "Hi."} | {where: "an <image> mark"}
    said = Said(Exchange(texts["question"], (str(cat),), texts["reply"]), system=texts["system"])
    conversation = read(said, tmp_path)
    assert conversation.num_slots == 1
    assert sum("an < image> mark" in turn.text for turn in conversation.turns) == 1


def test_it_is_one_line_and_needs_no_other_file(tmp_path: Path):
    cat = write_image(tmp_path / "cat.png")
    line = record_line(Said(Exchange("One\ntwo", (str(cat),), "Three\nfour")))
    cat.unlink()
    assert line.count("\n") == 1
    assert parse_record(json.loads(line), SourceConfig(path="x")).images[0].startswith(b"\x89PNG")


def test_nothing_said_and_an_image_that_is_gone_are_refused(tmp_path: Path):
    with pytest.raises(RecordError, match="nothing was said"):
        training_record(Said())
    with pytest.raises(RecordError, match=r"gone\.png"):
        training_record(Said(Exchange("What?", (str(tmp_path / "gone.png"),), "That.")))
