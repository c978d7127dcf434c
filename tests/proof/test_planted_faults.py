"""Faults that a run must not train with, each planted by a small patch, and the check that finds it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from planting import FAULTS, fault, wrap
from proof_setups import SETUPS

from vlm.batch import IGNORE_INDEX
from vlm.data.collate import Collator
from vlm.data.examples import ExampleStore
from vlm.data.scan import ExampleReader
from vlm.data.template import RoleFormat
from vlm.data.tokenize import ConversationTokenizer
from vlm.models import loss as losses
from vlm.models import varlen
from vlm.models import vlm as whole
from vlm.models.projector import Projector
from vlm.models.vision import VisionEncoder
from vlm.models.vlm import VisionLanguageModel
from vlm.objectives.base import LossOutput
from vlm.objectives.lm import LanguageModeling
from vlm.prepare import Prepared
from vlm.proof.prove import prove
from vlm.train.engines.base import LossModule
from vlm.train.engines.local import LocalEngine

# ---- who sees whom


@fault("position ids run through the row", "positions")
@fault("position ids run through the row, and the model believes them", "packed_alone")
def _(patch, parts):
    def row(original, self, examples, length):
        ids, labels, _ = original(self, examples, length)
        return ids, labels, torch.arange(length)

    wrap(patch, Collator, "_row", row)


@fault("every position is 0", "positions")
def _(patch, parts):
    wrap(patch, Collator, "_row", lambda original, *given: (*original(*given)[:2], torch.zeros(given[2]).long()))


@fault("positions start at 1", "positions")
def _(patch, parts):
    def row(original, self, examples, length):
        ids, labels, positions = original(self, examples, length)
        return ids, labels, positions + 1

    wrap(patch, Collator, "_row", row)


def decoder_called_with(**changes: Any) -> Callable[..., Any]:
    def decode(self, embeddings, position_ids, read=None):
        given = {"position_ids": position_ids, "attention_mask": None, "use_cache": False} | {
            key: change(position_ids) for key, change in changes.items()
        }
        return self.llm.get_decoder()(inputs_embeds=embeddings, **given).last_hidden_state

    return decode


@fault("a record does not see the image that it shares", "shared_image")
def _(patch, parts):
    def blind(original, position_ids):
        return [segment._replace(shared=0) for segment in original(position_ids)]

    wrap(patch, varlen, "find_segments", blind)


@fault("a mask of ones hides where records begin", "packed_alone")
def _(patch, parts):
    patch.setattr(VisionLanguageModel, "decode", decoder_called_with(attention_mask=torch.ones_like))


@fault("a cache hides where records begin", "packed_alone")
def _(patch, parts):
    patch.setattr(VisionLanguageModel, "decode", decoder_called_with(use_cache=lambda _: True))


@fault("a recurrent state is carried into the next record", "packed_alone", "full")
def _(patch, parts):
    def decode(original, self, embeddings, position_ids, read=None):
        return original(self, embeddings, position_ids) + 0.05 * embeddings.cumsum(1)

    wrap(patch, VisionLanguageModel, "decode", decode)


@fault("every token sees all of its row", "causal", "plain")
def _(patch, parts):
    def decode(original, self, embeddings, position_ids, read=None):
        states = original(self, embeddings, position_ids)
        return states + 0.1 * states.mean(1, keepdim=True)

    wrap(patch, VisionLanguageModel, "decode", decode)


@fault("every token sees the next one", "causal", "text")
def _(patch, parts):
    def decode(original, self, embeddings, position_ids, read=None):
        return original(self, embeddings + 0.1 * embeddings.roll(-1, 1), position_ids)

    wrap(patch, VisionLanguageModel, "decode", decode)


@fault("every token sees itself only", "context")
def _(patch, parts):
    patch.setattr(VisionLanguageModel, "decode", decoder_called_with(position_ids=torch.zeros_like))


# ---- labels and text


def encoded(change: Callable[[list[int], list[int], ConversationTokenizer], Any]) -> Callable[..., Any]:
    """Wraps ConversationTokenizer._encode, whose result is ids and labels."""

    def encode(original, self, *given):
        ids, labels = original(self, *given)
        return change(ids, labels, self)

    return encode


@fault("labels are shifted by one", "labels")
def _(patch, parts):
    shifted = encoded(lambda ids, labels, _: (ids, [*labels[1:], IGNORE_INDEX]))
    wrap(patch, ConversationTokenizer, "_encode", shifted)


@fault("the prompt has labels too", "labels")
def _(patch, parts):
    all_but_images = encoded(
        lambda ids, labels, self: (ids, [IGNORE_INDEX if i == self.image_token_id else i for i in ids])
    )
    wrap(patch, ConversationTokenizer, "_encode", all_but_images)


@fault("image placeholders have labels", "labels", "plain")
def _(patch, parts):
    wrap(patch, ConversationTokenizer, "_encode", encoded(lambda ids, labels, _: (ids, list(ids))))


@fault("the last reply alone has labels", "labels")
def _(patch, parts):
    def last_run(ids, labels, _):
        ends = [n for n in range(1, len(labels)) if labels[n] == IGNORE_INDEX != labels[n - 1]]
        last = ends[-2] if len(ends) > 1 else 0
        return ids, [IGNORE_INDEX] * last + labels[last:]

    wrap(patch, ConversationTokenizer, "_encode", encoded(last_run))


@fault("the end token has no label", "end_token")
def _(patch, parts):
    without_end = encoded(
        lambda ids, labels, self: (ids, [IGNORE_INDEX if label in self.stop_ids else label for label in labels])
    )
    wrap(patch, ConversationTokenizer, "_encode", without_end)


@fault("the template ends replies with nothing", "end_token", "plain")
def _(patch, parts):
    tokens = parts.data.conversation_tokenizer
    patch.setattr(tokens, "template", replace(tokens.template, assistant=RoleFormat()))


@fault("the template ends replies with a word", "end_token")
def _(patch, parts):
    tokens = parts.data.conversation_tokenizer
    patch.setattr(tokens, "template", replace(tokens.template, assistant=RoleFormat("<|im_start|>assistant\n", "END")))


@fault("the begin token is written twice", "text", "begin token")
def _(patch, parts):
    tokens = parts.data.conversation_tokenizer
    patch.setattr(tokens, "_bos", tokens._bos * 2)


@fault("replies lose their capitals in tokenization", "text")
def _(patch, parts):
    lowered = lambda original, self, text, is_first: original(self, text.lower(), is_first)  # noqa: E731
    wrap(patch, ConversationTokenizer, "_encode_content", lowered)


@fault("the system prompt is dropped", "text", "system")
def _(patch, parts):
    patch.setattr(parts.data.conversation_tokenizer, "system", None)


@fault("padding has labels", "padding")
def _(patch, parts):
    def row(original, self, examples, length):
        ids, labels, positions = original(self, examples, length)
        used = sum(placed.length for placed in examples)
        return ids, torch.cat([labels[:used], ids[used:]]), positions

    wrap(patch, Collator, "_row", row)


@fault("rows lose their labels' last token", "padding", "full")
def _(patch, parts):
    def row(original, self, examples, length):
        cut = [
            placed._replace(example=replace(e, labels=[*e.labels[:-2], -100, -100]))
            for placed in examples
            for e in placed[:1]
        ]
        return original(self, cut, length)

    wrap(patch, Collator, "_row", row)


# ---- images


@fault("images are unread: the projector yields zeros", "image_read")
def _(patch, parts):
    wrap(patch, Projector, "forward", lambda original, *given: 0 * original(*given))


@fault("the encoder yields the same for every image", "image_read", "projector")
def _(patch, parts):
    wrap(patch, VisionEncoder, "forward", lambda original, self, pixels: original(self, torch.zeros_like(pixels)))


@fault("features are put in in reverse order", "feature_order")
def _(patch, parts):
    wrap(patch, whole, "splice_image_features", lambda original, e, features, at: original(e, features.flip(0), at))


@fault("the images of a batch are exchanged", "feature_order", "several images")
def _(patch, parts):
    wrap(patch, VisionLanguageModel, "encode_images", lambda original, *given: original(*given).flip(0))


@fault("the placeholder's own embedding is read", "feature_order", "full")
def _(patch, parts):
    wrap(patch, whole, "splice_image_features", lambda original, embeddings, features, at: embeddings)


@fault("features are cut down to whole numbers", "feature_order", "begin token")
def _(patch, parts):
    wrap(patch, whole, "splice_image_features", lambda original, e, features, at: original(e, features.int(), at))


@fault("one placeholder fewer than features", "placeholders")
def _(patch, parts):
    tokens = parts.data.conversation_tokenizer
    patch.setattr(tokens, "tokens_per_image", replace(tokens.tokens_per_image, num_tokens=15))


@fault("all records are shown the first image", "pixels")
def _(patch, parts):
    first: list[Any] = []

    def pixels(original, self, example):
        first.extend(original(self, example) if not first else [])
        return first[:1] * len(example.images)

    wrap(patch, Collator, "_pixels", pixels)


@fault("a record gets the image of another record", "pixels", "projector")
def _(patch, parts):
    def read(original, self, number):
        example = original(self, number)
        return replace(example, images=original(self, (number + 1) % len(self)).images)

    wrap(patch, ExampleReader, "read", read)


@fault("mean and std are another encoder's", "pixels")
def _(patch, parts):
    collator = parts.data.train.collator
    half = replace(collator.image_spec, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    patch.setattr(parts.data.train, "collator", replace(collator, image_spec=half))


@fault("pixels are cut down to whole numbers", "pixels", "batch norm")
def _(patch, parts):
    wrap(patch, Collator, "_pixels", lambda original, *given: [p.int().float() for p in original(*given)])


@fault("cached features are another encoder's", "pixels", "cached features")
def _(patch, parts):
    store = parts.data.train.collator.features
    wrap(patch, type(store), "get", lambda original, self, image: original(self, image).flip(-1))


# ---- loss, gradient and step


@fault("labels are not shifted in the loss", "loss")
def _(patch, parts):
    def select(hidden_states, labels, position_ids):
        supervised = labels != IGNORE_INDEX
        return hidden_states[supervised], labels[supervised]

    patch.setattr(losses, "select_supervised", select)


@fault("labels are shifted twice", "loss", "text")
def _(patch, parts):
    wrap(patch, losses, "select_supervised", lambda original, states, labels, _: original(states, labels.roll(-1, 1)))


@fault("the loss is counted twice", "loss")
def _(patch, parts):
    wrap(patch, LanguageModeling, "loss", lambda original, *given: LossOutput(2 * original(*given).loss))


@fault("padding counts in the divisor", "loss")
def _(patch, parts):
    patch.setattr(LanguageModeling, "normalizer", lambda self, batch: batch.labels.numel())


@fault("the divisor counts rows", "loss", "plain")
def _(patch, parts):
    patch.setattr(LanguageModeling, "normalizer", lambda self, batch: len(batch.labels))


@fault("the loss is a mean per micro-batch", "micro_batches")
def _(patch, parts):
    def mean(original, self, batch, *_):
        loss, metrics = original(self, batch)
        return loss / batch.num_supervised, metrics

    wrap(patch, LossModule, "forward", mean)


@fault("only the last micro-batch's gradient counts", "micro_batches")
def _(patch, parts):
    def backward(original, self, forward, microbatches, scale):
        summed = original(self, forward, microbatches[:-1], scale)
        self.optimizer.zero_grad()
        return [a + b for a, b in zip(summed, original(self, forward, microbatches[-1:], scale), strict=True)]

    wrap(patch, LocalEngine, "_backward", backward)


@fault("the gradient is scaled by the number of processes once more", "micro_batches", "full")
def _(patch, parts):
    wrap(
        patch, LocalEngine, "_backward", lambda original, self, f, batches, scale: original(self, f, batches, 2 * scale)
    )


@fault("the loss of the step is in other units", "micro_batches", "text")
def _(patch, parts):
    wrap(patch, LocalEngine, "_backward", lambda original, *given: [each / math.log(2) for each in original(*given)])


# ---- what trains and what does not


@fault("the projector is not loaded from init_from", "initial_weights", "second stage")
def _(patch, parts):
    weight = parts.built.model.projector.layers[0].weight
    patch.setattr(weight, "data", torch.randn_like(weight))


@fault("the projector's bias alone is not loaded", "initial_weights", "second stage")
def _(patch, parts):
    bias = parts.built.model.projector.layers[0].bias
    patch.setattr(bias, "data", torch.zeros_like(bias))


@fault("the projector is detached", "gradients")
def _(patch, parts):
    wrap(patch, Projector, "forward", lambda original, *given: original(*given).detach())


@fault("nothing that trains is in the loss", "gradients", "plain")
def _(patch, parts):
    wrap(patch, Projector, "forward", lambda original, *given: original(*given).detach())


@fault("the adapters are not active", "gradients")
def _(patch, parts):
    for module in parts.built.model.modules():
        if hasattr(module, "lora_A"):
            patch.setattr(module, "_disable_adapters", True)


@fault("the projector's weights are not finite", "projector_scale", "projector")
def _(patch, parts):
    weight = parts.built.model.projector.layers[0].weight
    patch.setattr(weight, "data", weight.data / 0)


@fault("a frozen language model drops out", "frozen_steady", "projector")
def _(patch, parts):
    patch.setattr(VisionLanguageModel, "train", torch.nn.Module.train)
    for layer in parts.built.model.llm.model.layers:
        patch.setattr(layer.self_attn, "attention_dropout", 0.3)


@fault("the base of adapters drops out", "frozen_steady")
def _(patch, parts):
    patch.setattr(VisionLanguageModel, "train", torch.nn.Module.train)
    for layer in parts.built.model.llm.model.layers:
        patch.setattr(layer.self_attn, "attention_dropout", 0.3)


@fault("a frozen encoder drops out", "frozen_steady", "full")
def _(patch, parts):
    for layer in parts.built.model.vision.trunk.blocks:
        patch.setattr(layer.self_attn, "dropout", 0.3)
    patch.setattr(VisionEncoder, "train", lambda self, mode=True: torch.nn.Module.train(self, mode))


@fault("the batch statistics of a frozen encoder move", "frozen_steady", "batch norm")
def _(patch, parts):
    patch.setattr(VisionEncoder, "train", lambda self, mode=True: torch.nn.Module.train(self, mode))


@fault("a frozen part asks for gradients", "trainable", "projector")
def _(patch, parts):
    patch.setattr(parts.built.model.llm.get_input_embeddings().weight, "requires_grad", True)


@fault("a trained part is frozen", "trainable")
def _(patch, parts):
    for parameter in parts.built.model.projector.parameters():
        patch.setattr(parameter, "requires_grad", False)


@fault("the optimizer lacks a trained part", "trainable")
def _(patch, parts):
    patch.setitem(parts.engine.optimizer.param_groups[0], "params", [])


@fault("the optimizer holds frozen weights", "trainable", "plain")
def _(patch, parts):
    group = parts.engine.optimizer.param_groups[0]
    patch.setitem(group, "params", [*group["params"], *parts.built.model.llm.parameters()])


@pytest.mark.slow
def test_dropout_that_a_frozen_language_model_was_trained_with_is_off_and_not_refused(parts_of, monkeypatch):
    """GPT-2, OPT, Phi-2 and StarCoder2 say 0.1 in their config.json."""
    for setup in ("projector", "lora"):
        parts = parts_of(setup)
        for layer in parts.built.model.llm.model.layers:
            monkeypatch.setattr(layer.self_attn, "attention_dropout", 0.3)
        assert failed(parts) == []


def failed(parts: Prepared) -> list[str]:
    return prove(parts, seconds=math.inf).failed


@pytest.mark.slow
@pytest.mark.parametrize("planted", FAULTS, ids=lambda planted: planted.name)
def test_the_fault_is_found_by_the_check_of_its_name(planted, parts_of, monkeypatch):
    parts = parts_of(planted.setup)
    # what the scan kept was tokenized before the fault
    monkeypatch.setattr(ExampleStore, "read", lambda *_: None)
    planted.plant(monkeypatch, parts)
    assert planted.found_by in failed(parts)


@pytest.mark.parametrize("setup", SETUPS)
def test_without_a_fault_every_check_that_can_be_made_passes(setup, parts_of):
    proof = prove(parts_of(setup), seconds=math.inf)
    assert proof.failed == []
    reasons = {name: finding.note for name, finding in proof.findings.items() if finding.passed is None}
    assert "could not be made" not in " ".join(reasons.values())
    assert reasons.keys() <= NOT_MADE.get(setup, set()) | {"initial_weights"}, reasons


IMAGE_CHECKS = {"placeholders", "pixels", "shared_image", "own_image", "image_read", "feature_order", "projector_scale"}
NOT_MADE = {"text": IMAGE_CHECKS | {"frozen_steady"}}  # all of it trains


def test_at_least_thirty_faults_are_planted_and_every_check_finds_one():
    from vlm.proof.checks import CHECKS

    assert len(FAULTS) >= 30
    assert {planted.found_by for planted in FAULTS} >= CHECKS.keys() - {"own_image"}
