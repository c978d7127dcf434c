"""Records about one image stand together, and what they begin with alike stands once."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np
import pytest
import torch

from vlm.batch import IGNORE_INDEX, Example
from vlm.data.collate import Collator
from vlm.data.examples import keep
from vlm.data.packing import pack_in_windows
from vlm.data.sharing import Shares, bring_together, find_stem, stem_key, stem_of
from vlm.models.loss import select_supervised

X, IMAGE = IGNORE_INDEX, 9


def example(*text: int, image: str = "a.png", before: tuple[int, ...] = (1,), where: str = "") -> Example:
    """`before`, two placeholders, then the text, of which the last word is a reply."""
    ids = [*before, IMAGE, IMAGE, *text]
    return Example(ids, [X] * (len(ids) - 1) + ids[-1:], (image,), where)


STEMS = [
    (example(5, 6), IMAGE, 3),
    (example(5, 6), None, 0),
    (Example([1, 5], [X, 5]), IMAGE, 0),  # no image
    (Example([1, IMAGE, 5, IMAGE, 6], [X] * 4 + [6], ("a", "b")), IMAGE, 0),  # images apart
    (Example([1, IMAGE, IMAGE, 6], [X] * 3 + [6], ("a", "b")), IMAGE, 3),  # images together
    (Example([1, 5, IMAGE, 6], [X, 5, X, 6], ("a",)), IMAGE, 0),  # a reply before the image
    (Example([1, 5, IMAGE], [X, 5, X], ("a",)), IMAGE, 0),  # the image is last
]


@pytest.mark.parametrize(("example", "image_token_id", "stem"), STEMS)
def test_a_stem_ends_with_the_image_and_is_not_learned(example, image_token_id, stem):
    assert find_stem(example, image_token_id) == stem
    assert stem_of(keep(example, (), image_token_id)) == stem


def key_of(example: Example, stem: int) -> int:
    return stem_key(keep(example, (), IMAGE), stem, IMAGE)


def test_a_key_tells_images_and_what_stands_before_them_apart():
    keys = [key_of(e, 3) for e in (example(5), example(6, 7), example(5, image="b.png"), example(5, before=(2,)))]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert key_of(example(5), 0) == 0


def test_a_key_stays_the_same_as_a_run_that_goes_on_compares_it():
    whole = array("q", [1, IMAGE, IMAGE]).tobytes() + hashlib.sha256(b"a.png").digest()
    assert key_of(example(5), 3) == int.from_bytes(hashlib.sha256(whole).digest()[:8], signed=True)


def test_records_of_one_key_follow_its_first_and_a_repeated_one_does_not_meet_itself():
    keys = np.array([7, 0, 7, 8, 0, 8])
    assert bring_together(np.array([3, 1, 0, 4, 2, 5]), keys).tolist() == [3, 5, 1, 0, 2, 4]
    assert bring_together(np.array([0, 2, 0, 1, 1]), keys).tolist() == [0, 2, 0, 1, 1]


def test_a_group_takes_what_it_takes_and_goes_on_in_another_row_where_it_does_not_fit():
    lengths, images = np.array([10, 10, 10, 10, 4, 30]), np.array([1, 1, 1, 1, 0, 1])
    shares = Shares(keys=np.array([7, 7, 7, 7, 0, 5]), stems=np.array([8, 8, 8, 8, 0, 8]))
    groups, tokens, num_images = shares.groups(np.arange(6), lengths, images, max_length=14)
    assert [group.tolist() for group in groups] == [[0, 1, 2], [3], [4], [5]]
    assert (tokens.tolist(), num_images.tolist()) == ([14, 10, 4, 30], [1, 1, 0, 1])
    rows = pack_in_windows(
        np.arange(5), lengths, images, max_length=14, max_images=1, window=9, seed=[0], shares=shares
    )
    assert sorted(sorted(row.tolist()) for row in rows) == [[0, 1, 2], [3, 4]]


def test_random_records_all_stand_once_and_within_both_budgets():
    rng = np.random.default_rng(0)
    lengths, keys = rng.integers(20, 60, 500), rng.integers(0, 40, 500)
    shares = Shares(keys=keys, stems=np.where(keys > 0, 15, 0))
    images = (keys > 0).astype(int)
    order = rng.permutation(500)
    rows = pack_in_windows(order, lengths, images, max_length=128, max_images=2, window=50, seed=[1], shares=shares)
    assert sorted(np.concatenate(rows).tolist()) == list(range(500))
    for row in rows:
        is_branch = np.r_[False, (keys[row[1:]] == keys[row[:-1]]) & (keys[row[1:]] > 0)]
        assert lengths[row].sum() - 15 * is_branch.sum() <= 128
        assert images[row[~is_branch]].sum() <= 2
    apart = pack_in_windows(order, lengths, images, max_length=128, max_images=2, window=50, seed=[1])
    assert len(rows) < 0.8 * len(apart)


class Pixels(Collator):
    def _pixels(self, example: Example) -> list[torch.Tensor]:
        return [torch.full((1, 3, 2, 2), float(ord(image[0]))) for image in example.images]


def test_a_row_holds_each_image_once_and_positions_go_on_from_it():
    rows = [[example(5, 6), example(7, 8, 2), example(3, 4, image="b.png"), example(5, 2, image="b.png", before=(2,))]]
    collate = Pixels(None, pad_token_id=0, max_pixels=1, image_token_id=IMAGE)
    batch = collate(rows)
    assert batch.input_ids[0, :8].tolist() == [1, 9, 9, 5, 6, 7, 8, 2]
    assert batch.position_ids[0, :13].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3, 4]
    assert batch.labels[0, :8].tolist() == [X, X, X, X, 6, X, X, 2]
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [97, 98, 98]  # the last begins otherwise
    assert (batch.num_padding, len(batch.where)) == (6, 4)
    apart = Pixels(None, pad_token_id=0, max_pixels=1)(rows)
    assert len(apart.pixel_values) == 4
    assert apart.num_supervised == batch.num_supervised == 4


def test_the_end_of_an_image_predicts_the_first_word_of_each_record_that_shares_it():
    first, other = (Example([1, IMAGE, word], [X, X, word], ("a",)) for word in (5, 6))
    batch = Pixels(None, pad_token_id=0, max_pixels=1, image_token_id=IMAGE)([[first, other], [first]])
    hidden = torch.arange(2 * 8.0).view(2, 8, 1)
    states, targets = select_supervised(hidden, batch.labels, batch.position_ids)
    assert targets.tolist() == [5, 6, 5]
    assert states.flatten().tolist() == [1, 1, 9]
