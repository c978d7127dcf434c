"""`vlm ls | cp | show | validate | config-schema`: answer without importing torch."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from vlm.cli.model_checks import READS, model_notes, model_problems
from vlm.config import (
    RunConfig,
    find_config,
    json_schema,
    load_config,
    project_folders,
    raise_problems,
    read_source,
    resolve_for_log,
    shipped_projects,
)
from vlm.errors import ConfigError
from vlm.launch import launched_rank, local_rank
from vlm.layered_yaml import Key, dotted, spans_of
from vlm.models.hub import is_local

Config = Annotated[str, typer.Argument(help="A YAML file, or a shipped project such as quickstart/pretrain.")]
_NO_HUB_NAME = "A name for a model hub has no leading . / ~ or cache/, and at most one /"
Options = Annotated[
    list[str] | None,
    typer.Option("--options", "--cfg-options", "-o", help="Override keys: train.learning_rate=1e-4 seed=1"),
]


def register(app: typer.Typer) -> None:
    for command in (ls, cp, show, validate):
        app.command()(command)
    app.command("config-schema")(config_schema)


def ls(pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern such as llava*.")] = "") -> None:
    """List the shipped projects."""
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    names = [name for name in shipped_projects() if fnmatch.fnmatch(name, wanted)]
    if not names:
        found = "no project matches" if shipped_projects() else "no projects folder here; run this in the repository"
        raise ConfigError(f"{found} {pattern}".rstrip())
    for name in names:
        print(name)


def cp(
    name: Annotated[str, typer.Argument(help="A shipped project, or one of its files.")],
    folder: Annotated[Path, typer.Argument(help="Where the copy goes.")],
) -> None:
    """Copy a shipped project's YAML files with the base files they need. Its `name:` becomes the folder's name."""
    files = _files_of(name)
    targets = _copy_targets(files, folder)
    taken = [str(target) for target in targets.values() if target.exists()]
    if taken:
        raise ConfigError(f"{taken[0]} exists already; name another folder, or remove it")
    for file, target in targets.items():
        text = file.read_text(encoding="utf-8")
        bases = {name: (file.parent / name).resolve() for _, _, name in spans_of(text, "base")}
        moved = {name: os.path.relpath(targets[base], target.parent) for name, base in bases.items()}
        text = _replace(text, "base", moved)
        new_name = json.dumps(folder.resolve().name, ensure_ascii=False)  # quoted: it may look like a number
        text = _replace(text, "name", {name: new_name for _, _, name in spans_of(text, "name")})
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        print(target)
    for target in targets.values():
        if target.parent == folder and read_source(target).get(("name",)) is None:
            print(f"note: {target} still has the original's output_dir; change it")
    readme = files[0].parent / "README.md"
    if readme.is_file():  # not copied: its commands, links and results are the original's
        print(f"note: data, commands and memory of the original: {readme}")


def show(config: Config, options: Options = None) -> None:
    """Print a config with its bases and overrides merged. `${...}` stays: it may hold a secret."""
    load_config(config, options or ())
    print(resolve_for_log(config, options or ()), end="")


def validate(config: Config, options: Options = None) -> None:
    """Check a config, every path in it, and what its models' folders hold, loading nothing."""
    checked = load_checked(config, options or ())
    for key, path in model_paths(checked):
        if not Path(path).exists():
            print(f"note: {dotted(key)} {path} is taken for a name, found or fetched when the run starts")
    for note in model_notes(checked):
        print(f"note: {note}")
    print(f"{config}: valid")


def config_schema() -> None:
    """Print the JSON schema of a config, for editors."""
    print(json.dumps(json_schema(), indent=2))


def load_checked(
    config: str, options: Sequence[str] = (), sections: Collection[str] = (), reads: Collection[str] = READS
) -> RunConfig:
    """Read a config and see whether its paths exist, as `vlm validate` does, before anything heavy is imported.

    Args:
        sections: check only paths below these keys, e.g. ("model", "data"), where a command reads no others.
        reads: of models' folders besides config.json, "weights" and "tokenizer".

    Raises:
        ConfigError: names every problem with its file and line.
    """
    try:
        checked = load_config(config, options)
    except ConfigError as error:
        raise error.on_every_rank() from None
    source = read_source(config, options)
    found = [(key, text) for key, text in path_problems(checked, reads) if not sections or key[0] in sections]
    problems = [f"{source.place(key)}: {dotted(key)}: {text}" for key, text in found]
    if problems:
        try:
            raise_problems(config, problems, f"Relative paths are looked for in {Path.cwd()}")
        except ConfigError as error:
            if launched_rank() == local_rank() or local_rank() > 0:  # each machine has its own disk: one there speaks
                error.on_every_rank()
            raise
    return checked


def path_problems(config: RunConfig, reads: Collection[str] = READS) -> list[tuple[Key, str]]:
    """Paths that do not exist or hold no model, as (key, message). Of models, text files are opened, weights not.

    Args:
        reads: what the command will read of models' folders besides config.json.
    """
    problems: list[tuple[Key, str]] = []
    for key, path, what in _paths(config):
        if path is not None and not Path(path).exists():
            problems.append((key, f"{what} {path} does not exist"))
    for key, path in model_paths(config):
        if is_local(path) and not Path(path).exists():
            problems.append((key, f"{path} does not exist. {_NO_HUB_NAME}"))
    problems += model_problems(config, reads)
    if config.init_from is not None and not Path(config.init_from).exists():
        problems.append((("init_from",), f"{config.init_from} does not exist; train and export the stage before first"))
    output = Path(config.output_dir)
    nearest = next((folder for folder in (output, *output.parents) if folder.exists()), Path("."))
    if not nearest.is_dir():
        problems.append((("output_dir",), f"{nearest} is a file"))
    elif not os.access(nearest, os.W_OK):
        problems.append((("output_dir",), f"{nearest} cannot be written to"))
    return problems


def model_paths(config: RunConfig) -> Iterator[tuple[Key, str]]:
    """Names or folders of models."""
    yield ("model", "llm", "path"), config.model.llm.path
    if config.model.vision is not None:
        yield ("model", "vision", "path"), config.model.vision.path
        if config.model.vision.pretrained is not None:
            yield ("model", "vision", "pretrained"), config.model.vision.pretrained


def _paths(config: RunConfig) -> Iterator[tuple[Key, str | None, str]]:
    for name in ("sources", "eval_sources"):
        for number, entry in enumerate(getattr(config.data, name)):
            yield ("data", name, number, "path"), entry.path, "data file"
            yield ("data", name, number, "images"), entry.images, "images folder"
    for number, task in enumerate(config.evaluation.tasks):
        yield ("evaluation", "tasks", number, "path"), task.path, "data file"
        yield ("evaluation", "tasks", number, "images"), task.images, "images folder"
    for number, sample in enumerate(config.train.samples):
        yield ("train", "samples", number, "image"), sample.image, "image"


def _files_of(name: str) -> list[Path]:
    """A shipped project's YAML files, or one of them."""
    for folder in project_folders():
        project = folder / name
        if project.is_dir() and project.parent == folder:
            return sorted(project.glob("*.yaml"))
    if name not in shipped_projects():
        find_config(name)  # raises for a name that is nothing, and names the nearest
    return [find_config(name)]


def _copy_targets(files: list[Path], folder: Path) -> dict[Path, Path]:
    """Every file with its bases -> where it goes: beside the others, or, from another folder, into base/."""
    home = files[0].resolve().parent
    targets: dict[Path, Path] = {}
    waiting = [file.resolve() for file in files]
    while waiting:
        file = waiting.pop(0)
        if file in targets:
            continue
        target = folder / file.name if file.parent == home else folder / "base" / file.name
        if target in targets.values():
            raise ConfigError(f"{file}: another base file has the name {file.name}; copy the project by hand")
        targets[file] = target
        names = spans_of(file.read_text(encoding="utf-8"), "base")
        waiting += [(file.parent / name).resolve() for _, _, name in names]
    return targets


def _replace(text: str, key: str, values: dict[str, str]) -> str:
    """Rewrite the values of a top-level key in place; comments and layout stay."""
    for start, end, old in reversed(spans_of(text, key)):
        text = text[:start] + values[old] + text[end:]
    return text
