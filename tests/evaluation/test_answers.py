"""Answers that a model writes, many at once; and the files that `vlm predict` keeps them in. On the toy that looks."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import warm
from tiny_export import write_image
from warm_rank import warm_ranks

from vlm.cli.main import app
from vlm.cli.process import run
from vlm.errors import ConfigError, RecordError
from vlm.evaluation import predictions
from vlm.evaluation.answers import write_answers
from vlm.evaluation.predict import FeatureCache
from vlm.evaluation.predictions import predict
from vlm.evaluation.questions import OpenQuestion, WritingSettings
from vlm.evaluation.task_kinds import GenerateTask
from vlm.inference.load import LoadedModel, load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded(seeing: Path) -> LoadedModel:
    return load(seeing / "run/export", device="cpu", precision="fp32")


def task_of(seeing: Path, **values: Any) -> GenerateTask:
    return GenerateTask(**{"name": "colour", "path": str(seeing / "test.jsonl"), "max_new_tokens": 8, **values})


def questions_of(seeing: Path, loaded: LoadedModel, **values: Any) -> list[OpenQuestion]:
    return task_of(seeing, **values).questions(loaded.conversation_tokenizer, seeing / "cache")


def test_many_at_once_are_what_chat_says_to_each_and_what_is_asked_twice_is_written_once(
    seeing: Path, loaded: LoadedModel
):
    questions = questions_of(seeing, loaded, max_records=12)
    said = [loaded.chat("Which colour?", [question.images[0]], max_new_tokens=8) for question in questions]
    begun: list[int] = []
    embed = loaded.model.embed
    loaded.model.embed = lambda ids, *rest: (begun.append(ids.shape[1]), embed(ids, *rest))[1]  # type: ignore[method-assign]
    try:
        answers = write_answers(
            loaded, [*questions, *questions[:3]], FeatureCache(loaded), WritingSettings(8), max_running=5
        )
    finally:
        loaded.model.embed = embed  # type: ignore[method-assign]
    assert [answer.text for answer in answers] == said + said[:3]
    assert sum(length > 1 for length in begun) == 12  # prompts; the others are new tokens
    assert {answer.end for answer in answers} == {"stop"}
    sampled = [
        write_answers(loaded, questions, FeatureCache(loaded), WritingSettings(8, temperature=5.0), max_running=count)
        for count in (1, 7)
    ]
    assert sampled[0] == sampled[1]  # each record draws by itself
    assert [answer.text for answer in sampled[0]] != said


def test_an_answer_ends_at_a_stop_text_or_at_its_length(seeing: Path, loaded: LoadedModel):
    (question,) = questions_of(seeing, loaded, max_records=1)
    (stopped,) = write_answers(loaded, [question], FeatureCache(loaded), WritingSettings(8, stop=("d",)))
    (cut,) = write_answers(loaded, [question], FeatureCache(loaded), WritingSettings(1))
    assert (stopped.text, stopped.end, cut.num_tokens, cut.end) == ("re", "stop", 1, "length")


def test_what_cannot_be_answered_is_named_with_its_record(seeing: Path, loaded: LoadedModel, tmp_path: Path):
    question, other = questions_of(seeing, loaded, max_records=2)
    with pytest.raises(RecordError, match=r"test\.jsonl: line 1: a prompt of 37 tokens and an answer of 300"):
        write_answers(loaded, [question], FeatureCache(loaded), WritingSettings(300))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    broken = replace(other, images=(str(tmp_path / "broken.png"),))
    with pytest.raises(RecordError, match=r"test\.jsonl: line 2: .*broken\.png"):
        write_answers(loaded, [question, broken], FeatureCache(loaded), WritingSettings(8))


RECORDS: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    ({"image": "0.png", "prompt": "Which?", "answer": "red", "id": "a7"}, ("red",), "Which?"),
    ({"image": "0.png", "question": "Which?", "answers": ["red", "crimson"]}, ("red", "crimson"), "Which?"),
    ({"image": "0.png", "question": "Which?", "answers": [{"answer": "red"}]}, ("red",), "Which?"),
    ({"image": "0.png", "prompt": "Which?"}, (), "Which?"),
    ({"image": "0.png", "prompt": "A or B?", "choices": ["a", "b"], "answer": "A"}, ("A",), "A or B?"),
    ({"image": "0.png", "caption": "A red square."}, ("A red square.",), ""),
    (
        {
            "conversations": [
                {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"},
                {"from": "human", "value": "Who?"}, {"from": "gpt", "value": "A bird"},
            ]
        },
        ("A bird",), "Who?",
    ),
]  # fmt: skip


def test_records_are_read_as_training_reads_them_and_the_last_reply_is_the_answer(
    seeing: Path, loaded: LoadedModel, tmp_path: Path
):
    write_image(tmp_path / "0.png")
    (tmp_path / "open.json").write_text(json.dumps([record for record, *_ in RECORDS]))
    questions = questions_of(seeing, loaded, path=str(tmp_path / "open.json"))
    assert [(question.answers, question.text) for question in questions] == [tuple(rest) for _, *rest in RECORDS]
    assert questions[0].id == "a7"
    assert loaded.tokenizer.decode(questions[-1].prompt_ids).endswith("Hi<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
                                                                      "<|im_start|>assistant\n")  # fmt: skip


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predictions_go_on_where_they_were_stopped_whoever_wrote_them(
    seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The second of two processes has come to its end, the first has not begun; then one process does the rest."""
    arguments = ([task_of(seeing, metrics=("exact_match",))], seeing / "run/export", tmp_path, seeing / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(predictions, "rank", lambda: 1)
        patched.setattr(predictions, "world_size", lambda: 2)
        patched.setattr(predictions, "on_main", lambda compute: None)
        predict(*arguments)
    part = tmp_path / ".colour.part-1.jsonl"
    assert [line["number"] for line in lines_of(part)] != []
    assert {line["number"] % 2 for line in lines_of(part)} == {1}
    part.write_text(part.read_text()[:-9])  # killed in the middle of a line
    assert len(lines_of_whole(part)) == 23
    with pytest.raises(ConfigError, match="other settings"):  # nobody has said yet what wrote it
        predict(*arguments)
    part.unlink()
    (written,) = predict(*arguments)
    assert [line["number"] for line in lines_of(written)] == [*range(48)]
    assert "exact match 1.000 ± 0.000 over 48 records" in capsys.readouterr().err

    whole = written.read_text()
    (tmp_path / ".colour.part-3.jsonl").write_text(whole[: len(whole) // 2])
    written.unlink()
    asked: list[int] = []
    writing = predictions.write_answers
    monkeypatch.setattr(predictions, "write_answers", lambda *given: (asked.append(len(given[1])), writing(*given))[1])
    predict(*arguments)
    assert written.read_text() == whole
    assert asked[0] in range(20, 30)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["colour.json", "colour.jsonl"]
    with pytest.raises(ConfigError, match=r"colour\.jsonl was written by .*max_new_tokens 8 -> 9.* --out"):
        predict([task_of(seeing, max_new_tokens=9)], *arguments[1:])


def test_other_answers_or_images_are_other_records_and_an_empty_part_is_none(
    seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    record = json.loads((seeing / "test.jsonl").read_text().splitlines()[0])
    shutil.copy(seeing / record["image"], tmp_path / "a.png")
    data = tmp_path / "data.v1.jsonl"

    def write(answer: str, out: str = "out") -> tuple[int, str]:
        answers = {"answer": answer} if answer else {}
        asked = {key: value for key, value in record.items() if key != "answer"}
        data.write_text(json.dumps(asked | {"image": "a.png"} | answers))
        arguments = [
            str(seeing / "run/export"),
            "--data",
            str(data),
            "--metric",
            "exact_match",
            "--max-new-tokens",
            "4",
        ]
        code = run(lambda: app(["predict", *arguments, "--out", str(tmp_path / out)], standalone_mode=False))
        return code, capsys.readouterr().err

    (tmp_path / "out").mkdir()
    (tmp_path / "out/.data.v1.part-0.jsonl").touch()  # of a command that failed at its first record
    assert write("red")[0] == 0
    code, told = write("blue")
    assert (code, "of other records" in told) == (2, True)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes() + b"more")
    assert write("red")[0] == 2
    assert [file.name for file in sorted((tmp_path / "out").iterdir())] == ["data.v1.json", "data.v1.jsonl"]
    code, told = write("", out="bare")
    assert (code, "no figures: 1 of 1 records have no answer to compare with, first data.v1.jsonl" in told) == (0, True)


def test_an_answer_that_a_metric_cannot_read_is_named_before_anything_is_written(seeing: Path, tmp_path: Path):
    for metric, told in (("yes_no", "is neither yes nor no"), ("choice_letter", "is not the letter of a choice")):
        with pytest.raises(RecordError, match=f"metric {metric} of task colour: the answer .* {told}") as refused:
            predict([task_of(seeing, metrics=(metric,))], seeing / "run/export", tmp_path, seeing / "cache")
        assert refused.value.where == "test.jsonl: line 1"
    assert [*tmp_path.iterdir()] == []


def test_a_run_that_was_copied_answers_by_its_own_export(
    seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(seeing / "run/export", tmp_path / "copy/export")
    shutil.copy(seeing / "config.yaml", tmp_path / "copy")
    for command in ("predict", "eval"):
        assert run(lambda: app([command, str(tmp_path / "copy")], standalone_mode=False)) == 0  # noqa: B023
        assert f"{tmp_path / 'copy/export'} computes in" in capsys.readouterr().err
    assert (tmp_path / "copy/predictions/colour.jsonl").is_file()
    assert (tmp_path / "copy/evaluation.json").is_file()


def test_a_torn_config_of_the_run_is_told_and_its_export_answers(
    seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(seeing / "run/export", tmp_path / "copy/export")
    torn = tmp_path / "copy/config.yaml"
    torn.write_text((seeing / "config.yaml").read_text()[:-9])
    data = ["--data", str(seeing / "test.jsonl"), "--max-records", "2", "--max-new-tokens", "4"]
    for source in ("copy", "copy/export"):
        given = [str(tmp_path / source), *data, "--out", str(tmp_path / source / "answers")]
        assert run(lambda: app(["predict", *given], standalone_mode=False)) == 0  # noqa: B023
        assert f"the run's config is not used, only its export: 1 problem in {torn}" in capsys.readouterr().err
        assert len(lines_of(tmp_path / source / "answers/test.jsonl")) == 2
    assert run(lambda: app(["predict", str(tmp_path / "copy")], standalone_mode=False)) == 2  # its tasks are asked


def test_bits_are_part_of_what_answered(seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for command in ("predict", "eval"):
        arguments = [str(seeing / "config.yaml"), "--export", str(seeing / "run/export"), "--bits", "4"]
        assert run(lambda: app([command, *arguments], standalone_mode=False)) == 2  # noqa: B023
        assert "in 4 bits is no export of a run" in capsys.readouterr().err
        assert run(lambda: app([command, *arguments, "--out", str(tmp_path)], standalone_mode=False)) == 0  # noqa: B023
    assert json.loads((tmp_path / "colour.json").read_text())["weights"].endswith(", 4 bits")
    assert json.loads((tmp_path / "evaluation.json").read_text())["bits"] == 4


@pytest.mark.thorough
def test_two_processes_of_a_launch_write_what_one_does(
    seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Where every record draws its answer."""
    settings = json.loads((seeing / "config.yaml").read_text())
    settings["evaluation"]["tasks"][0] |= {"temperature": 1.5, "max_records": 12}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings))
    assert run(lambda: app(["predict", str(config), "--out", str(tmp_path / "one")], standalone_mode=False)) == 0
    alone = capsys.readouterr().err
    arguments = ("predict", str(config), f"--out={tmp_path / 'two'}", "--nproc=2")
    code, together = warm.run_warm(warm.vlm, *arguments, **warm_ranks(tmp_path))
    assert code == 0, together[-3000:]
    one, two = ((tmp_path / name / "colour.jsonl").read_text() for name in ("one", "two"))
    assert one == two
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == ["colour.json", "colour.jsonl"]
    (figure,) = re.findall("predict: colour: exact match .*", alone)
    assert figure in together
    assert not re.search(r" [01]\.000 ", figure)


def lines_of_whole(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{seeing}/run/export"], None),
        (["{alone}", "--data", "{seeing}/test.jsonl", "--max-records", "3"], None),
        (["{alone}"], "nothing to answer: give a file of records with --data"),
        (["{seeing}/run", "--metric", "rouge"], "--metric is of --data"),
        (["{alone}", "--data", "{seeing}/test.jsonl", "--metric", "wer"], "--metric wer: input should be 'bleu'"),
        (["{seeing}/llm", "--data", "{seeing}/test.jsonl"], "no export of a run.* --out"),
    ],
)
def test_the_command_answers_a_config_or_a_file(
    seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str | None
):
    (tmp_path / "alone").symlink_to(seeing / "run/export")
    filled = [part.format(seeing=seeing, alone=tmp_path / "alone") for part in arguments]
    code = run(lambda: app(["predict", *filled], standalone_mode=False))
    captured = capsys.readouterr()
    if said is None:
        assert code == 0, captured.err
        assert lines_of(Path(captured.out.strip()))[0]["prediction"] == "red"
    else:
        assert code == 2
        assert re.search(said, captured.err)
