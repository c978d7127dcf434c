"""Pictures with names and kinds -> training records and evaluation records."""

from __future__ import annotations

import collections
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demo.pictures import Picture

# kind -> its name in an English answer, and in Chinese
KINDS = {
    "animal": ("an animal", "动物"),
    "plant": ("a plant", "植物"),
    "food": ("food or drink", "食物或饮料"),
    "face": ("a face", "表情"),
    "person": ("a person", "人物"),
    "vehicle": ("a vehicle", "交通工具"),
    "place": ("a place", "地点"),
    "object": ("an object", "物品"),
    "symbol": ("a symbol", "符号"),
    "flag": ("a flag", "旗帜"),
}
ASK_NAME = ("What is this?", "Describe the picture.", "What do you see?", "What does the picture show?")
ASK_KIND = ("What kind of thing is this?", "What kind of thing does the picture show?", "Which kind of thing is it?")
ASK_NAME_ZH = ("这是什么？", "描述这张图片。")
ASK_KIND_ZH = ("这是哪一类东西？", "它属于哪一类？")
CHINESE_SHARE = 0.15  # of the conversations: the LLM reads Chinese byte by byte, so these are long
YES_NO_SHARE = 0.3  # of the English conversations about pictures with a kind
FEWEST_TESTED = 10  # pictures of a kind, as far as there are any


def split(
    pictures: Sequence[Picture], num_test: int, num_valid: int, seed: int
) -> tuple[list[Picture], list[Picture], list[Picture]]:
    """Train, valid and test.

    Only pictures that are alone in their family leave "train", so no near copy of a tested picture is trained on. Test
    and valid have the kinds in the shares in which such pictures have them, and FEWEST_TESTED of each at least (less in
    a small part). Each picture's place in the draw depends on its name alone, so that leaving out the stamps moves
    few of the others.
    """
    members = collections.Counter(picture.family for picture in pictures)
    alone: dict[str, list[Picture]] = {}
    for picture in sorted(pictures, key=lambda picture: hashlib.sha256(f"{seed} {picture.name}".encode()).digest()):
        if picture.kind is not None and members[picture.family] == 1:
            alone.setdefault(picture.kind, []).append(picture)
    test, valid = [], []
    counts = {kind: len(found) for kind, found in alone.items()}
    for kind, count in shares(counts, num_test).items():
        test += alone[kind][:count]
    for kind, count in shares(counts, num_valid).items():
        valid += alone[kind][len(alone[kind]) - count :]
    taken = {picture.name for picture in (*test, *valid)}
    return [picture for picture in pictures if picture.name not in taken], valid, test


def shares(counts: Mapping[str, int], size: int) -> dict[str, int]:
    """`size` things dealt out in proportion to `counts`, FEWEST_TESTED each at least.

    >>> shares({"animal": 300, "plant": 15}, 100)
    {'animal': 90, 'plant': 10}
    """
    least = min(FEWEST_TESTED, size // (2 * len(counts)))
    total = sum(counts.values())
    dealt = {kind: max(least, round(size * count / total)) for kind, count in sorted(counts.items())}
    while (over := sum(dealt.values()) - size) != 0:
        largest = max(dealt, key=lambda kind: dealt[kind])
        dealt[largest] -= 1 if over > 0 else -1
    return dealt


def captions(pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    """Stage 1: every picture with its English name, and its kind where it has one, before the name of every other
    picture: a kind behind the name can be told from the name, one before it only from the picture."""
    return [{"image": p.name, "caption": _caption(p)} for p in pictures]


def conversations(pictures: Sequence[Picture], seed: int) -> list[dict[str, Any]]:
    """Stage 2: a conversation of one to three turns about each picture, some of them in Chinese."""
    kinds = collections.Counter(picture.kind for picture in pictures if picture.kind is not None)
    records = []
    for picture in pictures:
        rng = random.Random(f"{seed} {picture.name}")
        if picture.chinese and rng.random() < CHINESE_SHARE:
            turns = _chinese_turns(picture, rng)
        else:
            turns = _english_turns(picture, kinds, rng)
        records.append(_record(picture, turns))
    return records


def shuffled(pictures: Sequence[Picture], seed: int) -> list[Picture]:
    """The same pictures in an order without kinds, so that the first so many are like all of them."""
    return random.Random(seed).sample(pictures, len(pictures))


def kind_questions(pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    choices = [_capital(name) for name, _ in KINDS.values()]
    return [
        {"image": p.name, "prompt": ASK_KIND[0], "choices": choices, "answer": _capital(KINDS[p.kind][0])}
        for p in pictures
        if p.kind is not None
    ]


def kind_pairs(pictures: Sequence[Picture], num_couples: int, seed: int) -> list[dict[str, Any]]:
    """Stage 3: two pictures of different kinds at a time, about each the question for its kind, and the kind of the
    other as the wrong answer. So each kind is wrong as often as it is right: a model that does not look wins half."""
    rng = random.Random(f"{seed} pairs")
    with_kind = [picture for picture in pictures if picture.kind is not None]
    records = []
    for picture in rng.sample(with_kind, min(num_couples, len(with_kind))):
        other = rng.choice([each for each in with_kind if each.kind != picture.kind])
        asked = rng.choice(ASK_KIND)
        for shown, wrong in ((picture, other), (other, picture)):
            answers = {"chosen": _capital(KINDS[shown.kind][0]), "rejected": _capital(KINDS[wrong.kind][0])}
            records.append({"image": shown.name, "prompt": asked, **answers})
    return records


def kind_answers(pictures: Sequence[Picture], seed: int) -> list[dict[str, Any]]:
    """For replies that the model writes itself: about each picture of a kind the question for it, and the answer."""
    records = []
    for picture in (p for p in pictures if p.kind is not None):
        asked, right = _kind_turn(picture.kind, random.Random(f"{seed} answer {picture.name}"))
        records.append({"image": picture.name, "prompt": asked, "answer": right})
    return records


def caption_questions(pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    return [{"image": p.name, "prompt": ASK_NAME[0], "answer": p.english} for p in pictures]


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def _caption(picture: Picture) -> str:
    if picture.kind is None:
        return picture.english
    parts = [picture.english, _capital(KINDS[picture.kind][0])]
    kind_first = hashlib.sha256(picture.name.encode()).digest()[-1] % 2 == 1
    return " ".join(reversed(parts) if kind_first else parts)


def _kind_turn(kind: str, rng: random.Random) -> tuple[str, str]:
    return rng.choice(ASK_KIND), _capital(KINDS[kind][0])


def _yes_no_turn(kind: str, kinds: Mapping[str, int], rng: random.Random) -> tuple[str, str]:
    """Yes and no equally often, about so for each kind asked about too: else the question would tell the answer."""
    asked = kind
    if rng.random() < 0.5:
        others = [other for other in kinds if other != kind]
        asked = rng.choices(others, [kinds[other] for other in others])[0] if others else kind
    return f"Is this {KINDS[asked][0]}?", "Yes." if asked == kind else f"No, it is {KINDS[kind][0]}."


def _english_turns(picture: Picture, kinds: Mapping[str, int], rng: random.Random) -> list[tuple[str, str]]:
    turns = [(rng.choice(ASK_NAME), picture.english)]
    if picture.kind is None:
        return turns
    turns.append(_kind_turn(picture.kind, rng))
    rng.shuffle(turns)
    return [*turns, _yes_no_turn(picture.kind, kinds, rng)] if rng.random() < YES_NO_SHARE else turns


def _chinese_turns(picture: Picture, rng: random.Random) -> list[tuple[str, str]]:
    name = (rng.choice(ASK_NAME_ZH), picture.chinese or "")
    if picture.kind is None:
        return [name]
    kind = (rng.choice(ASK_KIND_ZH), f"{KINDS[picture.kind][1]}。")
    return [name, kind] if rng.random() < 0.5 else [kind]


def _record(picture: Picture, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    spoken = []
    for number, (question, answer) in enumerate(turns):
        spoken.append({"from": "human", "value": f"<image>\n{question}" if number == 0 else question})
        spoken.append({"from": "gpt", "value": answer})
    return {"id": Path(picture.name).stem, "image": picture.name, "conversations": spoken}


def _capital(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
