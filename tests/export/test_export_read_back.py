"""An export is read back before it is called one, and what could not be read back is written so that it can."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_export import model_config, write_decoder, write_run

from vlm.errors import CheckpointError
from vlm.export import hf, read_back
from vlm.export import run as weights
from vlm.export.read_back import Answers, differences
from vlm.export.run import export_run
from vlm.inference.load import load
from vlm.models.build import Assembled

HEADS_WITH_BIAS = {"phi": {}, "gptj": {"rotary_dim": 4}, "codegen": {"rotary_dim": 4}}
VOCABULARIES = {  # what the embedding is called differs
    "qwen2": {}, "gpt_neox": {}, "gpt2": {}, "bloom": {"n_head": 4}, "gptj": {"rotary_dim": 4},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
}  # fmt: skip


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        return model.logits(model(ids, torch.arange(12)[None]))


def assert_equal(built: Assembled, export: Path) -> None:
    expected = logits_of(built.model)
    found = logits_of(load(export, "cpu", "fp32").model)[..., : expected.shape[-1]]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


# --- the check


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_a_weight_that_is_not_the_trained_one_stops_the_export(full: bool, tmp_path: Path, monkeypatch: Any):
    run = write_run(tmp_path / "run", model_config(tmp_path, projector={"kind": "mlp", "depth": 2}))
    assert run.model.projector is not None
    name = "model.safetensors" if full else "projector.safetensors"

    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        key = next(key for key in tensors if "projector" in key and "bias" in key)
        tensors[key] = tensors[key] + 0.1
        save_file(tensors, folder / name, metadata={"format": "pt"})

    monkeypatch.setattr(weights, "finish_folder", damage)
    with pytest.raises(CheckpointError, match="the features of an image differ by up to 0"):
        export_run(tmp_path / "run", full=full)
    assert not [path for path in (tmp_path / "run").iterdir() if "export" in path.name]


@pytest.mark.slow
def test_an_export_that_does_not_load_says_why_and_an_older_one_stays(tmp_path: Path, monkeypatch: Any):
    write_run(tmp_path / "run", model_config(tmp_path))
    export = export_run(tmp_path / "run")
    before = (export / "vlm.json").read_bytes()
    monkeypatch.setattr(weights, "finish_folder", lambda folder: (folder / "projector.safetensors").unlink())
    with pytest.raises(CheckpointError, match=r"cannot be read back: .*projector\.safetensors is missing"):
        export_run(tmp_path / "run")
    assert (export / "vlm.json").read_bytes() == before


@pytest.mark.slow
def test_the_trained_model_is_gone_before_its_export_is_loaded(tmp_path: Path, monkeypatch: Any):
    write_run(tmp_path / "run", model_config(tmp_path))
    alive = []

    def count(*_: Any) -> float:
        alive.append(sum(type(thing).__name__ == "VisionLanguageModel" for thing in gc.get_objects()))
        return 0.0

    monkeypatch.setattr(weights, "check_readable", count)
    gc.collect()
    count()
    for full in (False, True):
        export_run(tmp_path / "run", full=full)
    assert alive == [alive[0]] * 3


def test_a_machine_that_cannot_hold_the_language_model_is_told_so_at_once(tmp_path: Path, monkeypatch: Any):
    write_run(tmp_path / "run", model_config(tmp_path))
    monkeypatch.setattr(weights, "_MEMORY_SHARE", 1e-9)
    with pytest.raises(CheckpointError, match=r"GiB are free\. Export on a machine that can hold the language model"):
        export_run(tmp_path / "run")


def test_weights_of_16_bits_compute_in_float32_and_are_afterwards_what_they_were(tmp_path: Path):
    from vlm.models.build import build_model

    narrow = build_model(model_config(tmp_path, lora=None, trainable=["projector"]), precision="bf16").model.eval()
    wide = build_model(model_config(tmp_path, lora=None, trainable=["projector"])).model.eval()
    for parameter in wide.llm.parameters():
        parameter.data = parameter.data.bfloat16().float()
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in narrow.state_dict().items()}
    with read_back.in_float32(narrow.llm, narrow.vision, narrow.projector):
        assert torch.equal(logits_of(narrow), logits_of(wide))
    assert all(
        tensor.dtype == before[name][0] and torch.equal(tensor, before[name][1])
        for name, tensor in narrow.state_dict().items()
    )


ANSWERS = Answers(
    ids=[5, 6],
    stop_ids=frozenset({9}),
    reply=[0, 1],
    features=None,
    logits=torch.tensor([[1.0, 2.0], [3.001, 3.0], [0.0, 5.0], [4.0, 0.0]]),  # the second row chose 0, the third 1
)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, ""),
        ({"ids": [5, 7]}, "the tokenizer writes a question as [5, 7], not as [5, 6]"),
        ({"stop_ids": frozenset({8, 9})}, "a reply ends at the tokens [8, 9], not at [9]"),
        ({"logits": ANSWERS.logits * 1.1}, "the logits differ by up to 0.5, of at most 5"),
        ({"logits": ANSWERS.logits[:3]}, "the logits are of shape [3, 2], not of shape [4, 2]"),
        ({"reply": [0, 0]}, "the greedy reply is [0, 0], not [0, 1]"),
        ({"reply": [0]}, "the greedy reply is [0], not [0, 1]"),
        ({"reply": [1, 1]}, ""),  # a tie: 3.001 against 3
    ],
)
def test_what_differs_is_named(change: dict[str, Any], line: str):
    assert differences(ANSWERS, replace(ANSWERS, **change)) == ([line] if line else [])


# --- what it found


@pytest.mark.one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_a_timm_encoder_of_another_size_than_its_class(full: bool, tmp_path: Path):
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    save_for_hf(timm.create_model("test_vit", num_classes=0), tmp_path / "vit", safe_serialization=True)  # 160 pixels
    vision = {"backend": "timm", "path": str(tmp_path / "vit")}
    built = write_run(
        tmp_path / "run", model_config(tmp_path, vision=vision, lora=None, trainable=["projector", "vision"])
    )
    assert built.model.vision is not None
    assert built.model.vision.num_patches == 100
    loaded = load(export_run(tmp_path / "run", full=full), "cpu", "fp32")
    pixels = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(loaded.model.encode_images(pixels), built.model.encode_images(pixels))


def test_a_timm_network_of_two_sets_of_tokens_is_refused_by_name():
    import timm

    from vlm.errors import ConfigError
    from vlm.models.encoders.towers import FeatureMapTower

    tower = FeatureMapTower(timm.create_model("crossvit_tiny_240", num_classes=0))
    with pytest.raises(ConfigError, match="CrossVit ends in 2 sets of tokens"):
        tower(torch.zeros(1, 3, 240, 240))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers"])
def test_dinov2_up_to_an_inner_block(kind: str, tmp_path: Path):
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28,
        patch_size=7,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path / "dino")
    vision = {"backend": "hf", "path": str(tmp_path / "dino"), "layer": -2}
    built = write_run(tmp_path / "run", model_config(tmp_path, vision=vision))
    loaded = load(export_run(tmp_path / "run", full=True), "cpu", "fp32")
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(loaded.model.encode_images(pixels), built.model.encode_images(pixels))


@pytest.mark.slow
@pytest.mark.one_in(3)
@pytest.mark.parametrize("family", HEADS_WITH_BIAS)
def test_a_head_with_a_bias_is_not_written_for_a_class_that_has_none(family: str, tmp_path: Path, capsys: Any):
    write_decoder(tmp_path / "llm", family, **HEADS_WITH_BIAS[family])
    built = write_run(tmp_path / "run", model_config(tmp_path, lora=None, trainable=["projector"]))
    export = export_run(tmp_path / "run", full=True)
    assert "its language model's head has a bias" in capsys.readouterr().err
    assert json.loads((export / "vlm.json").read_text())["layout"] == "vlm"
    assert_equal(built, export)


@pytest.mark.slow
def test_a_head_that_llava_does_not_compute_is_found_by_asking_its_class(tmp_path: Path, monkeypatch: Any, capsys: Any):
    write_decoder(tmp_path / "llm", "cohere", logit_scale=0.5)
    built = write_run(tmp_path / "run", model_config(tmp_path, lora=None, trainable=["projector"]))
    monkeypatch.setattr(hf, "head_settings", lambda config: [])  # as for a family whose settings nobody knows
    export = export_run(tmp_path / "run", full=True)
    assert "LLaVA class does not compute the same with its parts (the logits differ by" in capsys.readouterr().err
    assert_equal(built, export)


@pytest.mark.one_in(3)
@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt"])
def test_a_decoder_that_llava_cannot_hold_becomes_a_vlm_folder(family: str, tmp_path: Path, capsys: Any):
    write_decoder(tmp_path / "llm", family, **VOCABULARIES[family])
    built = write_run(tmp_path / "run", model_config(tmp_path, lora=None, trainable=["projector"]))
    assert_equal(built, export_run(tmp_path / "run", full=True))
    assert "AttributeError" in capsys.readouterr().err


@pytest.mark.slow
def test_an_export_of_earlier_versions_gets_its_head_s_bias_back(tmp_path: Path, monkeypatch: Any, capsys: Any):
    write_decoder(tmp_path / "llm", "phi")
    built = write_run(tmp_path / "run", model_config(tmp_path, lora=None, trainable=["projector"]))
    monkeypatch.setattr(weights, "why_not_llava", lambda *_: None)
    monkeypatch.setattr(
        hf, "_build_asked", lambda built, keep_class_token, *_: hf._build_llava(built, keep_class_token)
    )
    monkeypatch.setattr(weights, "check_readable", lambda *_: 0.0)
    export = export_run(tmp_path / "run", full=True)
    assert json.loads((export / "vlm.json").read_text())["layout"] == "llava"
    capsys.readouterr()
    assert_equal(built, export)
    assert "leaves lm_head.bias of this export out; vlm does not" in capsys.readouterr().err


@pytest.mark.one_in(3)
@pytest.mark.slow
@pytest.mark.parametrize("family", VOCABULARIES)
def test_a_trained_language_model_with_a_padded_vocabulary(family: str, tmp_path: Path):
    write_decoder(tmp_path / "llm", family, **VOCABULARIES[family])
    llm = {"path": str(tmp_path / "llm"), "pad_vocab_to_multiple_of": 64}
    built = write_run(tmp_path / "run", model_config(tmp_path, llm=llm, vision=None, lora=None, trainable=["llm"]))
    for full in (False, True):
        assert_equal(built, export_run(tmp_path / "run", full=full))


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_the_language_model_s_own_folder_names_the_template_s_end(full: bool, tmp_path: Path):
    """As a server that is given the language model's folder reads it; the base model ends with <|endoftext|>."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    write_decoder(tmp_path / "llm", "qwen2", eos="<|endoftext|>")
    write_run(tmp_path / "run", model_config(tmp_path, vision=None, lora=None, trainable=["llm"]))
    export = export_run(tmp_path / "run", full=full)
    tokenizer = AutoTokenizer.from_pretrained(export)
    both = sorted(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    folder = export if full else export / "llm"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == both
    assert AutoConfig.from_pretrained(folder).eos_token_id == both
    assert tokenizer.eos_token == "<|im_end|>"
    assert load(export, "cpu", "fp32").conversation_tokenizer.stop_ids == set(both)


@pytest.mark.slow
def test_a_model_loaded_in_bfloat16_keeps_its_rotary_frequencies(tmp_path: Path):
    """Rounded to bfloat16, as all that `llm.to(dtype)` touches, they are 0.2 % off: 2 radians at position 1,000."""
    write_run(tmp_path / "run", model_config(tmp_path))
    for full in (False, True):
        frequencies = load(export_run(tmp_path / "run", full=full), "cpu", "bf16").model.llm.model.rotary_emb.inv_freq
        assert frequencies.tolist() == pytest.approx([1, 0.1, 0.01, 0.001], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("unshuffle", [1, 2], ids=["llava", "vlm"])
def test_a_full_export_of_16_bits_is_read_back_too(unshuffle: int, tmp_path: Path, monkeypatch: Any):
    write_run(tmp_path / "run", model_config(tmp_path, projector={"kind": "linear", "unshuffle": unshuffle}))
    asked: list[torch.dtype] = []
    check = read_back.check_readable
    monkeypatch.setattr(weights, "check_readable", lambda *given: (asked.append(given[2]), check(*given))[1])
    export_run(tmp_path / "run", full=True, dtype="bf16")
    assert asked == [torch.bfloat16]
