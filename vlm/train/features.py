"""Filling the cache of encoder features before training."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from vlm.batch import ImageSpec
from vlm.data.features import FeatureStore, encoder_key
from vlm.data.images import load_image, to_pixels
from vlm.data.scan import Scan
from vlm.errors import RecordError
from vlm.logs import live, log
from vlm.models.vision import VisionEncoder
from vlm.train.metrics import format_seconds

BATCH = 16  # pictures per forward


def open_store(cache: str, encoder: VisionEncoder, spec: ImageSpec, dtype: torch.dtype | None) -> FeatureStore:
    """The store of this very encoder's features; another weight, picture size or number type is another store."""
    return FeatureStore(Path(cache) / "vision", encoder_key(encoder, (spec, str(dtype))))


def fill_store(
    store: FeatureStore,
    scans: Iterable[Scan],
    encoder: VisionEncoder,
    spec: ImageSpec,
    *,
    max_pixels: int,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
) -> None:
    """Encode every picture of the scanned records that is not in the store yet. Unreadable ones are left out."""
    missing = list(dict.fromkeys(_missing(store, scans)))
    if not missing:
        return
    log(f"data: encoding {len(missing):,} pictures once, into {store.folder}")
    started = time.monotonic()
    for start in range(0, len(missing), BATCH):
        images, pixels = [], []
        for image in missing[start : start + BATCH]:
            try:
                pixels.append(to_pixels(load_image(image, max_pixels, spec.background), spec))
                images.append(image)
            except RecordError:
                continue  # training skips its record, counts it and names it
        if images:
            with (
                torch.no_grad(),
                torch.autocast(device.type, autocast_dtype or torch.bfloat16, enabled=autocast_dtype is not None),
            ):
                features = encoder(torch.stack(pixels).to(device))
            for image, feature in zip(images, features, strict=True):
                store.put(image, feature)
        live(f"encoded {start + len(images):,} of {len(missing):,} pictures")
    live("")
    log(f"data: encoded in {format_seconds(time.monotonic() - started)}")


def _missing(store: FeatureStore, scans: Iterable[Scan]) -> Iterator[str | bytes]:
    for scan in scans:
        for number in np.flatnonzero(scan.num_images):
            try:
                for image in scan.reader.read(int(number)).images:
                    if not store.has(image):
                        yield image
            except RecordError:
                continue  # as above
