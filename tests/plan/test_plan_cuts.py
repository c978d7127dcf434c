import itertools

import torch

from vlm.plan.cuts import balanced_cuts


def test_cuts_minimise_the_dearest_stage():
    """Against all ways to cut."""
    generator = torch.Generator().manual_seed(0)
    for layers in range(1, 9):
        costs = torch.randint(1, 10, (layers,), generator=generator).tolist()
        for stages in range(1, layers + 1):
            dearest = [
                max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, layers]))
                for cuts in itertools.combinations(range(1, layers), stages - 1)
            ]
            found = balanced_cuts(costs, stages)
            assert max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *found, layers])) == min(dearest)
