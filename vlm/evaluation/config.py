"""Config sections of the evaluation package."""

from __future__ import annotations

from typing import Annotated

from vlm.evaluation.task_kinds import TASKS, TaskConfig
from vlm.schema import OneOf, Section


class EvaluationConfig(Section):
    tasks: tuple[Annotated[TaskConfig, OneOf(TASKS)], ...] = ()
    """What `vlm eval` measures; see docs/evaluation.md."""
    seed: int = 0
    """Draws the shuffled images and which answers of a ranking stand against each other."""
