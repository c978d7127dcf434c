"""Write the tables of docs/config.md from the config classes: python scripts/config_table.py

tests/test_config_docs.py compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pydantic import BaseModel

from vlm.config import RunConfig
from vlm.config_keys import default_of, section_inside, values_of
from vlm.schema import OneOf, annotation_of, one_of

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/config.md"
START, END = "<!-- tables: scripts/config_table.py -->\n", "<!-- end of tables -->\n"


def tables() -> str:
    """One table per section, keys in the order of the classes; of a kind with keys of its own, those."""
    found: dict[type[BaseModel], str] = {}  # a section used twice gets one table
    for section, table in _tables("", RunConfig):
        found.setdefault(section, table)
    return "\n".join(found.values())


def with_tables(document: str) -> str:
    before, _, rest = document.partition(START)
    return f"{before}{START}\n{tables()}\n{END}{rest.partition(END)[2]}"


def _tables(prefix: str, section: type[BaseModel]) -> Iterator[tuple[type[BaseModel], str]]:
    yield section, _table(prefix, section)
    for name, field in section.model_fields.items():
        inner, is_list = section_inside(field.annotation)
        union, place = one_of(annotation_of(field)), f"{prefix}{name}{'[]' if is_list else ''}"
        if inner is not None and union is not None:
            yield inner, _table(f"{place}.", inner, union)
            yield from islice(_tables(f"{place}.", inner), 1, None)  # the sections within
            for kind, choice in union.kinds.items():
                if choice.model_fields.keys() - inner.model_fields.keys():
                    yield choice, _table(f"{place}, kind {kind}", choice, left_out=inner)
                    yield from islice(_tables(f"{place}.", choice), 1, None)
        elif inner is not None:
            yield from _tables(f"{place}.", inner)


def _table(
    prefix: str, section: type[BaseModel], union: OneOf | None = None, left_out: type[BaseModel] = BaseModel
) -> str:
    """
    Args:
        union: it is the base of one of several sections.
        left_out: its keys stand in a table of their own.
    """
    lines = [f"### {prefix.rstrip('.') or 'Top level'}", "", "| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        inner, is_list = section_inside(field.annotation)
        if name in left_out.model_fields or (inner is not None and not is_list and field.get_default() is not None):
            continue  # it has a table of its own, and cannot be null
        meaning, values, default = field.description or "", values_of(field.annotation), default_of(field)
        if name == "kind" and union is not None:
            meaning, values = union.meaning(), ", ".join(f"`{kind}`" for kind in union.kinds)
            default = f'`"{union.default}"`' if union.default else "required"
        meaning = meaning.replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{name}` | {values} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{DOCUMENT.name}: tables written")
