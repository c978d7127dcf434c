import json
import random

import pytest
from demo.tiny import draw
from tokenizers_for_tests import byte_level_bpe

from vlm.batch import ImageSpec

SPEC = ImageSpec(size=28, mean=(0.5,) * 3, std=(0.5,) * 3, num_tokens=3)
TOKENIZER = byte_level_bpe()


@pytest.fixture
def spec():
    return SPEC


@pytest.fixture
def bpe():
    return TOKENIZER


@pytest.fixture
def records(tmp_path):
    """Writes `count` LLaVA records with images; every third is text alone. Returns the file."""

    def write(count, name="records.jsonl", longest=1):
        rng = random.Random(0)
        lines = []
        for number in range(count):
            record = {"conversations": []}
            if number % 3:
                draw("red", "circle", rng).save(tmp_path / f"{number}.png")
                record["image"] = f"{number}.png"
            for turn in range(1 + number % longest):
                mark = "<image>\n" if turn == 0 and "image" in record else ""
                record["conversations"] += [
                    {"from": "human", "value": f"{mark}Question {number}?"},
                    {"from": "gpt", "value": f"Answer {number}."},
                ]
            lines.append(json.dumps(record))
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return path

    return write
