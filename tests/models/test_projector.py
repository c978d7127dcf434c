"""From patches to tokens: order of the merged patches, the size of the output, channel statistics."""

from __future__ import annotations

import pytest
import torch

from vlm.errors import ConfigError
from vlm.models.projector import Projector, unshuffle_patches
from vlm.models.projector_kinds import LinearProjectorConfig, MLPProjectorConfig, ProjectorConfig


def test_unshuffling_merges_squares_of_neighbours():
    patches = torch.arange(16.0).view(1, 16, 1)  # a 4 x 4 grid, row by row
    assert unshuffle_patches(patches, 2).int().tolist() == [
        [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
    ]
    assert unshuffle_patches(patches, 1) is patches


@pytest.mark.parametrize(("num_patches", "side"), [(16, 3), (12, 2), (17, 2)])
def test_patches_that_form_no_such_squares_are_refused(num_patches: int, side: int):
    with pytest.raises(ConfigError, match=f"unshuffle {side}: the encoder yields {num_patches} patches"):
        Projector(num_patches=num_patches, in_width=2, out_width=2, unshuffle=side)


def test_a_linear_projector_is_one_matrix_and_a_bias():
    projector = Projector(num_patches=4, in_width=3, out_width=2)
    with torch.no_grad():
        projector.layers[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 2, 0]]))
        projector.layers[0].bias.copy_(torch.tensor([0.0, 10]))
    out = projector(torch.tensor([[[1.0, 2, 3], [4, 5, 6], [0, 0, 0], [1, 1, 1]]]))
    assert out.tolist() == [[[1, 14], [4, 20], [0, 10], [1, 12]]]


def test_llavas_projector_is_two_layers_with_gelu_between():
    projector = MLPProjectorConfig(depth=2).build(num_patches=4, in_width=3, out_width=8, output_std=0.1)
    assert [type(layer).__name__ for layer in projector.layers] == ["Linear", "GELU", "Linear"]
    features = torch.randn(1, 4, 3)
    first, _, last = projector.layers
    assert torch.equal(projector(features), last(torch.nn.functional.gelu(first(features))))


@pytest.mark.parametrize(
    "config",
    [LinearProjectorConfig(unshuffle=2), *(MLPProjectorConfig(depth=depth, unshuffle=2) for depth in (2, 3, 4))],
    ids=ProjectorConfig.describe,
)
def test_the_output_starts_as_large_as_the_embeddings(config: ProjectorConfig):
    torch.manual_seed(0)
    projector = config.build(num_patches=64, in_width=48, out_width=256, output_std=0.02)
    assert projector(torch.randn(8, 64, 48)).std().item() / 0.02 == pytest.approx(1, abs=0.1)  # worst seen: 0.977


def test_calibration_makes_every_channel_standard():
    projector = Projector(num_patches=4, in_width=3, out_width=3, normalize=True)
    with torch.no_grad():
        projector.layers[0].weight.copy_(torch.eye(3))
    features = torch.randn(100, 4, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 100.0, -7.0])
    projector.calibrate(features)
    out = projector(features).flatten(0, 1)
    assert out.mean(0).tolist() == pytest.approx([0, 0, 0], abs=1e-4)  # worst seen: 2e-5, of values near 100
    assert out.std(0).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    assert set(projector.state_dict()) == {"layers.0.weight", "layers.0.bias", "feature_mean", "feature_std"}


def test_a_dead_channel_stays_small():
    projector = Projector(num_patches=4, in_width=2, out_width=2, normalize=True)
    features = torch.randn(50, 4, 2) * torch.tensor([1.0, 0.0])
    projector.calibrate(features)
    assert projector(features).isfinite().all()
    assert projector.feature_std[1] > 1e-4
