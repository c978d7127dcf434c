"""A run counts where its images stand, for the export to say."""

from __future__ import annotations

import json

from vlm.config import load_config
from vlm.run import train
from vlm.train.checkpoint import newest_verified, read_info


def test_a_checkpoint_says_where_the_images_of_the_training_records_stand(config_file, tiny, tmp_path):
    """Held-out records are not trained on, and not counted."""
    lines = (tiny / "data/finetune.jsonl").read_text(encoding="utf-8").splitlines()
    first = next(line for line in lines if '"<image>' in line)
    question = next(text for text in json.loads(first)["conversations"] if "<image>" in text["value"])["value"]
    last = first.replace(json.dumps(question), json.dumps("What? <image>"))
    (tmp_path / "mixed.jsonl").write_text(f"{first}\n" * 6 + f"{last}\n" * 2, encoding="utf-8")
    source = {"path": str(tmp_path / "mixed.jsonl"), "images": str(tiny / "data/images")}
    path = config_file(data__sources=[source], data__held_out=0, train__max_steps=1, train__prove=False)
    folder = train(load_config(path), path.read_text())
    assert read_info(newest_verified(folder))["image_orders"] == {"first": 6, "last": 2}
