"""What of a record is not read: a rule where it changes what is learned, else a name to be counted."""

from __future__ import annotations

import base64

import pytest
from records_for_tests import PIXEL, llava, parse, rule_of

from vlm.errors import RecordError

JPEG = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(range(90))).decode()
MP4 = base64.b64encode(b"\0\0\0\x18ftypmp42" + bytes(range(90))).decode()


@pytest.mark.parametrize(
    "extra",
    [
        {"image_path": "a.png"}, {"img": "a.png"}, {"image_file": "a"}, {"image_url": "a.png"}, {"Image": "a.png"},
        {"picture": "a.png"}, {"photo": ["a", "b"]}, {"imagePath": "x/a"}, {"pixel_values": [[0.1, 0.2]]},
        {"video": "v/5.mp4"}, {"videos": ["1.mp4"]}, {"audios": ["1.mp3"]}, {"frames": ["1.jpg", "2.jpg"]},
        {"x": "some/where.JPEG"}, {"x": "a.webm?start=3"}, {"x": ["note", "b.wav"]}, {"x": {"y": {"z": "c.tiff"}}},
        {"x": "https://example.org/page"}, {"x": "s3://bucket/key"}, {"source_url": "https://example.org/a.jpg"},
        {"x": PIXEL + "A" * 80}, {"x": f"see {PIXEL}{'A' * 80}"}, {"x": JPEG}, {"x": MP4}, {"x": "Q" * 2000},
        {"photo_url": "photos/17"}, {"image_link": "x"}, {"jpg": "abcd"}, {"media": {"type": "image", "file": "x"}},
        {"x": {"bytes": "abcd", "path": None}}, {"x": {"array": [0.1], "sampling_rate": 16000}},
        {"image_id": 17}, {"image_id": "000017"}, {"video_id": "x"}, {"id": "coco/17.jpg"}, {"meta": {"f": "a.png"}},
    ],
)  # fmt: skip
def test_a_medium_under_another_key_skips_the_record(extra):
    assert rule_of(llava("Which colour?", "Red.") | extra) == "unread_medium"
    assert rule_of({"instruction": "Which?", "output": "Red."} | extra) == "unread_medium"
    turn = {"messages": [{"role": "user", "content": "Which?", **extra}, {"role": "assistant", "content": "Red."}]}
    assert rule_of(turn) == "unread_medium"


@pytest.mark.parametrize(
    "extra",
    [
        {"id": "a1"}, {"id": 3, "source": "coco"}, {"width": 3, "height": 4}, {"image_size": [3, 4]}, {"num_images": 0},
        {"has_image": False}, {"url": "https://example.org/page"}, {"dataset": "x", "split": "train"},
        {"metadata": {"a": [1, 2]}}, {"question_id": 4, "category": "random"}, {"model": ""},
        {"videos": [], "video": None}, {"license": "https://example.org/by"}, {"image_caption": None},
    ],
)  # fmt: skip
def test_bookkeeping_is_not_worth_a_word(extra):
    assert parse(llava("Which colour?", "Red.") | extra).unread == ()


def test_names_of_the_record_s_own_image_are_no_other_image():
    more = {
        "image_id": 17,
        "id": "17.jpg",
        "coco_url": "http://example.org/17.jpg",
        "orig": "train/17.jpg",
        "img_name": "x.jpg",
    }
    assert parse(llava("<image>\nWhich?", "Red.", image="coco/17.jpg") | more).images == ("coco/17.jpg",)
    assert rule_of(llava("<image>\nWhich?", "Red.", image="17.jpg", mask="17_mask.png")) == "unread_medium"


@pytest.mark.parametrize("extra", [{"image_id": "17"}, {"img": "a.png"}, {"video": "a.mp4"}, {"photo": {"path": "a"}}])
def test_a_caption_without_its_image_says_where_one_is(extra):
    with pytest.raises(RecordError, match=r"columns: \{image: ") as caught:
        parse({"caption": "A dog."} | extra)
    assert caught.value.rule == "unread_medium"


def test_a_second_image_beside_one_that_is_read_is_reported():
    for more in ({"image_url": "b.png"}, {"image_url": ["b.png"]}, {"index": {"path": "b.png"}}, {"url": "b.png"}):
        part = {"type": "image", "image": "a.png", **more}
        assert rule_of({"messages": [{"role": "user", "content": [part]}]}) == "unread_medium"
        assert rule_of({"image": "a.png", "caption": "Red."} | more) == "unread_medium"
    assert rule_of({"image": {"path": "a.png", "url": "b.png"}, "caption": "Red."}) == "unread_medium"


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ({"task": "Answer in capitals."}, ("task",)),
        ({"extra_info": {"a": "so"}}, ("extra_info",)),
        ({"tools": "[...]"}, ("tools",)),
        ({"notes": "long"}, ("notes",)),
        ({"objects": {"bbox": [[1, 2, 3, 4]]}}, ("objects",)),
        ({"metadata": {"text": "x" * 400}}, ("metadata",)),  # too long for bookkeeping
        ({"weight": 70.5}, ("weight",)),
        ({"label": 0}, ("label",)),  # a class, not a verdict
        ({"caption": "c", "text": "t"}, ("caption", "text")),
    ],
)
def test_other_keys_with_content_are_named(extra, names):
    assert parse(llava("Which colour?", "Red.") | extra).unread == names


def test_keys_of_turns_and_parts_are_named_with_their_place():
    turns = [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": "x"}], "mood": "glad"},
             {"role": "assistant", "content": "Two.", "reasoning_content": "One and one."}]  # fmt: skip
    assert parse({"messages": turns}).unread == (
        "turns[].mood", "turns[].parts[].cache_control", "turns[].reasoning_content",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "rule"),
    [
        ({"chosen": "x"}, "preference_pair"),
        ({"rejected": {"from": "gpt", "value": "x"}}, "preference_pair"),
        ({"rejected_response": "x"}, "preference_pair"),
        ({"Rejected": "x"}, "preference_pair"),
        ({"label": False}, "not_to_learn"),
        ({"label": "false"}, "not_to_learn"),
        ({"kto_tag": False}, "not_to_learn"),
        ({"loss": False}, "not_to_learn"),
        ({"weight": 0}, "not_to_learn"),
        ({"train": "0"}, "not_to_learn"),
        ({"Loss": False}, "not_to_learn"),
        ({"conversations": [{"from": "human", "value": "a <bbox>?"}, {"from": "gpt", "value": "x"}],
          "objects": {"bbox": [[1, 2, 3, 4]]}}, "foreign_mark"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x", "rejected": "y"}]},
         "preference_pair"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x", "label": False}]},
         "not_to_learn"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x", "loss": 0.5}]},
         "not_to_learn"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x", "tool_calls": ["c"]}]},
         "unread_reply"),
    ],
)  # fmt: skip
def test_settings_that_change_what_is_learned_have_rules_of_their_own(extra, rule):
    assert rule_of(llava("Hi", "Yes?") | extra) == rule


def test_what_says_that_a_record_is_to_be_learned_is_read():
    assert parse(llava("Hi", "Yes?", label=True, loss=True, weight=1, train="true")).unread == ()


@pytest.mark.parametrize("flag", [{"loss": False}, {"weight": 0}, {"train": False}, {"trainable": 0}, {"weight": 0.0}])
def test_a_reply_may_be_read_and_not_learned(flag):
    record = llava("One and one?", "Three.", "Wrong. Again?", "Two.")
    record["conversations"][1] |= flag
    record["conversations"][0] |= flag
    conversation = parse(record)
    assert [turn.is_learned for turn in conversation.turns if turn.role == "assistant"] == [False, True]
    assert conversation.unread == ()


def test_a_user_s_turn_is_never_learned_and_a_wish_for_it_is_reported():
    record = llava("One and one?", "Two.")
    record["conversations"][0]["train"] = True
    assert parse(record).unread == ("turns[].train",)


def test_a_prompt_that_no_record_uses_is_reported():
    assert parse(llava("Hi", "Yes?"), prompt="Describe it.").unread == ("data.sources[].prompt",)
    assert parse({"image": "a.png", "caption": "Red."}, prompt="Describe it.").unread == ()
