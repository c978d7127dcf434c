"""Folders of models as `vlm validate` reads them: the text files of real ones, and empty files for weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ["a", "b", "<|im_start|>", "<|im_end|>"]


def write_llm_folder(folder: str | Path, words: list[str] = WORDS, rows: int = 4, **settings: Any) -> Path:
    """A Llama whose tokenizer has `words`, those in angle brackets as added tokens, and whose end token is the last."""
    folder = Path(folder)
    write_config(
        folder, **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": rows} | settings
    )
    (folder / "model.safetensors").touch()
    ids = {word: number for number, word in enumerate(words)}
    added = [{"id": number, "content": word} for word, number in ids.items() if word.startswith("<")]
    tokenizer = {"model": {"type": "WordLevel", "vocab": ids}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": words[-1]}))
    return folder


def write_encoder_folder(folder: str | Path, model_type: str = "clip_vision_model", **settings: Any) -> Path:
    folder = Path(folder)
    write_config(folder, model_type=model_type, architectures=["CLIPVisionModel"], **settings)
    (folder / "model.safetensors").touch()
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def write_config(folder: Path, **settings: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
