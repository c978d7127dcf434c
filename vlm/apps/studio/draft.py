"""What the form holds: a project and what was typed over it. From it come the command, the YAML, and what is wrong."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from vlm.config import find_config, load_config, read_source, resolve_for_log, shipped_projects
from vlm.config_checks import load_checked, run_notes
from vlm.config_keys import ConfigKey, all_keys
from vlm.errors import ConfigError, VLMError
from vlm.layered_yaml import Loader

MAX_TEXT = 20_000  # characters of one value
_LINE = re.compile(r"  (?P<place>.*?): (?P<key>[a-z_]+(?:[.\[][\w.\]\[]*)?): (?P<message>.*)")


@dataclass(frozen=True)
class Checked:
    """What `Draft.check` found."""

    of_keys: Mapping[str, str] = field(default_factory=dict)  # key -> what is wrong there
    others: tuple[str, ...] = ()  # problems of no key of the form
    notes: tuple[str, ...] = ()  # what training will warn of

    @property
    def is_right(self) -> bool:
        return not self.of_keys and not self.others


@dataclass(frozen=True)
class Draft:
    """A config in the making. Values are kept as typed, in YAML.

    >>> draft = Draft("tiny/pretrain").with_value("train.max_steps", "5").with_value("seed", "1")
    >>> draft.with_value("seed", "").options
    ('train.max_steps=5',)
    >>> draft.command("train")
    'vlm train tiny/pretrain --options seed=1 train.max_steps=5'
    """

    config: str  # a shipped project, or a YAML file
    typed: Mapping[str, str] = field(default_factory=dict)  # key -> YAML
    nproc: int = 1

    def with_value(self, key: str, text: str) -> Draft:
        """With a value typed at a key; an empty one takes the project's back.

        Raises:
            ConfigError: there is no such key, or the text is too long.
        """
        if key not in KEYS or "[]" in key:
            raise ConfigError(f"{key[:100]} is not a key of the form")
        if len(text) > MAX_TEXT:
            raise ConfigError(f"{key}: {len(text):,} characters; at most {MAX_TEXT:,}. Write it into a file instead")
        typed = {name: value for name, value in self.typed.items() if name != key}
        return replace(self, typed=typed if not text.strip() else {**typed, key: text.strip()})

    @property
    def options(self) -> tuple[str, ...]:
        """As `--options` takes them, a section before its keys."""
        places = {key: place for place, key in enumerate(KEYS)}
        keys = sorted(self.typed, key=lambda key: (key.count("."), places[key]))
        return tuple(f"{key}={_in_one_line(self.typed[key])}" for key in keys)

    def arguments(self, verb: str) -> list[str]:
        """Of the `vlm` command, such as `train`, `plan` or `data preview`."""
        flags = {"train": "--nproc", "plan": "--gpus"}
        shared = [flags[verb], str(self.nproc)] if self.nproc > 1 and verb in flags else []
        return [*verb.split(), self.config, *shared, *(["--options", *self.options] if self.options else [])]

    def command(self, verb: str = "train") -> str:
        return shlex.join(["vlm", *self.arguments(verb)])

    def yaml(self) -> str:
        """The whole config, bases and typed values merged, as the run folder will keep it.

        Raises:
            ConfigError: the project cannot be found.
        """
        return resolve_for_log(self.config, self.options)

    def value(self, key: str) -> Any:
        """What stands at a key now, `${...}` unresolved; None where nothing is written."""
        return read_source(self.config, self.options).get(tuple(key.split(".")))

    def output_dir(self) -> Path | None:
        """Of the run; None while the config is wrong."""
        try:
            return Path(load_config(self.config, self.options).output_dir)
        except ConfigError:
            return None

    def check(self) -> Checked:
        """All that `vlm validate` would say, by key."""
        try:
            return Checked(notes=tuple(run_notes(load_checked(self.config, self.options))))
        except ConfigError as error:
            return _sorted_out(str(error))
        except VLMError as error:  # a model folder that cannot be read
            return Checked(others=(str(error),))


def shown_values(draft: Draft) -> dict[str, str]:
    """What the form shows at each key: the written value as YAML; empty where the default holds or keys stand below."""
    source = read_source(draft.config, draft.options)
    found = {}
    for key, about in ((key, about) for key, about in KEYS.items() if "[]" not in key):
        place = tuple(key.split("."))
        value = source.get(place)
        is_shown = source.has(place) and not (about.control == "section" and isinstance(value, dict))
        found[key] = as_yaml(value) if is_shown else ""
    return found


def as_yaml(value: Any, in_list: bool = False) -> str:
    """In one line, as a person would write it.

    >>> as_yaml("cache/${name}"), as_yaml("2024"), as_yaml(None), as_yaml(["projector", "llm.lora"]), as_yaml(True)
    ('cache/${name}', '"2024"', 'null', '[projector, llm.lora]', 'true')
    """
    if isinstance(value, str):
        return value if _is_plain(value, in_list) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(as_yaml(child, True) for child in value)}]"
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{as_yaml(str(name), True)}: {as_yaml(each, True)}" for name, each in value.items()) + "}"
        )
    return json.dumps(value)


def configs_to_begin_from(runs: Path) -> list[str]:
    """Shipped projects, then the configs that runs below a folder have kept."""
    kept = [path for path in runs.rglob("config.yaml") if path.is_file()] if runs.is_dir() else []
    return [*shipped_projects(), *sorted(str(path) for path in kept if "checkpoints" not in path.parts)]


def begin(config: str) -> Draft:
    """A draft of a project or a YAML file, nothing typed yet. Raises ConfigError: there is none."""
    find_config(config.strip())
    return Draft(config.strip())


def _keys_by_name() -> dict[str, ConfigKey]:
    return {about.key: about for about in all_keys()}


KEYS = _keys_by_name()


def _is_plain(text: str, in_list: bool) -> bool:
    """Whether it is read back as this text when it stands without quotes, by itself or inside brackets."""
    if "\n" in text:
        return False
    try:
        return yaml.load(f"{{a: {text}, b: 1}}" if in_list else f"a: {text}", Loader=Loader)["a"] == text
    except yaml.YAMLError:
        return False


def _in_one_line(text: str) -> str:
    """Block YAML becomes JSON, which is YAML too; what is not YAML stays, to be refused by name."""
    if "\n" not in text:
        return text
    try:
        return json.dumps(yaml.load(text, Loader=Loader), ensure_ascii=False)  # a SafeLoader
    except (yaml.YAMLError, RecursionError, TypeError):
        return text


def _sorted_out(message: str) -> Checked:
    """The lines of a ConfigError, each to the key it names or to the one around it."""
    first, *lines = message.split("\n")
    of_keys: dict[str, str] = {}
    others: list[str] = [] if lines else [first]
    for line in (line for line in lines if line.startswith("  ")):
        match = _LINE.fullmatch(line)
        key = None if match is None else _key_at(match["key"])
        if match is None or key is None:
            others.append(line.strip())
            continue
        detail = match["message"] if key == match["key"] else f"{match['key']}: {match['message']}"
        of_keys[key] = f"{of_keys[key]}; {detail}" if key in of_keys else detail
    return Checked(of_keys, tuple(others), tuple(line for line in lines if line and not line.startswith("  ")))


def _key_at(key: str) -> str | None:
    """
    >>> _key_at("data.sources[0].path"), _key_at("train.learning_rat")
    ('data.sources', None)
    """
    while key and key not in KEYS:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return key or None


def split_sections(keys: Sequence[ConfigKey] = tuple(KEYS.values())) -> dict[str, list[ConfigKey]]:
    """Section -> its keys that can be typed; those inside a list of sections are explained beside the list."""
    found: dict[str, list[ConfigKey]] = {}
    for about in keys:
        if "[]" not in about.key:
            found.setdefault(about.section, []).append(about)
    return found
