"""Records of an evaluation task -> what is scored: prompts, candidate replies, and which is true.

An evaluation must be complete to be compared with another, so a bad record is an error here, never skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm.batch import IGNORE_INDEX
from vlm.data.config import SourceConfig
from vlm.data.conversation import Conversation, Turn
from vlm.data.notes import UnreadLog
from vlm.data.records import RecordSource, open_source
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import RecordError
from vlm.logs import warn


@dataclass(frozen=True)
class Question:
    """One record of a task, as token ids. With several replies, image placeholders stand in `prompt_ids` only."""

    prompt_ids: list[int]
    replies: list[list[int]]  # per candidate, end-of-reply token included
    reply_labels: list[list[int]]  # as long as `replies`; IGNORE_INDEX at tokens that do not count
    answer: int  # which candidate is true
    answer_text: str
    images: tuple[str | bytes, ...]
    where: str


@dataclass(frozen=True)
class Records:
    """A task's data file, opened, and how many of its records are taken."""

    source: RecordSource
    count: int


@dataclass(frozen=True)
class Record:
    """A record with a true answer."""

    asked: Conversation  # the question, and the answer as training reads it
    answer: str
    choices: tuple[str, ...]


def open_records(
    path: str, images: str | None, max_records: int | None, cache: Path, as_training: bool = False
) -> Records:
    """
    Args:
        as_training: any records that training reads, and images where it puts them; else records with a prompt and an
            answer, and several images without a mark stand before the question.

    Raises:
        DataError: the file is missing, unreadable or empty.
    """
    format: Literal["auto", "instruction"] = "auto" if as_training else "instruction"
    placement = "auto" if as_training else "first"
    source = open_source(SourceConfig(path=path, images=images, format=format), cache, placement)
    return Records(source, min(len(source), max_records or len(source)))


def read_conversations(records: Records, task: str) -> list[Conversation]:
    """
    Args:
        task: its name, for warnings.
    """
    conversations = [records.source.conversation(number) for number in range(records.count)]
    _warn_of_unread(task, conversations)
    return conversations


def read_answers(records: Records, task: str, kind: str) -> list[Record]:
    """Records with image, prompt and answer. `task` and `kind` are for messages.

    Raises:
        RecordError: one lacks a key, or it is not text.
    """
    return _read_all(records, task, kind, ())


def read_choices(records: Records, task: str, kind: str) -> list[Record]:
    """Those that have choices too. Raises RecordError also where the answer does not stand once among them."""
    return _read_all(records, task, kind, ("choices",))


def _read_all(records: Records, task: str, kind: str, more: tuple[str, ...]) -> list[Record]:
    wanted = ("image", "prompt", "answer", *more)
    found = [_read(records.source, number, kind, wanted) for number in range(records.count)]
    _warn_of_unread(task, [record.asked for record in found])
    return found


def draw_groups(answers: Sequence[str], size: int, seed: int) -> list[tuple[str, ...]]:
    """Groups of `size` answers, drawn: whoever asks for one of a group is offered all of it.

    So an image that is shown for another of its group is asked nothing new. The last is filled up from the others.
    """
    rng = np.random.default_rng(seed)
    drawn = [answers[place] for place in rng.permutation(len(answers))]
    groups = [tuple(drawn[start : start + size]) for start in range(0, len(drawn), size)]
    last = groups.pop()
    fill = rng.choice(len(drawn) - len(last), size - len(last), replace=False)
    return [*groups, (*last, *(drawn[place] for place in fill))]


def _read(source: RecordSource, number: int, kind: str, wanted: tuple[str, ...]) -> Record:
    where = source.where(number)
    raw: dict[str, Any] = source.index[number]
    missing = [key for key in wanted if key not in raw and not (key == "image" and "images" in raw)]
    if missing:
        raise RecordError("bad_task_record", f"no {', '.join(missing)}; a {kind} record has {wanted}", where)
    choices = raw.get("choices", [])
    texts = [raw["prompt"], raw["answer"], *(choices if isinstance(choices, list) else [None])]
    if not all(isinstance(text, str) for text in texts):
        raise RecordError("bad_task_record", "prompt, answer and every choice must be text", where)
    if "choices" in wanted and (choices.count(raw["answer"]) != 1 or len(set(choices)) != len(choices)):
        raise RecordError(
            "bad_task_record", f"answer {raw['answer']!r} must stand once among the choices {choices}", where
        )
    asked = source.read(number, {key: value for key, value in raw.items() if key != "choices"})
    return Record(asked, raw["answer"], tuple(choices))


def _warn_of_unread(task: str, conversations: Sequence[Conversation]) -> None:
    log = UnreadLog()
    for conversation in conversations:
        log.add(task, conversation.where, conversation.unread)
    for line in log.warnings({task: len(conversations)}):
        warn(line)


def among(record: Record, candidates: Sequence[str], tokenizer: ConversationTokenizer) -> Question:
    return _question(record, candidates, candidates.index(record.answer), tokenizer)


def _question(record: Record, candidates: Sequence[str], answer: int, tokenizer: ConversationTokenizer) -> Question:
    *before, _ = record.asked.turns
    encoded = []
    for candidate in candidates:
        turns = (*before, Turn("assistant", (candidate,)))
        encoded.append(_encode(replace(record.asked, turns=turns), tokenizer))
    prompt = encoded[0][0]
    if any(ids != prompt for ids, _, _ in encoded):  # a reply cannot change it: pieces are encoded one by one
        raise RecordError(
            "bad_task_record",
            f"nothing stands before the reply: template {tokenizer.template.name} leaves the question out, and the "
            "record has no image",
            record.asked.where,
        )
    replies, labels = [ids for _, ids, _ in encoded], [ids for _, _, ids in encoded]
    return Question(prompt, replies, labels, answer, record.answer, record.asked.images, record.asked.where)


def loss_question(conversation: Conversation, tokenizer: ConversationTokenizer) -> Question:
    prompt, reply, labels = _encode(conversation, tokenizer)
    return Question(prompt, [reply], [labels], 0, "", conversation.images, conversation.where)


def num_counted(question: Question) -> int:
    """Supervised tokens of its first reply."""
    return sum(label != IGNORE_INDEX for label in question.reply_labels[0])


def _encode(conversation: Conversation, tokenizer: ConversationTokenizer) -> tuple[list[int], list[int], list[int]]:
    """Ids before the first supervised one; from there to the last supervised one; and the labels of these."""
    example = tokenizer(conversation)
    counted = [place for place, label in enumerate(example.labels) if label != IGNORE_INDEX]
    if not counted:
        raise RecordError("no_supervised_tokens", "no reply to score", conversation.where)
    first, end = counted[0], counted[-1] + 1
    return example.input_ids[:first], example.input_ids[first:end], example.labels[first:end]
