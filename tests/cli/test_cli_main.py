"""The `vlm` command as a whole: exit codes, speed, spelling of flags."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlm.cli.process import repeat_options, run, with_hyphens
from vlm.errors import CheckpointError, ConfigError, DataError, GateFailed, Preempted, TrainingDiverged

REPOSITORY = Path(__file__).parents[2]
VERBS = (
    "ls",
    "cp",
    "show",
    "validate",
    "config-schema",
    "train",
    "eval",
    "predict",
    "plot",
    "export",
    "chat",
    "data",
    "ckpt",
)


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ConfigError("a"), 2, "error: a\n"),
        (DataError("b"), 3, "error: b\n"),
        (TrainingDiverged("c"), 4, "error: c\n"),
        (CheckpointError("d"), 5, "error: d\n"),
        (GateFailed("e"), 6, "error: e\n"),
        (Preempted("stopped after step 3"), 143, "stopped after step 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_error_of_ours_is_a_message_and_an_exit_code(error, code, printed, capsys):
    def command():
        raise error

    assert run(command) == code
    assert capsys.readouterr().err == printed


def test_any_other_error_shows_its_traceback_and_ends_with_1(capsys):
    assert run(lambda: 1 / 0) == 1
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().err


def test_help_names_every_verb(vlm):
    code, out, _ = vlm("--help")
    assert code == 0
    assert all(f"  {verb} " in out for verb in VERBS)


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["train", "x", "--frob"], ["ls", "a", "b"]])
def test_a_wrong_command_line_ends_with_2(arguments, vlm):
    assert vlm(*arguments)[0] == 2


def test_a_misspelt_verb_names_the_nearest(vlm):
    assert "Did you mean 'train'?" in vlm("trian")[2]


def processor_seconds(arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--help"], ["ls"], ["validate", "llava_qwen2_5_7b/pretrain"], ["config-schema"]]
)
def test_help_ls_and_validate_take_a_few_times_as_long_as_what_they_must_import(arguments):
    """Three to five times seen: 0.24 s on free cores, over a second of processor time on busy ones."""
    least = min(processor_seconds(["-c", "import typer, pydantic, omegaconf"]) for _ in range(2))
    assert any(processor_seconds(["-m", "vlm.cli.main", *arguments]) < 6 * least for _ in range(3))


def test_flags_may_be_written_with_underscores():
    assert with_hyphens(["--max_shard_size", "2_GB", "--cfg_path=a_b"]) == [
        "--max-shard-size",
        "2_GB",
        "--cfg-path=a_b",
    ]


@pytest.mark.parametrize("flag", ["--options", "--cfg-options", "-o"])
def test_one_options_flag_takes_several_overrides(flag):
    given = ["train", flag, "a=1", "b=2", "x.yaml"]
    assert repeat_options(given) == ["train", flag, "a=1", "--options", "b=2", "x.yaml"]


@pytest.mark.slow
def test_a_reader_that_has_enough_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m vlm.cli.main config-schema | head -1",
        shell=True, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("{\n", "")


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", ["--cfg-path", "tiny/pretrain", "--deepspeed", "zero4"], "known are zero0, zero1, zero2, zero3"),
        ("train.py", ["--cfg_path", "nowhere.yaml", "--local_rank", "0"], "config nowhere.yaml does not exist"),
        ("train.py", ["--cfg-path", "tiny/pretrain", "--options", "sed=1", "a=2"], "did you mean seed?"),
        ("train_pipeline.py", ["--cfg-path", "a.yaml", "--num-stages", "2"], "config a.yaml does not exist"),
        ("webui_demo.py", ["-c", "nowhere"], "nowhere is no folder"),
        ("cli_demo.py", ["-c", "nowhere"], "nowhere is no folder"),
        ("cli_demo.py", [], "-c/--checkpoint-path"),
    ],
)
def test_root_script_says_what_is_wrong_and_what_to_use_instead(script, arguments, message):
    done = subprocess.run(
        [sys.executable, REPOSITORY / script, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == (5 if "nowhere" in arguments else 2)


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ({"WORLD_SIZE": "2"}, ["engine.kind=local"], "engine.kind is local, which is one process, but there are 2"),
        ({"WORLD_SIZE": "3"}, ["engine.kind=pipeline"], "engine.num_stages 2 does not divide 3 processes"),
    ],
)
def test_an_engine_that_does_not_fit_the_launch_is_refused(monkeypatch, tmp_path, vlm, environment, options, message):
    data = tmp_path / "data.jsonl"
    data.touch()
    options = [
        *options, "model.vision=null", "model.trainable=[llm]", "model.llm.path=a/name", "evaluation.tasks=[]",
        f"data.sources=[{{path: {data}}}]", f"output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, _, err = vlm("train", "tiny/pretrain", "--options", *options)
    assert (code, message in err) == (2, True)


def test_ranks_that_find_the_same_error_let_rank_0_say_it_before_the_launcher_ends_all(monkeypatch, vlm):
    """A launcher ends every process when one has ended: the message was lost if rank 0 was the slower one."""
    waited = []
    monkeypatch.setattr("vlm.cli.process.time", SimpleNamespace(sleep=waited.append))  # not every thread's sleep
    for rank, seconds in (("0", []), ("1", [3.0])):
        monkeypatch.setenv("RANK", rank)
        code, _, err = vlm("train", "tiny/pretrain", "--options", "train.max_stepz=3")
        assert (code, "max_stepz" in err, waited) == (2, rank == "0", seconds)


def test_a_deepspeed_json_gives_its_stage_and_offload(tmp_path):
    from vlm.cli.train import deepspeed_options

    path = tmp_path / "my.json"
    path.write_text('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}')
    assert deepspeed_options(str(path)) == [
        "engine.kind=zero", f"engine.deepspeed={path}", "engine.stage=3", "engine.offload=[parameters]",
    ]  # fmt: skip
