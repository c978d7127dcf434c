"""Evaluation tasks on the model that trains, under whichever engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlm.data.tokenize import ConversationTokenizer
from vlm.distributed import main_first
from vlm.evaluation.config import EvaluationConfig
from vlm.evaluation.report import measure
from vlm.evaluation.tasks import read_task
from vlm.inference.load import LoadedModel
from vlm.logs import log_level
from vlm.models.vlm import VisionLanguageModel, evaluating
from vlm.train.events import Measured

AT_ONCE = 8  # answers written at the same time, on all ranks alike; training has most of the memory


def tasks_during(config: EvaluationConfig, names: tuple[str, ...], num_records: int) -> EvaluationConfig:
    """The tasks of these names, with at most so many records each."""
    chosen = [task for task in config.tasks if task.name in names]
    limits = [{"max_records": min(num_records, task.max_records or num_records)} for task in chosen]
    return config.model_copy(
        update={"tasks": tuple(task.model_copy(update=limit) for task, limit in zip(chosen, limits, strict=True))}
    )


def build_measure(
    config: EvaluationConfig,
    cache: Path,
    tokenizer: ConversationTokenizer,
    loaded_of: Callable[[VisionLanguageModel], LoadedModel],
) -> Callable[[VisionLanguageModel], Measured]:
    """What measures the tasks on a model; every rank that holds a piece of it makes the same call.

    The model's mode and torch's random state are afterwards what they were before.

    Args:
        loaded_of: a model with what belongs to it.

    Raises:
        MissingPackageError: a metric needs a package that is not installed.
        DataError: a task's records cannot be used.
    """
    with main_first():  # rank 0 writes the index of a file
        for task in config.tasks:
            task.check_installed()
            read_task(task, tokenizer, cache, config.seed)

    def measure_tasks(model: VisionLanguageModel) -> Measured:
        with evaluating(model), log_level("warning"):
            results = measure(loaded_of(model), config, cache, at_once=AT_ONCE)
        figures: dict[str, float] = {}
        for result in results:
            first, name = result.rows[0], result.task.name
            figures[name] = first.own.value
            if first.shuffled is not None:
                figures[f"{name}.shuffled"] = first.shuffled.value
            figures |= {f"{name}.{row.metric}": row.own.value for row in result.rows}
        return Measured(figures, [problem for result in results for problem in result.problems])

    return measure_tasks
