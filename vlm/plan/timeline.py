"""The peak of one optimizer step, found by walking through it part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlm.plan.blocks import Part


@dataclass(frozen=True)
class Moment:
    """What lives beside weights and optimizer state at one moment. Bytes."""

    where: str
    activations: int
    gradients: int
    buffers: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.buffers


def peak(
    parts: Sequence[Part], *, base: int = 0, bool_mask: int = 0, gradients_stay: bool, num_in_flight: int = 1,
    gradient_share: float = 1.0, reduced: int = 0, backward_buffers: int = 0,
) -> Moment:  # fmt: skip
    """The moment of an optimizer step at which most lives.

    Args:
        parts: in the order of the forward.
        base: bytes that live all the time, such as the micro-batch.
        bool_mask: bytes of the attention mask: it lives through the forward, and with checkpointing until its end.
        gradients_stay: gradients of a micro-batch before are there already, as from the second micro-batch on.
        num_in_flight: micro-batches whose activations a pipeline stage holds.
        gradient_share: of each gradient that this device keeps after it was reduced.
        reduced: bytes of reduced gradients that the optimizer reads beside those.
        backward_buffers: bytes that live during the backward only.
    """
    moments = [Moment("optimizer", base, _kept(parts, gradient_share) + reduced)]
    whole = _kept(parts, gradient_share) if gradients_stay else 0
    waiting = (num_in_flight - 1) * sum(part.saved + part.saved_copies for part in parts)
    moments += _forward(parts, base + bool_mask + waiting, whole)
    has_recomputed = any(part.recomputed for part in parts)
    back = _backward(parts, base + (bool_mask if has_recomputed else 0) + waiting, gradients_stay, gradient_share)
    moments += [replace(moment, buffers=backward_buffers) for moment in back]
    return max(moments, key=lambda moment: moment.total)


def _kept(parts: Sequence[Part], share: float) -> int:
    return int(share * sum(part.gradients for part in parts))


def _forward(parts: Sequence[Part], base: int, gradients: int) -> list[Moment]:
    moments, live = [], base
    for part in parts:
        own = max(part.copies, part.saved_copies)
        moments.append(Moment(f"forward, {part.name}", live + part.saved + own + part.forward, gradients))
        live += part.saved + own
    return moments


def _backward(parts: Sequence[Part], base: int, gradients_stay: bool, share: float) -> list[Moment]:
    moments = []
    live = base + sum(part.saved + part.saved_copies for part in parts)
    gradients = _kept(parts, share) if gradients_stay else 0
    for part in reversed(parts):
        own = 0 if gradients_stay else part.early
        now = live + part.recomputed
        moments.append(Moment(f"backward, {part.name}", now + part.backward, gradients + own))
        if part.making:
            moments.append(Moment(f"gradient, {part.name}", now + part.making, gradients))
        live -= part.saved + part.saved_copies
        gradients += 0 if gradients_stay else int(share * part.gradients)
        moments.append(Moment(f"after {part.name}", live, gradients))
    return moments
