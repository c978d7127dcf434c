"""An image in a terminal: by a graphics protocol where there is one, else in half blocks of two colours.

Protocols: kitty (https://sw.kovidgoyal.net/kitty/graphics-protocol), iTerm2 (https://iterm2.com/documentation-images),
sixel (DEC, VT3xx manual). Terminals are told by the variables they set; nothing is asked of them, as an answer could be
lost among what the user types.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
from PIL import Image
from rich.color import Color
from rich.style import Style
from rich.text import Text

from vlm.errors import ConfigError

Protocol = Literal["kitty", "iterm2", "sixel", "blocks", "none"]
VARIABLE = "VLM_THUMBNAIL"  # set by the user, it overrules what is found out
_CELL = (8, 16)  # pixels of a character cell, for protocols that count pixels; nearly all fonts are twice as high
_KITTY_CHUNK = 4096  # most bytes of base64 per escape sequence
_SIXEL_COLORS = 64


def choose_protocol(environ: Mapping[str, str], color_system: str | None, encoding: str) -> Protocol:
    """How this terminal can show an image.

    Args:
        color_system: rich's name for the colours it has; None for none.
        encoding: of the output.

    Raises:
        ConfigError: VLM_THUMBNAIL holds no known protocol.
    """
    asked = environ.get(VARIABLE, "")
    if asked:
        if asked not in get_args(Protocol):
            raise ConfigError(f"{VARIABLE}={asked}: expected one of {', '.join(get_args(Protocol))}")
        return asked  # type: ignore[return-value]
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    is_inside = "TMUX" in environ or term.startswith(("screen", "tmux"))  # these swallow other programs' graphics
    if not is_inside:
        if "KITTY_WINDOW_ID" in environ or "kitty" in term or "ghostty" in (program, *term.split("-")):
            return "kitty"
        if program in ("iTerm.app", "WezTerm", "mintty") or environ.get("LC_TERMINAL") == "iTerm2":
            return "iterm2"
        if term.startswith(("foot", "mlterm", "contour")) or "KONSOLE_VERSION" in environ or "sixel" in term:
            return "sixel"
    has_blocks = encoding.lower().replace("-", "").startswith("utf")
    return "blocks" if has_blocks and color_system in ("truecolor", "256") else "none"


def fit_cells(size: tuple[int, int], columns: int, rows: int) -> tuple[int, int]:
    """The largest number of columns and rows, at least one each, that keeps the image's shape.

    >>> fit_cells((224, 224), 40, 10), fit_cells((400, 100), 40, 10), fit_cells((1, 5000), 40, 10)
    ((20, 10), (40, 5), (1, 10))
    """
    width, height = size
    scale = min(columns * _CELL[0] / width, rows * _CELL[1] / height)
    return max(1, round(width * scale / _CELL[0])), max(1, round(height * scale / _CELL[1]))


def half_blocks(image: Image.Image, columns: int, rows: int) -> Text:
    """RGB image -> `rows` lines of upper half blocks: the letter's colour above, the background's below."""
    pixels = np.asarray(image.resize((columns, 2 * rows), Image.Resampling.LANCZOS))
    text = Text(no_wrap=True)
    for row in range(rows):
        for top, bottom in zip(pixels[2 * row].tolist(), pixels[2 * row + 1].tolist(), strict=True):
            text.append("▀", Style(color=Color.from_rgb(*top), bgcolor=Color.from_rgb(*bottom)))
        text.append("\n")
    text.right_crop()
    return text


def escape_sequence(image: Image.Image, protocol: Protocol, columns: int, rows: int) -> str:
    """RGB image -> what shows it in `columns` x `rows` character cells."""
    small = image.resize((columns * _CELL[0], rows * _CELL[1]), Image.Resampling.LANCZOS)
    if protocol == "sixel":
        return _sixel(small)
    stream = io.BytesIO()
    small.save(stream, format="PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    if protocol == "iterm2":
        size = f"size={len(stream.getvalue())};width={columns};height={rows}"
        return f"\033]1337;File=inline=1;{size};preserveAspectRatio=0:{data}\a"
    chunks = [data[start : start + _KITTY_CHUNK] for start in range(0, len(data), _KITTY_CHUNK)]
    head = f"a=T,f=100,q=2,c={columns},r={rows},"  # q=2: the terminal does not answer
    return "".join(
        f"\033_G{head if number == 0 else ''}m={int(number < len(chunks) - 1)};{chunk}\033\\"
        for number, chunk in enumerate(chunks)
    )


def _sixel(image: Image.Image) -> str:
    """Bands of six rows; in each, one run-length coded line per colour."""
    paletted = image.quantize(_SIXEL_COLORS)
    palette = np.asarray(paletted.getpalette(), dtype=int).reshape(-1, 3)
    indexes = np.asarray(paletted)
    height, width = indexes.shape
    out = [f'\033Pq"1;1;{width};{height}']
    out += [f"#{n};2;{';'.join(str(value * 100 // 255) for value in palette[n])}" for n in np.unique(indexes)]
    for top in range(0, height, 6):
        band = indexes[top : top + 6]
        weights = 1 << np.arange(len(band))
        lines = [
            f"#{color}" + _run_lengths(((band == color) * weights[:, None]).sum(0) + 63) for color in np.unique(band)
        ]
        out.append("$".join(lines) + "-")
    return "".join(out) + "\033\\"


def _run_lengths(codes: np.ndarray) -> str:
    """
    >>> _run_lengths(np.array([63, 63, 63, 63, 64]))
    '!4?@'
    """
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    lengths = np.diff(starts, append=len(codes))
    return "".join(
        f"!{length}{chr(code)}" if length > 3 else chr(code) * length
        for code, length in zip(codes[starts].tolist(), lengths.tolist(), strict=True)
    )
