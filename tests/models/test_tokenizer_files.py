"""Folders with `tokenizer.model` and no tokenizer.json, as Llama, InternLM and Baichuan were published."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tiny_models import write_llm
from tokenizers_for_tests import sentencepiece_model

from vlm.data.conversation import Conversation, Turn
from vlm.data.template import TEMPLATES
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import CheckpointError
from vlm.models.llm import IMAGE_TOKEN, load_tokenizer
from vlm.models.spm import differences

TEXTS = [
    "What is this?", "A dog, a cat", "  two blanks before", " one", "blanks after  ", "a  double   blank", "   ", "",
    "这是什么？", "红色的圆。 A circle", "日本語", "emoji 😀👩‍🚀 end",
    "tabs\tand\nnew\n\n  lines", "3.14 and 12345",
    "Ωç Привет", "ﬁ ① full　width", "▁ itself", "x",
]  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "bpe": {},
    "bpe without a blank before": {"add_dummy_prefix": False},
    "bpe, spaces tidied": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "bpe with whole pieces": {"user_defined_symbols": ["<eoh>", "?", "▁▁"], "control_symbols": ["<ctl>"]},
    "unigram": {"kind": "unigram"},
    "unigram as T5's": {
        "kind": "unigram", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True, "vocab_size": 150,
        "byte_fallback": False,
    },
}  # fmt: skip


def write_folder(
    folder: Path, model: bytes | None = None, *, model_type: str = "llama", size: int = 0, **settings: Any
) -> Path:
    """A model folder whose tokenizer is `tokenizer.model` and tokenizer_config.json. `size`: rows of the embedding."""
    if size:
        write_llm(folder, vocab_size=size)
        (folder / "tokenizer.json").unlink()
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model() if model is None else model)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text()) if size else {}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    return folder


def reference(folder: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def token(content: str) -> dict[str, Any]:
    """As added_tokens_decoder of older transformers holds one."""
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": True}
    return {"__type": "AddedToken", "content": content, **flags}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_ids_and_text_are_those_of_sentencepiece_itself(tmp_path: Path, options: dict[str, Any]):
    folder = write_folder(tmp_path / "llm", sentencepiece_model(**options), tokenizer_class="LlamaTokenizer")
    expected, tokenizer = reference(folder), load_tokenizer(str(folder))
    assert len(tokenizer) == expected.vocab_size() + 1  # <image>
    for text in TEXTS:
        ids = expected.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        if expected.unk_id() not in ids:  # SentencePiece shows an unknown piece as ⁇
            assert tokenizer.decode(ids) == expected.decode(ids), text
    assert differences(folder / "tokenizer.model", tokenizer.backend_tokenizer) == []


def test_what_is_not_in_the_vocabulary_becomes_its_bytes_and_comes_back(tmp_path: Path):
    tokenizer = load_tokenizer(str(write_folder(tmp_path / "llm")))
    ids = tokenizer.encode("😀", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert tokenizer.decode(ids) == "😀"


def test_llama_2_begins_texts_and_has_a_padding_token(tmp_path: Path):
    """Its tokenizer_config.json names tokens as objects; <pad> has the id 421, and 420 is nobody's."""
    added = {str(i): token(name) for i, name in enumerate(["<unk>", "<s>", "</s>"])} | {"421": token("<pad>")}
    folder = write_folder(
        tmp_path / "llm", tokenizer_class="LlamaTokenizer", legacy=False, bos_token=token("<s>"),
        eos_token=token("</s>"), unk_token=token("<unk>"), pad_token="<pad>", added_tokens_decoder=added,
    )  # fmt: skip
    tokenizer = load_tokenizer(str(folder))
    assert reference(folder).vocab_size() == 420
    assert tokenizer("A dog").input_ids == [1, *reference(folder).encode("A dog")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 421)
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == 422
    assert tokenizer.encode("a</s>a", add_special_tokens=False)[1] == 2  # and no blank after it, as legacy is false
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a</s>a", add_special_tokens=False)) == ["▁a", "</s>", "a"]


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_a_begin_token_is_put_in_front_unless_the_folder_says_no(tmp_path: Path, settings: dict[str, Any]):
    folder = write_folder(tmp_path / "llm", **settings)
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer("A dog").input_ids[0] == 1) == settings.get("add_bos_token", True)


INTERNLM = {
    "tokenizer_class": "InternLM2Tokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
}


@pytest.mark.parametrize("trusts", [False, True])
def test_internlm_renames_unused_pieces_and_its_code_does_not_run(tmp_path: Path, trusts: bool):
    unused = [f"[UNUSED_TOKEN_{n}]" for n in (145, 146)]
    model = sentencepiece_model(user_defined_symbols=unused)
    ids = [SentencePieceProcessor(model_proto=model).piece_to_id(piece) for piece in unused]
    added = {str(ids[0]): token("<|im_end|>"), str(ids[1]): token("<|im_start|>")}
    folder = write_folder(
        tmp_path / "llm", model, model_type="internlm3", added_tokens_decoder=added, eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], **INTERNLM,
    )  # fmt: skip
    (folder / "tokenization_internlm2.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trusts)
    assert not (tmp_path / "marker").exists()
    assert len(tokenizer) == reference(folder).vocab_size() + 1
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]) == ids
    talk = Conversation((Turn("user", ("A dog <|im_end|>",)), Turn("assistant", ("A cat",))))
    example = ConversationTokenizer(tokenizer, TEMPLATES["internlm2"])(talk)
    assert example.input_ids[:2] == [1, ids[1]]
    assert example.input_ids.count(ids[0]) == 2  # of the template; what the user typed is text
    assert example.labels[-2] == ids[0]


def test_names_of_added_tokens_json_and_of_special_tokens_map_are_read(tmp_path: Path):
    folder = write_folder(tmp_path / "llm", tokenizer_class="BaichuanTokenizer")
    size = reference(folder).vocab_size()
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size, "<|im_end|>": size + 1}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<image>"]) == [size, size + 1, size + 2]
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<s>")


def test_text_inside_a_conversation_keeps_the_blanks_that_a_whole_text_would_lose(tmp_path: Path):
    tidied = sentencepiece_model(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    tokenizer = load_tokenizer(str(write_folder(tmp_path / "llm", tidied)))
    talk = Conversation((Turn("user", ("Hello",)), Turn("assistant", ("Hi there",))))
    ids = ConversationTokenizer(tokenizer, TEMPLATES["vicuna"])(talk).input_ids
    assert tokenizer.decode(ids).endswith(" USER: Hello ASSISTANT: Hi there</s>")


def test_a_file_of_another_kind_is_refused_with_its_name(tmp_path: Path):
    for content, problem in (
        (b"\x00\x01damaged", "tokenizer.model is neither a SentencePiece model nor a tiktoken vocabulary"),
        (sentencepiece_model("word", 10, byte_fallback=False), "expected a SentencePiece model of type bpe or unigram"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            load_tokenizer(str(write_folder(tmp_path / "llm", content)))


def test_a_tokenizer_json_is_enough_where_the_class_is_of_foreign_code(tmp_path: Path):
    folder = write_llm(tmp_path / "llm")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | INTERNLM
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": {"AutoConfig": "x.X"}}))
    assert load_tokenizer(str(folder)).encode("a b", add_special_tokens=False) == [2, 3]


# tiktoken

PATTERN = (  # of Llama 3 and GLM-4
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = [b"th", b"the", b" the", b" d", b"og", b" dog", "这".encode(), b"12", b"123"]
RANKS = {word: rank for rank, word in enumerate([*(bytes([byte]) for byte in range(256)), *WORDS])}


def tiktoken_file() -> bytes:
    return b"".join(base64.b64encode(word) + b" %d\n" % rank for word, rank in RANKS.items())


def test_a_tiktoken_vocabulary_of_a_known_type_gives_tiktokens_ids(tmp_path: Path):
    import tiktoken

    added = {"266": token("<|begin|>"), "268": token("<|im_end|>")}
    folder = write_folder(
        tmp_path / "llm", tiktoken_file(), added_tokens_decoder=added, bos_token="<|begin|>", eos_token="<|im_end|>"
    )
    tokenizer = load_tokenizer(str(folder))
    expected = tiktoken.Encoding("test", pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens={})
    for text in ["the dog and the dogs", "这是什么？", "12345", "  \n\n x", "😀", "don't"]:
        assert tokenizer.encode(text, add_special_tokens=False) == expected.encode(text), text
    assert tokenizer.convert_tokens_to_ids(["<|begin|>", "<|im_end|>", "<image>"]) == [266, 268, 269]


def test_a_tiktoken_vocabulary_of_another_type_is_refused_since_its_words_are_unknown(tmp_path: Path):
    folder = write_folder(tmp_path / "llm", tiktoken_file(), model_type="deepseek_v3")
    with pytest.raises(CheckpointError, match=r"tiktoken vocabulary.*'deepseek_v3'.*Put a tokenizer\.json beside it"):
        load_tokenizer(str(folder))
