"""Config sections of the training package."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vlm.schema import PathText, Section, TrainablePart


class SampleConfig(Section):
    """A question asked of the model every `sample_every` steps; the answer goes to the log."""

    prompt: str
    """The question."""
    image: PathText | None = None
    """An image file; null asks about none."""


# what a line of metrics.jsonl has beside the objective's numbers and the held-out loss, see `Reporter.record`
LINE_NAMES = frozenset({
    "step", "epoch", "loss", "grad_norm", "learning_rate", "supervised_tokens", "tokens_per_second",
    "images_per_second", "fill", "data_share", "step_seconds", "data_seconds", "encode_seconds",
    "forward_backward_seconds", "optimizer_seconds", "save_seconds", "skipped", "bad_steps", "memory_gib", "seconds",
    "rollouts_seconds", "loss_scale", "overflowed_steps", "failed_gates",
})  # fmt: skip

RISING = ("held_out_accuracy", "held_out_margin")  # what `keep_best` may name of preferences; more is better


class TrainConfig(Section):
    epochs: PositiveFloat | None = None
    """Passes over the data; turned into steps before the first one."""
    max_steps: PositiveInt | None = None
    """Optimizer steps. Exactly one of epochs and max_steps is set."""
    global_batch_size: PositiveInt = 32
    """Packed rows per optimizer step, over all ranks."""
    micro_batch_size: PositiveInt = 1
    """Packed rows per rank per forward."""
    learning_rate: PositiveFloat = 1e-3
    """The peak of the schedule."""
    learning_rates: dict[TrainablePart, PositiveFloat] = Field(default_factory=dict)
    """Per trainable part, where it differs from learning_rate."""
    lora_b_rate_ratio: PositiveFloat = 1.0
    """LoRA+: the rate of the adapters' second matrix, which starts at zero, over that of the first; 16 is usual."""
    thaw: dict[TrainablePart, PositiveInt] = Field(default_factory=dict)
    """Part -> how many steps it stands still before it trains: {vision: 500}."""
    schedule: Literal["constant", "linear", "cosine", "step"] = "cosine"
    """How the rate falls after the warm-up. step: to decay_factor of it every decay_every steps."""
    decay_every: PositiveInt | None = None
    """Optimizer steps between two falls of schedule step."""
    decay_factor: Annotated[float, Field(gt=0, lt=1)] | None = None
    """What of the rate is left after each of them; null is 0.1."""
    warmup_steps: NonNegativeInt | None = None
    """Optimizer steps over which the rate rises to its peak."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """The same as a share of all steps."""
    warmup_start_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """What the rate rises from, as a share of the peak."""
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The schedule's floor, as a share of the peak."""
    weight_decay: NonNegativeFloat = 0.0
    """Of matrices; norms, biases, class tokens, tables of positions and other vectors are not decayed."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """adamw: torch's. The others are bitsandbytes': state in 8 bits, in pages that may leave the GPU, or both."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this norm; null never."""
    precision: Literal["auto", "fp32", "bf16", "bf16_autocast", "fp16"] = "auto"
    """auto: bf16 where the device has it natively and it is faster, measured once per machine, else fp32. bf16: frozen
    weights bf16, trained ones fp32, computed in bf16. bf16_autocast: all weights fp32. fp16: as bf16 in float16, the
    loss scaled; needs a GPU."""
    log_every: PositiveInt = 1
    """Steps per line of metrics.jsonl."""
    save_every: PositiveInt = 500
    """Steps between checkpoints; one is written at the end too."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept; at least two, so that one stays if the newest is damaged."""
    async_save: bool = True
    """Copy a checkpoint to host memory in its step and write it while training goes on. A copy over half of the memory
    that is free is not made: the step waits until the checkpoint is written, as with false."""
    on_save_failure: Literal["continue", "stop"] = "continue"
    """A full disk during a save: keep training with the old checkpoints, or stop with exit code 5."""
    eval_every: PositiveInt | None = None
    """Steps between measurements of the held-out loss and of eval_tasks; null never."""
    eval_tasks: tuple[str, ...] = ()
    """Names of evaluation.tasks that are measured then too."""
    eval_records: PositiveInt = 32
    """Records of each of them, the first of its file."""
    keep_best: str | None = None
    """Keep the checkpoint that is best by this, beside keep_last: held_out_loss, of preferences held_out_accuracy or
    held_out_margin too, the name of one of eval_tasks (its first figure), or TASK.FIGURE."""
    early_stop: PositiveInt | None = None
    """End the run after so many measurements in a row that are no better than keep_best's; null never."""
    sample_every: PositiveInt | None = None
    """Steps between sampled answers; null never."""
    samples: tuple[SampleConfig, ...] = ()
    """Questions asked then."""
    max_new_tokens: PositiveInt = 64
    """Length of the sampled answers."""
    max_bad_steps: NonNegativeInt = 0
    """Steps with a non-finite loss or gradient that may be skipped before the run stops with exit code 4."""
    prove: bool = True
    """Before the first step, check on the run's own model and records what a run must honour; see docs/proof.md."""
    tf32: bool = False
    """Products of fp32 matrices on a GPU in TF32: several times faster, 10 bits of mantissa. No effect elsewhere."""
    deterministic: bool = False
    """Only algorithms that give the same bits each time; slower on a GPU. An operation without one stops the run."""
    log_level: Literal["info", "warning", "error"] = "info"
    """What the console shows of the run; files of the run folder hold everything."""
    tensorboard: bool = False
    """Write TensorBoard events too; needs vlm[track]. The same as trackers: [tensorboard]."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "swanlab", "mlflow"], ...] = ()
    """Programs that get the numbers of metrics.jsonl too, into the run folder. Each is an extra, such as vlm[wandb]."""
    trackers_online: bool = False
    """Let them send the numbers where their own login or environment says."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("set exactly one of epochs and max_steps")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("set warmup_steps or warmup_ratio, not both")
        if self.eval_tasks and self.eval_every is None:
            raise ValueError("eval_tasks without eval_every: set the steps between two measurements")
        if self.keep_best is not None:
            known = ["held_out_loss", *RISING, *self.eval_tasks]
            if self.keep_best not in known and not self.keep_best.startswith(tuple(f"{n}." for n in self.eval_tasks)):
                raise ValueError(f"keep_best {self.keep_best}: expected one of {', '.join(known)}, or TASK.FIGURE")
            if self.eval_every is None:
                raise ValueError("keep_best without eval_every: set the steps between two measurements")
        if self.early_stop is not None and self.keep_best is None:
            raise ValueError("early_stop without keep_best: name what must become better")
        if self.trackers_online and not self.trackers:
            raise ValueError("trackers_online without trackers: name those that may send")
        if self.schedule == "step" and self.decay_every is None:
            raise ValueError("schedule step needs decay_every, the optimizer steps between two falls of the rate")
        for key in ("decay_every", "decay_factor"):
            if getattr(self, key) is not None and self.schedule != "step":
                raise ValueError(f"{key} is of schedule step, but schedule is {self.schedule}; drop one of them")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        return self

    @property
    def has_8bit_state(self) -> bool:
        return self.optimizer.endswith("8bit")

    @property
    def is_paged(self) -> bool:
        return self.optimizer.startswith("paged")
