"""LoRA adapters in peft's layout, of this program or of any other, added to weights of a model one tensor at a time.

peft's own layers compute each sum, so rsLoRA, DoRA, biases, embeddings and convolutions count as peft counts them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlm.compat import prepare
from vlm.errors import CheckpointError, ConfigError
from vlm.models.pth_files import read_pth
from vlm.models.tokenizer_files import read_json
from vlm.models.weight_files import LazyTensors

CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_LORA = re.compile(
    r"(?P<module>.+?)\.(?P<kind>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?:\.default)?(?P<leaf>\.weight|\.bias)?"
)
_SAVED = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)\.")
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base model as well
_NOT_ADDED = {  # keys of adapter_config.json whose adapters cannot be added to weights, or not by this file
    "alora_invocation_tokens": "it counts from certain tokens on only, so no weights can hold it",
    "target_parameters": "it adapts parameters of experts, not modules",
    "trainable_token_indices": "it replaces rows of the embedding",
    "layer_replication": "it repeats layers of the base model",
    "use_qalora": "it adapts groups of quantized weights",
    "arrow_config": "it chooses between adapters for each token",
    "use_bdlora": "its matrices are block-diagonal",
}


@dataclass(frozen=True)
class PeftAdapter:
    """What `read_peft` found.

    Attributes:
        settings: of adapter_config.json.
        layers: module, as the adapter names it -> peft's names of its tensors, such as `lora_A.weight` [rank, in].
        replaced: name of a whole tensor [...], as the adapter names it, that takes the place of the base model's.
        weight: how much of the adapter is added; 1 is as it was trained.
    """

    folder: Path
    settings: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    replaced: Mapping[str, Tensor] = field(repr=False)
    weight: float = 1.0

    def describe(self) -> str:
        """For a log: "cache/alpaca (16 modules, rank 8)"."""
        ranks = sorted({self.rank(module) for module in self.layers})
        kinds = [name for key, name in (("use_dora", "DoRA"), ("use_rslora", "rsLoRA")) if self.settings.get(key)]
        parts = [f"{len(self.layers)} modules", f"rank {', '.join(map(str, ranks))}"] if ranks else []
        parts += kinds + ([f"{len(self.replaced)} tensors replaced"] if self.replaced else [])
        return f"{self.folder} ({', '.join(parts)})" + (f" x {self.weight:g}" if self.weight != 1 else "")

    def rank(self, module: str) -> int:
        tensors = self.layers[module]
        return int((tensors.get("lora_A.weight", tensors.get("lora_embedding_A")).shape)[0])  # type: ignore[union-attr]

    def alpha(self, module: str) -> float:
        """As peft looks it up: the first pattern that is the module's name or its end."""
        for pattern, alpha in (self.settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(alpha)
        return float(self.settings.get("lora_alpha", 8))


def is_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter in peft's layout."""
    return (folder / CONFIG).is_file()


def read_peft(folder: str | Path, weight: float = 1.0) -> PeftAdapter:
    """
    Args:
        folder: with adapter_config.json; or an export of a run, which has it below `adapter`.
        weight: how much of it is to be added.

    Raises:
        CheckpointError: no LoRA adapter, a damaged one, or of a kind that cannot be added to weights. A .bin is
            unpickled as plain tensors only, and refused if it holds anything else.
        ConfigError: a weight that is not 1 for what cannot be weighed.
    """
    place = Path(folder)
    place = place / "adapter" if not is_peft(place) and is_peft(place / "adapter") else place
    if not is_peft(place):
        raise CheckpointError(
            f"{folder} holds no {CONFIG}, so it is no adapter of peft. Name the folder that peft's save_pretrained "
            "wrote, or the export of a run with llm.lora in model.trainable"
        )
    settings = read_json(place / CONFIG)
    if reason := _why_not_added(settings):
        raise CheckpointError(f"{place}: this adapter cannot be merged: {reason}")
    layers, replaced = _sort_tensors(_read_tensors(place), place)
    if weight != 1 and (replaced or settings.get("use_dora")):
        what = f"it replaces {min(replaced)} whole" if replaced else "it is a DoRA, which scales whole columns"
        raise ConfigError(
            f"--adapter {folder}={weight:g}: {what}, so it counts once or not at all. Leave the weight out"
        )
    return PeftAdapter(place, settings, layers, replaced, weight)


def match_names(wanted: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Adapter's name of a module -> the base model's, for those that are found.

    Files, transformers' classes and their earlier versions put other levels before the same module. So the longest
    common end counts, which must reach up to the block's number, and then the levels before it that both have.

    >>> match_names(["model.layers.0.q"], ["language_model.model.layers.0.q", "tower.encoder.layers.0.q"])
    {'model.layers.0.q': 'language_model.model.layers.0.q'}
    """
    by_leaf = defaultdict(list)
    for name in names:
        by_leaf[name.rpartition(".")[2]].append(name.split("."))
    found = {}
    for name in wanted:
        parts = name.split(".")
        scored = [(_likeness(parts, other), ".".join(other)) for other in by_leaf[parts[-1]]]
        scored = sorted(
            ((likeness, other) for likeness, other in scored if likeness[0] >= _needed(parts)), reverse=True
        )
        if scored and (len(scored) == 1 or scored[0][0] > scored[1][0]):
            found[name] = scored[0][1]
    return found


def merged(
    base: LazyTensors, adapters: Sequence[PeftAdapter], transposed: Collection[str] = (), device: str = "cpu"
) -> LazyTensors:
    """The base model's tensors [...] with adapters added in float32, in their order. One tensor is computed at a time.

    Args:
        base: by any names that end as those of the adapters do. Tensors that nothing changes are given as they are.
        transposed: modules of `base` whose weight is [inputs, outputs].
        device: where sums are computed; results are on the CPU.

    Returns:
        tensors that are changed are float32, of the same names.

    Raises:
        CheckpointError: an adapter names a module that the base has not, or of another shape. Each is listed.
    """
    changes = [_Changes.of(adapter, base) for adapter in adapters]
    shapes = dict(base.shapes)
    for change in changes:
        shapes |= {name: tuple(tensor.shape) for name, tensor in change.replaced.items()}

    @torch.no_grad()
    def read(name: str) -> Tensor:
        last = next((change.replaced[name] for change in reversed(changes) if name in change.replaced), None)
        tensor = base[name] if last is None else last.float()
        module, _, leaf = name.rpartition(".")
        for change in changes:
            if module in change.layers and change.touches(module, leaf):
                bias = base[f"{module}.bias"] if f"{module}.bias" in base.shapes else None
                weight = tensor if leaf == "weight" else base[f"{module}.weight"]
                added = change.add(module, weight, tensor if leaf == "bias" else bias, module in transposed, device)
                tensor = added[leaf]
        return tensor.to("cpu")

    return LazyTensors(shapes, read)


def changed_names(base: LazyTensors, adapters: Sequence[PeftAdapter]) -> list[str]:
    """Names of the tensors [...] of `base` that `merged` changes."""
    changes = [_Changes.of(adapter, base) for adapter in adapters]
    return [
        name
        for name in base
        if any(name in change.replaced or change.touches(*name.rpartition(".")[::2]) for change in changes)
    ]


@dataclass(frozen=True)
class _Changes:
    """An adapter, by the names of the base."""

    adapter: PeftAdapter
    layers: Mapping[str, str]  # module of the base -> of the adapter
    replaced: Mapping[str, Tensor]

    @classmethod
    def of(cls, adapter: PeftAdapter, base: LazyTensors) -> _Changes:
        """Of an adapter to the tensors [...] of `base`."""
        modules = [name.removesuffix(".weight") for name in base if name.endswith(".weight")]
        layers, whole = match_names(adapter.layers, modules), match_names(adapter.replaced, base)
        missing = [name for name in (*adapter.layers, *adapter.replaced) if name not in layers and name not in whole]
        twice = [n for found in (layers, whole) for n, count in Counter(found.values()).items() if count > 1]
        problems = [f"  {name}: not in the base model" for name in missing]
        problems += [f"  {name}: the adapter names it twice" for name in twice]
        problems += [line for name, other in layers.items() if (line := _misfit(adapter, name, base, other))]
        if problems:
            shown = "\n".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
            raise CheckpointError(
                f"{adapter.folder} does not fit the base model:\n{shown}\nUsually it was trained on another base model "
                f"({adapter.settings.get('base_model_name_or_path') or 'its config does not say which'})"
            )
        return cls(
            adapter,
            {other: name for name, other in layers.items()},
            {whole[name]: tensor for name, tensor in adapter.replaced.items()},
        )

    def touches(self, module: str, leaf: str) -> bool:
        return module in self.layers and (leaf == "weight" or (leaf == "bias" and bool(self._settings["lora_bias"])))

    def add(
        self, module: str, weight: Tensor, bias: Tensor | None, is_transposed: bool, device: str
    ) -> dict[str, Tensor]:
        """Weight and bias [...] of a module with the adapter in them, float32, by peft's own layer."""
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

        name = self.layers[module]
        tensors = self.adapter.layers[name]
        settings = LoraConfig(
            r=self.adapter.rank(name), lora_alpha=self.adapter.alpha(name), target_modules=["layer"],  # type: ignore[arg-type]
            init_lora_weights=False, fan_in_fan_out=is_transposed, **self._settings,
        )  # fmt: skip
        holder: Any = nn.Module()
        holder.layer = _layer(weight.to(device).float(), bias, is_transposed, "lora_embedding_A" in tensors)
        try:
            inject_adapter_in_model(settings, holder)
            set_peft_model_state_dict(holder, {f"layer.{leaf}": tensor.float() for leaf, tensor in tensors.items()})
            holder.layer.scale_layer(self.adapter.weight)
            holder.layer.merge(safe_merge=True)  # raises if the result is not finite
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.adapter.folder}: {name} cannot be added ({str(error)[:300]})") from None
        return dict(holder.layer.base_layer.named_parameters())

    @property
    def _settings(self) -> dict[str, Any]:
        return {key: bool(self.adapter.settings.get(key)) for key in ("use_rslora", "use_dora", "lora_bias")}


def _layer(weight: Tensor, bias: Tensor | None, is_transposed: bool, is_embedding: bool) -> nn.Module:
    """A module of weight [...] and bias; its kind is seen in the weight's dimensions."""
    prepare()
    from transformers.pytorch_utils import Conv1D

    first, second = weight.shape[:2]
    with torch.device("meta"):
        if is_embedding:
            layer: nn.Module = nn.Embedding(first, second)
        elif is_transposed:
            layer = Conv1D(second, first)
        elif weight.ndim == 2:
            layer = nn.Linear(second, first, bias=bias is not None)
        else:
            cls = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
            layer = cls(second, first, tuple(weight.shape[2:]), bias=bias is not None)  # type: ignore[arg-type]
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if getattr(layer, "bias", None) is not None:
        value = weight.new_zeros(second if is_transposed else first) if bias is None else bias.to(weight)
        layer.bias = nn.Parameter(value, requires_grad=False)
    return layer


def _why_not_added(settings: Mapping[str, Any]) -> str | None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        return f"its peft_type is {kind}, expected LORA. peft's own merge_and_unload may do it"
    start = settings.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        return (
            f"it began with init_lora_weights {start!r}, which changes the base model too. Save it once more with "
            "peft's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    return next((why for key, why in _NOT_ADDED.items() if settings.get(key)), None)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Name in the adapter's file -> tensor [...]."""
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} holds neither {' nor '.join(_FILES)}. Usually the download is incomplete")
    return read_plain(file)


def read_plain(file: Path) -> dict[str, Tensor]:
    """Name -> tensor [...] of a .safetensors, or of a pickled file of tensors: see `read_pth`.

    Raises:
        CheckpointError: damaged, or it holds more than tensors.
    """
    if file.suffix != ".safetensors":
        return read_pth(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}). Usually the copy is damaged or incomplete") from None


def _sort_tensors(
    tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Adapters by module, lora_A [rank, in] and lora_B [out, rank]; and whole tensors [...]."""
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    replaced, unknown = {}, []
    for full, tensor in tensors.items():
        name = full.removeprefix("base_model.model.")
        if found := _LORA.fullmatch(name):
            leaf = found["leaf"] or ""
            is_plain = "embedding" in found["kind"] or "magnitude" in found["kind"]
            layers[found["module"]][found["kind"] + ("" if is_plain else leaf)] = tensor
        elif ".lora_" in name or "trainable_tokens" in name:
            unknown.append(full)
        elif ".original_module." not in name:
            replaced[_SAVED.sub(".", name)] = tensor
    halves = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
    unknown += [name for name, found in layers.items() if not any(a in found and b in found for a, b in halves)]
    if unknown or not (layers or replaced):
        what = f"tensors that are of no LoRA: {', '.join(sorted(unknown)[:5])}" if unknown else "no tensors"
        raise CheckpointError(f"{folder} holds {what}. Usually the file is damaged, or was written by a newer peft")
    return layers, replaced


def _misfit(adapter: PeftAdapter, name: str, base: LazyTensors, module: str) -> str | None:
    """A line about a linear layer whose shape, [out, in] or [in, out], is not the adapter's."""
    shape, tensors = base.shapes[f"{module}.weight"], adapter.layers[name]
    if len(shape) != 2 or "lora_A.weight" not in tensors:
        return None
    expected = (len(tensors["lora_B.weight"]), tensors["lora_A.weight"].shape[1])
    if shape in (expected, expected[::-1]):
        return None
    return f"  {name}: the adapter is of a layer {list(expected)}, the base model's {module} is {list(shape)}"


def _likeness(one: Sequence[str], other: Sequence[str]) -> tuple[int, int]:
    """Levels at the end that are the same, and how many of those before them both have."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    same = next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    before = Counter(one[: len(one) - same]) & Counter(other[: len(other) - same])
    return same, before.total()


def _needed(parts: Sequence[str]) -> int:
    """How many levels at the end must agree: from the list of blocks on, or only the last one outside of blocks."""
    first = next((number for number, part in enumerate(parts) if part.isdecimal()), None)
    return 1 if first is None else len(parts) - max(0, first - 1)
