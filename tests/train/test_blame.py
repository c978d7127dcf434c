"""A step of a run made again, and the records that it is to be blamed on."""

from __future__ import annotations

import json
import random

import pytest
from demo.tiny import ASK_NAME, COLOURS, SIDE
from PIL import Image

from vlm.blame import BlamedRecord, blame_step, rank, report
from vlm.cli.main import main
from vlm.cli.train import start_training
from vlm.config import load_config
from vlm.errors import CheckpointError

LAST_EPOCH = (57, 58, 59, 60)  # each record once


def write_poisoned(folder):
    """160 images of one colour and its name; of 20 the image is another one's, or the words are garbled.

    Returns:
        the lines of the 20, from 1.
    """
    rng = random.Random(0)
    for name, colour in COLOURS.items():
        Image.new("RGB", (SIDE, SIDE), colour).save(folder / f"{name}.png")
    lines, poisoned = [], sorted(rng.sample(range(1, 161), 20))
    for line in range(1, 161):
        image = rng.choice(list(COLOURS))
        words = f"A {image} square."
        if line in poisoned[::2]:
            words = f"A {rng.choice([name for name in COLOURS if name != image])} square."
        elif line in poisoned:
            words = "".join(rng.choices("qxzjkvw ", k=6))
        turns = [{"from": "human", "value": f"<image>\n{ASK_NAME}"}, {"from": "gpt", "value": words}]
        lines.append(json.dumps({"image": f"{image}.png", "conversations": turns}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return poisoned


@pytest.fixture(scope="module")
def poisoned_run(config_writer, tmp_path_factory):
    """The config of a run of 15 epochs on such data, and its poisoned lines; checkpoints after steps 56 and 60."""
    folder = tmp_path_factory.mktemp("blame")
    poisoned = write_poisoned(folder)
    path = config_writer(folder)(
        data__sources=[{"path": str(folder / "data.jsonl"), "images": str(folder)}],
        data__held_out=0.0,
        data__packing=False,
        data__cache_features=True,
        model__lora=None,
        model__trainable=["projector", "llm"],
        train__max_steps=60,
        train__global_batch_size=40,
        train__micro_batch_size=40,
        train__learning_rate=1e-2,
        train__save_every=56,
        train__prove=False,
    )
    start_training(str(path), [])
    return path, poisoned


def line_of(record):
    return int(record.where.rpartition(" ")[2])


@pytest.mark.slow
def test_twenty_of_twenty_poisoned_records_are_ranked_first(poisoned_run):
    """The lowest score of a poisoned record over the highest of another, in four steps: 31 to 50."""
    path, poisoned = poisoned_run
    found = []
    for step in LAST_EPOCH:
        blame = blame_step(load_config(path), step)
        assert blame.is_same
        assert blame.loss == pytest.approx(blame.told_loss, rel=1e-6)
        assert blame.grad_norm == pytest.approx(blame.told_grad_norm, rel=1e-5)
        assert len(blame.records) == 40
        num_poisoned = len({line_of(record) for record in blame.records} & set(poisoned))
        found += [line_of(record) for record in blame.records[:num_poisoned]]
    assert sorted(found) == poisoned


@pytest.mark.slow
def test_the_command_prints_them_and_gives_json(poisoned_run, tmp_path, capsys):
    path, poisoned = poisoned_run
    run = load_config(path).output_dir
    before = {file: file.stat().st_mtime_ns for file in path.parent.joinpath("run").rglob("*")}

    def blame(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["blame", run, *arguments])
        output = capsys.readouterr()
        return ended.value.code, output.out, output.err

    _, text, _ = blame("--step", "57", "--top", "2")
    lines = text.splitlines()
    assert lines[0].startswith("step 57, from the checkpoint of step 56: 40 records, loss 0.")
    assert lines[1].endswith(": the same")
    assert lines[2].split()[:4] == ["record", "score", "loss", "grad"]
    assert lines[3].startswith("data.jsonl: line ")
    assert lines[5] == "... and 38 more: --top 40, or --json"
    values = json.loads(blame("--step", "57", "--json")[1])
    assert int(values["records"][0]["where"].rpartition(" ")[2]) in poisoned
    code, _, error = blame("--step", "61")
    assert (code, error.splitlines()[-1]) == (2, f"error: --step 61: {run} has steps 1 to 60")
    assert {file: file.stat().st_mtime_ns for file in path.parent.joinpath("run").rglob("*")} == before
    with pytest.raises(SystemExit) as ended:
        main(["blame", str(tmp_path), "--step", "1"])
    assert ended.value.code == 3
    assert "is not a run folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_before_the_first_checkpoint_is_made_again_from_the_start_dropout_and_all(config_file, tmp_path):
    path = config_file(train__max_steps=4, train__prove=False)
    start_training(str(path), [])
    blame = blame_step(load_config(path), 3)
    assert blame.from_step == 0
    assert blame.loss == blame.told_loss  # to the bit, dropout of the adapters too
    assert sum(record.num_supervised for record in blame.records) > 0
    metrics = tmp_path / "run/metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[2]["loss"] *= 1.01
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    blame = blame_step(load_config(path), 3)
    assert blame.is_same is False
    assert "NOT THE SAME" in report(blame, 1)[1]
    del lines[1]  # as if one line had been of steps 2 and 3
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    blame = blame_step(load_config(path), 3)
    assert (blame.told_loss, blame.is_same) == (None, None)
    assert "no line of step 3 alone" in report(blame, 1)[1]


@pytest.mark.slow
def test_data_that_changed_since_the_checkpoint_is_refused(poisoned_run):
    path, _ = poisoned_run
    data = path.parent / "data.jsonl"
    text = data.read_text()
    try:
        data.write_text(text.replace("square", "circle", 1))
        with pytest.raises(CheckpointError, match="the training data, its order or its tokenization changed"):
            blame_step(load_config(path), 60)
    finally:
        data.write_text(text)


def test_scores_are_products_over_the_medians_and_what_is_not_finite_comes_first():
    def record(where, loss, grad_norm):
        return BlamedRecord(where, loss, grad_norm, 4, 0.0, "")

    nan = float("nan")
    ranked = rank([record("a", 1.0, 0.5), record("b", 2.0, 1.0), record("c", 8.0, 3.0), record("d", nan, 1.0)])
    assert [(each.where, each.score) for each in ranked] == [("d", float("inf")), ("c", 12.0), ("b", 1.0), ("a", 0.25)]
    assert rank([record("a", 0.0, 0.0)])[0].score == 0.0  # what is learnt to the end
    assert rank([]) == []
