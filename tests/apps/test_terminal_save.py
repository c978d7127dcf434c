"""`:save`: what is written is training data, and is the conversation that the model saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_export import model_config, write_image

from vlm.apps.saving import save_record
from vlm.apps.session import Exchange
from vlm.cli.main import main
from vlm.data.config import SourceConfig
from vlm.data.conversation import IMAGE
from vlm.data.records import open_source
from vlm.errors import ConfigError, DataError, RecordError


class Said:
    def __init__(self, *exchanges: Exchange, system: str | None = None) -> None:
        self.system = system
        self.exchanges = list(exchanges)


@pytest.fixture
def said(tmp_path: Path) -> Said:
    cat = write_image(tmp_path / "cat.png")
    dog = write_image(tmp_path / "dog.png", seed=2)
    return Said(
        Exchange("这是什么？", (str(cat),), "一只猫。"),
        Exchange("And <image> here?", (str(dog), dog.read_bytes()), "Two dogs."),
        Exchange("Bye", (), ""),
        system="Be brief.",
    )


def test_data_check_accepts_the_file(said: Said, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = save_record(said, tmp_path / "talks")
    save_record(said, file)
    (tmp_path / "other").mkdir()
    file = file.rename(tmp_path / "other" / "talks.jsonl")  # the images are in it, so it may be moved
    config = tmp_path / "run.yaml"
    model = model_config(tmp_path).model_dump(mode="json")
    data = {"sources": [{"path": str(file)}], "max_skipped_share": 0}
    train = {"max_steps": 1, "learning_rate": 0.1}
    config.write_text(json.dumps({"output_dir": str(tmp_path / "run"), "model": model, "data": data, "train": train}))
    with pytest.raises(SystemExit) as end:
        main(["data", "check", str(config)])
    out = capsys.readouterr().out
    assert "2 records, 6 images, skipped: none" in out
    assert end.value.code == 0


def test_training_reads_the_turns_that_the_model_saw(said: Said, tmp_path: Path):
    file = save_record(said, tmp_path / "talks.jsonl")
    read = open_source(SourceConfig(path=str(file)), tmp_path / "cache").conversation(0)
    assert [(turn.role, turn.parts) for turn in read.turns] == [
        ("system", ("Be brief.",)),
        ("user", (IMAGE, "\n这是什么？")),
        ("assistant", ("一只猫。",)),
        ("user", (IMAGE, IMAGE, "\nAnd < image> here?")),
        ("assistant", ("Two dogs.",)),
        ("user", ("Bye",)),
        ("assistant", ()),
    ]
    assert [turn.is_learned for turn in read.turns if turn.role == "assistant"] == [True, True, False]
    assert read.images[1] == (tmp_path / "dog.png").read_bytes()


def test_a_json_file_is_new_and_a_jsonl_file_grows(said: Said, tmp_path: Path):
    file = save_record(said, tmp_path / "talk.json")
    assert len(json.loads(file.read_text())) == 1
    with pytest.raises(ConfigError, match="is there already"):
        save_record(said, file)
    (tmp_path / "talks.jsonl").write_text('{"text": "no line end"}')
    lines = save_record(said, tmp_path / "talks.jsonl").read_text().splitlines()
    assert [sorted(json.loads(line)) for line in lines] == [["text"], ["messages"]]


def test_what_cannot_be_saved_is_said(said: Said, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"saved as \.jsonl"):
        save_record(said, tmp_path / "talk.txt")
    with pytest.raises(RecordError, match="nothing was said yet"):
        save_record(Said(), tmp_path / "a.jsonl")
    with pytest.raises(RecordError, match="every reply is empty"):
        save_record(Said(Exchange("Hello", (), "")), tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="cannot be written"):
        save_record(said, tmp_path / "nowhere" / "a.jsonl")
    (tmp_path / "cat.png").unlink()
    with pytest.raises(RecordError, match=r"cat\.png cannot be read"):
        save_record(said, tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()
