"""Config sections of the models package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from vlm.models.projector_kinds import PROJECTORS, LinearProjectorConfig, ProjectorConfig
from vlm.schema import OneOf, PathText, Section, TrainablePart


class EncoderConfig(Section):
    """One encoder."""

    backend: Literal["hf", "open_clip", "timm"]
    """The library whose network it is; hf is transformers."""
    path: PathText
    """A local folder or file, or a name that the backend resolves (and caches) itself."""
    pretrained: str | None = None
    """open_clip: weight tag or file. timm: weight file (.safetensors) for an architecture named by `path`; for
    eva_giant_patch14_224 EVA's own eva_vit_g.pth too."""
    layer: int | Annotated[tuple[int, ...], Field(min_length=1)] = -1
    """Which block's output is taken: -1 the last, -2 the one before (LLaVA). Of several, as [-3, -9], a patch has the
    channels of each, in this order."""
    keep_class_token: bool = False
    """Give the class token to the projector too, before the patches."""
    image_size: PositiveInt | None = None
    """Pixels per side; null takes the encoder's own. Position embeddings are interpolated; windows (Swin) stay."""
    resize: Literal["pad", "crop", "squash"] = "pad"
    """How an image becomes a square: padded, its middle cut out, or squashed."""

    @property
    def layers(self) -> tuple[int, ...]:
        """`layer`, whether one or several."""
        return (self.layer,) if isinstance(self.layer, int) else self.layer


class VisionConfig(EncoderConfig):
    """The only encoder, or the first of several."""

    background: tuple[int, int, int] = (255, 255, 255)
    """RGB, 0-255, under transparent pixels and around padded images."""
    fuse_with: tuple[EncoderConfig, ...] = ()
    """More encoders, whose features are joined to this one's. Each sees the image as its own keys say."""
    fuse_by: Literal["channel", "token"] = "channel"
    """With fuse_with. channel: a patch has the channels of all, other grids interpolated to the first encoder's. token:
    the patches of one after those of another."""
    compute: Literal["auto", "fp32", "fp32_channels_last", "bf16", "bf16_channels_last"] = "auto"
    """How it computes while it is frozen. auto: as train.precision says, but a convolutional network in the number and
    memory format that is fastest here, measured once per machine."""

    @property
    def encoders(self) -> tuple[EncoderConfig, ...]:
        """This one, and those that it is fused with."""
        return (self, *self.fuse_with)

    def with_encoders(self, encoders: Sequence[EncoderConfig]) -> VisionConfig:
        """Others in the place of `encoders`, which keep what belongs to all of them."""
        first = {name: getattr(encoders[0], name) for name in EncoderConfig.model_fields}
        return self.model_copy(update={**first, "fuse_with": tuple(encoders[1:])})


class QuantizationConfig(Section):
    format: Literal["nf4", "fp4", "int8"] = "nf4"
    """nf4 and fp4: 4 bits a weight; nf4 is nearer to what weights are like. int8: 8 bits."""
    double: bool = True
    """Quantize the scales of 4-bit weights too: 4.13 bits a weight in place of 4.5."""

    @property
    def bits(self) -> int:
        return 8 if self.format == "int8" else 4


class LLMConfig(Section):
    path: PathText
    """A local folder, or a name that transformers resolves."""
    attention: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    """auto: FlashAttention 2 on a GPU where it is installed, else varlen where the type of model can, else sdpa.
    varlen: record by record inside a packed row, so that its cost follows the records. sdpa: with a mask of the whole
    row, or eager for the few types that have no SDPA."""
    pad_vocab_to_multiple_of: PositiveInt | None = None
    """Grow the embedding to a multiple, for faster matrix products; null leaves it."""
    quantization: QuantizationConfig | None = None
    """Keep the frozen linear layers of the blocks in 4 or 8 bits (QLoRA); needs vlm[quant]. null: not packed."""


class LoRAConfig(Section):
    rank: PositiveInt = 16
    """Width of the adapters."""
    alpha: PositiveInt = 32
    """The adapters count alpha / rank times."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the adapters' input, while training."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear modules: the last part of a name, as [q_proj, v_proj], a whole path, or a pattern as "*.layers.0.*"."""
    rslora: bool = False
    """The adapters count alpha / sqrt(rank) times instead, so that a higher rank does not make them smaller."""
    dora: bool = False
    """Learn the length of each row of the weights apart from its direction: nearer to full tuning, slower."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that train whole beside the adapters and are kept with them, as [lm_head]."""

    @property
    def scale(self) -> float:
        """What the product of the two matrices of an adapter counts."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class PartialConfig(Section):
    """Which of a part's weights train; what several keys name is put together."""

    first_blocks: NonNegativeInt = 0
    """So many blocks from the input on; of fused encoders, of each."""
    last_blocks: NonNegativeInt = 0
    """So many blocks before the output; of fused encoders, of each."""
    modules: tuple[str, ...] = ()
    """Modules by the last part of their name, whole path or pattern, as [lm_head, mlp, "*.layers.0.self_attn"]."""

    @model_validator(mode="after")
    def _names_some(self) -> PartialConfig:
        if not (self.first_blocks or self.last_blocks or self.modules):
            raise ValueError("names nothing: set first_blocks, last_blocks or modules, or leave it out to train all")
        return self


class ModelConfig(Section):
    vision: VisionConfig | None = None
    """null trains a plain language model through the same code."""
    projector: Annotated[ProjectorConfig, OneOf(PROJECTORS, default="linear")] = LinearProjectorConfig()
    """From the encoder's features to the language model's width."""
    llm: LLMConfig
    lora: LoRAConfig | None = None
    """Adapters on the language model; null adds none."""
    vision_lora: LoRAConfig | None = None
    """Adapters on the vision encoder; an export merges them into it."""
    trainable: tuple[TrainablePart, ...] = ("projector",)
    """What trains; everything else is frozen."""
    partial: dict[Literal["llm", "vision"], PartialConfig] = Field(default_factory=dict)
    """Of a part in `trainable`, what of it trains: {llm: {last_blocks: 4}}. A part that is not here trains whole."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    trust_remote_code: bool = False
    """Let a model folder run its own Python code. Only for folders whose code you have read."""

    @model_validator(mode="after")
    def _parts_exist(self) -> ModelConfig:
        if not self.trainable:
            raise ValueError(
                "trainable: empty, so nothing would be trained; name projector, llm, llm.lora, vision or vision.lora"
            )
        encoders = () if self.vision is None else self.vision.encoders
        if any(each.keep_class_token for each in encoders) and self.projector.needs_square:
            raise ValueError(
                "vision.keep_class_token excludes projector.pool, projector.unshuffle and kind average: no square of "
                "patches"
            )
        joins_tokens = self.vision is not None and self.vision.fuse_by == "token" and len(encoders) > 1
        if joins_tokens and self.projector.needs_square:
            raise ValueError(
                "vision.fuse_by token excludes projector.pool, projector.unshuffle and kind average: the patches of "
                "several encoders form no square"
            )
        if self.vision is None and {"projector", "vision", "vision.lora"} & set(self.trainable):
            raise ValueError("trainable: names projector or vision, but model.vision is null")
        if "llm.lora" in self.trainable and self.lora is None:
            raise ValueError("trainable: names llm.lora, but model.lora is null; add e.g. lora: {rank: 16, alpha: 32}")
        if {"llm", "llm.lora"} <= set(self.trainable):
            raise ValueError("trainable: llm and llm.lora exclude each other; keep one")
        if "vision.lora" in self.trainable and (self.vision is None or self.vision_lora is None):
            raise ValueError("trainable: names vision.lora, which needs model.vision and e.g. vision_lora: {rank: 16}")
        if {"vision", "vision.lora"} <= set(self.trainable):
            raise ValueError("trainable: vision and vision.lora exclude each other; keep one")
        if self.vision_lora is not None and self.vision_lora.modules_to_save:
            raise ValueError("vision_lora.modules_to_save: an encoder has none; name vision and partial.vision instead")
        for part in self.partial:
            if part not in self.trainable:
                raise ValueError(f"partial: names {part}, but trainable does not; add {part} there, or drop it here")
        if self.llm.quantization is not None and "llm" in self.trainable:
            raise ValueError(
                "llm.quantization: packed weights cannot train, but trainable names llm; name llm.lora instead "
                "(QLoRA), with e.g. lora: {rank: 64, alpha: 16}"
            )
        return self

    @property
    def trains_vision(self) -> bool:
        """Whether the encoder's features change while it trains."""
        return bool({"vision", "vision.lora"} & set(self.trainable))
