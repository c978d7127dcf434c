"""Config sections of the evaluation room."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from vlm.schema import Section


class TaskConfig(Section):
    """One figure. Each is also computed with the pictures shuffled among the records.

    choice: records {"image", "prompt", "choices": [..], "answer": one of them}; accuracy of the likeliest choice.
    ranking: records {"image", "prompt", "answer"}; is the true answer the likeliest among `num_candidates`, the
    others drawn from the other records?
    loss: any records that training reads; nats per supervised token.
    """

    name: str
    kind: Literal["choice", "ranking", "loss"]
    path: str
    images: str | None = None
    num_candidates: Annotated[int, Field(ge=2)] = 20
    max_records: PositiveInt | None = None


class EvaluationConfig(Section):
    tasks: tuple[TaskConfig, ...] = ()
    seed: int = 0
