"""Rows of a step, dealt to data ranks by work."""

import itertools

import numpy as np
import pytest
from test_stream import build

from vlm.data.balance import RowSizes, RowWork, deal
from vlm.data.build import build_data
from vlm.data.config import DataConfig, SourceConfig

WORK = RowWork(token=10, pair=1, image=500, supervised=3)


def test_the_largest_rows_go_to_different_ranks_and_sums_are_even():
    work = np.array([9, 1, 1, 8, 7, 2, 2, 6])
    dealt = deal(work, num_ranks=2)
    assert work[dealt].tolist() == [[9, 6, 2, 1], [8, 7, 2, 1]]
    assert sorted(dealt.flatten().tolist()) == list(range(8))


def test_one_rank_takes_the_rows_in_their_order():
    assert deal(np.array([1, 9, 4]), num_ranks=1).tolist() == [[0, 1, 2]]


def test_equal_rows_are_dealt_alike_every_time():
    assert deal(np.full(6, 5), num_ranks=3).tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_rank_waits_less_than_2_percent_at_8_rows_of_uneven_images():
    rng = np.random.default_rng(0)
    work = 100_000 + 30_000 * rng.integers(0, 4, 64 * 8)
    in_order, dealt = work.reshape(64, -1).sum(1), work[deal(work, 64)].sum(1)
    assert in_order.max() / in_order.mean() > 1.1
    assert dealt.max() / dealt.mean() < 1.02
    assert dealt.sum() == work.sum()


def test_work_is_a_sum_over_what_a_row_holds():
    sizes = RowSizes(*(np.array([value]) for value in (100, 5000, 2, 30)))
    assert WORK.of(sizes).tolist() == [100 * 10 + 5000 + 2 * 500 + 30 * 3]


def test_sizes_count_records_by_themselves_and_an_empty_row_as_nothing(records, bpe, spec):
    order = build(records(6), bpe, spec).train.order
    rows = [np.array([0, 1]), np.array([], dtype=np.int64)]
    sizes, lengths = order.sizes(rows), order.scan.lengths
    assert sizes.tokens.tolist() == [lengths[0] + lengths[1], 0]
    assert sizes.pairs.tolist() == [(int(lengths[0]) ** 2 + int(lengths[1]) ** 2) // 2, 0]
    assert sizes.images.tolist() == [1, 0]
    assert sizes.supervised.tolist() == [order.scan.num_supervised[:2].sum(), 0]


def stream(path, bpe, spec, rank, ranks, work=WORK):
    config = DataConfig(
        sources=[SourceConfig(path=str(path))], cache=str(path.parent / "cache"), max_length=96, max_images=3,
        pack_window=16,
    )  # fmt: skip
    image_id = bpe.convert_tokens_to_ids("<image>")
    return build_data(
        config, bpe, spec, image_id, seed=3, global_batch_size=8, micro_batch_size=1, data_rank=rank,
        num_data_ranks=ranks, work=work,
    ).train  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_train_on_the_rows_of_one_rank_in_every_step(records, bpe, spec, ranks):
    path = records(61)
    one = stream(path, bpe, spec, 0, 1)
    parts = [stream(path, bpe, spec, rank, ranks) for rank in range(ranks)]
    steps = 2 * one.steps_in_epoch(0)  # over the end of the epoch
    for whole, *theirs in itertools.islice(zip(one.iterate(), *(p.iterate() for p in parts), strict=True), steps):
        together = [batch for rank in theirs for batch in rank]
        assert sorted(batch.where for batch in together) == sorted(batch.where for batch in whole)
        assert sum(batch.num_supervised for batch in together) == sum(batch.num_supervised for batch in whole)
    assert {part.fingerprint for part in parts} == {one.fingerprint}


def test_a_rank_that_starts_at_a_step_reads_what_it_would_have_read(records, bpe, spec):
    path = records(61)
    whole = list(itertools.islice(stream(path, bpe, spec, 1, 2).iterate(), 6))
    again = list(itertools.islice(stream(path, bpe, spec, 1, 2).iterate(4), 2))
    assert [[batch.where for batch in step] for step in again] == [[b.where for b in step] for step in whole[4:]]


def test_one_rank_reads_the_same_with_work_and_without(records, bpe, spec):
    path = records(31)
    found = [list(itertools.islice(stream(path, bpe, spec, 0, 1, work).iterate(), 4)) for work in (WORK, None)]
    assert [[b.where for b in step] for step in found[0]] == [[b.where for b in step] for step in found[1]]
