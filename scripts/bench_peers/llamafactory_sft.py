"""LLaMA-Factory's supervised finetuning with neat_packing, over the same model and the same file of conversations."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts/

from bench_peers.meter import Result, Task, matmul_flops, print_result, read_task
from bench_peers.peer import TrainerClock

ROW = 2048  # tokens, cutoff_len


def measure(task: Task) -> Result:
    import llamafactory.train.sft.workflow as workflow
    import torch
    import transformers
    from llamafactory.extras.env import VERSION
    from llamafactory.train.tuner import run_exp

    register_chatml()
    clock = TrainerClock(task)
    workflow.CustomSeq2SeqTrainer = clock.watch(workflow.CustomSeq2SeqTrainer)
    with tempfile.TemporaryDirectory() as folder:
        write_dataset_info(Path(folder), task)
        run_exp(arguments(task, clock, folder), callbacks=[clock])
    return clock.result(
        matmul_flops(task.device, task.precision),
        None,  # it takes its own way to batches
        f"llamafactory {VERSION}, torch {torch.__version__}, transformers {transformers.__version__}",
    )


def register_chatml() -> None:
    """ChatML with LLaVA's images; its own `chatml` has none."""
    from llamafactory.data.formatter import StringFormatter
    from llamafactory.data.mm_plugin import get_mm_plugin
    from llamafactory.data.template import register_template

    register_template(
        name="bench",
        format_user=StringFormatter(slots=["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]),
        format_assistant=StringFormatter(slots=["{{content}}<|im_end|>\n"]),
        stop_words=["<|im_end|>"],
        replace_eos=True,
        mm_plugin=get_mm_plugin(name="llava", image_token="<image>"),
    )


def write_dataset_info(folder: Path, task: Task) -> None:
    records = Path(task.parts) / "data/conversations.jsonl"
    entry = {
        "file_name": str(records), "formatting": "sharegpt",
        "columns": {"messages": "conversations", "images": "images"},
    }  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps({"bench": entry}))


def arguments(task: Task, clock: TrainerClock, folder: str) -> dict[str, Any]:
    is_lora = task.job == "J2-lora"
    adapters = {"lora_rank": 16, "lora_alpha": 32, "lora_target": "all", "additional_target": "multi_modal_projector"}
    return clock.arguments() | {
        "stage": "sft", "do_train": True, "model_name_or_path": task.llava, "template": "bench",
        "dataset": "bench", "dataset_dir": folder, "media_dir": str(Path(task.parts) / "data/images"),
        "output_dir": f"{folder}/run", "finetuning_type": "lora" if is_lora else "full",
        "freeze_vision_tower": True, "freeze_multi_modal_projector": False, "flash_attn": "sdpa",
        "cutoff_len": ROW, "packing": True, "neat_packing": True, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": max(1, round(task.batch * task.tokens / ROW)),
        "disable_gradient_checkpointing": not task.checkpointing, "preprocessing_num_workers": 1,
        "overwrite_cache": True, "plot_loss": False,
    } | (adapters if is_lora else {})  # fmt: skip


if __name__ == "__main__":
    print_result(measure(read_task()))
