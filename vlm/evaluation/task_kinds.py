"""The kinds of evaluation tasks, one section of the config and one line of `TASKS` each. Heavy imports are late."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from vlm.schema import KindSection, PathText, Section

if TYPE_CHECKING:
    from vlm.data.tokenize import ConversationTokenizer
    from vlm.evaluation.metrics import Figure
    from vlm.evaluation.questions import OpenQuestion, Question, WritingSettings

MetricName = Literal[
    "bleu", "rouge", "exact_match", "prefix_match", "vqa_accuracy", "relaxed_accuracy", "yes_no", "choice_letter"
]  # keys of TEXT_METRICS in text_metrics.py


class GateConfig(Section):
    """What a task's figure must reach, else the command ends with exit code 6."""

    over_shuffled: PositiveFloat | None = None
    """By how much own images must be better than shuffled ones, and by twice the standard error of that."""
    over_blank: PositiveFloat | None = None
    """The same against blank images."""
    own: float | None = None
    """What own images must reach: at least so much, of a loss at most."""
    figure: str | None = None
    """Which of the task's figures, as the table names it; null takes its first."""

    @model_validator(mode="after")
    def _demands_something(self) -> GateConfig:
        if self.over_shuffled is None and self.over_blank is None and self.own is None:
            raise ValueError("a gate without over_shuffled, over_blank or own lets everything through: set one")
        return self


class TaskConfig(KindSection):
    """One figure. Each is also computed with the images shuffled among the records.

    What is answered here is right where the true one among several replies is to be the likeliest.
    """

    name: str
    """Heads its row of the table."""
    kind: str
    path: PathText
    """A data file."""
    images: PathText | None = None
    """Folder that every image must lie in; null means the folder of `path`."""
    max_records: PositiveInt | None = None
    """Take only the first so many; null takes all."""
    gate: GateConfig | None = None
    """What the figure must reach, so that a model that does not use its images is found out; null demands nothing."""

    metric: ClassVar[str] = "accuracy"
    has_blank: ClassVar[bool] = False  # computed with white images too: one more pass over the records
    lower_is_better: ClassVar[bool] = False

    @property
    def figure_names(self) -> list[str]:
        """Of `figures`, in their order."""
        return [self.metric]

    def questions(self, tokenizer: ConversationTokenizer, cache: Path, seed: int = 0) -> Sequence[Any]:
        """Read and tokenize the records; each has `images`.

        Args:
            seed: of what is drawn.

        Raises:
            DataError: no records, or one that cannot be used (with its place).
        """
        raise NotImplementedError

    def groups(self, questions: Sequence[Question]) -> Mapping[Any, Any] | None:
        """By image: what it may be exchanged within, when images are shuffled; None: anything."""
        return None

    def writing(self, seed: int) -> WritingSettings | None:
        """How the model writes answers to the questions; None: it says how likely their replies are."""
        return None

    def figures(self, questions: Sequence[Any], answers: list[Any]) -> dict[str, Figure]:
        """Figures by name; the first is the one that counts where one is asked for.

        Args:
            answers: to each question, the scores of its replies, or the text that the model wrote.
        """
        return {self.metric: self.figure(questions, answers)}

    def figure(self, questions: Sequence[Question], scores: list[list[float]]) -> Figure:
        """
        Args:
            scores: of every reply of every question, the sum of its tokens' log probabilities.
        """
        from vlm.evaluation.metrics import accuracy

        return accuracy(scores, [question.answer for question in questions])

    def baseline(self, questions: Sequence[Any]) -> tuple[float | None, str]:
        """What a model that never looks would reach, and its name; None and "" where that is not known. Of the first
        figure."""
        return None, ""

    def check_installed(self) -> None:
        """Raises MissingPackageError where a package that the task needs is missing."""


class ChoiceTask(TaskConfig):
    """Records {"image", "prompt", "choices": [..], "answer": one of them}."""

    kind: Literal["choice"] = "choice"
    """Is the true one of given choices the likeliest?"""

    def questions(self, tokenizer: ConversationTokenizer, cache: Path, seed: int = 0) -> list[Question]:
        from vlm.evaluation.questions import among, open_records, read_choices

        source = open_records(self.path, self.images, self.max_records, cache)
        return [among(record, record.choices, tokenizer) for record in read_choices(source, self.name, self.kind)]

    def baseline(self, questions: Sequence[Question]) -> tuple[float | None, str]:
        from vlm.evaluation.metrics import majority_share

        return majority_share([question.answer_text for question in questions]), "majority"


class RankingTask(TaskConfig):
    """Records {"image", "prompt", "answer"}; the other answers are drawn from the other records."""

    kind: Literal["ranking"] = "ranking"
    """Is the true answer the likeliest among those of other records?"""
    num_candidates: Annotated[int, Field(ge=2)] = 20
    """Answers among which the true one must be the likeliest."""

    def questions(self, tokenizer: ConversationTokenizer, cache: Path, seed: int = 0) -> list[Question]:
        from vlm.errors import DataError
        from vlm.evaluation.questions import among, draw_groups, open_records, read_answers

        source = open_records(self.path, self.images, self.max_records, cache)
        records = read_answers(source, self.name, self.kind)
        answers = sorted({record.answer for record in records})
        if len(answers) < self.num_candidates:
            raise DataError(
                f"evaluation task {self.name}: {self.path} has {len(answers)} different answers, num_candidates is "
                f"{self.num_candidates}. Lower num_candidates or give it more records"
            )
        groups = draw_groups(answers, self.num_candidates, seed)
        candidates = {answer: group for group in reversed(groups) for answer in group}  # the last has some of others
        return [among(record, candidates[record.answer], tokenizer) for record in records]

    def groups(self, questions: Sequence[Question]) -> Mapping[Any, Any] | None:
        """Within a group of answers, so that an image meets no candidates that it has not met as its own."""
        return {image: tuple(map(tuple, each.replies)) for each in questions for image in each.images}

    def baseline(self, questions: Sequence[Question]) -> tuple[float | None, str]:
        return 1 / self.num_candidates, "chance"


class LossTask(TaskConfig):
    """Any records that training reads."""

    kind: Literal["loss"] = "loss"
    """Nats per supervised token."""

    metric = "loss per token"
    has_blank = True
    lower_is_better = True

    def questions(self, tokenizer: ConversationTokenizer, cache: Path, seed: int = 0) -> list[Question]:
        from vlm.evaluation.questions import loss_question, open_records, read_conversations

        source = open_records(self.path, self.images, self.max_records, cache, as_training=True)
        return [loss_question(conversation, tokenizer) for conversation in read_conversations(source, self.name)]

    def figure(self, questions: Sequence[Question], scores: list[list[float]]) -> Figure:
        from vlm.evaluation.metrics import loss_per_token
        from vlm.evaluation.questions import num_counted

        return loss_per_token([-score[0] for score in scores], [num_counted(question) for question in questions])


class GenerateTask(TaskConfig):
    """Records that training reads, or a question with `answers`; the model writes its own."""

    kind: Literal["generate"] = "generate"
    """Answers that the model writes, compared with those of the records."""
    metrics: tuple[MetricName, ...] = ()
    """How they are compared; docs/evaluation.md has what each means. `vlm predict` alone needs none."""
    max_new_tokens: PositiveInt = 64
    """Length of an answer."""
    temperature: NonNegativeFloat = 0.0
    """0 writes the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of sampling: only tokens that together have this probability."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""

    has_blank = True

    def questions(self, tokenizer: ConversationTokenizer, cache: Path, seed: int = 0) -> list[OpenQuestion]:
        from vlm.evaluation.questions import open_records, read_open

        source = open_records(self.path, self.images, self.max_records, cache, as_training=True)
        questions = read_open(source, self.name, tokenizer)
        self._check_answers(questions)
        return questions

    def _check_answers(self, questions: Sequence[OpenQuestion]) -> None:
        """Before the model writes. Raises RecordError."""
        from vlm.errors import RecordError
        from vlm.evaluation.text_metrics import TEXT_METRICS

        for name in self.metrics:
            for question in questions:
                if question.answers and (reason := TEXT_METRICS[name].why_unfit(question.answers)):
                    raise RecordError(
                        "bad_task_record",
                        f"metric {name} of task {self.name}: the answer {question.answers[0]!r} {reason}; name another "
                        "metric, or mend the record",
                        question.where,
                    )

    @property
    def figure_names(self) -> list[str]:
        from vlm.evaluation.text_metrics import TEXT_METRICS

        names: list[str] = []
        for metric in self.metrics:
            names += [name if name not in names else f"{name} ({metric})" for name in TEXT_METRICS[metric].names]
        return names

    def writing(self, seed: int) -> WritingSettings:
        from vlm.evaluation.questions import WritingSettings

        return WritingSettings(self.max_new_tokens, self.temperature, self.top_p, self.stop, seed)

    def figures(self, questions: Sequence[Any], answers: list[Any]) -> dict[str, Figure]:
        from vlm.errors import ConfigError, RecordError
        from vlm.evaluation.text_metrics import TEXT_METRICS

        if not self.metrics:
            raise ConfigError(
                f"evaluation task {self.name}: no metrics. Name some, or use vlm predict, which needs none"
            )
        for question in questions:
            if not question.answers:
                raise RecordError("bad_task_record", "no answer, which the task's metrics need", question.where)
        right = [question.answers for question in questions]
        found: dict[str, Figure] = {}
        for name in self.metrics:
            for shown, figure in TEXT_METRICS[name].figures(answers, right).items():
                found[shown if shown not in found else f"{shown} ({name})"] = figure
        return found

    def baseline(self, questions: Sequence[Any]) -> tuple[float | None, str]:
        from vlm.evaluation.text_metrics import TEXT_METRICS

        value = TEXT_METRICS[self.metrics[0]].baseline([question.answers for question in questions])
        return value, "" if value is None else "majority"

    def check_installed(self) -> None:
        from vlm.evaluation.text_metrics import TEXT_METRICS

        for name in self.metrics:
            TEXT_METRICS[name].check_installed(name)


TASKS: dict[str, type[TaskConfig]] = {
    "choice": ChoiceTask, "ranking": RankingTask, "loss": LossTask, "generate": GenerateTask,
}  # fmt: skip
