"""What a model's folder says before any of it is loaded. `vlm validate` and loading share these checks and words.

Files are read with json alone; neither torch nor transformers is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.models.spm import pieces
from vlm.models.tokenizer_files import (
    SETTINGS,
    VOCABULARIES,
    VOCABULARY,
    added_tokens,
    find_vocabulary,
    named_tokens,
    read_json,
    why_not_converted,
)

_SWAPPED = "Usually model.llm.path and model.vision.path are swapped"
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json", *VOCABULARIES, "vocab.json", "vocab.txt", "tekken.json", "spiece.model",
    "sentencepiece.bpe.model", "tiktoken.model",
)  # fmt: skip
_RESIZE = (
    "Usually tokens were added and the embedding was not resized: do both once in transformers "
    "(resize_token_embeddings(len(tokenizer)), then save_pretrained) and name the new folder here"
)


_LOOKED_UP = ("bos_token", "eos_token", "pad_token")  # the named tokens that training uses
_WITHOUT_DEFAULTS = ("PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens, from its files."""

    size: int  # ids below it are what text becomes; added tokens may lie beyond
    ids: Mapping[str, int]  # of every token, added ones included
    named: Mapping[str, str]  # "eos_token" -> "</s>", and the others of _LOOKED_UP that the files name
    has_chat_template: bool
    has_no_end: bool  # the files say so; where they say nothing, the tokenizer's class may have one of its own


def why_no_weights(folder: Path) -> str | None:
    """Why a folder has no weights to load, with what to do."""
    if not any(folder.glob("*.safetensors")):
        return (
            "the folder holds no .safetensors. Pickled weights (.bin, .pth) are not loaded, as they can run code: "
            "convert them once with transformers' save_pretrained, then name the new folder here"
        )
    names = set(read_json(folder / _INDEX).get("weight_map", {}).values())
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        return f"{_INDEX} names {missing}, which are not there. Usually the download is incomplete"
    return None


def why_no_tokenizer(folder: Path, trust_remote_code: bool = False) -> str | None:
    """Why a folder has no tokenizer to load, with what to do.

    Args:
        trust_remote_code: the tokenizer may be made by code in the folder, which nothing here looks into.
    """
    if trust_remote_code and "auto_map" in read_json(folder / SETTINGS):
        return None
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return (
            "the folder holds none (tokenizer.json, tokenizer.model, or vocab.json and merges.txt). Usually the "
            "download is incomplete, or the model was saved without its tokenizer"
        )
    vocabulary = find_vocabulary(folder)
    if (folder / "tokenizer.json").is_file() or vocabulary is None:
        return None
    return why_not_converted(vocabulary)


def encoder_type(settings: Mapping[str, Any]) -> object:
    """The model type of a vision tower, also inside the config.json of a model of two towers."""
    tower = settings.get("vision_config")
    if not isinstance(tower, dict):
        return settings.get("model_type")
    return tower.get("model_type", f"{settings.get('model_type')}_vision_model")


def misfit(folder: Path, is_encoder: bool) -> str | None:
    """Why a folder cannot be the encoder, or the language model, by its config.json alone."""
    wanted = "a vision encoder" if is_encoder else "a language model"
    file = folder / "config.json"
    if not file.is_file():
        below = [found.parent for found in sorted(folder.glob("*/config.json"))]
        inside = next((str(child) for child in below if misfit(child, is_encoder) is None), None)
        hint = (
            f"Did you mean {inside}?" if inside else "Usually another folder was meant, or the download is incomplete"
        )
        return f"{folder} holds no config.json, so it is not the folder of {wanted}. {hint}"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{file} is not readable ({str(error)[:100]}). Usually the download is incomplete"
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if not isinstance(kind, str):
        return f"{file} names no model_type, so transformers does not know how to read it"
    names = settings.get("architectures")
    decodes = isinstance(names, list) and any(str(name).endswith("ForCausalLM") for name in names)
    sees = is_encoder_type(kind) and not decodes
    if is_encoder and decodes and "vision_config" not in settings:
        return f"{folder} holds a language model ({kind}), expected {wanted}. {_SWAPPED}"
    if sees and not is_encoder:
        return f"{folder} holds a vision encoder ({kind}), expected {wanted}. {_SWAPPED}"
    return None


def is_encoder_type(model_type: str) -> bool:
    """Whether it is one of transformers' names for models that see.

    >>> is_encoder_type("siglip_vision_model"), is_encoder_type("dinov2"), is_encoder_type("qwen2")
    (True, True, False)
    """
    return model_type.endswith("_vision_model") or model_type.startswith(("clip", "siglip", "dinov", "vit"))


def config_json(folder: Path) -> dict[str, Any]:
    """config.json of a folder that `misfit` found nothing wrong with."""
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return settings


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The tokens that a folder's files name; None where they are in a form that is not read here.

    Raises:
        CheckpointError: a file is not readable.
    """
    whole = folder / "tokenizer.json"
    if whole.is_file():
        values = read_json(whole)
        ids = _model_ids(values.get("model"))
        more = {token["content"]: int(token["id"]) for token in values.get("added_tokens", ())}
    elif (folder / VOCABULARY).is_file():
        ids, more = pieces(folder / VOCABULARY), {}
    else:
        ids, more = read_json(folder / "vocab.json"), {}
    if not ids:
        return None
    added = more | {token.content: number for number, token in added_tokens(folder).items()}
    settings = named_tokens(folder)
    base = [number for name, number in ids.items() if name not in added]
    has_template = bool(settings.get("chat_template")) or any(folder.glob("chat_template.*"))
    named = {key: str(settings[key]) for key in _LOOKED_UP if isinstance(settings.get(key), str)}
    written = read_json(folder / SETTINGS)
    says_none = "eos_token" in written or written.get("tokenizer_class") in _WITHOUT_DEFAULTS
    has_no_end = "eos_token" not in named and says_none
    return Vocabulary(max(base, default=-1) + 1, {**ids, **added}, named, has_template, has_no_end)


def why_beyond_embedding(size: int, ids: Iterable[tuple[str, int | None]], num_rows: int) -> str | None:
    """Why tokens that training will look up have no row in the embedding, with what to do.

    Args:
        size: tokens that text becomes have ids below it.
        ids: (token, id) of others in use: begin, end, padding, the template's control words.
        num_rows: of the embedding.
    """
    if size > num_rows:
        return f"its tokenizer has {size:,} tokens, its embedding {num_rows:,} rows. {_RESIZE}"
    beyond = sorted({(number, token) for token, number in ids if number is not None and number >= num_rows})
    if not beyond:
        return None
    names = ", ".join(f"{token} ({number})" for number, token in beyond)
    return f"its embedding has {num_rows:,} rows, and its tokenizer gives larger ids: {names}. {_RESIZE}"


def _model_ids(model: Any) -> dict[str, int]:
    """token -> id of the `model` part of a tokenizer.json: a dict, or a unigram model's list of [piece, score]."""
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):
        return {str(entry[0]): number for number, entry in enumerate(vocab)}
    return vocab if isinstance(vocab, dict) else {}
