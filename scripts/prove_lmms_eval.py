"""Run lmms-eval on an export, offline, and compare its figures with ours.

    python scripts/prove_lmms_eval.py CONFIG --python ENV/bin/python

CONFIG has tasks of kind `generate` (metric exact_match) or `choice`; the export is that of its run. ENV has lmms-eval
and vlm, as docs/evaluation.md says. Each task becomes a local task of lmms-eval: `generate` through messages, `choice`
through log-likelihoods, on which lmms-eval 0.7.3 itself fails (`unwrap_generation_output`) and 0.6.1 does not.
Answers must be the same; choices may differ where lmms-eval leaves out the end of a reply.
Exit code 1 if a figure differs by more than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from vlm.config import load_config

UTILS = """
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(path).convert("RGB") for path in doc["images"]]

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["prompt"]

def doc_to_choice(doc):
    return doc["choices"]

def same_text(doc, results):
    plain = lambda text: " ".join(text.lower().split()).rstrip(".")
    return {"exact": float(plain(results[0]) == plain(doc["answer"]))}
"""
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
metadata: {{version: 1.0}}
"""
GENERATE = """output_type: generate_until
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {length}, temperature: 0, do_sample: false}}
process_results: !function utils.same_text
metric_list:
  - {{metric: exact, aggregation: mean, higher_is_better: true}}
"""
CHOICE = """output_type: multiple_choice
doc_to_target: place
doc_to_choice: !function utils.doc_to_choice
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--python", required=True, help="Of the environment with lmms-eval and vlm.")
    parser.add_argument("--tolerance", type=float, default=0.02)
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    export = Path(config.output_dir).resolve() / "export"
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        ours = figures_of(arguments.python, arguments.config, Path(folder))
        for task in config.evaluation.tasks:
            if task.kind not in ("generate", "choice"):
                continue
            name = write_task(task, Path(folder) / "tasks")
            theirs = run_lmms_eval(arguments.python, name, task.kind, export, Path(folder))
            worst = max(worst, abs(theirs - ours[task.name]))
            print(f"{task.name} ({task.kind}): lmms-eval {theirs:.4f}, vlm eval {ours[task.name]:.4f}", flush=True)
    return int(worst > arguments.tolerance)


def figures_of(python: str, config: str, folder: Path) -> dict[str, float]:
    """The first figure of each task by `vlm eval`."""
    command = [python, "-m", "vlm.cli.main", "eval", config, "--out", str(folder)]
    code = subprocess.run(command, capture_output=True, check=False).returncode
    if code not in (0, 6):  # a gate does not matter here
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    rows = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["results"]
    return {row["task"]: row["own"] for row in reversed(rows)}


def write_task(task: Any, folder: Path) -> str:
    """A folder of lmms-eval's task files. Returns the task's name."""
    name = f"vlm_{task.name}"
    (folder / name).mkdir(parents=True)
    root = Path(task.images or Path(task.path).parent).resolve()
    text = Path(task.path).read_text(encoding="utf-8").strip()
    records = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    file = folder / name / "records.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for record in records[: task.max_records]:
            doc = {"images": [str(root / record["image"])], "prompt": record["prompt"], "answer": record["answer"]}
            if task.kind == "choice":
                doc |= {"choices": record["choices"], "place": record["choices"].index(record["answer"])}
            lines.write(json.dumps(doc) + "\n")
    kind = CHOICE if task.kind == "choice" else GENERATE.format(length=task.max_new_tokens)
    (folder / name / f"{name}.yaml").write_text(TASK.format(name=name, file=file) + kind, encoding="utf-8")
    (folder / name / "utils.py").write_text(UTILS, encoding="utf-8")
    return name


def run_lmms_eval(python: str, name: str, kind: str, export: Path, folder: Path) -> float:
    """The figure of one task."""
    out = folder / f"out_{name}"
    command = [
        python, "-m", "lmms_eval", "--model", "vlm", "--model_args", f"pretrained={export},precision=fp32",
        "--include_path", str(folder / "tasks"), "--tasks", name, "--batch_size", "8", "--output_path", str(out),
        *(["--force_simple"] if kind == "choice" else []),
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "disabled"}
    ended = subprocess.run(
        command,
        env={**os.environ, **offline, "HF_HOME": str(folder / "hf")},
        capture_output=True,
        text=True,
        check=False,
    )
    results = sorted(out.rglob("*results.json"))
    if ended.returncode or not results:
        raise SystemExit(
            f"{' '.join(command)}\nended with {ended.returncode}:\n{ended.stdout[-2000:]}{ended.stderr[-4000:]}"
        )
    measured = json.loads(results[-1].read_text(encoding="utf-8"))["results"][name]
    return float(next(measured[f"{metric},none"] for metric in ("exact", "acc") if f"{metric},none" in measured))


if __name__ == "__main__":
    raise SystemExit(main())
