"""What a written answer says, where only a part of it counts."""

from __future__ import annotations

import re
import unicodedata

# a small letter before other words may be the article: it counts in brackets or at the very end
_SAYS_LETTER = re.compile(
    r"(?:(?i:answer|option|choice)(?![a-z])|答案|选项|选)\s*(?i:is|是|为|:)?\s*\(?([A-Z](?![A-Za-z])|[a-z](?=\)|\W*$))"
)
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def letter_of(text: str) -> str | None:
    """The choice that an answer names: "B", "(B)", "B.", "B: a cat", "The answer is B". None if it names none.

    >>> [letter_of(text) for text in ("B", "(b) a cat", "The answer is C.", "A cat.", "选 D", "none")]
    ['B', 'B', 'C', None, 'D', None]
    """
    text = unicodedata.normalize("NFKC", text).strip()
    if begins := re.match(r"\(?([A-Za-z])(?:[).:,、]|$)", text):
        return begins[1].upper()
    said = _SAYS_LETTER.findall(text)
    return said[-1].upper() if said else None


def last_number(text: str) -> float | None:
    """The last number of an answer, after all that was reckoned; None if it has none.

    >>> [last_number(text) for text in ("2 + 2 = 4.", "1,234.5 m", "-3", "#### 42", "none")]
    [4.0, 1234.5, -3.0, 42.0, None]
    """
    found = _NUMBER.findall(unicodedata.normalize("NFKC", text))
    return float(found[-1].replace(",", "")) if found else None
