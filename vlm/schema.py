"""The base of every config section: typed, frozen, unknown keys forbidden. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, core_schema, to_jsonable_python


def _at_home(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path


PathText = Annotated[str, AfterValidator(_at_home)]
"""A file, folder, or name that a library resolves. `~` is the home directory, as in a shell."""


def is_local(path: str) -> bool:
    """Whether a model is meant to lie on this disk, whether or not it does; other names a hub may know.

    >>> is_local("cache/ckpt/x"), is_local("./x"), is_local("models/qwen/7b"), is_local("Qwen/Qwen2.5-7B-Instruct")
    (True, True, True, False)
    """
    has_many_parts = path.count("/") > 1 and ":" not in path  # hf-hub:owner/name is for timm and open_clip
    return has_many_parts or path.startswith((".", "/", "~", "cache/"))


TrainablePart = Literal["projector", "llm", "llm.lora", "vision", "vision.lora", "value_head"]
PARTS: tuple[TrainablePart, ...] = get_args(TrainablePart)  # in the order in which lines about them stand


def section_defaults(section: Section) -> dict[str, Any]:
    """The default of each key that has one, as JSON has it; sections within as dicts, as far as `section` has them."""
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            found[name] = section_defaults(value)
            if (union := one_of(annotation_of(field))) is not None and union.default is not None:
                found[name]["kind"] = union.default
        elif not field.is_required():
            found[name] = to_jsonable_python(field.get_default(call_default_factory=True))
    return found


class Section(BaseModel):
    """One block of the YAML. Each package declares its own in its `config.py`; `vlm.config.RunConfig` joins them."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True, allow_inf_nan=False
    )


class KindSection(Section):
    """One of several sections that stand at the same key and are told apart by `kind`; see `OneOf`."""

    kind: str

    _unused: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def unused(self) -> Mapping[str, Any]:
        """Keys of other kinds that were written beside this one's, with their values."""
        return self._unused

    def written(self, name: str) -> Any:
        """The value of a key of any kind, this one's or not; None if there is none."""
        return getattr(self, name) if name in type(self).model_fields else self._unused.get(name)


class OneOf:
    """Annotation of a field that is one of several sections, told apart by their key `kind`.

    A key of another kind may stand there too: it must be right for that kind, and is kept in `unused`. So a file stays
    valid where `--options` choose another kind.

    Args:
        kinds: the dict itself, not a copy; it is read when the class around the field is built.
        default: the kind where `kind` is left out; None where it must be written.
    """

    def __init__(self, kinds: Mapping[str, type[KindSection]], default: str | None = None) -> None:
        self.kinds = kinds
        self.default = default

    def chosen(self, values: Any) -> type[KindSection] | None:
        """The section that written values are meant for; None where they say no kind that there is."""
        kind = values.get("kind", self.default) if isinstance(values, Mapping) else None
        return self.kinds.get(kind) if isinstance(kind, str) else None

    def fields(self, section: type[KindSection] | None = None) -> dict[str, FieldInfo]:
        """Of all kinds, by name; of those that share a name, that of `section`, else that of the first kind."""
        sections = [*reversed([*self.kinds.values()]), *([section] if section else [])]
        return {name: field for each in sections for name, field in each.model_fields.items()}

    def foreign_fields(self, section: type[KindSection]) -> dict[str, FieldInfo]:
        """Those of the other kinds that `section` has not."""
        return {name: field for name, field in self.fields().items() if name not in section.model_fields}

    def foreign_values(self, section: KindSection) -> dict[str, Any]:
        """What was written of the other kinds' keys, else their defaults; as JSON has them."""
        fields = self.foreign_fields(type(section)).items()
        defaults = {n: each.get_default(call_default_factory=True) for n, each in fields if not each.is_required()}
        return to_jsonable_python(defaults | dict(section.unused))

    def meaning(self) -> str:
        """What each kind is, for people."""
        said = {kind: section.model_fields["kind"].description or "" for kind, section in self.kinds.items()}
        return " ".join(f"{kind}: {' '.join(text.split())}" for kind, text in said.items() if text)

    def build(self, values: Mapping[str, Any]) -> Any:
        """The section of the kind that `values` name. Raises ValidationError, which is a ValueError."""
        return TypeAdapter(Annotated[KindSection, self]).validate_python(dict(values))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {kind: handler.generate_schema(section) for kind, section in self.kinds.items()}
        union = core_schema.tagged_union_schema(choices, discriminator="kind")
        return core_schema.no_info_wrap_validator_function(self._read, union)

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """One object with the keys of all kinds, as each may stand there."""
        sections = [handler.resolve_ref_schema(handler(choice)) for choice in schema["schema"]["choices"].values()]
        properties = {name: each for one in reversed(sections) for name, each in one["properties"].items()}
        properties["kind"] = {"type": "string", "enum": list(self.kinds), "description": self.meaning()}
        return {"type": "object", "properties": properties, "additionalProperties": False}

    def _read(self, values: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        if isinstance(values, dict) and self.default is not None:
            values = {"kind": self.default, **values}
        section = self.chosen(values)
        if section is None:
            return handler(values)  # it is a section already, or is refused
        foreign, unused, problems = self.foreign_fields(section), {}, []
        for name in [name for name in values if name in foreign]:
            try:
                unused[name] = TypeAdapter(annotation_of(foreign[name])).validate_python(values[name])
            except ValidationError as error:
                problems += _details(error, key=(name,))
        built: Any = None
        try:
            built = handler({name: value for name, value in values.items() if name not in foreign})
        except ValidationError as error:
            problems += _details(error, skip=1)  # pydantic names the kind first
        if problems:
            raise ValidationError.from_exception_data(section.__name__, problems)
        if unused:
            built._unused.update(unused)
        return built


def _details(error: ValidationError, key: tuple[str, ...] = (), skip: int = 0) -> list[InitErrorDetails]:
    """The problems of an error, to be raised again with others."""
    found = error.errors(include_url=False)
    places = [(*key, *each["loc"][skip:]) for each in found]
    return [
        InitErrorDetails(type=each["type"], loc=place, input=each["input"], ctx=each.get("ctx", {}))
        for each, place in zip(found, places, strict=True)
    ]


def annotation_of(field: FieldInfo) -> Any:
    """A field's annotation as it was written, rules and unions included."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def one_of(annotation: Any) -> OneOf | None:
    """The union that a field of this annotation, or each entry of its list, is; None for any other."""
    if isinstance(annotation, OneOf):
        return annotation
    return next(filter(None, map(one_of, get_args(annotation))), None)


class Chosen(NamedTuple):
    """A section of a config that is one of several."""

    key: tuple[str | int, ...]
    union: OneOf
    section: KindSection


def chosen_kinds(section: Section, key: tuple[str | int, ...] = ()) -> Iterator[Chosen]:
    """All sections within that are one of several, by their place."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        entries = enumerate(value) if isinstance(value, tuple) else [(None, value)]
        for number, entry in entries:
            place = (*key, name) if number is None else (*key, name, number)
            union = one_of(annotation_of(field))
            if union is not None and isinstance(entry, KindSection):
                yield Chosen(place, union, entry)
            if isinstance(entry, Section):
                yield from chosen_kinds(entry, place)
