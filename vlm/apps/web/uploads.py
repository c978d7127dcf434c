"""Who uploaded which image. A browser reads and names its own images and no others."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from vlm.apps.web.texts import tell_both
from vlm.data.images import DEFAULT_MAX_PIXELS, load_image
from vlm.data.records import IMAGE_SUFFIXES
from vlm.errors import RecordError, VLMError

MEGABYTE = 1 << 20
_OVERHEAD = 16 << 10  # bytes counted for a file beside its own: its last block and its folders
_current: ContextVar[Path | None] = ContextVar("upload", default=None)  # the folder of this request's upload


class UploadRefused(VLMError):
    """An upload that is not kept. The message is for the page; `status` for HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Uploads:
    """The images below one folder, each with the browser that uploaded it.

    It is itself a path, the one where gradio is to write: within `receive`, a folder that this upload has alone. So
    whatever gradio leaves there and nobody owns can go when the upload ends, however it ends.

    Args:
        folder: where gradio puts uploads; nothing outside it can be owned.
        max_total: bytes kept, those of uploads in progress included; beyond it, the oldest images go.
    """

    def __init__(self, folder: Path, max_total: int = 2048 * MEGABYTE) -> None:
        self.folder = folder.resolve()
        self.max_total = max_total
        self._owners: OrderedDict[str, str] = OrderedDict()  # oldest upload first
        self._shared: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._kept = 0  # their sum
        self._receiving: dict[Path, int] = {}  # folders of uploads in progress, with the bytes that have come
        self._lock = threading.Lock()

    def __fspath__(self) -> str:
        return str(_current.get() or self.folder)

    __str__ = __fspath__  # gradio asks in both ways

    @contextmanager
    def receive(self) -> Iterator[Callable[[int], None]]:
        """While one upload is in progress. At its end, all goes that it wrote and that was not accepted.

        Yields:
            a function to be told the bytes of each piece that came. It raises UploadRefused when uploads in progress
            fill all room by themselves.
        """
        folder = Path(tempfile.mkdtemp(prefix="upload-", dir=self.folder))
        with self._lock:
            self._receiving[folder] = 0
        token = _current.set(folder)
        try:
            yield lambda size: self._grow(folder, size)
        finally:
            _current.reset(token)
            with self._lock:
                del self._receiving[folder]
                self._tidy(folder)

    def accept(self, owner: str, paths: Sequence[str]) -> None:
        """Keep what was uploaded, if all of it is images.

        Raises:
            UploadRefused: a file is no image; in both languages.
        """
        try:
            for path in paths:
                check_image(path)
        except RecordError as error:
            raise UploadRefused(415, refusal(error, Path(error.where or paths[0]).name)) from None
        with self._lock:
            for path in map(_real, paths):
                if path not in self._owners and Path(path).is_relative_to(self.folder):
                    self._owners[path] = owner
                    size = os.path.getsize(path)
                    self._sizes[path] = size + _OVERHEAD
                    self._kept += size + _OVERHEAD
                    if (upload := self._upload_of(path)) in self._receiving:
                        self._receiving[upload] -= size
            self._make_room()

    def share(self, path: str) -> None:
        """Let everyone read an image of the page itself."""
        self._shared.add(_real(path))

    def owns(self, owner: str | None, path: str) -> bool:
        """Whether this browser uploaded the file, or everyone may see it. Links and `..` are followed first."""
        real = _real(path)
        return real in self._shared or (owner is not None and self._owners.get(real) == owner)

    def _grow(self, folder: Path, size: int) -> None:
        with self._lock:
            self._receiving[folder] += size
            if sum(self._receiving.values()) > self.max_total:
                raise UploadRefused(503, tell_both("upload_full"))
            self._make_room()

    def _make_room(self) -> None:
        coming = sum(self._receiving.values())
        while len(self._owners) > 1 and coming + self._kept > self.max_total:
            path, _ = self._owners.popitem(last=False)
            self._kept -= self._sizes.pop(path)
            if (upload := self._upload_of(path)) not in self._receiving:  # else it is tidied at its end
                self._tidy(upload)

    def _upload_of(self, path: str) -> Path:
        """The folder that was made for the upload of a file."""
        return self.folder / Path(path).relative_to(self.folder).parts[0]

    def _tidy(self, folder: Path) -> None:
        """Remove what nobody owns, and folders that it leaves empty."""
        for where, _, names in os.walk(folder, topdown=False):
            for name in names:
                path = os.path.join(where, name)
                if path not in self._owners:
                    os.unlink(path)
            if not os.listdir(where):
                os.rmdir(where)


def check_image(path: str) -> None:
    """Decode it once.

    Raises:
        RecordError: it has another ending than images have, or cannot be decoded; `where` is the path.
    """
    try:
        if Path(path).suffix.lower() not in IMAGE_SUFFIXES:  # the ending decides as what it is served
            raise RecordError("image_unreadable", "ends as no image does")
        load_image(path)
    except RecordError as error:
        raise RecordError(error.rule, error.message, path) from None


def refusal(error: RecordError, name: str) -> str:
    """Our own words: what a decoder said may hold addresses and paths, and goes into the log only."""
    if error.rule == "image_too_large":
        return tell_both("image_too_large", name=name, limit=DEFAULT_MAX_PIXELS // 1_000_000)
    return tell_both("bad_image", name=name)


def _real(path: str) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # a NUL byte, or half a surrogate pair
        return ""
