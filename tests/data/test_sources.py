"""Sources as a whole: where they are, which links and names they may use, and when one of them is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from records_for_tests import llava

from vlm.data.build import build_conversation_tokenizer, build_data, build_reader
from vlm.data.config import DataConfig, SourceConfig
from vlm.data.folder import FolderIndex
from vlm.data.records import open_source
from vlm.data.report import check_records, preview_records
from vlm.data.scan import refuse_too_many, scan_records
from vlm.errors import DataError, RecordError

CAPTION = {"image": "a.png", "caption": "Red."}


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9)).save(path)
    return path


def lines(path: Path, *records: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def message(source, number: int = 0) -> str:
    with pytest.raises(RecordError) as caught:
        source.conversation(number)
    return f"{caught.value.rule}: {caught.value.message}"


# Links


def test_links_of_a_hugging_face_cache_lead_to_its_blobs(tmp_path):
    snapshot = tmp_path / "datasets--x--y/snapshots/rev"
    blob = image(tmp_path / "datasets--x--y/blobs/0123.png")
    secret = image(tmp_path / "secret.png")
    (snapshot / "images").mkdir(parents=True)
    (snapshot / "images/a.png").symlink_to("../../../blobs/0123.png")
    (snapshot / "images/b.png").symlink_to(secret)
    names = ["a.png", "b.png", "../../../blobs/0123.png"]
    path = lines(snapshot / "data.jsonl", *(CAPTION | {"image": name} for name in names))
    source = open_source(SourceConfig(path=path, images=str(snapshot / "images")), tmp_path / "cache")
    assert source.conversation(0).images == (str(blob),)
    assert message(source, 1).startswith("image_outside_root: image 'b.png' is a link that leads out of images/, to ")
    assert "data.sources[].links" in message(source, 1)
    assert message(source, 2).startswith("image_outside_root: image '../../../blobs/0123.png' leads out of images/")


def test_links_to_another_disk_are_allowed_by_name(tmp_path):
    kept = image(tmp_path / "disk/store/a.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").symlink_to(kept)
    (tmp_path / "images/sub").symlink_to(tmp_path / "disk/store")
    path = lines(tmp_path / "images/data.jsonl", CAPTION, CAPTION | {"image": "sub/a.png"})
    refused = open_source(SourceConfig(path=path), tmp_path / "cache")
    assert "is a link that leads out" in message(refused)
    allowed = open_source(SourceConfig(path=path, links=(str(tmp_path / "disk"),)), tmp_path / "cache")
    assert allowed.conversation(0).images == allowed.conversation(1).images == (str(kept),)


# Names


@pytest.mark.parametrize(
    ("name", "there", "said"),
    [
        ("sub\\a.png", "sub/a.png", "but 'sub/a.png' is (with /, not \\)"),
        ("cafe\u0301.png", "caf\u00e9.png", "is (in another Unicode form)"),
        ("caf\u00e9.png", "cafe\u0301.png", "is (in another Unicode form)"),
        ("d.jpg", "d.JPG", "but 'd.JPG' is"),
        ("d.jpg", "d.png", "but 'd.png' is"),
        ("d", "d.jpeg", "but 'd.jpeg' is (with another ending)"),
        ("Dog.png", "dog.png", "but 'dog.png' is"),
        ("Train/Dog.PNG", "train/dog.png", "but 'train/dog.png' is (in other letters)"),
        ("train/a.png", "a.png", "but 'a.png' is (directly in images/)"),
        ("images/x/a.png", "x/a.png", "but 'x/a.png' is (without images/, which images: names already)"),
        ("/data/images/a.png", "a.png", "but 'a.png' is"),
        ("C:\\data\\a.png", "a.png", "but 'a.png' is"),
        ("a%20b.png", "a b.png", "but 'a b.png' is (without URL escapes)"),
        ("a.png ", "a.png", "but 'a.png' is (without the blanks)"),
    ],
)
def test_a_file_of_nearly_the_name_is_suggested(tmp_path, name, there, said):
    image(tmp_path / "images" / there)
    path = lines(tmp_path / "data.jsonl", CAPTION | {"image": name})
    source = open_source(SourceConfig(path=path, images=str(tmp_path / "images")), tmp_path / "cache")
    assert said in message(source)
    with pytest.raises(DataError) as scanned:
        refuse(message(source))
    assert "images: names the wrong folder" not in str(scanned.value)


def refuse(text: str) -> None:
    from vlm.batch import Skip
    from vlm.data.skips import refuse_too_many

    rule, _, said = text.partition(": ")
    refuse_too_many([Skip(rule, "a.json: record 1", said)], 1, 0.0)


def test_nothing_is_suggested_where_nothing_is_near(tmp_path):
    image(tmp_path / "images/other.png")
    path = lines(tmp_path / "data.jsonl", CAPTION)
    source = open_source(SourceConfig(path=path, images=str(tmp_path / "images")), tmp_path / "cache")
    assert message(source) == "image_missing: image 'a.png' is no file below images/"


# Folders


def test_litter_in_a_folder_is_left_out_and_counted(tmp_path, capsys):
    litter = ["._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "@eaDir/a.png", "b/.hid/c.png"]
    for name in ["a.png", *litter]:
        image(tmp_path / "out" / name)
    (tmp_path / "out/a.txt").write_text("Red.")
    assert FolderIndex(tmp_path / "out").names == ["a.png"]
    assert "out: 5 images in hidden files or folders are left out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metadata.jsonl", "train/metadata.csv", "data.json"])
def test_a_folder_with_records_beside_its_images_points_to_them(tmp_path, name):
    image(tmp_path / "hf/train/a.png")
    lines(tmp_path / "hf" / name, CAPTION)
    with pytest.raises(DataError, match=f"has a .txt beside it. It has {name}: name that file as the path"):
        FolderIndex(tmp_path / "hf")


# LLaMA-Factory


INFO = {
    "one": {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "dialog", "images": "pics"},
            "tags": {"role_tag": "who", "content_tag": "said", "user_tag": "Q", "assistant_tag": "A"}},
    "two": {"file_name": "b.jsonl", "num_samples": 9,
            "columns": {"prompt": "ask", "query": "about", "response": "reply"}},
    "far": {"hf_hub_url": "x/y"},
    "pairs": {"file_name": "c.json", "ranking": True},
}  # fmt: skip


@pytest.fixture
def info(tmp_path) -> Path:
    image(tmp_path / "a.png")
    dialog = [{"who": "Q", "said": "<image>\nWhat?"}, {"who": "A", "said": "Red."}]
    (tmp_path / "a.json").write_text(json.dumps([{"dialog": dialog, "pics": ["a.png"]}]))
    lines(tmp_path / "b.jsonl", {"ask": "Add.", "about": "1 2", "reply": "3"})
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    return tmp_path / "dataset_info.json"


def test_an_entry_of_a_dataset_info_is_read_with_its_names(info, tmp_path, capsys):
    one = open_source(SourceConfig(path=str(info), dataset="one"), tmp_path / "cache").conversation(0)
    assert [(turn.role, turn.text) for turn in one.turns] == [("user", "\nWhat?"), ("assistant", "Red.")]
    assert one.images == (str(tmp_path / "a.png"),)
    assert one.unread == ()
    two = open_source(SourceConfig(path=str(info), dataset="two"), tmp_path / "cache").conversation(0)
    assert [turn.text for turn in two.turns] == ["Add.\n1 2", "3"]
    assert "entry two: not read: num_samples: 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (None, "set data.sources[].dataset to one of: one, two, far, pairs"),
        ("three", "has no entry 'three'"),
        ("far", "names no file on disk"),
        ("pairs", "replies to be compared"),
    ],
)
def test_an_entry_that_cannot_be_read_is_refused(info, tmp_path, dataset, said):
    with pytest.raises(DataError) as caught:
        open_source(SourceConfig(path=str(info), dataset=dataset), tmp_path / "cache")
    assert said in str(caught.value)


def test_dataset_beside_any_other_file_is_refused(info, tmp_path):
    with pytest.raises(DataError, match=r"is no dataset_info\.json"):
        open_source(SourceConfig(path=str(tmp_path / "a.json"), dataset="one"), tmp_path / "cache")


# Each source by itself


@pytest.fixture
def mixed(tmp_path, bpe, spec):
    """(config, tokenizer): 40 good records in one/train.jsonl, 2 without their images in two/train.jsonl."""
    image(tmp_path / "one/a.png")
    good = [{"id": n, "notes": "x", **llava("<image>\nWhat?", "Red.", image="a.png")} for n in range(40)]
    paths = [lines(tmp_path / "one/train.jsonl", *good), lines(tmp_path / "two/train.jsonl", CAPTION, CAPTION)]
    sources = [SourceConfig(path=path) for path in paths]
    config = DataConfig(sources=sources, cache=str(tmp_path / "cache"), max_length=96, max_skipped_share=1.0)
    return config, build_conversation_tokenizer(config, bpe, spec, bpe.convert_tokens_to_ids("<image>"))


def test_a_source_of_which_nothing_can_be_used_stops_the_run(mixed, spec, bpe, capsys):
    config, chat = mixed
    lost = r"data source two/train\.jsonl: no record can be used\. 2 of 2 .*two/train\.jsonl: line 1: "
    with pytest.raises(DataError, match=lost):
        check_records(config, chat, spec)
    assert "one/train.jsonl: 40 of 40 records can be used\ntwo/train.jsonl: 0 of 2" in capsys.readouterr().out
    scan = scan_records(build_reader(config, config.sources, chat), None)
    with pytest.raises(DataError, match=lost):
        refuse_too_many(scan, 1.0)
    token = bpe.convert_tokens_to_ids("<image>")
    with pytest.raises(DataError, match=lost):
        build_data(config, bpe, spec, token, seed=0, global_batch_size=1, micro_batch_size=1)


def test_what_is_not_read_is_told_once_per_source_with_its_share_from_the_cache_too(mixed, tmp_path):
    config, chat = mixed
    expected = ["data: one/train.jsonl: not read: notes (all its records, first in one/train.jsonl: line 1)"]
    for _ in range(2):
        assert scan_records(build_reader(config, config.sources, chat), tmp_path / "cache").warnings() == expected


def test_preview_says_why_it_shows_nothing(mixed, spec, tmp_path, capsys):
    config, chat = mixed
    config = config.model_copy(update={"sources": config.sources[1:]})
    with pytest.raises(DataError, match=r"none of 2 records can be shown \(image_missing 2\)"):
        preview_records(config, chat, spec, number=3, out=tmp_path / "sheet.png")
    assert "not shown: train.jsonl: line 1: [image_missing] image 'a.png'" in capsys.readouterr().out


def test_settings_that_the_plain_template_does_not_use_are_told(tmp_path, bpe, spec, capsys):
    path = lines(tmp_path / "a.jsonl", llava("Hi", "Yes?", "And?", "So."), {"system": "s", **llava("Hi", "Yes?")})
    source = SourceConfig(path=path, prompt="Describe it.")
    config = DataConfig(
        sources=[source], cache=str(tmp_path / "cache"), template="plain", system="Be brief.",
        packing=False, pack_window=9, eval_sources=[SourceConfig(path=path, weight=2)], held_out=0.1,
    )  # fmt: skip
    chat = build_conversation_tokenizer(config, bpe, spec, bpe.convert_tokens_to_ids("<image>"))
    told = capsys.readouterr().err
    assert "the prompt of" in told
    assert "data.system is not used: template plain" in told
    assert "data.pack_window is not used: data.packing is false" in told
    assert "a.jsonl is not used: data.eval_sources are read once" in told
    assert "data.held_out: its records are neither trained on nor evaluated" in told
    (line,) = scan_records(build_reader(config, config.sources, chat), None).warnings()
    assert "questions (template plain writes the user's images only) (all its records" in line
    assert "system prompts (template plain writes the user's images only) (50 % of its records" in line
    assert "data.sources[].prompt (all its records" in line


def test_a_reply_that_is_not_to_be_learned_has_no_labels(bpe, spec, tmp_path):
    record = llava("One and one?", "Three.", "Wrong. Again?", "Two.")
    record["conversations"][1]["loss"] = False
    config = DataConfig(sources=[SourceConfig(path=lines(tmp_path / "a.jsonl", record))], cache=str(tmp_path / "cache"))
    chat = build_conversation_tokenizer(config, bpe, spec, bpe.convert_tokens_to_ids("<image>"))
    example = build_reader(config, config.sources, chat).read(0)
    assert bpe.decode([label for label in example.labels if label >= 0]) == "Two.<|im_end|>"


def test_an_empty_reply_between_others_is_not_learned(bpe, spec, tmp_path):
    path = lines(tmp_path / "a.jsonl", llava("Hi", "", "Which colour?", "Red."), llava("Hi", " "))
    config = DataConfig(sources=[SourceConfig(path=path)], cache=str(tmp_path / "cache"))
    chat = build_conversation_tokenizer(config, bpe, spec, bpe.convert_tokens_to_ids("<image>"))
    rules = []
    for number in range(2):
        with pytest.raises(RecordError) as caught:
            build_reader(config, config.sources, chat).read(number)
        rules.append(caught.value.rule)
    assert rules == ["empty_reply", "no_supervised_tokens"]
