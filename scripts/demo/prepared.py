"""Folders that are made once: written beside their place, listed with sha256, then renamed into it.

`prepared.json` in such a folder names the recipe that made it and the sha256 of every file. A folder whose recipe is
another one, or with a file missing or changed, is made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

LIST = "prepared.json"


def recipe_of(files: Sequence[Path], *settings: object) -> str:
    """A digest of what decides the result: the code and tables in `files`, and settings such as a download's sum."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    digest.update(repr(settings).encode())
    return digest.hexdigest()[:16]


def is_prepared(folder: Path, recipe: str) -> bool:
    """True when `folder` was made by this recipe and every file in it still has its sha256."""
    try:
        prepared = json.loads((folder / LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if prepared["recipe"] != recipe:
        return False
    return all(
        (folder / name).is_file() and file_sha256(folder / name) == digest for name, digest in prepared["files"].items()
    )


def prepare(folder: Path, recipe: str, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, list its files, and put it in the place of `folder`.

    An interrupted `write` leaves `folder` as it was.
    """
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    for path in files:
        path.chmod(0o644)  # safetensors writes files that their owner alone can read
    prepared = {
        "recipe": recipe,
        "files": {path.relative_to(temporary).as_posix(): file_sha256(path) for path in files},
    }
    (temporary / LIST).write_text(json.dumps(prepared, indent=1), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
