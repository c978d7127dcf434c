"""The kinds of evaluation tasks, one section of the config and one line of `TASKS` each. Heavy imports are late."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from vlm.schema import KindSection, PathText

if TYPE_CHECKING:
    from vlm.data.tokenize import ConversationTokenizer
    from vlm.evaluation.metrics import Figure
    from vlm.evaluation.questions import Question


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

    metric: ClassVar[str] = "accuracy"
    has_blank: ClassVar[bool] = False  # computed with white images too: one more pass over the records

    def questions(self, tokenizer: ConversationTokenizer, cache: Path, seed: int = 0) -> list[Question]:
        """Read and tokenize the records.

        Args:
            seed: of what is drawn.

        Raises:
            DataError: no records, or one that cannot be used (with its place).
        """
        raise NotImplementedError

    def groups(self, questions: Sequence[Question]) -> Mapping[Any, Any] | None:
        """By image: what it may be exchanged within, when images are shuffled; None: anything."""
        return None

    def figure(self, questions: Sequence[Question], scores: list[list[float]]) -> Figure:
        """
        Args:
            scores: of every reply of every question, the sum of its tokens' log probabilities.
        """
        from vlm.evaluation.metrics import accuracy

        return accuracy(scores, [question.answer for question in questions])

    def baseline(self, questions: Sequence[Question]) -> tuple[float | None, str]:
        """What a model that never looks would reach, and its name; None and "" where that is not known."""
        return None, ""


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

    def questions(self, tokenizer: ConversationTokenizer, cache: Path, seed: int = 0) -> list[Question]:
        from vlm.evaluation.questions import loss_question, open_records, read_conversations

        source = open_records(self.path, self.images, self.max_records, cache, as_training=True)
        return [loss_question(conversation, tokenizer) for conversation in read_conversations(source, self.name)]

    def figure(self, questions: Sequence[Question], scores: list[list[float]]) -> Figure:
        from vlm.evaluation.metrics import loss_per_token
        from vlm.evaluation.questions import num_counted

        return loss_per_token([-score[0] for score in scores], [num_counted(question) for question in questions])


TASKS: dict[str, type[TaskConfig]] = {"choice": ChoiceTask, "ranking": RankingTask, "loss": LossTask}
