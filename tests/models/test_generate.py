"""Replies: equal to choosing tokens by hand, stopped when asked, and without a trace in a training run."""

from __future__ import annotations

import pytest
import torch
from tiny_models import changed

from vlm.errors import ConfigError
from vlm.generation.generate import GenerationSettings, generate
from vlm.models.build import build_model
from vlm.models.config import ModelConfig
from vlm.models.vlm import VisionLanguageModel

PROMPT = [2, *[28] * 16, 3, 4]  # an image of 16 tokens between words
IMAGE = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def model(config: ModelConfig) -> VisionLanguageModel:
    return build_model(changed(config, trainable=["projector", "llm.lora"], lora={"dropout": 0.5})).model


def likeliest(model: VisionLanguageModel, count: int) -> list[int]:
    """Greedy choice without a cache, through the training forward."""
    model.eval()
    ids = list(PROMPT)
    for _ in range(count):
        hidden_states = model(torch.tensor([ids]), torch.arange(len(ids))[None], IMAGE)
        ids.append(int(model.logits(hidden_states[0, -1]).argmax()))
    return ids[len(PROMPT) :]


def test_greedy_is_the_likeliest_token_each_time(model: VisionLanguageModel):
    expected = likeliest(model, 8)
    assert len(set(expected)) > 1
    assert generate(model, PROMPT, IMAGE, [], GenerationSettings(max_new_tokens=8)) == expected


def test_a_model_folders_own_generation_settings_do_not_leak_in(config: ModelConfig, model: VisionLanguageModel):
    expected = likeliest(model, 8)
    model.llm.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, top_k=3, eos_token_id=5)
    assert generate(model, PROMPT, IMAGE, [], GenerationSettings(max_new_tokens=8)) == expected


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 1},
        {"min_length": 60},
        {"min_new_tokens": 7},
        {"suppress_tokens": [*range(20)]},
        {"begin_suppress_tokens": [*range(20)]},
        {"bad_words_ids": [[token] for token in range(20)]},
        {"sequence_bias": [[[5], 100.0]]},
        {"forced_bos_token_id": 5},
        {"forced_eos_token_id": 5},
        {"exponential_decay_length_penalty": [1, 8.0]},
        {"encoder_repetition_penalty": 1.5},
        {"guidance_scale": 1.5},
        {"stop_strings": ["a"]},
        {"max_time": 0.0},
        {"watermarking_config": {"greenlist_ratio": 0.5, "bias": 50.0}},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 2, "num_beams": 2},
        {"cache_implementation": "static"},
        {"return_dict_in_generate": True, "output_scores": True},
        {"custom_entry": 3},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_nothing_that_a_base_model_asks_for_changes_a_reply_or_stops_it(model: VisionLanguageModel, settings: dict):
    """`vlm chat` and `train.samples` write what `vlm serve` writes, which never reads generation_config.json."""
    from transformers import GenerationConfig

    own = model.llm.generation_config = GenerationConfig.from_dict({"eos_token_id": 5, **settings})
    expected = likeliest(model, 6)
    assert generate(model, PROMPT, IMAGE, [], GenerationSettings(max_new_tokens=6)) == expected
    assert model.llm.generation_config is own


def test_a_class_that_cannot_generate_by_itself_answers_all_the_same(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
):
    """A folder's own code under transformers 5, whose models generate only if they say so."""
    expected = likeliest(model, 6)
    monkeypatch.setattr(type(model.llm), "prepare_inputs_for_generation", None)
    monkeypatch.setattr(model.llm, "generation_config", None)
    assert generate(model, PROMPT, IMAGE, [], GenerationSettings(max_new_tokens=6)) == expected


def test_a_stop_token_ends_the_reply_and_is_not_part_of_it(model: VisionLanguageModel):
    free = likeliest(model, 8)
    stop = free[3]
    seen = []
    reply = generate(
        model, PROMPT, IMAGE, [stop], GenerationSettings(max_new_tokens=8), on_token=lambda t: seen.append(t) or True
    )
    assert reply == free[: free.index(stop)] == seen


def test_every_token_is_seen_at_once_and_can_be_the_last(model: VisionLanguageModel):
    free = likeliest(model, 8)
    seen: list[int] = []

    def on_token(token: int) -> bool:
        seen.append(token)
        return len(seen) < 3

    assert generate(model, PROMPT, IMAGE, [], GenerationSettings(max_new_tokens=8), on_token) == free[:3] == seen


def test_beams_hand_over_their_tokens_at_the_end(model: VisionLanguageModel):
    seen: list[int] = []
    settings = GenerationSettings(max_new_tokens=5, num_beams=3)
    reply = generate(model, PROMPT, IMAGE, [0], settings, on_token=lambda t: seen.append(t) or True)
    assert reply == seen
    assert 0 < len(reply) <= 5


def test_max_length_counts_the_prompt_too(model: VisionLanguageModel):
    expected = likeliest(model, 8)
    room = len(PROMPT) + 3
    assert generate(model, PROMPT, IMAGE, [], GenerationSettings(8, max_length=room)) == expected[:3]
    assert generate(model, PROMPT, IMAGE, [], GenerationSettings(2, max_length=room)) == expected[:2]
    with pytest.raises(ConfigError, match="max_length 19: the prompt alone has 19 tokens"):
        generate(model, PROMPT, IMAGE, [], GenerationSettings(8, max_length=len(PROMPT)))


def test_a_length_penalty_chooses_between_short_and_long_beams(model: VisionLanguageModel):
    """Each of 17 tokens may end the reply, so among beams there are short ones."""
    stops = range(3, 20)
    lengths = [
        len(generate(model, PROMPT, IMAGE, stops, GenerationSettings(12, num_beams=4, length_penalty=penalty)))
        for penalty in (-5.0, 5.0)
    ]
    assert lengths[0] < lengths[1]


@pytest.mark.parametrize("temperature", [1e-320, 1e-39, 1e-5])
def test_a_tiny_temperature_takes_the_likeliest_too(model: VisionLanguageModel, temperature: float):
    settings = GenerationSettings(max_new_tokens=8, do_sample=True, temperature=temperature)
    assert generate(model, PROMPT, IMAGE, [], settings) == likeliest(model, 8)


@pytest.mark.slow
def test_a_seed_decides_what_is_sampled(model: VisionLanguageModel):
    def sample(seed: int | None) -> list[int]:
        settings = GenerationSettings(max_new_tokens=16, do_sample=True, temperature=3.0, seed=seed)
        return generate(model, PROMPT, IMAGE, [], settings)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    torch.manual_seed(0)
    first = sample(None)
    torch.manual_seed(0)
    assert sample(None) != first  # without a seed every reply is another


def test_sampling_considers_no_more_than_it_is_told(model: VisionLanguageModel):
    settings = GenerationSettings(max_new_tokens=8, do_sample=True, temperature=9.0, top_k=1)
    assert generate(model, PROMPT, IMAGE, [], settings) == likeliest(model, 8)


def test_a_training_run_does_not_notice(model: VisionLanguageModel):
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(11)
    expected = torch.rand(3)
    for seed in (None, 5):
        torch.manual_seed(11)
        generate(model, PROMPT, IMAGE, [], GenerationSettings(max_new_tokens=4, do_sample=True, seed=seed))
        assert torch.equal(torch.rand(3), expected)
        assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_comes_back_after_an_error(model: VisionLanguageModel):
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    assert modes["projector"]

    def fail(_token: int) -> bool:
        raise RuntimeError("the listener left")

    with pytest.raises(RuntimeError, match="the listener left"):
        generate(model, PROMPT, IMAGE, [], GenerationSettings(max_new_tokens=4), fail)
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize("precision", ["bf16", "bf16_autocast"])
@pytest.mark.parametrize("autocast", [True, False])
def test_replies_come_in_every_precision(config: ModelConfig, precision: str, autocast: bool):
    settings = changed(config, trainable=["projector", "llm.lora"], lora={})
    model = build_model(settings, precision=precision).model
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        reply = generate(model, PROMPT, IMAGE, [], GenerationSettings(max_new_tokens=4))
    assert len(reply) == 4


def test_text_alone_needs_no_image(model: VisionLanguageModel):
    reply = generate(model, [2, 3, 4], None, [], GenerationSettings(max_new_tokens=4))
    expected = model.llm.generate(
        torch.tensor([[2, 3, 4]]), max_new_tokens=4, do_sample=False, attention_mask=torch.ones(1, 3), eos_token_id=-1
    )
    assert reply == expected[0, 3:].tolist()
