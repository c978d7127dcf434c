"""Data files made of data files: repeated, split by image, in another program's layout."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from records_for_tests import PIXEL, llava, parse

from vlm.data.config import SourceConfig
from vlm.data.convert import TARGETS, convert_conversation
from vlm.data.rewrite import convert_records, repeat_records, split_records
from vlm.errors import ConfigError, DataError, RecordError


def source(folder: Path, records: list, name: str = "in.json", **config) -> SourceConfig:
    (folder / name).write_text(json.dumps(records))
    return SourceConfig(path=str(folder / name), **config)


def read(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", ["out.json", "out.jsonl"])
def test_a_repeated_file_is_the_whole_file_again_and_again(tmp_path, name):
    records = [{"text": "你好"}, {"text": "b", "id": 2}]
    result = repeat_records(source(tmp_path, records), tmp_path / name, 3)
    assert read(tmp_path / name) == records * 3
    assert "你好" in (tmp_path / name).read_text(encoding="utf-8")
    assert [*result.lines()] == [f"2 records read, 6 to {tmp_path / name}, skipped: none"]


def test_nothing_is_overwritten_and_nothing_is_left_of_what_failed(tmp_path):
    given = source(tmp_path, [{"chosen": "a"}])
    (tmp_path / "there.json").write_text("mine")
    with pytest.raises(ConfigError, match="not overwritten"):
        repeat_records(given, tmp_path / "there.json", 2)
    with pytest.raises(DataError, match="preference_pair 1"):
        convert_records(given, tmp_path / "new.json", "llava")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.json", "there.json"]


def test_no_image_stands_on_both_sides_of_a_split(tmp_path):
    """Images 0..19 of two records each; record 40 ties image 0 to image 1, under other spellings of their names."""
    records = [llava("<image>\nWhat?", f"It is {n}.", image=f"{n // 2}.png") for n in range(40)]
    records.append(llava("<image><image>", "Both.", images=["./0.png", "a/../1.png"]))
    records += [llava("Hello?", "Yes."), llava("Hello?", "Yes.", id=7), {"chosen": 1}]
    given = source(tmp_path, records)
    sides = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    result = split_records(given, *sides, share=0.25, seed=1)
    images = [
        {name.split("/")[-1] for r in read(side) for name in [r.get("image"), *r.get("images", [])] if name}
        for side in sides
    ]
    assert images[0] & images[1] == set()
    assert images[0] | images[1] == {f"{n}.png" for n in range(20)}
    assert ("0.png" in images[0]) == ("1.png" in images[0])
    hellos = [sum("image" not in r and "images" not in r for r in read(side)) for side in sides]
    assert sorted(hellos) == [0, 2], "one conversation twice, without images"
    assert sum(result.num_written.values()) == 43
    assert result.num_written[sides[1]] in (10, 11)  # a quarter of 43
    assert Counter(skip.rule for skip in result.skips) == {"preference_pair": 1}


def test_a_split_is_a_function_of_its_seed(tmp_path):
    given = source(tmp_path, [llava("<image>?", "a", image=f"{n}.png") for n in range(30)])
    held = []
    for number, seed in enumerate((0, 0, 1)):
        split_records(given, tmp_path / f"t{number}.json", tmp_path / f"h{number}.json", share=0.2, seed=seed)
        held.append(read(tmp_path / f"h{number}.json"))
    assert held[0] == held[1] != held[2]
    assert [len(part) for part in held] == [6, 6, 6]


def test_records_about_one_image_cannot_be_split(tmp_path):
    given = source(tmp_path, [llava("<image>?", "a", image="a.png")] * 3)
    with pytest.raises(DataError, match="3 records show one image"):
        split_records(given, tmp_path / "t.json", tmp_path / "h.json", share=0.5, seed=0)
    with pytest.raises(ConfigError, match="--share 1"):
        split_records(given, tmp_path / "t.json", tmp_path / "h.json", share=1, seed=0)


RECORDS = {  # by what is special about them
    "llava": llava("<image>\nWhat?", "A dog.", "Sure?", "Yes.", image="a/b.png"),
    "two images": llava("Is <image> like <image>?", "No.", image=["a.png", "b.png"]),
    "openai": {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [
        {"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "a.png"}}]},
        {"role": "assistant", "content": "A dog."}]},
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]]},
    "caption": {"image": "a.png", "caption": "A dog."},
    "text": {"text": "Once upon a time."},
    "no answer": llava("Hello?", "Yes.", "Who?"),
}  # fmt: skip


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_converted_reads_back_as_the_same_turns_and_images(record, target):
    conversation = parse(record)
    again = parse(json.loads(json.dumps(convert_conversation(conversation, target))), "exact")
    assert (again.turns, again.images) == (conversation.turns, conversation.images)


def test_each_layout_is_written_as_its_readers_expect_it():
    conversation = parse(RECORDS["llava"])
    assert convert_conversation(conversation, "llava", "x1") == {"id": "x1", **RECORDS["llava"]}
    turns = RECORDS["llava"]["conversations"]
    assert convert_conversation(conversation, "sharegpt") == {"conversations": turns, "images": ["a/b.png"]}
    assert convert_conversation(conversation, "openai")["messages"][:2] == [
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "a/b.png"}}, {"type": "text", "text": "\nWhat?"}]},
        {"role": "assistant", "content": "A dog."},
    ]  # fmt: skip


def test_what_a_layout_cannot_say_is_a_rule():
    shown = parse({"image": PIXEL, "caption": "A dog."})
    read_only = parse(
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x", "weight": 0}]}
    )
    for target in ("llava", "sharegpt"):
        for conversation, rule in ((shown, "image_in_record"), (read_only, "reply_not_learned")):
            with pytest.raises(RecordError) as caught:
                convert_conversation(conversation, target)
            assert caught.value.rule == rule
    for conversation in (shown, read_only):
        again = parse(convert_conversation(conversation, "openai"))
        assert (again.turns, again.images) == (conversation.turns, conversation.images)


def test_a_new_layout_is_a_function_and_a_line(monkeypatch):
    """The example of docs/extending.md."""

    def pairs(conversation):
        texts = [turn.text for turn in conversation.turns]
        return {"instruction": texts[::2], "output": texts[1::2]}

    monkeypatch.setitem(TARGETS, "pairs", pairs)
    told = parse(llava("Who?", "I.", "Where?", "Here."))
    assert convert_conversation(told, "pairs") == {"instruction": ["Who?", "Where?"], "output": ["I.", "Here."]}
    with pytest.raises(RecordError, match="as pairs it would be refused"):
        convert_conversation(parse(RECORDS["no answer"]), "pairs")


def test_convert_takes_columns_and_says_what_it_left(tmp_path):
    records = [{"img": "a.png", "alt": "A dog.", "id": 5, "reason": "because it barks"}, {"img": "b.png"}]
    given = source(tmp_path, records, columns={"image": "img", "caption": "alt"}, prompt="What?")
    (tmp_path / "new").mkdir()
    result = convert_records(given, tmp_path / "new/out.jsonl", "llava")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    assert read(tmp_path / "new/out.jsonl") == [{"id": 5, "image": "a.png", "conversations": turns}]
    warning, counts, images = result.lines()
    assert "not read: reason" in warning
    assert counts.endswith("skipped: unknown_format 1")
    assert images == f"images are named from {tmp_path}: set data.sources[].images: {tmp_path}"
