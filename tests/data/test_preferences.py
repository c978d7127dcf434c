"""Records that compare or judge replies: how they are written, what is refused, and how a pair lies in a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm.batch import IGNORE_INDEX, Example
from vlm.data.collate import Collator
from vlm.data.config import SourceConfig
from vlm.data.conversation import IMAGE, Preference, Turn
from vlm.data.parse import parse_record
from vlm.data.preferences import parse_judged, parse_preference, parse_verifiable
from vlm.data.records import open_source
from vlm.data.sharing import Shares, find_pair_stem
from vlm.errors import DataError, RecordError
from vlm.models.segments import find_segments

X = IGNORE_INDEX
SOURCE = SourceConfig(path="x.json")


def said(role: str, text: str, key: str = "content") -> dict[str, str]:
    return {"role": role, "content": text} if key == "content" else {"from": role, "value": text}


ASKED, HUMAN = said("user", "Q"), said("human", "Q", "value")
PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Q", "chosen": "good", "rejected": "bad"},
    "texts of RLHF-V": {"question": "Q", "chosen": "good", "rejected": "bad"},
    "whole conversations": {
        "prompt": "Q",
        "chosen": [ASKED, said("assistant", "good")],
        "rejected": [ASKED, said("assistant", "bad")],
    },
    "TRL": {"prompt": [ASKED], "chosen": [said("assistant", "good")], "rejected": [said("assistant", "bad")]},
    "a text prompt, turns": {"prompt": "Q", "chosen": [said("assistant", "good")], "rejected": "bad"},
    "LLaMA-Factory": {
        "conversations": [HUMAN],
        "chosen": said("gpt", "good", "value"),
        "rejected": said("gpt", "bad", "value"),
    },
    "ms-swift": {"messages": [ASKED, said("assistant", "good")], "rejected_response": "bad"},
    "an empty column": {"messages": [ASKED, said("assistant", "good")], "chosen": "", "rejected_response": "bad"},
    "LLM-Genie": {"instruction": "Q", "input": "", "output": ["good", "bad"]},
}


@pytest.mark.parametrize("record", PAIRS.values(), ids=PAIRS.keys())
def test_a_pair_is_read_however_it_is_written(record: dict[str, Any]):
    pair = parse_preference(record, SOURCE)
    assert [turn.text for turn in pair.turns] == ["Q", "good"]
    assert [turn.text for turn in pair.rejected] == ["Q", "bad"]
    assert pair.unread == ()


def test_both_replies_see_the_image_and_only_what_differs_is_learned():
    turns = [said("user", "<image>\nQ"), said("assistant", "yes"), said("user", "And?")]
    pair = parse_preference({"image": "a.png", "messages": turns, "chosen": "good", "rejected": "bad"}, SOURCE)
    chosen, rejected = pair.branches
    assert (chosen.images, rejected.images) == (("a.png",), ("a.png",))
    assert chosen.turns[0] == Turn("user", (IMAGE, "\nQ")) == rejected.turns[0]
    assert [turn.is_learned for turn in chosen.turns if turn.role == "assistant"] == [False, True]


def test_columns_rename_what_a_preference_is_made_of():
    source = SourceConfig(path="x.json", columns={"chosen": "preferred_text", "rejected": "other", "prompt": "ask"})
    pair = parse_preference({"ask": "Q", "preferred_text": "good", "other": "bad"}, source)
    assert (pair.turns[-1].text, pair.rejected[-1].text, pair.unread) == ("good", "bad", ())


def test_a_ranking_of_llama_factory_is_read_where_pairs_are(tmp_path: Path):
    entry = {"file_name": "pairs.json", "ranking": True, "columns": {"prompt": "ask", "chosen": "y", "rejected": "n"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"pairs": entry}))
    (tmp_path / "pairs.json").write_text(json.dumps([{"ask": "Q", "y": "good", "n": "bad"}]))
    source = SourceConfig(path=str(tmp_path / "dataset_info.json"))
    pair = open_source(source, tmp_path, reads="preference").conversation(0)
    assert isinstance(pair, Preference)
    assert (pair.turns[-1].text, pair.rejected[-1].text) == ("good", "bad")
    with pytest.raises(DataError, match="ranking: true, a data set of replies to be compared, for objective dpo"):
        open_source(source, tmp_path)


VERIFIED: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Q", "answer": "4"},
    "a number": {"question": "Q", "answer": 4},
    "TRL": {"prompt": [ASKED], "solution": "4"},
    "open-r1": {"problem": "Q", "solution": "2 + 2 = 4", "answer": "4"},
    "ms-swift": {"messages": [ASKED, said("assistant", "x")], "solution": "4"},
    "TRL, with a reply": {"prompt": [ASKED, said("assistant", "x")], "solution": "4"},
    "LLaVA": {"conversations": [HUMAN], "ground_truth": ["4"]},
    "verl": {"prompt": [ASKED], "reward_model": {"style": "rule", "ground_truth": "4"}, "data_source": "sums"},
}


@pytest.mark.parametrize("record", VERIFIED.values(), ids=VERIFIED.keys())
def test_a_question_with_an_answer_to_verify_is_read_however_it_is_written(record: dict[str, Any]):
    asked = parse_verifiable(record, SOURCE)
    assert [turn.text for turn in asked.turns] == ["Q", "4"]
    assert (asked.answer, asked.unread) == ("4", ())


def test_images_and_earlier_replies_stand_before_the_question_to_verify():
    turns = [said("user", "<image>\nQ"), said("assistant", "yes"), said("user", "And?")]
    source = SourceConfig(path="x.json", columns={"answer": "right"})
    asked = parse_verifiable({"image": "a.png", "messages": turns, "right": "no"}, source)
    assert (asked.images, asked.turns[0].parts) == (("a.png",), (IMAGE, "\nQ"))
    assert [turn.is_learned for turn in asked.turns if turn.role == "assistant"] == [False, True]


REFUSED = [
    (parse_verifiable, {"messages": [ASKED, said("assistant", "x")]}, "no_answer"),
    (parse_verifiable, {"prompt": "Q", "answer": {"a": 1}}, "no_answer"),
    (parse_verifiable, PAIRS["texts"] | {"answer": "4"}, "preference_pair"),
    (parse_verifiable, {"answer": "4"}, "unknown_format"),
    (parse_preference, {"messages": [ASKED, said("assistant", "x")]}, "no_preference"),
    (parse_preference, {"prompt": "Q", "completion": "x", "label": True}, "no_preference"),
    (parse_preference, {"prompt": "Q", "chosen": "x"}, "no_preference"),
    (parse_preference, {"prompt": "Q", "chosen": "x", "rejected": "x"}, "same_replies"),
    (
        parse_preference,
        {"chosen": [ASKED, said("assistant", "x")], "rejected": [said("user", "P"), said("assistant", "y")]},
        "different_prompts",
    ),
    (parse_preference, {"chosen": "x", "rejected": "y"}, "unknown_format"),
    (parse_preference, {"prompt": "Q", "chosen": [1], "rejected": "y"}, "bad_turns"),
    (parse_judged, {"prompt": "Q", "completion": "x"}, "no_label"),
    (parse_judged, {"prompt": "Q", "completion": "x", "label": 0.5}, "no_label"),
    (parse_judged, PAIRS["texts"], "preference_pair"),
    (parse_verifiable, PAIRS["texts"], "preference_pair"),
    (parse_preference, {"prompt": "Q", "chosen": "x", "rejected": ""}, "empty_reply"),
    (parse_preference, {"prompt": "Q", "chosen": [], "rejected": "x"}, "empty_reply"),
    (parse_preference, PAIRS["texts"] | {"images": ["a.png"], "rejected_images": ["b.png"]}, "different_prompts"),
    (parse_judged, PAIRS["texts"] | {"label": True}, "preference_pair"),
    (parse_record, PAIRS["texts"], "preference_pair"),
    (parse_record, PAIRS["LLM-Genie"], "preference_pair"),
    (parse_record, {"prompt": "Q", "completion": "x", "label": False}, "not_to_learn"),
]


@pytest.mark.parametrize(("reader", "record", "rule"), REFUSED)
def test_a_record_of_another_objective_is_refused_by_name(reader, record, rule):
    with pytest.raises(RecordError) as refused:
        reader(record, SOURCE)
    assert refused.value.rule == rule


IMAGE_TURNS = {
    name: [{"role": "user", "content": [{"type": "image", "image": f"{name}.png"}, {"type": "text", "text": "Q"}]},
           said("assistant", name)]
    for name in ("chosen", "rejected")
}  # fmt: skip


@pytest.mark.parametrize(
    ("reader", "record", "told"),
    [
        (parse_preference, IMAGE_TURNS, "different images: both replies must be to the same images"),
        (
            parse_preference,
            PAIRS["texts"] | {"images": ["a.png"], "rejected_images": ["b.png"]},
            "rejected_images are others than the record's",
        ),
        (
            parse_judged,
            {"prompt": "Q", "completion": "x", "label": False, "kto_tag": True},
            "label and kto_tag contradict",
        ),
        (parse_judged, PAIRS["texts"], "for objective dpo, orpo, simpo or reward"),
        (parse_verifiable, {"prompt": "Q", "answer": ""}, "answer is empty; objectives grpo and ppo read"),
        (
            parse_verifiable,
            {"prompt": "Q", "reward_model": {"ground_truth": [1, 2]}},
            "reward_model.ground_truth is a list",
        ),
    ],
)
def test_why_a_record_is_refused_is_said(reader, record, told):
    with pytest.raises(RecordError) as refused:
        reader(record, SOURCE)
    assert told in refused.value.message


def test_the_images_of_a_rejected_reply_may_be_told_again():
    pair = parse_preference(PAIRS["texts"] | {"images": ["a.png"], "rejected_images": ["a.png"]}, SOURCE)
    assert (pair.images, pair.unread) == (("a.png",), ())


@pytest.mark.parametrize(
    ("label", "is_good"), [({"label": True}, True), ({"kto_tag": "false"}, False), ({"desirable": 0}, False)]
)
def test_of_a_judged_record_the_last_reply_is_learned(label, is_good):
    turns = [ASKED, said("assistant", "yes"), said("user", "And?"), said("assistant", "x")]
    judged = parse_judged({"messages": turns} | label, SOURCE)
    assert judged.is_good is is_good
    assert [turn.is_learned for turn in judged.turns if turn.role == "assistant"] == [False, True]


def pair_of(chosen: list[int], rejected: list[int], question: tuple[int, ...] = (1, 2)) -> Example:
    one, other = (
        Example([*question, *reply], [X] * len(question) + reply, where="r", reference=(-1.0, -2.0))
        for reply in (chosen, rejected)
    )
    return Example(one.input_ids, one.labels, where="r", rejected=other, reference=(-1.0, -2.0))


def test_the_replies_of_a_pair_lie_side_by_side_and_share_their_question():
    pair = pair_of([5, 6], [5, 7])
    assert find_pair_stem(pair) == 2  # the 5 that both begin with is learned
    batch = Collator(None, 0, 1, pad_to=10, shares_questions=True)([[pair]])
    assert batch.input_ids.tolist() == [[1, 2, 5, 6, 5, 7, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 0, 0, 0, 0]]
    assert [(s.length, s.shared) for s in find_segments(batch.position_ids)][:2] == [(4, 0), (2, 2)]
    assert batch.replies is not None
    assert batch.replies.number.tolist() == [[0, 0, 0, 0, 1, 1, -1, -1, -1, -1]]
    assert batch.replies.is_good.tolist() == [True, False]
    assert batch.replies.reference is not None
    assert batch.replies.reference.tolist() == [-1.0, -2.0]
    apart = Collator(None, 0, 1, pad_to=10)([[pair]])
    assert apart.input_ids.tolist() == [[1, 2, 5, 6, 1, 2, 5, 7, 0, 0]]


def test_judged_replies_are_numbered_through_the_rows():
    good, bad = (Example([1, 5], [X, 5], is_good=is_good) for is_good in (True, False))
    batch = Collator(None, 0, 1, pad_to=4)([[good, bad], [bad]])
    assert batch.replies is not None
    assert batch.replies.number.tolist() == [[0, 0, 1, 1], [2, 2, -1, -1]]
    assert batch.replies.is_good.tolist() == [True, False, False]
    assert batch.replies.reference is None
    assert Collator(None, 0, 1, pad_to=4)([[]]).replies is None


def test_what_a_pair_takes_of_a_row_is_known_before():
    shares = Shares(keys=np.array([0, 0, 7]), stems=np.array([6, 0, 4]))  # a pair, a text, an image
    assert shares.within.tolist() == [6, 0, 0]
