"""Which chat template a language model's tokenizer asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm.data.template import EOS, TEMPLATES, control_words, match_tokenizer_template
from vlm.errors import ConfigError
from vlm.models.known import KNOWN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WITHOUT_TOKENS = "vicuna"  # written in words that every tokenizer has, and ended by its own end token


@dataclass(frozen=True)
class ChosenTemplate:
    """`data.template` of conversations, and why.

    Attributes:
        limit: what is not as it should be; "" where all is.
        is_base: the model has no chat template and no control tokens of one.
    """

    name: str
    why: str
    limit: str = ""
    is_base: bool = False


def choose_template(
    tokenizer: PreTrainedTokenizerFast, model_type: str, asked: str | None = None
) -> ChosenTemplate | None:
    """The tokenizer's own template, if one of ours writes the same; else one whose control words are its tokens.

    Args:
        model_type: of config.json; its family's templates are tried before others.
        asked: a name to take unseen.

    Returns:
        None where the tokenizer has neither control tokens nor an end token: no template has an end to learn.
    """
    if asked is not None:
        return ChosenTemplate(asked, "as --template says")
    limit = ""
    if tokenizer.chat_template:
        try:
            found = match_tokenizer_template(tokenizer).name
            return ChosenTemplate("tokenizer", f"the tokenizer's own, which is {found} here")
        except ConfigError as error:
            limit = f"the tokenizer's own chat template is not known here. {error}"
    name = _by_tokens(tokenizer, model_type)
    if name is not None:
        return ChosenTemplate(name, f"{', '.join(control_words(TEMPLATES[name]))} are tokens of the tokenizer", limit)
    if tokenizer.eos_token is None:
        return None
    why = f"no template's control words are tokens of the tokenizer, and {WITHOUT_TOKENS} needs none"
    return ChosenTemplate(WITHOUT_TOKENS, why, limit, is_base=not tokenizer.chat_template)


def _by_tokens(tokenizer: PreTrainedTokenizerFast, model_type: str) -> str | None:
    vocabulary = tokenizer.get_vocab()
    of_family = [name for known in KNOWN if model_type in (known.model_type, known.becomes) for name in known.templates]
    for name in dict.fromkeys((*of_family, *TEMPLATES)):
        words = control_words(TEMPLATES[name])
        ends = EOS not in TEMPLATES[name].stop or tokenizer.eos_token is not None
        if words and ends and all(word in vocabulary for word in words):
            return name
    return None
