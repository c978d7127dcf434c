"""Records of other people's files -> Conversation.

Read are: LLaVA and ShareGPT (`conversations` or `conversation`, `from`/`value`), OpenAI (`messages`, `role`/`content`,
content as text or parts), instruction records (`instruction`, `input`, `output`: Alpaca, MiniGPT4Qwen), caption pairs
(`image` with `caption` or `text`), plain `text`, and folders of pictures with .txt files of the same name.

`<image>` is a mark in every user turn, and there must be as many marks as pictures; one too many is an error too,
since a record whose picture was forgotten looks the same. In a reply or system turn it is an error if the record has
pictures, else text. No other word is interpreted: control words of a template are text.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm.data.config import SourceConfig
from vlm.data.conversation import IMAGE, Conversation, Part, Role, Turn, check_conversation, normalise_turns
from vlm.data.images import resolve_image
from vlm.data.index import RecordIndex, fingerprint, open_index
from vlm.errors import DataError, RecordError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
}
_CHAT_KEYS = ("conversations", "conversation", "messages")
_IMAGE_KEYS = ("image", "images", "file_name")  # file_name: metadata files of picture folders on the Hugging Face hub
_MARK = re.compile(r"<image>")
_INSTRUCTION_MARK = re.compile(r"<Img><ImageHere></Img>|<ImageHere>|<image>")  # as in MiniGPT-4's instructions

Image = str | bytes  # a name below the images folder, or an encoded picture


@dataclass(frozen=True)
class RecordSource:
    """The conversations of one entry of `data.sources`."""

    index: RecordIndex | FolderIndex
    config: SourceConfig
    images_root: Path
    image_placement: str
    fingerprint: str  # changes when the file does

    def __len__(self) -> int:
        return len(self.index)

    def where(self, number: int) -> str:
        return self.index.where(number)

    def content_digest(self) -> str:
        """Changes with any byte of the file (of a folder: with any caption, and with a picture's size or time)."""
        if isinstance(self.index, FolderIndex):
            return self.index.fingerprint()
        with self.index.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def conversation(self, number: int) -> Conversation:
        """Record `number`, counted from 0, with its pictures as absolute paths that exist below the images folder.

        Raises:
            RecordError: see `parse_record`, `resolve_image`, `RecordIndex.__getitem__`.
        """
        where = self.where(number)
        try:
            parsed = parse_record(self.index[number], self.config, self.image_placement)
            images = tuple(
                image if isinstance(image, bytes) else str(resolve_image(self.images_root, image))
                for image in parsed.images
            )
        except RecordError as error:
            raise error.at(where) from None
        return replace(parsed, images=images, where=where)


class FolderIndex:
    """A folder of pictures, each with a .txt file of the same name: its caption. Only the names lie in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        pictures = (path for path in self.folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        self.names = sorted(path.relative_to(self.folder).as_posix() for path in pictures)
        if not self.names:
            raise DataError(f"data folder {folder} holds no pictures ({' '.join(IMAGE_SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.names)

    def where(self, number: int) -> str:
        return f"{self.folder.name}: {self.names[number]}"

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Raises RecordError rules caption_missing, bad_text."""
        picture = Path(self.names[number])
        try:
            text = resolve_image(self.folder, picture.with_suffix(".txt").as_posix()).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise RecordError("bad_text", f"{picture.stem}.txt is not UTF-8") from None
        except (RecordError, OSError):
            raise RecordError("caption_missing", f"no readable {picture.stem}.txt beside the picture") from None
        return {"image": self.names[number], "caption": text.strip()}

    def fingerprint(self) -> str:
        """Changes when a picture or a caption is added, removed or edited."""
        state = hashlib.sha256()
        for name in self.names:
            picture = self.folder / name
            for path in (picture, picture.with_suffix(".txt")):
                state.update(f"{name!r} {fingerprint(path) if path.is_file() else 'none'}\n".encode())
        return state.hexdigest()[:16]


def open_source(config: SourceConfig, cache: Path, image_placement: str = "auto") -> RecordSource:
    """Open one entry of `data.sources`.

    Args:
        cache: folder for indexes of files; need not exist or be writable.
        image_placement: "auto" or "exact", see `parse_record`.

    Raises:
        DataError: the file is missing, empty or of an unknown kind; the images folder is missing.
    """
    path = Path(config.path)
    root = Path(config.images) if config.images is not None else path if path.is_dir() else path.parent
    if path.is_dir():
        folder = FolderIndex(path)
        index: RecordIndex | FolderIndex = folder
        mark = folder.fingerprint()
    else:
        index = open_index(path, cache)
        mark = fingerprint(path)
    if not root.is_dir():
        raise DataError(f"images folder {root} of {path} does not exist; see data.sources[].images")
    if len(index) == 0:
        raise DataError(f"data file {path} holds no records")
    return RecordSource(index, config, root.resolve(), image_placement, mark)


def parse_record(record: dict[str, Any], config: SourceConfig, image_placement: str = "auto") -> Conversation:
    """A record as a conversation that can be trained on. Pictures are still as the record names them.

    The kind is told by the keys, unless `config.format` names it. With `image_placement` "auto", a record of exactly
    one picture and no mark gets the picture first, then a line end. A caption or plain text becomes the reply to a
    user turn of the picture and `config.prompt`, if there are any.

    Raises:
        RecordError: rules comment, unknown_format, bad_turns, mixed_keys, bad_text, bad_image_field, remote_image, and
            those of `check_conversation`.
    """
    if record and set(record) <= {"__comment__"}:
        raise RecordError("comment", "a comment, no record")
    images = [] if config.format == "text" else _images_of(record)
    turns = _parser(record, images, config.format)(record, images, config)
    if images and any(_MARK.search(turn.text) for turn in turns if turn.role != "user"):
        raise RecordError("image_in_answer", "an <image> mark stands in a system or assistant turn")
    normal = normalise_turns(tuple(turns))
    if image_placement == "auto" and len(images) == 1:
        normal = _place_first(normal)
    return check_conversation(Conversation(normal, tuple(images)))


def split_marks(text: str, mark: re.Pattern[str] = _MARK) -> tuple[Part, ...]:
    """Text with its marks as image slots. Line ends beside a mark stay.

    >>> split_marks("<image>\\nWhat?")
    (ImageSlot(), '\\nWhat?')
    """
    first, *rest = mark.split(text)
    parts: list[Part] = [first]
    for piece in rest:
        parts += [IMAGE, piece]
    return tuple(part for part in parts if part != "")


def decode_data_url(url: str) -> bytes:
    """The bytes of a `data:image/...;base64,` URL. Raises RecordError rule bad_image_field."""
    head, _, body = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise RecordError("bad_image_field", f"{head[:40]!r}: expected data:image/...;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: letters outside ASCII
        raise RecordError("bad_image_field", f"not base64 ({error})") from None


_Parser = Callable[[dict[str, Any], list[Image], SourceConfig], list[Turn]]


def _parser(record: dict[str, Any], images: list[Image], format: str) -> _Parser:
    if format in ("auto", "conversation"):
        if any(key in record for key in _CHAT_KEYS):
            return _chat_turns
        if "output" in record and ("instruction" in record or "input" in record):
            return _instruction_turns
    if format in ("auto", "text") and "text" in record and not images:
        return _text_turns
    if format in ("auto", "caption") and ("caption" in record or "text" in record):
        return _caption_turns
    expected = {
        "auto": "conversations, messages, instruction and output, image and caption, or text",
        "conversation": "conversations, conversation, messages, or instruction and output",
        "caption": "image and caption (or text)",
        "text": "text",
    }
    raise RecordError("unknown_format", f"keys {[key[:40] for key in sorted(record)[:8]]}; expected {expected[format]}")


def _chat_turns(record: dict[str, Any], images: list[Image], config: SourceConfig) -> list[Turn]:
    given = [key for key in _CHAT_KEYS if key in record]
    if len(given) > 1:
        raise RecordError("mixed_keys", f"both {given[0]} and {given[1]}")
    value = record[given[0]]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise RecordError("bad_turns", f"{given[0]} must be a list of objects")
    turns = _system_turn(record)
    inline: list[Image] = []
    for number, turn in enumerate(value, 1):
        where = f"turn {number}"
        role = _role(turn, where)
        turns.append(Turn(role, _content(_said(turn, where), role, inline, where)))
    if inline and images:
        raise RecordError("bad_image_field", "pictures are named both in turns and beside them; their order is unclear")
    images += inline
    return turns


def _instruction_turns(record: dict[str, Any], images: list[Image], config: SourceConfig) -> list[Turn]:
    questions, answers = record.get("instruction") or "", record["output"]
    questions = questions if isinstance(questions, list) else [questions]
    answers = answers if isinstance(answers, list) else [answers]
    extra = record.get("input") or ""
    if extra and len(questions) == 1:
        questions = [f"{_text(questions[0], 'instruction')}\n{_text(extra, 'input')}".lstrip("\n")]
    elif extra:
        raise RecordError("bad_turns", "input beside several instructions")
    if len(questions) != len(answers):
        raise RecordError("bad_turns", f"{len(questions)} instructions, {len(answers)} outputs")
    turns = _system_turn(record)
    mark = _INSTRUCTION_MARK if images else _MARK
    for question, answer in zip(questions, answers, strict=True):
        turns.append(Turn("user", split_marks(_text(question, "instruction"), mark)))
        turns.append(Turn("assistant", (_text(answer, "output"),)))
    return turns


def _caption_turns(record: dict[str, Any], images: list[Image], config: SourceConfig) -> list[Turn]:
    if len(images) != 1:
        raise RecordError("image_count", f"a caption needs one picture, got {len(images)}")
    caption = _text(record["caption"] if "caption" in record else record["text"], "caption")
    question = ("\n", config.prompt) if config.prompt else ()
    return [Turn("user", (IMAGE, *question)), Turn("assistant", (caption,))]


def _text_turns(record: dict[str, Any], images: list[Image], config: SourceConfig) -> list[Turn]:
    question = (config.prompt,) if config.prompt else ()
    return [Turn("user", question), Turn("assistant", (_text(record["text"], "text"),))]


def _place_first(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The record's picture, which has no mark, before the first thing that the user says."""
    first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None or any(turn.num_images for turn in turns):
        return turns
    return (*turns[:first], Turn("user", (IMAGE, "\n", *turns[first].parts)), *turns[first + 1 :])


def _images_of(record: dict[str, Any]) -> list[Image]:
    given = [record[key] for key in _IMAGE_KEYS if record.get(key) is not None]
    if len(given) > 1:
        raise RecordError("bad_image_field", f"more than one of the keys {', '.join(_IMAGE_KEYS)}")
    if not given:
        return []
    values = given[0] if isinstance(given[0], list) else given
    return [_image(value) for value in values]


def _image(value: Any) -> Image:
    if not isinstance(value, str):
        raise RecordError("bad_image_field", f"a picture is given as {_short(value)}; expected a path")
    if value.startswith("data:"):
        return decode_data_url(value)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", value):
        raise RecordError("remote_image", f"{value[:80]!r}: pictures are named by path, nothing is fetched")
    return value


def _system_turn(record: dict[str, Any]) -> list[Turn]:
    return [Turn("system", (_text(record["system"], "system"),))] if record.get("system") else []


def _role(turn: dict[str, Any], where: str) -> Role:
    names = [turn[key] for key in ("from", "role") if turn.get(key) is not None]
    roles = {ROLES.get(name.strip().lower()) if isinstance(name, str) else None for name in names}
    if len(roles) > 1:
        raise RecordError("mixed_keys", f"{where}: from is {_short(names[0])}, role is {_short(names[1])}")
    role = roles.pop() if roles else None
    if role is None:
        named = _short(names[0]) if names else "missing"
        raise RecordError("unknown_role", f"{where}: role {named}; known: {', '.join(ROLES)}")
    return role


def _said(turn: dict[str, Any], where: str) -> Any:
    """What stands under `value` or `content`, whatever key names the role; under both if it is the same text."""
    given = [turn[key] for key in ("value", "content") if turn.get(key) is not None]
    if len(given) == 2 and not (isinstance(given[0], str) and given[0] == given[1]):
        raise RecordError("mixed_keys", f"{where}: value and content differ")
    return given[0] if given else None


def _content(content: Any, role: Role, images: list[Image], where: str) -> tuple[Part, ...]:
    """Text, or OpenAI's list of parts; pictures that parts name are added to `images`."""
    if not isinstance(content, list):
        text = _text(content, where)
        return split_marks(text) if role == "user" else (text,)
    parts: list[Part] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            text = _text(part.get("text"), where)
            parts += split_marks(text) if role == "user" else (text,)
        elif kind in ("image", "image_url"):
            source = part.get(kind, part.get("url", part.get("path")))
            source = source.get("url") if isinstance(source, dict) else source
            parts.append(IMAGE)
            if source is not None:  # else the picture stands in the record's `image` or `images`
                images.append(_image(source))
        else:
            raise RecordError("bad_turns", f"{where}: part of type {_short(kind)}; known: text, image, image_url")
    return tuple(parts)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError("bad_text", f"{where} is {_short(value)}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RecordError("bad_text", f"{where} holds half of a surrogate pair (a broken emoji escape)") from None
    return value


def _short(value: Any) -> str:
    """For messages. Lists and objects are not written out: they may be nested deeper than `repr` can go."""
    return repr(value)[:60] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
