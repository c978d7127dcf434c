"""Drawn images with captions and questions, which stand in a project until its own data does."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from PIL import Image, ImageDraw

_COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (230, 200, 40)}
_SHAPES = ("circle", "square", "triangle")
_COPIES = 2
_SIDE = 96  # pixels
CAPTIONS, CONVERSATIONS, IMAGES = "captions.jsonl", "conversations.jsonl", "images"


def write_drawn(folder: Path) -> None:
    """24 images in `images/`, captions.jsonl and conversations.jsonl; the same each time."""
    (folder / IMAGES).mkdir(parents=True)
    captions, conversations = [], []
    for copy, colour, shape in itertools.product(range(_COPIES), _COLOURS, _SHAPES):
        name = f"{colour}-{shape}-{copy}.png"
        _draw(_COLOURS[colour], shape, 8 + 24 * copy).save(folder / IMAGES / name)
        captions.append({"image": name, "caption": f"A {colour} {shape}."})
        turns = [
            {"from": "human", "value": "<image>\nWhich shape is it?"},
            {"from": "gpt", "value": f"A {shape}."},
            {"from": "human", "value": "Which colour?"},
            {"from": "gpt", "value": f"It is {colour}."},
        ]
        conversations.append({"image": name, "conversations": turns})
    for file, records in ((CAPTIONS, captions), (CONVERSATIONS, conversations)):
        (folder / file).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _draw(colour: tuple[int, int, int], shape: str, left: int) -> Image.Image:
    image = Image.new("RGB", (_SIDE, _SIDE), "white")
    pen, right = ImageDraw.Draw(image), left + _SIDE // 2
    box = (left, left, right, right)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(left, right), ((left + right) // 2, left), (right, right)], fill=colour)
    return image
