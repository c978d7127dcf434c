"""A projector that starts from least squares: the tokens of an image begin near the words of its replies.

Ridge regression of the last layer: from what it reads for each token of an image to the mean input embedding of the
words said about that image, about their common mean. A language model reads such tokens as vague words, so training
begins where a random projector comes only after many steps. Fits short captions; in long replies the mean of the
words says little.

Letters in shapes: N images, T tokens per image, K inputs of the last layer, D LLM width.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm.batch import IGNORE_INDEX, Batch
from vlm.errors import ConfigError
from vlm.models.projector import Projector

RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)  # shares of the inputs' mean variance
HELD_OUT = 10  # every tenth image chooses among them
MOST_INPUTS = 8192  # of the last layer; their products take 8 K**2 bytes, and solving K**3 / 3 operations per ridge
CANDIDATES = 20


@dataclass(frozen=True)
class Fit:
    """What least squares found, measured on images that it was not fitted to."""

    num_images: int  # fitted to; an image of several records counts once for each
    num_held_out: int
    ridge: float
    explained: float  # share of the targets' variance
    found: float  # share of images whose own words are the nearest among CANDIDATES


class Moments:
    """Sums over tokens, in float64, that least squares needs."""

    def __init__(self, num_inputs: int, width: int) -> None:
        self.count = 0
        self.inputs = torch.zeros(num_inputs, dtype=torch.float64)
        self.targets = torch.zeros(width, dtype=torch.float64)
        self.square = torch.zeros(num_inputs, num_inputs, dtype=torch.float64)
        self.product = torch.zeros(num_inputs, width, dtype=torch.float64)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """inputs [N, T, K], targets [N, D]: each token of an image has the image's target."""
        num_tokens = inputs.shape[1]
        flat, summed = inputs.flatten(0, 1), inputs.sum(1)
        self.count += len(flat)
        self.inputs += summed.sum(0).double().cpu()
        self.targets += num_tokens * targets.sum(0).double().cpu()
        self.square += (flat.T @ flat).double().cpu()
        self.product += (summed.T @ targets).double().cpu()

    def covariance(self) -> Tensor:
        """Of the inputs, [K, K], float64."""
        mean = self.inputs / self.count
        return self.square / self.count - mean[:, None] * mean

    def solve(self, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """Weight [K, D] of inputs and targets about their means, and these means, all float32."""
        mean, target = self.inputs / self.count, self.targets / self.count
        square = self.covariance()
        product = self.product / self.count - mean[:, None] * target
        square.diagonal().add_(ridge * square.diagonal().mean().clamp_min(1e-12))
        weight = torch.cholesky_solve(product, torch.linalg.cholesky(square))
        return weight.float(), mean.float(), target.float()


@torch.no_grad()
def fit_least_squares(
    projector: Projector,
    embedding: Tensor,
    image_token_id: int,
    batches: Iterable[tuple[Batch, Tensor]],
    scale: float = 1.0,
) -> Fit:
    """Set the projector's last layer; the layers before it stay as they are.

    The output gets the standard deviation of the token embeddings, as a random projector's has.

    Args:
        embedding: [V, D], of the language model's input tokens.
        batches: with the encoder's features [N, P, C] of each one's images. Gone through once.
        scale: what the model multiplies looked-up embeddings by; see `embedding_scale`.

    Raises:
        ConfigError: the last layer reads too many channels; no image has a reply; or too few to hold some out.
    """
    last = projector.layers[-1]
    assert isinstance(last, nn.Linear)
    if last.in_features > MOST_INPUTS:
        raise ConfigError(
            f"model.projector.initialize least_squares: the projector's last layer reads {last.in_features:,} "
            f"channels, at most {MOST_INPUTS:,} can be solved for. Average patches (pool) rather than merge them"
        )
    moments, held_out = Moments(last.in_features, last.out_features), []
    num_images = 0
    for batch, features in batches:
        targets, has_reply = _targets(batch, embedding, image_token_id, projector.num_tokens)
        targets = targets * scale
        inputs = projector.layers[:-1](projector.inputs(features)).float()
        keep = torch.tensor([_is_held_out(each) for each in features], dtype=torch.bool, device=inputs.device)
        moments.add(inputs[has_reply & ~keep], targets[has_reply & ~keep])
        num_images += int((has_reply & ~keep).sum())
        held_out.append((inputs[has_reply & keep].mean(1).cpu(), targets[has_reply & keep].cpu()))
    num_held_out = sum(len(inputs) for inputs, _ in held_out)
    if not num_images or num_held_out < 2:
        raise ConfigError(
            f"model.projector.initialize least_squares: {num_images} images with replies to fit to and {num_held_out} "
            "to check with are too few. Set it to random, or check data.sources"
        )
    inputs, targets = (torch.cat(part) for part in zip(*held_out, strict=True))
    fits = [(ridge, *moments.solve(ridge)) for ridge in RIDGES]
    ridge, weight, mean, target = max(fits, key=lambda fit: _explained(inputs, targets, *fit[1:]))
    predicted_std = (moments.covariance().float() @ weight).mul(weight).sum(0).mean().sqrt()
    factor = scale * embedding.float().std().cpu() / predicted_std
    last.weight.copy_(factor * weight.T)
    last.bias.copy_(target - factor * (mean @ weight))
    found = _found(inputs, targets, weight, mean, target)
    return Fit(num_images, num_held_out, ridge, _explained(inputs, targets, weight, mean, target), found)


def _targets(batch: Batch, embedding: Tensor, image_token_id: int, tokens_per_image: int) -> tuple[Tensor, Tensor]:
    """Mean embedding of the supervised tokens of each image's record, [N, D]; and whether it has any, [N]. Records that
    share an image count as one."""
    record = (batch.position_ids == 0).flatten().cumsum(0) - 1  # every record starts at position 0, and so every row
    labels = batch.labels.flatten()
    counted = labels != IGNORE_INDEX
    num_records = int(record[-1]) + 1
    sums = embedding.new_zeros(num_records, embedding.shape[1], dtype=torch.float32)
    sums.index_add_(0, record[counted], embedding[labels[counted]].float())
    counts = record[counted].bincount(minlength=num_records)
    of_image = record[batch.input_ids.flatten() == image_token_id][::tokens_per_image]
    return sums[of_image] / counts[of_image, None].clamp_min(1), counts[of_image] > 0


def _is_held_out(features: Tensor) -> bool:
    """Of an image's features [P, C]; by the content, so that an image of several records is on one side."""
    values = features.detach().contiguous().cpu().view(torch.uint8).numpy()
    return zlib.crc32(values.tobytes()) % HELD_OUT == 0


def _explained(inputs: Tensor, targets: Tensor, weight: Tensor, mean: Tensor, target: Tensor) -> float:
    """Share of the targets' variance that the mean over an image's tokens predicts.

    Args:
        inputs, targets: [N, K], [N, D].
        weight, mean, target: [K, D], [K], [D], as `Moments.solve` gives them.
    """
    wanted = targets - target
    missed = wanted - (inputs - mean) @ weight
    return 1 - (missed.square().sum() / wanted.square().sum()).item()


def _found(inputs: Tensor, targets: Tensor, weight: Tensor, mean: Tensor, target: Tensor) -> float:
    """How often an image's own target is the nearest (cosine) among its own and those of the images after it.

    Arguments as `_explained`: [N, K], [N, D], [K, D], [K], [D].
    """
    predicted = nn.functional.normalize((inputs - mean) @ weight, dim=-1)
    nearness = predicted @ nn.functional.normalize(targets - target, dim=-1).T  # [N, N]
    number = torch.arange(len(inputs))
    others = (number[:, None] + torch.arange(1, min(CANDIDATES, len(inputs)))) % len(inputs)
    nearest = nearness[number[:, None], others].amax(1)
    return (nearness[number, number] > nearest).float().mean().item()
