"""What the studio knows without a browser: drafts, jobs, run folders, its key."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny_export import write_llm

from vlm.apps.studio import commands, jobs, watch
from vlm.apps.studio.chart import Curve, chart_html
from vlm.apps.studio.draft import Draft, shown_values
from vlm.apps.studio.form import form_html, problems_html
from vlm.apps.studio.key import KeyGuard
from vlm.apps.studio.options import checkpoints, exports
from vlm.apps.studio.overview import act, predictions_html, table_html
from vlm.apps.studio.texts import _TEXTS
from vlm.config import RunConfig, load_config, read_source
from vlm.config_keys import all_keys
from vlm.errors import ConfigError, RunLocked, VLMError
from vlm.runs import Series
from vlm.train.checkpoint import mark_best

PROJECT = "tiny/pretrain"


# Keys of the config


def test_the_form_has_every_key_of_the_config_once():
    keys = [about.key for about in all_keys()]
    assert len(keys) == len(set(keys)) > 100
    assert {key for key in keys if "." not in key} >= {"name", "output_dir", "seed"}
    assert RunConfig.model_fields.keys() == {re.split(r"[.\[]", key)[0] for key in keys}


@pytest.mark.parametrize(
    ("key", "control", "choices", "kinds"),
    [
        ("train.schedule", "choice", ("constant", "linear", "cosine", "step"), ()),
        ("train.max_steps", "line", (), ()),
        ("data.packing", "choice", ("true", "false"), ()),
        ("data.cache_features", "choice", ("true", "false", "auto"), ()),
        ("data.sources", "yaml", (), ()),
        ("model.lora", "section", (), ()),
        ("model.trainable", "yaml", (), ()),
        ("model.projector.layer_norm", "choice", ("true", "false"), ("mlp",)),
    ],
)
def test_each_key_gets_the_control_that_its_type_asks_for(
    key: str, control: str, choices: tuple[str, ...], kinds: tuple[str, ...]
):
    about = next(about for about in all_keys() if about.key == key)
    assert (about.control, about.choices, about.kinds) == (control, choices, kinds)
    assert about.meaning or key == "data.packing" or control == "yaml"


# Drafts


def test_a_draft_is_the_command_and_the_yaml_that_it_runs():
    draft = Draft(PROJECT, nproc=2).with_value("train.max_steps", "7").with_value("data.system", '"2 words"')
    assert (
        draft.command() == """vlm train tiny/pretrain --nproc 2 --options 'data.system="2 words"' train.max_steps=7"""
    )
    assert draft.command("plan").startswith("vlm plan tiny/pretrain --gpus 2 --options ")
    assert "max_steps: 7" in draft.yaml()
    assert load_config(PROJECT, draft.options).data.system == "2 words"


def test_what_the_form_shows_says_the_same_when_it_is_typed_again():
    """So a value that nobody touched cannot change by going through the form."""
    project = "quickstart/finetune"
    draft = Draft(project)
    for key, text in shown_values(draft).items():
        draft = draft.with_value(key, text)
    assert load_config(project, draft.options) == load_config(project)
    assert read_source(project, draft.options).values == read_source(project).values


def test_block_yaml_becomes_one_line_of_the_command():
    draft = Draft(PROJECT).with_value("data.sources", "- path: a.json\n  weight: 1e-1")
    assert draft.options == ('data.sources=[{"path": "a.json", "weight": 0.1}]',)


def test_problems_are_told_at_their_keys():
    draft = Draft(PROJECT).with_value("seed", "-1").with_value("train.max_steps", "many")
    draft = draft.with_value("data.sources", "[{path: no/such.json}]")
    found = draft.check().of_keys
    assert found["seed"] == "expected at least 0 (found -1)"
    assert found["train.max_steps"] == "expected a whole number (found 'many')"
    paths = Draft(PROJECT).with_value("data.sources", "[{path: no/such.json}]").check()
    assert paths.of_keys["data.sources"].startswith("data.sources[0].path: data file no/such.json does not exist")
    assert not paths.is_right


def test_a_problem_of_no_key_is_not_lost():
    draft = Draft(PROJECT).with_value("train.epochs", "2")  # beside max_steps: the section refuses
    problems = draft.check()
    assert "max_steps" in " ".join([*problems.of_keys.values(), *problems.others])


@pytest.mark.parametrize(("key", "text"), [("no.such", "1"), ("data.sources[].path", "x"), ("seed", "1" * 30_000)])
def test_what_no_form_sends_is_refused(key: str, text: str):
    with pytest.raises(ConfigError):
        Draft(PROJECT).with_value(key, text)


def test_the_form_escapes_what_it_shows():
    draft = Draft(PROJECT).with_value("data.system", '"<script>alert(1)</script>"')
    page = form_html(draft, "en") + problems_html({"seed": "<b>"}, ["<i>"], ["<u>"], "zh")
    assert not re.search(r"<script|<b>(?!1|2)|<i>|<u>", page.replace("<b>2 处", ""))
    assert page.count('data-key="') == len([about for about in all_keys() if "[]" not in about.key])


def test_every_text_is_there_in_both_languages():
    for name, (english, chinese) in _TEXTS.items():
        assert not re.search("[一-鿿]", english) or name == "language"
        assert re.search("[一-鿿]", chinese) or name == "language"
        assert re.findall(r"\{\w+\}", english) == re.findall(r"\{\w+\}", chinese)


# Jobs


def sleeper(code: str = "import time; time.sleep(60)") -> Any:
    """Starts a process in place of `vlm`, which prints its arguments first."""

    def start(arguments: Sequence[str], log: Path, folder: Path) -> int:
        with log.open("ab") as output:
            command = [sys.executable, "-c", code, *arguments]
            process = subprocess.Popen(command, stdout=output, start_new_session=True, cwd=folder)
        started.append(process)
        return process.pid

    started: list[subprocess.Popen[bytes]] = []
    start.started = started  # type: ignore[attr-defined]
    return start


@pytest.mark.slow
def test_a_run_goes_on_when_the_page_that_started_it_is_killed_with_all_its_group(tmp_path: Path):
    config, run = tmp_path / "text.yaml", tmp_path / "run"
    (tmp_path / "pairs.json").write_text(json.dumps([{"instruction": "What?", "output": "A square."}] * 8))
    settings = {
        "output_dir": str(run),
        "model": {"llm": {"path": str(write_llm(tmp_path / "llm"))}, "vision": None, "trainable": ["llm"]},
        "data": {"template": "chatml", "max_length": 64, "sources": [{"path": str(tmp_path / "pairs.json")}],
                 "cache": str(tmp_path / "cache")},
        "train": {"max_steps": 2, "global_batch_size": 2, "micro_batch_size": 2, "precision": "fp32", "prove": False},
        "engine": {"device": "cpu"},
    }  # fmt: skip
    config.write_text(json.dumps(settings))
    page = (
        "import sys, time; from pathlib import Path; from vlm.apps.studio import jobs; "
        f"print(jobs.begin(Path({str(run)!r}), 'train', ['train', {str(config)!r}]).pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", page], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert int(process.stdout.readline()) > 0
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    job = jobs.read(run, "train")
    assert job is not None
    assert job.is_running
    deadline = time.monotonic() + 120
    while job.is_running and time.monotonic() < deadline:
        time.sleep(0.2)
    assert watch.look_at(run, tmp_path).state == "finished"


def test_a_job_is_known_from_its_run_folder_and_ends_when_it_is_stopped(tmp_path: Path):
    start = sleeper()
    job = jobs.begin(tmp_path / "run", "train", ["train", "a b.yaml"], start)
    assert jobs.read(tmp_path / "run", "train") == job
    assert job.is_running
    assert watch.look_at(tmp_path / "run", tmp_path).state == "starting"
    assert [run.label for run in watch.list_runs(tmp_path)] == ["run"]
    assert jobs.read_log(tmp_path / "run") == "$ vlm train 'a b.yaml'"
    with pytest.raises(RunLocked, match="runs already"):
        jobs.begin(tmp_path / "run", "train", ["train", "a b.yaml"], start)
    jobs.stop(tmp_path / "run")
    assert start.started[0].wait(timeout=30) == -15
    assert not job.is_running
    with pytest.raises(VLMError, match="nothing trains there now"):
        jobs.stop(tmp_path / "run")


def test_a_copy_of_a_folder_in_which_a_job_runs_runs_nothing_itself(tmp_path: Path):
    job = jobs.begin(tmp_path / "run", "export", ["export", "."], sleeper())
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copied = jobs.read(tmp_path / "copy", "export")
    assert (job.is_running, copied is not None and copied.is_running) == (True, False)
    assert copied is not None
    assert (copied.folder, copied.arguments) == (job.folder, job.arguments)
    os.kill(job.pid, signal.SIGKILL)


def test_of_two_clicks_at_once_one_starts_a_process(tmp_path: Path):
    start = sleeper()

    def click(_: int) -> bool:
        try:
            return bool(jobs.begin(tmp_path, "export", ["export", "."], start))
        except RunLocked:
            return False

    with ThreadPoolExecutor(4) as clicks:
        assert sorted(clicks.map(click, range(4))) == [False, False, False, True]
    (process,) = start.started
    process.kill()
    process.wait()


def test_a_run_that_was_moved_goes_on_where_it_lies_and_reads_its_data_where_it_was_begun(tmp_path: Path):
    """Its config and the command that began it name a relative folder, of another working directory."""
    write_run(tmp_path / "work/runs/old", [3.0])
    begun: list[tuple[list[str], Path]] = []

    def start(arguments: Sequence[str], log: Path, folder: Path) -> int:
        begun.append((list(arguments), folder))
        return 2**22 + 1  # no process: it ended at once

    first = ["train", "a.yaml", "--options", "output_dir=runs/old", "seed=3"]
    jobs.begin(tmp_path / "work/runs/old", "train", first, start, tmp_path / "work")
    (tmp_path / "work/runs/old").rename(tmp_path / "new")
    for name in ("resume", "resume", "evaluate", "export"):
        act(name, tmp_path, "new", "en", start)
    here = ["--options", f'output_dir="{tmp_path / "new"}"']
    resumed, run = [*first, *here], str(tmp_path / "new")
    expected = [first, resumed, resumed, ["eval", run, *here], ["export", run]]
    assert begun == [(arguments, tmp_path / "work") for arguments in expected]
    (tmp_path / "new/.train.json").unlink()  # as if from a terminal
    act("resume", tmp_path, "new", "en", start)
    assert begun[-1] == (["train", str(tmp_path / "new/config.yaml"), *here], Path.cwd())


def test_a_later_process_of_the_same_number_is_not_taken_for_the_job(tmp_path: Path):
    values = {"pid": os.getpid(), "host": jobs.socket.gethostname(), "arguments": [], "created": 1.0, "code": None}
    (tmp_path / ".train.json").write_text(json.dumps(values))
    job = jobs.read(tmp_path, "train")
    assert job is not None
    assert not job.is_running
    assert watch.look_at(tmp_path, tmp_path).state == "not_started"


@pytest.mark.parametrize(("code", "state"), [(143, "stopped"), (-15, "stopped"), (2, "failed")])
def test_how_a_launch_ended_before_it_trained(tmp_path: Path, code: int, state: str):
    values = {"pid": 1, "host": "x", "arguments": [], "created": 1.0, "code": code}
    (tmp_path / ".train.json").write_text(json.dumps(values))
    assert watch.look_at(tmp_path, tmp_path).state == state


def write_job(run: Path, kind: str, said: str, **values: Any) -> None:
    job = {"pid": 1, "host": "x", "arguments": [], "created": 1.0, "code": 2} | values
    (run / f".{kind}.json").write_text(json.dumps(job))
    (run / f"{kind}.log").write_text(said)


def test_the_command_that_was_begun_last_says_why_it_failed(tmp_path: Path):
    run = write_run(tmp_path / "run", [3.0])
    write_job(run, "predict", "$ vlm predict a\nerror: of before\n$ vlm predict b\nerror: b.jsonl: no <image>\n")

    def told() -> str:
        return "".join(
            re.findall(r"<div class='why'>(.*?)</div>", table_html(watch.list_runs(tmp_path), run, "", "en"))
        )

    assert told() == "predict: error: b.jsonl: no &lt;image&gt;"
    write_job(run, "predict", "$ vlm predict a\nerror: of before\n$ vlm predict b\n", code=-9)
    assert told() == "predict: ended with -9"
    write_job(run, "predict", "$ vlm predict b\n", code=-15)  # it was stopped
    assert told() == ""
    write_job(run, "train", "$ vlm train a\nerror: it does not fit\n", created=2.0)
    assert told() == "error: it does not fit"
    write_job(run, "eval", "$ vlm eval\nerror: no tasks\n", created=3.0)
    assert told() == "eval: error: no tasks"


def test_what_the_fields_hold_becomes_options_of_the_commands(tmp_path: Path):
    write_run(tmp_path / "run", [3.0])
    begun: list[list[str]] = []

    def start(arguments: Sequence[str], log: Path, folder: Path) -> int:
        begun.append(list(arguments))
        return 2**22 + 1

    run = str(tmp_path / "run")
    fields: list[tuple[Any, ...]] = [
        ("best", True, "2GB"), ("export-step-5",), ("export", "", "", [], 0, ""),
        ("export-step-5", "~/a.json", "", ["bleu", "rouge"], 9, ""), ("export", "a.json", "b", [], 0, "second"),
    ]  # fmt: skip
    for name, values in zip(("export", "evaluate", "predict", "predict", "predict"), fields, strict=True):
        act(name, tmp_path, "run", "en", start, values)
    other, here = ["--export", f"{run}/export-step-5"], ["--options", f'output_dir="{run}"']
    data = ["--data", str(Path.home() / "a.json"), "--metric", "bleu", "--metric", "rouge", "--max-records", "9"]
    paths = ["--data", str(Path("a.json").resolve()), "--images", str(Path("b").resolve())]
    assert begun == [
        ["export", run, "--full", "--checkpoint", "best", "--max-shard-size", "2GB"],
        ["eval", run, *other, *here],
        ["predict", run, *here],
        ["predict", run, *other, *data, "--out", f"{run}/predictions-step-5", *here],
        ["predict", run, *paths, "--out", f"{run}/second", *here],
    ]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("export", ("--full",)),
        ("export", ("", False, "2 GB")),
        ("evaluate", ("../other",)),
        ("predict", ("export", "a.json", "", [], -1)),
        ("predict", ("export", "", "", ["bleu"])),
        ("predict", ("export", "a.json", "", [], 0, "-x")),
    ],
)
def test_what_cannot_be_a_value_of_an_option_is_refused(tmp_path: Path, name: Any, values: tuple[Any, ...]):
    write_run(tmp_path / "run", [3.0])
    with pytest.raises(ConfigError):
        act(name, tmp_path, "run", "en", sleeper(), values)


def test_stop_ends_what_was_begun_after_training_and_training_goes_on(tmp_path: Path):
    start = sleeper()
    for kind in ("train", "predict"):
        jobs.begin(tmp_path / "run", kind, [kind], start)
    ended = [jobs.stop(tmp_path / "run")]
    assert start.started[1].wait(timeout=30) == -15
    assert start.started[0].poll() is None
    ended.append(jobs.stop(tmp_path / "run"))
    assert start.started[0].wait(timeout=30) == -15
    assert [job and job.kind for job in ended] == ["predict", None]


def test_an_export_can_be_of_any_checkpoint_that_is_there_and_any_export_be_asked(tmp_path: Path):
    run = write_run(tmp_path / "run", [3.0])
    for step in (2, 10):
        (run / f"checkpoints/step-{step:06}").mkdir(parents=True)
    mark_best(run, 2)
    for name in ("export-step-2", "export"):
        (run / name).mkdir()
        (run / name / "vlm.json").write_text("{}")
    (line,) = watch.list_runs(tmp_path)
    assert checkpoints(line, "en") == [("the newest", ""), ("the best (2)", "best"), ("10", "10"), ("2", "2")]
    assert checkpoints(None, "zh") == [("最新", "")]
    assert exports(line) == [("export", "export"), ("export-step-2", "export-step-2")]
    assert exports(None) == [("export", "export")]


def test_predictions_shown_are_the_file_that_was_written_last(tmp_path: Path):
    assert watch.predictions(tmp_path) == []
    for name, when in (("predictions/a", 10), ("predictions/b", 30), ("other/a", 20), ("samples/x", 40)):
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"number": 0, "prompt": name, "prediction": "<b>", "answers": ["x", "y"]}) + "\n")
        os.utime(file, (when, when))
        if "samples" not in name:  # what lies beside it says that it is one of predictions
            file.with_suffix(".json").write_text("{}")
    (line,) = watch.predictions(tmp_path)
    assert line["prompt"] == "predictions/b"
    page = predictions_html([line, {"number": 1, "record": "r", "score": 0.25}], "en")
    assert re.findall(r"<td>(.*?)</td>", page)[1:3] == ["x / y", "&lt;b&gt;"]
    assert "score 0.2500" in page


def test_the_log_shows_what_a_live_line_said_last(tmp_path: Path):
    (tmp_path / "train.log").write_bytes(b"begun\nstep 1\r\x1b[Kstep 2\r\x1b[Kstep 3\nend\n")
    assert jobs.read_log(tmp_path).split("\n") == ["begun", "\x1b[Kstep 3", "end"]
    assert jobs.read_log(tmp_path, lines=2) == "end"
    assert jobs.read_log(tmp_path / "none") == ""


# What the run folders say


def write_run(run: Path, losses: Sequence[float]) -> Path:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("train: {max_steps: 10, global_batch_size: 4}\n")
    lines = [{"step": step, "loss": loss, "learning_rate": 0.1} for step, loss in enumerate(losses, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_runs_are_drawn_over_each_other_by_their_labels(tmp_path: Path):
    for name, losses in (("a/pretrain", [3.0, 2.0]), ("b", [4.0])):
        write_run(tmp_path / name, losses)
    runs = watch.list_runs(tmp_path)
    assert [(run.label, run.state) for run in runs] == [("a/pretrain", "interrupted"), ("b", "interrupted")]
    assert watch.curves(runs, "loss") == {"a/pretrain": Series([1, 2], [3.0, 2.0]), "b": Series([1], [4.0])}
    assert watch.curves(runs, "none") == {}
    assert watch.numbers_of([run.path for run in runs]) == ["loss", "learning_rate"]


def test_curves_are_drawn_from_the_first_step_to_the_last_and_what_is_not_finite_is_left_out():
    curves = [Curve("<a>", Series([1, 3], [2.0, 1.0])), Curve("b", Series([1, 2], [float("nan"), 1.5]), 1, True)]
    page = chart_html("loss", curves)
    assert re.findall(r"points='([^']*)'", page) == ["64.0,17.6 628.0,208.4", "346.0,113.0"]
    assert re.findall(r"<b>(.*?)</b>", page) == ["1", "1.5"]
    assert "<a>" not in page
    assert chart_html("loss", curves[:0]) == chart_html("loss", [Curve("c", Series([1], [float("inf")]))]) == ""


def test_rewards_have_a_column_where_a_run_has_some(tmp_path: Path):
    for name, last in (("a", {}), ("b", {"reward": 0.625})):
        run = write_run(tmp_path / name, [])
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5} | last) + "\n")
    (tmp_path / "c").mkdir()
    write_job(tmp_path / "c", "train", "", code=None)  # nothing to sum up yet
    runs = watch.list_runs(tmp_path)
    rows = re.findall(r"<tr.*?</tr>", table_html(runs, tmp_path, None, "en"))
    assert [len(re.findall(r"<t[hd]\b", row)) for row in rows] == [9] * 4
    assert "0.6250" in rows[2]
    assert "Reward" not in table_html(runs[:1], tmp_path, None, "en")


def test_samples_are_shown_newest_first_and_a_torn_line_is_left_out(tmp_path: Path):
    lines = [json.dumps({"step": step, "prompt": "?", "answer": "!"}) for step in (10, 20)]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + '\n{"step": 3')
    assert [sample["step"] for sample in watch.samples(tmp_path)] == [20, 10]


def test_figures_are_those_of_vlm_eval(tmp_path: Path):
    assert watch.figures(tmp_path) == ""
    row = {"task": "talk", "metric": "loss", "own": 1.0, "baseline": None, "num_records": 5}
    (tmp_path / "evaluation.json").write_text(json.dumps({"results": [row]}))
    assert "| talk | loss | 1.000 | - | - |  | 5 |" in watch.figures(tmp_path)


# Commands


def test_supervised_tokens_keep_their_colour_and_nothing_of_a_record_is_markup():
    rule, record = "\x1b[92m─── \x1b[0ma.json: record 1: 5 tokens ───", "\x1b[2m<b>\x1b[0m\x1b[36m[image x 4]\x1b[0m"
    output = f"{rule}\n{record}\x1b[1;32mA cat.\x1b[0m\n"
    assert commands.to_html(output) == (
        '<h4>a.json: record 1: 5 tokens</h4><div><span class="read">&lt;b&gt;</span>'
        '<span class="image">[image x 4]</span><span class="reply">A cat.</span></div>'
    )


def test_preview_and_plan_are_the_commands_of_the_terminal():
    asked: list[list[str]] = []

    def call(arguments: Sequence[str]) -> tuple[int, str]:
        asked.append(list(arguments))
        return 0, "[2026-01-01 00:00:00,000] [WARNING] noise\n\x1b[1mfits\x1b[0m: 1 GiB\n"

    draft = Draft(PROJECT).with_value("seed", "3")
    assert commands.plan(draft, call) == "fits: 1 GiB"
    preview = commands.preview(draft, 2, call)
    assert (preview.html, preview.sheet, preview.is_right) == ("<div>fits: 1 GiB</div>", "", True)
    assert asked[0] == ["plan", PROJECT, "--options", "seed=3"]
    assert asked[1][:7] == ["data", "preview", PROJECT, "--options", "seed=3", "-n", "2"]


# The key


async def page(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def ask(guard: KeyGuard, path: str = "/", query: str = "", cookie: str = "") -> tuple[int, dict[str, str]]:
    """Status and headers of its answer."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1:7861"), (b"cookie", cookie.encode())]
    scope = {"type": "http", "path": path, "query_string": query.encode(), "headers": headers}
    asyncio.run(guard(scope, send, send))
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


def test_only_the_browser_with_the_key_gets_in():
    guard = KeyGuard(page, "right")
    for query, cookie in (("", ""), ("key=wrong", ""), ("", "vlm_studio_7861=wrong"), ("", "vlm_studio_7861=right")):
        assert ask(guard, "/", query, cookie)[0] == 401
    assert ask(guard, "/gradio_api/queue/join", "key=right")[0] == 401  # the address opens the page, nothing else
    status, headers = ask(guard, query="key=right")
    assert (status, headers["location"]) == (303, "/")
    assert "HttpOnly" in headers["set-cookie"]
    assert "right" not in headers["set-cookie"]
    assert ask(guard, "/config", cookie=headers["set-cookie"].partition(";")[0])[0] == 200
    assert ask(KeyGuard(page, "right"), "/config", cookie=headers["set-cookie"].partition(";")[0])[0] == 401
