from __future__ import annotations

import math

import pytest

from vlm.evaluation.metrics import accuracy, derangement, jackknife, loss_per_token, majority_share


def test_accuracy_counts_records_whose_true_candidate_is_likeliest():
    figure = accuracy([[-1.0, -2.0], [-5.0, -4.0], [-3.0, -9.0], [-1.0, -0.5]], [0, 0, 0, 1])
    assert figure.value == 0.75
    assert figure.num_records == 4
    assert figure.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))  # sample deviation / sqrt(4)


def test_candidates_that_tie_share_the_credit_so_a_blind_model_gets_chance():
    assert accuracy([[0.0] * 20] * 7, [3] * 7).value == pytest.approx(1 / 20)
    assert accuracy([[-1.0, -1.0, -2.0]], [2]).value == 0.0
    assert accuracy([[-1.0, -1.0, -2.0]], [1]).value == 0.5


def test_a_constant_answer_scores_the_majority_share():
    answers = ["cat", "cat", "dog", "bird"]
    kinds = ["bird", "cat", "dog"]
    always_cat = [[-2.0, -1.0, -3.0]] * 4
    assert accuracy(always_cat, [kinds.index(answer) for answer in answers]).value == majority_share(answers) == 0.5


def test_every_token_counts_equally_whichever_record_it_is_in():
    figure = loss_per_token([1.0, 30.0], [1, 9])
    assert figure.value == pytest.approx(3.1)
    # deviations from the ratio: 1 - 3.1 = -2.1 and 30 - 27.9 = 2.1
    assert figure.standard_error == pytest.approx(math.sqrt((2.1**2 + 2.1**2) * 2) / 10)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    figure = jackknife([[value] for value in (0.0, 0.0, 1.0, 1.0)], lambda total: total[0] / 3)  # of the three left
    assert figure.standard_error == pytest.approx(math.sqrt(1 / 3 / 4))


def test_nothing_to_count_is_not_a_number():
    assert math.isnan(loss_per_token([], []).value)
    assert math.isnan(accuracy([], []).value)


@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_a_derangement_moves_every_image_and_uses_each_once(count: int):
    items = [f"{i}.png" for i in range(count)]
    other = derangement(items, seed=3)
    assert all(other[item] != item for item in items)
    assert sorted(other.values()) == sorted(items)


def test_a_derangement_depends_on_the_seed_only_and_not_on_the_order_or_repeats():
    items = [f"{i}.png" for i in range(20)]
    assert derangement(items, 1) == derangement([*reversed(items), items[3]], 1)
    assert derangement(items, 1) != derangement(items, 2)


def test_a_derangement_stays_within_groups_and_those_who_are_alone_exchange_with_each_other():
    groups = {"a": 1, "b": 1, "c": 2, "d": 2, "e": 2, "f": 3, "g": 4}
    other = derangement([*groups], 5, groups)
    assert [other["a"], other["b"]] == ["b", "a"]
    assert {other[item] for item in "cde"} == set("cde")
    assert [other["f"], other["g"]] == ["g", "f"]
    assert all(other[item] != item for item in groups)


def test_one_who_is_alone_in_its_group_joins_another():
    other = derangement([*"abcf"], 5, {"a": 1, "b": 1, "c": 1, "f": 2})
    assert sorted(other.values()) == [*"abcf"]
    assert all(other[item] != item for item in "abcf")


def test_a_single_image_cannot_be_exchanged():
    with pytest.raises(ValueError, match="nothing to exchange"):
        derangement(["a.png", "a.png"], 0)
