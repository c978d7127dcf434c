"""Sources: a data file or a folder of images -> conversations, with images that exist."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm.data.config import SourceConfig
from vlm.data.conversation import Conversation
from vlm.data.dataset_info import resolve_dataset_info
from vlm.data.folder import FolderIndex
from vlm.data.images import cache_links, near_name, plain_file, resolve_image
from vlm.data.index import open_index
from vlm.data.media import IMAGE_SUFFIXES, decode_data_url
from vlm.data.parse import ROLES, parse_record
from vlm.data.preferences import READERS, Reads
from vlm.data.source import Source
from vlm.errors import DataError, RecordError

__all__ = [
    "IMAGE_SUFFIXES",
    "ROLES",
    "RecordSource",
    "decode_data_url",
    "open_source",
    "parse_record",
    "source_names",
]


# kind -> path, cache folder and name for messages -> the source. Whatever is not here is refused by `open_index`.
SOURCES: dict[str, Callable[[Path, Path, str | None], Source]] = {
    "folder": lambda path, cache, name: FolderIndex(path, name),
    **dict.fromkeys((".json", ".jsonl", ".csv", ".tsv", ".txt"), open_index),
}


def source_kind(path: Path) -> str:
    """
    >>> source_kind(Path("a/train.JSONL.gz")), source_kind(Path("."))
    ('.jsonl', 'folder')
    """
    if path.is_dir():
        return "folder"
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return name.suffix.lower()


@dataclass(frozen=True)
class RecordSource:
    """The conversations of one entry of `data.sources`."""

    index: Source
    config: SourceConfig
    images_root: Path
    image_placement: str
    fingerprint: str  # changes when the file does
    links: tuple[Path, ...] = ()  # folders outside images_root that links in it may lead to
    reads: Reads = "conversation"  # what of its records; others are refused

    @property
    def name(self) -> str:
        """For messages; begins `where`. Sources of the same file share it."""
        return self.index.name

    @property
    def num_text_bytes(self) -> int:
        """Of a file of plain text, as it lies there; 0 of any other."""
        path = Path(self.config.path)
        return path.stat().st_size if source_kind(path) == ".txt" else 0

    def __len__(self) -> int:
        return len(self.index)

    def where(self, number: int) -> str:
        return self.index.where(number)

    def content_digest(self) -> str:
        return self.index.content_digest()

    def conversation(self, number: int) -> Conversation:
        """Record `number`, counted from 0, with its images as absolute paths that exist below the images folder.

        Raises:
            RecordError: see `parse_record`, `resolve_image`, `RecordIndex.__getitem__`.
        """
        return self.with_images(self.parsed(number))

    def parsed(self, number: int) -> Conversation:
        """Record `number` with its images still as it names them. Raises RecordError."""
        return self.parse(number, self.record(number))

    def record(self, number: int) -> dict[str, Any]:
        """Record `number` as it stands in the file. Raises RecordError: see `RecordIndex.__getitem__`."""
        try:
            return self.index[number]
        except RecordError as error:
            raise error.at(self.where(number)) from None

    def parse(self, number: int, record: dict[str, Any]) -> Conversation:
        """A record in place of record `number`, with its images still as it names them. Raises RecordError."""
        where = self.where(number)
        try:
            parsed = READERS[self.reads](record, self.config, self.image_placement)
        except RecordError as error:
            raise error.at(where) from None
        return replace(parsed, where=where)

    def read(self, number: int, record: dict[str, Any]) -> Conversation:
        """A record in place of record `number`, such as that one without the keys that are not for training."""
        return self.with_images(self.parse(number, record))

    def with_images(self, parsed: Conversation) -> Conversation:
        """The conversation with its images found. Raises RecordError: see `resolve_image`."""
        if not parsed.images:
            return parsed
        return replace(parsed, images=self.find_images(parsed.images, parsed.where))

    def find_images(self, images: Iterable[str | bytes], where: str) -> tuple[str | bytes, ...]:
        """Absolute paths of images, as a record names them; those that it embeds as they are."""
        try:
            return tuple(image if isinstance(image, bytes) else self._find(image) for image in images)
        except RecordError as error:
            raise error.at(where) from None

    def _find(self, image: str) -> str:
        if (path := plain_file(str(self.images_root), image)) is not None:
            return path
        try:
            return str(resolve_image(self.images_root, image, self.links))
        except RecordError as error:
            is_about_name = error.rule in ("image_missing", "image_outside_root")
            raise error.saying(near_name(self.images_root, image) if is_about_name else "") from None


def open_source(
    config: SourceConfig,
    cache: Path,
    image_placement: str = "auto",
    name: str | None = None,
    reads: Reads = "conversation",
) -> RecordSource:
    """Open one entry of `data.sources`.

    Args:
        cache: folder for indexes of files; need not exist or be writable.
        image_placement: "auto", "exact" or "first", see `parse_record`.
        name: of the source, for messages; None takes the file's.
        reads: what the records must be, as the objective says.

    Raises:
        DataError: the file is missing, empty or of an unknown kind; the images folder is missing.
    """
    config = resolve_dataset_info(config, reads)
    path = Path(config.path)
    root = Path(config.images) if config.images is not None else path if path.is_dir() else path.parent
    index = SOURCES.get(source_kind(path), open_index)(path, cache, name)
    if not root.is_dir():
        raise DataError(f"images folder {root} of {path} does not exist; see data.sources[].images")
    if len(index) == 0:
        raise DataError(f"data file {path} holds no records")
    links = (*(Path(folder).resolve() for folder in config.links), *cache_links(root.absolute()))
    return RecordSource(index, config, root.resolve(), image_placement, index.fingerprint(), links, reads)


def source_names(paths: Sequence[str]) -> list[str]:
    """What messages call each source: its file name, with as many folders before it as tell it from the others.

    >>> source_names(["one/train.json", "two/train.json", "test.json"])
    ['one/train.json', 'two/train.json', 'test.json']
    """
    parts = [Path(path).parts or (path,) for path in paths]
    whole = [Path(path).absolute().parts for path in paths]
    names = []
    for number, own in enumerate(whole):
        others = [other for other in whole if other != own]
        depth = next(n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        names.append(str(Path(*own[-depth:])) if depth > 1 else parts[number][-1])
    return names
