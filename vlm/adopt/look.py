"""What an encoder and a language model need to be trained together: found on their shapes and text files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from vlm.adopt.encoders import Backend, draft_encoder
from vlm.adopt.template import ChosenTemplate, choose_template
from vlm.config import RunConfig
from vlm.config_checks import model_problems
from vlm.errors import ConfigError, VLMError
from vlm.export.hf import why_not_llava
from vlm.models.build import Assembled
from vlm.models.config import EncoderConfig, LLMConfig, ModelConfig, VisionConfig
from vlm.models.decoders import find_blocks, find_linears
from vlm.models.families import describe_packing, llm_parts, packing_of
from vlm.models.known import measured
from vlm.models.llm import IMAGE_TOKEN, llm_from_config, load_tokenizer, refuse_beyond_embedding, takes_varlen
from vlm.models.vision import VisionEncoder, build_vision
from vlm.models.vlm import VisionLanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_LENGTH = 2048  # tokens of a row, where the decoder reads as many
MOST_IMAGE_TOKENS = 576  # of an image: LLaVA-1.5's
_SIDES = range(1, 5)  # squares of patches that are merged into one token
_CONTEXT = ("max_position_embeddings", "max_seq_len", "n_positions")
T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """Something that was found. `limit`: what cannot be done, and why; `advice`: the next command."""

    topic: str
    text: str = ""
    limit: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Pair:
    """What the project's files say of an encoder and a language model.

    Attributes:
        model: as stage 1 trains it.
        packs: several records in a row compute what each computes alone.
        has_linears: an adapter has a place to go to.
    """

    model: ModelConfig
    template: ChosenTemplate
    has_end: bool
    max_length: int
    tokens_per_image: int
    packs: bool
    has_linears: bool
    why_no_pipeline: str  # "" where one can cut the language model
    lines: tuple[Line, ...]


def look(
    encoders: Sequence[str], llm: str, *, backend: Backend | None = None, pretrained: str | None = None,
    template: str | None = None,
) -> Pair:  # fmt: skip
    """Find out what a project of these parts has to say.

    Args:
        encoders: folders or names; of several the features are joined by channel.
        llm: a folder or name.
        backend: the library of the encoders; None finds it for each.
        pretrained: weights of an encoder that open_clip or timm knows by name.
        template: of conversations; None chooses one.

    Raises:
        ConfigError: names every reason why the two cannot be trained, of both, with what to do.
    """
    problems: list[str] = []
    found = [_try(problems, partial(draft_encoder, each, backend, pretrained)) for each in encoders]
    drafts = [draft for draft in found if draft is not None]
    decoder = _try(problems, lambda: _Decoder.read(llm))
    if not problems and decoder is not None:
        problems += _folder_problems(_vision_of(drafts), llm)
    chosen = None
    if not problems and decoder is not None:
        chosen = choose_template(decoder.tokenizer, decoder.llm.config.model_type, template)
        if chosen is None:
            problems.append(f"{llm}: its tokenizer has no token that ends a reply. {_prepare(encoders, llm)}")
    if problems or decoder is None or chosen is None:
        raise ConfigError(_refusal(encoders, llm, problems))
    return _Look(encoders, _vision_of(drafts), decoder, chosen).pair()


def _refusal(encoders: Sequence[str], llm: str, problems: Sequence[str]) -> str:
    lines = "".join(f"\n  {problem}" for problem in dict.fromkeys(problems))
    return f"{' + '.join(encoders)} and {llm} cannot be trained together; nothing was written:{lines}"


@dataclass(frozen=True)
class _Decoder:
    """A language model's shape, and its tokenizer."""

    path: str
    llm: Any
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def read(cls, path: str) -> _Decoder:
        if problems := _folder_problems(None, path):
            raise ConfigError("; ".join(problems))
        with torch.device("meta"):
            llm = llm_from_config(LLMConfig(path=path))
        tokenizer, embeddings = load_tokenizer(path), cast("Any", llm.get_input_embeddings())
        refuse_beyond_embedding(tokenizer, len(embeddings.weight), path)
        return cls(path, llm, tokenizer)

    @property
    def max_length(self) -> int:
        """Tokens of a row: as many as its positions reach, and as leave its rotations alone."""
        settings = self.llm.config.get_text_config(decoder=True)
        context = next((value for name in _CONTEXT if (value := getattr(settings, name, None))), None)
        return min(MOST_LENGTH, context or MOST_LENGTH, packing_of(self.llm.config).longest or MOST_LENGTH)


@dataclass(frozen=True)
class _Look:
    encoders: Sequence[str]
    vision: VisionConfig
    decoder: _Decoder
    template: ChosenTemplate

    def pair(self) -> Pair:
        with torch.device("meta"):
            encoder = build_vision(self.vision, weights=False)
        max_length, llm = self.decoder.max_length, self.decoder.llm
        projector = choose_projector(encoder.num_patches, min(MOST_IMAGE_TOKENS, max_length // 2))
        model = ModelConfig.model_validate(
            {"vision": self.vision.model_dump(), "projector": projector, "llm": {"path": self.decoder.path}}
        )
        tokens = model.projector.count_tokens(encoder.num_patches)
        linears = find_linears(llm)
        lines = (
            *self._encoder_lines(encoder),
            Line("image", f"{tokens} tokens ({model.projector.describe()}), in rows of {max_length:,} tokens"),
            self._decoder_line(),
            *self._tokenizer_lines(),
            self._template_line(),
            *self._packing_lines(),
            _lora_line(linears),
            self._export_line(model, encoder),
        )
        packs, has_end = packing_of(llm.config).by_positions, self.decoder.tokenizer.eos_token is not None
        why = _why_no_pipeline(llm)
        return Pair(model, self.template, has_end, max_length, tokens, packs, bool(linears), why, lines)

    def _encoder_lines(self, encoder: VisionEncoder) -> list[Line]:
        lines = []
        for config, member in zip(self.vision.encoders, encoder.members, strict=True):
            where = "last output" if config.layer == -1 else f"layer {config.layer}"
            shape = f"{member.image_size} x {member.image_size} pixels -> {member.num_patches} patches"
            lines.append(Line("encoder", f"{config.backend} {config.path}: {shape} of {member.width:,}, {where}"))
        if len(lines) > 1:
            joined = f"joined by channel: {encoder.num_patches} patches of {encoder.width:,}"
            lines.append(Line("encoder", joined))
        return lines

    def _decoder_line(self) -> Line:
        llm, kind = self.decoder.llm, self.decoder.llm.config.model_type
        count = sum(parameter.numel() for parameter in llm.parameters())
        size = f"{len(find_blocks(llm))} blocks, {count / 1e6:,.1f} M parameters"
        text = f"{self.decoder.path}: {type(llm).__name__}, {size}"
        if measured().get(kind, {}).get("state") == "right":
            return Line("decoder", f"{text}; model type {kind} was measured (docs/models.md)")
        limit = f"model type {kind} was not measured yet"
        return Line("decoder", text, limit, "vlm prove on the trial compares it with itself, record by record")

    def _tokenizer_lines(self) -> list[Line]:
        tokenizer, rows = self.decoder.tokenizer, len(self.decoder.llm.get_input_embeddings().weight)
        number = tokenizer.get_vocab()[IMAGE_TOKEN]
        row = "needs no row of it" if number >= rows else "within it"
        ends = tokenizer.eos_token or "none"
        text = (
            f"{len(tokenizer):,} tokens, embedding of {rows:,} rows; end {ends}, padding {tokenizer.pad_token}, "
            f"{IMAGE_TOKEN} is {number:,}, {row}"
        )
        return [Line("tokenizer", text)]

    def _template_line(self) -> Line:
        text = f"data.template {self.template.name}: {self.template.why}"
        if not self.template.is_base:
            return Line("template", text, self.template.limit)
        return Line(
            "template",
            text,
            "it is a base model: it knows no chat template",
            _prepare(self.encoders, self.decoder.path),
        )

    def _packing_lines(self) -> list[Line]:
        config = self.decoder.llm.config
        reason = describe_packing(config)
        if reason is None:
            how = "attention ends where a record does" if takes_varlen(self.decoder.llm) else "kept apart by positions"
            return [Line("packed rows", f"{how}: data.packing is on")]
        limit = "ZeRO 3 and fsdp on several GPUs are refused for it"
        return [Line("packed rows", reason, limit, "take engine.kind ddp, or zero with stage 2")]

    def _export_line(self, model: ModelConfig, encoder: VisionEncoder) -> Line:
        with torch.device("meta"):
            built = Assembled(VisionLanguageModel(self.decoder.llm, encoder), self.decoder.tokenizer, None, None)
        reason = why_not_llava(model, built)
        if reason is None:
            return Line("export", "vlm export --full writes transformers' LLaVA layout, which other servers read")
        limit = f"the export cannot have transformers' LLaVA layout: {reason}"
        return Line("export", "vlm export --full writes a vlm folder", limit, "vlm serve serves it")


def choose_projector(num_patches: int, most: int) -> dict[str, Any]:
    """`model.projector` of an encoder with so many patches, so that an image has no more than `most` tokens.

    >>> choose_projector(576, 576), choose_projector(729, 576)["unshuffle"], choose_projector(961, 576)["num_tokens"]
    ({'kind': 'mlp', 'depth': 2}, 3, 576)
    """
    projector = {"kind": "mlp", "depth": 2}
    if num_patches <= most:
        return projector
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        return {"kind": "resampler", "num_tokens": min(64, most)}
    fits = (n for n in _SIDES if side % n == 0 and (side // n) ** 2 <= most)
    if merged := next(fits, None):
        return projector | {"unshuffle": merged}
    return {"kind": "average", "num_tokens": math.isqrt(most) ** 2}


def _lora_line(linears: dict[str, Any]) -> Line:
    names = dict.fromkeys(name.rpartition(".")[2] for name in linears)
    if names:
        return Line("LoRA", f"all-linear is {len(linears)} layers: {', '.join(names)}")
    return Line("LoRA", limit="no linear layer was found in its blocks, so no adapter can be added")


def _why_no_pipeline(llm: Any) -> str:
    try:
        llm_parts(llm.config)
    except ConfigError as error:
        return str(error).removeprefix("pipeline: ")
    return ""


def _prepare(encoders: Sequence[str], llm: str) -> str:
    """The commands that give a base model ChatML."""
    prepared = f"cache/ckpt/{Path(llm).name}-chatml"
    first, *others = encoders
    more = "".join(f" --fuse-with {other}" for other in others)
    return f"vlm prepare-base-model {llm} {prepared}, then vlm adopt {first} {prepared} DIR{more}"


def _vision_of(encoders: Sequence[EncoderConfig]) -> VisionConfig:
    first, *others = encoders
    return VisionConfig.model_validate({**first.model_dump(), "fuse_with": [each.model_dump() for each in others]})


def _folder_problems(vision: VisionConfig | None, llm: str) -> list[str]:
    """What `vlm validate` says of the models' folders, the template aside, which is not chosen yet."""
    model: dict[str, Any] = {"llm": {"path": llm}, "trainable": ["llm"]}
    if vision is not None:
        model |= {"vision": vision.model_dump(), "trainable": ["projector"]}
    data = {"template": "vanilla", "sources": [{"path": "."}]}
    run = RunConfig.model_validate({"output_dir": ".", "model": model, "data": data, "train": {"max_steps": 1}})
    return [text for key, text in model_problems(run) if key[0] == "model"]


def _try(problems: list[str], read: Callable[[], T]) -> T | None:
    """What `read` returns; what a part cannot be used for is kept, so that all is said at once."""
    try:
        return read()
    except VLMError as error:
        problems.append(str(error))
        return None
