"""Chat, page, server and evaluation take a plain model folder, and a base model with a peft adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_export_llava import write_llava
from test_merge import write_adapter
from tiny_export import model_config, write_clip, write_image, write_llm, write_run

from vlm.apps.web.models import ModelStore, find_exports
from vlm.artifacts.peft_adapter import read_peft
from vlm.cli.main import main
from vlm.data.template import TEMPLATES
from vlm.errors import CheckpointError, ConfigError
from vlm.export.merge import merge_folder
from vlm.export.run import export_run
from vlm.inference.load import load
from vlm.inference.messages import to_conversation

CHATML = TEMPLATES["chatml"].jinja("<|im_start|>", "<|im_end|>", False)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with a chat template, and `adapter` beside it."""
    folder = write_llm(tmp_path_factory.mktemp("plain") / "llm", tied=False)
    (folder / "chat_template.jinja").write_text(CHATML)
    write_adapter(folder.parent / "adapter", folder, target_modules=["q_proj", "down_proj"])
    return folder


@pytest.mark.slow
def test_a_language_model_answers_before_and_after_an_adapter(llm: Path, tmp_path: Path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = llm.parent / "adapter"
    merge_folder(llm, [read_peft(adapter)], tmp_path / "merged")
    answers = {}
    for folder, options in ((llm, []), (llm, ["--adapter", str(adapter)]), (tmp_path / "merged", [])):
        with pytest.raises(SystemExit):
            main(["chat", str(folder), "-p", "What is this?", "--max-new-tokens", "8", "--dtype", "fp32", *options])
        out, err = capsys.readouterr()
        answers[folder.name, bool(options)] = out.strip()
        assert "a language model in transformers' layout, template chatml" in err
        assert ("with the adapter" in err) == bool(options)
    assert answers["llm", True] == answers["merged", False] != answers["llm", False]
    tokenizer, model = AutoTokenizer.from_pretrained(llm), AutoModelForCausalLM.from_pretrained(llm)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is this?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reply = model.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(reply, skip_special_tokens=True).strip() == answers["llm", False]


@pytest.mark.slow
def test_the_page_offers_the_model_with_and_without_the_adapter(llm: Path):
    adapter = llm.parent / "adapter"
    store = ModelStore(find_exports(llm, None, adapter), device="cpu", template="chatml")
    assert [label.rpartition("/")[2] for label in store.labels] == ["llm", "adapter"]
    before, after = (store.get(number).model.llm.state_dict() for number in (0, 1))
    changed = {name.split(".")[-2] for name in before if not before[name].equal(after[name])}
    assert changed == {"q_proj", "down_proj"}


@pytest.mark.slow
def test_a_plain_base_with_an_exports_adapter_is_asked_as_the_export_is(tmp_path: Path, capsys):
    """The base's own template says something else: another system prompt, and other marks."""
    config = model_config(tmp_path, vision=None, trainable=["llm.lora"])
    (tmp_path / "llm" / "chat_template.jinja").write_text(TEMPLATES["vicuna"].jinja("<s>", "</s>", False))
    write_run(tmp_path / "run", config)
    whole = json.loads((tmp_path / "run" / "config.yaml").read_text())
    whole["data"]["system"] = "Be brief."
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(whole))
    export = load(export_run(tmp_path / "run"), "cpu", "fp32")
    adapted = load(tmp_path / "llm", "cpu", "fp32", adapter=tmp_path / "run" / "export")
    asked = [to_conversation("Hello", (), export.template)]
    asked.append(
        to_conversation(
            [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "What?"}], (), export.template
        )
    )
    for conversation in asked:
        prompts = [model.conversation_tokenizer.prompt(conversation) for model in (export, adapted)]
        assert prompts[0] == prompts[1]
        assert "<|im_start|>" in export.tokenizer.decode(prompts[0])
    assert "Be brief." in export.tokenizer.decode(export.conversation_tokenizer.prompt(asked[0]))
    assert adapted.conversation_tokenizer.stop_ids == export.conversation_tokenizer.stop_ids
    assert adapted.chat("Hello", max_new_tokens=8) == export.chat("Hello", max_new_tokens=8)
    assert "template chatml; with the adapter and the prompts of the export" in capsys.readouterr().err
    assert (
        load(tmp_path / "llm", "cpu", "fp32", adapter=tmp_path / "run" / "export", template="vicuna").template.name
        == "vicuna"
    )


@pytest.mark.slow
def test_another_programs_llava_is_asked_about_an_image(llm: Path, tmp_path: Path, capsys):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    folder = tmp_path / "llava"
    write_llava(folder, llm, write_clip(tmp_path / "clip"))
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    write_adapter(tmp_path / "adapter", llm, target_modules=["v_proj"])
    image, ids = write_image(tmp_path / "image.png"), None
    for adapter in (None, tmp_path / "adapter"):
        ours = load(folder, "cpu", "fp32", adapter=adapter)
        assert ours.chat("What?", [image], max_new_tokens=4) is not None
        ids = torch.tensor([[ours.image_token_id] * 16 + [5, 6, 7]])
        pixels = torch.randn(1, 3, 28, 28)
        source = folder
        if adapter is not None:
            merge_folder(folder, [read_peft(adapter)], tmp_path / "merged")
            source = tmp_path / "merged"
        whole = AutoModelForImageTextToText.from_pretrained(source)
        with torch.no_grad():
            expected = whole(input_ids=ids, pixel_values=pixels).logits[0]
            found = ours.model.logits(ours.model(ids, torch.arange(19)[None], pixels))[0]
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert "a LLaVA in transformers' layout, template chatml" in capsys.readouterr().err


def longer_tokenizer(base: Path, folder: Path, grows: bool = False) -> Path:
    """An adapter with a tokenizer of its own, whose end token is new; `grows`: and the embedding that it needs."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.chat_template = TEMPLATES["vicuna"].jinja("<s>", "</s>", False)
    model = AutoModelForCausalLM.from_pretrained(base)
    if grows:
        model.resize_token_embeddings(len(tokenizer))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder, save_embedding_layers=grows)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_that_brings_a_tokenizer_and_tokens_answers_as_what_it_is_merged_to(tied: bool, tmp_path: Path):
    base = write_llm(tmp_path / "llm", tied=tied)
    adapter = longer_tokenizer(base, tmp_path / "adapter", grows=True)
    adapted = load(base, "cpu", "fp32", adapter=adapter)
    merge_folder(base, [read_peft(adapter)], tmp_path / "merged")
    merged = load(tmp_path / "merged", "cpu", "fp32")
    said = (("user", "Who?"), ("assistant", "I."), ("user", "Why?"))
    turns = [{"role": role, "content": text} for role, text in said]
    conversation = to_conversation(turns, (), adapted.template)
    prompts = [model.conversation_tokenizer.prompt(conversation) for model in (adapted, merged)]
    assert prompts[0] == prompts[1]
    assert adapted.template.name == "vicuna"
    assert adapted.conversation_tokenizer.stop_ids == merged.conversation_tokenizer.stop_ids
    assert len(adapted.tokenizer) - 2 in prompts[0]  # </s>; the last is <image>, which needs no row
    logits = [model.model.llm(torch.tensor(prompts[:1])).logits for model in (adapted, merged)]
    assert logits[0].shape[-1] == len(adapted.tokenizer) - 1
    assert logits[0].equal(logits[1])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_an_adapter_of_a_tied_embedding_answers_as_what_it_is_merged_to(tmp_path: Path, settings: dict[str, list[str]]):
    base = write_llm(tmp_path / "llm", tied=True)
    write_adapter(tmp_path / "adapter", base, **settings)
    merge_folder(base, [read_peft(tmp_path / "adapter")], tmp_path / "merged")
    models = (
        load(base, "cpu", "fp32", adapter=tmp_path / "adapter", template="chatml"),
        load(tmp_path / "merged", "cpu", "fp32", template="chatml"),
    )
    ids = torch.arange(3, 23)[None]
    assert models[0].model.llm(ids).logits.equal(models[1].model.llm(ids).logits)


def test_what_is_no_model_is_refused_with_what_to_do(llm: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"has no vlm\.json"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="holds a vision encoder"):
        load(write_clip(tmp_path / "clip"))
    bare = write_llm(tmp_path / "bare", tied=True)
    with pytest.raises(ConfigError, match=r"no chat template.*--prompt-template NAME"):
        load(bare, "cpu")
    with pytest.raises(CheckpointError, match=r"does not fit the base model:\n  model\.layers"):
        load(write_llm(tmp_path / "narrow", width=16), "cpu", adapter=llm.parent / "adapter", template="chatml")
    with pytest.raises(ConfigError, match="its tokenizer gives larger ids: </s>"):
        load(bare, "cpu", adapter=longer_tokenizer(bare, tmp_path / "tokens"), template="chatml")
    (bare / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "vision_config": {}}))
    with pytest.raises(CheckpointError, match="qwen2_vl, which has an encoder"):
        load(bare, "cpu")
