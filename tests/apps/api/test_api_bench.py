"""The benchmark script runs, and its figure is what the server is for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.slow
def test_eight_chats_at_once_are_faster_than_in_turn():
    command = [sys.executable, "scripts/bench_serve.py", "--new-tokens", "24", "--repeat", "3"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    ratio = re.search(r"ratio: ([\d.]+) \(8 chats", done.stdout)
    assert ratio, done.stdout
    assert float(ratio[1]) > 1.3  # 6 on an idle machine; the worst seen beside six other programs was 2.6
    assert "same replies: 8 of 8" in done.stdout
