import json

import pytest

from vlm.batch import Skip
from vlm.data.skips import SkipLog
from vlm.errors import DataError

BAD = Skip("image_missing", "a.json: record 7", "image 'x.png' does not exist")


def test_skips_are_listed_and_counted_by_rule(tmp_path):
    log = SkipLog(tmp_path / "skipped.jsonl", max_share=0.5, max_in_a_row=10)
    log.add([BAD, BAD._replace(rule="over_long")], num_seen=8)
    log.add([], num_seen=8)
    assert dict(log.by_rule) == {"image_missing": 1, "over_long": 1}
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 0, "rule": "image_missing", "where": "a.json: record 7", "message": BAD.message}


def test_too_large_a_share_stops_the_run_but_not_in_its_first_records():
    log = SkipLog(None, max_share=0.05, max_in_a_row=1000)
    log.add([BAD] * 9, num_seen=100)  # too few records to tell
    log.add([], num_seen=100)  # 9 of 200: within 5 %
    with pytest.raises(DataError, match="11 of 210 records skipped") as caught:
        log.add([BAD] * 2, num_seen=10)
    assert caught.value.exit_code == 3


def test_many_in_a_row_stop_the_run_and_a_good_one_between_starts_the_count_again():
    log = SkipLog(None, max_share=1.0, max_in_a_row=5)
    log.add([BAD] * 4, num_seen=4)
    log.add([], num_seen=1)
    log.add([BAD] * 4, num_seen=4)
    with pytest.raises(DataError, match="image_missing 9"):
        log.add([BAD], num_seen=1)


def test_what_the_scan_found_is_listed_but_not_held_against_the_run(tmp_path):
    log = SkipLog(tmp_path / "skipped.jsonl", max_share=0.0, max_in_a_row=1)
    log.list_found([BAD] * 300)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 300
    assert (log.num_seen, log.num_skipped) == (0, 0)
