"""Commands whose output the page shows: run apart, so that nothing they load stays, and what they print is the same."""

from __future__ import annotations

import base64
import html
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.text import Text

from vlm.apps.studio.draft import Draft

SECONDS = 300.0  # a command may take; the first plan on a machine measures it
_WIDTH = 100  # columns that it prints for

# as rich names the colours of a terminal: green, cyan, red, yellow
_CLASSES = {"color(2)": "reply", "color(6)": "image", "color(1)": "bad", "color(3)": "bad", "dim": "read"}

# arguments of `vlm` -> exit code, what it printed
Call = Callable[[Sequence[str]], tuple[int, str]]


@dataclass(frozen=True)
class Preview:
    """Records as training will see them."""

    html: str
    sheet: str = ""  # data: URL of the images as the encoder sees them; empty without images
    is_right: bool = True


def call(arguments: Sequence[str]) -> tuple[int, str]:
    """Run `vlm` to its end. Returns its exit code and all that it printed, colours as terminal codes."""
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": str(_WIDTH)}
    environment.pop("NO_COLOR", None)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "vlm.cli.main", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=environment, timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 1, f"error: it took more than {SECONDS:.0f} s, and was ended"
    return done.returncode, done.stdout.decode("utf-8", errors="replace")


def plan(draft: Draft, run: Call = call) -> str:
    """What `vlm plan` prints, or why it cannot."""
    _, output = run(draft.arguments("plan"))
    return Text.from_ansi(_without_noise(output)).plain.strip()


def preview(draft: Draft, records: int, run: Call = call) -> Preview:
    """What `vlm data preview` shows."""
    with tempfile.TemporaryDirectory(prefix="vlm-studio-") as folder:
        sheet = Path(folder) / "preview.png"
        code, output = run([*draft.arguments("data preview"), "-n", str(records), "--out", str(sheet)])
        image = base64.b64encode(sheet.read_bytes()).decode() if sheet.is_file() else ""
    lines = [line for line in _without_noise(output).split("\n") if str(sheet) not in line]
    return Preview(to_html("\n".join(lines)), image and f"data:image/png;base64,{image}", code == 0)


def to_html(output: str) -> str:
    """What a terminal would show, escaped: rules become headings; supervised tokens get the class `reply`."""
    parts: list[str] = []
    for line in Text.from_ansi(output.strip()).split("\n", allow_blank=True):
        heading = re.fullmatch(r"\s*─+ (.+?) ─+\s*", line.plain)
        if heading:
            parts.append(f"<h4>{html.escape(heading[1])}</h4>")
        else:
            parts.append(f"<div>{''.join(map(_run_to_html, _runs(line))) or '&nbsp;'}</div>")
    return "".join(parts)


def _runs(line: Text) -> list[tuple[str, str]]:
    """(text, CSS class) of the stretches of a line that look alike."""
    edges = sorted({0, len(line.plain), *(edge for span in line.spans for edge in (span.start, span.end))})
    found = []
    for start, end in pairwise(edges):
        styles = " ".join(str(span.style) for span in line.spans if span.start <= start < span.end)
        found.append((line.plain[start:end], _class_of(styles)))
    return found


def _class_of(styles: str) -> str:
    """
    >>> _class_of("bold color(2)"), _class_of("dim"), _class_of("color(6)"), _class_of("")
    ('reply', 'read', 'image', '')
    """
    return next((name for style, name in _CLASSES.items() if style in styles), "")


def _run_to_html(run: tuple[str, str]) -> str:
    text, name = run
    return f'<span class="{name}">{html.escape(text)}</span>' if name else html.escape(text)


def _without_noise(output: str) -> str:
    """Without what libraries print of themselves."""
    noise = re.compile(r"^\[\d{4}-\d\d-\d\d .*\] \[(WARNING|INFO)\]|^\S*Warning: ")
    return "\n".join(line for line in output.split("\n") if not noise.match(line))
