"""Rollouts: before a step the model as it is writes replies to the step's prompts, and they are judged.

What a rank writes depends on nothing but the weights, the seed of the run, the step, the record and the number of the
reply, so a run that is killed and goes on writes them again, and two ranks write what one would.

Letters: N tiles of images, P patches, C width of the encoder, T tokens per tile, D width of the language model.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlm.batch import IGNORE_INDEX, Batch, Example, Prompt
from vlm.config import RunConfig
from vlm.data.build import Data
from vlm.data.collate import Collator
from vlm.data.tokenize import ConversationTokenizer
from vlm.distributed import note, together
from vlm.errors import VLMError
from vlm.faults import fault
from vlm.generation.batched import BatchedGenerator, EndReason, Reply, SharedPrompt
from vlm.generation.sampling import NewToken, SamplingSettings
from vlm.generation.slot_cache import round_up
from vlm.logs import warn
from vlm.models.loss import find_supervised
from vlm.models.partition import full_shape
from vlm.models.vlm import VisionLanguageModel, evaluating
from vlm.objectives.grpo import RolloutConfig, TokenScores
from vlm.objectives.ppo import PPOConfig, TokenValues, estimate_advantages
from vlm.objectives.rewards import OpenModel, Reward, Written
from vlm.precision import autocast
from vlm.train.engines.base import Engine
from vlm.train.loop import Roll, as_read
from vlm.train.rollout_rows import Group, RowMaker
from vlm.train.timing import ROLLOUTS as PHASE

Kept = TypeVar("Kept", bound=TokenScores)
ROLLOUTS = "rollouts.jsonl"  # in the run folder
_LEAST_VARIANCE = 1e-8  # added to that of a step's advantages, as TRL does


class Start:
    """What of the model trains, as it was when the run began: the reference of a KL divergence.

    It takes the memory of what trains: of LoRA little, of a whole model a second copy.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.kept = engine.copy_weights()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model as it was. Nothing may be trained or saved meanwhile. Every rank enters and leaves it."""
        self.engine.exchange_weights(self.kept)
        try:
            yield
        finally:
            self.engine.exchange_weights(self.kept)


@dataclass
class _Judged:
    """A group with what was said and found of it."""

    group: Group
    written: list[Written]
    values: dict[str, list[float | None]]  # of each reward, a value per reply
    rewards: list[float]  # their weighted sums; empty where a reward could not be found out

    @property
    def has_signal(self) -> bool:
        return len(set(self.rewards)) > 1


class Rollouts:
    """Makes the batches that a step learns from; see `Roll`.

    Args:
        seed: of the run.
        tokenizer: writes prompts and reads replies.
        make_rows: lays out the replies of a micro-batch.
        start: the reference; None where the objective needs none.
        rewards: by their names, with their weights.
        show: takes a line of rollouts.jsonl.
    """

    def __init__(
        self,
        settings: RolloutConfig,
        engine: Engine,
        *,
        seed: int,
        tokenizer: ConversationTokenizer,
        make_rows: RowMaker,
        start: Start | None,
        rewards: dict[str, tuple[float, Reward]],
        show: Callable[[dict[str, Any]], None],
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.seed = seed
        self.tokenizer = tokenizer
        self.make_rows = make_rows
        self.start = start
        self.show = show
        self.rewards = rewards
        self._generator: BatchedGenerator | None = None
        self._never: dict[int, float] = {}  # a placeholder would stand for an image that is not there
        placeholder = engine.model.image_token_id
        if placeholder is not None and placeholder < full_shape(engine.model.llm.get_output_embeddings().weight)[0]:
            self._never[placeholder] = -math.inf
        self._errors: list[tuple[str, Exception]] = []  # of replies that could not be written, and their records

    def __call__(self, step: int, batches: list[Batch]) -> tuple[list[Batch], Mapping[str, float]]:
        note(f"step {step + 1}: rollouts")
        with self.engine.timer(PHASE):
            features, groups = together(lambda: self._write(step, batches))
            judged = together(lambda: self._judge(groups))
            self._show(step, [each for some in judged for each in some])
            made = [
                self.make_rows([each.group for each in some if each.rewards], batch, shown)
                for some, batch, shown in zip(judged, batches, features, strict=True)
            ]
            if self.start is not None:
                with self.start.in_place():
                    found = self._scores(made)
                made = [with_scores(batch, reference=said) for batch, said in zip(made, found, strict=True)]
            numbers = self._numbers([each for some in judged for each in some])
            if isinstance(self.settings, PPOConfig):
                made, more = self._valued(made, self.settings)
                numbers |= more
            elif self.settings.updates > 1:
                made = [with_scores(batch, old=said) for batch, said in zip(made, self._scores(made), strict=True)]
            return made, numbers

    def _write(self, step: int, batches: list[Batch]) -> tuple[list[Tensor | None], list[list[Group]]]:
        """Of each micro-batch the features of its images [N, P, C], where the encoder is frozen, and its groups.

        Where ranks gather the model's weights from each other with every call, each writes the replies of all.
        """
        engine, own = self.engine, slice(None)
        if not engine.calls_alone:
            shares = engine.gather_from_data_ranks(batches)
            shares[engine.data_rank] = batches  # not a copy of them: their prompts are known by identity
            own = slice(engine.data_rank * len(batches), (engine.data_rank + 1) * len(batches))
            batches = [batch for share in shares for batch in share]
        autocasting = autocast(engine.device.type, engine.autocast_dtype)
        with engine.whole_model() as model, evaluating(engine.model), torch.no_grad(), autocasting:
            assert model is not None  # `ObjectiveConfig.why_not` refuses engines without
            features = [self._encode(model, batch) for batch in batches]
            groups = [[Group(prompt, []) for prompt in batch.prompts] for batch in batches]
            replies = [
                reply
                for some, shown in zip(groups, features, strict=True)
                for reply in self._replies(step, some, shown)
            ]
            self._generate(model, replies)
        is_kept = model.vision is not None and model.vision.is_frozen
        return [shown if is_kept else None for shown in features[own]], groups[own]

    def _encode(self, model: VisionLanguageModel, batch: Batch) -> Tensor:
        """[N, P, C] of the images of a batch; empty without images."""
        batch = batch.to(self.engine.device)
        if batch.image_features is not None:
            return batch.image_features
        if batch.pixel_values is None:
            return torch.zeros(0, 1, 1, device=self.engine.device)
        assert model.vision is not None
        return model.vision(batch.pixel_values)

    def _replies(self, step: int, groups: list[Group], features: Tensor) -> Iterator[Reply]:
        """Those to all prompts of a micro-batch, to be written. features: [N, P, C] of its images."""
        model, settings, at = self.engine.model, self.settings, 0
        for group in groups:
            prompt = group.prompt
            shared = SharedPrompt()
            if prompt.num_tiles:
                assert model.projector is not None
                ids = torch.tensor([prompt.input_ids], device=self.engine.device)
                shared = SharedPrompt(model.embed(ids, model.projector(features[at : at + prompt.num_tiles])))
                at += prompt.num_tiles
            for number in range(settings.group_size):
                group.replies.append([])
                yield self._reply(prompt, shared, group.replies[-1], _seed(self.seed, step, prompt.where, number))

    def _reply(self, prompt: Prompt, shared: SharedPrompt, ids: list[int], seed: int) -> Reply:
        """A reply whose tokens are added to `ids`, the one that ends it too."""
        settings = self.settings

        def on_token(token: NewToken) -> bool:
            ids.append(token.id)
            return token.id not in self.tokenizer.stop_ids

        def on_end(reason: EndReason | Exception) -> None:
            if isinstance(reason, Exception):
                self._errors.append((prompt.where, reason))

        room = self.make_rows.max_length - len(prompt.input_ids)
        return Reply(
            prompt.input_ids,
            None,
            max(1, min(settings.max_new_tokens, room)),
            (),  # the token that ends a reply is learned, so it is seen here
            SamplingSettings(settings.temperature, settings.top_p, settings.top_k, seed=seed, logit_bias=self._never),
            on_token,
            on_end,
            shared,
        )

    def _generate(self, model: VisionLanguageModel, replies: list[Reply]) -> None:
        if not replies:
            return
        longest = max(reply.num_reserved for reply in replies)
        with _attending_by_masks(model):
            if self._generator is None:
                self._generator = BatchedGenerator(model, max_running=self.settings.replies_at_once)
            generator = self._generator
            generator.max_tokens = self.settings.replies_at_once * round_up(longest)
            for reply in replies:
                generator.add(reply)
            while generator.step() and not self._errors:
                fault("rollouts")
        if self._errors:
            where, error = self._errors[0]
            raise VLMError(f"{where}: no reply could be written: {type(error).__name__}: {error}") from error

    def _judge(self, groups: list[list[Group]]) -> list[list[_Judged]]:
        """Of each micro-batch, with rewards that are asked for once for all of them."""
        judged = iter(self._judge_all([group for some in groups for group in some]))
        return [[next(judged) for _ in some] for some in groups]

    def _judge_all(self, groups: Sequence[Group]) -> list[_Judged]:
        """Rewards of all replies, and what each reply is worth beside the others of its group."""
        written = [[self._written(group.prompt, reply) for reply in group.replies] for group in groups]
        everything = [each for some in written for each in some]
        found = {name: list(reward(everything)) for name, (_, reward) in self.rewards.items()}
        judged, size = [], self.settings.group_size
        for number, (group, some) in enumerate(zip(groups, written, strict=True)):
            values = {name: each[number * size : (number + 1) * size] for name, each in found.items()}
            rewards = self._sums(list(values.values()))
            group.advantages = self.settings.worth(rewards)
            judged.append(_Judged(group, some, values, rewards))
        return judged

    def _sums(self, values: list[list[float | None]]) -> list[float]:
        """The reward of each reply; empty where one is not known."""
        weights = [weight for weight, _ in self.rewards.values()]
        sums = []
        for each in zip(*values, strict=True):
            known = [weight * value for weight, value in zip(weights, each, strict=True) if value is not None]
            if len(known) < len(weights):
                return []
            sums.append(sum(known))
        return sums

    def _written(self, prompt: Prompt, reply: list[int]) -> Written:
        is_whole = bool(reply) and reply[-1] in self.tokenizer.stop_ids
        asked = [token for token in prompt.input_ids if token != self.tokenizer.image_token_id]
        text = self.tokenizer.decode(reply[:-1] if is_whole else reply).strip()
        labels = [IGNORE_INDEX] * len(prompt.input_ids) + reply
        example = Example([*prompt.input_ids, *reply], labels, prompt.images, prompt.where, is_good=True)
        return Written(self.tokenizer.decode(asked), text, prompt.answer, len(reply), is_whole, example)

    def _scores(self, batches: list[Batch]) -> list[Tensor]:
        """Log-probabilities of the tokens of all replies under the model as it is, float32 [S] of each batch."""
        return self._read(TokenScores(self.settings.temperature), batches).found

    def _read(self, objective: Kept, batches: list[Batch]) -> Kept:
        """An objective that keeps what it sees of some batches, after it has seen them."""
        with self.engine.using(objective):
            for batch in batches:
                self.engine.evaluate(batch)
        return objective

    def _valued(self, batches: list[Batch], settings: PPOConfig) -> tuple[list[Batch], dict[str, float]]:
        """Each token's advantage over what the value head expected, of mean 0 and deviation 1 over the step, and its
        return; and numbers for the log."""
        read = self._read(TokenValues(settings.temperature), batches)
        own = [_advantages(*each, settings) for each in zip(batches, read.found, read.values, strict=True)]
        leads = torch.cat([each.leads for each in own]).double()
        penalty = torch.cat([each.penalties for each in own]).double().sum().item() / (settings.kl or 1.0)
        expected = torch.cat(read.values).double().sum().item()
        sums = [float(len(leads)), leads.sum().item(), leads.square().sum().item(), penalty, expected]
        count, total, squares, *rest = self.engine.sum_over_data_ranks(sums)
        count = max(1.0, count)
        mean = total / count
        variance = max(0.0, squares - count * mean**2) / max(1.0, count - 1)
        deviation = (variance + _LEAST_VARIANCE) ** 0.5
        made = [
            with_scores(batch, advantages=(each.leads - mean) / deviation, values=then, returns=each.leads + then)
            for batch, each, then in zip(batches, own, read.values, strict=True)
        ]
        if settings.updates > 1:
            made = [with_scores(batch, old=said) for batch, said in zip(made, read.found, strict=True)]
        return made, {"kl": rest[0] / count, "value": rest[1] / count}

    def _show(self, step: int, judged: list[_Judged]) -> None:
        for each in judged[: self.settings.shown_groups]:
            replies = [
                {
                    "text": written.text,
                    "tokens": written.num_tokens,
                    "reward": each.rewards[number] if each.rewards else None,
                    "advantage": each.group.advantages[number] if each.rewards else None,
                    **{f"reward/{name}": values[number] for name, values in each.values.items()},
                }
                for number, written in enumerate(each.written)
            ]
            first = each.written[0]
            self.show(
                {"step": step + 1, "record": each.group.prompt.where, "prompt": first.prompt, "answer": first.answer,
                 "replies": replies}
            )  # fmt: skip

    def _numbers(self, judged: list[_Judged]) -> dict[str, float]:
        """Means over the replies and groups of all ranks, for the log."""
        known = [each for each in judged if each.rewards]
        compares = self.settings.group_size > 1
        written = [one for each in known for one in each.written]
        by_name = [sum(value for each in known for value in each.values[name] if value is not None)
                   for name in self.rewards]  # fmt: skip
        own = [
            len(judged), len(known), len(written),
            sum(map(sum, (each.rewards for each in known))),
            sum(statistics.stdev(each.rewards) for each in known) if compares else 0.0,
            sum(not each.has_signal for each in known),
            sum(one.num_tokens for one in written),
            sum(not one.is_whole for one in written),
            *by_name,
        ]  # fmt: skip
        sums = self.engine.sum_over_data_ranks([float(value) for value in own])
        groups, judged_groups, replies = (max(1.0, value) for value in sums[:3])
        return {
            "reward": sums[3] / replies,
            **({"reward_std": sums[4] / judged_groups, "no_signal": sums[5] / judged_groups} if compares else {}),
            "reply_tokens": sums[6] / replies,
            "truncated": sums[7] / replies,
            "not_judged": (sums[0] - sums[1]) / groups,
            **{f"reward/{name}": value / replies for name, value in zip(self.rewards, sums[8:], strict=True)},
        }


def build_rollouts(
    config: RunConfig,
    data: Data,
    engine: Engine,
    start: Start | None,
    show: Callable[[dict[str, Any]], None],
    open_model: OpenModel = None,
) -> Roll:
    """What a step of the run learns from: what the data brings, or replies to it.

    Args:
        open_model: for the reward of a model; every rank opens its own.
    """
    settings, objective = config.data, config.objective
    if not isinstance(objective, RolloutConfig):
        return as_read
    if objective.updates > 1 and config.model.lora is not None and config.model.lora.dropout > 0:
        warn(
            f"objective.updates {objective.updates} with model.lora.dropout {config.model.lora.dropout}: what a ratio "
            "is against is computed without dropout, so tokens are clipped that have not changed; set it to 0"
        )
    pad_token_id = data.conversation_tokenizer.pad_token_id
    collator = Collator(None, pad_token_id, settings.max_pixels)
    shares = settings.share_images and engine.model.lets_records_share
    return Rollouts(
        objective,
        engine,
        seed=config.seed,
        tokenizer=data.conversation_tokenizer,
        make_rows=RowMaker(collator, settings.max_length, shares, settings.packing),
        start=start,
        rewards={reward.label: (reward.weight, reward.build(open_model)) for reward in objective.rewards},
        show=show,
    )


@contextmanager
def _attending_by_masks(model: VisionLanguageModel) -> Iterator[None]:
    """The attention that training has comes back; a generator takes another one in the place of FlashAttention."""
    before = model.llm.config._attn_implementation
    if "flash" in before:
        model.llm.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if model.llm.config._attn_implementation != before:
            model.llm.set_attn_implementation(before)


@dataclass(frozen=True)
class _Advantages:
    """Of the supervised tokens of a batch, in the order of `find_supervised`; float32 [S] each."""

    leads: Tensor
    penalties: Tensor  # for leaving the reference


def _advantages(batch: Batch, said: Tensor, values: Tensor, settings: PPOConfig) -> _Advantages:
    """said, values: float32 [S], of the weights as they are; `Rollouts.advantages` still has the rewards."""
    rollouts = batch.rollouts
    assert rollouts is not None
    row, _, at = find_supervised(batch.labels, batch.position_ids)
    number = rollouts.number[row, at]
    scores = torch.zeros(rollouts.num_replies).index_put((number,), rollouts.advantages[row, at])
    penalties = torch.zeros_like(said)
    if rollouts.reference is not None:
        penalties = settings.kl * (said - rollouts.reference[row, at])
    leads = estimate_advantages(
        scores.tolist(), number.tolist(), values.tolist(), penalties.tolist(), settings.discount, settings.smoothing
    )
    return _Advantages(torch.tensor(leads), penalties)


def _seed(run: int, step: int, where: str, number: int) -> int:
    """Of one reply, below 2**63.

    >>> _seed(0, 1, "a.json: record 2", 3) == _seed(0, 1, "a.json: record 2", 3) != _seed(0, 1, "a.json: record 2", 4)
    True
    """
    digest = hashlib.sha256(f"{run} {step} {number} {where}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def with_scores(batch: Batch, **scores: Tensor) -> Batch:
    """The batch with numbers [S] of its supervised tokens, in the order of `find_supervised`, under names of
    `vlm.batch.Rollouts`, where they are [B, L]."""
    assert batch.rollouts is not None
    row, _, at = find_supervised(batch.labels, batch.position_ids)
    placed: dict[str, Any] = {
        name: torch.zeros(batch.labels.shape).index_put((row, at), said) for name, said in scores.items()
    }
    return replace(batch, rollouts=replace(batch.rollouts, **placed))
