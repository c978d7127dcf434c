"""The whole model: images land at their placeholders, text alone is first-class, three precisions."""

from __future__ import annotations

import pytest
import torch
from tiny_models import changed, write_timm

from vlm.batch import IGNORE_INDEX
from vlm.models.build import Assembled, build_model
from vlm.models.config import ModelConfig
from vlm.models.loss import chunked_cross_entropy
from vlm.models.vlm import VisionLanguageModel, splice_image_features

IMAGE = 28  # the placeholder's id; the embedding has rows 0 to 27


@pytest.fixture
def built(config: ModelConfig) -> Assembled:
    return build_model(config)


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(3))


# the splice


def test_every_feature_lands_on_its_placeholder_in_reading_order():
    is_image = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    embeddings = torch.tensor([[[1.0], [2], [3], [4]], [[5], [6], [7], [8]]])
    spliced = splice_image_features(embeddings, torch.tensor([[10.0], [11], [20]]), is_image)
    assert spliced.squeeze(-1).tolist() == [[1, 10, 11, 4], [20, 6, 7, 8]]


def test_gradients_reach_words_and_images_and_no_replaced_word():
    is_image = torch.tensor([[False, True]])
    embeddings = torch.ones(1, 2, 1, requires_grad=True)
    features = torch.ones(1, 1, requires_grad=True)
    (splice_image_features(embeddings, features, is_image) * torch.tensor([[[3.0], [5.0]]])).sum().backward()
    assert embeddings.grad.flatten().tolist() == [3, 0]
    assert features.grad.tolist() == [[5]]


def test_features_take_the_dtype_of_the_words():
    spliced = splice_image_features(
        torch.zeros(1, 1, 1, dtype=torch.bfloat16), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    )
    assert spliced.dtype == torch.bfloat16


@pytest.mark.parametrize("count", [0, 1, 3])
def test_counts_that_differ_are_an_error_that_names_the_rows(count: int):
    is_image = torch.tensor([[True, False], [True, False]])
    with pytest.raises(ValueError, match=rf"2 image placeholders, {count} image features.*per row: \[1, 1\]"):
        splice_image_features(torch.zeros(2, 2, 1), torch.zeros(count, 1), is_image)


def test_the_batchs_images_are_told_apart(built: Assembled):
    """Swapping two images swaps what the text after each is about."""
    model = built.model.eval()
    rows = torch.tensor([[2, *[IMAGE] * 16, 3], [2, *[IMAGE] * 16, 3]])
    places = torch.arange(18).expand(2, 18)
    two = images(2)
    straight, swapped = model(rows, places, two), model(rows, places, two.flip(0))
    assert (straight - swapped.flip(0)).abs().max() < 1e-5  # worst seen: 0.0
    assert (straight[0, -1] - straight[1, -1]).abs().max() > 0.01


def test_a_placeholder_without_an_image_is_an_error(built: Assembled):
    with pytest.raises(ValueError, match="16 image placeholders, 0 image features"):
        built.model(torch.tensor([[2, *[IMAGE] * 16, 3]]), torch.arange(18)[None])
    with pytest.raises(ValueError, match="0 image placeholders, 16 image features"):
        built.model(torch.tensor([[2, 3]]), torch.arange(2)[None], images(1))


# text alone


def test_text_alone_equals_the_language_model_alone(built: Assembled):
    ids = torch.tensor([[2, 3, 4, 5]])
    expected = built.model.llm(input_ids=ids, use_cache=False).logits
    for mode in (True, False):  # in training a dummy image takes part, with weight 0
        hidden_states = built.model.train(mode)(ids, torch.arange(4)[None])
        assert torch.equal(built.model.logits(hidden_states), expected)


def test_where_other_rows_bring_features_the_encoder_is_not_called_for_text_alone(built: Assembled, monkeypatch):
    """Ranks of ZeRO-3 would wait for each other. Without features in other rows it is called for no image too."""
    calls: list[int] = []
    monkeypatch.setattr(built.model, "always_encode", True)
    features = torch.zeros(1, built.model.vision.num_patches, built.model.vision.width)
    monkeypatch.setattr(built.model.vision, "forward", lambda pixels: calls.append(1) or features)
    ids, positions = torch.tensor([[2, 3, 4]]), torch.arange(3)[None]
    expected = built.model.llm(input_ids=ids, use_cache=False).logits
    assert torch.equal(built.model.logits(built.model(ids, positions, image_features=torch.zeros(0))), expected)
    assert not calls
    built.model(ids, positions)
    assert calls == [1]


def test_a_plain_language_model_goes_through_the_same_calls(config: ModelConfig):
    built = build_model(changed(config, vision=None, trainable=["llm"]))
    assert built.image_spec is None
    assert built.image_token_id is None
    ids = torch.tensor([[2, 3, 4, 5]])
    expected = built.model.llm(input_ids=ids, use_cache=False).logits
    assert torch.equal(built.model.logits(built.model(ids, torch.arange(4)[None])), expected)
    with pytest.raises(ValueError, match="without a placeholder token"):
        built.model.embed(ids, torch.zeros(1, 16, 32))


@pytest.mark.parametrize("trainable", [["projector"], ["projector", "llm.lora"], ["projector", "llm", "vision"]])
def test_a_batch_of_text_alone_gives_every_trained_weight_a_gradient(config: ModelConfig, trainable: list[str]):
    """A rank without images takes part in the reduction of the projector's gradient, with zeros."""
    model = build_model(changed(config, trainable=trainable, lora={"rank": 2, "alpha": 4})).model.train()
    model.logits(model(torch.tensor([[2, 3, 4, 5]]), torch.arange(4)[None])).square().sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    of_images = [p.grad.abs().max().item() for name, p in trained.items() if name.startswith(("proj", "vision"))]
    assert of_images == [0.0] * len(of_images)


def test_a_frozen_encoder_does_not_run_for_text_alone(config: ModelConfig):
    model = build_model(config).model.train()
    calls = []
    model.vision.trunk.register_forward_hook(lambda *_: calls.append(1))
    model(torch.tensor([[2, 3]]), torch.arange(2)[None])
    assert calls == []


# precision


@pytest.mark.one_in(4)
@pytest.mark.parametrize("trainable", [["projector"], ["projector", "llm.lora"], ["projector", "llm", "vision"]])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_precision_trains(config: ModelConfig, precision: str, trainable: list[str], checkpointing: bool):
    settings = changed(
        config, trainable=trainable, lora={"rank": 2, "alpha": 4}, gradient_checkpointing=checkpointing,
        projector={"kind": "mlp", "normalize": True},
    )  # fmt: skip
    model = build_model(settings, precision=precision).model.train()
    for name, parameter in model.named_parameters():
        is_bf16 = precision == "bf16" and name.partition(".")[0] not in trainable and not parameter.requires_grad
        assert parameter.dtype == (torch.bfloat16 if is_bf16 else torch.float32), name
    loss = step(model, precision).item()
    assert loss == pytest.approx(
        step(build_model(settings).model.train(), "fp32").item(), rel=0.02
    )  # worst seen: 0.004
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all(), name
            # an adapter's second matrix starts at 0, which hides the first one from the gradient
            assert parameter.grad.abs().max() > 0 or ".lora_A." in name or ".k_proj.bias" in name, name


def step(model: VisionLanguageModel, precision: str) -> torch.Tensor:
    """One forward and backward of a row with an image and one of text alone."""
    rows = torch.tensor([[2, *[IMAGE] * 16, 3, 4, 5], [6, 7, 8, 9, *[1] * 16]])
    labels = torch.full_like(rows, IGNORE_INDEX)
    labels[0, 17:], labels[1, 1:4] = rows[0, 17:], rows[1, 1:4]
    places = torch.stack([torch.arange(20), torch.cat([torch.arange(4), torch.zeros(16, dtype=torch.long)])])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
        loss = chunked_cross_entropy(model(rows, places, images(1)), labels, model.logits)
    loss.backward()
    return loss


@pytest.mark.parametrize(
    ("family", "changes", "field"),
    [("cohere", {"logit_scale": 0.5}, "logit_scale"), ("granite", {"logits_scaling": 3.0}, "logits_scaling"),
     ("gemma2", {"final_logit_softcapping": 2.0}, "final_logit_softcapping")],
)  # fmt: skip
def test_logits_are_scaled_as_the_family_does(tmp_path, family: str, changes: dict, field: str):
    from tiny_models import write_llm

    path = write_llm(tmp_path / family, family, **changes)
    model = build_model(ModelConfig.model_validate({"llm": {"path": str(path)}, "trainable": ["llm"]})).model
    ids = torch.tensor([[2, 3, 4, 5]])
    expected = model.llm(input_ids=ids, use_cache=False).logits
    assert getattr(model.llm.config, field) == next(iter(changes.values()))
    assert torch.equal(model.logits(model(ids, torch.arange(4)[None])), expected)


def test_an_image_that_is_not_there_moves_no_statistics_of_a_trained_cnn(config: ModelConfig, tmp_path):
    """A batch of text alone, and the empty rows that fill an epoch's last step."""
    import timm

    cnn = write_timm(tmp_path / "cnn", "test_resnet", timm.create_model("test_resnet"))
    vision = {"backend": "timm", "path": str(cnn), "image_size": 64}
    model = build_model(changed(config, vision=vision, trainable=["projector", "vision"])).model.train()
    before = {name: buffer.clone() for name, buffer in model.vision.named_buffers()}
    model(torch.tensor([[2, 3, 4, 5]]), torch.arange(4)[None]).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.vision.named_buffers())
    assert all(module.training for module in model.vision.modules())  # as it was
    model(torch.tensor([[2, *[IMAGE] * 4]]), torch.arange(5)[None], torch.randn(1, 3, 64, 64))
    assert not all(torch.equal(buffer, before[name]) for name, buffer in model.vision.named_buffers())
