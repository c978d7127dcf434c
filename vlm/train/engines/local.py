"""One process, or several that each hold the whole model (DistributedDataParallel, torch)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vlm.distributed import is_main
from vlm.models.trainable import trained_weights
from vlm.models.vlm import VisionLanguageModel
from vlm.train.engines.base import LossModule, adam_state, shared_adam_state
from vlm.train.engines.torch_engine import TorchEngine
from vlm.train.fragments import Fragment, HostCopy


@final
class LocalEngine(TorchEngine):
    """See `Engine`. In a launch of several processes the gradients are averaged by DistributedDataParallel."""

    holds_whole_model = True

    def wrap(self, module: LossModule) -> Any:
        if self.num_data_ranks == 1:
            return module
        with warnings.catch_warnings():  # torch 2.13 renames broadcast_buffers, 2.10 knows no other name
            warnings.simplefilter("ignore", FutureWarning)
            # a copy of the gradients would double their memory; buffers that change are averaged after each step
            return DistributedDataParallel(module, gradient_as_bucket_view=True, broadcast_buffers=False)

    def reduction(self, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last or self.num_data_ranks == 1 else self.wrapped.no_sync()

    def grad_norm(self) -> Tensor:
        """Of all gradients; scalar."""
        return torch.nn.utils.get_total_norm(self.gradients())

    def whole_model(self) -> AbstractContextManager[VisionLanguageModel | None]:
        return nullcontext(self.model)

    def weight_fragments(self) -> Iterator[Fragment]:
        """Every rank holds everything, so rank 0 alone writes it; all read it."""
        for name, tensor in trained_weights(self.model).items():
            yield Fragment.whole(name, tensor)

    def optimizer_fragments(self) -> Iterator[Fragment]:
        for name, parameter in self.parameters:
            for key, value in adam_state(self.optimizer, parameter).items():
                yield Fragment.whole(f"{name}/{key}", value)
        yield from shared_adam_state(self.optimizer)

    def copies(self) -> Iterator[tuple[str, HostCopy]]:
        return super().copies() if is_main() else iter(())

    def num_copied_bytes(self) -> int:
        return super().num_copied_bytes() if is_main() else 0
