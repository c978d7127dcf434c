"""Run by transformers 4 in an environment of its own, where vlm is not: what it makes of exports. Prints JSON lines.

python transformers4_reader.py FOLDER...    each with asked.npz: ids, pixels, logits and the path of the image
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

warnings.filterwarnings("ignore")
QUESTION = "What is this?"


def read_llava(folder: Path, asked: Any) -> dict[str, Any]:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, report = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    ids, pixels = torch.tensor(asked["ids"])[None], torch.tensor(asked["pixels"])
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[0]
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image, found = Image.open(str(asked["image"])), []
    for settings in ({}, {"add_special_tokens": False}):  # callers do the one or the other
        found.append(processor(images=image, text=text, return_tensors="pt", **settings))
    shown = [{"type": "image", "path": str(asked["image"])}, content[1]]
    found.append(
        processor.apply_chat_template(
            [{"role": "user", "content": shown}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )
    )  # fmt: skip
    return {
        "unread": [*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])],
        "logits": difference(logits, asked),
        "ids": [inputs["input_ids"][0].tolist() == asked["ids"].tolist() for inputs in found],
        "pixels": max(float((inputs["pixel_values"] - pixels).abs().max()) for inputs in found),
        "ends": model.generation_config.eos_token_id,
    }


def read_language_model(folder: Path, asked: Any) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    ids = torch.tensor(asked["ids"])[None]
    with torch.no_grad():
        logits = model(ids).logits[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    found = [tokenizer(text).input_ids, tokenizer(text, add_special_tokens=False).input_ids]
    return {
        "unread": [*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])],
        "logits": difference(logits, asked),
        "ids": [inputs == asked["ids"].tolist() for inputs in found],
        "pixels": 0.0,
        "ends": model.generation_config.eos_token_id,
    }


def difference(logits: torch.Tensor, asked: Any) -> float:
    """The largest, relative to the largest logit."""
    expected = torch.tensor(asked["logits"])
    return float((logits[:, : expected.shape[1]] - expected).abs().max() / expected.abs().max())


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        asked = np.load(folder / "asked.npz")
        try:
            read = read_llava if "pixels" in asked else read_language_model
            answer = {"version": transformers.__version__, **read(folder, asked)}
        except Exception as error:  # told to the test, for each folder
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps({"name": folder.name, **answer}), flush=True)


if __name__ == "__main__":
    main()
