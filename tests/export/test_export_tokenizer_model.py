"""A run whose language model came with `tokenizer.model` alone exports a tokenizer.json, and chats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from tiny_export import model_config, write_image, write_llm, write_run
from tokenizers_for_tests import sentencepiece_model

import vlm
from vlm.export.run import export_run


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_the_export_has_a_tokenizer_json_with_sentencepieces_ids(tmp_path: Path, full: bool):
    from transformers import AutoTokenizer

    llm = write_llm(tmp_path / "llm")
    rows = json.loads((llm / "config.json").read_text())["vocab_size"]
    (llm / "tokenizer.json").unlink()
    (llm / "tokenizer.model").write_bytes(sentencepiece_model(vocab_size=rows - 2))
    names = {rows - 2: "<|im_start|>", rows - 1: "<|im_end|>"}
    added = {str(i): {"content": name, "special": True} for i, name in names.items()}
    settings = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    (llm / "tokenizer_config.json").write_text(json.dumps(settings))
    write_run(tmp_path / "run", model_config(tmp_path))
    export = export_run(tmp_path / "run", full=full)
    assert (export / "tokenizer.json").is_file()
    assert not (export / "tokenizer.model").exists()

    expected = SentencePieceProcessor(model_file=str(llm / "tokenizer.model"))
    stock = AutoTokenizer.from_pretrained(export)
    for text in ("What is this?", "  这是什么？", "emoji 😀 end"):
        assert stock.encode(text, add_special_tokens=False) == expected.encode(text)
    loaded = vlm.load(export, precision="fp32")
    assert isinstance(loaded.chat("What is this?", [write_image(tmp_path / "a.png")], max_new_tokens=3), str)
    assert loaded.conversation_tokenizer.stop_ids == {rows - 1}
