"""`vlm prepare-base-model`: a base model with a chat template and its control tokens, ready for dialogues."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm.artifacts.folder import replace_folder
from vlm.artifacts.older import finish_folder
from vlm.artifacts.shards import check_shard_size
from vlm.data.template import EOS, TEMPLATES, ChatTemplate, adds_bos, control_words
from vlm.errors import ConfigError
from vlm.models.config import LLMConfig
from vlm.models.folder import config_json, misfit
from vlm.models.llm import IMAGE_TOKEN, dtype_on_disk, load_llm, load_tokenizer, pad_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_OF_PREPARATION = ("vocab_size", "dtype", "torch_dtype", "transformers_version", "architectures", "rope_parameters")


@dataclass(frozen=True)
class _Prepared:
    tokenizer: PreTrainedTokenizerFast
    num_old: int
    """Ids below it are of the base model's own tokens."""
    new_ids: tuple[int, ...]


def prepare_base_model(
    folder: Path, out: Path, template: str = "chatml", multiple: int = 128, max_shard_size: str = "5GB"
) -> str:
    """Write a base model to which the template's control tokens and the image token were added.

    Args:
        folder: a model that `model.llm.path` takes.
        out: appears complete or not at all. The same call again changes nothing.
        template: whose control words become tokens; it is written as the tokenizer's own chat template.
        multiple: the embedding has a multiple of so many rows.

    Returns:
        what was done.

    Raises:
        ConfigError: the template is not known, or `out` holds another model.
        CheckpointError: see `load_llm` and `load_tokenizer`.
    """
    check_shard_size(max_shard_size)
    if template not in TEMPLATES or TEMPLATES[template].only_images_of_user:
        known = ", ".join(name for name, each in TEMPLATES.items() if not each.only_images_of_user)
        raise ConfigError(f"--template {template}: expected a chat template: {known}")
    if (problem := misfit(folder, is_encoder=False)) is not None:
        raise ConfigError(problem)
    chosen = TEMPLATES[template]
    if out.exists() and _is_prepared(out, folder, chosen, multiple):
        return f"{out} is prepared already: {template}, {config_json(out)['vocab_size']:,} rows"
    prepared = _add_tokens(folder, chosen)
    llm: Any = load_llm(LLMConfig(path=str(folder)), dtype_on_disk(str(folder)))
    before = llm.get_input_embeddings().weight.shape[0]
    pad_vocabulary(llm, prepared.num_old, multiple, at_least=max(prepared.tokenizer.get_vocab().values()) + 1)
    _fill_new_rows(llm, prepared, before)
    with replace_folder(out) as written:
        prepared.tokenizer.save_pretrained(written)
        llm.generation_config.eos_token_id = _ends(prepared.tokenizer, chosen)
        llm.save_pretrained(written, max_shard_size=max_shard_size)
        finish_folder(written)
    rows = llm.get_input_embeddings().weight.shape[0]
    words = prepared.tokenizer.convert_ids_to_tokens(list(prepared.new_ids))
    added = (
        f"added {', '.join(words)} ({prepared.new_ids[0]} to {prepared.new_ids[-1]})" if words else "no token is new"
    )
    return f"{out}: {added}; {before:,} -> {rows:,} rows; chat template {template}"


def _add_tokens(folder: Path, template: ChatTemplate) -> _Prepared:
    from transformers import AddedToken

    tokenizer = load_tokenizer(str(folder), image_token=False)
    vocabulary = tokenizer.get_vocab()
    num_old = max(vocabulary.values()) + 1
    words = [*control_words(template), IMAGE_TOKEN]
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    new_ids = [tokenizer.get_vocab()[word] for word in words if word not in vocabulary]
    tokenizer.chat_template = template.jinja(tokenizer.bos_token, tokenizer.eos_token, adds_bos(tokenizer))
    return _Prepared(tokenizer, num_old, tuple(new_ids))


@torch.no_grad()
def _fill_new_rows(llm: Any, prepared: _Prepared, num_rows: int) -> None:
    """Those of new tokens that the embedding had as padding; rows after the first `num_rows` are new, and filled."""
    here = [number for number in prepared.new_ids if number < num_rows]
    for module in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        for rows in (module.weight, getattr(module, "bias", None)):
            if rows is not None and here:
                rows[here] = rows[: prepared.num_old].float().mean(0).to(rows.dtype)


def _ends(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> list[int]:
    """Ids that end an answer: of a document, and of the template's replies."""
    ends = {tokenizer.eos_token_id}
    if EOS not in template.stop:
        ends |= set(tokenizer.encode(template.stop.strip(), add_special_tokens=False))
    return sorted(number for number in ends if number is not None)


def _is_prepared(out: Path, folder: Path, template: ChatTemplate, multiple: int) -> bool:
    """Whether `out` is what this call would write of the model in `folder`."""
    if misfit(out, is_encoder=False) is not None:
        return False
    ours, theirs = config_json(out), config_json(folder)
    if any(ours[key] != theirs[key] for key in ours.keys() & theirs.keys() - set(_OF_PREPARATION)):
        return False
    tokenizer = load_tokenizer(str(out), image_token=False)
    words = {*control_words(template), IMAGE_TOKEN}
    written = template.jinja(tokenizer.bos_token, tokenizer.eos_token, adds_bos(tokenizer))
    is_whole = words <= tokenizer.get_vocab().keys() and tokenizer.chat_template == written
    return is_whole and ours["vocab_size"] % multiple == 0
