"""What trains: one list of parts, read by freezing, optimizer groups, checkpoints and export.

Canonical names, the same in every engine and file: `projector.*`, `vision.*`, `llm.*` (transformers' names), and
`llm.lora.<module>.lora_A.weight` for adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from vlm.compat import prepare
from vlm.errors import CheckpointError, ConfigError
from vlm.models.config import LoRAConfig, PartialConfig
from vlm.models.decoders import find_blocks, find_linears, is_transposed
from vlm.models.encoders.blocks import blocks_of_encoder, linears_of_encoder
from vlm.models.lora import MAGNITUDE, SAVED, adapter_delta, is_adapter, names_chosen
from vlm.models.partition import add, full_shape, write
from vlm.models.quantize import is_packed
from vlm.models.vlm import VisionLanguageModel
from vlm.models.weight_files import shapes_of


def part_of(name: str) -> str:
    """
    >>> part_of("llm.model.layers.0.mlp.up_proj.lora_A.default.weight"), part_of("projector.layers.0.bias")
    ('llm.lora', 'projector')
    """
    top = name.partition(".")[0]
    return f"{top}.lora" if top in ("llm", "vision") and is_adapter(name) else top


def canonical_name(name: str) -> str:
    """A parameter's name without what the adapter library put into it."""
    part = part_of(name)
    if part.endswith(".lora"):
        top = part.removesuffix("lora")
        return f"{part}." + name.removeprefix(f"{part}.").removeprefix(top).replace(".default.", ".")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def set_trainable(
    model: VisionLanguageModel,
    parts: Collection[str],
    lora: LoRAConfig | None = None,
    *,
    vision_lora: LoRAConfig | None = None,
    partial: Mapping[str, PartialConfig] = MappingProxyType({}),
    scores: bool = False,
) -> None:
    """Freeze everything but `parts`, adding the adapters that these name. Trained weights become float32.

    Of a trained encoder, weights that no feature depends on (a pooling head's) stay frozen, so that every trained
    weight gets a gradient in every step.

    Args:
        partial: part -> what of it trains; a part that is not there trains whole.
        scores: whether the model scores replies and writes none, so that nothing reads its output layer.

    Raises:
        ConfigError: a target or a module to train is not there.
    """
    if "llm.lora" in parts:
        assert lora is not None
        add_lora(model, lora)
    if "vision.lora" in parts:
        assert model.vision is not None
        assert vision_lora is not None
        _adapt(model.vision, vision_lora, adapted_linears(model.vision, vision_lora), ())
    chosen = {
        f"{part}.{name}" for part in partial for name in partial_names(model.get_submodule(part), partial[part], part)
    }
    for name, parameter in model.named_parameters():
        part = part_of(name)
        trains = part in parts and (part not in partial or name in chosen)
        if parameter.is_floating_point():
            parameter.requires_grad_(trains)
    if model.projector is not None:
        for name in model.projector.frozen:
            model.projector.get_parameter(name).requires_grad_(False)
    if scores:
        _freeze_output_layer(model.llm)
    keep_trained_in_float32(model)
    if model.vision is not None:
        if "vision" in parts:
            model.vision.float()  # its statistics too: a batch norm of two dtypes does not compute
            for name in model.vision.unused_parameters():
                model.vision.get_parameter(name).requires_grad_(False)
        model.vision.train(model.training)  # a frozen encoder leaves train mode


def _freeze_output_layer(llm: Any) -> None:
    """A model that scores makes no logits, so its output layer gets no gradient, unless it is the embedding too.

    Raises:
        ConfigError: `modules_to_save` names it.
    """
    embedding = llm.get_input_embeddings().weight
    for name, parameter in llm.get_output_embeddings().named_parameters():
        if parameter.requires_grad and "modules_to_save" in name:
            raise ConfigError(
                "model.lora.modules_to_save names the output layer, which nothing reads where objective.kind is "
                "reward. Leave it out"
            )
        parameter.requires_grad_(parameter is embedding and parameter.requires_grad)


def keep_trained_in_float32(model: nn.Module) -> None:
    """An update of bf16 weights is often smaller than their last bit, so what trains is kept in float32."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def add_lora(model: VisionLanguageModel, config: LoRAConfig) -> None:
    """Put LoRA adapters (Hu et al. 2021, arXiv:2106.09685) beside the linear layers of the decoder blocks.

    Raises:
        ConfigError: a target names no linear layer, or `modules_to_save` no module.
    """
    _adapt(model.llm, config, adapted_linears(model.llm, config), saved_modules(model.llm, config))


def _adapt(network: Any, config: LoRAConfig, linears: Mapping[str, Any], saved: Collection[str]) -> None:
    prepare()
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import ModulesToSaveWrapper

    settings = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(linears), bias="none",
        use_rslora=config.rslora, use_dora=config.dora,
        fan_in_fan_out=any(is_transposed(module) for module in linears.values()),
    )  # fmt: skip
    packed = any(is_packed(module.weight) for module in linears.values())
    if packed:  # by this peft knows
        network.is_loaded_in_4bit = network.is_loaded_in_8bit = True
    with _targets_as_named():
        inject_adapter_in_model(settings, network)
    if packed:
        del network.is_loaded_in_4bit, network.is_loaded_in_8bit
    for name in saved:
        network.set_submodule(name, ModulesToSaveWrapper(network.get_submodule(name), "default"))
    for name, parameter in network.named_parameters():
        if is_adapter(name):
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
    for network in (part for part in (model.llm, model.vision) if part is not None):
        for name, module in list(network.named_modules()):
            if hasattr(module, "base_layer") and hasattr(module, "merge"):
                module.merge(safe_merge=True)  # raises if the result is not finite
                network.set_submodule(name, module.base_layer)
            elif hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
                network.set_submodule(name, module.modules_to_save["default"])
        if hasattr(network, "peft_config"):
            del network.peft_config


def merge_adapter(model: VisionLanguageModel, tensors: Mapping[str, Tensor], config: LoRAConfig) -> None:
    """Add an adapter that the model does not have to the layers it belongs to; they may be spread over ranks.

    Args:
        tensors: canonical name -> `lora_A` [rank, in] or `lora_B` [out, rank], lengths [out] of DoRA, and weights [...]
            of modules that were saved; layers that the model does not hold are left out.

    Raises:
        CheckpointError: the layer is packed, or of DoRA, it is spread over ranks.
    """
    own = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    for name, tensor in tensors.items():
        if SAVED in name:
            saved = own.get("llm." + name.removeprefix("llm.lora.").replace(SAVED, "."))
            if saved is not None:
                write(saved, tensor)
        if not name.endswith(".lora_A.weight"):
            continue
        stem = name.removesuffix(".lora_A.weight")
        place = f"llm.{stem.removeprefix('llm.lora.')}"
        layer = own.get(f"{place}.weight")
        if layer is None:
            continue
        if is_packed(layer) or (config.dora and full_shape(layer) != tuple(layer.shape)):
            raise CheckpointError(
                f"{stem}: an adapter cannot be merged into a layer that is packed (model.llm.quantization), nor one of "
                "DoRA into a layer that is spread over processes. Name llm.lora in model.trainable to train it on, or "
                "start from a merged model: vlm export RUN --full, and its llm folder as model.llm.path"
            )
        add(layer, adapter_delta(model.get_submodule(place), tensors, stem, config))


@torch.no_grad()
def renew_adapters(model: VisionLanguageModel, brought: Collection[str]) -> None:
    """Begin anew what adapters took from the weights beside them, where these were replaced: DoRA's lengths, and the
    copies of `modules_to_save`.

    Args:
        brought: canonical names of what was loaded; what of adapters is among them stays.
    """
    for top, network in (("llm", model.llm), ("vision", model.vision)):
        if network is None or not any(part_of(name) == top for name in brought):
            continue
        for name, module in network.named_modules():
            place = f"{top}.lora.{name}"
            if getattr(module, "lora_magnitude_vector", None) and f"{place}.{MAGNITUDE}" not in brought:
                weight, axis = module.base_layer.weight.float(), 0 if is_transposed(module.base_layer) else 1
                module.lora_magnitude_vector["default"].weight.copy_(weight.norm(dim=axis))
            elif hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
                for leaf, parameter in module.modules_to_save["default"].named_parameters():
                    if f"{place}{SAVED}{leaf}" not in brought:
                        parameter.copy_(module.original_module.get_parameter(leaf))


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


def adapted_linears(network: Any, config: LoRAConfig) -> dict[str, nn.Module]:
    """Name in the language model or encoder -> linear layer of its blocks beside which an adapter stands.

    Raises:
        ConfigError: a target names no linear layer.
    """
    linears = find_linears(network) if hasattr(network, "get_decoder") else linears_of_encoder(network)
    if config.targets == "all-linear":
        return linears
    key = "model.lora.targets" if hasattr(network, "get_decoder") else "model.vision_lora.targets"
    return {name: linears[name] for name in names_chosen([*linears], config.targets, key, "linear layer")}


def saved_modules(llm: Any, config: LoRAConfig) -> list[str]:
    """Names of the modules that train whole beside adapters.

    Raises:
        ConfigError: there is no such module, or it is an embedding that is the output layer too.
    """
    if not config.modules_to_save:
        return []
    names = [name for name, module in llm.named_modules() if name and any(True for _ in module.parameters())]
    found = names_chosen(names, config.modules_to_save, "model.lora.modules_to_save", "module")
    head, embedding = llm.get_output_embeddings(), llm.get_input_embeddings()
    tied = [name for name in found if llm.get_submodule(name) in (head, embedding)]
    if tied and head.weight is embedding.weight:
        raise ConfigError(
            f"model.lora.modules_to_save: {tied[0]} is the embedding and the output layer at once in this model, and a "
            "copy would part them. Leave it out, or train llm with partial: {llm: {modules: [...]}}, without llm.lora"
        )
    return found


def partial_names(network: nn.Module, chosen: PartialConfig, part: str) -> list[str]:
    """Names in a language model or encoder of the parameters that train, as `model.partial` says.

    Raises:
        ConfigError: more blocks than there are, or a module that is not there.
    """
    is_llm = hasattr(network, "get_decoder")
    kept: list[str] = []
    for blocks in map(list, [find_blocks(network)] if is_llm else blocks_of_encoder(network)):  # of each network
        asked = chosen.first_blocks + chosen.last_blocks
        if asked > len(blocks):
            raise ConfigError(
                f"model.partial.{part}: {asked} blocks, but there are {len(blocks)}; leave partial out for all"
            )
        kept += blocks[: chosen.first_blocks] + blocks[len(blocks) - chosen.last_blocks :]
    if chosen.modules:
        modules = [name for name, module in network.named_modules() if name and any(True for _ in module.parameters())]
        kept += names_chosen(modules, chosen.modules, f"model.partial.{part}.modules", "module")
    return [name for name, _ in network.named_parameters() if any(name.startswith(f"{place}.") for place in kept)]
