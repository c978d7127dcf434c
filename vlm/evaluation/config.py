"""Config sections of the evaluation package."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from vlm.schema import PathText, Section


class TaskConfig(Section):
    """One figure. Each is also computed with the images shuffled among the records.

    choice: records {"image", "prompt", "choices": [..], "answer": one of them}; accuracy of the likeliest choice.
    ranking: records {"image", "prompt", "answer"}; is the true answer the likeliest among `num_candidates`, the
    others drawn from the other records?
    loss: any records that training reads; nats per supervised token.
    """

    name: str
    """Heads its row of the table."""
    kind: Literal["choice", "ranking", "loss"]
    """The likeliest of given choices, the true answer among others, or nats per token; see docs/evaluation.md."""
    path: PathText
    """A data file."""
    images: PathText | None = None
    """Folder that every image must lie in; null means the folder of `path`."""
    num_candidates: Annotated[int, Field(ge=2)] = 20
    """ranking: answers among which the true one must be the likeliest."""
    max_records: PositiveInt | None = None
    """Take only the first so many; null takes all."""


class EvaluationConfig(Section):
    tasks: tuple[TaskConfig, ...] = ()
    """What `vlm eval` measures; see docs/evaluation.md."""
    seed: int = 0
    """Draws the shuffled images and which answers of a ranking stand against each other."""
