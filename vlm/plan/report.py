"""A plan as lines of text."""

from __future__ import annotations

from vlm.config import RunConfig
from vlm.plan.alternatives import Alternative, alternatives, largest_micro_batch
from vlm.plan.estimate import GIB, Plan, estimate
from vlm.plan.memory import usable
from vlm.plan.shapes import read_shapes
from vlm.train.engines.kinds import kind_of_launch

_COLUMNS = ("weights", "gradients", "optimizer", "activations", "buffers", "total")


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


def full_report(config: RunConfig, gpus: int, memory_bytes: int, memory_name: str) -> list[str]:
    """What `vlm plan` prints. Arguments as `describe_plan`; `memory_name` says what the memory is of."""
    shape = read_shapes(config.model)
    plan = estimate(config, gpus, shape=shape)
    size = largest_micro_batch(config, gpus, memory_bytes, shape)
    lines = [*plan_table(plan, config), verdict(plan, memory_bytes), f"  each device: {memory_name}"]
    now = config.train.micro_batch_size
    if size is None:
        lines.append(f"  largest micro-batch that fits: none (now {now})")
    else:
        lines.append(f"  largest micro-batch that fits: {size} row{'s' if size > 1 else ''} (now {now})")
    if kind_of_launch(config.engine, gpus).has_stages:
        lines.append(f"  cut: engine.cuts {list(plan.cuts)}, {_whose(config)}")
    if plan.peak > usable(memory_bytes):
        lines += alternatives_table(alternatives(config, gpus, memory_bytes, shape))
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


def alternatives_table(rows: list[Alternative]) -> list[str]:
    """Changes that would fit, each with its lines for the YAML file."""
    if not rows:
        return ["nothing tried here would fit: take a smaller model, shorter rows (data.max_length), or more devices"]
    width = max(len(row.change.name) for row in rows)
    lines = ["would fit:" + " " * max(0, width - 6) + "    GiB  devices  change"]
    for row in rows:
        first, *others = row.change.yaml_lines()
        lines.append(f"  {row.change.name:<{width}}  {row.plan.peak / GIB:>7.1f}  {row.plan.world_size:>7}  {first}")
        lines += [" " * (width + 22) + line for line in others]
    return lines


def _millions(number: int, digits: int) -> str:
    """
    >>> _millions(7_062_902_784, 0), _millions(57_696, 0)
    ('7,063 M', '57,696')
    """
    return f"{number / 1e6:,.{digits}f} M" if number >= 1_000_000 else f"{number:,}"


def _whose(config: RunConfig) -> str:
    return "as the config says" if config.engine.layers_at_cuts else "so that the fullest stage is as small as possible"
