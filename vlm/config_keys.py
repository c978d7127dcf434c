"""Every key of a config in words: what it takes, its default, what it means. Tables and forms are made from it."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vlm.config import RunConfig
from vlm.schema import OneOf, annotation_of, one_of

Control = Literal["choice", "line", "yaml", "section"]


@dataclass(frozen=True)
class ConfigKey:
    """One key, as a person is told of it."""

    key: str  # "train.learning_rate"; "data.sources[].path" within a list of sections
    values: str  # Markdown: "whole number", "`auto`, `cpu`"
    default: str  # Markdown: "`0`", "none", "required"; empty for a section
    meaning: str
    control: Control  # yaml: a list or a mapping; section: keys of its own, which may be null
    choices: tuple[str, ...] = ()  # with control choice: all that may stand there
    kinds: tuple[str, ...] = ()  # of a section with a key `kind`: those that read it; empty: every kind

    @property
    def section(self) -> str:
        """
        >>> ConfigKey("data.sources[].path", "", "", "", "line").section
        'data.sources[]'
        """
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]


def all_keys() -> list[ConfigKey]:
    """In the order of the classes, keys of a section after those around it. A section itself is there if it may be null
    or is a list."""
    return list(_keys("", RunConfig))


def section_inside(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section inside `X`, `X | None` or `tuple[X, ...]`, and whether it is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    origin = get_origin(annotation)
    if origin in (tuple, Annotated, Union, types.UnionType):
        found = next((s for s, _ in map(section_inside, get_args(annotation)) if s), None)
        return found, origin is tuple and found is not None
    return None, False


def values_of(annotation: Any) -> str:
    """
    >>> values_of(int | None), values_of(tuple[float, ...]), values_of(Literal["a", "b"])
    ('whole number', 'list of number', '`a`, `b`')
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    section, is_list = section_inside(annotation)
    if section is not None:
        return "list of sections" if is_list else "section"
    if origin is Annotated:
        return values_of(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(values_of(one) for one in inner if one is not type(None))
    if origin is tuple:
        kinds = [one for one in inner if one is not Ellipsis]
        return f"list of {values_of(kinds[0])}" if Ellipsis in inner else f"{len(kinds)} x {values_of(kinds[0])}"
    if origin is dict:
        return f"keys {values_of(inner[0])}; {values_of(inner[1])}"
    return {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}[annotation]


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined or isinstance(default, BaseModel):
        return ""
    return f"`{json.dumps(default)}`" if default is not None else "none"


def can_be_null(field: FieldInfo) -> bool:
    return type(None) in get_args(field.annotation)


def _keys(prefix: str, section: type[BaseModel]) -> Iterator[ConfigKey]:
    sections: list[tuple[str, FieldInfo]] = []
    for name, field in section.model_fields.items():
        inner, is_list = section_inside(field.annotation)
        if inner is None:
            yield _key(prefix + name, field)
            continue
        sections.append((name, field))
        if is_list or can_be_null(field):
            yield _key(prefix + name, field)
    for name, field in sections:
        inner, is_list = section_inside(field.annotation)
        union, place = one_of(annotation_of(field)), f"{prefix}{name}{'[]' if is_list else ''}."
        assert inner is not None
        yield from _keys_of_kinds(place, union) if union is not None else _keys(place, inner)


def _keys_of_kinds(prefix: str, union: OneOf) -> Iterator[ConfigKey]:
    """Each name once; where kinds differ about it, as the first of them says."""
    yield ConfigKey(
        f"{prefix}kind",
        ", ".join(f"`{kind}`" for kind in union.kinds),
        f'`"{union.default}"`' if union.default else "required",
        union.meaning(),
        "choice",
        tuple(union.kinds),
    )
    for name, field in union.fields().items():
        kinds = tuple(kind for kind, section in union.kinds.items() if name in section.model_fields)
        if name != "kind":
            yield _key(prefix + name, field, () if len(kinds) == len(union.kinds) else kinds)
    for name, field in union.fields().items():
        if (inner := one_of(annotation_of(field))) is not None:
            yield from _keys_of_kinds(f"{prefix}{name}[].", inner)


def _key(key: str, field: FieldInfo, kinds: tuple[str, ...] = ()) -> ConfigKey:
    choices = _choices(field.annotation)
    control: Control = "choice" if choices else _control(field.annotation)
    if choices and can_be_null(field):
        choices = (*choices, "null")
    meaning = " ".join((field.description or "").split())
    return ConfigKey(key, values_of(field.annotation), default_of(field), meaning, control, choices, kinds)


def _choices(annotation: Any) -> tuple[str, ...]:
    """All values that may stand there, as YAML writes them; empty where they cannot be listed.

    >>> _choices(bool | Literal["auto"]), _choices(int | Literal["auto"])
    (('true', 'false', 'auto'), ())
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is bool:
        return "true", "false"
    if origin is Literal:
        return tuple(map(str, inner))
    if origin is Annotated:
        return _choices(inner[0])
    if origin in (Union, types.UnionType):
        found = [_choices(one) for one in inner if one is not type(None)]
        return tuple(choice for some in found for choice in some) if all(found) else ()
    return ()


def _control(annotation: Any) -> Control:
    section, is_list = section_inside(annotation)
    if section is not None:
        return "yaml" if is_list else "section"
    alternatives = get_args(annotation) if get_origin(annotation) in (Annotated, Union, types.UnionType) else ()
    is_line = get_origin(annotation) not in (tuple, dict) and all(_control(one) == "line" for one in alternatives)
    return "line" if is_line else "yaml"
