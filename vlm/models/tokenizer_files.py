"""The tokenizer of a model folder that has `tokenizer.model` or `qwen.tiktoken` and no tokenizer.json: its conversion.

Its class in tokenizer_config.json does not matter: many are of code beside the weights (Baichuan, InternLM 2), and in
transformers 5 the class decides more than the vocabulary's own settings do (see `vlm.models.spm`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, processors

from vlm.errors import CheckpointError
from vlm.models.spm import is_sentencepiece, pieces, read_sentencepiece, special_tokens

_TIKTOKEN_CACHE = "TIKTOKEN_CACHE_DIR"  # empty: none
VOCABULARY = "tokenizer.model"
VOCABULARIES = (VOCABULARY, "qwen.tiktoken")  # in this order
SETTINGS = "tokenizer_config.json"
# files that transformers reads beside tokenizer.json; the first three may name added tokens
COMPANIONS = (SETTINGS, "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "config.json")
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_KEPT = (
    *NAMED, "additional_special_tokens", "extra_special_tokens", "add_bos_token", "add_eos_token", "chat_template",
    "model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces",
)  # fmt: skip
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")
# A tiktoken file does not say how text is cut into words. These model types cut it as transformers' converter does.
_TIKTOKEN_TYPES = ("llama", "glm", "glm4", "chatglm")


@dataclass(frozen=True)
class _FromCode:
    """What the tokenizer code of a model type says, and no file of its folders."""

    tokens: tuple[str, ...] = ()
    """After the vocabulary, in this order, unless the files name tokens there."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Of these those that no file names."""
    prefixes: tuple[tuple[str, ...], ...] = ()
    """Before a text: the first of which it has all tokens."""
    adds_begin: bool = True
    """The begin token of a SentencePiece vocabulary stands before a text."""
    words: str | None = None
    """The pattern of the words that a tiktoken vocabulary's text is cut into; None: that of transformers' converter."""


# as Qwen-7B's tokenization_qwen.py and ChatGLM2 and 3's tokenization_chatglm.py have them
_FROM_CODE: dict[str, _FromCode] = {
    "qwen": _FromCode(
        tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))),
        named={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        words=(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        ),
    ),
    "chatglm": _FromCode(  # GLM-4's files name its tokens themselves
        tokens=(
            "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
        ),
        named={"pad_token": "<unk>"},
        prefixes=(("[gMASK]", "sop"), ("[gMASK]", "<sop>")),
        adds_begin=False,
    ),
}  # fmt: skip


def why_not_converted(file: Path) -> str | None:
    """Why a vocabulary is of no use here, with what to do; None for a SentencePiece model or a known tiktoken.

    Args:
        file: in a folder with the model's config.json.
    """
    if is_sentencepiece(file):
        return None
    with file.open("rb") as opened:
        is_tiktoken = _TIKTOKEN_LINE.match(opened.read(300)) is not None
    if not is_tiktoken:
        return f"{file.name} is neither a SentencePiece model nor a tiktoken vocabulary. Usually the file is damaged"
    kind = _model_type(file.parent)
    if kind in _TIKTOKEN_TYPES or _from_code(file.parent).words is not None:
        return None
    return (
        f"{file.name} is a tiktoken vocabulary, which does not say how text is cut into words, and for model type "
        f"{kind!r} that is known to the model's own code only. Put a tokenizer.json beside it, which that code's "
        "authors or transformers' save_pretrained may have written"
    )


def find_vocabulary(folder: Path) -> Path | None:
    """The file that a tokenizer.json can be made of; None where there is none."""
    return next((folder / name for name in VOCABULARIES if (folder / name).is_file()), None)


def write_converted(folder: Path, target: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json from a folder's vocabulary, for `PreTrainedTokenizerFast`.

    Begin and end tokens that no file names are those of the vocabulary. SentencePiece tokenizers put the begin token
    before a text unless the folder says `add_bos_token: false`, as the classes they were published with do.

    Raises:
        CheckpointError: it cannot be converted, with the reason and what to do.
    """
    file = find_vocabulary(folder) or folder / VOCABULARY
    if reason := why_not_converted(file):
        raise CheckpointError(f"{folder}: {reason}")
    settings, code = named_tokens(folder), _from_code(folder)
    added = added_tokens(folder)
    if is_sentencepiece(file):
        settings.setdefault("add_bos_token", "bos_token" in settings and code.adds_begin)
        once = settings.get("legacy") is False
        added = _with_tokens_of_code(code, len(pieces(file)), added)
        backend = read_sentencepiece(file, added, add_bos=bool(settings["add_bos_token"]), prefix_once=once)
    else:
        backend = _read_tiktoken(file, code, added)
    _put_prefix(backend, code)
    target.mkdir(parents=True, exist_ok=True)
    backend.save(str(target / "tokenizer.json"))
    kept: dict[str, Any] = {key: settings[key] for key in _KEPT if settings.get(key) is not None}
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    (target / SETTINGS).write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
    template = folder / "chat_template.jinja"
    if template.is_file():
        (target / template.name).write_bytes(template.read_bytes())


def named_tokens(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with the named tokens of special_tokens_map.json, and of `tokenizer.model`, filled in.

    Named tokens are plain text here, whichever form the files give them.
    """
    settings = read_json(folder / SETTINGS)
    named = read_json(folder / "special_tokens_map.json")
    is_needed = (folder / VOCABULARY).is_file() and not (folder / "tokenizer.json").is_file()
    own = special_tokens(folder / VOCABULARY) if is_needed else {}
    of_code = _from_code(folder).named if is_needed or (folder / VOCABULARIES[1]).is_file() else {}
    for key in NAMED:
        value = settings.get(key, named.get(key, of_code.get(key, own.get(key))))
        settings[key] = value.get("content") if isinstance(value, dict) else value
        if settings[key] is None:
            del settings[key]
    if "additional_special_tokens" in named:
        settings.setdefault("additional_special_tokens", named["additional_special_tokens"])
    return settings


def added_tokens(folder: Path) -> dict[int, AddedToken]:
    """id -> token that is found in text as a whole, as tokenizer_config.json and added_tokens.json name them."""
    decoder: Mapping[str, Any] = read_json(folder / SETTINGS).get("added_tokens_decoder") or {}
    older = {str(number): name for name, number in read_json(folder / "added_tokens.json").items()}
    found = {}
    for number, token in {**older, **decoder}.items():
        options = dict(token) if isinstance(token, dict) else {"content": token, "special": True}
        options.pop("__type", None)
        options["normalized"] = False  # else the blank before a text would have to stand before the token as well
        found[int(number)] = AddedToken(**options)
    return found


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; {} for a file that is not there.

    Raises:
        CheckpointError: it is something else.
    """
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not readable ({str(error)[:100]}). Usually the download is incomplete"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found a {type(values).__name__}")
    return values


def _model_type(folder: Path) -> Any:
    return read_json(folder / "config.json").get("model_type")


def _from_code(folder: Path) -> _FromCode:
    return _FROM_CODE.get(str(_model_type(folder)), _FromCode())


def _with_tokens_of_code(code: _FromCode, size: int, added: Mapping[int, AddedToken]) -> dict[int, AddedToken]:
    """Id -> added token. Where the files name tokens after the vocabulary, they name all."""
    if any(number >= size for number in added):
        return dict(added)
    tokens = {size + n: AddedToken(text, special=True, normalized=False) for n, text in enumerate(code.tokens)}
    return {**added, **tokens}


def _put_prefix(backend: Tokenizer, code: _FromCode) -> None:
    for prefix in code.prefixes:
        ids = [(token, backend.token_to_id(token)) for token in prefix]
        if all(number is not None for _, number in ids):
            backend.post_processor = processors.TemplateProcessing(single=[*prefix, "$A"], special_tokens=ids)
            return


def _read_tiktoken(file: Path, code: _FromCode, added: Mapping[int, AddedToken]) -> Tokenizer:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    # tiktoken keeps what it reads below the temporary folder, by path alone: another file of that path would be unread
    before = os.environ.get(_TIKTOKEN_CACHE)
    os.environ[_TIKTOKEN_CACHE] = ""
    try:
        options = {} if code.words is None else {"pattern": code.words}
        backend: Tokenizer = TikTokenConverter(str(file), **options).converted()
    finally:
        os.environ.pop(_TIKTOKEN_CACHE)
        if before is not None:
            os.environ[_TIKTOKEN_CACHE] = before
    if code.words is not None:
        backend.normalizer = normalizers.NFC()
    added = _with_tokens_of_code(code, backend.get_vocab_size(), added)
    last = max(added, default=-1)
    for number in range(backend.get_vocab_size(), last + 1):
        unnamed = AddedToken(f"<|unnamed_{number}|>", special=True, normalized=False)
        backend.add_tokens([added.get(number, unnamed)])
    return backend
