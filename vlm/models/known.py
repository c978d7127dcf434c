"""Families of language models by the names that people know them by, with what was measured of their model types.

Answers without torch and transformers: what scripts/prove_decoders.py measured lies beside this file. tests/models/
test_known.py holds it against `FAMILIES`, `LEGACY` and `TEMPLATES`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Known:
    """Models of one name.

    Attributes:
        model_type: of their config.json.
        templates: of their chat models, the usual one first; none: base models only, or one that is not known here.
        becomes: the model type that `vlm convert legacy` writes, for folders that need code of their own.
    """

    name: str
    model_type: str
    templates: tuple[str, ...] = ()
    becomes: str | None = None


KNOWN = (
    Known("LLaMA 1", "llama", ("vicuna", "alpaca", "belle", "linly", "billa", "ziya")),
    Known("Llama 2, Code Llama", "llama", ("llama2", "llama2_zh")),
    Known("Llama 3 to 3.3", "llama", ("llama3",)),
    Known("SmolLM, SmolLM2", "llama", ("chatml",)),
    Known("SmolLM3", "smollm3"),
    Known("Yi", "llama", ("chatml",)),
    Known("DeepSeek LLM", "llama", ("deepseek_moe",)),
    Known("DeepSeek Coder", "llama", ("deepseek_coder",)),
    Known("DeepSeek-V2", "deepseek_v2", ("deepseek_moe",)),
    Known("DeepSeek-V3", "deepseek_v3"),
    Known("Qwen 1", "qwen", ("chatml",), becomes="qwen2"),
    Known("Qwen1.5, Qwen2, Qwen2.5", "qwen2", ("chatml",)),
    Known("Qwen3", "qwen3", ("chatml",)),
    Known("Qwen3 MoE", "qwen3_moe", ("chatml",)),
    Known("Qwen3-Next", "qwen3_next", ("chatml",)),
    Known("Qwen3.5", "qwen3_5_text", ("chatml",)),
    Known("InternLM 1", "internlm", ("intern",), becomes="llama"),
    Known("InternLM 2, 2.5", "internlm2", ("internlm2",), becomes="llama"),
    Known("InternLM 3", "internlm3", ("internlm2",)),
    Known("Baichuan-7B", "baichuan", ("baichuan",), becomes="llama"),
    Known("Baichuan2-7B", "baichuan", ("baichuan2",), becomes="llama"),
    Known("XVERSE", "xverse", ("xverse",), becomes="llama"),
    Known("ChatGLM2", "chatglm", ("chatglm2",), becomes="glm"),
    Known("ChatGLM3", "chatglm", ("chatglm3",), becomes="glm"),
    Known("GLM-4 with code", "chatglm", ("glm4",), becomes="glm"),
    Known("GLM-4", "glm", ("glm4",)),
    Known("GLM-4-0414", "glm4", ("glm4",)),
    Known("GLM-4.5", "glm4_moe", ("glm4",)),
    Known("BLOOM, BLOOMZ", "bloom"),
    Known("Falcon", "falcon"),
    Known("Mistral", "mistral", ("mistral", "zephyr")),
    Known("Mixtral", "mixtral", ("mistral",)),
    Known("Phi-1, 1.5, 2", "phi"),
    Known("Phi-3, 3.5, 4", "phi3", ("phi3",)),
    Known("Gemma", "gemma", ("gemma",)),
    Known("Gemma 2", "gemma2", ("gemma",)),
    Known("Gemma 3", "gemma3_text", ("gemma",)),
    Known("StarCoder, StarChat, WizardCoder", "gpt_bigcode", ("starchat", "wizardcoder")),
    Known("StarCoder2", "starcoder2"),
    Known("Command R", "cohere", ("cohere",)),
    Known("OLMo 2", "olmo2"),
    Known("Granite", "granite"),
    Known("StableLM", "stablelm"),
    Known("gpt-oss", "gpt_oss"),
)


@cache
def measured() -> dict[str, dict[str, Any]]:
    """Model type -> what scripts/prove_decoders.py measured of it."""
    rows: list[dict[str, Any]] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return {row["type"]: row for row in rows}


def describe(pattern: str = "", every_type: bool = False) -> list[dict[str, Any]]:
    """One entry a family: name, model type, class, LoRA targets, templates, pipeline, how it is proven.

    Args:
        pattern: part of a name, a model type or a template, in any case.
        every_type: also the model types that no family here has.
    """
    named = {known.becomes or known.model_type for known in KNOWN}
    families: Sequence[Known] = KNOWN
    if every_type:
        families = (*KNOWN, *(Known(name, name) for name in measured() if name not in named))
    entries = [_entry(known) for known in families]
    return [
        entry for entry in entries if pattern.lower() in f"{entry['name']} {entry['type']} {entry['templates']}".lower()
    ]


def num_unnamed() -> int:
    """Model types that are right and of no family here."""
    named = {known.becomes or known.model_type for known in KNOWN}
    return sum(row["state"] == "right" and name not in named for name, row in measured().items())


def _entry(known: Known) -> dict[str, Any]:
    row = measured()[known.becomes or known.model_type]
    is_right = row["state"] == "right"
    return {
        "name": known.name, "type": known.model_type, "becomes": known.becomes, "class": row.get("model") or None,
        "lora_targets": row.get("targets", []), "templates": list(known.templates),
        "pipeline": row.get("pipeline") == "yes", "packing": row.get("packing") or None, "is_trained": is_right,
        "proven": _proof(known, row),
    }  # fmt: skip


def _proof(known: Known, row: dict[str, Any]) -> str:
    if row["state"] != "right":
        return f"{row['state']}: {row['reason']}"
    how = f"measured: packed rows {row['packing']}, logits {row['logits']:.0e}, gradient {row['gradient']:.0e}"
    if known.becomes is None:
        return how
    return f"vlm convert legacy writes {known.becomes}, compared with the original layer; {how}"


def as_text(entries: Sequence[dict[str, Any]]) -> str:
    """For a terminal: three lines each."""
    return "\n".join(
        f"{entry['name']}: {entry['type']}{_arrow(entry)}, {entry['class'] or 'no class'}\n"
        f"    template {', '.join(entry['templates']) or '-'}; pipeline {_yes(entry['pipeline'])}; "
        f"LoRA {', '.join(entry['lora_targets']) or '-'}\n    {entry['proven']}"
        for entry in entries
    )


def as_markdown(entries: Sequence[dict[str, Any]]) -> str:
    """The table of docs/families.md."""
    lines = [
        "| models | model type | class | template | linear layers, for LoRA | pipeline | packed rows |",
        "|---" * 7 + "|",
    ]
    for entry in entries:
        cells = (
            entry["name"], f"`{entry['type']}`{_arrow(entry)}", entry["class"],
            ", ".join(f"`{name}`" for name in entry["templates"]) or "-", " ".join(entry["lora_targets"]),
            _yes(entry["pipeline"]), entry["packing"],
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _arrow(entry: dict[str, Any]) -> str:
    return f" -> {entry['becomes']}" if entry["becomes"] else ""


def _yes(value: bool) -> str:
    return "yes" if value else "no"
