"""What the rows of a run hold, from some of its records: the time of a step depends on their lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlm.batch import ImageSpec
from vlm.config import RunConfig
from vlm.data.build import build_conversation_tokenizer, build_reader
from vlm.data.images import draft_size, upright_size
from vlm.data.packing import pack_in_windows
from vlm.errors import RecordError, VLMError
from vlm.models.build import build_image_spec
from vlm.models.llm import IMAGE_TOKEN, load_tokenizer
from vlm.plan.cost import Load
from vlm.plan.step_time import Records

SAMPLE = 512  # records that are read; one window of packing
_IMAGES = 128  # whose headers are read
_UNPACKING = 0.08  # share of decoding a JPEG that is done at any scale; from the rates in docs/benchmarks.md
_BINS = 12  # lengths of records are counted in so many classes


def read_some(config: RunConfig) -> Records | str:
    """Means over a sample of the config's records, or one line that says why there are none.

    Images that records share are counted for each of them.
    """
    try:
        return _read_some(config)
    except (VLMError, OSError) as error:
        return str(error).partition("\n")[0]


def _read_some(config: RunConfig) -> Records | str:
    data = config.data
    missing = [source.path for source in data.sources if not Path(source.path).exists()]
    if missing:
        return f"{missing[0]} does not exist"
    spec = build_image_spec(config.model)
    draft_for = None if spec is None or spec.reads_size or not data.jpeg_draft else spec
    tokenizer = load_tokenizer(config.model.llm.path, config.model.trust_remote_code)
    image_id = None if spec is None else tokenizer.get_vocab()[IMAGE_TOKEN]
    tokens = build_conversation_tokenizer(data, tokenizer, spec, image_id)
    reader = build_reader(data, data.sources, tokens, config.objective.reads)
    weights = np.concatenate([np.full(len(each), each.config.weight) for each in reader.sources])
    rng = np.random.default_rng(config.seed)
    chosen = rng.choice(len(weights), min(SAMPLE, len(weights)), replace=False, p=weights / weights.sum())
    found: list[tuple[int, int, int]] = []  # of a preference one for each reply
    pixels: list[float] = []
    looked_at = examples = 0
    for number in chosen:
        if len(found) >= SAMPLE:  # of long texts, which are cut
            break
        looked_at += 1
        try:
            pieces = reader.cut(reader.conversation(int(number)))
        except RecordError:
            continue
        examples += len(pieces)
        for _, example in pieces:
            found += [(len(each.input_ids), len(each.images), each.num_supervised) for each in example.branches]
            pixels += _pixels_of(example.images, draft_for) if len(pixels) < _IMAGES else []
    if not found:
        return "none of the records that were looked at can be used"
    lengths, images, supervised = np.array(found, dtype=np.int64).T
    num_records = float(weights.sum()) * (1 - data.held_out) * examples / looked_at
    rows = examples
    if data.packing:
        order = np.arange(len(found))
        packed = pack_in_windows(
            order, lengths, images,
            max_length=data.max_length, max_images=data.max_images, window=data.pack_window, seed=[0],
        )  # fmt: skip
        rows = len(packed)
    row = Load(images.sum() / rows, supervised.sum() / rows, _histogram(lengths, rows))
    if pixels:
        row = replace(row, image_pixels=float(np.mean(pixels)))
    return Records(num_records, num_records * rows / examples, row)


def _pixels_of(images: Sequence[str | bytes], draft_for: ImageSpec | None) -> list[float]:
    """Of each image file whose header can be read; of a JPEG at reduced scale, those that take as long."""
    found = []
    for image in images:
        with suppress(RecordError):  # training skips and names its record
            size = upright_size(image)
            found.append(math.prod(size) * (_draft_share(size, draft_for) if draft_for and _is_jpeg(image) else 1.0))
    return found


def _is_jpeg(image: str | bytes) -> bool:
    return image.startswith(b"\xff\xd8") if isinstance(image, bytes) else image.lower().endswith((".jpg", ".jpeg"))


def _draft_share(size: tuple[int, int], spec: ImageSpec) -> float:
    """Of the time that decoding a JPEG of that width and height takes, with `data.jpeg_draft`."""
    possible = min(side // least for side, least in zip(size, draft_size(size, spec), strict=True))
    scale = next((scale for scale in (8, 4, 2) if scale <= possible), 1)
    return _UNPACKING + (1 - _UNPACKING) / scale**2


def _histogram(lengths: np.ndarray, rows: int) -> tuple[tuple[float, float], ...]:
    """Mean length of each class of records, and how many of a row are in it."""
    classes = np.array_split(np.sort(lengths), min(_BINS, len(lengths)))
    return tuple((float(each.mean()), len(each) / rows) for each in classes)
