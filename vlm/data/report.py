"""`vlm data check | preview | stats`: what the records are, as training will see them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.text import Text

from vlm.batch import IGNORE_INDEX, Example, ImageSpec, Skip
from vlm.data.build import build_order, build_reader, split_held_out
from vlm.data.config import DataConfig
from vlm.data.images import from_pixels, load_image, to_tiles
from vlm.data.notes import UnreadLog
from vlm.data.preferences import Reads
from vlm.data.scan import ExampleReader, Scan, in_chunks, scan_records
from vlm.data.skips import counts_by_rule, refuse_lost_source, refuse_too_many
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import DataError, RecordError

_BAR_WIDTH = 40
CHUNK = 200  # records per task of a checking process; decoding takes 20 times as long as measuring
_NUM_NOT_SHOWN = 5  # bad records that a preview names
_CAPTION_HEIGHT = 14  # pixels under each image of a contact sheet


def check_records(
    config: DataConfig,
    tokenizer: ConversationTokenizer,
    spec: ImageSpec | None,
    *,
    limit: int = 20,
    out: Path | None = None,
    reads: Reads = "conversation",
    as_json: bool = False,
) -> Counter[str]:
    """Tokenize every record and decode every image; print the bad ones and the counts by rule.

    Args:
        limit: bad records to print.
        out: file for all of them, JSON lines.
        reads: what the records must be, as the objective says.
        as_json: print one JSON object, as docs/runs.md has it.

    Returns:
        counts by rule.

    Raises:
        DataError: more are bad than `max_skipped_share` allows, or all of one source.
    """
    reader = build_reader(config, (*config.sources, *config.eval_sources), tokenizer, reads)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    checked = _Checked(np.zeros(len(reader), dtype=bool))
    work = partial(_decode_all, max_pixels=config.max_pixels, spec=spec)
    for start, part in in_chunks(reader, np.arange(len(reader)), work, config.workers, "data: checked", CHUNK):
        checked.add(start, part)
    skips = checked.skips
    if out is not None:
        out.write_text("".join(json.dumps(s._asdict(), ensure_ascii=False) + "\n" for s in skips), encoding="utf-8")
    if as_json:
        print(json.dumps(_check_as_json(reader, checked, limit), indent=2, ensure_ascii=False))
    else:
        _print_check(reader, checked, limit, out)
    refuse_too_many(skips, len(reader), config.max_skipped_share, out)
    refuse_lost_source(skips, reader.count_by_source(checked.is_usable))
    return Counter(skip.rule for skip in skips)


def _print_check(reader: ExampleReader, checked: _Checked, limit: int, out: Path | None) -> None:
    console, skips = _console(), checked.skips
    for skip in skips[:limit]:
        console.print(f"{skip.where}: [{skip.rule}] {skip.message}", soft_wrap=True)
    if len(skips) > limit:
        console.print(f"... and {len(skips) - limit} more{f', all in {out}' if out else ''}", soft_wrap=True)
    num_usable = reader.count_by_source(checked.is_usable)
    if len(num_usable) > 1:
        for name, count in reader.count_by_source(np.ones(len(reader), dtype=bool)).items():
            console.print(f"{name}: {num_usable[name]:,} of {count:,} records can be used", soft_wrap=True)
    for line in checked.unread.warnings(num_usable):
        console.print(f"warning: {line}", soft_wrap=True)
    counts = counts_by_rule(Counter(skip.rule for skip in skips)) or "none"
    if checked.num_cut:
        cut = f"{checked.num_cut:,} texts of more than {reader.max_length} tokens"
        console.print(f"{cut} are cut into {checked.num_pieces:,} pieces")
    console.print(f"{len(reader):,} records, {checked.num_images:,} images, skipped: {counts}", soft_wrap=True)


def _check_as_json(reader: ExampleReader, checked: _Checked, limit: int) -> dict[str, Any]:
    num_usable = reader.count_by_source(checked.is_usable)
    num_records = reader.count_by_source(np.ones(len(reader), dtype=bool))
    return {
        "records": len(reader),
        "images": checked.num_images,
        "skipped": dict(Counter(skip.rule for skip in checked.skips)),
        "sources": [{"name": name, "records": num, "usable": num_usable[name]} for name, num in num_records.items()],
        "cut_texts": checked.num_cut,
        "pieces": checked.num_pieces,
        "warnings": checked.unread.warnings(num_usable),
        "bad": [skip._asdict() for skip in checked.skips[:limit]],
    }


@dataclass
class _Checked:
    """What was found in some records."""

    is_usable: np.ndarray  # bool, per record
    skips: list[Skip] = field(default_factory=list)
    num_images: int = 0  # that can be decoded
    num_cut: int = 0  # texts longer than a row
    num_pieces: int = 0  # that they are cut into
    unread: UnreadLog = field(default_factory=UnreadLog)

    def add(self, start: int, part: _Checked) -> None:
        """What was found in the records from `start` on."""
        self.is_usable[start : start + len(part.is_usable)] = part.is_usable
        self.skips += part.skips
        self.num_images += part.num_images
        self.num_cut, self.num_pieces = self.num_cut + part.num_cut, self.num_pieces + part.num_pieces
        self.unread.merge(part.unread)


def _decode_all(reader: ExampleReader, numbers: np.ndarray, *, max_pixels: int, spec: ImageSpec | None) -> _Checked:
    checked = _Checked(np.zeros(len(numbers), dtype=bool))
    for place, number in enumerate(numbers.tolist()):
        source, local = reader.locate(number)
        try:
            (_, example), *more = reader.cut(source.conversation(local))
            if more:
                checked.num_cut, checked.num_pieces = checked.num_cut + 1, checked.num_pieces + 1 + len(more)
            if spec is not None:
                for image in example.images:
                    to_tiles(load_image(image, max_pixels, spec.background), spec)
                    checked.num_images += 1
        except RecordError as error:
            checked.skips.append(Skip(error.rule, error.where or source.where(local), error.message))
            continue
        checked.is_usable[place] = True
        if example.unread:
            checked.unread.add(source.name, example.where, example.unread)
    return checked


def preview_records(
    config: DataConfig,
    tokenizer: ConversationTokenizer,
    spec: ImageSpec | None,
    *,
    number: int,
    out: Path,
    reads: Reads = "conversation",
) -> None:
    """Print the first usable records, supervised tokens in green, and save their images as the encoder will see them.

    Args:
        number: records to show, from each source in turn.
        out: the contact sheet, PNG; written when there is an image.
        reads: what the records must be, as the objective says.

    Raises:
        DataError: no record can be shown; says why the first ones cannot.
    """
    reader = build_reader(config, config.sources, tokenizer, reads)
    console = _console()
    images: list[tuple[Image.Image, str]] = []
    examples, skips = _first_usable(reader, number)
    for skip in skips[:_NUM_NOT_SHOWN]:
        console.print(f"not shown: {skip.where}: [{skip.rule}] {skip.message}", style="red", soft_wrap=True)
    if len(skips) > _NUM_NOT_SHOWN:
        console.print(f"not shown: {len(skips) - _NUM_NOT_SHOWN} more; `vlm data check` lists them", soft_wrap=True)
    if not examples:
        counts = counts_by_rule(Counter(skip.rule for skip in skips))
        raise DataError(f"none of {len(reader):,} records can be shown ({counts})")
    for example in examples:
        for name, branch in _named_branches(example):
            counts = f"{len(branch.input_ids)} tokens, {branch.num_supervised} supervised"
            console.rule(f"{example.where}: {name}{counts}")
            console.print(coloured(branch, tokenizer), soft_wrap=True)
        if example.unread:
            console.print(f"not read: {', '.join(example.unread)}", style="yellow", soft_wrap=True)
        if spec is not None:
            try:
                pixels = [to_tiles(load_image(i, config.max_pixels, spec.background), spec) for i in example.images]
            except RecordError as error:
                console.print(f"left out of training: {error.message}", style="red", soft_wrap=True)
                continue
            images += [(from_pixels(tile, spec), example.where) for tiles in pixels for tile in tiles]
    if images:
        out.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(images).save(out)
        console.print(f"\n{len(images)} images as the encoder sees them: {out}", soft_wrap=True)


def coloured(example: Example, tokenizer: ConversationTokenizer) -> Text:
    """The example as text: supervised tokens green, runs of image placeholders as `[image x 49]`."""
    text = Text()
    start = 0
    ids, labels = example.input_ids, example.labels
    counts = map(tokenizer.num_tokens, example.images)
    for place in range(len(ids) + 1):
        kind = _kind(ids, labels, place, tokenizer.image_token_id)
        if place and kind != _kind(ids, labels, place - 1, tokenizer.image_token_id):
            run, previous = ids[start:place], _kind(ids, labels, place - 1, tokenizer.image_token_id)
            if previous == "image":
                while run:
                    count = min(next(counts), len(run))
                    text.append(f"[image x {count}]", "cyan")
                    run = run[max(1, count) :]
            else:
                shown = tokenizer.text(run).replace("\x1b", "\u241b")  # a data file must not steer the terminal
                text.append(shown, "bold green" if previous == "reply" else "dim")
            start = place
    return text


def print_stats(
    config: DataConfig,
    tokenizer: ConversationTokenizer,
    *,
    seed: int = 0,
    reads: Reads = "conversation",
    as_json: bool = False,
) -> None:
    """Histograms of tokens, supervised tokens and turns per record, and how full packed rows are."""
    reader = build_reader(config, config.sources, tokenizer, reads)
    scan = scan_records(reader, Path(config.cache), config.workers)
    console = _console()
    for line in [] if as_json else scan.warnings():
        console.print(f"warning: {line}", soft_wrap=True)
    refuse_too_many(scan.skips, len(scan), 1.0)
    refuse_lost_source(scan.skips, reader.count_by_source(scan.lengths > 0))
    usable = scan.lengths > 0
    sample = np.flatnonzero(usable)[:: max(1, int(usable.sum()) // 1000)]
    turns = [sum(turn.role == "assistant" for turn in _conversation(scan.reader, int(number))) for number in sample]
    found: dict[str, Any] = {
        "records": len(scan),
        "usable": int(usable[: len(scan)].sum()),
        "images": int(scan.sizes_in_row(shares=True)[1].sum()),  # of a preference those of both branches once
        "tokens": _distribution(scan.lengths[usable]),
        "supervised_tokens": _distribution(scan.num_supervised[usable] * (reads != "verifiable")),
        "replies": _distribution(np.array(turns)),
        "rows": _row_figures(config, scan, seed),
    }
    if as_json:
        cut = {"cut": scan.describe_cut() or None, "warnings": scan.warnings()}
        print(json.dumps({**found, **cut}, indent=2, ensure_ascii=False))
        return
    console.print(f"{found['records']:,} records, {found['usable']:,} usable, {found['images']:,} images")
    if line := scan.describe_cut():
        console.print(line)
    of_record = "piece" if scan.describe_cut() else "record"
    _histogram(console, f"tokens per {of_record}", found["tokens"])
    _histogram(console, f"supervised tokens per {of_record}", found["supervised_tokens"])
    _histogram(console, f"replies per record ({len(sample)} records)", found["replies"])
    rows = found["rows"]
    console.print(
        f"rows of {rows['tokens']} tokens: {rows['an_epoch']:,} an epoch, {rows['full']:.1%} full, "
        f"{rows['records_a_row']:.1f} records and {rows['images_a_row']:.1f} images a row"
    )


def _row_figures(config: DataConfig, scan: Scan, seed: int) -> dict[str, float]:
    """How the records of the first epoch, without those held out, lie in rows."""
    members, _ = split_held_out(scan, config.held_out, seed)
    rows = build_order(config, scan, members, seed).rows(0)
    return {
        "tokens": config.max_length,
        "an_epoch": len(rows),
        "full": int(scan.lengths[rows.numbers].sum()) / len(rows) / config.max_length,
        "records_a_row": len(rows.numbers) / len(rows),
        "images_a_row": int(scan.num_images[rows.numbers].sum()) / len(rows),
    }


def contact_sheet(images: list[tuple[Image.Image, str]], columns: int = 6) -> Image.Image:
    """Images in a grid, each with its caption below."""
    side = max(image.width for image, _ in images)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + _CAPTION_HEIGHT + 8)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(images):
        left, top = number % columns * (side + 8) + 4, number // columns * (side + _CAPTION_HEIGHT + 8) + 4
        sheet.paste(image, (left, top))
        draw.text((left, top + side + 1), caption[-side // 6 :], fill="black")
    return sheet


def _named_branches(example: Example) -> list[tuple[str, Example]]:
    """Of a question with an answer, nothing is supervised: the answer judges what the model writes."""
    if example.rejected is not None:
        return list(zip(("chosen, ", "rejected, "), example.branches, strict=True))
    if example.answer is not None:
        nothing = replace(example, labels=[IGNORE_INDEX] * len(example.labels))
        return [("question and answer, ", nothing)]
    return [("" if example.is_good is None else "good, " if example.is_good else "bad, ", example)]


def _console() -> Console:
    return Console(highlight=False, markup=False)  # file names and messages may hold square brackets


def _first_usable(reader: ExampleReader, number: int) -> tuple[list[Example], list[Skip]]:
    """From each source in turn, so that a mixture shows all its kinds; and those met on the way that cannot be used."""
    found: list[Example] = []
    skips: list[Skip] = []
    starts = np.cumsum([0, *map(len, reader.sources)])
    for offset in range(max(map(len, reader.sources))):
        for source, start in zip(reader.sources, starts, strict=False):
            if offset < len(source):
                try:
                    found.append(reader.cut(reader.conversation(int(start) + offset))[0][1])
                except RecordError as error:
                    skips.append(Skip(error.rule, error.where, error.message))
                if len(found) == number:
                    return found, skips
    return found, skips


def _conversation(reader: ExampleReader, number: int) -> tuple:
    return reader.conversation(number).turns


def _kind(ids: list[int], labels: list[int], place: int, image_token_id: int | None) -> str:
    if place >= len(ids):
        return "end"
    if ids[place] == image_token_id:
        return "image"
    return "reply" if labels[place] != IGNORE_INDEX else "read"


def _distribution(values: np.ndarray) -> dict[str, Any]:
    """Of whole numbers [n]; the edges of the histogram are one more than its counts.

    >>> _distribution(np.array([3, 3, 5]))["counts"]
    [2, 1]
    """
    counts, edges = np.histogram(values, bins=min(10, max(1, len(np.unique(values)))))
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "longest": int(values.max()),
        "counts": counts.tolist(),
        "edges": edges.tolist(),
    }


def _histogram(console: Console, title: str, values: dict[str, Any]) -> None:
    counts, edges = values["counts"], values["edges"]
    line = f"mean {values['mean']:.1f}, median {values['median']:.0f}, longest {values['longest']}"
    console.print(f"\n{title}: {line}")
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * round(_BAR_WIDTH * count / max(*counts, 1))
        console.print(f"  {low:7.0f} to {high:7.0f}  {count:8,}  {bar}")
