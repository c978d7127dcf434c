"""Runs whose model learns from replies that it wrote itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prove_engines import Case, run_cases, worst_differences
from test_grpo import judge
from toy_runs import kill, start_warm, stop_and_go_on

from vlm.blame import blame_step
from vlm.config import load_config
from vlm.errors import ConfigError
from vlm.export.run import export_run
from vlm.models.encoders.encoder import VisionEncoder
from vlm.run import train
from vlm.train.checkpoint import list_checkpoints, newest_verified
from vlm.train.fragments import read_weights
from vlm.train.rollouts import ROLLOUTS


def lines_of(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.fixture
def asked(config_file: Any, tiny: Path, tmp_path: Path):
    """Writes a config whose records ask for the color of an image, red or blue."""
    kinds = [(color, shape, n) for n in range(4) for shape in ("circle", "square") for color in ("red", "blue")]
    lines = [{"image": f"{c}-{s}-{n}.png", "prompt": "Color?", "answer": c} for c, s, n in kinds]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"path": str(tmp_path / "asked.jsonl"), "images": str(tiny / "data/images")}

    def write(objective: dict[str, Any], **changes: Any) -> Path:
        section = {"kind": "grpo", "group_size": 4, "max_new_tokens": 4} | objective
        settings = {
            "data__sources": [source],
            "data__held_out": 0.0,
            "data__max_length": 64,
            "train__log_every": 1,
            "train__save_every": 100,
        }
        return config_file(objective=section, **settings | changes)

    return write


def taught(asked: Any, **changes: Any) -> Path:
    """The export of a model that was trained on the answers."""
    path = asked({"rewards": [{"kind": "exact"}]}, train__prove=False, **changes)
    named = json.loads(path.read_text())
    named["objective"] = {"kind": "lm"}
    path.write_text(json.dumps(named))
    return export_run(train(load_config(path), path.read_text()))


NUMBERS = ("loss", "grad_norm", "reward", "reward_std", "kl", "clipped", "reply_tokens", "truncated", "no_signal")


@pytest.mark.slow
def test_a_language_model_learns_to_say_what_is_rewarded_and_a_stopped_run_goes_on_to_the_bit(asked, tmp_path: Path):
    lines = [{"prompt": f"What is {n}?", "answer": "e"} for n in range(12)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = asked(
        {"kl": 0.01, "group_size": 8, "rewards": [{"kind": "regex", "pattern": "e"}, {"kind": "length", "most": 4}]},
        data__sources=[{"path": str(tmp_path / "texts.jsonl")}], model__vision=None, model__trainable=["llm"],
        train__max_steps=16, train__save_every=8, train__schedule="constant",
    )  # fmt: skip
    whole = train(load_config(path), path.read_text())
    said = lines_of(whole)
    assert sum(line["reward/regex"] for line in said[-4:]) > sum(line["reward/regex"] for line in said[:4]) + 0.8
    assert said[0]["reward"] == pytest.approx(said[0]["reward/regex"] + said[0]["reward/length"])
    assert said[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert said[-1]["kl"] > 0.01
    assert said[-1]["rollouts_seconds"] > 0
    shown = lines_of(whole, ROLLOUTS)
    assert [line["step"] for line in shown] == list(range(1, 17))
    assert len(shown[0]["replies"]) == 8
    again = stop_and_go_on(path, tmp_path / "other", "train.save_every=8")
    assert [[line[name] for name in NUMBERS] for line in lines_of(again)] == [
        [line[name] for name in NUMBERS] for line in said
    ]
    assert lines_of(again, ROLLOUTS) == shown
    with pytest.raises(ConfigError, match="learns from replies that the model wrote itself"):
        blame_step(load_config(path), 3)


@pytest.mark.slow
def test_a_vision_language_model_learns_to_tell_what_it_is_shown(asked, tmp_path: Path):
    """It has half learned two words, and not which of them an image is. Seen: 0.10 at first, 0.85 after 20 steps."""
    whole = {"model__trainable": ["projector", "llm"], "train__schedule": "constant", "data__packing": False}
    batch = {"train__global_batch_size": 16, "train__micro_batch_size": 16, "train__learning_rate": 1e-2}
    start = taught(asked, **whole, **batch, train__max_steps=8)
    path = asked(
        {"group_size": 6, "max_new_tokens": 2, "kl": 0.001, "rewards": [{"kind": "exact"}]}, **whole,
        init_from=str(start), output_dir=str(tmp_path / "grpo"), train__max_steps=20, train__global_batch_size=8,
        train__micro_batch_size=4, train__learning_rate=3e-3,
    )  # fmt: skip
    rewards = [line["reward"] for line in lines_of(train(load_config(path), path.read_text()))]
    assert sum(rewards[:2]) / 2 < 0.4
    assert sum(rewards[-3:]) / 3 > 0.6
    proof = {
        check["name"]: check["passed"] for check in json.loads((tmp_path / "grpo/proof.json").read_text())["checks"]
    }
    assert {proof[name] for name in ("loss", "gradients", "micro_batches", "own_image")} == {True}


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_adapters_of_a_quantized_base_learn_and_go_on_to_the_bit(asked, tiny: Path, tmp_path: Path, kind: str):
    parts = ["projector", "llm.lora", *(["value_head"] if kind == "ppo" else [])]
    path = asked(
        {"kind": kind, "rewards": [{"kind": "regex", "pattern": "e"}], "updates": 2, "kl": 0,
         "clip" + "_low" * (kind == "grpo"): 1e-4},
        model__llm={"path": str(tiny / "llm"), "quantization": {"format": "nf4"}}, model__trainable=parts,
        model__lora={"rank": 4, "alpha": 8}, train__max_steps=3, train__save_every=2,
    )  # fmt: skip
    whole = lines_of(train(load_config(path), path.read_text()))
    assert max(line["clipped"] for line in whole) > 0  # of the second update of a step
    again = lines_of(stop_and_go_on(path, tmp_path / "other"))
    names = ("loss", "grad_norm", "reward", "clipped")
    assert [[line[name] for name in names] for line in again] == [[line[name] for name in names] for line in whole]


@pytest.mark.slow
def test_a_run_that_was_killed_while_it_wrote_replies_goes_on_from_its_checkpoint_to_the_bit(asked, tmp_path: Path):
    """In the fourth step, whose third one has shown its replies already and is made again."""
    rewards = [{"kind": "regex", "pattern": "e"}]
    path = asked({"rewards": rewards}, train__max_steps=4, train__save_every=2, train__prove=False)
    straight = train(load_config(path), path.read_text())
    killed = tmp_path / "killed"
    kill(path, f"output_dir={killed}", "train.async_save=false", fault="rollouts@4", nproc=1)
    assert [info.step for info in list_checkpoints(killed)] == [2]
    assert [line["step"] for line in lines_of(killed, ROLLOUTS)] == [1, 2, 3]
    train(load_config(path, [f"output_dir={killed}"]), path.read_text())
    names = ("step", *(name for name in NUMBERS if name != "kl"))
    said, again = ([[line[name] for name in names] for line in lines_of(run)] for run in (straight, killed))
    assert again == said
    assert any(line["grad_norm"] for line in lines_of(straight))
    assert (killed / ROLLOUTS).read_bytes() == (straight / ROLLOUTS).read_bytes()
    expected, found = (read_weights(newest_verified(run)) for run in (straight, killed))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_a_group_that_the_judge_failed_on_is_left_out_and_an_image_is_encoded_once_for_all_its_replies(
    asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two micro-batches of two prompts a step, and a request for each prompt, of which the second fails."""
    good = (200, {"rewards": [0.0, 1.0, 0.25, 0.5]})
    encoded: list[tuple[int, int]] = []  # of each call: requests before, images
    encode = VisionEncoder.forward
    with judge([good, (500, {}), *[good] * 6]) as (address, requests):

        def noted(encoder: VisionEncoder, pixels: torch.Tensor) -> torch.Tensor:
            encoded.append((len(requests), len(pixels)))
            return encode(encoder, pixels)

        monkeypatch.setattr(VisionEncoder, "forward", noted)
        path = asked(
            {"rewards": [{"kind": "http", "address": address, "at_once": 4}], "shown_groups": 4},
            train__max_steps=2, train__prove=False,
        )  # fmt: skip
        run = train(load_config(path), path.read_text())
    assert [len(request["replies"]) for request in requests] == [4] * 8
    assert [each for each in encoded if each[0] > 0] == [(4, 2), (4, 2)]  # no more after the replies were written
    first, second = lines_of(run)
    assert (first["not_judged"], second["not_judged"]) == (0.25, 0.0)
    assert first["reward"] == second["reward"] == 1.75 / 4
    assert first["grad_norm"] > 0
    shown = lines_of(run, ROLLOUTS)
    left_out = [[reply["reward"] is None for reply in group["replies"]] for group in shown]
    assert left_out == [[number == 1] * 4 for number in range(8)]
    tokens = [sum(reply["tokens"] for reply in group["replies"]) for group in shown]
    assert first["supervised_tokens"] == tokens[0] + sum(tokens[2:4])
    assert second["supervised_tokens"] == sum(tokens[4:])


ENGINES = ("local", "ddp*2", "zero2*2", "zero3*2", "fsdp*2")
PPO = ("objective.kind=ppo", "model.trainable=[projector, llm.lora, value_head]")


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engines_write_and_learn_what_one_process_does(asked, tmp_path: Path):
    """Worst seen: norm 2.7e-7, weights 1.3e-8, numbers 2.6e-7. Micro-batches of text alone are among them. DeepSpeed
    leaves small weights where they are, so all of these, unless it is told otherwise."""
    start = taught(asked, train__max_steps=1)
    text = "".join(json.dumps({"prompt": f"What is {n}?", "answer": "e"}) + "\n" for n in range(8))
    (tmp_path / "asked.jsonl").write_text((tmp_path / "asked.jsonl").read_text() + text)
    (tmp_path / "deepspeed.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    spread = ("engine.offload=[optimizer, parameters]", f"engine.deepspeed={tmp_path / 'deepspeed.json'}")
    path = asked(
        {"rewards": [{"kind": "regex", "pattern": "e"}], "kl": 0.05, "updates": 2},
        model__lora={"rank": 4, "alpha": 8}, engine={"timeout_seconds": 60},
        train__micro_batch_size=1, init_from=str(start), output_dir=str(tmp_path / "other"),
    )  # fmt: skip
    kinds = (((), ENGINES), (PPO, ("local", "ddp*2", "zero3*2")))
    groups = [[Case(each, ("train.precision=fp32", *kind)) for each in engines] for kind, engines in kinds]
    groups[0].append(Case("zero3*2", ("train.precision=fp32", *spread)))
    outcomes = run_cases(str(path), [case for group in groups for case in group], 2, tmp_path, start_warm)
    for group in groups:
        reference = outcomes[group[0]]
        assert reference.metrics[0]["reward"] > 0
        assert reference.metrics[-1]["kl"] != 0
        for case in group[1:]:
            _, norm, weights = worst_differences(reference, outcomes[case])  # the loss is 0 but for rounding
            assert norm <= 1e-5, case
            assert weights <= 5e-6, case
            for said, found in zip(reference.metrics, outcomes[case].metrics, strict=True):
                assert found == pytest.approx(said, rel=1e-5, abs=1e-6), case
