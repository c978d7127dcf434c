"""Records and pictures that are wrong in some way, made from a seed.

Every text of a record holds words of its own, so that one can look for them in what training would learn: `w12` may be
read, `x12` must never be learned.
"""

from __future__ import annotations

import base64
import copy
import io
import itertools
import json
import os
import random
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

Record = dict[str, Any]
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
MARKS = (
    "<ImageHere>", "<|image_1|>", "<|image_2|>", "<image_placeholder>", "<IMG_CONTEXT>", "[IMG]", "<|vision_start|>",
    "<|vision_start|><|image_pad|><|vision_end|>", "<Image>", "<img>", "<img>a.png</img>", "<image>", "<image1>",
    "<start_of_image>", "<video>", "<|video_pad|>", "<audio>", "<|audio_1|>", "(<image>./</image>)", "<im_patch>",
)  # fmt: skip
_OTHER_KEYS = {
    "image": ("img", "Image", "image_path", "picture", "image_url", "pic", "images", "file_name", "video"),
    "conversations": ("conversation", "dialog", "messages", "turns"),
    "messages": ("conversations", "chat", "Messages"),
    "caption": ("text", "alt", "captions", "Caption"),
    "instruction": ("query", "question", "prompt", "Instruction", "task"),
    "output": ("response", "answer", "completion", "target", "Output"),
    "text": ("content", "Text", "body"),
    "from": ("role", "speaker", "From"), "value": ("content", "text", "Value"),
    "role": ("from", "author"), "content": ("value", "text", "Content"),
}  # fmt: skip
_JUNK = (
    None,
    "",
    [],
    {},
    0,
    -1,
    True,
    False,
    1e308,
    10**30,
    "\ud800",
    "\0",
    "\x1b[2J",
    [[[]]],
    {"a": {"b": []}},
    ["x", 3],
)


class Maker:
    """Makes records from one stream of random numbers."""

    def __init__(self, seed: int, images: list[str]) -> None:
        self.rng = random.Random(seed)
        self.images = images
        self._numbers = itertools.count()

    def word(self, kind: str = "w") -> str:
        return f"{kind}{next(self._numbers)}z"

    def good(self) -> Record:
        """A record of any kind that is read whole."""
        rng, image = self.rng, self.rng.choice(self.images)
        kind = rng.randrange(6)
        if kind == 0:
            return {"image": image, "caption": f"A {self.word()}."}
        if kind == 1:
            return {"text": f"Once {self.word()}."}
        if kind == 2:
            record = {"instruction": f"Do {self.word()}.", "input": self.word(), "output": f"Done {self.word()}."}
            return record | ({"image": image} if rng.random() < 0.5 else {})
        num_turns = rng.randint(1, 3)
        if kind == 3:
            turns = [{"role": role, "content": f"{self.word()}."} for role in ("user", "assistant") * num_turns]
            turns[0]["content"] = [{"type": "image", "image": image}, {"type": "text", "text": turns[0]["content"]}]
            return {"messages": turns}
        turns = [{"from": who, "value": f"{self.word()}."} for who in ("human", "gpt") * num_turns]
        if kind == 4:
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        return {"id": str(rng.randrange(999)), "conversations": turns} | ({"image": image} if kind == 4 else {})

    def mutated(self) -> bytes:
        """The line of a good record after one to three mutations; what forbids to learn comes last, and stays."""
        record = self.good()
        for _ in range(self.rng.randint(1, 3)):
            record = self.rng.choice(_MUTATIONS)(self, copy.deepcopy(record))
        if self.rng.random() < 0.2:
            record = self.rng.choice([_unlearn, _prefer])(self, record)
        line = json.dumps(record).encode()
        return self.rng.choice(_LINES)(self, line) if self.rng.random() < 0.1 else line

    def objects(self, record: Record) -> list[Record]:
        """The record, its turns and their parts."""
        turns = [turn for key in ("conversations", "messages") for turn in _objects_in(record.get(key))]
        return [record, *turns, *(part for turn in turns for part in _objects_in(turn.get("content")))]


def _objects_in(value: Any) -> list[Record]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _rename(maker: Maker, record: Record) -> Record:
    chosen = maker.rng.choice(maker.objects(record))
    keys = [key for key in chosen if key in _OTHER_KEYS]
    if keys:
        key = maker.rng.choice(keys)
        chosen[maker.rng.choice(_OTHER_KEYS[key])] = chosen.pop(key)
    return record


def _add(maker: Maker, record: Record) -> Record:
    """A key that nothing reads: words, or a medium in some form."""
    encoded = base64.b64encode(b"\x89PNG\r\n\x1a\n" + maker.rng.randbytes(90)).decode()
    other = f"other{maker.rng.randrange(99)}.png"
    values = [
        maker.word(), [maker.word()], {"a": maker.word()}, other, [other], {"path": other}, "clip.mp4", "s.wav",
        f"data:image/png;base64,{encoded}", encoded, {"bytes": encoded, "path": None}, "https://example.org/a.jpg",
        [{"url": other}],
    ]  # fmt: skip
    keys = ("notes", "extra_info", "img2", "video", "audios", "frames", "reasoning_content", "tools", "depth_map", "x")
    maker.rng.choice(maker.objects(record))[maker.rng.choice(keys)] = maker.rng.choice(values)
    return record


def _mark(maker: Maker, record: Record) -> Record:
    """A mark of any tool somewhere in a text, in place of `<image>` or beside it."""
    mark = maker.rng.choice(MARKS)
    for chosen in maker.objects(record):
        for key, value in chosen.items():
            if isinstance(value, str) and key in ("value", "content", "text", "caption", "instruction", "output"):
                if "<image>" in value and maker.rng.random() < 0.7:
                    chosen[key] = value.replace("<image>", mark)
                elif maker.rng.random() < 0.4:
                    chosen[key] = maker.rng.choice(
                        [f"{mark}{value}", f"{value}{mark}", f"so {mark} {value}", f"{mark}\n{value}"]
                    )
    return record


def _drop(maker: Maker, record: Record) -> Record:
    chosen = maker.rng.choice(maker.objects(record))
    if chosen:
        chosen.pop(maker.rng.choice(list(chosen)))
    return record


def _spoil(maker: Maker, record: Record) -> Record:
    chosen = maker.rng.choice(maker.objects(record))
    if chosen:
        chosen[maker.rng.choice(list(chosen))] = maker.rng.choice(_JUNK)
    return record


def _unlearn(maker: Maker, record: Record) -> Record:
    """A reply, or the whole record, that must not be learned."""
    flag: Record = maker.rng.choice([{"loss": False}, {"weight": 0}, {"train": False}, {"loss": 0.0}])
    replies = [turn for turn in maker.objects(record) if turn.get("from") == "gpt" or turn.get("role") == "assistant"]
    if replies and maker.rng.random() < 0.7:
        reply = maker.rng.choice(replies)
        for key in ("value", "content"):
            if key in reply:
                reply[key] = maker.word("x")
        reply |= flag
        return record
    whole: Record = maker.rng.choice([flag, {"label": False}, {"kto_tag": False}])
    return _as_unlearned(record) | whole


def _as_unlearned(record: Record) -> Record:
    """The record with every `w12z` as `x12z`."""
    return json.loads(re.sub(r"\bw(\d+z)", r"x\1", json.dumps(record)))


def _prefer(maker: Maker, record: Record) -> Record:
    key = maker.rng.choice(["rejected", "rejected_response", "chosen", "Rejected"])
    chosen = maker.rng.choice(maker.objects(record)[: 1 if maker.rng.random() < 0.8 else None])
    chosen[key] = maker.rng.choice([maker.word("x"), {"from": "gpt", "value": maker.word("x")}])
    return _as_unlearned(record)


def _turns(maker: Maker, record: Record) -> Record:
    """Turns out of order, twice, of another role, or silent."""
    key = next((key for key in ("conversations", "messages") if isinstance(record.get(key), list)), None)
    if key is None or not record[key]:
        return record
    turns, rng = record[key], maker.rng
    kind = rng.randrange(5)
    if kind == 0:
        rng.shuffle(turns)
    elif kind == 1:
        turns.insert(rng.randrange(len(turns)), copy.deepcopy(rng.choice(turns)))
    elif kind == 2:
        turns.append(rng.choice([None, "Hi", [], {"from": "narrator", "value": maker.word()}]))
    elif kind == 3 and isinstance(turns[-1], dict):
        turns[-1].update({key: "" for key in ("value", "content") if key in turns[-1]})
    else:
        record["history"] = rng.choice(
            [[[maker.word(), maker.word()]], [maker.word()], {"a": 1}, [[1, 2]], [[maker.word()]]]
        )
    return record


def _pictures(maker: Maker, record: Record) -> Record:
    """More, fewer, missing or oddly named pictures, for the record, a turn or a part."""
    names = [
        *maker.images,
        "none.png",
        "../a.png",
        "/etc/passwd",
        "a\0.png",
        "x" * 300 + ".png",
        "C:\\a.png",
        "",
        "http://x/a.png",
    ]
    value = maker.rng.choice(
        [maker.rng.choice(names), [maker.rng.choice(names) for _ in range(maker.rng.randrange(4))]]
    )
    chosen = maker.rng.choice(maker.objects(record))
    chosen[maker.rng.choice(["image", "images", "index", "image_url"])] = maker.rng.choice(
        [value, {"path": value}, 1, -1]
    )
    return record


_MUTATIONS: tuple[Callable[[Maker, Record], Record], ...] = (
    _rename, _add, _add, _mark, _mark, _drop, _spoil, _turns, _pictures,
)  # fmt: skip
_LINES: tuple[Callable[[Maker, bytes], bytes], ...] = (
    lambda maker, line: line[: maker.rng.randrange(len(line))],
    lambda maker, line: line + b",",
    lambda maker, line: line.replace(b"}", b', "id": 1, "id": 2}', 1),
    lambda maker, line: line.replace(b'"', b"\xff", 1),
    lambda maker, line: b"[" + line + b"]",
    lambda maker, line: line.replace(b": ", b": NaN, ", 1),
    lambda maker, line: b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    lambda maker, line: line.replace(b"w", b"\x00", 1),
)


def write_hostile_picture(rng: random.Random, path: Path) -> None:
    """A picture file that is damaged, a bomb, another thing, or no file at all."""
    content = _encoded(rng)
    kind = rng.randrange(8)
    if kind == 0:
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind == 1:
        path.write_bytes(_flipped(rng, content))
    elif kind == 2:
        path.write_bytes(rng.randbytes(rng.randrange(400)))
    elif kind == 3:
        others = (b"", b"<!DOCTYPE html>", b"<svg/>", b"version https://git-lfs.github.com/spec/v1\n", b"%PDF-1.7",
                  b"\0\0\0\x18ftypheic", b"\0\0\0\x18ftypavif", b"../x/a.png", b'{"error": 404}')  # fmt: skip
        path.write_bytes(rng.choice(others))
    elif kind == 4:
        path.write_bytes(_bomb(rng))
    elif kind == 5:
        path.write_bytes(content[:20] + rng.randbytes(rng.randrange(60)) + content[20:])
    elif kind == 6:
        _odd_file(rng, path)
    else:
        path.write_bytes(content + rng.randbytes(rng.randrange(200)))


def _encoded(rng: random.Random) -> bytes:
    mode = rng.choice(["RGB", "RGBA", "L", "P", "1", "I;16", "F", "CMYK", "LA"])
    size = (rng.randint(1, 40), rng.randint(1, 40))
    image = Image.frombytes("L", size, rng.randbytes(size[0] * size[1]))
    if mode == "P":
        image = image.convert("RGB").quantize(rng.choice([2, 16, 256]))
    else:
        image = image.convert(mode) if mode not in ("I;16", "LA") else image.convert({"I;16": "I", "LA": "L"}[mode])
    for format in rng.sample(FORMATS, len(FORMATS)):
        out = io.BytesIO()
        try:
            image.save(out, format)
        except (OSError, ValueError):  # a mode that the format does not know
            continue
        return out.getvalue()
    raise AssertionError(mode)


def _flipped(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 30)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _bomb(rng: random.Random) -> bytes:
    """A PNG that says it is large, or holds megabytes of text."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    side = rng.choice([0, 1, 9, 20_000, 2**31 - 1])
    head = chunk(b"IHDR", side.to_bytes(4, "big") + rng.choice([1, 9, 30_000]).to_bytes(4, "big") + b"\x08\x02\0\0\0")
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(rng.choice([10, 4 << 20]))))
    return b"\x89PNG\r\n\x1a\n" + head + text + chunk(b"IDAT", zlib.compress(bytes(500))) + chunk(b"IEND", b"")


def _odd_file(rng: random.Random, path: Path) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to("/etc/passwd")
    # else: no file
