"""All that a run needs to go on exactly, and the check that a checkpoint is of the same run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import vlm
from vlm.errors import CheckpointError
from vlm.faults import fault
from vlm.train.checkpoint import read_info, save_checkpoint, save_tensors
from vlm.train.engines.base import Engine


@dataclass(frozen=True)
class RunState:
    """Engine, stream position and random state of a run.

    `identity` holds what must not change between a checkpoint and its resumption, as flat keys.
    """

    run: Path
    engine: Engine
    stream_fingerprint: str
    identity: dict[str, Any]

    def save(self, step: int, keep_last: int) -> Path:
        """Write a checkpoint after `step` optimizer steps. Raises OSError when the disk refuses."""

        def write(folder: Path) -> None:
            self.engine.save(folder)
            save_tensors(_random_state(), folder / "rng.safetensors")
            stream = {"step": step, "fingerprint": self.stream_fingerprint}
            (folder / "stream.json").write_text(json.dumps(stream), encoding="utf-8")
            (folder / "progress.json").write_text(json.dumps({"step": step}), encoding="utf-8")

        fault("save")
        info = {"identity": self.identity, "world_size": 1, "vlm_version": vlm.__version__}
        return save_checkpoint(self.run, step, write, info, keep_last)

    def load(self, checkpoint: Path) -> int:
        """Bring everything back. Returns the number of finished optimizer steps.

        Raises:
            CheckpointError: the data is not the data of the checkpoint, or a tensor does not fit.
        """
        stream = json.loads((checkpoint / "stream.json").read_text(encoding="utf-8"))
        if stream["fingerprint"] != self.stream_fingerprint:
            raise CheckpointError(
                f"{checkpoint}: the training data, its order or its tokenization changed since this checkpoint. "
                "Usually a data file was edited or replaced. Restore it to resume exactly, or start another "
                f"output_dir with init_from: an export of {self.run}"
            )
        self.engine.load(checkpoint)
        _restore_random_state(load_file(checkpoint / "rng.safetensors"))
        return int(stream["step"])


def refuse_other_run(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Compare a checkpoint's run with this one before anything heavy is loaded.

    Raises:
        CheckpointError: lists every key that differs, checkpoint -> now.
    """
    old = read_info(checkpoint)["identity"]
    differences = [
        f"  {key}: {old.get(key)!r} -> {identity.get(key)!r}"
        for key in sorted(old.keys() | identity.keys())
        if old.get(key) != identity.get(key)
    ]
    if differences:
        raise CheckpointError(
            f"{checkpoint} belongs to another config (checkpoint -> now):\n" + "\n".join(differences) + "\nRestore "
            "these values to resume, train in another output_dir, or start from its weights with init_from"
        )


def flatten(value: Any, prefix: str) -> dict[str, Any]:
    """
    >>> flatten({"a": {"b": 1}, "c": [2]}, "x")
    {'x.a.b': 1, 'x.c': [2]}
    """
    if not isinstance(value, dict):
        return {prefix: value}
    return {name: leaf for key, child in value.items() for name, leaf in flatten(child, f"{prefix}.{key}").items()}


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
