"""Any export as a model of lmms-eval: generation, and losses of continuations. See docs/evaluation.md.

Its requests are tuples; which fields they have depends on the class that is asked, see `_asked` and `loglikelihood`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from vlm.data.conversation import Conversation, Turn
from vlm.errors import ConfigError, RecordError
from vlm.evaluation.answers import write_answers
from vlm.evaluation.predict import FeatureCache
from vlm.evaluation.questions import OpenQuestion, WritingSettings, loss_question
from vlm.inference.load import load
from vlm.inference.messages import to_conversation
from vlm.logs import warn
from vlm.train.engines.device import choose_device

_MAX_NEW_TOKENS = 1024  # where a task does not say, as lmms-eval's own models have it


class SimpleModel(lmms):  # type: ignore[misc]
    """A prompt is a text and the images before it.

    Args:
        pretrained: an export, or a model folder that `vlm.load` takes.
        device, precision, template: as of `vlm.load`; by default each process of a launch takes a GPU of its own.
        adapter: a LoRA folder.
        batch_size: answers written at the same time; 1, auto and None take what fits.

    Raises:
        ConfigError: an unknown argument.
    """

    is_simple = True

    def __init__(
        self, pretrained: str, device: str | None = None, precision: Any = "auto", template: str | None = None,
        adapter: str | None = None, batch_size: int | str | None = None, max_batch_size: object = None, **unknown: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if unknown:
            known = "pretrained, device, precision, template, adapter, batch_size"
            raise ConfigError(f"--model_args of vlm: {', '.join(unknown)} is not known; there are {known}")
        place = str(choose_device("auto")) if device in (None, "auto", "cuda") else str(device)
        self.loaded = load(pretrained, place, precision, template=template, adapter=adapter and Path(adapter))
        at_once = int(batch_size or 1) if str(batch_size or 1).isdecimal() else 1  # else it is "auto"
        self.at_once = at_once if at_once > 1 else None
        self._features = FeatureCache(self.loaded)
        self._device = self.loaded.device

    @property
    def device(self) -> torch.device:
        return self._device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request; those with the same settings are written together."""
        groups: dict[WritingSettings, list[tuple[int, OpenQuestion]]] = {}
        for place, request in enumerate(requests):
            conversation, settings, where = self._asked(request)
            ids = self.loaded.conversation_tokenizer.prompt(conversation)
            question = OpenQuestion(ids, (), conversation.images, where, place, "")
            room = self.loaded.max_tokens - len(ids)
            groups.setdefault(_writing(settings, room, where), []).append((place, question))
        texts: dict[int, str] = {}
        for writing, asked in groups.items():
            questions = [question for _, question in asked]
            answers = write_answers(self.loaded, questions, self._features, writing, max_running=self.at_once)
            texts |= {place: answer.text for (place, _), answer in zip(asked, answers, strict=True)}
        return [texts[place] for place in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each request, the continuation's mean loss per token in nats, and whether it is the greedy one. The token
        that ends a reply is not part of it.

        A loss, whatever the name says: lmms-eval's own models return `outputs.loss`, and its tasks of kind
        `multiple_choice` take the candidate with the least (`ConfigurableTask.process_results`).
        """
        results = []
        for request in requests:
            text, target, *place = request.args
            images: list[Any] = []
            where = "a continuation without a prompt"
            if place:
                doc_to_visual, number, task, split = place
                doc, where = self.task_dict[task][split][number], f"{task} {split} {number}"
                images = list(doc_to_visual(doc) or []) if doc_to_visual else []
                target = target(doc) if callable(target) else target
            conversation = to_conversation(text, images, self.loaded.template) if text or images else Conversation(())
            results.append(self._score(conversation, str(target).strip(), where))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        raise NotImplementedError(
            "vlm answers single rounds. For tasks of several, use lmms-eval's openai model and vlm serve"
        )

    def _asked(self, request: Any) -> tuple[Conversation, dict[str, Any], str]:
        """Prompt, generation settings, and where they are from."""
        text, settings, doc_to_visual, number, task, split = request.args
        images = list(doc_to_visual(self.task_dict[task][split][number]) or []) if doc_to_visual else []
        return to_conversation(text, images, self.loaded.template), settings, f"{task} {split} {number}"

    def _score(self, conversation: Conversation, target: str, where: str) -> tuple[float, bool]:
        loaded = self.loaded
        turns = (*conversation.turns, Turn("assistant", (target,)))
        question = loss_question(replace(conversation, turns=turns, where=where), loaded.conversation_tokenizer)
        prompt, reply = question.prompt_ids, list(question.replies[0])
        while reply and reply[-1] in loaded.conversation_tokenizer.stop_ids:
            reply.pop()
        ids = torch.tensor([prompt + reply], device=loaded.device)
        features = self._features.get(question.images)
        shown = [features[image] for image in question.images]
        with torch.no_grad(), loaded.autocast():
            embeddings = loaded.model.embed(ids, torch.cat(shown) if shown else None)
            positions = torch.arange(ids.shape[1], device=loaded.device).unsqueeze(0)
            hidden_states = loaded.model.decode(embeddings, positions)[:, len(prompt) - 1 : -1]
            logs = loaded.model.logits(hidden_states)[0].float().log_softmax(-1)
        wanted = torch.tensor(reply, device=logs.device)
        loss = -logs.gather(1, wanted[:, None]).double().mean().item()
        return loss, bool((logs.argmax(-1) == wanted).all())


class ChatModel(SimpleModel):
    """A prompt is a list of messages."""

    is_simple = False

    def _asked(self, request: Any) -> tuple[Conversation, dict[str, Any], str]:
        _, doc_to_messages, settings, number, task, split = request.args
        where = f"{task} {split} {number}"
        chat = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][number]))
        _, videos, audios = chat.extract_media()
        if videos or audios:
            raise RecordError("bad_message", "videos and sounds are not read, texts and images are", where)
        messages = [_as_ours(message) for message in chat.model_dump()["messages"]]
        return to_conversation(messages, (), self.loaded.template), settings, where


def _as_ours(message: dict[str, Any]) -> dict[str, Any]:
    """Their image parts have `url`, with a PIL image or a path in it."""
    parts = [
        {"type": "image", "image": part["url"]} if part["type"] == "image" else part for part in message["content"]
    ]
    return {"role": message["role"], "content": parts}


def _writing(settings: dict[str, Any], room: int, where: str) -> WritingSettings:
    """A task's `generation_kwargs`, as far as they mean something here."""
    if room < 1:
        raise RecordError("too_long", "the prompt is longer than the model reads", where)
    if (settings.get("num_beams") or 1) > 1:
        warn("lmms-eval: num_beams is not used; the likeliest token is taken each time")
    until = settings.get("until") or ()
    temperature = float(settings.get("temperature") or 0) if settings.get("do_sample", True) else 0.0
    return WritingSettings(
        min(int(settings.get("max_new_tokens") or _MAX_NEW_TOKENS), room),
        temperature,
        float(settings.get("top_p") or 1.0),
        (until,) if isinstance(until, str) else tuple(text for text in until if text),
    )
