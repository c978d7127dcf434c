"""What each engine spreads over the ranks, and how the peak of a step is found."""

from __future__ import annotations

import json

import pytest
from conftest_plan import changed

from vlm.plan.blocks import Part
from vlm.plan.timeline import Moment, peak
from vlm.train.engines.kind import States

BUCKET = 4 * 100  # all that trains, far under DeepSpeed's 5e8 elements
# 1,000 bytes of frozen weights; 100 trained parameters
PARTS = (Part("embedding", weights=1000), Part("block 0", weights=400, trained=100))


def states(config, ranks=4, kind="zero", parts=PARTS, accumulates=True, train=(), **engine):
    ours = changed(config, engine={"kind": kind} | engine, train=dict(train))
    return ours.engine.states(parts, ours.train, ranks, accumulates)


@pytest.mark.parametrize("ranks", [1, 4])
def test_one_process_spreads_nothing_and_ddp_adds_buckets_as_large_as_the_gradients(ranks, config):
    assert states(config, ranks, kind="ddp") == (
        States(1400, 800) if ranks == 1 else States(1400, 800, 400, gradient_share=0.0)
    )
    assert states(config, ranks, stage=0) == states(config, ranks, kind="ddp")


@pytest.mark.parametrize(
    ("engine", "expected"),
    [  # 12 bytes of 25 parameters: moments and DeepSpeed's own copy; 4 bytes of each 25 for the gradients
        ({"stage": 1}, States(1400, 300, BUCKET, reduced=100)),
        ({"stage": 1, "offload": ("optimizer",)}, States(1400, 0, BUCKET, host=400)),
        ({"stage": 2}, States(1400, 300, backward_buffers=BUCKET, gradient_share=0.25)),
        ({"stage": 2, "offload": ("optimizer",)}, States(1400, 0, 0, BUCKET, 400, 0.0)),
        # so few weights are all gathered
        ({"stage": 3}, States(350, 300, BUCKET + 1400, gradient_share=0.25)),
        ({"stage": 3, "offload": ("optimizer", "parameters")}, States(0, 0, BUCKET + 1400, 0, 750, 0.0)),
    ],
)
def test_zero_stages(engine, expected, config):
    assert states(config, **engine) == expected


@pytest.mark.parametrize(("accumulates", "share"), [(False, 0.25), (True, 1.0)])
def test_fsdp_spreads_everything_but_sums_whole_gradients(accumulates, share, config):
    found = states(config, kind="fsdp", accumulates=accumulates)
    assert (found.parameters, found.optimizer, found.gradient_share) == (350, 200, share)
    assert found.buffers == 1000 + 2 * 400 + 400  # the rest whole, two blocks, a block's gradients


def test_a_pipeline_stage_is_zero_1_over_its_own_copies(config):
    assert states(config, ranks=2, kind="pipeline") == States(1400, 600, BUCKET, reduced=200)


def test_the_bucket_is_never_above_what_deepspeed_takes(config):
    large = (Part("llm", weights=4, trained=10**9),)
    found = states(config, stage=2, parts=large)
    assert found.backward_buffers == 4 * 500_000_000


def test_the_users_own_bucket_size_counts(config, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 10}}))
    assert states(config, stage=2, deepspeed=str(path)).backward_buffers == 40


A = Part("a", saved=10, forward=5, backward=1, trained=2)
B = Part("b", saved=20, forward=7, backward=30)


def test_the_peak_is_at_the_worst_moment_of_the_walk():
    # a: 10 + 5; b: 10 + 20 + 7; back through b: 30 + 30; through a: 10 + 1; then 8 bytes of gradients
    assert peak((A, B), gradients_stay=False) == Moment("backward, b", 60, 0)
    assert peak((A, B), base=3, gradients_stay=True) == Moment("backward, b", 63, 8)


def test_gradients_can_be_the_peak():
    assert peak((Part("a", saved=10, trained=100),), gradients_stay=False) == Moment("optimizer", 0, 400)


def test_buffers_of_the_backward_count_there_alone():
    assert peak((A, B), gradients_stay=True, backward_buffers=5) == Moment("backward, b", 60, 8, 5)
    assert peak((Part("a", forward=9),), gradients_stay=True, backward_buffers=5) == Moment("forward, a", 9, 0)


def test_a_stage_holds_the_activations_of_every_micro_batch_in_flight():
    assert peak((A, B), gradients_stay=True, num_in_flight=3).activations == 60 + 2 * 30


def test_recomputed_activations_live_in_one_block_at_a_time():
    blocks = tuple(Part(f"block {i}", saved=1, recomputed=50) for i in range(4))
    assert peak(blocks, gradients_stay=False) == Moment("backward, block 3", 54, 0)


@pytest.mark.parametrize(
    ("optimizer", "kind", "on_device", "on_host"),
    [  # of 100 trained parameters; 2.03 bytes a moment pair in 8 bits, DeepSpeed's copy of the weights beside it
        ("adamw_8bit", {"kind": "ddp"}, 203, 0),
        ("paged_adamw", {"kind": "ddp"}, 0, 800),
        ("paged_adamw_8bit", {"kind": "ddp"}, 0, 203),
        ("adamw_8bit", {"kind": "zero", "stage": 2}, 150, 0),
        ("paged_adamw", {"kind": "zero", "stage": 2}, 100, 200),
        ("adamw_8bit", {"kind": "zero", "stage": 2, "offload": ("optimizer",)}, 0, 150 + 100),
        ("paged_adamw_8bit", {"kind": "zero", "stage": 0}, 0, 203),
    ],
)
def test_8bit_and_paged_optimizer_state(optimizer, kind, on_device, on_host, config):
    found = states(config, device="auto", train={"optimizer": optimizer}, **kind)
    assert (found.optimizer, found.host) == (on_device, on_host)


def test_there_are_no_pages_on_the_cpu(config):
    assert states(config, 1, "ddp", device="cpu", train={"optimizer": "paged_adamw"}).optimizer == 800
