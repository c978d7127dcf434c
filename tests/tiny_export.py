"""Tiny random models in real formats, and runs of them, for the tests of export, chat and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vlm.compat import prepare
from vlm.models.build import Assembled, build_model
from vlm.models.config import ModelConfig
from vlm.models.trainable import trained_weights
from vlm.train.checkpoint import save_checkpoint

TEXT = [
    "What is this? A red square. A green circle. A blue picture of a cat. Is it a dog? Yes. No. It is a bird.",
    "这是什么？一个红色的方块。一只蓝色的猫。是的。不是。",
    "system user assistant\n one two three four five six seven eight nine ten",
]


def write_tokenizer(folder: Path, eos: str = "<|im_end|>") -> None:
    """Byte-level BPE with the ChatML tokens; most Chinese characters are two or three tokens of it."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT[0], TEXT[2]], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    fast.save_pretrained(folder)


def write_llm(folder: Path, *, width: int = 32, seed: int = 0, tied: bool = True, max_positions: int = 256) -> Path:
    prepare()
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_decoder(folder: Path, family: str, *, eos: str = "<|im_end|>", seed: int = 0, **changes: Any) -> Path:
    """A causal language model of any type of transformers; biases and norms are moved off their zeros and ones."""
    prepare()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, eos)
    sizes = {
        "vocab_size": len(AutoTokenizer.from_pretrained(folder)), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None,
        "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def write_clip(folder: Path, *, width: int = 32, seed: int = 0, image_size: int = 28) -> Path:
    prepare()
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=4,
        image_size=image_size, patch_size=7, projection_dim=16,
    )  # fmt: skip
    model = CLIPVisionModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def write_siglip(folder: Path, *, width: int = 32, seed: int = 0) -> Path:
    prepare()
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=4,
        image_size=28, patch_size=7,
    )  # fmt: skip
    model = SiglipVisionModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def write_image(path: Path, size: tuple[int, int] = (48, 32), seed: int = 0) -> Path:
    """Gradients with a disc: smooth and sharp parts, not square."""
    width, height = size
    red = Image.linear_gradient("L").resize(size)
    green = Image.radial_gradient("L").resize(size)
    blue = Image.linear_gradient("L").rotate(90 * (seed % 4)).resize(size)
    image = Image.merge("RGB", (red, green, blue))
    draw = ImageDraw.Draw(image)
    left = 5 + 3 * (seed % 5)
    draw.ellipse((left, 8, left + width // 3, 8 + height // 2), fill=(250, 40 * (seed % 6), 20))
    image.save(path)
    return path


def model_config(root: Path, **changes: Any) -> ModelConfig:
    """CLIP + linear projector + Llama, all tiny; both bases are written below `root` if they are not there."""
    clip, llm = root / "clip", root / "llm"
    if not clip.exists():
        write_clip(clip)
    if not llm.exists():
        write_llm(llm)
    values: dict[str, Any] = {
        "vision": {"backend": "hf", "path": str(clip), "layer": -2},
        "projector": {"kind": "linear", "normalize": True},
        "llm": {"path": str(llm)},
        "lora": {"rank": 4, "alpha": 8},
        "trainable": ["projector", "llm.lora"],
    }
    return ModelConfig.model_validate(values | changes)


def write_run(
    run: Path, config: ModelConfig, *, template: str = "chatml", init_from: Path | None = None, seed: int = 1
) -> Assembled:
    """A run folder with one checkpoint. What it `trained` is moved off its start, so that nothing is zero."""
    built = build_model(config, seed=seed)
    torch.manual_seed(seed)
    if init_from is not None:
        from vlm.artifacts.initial import load_init

        load_init(built.model, config, init_from)
    if built.model.projector is not None and config.projector.normalize and init_from is None:
        built.model.projector.calibrate(torch.randn(2, 9, built.model.projector.in_width) * 2 + 1)
    with torch.no_grad():
        for parameter in built.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_run(run, config, trained_weights(built.model), template=template, init_from=init_from)
    built.model.eval()
    return built


def save_run(
    run: Path, config: ModelConfig, weights: dict[str, torch.Tensor], *, template: str = "chatml",
    init_from: Path | None = None, step: int = 7, info: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    whole = {
        "output_dir": str(run),
        "init_from": None if init_from is None else str(init_from),
        "model": config.model_dump(mode="json"),
        "data": {"template": template, "sources": [{"path": "records.json"}]},
    }
    (run / "config.yaml").write_text(json.dumps(whole))  # JSON is YAML

    def write(folder: Path) -> None:
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
        save_file(tensors, folder / "weights.safetensors")

    save_checkpoint(run, step, write, info or {}, keep_last=2)
