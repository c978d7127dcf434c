"""Where an export's base models are, when it is used from another folder than the one it was trained in.

Configs name models relative to the folder of training, and runs write their exports below it: ROOT/cache/runs/x/export
names cache/ckpt/y, which is then ROOT/cache/ckpt/y.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.artifacts.adapter import Adapter
from vlm.artifacts.manifest import Manifest, read_manifest
from vlm.errors import CheckpointError
from vlm.schema import is_local


def with_bases_found(manifest: Manifest, folder: Path) -> Manifest:
    """The manifest with every base model named so that it is found from the current folder.

    A path that exists here, and a name that only a hub can know, stay as they are.

    Args:
        folder: the export.

    Raises:
        CheckpointError: a base model is neither here nor in a folder above the export.
    """
    model, changes = manifest.model, dict[str, Any]()
    if "llm" not in manifest.included:
        found = _find_base(model.llm.path, folder)
        changes["llm"] = model.llm.model_copy(update={"path": found})
    if model.vision is not None and "vision" not in manifest.included:
        named = []
        for encoder in model.vision.encoders:
            paths: dict[str, str] = {"path": _find_base(encoder.path, folder)}
            if encoder.pretrained is not None:
                paths["pretrained"] = _find_base(encoder.pretrained, folder)
            named.append(encoder.model_copy(update=paths))
        changes["vision"] = model.vision.with_encoders(named)
    return replace(manifest, model=model.model_copy(update=changes))


def with_start_found(adapter: Adapter, export: Path, manifest: Manifest) -> Adapter:
    """The adapter, known as one that went on training the export's own wherever the current folder is.

    Args:
        export, manifest: what the adapter will be put on.
    """
    start = read_manifest(adapter.folder).origin.get("init_from")
    if adapter.replaces_own or start is None or "llm.lora" not in manifest.included:
        return adapter
    continues = Path(_above(start, adapter.folder) or start).resolve() == export.resolve()
    return replace(adapter, replaces_own=continues)


def _find_base(path: str, export: Path) -> str:
    if Path(path).exists():
        return path
    found = _above(path, export)
    if found is not None:
        return str(found)
    if Path(path).is_absolute():
        looked = "does not exist"
    elif is_local(path):
        looked = f"is looked for in {Path.cwd()} and above the export"
    else:
        return path
    raise CheckpointError(
        f"{export}: the base model {path} of this export {looked}; run from the folder of training, or make a whole "
        "one there with vlm export RUN --full"
    )


def _above(path: str, export: Path) -> Path | None:
    """A relative path below the nearest folder above the export that has it. A folder counts if it holds a model."""
    if Path(path).is_absolute():
        return None
    candidates = (root / path for root in export.resolve().parents)
    return next((found for found in candidates if found.is_file() or _is_model(found)), None)


def _is_model(folder: Path) -> bool:
    return any(folder.glob("*config.json")) or any(folder.glob("*.safetensors")) or (folder / "vlm.json").is_file()
