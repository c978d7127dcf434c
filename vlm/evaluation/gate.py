"""What a task's figure must reach, and why a model that does not is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlm.artifacts.evidence import with_error
from vlm.errors import ConfigError, GateFailed
from vlm.evaluation.metrics import Figure
from vlm.evaluation.rows import Row
from vlm.evaluation.task_kinds import GateConfig, TaskConfig

_ERRORS = 2  # standard errors that a difference must be away from none; of blind models one in forty is


def gate_problems(task: TaskConfig, rows: Sequence[Row]) -> list[str]:
    """What of the task's gate its rows do not reach, a line each.

    Raises:
        ConfigError: the gate names a figure that the task has not.
    """
    gate = task.gate
    if gate is None:
        return []
    row = rows[0] if gate.figure is None else next((row for row in rows if row.metric == gate.figure), None)
    if row is None:
        known = ", ".join(row.metric for row in rows)
        raise ConfigError(f"evaluation task {task.name}: gate.figure {gate.figure}: the task has {known}")
    return [f"{task.name}, {row.metric}: {problem}" for problem in _problems(gate, row, task.lower_is_better)]


def refuse(problems: Sequence[str]) -> None:
    """Raises GateFailed where there are any."""
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise GateFailed(
            f"the model does not pass {len(problems)} gate{'s' if len(problems) > 1 else ''}:{lines}\nWhere own images "
            "are no better than shuffled ones, it does not use them. Usual causes: the projector was not loaded or not "
            "trained, another layer or normalisation than in training, or images that belong to other records. The "
            "figures are written all the same; `vlm data preview` shows the records, `vlm prove` the model"
        ).on_every_rank()  # those of a run all measure


def _problems(gate: GateConfig, row: Row, lower_is_better: bool) -> list[str]:
    problems = []
    sign = -1 if lower_is_better else 1
    if gate.own is not None and not sign * row.own.value >= sign * gate.own:
        direction = "at most" if lower_is_better else "at least"
        problems.append(f"own images {_shown(row.own)}, the gate demands {direction} {gate.own:g}")
    for name, least, other in (
        ("shuffled", gate.over_shuffled, row.shuffled),
        ("blank", gate.over_blank, row.blank),
    ):
        if least is None:
            continue
        if other is None:
            problems.append(f"no {name} images to compare with, which the gate demands")
            continue
        gain = sign * (row.own.value - other.value)
        error = math.hypot(row.own.standard_error, other.standard_error)
        what = f"own images {_shown(row.own)}, {name} images {_shown(other)}"
        if not gain >= least:
            problems.append(f"{what}: better by {gain:.3f}, the gate demands {least:g}")
        elif not gain >= _ERRORS * error:
            problems.append(
                f"{what}: better by {gain:.3f}, which is within {_ERRORS} standard errors of that ({error:.3f} each): "
                "give the task more records"
            )
    return problems


def _shown(figure: Figure) -> str:
    return with_error(figure.value, figure.standard_error)
