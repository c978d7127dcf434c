"""What autograd keeps of one part of the model for the backward pass, and what lives only while the part runs.

The formulas follow the tensors that transformers' Llama-like blocks save, listed with `saved_tensors_hooks`; the tests
compare the sum with what a run allocates. Letters: t tokens of a micro-batch, D width, I MLP width, H heads, h head
width, c bytes of a computed number (2 under autocast), r bytes of the residual stream.

A decoder block keeps, per token:

| what | bytes | when |
|---|---|---|
| input of both norms in float32 | 2 * 4 D | always |
| normalised input of both norms | 2 * r D | the norms train |
| query, key, value, output of attention | c h (2 H + 2 K) | K is H behind a mask, else the number of key heads |
| attention's log-sum | 4 H | always |
| attention's mask, of every block | c L | rows with restarts, SDPA |
| gate, activated gate, up | 3 c I | always |
| inputs of linear layers | c D each | they train, or carry an adapter |
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlm.models.config import LoRAConfig, QuantizationConfig
from vlm.plan.numerics import Numerics, Workload
from vlm.plan.shapes import Linear, LLMShape, ModelShape, ProjectorShape, VisionShape
from vlm.train.engines.kind import FLOAT32


@dataclass(frozen=True)
class Part:
    """One piece of the model for one micro-batch on one device. All numbers are bytes."""

    name: str
    weights: int = 0  # as they lie in memory
    packed: int = 0  # of the weights, in 4 or 8 bits
    trained: int = 0  # parameters, not bytes
    saved: int = 0  # from its forward until its backward
    recomputed: int = 0  # saved again during its backward only, with gradient checkpointing
    forward: int = 0  # beyond that, at the worst moment of its forward
    backward: int = 0  # and of its backward
    copies: int = 0  # autocast's copies of trained weights: kept until the forward of the whole model ends
    saved_copies: int = 0  # copies that stay until its backward
    early: int = 0  # bytes of its own gradients that exist at the worst moment of its backward
    making: int = 0  # beyond what is saved, while the gradient of its largest matrix is made

    @property
    def gradients(self) -> int:
        return FLOAT32 * self.trained


def decoder_block(
    shape: LLMShape, number: int, work: Workload, numerics: Numerics, *,
    is_trained: bool, lora: LoRAConfig | None, checkpointing: bool, quantization: QuantizationConfig | None = None,
) -> Part:  # fmt: skip
    """One block of the language model, where a gradient passes through it.

    Packed linear layers are unpacked one at a time, forward and backward.
    """
    adapted = shape.adapted(lora)
    numel = shape.blocks[number]
    matrices = sum(linear.inputs * linear.outputs for linear in shape.linears)
    lora_numel = shape.lora_numel(lora) if lora else 0
    weights, packed, unpacked = numel * (FLOAT32 if is_trained else numerics.frozen), 0, 0
    if quantization is not None:
        packed = shape.packed_bytes(quantization)
        weights += packed - matrices * numerics.frozen
        unpacked = numerics.compute * max((linear.inputs * linear.outputs for linear in shape.linears), default=0)
        matrices = 0  # nothing of them that autocast could copy
    saved = (
        _saved_by_norms(shape, work, numerics, is_trained)
        + _saved_by_attention(shape, work, numerics)
        + _saved_by_linears(shape, work, numerics, is_trained, lora)
    )
    copies = (2 * matrices if numerics.copied(is_trained) else 0) + (2 * lora_numel if numerics.is_autocast else 0)
    cached = copies if is_trained else 2 * lora_numel if numerics.is_autocast else 0
    largest = max((linear.inputs * linear.outputs for linear in shape.linears), default=0) if is_trained else 0
    grows = work.tokens * (numerics.compute * shape.intermediate + numerics.residual * shape.width)
    part = Part(
        name=f"block {number}",
        weights=weights + FLOAT32 * lora_numel,
        packed=packed,
        trained=(numel if is_trained else 0) + lora_numel,
        saved=saved,
        forward=_while_mlp_runs(shape, work, numerics, lora) + unpacked,
        backward=_while_mlp_is_undone(shape, work, numerics, is_trained, bool(adapted), lora) + unpacked,
        copies=cached,
        saved_copies=copies,
        early=FLOAT32 * largest,
        making=grows + _made(largest, numerics),
    )
    if not checkpointing:
        return part
    kept = work.tokens * shape.width * numerics.residual
    running = part.forward + work.tokens * numerics.compute * shape.intermediate * 3
    again = part.forward + kept  # its forward once more, beside the gradient of its output
    return replace(
        part, saved=kept, recomputed=saved + copies, saved_copies=0, forward=running, backward=max(part.backward, again)
    )


def _saved_by_norms(shape: LLMShape, work: Workload, numerics: Numerics, is_trained: bool) -> int:
    per_token = 2 * (FLOAT32 * shape.width + FLOAT32)  # the input in float32, and one scale
    if is_trained:
        per_token += 2 * numerics.residual * shape.width
    if shape.has_head_norms:
        width = (shape.num_heads + shape.num_kv_heads) * shape.head_dim
        per_token += width * (FLOAT32 + (numerics.compute if is_trained else 0))
    return work.tokens * per_token


def _saved_by_attention(shape: LLMShape, work: Workload, numerics: Numerics) -> int:
    mask = has_mask(work, numerics)
    heads, kv_heads = shape.num_heads, shape.num_heads if mask else shape.num_kv_heads
    kept = work.tokens * numerics.compute * shape.head_dim * 2 * (heads + kv_heads) + work.tokens * FLOAT32 * heads
    if numerics.attention == "eager":  # scores in float32 and their copy in the computed format
        return kept + work.tokens * work.length * heads * (FLOAT32 + numerics.compute)
    return kept + (work.tokens * work.length * numerics.compute if mask else 0)


def has_mask(work: Workload, numerics: Numerics) -> bool:
    """Whether attention is given a mask [B, 1, L, L]; FlashAttention takes the restarts themselves."""
    return work.has_restarts and numerics.attention == "sdpa"


def _saved_by_linears(
    shape: LLMShape, work: Workload, numerics: Numerics, is_trained: bool, lora: LoRAConfig | None
) -> int:
    kept = numerics.compute * shape.intermediate * (3 if shape.is_gated else 1)
    if is_trained:
        kept += _inputs(shape.linears, shape, numerics, has_adapters=False)
    adapted = shape.adapted(lora)
    if lora and adapted:
        kept += _inputs(adapted, shape, numerics, has_adapters=True)
        kept += len(adapted) * lora.rank * numerics.compute
        if lora.dropout:  # a mask of a byte on the GPU; the CPU keeps factors, and in float32 what is dropped from
            each = 1 if numerics.on_gpu else FLOAT32
            each += 0 if numerics.is_autocast else FLOAT32
            kept += sum(each * linear.inputs for linear in adapted)
    return work.tokens * kept


def _inputs(linears: tuple[Linear, ...], shape: LLMShape, numerics: Numerics, has_adapters: bool) -> int:
    """Bytes per token of the inputs that linear layers keep.

    Under autocast each layer has a bf16 copy of its own. In float32 query, key and value share one, gate and up too.
    The output projection reads attention's own output, unless an adapter casts it, or that of each record is kept.
    """
    is_apart = numerics.attention == "varlen" or (has_adapters and numerics.is_autocast)
    own = [linear for linear in linears if linear.role != "output" or is_apart]
    if numerics.is_autocast:
        return sum(numerics.compute * linear.inputs for linear in own)
    groups = {"query": "qkv", "key": "qkv", "value": "qkv", "gate": "mlp", "up": "mlp"}
    shared = {groups.get(linear.role, linear.name): linear.inputs for linear in own}
    return sum(FLOAT32 * width for width in shared.values())


def _while_mlp_runs(shape: LLMShape, work: Workload, numerics: Numerics, lora: LoRAConfig | None) -> int:
    """The product of gate and up, and what an adapter makes of it: a float32 copy, and another behind dropout.

    Beside them: the input, the sum of attention's output and the input, and the norm of that sum.
    """
    per_token = numerics.compute * shape.intermediate + 3 * numerics.residual * shape.width
    if lora and any(linear.inputs == shape.intermediate for linear in shape.adapted(lora)) and numerics.is_autocast:
        per_token += (2 if lora.dropout else 1) * FLOAT32 * shape.intermediate
    return work.tokens * per_token


def _while_mlp_is_undone(
    shape: LLMShape, work: Workload, numerics: Numerics, is_trained: bool, is_adapted: bool, lora: LoRAConfig | None
) -> int:
    """Gradients of the product, of the activated gate and of up, while gate and up are still there."""
    mlp = (3 if shape.is_gated else 2) * numerics.compute * shape.intermediate
    if is_trained or (is_adapted and not numerics.is_autocast):
        mlp -= numerics.compute * shape.intermediate  # the saved product is gone by then
    if is_adapted and numerics.is_autocast and lora and lora.dropout:
        mlp += FLOAT32 * shape.intermediate
    return work.tokens * (mlp + numerics.residual * shape.width)


def head(shape: LLMShape, work: Workload, numerics: Numerics, *, is_trained: bool, chunk_tokens: int) -> Part:
    """Final norm, output matrix and loss.

    Of a chunk of logits the forward holds 8 bytes a number (float32 and its log-softmax), the backward 12 (with two
    gradients). One chunk is kept between the two; of several, none.
    """
    chunk = min(work.supervised, chunk_tokens)
    is_chunked = work.supervised > chunk_tokens
    states = work.supervised * shape.width
    logits = chunk * shape.vocab
    numel = shape.head or shape.embedding
    matrix = FLOAT32 * numel if is_trained else 0
    copy = 2 * numel if numerics.copied(is_trained) else 0
    saved = work.tokens * (FLOAT32 * shape.width + FLOAT32)
    saved += work.tokens * shape.width * numerics.residual if is_trained else 0
    saved += states * numerics.residual if is_chunked else (states * numerics.compute if is_trained else 0)
    saved += 0 if is_chunked else FLOAT32 * logits
    hidden = (work.tokens * shape.width + (0 if is_chunked else states)) * numerics.residual
    own = shape.final_norm + shape.head
    undone, making = 8 * logits, numerics.compute * logits - FLOAT32 * logits  # the log-softmax is gone by then
    if is_chunked:
        again = states * numerics.residual + copy  # gradients of the states, and the matrix in bf16 once more
        undone, making = 12 * logits + again, numerics.compute * logits + again
    return Part(
        name="head",
        weights=own * (FLOAT32 if is_trained else numerics.frozen),
        trained=own if is_trained else 0,
        saved=saved,
        forward=hidden + (8 if is_chunked else 4) * logits,
        backward=undone,
        copies=copy,
        saved_copies=0 if is_chunked else copy,
        early=matrix if is_chunked else 0,
        making=making + _made(numel, numerics) if is_trained else 0,
    )


def value_head(shape: LLMShape, work: Workload, numerics: Numerics, *, is_trained: bool) -> Part:
    """Final norm, and a row of weights that reads the state at the end of each reply. The output matrix is there, and
    nothing asks it."""
    norm = shape.final_norm
    saved = work.tokens * (FLOAT32 * shape.width + FLOAT32)
    saved += work.tokens * shape.width * numerics.residual if is_trained else 0
    return Part(
        name="value_head",
        weights=norm * (FLOAT32 if is_trained else numerics.frozen)
        + shape.head * numerics.frozen
        + FLOAT32 * shape.width,
        trained=(norm if is_trained else 0) + shape.width,
        saved=saved,
        forward=work.tokens * shape.width * numerics.residual,
        backward=work.tokens * shape.width * numerics.residual,
    )


def _made(numel: int, numerics: Numerics) -> int:
    """A matrix's gradient as it is computed, and in float32."""
    return numel * (FLOAT32 + (numerics.compute if numerics.is_autocast else 0))


def embedding(shape: LLMShape, work: Workload, numerics: Numerics, is_trained: bool) -> Part:
    """Token embeddings [B, L, D], the mask of all blocks, and the tables of the rotary embedding."""
    tables = 2 * work.tokens * shape.head_dim * (numerics.residual if numerics.residual < FLOAT32 else FLOAT32)
    return Part(
        name="embedding",
        weights=shape.embedding * (FLOAT32 if is_trained else numerics.frozen),
        trained=shape.embedding if is_trained else 0,
        saved=tables,
        making=FLOAT32 * shape.embedding if is_trained and not shape.head else 0,  # added to the head's gradient
    )


def projector(shape: ProjectorShape, work: Workload, numerics: Numerics, is_trained: bool, trains_vision: bool) -> Part:
    """Linear layers with gelu, norms or attention between them.

    Args:
        is_trained: all of it but what is frozen within.
        trains_vision: so a gradient passes all of it, trained or not.
    """
    images, last = work.num_images, shape.linears[-1]
    trained = [each for each in shape.linears if is_trained and each.trains]
    passed = [each for each in shape.linears if trains_vision or (is_trained and (each.trains or each.passes))]
    inputs = sum(each.tokens * each.inputs for each in trained)
    between = sum(each.tokens * each.outputs for each in passed if each is not last)
    matrices = [each.inputs * each.outputs for each in shape.linears]
    copied = [each.inputs * each.outputs for each in shape.linears if not is_trained or each.trains]
    copies = 2 * sum(copied) if numerics.copied(is_trained) else 0
    return Part(
        name="projector",
        weights=shape.numel * (FLOAT32 if is_trained else numerics.frozen),
        trained=shape.trainable if is_trained else 0,
        saved=images * numerics.compute * (inputs + between),
        forward=images * FLOAT32 * (shape.num_inputs + last.tokens * last.outputs),
        backward=images * FLOAT32 * 2 * last.tokens * last.outputs,
        copies=copies if is_trained else 0,
        saved_copies=copies if passed else 0,
        making=_made(max(matrices), numerics) if is_trained else 0,
    )


def vision(
    shape: VisionShape, work: Workload, numerics: Numerics, *,
    is_trained: bool, is_cached: bool, checkpointing: bool = False,
) -> Part:  # fmt: skip
    """The encoder. Frozen, nothing of it stays; with cached features it does not run.

    With checkpointing its blocks keep their inputs, and one at a time has the rest.
    """
    weight = FLOAT32 if is_trained else numerics.frozen
    if is_cached:
        return Part(name="vision", weights=shape.numel * weight)
    tokens = work.num_images * shape.num_tokens
    pixels = work.num_images * shape.num_pixels
    width, mlp, c = shape.block_width, shape.intermediate, numerics.compute
    running = tokens * (width * (2 * weight + FLOAT32 + c) + (shape.activation_copies + 1) * c * mlp)
    if not is_trained:
        return Part(name="vision", weights=shape.numel * weight, forward=running + c * pixels)
    inputs = 4 * c * width if numerics.is_autocast else 2 * FLOAT32 * width
    per_block = 2 * FLOAT32 * width + inputs + 4 * c * width + (shape.activation_copies + 1) * c * mlp
    copies = 2 * shape.numel if numerics.is_autocast else 0
    part = Part(
        name="vision",
        weights=shape.numel * weight,
        trained=shape.numel,
        saved=tokens * per_block * shape.num_blocks,
        forward=running + c * pixels,
        backward=tokens * 3 * c * mlp,
        copies=copies,
        saved_copies=copies,
        making=_made(width * mlp, numerics),
    )
    if not checkpointing or not shape.num_blocks:
        return part
    kept, again = tokens * FLOAT32 * width, tokens * per_block + copies // shape.num_blocks
    return replace(part, saved=kept * shape.num_blocks, recomputed=again, saved_copies=0)


def batch_bytes(shape: ModelShape, work: Workload, numerics: Numerics, is_cached: bool) -> int:
    """The micro-batch itself: ids, labels and positions in int64, pixels in float32 or features."""
    text = 3 * 8 * work.tokens
    if shape.vision is None:
        return text
    if is_cached:
        return text + work.num_images * shape.vision.num_patches * shape.vision.width * numerics.compute
    return text + work.num_images * shape.vision.num_pixels * FLOAT32


def partly(part: Part, numel: int, trained: int, numerics: Numerics) -> Part:
    """A piece of `numel` parameters, counted as if all of it trained, of which `trained` do."""
    return replace(
        part,
        weights=part.weights - (numel - trained) * (FLOAT32 - numerics.frozen),
        trained=trained,
        early=min(part.early, FLOAT32 * trained),
    )


def without_gradient(part: Part) -> Part:
    """A block through which no gradient passes: nothing of it is kept."""
    return replace(part, saved=0, recomputed=0, backward=0, copies=0, saved_copies=0, making=0, early=0)
