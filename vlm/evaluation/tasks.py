"""A task's records, by whichever section names it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.data.tokenize import ConversationTokenizer
from vlm.evaluation.task_kinds import TASKS, TaskConfig


def read_task(task: TaskConfig, tokenizer: ConversationTokenizer, cache: Path, seed: int = 0) -> Sequence[Any]:
    """Read and tokenize the records of a task.

    Args:
        task: of a kind's own section, or the base with the kind's name.
        seed: which answers of a ranking stand against each other.

    Raises:
        DataError: no records, or one that cannot be used (with its place).
    """
    own = task if type(task) is not TaskConfig else TASKS[task.kind].model_validate(task.model_dump())
    return own.questions(tokenizer, cache, seed)
