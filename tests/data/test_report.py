import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vlm.batch import IGNORE_INDEX
from vlm.data.build import build_conversation_tokenizer, build_reader
from vlm.data.config import DataConfig, SourceConfig
from vlm.data.report import check_records, coloured, contact_sheet, preview_records, print_stats
from vlm.errors import DataError


@pytest.fixture
def made(bpe, spec):
    """(config, conversation tokenizer) for one file, or several."""

    def make(*paths, **settings):
        sources = [SourceConfig(path=str(path)) for path in paths]
        cache = str(paths[0].parent / "cache")
        config = DataConfig(sources=sources, cache=cache, **{"max_length": 96, "max_images": 3} | settings)
        return config, build_conversation_tokenizer(config, bpe, spec, bpe.convert_tokens_to_ids("<image>"))

    return make


def example(config, chat, number):
    return build_reader(config, config.sources, chat).read(number)


def test_check_decodes_every_image_and_lists_each_bad_record_once(records, made, spec, tmp_path, capsys):
    path = records(12)
    (tmp_path / "4.png").write_bytes(b"no image")
    (tmp_path / "7.png").unlink()
    config, chat = made(path, max_skipped_share=0.2)
    by_rule = check_records(config, chat, spec, out=tmp_path / "lists/bad.jsonl")
    assert by_rule == Counter(image_unreadable=1, image_missing=1)
    out = capsys.readouterr().out
    assert "records.jsonl: line 5: [image_unreadable]" in out
    assert "12 records, 6 images, skipped: image_unreadable 1, image_missing 1" in out
    listed = [json.loads(line) for line in (tmp_path / "lists/bad.jsonl").read_text().splitlines()]
    assert [(line["rule"], line["where"]) for line in listed] == [
        ("image_unreadable", "records.jsonl: line 5"),
        ("image_missing", "records.jsonl: line 8"),
    ]


def test_check_of_sound_data_finds_nothing(records, made, spec, capsys):
    assert check_records(*made(records(12)), spec) == Counter()
    assert "12 records, 8 images, skipped: none" in capsys.readouterr().out


def test_check_as_json_says_the_same_also_where_it_ends_with_an_error(records, made, spec, tmp_path, capsys):
    path = records(12)
    (tmp_path / "7.png").unlink()
    with pytest.raises(DataError):
        check_records(*made(path, max_skipped_share=0.01), spec, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["records"], found["images"], found["skipped"]) == (12, 7, {"image_missing": 1})
    assert found["sources"] == [{"name": "records.jsonl", "records": 12, "usable": 11}]
    assert [(bad["rule"], bad["where"]) for bad in found["bad"]] == [("image_missing", "records.jsonl: line 8")]


def test_check_goes_through_the_eval_sources_as_well(records, made, spec, capsys):
    config, chat = made(records(3))
    other = records(4, name="other.jsonl")
    check_records(config.model_copy(update={"eval_sources": (SourceConfig(path=str(other)),)}), chat, spec)
    assert "7 records" in capsys.readouterr().out


def test_check_prints_a_few_and_ends_with_an_error_when_the_share_is_too_large(records, made, spec, tmp_path, capsys):
    config, chat = made(records(12), max_skipped_share=0.5)
    for image in tmp_path.glob("*.png"):
        image.unlink()
    with pytest.raises(DataError, match=r"8 of 12 records skipped \(image_missing 8\).*line 2.*line 3.*line 5"):
        check_records(config, chat, spec, limit=2)
    out = capsys.readouterr().out
    assert out.count("[image_missing]") == 2
    assert "... and 6 more" in out


@pytest.mark.thorough
@pytest.mark.slow  # two processes that import torch
def test_checking_processes_find_the_same(records, made, spec, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm.data.report.CHUNK", 3)
    path = records(12)
    (tmp_path / "4.png").write_bytes(b"no image")
    lists = []
    for workers in (0, 2):
        config, chat = made(path, workers=workers, max_skipped_share=1)
        check_records(config, chat, spec, out=tmp_path / f"{workers}.jsonl")
        lists.append((tmp_path / f"{workers}.jsonl").read_text())
    assert lists[0] == lists[1]
    assert "image_unreadable" in lists[0]


def test_what_is_learned_is_green_and_images_are_counted_not_spelled(records, made):
    text = coloured(example(*made(records(3)), 1), made(records(3))[1])
    assert text.plain == (
        "<|im_start|>user\n[image x 3]\nQuestion 1?<|im_end|>\n<|im_start|>assistant\nAnswer 1.<|im_end|>\n"
    )
    green = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert green == ["Answer 1.<|im_end|>"]


def test_images_side_by_side_are_two(bpe, spec, made, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image><image>Same?"}, {"from": "gpt", "value": "Yes."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": ["a.png", "a.png"], "conversations": turns}))
    config, chat = made(tmp_path / "a.jsonl")
    assert "[image x 3][image x 3]Same?" in coloured(example(config, chat, 0), chat).plain


def test_a_data_file_cannot_steer_the_terminal(made, tmp_path):
    turns = [{"from": "human", "value": "\x1b[2J[bold]Hi[/bold]"}, {"from": "gpt", "value": "Yes."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns}))
    config, chat = made(tmp_path / "a.jsonl")
    shown = coloured(example(config, chat, 0), chat).plain
    assert "\x1b" not in shown
    assert "[bold]Hi[/bold]" in shown


def test_preview_shows_sources_in_turn_and_saves_what_the_encoder_sees(records, made, spec, tmp_path, capsys):
    first, second = records(6), records(6, name="a[1].jsonl")
    Image.new("RGB", (40, 10), (200, 0, 0)).save(tmp_path / "1.png")
    config, chat = made(first, second)
    preview_records(config, chat, spec, number=4, out=tmp_path / "new/sheet.png")
    out = capsys.readouterr().out
    places = [out.index(where) for where in ("records.jsonl: line 1", "a[1].jsonl: line 1", "records.jsonl: line 2")]
    assert places == sorted(places)
    sheet = np.asarray(Image.open(tmp_path / "new/sheet.png"))
    assert sheet.shape == (28 + 14 + 8, 2 * (28 + 8), 3)  # two images of 28 pixels, each with a caption
    assert sheet[4 + 14, 4 + 14].tolist() == [200, 0, 0]  # the image's middle
    assert sheet[4 + 2, 4 + 14].tolist() == [255, 255, 255]  # padded to a square with the background


def test_preview_goes_on_after_an_image_that_cannot_be_read(records, made, spec, tmp_path, capsys):
    path = records(6)
    (tmp_path / "1.png").write_bytes(b"no image")
    preview_records(*made(path), spec, number=3, out=tmp_path / "sheet.png")
    out = capsys.readouterr().out
    assert "left out of training: " in out
    assert "1 images as the encoder sees them" in out


def test_preview_without_images_writes_no_sheet(records, made, tmp_path):
    preview_records(*made(records(3)), None, number=1, out=tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()


JUDGED = {
    "preference": (
        {"prompt": "Q", "chosen": "good", "rejected": "a bad one"},
        ["chosen, {0} tokens, {1} supervised", "rejected, {2} tokens, {3} supervised"],
    ),
    "judged": ({"prompt": "Q", "completion": "good", "label": False}, ["bad, {0} tokens, {1} supervised"]),
    "verifiable": (
        {"prompt": "Q", "answer": "good"},
        ["question and answer, {0} tokens, 0 supervised"],
    ),
}


@pytest.mark.parametrize("reads", JUDGED)
def test_what_is_judged_is_checked_previewed_and_counted_like_conversations(reads, made, spec, tmp_path, capsys):
    """An image of a pair counts once."""
    record, headings = JUDGED[reads]
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    lines = [json.dumps(each) for each in (record | {"image": "a.png"}, record, record | {"image": "none.png"})]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    config, chat = made(tmp_path / "records.jsonl", max_skipped_share=0.5)
    assert check_records(config, chat, spec, reads=reads) == Counter(image_missing=1)
    assert "3 records, 1 images, skipped: image_missing 1" in capsys.readouterr().out
    preview_records(config, chat, spec, number=1, out=tmp_path / "sheet.png", reads=reads)
    out = capsys.readouterr().out
    found = build_reader(config, config.sources, chat, reads).read(0)
    counts = [count for branch in found.branches for count in (len(branch.input_ids), branch.num_supervised)]
    assert all(f"records.jsonl: line 1: {heading.format(*counts)}" in out for heading in headings)
    assert "1 images as the encoder sees them" in out
    print_stats(config, chat, reads=reads, as_json=True)
    stats = json.loads(capsys.readouterr().out)
    assert (stats["records"], stats["usable"], stats["images"]) == (3, 2, 1)
    assert (stats["supervised_tokens"]["longest"] > 0) == (reads != "verifiable")


def test_a_sheet_takes_captions_in_any_script():
    sheet = contact_sheet([(Image.new("RGB", (28, 28)), "圆.jsonl: line 1")] * 8)
    assert sheet.size == (6 * 36, 2 * 50)


def test_stats_count_tokens_replies_and_the_fill_of_rows(records, made, capsys):
    config, chat = made(records(12, longest=3))
    print_stats(config, chat)
    out = capsys.readouterr().out
    lengths = [len(example(config, chat, number).input_ids) for number in range(12)]
    learned = [sum(label != IGNORE_INDEX for label in example(config, chat, number).labels) for number in range(12)]
    assert "12 records, 12 usable, 8 images" in out
    assert (
        f"tokens per record: mean {np.mean(lengths):.1f}, median {np.median(lengths):.0f}, longest {max(lengths)}"
        in out
    )
    assert f"supervised tokens per record: mean {np.mean(learned):.1f}" in out
    assert "replies per record (12 records): mean 2.0, median 2, longest 3" in out
    num_rows = int(out.split("rows of 96 tokens: ")[1].split()[0])
    assert f"{sum(lengths) / num_rows / 96:.1%} full, {12 / num_rows:.1f} records" in out.replace("\n", " ")


def test_stats_as_json(records, made, capsys):
    config, chat = made(records(12, longest=3))
    print_stats(config, chat, as_json=True)
    found = json.loads(capsys.readouterr().out)
    lengths = [len(example(config, chat, number).input_ids) for number in range(12)]
    assert (found["records"], found["usable"], found["images"]) == (12, 12, 8)
    assert (found["tokens"]["mean"], found["tokens"]["longest"]) == (pytest.approx(np.mean(lengths)), max(lengths))
    assert sum(found["replies"]["counts"]) == 12
    rows = found["rows"]
    assert rows["full"] == pytest.approx(sum(lengths) / rows["an_epoch"] / 96)


def test_stats_of_data_that_is_all_held_out_is_an_error(records, made):
    config, chat = made(records(2), held_out=0.999999)
    with pytest.raises(DataError, match="no record is left"):
        print_stats(config, chat)
