"""One word for each thing: docs/glossary.md. A retired word in code or docs fails here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RETIRED = {
    r"pictures?|Pictures?": "image",
    r"[Rr]ooms (?:of|that)|(?:data|models|training|evaluation|this|each|own) room": "package",
    r"learning_rate: Callable|lr_scale": "a schedule gives the factor of each group's initial_lr",
    r"dearest|drowns? among|for want of|in vain": "plain words",
    r"EpochPlan|FragmentState|load_init_stage": "what came in their place",
}
FILES = [*(ROOT / "vlm").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
ALLOWED = {
    ("docs/glossary.md", "picture"),  # named there as retired
    ("vlm/evaluation/predict.py", "Picture"),  # an earlier name
    ("vlm/data/media.py", "picture"), ("vlm/data/marks.py", "picture"),  # words of other people's files
}  # fmt: skip


@pytest.mark.parametrize("word", RETIRED)
def test_no_retired_word_is_left(word):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r}; say {RETIRED[word]}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in re.finditer(rf"(?<![A-Za-z])(?:{word})(?![A-Za-z])", line)
        if (path.relative_to(ROOT).as_posix(), match[0]) not in ALLOWED
    ]
    assert not found, "\n".join(["", *found])
