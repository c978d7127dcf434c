"""`init_from`: what a run starts with, for a whole model and for one stage of a pipeline alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from vlm.artifacts.fingerprint import differences, fingerprint_files
from vlm.artifacts.manifest import Manifest, read_manifest
from vlm.artifacts.parts import LLM, read_parts
from vlm.errors import CheckpointError
from vlm.models.config import LoRAConfig, ModelConfig
from vlm.models.partition import full_shape
from vlm.models.pipeline_build import Shapes, Stage, load_stage_weights
from vlm.models.trainable import load_weights, merge_adapter, part_of, part_weights
from vlm.models.vision import VisionEncoder
from vlm.models.vlm import VisionLanguageModel
from vlm.models.weight_files import WeightFiles
from vlm.schema import PARTS


def load_init(target: VisionLanguageModel | Stage, config: ModelConfig, path: str | Path) -> list[str]:
    """Start a model from an export: load every part that the export brings.

    Args:
        target: freshly built, frozen and with adapters as the new config says; or this rank's stage of it, which keeps
            its own tensors only.
        config: what it was built from.

    Returns:
        a line per part, about the whole model: what was loaded, merged, or starts fresh.

    Raises:
        CheckpointError: a tensor does not fit (each is listed), an adapter was trained beside another language model,
            or the export is a merged one in transformers' layout. The same on every stage.
    """
    folder = Path(path)
    where = f"init_from {folder}"
    manifest = read_manifest(folder)
    small = read_parts(folder, replace(manifest, included=tuple(part for part in manifest.included if part != LLM)))
    files = WeightFiles(str(folder / LLM), where) if LLM in manifest.included else None
    lora = {name: tensor for name, tensor in small.items() if part_of(name) == "llm.lora"}
    model = target.built.model if isinstance(target, Stage) else target
    report = _check_base(target, manifest, config, bool(lora), where)
    own = _shapes_of(target)
    if lora and not any(part_of(name) == "llm.lora" for name in own):
        assert manifest.model.lora is not None
        merge_adapter(model, lora, manifest.model.lora)
        report.append(f"llm.lora: {len(lora)} tensors merged into the language model, as this config trains no adapter")
        small = {name: tensor for name, tensor in small.items() if name not in lora}
    elif lora:
        _refuse_other_alpha(manifest.model.lora, config.lora, where)
    shapes = {name: tuple(tensor.shape) for name, tensor in small.items()}
    if files is not None:
        shapes |= {f"llm.{name}": shape for name, shape in files.shapes.items()}

    def read(name: str) -> Tensor:
        if name in small:
            return small[name]
        assert files is not None
        return files.read(name.removeprefix("llm."))

    if isinstance(target, Stage):
        load_stage_weights(target, shapes, read, where)
    else:
        load_weights(model, {name: read(name) for name in shapes}, where, partial=True)
    return report + _describe(own, shapes)


def load_encoder(vision: VisionEncoder, path: str | Path) -> None:
    """Start an encoder alone from an export, as `load_init` starts a whole model.

    Raises:
        CheckpointError: a tensor does not fit.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if "vision" in manifest.included:
        tensors = read_parts(folder, replace(manifest, included=("vision",)))
        load_weights(nn.ModuleDict({"vision": vision}), tensors, f"init_from {folder}", partial=True)


def _shapes_of(target: VisionLanguageModel | Stage) -> Shapes:
    """Canonical name -> shape of everything in the whole model."""
    if isinstance(target, Stage):
        return target.shapes
    return {name: full_shape(tensor) for part in PARTS for name, tensor in part_weights(target, part).items()}


def _check_base(
    target: VisionLanguageModel | Stage, manifest: Manifest, config: ModelConfig, has_adapter: bool, where: str
) -> list[str]:
    """Whether the language model is the one that the export was trained beside. Of a stage the files are asked."""
    expected = {} if LLM in manifest.included else manifest.base.get("llm", {})
    if isinstance(target, Stage):
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


def _refuse_other_alpha(before: LoRAConfig | None, now: LoRAConfig | None, where: str) -> None:
    """Rank, and with it every shape, may agree while alpha does not; the adapter would then count for more or less."""
    assert before is not None
    assert now is not None
    if before.rank == now.rank and before.alpha != now.alpha:
        raise CheckpointError(
            f"{where} does not fit this model (file -> model):\n  model.lora.alpha: {before.alpha} -> {now.alpha}\n"
            "Set it as it was, or remove model.lora and llm.lora from trainable to have the adapter merged"
        )


def _describe(own: Shapes, brought: Mapping[str, tuple[int, ...]]) -> list[str]:
    report = []
    for part in PARTS:
        count = sum(part_of(name) == part and name in own for name in brought)
        total = sum(part_of(name) == part for name in own)
        fresh = total - count if part in ("projector", "llm.lora") else 0
        if count:
            report.append(f"{part}: {count} tensors loaded" + (f", {fresh} new ones start fresh" if fresh else ""))
        elif fresh:
            report.append(f"{part}: not in the export, starts fresh")
    return report
