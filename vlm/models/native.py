"""Which model types the installed transformers has classes for, and what to take in place of those it has not.

Read from transformers' files, as importing it takes seconds: 40 ms once per process, measured on one core.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

_CONFIGS, _DECODERS = "CONFIG_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
# the first transformers that has the type, where setup.py admits older ones
_SINCE = {"internlm3": "5.23", "exaone": "5.24"}
_CONVERTED = "`vlm convert legacy FOLDER OUT` writes the same weights for a class that transformers has"
# type that needs the Python files beside its weights -> (native types to take instead, a conversion there is)
_SUCCESSORS: dict[str, tuple[tuple[str, ...], str]] = {
    "qwen": (("qwen2", "qwen3"), _CONVERTED),
    "internlm": (("internlm3", "qwen3"), _CONVERTED),
    "internlm2": (("internlm3",), _CONVERTED),
    "baichuan": (("qwen2", "qwen3", "internlm3"), f"7B models: {_CONVERTED}"),
    "chatglm": (("glm", "glm4"), f"GLM-4 is published in native form too, and ChatGLM2 and 3: {_CONVERTED}"),
    "xverse": (("qwen3", "llama"), _CONVERTED),
    "aquila": (("qwen3", "llama"), ""),
    "orion": (("qwen3", "llama"), ""),
    "skywork": (("qwen3", "llama"), ""),
    "bluelm": (("qwen3", "llama"), ""),
    "telechat": (("qwen3", "llama"), ""),
    "moss": (("qwen3", "internlm3"), ""),
    "codeshell": (("qwen2", "starcoder2"), ""),
    "minicpm": (("minicpm3", "qwen3"), ""),
    "hunyuan": (("hunyuan_v1_dense", "hunyuan_v1_moe"), ""),
    "RefinedWeb": (("falcon",), "the same weights are published with model_type falcon"),
    "RefinedWebModel": (("falcon",), "the same weights are published with model_type falcon"),
    "stablelm_epoch": (("stablelm",), "the same weights are published with model_type stablelm"),
    "mixformer-sequential": (("phi",), "the same weights are published with model_type phi"),
    "phi-msft": (("phi",), "the same weights are published with model_type phi"),
    "kimi_k2": (("deepseek_v3", "kimi_linear"), "its layers are those of deepseek_v3"),
    "openelm": (("llama", "qwen3"), ""),
    "jais": (("jais2",), ""),
}
_ANY = ("qwen2", "qwen3", "llama", "mistral", "internlm3")  # SmolLM2 is a llama


def is_native(model_type: object) -> bool:
    """Whether transformers has a configuration class for the type, or was given one by another package."""
    known = _names("auto_mappings", _CONFIGS) | _names("configuration_auto", _CONFIGS)
    return model_type in known or model_type in _registered()


def is_native_decoder(model_type: object) -> bool:
    """Whether transformers loads the type as a language model, with a class of its own or of another package."""
    if model_type in _names("modeling_auto", _DECODERS):
        return True
    config = _registered().get(model_type)
    if config is None:
        return False
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return config in MODEL_FOR_CAUSAL_LM_MAPPING


def _registered() -> dict[object, Any]:
    """What other packages gave transformers, model type -> configuration class. Nothing where it is not loaded."""
    auto = sys.modules.get("transformers.models.auto.configuration_auto")
    return {} if auto is None else auto.CONFIG_MAPPING._extra_content


def why_not_native(settings: dict[str, Any], trust_remote_code: bool) -> str | None:
    """What is wrong with a config.json whose model type transformers does not have, and what to do; None if it has it.

    Args:
        settings: of config.json.
        trust_remote_code: the config lets the folder run its own code.
    """
    kind = settings.get("model_type")
    brings_code = "auto_map" in settings
    if is_native(kind) or (brings_code and trust_remote_code):
        return None
    if not brings_code:
        advice = _advice(kind) or "Usually the model is newer than transformers: pip install -U transformers"
        return f"model type {kind!r} is not one that transformers {version('transformers')} has. {advice}"
    return (
        f"model type {kind!r} is not native to transformers {version('transformers')} and asks to run its own code "
        f"(auto_map). Refused. {_advice(kind) or f'Take a model of type {_list(_offered(_ANY))}'}. Such code was "
        "mostly written for transformers 4 and often fails under 5. After reading it, model.trust_remote_code: true "
        "tries it"
    )


def why_not_a_decoder(class_name: str) -> str:
    return (
        f"{class_name} is of no language model that transformers has. Usually it is an encoder, and model.llm.path "
        "and model.vision.path are swapped"
    )


def _advice(kind: object) -> str:
    if kind in _SINCE:
        return f"transformers has it from {_SINCE[str(kind)]}: pip install -U transformers"
    successors, conversion = _SUCCESSORS.get(str(kind), ((), ""))
    offered = _offered(successors)
    return f"Take a model of type {_list(offered)}{'; ' * bool(conversion)}{conversion}" if offered else ""


def _offered(types: tuple[str, ...]) -> list[str]:
    """Those that the installed transformers loads, and those that a later one does."""
    return [
        name if is_native_decoder(name) else f"{name} (from transformers {_SINCE[name]})"
        for name in types
        if name in _SINCE or is_native_decoder(name)
    ]


def _list(names: list[str]) -> str:
    """
    >>> _list(["a"]), _list(["a", "b", "c"])
    ('a', 'a, b or c')
    """
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


@cache
def _names(module: str, mapping: str) -> frozenset[str]:
    """Keys of a dict of transformers.models.auto: of its literal, and of what `update` adds."""
    spec = importlib.util.find_spec("transformers")  # finds the package and runs nothing
    assert spec is not None
    assert spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0]) / "models/auto" / f"{module}.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = {name for node in tree.body if mapping in _targets(node) for name in _keys(node)}
    return frozenset(found)


def _targets(node: ast.stmt) -> list[str]:
    """Names that a statement assigns to or calls a method of."""
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
        owner = node.value.func.value
        return [owner.id] if isinstance(owner, ast.Name) else []
    return []


def _keys(node: ast.stmt) -> Iterator[str]:
    """First strings of pairs, ("llama", "LlamaConfig"), and keys of dict literals."""
    for inner in ast.walk(node):
        firsts = inner.elts[:1] if isinstance(inner, ast.Tuple) else inner.keys if isinstance(inner, ast.Dict) else []
        for first in firsts:
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value
