"""`data.balance` in runs: whom it concerns, and that a run goes on as it began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vlm.config import load_config
from vlm.prepare import _row_work as row_work_of
from vlm.prepare import prepare_run
from vlm.run import defaults_of, run_identity
from vlm.settle import FIRST_WITH_BALANCE, settle_precision
from vlm.train.engines.kind import Place


def test_a_run_that_began_without_it_goes_on_without_it(config_file: Any):
    config = load_config(config_file())
    began = {key: value for key, value in run_identity(config).items() if key != FIRST_WITH_BALANCE}
    older = settle_precision(config, torch.device("cpu"), began)
    assert not older.data.balance
    assert older.data.share_images  # which it had
    assert defaults_of(config)[FIRST_WITH_BALANCE] == run_identity(older)[FIRST_WITH_BALANCE]
    assert settle_precision(config, torch.device("cpu"), run_identity(config)).data.balance


@pytest.mark.parametrize(("place", "balance"), [(Place(0, 1), True), (Place(0, 2), False)])
def test_one_data_rank_and_balance_off_take_rows_in_their_order(config_file: Any, place: Place, balance: bool):
    assert row_work_of(load_config(config_file(data__balance=balance)), place) is None


def test_several_data_ranks_know_what_a_row_costs(config_file: Any):
    work = row_work_of(load_config(config_file()), Place(1, 2))
    assert work is not None
    assert min(work.token, work.supervised) > 0


@pytest.mark.slow
def test_a_prepared_run_of_one_process_has_no_work(config_file: Any, tmp_path: Path):
    assert prepare_run(load_config(config_file()), torch.device("cpu")).data.train.work is None
