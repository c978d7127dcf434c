"""The proof of a run, from its parts to proof.json. Every process of a launch makes the same calls."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch

from vlm.artifacts.evidence import PROOF
from vlm.config import RunConfig
from vlm.distributed import gather_objects, note, on_main, together, world_size
from vlm.errors import VLMError
from vlm.files import write_atomically
from vlm.logs import log
from vlm.objectives.lm import LanguageModeling
from vlm.precision import autocast
from vlm.prepare import Prepared
from vlm.proof.checks import CHECKS, Finding, Proof, at_most, holds, not_made
from vlm.proof.forward import (
    NO_IMAGE,
    ROUGHEST,
    Bounds,
    Rows,
    check_causality,
    check_features,
    check_images,
    check_order_by_loss,
    check_packing,
    check_sharing,
    has_experts,
    measure_rounding,
)
from vlm.proof.gradients import (
    check_loss,
    check_loss_by_records,
    check_step,
    check_step_size,
    reference_step,
)
from vlm.proof.parts import check_frozen, check_initial_weights, check_trainable
from vlm.proof.probe import LossProbe, StateProbe, relative
from vlm.proof.records import Subject, choose, read_record
from vlm.proof.state import unchanged
from vlm.proof.text import check_batches, check_pixels, check_text, fresh_pixels
from vlm.schema import chosen_kinds
from vlm.version import __version__

LEAST_SECONDS = 5.0  # a proof may take this long, or
SHARE_OF_RUN = 0.01  # this share of what the run is going to take
NOT_HERE = "the whole model is in no process under this engine"
# By what is computed in; see `Bounds.widened`. Worst seen on CPUs, whose kernels give a row the same numbers: 1.7e-6,
# 3.2e-6, 1.3e-7 in fp32 and bf16. Other kernels over 24 blocks: states 2e-6 apart in fp32, 4e-3 in fp16, 0.04 in bf16.
# Records that see each other differ by 0.3 and more, a wrong divisor by 0.05.
BOUNDS = {
    torch.float32: Bounds(states=1e-4, gradients=1e-3, loss=1e-5),
    torch.bfloat16: Bounds(states=0.05, gradients=0.1, loss=0.02),
    torch.float16: Bounds(states=0.01, gradients=0.05, loss=0.005),
}
TF32 = Bounds(states=5e-3, gradients=1e-2, loss=1e-3)  # of a GPU's float32, whose convolutions may round to 10 bits
Findings = dict[str, Finding]


def prove_run(parts: Prepared, run: Path) -> None:
    """Prove a run before its next step and write proof.json. A run that goes on after its proof is not proven again.

    Raises:
        ConfigError: a check fails.
    """
    if parts.start_step and on_main(lambda: _was_proven(run / PROOF, parts.config)):
        return
    proof = prove(parts)
    on_main(lambda: write_atomically(run / PROOF, json.dumps(proof.as_json(), indent=1, ensure_ascii=False) + "\n"))
    if proof.failed:
        raise proof.error().on_every_rank()
    log(proof.line())


def prove(parts: Prepared, seconds: float | None = None) -> Proof:
    """Make every check that this engine and these records allow. Leaves the run as it was, to the bit.

    Args:
        seconds: checks that have not begun by then are left out; None takes 1 % of the run, 5 s at least.
    """
    note("proof")
    with unchanged(parts.built.model, parts.config.seed):
        work = _Work(parts, seconds)
        work.check_everything()
    findings = _agree({name: work.findings.get(name, not_made("no such part here")) for name in CHECKS})
    return Proof(findings, work.clock.seconds, _facts(parts, work))


class _Clock:
    """Rank 0's, so that all processes leave out the same checks."""

    def __init__(self, limit: float | None) -> None:
        self.started = time.monotonic()
        self.limit = limit

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def is_over(self) -> bool:
        return on_main(lambda: self.limit is not None and self.seconds > self.limit)


@dataclass
class _Work:
    parts: Prepared
    seconds: float | None
    findings: Findings = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = self.parts
        self.clock = _Clock(None)
        self.dtype = on_main(lambda: _compute_dtype(parts))  # rank 0 has the encoder under every engine
        self.strict = TF32 if (self.dtype, parts.device.type) == (torch.float32, "cuda") else BOUNDS[self.dtype]
        self.bounds = self.strict  # wider once it is known how the model rounds
        data = self.parts.data
        numbers = on_main(lambda: choose(data))
        computed, others = together(lambda: [[read_record(data.train.order.scan, n) for n in part] for part in numbers])
        rejected = [record.rejected for record in computed if record.rejected is not None]
        self.subject = Subject(computed, [*computed, *others, *rejected], data.train.collator)
        self.rows = together(lambda: Rows.of(self.subject, self.parts.built.image_token_id))

    def check_everything(self) -> None:
        parts, engine, rows = self.parts, self.parts.engine, self.rows
        model, config = parts.built.model, parts.config
        self._check_inputs()
        optimizer = engine.optimizer if engine.holds_whole_model else None
        self._make("trainable", lambda: {"trainable": check_trainable(model, config.model.trainable, optimizer)})
        self._make("initial_weights", lambda: {"initial_weights": self._initial_weights()})
        wrong = [name for name in ("labels", "placeholders") if self.findings[name].passed is False]
        if wrong:
            reason = not_made(f"nothing was computed, as {' and '.join(wrong)} are wrong")
            self.findings = dict.fromkeys(CHECKS, reason) | self.findings
            return
        self._make("pixels", lambda: {"pixels": self._pixels()})
        if engine.holds_whole_model:
            probe = StateProbe(model, partial(_autocast, parts), parts.device)
            self._check_step(probe)
            self._make("frozen_steady", lambda: {"frozen_steady": check_frozen(probe, rows, self.bounds)})
            self._make("feature_order projector_scale", lambda: check_features(probe, rows, self.bounds))
            self._check_forward(probe)
        else:
            for name in ("gradients", "frozen_steady", "projector_scale"):
                self.findings[name] = not_made(NOT_HERE)
            with engine.using(LanguageModeling()):
                self._check_forward_by_losses()
            joined = self.subject.steps([[record] for record in self.subject.computed], shares=True)
            self._make("loss", lambda: check_loss_by_records(engine, parts.objective, rows, joined, self.bounds))
            self._make("micro_batches", lambda: check_step_size(engine, parts.objective, rows, joined, self.bounds))

    def _check_forward_by_losses(self) -> None:
        losses = LossProbe(self.parts.engine)
        began = time.monotonic()
        self._widen(losses)
        # two forward passes of one record; forward and backward of both take three times as long
        self._set_limit(3 * (time.monotonic() - began))
        self._check_forward(losses)
        if self.parts.data.conversation_tokenizer.reads_images:  # known on every rank
            self.findings["feature_order"] = not_made("images of unequal numbers of tiles cannot be exchanged")
        else:
            self._make("feature_order", lambda: check_order_by_loss(losses, self.rows, self.bounds))

    def _check_inputs(self) -> None:
        tokens, projector = self.parts.data.conversation_tokenizer, self.parts.built.model.projector
        spec = self.parts.built.image_spec  # on later stages of a pipeline, where there is no projector
        num_tokens = projector.num_tokens if projector is not None else None if spec is None else spec.num_tokens
        system = self.parts.config.data.system
        self._make("labels end_token text", lambda: check_text(self.subject, tokens, system))
        self._make("placeholders positions padding", lambda: check_batches(self.subject, tokens, num_tokens))

    def _check_step(self, probe: StateProbe) -> None:
        """First: its forward passes serve the others, and their time says how long the run will take."""
        engine, rows = self.parts.engine, self.rows
        began = time.monotonic()
        try:
            reference = reference_step(probe, self.parts.objective, rows)
        except ValueError as error:  # placeholders and features do not agree; said by name
            self.findings["placeholders"] = Finding(False, note=str(error).partition(";")[0])
            return
        self._set_limit(time.monotonic() - began)
        probe.model.eval()
        self._widen(probe)
        self._make("loss", lambda: check_loss(engine, self.subject, reference, self.bounds))
        step = partial(check_step, engine, probe.model, self.parts.objective, rows, reference, self.bounds)
        self._make("gradients micro_batches", step)
        probe.model.eval()

    def _widen(self, probe: StateProbe | LossProbe) -> None:
        embedding = self.parts.built.model.llm.get_input_embeddings()
        rounding = measure_rounding(probe, self.rows, embedding, self.dtype)
        self.bounds = self.bounds.widened(rounding)
        if any(gather_objects(has_experts(self.parts.built.model))):
            # another word sends other tokens to an expert, whose product then rounds the rest another way too
            self.strict = replace(self.strict, states=min(self.bounds.states, ROUGHEST))

    def _check_forward(self, probe: StateProbe | LossProbe) -> None:
        rows = self.rows
        self._make("packed_alone", lambda: check_packing(probe, rows, self.bounds))
        self._make("shared_image", lambda: check_sharing(probe, rows, self.bounds))
        self._make("causal context", lambda: check_causality(probe, rows, self.strict))
        self._make("own_image image_read", lambda: check_images(probe, rows, self.strict))

    def _make(self, names: str, check: Callable[[], Findings]) -> None:
        """Make some checks, unless time is up. One that cannot be made on this model does not stop the run."""
        if self.clock.is_over():
            over = not_made(f"the {self.clock.limit:.0f} s that a proof may take here were over")
            self.findings |= dict.fromkeys(names.split(), over)
            return
        try:
            self.findings |= check()
        except (VLMError, RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            if world_size() > 1:  # the others would wait for what this rank has left out
                raise
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self.findings |= dict.fromkeys(names.split(), not_made(f"it could not be made ({reason})"))

    def _set_limit(self, seconds: float) -> None:
        """From the time of forward and backward passes over the two records."""
        tokens = sum(batch.input_ids.numel() for batch in self.rows.alone)
        train, data = self.parts.config.train, self.parts.config.data
        run = seconds / tokens * train.global_batch_size * data.max_length * self.parts.max_steps
        estimate = max(LEAST_SECONDS, SHARE_OF_RUN * run)
        self.clock.limit = estimate if self.seconds is None else self.seconds

    def _initial_weights(self) -> Finding:
        init_from = self.parts.config.init_from
        if init_from is None:
            return not_made("the run starts from no export")
        if self.parts.start_step:
            return not_made("the run goes on from a checkpoint")
        return check_initial_weights(self.parts.built.model, self.parts.config.model, init_from)

    @torch.no_grad()
    def _pixels(self) -> Finding:
        vision, spec, records = self.parts.built.model.vision, self.parts.built.image_spec, self.subject.computed
        if vision is None or spec is None or not any(self.rows.num_images):
            return not_made(NO_IMAGE)
        for record in self.subject.read:
            if record.example.images != record.conversation.images:
                return holds(f"{record.example.where}: training reads other images than the record names")
        packed = self.rows.packed
        if packed.image_features is None:
            return check_pixels(packed, records, spec, vision)
        if not self.parts.engine.holds_whole_model:
            return not_made(NOT_HERE)
        with _autocast(self.parts):  # cached features: against those of the encoder
            features = vision(fresh_pixels(records, spec, vision).to(self.parts.device))
        cached = packed.image_features.to(self.parts.device)
        return at_most(relative(cached, features), max(0.1, self.bounds.states), "cached features")


def _agree(findings: Findings) -> Findings:
    """One finding of every rank's: a failure anywhere is a failure; a check that a rank made counts before none."""
    merged = dict(findings)
    for other in gather_objects(findings):
        for name, finding in other.items():
            if finding.passed is False or (merged[name].passed is None and finding.passed is True):
                merged[name] = merged[name] if merged[name].passed is False else finding
    return merged


def _compute_dtype(parts: Prepared) -> torch.dtype:
    """Of the computation; of the encoder's, if that is coarser."""
    vision = parts.built.model.vision
    own = [] if vision is None or vision.compute is None else [vision.compute.dtype]
    return max([parts.engine.autocast_dtype or torch.float32, *own], key=lambda dtype: torch.finfo(dtype).eps)


def _autocast(parts: Prepared) -> AbstractContextManager[None]:
    return autocast(parts.device.type, parts.engine.autocast_dtype)


def _facts(parts: Prepared, work: _Work) -> dict[str, object]:
    import transformers

    return {
        "digest": digest(parts.config),
        "records": [record.example.where for record in work.subject.computed],
        "step": parts.start_step,
        "engine": type(parts.engine).__name__,
        "processes": world_size(),
        "device": parts.device.type,
        "computed_in": str(work.dtype).removeprefix("torch."),
        "versions": {
            "vlm": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def digest(config: RunConfig) -> str:
    """Changes with the program's version and any key of the config that training reads.

    Keys of other kinds count with what was written, else their defaults, as when all kinds had one section.
    """
    values: dict[str, Any] = config.model_dump(mode="json", exclude={"output_dir", "evaluation"})
    for (first, *rest), union, section in chosen_kinds(config):
        if first in values:
            node = reduce(getitem, rest, values[first])
            node.update(union.foreign_values(section))
    return hashlib.sha256(json.dumps([__version__, values], sort_keys=True).encode()).hexdigest()[:16]


def _was_proven(path: Path, config: RunConfig) -> bool:
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        return bool(written["passed"]) and written["digest"] == digest(config)
    except (OSError, ValueError, KeyError, TypeError):
        return False
