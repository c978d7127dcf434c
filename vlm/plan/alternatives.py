"""What could be changed so that a run fits, each change tried on the estimate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vlm.config import RunConfig
from vlm.errors import VLMError
from vlm.models.config import LLMConfig, LoRAConfig, QuantizationConfig
from vlm.plan.estimate import Plan, estimate
from vlm.plan.memory import usable
from vlm.plan.shapes import ModelShape, read_shapes
from vlm.schema import KindSection, Section, annotation_of, one_of
from vlm.train.engines.kind import EngineKind
from vlm.train.engines.kinds import ENGINES, kind_of_launch

_ADAPTERS = LoRAConfig(rank=128, alpha=256)
_PACKED = QuantizationConfig()


@dataclass(frozen=True)
class Change:
    """Keys to set. Nested as in YAML."""

    name: str
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    world_size: int = 0  # 0: as it is

    def __add__(self, other: Change) -> Change:
        sections = {**self.values, **other.values}
        merged = {name: {**self.values.get(name, {}), **other.values.get(name, {})} for name in sections}
        return Change(f"{self.name}, {other.name}", merged, self.world_size or other.world_size)

    def apply(self, config: RunConfig) -> RunConfig:
        """Raises ValueError, not everywhere: what cannot be combined is left out where it is tried."""
        sections = {name: _changed(name, getattr(config, name), values) for name, values in self.values.items()}
        return config.model_copy(update=sections)

    def yaml_lines(self) -> list[str]:
        """
        >>> Change("", {"engine": {"kind": "zero", "stage": 3}}).yaml_lines()
        ['engine: {kind: zero, stage: 3}']
        """
        return [
            f"{section}: {{{', '.join(f'{key}: {_yaml(value)}' for key, value in values.items())}}}"
            for section, values in self.values.items()
        ]


@dataclass(frozen=True)
class Alternative:
    change: Change
    plan: Plan
    config: RunConfig  # with the change


def alternatives(
    config: RunConfig, world_size: int, memory: int, shape: ModelShape | None = None, limit: int = 8
) -> list[Alternative]:
    """Changes after which the run fits into `memory` bytes on every device, the smallest changes first.

    A change that does not suffice alone is tried again with gradient checkpointing, and then with one row per forward.
    """
    shape = shape or read_shapes(config.model)
    found: dict[str, Alternative] = {}
    for change in _changes(config, world_size, memory, shape):
        if change.name in found:  # with fewer devices
            continue
        for tried in _helped(change, config):
            plan = _try(config, tried, world_size, shape)
            if plan is not None and plan.peak <= usable(memory):
                found[change.name] = Alternative(tried, plan, tried.apply(config))
                break
    unique = {(str(one.change.values), one.plan.world_size): one for one in reversed(found.values())}
    return list(reversed(unique.values()))[:limit]


def _helped(change: Change, config: RunConfig) -> Iterator[Change]:
    """The change alone, then with what costs time only, then with one row per forward."""
    checkpointing = Change("gradient checkpointing", {"model": {"gradient_checkpointing": True}})
    one_row = Change("one row per forward", {"train": {"micro_batch_size": 1}})
    tried = [change]
    if not config.model.gradient_checkpointing and not _holds(change, checkpointing):
        tried.append(change + checkpointing)
    yield from tried
    if config.train.micro_batch_size > 1 and not _holds(change, one_row):
        yield from (one + one_row for one in tried)


def largest_micro_batch(config: RunConfig, world_size: int, memory: int, shape: ModelShape) -> int | None:
    """Rows per forward that fit on every device: the largest number that divides the rows of a step on a data rank."""
    place = kind_of_launch(config.engine, world_size).place(0, world_size)
    rows = max(1, config.train.global_batch_size // place.num_data_ranks)
    for size in (size for size in range(rows, 0, -1) if rows % size == 0):
        plan = _try(config, Change("", {"train": {"micro_batch_size": size}}), world_size, shape)
        if plan is not None and plan.peak <= usable(memory):
            return size
    return None


def _changes(config: RunConfig, world_size: int, memory: int, shape: ModelShape) -> Iterator[Change]:
    model, train = config.model, config.train
    size = largest_micro_batch(config, world_size, memory, shape)
    if size is not None and size < train.micro_batch_size:
        yield Change("smaller micro-batch", {"train": {"micro_batch_size": size}})
    if not model.gradient_checkpointing:
        yield Change("gradient checkpointing", {"model": {"gradient_checkpointing": True}})
    if train.precision not in ("bf16", "fp16"):
        yield Change("frozen weights in bf16", {"train": {"precision": "bf16"}})
    if train.optimizer == "adamw" and not config.engine.keeps_optimizer_on_host:
        yield Change("8-bit optimizer state", {"train": {"optimizer": "adamw_8bit"}})
    if "llm" in model.trainable:
        parts = tuple("llm.lora" if part == "llm" else part for part in model.trainable)
        adapters = model.lora or _ADAPTERS
        rest = {part: some for part, some in model.partial.items() if part != "llm"}
        values = {"trainable": parts, "lora": adapters} | ({"partial": rest} if model.partial else {})
        yield Change("LoRA", {"model": values})
        yield Change("QLoRA", {"model": values | {"llm": model.llm.model_copy(update={"quantization": _PACKED})}})
    if model.lora is not None and "llm.lora" in model.trainable:
        for rank in (rank for rank in (64, 32, 16, 8) if rank < model.lora.rank):
            adapters = model.lora.model_copy(update={"rank": rank, "alpha": model.lora.alpha * rank // model.lora.rank})
            yield Change("smaller adapters", {"model": {"lora": adapters}})
    if model.llm.quantization is None and "llm" not in model.trainable:
        packed = model.llm.model_copy(update={"quantization": _PACKED})
        yield Change("QLoRA" if "llm.lora" in model.trainable else "4-bit language model", {"model": {"llm": packed}})
    for devices in (world_size,) if world_size > 1 else (1, 2, 4, 8):
        yield from _other_engines(kind_of_launch(config.engine, world_size), devices)


def _other_engines(now: EngineKind, devices: int) -> Iterator[Change]:
    """The fastest first."""
    variants = [variant for kind in ENGINES.values() for variant in kind.variants(now)]
    for variant in sorted(variants, key=lambda each: each.order):
        if devices > 1 or variant.helps_one_device:
            yield Change(variant.name, {"engine": variant.values}, devices)


def _changed(name: str, section: Section, values: dict[str, Any]) -> Section:
    """A section of the config with other values; one that is one of several is validated, as it may change its kind."""
    union = one_of(annotation_of(RunConfig.model_fields[name]))
    if union is None or not isinstance(section, KindSection):
        return section.model_copy(update=values)
    return union.build({**section.unused, **dict(section), **values})


def _holds(change: Change, more: Change) -> bool:
    return all(
        change.values.get(section, {}).get(key) is not None for section in more.values for key in more.values[section]
    )


def _try(config: RunConfig, change: Change, world_size: int, shape: ModelShape) -> Plan | None:
    """None where the engine cannot be cut that way, or not with that optimizer or objective."""
    size = change.world_size or world_size
    try:
        changed = change.apply(config)
        return estimate(changed, size, shape=shape) if _works(changed, size, shape) else None
    except (VLMError, ValueError):
        return None


def _works(config: RunConfig, world_size: int, shape: ModelShape) -> bool:
    """Whether neither vlm.config nor the engine would refuse the combination."""
    train, kind = config.train, kind_of_launch(config.engine, world_size)
    tied = "the embedding" if "llm" in config.model.trainable and not shape.llm.head else None
    is_paged_on_host = train.is_paged and config.engine.keeps_optimizer_on_host
    reasons = (
        kind.why_not_optimizer(train, tied),
        kind.why_not_tuned(config.model, train),
        config.objective.why_not(kind, begins_blind=False),
    )
    return not any(reasons) and not is_paged_on_host


def _yaml(value: Any) -> str:
    if isinstance(value, LLMConfig):  # of which one key is another
        assert value.quantization is not None
        return f"{{quantization: {{format: {value.quantization.format}}}}}"
    if isinstance(value, LoRAConfig):
        return f"{{rank: {value.rank}, alpha: {max(1, value.alpha)}}}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)
