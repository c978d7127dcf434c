"""The real lmms-eval, in an environment of its own, offline, on an export of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from environments import make_environment

ROOT = Path(__file__).parents[2]
# 0.6.1 compares continuations, on which 0.7.3 fails by itself; all else that it asks for is this environment's
PACKAGES = (
    "lmms-eval==0.6.1", "aiohappyeyeballs==2.7.1", "aiohttp==3.14.5", "aiosignal==1.4.0", "attrs==26.1.0",
    "chardet==7.7.0", "dataproperty==1.1.1", "datasets==5.2.0", "decord==0.6.0", "dill==0.4.1", "einops==0.8.2",
    "evaluate==0.4.6", "filelock==3.32.7", "frozenlist==1.8.0", "hf_transfer==0.1.9", "jsonlines==4.0.0",
    "latex2sympy2==1.9.1", "loguru==0.7.3", "mbstrdecoder==1.1.5", "multidict==7.2.1", "multiprocess==0.70.19",
    "numexpr==2.14.2", "openpyxl==3.1.5", "pandas==3.1.1", "pathvalidate==3.3.1", "propcache==0.5.4",
    "pyarrow==26.0.1", "pytablewriter==1.2.1", "python-dateutil==4.0.0", "python-dotenv==1.2.4", "pytz==2026.6",
    "six==1.17.0", "sympy==1.14.0", "tabledata==1.3.5", "tcolorpy==0.1.7", "tenacity==9.2.1",
    "tqdm-multiprocess==0.0.11", "typepy==2.0.0", "tzdata==2026.6", "xxhash==4.1.0", "yarl==1.25.1", "zss==1.2.0",
)  # fmt: skip


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_gets_our_figures_of_written_and_of_chosen_answers(seeing: Path, tmp_path: Path):
    """48 answers written, 16 chosen among eight by their log-likelihoods: all right, in both."""
    behind = [str(ROOT), str(Path(torch.__file__).parents[1])]
    python = make_environment(tmp_path / "lmms", PACKAGES, behind=behind)
    (site,) = (tmp_path / "lmms/lib").glob("python*/site-packages")
    # it imports torchvision before anything of ours
    (site / "zzz_prepare.pth").write_text("import vlm.compat; vlm.compat.prepare()\n")
    records = [json.loads(line) for line in (seeing / "test.jsonl").read_text().splitlines()]
    colors = sorted({record["answer"] for record in records})
    lines = [json.dumps(record | {"choices": colors}) for record in records[:16]]
    (seeing / "choices.jsonl").write_text("\n".join(lines))
    config = json.loads((seeing / "config.yaml").read_text())
    config["evaluation"]["tasks"].append({"name": "pick", "kind": "choice", "path": str(seeing / "choices.jsonl")})
    (tmp_path / "both.yaml").write_text(json.dumps(config))
    script = [sys.executable, str(ROOT / "scripts/prove_lmms_eval.py"), str(tmp_path / "both.yaml")]
    done = subprocess.run([*script, "--python", str(python)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-2:] == [
        "colour (generate): lmms-eval 1.0000, vlm eval 1.0000",
        "pick (choice): lmms-eval 1.0000, vlm eval 1.0000",
    ]
