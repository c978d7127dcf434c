"""Every shipped YAML loads; the models of the recipes are built at full size on the meta device, so shapes are real."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm.config import RunConfig, load_config, shipped_projects
from vlm.config_checks import load_checked

REPOSITORY = Path(__file__).parents[1]
CONFIGS = Path(__file__).parent / "fixtures/configs"  # config.json of models on the hub, no weights
DEMOS = ("quickstart/", "tiny/")  # their models are made by scripts/
SINGLE = ("minigpt4qwen/",)  # of one stage
RECIPES = [name for name in shipped_projects() if not name.startswith((*DEMOS, *SINGLE))]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("name", shipped_projects())
def test_shipped_config_is_valid(name):
    config = load_config(name)
    assert config.output_dir == f"cache/runs/{name}"


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.endswith("/pretrain")])
def test_second_stage_starts_from_the_first_ones_export_with_the_same_model(name):
    second = load_config(name)
    first = load_config(second.init_from.removeprefix("cache/runs/").removesuffix("/export"))
    assert second.init_from == f"{first.output_dir}/export"
    assert (second.model.vision, second.model.projector, second.model.llm) == (
        first.model.vision,
        first.model.projector,
        first.model.llm,
    )


def test_recipes_keep_the_published_rates_of_llava_1_5():
    """arXiv:2310.03744, table of hyper-parameters, and its LoRA script for the last."""
    stages = {stage: load_config(f"llava_qwen2_5_7b/{stage}") for stage in ("pretrain", "finetune", "finetune_lora")}
    rates = {stage: (c.train.learning_rate, c.train.global_batch_size) for stage, c in stages.items()}
    assert rates == {"pretrain": (1e-3, 256), "finetune": (2e-5, 128), "finetune_lora": (2e-4, 128)}
    assert all(c.train.epochs == 1 and c.train.warmup_ratio == 0.03 for c in stages.values())
    assert all(not c.data.packing for c in stages.values())  # so that a row is a record, as the batch sizes mean
    assert stages["finetune_lora"].train.learning_rates == {"projector": 2e-5}
    assert (stages["finetune_lora"].model.lora.rank, stages["finetune_lora"].model.lora.alpha) == (128, 256)


# project -> tokens per image, language model's parameters in millions; both from the models' own papers and cards
SHAPES = {
    "llava_qwen2_5_7b": (576, 7616),
    "llava_internlm3_8b": (576, 8804),
    "siglip_qwen3": (81, 8191),
    "eva_clip_qwen2_5": (576, 7616),
    "eva02_qwen2_5": (256, 7616),
    "llava_qwen2_14b_pp2": (576, 14770),
}


def test_every_recipe_is_built_in_this_file():
    assert {name.partition("/")[0] for name in RECIPES} == {*SHAPES, "deepspeed"}


ZERO = {"zero0": (0, ()), "zero1": (1, ()), "zero2": (2, ()), "zero3": (3, ()),
        "zero3_offload": (3, ("optimizer", "parameters"))}  # fmt: skip


@pytest.mark.parametrize("name", ZERO)
def test_the_zero_variants_are_one_run_with_another_engine(name):
    config, run = load_config(f"deepspeed/{name}"), load_config("llava_qwen2_5_7b/finetune")
    assert (config.engine.kind, config.engine.stage, config.engine.offload) == ("zero", *ZERO[name])
    other = {"name": run.name, "output_dir": run.output_dir, "engine": run.engine}
    assert config.model_copy(update=other) == run


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune_lora"])
def test_the_14b_recipe_fits_two_24_gb_cards_and_not_one(stage):
    from vlm.plan.estimate import estimate
    from vlm.plan.memory import parse_memory, usable
    from vlm.train.engines.kinds import Local

    config = with_local_configs(load_config(f"llava_qwen2_14b_pp2/{stage}"))
    plan = estimate(config, 2, has_flash_attention=False)
    assert (plan.kind, plan.cuts) == ("pipeline", (25,))
    assert plan.peak < usable(parse_memory("24GiB"))
    one = config.model_copy(update={"engine": Local()})
    assert estimate(one, 1, has_flash_attention=False).peak > parse_memory("24GiB")


@pytest.mark.slow
@pytest.mark.parametrize(("llm", "memory", "cards"), [("7B", "24GiB", 1), ("14B", "24GiB", 2)])
def test_minigpt4qwen_trains_one_linear_layer_and_fits_as_its_authors_say(llm, memory, cards):
    """7B on one card of 24 GB, 14B on two; EVA-CLIP-g has 986 million parameters and the Q-Former 105."""
    from vlm.plan.estimate import estimate
    from vlm.plan.memory import parse_memory, usable

    options = [f"model.llm.path={CONFIGS}/Qwen2.5-{llm}-Instruct", *(["engine.kind=pipeline"] * (cards > 1))]
    plan = estimate(load_checked("minigpt4qwen/finetune", options, ("model",), ()), cards)  # as `vlm plan` does
    assert plan.peak < usable(parse_memory(memory))
    width = plan.shape.llm.width
    assert plan.num_trained == 768 * width + width
    assert (plan.shape.tokens_per_image, plan.shape.vision.num_tokens) == (32, 257)
    millions = (plan.shape.vision.numel, plan.shape.projector.numel - plan.num_trained)
    assert [round(each / 1e6) for each in millions] == [986, 105]


@pytest.mark.slow
@pytest.mark.parametrize("project", sorted(SHAPES))
def test_recipe_has_the_shapes_of_its_models(project):
    from meta_models import build_on_meta

    config = with_local_configs(load_config(f"{project}/pretrain"))
    model = build_on_meta(config.model)
    num_tokens, millions = SHAPES[project]
    assert model.projector.num_tokens == num_tokens
    assert round(sum(p.numel() for p in model.llm.parameters()) / 1e6) == millions
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"projector"}


@pytest.mark.slow
@pytest.mark.parametrize("project", sorted(SHAPES))
def test_adapters_of_a_recipe_sit_on_every_linear_of_the_language_model(project):
    from meta_models import build_on_meta

    config = with_local_configs(load_config(f"{project}/finetune_lora"))
    model = build_on_meta(config.model)
    names = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_A." in name]
    assert len(names) == 7 * model.llm.config.num_hidden_layers  # q, k, v, o, gate, up, down


def with_local_configs(config: RunConfig) -> RunConfig:
    """Hub names -> folders of the same last name that hold config.json."""
    model = config.model
    llm = model.llm.model_copy(update={"path": str(CONFIGS / Path(model.llm.path).name)})
    vision = model.vision
    if vision.backend == "hf":
        vision = vision.model_copy(update={"path": str(CONFIGS / Path(vision.path).name)})
    return config.model_copy(update={"model": model.model_copy(update={"llm": llm, "vision": vision})})
