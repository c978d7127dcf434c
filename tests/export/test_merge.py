"""`vlm merge`: base + peft adapters -> a folder that transformers loads, with the logits of peft's own merge."""

from __future__ import annotations

import gc
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export_llava import write_llava
from tiny_export import model_config, write_clip, write_decoder, write_llm, write_run

from vlm.artifacts import shards
from vlm.artifacts.peft_adapter import match_names, read_peft
from vlm.cli.main import main
from vlm.compat import prepare
from vlm.errors import CheckpointError, ConfigError
from vlm.export.merge import merge_folder
from vlm.export.run import export_run

IDS = torch.arange(3, 23).unsqueeze(0)


def write_adapter(folder: Path, base: Path, seed: int = 0, safe: bool = True, **settings: Any) -> Any:
    """An adapter as peft saves it, all of whose tensors matter. Returns peft's model with it."""
    prepare()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(plain, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(
                    0.2 * torch.randn_like(parameter).abs()
                    if "magnitude" in name
                    else 0.2 * torch.randn_like(parameter)
                )
    model.save_pretrained(folder, safe_serialization=safe)
    return model.eval()


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert len(AutoTokenizer.from_pretrained(folder)) > 100
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llm(tmp_path_factory.mktemp("merge") / "llm", tied=False)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 32},
    },
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ["v_proj", "up_proj"]},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "bin": {"safe": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_folder_has_the_logits_of_pefts_merge(llm: Path, tmp_path: Path, kind: str):
    trained = write_adapter(tmp_path / "adapter", llm, **KINDS[kind])
    merge_folder(llm, [read_peft(tmp_path / "adapter")], tmp_path / "out", max_shard_size="20KB")
    with torch.no_grad():
        adapted, expected = trained(IDS).logits, trained.merge_and_unload()(IDS).logits
    found = logits(tmp_path / "out")
    assert found.equal(expected)
    assert (found - adapted).abs().max() < 1e-4 * adapted.abs().max()
    assert (found - logits(llm)).abs().max() > 0.01


@pytest.mark.slow
def test_weights_are_rounded_once_and_files_of_the_base_travel(llm: Path, tmp_path: Path):
    trained = write_adapter(tmp_path / "adapter", llm)
    (llm / "chat_template.jinja").write_text("{{ messages }}")
    main_with("merge", llm, tmp_path / "adapter", tmp_path / "out", "--dtype", "bf16", "--max_shard_size", "30KB")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = trained.merge_and_unload().to(torch.bfloat16).state_dict()
    assert loaded.dtype == torch.bfloat16
    assert all(tensor.equal(expected[name]) for name, tensor in loaded.state_dict().items())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} < names
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o044 for path in (tmp_path / "out").iterdir())


def main_with(*arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert not end.value.code


@pytest.mark.slow
def test_several_adapters_count_by_their_weights(llm: Path, tmp_path: Path):
    for seed in (1, 2):
        write_adapter(tmp_path / f"a{seed}", llm, seed=seed, r=seed + 1)
    main_with("merge", llm, f"{tmp_path / 'a1'}=0.3", tmp_path / "out", "--adapter", f"{tmp_path / 'a2'}=-1")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llm), tmp_path / "a1", adapter_name="a1")
    model.load_adapter(tmp_path / "a2", adapter_name="a2")
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["a1"] *= 0.3
            module.scaling["a2"] *= -1
    with torch.no_grad():
        expected = model.merge_and_unload(adapter_names=["a1", "a2"])(IDS).logits
    assert (logits(tmp_path / "out") - expected).abs().max() < 1e-5 * expected.abs().max()  # worst seen: 0


@pytest.mark.slow
def test_a_vlm_takes_an_adapter_that_was_trained_on_it_or_on_its_language_model(llm: Path, tmp_path: Path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForImageTextToText

    write_llava(tmp_path / "llava", llm, write_clip(tmp_path / "clip"))
    whole = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "llava"),
        LoraConfig(
            r=2, target_modules=r".*(language_model|vision_tower).*(q_proj|fc1|up_proj)", init_lora_weights=False
        ),
    )
    whole.save_pretrained(tmp_path / "whole")
    write_adapter(tmp_path / "text", llm, target_modules=["q_proj", "k_proj"])
    ids = torch.tensor([[whole.config.image_token_id] * 16 + [5, 6, 7]])
    pixels = torch.randn(1, 3, 28, 28)
    for name, strips in (("whole", False), ("text", True)):
        merge_folder(tmp_path / "llava", [read_peft(tmp_path / name)], tmp_path / f"{name}-out", max_shard_size="50KB")
        base = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava")
        if strips:
            PeftModel.from_pretrained(_text_model(base), tmp_path / name).merge_and_unload()
        else:
            base = PeftModel.from_pretrained(base, tmp_path / name).merge_and_unload()
        found = AutoModelForImageTextToText.from_pretrained(tmp_path / f"{name}-out")
        with torch.no_grad():
            expected, got = (each(input_ids=ids, pixel_values=pixels).logits for each in (base, found))
        assert got.equal(expected)


def _text_model(whole: Any) -> Any:
    """The causal language model of the same modules."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(whole.config.text_config)
    text.model, text.lm_head = whole.model.language_model, whole.lm_head
    return text


@pytest.mark.slow
def test_gpt2_whose_weights_lie_the_other_way_round(tmp_path: Path):
    base = write_decoder(tmp_path / "gpt2", "gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    trained = write_adapter(tmp_path / "adapter", base, target_modules=["c_attn", "c_proj"])
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings | {"fan_in_fan_out": False}))
    merge_folder(base, [read_peft(tmp_path / "adapter")], tmp_path / "out")
    with torch.no_grad():
        assert logits(tmp_path / "out").equal(trained.merge_and_unload()(IDS).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_a_tied_head_that_was_not_trained_with_its_embedding_gets_a_weight_of_its_own(kind, tmp_path: Path, capsys):
    base = write_llm(tmp_path / "llm", tied=True)
    trained = write_adapter(tmp_path / "adapter", base, **kind)
    merge_folder(base, [read_peft(tmp_path / "adapter")], tmp_path / "out")
    with torch.no_grad():
        expected = trained(IDS).logits
    assert (logits(tmp_path / "out") - expected).abs().max() < 1e-4 * expected.abs().max()
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert "has one of its own now" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_that_an_adapter_brings_grow_the_vocabulary(tied: bool, tmp_path: Path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llm = write_llm(tmp_path / "llm", tied=tied)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_tokens(["<new>"])
    plain = AutoModelForCausalLM.from_pretrained(llm)
    plain.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_folder(llm, [read_peft(tmp_path / "adapter")], tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("<new>").input_ids == [len(tokenizer) - 1]
    with torch.no_grad():
        assert logits(tmp_path / "out").equal(model.merge_and_unload()(IDS).logits)


@pytest.mark.slow
def test_the_adapter_of_an_export_brings_its_template_and_what_ends_its_replies(tmp_path: Path):
    write_run(tmp_path / "run", model_config(tmp_path, vision=None, trainable=["llm.lora"]))
    export, full = export_run(tmp_path / "run"), export_run(tmp_path / "run", full=True)
    merge_folder(tmp_path / "llm", [read_peft(export)], tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_text() == (export / "chat_template.jinja").read_text()
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [2]
    assert logits(tmp_path / "out").equal(logits(full))


def test_memory_holds_one_file_of_weights_and_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = write_decoder(tmp_path / "llm", "llama", num_hidden_layers=12, hidden_size=64, intermediate_size=256)
    write_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "up_proj"])
    adapter = read_peft(tmp_path / "adapter")
    gc.collect()
    before, peak = _live_bytes(), []
    write = shards.save_file
    monkeypatch.setattr(shards, "save_file", lambda *a, **k: (peak.append(_live_bytes() - before), write(*a, **k)))
    merge_folder(base, [adapter], tmp_path / "out", max_shard_size="300KB")
    total = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(peak) > 8
    assert total > 2_500_000
    assert max(peak) < 300_000 + 70_000  # and the tensor that is computed, of 64 KB


def _live_bytes() -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors()}
    return sum(storages.values())


def _tensors() -> list[torch.Tensor]:
    return [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter) and not each.is_meta]


def test_modules_are_found_whatever_stands_before_them():
    names = ["language_model.model.layers.3.mlp.up", "vision_tower.encoder.layers.3.mlp.up", "h.0.q", "lm_head"]
    found = match_names(
        ["model.language_model.layers.3.mlp.up", "model.vision_tower.encoder.layers.3.mlp.up", "transformer.h.0.q",
         "language_model.lm_head", "model.layers.4.mlp.up", "other.3.mlp.up"], names,
    )  # fmt: skip
    assert list(found.values()) == names
    assert match_names(["layers.3.mlp.up"], names) == {}  # it may be either


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "other kind": ({"peft_type": "LOHA"}, "peft_type is LOHA, expected LORA"),
    "pissa": ({"init_lora_weights": "pissa"}, "changes the base model too"),
    "experts": ({"target_parameters": ["experts.down"]}, "parameters of experts"),
}


def test_what_cannot_be_merged_is_refused_by_name(llm: Path, tmp_path: Path):
    trained = write_adapter(tmp_path / "adapter", llm, use_dora=True)
    file = tmp_path / "adapter/adapter_config.json"
    settings = json.loads(file.read_text())
    for changes, message in REFUSED.values():
        file.write_text(json.dumps(settings | changes))
        with pytest.raises(CheckpointError, match=message):
            read_peft(tmp_path / "adapter")
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="it is a DoRA"):
        read_peft(tmp_path / "adapter", 0.5)
    other = write_llm(tmp_path / "other", width=16)
    with pytest.raises(CheckpointError, match=r"q_proj: the adapter is of a layer \[32, 32\], the base model's"):
        merge_folder(other, [read_peft(tmp_path / "adapter")], tmp_path / "out")
    (other / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {"bits": 4}}))
    with pytest.raises(CheckpointError, match="quantized weights"):
        merge_folder(other, [read_peft(tmp_path / "adapter")], tmp_path / "out")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    torch.save(trained, tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        read_peft(tmp_path / "adapter")
    assert not (tmp_path / "out").exists()
