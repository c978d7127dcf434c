"""A plan as lines of text, and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vlm.config import RunConfig
from vlm.plan.alternatives import Alternative, alternatives, largest_micro_batch
from vlm.plan.estimate import GIB, Plan, estimate
from vlm.plan.machine import Machine
from vlm.plan.memory import usable
from vlm.plan.numerics import read_numerics
from vlm.plan.shapes import read_shapes
from vlm.plan.step_time import WAITING_FOR_RANKS, Records, RunTime, run_time
from vlm.train.engines.kinds import kind_of_launch

_COLUMNS = ("weights", "gradients", "optimizer", "activations", "buffers", "total")
_LAYERS = ("first_layer", "last_layer")


def describe_plan(config: RunConfig, gpus: int, memory_bytes: int) -> list[str]:
    """What `vlm train` says before it loads anything: the table, whether it fits, and if not, what would.

    Args:
        config: a RunConfig.
        gpus: processes of the launch.
        memory_bytes: of each device.

    Raises:
        ConfigError: the engine does not fit the number of processes.
        CheckpointError: a model's config.json cannot be read.
    """
    shape = read_shapes(config.model)
    plan = estimate(config, gpus, shape=shape)
    lines = [*plan_table(plan, config), verdict(plan, memory_bytes)]
    if plan.peak > usable(memory_bytes):
        lines += alternatives_table(alternatives(config, gpus, memory_bytes, shape))
    return lines


def full_report(
    config: RunConfig, gpus: int, memory_bytes: int, memory_name: str, machine: Machine | None = None,
    records: Records | str = "",
) -> list[str]:  # fmt: skip
    """What `vlm plan` prints. Arguments as `describe_plan`.

    Args:
        memory_name: what the memory is of.
        machine: how fast a device is; None tells no time.
        records: what rows of the data hold, or why that is not known.
    """
    found = _find(config, gpus, memory_bytes, machine, records)
    plan, size, time = found.plan, found.largest_micro_batch, found.time
    lines = [*plan_table(plan, config), verdict(plan, memory_bytes), f"  each device: {memory_name}"]
    now = config.train.micro_batch_size
    if size is None:
        lines.append(f"  largest micro-batch that fits: none (now {now})")
    else:
        lines.append(f"  largest micro-batch that fits: {size} row{'s' if size > 1 else ''} (now {now})")
    if kind_of_launch(config.engine, gpus).has_stages:
        lines.append(f"  cut: engine.cuts {list(plan.cuts)}, {_whose(config)}")
    if config.objective.writes_replies:  # how long they get is not known
        lines += _rollout_lines(config)
    elif machine is None or time is None:
        lines.append("time: name the GPU to be told, as in --gpu H100")
    else:
        lines += time_lines(time, machine)
        if config.objective.needs_reference:
            lines.append(_reference_line(found.reference_hours))
        if isinstance(records, str):
            lines.append(f"  taken for full rows of one record, all of its text supervised: {records}")
    if found.alternatives is not None:
        lines += alternatives_table(found.alternatives, found.times)
    return lines


def _rollout_lines(config: RunConfig) -> list[str]:
    llm = read_shapes(config.model).llm
    width = read_numerics(config, False, llm.takes_varlen).compute
    tokens = config.objective.written("replies_at_once") * config.data.max_length
    cached = 2 * len(llm.blocks) * llm.num_kv_heads * llm.head_dim * width * tokens
    return [
        f"  before each step: replies, with keys and values of up to {cached / GIB:.2f} GiB, given back then",
        "time: not estimated, as it is that of writing replies, whose lengths nobody knows; metrics.jsonl of a run has "
        "step_seconds and rollouts_seconds",
    ]


def report_as_json(
    config: RunConfig, gpus: int, memory_bytes: int, memory_name: str, machine: Machine | None = None,
    records: Records | str = "",
) -> dict[str, Any]:  # fmt: skip
    """What `vlm plan --json` prints: docs/runs.md has the keys. Arguments as `full_report`."""
    found = _find(config, gpus, memory_bytes, machine, records)
    plan = found.plan
    devices = [
        {**{key: value for key, value in asdict(device).items() if key not in _LAYERS}, "total": device.total}
        | ({key: getattr(device, key) for key in _LAYERS} if plan.cuts else {})
        for device in plan.devices
    ]
    return {
        "parameters": plan.num_parameters,
        "trained": plan.num_trained,
        "engine": plan.kind,
        "num_devices": plan.world_size,
        "micro_batch_size": plan.micro_batch_size,
        "precision": config.train.precision,
        "devices": devices,
        "cuts": list(plan.cuts),
        "peak": plan.peak,
        "memory": memory_bytes,
        "memory_of": memory_name,
        "usable_memory": max(0, usable(memory_bytes)),
        "fits": plan.peak <= usable(memory_bytes),
        "largest_micro_batch": found.largest_micro_batch,
        "time": None if machine is None or found.time is None else _time_as_json(found, machine, records),
        "alternatives": None if found.alternatives is None else _alternatives_as_json(found.alternatives, found.times),
    }


@dataclass(frozen=True)
class _Found:
    """What `vlm plan` knows of a run. Without a machine there is no time; where the run fits, no alternatives."""

    plan: Plan
    largest_micro_batch: int | None
    time: RunTime | None
    reference_hours: float | None  # before the first step; None without a reference, or where the data is not known
    alternatives: list[Alternative] | None
    times: list[RunTime] | None


def _find(config: RunConfig, gpus: int, memory_bytes: int, machine: Machine | None, records: Records | str) -> _Found:
    shape = read_shapes(config.model)
    plan = estimate(config, gpus, shape=shape)
    known = None if isinstance(records, str) else records
    machine = None if config.objective.writes_replies else machine
    time = None if machine is None else run_time(config, plan, machine, known)
    found, times = None, None
    if plan.peak > usable(memory_bytes):
        found = alternatives(config, gpus, memory_bytes, shape)
        times = None if machine is None else [run_time(each.config, each.plan, machine, known) for each in found]
    hours = None
    if config.objective.needs_reference and time is not None and known is not None:
        hours = _reference_hours(config, time, known)
    return _Found(plan, largest_micro_batch(config, gpus, memory_bytes, shape), time, hours, found, times)


def _time_as_json(found: _Found, machine: Machine, records: Records | str) -> dict[str, Any]:
    time = found.time
    assert time is not None
    return {
        "step_seconds": time.step,
        "parts": time.parts,
        "samples_per_second": None if time.samples is None else time.samples / time.step,
        "steps": time.num_steps,
        "hours": time.hours,
        "reference_hours": found.reference_hours,
        "machine": machine.name,
        "assumptions": [
            *([machine.assumption] if machine.assumption else []),
            *([f"full rows of one record: {records}"] if isinstance(records, str) else []),
        ],
    }


def _alternatives_as_json(found: list[Alternative], times: list[RunTime] | None) -> list[dict[str, Any]]:
    told = [(None, None)] * len(found) if times is None else [(time.step, time.hours) for time in times]
    return [
        {
            "name": each.change.name,
            "changes": each.change.values,
            "peak": each.plan.peak,
            "num_devices": each.plan.world_size,
            "step_seconds": step,
            "hours": hours,
        }
        for each, (step, hours) in zip(found, told, strict=True)
    ]


def _reference_line(hours: float | None) -> str:
    line = "  before the first step, once: the reference's log-probabilities of all replies"
    return line if hours is None else f"{line}, about {_hours(hours)}"


def _reference_hours(config: RunConfig, time: RunTime, records: Records) -> float:
    """A forward pass takes a third of forward and backward, a quarter where activations are computed again."""
    share = 4 if config.model.gradient_checkpointing else 3
    computing = time.step - time.parts.get("optimizer", 0.0)
    steps = records.num_rows / (1 - config.data.held_out) / config.train.global_batch_size
    return computing * steps / share / 3600


def time_lines(time: RunTime, machine: Machine) -> list[str]:
    """Step time, samples a second and hours, what the step consists of, and on what this rests."""
    line = f"time: {_seconds(time.step)} a step"
    if time.samples is not None:
        line += f", {time.samples / time.step:,.3g} samples/s"
    if time.hours is not None:
        line += f", {_hours(time.hours)} for {time.num_steps:,} steps"
    parts = sorted(time.parts.items(), key=lambda part: -part[1])
    shares = ", ".join(f"{name} {seconds / time.step:.0%}" for name, seconds in parts if seconds > 0.005 * time.step)
    lines = [line, f"  of it: {shares}", f"  machine: {machine.name}"]
    lines += [f"  {machine.assumption}"] if machine.assumption else []
    if machine.is_link_assumed and WAITING_FOR_RANKS in time.parts:
        lines.append(f"  {machine.link / 1e9:g} GB/s between devices are assumed, not measured")
    return lines


def plan_table(plan: Plan, config: RunConfig) -> list[str]:
    """What each device holds, in GiB."""
    train, kind = config.train, kind_of_launch(config.engine, plan.world_size)
    lines = [
        f"{_millions(plan.num_parameters, 0)} parameters, {_millions(plan.num_trained, 1)} trained; "
        f"engine {kind.describe()}, {plan.world_size} device{'s' if plan.world_size > 1 else ''}; "
        f"{plan.micro_batch_size} x {config.data.max_length} tokens per forward; {train.precision}",
        f"{'GiB':<24}" + "".join(f"{name:>12}" for name in _COLUMNS) + "  peak",
    ]
    for device in plan.devices:
        values = (
            device.parameters,
            device.gradients,
            device.optimizer,
            device.activations,
            device.buffers,
            device.total,
        )
        name = device.name
        if kind.has_stages:
            name += f", layers {device.first_layer}-{device.last_layer}"
        if kind.has_stages and device.num_devices > 1:
            name += f" x{device.num_devices}"
        lines.append(f"{name:<24}" + "".join(f"{value / GIB:>12.2f}" for value in values) + f"  {device.moment}")
        if device.host:
            lines.append(f"{'':<24}{device.host / GIB:.2f} GiB more in the host's memory for each device")
    return lines


def verdict(plan: Plan, memory: int) -> str:
    """One line: whether it fits."""
    room = usable(memory)
    kept = f"{(memory - room) / GIB:.1f} GiB of it are left free for the driver and for fragments"
    if plan.peak <= room:
        return f"fits: {plan.peak / GIB:.1f} of {memory / GIB:.1f} GiB ({kept})"
    return f"DOES NOT FIT: {plan.peak / GIB:.1f} of {memory / GIB:.1f} GiB ({kept})"


def alternatives_table(rows: list[Alternative], times: list[RunTime] | None = None) -> list[str]:
    """Changes that would fit, each with its lines for the YAML file; with their times, the fastest first."""
    if not rows:
        return ["nothing tried here would fit: take a smaller model, shorter rows (data.max_length), or more devices"]
    width = max(len(row.change.name) for row in rows)
    unit = "" if times is None else f"  {'s/step' if any(time.hours is None for time in times) else 'hours':>8}"
    lines = ["would fit:" + " " * max(0, width - 6) + f"    GiB  devices{unit}  change"]
    order = range(len(rows)) if times is None else sorted(range(len(rows)), key=lambda at: times[at].step)
    for row, time in ((rows[at], None if times is None else times[at]) for at in order):
        first, *others = row.change.yaml_lines()
        told = "" if time is None else f"  {time.step if 's/step' in unit else time.hours:>8.3g}"
        line = f"  {row.change.name:<{width}}  {row.plan.peak / GIB:>7.1f}  {row.plan.world_size:>7}{told}  "
        lines.append(line + first)
        lines += [" " * len(line) + other for other in others]
    return lines


def _seconds(seconds: float) -> str:
    """
    >>> _seconds(0.0123), _seconds(2.345)
    ('12 ms', '2.3 s')
    """
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _hours(hours: float) -> str:
    """
    >>> _hours(0.005), _hours(0.2), _hours(36.2)
    ('18 s', '12 min', '36.2 h')
    """
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:,.1f} h"


def _millions(number: int, digits: int) -> str:
    """
    >>> _millions(7_062_902_784, 0), _millions(57_696, 0)
    ('7,063 M', '57,696')
    """
    return f"{number / 1e6:,.{digits}f} M" if number >= 1_000_000 else f"{number:,}"


def _whose(config: RunConfig) -> str:
    return "as the config says" if config.engine.layers_at_cuts else "so that the fullest stage is as small as possible"
