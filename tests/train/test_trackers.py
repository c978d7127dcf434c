"""Trackers get the numbers of metrics.jsonl, keep them in the run folder, and never stop a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest

from vlm.errors import ConfigError, MissingPackageError
from vlm.run import train
from vlm.train import trackers
from vlm.train.config import TrainConfig
from vlm.train.trackers import TRACKERS, TrackerKind, Trackers, check_trackers


class Fake:
    """A tracker's module: what it is asked, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fails_at: int | None = None

    def init(self, **settings: Any) -> Fake:
        self.calls.append(("init", settings))
        return self

    def log(self, values: dict, step: int) -> None:
        if step == self.fails_at:
            raise OSError("no space left")
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


class FakeMLflow:
    """Its client."""

    def __init__(self, calls: list[tuple[str, Any]], address: str | None) -> None:
        self.calls = calls
        calls.append(("init", {"address": address}))

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return name

    def search_runs(self, experiments: list[str], query: str, max_results: int) -> list:
        return []

    def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
        return SimpleNamespace(info=SimpleNamespace(run_id=f"{experiment}/{run_name}"))

    def log_batch(self, run_id: str, metrics: list) -> None:
        self.calls.append(("log", (metrics[0][3], {key: value for key, value, _, _ in metrics})))

    def set_terminated(self, run_id: str) -> None:
        self.calls.append(("finish", None))


def install(name: str, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A fake of the package in its place."""
    fake, module = Fake(), ModuleType(name)
    module.init = fake.init
    module.Settings = dict
    monkeypatch.setitem(sys.modules, name, module)
    if name == "mlflow":
        entities, tracking = ModuleType("mlflow.entities"), ModuleType("mlflow.tracking")
        entities.Metric = lambda *values: values
        tracking.MlflowClient = lambda address: FakeMLflow(fake.calls, address)
        monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
        monkeypatch.setitem(sys.modules, "mlflow.tracking", tracking)
    monkeypatch.setattr(trackers, "find_spec", lambda package: object())
    for variable in ("TRACKIO_DIR", "WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(variable, "")  # so that what is set is undone
    return fake


class Table:
    """The example of docs/extending.md."""

    def __init__(self, run: Path, online: bool) -> None:
        self.file = (run / "table.tsv").open("a")

    def log(self, step: int, values: dict) -> None:
        self.file.writelines(f"{step}\t{name}\t{value}\n" for name, value in values.items())

    def close(self) -> None:
        self.file.close()


def test_a_new_tracker_is_a_class_and_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(TRACKERS, "table", TrackerKind("csv", Table, "less {run}/table.tsv"))
    opened = Trackers(["table"], tmp_path)
    opened.log(1, {"step": 1, "loss": 2.5})
    opened.close()
    assert (tmp_path / "table.tsv").read_text() == "1\tloss\t2.5\n"
    assert capsys.readouterr().err == f"tracker table: less {tmp_path}/table.tsv\n"


def test_the_config_names_those_that_there_are():
    (names, _) = get_args(TrainConfig.model_fields["trackers"].annotation)
    assert get_args(names) == tuple(TRACKERS)


PROGRAMS = [name for name in TRACKERS if name != "tensorboard"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_gets_the_numbers_by_step_and_sends_nothing(name, monkeypatch, tmp_path):
    fake, run = install(name, monkeypatch), tmp_path / "my vlm/pretrain"
    run.mkdir(parents=True)
    opened = Trackers([name], run)
    opened.log(3, {"step": 3, "loss": 2, "grad_norm": None, "note": "text", "is_last": True, "epoch": 0.5})
    opened.close()
    (_, settings), *rest = fake.calls
    assert rest == [("log", (3, {"loss": 2.0, "epoch": 0.5})), ("finish", None)]
    place = {
        "wandb": ("mode", "offline"),
        "trackio": ("embed", False),
        "swanlab": ("mode", "offline"),
        "mlflow": ("address", f"sqlite:///{run}/mlflow.db"),
    }[name]
    assert settings[place[0]] == place[1]
    assert name == "mlflow" or (settings["project"], settings["name"]) == ("my-vlm", "pretrain")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_missing_one_is_named_with_its_pip_line(name, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(MissingPackageError, match=rf"train\.trackers: {name} needs {name}.*'\.\[{name}\]'"):
        check_trackers(TrainConfig(max_steps=1, trackers=(name,)))


def test_sending_is_asked_for_and_says_where_to(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda package: object())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        check_trackers(TrainConfig(max_steps=1, trackers=("mlflow",), trackers_online=True))
    with pytest.raises(ValueError, match="name those that may send"):
        TrainConfig(max_steps=1, trackers_online=True)


@pytest.mark.slow
def test_a_run_reports_to_those_it_names_and_goes_on_when_one_fails(config_file, monkeypatch, capsys):
    wandb, swanlab = install("wandb", monkeypatch), install("swanlab", monkeypatch)
    trackio = install("trackio", monkeypatch)
    swanlab.fails_at = 2
    path = config_file(train__max_steps=3, train__prove=False, train__trackers=["wandb", "swanlab"])
    from vlm.config import load_config

    run = train(load_config(path), path.read_text())
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    sent = [values["loss"] for kind, (_, values) in ((k, v) for k, v in wandb.calls if k == "log") if kind]
    assert sent == [line["loss"] for line in lines]
    assert [kind for kind, _ in swanlab.calls] == ["init", "log"]
    assert "tracker swanlab: OSError: no space left" in capsys.readouterr().err
    assert trackio.calls == []
