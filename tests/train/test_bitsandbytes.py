"""Optimizers of bitsandbytes: they train as torch's AdamW does, and their state is saved and resumed to the bit."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from launched import advance, launch, make, save

from vlm.config import load_config
from vlm.distributed import is_main
from vlm.errors import CheckpointError, ConfigError
from vlm.run import train
from vlm.train import bitsandbytes_adamw
from vlm.train.checkpoint import newest_verified
from vlm.train.config import TrainConfig
from vlm.train.engines.base import adam_state, shared_adam_state
from vlm.train.fragments import FragmentReader, read_weights, state_files
from vlm.train.optim import build_optimizer

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="the extra [quant]")  # slow to import

# tensors of more than 4,096 elements
FULL = {"model__lora": None, "model__trainable": ["projector", "llm"], "train__prove": False}


def model():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"projector": torch.nn.Linear(96, 96)})  # a matrix of 9,216 elements, a vector of 96


def steps(optimizer, module, number):
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize(("name", "worst"), [("paged_adamw", 1e-6), ("adamw_8bit", 5e-3), ("paged_adamw_8bit", 5e-3)])
def test_updates_are_those_of_torchs_adamw(name, worst):
    """Worst seen 2.4e-7 with float32 state, 1.8e-3 in 8 bits, of five updates of 0.01 each."""
    weights = {}
    for optimizer in ("adamw", name):
        module = model()
        config = TrainConfig(max_steps=1, learning_rate=1e-2, weight_decay=0.1, optimizer=optimizer)
        steps(build_optimizer(module, config), module, 5)
        weights[optimizer] = module
    for expected, got in zip(weights["adamw"].parameters(), weights[name].parameters(), strict=True):
        assert (expected - got).abs().max() < worst


def test_8bit_state_is_a_byte_per_moment_and_a_scale_per_256_elements():
    module = model()
    optimizer = build_optimizer(module, TrainConfig(max_steps=1, optimizer="adamw_8bit"))
    matrix, vector = module.parameters()
    shapes = {key: (tuple(t.shape), t.dtype) for key, t in adam_state(optimizer, matrix).items()}
    assert shapes == {
        "step": ((), torch.float32),
        "state1": ((96, 96), torch.uint8),
        "state2": ((96, 96), torch.uint8),
        "absmax1": ((36,), torch.float32),
        "absmax2": ((36,), torch.float32),
    }
    assert set(adam_state(optimizer, vector)) == {"step", "exp_avg", "exp_avg_sq"}  # float32 below 4,096 elements
    assert [fragment.name for fragment in shared_adam_state(optimizer)] == ["all/qmap1", "all/qmap2"]


def test_without_bitsandbytes_the_config_error_names_the_extra(monkeypatch, config_file):
    monkeypatch.setattr(bitsandbytes_adamw.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"adamw_8bit needs bitsandbytes.*pip install -e '\.\[quant\]'"):
        run(config_file(train__optimizer="adamw_8bit"))


@pytest.mark.parametrize(
    ("engine", "optimizer", "said"),
    [
        ({"kind": "fsdp"}, "adamw_8bit", "train.optimizer adamw_8bit does not work with engine.kind fsdp"),
        ({"kind": "fsdp"}, "paged_adamw", "train.optimizer paged_adamw does not work with engine.kind fsdp"),
        ({"kind": "zero", "offload": ["optimizer"]}, "paged_adamw_8bit", "or set train.optimizer to adamw_8bit"),
    ],
)
def test_combinations_that_do_not_work_are_refused_by_name(engine, optimizer, said, config_file):
    with pytest.raises(ConfigError, match=said):
        load_config(config_file(engine=engine, train__optimizer=optimizer))
    load_config(config_file(engine={"kind": "zero", "offload": ["optimizer"]}, train__optimizer="adamw_8bit"))


def run(path, **changes):
    return train(load_config(path), path.read_text())


def state(folder):
    reader = FragmentReader(state_files(folder, "optimizer"))
    return {name: reader.whole(name) for name in reader.shapes}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["paged_adamw", "paged_adamw_8bit"])
def test_a_run_resumes_to_the_bit(optimizer, config_file, tmp_path):
    changes = FULL | {"train__optimizer": optimizer, "train__schedule": "constant"}
    straight = run(config_file("a.yaml", output_dir=str(tmp_path / "straight"), train__max_steps=8, **changes))
    run(config_file("b.yaml", train__max_steps=5, **changes))
    resumed = run(config_file("c.yaml", train__max_steps=8, **changes))
    ends = [newest_verified(folder) for folder in (straight, resumed)]
    assert equal(*map(read_weights, ends))
    assert equal(*map(state, ends))
    kinds = {tensor.dtype for tensor in state(ends[0]).values()}
    assert (torch.uint8 in kinds) == optimizer.endswith("8bit")


@pytest.mark.thorough
@pytest.mark.slow
def test_optimizers_with_float32_state_go_on_from_each_other_and_8bit_does_not(config_file):
    run(config_file(train__max_steps=2, **FULL))
    run(config_file(train__max_steps=4, train__optimizer="paged_adamw", **FULL))
    run(config_file(train__max_steps=5, **FULL))
    with pytest.raises(CheckpointError) as caught:
        run(config_file(train__max_steps=6, train__optimizer="adamw_8bit", **FULL))
    assert "train.optimizer: 'any with float32 state' -> 'any with 8-bit state'" in str(caught.value)
    assert "start from its weights with init_from" in str(caught.value)


ENGINES = {  # zero0 is the engine of ddp
    "ddp": ["engine.kind=ddp"],
    "zero2": ["engine.kind=zero", "engine.stage=2"],
    "zero2-offload": ["engine.kind=zero", "engine.stage=2", "engine.offload=[optimizer]"],
    "zero3": ["engine.kind=zero", "engine.stage=3"],
}
PIPELINE = {
    "pipeline": [
        "engine.kind=pipeline", "engine.num_stages=2", "model.trainable=[projector, llm.lora]",
        "model.lora={rank: 64, alpha: 64}",
    ]
}  # fmt: skip


def train_in_two_goes(task):
    """Six steps of every engine, and the last three again from a checkpoint."""
    for name, options in task["engines"].items():
        folder = Path(task["folder"]) / name
        straight = make(task["path"], options)
        losses = [output.loss for output in advance(straight, 0, 3)]
        save(straight, folder / "half")
        losses += [output.loss for output in advance(straight, 3, 6)]
        save(straight, folder / "straight")
        second = make(task["path"], options)
        second.engine.load(folder / "half")
        advance(second, 3, 6)
        save(second, folder / "resumed")
        if is_main():
            (folder / "losses.json").write_text(json.dumps(losses))


def load_other_partitions(path, half):
    """8-bit state of stage 2 fits stage 1, which cuts as it does, and neither stage 3 nor ddp."""
    make(path, ["engine.kind=zero", "engine.stage=1"]).engine.load(half)
    for other in ("zero3", "ddp"):
        with pytest.raises(CheckpointError) as caught:
            make(path, ENGINES[other]).engine.load(half)
        assert "does not fit this launch" in str(caught.value)
        assert "resume with those, or export this run and start in another output_dir" in str(caught.value)


def work(task):
    """On each process of a launch."""
    if task["engines"] == PIPELINE:  # full training, where the embedding is the output layer too
        with pytest.raises(ConfigError, match=r"does not work with engine.kind pipeline for this model"):
            make(task["path"], ["engine.kind=pipeline", "engine.num_stages=2"])
    train_in_two_goes(task)
    if task["engines"] == ENGINES:
        load_other_partitions(task["path"], Path(task["folder"]) / "zero2/half")


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_8bit_state_of_two_processes_resumes_to_the_bit_and_learns(config_file, tmp_path):
    path = config_file(train__optimizer="adamw_8bit", train__micro_batch_size=1, **FULL)
    task = {"path": str(path), "folder": str(tmp_path)}
    for engines in (ENGINES, PIPELINE):
        launch(work, task | {"engines": engines})
        for name in engines:
            straight, resumed = (state(tmp_path / name / which) for which in ("straight", "resumed"))
            assert torch.uint8 in {tensor.dtype for tensor in straight.values()}, name
            assert equal(straight, resumed), name
            assert equal(*(read_weights(tmp_path / name / which) for which in ("straight", "resumed"))), name
            losses = json.loads((tmp_path / name / "losses.json").read_text())
            assert losses[-1] < losses[0], name
