"""The image that an `image_url` names -> its bytes. Refuses whatever the server's owner did not allow."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vlm.apps.api.limits import Media
from vlm.apps.api.remote import Fetcher, is_web_url, refused
from vlm.data.images import resolve_image
from vlm.data.records import decode_data_url
from vlm.errors import RecordError


class MediaLoader:
    """Reads images from `data:` URLs; from files and the web where `media` allows it."""

    def __init__(self, media: Media, fetcher: Fetcher | None = None) -> None:
        self._root = None if media.root is None else media.root.resolve()
        self._max_bytes = media.fetch_bytes
        self._fetcher = fetcher or Fetcher(media.domains, media.fetch_seconds, media.fetch_bytes)

    async def load(self, url: str) -> bytes:
        """
        Raises:
            ApiError: 400 refused or unreadable; 502 a remote image that could not be fetched.
        """
        if url.startswith("data:"):
            return await asyncio.to_thread(_decode, url)
        if is_web_url(url):
            return await self._fetcher.fetch(url)
        return await asyncio.to_thread(self._read_file, url)

    def _read_file(self, url: str) -> bytes:
        name = _file_name(url)
        if self._root is None:
            raise refused("images come as data: URLs; this server reads no files (--media-root)")
        try:
            return _read_regular(resolve_image(self._root, name), self._max_bytes)
        except (RecordError, OSError):  # one answer, so that nobody can feel for files outside
            raise refused("there is no such image below the server's media folder") from None


def _decode(url: str) -> bytes:
    try:
        return decode_data_url(url)
    except RecordError:
        raise refused("a data: URL must read data:image/...;base64, and then base64") from None


def _file_name(url: str) -> str:
    """A path, or what a `file://` URL names."""
    if not url.lower().startswith("file:"):
        if "://" in url[:32] or "\\" in url:
            raise refused("unknown kind of URL; send data:image/...;base64,...")
        return url
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise refused("a file URL names no host, query or fragment")
    return unquote(parts.path)


def _read_regular(path: Path, max_bytes: int) -> bytes:
    """A file as it was looked up: not a link put in its place since, not a pipe, which would block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("no regular file")
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise refused(f"the image is larger than {max_bytes:,} bytes")
    return data
