"""What each stage of the quick start reached, as a table: means over its runs, and their spread.

    python scripts/quickstart_stages.py cache/runs/quickstart/pretrain cache/runs/quickstart/finetune \\
        cache/runs/quickstart/dpo cache/runs/quickstart/dpo_seed1 cache/runs/quickstart/dpo_seed2

Runs whose folders are named alike up to the first underscore are one stage. Each needs its export. Measured on images
that were never trained on (`--records`), each with the question for its kind: how often the right one of ten kinds is
the likeliest, with its own and with another image; how likely a reply at temperature 1 is the right one, which is what
`grpo` rewards; how often the right one is likelier than a wrong one, over all nine; and by how much.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.evaluation.metrics import Figure, mean
from vlm.evaluation.task_kinds import ChoiceTask

COLUMNS = ("kind, own images", "kind, shuffled images", "right reply, drawn", "pairs won", "margin, nats")
TEST = "cache/dataset/quickstart/eval_kind.jsonl"


class KindsTask(ChoiceTask):
    """Pairs too: the true answer of each record against each of the others."""

    def figures(self, questions: Sequence[Any], answers: list[Any]) -> dict[str, Figure]:
        margins = [margins_of(scores, each.answer) for scores, each in zip(answers, questions, strict=True)]
        won = [statistics.fmean(margin > 0 for margin in each) for each in margins]
        drawn = [math.exp(scores[each.answer]) for scores, each in zip(answers, questions, strict=True)]
        return {
            **super().figures(questions, answers),
            "drawn": mean(drawn),
            "pairs": mean(won),
            "margin": mean([statistics.fmean(each) for each in margins]),
        }


def margins_of(scores: Sequence[float], answer: int) -> list[float]:
    """By how much the true candidate is likelier than each of the others, in nats.

    >>> margins_of([-1.0, -3.0, -0.5], 0)
    [2.0, -0.5]
    """
    return [scores[answer] - score for place, score in enumerate(scores) if place != answer]


def measure(export: Path, records: str) -> list[float]:
    """A number for each of COLUMNS."""
    from vlm.evaluation.config import EvaluationConfig
    from vlm.evaluation.report import run_tasks
    from vlm.inference.load import load

    task = KindsTask(name="kind", path=records, images=str(Path(records).parent / "images"))
    tasks = EvaluationConfig.model_construct(tasks=(task,), seed=0)
    accuracy, *others = run_tasks(load(export, image_order="keep"), tasks, Path("cache/features"))
    assert accuracy.shuffled is not None
    return [accuracy.own.value, accuracy.shuffled.value, *(each.own.value for each in others)]


def line_of(stage: str, found: Sequence[Sequence[float]]) -> str:
    """A row of the table: the mean of each column over the runs, and of several runs the standard deviation.

    >>> line_of("dpo", [[0.5, 1.0], [0.7, 1.0]])
    '| dpo | 2 | 0.600 ± 0.141 | 1.000 ± 0.000 |'
    """
    cells = []
    for values in zip(*found, strict=True):
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        cells.append(f"{statistics.fmean(values):.3f}{spread}")
    return f"| {stage} | {len(found)} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--records", default=TEST, help="tune with the valid_kind.jsonl beside it")
    arguments = parser.parse_args()
    stages: dict[str, list[list[float]]] = {}
    for run in arguments.runs:
        stages.setdefault(run.name.partition("_")[0], []).append(measure(run / "export", arguments.records))
    print(f"| stage | runs | {' | '.join(COLUMNS)} |\n{'|---' * (len(COLUMNS) + 2)}|")
    for stage, found in stages.items():
        print(line_of(stage, found))


if __name__ == "__main__":
    main()
