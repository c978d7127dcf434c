"""A config becomes a model: what images must look like, which weights are new, and real shapes without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from meta_models import build_on_meta
from tiny_models import changed, write_llm

from vlm.batch import ImageSpec
from vlm.errors import ConfigError
from vlm.models.build import build_image_spec, build_model
from vlm.models.config import ModelConfig
from vlm.models.trainable import part_of

SHAPES = Path(__file__).parents[2] / "projects/shapes"


def test_the_image_spec_says_what_images_must_look_like(config: ModelConfig):
    built = build_model(config)
    clip_mean, clip_std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    assert built.image_spec == ImageSpec(28, clip_mean, clip_std, num_tokens=16)
    assert built.image_spec == build_image_spec(config)  # the same from the shape alone
    merged = changed(config, projector={"unshuffle": 2})
    assert build_image_spec(merged).num_tokens == 4
    assert build_image_spec(changed(config, vision=None, trainable=["llm"])) is None


def test_the_placeholder_lies_beyond_the_embedding_which_keeps_its_size(config: ModelConfig):
    built = build_model(config)
    assert built.image_token_id == 28
    assert built.model.llm.get_input_embeddings().weight.shape == (28, 32)


def test_new_weights_follow_the_seed_and_torchs_state_stays(config: ModelConfig):
    settings = changed(config, trainable=["projector", "llm.lora"], lora={})
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    models = [build_model(settings, seed=seed).model for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(2), expected)
    first, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    differing = {part_of(name) for name in first if not torch.equal(first[name], other[name])}
    assert differing == {"projector", "llm.lora"}


def test_the_projector_starts_at_the_size_of_the_embeddings(config: ModelConfig):
    model = build_model(config).model
    embeddings = model.llm.get_input_embeddings().weight.std().item()
    out = model.projector(torch.randn(64, 16, 24)).std().item()
    assert out / embeddings == pytest.approx(1, abs=0.15)  # worst seen: WORST


@pytest.mark.parametrize("family", ["qwen2", "granite", "gemma", "gemma2", "gemma3_text"])
def test_images_start_as_large_as_words_whatever_the_embedding_multiplies_by(
    config: ModelConfig, tmp_path: Path, family: str
):
    """Gemma's embedding multiplies what it looks up by the root of the width; Granite's decoder multiplies both."""
    llm = write_llm(tmp_path / family, family)
    model = build_model(changed(config, llm={"path": str(llm)})).model
    words = model.embed(torch.arange(28)[None]).std().item()
    images = model.projector(torch.randn(64, 16, 24)).std().item()
    assert images / words == pytest.approx(1, abs=0.15)  # worst seen: 0.03 off


def test_a_projector_that_does_not_fit_the_patches_is_refused_before_weights_are_loaded(config: ModelConfig):
    with pytest.raises(ConfigError, match="unshuffle 3: the encoder yields 16 patches"):
        build_on_meta(changed(config, projector={"unshuffle": 3}))


# real shapes: published config files, no weights


def real(name: str) -> str:
    return str(next(SHAPES.glob(f"*--{name}")))


CLIP_L = {"backend": "hf", "path": real("clip-vit-large-patch14-336"), "layer": -2}
SIGLIP = {"backend": "hf", "path": real("siglip-so400m-patch14-384"), "layer": -2}
EVA_CLIP = {"backend": "open_clip", "path": "EVA02-L-14-336", "layer": -2}
EVA_02 = {"backend": "timm", "path": "eva02_large_patch14_448.mim_in22k_ft_in22k_in1k", "layer": -2}


@pytest.mark.parametrize(
    ("name", "count", "width"),
    [("Qwen2.5-7B-Instruct", 7_615_616_512, 3584), ("Qwen3-8B", 8_190_735_360, 4096),
     ("internlm3-8b-instruct", 8_804_241_408, 4096), ("Qwen3-0.6B", 596_049_920, 1024),
     ("Qwen2.5-0.5B", 494_032_768, 896), ("internlm2-1_8b-native", 1_889_110_016, 2048),
     ("Qwen7B-chat-native", 7_721_324_544, 4096), ("Qwen14B-chat-native", 14_167_290_880, 5120)],
)  # fmt: skip
def test_language_models_have_the_published_number_of_weights(name: str, count: int, width: int):
    model = build_on_meta(ModelConfig.model_validate({"llm": {"path": real(name)}, "trainable": ["llm"]}))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.llm.get_input_embeddings().weight.shape[1] == width


@pytest.mark.one_in(4)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("vision", "size", "num_patches", "width"),
    [(CLIP_L, 336, 576, 1024), (SIGLIP, 384, 729, 1152), (EVA_CLIP, 336, 576, 1024), (EVA_02, 448, 1024, 1024)],
)
def test_encoders_have_the_published_shapes(vision: dict[str, Any], size: int, num_patches: int, width: int):
    config = ModelConfig.model_validate(
        {"vision": vision, "llm": {"path": real("Qwen3-8B")}, "projector": {"kind": "mlp"}}
    )
    model = build_on_meta(config)
    spec = build_image_spec(config)
    assert (spec.size, spec.num_tokens, model.vision.width) == (size, num_patches, width)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trained["projector.layers.0.weight"] == (4096, width)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.slow
def test_normalisation_of_open_clip_weights_follows_their_tag():
    def mean(**settings: str) -> tuple[float, ...]:
        vision = {"backend": "open_clip", "layer": -2} | settings
        return build_image_spec(ModelConfig.model_validate({"vision": vision, "llm": {"path": "unused"}})).mean

    assert mean(path="ViT-SO400M-14-SigLIP-384", pretrained="webli") == (0.5, 0.5, 0.5)
    assert mean(path="EVA02-L-14-336", pretrained="merged2b_s6b_b61k") == (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.slow
def test_adapters_and_padding_have_shapes_without_weights_too():
    values = {
        "vision": CLIP_L, "llm": {"path": real("Qwen2.5-7B-Instruct"), "pad_vocab_to_multiple_of": 10_000},
        "trainable": ["projector", "llm.lora"], "lora": {"rank": 8}, "gradient_checkpointing": True,
    }  # fmt: skip
    model = build_on_meta(ModelConfig.model_validate(values))
    assert model.llm.get_output_embeddings().weight.shape == (160_000, 3584)
    adapters = sum(p.numel() for n, p in model.named_parameters() if part_of(n) == "llm.lora")
    # per layer: rank * (inputs + outputs) of q, k, v, o, gate, up, down
    pairs = [(3584, 3584), (3584, 512), (3584, 512), (3584, 3584), (3584, 18944), (3584, 18944), (18944, 3584)]
    assert adapters == 28 * 8 * sum(a + b for a, b in pairs)


def test_a_name_without_files_here_is_an_error_that_names_it(tmp_path: Path):
    from vlm.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"model\.llm\.path Qwen/Qwen3-8B: cannot load"):
        build_on_meta(ModelConfig.model_validate({"llm": {"path": "Qwen/Qwen3-8B"}, "trainable": ["llm"]}))


def test_linked_folders_are_followed(config: ModelConfig, tmp_path: Path):
    target = write_llm(tmp_path / "real")
    (tmp_path / "link").symlink_to(target)
    built = build_model(changed(config, llm={"path": str(tmp_path / "link")}))
    assert built.model.llm.config.hidden_size == 32
