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


@pytest.mark.parametrize("loads", [True, False])
def test_schemas_are_declared_only_where_the_kernels_do_not_load(monkeypatch: pytest.MonkeyPatch, loads: bool):
    import torch

    defined: list[str] = []

    class Library:
        def __init__(self, namespace: str, kind: str) -> None:
            assert (namespace, kind) == ("torchvision", "FRAGMENT")

        def define(self, schema: str) -> None:
            defined.append(schema.partition("(")[0])

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
