"""Replies, token by token."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlm.errors import ConfigError
from vlm.generation.sampling import LEAST_TEMPERATURE, Sampler, SamplingSettings
from vlm.models.families import family_of
from vlm.models.row_decoders import build_row_decoder
from vlm.models.vlm import VisionLanguageModel

OnToken = Callable[[int], bool]  # called with each new token; False ends the reply


@dataclass(frozen=True)
class GenerationSettings:
    """How a reply is chosen. The default is greedy: the likeliest token each time; so is a temperature of almost 0."""

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 considers all tokens
    repetition_penalty: float = 1.0
    num_beams: int = 1
    seed: int | None = None  # of sampling; None draws a fresh one
    length_penalty: float = 1.0  # of beams: scores are divided by length to this power; below 1 prefers short replies
    max_length: int | None = None  # tokens of prompt and reply together, beside max_new_tokens; the lower bound counts


@torch.no_grad()
def generate(
    model: VisionLanguageModel,
    input_ids: list[int],
    pixel_values: Tensor | None,
    stop_ids: Collection[int],
    settings: GenerationSettings,
    on_token: OnToken | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[int]:
    """Continue a prompt.

    The model's mode and torch's random state are afterwards what they were before.

    Args:
        input_ids: the prompt, placeholders included.
        pixel_values: [N, 3, S, S] of its images; None without images.
        stop_ids: tokens that end the reply; with none, only `max_new_tokens` does.
        on_token: sees each new token at once; with beams, which settle only at the end, all of them then.
        should_stop: asked before every further token, with beams too.

    Returns:
        the new tokens, without the stop token.

    Raises:
        ConfigError: the prompt is as long as `max_length`; beams, where the class is decoded without.
    """
    from transformers import StoppingCriteriaList

    settings = _within_length(settings, len(input_ids))

    # that the penalty counts for the reply's words only is said in docs/chat.md, not in the middle of an answer
    warnings.filterwarnings("ignore", message="Passing `repetition_penalty`")
    ids = torch.tensor([input_ids], device=model.llm.device)
    has_beams = settings.num_beams > 1
    follower = _Follower(set(stop_ids), None if has_beams else on_token, should_stop)
    config = _generation_config(model, stop_ids, settings)
    with _undisturbed(model, settings.seed):
        features = None if pixel_values is None else model.encode_images(pixel_values.to(ids.device))
        embeddings = model.embed(ids, features)
        if not _can_generate(model.llm):
            return _write_one_by_one(model, embeddings, follower, settings)
        llm: Any = model.llm
        output = llm.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([follower]),
        )
    new_ids = output[0].tolist()
    end = next((place for place, token in enumerate(new_ids) if token in follower.stop_ids), len(new_ids))
    if has_beams and on_token is not None:
        for kept, token in enumerate(new_ids[:end]):
            if not on_token(token):
                return new_ids[: kept + 1]
    return new_ids[:end]


def _within_length(settings: GenerationSettings, num_prompt: int) -> GenerationSettings:
    if settings.max_length is None:
        return settings
    left = settings.max_length - num_prompt
    if left < 1:
        raise ConfigError(
            f"max_length {settings.max_length}: the prompt alone has {num_prompt} tokens, images included. Raise "
            "max_length, or bound the reply alone with max_new_tokens"
        )
    return replace(settings, max_new_tokens=min(settings.max_new_tokens, left))


def _can_generate(llm: Any) -> bool:
    """Whether transformers' own generation takes embeddings and is right, for this class."""
    prepare = getattr(llm, "prepare_inputs_for_generation", None)  # code of a folder's own may have none
    takes_embeddings = prepare is not None and "inputs_embeds" in inspect.signature(prepare).parameters
    return takes_embeddings and family_of(llm.config).generates


def _write_one_by_one(
    model: VisionLanguageModel, embeddings: Tensor, follower: _Follower, settings: GenerationSettings
) -> list[int]:
    """A reply as `vlm serve` writes it, with a cache that was compared with none. embeddings: [1, l, D]."""
    if settings.num_beams > 1:
        raise ConfigError(
            f"num_beams {settings.num_beams}: model type {model.llm.config.model_type} is decoded here without beams, "
            "as transformers does not take embeddings for it. Set num_beams to 1"
        )
    decoder, new_ids = build_row_decoder(model), list[int]()
    sampler = Sampler(
        SamplingSettings(
            temperature=settings.temperature if settings.do_sample else 0.0, top_p=settings.top_p,
            top_k=settings.top_k, repetition_penalty=settings.repetition_penalty, seed=settings.seed,
        )
    )  # fmt: skip
    start = embeddings.shape[1]
    hidden_state = decoder.prefill(embeddings, 0, 0)
    while len(new_ids) < settings.max_new_tokens:
        token = sampler.choose(model.logits(hidden_state)[0].float(), new_ids).id
        new_ids.append(token)
        ids = torch.tensor([[token]], device=embeddings.device)
        if token in follower.stop_ids or bool(follower(ids, None)):
            break
        hidden_state = decoder.decode(model.embed(ids), [start])
        start += 1
    return new_ids[:-1] if new_ids and new_ids[-1] in follower.stop_ids else new_ids


def _generation_config(model: VisionLanguageModel, stop_ids: Collection[int], settings: GenerationSettings) -> Any:
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}  # transformers' defaults
    do_sample = settings.do_sample and settings.temperature >= LEAST_TEMPERATURE
    if do_sample:
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    if settings.num_beams > 1:
        sampling["length_penalty"] = settings.length_penalty
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=do_sample,
        num_beams=settings.num_beams,
        repetition_penalty=settings.repetition_penalty,
        # a token that does not exist, as None would take the model's own
        eos_token_id=sorted(stop_ids) or [model.llm.config.get_text_config(decoder=True).vocab_size],
        pad_token_id=min(stop_ids, default=0),
        use_cache=True,
        **sampling,
    )


class _Follower:
    """A stopping criterion of transformers that hands each new token on, and stops when it is told to."""

    def __init__(self, stop_ids: set[int], on_token: OnToken | None, should_stop: Callable[[], bool]) -> None:
        self.stop_ids = stop_ids
        self.on_token = on_token
        self.should_stop = should_stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """`input_ids` int64 [B, l] so far -> bool [B], true where the reply ends."""
        token = int(input_ids[0, -1])
        stops = self.on_token is not None and token not in self.stop_ids and not self.on_token(token)
        stops = stops or self.should_stop()
        return torch.full((input_ids.shape[0],), stops, dtype=torch.bool, device=input_ids.device)


@contextmanager
def _undisturbed(model: VisionLanguageModel, seed: int | None) -> Iterator[None]:
    """Evaluation mode, random numbers of our own, and none of what the base model's generation_config.json asks for:
    transformers would take from it whatever is not set, and `vlm serve` reads none of it."""
    from transformers import GenerationConfig

    was_training, own = model.training, getattr(model.llm, "generation_config", None)
    model.eval()
    model.llm.generation_config = GenerationConfig()
    devices = [model.llm.device] if model.llm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if seed is None:
            torch.seed()
        else:
            torch.manual_seed(seed)
        try:
            yield
        finally:
            model.train(was_training)
            model.llm.generation_config = own
