import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.packing import pack, pack_in_windows

NONE = np.zeros(100, dtype=int)


def test_each_example_goes_into_the_fullest_row_that_still_takes_it():
    assert pack(np.array([6, 5, 4, 3]), NONE, max_length=10, max_images=9) == [[0, 2], [1, 3]]
    assert pack(np.array([7, 5, 3, 2, 3]), NONE, max_length=10, max_images=9) == [[0, 2], [1, 3, 4]]


def test_images_are_a_budget_of_their_own():
    lengths, images = np.array([2, 2, 2, 2]), np.array([2, 1, 1, 0])
    assert pack(lengths, images, max_length=100, max_images=2) == [[0], [1, 2, 3]]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=60))
def test_every_example_stands_in_one_row_and_no_budget_is_broken(items):
    lengths, images = (np.array(column) for column in zip(*items, strict=True))
    rows = pack(lengths, images, max_length=50, max_images=3)
    assert sorted(position for row in rows for position in row) == list(range(len(items)))
    assert all(lengths[row].sum() <= 50 and images[row].sum() <= 3 for row in rows)
    half_empty = sum(lengths[row].sum() <= 25 and images[row].sum() <= 1 for row in rows)
    assert half_empty <= 1  # two such rows would have been one


def test_windows_are_packed_apart_and_their_rows_shuffled_by_the_seed():
    lengths = np.arange(1, 41)
    order = np.random.default_rng(0).permutation(40)

    def rows(seed):
        return [
            row.tolist()
            for row in pack_in_windows(
                order, lengths, np.zeros(40, int), max_length=60, max_images=1, window=20, seed=[seed]
            )
        ]

    first = rows(1)
    assert rows(1) == first
    assert rows(2) != first
    assert sorted(map(tuple, rows(2))) == sorted(map(tuple, first))
    window = {number: place // 20 for place, number in enumerate(order.tolist())}
    assert all(len({window[number] for number in row}) == 1 for row in first)
