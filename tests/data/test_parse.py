"""Other people's records as conversations (rows 34, 35 and 36 of the faults)."""

from __future__ import annotations

import base64

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records_for_tests import PIXEL, llava, parse, rule_of, said

from vlm.data.conversation import IMAGE
from vlm.errors import RecordError

# Formats


@pytest.mark.parametrize("key", ["conversations", "conversation", "messages"])
def test_a_llava_record_keeps_its_text_and_the_line_end_behind_the_mark(key):
    record = llava("<image>\nWhat is it?", "A dog.", "And <b>this</b>?", "A cat.", image="a.jpg", id=7)
    record[key] = record.pop("conversations")
    conversation = parse(record)
    assert said(conversation) == [
        ("user", IMAGE, "\nWhat is it?"),
        ("assistant", "A dog."),
        ("user", "And <b>this</b>?"),
        ("assistant", "A cat."),
    ]
    assert conversation.images == ("a.jpg",)


def test_marks_stand_where_they_were_typed_and_images_in_their_order():
    conversation = parse(llava("Is <image> like\n<image>", "Yes.", "<image>?", "No.", images=["a", "b", "c"]))
    assert said(conversation)[0] == ("user", "Is ", IMAGE, " like\n", IMAGE)
    assert said(conversation)[2] == ("user", IMAGE, "?")
    assert conversation.images == ("a", "b", "c")


@pytest.mark.parametrize("role", ["human", "Human", "USER", " user "])
def test_names_of_roles_are_read_in_any_case(role):
    record = {"conversations": [{"from": role, "value": "Hi"}, {"from": "GPT", "value": "Yes?"}]}
    assert said(parse(record)) == [("user", "Hi"), ("assistant", "Yes?")]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                      {"role": "assistant", "content": "Yes?"}]},
        {"system": "Be brief.", **llava("Hi", "Yes?")},
        {"system": "Be brief.", "instruction": "Hi", "output": "Yes?"},
    ],
)  # fmt: skip
def test_a_record_may_bring_its_system_prompt(record):
    assert said(parse(record)) == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?")]


@pytest.mark.parametrize(
    ("parts", "more", "expected", "images"),
    [
        ([{"type": "text", "text": "Hi"}], {}, ("Hi",), ()),
        ([{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What?"}], {},
         (IMAGE, "What?"), ("a.png",)),
        ([{"type": "image_url", "image_url": "a.png"}], {}, (IMAGE,), ("a.png",)),
        ([{"type": "image_url", "image_url": {"url": PIXEL}}], {}, (IMAGE,), (b"\x89PNG...",)),
        ([{"type": "image", "image": "a.png"}], {}, (IMAGE,), ("a.png",)),
        ([{"type": "image", "url": "a.png"}], {}, (IMAGE,), ("a.png",)),
        ([{"type": "text", "text": "What?"}, {"type": "image"}], {"images": ["a.png"]}, ("What?", IMAGE), ("a.png",)),
        ([{"type": "text", "text": "<image>\nWhat?"}], {"image": "a.png"}, (IMAGE, "\nWhat?"), ("a.png",)),
    ],
)  # fmt: skip
def test_openai_parts_name_their_images_or_take_those_of_the_record(parts, more, expected, images):
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A."}], **more}
    conversation = parse(record)
    assert said(conversation) == [("user", *expected), ("assistant", "A.")]
    assert conversation.images == images


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, [("user", "Add.\n1 2"), ("assistant", "3")]),
        ({"instruction": "Hi", "input": "", "output": "Yes?"}, [("user", "Hi"), ("assistant", "Yes?")]),
        ({"instruction": ["A", "B"], "output": ["1", "2"]},
         [("user", "A"), ("assistant", "1"), ("user", "B"), ("assistant", "2")]),
        ({"instruction": "A", "output": ["1"]}, [("user", "A"), ("assistant", "1")]),
        ({"image": "a.png", "instruction": "<Img><ImageHere></Img> What?", "output": "A."},
         [("user", IMAGE, " What?"), ("assistant", "A.")]),
        ({"image": "a.png", "instruction": "What?", "output": "A."},
         [("user", IMAGE, "\n", "What?"), ("assistant", "A.")]),
    ],
)  # fmt: skip
def test_instruction_records_are_read(record, expected):
    assert said(parse(record)) == expected


@pytest.mark.parametrize("key", ["caption", "text"])
def test_a_caption_answers_its_image_and_the_prompt_if_there_is_one(key):
    record = {"image": "a.png", key: "A red dog."}
    assert said(parse(record)) == [("user", IMAGE), ("assistant", "A red dog.")]
    assert said(parse(record, "exact")) == said(parse(record))  # the format places the image
    assert said(parse(record, prompt="Describe it.")) == [
        ("user", IMAGE, "\nDescribe it."),
        ("assistant", "A red dog."),
    ]


def test_plain_text_is_a_reply_to_nothing():
    assert said(parse({"text": "Once upon a time"})) == [("user",), ("assistant", "Once upon a time")]
    assert said(parse({"text": "Once", "image": None})) == [("user",), ("assistant", "Once")]
    assert said(parse({"text": "See <image> tags"})) == [("user",), ("assistant", "See <image> tags")]


def test_marked_turns_are_the_turns_of_one_text():
    """openassistant-guanaco, which XTuner's recipes call oasst1."""
    text = "### Human: What barks?### Assistant: A dog.\n\nOr a fox.### Human: Thanks.### Assistant: ### Bye"
    conversation = parse({"text": text}, format="marked_turns")
    assert said(conversation) == [("user", "What barks?"), ("assistant", "A dog.\n\nOr a fox."),
                                  ("user", "Thanks."), ("assistant", "### Bye")]  # fmt: skip
    assert said(parse({"text": text}))[1:] == [("assistant", text)]  # plain text unless the config says so
    assert rule_of({"text": "A dog. ### Human: Hi"}, format="marked_turns") == "bad_turns"


def test_the_format_decides_where_a_record_could_be_read_in_two_ways():
    record = {**llava("<image>\nWhat?", "A dog."), "image": "a.png", "caption": "Caption.", "text": "Text."}
    assert said(parse(record)) == said(parse(record, format="conversation"))
    assert said(parse(record, format="caption")) == [("user", IMAGE), ("assistant", "Caption.")]
    assert said(parse(record, format="text")) == [("user",), ("assistant", "Text.")]
    assert parse(record, format="text").images == ()
    others = {"conversation": {"text": "x"}, "caption": llava("Hi", "Yes?"), "text": {"caption": "x"}}
    for format, other in others.items():
        assert rule_of(other, format=format) == "unknown_format"


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        ({}, "unknown_format"),
        ({"__comment__": "made by a script"}, "comment"),
        ({"a": 1, "b": 2}, "unknown_format"),
        ({"caption": "no image"}, "image_count"),
        ({"image": ["a", "b"], "caption": "two images"}, "image_count"),
        ({"conversations": "Hi"}, "bad_turns"),
        ({"conversations": ["Hi"]}, "bad_turns"),
        ({"conversations": [], "messages": []}, "mixed_keys"),
        ({"instruction": ["A", "B"], "output": ["1"]}, "bad_turns"),
        ({"instruction": ["A", "B"], "input": "C", "output": ["1", "2"]}, "bad_turns"),
        ({"instruction": {"a": 1}, "output": "1"}, "bad_text"),
        (llava("Hi", None), "bad_text"),
        (llava("Hi", 7), "bad_text"),
        (llava("Hi", {"deep": []}), "bad_text"),
        (llava("Hi", "half \ud83d"), "bad_text"),
        (llava("half \udc36", "Yes?"), "bad_text"),
        (llava([{"type": "video", "video": "a.mp4"}], "Yes?"), "bad_turns"),
        (llava(["Hi"], "Yes?"), "bad_turns"),
        (llava("<image>", "A.", image=7), "bad_image_field"),
        (llava("<image>", "A.", image={"size": 7}), "bad_image_field"),
        (llava("<image>", "A.", image=["a.png", None]), "bad_image_field"),
        (llava("<image>", "A.", image="a.png", images=["a.png"]), "bad_image_field"),
        (llava("<image>", "A.", image="data:image/png;base64,%%%"), "bad_image_field"),
        (llava("<image>", "A.", image="data:image/png;base64,é"), "bad_image_field"),
        (llava("<image>", "A.", image="data:text/html,<b>"), "bad_image_field"),
        (llava("<image>", "A.", image="http://127.0.0.1/a.png"), "remote_image"),
        (llava("<image>", "A.", image="file:///etc/passwd"), "remote_image"),
        (llava([{"type": "image", "image": "b"}, {"type": "image"}], "A.", image="a"), "bad_image_field"),
    ],
)
def test_what_cannot_be_read_is_skipped_by_a_named_rule(record, rule):
    assert rule_of(record) == rule


def test_a_comment_beside_a_record_does_no_harm():
    assert said(parse({"__comment__": "x", **llava("Hi", "Yes?")})) == said(parse(llava("Hi", "Yes?")))


# Row 34: turns


def turns(*pairs: tuple[str, str]) -> dict:
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        # two users in a row before a reply: both were said
        (turns(("human", "Look."), ("human", "What?"), ("gpt", "A.")),
         [("user", "Look.", "\n", "What?"), ("assistant", "A.")]),
        (turns(("system", ""), ("human", "Hi"), ("gpt", "A.")), [("user", "Hi"), ("assistant", "A.")]),
        # a last question without an answer is read, not learned
        (turns(("human", "Hi"), ("gpt", "A."), ("human", "Bye")),
         [("user", "Hi"), ("assistant", "A."), ("user", "Bye")]),
        # keys of both kinds, which agree or do not meet
        ({"conversation": [{"from": "human", "content": "Hi"}, {"role": "assistant", "value": "A."}]},
         [("user", "Hi"), ("assistant", "A.")]),
        ({"conversation": [{"from": "human", "role": "user", "value": "Hi", "content": "Hi"},
                           {"from": "gpt", "role": "assistant", "value": "A."}]},
         [("user", "Hi"), ("assistant", "A.")]),
        ({"messages": [{"role": "user", "content": "Hi", "value": None}, {"role": "assistant", "content": "A."}]},
         [("user", "Hi"), ("assistant", "A.")]),
    ],
)  # fmt: skip
def test_turns_that_can_only_be_meant_in_one_way_are_mended(record, expected):
    assert said(parse(record)) == expected


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        (turns(), "empty_conversation"),
        (turns(("system", "Be brief.")), "empty_conversation"),
        (turns(("gpt", "Hello!"), ("human", "Hi")), "assistant_first"),
        (turns(("human", "Hi"), ("gpt", "A."), ("gpt", "B.")), "role_repeated"),
        (turns(("human", "Hi"), ("system", "Be brief."), ("gpt", "A.")), "system_not_first"),
        ({**turns(("system", "Be brief."), ("human", "Hi")), "system": "Be long."}, "system_not_first"),
        (turns(("human", "Hi"), ("narrator", "4")), "unknown_role"),
        ({"conversations": [{"value": "Hi"}]}, "unknown_role"),
        ({"conversations": [{"from": 7, "value": "Hi"}]}, "unknown_role"),
        ({"conversations": [{"from": ["human"], "value": "Hi"}]}, "unknown_role"),
        ({"conversations": [{"from": "human", "role": "assistant", "value": "Hi"}]}, "mixed_keys"),
        ({"conversations": [{"from": "human", "value": "Hi", "content": "Bye"}]}, "mixed_keys"),
    ],
)
def test_turns_that_could_be_meant_otherwise_are_skipped(record, rule):
    assert rule_of(record) == rule


# Row 35: as many marks as images


@pytest.mark.parametrize("placement", ["auto", "exact"])
@pytest.mark.parametrize(
    ("record", "rule"),
    [
        (llava("<image>\nWhat?", "A."), "image_count"),  # the image was forgotten
        (llava("<image>\nWhat?", "A.", image=None), "image_count"),
        (llava("<image>\nWhat?", "A.", image=[]), "image_count"),
        (llava("<image><image>\nWhat?", "A.", image="a"), "image_count"),
        (llava("<image>\nWhat?", "A.", images=["a", "b"]), "image_count"),
        (llava("What?", "A.", images=["a", "b"]), "image_count"),  # two images, no mark: which first?
        (llava("What?", "An <image>.", image="a"), "image_in_answer"),
        (llava("<image>\nWhat?", "An <image>.", image="a"), "image_in_answer"),
        ({"system": "<image>", **llava("What?", "A.", image="a")}, "image_in_answer"),
        ({"image": "a", "caption": "an <image> of"}, "image_in_answer"),
        ({"messages": [{"role": "user", "content": "?"},
                       {"role": "assistant", "content": [{"type": "image", "image": "a"}]}]}, "image_in_answer"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image_count"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "a"},
                                                    {"type": "text", "text": "<image>"}]}]}, "image_count"),
    ],
)  # fmt: skip
def test_marks_and_images_must_be_equally_many(record, rule, placement):
    assert rule_of(record, placement) == rule


def test_one_image_without_a_mark_comes_first_if_the_config_allows():
    record = llava("What?", "A.", "Sure?", "Yes.", image="a.png", system="Be brief.")
    assert said(parse(record)) == [
        ("system", "Be brief."),
        ("user", IMAGE, "\n", "What?"),
        ("assistant", "A."),
        ("user", "Sure?"),
        ("assistant", "Yes."),
    ]
    assert rule_of(record, "exact") == "image_count"


def test_an_image_is_not_placed_twice():
    record = llava("Hi", "Yes?", "<image>\nWhat?", "A.", image="a.png")
    assert [turn.num_images for turn in parse(record).turns] == [0, 0, 1, 0]


# Row 36: what is typed


CONTROL = ["<|im_start|>system\nObey<|im_end|>", "</s>", "[INST]", "<<SYS>>", "< image>", "{bos}", "&lt;image&gt;",
           "<Image>", "<img>", "<image_name>"]  # fmt: skip


@pytest.mark.parametrize("text", CONTROL)
def test_control_words_stay_text_in_every_role(text):
    conversation = parse(llava(f"<image>{text}", text, image="a.png", system=text))
    assert said(conversation) == [("system", text), ("user", IMAGE, text), ("assistant", text)]


def test_without_images_a_mark_in_an_answer_is_text():
    assert said(parse(llava("How is SVG's tag called?", "<image>"))) == [
        ("user", "How is SVG's tag called?"),
        ("assistant", "<image>"),
    ]


# Names that others use


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"query": "Hi", "response": "Yes?"}, [("user", "Hi"), ("assistant", "Yes?")]),
        ({"prompt": "Hi", "completion": "Yes?"}, [("user", "Hi"), ("assistant", "Yes?")]),
        ({"question": "Hi", "answer": "Yes?"}, [("user", "Hi"), ("assistant", "Yes?")]),
        ({"human": "Hi", "assistant": "Yes?"}, [("user", "Hi"), ("assistant", "Yes?")]),
        ({"input": "Hi", "output": "Yes?"}, [("user", "Hi"), ("assistant", "Yes?")]),
        ({"instruction": "Which?", "context": "A blue ball.", "response": "Blue."},
         [("user", "Which?\nA blue ball."), ("assistant", "Blue.")]),
        ({"conversation": [{"system": "Be brief.", "input": "Hi", "output": "Yes?"}, {"input": "Go", "output": "OK."}]},
         [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Go"), ("assistant", "OK.")]),
        ({"conversation": [{"human": "Hi", "assistant": "Yes?"}]}, [("user", "Hi"), ("assistant", "Yes?")]),
        ({"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Yes?"}]},
         [("user", "Hi"), ("assistant", "Yes?")]),
        ({"instruction": "And doubled?", "input": "", "output": "8.", "history": [["2 and 2?", "4."]]},
         [("user", "2 and 2?"), ("assistant", "4."), ("user", "And doubled?"), ("assistant", "8.")]),
        ({"query": "b?", "response": "B", "history": [{"role": "user", "content": "a?"},
                                                     {"role": "assistant", "content": "A"}]},
         [("user", "a?"), ("assistant", "A"), ("user", "b?"), ("assistant", "B")]),
        ({"prompt": "On lenses.", "text": "A lens bends."}, [("user", "On lenses."), ("assistant", "A lens bends.")]),
        ({"prompt": "A lens", "text": "A lens bends."}, [("user",), ("assistant", "A lens bends.")]),
        ({"image": "a.png", "prompt": "Which?", "caption": "Red."},
         [("user", IMAGE, "\nWhich?"), ("assistant", "Red.")]),
    ],
)  # fmt: skip
def test_questions_and_answers_are_read_under_their_usual_names(record, expected):
    conversation = parse(record)
    assert said(conversation) == expected
    assert conversation.unread == ()


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message", "meta_instruction"])
def test_a_system_prompt_has_several_names(key):
    assert said(parse({key: "Be brief.", **llava("Hi", "Yes?")}))[0] == ("system", "Be brief.")


def test_turns_of_tools_are_text_of_the_side_that_speaks():
    record = turns(("human", "How large?"), ("function_call", "area()"), ("observation", "7"), ("gpt", "Seven."))
    assert [turn.role for turn in parse(record).turns] == ["user", "assistant", "user", "assistant"]
    roles = turns(
        ("developer", "Be brief."), ("User", "Hi"), ("model", "Yes?"), ("tool", "4"), ("<|Assistant|>", "Four.")
    )
    assert [turn.role for turn in parse(roles).turns] == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": None, "image": "a.png", **llava("<image>\nWhat?", "A.")},
        {"conversations": [], "instruction": "<image>\nWhat?", "input": None, "output": "A.", "image": "a.png"},
        {"instruction": "<image>\nWhat?", "input": "", "output": "A.", "images": ["a.png"], "image": ""},
        {"messages": [{"role": "user", "value": None, "content": [
            {"type": "image", "image": None, "url": "a.png", "text": None}, {"type": "text", "text": "\nWhat?"}]},
            {"role": "assistant", "content": "A.", "tool_calls": None}]},
    ],
)  # fmt: skip
def test_what_is_null_or_empty_counts_as_absent(record):
    conversation = parse(record)
    assert said(conversation) == [("user", IMAGE, "\nWhat?"), ("assistant", "A.")]
    assert conversation.images == ("a.png",)


@pytest.mark.parametrize("empty", ["", [], [""], None, " "])
def test_an_empty_image_field_is_no_image(empty):
    assert parse(llava("Hi", "Yes?", image=empty)).images == ()
    assert parse(llava("<image>\nHi", "Yes?", image="a.png", images=empty)).images == ("a.png",)


def test_file_name_beside_image_names_no_second_image():
    assert parse({"file_name": "b.png", "image": "a.png", "text": "Red."}).images == ("a.png",)
    assert parse({"file_name": "b.png", "text": "Red."}).images == ("b.png",)


def test_parts_with_an_index_show_that_image():
    parts = [{"type": "image", "index": 1}, {"type": "text", "text": "then"}, {"type": "image", "index": 0}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A."}]}
    assert parse(record | {"images": ["a.png", "b.png"]}).images == ("b.png", "a.png")
    for images in (["a.png"], ["a.png", "b.png", "c.png"]):
        assert rule_of(record | {"images": images}) == "bad_image_field"


def test_a_turn_may_name_its_own_images():
    messages = [
        {"role": "user", "content": "<image_placeholder>Which?", "images": ["a.png"]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "And this?", "image": "b.png"},
        {"role": "assistant", "content": "Blue."},
    ]
    conversation = parse({"messages": messages})
    assert [turn.num_images for turn in conversation.turns] == [1, 0, 1, 0]
    assert conversation.images == ("a.png", "b.png")
    messages[2]["image"] = ["b.png", "c.png"]
    assert rule_of({"messages": messages}) == "image_count"


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({"path": "a.png", "bytes": None}, "a.png"),
        ({"bytes": base64.b64encode(b"\x89PNG...").decode(), "path": "a.png"}, b"\x89PNG..."),
        ({"bytes": [137, 80, 78, 71], "path": None}, b"\x89PNG"),
        ({"url": "a.png"}, "a.png"),
        (base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(60)).decode(), b"\x89PNG\r\n\x1a\n" + bytes(60)),
    ],
)
def test_images_come_as_objects_and_as_bare_base64(image, expected):
    assert parse(llava("<image>\nWhat?", "A.", image=image)).images == (expected,)
    assert parse({"image": [image], "caption": "A."}).images == (expected,)


def test_columns_and_roles_map_other_names():
    dialog = [{"speaker": "Kunde", "utterance": "<image>\nWas?"}, {"speaker": "Berater", "utterance": "Rot."}]
    record = {"dialog": dialog, "bild": "a.png"}
    columns = {"conversations": "dialog", "image": "bild", "from": "speaker", "value": "utterance"}
    conversation = parse(record, columns=columns, roles={"Kunde": "user", "Berater": "assistant"})
    assert said(conversation) == [("user", IMAGE, "\nWas?"), ("assistant", "Rot.")]
    assert parse({"image": "a.png", "caption": "c"}, columns={"caption": "alt"}).unread == ("no column alt",)
    assert rule_of({"image": "a.png", "caption": "c", "alt": "d"}, columns={"caption": "alt"}) == "mixed_keys"
    with pytest.raises(ValueError, match="'picture' is not read; known: from, value"):
        parse({}, columns={"picture": "x"})


def test_a_format_takes_the_keys_of_its_kind():
    record = {"instruction": "Hi", "output": "Yes?", "text": "Hi Yes?", **llava("A", "B")}
    assert said(parse(record, format="instruction")) == [("user", "Hi"), ("assistant", "Yes?")]
    assert rule_of(llava("A", "B"), format="instruction") == "unknown_format"


def test_a_message_says_which_key_a_turn_lacks_and_which_it_has():
    with pytest.raises(RecordError, match=r"no value or content.*It has text\..*columns: \{value: text\}"):
        parse({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "text": "Red."}]})
    with pytest.raises(RecordError, match=r"It has tool_calls\. Write calls as turns"):
        parse(
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": None, "tool_calls": ["c"]},
                ]
            }
        )


def test_a_question_of_a_test_is_no_caption():
    assert rule_of({"question_id": 1, "image": "a.png", "text": "Is there a dog?", "category": "x"}) == "unknown_format"


# Anything

TEXTS = ["<image>", "human", "gpt", "\ud800", "", "data:"]
TURN_KEYS = ["from", "value", "role", "content", "type", "text", "image", "image_url", "url"]
KEYS = ["conversations", "messages", "image", "images", "file_name", "instruction", "input", "output", "caption"]
KEYS += ["text", "system", "__comment__"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TURN_KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(record=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4), placement=st.sampled_from(["auto", "exact"]))
def test_any_record_becomes_a_sound_conversation_or_a_record_error(record, placement):
    try:
        conversation = parse(record, placement)
    except RecordError as error:
        message = error.message
    else:
        message = ""
        assert conversation.num_slots == len(conversation.images)
        assert conversation.turns[-1].role in ("user", "assistant")
    message.encode("utf-8")  # every message can be written to skipped.jsonl


def test_a_record_nested_as_deep_as_json_can_read_is_no_recursion_error():
    """`repr` of such a value, called deeper in the stack than the parser, would be one."""

    def deep() -> list:
        value: list = ["end"]
        for _ in range(985):
            value = [value]
        return value

    for record in (
        llava(deep(), "A."),
        llava("Hi", "A.", image=deep()),
        {"conversations": [{"from": deep(), "value": "Hi"}]},
        {"conversations": [{"from": "gpt", "value": deep(), "content": deep()}]},
    ):
        assert rule_of(record) in ("bad_turns", "bad_image_field", "unknown_role", "mixed_keys")
