"""Model folders of other programs, read as if they were exports: a language model of transformers, or a LLaVA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vlm.artifacts.llava import LLAVA, read_start
from vlm.artifacts.manifest import LLM, NAME, Manifest, read_manifest
from vlm.errors import CheckpointError
from vlm.models.config import LLMConfig, ModelConfig
from vlm.models.folder import misfit
from vlm.models.tokenizer_files import SETTINGS, read_json


def read_model(folder: Path) -> Manifest:
    """What an export says of itself, or what the files of a plain model folder say.

    Raises:
        CheckpointError: it is neither; or a LLaVA that our parts cannot express.
    """
    settings = read_json(folder / "config.json")
    if (folder / NAME).is_file() or not settings:
        return read_manifest(folder)
    if settings.get("model_type") == LLAVA:
        manifest = read_start(folder)
    elif reason := misfit(folder, is_encoder=False):
        raise CheckpointError(reason)
    elif "vision_config" in settings:
        raise CheckpointError(
            f"{folder} holds a {settings.get('model_type')}, which has an encoder; of such models only LLaVA's layout "
            "is read here. `vlm import` reads more"
        )
    else:
        text = ModelConfig(llm=LLMConfig(path="."), trainable=("llm",))
        manifest = Manifest(text, "tokenizer", None, None, (LLM,), (), full=True)
    end = read_json(folder / "generation_config.json").get("eos_token_id")
    stop_ids = tuple(end) if isinstance(end, list) else () if end is None else (int(end),)
    return with_template(replace(manifest, stop_ids=stop_ids), folder)


def with_template(manifest: Manifest, tokenizer: Path) -> Manifest:
    """Asked with the chat template of a tokenizer's folder."""
    has_one = _has_template(tokenizer) or manifest.layout != LLAVA
    return replace(manifest, template="tokenizer" if has_one else "vicuna")  # as LLaVA-1.5 learned it


def is_plain(folder: Path) -> bool:
    """Whether a folder is no export of this program."""
    return not (folder / NAME).is_file()


def describe(manifest: Manifest) -> str:
    """For a log: what was taken for what."""
    kind = "a LLaVA" if manifest.layout == LLAVA else "a language model"
    return f"{kind} in transformers' layout"


def _has_template(folder: Path) -> bool:
    return any(folder.glob("chat_template.jinja")) or bool(read_json(folder / SETTINGS).get("chat_template"))
