"""The config of a run: YAML with inheritance and overrides -> one typed, frozen tree.

Everything that is wrong is reported at once, each problem with the file and line where the value was written.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from vlm.data.config import DataConfig
from vlm.errors import ConfigError
from vlm.evaluation.config import EvaluationConfig
from vlm.models.config import ModelConfig
from vlm.schema import Section
from vlm.train.config import EngineConfig, TrainConfig

Key = tuple[str | int, ...]


class RunConfig(Section):
    """All that decides a run."""

    output_dir: str
    """The run's folder; checkpoints, logs and export go there."""
    seed: NonNegativeInt = 0
    init_from: str | None = None
    """An export whose trained parts this run starts from."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)


@dataclass
class Source:
    """A config as written: merged values, interpolations kept, and where each key was written."""

    values: dict[str, Any]
    places: dict[Key, str] = field(default_factory=dict)  # key -> "file:line"

    def place(self, key: Key) -> str:
        """Where `key` was written, or else the nearest key around it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, "config")


def load_config(path: str | Path, options: Sequence[str] = ()) -> RunConfig:
    """Read, merge, resolve and validate.

    Args:
        path: a YAML file, or the name of a shipped project such as "quickstart/pretrain".
        options: overrides `a.b=value`; values are read as YAML.

    Raises:
        ConfigError: lists every problem with its place, what was found, what is allowed, and the nearest known key.
    """
    source = read_source(path, options)
    try:
        values = OmegaConf.to_container(OmegaConf.create(source.values), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain_interpolation(error, source)) from None
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = [_describe(problem, source) for problem in error.errors()]
        raise ConfigError(
            f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {path}:\n" + "\n".join(problems)
        ) from None


def config_for_log(path: str | Path, options: Sequence[str] = ()) -> str:
    """The merged config as YAML, interpolations unresolved: what `${oc.env:...}` brings is never written down."""
    return OmegaConf.to_yaml(OmegaConf.create(read_source(path, options).values), resolve=False)


def find_config(name: str | Path) -> Path:
    """A config file, or a shipped project by name: `quickstart/pretrain` is `projects/quickstart/pretrain.yaml`.

    Raises:
        ConfigError: there is none; names the nearest shipped ones.
    """
    path = Path(name)
    if path.is_file():
        return path
    for folder in project_folders():
        for candidate in (folder / path, folder / f"{path}.yaml"):
            if candidate.is_file():
                return candidate
    near = difflib.get_close_matches(str(name), shipped_projects(), n=3, cutoff=0.4)
    hint = f" Nearest shipped: {', '.join(near)}." if near else ""
    raise ConfigError(f"config {name} does not exist.{hint} `vlm ls` lists the shipped ones")


def project_folders() -> list[Path]:
    """Where shipped projects are: below the current folder, else in the repository that this package lies in."""
    here = Path("projects")
    shipped = Path(__file__).resolve().parents[1] / "projects"
    return [folder for folder in dict.fromkeys((here, shipped)) if folder.is_dir()]


def shipped_projects() -> list[str]:
    """Names of all shipped configs, base files left out."""
    names = {
        path.relative_to(folder).with_suffix("").as_posix()
        for folder in project_folders()
        for path in folder.glob("*/*.yaml")
    }
    return sorted(name for name in names if not name.startswith("base/"))


def read_source(path: str | Path, options: Sequence[str] = ()) -> Source:
    """Merge a file with its bases and the overrides, nothing resolved or validated."""
    source = _read_file(find_config(path), ())
    for option in options:
        _apply(option, source)
    return source


def _read_file(path: Path, children: tuple[Path, ...]) -> Source:
    resolved = path.resolve()
    if resolved in children:
        chain = " -> ".join(p.name for p in (*children, resolved))
        raise ConfigError(f"{path}: its base files form a circle: {chain}")
    if not path.is_file():
        raise ConfigError(f"{children[-1] if children else path}: base file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {str(error)[:400]}") from None
    own = Source({})
    if node is not None:
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}: the file must hold keys and values")
        own.values = _convert(node, path, (), own.places)
    bases = own.values.pop("base", [])
    merged = Source({})
    for base in [bases] if isinstance(bases, str) else bases:
        _merge(merged, _read_file(path.parent / base, (*children, resolved)))
    _merge(merged, own)
    return merged


def _merge(target: Source, over: Source) -> None:
    target.values = OmegaConf.to_container(
        OmegaConf.merge(OmegaConf.create(target.values), OmegaConf.create(over.values)), resolve=False
    )
    target.places |= over.places


def _apply(option: str, source: Source) -> None:
    key, equals, text = option.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--options {option!r}: expected key=value, e.g. train.learning_rate=1e-4")
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--options {option!r}: the value is not YAML ({str(error)[:120]})") from None
    path: Key = tuple(key.strip().split("."))
    value = None if node is None else _convert(node, Path("--options"), path, {})
    values: Any = source.values
    for name in path[:-1]:
        values = _child(values, name, option)
    last = path[-1]
    if isinstance(values, list):
        values[_list_index(values, last, option)] = value
    else:
        values[last] = value
    for place in [place for place in source.places if _starts(place, path)]:
        del source.places[place]
    source.places[tuple(int(part) if str(part).isdecimal() else part for part in path)] = f"--options {key}"


def _child(values: Any, name: str | int, option: str) -> Any:
    if isinstance(values, list):
        return values[_list_index(values, name, option)]
    child = values.get(name)
    if not isinstance(child, dict | list):
        child = values[name] = {}
    return child


def _list_index(values: list[Any], name: str | int, option: str) -> int:
    if not str(name).isdecimal() or int(name) >= len(values):
        raise ConfigError(f"--options {option!r}: {name!r} is no place in a list of {len(values)}")
    return int(name)


def _starts(place: Key, prefix: Key) -> bool:
    return tuple(map(str, place[: len(prefix)])) == tuple(map(str, prefix))


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-4` is a number; `no`, `on` and `12:30` are text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str")}


def _convert(node: yaml.Node, path: Path, key: Key, places: dict[Key, str]) -> Any:
    """A YAML node as plain values, noting the place of every key. Refuses tags and repeated keys."""
    place = f"{path}:{node.start_mark.line + 1}"
    places.setdefault(key, place)
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            name, line = str(key_node.value), key_node.start_mark.line + 1
            if name in values:
                raise ConfigError(f"{path}:{line}: key {name!r} stands twice, first in line {lines[name]}")
            lines[name] = line
            places[(*key, name)] = f"{path}:{line}"
            values[name] = _convert(value_node, path, (*key, name), places)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_convert(item, path, (*key, number), places) for number, item in enumerate(node.value)]
    if node.tag not in _SCALARS:
        raise ConfigError(f"{place}: tag {node.tag} is not allowed in a config; it could make objects or run code")
    constructor = yaml.SafeLoader("")
    if node.tag.endswith(":float"):
        return float(node.value)
    return constructor.construct_object(node)


def _describe(problem: Any, source: Source) -> str:
    key: Key = tuple(problem["loc"])
    place, name = source.place(key), ".".join(map(str, key))
    if problem["type"] == "extra_forbidden":
        known = list(_known_keys(RunConfig, key[:-1]))
        near = difflib.get_close_matches(str(key[-1]), known, n=1, cutoff=0.5)
        elsewhere = [full for full in _all_keys(RunConfig) if full.rpartition(".")[2] == str(key[-1])]
        hint = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(sorted(known))}"
        if not near and elsewhere:
            hint = f"did you mean {elsewhere[0]!r}?"
        return f"  {place}: {name}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"  {place}: {name}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    found = "" if problem["type"] == "value_error" else f" (found {problem['input']!r})"
    return f"  {place}: {name + ': ' if name else ''}{message}{found}"


def _known_keys(model: type[BaseModel], key: Key) -> Iterator[str]:
    for part in key:
        if isinstance(part, int):
            continue
        found = model.model_fields.get(part)
        section = None if found is None else _section_of(found.annotation)
        if section is None:
            return
        model = section
    yield from model.model_fields


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield prefix + name
        section = _section_of(info.annotation)
        if section is not None:
            yield from _all_keys(section, f"{prefix}{name}.")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section inside `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (tuple, Union, types.UnionType):
        return next((found for found in map(_section_of, get_args(annotation)) if found), None)
    return None


def _explain_interpolation(error: OmegaConfBaseException, source: Source) -> str:
    key = str(getattr(error, "full_key", "") or "")
    place = source.place(tuple(int(part) if part.isdecimal() else part for part in re.split(r"[.\[\]]+", key) if part))
    text = str(error).splitlines()[0]
    hint = ". Set the variable, or give a default: ${oc.env:NAME,default}" if "Environment variable" in text else ""
    return f"{place}: {key}: {text}{hint}"
