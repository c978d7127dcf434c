"""LLaMA-Factory's dataset_info.json: one file that says where data sets are and what their keys are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm.data.config import SourceConfig
from vlm.data.sniff import is_dataset_info, load_object
from vlm.errors import DataError
from vlm.logs import warn

# their name of a column -> ours, per formatting, with the key that stands there if the entry names none
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_SHAREGPT = {"messages": "conversations"}
_COMMON = ("history", "system", "images", "chosen", "rejected", "kto_tag")
_TAGS = {"role_tag": "from", "content_tag": "value"}
_ROLE_TAGS = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "user", "function_tag": "assistant",
    "system_tag": "system",
}  # fmt: skip
_READ = ("file_name", "formatting", "columns", "tags", "ranking")
_UNREAD_COLUMNS = ("videos", "audios", "tools")  # judged record by record


def resolve_dataset_info(config: SourceConfig, reads: str = "conversation") -> SourceConfig:
    """The source that an entry of a dataset_info.json describes; any other source as it is.

    Columns and roles that `config` names itself count before those of the entry.

    Args:
        reads: what the records must be, as the objective says.

    Raises:
        DataError: `dataset` is missing, or names none; the entry names no file, or pairs where others are read.
    """
    path = Path(config.path)
    is_listed = (
        path.suffix.lower() == ".json" and path.is_file() and (path.name == "dataset_info.json" or config.dataset)
    )
    value = load_object(path) if is_listed else None
    if value is None or not is_dataset_info(value):
        if config.dataset is not None:
            raise DataError(f"data.sources[].dataset is {config.dataset!r}, but {path} is no dataset_info.json")
        return config
    name = config.dataset or (next(iter(value)) if len(value) == 1 else None)
    if name not in value:
        names = ", ".join(list(value)[:20])
        raise DataError(f"{path} has no entry {name!r}: set data.sources[].dataset to one of: {names}")
    entry = value[name]
    where = f"{path}, entry {name}"
    if not entry.get("file_name"):
        raise DataError(f"{where}: names no file on disk (file_name), and nothing is fetched")
    if entry.get("ranking") and reads != "preference":
        raise DataError(
            f"{where}: ranking: true, a data set of replies to be compared, for objective dpo, orpo, simpo or reward"
        )
    unread = [key for key in entry if key not in _READ]
    if unread:
        warn(f"data: {where}: not read: {', '.join(f'{key}: {json.dumps(entry[key])[:60]}' for key in unread)}")
    columns, roles = _columns(entry, where), _roles(entry, where)
    return config.model_copy(
        update={
            "path": str(path.parent / entry["file_name"]),
            "images": config.images or str(path.parent),
            "columns": columns | config.columns,
            "roles": roles | config.roles,
        }
    )


def _columns(entry: dict[str, Any], where: str) -> dict[str, str]:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise DataError(f"{where}: formatting {formatting!r}; read are alpaca, sharegpt and openai")
    ours = (_ALPACA if formatting == "alpaca" else _SHAREGPT) | {name: name for name in _COMMON}
    given = entry.get("columns") or {}
    unknown = [name for name in given if name not in ours and name not in _UNREAD_COLUMNS]
    if unknown:
        raise DataError(f"{where}: columns.{unknown[0]} is not known; known: {', '.join([*ours, *_UNREAD_COLUMNS])}")
    columns = {ours[name]: theirs for name, theirs in given.items() if name in ours and theirs}
    tags = entry.get("tags") or {}
    columns |= {key: tags[tag] for tag, key in _TAGS.items() if tags.get(tag)}
    return {key: theirs for key, theirs in columns.items() if key != theirs}


def _roles(entry: dict[str, Any], where: str) -> dict[str, Any]:
    tags = entry.get("tags") or {}
    unknown = [tag for tag in tags if tag not in _TAGS and tag not in _ROLE_TAGS]
    if unknown:
        raise DataError(f"{where}: tags.{unknown[0]} is not known; known: {', '.join([*_TAGS, *_ROLE_TAGS])}")
    return {tags[tag]: role for tag, role in _ROLE_TAGS.items() if tags.get(tag)}
