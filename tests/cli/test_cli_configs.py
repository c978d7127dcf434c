"""`vlm ls | cp | show | validate | config-schema`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from model_folders import write_llm_folder

from vlm.config import load_config, shipped_projects
from vlm.config_checks import config_problems
from vlm.schema import is_local

CONFIG = """\
output_dir: runs/a
model:
  llm: {path: ./models/llm}
  vision: {backend: hf, path: openai/clip}
data:
  sources:
    - {path: a.json, images: images}
train:
  epochs: 1
"""


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def complete() -> Path:
    """A config all of whose paths exist."""
    write_llm_folder("models/llm")
    Path("images").mkdir()
    Path("a.json").write_text("[]")
    Path("a.yaml").write_text(CONFIG)
    return Path("a.yaml")


def test_ls_takes_a_part_of_a_name_or_a_pattern(vlm):
    assert vlm("ls", "tiny")[1].split() == ["tiny/finetune", "tiny/pretrain"]
    assert vlm("ls", "llava*lora")[1].split() == [
        "llava_internlm3_8b/finetune_lora",
        "llava_qwen2_14b_pp2/finetune_lora",
        "llava_qwen2_5_7b/finetune_lora",
    ]
    assert vlm("ls", "-p", "internlm3")[1] == vlm("ls", "internlm3")[1] != ""
    assert vlm("ls", "nothing")[0] == 2


def test_cp_gives_the_copy_its_own_name_and_run_folders(vlm):
    code, out, _ = vlm("cp", "llava_qwen2_5_7b", "mine")
    assert code == 0
    assert sorted(path.as_posix() for path in Path("mine").rglob("*.yaml")) == sorted(
        line for line in out.split() if line.endswith(".yaml")
    )
    copied, original = load_config("mine/finetune_lora.yaml"), load_config("llava_qwen2_5_7b/finetune_lora")
    assert copied.output_dir == "cache/runs/mine/finetune_lora"
    assert copied.init_from == "cache/runs/mine/pretrain/export"
    moved = {"name": "mine", "output_dir": copied.output_dir, "init_from": copied.init_from}
    assert original.model_copy(update=moved) == copied


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", shipped_projects())
def test_no_copy_writes_into_the_originals_folder(name, vlm):
    code, out, _ = vlm("cp", name, "mine")
    assert (code, "output_dir" in out) == (0, False)
    assert load_config(f"mine/{name.partition('/')[2]}.yaml").output_dir == f"cache/runs/mine/{name.partition('/')[2]}"


def test_cp_leaves_the_readme_whose_commands_and_links_are_the_originals(vlm):
    out = vlm("cp", "tiny", "mine")[1]
    assert not Path("mine/README.md").exists()
    assert out.endswith("tiny/README.md\n")


def test_cp_keeps_comments(vlm):
    vlm("cp", "llava_qwen2_5_7b/pretrain", "mine")
    assert Path("mine/pretrain.yaml").read_text().startswith("# CLIP-L/336 + Qwen2.5-7B, stage 1")
    assert 'base: base/pretrain.yaml\nname: "mine"\n' in Path("mine/pretrain.yaml").read_text()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", shipped_projects())
def test_every_copy_loads(name, vlm):
    assert vlm("cp", name, "copy")[0] == 0
    load_config(f"copy/{name.partition('/')[2]}.yaml")


def test_cp_overwrites_nothing(vlm):
    vlm("cp", "tiny", "mine")
    Path("mine/pretrain.yaml").write_text("mine")
    code, _, err = vlm("cp", "tiny/pretrain", "mine")
    assert (code, "mine/pretrain.yaml exists already" in err) == (2, True)
    assert Path("mine/pretrain.yaml").read_text() == "mine"


def test_cp_of_an_unknown_project_names_the_nearest(vlm):
    assert "Nearest shipped: tiny/" in vlm("cp", "tinny", "mine")[2]


def test_show_prints_the_merged_config_and_keeps_secrets_out(complete, monkeypatch, vlm):
    monkeypatch.setenv("VLM_TOKEN", "s3cret")
    code, out, _ = vlm("show", str(complete), "-o", "data.system=${oc.env:VLM_TOKEN}", "seed=3")
    assert code == 0
    assert "seed: 3" in out
    assert "system: ${oc.env:VLM_TOKEN}" in out
    assert "s3cret" not in out


def test_what_show_prints_is_a_config_with_the_same_values(complete, vlm):
    Path("shown.yaml").write_text(vlm("show", str(complete), "--options", "train.learning_rate=1e-5")[1])
    assert load_config("shown.yaml") == load_config(complete, ["train.learning_rate=1e-5"])


def test_validate_accepts_a_config_whose_paths_exist_and_notes_hub_names(complete, vlm):
    assert vlm("validate", str(complete)) == (
        0,
        "note: model.vision.path openai/clip is taken for a name, found or fetched when the run starts\n"
        "a.yaml: valid\n",
        "",
    )  # fmt: skip


def test_validate_lists_every_path_that_is_missing_with_its_line(tmp_path, vlm):
    Path("a.yaml").write_text(CONFIG)
    options = [
        "init_from=runs/x/export",
        "train.samples=[{prompt: Describe, image: cat.png}]",
        "evaluation.tasks=[{name: t, kind: loss, path: t.json}]",
    ]
    code, _, err = vlm("validate", "a.yaml", "-o", *options)
    assert code == 2
    lines = err.splitlines()
    assert lines[:1] + lines[-1:] == [
        "error: 6 problems in a.yaml:",
        f"Relative paths are looked for in {tmp_path}",
    ]
    assert [line.strip() for line in lines[1:-1]] == [
        "a.yaml:7: data.sources[0].path: data file a.json does not exist",
        "a.yaml:7: data.sources[0].images: images folder images does not exist",
        "--options: evaluation.tasks[0].path: data file t.json does not exist",
        "--options: train.samples[0].image: image cat.png does not exist",
        "a.yaml:3: model.llm.path: ./models/llm does not exist. A name for a model hub has no leading . / ~ or cache/, "
        "and at most one /",
        "--options: init_from: runs/x/export does not exist; train and export the stage before first",
    ]


def test_validate_wants_an_output_folder_that_can_be_written(complete):
    Path("file").touch()
    config = load_config(complete, ["output_dir=file/run"])
    assert config_problems(config) == [(("output_dir",), "file is a file")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_validate_reports_a_read_only_output_folder(complete):
    Path("locked").mkdir(mode=0o500)
    config = load_config(complete, ["output_dir=locked/run"])
    assert config_problems(config) == [(("output_dir",), "locked cannot be written to")]


@pytest.mark.parametrize("path", ["./x", "../x", "/x", "~/x", "cache/x"])
def test_a_local_path_is_told_from_a_hub_name(path):
    assert is_local(path)
    assert not is_local("Qwen/Qwen3-8B")


def test_config_schema_is_json(vlm):
    schema = json.loads(vlm("config-schema")[1])
    assert list(schema["properties"])[:3] == ["base", "name", "output_dir"]
