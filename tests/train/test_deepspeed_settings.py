"""What DeepSpeed is told, and a user's own JSON beside it."""

import json

import pytest
import torch

from vlm.errors import ConfigError
from vlm.train.config import TrainConfig
from vlm.train.engines.kind import Place
from vlm.train.engines.kinds import Zero
from vlm.train.engines.zero import import_deepspeed

TRAIN = {"max_steps": 1, "global_batch_size": 16, "micro_batch_size": 2, "learning_rate": 1e-4, "precision": "bf16"}


def settings(tmp_path, own=None, train=(), num_trained=0, **engine):
    values = {"stage": 2} | engine
    if own is not None:
        (tmp_path / "own.json").write_text(own if isinstance(own, str) else json.dumps(own))
        values["deepspeed"] = str(tmp_path / "own.json")
    zero, place = Zero.model_validate(values), Place(num_data_ranks=2)
    return zero.settings_of(TrainConfig.model_validate(TRAIN | dict(train)), 4, place, zero.stage, num_trained)


def test_the_config_alone(tmp_path):
    found = settings(tmp_path, offload=["optimizer", "parameters"], num_trained=1000, stage=3)
    assert found["train_batch_size"] == 16
    assert found["gradient_accumulation_steps"] == 4
    assert found["gradient_clipping"] == 1.0
    assert found["zero_optimization"] == {
        "stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"},
        "reduce_bucket_size": 1000,
    }  # fmt: skip


def test_the_bucket_of_reduction_is_no_larger_than_deepspeeds(tmp_path):
    assert settings(tmp_path, num_trained=10**10)["zero_optimization"]["reduce_bucket_size"] == 500_000_000


def test_what_a_json_adds_is_taken_and_what_it_repeats_may_be_auto(tmp_path):
    own = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": "auto"}},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5},
        "wall_clock_breakdown": True,
    }
    found = settings(tmp_path, own, num_trained=1000)
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5}
    assert found["wall_clock_breakdown"] is True
    assert found["train_batch_size"] == 16
    assert "optimizer" not in found  # ours is used, and it was said to be the same
    assert "bf16" not in found


def test_what_a_json_says_and_nothing_reads_is_named(tmp_path, capsys):
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 100, "warmup_max_lr": "auto"}}
    optimizer = {"type": "AdamW", "params": {"lr": 1e-4, "eps": 1e-6}}
    settings(tmp_path, {"scheduler": scheduler, "optimizer": optimizer, "fp16": {"enabled": False, "loss_scale": 0}})
    said = capsys.readouterr().err
    assert "optimizer.params.eps, scheduler.type, scheduler.params.warmup_num_steps change nothing" in said


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"train_batch_size": 32}, "train_batch_size 32, but train.global_batch_size 16"),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu 1, but train.micro_batch_size 2"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps 1, but .* which is 4"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping 0\.5, but train\.max_grad_norm 1\.0"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage 3, but engine\.stage 2"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            r"offload_optimizer\.device 'cpu', but engine\.offload, which gives 'none'",
        ),
        ({"optimizer": {"type": "Lamb"}}, r"optimizer\.type 'Lamb', but the optimizer here, 'AdamW'"),
        ({"optimizer": {"params": {"lr": 1e-3}}}, r"optimizer\.params\.lr 0\.001, but train\.learning_rate 0\.0001"),
        ({"bf16": {"enabled": False}}, r"bf16\.enabled False, but train\.precision bf16, so True"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "zero_hpz_partition_size 8, but checkpoints need .* 1"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "compute_grad_norm False, but every step's norm .* True"),
    ],
)
def test_a_contradiction_names_both_values(tmp_path, own, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, own)


def test_all_contradictions_are_named_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        settings(tmp_path, {"train_batch_size": 32, "gradient_clipping": 0.5})
    assert str(caught.value).count(", but ") == 2
    assert 'write "auto"' in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a list, not an object"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_a_file_that_is_no_json_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=rf"engine\.deepspeed: .*own\.json {message}"):
        settings(tmp_path, text)


def test_deepspeed_compiles_nothing():
    """Its all-reduce for CPUs is built at first use; a build that was killed would hang all later ones."""
    import_deepspeed(torch.device("cpu"))
    from deepspeed.comm.torch import build_shm_op

    assert build_shm_op() is None
