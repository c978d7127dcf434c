"""A torchvision whose kernels cannot load must not take the other packages down, and a good one must stay untouched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vlm import compat


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_torchvision_imports_after_prepare():
    code = """
from vlm.compat import prepare
prepare()
prepare()
from torchvision.transforms import v2
import timm.layers
print("fine")
"""
    assert run(code) == "fine"


def test_a_module_that_never_prepares_imports_no_torch():
    assert run("import sys, vlm.compat; print('torch' in sys.modules)") == "False"


STUB = """
import importlib.abc, sys
class Finder(importlib.abc.MetaPathFinder):  # as a sitecustomize has it: when somebody looks for torchvision
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch
            self.library = sys.kept = torch.library.Library("torchvision", "FRAGMENT")
            for schema in SCHEMAS:
                self.library.define(schema)
sys.meta_path.insert(0, Finder())
"""
FULL = ["nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"]  # fmt: skip


@pytest.mark.one_in(4)
@pytest.mark.slow
@pytest.mark.parametrize("schemas", [FULL, FULL[:1]], ids=["both", "nms only"])
@pytest.mark.parametrize("looks_first", [True, False], ids=["stub defines first", "stub defines while we look"])
def test_operators_that_a_stub_has_defined_are_not_defined_again(schemas: list[str], looks_first: bool):
    """A second definition raises: "Tried to register an operator with the same name"."""
    look = "import importlib.util; importlib.util.find_spec('torchvision')" if looks_first else ""
    code = f"SCHEMAS = {schemas!r}\n{STUB}\n{look}\nfrom vlm import compat; compat._loads = lambda package: False\n"
    code += "compat.prepare(); import torch; print(hasattr(torch.ops.torchvision, 'qnms'), len(compat._libraries))"
    assert run(code) == f"True {2 - len(schemas)}"


def test_a_torchvision_that_was_imported_before_is_left_alone():
    """A real one, or a stand-in without a spec, on which `find_spec` raises ValueError."""
    code = """
import sys, types
sys.modules["torchvision"] = types.ModuleType("torchvision")
from vlm import compat
compat.prepare()
print(len(compat._libraries), "torch" in sys.modules)
"""
    assert run(code) == "0 False"


@pytest.mark.parametrize("loads", [True, False])
def test_schemas_are_declared_only_where_the_kernels_do_not_load(monkeypatch: pytest.MonkeyPatch, loads: bool):
    import torch

    defined: list[str] = []

    class Library:
        def __init__(self, namespace: str, kind: str) -> None:
            assert (namespace, kind) == ("torchvision", "FRAGMENT")

        def define(self, schema: str) -> None:
            defined.append(schema.partition("(")[0])

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch.ops, "torchvision", object(), raising=False)  # nobody has named any
    monkeypatch.setattr(compat, "_is_prepared", False)
    monkeypatch.setattr(compat, "_libraries", [])
    monkeypatch.setattr(compat, "_loads", lambda package: loads)
    monkeypatch.setattr(torch.library, "Library", Library)
    compat.prepare()
    assert defined == ([] if loads else ["nms", "qnms"])


def test_a_folder_without_an_extension_does_not_load(tmp_path: Path):
    assert not compat._loads(tmp_path)
    (tmp_path / "_C.so").write_bytes(b"no library")
    assert not compat._loads(tmp_path)
