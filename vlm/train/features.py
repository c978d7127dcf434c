"""Filling the cache of encoder features before training."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlm.batch import ImageSpec
from vlm.data.features import FeatureStore, encoder_key
from vlm.data.images import load_tiles
from vlm.data.scan import Scan, usable_workers
from vlm.data.shards import writer_name
from vlm.distributed import gather_objects, in_own_time, world_size
from vlm.errors import DataError, RecordError
from vlm.logs import Progress, log
from vlm.models.vision import VisionEncoder
from vlm.precision import autocast

BATCH = 16  # images per forward
FOLDER = "encoded"  # below data.cache
_AHEAD = 2 * BATCH  # images that threads decode ahead
_ON_THEIR_WAY = 4 * BATCH  # more images than are decoded or encoded at any moment


@dataclass(frozen=True)
class ImageEncoder:
    """From an image file to the features that training sees.

    Args:
        autocast_dtype: of the computation, where the encoder has not chosen its own.
        jpeg_draft: decode large JPEG files at reduced scale.
        workers: threads that decode images while others are encoded; 0 does one after the other.
    """

    encoder: VisionEncoder
    spec: ImageSpec
    max_pixels: int
    device: torch.device
    autocast_dtype: torch.dtype | None
    workers: int = 0
    jpeg_draft: bool = False

    def decode(self, image: str | bytes) -> Tensor | None:
        """[tiles, 3, S, S]; None if it cannot be read: training skips and names its record."""
        try:
            return load_tiles(image, self.spec, self.max_pixels, self.jpeg_draft)
        except RecordError:
            return None

    @torch.no_grad()
    def encode(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Features [tiles, P, C] of each image, on the CPU."""
        with autocast(self.device.type, self.autocast_dtype):
            parts = [self.encoder(tiles.to(self.device)) for tiles in torch.cat(list(pixels)).split(BATCH)]
        return list(torch.cat(parts).cpu().split([len(each) for each in pixels]))


@dataclass(frozen=True)
class Share:
    """Of the records with images: every `count`-th from `number` on."""

    number: int = 0
    count: int = 1

    def of(self, scan: Scan) -> np.ndarray:
        """Numbers of records."""
        return np.flatnonzero(scan.num_images)[self.number :: self.count]


WHOLE = Share()
Decoded = tuple[int, str | bytes, Tensor | None]  # how many images were looked at so far, an image, and its pixels


def open_store(cache: str, encoder: ImageEncoder, dtype: torch.dtype, size_gb: float | None = None) -> FeatureStore:
    """The store of this very encoder's features; another weight, image size, way to decode or number format is another
    store.

    Args:
        dtype: that the features are kept in. What the encoder computes in makes no other store: it may differ between
            the machines that fill it.
        size_gb: bound of all stores in `cache` together; None means none.
    """
    limit = None if size_gb is None else int(size_gb * 1e9)
    vision = encoder.encoder
    # what is off has no entry: earlier stores stay valid
    extras = (*((vision.joins,) if vision.joins else ()), *(("jpeg_draft",) if encoder.jpeg_draft else ()))
    return FeatureStore(Path(cache) / FOLDER, encoder_key(vision, (encoder.spec, str(dtype), *extras)), dtype, limit)


def fill_with_all_ranks(store: FeatureStore, scans: Sequence[Scan], encoder: ImageEncoder | None) -> None:
    """Every rank of the launch that has an encoder encodes its share of the images. All call this.

    Machines that do not share a disk fill one each.

    Raises:
        DataError: on all ranks, the cache cannot be written on one of them.
    """
    share = _share_of_disk(store.path, encoder is not None)
    in_own_time(lambda: None if encoder is None else fill_store(store, scans, encoder, share))
    store.refresh()


def fill_store(store: FeatureStore, scans: Sequence[Scan], encoder: ImageEncoder, share: Share = WHOLE) -> int:
    """Encode every image of the scanned records that is not in the store yet. Unreadable ones are left out.

    What is encoded is kept at once, so a fill that was ended goes on where it was.

    Returns:
        how many were encoded.

    Raises:
        DataError: the cache cannot be written, or is full.
    """
    missing = _missing(store, scans, share)
    first = next(missing, None)
    if first is None:
        return 0
    total, before = sum(int(scan.num_images[share.of(scan)].sum()) for scan in scans), first[0] - 1
    whose = f", share {share.number + 1} of {share.count}" if share.count > 1 else ""
    log(f"data: encoding up to {total - before:,} images once{whose}, into {store.path}")
    num_encoded = 0
    with Progress(f"data: encoded{whose}", total, "images", done=before, tells_rate=True) as progress:
        for chunk in _in_chunks(_decoded(chain([first], missing), encoder)):
            readable = [(image, pixels) for _, image, pixels in chunk if pixels is not None]
            features = encoder.encode([pixels for _, pixels in readable]) if readable else []
            for (image, _), feature in zip(readable, features, strict=True):
                _put(store, image, feature)
            num_encoded += len(readable)
            progress.show(chunk[-1][0])
    store.close()
    log(f"data: {num_encoded:,} images are encoded{whose}, {num_encoded / max(progress.seconds, 1e-9):,.1f} a second")
    return num_encoded


def images_of(scans: Iterable[Scan], share: Share = WHOLE) -> Iterator[str | bytes]:
    """The images of all records that show some, in the order of the records, as often as they appear."""
    for scan in scans:
        for number in share.of(scan):
            source, local = scan.reader.locate(int(number))
            try:
                yield from source.conversation(local).images
            except RecordError:  # training skips and names it
                continue


def _missing(store: FeatureStore, scans: Sequence[Scan], share: Share) -> Iterator[tuple[int, str | bytes]]:
    """The images that the store lacks, once each, with how many were looked at."""
    asked: set[str | bytes] = set()  # the last ones, which may be on their way into the store
    before: set[str | bytes] = set()
    for num_seen, image in enumerate(images_of(scans, share), 1):
        if image in asked or image in before:
            continue
        try:
            if store.has(image):
                continue
        except RecordError:
            continue  # as above
        if len(asked) == _ON_THEIR_WAY:
            asked, before = set(), asked
        asked.add(image)
        yield num_seen, image


def _decoded(missing: Iterable[tuple[int, str | bytes]], encoder: ImageEncoder) -> Iterator[Decoded]:
    """The images with their pixels. Threads decode the next ones while the caller works."""
    workers = usable_workers(encoder.workers)
    if workers == 0:
        yield from ((num_seen, image, encoder.decode(image)) for num_seen, image in missing)
        return
    waiting: deque[tuple[int, str | bytes, Future[Tensor | None]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for num_seen, image in missing:
            waiting.append((num_seen, image, pool.submit(encoder.decode, image)))
            if len(waiting) >= _AHEAD:
                num_done, ready, pixels = waiting.popleft()
                yield num_done, ready, pixels.result()
        for num_done, ready, pixels in waiting:
            yield num_done, ready, pixels.result()


def _in_chunks(images: Iterator[Decoded]) -> Iterator[list[Decoded]]:
    while chunk := list(islice(images, BATCH)):
        yield chunk


def _put(store: FeatureStore, image: str | bytes, features: Tensor) -> None:
    try:
        store.put(image, features)
    except OSError as error:
        raise DataError(
            f"data.cache: features cannot be written to {store.path} ({error.strerror or error}). Usually the disk is "
            "full: free some of it, bound the cache with data.cache_size_gb, name another folder with data.cache, or "
            "set data.cache_features to false. What is there stays usable"
        ) from None
    except RecordError:  # the file was removed while its image was encoded
        return


def _share_of_disk(folder: Path, encodes: bool) -> Share:
    """This rank's share among the ranks that encode and see the same folder, told by a file of each."""
    if world_size() == 1:
        return WHOLE
    mark = folder / f".{writer_name()}.rank"

    if encodes:
        with suppress(OSError):  # a disk that is full or mounted read-only may hold all that is needed
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
    names = gather_objects(mark.name if mark.exists() else "")
    seen = [name for name in names if name and (folder / name).exists()]
    gather_objects(None)  # all have looked
    mark.unlink(missing_ok=True)
    return Share(seen.index(mark.name), len(seen)) if mark.name in seen else WHOLE
