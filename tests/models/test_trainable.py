"""What trains: one list of parts, canonical names, adapters that peft can read, and messages for what does not fit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import changed, scramble, write_timm
from toy_decoders import toy_decoder

from vlm.errors import CheckpointError, ConfigError
from vlm.models.build import build_model
from vlm.models.config import LoRAConfig, ModelConfig
from vlm.models.decoders import find_linears
from vlm.models.trainable import (
    add_lora,
    canonical_name,
    load_weights,
    merge_lora,
    part_of,
    part_weights,
    set_trainable,
    trained_weights,
)
from vlm.models.vlm import VisionLanguageModel

LORA = {"rank": 2, "alpha": 4}
LINEARS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def model_of(config: ModelConfig, trainable: list[str], precision: str = "fp32", **changes: object):
    return build_model(changed(config, trainable=trainable, lora=LORA, **changes), precision=precision).model


def give_adapters_weight(model: VisionLanguageModel) -> None:
    """An adapter starts as 0; move it away from that."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if part_of(name) == "llm.lora":
            torch.nn.init.normal_(parameter, std=0.1)


def logits(model: VisionLanguageModel) -> torch.Tensor:
    ids = torch.tensor([[2, 3, 4, 5, 6, 7]])
    return model.logits(model.eval()(ids, torch.arange(6)[None])).detach()


# parts


@pytest.mark.parametrize("parts", [["projector"], ["projector", "llm.lora"], ["llm"], ["vision", "projector"]])
def test_only_the_named_parts_train(config: ModelConfig, parts: list[str]):
    model = model_of(config, parts)
    trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(parts)


def test_parts_are_told_from_names():
    assert part_of("projector.layers.0.weight") == "projector"
    assert part_of("llm.model.layers.0.self_attn.q_proj.base_layer.weight") == "llm"
    assert part_of("llm.model.layers.0.self_attn.q_proj.lora_B.default.weight") == "llm.lora"
    assert part_of("llm.lora.model.layers.0.self_attn.q_proj.lora_B.weight") == "llm.lora"
    assert part_of("vision.trunk.model.pre_layrnorm.bias") == "vision"


def test_names_are_those_of_a_model_without_adapters(config: ModelConfig):
    assert canonical_name("llm.model.layers.0.q_proj.base_layer.weight") == "llm.model.layers.0.q_proj.weight"
    plain, adapted = model_of(config, ["projector"]), model_of(config, ["projector", "llm.lora"])
    assert part_weights(plain, "llm").keys() == part_weights(adapted, "llm").keys()
    assert "llm.model.rotary_emb.inv_freq" not in part_weights(plain, "llm")  # a table, not a weight


def test_an_encoder_that_trains_is_float32_and_leaves_unused_weights_alone(config: ModelConfig):
    model = model_of(config, ["projector", "vision"], precision="bf16")
    assert {parameter.dtype for parameter in model.vision.parameters()} == {torch.float32}
    frozen = [name for name, parameter in model.vision.named_parameters() if not parameter.requires_grad]
    assert frozen == ["trunk.model.post_layernorm.weight", "trunk.model.post_layernorm.bias"]


def test_freezing_takes_an_encoder_out_of_train_mode(config: ModelConfig):
    model = model_of(config, ["vision"]).train()
    assert model.vision.training
    set_trainable(model, ["projector"])
    assert not any(module.training for module in model.vision.modules())


# adapters


def test_all_linear_is_every_linear_layer_of_the_decoder_blocks_and_nothing_else(config: ModelConfig):
    model = model_of(config, ["llm.lora"])
    names = [name for name in trained_weights(model) if name.endswith("lora_A.weight")]
    assert sorted({name.split(".")[-3] for name in names}) == LINEARS
    assert len(names) == 2 * len(LINEARS)
    assert all(name.startswith("llm.lora.model.layers.") for name in names)


def test_named_targets_alone_get_adapters_and_an_unknown_one_is_refused(config: ModelConfig):
    model = build_model(config).model
    with pytest.raises(ConfigError, match=rf"no linear layer is named 'query'; there are .*{LINEARS[0]}"):
        add_lora(model, LoRAConfig(targets=("q_proj", "query")))
    with pytest.raises(ConfigError, match=r"no linear layer is named .lm_head."):
        add_lora(model, LoRAConfig(targets=("lm_head",)))
    add_lora(model, LoRAConfig(targets=("q_proj",)))
    assert {name.split(".")[-3] for name in part_weights(model, "llm.lora")} == {"q_proj"}


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_next", "qwen3_moe", "mixtral"])
def test_adapters_stand_beside_the_linear_layers_that_are_named_and_not_beside_experts(model_type: str):
    """peft takes `gate_proj` of a shared expert or a dense block for that of experts, and adapts their tensors then."""
    model = VisionLanguageModel(toy_decoder(model_type))
    expected = {f"llm.lora.{name}.lora_A.weight" for name in find_linears(model.llm)}
    add_lora(model, LoRAConfig(rank=2))
    assert {name for name in part_weights(model, "llm.lora") if "lora_A" in name} == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
def test_a_fresh_adapter_is_float32_and_changes_nothing(config: ModelConfig, precision: str):
    with_adapter, without = model_of(config, ["llm.lora"], precision), model_of(config, ["projector"], precision)
    assert {tensor.dtype for tensor in part_weights(with_adapter, "llm.lora").values()} == {torch.float32}
    assert torch.equal(logits(with_adapter), logits(without))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.2)])
def test_merging_leaves_the_logits_as_they_were(config: ModelConfig, precision: str, tolerance: float):
    model = model_of(config, ["llm.lora"], precision)
    before_training = logits(model)
    give_adapters_weight(model)
    before = logits(model)
    merge_lora(model)
    assert not part_weights(model, "llm.lora")
    assert (before - before_training).abs().max() > 1
    assert (logits(model) - before).abs().max() < tolerance  # worst seen: 2.4e-6 and 0.07, of logits up to 4.2
    assert part_weights(model, "llm").keys() == part_weights(build_model(config).model, "llm").keys()


def test_peft_itself_loads_the_adapter_on_the_base_model(config: ModelConfig, tmp_path: Path):
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM

    model = model_of(config, ["llm.lora"])
    give_adapters_weight(model)
    tensors = {
        "base_model.model." + name.removeprefix("llm.lora."): tensor.detach().contiguous()
        for name, tensor in trained_weights(model).items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    LoraConfig(r=2, lora_alpha=4, target_modules=LINEARS, task_type="CAUSAL_LM").save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.llm.path), tmp_path).eval()
    expected = loaded(input_ids=torch.tensor([[2, 3, 4, 5, 6, 7]]), use_cache=False).logits
    assert (logits(model) - expected).abs().max() < 1e-5  # worst seen: 0.0


# weights out and in


def test_trained_weights_go_into_another_model_and_make_it_equal(config: ModelConfig):
    parts = ["projector", "llm.lora"]
    first, second = (model_of(config, parts, projector={"normalize": True}) for _ in range(2))
    scramble(first.projector)
    give_adapters_weight(first)
    first.projector.calibrate(torch.randn(2, 16, 24))
    weights = {name: tensor.detach().clone() for name, tensor in trained_weights(first).items()}
    assert "projector.feature_mean" in weights  # statistics travel with the part that they belong to
    assert not any(name.startswith(("vision.", "llm.model.")) for name in weights)
    load_weights(second, weights, where="a test")
    assert torch.equal(logits(first), logits(second))
    images = torch.randn(1, 3, 28, 28)
    assert torch.equal(first.encode_images(images), second.encode_images(images))


@pytest.mark.slow
def test_a_trained_cnn_keeps_its_batch_statistics(config: ModelConfig, tmp_path: Path):
    import timm

    folder = write_timm(tmp_path / "lite0", "tf_efficientnet_lite0", timm.create_model("tf_efficientnet_lite0"))
    vision = {"backend": "timm", "path": str(folder), "image_size": 32}
    assert "vision.trunk.model.bn1.running_mean" in trained_weights(model_of(config, ["vision"], vision=vision))
    frozen = trained_weights(model_of(config, ["projector"], vision=vision))
    assert not any(name.startswith("vision.") for name in frozen)


def test_what_does_not_fit_is_listed_name_by_name(config: ModelConfig):
    model = model_of(config, ["projector", "llm.lora"])
    weights = dict(trained_weights(model))
    weights["projector.layers.0.weight"] = torch.zeros(32, 48)
    weights["projector.layers.2.bias"] = torch.zeros(32)
    missing = next(name for name in weights if "lora_A" in name)
    del weights[missing]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, weights, where="run/weights.safetensors")
    message = str(caught.value)
    assert message.startswith("run/weights.safetensors does not fit this model (file -> model):")
    assert "projector.layers.0.weight: [32, 48] -> [32, 24]" in message
    assert "projector.layers.2.bias: not in the model" in message
    assert f"{missing}: missing" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())  # nothing half loaded


def test_an_adapter_of_another_rank_is_refused(config: ModelConfig):
    weights = trained_weights(model_of(config, ["llm.lora"]))
    other = build_model(changed(config, trainable=["llm.lora"], lora={"rank": 8})).model
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_A\.weight: \[2, 32\] -> \[8, 32\]"):
        load_weights(other, weights, where="adapter")


def test_a_part_may_be_loaded_alone_on_request(config: ModelConfig):
    model = model_of(config, ["projector", "llm.lora"])
    projector = {name: tensor + 1 for name, tensor in part_weights(model, "projector").items()}
    with pytest.raises(CheckpointError, match="missing"):
        load_weights(model, projector, where="stage 1")
    expected = {name: tensor.clone() for name, tensor in projector.items()}
    load_weights(model, projector, where="stage 1", partial=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in part_weights(model, "projector").items())
