"""What a run started from, by content: sha256 of every file that it reads and does not train itself.

A checkpoint holds only what trains. The rest comes again from the base models and from `init_from` whenever the run is
resumed or exported, so these must be what they were. Whole files are hashed, as any sample could miss what was
replaced: 1 GB takes a second or two. The sums of large files are kept for this machine by path, size, inode and times,
so a second look costs nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vlm.artifacts.fingerprint import weight_files
from vlm.artifacts.llava import LLAVA, read_start
from vlm.artifacts.manifest import ADAPTER, LLM, NAME, PROJECTOR, VALUE_HEAD, VISION, Manifest
from vlm.errors import CheckpointError
from vlm.files import sha256
from vlm.logs import Progress, log
from vlm.models.config import EncoderConfig, ModelConfig, VisionConfig
from vlm.models.encoders.base import VisionBackend
from vlm.models.encoders.kinds import VISION_BACKENDS
from vlm.models.tokenizer_files import read_json
from vlm.precision import remember

Pins = dict[str, dict[str, str]]  # what of the config -> file -> sha256

_LARGE = 16 << 20  # bytes; the sums of smaller files are not worth keeping
_VOLATILE = ("transformers_version", "_name_or_path")  # written anew whenever a folder is saved, and never read
_SETTINGS = VisionBackend.settings  # a language model may have images of its own
_CHECKED = ("layout", "included", "lora", "projector")  # of vlm.json: how the parts of an export are used
_FILES = {"projector": PROJECTOR, "vision": VISION, "llm.lora": ADAPTER, "value_head": VALUE_HEAD}
_THREADS = 4


def pin_start(model: ModelConfig, init_from: str | None) -> Pins:
    """Sums of the weights that stay as they were loaded, and of the settings beside them.

    Nothing is said of a model that is not there (loading it will), nor of weights that timm or open_clip fetch by name.
    """
    start = None if init_from is None else _read_start(Path(init_from))
    brought = () if start is None else start.included
    files: dict[str, list[Path]] = {"model.llm.path": _settings_in(model.llm.path, _SETTINGS)}
    if not {"llm"} & {*model.trainable, *brought} or ("llm" in model.partial and "llm" not in brought):
        files["model.llm.path"] += _found(model.llm.path)
    for key, encoder in _encoders(model.vision).items():
        files[key] = _settings_in(encoder.path, VISION_BACKENDS[encoder.backend].settings)
        if not {"vision"} & {*model.trainable, *brought} or ("vision" in model.partial and "vision" not in brought):
            files[key] += _encoder_weights(encoder)
    if (path := model.projector.start_path) is not None and model.vision is not None:
        files["model.projector.pretrained"] = [] if "projector" in brought else _whole(path)
    if start is not None:
        files["init_from"] = _start_files(Path(str(init_from)), start, model)
    sums = _sum_all({file for group in files.values() for file in group})
    places = places_of(model, init_from)
    return {key: {_name(file, places[key]): sums[file] for file in group} for key, group in files.items() if group}


def refuse_replaced(checkpoint: Path, before: Pins | None, now: Pins, places: dict[str, str | None]) -> None:
    """
    Args:
        checkpoint: for the message.
        before: what the checkpoint says; None of one of an earlier version.
        places: key of the config -> its value, for the message.

    Raises:
        CheckpointError: lists every file that holds something else, is new, or is gone.
    """
    if before is None:
        log(f"{checkpoint} is of an earlier version: whether the models that it began with were replaced is not known")
        return
    lines = []
    for key in sorted(before.keys() & now.keys()):
        for name in sorted(before[key].keys() | now[key].keys()):
            then, found = (pins[key].get(name, "absent")[:16] for pins in (before, now))
            if then != found:
                lines.append(f"  {key} {places.get(key)}: {name}: {then} -> {found}")
    if lines:
        raise CheckpointError(
            f"{checkpoint}: what this run began with has been replaced since (sha256 then -> now):\n"
            + "\n".join(lines)
            + "\nUsually a model was downloaded or trained again into the same folder, or an export written over one "
            "that a later stage began with. Put the old files back; or begin a run with the new ones in another "
            "output_dir"
        )


def places_of(model: ModelConfig, init_from: str | None) -> dict[str, str | None]:
    return {
        "model.llm.path": model.llm.path,
        "model.vision.path": None,
        **{key: each.pretrained or each.path for key, each in _encoders(model.vision).items()},
        "model.projector.pretrained": model.projector.start_path,
        "init_from": init_from,
    }


def _read_start(folder: Path) -> Manifest | None:
    try:
        return read_start(folder)
    except CheckpointError:  # loading it will say so
        return None


def _start_files(folder: Path, start: Manifest, model: ModelConfig) -> list[Path]:
    trained = {part for part in model.trainable if part not in model.partial}
    if "llm" in trained:
        trained.add("llm.lora")  # was merged before the training
    kept = [part for part in start.included if part not in trained]
    files = [folder / file for part, file in _FILES.items() if part in kept]
    if kept and start.layout == LLAVA:
        files = [*sorted(folder.glob("*.safetensors")), *_settings_in(str(folder), _SETTINGS)]
    elif LLM in kept:
        files += sorted((folder / start.model.llm.path).glob("*.safetensors"))
    if "vision" in kept and not (folder / VISION).is_file():
        files += sorted((folder / "vision").glob("*.safetensors"))
    return [file for file in (*files, folder / NAME) if file.is_file()]


def _settings_in(path: str, names: Iterable[str]) -> list[Path]:
    return [file for name in names if (file := Path(path) / name).is_file()]


def _encoders(vision: VisionConfig | None) -> dict[str, EncoderConfig]:
    """By the key of its path."""
    encoders = () if vision is None else vision.encoders
    keys = ("model.vision.path", *(f"model.vision.fuse_with.{number}.path" for number in range(len(encoders))))
    return dict(zip(keys, encoders, strict=False))


def _encoder_weights(vision: EncoderConfig) -> list[Path]:
    kind = VISION_BACKENDS[vision.backend]
    path = kind.weights_at(vision)
    if path.endswith(kind.pickled):
        return _whole(path)
    return _found(path) if kind.is_here(vision) else []


def _found(path: str) -> list[Path]:
    return [file for file in weight_files(path) if file.is_file()]


def _whole(path: str) -> list[Path]:
    """A file of any kind, or the weights of a folder."""
    return [Path(path)] if Path(path).is_file() else _found(path)


def _name(file: Path, place: str | None) -> str:
    """As its folder knows it."""
    folder = Path(place or "")
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) and file != folder else file.name


def _sum_all(files: set[Path]) -> dict[Path, str]:
    ordered = sorted(files)
    total, done = sum(file.stat().st_size for file in ordered), 0
    sums: dict[Path, str] = {}
    with ThreadPoolExecutor(_THREADS) as pool, Progress("sha256 of the base models:", total, "bytes") as progress:
        for file, digest in zip(ordered, pool.map(_sum, ordered), strict=True):
            done += file.stat().st_size
            progress.show(done)
            sums[file] = digest
    return sums


def _sum(file: Path) -> str:
    if file.suffix == ".json":
        return hashlib.sha256(json.dumps(_lasting(file), sort_keys=True).encode()).hexdigest()
    status = file.stat()
    if status.st_size < _LARGE:
        return sha256(file)
    facts = (status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    return str(remember(f"sha256 of {file.resolve()} {facts}", lambda: sha256(file)))


def _lasting(file: Path) -> dict[str, Any]:
    """What settings say, without what is written anew by each program that saves them."""
    values = read_json(file)
    if file.name == NAME:
        return {key: {**values, **values["model"]}.get(key) for key in _CHECKED}
    return {key: value for key, value in values.items() if key not in _VOLATILE}
