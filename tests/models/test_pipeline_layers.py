"""The model as a row of layers computes what the whole model does, and a stage holds its own layers only."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_models import build_on_meta
from safetensors.torch import load_file, save_file
from tiny_models import changed, write_llm

from vlm.batch import IGNORE_INDEX, Batch
from vlm.errors import CheckpointError, ConfigError
from vlm.models import families
from vlm.models.build import build_model
from vlm.models.config import ModelConfig
from vlm.models.loss import chunked_cross_entropy
from vlm.models.pipeline import pipeline_layers, run_layers
from vlm.models.pipeline_build import build_stage, check_cuts, load_stage_weights
from vlm.models.trainable import load_weights, trained_weights
from vlm.models.weight_files import LazyTensors, WeightFiles

TOKENS = 16  # per image
IMAGE = 28  # id of its placeholder
ADAPTERS = {"trainable": ["projector", "llm.lora"], "lora": {"rank": 4, "alpha": 8}}
EVERYTHING = {"trainable": ["projector", "llm", "vision"]}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    ("internlm3", {}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 5}),
    ("qwen2", {}),
    (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5, "use_sliding_window": True},
    ),
    ("qwen3", {}),
]


def packed(lengths: list[list[int]], images: tuple[int, ...] = (), seed: int = 0) -> Batch:
    """Rows of examples of these lengths; `images`: rows that begin with one."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 28, (len(lengths), sum(lengths[0])), generator=rng)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    labels = ids.masked_fill((torch.rand(ids.shape, generator=rng) < 0.5) | (positions == 0), IGNORE_INDEX)
    for row in images:
        ids[row, :TOKENS] = IMAGE
        labels[row, :TOKENS] = IGNORE_INDEX
    pixels = torch.randn(len(images), 3, 28, 28, generator=rng) if images else None
    return Batch(input_ids=ids, labels=labels, position_ids=positions, pixel_values=pixels)


BATCHES = {
    "packed, with images": packed([[20, 12, 8], [25, 15, 0]], (0, 1)),
    "packed, an image in one row": packed([[20, 12, 8], [5, 30, 5]], (0,)),
    "text alone": packed([[13, 27], [40, 0]]),
    "nothing supervised": Batch(torch.full((1, 40), 3), torch.full((1, 40), IGNORE_INDEX), torch.arange(40)[None]),
}


def whole_loss(model: Any, batch: Batch) -> torch.Tensor:
    return loss_of(model, model(batch.input_ids, batch.position_ids, batch.pixel_values), batch)


def loss_of(model: Any, hidden_states: torch.Tensor | None, batch: Batch) -> torch.Tensor:
    assert hidden_states is not None
    return chunked_cross_entropy(hidden_states, batch.labels, model.logits)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.one_in(12)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: "-".join([family[0], *family[1]]))
@pytest.mark.parametrize("trains", [ADAPTERS, EVERYTHING], ids=["adapters", "everything"])
def test_all_layers_in_a_row_are_the_whole_model(
    config: ModelConfig, tmp_path: Path, family: Any, trains: Any, batch: Any
):
    name, settings = family
    llm = write_llm(tmp_path / name, name, tie_word_embeddings=trains is EVERYTHING, **settings)
    model = build_model(changed(config, llm={"path": str(llm)}, **trains)).model.train()
    model.image_token_id = IMAGE  # tokenizers of the families differ
    expected = whole_loss(model, batch)
    loss = loss_of(model, run_layers(model, pipeline_layers(model), batch), batch)
    assert loss.item() == expected.item()  # the same operations in the same order
    reference, found = gradients(model, expected), gradients(model, loss)
    assert reference.keys() == found.keys()
    assert all(torch.equal(reference[key], found[key]) for key in reference)


def test_every_family_that_can_be_cut_is_tested_here():
    assert {name for name, _ in FAMILIES} == {
        name for name, family in families.FAMILIES.items() if family.parts is not None
    }


def test_stages_one_after_another_are_the_whole_model_too(config: ModelConfig):
    """Each stage makes masks and rotary embeddings for itself."""
    model = build_model(changed(config, gradient_checkpointing=True, **ADAPTERS)).model.train()
    batch = BATCHES["packed, with images"]
    expected = whole_loss(model, batch)
    for cuts in ((1,), (2,), (3,), (1, 2), (1, 2, 3)):
        hidden_states = None
        for first, stop in itertools.pairwise([0, *cuts, 4]):
            hidden_states = run_layers(model, pipeline_layers(model, first, stop), batch, hidden_states)
        assert loss_of(model, hidden_states, batch).item() == expected.item(), cuts


def test_gradient_checkpointing_computes_blocks_again_and_changes_nothing(config: ModelConfig, monkeypatch):
    settings = changed(config, **ADAPTERS)
    results, calls = [], []
    for checkpointing in (False, True):
        model = build_model(changed(settings, gradient_checkpointing=checkpointing)).model.train()
        attention = model.llm.model.layers[0].self_attn
        attention.register_forward_hook(lambda *_: calls.append(checkpointing))  # noqa: B023
        batch = BATCHES["packed, with images"]
        results.append(gradients(model, loss_of(model, run_layers(model, pipeline_layers(model), batch), batch)))
    assert calls == [False, True, True]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_family_that_is_not_known_is_named_with_what_to_do():
    path = Path(__file__).parents[2] / "projects/shapes/Qwen--Qwen3-8B"
    model = build_on_meta(ModelConfig.model_validate({"llm": {"path": str(path)}, "trainable": ["llm"]}))
    model.llm.config.model_type = "bloom"
    with pytest.raises(ConfigError, match=r"pipeline: model type bloom .* give it `parts` in FAMILIES"):
        pipeline_layers(model)


# stages


@pytest.mark.slow
@pytest.mark.one_in(4)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("trains", "tied"), [(ADAPTERS, True), (ADAPTERS, False), (EVERYTHING, True), (EVERYTHING, False)]
)
def test_stages_together_hold_exactly_what_build_model_gives(config, tmp_path, trains, tied, precision):
    llm = write_llm(tmp_path / "other", tie_word_embeddings=tied)
    settings = changed(config, llm={"path": str(llm), "pad_vocab_to_multiple_of": 16}, **trains)
    whole = build_model(settings, precision=precision, seed=3).model
    expected = dict(whole.named_parameters(remove_duplicate=False)) | dict(whole.named_buffers())
    found, trained = set(), {}
    for number in range(3):
        stage = build_stage(settings, (1, 3), number, precision=precision, seed=3)
        own = stage.built.model
        for name, tensor in (*own.named_parameters(), *own.named_buffers()):
            assert torch.equal(tensor, expected[name]), name
            assert (tensor.dtype, tensor.requires_grad) == (expected[name].dtype, expected[name].requires_grad)
            found.add(name)
        trained |= stage.trained_weights()
        assert stage.trained == trained_weights(whole).keys()
    assert found == expected.keys()
    assert trained.keys() == trained_weights(whole).keys()


@pytest.mark.slow
def test_a_stage_computes_what_its_layers_of_the_whole_model_do(config: ModelConfig):
    settings = changed(config, **ADAPTERS)
    batch = BATCHES["packed, an image in one row"]
    expected = whole_loss(build_model(settings, seed=1).model, batch)
    hidden_states = None
    for number in range(3):
        stage = build_stage(settings, (1, 2), number, seed=1)
        hidden_states = run_layers(stage.built.model, stage.layers, batch, hidden_states)
    assert loss_of(stage.built.model, hidden_states, batch).item() == expected.item()


def test_a_stage_reads_its_own_tensors_only(config: ModelConfig, monkeypatch):
    read: list[str] = []
    original = WeightFiles.read
    monkeypatch.setattr(WeightFiles, "read", lambda self, name: (read.append(name), original(self, name))[1])
    stage = build_stage(config, (1, 2), 1)
    assert len(read) == 9
    assert all(name.startswith("model.layers.0.") for name in read)
    assert sum(p.numel() for p in stage.built.model.parameters()) == sum(
        p.numel() for p in stage.layers[0].parameters()
    )
    assert [
        name for name, _ in stage.built.model.named_parameters() if not name.startswith("llm.model.layers.0.")
    ] == []


@pytest.mark.one_in(3)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("trains", [ADAPTERS, EVERYTHING], ids=["adapters", "everything"])
def test_block_after_block_is_read_and_handed_on(config: ModelConfig, tmp_path: Path, trains, precision, tied):
    llm = write_llm(tmp_path / "other", tie_word_embeddings=tied)
    settings = changed(config, llm={"path": str(llm), "pad_vocab_to_multiple_of": 64}, **trains)
    expected = dict(build_model(settings, seed=1, precision=precision).model.named_parameters())
    held: list[int] = []  # bytes of the block that is handed over
    elsewhere: list[tuple[Any, torch.Tensor]] = []

    def spread(block: Any) -> None:
        held.append(sum(p.untyped_storage().nbytes() for p in block.parameters()))
        for parameter in block.parameters():
            elsewhere.append((parameter, parameter.data))
            parameter.data = torch.empty(0)

    stage = build_stage(settings, (), 0, seed=1, precision=precision, spread=spread)
    blocks = [p for name, p in expected.items() if ".layers." in name and name.startswith("llm.")]
    assert held == [sum(p.numel() * p.element_size() for p in blocks) / 2] * 2
    for parameter, data in elsewhere:
        parameter.data = data
    own = dict(stage.built.model.named_parameters())
    assert own.keys() == expected.keys()
    for name, parameter in own.items():
        assert torch.equal(parameter, expected[name]), name
        assert (parameter.dtype, parameter.requires_grad) == (expected[name].dtype, expected[name].requires_grad)


def test_weights_in_several_files_are_found_by_their_index(config: ModelConfig, tmp_path: Path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(config.llm.path)
    folder = write_llm(tmp_path / "shards")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    settings = changed(config, llm={"path": str(folder)})
    whole = build_model(settings).model
    stage = build_stage(settings, (2,), 1)
    own = dict(stage.built.model.named_parameters())
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in own.items())
    sorted(folder.glob("*.safetensors"))[-1].unlink()
    with pytest.raises(CheckpointError, match=r"index\.json names \['model-.*which are not there"):
        build_stage(settings, (2,), 1)


def test_a_missing_tensor_is_an_error_on_the_stage_that_needs_it(config: ModelConfig):
    file = Path(config.llm.path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    build_stage(config, (2,), 0)
    with pytest.raises(CheckpointError, match=r"lack 1 tensors of LlamaForCausalLM, e\.g\. model\.layers\.1\.mlp\.up"):
        build_stage(config, (2,), 1)


def test_two_different_tensors_in_the_files_untie_the_head_as_transformers_does(config: ModelConfig, tmp_path: Path):
    llm = write_llm(tmp_path / "other", tie_word_embeddings=True)
    file = llm / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, file, {"format": "pt"})
    settings = changed(config, llm={"path": str(llm)}, trainable=["llm"])
    whole = trained_weights(build_model(settings).model)
    stage = build_stage(settings, (2,), 1)
    assert not stage.is_tied
    assert torch.equal(stage.trained_weights()["llm.lm_head.weight"], whole["llm.lm_head.weight"])
    assert stage.trained == whole.keys()


@pytest.mark.parametrize("trains", [ADAPTERS, EVERYTHING], ids=["adapters", "everything"])
def test_a_stage_takes_its_own_share_of_other_weights(config: ModelConfig, tmp_path: Path, trains: Any):
    llm = write_llm(tmp_path / "other", tie_word_embeddings=True)
    settings = changed(config, llm={"path": str(llm)}, **trains)
    whole = build_model(settings, seed=0).model
    other = {name: tensor + 1 for name, tensor in trained_weights(whole).items()}
    load_weights(whole, other, "other")
    shapes = {name: tuple(tensor.shape) for name, tensor in other.items()}
    for number in range(2):
        stage = build_stage(settings, (2,), number, seed=0)
        load_stage_weights(stage, LazyTensors(shapes, other.__getitem__), "other")
        for name, tensor in stage.built.model.named_parameters():
            reference = dict(whole.named_parameters(remove_duplicate=False))[name]
            assert torch.equal(tensor, reference), name
        with pytest.raises(CheckpointError, match=r"projector\.layers\.0\.bias: \[5\] -> \[32\]"):
            load_stage_weights(
                stage, LazyTensors(shapes | {"projector.layers.0.bias": (5,)}, other.__getitem__), "other"
            )


def test_cuts_that_leave_a_stage_empty_are_refused():
    check_cuts((1, 3), 4)
    for cuts in ((0,), (4,), (2, 2), (3, 1)):
        with pytest.raises(ConfigError, match="the model has 4 layers, 0 the inputs, 1 to 2 the blocks, 3 the output"):
            check_cuts(cuts, 4)
