"""A part of a model at a time: one stage of a pipeline, or block after block for an engine that spreads each one.

The model is made on the meta device, and only what is wanted is read from the files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlm.compat import prepare
from vlm.errors import CheckpointError, ConfigError
from vlm.logs import Progress
from vlm.models.build import Assembled, assemble, forked_random_state, start_projector
from vlm.models.config import ModelConfig
from vlm.models.decay import undecayed
from vlm.models.families import llm_parts
from vlm.models.head import find_logits_rule
from vlm.models.llm import (
    choose_attention,
    llm_from_config,
    load_tokenizer,
    pad_vocabulary,
    refuse_beyond_embedding,
    settle_attention,
)
from vlm.models.pipeline import PipelineLayer, num_layers, pipeline_layers
from vlm.models.trainable import canonical_name, load_weights, part_of, part_weights, trained_weights
from vlm.models.vision import VisionEncoder, build_vision
from vlm.models.weight_files import LazyTensors, Shapes, WeightFiles
from vlm.precision import frozen_dtype
from vlm.schema import PARTS


@dataclass(frozen=True)
class Stage:
    """A part of a model that is cut into several.

    `built.model` is the whole model's structure without what other stages hold: their modules are `Absent`, `vision`
    and `projector` are None but on stage 0. So optimizer, freezing and names work on it as on a whole model.
    """

    built: Assembled
    number: int
    cuts: tuple[int, ...]  # index of the first layer of each stage but the first
    shapes: Shapes  # canonical name -> shape of all weights of the whole model
    trained: frozenset[str]  # canonical names of what trains in the whole model
    undecayed: frozenset[str]  # and of what weight decay leaves alone
    is_tied: bool  # the head is the token embedding
    layers: list[PipelineLayer] = field(default_factory=list)

    @property
    def num_stages(self) -> int:
        return len(self.cuts) + 1

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == len(self.cuts)

    @property
    def tied_name(self) -> str | None:
        """Canonical name of the token embedding if the last stage holds a copy of it as head."""
        if not self.is_tied or self.num_stages == 1:
            return None
        return f"llm.{llm_parts(self.built.model.llm.config).embed}.weight"

    @property
    def tied_head(self) -> str:
        """Name in the last stage's model of the head that is a copy of the embedding."""
        return f"llm.{llm_parts(self.built.model.llm.config).head}.weight"

    def trained_weights(self) -> dict[str, Tensor]:
        """Canonical name -> tensor [...] of what trains on this stage, a tied embedding with the first stage only."""
        copy = self.tied_head if self.tied_name is not None and self.is_last else None
        return {name: tensor for name, tensor in trained_weights(self.built.model).items() if name != copy}

    def own_name(self, canonical: str) -> str | None:
        """Canonical name under which this stage holds a weight of the whole model; None if it does not.

        They differ in one case: the last stage holds a tied embedding as its head.
        """
        if any(canonical.startswith(prefix) for layer in self.layers for prefix in layer.prefixes):
            return canonical
        return self.tied_head if canonical == self.tied_name and self.is_last else None


class Absent(nn.Module):
    """Stands where another stage has a module."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise AssertionError("this module is on another stage")


def check_cuts(cuts: Sequence[int], layers: int) -> None:
    """Raises ConfigError unless every stage gets a layer."""
    if list(cuts) != sorted(set(cuts)) or (cuts and not 0 < cuts[0] <= cuts[-1] < layers):
        raise ConfigError(
            f"engine.cuts {list(cuts)}: the model has {layers} layers, 0 the inputs, 1 to {layers - 2} the blocks, "
            f"{layers - 1} the output; cuts are rising numbers from 1 to {layers - 1}"
        )


def build_stage(
    config: ModelConfig,
    cuts: Sequence[int],
    number: int,
    *,
    precision: str = "fp32",
    device: str = "cpu",
    seed: int = 0,
    tokenizer_path: str | None = None,
    spread: Callable[[nn.Module], object] | None = None,
    scores: bool = False,
) -> Stage:
    """Build stage `number` as `build_model` with the same arguments would build it among all others.

    New weights are drawn for the whole model in the same order, and those of other stages dropped one by one. Memory
    on the host stays near the size of the stage's own weights.

    Args:
        cuts: index of the first layer of each stage but the first; see `vlm.models.pipeline` for the layers.
        spread: called with each decoder block on `device`, complete and with its adapters; after it the block is held
            in pieces. The next block is read then, so that no process ever holds the whole model.
        scores: whether the model scores replies and writes none, so that nothing reads its output layer.

    Raises:
        ConfigError: the family cannot be cut, or the cuts do not fit it.
        CheckpointError: tensors are missing in the files, or of another shape.
    """
    prepare()
    dtype = frozen_dtype(precision)
    tokenizer = load_tokenizer(tokenizer_path or config.llm.path, config.trust_remote_code)
    files = WeightFiles(config.llm.path)
    llm = _llm_on_meta(config, dtype, device)
    check_cuts(cuts, num_layers(llm))
    bounds = [0, *cuts, num_layers(llm)]
    first, stop = bounds[number], bounds[number + 1]
    is_tied = _tie_as_the_files_do(llm, files)
    num_real = _fit_vocabulary(config, llm, tokenizer)
    own = _own_modules(llm, first, stop)
    later = [] if spread is None else [name for name in _block_names(llm) if name in own]
    _read_own_weights(llm, own - set(later), files, dtype, num_real)
    _stand_in(llm, later, torch.float32 if "llm" in config.trainable else dtype)
    if llm_parts(llm.config).head in own:
        find_logits_rule(llm, config.llm.path)
    vision = _build_vision(config, dtype, is_own=number == 0)
    with forked_random_state():
        torch.manual_seed(seed)
        model, spec, image_token_id = assemble(config, llm, vision, tokenizer, scores)
    if number == 0:
        start_projector(config, model)
    shapes, trained, left_alone = _describe(model, is_tied)
    _remove_other_stages(model, own, keep_vision=number == 0)
    if spread is not None:
        for name in _told(later):
            _read_own_weights(llm, [name], files, dtype, num_real)
            spread(llm.get_submodule(name).to(device))
    built = Assembled(model.to(device), tokenizer, spec, image_token_id)
    stage = Stage(built, number, tuple(cuts), shapes, trained, left_alone, is_tied)
    stage.layers.extend(pipeline_layers(model, first, stop))
    return stage


def _fit_vocabulary(config: ModelConfig, llm: Any, tokenizer: Any) -> int:
    """Returns the rows that are tokens: the placeholder has none of its own. Raises ConfigError where one has none."""
    num_real = len(tokenizer) - 1
    if config.llm.pad_vocab_to_multiple_of:
        pad_vocabulary(llm, num_real, config.llm.pad_vocab_to_multiple_of)
    refuse_beyond_embedding(tokenizer, llm.config.vocab_size, config.llm.path)
    return num_real


@torch.no_grad()
def load_stage_weights(stage: Stage, tensors: LazyTensors, where: str) -> int:
    """Copy into the stage those of some tensors that it holds; the others are compared by name and shape only.

    Args:
        tensors: all on offer, [...] each, by canonical name.
        where: what they come from, for the message.

    Returns:
        how many were loaded.

    Raises:
        CheckpointError: the whole model has no such weights; the same on every stage.
    """
    shapes = tensors.shapes
    unknown = {name for name in shapes if stage.shapes.get(name) != shapes[name]}
    if unknown:
        lines = [f"  {n}: {list(shapes[n])} -> {_shape(stage.shapes.get(n))}" for n in sorted(unknown)]
        shown = "\n".join(lines[:20]) + (f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else "")
        raise CheckpointError(
            f"{where} does not fit this model (file -> model):\n{shown}\nUsually model.vision, model.projector, "
            "model.llm or model.lora differ from what it was trained with: restore them, or leave this file out"
        )
    count = 0
    for name in shapes:
        own = stage.own_name(name)
        if own is not None:
            load_weights(stage.built.model, {own: tensors[name]}, where, partial=True)
            count += 1
    return count


def _llm_on_meta(config: ModelConfig, dtype: torch.dtype, device: str) -> Any:
    with torch.device("meta"):
        llm: Any = llm_from_config(config.llm, dtype, trust_remote_code=config.trust_remote_code)
    llm_parts(llm.config)
    if attention := choose_attention(config.llm.attention, device):
        llm.set_attn_implementation(attention)
    settle_attention(llm, config.llm.attention)
    return llm.eval()


def _build_vision(config: ModelConfig, dtype: torch.dtype, is_own: bool) -> VisionEncoder | None:
    if config.vision is None or is_own:
        return None if config.vision is None else build_vision(config.vision, dtype)
    with torch.device("meta"):
        return build_vision(config.vision, dtype, weights=False)


def _tie_as_the_files_do(llm: Any, files: WeightFiles) -> bool:
    """Whether the head is the embedding. As transformers has it, not where the files hold two different tensors."""
    parts = llm_parts(llm.config)
    embed, head = f"{parts.embed}.weight", f"{parts.head}.weight"
    if llm.get_parameter(head) is not llm.get_parameter(embed):
        return False
    if {embed, head} <= files.shapes.keys() and not files.are_equal(embed, head):
        module = llm.get_submodule(parts.head)
        module.weight = nn.Parameter(torch.empty_like(module.weight))
        llm.config.tie_word_embeddings = False
        llm.all_tied_weights_keys.clear()
        return False
    return True


def _told(blocks: Sequence[str]) -> Iterator[str]:
    """The names of blocks, with lines in the log that say how many are done."""
    with Progress("model: loaded", len(blocks), "blocks") as progress:
        for done, name in enumerate(blocks, 1):
            yield name
            progress.show(done)


def _describe(model: Any, is_tied: bool) -> tuple[Shapes, frozenset[str], frozenset[str]]:
    """Shapes of all weights of the whole model by canonical name, which of them train, which are not decayed."""
    everything = {name: tensor for part in PARTS for name, tensor in part_weights(model, part).items()}
    if is_tied:  # on a stage with one of the two they are no longer one tensor
        everything.pop(f"llm.{llm_parts(model.llm.config).head}.weight", None)
    trained = frozenset(name for name, tensor in everything.items() if tensor.requires_grad)
    left_alone = frozenset(map(canonical_name, undecayed(model)))
    return {name: tuple(tensor.shape) for name, tensor in everything.items()}, trained, left_alone


def _block_names(llm: Any) -> list[str]:
    blocks = llm_parts(llm.config).blocks
    return [f"{blocks}.{index}" for index in range(len(llm.get_submodule(blocks)))]


def _stand_in(llm: Any, names: Sequence[str], dtype: torch.dtype) -> None:
    """Give modules weights that take no memory: one element, seen in the right shape. Adapters fit beside them."""
    for module_name in names:
        module = llm.get_submodule(module_name)
        for name, parameter in list(module.named_parameters(module_name)):
            _set_parameter(llm, name, nn.Parameter(torch.zeros(1, dtype=dtype).expand(parameter.shape)))


def _own_modules(llm: Any, first: int, stop: int) -> set[str]:
    """Names of the language model's modules that a stage of these layers holds."""
    parts = llm_parts(llm.config)
    last = num_layers(llm) - 1
    own = {f"{parts.blocks}.{layer - 1}" for layer in range(first, stop) if 0 < layer < last}
    own |= {parts.rotary} if own else set()
    own |= {parts.embed} if first == 0 else set()
    return own | ({parts.norm, parts.head} if stop > last else set())


def _read_own_weights(llm: Any, own: Collection[str], files: WeightFiles, dtype: torch.dtype, num_real: int) -> None:
    parts = llm_parts(llm.config)
    embed, head = f"{parts.embed}.weight", f"{parts.head}.weight"
    is_tied = llm.get_parameter(head) is llm.get_parameter(embed)
    missing = []
    for module_name in sorted(own):
        module = llm.get_submodule(module_name)
        if module_name == parts.rotary:  # its tables are computed, not stored
            llm.set_submodule(module_name, type(module)(llm.config))
            continue
        for name, parameter in list(module.named_parameters(module_name)):
            if part_of(f"llm.{name}") == "llm.lora":
                continue
            source = name.replace(".base_layer.", ".")
            source = embed if source == head and is_tied and head not in files.shapes else source
            source = head if source == embed and is_tied and embed not in files.shapes else source
            if source not in files.shapes:
                missing.append(source)
                continue
            tensor = _grow(files.read(source).to(dtype, copy=True), parameter.shape[0], num_real)
            if tensor.shape != parameter.shape:
                missing.append(f"{source} of shape {list(parameter.shape)} (there it is {list(tensor.shape)})")
                continue
            if not parameter.is_meta:  # a stand-in, of the dtype that is wanted
                tensor = tensor.to(parameter.dtype)
            _set_parameter(llm, name, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
    if missing:
        raise CheckpointError(
            f"model.llm.path {files.path}: its weights lack {len(missing)} tensors of {type(llm).__name__}, "
            f"e.g. {min(missing)}. Usually a shard was not downloaded"
        )
    if is_tied and {parts.embed, parts.head} <= set(own):
        _set_parameter(llm, head, llm.get_parameter(embed))


def _grow(tensor: Tensor, rows: int, num_real: int) -> Tensor:
    """[R, ...] -> [rows, ...], as `pad_vocabulary` does; only embedding and head can be shorter than the model."""
    if tensor.shape[0] >= rows:
        return tensor
    grown = tensor.new_empty(rows, *tensor.shape[1:])
    grown[: len(tensor)] = tensor
    grown[len(tensor) :] = tensor[: min(num_real, len(tensor))].float().mean(0).to(tensor.dtype)
    return grown


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, parameter)


def _remove_other_stages(model: Any, own: Collection[str], keep_vision: bool) -> None:
    if not keep_vision:
        model.vision = None
        model.projector = None
    parts = llm_parts(model.llm.config)
    if parts.head not in own:
        model.value_head = None
    blocks = _block_names(model.llm)
    for name in (parts.embed, *blocks, parts.norm, parts.head, parts.rotary):
        if name not in own:
            model.llm.set_submodule(name, Absent())
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left, left


def _shape(shape: tuple[int, ...] | None) -> str:
    return "not in the model" if shape is None else str(list(shape))
