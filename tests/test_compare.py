"""Several runs beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vlm.compare import as_table, compare_runs, diff_configs, draw
from vlm.errors import DataError


@pytest.fixture
def pair(tmp_path):
    """Two runs of 16 steps: loss 16, 15, ... and half of it, with another rate and a LoRA in the second."""
    for name, factor, train in (("a", 1.0, {"learning_rate": 1e-3}), ("b", 0.5, {"learning_rate": 2e-4, "lora": [8]})):
        run = tmp_path / name / "sft"
        run.mkdir(parents=True)
        config = {"output_dir": str(run), "seed": 1, "key": "${oc.env:SECRET}", "train": {"max_steps": 16, **train}}
        (run / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        lines = [{"step": step, "loss": factor * (17 - step), "tokens_per_second": 5.0} for step in range(1, 17)]
        lines.append({"step": 16, "held_out_loss": 3.0 * factor})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [tmp_path / "a/sft", tmp_path / "b/sft"]


def test_curves_are_compared_at_the_same_steps_by_means_since_the_place_before(pair):
    comparison = compare_runs(pair)
    assert comparison.names == ["a/sft", "b/sft"]
    assert comparison.places[0] == (2, [15.5, 7.75])  # mean of 16 and 15
    assert comparison.places[-1] == (16, [1.5, 0.75])
    assert [each.values for each in comparison.held_out] == [[3.0], [1.5]]


def test_keys_that_differ_are_listed_as_written_and_secrets_are_not_resolved(pair, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    assert compare_runs(pair).differences == {"train.learning_rate": [1e-3, 2e-4], "train.lora[0]": [None, 8]}
    config = pair[1] / "config.yaml"
    config.write_text(config.read_text().replace("SECRET}", "SECRET,none}"))
    comparison = compare_runs(pair)
    assert comparison.differences["key"] == ["${oc.env:SECRET}", "${oc.env:SECRET,none}"]
    assert "hunter2" not in as_table(comparison)


def test_the_table_and_the_drawing_hold_both_runs(pair, tmp_path):
    comparison = compare_runs(pair)
    table = as_table(comparison).splitlines()
    assert table[0].split() == ["a/sft", "b/sft"]
    assert "loss, to step 16       1.5      0.75" in table
    assert table[-2:] == ["train.learning_rate  0.001  0.0002", "train.lora[0]            -       8"]
    draw(comparison, tmp_path / "compare.png")
    with Image.open(tmp_path / "compare.png") as image:
        colours = {pixel for _, pixel in image.convert("RGB").getcolors(2**20)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # matplotlib's first two, a run each


def test_a_run_beside_itself_has_an_equal_config(pair):
    config = (pair[0] / "config.yaml").read_text()
    (pair[1] / "config.yaml").write_text(config)
    assert as_table(compare_runs(pair)).endswith("the configs are equal")


@pytest.mark.parametrize(
    ("runs", "metric", "message"),
    [
        ("a", "loss", "needs two or more run folders"),
        ("aa", "loss", "needs two or more run folders"),
        ("ab", "lost", "they have held_out_loss, loss, tokens_per_second"),
        ("ac", "loss", "c/sft is not a run folder"),
    ],
)
def test_what_cannot_be_compared_is_named(pair, tmp_path, runs, metric, message):
    with pytest.raises(DataError, match=message):
        compare_runs([tmp_path / name / "sft" for name in runs], metric)


def test_a_drawing_that_cannot_be_written_is_named(pair, tmp_path):
    for path in (tmp_path / "none" / "x.png", tmp_path / "x.docx"):
        with pytest.raises(DataError, match=r"--out .*cannot be written"):
            draw(compare_runs(pair), path)


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path):
    for text in ("a: [1", "a: *x", "{" * 5000):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(DataError, match=r"config\.yaml cannot be read"):
            diff_configs([tmp_path / "config.yaml"])
