"""config.json files kept beside the shipped projects, so that `vlm plan` knows the models they name without a network.

A model lies in `projects/shapes/` under its path, each / written as --: Qwen/Qwen3-8B in Qwen--Qwen3-8B. So does one
that a recipe makes on its way (cache/ckpt/baichuan-7b-chatml): its shape is known before it is there.
"""

from __future__ import annotations

from pathlib import Path

from vlm.config import RunConfig, project_folders
from vlm.schema import Section, is_local

SHAPES = "shapes"  # a folder of projects/


def with_kept_shapes(config: RunConfig) -> RunConfig:
    """The config with the kept folder in the place of each model that is neither on this disk nor downloaded before.

    What is here goes first, so that a plan is of the model that a run would read.
    """
    model = config.model
    changed: dict[str, Section] = {"llm": model.llm.model_copy(update={"path": _settled(model.llm.path)})}
    if model.vision is not None:
        encoders = [each.model_copy(update={"path": _settled(each.path)}) for each in model.vision.encoders]
        changed["vision"] = model.vision.with_encoders(encoders)
    return config.model_copy(update={"model": model.model_copy(update=changed)})


def kept_line(config: RunConfig) -> str:
    """What `vlm plan` says of the models whose kept shapes it takes; "" where it takes none."""
    vision = config.model.vision
    paths = [config.model.llm.path, *(each.path for each in (vision.encoders if vision else ()))]
    homes = [folder / SHAPES for folder in project_folders()]
    names = [Path(path).name.replace("--", "/") for path in paths if Path(path).parent in homes]
    if not names:
        return ""
    return f"shape as kept in projects/{SHAPES}, as it is not on this machine: {', '.join(dict.fromkeys(names))}"


def _settled(path: str) -> str:
    kept = (folder / SHAPES / path.replace("/", "--") for folder in project_folders())
    found = next((folder for folder in kept if (folder / "config.json").is_file()), None)
    return path if found is None or Path(path).exists() or _is_downloaded(path) else str(found)


def _is_downloaded(path: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return not is_local(path) and isinstance(try_to_load_from_cache(path, "config.json"), str)
