"""data.jpeg_draft: a JPEG is decoded at reduced scale where the encoder sees less of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_images import encoded, photo

from vlm.batch import FusedSpec, ImageSpec
from vlm.data.images import load_image, load_tiles
from vlm.train.features import ImageEncoder, open_store

SPEC = ImageSpec(size=50, mean=(0.0,) * 3, std=(1.0,) * 3, num_tokens=1)


@pytest.mark.parametrize(
    ("resize", "decoded"),
    [
        ("pad", (100, 50)),  # the side of 800 becomes 50, so 100 are enough
        ("crop", (200, 100)),  # that of 400 does
        ("squash", (200, 100)),  # both do
    ],
)
def test_the_scale_is_the_smallest_that_leaves_twice_what_the_encoder_sees(resize, decoded):
    spec = dataclasses.replace(SPEC, resize=resize)
    jpeg = encoded(photo(800, 400), "JPEG", quality=90)
    assert load_image(jpeg).size == (800, 400)
    assert load_image(jpeg, draft_for=spec).size == decoded
    assert load_image(encoded(photo(90, 45), "JPEG"), draft_for=spec).size == (90, 45)
    assert load_image(encoded(photo(800, 400)), draft_for=spec).size == (800, 400)  # a PNG


def test_of_several_encoders_the_one_that_sees_most_decides():
    wide = dataclasses.replace(SPEC, size=100)
    jpeg = encoded(photo(800, 400), "JPEG", quality=90)
    for first, other in ((SPEC, wide), (wide, SPEC)):
        fused = FusedSpec(**dataclasses.asdict(first), others=(other,))
        assert load_image(jpeg, draft_for=fused).size == (200, 100)


def test_pixels_differ_little():
    """In units of 255; worst seen 0.6 on average, of a photo with much noise."""
    jpeg = encoded(photo(800, 400), "JPEG", quality=90)
    apart = (load_tiles(jpeg, SPEC) - load_tiles(jpeg, SPEC, draft=True)).abs() * 255
    assert 0 < apart.mean() < 1.5


def test_an_image_whose_size_decides_its_tiles_is_decoded_whole():
    class Tiled(ImageSpec):
        reads_size = True

    tiled = Tiled(**dataclasses.asdict(SPEC))
    jpeg = encoded(photo(800, 400), "JPEG")
    assert torch.equal(load_tiles(jpeg, tiled, draft=True), load_tiles(jpeg, tiled))


def test_the_feature_cache_keeps_them_apart(tmp_path):
    encoder = torch.nn.Linear(1, 1)
    encoder.joins = ()
    whole = ImageEncoder(encoder, SPEC, 10**6, torch.device("cpu"), None)
    draft = dataclasses.replace(whole, jpeg_draft=True)
    paths = {open_store(str(tmp_path), way, torch.bfloat16).path for way in (whole, draft)}
    assert len(paths) == 2
