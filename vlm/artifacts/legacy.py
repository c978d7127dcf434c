"""`vlm convert legacy`: a folder whose model type needed code of its own, as one that transformers has a class for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlm.artifacts.folder import replace_folder
from vlm.artifacts.older import finish_folder
from vlm.artifacts.shards import check_shard_size, num_bytes, write_shards
from vlm.compat import prepare
from vlm.errors import CheckpointError, ConfigError
from vlm.models.folder import config_json, misfit, why_no_tokenizer
from vlm.models.legacy import LEGACY, LegacyFamily, why_not_converted
from vlm.models.llm import load_tokenizer, refuse_beyond_embedding
from vlm.models.native import is_native
from vlm.models.pth_files import PthFolder
from vlm.models.tokenizer_files import SETTINGS, find_vocabulary, read_json, write_converted
from vlm.models.weight_adapter import AdaptedTensors
from vlm.models.weight_files import LazyTensors, WeightFiles

_GENERATION = (
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty",
    "max_new_tokens",
)  # fmt: skip
_OF_CODE = ("auto_map", "tokenizer_class", "_name_or_path", "name_or_path")


def convert_legacy(folder: Path, out: Path, max_shard_size: str = "5GB") -> str:
    """Write weights, config and tokenizer in the native layout. No code of the folder runs.

    Args:
        folder: weights in .safetensors, .bin or .pth, config.json, and the tokenizer's files.
        out: appears complete or not at all.
        max_shard_size: of a weight file, which bounds the memory too.

    Returns:
        what was written, and what it leaves out of the original.

    Raises:
        ConfigError: the model type needs no conversion or has none here, or would compute something else; or `out`
            is taken.
        CheckpointError: a file is missing, damaged, or holds other tensors than the type has.
    """
    check_shard_size(max_shard_size)
    settings, family = _read_config(folder)
    prepare()
    from transformers import AutoConfig

    config = AutoConfig.for_model(family.becomes, **family.settings(settings))
    tensors = family.adapter(settings).to_ours(_open_weights(folder))
    tensors.refuse_unread(str(folder))
    config.architectures = [_compare_shapes(config, tensors, folder)]
    if reason := why_no_tokenizer(folder):
        raise CheckpointError(f"{folder}: cannot convert its tokenizer: {reason}")
    with replace_folder(out) as written:
        _write_tokenizer(folder, written)
        tokenizer = load_tokenizer(str(written))
        refuse_beyond_embedding(tokenizer, config.vocab_size, str(folder))
        config.dtype = tensors[next(iter(tensors))].dtype
        config.save_pretrained(written)
        _write_generation_config(folder, written, tokenizer.eos_token_id)
        sizes = {name: num_bytes(shape, config.dtype) for name, shape in tensors.shapes.items()}
        write_shards(sizes, tensors.__getitem__, written, max_shard_size)
        finish_folder(written)
    note = family.note(settings)
    return f"{out}: {family.title} as {family.becomes}, {len(tensors)} tensors" + (f"\nnote: {note}" if note else "")


def _read_config(folder: Path) -> tuple[dict[str, Any], LegacyFamily]:
    if (problem := misfit(folder, is_encoder=False)) is not None:
        raise ConfigError(problem)
    settings = config_json(folder)
    kind = settings["model_type"]
    if kind not in LEGACY:
        known = ", ".join(LEGACY)
        if is_native(kind):
            raise ConfigError(f"{folder}: transformers has model type {kind}, so model.llm.path takes it as it is")
        raise ConfigError(f"{folder}: there is no conversion of model type {kind!r}; there is of {known}")
    if reason := why_not_converted(settings):
        raise ConfigError(f"{folder}: {LEGACY[kind].title} cannot be converted here: {reason}")
    return settings, LEGACY[kind]


def _open_weights(folder: Path) -> LazyTensors:
    if any(folder.glob("*.safetensors")):
        return WeightFiles(str(folder), "vlm convert legacy")
    return PthFolder(folder)


def _compare_shapes(config: Any, tensors: AdaptedTensors, folder: Path) -> str:
    """The name of the native class. Raises CheckpointError unless it has exactly these tensors."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    expected: Mapping[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected = {
            name: shape for name, shape in expected.items() if name in tensors or not name.startswith("lm_head")
        }
    problems = [
        f"  {name}: {tensors.shapes.get(name, 'missing')}, {type(model).__name__} has {expected.get(name, 'none')}"
        for name in sorted({*expected, *tensors.shapes})
        if expected.get(name) != tensors.shapes.get(name)
    ]
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" * (len(problems) > 10)
        raise CheckpointError(
            f"{folder}: its weights are not those of its config.json:\n"
            + "\n".join(problems[:10])
            + f"{more}\nUsually "
            "a shard is missing, or it is a model with a head of its own (a reward model, a classifier)"
        )
    return type(model).__name__


def _write_tokenizer(folder: Path, target: Path) -> None:
    if not (folder / "tokenizer.json").is_file() and find_vocabulary(folder) is not None:
        write_converted(folder, target)
        return
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    kept = {key: value for key, value in read_json(folder / SETTINGS).items() if key not in _OF_CODE}
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    (target / SETTINGS).write_text(json.dumps(kept, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _write_generation_config(folder: Path, target: Path, eos_token_id: int | None) -> None:
    """What transformers knows of the old one. Where none names an end token, the tokenizer's."""
    from transformers import GenerationConfig

    values = read_json(folder / "config.json") | read_json(folder / "generation_config.json")
    kept = {key: values[key] for key in _GENERATION if values.get(key) is not None}
    GenerationConfig(**{"eos_token_id": eos_token_id, **kept}).save_pretrained(target)
