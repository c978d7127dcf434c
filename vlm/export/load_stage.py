"""`init_from` for one stage of a pipeline: the stage's own tensors of an export, and no others, are kept in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vlm.errors import CheckpointError
from vlm.export.fingerprint import fingerprint_files
from vlm.export.load import MERGED
from vlm.export.manifest import Manifest, read_manifest
from vlm.export.parts import LLM, read_parts
from vlm.models.config import ModelConfig
from vlm.models.pipeline_build import Stage, load_stage_weights
from vlm.models.trainable import merge_adapter, part_of
from vlm.models.weight_files import WeightFiles


def load_init_stage(stage: Stage, config: ModelConfig, path: str | Path) -> list[str]:
    """What `load_init` does to a whole model, to one stage of it.

    Args:
        stage: freshly built by `build_stage`.
        config: what it was built from.

    Returns:
        a line per part, about the whole model: the same on every stage.

    Raises:
        CheckpointError: as `load_init`, and the same on every stage, whichever holds the tensors.
    """
    folder = Path(path)
    where = f"init_from {folder}"
    manifest = read_manifest(folder)
    small = read_parts(folder, replace(manifest, included=tuple(part for part in manifest.included if part != LLM)))
    files = WeightFiles(str(folder / LLM), where) if LLM in manifest.included else None
    report = _check_base(manifest, config, any(part_of(name) == "llm.lora" for name in small), where)
    has_lora = any(part_of(name) == "llm.lora" for name in stage.shapes)
    lora = {name: tensor for name, tensor in small.items() if part_of(name) == "llm.lora"}
    if lora and not has_lora:
        assert manifest.model.lora is not None
        merge_adapter(stage.built.model, lora, manifest.model.lora)
        report.append(MERGED.format(len(lora)))
        small = {name: tensor for name, tensor in small.items() if name not in lora}
    elif lora:
        _refuse_other_alpha(manifest, config, where)
    shapes = {name: tuple(tensor.shape) for name, tensor in small.items()}
    if files is not None:
        shapes |= {f"llm.{name}": shape for name, shape in files.shapes.items()}

    def read(name: str) -> Tensor:
        if name in small:
            return small[name]
        assert files is not None
        return files.read(name.removeprefix("llm."))

    load_stage_weights(stage, shapes, read, where)
    return report + _describe(stage, shapes)


def _check_base(manifest: Manifest, config: ModelConfig, has_adapter: bool, where: str) -> list[str]:
    """Whether the language model is the one that the export was trained beside. Read from the files, as `load_init`
    reads it from the model."""
    expected = {} if LLM in manifest.included else manifest.base.get("llm", {})
    found = fingerprint_files(config.llm.path) if expected else {}
    other = [f"  {n}: {expected[n]} -> {found[n]}" for n in expected if n in found and found[n] != expected[n]]
    if other and has_adapter:
        raise CheckpointError(
            f"{where}: its adapter was trained beside another language model (hash of tensors then -> now):\n"
            + "\n".join(other)
            + "\nSet model.llm.path to the model that the export names, or start from an export without adapter"
        )
    return ["the language model is another one than the projector was trained beside"] if other else []


def _refuse_other_alpha(manifest: Manifest, config: ModelConfig, where: str) -> None:
    """Rank, and with it every shape, may agree while alpha does not; the adapter would then count for more or less."""
    before, now = manifest.model.lora, config.lora
    assert before is not None
    assert now is not None
    if before.rank == now.rank and before.alpha != now.alpha:
        raise CheckpointError(
            f"{where} does not fit this model (file -> model):\n  model.lora.alpha: {before.alpha} -> {now.alpha}\n"
            "Set it as it was, or remove model.lora and llm.lora from trainable to have the adapter merged"
        )


def _describe(stage: Stage, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    report = []
    for part in ("projector", "vision", "llm", "llm.lora"):
        count = sum(part_of(name) == part for name in shapes)
        total = sum(part_of(name) == part for name in stage.shapes)
        fresh = total - count if part in ("projector", "llm.lora") else 0
        if count:
            report.append(f"{part}: {count} tensors loaded" + (f", {fresh} new ones start fresh" if fresh else ""))
        elif fresh:
            report.append(f"{part}: not in the export, starts fresh")
    return report
