"""transformers' Trainer over LlavaForConditionalGeneration: padded batches, logits at all positions.

What someone writes who takes the documented classes: the records tokenized once beforehand (by our tokenizer, so that
all train on the same tokens), images read in the collator, everything else as transformers has it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts/

from bench_peers.meter import Result, Task, matmul_flops, print_result, read_task
from bench_peers.peer import TrainerClock, load_llava, train_only

LOSS_RECORDS = 2


class Records:
    """Tokenized by vlm, images as paths, in the order of the file."""

    def __init__(self, task: Task) -> None:
        from transformers import AutoTokenizer

        from vlm.config import load_config
        from vlm.data.build import build_conversation_tokenizer, build_reader
        from vlm.models.build import build_image_spec
        from vlm.models.llm import IMAGE_TOKEN

        config = load_config(task.config)
        tokenizer = AutoTokenizer.from_pretrained(task.llava)
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.spec = build_image_spec(config.model)
        tokens = build_conversation_tokenizer(config.data, tokenizer, self.spec, self.image_id)
        reader = build_reader(config.data, config.data.sources, tokens)
        self.examples = [reader.read(number) for number in range(len(reader))]
        self.pad_id = tokens.pad_token_id

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Any:
        return self.examples[number]

    def collate(self, examples: list[Any]) -> dict[str, Any]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from vlm.data.images import load_image, to_tiles

        def pad(rows: list[list[int]], value: int) -> torch.Tensor:
            return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

        pixels = [to_tiles(load_image(image), self.spec) for example in examples for image in example.images]
        return {
            "input_ids": pad([example.input_ids for example in examples], self.pad_id),
            "labels": pad([example.labels for example in examples], -100),
            "attention_mask": pad([[1] * len(example.input_ids) for example in examples], 0),
            "pixel_values": torch.cat(pixels),
        }


def measure(task: Task) -> Result:
    import torch
    import transformers
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    records = Records(task)
    model = train_only(load_llava(task), task)
    with torch.no_grad():
        first = {key: value.to(task.device) for key, value in records.collate(records.examples[:LOSS_RECORDS]).items()}
        with torch.autocast(task.device, torch.bfloat16, enabled=task.precision == "bf16"):
            first_loss = model(**first).loss.item()
    clock = TrainerClock(task)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, **clock.arguments(), remove_unused_columns=False)
        trainer = clock.watch(Trainer)(
            model=model, args=arguments, train_dataset=records, data_collator=records.collate, callbacks=[clock]
        )
        trainer.train()
    return clock.result(
        matmul_flops(task.device, task.precision),
        first_loss,
        f"torch {torch.__version__}, transformers {transformers.__version__}",
    )


if __name__ == "__main__":
    print_result(measure(read_task()))
