"""The checks by name: what each means, what usually breaks it, and what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlm.errors import ConfigError


@dataclass(frozen=True)
class Check:
    meaning: str  # what holds when it passes
    cause: str  # what usually breaks it
    remedy: str


_MODEL = "set model.llm.attention to sdpa or eager, set data.packing to false, or take another model.llm.path"
_RECORDS = "look at `vlm data preview CONFIG`, then at data.template and data.system"

CHECKS = {
    "labels": Check(
        "labels are each reply's own tokens and nothing else",
        "a template whose pieces are marked wrongly, or labels that were moved",
        _RECORDS,
    ),
    "end_token": Check(
        "every reply ends with a learned token that generation stops at",
        "a template without an end token, or one of another model family",
        "name the model's own template in data.template",
    ),
    "text": Check(
        "the token ids, decoded, are the conversation as the template writes it",
        "a begin token written twice, a system prompt that is dropped, or a tokenizer of another model",
        _RECORDS,
    ),
    "placeholders": Check(
        "a record has as many placeholders as its images have features",
        "a projector or encoder that was changed after the data was tokenized",
        "remove data.cache, and check model.vision.image_size and model.projector.unshuffle",
    ),
    "positions": Check(
        "positions count from 0 in every record", "rows put together without regard to records", "report it as a bug"
    ),
    "padding": Check(
        "batches hold the records' own ids and labels, and padding has no label",
        "padding that is labelled, or labels that moved while rows were put together",
        "report it as a bug",
    ),
    "pixels": Check(
        "what the encoder reads is the record's own image, normalised as the encoder was trained",
        "a mean and std of another encoder, features cached with another one, or an image that was replaced",
        "compare the encoder's preprocessor_config.json, and remove data.cache",
    ),
    "packed_alone": Check(
        "a record behind another one computes what it computes alone",
        "a decoder that carries state or positions across records",
        _MODEL,
    ),
    "shared_image": Check(
        "a record that shares the image of another one computes what it computes alone",
        "attention that does not follow where records begin",
        "set data.share_images to false, and report it as a bug",
    ),
    "causal": Check("no token sees a later one", "attention without a causal mask", _MODEL),
    "context": Check("a token sees the earlier ones of its record", "attention that sees single tokens only", _MODEL),
    "own_image": Check(
        "another image in one record changes no other record", "features that are put in the wrong record", _MODEL
    ),
    "image_read": Check(
        "another image changes the record's own replies",
        "features that are zero, constant, or not put in",
        "check model.vision.layer, and the projector of init_from",
    ),
    "feature_order": Check(
        "the n-th feature stands at the n-th placeholder", "features in another order", "report it as a bug"
    ),
    "projector_scale": Check(
        "projected features are finite and of the size of words",
        "an encoder with extreme outputs, or a projector that was not initialised",
        "set model.projector.normalize to true, or check init_from",
    ),
    "loss": Check(
        "the loss is the mean over the replies' tokens, each counted once",
        "labels that are shifted twice or not at all, padding that counts, or a wrong divisor",
        "report it as a bug",
    ),
    "trainable": Check(
        "what trains is what model.trainable names, and the optimizer holds exactly that",
        "a part that was frozen or freed by hand, or an optimizer that was made before",
        "check model.trainable",
    ),
    "gradients": Check(
        "every trained tensor gets a finite gradient, and no frozen one does",
        "a part that is detached from the loss, or an adapter that is not active",
        "check model.trainable and model.lora.targets",
    ),
    "frozen_steady": Check(
        "frozen parts compute the same in training as in evaluation, and keep their statistics",
        "dropout or batch statistics that are active in a frozen part",
        "set the dropout of that part to 0 in its config.json",
    ),
    "micro_batches": Check(
        "loss and gradient of a step are those of all its tokens, however it is cut into micro-batches",
        "a mean per micro-batch, or gradients that are not added up",
        "report it as a bug",
    ),
    "initial_weights": Check(
        "the weights are those of init_from's files",
        "an export of another model, or weights that were drawn anew after loading",
        "export the earlier stage again",
    ),
}


@dataclass(frozen=True)
class Finding:
    """What one check found. `passed` None: it was not made, and `note` says why."""

    passed: bool | None
    measured: float | None = None
    bound: float | None = None
    at_least: bool = False  # the bound is a lower one
    note: str = ""


def at_most(measured: float, bound: float, note: str = "") -> Finding:
    """NaN fails."""
    return Finding(measured <= bound, measured, bound, note=note)


def at_least(measured: float, bound: float, note: str = "") -> Finding:
    return Finding(measured >= bound, measured, bound, at_least=True, note=note)


def holds(problem: str) -> Finding:
    """A check without a number: it passes if there is no problem."""
    return Finding(not problem, note=problem)


def not_made(reason: str) -> Finding:
    return Finding(None, note=reason)


@dataclass(frozen=True)
class Proof:
    """All findings, in the order of `CHECKS`."""

    findings: dict[str, Finding]
    seconds: float
    facts: dict[str, object]  # versions, device, dtype, records, digest

    @property
    def failed(self) -> list[str]:
        return [name for name, finding in self.findings.items() if finding.passed is False]

    @property
    def num_passed(self) -> int:
        return sum(finding.passed is True for finding in self.findings.values())

    def as_json(self) -> dict[str, object]:
        checks = [
            {
                "name": name,
                "passed": finding.passed,
                "measured": _finite(finding.measured),
                "bound": _finite(finding.bound),
                "bound_is": "least" if finding.at_least else "most",
                "meaning": CHECKS[name].meaning,
                "note": finding.note,
            }
            for name, finding in self.findings.items()
        ]
        return {"passed": not self.failed, "seconds": round(self.seconds, 2), **self.facts, "checks": checks}

    def line(self) -> str:
        """For the log."""
        left = len(self.findings) - self.num_passed - len(self.failed)
        rest = f", {left} not made (proof.json says why)" if left else ""
        return f"proof: {self.num_passed} checks passed in {self.seconds:.1f} s{rest}"

    def table(self) -> str:
        """Markdown."""
        rows = [
            f"| {name} | {_number(finding.measured)} | {_bound(finding)} | {_RESULTS[finding.passed]} | "
            f"{_remark(name, finding)} |"
            for name, finding in self.findings.items()
        ]
        return "\n".join(["| check | measured | bound | result | |", "|---|---|---|---|---|", *rows])

    def error(self) -> ConfigError:
        """What a run that fails its proof ends with."""
        blocks = [self._block(name) for name in self.failed]
        return ConfigError(
            f"the proof found {len(blocks)} {'fault' if len(blocks) == 1 else 'faults'} before the first step:\n"
            + "\n".join(blocks)
            + "\nNothing was trained. `vlm prove CONFIG` repeats this alone; docs/proof.md explains each check; "
            "train.prove: false trains all the same"
        )

    def _block(self, name: str) -> str:
        finding, check = self.findings[name], CHECKS[name]
        measured = ""
        if finding.measured is not None:
            measured = f" (measured {_number(finding.measured)}, expected {_bound(finding)})"
        note = f" {finding.note}." if finding.note else ""
        return (
            f"  {name}{measured}: it does not hold that {check.meaning}.{note} Usually {check.cause}. "
            f"What to do: {check.remedy}"
        )


def _remark(name: str, finding: Finding) -> str:
    if finding.passed is None:
        return finding.note
    return CHECKS[name].meaning + (f" ({finding.note})" if finding.note else "")


_RESULTS = {True: "ok", False: "FAIL", None: "not made"}


def _finite(value: float | None) -> float | None:
    """JSON knows no infinity and no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _bound(finding: Finding) -> str:
    if finding.bound is None:
        return ""
    return f"at {'least' if finding.at_least else 'most'} {finding.bound:.2g}"
