"""Every error this package raises on purpose, each with the exit code of a command that ends with it.

A message says where (file, record, key), what was got, what was expected, the usual cause and the next command.
`vlm.cli` prints the message without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

from typing import Self


class VLMError(Exception):
    """Base class. `exit_code` is what a command returns when this error ends it.

    `everywhere`: all processes of the launch raise it together, so that one of them prints it.
    """

    exit_code = 1
    everywhere = False

    def on_every_rank(self) -> Self:
        """The same error, marked: every process of the launch finds it by itself."""
        self.everywhere = True
        return self


class ConfigError(VLMError):
    """The config or the command line is wrong; found before any weight is loaded."""

    exit_code = 2


class MissingPackageError(ConfigError):
    """An optional package is not installed. Names the pip command that installs it."""

    everywhere = True  # the processes of a launch are alike

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install -e '.[{extra}]'")


class DataError(VLMError):
    """The data as a whole cannot be used: nothing supervised, too many bad records, a source that is no data file."""

    exit_code = 3


class RecordError(DataError):
    """One record cannot be used. Training skips it, counts it and writes it to skipped.jsonl.

    Args:
        rule: short stable name of the rule that was broken, e.g. "image_missing".
        message: what was got and what was expected.
        where: file and record, e.g. "records.json: record 1841". May be added later with `at`.
    """

    def __init__(self, rule: str, message: str, where: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.rule = rule
        self.message = message
        self.where = where

    def at(self, where: str) -> RecordError:
        """The same error with its place named; a place that is already known is kept."""
        return self if self.where else RecordError(self.rule, self.message, where)

    def saying(self, more: str) -> RecordError:
        """The same error with something added to its message."""
        return RecordError(self.rule, self.message + more, self.where)

    def __reduce__(self) -> tuple[type[RecordError], tuple[str, str, str]]:  # crosses worker processes
        return RecordError, (self.rule, self.message, self.where)


class TrainingDiverged(VLMError):
    """The loss or the gradient norm is not finite. Raised before the optimizer step, so the weights are intact."""

    exit_code = 4
    everywhere = True


class CheckpointError(VLMError):
    """A checkpoint or export is missing, damaged, or of another model."""

    exit_code = 5


class GateFailed(VLMError):
    """A model was measured, and does not reach what `evaluation.tasks[].gate` demands: usually it does not use its
    images."""

    exit_code = 6


class DistributedError(VLMError):
    """Another process of the launch was lost or hangs. Names where each rank was; the same command resumes."""


class RunLocked(ConfigError):
    """Another process is training in the same run folder."""


class Preempted(VLMError):
    """SIGTERM or Ctrl-C arrived; the step was finished and a checkpoint written."""

    exit_code = 143
    everywhere = True
