"""Sources of records: files, folders and the images that they name (row 29 of the faults)."""

from __future__ import annotations

import csv
import json
import os
import pickle
from pathlib import Path

import pytest
from records_for_tests import PIXEL, llava, said

from vlm.data.config import SourceConfig
from vlm.data.conversation import IMAGE, Conversation, Turn
from vlm.data.records import open_source
from vlm.errors import DataError, RecordError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.jpg"):
        (tmp_path / "images" / name).write_bytes(b"x")
    return tmp_path


def source(folder: Path, name: str, content: str, **config):
    (folder / name).write_text(content, encoding="utf-8")
    return open_source(SourceConfig(path=str(folder / name), images=str(folder / "images"), **config), folder / "cache")


def outcomes(records) -> list:
    return [outcome(records, number) for number in range(len(records))]


def outcome(records, number: int) -> Conversation | str:
    try:
        return records.conversation(number)
    except RecordError as error:
        where, rule = error.where, error.rule
    assert where == records.where(number)
    return rule


def test_a_source_gives_conversations_with_images_that_exist_and_says_where_the_others_stand(folder):
    (folder / "images2").mkdir()
    (folder / "images2" / "a.png").write_bytes(b"x")
    names = ["a.png", "none.png", "../images2/a.png", "\0", "b.jpg"]
    lines = [json.dumps(llava("<image>\nWhat?", "A.", image=name)) for name in names]
    records = source(folder, "mix.jsonl", "\n".join([*lines, "{", json.dumps({"__comment__": "end"})]))
    found = outcomes(records)
    assert found[1:4] + found[5:] == ["image_missing", "image_outside_root", "bad_image_field", "bad_json", "comment"]
    assert found[0] == Conversation(
        (Turn("user", (IMAGE, "\nWhat?")), Turn("assistant", ("A.",))),
        (str((folder / "images/a.png").resolve()),),
        "mix.jsonl: line 1",
    )
    assert found[4].where == "mix.jsonl: line 5"
    with pytest.raises(RecordError, match=r"^mix\.jsonl: line 2: image 'none\.png' is no file below images/$"):
        records.conversation(1)


def test_images_default_to_the_folder_of_the_file(folder):
    (folder / "images/x.json").write_text(json.dumps([{"image": "b.jpg", "caption": "B"}]))
    records = open_source(SourceConfig(path=str(folder / "images/x.json")), folder / "cache")
    assert records.conversation(0).images == (str((folder / "images/b.jpg").resolve()),)


def test_images_inside_the_record_need_no_file(folder):
    records = source(folder, "x.json", json.dumps([{"image": PIXEL, "caption": "B"}]))
    assert records.conversation(0).images == (b"\x89PNG...",)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv"])
def test_caption_pairs_are_read_from_lists_lines_and_tables(folder, suffix):
    pairs = [{"image": "a.png", "caption": 'A "red", round\nthing'}, {"image": "b.jpg", "caption": "狗"}]
    if suffix == "json":
        text = json.dumps(pairs)
    elif suffix == "jsonl":
        text = "\n".join(map(json.dumps, pairs))
    else:
        with (folder / "out").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["image", "caption"], delimiter="," if suffix == "csv" else "\t")
            writer.writeheader()
            writer.writerows(pairs)
        text = (folder / "out").read_bytes().decode()
    records = source(folder, f"x.{suffix}", text)
    assert [found.turns[1].text for found in outcomes(records)] == [pair["caption"] for pair in pairs]
    assert [Path(found.images[0]).name for found in outcomes(records)] == ["a.png", "b.jpg"]


def test_a_folder_of_images_is_read_with_the_texts_beside_them(folder):
    images = folder / "images"
    (images / "sub").mkdir()
    for name in ("sub/c.PNG", "d.png", "e.png", "f.png"):
        (images / name).write_bytes(b"x")
    for name, text in (("a.txt", "\ufeffA dog.\n"), ("b.txt", "A cat."), ("sub/c.txt", " A bird. ")):
        (images / name).write_text(text, encoding="utf-8")
    (images / "e.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "secret.txt").write_text("secret")
    (images / "f.txt").symlink_to(folder / "secret.txt")  # a caption may lead out as little as an image
    records = open_source(SourceConfig(path=str(images), prompt="What?"), folder / "cache")
    found = outcomes(records)
    assert [records.where(number) for number in range(6)] == [
        f"images: {name}" for name in ("a.png", "b.jpg", "d.png", "e.png", "f.png", "sub/c.PNG")
    ]
    assert found[2:5] == ["caption_missing", "bad_text", "caption_missing"]
    assert [found[number].turns[1].text for number in (0, 1, 5)] == ["A dog.", "A cat.", "A bird."]
    assert said(found[0])[0] == ("user", IMAGE, "\nWhat?")
    assert found[5].images == (str((images / "sub/c.PNG").resolve()),)


def test_the_fingerprint_changes_with_the_file_and_with_each_caption_of_a_folder(folder):
    first = source(folder, "x.json", "[{}]").fingerprint
    assert source(folder, "x.json", "[{}, {}]").fingerprint != first
    config = SourceConfig(path=str(folder / "images"))
    seen = [open_source(config, folder).fingerprint]
    for edit in ("A dog.", "A cat!!"):
        (folder / "images/a.txt").write_text(edit)
        seen.append(open_source(config, folder).fingerprint)
    os.utime(folder / "images/b.jpg", ns=(1, 1))  # row 31: an image that was touched
    seen.append(open_source(config, folder).fingerprint)
    assert len(set(seen)) == 4
    assert open_source(config, folder).fingerprint == seen[-1]


def test_a_source_goes_to_a_worker_and_reads_there(folder):
    records = source(folder, "x.json", json.dumps([llava("Hi", "Yes?")]))
    assert outcomes(pickle.loads(pickle.dumps(records))) == outcomes(records)


@pytest.mark.parametrize(
    ("path", "images", "said"),
    [
        ("none.json", None, "does not exist"),
        ("empty.json", None, "holds no records"),
        ("head.csv", None, "holds no records"),
        ("blank.jsonl", None, "holds no records"),
        ("good.json", "nowhere", "images folder"),
        ("nothing", None, "holds no images"),
    ],
)
def test_a_source_that_holds_nothing_stops_the_run(folder, path, images, said):
    (folder / "nothing").mkdir()
    for name, text in (
        ("empty.json", "[ ]"),
        ("head.csv", "image,caption\n"),
        ("blank.jsonl", "\n\n"),
        ("good.json", "[{}]"),
    ):
        (folder / name).write_text(text)
    config = SourceConfig(path=str(folder / path), images=None if images is None else str(folder / images))
    with pytest.raises(DataError, match=said) as caught:
        open_source(config, folder / "cache")
    assert not isinstance(caught.value, RecordError)
