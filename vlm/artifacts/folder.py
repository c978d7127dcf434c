"""A folder appears complete or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm.artifacts.manifest import NAME
from vlm.errors import ConfigError
from vlm.faults import fault
from vlm.files import flush, flush_tree
from vlm.logs import log


@contextmanager
def replace_folder(final: Path) -> Iterator[Path]:
    """Give a temporary sibling of `final` to write into; put it in the place of `final` when the block ends well.

    Everything is flushed to disk before the rename. When the block raises, nothing of it stays and an older `final`
    is untouched; what a killed process left is removed (or, if it was killed between the two renames, put back) by
    the next call for the same folder.

    Raises:
        ConfigError: `final` holds something that is no export, or cannot be written.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _clean(final)
        _refuse_foreign(final)
        temporary = final.with_name(f".tmp-{final.name}-{secrets.token_hex(4)}")
        temporary.mkdir()
    except OSError as error:
        raise ConfigError(
            f"cannot write an export to {final} ({error.strerror}). Usually the folder belongs to another user or the "
            "disk is mounted read-only. Name another one"
        ) from None
    try:
        yield temporary
        flush_tree(temporary)
        fault("export:rename")
        _swap(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _swap(temporary: Path, final: Path) -> None:
    old = final.with_name(f".old-{final.name}-{secrets.token_hex(4)}")
    if final.exists():
        final.rename(old)
    fault("export:swap")
    temporary.rename(final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _clean(final: Path) -> None:
    for left in sorted(final.parent.glob(f".old-{final.name}-????????")):
        if final.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(final)  # killed after the old export was moved away and before the new one came
            log(f"{final}: put back after an interrupted export")
    for left in final.parent.glob(f".tmp-{final.name}-????????"):
        shutil.rmtree(left, ignore_errors=True)
        log(f"{left}: removed, left by an interrupted export")


def _refuse_foreign(final: Path) -> None:
    if not final.exists():
        return
    if not final.is_dir() or (any(final.iterdir()) and not (final / NAME).is_file()):
        raise ConfigError(
            f"{final} exists and is no export of this program (no {NAME} in it), so it is not overwritten. "
            "Remove it, or name another folder"
        )
