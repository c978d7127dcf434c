"""What the peers over transformers' Trainer share: the model, what of it trains, and a callback that times steps.

Needs torch, transformers and peft, and of ours `vlm.compat` alone.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from bench_peers.meter import Meter, Result, Task
from vlm import compat

compat.prepare()

from transformers import AutoTokenizer, LlavaForConditionalGeneration, TrainerCallback  # noqa: E402

LINEAR = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


def load_llava(task: Task) -> Any:
    dtype = torch.bfloat16 if task.precision == "bf16" else torch.float32
    model: Any = LlavaForConditionalGeneration.from_pretrained(task.llava, dtype=dtype)
    model.config.use_cache = False
    return model.to(task.device)


def train_only(model: Any, task: Task) -> Any:
    """Freeze what the job does not train; what it trains is float32, as in ours."""
    model.requires_grad_(task.job == "J2")
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if task.job == "J2-lora":
        from peft import LoraConfig, get_peft_model

        projector = list(model.model.multi_modal_projector.parameters())
        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, target_modules=rf".*language_model.*\.({LINEAR})")
        )
        for parameter in projector:
            parameter.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


class TrainerClock(TrainerCallback):
    """Times the steps of a Trainer after the warm-up, and counts what they compute."""

    def __init__(self, task: Task) -> None:
        self.task, self.meter = task, Meter(task.device)
        self.pad_id = AutoTokenizer.from_pretrained(task.llava).pad_token_id
        self.records = self.slots = 0
        self.tokens: Any = 0  # on the device until they are read
        self.supervised: Any = 0
        self.phases = {"data": 0.0, "forward_backward": 0.0, "optimizer": 0.0}
        self._since, self._spent, self._is_counting = 0.0, {}, False

    def arguments(self) -> dict[str, Any]:
        """Of TrainingArguments."""
        task = self.task
        recompute = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if task.checkpointing else {}
        return {
            "per_device_train_batch_size": task.batch, "dataloader_drop_last": True,
            "max_steps": 1_000_000,  # stopped by `on_step_end`
            "learning_rate": 1e-3 if task.job == "J1" else 1e-4, "lr_scheduler_type": "constant",
            "bf16": task.precision == "bf16", "use_cpu": task.device == "cpu", "seed": 0,
            "save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True,
            "gradient_checkpointing": task.checkpointing, **recompute,  # said, as TRL has it on by default
        }  # fmt: skip

    def watch(self, trainer: Any) -> Any:
        """A kind of Trainer that counts the tokens of what it computes."""
        clock = self

        class Watched(trainer):  # type: ignore[misc, valid-type]
            def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
                if clock._is_counting:
                    clock.count(inputs)
                return super().compute_loss(model, inputs, *rest, **more)

        return Watched

    def count(self, inputs: Any) -> None:
        self.records += len(inputs["pixel_values"])  # a record shows one image
        self.slots += inputs["input_ids"].numel()
        self.tokens += (inputs["input_ids"] != self.pad_id).sum()
        self.supervised += (inputs["labels"][:, 1:] != -100).sum()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._pass("data")

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:  # gradients are clipped already
        self._pass("forward_backward")

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._pass("optimizer")

    def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.task.warmup:
            self._is_counting = True
            self.meter.start()
        elif self.records >= self.task.samples:
            self._spent = self.meter.stop()
            control.should_training_stop = True
        self._since = time.perf_counter()

    def _pass(self, phase: str) -> None:
        now = time.perf_counter()
        if self._is_counting and self.task.device == "cpu":  # a GPU is not waited for
            self.phases[phase] += now - self._since
        self._since = now

    def result(self, matmul_flops: float, first_loss: float | None, versions: str) -> Result:
        return Result(
            records=self.records,
            tokens=float(self.tokens),
            supervised=float(self.supervised),
            slots=self.slots,
            **self._spent,
            matmul_flops=matmul_flops,
            first_loss=first_loss,
            phases=self.phases if self.task.device == "cpu" else {},
            versions=versions,
        )
