"""What each layer of a pipeline costs, and where to cut so that no stage costs much more than another.

Memory is what a pipeline is chosen for, so cuts balance memory; the table shows the share of the computation as well.
The figures are estimates from shapes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import nn

from vlm.models.loss import CHUNK_TOKENS
from vlm.models.pipeline import BlockLayer, InputsLayer, PipelineLayer, pipeline_layers
from vlm.models.vlm import VisionLanguageModel

# bytes per token and unit of width that one block keeps for its backward pass in 16 bit, with fused attention
# (Korthikanti et al. 2022, arXiv:2205.05198, equation 2)
_BLOCK_BYTES = 34
_GIB = 2**30


@dataclass(frozen=True)
class LayerCost:
    """Of one layer of `vlm.models.pipeline`."""

    name: str  # inputs, block, output
    parameters: int
    trained: int  # of the parameters
    state_bytes: float  # weights, gradients, optimizer state
    activation_bytes: float  # kept from the forward to the backward pass of one micro-batch
    transient_bytes: float  # held while the layer computes
    flops: float  # forward and backward of one micro-batch


@dataclass(frozen=True)
class MicroBatchShape:
    """Args: rows B, tokens L, and pictures N of one micro-batch on one data rank."""

    num_rows: int
    num_tokens: int  # per row
    num_images: int = 0

    @property
    def tokens(self) -> int:
        return self.num_rows * self.num_tokens


def layer_costs(
    model: VisionLanguageModel,
    shape: MicroBatchShape,
    *,
    precision: str = "bf16",
    gradient_checkpointing: bool = False,
    num_data_ranks: int = 1,
) -> list[LayerCost]:
    """Cost of every layer.

    Args:
        model: whole, frozen as it will train; on the meta device will do (`build_on_meta`).
        num_data_ranks: over which ZeRO-1 spreads the optimizer state.

    Raises:
        ConfigError: the language model's family cannot be cut.
    """
    frozen_bytes = 2 if precision == "bf16" else 4
    value_bytes = 4 if precision == "fp32" else 2
    costs = []
    for layer in pipeline_layers(model):
        parameters = sum(p.numel() for p in layer.parameters())
        trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        # trained: weight and gradient, and a share of DeepSpeed's copy of both and of AdamW's two averages, in float32
        state = (parameters - trained) * frozen_bytes + trained * (8 + 16 / num_data_ranks)
        if isinstance(layer, InputsLayer):
            name, measured = "inputs", _inputs_cost(model, layer, shape, value_bytes)
        elif isinstance(layer, BlockLayer):
            name, measured = "block", _block_cost(model, layer, shape, value_bytes, gradient_checkpointing)
        else:
            name, measured = "output", _output_cost(model, layer, shape, value_bytes)
        costs.append(LayerCost(name, parameters, trained, state, *measured))
    return costs


def memory_costs(costs: Sequence[LayerCost], num_stages: int) -> list[float]:
    """Bytes per layer for `balanced_cuts`, with as many micro-batches in flight as the first stage has."""
    return [cost.state_bytes + num_stages * cost.activation_bytes + cost.transient_bytes for cost in costs]


def balanced_cuts(costs: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """Cut a row of costs into contiguous stages so that the dearest stage is as cheap as possible.

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
    dearest, _ = _best_cuts(sums, num_stages, max, lambda cost: cost)
    limit = dearest * (1 + 1e-9)  # sums of floats differ in their last digits
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


def describe_cuts(costs: Sequence[LayerCost], cuts: Sequence[int]) -> str:
    """A table for the log: what each stage holds and about what memory it needs."""
    bounds = list(pairwise([0, *cuts, len(costs)]))
    all_flops = sum(cost.flops for cost in costs) or 1.0
    lines = [f"{'stage':>5}  {'layers':<8}{'holds':<30}{'parameters':>16}{'trained':>16}{'GiB':>8}{'compute':>9}"]
    for number, (first, stop) in enumerate(bounds):
        part = costs[first:stop]
        in_flight = len(bounds) - number  # micro-batches between their forward and their backward pass here
        needed = sum(cost.state_bytes + in_flight * cost.activation_bytes for cost in part)
        needed += max(cost.transient_bytes for cost in part)
        lines.append(
            f"{number:>5}  {f'{first}-{stop - 1}':<8}{_contents(part, first):<30}"
            f"{sum(cost.parameters for cost in part):>16,}{sum(cost.trained for cost in part):>16,}"
            f"{needed / _GIB:>8.2f}{sum(cost.flops for cost in part) / all_flops:>9.0%}"
        )
    return "\n".join(lines)


def _contents(part: Sequence[LayerCost], first: int) -> str:
    blocks = [first + i for i, cost in enumerate(part) if cost.name == "block"]
    words = ["inputs"] if part[0].name == "inputs" else []
    if blocks:
        words.append(f"blocks {blocks[0]}-{blocks[-1]}")
    return ", ".join(words + (["output"] if part[-1].name == "output" else []))


def _inputs_cost(
    model: VisionLanguageModel, layer: PipelineLayer, shape: MicroBatchShape, value_bytes: int
) -> tuple[float, float, float]:
    vision, width = model.vision, model.llm.config.hidden_size
    kept = float(shape.tokens * width * value_bytes)
    if vision is None or not shape.num_images:
        return kept, 0.0, 0.0
    patches = shape.num_images * vision.num_patches
    one_block = _BLOCK_BYTES * patches * vision.width * value_bytes / 2
    blocks = len(getattr(vision.trunk, "blocks", ())) or 24  # of a library whose blocks have another name
    weights = sum(p.numel() for p in vision.parameters())
    if vision.is_frozen:
        return kept, one_block, 2.0 * weights * patches
    return kept + blocks * one_block, 0.0, 6.0 * weights * patches


def _block_cost(
    model: VisionLanguageModel, layer: PipelineLayer, shape: MicroBatchShape, value_bytes: int, checkpointing: bool
) -> tuple[float, float, float]:
    width = model.llm.config.hidden_size
    whole = _BLOCK_BYTES * shape.tokens * width * value_bytes / 2
    kept, transient = (shape.tokens * width * value_bytes, whole) if checkpointing else (whole, 0)
    forward = 2.0 * _matrices(layer) * shape.tokens + 2.0 * shape.num_tokens * width * shape.tokens
    weight_gradients = 2.0 * _matrices(layer, trained=True) * shape.tokens
    return float(kept), float(transient), (3 if checkpointing else 2) * forward + weight_gradients


def _output_cost(
    model: VisionLanguageModel, layer: PipelineLayer, shape: MicroBatchShape, value_bytes: int
) -> tuple[float, float, float]:
    """As if every token were supervised."""
    width, (vocabulary, _) = model.llm.config.hidden_size, model.llm.get_output_embeddings().weight.shape
    logits = min(CHUNK_TOKENS, shape.tokens) * vocabulary * (2 * value_bytes + 8)  # and their gradient, in float32 too
    forward = 2.0 * width * vocabulary * shape.tokens
    weight_gradients = 2.0 * _matrices(layer, trained=True) * shape.tokens
    return 2.0 * shape.tokens * width * value_bytes, float(logits), 2 * forward + weight_gradients


def _matrices(layer: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in layer.parameters() if p.ndim >= 2 and (p.requires_grad or not trained))
