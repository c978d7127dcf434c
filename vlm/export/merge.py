"""Base model + LoRA adapters -> a model folder like the base's, with one file of weights in memory at a time."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vlm.artifacts.adapted_vocabulary import grown_rows, is_in_export, modules_of, split_head, tokenizer_place
from vlm.artifacts.folder import replace_folder
from vlm.artifacts.manifest import LLM, NAME, read_manifest
from vlm.artifacts.peft_adapter import PeftAdapter, match_names, merged
from vlm.artifacts.shards import check_shard_size, write_shards
from vlm.compat import follow_umask, prepare
from vlm.errors import CheckpointError
from vlm.faults import fault
from vlm.inference.load import choose_device
from vlm.logs import Progress, log
from vlm.models.config import QuantizationConfig
from vlm.models.decoders import is_transposed
from vlm.models.native import is_native
from vlm.models.quantize import names_of_packed, rounded
from vlm.models.tokenizer_files import SETTINGS, VOCABULARY, read_json
from vlm.models.weight_files import LazyTensors, WeightFiles, joined
from vlm.precision import DTYPES

if TYPE_CHECKING:
    from torch import nn

DType = Literal["auto", "fp16", "bf16", "fp32"]
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TRAVELS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".yaml")
TOKENIZER = (
    "tokenizer.json", VOCABULARY, SETTINGS, "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def merge_folder(
    base: str | Path,
    adapters: Sequence[PeftAdapter],
    out: str | Path,
    *,
    dtype: DType = "auto",
    device: str = "auto",
    max_shard_size: str = "5GB",
) -> Path:
    """Add adapters to a base model's weights and write a folder that loads as the base does.

    Peak memory is one file of weights (`max_shard_size`, or the largest tensor) and the adapters. Weights are
    added in float32 and rounded once. Where an adapter is of an export that was trained beside packed weights (QLoRA),
    it is added to the values of these. The folder appears complete or not at all.

    Args:
        base: a language model or any other model in transformers' layout, with safetensors.
        adapters: of `read_peft`, added in this order.
        dtype: of the weights written; "auto" leaves each in that of the base.
        device: where sums are computed: auto, cpu, cuda.

    Returns:
        the folder.

    Raises:
        CheckpointError: the base has no safetensors or is quantized, or an adapter does not fit it.
        ConfigError: `out` holds something else, or cannot be written.
    """
    prepare()
    check_shard_size(max_shard_size)
    folder, final, device = Path(base), Path(out), choose_device(device)
    files, settings = _open_base(folder), read_json(folder / "config.json")
    model = _shape_of(folder, settings)
    adapters, head = split_head(model, files, adapters)
    transposed = _transposed(model, files, adapters)
    tensors = merged(_as_packed(model, files, adapters, transposed), adapters, transposed, device)
    tensors = joined(tensors, head)
    formats = {name: _format(files.dtypes.get(name, "F32"), dtype) for name in tensors}
    bits = {name: _bits(files.dtypes.get(name, "F32"), formats[name]) for name in tensors}
    sizes = {name: math.prod(shape) * bits[name] // 8 for name, shape in tensors.shapes.items()}
    with replace_folder(final) as temporary, Progress("merge: written", len(sizes), "tensors") as progress:
        done = count()

        def read(name: str) -> Tensor:
            progress.show(next(done))
            return tensors[name] if formats[name] is None else tensors[name].to(formats[name])

        write_shards(sizes, read, temporary, max_shard_size)
        fault("export:weights")
        _copy_files(folder, adapters, temporary)
        changes = _changes(model, files, tensors, dtype, is_untied=bool(head))
        _write_settings(temporary, folder, changes, adapters)
    shown = " + ".join(adapter.describe() for adapter in adapters)
    log(f"{final}: {folder} + {shown}, {sum(sizes.values()) / 1e6:,.1f} MB; try: vlm chat {final}")
    return final


def _open_base(folder: Path) -> WeightFiles:
    settings = read_json(folder / "config.json")
    if (folder / NAME).is_file() and not settings:
        raise CheckpointError(
            f"{folder} is an export whose parts lie in folders of their own, not one model of transformers' layout. "
            f"Name its language model ({folder / LLM}, if it is there). A run's own adapter: vlm export RUN --full"
        )
    if not settings:
        raise CheckpointError(
            f"{folder} holds no config.json, so it is no model in transformers' layout. Usually another folder is meant"
        )
    if settings.get("quantization_config"):
        raise CheckpointError(
            f"{folder} holds quantized weights, to which nothing can be added. Name the model that they were made "
            "from: an adapter that was trained beside its quantized form (QLoRA) fits it"
        )
    return WeightFiles(str(folder), "the base model")


def _shape_of(folder: Path, settings: Mapping[str, Any]) -> nn.Module | None:
    """The base's class without weights; None for one that only code of its own folder has."""
    import transformers

    names = settings.get("architectures") or [None]
    cls = getattr(transformers, str(names[0]), None)
    if cls is None or not is_native(settings.get("model_type")):
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return cls(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: cannot make a {names[0]} of its config.json ({str(error)[:200]})") from None


def _transposed(model: nn.Module | None, files: WeightFiles, adapters: Sequence[PeftAdapter]) -> set[str]:
    """Modules of the files whose weight is [inputs, outputs]."""
    if model is not None:
        wanted = [name for name, module in model.named_modules() if is_transposed(module)]
    else:
        wanted = [name for each in adapters if each.settings.get("fan_in_fan_out") for name in each.layers]
    return set(match_names(wanted, modules_of(files)).values())


def _as_packed(
    model: nn.Module | None, files: WeightFiles, adapters: Sequence[PeftAdapter], transposed: Collection[str]
) -> LazyTensors:
    """The base's tensors [...]; of layers that were packed while an adapter trained, the packed weights' values."""
    configs = {adapter.folder: config for adapter in adapters if (config := _quantization(adapter))}
    if not configs:
        return files
    place, config = next(iter(configs.items()))
    if model is None or any(other != config for other in configs.values()):
        what = "is of a class with code of its own" if model is None else "would be packed in two ways"
        raise CheckpointError(
            f"{place} was trained beside packed weights ({config.format}), and the base model {what}, so what the "
            "adapter belongs to is not known. Merge it by vlm export RUN --full"
        )
    log(f"{place} was trained beside {config.format} weights: the base model's linear layers take their values")
    cpu = torch.device("cpu")
    modules = set(match_names(names_of_packed(model, config, cpu), modules_of(files)).values())

    def read(name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in modules:
            return files[name]
        return rounded(files[name].float(), config, cpu, module in transposed)

    return LazyTensors(files.shapes, read)


def _quantization(adapter: PeftAdapter) -> QuantizationConfig | None:
    return read_manifest(adapter.folder.parent).model.llm.quantization if is_in_export(adapter) else None


def _changes(model: Any, files: WeightFiles, tensors: LazyTensors, dtype: str, is_untied: bool) -> dict[str, Any]:
    """What config.json has to say otherwise than the base's, as of a grown embedding [V, D]."""
    changes: dict[str, Any] = {"tie_word_embeddings": False} if is_untied else {}
    if dtype != "auto":
        changes |= {"dtype": str(DTYPES[dtype]).removeprefix("torch.")}
    rows = grown_rows(model, files, tensors)
    if rows is not None:
        changes["vocab_size"] = rows
    return changes


def _write_settings(target: Path, base: Path, changes: Mapping[str, Any], adapters: Sequence[PeftAdapter]) -> None:
    """config.json and generation_config.json."""
    settings = read_json(base / "config.json")
    stop_ids = [ids for adapter in adapters if (ids := _stop_ids(adapter))]
    changes = {**changes, **({"eos_token_id": stop_ids[-1]} if stop_ids else {})}
    inner = settings.get("text_config")
    for key, value in changes.items():
        section = inner if isinstance(inner, dict) and key != "dtype" else settings
        section[key] = value
        older = {"dtype": "torch_dtype"}.get(key, key)
        for each in (settings, inner if isinstance(inner, dict) else {}):
            if older in each:
                each[older] = value
    _write(target / "config.json", settings)
    generation = read_json(target / "generation_config.json")
    if generation and stop_ids:
        _write(target / "generation_config.json", {**generation, "eos_token_id": stop_ids[-1]})


def _copy_files(base: Path, adapters: Sequence[PeftAdapter], target: Path) -> None:
    """What lies beside the base's weights; the tokenizer of the last adapter that has one: it was trained with it."""
    for file in sorted(base.iterdir()):
        if file.is_file() and file.suffix in _TRAVELS and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
    places = [place for adapter in adapters if (place := tokenizer_place(adapter, base)) is not None]
    if places:
        for name in TOKENIZER:
            (target / name).unlink(missing_ok=True)
            if (places[-1] / name).is_file():
                shutil.copyfile(places[-1] / name, target / name)
    for file in target.iterdir():
        follow_umask(file)


def _stop_ids(adapter: PeftAdapter) -> list[int]:
    """What ends a reply, by the export that the adapter is of."""
    return list(read_manifest(adapter.folder.parent).stop_ids) if is_in_export(adapter) else []


def _format(written: str, asked: str) -> torch.dtype | None:
    """What a tensor is written in; None for one that is no float."""
    own = _FLOATS.get(written)
    return own if own is None or asked == "auto" else DTYPES[asked]


def _bits(written: str, dtype: torch.dtype | None) -> int:
    """
    >>> _bits("F32", torch.bfloat16), _bits("I64", None), _bits("BOOL", None), _bits("F8_E4M3", None)
    (16, 64, 8, 8)
    """
    if dtype is not None:
        return 8 * dtype.itemsize
    found = re.search(r"\d+", written)
    return int(found[0]) if found else 8


def _write(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
