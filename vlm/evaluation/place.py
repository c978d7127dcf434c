"""Where answers and figures go by themselves: beside the export that they are of, if it is one as it stands."""

from __future__ import annotations

from pathlib import Path

from vlm.artifacts.manifest import NAME
from vlm.errors import ConfigError

_SUFFIXES = {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst"}


def name_of(data: Path) -> str:
    """Of a file of records, for the files that are written of it: without what tells its format.

    >>> [name_of(Path(name)) for name in ("a/vqa.val.jsonl", "b.json.gz", "v1.2")]
    ['vqa.val', 'b', 'v1.2']
    """
    while data.suffix.lower() in _SUFFIXES:
        data = data.with_suffix("")
    return data.name


def beside(folder: Path, adapter: Path | None, bits: int | None, what: str) -> Path:
    """The folder of the run that an export lies in.

    Raises:
        ConfigError: it is no export of a run, or is asked as another model than it is.

    >>> beside(Path("run/export"), None, 4, "answers")
    Traceback (most recent call last):
    vlm.errors.ConfigError: run/export in 4 bits is no export of a run, beside which the answers would go: say where \
with --out
    """
    changed = " with an adapter" * (adapter is not None) + (f" in {bits} bits" if bits is not None else "")
    if changed or (folder.is_dir() and not (folder / NAME).is_file()):  # that there is none, loading it says
        raise ConfigError(
            f"{folder}{changed} is no export of a run, beside which the {what} would go: say where with --out"
        )
    return folder.parent
