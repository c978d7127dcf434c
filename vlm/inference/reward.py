"""A reward model's export -> scores of replies, for `vlm predict` and for whoever wants replies judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vlm.batch import Example
from vlm.data.collate import Collator
from vlm.data.conversation import Conversation
from vlm.data.image_order import ImageOrder
from vlm.data.images import DEFAULT_MAX_PIXELS
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import ConfigError, RecordError
from vlm.inference.load import LoadedModel, Precision, load_kind
from vlm.models.build import forked_random_state
from vlm.objectives.base import Head
from vlm.objectives.reward import PairwiseReward, reward_replies
from vlm.objectives.rewards import Reward, Written

MAX_TOKENS = {"cpu": 2048, "cuda": 32768}  # padded tokens of a forward


def open_judge(
    path: str, tokens: ConversationTokenizer, device: torch.device, max_length: int, max_pixels: int
) -> Reward:
    """The reward `{kind: model}`: a reward model asked about replies that another model wrote.

    Args:
        tokens: of the model that writes.
        max_length: tokens of its longest prompt with a reply.
        max_pixels: of its images.

    Raises:
        CheckpointError: as `load_reward_model`.
        ConfigError: the reward model reads other tokens, or fewer.
    """
    with forked_random_state():  # what is drawn for it and overwritten is nothing to the training
        model = load_reward_model(path, str(device), max_pixels=max_pixels)
    if model.loaded.max_tokens < max_length:
        raise ConfigError(
            f"objective.rewards: {path} reads at most {model.loaded.max_tokens:,} tokens, data.max_length is "
            f"{max_length:,}. Lower that, or train the reward model with a longer one"
        )
    ours, theirs = tokens.fingerprint(), model.loaded.conversation_tokenizer.fingerprint()
    if different := [name for name in ("vocabulary", "image", "special") if ours[name] != theirs[name]]:
        raise ConfigError(
            f"objective.rewards: {path} does not read the tokens of the model that writes: {', '.join(different)} "
            "differ. Train the reward model from the same export or base model, with the same encoder and projector"
        )

    def ask(replies: Sequence[Written]) -> list[float]:
        return model.of_examples([reply.example for reply in replies])

    return ask


def load_reward_model(
    path: str | Path, device: str = "auto", precision: Precision = "auto", image_order: ImageOrder | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> RewardModel:  # fmt: skip
    """Load what `vlm export` wrote of a run with `objective: {kind: reward}`.

    Args:
        path: the export's folder; what it names beside itself is looked for as `vlm.load` does.
        device: "cpu", "cuda", "cuda:1"; "auto" takes the GPU if there is one.
        precision: of all but the value head, which is float32.
        image_order: where the images of a user turn are put; None does as the training data did.
        max_pixels: of an image; a larger one is refused.

    Raises:
        CheckpointError: no export of a reward model, or it does not load; see `vlm.load`.
    """
    return RewardModel(load_kind(path, device, precision, is_reward=True, image_order=image_order), max_pixels)


class RewardModel:
    """Conversations -> the score of the last reply of each. Larger is better; only differences mean something."""

    def __init__(self, loaded: LoadedModel, max_pixels: int) -> None:
        self.loaded = loaded
        self._collate = Collator(loaded.image_spec, 0, max_pixels)
        self._objective = PairwiseReward(margin=0.0, center=0.0)

    def __call__(
        self,
        conversations: Sequence[Conversation],
        max_tokens: int | None = None,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> list[float]:
        """A score for every conversation, in their order, the same however they are batched but for rounding.

        Args:
            conversations: each ends with a reply; images by path or as encoded bytes.
            max_tokens: of a forward, padding counted; None takes what suits the device. A longer one stands alone.
            on_progress: called with how many are done.

        Raises:
            RecordError: one does not end with a reply, or an image cannot be read.
            ConfigError: one is longer than the model can read.
        """
        return self.of_examples([self._example(each) for each in conversations], max_tokens, on_progress)

    def of_examples(
        self,
        examples: Sequence[Example],
        max_tokens: int | None = None,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> list[float]:
        """As of conversations, of what this model's tokenizer made of them: the reply is what is supervised, `is_good`
        is any but None."""
        scores, done = [0.0] * len(examples), 0
        for group in _groups(examples, max_tokens or MAX_TOKENS.get(self.loaded.device.type, 2048)):
            for place, score in zip(group, self._score([examples[place] for place in group]), strict=True):
                scores[place] = score
            done += len(group)
            on_progress(done)
        return scores

    def _example(self, conversation: Conversation) -> Example:
        where, tokens, most = conversation.where, self.loaded.conversation_tokenizer, self.loaded.max_tokens
        if not conversation.turns or conversation.turns[-1].role != "assistant":
            raise RecordError("no_reply", "the last turn is not a reply, so there is nothing to score", where)
        if conversation.images and self.loaded.image_spec is None:
            raise RecordError("image_without_encoder", "this model reads no images: it has no vision encoder", where)
        example = Example(*tokens.encode(conversation), conversation.images, where)  # an empty reply has a score too
        if not example.num_supervised:
            raise RecordError("no_supervised_tokens", "its replies have no token of their own", where)
        if len(example.input_ids) > most:
            raise ConfigError(
                f"{where or 'a conversation'} has {len(example.input_ids):,} tokens, the model reads at most {most:,}"
            )
        return replace(example, is_good=True)  # so the batch numbers it; what it is called does not matter

    @torch.no_grad()
    def _score(self, examples: list[Example]) -> list[float]:
        """One row for each, so that none is another one's neighbour."""
        loaded, model = self.loaded, self.loaded.model
        batch = self._collate([[example] for example in examples])
        if batch.skipped:
            raise RecordError(batch.skipped[0].rule, batch.skipped[0].message, batch.skipped[0].where)
        batch = batch.to(loaded.device)
        with loaded.autocast():
            states = model(
                batch.input_ids, batch.position_ids, batch.pixel_values, None,
                self._objective.reads(batch), loaded.device,
            )  # fmt: skip
            head = Head(model.logits, values=model.values)
            return reward_replies(states, batch, head).tolist()


def _groups(examples: Sequence[Example], max_tokens: int) -> list[list[int]]:
    """Numbers of examples of similar length, at most `max_tokens` padded ones together.

    >>> _groups([Example([1] * length, [-100] * length) for length in (2, 7, 3)], max_tokens=8)
    [[1], [2, 0]]
    """
    groups: list[list[int]] = []
    longest = 0
    for place in sorted(range(len(examples)), key=lambda place: -len(examples[place].input_ids)):
        length = len(examples[place].input_ids)
        if groups and (len(groups[-1]) + 1) * longest <= max_tokens:
            groups[-1].append(place)
        else:
            groups.append([place])
            longest = length
    return groups
