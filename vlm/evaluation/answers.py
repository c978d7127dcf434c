"""Answers that a model writes to the questions of a task, many at once.

Letters in shapes: L tokens, D LLM width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.errors import ConfigError, RecordError
from vlm.evaluation.predict import FeatureCache
from vlm.evaluation.questions import OpenQuestion, WritingSettings
from vlm.generation.batched import BatchedGenerator, EndReason, Reply, SharedPrompt
from vlm.generation.sampling import NewToken, SamplingSettings
from vlm.generation.slot_cache import round_up
from vlm.generation.streaming import TextStream
from vlm.inference.budget import fitting_tokens
from vlm.inference.load import LoadedModel

MAX_RUNNING = {"cpu": 16, "cuda": 64}  # replies written at the same time


@dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int
    end: EndReason  # "length": cut off at max_new_tokens


def write_answers(
    loaded: LoadedModel,
    questions: Sequence[OpenQuestion],
    cache: FeatureCache,
    settings: WritingSettings,
    on_answer: Callable[[int, Answer], None] = lambda place, answer: None,
    max_running: int | None = None,
) -> list[Answer]:
    """The answer to every question, in their order.

    What several ask alike (prompt and images) is written once, unless it is sampled.

    Args:
        cache: where features of images come from.
        on_answer: called with a question's place among `questions` as soon as it is answered; not in their order.
        max_running: answers written at the same time, whatever memory is free; None takes what suits the device and
            its free memory.

    Raises:
        RecordError: an image cannot be read, or a prompt and its answer are longer than the model reads.
        ConfigError: the memory that is free holds no answer.
    """
    if not questions:
        return []
    places = _same(questions, is_sampled=settings.temperature > 0)
    writer = _Writer(loaded, questions, cache, settings, on_answer, [places[key] for key in places])
    writer.run(max_running)
    return [writer.answers[place] for place in range(len(questions))]


def _same(questions: Sequence[OpenQuestion], is_sampled: bool) -> dict[Hashable, list[int]]:
    """The places of questions that are alike, together."""
    places: dict[Hashable, list[int]] = {}
    for place, question in enumerate(questions):
        key = place if is_sampled else (tuple(question.prompt_ids), question.images)
        places.setdefault(key, []).append(place)
    return places


class _Writer:
    def __init__(
        self,
        loaded: LoadedModel,
        questions: Sequence[OpenQuestion],
        cache: FeatureCache,
        settings: WritingSettings,
        on_answer: Callable[[int, Answer], None],
        groups: list[list[int]],
    ) -> None:
        self.loaded = loaded
        self.questions = questions
        self.cache = cache
        self.settings = settings
        self.on_answer = on_answer
        self.groups = groups  # places of questions that are answered together
        self.answers: dict[int, Answer] = {}
        self.errors: list[tuple[OpenQuestion, Exception]] = []

    def run(self, at_once: int | None) -> None:
        longest = max(self._num_tokens(question) for question in self.questions)
        max_running = at_once or MAX_RUNNING.get(self.loaded.device.type, 16)
        budget = max_running * round_up(longest)
        if at_once is None:
            budget = min(budget, fitting_tokens(self.loaded, max_running))
        if round_up(longest) > budget:
            raise ConfigError(
                f"the longest prompt and its answer take {longest:,} tokens, the memory that is free holds {budget:,}: "
                "lower max_new_tokens, or free some"
            )
        generator = BatchedGenerator(self.loaded.model, max_running=max_running, max_tokens=budget)
        replies = self._replies(max_running)
        is_more = True
        while is_more or generator.waiting or generator.running:
            with torch.no_grad(), self.loaded.autocast():
                while is_more and len(generator.waiting) < max_running:
                    reply = next(replies, None)
                    is_more = reply is not None
                    if reply is not None:
                        generator.add(reply)
                generator.step()
            for question, error in self.errors:
                raise error.at(question.where) if isinstance(error, RecordError) else error

    def _num_tokens(self, question: OpenQuestion) -> int:
        """Of prompt and answer. Raises RecordError if the model reads fewer."""
        count = len(question.prompt_ids) + self.settings.max_new_tokens
        if count > self.loaded.max_tokens:
            raise RecordError(
                "too_long",
                f"a prompt of {len(question.prompt_ids):,} tokens and an answer of {self.settings.max_new_tokens:,} "
                f"(max_new_tokens) are more than the {self.loaded.max_tokens:,} that the model reads",
                question.where,
            )
        return count

    def _replies(self, at_once: int) -> Iterator[Reply]:
        """One for each group. Images of the next ones are encoded together."""
        for start in range(0, len(self.groups), at_once):
            groups = self.groups[start : start + at_once]
            features = self._features([self.questions[places[0]] for places in groups])
            for places in groups:
                yield self._reply(places, features)

    def _features(self, questions: Sequence[OpenQuestion]) -> dict[str | bytes, Tensor]:
        """[tokens, D] of every image that they show."""
        try:
            return self.cache.get([image for question in questions for image in question.images])
        except RecordError:
            for question in questions:  # whose it is
                try:
                    self.cache.get(question.images)
                except RecordError as error:
                    raise error.at(question.where) from None
            raise

    def _reply(self, places: list[int], features: dict[str | bytes, Tensor]) -> Reply:
        question, settings = self.questions[places[0]], self.settings
        text = TextStream(self.loaded.conversation_tokenizer.decode, settings.stop)
        pieces: list[str] = []

        def on_token(token: NewToken) -> bool:
            pieces.append(text.push(token.id))
            return not text.stopped

        def on_end(reason: EndReason | Exception) -> None:
            if isinstance(reason, Exception):
                self.errors.append((question, reason))
                return
            answer = Answer(("".join(pieces) + text.finish()).strip(), len(reply.new_ids), reason)
            for place in places:
                self.answers[place] = answer
                self.on_answer(place, answer)

        ids = torch.tensor([question.prompt_ids], device=self.loaded.device)
        shown = [features[image] for image in question.images]
        embeddings = self.loaded.model.embed(ids, torch.cat(shown) if shown else None)
        seed = settings.seed + question.number
        reply = Reply(
            question.prompt_ids,
            None,
            settings.max_new_tokens,
            self.loaded.conversation_tokenizer.stop_ids,
            SamplingSettings(settings.temperature, settings.top_p, seed=seed),
            on_token,
            on_end,
            SharedPrompt(embeddings),
        )
        return reply
