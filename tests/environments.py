"""Environments of other versions and of other people's clients, made in seconds by uv."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

_BORROWED = "borrowed"


def make_environment(
    folder: Path, packages: Sequence[str], *, borrowed: Iterable[str] = (), behind: Iterable[str] = ()
) -> Path:
    """An environment of this interpreter with `packages` from the registry; skips the test where that does not answer.

    Args:
        packages: with all that they need, unless something is lent to them: then exactly these, each pinned.
        borrowed: distributions of this environment that it sees with what they need, and no other.
        behind: folders of packages that it looks into after its own.

    Returns:
        its interpreter.
    """
    _run_uv("venv", "--quiet", "--clear", "--python", sys.executable, folder)
    interpreter = folder / "bin" / "python"
    (site,) = (folder / "lib").glob("python*/site-packages")
    lends = sorted({*behind, *_link(folder / _BORROWED, borrowed)})
    if lends:
        (site / "zz_behind.pth").write_text("".join(f"{path}\n" for path in lends))
    exactly = ["--no-deps"] if lends else []
    _run_uv("pip", "install", "--quiet", "--python", interpreter, *exactly, *packages)
    return interpreter


def _link(folder: Path, names: Iterable[str]) -> list[str]:
    """Links to the files of installed distributions. Returns the folder, or nothing where there is none to link."""
    found = _with_requirements(names)
    for each in found:
        folder.mkdir(exist_ok=True)
        for top in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists():  # distributions may share a folder, as those below nvidia/ do
                link.symlink_to(Path(str(each.locate_file(top))).resolve())
    return [str(folder)] if found else []


def _with_requirements(names: Iterable[str]) -> list[Distribution]:
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # an optional one, or of another platform
            continue
        needs = map(Requirement, found[name].requires or ())
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return list(found.values())


def _run_uv(*arguments: object) -> None:
    import uv  # not in the environments that are made here

    index = os.environ.get("PIP_INDEX_URL")  # a registry of one's own, as pip knows it
    environment = os.environ | ({"UV_DEFAULT_INDEX": index} if index else {})
    done = subprocess.run(
        [uv.find_uv_bin(), *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        pytest.skip(f"the registry has not given {arguments[-1]}: {done.stderr.strip()[-300:]}")
