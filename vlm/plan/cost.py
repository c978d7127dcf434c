"""What one micro-batch makes a device do: matrix products, attention, and operators that go over numbers one by one.

A product of [m, k] and [k, n] is 2 m k n operations. Backwards it is made again for the gradient of what entered, where
something below trains, and once more for the gradient of the weight, where that trains; with `gradient_checkpointing` a
block's forward is made twice. How many operators go over numbers was counted in transformers' Llama-like blocks, and in
those of CLIP. Letters as in `vlm.plan.blocks`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from vlm.config import RunConfig
from vlm.data.balance import RowWork
from vlm.models.loss import CHUNK_TOKENS
from vlm.plan.shapes import Linear, LLMShape, ModelShape, ProjectorShape, VisionShape

# of a flash kernel, per pair, in products: scores and values forward; backwards these, and scores once more
ATTENTION_FORWARD, ATTENTION_BACKWARD = 2, 5
_WORK_UNIT = 100  # operations: so a rank's rows of a step, of any model, stay below 2^63


@dataclass(frozen=True)
class Product:
    """`times` products of [rows, inner] and [inner, columns]."""

    rows: float
    inner: float
    columns: float
    times: float = 1

    @property
    def operations(self) -> float:
        return 2 * self.rows * self.inner * self.columns * self.times


@dataclass(frozen=True)
class Attention:
    """`times` calls on `length` tokens each; `width` is that of all heads."""

    length: float
    width: float
    times: float = 1
    forwards: float = 1
    backwards: float = 1
    is_causal: bool = True

    @property
    def operations(self) -> float:
        pairs = self.length**2 * (0.5 if self.is_causal else 1)
        per_pair = ATTENTION_FORWARD * self.forwards + ATTENTION_BACKWARD * self.backwards
        return 2 * self.width * pairs * self.times * per_pair


@dataclass(frozen=True)
class Sweep:
    """`times` operators that each go over `numbers` numbers: norms, sums, activations.

    `is_heavy`: with an exponential for each of them.
    """

    numbers: float
    times: float
    is_heavy: bool = False


@dataclass(frozen=True)
class Cost:
    """Of one part of the model, or of several."""

    products: tuple[Product, ...] = ()
    attention: tuple[Attention, ...] = ()
    sweeps: tuple[Sweep, ...] = ()

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.products + other.products, self.attention + other.attention, self.sweeps + other.sweeps)

    def times(self, count: float) -> Cost:
        return Cost(
            tuple(replace(each, times=each.times * count) for each in self.products),
            tuple(replace(each, times=each.times * count) for each in self.attention),
            tuple(replace(each, times=each.times * count) for each in self.sweeps),
        )

    @property
    def operations(self) -> float:
        return sum(each.operations for each in self.products) + sum(each.operations for each in self.attention)

    @property
    def pieces(self) -> tuple[Product | Attention | Sweep, ...]:
        return (*self.products, *self.attention, *self.sweeps)


@dataclass(frozen=True)
class Load:
    """What a micro-batch holds. Fractions are means."""

    images: float = 0
    supervised: float = 0  # tokens
    segments: tuple[tuple[float, float], ...] = ()  # lengths, and how many records have each
    padding: float = 0  # tokens that are computed too: none where attention goes record by record
    image_pixels: float = 640 * 480  # of an image's file

    @property
    def tokens(self) -> float:
        """That the decoder computes."""
        return sum(length * count for length, count in self.segments) + self.padding


def micro_batch(config: RunConfig, shape: ModelShape, load: Load) -> dict[str, Cost]:
    """Forward and backward of a micro-batch, by the part of the model."""
    trainable, model = config.model.trainable, config.model
    trains_vision, trains_projector = model.trains_vision, "projector" in trainable
    parts: dict[str, Cost] = {}
    if shape.vision is not None and shape.projector is not None:
        if not config.data.cache_features:
            parts["encoder"] = _sum(
                _encoder(each, load.images, trains_vision, model.gradient_checkpointing)
                for each in shape.vision.members
            )
        parts["projector"] = _projector(shape.projector, load.images, trains_projector, trains_vision)
    lora = model.lora if "llm.lora" in trainable else None
    block, still = (
        _decoder_block(
            shape.llm,
            load,
            is_trained=is_trained,
            adapted=shape.llm.adapted(lora),
            lora_rank=lora.rank if lora else 0,
            checkpointing=model.gradient_checkpointing,
            is_by_record=is_by_record(config, shape),
        )
        for is_trained in ("llm" in trainable, False)
    )
    count = len(shape.llm.blocks)
    num_still = sum(numel == 0 for numel in shape.llm.trained) if "llm" in model.partial else 0
    parts["decoder"] = block.times(count - num_still) + still.times(num_still)
    parts["decoder"] += _inputs(shape.llm, load, "llm" in trainable)
    asked = replace(load, supervised=0) if config.objective.scores else load  # of a model that scores no logits
    parts["head"] = _head(shape.llm, asked, "llm" in trainable)
    return parts


def row_work(config: RunConfig, shape: ModelShape) -> RowWork:
    """Operations of a row by what it holds, in hundreds: what data ranks share a step's rows out by."""

    def operations(load: Load) -> float:
        return sum(part.operations for part in micro_batch(config, shape, load).values()) / _WORK_UNIT

    token = operations(Load(padding=1))
    pair = 0.0  # masks of whole rows: all rows cost the same
    if is_by_record(config, shape):
        pair = operations(Load(segments=((2**0.5, 1),))) - operations(Load(padding=2**0.5))  # l^2 / 2 pairs
    return RowWork(
        token=round(token), pair=round(pair),
        image=round(operations(Load(images=1))), supervised=round(operations(Load(supervised=1))),
    )  # fmt: skip


def is_by_record(config: RunConfig, shape: ModelShape) -> bool:
    """Whether attention goes record by record, and the decoder computes no padding."""
    attention = config.model.llm.attention
    return attention == "varlen" or (attention == "auto" and shape.llm.takes_varlen)


def _linear(linear: Linear, tokens: float, *, forwards: int, is_trained: bool, passes: bool = True) -> Cost:
    """
    Args:
        passes: the gradient of what entered is asked for.
    """
    products = [Product(tokens, linear.inputs, linear.outputs, forwards)]
    if passes:
        products.append(Product(tokens, linear.outputs, linear.inputs))
    if is_trained:
        products.append(Product(linear.outputs, tokens, linear.inputs))
    return Cost(tuple(products))


def _sum(costs: Iterable[Cost]) -> Cost:
    total = Cost()
    for cost in costs:
        total += cost
    return total


def _decoder_block(
    shape: LLMShape, load: Load, *, is_trained: bool, adapted: tuple[Linear, ...], lora_rank: int, checkpointing: bool,
    is_by_record: bool,
) -> Cost:  # fmt: skip
    """A block of a decoder through which a gradient passes."""
    forwards, tokens = 2 if checkpointing else 1, load.tokens
    total = _sum(_linear(each, tokens, forwards=forwards, is_trained=is_trained) for each in shape.linears)
    for each in adapted:
        for half in (Linear("", each.inputs, lora_rank), Linear("", lora_rank, each.outputs)):
            total += _linear(half, tokens, forwards=forwards, is_trained=True)
        # scaled and added forward; the gradient scaled, and that of the input added
        total += Cost(
            sweeps=(Sweep(tokens * each.outputs, 2 * forwards + 1), Sweep(tokens * each.inputs, 1)),
        )
    width, heads = shape.num_heads * shape.head_dim, (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    attention = tuple(
        Attention(length, width, count, forwards, is_causal=is_by_record) for length, count in load.segments
    )
    norms = 2 * (9 if is_trained else 8) + (2 if is_trained else 0)
    sweeps = (
        Sweep(tokens * shape.width, 9 * forwards + norms + 5),  # norms of 3.5 operators, two sums; gradients of inputs
        Sweep(tokens * heads, 6 * forwards + 8),  # rotary embedding, splitting and joining of records
        Sweep(tokens * heads, 5 * (forwards + 2) if shape.has_head_norms else 0),
        Sweep(tokens * shape.intermediate, forwards + 2),
        Sweep(tokens * shape.intermediate, forwards + 1, is_heavy=True),
        Sweep(tokens, 12 * (forwards + 1)),  # scales of norms, one number each
    )
    return total + Cost(attention=attention, sweeps=sweeps)


def _inputs(shape: LLMShape, load: Load, is_trained: bool) -> Cost:
    """Token embeddings, images put among them, padding taken out and put back."""
    sweeps = [Sweep(load.tokens * shape.width, 8)]
    if is_trained:  # the gradient of the whole table, of zeros, and added to the head's where that is the same
        sweeps.append(Sweep(shape.embedding, 1 if shape.head else 2))
    return Cost(sweeps=tuple(sweeps))


def _head(shape: LLMShape, load: Load, is_trained: bool) -> Cost:
    """Final norm, logits at supervised positions and the loss. Beyond one chunk the logits are made twice."""
    forwards = 2 if load.supervised > CHUNK_TOKENS else 1
    linear = Linear("head", shape.width, shape.vocab)
    logits = _linear(linear, load.supervised, forwards=forwards, is_trained=is_trained)
    chunk = min(load.supervised, CHUNK_TOKENS) * shape.vocab
    each = load.supervised * shape.vocab / chunk if chunk else 0
    return logits + Cost(
        sweeps=(
            Sweep(chunk, each * (forwards + 1), is_heavy=True),
            Sweep(load.tokens * shape.width, 12),
        )
    )


def _projector(shape: ProjectorShape, images: float, is_trained: bool, vision_trains: bool) -> Cost:
    total = Cost()
    for number, linear in enumerate(shape.linears):
        tokens = images * linear.tokens
        passes = vision_trains or (is_trained and linear.passes)
        total += _linear(linear, tokens, forwards=1, is_trained=is_trained and linear.trains, passes=passes)
        total += Cost(sweeps=(Sweep(tokens * linear.inputs, 2), Sweep(tokens * linear.outputs, 2, is_heavy=number > 0)))
    return total


def _encoder(shape: VisionShape, images: float, is_trained: bool, checkpointing: bool) -> Cost:
    """Blocks of a transformer; a network of another kind is taken for one product of all its weights per token."""
    tokens, width, mlp = images * shape.num_tokens, shape.block_width, shape.intermediate
    forwards = 2 if is_trained and checkpointing else 1
    passes = forwards + (2 if is_trained else 0)
    if not shape.num_blocks:
        one = Product(tokens, max(1, width), shape.numel / max(1, width), passes)
        return Cost((one,), sweeps=(Sweep(tokens * width, 20 * passes),))
    linears = [Linear("", width, width)] * 4 + [Linear("", width, mlp), Linear("", mlp, width)]
    block = _sum(_linear(each, tokens, forwards=forwards, is_trained=is_trained, passes=is_trained) for each in linears)
    block += Cost(
        attention=(Attention(shape.num_tokens, width, images, forwards, 1 if is_trained else 0, is_causal=False),),
        sweeps=(
            Sweep(tokens * width, 6 * passes),
            Sweep(tokens * mlp, 2 * (shape.activation_copies - 1) * passes),
            Sweep(tokens * mlp, passes, is_heavy=True),
        ),
    )
    pixels = 3 * shape.image_size**2 // max(1, shape.num_patches)  # of a patch
    patches = Linear("patches", pixels, width)
    first = _linear(patches, images * shape.num_patches, forwards=1, is_trained=is_trained, passes=False)
    return block.times(shape.num_blocks) + first + Cost(sweeps=(Sweep(images * 3 * shape.image_size**2, 2),))
