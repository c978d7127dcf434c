"""`vlm prepare-base-model`: the rows of the new tokens, and a base model that trains on dialogues afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_llm
from tokenizers_for_tests import TEXTS, sentencepiece_like

from vlm.artifacts.prepared_base import prepare_base_model
from vlm.cli.main import app
from vlm.cli.process import run
from vlm.data.conversation import Conversation, Turn
from vlm.data.template import TEMPLATES, match_tokenizer_template
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import ConfigError
from vlm.models.llm import load_tokenizer
from vlm.models.weight_files import WeightFiles

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


PLAIN = [text for text in TEXTS if "<|" not in text]


def write_base(folder: Path, rows: int, texts: list[str] = PLAIN, **changes: Any) -> tuple[Path, int]:
    """A Llama without ChatML and without <image>, and how many tokens it has."""
    write_llm(folder, vocab_size=rows, max_position_embeddings=512, **changes)
    tokenizer = sentencepiece_like(texts)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] != "<image>"]
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder, len(load_tokenizer(str(folder), image_token=False))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare", [0, 5], ids=["no spare rows", "new tokens in rows that were padding"])
def test_the_new_tokens_have_the_mean_of_the_old_rows_wherever_they_lie(tmp_path: Path, spare: int, tied: bool):
    size = write_base(tmp_path / "probe", 700)[1]
    base, _ = write_base(tmp_path / "base", size + spare, tie_word_embeddings=tied)
    said = prepare_base_model(base, tmp_path / "new")
    assert f"added <|im_start|>, <|im_end|>, <image> ({size} to {size + 2})" in said
    old, new = WeightFiles(str(base)), WeightFiles(str(tmp_path / "new"))
    rows = -(-(size + max(spare, 3)) // 128) * 128
    for name in [EMBED] if tied else [EMBED, HEAD]:
        assert new[name].shape == (rows, 32)
        assert torch.equal(new[name][:size], old[name][:size])
        mean = old[name][:size].mean(0)
        assert torch.allclose(new[name][size : size + 3], mean.expand(3, 32), atol=1e-7)
        assert torch.equal(new[name][size + 3 : size + spare], old[name][size + 3 :])  # spare rows stay
        assert torch.allclose(new[name][size + max(spare, 3) :], mean, atol=1e-7)
    assert (HEAD in new) != tied
    assert all(torch.equal(old[name], new[name]) for name in old if name not in (EMBED, HEAD))
    assert json.loads((tmp_path / "new/config.json").read_text())["vocab_size"] == rows


def test_the_same_call_again_changes_nothing_and_a_prepared_model_is_prepared_already(tmp_path: Path):
    base, _ = write_base(tmp_path / "base", 700)
    prepare_base_model(base, tmp_path / "new")
    files = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    assert "prepared already: chatml, 768 rows" in prepare_base_model(base, tmp_path / "new")
    assert {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()} == files
    assert "no token is new; 768 -> 768 rows" in prepare_base_model(tmp_path / "new", tmp_path / "again")
    assert {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()} == files
    other, _ = write_base(tmp_path / "other", 700, num_hidden_layers=1)
    with pytest.raises(ConfigError, match="is not overwritten"):
        prepare_base_model(other, tmp_path / "new")


def test_its_template_is_chatml_and_answers_end_with_a_token(tmp_path: Path):
    base, size = write_base(tmp_path / "base", 700)
    prepare_base_model(base, tmp_path / "new")
    tokenizer = load_tokenizer(str(tmp_path / "new"))
    assert match_tokenizer_template(tokenizer).name == "chatml"
    talk = Conversation((Turn("user", ("Hi",)), Turn("assistant", ("Hello",))))
    assert ConversationTokenizer(tokenizer, TEMPLATES["chatml"])(talk).labels[-2] == size + 1
    assert tokenizer("Hi").input_ids[0] == tokenizer.bos_token_id  # a document begins and ends as before
    assert json.loads((tmp_path / "new/generation_config.json").read_text())["eos_token_id"] == [2, size + 1]


def test_a_control_word_that_was_plain_text_of_the_vocabulary_becomes_a_token_with_its_old_id(tmp_path: Path):
    base, _ = write_base(tmp_path / "base", 700, texts=TEXTS)  # which has <|im_start|> often enough to merge it
    number = load_tokenizer(str(base)).get_vocab()["<|im_start|>"]
    assert "added <|im_end|>, <image>" in prepare_base_model(base, tmp_path / "new")
    tokenizer = load_tokenizer(str(tmp_path / "new"))
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == number
    assert number in tokenizer.added_tokens_decoder


def test_a_name_that_is_no_chat_template_is_refused(tmp_path: Path):
    for name in ("plain", "chatlm"):
        with pytest.raises(ConfigError, match=f"--template {name}: expected a chat template: chatml, internlm2"):
            prepare_base_model(write_base(tmp_path / name, 700)[0], tmp_path / "new", template=name)


@pytest.mark.slow
def test_a_base_model_without_an_end_of_reply_trains_once_it_is_prepared(tmp_path: Path, capsys):
    """Before, `vlm validate` refuses it; after, `vlm prove` passes and the loss falls."""
    base, _ = write_base(tmp_path / "base", 700)
    talks = [[("user", "What is this?"), ("assistant", f"A dog {number}.")] for number in range(40)]
    records = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))

    def vlm(verb: str, model: Path) -> int:
        config = {
            "output_dir": str(tmp_path / "run"), "model": {"llm": {"path": str(model)}, "trainable": ["llm"]},
            "data": {"template": "tokenizer" if model != base else "chatml", "max_length": 64,
                     "sources": [{"path": str(tmp_path / "data.jsonl")}], "cache": str(tmp_path / "cache")},
            "train": {"max_steps": 6, "global_batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-2,
                      "precision": "fp32"},
        }  # fmt: skip
        (tmp_path / "config.yaml").write_text(json.dumps(config))
        return run(lambda: app([verb, str(tmp_path / "config.yaml")], standalone_mode=False))

    assert vlm("validate", base) == 2
    assert "<|im_end|>, which is no token of this tokenizer" in capsys.readouterr().err
    assert run(lambda: app(["prepare-base-model", str(base), str(tmp_path / "new")], standalone_mode=False)) == 0
    assert vlm("prove", tmp_path / "new") == 0
    assert vlm("train", tmp_path / "new") == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
              if "loss" in json.loads(line)]  # fmt: skip
    assert losses[-1] < 0.8 * losses[0]
