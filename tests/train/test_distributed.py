"""Decisions that all processes of a launch take together, with processes of their own."""

import re
import sys
import time

import pytest
from launched import run_launcher

WORKER = """
import sys, time
import torch
from vlm import distributed
from vlm.distributed import gather_objects, main_first, note, on_main, process_group, rank
from vlm.errors import DataError

with process_group(torch.device("cpu"), 3):
    def slow():
        time.sleep(5)  # longer than a collective may take
        return "from " + str(rank())
    sys.stdout.write(f"{rank()} {on_main(slow)}\\n")  # in one piece: both ranks write into one pipe
    order = []
    with main_first():
        if rank() == 0:
            time.sleep(4)
        order = time.monotonic()
    times = gather_objects(order)
    assert times[0] < times[1]
    try:
        on_main(lambda: (_ for _ in ()).throw(DataError("no such file")))
    except DataError as error:
        sys.stdout.write(f"{rank()} caught {error} {error.everywhere}\\n")
"""


@pytest.mark.slow
def test_others_wait_for_rank_0_longer_than_for_a_rank_that_hangs(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    started = time.monotonic()
    done = run_launcher([*command, str(tmp_path / "worker.py")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert time.monotonic() - started > 9
    said = sorted(done.stdout.splitlines())
    assert said == [
        "0 caught no such file True", "0 from 0", "1 caught no such file True", "1 from 0",
    ]  # fmt: skip


GROUP_WORKER = """
import os, sys, time
import torch
from vlm.distributed import process_group, rank
from vlm.errors import DistributedError
from vlm.train.engines.zero import start_deepspeed

try:
    with process_group(torch.device("cpu"), 5):
        group = start_deepspeed(torch.device("cpu")).comm.new_group([0, 1])
        if rank() == 1:
            time.sleep(12)
        started = time.monotonic()
        torch.distributed.all_reduce(torch.ones(1), group=group)
except DistributedError:
    if os.environ["RANK"] == "0":
        sys.stdout.write(f"gave up after {time.monotonic() - started:.0f} s")
"""


@pytest.mark.slow
def test_a_group_that_deepspeed_makes_waits_no_longer_than_the_others(tmp_path):
    (tmp_path / "worker.py").write_text(GROUP_WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run_launcher([*command, str(tmp_path / "worker.py")])
    assert re.search("gave up after [4-8] s", done.stdout), done.stdout + done.stderr[-3000:]
