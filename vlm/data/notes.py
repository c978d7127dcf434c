"""What records hold and nothing read, counted per source: one warning for each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

_NUM_NAMES = 8  # that a warning lists
ABSENT_COLUMN = "no column "  # begins what is said of a name in `columns` that a record lacks


class UnreadLog:
    """Counts records by source and by what was not read in them."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, tuple[int, str]]] = {}  # source -> name -> records, the first one's place

    def add(self, source: str, where: str, names: Iterable[str], count: int = 1) -> None:
        counts = self._counts.setdefault(source, {})
        for name in names:
            before, first = counts.get(name, (0, where))
            counts[name] = before + count, first

    def merge(self, other: UnreadLog) -> None:
        for source, counts in other._counts.items():
            for name, (count, where) in counts.items():
                self.add(source, where, [name], count)

    def to_json(self) -> str:
        return json.dumps(self._counts)

    @staticmethod
    def from_json(text: str) -> UnreadLog:
        """Raises ValueError or TypeError when the text is damaged."""
        log = UnreadLog()
        log._counts = {
            source: {name: (int(count), str(where)) for name, (count, where) in counts.items()}
            for source, counts in json.loads(text).items()
        }
        return log

    def warnings(self, num_usable: Mapping[str, int]) -> list[str]:
        """One line per source, the most frequent first.

        Args:
            num_usable: records of each source that can be used.
        """
        lines = []
        for source, counts in self._counts.items():
            total = max(1, num_usable.get(source, 1))
            kept = {
                name: found
                for name, found in counts.items()
                if not name.startswith(ABSENT_COLUMN) or found[0] >= total  # a key that some records lack is no news
            }
            names = sorted(kept, key=lambda name: -kept[name][0])
            told = [f"{name} ({_share(kept[name][0], total)}, first in {kept[name][1]})" for name in names[:_NUM_NAMES]]
            if told:
                more = f", and {len(names) - len(told)} more" if len(names) > len(told) else ""
                lines.append(f"data: {source}: not read: {', '.join(told)}{more}")
        return lines


def _share(count: int, total: int) -> str:
    """
    >>> _share(1, 3), _share(1, 5000), _share(7, 7)
    ('33 % of its records', '0.02 % of its records', 'all its records')
    """
    if count >= total:
        return "all its records"
    percent = 100 * count / total
    return f"{percent:.0f} % of its records" if percent >= 1 else f"{percent:.2g} % of its records"
