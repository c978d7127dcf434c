"""Written answers -> figures, on answers small enough to count by hand."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from vlm.data.said import letter_of
from vlm.errors import DataError, MissingPackageError
from vlm.evaluation import text_metrics
from vlm.evaluation.metrics import Figure
from vlm.evaluation.task_kinds import MetricName
from vlm.evaluation.text_metrics import TEXT_METRICS, is_yes, relaxed_accuracy, vqa_accuracy


def figures(name: str, written: list[str], right: list[str]) -> dict[str, Figure]:
    return TEXT_METRICS[name].figures(written, [(answer,) for answer in right])


def test_the_config_names_every_metric():
    assert set(get_args(MetricName)) == set(TEXT_METRICS)


def test_bleu_is_that_of_the_corpus_and_chinese_is_cut_into_characters():
    (same,) = figures("bleu", ["a red circle on a table"] * 2, ["a red circle on a table"] * 2).values()
    assert (same.value, same.standard_error) == (1.0, 0.0)
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 threes, 1 of 3 fours, and as long as the answer
    (english,) = figures("bleu", ["the cat sat on the mat"], ["the cat sat on a mat"]).values()
    assert english.value == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    # the same of characters: 5 of 6, 4 of 5, 3 of 4, 2 of 3
    (chinese,) = figures("bleu", ["一只红色的猫"], ["一只红色的狗"]).values()
    assert chinese.value == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)


@pytest.mark.slow  # jieba reads its dictionary
def test_rouge_counts_words_and_jieba_finds_those_of_chinese():
    english = figures("rouge", ["A red circle."], ["a red square"])
    assert [round(figure.value, 4) for figure in english.values()] == [0.6667, 0.5, 0.6667]
    # 一只 红色 的 猫 against 一只 红色 的 狗: 3 of 4 words, 2 of 3 pairs
    chinese = figures("rouge", ["一只红色的猫"], ["一只红色的狗。"])
    assert {name: round(figure.value, 4) for name, figure in chinese.items()} == {
        "ROUGE-1": 0.75, "ROUGE-2": 0.6667, "ROUGE-L": 0.75,
    }  # fmt: skip


def test_yes_and_no_are_counted_as_pope_does():
    """Two of three said yes rightly, two of four that are."""
    written = ["Yes.", "yes, there is", "Yes", "No", "There is no dog.", "No"]
    right = ["yes", "yes", "no", "yes", "yes", "no"]
    found = figures("yes_no", written, right)
    values = {name: round(figure.value, 4) for name, figure in found.items()}
    assert values == {"accuracy": 0.5, "precision": 0.6667, "recall": 0.5, "F1": 0.5714, "yes ratio": 0.5}
    assert found["accuracy"].standard_error == pytest.approx(math.sqrt(0.25 / 5))


@pytest.mark.slow  # the packages of BLEU and ROUGE
@pytest.mark.parametrize("name", TEXT_METRICS)
def test_the_names_of_the_figures_are_known_before(name):
    assert tuple(figures(name, ["A"], ["A" if name != "yes_no" else "yes"])) == TEXT_METRICS[name].names


def test_what_follows_the_answer_counts_for_exact_match_only():
    written, right = ["B. A cat", " B", "A cat", ""], ["B", "B", "a cat", "a"]
    (begins,) = figures("prefix_match", written, right).values()
    (same,) = figures("exact_match", written, right).values()
    assert (begins.value, same.value) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Not at all", False),
        ("It isn't.", False),
        ("Nothing wrong, yes", True),
        ("", None),
        ("对", True),
        ("没错", True),
        ("不错，有", True),
        ("没错，没有", False),
        ("错", False),
    ],
)
def test_an_answer_says_yes_or_no_in_its_first_sentence(text: str, says: bool | None):
    assert is_yes(text) is says


def test_choices_are_told_by_letter():
    found = figures("choice_letter", ["B", "(A) a cat", "The answer is C", "a dog"], ["B", "A", "D", "A"])
    assert found["accuracy by letter"].value == 0.5
    assert letter_of("A cat sits here") is None
    says = {"The answer is a cat": None, "I see no options": None}
    says |= {"The answer is a.": "A", "the answer is (a) cat": "A", "ANSWER: B, a cat": "B"}
    assert {text: letter_of(text) for text in says} == says


@pytest.mark.parametrize(("name", "answer"), [("yes_no", "maybe"), ("choice_letter", "a cat")])
def test_an_answer_that_the_metric_cannot_mean_is_refused(name: str, answer: str):
    with pytest.raises(DataError, match=f"{name}: the answer '{answer}' of a record is"):
        figures(name, ["yes"], [answer])


def test_vqa_wants_three_people_of_ten_and_relaxed_accuracy_five_per_cent():
    people = ["tennis"] * 2 + ["a ball game"] * 8
    assert vqa_accuracy("Tennis!", people) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("ball game", people) == 1.0
    assert [relaxed_accuracy(text, ["1,000"]) for text in ("1050", "1051", "one")] == [1.0, 0.0, 0.0]
    assert relaxed_accuracy("0", ["0"]) == 1.0
    not_finite = [("nan", "nan"), ("NaN", "1"), ("7", "inf"), ("inf", "7")]  # compared as texts
    assert [relaxed_accuracy(text, [answer]) for text, answer in not_finite] == [1.0, 0.0, 0.0, 0.0]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_metrics, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"metric bleu needs sacrebleu, .*\.\[eval\]"):
        TEXT_METRICS["bleu"].check_installed("bleu")
    TEXT_METRICS["yes_no"].check_installed("yes_no")


def test_the_baseline_is_always_the_most_frequent_answer():
    right = [("cat",), ("dog",), ("cat",)]
    assert TEXT_METRICS["exact_match"].baseline(right) == pytest.approx(2 / 3)
    assert TEXT_METRICS["rouge"].baseline(right) is None
