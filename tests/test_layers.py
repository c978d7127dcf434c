"""Who may import whom. The table in docs/architecture.md is this one."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vlm"

# A file imports its own package and those of a lower number. Equal numbers are neighbours that do not know each other.
LAYERS = {
    "errors": 0, "batch": 0, "schema": 0, "layered_yaml": 0, "distributed": 0, "logs": 0, "compat": 0, "faults": 0,
    "precision": 0, "launch": 0, "files": 0, "config": 0, "config_keys": 0, "config_paths": 0,
    "moved": 0, "version": 0, "curves": 0,
    "data": 1, "models": 1, "settle": 1,
    "generation": 2, "objectives": 2, "config_checks": 2,
    "train": 3, "kept_config": 3,
    "artifacts": 4, "plan": 4, "runs": 4,
    "inference": 5, "prepare": 5, "compare": 5,
    "export": 6, "evaluation": 6, "proof": 6,
    "run": 7, "blame": 7, "apps": 7, "adopt": 7,
    "cli": 8,
}  # fmt: skip
BOTTOM = {name for name, layer in LAYERS.items() if layer == 0}  # single files that may use each other
FACADE = "__init__"  # vlm/__init__.py for users: the version, and vlm.load, imported when it is asked for
# a package's config.py knows vlm.schema and the sections of its own kinds only, so vlm.config takes all; objectives,
# engines and projectors have their sections beside the dict of the kinds
SECTIONS = {f"vlm.{name}.config" for name in LAYERS} | {"vlm.objectives", "vlm.objectives.base", "vlm.objectives.lm"}
SECTIONS |= {"vlm.train.engines.kind", "vlm.train.engines.kinds", "vlm.models.projector_kinds"}
SECTIONS |= {"vlm.evaluation.task_kinds"}
LIGHT = (
    "vlm.config", "vlm.config_checks", "vlm.cli.main", "vlm.errors", "vlm.batch", "vlm.schema", "vlm.layered_yaml",
    "vlm.logs", "vlm.train.checkpoint",
)  # fmt: skip


def package_of(module: str) -> str:
    return module.split(".")[1]


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, module of this package) of every import, those inside functions and under TYPE_CHECKING included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vlm":
            names = [f"vlm.{alias.name}" for alias in node.names] if node.module == "vlm" else [node.module]
            found += [(node.lineno, name) for name in names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names if alias.name.startswith("vlm.")]
    return found


def offences(path: Path, root: Path = PACKAGE) -> list[str]:
    parts = path.relative_to(root).with_suffix("").parts
    own = parts[0]
    if own == FACADE:
        return []
    if own not in LAYERS:
        return [f"vlm/{'/'.join(parts)}: {own} is in no layer; add it to LAYERS in {Path(__file__).name}"]
    is_section = parts[1:] == ("config",)
    bad = []
    for line, module in imports_of(path):
        other = package_of(module)
        allowed = (
            LAYERS.get(other, 99) < LAYERS[own]
            or other == own
            or {own, other} <= BOTTOM
            or (own == "config" and module in SECTIONS)
        )
        if is_section:
            allowed = module == "vlm.schema" or (other == own and module in SECTIONS)
        if not allowed:
            bad.append(f"vlm/{'/'.join(parts)}.py:{line}: {own} (layer {LAYERS[own]}) imports {module} "
                       f"(layer {LAYERS.get(other, '?')})")  # fmt: skip
    return bad


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_file_imports_its_own_package_and_lower_ones_only(path):
    assert not offences(path), "\n".join(["", *offences(path)])


def test_an_offending_line_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "x.py"
    path.write_text("import os\n\ndef f():\n    from vlm.models.build import build_model\n")
    assert offences(path, tmp_path) == ["vlm/data/x.py:4: data (layer 1) imports vlm.models.build (layer 1)"]


def import_graph(root: Path = PACKAGE) -> dict[str, set[str]]:
    """Module -> the modules it imports anywhere, inside functions and under TYPE_CHECKING too.

    That importing `vlm.data.scan` runs `vlm/data/__init__.py` as well does not count.
    """
    names = {path.relative_to(root.parent).with_suffix(""): path for path in root.rglob("*.py")}
    paths = {".".join(name.parts).removesuffix(f".{FACADE}"): path for name, path in names.items()}
    graph: dict[str, set[str]] = {module: set() for module in paths}
    for module, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[module] |= {name if name in paths else f"{node.module}" for name in found} & paths.keys()
            elif isinstance(node, ast.Import):
                graph[module] |= {alias.name for alias in node.names} & paths.keys()
    return graph


def cycle_of(graph: dict[str, set[str]]) -> str:
    """One cycle, as "a -> b -> a" where a imports b; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return " -> ".join(reversed(error.args[1]))  # it lists what is imported before what imports it
    return ""


@pytest.mark.slow
def test_no_modules_import_each_other_in_a_circle_late_imports_included():
    assert not cycle_of(import_graph()), "move what both need into a module below them"


def test_a_cycle_is_named(tmp_path):
    package = tmp_path / "vlm"
    (package / "data").mkdir(parents=True)
    (package / "data" / "__init__.py").touch()
    (package / "data" / "a.py").write_text("from vlm.data.b import f\n")
    (package / "data" / "b.py").write_text("def f():\n    from vlm.data import c\n")
    (package / "data" / "c.py").write_text("if TYPE_CHECKING:\n    import vlm.data.b\n")
    graph = import_graph(package)
    assert graph["vlm.data.a"] == {"vlm.data.b"}
    assert cycle_of(graph) in ("vlm.data.b -> vlm.data.c -> vlm.data.b", "vlm.data.c -> vlm.data.b -> vlm.data.c")


@pytest.mark.parametrize("module", LIGHT)
def test_light_module_imports_no_heavy_package(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_of_the_package_is_longer_than_500_lines():
    long = [f"{p}: {n} lines" for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 500]
    assert not long
