"""A projector fitted by least squares: it finds a linear rule, for every kind of projector, and says how well."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from vlm.batch import IGNORE_INDEX, Batch
from vlm.cli.train import start_training
from vlm.errors import ConfigError
from vlm.export.run import export_run
from vlm.models.projector import Projector
from vlm.models.projector_kinds import PROJECTORS
from vlm.schema import OneOf
from vlm.train.initialize import fit_least_squares

IMAGE = 99
EMBEDDING = torch.nn.functional.one_hot(torch.arange(8), 16).float()  # eight words of 16 numbers


def batch_of(words: list[list[int]], tokens_per_image: int) -> Batch:
    """A row: per record an image, then its words, which are learned; then a token of padding."""
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for reply in words:
        ids += [IMAGE] * tokens_per_image + reply
        labels += [IGNORE_INDEX] * tokens_per_image + reply
        positions += range(tokens_per_image + len(reply))
    row = (torch.tensor([values]) for values in ([*ids, 0], [*labels, IGNORE_INDEX], [*positions, 0]))
    return Batch(*row)


def projector_of(**settings: object) -> Projector:
    torch.manual_seed(0)
    config = OneOf(PROJECTORS, default="linear").build(settings)
    return config.build(num_patches=4, in_width=12, out_width=16, output_std=0.25)


def eight_things(count: int, noise: float = 0.1) -> tuple[Tensor, list[list[int]]]:
    """Images of eight kinds, [N, 4, 12], and the one word that is said about each."""
    generator = torch.Generator().manual_seed(1)
    looks = torch.randn(8, 4, 12, generator=generator)
    kinds = torch.randint(8, (count,), generator=generator)
    return looks[kinds] + noise * torch.randn(count, 4, 12, generator=generator), [[kind] for kind in kinds.tolist()]


@pytest.mark.parametrize(
    "settings",
    [
        {"pool": 2},
        {"unshuffle": 2},
        {"kind": "mlp", "depth": 2, "pool": 2},
        {"unshuffle": 1},
        {"kind": "mlp", "layer_norm": True, "unshuffle": 2},
        {"kind": "average", "num_tokens": 1, "depth": 1},
        {"kind": "resampler", "num_tokens": 2, "width": 128, "num_heads": 4},
    ],
)
def test_the_tokens_of_an_unseen_image_are_nearest_to_the_word_said_about_its_kind(settings: dict[str, object]):
    projector = projector_of(**settings)
    features, words = eight_things(400)
    fit = fit_least_squares(projector, EMBEDDING, IMAGE, [(batch_of(words, projector.num_tokens), features)])
    unseen, told = eight_things(500)
    tokens = projector(unseen[400:]).mean(1).detach()
    nearest = torch.nn.functional.cosine_similarity(tokens[:, None] - tokens.mean(0), EMBEDDING - 0.125, dim=-1)
    assert nearest.argmax(1).tolist() == [kind for (kind,) in told[400:]]
    assert fit.num_images + fit.num_held_out == 400
    assert 20 < fit.num_held_out < 60
    assert fit.explained > 0.3  # lowest seen: 0.40, a token for each patch


def test_the_output_is_as_large_as_the_embeddings():
    projector = projector_of(pool=2)
    features, words = eight_things(400)
    fit_least_squares(projector, EMBEDDING, IMAGE, [(batch_of(words, 1), features)])
    spread = projector(features).flatten(0, 1).var(0).mean().sqrt().item()
    assert spread == pytest.approx(EMBEDDING.std().item(), rel=0.05)  # seen: 0.4 % off, for the held-out tenth


def test_embeddings_that_the_model_multiplies_are_aimed_at_as_the_decoder_reads_them():
    """A projector fitted to words four times as large gives tokens four times as large."""
    fitted = [projector_of(pool=2), projector_of(pool=2)]
    features, words = eight_things(400)
    for projector, scale in zip(fitted, (1.0, 4.0), strict=True):
        fit_least_squares(projector, EMBEDDING, IMAGE, [(batch_of(words, 1), features)], scale)
    plain, scaled = (projector(features) for projector in fitted)
    assert torch.allclose(scaled, 4 * plain, rtol=1e-3, atol=1e-5)


def test_the_target_is_the_mean_of_the_words_and_the_batches_add_up():
    """Of two images that alternate, "0 1" is said about one and "2" about the other: half of each word, or a whole."""
    projector = projector_of(pool=2)
    features = torch.randn(2, 4, 12).repeat(100, 1, 1) + 0.01 * torch.randn(200, 4, 12)
    words = [[0, 1], [2]] * 100
    batches = [(batch_of(words[i : i + 50], 1), features[i : i + 50]) for i in range(0, 200, 50)]
    fit = fit_least_squares(projector, EMBEDDING, IMAGE, batches)
    assert fit.explained > 0.95
    change = torch.sub(*projector(features[:2])[:, 0, :3]).detach()
    assert (change / change[0]).tolist() == pytest.approx([1, 1, -2], abs=1e-3)


def test_an_image_without_a_word_about_it_is_not_fitted_to():
    projector = projector_of(pool=2)
    features, words = eight_things(400)
    silent = batch_of(words, 1)
    silent.labels[0, : silent.labels.shape[1] // 2] = IGNORE_INDEX
    fit = fit_least_squares(projector, EMBEDDING, IMAGE, [(silent, features)])
    assert fit.num_images + fit.num_held_out == 200


def test_noise_explains_nothing_and_gets_the_strongest_ridge():
    projector = projector_of(pool=2)
    _, words = eight_things(400)
    fit = fit_least_squares(projector, EMBEDDING, IMAGE, [(batch_of(words, 1), torch.randn(400, 4, 12))])
    assert fit.explained < 0.05
    assert fit.ridge == 10


def test_too_few_images_are_refused():
    features, words = eight_things(3)
    with pytest.raises(ConfigError, match=r"least_squares: .* too few"):
        fit_least_squares(projector_of(pool=2), EMBEDDING, IMAGE, [(batch_of(words, 1), features)])


def test_too_many_channels_are_refused():
    projector = Projector(num_patches=64, in_width=1280, out_width=4, unshuffle=4)
    with pytest.raises(ConfigError, match=r"reads 20,480 channels, at most 8,192"):
        fit_least_squares(projector, EMBEDDING, IMAGE, [])


@pytest.mark.slow
def test_a_run_starts_from_the_fit_and_the_next_stage_keeps_what_it_brings(config_file, tmp_path, capsys):
    projector = {"kind": "linear", "normalize": True, "initialize": "least_squares"}
    start_training(str(config_file(model__projector=projector, train__max_steps=1)), [])
    assert re.search(r"least squares over \d+ images .*own words the nearest of 20", capsys.readouterr().err)
    export_run(tmp_path / "run")
    second = {"output_dir": str(tmp_path / "second"), "init_from": str(tmp_path / "run/export")}
    start_training(str(config_file("second.yaml", model__projector=projector, train__max_steps=1, **second)), [])
    said = capsys.readouterr().err
    assert "projector: 4 tensors loaded" in said
    assert "least squares" not in said
