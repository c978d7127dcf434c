"""Names and tensors of another program's layout <-> ours, one tensor at a time.

A `WeightAdapter` is an ordered list of rules. A rule says which names of one side are which of the other, and what is
done to the tensors between. Patterns are names with parts: `{block}` is one level of a name, `{*rest}` one or more.

>>> adapter = WeightAdapter("a fused layout", (
...     split(("llm.{n}.q", "llm.{n}.k"), "h.{n}.qk", sizes=(2, 1)),
...     rename("llm.{*rest}", "{*rest}"),
... ))
>>> ours = adapter.to_ours({"h.0.qk": torch.tensor([1, 2, 3]), "norm": torch.tensor([4])})
>>> {name: tensor.tolist() for name, tensor in ours.items()}
{'llm.0.q': [1, 2], 'llm.0.k': [3], 'llm.norm': [4]}
>>> {name: tensor.tolist() for name, tensor in adapter.from_ours(ours).items()}
{'h.0.qk': [1, 2, 3], 'norm': [4]}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain

import torch
from torch import Tensor

from vlm.errors import CheckpointError
from vlm.models.weight_files import LazyTensors, shapes_of

Convert = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # of tensors on the meta device too, for their shapes
_PART = re.compile(r"\{(\*?)(\w+)\}")


@dataclass(frozen=True)
class Rule:
    """Tensors of one layout that together are tensors of the other.

    Attributes:
        ours, theirs: patterns, all with the same parts unless a side has none.
        to_ours: tensors in the order of `theirs` -> in the order of `ours`.
        from_ours: the way back, to the bit; None where there is none.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Convert
    from_ours: Convert | None

    def __post_init__(self) -> None:
        parts = {frozenset(name for _, name in _PART.findall(pattern)) for pattern in (*self.ours, *self.theirs)}
        if len(parts) > 1:
            raise ValueError(f"{self.theirs} and {self.ours} have other parts, so neither gives the other's names")


def rename(ours: str, theirs: str) -> Rule:
    return Rule((ours,), (theirs,), _same, _same)


def also(ours: str, theirs: str) -> Rule:
    """One more name, which is read and never written."""
    return replace(rename(ours, theirs), from_ours=None)


def drop(theirs: str) -> Rule:
    """What we have no use for."""
    return Rule((), (theirs,), lambda _: (), None)


def transpose(ours: str, theirs: str) -> Rule:
    """Of a matrix."""
    return Rule((ours,), (theirs,), _transposed, _transposed)


def split(ours: tuple[str, ...], theirs: str, *, sizes: tuple[int, ...] | None = None, dim: int = 0) -> Rule:
    """One of theirs is several of ours, in a row.

    Args:
        sizes: of each along `dim`; None: all are of one size.
    """
    return Rule(ours, (theirs,), _cut(len(ours), sizes, dim), _joined(dim))


def join(ours: str, theirs: tuple[str, ...], *, sizes: tuple[int, ...] | None = None, dim: int = 0) -> Rule:
    """Several of theirs in a row are one of ours; `sizes` as for `split`."""
    return Rule((ours,), theirs, _joined(dim), _cut(len(theirs), sizes, dim))


@dataclass(frozen=True)
class WeightAdapter:
    """
    Attributes:
        layout: names it in messages.
        rules: the first that knows a name counts.
    """

    layout: str
    rules: tuple[Rule, ...]

    def to_ours(self, tensors: Mapping[str, Tensor]) -> AdaptedTensors:
        """Theirs [...], by our names. Nothing is read before it is asked for."""
        ways = [_Way(rule.theirs, rule.ours, rule.to_ours, rule.from_ours is not None) for rule in self.rules]
        return AdaptedTensors(self.layout, tensors, ways)

    def from_ours(self, tensors: Mapping[str, Tensor]) -> AdaptedTensors:
        """Ours [...], by their names."""
        ways = [_Way(rule.ours, rule.theirs, rule.from_ours, True) for rule in self.rules if rule.from_ours is not None]
        return AdaptedTensors(self.layout, tensors, ways)


@dataclass(frozen=True)
class _Way:
    """One direction of a rule."""

    sources: tuple[str, ...]  # patterns
    targets: tuple[str, ...]
    convert: Convert
    has_way_back: bool

    def match(self, name: str) -> tuple[int, dict[str, str]] | None:
        """Which of the sources it is, and its parts."""
        for index, pattern in enumerate(self.sources):
            if found := _compile(pattern).fullmatch(name):
                return index, found.groupdict()
        return None


@dataclass(frozen=True)
class _Group:
    """Tensors that are converted together."""

    way: _Way
    sources: tuple[str, ...]
    targets: tuple[str, ...]


class AdaptedTensors(LazyTensors):
    """Tensors [...] of one layout by the names of the other.

    Those that are converted together are held until the next are.

    Attributes:
        unread: name in the source -> why it is not read.
        is_invertible: whether the adapter's other direction gives all of the source again, to the bit.
    """

    def __init__(self, layout: str, source: Mapping[str, Tensor], ways: Sequence[_Way]) -> None:
        self._layout = layout
        self._source = source
        self.unread: dict[str, str] = {}
        groups = self._find_groups(ways)
        self.is_invertible = not self.unread and all(group.way.has_way_back for group in groups)
        self._owners = {name: group for group in groups for name in group.targets}
        if twice := sorted(name for group in groups for name in group.targets if self._owners[name] is not group):
            raise CheckpointError(
                f"{layout}: {', '.join(twice[:5])} would come from two tensors. Usually files of two models lie in one "
                "folder: keep those of one"
            )
        self._held: tuple[_Group | None, dict[str, Tensor]] = None, {}
        super().__init__(self._find_shapes(groups), self._convert_for)

    def refuse_unread(self, where: str) -> None:
        """Raises CheckpointError that lists what no rule reads."""
        if self.unread:
            lines = [f"  {name}: {why}" for name, why in self.unread.items()]
            more = f"\n  ... and {len(lines) - 20} more" * (len(lines) > 20)
            raise CheckpointError(
                f"{where}: of {self._layout}, {len(lines)} tensors cannot be read:\n"
                + "\n".join(lines[:20])
                + f"{more}\nUsually the folder is of another kind of model, or a shard is missing"
            )

    def _find_groups(self, ways: Sequence[_Way]) -> list[_Group]:
        found: dict[tuple[int, tuple[tuple[str, str], ...]], dict[int, str]] = {}
        for name in shapes_of(self._source):
            matches = ((number, match) for number, way in enumerate(ways) if (match := way.match(name)) is not None)
            first = next(matches, None)
            if first is None:
                self.unread[name] = "no rule is for it"
            else:
                number, (index, parts) = first
                found.setdefault((number, tuple(sorted(parts.items()))), {})[index] = name
        groups = []
        for (number, named), members in found.items():
            way, parts = ways[number], dict(named)
            sources = tuple(_fill(pattern, parts) for pattern in way.sources)
            if missing := [name for name in sources if name not in members.values()]:
                self.unread |= dict.fromkeys(members.values(), f"{missing[0]} is missing beside it")
            else:
                groups.append(_Group(way, sources, tuple(_fill(pattern, parts) for pattern in way.targets)))
        return groups

    def _find_shapes(self, groups: Sequence[_Group]) -> dict[str, tuple[int, ...]]:
        shapes = shapes_of(self._source)
        found: dict[str, tuple[int, ...]] = {}
        for group in groups:
            blank = [torch.empty(shapes[name], device="meta") for name in group.sources]
            found |= {name: tuple(tensor.shape) for name, tensor in self._convert(group, blank).items()}
        return found

    def _convert_for(self, name: str) -> Tensor:
        group = self._owners[name]
        if self._held[0] is not group:
            self._held = None, {}  # lets go before the next are read
            self._held = group, self._convert(group, [self._source[source] for source in group.sources])
        return self._held[1][name]

    def _convert(self, group: _Group, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        try:
            return dict(zip(group.targets, group.way.convert(tensors), strict=True))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self._layout}: {', '.join(group.sources)} cannot be made {', '.join(group.targets) or 'nothing'} "
                f"({str(error)[:200]}). Usually config.json is of another model than the weights"
            ) from None


@cache
def _compile(pattern: str) -> re.Pattern[str]:
    ends = [0, *chain.from_iterable(part.span() for part in _PART.finditer(pattern)), len(pattern)]
    literals = [re.escape(pattern[start:stop]) for start, stop in zip(ends[::2], ends[1::2], strict=True)]
    parts = [f"(?P<{name}>{'.+' if star else '[^.]+'})" for star, name in _PART.findall(pattern)]
    return re.compile("".join(chain.from_iterable(zip(literals, [*parts, ""], strict=True))))


def _fill(pattern: str, parts: Mapping[str, str]) -> str:
    """
    >>> _fill("h.{n}.{*rest}", {"n": "3", "rest": "mlp.up"})
    'h.3.mlp.up'
    """
    return _PART.sub(lambda found: parts[found[2]], pattern)


def _same(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """[...] each, as they are."""
    return tensors


def _transposed(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """[n, m] each -> [m, n]."""
    return [tensor.T for tensor in tensors]


def _joined(dim: int) -> Convert:
    return lambda tensors: [torch.cat(list(tensors), dim)]


def _cut(count: int, sizes: tuple[int, ...] | None, dim: int) -> Convert:
    def cut(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        (whole,) = tensors
        if sizes is None and whole.shape[dim] % count:
            raise ValueError(f"{whole.shape[dim]} along dimension {dim} are not {count} equal parts")
        return whole.split(list(sizes) if sizes is not None else whole.shape[dim] // count, dim)

    return cut
