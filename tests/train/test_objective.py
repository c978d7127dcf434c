"""A run under an objective that only the tests know: what the config, the proof and the lines of a run make of it."""

from __future__ import annotations

import json

import pytest
import toy_objective

from vlm.config import load_config, unused_settings
from vlm.errors import ConfigError
from vlm.run import train


@pytest.fixture(autouse=True)
def known():
    toy_objective.register()
    yield
    toy_objective.unregister()


@pytest.mark.slow
def test_its_loss_is_proven_and_its_metrics_stand_in_the_lines(config_file):
    path = config_file(objective={"kind": "even_words", "power": 1.0}, train__max_steps=3)
    run = train(load_config(path), path.read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    for line in lines:
        if "loss" in line:
            assert line["doubt"] == pytest.approx(line["loss"], rel=1e-5)  # of power 1 they are the same sum
            assert 0 <= line["accuracy"] <= 1
    proof = json.loads((run / "proof.json").read_text())
    assert proof["passed"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "even_wordz"}, r"objective\.kind: expected .*'even_words'; did you mean 'even_words'\?"),
        ({"power": 2}, r"objective: needs the key kind, .*one of lm, .*even_words"),
        ({"kind": "even_words", "powr": 2}, r"objective\.powr: unknown key; did you mean power\?"),
        ({"kind": "lm", "powr": 2}, r"objective\.powr: unknown key; did you mean power\?"),
        ({"kind": "lm", "power": "x"}, r"objective\.power: expected a number"),
        ({"kind": "even_words", "power": True}, r"objective\.power: expected a number, found true"),
        ("lm", r"objective: expected keys with values"),
    ],
)
def test_what_is_wrong_in_its_section_is_named_with_the_key(config_file, section, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file(objective=section))


def test_a_key_of_another_objective_is_not_used(config_file):
    config = load_config(config_file(objective={"kind": "lm", "power": 2}))
    assert unused_settings(config) == ["objective.power is not used: objective.kind is lm"]
