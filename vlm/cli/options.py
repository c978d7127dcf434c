"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

ImageOrderOption = Annotated[
    Literal["auto", "first", "last", "keep"],
    typer.Option(
        "--image-order",
        help="Images before or after words, or as they come; auto: as in training. 图片在文字前、后或按原顺序。",
    ),
]


def image_order_of(
    option: Literal["auto", "first", "last", "keep"],
) -> Literal["first", "last", "keep"] | None:
    """As `vlm.load` takes it."""
    return None if option == "auto" else option
