"""Records of tasks are read as training reads them: images in every form, marks as their places, or an error."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from tiny_export import write_image
from tokenizers_for_tests import byte_level_bpe

from vlm.data.config import SourceConfig
from vlm.data.records import open_source
from vlm.data.template import TEMPLATES
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import RecordError
from vlm.evaluation.questions import Question
from vlm.evaluation.task_kinds import ChoiceTask

TOKENIZER = byte_level_bpe()
IMAGE_TOKEN_ID = TOKENIZER.convert_tokens_to_ids("<image>")
ENCODE = ConversationTokenizer(TOKENIZER, TEMPLATES["chatml"], image_token_id=IMAGE_TOKEN_ID, tokens_per_image=1)


def question(tmp_path: Path, encode=ENCODE, **record) -> Question:
    record = {"prompt": "Which colour?", "choices": ["Red.", "Blue."], "answer": "Red."} | record
    (tmp_path / "task.jsonl").write_text(json.dumps(record))
    task = ChoiceTask(name="colour", path=str(tmp_path / "task.jsonl"), images=str(tmp_path))
    (found,) = task.questions(encode, tmp_path / "cache")
    return found


def asked(found: Question) -> str:
    text = TOKENIZER.decode(found.prompt_ids)
    return text.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture(autouse=True)
def images(tmp_path):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", seed=1)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"image": "a.png"}, "<image>\nWhich colour?"),
        ({"image": "a.png", "prompt": "<image>\nWhich colour?"}, "<image>\nWhich colour?"),
        ({"image": "a.png", "prompt": "Which colour?\n<image>"}, "Which colour?\n<image>"),
        ({"image": "a.png", "prompt": "<ImageHere>Which colour?"}, "<image>Which colour?"),
        ({"image": None}, "Which colour?"),
        ({"image": ""}, "Which colour?"),
        ({"images": ["a.png"]}, "<image>\nWhich colour?"),
        ({"image": ["a.png", "b.png"]}, "<image><image>\nWhich colour?"),  # as before: all first
        ({"image": ["a.png", "b.png"], "prompt": "<image> or <image>?"}, "<image> or <image>?"),
    ],
)
def test_a_question_is_what_training_makes_of_it(tmp_path, record, text):
    assert asked(question(tmp_path, **record)) == text


def test_images_come_in_every_form_that_training_reads(tmp_path):
    content = (tmp_path / "a.png").read_bytes()
    encoded = base64.b64encode(content).decode()
    for image in (f"data:image/png;base64,{encoded}", encoded, {"bytes": encoded, "path": None}):
        assert question(tmp_path, image=image).images == (content,)
    assert question(tmp_path, image={"path": "a.png"}).images == (str(tmp_path / "a.png"),)


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        ({"image": "https://example.org/a.png"}, "remote_image"),
        ({"image": "a.png", "prompt": "<image><image>?"}, "image_count"),
        ({"image": None, "prompt": "<image>?"}, "image_count"),
        ({"image": "a.png", "prompt": "<image> <|image_2|>?"}, "foreign_mark"),
        ({"image": None, "video": "a.mp4"}, "unread_medium"),
        ({}, "bad_task_record"),
    ],
)
def test_what_training_refuses_ends_the_evaluation(tmp_path, record, rule):
    with pytest.raises(RecordError) as caught:
        question(tmp_path, **record)
    assert caught.value.rule == rule
    assert caught.value.where == "task.jsonl: line 1"


def test_the_ids_are_those_of_the_same_record_in_training(tmp_path):
    found = question(tmp_path, image="a.png", system="Be brief.")
    record = {"image": "a.png", "prompt": "Which colour?", "answer": "Red.", "system": "Be brief."}
    (tmp_path / "train.jsonl").write_text(json.dumps(record))
    source = open_source(SourceConfig(path=str(tmp_path / "train.jsonl")), tmp_path / "cache")
    trained = ENCODE(source.conversation(0))
    assert trained.input_ids[: len(found.prompt_ids)] == found.prompt_ids
    assert trained.input_ids[len(found.prompt_ids) :][: len(found.replies[0])] == found.replies[0]


def test_a_question_that_the_template_leaves_out_and_no_image_is_refused(tmp_path):
    plain = ConversationTokenizer(TOKENIZER, TEMPLATES["plain"], image_token_id=IMAGE_TOKEN_ID, tokens_per_image=1)
    assert question(tmp_path, plain, image="a.png").prompt_ids == [IMAGE_TOKEN_ID]
    with pytest.raises(RecordError, match="line 1: nothing stands before the reply: template plain leaves"):
        question(tmp_path, plain, image=None)


def test_keys_that_no_question_shows_are_told(tmp_path, capsys):
    question(tmp_path, image="a.png", hint="It is warm.")
    assert "colour: not read: hint (all its records" in capsys.readouterr().err
