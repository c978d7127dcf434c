"""A folder of images with their captions beside them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.data.images import resolve_image
from vlm.data.index import fingerprint
from vlm.data.media import IMAGE_SUFFIXES
from vlm.errors import DataError, RecordError
from vlm.logs import log

_LITTER = ("__MACOSX", "@eaDir", "lost+found", "Thumbs.db")  # beside names that begin with a dot
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".tar")


class FolderIndex:
    """A folder of images, each with a .txt file of the same name: its caption. Only the names lie in memory.

    Hidden files and folders, macOS' `._` files, notebooks' checkpoints and thumbnails are left out, and counted in the
    log.

    Args:
        name: of the folder, for messages; None takes its own.

    Raises:
        DataError: there is no image, or no caption at all beside them and a data file in their place.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder = folder.resolve()
        self.name = name or self.folder.name
        names, num_litter = image_names(self.folder)
        self.names = sorted(names)
        if num_litter:
            log(f"data: {self.name}: {num_litter} images in hidden files or folders are left out")
        if not self.names:
            raise DataError(f"data folder {folder} holds no images ({' '.join(IMAGE_SUFFIXES)}){self._others()}")
        has_captions = any((self.folder / name).with_suffix(".txt").is_file() for name in self.names)
        if not has_captions and (others := self._others()):
            raise DataError(f"data folder {folder}: none of its {len(self.names)} images has a .txt beside it{others}")

    def __len__(self) -> int:
        return len(self.names)

    def where(self, number: int) -> str:
        return f"{self.name}: {self.names[number]}"

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Raises RecordError rules caption_missing, bad_text."""
        image = Path(self.names[number])
        try:
            text = resolve_image(self.folder, image.with_suffix(".txt").as_posix()).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise RecordError("bad_text", f"{image.stem}.txt is not UTF-8") from None
        except (RecordError, OSError):
            raise RecordError("caption_missing", f"no readable {image.stem}.txt beside the image") from None
        return {"image": self.names[number], "caption": text.strip()}

    def fingerprint(self) -> str:
        """Changes when an image or a caption is added, removed or edited."""
        state = hashlib.sha256()
        for name in self.names:
            image = self.folder / name
            for path in (image, image.with_suffix(".txt")):
                state.update(f"{name!r} {fingerprint(path) if path.is_file() else 'none'}\n".encode())
        return state.hexdigest()[:16]

    def content_digest(self) -> str:
        """Of captions and of images' sizes and times: their pixels are not read."""
        return self.fingerprint()

    def _others(self) -> str:
        """The files of records that a folder holds, as the end of a message."""
        found = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in _DATA_SUFFIXES)[:3]
        if not found:
            return ""
        names = [path.relative_to(self.folder).as_posix() for path in found]
        return f". It has {', '.join(names)}: name that file as the path, {{path: {found[0]}, images: ...}}"


def image_names(folder: Path) -> tuple[list[str], int]:
    """Names of the images below a folder, and how many more are hidden or litter."""
    names, num_litter = [], 0
    for path in _files(folder):
        name = path.relative_to(folder)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if any(part.startswith(".") or part in _LITTER for part in name.parts):
                num_litter += 1
            else:
                names.append(name.as_posix())
    return names, num_litter


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in files:
            yield Path(parent, name)
