"""The tasks of a config, scored on an export: each figure beside the same model's on shuffled images.

A figure alone says little: a model that never looks may guess the kind of thing from how often it is the answer. So
each is computed again with every image replaced by another record's, and stands beside the baseline of its kind.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from vlm.artifacts.evidence import FIGURES, figures_table, with_error, write_figures
from vlm.artifacts.plain import read_model
from vlm.config import RunConfig, unused_settings
from vlm.errors import ConfigError
from vlm.evaluation.answers import Answer, write_answers
from vlm.evaluation.config import EvaluationConfig
from vlm.evaluation.gate import gate_problems, refuse
from vlm.evaluation.metrics import Figure, derangement
from vlm.evaluation.place import beside
from vlm.evaluation.predict import FeatureCache, score_candidates
from vlm.evaluation.rows import Row
from vlm.evaluation.task_kinds import TaskConfig
from vlm.evaluation.tasks import read_task
from vlm.files import write_atomically
from vlm.inference.load import LoadedModel, load
from vlm.logs import Progress, log, warn
from vlm.version import __version__


def evaluate_run(
    config: RunConfig, export: Path | None = None, out: Path | None = None, adapter: Path | None = None,
    bits: int | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Score the config's tasks, print the table, and write evaluation.json.

    Args:
        export: what to score, an export or a plain model folder; None is the run's own, `<output_dir>/export`.
        out: a folder or a .json file; None is beside the export.
        adapter: a LoRA that is added to it.
        bits: as of `vlm.load`.

    Raises:
        ConfigError: the config has no tasks.
        CheckpointError: no export, or it does not load.
        DataError: a task's records or images cannot be used.
        GateFailed: a figure does not reach its task's gate; the results are written before.
    """
    tasks = config.evaluation.tasks
    if not tasks:
        raise ConfigError(
            "the config has no evaluation.tasks, so there is nothing to measure. Add some as docs/evaluation.md shows, "
            "with records that were not trained on"
        )
    for line in unused_settings(config.evaluation, "evaluation."):
        warn(line)
    folder = Path(config.output_dir) / "export" if export is None else export
    target = beside(folder, adapter, bits, "results") if out is None else out
    for task in tasks:
        task.check_installed()
    started = time.monotonic()
    loaded = load(folder, image_order="keep", adapter=adapter, bits=bits)  # records are read as training reads them
    log(f"evaluation: {folder} {loaded.describe_compute()}")
    results = measure(loaded, config.evaluation, Path(config.data.cache))
    rows = [row.as_json() for result in results for row in result.rows]
    problems = [problem for result in results for problem in result.problems]
    target = target if target.suffix == ".json" else target / FIGURES
    target.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "export": str(folder),
        **({} if adapter is None else {"adapter": str(adapter)}),
        **({} if bits is None else {"bits": bits}),
        "steps": read_model(folder).origin.get("steps"),
        "vlm_version": __version__,
        "seed": config.evaluation.seed,
        "dtype": str(loaded.compute_dtype).removeprefix("torch."),
        "seconds": round(time.monotonic() - started, 1),
        "results": rows,
        **({} if all(task.gate is None for task in tasks) else {"failed_gates": problems}),
    }
    write_atomically(target, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    print_table(rows)
    if adapter is None and bits is None:
        write_figures(folder, rows)
    log(f"written to {target}")
    refuse(problems)
    return rows


def run_tasks(loaded: LoadedModel, config: EvaluationConfig, cache: Path) -> list[Row]:
    """The figures of every task, gates aside."""
    return [row for result in measure(loaded, config, cache) for row in result.rows]


@dataclass(frozen=True)
class TaskResult:
    """The figures of one task, and what of its gate they do not reach."""

    task: TaskConfig
    rows: list[Row]
    problems: list[str]


def measure(loaded: LoadedModel, config: EvaluationConfig, cache: Path, at_once: int | None = None) -> list[TaskResult]:
    """Measure every task. Images are encoded once for all tasks that fit in memory.

    Args:
        at_once: answers written at the same time; None takes what suits the device and its free memory.
    """
    features = FeatureCache(loaded)
    results = []
    # all are read before the first is asked, so that a record that cannot be used costs no figure
    asked = [read_task(task, loaded.conversation_tokenizer, cache, config.seed) for task in config.tasks]
    for task, questions in zip(config.tasks, asked, strict=True):
        rows = _run_task(loaded, task, questions, features, config.seed, at_once)
        results.append(TaskResult(task, rows, gate_problems(task, rows)))
    return results


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """A table for the eye when standard output is a terminal; Markdown to paste in any case."""
    console, markdown = Console(), figures_table(rows)
    if console.is_terminal:
        head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines())
        table = Table(*head)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    print(markdown)


def _run_task(
    loaded: LoadedModel, task: TaskConfig, questions: Sequence[Any], features: FeatureCache, seed: int,
    at_once: int | None,
) -> list[Row]:  # fmt: skip
    shown = [image for question in questions for image in question.images]
    # an image that takes another number of tokens cannot stand in the place of this one
    is_fixed = loaded.image_spec is None or not loaded.image_spec.reads_size
    other = derangement(shown, seed, task.groups(questions)) if len(set(shown)) > 1 and is_fixed else {}
    swapped = [replace(q, images=tuple(other[image] for image in q.images)) for q in questions] if other else []
    blanked: list[Any] = []
    if shown and task.has_blank and is_fixed:
        white = _blank_image()
        blanked = [replace(question, images=(white,) * len(question.images)) for question in questions]
    # together: what is asked of an image as its own and as another's is computed once
    answers = iter(_ask(loaded, task, [*questions, *swapped, *blanked], features, seed, at_once))
    own, shuffled, blank = (
        _figures(task, some, list(islice(answers, len(some))), f"{which} images") if some else {}
        for which, some in (("own", questions), ("shuffled", swapped), ("blank", blanked))
    )
    baseline: tuple[float | None, str] = task.baseline(questions)
    rows = []
    for metric, figure in own.items():
        rows.append(Row(task.name, task.kind, metric, figure, shuffled.get(metric), blank.get(metric), *baseline))
        baseline = (None, "")  # that of the first
    return rows


def _ask(
    loaded: LoadedModel, task: TaskConfig, questions: Sequence[Any], features: FeatureCache, seed: int,
    at_once: int | None,
) -> list[Any]:  # fmt: skip
    """The scores of each question's replies, or the text that the model writes."""
    settings, answered = task.writing(seed), 0
    with Progress(f"evaluation: {task.name}:", len(questions), "questions") as progress:

        def on_answer(place: int, answer: Answer) -> None:
            nonlocal answered
            answered += 1
            progress.show(answered)

        answers: list[Any]
        if settings is None:
            answers = score_candidates(loaded, questions, features, on_progress=progress.show)
        else:
            written = write_answers(loaded, questions, features, settings, on_answer, at_once)
            answers = [answer.text for answer in written]
    log(f"evaluation: {task.name}: {len(questions)} questions, {progress.seconds:.1f} s")
    return answers


def _figures(task: TaskConfig, questions: Sequence[Any], answers: list[Any], which: str) -> dict[str, Figure]:
    figures = task.figures(questions, answers)
    for metric, figure in figures.items():
        value = with_error(figure.value, figure.standard_error)
        named = f" {metric}" if len(figures) > 1 else ""
        log(f"evaluation: {task.name}, {which}:{named} {value} over {len(questions)} records")
    return figures


def _blank_image() -> bytes:
    """A white one, encoded."""
    encoded = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(encoded, format="PNG")
    return encoded.getvalue()
