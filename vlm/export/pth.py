"""A run's weights in one file for tools that want a `.pth`.

It is a pickle, and nothing here ever loads one: what was written is compared byte by byte, as the archive that it is.
"""

from __future__ import annotations

import errno
import os
import secrets
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import IO, BinaryIO

import torch
from torch import Tensor

from vlm.artifacts.parts import read_run
from vlm.compat import prepare
from vlm.errors import CheckpointError, ConfigError
from vlm.export.run import DType, build_merged, default_name, rounded
from vlm.faults import fault
from vlm.logs import log
from vlm.models.trainable import part_weights
from vlm.precision import DTYPES
from vlm.schema import PARTS

_CHUNK = 1 << 24


def export_pth(
    run: str | Path, out: str | Path | None = None, full: bool = False, dtype: DType = "auto", step: int | None = None
) -> Path:
    """Write a plain dict, canonical name -> tensor on the CPU, with torch.save.

    The file appears complete or not at all; an older one at the same place is replaced at the very end.

    Args:
        run: the output_dir of a run.
        out: the file to write; None is `<run>/export.pth`, or `<run>/export-full.pth` with `full`.
        full: everything, adapters merged into the language model, instead of what trained.
        dtype: of encoder and language model; "auto" is, of a full export, that of the base language model, else that of
            the training.
        step: of the checkpoint; None takes the newest intact one.

    Returns:
        the file.

    Raises:
        CheckpointError: no intact checkpoint, the base models do not fit it, or the file does not read back.
        ConfigError: `out` is no name of a .pth file, or cannot be written.
    """
    prepare()
    run = Path(run)
    final = Path(out) if out is not None else run / f"{default_name(full, step)}.pth"
    if final.suffix != ".pth" or final.is_dir():
        raise ConfigError(f"{final}: --format pth writes one file, whose name ends in .pth")
    trained = read_run(run, step)
    tensors = trained.tensors if dtype == "auto" else rounded(trained.tensors, DTYPES[dtype])
    if full:
        model = build_merged(trained, dtype).model
        tensors = {name: tensor for part in PARTS for name, tensor in part_weights(model, part).items()}
    _save_atomically({name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}, final)
    log(f"{final}: {len(tensors)} tensors, {final.stat().st_size / 1e6:,.1f} MB; torch.load(..., weights_only=True)")
    return final


def _save_atomically(tensors: dict[str, Tensor], final: Path) -> None:
    """Write name -> CPU tensor [...], compare, and rename. Raises ConfigError, CheckpointError."""
    temporary = final.with_name(f".tmp-{final.name}-{secrets.token_hex(4)}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for left in final.parent.glob(f".tmp-{final.name}-????????"):
            left.unlink()  # of an export that was killed
        with temporary.open("wb") as file:
            _save(tensors, file)
            file.flush()
            os.fsync(file.fileno())
        _check_written(tensors, temporary, final)
        fault("export:rename")
        temporary.replace(final)
    except OSError as error:
        raise ConfigError(
            f"cannot write {final} ({error.strerror}). Usually the disk is full, or the folder belongs to another "
            "user. Name another file"
        ) from None
    finally:
        with suppress(OSError):  # its folder may be what is missing
            temporary.unlink(missing_ok=True)


def _check_written(tensors: dict[str, Tensor], written: Path, final: Path) -> None:
    """Raises CheckpointError unless the archive is whole and holds the bytes of every [...]. Nothing is unpickled."""
    try:
        with zipfile.ZipFile(written) as archive:
            places = sorted((n for n in archive.namelist() if "/data/" in n), key=lambda n: int(n.rpartition("/")[2]))
            if len(places) != len(tensors):
                raise zipfile.BadZipFile(f"{len(places)} tensors of {len(tensors)}")
            for other in set(archive.namelist()) - set(places):
                archive.read(other)  # names and shapes: reading compares the archive's own sums
            for place, (name, tensor) in zip(places, tensors.items(), strict=True):
                with archive.open(place) as stored:
                    if not _holds(stored, tensor):
                        raise zipfile.BadZipFile(name)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{final} was not written: what was read back is not what was trained ({error}). Usually the disk is "
            "failing or a network folder lags behind. Export to another disk"
        ) from None


def _holds(stored: IO[bytes], tensor: Tensor) -> bool:
    """Whether a file has the bytes of a tensor's [...] storage and no more."""
    content = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    same = all(stored.read(_CHUNK) == content[i : i + _CHUNK].tobytes() for i in range(0, len(content), _CHUNK))
    return same and not stored.read(1)


def _save(tensors: dict[str, Tensor], file: BinaryIO) -> None:
    """torch.save of tensors [...]. Raises OSError when the disk refuses."""
    try:
        torch.save(tensors, file)
    except RuntimeError as error:  # torch's writer hides the operating system's error in one of its own
        raise OSError(errno.EIO, str(error).splitlines()[0][:120]) from None
