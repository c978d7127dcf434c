"""The benchmark script runs, and chats that are answered together get the replies that each gets alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.thorough
@pytest.mark.slow
def test_eight_chats_at_once_get_the_replies_of_each_in_turn():
    command = [sys.executable, "scripts/bench_serve.py", "--new-tokens", "8", "--repeat", "1"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    ratio = re.search(r"ratio: ([\d.]+) \(8 chats", done.stdout)
    assert ratio, done.stdout
    assert "same replies: 8 of 8" in done.stdout
