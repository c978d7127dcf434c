"""What the scan tokenized is what epochs read."""

import base64
import io
import itertools
import os
import random
import re
import shutil

import numpy as np
import pytest
from fuzz_data import byte_tokenizer, write_source
from PIL import Image
from test_scan import GOOD, reader, write

from vlm.batch import Example
from vlm.data.balance import RowWork
from vlm.data.build import build_conversation_tokenizer, build_data, build_reader
from vlm.data.config import DataConfig, SourceConfig
from vlm.data.examples import ExampleStore, keep, pack_example, unpack_example
from vlm.data.scan import measure, scan_records
from vlm.errors import RecordError

IGNORE = -100


def read_all(reader):
    """Every example, or the rule that its record breaks."""
    found = []
    for number in range(len(reader)):
        try:
            found.append(reader.read(number))
        except RecordError as error:
            found.append(error.rule)
    return found


def forbid_tokenizing(monkeypatch):
    def fit(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr("vlm.data.tokenize.ConversationTokenizer.fit", fit)


def test_placeholders_and_labels_are_kept_as_runs():
    example = Example([5, 9, 9, 9, 6, 7, 8], [IGNORE] * 5 + [7, 8], ("/data/a.png",), "a.jsonl: line 4", ("history",))
    entry = pack_example(3, keep(example, ("a.png",), image_token_id=9))
    header, numbers, text = entry[:28], np.frombuffer(entry[28:60], dtype=np.int32), entry[60:]
    assert len(header) == 28
    assert numbers.tolist() == [5, 6, 7, 8, *(1, 4), *(5, 7)]
    assert text == b'[["a.png"],["history"]] '
    kept = unpack_example(entry, 3, image_token_id=9)
    assert (kept.input_ids, kept.labels) == (example.input_ids, example.labels)
    assert (kept.names, kept.unread) == (("a.png",), ("history",))


def test_an_entry_of_another_record_or_with_a_flipped_bit_is_none():
    example = Example([5, 6, 7], [IGNORE, 6, 7])
    entry = pack_example(3, keep(example, (), image_token_id=None))
    assert unpack_example(entry, 4, None) is None
    for place in range(len(entry)):
        damaged = bytearray(entry)
        damaged[place] ^= 1
        assert unpack_example(bytes(damaged), 3, None) is None
        assert unpack_example(entry[:place], 3, None) is None


@pytest.mark.one_in(5)
@pytest.mark.parametrize("seed", range(20))
def test_any_example_comes_back_as_it_was(seed, tmp_path):
    rng = random.Random(seed)
    store, entries, examples = ExampleStore(tmp_path, 1), [], []
    for number in range(30):
        ids = rng.choices([1, 1, 1, 2, 3, 2**31 - 1], k=rng.choice([1, 2, 30, 3000]))
        labels = [token if rng.random() < 0.5 else IGNORE for token in ids]
        names = tuple(rng.choices(["a b.png", 'ü/\n".jpg', "\udcff.png"], k=rng.randrange(3)))
        examples.append((Example(ids, labels, names, unread=tuple(rng.choices(["x", "y"], k=rng.randrange(2)))), names))
        entries.append(pack_example(number, keep(*examples[-1], 1)))
    places = store.add(entries)
    again = ExampleStore(tmp_path, 1)
    for number, (example, names) in enumerate(examples):
        kept = again.read(int(places[number]), number)
        assert (kept.input_ids, kept.labels, kept.unread) == (example.input_ids, example.labels, example.unread)
        assert kept.names == names


def test_epochs_read_what_was_tokenized_once(records, bpe, spec, tmp_path, monkeypatch):
    path = records(23, longest=4)
    scan = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    tokenized = read_all(reader(path, bpe, spec))
    known = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    forbid_tokenizing(monkeypatch)
    assert read_all(scan.reader) == read_all(known.reader) == tokenized
    assert [len(example.input_ids) for example in tokenized] == scan.lengths.tolist()


@pytest.mark.parametrize("template", ["chatml", "plain", "llama2"])
@pytest.mark.parametrize("over_long", ["cut", "drop"])
def test_wrong_records_too_read_as_they_do_from_text(template, over_long, spec, tmp_path):
    source = SourceConfig(
        path=str(write_source(tmp_path / "fuzz", 3, 30, 150, 10)), images=str(tmp_path / "fuzz/images")
    )
    limits = {"max_length": 400, "max_images": 2, "over_long": over_long}
    config = DataConfig(sources=[source], cache=str(tmp_path / "cache"), template=template, **limits)
    tokenizer = byte_tokenizer()
    chat = build_conversation_tokenizer(config, tokenizer, spec, tokenizer.convert_tokens_to_ids("<image>"))
    fresh = build_reader(config, config.sources, chat)
    scan = scan_records(fresh, tmp_path / "cache")
    tokenized = read_all(fresh)
    assert read_all(scan.reader) == tokenized
    assert np.count_nonzero(scan.reader.places) == sum(isinstance(each, Example) for each in tokenized) > 30


def test_an_embedded_image_is_read_from_its_record(tmp_path, bpe, spec, monkeypatch):
    packed = io.BytesIO()
    Image.new("RGB", (9, 9)).save(packed, "PNG")
    url = "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()
    path = write(tmp_path / "a.jsonl", {"image": url, **GOOD})
    scan = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    tokenized = reader(path, bpe, spec).read(0)
    forbid_tokenizing(monkeypatch)
    assert scan.reader.read(0) == tokenized
    assert isinstance(tokenized.images[0], bytes)


def test_an_image_that_went_missing_since_the_scan_is_named_by_rule(records, bpe, spec, tmp_path):
    path = records(3)
    scan = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    (tmp_path / "1.png").unlink()
    with pytest.raises(RecordError, match=r"records\.jsonl: line 2: .*'1\.png' is no file below"):
        scan.reader.read(1)


def test_a_damaged_entry_is_tokenized_again_and_told_once(tmp_path, bpe, spec, capsys):
    path = write(tmp_path / "a.jsonl", *[GOOD] * 5)
    scan = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    (shard,) = (tmp_path / "cache/lengths").glob("*/*.tokens")
    content = bytearray(shard.read_bytes())
    content[100:] = bytes(len(content) - 100)
    shard.write_bytes(content)
    again = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    assert read_all(again.reader) == read_all(reader(path, bpe, spec)) == read_all(scan.reader)
    assert capsys.readouterr().err.count(f"{shard.name} is damaged") == 2  # by each of the two readers


def test_a_shard_that_is_cut_off_or_gone_is_measured_again(tmp_path, bpe, spec, capsys):
    path = write(tmp_path / "a.jsonl", *[GOOD] * 5)
    scan_records(reader(path, bpe, spec), tmp_path / "cache")
    for damage in (lambda shard: os.truncate(shard, 150), lambda shard: shard.unlink()):
        for shard in (tmp_path / "cache/lengths").glob("*/*.tokens"):
            damage(shard)
        scan = scan_records(reader(path, bpe, spec), tmp_path / "cache")
        assert "missing or cut off; the records are measured again" in capsys.readouterr().err
        assert all(scan.reader.store.read(int(place), n) for n, place in enumerate(scan.reader.places))


def test_a_disk_that_fills_up_costs_time_only(tmp_path, bpe, spec, monkeypatch, capsys):
    monkeypatch.setattr("vlm.data.scan.CHUNK", 2)
    path = write(tmp_path / "a.jsonl", *[GOOD] * 6)
    write_ = os.write
    left = [450]

    def fill(descriptor, content):
        left[0] -= len(content)
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return write_(descriptor, content)

    monkeypatch.setattr("os.write", fill)
    scan = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    assert 0 < np.count_nonzero(scan.reader.places) < 6
    assert capsys.readouterr().err.count("No space left on device); records are tokenized as they are read") == 1
    assert read_all(scan.reader) == read_all(reader(path, bpe, spec))


def test_a_cache_that_goes_while_a_run_reads_costs_time_only(tmp_path, bpe, spec):
    path = write(tmp_path / "a.jsonl", *[GOOD] * 3)
    scan = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    tokenized = read_all(reader(path, bpe, spec))
    shutil.rmtree(tmp_path / "cache")
    assert read_all(scan.reader) == tokenized


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 40, "over_long": "cut"},
        {"template": "llama2"},
        {"system": "Be brief."},
        {"image_placement": "exact"},
    ],
    ids=lambda change: "-".join(change),
)
def test_what_was_kept_under_another_setting_is_not_read(change, records, bpe, spec, tmp_path):
    path = records(12, longest=3)
    before = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    scan = scan_records(reader(path, bpe, spec, **change), tmp_path / "cache")
    assert read_all(scan.reader) == read_all(reader(path, bpe, spec, **change))
    assert read_all(before.reader) == read_all(reader(path, bpe, spec))
    assert len(list((tmp_path / "cache/lengths").iterdir())) == 2


def test_another_vocabulary_or_file_is_tokenized_anew(records, bpe, spec, tmp_path):
    path = records(6)
    scan_records(reader(path, bpe, spec), tmp_path / "cache")
    other = byte_tokenizer()
    assert read_all(scan_records(reader(path, other, spec), tmp_path / "cache").reader) == read_all(
        reader(path, other, spec)
    )
    path.write_text(path.read_text().replace("Answer 3", "Reply 3"))
    scan = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    assert "Reply 3." in bpe.decode(scan.reader.read(3).input_ids)


def test_two_runs_that_scan_at_once_keep_an_example_each_and_read_both(records, bpe, spec, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm.data.scan.CHUNK", 4)
    path, others = records(12), []

    def scan_in_between(one, numbers):
        if not others:
            others.append(None)
            others.append(scan_records(reader(path, bpe, spec), tmp_path / "cache"))
        return measure(one, numbers)

    monkeypatch.setattr("vlm.data.scan.measure", scan_in_between)
    first = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    monkeypatch.undo()
    third = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    assert len(list((tmp_path / "cache/lengths").glob("*/*.tokens"))) == 2
    tokenized = read_all(reader(path, bpe, spec))
    forbid_tokenizing(monkeypatch)
    assert [read_all(scan.reader) for scan in (first, others[1], third)] == [tokenized] * 3


def test_a_scan_that_goes_on_reads_what_was_kept_before(records, bpe, spec, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm.data.scan.CHUNK", 4)
    monkeypatch.setattr("vlm.data.scan.STORE_SECONDS", 0.0)
    path, done = records(12), []

    def stop_at_the_third_chunk(one, numbers):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(numbers.tolist())
        return measure(one, numbers)

    monkeypatch.setattr("vlm.data.scan.measure", stop_at_the_third_chunk)
    with pytest.raises(KeyboardInterrupt):
        scan_records(reader(path, bpe, spec), tmp_path / "cache")
    monkeypatch.undo()
    scan = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    tokenized = read_all(reader(path, bpe, spec))
    forbid_tokenizing(monkeypatch)
    assert read_all(scan.reader) == tokenized


@pytest.mark.parametrize("rank", [0, 1])
def test_shared_images_and_rows_dealt_by_work_are_read_as_kept(rank, records, bpe, spec, tmp_path, monkeypatch):
    path = records(30)
    path.write_text(re.sub(r'"image": "\d+\.png"', '"image": "1.png"', path.read_text()))

    def batches():
        config = DataConfig(sources=[SourceConfig(path=str(path))], cache=str(tmp_path / "cache"), max_length=96)
        data = build_data(
            config, bpe, spec, bpe.convert_tokens_to_ids("<image>"), seed=3, global_batch_size=4, micro_batch_size=1,
            data_rank=rank, num_data_ranks=2, may_share=True, work=RowWork(10, 1, 500, 3),
        )  # fmt: skip
        assert data.train.order.num_shared(0)[0] > 5
        steps = itertools.islice(data.train.iterate(), data.train.steps_in(2))
        return [(batch.input_ids.tolist(), batch.labels.tolist(), batch.where) for step in steps for batch in step]

    with monkeypatch.context() as from_text:
        from_text.setattr("vlm.data.examples.ExampleStore.read", lambda *_: None)
        tokenized = batches()
    forbid_tokenizing(monkeypatch)
    assert batches() == tokenized


def test_nothing_is_written_where_all_that_is_left_is_skipped_again(tmp_path, bpe, spec):
    path = write(tmp_path / "a.jsonl", GOOD, {"image": "gone.png", **GOOD})
    scan_records(reader(path, bpe, spec), tmp_path / "cache")
    (table,) = (tmp_path / "cache/lengths").glob("*/table.npy")
    inode = table.stat().st_ino
    assert len(scan_records(reader(path, bpe, spec), tmp_path / "cache").skips) == 1
    assert table.stat().st_ino == inode


@pytest.mark.thorough
@pytest.mark.slow  # two processes that import torch
def test_each_scanning_process_writes_a_shard_of_its_own(records, bpe, spec, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm.data.scan.CHUNK", 4)
    path = records(32)
    scan = scan_records(reader(path, bpe, spec), tmp_path / "cache", workers=2)
    assert read_all(scan.reader) == read_all(reader(path, bpe, spec))
    assert {shard.stat().st_size > 8 for shard in (tmp_path / "cache/lengths").glob("*/*.tokens")} == {True}
