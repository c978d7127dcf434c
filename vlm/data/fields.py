"""The keys of a record, and which of them were read: the one place that knows.

A parser takes what it understands. Whatever is left and has content was not understood, and `vlm.data.unread` reports
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vlm.errors import RecordError


class Unread(NamedTuple):
    """A key with content that nothing took."""

    name: str  # for messages: "history", "turns[].loss"
    key: str
    value: Any


class Fields:
    """One object of a record: itself, a turn, a part of a turn, an image.

    A key whose value is null, or empty all the way down, counts as absent: writers of tables (Arrow, pandas) give every
    record every key.

    Args:
        values: as parsed from JSON.
        place: begins the names of its keys in messages, e.g. "turns[].".
    """

    def __init__(self, values: dict[str, Any], place: str = "") -> None:
        self.values = values
        self.place = place
        self._present = {key for key, value in values.items() if has_content(value)}
        self._taken: set[str] = set()
        self._inner: list[Fields] = []

    def __contains__(self, key: str) -> bool:
        return key in self._present

    def given(self, keys: tuple[str, ...]) -> list[str]:
        """Those of `keys` that have content."""
        return [] if self._present.isdisjoint(keys) else [key for key in keys if key in self._present]

    def take(self, *keys: str) -> Any:
        """The value of the first of `keys` that has content, which counts as read; None without any."""
        for key in keys:
            if key in self._present:
                self._taken.add(key)
                return self.values[key]
        return None

    def settle(self, *keys: str) -> None:
        """Count `keys` as read: they say what another key says, or nothing that matters here."""
        self._taken.update(keys)

    def inner(self, values: dict[str, Any], place: str) -> Fields:
        """An object within this one; what of it is not read is reported with the rest."""
        fields = Fields(values, self.place + place)
        self._inner.append(fields)
        return fields

    def unread(self) -> Iterator[Unread]:
        """What nothing took, in order."""
        for key, value in self.values.items():
            if key in self._present and key not in self._taken:
                yield Unread(self.place + key, key, value)
        for fields in self._inner:
            yield from fields.unread()


def has_content(value: Any) -> bool:
    """
    >>> [has_content(value) for value in (None, " ", [], {"a": [None, ""]}, 0, False, "a", [[], ["a"]])]
    [False, False, False, False, True, True, True, True]
    """
    if isinstance(value, str):
        return not _is_blank(value)
    if isinstance(value, (list, dict)):  # a union would be made anew in each call
        return any(leaf is not None and not _is_blank(leaf) for leaf in leaves(value))
    return value is not None


def _is_blank(leaf: Any) -> bool:
    return isinstance(leaf, str) and (not leaf or leaf.isspace())


def leaves(value: Any) -> Iterator[Any]:
    """All values within lists and objects, in order. Not recursive: records may be nested deeper than the stack."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += reversed(value.values())
        elif isinstance(value, list):
            waiting += reversed(value)
        else:
            yield value


def renamed(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with the keys that this program reads in place of its own.

    Args:
        columns: our key -> the record's.

    Raises:
        RecordError: rule mixed_keys, when both have content.

    >>> renamed({"file": "a.png", "alt": "A dog."}, {"image": "file", "caption": "alt"})
    {'image': 'a.png', 'caption': 'A dog.'}
    """
    if not columns:
        return dict(record)
    ours = {theirs: key for key, theirs in columns.items() if theirs in record}
    result: dict[str, Any] = {}
    for key, value in record.items():
        name = ours.get(key, key)
        if has_content(result.get(name)):
            if has_content(value):
                raise RecordError("mixed_keys", f"two keys for {name} ({key!r} is one), by data.sources[].columns")
            continue
        result[name] = value
    return result


def short(value: Any) -> str:
    """For messages. Lists and objects are not written out: they may be nested deeper than `repr` can go."""
    return repr(value)[:60] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
