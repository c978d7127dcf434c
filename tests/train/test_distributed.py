"""Decisions that all processes of a launch take together, with processes of their own."""

import os
import re
import sys
import time

import pytest
import torch
from warm import run_warm

from vlm.distributed import gather_objects, main_first, on_main, process_group, rank
from vlm.errors import DataError, DistributedError

TIMEOUT = 4.0  # seconds that a collective may take


def decide():
    """What each process says, it says in one piece: both write at once."""
    with process_group(torch.device("cpu"), TIMEOUT):

        def slow():
            time.sleep(TIMEOUT + 2)
            return f"from {rank()}"

        sys.stdout.write(f"{rank()} {on_main(slow)}\n")
        with main_first():
            if rank() == 0:
                time.sleep(TIMEOUT + 1)
            order = time.monotonic()
        times = gather_objects(order)
        assert times[0] < times[1]

        def fail():
            raise DataError("no such file")

        try:
            on_main(fail)
        except DataError as error:
            sys.stdout.write(f"{rank()} caught {error} {error.everywhere}\n")


@pytest.mark.thorough
@pytest.mark.slow
def test_others_wait_for_rank_0_longer_than_for_a_rank_that_hangs():
    started = time.monotonic()
    code, output = run_warm(decide, nproc=2)
    assert code == 0, output[-3000:]
    assert time.monotonic() - started > 2 * TIMEOUT + 3
    said = sorted(re.findall(r"^[01] .*", output, re.MULTILINE))
    assert said == ["0 caught no such file True", "0 from 0", "1 caught no such file True", "1 from 0"]


def wait_in_a_group_of_deepspeed():
    from vlm.train.engines.zero import start_deepspeed

    try:
        with process_group(torch.device("cpu"), TIMEOUT):
            group = start_deepspeed(torch.device("cpu")).comm.new_group([0, 1])
            if rank() == 1:
                time.sleep(TIMEOUT + 8)
            started = time.monotonic()
            torch.distributed.all_reduce(torch.ones(1), group=group)
    except DistributedError:
        if os.environ["RANK"] == "0":
            sys.stdout.write(f"gave up after {time.monotonic() - started:.1f} s\n")


@pytest.mark.thorough
@pytest.mark.slow
def test_a_group_that_deepspeed_makes_waits_no_longer_than_the_others():
    """Without that, rank 0 would wait until the other comes, and both would end well."""
    _, output = run_warm(wait_in_a_group_of_deepspeed, nproc=2)
    seconds = re.search(r"gave up after ([\d.]+) s", output)
    assert seconds, output[-3000:]
    assert TIMEOUT - 1 < float(seconds[1]) < TIMEOUT + 7
