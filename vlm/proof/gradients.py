"""Checks of one step's loss and gradient. For engines whose processes hold the whole model.

The step that is looked at is the engine's own, without its update: two micro-batches of one record each. It is compared
with the mean over all labelled tokens, computed here; of an objective that is not written out here, with its own loss
of each record alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.batch import IGNORE_INDEX, Batch
from vlm.models.decoders import outside_decoder
from vlm.models.trainable import canonical_name, part_of
from vlm.models.vlm import VisionLanguageModel
from vlm.objectives.base import Head, Objective
from vlm.objectives.lm import LanguageModeling
from vlm.objectives.ppo import ClippedPolicyAndValue
from vlm.proof.checks import Finding, holds, not_made
from vlm.proof.forward import NO_IMAGE, NOT_READ, Bounds, Rows, within
from vlm.proof.probe import StateProbe
from vlm.proof.records import Record, Subject
from vlm.proof.state import without_dropout
from vlm.train.engines.base import Engine

# Of a mixture's experts some get no token; the others only choose experts, or the tokens that attention sees.
MAY_LACK_GRADIENT = {"experts", "e_score_correction_bias", "expert_bias", "indexer"}
IMAGE_PARTS = {"vision", "vision.lora", "projector"}  # what trains on records with images only
SAMPLED = 512  # elements of each tensor's gradient that are kept, evenly spaced; beside its norm
_WAITS = ("value_head",)  # what learns from rollouts alone


@dataclass(frozen=True)
class Gradients:
    """What is kept of the gradients of all parameters, by name."""

    norms: dict[str, float]
    samples: dict[str, Tensor]  # float32 [at most SAMPLED]

    @classmethod
    def of(cls, model: nn.Module) -> Gradients:
        norms, samples = {}, {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                flat = parameter.grad.detach().flatten()
                norms[name] = flat.float().norm().item()
                samples[name] = flat[:: max(1, len(flat) // SAMPLED)].float()
        return cls(norms, samples)

    def distance(self, expected: Gradients) -> float:
        """Worst of the trained parts: norm of the difference over the norm, and of norms over norms."""
        if self.norms.keys() != expected.norms.keys():
            return math.inf
        worst = 0.0
        for part in {part_of(name) for name in self.norms}:
            names = [name for name in self.norms if part_of(name) == part]
            of_samples = (torch.cat([each.samples[name] for name in names]) for each in (self, expected))
            of_norms = (torch.tensor([each.norms[name] for name in names]) for each in (self, expected))
            for found, wanted in (of_samples, of_norms):
                difference, size = (found - wanted).norm().item(), wanted.norm().item()
                worst = max(worst, 0.0 if difference == 0 else difference / max(size, 1e-12))
                worst = worst if math.isfinite(difference) else math.inf
        return worst


@dataclass(frozen=True)
class Reference:
    """The step computed here: summed loss, what it is divided by, and the gradient of the quotient."""

    summed: float
    normalizer: int
    gradients: Gradients


def reference_step(probe: StateProbe, objective: Objective, rows: Rows) -> Reference:
    """Forward and backward of each record alone. Keeps their hidden states for the checks of forward passes."""
    model, summed = probe.model, 0.0
    normalizer = expected_normalizer(objective, rows)
    with without_dropout(model):
        for record, batch in zip(rows.records, rows.trained, strict=True):
            states = probe.forward(batch)
            probe.keep(batch, states)
            loss = _summed_loss(probe, objective, states, batch, record)
            summed += loss.item()
            if loss.requires_grad:
                (loss / max(1, normalizer)).backward()
    gradients = Gradients.of(model)
    model.zero_grad(set_to_none=True)
    return Reference(summed, normalizer, gradients)


def check_loss(engine: Engine, subject: Subject, reference: Reference, bounds: Bounds) -> dict[str, Finding]:
    """The engine's loss of both records, a row each, against the one computed here."""
    summed, normalizer = engine.evaluate(subject.steps([[record] for record in subject.computed], shares=True))
    ranks = engine.num_data_ranks
    if normalizer != reference.normalizer * ranks:
        return {
            "loss": holds(
                f"it counts {normalizer / ranks:g}, the records have {reference.normalizer} supervised tokens"
            )
        }
    return {"loss": within(_apart(summed / ranks, reference.summed), bounds.loss)}


def check_loss_by_records(
    engine: Engine, objective: Objective, rows: Rows, joined: Batch, bounds: Bounds
) -> dict[str, Finding]:
    """The engine's loss of both records together against that of each by itself, where nothing else can be computed."""

    def evaluate(batch: Batch) -> tuple[float, int]:
        return engine.evaluate(engine.broadcast([batch])[0])

    (summed, normalizer), alone = evaluate(joined), [evaluate(batch) for batch in rows.trained]
    count = expected_normalizer(objective, rows) * engine.num_data_ranks
    if normalizer != count or sum(each[1] for each in alone) != count:
        return {"loss": holds(f"it counts {normalizer}, the records have {count} supervised tokens on all ranks")}
    return {"loss": within(_apart(summed, sum(each[0] for each in alone)), bounds.loss)}


def check_step(
    engine: Engine, model: VisionLanguageModel, objective: Objective, rows: Rows, reference: Reference, bounds: Bounds
) -> dict[str, Finding]:
    reads = any(map(rows.reads_image, range(len(rows.records))))
    trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not reads and trained <= IMAGE_PARTS:
        return dict.fromkeys(("gradients", "micro_batches"), not_made(NOT_READ if any(rows.num_images) else NO_IMAGE))
    if not reference.gradients.norms:
        return {"gradients": holds("the loss depends on nothing that trains"), "micro_batches": not_made("no gradient")}
    normalizer = sum(map(objective.normalizer, rows.trained)) * engine.num_data_ranks
    with without_dropout(model):
        rehearsed = engine.rehearse(rows.trained, max(1, normalizer), lambda: Gradients.of(model))
    assert rehearsed is not None
    loss, _, gradients = rehearsed
    expected = reference.summed / max(1, reference.normalizer)
    apart = max(_apart(loss, expected), gradients.distance(reference.gradients))
    note = f"loss {loss:.6g}, of all tokens {expected:.6g}"
    return {
        "gradients": _presence(model, gradients, reads, _WAITS if isinstance(objective, ClippedPolicyAndValue) else ()),
        "micro_batches": within(apart, bounds.gradients, note),
    }


def check_step_size(
    engine: Engine, objective: Objective, rows: Rows, joined: Batch, bounds: Bounds
) -> dict[str, Finding]:
    """Loss and gradient norm of two micro-batches against those of one, where gradients are spread over processes."""
    normalizer = max(1, objective.normalizer(joined) * engine.num_data_ranks)
    one, two = (engine.rehearse(batches, normalizer, lambda: None) for batches in ([joined], rows.trained))
    if one is None or two is None:
        return {"micro_batches": not_made("this engine makes a step with its update only")}
    apart = max(_apart(two[0], one[0]), _apart(two[1], one[1]))
    return {"micro_batches": within(apart, bounds.gradients)}


def _presence(
    model: VisionLanguageModel, gradients: Gradients, reads_image: bool, waits: Collection[str] = ()
) -> Finding:
    """waits: parts that get their gradient from replies of the model's own, which there are none of yet."""
    named = model.named_parameters()
    trained = {name for name, parameter in named if parameter.requires_grad and part_of(name) not in waits}
    frozen = sorted(gradients.norms.keys() - trained)
    if frozen:
        return holds(f"frozen, with a gradient: {canonical_name(frozen[0])} and {len(frozen) - 1} more")
    unused = {f"llm.{name}" for name in outside_decoder(model.llm)}
    missing = sorted(trained - gradients.norms.keys() - unused)
    missing = [name for name in missing if not MAY_LACK_GRADIENT & set(name.split("."))]
    missing = [name for name in missing if reads_image or part_of(name) not in IMAGE_PARTS]
    if missing:
        return holds(f"trained, without a gradient: {canonical_name(missing[0])} and {len(missing) - 1} more")
    for part in sorted({part_of(name) for name in trained}):
        norms = [norm for name, norm in gradients.norms.items() if part_of(name) == part]
        if not all(map(math.isfinite, norms)):
            return holds(f"the gradient of {part} is not finite")
        if not any(norms) and (reads_image or part not in IMAGE_PARTS):
            return holds(f"the gradient of {part} is 0")
    return holds("")


def is_written_out(objective: Objective) -> bool:
    """Whether its loss is computed here a second time, from the records themselves."""
    return isinstance(objective, LanguageModeling)


def expected_normalizer(objective: Objective, rows: Rows) -> int:
    """Of both records."""
    if is_written_out(objective):
        return sum(len(_targets(record)) for record in rows.records)
    return sum(map(objective.normalizer, rows.trained))


def _summed_loss(probe: StateProbe, objective: Objective, states: Tensor, batch: Batch, record: Record) -> Tensor:
    """Of language modelling written out once more: the token at n is predicted by the state at n - 1.

    Args:
        states: [1, L, D], the final hidden states of the record.
    """
    if not is_written_out(objective):
        with probe.autocast():
            head = Head(probe.model.logits, values=probe.model.values)
            return objective.loss(states, batch.to(states.device), head).loss
    places = _targets(record)
    targets = torch.tensor([record.example.input_ids[place] for place in places], device=states.device)
    with probe.autocast():
        logits = probe.model.logits(states[0, torch.tensor(places, device=states.device) - 1])
        return F.cross_entropy(logits.float(), targets, reduction="none").sum()


def _targets(record: Record) -> list[int]:
    return [place for place, label in enumerate(record.example.labels) if place and label != IGNORE_INDEX]


def _apart(found: float, expected: float) -> float:
    difference = abs(found - expected) / max(abs(expected), 1e-6)
    return difference if math.isfinite(difference) else math.inf
