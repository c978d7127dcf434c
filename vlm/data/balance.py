"""Deal the rows of a step to data ranks so that none waits for the others. Which rows the step has does not change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowSizes:
    """What rows hold, int64 [n] each."""

    tokens: np.ndarray  # that are computed: an image's tokens once, where records share it
    pairs: np.ndarray  # (query, key) that attention meets, record by record
    images: np.ndarray
    supervised: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class RowWork:
    """What a row costs, in any unit, as a sum over what it holds. Whole numbers: alike on every machine."""

    token: int
    pair: int
    image: int
    supervised: int

    def of(self, sizes: RowSizes) -> np.ndarray:
        """int64 [n]."""
        return (
            sizes.tokens * self.token
            + sizes.pairs * self.pair
            + sizes.images * self.image
            + sizes.supervised * self.supervised
        )


def deal(work: np.ndarray, num_ranks: int) -> np.ndarray:
    """Give every rank equally many rows and nearly equal work.

    In rounds: the rows in descending order of work, so many as there are ranks at a time; of a round the rank with the
    least work so far takes the largest row. So the sums are even at the end of the step, where ranks that hold the
    whole model meet, and the rows of one round are alike, which is where ranks meet that gather the model's parts.

    Args:
        work: of each row, int64 [n], n a multiple of `num_ranks`.

    Returns:
        positions into `work`, int64 [num_ranks, n / num_ranks], a rank's largest rows first. One rank takes all rows
        in their own order.

    >>> deal(np.array([1, 8, 2, 7, 3, 6]), num_ranks=2).tolist()
    [[1, 4, 2], [3, 5, 0]]
    """
    if num_ranks == 1:
        return np.arange(len(work))[None]
    rounds = np.argsort(-work, kind="stable").reshape(-1, num_ranks)
    dealt = np.empty_like(rounds.T)
    done = np.zeros(num_ranks, dtype=np.int64)
    for number, rows in enumerate(rounds):
        ranks = np.argsort(done, kind="stable")
        dealt[ranks, number] = rows
        done[ranks] += work[rows]
    return dealt
