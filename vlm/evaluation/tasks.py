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
from vlm.errors import DataError, RecordError
from vlm.evaluation.config import TaskConfig
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


def read_task(task: TaskConfig, tokenizer: ConversationTokenizer, cache: Path, seed: int = 0) -> list[Question]:
    """Read and tokenize the records of a task.

    Args:
        seed: which answers of a ranking stand against each other.

    Raises:
        DataError: no records, or one that cannot be used (with its place).
    """
    placement = "auto" if task.kind == "loss" else "first"  # several images without a mark stand before the question
    format: Literal["auto", "instruction"] = "auto" if task.kind == "loss" else "instruction"
    source = open_source(SourceConfig(path=task.path, images=task.images, format=format), cache, placement)
    count = min(len(source), task.max_records or len(source))
    if task.kind == "loss":
        conversations = [source.conversation(number) for number in range(count)]
        _warn_of_unread(task, conversations)
        return [_loss_question(conversation, tokenizer) for conversation in conversations]
    records = [_read(source, number, task) for number in range(count)]
    _warn_of_unread(task, [record.asked for record in records])
    if task.kind == "choice":
        return [_among(record, record.choices, tokenizer) for record in records]
    answers = sorted({record.answer for record in records})
    if len(answers) < task.num_candidates:
        raise DataError(
            f"evaluation task {task.name}: {task.path} has {len(answers)} different answers, num_candidates is "
            f"{task.num_candidates}. Lower num_candidates or give it more records"
        )
    groups = _groups(answers, task.num_candidates, seed)
    candidates = {answer: group for group in reversed(groups) for answer in group}  # the last has some of others
    return [_among(record, candidates[record.answer], tokenizer) for record in records]


def _groups(answers: Sequence[str], size: int, seed: int) -> list[tuple[str, ...]]:
    """Groups of `size` answers, drawn: whoever asks for one of a group is offered all of it.

    So an image that is shown for another of its group is asked nothing new. The last is filled up from the others.
    """
    rng = np.random.default_rng(seed)
    drawn = [answers[place] for place in rng.permutation(len(answers))]
    groups = [tuple(drawn[start : start + size]) for start in range(0, len(drawn), size)]
    last = groups.pop()
    fill = rng.choice(len(drawn) - len(last), size - len(last), replace=False)
    return [*groups, (*last, *(drawn[place] for place in fill))]


@dataclass(frozen=True)
class _Record:
    asked: Conversation  # the question, and the answer as training reads it
    answer: str
    choices: tuple[str, ...]


def _read(source: RecordSource, number: int, task: TaskConfig) -> _Record:
    where = source.where(number)
    raw: dict[str, Any] = source.index[number]
    wanted = ("image", "prompt", "answer", *(("choices",) if task.kind == "choice" else ()))
    missing = [key for key in wanted if key not in raw and not (key == "image" and "images" in raw)]
    if missing:
        raise RecordError("bad_task_record", f"no {', '.join(missing)}; a {task.kind} record has {wanted}", where)
    choices = raw.get("choices", [])
    texts = [raw["prompt"], raw["answer"], *(choices if isinstance(choices, list) else [None])]
    if not all(isinstance(text, str) for text in texts):
        raise RecordError("bad_task_record", "prompt, answer and every choice must be text", where)
    if task.kind == "choice" and (choices.count(raw["answer"]) != 1 or len(set(choices)) != len(choices)):
        raise RecordError(
            "bad_task_record", f"answer {raw['answer']!r} must stand once among the choices {choices}", where
        )
    asked = source.read(number, {key: value for key, value in raw.items() if key != "choices"})
    return _Record(asked, raw["answer"], tuple(choices))


def _warn_of_unread(task: TaskConfig, conversations: Sequence[Conversation]) -> None:
    log = UnreadLog()
    for conversation in conversations:
        log.add(task.name, conversation.where, conversation.unread)
    for line in log.warnings({task.name: len(conversations)}):
        warn(line)


def _among(record: _Record, candidates: Sequence[str], tokenizer: ConversationTokenizer) -> Question:
    return _question(record, candidates, candidates.index(record.answer), tokenizer)


def _question(record: _Record, candidates: Sequence[str], answer: int, tokenizer: ConversationTokenizer) -> Question:
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


def _loss_question(conversation: Conversation, tokenizer: ConversationTokenizer) -> Question:
    prompt, reply, labels = _encode(conversation, tokenizer)
    return Question(prompt, [reply], [labels], 0, "", conversation.images, conversation.where)


def _encode(conversation: Conversation, tokenizer: ConversationTokenizer) -> tuple[list[int], list[int], list[int]]:
    """Ids before the first supervised one; from there to the last supervised one; and the labels of these."""
    example = tokenizer(conversation)
    counted = [place for place, label in enumerate(example.labels) if label != IGNORE_INDEX]
    if not counted:
        raise RecordError("no_supervised_tokens", "no reply to score", conversation.where)
    first, end = counted[0], counted[-1] + 1
    return example.input_ids[:first], example.input_ids[first:end], example.labels[first:end]
