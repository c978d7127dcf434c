"""`vlm runs | compare`, and `--json` of every command that lists."""

from __future__ import annotations

import json

import pytest

from vlm.cli.main import main


@pytest.fixture
def cli(capsys):
    def cli(*arguments, code=0):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert ended.value.code == code, captured.err
        return captured.out if code == 0 else captured.err

    return cli


@pytest.fixture
def folder(tmp_path):
    """Two runs: one half done at 0.5 s a step, one that diverged."""
    for name, last, ended in (("half", 50, None), ("burnt", 7, {"code": 4, "error": "step 8: loss nan\nlower it"})):
        run = tmp_path / name
        (run / "checkpoints/step-000004").mkdir(parents=True)
        (run / "config.yaml").write_text("train: {max_steps: 100, global_batch_size: 8}")
        line = {"step": last, "loss": 1.25, "step_seconds": 0.5}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        if ended:
            (run / ".ended.json").write_text(json.dumps({"launch": 1, **ended}))
    return tmp_path


def test_runs_lists_state_step_loss_speed_and_hours_left(cli, folder):
    head, burnt, half, error = cli("runs", folder).splitlines()
    assert head.split()[:4] == ["run", "state", "step", "loss"]
    assert burnt.split()[1:4] == ["failed", "7/100", "1.2500"]
    assert half.split()[1:7] == ["interrupted", "50/100", "1.2500", "-", "16", "0.01"]
    assert error == f"{folder / 'burnt'}: step 8: loss nan"


def test_rewards_have_a_column_where_a_run_has_some(cli, folder):
    line = {"step": 9, "loss": 0.01, "reward": 0.625, "step_seconds": 0.5}
    (folder / "half/metrics.jsonl").write_text(json.dumps(line) + "\n")
    head, burnt, half, _ = cli("runs", folder).splitlines()
    assert head.split()[3:6] == ["loss", "reward", "held"]
    assert burnt.split()[3:5] == ["1.2500", "-"]
    assert half.split()[3:5] == ["0.0100", "0.6250"]
    assert [run["reward"] for run in json.loads(cli("runs", folder, "--json"))] == [None, 0.625]


def test_runs_as_json_and_of_a_folder_without_runs(cli, folder, tmp_path):
    burnt, half = json.loads(cli("runs", folder, "--json"))
    assert (burnt["state"], burnt["error"]) == ("failed", "step 8: loss nan\nlower it")
    assert (half["step"], half["max_steps"], half["hours_left"]) == (50, 100, 50 * 0.5 / 3600)
    (tmp_path / "empty").mkdir()
    assert cli("runs", tmp_path / "empty", "--json") == "[]\n"
    assert "no runs below" in cli("runs", tmp_path / "empty", code=3)
    assert "is not a folder" in cli("runs", tmp_path / "nowhere", code=3)


@pytest.mark.slow
def test_compare_prints_a_table_and_draws_or_gives_json(cli, folder, tmp_path):
    out = tmp_path / "curves.png"
    text = cli("compare", folder / "half", folder / "burnt", "--out", out)
    assert text.splitlines()[1].split() == ["state", "interrupted", "failed"]
    assert out.read_bytes()[:4] == b"\x89PNG"
    values = json.loads(cli("compare", folder / "half", folder / "burnt", "--json"))
    assert values["series"] == [{"steps": [50], "values": [1.25]}, {"steps": [7], "values": [1.25]}]


@pytest.mark.slow
def test_other_lists_as_json(cli, folder):
    assert "quickstart/pretrain" in json.loads(cli("ls", "quickstart", "--json"))
    (checkpoint,) = json.loads(cli("ckpt", "ls", folder / "half", "--json"))
    assert (checkpoint["step"], checkpoint["problems"]) == (4, ["no manifest.json"])
