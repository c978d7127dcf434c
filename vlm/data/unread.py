"""What of a record was not read: refused where it changes what is learned, else named, to be counted and warned of."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache
from typing import Any

from vlm.data.fields import Fields, Unread, has_content, leaves, short
from vlm.data.media import find_medium
from vlm.errors import RecordError

PREFERENCE_KEYS = (
    "chosen", "rejected", "chosen_response", "rejected_response", "rejected_responses", "rejected_messages",
    "rejected_images", "chosen_images", "preferred_output", "non_preferred_output", "preferred", "dispreferred",
)  # fmt: skip
LABEL_KEYS = ("label", "kto_tag", "desirable")  # of KTO: is the reply a good one?
WEIGHT_KEYS = ("loss", "weight", "train", "trainable", "train_on_turn", "output_with_loss", "loss_weight")
REPLY_KEYS = ("tool_calls", "function_call", "refusal")  # of a turn: what it says beside its text
_BOOKKEEPING = re.compile(  # keys that name, date or place a record; with short values they are not worth a word
    r"__comment__|comment|.*_?(?:id|ids|idx|index|uid|uuid|guid|key|hash|md5|sha\d*|url|urls|link|name|path|size|width"
    r"|height|count|length|score|version|date|time|timestamp|created|updated|type|source|src|language|lang|license"
    r"|licence|split|subset|author)|source_?\w*|dataset_?\w*|data_?set|origin|task\w*|category|categories|topic|domain|tags?"
    r"|difficulty|level|quality|model|generator|engine|temperature|title|meta|metadata|info|extra|num_\w+|n_\w+|is_\w+"
    r"|has_\w+|similarity",
    re.IGNORECASE,
)
_SENTENCE_KEYS = re.compile(r"task\w*|title|comment|info|extra", re.IGNORECASE)  # may hold what matters
_SHORT = 300  # letters
_MOST_WORDS = 5
CALLS_AS_TURNS = "Write calls as turns of their own, of role function_call"
TO_BE_COMPARED = "a record of replies to be compared, for objective dpo, orpo, simpo or reward"
_OBJECT_MARKS = re.compile(r"<ref-object>|<bbox>")  # ms-swift: filled in from `objects`


def refuse_settings(fields: Fields) -> None:
    """Read what a record says of itself as a whole.

    Raises:
        RecordError: rules preference_pair (chosen and rejected replies), not_to_learn (label: false, loss: false,
            weight: 0: the record is a bad example, or one to be left out).
    """
    if given := fields.given(PREFERENCE_KEYS):
        raise RecordError("preference_pair", f"{given[0]}: {TO_BE_COMPARED}")
    for key in LABEL_KEYS:
        if _is_false(fields.values.get(key)):
            raise RecordError("not_to_learn", f"{key}: false marks a bad example, for objective kto")
        if fields.values.get(key) is True:
            fields.take(key)
    if not is_learned(fields, "the record", refuse_others=False):
        raise RecordError("not_to_learn", "loss, weight or train says that the record is not to be learned")


def is_learned(fields: Fields, where: str, refuse_others: bool = True) -> bool:
    """What `loss`, `weight` or `train` of a turn or record say: true, false, 1 or 0.

    Args:
        refuse_others: a value between is an error; else it stays unread.

    Raises:
        RecordError: rule not_to_learn.
    """
    learned = True
    for key in fields.given(WEIGHT_KEYS):
        value = _as_flag(fields.values[key])
        if value is not None:
            fields.take(key)
            learned = learned and value
        elif refuse_others:
            raise RecordError(
                "not_to_learn", f"{where}: {key} is {short(fields.values[key])}; read are 0, 1, true, false"
            )
    return learned


def judge(fields: Fields, images: Collection[str], texts: Collection[str]) -> tuple[str, ...]:
    """Names of the keys with content that nothing read, bookkeeping left out.

    Args:
        images: names of the images that are read.
        texts: what is learned from or read.

    Raises:
        RecordError: rules unread_medium, unread_reply, foreign_mark, where leaving a key out changes what is learned.
    """
    names: list[str] = []
    for unread in fields.unread():
        if medium := find_medium(unread.key, unread.value, images):
            raise RecordError(
                "unread_medium",
                f"{unread.name} holds {medium}, which is not read. Images stand under image or images; another name is "
                f"given with data.sources[].columns: {{image: {unread.key[:40]}}}",
            )
        _refuse_spelling(unread)
        if unread.key in REPLY_KEYS and unread.name != unread.key:
            raise RecordError(
                "unread_reply",
                f"{unread.name} belongs to what is said and is not read. {CALLS_AS_TURNS}",
            )
        if unread.key == "objects" and any(_OBJECT_MARKS.search(text) for text in texts):
            raise RecordError("foreign_mark", "<ref-object> or <bbox> stands for a value of objects, which is not read")
        if not _is_bookkeeping(unread):
            names.append(unread.name[:60])
    return tuple(dict.fromkeys(names))


def _refuse_spelling(unread: Unread) -> None:
    """Settings in another spelling or place than they are read in."""
    key = unread.key.lower()
    if key in PREFERENCE_KEYS:
        raise RecordError("preference_pair", f"{unread.name}: {TO_BE_COMPARED}")
    if (key in LABEL_KEYS and _is_false(unread.value)) or (key in WEIGHT_KEYS and _as_flag(unread.value) is False):
        raise RecordError("not_to_learn", f"{unread.name} is {short(unread.value)}, in a place where it is not read")


def _is_false(value: Any) -> bool:
    """False, not 0: numbers under `label` are classes."""
    return value is False or (isinstance(value, str) and value.strip().lower() == "false")


def _as_flag(value: Any) -> bool | None:
    if isinstance(value, str):
        value = {"true": True, "false": False, "0": False, "1": True, "0.0": False, "1.0": True}.get(
            value.strip().lower()
        )
    return bool(value) if isinstance(value, bool) or value in (0, 1) else None


@lru_cache(maxsize=4096)
def _most_words(key: str) -> int | None:
    """That a value under a key of bookkeeping may have; None under another key."""
    if not _BOOKKEEPING.fullmatch(key):
        return None
    return 1 if _SENTENCE_KEYS.fullmatch(key) else _MOST_WORDS


def _is_bookkeeping(unread: Unread) -> bool:
    """Names, counts and dates: short, and not a sentence that may belong to what is learned."""
    most = _most_words(unread.key)
    if most is None:
        return False
    given = [leaf for leaf in leaves(unread.value) if has_content(leaf)]
    is_said = any(isinstance(leaf, str) and len(leaf.split()) > most for leaf in given)
    return not is_said and sum(len(leaf) if isinstance(leaf, str) else 8 for leaf in given) <= _SHORT
