"""`vlm plan` and what it is made of: the estimate of a launch, what fits, and what is said."""

from __future__ import annotations

import json
import re

import pytest
from conftest_plan import changed

from vlm.cli.main import main
from vlm.config import RunConfig
from vlm.errors import ConfigError
from vlm.models.config import PartialConfig, QuantizationConfig
from vlm.plan.alternatives import Change, alternatives, largest_micro_batch
from vlm.plan.estimate import estimate
from vlm.plan.machine import machine_of_sheet
from vlm.plan.memory import parse_memory, usable
from vlm.plan.numerics import Workload, full_rows
from vlm.plan.report import describe_plan, full_report, report_as_json, verdict
from vlm.plan.shapes import read_shapes
from vlm.plan.step_time import _sent
from vlm.train.engines.kinds import Pipeline, Zero, kind_of_launch

GIB = 2**30


def test_the_columns_add_up_and_static_memory_is_exact(config):
    device = estimate(config).devices[0]
    llm, vision, projector = 256 + 256 + 8 + 2 * 608, read_shapes(config.model).vision.numel, 104 + 72
    assert device.parameters == 2 * (llm + vision) + 4 * projector
    assert (device.optimizer, device.gradients) == (8 * projector, 4 * projector)  # two micro-batches: they stay
    parts = (device.parameters, device.gradients, device.optimizer, device.activations, device.buffers)
    assert device.total == sum(parts)


def test_full_rows_hold_as_many_images_as_fit(config):
    assert full_rows(config, 16) == Workload(rows=2, length=20, num_images=2, supervised=40)
    assert full_rows(config, 7).num_images == 2  # max_images is 1
    assert full_rows(config, 0).num_images == 0


def test_cached_features_spare_the_encoders_run(config):
    shape = read_shapes(config.model)
    cached = changed(config, data={"cache_features": True})
    pixels, features = 2 * 3 * 28 * 28 * 4, 2 * 16 * 12 * 2
    assert estimate(config, shape=shape).peak - estimate(cached, shape=shape).peak == pixels - features


def test_auto_is_local_alone_and_ddp_together(config):
    assert (estimate(config).kind, estimate(config, 2).kind) == ("local", "ddp")


def test_a_pipeline_puts_the_encoder_first_and_the_head_last(config):
    plan = estimate(changed(config, engine={"kind": "pipeline", "num_stages": 2, "cuts": (2,)}), 4)
    first, last = plan.devices
    assert (plan.num_data_ranks, first.num_devices) == (2, 2)
    assert [(d.first_layer, d.last_layer) for d in plan.devices] == [(0, 1), (2, 3)]
    vision, projector = read_shapes(config.model).vision.numel, 104 + 72
    assert first.parameters == 2 * (vision + 256 + 608) + 4 * projector
    assert last.parameters == 2 * (608 + 8 + 256)
    assert (first.optimizer, last.optimizer) == (12 * projector // 2, 0)


def test_balanced_cuts_leave_no_stage_empty(config):
    assert estimate(changed(config, engine={"kind": "pipeline", "num_stages": 4}), 4).cuts == (1, 2, 3)


@pytest.mark.parametrize(
    ("engine", "gpus", "message"),
    [
        ({"kind": "local"}, 2, "engine.kind is local, which is one process, but there are 2"),
        ({"kind": "pipeline", "num_stages": 2}, 3, "engine.num_stages 2 does not divide 3 processes"),
        (
            {"kind": "pipeline", "num_stages": 2, "cuts": (9,)},
            2,
            "the model has 4 layers, 0 the inputs, 1 to 2 the blocks",
        ),
    ],
)
def test_an_engine_that_does_not_fit_the_launch_says_so(engine, gpus, message, config):
    with pytest.raises(ConfigError, match=message):
        estimate(changed(config, engine=engine), gpus)


def test_memory_is_read_with_its_unit():
    assert [parse_memory(text) for text in ("24", "24GiB", "1.5 GB", "512mib")] == [
        24 * GIB, 24 * GIB, 1_500_000_000, 512 * 2**20,
    ]  # fmt: skip
    assert usable(100 * GIB) == 95 * GIB  # 1 GiB and 4 %
    for wrong in ("", "0", "many", "24 bananas", "-1"):
        with pytest.raises(ConfigError, match="expected a size such as 24GiB"):
            parse_memory(wrong)


def memory_for(bytes_used: int) -> int:
    """The smallest device of which so many bytes are usable."""
    return int((bytes_used + GIB) / 0.96) + 1


def test_largest_micro_batch_divides_the_rows_of_a_step(config):
    shape = read_shapes(config.model)
    peaks = {size: estimate(changed(config, train={"micro_batch_size": size}), shape=shape).peak for size in (1, 2, 4)}
    assert peaks[1] < peaks[2] < peaks[4]
    assert largest_micro_batch(config, 1, memory_for(peaks[4]), shape) == 4
    assert largest_micro_batch(config, 1, memory_for(peaks[4] - 1000), shape) == 2
    assert largest_micro_batch(config, 1, memory_for(peaks[1] - 1000), shape) is None


def test_alternatives_are_tried_before_they_are_offered(config):
    full = changed(config, model={"trainable": ("projector", "llm"), "lora": {"rank": 2, "alpha": 4}})
    memory = memory_for(estimate(full).peak - 1000)
    found = {one.change.name: one for one in alternatives(full, 1, memory)}
    assert found["smaller micro-batch"].change.yaml_lines() == ["train: {micro_batch_size: 1}"]
    assert found["gradient checkpointing"].change.yaml_lines() == ["model: {gradient_checkpointing: true}"]
    assert found["LoRA"].change.yaml_lines() == ["model: {trainable: [projector, llm.lora], lora: {rank: 2, alpha: 4}}"]
    assert all(one.plan.peak <= usable(memory) for one in found.values())


def test_what_the_objective_or_the_adapters_refuse_is_not_offered(config):
    """Pipelines write no replies, and engines that spread weights take no DoRA."""
    values = changed(
        config, model={"trainable": ("projector", "llm.lora"), "lora": {"rank": 2, "alpha": 4}}
    ).model_dump()
    values["init_from"] = "an/export"
    dora = {"model": values["model"] | {"lora": {"rank": 2, "alpha": 4, "dora": True}}}
    grpo = {"objective": {"kind": "grpo", "rewards": [{"kind": "exact"}]}}
    offered = []
    for changes in ({}, dora, grpo):
        found = alternatives(RunConfig.model_validate(values | changes), 4, memory_for(10**9), limit=99)
        for one in found:
            RunConfig.model_validate(one.config.model_dump())  # refuses nothing
        offered.append({re.match(r"\w+", one.change.name)[0] for one in found})
    assert [{"pipeline", "fsdp"} & names for names in offered] == [{"pipeline", "fsdp"}, set(), {"fsdp"}]


def test_packed_weights_are_counted_with_their_scales_and_offered_as_qlora(config):
    """Of the linear layers of two blocks: 4 bits, and 1 + 4/256 bytes per 64 weights, in place of 2 bytes each."""
    lora = {"trainable": ("projector", "llm.lora"), "lora": {"rank": 2, "alpha": 4}}
    plain, llm = changed(config, model=lora), config.model.llm.model_copy(update={"quantization": QuantizationConfig()})
    packed = changed(config, model={**lora, "llm": llm})
    numel = sum(linear.inputs * linear.outputs for linear in read_shapes(config.model).llm.linears)
    before, after = (estimate(each).devices[0] for each in (plain, packed))
    assert before.parameters - after.parameters == 2 * (2 * numel - int(numel * (0.5 + (1 + 4 / 256) / 64)))
    for engine in ({"kind": "fsdp"}, {"kind": "zero", "stage": 3}):  # each rank keeps them whole, and shares the rest
        spread = changed(packed, engine=engine)
        plan, kind = estimate(spread, 2), kind_of_launch(spread.engine, 2)
        whole = 2 * int(numel * (0.5 + (1 + 4 / 256) / 64))
        assert plan.devices[0].parameters == whole + (after.parameters - whole) // 2
        # nor are they sent: half of 2 bytes each, for forward and backward
        assert _sent(kind, plan, 1, False) - _sent(kind, plan, 1, True) == 2 * numel * 2 * 2 / 2
    memory = memory_for(max(after.total, before.total - 1))
    found = {one.change.name: one.change.yaml_lines() for one in alternatives(plain, 1, memory, limit=99)}
    assert found["QLoRA"] == ["model: {llm: {quantization: {format: nf4}}}"]


def test_of_some_blocks_only_these_have_gradients_and_optimizer_state(config):
    """Nothing before them trains, so nothing is kept of the blocks before them either."""
    llm = read_shapes(config.model).llm
    model = {"vision": None, "trainable": ("llm",), "partial": {"llm": PartialConfig(last_blocks=1)}}
    last = changed(config, model=model)
    plan, whole = estimate(last), estimate(changed(config, model={**model, "partial": {}}))
    assert plan.num_trained == llm.blocks[-1]
    assert plan.devices[0].optimizer == 8 * llm.blocks[-1]
    assert plan.devices[0].activations < whole.devices[0].activations


def test_8bit_state_is_offered_and_no_engine_that_refuses_it(config):
    full = changed(config, model={"trainable": ("projector", "llm")})
    memory = memory_for(estimate(full).peak - 1000)
    found = {one.change.name: one.change.yaml_lines()[0] for one in alternatives(full, 1, memory, limit=99)}
    assert found["8-bit optimizer state"] == "train: {optimizer: adamw_8bit}"
    assert {"fsdp", "zero stage 2, optimizer on the host"} <= found.keys()
    paged = changed(full, train={"optimizer": "paged_adamw"}, engine={"device": "auto"})
    names = {one.change.name for one in alternatives(paged, 1, memory_for(estimate(paged).peak - 1000), limit=99)}
    assert "zero stage 2" in {name.partition(",")[0] for name in names}
    assert not any("fsdp" in name or "on the host" in name for name in names)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_frozen_weights_in_float16_are_as_large_as_in_bfloat16(precision, config):
    adapters = changed(config, train={"precision": precision})
    assert estimate(adapters) == estimate(changed(config, train={"precision": "bf16"}))


def test_changes_add_up():
    both = Change("a", {"model": {"x": 1}}) + Change("b", {"model": {"y": True}, "train": {"z": "w"}})
    assert (both.name, both.yaml_lines()) == ("a, b", ["model: {x: 1, y: true}", "train: {z: w}"])


def test_verdict_counts_what_is_left_free(config):
    plan = estimate(config)
    assert verdict(plan, 24 * GIB).startswith("fits: 0.0 of 24.0 GiB (2.0 GiB of it are left free")
    assert verdict(plan, GIB).startswith("DOES NOT FIT: 0.0 of 1.0 GiB")


def test_train_gets_the_table_and_alternatives_only_when_it_does_not_fit(config):
    lines = describe_plan(config, 1, 24 * GIB)
    assert len(lines) == 4  # what it is, columns, one device, fits
    full = changed(config, model={"trainable": ("projector", "llm")})
    lines = describe_plan(full, 1, memory_for(estimate(full).peak - 1000))
    assert any(line.startswith("would fit:") for line in lines)


def test_report_of_a_pipeline_says_where_it_is_cut(config):
    lines = full_report(changed(config, engine={"kind": "pipeline", "num_stages": 2}), 2, 24 * GIB, "a card")
    assert sum(line.startswith("stage ") for line in lines) == 2
    assert any(re.search(r"engine.cuts \[\d\]", line) for line in lines)


def test_the_report_as_json_has_the_numbers_of_the_lines(config):
    full = changed(config, model={"trainable": ("projector", "llm")})
    memory = memory_for(estimate(full).peak - 1000)
    found = json.loads(json.dumps(report_as_json(full, 1, memory, "a card", machine_of_sheet("A100"), "no such file")))
    (device,) = found["devices"]
    assert (found["peak"], found["fits"], found["cuts"]) == (device["total"], False, [])
    kinds = ("parameters", "gradients", "optimizer", "activations", "buffers")
    assert found["peak"] == sum(device[kind] for kind in kinds)
    assert found["time"]["step_seconds"] == pytest.approx(sum(found["time"]["parts"].values()))
    assert found["time"]["hours"] == pytest.approx(2 * found["time"]["step_seconds"] / 3600)
    assert all(each["peak"] <= found["usable_memory"] and each["step_seconds"] > 0 for each in found["alternatives"])
    assert report_as_json(config, 1, 24 * GIB, "a card")["time"] is None  # of no machine


def test_the_command_prints_the_report(config, tmp_path, capsys):
    import yaml

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    with pytest.raises(SystemExit) as end:
        main(["plan", str(path), "--gpus", "2", "--memory", "24GiB", "--options", "engine.kind=zero", "engine.stage=3"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "engine zero stage 3, 2 devices; 2 x 20 tokens per forward; bf16" in out
    assert "largest micro-batch that fits: 2 rows (now 2)" in out
    with pytest.raises(SystemExit):
        main(["plan", str(path), "--memory", "24GiB", "--json", "--options", "engine.stage=3"])
    out, err = capsys.readouterr()
    assert json.loads(out)["largest_micro_batch"] == 4  # nothing else on standard output
    assert err.count("warning: engine.stage is not used: engine.kind is auto") == 1


@pytest.mark.parametrize("arguments", [["--gpus", "0"], ["--memory", "lots"]])
def test_a_wrong_number_ends_with_2(arguments, config, tmp_path):
    import yaml

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    with pytest.raises(SystemExit) as end:
        main(["plan", str(path), *arguments])
    assert end.value.code == 2


def test_rows_that_cannot_be_shared_out_are_named_as_training_names_them(config):
    spoiled = changed(config, train={"global_batch_size": 8, "micro_batch_size": 8})
    assert estimate(spoiled, 1).world_size == 1
    with pytest.raises(ConfigError, match=r"8 is not a multiple of .* 8 x 2 data ranks = 16\. Take a multiple of 16"):
        estimate(spoiled, 2)


def test_a_proposal_takes_back_what_the_file_says_of_its_kind(config):
    fsdp = changed(config, engine={"kind": "fsdp", "offload": ["optimizer"], "cuts": [1]})
    zero, *_ = Zero.variants(fsdp.engine)
    assert zero.values == {"kind": "zero", "stage": 2, "offload": ()}
    changes = Change(zero.name, {"engine": zero.values}).apply(fsdp)
    assert changes.engine.model_dump() == Zero(stage=2, device="cpu").model_dump()
    assert Pipeline.variants(fsdp.engine)[0].values["cuts"] is None
    assert Zero.variants(changed(config, engine={"kind": "fsdp"}).engine)[0].values == {"kind": "zero", "stage": 2}
