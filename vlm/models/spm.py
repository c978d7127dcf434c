"""A SentencePiece model file (`tokenizer.model`) as a backend of the library `tokenizers`, without torch.

transformers 5 converts such files as well, but by the class that tokenizer_config.json names: 5.24's LlamaTokenizer
writes other ids than SentencePiece for 9 of 18 texts with a unigram model and for 14 without a dummy prefix, 5.6's
general class for 17; both leave out the begin token unless the folder asks for it. Here the file's own settings decide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vlm.errors import CheckpointError

_UNIGRAM, _BPE = 1, 2  # of TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # of SentencePiece.Type
_BLANK = "▁"
_PROBES = (
    "Hello world, what is this?", "这是什么？红色的圆。", "emoji 😀👩‍🚀 end", "tabs\tand\nnew\n\n  lines",
    "3.14 and 12345", "Привет Ω≈ç", "a  double   blank", "don't [do] {that}",
)  # fmt: skip


def is_sentencepiece(file: Path) -> bool:
    """Whether a file holds a SentencePiece model; tiktoken's vocabularies are often named tokenizer.model too."""
    return _parse(file) is not None


def read_sentencepiece(file: Path, added: Mapping[int, AddedToken], *, add_bos: bool, prefix_once: bool) -> Tokenizer:
    """The backend that encodes as SentencePiece does.

    Args:
        added: id -> token that is found in text as a whole. An id in the vocabulary renames its piece, as InternLM 2
            does with <|im_start|>; ids after it are new tokens, and what they leave out is filled with placeholders.
        add_bos: the file's begin token is put before a text.
        prefix_once: the blank before a text stands at its start only (`legacy: false`), not after every added token
            as well. A text that begins with blanks then has one less.

    Raises:
        CheckpointError: the model is neither BPE nor unigram.
    """
    proto = _parse(file)
    if proto is None or proto.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise CheckpointError(f"{file}: expected a SentencePiece model of type bpe or unigram. Usually a damaged file")
    names = _names(proto, added)
    user_defined = [names[i] for i, piece in enumerate(proto.pieces) if piece.type == _USER_DEFINED and i not in added]
    is_unigram = proto.trainer_spec.model_type == _UNIGRAM
    backend = Tokenizer(_unigram(proto, names) if is_unigram else _bpe(proto, names, bool(user_defined)))
    backend.normalizer = _normalizer(proto.normalizer_spec, prefix_once)
    steps: list[Any] = []
    if proto.normalizer_spec.add_dummy_prefix and prefix_once:
        steps.append(pre_tokenizers.Metaspace(_BLANK, prepend_scheme="first", split=False))
    if user_defined:  # emitted whole, and never merged with what stands beside them
        pattern = "|".join(re.escape(piece) for piece in sorted(user_defined, key=len, reverse=True))
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    if steps:
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = _decoder(proto)
    _add_tokens(backend, proto, names, added)
    bos = proto.trainer_spec.bos_id
    if add_bos and bos >= 0:
        name = names[bos]
        backend.post_processor = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, bos)])
    return backend


def pieces(file: Path) -> dict[str, int]:
    """piece -> id; {} for another kind of file."""
    proto = _parse(file)
    return {} if proto is None else {piece.piece: number for number, piece in enumerate(proto.pieces)}


def special_tokens(file: Path) -> dict[str, str]:
    """{"bos_token": ..., "eos_token": ..., "unk_token": ..., "pad_token": ...}, those that the file has."""
    proto = _parse(file)
    if proto is None:
        return {}
    ids = {name: getattr(proto.trainer_spec, f"{name}_id") for name in ("bos", "eos", "unk", "pad")}
    return {f"{name}_token": proto.pieces[i].piece for name, i in ids.items() if 0 <= i < len(proto.pieces)}


def differences(file: Path, backend: Tokenizer) -> list[str]:
    """Of eight short texts in several scripts, those whose ids are not what SentencePiece itself writes.

    [] for another kind of file, which has no reference here.
    """
    if not is_sentencepiece(file):
        return []
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(file))
    return [text for text in _PROBES if processor.encode(text) != backend.encode(text, add_special_tokens=False).ids]


def _parse(file: Path) -> Any:
    """The file's message, or None if it is something else."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # made when it is imported
    proto = messages.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError:
        return None
    return proto if proto.pieces else None


def _names(proto: Any, added: Mapping[int, AddedToken]) -> list[str]:
    """What each id is called. A name that another piece has renames nothing, else the vocabulary would lose an id."""
    own = [piece.piece for piece in proto.pieces]
    taken = set(own)
    return [added[i].content if i in added and added[i].content not in taken else name for i, name in enumerate(own)]


def _unigram(proto: Any, names: list[str]) -> models.Unigram:
    """Pieces that no text becomes count as the least likely other; with less, unknown characters would count less."""
    least = min(piece.score for piece in proto.pieces if piece.type == _NORMAL)
    hidden = (_UNKNOWN, _CONTROL, _UNUSED, _BYTE)
    scores = [least if piece.type in hidden else piece.score for piece in proto.pieces]
    vocab = list(zip(names, scores, strict=True))
    spec = proto.trainer_spec
    return models.Unigram(vocab, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)


def _bpe(proto: Any, names: list[str], finds_words: bool) -> models.BPE:
    """Merges in the order of the merged pieces' scores, as SentencePiece takes them.

    Args:
        finds_words: a part that is a piece as a whole needs no merges, which user-defined pieces do not have.
    """
    normal = {names[i]: (-piece.score, i) for i, piece in enumerate(proto.pieces) if piece.type == _NORMAL}
    merges = [
        (*rank, piece[:cut], piece[cut:])
        for piece, rank in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=[(left, right) for *_, left, right in sorted(merges)],
        unk_token=names[proto.trainer_spec.unk_id],
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
        ignore_merges=finds_words,
    )


def _normalizer(spec: Any, prefix_once: bool) -> normalizers.Sequence:
    """In SentencePiece's order. Only blanks count as extra white space, line ends do not."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix and not prefix_once:
        steps.append(normalizers.Prepend(_BLANK))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _BLANK))
    return normalizers.Sequence(steps)


def _decoder(proto: Any) -> decoders.Sequence:
    steps: list[Any] = [decoders.Replace(_BLANK, " ")]
    if proto.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())  # Strip would strip every token
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _add_tokens(backend: Tokenizer, proto: Any, names: list[str], added: Mapping[int, AddedToken]) -> None:
    kinds = [piece.type for piece in proto.pieces]
    own = {i: _special(name) for i, name in enumerate(names) if kinds[i] in (_CONTROL, _UNKNOWN)}
    renamed = {i: token for i, token in added.items() if i < len(names) and names[i] == token.content}
    taken = set(names)
    new = {i: token for i, token in added.items() if i >= len(names) and token.content not in taken}
    gaps = {i: _special(f"<|unnamed_{i}|>") for i in range(len(names), max(added, default=-1) + 1)}
    tokens = {**own, **renamed, **gaps, **new}
    backend.add_tokens([tokens[i] for i in sorted(tokens)])


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)
