"""DataConfig -> the stream of training batches and the held-out batches."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlm.batch import ImageSpec, Skip
from vlm.data.balance import RowWork
from vlm.data.collate import Collator
from vlm.data.config import DataConfig, SourceConfig
from vlm.data.features import FeatureStore
from vlm.data.packing import pack_in_windows
from vlm.data.preferences import Reads
from vlm.data.records import open_source, source_names
from vlm.data.scan import ExampleReader, Scan, refuse_too_many, scan_records
from vlm.data.skips import counts_by_rule
from vlm.data.stream import BatchStream, EvalBatches, RowOrder
from vlm.data.template import TEMPLATES, ChatTemplate, check_template, match_tokenizer_template
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import DataError
from vlm.logs import log, warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_HELD_OUT = 3  # separates these random numbers from those of the order


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    train: BatchStream
    held_out: EvalBatches | None  # None when nothing is held out
    conversation_tokenizer: ConversationTokenizer
    scans: tuple[Scan, ...]  # of sources and eval_sources
    skips: list[Skip]  # records that cannot be used, found before training
    num_records: int  # in data.sources, skipped and held-out ones included

    def with_features(self, store: FeatureStore) -> Data:
        """The same, with the encoder's features of every image from `store`: images are not decoded."""
        collator = replace(self.train.collator, features=store)
        held_out = None if self.held_out is None else replace(self.held_out, collator=collator)
        return replace(self, train=self.train.with_collator(collator), held_out=held_out)

    def with_reference(self, tables: Sequence[np.ndarray]) -> Data:
        """The same, with log-probabilities of replies in every batch.

        Args:
            tables: `Scan.reference` of each scan.
        """
        scans = tuple(replace(scan, reference=table) for scan, table in zip(self.scans, tables, strict=True))
        held_out = None if self.held_out is None else replace(self.held_out, scan=scans[-1])
        return replace(self, train=self.train.with_scan(scans[0]), held_out=held_out, scans=scans)


def build_template(name: str, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    return match_tokenizer_template(tokenizer) if name == "tokenizer" else TEMPLATES[name]


def build_conversation_tokenizer(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, image_spec: ImageSpec | None, image_token_id: int | None
) -> ConversationTokenizer:
    """Warns when the template's control words are no tokens of the tokenizer; raises ConfigError if its end is none."""
    template = build_template(config.template, tokenizer)
    for line in _unused_settings(config, template):
        warn(line)
    if problem := check_template(tokenizer, template):
        warn(problem)
    return ConversationTokenizer(
        tokenizer,
        template,
        image_token_id=image_token_id,
        tokens_per_image=image_spec or 0,
        system=config.system,
    )


def _unused_settings(config: DataConfig, template: ChatTemplate) -> list[str]:
    """Settings that were given and change nothing beside the others, a line each."""
    lines = []
    if template.only_images_of_user:
        why = f"is not used: template {template.name} writes the images of users only"
        sources = (*config.sources, *config.eval_sources)
        lines += [f"the prompt of {source.path} {why}" for source in sources if source.prompt]
        lines += [f"data.system {why}"] if config.system else []
    if config.eval_sources and config.held_out:
        lines.append("data.held_out: its records are neither trained on nor evaluated, as data.eval_sources is set")
    weighted = [source.path for source in config.eval_sources if source.weight != 1]
    lines += [f"the weight of {path} is not used: data.eval_sources are read once" for path in weighted]
    if "pack_window" in config.model_fields_set and not config.packing:
        lines.append("data.pack_window is not used: data.packing is false")
    unused = {"cache_dtype", "cache_size_gb"} & config.model_fields_set if not config.cache_features else set()
    lines += [f"data.{key} is not used: data.cache_features is false" for key in sorted(unused)]
    return lines


def build_reader(
    config: DataConfig,
    sources: Sequence[SourceConfig],
    conversation_tokenizer: ConversationTokenizer,
    reads: Reads = "conversation",
) -> ExampleReader:
    """Opens the sources. `reads`: what their records must be. Raises DataError for a missing or unreadable file."""
    paths = [source.path for source in (*config.sources, *config.eval_sources)]
    names = dict(zip(paths, source_names(paths), strict=True))
    cache = Path(config.cache)
    opened = tuple(
        open_source(source, cache, config.image_placement, names.get(source.path), reads) for source in sources
    )
    return ExampleReader(opened, conversation_tokenizer, config.max_length, config.max_images, config.over_long)


def build_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    image_spec: ImageSpec | None,
    image_token_id: int | None,
    *,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_rank: int = 0,
    num_data_ranks: int = 1,
    reads_images: bool = True,
    may_share: bool = False,
    work: RowWork | None = None,
    reads: Reads = "conversation",
) -> Data:
    """Scan all sources, hold out what the config says, and put the training rows in order.

    Args:
        reads_images: false where another process has the encoder; batches are then without pixels and features.
        may_share: whether the model lets records share their beginning, for `data.share_images`.
        work: what a row costs, by which ranks share a step's rows out; None in their order.
        reads: what the records must be, as the objective says; others are skipped.

    Raises:
        DataError: a source cannot be read, nothing is supervised, or more records are skipped than allowed.
    """
    conversation_tokenizer = build_conversation_tokenizer(config, tokenizer, image_spec, image_token_id)
    scans = scan_sources(config, conversation_tokenizer, reads)
    scan = scans[0]
    members, held_out = split_held_out(scan, config.held_out, seed)
    pad_to = config.max_length if config.packing else None
    shares = may_share and config.packing and config.share_images
    collator = Collator(
        image_spec if reads_images else None,
        conversation_tokenizer.pad_token_id,
        config.max_pixels,
        pad_to,
        image_token_id=conversation_tokenizer.image_token_id if shares else None,
        shares_questions=shares,
        jpeg_draft=config.jpeg_draft,
    )
    order = build_order(config, scan, members, seed, shares, global_batch_size if config.group_by_length else 0)
    stream = BatchStream(
        order,
        collator,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        data_rank=data_rank,
        num_data_ranks=num_data_ranks,
        workers=config.workers,
        work=work,
        drops_last=config.drop_last,
    )
    _refuse_empty_epoch(stream, order.num_rows(0))
    if len(scans) > 1:
        evaluation = build_eval_batches(scans[1], np.flatnonzero(scans[1].lengths), config, stream)
    else:
        evaluation = build_eval_batches(scan, held_out, config, stream)
    return Data(stream, evaluation, conversation_tokenizer, scans, scan.skips, len(scan))


def _refuse_empty_epoch(stream: BatchStream, num_rows: int) -> None:
    if stream.steps_in_epoch(0) == 0:
        raise DataError(
            f"data.drop_last: {num_rows} rows do not fill one step of train.global_batch_size "
            f"{stream.global_batch_size}, so that an epoch has none. Lower it, or leave data.drop_last out"
        )


def scan_sources(
    config: DataConfig, conversation_tokenizer: ConversationTokenizer, reads: Reads = "conversation"
) -> tuple[Scan, ...]:
    """What is known of the records of data.sources and, if there are any, of data.eval_sources.

    Raises:
        DataError: a source cannot be read, nothing is supervised, or more records are skipped than allowed.
    """
    scans = []
    for key, sources in (("data.sources", config.sources), ("data.eval_sources", config.eval_sources)):
        if sources:
            reader = build_reader(config, sources, conversation_tokenizer, reads)
            scan = scan_records(reader, Path(config.cache), config.workers)
            _tell_skips(key, scan)
            refuse_too_many(scan, config.max_skipped_share)
            scans.append(scan)
    return tuple(scans)


def build_order(
    config: DataConfig, scan: Scan, members: tuple[np.ndarray, ...], seed: int, shares_images: bool = False,
    group_size: int = 0,
) -> RowOrder:  # fmt: skip
    """Raises DataError when no record is left to train on."""
    order = RowOrder(
        scan=scan,
        members=members,
        weights=tuple(source.weight for source in config.sources),
        seed=seed,
        max_length=config.max_length,
        max_images=config.max_images,
        packing=config.packing,
        window=config.pack_window,
        shares_images=shares_images,
        group_size=group_size,
    )
    if not len(order.rows(0)):
        raise DataError("data: no record is left to train on; data.held_out or the sources' weights leave none")
    return order


def build_eval_batches(scan: Scan, numbers: np.ndarray, config: DataConfig, stream: BatchStream) -> EvalBatches | None:
    """Held-out records in batches as the training stream's, spread over the same data ranks."""
    if len(numbers) == 0:
        return None
    lengths, num_images = scan.sizes_in_row(stream.order.shares_images)
    by_source: dict[str, list[int]] = {}  # no row holds records of two, so that each source has a loss of its own
    for number in numbers:
        by_source.setdefault(scan.reader.locate(int(number))[0].name, []).append(int(number))
    rows = [
        row
        for some in by_source.values()
        for row in pack_in_windows(
            np.asarray(some, dtype=numbers.dtype),
            lengths,
            num_images,
            max_length=config.max_length,
            max_images=config.max_images,
            window=config.pack_window if config.packing else 1,
            seed=[0],
            shares=scan.shares if stream.order.shares_images else None,
        )
    ]
    return EvalBatches(scan, rows, stream.collator, stream.micro_batch_size, stream.data_rank, stream.num_data_ranks)


def split_held_out(scan: Scan, share: float, seed: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Record numbers that train, per source, and those held out: a fixed draw for each record of a file.

    The draw is of (seed, file name, place in the file). So a file that is listed twice is held out in the same
    places, and records added to its end or other files added to the list change nothing.
    """
    members, held_out, start = [], [], 0
    for source in scan.reader.sources:
        everyone = np.arange(start, start + len(source))
        usable = scan.lengths[everyone] > 0
        out = np.random.default_rng([seed, _HELD_OUT, _name_number(source.config)]).random(len(source)) < share
        members.append(scan.with_pieces(everyone[usable & ~out]))
        held_out.append(scan.with_pieces(everyone[usable & out]))
        start += len(source)
    return tuple(members), np.concatenate(held_out)


def _name_number(source: SourceConfig) -> int:
    return int.from_bytes(hashlib.sha256(Path(source.path).name.encode()).digest()[:8])


def _tell_skips(key: str, scan: Scan) -> None:
    for line in scan.warnings():
        warn(line)
    if line := scan.describe_cut():
        log(f"{key}: {line}")
    if scan.skips:
        by_rule = Counter(skip.rule for skip in scan.skips)
        log(f"{key}: {len(scan.skips):,} of {len(scan):,} records skipped ({counts_by_rule(by_rule)})")
