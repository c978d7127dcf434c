"""`data.cache_features: auto`: whether keeping the features of images takes less time than encoding them each time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from torch import Tensor

from vlm.data.eviction import room
from vlm.data.features import FeatureStore
from vlm.data.scan import Scan
from vlm.errors import DataError, RecordError
from vlm.logs import format_seconds
from vlm.train.features import ImageEncoder, images_of

SAMPLE = 32  # images that are encoded and kept to measure
LOOK_SECONDS = 20.0  # in which images are counted; those that are not reached count as images of their own
WORTH = 0.9  # of the time without a cache: what the cache must come below
SPARE_SHARE = 0.05  # of a disk is left free


@dataclass(frozen=True)
class CacheCosts:
    """What a run would spend on images, with and without a cache. Seconds are of one image, with its tiles."""

    looks: float  # how often images are seen in the run, all of them together
    num_images: int  # different ones
    num_missing: int  # of these, not in the cache yet
    decode_seconds: float
    encode_seconds: float
    write_seconds: float
    read_seconds: float
    image_bytes: float  # of the features
    room_bytes: float  # that may be written
    room_of: str = "disk"  # what has that room
    num_ranks: int = 1  # that share the images
    decodes_beside: bool = False  # other processes decode while the step runs, so it costs the run nothing

    @property
    def seconds_without(self) -> float:
        each = self.encode_seconds + (0.0 if self.decodes_beside else self.decode_seconds)
        return self.looks * each / self.num_ranks

    @property
    def seconds_with(self) -> float:
        fill = self.num_missing * (self.decode_seconds + self.encode_seconds + self.write_seconds)
        return (fill + self.looks * (0.0 if self.decodes_beside else self.read_seconds)) / self.num_ranks

    @property
    def needed_bytes(self) -> float:
        return self.num_missing * self.image_bytes


def choose(costs: CacheCosts) -> tuple[bool, str]:
    """Whether to cache, and why, for the log.

    >>> costs = CacheCosts(3000, 1000, 1000, 0.01, 0.04, 0.001, 0.001, image_bytes=1e6, room_bytes=1e12)
    >>> choose(costs)
    (True, '1,000 images are seen 3.0 times: with a cache 54s for images instead of 2m30s, 1.0 GB of 1,000 GB')
    """
    if costs.num_images == 0 or costs.looks == 0:
        return False, "no record that trains has an image that can be read"
    seen = f"{costs.num_images:,} images are seen {costs.looks / costs.num_images:.1f} times"
    if costs.needed_bytes > costs.room_bytes:
        return False, (
            f"{seen}, but their features take {costs.needed_bytes / 1e9:,.1f} GB, and the {costs.room_of} has room for "
            f"{max(0.0, costs.room_bytes) / 1e9:,.1f} GB"
        )
    without, with_cache = format_seconds(costs.seconds_without), format_seconds(costs.seconds_with)
    if costs.seconds_with > WORTH * costs.seconds_without:
        return False, f"{seen}: with a cache {with_cache} for images, without one {without}"
    space = f"{costs.needed_bytes / 1e9:,.1f} GB of {costs.room_bytes / 1e9:,.0f} GB"
    return True, f"{seen}: with a cache {with_cache} for images instead of {without}, {space}"


def choose_by_measuring(
    store: FeatureStore,
    scans: Sequence[Scan],
    encoder: ImageEncoder,
    *,
    looks: float,
    num_ranks: int = 1,
    decodes_beside: bool = False,
) -> tuple[bool, str]:
    """As `choose`, of this encoder, data and disk. Arguments as of `CacheCosts`."""
    try:
        costs = measure_costs(store, scans, encoder)
    except (OSError, DataError) as error:
        return False, f"features cannot be kept in {store.path} ({error})"
    return choose(replace(costs, looks=looks, num_ranks=num_ranks, decodes_beside=decodes_beside))


def measure_costs(store: FeatureStore, scans: Sequence[Scan], encoder: ImageEncoder) -> CacheCosts:
    """Encode and keep the first images, and count all. Each counts as seen once.

    Raises:
        OSError, DataError: the cache cannot be written.
    """
    sample = _readable(scans, encoder)
    num_images, present = _count(store, scans)
    space, room_of = _room(store)
    if not sample:
        return CacheCosts(0, 0, 0, 0, 0, 0, 0, 0, space, room_of)
    half = max(1, len(sample) // 2)
    encoder.encode([pixels for _, _, pixels in sample[:half]])  # the first forward is slower
    started = time.perf_counter()
    features = encoder.encode([pixels for _, _, pixels in sample[-half:]])
    encode_seconds = (time.perf_counter() - started) / half
    write_seconds, read_seconds = _time_store(store, [image for image, _, _ in sample[-half:]], features)
    return CacheCosts(
        looks=num_images,
        num_images=num_images,
        num_missing=round(num_images * (1 - present)),
        decode_seconds=sum(seconds for _, seconds, _ in sample) / len(sample),
        encode_seconds=encode_seconds,
        write_seconds=write_seconds,
        read_seconds=read_seconds,
        image_bytes=sum(each.numel() for each in features) * store.dtype.itemsize / half,
        room_bytes=space,
        room_of=room_of,
    )


def _readable(scans: Sequence[Scan], encoder: ImageEncoder) -> list[tuple[str | bytes, float, Tensor]]:
    """The first images that can be read, seconds to decode each, and its pixels."""
    found = []
    for image in islice(dict.fromkeys(islice(images_of(scans), 8 * SAMPLE)), 2 * SAMPLE):
        started = time.perf_counter()
        pixels = encoder.decode(image)
        if pixels is not None:
            found.append((image, time.perf_counter() - started, pixels))
        if len(found) == SAMPLE:
            break
    return found


def _count(store: FeatureStore, scans: Sequence[Scan]) -> tuple[int, float]:
    """How many different images there are, and the share of the first ones that is in the store.

    Different means another path or other bytes. It is an upper bound where there are more than can be looked at.
    """
    names: set[int] = set()
    num_asked, num_there, started = 0, 0, time.monotonic()
    total = sum(int(scan.num_images.sum()) for scan in scans)
    for num_seen, image in enumerate(images_of(scans), 1):
        if hash(image) not in names:
            names.add(hash(image))
            if num_asked < 8 * SAMPLE:
                num_asked += 1
                num_there += _is_there(store, image)
        if num_seen % 1000 == 0 and time.monotonic() - started > LOOK_SECONDS:
            return len(names) + total - num_seen, num_there / num_asked
    return len(names), num_there / max(1, num_asked)


def _is_there(store: FeatureStore, image: str | bytes) -> bool:
    try:
        return store.has(image)
    except RecordError:
        return False


def _time_store(store: FeatureStore, images: Sequence[str | bytes], features: Sequence[Tensor]) -> tuple[float, float]:
    """Seconds to write and to read one. What is written is what a fill would write."""
    started = time.perf_counter()
    for image, each in zip(images, features, strict=True):
        if not store.has(image):
            store.put(image, each)
    written = time.perf_counter()
    for image in images:
        features_there = store.get(image)
        if features_there is not None:
            features_there.clone()
    read = time.perf_counter()
    return (written - started) / len(images), (read - written) / len(images)


def _room(store: FeatureStore) -> tuple[float, str]:
    """Bytes that the cache may grow by, and what bounds it."""
    there = next(folder for folder in (store.folder, *store.folder.absolute().parents) if folder.exists())
    disk = shutil.disk_usage(Path(there))
    free = disk.free - SPARE_SHARE * disk.total
    if store.limit_bytes is not None:
        below = room(store.folder, store.path, store.limit_bytes)
        if below < free:
            return below, "bound data.cache_size_gb"
    return free, "disk"
