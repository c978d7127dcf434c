"""What an export needs of a run's config, read from the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlm.data.config import DataConfig
from vlm.errors import CheckpointError
from vlm.models.config import ModelConfig
from vlm.objectives import OBJECTIVES
from vlm.objectives.base import ObjectiveConfig

_UNUSABLE = (ValueError, KeyError, TypeError, RecursionError, OSError, yaml.YAMLError, OmegaConfBaseException)


class KeptConfig(NamedTuple):
    """What an export needs of a run's config."""

    model: ModelConfig
    data: DataConfig
    init_from: str | None
    objective: type[ObjectiveConfig]


def read_kept_config(path: Path) -> KeptConfig:
    """Of the config.yaml in a run folder, references resolved in these sections only: others may name secrets.

    Raises:
        CheckpointError: it is not there, or was edited.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} is no run of this program: it has no {path.name}. Name the output_dir of a run"
        )
    try:
        whole: Any = OmegaConf.load(path)
        model, data = (OmegaConf.to_container(whole[name], resolve=True) for name in ("model", "data"))
        init_from = OmegaConf.select(whole, "init_from")
        objective = OBJECTIVES[OmegaConf.select(whole, "objective.kind") or "lm"]
        return KeptConfig(ModelConfig.model_validate(model), DataConfig.model_validate(data), init_from, objective)
    except _UNUSABLE as error:
        reason = str(error).replace("\n", "; ")[:300]
        raise CheckpointError(
            f"{path} cannot be used ({reason}). "
            "It was edited, torn by a kill or a full disk, or written by another version"
        ) from None
