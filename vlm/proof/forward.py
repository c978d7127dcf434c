"""Checks of what the model computes: who sees whom, and where images go. Forward passes only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vlm.batch import Batch
from vlm.models.entry import embedding_std
from vlm.proof.checks import Finding, at_least, at_most, not_made
from vlm.proof.probe import Probe, StateProbe, relative
from vlm.proof.records import Record, Subject, images_moved, other_images, reads_image

NO_SECOND = "there is only one record that can be read"
NO_IMAGE = "no image in the first records"
NOT_READ = "no image stands before a reply in the first records"
NOT_SHARED = "records share no image in this run, or the first one does not begin with its image"
FEW_TOKENS = "the record has too few words"
# What reads its input must differ by this when the input does. What does not read it computes the same numbers again:
# 0 in every dtype. Smallest seen: 0.02 of states, 0.003 nats (untrained toy models).
READS = 1e-6
# Records that see each other differ by 0.3 and more, so a bound above that would let them pass.
ROUGHEST = 0.3
TOO_ROUGH = "rounding alone moves this model too far to tell; set train.precision to fp32 to have it checked"


@dataclass(frozen=True)
class Bounds:
    """How far two ways to compute the same may lie apart."""

    states: float  # hidden states, relative; and losses, nats per token
    gradients: float  # relative
    loss: float  # relative

    def widened(self, rounding: float) -> Bounds:
        """For a model whose states move by `rounding` when its inputs move by the last bit of the dtype.

        Other kernels, or another order of summation, move them by 0.7 to 0.9 of that (fp32, fp16 and bf16; Llama,
        Qwen2, Qwen3 and Gemma 2 of 24 random blocks; eager attention against SDPA).
        """
        return Bounds(max(self.states, 4 * rounding), max(self.gradients, 4 * rounding), max(self.loss, rounding / 2))


@dataclass(frozen=True)
class Rows:
    """The batches that are compared, and where each record lies in them.

    `packed` holds both records in one row, `alone` each in a batch of its own.
    """

    records: list[Record]
    packed: Batch
    alone: list[Batch]
    trained: list[Batch]  # the same with all replies that the objective reads
    shared: Batch | None  # the first record twice, see `Subject.shared`
    image_token_id: int | None

    @classmethod
    def of(cls, subject: Subject, image_token_id: int | None) -> Rows:
        records = subject.computed
        alone = [subject.batch([[record]]) for record in records]
        trained = [
            batch if record.trained == record.example else subject.steps([[record]], shares=False)
            for record, batch in zip(records, alone, strict=True)
        ]
        return cls(records, subject.batch([records]), alone, trained, subject.shared(records[0]), image_token_id)

    def words(self, number: int, packed: bool) -> Tensor:
        """bool [1, L]: the tokens of a record that are text, its first one left out."""
        batch = self.packed if packed else self.alone[number]
        start = sum(len(record.example.input_ids) for record in self.records[:number]) if packed else 0
        at = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        at[0, start + 1 : start + len(self.records[number].example.input_ids)] = True
        return at if self.image_token_id is None else at & (batch.input_ids != self.image_token_id)

    def replies(self, number: int, packed: bool) -> Tensor:
        """bool [1, L]: the tokens of a record that have labels."""
        batch = self.packed if packed else self.alone[number]
        return self.words(number, packed) & (batch.labels >= 0)

    def reads_image(self, number: int) -> bool:
        return reads_image(self.records[number].example, self.image_token_id)

    @property
    def num_images(self) -> list[int]:
        """Of each record. Not of the batches: only the first stage of a pipeline reads pixels, and all must agree."""
        return [len(record.example.images) for record in self.records]


def measure_rounding(probe: Probe, rows: Rows, embedding: nn.Module, dtype: torch.dtype) -> float:
    """What the model makes of the last bit: every word's embedding is multiplied by 1 plus or minus half of it."""
    generator = torch.Generator().manual_seed(0)

    def nudge(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        """[B, L, D] -> the same, each number half a last bit larger or smaller."""
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output.device) * 2 - 1
        factor = 1 + signs.double() * torch.finfo(dtype).eps / 2
        return (output.double() * factor).to(output.dtype)

    last = len(rows.records) - 1
    batch, words = rows.alone[last], rows.words(last, False)
    if not words.any():
        return 0.0
    probe.difference(batch, words, batch, words)  # computed before it is nudged
    hook = embedding.register_forward_hook(nudge)
    try:
        return probe.difference(replace(batch), words, batch, words)
    finally:
        hook.remove()


def within(measured: float, bound: float, note: str = "") -> Finding:
    """At most a bound that rounding has widened, unless so far that it would let a fault pass."""
    return at_most(measured, bound, note) if bound <= ROUGHEST else not_made(TOO_ROUGH)


def has_experts(model: nn.Module) -> bool:
    """Whether tokens share out among experts, as the classes or names of modules say."""
    return any("expert" in type(module).__name__.lower() + name for name, module in model.named_modules())


def check_packing(probe: Probe, rows: Rows, bounds: Bounds) -> dict[str, Finding]:
    if len(rows.records) < 2:
        return {"packed_alone": not_made(NO_SECOND)}
    differences = [
        probe.difference(rows.packed, rows.words(n, True), rows.alone[n], rows.words(n, False))
        for n in range(len(rows.records))
        if rows.words(n, False).any()
    ]
    return {"packed_alone": within(max(differences), bounds.states) if differences else not_made(FEW_TOKENS)}


def check_sharing(probe: Probe, rows: Rows, bounds: Bounds) -> dict[str, Finding]:
    """Of the record that begins with another one's tokens, what comes after its first own token."""
    if rows.shared is None:
        return {"shared_image": not_made(NOT_SHARED)}
    whole = len(rows.records[0].example.input_ids)
    own = rows.shared.input_ids.numel() - rows.shared.num_padding - whole
    if own < 2:
        return {"shared_image": not_made(FEW_TOKENS)}
    here, there = torch.zeros_like(rows.shared.labels, dtype=torch.bool), rows.words(0, False)
    here[0, whole + 1 : whole + own] = True
    there = there & (torch.arange(there.shape[1]) > whole - own)
    return {"shared_image": within(probe.difference(rows.shared, here, rows.alone[0], there), bounds.states)}


def check_causality(probe: Probe, rows: Rows, bounds: Bounds) -> dict[str, Finding]:
    """Change one word in the middle of the last record: what comes before stays, what comes after does not.

    Two batches of one shape go through the same kernels, so rounding has no part in the difference.
    """
    last = len(rows.records) - 1
    batch, words = rows.alone[last], rows.words(last, False)
    places = words.nonzero()[:, 1]
    if len(places) < 4:
        return dict.fromkeys(("causal", "context"), not_made(FEW_TOKENS))
    middle = int(places[(len(places) - 1) // 2])
    other = next((place for place in places if batch.input_ids[0, place] != batch.input_ids[0, middle]), None)
    if other is None:
        return dict.fromkeys(("causal", "context"), not_made(FEW_TOKENS))
    ids = batch.input_ids.clone()
    ids[0, middle] = batch.input_ids[0, int(other)]
    changed = replace(batch, input_ids=ids)
    index = torch.arange(words.shape[1])
    # what predicts the middle word has not seen it; the word itself predicts the next one, whatever it sees
    before, after = words & (index <= middle), words & (index > middle + 1)
    findings = {"causal": at_most(probe.difference(changed, before, batch, before), bounds.states)}
    enough = bool(after.any())
    findings["context"] = (
        at_least(probe.difference(changed, after, batch, after), READS) if enough else not_made(FEW_TOKENS)
    )
    return findings


def check_images(probe: Probe, rows: Rows, bounds: Bounds) -> dict[str, Finding]:
    """Put noise in the place of the first record's images. Rounding has no part here either."""
    if not rows.num_images[0]:
        return dict.fromkeys(("own_image", "image_read"), not_made(NO_IMAGE))
    changed = other_images(rows.packed, rows.num_images[0])
    replies = rows.replies(0, True)
    findings = {"own_image": not_made(NO_SECOND)}
    if len(rows.records) > 1 and rows.words(1, True).any():
        words = rows.words(1, True)
        findings["own_image"] = at_most(probe.difference(changed, words, rows.packed, words), bounds.states)
    findings["image_read"] = (
        at_least(probe.difference(changed, replies, rows.packed, replies), READS)
        if rows.reads_image(0)
        else not_made(NOT_READ)
    )
    return findings


def check_order_by_loss(probe: Probe, rows: Rows, bounds: Bounds) -> dict[str, Finding]:
    """Exchange the images of two records: each then computes what it computes alone with the other's."""
    if len(rows.records) < 2 or not rows.num_images[0] or rows.num_images[0] != rows.num_images[1]:
        return {"feature_order": not_made(f"{NO_IMAGE}, or two records of them with different numbers")}
    exchanged = images_moved(rows.packed, rows.num_images[0])
    alone = replace(
        rows.alone[0],
        pixel_values=rows.alone[1].pixel_values,
        image_features=rows.alone[1].image_features,
    )
    found = probe.difference(exchanged, rows.words(0, True), alone, rows.words(0, False))
    return {"feature_order": within(found, bounds.states)}


@torch.no_grad()
def check_features(probe: StateProbe, rows: Rows, bounds: Bounds) -> dict[str, Finding]:
    """Compare what stands at the placeholders of the packed row with the features of each record's images alone."""
    if not any(rows.num_images):
        return dict.fromkeys(("feature_order", "projector_scale"), not_made(NO_IMAGE))
    model, packed = probe.model, rows.packed.to(probe.device)
    assert model.projector is not None
    with probe.autocast():
        embeddings = model.inputs_embeds(packed.input_ids, packed.pixel_values, packed.image_features, packed.device)
        expected = [
            (model.projector(batch.image_features) if batch.pixel_values is None
             else model.encode_images(batch.pixel_values)).flatten(0, -2)
            for batch in (alone.to(probe.device) for alone in rows.alone)
            if batch.num_images
        ]  # fmt: skip
    found = embeddings[packed.input_ids == rows.image_token_id]
    scale = found.float().std() / max(embedding_std(model.llm), 1e-12)
    return {
        "feature_order": within(relative(found, torch.cat(expected)), bounds.states),
        "projector_scale": _scale(scale.item()),
    }


def _scale(ratio: float) -> Finding:
    """Within 1e-4 to 1e4 of the token embeddings. Seen: 0.1 to 40, after training too."""
    if not ratio > 1e-4:  # NaN too
        return at_least(ratio, 1e-4, "standard deviation over that of the token embeddings")
    return at_most(ratio, 1e4, "standard deviation over that of the token embeddings")
