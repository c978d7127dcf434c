"""`vlm ls | cp | show | validate | config-schema`: answer without importing torch."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from vlm.config import RunConfig, config_for_log, find_config, load_config, read_source, shipped_projects
from vlm.errors import ConfigError

Config = Annotated[str, typer.Argument(help="A YAML file, or a shipped project such as quickstart/pretrain.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--options", "--cfg-options", "-o", help="Override a key: train.learning_rate=1e-4. Repeatable."),
]


def register(app: typer.Typer) -> None:
    for command in (ls, cp, show, validate):
        app.command()(command)
    app.command("config-schema")(config_schema)


def ls(pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern such as llava*.")] = "") -> None:
    """List the shipped projects."""
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    for name in shipped_projects():
        if fnmatch.fnmatch(name, wanted):
            print(name)


def cp(
    name: Annotated[str, typer.Argument(help="A shipped project, or one of its files.")],
    folder: Annotated[Path, typer.Argument(help="Where the copy goes.")],
) -> None:
    """Copy a shipped project, each file with its bases folded in, so that the copy stands alone."""
    names = [shipped for shipped in shipped_projects() if name in (shipped, shipped.partition("/")[0])]
    if not names:
        find_config(name)  # raises, naming the nearest
    folder.mkdir(parents=True, exist_ok=True)
    for shipped in names:
        target = folder / f"{shipped.rpartition('/')[2]}.yaml"
        if target.exists():
            raise ConfigError(f"{target} exists already; name another folder, or remove it")
        target.write_text(f"# from {shipped}\n{config_for_log(shipped)}", encoding="utf-8")
        print(target)
    for readme in {find_config(shipped).parent / "README.md" for shipped in names}:
        if readme.exists():
            shutil.copy(readme, folder / "README.md")


def show(config: Config, options: Options = None) -> None:
    """Print a config with its bases and overrides merged. Secrets stay `${oc.env:...}`."""
    load_config(config, options or ())
    print(config_for_log(config, options or ()), end="")


def validate(config: Config, options: Options = None) -> None:
    """Check a config and the existence of every path in it, loading nothing."""
    checked = load_config(config, options or ())
    source = read_source(config, options or ())
    problems = [f"  {source.place(key)}: {'.'.join(map(str, key))}: {text}" for key, text in path_problems(checked)]
    if problems:
        raise ConfigError(f"{len(problems)} problem(s) in {config}:\n" + "\n".join(problems))
    print(f"{config}: valid")


def config_schema() -> None:
    """Print the JSON schema of a config, for editors."""
    print(json.dumps(RunConfig.model_json_schema(), indent=2))


def path_problems(config: RunConfig) -> list[tuple[tuple[str | int, ...], str]]:
    """Paths that do not exist, as (key, message). A model path without a leading . / ~ or cache/ may be a hub name."""
    problems: list[tuple[tuple[str | int, ...], str]] = []

    def check(key: tuple[str | int, ...], path: str | None, what: str) -> None:
        if path is not None and not Path(path).expanduser().exists():
            problems.append((key, f"{what} {path} does not exist"))

    for name in ("sources", "eval_sources"):
        for number, entry in enumerate(getattr(config.data, name)):
            check(("data", name, number, "path"), entry.path, "data file")
            check(("data", name, number, "images"), entry.images, "images folder")
    for number, task in enumerate(config.evaluation.tasks):
        check(("evaluation", "tasks", number, "path"), task.path, "data file")
        check(("evaluation", "tasks", number, "images"), task.images, "images folder")
    for number, sample in enumerate(config.train.samples):
        check(("train", "samples", number, "image"), sample.image, "picture")
    check(("init_from",), config.init_from, "export")
    if is_local(config.model.llm.path):
        check(("model", "llm", "path"), config.model.llm.path, "model folder")
    if config.model.vision is not None and is_local(config.model.vision.path):
        check(("model", "vision", "path"), config.model.vision.path, "model folder")
    parent = next(folder for folder in (Path(config.output_dir), *Path(config.output_dir).parents) if folder.exists())
    if not os.access(parent, os.W_OK) or not parent.is_dir():
        problems.append((("output_dir",), f"{parent} cannot be written to"))
    return problems


def is_local(path: str) -> bool:
    """
    >>> is_local("cache/ckpt/x"), is_local("./x"), is_local("Qwen/Qwen2.5-7B-Instruct"), is_local("vit_base")
    (True, True, False, False)
    """
    return path.startswith((".", "/", "~", "cache/"))
