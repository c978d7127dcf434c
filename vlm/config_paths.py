"""Whether the files, folders and exports that a config names are there. Nothing of them is opened.

`vlm.config_checks.load_checked` reads a config with these checks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from vlm.config import RunConfig
from vlm.layered_yaml import Key
from vlm.schema import is_local

Problem = tuple[Key, str]  # a key of the config, and what is wrong there
_NO_HUB_NAME = "A name for a model hub has no leading . / ~ or cache/, and at most one /"


def missing_inputs(config: RunConfig) -> list[Problem]:
    """Data, images and models that are not there; names that a model hub may know are taken for such."""
    problems: list[Problem] = []
    for key, path, what in _paths(config):
        if path is not None and not Path(path).exists():
            problems.append((key, f"{what} {path} does not exist"))
    for key, path in model_paths(config):
        if is_local(path) and not Path(path).exists():
            problems.append((key, f"{path} does not exist. {_NO_HUB_NAME}"))
    return problems


def run_problems(config: RunConfig) -> list[Problem]:
    """An export to start from that is not there, and a run folder that cannot be written."""
    problems: list[Problem] = []
    if config.init_from is not None and not Path(config.init_from).exists():
        problems.append((("init_from",), f"{config.init_from} does not exist; train and export the stage before first"))
    problems += reward_problems(config)
    output = Path(config.output_dir)
    nearest = next((folder for folder in (output, *output.parents) if folder.exists()), Path("."))
    if not nearest.is_dir():
        problems.append((("output_dir",), f"{nearest} is a file"))
    elif not os.access(nearest, os.W_OK):
        problems.append((("output_dir",), f"{nearest} cannot be written to"))
    return problems


def reward_problems(config: RunConfig) -> Iterator[Problem]:
    """Reward models that are not there, or are none."""
    for number, reward in enumerate(getattr(config.objective, "rewards", ())):
        if reward.kind != "model":
            continue
        key = ("objective", "rewards", number, "path")
        if not Path(reward.path).exists():
            yield key, f"{reward.path} does not exist; train one with objective.kind reward and export it first"
        elif not is_reward_model(Path(reward.path)):
            yield key, f"{reward.path} is not an export of a reward model, as objective.kind reward makes one"


def is_reward_model(folder: Path) -> bool:
    """Whether a folder is the export of a reward model, by what its manifest says."""
    try:
        return "value_head" in json.loads((folder / "vlm.json").read_text(encoding="utf-8"))["included"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def model_paths(config: RunConfig) -> Iterator[tuple[Key, str]]:
    """Names or folders of models."""
    yield ("model", "llm", "path"), config.model.llm.path
    if config.model.vision is not None:
        for key, encoder in zip(encoder_keys(config), config.model.vision.encoders, strict=True):
            yield (*key, "path"), encoder.path
            if encoder.pretrained is not None:
                yield (*key, "pretrained"), encoder.pretrained
        if config.model.projector.start_path is not None:
            yield ("model", "projector", "pretrained"), config.model.projector.start_path


def encoder_keys(config: RunConfig) -> list[Key]:
    """The key of each encoder, in the order of `model.vision.encoders`."""
    others = 0 if config.model.vision is None else len(config.model.vision.fuse_with)
    return [("model", "vision"), *(("model", "vision", "fuse_with", number) for number in range(others))]


def _paths(config: RunConfig) -> Iterator[tuple[Key, str | None, str]]:
    for name in ("sources", "eval_sources"):
        for number, entry in enumerate(getattr(config.data, name)):
            yield ("data", name, number, "path"), entry.path, "data file"
            yield ("data", name, number, "images"), entry.images, "images folder"
    for number, task in enumerate(config.evaluation.tasks):
        yield ("evaluation", "tasks", number, "path"), task.path, "data file"
        yield ("evaluation", "tasks", number, "images"), task.images, "images folder"
    for number, sample in enumerate(config.train.samples):
        yield ("train", "samples", number, "image"), sample.image, "image"
