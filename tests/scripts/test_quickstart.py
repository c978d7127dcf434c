"""The quick start's shell scripts, and the parts of its tiny project."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_an_unknown_argument_is_refused_by_name():
    done = run(ROOT / "scripts/quickstart.sh", "--small")
    assert done.returncode == 2
    assert done.stderr == "unknown argument --small; known: --tiny\n"


@pytest.mark.parametrize(
    ("python", "missing"),
    [
        ("exit 1", "Python 3.11 or newer is missing. On Debian: apt-get install python3 python3-venv"),
        ('case "$2" in *version_info*) exit 0;; *) exit 1;; esac', "lacks its venv module. On Debian: apt-get install"),
    ],
    ids=["an old Python", "no venv module"],
)
def test_what_is_missing_is_said_with_the_command_that_installs_it(tmp_path, python, missing):
    (tmp_path / "bin").mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{python}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    clone = tmp_path / "clone/scripts"
    clone.mkdir(parents=True)
    script = clone / "setup_venv.sh"
    script.write_text((ROOT / "scripts/setup_venv.sh").read_text())
    done = run("/bin/bash", script, env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"})
    assert done.returncode == 2
    assert missing in done.stderr


@pytest.mark.thorough
@pytest.mark.slow
def test_tiny_parts_are_made_once_and_tested_pictures_do_not_train(tmp_path):
    command = [sys.executable, ROOT / "scripts/prepare_tiny.py", "--folder", tmp_path / "tiny"]
    assert "made in" in run(*command).stdout
    assert "there already" in run(*command).stdout
    data = tmp_path / "tiny/data"
    trained = {r["image"] for name in ("pretrain", "finetune") for r in read(data / f"{name}.jsonl")}
    tested = {r["image"] for name in ("eval_shape", "eval_caption") for r in read(data / f"{name}.jsonl")}
    assert (len(trained), len(tested)) == (72, 24)
    assert not trained & tested
    assert all((data / "images" / name).is_file() for name in trained | tested)
    for part in ("llm", "encoder"):  # `vlm plan tiny/pretrain` reads the kept ones where nothing was made
        kept = json.loads((ROOT / f"projects/shapes/cache--tiny--{part}/config.json").read_text())
        made = json.loads((tmp_path / f"tiny/{part}/config.json").read_text())
        assert kept.items() <= made.items()


def test_the_tiny_models_are_in_layouts_that_transformers_reads(tmp_path):
    from demo import tiny

    from vlm.compat import prepare

    prepare()
    from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

    tiny.write_llm(tmp_path / "llm", ["A red circle.", "What is this?"])
    tiny.write_encoder(tmp_path / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    assert tokenizer.decode(tokenizer("A 红 circle.")["input_ids"]) == "A 红 circle."  # every byte has a token
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "<|im_start|>user\nhi<|im_end|>" in said
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    assert (llm.config.hidden_size, llm.config.num_hidden_layers) == (64, 2)
    assert CLIPVisionModel.from_pretrained(tmp_path / "encoder").config.image_size == 56
