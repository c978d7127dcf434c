"""What one micro-batch makes a device do: matrix products, attention, numbers moved through memory, operators called.

A product of [m, k] and [k, n] is 2 m k n operations. Backwards it is made again for the gradient of what entered, where
something below trains, and once more for the gradient of the weight, where that trains; with `gradient_checkpointing` a
block's forward is made twice. Letters as in `vlm.plan.blocks`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from vlm.config import RunConfig
from vlm.data.balance import RowWork
from vlm.models.loss import CHUNK_TOKENS
from vlm.plan.shapes import Linear, LLMShape, ModelShape, VisionShape

# of a flash kernel, per pair, in products: scores and values forward; backwards these, and scores once more
_ATTENTION_FORWARD, _ATTENTION_BACKWARD = 2, 5
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
class Cost:
    """Of one part of the model, or of several."""

    products: tuple[Product, ...] = ()
    attention: float = 0  # operations inside attention
    moved: float = 0  # numbers read and written by operators that compute little: norms, activations, sums
    calls: float = 0  # operators

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.products + other.products,
            self.attention + other.attention,
            self.moved + other.moved,
            self.calls + other.calls,
        )

    def times(self, count: float) -> Cost:
        products = tuple(replace(product, times=product.times * count) for product in self.products)
        return Cost(products, self.attention * count, self.moved * count, self.calls * count)

    @property
    def operations(self) -> float:
        return sum(product.operations for product in self.products) + self.attention


@dataclass(frozen=True)
class Load:
    """What a micro-batch holds. Fractions are means."""

    tokens: float  # that the decoder computes
    pairs: float  # (query, key) that its attention meets
    images: float
    supervised: float
    segments: float = 1  # records, each a call of attention where that goes record by record


def micro_batch(config: RunConfig, shape: ModelShape, load: Load) -> dict[str, Cost]:
    """Forward and backward of a micro-batch, by the part of the model."""
    trainable, model = config.model.trainable, config.model
    trains_vision, trains_projector = "vision" in trainable, "projector" in trainable
    parts: dict[str, Cost] = {}
    if shape.vision is not None:
        if not config.data.cache_features:
            parts["encoder"] = _encoder(shape.vision, load.images, trains_vision, model.gradient_checkpointing)
        parts["projector"] = _projector(shape, load, trains_projector, trains_vision)
    has_gradient = trains_vision or trains_projector or "llm" in trainable
    lora_rank = model.lora.rank if model.lora is not None and "llm.lora" in trainable else 0
    block = _decoder_block(
        shape.llm, load,
        is_trained="llm" in trainable, adapted=shape.llm.adapted(model.lora if lora_rank else None),
        lora_rank=lora_rank, checkpointing=model.gradient_checkpointing,
    )  # fmt: skip
    num_blocks = len(shape.llm.blocks)
    parts["decoder"] = block.times(num_blocks if has_gradient or lora_rank else 0)
    parts["head"] = _head(shape.llm, load, "llm" in trainable)
    return parts


def row_work(config: RunConfig, shape: ModelShape) -> RowWork:
    """Operations of a row by what it holds, in hundreds: what data ranks share a step's rows out by."""

    def operations(**load: float) -> int:
        parts = micro_batch(config, shape, Load(**{"tokens": 0, "pairs": 0, "images": 0, "supervised": 0} | load))
        return round(sum(part.operations for part in parts.values()) / _WORK_UNIT)

    return RowWork(
        token=operations(tokens=1), pair=operations(pairs=1), image=operations(images=1),
        supervised=operations(supervised=1),
    )  # fmt: skip


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
    return Cost(tuple(products), calls=sum(product.times for product in products))


def _sum(costs: Iterable[Cost]) -> Cost:
    total = Cost()
    for cost in costs:
        total += cost
    return total


def _decoder_block(
    shape: LLMShape, load: Load, *, is_trained: bool, adapted: tuple[Linear, ...], lora_rank: int, checkpointing: bool
) -> Cost:
    """A block of a decoder through which a gradient passes."""
    forwards = 2 if checkpointing else 1
    linears = _sum(_linear(each, load.tokens, forwards=forwards, is_trained=is_trained) for each in shape.linears)
    for each in adapted:
        for half in (Linear("", each.inputs, lora_rank), Linear("", lora_rank, each.outputs)):
            linears += _linear(half, load.tokens, forwards=forwards, is_trained=True)
    per_pair = 2 * shape.num_heads * shape.head_dim
    heads = (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    # a forward reads and writes: two norms of 8 passes and two sums of 3, rotary embedding of 8, gate's activation 2
    # and product 3, splitting and joining of records 4; backwards about twice that
    forward = 22 * shape.width + 12 * heads + 5 * shape.intermediate
    forward += sum(4 * each.inputs + 3 * each.outputs for each in adapted)
    return linears + Cost(
        attention=per_pair * load.pairs * (_ATTENTION_FORWARD * forwards + _ATTENTION_BACKWARD),
        moved=load.tokens * forward * (forwards + 2),
        calls=(40 + 4 * load.segments) * (forwards + 2),
    )


def _head(shape: LLMShape, load: Load, is_trained: bool) -> Cost:
    """Final norm, logits at supervised positions and the loss. Beyond one chunk the logits are made twice."""
    forwards = 2 if load.supervised > CHUNK_TOKENS else 1
    logits = _linear(
        Linear("head", shape.width, shape.vocab), load.supervised, forwards=forwards, is_trained=is_trained
    )
    # log-softmax reads and writes, the backward reads it and writes the gradient of the logits, in 4 passes
    moved = load.supervised * shape.vocab * (3 * forwards + 4) + load.tokens * shape.width * 24
    return logits + Cost(moved=moved, calls=40)


def _projector(shape: ModelShape, load: Load, is_trained: bool, vision_trains: bool) -> Cost:
    tokens = load.images * shape.tokens_per_image
    gradient_below = vision_trains
    total = Cost(calls=30)
    for number, linear in enumerate(shape.projector):
        passes = gradient_below or (is_trained and number > 0)
        total += _linear(linear, tokens, forwards=1, is_trained=is_trained, passes=passes)
        total += Cost(moved=tokens * (linear.inputs + linear.outputs) * 6)
    return total


def _encoder(shape: VisionShape, images: float, is_trained: bool, checkpointing: bool) -> Cost:
    """Blocks of a transformer; a network of another kind is taken for one product of all its weights per token."""
    tokens, width, mlp = images * shape.num_tokens, shape.block_width, shape.intermediate
    if not shape.num_blocks:
        passes = 3 if is_trained else 1
        weights = shape.numel / max(1, width)
        return Cost((Product(tokens, width, weights, passes),), moved=tokens * width * 20 * passes, calls=200 * passes)
    forwards = 2 if is_trained and checkpointing else 1
    linears = [Linear("", width, width)] * 4 + [Linear("", width, mlp), Linear("", mlp, width)]
    block = _sum(_linear(each, tokens, forwards=forwards, is_trained=is_trained, passes=is_trained) for each in linears)
    pairs = images * shape.num_tokens**2
    passes = forwards + (2 if is_trained else 0)
    block += Cost(
        attention=2 * width * pairs * (_ATTENTION_FORWARD * forwards + (_ATTENTION_BACKWARD if is_trained else 0)),
        moved=tokens * (16 * width + (1 + shape.activation_copies) * 2 * mlp) * passes,
        calls=25 * passes,
    )
    pixels = 3 * shape.image_size**2 // max(1, shape.num_patches)  # of a patch
    patches = _linear(
        Linear("patches", pixels, width), images * shape.num_patches, forwards=1, is_trained=is_trained, passes=False
    )
    return block.times(shape.num_blocks) + patches + Cost(moved=images * 3 * shape.image_size**2 * 4)
