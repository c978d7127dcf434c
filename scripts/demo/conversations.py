"""Pictures with names and kinds -> training records and evaluation records."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.pictures import Picture

# kind -> English answer, and the thing's name in Chinese
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


def split(pictures: Sequence[Picture], num_test: int, seed: int) -> tuple[list[Picture], list[Picture]]:
    """Train and test, whole families on one side, test spread over the kinds like the whole.

    Only families of one picture are tested, so that no near copy of a test picture was trained on.
    """
    families: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        families[picture.family].append(picture)
    single: dict[str, list[Picture]] = defaultdict(list)
    for members in families.values():
        if len(members) == 1 and members[0].kind is not None:
            single[members[0].kind].append(members[0])
    total = sum(map(len, single.values()))
    test = []
    for kind in sorted(single):
        random.Random(f"{seed} {kind}").shuffle(single[kind])
        test += single[kind][: round(num_test * len(single[kind]) / total)]
    names = {picture.name for picture in test}
    return [picture for picture in pictures if picture.name not in names], test


def captions(pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    """Stage 1: every picture with its English name, and with its Chinese one where there is one."""
    records = []
    for picture in pictures:
        records.append({"image": picture.name, "caption": picture.english})
        if picture.chinese:
            records.append({"image": picture.name, "caption": picture.chinese})
    return records


def conversations(pictures: Sequence[Picture], seed: int) -> list[dict[str, Any]]:
    """Stage 2: conversations of one to three turns about each picture, about a quarter of them in Chinese."""
    records = []
    for picture in pictures:
        rng = random.Random(f"{seed} {picture.name}")
        turns = [(rng.choice(ASK_NAME), picture.english)]
        if picture.kind is not None:
            turns += [_kind_turn(picture.kind, rng), _yes_no_turn(picture.kind, rng)]
            rng.shuffle(turns)
            # The question of the kind alone, too: it is the one that a user asks first.
            records.append(_record(picture, [_kind_turn(picture.kind, rng)]))
        records.append(_record(picture, turns[: rng.randint(1, len(turns))]))
        if picture.chinese and rng.random() < 0.5:
            records.append(_record(picture, _chinese_turns(picture, rng)))
    return records


def kind_questions(pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    choices = [_capital(name) for name, _ in KINDS.values()]
    return [
        {"image": p.name, "prompt": ASK_KIND[0], "choices": choices, "answer": _capital(KINDS[p.kind][0])}
        for p in pictures
        if p.kind is not None
    ]


def caption_questions(pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    return [{"image": p.name, "prompt": ASK_NAME[0], "answer": p.english} for p in pictures]


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def _kind_turn(kind: str, rng: random.Random) -> tuple[str, str]:
    return rng.choice(ASK_KIND), _capital(KINDS[kind][0])


def _yes_no_turn(kind: str, rng: random.Random) -> tuple[str, str]:
    asked = kind if rng.random() < 0.5 else rng.choice([other for other in KINDS if other != kind])
    question = f"Is this {KINDS[asked][0]}?"
    return question, "Yes." if asked == kind else f"No, it is {KINDS[kind][0]}."


def _chinese_turns(picture: Picture, rng: random.Random) -> list[tuple[str, str]]:
    turns = [(rng.choice(ASK_NAME_ZH), picture.chinese or "")]
    if picture.kind is not None and rng.random() < 0.5:
        turns.append((rng.choice(ASK_KIND_ZH), f"{KINDS[picture.kind][1]}。"))
    return turns


def _record(picture: Picture, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    spoken = []
    for number, (question, answer) in enumerate(turns):
        spoken.append({"from": "human", "value": f"<image>\n{question}" if number == 0 else question})
        spoken.append({"from": "gpt", "value": answer})
    return {"image": picture.name, "conversations": spoken}


def _capital(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
