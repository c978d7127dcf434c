"""Bad records: counted by rule, listed in skipped.jsonl, and a reason to stop when they are too many."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.batch import Skip
from vlm.errors import DataError
from vlm.logs import warn

MIN_RECORDS_FOR_SHARE = 200  # of a run that goes on; before that many, a share says nothing
HINT = ", but "  # in the message of a skip: what is there in place of what was named
_NUM_EXAMPLES = 3  # skipped records that a message names
_USUAL_CAUSES = {
    "image_missing": "Usually images: names the wrong folder. ",
    "image_outside_root": "Usually images: names the wrong folder. ",
    "over_long": "Raise data.max_length, or set data.over_long to cut. ",
    "too_many_images": "Raise data.max_images, or set data.over_long to cut. ",
    "image_without_encoder": "The records have images, but model.vision is null. ",
    "no_supervised_tokens": "Usually the records' roles are not what they seem. ",
}


class SkipLog:
    """Counts skipped records over a run.

    Args:
        path: skipped.jsonl, appended to; None writes nothing. Each line has the optimizer step, 0 before training.
        max_share: more skipped records than this share of those seen is a DataError.
        max_in_a_row: so is this many without a good one between them.
    """

    def __init__(self, path: Path | None, max_share: float, max_in_a_row: int) -> None:
        self.path = path
        self.max_share = max_share
        self.max_in_a_row = max_in_a_row
        self.by_rule: Counter[str] = Counter()
        self.num_seen = 0
        self._in_a_row = 0
        self._held_out: set[str] = set()  # listed once, though they are met at every evaluation

    @property
    def num_skipped(self) -> int:
        return sum(self.by_rule.values())

    def state(self) -> dict[str, Any]:
        """For a checkpoint; `restore` brings it back."""
        return {"seen": self.num_seen, "skipped": dict(self.by_rule), "skipped_in_a_row": self._in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        self.num_seen = state.get("seen", 0)  # absent in checkpoints of format version 1
        self.by_rule = Counter(state.get("skipped", {}))
        self._in_a_row = state.get("skipped_in_a_row", 0)

    def add(self, skips: Iterable[Skip], num_seen: int, step: int = 0) -> None:
        """Count the skips among `num_seen` records.

        Raises:
            DataError: too many, by share or in a row; names the counts by rule and the last record.
        """
        new = list(skips)
        self.num_seen += num_seen
        if not new:
            self._in_a_row = 0
            return
        self.by_rule.update(skip.rule for skip in new)
        self._in_a_row = self._in_a_row + len(new) if len(new) == num_seen else len(new)
        self._write(new, step)
        too_many = self.num_seen >= MIN_RECORDS_FOR_SHARE and self.num_skipped > self.max_share * self.num_seen
        if too_many or self._in_a_row >= self.max_in_a_row:
            raise DataError(too_many_message(self.by_rule, self.num_seen, new, self.path))

    def list_found(self, skips: Iterable[Skip]) -> None:
        """List records that the scan before training left out; they are not among those that training sees."""
        self._write(list(skips), 0)

    def list_held_out(self, skips: Iterable[Skip], step: int) -> None:
        """List held-out records that an evaluation could not read, each once."""
        new = [skip for skip in skips if skip.where not in self._held_out]
        self._held_out.update(skip.where for skip in new)
        if new:
            warn(f"held-out records that cannot be read: {counts_by_rule(Counter(skip.rule for skip in new))}")
        self._write(new, step)

    def _write(self, skips: list[Skip], step: int) -> None:
        if self.path is not None and skips:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    for skip in skips:
                        line = {"step": step, **skip._asdict()}
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
            except OSError as error:
                warn(f"{self.path}: {len(skips)} skipped records could not be listed ({error.strerror})")


def refuse_too_many(skips: Sequence[Skip], num_records: int, max_share: float, path: Path | None = None) -> None:
    """Raise DataError when more than `max_share` of all `num_records` records, or every one of them, is skipped.

    Args:
        path: file that lists them, for the message.
    """
    if skips and (len(skips) == num_records or len(skips) > max_share * num_records):
        raise DataError(too_many_message(Counter(skip.rule for skip in skips), num_records, skips, path))


def refuse_lost_source(skips: Sequence[Skip], num_usable: Mapping[str, int]) -> None:
    """Raise DataError when no record of some source can be used: listing it was a mistake, or the source is broken.

    Args:
        num_usable: records of each source that can be used, by the source's name.
    """
    for source in [name for name, count in num_usable.items() if count == 0]:
        lost = [skip for skip in skips if skip.where.startswith(f"{source}: ")]
        if lost:
            message = too_many_message(Counter(skip.rule for skip in lost), len(lost), lost, None)
            raise DataError(f"data source {source}: no record can be used. {message}. Mend it or take it from the list")


def too_many_message(by_rule: Counter[str], num_seen: int, skips: Sequence[Skip], path: Path | None) -> str:
    """What was skipped: counts by rule, the first of `skips`, and what usually helps."""
    examples = "; ".join(f"{skip.where}: {skip.message}" for skip in skips[:_NUM_EXAMPLES])
    listed = f"; all are listed in {path}" if path else ""
    rule, count = by_rule.most_common(1)[0]
    is_known = any(HINT in skip.message for skip in skips[:_NUM_EXAMPLES])
    cause = "" if is_known or 2 * count <= sum(by_rule.values()) else _USUAL_CAUSES.get(rule, "")
    return (
        f"{sum(by_rule.values())} of {num_seen} records skipped ({counts_by_rule(by_rule)}), e.g. {examples}{listed}. "
        f"{cause}`vlm data check` lists them; data.max_skipped_share sets the limit"
    )


def counts_by_rule(by_rule: Counter[str]) -> str:
    return ", ".join(f"{rule} {count}" for rule, count in by_rule.most_common())
