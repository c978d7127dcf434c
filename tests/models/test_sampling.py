from __future__ import annotations

import pytest
import torch

from vlm.generation.sampling import Sampler, SamplingSettings, adjust, nucleus, report

LOGITS = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()


def frequencies(draws: int = 4000, **settings: float) -> list[float]:
    sampler = Sampler(SamplingSettings(seed=0, **{"temperature": 1.0, **settings}))
    counts = torch.zeros(4)
    for _ in range(draws):
        counts[sampler.choose(LOGITS, []).id] += 1
    return (counts / draws).tolist()


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4]),
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),  # squares, normalised
        ({"top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_p": 0.69}, [0, 0, 3 / 7, 4 / 7]),  # 0.4 alone is not enough, with 0.3 it is
        ({"top_p": 0.0001}, [0, 0, 0, 1]),
        ({"top_k": 3, "top_p": 0.5}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_p": 0.0}, [0, 0, 0, 1]),
        ({"min_p": 0.6}, [0, 0, 3 / 7, 4 / 7]),  # of 0.4: those of 0.24 and more
        ({"min_p": 1.0, "top_p": 0.9}, [0, 0, 0, 1]),
    ],
)
def test_draws_follow_the_distribution(settings: dict[str, float], expected: list[float]):
    assert frequencies(**settings) == pytest.approx(expected, abs=0.03)  # worst seen 0.015 of 4,000 draws


def test_temperature_0_takes_the_likeliest():
    assert Sampler(SamplingSettings(temperature=0, seed=3)).choose(LOGITS, []).id == 3


@pytest.mark.parametrize("temperature", [1e-320, 1e-39, 1e-6, 1e-5, 1e-3])
def test_a_tiny_temperature_takes_the_likeliest_too(temperature: float):
    logits = torch.tensor([1.0, 900.0, 899.0, -3.0])
    assert Sampler(SamplingSettings(temperature=temperature, seed=3)).choose(logits, []).id == 1
    huge = torch.tensor([1.0, 3e38, -3e38])
    assert Sampler(SamplingSettings(temperature=temperature, seed=3, top_p=0.9)).choose(huge, []).id == 1


def test_a_seed_gives_the_same_draws_and_none_gives_others():
    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingSettings(temperature=5.0, seed=seed))
        return [sampler.choose(LOGITS, []).id for _ in range(40)]

    assert draws(1) == draws(1) != draws(2)
    assert draws(None) != draws(None)


def test_rounding_noise_does_not_change_a_draw():
    def draws(noise: float) -> list[int]:
        sampler = Sampler(SamplingSettings(temperature=1.0, top_p=0.85, seed=1))
        return [sampler.choose(LOGITS + noise * torch.randn(4), []).id for _ in range(200)]

    assert draws(0) == draws(1e-6)


def test_a_nucleus_wider_than_the_first_try_is_found():
    logits = torch.zeros(5000)
    probabilities, ids = nucleus(logits, 0, 0.5)
    assert ids is not None
    assert len(probabilities) == pytest.approx(2500, abs=2)


def test_a_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.tensor([2.0, -1.0, 0.5, -3.0])
    ours = adjust(logits, [0, 1, 1], SamplingSettings(repetition_penalty=1.5))
    theirs = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[0, 1, 1]]), logits[None].clone())
    assert torch.equal(ours, theirs[0])
    assert logits.tolist() == [2.0, -1.0, 0.5, -3.0]


def test_reported_logprobs_come_before_any_setting():
    token = Sampler(SamplingSettings(logit_bias={0: 100.0}, num_logprobs=1)).choose(LOGITS, [])
    assert token.id == 0
    assert token.logprob == pytest.approx(float(torch.tensor(0.1).log()))
    assert token.likeliest == ((3, pytest.approx(float(torch.tensor(0.4).log()))),)
    assert report(LOGITS, 2, None).logprob is None


class OnlyInOrder:
    """Allows each of its tokens in turn."""

    def __init__(self, *tokens: int) -> None:
        self.left = list(tokens)

    def allowed(self) -> torch.Tensor:
        return torch.arange(4) == self.left[0]

    def accept(self, token: int) -> None:
        assert token == self.left.pop(0)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_constraint_is_kept_to_whatever_is_likely_and_log_probabilities_stay_the_models(temperature: float):
    settings = SamplingSettings(temperature=temperature, logit_bias={3: 50.0}, num_logprobs=1)
    sampler = Sampler(settings, OnlyInOrder(0, 2, 0))
    tokens = [sampler.choose(LOGITS, []) for _ in range(3)]
    assert [token.id for token in tokens] == [0, 2, 0]
    assert tokens[0].logprob == pytest.approx(float(LOGITS[0]))
    assert tokens[0].likeliest[0][0] == 3
