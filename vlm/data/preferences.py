"""Records of replies that were compared or judged -> Preference or Judged; of answers to verify -> Verifiable.

A preference record becomes two records of conversations, one with each reply, which `vlm.data.parse` reads as it reads
any other. Read are: `chosen` and `rejected` beside a question (`prompt`, `instruction` and the other names) or beside
turns (`conversations`, `messages`, TRL's `prompt` as turns); as whole conversations; `output: [good, bad]`; and
`messages` with the preferred reply and `rejected_response`. A judged record is a conversation with `label`, `kto_tag`
or `desirable`, true or false. A record to verify is a question, or turns that end with one, and `answer`, `solution`,
`ground_truth`, or verl's `reward_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

from vlm.data.config import TURN_NAMES, SourceConfig
from vlm.data.conversation import Conversation, Judged, Preference, Turn, Verifiable
from vlm.data.fields import has_content, renamed, short
from vlm.data.notes import ABSENT_COLUMN
from vlm.data.parse import ANSWER_KEYS, CHAT_KEYS, QUESTION_KEYS, known_role, parse_record
from vlm.data.unread import LABEL_KEYS, PREFERENCE_KEYS, TO_BE_COMPARED
from vlm.errors import RecordError

Reads = Literal["conversation", "preference", "judged", "verifiable"]
CHOSEN_KEYS = ("chosen", "chosen_response")
REJECTED_KEYS = ("rejected", "rejected_response")
VERIFIED_KEYS = ("answer", "ground_truth", "solution", "reward_model")  # the first counts; others say it at length
_PROBLEM = "problem"  # what mathematics data sets call the question
Record = dict[str, Any]


def parse_preference(record: Record, config: SourceConfig, image_placement: str = "auto") -> Preference:
    """A record of two replies of which one is preferred. Images are still as the record names them.

    Raises:
        RecordError: rules no_preference (no two replies: a record of another objective), same_replies,
            different_prompts (what precedes the replies differs), and those of `parse_record`.
    """
    ours, plain, absent = _with_our_keys(record, config)
    good, bad = _split(ours, config)
    chosen, rejected = (parse_record(part, plain, image_placement) for part in (good, bad))
    first = next(
        (number for number, (one, other) in enumerate(zip(chosen.turns, rejected.turns, strict=False)) if one != other),
        None,
    )
    if first is None:
        raise RecordError("same_replies", "the chosen and the rejected reply are the same, or one begins the other")
    if chosen.images != rejected.images:
        _refuse_images(len(chosen.images), len(rejected.images))
    if any(turns[first].role != "assistant" for turns in _both(chosen, rejected)):
        raise RecordError(
            "different_prompts",
            f"chosen and rejected differ in turn {first + 1}, before any reply differs: they must answer one question",
        )
    unread = (*dict.fromkeys((*chosen.unread, *rejected.unread)), *absent)
    turns, others = (_learned_from(each, first) for each in _both(chosen, rejected))
    return Preference(turns, chosen.images, unread=unread, rejected=others)


def parse_judged(record: Record, config: SourceConfig, image_placement: str = "auto") -> Judged:
    """A conversation whose last reply is good or bad. Images are still as the record names them.

    Raises:
        RecordError: rules no_label (none, or not true or false: a record of another objective), preference_pair, and
            those of `parse_record`.
    """
    ours, plain, absent = _with_our_keys(record, config)
    given = [key for key in LABEL_KEYS if has_content(ours.get(key))]
    labels = {_flag(ours[key]) for key in given}
    if not given:
        _refuse_pair(ours)
    if len(labels) > 1 and None not in labels:
        raise RecordError("no_label", f"{' and '.join(given)} contradict each other; keep one of them")
    if len(labels) != 1 or None in labels:
        found = f"{given[0]} is {short(ours[given[0]])}" if given else f"none of {', '.join(LABEL_KEYS)}"
        raise RecordError("no_label", f"{found}; objective kto reads records with label: true or label: false")
    parsed = parse_record({key: ours[key] for key in ours if key not in given}, plain, image_placement)
    replies = [number for number, turn in enumerate(parsed.turns) if turn.role == "assistant"]
    turns = _learned_from(parsed.turns, replies[-1] if replies else 0)
    return Judged(turns, parsed.images, unread=(*parsed.unread, *absent), is_good=bool(labels.pop()))


def parse_verifiable(record: Record, config: SourceConfig, image_placement: str = "auto") -> Verifiable:
    """A question with the answer that replies to it are compared with. Images are still as the record names them.

    A reply that the turns end with is left out.

    Raises:
        RecordError: rules no_answer (no key of an answer, or not a text or number: a record of another objective), and
            those of `parse_record`.
    """
    ours, plain, absent = _with_our_keys(record, config)
    given = [key for key in VERIFIED_KEYS if has_content(ours.get(key))]
    answer = _answer(ours[given[0]]) if given else None
    if answer is None:
        if not given:
            _refuse_pair(ours)
        raise RecordError(
            "no_answer",
            f"{_about_answer(ours, given)}; objectives grpo and ppo read a question and an answer to verify, a text or "
            f"a number under {', '.join(VERIFIED_KEYS[:-1])}. Conversations are for objective lm",
        )
    rest = {key: value for key, value in ours.items() if key not in given}
    if has_content(rest.get(_PROBLEM)) and not any(has_content(rest.get(key)) for key in (*QUESTION_KEYS, *CHAT_KEYS)):
        rest["prompt"] = rest.pop(_PROBLEM)
    chat = next((key for key in CHAT_KEYS if has_content(rest.get(key))), None)
    turns_in = chat or "prompt"
    if isinstance(rest.get(turns_in), list) and rest[turns_in] and _is_reply(rest[turns_in][-1], config):
        rest[turns_in] = rest[turns_in][:-1]
    parsed = parse_record(_with_reply(rest, chat, answer, given[0], config), plain, image_placement)
    turns = _learned_from(parsed.turns, len(parsed.turns) - 1)
    return Verifiable(turns, parsed.images, unread=(*parsed.unread, *absent), answer=answer)


READERS: dict[Reads, Callable[[Record, SourceConfig, str], Conversation]] = {
    "conversation": parse_record,
    "preference": parse_preference,
    "judged": parse_judged,
    "verifiable": parse_verifiable,
}


def _with_our_keys(record: Record, config: SourceConfig) -> tuple[Record, SourceConfig, list[str]]:
    """The record by the names of `data.sources[].columns`, the config without these, what is said of absent ones."""
    columns = {ours: theirs for ours, theirs in config.columns.items() if ours not in TURN_NAMES}
    if not columns:
        return record, config, []
    others = {ours: theirs for ours, theirs in config.columns.items() if ours in TURN_NAMES}
    absent = [ABSENT_COLUMN + column for column in columns.values() if column not in record]
    return renamed(record, columns), config.model_copy(update={"columns": others}), absent


def _split(record: Record, config: SourceConfig) -> tuple[Record, Record]:
    """The record with the preferred reply, and with the other one."""
    chosen = next((key for key in CHOSEN_KEYS if has_content(record.get(key))), None)
    rejected = next((key for key in REJECTED_KEYS if has_content(record.get(key))), None)
    record = _without_same_images(record)
    if rejected is None and chosen is None:
        return _split_list(record)
    if rejected is None:
        _refuse_empty(record, REJECTED_KEYS)
        raise RecordError("no_preference", f"{chosen} without a rejected reply")
    rest = {key: value for key, value in record.items() if key not in (chosen, rejected)}
    chat = next((key for key in CHAT_KEYS if has_content(rest.get(key))), None)
    if chosen is None:
        turns = rest.get(chat) if chat else None
        if not (isinstance(turns, list) and turns and _is_reply(turns[-1], config)):
            _refuse_empty(record, CHOSEN_KEYS)
            raise RecordError("no_preference", f"{rejected} without a chosen reply")
        return rest, {**rest, str(chat): [*turns[:-1], *_turns(record[rejected], rejected)]}
    good, bad = (_with_reply(rest, chat, record[key], key, config) for key in (chosen, rejected))
    return good, bad


def _refuse_empty(record: Record, keys: tuple[str, ...]) -> None:
    """Raises RecordError where one of the keys is there and says nothing."""
    empty = next((key for key in keys if record.get(key) in ("", [])), None)
    if empty is not None:
        raise RecordError("empty_reply", f"{empty} is empty; a reply that is compared must say something")


def _without_same_images(record: Record) -> Record:
    """ms-swift's `rejected_images` where they are those of the record. Raises RecordError where they are others."""
    others = record.get("rejected_images")
    if not has_content(others):
        return record
    ours = record.get("images", record.get("image"))
    if (others if isinstance(others, list) else [others]) != (ours if isinstance(ours, list) else [ours]):
        raise RecordError(
            "different_prompts", "rejected_images are others than the record's: both replies must be to the same images"
        )
    return {key: value for key, value in record.items() if key != "rejected_images"}


def _refuse_images(good: int, bad: int) -> None:
    counts = "" if good == bad else f", {good} and {bad} of them"
    raise RecordError(
        "different_prompts",
        f"chosen and rejected have different images{counts}: both replies must be to the same images",
    )


def _refuse_pair(record: Record) -> None:
    """Raises RecordError where an objective that compares replies would read the record."""
    key = next((key for key in PREFERENCE_KEYS if has_content(record.get(key))), None)
    if key is not None:
        raise RecordError("preference_pair", f"{key}: {TO_BE_COMPARED}")


def _about_answer(record: Record, given: list[str]) -> str:
    if not given:
        empty = next((key for key in VERIFIED_KEYS if key in record), None)
        return f"{empty} is empty" if empty else f"keys {[key[:40] for key in sorted(record)][:6]}"
    value = record[given[0]]
    if isinstance(value, dict):
        return f"{given[0]}.ground_truth is {short(value.get('ground_truth'))}"
    return f"{given[0]} is {short(value)}"


def _split_list(record: Record) -> tuple[Record, Record]:
    """LLM-Genie's `output: [good, bad]`."""
    key = next((key for key in ANSWER_KEYS if isinstance(record.get(key), list)), None)
    replies = [] if key is None else record[key]
    questions = [value for name in QUESTION_KEYS if has_content(value := record.get(name))]
    if len(replies) != 2 or not all(isinstance(reply, str) for reply in replies) or _has_lists(questions):
        there = [name[:40] for name in sorted(record) if has_content(record[name])][:6]
        raise RecordError(
            "no_preference",
            f"keys {there}; this objective reads records with chosen and rejected, or output: [good, bad]. "
            "Conversations are for objective lm",
        )
    return {**record, str(key): replies[0]}, {**record, str(key): replies[1]}


def _with_reply(rest: Record, chat: str | None, reply: Any, key: str, config: SourceConfig) -> Record:
    """The record with a reply: a text, a turn, turns, or a whole conversation."""
    if chat is not None:
        if not isinstance(rest[chat], list):
            raise RecordError("bad_turns", f"{chat} is {short(rest[chat])}; it must be a list of objects")
        return {**rest, chat: [*rest[chat], *_turns(reply, key)]}
    prompt = rest.get("prompt")
    if isinstance(prompt, list):
        without = {name: value for name, value in rest.items() if name != "prompt"}
        return {**without, "messages": [*prompt, *_turns(reply, key)]}
    asked = [name for name in QUESTION_KEYS if has_content(rest.get(name))]
    if isinstance(reply, str):
        if not asked:
            names = ", ".join((*QUESTION_KEYS, *CHAT_KEYS))
            raise RecordError("unknown_format", f"{key} without what it answers; expected one of {names}")
        return {**rest, "output": reply}
    turns = _turns(reply, key)
    if turns and not _is_reply(turns[0], config):  # a whole conversation; prompt repeats what it asks
        repeated = isinstance(prompt, str) and any(prompt in (turn.get("content"), turn.get("value")) for turn in turns)
        return {**{name: rest[name] for name in rest if name != "prompt" or not repeated}, "messages": turns}
    if len(asked) != 1:
        raise RecordError(
            "bad_turns", f"{key} is a list of turns beside {asked or 'no question'}; expected one question"
        )
    without = {name: value for name, value in rest.items() if name != asked[0]}
    return {**without, "messages": [{"role": "user", "content": rest[asked[0]]}, *turns]}


def _turns(reply: Any, key: str) -> list[Record]:
    if isinstance(reply, str):
        return [{"role": "assistant", "content": reply}]
    turns = [reply] if isinstance(reply, dict) else reply
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RecordError("bad_turns", f"{key} is {short(reply)}; expected a text, a turn, or a list of turns")
    return turns


def _is_reply(turn: Any, config: SourceConfig) -> bool:
    names = {ours: theirs for ours, theirs in config.columns.items() if ours in TURN_NAMES}
    values = renamed(turn, names) if isinstance(turn, dict) else {}
    role = values.get("role") or values.get("from")
    return isinstance(role, str) and known_role(role, config) == "assistant"


def _has_lists(values: Iterable[Any]) -> bool:
    return any(isinstance(value, list) for value in values)


def _both(chosen: Conversation, rejected: Conversation) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    return chosen.turns, rejected.turns


def _learned_from(turns: tuple[Turn, ...], first: int) -> tuple[Turn, ...]:
    """The turns, of which replies before turn `first` are read and not learned."""
    return tuple(
        replace(turn, is_learned=False) if number < first and turn.role == "assistant" else turn
        for number, turn in enumerate(turns)
    )


def _flag(value: Any) -> bool | None:
    """True, false, 1, 0, and these as text."""
    if isinstance(value, str):
        return {"true": True, "false": False, "1": True, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, bool) or value in (0, 1) else None


def _answer(value: Any) -> str | None:
    """A text or a number, or a list of one, or what verl's `reward_model` holds; None for anything else."""
    if isinstance(value, dict):
        value = value.get("ground_truth")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    text = str(value).strip() if is_number or isinstance(value, str) else ""
    return text or None
