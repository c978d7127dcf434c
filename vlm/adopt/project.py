"""The files of an adopted project: one for each stage, and a trial of both parts in a few steps."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm.adopt.drawn import CAPTIONS, CONVERSATIONS, IMAGES
from vlm.adopt.look import Pair
from vlm.config import BASE, project_folders
from vlm.errors import ConfigError
from vlm.models.config import EncoderConfig

PRETRAIN, FINETUNE, LORA, TRIAL = "pretrain.yaml", "finetune.yaml", "finetune_lora.yaml", "trial.yaml"
_PLAIN = re.compile(r"(\.{0,2}/)?[A-Za-z_][\w./-]*")
_WORDS = {PRETRAIN: 40, FINETUNE: 350}  # tokens of text beside an image: LLaVA-1.5's captions and conversations
_RECORDS = {PRETRAIN: 256, FINETUNE: 128}  # a step, LLaVA-1.5's
_MICRO_BATCH = 4
_TRIAL_WORDS = 160  # tokens of text that a drawn record has at most
_WORDS_OF_YAML = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")


@dataclass(frozen=True)
class Sources:
    """Data files and the folder of their images; of an adopted project without data, drawn ones."""

    captions: str
    conversations: str
    images: str | None
    are_drawn: bool

    @classmethod
    def drawn(cls, folder: Path) -> Sources:
        return cls(str(folder / CAPTIONS), str(folder / CONVERSATIONS), str(folder / IMAGES), True)

    def lines(self, path: str, prompt: str | None = None, stay: bool = False) -> list[str]:
        """`data.sources` as YAML. `stay`: drawn images are what is meant."""
        keys = [f"path: {_text(path)}"]
        keys += [f"images: {_text(self.images)}"] if self.images is not None else []
        keys += [f"prompt: {_text(prompt)}"] if prompt is not None else []
        note = "  # drawn shapes, until your own data stands here" if self.are_drawn and not stay else ""
        return [f"  sources:{note}", f"    - {{{', '.join(keys)}}}"]


def write_project(folder: Path, pair: Pair, sources: Sources, drawn: Sources, micro_batches: Mapping[str, int]) -> None:
    """Write the YAML files.

    Args:
        sources: of the stages.
        drawn: of the trial.
        micro_batches: rows per forward by file, where the usual number does not fit into memory.
    """
    _copy_bases(folder / BASE)
    write = {PRETRAIN: _pretrain, FINETUNE: _finetune}
    for name, text in write.items():
        lines = text(folder, pair, sources)
        rows = micro_batches.get(name, _MICRO_BATCH)
        (folder / name).write_text("\n".join([*lines, *_sizes(name, pair, rows)]) + "\n", encoding="utf-8")
    if pair.has_linears:
        lines = _lora()
        if {FINETUNE, LORA} & set(micro_batches):  # not what the stage below it has
            lines += ["train:", f"  micro_batch_size: {micro_batches.get(LORA, _MICRO_BATCH)}  # as many as fit"]
        (folder / LORA).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / TRIAL).write_text("\n".join(_trial(pair, drawn)) + "\n", encoding="utf-8")


def stages(pair: Pair) -> list[str]:
    return [PRETRAIN, FINETUNE, LORA] if pair.has_linears else [PRETRAIN, FINETUNE]


def _pretrain(folder: Path, pair: Pair, sources: Sources) -> list[str]:
    assert pair.model.vision is not None
    first, *others = pair.model.vision.encoders
    model = [f"  vision: {_encoder(first)}"]
    if others:
        model = [
            "  vision:",
            *(f"    {key}: {value}" for key, value in _encoder_keys(first).items()),
            "    fuse_with:",
            *(f"      - {_encoder(each)}" for each in others),
            "    fuse_by: channel",
        ]
    projector = pair.model.projector.model_dump(exclude_defaults=True)
    keys = ", ".join(f"{key}: {value}" for key, value in {"kind": pair.model.projector.kind, **projector}.items())
    template = "plain" if pair.has_end else pair.template.name
    prompt = None if pair.has_end else "What is shown here?"
    return [
        "# Stage 1: the projector, on captions. The other files take the model from here.",
        f"base: {BASE}/{PRETRAIN}",
        f"name: {_text(folder.resolve().name)}",
        f"output_dir: cache/runs/${{name}}/{Path(PRETRAIN).stem}",
        "model:",
        *model,
        f"  projector: {{{keys}}}  # {pair.tokens_per_image} tokens an image",
        f"  llm: {{path: {_text(pair.model.llm.path)}}}",
        "data:",
        f"  template: {template}",
        *sources.lines(sources.captions, prompt),
        *_packing(pair),
    ]


def _finetune(folder: Path, pair: Pair, sources: Sources) -> list[str]:
    return [
        "# Stage 2: the projector and all of the language model, on conversations.",
        f"base: [{PRETRAIN}, {BASE}/{FINETUNE}]",
        f"output_dir: cache/runs/${{name}}/{Path(FINETUNE).stem}",
        f"init_from: cache/runs/${{name}}/{Path(PRETRAIN).stem}/export",
        "data:",
        f"  template: {pair.template.name}  # {pair.template.why}",
        *sources.lines(sources.conversations),
        *_packing(pair),
    ]


def _lora() -> list[str]:
    return [
        "# Stage 2 with adapters: the projector and LoRA on the language model.",
        f"base: [{FINETUNE}, {BASE}/{LORA}]",
        f"output_dir: cache/runs/${{name}}/{Path(LORA).stem}",
    ]


def _trial(pair: Pair, drawn: Sources) -> list[str]:
    """Of both parts, so that all that was found shows in two steps."""
    return [
        "# Whether the two train here: a few steps on drawn images, from a new projector.",
        f"base: {LORA if pair.has_linears else FINETUNE}",
        f"output_dir: cache/runs/${{name}}/{Path(TRIAL).stem}",
        "init_from: null",
        "data:",
        *drawn.lines(drawn.conversations, stay=True),
        f"  max_length: {min(pair.max_length, 2 * (pair.tokens_per_image + _TRIAL_WORDS))}",
        "  workers: 0",
        "  held_out: 0",
        "train:",
        "  epochs: null",
        "  max_steps: 2",
        "  global_batch_size: 2",
        "  micro_batch_size: 1",
        "  save_every: 2",
        "  eval_every: null",
    ]


def _packing(pair: Pair) -> list[str]:
    return [f"  packing: {str(pair.packs).lower()}", f"  max_length: {pair.max_length}"]


def _sizes(name: str, pair: Pair, micro_batch: int) -> list[str]:
    """Rows of a step and of a forward, so that a step has about as many records as LLaVA-1.5's."""
    records, note = _RECORDS[name], ""
    rows = records
    if pair.packs:
        per_row = max(1, pair.max_length // (pair.tokens_per_image + _WORDS[name]))
        rows = max(1, round(records / per_row / _MICRO_BATCH)) * _MICRO_BATCH
        note = f"  # some {per_row} records a row, about {records} a step"
    return ["train:", f"  global_batch_size: {rows}{note}", f"  micro_batch_size: {micro_batch}"]


def _encoder_keys(encoder: EncoderConfig) -> dict[str, str]:
    keys = {"backend": encoder.backend, "path": _text(encoder.path)}
    if encoder.pretrained is not None:
        keys["pretrained"] = _text(encoder.pretrained)
    if encoder.layer != -1:
        keys["layer"] = str(encoder.layer)
    return keys


def _encoder(encoder: EncoderConfig) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in _encoder_keys(encoder).items()) + "}"


def _text(value: str) -> str:
    """As YAML reads it again; quoted where it may look like something else.

    >>> _text("cache/ckpt/clip"), _text("1e3: x"), _text("no")
    ('cache/ckpt/clip', '"1e3: x"', '"no"')
    """
    is_plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS_OF_YAML
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _copy_bases(target: Path) -> None:
    found = next((folder / BASE for folder in project_folders() if (folder / BASE / PRETRAIN).is_file()), None)
    if found is None:
        raise ConfigError(f"no projects/{BASE} here, which hold the rates of the stages; run this in the repository")
    target.mkdir(parents=True, exist_ok=True)
    for name in (PRETRAIN, FINETUNE, LORA):
        shutil.copyfile(found / name, target / name)
