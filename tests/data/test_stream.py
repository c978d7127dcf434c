import itertools
import re
import shutil
import sys
import time

import numpy as np
import pytest
import torch

from vlm.batch import IGNORE_INDEX
from vlm.data.build import build_data
from vlm.data.config import DataConfig, SourceConfig
from vlm.data.packing import Rows, pack_in_windows
from vlm.data.stream import RowOrder
from vlm.errors import ConfigError, DataError


def build(path, tokenizer, spec, *, batch=4, micro=2, rank=0, ranks=1, seed=3, sources=None, share=False, **settings):
    config = DataConfig(
        sources=sources or [SourceConfig(path=str(path))],
        cache=str(path.parent / "cache"),
        **{"max_length": 96, "max_images": 3, "pack_window": 16} | settings,
    )
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    return build_data(
        config, tokenizer, spec, image_id,
        seed=seed, global_batch_size=batch, micro_batch_size=micro, data_rank=rank, num_data_ranks=ranks,
        may_share=share,
    )  # fmt: skip


def seen(data, steps, start=0):
    """The records of each step, in order."""
    return [[batch.where for batch in step] for step in itertools.islice(data.train.iterate(start), steps)]


def flat(steps):
    return sorted(where for step in steps for batch in step for where in batch)


def test_an_epoch_shows_every_record_once_and_the_next_one_in_another_order(records, bpe, spec):
    data = build(records(31), bpe, spec)
    steps = data.train.steps_in(1)
    first, second = seen(data, steps), seen(data, steps + data.train.steps_in_epoch(1))[steps:]
    assert flat(first) == sorted(f"records.jsonl: line {number}" for number in range(1, 32))
    assert flat(second) == flat(first)
    assert second != first
    assert data.train.order.order(0).tolist() != data.train.order.order(1).tolist()


def test_iterating_from_a_step_gives_what_follows_that_step(records, bpe, spec):
    data = build(records(31), bpe, spec)
    everything = seen(data, 9)
    assert seen(data, 4, start=5) == everything[5:]


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(records, bpe, spec, workers):
    path = records(31)
    alone, helped = build(path, bpe, spec), build(path, bpe, spec, workers=workers)
    for own, theirs in zip(itertools.islice(alone.train.iterate(2), 4), helped.train.iterate(2), strict=False):
        for a, b in zip(own, theirs, strict=True):
            assert torch.equal(a.input_ids, b.input_ids)
            assert (a.pixel_values is None) == (b.pixel_values is None)
            assert a.pixel_values is None or torch.equal(a.pixel_values, b.pixel_values)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the platform's default is taken")
def test_workers_are_forked_whatever_the_default(records, bpe, spec, monkeypatch):
    asked = []
    monkeypatch.setattr("vlm.data.stream.DataLoader", lambda *_, **settings: asked.append(settings) or iter(()))
    with pytest.raises(RuntimeError):  # there are no batches
        next(build(records(31), bpe, spec, workers=1).train.iterate())
    assert asked[0]["multiprocessing_context"] == "fork"


def test_ranks_share_each_step_without_overlap_whatever_their_number(records, bpe, spec):
    path = records(31)
    one = seen(build(path, bpe, spec), 6)
    two = [seen(build(path, bpe, spec, rank=rank, ranks=2), 6) for rank in (0, 1)]
    four = [seen(build(path, bpe, spec, micro=1, rank=rank, ranks=4), 6) for rank in range(4)]
    for step in range(6):
        together = sorted(where for batch in one[step] for where in batch)
        assert sorted(where for rank in two for batch in rank[step] for where in batch) == together
        assert sorted(where for rank in four for batch in rank[step] for where in batch) == together


def test_a_batch_that_ranks_do_not_divide_is_refused(records, bpe, spec):
    with pytest.raises(ConfigError, match="global_batch_size 4 is not a multiple"):
        build(records(4), bpe, spec, ranks=3, micro=1)


def test_fewer_records_than_a_batch_fill_the_step_with_empty_rows(records, bpe, spec):
    data = build(records(2), bpe, spec, batch=8, micro=2)
    assert data.train.steps_in(3) == 3
    (step,) = itertools.islice(data.train.iterate(0), 1)
    assert len(step) == 4
    assert sum(len(batch.where) for batch in step) == 2
    assert step[-1].num_supervised == 0
    assert step[-1].num_padding == step[-1].input_ids.numel()


def test_rows_restart_positions_at_each_example_and_at_every_padding_token(records, bpe, spec):
    data = build(records(9), bpe, spec, batch=1, micro=1)
    (step,) = itertools.islice(data.train.iterate(0), 1)
    batch = step[0]
    positions = batch.position_ids[0].tolist()
    starts = [place for place, position in enumerate(positions) if position == 0]
    assert len(starts) == len(batch.where) + batch.num_padding
    assert all(batch.labels[0, place] == IGNORE_INDEX for place in starts)
    assert batch.num_images * 3 == (batch.input_ids == bpe.convert_tokens_to_ids("<image>")).sum()
    assert batch.input_ids.shape == (1, 96)


def test_without_packing_each_row_holds_one_record(records, bpe, spec):
    data = build(records(5), bpe, spec, packing=False)
    (step,) = itertools.islice(data.train.iterate(0), 1)
    assert [len(batch.where) for batch in step] == [2, 2]
    assert step[0].input_ids.shape[1] % 8 == 0
    assert step[0].input_ids.shape[1] < 96


def test_an_image_that_breaks_during_training_costs_its_record_alone(records, bpe, spec):
    path = records(9)
    data = build(path, bpe, spec)
    (path.parent / "4.png").write_bytes(b"no image")
    (path.parent / "7.png").unlink()
    batches = [b for step in itertools.islice(data.train.iterate(0), data.train.steps_in(1)) for b in step]
    skips = {(skip.rule, skip.where) for batch in batches for skip in batch.skipped}
    assert skips == {("image_unreadable", "records.jsonl: line 5"), ("image_missing", "records.jsonl: line 8")}
    assert sum(len(batch.where) for batch in batches) == 7
    images = bpe.convert_tokens_to_ids("<image>")
    assert all((b.input_ids == images).sum() == 3 * b.num_images for b in batches)


def test_a_source_of_half_weight_shows_its_other_half_in_the_next_epoch(records, bpe, spec):
    path = records(12)
    data = build(path, bpe, spec, sources=[SourceConfig(path=str(path), weight=0.5)])
    plan = data.train.order
    first, second = set(plan.order(0).tolist()), set(plan.order(1).tolist())
    assert len(first) == len(second) == 6
    assert first | second == set(range(12))


def test_a_source_of_weight_two_and_a_half_shows_each_record_two_or_three_times(records, bpe, spec):
    path = records(12)
    data = build(path, bpe, spec, sources=[SourceConfig(path=str(path), weight=2.5)])
    counts = np.bincount(data.train.order.order(0), minlength=12)
    assert sorted(counts.tolist()) == [2] * 6 + [3] * 6


def test_held_out_records_are_never_trained_on_and_stay_the_same(records, bpe, spec):
    path = records(60)
    data, again = build(path, bpe, spec, held_out=0.3), build(path, bpe, spec, held_out=0.3)
    held_out = {where for batch in data.held_out for where in batch.where}
    trained = set(flat(seen(data, data.train.steps_in(2))))
    assert 8 <= len(held_out) <= 28
    assert held_out.isdisjoint(trained)
    assert len(held_out | trained) == 60
    assert {where for batch in again.held_out for where in batch.where} == held_out


def test_the_fingerprint_changes_with_the_data_and_the_seed_not_with_a_touch(records, bpe, spec):
    path = records(12)
    before = build(path, bpe, spec).train.fingerprint
    path.touch()
    assert build(path, bpe, spec).train.fingerprint == before
    assert build(path, bpe, spec, seed=4).train.fingerprint != before
    path.write_text(path.read_text().replace("Answer 3.", "Another answer."))
    assert build(path, bpe, spec).train.fingerprint != before


def test_a_copy_of_the_data_has_the_same_fingerprint_and_other_images_another(records, bpe, spec, tmp_path_factory):
    path = records(12)
    path.write_text(re.sub(r'"image": "[0-5].png"', '"image": "1.png"', path.read_text()))
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(path.parent, copy, dirs_exist_ok=True)
    both = [build(each, bpe, spec, share=True) for each in (path, copy / path.name)]
    streams = [data.train for data in both]
    assert streams[0].order.num_shared(0)[0] > 1
    assert streams[0].fingerprint == streams[1].fingerprint
    assert streams[0].earlier_fingerprint != streams[1].earlier_fingerprint
    assert seen(both[0], 3) == seen(both[1], 3)
    keys = streams[0].order.scan.shares.keys
    keys[np.flatnonzero(keys == keys[0])[-1]] = 5  # one record less stands with the others
    changed = build(path, bpe, spec, share=True).train
    changed.order.scan.shares.keys = keys
    assert changed.fingerprint != streams[1].fingerprint


def test_epochs_and_steps_agree(records, bpe, spec):
    stream = build(records(31), bpe, spec, batch=2, micro=1).train
    per_epoch = stream.steps_in_epoch(0)
    assert stream.steps_in(1) == per_epoch
    assert stream.epoch_at(per_epoch) == 1.0
    assert stream.steps_in(1.5) > per_epoch
    assert 0 < stream.fill <= 1


def test_nothing_left_to_train_on_is_an_error(records, bpe, spec):
    with pytest.raises(DataError, match="no record is left"):
        build(records(1), bpe, spec, held_out=0.999999)


def test_a_step_late_in_a_run_plans_no_past_epoch_again(records, bpe, spec, monkeypatch):
    stream = build(records(12), bpe, spec).train
    planned = []
    make_rows = RowOrder._make_rows
    monkeypatch.setattr(RowOrder, "_make_rows", lambda self, epoch: planned.append(epoch) or make_rows(self, epoch))
    start = sum(stream.steps_in_epoch(epoch) for epoch in range(8))
    planned.clear()
    for _ in itertools.islice(stream.iterate(start), 3 * stream.steps_in_epoch(8)):
        stream.epoch_at(start)
    assert len(planned) == len(set(planned))
    assert min(planned) >= 8


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_read_the_rows_of_one_rank_in_the_same_places(records, bpe, spec, ranks):
    path = records(31)
    one = build(path, bpe, spec, micro=1).train
    parts = [build(path, bpe, spec, micro=1, rank=rank, ranks=ranks).train for rank in range(ranks)]
    steps = 2 * one.steps_in_epoch(0)  # over the end of the epoch
    for own, *theirs in itertools.islice(zip(one.iterate(), *(part.iterate() for part in parts), strict=True), steps):
        together = [batch for rank in theirs for batch in rank]
        assert [batch.where for batch in together] == [batch.where for batch in own]
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(together, own, strict=True))


def test_reading_batches_leaves_the_random_state_of_training_alone(records, bpe, spec):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    seen(build(records(9), bpe, spec), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_label_of_a_row_is_of_an_answer_and_pads_are_never_learned(records, bpe, spec):
    data = build(records(12, longest=3), bpe, spec, batch=2, micro=2)
    for step in itertools.islice(data.train.iterate(0), data.train.steps_in(1)):
        for batch in step:
            learned = bpe.decode(batch.labels[batch.labels != IGNORE_INDEX])
            answers = [int(where.split()[-1]) - 1 for where in batch.where]
            assert learned == "".join(f"Answer {n}.<|im_end|>" * (1 + n % 3) for n in answers)


def test_a_file_that_is_listed_twice_is_held_out_in_the_same_places(records, bpe, spec):
    path = records(40)
    twice = [SourceConfig(path=str(path)), SourceConfig(path=str(path))]
    data = build(path, bpe, spec, held_out=0.3, sources=twice)
    held_out = {where for batch in data.held_out for where in batch.where}
    assert held_out.isdisjoint(flat(seen(data, data.train.steps_in(1))))
    alone = build(path, bpe, spec, held_out=0.3)
    assert held_out == {where for batch in alone.held_out for where in batch.where}


@pytest.mark.slow
def test_a_million_records_are_planned_in_seconds():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.5, 0.7, 1_000_000).astype(int) + 30, 2048)
    images = rng.integers(0, 2, len(lengths))
    started = time.perf_counter()
    rows = pack_in_windows(
        rng.permutation(len(lengths)), lengths, images, max_length=2048, max_images=16, window=512, seed=[0]
    )
    assert time.perf_counter() - started < 30  # 1.1 s on an idle core
    assert lengths.sum() / (len(rows) * 2048) > 0.98  # measured 0.9905


def test_a_step_that_an_epoch_does_not_fill_may_be_left_out(records, bpe, spec):
    path = records(31)
    whole, dropped = build(path, bpe, spec, packing=False), build(path, bpe, spec, packing=False, drop_last=True)
    assert [data.train.steps_in(2) for data in (whole, dropped)] == [16, 14]  # 31 rows, 4 a step
    assert [data.train.epoch_at(7) for data in (whole, dropped)] == [7 / 8, 1.0]
    assert seen(dropped, 7) == seen(whole, 7)
    assert seen(dropped, 8)[7:] == seen(whole, 9)[8:], "the next epoch begins a step earlier"
    assert whole.train.fingerprint != dropped.train.fingerprint
    with pytest.raises(DataError, match="31 rows do not fill one step"):
        build(path, bpe, spec, packing=False, drop_last=True, batch=32)


def test_records_of_similar_length_stand_in_one_step_and_little_is_padded(records, bpe, spec):
    path = records(63, longest=4)
    shuffled, grouped = (
        build(path, bpe, spec, packing=False, group_by_length=by, max_length=400) for by in (False, True)
    )

    def padding(data):
        batches = [batch for step in itertools.islice(data.train.iterate(), data.train.steps_in(1)) for batch in step]
        return sum(batch.num_padding for batch in batches) / sum(batch.input_ids.numel() for batch in batches)

    steps = shuffled.train.steps_in(1)
    assert flat(seen(grouped, steps)) == flat(seen(shuffled, steps))
    assert (padding(shuffled), padding(grouped)) == (pytest.approx(0.24, abs=0.02), pytest.approx(0.054, abs=0.02))
    lengths = grouped.train.order.scan.lengths
    epochs = [[row.tolist() for row in grouped.train.order.rows(epoch)] for epoch in (0, 1)]
    first = [int(lengths[row[0]]) for row in epochs[0][: 4 * 15]]
    spread = [max(first[i : i + 4]) - min(first[i : i + 4]) for i in range(0, len(first), 4)]
    assert np.mean(spread) < 0.1 * (max(first) - min(first))
    assert first != sorted(first), "steps come in a random order"
    assert epochs[0] != epochs[1]
    with pytest.raises(ValueError, match="alternative to packing"):
        DataConfig(sources=[SourceConfig(path="x.json")], group_by_length=True)


def test_rows_of_many_records_come_from_the_cache_the_second_time(records, bpe, spec, monkeypatch, capsys):
    monkeypatch.setattr("vlm.data.stream._MANY", 10)
    path = records(40)
    first = build(path, bpe, spec).train
    rows = [row.tolist() for row in first.order.rows(1)]
    packed = []
    monkeypatch.setattr("vlm.data.stream.pack_in_windows", lambda *a, **k: packed.append(1) or pack_in_windows(*a, **k))
    again = build(path, bpe, spec).train
    assert [row.tolist() for row in again.order.rows(1)] == rows
    assert (again.fill, again.fingerprint, packed) == (first.fill, first.fingerprint, [])
    other_seed = build(path, bpe, spec, seed=4).train
    assert ([row.tolist() for row in other_seed.order.rows(1)] != rows, packed) == (True, [1, 1])  # epochs 0 and 1
    for file in (path.parent / "cache/lengths").glob("*/rows-*.npy"):
        file.write_bytes(file.read_bytes()[:-40])
    assert [row.tolist() for row in build(path, bpe, spec).train.order.rows(1)] == rows
    assert "rows are packed again" in capsys.readouterr().err


def test_rows_are_two_arrays_that_know_which_records_stand_together():
    rows = Rows.of([np.array([4, 7]), np.array([5]), np.array([1, 2, 3])])
    assert (rows.numbers.tolist(), rows.ends.tolist()) == ([4, 7, 5, 1, 2, 3], [2, 3, 6])
    assert [row.tolist() for row in rows] == [[4, 7], [5], [1, 2, 3]]
    assert rows.follows.tolist() == [False, True, False, False, True, True]
    assert rows.sums(np.array([1, 2, 3, 4, 5, 6])).tolist() == [3, 3, 15]
    none = np.zeros(0, dtype=np.int64)
    ragged = Rows.of([none, np.array([4, 7]), none, np.array([5]), none])
    assert ragged.follows.tolist() == [False, True, False]
    assert ragged.sums(np.array([1, 2, 3])).tolist() == [0, 3, 0, 3, 0]
    assert (len(Rows.of([])), Rows.of([]).follows.tolist(), Rows.of([]).sums(none).tolist()) == (0, [], [])
