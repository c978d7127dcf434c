"""The shapes of a model, from its config files: built on the meta device, so no weight is read and nothing is computed.

Letters: D LLM width, V vocabulary, C vision width, P patches, T tokens per image.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from vlm.models.config import LoRAConfig, ModelConfig, VisionConfig
from vlm.models.decoders import find_blocks, find_decoder, find_linears, linear_shape
from vlm.models.encoders.base import EncoderCost
from vlm.models.encoders.kinds import VISION_BACKENDS
from vlm.models.families import family_of
from vlm.models.llm import llm_from_config, pad_vocabulary, takes_varlen
from vlm.models.projector_kinds import ProjectorConfig
from vlm.models.vision import VisionEncoder, build_vision


@dataclass(frozen=True)
class Linear:
    """A linear layer; `name` is the last part of the module's name, e.g. q_proj."""

    name: str
    inputs: int
    outputs: int
    role: str = ""  # the field of `BlockNames` that has its name


@dataclass(frozen=True)
class ProjectorLinear(Linear):
    """A linear layer of a projector.

    Attributes:
        tokens: of an image, that it computes.
        trains: where the projector does; not what is frozen within it.
        passes: where the projector trains and the encoder does not, a gradient goes on to what entered it.
    """

    tokens: int = 0
    trains: bool = True
    passes: bool = True


@dataclass(frozen=True)
class ProjectorShape:
    """Found by building one and looking at one forward, all without weights."""

    linears: tuple[ProjectorLinear, ...]  # in the order in which they compute
    numel: int
    trainable: int  # parameters; fewer than `numel` where some are frozen
    num_inputs: int  # numbers that it reads of an image, after pooling


@dataclass(frozen=True)
class LLMShape:
    """A decoder. Numbers of parameters are of the bare model, without adapters."""

    width: int  # D
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int  # V, rows of the embedding
    is_gated: bool  # gate and up, as Llama has
    has_head_norms: bool  # a norm of each head's query and key, as Qwen3 has
    embedding: int  # parameters
    head: int  # parameters; 0 when it is the embedding
    final_norm: int  # and what else lies outside of embedding, blocks and head: learned positions, say
    blocks: tuple[int, ...]  # parameters of each block
    linears: tuple[Linear, ...]  # of one block
    takes_varlen: bool = True  # attention record by record, which `attention: auto` then is

    def lora_numel(self, lora: LoRAConfig) -> int:
        """Parameters of the adapters of one block."""
        return sum(lora.rank * (linear.inputs + linear.outputs) for linear in self.adapted(lora))

    def adapted(self, lora: LoRAConfig | None) -> tuple[Linear, ...]:
        """The linears that carry an adapter."""
        if lora is None:
            return ()
        return tuple(linear for linear in self.linears if lora.targets == "all-linear" or linear.name in lora.targets)


@dataclass(frozen=True)
class VisionShape(EncoderCost):
    """An encoder, with what its kind says of its blocks."""

    numel: int
    width: int  # C of a patch's feature
    num_patches: int  # P, what it yields per image
    image_size: int  # pixels per side
    fused: tuple[VisionShape, ...] = ()  # where it is several encoders; the fields of `EncoderCost` are the first's

    @property
    def members(self) -> tuple[VisionShape, ...]:
        return self.fused or (self,)

    @property
    def num_pixels(self) -> int:
        """Numbers of an image's pixels."""
        return 3 * len(self.members) * self.image_size**2


@dataclass(frozen=True)
class ModelShape:
    llm: LLMShape
    vision: VisionShape | None
    projector: ProjectorShape | None  # None for a plain language model
    tokens_per_image: int  # T


def read_shapes(config: ModelConfig) -> ModelShape:
    """Build the parts on the meta device and measure them.

    Raises:
        CheckpointError: a config.json cannot be read, or is of a model whose class transformers does not have.
        ConfigError: the encoder is unknown, or an option does not fit it.
    """
    llm = _read_llm(config)
    if config.vision is None:
        return ModelShape(llm, None, None, 0)
    vision = _read_vision(config.vision)
    projector = _read_projector(config.projector, vision, llm.width)
    return ModelShape(llm, vision, projector, config.projector.count_tokens(vision.num_patches))


def _read_llm(config: ModelConfig) -> LLMShape:
    with torch.device("meta"):
        model: Any = llm_from_config(config.llm, trust_remote_code=config.trust_remote_code)
        if config.llm.pad_vocab_to_multiple_of:
            pad_vocabulary(model, model.config.vocab_size, config.llm.pad_vocab_to_multiple_of)
    settings = model.config.get_text_config(decoder=True)
    blocks, in_blocks = find_blocks(model), _linears_of_blocks(model)
    widest = max(blocks, key=lambda name: sum(linear.inputs * linear.outputs for linear in in_blocks[name]))
    linears = in_blocks[widest]
    roles = {linear.role: linear for linear in linears}
    head_norms = family_of(model.config).block.head_norms
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    num_heads = getattr(settings, "num_attention_heads", None) or 1  # a state-space block is taken for one head
    down = roles.get("down") or max(linears, key=lambda linear: linear.inputs, default=None)
    numels = tuple(sum(p.numel() for p in block.parameters()) for block in blocks.values())
    shared = {id(p): p.numel() for block in blocks.values() for p in block.parameters()}
    return LLMShape(
        width=embedding.shape[1],
        num_heads=num_heads,
        num_kv_heads=getattr(settings, "num_key_value_heads", None) or num_heads,
        head_dim=settings.to_dict().get("head_dim") or embedding.shape[1] // num_heads,
        intermediate=down.inputs if down else embedding.shape[1],
        vocab=embedding.shape[0],
        is_gated="gate" in roles,
        has_head_norms=any(name.endswith(head_norms) for name, _ in blocks[widest].named_modules()),
        embedding=embedding.numel(),
        head=0 if head is embedding else head.numel(),
        final_norm=sum(p.numel() for p in find_decoder(model).parameters()) - embedding.numel() - sum(shared.values()),
        blocks=numels,
        linears=linears,
        takes_varlen=takes_varlen(model),
    )


def _linears_of_blocks(model: Any) -> dict[str, tuple[Linear, ...]]:
    """The linear layers of each block, by the block's name."""
    roles = family_of(model.config).block.roles()
    found: dict[str, list[Linear]] = {name: [] for name in find_blocks(model)}
    for name, module in find_linears(model).items():
        block = next(block for block in found if name.startswith(f"{block}."))
        last = name.rpartition(".")[2]
        found[block].append(Linear(last, *linear_shape(module), role=roles.get(last, "")))
    return {name: tuple(linears) for name, linears in found.items()}


def _read_projector(config: ProjectorConfig, vision: VisionShape, out_width: int) -> ProjectorShape:
    """Of an encoder of this shape."""
    found: list[ProjectorLinear] = []

    def look(module: Any, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].numel() // module.in_features
        found.append(
            ProjectorLinear(
                str(len(found)), module.in_features, module.out_features, tokens=tokens,
                trains=module.weight.requires_grad, passes=inputs[0].requires_grad,
            )
        )  # fmt: skip

    with torch.device("meta"):
        projector = config.build(
            num_patches=vision.num_patches, in_width=vision.width, out_width=out_width, output_std=1.0
        )
        for name in projector.frozen:
            projector.get_parameter(name).requires_grad_(False)
        for module in projector.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(look)
        projector(torch.zeros(1, vision.num_patches, vision.width))
    return ProjectorShape(
        linears=tuple(found),
        numel=sum(p.numel() for p in projector.parameters()),
        trainable=sum(p.numel() for p in projector.parameters() if p.requires_grad),
        num_inputs=vision.num_patches * vision.width // config.pool**2,
    )


def _read_vision(config: VisionConfig) -> VisionShape:
    with torch.device("meta"):
        encoder = build_vision(config, torch.bfloat16, weights=False)
    shapes = [
        _vision_shape(each, VISION_BACKENDS[named.backend].cost(each))
        for each, named in zip(encoder.members, config.encoders, strict=True)
    ]
    if len(shapes) == 1:
        return shapes[0]
    return replace(_vision_shape(encoder, shapes[0]), fused=tuple(shapes))


def _vision_shape(encoder: VisionEncoder, cost: EncoderCost) -> VisionShape:
    return VisionShape(
        numel=sum(p.numel() for p in encoder.parameters()),
        width=encoder.width,
        num_patches=encoder.num_patches,
        image_size=encoder.image_size,
        **{each.name: getattr(cost, each.name) for each in fields(EncoderCost)},
    )
