"""What a reply that the model wrote is worth: the functions that a config may name. None of them is code of a config.

A reward is a number per reply, usually 0 or 1; an objective adds them up by their weights. A reward that asks a program
elsewhere may fail: it then says None, and the replies of that question are left out of the step.
"""

from __future__ import annotations

import json
import math
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from vlm.data.said import last_number, letter_of
from vlm.logs import warn
from vlm.schema import KindSection, PathText

if TYPE_CHECKING:
    from vlm.batch import Example


@dataclass(frozen=True)
class Written:
    """A reply that the model wrote, and what it was asked."""

    prompt: str  # as the template writes it, control tokens and images left out
    text: str  # of the reply
    answer: str  # of the record
    num_tokens: int  # of the reply, its end included
    is_whole: bool  # whether the model ended it; false: it was cut off
    example: Example  # prompt and reply as tokens, with the images


Reward = Callable[[Sequence[Written]], Sequence[float | None]]  # None: it could not be found out
OpenModel = Callable[[str], Reward] | None  # the folder of a reward model's export -> what asks it
_SENT = ("prompt", "text", "answer", "num_tokens", "is_whole")  # to a judge elsewhere


class RewardConfig(KindSection):
    """Base of the entries of `objective.rewards`; each kind has its own keys."""

    kind: str
    name: str | None = None
    """In the log, as reward/NAME; null takes the kind."""
    weight: float = 1.0
    """What it counts in the sum of rewards; below 0 it is a penalty."""

    @property
    def label(self) -> str:
        return self.name or self.kind

    @abstractmethod
    def build(self, open_model: OpenModel) -> Reward:
        """Raises an error where it cannot be asked at all.

        Args:
            open_model: for a reward that is another model's.
        """


class OneByOne(RewardConfig):
    """A reward of each reply by itself."""

    @abstractmethod
    def of(self, written: Written) -> float: ...

    def build(self, open_model: OpenModel = None) -> Reward:
        return lambda replies: [float(self.of(written)) for written in replies]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]


class ExactReward(OneByOne):
    kind: Literal["exact"] = "exact"
    """The reply is the answer, blanks around it aside."""
    ignore_case: bool = False
    """Whether capitals count as small letters, and a full stop at the end as none."""

    def of(self, written: Written) -> float:
        return self._plain(written.text) == self._plain(written.answer)

    def _plain(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold().rstrip(".。") if self.ignore_case else text


class ChoiceReward(OneByOne):
    kind: Literal["choice"] = "choice"
    """The reply names the letter that the answer names."""

    def of(self, written: Written) -> float:
        letter = letter_of(written.text)
        return letter is not None and letter == letter_of(written.answer)


class NumberReward(OneByOne):
    kind: Literal["number"] = "number"
    """The last number of the reply is the last one of the answer."""
    tolerance: NonNegativeFloat = 1e-6
    """Relative difference that counts as none."""

    def of(self, written: Written) -> float:
        found, right = last_number(written.text), last_number(written.answer)
        if found is None or right is None:
            return 0.0
        return math.isclose(found, right, rel_tol=self.tolerance, abs_tol=1e-12)


class RegexReward(OneByOne):
    kind: Literal["regex"] = "regex"
    """A pattern is found in the reply; what its group `answer` holds, if it has one, must be the answer."""
    pattern: Pattern
    """A regular expression of Python, e.g. "<answer>(?P<answer>.*?)</answer>"; a dot matches a line end too."""

    def of(self, written: Written) -> float:
        found = re.search(self.pattern, written.text, re.DOTALL)
        if found is None:
            return 0.0
        said = found.groupdict().get("answer")
        return said is None or said.strip() == written.answer.strip()


class FormatReward(OneByOne):
    kind: Literal["format"] = "format"
    """The whole reply is as a pattern says, whatever the answer is."""
    pattern: Pattern
    """A regular expression of Python, e.g. "<think>.*</think> *<answer>.*</answer>"; a dot matches a line end too."""

    def of(self, written: Written) -> float:
        return re.fullmatch(self.pattern, written.text.strip(), re.DOTALL) is not None


class LengthReward(OneByOne):
    kind: Literal["length"] = "length"
    """The reply has so many tokens, its end included, and is whole."""
    least: PositiveInt = 1
    """Tokens."""
    most: PositiveInt
    """Tokens."""

    @model_validator(mode="after")
    def _in_order(self) -> LengthReward:
        if self.least > self.most:
            raise ValueError(f"least {self.least} is more than most {self.most}")
        return self

    def of(self, written: Written) -> float:
        return written.is_whole and self.least <= written.num_tokens <= self.most


def _plain_address(address: str) -> str:
    parts = urlsplit(address)
    is_plain = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
    if not is_plain or parts.port == 0 or any(map(str.isspace, address)):  # asking for the port checks it
        raise ValueError(f"{address!r} is not an address such as http://127.0.0.1:8080/judge")
    return address


class HTTPReward(RewardConfig):
    kind: Literal["http"] = "http"
    """A program at an address judges: it is sent prompts, replies and answers, and sends back a number each."""
    address: Annotated[str, AfterValidator(_plain_address)]
    """Where; no other address is ever asked, and a redirection is an error."""
    timeout_seconds: PositiveFloat = 30.0
    """After so long without an answer the replies of the step's questions are left out and counted."""
    at_once: Annotated[int, Field(ge=1, le=4096)] = 256
    """Replies of one request."""

    def build(self, open_model: OpenModel = None) -> Reward:
        def judge(replies: Sequence[Written]) -> list[float | None]:
            parts = [replies[start : start + self.at_once] for start in range(0, len(replies), self.at_once)]
            return [value for part in parts for value in self._ask(part)]

        return judge

    def _ask(self, replies: Sequence[Written]) -> list[float | None]:
        try:
            rewards = post_json(
                self.address,
                {"replies": [{name: getattr(each, name) for name in _SENT} for each in replies]},
                self.timeout_seconds,
            )
            values = rewards["rewards"]
            if len(values) != len(replies) or not all(_is_finite(value) for value in values):
                raise ValueError(f"expected {len(replies)} finite numbers under rewards")
        except _FAILURES as error:
            warn(f"objective.rewards: {self.address}: {type(error).__name__}: {str(error)[:200]}; replies are left out")
            return [None] * len(replies)
        return [float(value) for value in values]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# what it sends is a stranger's: no HTTP, no JSON, JSON of another shape, numbers without end
_FAILURES = (OSError, HTTPException, ValueError, KeyError, TypeError, OverflowError, RecursionError)
_MOST_BYTES = 16 << 20  # of an answer


def post_json(address: str, content: dict[str, Any], timeout_seconds: float) -> Any:
    """What an address answers to JSON. Raises OSError where it cannot be reached, redirects, or says that it failed;
    ValueError where it answers something else than JSON."""
    from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

    class Stay(HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None  # urllib then raises the answer as an error

    request = Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with build_opener(Stay, ProxyHandler({})).open(request, timeout=timeout_seconds) as answer:
        return json.loads(answer.read(_MOST_BYTES))


class ModelReward(RewardConfig):
    kind: Literal["model"] = "model"
    """The score that a reward model gives to prompt and reply."""
    path: PathText
    """Export of a run with objective.kind reward, which reads the same tokens as the model that writes."""

    def build(self, open_model: OpenModel = None) -> Reward:
        assert open_model is not None
        return open_model(self.path)


REWARDS: dict[str, type[RewardConfig]] = {
    "exact": ExactReward,
    "choice": ChoiceReward,
    "regex": RegexReward,
    "number": NumberReward,
    "format": FormatReward,
    "length": LengthReward,
    "model": ModelReward,
    "http": HTTPReward,
}
