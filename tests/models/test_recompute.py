"""Gradient checkpointing of a trained encoder: the same gradients, far less kept, statistics moved once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import changed, write_timm, write_vision
from torch import Tensor, nn

from vlm.models.build import build_model
from vlm.models.config import ModelConfig
from vlm.models.recompute import checkpoint_blocks, find_units
from vlm.models.vision import VisionEncoder

# Most of what is kept that may be kept. Seen: 0.76 of test_resnet, most of which is its stem; 0.55, 0.52 and less
ARCHITECTURES = {
    "test_vit": 0.5, "test_resnet": 0.9, "test_efficientnet": 0.7, "test_convnext": 0.5, "test_byobnet": 0.6,
    "regnety_002": 0.5, "levit_128s": 0.7,
}  # fmt: skip


def timm_config(folder: Path, architecture: str) -> dict[str, object]:
    import timm

    torch.manual_seed(0)
    path = write_timm(folder / architecture, architecture, timm.create_model(architecture))
    return {"backend": "timm", "path": str(path)}


def trained(config: ModelConfig, checkpointing: bool, **vision: object) -> VisionEncoder:
    settings = {"trainable": ["projector", "vision"], "gradient_checkpointing": checkpointing}
    encoder = build_model(changed(config, **settings | ({"vision": vision} if vision else {}))).model.vision
    assert encoder is not None
    return encoder.train()


def kept_bytes(encoder: VisionEncoder, pixels: Tensor) -> tuple[int, Tensor]:
    """What autograd keeps of a forward pass, weights left out, blocks that recompute with their input only."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = encoder(pixels)
    return sum(kept.values()), features


def gradients(encoder: VisionEncoder, features: Tensor) -> dict[str, Tensor]:
    features.square().mean().backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("architecture", ["hf", *ARCHITECTURES])
def test_a_trained_encoder_keeps_less_and_gets_the_same_gradients_and_statistics(
    config: ModelConfig, tmp_path: Path, architecture: str
):
    vision = {} if architecture == "hf" else timm_config(tmp_path, architecture)
    plain, again = (trained(config, checkpointing, **vision) for checkpointing in (False, True))
    pixels = torch.randn(2, 3, plain.image_size, plain.image_size, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)  # of dropped paths
    before, expected = kept_bytes(plain, pixels)
    torch.manual_seed(3)
    after, features = kept_bytes(again, pixels)
    assert torch.equal(features, expected)
    assert after < before * ARCHITECTURES.get(architecture, 0.5)
    wanted, found = gradients(plain, expected), gradients(again, features)
    assert wanted.keys() == found.keys()
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-7) for name in wanted)
    moved = dict(plain.named_buffers())
    assert all(torch.equal(buffer, moved[name]) for name, buffer in again.named_buffers())


def test_without_an_image_blocks_run_as_often_as_with_one(config: ModelConfig):
    """Else ranks of ZeRO-3, which gather weights together, would wait for each other."""
    settings = {"trainable": ["projector", "vision"], "gradient_checkpointing": True}
    model = build_model(changed(config, **settings)).model.train()
    calls: list[int] = []
    model.vision.trunk.blocks[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    with_image = torch.tensor([[2, *[model.image_token_id] * 16]])
    for ids, pixels in ((with_image, torch.randn(1, 3, 28, 28)), (torch.tensor([[2, 3, 4]]), None)):
        calls.clear()
        model(ids, torch.arange(ids.shape[1])[None], pixels).sum().backward()
        assert len(calls) == 2


def test_open_clips_own_transformer_is_recomputed_too():
    from open_clip.transformer import VisionTransformer

    visual = VisionTransformer(28, 7, 24, 3, 2, 2.0, output_dim=8)
    assert list(find_units(visual)) == [f"transformer.resblocks.{number}" for number in range(3)]


def test_blocks_are_found_within_stages_and_single_layers_are_none():
    stage = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert find_units(nn.Sequential(nn.Conv2d(3, 2, 1), stage)) == {}


def test_a_list_that_grows_between_the_two_forward_passes_is_read_as_it_was():
    """DenseNet gives each of its layers the list of all earlier maps, and appends to it."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))

        def forward(self, features: list[Tensor]) -> Tensor:
            return self.weights[0](torch.stack(features).sum(0))

    network = nn.Sequential(Joined(), Joined())
    assert len(checkpoint_blocks(network)) == 2
    features = [torch.ones(1, 1, requires_grad=True)]
    for block in network:
        features.append(block(features))
    features[-1].sum().backward()
    first, second = (block.weights[0].weight.item() for block in network)
    assert features[0].grad.item() == pytest.approx(second * (1 + first))


def test_a_frozen_encoder_is_left_as_it_is(config: ModelConfig, tmp_path: Path):
    write_vision(tmp_path / "clip")
    model = build_model(changed(config, gradient_checkpointing=True)).model
    assert all("forward" not in vars(module) for module in model.vision.modules())
