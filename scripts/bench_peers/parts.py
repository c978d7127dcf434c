"""Models with random weights and drawn records, from toy size to 7B, and our config for each job."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.prepared import is_prepared, prepare, recipe_of
from demo.tiny import tiny_tokenizer


@dataclass(frozen=True)
class Shape:
    """Sizes of the encoder (CLIP's form) and of the language model (Qwen2's form)."""

    image_size: int
    patch: int
    vision: tuple[int, int, int, int]  # width, MLP, blocks, heads
    llm: tuple[int, int, int, int, int]  # width, MLP, blocks, heads, heads of keys and values
    vocabulary: int
    tied: bool  # whether the head is the embedding
    checkpointing: bool = False

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch) ** 2


_CLIP_L = {"image_size": 336, "patch": 14, "vision": (1024, 4096, 24, 16)}
SHAPES = {
    "tiny": Shape(56, 14, (32, 64, 3, 2), (64, 128, 2, 4, 2), 2048, tied=True),  # of the tests
    "toy": Shape(224, 14, (384, 1536, 12, 6), (512, 1408, 8, 8, 8), 32000, tied=True),  # CLIP ViT-S-like
    "0.5b": Shape(**_CLIP_L, llm=(896, 4864, 24, 14, 2), vocabulary=151936, tied=True),
    "1.5b": Shape(**_CLIP_L, llm=(1536, 8960, 28, 12, 2), vocabulary=151936, tied=True, checkpointing=True),
    "7b": Shape(**_CLIP_L, llm=(3584, 18944, 28, 28, 4), vocabulary=152064, tied=False, checkpointing=True),
}


@dataclass(frozen=True)
class Job:
    """What trains on what."""

    name: str
    title: str
    records: str  # captions, conversations, or questions: four short conversations about each image
    trainable: tuple[str, ...]
    learning_rate: float = 1e-4
    text_tokens: int = 190  # of a record, about
    by_record: bool = False  # time is counted per record, not per token: what is shared is computed once


JOBS = {
    job.name: job
    for job in (
        Job("J1", "captions, the projector trains", "captions", ("projector",), 1e-3, 26),
        Job("J2", "conversations, all but the encoder trains", "conversations", ("projector", "llm")),
        Job(
            "J2-shared",
            "four short conversations about each image, all but the encoder trains",
            "questions",
            ("projector", "llm"),
            text_tokens=60,
            by_record=True,
        ),
        Job("J2-lora", "conversations, projector and adapters train", "conversations", ("projector", "llm.lora")),
    )
}
LORA = {"rank": 16, "alpha": 32}
_SYLLABLES = ("ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu")


def draw_records(folder: Path, shape: Shape, count: int) -> list[str]:
    """`captions.jsonl`, `conversations.jsonl`, `questions.jsonl` and their images. Returns all texts.

    Images have the encoder's size, so that every trainer sees the same pixels, whatever it resizes with.
    """
    from PIL import Image, ImageDraw

    rng = random.Random(0)
    words = [first + second + third for first in _SYLLABLES for second in _SYLLABLES for third in _SYLLABLES[:5]]
    (folder / "images").mkdir(parents=True)
    side, texts = shape.image_size, []

    def say(least: int, most: int) -> str:
        text = " ".join(rng.choices(words, k=rng.randint(least, most)))
        texts.append(text)
        return text

    def colour() -> tuple[int, int, int]:
        return (rng.randrange(256), rng.randrange(256), rng.randrange(256))

    with (
        (folder / "captions.jsonl").open("w") as captions,
        (folder / "conversations.jsonl").open("w") as conversations,
        (folder / "questions.jsonl").open("w") as questions,
    ):
        for number in range(count):
            image = Image.new("RGB", (side, side), colour())
            for _ in range(4):
                left, top = rng.randrange(side), rng.randrange(side)
                ImageDraw.Draw(image).ellipse((left, top, left + side // 3, top + side // 3), fill=colour())
            name = f"{number:06d}.jpg"
            image.save(folder / "images" / name, quality=90)
            turns = [(say(8, 20), say(10, 100)) for _ in range(rng.randint(1, 4))]
            spoken = [
                {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
            ]
            spoken[0]["value"] = f"<image>\n{spoken[0]['value']}"
            captions.write(json.dumps({"image": name, "caption": say(10, 40)}) + "\n")
            conversations.write(json.dumps({"images": [name], "conversations": spoken}) + "\n")
            for _ in range(4):
                asked = [{"from": "human", "value": f"<image>\n{say(6, 10)}"}, {"from": "gpt", "value": say(12, 24)}]
                questions.write(json.dumps({"images": [name], "conversations": asked}) + "\n")
    return texts


def write_models(folder: Path, shape: Shape, texts: Sequence[str], precision: str) -> None:
    """`llm` and `encoder`, with random weights."""
    import torch

    from vlm import compat

    compat.prepare()
    from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

    from vlm.data.template import TEMPLATES

    tokenizer = tiny_tokenizer(texts, min(2000, shape.vocabulary - 8))
    tokenizer.chat_template = TEMPLATES["chatml"].jinja(None, tokenizer.eos_token, tokenizer_adds_bos=False)
    width, mlp, blocks, heads, kv_heads = shape.llm
    settings = Qwen2Config(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=shape.vocabulary, max_position_embeddings=32768,
        tie_word_embeddings=shape.tied, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if precision == "bf16" else torch.float32)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # minutes for 7B on a CPU
        Qwen2ForCausalLM(settings).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    width, mlp, blocks, heads = shape.vision
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width, intermediate_size=mlp, num_hidden_layers=blocks, num_attention_heads=heads,
            image_size=shape.image_size, patch_size=shape.patch, hidden_act="quick_gelu",
        )
    ).save_pretrained(folder / "encoder")  # fmt: skip
    torch.set_default_dtype(torch.float32)
    normalisation = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.275778]}
    (folder / "encoder/preprocessor_config.json").write_text(json.dumps(normalisation))


def write_llava(folder: Path, config: Path) -> None:
    """The whole model as transformers' LLaVA class, with its processor, as `vlm export --format hf` writes it."""
    from vlm.config import load_config
    from vlm.data.build import build_conversation_tokenizer
    from vlm.export.hf import write_llava as write
    from vlm.export.read_back import ask
    from vlm.models.build import build_model

    model = load_config(str(config)).model
    built = build_model(model)
    built.model.eval()
    tokens = build_conversation_tokenizer(
        load_config(str(config)).data, built.tokenizer, built.image_spec, built.image_token_id
    )
    write(folder, model, built, tokens, ask(built, tokens), "4GB")


def prepare_parts(cache: Path, name: str, precision: str, count: int) -> Path:
    """Models and at least `count` records of a shape, made once."""
    folder = cache / f"{name}-{precision}-{count}"
    recipe = recipe_of([Path(__file__)])

    def write(temporary: Path) -> None:
        texts = draw_records(temporary / "data", SHAPES[name], count)
        write_models(temporary, SHAPES[name], texts, precision)

    if not is_prepared(folder, recipe):
        prepare(folder, recipe, write)
    return folder


def settings_of(
    job: Job, shape: Shape, parts: Path, *, precision: str, device: str, batch: int, options: Sequence[str]
) -> dict[str, Any]:
    """Our config. As many rows a step as hold about `batch` records, whatever `options` say of packing and rows.

    Args:
        options: overrides that the run will get on top, `key=value`.
    """
    given = dict(option.split("=", 1) for option in options)
    packing = given.get("data.packing", "true") == "true"
    max_length = int(given.get("data.max_length", 2048))
    rows = max(1, round(batch * tokens_of(job, shape) / max_length)) if packing else batch
    images = str(parts / "data/images")
    return {
        "output_dir": str(parts / "run"),
        "model": {
            "vision": {"backend": "hf", "path": str(parts / "encoder"), "layer": -1, "resize": "squash"},
            "projector": {"kind": "mlp"},
            "llm": {"path": str(parts / "llm")},
            "trainable": list(job.trainable),
            "lora": LORA if "llm.lora" in job.trainable else None,
            "gradient_checkpointing": shape.checkpointing,
        },
        "data": {
            "template": "plain" if job.records == "captions" else "chatml",
            "sources": [{"path": str(parts / f"data/{job.records}.jsonl"), "images": images}],
            "cache": str(parts / "cache"),
        },
        "train": {
            "max_steps": 1,
            "global_batch_size": rows,
            "micro_batch_size": 1 if packing else batch,
            "learning_rate": job.learning_rate,
            "precision": precision,
        },
        "engine": {"device": device},
    }  # fmt: skip


def tokens_of(job: Job, shape: Shape) -> int:
    """Of a record, about."""
    return shape.patches + job.text_tokens


def needed_flops(job: Job, shape: Shape, *, tokens: float, supervised: float, encodes: bool) -> float:
    """Floating-point operations that a record of so many tokens needs: no padding, logits at supervised positions.

    2 per weight and token forward, as many for the gradient of what a layer reads, as many for that of its weights.
    Causal attention counts its lower half.
    """
    width, mlp, blocks, heads, kv_heads = shape.llm
    weights = blocks * (2 * width**2 + 2 * width * (width // heads) * kv_heads + 3 * width * mlp)
    passes = 3 if "llm" in job.trainable else 2
    flops = passes * 2 * (weights * tokens + shape.vocabulary * width * supervised)
    flops += 3 * blocks * 2 * width * tokens**2
    if encodes:
        width, mlp, blocks, _ = shape.vision
        seen = shape.patches + 1
        flops += 2 * blocks * (4 * width**2 + 2 * width * mlp) * seen + 4 * blocks * width * seen**2
    return flops
