"""Images of several tiles, a kind that only the tests know: the whole image, then its parts along the longer side."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar

from vlm.batch import IMAGE_SPECS, ImageLayout, ImageSpec


@dataclass(frozen=True)
class TiledSpec(ImageSpec):
    most: int = 3  # tiles beside the one of the whole image

    kind: ClassVar[str] = "tiled"
    reads_size: ClassVar[bool] = True

    def layout(self, width: int, height: int) -> ImageLayout:
        count = min(self.most, max(width, height) // max(1, min(width, height)))
        cuts = [round(max(width, height) * n / count) for n in range(count + 1)] if count > 1 else []
        parts = [(a, 0, b, height) if width > height else (0, a, width, b) for a, b in pairwise(cuts)]
        tiles = ((0, 0, width, height), *parts)
        return ImageLayout(tiles, self.num_tokens * len(tiles))

    def fingerprint(self) -> object:
        return [self.kind, self.num_tokens, self.most]


def register(monkeypatch: Any) -> None:
    """Every model that is built takes images of this kind."""
    from vlm.models import build

    original = build._image_spec
    monkeypatch.setitem(IMAGE_SPECS, TiledSpec.kind, TiledSpec)
    monkeypatch.setattr(build, "_image_spec", lambda *given: TiledSpec(**asdict(original(*given))))
