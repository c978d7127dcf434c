import pytest
import torch
from torch import nn

from vlm.train.config import TrainConfig
from vlm.train.optim import Schedule, build_optimizer, build_schedule, parameter_groups, set_learning_rates


def rates(shape, **kwargs):
    schedule = Schedule(shape=shape, **{"floor": 0.0, "warmup_steps": 2, "max_steps": 6} | kwargs)
    return [schedule(step) for step in range(7)]


def test_the_second_matrices_of_adapters_may_have_a_rate_of_their_own():
    """LoRA+: 16 times that of the first ones."""
    model = nn.ModuleDict({"llm": nn.ModuleDict({"lora_A": nn.Linear(2, 2, False), "lora_B": nn.Linear(2, 2, False)})})
    for ratio, rates in ((16.0, [0.01, 0.16]), (1.0, [0.01])):
        config = TrainConfig(max_steps=1, learning_rate=0.01, lora_b_rate_ratio=ratio)
        groups = parameter_groups(model, config)
        assert [group["initial_lr"] for group in groups] == pytest.approx(rates)


def test_schedules_in_numbers():
    assert rates("constant") == [0.5, 1, 1, 1, 1, 1, 1]
    assert rates("linear") == [0.5, 1, 1, 0.75, 0.5, 0.25, 0]
    assert rates("cosine") == pytest.approx([0.5, 1, 1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)
    assert rates("cosine", floor=0.2)[-1] == pytest.approx(0.2)
    assert rates("step", decay_every=2, decay_factor=0.5) == [0.5, 1, 1, 1, 0.5, 0.5, 0.25]
    assert rates("step", decay_every=1, floor=0.05) == pytest.approx([0.5, 1, 1, 0.1, 0.05, 0.05, 0.05])


def test_the_warm_up_may_rise_from_more_than_nothing():
    assert rates("constant", warmup_start=0.5)[:3] == [0.75, 1, 1]
    assert rates("constant", warmup_start=0.2, warmup_steps=4)[:4] == pytest.approx([0.4, 0.6, 0.8, 1])
    config = TrainConfig(
        max_steps=9, schedule="step", decay_every=3, decay_factor=0.5, warmup_steps=2, warmup_start_ratio=0.1
    )
    assert build_schedule(config, 9) == Schedule("step", 0.0, 2, 9, 0.1, 3, 0.5)


def test_warm_up_may_be_a_share_of_the_run():
    schedule = build_schedule(TrainConfig(max_steps=100, warmup_ratio=0.03, learning_rate=2.0), 100)
    assert (schedule.warmup_steps, schedule(0), schedule(2)) == (3, pytest.approx(1 / 3), 1.0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.projector = nn.Linear(3, 4)
        self.llm = nn.ModuleDict({"norm": nn.LayerNorm(4), "out": nn.Linear(4, 5, bias=False)})


def test_matrices_decay_vectors_do_not_and_each_part_has_its_learning_rate():
    config = TrainConfig(max_steps=1, learning_rate=1e-3, learning_rates={"llm": 1e-5}, weight_decay=0.1)
    optimizer = build_optimizer(Model(), config)
    set_learning_rates(optimizer, 0.5)
    groups = {
        (group["part"], group["weight_decay"]): (sorted(p.ndim for p in group["params"]), group["lr"])
        for group in optimizer.param_groups
    }
    assert groups == {
        ("projector", 0.1): ([2], pytest.approx(5e-4)),
        ("projector", 0.0): ([1], pytest.approx(5e-4)),
        ("llm", 0.0): ([1, 1], pytest.approx(5e-6)),
        ("llm", 0.1): ([2], pytest.approx(5e-6)),
    }


def test_frozen_parameters_are_in_no_group():
    model = Model()
    model.llm.requires_grad_(False)
    optimizer = build_optimizer(model, TrainConfig(max_steps=1))
    assert {group["part"] for group in optimizer.param_groups} == {"projector"}
    assert isinstance(optimizer, torch.optim.AdamW)
