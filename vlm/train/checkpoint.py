"""Checkpoints to resume from: complete and verified, or not there.

    <run>/checkpoints/latest                     name of the newest; a hint, the directory scan decides
    <run>/checkpoints/step-000500/manifest.json  size and sha256 of every other file, written last
                                  weights/  optimizer/  rng/  (a file per rank; vlm.train.fragments)
                                  stream.json  progress.json

A save writes everything into `.tmp-...`, flushes it to disk, writes the manifest, renames the folder, replaces
`latest`, and only then deletes old ones. A kill at any moment leaves the newest complete checkpoint loadable.
The sums protect from damage, not from someone who can rewrite the manifest too.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import CheckpointError
from vlm.faults import fault
from vlm.files import flush, sha256, write_atomically
from vlm.logs import warn

FORMAT_VERSION = 2  # 1 had whole tensors of one rank in weights.safetensors; it is still read
MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"
_BEST = "best"  # a file with the name of the best checkpoint, beside `latest`
_NEWER = "format version"  # how `verify` begins when a checkpoint is not damaged but of a newer program


@dataclass(frozen=True)
class CheckpointInfo:
    path: Path
    step: int
    problems: list[str]  # empty when every file matches the manifest


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(run: Path, step: int, write: Callable[[Path], None], info: dict[str, Any], keep_last: int) -> Path:
    """Write a checkpoint by the protocol above. Every rank calls this; rank 0 names the folder and completes it.

    Args:
        run: the run folder, which all ranks share.
        step: optimizer steps done.
        write: puts this rank's files into the folder it is given.
        info: kept in the manifest (what the run is, see `vlm.run`).
        keep_last: checkpoints kept, this one included; at least 2, so that one stays if the newest is damaged.

    Raises:
        OSError: the disk is full or not writable, for whichever rank. Nothing of the failed checkpoint stays; older
            ones are untouched.
    """
    from vlm.distributed import is_main, on_main, together  # torch, which listing checkpoints does without

    final = checkpoint_folder(run, step)
    if on_main(lambda: final.exists() and not verify(final)):
        return final  # a run that fell back to an older checkpoint came here again
    temporary = on_main(lambda: _make_temporary(final))
    try:
        together(lambda: write(temporary))
        on_main(lambda: _complete(temporary, final, step, info))
    except BaseException:
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    on_main(lambda: _make_latest(run, final, keep_last))
    return final


def _make_temporary(final: Path) -> Path:
    temporary = final.parent / f"{_TEMPORARY}{final.name}-{secrets.token_hex(4)}"
    temporary.mkdir(parents=True)
    return temporary


def _complete(temporary: Path, final: Path, step: int, info: dict[str, Any]) -> None:
    fault("save:manifest")
    _write_manifest(temporary, step, info)
    fault("save:rename")
    if final.exists():
        set_aside(final)
    temporary.rename(final)
    flush(final.parent)


def _make_latest(run: Path, final: Path, keep_last: int) -> None:
    fault("save:latest")
    write_atomically(final.parent / "latest", final.name)
    fault("save:prune")
    _prune(run, keep_last)


def mark_best(run: Path, step: int) -> None:
    """Keep the checkpoint of `step` until another one is marked, however many are written after it."""
    write_atomically(run / "checkpoints" / _BEST, checkpoint_folder(run, step).name)


def best_step(run: Path) -> int | None:
    """Of the checkpoint that is marked as the best and there; None if there is none."""
    try:
        name = (run / "checkpoints" / _BEST).read_text(encoding="utf-8")
    except OSError:
        return None
    return next((_step_of(path) for path in _steps(run) if path.name == name), None)


def newest_verified(run: Path) -> Path | None:
    """The newest checkpoint whose every file matches its manifest; None when there is no checkpoint at all.

    Damaged ones that are newer than it are renamed to `.corrupt` with a warning.

    Raises:
        CheckpointError: checkpoints exist and none is intact, or the newest is of a newer program. Nothing is renamed.
    """
    damaged: list[tuple[Path, list[str]]] = []
    for path in reversed(_steps(run)):
        problems = verify(path)
        if not problems:
            for bad, reasons in damaged:
                aside = set_aside(bad).name
                warn(f"{bad} is damaged ({'; '.join(reasons[:3])}); set aside as {aside}, using {path.name}")
            return path
        if problems[0].startswith(_NEWER):
            raise CheckpointError(f"{path}: {problems[0]}")
        damaged.append((path, problems))
    if damaged or any((run / "checkpoints").glob("step-*.corrupt*")):
        shown = "; ".join(f"{path.name}: {problems[0]}" for path, problems in damaged[:3])
        raise CheckpointError(
            f"{run / 'checkpoints'}: checkpoints, but none intact ({shown or 'all were set aside'}). Usually a failing "
            "disk or a copy that was cut short. Restore one from a backup, or remove the folder to start again"
        )
    return None


def set_later_aside(run: Path, checkpoint: Path) -> list[Path]:
    """Rename the checkpoints of a run that are newer than one, as the run goes on from there. Returns the new paths."""
    later = [path for path in _steps(run) if _step_of(path) > _step_of(checkpoint)]
    moved = [set_aside(path, "later") for path in later]
    if moved:
        write_atomically(checkpoint.parent / "latest", checkpoint.name)
    return moved


def checkpoint_of(run: Path, step: int) -> Path:
    """The checkpoint of a step.

    Raises:
        CheckpointError: it is not there, or damaged; says which are.
    """
    path = checkpoint_folder(run, step)
    if not path.is_dir():
        there = ", ".join(map(str, steps_of(run))) or "none"
        raise CheckpointError(
            f"{run} has no checkpoint of step {step}; there are: {there}. Older ones are removed while a run trains: "
            "train.keep_last says how many stay"
        )
    if problems := verify(path):
        raise CheckpointError(f"{path} is damaged ({'; '.join(problems[:3])}). Take another step: vlm ckpt ls {run}")
    return path


def list_checkpoints(run: Path) -> list[CheckpointInfo]:
    """All complete-looking checkpoints of a run, oldest first, each verified."""
    return [CheckpointInfo(path, _step_of(path), verify(path)) for path in _steps(run)]


def steps_of(run: Path) -> list[int]:
    """Steps of the checkpoints of a run, oldest first, none verified."""
    return [_step_of(path) for path in _steps(run)]


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint folder, a line per file; empty when it is intact."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version = int(manifest["format_version"])
        if version > FORMAT_VERSION:
            return [f"{_NEWER} {version}, this program reads up to {FORMAT_VERSION}: install a newer vlm"]
        if manifest.pop("sha256") != _digest(manifest):
            return [f"{MANIFEST} was changed: its sha256 differs"]
        files: dict[str, Any] = manifest["files"]
    except FileNotFoundError:
        return [f"no {MANIFEST}"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"{MANIFEST} is not readable"]
    problems = []
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != expected["size"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, {expected['size']} written")
        elif sha256(file) != expected["sha256"]:
            problems.append(f"{name} was changed: its sha256 differs")
    return problems


def read_info(path: Path) -> dict[str, Any]:
    """The manifest of a verified checkpoint."""
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def clean_temporary(run: Path) -> None:
    """Remove what an interrupted save left. Only for the process that holds the run's lock."""
    for path in (run / "checkpoints").glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def set_aside(path: Path, why: str = "corrupt") -> Path:
    """Rename a checkpoint so that no scan finds it."""
    target = path.with_name(f"{path.name}.{why}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.{why}-{number}")
    path.rename(target)
    return target


def _digest(manifest: dict[str, Any]) -> str:
    """Of a manifest without its own sum, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_manifest(folder: Path, step: int, info: dict[str, Any]) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        flush(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest = {"format_version": FORMAT_VERSION, "step": step, **info, "files": files}
    manifest["sha256"] = _digest(manifest)
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
    for path in [p for p in folder.rglob("*") if p.is_dir()]:
        flush(path)


def _prune(run: Path, keep_last: int) -> None:
    best = best_step(run)
    for path in _steps(run)[: -max(2, keep_last)]:
        if _step_of(path) == best:
            continue
        # renamed first: a kill in the middle of the deletion must not leave a folder that looks complete
        doomed = path.with_name(f"{_TEMPORARY}old-{path.name}-{secrets.token_hex(4)}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _steps(run: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = [p for p in (run / "checkpoints").glob("step-*") if p.is_dir() and p.name[len("step-") :].isdecimal()]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name[len("step-") :])
