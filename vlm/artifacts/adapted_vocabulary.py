"""What an adapter of peft says of the vocabulary: its tokenizer, new tokens, and a head that no longer shares the
embedding's weight. The same for files (`vlm merge`) and for a loaded model (`--adapter`).

Letters: D width of the language model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.artifacts.manifest import NAME
from vlm.artifacts.peft_adapter import PeftAdapter, match_names
from vlm.errors import CheckpointError
from vlm.logs import warn
from vlm.models.llm import IMAGE_TOKEN, load_tokenizer
from vlm.models.tokenizer_files import VOCABULARY, read_json
from vlm.models.weight_files import LazyTensors


def modules_of(names: Iterable[str]) -> list[str]:
    """Names of the modules that have a weight."""
    return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]


def is_in_export(adapter: PeftAdapter) -> bool:
    """Whether it is the folder `adapter` of an export."""
    return (adapter.folder.parent / NAME).is_file() and adapter.folder.name == "adapter"


def tokenizer_place(adapter: PeftAdapter, base: Path) -> Path | None:
    """The folder whose tokenizer takes the place of the base model's; None where that stays.

    An adapter that brings a tokenizer was trained with it. One without the image token of a base model that reads
    images was trained on its language model alone, and the base model's stays.
    """
    places = [adapter.folder.parent, adapter.folder] if is_in_export(adapter) else [adapter.folder]
    files = ("tokenizer.json", VOCABULARY, "vocab.json")
    found = next((place for place in reversed(places) if any((place / name).is_file() for name in files)), None)
    if found is None or "vision_config" not in read_json(base / "config.json"):
        return found
    ours, theirs = (
        load_tokenizer(str(each), image_token=False).get_vocab().get(IMAGE_TOKEN, -1) for each in (base, found)
    )
    return found if ours == theirs != -1 else None


def split_head(
    model: Any, base: LazyTensors, adapters: Sequence[PeftAdapter]
) -> tuple[list[PeftAdapter], dict[str, Tensor]]:
    """A head that shares the embedding's weight has no tensor of its own.

    Args:
        model: the language model's class; None for one that only code of its own folder has.
        base: its tensors [...], by names that end as the modules' do.

    Returns:
        the adapters without what they say of it; and name -> weight [V, D] of a head of its own, if it needs one.

    Raises:
        CheckpointError: an adapter's layer is added to such a head.
    """
    tied = _tied_names(model, base)
    if tied is None:
        return list(adapters), {}
    embedding, head = tied
    is_adapted = any(match_names(adapter.layers, [embedding]) for adapter in adapters)
    kept, found, before, embedded = [], None, base[f"{embedding}.weight"], None
    parted = False  # while it trained, the head read other weights than the embedding gave
    for adapter in adapters:
        if match_names(adapter.layers, [head]):
            raise CheckpointError(
                f"{adapter.folder} adapts {head}, whose weight is the embedding's in this base model: the sum would "
                "change both. Train it with another target, or a base model with a head of its own"
            )
        of_head, of_embedding = _weights_of(head, adapter), _weights_of(embedding, adapter)
        found = next((adapter.replaced[name] for name in of_head), found)
        embedded = next((adapter.replaced[name] for name in of_embedding), embedded)
        if not adapter.settings.get("ensure_weight_tying"):
            before = embedded if is_adapted and embedded is not None else before
            parted |= is_adapted or (embedded is not None and embedded.shape == before.shape)
        rest = {name: tensor for name, tensor in adapter.replaced.items() if name not in of_head}
        kept.append(replace(adapter, replaced=rest))
    found = before if found is None and parted else found
    if found is None or (embedded is not None and found.equal(embedded) and not is_adapted):
        return kept, {}
    warn(f"{head} had the embedding's weight and has one of its own now: only one of the two was trained")
    return kept, {f"{head}.weight": found}


def _weights_of(module: str, adapter: PeftAdapter) -> list[str]:
    """Names of the adapter's whole tensors [...] that are the weight of a module."""
    return [f"{name}.weight" for name in match_names(modules_of(adapter.replaced), [module])]


def grown_rows(model: Any, base: LazyTensors, tensors: LazyTensors) -> int | None:
    """Rows V of an embedding that an adapter's new tokens made longer; None where every shape [...] stays.

    Raises:
        CheckpointError: another tensor has another shape too, or embedding and head differ.
    """
    grown = {name: shape for name, shape in tensors.shapes.items() if base.shapes.get(name, shape) != shape}
    if not grown:
        return None
    rows = {shape[0] for shape in grown.values()}
    names = {id(module): name for name, module in model.named_modules()} if model is not None else {}
    ends = [] if model is None else [model.get_input_embeddings(), model.get_output_embeddings()]
    known = match_names([names[id(end)] for end in ends if end is not None], modules_of(base)).values()
    others = [name for name in grown if name.removesuffix(".weight") not in known]
    still = [name for name in known if tensors.shapes[f"{name}.weight"][0] not in rows]
    if others or still or len(rows) > 1:
        raise CheckpointError(
            f"the adapter's tensors have other shapes than the base model's: {', '.join([*grown, *still][:5])}. "
            "Only an embedding and a head that grew together are taken. Usually it is of another base model"
        )
    return rows.pop()


def _tied_names(model: Any, base: LazyTensors) -> tuple[str, str] | None:
    """Embedding, as `base` [...] names it, and head, as the class does, where `base` holds one weight for both."""
    head = None if model is None else model.get_output_embeddings()
    if head is None or not model.config.get_text_config(decoder=True).tie_word_embeddings:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    first, last = names[id(model.get_input_embeddings())], names[id(head)]
    embedding = match_names([first], modules_of(base)).get(first)
    return None if embedding is None or match_names([last], modules_of(base)) else (embedding, last)
