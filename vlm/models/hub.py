"""Models that are named, not lying in a folder here: whether their hub can be asked at all.

huggingface_hub asks six times for each file, 23 seconds long, and up to a minute each time where packets are lost. So
it is asked once, briefly, before the first model that is not on this disk.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from vlm.errors import CheckpointError

_NUM_TRIES = 2
_PAUSE_SECONDS = 1.0
_TIMEOUT_SECONDS = 5.0  # unless HF_HUB_ETAG_TIMEOUT is set
_RETRY_LINES = ("thrown while requesting", "Retrying in ")
_reached: set[str] = set()  # hubs that have answered this process


def check_hub(path: str, key: str) -> None:
    """Return if `path` is on this disk, or if the hub that it is a name of answers.

    Args:
        path: a folder, or a name such as "Qwen/Qwen2.5-7B-Instruct".
        key: of the config, for the message.

    Raises:
        CheckpointError: neither. Whether the hub has a model of this name is left to the download.
    """
    quiet_retries()
    if Path(path).exists():
        return
    from huggingface_hub import constants, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(path, "config.json")
    except ValueError as error:
        where = ""
        if not Path(path).is_absolute():
            where = f" in {Path.cwd()}, and it is no name for a model hub either, which is NAME or OWNER/NAME"
        raise CheckpointError(f"{key}: {path} does not exist{where}. Usually the path is misspelt") from error
    if isinstance(cached, str) or constants.HF_HUB_OFFLINE:  # offline: the library refuses at once by itself
        return
    reason = _ask(constants.ENDPOINT)
    if reason:
        raise CheckpointError(
            f"{key}: {path} is no folder in {Path.cwd()}, was not downloaded before, and the model hub "
            f"{constants.ENDPOINT} cannot be reached ({reason}). Usually the path is misspelt, or there is no network "
            "here: copy the model's folder to this machine and name that"
        )


def quiet_retries() -> None:
    """Drop the two lines that huggingface_hub prints for every attempt, unless its own settings ask for a log."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    if not {"HF_HUB_VERBOSITY", "HF_DEBUG"} & set(os.environ):
        logger.addFilter(_is_no_retry)  # the same function is added once only


def _is_no_retry(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(part in message for part in _RETRY_LINES)


def _ask(endpoint: str) -> str:
    """Why the hub does not answer; "" if it does, whatever it says."""
    from huggingface_hub import constants, get_session

    if endpoint in _reached:
        return ""
    timeout = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else _TIMEOUT_SECONDS
    reason = ""
    for attempt in range(_NUM_TRIES):
        if attempt:
            time.sleep(_PAUSE_SECONDS)
        try:
            get_session().head(endpoint, timeout=timeout)
        except Exception as error:  # of requests, httpx or httpx2, as the version of huggingface_hub has it
            reason = str(error) or type(error).__name__
            continue
        _reached.add(endpoint)
        return ""
    return reason
