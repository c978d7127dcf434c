"""Paths of a config, checked alike by every command before anything heavy is imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from model_folders import write_encoder_folder, write_llm_folder

from vlm.config import load_config
from vlm.config_checks import config_problems, load_checked
from vlm.errors import ConfigError

CONFIG = """\
output_dir: runs/a
init_from: runs/first/export
model:
  llm: {path: models/llm}
  vision: {backend: hf, path: models/clip}
data:
  sources: [{path: a.json}]
train: {epochs: 1}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of two models that are there; the data and the export to start from are missing."""
    monkeypatch.chdir(tmp_path)
    write_llm_folder("models/llm")
    write_encoder_folder("models/clip")
    Path("a.yaml").write_text(CONFIG)
    return "a.yaml"


def model_problems(config: str, *options: str) -> list[str]:
    found = config_problems(load_config(config, options))
    return [f"{'.'.join(map(str, key))}: {text}" for key, text in found if key[0] == "model"]


def test_models_that_fit_their_place_are_no_problem(config):
    assert model_problems(config) == []
    assert model_problems(config, "model.llm.path=Qwen/Qwen2.5-7B-Instruct") == []


def test_swapped_models_are_told_by_their_config_json(config):
    assert model_problems(config, "model.llm.path=models/clip", "model.vision.path=models/llm") == [
        "model.llm.path: models/clip holds a vision encoder (clip_vision_model), expected a language model. Usually "
        "model.llm.path and model.vision.path are swapped",
        "model.vision.path: models/llm holds a language model (llama), expected a vision encoder. Usually "
        "model.llm.path and model.vision.path are swapped",
    ]


def test_every_encoder_that_can_be_loaded_is_known_as_one():
    from vlm.models.encoders.hf import TOWERS
    from vlm.models.folder import is_encoder_type

    assert all(map(is_encoder_type, TOWERS))


def test_a_folder_without_config_json_names_the_one_inside_that_would_do(config):
    Path("empty").mkdir()
    assert model_problems(config, "model.llm.path=empty") == [
        "model.llm.path: empty holds no config.json, so it is not the folder of a language model. Usually another "
        "folder was meant, or the download is incomplete"
    ]
    (found,) = model_problems(config, "model.llm.path=models")
    assert found.endswith("Did you mean models/llm?")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "config.json is not readable (Expecting property name"),
        ("{}", "config.json names no model_type"),
        ("[]", "config.json names no model_type"),
        ('{"model_type": "qwen2", "architectures": 3}', None),
    ],
)
def test_a_config_json_that_says_nothing_of_use(config, text, problem):
    Path("models/llm/config.json").write_text(text)
    found = model_problems(config)
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_what_has_two_slashes_is_no_name_for_a_hub(config):
    (found,) = model_problems(config, "model.llm.path=models/qwen/7b")
    assert found.startswith("model.llm.path: models/qwen/7b does not exist. A name for a model hub has")


def test_train_says_what_validate_says(config, monkeypatch, vlm):
    monkeypatch.setitem(sys.modules, "vlm.run", None)  # importing it would raise
    expected = vlm("validate", config)
    assert expected[0] == 2
    assert "a.yaml:7: data.sources[0].path: data file a.json does not exist" in expected[2]
    assert "a.yaml:2: init_from: runs/first/export does not exist" in expected[2]
    assert vlm("train", config) == expected
    assert vlm("train", config, "--nproc", "2") == expected


def test_each_command_checks_the_paths_that_it_reads(config, monkeypatch, vlm):
    monkeypatch.setitem(sys.modules, "vlm.data.report", None)
    code, _, err = vlm("data", "check", config)
    assert (code, "a.json does not exist" in err, "init_from" in err) == (2, True, False)
    assert load_checked(config, (), ("model",)).init_from == "runs/first/export"  # of `vlm plan`: made later
    task = "evaluation.tasks=[{name: t, kind: loss, path: t.json}]"
    assert "t.json does not exist" in vlm("eval", config, "-o", task)[2]
    code, _, err = vlm("plan", config, "-o", "model.llm.path=cache/nothing")
    assert (code, "--options: model.llm.path: cache/nothing does not exist" in err) == (2, True)


@pytest.mark.parametrize(
    ("rank", "local_rank", "is_silent"), [("0", "0", True), ("1", "1", True), ("8", "0", False), ("9", "1", True)]
)
def test_one_process_of_each_machine_names_missing_paths(config, monkeypatch, rank, local_rank, is_silent):
    """`everywhere` silences all ranks but 0. The second of two machines of 8 may lack what the first has."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(ConfigError) as caught:
        load_checked(config)
    assert caught.value.everywhere is is_silent


@pytest.mark.parametrize(
    ("flag", "number", "least"), [("--nproc", "0", 1), ("--nproc", "-2", 1), ("--nnodes", "0", 1)]
)  # fmt: skip
def test_a_launch_needs_a_process(config, vlm, flag, number, least):
    assert vlm("train", config, flag, number) == (2, "", f"error: {flag} {number}: expected at least {least}\n")
