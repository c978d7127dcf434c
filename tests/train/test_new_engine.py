"""An engine that only this test knows: planned, trained with alone and on two processes, resumed, exported, served."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from prove_engines import Case, run_cases, work, worst_differences
from walk import registered, walk
from warm import run_warm

from vlm.config import load_config
from vlm.errors import ConfigError
from vlm.models.trainable import trained_weights
from vlm.plan.alternatives import alternatives
from vlm.plan.estimate import estimate
from vlm.plan.memory import usable
from vlm.train.engines.base import adam_state
from vlm.train.engines.kind import EngineKind, States, Variant, adam_bytes, num_trained
from vlm.train.engines.kinds import ENGINES
from vlm.train.engines.torch_engine import TorchEngine
from vlm.train.fragments import Fragment


class ByHandEngine(TorchEngine):
    """Every process holds the whole model; gradients are averaged one by one after the last backward."""

    holds_whole_model = True

    def wrap(self, module):
        return module

    def reduction(self, is_last):
        return nullcontext()

    def grad_norm(self):
        for gradient in self.gradients() if self.num_data_ranks > 1 else ():
            dist.all_reduce(gradient)
            gradient /= self.num_data_ranks
        return torch.nn.utils.get_total_norm(self.gradients())

    def whole_model(self):
        return nullcontext(self.model)

    def weight_fragments(self):
        for name, tensor in trained_weights(self.model).items():
            yield Fragment.whole(name, tensor)

    def optimizer_fragments(self):
        for name, parameter in self.parameters:
            for key, value in adam_state(self.optimizer, parameter).items():
                yield Fragment.whole(f"{name}/{key}", value)


class ByHand(EngineKind):
    kind: Literal["by_hand"] = "by_hand"

    needs_group = True

    def build(self, inputs):
        return ByHandEngine.over(inputs.loss_module(), inputs)

    @classmethod
    def variants(cls, now):
        return [Variant("by hand", {"kind": "by_hand"}, order=0)]

    def describe(self):
        return "gradients averaged by hand"

    def why_not_optimizer(self, train, tied=None):
        return "by_hand knows adamw only" if train.optimizer != "adamw" else None

    def resident_states(self, parts, train, num_data_ranks, accumulates):
        """Without the buckets of DistributedDataParallel."""
        return States(sum(part.weights for part in parts), int(adam_bytes(train) * num_trained(parts)))


@pytest.fixture
def known():
    with registered(ENGINES, ByHand):
        yield


@pytest.mark.usefixtures("known")
def test_the_config_and_the_plan_ask_it(config_file):
    path = config_file(model__trainable=["projector", "llm"], model__lora=None)
    with pytest.raises(ConfigError, match="by_hand knows adamw only"):
        load_config(path, ["engine.kind=by_hand", "train.optimizer=adamw_8bit"])
    ddp, by_hand = (load_config(path, [f"engine.kind={kind}"]) for kind in ("ddp", "by_hand"))
    trained = estimate(by_hand, 2).num_trained
    (of_ddp,), (of_by_hand,) = estimate(ddp, 2).devices, estimate(by_hand, 2).devices
    assert (of_ddp.buffers, of_by_hand.buffers) == (4 * trained, 0)
    between = (of_ddp.total + of_by_hand.total) // 2
    memory = next(size for size in range(2**30, 2**31, 2**16) if usable(size) >= between)
    assert of_by_hand.total < usable(memory) < of_ddp.total
    assert "by hand" in [each.change.name for each in alternatives(ddp, 2, memory)]


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_it_needs_nothing_but_its_classes(config_file, tiny, capsys):
    path = config_file(engine={"kind": "by_hand"}, train__max_steps=4, train__save_every=2)
    walked = walk(path, next((tiny / "data/images").glob("*.png")), capsys)
    assert "engine: gradients averaged by hand, 1 processes" in walked.log
    assert "engine gradients averaged by hand, 1 device" in walked.log  # of the plan


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_two_processes_train_as_one_does(config_file, tmp_path):
    """Worst seen: no difference, as two micro-batches are added in either case."""
    path = config_file(data__held_out=0.0, model__lora={"rank": 4, "alpha": 8, "dropout": 0.0})
    cases = [Case("local"), *(Case(f"by_hand{form}") for form in ByHand.proven_as)]
    one, two = run_cases(str(path), cases, 4, tmp_path, start).values()
    loss, norm, weights = worst_differences(one, two)
    assert {file.name for file in (two.weights / "weights").iterdir()} >= {"rank-00001.safetensors"}
    assert loss < 1e-6
    assert norm < 1e-5
    assert weights < 5e-6


def start(job, processes):
    code, output = run_warm(work_with_it, job, nproc=processes, timeout=300)
    assert code == 0, output[-6000:]


def work_with_it(job):
    with registered(ENGINES, ByHand):
        work(job)
