"""One record of other people's files -> Conversation.

Read are: LLaVA and ShareGPT (`conversations` or `conversation`, `from`/`value`), OpenAI (`messages`, `role`/`content`,
content as text or parts), pairs of a question and an answer (`instruction`, `input`, `output` and the names of
`QUESTION_KEYS` and `ANSWER_KEYS`), caption pairs (`image` with `caption` or `text`), plain `text`, and, where the
config says so, a `text` of turns with `### Human:` and `### Assistant:` before them.

`<image>` is a mark in every user turn, and there must be as many marks as images; one too many is an error too,
since a record whose image was forgotten looks the same. In a reply or system turn it is an error if the record has
images, else text. What nothing here reads is judged by `vlm.data.unread`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from vlm.data.config import TURN_NAMES, SourceConfig
from vlm.data.conversation import IMAGE, Conversation, Role, Turn, check_conversation, normalise_turns
from vlm.data.fields import Fields, renamed, short
from vlm.data.marks import Mark, find_marks
from vlm.data.media import Image, read_image
from vlm.data.notes import ABSENT_COLUMN
from vlm.data.places import Placed, RawTurn, Shown, media_in_texts, place_images
from vlm.data.unread import CALLS_AS_TURNS, REPLY_KEYS, TO_BE_COMPARED, is_learned, judge, refuse_settings
from vlm.errors import RecordError

ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "human": "user", "user": "user",
    "tool": "user", "observation": "user", "function": "user", "tool_response": "user", "ipython": "user",
    "gpt": "assistant", "assistant": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "ai": "assistant", "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
CHAT_KEYS = ("conversations", "conversation", "messages")
QUESTION_KEYS = ("instruction", "query", "question", "prompt", "human", "user", "input")
ANSWER_KEYS = ("output", "response", "completion", "answer", "assistant", "gpt", "bot")
BESIDE_KEYS = ("input", "context")  # what a question is about, joined to it
_IMAGE_KEYS = ("image", "images", "file_name")  # file_name: metadata files of image folders on the Hugging Face hub
SYSTEM_KEYS = ("system", "system_prompt", "system_message", "meta_instruction")
_TURN_MARK = re.compile(r"###[ ]?(Human|Assistant):")
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")


@dataclass
class _Draft:
    """A record while it is read."""

    fields: Fields
    config: SourceConfig
    images: list[Image]  # named beside the turns
    absent: list[str]  # columns that the config names and the record lacks
    uses_prompt: bool = False  # data.sources[].prompt stands in it


@dataclass(frozen=True)
class Format:
    """One way to write a record. `data.sources[].format` names it."""

    is_told_by: Callable[[Collection[str], _Draft], bool]  # whether a record of these keys is written so
    turns: Callable[[_Draft], list[RawTurn]]
    expected: str  # keys that a record of this format has, for messages
    in_short: str = ""  # the same in a message that lists all formats; empty: as `expected`
    includes: tuple[str, ...] = ()  # formats that are read too where the config names this one
    reads_images: bool = True  # whether images are read where the config names this one


def parse_record(record: dict[str, Any], config: SourceConfig, image_placement: str = "auto") -> Conversation:
    """A record as a conversation that can be trained on. Images are still as the record names them.

    Its format is told by the keys, unless `config.format` names it. With `image_placement` "auto", a record of exactly
    one image and no mark gets the image first, then a line end; with "first", any number of images. A caption or
    plain text becomes the reply to a user turn of the image and the record's or `config.prompt`, if there are any.

    Returns:
        the conversation; its `unread` names the keys and marks with content that nothing read.

    Raises:
        RecordError: rules comment, unknown_format, bad_turns, mixed_keys, bad_text, bad_image_field, remote_image, and
            those of `refuse_settings`, `place_images`, `judge` and `check_conversation`.
    """
    if record and set(record) <= {"__comment__"}:
        raise RecordError("comment", "a comment, no record")
    columns = {ours: theirs for ours, theirs in config.columns.items() if ours not in TURN_NAMES}
    fields = Fields(renamed(record, columns))
    refuse_settings(fields)
    absent = [column for column in columns.values() if column not in record]
    draft = _Draft(fields, config, _images_of(fields) if _reads_images(config) else [], absent)
    if not _reads_images(config):
        fields.settle(*_IMAGE_KEYS)  # named among the unread below
    raw = _format_of(draft).turns(draft)
    shown = media_in_texts(raw)
    placed = place_images(raw, draft.images, image_placement)
    placed.unread += shown
    turns = normalise_turns(tuple(placed.turns))
    if placed.images and image_placement != "exact" and (len(placed.images) == 1 or image_placement == "first"):
        turns = _place_first(turns, len(placed.images))
    texts = [turn.text for turn in turns]
    names = [image for image in placed.images if isinstance(image, str)] or [""] * len(placed.images)
    unread = judge(fields, names, texts)
    conversation = Conversation(turns, tuple(placed.images), unread=(*unread, *_settings_unread(draft, placed)))
    return check_conversation(conversation)


def _settings_unread(draft: _Draft, placed: Placed) -> list[str]:
    names = list(dict.fromkeys(placed.unread))
    if not _reads_images(draft.config):
        names += draft.fields.given(_IMAGE_KEYS)
    names += [ABSENT_COLUMN + column for column in draft.absent]
    if draft.config.prompt and not draft.uses_prompt:
        names.append("data.sources[].prompt")
    return names


def _reads_images(config: SourceConfig) -> bool:
    return config.format == "auto" or FORMATS[config.format].reads_images


def _format_of(draft: _Draft) -> Format:
    """By the keys of a record that have content, else by those that are there; among those that the config allows."""
    name, fields = draft.config.format, draft.fields
    allowed = FORMATS.values() if name == "auto" else [FORMATS[each] for each in (name, *FORMATS[name].includes)]
    there = [key for key, value in fields.values.items() if value is not None]
    for keys in ([key for key in there if key in fields], there):
        for format in allowed:
            if format.is_told_by(keys, draft):
                return format
    *others, last = (format.in_short or format.expected for format in FORMATS.values())
    expected = f"{', '.join(others)}, or {last}" if name == "auto" else FORMATS[name].expected
    raise RecordError(
        "unknown_format",
        f"keys {[key[:40] for key in sorted(there)[:8]]}; expected {expected}. Other names are given with "
        "data.sources[].columns",
    )


def _is_pair(keys: Collection[str], draft: _Draft) -> bool:
    return any(key in ANSWER_KEYS for key in keys) and any(key in QUESTION_KEYS for key in keys)


def _is_caption(keys: Collection[str], draft: _Draft) -> bool:
    """Where the config leaves it open, a text without an image is plain text."""
    is_open = draft.config.format == "auto"
    if is_open and "question_id" in keys and "text" in keys:
        raise RecordError("unknown_format", "question_id and text: a question of a test without its answer")
    is_plain = is_open and "text" in keys and not draft.images
    return ("caption" in keys or "text" in keys) and not is_plain


def _chat_turns(draft: _Draft) -> list[RawTurn]:
    given = [key for key in CHAT_KEYS if draft.fields.values.get(key) is not None]
    given = [key for key in given if key in draft.fields] or given
    if len(given) > 1:
        raise RecordError("mixed_keys", f"both {given[0]} and {given[1]}")
    draft.fields.settle(given[0])
    value = draft.fields.values[given[0]]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        kind = f"a list that holds {short(value[0])}" if isinstance(value, list) and value else short(value)
        raise RecordError("bad_turns", f"{given[0]} is {kind}; it must be a list of objects")
    return [*_before(draft), *_turns_of(draft, value, "turns[].")]


def _before(draft: _Draft) -> list[RawTurn]:
    """What stands before the turns: the system prompt and the history."""
    fields = draft.fields
    given = fields.given(SYSTEM_KEYS)
    if len(given) > 1 and len({str(fields.values[key]) for key in given}) > 1:
        raise RecordError("mixed_keys", f"both {given[0]} and {given[1]}")
    system = fields.take(*SYSTEM_KEYS)
    fields.settle(*given)
    turns = [] if system is None else [_turn("system", _text(system, given[0]))]
    history = fields.take("history")
    if history is None:
        return turns
    if not isinstance(history, list):
        raise RecordError("bad_turns", f"history is {short(history)}, expected a list of [question, answer]")
    for entry in history:
        if isinstance(entry, dict):
            turns += _turns_of(draft, [entry], "history[].")
        elif isinstance(entry, list) and len(entry) == 2:
            turns += [_turn("user", _text(entry[0], "history")), _turn("assistant", _text(entry[1], "history"))]
        else:
            raise RecordError("bad_turns", f"history holds {short(entry)}, expected [question, answer]")
    return turns


def _turns_of(draft: _Draft, values: list[dict[str, Any]], place: str) -> list[RawTurn]:
    """Turns with roles, or objects that are a question and its answer each."""
    names = {ours: theirs for ours, theirs in draft.config.columns.items() if ours in TURN_NAMES}
    turns: list[RawTurn] = []
    for number, value in enumerate(values, 1):
        where = f"turn {number}"
        if not names and len(value) == 2 and (plain := _plain_turn(value, draft.config, where)):
            turns.append(plain)
            continue
        fields = draft.fields.inner(renamed(value, names), place)
        has_role = fields.values.get("from") is not None or fields.values.get("role") is not None
        if not has_role and fields.given(ANSWER_KEYS):
            system = fields.take("system")
            turns += [] if system is None else [_turn("system", _text(system, where))]
            turns += _pair(fields, where, is_learned(fields, where))
            continue
        role = _role(fields, draft.config, where)
        learned = is_learned(fields, where) if role == "assistant" else _passes_flags(fields)
        images = _images_of(fields) if role == "user" or fields.given(_IMAGE_KEYS) else []
        fields.take("type")  # "message" in OpenAI's responses
        turns.append(RawTurn(role, _content(fields, role, where), tuple(images), learned))
    return turns


def _plain_turn(value: dict[str, Any], config: SourceConfig, where: str) -> RawTurn | None:
    """A turn of a role and a text and nothing else, as most are, read without looking for more; None for another."""
    for role_key, text_key in (("from", "value"), ("role", "content")):
        name, text = value.get(role_key), value.get(text_key)
        if isinstance(name, str) and isinstance(text, str) and (role := known_role(name, config)):
            return _turn(role, _text(text, where))
    return None


def _passes_flags(fields: Fields) -> bool:
    """Of a turn that is never learned: what says just that is read, what asks for more is left for the report."""
    for key in ("loss", "weight", "train", "trainable"):
        if fields.values.get(key) in (False, 0):
            fields.take(key)
    return True


def _pair_turns(draft: _Draft) -> list[RawTurn]:
    fields = draft.fields
    if _is_list_of_turns(fields.values.get("prompt")) and _is_list_of_turns(fields.values.get("completion")):  # TRL
        turns = [*fields.take("prompt"), *fields.take("completion")]
        return [*_before(draft), *_turns_of(draft, turns, "turns[].")]
    return [*_before(draft), *_pair(fields, "the record", True)]


def _pair(fields: Fields, where: str, learned: bool) -> list[RawTurn]:
    """A question and its answer, or lists of as many of each. `input` and `context` are joined to the question."""
    answer_key = _one_of(fields, ANSWER_KEYS, where)
    questions_given = [key for key in fields.given(QUESTION_KEYS) if key != "input"]
    if len(questions_given) > 1:
        raise RecordError("mixed_keys", f"{where}: both {questions_given[0]} and {questions_given[1]}")
    key = questions_given[0] if questions_given else "instruction"
    beside = [fields.take(name) for name in BESIDE_KEYS if name in fields]
    questions, answers = fields.take(*QUESTION_KEYS) if questions_given else "", fields.values[answer_key]
    fields.settle(answer_key)
    questions = questions if isinstance(questions, list) else [questions]
    answers = answers if isinstance(answers, list) else [answers]
    if beside and len(questions) > 1:
        raise RecordError("bad_turns", "input beside several instructions")
    if len(questions) == 1 and len(answers) == 2:
        raise RecordError("preference_pair", f"{where}: one question, two answers: {TO_BE_COMPARED}")
    if len(questions) != len(answers):
        raise RecordError("bad_turns", f"{len(questions)} instructions, {len(answers)} outputs")
    turns = []
    for question, answer in zip(questions, answers, strict=True):
        asked = _text(question, key)
        if beside:
            asked = "\n".join([asked, *(_text(text, "input") for text in beside)]).lstrip("\n")
        turns += [_turn("user", asked), _turn("assistant", _text(answer, answer_key), learned)]
    return turns


def _one_of(fields: Fields, keys: tuple[str, ...], where: str) -> str:
    given = fields.given(keys) or [key for key in keys if fields.values.get(key) is not None]
    if len(given) > 1:
        raise RecordError("mixed_keys", f"{where}: both {given[0]} and {given[1]}")
    return given[0]


def _is_list_of_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and "role" in turn for turn in value)


def _caption_turns(draft: _Draft) -> list[RawTurn]:
    if not draft.images:
        judge(draft.fields, (), ())  # the image may stand under another key
    if len(draft.images) != 1:
        raise RecordError("image_count", f"a caption needs one image, got {len(draft.images)}")
    fields = draft.fields
    key = "caption" if fields.values.get("caption") is not None else "text"
    fields.settle(key)
    asked: list[str | Mark | Shown] = [*find_marks(_question(draft))]
    if not any(isinstance(piece, Mark) and piece.is_place for piece in asked):
        asked = [Shown(), "\n", *asked] if asked else [Shown()]
    return [
        *_before(draft),
        RawTurn("user", tuple(asked)),
        _turn("assistant", _text(fields.values[key], key)),
    ]


def _text_turns(draft: _Draft) -> list[RawTurn]:
    text = _text(draft.fields.take("text") or draft.fields.values["text"], "text")
    given = draft.fields.values.get("prompt")
    is_within = isinstance(given, str) and "prompt" in draft.fields and text.startswith(given)
    asked = _question(draft)
    if is_within:  # the text holds its prompt
        asked = ""
    return [*_before(draft), _turn("user", asked), _turn("assistant", text)]


def _marked_turns(draft: _Draft) -> list[RawTurn]:
    """The turns of one text, as openassistant-guanaco writes them: ### Human: A question### Assistant: Its answer"""
    before, *marked = _TURN_MARK.split(_text(draft.fields.take("text"), "text"))
    if before.strip() or not marked:
        raise RecordError("bad_turns", f"text is {short(before)}, expected ### Human: at its beginning")
    turns = zip(marked[::2], marked[1::2], strict=True)
    return [*_before(draft), *(_turn(ROLES[role.lower()], text.strip()) for role, text in turns)]


def _question(draft: _Draft) -> str:
    """What a caption or text answers: the record's own prompt, or the source's."""
    given = draft.fields.take("prompt")
    if given is not None:
        return _text(given, "prompt")
    draft.uses_prompt = bool(draft.config.prompt)
    return draft.config.prompt or ""


def _place_first(turns: tuple[Turn, ...], count: int) -> tuple[Turn, ...]:
    """The record's images, which have no mark, before the first thing that the user says."""
    first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None or any(turn.num_images for turn in turns):
        return turns
    return (*turns[:first], Turn("user", (*[IMAGE] * count, "\n", *turns[first].parts)), *turns[first + 1 :])


def _images_of(fields: Fields) -> list[Image]:
    """The images that a record or turn names; file_name beside image only names the same one."""
    if fields.values.keys().isdisjoint(_IMAGE_KEYS):
        return []
    given = fields.given(_IMAGE_KEYS[:2])
    if len(given) > 1:
        raise RecordError("bad_image_field", f"more than one of the keys {', '.join(_IMAGE_KEYS)}")
    value = fields.take(*_IMAGE_KEYS)
    fields.settle("file_name")
    if value is None:
        return []
    return [read_image(entry, fields) for entry in (value if isinstance(value, list) else [value])]


def _role(fields: Fields, config: SourceConfig, where: str) -> Role:
    names = [fields.values[key] for key in ("from", "role") if fields.values.get(key) is not None]
    fields.settle("from", "role")
    roles = {known_role(name, config) if isinstance(name, str) else None for name in names}
    if len(roles) > 1:
        raise RecordError("mixed_keys", f"{where}: from is {short(names[0])}, role is {short(names[1])}")
    role = roles.pop() if roles else None
    if role is None:
        named = short(names[0]) if names else f"missing (neither from nor role; keys {sorted(fields.values)[:6]})"
        raise RecordError(
            "unknown_role", f"{where}: role {named[:200]}; known: {', '.join(ROLES)}. Others: data.sources[].roles"
        )
    return role


def known_role(name: str, config: SourceConfig) -> Role | None:
    """`<|User|>` is DeepSeek-VL's way to write it."""
    return config.roles.get(name) or ROLES.get(name.strip().lower().removeprefix("<|").removesuffix("|>"))


def _content(fields: Fields, role: Role, where: str) -> tuple[Any, ...]:
    """Pieces of a turn's text, or of OpenAI's list of parts."""
    content = _said(fields, where)
    if not isinstance(content, list):
        return tuple(find_marks(_text(content, where)))
    pieces: list[Any] = []
    for part in content:
        if not isinstance(part, dict):
            raise RecordError("bad_turns", f"{where}: {_part_of(part)}")
        pieces += _part(fields.inner(part, "parts[]."), where)
    return tuple(pieces)


def _part(part: Fields, where: str) -> list[Any]:
    kind = part.values.get("type")
    if kind is None:  # Qwen's {"text": ...} and {"image": ...}
        kind = next((key for key in ("image", "image_url", "text") if key in part), None)
    part.settle("type")
    if isinstance(kind, str) and kind in _TEXT_PARTS:
        part.settle("text")
        return list(find_marks(_text(part.values.get("text"), f"{where}: text of a part")))
    if not isinstance(kind, str) or kind not in _IMAGE_PARTS:
        raise RecordError("bad_turns", f"{where}: {_part_of(kind)}")
    source = part.take("image", "image_url", "url", "path", "source", "base64", "bytes", "data")
    if source is not None:
        return [Shown(read_image({"bytes": source} if isinstance(source, list) else source, part))]
    index = part.take("index")
    if index is not None and (not isinstance(index, int) or isinstance(index, bool) or index < 0):
        raise RecordError("bad_image_field", f"{where}: a part with index {short(index)}, expected 0, 1, ...")
    return [Shown(index=index)]


def _part_of(kind: Any) -> str:
    return f"part of type {short(kind)}; known: text, image, image_url"


def _said(fields: Fields, where: str) -> Any:
    """What stands under `value` or `content`, whatever key names the role; under both if it is the same text."""
    given = [fields.values[key] for key in ("value", "content") if fields.values.get(key) is not None]
    if len(given) == 2 and not (isinstance(given[0], str) and given[0] == given[1]):
        raise RecordError("mixed_keys", f"{where}: value and content differ")
    if not given:
        others = [unread.key[:40] for unread in fields.unread()][:4]
        there = f" It has {', '.join(others)}." if others else ""
        texts = [key for key in others if isinstance(fields.values.get(key), str)]
        hint = f" If {texts[0]} is it: data.sources[].columns: {{value: {texts[0]}}}" if texts else ""
        if set(REPLY_KEYS) & set(others):
            hint = f" {CALLS_AS_TURNS}"
        raise RecordError("bad_text", f"{where} has no value or content (null, or no such key).{there}{hint}")
    fields.settle("value", "content")
    return given[0]


def _turn(role: Role, text: str, learned: bool = True) -> RawTurn:
    return RawTurn(role, tuple(find_marks(text)), (), learned)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError("bad_text", f"{where} is {short(value)}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RecordError("bad_text", f"{where} holds half of a surrogate pair (a broken emoji escape)") from None
    return value


FORMATS: dict[str, Format] = {  # in the order in which they are tried
    "conversation": Format(
        lambda keys, draft: not {*CHAT_KEYS}.isdisjoint(keys),
        _chat_turns,
        expected="conversations, conversation, messages, or instruction and output",
        in_short="conversations, messages",
        includes=("instruction",),
    ),
    "instruction": Format(
        _is_pair,
        _pair_turns,
        expected=f"one of {', '.join(QUESTION_KEYS)} and one of {', '.join(ANSWER_KEYS)}",
        in_short="instruction and output, question and answer",
    ),
    "marked_turns": Format(
        lambda keys, draft: "text" in keys and draft.config.format == "marked_turns",
        _marked_turns,
        expected="text with ### Human: and ### Assistant: before turns",
        reads_images=False,
    ),
    "caption": Format(
        _is_caption, _caption_turns, expected="image and caption (or text)", in_short="image and caption"
    ),
    "text": Format(
        lambda keys, draft: "text" in keys and not draft.images, _text_turns, expected="text", reads_images=False
    ),
}
