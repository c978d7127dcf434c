"""The cache of encoder features: what is written by whom, what is read again, and what is lost."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm.data import eviction
from vlm.data.features import FeatureStore
from vlm.data.shards import DATA, ENTRY, INDEX, DigestTable, ShardWriter, halves, read_records, strike_out
from vlm.errors import DataError

FORK = multiprocessing.get_context("fork")


def features_of(number: int, tiles: int = 1) -> torch.Tensor:
    return torch.full((tiles, 2, 3), float(number))


def only(folder: Path, suffix: str) -> Path:
    (path,) = folder.rglob(f"*{suffix}")
    return path


def write_some(folder: Path, first: int, count: int) -> None:
    store = FeatureStore(folder, "encoder", torch.float32, shard_bytes=2000)
    for number in range(first, first + count):
        store.put(str(number).encode(), features_of(number))


# --- what is put in comes out


def test_an_image_is_found_by_its_content(tmp_path):
    store = FeatureStore(tmp_path / "cache", "encoder")
    image = tmp_path / "a.png"
    image.write_bytes(b"first")
    store.put(str(image), torch.ones(1, 2, 3))
    assert torch.equal(store.get(str(image)), torch.ones(1, 2, 3))
    image.write_bytes(b"second")
    assert store.get(str(image)) is None
    image.write_bytes(b"first")
    assert store.has(str(image))
    (tmp_path / "copy.png").write_bytes(b"first")
    assert store.has(str(tmp_path / "copy.png"))
    assert store.get(b"first") is not None
    assert FeatureStore(tmp_path / "cache", "another").get(str(image)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_of_several_tiles_come_back_to_the_bit(tmp_path, dtype):
    some = {f"{n}".encode(): torch.randn(n, 5, 7, generator=torch.Generator().manual_seed(n)) for n in (1, 4, 3)}
    store = FeatureStore(tmp_path, "encoder", dtype)
    for image, features in some.items():
        store.put(image, features)
    for reader in (store, FeatureStore(tmp_path, "encoder", dtype), pickle.loads(pickle.dumps(store))):
        for image, features in some.items():
            assert torch.equal(reader.get(image), features.to(dtype))


def test_a_thousand_entries_by_three_processes_at_once_are_all_there(tmp_path):
    writers = [FORK.Process(target=write_some, args=(tmp_path, first, 334)) for first in (0, 333, 666)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    store = FeatureStore(tmp_path, "encoder", torch.float32)
    assert all(torch.equal(store.get(str(number).encode()), features_of(number)) for number in range(1000))
    assert store.get(b"1000") is None
    assert len(list(tmp_path.rglob(f"*{DATA}"))) > 3 * 10  # 24 bytes each, from a multiple of 64 on: 32 in 2,000 bytes
    assert store.describe().startswith("1,000 images, 0.0 GB in ")


def test_a_reader_sees_what_others_write_after_it_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm.data.features._REFRESH_SECONDS", 0.0)
    reader, writer = (FeatureStore(tmp_path, "encoder") for _ in range(2))
    assert not reader.has(b"a")
    for number in range(3):
        writer.put(b"%d" % number, features_of(number))
        assert reader.get(b"%d" % number)[0, 0, 0] == number


def test_a_forked_process_writes_shards_of_its_own(tmp_path):
    store = FeatureStore(tmp_path, "encoder")
    store.put(b"parent", features_of(1))
    child = FORK.Process(target=store.put, args=(b"child", features_of(2)))
    child.start()
    child.join(30)
    store.put(b"parent again", features_of(3))
    fresh = FeatureStore(tmp_path, "encoder")
    assert [fresh.get(name)[0, 0, 0] for name in (b"parent", b"child", b"parent again")] == [1, 2, 3]
    assert len(list(tmp_path.rglob(f"*{DATA}"))) == 2


def test_many_shards_are_read_without_a_file_kept_open(tmp_path):
    write_some(tmp_path, 0, 400)
    store = FeatureStore(tmp_path, "encoder", torch.float32)
    store.has(b"0")
    before = len(os.listdir("/proc/self/fd"))
    assert all(store.get(str(number).encode()) is not None for number in range(400))
    assert len(os.listdir("/proc/self/fd")) == before


# --- what is lost, and what is noticed


@pytest.mark.slow
def test_a_writer_killed_in_the_middle_loses_at_most_the_entry_that_it_writes(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from vlm.data.features import FeatureStore\n"
        "store = FeatureStore(Path(sys.argv[1]), 'encoder', torch.float32, shard_bytes=5000)\n"
        "for number in range(10**9):\n"
        "    store.put(str(number).encode(), torch.full((1, 2, 3), float(number)))\n"
        "    print(number, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as writer:
        for line in writer.stdout:
            if int(line) == 300:
                writer.send_signal(signal.SIGKILL)
                break
        said = [int(line) for line in writer.stdout.read().split("\n")[:-1]]
    last = max([300, *said])
    store = FeatureStore(tmp_path, "encoder", torch.float32)
    assert all(torch.equal(store.get(str(number).encode()), features_of(number)) for number in range(last + 1))
    assert store.get(str(last + 2).encode()) is None


@pytest.mark.parametrize("torn", [1, 47])
def test_half_a_record_at_the_end_is_passed_over(tmp_path, torn):
    write_some(tmp_path, 0, 3)
    index = only(tmp_path, INDEX)
    os.truncate(index, 2 * ENTRY.itemsize + torn)
    store = FeatureStore(tmp_path, "encoder", torch.float32)
    assert [store.has(b"%d" % number) for number in range(3)] == [True, True, False]
    store.put(b"2", features_of(2))
    assert torch.equal(FeatureStore(tmp_path, "encoder", torch.float32).get(b"2"), features_of(2))


def test_bytes_that_are_lost_at_the_end_are_noticed_before_training(tmp_path):
    write_some(tmp_path, 0, 3)
    os.truncate(only(tmp_path, DATA), 130)  # the third entry begins at 128
    store = FeatureStore(tmp_path, "encoder", torch.float32)
    assert [store.has(b"%d" % number) for number in range(3)] == [True, True, False]
    assert store.get(b"2") is None


def test_one_changed_byte_is_noticed_told_and_made_good(tmp_path, capsys):
    write_some(tmp_path, 0, 3)
    data = only(tmp_path, DATA)
    content = bytearray(data.read_bytes())
    content[64 + 5] ^= 1  # in the second entry
    data.write_bytes(content)
    readers = [FeatureStore(tmp_path, "encoder", torch.float32) for _ in range(2)]
    for reader in readers:
        assert [reader.get(b"%d" % number) is not None for number in range(3)] == [True, False, True]
    assert "the features of an image are damaged" in capsys.readouterr().err
    store = FeatureStore(tmp_path, "encoder", torch.float32)
    assert not store.has(b"1")  # struck out by the one that read it, and not put back by the other
    store.put(b"1", features_of(1))
    assert torch.equal(FeatureStore(tmp_path, "encoder", torch.float32).get(b"1"), features_of(1))


@pytest.mark.parametrize("byte", range(ENTRY.itemsize))
def test_any_changed_byte_of_a_record_makes_the_entry_absent(tmp_path, byte):
    writer = ShardWriter(tmp_path)
    for number in range(2):
        writer.append(bytes([number] * 16), (1, 2, 3), 0, memoryview(b"x" * 24))
    index = only(tmp_path, INDEX)
    content = bytearray(index.read_bytes())
    content[byte] ^= 0x40
    index.write_bytes(content)
    records, places, count = read_records(index, ENTRY)
    assert (len(records), places.tolist(), count) == (1, [1], 2)


def test_a_record_is_struck_out_however_often(tmp_path):
    entry = ShardWriter(tmp_path).append(bytes(16), (1, 1, 1), 0, memoryview(b"abcd"))
    for _ in range(3):
        strike_out(entry.shard, entry.place, int(entry.record["check"][0]))
        assert len(read_records(Path(entry.shard + INDEX), ENTRY)[0]) == 0


def test_a_full_disk_costs_the_entry_and_nothing_before_it(tmp_path, monkeypatch):
    store = FeatureStore(tmp_path, "encoder", torch.float32)
    store.put(b"0", features_of(0))

    def half(file, content):
        file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vlm.data.shards.write_all", half)
        with pytest.raises(OSError, match="No space"):
            store.put(b"1", features_of(1))
    store.put(b"2", features_of(2))
    fresh = FeatureStore(tmp_path, "encoder", torch.float32)
    assert [fresh.has(b"%d" % number) for number in range(3)] == [True, False, True]
    assert torch.equal(fresh.get(b"2"), features_of(2))


# --- files are not read again


def test_a_file_whose_content_is_known_is_not_read_again(tmp_path, monkeypatch):
    image = tmp_path / "a.png"
    image.write_bytes(b"first")
    FeatureStore(tmp_path / "cache", "encoder").put(str(image), features_of(1))
    monkeypatch.setattr("vlm.data.file_digests._file_digest", lambda path: pytest.fail("read again"))
    assert FeatureStore(tmp_path / "cache", "encoder").has(str(image))
    assert FeatureStore(tmp_path / "cache", "another").has(str(image)) is False


def test_digests_that_cannot_be_kept_are_said_once(tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/names").write_text("a file, where a folder should be")
    store = FeatureStore(tmp_path / "cache", "encoder")
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
        store.put(str(tmp_path / name), features_of(1))
        assert store.has(str(tmp_path / name))
    assert capsys.readouterr().err.count("images are hashed again next time") == 1


# --- the bound


def fill(folder: Path, key: str, count: int, limit: int) -> FeatureStore:
    """Entries of 1,024 bytes."""
    store = FeatureStore(folder, key, torch.float32, limit_bytes=limit)
    for number in range(count):
        store.put(b"%d" % number, torch.full((1, 16, 16), float(number)))
    return store


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (DATA, INDEX))


def test_the_cache_stays_below_its_bound_and_what_was_not_used_for_longest_goes(tmp_path):
    for hours, key in enumerate(["new", "old"]):
        run = FORK.Process(target=fill, args=(tmp_path, key, 40, 100_000))
        run.start()
        run.join(30)
        for path in (tmp_path / key).glob(f"*{DATA}"):
            os.utime(path, (time.time() - 3600 * hours - 60,) * 2)
    assert len(list((tmp_path / "old").glob(f"*{DATA}"))) == 6  # a sixteenth of the bound each
    fill(tmp_path, "mine", 30, 100_000)
    assert size_of(tmp_path) <= 100_000
    reader = FeatureStore(tmp_path, "mine", torch.float32)
    assert all(reader.get(b"%d" % number)[0, 0, 0] == number for number in range(30))
    assert len(list((tmp_path / "new").glob(f"*{DATA}"))) == 6
    assert 0 < len(list((tmp_path / "old").glob(f"*{DATA}"))) < 6


def test_what_a_running_process_uses_is_not_removed(tmp_path):
    other = fill(tmp_path, "other", 40, 60_000)
    with pytest.raises(DataError, match=r"data\.cache_size_gb: the cache in .* is full at 0\.0 GB, all of it in use"):
        fill(tmp_path, "mine", 40, 60_000)
    assert size_of(tmp_path) <= 60_000
    assert all(other.get(b"%d" % number) is not None for number in range(40))


def test_a_shard_that_was_not_used_for_an_hour_goes_even_if_its_encoder_is_in_use(tmp_path):
    other = fill(tmp_path, "other", 40, 60_000)
    first = sorted(other.path.glob(f"*{DATA}"))[:5]
    for path in first:
        os.utime(path, (time.time() - eviction.IN_USE_SECONDS - 1,) * 2)
    fill(tmp_path, "mine", 20, 60_000)
    assert not any(path.exists() for path in first[:2])
    fresh = FeatureStore(tmp_path, "other", torch.float32)
    assert fresh.get(b"0") is None  # absent, and no error
    assert other.get(b"39") is not None


def test_several_writers_keep_the_bound_together(tmp_path):
    writers = [FORK.Process(target=fill, args=(tmp_path, f"encoder {n}", 250, 500_000)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert 400_000 < size_of(tmp_path) <= 500_000  # what one that has ended had may be removed


# --- the table


def test_a_table_finds_rows_that_share_half_a_digest(monkeypatch):
    table = DigestTable(ENTRY)
    rng = np.random.default_rng(0)
    rows = np.zeros(10_000, ENTRY)
    rows["high"], rows["low"] = rng.integers(0, 100, 10_000), np.arange(10_000)
    for start in range(0, 10_000, 700):
        table.add(rows[start : start + 700])
    for number in (0, 1, 6999, 7000, 9999):
        digest = int(rows["high"][number]).to_bytes(8, "little") + number.to_bytes(8, "little")
        assert table.find(digest) == [number]
    assert table.find(bytes([255] * 16)) == []
    assert halves(bytes(range(16))) == (0x0706050403020100, 0x0F0E0D0C0B0A0908)
