"""TRL's SFTTrainer over the same model and conversations.

It pads as transformers' Trainer does, and learns all tokens of the text: with images it leaves out prompts only of one
question and its answer. So its loss is another one, at the same cost.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts/

from bench_peers.meter import Result, Task, matmul_flops, print_result, read_task
from bench_peers.peer import TrainerClock, load_llava, train_only

ROLES = {"human": "user", "gpt": "assistant"}


def measure(task: Task) -> Result:
    import torch
    import transformers
    import trl
    from transformers import AutoProcessor

    clock = TrainerClock(task)
    with tempfile.TemporaryDirectory() as folder:
        trainer = clock.watch(trl.SFTTrainer)(
            model=train_only(load_llava(task), task),
            args=trl.SFTConfig(folder, **clock.arguments(), max_length=None),
            train_dataset=read_records(task),
            processing_class=AutoProcessor.from_pretrained(task.llava),
            callbacks=[clock],
        )
        trainer.train()
    return clock.result(
        matmul_flops(task.device, task.precision),
        None,
        f"trl {trl.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    )


def read_records(task: Task) -> Any:
    import datasets

    folder = Path(task.parts) / "data"
    records = [json.loads(line) for line in (folder / "conversations.jsonl").read_text().splitlines()]
    rows = [
        {
            "images": [str(folder / "images" / name) for name in record["images"]],
            "messages": [
                {"role": ROLES[turn["from"]], "content": turn["value"].removeprefix("<image>\n")}
                for turn in record["conversations"]
            ],
        }
        for record in records
    ]
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.Sequence(datasets.Image()))


if __name__ == "__main__":
    print_result(measure(read_task()))
