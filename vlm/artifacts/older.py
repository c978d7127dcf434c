"""Settings of an export in the words of transformers 4 beside those of 5: other programs read the older ones.

transformers 5 writes `rope_parameters` alone. transformers 4, MLX-VLM and converters read `rope_theta`,
`rope_scaling` and the names below instead, and take a default where they find none, without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm.artifacts.tokenizer import make_readable
from vlm.compat import follow_umask
from vlm.models.families import FAMILIES

_LOCAL = "rope_local_base_freq"  # Gemma 3, whose windowed layers have a base of their own


def finish_folder(folder: Path) -> None:
    """Make a written export readable: for older programs, and for whoever may read what this user writes."""
    for file in sorted(folder.rglob("config.json")):
        values = json.loads(file.read_text(encoding="utf-8"))
        if "model_type" in values:
            _rewrite(file, _without_paths(values))
    make_readable(folder)
    for file in folder.rglob("*"):
        if file.is_file():
            follow_umask(file)


def _rewrite(file: Path, values: dict[str, Any]) -> None:
    """Add the older names, unless transformers then reads other settings than before."""
    from transformers import CONFIG_MAPPING, AutoConfig

    _write(file, values)
    older = {**values, **older_rope(values)}
    if isinstance(text_config := values.get("text_config"), dict):
        older["text_config"] = {**text_config, **older_rope(text_config)}
    if older == values or values["model_type"] not in CONFIG_MAPPING:
        return
    rope = _rope_of(AutoConfig.from_pretrained(file.parent).to_dict())
    _write(file, older)
    if _rope_of(AutoConfig.from_pretrained(file.parent).to_dict()) != rope:
        _write(file, values)


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """transformers writes where the parts of a model of several were loaded from."""
    kept = {key: value for key, value in values.items() if key != "_name_or_path"}
    return {key: _without_paths(value) if isinstance(value, dict) else value for key, value in kept.items()}


def older_rope(settings: dict[str, Any]) -> dict[str, Any]:
    """
    >>> older_rope({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}})
    {'rope_theta': 500000.0, 'rope_scaling': {'rope_type': 'linear', 'factor': 2.0, 'type': 'linear'}}
    """
    rope = settings.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    family = FAMILIES.get(settings.get("model_type", ""))
    names = dict(family.older_rope) if family is not None else {}
    older: dict[str, Any] = {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None:
            older[names.get(key, key)] = rope[key]
    if isinstance(local, dict) and local.get("rope_theta") is not None:
        older[_LOCAL] = local["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        older["rope_scaling"] = {**scaling, "type": scaling["rope_type"]}
    return older


def _rope_of(values: dict[str, Any]) -> list[Any]:
    sections = (values, values.get("text_config") or {})
    return [_without_type(section.get("rope_parameters")) for section in sections]


def _without_type(rope: Any) -> Any:
    """`type` is the older name of `rope_type`."""
    if not isinstance(rope, dict):
        return rope
    return {key: _without_type(value) for key, value in rope.items() if key != "type"}
