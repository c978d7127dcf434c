"""docs/data.md lists every rule by which a record is skipped, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def raised_rules(source: str) -> set[str]:
    """What stands as first argument of RecordError: a text, a choice of two, or a variable that was given one."""
    tree = ast.parse(source)
    given = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return {
        rule
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "RecordError"
        for rule in _texts(node.args[0], given)
    }


def _texts(value: ast.expr, given: dict[str, ast.expr]) -> Iterator[str]:
    if isinstance(value, ast.Constant):
        yield str(value.value)
    elif isinstance(value, ast.IfExp):
        yield from _texts(value.body, given)
        yield from _texts(value.orelse, given)
    else:
        assert isinstance(value, ast.Name), f"line {value.lineno}: write the rule so that this test can read it"
        yield from _texts(given[value.id], given)


def listed_rules(document: str) -> list[str]:
    section = document.split("\n## What is skipped\n")[1].split("\n## ")[0]
    return [rule for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for rule in re.findall(r"`(\w+)`", row)]


def test_rules_are_found_however_they_are_written():
    source = """
rule = "first" if number == 1 else "later"
raise RecordError(rule, "...")
raise RecordError("missing" if gone else "unreadable", "...", where)
"""
    assert raised_rules(source) == {"first", "later", "missing", "unreadable"}


def test_the_table_of_rules_is_the_code_s():
    raised = set().union(*(raised_rules(path.read_text()) for path in (ROOT / "vlm/data").glob("*.py")))
    listed = listed_rules((ROOT / "docs/data.md").read_text())
    assert len(listed) == len(set(listed))
    assert set(listed) == raised
