"""What lies in an artifact's folder, by canonical name, whichever layout it is in. Nothing is read before it is needed.

projector.safetensors                              projector.*
value_head.safetensors                             value_head.*
adapter/adapter_model.safetensors + _config.json   llm.lora.*, as peft writes it
llm/*.safetensors + config.json                    llm.*, as transformers writes it; of a whole text model at the top
vision.safetensors + vision/config.json            vision.*
vision/*.safetensors + config.json                 vision.*, as transformers writes it, in folders that were imported
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vlm.artifacts.llava import LLAVA, open_llava
from vlm.artifacts.manifest import ADAPTER, LLM, PROJECTOR, VALUE_HEAD, VISION, Manifest
from vlm.errors import CheckpointError
from vlm.models.config import ModelConfig
from vlm.models.trainable import part_of
from vlm.models.weight_adapter import WeightAdapter, also, rename
from vlm.models.weight_files import LazyTensors, WeightFiles, joined

_CANONICAL = WeightAdapter("vlm's layout", (rename("{*name}", "{*name}"),))
# part -> between its canonical names and those in its file
ADAPTERS: dict[str, WeightAdapter] = {
    "projector": _CANONICAL,
    "vision": _CANONICAL,
    "value_head": _CANONICAL,
    "llm.lora": WeightAdapter(
        "peft's layout",
        (
            rename("llm.lora.{*at}.lora_A.weight", "base_model.model.{*at}.lora_A.weight"),
            rename("llm.lora.{*at}.lora_B.weight", "base_model.model.{*at}.lora_B.weight"),
            rename("llm.lora.{*at}.lora_magnitude_vector.weight", "base_model.model.{*at}.lora_magnitude_vector"),
            rename("llm.lora.{*at}.modules_to_save.{leaf}", "base_model.model.{*at}.{leaf}"),
        ),
    ),
    "llm": WeightAdapter("transformers' layout of a language model", (rename("llm.{*rest}", "{*rest}"),)),
}
TOWER = WeightAdapter(
    "transformers' layout of an encoder",
    (also("vision.trunk.model.{*rest}", "vision_model.{*rest}"), rename("vision.trunk.model.{*rest}", "{*rest}")),
)
VISION_PART = "vision"
_FILES = {"projector": PROJECTOR, "vision": VISION, "llm.lora": ADAPTER, "value_head": VALUE_HEAD}


def open_parts(folder: Path, manifest: Manifest, model: ModelConfig) -> LazyTensors:
    """The tensors of the parts that `manifest.included` names, by canonical name.

    Args:
        model: what they will be loaded into.

    Raises:
        CheckpointError: a file is missing or damaged, or holds something else.
    """
    if manifest.layout not in LAYOUTS:
        raise CheckpointError(f"{folder}: layout {manifest.layout!r} is not known here. Install a newer vlm")
    found = LAYOUTS[manifest.layout](folder, manifest, model)
    return found.only(name for name in found if part_of(name) in manifest.included)


def _open_vlm(folder: Path, manifest: Manifest, model: ModelConfig) -> LazyTensors:
    parts = [part for part in _FILES if part in manifest.included]
    groups: list[Mapping[str, Tensor]] = []
    if VISION_PART in parts and not (folder / VISION).is_file() and any((folder / VISION_PART).glob("*.safetensors")):
        parts.remove(VISION_PART)
        groups.append(TOWER.to_ours(WeightFiles(str(folder / VISION_PART), "the export")))
    groups += [ADAPTERS[part].to_ours(_read(folder / _FILES[part])) for part in parts]
    if LLM in manifest.included:
        place = folder / manifest.model.llm.path
        if not any(place.glob("*.safetensors")):
            raise CheckpointError(f"{place} holds no .safetensors. The export is incomplete: export again")
        groups.append(ADAPTERS[LLM].to_ours(WeightFiles(str(place), "the export")))
    return joined(*groups)


# by `layout` in vlm.json
LAYOUTS: dict[str, Callable[[Path, Manifest, ModelConfig], LazyTensors]] = {"vlm": _open_vlm, LLAVA: open_llava}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. The export is incomplete: export the run again") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}). Copy it again, or export the run again") from None
