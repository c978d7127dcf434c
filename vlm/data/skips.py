"""Bad records: counted by rule, listed in skipped.jsonl, and a reason to stop when they are too many."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from vlm.batch import Skip
from vlm.errors import DataError
from vlm.logs import warn

MIN_RECORDS_FOR_SHARE = 200  # before that many, a share says nothing


class SkipLog:
    """Counts skipped records over a run.

    Args:
        path: skipped.jsonl, appended to; None writes nothing.
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

    @property
    def num_skipped(self) -> int:
        return sum(self.by_rule.values())

    def add(self, skips: Iterable[Skip], num_seen: int) -> None:
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
        self._write(new)
        too_many = self.num_seen >= MIN_RECORDS_FOR_SHARE and self.num_skipped > self.max_share * self.num_seen
        if too_many or self._in_a_row >= self.max_in_a_row:
            raise DataError(too_many_message(self.by_rule, self.num_seen, new[-1], self.path))

    def _write(self, skips: list[Skip]) -> None:
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(skip._asdict(), ensure_ascii=False) + "\n" for skip in skips)
            except OSError as error:
                warn(f"{self.path}: {len(skips)} skipped records could not be listed ({error.strerror})")


def too_many_message(by_rule: Counter[str], num_seen: int, example: Skip, path: Path | None) -> str:
    counts = ", ".join(f"{rule} {count}" for rule, count in by_rule.most_common())
    listed = f"; all are listed in {path}" if path else ""
    return (
        f"{sum(by_rule.values())} of {num_seen} records skipped ({counts}), e.g. {example.where}: {example.message}"
        f"{listed}. "
        "Usually images: names the wrong folder. See `vlm data check`; data.max_skipped_share sets the limit"
    )
