"""A full export in transformers' LLaVA layout, loaded by stock transformers and compared with our own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_export import model_config, write_clip, write_image, write_llm, write_run, write_siglip

from vlm.data.conversation import IMAGE, Conversation, Turn
from vlm.data.images import load_image, to_pixels
from vlm.data.template import TEMPLATES
from vlm.data.tokenize import ConversationTokenizer
from vlm.export.run import export_run
from vlm.inference.load import load
from vlm.models.build import Assembled

# Worst difference seen over all cases below: 2.6e-5, of logits up to 7.5, in float32.
TOLERANCE = 1e-4

MEAN = (122, 116, 104)  # what transformers pads with for CLIP
CASES: dict[str, dict[str, Any]] = {
    "linear, normalised, white padding": {},
    "mlp": {"projector": {"kind": "mlp", "depth": 2}},
    "class token kept": {"vision": {"layer": -1, "keep_class_token": True}},
    "padded with the mean": {"vision": {"background": MEAN}},
    "cropped": {"vision": {"resize": "crop"}},
    "squashed": {"vision": {"resize": "squash"}},
    "other image size": {"vision": {"image_size": 42}},
    "siglip": {"vision": {"path": "siglip", "layer": -1, "background": (10, 200, 30)}},
    "two layers": {"vision": {"layer": [-2, -3]}},
    "head of its own": {"llm": {"path": "untied"}},
    "no adapter": {"trainable": ["projector"], "lora": None},
    "whole language model": {"trainable": ["projector", "llm"], "lora": None},
}


def build_case(tmp_path: Path, changes: dict[str, Any]) -> tuple[Path, Assembled]:
    model_config(tmp_path)  # writes clip/ and llm/
    write_siglip(tmp_path / "siglip")
    write_llm(tmp_path / "untied", tied=False)
    vision = {"backend": "hf", "path": "clip", "layer": -2, **changes.get("vision", {})}
    llm = {"path": "llm", **changes.get("llm", {})}
    paths = {name: {**part, "path": str(tmp_path / part["path"])} for name, part in (("vision", vision), ("llm", llm))}
    config = model_config(tmp_path, **{**changes, **paths})
    built = write_run(tmp_path / "run", config)
    return tmp_path / "run", built


def ours(built: Assembled, image: Path, question: str) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Ids, pixels and logits of the model that was trained."""
    assert built.image_spec is not None
    tokens = ConversationTokenizer(
        built.tokenizer,
        TEMPLATES["chatml"],
        image_token_id=built.image_token_id,
        tokens_per_image=built.image_spec,
    )
    ids = tokens.prompt(Conversation((Turn("user", (IMAGE, f"\n{question}")),), (str(image),)))
    pixels = to_pixels(load_image(str(image)), built.image_spec).unsqueeze(0)
    with torch.no_grad():
        hidden = built.model(torch.tensor([ids]), torch.arange(len(ids)).unsqueeze(0), pixels)
        return ids, pixels, built.model.logits(hidden)[0]


def stock(export: Path, image: Path, question: str, **backend: str) -> tuple[Any, torch.Tensor]:
    """What transformers makes of the folder: processor output and logits."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(export)
    processor = AutoProcessor.from_pretrained(export, **(backend or {"backend": "pil"}))
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"\n{question}"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    opened = Image.open(image).convert("RGB")
    inputs = processor(images=opened, text=text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        return inputs, model(**inputs).logits[0]


@pytest.mark.one_in(6)
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_stock_transformers_computes_the_same_logits_from_the_same_image(case: str, tmp_path: Path):
    run, built = build_case(tmp_path, CASES[case])
    image = write_image(tmp_path / "image.png")
    ids, pixels, expected = ours(built, image, "What is this?")
    inputs, logits = stock(export_run(run, full=True), image, "What is this?")
    assert inputs["input_ids"][0].tolist() == ids
    assert inputs["pixel_values"].shape == pixels.shape
    assert logits.abs().max() > 1  # not a comparison of zeros
    assert (logits[:, : expected.shape[1]] - expected).abs().max().item() < TOLERANCE


@pytest.mark.slow
def test_the_processor_makes_the_same_pixels_with_pillow(tmp_path: Path):
    run, built = build_case(tmp_path, {"vision": {"background": MEAN}})  # transformers' own colour: nothing was folded
    image = write_image(tmp_path / "image.png", size=(61, 33))
    _, pixels, _ = ours(built, image, "?")
    inputs, _ = stock(export_run(run, full=True), image, "?")
    # worst difference seen: 0
    assert (inputs["pixel_values"] - pixels).abs().max().item() < 1e-6


@pytest.mark.slow
def test_the_processor_is_one_grey_level_off_at_most_with_torchvision(tmp_path: Path):
    """transformers' default resizes with torchvision, which rounds a few pixels the other way."""
    run, built = build_case(tmp_path, {"vision": {"background": MEAN}})
    image = write_image(tmp_path / "image.png", size=(61, 33))
    _, pixels, expected = ours(built, image, "?")
    inputs, logits = stock(export_run(run, full=True), image, "?", backend="torchvision")
    level = 1 / 255 / min(built.image_spec.std)
    assert (inputs["pixel_values"] - pixels).abs().max().item() < 1.001 * level
    # worst difference seen: 7e-4
    assert (logits[:, : expected.shape[1]] - expected).abs().max().item() < 0.01


@pytest.mark.slow
def test_another_image_gives_other_logits(tmp_path: Path):
    run, _ = build_case(tmp_path, {})
    export = export_run(run, full=True)
    one = stock(export, write_image(tmp_path / "1.png"), "What?")[1]
    two = stock(export, write_image(tmp_path / "2.png", seed=3), "What?")[1]
    assert (one - two).abs().max() > 1e-2


@pytest.mark.slow
def test_the_placeholder_is_never_the_likeliest_next_token(tmp_path: Path):
    """Its id lies beyond the embedding, so a row was added: the mean of the others, whose logit is the mean logit."""
    run, built = build_case(tmp_path, {})
    _, logits = stock(export_run(run, full=True), write_image(tmp_path / "image.png"), "What?")
    assert logits.shape[1] == built.image_token_id + 1
    others = logits[:, :-1]
    # worst difference seen: 3.7e-8
    assert (logits[:, -1] - others.mean(1)).abs().max().item() < 1e-5
    assert (logits[:, -1] < others.max(1).values).all()


@pytest.mark.slow
def test_the_template_marks_replies_for_assistant_masks(tmp_path: Path):
    from transformers import AutoTokenizer

    run, _ = build_case(tmp_path, {})
    tokenizer = AutoTokenizer.from_pretrained(export_run(run, full=True))
    messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert tokenizer.decode([token for token, mask in pairs if mask]) == "Yes.<|im_end|>"


@pytest.mark.slow
def test_generation_stops_where_the_template_ends_a_reply(tmp_path: Path):
    from transformers import GenerationConfig

    run, built = build_case(tmp_path, {})
    config = GenerationConfig.from_pretrained(export_run(run, full=True))
    assert built.tokenizer.convert_tokens_to_ids("<|im_end|>") in config.eos_token_id


@pytest.mark.slow
def test_we_read_the_folder_back_and_say_the_same(tmp_path: Path):
    run, _ = build_case(tmp_path, {"vision": {"image_size": 42}})
    image = write_image(tmp_path / "image.png")
    parts = load(export_run(run), device="cpu", precision="fp32")
    whole = load(export_run(run, full=True), device="cpu", precision="fp32")
    replies = [model.chat("What is this?", [image], max_new_tokens=12) for model in (parts, whole)]
    assert replies[0] == replies[1] != ""


@pytest.mark.slow
def test_the_whole_folder_needs_no_base_models(tmp_path: Path):
    run, _ = build_case(tmp_path, {})
    export = export_run(run, full=True)
    for name in ("clip", "llm", "run/checkpoints"):
        (tmp_path / name).rename(tmp_path / f"{name}-moved")
    image = write_image(tmp_path / "image.png")
    assert load(export, device="cpu", precision="fp32").chat("What?", [image], max_new_tokens=4) != ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"projector": {"kind": "linear", "unshuffle": 2}}, "merges 2 x 2"),
        ({"projector": {"kind": "mlp", "depth": 3}}, "has 3 layers"),
        ({"projector": {"kind": "mlp", "layer_norm": True}}, "begins with a LayerNorm"),
    ],
)
def test_what_llava_cannot_express_becomes_a_vlm_folder_and_says_why(
    tmp_path: Path, changes: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
):
    run, _ = build_case(tmp_path, changes)
    export = export_run(run, full=True)
    assert reason in capsys.readouterr().err
    assert reason in (export / "README.md").read_text()
    assert (export / "llm" / "config.json").exists()
    assert (export / "vision.safetensors").exists()


@pytest.mark.slow
def test_rounding_to_bfloat16_on_request(tmp_path: Path):
    from safetensors import safe_open

    write_clip(tmp_path / "clip")
    run, _ = build_case(tmp_path, {})
    with safe_open(export_run(run, full=True, dtype="bf16") / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
