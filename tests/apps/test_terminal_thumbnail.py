"""Images in a terminal: which way is taken, and what is written, decoded again."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vlm.apps.terminal.thumbnail import choose_protocol, escape_sequence, half_blocks
from vlm.errors import ConfigError

RED_OVER_BLUE = Image.new("RGB", (16, 32), (255, 0, 0))
RED_OVER_BLUE.paste((0, 0, 255), (0, 16, 16, 32))


@pytest.mark.parametrize(
    ("environ", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "tmux-256color", "TERM_PROGRAM": "iTerm.app"}, "blocks"),
        ({"TERM": "xterm-kitty", "TMUX": "/run/tmux"}, "blocks"),
        ({"TERM": "xterm-kitty", "VLM_THUMBNAIL": "none"}, "none"),
    ],
)
def test_the_terminal_is_told_by_its_variables(environ: dict[str, str], protocol: str):
    assert choose_protocol(environ, "truecolor", "utf-8") == protocol


@pytest.mark.parametrize(("colors", "encoding"), [(None, "utf-8"), ("standard", "utf-8"), ("truecolor", "latin-1")])
def test_without_colours_or_the_letter_for_half_blocks_only_the_path_is_shown(colors: str | None, encoding: str):
    assert choose_protocol({}, colors, encoding) == "none"


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ConfigError, match="expected one of kitty, iterm2, sixel, blocks, none"):
        choose_protocol({"VLM_THUMBNAIL": "ascii"}, "truecolor", "utf-8")


def test_half_blocks_show_two_pixels_each():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=80)
    console.print(half_blocks(RED_OVER_BLUE, columns=2, rows=1))
    cells = re.findall(r"\033\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m(▀+)", out.getvalue())
    above, below = np.array(cells[0][:3], int), np.array(cells[0][3:6], int)
    assert (above[0] > 200, below[2] > 200) == (True, True)
    assert sum(len(cell[6]) for cell in cells) == 2


def test_kitty_and_iterm2_carry_a_png_of_the_cells_size():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    kitty = escape_sequence(noise, "kitty", 8, 4)
    chunks = re.findall(r"\033_G([^;]*);([^\033]*)\033\\", kitty)
    assert chunks[0][0] == "a=T,f=100,q=2,c=8,r=4,m=1"
    assert [head for head, _ in chunks[1:]] == ["m=1"] * (len(chunks) - 2) + ["m=0"]
    assert max(len(data) for _, data in chunks) <= 4096
    iterm2 = escape_sequence(noise, "iterm2", 8, 4)
    assert "width=8;height=4" in iterm2
    for data in ("".join(data for _, data in chunks), iterm2.partition(":")[2].rstrip("\a")):
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (64, 64)


def test_sixel_decodes_to_the_image():
    decoded = decode_sixel(escape_sequence(RED_OVER_BLUE, "sixel", 2, 2))
    assert decoded.shape == (32, 16, 3)
    assert decoded[2, 3].tolist() == [100, 0, 0]  # percent
    assert decoded[30, 15].tolist() == [0, 0, 100]


def decode_sixel(text: str) -> np.ndarray:
    """Percent of red, green and blue per pixel; only what the encoder uses."""
    match = re.fullmatch(r'\033Pq"1;1;(\d+);(\d+)(.*)\033\\', text, re.DOTALL)
    assert match is not None
    width, height, body = int(match[1]), int(match[2]), match[3]
    pixels = np.full((height, width, 3), -1)
    palette: dict[str, list[int]] = {}
    x = y = 0
    color = ""
    for number, rgb, repeat, code in re.findall(r"#(\d+)(?:;2;(\d+;\d+;\d+))?|(?:!(\d+))?([?-~$-])", body):
        if rgb:
            palette[number] = [int(value) for value in rgb.split(";")]
        elif number:
            color = number
        elif code in "$-":
            x, y = 0, y + 6 * (code == "-")
        else:
            length = int(repeat or 1)
            for bit in range(6):
                if (ord(code) - 63) >> bit & 1:
                    pixels[y + bit, x : x + length] = palette[color]
            x += length
    assert pixels.min() >= 0  # every pixel was painted
    return pixels
