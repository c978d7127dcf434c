"""Config sections of the training room."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vlm.schema import Section


class SampleConfig(Section):
    """A question asked of the model every `sample_every` steps; the answer goes to the log."""

    prompt: str
    image: str | None = None


class TrainConfig(Section):
    epochs: PositiveFloat | None = None
    max_steps: PositiveInt | None = None
    """Optimizer steps. Exactly one of epochs and max_steps is set."""
    global_batch_size: PositiveInt = 32
    """Packed rows per optimizer step, over all ranks."""
    micro_batch_size: PositiveInt = 1
    """Packed rows per rank per forward."""
    learning_rate: PositiveFloat = 1e-3
    learning_rates: dict[Literal["projector", "llm", "llm.lora", "vision"], PositiveFloat] = Field(default_factory=dict)
    """Per trainable part, where it differs from learning_rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: NonNegativeInt | None = None
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The schedule's floor, as a share of the peak."""
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: PositiveFloat | None = 1.0
    precision: Literal["fp32", "bf16", "bf16_autocast"] = "bf16"
    """bf16: frozen weights bf16, trained ones fp32, computed in bf16. bf16_autocast: all weights fp32."""
    log_every: PositiveInt = 1
    save_every: PositiveInt = 500
    keep_last: Annotated[int, Field(ge=2)] = 2
    on_save_failure: Literal["continue", "stop"] = "continue"
    """A full disk during a save: keep training with the old checkpoints, or stop with exit code 5."""
    eval_every: PositiveInt | None = None
    sample_every: PositiveInt | None = None
    samples: tuple[SampleConfig, ...] = ()
    max_new_tokens: PositiveInt = 64
    """Length of the sampled answers."""
    max_bad_steps: NonNegativeInt = 0
    """Steps with a non-finite loss or gradient that may be skipped before the run stops with exit code 4."""
    tensorboard: bool = False

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


class EngineConfig(Section):
    kind: Literal["local"] = "local"
    device: Literal["auto", "cpu", "cuda"] = "auto"
