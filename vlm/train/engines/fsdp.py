"""Parameters, gradients and optimizer state spread over the ranks by torch's own `fully_shard` (FSDP2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from vlm.distributed import rank, world_size
from vlm.models.decoders import find_blocks
from vlm.models.trainable import trained_weights
from vlm.models.vlm import VisionLanguageModel
from vlm.train.engines.base import LossModule, adam_state
from vlm.train.engines.torch_engine import TorchEngine
from vlm.train.fragments import Fragment


def shard_block(block: nn.Module, device: torch.device) -> None:
    """Spread one decoder block over all ranks."""
    fully_shard(block, mesh=_mesh(device))


def shard(module: LossModule, device: torch.device) -> None:
    """Spread each decoder block by itself unless that was done, and all the rest as one, before the optimizer is made.

    Every rank gathers the rest once per forward and then block after block, whatever its batch holds, so a rank
    without an image, or with fewer supervised tokens, keeps nobody waiting.
    """
    for block in find_blocks(module.model.llm).values():
        if not isinstance(block, FSDPModule):
            shard_block(block, device)
    fully_shard(module, mesh=_mesh(device))


@final
class FullyShardedEngine(TorchEngine):
    """See `Engine`. Its module has been through `shard`."""

    def wrap(self, module: LossModule) -> Any:
        register_fsdp_forward_method(module, "begin")
        return module

    @contextmanager
    def whole_model(self) -> Iterator[VisionLanguageModel | None]:
        self.wrapped.begin()
        self.wrapped.unshard()  # all but the blocks, which gather themselves when they are called
        yield self.model
        self.wrapped.reshard()

    @property
    def calls_alone(self) -> bool:
        return False

    def weights_read(self) -> Iterator[Tensor]:
        return (part.values for part in self.weight_fragments())

    def weight_fragments(self) -> Iterator[Fragment]:
        self.wrapped.reshard()  # an evaluation leaves the outermost parameters gathered
        for name, tensor in trained_weights(self.model).items():
            yield from _own_part(name, tensor)

    def optimizer_fragments(self) -> Iterator[Fragment]:
        for name, parameter in self.parameters:
            for key, value in adam_state(self.optimizer, parameter).items():
                yield from _own_part(f"{name}/{key}", value)

    def reduction(self, is_last: bool) -> AbstractContextManager[Any]:
        self.wrapped.set_requires_gradient_sync(is_last)
        return nullcontext()

    def grad_norm(self) -> Tensor:
        """Of the whole gradients; scalar, the same on every rank."""
        norm = torch.nn.utils.get_total_norm(self.gradients())
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _mesh(device: torch.device) -> DeviceMesh:
    """All ranks. Without it torch takes the GPU wherever there is one, whatever the config says."""
    return init_device_mesh(device.type, (world_size(),))


def _own_part(name: str, tensor: Tensor) -> Iterator[Fragment]:
    """This rank's elements of a tensor [R, ...] that is cut along R; all of one that every rank holds."""
    if not isinstance(tensor, DTensor):
        yield Fragment.whole(name, tensor)
        return
    local = tensor.to_local().detach()
    if local.numel():
        rows = -(-tensor.shape[0] // world_size())  # as torch.chunk cuts
        yield Fragment(name, tuple(tensor.shape), rank() * rows * math.prod(tensor.shape[1:]), local.view(-1))
