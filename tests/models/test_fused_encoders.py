"""Several encoders as one: each sees its own image, and every patch has the channels of all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import write_vision

from vlm.batch import FusedSpec, ImageSpec
from vlm.data.images import from_pixels, to_pixels
from vlm.errors import ConfigError
from vlm.models.build import _image_spec
from vlm.models.config import ModelConfig, VisionConfig
from vlm.models.encoders.fused import resize_grid
from vlm.models.vision import build_vision

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """DINOv2 at 28 pixels and SigLIP at 56, 16 and 64 patches; and CLIP, as wide as DINOv2."""
    folder = tmp_path_factory.mktemp("towers")
    return {
        "dino": {"backend": "hf", "path": str(write_vision(folder / "dino", "dinov2"))},
        "siglip": {
            "backend": "hf", "path": str(write_vision(folder / "siglip", "siglip_vision_model", hidden_size=16)),
            "image_size": 56, "resize": "squash", "layer": -2,
        },
        "clip": {"backend": "hf", "path": str(write_vision(folder / "clip")), "resize": "crop"},
    }  # fmt: skip


def fused(towers, first, *others, **settings):
    config = VisionConfig(**towers[first], fuse_with=[towers[name] for name in others], **settings)
    encoder = build_vision(config)
    return encoder, _image_spec(config, encoder, encoder.num_patches)


def alone(towers, name):
    """The features of the image by one encoder, prepared as it wants."""
    config = VisionConfig(**towers[name])
    encoder = build_vision(config)
    return encoder(to_pixels(IMAGE, _image_spec(config, encoder, 1))[None])


def test_each_encoder_sees_what_it_would_see_alone(towers):
    encoder, spec = fused(towers, "dino", "siglip", "clip")
    pixels = to_pixels(IMAGE, spec)
    assert pixels.shape == (9, 56, 56)
    features = encoder(pixels[None])
    expected = [alone(towers, name) for name in ("dino", "siglip", "clip")]
    assert torch.equal(features[..., :24], expected[0])
    assert torch.equal(features[..., 24:40], resize_grid(expected[1], 16))
    assert torch.equal(features[..., 40:], expected[2])
    assert (encoder.num_patches, encoder.width) == (16, 64)
    assert np.array_equal(from_pixels(pixels, spec), from_pixels(to_pixels(IMAGE, spec.members[0]), spec.members[0]))


def test_by_token_the_patches_of_one_come_after_those_of_another(towers):
    encoder, spec = fused(towers, "clip", "dino", fuse_by="token")
    features = encoder(to_pixels(IMAGE, spec)[None])
    assert torch.equal(features, torch.cat([alone(towers, name) for name in ("clip", "dino")], dim=1))
    with pytest.raises(ConfigError, match=r"fuse_with: the encoders' features are \[24, 16\] wide"):
        fused(towers, "clip", "siglip", fuse_by="token")


def test_a_grid_is_interpolated_between_the_middles_of_its_cells():
    ramp = torch.arange(4.0).repeat(4, 1).view(1, 16, 1)  # 0 1 2 3 in every row
    assert resize_grid(ramp, 64).view(8, 8)[3].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    assert resize_grid(ramp, 16) is ramp


def test_grids_with_a_class_token_are_not_resized(towers):
    keeps = {**towers, "clip": {**towers["clip"], "keep_class_token": True}}
    with pytest.raises(ConfigError, match=r"the encoders yield \[16, 17\] patches"):
        fused(keeps, "dino", "clip")


def test_several_encoders_by_token_form_no_square(towers):
    vision = {**towers["clip"], "fuse_with": [towers["dino"]], "fuse_by": "token"}
    with pytest.raises(ValueError, match="several encoders form no square"):
        ModelConfig(vision=vision, llm={"path": "x"}, projector={"pool": 2})


def test_one_encoder_is_what_it_was(towers):
    encoder, spec = fused(towers, "dino")
    assert type(spec) is ImageSpec
    assert repr(spec).startswith("ImageSpec(size=28, mean=")  # is in the key of cached features
    assert encoder.joins == ()
    assert isinstance(fused(towers, "dino", "clip")[1], FusedSpec)
