import json
import multiprocessing
import time
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest

from vlm.data.build import build_conversation_tokenizer, build_reader
from vlm.data.config import DataConfig, SourceConfig
from vlm.data.scan import _keep, measure, refuse_too_many, scan_records, usable_workers
from vlm.errors import DataError


def reader(path, tokenizer, spec, **settings):
    config = DataConfig(sources=[SourceConfig(path=str(path))], cache=str(path.parent / "cache"), **settings)
    chat = build_conversation_tokenizer(config, tokenizer, spec, tokenizer.convert_tokens_to_ids("<image>"))
    return build_reader(config, config.sources, chat)


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


GOOD = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]}
MUTE = {"conversations": [{"from": "human", "value": "Hi"}]}


def test_every_record_is_measured_and_bad_ones_are_named_with_their_rule(tmp_path, bpe, spec):
    path = write(tmp_path / "a.jsonl", GOOD, MUTE, {"image": "gone.png", **GOOD}, {"what": 1})
    scan = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    assert scan.lengths.tolist()[1:] == [0, 0, 0]
    assert scan.lengths[0] > 0
    assert scan.num_supervised.tolist()[0] == len(bpe("Yes.").input_ids) + 1
    assert [(skip.rule, skip.where) for skip in scan.skips] == [
        ("no_supervised_tokens", "a.jsonl: line 2"),
        ("image_missing", "a.jsonl: line 3"),
        ("unknown_format", "a.jsonl: line 4"),
    ]


def test_a_second_scan_comes_from_the_cache_and_looks_again_at_the_bad_ones(tmp_path, bpe, spec, monkeypatch):
    path = write(tmp_path / "a.jsonl", GOOD, {"image": "late.png", **GOOD})
    first = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    assert [skip.rule for skip in first.skips] == ["image_missing"]
    from PIL import Image

    Image.new("RGB", (9, 9)).save(tmp_path / "late.png")
    looked = []
    monkeypatch.setattr(
        "vlm.data.scan.measure", lambda reader, numbers: looked.append(numbers.tolist()) or measure(reader, numbers)
    )
    second = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    assert looked == [[1]]
    assert second.skips == []
    assert second.lengths[1] > 0


def test_another_template_is_another_scan(tmp_path, bpe, spec):
    path = write(tmp_path / "a.jsonl", GOOD)
    chatml = scan_records(reader(path, bpe, spec), tmp_path / "cache").lengths[0]
    plain = scan_records(reader(path, bpe, spec, template="plain"), tmp_path / "cache").lengths[0]
    assert chatml > plain


@pytest.mark.slow  # two processes that import torch
def test_scanning_processes_find_the_same(records, bpe, spec, monkeypatch):
    monkeypatch.setattr("vlm.data.scan.CHUNK", 5)
    path = records(23)
    alone = scan_records(reader(path, bpe, spec), None)
    helped = scan_records(reader(path, bpe, spec), None, workers=2)
    assert np.array_equal(alone.lengths, helped.lengths)
    assert alone.digest() == helped.digest()


def test_nothing_supervised_anywhere_stops_with_a_record_as_it_was_read(tmp_path, bpe, spec):
    path = write(tmp_path / "a.jsonl", MUTE, MUTE)
    with pytest.raises(DataError, match=r"0 of 2 samples have supervised tokens.*<\|im_start\|>user\\nHi"):
        scan_records(reader(path, bpe, spec), None)


def test_too_many_bad_records_are_refused_by_share_with_counts_by_rule(tmp_path, bpe, spec):
    path = write(tmp_path / "a.jsonl", *[GOOD] * 190, *[{"image": "no.png", **GOOD}] * 10)
    scan = scan_records(reader(path, bpe, spec), None)
    refuse_too_many(scan, 0.06)
    with pytest.raises(DataError, match=r"10 of 200 records skipped \(image_missing 10\), e\.g\. a\.jsonl: line 191"):
        refuse_too_many(scan, 0.04)


def test_a_few_records_are_held_to_the_share_too(tmp_path, bpe, spec):
    path = write(tmp_path / "a.jsonl", *[GOOD] * 9, MUTE)
    scan = scan_records(reader(path, bpe, spec), None)
    refuse_too_many(scan, 0.1)
    with pytest.raises(DataError, match=r"1 of 10 records skipped \(no_supervised_tokens 1\)"):
        refuse_too_many(scan, 0.09)


def test_an_interrupted_scan_goes_on_where_it_last_wrote(tmp_path, bpe, spec, monkeypatch):
    monkeypatch.setattr("vlm.data.scan.CHUNK", 2)
    monkeypatch.setattr("vlm.data.scan.STORE_SECONDS", 0.0)
    path = write(tmp_path / "a.jsonl", *[GOOD] * 7)
    looked = []

    def stop_at_the_third_chunk(reader, numbers):
        looked.append(numbers.tolist())
        if len(looked) == 3:
            raise KeyboardInterrupt
        return measure(reader, numbers)

    monkeypatch.setattr("vlm.data.scan.measure", stop_at_the_third_chunk)
    with pytest.raises(KeyboardInterrupt):
        scan_records(reader(path, bpe, spec), tmp_path / "cache")
    scan = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    assert looked == [[0, 1], [2, 3], [4, 5], [4, 5], [6]]
    assert np.array_equal(scan.lengths, scan_records(reader(path, bpe, spec), None).lengths)


def test_nothing_supervised_is_said_although_some_records_are_broken_otherwise(tmp_path, bpe, spec):
    path = write(tmp_path / "a.jsonl", {"what": 1}, MUTE, MUTE, {"image": "gone.png", **GOOD})
    message = (
        r"0 of 4 samples have supervised tokens \(no_supervised_tokens 2, .*a\.jsonl: line 2 is '<\|im_start\|>user"
    )
    with pytest.raises(DataError, match=message):
        scan_records(reader(path, bpe, spec), None)


def test_all_records_broken_names_the_rule_and_what_usually_helps(tmp_path, bpe, spec):
    path = write(tmp_path / "a.jsonl", *[{"image": "gone.png", **GOOD}] * 5)
    scan = scan_records(reader(path, bpe, spec), None)
    with pytest.raises(DataError, match=r"5 of 5 .*line 1: .*; .*line 2: .*; .*line 3: [^;]*images: names the wrong"):
        refuse_too_many(scan, 1.0)


def test_a_cause_is_named_where_it_is_that_of_most_only(tmp_path, bpe, spec):
    path = write(tmp_path / "a.jsonl", {"image": "gone.png", **GOOD}, {"conversations": 5})
    with pytest.raises(DataError, match="2 of 2 records skipped") as caught:
        refuse_too_many(scan_records(reader(path, bpe, spec), None), 1.0)
    assert "images: names the wrong" not in str(caught.value)


def test_no_more_processes_than_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 5, 7})
    assert [usable_workers(number) for number in (0, 2, 3, 64)] == [0, 2, 3, 3]


def test_a_changed_file_is_scanned_again(tmp_path, bpe, spec):
    path = write(tmp_path / "a.jsonl", GOOD)
    before = scan_records(reader(path, bpe, spec), tmp_path / "cache").lengths[0]
    write(path, {"conversations": [*GOOD["conversations"][:1], {"from": "gpt", "value": "Yes. Yes."}]})
    assert scan_records(reader(path, bpe, spec), tmp_path / "cache").lengths[0] > before


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, bpe, spec, capsys):
    path = write(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/lengths").write_text("a file where a folder should be")
    assert scan_records(reader(path, bpe, spec), tmp_path / "cache").lengths[0] > 0
    assert "cannot write" in capsys.readouterr().err


def test_a_damaged_table_in_the_cache_is_measured_again(tmp_path, bpe, spec):
    path = write(tmp_path / "a.jsonl", GOOD, GOOD)
    whole = scan_records(reader(path, bpe, spec), tmp_path / "cache")
    (table,) = (tmp_path / "cache/lengths").glob("*/table.npy")
    content = table.read_bytes()
    for damaged in (b"", content[:50], content[:-30], content[:150] + b"\xff" + content[151:], b"no table at all"):
        table.write_bytes(damaged)
        again = scan_records(reader(path, bpe, spec), tmp_path / "cache")
        assert np.array_equal(again.lengths, whole.lengths)


def test_a_process_that_dies_unasked_for_costs_time_only(tmp_path, bpe, spec, monkeypatch, capsys):
    def die_after_one(reader, work, chunks, count):
        yield work(reader, chunks[0])
        raise BrokenProcessPool

    for name, value in (("CHUNK", 2), ("MANY", 8), ("_in_processes", die_after_one), ("usable_workers", lambda n: 2)):
        monkeypatch.setattr(f"vlm.data.scan.{name}", value)
    path = write(tmp_path / "a.jsonl", *[GOOD] * 9)
    scan = scan_records(reader(path, bpe, spec), None)
    assert (np.count_nonzero(scan.lengths), len(scan)) == (9, 9)
    assert "the records are read in one process" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"Lower data\.workers \(now 2\)"):
        scan_records(reader(path, bpe, spec), None, workers=2)


def _help(pipe):
    _keep(None, None)
    pipe.send("here")
    time.sleep(120)


def _run(pipe):
    multiprocessing.get_context("spawn").Process(target=_help, args=(pipe,)).start()
    time.sleep(120)


@pytest.mark.slow  # two processes that import torch
def test_scanning_processes_end_with_a_run_that_is_killed():
    ours, theirs = multiprocessing.Pipe()
    run = multiprocessing.get_context("spawn").Process(target=_run, args=(theirs,))
    run.start()
    theirs.close()
    assert ours.recv() == "here"
    run.kill()
    assert ours.poll(60)
    with pytest.raises(EOFError):  # no process is left that could send anything
        ours.recv()
