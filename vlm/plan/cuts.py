"""Where to cut a row of layers so that no stage costs much more than another."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from itertools import accumulate


def balanced_cuts(costs: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """Cut a row of costs into contiguous stages so that the most expensive stage is as cheap as possible.

    Exact, by dynamic programming. Of all such cuts the one whose other stages are the most even is taken (the least
    sum of squares).

    Returns:
        index of the first layer of each stage but the first.

    Raises:
        ValueError: fewer layers than stages.

    >>> balanced_cuts([5, 1, 1, 1, 1, 3], 3)
    (1, 4)
    >>> balanced_cuts([1, 1, 1, 1], 1)
    ()
    """
    if not 1 <= num_stages <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot be cut into {num_stages} stages")
    sums = [0.0, *accumulate(costs)]
    highest, _ = _best_cuts(sums, num_stages, max, lambda cost: cost)
    limit = highest * (1 + 1e-9)  # sums of floats differ in their last digits
    _, cuts = _best_cuts(sums, num_stages, operator.add, lambda cost: cost**2 if cost <= limit else math.inf)
    return tuple(cuts)


def _best_cuts(
    sums: Sequence[float],
    num_stages: int,
    join: Callable[[float, float], float],
    price: Callable[[float], float],
) -> tuple[float, list[int]]:
    """Minimise the join of all stages' prices; `sums[i]` is the cost of the first i layers."""
    num_layers = len(sums) - 1
    best = [price(total) for total in sums]  # of layers [0, stop), with as many stages as were added so far
    choices: list[list[int]] = []
    for stages in range(2, num_stages + 1):
        found, choice = [math.inf] * (num_layers + 1), [0] * (num_layers + 1)
        for stop in range(stages, num_layers + 1):
            options = [(join(best[cut], price(sums[stop] - sums[cut])), cut) for cut in range(stages - 1, stop)]
            found[stop], choice[stop] = min(options)
        best = found
        choices.append(choice)
    cuts: list[int] = []
    stop = num_layers
    for choice in reversed(choices):
        stop = choice[stop]
        cuts.append(stop)
    return best[num_layers], cuts[::-1]
