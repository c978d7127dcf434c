"""A vision-language model and data small enough to train in seconds: random weights, drawn pictures, no downloads."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerFast

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (230, 200, 40),
    "purple": (140, 60, 180),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIDE = 56  # pixels
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ASK_NAME, ASK_SHAPE = "What is this?", "Which shape is it?"


def tiny_tokenizer(texts: Iterable[str], vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML's control tokens, like Qwen's and SmolLM2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(CONTROL),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=CONTROL[2], pad_token=CONTROL[0])


def write_llm(folder: Path, texts: Iterable[str], seed: int = 0) -> None:
    """A Llama of 2 blocks, 64 wide, with its tokenizer and chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from vlm.data.template import TEMPLATES

    tokenizer = tiny_tokenizer(texts)
    tokenizer.chat_template = TEMPLATES["chatml"].jinja(None, CONTROL[2], tokenizer_adds_bos=False)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_encoder(folder: Path, seed: int = 0) -> None:
    """A CLIP vision model of 3 blocks, 32 wide, for pictures of 56 pixels in patches of 14: 16 patches."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    normalisation = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(normalisation), encoding="utf-8")


def draw(colour: str, shape: str, rng: random.Random) -> Image.Image:
    """A shape of one colour on white, somewhere in the picture."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(image)
    size = rng.randint(24, 40)
    left, top = rng.randint(0, SIDE - size), rng.randint(0, SIDE - size)
    box = (left, top, left + size, top + size)
    fill = COLOURS[colour]
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    elif shape == "triangle":
        pen.polygon([(left, top + size), (left + size // 2, top), (left + size, top + size)], fill=fill)
    else:
        third = size // 3
        pen.rectangle((left + third, top, left + 2 * third, top + size), fill=fill)
        pen.rectangle((left, top + third, left + size, top + 2 * third), fill=fill)
    return image


def write_data(folder: Path, copies: int = 4, seed: int = 0) -> list[str]:
    """Pictures of every colour and shape with captions, conversations and evaluation files.

    Returns:
        all texts, to train a tokenizer on.
    """
    rng = random.Random(seed)
    parts: dict[str, list[dict[str, Any]]] = {"pretrain": [], "finetune": [], "eval_shape": [], "eval_caption": []}
    (folder / "images").mkdir(parents=True)
    for copy, colour, shape in itertools.product(range(copies), COLOURS, SHAPES):
        name, caption, answer = f"{colour}-{shape}-{copy}.png", f"A {colour} {shape}.", f"A {shape}."
        draw(colour, shape, rng).save(folder / "images" / name)
        if copy == 0:
            choices = [f"A {other}." for other in SHAPES]
            parts["eval_shape"].append({"image": name, "prompt": ASK_SHAPE, "choices": choices, "answer": answer})
            parts["eval_caption"].append({"image": name, "prompt": ASK_NAME, "answer": caption})
            continue
        parts["pretrain"].append({"image": name, "caption": caption})
        turns = [(ASK_NAME, caption), (ASK_SHAPE, answer)]
        spoken = [
            {"from": who, "value": text}
            for question, reply in turns[: rng.randint(1, 2)]
            for who, text in (("human", question), ("gpt", reply))
        ]
        spoken[0]["value"] = f"<image>\n{spoken[0]['value']}"
        parts["finetune"].append({"image": name, "conversations": spoken})
    for part, records in parts.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    return [f"{ASK_NAME} A {colour} {shape}. {ASK_SHAPE} A {shape}." for colour in COLOURS for shape in SHAPES]
