"""Every shipped YAML loads; the models of the recipes are built at full size on the meta device, so shapes are real."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlm.batch import Example
from vlm.cli.main import main
from vlm.config import load_config, shipped_projects
from vlm.config_checks import load_checked
from vlm.objectives.rewards import Written
from vlm.plan import shapes
from vlm.plan.kept_shapes import kept_line, with_kept_shapes

REPOSITORY = Path(__file__).parents[1]
DEMOS = ("quickstart/", "tiny/")  # their models are made by scripts/
SINGLE = ("minigpt4qwen/", "internlm3_8b_text/", "internlm2_1_8b_qlora/")  # of one stage
TEXT = ("internlm3_8b_text/", "internlm2_1_8b_qlora/", "llm_genie/", "yuren/text_sft")  # without images
FIRST = ("/pretrain", "/pt", "/text_sft")  # stages
RECIPES = [name for name in shipped_projects() if not name.startswith((*DEMOS, *SINGLE))]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(autouse=True, scope="module")
def each_network_is_drawn_once() -> Iterator[None]:
    """Plans change no network, and many recipes have the same: an encoder takes seconds on the meta device."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("build_vision", "llm_from_config"):
            patch.setattr(f"vlm.plan.shapes.{name}", once_each(getattr(shapes, name)))
        yield


def once_each(build: Callable[..., Any]) -> Callable[..., Any]:
    kept: dict[str, Any] = {}

    def kept_or_built(config: Any, *rest: Any, **options: Any) -> Any:
        key = f"{config.model_dump_json()} {rest} {options}"
        if key not in kept:
            kept[key] = build(config, *rest, **options)
        return kept[key]

    return kept_or_built


@pytest.mark.parametrize("name", shipped_projects())
def test_shipped_config_is_valid(name):
    config = load_config(name)
    assert config.output_dir == f"cache/runs/{name}"


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.endswith(FIRST)])
def test_second_stage_starts_from_the_first_ones_export_with_the_same_model(name):
    second = load_config(name)
    first = load_config(second.init_from.removeprefix("cache/runs/").removesuffix("/export"))
    assert second.init_from == f"{first.output_dir}/export"
    packed = {"quantization": second.model.llm.quantization}  # a later stage may pack the same language model
    assert (second.model.vision, second.model.projector, second.model.llm) == (
        first.model.vision,
        first.model.projector,
        first.model.llm.model_copy(update=packed),
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
    "siglip2_qwen3_0_6b": (81, 596),
    "eva_clip_linear_qwen3_0_6b": (576, 596),
    "dinov2_siglip_qwen3": (81, 8191),
    "yuren": (256, 7002),
    "xtuner_llava": (576, 1889),
}
# recipe -> parameters and trained ones, in millions; GiB of a card that it fits
PLANS = {
    "siglip2_qwen3_0_6b/finetune": (1021, 608, 24),
    "eva_clip_linear_qwen3_0_6b/pretrain": (888, 1, 8),
    "dinov2_siglip_qwen3/finetune_lora": (9342, 446, 40),
    "yuren/pretrain": (7296, 4, 24),
    "internlm3_8b_text/lora_alpaca_2k_e3": (9013, 209, 24),
    "internlm2_1_8b_qlora/alpaca_2k_e3": (1958, 69, 8),
    "xtuner_llava/finetune": (2740, 587, 24),
    "llava_qwen2_5_7b/dpo_qlora_rlhf_v_2k_e3": (8246, 323, 24),
    "llava_qwen2_5_7b/dpo_lora_rlhf_v_2k_e3": (8246, 323, 80),
    "llava_qwen2_5_7b/grpo_qlora_geoqa_8k": (8246, 323, 24),
    "llava_qwen2_5_7b/grpo_lora_geoqa_8k": (8246, 323, 80),
    "llm_genie/pt": (494, 494, 16),
    "llm_genie/sft": (498, 4, 8),
}


def test_every_recipe_is_built_in_this_file():
    planned = {name.partition("/")[0] for name in PLANS if not name.startswith(SINGLE)}
    assert {name.partition("/")[0] for name in RECIPES} == {*SHAPES, "deepspeed"} | planned


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_projects())
def test_the_models_of_every_recipe_have_kept_shapes_so_that_plan_needs_no_network(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no model lies
    planned = load_checked(name, (), ("model",), (), with_kept_shapes)  # as `vlm plan` does
    encoders = planned.model.vision.encoders if planned.model.vision else ()
    folders = [planned.model.llm.path, *(each.path for each in encoders if each.backend == "hf")]
    assert [folder for folder in folders if not Path(folder, "config.json").is_file()] == []
    assert load_config(name).model.llm.path in kept_line(planned)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_preferences_of_7b_train_the_adapter_that_finetuning_made(method):
    """So model.lora is that of stage 2, and rate, batch and beta are those of LLaMA-Factory's qwen2_5vl_lora_dpo."""
    config, before = (
        load_config(f"llava_qwen2_5_7b/{stage}") for stage in (f"dpo_{method}_rlhf_v_2k_e3", "finetune_lora")
    )
    assert (config.model.lora, config.model.trainable) == (before.model.lora, ("llm.lora",))
    train = config.train
    assert (train.learning_rate, train.global_batch_size, train.epochs, train.warmup_ratio) == (5e-6, 8, 3, 0.1)
    assert (config.objective.kind, config.objective.beta, config.data.max_length) == ("dpo", 0.1, 2048)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_judged_answers_of_7b_train_the_adapter_that_finetuning_made(method):
    config, before = (
        load_config(f"llava_qwen2_5_7b/{stage}") for stage in (f"grpo_{method}_geoqa_8k", "finetune_lora")
    )
    assert (config.model.lora.rank, config.model.lora.alpha) == (before.model.lora.rank, before.model.lora.alpha)
    number, form = (reward.build() for reward in config.objective.rewards)
    reply = "<think>A triangle has 180 degrees.</think> <answer>35</answer>"
    for text, right, kept in ((reply, 1, 1), (reply.replace("35", "36"), 0, 1), ("35", 1, 0)):
        written = [Written("", text, "<answer> 35° </answer>", 9, True, Example([], []))]
        assert (number(written), form(written)) == ([right], [kept])


@pytest.mark.one_in(20)
@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_projects())
def test_every_recipe_is_planned_in_an_empty_folder_without_a_network(name, tmp_path, monkeypatch, capsys):
    """As in a fresh clone on a machine that has downloaded nothing."""

    def refuse(self, address):
        raise OSError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    stages = getattr(load_config(name).engine, "num_stages", 1)
    with pytest.raises(SystemExit) as end:
        main(["plan", name, "--memory", "24GiB", "--gpus", str(stages)])
    out, err = capsys.readouterr()
    assert not end.value.code, err
    assert "shape as kept in projects/shapes" in out


@pytest.mark.one_in(3)
@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_the_plan_of_a_recipe_has_its_numbers_and_fits_its_card(name):
    from vlm.plan.estimate import estimate
    from vlm.plan.memory import parse_memory, usable

    plan = estimate(load_checked(name, (), ("model",), (), with_kept_shapes))
    parameters, trained, card = PLANS[name]
    assert (round(plan.num_parameters / 1e6), round(plan.num_trained / 1e6)) == (parameters, trained)
    assert plan.peak < usable(parse_memory(f"{card}GiB"))


def test_a_model_that_is_here_is_planned_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Qwen/Qwen3-0.6B" in kept_line(with_kept_shapes(load_config("siglip2_qwen3_0_6b/pretrain")))
    Path("Qwen/Qwen3-0.6B").mkdir(parents=True)
    planned = with_kept_shapes(load_config("siglip2_qwen3_0_6b/pretrain"))
    assert planned.model.llm.path == "Qwen/Qwen3-0.6B"
    assert kept_line(planned).endswith(": google/siglip2-so400m-patch14-384")


def test_yuren_mixes_the_text_of_its_first_stage_into_the_last():
    """And the last two read the language model of the first, whose full export is in transformers' layout."""
    text, *others = (load_config(f"yuren/{stage}") for stage in ("text_sft", "pretrain", "finetune"))
    assert {config.model.llm.path for config in others} == {f"{text.output_dir}/export-full"}
    assert text.data.sources[0] in others[1].data.sources
    assert [config.model.trainable for config in (text, *others)] == [("llm",), ("projector",), ("projector", "llm")]


def test_one_linear_layer_is_the_projector_of_a_clip_and_of_an_eva_recipe():
    kinds = {
        name: load_config(name).model.projector.kind
        for name in ("yuren/pretrain", "eva_clip_linear_qwen3_0_6b/pretrain")
    }
    assert set(kinds.values()) == {"linear"}


@pytest.mark.parametrize("name", [name for name in shipped_projects() if name.startswith(TEXT)])
def test_text_recipes_have_no_encoder(name):
    assert load_config(name).model.vision is None


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

    config = with_kept_shapes(load_config(f"llava_qwen2_14b_pp2/{stage}"))
    plan = estimate(config, 2, has_flash_attention=False)
    assert (plan.kind, plan.cuts) == ("pipeline", (25,))
    assert plan.peak < usable(parse_memory("24GiB"))
    one = config.model_copy(update={"engine": Local()})
    assert estimate(one, 1, has_flash_attention=False).peak > parse_memory("24GiB")


@pytest.mark.one_in(4)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cards"), [("finetune", 1), ("finetune_14b", 2), ("finetune_qwen1_7b", 1), ("finetune_qwen1_14b", 2)]
)
def test_minigpt4qwen_trains_one_linear_layer_and_fits_as_its_authors_say(name, cards):
    """7B on one card of 24 GB, 14B on two; EVA-CLIP-g has 986 million parameters and the Q-Former 105."""
    from vlm.plan.estimate import estimate
    from vlm.plan.memory import parse_memory, usable

    plan = estimate(load_checked(f"minigpt4qwen/{name}", (), ("model",), (), with_kept_shapes), cards)
    assert plan.peak < usable(parse_memory("24GiB"))
    width = plan.shape.llm.width
    assert plan.num_trained == 768 * width + width
    assert (plan.shape.tokens_per_image, plan.shape.vision.num_tokens) == (32, 257)
    millions = (plan.shape.vision.numel, plan.shape.projector.numel - plan.num_trained)
    assert [round(each / 1e6) for each in millions] == [986, 105]


@pytest.mark.one_in(6)
@pytest.mark.slow
@pytest.mark.parametrize("project", sorted(SHAPES))
def test_recipe_has_the_shapes_of_its_models(project):
    from meta_models import build_on_meta

    config = with_kept_shapes(load_config(f"{project}/pretrain"))
    model = build_on_meta(config.model)
    num_tokens, millions = SHAPES[project]
    assert model.projector.num_tokens == num_tokens
    assert round(sum(p.numel() for p in model.llm.parameters()) / 1e6) == millions
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"projector"}


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("project", [name for name in sorted(SHAPES) if f"{name}/finetune_lora" in RECIPES])
def test_adapters_of_a_recipe_sit_on_every_linear_of_the_language_model(project):
    from meta_models import build_on_meta

    config = with_kept_shapes(load_config(f"{project}/finetune_lora"))
    model = build_on_meta(config.model)
    names = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_A." in name]
    assert len(names) == 7 * model.llm.config.num_hidden_layers  # q, k, v, o, gate, up, down
