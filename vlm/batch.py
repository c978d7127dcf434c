"""All that data and models agree on. Neither package knows anything else of the other.

Letters in shapes: B rows, L tokens, N tiles of images, S pixels per side, P patches, C vision width, T tokens per tile.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from vlm.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE_INDEX = -100  # label of a token that is not supervised; torch's cross entropy ignores it too


def microbatches_per_step(global_batch_size: int, micro_batch_size: int, num_data_ranks: int) -> int:
    """Forward passes of each data rank for one optimizer step.

    Raises:
        ConfigError: the rows of a step cannot be shared out evenly.
    """
    at_once = micro_batch_size * num_data_ranks
    if global_batch_size % at_once:
        raise ConfigError(
            f"train.global_batch_size {global_batch_size} is not a multiple of train.micro_batch_size "
            f"{micro_batch_size} x {num_data_ranks} data ranks = {at_once}. Take a multiple of {at_once}, or a smaller "
            "micro_batch_size"
        ).on_every_rank()
    return global_batch_size // at_once


class Skip(NamedTuple):
    """One record that was left out, and why: a line of skipped.jsonl."""

    rule: str  # stable short name, e.g. "image_missing"
    where: str  # file and record
    message: str


class ImageLayout(NamedTuple):
    """What an image becomes, known before its pixels are decoded."""

    tiles: tuple[tuple[int, int, int, int], ...]  # left, top, right, bottom in the image; each is encoded by itself
    num_tokens: int  # placeholders in the text, of all tiles


@dataclass(frozen=True)
class ImageSpec:
    """How images become pixels for one vision encoder, and how many tokens each takes in the text.

    Data, prompts, chat and server ask `layout`; the memory estimate asks `typical`. This is the kind whose images are
    all one tile, for one encoder.
    """

    size: int  # S, pixels per side of the square the encoder sees
    mean: tuple[float, float, float]  # per RGB channel, of values in [0, 1]
    std: tuple[float, float, float]
    num_tokens: int  # T, placeholders per tile, after the projector
    resize: str = "pad"  # "pad" to a square with `background`, "crop" the middle, "squash"
    background: tuple[int, int, int] = (255, 255, 255)  # RGB under transparent pixels and around padded images

    kind: ClassVar[str] = "square"
    reads_size: ClassVar[bool] = False  # whether `layout` depends on the image, so that its header must be read

    @property
    def members(self) -> tuple[ImageSpec, ...]:
        """Of each encoder, in the order of the channels of `pixel_values`."""
        return (self,)

    def layout(self, width: int, height: int) -> ImageLayout:
        """Of an upright image of that many pixels. Pure: the same everywhere, from the scan to the server."""
        return ImageLayout(((0, 0, width, height),), self.num_tokens)

    def typical(self) -> ImageLayout:
        """For estimates: of an image as large as a tile."""
        return self.layout(self.size, self.size)

    def fingerprint(self) -> object:
        """What decides the number of tokens, as JSON."""
        return self.num_tokens


@dataclass(frozen=True)
class FusedSpec(ImageSpec):
    """Of several encoders, each of which sees the image in its own way. What `ImageSpec` has is the first one's; the
    background and the tokens are of all."""

    others: tuple[ImageSpec, ...] = ()

    kind: ClassVar[str] = "fused"

    @property
    def members(self) -> tuple[ImageSpec, ...]:
        first = ImageSpec(**{each.name: getattr(self, each.name) for each in fields(ImageSpec)})
        return (first, *self.others)


IMAGE_SPECS: dict[str, type[ImageSpec]] = {  # by the kind that an export names
    "square": ImageSpec,
    "fused": FusedSpec,
}


@dataclass(frozen=True)
class Example:
    """One tokenized conversation. Lists are of equal length l; labels are not shifted."""

    input_ids: list[int]
    labels: list[int]  # the token where the model is trained to say it, else IGNORE_INDEX; labels[0] is IGNORE_INDEX
    images: tuple[str | bytes, ...] = ()  # resolved file paths or encoded images, in the order of their placeholders
    where: str = ""  # file and record, for errors
    unread: tuple[str, ...] = ()  # what its record holds and nothing read
    rejected: Example | None = None  # of a preference: the same with the reply that is not preferred
    is_good: bool | None = None  # what the reply was judged to be; of a preference and most others None
    reference: tuple[float, ...] = ()  # log-probability of each reply under the reference model, where it is known
    answer: str | None = None  # to verify replies with that the model writes itself; the labels are of this one
    stem: int = 0  # tokens that it leaves to the last whole example before it in its row, which begins with them

    @property
    def num_supervised(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE_INDEX)

    @property
    def branches(self) -> tuple[Example, ...]:
        """What stands in a row, one after the other: of a preference two, else the example itself."""
        if self.rejected is None:
            return (self,)
        return replace(self, rejected=None), replace(self.rejected, reference=self.reference)

    @property
    def num_tokens(self) -> int:
        """Of all branches, each whole."""
        return sum(len(branch.input_ids) for branch in self.branches)


@dataclass(frozen=True)
class Replies:
    """The replies of a batch that are compared or judged, R of them. Of pairs, replies 2n and 2n + 1 are the preferred
    and the other. Host memory, as the integers of a `Batch`."""

    number: Tensor  # int64 [B, L]: which reply a token is of, -1 where none
    is_good: Tensor  # bool [R]
    reference: Tensor | None = None  # float32 [R]: log-probabilities under the reference model

    @property
    def num_pairs(self) -> int:
        return len(self.is_good) // 2


@dataclass(frozen=True)
class Prompt:
    """A question of a batch that the model shall write replies to."""

    input_ids: list[int]  # up to the reply, placeholders included
    num_tiles: int  # of its images, in the batch's order
    answer: str
    where: str  # file and record
    images: tuple[str | bytes, ...] = ()  # as of `Example`


@dataclass(frozen=True)
class Rollouts:
    """Replies that the model wrote itself, R of them, and what each token of them is worth. Host memory."""

    number: Tensor  # int64 [B, L]: which reply a token is of, -1 where none
    num_replies: int  # R
    advantages: Tensor  # float32 [B, L]
    old: Tensor | None = None  # float32 [B, L]: log-probabilities under the weights that wrote them; None: those now
    reference: Tensor | None = None  # float32 [B, L]: under the model that the run starts from
    values: Tensor | None = None  # float32 [B, L]: what a value head expected before each token
    returns: Tensor | None = None  # float32 [B, L]: what it should have expected


@dataclass
class Batch:
    """Rows of packed examples.

    `position_ids` restart at 0 with every example of a row (and at every padding token), so that nothing attends
    across. Padding has label IGNORE_INDEX. `image_token_id` stands in `input_ids` at each image placeholder; images
    are in the order in which their placeholders appear, row by row.

    The integers decide what is computed, and reading them from a GPU would wait for all that it has yet to do. So they
    stay in host memory: `to` moves the images, and the model sends the device what it computes with (`send`).
    """

    input_ids: Tensor  # int64 [B, L]
    labels: Tensor  # int64 [B, L]
    position_ids: Tensor  # int64 [B, L]
    # float32 [N, 3, S, S], a tile each, of several encoders three channels for each; None when no row has an image
    pixel_values: Tensor | None = None
    image_features: Tensor | None = None  # [N, P, C] of the frozen encoder, from the cache, instead of pixel_values
    where: list[str] = field(default_factory=list)  # file and record of every example, in order
    skipped: list[Skip] = field(default_factory=list)  # examples left out: an image of theirs could not be read
    num_padding: int = 0  # padding tokens among the B * L
    replies: Replies | None = None  # of records that compare or judge replies
    prompts: tuple[Prompt, ...] = ()  # of records with an answer to verify, in the order of `where`
    rollouts: Rollouts | None = None  # where the replies are the model's own
    device: torch.device | None = None  # that computes with it; None: that of its tensors

    def to(self, device: torch.device) -> Batch:
        """Images on the device that computes; the rest stays in host memory."""
        return replace(
            self,
            pixel_values=None if self.pixel_values is None else send(self.pixel_values, device),
            image_features=None if self.image_features is None else send(self.image_features, device),
            device=device,
        )

    @property
    def num_images(self) -> int:
        """Tiles that are encoded: of a spec whose images are one tile, images."""
        images = self.pixel_values if self.image_features is None else self.image_features
        return 0 if images is None else len(images)

    @property
    def num_supervised(self) -> int:
        """Tokens the loss counts. Position 0 of a row is never predicted, and never carries a label."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor [...] on a device, without waiting: a GPU takes it, once it comes to that, from pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
