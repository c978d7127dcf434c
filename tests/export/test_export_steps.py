"""Exports of a named checkpoint, in a named number format; a whole text model is a folder of transformers."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_export import model_config, save_run, write_run

from vlm.cli.main import main
from vlm.compat import prepare
from vlm.errors import CheckpointError
from vlm.export.run import export_run
from vlm.inference.load import load
from vlm.models.build import build_model
from vlm.models.trainable import trained_weights


def vlm(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.mark.slow
def test_a_named_checkpoint_is_exported_beside_the_newest(tmp_path: Path):
    config = model_config(tmp_path, trainable=["projector"], lora=None)
    built, run = write_run(tmp_path / "run", config), tmp_path / "run"  # step 7
    later = {name: tensor + 1 for name, tensor in trained_weights(built.model).items()}
    save_run(run, config, later, step=9)
    assert vlm("export", run) == vlm("export", run, "--checkpoint", "step-000007") == 0
    newest, named = (
        load_file(run / name / "projector.safetensors")["projector.layers.0.bias"]
        for name in ("export", "export-step-7")
    )
    assert (newest - named - 1).abs().max() < 1e-6
    with pytest.raises(CheckpointError, match="no checkpoint of step 8; there are: 7, 9"):
        export_run(run, step=8)
    assert vlm("export", run, "--checkpoint", "last") == 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in run.glob("export*/*")} == {0o644}


@pytest.mark.slow
def test_a_whole_text_model_is_a_folder_of_transformers_and_the_base_model_of_another_run(tmp_path: Path):
    prepare()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    built = write_run(tmp_path / "run", model_config(tmp_path, vision=None, trainable=["llm.lora"]))
    assert vlm("export", tmp_path / "run", "--full", "--max-shard-size", "30KB") == 0
    full, ids = tmp_path / "run/export-full", torch.arange(3, 13)[None]
    tokenizer = AutoTokenizer.from_pretrained(full)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n"
    with torch.no_grad():
        expected = built.model.llm(ids).logits
        found = AutoModelForCausalLM.from_pretrained(full)(ids).logits
        again = build_model(model_config(tmp_path, vision=None, llm={"path": str(full)}, trainable=["llm"], lora=None))
        assert again.model.llm(ids).logits.equal(found)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    answer = load(full, "cpu", "fp32").chat("Hello", max_new_tokens=8)
    assert answer == load(export_run(tmp_path / "run"), "cpu", "fp32").chat("Hello", max_new_tokens=8)
    following = model_config(tmp_path, vision=None, trainable=["llm"], lora=None)
    started = write_run(tmp_path / "next", following, init_from=full, seed=4)
    assert len(trained_weights(started.model)) == 20


@pytest.mark.one_in(4)
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"trainable": ["projector", "llm"]},
        {"trainable": ["projector", "llm.lora"], "lora": {"rank": 4, "alpha": 8}},
        {"trainable": ["projector", "llm", "vision"], "partial": {"llm": {"last_blocks": 1}}},
        {"trainable": ["projector", "vision.lora"], "vision_lora": {"rank": 4, "alpha": 8}},
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_weights_are_written_in_the_format_that_is_asked_for(tmp_path: Path, settings: dict, full: bool):
    write_run(tmp_path / "run", model_config(tmp_path, **{"lora": None, **settings}))
    export = export_run(tmp_path / "run", full=full, dtype="bf16")
    names = {"projector.safetensors", "adapter_model.safetensors"}  # small, and trained in float32
    for file in export.rglob("*.safetensors"):
        expected = torch.float32 if file.name in names else torch.bfloat16
        assert {tensor.dtype for tensor in load_file(file).values()} == {expected}, file
