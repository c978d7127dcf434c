"""Who uploaded which picture. A browser reads and names its own pictures and no others."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from vlm.chat.web_texts import tell_both
from vlm.data.images import DEFAULT_MAX_PIXELS, load_image
from vlm.data.records import IMAGE_SUFFIXES
from vlm.errors import RecordError, VLMError

MEGABYTE = 1 << 20


class UploadRefused(VLMError):
    """An upload that is not kept. The message is for the page; `status` for HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Uploads:
    """The pictures in one folder, each with the browsers that uploaded it.

    Gradio names a file by its content, so the same picture of two browsers is one file with two owners.

    Args:
        folder: where gradio puts uploads; nothing outside it can be owned.
        max_total: bytes kept; beyond it, the oldest pictures go.
    """

    def __init__(self, folder: Path, max_total: int = 2048 * MEGABYTE) -> None:
        self.folder = folder.resolve()
        self.max_total = max_total
        self._owners: OrderedDict[str, set[str]] = OrderedDict()  # oldest upload first
        self._shared: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()

    def accept(self, owner: str, paths: Sequence[str]) -> None:
        """Keep what was uploaded, if all of it is pictures; else remove what nobody else owns.

        Raises:
            UploadRefused: a file is no picture; in both languages.
        """
        try:
            for path in paths:
                check_picture(path)
        except RecordError as error:
            self._remove([path for path in paths if not self._owners.get(_real(path))])
            raise UploadRefused(415, refusal(error, Path(error.where or paths[0]).name)) from None
        with self._lock:
            for path in map(_real, paths):
                if Path(path).is_relative_to(self.folder):
                    self._owners.setdefault(path, set()).add(owner)
                    self._owners.move_to_end(path)
                    self._sizes[path] = os.path.getsize(path)
            gone = self._overflow()
        self._remove(gone)

    def share(self, path: str) -> None:
        """Let everyone read a picture of the page itself."""
        self._shared.add(_real(path))

    def owns(self, owner: str | None, path: str) -> bool:
        """Whether this browser uploaded the file, or everyone may see it. Links and `..` are followed first."""
        real = _real(path)
        return real in self._shared or (owner is not None and owner in self._owners.get(real, ()))

    def _overflow(self) -> list[str]:
        gone = []
        while sum(self._sizes.values()) > self.max_total and len(self._owners) > 1:
            path, _ = self._owners.popitem(last=False)
            self._sizes.pop(path, None)
            gone.append(path)
        return gone

    def _remove(self, paths: Sequence[str]) -> None:
        for path in map(Path, map(_real, paths)):
            if path.is_relative_to(self.folder):
                path.unlink(missing_ok=True)


def check_picture(path: str) -> None:
    """Decode it once.

    Raises:
        RecordError: it has another ending than pictures have, or cannot be decoded; `where` is the path.
    """
    try:
        if Path(path).suffix.lower() not in IMAGE_SUFFIXES:  # the ending decides as what it is served
            raise RecordError("image_unreadable", "ends as no picture does")
        load_image(path)
    except RecordError as error:
        raise RecordError(error.rule, error.message, path) from None


def refusal(error: RecordError, name: str) -> str:
    """Our own words: what a decoder said may hold addresses and paths, and goes into the log only."""
    if error.rule == "image_too_large":
        return tell_both("picture_too_large", name=name, limit=DEFAULT_MAX_PIXELS // 1_000_000)
    return tell_both("bad_picture", name=name)


def _real(path: str) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # a NUL byte, or half a surrogate pair
        return ""
