"""What docs/evaluation.md shows works: every YAML block is a config section, every record is read by its kind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from tiny_export import write_image
from tokenizers_for_tests import byte_level_bpe

from vlm.data.template import TEMPLATES
from vlm.data.tokenize import ConversationTokenizer
from vlm.evaluation.config import EvaluationConfig

DOCUMENT = (Path(__file__).parents[1] / "docs/evaluation.md").read_text(encoding="utf-8")


def block(kind: str, language: str) -> str:
    """The block of a language in the section of a kind."""
    section = DOCUMENT.partition(f"\n## {kind}\n")[2].partition("\n## ")[0]
    (found,) = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return found


def test_the_first_block_has_a_task_of_each_kind():
    first = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)[0])
    assert [task.kind for task in EvaluationConfig.model_validate(first["evaluation"]).tasks] == [
        "choice",
        "ranking",
        "loss",
        "generate",
    ]


@pytest.mark.parametrize("kind", ["choice", "ranking", "loss", "generate"])
def test_the_record_of_a_kind_is_read_by_its_task(kind: str, tmp_path: Path):
    (task,) = EvaluationConfig.model_validate(yaml.safe_load(block(kind, "yaml"))["evaluation"]).tasks
    assert task.kind == kind
    record = json.loads(block(kind, "json"))
    write_image(tmp_path / record["image"])
    records = [record, {**record, "answer": "A blue cross."}] if kind == "ranking" else [record]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    changes = {"path": str(tmp_path / "records.jsonl"), "images": str(tmp_path)}
    changes |= {"num_candidates": 2} if kind == "ranking" else {}
    tokenizer = byte_level_bpe()
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    encode = ConversationTokenizer(tokenizer, TEMPLATES["chatml"], image_token_id=image_token_id, tokens_per_image=4)
    question = task.model_copy(update=changes).questions(encode, tmp_path / "cache")[0]
    if kind == "generate":
        assert question.answers == ("red", "red", "dark red")
    else:
        assert len(question.replies) == {"choice": 2, "ranking": 2, "loss": 1}[kind]
    assert question.images == (str(tmp_path / record["image"]),)
