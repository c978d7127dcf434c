"""What trains: one list of parts, read by freezing, optimizer groups, checkpoints and export.

Canonical names, the same in every engine and file: `projector.*`, `vision.*`, `llm.*` (transformers' names), and
`llm.lora.<module>.lora_A.weight` for adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlm.compat import prepare
from vlm.errors import CheckpointError, ConfigError
from vlm.models.config import LoRAConfig
from vlm.models.decoders import find_linears, is_transposed
from vlm.models.partition import add, full_shape, write
from vlm.models.vlm import VisionLanguageModel
from vlm.models.weight_files import shapes_of


def part_of(name: str) -> str:
    """
    >>> part_of("llm.model.layers.0.mlp.up_proj.lora_A.default.weight"), part_of("projector.layers.0.bias")
    ('llm.lora', 'projector')
    """
    top = name.partition(".")[0]
    return "llm.lora" if top == "llm" and ".lora_" in name else top


def canonical_name(name: str) -> str:
    """A parameter's name without what the adapter library put into it."""
    if part_of(name) == "llm.lora":
        return "llm.lora." + name.removeprefix("llm.lora.").removeprefix("llm.").replace(".default.", ".")
    return name.replace(".base_layer.", ".")


def set_trainable(model: VisionLanguageModel, parts: Collection[str], lora: LoRAConfig | None = None) -> None:
    """Freeze everything but `parts`, adding adapters if `llm.lora` is one. Trained weights become float32.

    Of a trained encoder, weights that no feature depends on (a pooling head's) stay frozen, so that every trained
    weight gets a gradient in every step.
    """
    if "llm.lora" in parts:
        assert lora is not None
        add_lora(model, lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts)
    keep_trained_in_float32(model)
    if model.vision is not None:
        if "vision" in parts:
            model.vision.float()  # its statistics too: a batch norm of two dtypes does not compute
            for name in model.vision.unused_parameters():
                model.vision.get_parameter(name).requires_grad_(False)
        model.vision.train(model.training)  # a frozen encoder leaves train mode


def keep_trained_in_float32(model: nn.Module) -> None:
    """An update of bf16 weights is often smaller than their last bit, so what trains is kept in float32."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def add_lora(model: VisionLanguageModel, config: LoRAConfig) -> None:
    """Put LoRA adapters (Hu et al. 2021, arXiv:2106.09685) beside the linear layers of the decoder blocks.

    Raises:
        ConfigError: a target names no linear layer.
    """
    prepare()
    from peft import LoraConfig, inject_adapter_in_model

    linears = adapted_linears(model.llm, config)
    settings = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(linears), bias="none",
        task_type="CAUSAL_LM", fan_in_fan_out=any(is_transposed(module) for module in linears.values()),
    )  # fmt: skip
    with _targets_as_named():
        inject_adapter_in_model(settings, model.llm)
    for name, parameter in model.named_parameters():
        if part_of(name) == "llm.lora":
            parameter.data = parameter.data.float()  # peft takes over the dtype of the layer beside it


@contextmanager
def _targets_as_named() -> Iterator[None]:
    """Keep peft from taking names of linear layers for those of experts in transformers 4.

    For types such as DeepSeek-V3 and Qwen3-Next it would move the adapters of every `gate_proj` and `up_proj`, those of
    shared experts and dense blocks, to the tensors that experts lie in: other weights than the config names.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # earlier versions take names as they are
        yield
        return
    convert = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = convert


def merge_lora(model: VisionLanguageModel) -> None:
    """Fold every adapter into the layer beside it, and take the adapters away."""
    for name, module in list(model.llm.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge(safe_merge=True)  # raises if the result is not finite
            parent, _, leaf = name.rpartition(".")
            setattr(model.llm.get_submodule(parent), leaf, module.base_layer)
    if hasattr(model.llm, "peft_config"):
        del model.llm.peft_config


def merge_adapter(model: VisionLanguageModel, tensors: Mapping[str, Tensor], config: LoRAConfig) -> None:
    """Add an adapter that the model does not have to the layers it belongs to; they may be spread over ranks.

    Args:
        tensors: canonical name -> `lora_A` [rank, in] or `lora_B` [out, rank]; layers that the model does
            not hold are left out.
    """
    own = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    for name, down in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        stem = name.removesuffix(".lora_A.weight")
        place = f"llm.{stem.removeprefix('llm.lora.')}"
        layer = own.get(f"{place}.weight")
        if layer is not None:
            up = tensors[f"{stem}.lora_B.weight"]
            delta = up.float() @ down.float() * (config.alpha / config.rank)
            add(layer, delta.T if is_transposed(model.get_submodule(place)) else delta)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Canonical name -> tensor [...] of all that trains, with the statistics (buffers) of each part that trains."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = {part_of(name) for name in trained}
    return {
        canonical_name(name): tensor
        for name, tensor in _stored_tensors(model).items()
        if name in trained or (part_of(name) in parts and not isinstance(tensor, nn.Parameter))
    }


def part_weights(model: VisionLanguageModel, part: str) -> dict[str, Tensor]:
    """Canonical name -> tensor [...] of one part, trained or not, statistics (buffers) included."""
    return {canonical_name(name): tensor for name, tensor in _stored_tensors(model).items() if part_of(name) == part}


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: str, partial: bool = False) -> None:
    """Copy whole tensors [...] into the model, or a part of it under its name there, by canonical name, one at a time.

    Args:
        where: what the tensors come from, for the message.
        partial: allow the tensors to be only some of what trains.

    Raises:
        CheckpointError: lists every name that is missing, unknown, or of another shape.
    """
    own = {canonical_name(name): tensor for name, tensor in _stored_tensors(model).items()}
    problems = [f"  {name}: not in the model" for name in tensors if name not in own]
    problems += [
        f"  {name}: {list(shape)} -> {list(full_shape(own[name]))}"
        for name, shape in shapes_of(tensors).items()
        if name in own and shape != full_shape(own[name])
    ]
    if not partial:
        problems += [f"  {name}: missing" for name in trained_weights(model) if name not in tensors]
    if problems:
        raise CheckpointError(misfit(where, problems))
    for name, tensor in tensors.items():
        write(own[name], tensor)


def misfit(where: str, problems: list[str]) -> str:
    """The message about tensors that do not fit, a line each."""
    shown = "\n".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
    return (
        f"{where} does not fit this model (file -> model):\n{shown}\nUsually model.vision, model.projector, "
        "model.llm or model.lora differ from what it was trained with: restore them, or leave this file out"
    )


@torch.no_grad()
def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring weights and stored statistics to a number format, and leave precomputed tables as they are.

    `module.to(dtype)` would round the frequencies of rotary embeddings too: by 0.2 % in bfloat16, so the angle at
    position 1,000 would be off by up to 2.
    """
    for tensor in _stored_tensors(module).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> [...]: parameters, tied ones once, and those buffers that are more than a precomputed table."""
    stored = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return dict(model.named_parameters()) | buffers


def adapted_linears(llm: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """Name in the language model -> linear layer of its blocks beside which an adapter stands.

    Raises:
        ConfigError: a target names no linear layer.
    """
    linears = find_linears(llm)
    names = {name.rpartition(".")[2] for name in linears}
    targets = names if config.targets == "all-linear" else set(config.targets)
    unknown = sorted(targets - names)
    if unknown or not targets:
        raise ConfigError(f"model.lora.targets: no linear layer named {unknown}; there are {sorted(names)}")
    return {name: module for name, module in linears.items() if name.rpartition(".")[2] in targets}
