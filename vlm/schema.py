"""The base of every config section: typed, frozen, unknown keys forbidden. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema, to_jsonable_python


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


TrainablePart = Literal["projector", "llm", "llm.lora", "vision"]
PARTS: tuple[TrainablePart, ...] = get_args(TrainablePart)  # in the order in which lines about them stand


def section_defaults(section: Section) -> dict[str, Any]:
    """The default of each key that has one, as JSON has it; sections within as dicts, as far as `section` has them."""
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            found[name] = section_defaults(value)
        elif not field.is_required():
            found[name] = to_jsonable_python(field.get_default(call_default_factory=True))
    return found


class Section(BaseModel):
    """One block of the YAML. Each package declares its own in its `config.py`; `vlm.config.RunConfig` joins them."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


class OneOf:
    """Annotation of a field that is one of several sections, told apart by their key `kind`.

    Args:
        kinds: the dict itself, not a copy; it is read when the class around the field is built.
    """

    def __init__(self, kinds: Mapping[str, type[Section]]) -> None:
        self.kinds = kinds

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {kind: handler.generate_schema(section) for kind, section in self.kinds.items()}
        return core_schema.tagged_union_schema(choices, discriminator="kind")


def kinds_of(field: FieldInfo) -> Mapping[str, type[Section]]:
    """The sections that a field annotated with `OneOf` may be; none for any other field."""
    return next((each.kinds for each in field.metadata if isinstance(each, OneOf)), {})
