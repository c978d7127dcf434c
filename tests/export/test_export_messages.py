from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from vlm.data.conversation import IMAGE
from vlm.data.template import TEMPLATES
from vlm.errors import RecordError
from vlm.inference.messages import to_conversation


def png(color: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), color).save(stream, format="PNG")
    return stream.getvalue()


def test_one_image_needs_no_list(tmp_path):
    from PIL import Image

    path = tmp_path / "cat.png"
    Image.new("RGB", (2, 2)).save(path)
    alone = [to_conversation("What is this?", one) for one in (str(path), path, path.read_bytes(), Image.open(path))]
    assert [len(one.images) for one in alone] == [1] * 4


def test_a_plain_question_is_one_user_turn():
    conversation = to_conversation("Hello")
    assert [(turn.role, turn.parts) for turn in conversation.turns] == [("user", ("Hello",))]


def test_images_come_first_and_on_a_line_of_their_own_as_in_training_data():
    conversation = to_conversation("Compare.", ["a.png", "b.png"])
    assert conversation.turns[0].parts == (IMAGE, IMAGE, "\nCompare.")
    assert conversation.images == ("a.png", "b.png")


def test_an_image_without_words_is_a_turn_of_the_image_alone():
    assert to_conversation("", ["a.png"]).turns[0].parts == (IMAGE,)


def test_parts_place_images_and_the_images_argument_fills_the_open_ones():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "image", "image": "b.png"}]},
    ]
    conversation = to_conversation(messages, ["a.png"])
    assert [turn.parts for turn in conversation.turns] == [
        ("Be brief.",),
        (IMAGE, "\nWho?"),
        ("A cat.",),
        ("And", IMAGE),
    ]
    assert conversation.images == ("a.png", "b.png")


def test_images_that_no_part_asks_for_stand_before_the_placed_ones_of_the_first_question():
    messages = [{"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "?"}]}]
    assert to_conversation(messages, ["a.png"]).images == ("a.png", "b.png")


def test_an_image_in_memory_and_a_data_url_keep_every_pixel():
    url = "data:image/png;base64," + base64.b64encode(png("red")).decode()
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    assert to_conversation(messages).images == (png("red"),)
    stored = to_conversation("?", [Image.new("RGB", (2, 2), "red")]).images[0]
    assert Image.open(io.BytesIO(stored)).getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("messages", "images", "rule"),
    [
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/a"}}]}],
            [],
            "remote",
        ),
        ([{"role": "tool", "content": "x"}], [], "unknown_role"),
        ([{"content": "x", "role": "user"}, {"role": "user"}], [], "bad_message"),
        ([{"role": "user", "content": [{"type": "video"}]}], [], "bad_message"),
        ([{"role": "user", "content": [{"type": "image"}]}], [], "image_count"),
        ("x", [3], "bad_message"),
    ],
)
def test_what_cannot_be_read_is_refused_by_a_named_rule(messages: object, images: list[object], rule: str):
    with pytest.raises(RecordError) as caught:
        to_conversation(messages, images)
    assert caught.value.rule.startswith(rule)


def test_a_template_decides_which_orders_a_prompt_may_have():
    greeting = [{"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Hi"}]
    with pytest.raises(RecordError, match="turn 1 is assistant"):
        to_conversation(greeting)
    assert [turn.role for turn in to_conversation(greeting, (), TEMPLATES["chatml"]).turns] == ["assistant", "user"]
    with pytest.raises(RecordError, match="template llama2 cannot write") as caught:
        to_conversation(greeting, (), TEMPLATES["llama2"])
    assert caught.value.rule == "turn_order"
    with pytest.raises(RecordError, match="image stands in a system or assistant turn"):
        to_conversation([{"role": "assistant", "content": [{"type": "image"}]}], [b""], TEMPLATES["chatml"])


def test_users_in_a_row_are_one_turn_of_a_prompt():
    rows = [{"role": "user", "content": "One"}, {"role": "user", "content": "two"}]
    assert to_conversation(rows, (), TEMPLATES["chatml"]).turns[0].text == "One\ntwo"
