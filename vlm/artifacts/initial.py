"""`init_from`: what a run starts with, for a whole model and for one stage of a pipeline alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from vlm.artifacts.fingerprint import differences, fingerprint_files
from vlm.artifacts.layouts import open_parts
from vlm.artifacts.llava import LLAVA, POOLING_HEAD, read_start, refuse_other_llava
from vlm.artifacts.manifest import LLM, Manifest, without_value_head
from vlm.errors import CheckpointError
from vlm.models.config import LoRAConfig, ModelConfig
from vlm.models.partition import full_shape
from vlm.models.pipeline_build import Stage, load_stage_weights
from vlm.models.trainable import load_weights, merge_adapter, misfit, part_of, part_weights, renew_adapters
from vlm.models.vision import VisionEncoder
from vlm.models.vlm import VisionLanguageModel
from vlm.models.weight_files import Shapes
from vlm.schema import PARTS


def load_init(target: VisionLanguageModel | Stage, config: ModelConfig, path: str | Path) -> list[str]:
    """Start a model from an export, or from a folder in LLaVA's layout: load every part that it brings.

    Args:
        target: freshly built, frozen and with adapters as the new config says; or this rank's stage of it, which keeps
            its own tensors only.
        config: what it was built from.

    Returns:
        a line per part, about the whole model: what was loaded, merged, or starts fresh.

    Raises:
        CheckpointError: a tensor does not fit (each is listed), an adapter was trained beside another language model,
            or a LLaVA's encoder sees images in another way. The same on every stage.
    """
    folder = Path(path)
    where = f"init_from {folder}"
    start = read_start(folder)
    manifest = without_value_head(start, config.trainable)
    if config.llm.quantization is not None and LLM in manifest.included:
        manifest = _without_llm(manifest, config, folder, where)
    tensors = open_parts(folder, manifest, config)
    lora = dict(tensors.only(name for name in tensors if part_of(name) == "llm.lora"))
    model = target.built.model if isinstance(target, Stage) else target
    report = _check_base(target, manifest, config, bool(lora), where)
    own = _shapes_of(target)
    if start.scores and not manifest.scores:
        report.append("value_head: left out, as this config's objective has no use for one")
    if lora and not any(part_of(name) == "llm.lora" for name in own):
        assert manifest.model.lora is not None
        merge_adapter(model, lora, manifest.model.lora)
        report.append(f"llm.lora: {len(lora)} tensors merged into the language model, as this config trains no adapter")
        tensors = tensors.only(name for name in tensors if name not in lora)
    elif lora:
        _refuse_other_adapter(manifest.model.lora, config.lora, where)
    if manifest.layout == LLAVA:
        _refuse_other_llava(target, manifest, config, own, tensors.shapes, where)
    if isinstance(target, Stage):
        load_stage_weights(target, tensors, where)
    else:
        load_weights(model, tensors, where, partial=True)
    renew_adapters(model, set(tensors))
    return report + _describe(own, tensors.shapes)


def _without_llm(manifest: Manifest, config: ModelConfig, folder: Path, where: str) -> Manifest:
    """Weights are packed as they are loaded from `model.llm.path`, so an export's own must be what that names."""
    if Path(config.llm.path).resolve() != (folder / LLM).resolve():
        raise CheckpointError(
            f"{where} brings a language model of its own, and model.llm.quantization packs the one that model.llm.path "
            f"names. Set model.llm.path to {folder / LLM}; init_from may stay, for the other parts"
        )
    return replace(manifest, included=tuple(part for part in manifest.included if part != LLM))


def load_encoder(vision: VisionEncoder, config: ModelConfig, path: str | Path) -> None:
    """Start an encoder alone from an export, as `load_init` starts a whole model.

    Raises:
        CheckpointError: a tensor does not fit.
    """
    folder = Path(path)
    manifest = read_start(folder)
    if "vision" in manifest.included:
        tensors = open_parts(folder, replace(manifest, included=("vision",)), config)
        load_weights(nn.ModuleDict({"vision": vision}), tensors, f"init_from {folder}", partial=True)


def _shapes_of(target: VisionLanguageModel | Stage) -> Shapes:
    """Canonical name -> shape of everything in the whole model."""
    if isinstance(target, Stage):
        return target.shapes
    return {name: full_shape(tensor) for part in PARTS for name, tensor in part_weights(target, part).items()}


def _refuse_other_llava(
    target: VisionLanguageModel | Stage, manifest: Manifest, config: ModelConfig, own: Shapes, given: Shapes, where: str
) -> None:
    """A LLaVA is whole, so what this model has and it has not is of another shape of encoder or projector."""
    images = target.built.image_spec if isinstance(target, Stage) else target.vision
    if images is not None:
        refuse_other_llava(where, manifest, config, images.mean, images.std)
    needed = [name for name in own if part_of(name) in manifest.included and not name.startswith(POOLING_HEAD)]
    missing = [name for name in needed if name not in given]
    if missing:
        raise CheckpointError(misfit(where, [f"  {name}: missing" for name in missing]))


def _check_base(
    target: VisionLanguageModel | Stage, manifest: Manifest, config: ModelConfig, has_adapter: bool, where: str
) -> list[str]:
    """Whether the language model is the one that the export was trained beside. Of a stage the files are asked."""
    expected = {} if LLM in manifest.included else manifest.base.get("llm", {})
    if isinstance(target, Stage) or config.llm.quantization is not None:  # packed weights cannot be compared
        found = fingerprint_files(config.llm.path) if expected else {}
        other = [f"  {n}: {expected[n]} -> {found[n]}" for n in expected if n in found and found[n] != expected[n]]
    else:
        other = differences(
            expected, {name.removeprefix("llm."): tensor for name, tensor in part_weights(target, "llm").items()}
        )
    if other and has_adapter:
        raise CheckpointError(
            f"{where}: its adapter was trained beside another language model (hash of tensors then -> now):\n"
            + "\n".join(other)
            + "\nSet model.llm.path to the model that the export names, or start from an export without adapter"
        )
    return ["the language model is another one than the projector was trained beside"] if other else []


def _refuse_other_adapter(before: LoRAConfig | None, now: LoRAConfig | None, where: str) -> None:
    """Of another rank it does not fit; of another alpha it would count for more or less."""
    assert before is not None
    assert now is not None
    other = [key for key in ("rank", "alpha", "rslora", "dora") if getattr(before, key) != getattr(now, key)]
    if other:
        lines = "".join(f"  model.lora.{key}: {getattr(before, key)} -> {getattr(now, key)}\n" for key in other)
        raise CheckpointError(
            f"{where} does not fit this model (file -> model):\n{lines}"
            "Set it as it was to train this adapter on. To have it merged, remove model.lora and llm.lora from "
            "trainable; to train another one on the sum, write that down with `vlm export RUN FOLDER --full --layout "
            "vlm` and set init_from to FOLDER, or of a language model alone model.llm.path"
        )


def _describe(own: Shapes, brought: Mapping[str, tuple[int, ...]]) -> list[str]:
    report = []
    for part in PARTS:
        count = sum(part_of(name) == part and name in own for name in brought)
        total = sum(part_of(name) == part for name in own)
        fresh = total - count if part in ("projector", "llm.lora", "value_head") else 0
        if count:
            report.append(f"{part}: {count} tensors loaded" + (f", {fresh} new ones start fresh" if fresh else ""))
        elif fresh:
            report.append(f"{part}: not in the export, starts fresh")
    return report
