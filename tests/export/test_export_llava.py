"""A run that begins with a folder in transformers' LLaVA layout: another program's, or a full export."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_export import model_config, write_clip, write_decoder, write_run, write_siglip

import vlm
from vlm.artifacts.initial import load_init
from vlm.artifacts.llava import llava_adapter, llm_shape
from vlm.artifacts.parts import read_run
from vlm.compat import prepare
from vlm.config import load_config
from vlm.errors import CheckpointError
from vlm.export.run import export_run
from vlm.models.build import build_model
from vlm.models.pipeline_build import build_stage
from vlm.models.trainable import part_weights
from vlm.run import train

EARLIER = Path(__file__).parents[1] / "fixtures/earlier"
MLP = {"projector": {"kind": "mlp", "depth": 2}, "trainable": ["projector"], "lora": None}
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def write_llava(folder: Path, llm: Path, vision: Path, extra_rows: int = 1, **changes: Any) -> Any:
    """A LLaVA as transformers saves one: all of the encoder's blocks, and rows for the placeholder. Returns it."""
    prepare()
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    text, tower = AutoConfig.from_pretrained(llm), AutoConfig.from_pretrained(vision)
    rows = text.vocab_size
    text.vocab_size = rows + extra_rows
    torch.manual_seed(3)
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=rows, image_seq_length=16,
        tie_word_embeddings=text.tie_word_embeddings, **changes,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor = {"image_processor_type": "CLIPImageProcessor", "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip/, llm/ and llava/. Not to be changed."""
    root = tmp_path_factory.mktemp("llava")
    model_config(root)
    write_llava(root / "llava", root / "llm", root / "clip")
    return root


def begin(config: Any, folder: Path) -> tuple[Any, list[str]]:
    model = build_model(config, seed=5).model.eval()
    return model, load_init(model, config, folder)


@torch.no_grad()
def logits(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Ours, of 16 placeholders and three words."""
    ids = torch.tensor([[model.image_token_id] * 16 + [5, 6, 7]])
    return model.logits(model(ids, torch.arange(19)[None], pixels))[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2"])
@pytest.mark.parametrize("encoder", ["clip", "siglip"])
def test_another_programs_llava_is_the_start_of_a_run_and_computes_the_same(tmp_path: Path, family: str, encoder: str):
    llm = write_decoder(tmp_path / "llm", family)
    vision = {"clip": write_clip, "siglip": write_siglip}[encoder](tmp_path / "vision")
    (vision / "preprocessor_config.json").write_text(json.dumps({"image_mean": CLIP_MEAN, "image_std": CLIP_STD}))
    strategy = "default" if encoder == "clip" else "full"  # SigLIP has no class token
    theirs = write_llava(tmp_path / "llava", llm, vision, vision_feature_select_strategy=strategy)
    config = model_config(
        tmp_path, vision={"backend": "hf", "path": str(vision), "layer": -2}, llm={"path": str(llm)}, **MLP
    )
    ours, report = begin(config, tmp_path / "llava")
    assert [line.partition(":")[0] for line in report] == ["projector", "llm", "vision"]
    pixels = torch.randn(1, 3, 28, 28)
    ids = torch.tensor([[theirs.config.image_token_id] * 16 + [5, 6, 7]])
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[0]
    found = logits(ours, pixels)
    assert found.shape[1] == expected.shape[1] - 1  # the placeholder's row is not taken over
    assert (found - expected[:, :-1]).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_several_layers_of_the_encoder_are_joined_in_their_order(root: Path, tmp_path: Path):
    theirs = write_llava(tmp_path / "llava", root / "llm", root / "clip", vision_feature_layer=[-2, -3])
    vision = {"backend": "hf", "path": str(root / "clip"), "layer": [-2, -3], "resize": "crop"}
    ours, _ = begin(model_config(root, **{**MLP, "vision": vision}), tmp_path / "llava")
    pixels, ids = torch.randn(1, 3, 28, 28), torch.tensor([[theirs.config.image_token_id] * 16 + [5, 6, 7]])
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[0, :, :-1]
    assert (logits(ours, pixels) - expected).abs().max() < 1e-5 * expected.abs().max()
    vision["layer"] = [-3, -2]
    with pytest.raises(CheckpointError, match=r"reads blocks \[1, 0\].*in this order.*is \[-3, -2\]"):
        begin(model_config(root, **{**MLP, "vision": vision}), tmp_path / "llava")


@pytest.mark.slow
def test_every_stage_of_a_pipeline_gets_what_the_whole_model_gets(root: Path):
    config = model_config(root, **MLP)
    whole, report = begin(config, root / "llava")
    expected = dict(whole.named_parameters(remove_duplicate=False))
    for number in range(3):
        stage = build_stage(config, (1, 3), number, seed=2)
        assert load_init(stage, config, root / "llava") == report
        assert all(tensor.equal(expected[name]) for name, tensor in stage.built.model.named_parameters())


@pytest.mark.slow
def test_what_a_run_then_trains_is_exported_with_all_that_it_began_with(root: Path, tmp_path: Path):
    config = model_config(root, **MLP)
    built = write_run(tmp_path / "run", config, init_from=root / "llava")
    trained = read_run(tmp_path / "run")
    assert {name.partition(".")[0] for name in trained.tensors} == {"projector", "llm", "vision"}
    again = build_model(config, seed=9).model.eval()
    load_init(again, config, export_run(tmp_path / "run"))
    pixels = torch.randn(1, 3, 28, 28)
    assert logits(again, pixels).equal(logits(built.model, pixels))


@pytest.mark.slow
def test_a_run_trains_from_it_and_its_exports_answer_alike(tmp_path: Path, monkeypatch, capsys):
    shutil.copytree(EARLIER, tmp_path / "earlier", ignore=shutil.ignore_patterns("run"))
    monkeypatch.chdir(tmp_path / "earlier")
    write_llava(Path("llava"), Path("llm"), Path("clip"))
    values = json.loads(Path("config.yaml").read_text()) | {"init_from": "llava"}
    values["model"]["projector"] = {"kind": "mlp"}
    values["train"]["max_steps"] = 2
    Path("config.yaml").write_text(json.dumps(values))
    run = train(load_config("config.yaml"), Path("config.yaml").read_text())
    assert "init_from: vision: 39 tensors loaded" in capsys.readouterr().err
    checks = {check["name"]: check for check in json.loads((run / "proof.json").read_text())["checks"]}
    assert checks["initial_weights"]["measured"] == 0.0
    answers = [
        vlm.load(export_run(run, full=full), "cpu", "fp32").chat("What is this?", ["0.png"], max_new_tokens=8)
        for full in (False, True)
    ]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_a_full_export_of_siglip_has_no_pooling_head_and_needs_none(root: Path, tmp_path: Path):
    vision = {"backend": "hf", "path": str(write_siglip(tmp_path / "siglip")), "layer": -1, "resize": "squash"}
    config = model_config(root, **{**MLP, "vision": vision})
    write_run(tmp_path / "run", config)
    _, report = begin(config, export_run(tmp_path / "run", full=True))
    assert report == ["projector: 4 tensors loaded", "llm: 20 tensors loaded", "vision: 53 tensors loaded"]


@pytest.mark.slow
def test_a_full_export_is_the_start_of_a_run_unless_the_colour_of_its_padding_is_folded_in(root: Path, tmp_path: Path):
    for resize in ("crop", "pad"):
        changes = {**MLP, "vision": {"backend": "hf", "path": str(root / "clip"), "layer": -2, "resize": resize}}
        built = write_run(tmp_path / resize, model_config(root, **changes))
        export_run(tmp_path / resize, full=True)
    changes["vision"]["resize"] = "crop"
    model, _ = begin(model_config(root, **changes), tmp_path / "crop" / "export-full")
    expected = part_weights(built.model, "projector")
    assert all(tensor.equal(expected[name]) for name, tensor in part_weights(model, "projector").items())
    with pytest.raises(CheckpointError, match=r"mean \(1, 1, 1\).*without --full"):
        begin(model_config(root, **changes), tmp_path / "pad" / "export-full")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector": {"kind": "linear"}}, r"projector\.layers\.2\.weight: not in the model"),
        ({"projector": {"kind": "mlp", "normalize": True}}, r"remove model\.projector\.pool, unshuffle and normalize"),
        ({"projector": {"kind": "mlp", "pool": 2}}, r"remove model\.projector\.pool"),
        ({"vision": {"layer": -1}}, r"encoder\.layers\.2\.\S+: missing"),
        ({"vision": {"layer": -2, "keep_class_token": True}}, "keep_class_token to false"),
    ],
)
def test_a_config_of_another_model_is_refused_by_name(root: Path, changes: dict[str, Any], message: str):
    vision = {"backend": "hf", "path": str(root / "clip"), "layer": -2, **changes.get("vision", {})}
    with pytest.raises(CheckpointError, match=message):
        begin(model_config(root, **{**MLP, **changes, "vision": vision}), root / "llava")


def test_a_tensor_that_is_none_of_llavas_is_named(root: Path, tmp_path: Path):
    folder = Path(shutil.copytree(root / "llava", tmp_path / "llava"))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"image_newline": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="image_newline: no rule is for it"):
        begin(model_config(root, **MLP), folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("projector_hidden_act", "relu", "is relu, neither linear nor gelu"),
        ("vision_feature_layer", [-2, 0], "the embeddings of its encoder"),
        ("multimodal_projector_bias", False, "no bias"),
        ("vision_config", {"model_type": "dinov2"}, "its encoder is a dinov2"),
        ("vision_config", {"model_type": "siglip_vision_model"}, "drops the first patch"),
    ],
)
def test_a_llava_that_our_parts_cannot_express_is_refused(
    root: Path, tmp_path: Path, key: str, value: Any, message: str
):
    folder = Path(shutil.copytree(root / "llava", tmp_path / "llava"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {key: value}))
    with pytest.raises(CheckpointError, match=message):
        begin(model_config(root, **MLP), folder)


# The adapter


def test_the_names_in_files_of_all_versions_are_the_same_parts(root: Path):
    """In the class; as transformers writes them; without the level `vision_model`."""
    config, llm = loaded(root)
    adapter = llava_adapter(config, llm)
    files = load_file(root / "llava" / "model.safetensors")
    ours = adapter.to_ours(files)
    assert ours.unread == {}
    in_class = adapter.from_ours(ours)
    assert "model.vision_tower.vision_model.embeddings.class_embedding" in in_class
    without = {name.replace(".vision_model.", "."): tensor for name, tensor in in_class.items()}
    for names in (in_class, without):
        assert {name: tensor.tolist() for name, tensor in adapter.to_ours(names).items()} == {
            name: tensor.tolist() for name, tensor in ours.items()
        }
    assert adapter.to_ours(in_class).is_invertible
    back = adapter.from_ours(adapter.to_ours(in_class))
    assert back.keys() == in_class.keys()
    assert all(back[name].equal(in_class[name]) for name in in_class)


def loaded(root: Path) -> Any:
    from transformers import LlavaConfig

    config = LlavaConfig.from_pretrained(root / "llava")
    return config, llm_shape(config.text_config)


@pytest.mark.parametrize("act", ["linear", "gelu"])
def test_a_projector_goes_there_and_back_to_the_bit(root: Path, act: str):
    config, llm = loaded(root)
    config.projector_hidden_act = act
    layers = (0,) if act == "linear" else (0, 2)
    ours = {f"projector.layers.{n}.{leaf}": torch.randn(shape) for n in layers for leaf, shape in
            (("weight", (4, 4)), ("bias", (4,)))}  # fmt: skip
    theirs = llava_adapter(config, llm).from_ours(ours)
    assert sorted(theirs) == [
        f"model.multi_modal_projector.linear_{n}.{leaf}" for n in (1, 2) for leaf in ("bias", "weight")
    ]
    back = llava_adapter(config, llm).to_ours(theirs)
    assert theirs.is_invertible
    assert {name: tensor.tolist() for name, tensor in back.items()} == {n: t.tolist() for n, t in ours.items()}


def test_a_second_layer_that_is_not_the_identity_is_no_linear_projector(root: Path):
    config, llm = loaded(root)
    config.projector_hidden_act = "linear"
    files = load_file(root / "llava" / "model.safetensors")
    with pytest.raises(CheckpointError, match="linear_2 is not the identity"):
        dict(llava_adapter(config, llm).to_ours(files))


# What is written

COMPUTED = ("_proj.weight", "position_embedding", "multi_modal_projector")  # merged or folded: rounded as the CPU does


@pytest.mark.slow
def test_a_full_export_has_the_names_and_tensors_that_earlier_versions_wrote(tmp_path: Path, monkeypatch):
    """The sum is of version 0.1, before names went through the adapter. Nothing random is in it: files alone."""
    shutil.copytree(EARLIER, tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    digest = hashlib.sha256()
    with safe_open(export_run("run", full=True) / "model.safetensors", "pt") as opened:
        for name in sorted(opened.keys()):
            tensor = opened.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            if not any(part in name for part in COMPUTED):
                digest.update(tensor.view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest()[:16] == "e38dca7ea6d667f4"
