"""What a run trained, as tensors with canonical names, and writing them into an export (`vlm.artifacts.layouts`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.artifacts.layouts import ADAPTERS, open_parts
from vlm.artifacts.llava import read_start
from vlm.artifacts.manifest import ADAPTER, LLM, PROJECTOR, VALUE_HEAD, VISION, without_value_head
from vlm.artifacts.pins import pin_start, places_of, refuse_replaced
from vlm.artifacts.shards import num_bytes, save_plain, write_shards
from vlm.data.config import DataConfig
from vlm.data.image_order import ImageOrder, learned_order
from vlm.errors import CheckpointError
from vlm.kept_config import read_kept_config
from vlm.models.config import ModelConfig
from vlm.models.lora import SAVED
from vlm.models.trainable import part_of
from vlm.models.weight_files import prefixed
from vlm.schema import PARTS
from vlm.train.checkpoint import checkpoint_of, newest_verified, read_info
from vlm.train.fragments import read_weights

ADAPTER_CONFIG = "adapter/adapter_config.json"


@dataclass(frozen=True)
class Trained:
    """All weights of a run that are not those of its base models, and what is needed to write them down."""

    model: ModelConfig
    data: DataConfig
    tensors: dict[str, Tensor]  # canonical names
    trained: tuple[str, ...]
    origin: dict[str, Any] = field(default_factory=dict)  # steps, data files, init_from
    image_order: ImageOrder = "keep"  # of the training data
    scores: bool = True  # whether its value head is what it was trained for; else it goes with the training

    def part(self, part: str) -> dict[str, Tensor]:
        """Canonical name -> tensor [...] of one part."""
        return {name: tensor for name, tensor in self.tensors.items() if part_of(name) == part}


def read_run(run: Path, step: int | None = None) -> Trained:
    """A checkpoint of a run, completed by the export that the run started from.

    Args:
        step: of which checkpoint; None is the newest intact one.

    Raises:
        CheckpointError: no run, no intact checkpoint or none of this step, a projector that nothing trained; or what
            the run began with was replaced.
    """
    config = read_kept_config(run / "config.yaml")
    checkpoint = newest_verified(run) if step is None else checkpoint_of(run, step)
    if checkpoint is None:
        raise CheckpointError(f"{run} has no checkpoint yet, so there is nothing to export. Train first: vlm train")
    began = pin_start(config.model, config.init_from)
    refuse_replaced(checkpoint, read_info(checkpoint).get("start"), began, places_of(config.model, config.init_from))
    tensors = read_weights(checkpoint)
    model = config.model
    trained: list[str] = list(model.trainable)
    info = read_info(checkpoint)
    image_orders: dict[str, int] = info.get("image_orders", {})  # earlier versions did not count
    order = learned_order(image_orders)
    if model.vision is not None:  # what of the projector is frozen, the checkpoint does not hold
        tensors = {**prefixed(model.projector.start_weights(), "projector."), **tensors}
        model = model.model_copy(update={"projector": model.projector.exported()})
    if config.init_from is not None:
        start = Path(config.init_from)
        manifest = without_value_head(read_start(start), trained)
        keeps_llm = "llm" not in trained or "llm" in model.partial
        if keeps_llm and "llm.lora" not in trained and "llm.lora" in manifest.included:
            model = model.model_copy(update={"lora": manifest.model.lora})  # its adapter is carried over
        tensors = _complete(tensors, model, open_parts(start, manifest, model))
        order = order if image_orders else manifest.image_order
        trained += [part for part in manifest.trained if any(part_of(name) == part for name in tensors)]
    if model.vision is not None and not any(name.startswith("projector.") for name in tensors):
        raise CheckpointError(
            f"{run} trained {', '.join(trained)} and no projector, and started from no export that has one (init_from)"
        )
    origin = {
        "steps": info["step"],
        "data": [source.path for source in config.data.sources],
        "init_from": config.init_from,
        "image_orders": image_orders,
    }
    parts = tuple(part for part in PARTS if part in trained)
    return Trained(model, config.data, tensors, parts, origin, order, not config.objective.writes_replies)


def write_parts(folder: Path, trained: Trained, max_shard_size: str) -> tuple[str, ...]:
    """Write each part into its file. Returns the names of the parts that there are.

    What a trained encoder or language model needs besides its weights (its shape) is not written here.
    """
    for part, file in (("projector", PROJECTOR), ("vision", VISION), ("value_head", VALUE_HEAD)):
        tensors = trained.part(part)
        if tensors:
            save_plain(tensors.items(), folder / file)
    if trained.part("llm.lora"):
        _write_adapter(folder, trained.part("llm.lora"), trained.model)
    if trained.part("llm"):
        save_sharded(ADAPTERS["llm"].from_ours(trained.part("llm")), folder / LLM, max_shard_size)
    return tuple(part for part in PARTS if trained.part(part))


def save_sharded(tensors: Mapping[str, Tensor], folder: Path, max_shard_size: str) -> None:
    """Write tensors [...] as model.safetensors, or numbered shards and their index as transformers reads them."""
    sizes = {name: num_bytes(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    write_shards(sizes, tensors.__getitem__, folder, max_shard_size)


def _complete(tensors: dict[str, Tensor], model: ModelConfig, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical name -> tensor [...]: what was trained now, and what came trained and stayed."""
    replaced = {part for part in model.trainable if part not in model.partial}
    if "llm" in replaced:
        replaced.add("llm.lora")  # was merged before this training, which wrote down the sum
        if "value_head" in replaced:
            replaced.discard("llm")  # of a model that scores the output layer stood still, as it came
    replaced.discard("projector")  # of which some may be frozen; all that trained is in `tensors`
    return {name: before[name] for name in before if part_of(name) not in replaced} | tensors


def _write_adapter(folder: Path, tensors: dict[str, Tensor], model: ModelConfig) -> None:
    """[rank, in] and [out, rank], in peft's own layout: `PeftModel.from_pretrained(base, "adapter")` reads it."""
    lora = model.lora
    assert lora is not None
    (folder / "adapter").mkdir()
    names = ADAPTERS["llm.lora"].from_ours(tensors)
    save_plain(names.items(), folder / ADAPTER)
    adapted = {name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in names if ".lora_" in name}
    saved = {name.removeprefix("llm.lora.").partition(SAVED)[0] for name in tensors if SAVED in name}
    targets = {name.rpartition(".")[2] for name in adapted} if lora.targets == "all-linear" else adapted
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.llm.path,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "modules_to_save": sorted(saved) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(targets),
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
