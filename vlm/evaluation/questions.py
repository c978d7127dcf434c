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
from vlm.data.parse import ANSWER_KEYS, CHAT_KEYS
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
class OpenQuestion:
    """One record whose answer the model writes."""

    prompt_ids: list[int]  # up to where the reply begins
    answers: tuple[str, ...]  # what would be right; none where the record has no answer
    images: tuple[str | bytes, ...]
    where: str
    number: int  # of the record, counted from 0
    text: str  # the last thing that the user says, for people
    id: str | int | None = None  # the record's own, if it has one


@dataclass(frozen=True)
class WritingSettings:
    """How answers are written. The default takes the likeliest token each time.

    Attributes:
        stop: texts that end an answer; they are not part of it.
        seed: of sampling; each record draws by itself, so how many are written together does not matter.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


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


def read_open(records: Records, task: str, tokenizer: ConversationTokenizer) -> list[OpenQuestion]:
    """Records as training reads them, whose last reply is the answer; or a question with `answers`, a list of texts or
    of VQA's {"answer": text}; or a question alone.

    Args:
        task: its name, for warnings.

    Raises:
        RecordError: one cannot be read.
    """
    found, conversations = [], []
    for number in range(records.count):
        where = records.source.where(number)
        raw: dict[str, Any] = records.source.index[number]
        answers = _answers(raw.get("answers"), where)
        record = {key: value for key, value in raw.items() if key not in ("answers", "choices")}
        has_reply = any(record.get(key) is not None for key in (*ANSWER_KEYS, *CHAT_KEYS, "caption", "text"))
        conversation = records.source.read(number, record if has_reply else {**record, "answer": "-"})
        *turns, last = conversation.turns
        if last.role != "assistant":
            raise RecordError("bad_task_record", "the last turn is not a reply, which is what the answer is", where)
        prompt_ids = tokenizer.prompt(replace(conversation, turns=tuple(turns)))
        if not prompt_ids:
            raise RecordError("bad_task_record", f"template {tokenizer.template.name} leaves the question out", where)
        answers = answers or ((last.text,) if has_reply else ())
        asked, own_id = turns[-1].text.strip() if turns else "", raw.get("id", raw.get("question_id"))
        conversations.append(conversation)
        found.append(OpenQuestion(prompt_ids, answers, conversation.images, where, number, asked, own_id))
    _warn_of_unread(task, conversations)
    return found


def _answers(value: Any, where: str) -> tuple[str, ...]:
    entries = [] if value is None else value if isinstance(value, list) else [None]
    texts = [entry.get("answer") if isinstance(entry, dict) else entry for entry in entries]
    if not all(isinstance(text, str) for text in texts):
        raise RecordError("bad_task_record", f"answers is {str(value)[:80]!r}; expected a list of texts", where)
    return tuple(map(str, texts))


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
