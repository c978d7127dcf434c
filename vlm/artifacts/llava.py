"""transformers' LLaVA layout, of our full exports and of other people's folders: its names and tensors as our parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm.artifacts.manifest import NAME, Manifest, read_manifest
from vlm.batch import ImageSpec
from vlm.compat import prepare
from vlm.errors import CheckpointError
from vlm.models.config import LLMConfig, ModelConfig, VisionConfig
from vlm.models.projector_kinds import PROJECTORS
from vlm.models.tokenizer_files import read_json
from vlm.models.weight_adapter import Rule, WeightAdapter, also, drop, rename
from vlm.models.weight_files import LazyTensors, WeightFiles

if TYPE_CHECKING:
    from transformers import LlavaConfig, PreTrainedModel

LLAVA = "llava"  # the layout in vlm.json, and the model type in config.json
TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}  # encoders known here -> have they a class token
_UNFOLDED = (
    "A full export has the statistics of its projector and the colour of its padding folded into weights: take the one "
    "that `vlm export RUN` writes without --full"
)
_ACTIVATIONS = {"linear": "linear", "gelu": "mlp"}  # between LLaVA's two layers -> kind of projector
_COMPUTED = ("{*outer}.rotary_emb.inv_freq", "{*outer}.embeddings.position_ids")  # tables that older folders hold
POOLING_HEAD = "vision.trunk.model.head."  # SigLIP's, which no feature depends on; full exports leave it out


def llava_adapter(config: LlavaConfig, llm: nn.Module) -> WeightAdapter:
    """Ours <-> `LlavaForConditionalGeneration`.

    Theirs are the names in its class, of which its `save_pretrained` makes those in files. Both are read, and the
    vision tower with the level `vision_model`, which transformers' towers had until 5.5, and without. It is written
    with it: vLLM and older versions of SGLang know no other.

    Args:
        llm: the language model inside; its tensors may be on the meta device.
    """
    decoder, head = _name_in(llm, llm.get_decoder()), _name_in(llm, llm.get_output_embeddings())  # type: ignore[operator]
    names = {  # ours: theirs in the class, then in files
        head: ("lm_head.", "language_model.lm_head."),
        decoder: ("model.language_model.", "language_model.model."),
        "vision.trunk.model.": (
            "model.vision_tower.vision_model.", "model.vision_tower.", "vision_tower.vision_model.", "vision_tower.",
        ),
    }  # fmt: skip
    rules = [
        (also if number else rename)(f"{ours}{{*rest}}", f"{prefix}{{*rest}}")
        for ours, theirs in names.items()
        for number, prefix in enumerate(theirs)
    ]
    projector = llava_projector(config).rules
    return WeightAdapter("transformers' LLaVA layout", (*_unread(config), *projector, *rules))


def llava_projector(config: LlavaConfig) -> WeightAdapter:
    """The projector's share of `llava_adapter`. A linear one is two layers there, the second the identity."""
    rules = []
    for prefix in ("model.multi_modal_projector.", "multi_modal_projector."):
        first, second = f"{prefix}linear_1.", f"{prefix}linear_2."
        if _kind(config) == "mlp":
            pairs = [rename("projector.layers.0.{leaf}", first + "{leaf}")]
            pairs += [rename("projector.layers.2.{leaf}", second + "{leaf}")]
        else:
            pairs = [
                Rule((f"projector.layers.0.{leaf}",), (first + leaf, second + leaf), _without_identity, _with_identity)
                for leaf in ("weight", "bias")
            ]
        rules.append(pairs)
    return WeightAdapter("transformers' LLaVA projector", (*rules[0], *(_read_only(rule) for rule in rules[1])))


def read_start(folder: Path) -> Manifest:
    """What an export is, or another program's folder in transformers' LLaVA layout, which has no vlm.json.

    Raises:
        CheckpointError: it is neither; or a LLaVA that our parts cannot express.
    """
    if (folder / NAME).is_file() or read_json(folder / "config.json").get("model_type") != LLAVA:
        return read_manifest(folder)
    return manifest_of(folder, read_llava_config(folder))


def manifest_of(folder: Path, config: Any) -> Manifest:
    """What a folder in transformers' LLaVA layout is, by its config.json.

    Raises:
        CheckpointError: our parts cannot express it.
    """
    if reason := _why_not_ours(config):
        raise CheckpointError(f"{folder}: {reason}, which our parts cannot express")
    spec = _image_spec(folder, config)
    resize: Any = spec.resize
    keeps_class = TOWERS[_tower(config)] and config.vision_feature_select_strategy == "full"
    taken = _taken_blocks(config)
    model = ModelConfig(
        vision=VisionConfig(
            backend="hf",
            path=".",
            keep_class_token=keeps_class,
            layer=taken if len(taken) > 1 else taken[0],
            resize=resize,
            background=spec.background,
        ),
        projector=PROJECTORS[_kind(config)].model_validate({}),
        llm=LLMConfig(path="."),
    )
    included = ("projector", "llm", "vision")
    return Manifest(model, "tokenizer", None, spec, included, (), layout=LLAVA, full=True)


def open_llava(folder: Path, manifest: Manifest, model: ModelConfig) -> LazyTensors:
    """Tensors of a folder by canonical name.

    Blocks of the encoder after the one whose output LLaVA takes are left out, and rows of embedding and head beyond
    those that the base model has: they are of the image placeholder, which is never looked up.

    Raises:
        CheckpointError: a tensor is none of LLaVA's. It and all others that are none are listed.
    """
    config = read_llava_config(folder)
    llm = llm_shape(config.text_config)
    tensors = llava_adapter(config, llm).to_ours(WeightFiles(str(folder), "the folder"))
    tensors.refuse_unread(str(folder))
    ends = [_name_in(llm, module) for module in (llm.get_input_embeddings(), llm.get_output_embeddings())]
    rows = _num_rows(model.llm)
    same = [Rule((name,), (name,), _first(rows), None) for end in ends for name in tensors if name.startswith(end)]
    return WeightAdapter("LLaVA's vocabulary", (*same, rename("{*name}", "{*name}"))).to_ours(tensors)


def refuse_other_llava(
    where: str, manifest: Manifest, model: ModelConfig, mean: Sequence[float], std: Sequence[float]
) -> None:
    """What no shape shows: how images get to LLaVA's encoder, and what its projector reads of it.

    Args:
        mean, std: per RGB channel, with which this model's encoder normalises.

    Raises:
        CheckpointError: this model would compute something else with the folder's weights.
    """
    before, spec = manifest.model.vision, manifest.image_spec
    assert before is not None
    assert spec is not None
    if model.vision is None:
        return
    if model.vision.keep_class_token != before.keep_class_token:
        raise CheckpointError(f"{where}: set model.vision.keep_class_token to {str(before.keep_class_token).lower()}")
    taken, now = _from_last(before.layers), _from_last(model.vision.layers)
    if len(taken) > 1 and min(model.vision.layers) < 0 <= max(model.vision.layers):
        raise CheckpointError(f"{where}: write all of model.vision.layer from the encoder's end, or all from its start")
    if taken != now and max(len(taken), len(now)) > 1:
        raise CheckpointError(
            f"{where}: its projector reads blocks {list(before.layers)} of the encoder, counted from 0, in this order, "
            f"and model.vision.layer is {list(model.vision.layers)}"
        )
    if model.projector.patches_per_token > 1 or model.projector.normalize:
        raise CheckpointError(
            f"{where}: LLaVA's projector neither pools nor standardises: remove model.projector.pool, unshuffle and "
            f"normalize. {_UNFOLDED}"
        )
    if reason := model.projector.why_not_llava():
        raise CheckpointError(f"{where}: LLaVA's projector is one or two linear layers, and of this config {reason}")
    pairs = zip((*spec.mean, *spec.std), (*mean, *std), strict=True)
    if any(abs(one - other) > 1e-4 for one, other in pairs):
        raise CheckpointError(
            f"{where}: its encoder wants images normalised with mean {_short(spec.mean)} and std {_short(spec.std)}, "
            f"the one of model.vision.path with {_short(mean)} and {_short(std)}. Usually the encoder is another one. "
            f"{_UNFOLDED}"
        )


def llm_shape(text_config: Any) -> PreTrainedModel:
    """The causal language model inside LLaVA, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        llm: PreTrainedModel = AutoModelForCausalLM.from_config(text_config)
    return llm


def read_llava_config(folder: Path) -> Any:
    """config.json of a LLaVA, 1.5 or NeXT."""
    prepare()
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: cannot read its config.json ({str(error)[:200]})") from None


def _why_not_ours(config: Any) -> str | None:
    if _tower(config) not in TOWERS:
        return f"its encoder is a {_tower(config)}, neither {' nor '.join(TOWERS)}"
    if min(_taken_blocks(config)) < 0:
        return f"it reads the embeddings of its encoder, before any block (vision_feature_layer {_layers(config)})"
    if config.vision_feature_select_strategy == "default" and not TOWERS[_tower(config)]:
        return "it drops the first patch of its encoder, which has no class token"
    if _kind(config) is None:
        return f"between its projector's layers is {config.projector_hidden_act}, neither {' nor '.join(_ACTIVATIONS)}"
    return None if config.multimodal_projector_bias else "its projector has no bias"


def _tower(config: Any) -> str:
    return str(config.vision_config.model_type)


def _kind(config: LlavaConfig) -> Any:
    return _ACTIVATIONS.get(str(config.projector_hidden_act))


def _image_spec(folder: Path, config: Any) -> ImageSpec:
    from transformers import ImageProcessingMixin

    try:
        settings: Mapping[str, Any] = ImageProcessingMixin.get_image_processor_dict(folder)[0]
        mean, std = tuple(settings["image_mean"]), tuple(settings["image_std"])
    except (OSError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: nothing says how its images are normalised ({str(error)[:100]}). Usually "
            "preprocessor_config.json was not downloaded"
        ) from None
    size = config.vision_config.image_size
    resize = "pad" if settings.get("do_pad") else "crop" if settings.get("do_center_crop", True) else "squash"
    red, green, blue = (int(255 * value) for value in mean)  # which transformers pads with
    return ImageSpec(size, mean, std, num_tokens=config.image_seq_length, resize=resize, background=(red, green, blue))


def _unread(config: Any) -> list[Rule]:
    """What files hold and no forward here reads."""
    numbers = range(_kept_blocks(config), config.vision_config.num_hidden_layers)
    patterns = chain(_COMPUTED, (f"{{*outer}}.encoder.layers.{number}.{{*rest}}" for number in numbers))
    return [drop(pattern) for pattern in patterns]


def _kept_blocks(config: Any) -> int:
    """Blocks of the encoder up to the last one whose output is taken."""
    return max(_taken_blocks(config)) + 1


def _taken_blocks(config: Any) -> tuple[int, ...]:
    """Blocks of the encoder, from 0, whose outputs are taken, in the order in which they are joined by channel."""
    blocks = config.vision_config.num_hidden_layers
    # transformers' layer 0 is the embeddings
    return tuple(each - 1 if each >= 0 else blocks + each for each in _layers(config))


def _layers(config: Any) -> list[int]:
    layer = config.vision_feature_layer
    return [layer] if isinstance(layer, int) else list(layer)


def _num_rows(config: LLMConfig) -> int:
    """Of the embedding that the config's language model has."""
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(config.path).get_text_config(decoder=True)
    multiple = config.pad_vocab_to_multiple_of or 1
    return int(-(-settings.vocab_size // multiple) * multiple)


def _name_in(llm: nn.Module, module: Any) -> str:
    """The beginning of a module's canonical names."""
    name = next(name for name, found in llm.named_modules() if found is module)
    return f"llm.{name}." if name else "llm."


def _first(rows: int) -> Any:
    return lambda tensors: [tensors[0][:rows]]


def _without_identity(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    first, second = tensors
    if not second.is_meta and not second.equal(_identity_of(first)):
        raise ValueError("linear_2 is not the identity, although no activation is between the two")
    return [first]


def _with_identity(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    (only,) = tensors
    return [only, _identity_of(only)]


def _identity_of(first: Tensor) -> Tensor:
    """Weight or bias of the second layer, after a first one that has `first`."""
    if first.ndim == 1:
        return torch.zeros_like(first)
    return torch.eye(len(first), dtype=first.dtype, device=first.device)


def _read_only(rule: Rule) -> Rule:
    return Rule(rule.ours, rule.theirs, rule.to_ours, None)


def _from_last(layers: Sequence[int]) -> list[int]:
    """Distances from the last block that is taken, which is the same one where every tensor fits."""
    return [layer - max(layers) for layer in layers]


def _short(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in values) + ")"
