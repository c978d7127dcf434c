"""`vlm predict` with a reward model: the scores of the replies in a file, and how often the preferred one has more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.config import SourceConfig
from vlm.data.conversation import Conversation, Preference
from vlm.data.preferences import Reads
from vlm.data.records import RecordSource, open_source
from vlm.distributed import on_main
from vlm.errors import RecordError
from vlm.evaluation.metrics import accuracy, mean
from vlm.evaluation.place import name_of
from vlm.evaluation.predictions import OnLine, PredictionFile, image_name, tell_figures, weights_digest
from vlm.inference.reward import load_reward_model
from vlm.logs import log

_AT_ONCE = 256  # records whose lines are written together, so that a stop costs no more
_OTHER_RECORDS = ("no_preference", "no_label")  # rules that a record breaks that is of another kind


@dataclass(frozen=True)
class ScoredRecord:
    """One record: two replies of a preference, the preferred one first, else one."""

    number: int  # counted from 0
    replies: tuple[Conversation, ...]
    id: str | int | None = None  # the record's own, if it has one

    @property
    def where(self) -> str:
        return self.replies[0].where

    @property
    def images(self) -> tuple[str | bytes, ...]:
        return self.replies[0].images


def score_file(
    data: Path, images: Path | None, max_records: int | None, export: Path, out: Path, cache: Path, device: str = "auto"
) -> Path:
    """Write `<out>/<name of the data>.jsonl`, one line per record: `score`, or of a preference `score_chosen` and
    `score_rejected`. All ranks of the launch call this. Of preferences, accuracy and margin go to the log.

    Args:
        data: records as training reads them: preferences, judged replies or conversations.
        images: folder of their images; None: beside the file.
        export: of a reward model.
        device: as of `vlm.load`.

    Returns:
        the file.

    Raises:
        CheckpointError: no export of a reward model, or it does not load.
        ConfigError: what is there was written by another model, or of other records.
        DataError: a record or image cannot be used.
    """
    scorer = load_reward_model(export, device, image_order="keep")
    log(f"predict: {export} scores replies, {scorer.loaded.describe_compute()}")
    records = read_scored(data, images, max_records, cache)
    file = PredictionFile(name_of(data), out)

    def write(own: Sequence[ScoredRecord], on_line: OnLine) -> None:
        for start in range(0, len(own), _AT_ONCE):
            chunk = own[start : start + _AT_ONCE]
            scores = iter(scorer([reply for record in chunk for reply in record.replies]))
            for place, record in enumerate(chunk, start):
                on_line(place, _named([next(scores) for _ in record.replies]))

    file.fill(records, _identity(records, weights_digest(export, None)), write)
    pairs = [(line["score_chosen"], line["score_rejected"]) for line in file.lines() if "score_chosen" in line]
    if pairs:
        figures = {"accuracy": accuracy(pairs, [0] * len(pairs)), "margin": mean([good - bad for good, bad in pairs])}
        on_main(lambda: tell_figures(file.name, figures))
    return file.target


def read_scored(data: Path, images: Path | None, max_records: int | None, cache: Path) -> list[ScoredRecord]:
    """The records of a file of one kind, whichever it is. Raises RecordError for one that cannot be read."""
    source = _open(SourceConfig(path=str(data), images=None if images is None else str(images)), cache)
    found = []
    for number in range(min(len(source), max_records or len(source))):
        try:
            parsed = source.conversation(number)
        except RecordError as error:
            if error.rule != "no_label":
                raise
            why = "no label, and the first record has one. Give every record of the file one, or none"
            raise RecordError(error.rule, why, error.where) from None
        record: dict[str, Any] = source.index[number]
        replies = parsed.branches if isinstance(parsed, Preference) else (parsed,)
        found.append(ScoredRecord(number, replies, record.get("id", record.get("question_id"))))
    return found


def _open(config: SourceConfig, cache: Path) -> RecordSource:
    """As records of the kind that the first one is."""
    kinds: tuple[Reads, ...] = ("preference", "judged")
    for reads in kinds:
        source = open_source(config, cache, reads=reads)
        try:
            source.parsed(0)
        except RecordError as error:
            if error.rule in _OTHER_RECORDS:
                continue
        return source
    return open_source(config, cache)


def _named(scores: list[float]) -> dict[str, float]:
    names = ("score",) if len(scores) == 1 else ("score_chosen", "score_rejected")
    return dict(zip(names, scores, strict=True))


def _identity(records: Sequence[ScoredRecord], weights: str) -> dict[str, Any]:
    asked = [
        [[turn.role, [str(part) for part in turn.parts]] for reply in record.replies for turn in reply.turns]
        + [[image_name(image) for image in record.images]]
        for record in records
    ]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    return {"weights": weights, "records": digest, "num_records": len(records)}
