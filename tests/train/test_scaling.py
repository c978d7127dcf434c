"""A scaled loss, as float16 needs it. Here it is computed in float32, where it must change nothing."""

import copy
import json
import math
import os
from pathlib import Path

import pytest
import torch
from launched import advance, launch, make, save

from vlm import faults, prepare
from vlm.config import load_config
from vlm.errors import ConfigError, TrainingDiverged
from vlm.models.trainable import trained_weights
from vlm.objectives.lm import LanguageModeling
from vlm.run import train
from vlm.train.checkpoint import newest_verified
from vlm.train.config import TrainConfig
from vlm.train.engines.base import LossModule
from vlm.train.engines.kind import Place
from vlm.train.engines.kinds import Zero
from vlm.train.engines.local import LocalEngine
from vlm.train.fragments import FragmentReader, read_weights, state_files
from vlm.train.optim import build_optimizer
from vlm.train.scaling import LossScale

OVERFLOW = "gradient@3/1=nan"  # step 3, on rank 1


def test_an_overflow_halves_the_factor_and_a_row_of_good_steps_doubles_it():
    scale = LossScale(8.0, growth_interval=3)
    factors = []
    for grad_norm in (1.0, 1.0, math.inf, 1.0, 1.0, 1.0, math.nan, 1.0):
        overflowed = scale.settle(2.0, grad_norm)
        assert overflowed == (not math.isfinite(grad_norm))
        factors.append(scale.factor)
    assert factors == [8, 8, 4, 4, 4, 8, 4, 4]


def test_a_loss_that_is_not_finite_is_no_overflow_and_neither_are_gradients_at_a_factor_of_one():
    scale = LossScale(2.0)
    assert (scale.settle(math.nan, math.nan), scale.factor) == (False, 2.0)
    assert (scale.settle(1.0, math.inf), scale.factor) == (True, 1.0)
    assert (scale.settle(1.0, math.inf), scale.factor) == (False, 1.0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_float16_is_refused_on_the_cpu_in_one_line_and_not_on_a_gpu(device, config_file):
    settings = load_config(config_file(train__precision="fp16"))
    if device == "cuda":
        prepare.check_available(settings, torch.device(device))
        return
    with pytest.raises(ConfigError, match=r"^train.precision fp16 needs a GPU, .*precision to auto, bf16 or fp32$"):
        prepare.check_available(settings, torch.device(device))


def test_a_config_with_float16_ends_on_the_cpu_before_a_run_folder_is_made(config_file, tmp_path):
    path = config_file(train__precision="fp16", engine={"device": "cpu"})
    with pytest.raises(ConfigError, match="needs a GPU"):
        train(load_config(path), path.read_text())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("precision", "agrees"), [("fp16", True), ("bf16", False), ("fp32", False)])
def test_the_users_deepspeed_json_may_say_float16_when_the_config_does(precision, agrees, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"fp16": {"enabled": True, "loss_scale": 0}}))
    ours = Zero(stage=2, deepspeed=str(tmp_path / "ds.json"))

    def settings():
        train = TrainConfig(max_steps=1, precision=precision)
        return ours.settings_of(train, 1, Place(), ours.stage)

    if agrees:
        assert "fp16" not in settings()  # the scale is ours; DeepSpeed works in float32
        return
    with pytest.raises(ConfigError, match=rf"fp16.enabled True, but train.precision {precision}, so False"):
        settings()


@pytest.fixture
def engines(config_file):
    """An engine with a scaled loss and one without, over equal models, and the micro-batches of a step."""
    run = make(str(config_file(train__max_grad_norm=0.5)), ["model.lora={rank: 4, alpha: 8}"])

    def engine(loss_scale):
        model = copy.deepcopy(run.built.model)
        settings = TrainConfig(max_steps=1, learning_rate=1e-3)
        return LocalEngine(
            LossModule(model, LanguageModeling()), build_optimizer(model, settings), device=torch.device("cpu"),
            max_grad_norm=0.5, loss_scale=loss_scale,
        )  # fmt: skip

    return engine(LossScale()), engine(None), next(run.data.train.iterate(0))


def test_a_scaled_step_equals_one_that_is_not(engines):
    """Equal to the bit, as a power of two rounds nothing."""
    scaled, plain, batches = engines
    for _ in range(3):
        a, b = (engine.train_step(batches, 40.0, 1.0) for engine in (scaled, plain))
        assert (a.loss, a.applied, a.overflowed) == (b.loss, True, False)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-6)
        assert (a.loss_scale, b.loss_scale) == (65536, None)
    weights = trained_weights(plain.model)
    for name, tensor in trained_weights(scaled.model).items():
        assert torch.allclose(tensor, weights[name], rtol=0, atol=1e-7), name


def test_an_overflow_leaves_the_weights_and_is_told_from_a_bad_step(engines, monkeypatch):
    scaled, _, batches = engines
    before = {name: tensor.clone() for name, tensor in trained_weights(scaled.model).items()}
    for fault, overflowed, factor in (("gradient=nan", True, 32768), ("loss=nan", False, 32768)):
        monkeypatch.setenv("VLM_FAULT", fault)
        faults._fired.clear()
        output = scaled.train_step(batches, 40.0, 1.0)
        assert (output.applied, output.overflowed, scaled.loss_scale.factor) == (False, overflowed, factor)
    after = trained_weights(scaled.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert scaled.train_step(batches, 40.0, 1.0).applied


ENGINES = {
    "ddp": ["engine.kind=ddp"],
    "zero1": ["engine.kind=zero", "engine.stage=1"],
    "zero2": ["engine.kind=zero", "engine.stage=2"],
    "zero3": ["engine.kind=zero", "engine.stage=3"],
    "fsdp": ["engine.kind=fsdp"],
}
PIPELINE = {"pipeline": ["engine.kind=pipeline", "engine.num_stages=2"]}


def train_with_and_without(task):
    """On each process: six steps of every engine, plain, with a scaled loss, and with an overflow in step 3."""
    for name, options in task["engines"].items():
        folder = Path(task["folder"]) / name
        for variant in ("plain", "scaled", "overflow"):
            own = None if variant == "plain" else LossScale(1024.0, growth_interval=2)
            prepare.loss_scale_for = lambda precision, own=own: own
            faults._fired.clear()
            # the last stage of a pipeline alone has the loss
            os.environ["VLM_FAULT"] = OVERFLOW if variant == "overflow" else ""
            run = make(task["path"], options)
            before = advance(run, 0, 2)
            if variant == "overflow":
                save(run, folder / "before")
                before += advance(run, 2, 3)
                save(run, folder / "after")
            rest = advance(run, 2 if variant != "overflow" else 3, 6)
            save(run, folder / variant)
            (folder / f"{variant}.json").write_text(json.dumps([vars(output) for output in before + rest]))


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engines", [ENGINES, PIPELINE], ids=["data", "pipeline"])
def test_on_every_engine_a_scaled_loss_changes_nothing_and_an_overflow_skips_one_step(engines, config_file, tmp_path):
    path = config_file(train__micro_batch_size=1, train__max_grad_norm=0.5, model__lora={"rank": 4, "alpha": 8})
    launch(train_with_and_without, {"path": str(path), "folder": str(tmp_path), "engines": engines})
    for name in engines:
        folder = tmp_path / name
        plain, scaled, overflow = (
            json.loads((folder / f"{which}.json").read_text()) for which in ("plain", "scaled", "overflow")
        )
        for key in ("loss", "grad_norm"):
            expected = [output[key] for output in plain]
            assert [output[key] for output in scaled] == pytest.approx(expected, rel=1e-6), name  # worst seen 0
        assert [output["loss_scale"] for output in scaled] == [1024] * 2 + [2048] * 2 + [4096] * 2, name
        weights = read_weights(folder / "plain")
        for key, tensor in read_weights(folder / "scaled").items():
            assert (tensor - weights[key]).abs().max() < 1e-6, (name, key)
        assert [output["overflowed"] for output in overflow] == [False] * 2 + [True] + [False] * 3, name
        assert [output["loss_scale"] for output in overflow] == [1024] * 2 + [2048] + [1024] * 2 + [2048], name
        kept, unchanged = read_weights(folder / "before"), read_weights(folder / "after")
        assert all(torch.equal(kept[key], unchanged[key]) for key in kept), name
        assert FragmentReader(state_files(folder / "overflow", "optimizer")).whole("loss_scale").tolist() == [2048, 1]


@pytest.fixture
def on_cpu(monkeypatch):
    """Let float16 train on the CPU: slowly, and with the numbers of a GPU."""
    monkeypatch.setattr("vlm.run.check_available", lambda train, device: None)
    monkeypatch.setattr(prepare, "loss_scale_for", lambda precision: LossScale(1024.0, growth_interval=4))


@pytest.mark.slow
def test_a_float16_run_learns_passes_an_overflow_and_resumes_to_the_bit(on_cpu, config_file, tmp_path, monkeypatch):
    changes = {"train__precision": "fp16", "train__schedule": "constant"}
    monkeypatch.setenv("VLM_FAULT", "gradient@7=nan")
    path = config_file("a.yaml", output_dir=str(tmp_path / "straight"), **changes)
    straight = train(load_config(path), path.read_text())
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss_scale"] for line in lines] == [1024] * 4 + [2048] * 3 + [1024] * 4 + [2048]
    assert [line["overflowed_steps"] for line in lines] == [0] * 6 + [1] + [0] * 5
    assert not any(line["bad_steps"] for line in lines)  # max_bad_steps is 0: one would have stopped the run
    losses = [line["loss"] for line in lines]
    assert losses[6] is None
    assert losses[-1] < losses[0]
    faults._fired.clear()
    for steps in (9, 12):
        path = config_file("b.yaml", train__max_steps=steps, **changes)
        resumed = train(load_config(path), path.read_text())
    expected, got = (read_weights(newest_verified(run)) for run in (straight, resumed))
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    reader = FragmentReader(state_files(newest_verified(resumed), "optimizer"))
    assert reader.whole("loss_scale").tolist() == [2048, 1]


@pytest.mark.slow
def test_a_float16_loss_that_is_not_finite_stops_the_run_and_names_float16(on_cpu, config_file, monkeypatch):
    monkeypatch.setenv("VLM_FAULT", "loss@3=nan")
    path = config_file(train__precision="fp16")
    with pytest.raises(TrainingDiverged, match=r"too large for float16: set train.precision to bf16 or fp32"):
        train(load_config(path), path.read_text())
