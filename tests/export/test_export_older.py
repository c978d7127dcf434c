"""Exports in the words of older programs, readable for whom the umask says, silent about the machine that made them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tiny_export import model_config, write_decoder, write_image, write_llm, write_run

from vlm.artifacts import older
from vlm.artifacts.older import finish_folder, older_rope
from vlm.data.conversation import IMAGE, Conversation, Turn
from vlm.export.run import export_run
from vlm.inference.load import load

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 64}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def text_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".json", ".md", ".jinja")]


# --- settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rope_theta": 1e6}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4}},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.4},
        ),
        (
            {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}},
            {"rotary_emb_base": 1e4, "rotary_pct": 0.4},
        ),
        (
            {"rope_parameters": YARN},
            {
                "rope_theta": 1e6,
                "rope_scaling": {
                    "rope_type": "yarn", "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                },
            },
        ),
        (  # Gemma 3
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
    ],
)  # fmt: skip
def test_older_names_of_rotary_settings(settings: dict[str, Any], expected: dict[str, Any]):
    assert older_rope(settings) == expected


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_a_trained_language_model_s_config_has_them_and_says_the_same_to_transformers_5(full: bool, tmp_path: Path):
    from transformers import AutoConfig

    write_decoder(tmp_path / "llm", "qwen2", rope_parameters=YARN)
    write_run(tmp_path / "run", model_config(tmp_path, vision=None, lora=None, trainable=["llm"]))
    folder = export_run(tmp_path / "run", full=full) / ("." if full else "llm")
    values = read(folder / "config.json")
    assert values["rope_theta"] == 1e6
    assert values["rope_scaling"]["factor"] == 4.0
    found, base = (AutoConfig.from_pretrained(each).rope_parameters for each in (folder, tmp_path / "llm"))
    assert {key: value for key, value in found.items() if key != "type"} == base


def test_names_that_would_change_what_transformers_5_reads_are_left_out(tmp_path: Path, monkeypatch: Any):
    write_decoder(tmp_path / "llm", "llama")
    before = read(tmp_path / "llm" / "config.json")
    monkeypatch.setattr(older, "older_rope", lambda settings: {"rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    finish_folder(tmp_path / "llm")
    assert read(tmp_path / "llm" / "config.json") == before


@pytest.mark.slow
def test_the_tokenizer_is_of_a_class_that_every_transformers_has(tmp_path: Path):
    from transformers import AutoTokenizer

    write_llm(tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|call|>"]})
    tokenizer.save_pretrained(tmp_path / "llm")
    write_run(tmp_path / "run", model_config(tmp_path, lora=None, trainable=["projector"]))
    for full in (False, True):
        export = export_run(tmp_path / "run", full=full)
        settings = read(export / "tokenizer_config.json")
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert settings["additional_special_tokens"] == ["<|call|>"]
        assert "extra_special_tokens" not in settings
        assert "<|call|>" in AutoTokenizer.from_pretrained(export).all_special_tokens


@pytest.mark.slow
def test_what_images_look_like_is_said_where_older_programs_look(tmp_path: Path):
    write_run(tmp_path / "run", model_config(tmp_path))
    for full in (False, True):
        export = export_run(tmp_path / "run", full=full)
        settings, spec = read(export / "preprocessor_config.json"), read(export / "vlm.json")["image_spec"]
        assert settings["image_processor_type"] == "LlavaImageProcessor"
        assert settings["image_mean"] == spec["mean"]
    write_run(tmp_path / "two", model_config(tmp_path, projector={"kind": "linear", "unshuffle": 2}))
    settings = read(export_run(tmp_path / "two", full=True) / "vision" / "preprocessor_config.json")
    assert (settings["size"], settings["do_pad"]) == ({"height": 28, "width": 28}, True)


# --- one begin token


def add_begin_token(folder: Path, tokenizer_class: str) -> None:
    """Let a tokenizer put <|im_start|> before every text, as those of Llama 2 and 3, Mistral and InternLM do."""
    tokenizer = read(folder / "tokenizer.json")
    begin = next(token for token in tokenizer["added_tokens"] if token["content"] == "<|im_start|>")
    step = {"SpecialToken": {"id": begin["content"], "type_id": 0}}
    sequences = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    name = begin["content"]
    template = {
        "type": "TemplateProcessing", "single": [step, sequences[0]], "pair": [step, *sequences],
        "special_tokens": {name: {"id": name, "ids": [begin["id"]], "tokens": [name]}},
    }  # fmt: skip
    trim = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [trim, template]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = read(folder / "tokenizer_config.json")
    settings |= {"tokenizer_class": tokenizer_class, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.one_in(4)
@pytest.mark.slow
@pytest.mark.parametrize("template", ["vicuna", "llama3", "chatml", "plain"])
@pytest.mark.parametrize("full", [False, True])
def test_whoever_tokenizes_a_rendered_prompt_gets_the_ids_of_the_training(template: str, full: bool, tmp_path: Path):
    from transformers import AutoTokenizer

    write_llm(tmp_path / "llm")
    add_begin_token(tmp_path / "llm", "PreTrainedTokenizerFast")
    config = model_config(tmp_path, lora=None, trainable=["projector"])
    if template == "llama3":
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
        tokenizer.add_tokens(["<|eot_id|>"], special_tokens=True)
        config = config.model_copy(update={"llm": config.llm.model_copy(update={"pad_vocab_to_multiple_of": 512})})
        tokenizer.save_pretrained(tmp_path / "llm")
    write_run(tmp_path / "run", config, template=template)
    export = export_run(tmp_path / "run", full=full)
    model, tokenizer = load(export, "cpu", "fp32"), AutoTokenizer.from_pretrained(export)
    ids = model.conversation_tokenizer.prompt(Conversation((Turn("user", ("Is it a dog?",)),)))
    begin = tokenizer.bos_token_id
    assert ids[:2].count(begin) == 1
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Is it a dog?"}], tokenize=False, add_generation_prompt=True
    )
    for settings in ({}, {"add_special_tokens": False}):
        assert tokenizer(text, **settings).input_ids[:2].count(begin) == 1
        if template in (
            "chatml",
            "llama3",
        ):  # others are learned turn by turn, so a blank between turns is another token
            assert tokenizer(text, **settings).input_ids == ids


@pytest.mark.slow
def test_the_processor_of_a_llava_export_adds_no_second_begin_token(tmp_path: Path):
    from PIL import Image
    from transformers import AutoProcessor

    write_llm(tmp_path / "llm")
    add_begin_token(tmp_path / "llm", "PreTrainedTokenizerFast")
    write_run(tmp_path / "run", model_config(tmp_path), template="vicuna")
    export = export_run(tmp_path / "run", full=True)
    processor, image = AutoProcessor.from_pretrained(export, backend="pil"), write_image(tmp_path / "a.png")
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": "Is it?"}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    opened = Image.open(image)
    found = [processor(images=opened, text=text, **settings) for settings in ({}, {"add_special_tokens": False})]
    found.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True))
    begin = processor.tokenizer.bos_token_id
    assert [each["input_ids"][0].count(begin) for each in found] == [1, 1, 1]


@pytest.mark.slow
def test_the_tokenizer_s_own_template_begins_as_it_did(tmp_path: Path):
    from transformers import AutoTokenizer

    from vlm.data.template import TEMPLATES

    write_llm(tmp_path / "llm")
    add_begin_token(tmp_path / "llm", "PreTrainedTokenizerFast")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    tokenizer.chat_template = TEMPLATES["vicuna"].jinja("<|im_start|>", "<|im_end|>", True)
    tokenizer.save_pretrained(tmp_path / "llm")
    write_run(tmp_path / "run", model_config(tmp_path), template="tokenizer")
    model = load(export_run(tmp_path / "run"), "cpu", "fp32")
    ids = model.conversation_tokenizer.prompt(Conversation((Turn("user", (IMAGE, "\nIs it?")),), (b"",)))
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


# --- who may read it, and what


@pytest.mark.slow
def test_files_have_the_modes_that_the_umask_gives(tmp_path: Path):
    before = os.umask(0o027)
    try:
        write_run(tmp_path / "run", model_config(tmp_path, trainable=["projector", "llm.lora"]))
        exports = [export_run(tmp_path / "run", full=full) for full in (False, True)]
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for export in exports for path in export.rglob("*") if path.is_file()}
    assert modes == {0o640}
    assert {path.stat().st_mode & 0o777 for export in exports for path in (export, *export.rglob("*/"))} == {0o750}


def test_checkpoints_and_cached_features_follow_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """None of them changes it, not for a moment: checkpoints are written beside training."""
    import torch

    from vlm.data.features import FeatureStore
    from vlm.train.fragments import save_tensors

    before = os.umask(0o022)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mode: pytest.fail("the umask is changed"))
            save_tensors({"a": torch.zeros(1)}, tmp_path / "weights" / "rank-00000.safetensors")
            store = FeatureStore(tmp_path / "features", "key", torch.float32)
            store.put(b"image", torch.zeros(1, 2, 3))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".data", ".index")]
    assert [file.stat().st_mode & 0o777 for file in files] == [0o644] * 3


@pytest.mark.one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize("unshuffle", [1, 2], ids=["llava", "vlm"])
def test_a_whole_export_names_no_folder_of_the_machine(unshuffle: int, tmp_path: Path):
    config = model_config(tmp_path, projector={"kind": "linear", "unshuffle": unshuffle})
    write_run(tmp_path / "one", config)
    write_run(tmp_path / "two", config, init_from=export_run(tmp_path / "one"))
    export = export_run(tmp_path / "two", full=True)
    assert [path.name for path in text_files(export) if str(tmp_path) in path.read_text()] == []
    parts = export_run(tmp_path / "two")  # needs the base models where they are
    assert [path.name for path in text_files(parts) if str(tmp_path) in path.read_text()] == [
        "vlm.json", "adapter_config.json",
    ]  # fmt: skip
    assert "| started from | export |" in (parts / "README.md").read_text()
