"""Write the tables of docs/tuning.md, by the memory estimate and by looking at models: python scripts/tuning_tables.py

tests/scripts/test_tuning_tables.py compares the two.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from toy_decoders import toy_decoder

from vlm.config import RunConfig
from vlm.models.decoders import find_linears
from vlm.plan.estimate import GIB, estimate

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/tuning.md"
MARK = "<!-- {} of tables: scripts/tuning_tables.py -->\n"
FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "qwen3_5_text", "gemma2", "gemma3_text", "phi",
    "phi3", "smollm3", "falcon", "bloom", "glm", "glm4", "gpt2", "gpt_neox", "stablelm", "olmo2", "cohere2", "granite",
    "deepseek_v3",
)  # fmt: skip
SIZES = {  # Qwen2.5's: width, MLP width, blocks, heads, key and value heads
    "7B": (3584, 18944, 28, 28, 4),
    "14B": (5120, 13824, 48, 40, 8),
}
LORA = {"rank": 64, "alpha": 16}
_ADAPTERS = {"trainable": ["llm.lora"], "lora": LORA}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"trainable": ["llm"]},
    "last 4 blocks": {"trainable": ["llm"], "partial": {"llm": {"last_blocks": 4}}},
    "LoRA": _ADAPTERS,
    "QLoRA int8": {**_ADAPTERS, "quantization": {"format": "int8"}},
    "QLoRA nf4": {**_ADAPTERS, "quantization": {"format": "nf4"}},
    "QLoRA nf4, `double: false`": {**_ADAPTERS, "quantization": {"format": "nf4", "double": False}},
}


def memory_table() -> str:
    """GiB at the peak of a step, and whether a card of 24 GiB has them with 2 GiB to spare."""
    lines = ["| method | " + " | ".join(f"{size}, GiB" for size in SIZES) + " |", "|---|" + "---|" * len(SIZES)]
    with tempfile.TemporaryDirectory() as folder:
        for name, method in METHODS.items():
            cells = [_gib(Path(folder), size, method) for size in SIZES]
            lines.append(f"| {name} | " + " | ".join(f"**{n:.1f}**" if n < 22 else f"{n:.1f}" for n in cells) + " |")
    return "\n".join(lines)


def _gib(folder: Path, size: str, method: dict[str, Any]) -> float:
    width, inner, blocks, heads, kv_heads = SIZES[size]
    place = folder / size
    place.mkdir(exist_ok=True)
    shape = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": 152064, "tie_word_embeddings": False, "max_position_embeddings": 32768,
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(shape))
    model = {**method}
    llm = {"path": str(place), "quantization": model.pop("quantization", None)}
    config = RunConfig.model_validate(
        {
            "output_dir": "run",
            "model": {"vision": None, "gradient_checkpointing": True, "llm": llm, **model},
            "data": {"max_length": 2048, "sources": [{"path": "records.json"}]},
            "train": {"max_steps": 1, "global_batch_size": 8, "micro_batch_size": 1, "precision": "bf16"},
            "engine": {"kind": "local", "device": "cuda"},
        }
    )
    return estimate(config, has_flash_attention=False).peak / GIB


def targets_table() -> str:
    lines = ["| type | linear layers of a block |", "|---|---|"]
    for family in FAMILIES:
        names = dict.fromkeys(name.rpartition(".")[2] for name in find_linears(toy_decoder(family)))
        lines.append(f"| {family} | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(lines)


def with_tables(document: str) -> str:
    for name, table in (("memory", memory_table), ("targets", targets_table)):
        before, _, rest = document.partition(MARK.format(f"begin {name}"))
        end = MARK.format(f"end {name}")
        document = f"{before}{MARK.format(f'begin {name}')}\n{table()}\n\n{end}{rest.partition(end)[2]}"
    return document


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{DOCUMENT.name}: tables written")
