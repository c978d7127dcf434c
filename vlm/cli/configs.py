"""`vlm ls | cp | show | validate | config-schema`: answer without importing torch."""

from __future__ import annotations

import fnmatch
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from vlm.cli.options import AsJson
from vlm.config import (
    find_config,
    json_schema,
    load_config,
    project_folders,
    read_source,
    resolve_for_log,
    shipped_projects,
)
from vlm.config_checks import load_checked, run_notes
from vlm.config_paths import model_paths
from vlm.errors import ConfigError
from vlm.layered_yaml import dotted, spans_of

Config = Annotated[str, typer.Argument(help="A YAML file, or a shipped project such as quickstart/pretrain.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--options", "--cfg-options", "-o", help="Override keys: train.learning_rate=1e-4 seed=1"),
]


def register(app: typer.Typer) -> None:
    for command in (ls, cp, show, validate):
        app.command()(command)
    app.command("config-schema")(config_schema)


def ls(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern such as llava*.")] = "",
    part: Annotated[str, typer.Option("--pattern", "-p", help="The same.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the shipped projects."""
    if pattern and part:
        raise ConfigError(f"{pattern} and --pattern {part}: give one of them")
    pattern = pattern or part
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    names = [name for name in shipped_projects() if fnmatch.fnmatch(name, wanted)]
    if not names:
        found = "no project matches" if shipped_projects() else "no projects folder here; run this in the repository"
        raise ConfigError(f"{found} {pattern}".rstrip())
    print(json.dumps(names, indent=2) if as_json else "\n".join(names))


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
    for note in run_notes(checked):
        print(f"note: {note}")
    print(f"{config}: valid")


def config_schema() -> None:
    """Print the JSON schema of a config, for editors."""
    print(json.dumps(json_schema(), indent=2))


def _files_of(name: str) -> list[Path]:
    """A shipped project's YAML files, or one of them."""
    for folder in project_folders():
        project = folder / name
        files = sorted(project.glob("*.yaml"))
        if files and project.parent == folder:
            return files
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
