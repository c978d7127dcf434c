"""A function that takes or returns tensors says their shapes: "[B, L, D]", or "scalar". The letters are in
docs/architecture.md; "[...]" is any shape."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vlm"
LEAST = 0.9  # share of such functions
_SHAPE = re.compile(r"(?<!\w)\[[\w.][\w.,`*+/() -]*\]|\b[Ss]calars?\b")  # not list[int]
_EXAMPLE = re.compile(r"^\s*>>> .*?(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)  # a list in a doctest is no shape


def tensor_functions(source: str) -> Iterator[tuple[int, str, bool]]:
    """(line, name, whether it says shapes) of each function with `Tensor` in its signature, nested ones included."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        for function in ast.iter_child_nodes(node):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and _has_tensors(function):
                signature = lines[function.lineno - 1 : function.body[0].lineno - 1]
                comments = [line.partition("#")[2] for line in signature]
                owners = [function, node] if isinstance(node, ast.ClassDef) else [function]
                text = "\n".join([_EXAMPLE.sub("", ast.get_docstring(owner) or "") for owner in owners] + comments)
                yield function.lineno, function.name, _SHAPE.search(text) is not None


def _has_tensors(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    arguments = (node for node in ast.walk(function.args) if isinstance(node, ast.arg))
    annotations = [function.returns, *(argument.annotation for argument in arguments)]
    return any("Tensor" in ast.unparse(annotation) for annotation in annotations if annotation is not None)


@pytest.mark.slow
def test_functions_of_tensors_say_the_shapes():
    found = {
        f"{path.relative_to(PACKAGE.parent).as_posix()}:{line}: {name}": says
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, name, says in tensor_functions(path.read_text(encoding="utf-8"))
    }
    missing = [where for where, says in found.items() if not says]
    share = 1 - len(missing) / len(found)
    assert share >= LEAST, "\n".join([f"{share:.0%} of {len(found)} functions say shapes; these do not:", *missing])


def test_what_counts_as_saying_a_shape():
    source = '''
def first(x: Tensor) -> Tensor:
    """[N, P, C] -> [N, T, D]."""

def second(x: Tensor) -> None:
    """Takes a list[int].

    >>> second(1)
    [1, 2]
    """

def third(
    x: Tensor,  # [B, L]
) -> float:
    return 0.0

class Block:
    """[B, L, D] -> [B, L, D]."""

    def forward(self, x: Tensor) -> Tensor:
        return x

def fourth(x: int) -> int:
    return x
'''
    assert [(name, says) for _, name, says in tensor_functions(source)] == [
        ("first", True), ("second", False), ("third", True), ("forward", True),
    ]  # fmt: skip
