"""Marks of other tools: places of the images, or a reason to skip the record; never words to be learned."""

from __future__ import annotations

import pytest
from records_for_tests import PIXEL, llava, parse, rule_of, said

from vlm.data.conversation import IMAGE
from vlm.data.marks import find_marks, without_marks

KNOWN = {
    "LLaVA": ["<image>", "<im_start><image><im_end>", "<im_patch>"],
    "MiniGPT-4": ["<ImageHere>", "<Img><ImageHere></Img>"],
    "InternVL": ["<img><IMG_CONTEXT><IMG_CONTEXT></img>", "<IMG_CONTEXT>"],
    "Qwen2-VL": ["<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>"],
    "Qwen2.5-Omni": ["<|vision_bos|><|IMAGE|><|vision_eos|>"],
    "MiniCPM-V": ["(<image>./</image>)", "<image>./</image>"],
    "Phi": ["<|image_1|>"],
    "DeepSeek-VL, Janus": ["<image_placeholder>", "<begin_of_image><image_placeholder><end_of_image>"],
    "Llama": ["<|image|>", "<|image_start|><|image|><|patch|><|patch|><|image_end|>"],
    "Gemma 3": ["<start_of_image>", "<start_of_image><image_soft_token><image_soft_token><end_of_image>"],
    "Pixtral": ["[IMG]"],
    "CogVLM, GLM": ["<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_image|><|endoftext|><|end_of_image|>"],
    "Idefics": ["<fake_token_around_image><image><fake_token_around_image>"],
    "Kimi": ["<|media_start|>image<|media_content|><|media_pad|><|media_end|>"],
    "Aria": ["<|img|>"],
    "MMMU": ["<image 1>"],
    "others": ["<Image>", "<IMAGE>", "<image1>", "<image_1>", "<img>", "<img_0>", "<Image-1>", "[image]", "{image}",
               "<image_token>", "<<image>>", "<|image start|>", "<imagePlaceholder>", "<PIC>"],
}  # fmt: skip


@pytest.mark.parametrize("mark", [mark for marks in KNOWN.values() for mark in marks])
def test_a_mark_of_any_tool_is_the_place_of_the_image(mark):
    conversation = parse(llava(f"{mark}Which colour?", "Red.", image="a.png"))
    assert said(conversation) == [("user", IMAGE, "Which colour?"), ("assistant", "Red.")]


@pytest.mark.parametrize("mark", ["<ImageHere>", "<|image_pad|>", "<image_placeholder>", "<|image_1|>", "[IMG]"])
@pytest.mark.parametrize(
    "record",
    [
        lambda mark: llava(f"<image>\n{mark} What?", "A.", image="a.png"),  # beside the image's own place
        lambda mark: llava(f"{mark} {mark} {mark} What?", "A.", images=["a", "b"]),
        lambda mark: llava(f"{mark} What?", "A."),  # the image was forgotten
        lambda mark: llava("<image>\nWhat?", f"A {mark}.", image="a.png"),
        lambda mark: llava([{"type": "image", "image": "a"}, {"type": "text", "text": f"{mark} What?"}], "A."),
        lambda mark: {"image": "a.png", "caption": f"{mark} A dog."},
    ],
)
def test_a_mark_that_fits_no_image_is_not_learned(record, mark):
    assert rule_of(record(mark)) == "foreign_mark"


@pytest.mark.parametrize(
    "text", ["How do I centre an <img> in HTML?", "Run docker rmi <image_name>.", "Is List<Image> right?", "<b>Hi</b>",
             "Play a <video> tag.", "a < b > image", "[1] [image of the mind]", "#include <image.hpp>"]
)  # fmt: skip
def test_words_of_programs_stay_text_in_a_record_without_images(text):
    conversation = parse(llava(text, "<img> and <video>, so."))
    assert said(conversation) == [("user", text), ("assistant", "<img> and <video>, so.")]


def test_a_word_that_may_be_a_mark_is_named_in_the_report():
    assert parse(llava("How do I centre an <img>?", "So.")).unread == ("the word <img>",)
    assert parse(llava("What is it?", "A <|image_1|> mark.")).unread == ("the word <|image_1|>",)
    assert parse(llava("How do I bold <b>?", "So.")).unread == ()


def test_numbers_in_marks_say_which_image():
    record = llava("<|image_2|> or <|image_1|>?", "A.", images=["a.png", "b.png"])
    assert parse(record).images == ("b.png", "a.png")
    assert parse(llava("<image_0><image_1>?", "A.", images=["a", "b"])).images == ("a", "b")
    assert rule_of(llava("<image_1> and <image_1>?", "A.", images=["a", "b"])) == "foreign_mark"
    assert rule_of(llava("<image_1> and <image_3>?", "A.", images=["a", "b"])) == "foreign_mark"


@pytest.mark.parametrize("mark", ["[picture 1]", "{picture_1}", "{Picture 1}", "[img 1]", "{image_1}"])
def test_a_numbered_word_in_brackets_is_the_place_of_the_image(mark):
    assert said(parse(llava(f"{mark} What?", "A.", image="a.png")))[0] == ("user", IMAGE, " What?")


def test_a_path_between_tags_is_the_image():
    conversation = parse(llava("Picture 1: <img>x/a.png</img>\nAnd <img>b.jpg</img>?", "A."))
    assert said(conversation)[0] == ("user", "Picture 1: ", IMAGE, "\nAnd ", IMAGE, "?")
    assert conversation.images == ("x/a.png", "b.jpg")
    assert rule_of(llava("<img>https://example.org/a.png</img>What?", "A.")) == "remote_image"


@pytest.mark.parametrize(
    "text", ["<video>\nWhat?", "<|video_pad|>What?", "What is said? <|audio_1|>", "<audio>a.wav</audio>What?",
             "<video>What?", "Look:\n<audio>\nWhat?", "<|AUDIO|>", "<vi_start><vi_frame><vi_end>"]
)  # fmt: skip
def test_marks_of_videos_and_sounds_skip_the_record(text):
    assert rule_of(llava(text, "A.")) == "unread_medium"
    assert rule_of(llava(f"<image>\n{text}", "A.", image="a.png")) == "unread_medium"


def test_a_question_about_html_beside_an_image_is_not_taken_for_its_place():
    """One image, one tag within a sentence: which is meant cannot be known."""
    assert rule_of(llava("What does <img> do here?", "A.", image="a.png")) == "foreign_mark"
    record = llava("<image>\nWhat does <img> do here?", "It shows.", image="a.png")
    assert said(parse(record))[0] == ("user", IMAGE, "\nWhat does <img> do here?")


@pytest.mark.parametrize("mark", ["<image>", "<|image_1|>", "<ImageHere>"])
def test_a_mark_in_the_prompt_of_a_caption_is_its_place(mark):
    for record, config in (({"prompt": f"See {mark}."}, {}), ({}, {"prompt": f"See {mark}."})):
        conversation = parse({"image": "a.png", "caption": "Red."} | record, **config)
        assert said(conversation) == [("user", "See ", IMAGE, "."), ("assistant", "Red.")]
    assert rule_of({"prompt": f"See {mark}.", "text": "Red."}) in ("foreign_mark", "image_count")


@pytest.mark.parametrize("shown", ["![a dog](dog.png)", '<img src="dog.png">', "<video controls src='a.mp4'>"])
def test_an_image_shown_in_markdown_or_html_is_reported(shown):
    assert rule_of(llava(f"{shown}\nWhat?", "A dog.")) == "unread_medium"
    assert parse(llava(f"Mend this: {shown}", "So.")).unread == ("media shown in Markdown or HTML",)
    assert parse(llava("Show a dog.", f"{shown}")).unread == ()


def test_a_file_written_out_in_a_text_is_not_learned():
    assert rule_of(llava(f"What is {PIXEL}{'A' * 80}?", "A.")) == "unread_medium"


def test_without_marks_a_text_is_read_back_as_words():
    for text in ("an <image>", "<|image_1|>", "[IMG] {image}", "<img>a.png</img>", "<video>"):
        assert all(isinstance(piece, str) for piece in find_marks(without_marks(text)))
        assert without_marks(text).replace(" ", "") == text.replace(" ", "")


@pytest.mark.slow
def test_many_marks_take_no_time():
    """A pass that looks back at every mark would take minutes. Measured: 0.4 s."""
    assert len(find_marks("<image><|x_image|>\n" * 20_000)) == 60_000
