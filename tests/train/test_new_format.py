"""A data format that only this test knows: checked, trained on, resumed, exported, asked, served."""

from __future__ import annotations

import json
from typing import Literal, get_args

import pytest
from walk import walk

from vlm.cli.main import main
from vlm.config import RunConfig
from vlm.data import parse
from vlm.data.config import DataConfig, SourceConfig
from vlm.data.parse import FORMATS, Format
from vlm.errors import RecordError

KNOWN = ("auto", "conversation", "instruction", "marked_turns", "caption", "text")


def riddle_turns(draft):
    riddle, solution = draft.fields.take("riddle"), draft.fields.take("solution")
    return [parse._turn("user", parse._text(riddle, "riddle")), parse._turn("assistant", solution)]


RIDDLE = Format(lambda keys, draft: {"riddle", "solution"} <= {*keys}, riddle_turns, expected="riddle and solution")


@pytest.fixture
def known(monkeypatch):
    """Its line in the dict, and its name among the formats."""

    def rebuild(*names: str) -> None:
        SourceConfig.model_fields["format"].annotation = Literal[names]
        for section in (SourceConfig, DataConfig, RunConfig):
            section.model_rebuild(force=True)

    monkeypatch.setitem(FORMATS, "riddle", RIDDLE)
    rebuild(*KNOWN, "riddle")
    yield
    rebuild(*KNOWN)


def test_the_config_names_every_format_in_the_order_in_which_they_are_tried():
    assert get_args(SourceConfig.model_fields["format"].annotation) == ("auto", *FORMATS)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("format", ["auto", "riddle"])
def test_it_is_told_by_its_keys_or_by_the_config(format):
    record = {"image": "a.png", "riddle": "What barks?", "solution": "A dog.", "hint": "It bites."}
    conversation = parse.parse_record(record, SourceConfig(path="x", format=format))
    assert [turn.text for turn in conversation.turns] == ["\nWhat barks?", "A dog."]
    assert (conversation.images, conversation.unread) == (("a.png",), ("hint",))


@pytest.mark.usefixtures("known")
def test_it_is_named_where_no_format_fits():
    for format, expected in (("auto", "image and caption, text, or riddle and solution"), ("riddle", "riddle and")):
        with pytest.raises(RecordError, match=f"expected .*{expected}"):
            parse.parse_record({"riddle": "What barks?"}, SourceConfig(path="x", format=format))


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_it_needs_nothing_but_its_function(config_file, tiny, tmp_path, capsys):
    images = sorted((tiny / "data/images").glob("*.png"))[:12]
    records = [{"image": image.name, "riddle": "What is it?", "solution": f"It is {image.stem}."} for image in images]
    (tmp_path / "riddles.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = {"path": str(tmp_path / "riddles.jsonl"), "images": str(tiny / "data/images"), "format": "riddle"}
    path = config_file(data__sources=[source], data__held_out=0.0, train__max_steps=4, train__save_every=2)
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(path)])
    assert (ended.value.code, capsys.readouterr().out) == (0, "12 records, 12 images, skipped: none\n")
    walked = walk(path, images[0], capsys)
    assert "12 records, 0 skipped" in walked.log
    assert "riddles.jsonl" in walked.card
