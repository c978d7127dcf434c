"""LoRA adapters of exports: folded into the language model's weights, and taken from another export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm.artifacts.adapted_vocabulary import grown_rows, split_head
from vlm.artifacts.fingerprint import differences
from vlm.artifacts.layouts import open_parts
from vlm.artifacts.manifest import NAME, Manifest, read_manifest
from vlm.artifacts.peft_adapter import PeftAdapter, changed_names, merged
from vlm.errors import CheckpointError
from vlm.models.config import LoRAConfig, QuantizationConfig
from vlm.models.decoders import is_transposed
from vlm.models.lora import SAVED, adapter_delta, adapter_shapes
from vlm.models.trainable import adapted_linears, misfit, part_weights, saved_modules
from vlm.models.vlm import VisionLanguageModel
from vlm.models.weight_files import LazyTensors


@dataclass(frozen=True)
class Adapter:
    """What `read_adapter` found. `replaces_own`: it is the export's own adapter, trained on or not."""

    folder: Path
    lora: LoRAConfig
    tensors: dict[str, Tensor]  # canonical names
    base: dict[str, str]  # fingerprints of the language model that it was trained beside
    replaces_own: bool
    quantization: QuantizationConfig | None  # of the weights that it was trained beside
    manifest: Manifest  # of the export that it lies in


def read_adapter(folder: str | Path, export: Path, manifest: Manifest) -> Adapter:
    """
    Args:
        folder: an export with an adapter, or the folder `adapter` in one.
        export, manifest: what the adapter will be put on.

    Raises:
        CheckpointError: no export, one without an adapter, or one of another language model.
    """
    place = Path(folder)
    if not (place / NAME).is_file() and (place.parent / NAME).is_file():
        place = place.parent
    theirs = read_manifest(place)
    if "llm.lora" not in theirs.included or theirs.model.lora is None:
        raise CheckpointError(
            f"--adapter {folder} has no LoRA adapter: it holds {', '.join(theirs.included) or 'nothing'}. Name the "
            "export of a run with llm.lora in model.trainable, made without --full"
        )
    base = theirs.base.get("llm", {})
    if "llm" not in manifest.included:
        ours = manifest.base.get("llm", {})
        lines = [f"  {n}: {base[n]} -> {ours[n]}" for n in base if n in ours and ours[n] != base[n]]
        _refuse_other_base(lines, place, export)
    start = theirs.origin.get("init_from") or place
    tensors = dict(open_parts(place, replace(theirs, included=("llm.lora",)), theirs.model))
    continued = export.resolve() in (Path(start).resolve(), place.resolve())
    replaces_own = continued and "llm.lora" in manifest.included
    return Adapter(place, theirs.model.lora, tensors, base, replaces_own, theirs.model.llm.quantization, theirs)


@torch.no_grad()
def fold_adapter(model: VisionLanguageModel, lora: LoRAConfig, tensors: Mapping[str, Tensor], where: str) -> None:
    """Add an adapter to the weights beside it, as peft merges it, to the bit: weight + scale * B @ A, or as DoRA does.

    Importing peft would take as long as all else that loading a small model does.

    Args:
        tensors: `llm.lora.<module>.lora_A.weight` [rank, in] and `lora_B.weight` [out, rank], lengths [out] of DoRA,
            and weights [...] of `modules_to_save`.
        where: what they come from, for the message.

    Raises:
        CheckpointError: lists every tensor that is missing, unknown, of another shape, or not finite once added.
    """
    layers: dict[str, Any] = adapted_linears(model.llm, lora)
    saved = {
        f"llm.lora.{module}{SAVED}{name}": parameter
        for module in saved_modules(model.llm, lora)
        for name, parameter in model.llm.get_submodule(module).named_parameters()
    }
    expected = {name: list(parameter.shape) for name, parameter in saved.items()}
    for name, layer in layers.items():
        expected |= adapter_shapes(f"llm.lora.{name}", layer, lora)
    problems = [f"  {name}: not in the model" for name in tensors if name not in expected]
    problems += [f"  {name}: missing" for name in expected if name not in tensors]
    problems += [
        f"  {name}: {list(tensor.shape)} -> {expected[name]}"
        for name, tensor in tensors.items()
        if name in expected and list(tensor.shape) != expected[name]
    ]
    if problems:
        raise CheckpointError(misfit(where, problems))
    for name, layer in layers.items():
        layer.weight += adapter_delta(layer, tensors, f"llm.lora.{name}", lora).to(layer.weight.dtype)
        if not layer.weight.isfinite().all():
            raise CheckpointError(f"{where}: llm.lora.{name} is not finite once added. The training diverged")
    for name, parameter in saved.items():
        parameter.copy_(tensors[name])


@torch.no_grad()
def fold_peft(model: VisionLanguageModel, adapter: PeftAdapter) -> None:
    """Add an adapter that any program trained to a loaded model, as `vlm merge` adds it to files: new tokens make the
    embedding longer, and a head that was not trained with the embedding gets a weight of its own.

    Raises:
        CheckpointError: it does not fit the model.
    """
    own = dict(model.named_parameters())
    base = LazyTensors({name: tuple(tensor.shape) for name, tensor in own.items()}, own.__getitem__)
    transposed = [name for name, module in model.named_modules() if is_transposed(module)]
    adapters, heads = split_head(model.llm, base, [adapter])
    heads = {name: weight.detach().clone() for name, weight in heads.items()}  # before the embedding changes
    tensors = merged(base, adapters, transposed, "cpu")
    rows = grown_rows(model.llm, base, tensors)
    for name in changed_names(base, adapters):
        own[name].data = tensors[name].to(own[name].dtype)
    embedding, head = model.llm.get_input_embeddings(), model.llm.get_output_embeddings()
    settings = model.llm.config.get_text_config(decoder=True)
    for weight in heads.values():
        head.weight = nn.Parameter(weight.to(embedding.weight.dtype), requires_grad=False)
        settings.tie_word_embeddings = False
    if rows is not None:
        embedding.num_embeddings = head.out_features = settings.vocab_size = rows


def is_of_export(folder: Path) -> bool:
    """Whether an adapter's folder is an export of this program, or the folder `adapter` in one."""
    return (folder / NAME).is_file() or (folder.parent / NAME).is_file()


def check_loaded_base(model: VisionLanguageModel, adapter: Adapter, export: Path) -> None:
    """As `read_adapter` checks, for a complete export: its language model is compared, once loaded.

    Raises:
        CheckpointError: it is another one, or has an adapter merged into it.
    """
    own = {name.removeprefix("llm."): tensor for name, tensor in part_weights(model, "llm").items()}
    _refuse_other_base(differences(adapter.base, own), adapter.folder, export)


def _refuse_other_base(lines: list[str], adapter: Path, export: Path) -> None:
    if lines:
        raise CheckpointError(
            f"--adapter {adapter} was trained beside another language model than that of {export} (hash of tensors, "
            "the adapter's -> the export's):\n" + "\n".join(lines) + "\nUsually the adapter belongs to another base "
            "model, or the export is a --full one with an adapter merged in: name the export made without --full"
        )
