"""The config of a run: YAML with inheritance and overrides -> one typed, frozen tree.

Everything that is wrong is reported at once, each problem with the file and line where the value was written.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError, model_validator
from pydantic.fields import FieldInfo

from vlm.data.config import DataConfig
from vlm.errors import ConfigError
from vlm.evaluation.config import EvaluationConfig
from vlm.layered_yaml import Key, Source, dotted, leaves, read_layers
from vlm.models.config import ModelConfig
from vlm.objectives import OBJECTIVES
from vlm.objectives.base import ObjectiveConfig
from vlm.objectives.lm import LanguageModelingConfig
from vlm.schema import OneOf, PathText, Section, annotation_of, chosen_kinds, one_of
from vlm.train.config import LINE_NAMES, RISING, TrainConfig
from vlm.train.engines.kind import EngineKind
from vlm.train.engines.kinds import ENGINES, Auto

BASE = "base"  # the folder of projects/ whose files are no runs by themselves


class RunConfig(Section):
    """All that decides a run."""

    name: str | None = None
    """Of the project; written as ${name} in paths, so that a copy under another name gets folders of its own."""
    output_dir: PathText
    """The run's folder; checkpoints, logs and export go there."""
    seed: NonNegativeInt = 0
    """Of new weights, dropout and the order of the data."""
    init_from: PathText | None = None
    """An export whose trained parts this run starts from."""
    model: ModelConfig
    data: DataConfig
    objective: Annotated[ObjectiveConfig, OneOf(OBJECTIVES)] = LanguageModelingConfig()
    """What the loss is."""
    train: TrainConfig
    engine: Annotated[EngineKind, OneOf(ENGINES, default="auto")] = Auto()
    """How the model is spread over processes."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @property
    def begins_blind(self) -> bool:
        """Whether the projector that the run starts with was never trained; `pretrained` gives a part of one only."""
        return self.model.vision is not None and self.init_from is None

    def _why_no_figure(self) -> str | None:
        """What gates and keep_best name that no task has."""
        tasks = {task.name: task for task in self.evaluation.tasks}
        for task in tasks.values():
            figure = None if task.gate is None else task.gate.figure
            if figure is not None and figure not in task.figure_names:
                return f"evaluation task {task.name}: gate.figure {figure}: the task has {', '.join(task.figure_names)}"
        best = self.train.keep_best
        name, _, figure = (best or "").partition(".")
        if best is not None and best not in tasks and name in tasks:
            names = [*tasks[name].figure_names, "shuffled"]
            if figure not in names:
                return f"train.keep_best {best}: the task has {', '.join(names)}"
        return None

    @model_validator(mode="after")
    def _parts_agree(self) -> RunConfig:
        if self.data.cache_features is True and self.model.trains_vision:
            raise ValueError("data.cache_features needs a frozen encoder, but model.trainable names vision; drop one")
        asks = bool(self.train.samples or self.train.eval_tasks)
        reason = self.engine.why_not_optimizer(self.train) or self.engine.why_not_tuned(self.model, self.train)
        if reason := reason or self.objective.why_not_parts(self.model.trainable, asks):
            raise ValueError(reason)
        names = [task.name for task in self.evaluation.tasks]
        if unknown := [name for name in self.train.eval_tasks if name not in names]:
            raise ValueError(f"train.eval_tasks: {unknown[0]} is no name of evaluation.tasks, which are {names}")
        if reason := self._why_no_figure():
            raise ValueError(reason)
        if reason := self.objective.why_not(self.engine, self.begins_blind):
            raise ValueError(reason)
        best = self.train.keep_best
        if best in RISING and not self.objective.measures(best):
            raise ValueError(
                f"train.keep_best {best} is not measured with objective.kind {self.objective.kind}; name held_out_loss "
                "or one of train.eval_tasks"
            )
        taken = LINE_NAMES.union(self.objective.numbers)
        if said := [name for name in self.train.eval_tasks if name in taken or name.startswith("held_out_")]:
            raise ValueError(
                f"train.eval_tasks: {said[0]} is a number of the run itself in metrics.jsonl, which the task's figure "
                "would pass for; give the task another name"
            )
        if self.train.is_paged and self.engine.keeps_optimizer_on_host:
            raise ValueError(
                f"train.optimizer {self.train.optimizer} pages GPU memory, but engine.offload keeps the optimizer in "
                f"the host's; drop one of them, or set train.optimizer to {self.train.optimizer.removeprefix('paged_')}"
            )
        return self


def load_config(path: str | Path, options: Sequence[str] = ()) -> RunConfig:
    """Read, merge, resolve and validate. Paths are not looked for: see `vlm.config_checks.load_checked`.

    Args:
        path: a YAML file, or the name of a shipped project such as "quickstart/pretrain".
        options: overrides `a.b=value`; values are read as YAML.

    Raises:
        ConfigError: lists every problem with its place, what was found, what is allowed, and the nearest known key.
    """
    source = read_source(path, options)
    values = _resolve(source)
    problems = list(dict.fromkeys(source.problems))
    config = None
    if () not in source.broken:  # else most of what follows would only repeat that a file is missing
        problems += [_bool_as_number(key, source) for key in _bools_as_numbers(RunConfig, values)]
        try:
            config = RunConfig.model_validate(values)
        except ValidationError as error:
            problems += _describe_all(error, source)
    if config is None or problems:
        raise_problems(path, problems)
    return config


def unused_settings(section: Section, prefix: str = "") -> list[str]:
    """Keys of one kind that stand beside another kind, a line each.

    Args:
        prefix: of the section's own place: "" for a whole config.
    """
    lines = []
    for place, _, chosen in chosen_kinds(section):
        at = prefix + dotted(place)
        lines += [f"{at}.{name} is not used: {at}.kind is {chosen.kind}" for name in chosen.unused]
    return lines


def raise_problems(path: str | Path, problems: Sequence[str], remark: str = "") -> NoReturn:
    lines = "".join(f"\n  {problem}" for problem in problems) + (f"\n{remark}" if remark else "")
    raise ConfigError(f"{len(problems)} problem{'s' if len(problems) != 1 else ''} in {path}:{lines}")


def resolve_for_log(path: str | Path, options: Sequence[str] = ()) -> str:
    """The merged config as YAML, interpolations unresolved: what `${oc.env:...}` brings is never written down."""
    return OmegaConf.to_yaml(OmegaConf.create(read_source(path, options).values), resolve=False)


def read_source(path: str | Path, options: Sequence[str] = ()) -> Source:
    """Merge a file with its bases and the overrides, nothing resolved or validated."""
    return read_layers(find_config(path), options)


def find_config(name: str | Path) -> Path:
    """A config file, or a shipped project by name: `quickstart/pretrain` is `projects/quickstart/pretrain.yaml`.

    Raises:
        ConfigError: there is none; names the nearest shipped ones.
    """
    path = Path(name)
    if path.is_file():
        return path
    here = _configs_in(path)
    if here:
        raise ConfigError(f"{name} is a folder of configs; name one of them: {', '.join(here)}")
    candidates = [path.with_name(f"{path.name}.yaml")] if path.name else []
    candidates += [folder / f"{path}{suffix}" for folder in project_folders() for suffix in ("", ".yaml")]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is not None:
        return found
    inside = [shipped for shipped in shipped_projects() if shipped.startswith(f"{path.name}/")]
    if inside:
        raise ConfigError(f"{name} is a folder of configs; name one of them: {', '.join(inside)}")
    if path.is_dir():
        raise ConfigError(f"{name} is a folder without configs (*.yaml). `vlm ls` lists the shipped ones")
    beside = {str(Path(file).with_suffix("")): file for file in _configs_in(path.parent)}
    near = difflib.get_close_matches(str(path.with_suffix("")), beside, n=1, cutoff=0.8)
    if near:
        raise ConfigError(f"config {name} does not exist; did you mean {beside[near[0]]}?")
    near = difflib.get_close_matches(str(name), shipped_projects(), n=3, cutoff=0.4)
    hint = f" Nearest shipped: {', '.join(near)}." if near else ""
    raise ConfigError(f"config {name} does not exist.{hint} `vlm ls` lists the shipped ones")


def _configs_in(folder: Path) -> list[str]:
    """The YAML files in a folder here, by path. Nothing is opened."""
    return sorted(str(file) for file in folder.glob("*.yaml") if file.is_file())


def project_folders() -> list[Path]:
    """Where shipped projects are: below the current folder, and in the repository that this package lies in."""
    shipped = Path(__file__).resolve().parents[1] / "projects"
    folders = {folder.resolve(): folder for folder in (shipped, Path("projects")) if folder.is_dir()}
    return list(reversed(folders.values()))


def shipped_projects() -> list[str]:
    """Names of all shipped configs, base files left out."""
    names = {
        path.relative_to(folder).as_posix().removesuffix(".yaml")
        for folder in project_folders()
        for path in folder.glob("*/*.yaml")
    }
    return sorted(name for name in names if not name.startswith(f"{BASE}/"))


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file, for editors. Nothing is required, as a base file may bring it."""
    schema = RunConfig.model_json_schema()
    sections = [schema, *schema.get("$defs", {}).values()]
    fields = [field for section in sections for field in section.get("properties", {}).values()]
    unions = [one for field in fields for one in (field, field.get("items", {})) if "properties" in one]
    for section in (*unions, *sections):
        section.pop("required", None)
        properties = section.get("properties", {})
        section["properties"] = {name: _or_interpolation(field) for name, field in properties.items()}
    base: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    base["description"] = "Files to inherit from, relative to this one; later ones win."
    schema["properties"] = {"base": base, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _or_interpolation(field: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {name: field.pop(name) for name in ("description", "default", "title") if name in field}
    return {**shown, "anyOf": [*(field.pop("anyOf", None) or [field]), {"type": "string", "pattern": r"^\$\{.+\}$"}]}


def _resolve(source: Source) -> dict[str, Any]:
    """The values with every `${...}` replaced. One that cannot be is noted in the source and left out as null."""
    values, lookup = copy.deepcopy(source.values), copy.deepcopy(source.values)
    written: dict[Key, str] = {}
    for key, value in leaves(source.values):
        if value == "???":
            _note(source, key, "must be given a value, here or with --options")
        elif isinstance(value, str) and "${" in value:
            _set(values, key, None)
            try:
                OmegaConf.create({"value": value})
                written[key] = value
            except OmegaConfBaseException as error:
                _note(source, key, _explain_interpolation(error, value, source))
                _set(lookup, key, "")  # so that this one does not hide the others
    config = OmegaConf.create(lookup)
    for key, text in written.items():
        try:
            found = _descend(config, key)
            _set(values, key, OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found)
        except (OmegaConfBaseException, RecursionError) as error:
            _note(source, key, _explain_interpolation(error, text, source))
    return values


def _descend(config: DictConfig | ListConfig, key: Key) -> Any:
    node: Any = config
    for part in key:
        node = node[part]  # raises on a missing variable or key
    return node


def _set(values: Any, key: Key, value: Any) -> None:
    for part in key[:-1]:
        values = values[part]
    values[key[-1]] = value


def _note(source: Source, key: Key, message: str) -> None:
    source.problems.append(f"{source.place(key)}: {dotted(key)}: {message}")
    source.broken.add(key)


def _explain_interpolation(error: BaseException, text: str, source: Source) -> str:
    if isinstance(error, RecursionError):
        return f"{text} refers to itself"
    reason = str(error).splitlines()[0]
    variable = re.search(r"Environment variable '(.+?)' not found", reason)
    if variable:
        name = variable[1]
        return f"{text}: environment variable {name} is not set; set it, or give a default: ${{oc.env:{name},default}}"
    if isinstance(error, GrammarParseError):
        return f"{text}: not a complete ${{...}} ({reason})"
    wanted = reason.partition("Interpolation key '")[2].partition("'")[0]
    if wanted in _all_keys(RunConfig):
        return f"{text}: {wanted} is not written in this config; a default can be referred to only once it is written"
    known = {dotted(key[:n]) for key in source.places for n in range(1, len(key) + 1)}
    near = difflib.get_close_matches(wanted, sorted(known), n=1) if wanted else []
    return f"{text}: {reason}" + (f"; did you mean ${{{near[0]}}}?" if near else "")


def _bools_as_numbers(annotation: Any, value: Any, key: Key = ()) -> Iterator[Key]:
    """Keys where `true` or `false` stands for a number. pydantic would take it for 1 or 0."""
    if isinstance(value, bool):
        kinds = set(_scalars(annotation))
        if kinds & {int, float} and bool not in kinds:
            yield key
    elif isinstance(value, dict):
        union, section = one_of(annotation), _section_of(annotation)
        fields = union.fields(union.chosen(value)) if union else section.model_fields if section else {}
        for name, child in value.items():
            if name in fields:
                yield from _bools_as_numbers(annotation_of(fields[name]), child, (*key, name))
            elif section is None:
                yield from _bools_as_numbers(annotation, child, (*key, name))
    elif isinstance(value, list):
        for number, child in enumerate(value):
            yield from _bools_as_numbers(annotation, child, (*key, number))


def _bool_as_number(key: Key, source: Source) -> str:
    return f"{source.place(key)}: {dotted(key)}: expected a number, found {str(source.get(key)).lower()}"


def _scalars(annotation: Any) -> Iterator[Any]:
    """The plain types inside an annotation.

    >>> list(_scalars(tuple[float, int] | None))
    [<class 'float'>, <class 'int'>, <class 'NoneType'>]
    """
    if get_args(annotation) and get_origin(annotation) is not Literal:
        for inner in get_args(annotation):
            yield from _scalars(inner)
    elif isinstance(annotation, type):
        yield annotation


def _describe_all(error: ValidationError, source: Source) -> list[str]:
    """One line per key; alternatives of the same key (`"all-linear"` or a list of names) are joined."""
    by_key: dict[tuple[Key, bool], list[str]] = {}
    for problem in error.errors(include_url=False):
        key, is_missing = _written_key(problem["loc"], source), problem["type"] == "missing"
        if problem["type"] == "union_tag_invalid":
            key = (*key, "kind")
        is_only_invalid = problem["type"] == "too_short" and len(source.get(key)) >= problem["ctx"]["min_length"]
        if not is_only_invalid and not any(key[:n] in source.broken for n in range(1, len(key) + 1)):
            by_key.setdefault((key, is_missing), []).append(_describe(problem, key, source))
    lines = []
    for (key, _), messages in by_key.items():
        name = f"{dotted(key)}: " if key else ""
        lines.append(
            f"{source.place(key)}: {name}{' or '.join(dict.fromkeys(messages))}{_found(key, messages, source)}"
        )
    return lines


def _written_key(location: tuple[int | str, ...], source: Source) -> Key:
    """pydantic's location without what is no key of the file, such as the branch of a union."""
    key: Key = ()
    for part in location:
        if source.has((*key, part)) or (part == location[-1] and isinstance(source.get(key), dict) and part != "[key]"):
            key = (*key, part)
    return key


def _describe(problem: Any, key: Key, source: Source) -> str:
    kind, context, last = problem["type"], problem.get("ctx", {}), problem["loc"][-1] if problem["loc"] else ""
    if kind == "extra_forbidden":
        return f"unknown key; {_nearest_key(key, source)}"
    if kind == "missing":
        return (
            f"entry {last} is missing (the first is 0)" if isinstance(last, int) else "missing, and it has no default"
        )
    if kind == "value_error":
        return problem["msg"].removeprefix("Value error, ") + _written_where(key, problem["msg"], source)
    if kind == "literal_error":
        allowed = context["expected"]
        names = re.findall(r"'([^']*)'", allowed)
        near = difflib.get_close_matches(str(problem["input"]), names, n=1)
        rule = "known keys are" if last == "[key]" else "expected"
        return f"{rule} {allowed}" + (f"; did you mean {near[0]!r}?" if near else "")
    if kind == "union_tag_invalid":
        *names, last = re.findall(r"'([^']*)'", context["expected_tags"])
        allowed = f"{', '.join(map(repr, names))} or {last!r}" if names else repr(last)
        near = difflib.get_close_matches(str(context["tag"]), [*names, last], n=1)
        return f"expected {allowed}" + (f"; did you mean {near[0]!r}?" if near else "")
    if kind == "union_tag_not_found":
        union = _union_at(key)
        assert union is not None
        return f"needs the key kind, which says what the others mean; one of {', '.join(union.kinds)}"
    if kind in _EXPECTED:
        return "expected " + _EXPECTED[kind].format(**context)
    return problem["msg"]


_EXPECTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "keys with values"),
    "string_type": 'text; write it in quotes if it is meant as text, for example "2024"',
    "tuple_type": "a list",
    "finite_number": "a finite number",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}


def _found(key: Key, messages: list[str], source: Source) -> str:
    """What was written, not what it resolves to: that may be a secret."""
    if not source.has(key) or not any(message.startswith("expected") for message in messages):
        return ""
    value = source.get(key)
    shown = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f" (found {shown if len(shown) <= 80 else shown[:77] + '...'})"


def _written_where(section: Key, message: str, source: Source) -> str:
    """Where the keys that a message names were written: usually one of them comes from a base file."""
    values = source.get(section)
    named = [name for name in values if name in message] if isinstance(values, dict) else []
    places = [f"{name} is set at {source.place((*section, name))}" for name in named]
    return f" ({'; '.join(places)})" if len(places) > 1 else ""


def _nearest_key(key: Key, source: Source) -> str:
    """The key that was meant: of the kind that is written there, then of other kinds, then anywhere."""
    name, union = str(key[-1]), _union_at(key[:-1])
    known = sorted({name for section in _sections_at(key[:-1]) for name in section.model_fields})
    fitting = union.chosen(source.get(key[:-1])) if union else None
    here = sorted(fitting.model_fields) if fitting else known
    same = [full for full in _all_keys(RunConfig) if full.rpartition(".")[2] == name]
    near = _near(name, here, 0.75) or _near(name, known, 0.75)
    if not near and same:
        return f"did you mean {' or '.join(same[:3])}?"
    near = near or _near(name, here, 0.5) or _near(name, known, 0.5)
    if near:
        return f"did you mean {near[0]}?"
    anywhere = {full.rpartition(".")[2]: full for full in _all_keys(RunConfig)}
    if far := _near(name, sorted(anywhere), 0.8):
        return f"did you mean {anywhere[far[0]]}?"
    others = sorted(set(known) - set(here))
    return f"known here: {', '.join(here)}" + (f"; of other kinds: {', '.join(others)}" if others else "")


def _near(name: str, known: list[str], cutoff: float) -> list[str]:
    return difflib.get_close_matches(name, known, n=1, cutoff=cutoff)


def _sections_at(key: Key) -> list[type[BaseModel]]:
    """What may stand at a key of a run's config; several where it depends on a `kind`."""
    sections: list[type[BaseModel]] = [RunConfig]
    for field in _fields_on(key):
        sections = sections_in(field) if field else []
    return sections


def _union_at(key: Key) -> OneOf | None:
    """Of a section that is one of several."""
    fields = list(_fields_on(key))
    return one_of(annotation_of(fields[-1])) if fields and fields[-1] else None


def _fields_on(key: Key) -> Iterator[FieldInfo | None]:
    """The fields on the way to a key; None for what is no field, and after it."""
    sections: list[type[BaseModel]] = [RunConfig]
    for part in key:
        if not isinstance(part, int):
            field = next((section.model_fields[part] for section in sections if part in section.model_fields), None)
            yield field
            sections = sections_in(field) if field else []


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    names: dict[str, None] = {}  # in order, once each
    for name, info in model.model_fields.items():
        names[prefix + name] = None
        for section in sections_in(info):
            names |= dict.fromkeys(_all_keys(section, f"{prefix}{name}."))
    yield from names


def sections_in(field: FieldInfo) -> list[type[BaseModel]]:
    """The sections that a field may hold: one for each kind, one, or none."""
    union, section = one_of(annotation_of(field)), _section_of(field.annotation)
    if union is not None:
        return list(union.kinds.values())
    return [] if section is None else [section]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section inside `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (tuple, Annotated, Union, types.UnionType):
        return next((found for found in map(_section_of, get_args(annotation)) if found), None)
    return None
