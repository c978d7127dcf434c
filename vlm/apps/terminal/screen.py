"""What the terminal chat writes: coloured at a terminal, plain elsewhere, never a control code of the model's."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm.apps.terminal.thumbnail import choose_protocol, escape_sequence, fit_cells, half_blocks
from vlm.data.images import load_image

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line end
_THUMBNAIL = (40, 10)  # columns and rows at most


def printable(text: str) -> str:
    """Text of a model or a file without control codes, which could change the title, the colours or the clipboard.

    >>> printable("a\\x1b]52;c;aGk=\\x07b\\n")
    'a]52;c;aGk=b\\n'
    """
    return _CONTROL.sub("", text)


@dataclass
class Screen:
    """Writes lines, pieces of a reply, tables and images to `out`."""

    out: TextIO = field(default_factory=lambda: sys.stdout)
    console: Console = field(init=False)

    def __post_init__(self) -> None:
        reconfigure = getattr(self.out, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")  # Chinese in a Latin-1 terminal
        self.console = Console(file=self.out, markup=False, highlight=False, emoji=False, soft_wrap=True)

    @property
    def is_terminal(self) -> bool:
        return self.out.isatty()

    def say(self, text: str, style: str = "") -> None:
        self.write(text + "\n", style)

    def write(self, text: str, style: str = "") -> None:
        text = printable(text)
        if style and self.is_terminal:
            self.console.print(Text(text, style=style), end="")
        else:
            self.out.write(text)
        self.out.flush()

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Columns side by side; at a terminal, long cells are wrapped inside their column."""
        clean = [[printable(cell) for cell in row] for row in rows]
        if self.is_terminal:
            grid = Table.grid(padding=(0, 2))
            for number in range(len(clean[0])):
                grid.add_column(no_wrap=number == 0, style="cyan" if number == 0 else "", overflow="fold")
            for row in clean:
                grid.add_row(*(Text(cell) for cell in row))
            self.console.print(grid, soft_wrap=False)
            return
        widths = [max(cell_len(row[number]) for row in clean) for number in range(len(clean[0]))]
        for row in clean:
            padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
            self.say("  ".join(padded).rstrip())

    def clear(self) -> None:
        if self.is_terminal:
            self.console.clear()
            self.out.write("\033[3J")  # what was scrolled off as well
            self.out.flush()

    def show_image(self, image: str | bytes) -> None:
        """A thumbnail, where the terminal can show one.

        Raises:
            RecordError: the image cannot be read.
            ConfigError: VLM_THUMBNAIL holds no known protocol.
        """
        if not self.is_terminal:
            return
        protocol = choose_protocol(os.environ, self.console.color_system, self.out.encoding)
        if protocol == "none":
            return
        opened = load_image(image)
        columns, rows = fit_cells(opened.size, min(_THUMBNAIL[0], self.console.width - 1), _THUMBNAIL[1])
        if protocol == "blocks":
            self.console.print(half_blocks(opened, columns, rows))
        else:
            self.out.write(escape_sequence(opened, protocol, columns, rows) + "\n")
            self.out.flush()
