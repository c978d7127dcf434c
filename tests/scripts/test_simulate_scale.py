"""scripts/simulate_scale.py on a sample of its records."""

from __future__ import annotations

import numpy as np
from simulate_scale import Records, made_up_records, pack, waits

from vlm.data.balance import RowWork

WORK = RowWork(token=30, pair=0, image=350 * 20, supervised=2)  # an image costs as much as 230 tokens


def test_rows_dealt_by_work_wait_less_than_2_percent_at_8_rows_per_rank_on_every_kind_of_data():
    for records in made_up_records(tokens_per_image=144, count=20_000):
        in_order, dealt, everywhere_in_order, everywhere = waits(WORK, pack(records), ranks=32, rows=8)
        assert dealt < 0.02, records.name
        assert dealt < in_order / 2, records.name
        assert everywhere < everywhere_in_order, records.name


def test_rows_hold_what_their_records_hold():
    ones = np.ones(10, dtype=np.int64)
    sizes = pack(Records("alike", 100 * ones, ones, 5 * ones, max_length=500))
    assert (sizes.tokens.tolist(), sizes.images.tolist()) == ([500, 500], [5, 5])
    assert (sizes.pairs.tolist(), sizes.supervised.tolist()) == ([25_000, 25_000], [25, 25])
    assert waits(WORK, sizes, ranks=8, rows=2) is None  # not three steps
