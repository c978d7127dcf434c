"""DeepSpeed's ZeRO: optimizer state (stage 1), gradients (2) and parameters (3) spread over the ranks.

Trained weights are float32 here as in every engine, frozen ones keep their dtype, and the computation runs under our
own autocast, so DeepSpeed works in its float32 mode and the numbers are those of one process. Stage 0 spreads nothing
and is `LocalEngine`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlm.batch import Batch
from vlm.distributed import new_group, rank, world_size
from vlm.launch import set_local_rank
from vlm.models.decoders import find_blocks
from vlm.models.trainable import trained_weights
from vlm.models.vlm import VisionLanguageModel
from vlm.train.engines.base import (
    Engine,
    LossModule,
    StepOutput,
    Sums,
    adam_state,
    poison,
    shared_adam_state,
)
from vlm.train.fragments import Fragment, FragmentReader, state_files
from vlm.train.optim import set_learning_rates
from vlm.train.scaling import LossScale
from vlm.train.statistics import average_statistics


@final
class ZeroEngine(Engine):
    """See `Engine`. `settings` is DeepSpeed's config, see `vlm.train.engines.deepspeed_settings`."""

    def __init__(
        self,
        module: LossModule,
        optimizer: torch.optim.Optimizer,
        settings: dict[str, Any],
        *,
        device: torch.device,
        loss_scale: LossScale | None = None,
    ) -> None:
        super().__init__(module.model, module.objective, device, module.autocast_dtype, loss_scale)
        self.loss_module = module
        self.optimizer = optimizer
        self.stage = settings["zero_optimization"]["stage"]
        self.data_rank = rank()
        self.num_data_ranks = world_size()
        if self.stage == 3:  # a rank that calls other modules than the rest waits for them forever
            self.model.always_encode = True
            gather_blocks_whole(self.model)
        self._engine = initialize_deepspeed(module, optimizer, settings, device)
        self._zero: Any = self._engine.optimizer  # DeepSpeed's, around ours

    @property
    def computes_loss(self) -> LossModule:
        return self.loss_module

    def train_step(self, microbatches: list[Batch], normalizer: float, lr_factor: float) -> StepOutput:
        self._engine.train()
        set_learning_rates(self.optimizer, lr_factor)
        scale_deepspeed(self._zero, self.start_step())
        sums = Sums(self.objective, self.device)
        for batch, min_calls in zip(microbatches, self._agree_on_head_calls(microbatches), strict=True):
            with self.timer("forward_backward"):
                loss, metrics = self._engine(batch.to(self.device), min_calls)
                sums.add(loss, metrics)
                loss = poison(loss)  # then DeepSpeed leaves the weights as they are, on every rank
                self._engine.backward(loss * (self.num_data_ranks / normalizer), scale_wrt_gas=False)
            with self.timer("optimizer"):
                self._engine.step()  # updates after the last micro-batch only
        applied = bool(self._engine.was_step_applied())
        grad_norm = float(self._engine.get_global_grad_norm()) if applied else math.inf
        average_statistics(self.model)
        return self.step_output(self.sum_over_data_ranks(sums.read()), normalizer, grad_norm, applied)

    @torch.no_grad()
    def evaluate_sums(self, batch: Batch) -> tuple[list[float], int]:
        self._engine.eval()
        (min_calls,) = self._agree_on_head_calls([batch])
        loss, metrics = self._engine(batch.to(self.device), min_calls)
        own = [loss.item(), *metrics.tolist(), float(self.objective.normalizer(batch))]
        *sums, normalizer = self.sum_over_data_ranks(own)
        return sums, int(normalizer)

    def whole_model(self) -> AbstractContextManager[VisionLanguageModel | None]:
        return nullcontext(self.model)  # at stage 3 each module gathers its weights when it is called

    @property
    def calls_alone(self) -> bool:
        return self.stage < 3

    def weights_read(self) -> Iterable[Tensor]:
        """At stage 3 DeepSpeed's pieces in float32, from which `exchange_weights` brings the others up to date."""
        return super().weights_read() if self.stage < 3 else [part.values for part in self.weight_fragments()]

    def exchange_weights(self, others: list[Tensor]) -> None:
        super().exchange_weights(others)
        if self.stage == 3:
            _refresh_partitions(self._zero)

    def weight_fragments(self) -> Iterator[Fragment]:
        yield from zero_fragments(self.parameters, self._zero)
        names = dict(self.parameters)
        for name, tensor in trained_weights(self.model).items():
            if name not in names:  # statistics, which every rank holds whole
                yield Fragment.whole(name, tensor)

    def optimizer_fragments(self) -> Iterator[Fragment]:
        yield from zero_fragments(self.parameters, self._zero, states=True)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        super().load(folder)
        if self.stage == 3:
            _refresh_partitions(self._zero)
        else:  # every rank holds all weights whole, beside its part of DeepSpeed's copy
            reader = FragmentReader(state_files(folder, "weights"))
            for name, tensor in trained_weights(self.model).items():  # one at a time
                tensor.copy_(reader.whole(name))

    def _agree_on_head_calls(self, batches: list[Batch]) -> list[int]:
        """At stage 3 each call of the head gathers its weight, on all ranks or on none."""
        own = torch.tensor([self.objective.num_head_calls(batch) for batch in batches])
        if self.stage == 3 and self.num_data_ranks > 1:
            dist.all_reduce(own, dist.ReduceOp.MAX)
        return own.tolist()


def gather_blocks_whole(model: VisionLanguageModel) -> None:
    """Stage 3: DeepSpeed gathers the weights of a decoder block together, as `fsdp` does.

    By itself it goes through hooks before and after each layer in it, of adapters too. Call it before DeepSpeed's
    engine is made. See scripts/bench_zero3.py.
    """
    for block in find_blocks(model.llm).values():
        leaf: Any = block
        leaf._z3_leaf = True  # what deepspeed.utils.set_z3_leaf_module does
        block.register_forward_pre_hook(_ask_for_gradients)


def _ask_for_gradients(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs of a block that trains, one of which gets a gradient: DeepSpeed lets go of the block's weights once
    they have theirs, and where none gets one, before the block is through. So it is with adapters of a language model
    by itself: nothing before the first block trains."""
    tensors = [each for each in inputs if isinstance(each, Tensor)]
    states = next((each for each in tensors if each.is_floating_point()), None)  # the first are the hidden ones
    trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in block.parameters())
    if not trains or states is None or any(each.requires_grad for each in tensors):
        return inputs
    return tuple(each.detach().requires_grad_() if each is states else each for each in inputs)


def scale_deepspeed(zero: Any, factor: float) -> None:
    """Have DeepSpeed's optimizer multiply the loss, and divide the gradients before it clips them."""
    if factor != zero.loss_scale:  # 1 where nobody set it
        zero.override_loss_scale(factor)


def initialize_deepspeed(module: Any, optimizer: Any, settings: dict[str, Any], device: torch.device) -> Any:
    """DeepSpeed's engine over the process group that exists."""
    deepspeed = start_deepspeed(device)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def start_deepspeed(device: torch.device) -> Any:
    """The package, its communication over the process group that exists."""
    deepspeed = import_deepspeed(device)
    set_local_rank()
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    deepspeed.comm.comm.cdb.new_group = new_group  # its own would wait for half an hour
    return deepspeed


class Partitioner:
    """Stage 3: replaces each weight of a module by this rank's piece of it, as rank 0 has it. Every rank calls it.

    Args:
        settings: DeepSpeed's config.
    """

    def __init__(self, settings: dict[str, Any], device: torch.device) -> None:
        self._deepspeed = start_deepspeed(device)
        self._settings = settings
        self._convert: Any = None

    def __call__(self, module: torch.nn.Module) -> None:
        if self._convert is None:
            offload = self._settings["zero_optimization"].get("offload_param") or {}
            self._deepspeed.zero.Init(
                module=module,
                config_dict_or_path=self._settings,
                dtype=torch.float32,
                remote_device=offload.get("device"),
                pin_memory=offload.get("pin_memory", False),
            )
            first: Any = next(module.parameters())
            self._convert = first.convert_to_zero_parameters
        else:
            self._convert(param_list=list(module.parameters()))


def import_deepspeed(device: torch.device) -> Any:
    """The package, told not to log on every rank, and not to compile its all-reduce for CPUs.

    Training does not use that operator. Its first build takes half a minute and needs a compiler; a build that is
    killed leaves a lock behind, for which every later run would wait without end.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def zero_fragments(
    parameters: list[tuple[str, torch.nn.Parameter]], zero: Any, states: bool = False
) -> Iterator[Fragment]:
    """The elements that this rank updates: of the float32 weights, or of every optimizer state.

    The scales of 8-bit state are of blocks of a whole partition. They are stored under a name made from what lies
    where in it, so that nothing but the same partition finds them.

    Args:
        zero: DeepSpeed's optimizer, of stage 1, 2 or 3.
    """
    partitions: dict[int, tuple[Tensor, list[Any]]] = {}
    for name, parameter in parameters:
        place = _place_at_stage_3(parameter, zero) if hasattr(parameter, "ds_id") else _place(parameter, zero)
        if place is None:
            continue
        flat, offset, start, numel, shape = place
        if not states:
            yield Fragment(name, shape, start, flat.detach()[offset : offset + numel])
            continue
        partitions.setdefault(id(flat), (flat, []))[1].append((name, offset, start, numel))
        for key, value in adam_state(zero.optimizer, flat).items():
            if value.ndim == 0:
                yield Fragment.whole(f"{name}/{key}", value)
            elif value.shape == flat.shape:
                yield Fragment(f"{name}/{key}", shape, start, value[offset : offset + numel])
    for flat, contents in partitions.values():
        digest = hashlib.sha256(json.dumps([flat.numel(), contents]).encode()).hexdigest()[:16]
        for key, value in adam_state(zero.optimizer, flat).items():
            if value.ndim and value.shape != flat.shape:
                yield Fragment.whole(f"partition-{digest}/{key}", value)
    if states:
        yield from shared_adam_state(zero.optimizer)


def _place(parameter: Any, zero: Any) -> tuple[Tensor, int, int, int, tuple[int, ...]] | None:
    """(flat float32 partition [n], offset in it, first element of the parameter, number, shape) at stages 1 and 2."""
    mapping = parameter._hp_mapping
    if mapping is None:  # another rank's
        return None
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    of_weight, in_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    return flat, in_flat.start, of_weight.start, in_flat.numel, tuple(parameter.shape)


def _place_at_stage_3(parameter: Any, zero: Any) -> tuple[Tensor, int, int, int, tuple[int, ...]] | None:
    """As `_place`, [n] too. Each parameter is cut into as many equal pieces as there are ranks, the last one padded."""
    group, offset, piece = zero.grad_position[zero.get_param_id(parameter)]
    start = rank() * piece
    numel = min(piece, parameter.ds_numel - start)
    if numel <= 0:
        return None
    return zero.fp32_partitioned_groups_flat[group], offset, start, numel, tuple(parameter.ds_shape)


def _refresh_partitions(zero: Any) -> None:
    """Stage 3: bring the pieces that forward passes gather up to date with the float32 ones."""
    zero._partition_all_parameters()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
