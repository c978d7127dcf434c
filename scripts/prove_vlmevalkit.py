"""Run VLMEvalKit on an export through `vlm serve`, offline, and compare every answer with that of `vlm predict`.

    python scripts/prove_vlmevalkit.py RUN/export DATA.tsv --python ENV/bin/python

DATA.tsv has multiple-choice questions in VLMEvalKit's columns: index, image (base64), question, A, B, ..., answer,
split, category. ENV has VLMEvalKit, such as by `pip install ms-vlmeval`. What VLMEvalKit asks, its prompt and the JPEG
that it sends, is then asked of `vlm predict`. Prints VLMEvalKit's accuracy; exits with 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOKENS = 32
VLM = [sys.executable, "-m", "vlm.cli.main"]
# Run in VLMEvalKit's environment: what it asks of each question, as records of ours.
ASKED = """
import base64, json, sys
from pathlib import Path
from PIL import Image
from vlmeval.dataset import build_dataset
from vlmeval.smp import encode_image_to_base64

data, out = build_dataset(sys.argv[1]), Path(sys.argv[2])
out.mkdir()
with (out / "asked.jsonl").open("w") as lines:
    for number in range(len(data.data)):
        row = data.data.iloc[number]
        image, text = data.build_prompt(row)
        sent = encode_image_to_base64(Image.open(image["value"]), target_size=-1)
        (out / f"{number}.jpg").write_bytes(base64.b64decode(sent))
        record = {"id": int(row["index"]), "image": f"{number}.jpg", "prompt": text["value"]}
        print(json.dumps(record), file=lines)
"""
# And what it was answered.
ANSWERED = """
import json, sys
import pandas
rows = pandas.read_excel(sys.argv[1], dtype=str, keep_default_na=False)
print(json.dumps(dict(zip(rows["index"], rows["prediction"]))))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--python", required=True, help="Of the environment with VLMEvalKit.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "out"
        data.mkdir()
        shutil.copy(arguments.data, data / "questions.tsv")
        environment = {**os.environ, "LMUData": str(data), "HF_HUB_OFFLINE": "1"}
        with served(arguments.export) as address:
            run([arguments.python, "-m", "vlmeval.run", *options(Path(folder), address, out)], environment)
        run([arguments.python, "-c", ASKED, "questions", str(Path(folder) / "asked")], environment)
        answers = run([arguments.python, "-c", ANSWERED, str(out / "my_vlm/my_vlm_questions.xlsx")], environment)
        theirs = {int(index): answer for index, answer in json.loads(answers.splitlines()[-1]).items()}
        ours = predicted(arguments.export, Path(folder) / "asked/asked.jsonl", Path(folder) / "ours")
        with (out / "my_vlm/my_vlm_questions_acc.csv").open(encoding="utf-8") as file:
            print(f"VLMEvalKit: accuracy {float(next(csv.DictReader(file))['Overall']):.4f}")
    if not ours or ours.keys() != theirs.keys():
        raise SystemExit(f"VLMEvalKit answered {len(theirs)} questions of {len(ours)}")
    other = [index for index in ours if ours[index] != theirs[index]]
    print(f"answers as by vlm predict: {len(ours) - len(other)} of {len(ours)}")
    for index in other:
        print(f"  {index}: {theirs[index]!r}, vlm predict {ours[index]!r}")
    return int(bool(other))


def options(folder: Path, address: str, out: Path) -> list[str]:
    """Of VLMEvalKit's program: one model, asked through the API, and one file of questions."""
    model = {
        "class": "GPT4V", "model": "my_vlm", "api_base": f"{address}/v1/chat/completions", "key": "sk-none",
        "img_size": -1, "max_tokens": TOKENS, "temperature": 0,
    }  # fmt: skip
    data = {"class": "CustomMCQDataset", "dataset": "questions"}
    config = folder / "config.json"
    config.write_text(json.dumps({"model": {"my_vlm": model}, "data": {"questions": data}}))
    return ["--config", str(config), "--work-dir", str(out), "--judge", "exact_matching", "--api-nproc", "2"]


@contextmanager
def served(export: Path) -> Iterator[str]:
    """The address at which the export answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([*VLM, "serve", str(export), "--model-name", "my_vlm", "--port", str(port)])
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/v1/models").close()
                break
            except OSError:
                if server.poll() is not None:
                    raise SystemExit(f"vlm serve ended with {server.returncode}") from None
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def predicted(export: Path, asked: Path, out: Path) -> dict[int, str]:
    """Answers of `vlm predict`, without the blanks around them, which VLMEvalKit strips."""
    run([*VLM, "predict", str(export), "--data", str(asked), "--max-new-tokens", str(TOKENS), "--out", str(out)])
    lines = map(json.loads, (out / "asked.jsonl").read_text(encoding="utf-8").strip().split("\n"))
    return {line["id"]: line["prediction"].strip() for line in lines}


def run(command: list[str], environment: dict[str, str] | None = None) -> str:
    """What it prints. Ends this program if it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
