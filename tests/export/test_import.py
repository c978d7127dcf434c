"""`vlm import`: folders of other programs become exports with the same logits, and the start of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_export_llava import write_llava
from test_merge import _text_model
from tiny_export import model_config, write_clip, write_image, write_llm

from vlm.artifacts.foreign import FOREIGN
from vlm.artifacts.initial import load_init
from vlm.cli.main import main
from vlm.compat import prepare
from vlm.errors import CheckpointError, ConfigError
from vlm.export.taken_in import import_folder
from vlm.inference.load import load
from vlm.models.build import build_model

PIXELS = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
CLIP = {"mm_vision_tower": "openai/clip", "mm_vision_select_layer": -2, "mm_projector_type": "mlp2x_gelu"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llava/ as transformers saves it; and what it is made of: base/, tower/. Not to be changed."""
    root = tmp_path_factory.mktemp("import")
    write_llm(root / "llm", tied=False)
    whole = write_llava(root / "llava", root / "llm", write_clip(root / "clip"))
    whole.model.vision_tower.save_pretrained(root / "tower")
    _text_model(whole).save_pretrained(root / "base")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "llm")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    for name in ("base", "llava"):
        tokenizer.save_pretrained(root / name)
    return root


def read_whole(root: Path) -> Any:
    prepare()
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(root / "llava")


@torch.no_grad()
def expected_logits(whole: Any) -> torch.Tensor:
    ids = torch.tensor([[whole.config.image_token_id] * 16 + [5, 6, 7]])
    return whole(input_ids=ids, pixel_values=PIXELS, attention_mask=torch.ones_like(ids)).logits[0]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[model.image_token_id] * 16 + [5, 6, 7]])
    return model.logits(model(ids, torch.arange(19)[None], PIXELS))[0]


def projector(whole: Any, prefix: str) -> dict[str, torch.Tensor]:
    layers = {"0": whole.model.multi_modal_projector.linear_1, "2": whole.model.multi_modal_projector.linear_2}
    return {f"{prefix}{n}.{name}": t.clone() for n, layer in layers.items() for name, t in layer.state_dict().items()}


def put(folder: Path, settings: dict[str, Any] | None, **files: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings))
    for name, tensors in files.items():
        tensors = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        torch.save(tensors, folder / f"{name}.bin")


def adapt(model: Any, folder: Path, targets: list[str], **kinds: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False, **kinds)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name or "modules_to_save" in name:
            parameter.data *= 1.1
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


def _projector_only(root: Path, folder: Path, whole: Any) -> None:
    put(folder, CLIP, mm_projector=projector(whole, "model.mm_projector."))


def _official_lora(root: Path, folder: Path, whole: Any) -> None:
    put(folder, CLIP, non_lora_trainables=projector(whole, "base_model.model.model.mm_projector."))
    adapt(_text_model(whole), folder, ["q_proj", "down_proj"])


def _official_dora(root: Path, folder: Path, whole: Any) -> None:
    put(folder, CLIP, non_lora_trainables=projector(whole, "base_model.model.model.mm_projector."))
    kinds = {"use_dora": True, "use_rslora": True, "modules_to_save": ["lm_head"]}
    merged = adapt(_text_model(whole), folder, ["q_proj", "down_proj"], **kinds)
    whole.lm_head.load_state_dict(merged.lm_head.state_dict())


def _official_whole(root: Path, folder: Path, whole: Any) -> None:
    text = _text_model(whole)
    tower = whole.model.vision_tower.state_dict().items()  # not that of --vision
    tower = {f"model.vision_tower.vision_tower.vision_model.{name}": tensor for name, tensor in tower}
    put(folder, {**text.config.to_dict(), **CLIP, "model_type": "llava_llama", "unfreeze_mm_vision_tower": True},
        pytorch_model=text.state_dict() | projector(whole, "model.mm_projector.") | tower)  # fmt: skip
    copy_tokenizer(root, folder)


def _tiny_llava(root: Path, folder: Path, whole: Any) -> None:
    text, tower = _text_model(whole), whole.model.vision_tower
    put(folder, {
        "model_type": "tinyllava", "connector_type": "mlp2x_gelu", "vision_feature_layer": -2,
        "text_config": text.config.to_dict(), "vision_config": tower.config.to_dict(),
    })  # fmt: skip
    tensors = projector(whole, "connector._connector.")
    tensors |= {f"language_model.{name}": tensor for name, tensor in text.state_dict().items()}
    tensors |= {f"vision_tower._vision_tower.vision_model.{n}": t for n, t in tower.state_dict().items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    copy_tokenizer(root, folder)


def _xtuner(root: Path, folder: Path, whole: Any) -> None:
    put(folder / "projector", {"model_type": "projector", "depth": 2}, pytorch_model=projector(whole, "model."))
    adapt(_text_model(whole), folder / "llm_adapter", ["v_proj"])
    whole.model.vision_tower = adapt(whole.model.vision_tower, folder / "visual_encoder_adapter", ["q_proj", "fc2"])


def _hf(root: Path, folder: Path, whole: Any) -> None:
    shutil.copytree(root / "llava", folder)


def copy_tokenizer(root: Path, folder: Path) -> None:
    for file in (root / "base").glob("tokenizer*"):
        shutil.copy(file, folder)


LLM, TOWER = ("--llm", "base"), ("--vision", "tower")
CASES: dict[str, tuple[Callable[[Path, Path, Any], None], tuple[tuple[str, str], ...]]] = {
    "transformers": (_hf, ()),
    "official projector": (_projector_only, (LLM, TOWER)),
    "official LoRA": (_official_lora, (LLM, TOWER)),
    "official DoRA": (_official_dora, (LLM, TOWER)),
    "official whole": (_official_whole, (("--vision", "clip"),)),
    "TinyLLaVA": (_tiny_llava, ()),
    "XTuner": (_xtuner, (LLM, TOWER, ("--template", "chatml"))),
}


@pytest.mark.one_in(4)
@pytest.mark.slow
@pytest.mark.parametrize("layout", CASES)
def test_an_imported_model_has_the_logits_of_the_original_and_starts_a_run(
    root: Path, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
):
    write, flags = CASES[layout]
    whole, folder, out = read_whole(root), tmp_path / "theirs", tmp_path / "ours"
    write(root, folder, whole)
    options = [part for flag, value in flags for part in (flag, str(root / value) if flag != "--template" else value)]
    with pytest.raises(SystemExit) as end:
        main(["import", str(folder), str(out), *options])
    assert not end.value.code, capsys.readouterr().err
    expected, loaded = expected_logits(whole), load(out, "cpu", "fp32")
    assert (logits(loaded.model) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert loaded.chat("What?", [write_image(tmp_path / "image.png")], max_new_tokens=2) is not None
    said = capsys.readouterr().err
    assert f"init_from: {out}" in said
    paths = [
        Path(line.partition("path: ")[2].split(",")[0].rstrip("}")) for line in said.splitlines() if "path: " in line
    ]
    assert all(path.is_dir() for path in paths)
    model = loaded.config
    places = {"llm": out / "llm" if (out / "llm").is_dir() else root / "base"}
    brings = any((out / "vision").glob("*.safetensors"))
    places["vision"] = out / "vision" if brings else root / "tower"
    config = model_config(
        tmp_path, vision={"backend": "hf", "path": str(places["vision"]), "layer": -1 if brings else -2},
        llm={"path": str(places["llm"])}, projector={"kind": "mlp"},
        lora=None if model.lora is None else model.lora.model_dump(),
        trainable=["projector"] + (["llm.lora"] if model.lora else []),
    )  # fmt: skip
    started = build_model(config, seed=9).model.eval()
    load_init(started, config, out)
    assert (logits(started) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_a_llava_next_is_taken_with_one_tile_an_image(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    whole = read_whole(root)
    shape = {key: getattr(whole.config, key) for key in ("vision_config", "text_config", "image_token_id")}
    config = LlavaNextConfig(**shape, image_seq_length=16, image_grid_pinpoints=[[28, 56], [56, 28]])
    model = LlavaNextForConditionalGeneration(config)
    model.load_state_dict(whole.state_dict(), strict=False)
    model.save_pretrained(tmp_path / "next")
    for file in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "llava" / file, tmp_path / "next")
    loaded = load(import_folder(tmp_path / "next", tmp_path / "ours"), "cpu", "fp32")
    expected = expected_logits(whole)
    assert (logits(loaded.model) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert "an image is one tile here" in capsys.readouterr().err


@pytest.mark.slow
def test_several_layers_of_an_encoder_stay_several(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    whole = write_llava(tmp_path / "llava", root / "llm", root / "clip", vision_feature_layer=[-2, -3])
    copy_tokenizer(root, tmp_path / "llava")
    loaded = load(import_folder(tmp_path / "llava", tmp_path / "ours"), "cpu", "fp32")
    assert "layer: [-1, -2]" in capsys.readouterr().err  # of the two blocks that are kept
    expected = expected_logits(whole)
    assert (logits(loaded.model) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_a_tiny_llava_of_several_layers_is_read_as_transformers_llava_of_the_same(root: Path, tmp_path: Path, capsys):
    whole = write_llava(tmp_path / "llava", root / "llm", root / "clip", vision_feature_layer=[-2, -3])
    _tiny_llava(root, tmp_path / "theirs", whole)
    settings = json.loads((tmp_path / "theirs/config.json").read_text())
    put(tmp_path / "theirs", settings | {"vision_feature_layer": [-2, -3]})
    loaded = load(import_folder(tmp_path / "theirs", tmp_path / "ours"), "cpu", "fp32")
    assert "layer: [-1, -2]" in capsys.readouterr().err
    expected = expected_logits(whole)
    assert (logits(loaded.model) - expected).abs().max() < 1e-5 * expected.abs().max()
    for value in ([], [-2, 1], 23, "all"):
        put(tmp_path / "theirs", settings | {"vision_feature_layer": value})
        with pytest.raises(CheckpointError, match=r"config.json: vision_feature_layer is .*counted from the encoder's"):
            import_folder(tmp_path / "theirs", tmp_path / "other")


@pytest.mark.slow
def test_a_prismatic_checkpoint_has_the_logits_of_its_parts(root: Path, tmp_path: Path):
    prepare()
    import timm

    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=3).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    shape = {key: network.pretrained_cfg[key] for key in ("mean", "std", "first_conv", "classifier")}
    settings = {
        "architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": {"img_size": 32, "depth": 3},
        "pretrained_cfg": {**shape, "input_size": [3, 32, 32], "num_classes": 0},
    }  # fmt: skip
    put(tmp_path / "vit", settings)
    save_file(network.state_dict(), tmp_path / "vit/model.safetensors")
    text = _text_model(read_whole(root)).eval()
    layers = torch.nn.Sequential(torch.nn.Linear(192, 32), torch.nn.GELU(), torch.nn.Linear(32, 32))
    named = {f"projector.{name}": tensor for name, tensor in layers.state_dict().items()}
    (tmp_path / "theirs/checkpoints").mkdir(parents=True)
    torch.save(
        {"model": {"projector": named, "llm_backbone": {f"llm.{n}": t for n, t in text.state_dict().items()}},
         "optimizer": {"state": {}}},
        tmp_path / "theirs/checkpoints/latest-checkpoint.pt",
    )  # fmt: skip
    model = {"vision_backbone_id": "clip-vit-l-336px", "llm_backbone_id": "vicuna-v15-7b", "arch_specifier": "gelu-mlp"}
    (tmp_path / "theirs/config.json").write_text(json.dumps({"model": model}))
    out = import_folder(tmp_path / "theirs", tmp_path / "ours", llm=str(root / "base"), vision=str(tmp_path / "vit"))
    ours, pixels = load(out, "cpu", "fp32").model, torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        features = layers(network.get_intermediate_layers(pixels, n=[1])[0])
        words = text.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
        expected = text(inputs_embeds=torch.cat([features, words], 1)).logits[0]
        ids = torch.tensor([[ours.image_token_id] * features.shape[1] + [5, 6, 7]])
        found = ours.logits(ours(ids, torch.arange(ids.shape[1])[None], pixels))[0]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_cannot_be_imported_is_refused_by_name(root: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=f"none of the layouts that are read: {', '.join(FOREIGN)}"):
        import_folder(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--llm x: .* brings its own"):
        import_folder(root / "llava", tmp_path / "out", llm="x")
    put(tmp_path / "theirs", CLIP, mm_projector=projector(read_whole(root), "model.mm_projector."))
    with pytest.raises(ConfigError, match=r"does not say which base model .* --llm FOLDER"):
        import_folder(tmp_path / "theirs", tmp_path / "out", vision=str(root / "tower"))
    put(tmp_path / "theirs", {**CLIP, "mm_projector_type": "resampler"})
    with pytest.raises(CheckpointError, match="its projector is resampler; linear and mlpNx_gelu are known"):
        import_folder(tmp_path / "theirs", tmp_path / "out")
    torch.save({"code": print}, tmp_path / "theirs/mm_projector.bin")
    (tmp_path / "theirs/config.json").write_text(json.dumps(CLIP))
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        import_folder(tmp_path / "theirs", tmp_path / "out")
    assert not (tmp_path / "out").exists()
