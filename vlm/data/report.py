"""`vlm data check | preview | stats`: what the records are, as training will see them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.text import Text

from vlm.batch import IGNORE_INDEX, Example, ImageSpec, Skip
from vlm.data.build import build_reader, split_held_out
from vlm.data.config import DataConfig
from vlm.data.images import from_pixels, load_image, to_pixels
from vlm.data.scan import ExampleReader, refuse_too_many, scan_records
from vlm.data.skips import MIN_RECORDS_FOR_SHARE, too_many_message
from vlm.data.stream import EpochPlan
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import DataError, RecordError

_BAR_WIDTH = 40
_CAPTION_HEIGHT = 14  # pixels under each picture of a contact sheet


def check_records(
    config: DataConfig,
    tokenizer: ConversationTokenizer,
    spec: ImageSpec | None,
    *,
    limit: int = 20,
    out: Path | None = None,
) -> Counter[str]:
    """Tokenize every record and decode every picture; print the bad ones and the counts by rule.

    Args:
        limit: bad records to print.
        out: file for all of them, JSON lines.

    Returns:
        counts by rule.

    Raises:
        DataError: more are bad than `max_skipped_share` allows.
    """
    reader = build_reader(config, (*config.sources, *config.eval_sources), tokenizer)
    console = Console()
    skips: list[Skip] = []
    num_images = 0
    for number in range(len(reader)):
        try:
            example = reader.read(number)
            if spec is not None:
                for image in example.images:
                    load_image(image, config.max_pixels, spec.background)
                    num_images += 1
        except RecordError as error:
            source, local = reader.locate(number)
            skips.append(Skip(error.rule, error.where or source.where(local), error.message))
    for skip in skips[:limit]:
        console.print(f"{skip.where}: [{skip.rule}] {skip.message}", markup=False, highlight=False)
    if len(skips) > limit:
        console.print(f"... and {len(skips) - limit} more{f', all in {out}' if out else ''}")
    if out is not None:
        out.write_text("".join(json.dumps(s._asdict(), ensure_ascii=False) + "\n" for s in skips), encoding="utf-8")
    by_rule = Counter(skip.rule for skip in skips)
    counts = ", ".join(f"{rule} {count}" for rule, count in by_rule.most_common()) or "none"
    console.print(f"{len(reader):,} records, {num_images:,} pictures, skipped: {counts}", highlight=False)
    too_many = len(skips) > config.max_skipped_share * len(reader) and len(reader) >= MIN_RECORDS_FOR_SHARE
    if skips and (too_many or len(skips) == len(reader)):
        raise DataError(too_many_message(by_rule, len(reader), skips[0], out))
    return by_rule


def preview_records(
    config: DataConfig, tokenizer: ConversationTokenizer, spec: ImageSpec | None, *, number: int, out: Path
) -> None:
    """Print the first usable records, supervised tokens in green, and save their pictures as the encoder will see them.

    Args:
        number: records to show, from each source in turn.
        out: the contact sheet, PNG; written when there is a picture.
    """
    reader = build_reader(config, config.sources, tokenizer)
    console = Console()
    pictures: list[tuple[Image.Image, str]] = []
    for example in _first_usable(reader, number):
        console.rule(f"{example.where}: {len(example.input_ids)} tokens, {example.num_supervised} supervised")
        console.print(coloured(example, tokenizer), soft_wrap=True)
        if spec is not None:
            for image in example.images:
                pixels = to_pixels(load_image(image, config.max_pixels, spec.background), spec)
                pictures.append((from_pixels(pixels, spec), example.where))
    if pictures:
        contact_sheet(pictures).save(out)
        console.print(f"\n{len(pictures)} pictures as the encoder sees them: {out}", highlight=False)


def coloured(example: Example, tokenizer: ConversationTokenizer) -> Text:
    """The example as text: supervised tokens green, runs of image placeholders as `[image x 49]`."""
    text = Text()
    images = 0
    start = 0
    ids, labels = example.input_ids, example.labels
    for place in range(len(ids) + 1):
        kind = _kind(ids, labels, place, tokenizer.image_token_id)
        if place and kind != _kind(ids, labels, place - 1, tokenizer.image_token_id):
            run, previous = ids[start:place], _kind(ids, labels, place - 1, tokenizer.image_token_id)
            if previous == "image":
                count = len(run) // max(1, tokenizer.tokens_per_image)
                images += count
                text.append("".join(f"[image x {tokenizer.tokens_per_image}]" for _ in range(count)), "cyan")
            else:
                text.append(tokenizer.text(run), "bold green" if previous == "reply" else "dim")
            start = place
    return text


def print_stats(config: DataConfig, tokenizer: ConversationTokenizer, *, seed: int = 0) -> None:
    """Histograms of tokens, supervised tokens and turns per record, and how full packed rows are."""
    reader = build_reader(config, config.sources, tokenizer)
    scan = scan_records(reader, Path(config.cache), config.workers)
    refuse_too_many(scan, 1.0)
    usable = scan.lengths > 0
    console = Console(highlight=False)
    console.print(f"{len(scan):,} records, {int(usable.sum()):,} usable, {int(scan.num_images.sum()):,} pictures")
    _histogram(console, "tokens per record", scan.lengths[usable])
    _histogram(console, "supervised tokens per record", scan.num_supervised[usable])
    sample = np.flatnonzero(usable)[:: max(1, int(usable.sum()) // 1000)]
    turns = [sum(turn.role == "assistant" for turn in _conversation(reader, int(number))) for number in sample]
    _histogram(console, f"replies per record ({len(sample)} records)", np.array(turns))
    members, _ = split_held_out(scan, config.held_out, seed)
    plan = EpochPlan(
        scan, members, tuple(source.weight for source in config.sources), seed, config.max_length, config.max_images,
        config.packing, config.pack_window,
    )  # fmt: skip
    rows = plan.rows(0)
    tokens = sum(int(scan.lengths[row].sum()) for row in rows)
    pictures = sum(int(scan.num_images[row].sum()) for row in rows)
    console.print(
        f"rows of {config.max_length} tokens: {len(rows):,} an epoch, "
        f"{tokens / len(rows) / config.max_length:.1%} full, "
        f"{sum(map(len, rows)) / len(rows):.1f} records and {pictures / len(rows):.1f} pictures a row"
    )


def contact_sheet(pictures: list[tuple[Image.Image, str]], columns: int = 6) -> Image.Image:
    """Pictures in a grid, each with its caption below."""
    side = max(picture.width for picture, _ in pictures)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + _CAPTION_HEIGHT + 8)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(pictures):
        left, top = number % columns * (side + 8) + 4, number // columns * (side + _CAPTION_HEIGHT + 8) + 4
        sheet.paste(picture, (left, top))
        draw.text((left, top + side + 1), caption[-side // 6 :], fill="black")
    return sheet


def _first_usable(reader: ExampleReader, number: int) -> list[Example]:
    """From each source in turn, so that a mixture shows all its kinds."""
    found: list[Example] = []
    starts = np.cumsum([0, *map(len, reader.sources)])
    for offset in range(max(map(len, reader.sources))):
        for source, start in zip(reader.sources, starts, strict=False):
            if offset < len(source):
                try:
                    found.append(reader.read(int(start) + offset))
                except RecordError:
                    continue  # `vlm data check` lists the bad ones
                if len(found) == number:
                    return found
    return found


def _conversation(reader: ExampleReader, number: int) -> tuple:
    source, local = reader.locate(number)
    return source.conversation(local).turns


def _kind(ids: list[int], labels: list[int], place: int, image_token_id: int | None) -> str:
    if place >= len(ids):
        return "end"
    if ids[place] == image_token_id:
        return "image"
    return "reply" if labels[place] != IGNORE_INDEX else "read"


def _histogram(console: Console, title: str, values: np.ndarray) -> None:
    counts, edges = np.histogram(values, bins=min(10, max(1, len(np.unique(values)))))
    console.print(f"\n{title}: mean {values.mean():.1f}, median {np.median(values):.0f}, longest {values.max()}")
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * round(_BAR_WIDTH * count / max(counts.max(), 1))
        console.print(f"  {low:7.0f} to {high:7.0f}  {count:8,}  {bar}")
