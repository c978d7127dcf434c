"""Figures from scores, with their standard errors. No models here: lists of numbers only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True)
class Figure:
    value: float
    standard_error: float
    num_records: int


def accuracy(log_likelihoods: Sequence[Sequence[float]], answers: Sequence[int]) -> Figure:
    """Share of records whose true candidate is the likeliest.

    Candidates that tie for the highest share the credit: a model that tells none apart gets chance, not 1.

    Args:
        log_likelihoods: per record, one number per candidate: the sum over its tokens, not divided by their number.
        answers: per record, the place of the true candidate.

    >>> accuracy([[-1.0, -3.0], [-2.0, -2.0]], [0, 1]).value
    0.75
    """
    credits = [_credit(scores, answer) for scores, answer in zip(log_likelihoods, answers, strict=True)]
    return mean(credits)


def loss_per_token(losses: Sequence[float], num_tokens: Sequence[int]) -> Figure:
    """Summed loss over all tokens; every token counts equally, whichever record it is in.

    The standard error is that of a ratio of sums over independent records (linearised).

    >>> loss_per_token([2.0, 4.0], [1, 2])
    Figure(value=2.0, standard_error=0.0, num_records=2)
    """
    total = sum(num_tokens)
    if not total:
        return Figure(math.nan, math.nan, len(losses))
    value = sum(losses) / total
    spread = math.fsum((loss - value * count) ** 2 for loss, count in zip(losses, num_tokens, strict=True))
    n = len(losses)
    return Figure(value, math.sqrt(spread * n / (n - 1)) / total if n > 1 else math.nan, n)


def mean(values: Sequence[float]) -> Figure:
    """The mean of one number per record.

    >>> mean([0.0, 1.0])
    Figure(value=0.5, standard_error=0.5, num_records=2)
    """
    n = len(values)
    if not n:
        return Figure(math.nan, math.nan, 0)
    middle = math.fsum(values) / n
    spread = math.fsum((value - middle) ** 2 for value in values)
    return Figure(middle, math.sqrt(spread / (n - 1) / n) if n > 1 else math.nan, n)


def jackknife(sums: Sequence[Sequence[float]], value: Callable[[Sequence[float]], float]) -> Figure:
    """A figure of sums over the records, such as a ratio; its standard error from leaving out one record at a time.

    Args:
        sums: per record, its share of each sum.
        value: the figure, of the totals.

    >>> jackknife([[1, 2], [1, 1]], lambda total: total[0] / total[1])
    Figure(value=0.6666666666666666, standard_error=0.25, num_records=2)
    """
    n = len(sums)
    if not n:
        return Figure(math.nan, math.nan, 0)
    shares = np.asarray(sums, dtype=np.float64)
    total = shares.sum(0)
    if n == 1:
        return Figure(value(total.tolist()), math.nan, 1)
    left = [value(rest) for rest in (total - shares).tolist()]
    middle = math.fsum(left) / n
    spread = math.fsum((each - middle) ** 2 for each in left)
    return Figure(value(total.tolist()), math.sqrt(spread * (n - 1) / n), n)


def majority_share(answers: Sequence[str]) -> float:
    """What always giving the most frequent answer would score.

    >>> majority_share(["cat", "dog", "cat"])
    0.6666666666666666
    """
    return max(Counter(answers).values()) / len(answers)


def derangement(items: Sequence[Item], seed: int, groups: Mapping[Item, Hashable] | None = None) -> dict[Item, Item]:
    """Another item for every distinct item: one random cycle through all (Sattolo 1986), so none stays.

    Args:
        groups: the group of each item; then one cycle through every group. Items alone in theirs form one together.

    Raises:
        ValueError: fewer than two distinct items.
    """
    members: dict[Hashable, list[Item]] = {}
    for item in sorted(set(items), key=str):
        members.setdefault(None if groups is None else groups[item], []).append(item)
    cycles = [cycle for cycle in members.values() if len(cycle) > 1]
    alone = [item for cycle in members.values() if len(cycle) == 1 for item in cycle]
    if len(alone) == 1 and cycles:
        cycles[0].extend(alone)
    elif alone:
        cycles.append(alone)
    if not cycles or len(cycles[-1]) < 2:
        raise ValueError(f"{len(alone)} distinct item(s): nothing to exchange")
    other: dict[Item, Item] = {}
    for cycle in cycles:
        order = np.random.default_rng(seed).permutation(len(cycle))
        other |= {cycle[order[i - 1]]: cycle[order[i]] for i in range(len(cycle))}
    return other


def _credit(scores: Sequence[float], answer: int) -> float:
    best = max(scores)
    return 1 / sum(score == best for score in scores) if scores[answer] == best else 0.0
