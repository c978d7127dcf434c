"""`vlm predict`: the answers of a model to the records of a file, or of a config's generation tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from vlm.cli.configs import Options
from vlm.cli.options import AdapterOption, BitsOption
from vlm.cli.train import Nproc, config_and_export
from vlm.config import RunConfig, load_config
from vlm.config_checks import load_checked
from vlm.config_paths import is_reward_model
from vlm.errors import ConfigError
from vlm.evaluation.place import beside, name_of
from vlm.evaluation.task_kinds import GenerateTask
from vlm.launch import asked_processes
from vlm.logs import is_logging_rank, warn

_CACHE = "cache/features"  # as data.cache is by default
_TIMEOUT_SECONDS = 1800.0  # for the other processes, in a collective


def register(app: typer.Typer) -> None:
    app.command()(predict)


def predict(
    source: Annotated[str, typer.Argument(help="A config, a run folder, an export, or a model folder.")],
    data: Annotated[
        Path | None, typer.Option(help="A file of records; default: the generate tasks of the config. 数据文件。")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of its images; default: beside the file.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Compare with the answers of --data, such as rouge; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length of an answer to --data.  [64]")] = None,
    max_records: Annotated[int | None, typer.Option(help="Take only the first so many of --data.")] = None,
    export: Annotated[
        Path | None, typer.Option(help="Export or model folder that answers; default: output_dir/export.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the files; default: predictions beside the export.")
    ] = None,
    adapter: AdapterOption = None,
    bits: BitsOption = None,
    nproc: Nproc = None,
    options: Options = None,
) -> int:
    """Write a model's answers to records, or a reward model's scores of their replies, one line of JSON each. The same
    command goes on where it was stopped."""
    flags = {
        "--data": data, "--images": images, "--max-new-tokens": max_new_tokens, "--max-records": max_records,
        "--export": export, "--out": out, "--adapter": adapter, "--bits": bits,
    }  # fmt: skip
    of_data = {**dict([*flags.items()][1:4]), "--metric": metric or None}
    if data is None and (unused := [flag for flag, value in of_data.items() if value is not None]):
        raise ConfigError(f"{unused[0]} is of --data; without it, evaluation.tasks of the config say what is asked")
    if max_records is not None and max_records < 1:
        raise ConfigError(f"--max-records {max_records}: input should be greater than 0")
    for flag, path in (("--data", data), ("--images", images)):
        if path is not None and not path.exists():
            raise ConfigError(f"{flag} {path} does not exist; looked for from {Path.cwd()}")
    config, folder = _read(source, options or (), is_asked=data is None)
    folder = export or folder
    into = out or beside(folder, adapter, bits, "answers") / "predictions"
    if is_reward_model(folder):
        _refuse_to_write(
            folder, data, {"--metric": metric, "--max-new-tokens": max_new_tokens, "--adapter": adapter, "--bits": bits}
        )
        tasks = []
    elif data is None:
        tasks = _tasks_of(config)
    else:
        tasks = [_task_of(data, images, metric or (), max_new_tokens, max_records)]
    nproc = asked_processes() if nproc is None else nproc
    if nproc is not None:
        return _launch(nproc, source, {**flags, **{"--metric": metric or None}}, options or ())
    files = _work(tasks, config, folder, into, adapter, bits, data, images, max_records)
    if is_logging_rank():
        for file in files:
            print(file)
    return 0


def _work(
    tasks: Sequence[GenerateTask], config: RunConfig | None, folder: Path, out: Path, adapter: Path | None,
    bits: int | None, data: Path | None, images: Path | None, max_records: int | None,
) -> list[Path]:  # fmt: skip
    """Write the files. Without tasks the folder scores the replies of `data`."""
    from vlm.distributed import process_group
    from vlm.evaluation.predictions import predict as write
    from vlm.evaluation.scores import score_file
    from vlm.train.engines.device import choose_device

    cache = Path(_CACHE if config is None else config.data.cache)
    seed = 0 if config is None else config.evaluation.seed
    device = choose_device("auto")
    with process_group(device, _TIMEOUT_SECONDS):
        if tasks:
            return write(tasks, folder, out, cache, seed, adapter, str(device), bits)
        assert data is not None
        return [score_file(data, images, max_records, folder, out, cache, str(device))]


def _refuse_to_write(folder: Path, data: Path | None, given: Mapping[str, Any]) -> None:
    if data is None:
        raise ConfigError(f"{folder} is a reward model, which scores replies: give a file of them with --data")
    if unused := [flag for flag, value in given.items() if value]:
        raise ConfigError(f"{unused[0]} is of a model that writes; {folder} is a reward model, which scores replies")


def _read(source: str, options: Sequence[str], is_asked: bool) -> tuple[RunConfig | None, Path]:
    """The config, if there is one, and the folder that answers.

    Args:
        is_asked: the config's tasks are, so that their files must be there.
    """
    folder = Path(source)
    around = folder.parent if (folder / "vlm.json").is_file() else folder
    has_run = (around / "config.yaml").is_file()
    if folder.is_dir() and not has_run:
        if options:
            raise ConfigError(f"--options are of a config, and {source} has none")
        return None, folder
    path, found = config_and_export(source)
    try:
        config = load_checked(path, options, ("evaluation",), ()) if is_asked else load_config(path, options)
    except ConfigError as error:
        if is_asked or options or found is None:
            raise
        warn(f"the run's config is not used, only its export: {error}")  # a seed and a cache, with defaults
        return None, found
    return config, found or Path(config.output_dir) / "export"


def _tasks_of(config: RunConfig | None) -> list[GenerateTask]:
    tasks = [] if config is None else [task for task in config.evaluation.tasks if isinstance(task, GenerateTask)]
    if not tasks:
        raise ConfigError(
            "nothing to answer: give a file of records with --data, or a config whose evaluation.tasks has some of "
            "kind generate (docs/evaluation.md)"
        )
    return tasks


def _task_of(
    data: Path, images: Path | None, metrics: Sequence[str], max_new_tokens: int | None, max_records: int | None
) -> GenerateTask:
    given = {"max_new_tokens": max_new_tokens, "max_records": max_records, "images": images and str(images)}
    values = {"name": name_of(data), "path": str(data), "metrics": list(metrics)}
    try:
        return GenerateTask.model_validate(values | {key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        flag = "metric" if first["loc"][0] == "metrics" else str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{flag} {first['input']}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


def _launch(nproc: int, source: str, flags: Mapping[str, Any], options: Sequence[str]) -> int:
    """The same command in several processes. Returns the exit code."""
    if nproc < 1:
        raise ConfigError(f"--nproc {nproc}: expected at least 1")
    from vlm.cli.launch import Launch, launch

    given = [(flag, each) for flag, value in flags.items() for each in (value if isinstance(value, list) else [value])]
    arguments = [part for flag, value in given if value is not None for part in (flag, str(value))]
    return launch(Launch(nproc), ["predict", source, *arguments, *(p for each in options for p in ("--options", each))])
