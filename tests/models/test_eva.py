"""EVA-CLIP-g from its own checkpoint, at toy size: timm's network against transformers' `Blip2VisionModel`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlm.compat import prepare
from vlm.errors import CheckpointError
from vlm.models.config import VisionConfig
from vlm.models.encoders import eva_pth
from vlm.models.vision import build_vision

WIDTH, MLP, BLOCKS = 24, 48, 3
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def published(num_blocks: int) -> dict[str, Tensor]:
    """eva_vit_g.pth by its names, of random weights; without keys' biases, which EVA does not have."""
    torch.manual_seed(0)
    shapes = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 5, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 14, 14), "patch_embed.proj.bias": (WIDTH,),
    }  # fmt: skip
    for n in range(num_blocks):
        for name, rows, columns in (("attn.proj", WIDTH, WIDTH), ("mlp.fc1", MLP, WIDTH), ("mlp.fc2", WIDTH, MLP)):
            shapes |= {f"blocks.{n}.{name}.weight": (rows, columns), f"blocks.{n}.{name}.bias": (rows,)}
        shapes |= {f"blocks.{n}.norm{i}.{leaf}": (WIDTH,) for i in (1, 2) for leaf in ("weight", "bias")}
        shapes |= {f"blocks.{n}.attn.qkv.weight": (3 * WIDTH, WIDTH)}
        shapes |= {f"blocks.{n}.attn.{name}": (WIDTH,) for name in ("q_bias", "v_bias")}
    return {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()} | {"norm.weight": torch.ones(WIDTH)}


def of_blip2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by the names of transformers, as its conversion of BLIP-2 has them."""
    pairs = {
        "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj": "embeddings.patch_embedding", "blocks": "encoder.layers", ".norm": ".layer_norm",
        "attn.proj": "self_attn.projection", "attn.qkv": "self_attn.qkv",
    }  # fmt: skip
    found = {}
    for name, tensor in tensors.items():
        if name.startswith("norm.") or name.endswith("v_bias"):
            continue
        if name.endswith("q_bias"):
            value = tensors[name.replace("q_bias", "v_bias")]
            name, tensor = name.replace("q_bias", "qkv.bias"), torch.cat([tensor, torch.zeros(WIDTH), value])
        for old, new in pairs.items():
            name = name.replace(old, new)
        found[name] = tensor
    return found


@pytest.fixture
def small(monkeypatch):
    """The architecture of this name at toy size."""
    prepare()
    import timm
    from timm.models import eva

    def eva_giant_patch14_224(pretrained=False, **kwargs):
        settings = {"patch_size": 14, "embed_dim": WIDTH, "depth": BLOCKS, "num_heads": 2, "mlp_ratio": MLP / WIDTH}
        return eva._create_eva("eva_giant_patch14_224", pretrained=pretrained, img_size=28, **settings, **kwargs)

    monkeypatch.setitem(timm.models._registry._model_entrypoints, "eva_giant_patch14_224", eva_giant_patch14_224)


def encoder(file, tensors, **settings):
    torch.save({name: tensor.half() for name, tensor in tensors.items()}, file)
    config = VisionConfig(backend="timm", path="eva_giant_patch14_224", pretrained=str(file), image_size=28, **settings)
    return build_vision(config)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("num_blocks", [2, 3])
def test_its_own_file_gives_the_features_of_transformers_class(tmp_path, num_blocks):
    from transformers import Blip2VisionConfig, Blip2VisionModel

    tensors = {name: tensor.half().float() for name, tensor in published(num_blocks).items()}
    settings = {"hidden_size": WIDTH, "intermediate_size": MLP, "num_attention_heads": 2, "image_size": 28}
    tower = Blip2VisionModel(Blip2VisionConfig(num_hidden_layers=2, **settings)).eval()
    theirs = {name: tensor for name, tensor in of_blip2(tensors).items() if "layers.2." not in name}
    assert tower.load_state_dict(theirs, strict=False).missing_keys == ["post_layernorm.weight", "post_layernorm.bias"]
    tower.save_pretrained(tmp_path / "blip2")
    ours = encoder(tmp_path / "eva_vit_g.pth", tensors, layer=-2, keep_class_token=True)
    other = build_vision(VisionConfig(backend="hf", path=str(tmp_path / "blip2"), keep_class_token=True))
    features = ours(PIXELS)
    assert features.shape == (2, 5, WIDTH)
    assert features.std() > 0.5
    assert (features - other(PIXELS)).abs().max() < 1e-4  # worst seen: 4e-6
    assert ours.mean == other.mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)


@pytest.mark.usefixtures("small")
def test_a_file_of_another_network_or_too_short_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"lacks 13 weights of the blocks that are used, e\.g\. blocks\.2\."):
        encoder(tmp_path / "short.pth", published(2))
    with pytest.raises(CheckpointError, match=r"tensors cannot be read:\n  visual\.proj: no rule is for it"):
        encoder(tmp_path / "clip.pth", {"visual.proj": torch.zeros(2, 2)})
    wider = {**published(3), "cls_token": torch.zeros(1, 1, 8)}
    with pytest.raises(CheckpointError, match=r"cls_token: \[1, 1, 8\] -> \[1, 1, 24\]"):
        encoder(tmp_path / "wider.pth", wider)
    assert eva_pth.EVA_PTH.to_ours(published(3)).is_invertible is False  # the last norm is left out


def test_a_whole_blip2_gives_its_encoder(tmp_path):
    prepare()
    from safetensors.torch import save_file
    from transformers import Blip2VisionConfig, Blip2VisionModel

    settings = {"hidden_size": WIDTH, "intermediate_size": MLP, "num_attention_heads": 2, "image_size": 28}
    tower = Blip2VisionModel(Blip2VisionConfig(num_hidden_layers=2, initializer_range=0.2, **settings)).eval()
    tower.save_pretrained(tmp_path)
    save_file(
        {f"vision_model.{name}": tensor.contiguous() for name, tensor in tower.state_dict().items()}
        | {"query_tokens": torch.zeros(1, 2, 4)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    built = build_vision(VisionConfig(backend="hf", path=str(tmp_path), layer=-1))
    assert torch.equal(built.trunk.model.encoder.layers[1].mlp.fc1.weight, tower.encoder.layers[1].mlp.fc1.weight)
