"""What an adapter is: its names in a model, which layers have one, and the weights it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models.config import LoRAConfig
from vlm.models.decoders import is_transposed, linear_shape

MAGNITUDE = "lora_magnitude_vector.weight"  # DoRA's, [out]
SAVED = ".modules_to_save."  # in the names of modules that train whole beside adapters
_MOST_NAMED = 40  # paths in a message


def is_adapter(name: str) -> bool:
    """Whether a parameter or module is one that adapters brought, by its name in the model.

    >>> is_adapter("llm.model.layers.0.mlp.up_proj.lora_A.default.weight"), is_adapter("llm.lm_head.weight")
    (True, False)
    """
    return ".lora_" in f".{name}" or SAVED in f".{name}."


def names_chosen(names: Sequence[str], wanted: Sequence[str], key: str, what: str) -> list[str]:
    """Those of `names` that `wanted` names: by their end, as `mlp.up_proj`, whole, or as a pattern with `*`.

    Args:
        key: of the config, for the message.
        what: the names are of.

    Raises:
        ConfigError: an entry names none of them.

    >>> names_chosen(["layers.0.q", "layers.1.q", "layers.1.k"], ["q"], "targets", "linear layer")
    ['layers.0.q', 'layers.1.q']
    """
    found: set[str] = set()
    for entry in wanted:
        named = {name for name in names if name == entry or name.endswith(f".{entry}") or fnmatchcase(name, entry)}
        if not named:
            raise ConfigError(_unknown(entry, names, key, what))
        found |= named
    return [name for name in names if name in found]


def _unknown(entry: str, names: Sequence[str], key: str, what: str) -> str:
    lasts = sorted({name.rpartition(".")[2] for name in names} - {str(n) for n in range(1000)})
    shown = "\n".join(f"  {name}" for name in names[:_MOST_NAMED])
    more = f"\n  ... and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return (
        f"{key}: no {what} is named {entry!r}; there are {lasts}, with full paths:\n{shown}{more}\n"
        "Usually the name is that of another family of models; name one of these, or use a pattern such as *.mlp.*"
    )


def adapter_shapes(name: str, layer: Any, lora: LoRAConfig) -> dict[str, list[int]]:
    """Name after the layer's -> shape of the tensors of its adapter."""
    inputs, outputs = linear_shape(layer)
    shapes = {"lora_A.weight": [lora.rank, inputs], "lora_B.weight": [outputs, lora.rank]}
    return {f"{name}.{leaf}": shape for leaf, shape in (shapes | ({MAGNITUDE: [outputs]} if lora.dora else {})).items()}


def adapter_delta(layer: nn.Module, tensors: Mapping[str, Tensor], stem: str, lora: LoRAConfig) -> Tensor:
    """What an adapter adds to its layer's weight, of the weight's own shape, [out, in] or [in, out]; float32.

    Of DoRA (Liu et al. 2024, arXiv:2402.09353) each row [in] of weight + scale * B @ A gets its learned length.

    Args:
        layer: with the whole weight, not packed.
        tensors: `<stem>.lora_A.weight` [rank, in], `<stem>.lora_B.weight` [out, rank], and of DoRA the lengths [out].
    """
    weight: Any = layer.weight
    down, up = (tensors[f"{stem}.lora_{part}.weight"].to(weight.device).float() for part in "AB")
    delta = (up @ down) * lora.scale
    delta = delta.T if is_transposed(layer) else delta
    if lora.dora:
        axis = 0 if is_transposed(layer) else 1
        summed = weight.float() + delta
        lengths = tensors[f"{stem}.{MAGNITUDE}"].to(weight.device).float().unsqueeze(axis)
        delta = summed * (lengths / summed.norm(dim=axis, keepdim=True)) - weight.float()
    return delta
