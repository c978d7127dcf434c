"""Files of predictions, without a model."""

from __future__ import annotations

import json
from pathlib import Path

from vlm.evaluation.predictions import PredictionFile


def test_lines_end_at_a_line_feed_only_and_a_task_may_have_brackets_in_its_name(tmp_path: Path):
    """The last line was cut off in the middle of a character of three bytes."""
    work = PredictionFile("cut[1]", tmp_path)
    texts = ["one\u2028two\u2029three\u0085four", "二"]
    lines = [json.dumps({"number": n, "prediction": text}, ensure_ascii=False) + "\n" for n, text in enumerate(texts)]
    raw = "".join(lines).encode()
    (tmp_path / ".cut[1].part-0.jsonl").write_bytes(raw + b'{"number": 2, "prediction": "\xe4\xba')
    assert [line["prediction"] for line in work.lines()] == texts
    work._join(2)
    assert (tmp_path / "cut[1].jsonl").read_bytes() == raw
    assert [path.name for path in tmp_path.iterdir()] == ["cut[1].jsonl"]
