"""AdamW of bitsandbytes: its state in 8 bits, or in pages that a full GPU leaves to the host's memory.

8-bit state (Dettmers et al. 2022, arXiv:2110.02861) is a byte per moment, one float32 scale per block of 256 elements,
and two tables of 256 numbers that the bytes index. Tensors of fewer than 4,096 elements keep float32 state.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from vlm.errors import MissingPackageError
from vlm.train.config import TrainConfig

_CLASSES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
_FLOAT32_NAMES = {"state1": "exp_avg", "state2": "exp_avg_sq"}  # torch's, so that both read each other's checkpoints
_TABLES = ("qmap1", "qmap2")  # shared by all parameters
QUANTIZED = ("state1", "state2", "absmax1", "absmax2")  # names in a checkpoint that only 8-bit state has


def check_installed(train: TrainConfig) -> None:
    """Raises MissingPackageError when the optimizer is of bitsandbytes and that is not installed. Imports nothing."""
    if train.optimizer in _CLASSES and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError("bitsandbytes", f"train.optimizer {train.optimizer}", "quant")


def bitsandbytes_adamw(groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `train.optimizer` names. Raises MissingPackageError."""
    check_installed(train)
    # on the CPU there is nothing to page out to, and the state is held as without pages; docs/training.md says so
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    from bitsandbytes import optim

    base: Any = getattr(optim, _CLASSES[train.optimizer])

    class AdamW(base):  # type: ignore[misc]
        """With the number of steps as a tensor: then all state is tensors, and is saved and restored in place."""

        param_groups: Any

        def init_state(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
            """State of a parameter [...], as bitsandbytes makes it, with `step` as a float32 scalar."""
            super().init_state(group, p, gindex, pindex)
            self.state[p]["step"] = torch.zeros((), dtype=torch.float32)

        def update_step(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
            """One step of a parameter [...]; bitsandbytes reads `step` as an int."""
            state = self.state[p]
            num_steps = state["step"]
            state["step"] = int(num_steps)
            super().update_step(group, p, gindex, pindex)
            state["step"] = num_steps.add_(1)

        def saved_state(self, parameter: Tensor) -> dict[str, Tensor]:
            """Live tensors of a parameter [...] by their checkpoint names, made with zeros if there are none yet."""
            if not self.state[parameter]:
                groups, self.param_groups = self.param_groups, [{**self.defaults, "params": [parameter]}]
                self.init_state(self.param_groups[0], parameter, 0, 0)  # ZeRO-3 empties the groups between steps
                self.param_groups = groups
            state = {key: value for key, value in self.state[parameter].items() if key not in _TABLES}
            is_quantized = state["state1"].dtype == torch.uint8
            return state if is_quantized else {_FLOAT32_NAMES.get(key, key): value for key, value in state.items()}

        def shared_state(self) -> dict[str, Tensor]:
            """The tables, float32 [256], once there is 8-bit state."""
            for state in self.state.values():
                if "qmap1" in state:
                    return {key: state[key] for key in _TABLES}
            return {}

    return AdamW(groups, lr=train.learning_rate, betas=train.betas)
