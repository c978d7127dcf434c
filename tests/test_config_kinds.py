"""Sections that are one of several, told apart by `kind`: their keys, those of other kinds, what is said of them."""

from __future__ import annotations

import pytest
from test_config import GOOD, in_tmp_path, problems, write  # noqa: F401 - the fixture is used by being here

from vlm.config import load_config, unused_settings
from vlm.train.engines.kinds import Auto, Ddp, Zero


def test_a_section_has_the_keys_of_its_kind_and_the_kind_may_be_left_out():
    path = write(GOOD)
    assert load_config(path).engine == Auto()
    assert load_config(path, ["engine.device=cpu"]).engine == Auto(device="cpu")
    zero = load_config(path, ["engine.kind=zero", "engine.stage=3"]).engine
    assert zero == Zero(stage=3)
    assert zero.model_dump().keys() == {"kind", "device", "timeout_seconds", "stage", "offload", "deepspeed"}


def test_a_key_of_another_kind_stays_without_use_and_is_named():
    path = write(GOOD + "engine: {kind: zero, stage: 3, offload: [parameters]}\n")
    config = load_config(path, ["engine.kind=ddp"])
    assert type(config.engine) is Ddp
    assert config.engine.unused == {"stage": 3, "offload": ("parameters",)}
    assert unused_settings(config) == [
        "engine.stage is not used: engine.kind is ddp",
        "engine.offload is not used: engine.kind is ddp",
    ]
    assert unused_settings(load_config(path)) == []
    tasks = "evaluation.tasks=[{name: a, kind: loss, path: a.json, num_candidates: 3}]"
    (line,) = unused_settings(load_config(path, [tasks]))
    assert line == "evaluation.tasks[0].num_candidates is not used: evaluation.tasks[0].kind is loss"
    (line,) = unused_settings(load_config(path, ["model.projector.depth=1"]))
    assert line == "model.projector.depth is not used: model.projector.kind is linear"
    assert load_config(path, ["engine.kind=auto"]).engine.of_launch(2).unused == config.engine.unused


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (("kind=ddp", "stage=9"), ["engine.stage: expected at most 3 (found 9)"]),
        (("kind=ddp", "stage=true"), ["engine.stage: expected a number, found true"]),
        (("kind=ddp", "offload=[disk]"), ["engine.offload[0]: expected 'optimizer' or 'parameters' (found 'disk')"]),
        (
            ("kind=ddp", "stage=9", "devise=cpu"),
            ["engine.stage: expected at most 3 (found 9)", "engine.devise: unknown key; did you mean device?"],
        ),
        (("kind=pipeline", "stages=2"), ["engine.stages: unknown key; did you mean num_stages?"]),
        (("kind=zero", "stages=2"), ["engine.stages: unknown key; did you mean stage?"]),
        (("kind=ddp", "num_stage=2"), ["engine.num_stage: unknown key; did you mean num_stages?"]),
        (
            ("kind=zeo",),
            ["engine.kind: expected 'auto', 'local', 'ddp', 'zero', 'fsdp' or 'pipeline'; did you mean 'zero'? "
             "(found 'zeo')"],
        ),
        (("kind=zero", "stage=0", "offload=[optimizer]"), [
            "engine: offload: stage 0 spreads nothing and offloads nothing; set stage to 1, 2 or 3 "
            "(stage is set at --options; offload is set at --options)"
        ]),
    ],
)  # fmt: skip
def test_a_wrong_key_is_of_the_kind_that_is_written_or_of_another(options, lines):
    found = problems(write(GOOD), *(f"engine.{option}" for option in options))
    assert found == [f"--options: {line}" for line in lines]


@pytest.mark.parametrize(
    ("task", "line"),
    [
        (
            "path: a.json",
            ": needs the key kind, which says what the others mean; one of choice, ranking, loss, generate",
        ),
        ("kind: los", ".kind: expected 'choice', 'ranking', 'loss' or 'generate'; did you mean 'loss'? (found 'los')"),
        ("kind: loss", ".path: missing, and it has no default"),
        ("kind: loss, path: a.json, num_candidate: 2", ".num_candidate: unknown key; did you mean num_candidates?"),
        ("kind: loss, path: a.json, max_records: true", ".max_records: expected a number, found true"),
        ("kind: ranking, path: a.json, num_candidates: 1", ".num_candidates: expected at least 2 (found 1)"),
    ],
)  # fmt: skip
def test_an_entry_of_a_list_has_the_keys_of_its_kind_too(task, line):
    assert problems(write(GOOD), f"evaluation.tasks=[{{name: a, {task}}}]") == [f"--options: evaluation.tasks[0]{line}"]
