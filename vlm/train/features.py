"""Filling the cache of encoder features before training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlm.batch import ImageSpec
from vlm.data.features import FeatureStore, encoder_key
from vlm.data.images import load_image, to_tiles
from vlm.data.scan import Scan
from vlm.errors import RecordError
from vlm.logs import Progress, log
from vlm.models.vision import VisionEncoder
from vlm.precision import autocast

BATCH = 16  # images per forward


def open_store(cache: str, encoder: VisionEncoder, spec: ImageSpec, dtype: torch.dtype) -> FeatureStore:
    """The store of this very encoder's features; another weight, image size or number format is another store.

    Args:
        dtype: that the features are kept in. What the encoder computes in makes no other store: it may differ between
            the machines that fill it.
    """
    return FeatureStore(Path(cache) / "vision", encoder_key(encoder, (spec, str(dtype))), dtype)


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
    """Encode every image of the scanned records that is not in the store yet. Unreadable ones are left out.

    Args:
        autocast_dtype: of the computation, where the encoder has not chosen its own.
    """
    missing = list(dict.fromkeys(_missing(store, scans)))
    if not missing:
        return
    log(f"data: encoding {len(missing):,} images once, into {store.folder}")
    with Progress("data: encoded", len(missing), "images") as progress:
        for start in range(0, len(missing), BATCH):
            chunk = missing[start : start + BATCH]
            images, pixels = _decode(chunk, max_pixels, spec)
            if images:
                with torch.no_grad(), autocast(device.type, autocast_dtype):
                    tiles = torch.cat(pixels).split(BATCH)
                    features = torch.cat([encoder(part.to(device)) for part in tiles])
                for image, feature in zip(images, features.split([len(each) for each in pixels]), strict=True):
                    store.put(image, feature)
            progress.show(start + len(chunk))


def _decode(images: Sequence[str | bytes], max_pixels: int, spec: ImageSpec) -> tuple[list[str | bytes], list[Tensor]]:
    """Those that can be read, and their pixels [tiles, 3, S, S]. Training skips and names the records of the others."""
    readable, pixels = [], []
    for image in images:
        try:
            pixels.append(to_tiles(load_image(image, max_pixels, spec.background), spec))
            readable.append(image)
        except RecordError:
            continue
    return readable, pixels


def _missing(store: FeatureStore, scans: Iterable[Scan]) -> Iterator[str | bytes]:
    for scan in scans:
        for number in np.flatnonzero(scan.num_images):
            try:
                for image in scan.reader.read(int(number)).images:
                    if not store.has(image):
                        yield image
            except RecordError:
                continue  # as above
