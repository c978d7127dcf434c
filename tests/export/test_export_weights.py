"""What an export folder holds, and that it is the trained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_export import model_config, save_run, write_image, write_llm, write_run
from warm import run_warm

from vlm.artifacts.parts import read_run
from vlm.errors import CheckpointError, ConfigError
from vlm.export.run import export_run
from vlm.inference.load import load
from vlm.models.config import ModelConfig
from vlm.models.trainable import trained_weights


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_default_export_holds_what_trained_and_no_base_weights(tmp_path: Path):
    write_run(tmp_path / "run", model_config(tmp_path))
    export = export_run(tmp_path / "run")
    assert export == tmp_path / "run" / "export"
    assert names(export) == {
        "vlm.json", "README.md", "projector.safetensors", "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "preprocessor_config.json",
    }  # fmt: skip
    assert set(load_file(export / "projector.safetensors")) == {
        "projector.layers.0.weight", "projector.layers.0.bias", "projector.feature_mean", "projector.feature_std",
    }  # fmt: skip


@pytest.mark.slow
def test_the_loaded_export_gives_the_logits_of_the_model_that_was_trained(tmp_path: Path):
    built = write_run(tmp_path / "run", model_config(tmp_path))
    loaded = load(export_run(tmp_path / "run"), device="cpu", precision="fp32")
    ids, pixels = torch.arange(3, 13).unsqueeze(0), torch.randn(1, 3, 28, 28)
    ids[0, 2:6] = built.image_token_id
    with torch.no_grad():
        features = built.model.encode_images(pixels)[:, :4]
        expected, found = (
            model.logits(
                model.llm.get_decoder()(inputs_embeds=model.embed(ids, features), use_cache=False).last_hidden_state
            )
            for model in (built.model, loaded.model)
        )
        # merging the adapter changes the order of sums; worst difference seen: 7.4e-6, of logits up to 6
        assert (expected - found).abs().max().item() < 1e-4
        assert (loaded.model.encode_images(pixels) - built.model.encode_images(pixels)).abs().max().item() == 0


@pytest.mark.slow
def test_peft_alone_loads_the_adapter(tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    built = write_run(tmp_path / "run", model_config(tmp_path))
    adapter = export_run(tmp_path / "run") / "adapter"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype=torch.float32)
    ids = torch.arange(3, 13).unsqueeze(0)
    with torch.no_grad():
        plain = base(ids).logits
        found = PeftModel.from_pretrained(base, adapter).eval()(ids).logits
        expected = built.model.llm(ids).logits
    assert (found - expected).abs().max().item() < 1e-5  # worst difference seen: 0
    assert (plain - expected).abs().max().item() > 0.1


@pytest.mark.slow
def test_a_whole_trained_language_model_is_a_folder_that_transformers_loads(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    config = model_config(tmp_path, trainable=["projector", "llm"], lora=None)
    built = write_run(tmp_path / "run", config)
    export = export_run(tmp_path / "run", max_shard_size="20KB")
    shards = sorted((export / "llm").glob("*.safetensors"))
    assert len(shards) > 2
    largest = max(tensor.numel() * 4 for tensor in built.model.llm.parameters())
    assert all(shard.stat().st_size <= max(20_000, largest) + 5_000 for shard in shards)  # a tensor is never split
    ids = torch.arange(3, 13).unsqueeze(0)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(export / "llm")(ids).logits
        assert torch.equal(found, built.model.llm(ids).logits)
    assert not read_run(tmp_path / "run").part("llm.lora")


@pytest.mark.slow
def test_a_full_vlm_folder_honours_the_shard_size_and_needs_no_base_models(tmp_path: Path):
    config = model_config(tmp_path, projector={"kind": "linear", "unshuffle": 2})
    write_run(tmp_path / "run", config)
    image = write_image(tmp_path / "image.png")
    parts = load(export_run(tmp_path / "run"), device="cpu", precision="fp32")
    expected = parts.chat("What?", [image], max_new_tokens=8)
    full = export_run(tmp_path / "run", full=True, max_shard_size="20KB")
    assert len(list((full / "llm").glob("*.safetensors"))) > 2
    for name in ("clip", "llm"):
        (tmp_path / name).rename(tmp_path / f"{name}-moved")
    assert load(full, device="cpu", precision="fp32").chat("What?", [image], max_new_tokens=8) == expected != ""


@pytest.mark.slow
def test_a_timm_encoder_travels_in_a_full_vlm_folder(tmp_path: Path):
    from vlm.compat import prepare

    prepare()
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    vision = {"backend": "timm", "path": "vit_tiny_patch16_224", "pretrained": str(tmp_path / "vit.safetensors"),
              "image_size": 32}  # fmt: skip
    write_run(tmp_path / "run", model_config(tmp_path, vision=vision))
    image = write_image(tmp_path / "image.png")
    expected = load(export_run(tmp_path / "run"), "cpu", "fp32").chat("What?", [image], max_new_tokens=8)
    full = export_run(tmp_path / "run", full=True)
    for name in ("vit.safetensors", "llm"):
        (tmp_path / name).rename(tmp_path / f"{name}-moved")
    assert load(full, "cpu", "fp32").chat("What?", [image], max_new_tokens=8) == expected != ""


@pytest.mark.slow
def test_a_trained_encoder_is_part_of_the_export(tmp_path: Path):
    built = write_run(tmp_path / "run", model_config(tmp_path, trainable=["projector", "vision"], lora=None))
    export = export_run(tmp_path / "run")
    (tmp_path / "clip").rename(tmp_path / "clip-moved")
    loaded = load(export, "cpu", "fp32")
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(loaded.model.encode_images(pixels), built.model.encode_images(pixels))


@pytest.mark.slow
def test_a_plain_language_model_exports_too(tmp_path: Path):
    config = model_config(tmp_path, vision=None, trainable=["llm.lora"])
    write_run(tmp_path / "run", config)
    parts = load(export_run(tmp_path / "run"), "cpu", "fp32").chat("Hello", max_new_tokens=8)
    full = load(export_run(tmp_path / "run", full=True), "cpu", "fp32").chat("Hello", max_new_tokens=8)
    assert parts == full != ""


@pytest.mark.slow
def test_a_language_model_trained_on_plain_text_exports_although_its_template_writes_no_question(tmp_path: Path):
    write_run(tmp_path / "run", model_config(tmp_path, vision=None, trainable=["llm"], lora=None), template="plain")
    assert (export_run(tmp_path / "run") / "vlm.json").is_file()


@pytest.mark.slow
def test_the_second_stage_carries_over_what_only_the_first_trained(tmp_path: Path):
    write_run(tmp_path / "one", model_config(tmp_path, trainable=["projector"], lora=None))
    first = export_run(tmp_path / "one")
    write_run(tmp_path / "two", model_config(tmp_path, trainable=["llm.lora"]), init_from=first, seed=2)
    second = export_run(tmp_path / "two")
    before, after = (load_file(export / "projector.safetensors") for export in (first, second))
    assert all(torch.equal(before[name], after[name]) for name in before)
    manifest = json.loads((second / "vlm.json").read_text())
    assert manifest["included"] == ["projector", "llm.lora"]
    assert manifest["trained"] == ["projector", "llm.lora"]


@pytest.mark.slow
def test_an_adapter_that_the_next_stage_left_alone_is_carried_over(tmp_path: Path):
    write_run(tmp_path / "one", model_config(tmp_path))
    first = export_run(tmp_path / "one")
    two = write_run(
        tmp_path / "two", model_config(tmp_path, trainable=["projector"], lora=None), init_from=first, seed=2
    )
    loaded = load(export_run(tmp_path / "two"), "cpu", "fp32")
    ids = torch.arange(3, 13).unsqueeze(0)
    with torch.no_grad():  # worst difference seen: 0
        assert (loaded.model.llm(ids).logits - two.model.llm(ids).logits).abs().max().item() < 1e-5


@pytest.mark.slow
def test_a_padded_vocabulary_survives_both_kinds_of_export(tmp_path: Path):
    llm = {"path": str(tmp_path / "llm"), "pad_vocab_to_multiple_of": 512}
    built = write_run(tmp_path / "run", model_config(tmp_path, llm=llm))
    ids = torch.arange(3, 13).unsqueeze(0)
    for full in (False, True):
        loaded = load(export_run(tmp_path / "run", full=full), "cpu", "fp32")
        with torch.no_grad():
            found = loaded.model.llm(ids).logits
        assert found.shape[-1] == 512
        assert (found - built.model.llm(ids).logits).abs().max().item() < 1e-4  # worst difference seen: 1.0e-5


@pytest.mark.slow
def test_the_card_names_base_models_data_template_and_what_trained(tmp_path: Path):
    write_run(tmp_path / "run", model_config(tmp_path))
    card = (export_run(tmp_path / "run") / "README.md").read_text()
    for fact in ("| llm |", "| clip (hf)", "| records.json |", "chatml", "projector, llm.lora", "| 7 |"):
        assert fact in card
    assert str(tmp_path) not in card
    assert 'vlm.load("export")' in card
    assert "AutoProcessor" in (export_run(tmp_path / "run", full=True) / "README.md").read_text()


@pytest.mark.slow
def test_the_newest_intact_checkpoint_is_taken(tmp_path: Path):
    config = model_config(tmp_path)
    built = write_run(tmp_path / "run", config)
    newer = {name: tensor + 1 for name, tensor in trained_weights(built.model).items()}
    save_run(tmp_path / "run", config, newer, step=9)
    path = tmp_path / "run" / "checkpoints" / "step-000009" / "weights.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert json.loads((export_run(tmp_path / "run") / "vlm.json").read_text())["origin"]["steps"] == 7


@pytest.mark.slow
def test_kill_9_while_exporting_leaves_the_run_as_it_was_and_the_next_export_works(tmp_path: Path):
    write_run(tmp_path / "run", model_config(tmp_path))
    code, _ = run_warm(export_run, tmp_path / "run", VLM_FAULT="export:weights=kill")
    assert code == -9
    left = [path for path in (tmp_path / "run").iterdir() if "export" in path.name]
    assert [path.name.startswith(".tmp-export-") for path in left] == [True]
    with pytest.raises(CheckpointError, match="is a run, not an export"):
        load(tmp_path / "run")
    export = export_run(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir() if "export" in path.name] == ["export"]
    load(export, "cpu", "fp32")


@pytest.mark.parametrize("size", ["", "5", "many", "-1GB", "5XB"])
def test_a_shard_size_that_is_none_is_refused_before_anything_is_read(size: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="max-shard-size"):
        export_run(tmp_path / "nothing", max_shard_size=size)


def test_what_is_no_run_says_so(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no config\.yaml"):
        export_run(tmp_path)


def test_a_run_without_checkpoint_says_so(tmp_path: Path):
    save_run(tmp_path / "run", model_config(tmp_path), {"projector.x": torch.zeros(1)})
    for path in sorted((tmp_path / "run" / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        export_run(tmp_path / "run")


def test_a_base_model_that_changed_shape_since_the_training_is_named(tmp_path: Path):
    config = model_config(tmp_path)
    write_run(tmp_path / "run", config)
    (tmp_path / "llm").rename(tmp_path / "old")
    write_llm(tmp_path / "llm", width=48)
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_A\.weight: \[4, 32\] -> \[4, 48\]"):
        export_run(tmp_path / "run", full=True)
    assert not (tmp_path / "run" / "export-full").exists()


@pytest.mark.slow
def test_no_file_but_safetensors_holds_weights(tmp_path: Path):
    write_run(tmp_path / "run", model_config(tmp_path))
    for full in (False, True):
        suffixes = {Path(name).suffix for name in names(export_run(tmp_path / "run", full=full))}
        assert suffixes == {".json", ".md", ".safetensors", ".jinja"}


def test_an_exported_config_loads_as_it_was(tmp_path: Path):
    config = model_config(tmp_path)
    write_run(tmp_path / "run", config)
    stored = json.loads((export_run(tmp_path / "run") / "vlm.json").read_text())["model"]
    assert ModelConfig.model_validate(stored) == config
    with safe_open(tmp_path / "run/export/projector.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
