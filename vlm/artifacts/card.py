"""README.md of an export: a model card, drafted from what the program knows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.artifacts.manifest import Manifest
from vlm.models.encoders.kinds import VISION_BACKENDS
from vlm.schema import is_local

_DATA_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".tar", ".gz", ".zip", ".txt")

_TRANSFORMERS_USE = """\
Or with transformers alone:

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}", backend="pil")  # resizes exactly as in training
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is this?"}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
image = Image.open("image.png").convert("RGB")
inputs = processor(images=image, text=text, add_special_tokens=False, return_tensors="pt")
new_ids = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(new_ids, skip_special_tokens=True))
```
"""

_REWARD_USE = """\
## Use

It scores replies, and writes none.

```bash
vlm predict {name} --data pairs.jsonl
```

```python
from vlm.inference.reward import load_reward_model

score = load_reward_model("{name}")  # conversations -> a float each
```
"""


def draft_card(manifest: Manifest, name: str, notes: list[str], evidence: Sequence[str] = ()) -> str:
    """
    Args:
        name: of the export's folder.
        notes: lines about this export that a user should know.
        evidence: sections about its quality; see `vlm.artifacts.evidence`.
    """
    origin = manifest.origin
    bases = [base for base in (origin.get("llm"), origin.get("vision")) if base and not _is_place(base)]
    lines = [
        "---",
        "library_name: " + ("transformers" if manifest.layout == "llava" else "vlm"),
        "pipeline_tag: " + _task(manifest),
        *(["base_model:"] if bases else []),  # names on a hub
        *(f"- {json.dumps(base)}" for base in bases),
        "---",
        "",
        f"# {name}",
        "",
        "Draft. Say here what the model is for, how good it is (`vlm eval`), and what it must not be used for.",
        "",
        *_table(manifest),
        "",
        *_use(manifest, name),
    ]
    lines += evidence
    if notes:
        lines += ["## Notes", "", *(f"- {note}" for note in notes), ""]
    lines += ["## License", "", "The licenses of the base models and of the training data apply.", ""]
    return "\n".join(lines)


def public_name(value: Any) -> Any:
    """A name on a hub as it is; of a folder or file here the last part alone, for others to read.

    >>> public_name("/home/me/models/smollm2"), public_name("Qwen/Qwen2.5-7B"), public_name(["data/cats.json"])
    ('smollm2', 'Qwen/Qwen2.5-7B', ['cats.json'])
    """
    if isinstance(value, list):
        return [public_name(each) for each in value]
    if not isinstance(value, str) or not _is_place(value):
        return value
    return Path(value).name or value


def _is_place(value: str) -> bool:
    return is_local(value) or Path(value).exists() or Path(value).suffix in _DATA_FILES


def _table(manifest: Manifest) -> list[str]:
    origin = {key: public_name(value) for key, value in manifest.origin.items()}
    rows = {
        "language model": origin.get("llm"),
        "vision encoder": _vision_line(manifest),
        "projector": _projector_line(manifest),
        "trained": ", ".join(manifest.trained),
        "optimizer steps": origin.get("steps"),
        "training data": ", ".join(origin.get("data", [])),
        "images in the data": _order_line(origin.get("image_orders") or {}),
        "started from": origin.get("init_from"),
        "chat template": manifest.template + (f", system prompt {manifest.system!r}" if manifest.system else ""),
        "in this folder": _contents(manifest),
    }
    return ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows.items() if value)]


def _task(manifest: Manifest) -> str:
    """Of the names that hubs know."""
    if manifest.scores:
        return "text-classification"
    return "image-text-to-text" if manifest.image_spec else "text-generation"


def _use(manifest: Manifest, name: str) -> list[str]:
    sees = manifest.image_spec is not None
    if manifest.scores:
        return _REWARD_USE.format(name=name).split("\n")
    flag, argument = (" --image image.png", ', images=["image.png"]') if sees else ("", "")
    lines = ["## Use", "", "```bash", f"vlm chat {name}{flag} --prompt 'What is this?'", "```", ""]
    lines += ["```python", "import vlm", "", f'model = vlm.load("{name}")']
    lines += [f'print(model.chat("What is this?"{argument}))', "```", ""]
    if manifest.layout == "llava":
        lines.append(_TRANSFORMERS_USE.format(name=name))
    if "llm.lora" in manifest.included:
        lines += ["`adapter/` is in peft's layout: `PeftModel.from_pretrained(language_model, 'adapter')`.", ""]
    return lines


def _vision_line(manifest: Manifest) -> str:
    vision, spec = manifest.model.vision, manifest.image_spec
    if vision is None or spec is None:
        return "none: a plain language model"
    names = [manifest.origin.get("vision"), *manifest.origin.get("fused_with", [])]
    parts = [
        f"{public_name(name)} ({VISION_BACKENDS[each.backend].describe(each)}), {seen.size} x {seen.size} pixels "
        f"({seen.resize})"
        for name, each, seen in zip(names, vision.encoders, spec.members, strict=True)
    ]
    return f"{f' fused by {vision.fuse_by} with '.join(parts)}, {spec.num_tokens} tokens an image"


def _order_line(counts: dict[str, int]) -> str:
    """Where images stood in the turns that were counted."""
    named = {"first": "before the words", "last": "after the words", "mixed": "between words"}
    return ", ".join(f"{name} in {counts[key]:,} turns" for key, name in named.items() if counts.get(key))


def _projector_line(manifest: Manifest) -> str:
    return "" if manifest.image_spec is None else manifest.model.projector.describe()


def _contents(manifest: Manifest) -> str:
    if manifest.full:
        return "everything; no base models are needed"
    return f"{', '.join(manifest.included)}; the base models are needed beside it"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
