"""The tokenizer of an export: whoever renders its chat template and tokenizes the text gets the ids of the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from vlm.data.template import EOS
from vlm.data.tokenize import ConversationTokenizer, adds_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ADDS_TOKENS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
_CLASS = "PreTrainedTokenizerFast"  # known to every transformers; from 5 on it writes "TokenizersBackend"


def hand_over(tokenizer: PreTrainedTokenizerFast, tokens: ConversationTokenizer) -> None:
    """Give a tokenizer the chat template of the training, and leave begin and end tokens to that template.

    Many tokenizers put a begin token before whatever they are given, and the template writes one too: callers that
    render first and tokenize then, as most do, would get two. And a base model's end token is often not the token that
    ends a reply in the template, so the tokenizer is told that one.

    Args:
        tokenizer: changed in place.
        tokens: made with it before.
    """
    template = tokens.template
    tokenizer.chat_template = template.jinja(tokenizer.bos_token, tokenizer.eos_token, adds_bos(tokenizer))
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["post_processor"] = _without_tokens(backend["post_processor"])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend, ensure_ascii=False))
    others = sorted(tokens.stop_ids - {tokenizer.eos_token_id})
    if EOS not in template.stop and len(others) == 1:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(others[0])


def make_readable(folder: Path) -> None:
    """Write tokenizer_config.json in words that transformers 4 knows too. A folder without one is left alone."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for key in ("add_bos_token", "add_eos_token", "backend", "is_local"):
        values.pop(key, None)
    values["tokenizer_class"] = _CLASS
    if isinstance(values.get("extra_special_tokens"), list):  # a dict there, until transformers 5
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_tokens(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A post-processor of tokenizers without those of its steps that add tokens."""
    if step is None or step["type"] in _ADDS_TOKENS:
        return None
    if step["type"] == "Sequence":
        kept = [inner for inner in map(_without_tokens, step["processors"]) if inner is not None]
        return {**step, "processors": kept} if kept else None
    return step
