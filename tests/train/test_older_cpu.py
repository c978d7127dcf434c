"""A run on the older kind of CPU: with AVX2, and without units for bfloat16."""

import json
import os
import platform
import re
import sys

import pytest
import torch
from launched import run_launcher

# torch reads them when it is imported
AVX2_ONLY = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
PROGRAM = """
import sys, torch
print(torch.backends.cpu.get_cpu_capability(), flush=True)
from vlm.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the variables are for x86")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "AVX2", reason="this CPU is one: every test runs so")
def test_a_tiny_run_learns_with_the_kernels_of_an_older_cpu(config_file, tmp_path):
    older = {**AVX2_ONLY, "VLM_CACHE_DIR": str(tmp_path / "machine")}
    path = str(config_file(train__precision="auto"))
    done = run_launcher([sys.executable, "-c", PROGRAM, "train", path], os.environ | older)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["AVX2"]
    assert re.search(r"precision: fp32, as .* matrix product \d+x slower", done.stderr), done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.3  # from 5.80 to 5.37
