"""The shapes of a model, from its config files: built on the meta device, so no weight is read and nothing is computed.

Letters: D LLM width, V vocabulary, C vision width, P patches, T tokens per image.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from vlm.models.config import LoRAConfig, ModelConfig, QuantizationConfig
from vlm.models.decoders import find_blocks, find_decoder, find_linears, linear_shape
from vlm.models.encoders.base import EncoderCost
from vlm.models.encoders.blocks import networks_of_encoder
from vlm.models.encoders.kinds import VISION_BACKENDS
from vlm.models.families import family_of
from vlm.models.llm import llm_from_config, pad_vocabulary, takes_varlen
from vlm.models.projector_kinds import ProjectorConfig
from vlm.models.trainable import adapted_linears, partial_names, saved_modules
from vlm.models.vision import VisionEncoder, build_vision


@dataclass(frozen=True)
class Linear:
    """A linear layer; `name` is the last part of the module's name, e.g. q_proj, `path` the whole of one block's."""

    name: str
    inputs: int
    outputs: int
    role: str = ""  # the field of `BlockNames` that has its name
    path: str = ""

    def is_named(self, target: str) -> bool:
        """Whether one of `model.lora.targets` names it, in whichever block.

        >>> [Linear("q", 1, 1, path="layers.7.attn.q").is_named(t) for t in ("q", "attn.q", "layers.0.attn.*", "k")]
        [True, True, True, False]
        """
        anywhere = re.sub(r"(?<=\.)[\d?]+(?=\.)", "*", target)
        return target == self.name or f".{self.path}".endswith(f".{target}") or fnmatchcase(self.path, anywhere)


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
    trained: tuple[int, ...] = ()  # parameters of each block that train with `model.partial`; empty: all or none
    trained_ends: tuple[int, int] = (0, 0)  # of the embedding, and of head and final norm, with `model.partial`
    saved: int = 0  # parameters of `model.lora.modules_to_save`

    def lora_numel(self, lora: LoRAConfig) -> int:
        """Parameters of the adapters of one block."""
        return sum(lora.rank * (linear.inputs + linear.outputs) for linear in self.adapted(lora))

    def adapted(self, lora: LoRAConfig | None) -> tuple[Linear, ...]:
        """The linears that carry an adapter."""
        if lora is None:
            return ()
        return tuple(
            linear for linear in self.linears if lora.targets == "all-linear" or any(map(linear.is_named, lora.targets))
        )

    def packed_bytes(self, quantization: QuantizationConfig) -> int:
        """What the linear layers of one block take in 4 or 8 bits, with their scales.

        Of 4 bits a scale per 64 weights: in float32, or in a byte with one in float32 per 256 of them. Of 8 bits a
        scale in float32 per row.
        """
        if quantization.bits == 8:
            return sum(linear.inputs * linear.outputs + 4 * linear.outputs for linear in self.linears)
        scale = (1 + 4 / 256) / 64 if quantization.double else 4 / 64
        return int(sum(linear.inputs * linear.outputs * (0.5 + scale) for linear in self.linears))


@dataclass(frozen=True)
class VisionShape(EncoderCost):
    """An encoder, with what its kind says of its blocks."""

    numel: int
    width: int  # C of a patch's feature
    num_patches: int  # P, what it yields per image
    image_size: int  # pixels per side
    trained: int | None = None  # parameters that train with `model.partial` or as adapters; None: all or none
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
    vision = _read_vision(config)
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
        **_trained_of_llm(model, config, blocks),
    )


def _linears_of_blocks(model: Any) -> dict[str, tuple[Linear, ...]]:
    """The linear layers of each block, by the block's name."""
    roles = family_of(model.config).block.roles()
    found: dict[str, list[Linear]] = {name: [] for name in find_blocks(model)}
    for name, module in find_linears(model).items():
        block = next(block for block in found if name.startswith(f"{block}."))
        last = name.rpartition(".")[2]
        found[block].append(Linear(last, *linear_shape(module), role=roles.get(last, ""), path=name))
    return {name: tuple(linears) for name, linears in found.items()}


def _trained_of_llm(model: Any, config: ModelConfig, blocks: Collection[str]) -> dict[str, Any]:
    """The fields of `LLMShape` about a language model of which some trains."""
    found: dict[str, Any] = {}
    if config.lora is not None and "llm.lora" in config.trainable:
        saved = [model.get_submodule(name) for name in saved_modules(model, config.lora)]
        found["saved"] = sum(p.numel() for module in saved for p in module.parameters())
    if "llm" not in config.partial:
        return found
    trained = {name: model.get_parameter(name) for name in partial_names(model, config.partial["llm"], "llm")}
    of_blocks = tuple(sum(p.numel() for name, p in trained.items() if name.startswith(f"{block}.")) for block in blocks)
    embedding = model.get_input_embeddings().weight
    first = embedding.numel() if any(p is embedding for p in trained.values()) else 0
    rest = sum(p.numel() for p in trained.values()) - sum(of_blocks) - first
    return found | {"trained": of_blocks, "trained_ends": (first, rest)}


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


def _read_vision(config: ModelConfig) -> VisionShape:
    assert config.vision is not None
    with torch.device("meta"):
        encoder = build_vision(config.vision, torch.bfloat16, weights=False)
    trained = _trained_of_encoder(encoder, config)
    shapes = []
    for (place, _), each, named in zip(
        networks_of_encoder(encoder).items(), encoder.members, config.vision.encoders, strict=True
    ):
        numel = None if trained is None else sum(trained[name] for name in trained if name.startswith(f"{place}."))
        shapes.append(replace(_vision_shape(each, VISION_BACKENDS[named.backend].cost(each)), trained=numel))
    if len(shapes) == 1:
        return shapes[0]
    return replace(_vision_shape(encoder, shapes[0]), fused=tuple(shapes))


def _trained_of_encoder(encoder: VisionEncoder, config: ModelConfig) -> dict[str, int] | None:
    """Parameters that train, by the name in the encoder of a weight, or of a layer that has an adapter; None: all or
    none."""
    if "vision" in config.partial:
        names = partial_names(encoder, config.partial["vision"], "vision")
        return {name: encoder.get_parameter(name).numel() for name in names}
    if config.vision_lora is None or "vision.lora" not in config.trainable:
        return None
    layers = adapted_linears(encoder, config.vision_lora)
    return {name: config.vision_lora.rank * sum(linear_shape(layer)) for name, layer in layers.items()}


def _vision_shape(encoder: VisionEncoder, cost: EncoderCost) -> VisionShape:
    return VisionShape(
        numel=sum(p.numel() for p in encoder.parameters()),
        width=encoder.width,
        num_patches=encoder.num_patches,
        image_size=encoder.image_size,
        **{each.name: getattr(cost, each.name) for each in fields(EncoderCost)},
    )
