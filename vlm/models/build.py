"""ModelConfig -> model, tokenizer, and what images must look like."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm.batch import FusedSpec, ImageSpec
from vlm.errors import CheckpointError
from vlm.models.config import ModelConfig, VisionConfig
from vlm.models.entry import embedding_std
from vlm.models.llm import (
    IMAGE_TOKEN,
    enable_gradient_checkpointing,
    keep_blocks_still,
    load_llm,
    load_tokenizer,
    pad_vocabulary,
    refuse_beyond_embedding,
)
from vlm.models.quantize import pack_linears, round_linears
from vlm.models.recompute import checkpoint_blocks
from vlm.models.trainable import load_weights, misfit, set_trainable
from vlm.models.vision import VisionEncoder, build_vision
from vlm.models.vlm import VisionLanguageModel
from vlm.models.weight_files import prefixed
from vlm.precision import frozen_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Assembled:
    model: VisionLanguageModel
    tokenizer: PreTrainedTokenizerFast
    image_spec: ImageSpec | None  # None for a plain language model
    image_token_id: int | None


def build_model(
    config: ModelConfig,
    *,
    precision: str = "fp32",
    device: str = "cpu",
    seed: int = 0,
    tokenizer_path: str | None = None,
    packs: bool = True,
    scores: bool = False,
) -> Assembled:
    """Load encoder and language model, make the projector, freeze what does not train.

    Args:
        precision: "bf16" keeps frozen weights in bfloat16, "fp16" in float16; trained ones are float32 always.
        seed: of the new weights (projector, adapters). torch's own random state is left as it was.
        tokenizer_path: where the tokenizer is, if not beside the language model.
        packs: whether `model.llm.quantization` packs the weights; false gives them the packed ones' values, so that an
            adapter can be merged.
        scores: whether the model scores replies and writes none, so that nothing reads its output layer.
    """
    dtype = frozen_dtype(precision)
    tokenizer = load_tokenizer(tokenizer_path or config.llm.path, config.trust_remote_code)
    llm = load_llm(config.llm, dtype, device=device, trust_remote_code=config.trust_remote_code)
    if config.llm.pad_vocab_to_multiple_of:
        num_real = len(tokenizer) - 1  # the placeholder has no row of its own
        pad_vocabulary(llm, num_real, config.llm.pad_vocab_to_multiple_of)
    embeddings: Any = llm.get_input_embeddings().weight
    refuse_beyond_embedding(tokenizer, len(embeddings), config.llm.path)
    if config.llm.quantization is not None and packs:
        pack_linears(llm, config.llm.quantization, dtype, torch.device(device), "model.llm.quantization")
    elif config.llm.quantization is not None:
        round_linears(llm, config.llm.quantization, torch.device(device))
    vision = None if config.vision is None else build_vision(config.vision, dtype)
    with forked_random_state():
        torch.manual_seed(seed)
        model, spec, image_token_id = assemble(config, llm, vision, tokenizer, scores)
    start_projector(config, model)
    return Assembled(model.to(device), tokenizer, spec, image_token_id)


def forked_random_state() -> AbstractContextManager[None]:
    """torch's random state, of this process's GPU too, is afterwards what it was: `manual_seed` sets both."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else [])


def build_encoder(
    config: ModelConfig, *, precision: str = "fp32", device: str = "cpu"
) -> tuple[VisionEncoder, ImageSpec]:
    """The frozen encoder alone, as `build_model` with the same arguments has it, and what images must look like."""
    assert config.vision is not None
    vision = build_vision(config.vision, frozen_dtype(precision))
    vision.requires_grad_(False)
    num_tokens = config.projector.count_tokens(vision.num_patches)
    return vision.to(device), _image_spec(config.vision, vision, num_tokens)


def build_image_spec(config: ModelConfig) -> ImageSpec | None:
    """What images must look like, from the encoder's shape alone."""
    if config.vision is None:
        return None
    with torch.device("meta"):
        vision = build_vision(config.vision, weights=False)
    num_tokens = config.projector.count_tokens(vision.num_patches)
    return _image_spec(config.vision, vision, num_tokens)


def assemble(
    config: ModelConfig,
    llm: PreTrainedModel,
    vision: VisionEncoder | None,
    tokenizer: PreTrainedTokenizerFast | None,
    scores: bool = False,
) -> tuple[VisionLanguageModel, ImageSpec | None, int | None]:
    """Put a projector between loaded parts and freeze what does not train.

    Args:
        scores: whether the model scores replies and writes none: it has a value head though none trains, and nothing
            reads its output layer.

    Returns:
        the model, what images must look like, and the id that marks their placeholders.
    """
    image_token_id: Any = None
    if tokenizer is not None and vision is not None:
        image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    projector, spec = None, None
    if vision is not None and config.vision is not None:
        embeddings: Any = llm.get_input_embeddings().weight
        projector = config.projector.build(
            num_patches=vision.num_patches,
            in_width=vision.width,
            out_width=embeddings.shape[1],
            output_std=embedding_std(llm),
        )
        spec = _image_spec(config.vision, vision, projector.num_tokens)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(llm)
    has_value_head = scores or "value_head" in config.trainable
    value_head = (
        build_value_head(llm) if has_value_head else None
    )  # drawn after the projector, which so is that of a run without
    model = VisionLanguageModel(llm, vision, projector, image_token_id, value_head)
    set_trainable(
        model, config.trainable, config.lora, vision_lora=config.vision_lora,
        partial={str(part): chosen for part, chosen in config.partial.items()}, scores=scores,
    )  # fmt: skip
    if config.gradient_checkpointing and vision is not None and not vision.is_frozen:
        checkpoint_blocks(vision.trunk)
    if config.gradient_checkpointing and model.has_frozen_llm:
        keep_blocks_still(llm)
    return model, spec, image_token_id


def build_value_head(llm: PreTrainedModel) -> nn.Linear:
    """[..., D] -> [..., 1] in float32, drawn so that scores begin at about 1 in size whatever D is (Stiennon et al.
    2020, arXiv:2009.01325). Zeros would let no gradient through to what lies below."""
    embeddings: Any = llm.get_input_embeddings().weight
    head = nn.Linear(embeddings.shape[1], 1, bias=False)
    nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    return head


def start_projector(config: ModelConfig, model: VisionLanguageModel) -> None:
    """Give the projector the weights that its config names, if it names any.

    Raises:
        CheckpointError: they are not there, or of another shape.
    """
    projector, path = model.projector, config.projector.start_path
    if projector is None or path is None:
        return
    where = f"model.projector.pretrained {path}"
    tensors = config.projector.start_weights()
    missing = [f"  projector.{name}: missing" for name in sorted(projector.pretrained_names() - tensors.keys())]
    if missing:
        raise CheckpointError(misfit(where, missing))
    load_weights(nn.ModuleDict({"projector": projector}), prefixed(tensors, "projector."), where, partial=True)


def _image_spec(config: VisionConfig, vision: VisionEncoder, num_tokens: int) -> ImageSpec:
    specs = [
        ImageSpec(each.image_size, each.mean, each.std, num_tokens, named.resize, config.background)
        for each, named in zip(vision.members, config.encoders, strict=True)
    ]
    return specs[0] if len(specs) == 1 else FusedSpec(**asdict(specs[0]), others=tuple(specs[1:]))
