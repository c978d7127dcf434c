"""YAML files with inheritance and overrides -> plain values, each with the place where it was written.

A file may name others under `base:` (one, or a list; relative to the file). Later ones override earlier ones, the file
itself overrides its bases, and `a.b=value` options override all. Mappings are merged key by key, lists are replaced.
Nothing here knows what the keys mean. What is wrong is collected in `Source.problems`, so that all of it is reported at
once.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]
OPTIONS = "--options"  # the place of what is written on the command line


@dataclass
class Source:
    """A config as written: merged values with `${...}` unresolved, and where each of its keys was written."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)  # key -> "file:line", or "--options"
    problems: list[str] = field(default_factory=list)  # "place: what is wrong"
    broken: set[Key] = field(default_factory=set)  # keys whose value could not be read; () when a whole file could not

    def place(self, key: Key) -> str:
        """Where `key` was written, or else the nearest key around it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, "config")

    def has(self, key: Key) -> bool:
        return self._find(key)[0]

    def get(self, key: Key) -> Any:
        """The value as written, or None."""
        return self._find(key)[1]

    def _find(self, key: Key) -> tuple[bool, Any]:
        value: Any = self.values
        for part in key:
            in_dict = isinstance(value, dict) and part in value
            in_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
            if not in_dict and not in_list:
                return False, None
            value = value[part]
        return True, value


def read_layers(path: Path, options: Sequence[str] = ()) -> Source:
    """Merge a file with its bases and the overrides.

    Args:
        path: an existing file.
        options: `a.b=value`; `a.0.b` or `a[0].b` for a place in a list; `a[b.c]` for a key with a dot. Values are read
            as YAML.
    """
    source = _read_file(path, ())
    for option in options:
        _apply_option(option, source)
    return source


def leaves(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every value that is no mapping and no list, with its key.

    >>> list(leaves({"a": [1, {"b": 2}]}))
    [(('a', 0), 1), (('a', 1, 'b'), 2)]
    """
    if isinstance(value, dict):
        for name, child in value.items():
            yield from leaves(child, (*key, name))
    elif isinstance(value, list):
        for number, child in enumerate(value):
            yield from leaves(child, (*key, number))
    else:
        yield key, value


def dotted(key: Key) -> str:
    """
    >>> dotted(("data", "sources", 0, "path"))
    'data.sources[0].path'
    """
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def spans_of(text: str, name: str) -> list[tuple[int, int, str]]:
    """Where the values of a top-level key stand in a file, each as (start, end, value): one, or those of its list.

    >>> spans_of("base: [a.yaml, b.yaml]", "base")
    [(7, 13, 'a.yaml'), (15, 21, 'b.yaml')]
    """
    node = yaml.compose(text, Loader=Loader)
    for key_node, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key_node.value == name:
            found = value.value if isinstance(value, yaml.SequenceNode) else [value]
            return [(one.start_mark.index, one.end_mark.index, str(one.value)) for one in found]
    return []


class Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-4` is a number; `no`, `on`, `12:30` and `2024-01-01` are text. No aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # they can make a small file huge, or refer to themselves
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not read; refer to another key with ${a.b}", event.start_mark
            )
        return super().compose_node(parent, index)


Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)", list("-+.0123456789")),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)

_SCALARS: dict[str, Callable[[str], Any]] = {
    "tag:yaml.org,2002:null": lambda text: None,
    "tag:yaml.org,2002:bool": lambda text: {"true": True, "false": False}[text.lower()],
    "tag:yaml.org,2002:int": lambda text: int(text, 16 if text.lower().startswith("0x") else 10),
    "tag:yaml.org,2002:float": lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan")),
    "tag:yaml.org,2002:str": str,
}
_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


def _read_file(path: Path, children: tuple[Path, ...]) -> Source:
    shown = Path(os.path.normpath(path))
    own = Source(places={(): f"{shown}:1"})
    node = _compose_file(path, shown, own)
    if node is None:
        return own
    if not isinstance(node, yaml.MappingNode):
        own.problems.append(f"{shown}:1: expected keys with values, found {_kind(node)}")
        own.broken.add(())
        return own
    own.values = _Converter(own, lambda mark: f"{shown}:{mark.line + 1}").convert(node, ())
    merged = Source()
    chain = (*children, path.resolve())
    for base, place in _bases(own):
        file = path.parent / base
        if file.resolve() in chain:
            names = " -> ".join(link.name for link in (*chain, file.resolve()))
            merged.problems.append(f"{place}: base: the files form a circle: {names}")
            merged.broken.add(())
        elif not file.is_file():
            merged.problems.append(f"{place}: base: {os.path.normpath(file)} does not exist{_nearest_file(file)}")
            merged.broken.add(())
        else:
            _merge_source(merged, _read_file(file, chain))
    _merge_source(merged, own)
    return merged


def _compose_file(path: Path, shown: Path, source: Source) -> yaml.Node | None:
    try:
        return yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=Loader)
    except UnicodeDecodeError as error:
        source.problems.append(f"{shown}: not UTF-8 text (byte {error.start})")
    except OSError as error:
        source.problems.append(f"{shown}: cannot be read ({error.strerror})")
    except RecursionError:
        source.problems.append(f"{shown}: nested too deeply")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f" {error.context}" if error.context else ""
        if "'{'" in str(error.problem):
            context += "; write a ${...} that stands inside {...} or [...] in quotes"
        source.problems.append(f"{shown}:{mark.line + 1 if mark else 1}: not YAML: {error.problem}{context}")
    except yaml.YAMLError as error:
        source.problems.append(f"{shown}: not YAML: {str(error).splitlines()[0]}")
    source.broken.add(())
    return None


def _bases(source: Source) -> list[tuple[str, str]]:
    """Take `base:` out of the values; (path, place) of each file it names."""
    if "base" not in source.values:
        return []
    named = source.values.pop("base")
    found = []
    for number, name in enumerate(named if isinstance(named, list) else [named]):
        place = source.place(("base", number))
        if isinstance(name, str) and name:
            found.append((name, place))
        else:
            source.problems.append(f"{place}: base: expected the path of a YAML file, found {name!r}")
            source.broken.add(())
    return found


def _nearest_file(missing: Path) -> str:
    if not missing.parent.is_dir():
        return f"; nor does the folder {os.path.normpath(missing.parent)}"
    near = difflib.get_close_matches(missing.name, [path.name for path in missing.parent.glob("*.y*ml")], n=1)
    return f"; did you mean {near[0]}?" if near else " (it is looked for beside the file that names it)"


def _merge_source(target: Source, over: Source) -> None:
    target.places = {key: place for key, place in target.places.items() if not _replaced(key, over)} | over.places
    target.values = _merge(target.values, over.values)
    target.problems += over.problems
    target.broken |= over.broken


def _replaced(key: Key, over: Source) -> bool:
    """Is the value at `key` hidden by one of `over` that is no mapping?"""
    return any(over.has(key[:n]) and not isinstance(over.get(key[:n]), dict) for n in range(1, len(key)))


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    # not OmegaConf.merge: it parses `${...}` on the way, and a mistake in one would lose its place
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply_option(option: str, source: Source) -> None:
    name, equals, text = option.partition("=")
    place = OPTIONS
    parts = [bracketed or plain for bracketed, plain in re.findall(r"\[([^\]]+)\]|([^.\[\]]+)", name)]
    if not equals or not parts:
        source.problems.append(f"--options {option!r}: expected key=value, for example train.learning_rate=1e-4")
        return
    if parts == ["base"]:
        source.problems.append(f"{place}: base: is read from files only; name another file instead")
        return
    converter = _Converter(source, lambda mark: place)
    container: Any = source.values  # a mapping or a list
    key: Key = ()
    for part in parts[:-1]:
        step = _step(container, part, f"{place}: {name}", source)
        if step is None:
            return
        key = (*key, step)
        child = container.get(step) if isinstance(container, dict) else container[step]
        if not isinstance(child, dict | list):
            child = container[step] = {}
            source.places[key] = place
        container = child
    last = _step(container, parts[-1], f"{place}: {name}", source)
    if last is None:
        return
    key = (*key, last)
    source.places = {known: at for known, at in source.places.items() if known[: len(key)] != key}
    source.places[key] = place
    try:
        node = yaml.compose(text, Loader=Loader)
    except (yaml.YAMLError, RecursionError) as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        source.problems.append(f"{place}: {name}: {text[:60]!r} is not YAML ({problem}); quote it if it is text")
        source.broken.add(key)
        return
    container[last] = None if node is None else converter.convert(node, key)


def _step(container: dict[str, Any] | list[Any], part: str, place: str, source: Source) -> str | int | None:
    """`part` as a key of a mapping or a number in a list; None when it is no place in the list."""
    if isinstance(container, dict):
        return part
    if part.isdecimal() and int(part) < len(container):
        return int(part)
    source.problems.append(f"{place}: {part!r} is no place in a list of {len(container)} (the first is 0)")
    return None


@dataclass
class _Converter:
    """YAML nodes -> plain values. Notes places and problems in `source`."""

    source: Source
    place_of: Callable[[yaml.Mark], str]

    def convert(self, node: yaml.Node, key: Key) -> Any:
        place = self.place_of(node.start_mark)
        self.source.places.setdefault(key, place)
        if node.tag not in _SCALARS and node.tag not in _COLLECTIONS:
            self._problem(place, key, f"the tag {node.tag} is refused: tags can make objects or run code")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self.convert(item, (*key, number)) for number, item in enumerate(node.value)]
        try:
            return _SCALARS[node.tag](node.value)
        except (ValueError, KeyError):
            self._problem(place, key, f"{node.value[:60]!r} is no {node.tag.rpartition(':')[2]}")
            return None

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        first: dict[str, str] = {}
        for key_node, value_node in node.value:
            place = self.place_of(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _SCALARS:
                self.source.problems.append(f"{place}: expected a name before ':', found {_kind(key_node)}")
                continue
            name = key_node.value
            if name in values:
                shown = dotted((*key, name))
                self.source.problems.append(f"{place}: {shown}: written twice, first at {first[name]}; keep one")
                continue
            first[name] = place
            self.source.places[(*key, name)] = place
            values[name] = self.convert(value_node, (*key, name))
        return values

    def _problem(self, place: str, key: Key, message: str) -> None:
        self.source.broken.add(key)
        self.source.problems.append(f"{place}: {dotted(key)}: {message}" if key else f"{place}: {message}")


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return f"{node.value[:60]!r}"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
