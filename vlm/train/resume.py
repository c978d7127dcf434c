"""All that a run needs to go on exactly, and the check that a checkpoint is of the same run."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vlm.distributed import gather_objects, is_main, rank, world_size
from vlm.errors import CheckpointError
from vlm.faults import fault
from vlm.logs import log
from vlm.train.checkpoint import read_info, save_checkpoint
from vlm.train.engines.base import Engine, write_copies
from vlm.train.fragments import HostCopy, save_tensors
from vlm.version import __version__

_BESIDE_CONFIG = {"model.vision.compute", "data.cache_features"}  # found by measuring; the checkpoint's own rules
OPTIMIZER_STATE = ("any with float32 state", "any with 8-bit state")  # optimizers of one kind read each other's


@dataclass
class RunState:
    """Engine, stream position and random state of a run.

    `identity` holds what must not change between a checkpoint and its resumption, as flat keys; `data_settings` what
    decides on rows and their order, to be named where the fingerprint has changed; `start` the sums of what the run
    began with, for whoever completes the checkpoint later.
    """

    run: Path
    engine: Engine
    stream_fingerprint: str
    identity: dict[str, Any]
    data_settings: dict[str, Any]
    start: dict[str, Any] = field(default_factory=dict)
    counters: Callable[[], dict[str, Any]] = dict  # what else goes into progress.json
    image_orders: dict[str, int] = field(default_factory=dict)  # of the training data, for the export
    earlier_fingerprint: Callable[[], str] = str  # what earlier versions wrote in place of `stream_fingerprint`

    def save(self, step: int, keep_last: int) -> Path:
        """Write a checkpoint after `step` optimizer steps. Raises OSError when the disk refuses."""
        return self._save(self.engine.copies(), step, keep_last)()

    def copy(self, step: int, keep_last: int) -> Callable[[], Path]:
        """What writes the checkpoint of `step` whenever it is called, in any thread: all of it is copied now."""
        return self._save(list(self.engine.copies()), step, keep_last)

    def _save(self, copies: Iterable[tuple[str, HostCopy]], step: int, keep_last: int) -> Callable[[], Path]:
        fault("save")
        random_state, progress = _random_state(), json.dumps({"step": step, **self.counters()})

        def write(folder: Path) -> None:
            write_copies(copies, folder)
            save_tensors(random_state, _random_file(folder, rank()))
            if is_main():
                stream = {"step": step, "fingerprint": self.stream_fingerprint}
                (folder / "stream.json").write_text(json.dumps(stream), encoding="utf-8")
                (folder / "progress.json").write_text(progress, encoding="utf-8")

        info = {
            "identity": self.identity, "data": self.data_settings, "start": self.start, "world_size": world_size(),
            "vlm_version": __version__, "image_orders": self.image_orders,
        }  # fmt: skip
        return lambda: save_checkpoint(self.run, step, write, info, keep_last)

    def load(self, checkpoint: Path) -> int:
        """Bring everything back. Returns the number of finished optimizer steps.

        Raises:
            CheckpointError: the data is not the data of the checkpoint, or a tensor does not fit.
        """
        stream = _read_json(checkpoint / "stream.json")
        written = stream["fingerprint"]
        # ranks that see the images at other places have one fingerprint, but not one of before
        if written != self.stream_fingerprint and not any(gather_objects(written == self.earlier_fingerprint())):
            old = read_info(checkpoint).get("data")  # earlier versions did not write it
            changed = [] if old is None else _differences(old, self.data_settings)
            cause = "Usually a data file was edited or replaced. Restore it"
            if changed:
                cause = "(Checkpoint -> now):\n" + "\n".join(changed) + "\nRestore these values"
            raise CheckpointError(
                f"{checkpoint}: the training data, its order or its tokenization changed since this checkpoint. "
                f"{cause} to resume exactly, or start another output_dir with init_from: an export of {self.run}"
            )
        self.engine.load(checkpoint)
        written_by = int(read_info(checkpoint)["world_size"])
        if written_by != world_size():
            log(
                f"{checkpoint} was written by {written_by} ranks, this run has {world_size()}: the same weights and "
                "samples, but dropout draws other numbers"
            )
        own = _random_file(checkpoint, rank())
        if own.is_file():
            try:
                _restore_random_state(load_file(own))
            except SafetensorError as error:
                raise CheckpointError(f"{own} is no safetensors file ({error}), and nothing else is read") from None
        return int(stream["step"])


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """What the run had counted when the checkpoint was written."""
    return _read_json(checkpoint / "progress.json")


def refuse_other_run(
    checkpoint: Path, identity: dict[str, Any], defaults: Mapping[str, Any], unread: Collection[str] = ()
) -> None:
    """Compare a checkpoint's run with this one before anything heavy is loaded.

    Args:
        defaults: of keys that a checkpoint of an earlier version does not have yet.
        unread: keys that one of an earlier version may have and this run does not read.

    Raises:
        CheckpointError: lists every key that differs, checkpoint -> now.
    """
    old = {key: value for key, value in read_info(checkpoint)["identity"].items() if key not in unread}
    missing = {key: value for key, value in defaults.items() if key in identity and key not in old}
    old = {**missing, **{key: value for key, value in old.items() if key in identity or key not in _BESIDE_CONFIG}}
    if differences := _differences(old, identity):
        raise CheckpointError(
            f"{checkpoint} belongs to another config (checkpoint -> now):\n" + "\n".join(differences) + "\nRestore "
            "these values to resume, train in another output_dir, or start from its weights with init_from"
        )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys whose values differ, a line each."""
    return [
        f"  {key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def flatten(value: Any, prefix: str) -> dict[str, Any]:
    """
    >>> flatten({"a": {"b": 1}, "c": [2]}, "x")
    {'x.a.b': 1, 'x.c': [2]}
    """
    if not isinstance(value, dict):
        return {prefix: value}
    return {name: leaf for key, child in value.items() for name, leaf in flatten(child, f"{prefix}.{key}").items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Remove its checkpoint to use the one before") from None


def _random_file(checkpoint: Path, number: int) -> Path:
    old = checkpoint / "rng.safetensors"  # of format version 1
    return old if number == 0 and old.is_file() else checkpoint / "rng" / f"rank-{number:05d}.safetensors"


def _random_state() -> dict[str, Tensor]:
    """State of each generator of this process, uint8 [n]."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Tensor]) -> None:
    """state: what `_random_state` gave, uint8 [n] each."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
