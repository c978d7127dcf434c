"""`vlm predict`: answers of a model to the records of generation tasks, in files that can be gone on with.

While it is written, each process has a part of its own; the last thing is to join them in the order of the records.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vlm.artifacts.evidence import with_error
from vlm.artifacts.fingerprint import fingerprint_files
from vlm.artifacts.plain import read_model
from vlm.distributed import barrier, in_own_time, on_main, rank, world_size
from vlm.errors import CheckpointError, ConfigError
from vlm.evaluation.answers import Answer, write_answers
from vlm.evaluation.metrics import Figure
from vlm.evaluation.predict import FeatureCache
from vlm.evaluation.questions import OpenQuestion
from vlm.evaluation.task_kinds import GenerateTask
from vlm.files import replacing, write_atomically
from vlm.inference.load import LoadedModel, load
from vlm.logs import Progress, log, warn


class Record(Protocol):
    """One that a line is written for."""

    @property
    def number(self) -> int: ...
    @property
    def where(self) -> str: ...
    @property
    def images(self) -> tuple[str | bytes, ...]: ...
    @property
    def id(self) -> str | int | None: ...


Numbered = TypeVar("Numbered", bound=Record)
OnLine = Callable[[int, dict[str, Any]], None]
Write = Callable[[Sequence[Numbered], OnLine], None]
_SETTINGS = ("max_new_tokens", "temperature", "top_p", "stop")  # of a task; they decide what is written


def predict(
    tasks: Sequence[GenerateTask], export: Path, out: Path, cache: Path, seed: int = 0,
    adapter: Path | None = None, device: str = "auto", bits: int | None = None,
) -> list[Path]:  # fmt: skip
    """Write `<out>/<task>.jsonl` for every task, one line per record. All ranks of the launch call this.

    What is there already of the same model, records and settings is not written again. Where every record has an
    answer and the task has metrics, the figures go to the log.

    Args:
        export: an export, or a plain model folder.
        seed: of sampling.
        device, bits: as of `vlm.load`.

    Returns:
        the files.

    Raises:
        CheckpointError: no export, or it does not load.
        ConfigError: what is there was written by another model, of other records, or with other settings.
        DataError: a record or image cannot be used.
    """
    for task in tasks:
        task.check_installed()
    loaded = load(export, device, image_order="keep", adapter=adapter, bits=bits)
    log(f"predict: {export} {loaded.describe_compute()}")
    weights = weights_digest(export, adapter) + ("" if bits is None else f", {bits} bits")
    features = FeatureCache(loaded)
    return [_answer(task, out, loaded, weights, features, cache, seed) for task in tasks]


def _answer(
    task: GenerateTask, out: Path, loaded: LoadedModel, weights: str, features: FeatureCache, cache: Path, seed: int
) -> Path:
    file = PredictionFile(task.name, out)
    questions = task.questions(loaded.conversation_tokenizer, cache, seed)

    def write(own: Sequence[OpenQuestion], on_line: OnLine) -> None:
        def on_answer(place: int, answer: Answer) -> None:
            on_line(place, _said(own[place], answer))

        write_answers(loaded, own, features, task.writing(seed), on_answer)

    file.fill(questions, _identity(task, questions, weights, seed), write)
    if task.metrics and all(question.answers for question in questions):
        written = [line["prediction"] for line in file.lines()]
        on_main(lambda: tell_figures(task.name, task.figures(questions, written)))
    elif task.metrics:
        without = [question.where for question in questions if not question.answers]
        missing = f"{len(without):,} of {len(questions):,} records have no answer to compare with, first {without[0]}"
        on_main(lambda: warn(f"predict: {task.name}: no figures: {missing}"))
    return file.target


def _identity(task: GenerateTask, questions: Sequence[OpenQuestion], weights: str, seed: int) -> dict[str, Any]:
    asked = [
        [question.prompt_ids, [[image_name(image), _size(image)] for image in question.images], question.answers]
        for question in questions
    ]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    settings = {name: getattr(task, name) for name in _SETTINGS}
    drawn = {"seed": seed} if task.temperature else {}
    return {"weights": weights, "records": digest, "num_records": len(questions), **settings, **drawn}


class PredictionFile:
    """`<out>/<name>.jsonl`, the parts of it that processes have written so far, and what they were written by."""

    def __init__(self, name: str, out: Path) -> None:
        if "/" in name or name.startswith("."):
            raise ConfigError(f"evaluation task {name!r} names a file of predictions: take a name without / or .")
        self.name = name
        self.target = out / f"{name}.jsonl"
        self.about = out / f"{name}.json"  # by what the lines were written

    def fill(self, records: Sequence[Numbered], identity: dict[str, Any], write: Write[Numbered]) -> None:
        """Write a line for every record that has none. All ranks of the launch call this.

        Args:
            identity: what decides the lines, as JSON.
            write: called with this rank's records, and with what takes a line, by its record's place among these.

        Raises:
            ConfigError: what is there was written by something else.
        """
        on_main(lambda: self._begin(identity))
        done = {line["number"] for line in self.lines()}
        left = [record for record in records if record.number not in done]
        barrier()  # the parts are read before any rank writes to its own again
        if done:
            log(f"predict: {self.name}: {len(done):,} of {len(records):,} are there already")
        own = left[rank() :: world_size()]
        in_own_time(lambda: self._write(own, write))
        on_main(lambda: self._join(len(records)))

    def lines(self) -> Iterator[dict[str, Any]]:
        """What is there; the last line of a part that was cut off is left out."""
        for file in (self.target, *self._parts()):
            if file.is_file():
                yield from map(json.loads, _whole_lines(file))

    def _begin(self, identity: dict[str, Any]) -> None:
        """Raises ConfigError where something else is there."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        identity = json.loads(json.dumps(identity))  # tuples as lists
        files = [file for file in (*self._parts(), self.target) if file.is_file() and file.stat().st_size]
        if files:
            try:
                before = json.loads(self.about.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                before = {}
            changed = sorted(key for key in {*before, *identity} if before.get(key) != identity.get(key))
            if changed:
                what = ", ".join(f"{key} {before.get(key)} -> {identity.get(key)}" for key in changed)
                raise ConfigError(
                    f"{files[0]} was written by another model, of other records, or with other settings ({what}). "
                    "Remove it, or give another folder with --out"
                )
        write_atomically(self.about, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")

    def _parts(self) -> list[Path]:
        return sorted(self.target.parent.glob(f".{glob.escape(self.target.stem)}.part-*.jsonl"))

    def _write(self, records: Sequence[Numbered], write: Write[Numbered]) -> None:
        if not records:
            return
        part = self.target.with_name(f".{self.target.stem}.part-{rank()}.jsonl")
        if part.is_file():
            write_atomically(part, "".join(f"{line}\n" for line in _whole_lines(part)))
        what = f"predict: {self.name}:"
        with part.open("a", encoding="utf-8") as file, Progress(what, len(records), "records") as progress:
            written = 0

            def on_line(place: int, values: dict[str, Any]) -> None:
                nonlocal written
                written += 1
                line = _about(records[place]) | values
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                progress.show(written)

            write(records, on_line)

    def _join(self, count: int) -> None:
        parts = self._parts()
        if not parts:
            return
        lines = {line["number"]: line for line in self.lines()}
        assert len(lines) == count
        with replacing(self.target) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(lines[number], ensure_ascii=False) + "\n" for number in sorted(lines))
        for part in parts:
            part.unlink()


def tell_figures(name: str, figures: Mapping[str, Figure]) -> None:
    for what, figure in figures.items():
        value = with_error(figure.value, figure.standard_error)
        log(f"predict: {name}: {what} {value} over {figure.num_records} records")


def _whole_lines(file: Path) -> list[str]:
    """A last line that was cut off is left out, be it in the middle of a character. Texts of JSON may hold what
    `str.splitlines` takes for the end of a line, such as U+2028."""
    return [line.decode("utf-8") for line in file.read_bytes().split(b"\n")[:-1]]


def _about(record: Numbered) -> dict[str, Any]:
    return {
        "number": record.number,
        **({} if record.id is None else {"id": record.id}),
        "record": record.where,
        "images": [image_name(image) for image in record.images],
    }


def _said(question: OpenQuestion, answer: Answer) -> dict[str, Any]:
    return {
        "prompt": question.text,
        **({"answers": list(question.answers)} if question.answers else {}),
        "prediction": answer.text,
        "num_tokens": answer.num_tokens,
        "end": answer.end,
    }


def image_name(image: str | bytes) -> str:
    """Its path; of one that the record embeds, its sum."""
    return image if isinstance(image, str) else f"sha256:{hashlib.sha256(image).hexdigest()}"


def _size(image: str | bytes) -> int | None:
    """Bytes; None of what is not a file, such as a member of an archive."""
    if isinstance(image, bytes):
        return len(image)
    try:
        return os.stat(image).st_size
    except OSError:
        return None


def weights_digest(export: Path, adapter: Path | None) -> str:
    """What tells any two models apart: what their files say they are, and hashes of some weights."""
    said = asdict(read_model(export))
    folders = [path for root in (export, adapter) if root is not None for path in (root, *sorted(root.rglob("*/")))]
    found = [fingerprint_files(str(path)) for path in folders if path.is_dir() and [*path.glob("*.safetensors")]]
    if not any(found):
        raise CheckpointError(f"{export} holds no safetensors. `vlm export` writes them")
    return hashlib.sha256(json.dumps([said, found], default=str, sort_keys=True).encode()).hexdigest()[:16]
