"""How long data ranks wait for the slowest of them, with rows shared out in order and by work, for 8 to 1,024 ranks.

    python scripts/simulate_scale.py                     # three kinds of data, decoders of 0.5 and 7 billion
    python scripts/simulate_scale.py quickstart/finetune # a config's own records and model; scans the data

Nothing trains: rows are packed as for a run, and each is counted at its operations (`vlm.plan.cost`). `at the end` is
the wait of ranks that hold the whole model and meet once a step (ddp, zero 0 to 2); `everywhere` that of ranks that
gather parts of it and so meet in every micro-batch, once for images and once for text (fsdp, zero 3). Both are shares
of a step's mean work.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import bench_plan
import numpy as np

from vlm.config import RunConfig, load_config
from vlm.data.balance import RowSizes, RowWork, deal
from vlm.data.packing import pack_in_windows
from vlm.plan.cost import row_work
from vlm.plan.shapes import read_shapes

RANKS = (8, 64, 256, 1024)
ROWS = (2, 4, 8, 16)  # of a step, per rank
STEPS = 8  # simulated for each line
RECORDS = 200_000  # of each kind of data that is made up
_MEETINGS = ("at the end", "everywhere")
_LARGE = next(case for case in bench_plan.LARGE if case.name == "7B lora")
MODELS = (replace(_LARGE, name="0.5B lora", llm=bench_plan.llm(896, 4864, 24, 14, 2, 151_936)), _LARGE)


@dataclass(frozen=True)
class Records:
    """Lengths of a kind of data, int64 [n] each."""

    name: str
    tokens: np.ndarray  # placeholders of images included
    images: np.ndarray
    supervised: np.ndarray
    max_length: int = 2048


def made_up_records(tokens_per_image: int, count: int = RECORDS) -> Iterator[Records]:
    """Captions, conversations about an image as instruction data has them, and documents of up to five pages."""
    rng = np.random.default_rng(0)
    captions = np.minimum(rng.lognormal(3.0, 0.4, count).astype(np.int64) + 5, 200)
    images = np.ones(count, dtype=np.int64)
    yield Records("captions", captions + tokens_per_image, images, captions)
    replies = np.minimum(rng.lognormal(5.0, 0.8, count).astype(np.int64) + 10, 1200)
    images = (rng.random(count) < 0.94).astype(np.int64)
    yield Records("conversations", replies + replies // 3 + 20 + images * tokens_per_image, images, replies, 4096)
    images = rng.choice([0, 1, 3, 5], count, p=[0.1, 0.4, 0.3, 0.2])
    yield Records("pages", replies + 60 + images * tokens_per_image, images, replies, 8192)


def records_of(config: RunConfig) -> Records:
    """Of the config's data, scanned as for a run."""
    from vlm.data.build import build_conversation_tokenizer, build_reader
    from vlm.data.scan import scan_records
    from vlm.models.build import build_image_spec
    from vlm.models.llm import IMAGE_TOKEN, load_tokenizer

    spec = build_image_spec(config.model)
    tokenizer = load_tokenizer(config.model.llm.path, config.model.trust_remote_code)
    image_id = None if spec is None else tokenizer.get_vocab()[IMAGE_TOKEN]
    reader = build_reader(
        config.data, config.data.sources, build_conversation_tokenizer(config.data, tokenizer, spec, image_id)
    )
    scan = scan_records(reader, Path(config.data.cache), config.data.workers)
    usable = scan.lengths > 0
    arrays = (array[usable].astype(np.int64) for array in (scan.lengths, scan.num_images, scan.num_supervised))
    return Records("the config's", *arrays, config.data.max_length)


def pack(records: Records) -> RowSizes:
    """Rows as a run has them, without images that records share."""
    rows = pack_in_windows(
        np.random.default_rng(1).permutation(len(records.tokens)), records.tokens, records.images,
        max_length=records.max_length, max_images=64, window=512, seed=[0],
    )  # fmt: skip
    starts = np.cumsum([0, *(len(row) for row in rows[:-1])])
    order = np.concatenate(rows)
    tokens = records.tokens[order]
    counts = (tokens, tokens**2 // 2, records.images[order], records.supervised[order])
    return RowSizes(*(np.add.reduceat(count, starts) for count in counts))


def waits(work: RowWork, sizes: RowSizes, ranks: int, rows: int) -> list[float] | None:
    """In order and dealt: mean wait at the end, and everywhere. None where the data has no three such steps."""
    at_once = ranks * rows
    if len(sizes) < 3 * at_once:
        return None
    total = work.of(sizes)
    images = sizes.images * work.image
    found = []
    for start in range(0, min(STEPS, len(sizes) // at_once) * at_once, at_once):
        step = slice(start, start + at_once)
        in_order = np.arange(at_once).reshape(ranks, rows)
        for places in (in_order, deal(total[step], ranks)):
            own, seen = total[step][places], images[step][places]
            mean = own.sum(1).mean()
            meets = seen.max(0).sum() + (own - seen).max(0).sum()
            found.append((own.sum(1).max() / mean - 1, meets / mean - 1))
    each = np.array(found).reshape(-1, 2, 2).mean(0)
    return [each[0, 0], each[1, 0], each[0, 1], each[1, 1]]


def show(title: str, records: Records, work: RowWork) -> None:
    """Print a table: a line for each number of ranks, and of rows of a step that each takes."""
    print("\n".join(table(title, records, work)), end="\n\n", flush=True)


def table(title: str, records: Records, work: RowWork) -> Iterator[str]:
    sizes = pack(records)
    text = (work.of(sizes) - sizes.images * work.image).mean()
    share = 1 - text / work.of(sizes).mean()
    yield (
        f"{title}: {len(records.tokens):,} records, {len(sizes):,} rows of {records.max_length}, {share:.0%} of "
        "the work for images"
    )
    yield f"{'ranks':>6}{'rows each':>11}" + "".join(f"{f'{w}: in order':>23}{'dealt':>8}" for w in _MEETINGS)
    for ranks in RANKS:
        for rows in ROWS:
            found = waits(work, sizes, ranks, rows)
            if found is not None:
                a, b, c, d = found
                yield f"{ranks:>6}{rows:>11}{a:>23.1%}{b:>8.1%}{c:>23.1%}{d:>8.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a YAML file or a project; its records and its model")
    parser.add_argument("--options", nargs="*", default=[], help="of the config")
    arguments = parser.parse_args()
    if arguments.config:
        config = load_config(arguments.config, arguments.options)
        show(arguments.config, records_of(config), row_work(config, read_shapes(config.model)))
    else:
        for case in MODELS:
            with tempfile.TemporaryDirectory() as folder:
                config = bench_plan.write_config(case, Path(folder))
                shape = read_shapes(config.model)
            for records in made_up_records(shape.tokens_per_image):
                show(f"{case.name}, {records.name}", records, row_work(config, shape))


if __name__ == "__main__":
    main()
