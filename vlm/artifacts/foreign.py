"""Folders that other programs' VLM trainings leave: which layout it is, its tensors by our names, its parts' settings.

Nothing of a folder is run, and pickles are read as plain tensors or refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from vlm.artifacts.llava import LLAVA, llava_adapter, llm_shape, manifest_of, read_llava_config
from vlm.artifacts.peft_adapter import PeftAdapter, is_peft, read_peft, read_plain
from vlm.errors import CheckpointError
from vlm.models.config import LoRAConfig
from vlm.models.lora import MAGNITUDE, SAVED
from vlm.models.projector_kinds import LinearProjectorConfig, MLPProjectorConfig, ProjectorConfig
from vlm.models.tokenizer_files import read_json
from vlm.models.weight_adapter import WeightAdapter, also, drop, rename
from vlm.models.weight_files import LazyTensors, WeightFiles, joined

Resize = Literal["pad", "crop", "squash"]
NEXT = "llava_next"
_CLIP_MEAN_COLOUR = (122, 116, 104)  # of CLIP's image_mean, with which these programs pad
_TOWER = "vision.trunk.model."
_CANONICAL_LEAF = {"lora_magnitude_vector": MAGNITUDE}
_BLOCK = re.compile(r"vision\.trunk\.model\.encoder\.layers\.(\d+)\.")
_ASPECTS: dict[str, Resize] = {"pad": "pad", "square": "crop"}  # LLaVA's image_aspect_ratio; others: one squashed tile
_STRATEGIES: dict[str, Resize] = {"letterbox": "pad", "resize-naive": "squash", "resize-crop": "crop"}  # prismatic's
_PRISMATIC_LLMS = {
    "vicuna-v15-7b": "lmsys/vicuna-7b-v1.5", "vicuna-v15-13b": "lmsys/vicuna-13b-v1.5",
    "llama2-7b-pure": "meta-llama/Llama-2-7b-hf", "llama2-13b-pure": "meta-llama/Llama-2-13b-hf",
    "llama2-7b-chat": "meta-llama/Llama-2-7b-chat-hf", "llama2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
    "mistral-v0.1-7b-pure": "mistralai/Mistral-7B-v0.1", "phi-2-3b": "microsoft/phi-2",
}  # fmt: skip
_PRISMATIC_ENCODERS = {  # of timm; all take the output of the last block but one
    "clip-vit-l": "vit_large_patch14_clip_224.openai", "clip-vit-l-336px": "vit_large_patch14_clip_336.openai",
    "siglip-vit-so400m": "vit_so400m_patch14_siglip_224", "siglip-vit-so400m-384px": "vit_so400m_patch14_siglip_384",
    "siglip-vit-b16-224px": "vit_base_patch16_siglip_224", "dinov2-vit-l": "vit_large_patch14_reg4_dinov2.lvd142m",
    "in1k-vit-l": "vit_large_patch16_224.augreg_in21k_ft_in1k",
}  # fmt: skip


@dataclass(frozen=True)
class Foreign:
    """What `read_foreign` found.

    Attributes:
        layout: for people: "official LLaVA, LoRA".
        tensors: by canonical name: `projector.*`; `llm.*` and `vision.*` where the folder has weights of its own.
        projector: its section of the config.
        llm, vision: name or folder of the base models, as the other program named them; "" where it did not.
        layer: of the encoder, counted from its end; one of several is then its last.
        backend: the library of the encoder.
        text_config, vision_config: shapes of the parts that lie in the folder whole, as config.json has them.
        adapter, vision_adapter: LoRA of the language model and of the encoder, which is merged.
        normalisation: mean and std of the encoder's images; None is as its folder or type says.
        template: that it was trained with, as far as the folder says.
        notes: what is not taken over as it was.
    """

    layout: str
    tensors: LazyTensors
    projector: ProjectorConfig
    llm: str = ""
    vision: str = ""
    layer: int | tuple[int, ...] = -2
    keep_class_token: bool = False
    resize: Resize = "pad"
    background: tuple[int, int, int] = _CLIP_MEAN_COLOUR
    backend: Literal["hf", "timm"] = "hf"
    text_config: Mapping[str, Any] | None = None
    vision_config: Mapping[str, Any] | None = None
    adapter: PeftAdapter | None = None
    vision_adapter: PeftAdapter | None = None
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None
    template: str = "vicuna"
    notes: Sequence[str] = field(default=())


def read_foreign(folder: Path) -> Foreign:
    """
    Raises:
        CheckpointError: none of the layouts of `FOREIGN`, or one with parts that ours cannot express.
    """
    settings = read_json(folder / "config.json")
    for knows, read in FOREIGN.values():
        if knows(folder, settings):
            return read(folder, settings)
    raise CheckpointError(
        f"{folder} is in none of the layouts that are read: {', '.join(FOREIGN)}. Usually a folder above or below it "
        "is meant: the one that holds config.json, or XTuner's with the folder projector in it"
    )


def lora_config(adapter: PeftAdapter) -> LoRAConfig:
    """The section `model.lora` under which an adapter goes on training.

    Raises:
        CheckpointError: ours is another kind of LoRA.
    """
    ranks = {adapter.rank(module) for module in adapter.layers}
    alphas = {adapter.alpha(module) for module in adapter.layers}
    special = [key for key in ("lora_bias",) if adapter.settings.get(key)]
    leaves = {leaf for tensors in adapter.layers.values() for leaf in tensors}
    leaves -= {"lora_A.weight", "lora_B.weight", *_CANONICAL_LEAF}
    if len(ranks) != 1 or len(alphas) != 1 or special or leaves or not float(min(alphas, default=1)).is_integer():
        what = ", ".join(special) or "ranks or scales that differ, or are no whole numbers"
        raise CheckpointError(
            f"{adapter.folder}: an adapter with {what} cannot go on training here. Merge it first (vlm merge BASE "
            f"{adapter.folder} OUT), and import the folder without adapter_config.json, with --llm OUT"
        )
    return LoRAConfig(
        rank=ranks.pop(), alpha=int(alphas.pop()), dropout=float(adapter.settings.get("lora_dropout") or 0),
        targets=tuple(sorted({module.rpartition(".")[2] for module in adapter.layers})),
        rslora=bool(adapter.settings.get("use_rslora")), dora=bool(adapter.settings.get("use_dora")),
        modules_to_save=tuple(sorted({_in_llm(name).rpartition(".")[0] for name in adapter.replaced})),
    )  # fmt: skip


def adapter_tensors(adapter: PeftAdapter) -> dict[str, Tensor]:
    """Canonical name -> [rank, in] or [out, rank], lengths [out] of DoRA, and weights [...] of saved modules; float32,
    as they train here."""
    tensors = {
        f"llm.lora.{_in_llm(module)}.{_CANONICAL_LEAF.get(leaf, leaf)}": tensor.float()
        for module, found in adapter.layers.items()
        for leaf, tensor in found.items()
    }
    for name, tensor in adapter.replaced.items():
        module, _, leaf = _in_llm(name).rpartition(".")
        tensors[f"llm.lora.{module}{SAVED}{leaf}"] = tensor.float()
    return tensors


def _in_llm(name: str) -> str:
    return name.removeprefix("language_model.")


def _llava_hf(folder: Path, settings: Mapping[str, Any]) -> Foreign:
    config = read_llava_config(folder)
    manifest = manifest_of(folder, config)
    vision, spec = manifest.model.vision, manifest.image_spec
    assert vision is not None
    assert spec is not None
    files: LazyTensors = WeightFiles(str(folder), "the folder")
    files = files.only(name for name in files if not name.endswith("image_newline"))
    llm = llm_shape(config.text_config)
    tensors = llava_adapter(config, llm).to_ours(files)
    tensors.refuse_unread(str(folder))
    blocks = max(vision.layers) + 1
    layers = tuple(layer - blocks for layer in vision.layers)
    notes = ["an image is one tile here: image_newline and the tiles of LLaVA-NeXT are left out"]
    is_next = settings["model_type"] == NEXT
    return Foreign(
        "LLaVA of transformers" + ", NeXT" * is_next, tensors, manifest.model.projector,
        layer=layers if len(layers) > 1 else -1, keep_class_token=vision.keep_class_token,
        resize="squash" if is_next else vision.resize, background=vision.background,
        text_config={**config.text_config.to_dict(), "architectures": [type(llm).__name__]},
        vision_config={**config.vision_config.to_dict(), "num_hidden_layers": blocks},
        notes=notes if is_next else (), normalisation=(spec.mean, spec.std),
    )  # fmt: skip


def _llava_official(folder: Path, settings: Mapping[str, Any]) -> Foreign:
    """github.com/haotian-liu/LLaVA: the projector alone, LoRA with its non_lora_trainables.bin, or all of a model."""
    adapter = read_peft(folder) if is_peft(folder) else None
    separate = [folder / name for name in ("mm_projector.bin", "non_lora_trainables.bin") if (folder / name).is_file()]
    theirs = joined(*map(read_plain, separate)) if separate else _all_weights(folder)
    kind = str(settings.get("mm_projector_type", "linear"))
    prefixes = ("model.mm_projector.", "base_model.model.model.mm_projector.", "mm_projector.")
    rules = _projector_rules(kind, prefixes, folder)
    rules += [drop("{*outer}.rotary_emb.inv_freq"), drop("{*outer}.image_newline")]
    if not separate:
        rules += [also(f"{_TOWER}{{*rest}}", "model.vision_tower.vision_tower.vision_model.{*rest}")]
        rules += [rename("llm.{*rest}", "{*rest}")]
    found = WeightAdapter("official LLaVA's layout", tuple(rules)).to_ours(theirs)
    found.refuse_unread(str(folder))
    kept = (
        _kept_of_encoder(found, settings, folder) if settings.get("unfreeze_mm_vision_tower") else set()
    )  # else it was frozen
    tensors = found.only(name for name in found if name in kept or not name.startswith("vision."))
    what = ", LoRA" if adapter else ", projector" if separate else ""
    aspect = str(settings.get("image_aspect_ratio", "square"))
    notes = [f"an image is one squashed tile here, not {aspect}"] if aspect not in _ASPECTS else []
    base = (adapter.settings.get("base_model_name_or_path") if adapter else None) or settings.get("_name_or_path", "")
    return Foreign(
        f"official LLaVA{what}", tensors, _projector_config(kind, folder), llm=str(base),
        vision=str(settings.get("mm_vision_tower") or ""), layer=_layer(settings, "mm_vision_select_layer", folder),
        keep_class_token=settings.get("mm_vision_select_feature") == "cls_patch", resize=_ASPECTS.get(aspect, "squash"),
        text_config=None if separate else _text_of(settings), adapter=adapter, notes=notes,
        template="plain" if separate and not adapter else "vicuna",
    )  # fmt: skip


def _kept_of_encoder(tensors: LazyTensors, settings: Mapping[str, Any], folder: Path) -> set[str]:
    """Names of the tensors [...] of a trained encoder, without blocks after the one whose output is taken."""
    blocks = {name: int(found[1]) for name in tensors if (found := _BLOCK.match(name))}
    layer = _layer(settings, "mm_vision_select_layer", folder)
    last = max(blocks.values(), default=0) + 1 + (layer if isinstance(layer, int) else max(layer))
    return {name for name in tensors if name.startswith(_TOWER) and blocks.get(name, 0) <= last}


def _tiny_llava(folder: Path, settings: Mapping[str, Any]) -> Foreign:
    """TinyLLaVA Factory: one set of files, or a folder for each part."""
    parts = {
        part: folder / part for part in ("language_model", "vision_tower", "connector") if (folder / part).is_dir()
    }
    groups = [
        _prefixed(_all_weights(place), f"{part}.") for part, place in parts.items() if part != "language_model" or
        not is_peft(folder)
    ]  # fmt: skip
    theirs = joined(*groups) if groups else _all_weights(folder)
    kind = str(settings.get("connector_type", "mlp2x_gelu"))
    rules = _projector_rules(kind, ("connector._connector.", "connector."), folder)
    rules += [drop("{*outer}.rotary_emb.inv_freq"), drop("{*outer}.embeddings.position_ids")]
    for prefix in (
        "vision_tower._vision_tower.vision_model.",
        "vision_tower.vision_model.",
        "vision_tower._vision_tower.",
    ):
        rules.append(also(f"{_TOWER}{{*rest}}", f"{prefix}{{*rest}}"))
    rules += [rename("llm.{*rest}", "language_model.{*rest}")]
    found = WeightAdapter("TinyLLaVA's layout", tuple(rules)).to_ours(theirs)
    found.refuse_unread(str(folder))
    names = list(found)
    has_llm = any(name.startswith("llm.") for name in names)
    vision = settings.get("vision_config") if any(name.startswith(_TOWER) for name in names) else None
    layer = _layer(settings, "vision_feature_layer", folder)
    tensors = found.only(name for name in names if vision is not None or not name.startswith(_TOWER))
    return Foreign(
        "TinyLLaVA", tensors, _projector_config(kind, folder), llm=str(settings.get("llm_model_name_or_path") or ""),
        vision=str(settings.get("vision_model_name_or_path") or ""), layer=layer,
        keep_class_token=settings.get("vision_feature_select_strategy") == "cls_patch",
        resize=_ASPECTS.get(str(settings.get("image_aspect_ratio", "square")), "squash"),
        text_config=settings.get("text_config") if has_llm else None, vision_config=vision,
        adapter=read_peft(folder) if is_peft(folder) else None,
    )  # fmt: skip


def _prismatic(folder: Path, settings: Mapping[str, Any]) -> Foreign:
    model = settings["model"]
    encoder, llm = str(model["vision_backbone_id"]), str(model["llm_backbone_id"])
    if encoder not in _PRISMATIC_ENCODERS:
        raise CheckpointError(
            f"{folder}: its encoder {encoder} is none of {', '.join(_PRISMATIC_ENCODERS)}, which are single networks"
        )
    files = sorted((folder / "checkpoints").glob("*.pt"))
    file = folder / "checkpoints/latest-checkpoint.pt"
    file = file if file.is_file() else files[-1] if files else file
    specifier = str(model.get("arch_specifier", "gelu-mlp"))
    kind = "linear" if specifier.endswith("linear") else "mlp2x_gelu"
    rules = [
        *_projector_rules(kind, ("projector.projector.",), folder),
        rename("llm.{*rest}", "llm_backbone.llm.{*rest}"),
    ]
    rules.append(drop("vision_backbone.{*rest}"))
    tensors = WeightAdapter("prismatic's layout", tuple(rules)).to_ours(_nested(file))
    tensors.refuse_unread(str(file))
    strategy = str(model.get("image_resize_strategy", "letterbox"))
    return Foreign(
        "prismatic", tensors, _projector_config(kind, folder), llm=_PRISMATIC_LLMS.get(llm, ""),
        vision=_PRISMATIC_ENCODERS[encoder], backend="timm", resize=_STRATEGIES.get(strategy, "squash"),
    )  # fmt: skip


def _xtuner(folder: Path, settings: Mapping[str, Any]) -> Foreign:
    """`xtuner convert pth_to_hf`: projector, and llm or llm_adapter, visual_encoder or visual_encoder_adapter."""
    projector = read_json(folder / "projector/config.json")
    depth = int(projector.get("depth", 2))
    kind = "linear" if depth == 1 else f"mlp{depth}x_gelu"
    rules = _projector_rules(kind, ("model.",), folder)
    if depth == 1:
        rules = [rename("projector.layers.0.{leaf}", "model.0.{leaf}")]
    tensors = WeightAdapter("XTuner's projector", tuple(rules)).to_ours(_all_weights(folder / "projector"))
    tensors.refuse_unread(str(folder / "projector"))
    adapters = {
        part: read_peft(folder / f"{part}_adapter") if is_peft(folder / f"{part}_adapter") else None
        for part in ("llm", "visual_encoder")
    }
    bases = {
        part: str(folder / part) if (folder / part).is_dir()
        else str(adapter.settings.get("base_model_name_or_path") or "") if adapter else ""
        for part, adapter in adapters.items()
    }  # fmt: skip
    return Foreign(
        "XTuner", tensors, _projector_config(kind, folder), llm=bases["llm"], vision=bases["visual_encoder"],
        adapter=adapters["llm"], vision_adapter=adapters["visual_encoder"], template="tokenizer",
    )  # fmt: skip


# name -> (is it this layout, by folder and config.json; its reader). The first that fits counts
FOREIGN: dict[str, tuple[Callable[[Path, Mapping[str, Any]], bool], Callable[[Path, Mapping[str, Any]], Foreign]]] = {
    "official LLaVA": (
        lambda _, settings: "mm_projector_type" in settings or "mm_vision_tower" in settings,
        _llava_official,
    ),
    "LLaVA of transformers": (lambda _, settings: settings.get("model_type") in (LLAVA, NEXT), _llava_hf),
    "TinyLLaVA": (lambda _, settings: "connector_type" in settings, _tiny_llava),
    "prismatic": (lambda _, settings: "vision_backbone_id" in (settings.get("model") or {}), _prismatic),
    "XTuner": (lambda folder, _: (folder / "projector").is_dir(), _xtuner),
}


def _layer(settings: Mapping[str, Any], key: str, folder: Path) -> int | tuple[int, ...]:
    """One layer, or several whose features lie beside each other, as in LLaVA of transformers."""
    value = settings.get(key, -2)
    layers = value if isinstance(value, list) else [value]
    if not layers or not all(isinstance(layer, int) and layer < 0 for layer in layers):
        raise CheckpointError(
            f"{folder}/config.json: {key} is {value!r}; read are a layer counted from the encoder's end, such as -2, "
            "and a list of such layers. Of an encoder of n blocks, layer k from its start is k - n - 1: write it so"
        )
    return layers[0] if len(layers) == 1 else tuple(layers)


def _projector_config(kind: str, folder: Path) -> ProjectorConfig:
    depth = _depth(kind, folder)
    return LinearProjectorConfig() if depth == 1 else MLPProjectorConfig(depth=depth)


def _projector_rules(kind: str, prefixes: Sequence[str], folder: Path) -> list[Any]:
    depth = _depth(kind, folder)
    if depth == 1:
        return [rename("projector.layers.0.{leaf}", f"{prefix}{{leaf}}") for prefix in prefixes]
    layers = range(0, 2 * depth, 2)
    return [rename(f"projector.layers.{n}.{{leaf}}", f"{prefix}{n}.{{leaf}}") for prefix in prefixes for n in layers]


def _depth(kind: str, folder: Path) -> int:
    """
    >>> _depth("mlp2x_gelu", Path()), _depth("linear", Path())
    (2, 1)
    """
    number = kind.removeprefix("mlp").removesuffix("x_gelu")
    if kind != "linear" and not number.isdecimal():
        raise CheckpointError(f"{folder}: its projector is {kind}; linear and mlpNx_gelu are known here")
    return 1 if kind == "linear" else int(number)


def _text_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's config.json, from one that has LLaVA's keys beside it."""
    kind = str(settings.get("model_type", "llava")).removeprefix("llava_")
    names = {"llava": "llama", "llama": "llama", "mistral": "mistral", "qwen": "qwen2", "qwen2": "qwen2", "phi": "phi"}
    if kind not in names:
        raise CheckpointError(f"its language model is of type {kind}; known: {', '.join(names)}")
    own = {key: value for key, value in settings.items() if not key.startswith(("mm_", "image_", "tune_", "use_mm_"))}
    return {**own, "model_type": names[kind], "architectures": [f"{names[kind].capitalize()}ForCausalLM"]}


def _all_weights(folder: Path) -> LazyTensors:
    """All tensors [...] of a folder, of safetensors if there are, else of pickled files, read as they are needed."""
    if any(folder.glob("*.safetensors")) and not is_peft(folder):
        return WeightFiles(str(folder), "the folder")
    files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise CheckpointError(f"{folder} holds no weights. Usually the download is incomplete")
    return joined(*(_nested(file) for file in files))


def _nested(file: Path) -> LazyTensors:
    """Tensors [...] of a pickled file, those of dicts inside it by joined names; nothing else of it is made."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing. Usually the download is incomplete")
    return joined(read_plain(file))


def _prefixed(tensors: LazyTensors, prefix: str) -> LazyTensors:
    """[...] each, by longer names."""
    shapes = {prefix + name: shape for name, shape in tensors.shapes.items()}
    return LazyTensors(shapes, lambda name: tensors[name.removeprefix(prefix)])
