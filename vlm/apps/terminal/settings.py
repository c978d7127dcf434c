"""`:conf`: generation settings as the user writes and reads them."""

from __future__ import annotations

import difflib
from dataclasses import asdict, fields, replace
from typing import Any

from vlm.errors import ConfigError
from vlm.generation.generate import GenerationSettings
from vlm.inference.load import make_settings

MEANINGS = {
    "max_new_tokens": ("length of an answer, in tokens", "回答的最大长度（词元数）"),
    "do_sample": ("sample instead of taking the likeliest", "按概率采样，而不是取最可能的词"),
    "temperature": ("of sampling; lower is safer", "采样温度，越低越稳"),
    "top_p": ("sample among so much probability", "只在累计概率内采样"),
    "top_k": ("sample among so many words; 0 is all", "只在前 k 个词中采样，0 为不限"),
    "repetition_penalty": ("over 1 repeats less", "大于 1 时减少重复"),
    "num_beams": ("beam search; the answer comes at its end", "集束搜索，回答在结束时一次给出"),
    "length_penalty": ("of beams; under 1 prefers short answers", "束搜索的长度惩罚，小于 1 时偏向短回答"),
    "max_length": ("of question and answer, in tokens; - for none", "问题与回答的总词元数上限，- 表示不限"),
    "seed": ("of sampling; - for a new one each time", "随机种子，- 表示每次不同"),
}
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "int | None": "a whole number, or -"}
_TYPES = {field.name: str(field.type) for field in fields(GenerationSettings)}


def rows(settings: GenerationSettings, names: list[str] | None = None) -> list[list[str]]:
    """Name and value, English and Chinese meaning, of all settings or of some."""
    values = asdict(settings)
    return [[f"{name} = {written(values[name])}", *MEANINGS[name]] for name in names or MEANINGS]


def written(value: Any) -> str:
    """
    >>> [written(value) for value in (True, None, 0.7, 5)]
    ['true', '-', '0.7', '5']
    """
    if value is None:
        return "-"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def change(settings: GenerationSettings, text: str) -> tuple[GenerationSettings, list[str]]:
    """Settings after `name=value ...`, or `name value`, and the names in it; `name` alone changes nothing.

    Raises:
        ConfigError: an unknown name, or a value that is none; then nothing changes.

    >>> change(GenerationSettings(), "top-p=0.9 seed=3")[0].seed
    3
    """
    words = text.replace("＝", "=").replace(" = ", "=").split()
    if len(words) == 2 and not any("=" in word for word in words):
        words = [f"{words[0]}={words[1]}"]
    changes: dict[str, Any] = {}
    names = []
    for word in words:
        name, equals, value = word.partition("=")
        name = _known(name.replace("-", "_").lower())
        names.append(name)
        if equals:
            changes[name] = _parsed(name, value)
    changed = make_settings(asdict(settings) | changes)
    make_settings(asdict(replace(changed, do_sample=True)))  # ranges of sampling too, though it may be off now
    return changed, names


def without_effect(settings: GenerationSettings, names: list[str] | None = None) -> dict[str, list[str]]:
    """Of `names`, or of those that differ from the default, what counts only with sampling or beams that are off.

    Returns:
        those names, by the setting that would make them count.
    """
    values, default = asdict(settings), asdict(GenerationSettings())
    given = [name for name in values if values[name] != default[name]] if names is None else names
    idle = {} if settings.do_sample else {"do_sample": ["temperature", "top_p", "top_k", "seed"]}
    idle |= {} if settings.num_beams > 1 else {"num_beams": ["length_penalty"]}
    found = {switch: [name for name in names if name in given] for switch, names in idle.items()}
    return {switch: names for switch, names in found.items() if names}


def _known(name: str) -> str:
    if name not in _TYPES:
        near = difflib.get_close_matches(name, _TYPES, 1)
        hint = f"did you mean {near[0]}? 是不是 {near[0]}？ " if near else ""
        raise ConfigError(f"no setting {name!r}; {hint}There are {', '.join(_TYPES)}")
    return name


def _parsed(name: str, text: str) -> Any:
    kind = _TYPES[name]
    try:
        if kind == "bool":
            return _WORDS[text.lower()]
        if kind == "int | None" and text.lower() in ("-", "none"):
            return None
        return float(text) if kind == "float" else int(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{name}={text}: expected {_KINDS[kind]}") from None
