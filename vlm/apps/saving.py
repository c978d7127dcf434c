"""A conversation as a record in a file that training reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vlm.apps.record import Talk, record_line, training_record
from vlm.errors import ConfigError, DataError, RecordError


def save_record(session: Talk, path: str | Path) -> Path:
    """Write the conversation as a training record, images included.

    A .jsonl file gets a line more, so conversations can be collected in one; a .json file is written new and never
    replaced; a name without ending becomes .jsonl.

    Returns:
        the file.

    Raises:
        RecordError: nothing was said yet, every reply is empty, or an image is gone.
        ConfigError: another ending, or a .json file that is there already.
        DataError: it cannot be written; then it is what it was before.
    """
    file = Path(path).expanduser()
    if not file.suffix:
        file = file.with_name(file.name + ".jsonl")
    if file.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"{file.name}: a record is saved as .jsonl (a line more) or .json (a new file)")
    if session.exchanges and not any(exchange.reply for exchange in session.exchanges):
        raise RecordError("no_supervised_tokens", "every reply is empty, so there is nothing to learn from")
    try:
        if file.suffix == ".json":
            text = json.dumps([training_record(session)], ensure_ascii=False, indent=1) + "\n"
            with file.open("x", encoding="utf-8") as stream:
                stream.write(text)
        else:
            _append(file, record_line(session))
    except FileExistsError:
        raise ConfigError(f"{file} is there already. Take another name, or a .jsonl file, to which is added") from None
    except OSError as error:
        raise DataError(f"{file} cannot be written ({error.strerror})") from None
    return file


def _append(file: Path, line: str) -> None:
    with file.open("a+b") as stream:
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(-1, os.SEEK_END)
            line = line if stream.read(1) == b"\n" else "\n" + line
        try:
            stream.write(line.encode())
            stream.flush()
        except OSError:  # the disk is full: no half of a record
            stream.truncate(size)
            raise
