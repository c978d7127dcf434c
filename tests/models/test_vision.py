"""Encoders of each backend: which numbers come out, in which order, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import scramble, write_timm, write_vision
from torch import Tensor

from vlm.errors import CheckpointError, ConfigError
from vlm.models.config import VisionConfig
from vlm.models.encoders.towers import FeatureMapTower
from vlm.models.vision import VisionEncoder, build_vision
from vlm.models.vision_compute import read_compute

OPEN_CLIP_SHAPE = {"layers": 3, "width": 24, "head_width": 12, "patch_size": 7, "image_size": 28, "mlp_ratio": 2.0}
IMAGES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def encoder(backend: str, path: Path | str, **settings: Any) -> VisionEncoder:
    return build_vision(VisionConfig(backend=backend, path=str(path), **settings))


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# layers


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("kind", "num_prefix"),
    [
        ("clip_vision_model", 1), ("siglip_vision_model", 0), ("dinov2", 1), ("dinov2_with_registers", 5),
        ("dinov3_vit", 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_layers_of_hf_are_its_hidden_states(tmp_path: Path, kind: str, num_prefix: int, layer: int):
    from transformers import AutoModel

    folder = write_vision(tmp_path / kind, kind)
    reference = AutoModel.from_pretrained(folder).eval()
    hidden_states = reference(IMAGES, output_hidden_states=True).hidden_states
    expected = hidden_states[layer if layer < 0 else layer + 1]  # the first one is the embedding
    built = encoder("hf", folder, layer=layer)
    assert difference(built(IMAGES), expected[:, num_prefix:]) == 0
    assert (built.num_patches, built.width, built.image_size) == (16, 24, 28)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "keep"), [((-1, -3), False), ((-3, -2), True)])
def test_several_layers_are_joined_by_channel_in_the_order_asked(tmp_path: Path, layers: tuple[int, ...], keep: bool):
    hf = write_vision(tmp_path / "hf")
    weights = open_clip_from_hf(load_file(hf / "model.safetensors"))
    other = write_open_clip(tmp_path / "open_clip", OPEN_CLIP_SHAPE, weights, width=16)
    timm = {"path": "vit_tiny_patch16_224", "pretrained": timm_file(tmp_path), "image_size": 32}
    images = {"timm": torch.randn(2, 3, 32, 32)}
    for backend, named in (("hf", {"path": hf}), ("open_clip", {"path": other}), ("timm", timm)):
        pixels = images.get(backend, IMAGES)
        alone = [encoder(backend, **named, layer=layer, keep_class_token=keep)(pixels) for layer in layers]
        joined = encoder(backend, **named, layer=layers, keep_class_token=keep)
        assert difference(joined(pixels), torch.cat(alone, dim=-1)) == 0
        assert joined.width == 2 * alone[0].shape[-1]
        assert len(set(joined.joins)) == 2


def test_layer_minus_two_is_what_llava_takes(tmp_path: Path):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    folder = write_vision(tmp_path / "clip")
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig.from_pretrained(folder),
            text_config=LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    ).eval()
    llava.model.vision_tower.load_state_dict(load_file(folder / "model.safetensors"))
    expected = llava.model.get_image_features(IMAGES).pooler_output
    features = encoder("hf", folder, layer=-2)(IMAGES)
    assert difference(llava.model.multi_modal_projector(features), torch.stack(list(expected))) == 0


def test_blocks_after_the_layer_are_not_kept(tmp_path: Path):
    folder = write_vision(tmp_path / "clip")
    assert len(encoder("hf", folder, layer=-2).trunk.blocks) == 2
    assert (
        len(encoder("timm", "vit_tiny_patch16_224", layer=-2, pretrained=timm_file(tmp_path)).trunk.model.blocks) == 11
    )


def test_a_layer_beyond_the_blocks_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="layer -4: the encoder has 3 blocks"):
        encoder("hf", write_vision(tmp_path / "clip"), layer=-4)


# tokens


def test_the_class_token_is_kept_on_request_and_register_tokens_never(tmp_path: Path):
    from transformers import AutoModel

    folder = write_vision(tmp_path / "dino", "dinov2_with_registers")
    tokens = AutoModel.from_pretrained(folder).eval()(IMAGES, output_hidden_states=True).hidden_states[-1]
    kept = encoder("hf", folder, keep_class_token=True)
    assert kept.num_patches == 17
    assert difference(kept(IMAGES), torch.cat([tokens[:, :1], tokens[:, 5:]], dim=1)) == 0


def test_siglip_has_no_class_token_to_keep(tmp_path: Path):
    with pytest.raises(ConfigError, match="has no class token"):
        encoder("hf", write_vision(tmp_path / "siglip", "siglip_vision_model"), keep_class_token=True)


def test_a_whole_clip_and_its_vision_tower_alone_give_the_same(tmp_path: Path):
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

    config = CLIPConfig(
        text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config={
            "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 7,
        },
    )  # fmt: skip
    whole = scramble(CLIPModel(config))
    whole.save_pretrained(tmp_path / "whole")
    CLIPVisionModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "tower")
    features = [encoder("hf", tmp_path / name)(IMAGES) for name in ("whole", "tower")]
    assert difference(*features) == 0
    assert features[0].std() > 0.1


# the same weights through two backends


def open_clip_from_hf(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names of a CLIP vision tower -> open_clip's; its q, k and v are one matrix there."""
    renamed = {
        "visual.class_embedding": tensors["embeddings.class_embedding"],
        "visual.conv1.weight": tensors["embeddings.patch_embedding.weight"],
        "visual.positional_embedding": tensors["embeddings.position_embedding.weight"],
    }
    for ours, theirs in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        renamed |= {f"visual.{theirs}.{kind}": tensors[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    pairs = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
             "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}  # fmt: skip
    for block in range(3):
        ours, theirs = f"encoder.layers.{block}", f"visual.transformer.resblocks.{block}"
        for kind in ("weight", "bias"):
            renamed |= {f"{theirs}.{b}.{kind}": tensors[f"{ours}.{a}.{kind}"] for a, b in pairs.items()}
            joined = [tensors[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            renamed[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(joined)
    return renamed


def write_open_clip(folder: Path, vision_cfg: dict[str, Any], visual: dict[str, Tensor], width: int) -> Path:
    """A folder of open_clip with these weights in its vision tower and random ones in a tiny text tower."""
    import open_clip

    folder.mkdir()
    text_cfg = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    settings = {"model_cfg": {"embed_dim": width, "quick_gelu": True, "vision_cfg": vision_cfg, "text_cfg": text_cfg}}
    settings["preprocess_cfg"] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    tensors = open_clip.create_model(f"local-dir:{folder}", load_weights=False).state_dict()
    assert visual.keys() <= tensors.keys()
    save_file({k: v.contiguous() for k, v in (tensors | visual).items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.parametrize("layer", [-1, -2])
def test_the_same_clip_weights_give_the_same_features_through_hf_and_open_clip(tmp_path: Path, layer: int):
    hf = write_vision(tmp_path / "hf")
    weights = open_clip_from_hf(load_file(hf / "model.safetensors"))
    other = write_open_clip(tmp_path / "open_clip", OPEN_CLIP_SHAPE, weights, width=16)
    for keep in (False, True):
        a = encoder("hf", hf, layer=layer, keep_class_token=keep)(IMAGES)
        b = encoder("open_clip", other, layer=layer, keep_class_token=keep)(IMAGES)
        assert a.std() > 0.5
        assert difference(a, b) < 1e-5  # worst seen: 0.0; another CPU may add up in another order


@pytest.mark.parametrize("size", [None, 112])
def test_the_same_eva_weights_give_the_same_features_through_open_clip_and_timm(tmp_path: Path, size: int | None):
    import timm

    name = "eva02_tiny_patch14_224"
    model = scramble(timm.create_model(name, num_classes=0, global_pool="token"))
    alone = write_timm(tmp_path / "timm", name, model)
    wrapped = {f"visual.trunk.{k}": v for k, v in model.state_dict().items()}
    shape = {"image_size": 224, "timm_model_name": name, "timm_pool": "token", "timm_proj": None}
    whole = write_open_clip(tmp_path / "open_clip", shape, wrapped, width=192)
    images = torch.randn(1, 3, size or 224, size or 224)
    a = encoder("timm", alone, layer=-2, image_size=size)
    b = encoder("open_clip", whole, layer=-2, image_size=size)
    assert difference(a(images), b(images)) == 0
    assert (b.num_patches, b.image_size, b.mean) == (64 if size else 256, size or 224, (0.1, 0.2, 0.3))


# image sizes


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model", "dinov2"])
def test_another_image_size_interpolates_the_position_embedding(tmp_path: Path, kind: str):
    folder = write_vision(tmp_path / kind, kind)
    larger = encoder("hf", folder, image_size=42)
    assert (larger.num_patches, larger.image_size) == (36, 42)
    assert larger(torch.randn(1, 3, 42, 42)).shape == (1, 36, 24)
    assert difference(encoder("hf", folder, image_size=28)(IMAGES), encoder("hf", folder)(IMAGES)) == 0


def timm_file(folder: Path, name: str = "vit_tiny_patch16_224") -> str:
    import timm

    file = folder / f"{name}.safetensors"
    if not file.exists():
        save_file(scramble(timm.create_model(name)).state_dict(), file)
    return str(file)


def test_timm_takes_a_weight_file_and_interpolates_positions(tmp_path: Path):
    import timm

    file = timm_file(tmp_path)
    reference = timm.create_model("vit_tiny_patch16_224", img_size=64, pretrained=False).eval()
    reference.load_state_dict(
        timm.models.vision_transformer.checkpoint_filter_fn(load_file(file), reference)  # timm's own resampling
    )
    images = torch.randn(1, 3, 64, 64)
    expected = reference.forward_intermediates(images, indices=[10], output_fmt="NLC", intermediates_only=True)[0]
    built = encoder("timm", "vit_tiny_patch16_224", pretrained=file, image_size=64, layer=-2)
    assert built.num_patches == 16
    assert difference(built(images), expected) < 1e-4  # worst seen: 0.0; another CPU may add up in another order


@pytest.mark.slow
@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("swin_tiny_patch4_window7_224", 448),
        ("swin_s3_tiny_224", 448),
        ("swinv2_cr_tiny_224", 288),
        ("maxvit_pico_rw_256", 512),
        ("efficientvit_m0", 448),
    ],
)
def test_windows_stay_as_they_were_trained_whatever_the_image_size(architecture: str, size: int):
    import timm

    def windows(model: torch.nn.Module) -> list[object]:
        names = ("partition_size", "window_size", "window_resolution")
        return [getattr(module, name) for module in model.modules() for name in names if hasattr(module, name)]

    with torch.device("meta"):
        config = VisionConfig(backend="timm", path=architecture, image_size=size)
        built = build_vision(config, weights=False).trunk.model
        own = timm.create_model(architecture, num_classes=0)
    assert windows(built) == windows(own)
    assert len(windows(own)) > 3


def test_windows_stay_in_a_network_that_open_clip_wraps(tmp_path: Path):
    name = "swin_tiny_patch4_window7_224"
    shape = {"image_size": 224, "timm_model_name": name, "timm_pool": "avg", "timm_proj": None}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    settings = {"model_cfg": {"embed_dim": 768, "vision_cfg": shape, "text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        config = VisionConfig(backend="open_clip", path=str(tmp_path), image_size=448)
        built = build_vision(config, weights=False)
    assert (built.image_size, built.num_patches) == (448, 14 * 14)
    assert {module.window_size for module in built.trunk.modules() if hasattr(module, "window_size")} == {(7, 7)}


def test_a_network_of_one_size_names_it(tmp_path: Path):
    with pytest.raises(ConfigError, match="image_size 64: mixer_s32_224 takes only 224"):
        encoder("timm", "mixer_s32_224", pretrained=timm_file(tmp_path, "mixer_s32_224"), image_size=64)


def test_normalisation_comes_from_the_folder_if_it_says(tmp_path: Path):
    folder = write_vision(tmp_path / "siglip", "siglip_vision_model")
    assert encoder("hf", folder).mean == (0.5, 0.5, 0.5)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    assert encoder("hf", folder).mean == (0.1, 0.2, 0.3)
    assert encoder("hf", folder).std == (0.4, 0.5, 0.6)


# networks without a row of token blocks


def test_a_feature_map_is_read_row_by_row():
    class Rows(torch.nn.Module):
        def __init__(self, output_fmt: str) -> None:
            super().__init__()
            self.output_fmt = output_fmt

        def forward_features(self, pixel_values: Tensor) -> Tensor:
            places = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
            return places[None, :, :, None] if self.output_fmt == "NHWC" else places[None, None]

    for output_fmt in ("NCHW", "NHWC"):
        assert FeatureMapTower(Rows(output_fmt))(torch.zeros(1)).flatten().tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_cnn_gives_its_last_map_and_nothing_else(tmp_path: Path):
    import timm

    model = scramble(timm.create_model("tf_efficientnet_lite0")).eval()
    folder = write_timm(tmp_path / "lite0", "tf_efficientnet_lite0", model)
    built = encoder("timm", folder, image_size=64)
    images = torch.randn(1, 3, 64, 64)
    expected = model.forward_features(images)  # [1, 1280, 2, 2]
    assert (built.num_patches, built.width) == (4, 1280)
    assert difference(built(images)[0, 1], expected[0, :, 0, 1]) == 0
    with pytest.raises(ConfigError, match="only layer -1"):
        encoder("timm", folder, layer=-2)


def test_a_cnn_waits_in_float32_until_its_format_is_chosen(tmp_path: Path):
    import timm

    folder = write_timm(tmp_path / "lite0", "tf_efficientnet_lite0", timm.create_model("tf_efficientnet_lite0"))
    config = VisionConfig(backend="timm", path=str(folder), image_size=64, compute="auto")
    built = build_vision(config, torch.bfloat16).requires_grad_(False)
    assert next(built.parameters()).dtype == torch.float32
    images = torch.randn(1, 3, 64, 64)
    expected = built(images)
    built.settle(read_compute("fp32_channels_last"))
    got = built(images)
    assert all(parameter.is_contiguous() for parameter in built.parameters())  # fully_shard takes no others
    assert difference(got, expected) < 1e-5 * float(expected.abs().max())  # worst seen: 2.4e-6
    assert got.dtype == torch.float32


# frozen and trained


def test_a_frozen_encoder_never_trains_whatever_mode_it_is_put_in(tmp_path: Path):
    import timm

    model = timm.create_model("tf_efficientnet_lite0")
    built = encoder("timm", write_timm(tmp_path / "lite0", "tf_efficientnet_lite0", model), image_size=64)
    built.requires_grad_(False).train()
    before = {name: buffer.clone() for name, buffer in built.named_buffers()}
    features = built(torch.randn(1, 3, 64, 64))
    assert not features.requires_grad
    assert not any(module.training for module in built.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in built.named_buffers())


def test_a_trained_encoder_names_the_weights_that_no_feature_needs(tmp_path: Path):
    built = encoder("hf", write_vision(tmp_path / "clip"), layer=-2)
    assert built.train().training
    assert built.unused_parameters() == ["trunk.model.post_layernorm.weight", "trunk.model.post_layernorm.bias"]
    assert built(IMAGES).requires_grad


# what is refused


def test_a_misspelt_name_is_answered_with_near_ones():
    with pytest.raises(ConfigError, match=r"near it: .*eva02_large_patch14_clip_336"):
        encoder("timm", "eva02_large_patch14_clip_36")
    with pytest.raises(ConfigError, match=r"near it: .*ViT-L-14-336"):
        encoder("open_clip", "ViT-L-14_336", pretrained="openai")


def test_a_name_whose_weights_cannot_be_fetched_says_so():
    with pytest.raises(CheckpointError, match="model hub cannot be reached"):
        encoder("timm", "vit_tiny_patch16_224")
    with pytest.raises(CheckpointError, match="model hub cannot be reached"):
        encoder("hf", "openai/clip-vit-large-patch14-336")
    with pytest.raises(ConfigError, match=r"needs a weight tag or file; tags: .*openai"):
        encoder("open_clip", "ViT-B-32")


def test_open_clip_weights_of_another_activation_are_refused():
    with pytest.raises(ConfigError, match="set path: ViT-L-14-336-quickgelu"):
        encoder("open_clip", "ViT-L-14-336", pretrained="openai")


def test_pickled_weights_are_refused(tmp_path: Path):
    folder = write_vision(tmp_path / "clip")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="save_pretrained"):
        encoder("hf", folder)
    with pytest.raises(ConfigError, match=r"\.safetensors files only"):
        encoder("timm", "vit_tiny_patch16_224", pretrained=str(folder / "pytorch_model.bin"))


def test_weights_that_lack_a_tensor_are_refused_instead_of_being_filled_with_random_ones(tmp_path: Path):
    folder = write_vision(tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.layers.1.mlp.fc1.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 of CLIPVisionModel, e\.g\. encoder\.layers\.1\.mlp\.fc1"):
        encoder("hf", folder)


def test_a_damaged_file_is_a_checkpoint_error(tmp_path: Path):
    folder = write_vision(tmp_path / "clip")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot load"):
        encoder("hf", folder)


def test_a_language_model_is_no_encoder(llm: Path):
    with pytest.raises(ConfigError, match="model type 'llama' is no encoder known here"):
        encoder("hf", llm)


def test_the_shape_alone_needs_only_the_config(tmp_path: Path):
    folder = write_vision(tmp_path / "clip")
    shutil.move(folder / "model.safetensors", tmp_path / "elsewhere")
    with torch.device("meta"):
        built = build_vision(VisionConfig(backend="hf", path=str(folder), layer=-2), weights=False)
    assert (built.num_patches, built.width) == (16, 24)
    assert all(parameter.is_meta for parameter in built.parameters())
