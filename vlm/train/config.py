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
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup_steps: NonNegativeInt | None = None
    """Optimizer steps over which the rate rises to its peak."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """The same as a share of all steps."""
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
    on_save_failure: Literal["continue", "stop"] = "continue"
    """A full disk during a save: keep training with the old checkpoints, or stop with exit code 5."""
    eval_every: PositiveInt | None = None
    """Steps between measurements of the held-out loss; null never."""
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
    tensorboard: bool = False
    """Write TensorBoard events too; needs vlm[track]."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("set exactly one of epochs and max_steps")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("set warmup_steps or warmup_ratio, not both")
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
