"""Packing: examples -> rows under a token and an image budget."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np

from vlm.data.sharing import Shares, bring_together

GROUPS_AT_A_TIME = 50


def pack(lengths: np.ndarray, num_images: np.ndarray, max_length: int, max_images: int) -> list[list[int]]:
    """Best fit, longest first: each example goes into the fullest row that still takes it.

    Args:
        lengths: tokens of each example, int [n], each at most `max_length`.
        num_images: images of each example, int [n], each at most `max_images`.

    Returns:
        rows of positions into `lengths`; within a row in ascending order. Every example stands in one row.

    >>> pack(np.array([6, 5, 4, 3]), np.zeros(4, int), max_length=10, max_images=9)
    [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    images_left: list[int] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for position in np.argsort(-lengths, kind="stable").tolist():
        length, images = int(lengths[position]), int(num_images[position])
        at = bisect_left(free, (length, -1))
        while at < len(free) and images_left[free[at][1]] < images:
            at += 1
        if at < len(free):
            left, row = free.pop(at)
            rows[row].append(position)
        else:
            left, row = max_length, len(rows)
            rows.append([position])
            images_left.append(max_images)
        images_left[row] -= images
        if left > length:
            insort(free, (left - length, row))
    return [sorted(row) for row in rows]


class Rows:
    """The rows of an epoch: record numbers in two arrays, which a file can hold and a run can map.

    Args:
        numbers: of the records of all rows, int64 [n].
        ends: where each row ends in `numbers`, int64 [rows].

    >>> rows = Rows(np.array([4, 7, 5]), np.array([2, 3]))
    >>> len(rows), rows[0].tolist(), [row.tolist() for row in rows]
    (2, [4, 7], [[4, 7], [5]])
    """

    def __init__(self, numbers: np.ndarray, ends: np.ndarray) -> None:
        self.numbers = numbers
        self.ends = ends

    @staticmethod
    def of(rows: Sequence[np.ndarray]) -> Rows:
        numbers = np.concatenate(rows) if len(rows) else np.zeros(0, dtype=np.int64)
        return Rows(numbers, np.cumsum([len(row) for row in rows], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.numbers[self.ends[row - 1] if row else 0 : self.ends[row]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    @property
    def follows(self) -> np.ndarray:
        """Whether each record stands in the row of the one before it, bool [n]."""
        follows = np.ones(len(self.numbers), dtype=bool)
        follows[:1] = False
        follows[self.ends[self.ends < len(self.numbers)]] = False
        return follows

    def sums(self, values: np.ndarray) -> np.ndarray:
        """The sum of each row over a whole number per record.

        Args:
            values: int [n], in the order of `numbers`.

        Returns:
            int64 [rows]; 0 for a row without records.
        """
        totals = np.r_[0, np.cumsum(values, dtype=np.int64)]
        return np.diff(totals[np.r_[0, self.ends]])


def pack_in_windows(
    order: np.ndarray, lengths: np.ndarray, num_images: np.ndarray, *, max_length: int, max_images: int, window: int,
    seed: list[int], shares: Shares | None = None,
) -> list[np.ndarray]:  # fmt: skip
    """Pack `window` records at a time, in the order given, and shuffle the rows within each window.

    Shuffled because packing puts the long records into the first rows. A million records of 30 to 2048 tokens take
    1.1 s on one core, and rows of 2048 in windows of 512 are 99 % full.

    Args:
        order: record numbers, int [n].
        lengths, num_images: of all records, indexed by record number.
        seed: seeds the shuffle, together with the window's number.
        shares: which records may share their beginning; those of one image then stand together.

    Returns:
        rows of record numbers.
    """
    rows: list[np.ndarray] = []
    order = order if shares is None else bring_together(order, shares.keys)
    for number, start in enumerate(range(0, len(order), window)):
        part = order[start : start + window]
        if shares is None:
            packed = pack(lengths[part], num_images[part], max_length, max_images)
            found = [part[row] for row in packed]
        else:
            groups, tokens, images = shares.groups(part, lengths, num_images, max_length)
            found = [np.concatenate([groups[i] for i in row]) for row in pack(tokens, images, max_length, max_images)]
        shuffle = np.random.default_rng([*seed, number]).permutation(len(found))
        rows += [found[i] for i in shuffle]
    return rows


def group_by_length(order: np.ndarray, lengths: np.ndarray, size: int, *, seed: list[int]) -> np.ndarray:
    """Bring records of similar length together, `size` at a time; which of these groups comes when stays random.

    Among GROUPS_AT_A_TIME groups' worth of records each, as transformers' `group_by_length` does. A last group that is
    not full stays last.

    Args:
        order: record numbers, int [n].
        lengths: tokens of all records, indexed by record number.
        seed: seeds the order of the groups.

    >>> group_by_length(np.arange(5), np.array([9, 1, 8, 2, 5]), 2, seed=[0]).tolist()
    [1, 3, 4, 2, 0]
    """
    window, ordered = size * GROUPS_AT_A_TIME, list[np.ndarray]()
    for number, start in enumerate(range(0, len(order), window)):
        part = order[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        random = np.random.default_rng([*seed, number])
        num_whole, rest = divmod(len(part), size)
        at = int(random.integers(num_whole + 1)) * size  # the records that are not a whole group may be of any length
        last = part[at : at + rest]
        groups = np.delete(part, slice(at, at + rest)).reshape(num_whole, size)
        ordered += [*groups[random.permutation(num_whole)], last]
    return np.concatenate(ordered) if ordered else order
