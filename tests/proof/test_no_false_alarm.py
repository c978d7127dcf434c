"""Runs in which nothing is wrong pass, whatever is unusual about their records or their model."""

import json
import math

import pytest
from proof_setups import make_parts

from vlm.proof.prove import prove


@pytest.fixture
def records(root, tmp_path):
    """Changes to a config, whose data are these conversations: (image or None, then what each says, the user first)."""

    def write(*conversations):
        images = sorted(path.name for path in (root / "data/images").glob("*.png"))
        lines = []
        for number, (has_image, *said) in enumerate(conversations):
            turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]
            lines.append({"conversations": turns} | ({"image": images[number]} if has_image else {}))
        (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {"sources": [{"path": str(tmp_path / "records.jsonl"), "images": str(root / "data/images")}]}

    return write


def test_records_that_were_cut_end_with_the_last_reply_that_fits(root, records):
    """The question that follows it would fit too, but the answer to that does not."""
    talk = ("<image>\nWhat is this?", "A red circle.", "What else?", "A blue square and a green circle. " * 30)
    data = records((True, *talk), (True, *talk)) | {"over_long": "cut"}
    proof = prove(make_parts(root, "lora", data=data), seconds=math.inf)
    assert proof.failed == []
    assert proof.findings["text"].passed is True
