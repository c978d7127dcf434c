"""Projectors that make a fixed number of tokens: averages, a resampler's, and those of BLIP-2's Q-Former."""

from __future__ import annotations

import pytest
import torch

from vlm.compat import prepare
from vlm.errors import CheckpointError, ConfigError
from vlm.models.projector import AverageProjector
from vlm.models.projector_kinds import PROJECTORS, QFormerProjectorConfig
from vlm.models.qformer import BLIP2_FOLDER, BLIP2_PTH, read_qformer
from vlm.schema import OneOf

SMALL = {"num_blocks": 2, "width": 24, "num_heads": 4}
KINDS = {
    "mlp": {"layer_norm": True},
    "average": {"num_tokens": 4},
    "resampler": {"num_tokens": 5, **SMALL},
    "qformer": {"num_tokens": 5, **SMALL},
}


def built(kind, **changes):
    config = OneOf(PROJECTORS, default="linear").build({"kind": kind, **KINDS[kind], **changes})
    torch.manual_seed(0)
    return config, config.build(num_patches=16, in_width=12, out_width=40, output_std=0.02)


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    prepare()


def test_an_average_of_cells_is_taken_row_by_row():
    projector = AverageProjector(num_tokens=4, num_patches=16, in_width=1, out_width=1)
    patches = torch.arange(16.0).view(1, 16, 1)  # a 4 x 4 grid
    assert projector.inputs(patches).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize(("num_patches", "num_tokens"), [(16, 3), (16, 25), (17, 4)])
def test_an_average_needs_squares(num_patches, num_tokens):
    with pytest.raises(ConfigError, match=rf"num_tokens {num_tokens}: .*the {num_patches} patches"):
        AverageProjector(num_tokens=num_tokens, num_patches=num_patches, in_width=1, out_width=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"pool": 2, "normalize": True}, {"unshuffle": 2}], ids=str)
def test_each_makes_the_tokens_that_it_says_and_every_weight_takes_part(kind, changes):
    config, projector = built(kind, **changes)
    features = torch.randn(64, 16, 12)
    tokens = projector(features)
    assert tokens.shape == (64, config.count_tokens(16), 40)
    assert projector.num_tokens == tokens.shape[1]
    assert tokens.std().item() / 0.02 == pytest.approx(1, abs=0.2 if kind != "average" else 1)  # averages are smaller
    tokens.square().sum().backward()
    assert [name for name, each in projector.named_parameters() if each.grad is None] == []


@pytest.mark.parametrize("kind", ["resampler", "qformer"])
def test_queries_read_all_patches_of_their_own_image_in_any_order(kind):
    _, projector = built(kind)
    features = torch.randn(2, 16, 12)
    tokens = projector(features)
    assert torch.allclose(projector(features.flip(1)), tokens, atol=1e-6)
    changed = features.clone()
    changed[1, 15] = torch.randn(12)
    moved = (projector(changed) - tokens).abs().amax((1, 2))
    assert moved[0] == 0
    assert moved[1] > 1e-5


def test_a_qformer_is_that_of_transformers_blip2():
    """The first half of `Blip2Model`, with its weights by their own names."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )

    torch.manual_seed(0)
    vision = Blip2VisionConfig(
        hidden_size=12, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        initializer_range=0.5,
    )  # fmt: skip
    qformer = Blip2QFormerConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, encoder_hidden_size=12,
    )  # fmt: skip
    text = OPTConfig(
        hidden_size=40, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8, vocab_size=64, word_embed_proj_dim=40
    )
    parts = {"vision_config": vision, "qformer_config": qformer, "text_config": text, "num_query_tokens": 5}
    model = Blip2ForConditionalGeneration(Blip2Config(**parts)).eval()
    torch.nn.init.normal_(model.query_tokens)
    torch.nn.init.normal_(model.vision_model.post_layernorm.weight)
    pixels = torch.randn(3, 3, 8, 8)
    blocks = []
    model.vision_model.encoder.layers[-1].register_forward_hook(lambda *given: blocks.append(given[2]))
    expected = model.get_image_features(pixels).pooler_output
    config = QFormerProjectorConfig(num_tokens=5, **SMALL)
    projector = config.build(num_patches=5, in_width=12, out_width=40, output_std=1.0)
    ours = dict(BLIP2_FOLDER.to_ours(model.state_dict()))
    assert ours.keys() == projector.pretrained_names()
    ours |= {f"layers.0.{leaf}": model.get_parameter(f"language_projection.{leaf}") for leaf in ("weight", "bias")}
    projector.load_state_dict(ours)
    features = blocks[0][0] if isinstance(blocks[0], tuple) else blocks[0]
    assert torch.allclose(projector(features), expected, atol=1e-5)  # worst seen: 1e-6; eps of the norm differs


def lavis_names(state):
    """A Q-Former's tensors as LAVIS wrote them: levels of BERT, and what of it transformers leaves out."""
    renamed = {
        "queries": "query_tokens", "norm.weight": "ln_vision.weight", "norm.bias": "ln_vision.bias",
        "qformer.layernorm.weight": "Qformer.bert.embeddings.LayerNorm.weight",
        "qformer.layernorm.bias": "Qformer.bert.embeddings.LayerNorm.bias",
    }  # fmt: skip
    found = {}
    for name, tensor in state.items():
        theirs = renamed.get(
            name, name.replace("qformer.", "Qformer.bert.").replace("ttention.attention.", "ttention.self.")
        )
        found[theirs] = tensor.clone()
    extra = {
        "Qformer.bert.embeddings.word_embeddings.weight": torch.zeros(3, 24),
        "Qformer.bert.encoder.layer.0.intermediate.dense.weight": torch.zeros(96, 24),
        "Qformer.bert.encoder.layer.0.output.dense.bias": torch.zeros(24),
        "t5_proj.weight": torch.zeros(8, 24),
        "visual_encoder.cls_token": torch.zeros(1, 1, 12),
    }
    return found | extra


def test_a_file_of_blip2_is_read_by_its_own_names(tmp_path):
    _, projector = built("qformer")
    state = {name: each for name, each in projector.state_dict().items() if not name.startswith("layers.")}
    file = tmp_path / "blip2_pretrained_flant5xxl.pth"
    torch.save({"model": lavis_names(state)}, file)
    found = read_qformer(str(file))
    assert found.keys() == projector.pretrained_names() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert "Qformer.bert.encoder.layer.0.crossattention.self.key.weight" in lavis_names(state)
    assert "Qformer.bert.encoder.layer.1.intermediate_query.dense.bias" in lavis_names(state)
    assert BLIP2_PTH.to_ours(lavis_names(state)).unread == {}


def test_a_file_that_holds_more_than_tensors_is_refused(tmp_path):
    file = tmp_path / "blip2.pth"
    torch.save({"model": torch.nn.Linear(1, 1)}, file)
    with pytest.raises(CheckpointError, match=r"projector\.pretrained: .*blip2\.pth cannot be read as plain tensors"):
        read_qformer(str(file))


def test_a_frozen_qformer_must_begin_with_weights_and_heads_share_its_width():
    with pytest.raises(ValueError, match="frozen: a Q-Former that never trains"):
        QFormerProjectorConfig(frozen=True)
    with pytest.raises(ValueError, match="initialize: least_squares fits the layer after the Q-Former"):
        QFormerProjectorConfig(initialize="least_squares")
    fitted = QFormerProjectorConfig(initialize="least_squares", pretrained="blip2.pth", frozen=True)
    assert fitted.exported() == QFormerProjectorConfig()  # all its weights are in the export
    with pytest.raises(ValueError, match="5 heads cannot share a width of 24"):
        built("resampler", num_heads=5)
