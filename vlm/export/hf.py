"""The whole model as transformers' LlavaForConditionalGeneration, with its processor.

What that class does not know is folded into weights, exactly:

- Channel statistics of the projector: W ((x - mean) / std) + b = (W / std) x + (b - (W / std) mean).
- Position embeddings of another image size: interpolated once, here.
- The colour around padded images. transformers pads with the mean that it normalises with. So the mean is set to
  that colour, and the constant difference that this makes to every pixel goes through the patch embedding, which is
  linear, into its bias (SigLIP) or into the position embeddings of the patches (CLIP, whose convolution has no bias).
- The placeholder's id, if it lies beyond the embedding: rows are added, each the mean of the others. Its logit is then
  the mean of all logits, so it is never the greatest.

Names of weights are those of `vlm.artifacts.llava`, which vLLM and SGLang look for too, as for the settings; see
docs/serving.md.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm.artifacts.assemble import wrap_llava
from vlm.artifacts.llava import llava_adapter, llava_projector
from vlm.artifacts.tokenizer import hand_over
from vlm.batch import ImageSpec
from vlm.data.tokenize import ConversationTokenizer
from vlm.export.read_back import Answers, compare, in_float32, llava_logits, make_question
from vlm.models.build import Assembled
from vlm.models.config import ModelConfig
from vlm.models.encoders.kinds import VISION_BACKENDS
from vlm.models.families import head_settings
from vlm.models.llm import IMAGE_TOKEN, pad_vocabulary
from vlm.models.projector import Projector
from vlm.models.trainable import cast_weights
from vlm.models.vision import VisionEncoder

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


def why_not_llava(config: ModelConfig, built: Assembled) -> str | None:
    """The reason why a model cannot be written in the LLaVA layout; None when it can."""
    model, vision = built.model, built.model.vision
    if vision is None or config.vision is None:
        return "it has no vision encoder"
    if model.value_head is not None:
        return "it has a value head"
    if config.vision.fuse_with:
        return f"it has {len(config.vision.encoders)} encoders"
    reason = VISION_BACKENDS[config.vision.backend].why_not_llava(config.vision, vision)
    if reason is not None:
        return reason
    if built.image_spec is not None and built.image_spec.reads_size:
        return "its images take tokens by their size"
    reason = config.projector.why_not_llava()
    if reason is not None:
        return reason
    if getattr(model.llm.get_output_embeddings(), "bias", None) is not None:
        return "its language model's head has a bias, which transformers' LLaVA class leaves out"
    scaled = head_settings(model.llm.config)  # which that class leaves out
    return f"its language model's head is scaled ({scaled[0]})" if scaled else None


class NotLlavaError(Exception):
    """transformers' LLaVA class computes something else with these parts. Says what."""


def write_llava(
    folder: Path,
    config: ModelConfig,
    built: Assembled,
    tokens: ConversationTokenizer,
    expected: Answers,
    max_shard_size: str,
) -> tuple[ModelConfig, ImageSpec, Assembled, list[str]]:
    """Write weights, config, generation config, tokenizer and processor.

    Args:
        built: merged, on the CPU, in the dtype to write; it is changed.
        expected: what it answers.

    Returns:
        how the folder reads itself (paths relative to it), what images look like, the model with the weights that
        were written, and notes for the model card.

    Raises:
        NotLlavaError: before anything is written.
    """
    vision, spec = built.model.vision, built.image_spec
    assert vision is not None
    assert config.vision is not None
    assert spec is not None
    dtype = built.model.llm.dtype
    vision.float()  # so that what is folded in is rounded once, at the end
    notes = ["Adapters are merged into the language model."] if config.lora is not None else []
    _bake_position_embeddings(vision)
    if spec.resize == "pad" and _padding_of(spec.mean) != spec.background:
        spec = _fold_background(vision, spec)
        notes.append(
            f"Images are padded with {spec.background}. The processor normalises with that colour as the mean, and "
            "the vision tower's embeddings make up for it: do not swap tower or processor for the original ones."
        )
    if config.projector.normalize:
        _fold_statistics(built.model.projector)
        notes.append("The projector's channel statistics are folded into its first layer.")
    built = replace(built, image_spec=spec)
    model = _build_asked(built, config.vision.keep_class_token, tokens, expected)
    for module in (model, built.model):
        cast_weights(module, dtype)
    model.generation_config = generation_config(built, tokens)
    settings: Any = model.config
    settings.eos_token_id = settings.text_config.eos_token_id = sorted(tokens.stop_ids)
    weights = llava_adapter(model.config, built.model.llm).from_ours(built.model.state_dict())
    model.save_pretrained(folder, max_shard_size=max_shard_size, state_dict=dict(weights))
    _processor(built, model.config, spec, tokens).save_pretrained(folder)
    changes = {
        "vision": config.vision.model_copy(update={"path": ".", "layer": vision.trunk.layer, "image_size": None}),
        "projector": config.projector.model_copy(update={"normalize": False}),
        "llm": config.llm.model_copy(update={"path": ".", "pad_vocab_to_multiple_of": None}),
        "lora": None,
        "trainable": ("projector",),
    }
    config = config.model_copy(update=changes)
    written = wrap_llava(model, config, built.model.llm, vision, built.tokenizer)
    return config, spec, replace(written, image_spec=spec), notes


def _build_asked(
    built: Assembled, keep_class_token: bool, tokens: ConversationTokenizer, expected: Answers
) -> LlavaForConditionalGeneration:
    """transformers' class, once it has answered as the trained model does. Raises NotLlavaError."""
    try:
        model = _build_llava(built, keep_class_token)
        with in_float32(built.model.llm, model):
            logits = llava_logits(model, make_question(built, tokens), expected.reply)
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        raise NotLlavaError(f"{type(error).__name__}: {str(error)[:200]}") from error
    if lines := compare(expected.logits, logits, "the logits"):
        raise NotLlavaError(lines[0])
    return model


def _build_llava(built: Assembled, keep_class_token: bool) -> LlavaForConditionalGeneration:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    llm, vision, projector = built.model.llm, built.model.vision, built.model.projector
    assert vision is not None
    assert projector is not None
    assert built.image_token_id is not None
    rows = llm.get_input_embeddings().weight.shape[0]
    if built.image_token_id >= rows:
        pad_vocabulary(llm, rows, built.image_token_id + 1)
    trunk: Any = vision.trunk
    tower = trunk.model
    tower.config.num_hidden_layers = len(trunk.blocks)  # those behind the chosen one are cut off
    _drop_pooling_head(tower)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=llm.config,
        image_token_index=built.image_token_id,
        image_seq_length=vision.num_patches,
        projector_hidden_act="linear" if len(_linears(projector)) == 1 else "gelu",
        vision_feature_select_strategy="full" if keep_class_token or not _has_class_token(tower) else "default",
        vision_feature_layer=trunk.layer if isinstance(trunk.layer, int) else list(trunk.layer),
        tie_word_embeddings=llm.config.tie_word_embeddings,
        dtype=llm.dtype,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = llm.get_decoder()
    model.lm_head = llm.get_output_embeddings()
    weights = llava_projector(config).from_ours({f"projector.{n}": t for n, t in projector.state_dict().items()})
    model.model.multi_modal_projector.to_empty(device="cpu").float()
    model.load_state_dict(dict(weights), strict=False)
    return model.eval()


def _drop_pooling_head(tower: Any) -> None:
    """SigLIP's pooling head, which LLaVA does not use and some versions of vLLM put before the projector."""
    if getattr(tower, "use_head", False):
        tower.config.vision_use_head = tower.use_head = False
        del tower.head


@torch.no_grad()
def _fold_statistics(projector: Projector | None) -> None:
    """Into the first layer."""
    first = _linears(projector)[0]
    assert projector is not None
    weight = first.weight.double() / projector.feature_std.double()
    first.bias.copy_(first.bias.double() - weight @ projector.feature_mean.double())
    first.weight.copy_(weight)
    projector.feature_mean.zero_()
    projector.feature_std.fill_(1)


@torch.no_grad()
def _bake_position_embeddings(vision: VisionEncoder) -> None:
    """Interpolate the position embeddings to the size that the encoder is used at."""
    trunk: Any = vision.trunk
    if not trunk.arguments:
        return
    embeddings, config, size = trunk.model.embeddings, trunk.model.config, vision.image_size
    grid = size // config.patch_size
    num_positions = grid * grid + int(_has_class_token(trunk.model))
    table = embeddings.position_embedding
    tokens = table.weight.new_zeros(1, num_positions, table.embedding_dim)
    baked = embeddings.interpolate_pos_encoding(tokens, size, size)
    embeddings.position_embedding = nn.Embedding.from_pretrained(baked[0].clone())
    embeddings.position_ids = torch.arange(num_positions).expand(1, -1)
    embeddings.image_size, embeddings.num_patches, embeddings.num_positions = size, grid * grid, num_positions
    config.image_size = size
    trunk.arguments = {}


@torch.no_grad()
def _fold_background(vision: VisionEncoder, spec: ImageSpec) -> ImageSpec:
    """Normalise with the background as the mean, and let the embeddings make up for the difference."""
    red, green, blue = ((value + 0.5) / 255 for value in spec.background)
    mean = (red, green, blue)
    assert _padding_of(mean) == spec.background
    shift = [(new - old) / std for new, old, std in zip(mean, spec.mean, spec.std, strict=True)]  # per channel of x
    trunk: Any = vision.trunk
    embeddings = trunk.model.embeddings
    kernel = embeddings.patch_embedding.weight  # [C, 3, p, p]
    constant = torch.einsum("cdhw,d->c", kernel.double(), torch.tensor(shift, dtype=torch.float64))
    if embeddings.patch_embedding.bias is not None:
        _add(embeddings.patch_embedding.bias, constant)
    else:
        _add(embeddings.position_embedding.weight[int(_has_class_token(trunk.model)) :], constant)
    return replace(spec, mean=mean)


def _add(target: Tensor, values: Tensor) -> None:
    """Add float64 [...] to a parameter of the same shape, in place, rounded once."""
    target.copy_(target.double() + values)


def _processor(built: Assembled, config: Any, spec: ImageSpec, tokens: ConversationTokenizer) -> Any:
    from transformers import LlavaProcessor

    assert built.model.vision is not None
    tokenizer = built.tokenizer
    hand_over(tokenizer, tokens)
    return LlavaProcessor(
        image_processor=_image_processor(spec),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(_has_class_token(built.model.vision.trunk.model)),
        image_token=IMAGE_TOKEN,
        chat_template=tokenizer.chat_template,
    )


def write_preprocessor(folder: Path, spec: ImageSpec) -> None:
    """preprocessor_config.json, where other programs and transformers 4 look for what images have to look like."""
    _image_processor(spec).save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["image_processor_type"] = "LlavaImageProcessor"  # without the ending that says how it computes
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _image_processor(spec: ImageSpec) -> Any:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    square = {"height": spec.size, "width": spec.size}
    return LlavaImageProcessorPil(
        do_pad=spec.resize == "pad",
        size={"shortest_edge": spec.size} if spec.resize == "crop" else square,
        do_center_crop=spec.resize == "crop",
        crop_size=square,
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )


def generation_config(built: Assembled, tokens: ConversationTokenizer) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=built.tokenizer.bos_token_id,
        eos_token_id=sorted(tokens.stop_ids),
        pad_token_id=tokens.pad_token_id,
        do_sample=False,
    )


def _has_class_token(tower: Any) -> bool:
    return hasattr(tower.embeddings, "class_embedding")


def _linears(projector: Projector | None) -> list[nn.Linear]:
    assert projector is not None
    return [layer for layer in projector.layers if isinstance(layer, nn.Linear)]


def _padding_of(mean: tuple[float, float, float]) -> tuple[int, ...]:
    """The colour that transformers pads with."""
    return tuple(math.floor(value * 255) for value in mean)
