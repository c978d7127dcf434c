"""A config -> what every device of its launch holds at the worst moment of a step."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from vlm.batch import microbatches_per_step
from vlm.config import RunConfig
from vlm.models.loss import CHUNK_TOKENS
from vlm.models.pipeline_build import check_cuts
from vlm.plan import blocks
from vlm.plan.blocks import Part
from vlm.plan.cuts import balanced_cuts
from vlm.plan.numerics import Numerics, Workload, full_rows, read_numerics
from vlm.plan.shapes import ModelShape, VisionShape, read_shapes
from vlm.plan.timeline import peak
from vlm.train.config import TrainConfig
from vlm.train.engines.kind import FLOAT32, EngineKind, Place, States
from vlm.train.engines.kinds import kind_of_launch

GIB = 2**30


@dataclass(frozen=True)
class DevicePlan:
    """One device, or several that hold the same. Bytes; they add up to `total`, the peak of a step."""

    name: str
    num_devices: int
    parameters: int
    gradients: int  # those that exist at the peak
    optimizer: int
    activations: int  # at the peak, the micro-batch and logits included
    buffers: int  # of communication: gathered weights, reduction buckets
    host: int  # in the machine's memory instead, for each device
    moment: str  # where in the step the peak is
    first_layer: int = 0  # of a pipeline, as vlm.models.pipeline counts
    last_layer: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True)
class Plan:
    """What a run takes. `devices` has one entry per stage of a pipeline, else one that stands for all ranks."""

    kind: str  # local, ddp, zero, fsdp, pipeline
    world_size: int
    num_data_ranks: int
    micro_batch_size: int
    num_parameters: int
    num_trained: int
    devices: tuple[DevicePlan, ...]
    cuts: tuple[int, ...] = ()
    shape: ModelShape | None = None

    @property
    def num_stages(self) -> int:
        return self.world_size // self.num_data_ranks

    @property
    def peak(self) -> int:
        """Bytes on the fullest device."""
        return max(device.total for device in self.devices)

    @property
    def activation_gib(self) -> float:
        """Of the device with most of them, in GiB."""
        return max(device.activations for device in self.devices) / GIB


def estimate(
    config: RunConfig,
    world_size: int = 1,
    *,
    workload: Workload | None = None,
    shape: ModelShape | None = None,
    has_flash_attention: bool | None = None,
) -> Plan:
    """What every device holds at the worst moment of an optimizer step after the first.

    Args:
        config: a RunConfig.
        world_size: processes of the launch, one per device.
        workload: another micro-batch than the largest that the config allows (`full_rows`).
        shape: `read_shapes(config.model)`, if it was read before; reading takes seconds.
        has_flash_attention: what `attention: auto` finds on the GPU; None looks for the package here.

    Raises:
        ConfigError: the engine, or the rows of a step, do not fit the number of processes.
        CheckpointError: a model's config.json cannot be read.
    """
    kind = kind_of_launch(config.engine, world_size)
    num_data_ranks = kind.place(0, world_size).num_data_ranks
    if workload is None:
        microbatches_per_step(config.train.global_batch_size, config.train.micro_batch_size, num_data_ranks)
    shape = shape or read_shapes(config.model)
    if has_flash_attention is None:
        has_flash_attention = importlib.util.find_spec("flash_attn") is not None
    numerics = read_numerics(config, has_flash_attention, shape.llm.takes_varlen)
    times = config.objective.rows_of(config.data.max_length)
    work = workload or full_rows(config, shape.tokens_per_image, config.train.micro_batch_size * times)
    layers = model_layers(config, shape, work, numerics)
    parts = [part for layer in layers for part in layer]
    num_micro = max(1, config.train.global_batch_size * times // (work.rows * num_data_ranks))  # per step and data rank
    cuts: tuple[int, ...] = ()
    if kind.has_stages:
        layers[-1] = [_own_copy_of_a_tied_head(layers[-1][0], shape, config, numerics)]
        cuts = kind.layers_at_cuts or _balance(layers, kind, num_micro, kind.place(0, world_size), config.train)
        check_cuts(cuts, len(layers))
    bounds = list(pairwise([0, *cuts, len(layers)]))
    devices = []
    for stage, (first, stop) in enumerate(bounds):
        own = [part for layer in layers[first:stop] for part in layer]
        name = f"stage {stage}" if kind.has_stages else f"rank 0-{world_size - 1}" if world_size > 1 else "rank 0"
        in_flight = min(len(bounds) - stage, num_micro)
        base = blocks.batch_bytes(shape, work, numerics, config.data.cache_features is True) * in_flight
        if kind.has_stages:  # what is received and sent, and their gradients
            base += 2 * in_flight * work.tokens * shape.llm.width * numerics.residual
        states = _states(kind, own, config.train, num_data_ranks, num_micro > 1)
        if config.objective.keeps_start:
            states = _with_start(states, own, kind, num_data_ranks)
        devices.append(
            _device(name, own, states, base, _bool_mask(work, numerics), num_micro, in_flight, num_data_ranks,
                    first, stop - 1)
        )  # fmt: skip
    return Plan(
        kind.kind, world_size, num_data_ranks, work.rows, _num_parameters(config, shape),
        sum(part.trained for part in parts),
        tuple(devices), cuts, shape,
    )  # fmt: skip


def _states(
    kind: EngineKind, own: Sequence[Part], train: TrainConfig, num_data_ranks: int, accumulates: bool
) -> States:
    """Packed weights are in each process whole, also where all others are spread."""
    if not kind.gathers:
        return kind.states(own, train, num_data_ranks, accumulates)
    spread = [replace(part, weights=part.weights - part.packed) for part in own]
    states = kind.states(spread, train, num_data_ranks, accumulates)
    return replace(states, parameters=states.parameters + sum(part.packed for part in own))


def _with_start(states: States, own: Sequence[Part], kind: EngineKind, num_data_ranks: int) -> States:
    """With a copy of what trains, as it was before the first step: of what a rank holds of it, where that is."""
    copy = FLOAT32 * sum(part.trained for part in own)
    if not kind.gathers:
        return replace(states, parameters=states.parameters + copy)
    copy = -(-copy // num_data_ranks)
    if kind.keeps_optimizer_on_host:
        return replace(states, host=states.host + copy)
    return replace(states, parameters=states.parameters + copy)


def model_layers(config: RunConfig, shape: ModelShape, work: Workload, numerics: Numerics) -> list[list[Part]]:
    """The parts of each layer, as vlm.models.pipeline counts layers: inputs, blocks, output."""
    trainable, model = config.model.trainable, config.model
    is_trained = "llm" in trainable
    first, last = shape.llm.trained_ends if _is_partial(config, shape) else (int(is_trained), int(is_trained))
    inputs: list[Part] = []
    if shape.vision is not None and shape.projector is not None:
        inputs += [_vision(config, each, work, numerics) for each in shape.vision.members]
        inputs.append(
            blocks.projector(
                shape.projector, work, numerics, "projector" in trainable, trains_vision=model.trains_vision
            )
        )
    inputs.append(blocks.embedding(shape.llm, work, numerics, first > 0))
    if config.objective.scores:
        output = [blocks.value_head(shape.llm, work, numerics, is_trained=last > 0)]
    else:
        output = [blocks.head(shape.llm, work, numerics, is_trained=last > 0, chunk_tokens=CHUNK_TOKENS)]
        if "value_head" in trainable:  # read beside the logits
            output.append(Part(name="value_head", weights=FLOAT32 * shape.llm.width, trained=shape.llm.width))
    if shape.llm.saved and "llm.lora" in trainable:
        saved = shape.llm.saved
        output.append(Part(name="modules_to_save", weights=FLOAT32 * saved, trained=saved))
    return [inputs, *([block] for block in _decoder_blocks(config, shape, work, numerics)), output]


def _is_partial(config: RunConfig, shape: ModelShape) -> bool:
    return "llm" in config.model.trainable and "llm" in config.model.partial and bool(shape.llm.trained)


def _decoder_blocks(config: RunConfig, shape: ModelShape, work: Workload, numerics: Numerics) -> list[Part]:
    model, llm = config.model, shape.llm
    is_partial = _is_partial(config, shape)
    trained = llm.trained if is_partial else llm.blocks if "llm" in model.trainable else (0,) * len(llm.blocks)
    parts = []
    for number, numel in enumerate(trained):
        part = blocks.decoder_block(
            llm, number, work, numerics, is_trained=numel > 0, checkpointing=model.gradient_checkpointing,
            lora=model.lora if "llm.lora" in model.trainable else None, quantization=model.llm.quantization,
        )  # fmt: skip
        parts.append(blocks.partly(part, llm.blocks[number], numel, numerics) if numel and is_partial else part)
    is_free = is_partial and not llm.trained_ends[0] and set(model.trainable) == {"llm"}  # nothing before them trains
    first = next((number for number, numel in enumerate(trained) if numel), len(trained)) if is_free else 0
    return [blocks.without_gradient(part) for part in parts[:first]] + parts[first:]


def _vision(config: RunConfig, shape: VisionShape, work: Workload, numerics: Numerics) -> Part:
    model = config.model
    part = blocks.vision(
        shape, work, numerics, is_trained=model.trains_vision, is_cached=config.data.cache_features is True,
        checkpointing=model.gradient_checkpointing,
    )  # fmt: skip
    if shape.trained is None or not model.trains_vision:
        return part
    if "vision.lora" in model.trainable:
        frozen = blocks.partly(part, shape.numel, 0, numerics)
        return replace(frozen, weights=frozen.weights + FLOAT32 * shape.trained, trained=shape.trained)
    return blocks.partly(part, shape.numel, shape.trained, numerics)


def _num_parameters(config: RunConfig, shape: ModelShape) -> int:
    """Of the whole model, adapters included."""
    llm, lora = shape.llm, config.model.lora if "llm.lora" in config.model.trainable else None
    adapters = shape.llm.lora_numel(lora) * len(llm.blocks) + llm.saved if lora else 0
    encoder = shape.vision.numel if shape.vision else 0
    projector = shape.projector.numel if shape.projector else 0
    value_head = llm.width if "value_head" in config.model.trainable else 0
    return llm.embedding + llm.head + llm.final_norm + sum(llm.blocks) + adapters + encoder + projector + value_head


def _device(
    name: str, parts: Sequence[Part], states: States, base: int, bool_mask: int, num_micro: int, in_flight: int,
    num_data_ranks: int, first: int, last: int,
) -> DevicePlan:  # fmt: skip
    moment = peak(
        parts,
        base=base,
        bool_mask=bool_mask,
        gradients_stay=num_micro > 1,
        num_in_flight=in_flight,
        gradient_share=states.gradient_share,
        reduced=states.reduced,
        backward_buffers=states.backward_buffers,
    )
    return DevicePlan(
        name=name,
        num_devices=num_data_ranks,
        parameters=states.parameters,
        gradients=moment.gradients,
        optimizer=states.optimizer,
        activations=moment.activations,
        buffers=states.buffers + moment.buffers,
        host=states.host,
        moment=moment.where,
        first_layer=first,
        last_layer=last,
    )


def _bool_mask(work: Workload, numerics: Numerics) -> int:
    return work.rows * work.length**2 if blocks.has_mask(work, numerics) else 0


def _own_copy_of_a_tied_head(part: Part, shape: ModelShape, config: RunConfig, numerics: Numerics) -> Part:
    """The last stage holds the embedding again when it is the head too."""
    if shape.llm.head:
        return part
    is_trained = "llm" in config.model.trainable and "value_head" not in config.model.trainable
    weight = FLOAT32 if is_trained else numerics.frozen
    more = shape.llm.embedding if is_trained else 0
    return replace(part, weights=part.weights + weight * shape.llm.embedding, trained=part.trained + more)


def _balance(
    layers: Sequence[Sequence[Part]], kind: EngineKind, num_micro: int, place: Place, train: TrainConfig
) -> tuple[int, ...]:
    """Cuts that make the fullest stage as small as possible.

    How many micro-batches a layer holds depends on the stage it falls into, so the cuts are made again with the
    numbers of the cuts before, until nothing changes.
    """
    num_stages = place.num_stages
    held = [float(num_stages)] * len(layers)
    best: tuple[int, ...] = ()
    for _ in range(4):
        costs = [_cost(layer, held[i], kind, place.num_data_ranks, train) for i, layer in enumerate(layers)]
        costs[-1] += layers[-1][0].backward  # logits; the other transients are alike on all stages
        cuts = tuple(balanced_cuts(costs, num_stages))
        if cuts == best:
            break
        best = cuts
        for stage, (first, stop) in enumerate(pairwise([0, *cuts, len(layers)])):
            held[first:stop] = [float(min(num_stages - stage, num_micro))] * (stop - first)
    return best


def _cost(layer: Sequence[Part], held: float, kind: EngineKind, num_data_ranks: int, train: TrainConfig) -> float:
    states = kind.states(layer, train, num_data_ranks)
    saved = sum(part.saved + part.saved_copies for part in layer)
    return states.parameters + states.optimizer + sum(part.gradients for part in layer) + held * saved
