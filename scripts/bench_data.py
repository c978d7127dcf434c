"""Rates of what the data goes through before and beside the steps: index, measure, read, start, decode, cache, load.

    python scripts/bench_data.py --records 20000 --images 200 --patches 576 --width 1024

Data is made up in a temporary folder: records of one image and one question with its answer, photographs as noise in
JPEG. Prints a line per step; CPU time says more where other programs run. Files are in the page cache when they are
read, so rates of reading are those of the program and not of the disk; --folder puts them on another disk.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

QUESTION = "What is in this image, and where in it?"
WORDS = "a the red small wooden house stands lies beside under near two three of with and glass river tree dog"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=20_000, help="that are indexed and measured")
    parser.add_argument("--words", type=int, default=60, help="of each answer")
    parser.add_argument("--tokenizer", help="folder of one; default: a small one, made here")
    parser.add_argument("--workers", type=int, default=0, help="processes that measure; 0: as a run does")
    parser.add_argument("--starts", type=int, nargs="*", default=(10_000, 100_000), help="records of known data sets")
    parser.add_argument("--only", nargs="*", choices=BENCHES, default=[*BENCHES], help="default: all")
    parser.add_argument("--images", type=int, default=200, help="that are decoded, kept and loaded")
    parser.add_argument("--pixels", type=int, nargs=2, default=(640, 480), help="width and height of the images")
    parser.add_argument("--size", type=int, default=336, help="S, pixels per side that the encoder sees")
    parser.add_argument("--patches", type=int, default=576, help="P, CLIP-L/336 has 576")
    parser.add_argument("--width", type=int, default=1024, help="C, CLIP-L has 1,024")
    parser.add_argument("--entries", type=int, default=100_000, help="of a cache whose index is loaded")
    parser.add_argument("--folder", help="where the files go; default: the system's temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print("| step | rate | CPU time of each | |\n|---|---|---|---|")
        for name in arguments.only:
            BENCHES[name](arguments, Path(folder))


def bench_records(arguments: argparse.Namespace, folder: Path) -> None:
    """Spans of records, then their tokens, each also as a second run finds it in the cache; then an epoch's reading."""
    from vlm.data.build import build_conversation_tokenizer, build_reader
    from vlm.data.index import open_index
    from vlm.data.scan import scan_records

    path = write_records(folder, arguments.records, arguments.words)
    megabytes = f"{path.stat().st_size / 1e6:,.0f} MB"
    tell("index", arguments.records, "records", timed(lambda: open_index(path, folder / "cache")), megabytes)
    tell("index, known", arguments.records, "records", timed(lambda: open_index(path, folder / "cache")))
    tokenizer = load_tokenizer(arguments.tokenizer)
    config = data_config(path)
    conversations = build_conversation_tokenizer(config, tokenizer, image_spec(arguments), tokenizer.pad_token_id)
    reader = build_reader(config, config.sources, conversations)
    for step in ("measure", "measure, known"):
        spent = timed(lambda: scan_records(reader, folder / "cache", arguments.workers))
        tell(step, arguments.records, "records", spent, f"--workers {arguments.workers}")
    kept = scan_records(reader, folder / "cache", arguments.workers).reader
    order = random.Random(0).sample(range(arguments.records), arguments.records)
    for step, one in (("read, kept", kept), ("read, from text", reader)):
        spent = timed(lambda one=one: [one.read(number) for number in order])
        tell(step, arguments.records, "records", spent, "in an epoch's order")


def bench_starts(arguments: argparse.Namespace, folder: Path) -> None:
    """From the config to the first batch and the fingerprint of the order, without images: of new data, then known."""
    from vlm.data.build import build_data

    tokenizer, spec = load_tokenizer(arguments.tokenizer), image_spec(arguments)

    def start(path: Path) -> str:
        sizes: dict[str, Any] = {"seed": 0, "global_batch_size": 8, "micro_batch_size": 8, "reads_images": False}
        stream = build_data(data_config(path), tokenizer, spec, tokenizer.pad_token_id, **sizes).train
        next(stream.iterate())
        return stream.fingerprint

    for count in arguments.starts:
        path = write_records(folder / f"start-{count}", count, arguments.words)
        for step in ("start", "start, known"):
            spent = timed(lambda path=path: start(path))
            note = f"{count:,} records, {spent.seconds:.2f} s to the first batch, CPU {spent.cpu_seconds:.2f} s"
            tell(step, count, "records", spent, note)


def bench_images(arguments: argparse.Namespace, folder: Path) -> None:
    """From a JPEG file to the pixels that an encoder takes, and how far those of a draft lie apart."""
    import torch

    from vlm.data.images import load_tiles

    spec, paths = image_spec(arguments), write_images(folder, arguments)
    width, height = arguments.pixels
    size = f"{width} x {height} to {spec.size} x {spec.size}"
    tell("decode", len(paths), "images", timed(lambda: [load_tiles(path, spec) for path in paths]), size)
    draft = timed(lambda: [load_tiles(path, spec, draft=True) for path in paths])
    # [1, 3, S, S] in units of (value / 255 - mean) / std, std 0.5
    apart = [(load_tiles(path, spec) - load_tiles(path, spec, draft=True)).abs() * 0.5 * 255 for path in paths[:20]]
    mean, most = (max(float(measure(each)) for each in apart) for measure in (torch.mean, torch.max))
    tell("decode, draft", len(paths), "images", draft, f"apart by {mean:.2f} of 255 on average, at most {most:.0f}")


def bench_cache(arguments: argparse.Namespace, folder: Path) -> None:
    """Features of images: kept, loaded with their sums compared, and loaded again; then the index of many."""
    import torch

    from vlm.data.features import FeatureStore

    def load(store: FeatureStore) -> None:
        for path in paths:
            torch.cat([store.get(path)])  # as the collator does

    paths, features = write_images(folder, arguments), torch.randn(1, arguments.patches, arguments.width)
    store, reader = (FeatureStore(folder / "features", "encoder") for _ in range(2))
    size = f"{arguments.patches} x {arguments.width} in bf16, {features.numel() * 2 / 1e6:.2f} MB"
    tell("cache, write", len(paths), "images", timed(lambda: [store.put(path, features) for path in paths]), size)
    tell("cache, load", len(paths), "images", timed(lambda: load(reader)), "sums compared")
    tell("cache, load again", len(paths), "images", timed(lambda: load(reader)))
    many = FeatureStore(folder / "many", "encoder")
    for number in range(arguments.entries):
        many.put(b"%d" % number, features[:, :1, :2])
    opened = timed(lambda: FeatureStore(folder / "many", "encoder").has(b"0"))
    tell("cache, open", arguments.entries, "entries", opened, f"{opened.seconds * 1000:.0f} ms")


BENCHES: dict[str, Callable[[argparse.Namespace, Path], None]] = {
    "records": bench_records,
    "starts": bench_starts,
    "images": bench_images,
    "cache": bench_cache,
}


def data_config(path: Path) -> Any:
    """Of a source that has its cache and its images beside it."""
    from vlm.data.config import DataConfig

    return DataConfig.model_validate({"sources": [{"path": str(path)}], "cache": str(path.parent / "cache")})


class Spent(NamedTuple):
    seconds: float
    cpu_seconds: float  # of processes that were started too


def tell(step: str, count: int, unit: str, spent: Spent, note: str = "") -> None:
    cpu = f"{spent.cpu_seconds / count * 1e6:,.1f} us"
    print(f"| {step} | {count / spent.seconds:,.0f} {unit}/s | {cpu} | {note} |", flush=True)


def timed(call: Callable[[], Any]) -> Spent:
    started, cpu = time.perf_counter(), cpu_seconds()
    call()
    return Spent(time.perf_counter() - started, cpu_seconds() - cpu)


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def load_tokenizer(path: str | None) -> Any:
    if path is None:
        from demo.tiny import tiny_tokenizer

        return tiny_tokenizer([QUESTION, WORDS])
    from vlm.models.llm import load_tokenizer as load

    return load(path)


# image tokens stand in the text as one more control word of the tokenizer
def image_spec(arguments: argparse.Namespace) -> Any:
    from vlm.batch import ImageSpec

    return ImageSpec(size=arguments.size, mean=(0.5,) * 3, std=(0.5,) * 3, num_tokens=arguments.patches)


def write_records(folder: Path, count: int, words: int) -> Path:
    rng, path = random.Random(0), folder / "records.jsonl"
    folder.mkdir(exist_ok=True)
    (folder / "0.jpg").touch()  # found, not read
    with path.open("w") as file:
        for _ in range(count):
            answer = " ".join(rng.choices(WORDS.split(), k=words)) + "."
            turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"image": "0.jpg", "conversations": turns}) + "\n")
    return path


def write_images(folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Smooth noise, which JPEG packs as it does photographs."""
    import numpy as np
    from PIL import Image

    rng, paths = np.random.default_rng(0), []
    for number in range(arguments.images):
        path = folder / "images" / f"{number}.jpg"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            small = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
            small.resize(tuple(arguments.pixels), Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(str(path))
    return paths


if __name__ == "__main__":
    main()
