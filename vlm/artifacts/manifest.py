"""vlm.json: what an export is. The rest of the folder is safetensors, tokenizer files and text."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from vlm.batch import IMAGE_SPECS, ImageSpec
from vlm.data.image_order import ImageOrder
from vlm.errors import CheckpointError
from vlm.models.config import ModelConfig
from vlm.version import __version__

NAME = "vlm.json"
PROJECTOR = "projector.safetensors"
VISION = "vision.safetensors"
ADAPTER = "adapter/adapter_model.safetensors"
VALUE_HEAD = "value_head.safetensors"
LLM = "llm"  # a folder
FORMAT = "vlm"
FORMAT_VERSION = 1
# version -> what turns a manifest of that version into one of the next
_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


@dataclass(frozen=True)
class Manifest:
    """Contents of vlm.json.

    Attributes:
        layout: "vlm" (parts in files of their own) or "llava" (one model that transformers loads by itself).
        model: with paths inside the export written relative to it, see `included`.
        included: parts whose weights are in the folder: of projector, llm, llm.lora, vision, value_head. The others are
            read from the base models that `model` names.
        trained: parts that the run trained, or that came trained with init_from.
        base: per base model ("llm", "vision"), fingerprints; see `fingerprint`.
        image_order: where the training data had the images of a user turn; prompts are brought into that order.
    """

    model: ModelConfig
    template: str
    system: str | None
    image_spec: ImageSpec | None
    included: tuple[str, ...]
    trained: tuple[str, ...]
    layout: str = "vlm"
    full: bool = False
    base: dict[str, dict[str, str]] = field(default_factory=dict)
    image_order: ImageOrder = "keep"
    origin: dict[str, Any] = field(default_factory=dict)  # for the model card: steps, data files, base model names
    stop_ids: tuple[int, ...] = ()  # tokens that end a reply, of which the tokenizer names one only
    begins: bool | None = None  # prompts begin with the tokenizer's begin token; None: if it puts one there by itself

    @property
    def scores(self) -> bool:
        """Whether it is a reward model, which scores replies and writes none."""
        return "value_head" in self.included


def write_manifest(folder: Path, manifest: Manifest) -> None:
    values = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "vlm_version": __version__,
        "layout": manifest.layout,
        "full": manifest.full,
        "included": list(manifest.included),
        "trained": list(manifest.trained),
        "template": manifest.template,
        "system": manifest.system,
        "image_spec": None if manifest.image_spec is None else _spec_values(manifest.image_spec),
        "model": manifest.model.model_dump(mode="json"),
        "base": manifest.base,
        "image_order": manifest.image_order,
        "origin": manifest.origin,
        "stop_ids": list(manifest.stop_ids),
        "begins": manifest.begins,
    }
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """
    Raises:
        CheckpointError: no export, a damaged one, or one of a version that this program does not read.
    """
    values = _migrated(_read_json(folder), folder)
    try:
        spec = None if values["image_spec"] is None else _read_spec(values["image_spec"])
        return Manifest(
            model=ModelConfig.model_validate(values["model"]),
            image_spec=spec,
            included=tuple(values["included"]),
            trained=tuple(values["trained"]),
            # these three are not in exports of earlier versions
            stop_ids=tuple(values.get("stop_ids", ())),
            begins=values.get("begins"),
            image_order=_image_order(values.get("image_order", "keep")),
            **{key: values[key] for key in ("template", "system", "layout", "full", "base", "origin")},
        )
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        reason = str(error).replace("\n", "; ")[:300]
        raise CheckpointError(
            f"{folder / NAME} is damaged or was edited ({type(error).__name__}: {reason}). Export the run again"
        ) from None


def _spec_values(spec: ImageSpec) -> dict[str, Any]:
    """With its kind, which exports of images of one tile have always left out."""
    return asdict(spec) if spec.kind == ImageSpec.kind else {"kind": spec.kind, **asdict(spec)}


def _read_spec(values: dict[str, Any]) -> ImageSpec:
    """What `_spec_values` wrote; several encoders' specs lie in that of the first."""
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    kind = IMAGE_SPECS[given.pop("kind", "square")]  # of one tile in exports of earlier versions
    if "others" in given:
        given["others"] = tuple(_read_spec(each) for each in given["others"])
    return kind(**given)


def inside(folder: Path, model: ModelConfig, included: tuple[str, ...]) -> ModelConfig:
    """The config with the paths of included parts pointing into `folder`."""
    changes: dict[str, Any] = {}
    if "llm" in included:
        changes["llm"] = model.llm.model_copy(update={"path": str(folder / model.llm.path)})
    if "vision" in included and model.vision is not None:
        named = [
            each.model_copy(update={"path": str(folder / each.path)}) if (folder / each.path).exists() else each
            for each in model.vision.encoders
        ]
        changes["vision"] = model.vision.with_encoders(named)
    return model.model_copy(update=changes)


def without_value_head(manifest: Manifest, trainable: Collection[str]) -> Manifest:
    """A reward model's export as a model begins with it that trains `trainable`: no other objective needs the head."""
    if "value_head" in trainable:
        return manifest
    return replace(manifest, included=tuple(part for part in manifest.included if part != "value_head"))


def _image_order(value: Any) -> ImageOrder:
    if value not in get_args(ImageOrder):
        raise TypeError(f"image_order is {value!r}; known: {', '.join(get_args(ImageOrder))}")
    return value


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    if not path.is_file():
        if (folder / "config.yaml").is_file():
            raise CheckpointError(
                f"{folder} is a run, not an export. Export it first: vlm export {folder}; then use {folder / 'export'}"
            )
        what = "has no vlm.json, so it is no export of this program" if folder.is_dir() else "does not exist"
        raise CheckpointError(f"{folder} {what}. Make one from a run with: vlm export RUN")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable ({str(error)[:100]}). Export the run again") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe an export of this program. Make one with: vlm export RUN")
    return values


def _migrated(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    version = values.get("format_version")
    if not isinstance(version, int):
        raise CheckpointError(
            f"{folder / NAME}: format_version is {version!r}, expected a number. Export the run again"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, this program reads up to {FORMAT_VERSION}. It was written by vlm "
            f"{values.get('vlm_version', '?')}: install that version or a newer one (here is {__version__})"
        )
    while version < FORMAT_VERSION:
        if version not in _MIGRATIONS:
            raise CheckpointError(
                f"{folder} has format version {version}, and no way from it to {FORMAT_VERSION} is known. Export the "
                f"run again with this program (vlm {__version__})"
            )
        values = _MIGRATIONS[version](values)
        version += 1
    return values
