"""Where the numbers of a run go beside metrics.jsonl: TensorBoard, W&B, trackio, SwanLab, MLflow.

A tracker takes numbers by step. None is opened unless `train.trackers` names it, and each keeps what it gets below the
run folder, without a network, unless `train.trackers_online` is set too: then it goes where its own login says.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from vlm.errors import ConfigError, MissingPackageError
from vlm.logs import log, warn
from vlm.train.config import TrainConfig


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class TrackerKind:
    package: str
    open: Callable[[Path, bool], Tracker]  # run folder, and whether to send
    shows: str  # command that shows or sends what lies in the run folder


def check_trackers(config: TrainConfig) -> None:
    """Raises MissingPackageError naming the pip command, ConfigError where there is nothing to send to."""
    for name in tracker_names(config):
        if find_spec(TRACKERS[name].package) is None:
            key = "train.tensorboard" if name not in config.trackers else f"train.trackers: {name}"
            raise MissingPackageError(TRACKERS[name].package, key, "track" if name == "tensorboard" else name)
    if config.trackers_online and "mlflow" in config.trackers and "MLFLOW_TRACKING_URI" not in os.environ:
        raise ConfigError("train.trackers_online: mlflow needs the server's address in MLFLOW_TRACKING_URI")
    if config.trackers_online and "trackio" in config.trackers and "TRACKIO_SPACE_ID" not in os.environ:
        raise ConfigError("train.trackers_online: trackio needs the Space to send to in TRACKIO_SPACE_ID, owner/name")


def tracker_names(config: TrainConfig) -> list[str]:
    """`train.trackers`, and TensorBoard where `train.tensorboard` asks for it."""
    return list(dict.fromkeys([*(["tensorboard"] if config.tensorboard else []), *config.trackers]))


class Trackers:
    """All trackers of a run. One that fails is told once and left out; the run goes on."""

    def __init__(self, names: Sequence[str], run: Path, online: bool = False) -> None:
        self._open: dict[str, Tracker] = {}
        self._run, self._online = run, online
        for name in names:
            self._try(name, partial(self._begin, name))

    def log(self, step: int, line: Mapping[str, Any]) -> None:
        """The numbers of a line of metrics.jsonl."""
        values = {
            key: float(value)
            for key, value in line.items()
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for name, tracker in [*self._open.items()]:
            self._try(name, partial(tracker.log, step, values))

    def close(self) -> None:
        """Finish all, and say what shows the numbers that lie in the run folder."""
        for name, tracker in [*self._open.items()]:
            self._try(name, tracker.close)
            if not self._online and name in self._open:
                log(f"tracker {name}: {TRACKERS[name].shows.format(run=self._run)}")
        self._open.clear()

    def _begin(self, name: str) -> None:
        self._open[name] = TRACKERS[name].open(self._run, self._online)

    def _try(self, name: str, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # of someone else's program: a server that is away, a full disk
            self._open.pop(name, None)
            warn(f"tracker {name}: {type(error).__name__}: {error}. It gets nothing more; metrics.jsonl has everything")


class _TensorBoard:
    def __init__(self, run: Path, online: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, run: Path, online: bool) -> None:
        _keep_to_itself(online)
        import wandb

        project, name = project_and_name(run)
        self.run = wandb.init(
            project=project, name=name, id=run_id(run), resume="allow", dir=str(run),
            mode="online" if online else "offline",
            settings=wandb.Settings(
                save_code=False, disable_git=True, console="off", silent=True, x_disable_stats=True
            ),
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    def __init__(self, run: Path, online: bool) -> None:
        os.environ["TRACKIO_DIR"] = str(run.resolve() / "trackio")  # read when it is imported
        import trackio

        project, name = project_and_name(run)
        place = {"space_id": os.environ["TRACKIO_SPACE_ID"]} if online else {"embed": False}
        self.run = trackio.init(
            project=project, name=name, resume="allow", auto_log_gpu=False, auto_log_cpu=False, **place
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class _SwanLab:
    def __init__(self, run: Path, online: bool) -> None:
        import swanlab

        project, name = project_and_name(run)
        (run / "swanlab").mkdir(exist_ok=True)
        self.run = swanlab.init(
            project=project, name=name, id=run_id(run), resume="allow", log_dir=str(run / "swanlab"),
            mode="online" if online else "offline",
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    def __init__(self, run: Path, online: bool) -> None:
        _keep_to_itself(online)
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        project, name = project_and_name(run)
        self.metric = Metric
        self.client = MlflowClient(None if online else f"sqlite:///{run.resolve() / 'mlflow.db'}")
        found = self.client.get_experiment_by_name(project)
        experiment = self.client.create_experiment(project) if found is None else found.experiment_id
        before = self.client.search_runs([experiment], f"attributes.run_name = '{name}'", max_results=1)
        started = before[0] if before else self.client.create_run(experiment, run_name=name)
        self.run_id = started.info.run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.metric(key, value, now, step) for key, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


TRACKERS: dict[str, TrackerKind] = {
    "tensorboard": TrackerKind("tensorboard", _TensorBoard, "tensorboard --logdir {run}/tensorboard"),
    "wandb": TrackerKind("wandb", _Wandb, "wandb sync {run}/wandb/offline-run-*"),
    "trackio": TrackerKind("trackio", _Trackio, "TRACKIO_DIR={run}/trackio trackio show"),
    "swanlab": TrackerKind("swanlab", _SwanLab, "swanlab sync {run}/swanlab/run-*"),
    "mlflow": TrackerKind("mlflow", _MLflow, "mlflow ui --backend-store-uri sqlite:///{run}/mlflow.db"),
}


def _keep_to_itself(online: bool) -> None:
    """Without a word of use or errors to their makers, which some send however they are opened."""
    if not online:
        for name, value in (
            ("WANDB_ERROR_REPORTING", "false"), ("MLFLOW_DISABLE_TELEMETRY", "true"), ("DO_NOT_TRACK", "true"),
        ):  # fmt: skip
            os.environ.setdefault(name, value)


def project_and_name(run: Path) -> tuple[str, str]:
    """What trackers call a run, by the last two parts of its folder.

    >>> project_and_name(Path("cache/runs/my vlm/pretrain"))
    ('my-vlm', 'pretrain')
    """
    project, name = (["vlm", *run.resolve().parts])[-2:]
    return _spelled(project) or "vlm", name


def run_id(run: Path) -> str:
    """The same for all launches of a run, so that a resumed one goes on under it."""
    return _spelled("-".join(run.resolve().parts[-2:]))


def _spelled(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")
