"""Written answers -> figures. No models here: texts and numbers only. Packages are imported when a metric needs them.

Chinese is cut into words by jieba (ROUGE) or into characters by sacrebleu's own rule (BLEU).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from vlm.data.said import letter_of
from vlm.errors import DataError, MissingPackageError

if TYPE_CHECKING:
    from vlm.evaluation.metrics import Figure

Answers = Sequence[str]  # of a record: what would be right, at least one
Figures = dict[str, "Figure"]

_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {"none": "0"} | {name: str(number) for number, name in enumerate(_DIGITS)}
_PUNCTUATION = set(';/[]"{}()=+\\_-><@`,?!')  # what VQA's comparison drops
_YES = {"yes", "yeah", "true", "correct"}
_NO = {"no", "not", "false", "incorrect"}
_CHINESE_NO = ("不", "否", "没", "错")
_CHINESE_YES = ("是", "有", "对", "正确")
_DOUBLE_NO = re.compile("(?:没有?|不)错(?!误)")  # "quite right"
_TOLERANCE = 0.05  # of a number, in `relaxed_accuracy`


@dataclass(frozen=True)
class TextMetric:
    """One way to score written answers.

    Attributes:
        figures: (written, right) -> figures by name, the first of which counts where one is asked for.
        names: of the figures.
        packages: imported by it, with the names under which pip has them.
        has_majority: always giving the most frequent answer is a baseline of the first figure.
        why_unfit: what is wrong with the answers of a record for it; empty: nothing.
    """

    figures: Callable[[Sequence[str], Sequence[Answers]], Figures]
    names: tuple[str, ...]
    packages: tuple[tuple[str, str], ...] = ()
    has_majority: bool = True
    why_unfit: Callable[[Answers], str] = lambda answers: ""

    def check_installed(self, name: str) -> None:
        """Raises MissingPackageError."""
        for package, listed in self.packages:
            if find_spec(package) is None:
                raise MissingPackageError(listed, f"metric {name}", "eval")

    def baseline(self, right: Sequence[Answers]) -> float | None:
        """The first figure of always giving the most frequent answer; None where that says nothing."""
        if not self.has_majority or not right:
            return None
        (most, _), *_ = Counter(answers[0] for answers in right).most_common(1)
        return next(iter(self.figures([most] * len(right), right).values())).value


def exact_match(written: str, right: Answers) -> float:
    """1 if it is one of the answers but for case, spaces and what ends the sentence, else 0.

    >>> exact_match(" A red  circle", ["a red circle."])
    1.0
    """
    return float(_plain(written) in map(_plain, right))


def prefix_match(written: str, right: Answers) -> float:
    """1 if it begins with one of the answers, character by character, else 0.

    >>> prefix_match("B. A red circle", ["B"]), prefix_match("12", ["1"]), prefix_match("b", ["B"])
    (1.0, 1.0, 0.0)
    """
    return float(any(answer and written.startswith(answer) for answer in right))


def vqa_accuracy(written: str, right: Answers) -> float:
    """A third for each of the people who answered so, at most 1; the mean over all leaving one of them out.

    Texts are compared as VQA does: without case, punctuation, articles, and number words as digits. Apostrophes are
    left out, where VQA has a table of contractions.

    >>> round(vqa_accuracy("the dog", ["dog"] * 3 + ["cat"] * 7), 3), vqa_accuracy("two", ["2"])
    (0.9, 1.0)
    """
    given, answers = _vqa_plain(written), [_vqa_plain(answer) for answer in right]
    if len(answers) == 1:
        return float(given == answers[0])
    matches = answers.count(given)
    others = [matches - (answer == given) for answer in answers]
    return sum(min(1.0, count / 3) for count in others) / len(others)


def relaxed_accuracy(written: str, right: Answers) -> float:
    """1 if a number is within 5 % of the answer's, or a text is the same but for case and spaces; of ChartQA.

    >>> relaxed_accuracy("10.4", ["10"]), relaxed_accuracy("12%", ["0.12"]), relaxed_accuracy("11", ["10"])
    (1.0, 1.0, 0.0)
    """
    return max(_is_close(written, answer) for answer in right)


def is_yes(text: str) -> bool | None:
    """Whether an answer says yes, by POPE's rule: the first sentence says no if one of its words is no or not.

    None where neither is said.

    >>> [is_yes(text) for text in ("Yes, there is.", "There is no dog. Yes.", "是的", "没有", "A dog")]
    [True, False, True, False, None]
    """
    first = re.split(r"[.。!！\n]", unicodedata.normalize("NFKC", text).strip(), maxsplit=1)[0].lower()
    first = _DOUBLE_NO.sub("对", first)
    words = set(re.findall(r"[a-z']+", first))
    if words & _NO or any(word.endswith("n't") for word in words) or any(sign in first for sign in _CHINESE_NO):
        return False
    return True if words & _YES or any(sign in first for sign in _CHINESE_YES) else None


def words_of(text: str) -> list[str]:
    """Words in lower case, of Chinese by jieba; punctuation left out.

    >>> words_of("A red circle, 2 cats.")
    ['a', 'red', 'circle', '2', 'cats']
    """
    text = unicodedata.normalize("NFKC", text).lower()
    if not _CHINESE.search(text):
        return re.findall(r"\w+", text)
    import jieba

    jieba.setLogLevel("ERROR")  # it tells how long it took to load
    return [word for word in jieba.cut(text) if re.search(r"\w", word)]


class _Words:
    """What rouge_score calls a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words_of(text)


def _bleu(written: Sequence[str], right: Sequence[Answers]) -> Figures:
    """Of the corpus, from 0 to 1; its standard error is a jackknife over the records."""
    from sacrebleu.metrics.bleu import BLEU

    from vlm.evaluation.metrics import jackknife

    is_chinese = any(_CHINESE.search(answer) for answers in right for answer in answers)
    bleu = BLEU(tokenize="zh" if is_chinese else "13a", effective_order=True)
    scores = [bleu.sentence_score(text, list(answers)) for text, answers in zip(written, right, strict=True)]
    sums = [[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores]

    def value(total: Sequence[float]) -> float:
        counts = [round(number) for number in total]
        score = BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp")
        return min(1.0, float(score.score) / 100)

    return {"BLEU-4": jackknife(sums, value)}


def _rouge(written: Sequence[str], right: Sequence[Answers]) -> Figures:
    """F-measures, of the answer that fits best, averaged over the records."""
    from rouge_score.rouge_scorer import RougeScorer

    from vlm.evaluation.metrics import mean

    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    scorer = RougeScorer([*names], tokenizer=_Words())
    scores = [scorer.score_multi(list(answers), text) for text, answers in zip(written, right, strict=True)]
    return {shown: mean([score[name].fmeasure for score in scores]) for name, shown in names.items()}


def _averaged(
    name: str, score: Callable[[str, Answers], float], why_unfit: Callable[[Answers], str] = lambda answers: ""
) -> TextMetric:
    def figures(written: Sequence[str], right: Sequence[Answers]) -> Figures:
        from vlm.evaluation.metrics import mean

        return {name: mean([score(text, answers) for text, answers in zip(written, right, strict=True)])}

    return TextMetric(figures, (name,), why_unfit=why_unfit)


def _no_letter(answers: Answers) -> str:
    return "" if all(letter_of(answer) for answer in answers) else "is not the letter of a choice"


def _neither(answers: Answers) -> str:
    return "is neither yes nor no" if is_yes(answers[0]) is None else ""


def _same_letter(written: str, right: Answers) -> float:
    if reason := _no_letter(right):
        raise DataError(f"metric choice_letter: the answer {right[0]!r} of a record {reason}")
    return float(letter_of(written) in map(letter_of, right))


def _yes_no(written: Sequence[str], right: Sequence[Answers]) -> Figures:
    """As POPE has them: yes is what is looked for; an answer that says neither is wrong and counts as no."""
    from vlm.evaluation.metrics import jackknife, mean

    said, true = [is_yes(text) for text in written], [is_yes(answers[0]) for answers in right]
    if None in true:
        raise DataError(f"metric yes_no: the answer {right[true.index(None)][0]!r} of a record is neither yes nor no")
    pairs = list(zip(said, true, strict=True))
    sums = [[bool(one) and bool(other), bool(one), bool(other)] for one, other in pairs]  # true positives, said, are

    def ratio(top: float, bottom: float) -> float:
        return top / bottom if bottom else 0.0

    return {
        "accuracy": mean([float(one is other) for one, other in pairs]),
        "precision": jackknife(sums, lambda total: ratio(total[0], total[1])),
        "recall": jackknife(sums, lambda total: ratio(total[0], total[2])),
        "F1": jackknife(sums, lambda total: ratio(2 * total[0], total[1] + total[2])),
        "yes ratio": mean([float(one is True) for one in said]),
    }


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).lower().split()).rstrip(".。!！ ")


def _vqa_plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).lower().replace("'", "").replace("\u2019", "")
    text = re.sub(r"(?<=\d),(?=\d)|\.(?!\d)", "", text)
    text = "".join(" " if sign in _PUNCTUATION else sign for sign in text)
    return " ".join(_NUMBERS.get(word, word) for word in text.split() if word not in ("a", "an", "the"))


def _is_close(written: str, answer: str) -> float:
    given, wanted = _number(written), _number(answer)
    if given is None or not wanted:  # nothing is within 5 % of zero
        return float(_plain(written) == _plain(answer))
    return float(abs(given - wanted) <= _TOLERANCE * abs(wanted))


def _number(text: str) -> float | None:
    """None of what is none, or not finite."""
    text = text.strip().rstrip(".").replace(",", "")
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


TEXT_METRICS: dict[str, TextMetric] = {
    "bleu": TextMetric(_bleu, ("BLEU-4",), (("sacrebleu", "sacrebleu"),), has_majority=False),
    "rouge": TextMetric(
        _rouge, ("ROUGE-1", "ROUGE-2", "ROUGE-L"), (("rouge_score", "rouge-score"), ("jieba", "jieba")),
        has_majority=False,
    ),
    "exact_match": _averaged("exact match", exact_match),
    "prefix_match": _averaged("prefix match", prefix_match),
    "vqa_accuracy": _averaged("VQA accuracy", vqa_accuracy),
    "relaxed_accuracy": _averaged("relaxed accuracy", relaxed_accuracy),
    "yes_no": TextMetric(_yes_no, ("accuracy", "precision", "recall", "F1", "yes ratio"), why_unfit=_neither),
    "choice_letter": _averaged("accuracy by letter", _same_letter, _no_letter),
}  # fmt: skip
