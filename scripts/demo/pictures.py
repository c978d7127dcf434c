"""The demo's pictures, each with its names and its kind: OpenMoji, and Tux Paint's stamps."""

from __future__ import annotations

import collections
import json
import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SIDE = 256  # pixels; what is larger is scaled down
VARIATION = "\ufe0f"
SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
FLAGS_PER_ONE_KEPT = 3  # of 270 flags: all of them would outnumber everything else
LONGEST_CAPTION = 60  # characters; longer stamp sentences tell stories that no picture shows

# Stamps by the start of their folder; the first that fits counts. None: no clear kind, used for captions alone.
STAMP_KINDS = {
    "animals/mammals/bears/": None,  # teddy bears among bears
    "animals/birds/cartoon": None,
    "animals": "animal",
    "clothes": "object",
    "food": "food",
    "hobbies": "object",
    "household": "object",
    "medical": "object",
    "people/body_parts": None,
    "people/cartoon": None,  # a snowman and a scarecrow among people
    "people/toys": None,
    "people": "person",
    "plants/mushrooms": None,
    "plants/flowers/plastic": None,
    "plants": "plant",
    "sports/cartoon": None,
    "sports": "object",
    "symbols/alphabets/asl": None,
    "symbols/alphabets": "symbol",
    "symbols/chess": "object",
    "symbols/faces": "face",
    "symbols/math": "symbol",
    "symbols/money/00_symbols": "symbol",
    "symbols/money": "object",
    "symbols/music": "symbol",
    "symbols/shapes": "symbol",
    "town/flags": "flag",
    "town/houses": "place",
    "town/monuments": None,
    "town/roadsigns": "symbol",
    "vehicles": "vehicle",
}
STAMPS_WITHOUT_KIND = re.compile(r"wheel|tire\b|sign\.|emblem|tooth|button|apple core")  # parts of things, mostly
STAMPS_LEFT_OUT = re.compile(r"outlined|alphabets/(german|spanish)|/filled/lowercase")  # near copies, letter by letter
STAMPS_PER_FOLDER = {"symbols/alphabets": 12}  # enough letters

# Pictures that share such a word are taken for one thing that differs in colour, hour or direction.
FAMILY_WORDS = (
    "heart|square|circle|clock|o'clock|thirty|keycap|moon|button|arrow|globe|banknote|medal|mailbox|book|"
    "sign for the letter|the letter|canadian|european coin|us|japanese yen|note|cloud"
)
# Root mean square difference of two pictures at 32 x 32, RGB from 0 to 1. Below it lie the faces that differ in their
# eyes alone and the two-coloured flags; pairs of different things start at about 0.1.
NEAR_COPY = 0.09


@dataclass(frozen=True)
class Picture:
    """One picture. `family` names what must not be split between training and test: near copies of one thing."""

    name: str  # file name below the images folder
    source: Path
    english: str
    chinese: str | None
    kind: str | None
    family: str


def emoji_pictures(svgs: Path, kinds_file: Path) -> list[Picture]:
    """OpenMoji's pictures that have a name in English; no skin tones, no second copies by gender."""
    import emoji

    emoji.config.load_language("zh")
    kind_of = {
        character: kind
        for kind, characters in json.loads(kinds_file.read_text(encoding="utf-8")).items()
        for character in characters.split(" ")
    }
    pictures = []
    num_flags = 0
    for character, data in sorted(emoji.EMOJI_DATA.items()):
        svg = _svg_of(svgs, character)
        if data["status"] != emoji.STATUS["fully_qualified"] or SKIN_TONES.search(character) or svg is None:
            continue
        english, chinese = clean_name(data["en"]), clean_name(data.get("zh", ""))
        kind = kind_of.get(character.replace(VARIATION, ""))
        if _is_gendered_copy(english, character):
            continue
        if kind == "flag":
            num_flags += 1
            if num_flags % FLAGS_PER_ONE_KEPT:
                continue
            if "flag" not in english:  # a country's name alone
                english, chinese = f"the flag of {english}", chinese and f"{chinese}的旗帜"
        pictures.append(
            Picture(
                name=f"emoji/{svg.stem}.png",
                source=svg,
                english=sentence(english),
                chinese=f"{chinese}。" if chinese else None,
                kind=kind,
                family=family_of(english, kind),
            )
        )
    return pictures


def stamp_pictures(root: Path) -> list[Picture]:
    """Tux Paint's stamps that come with a short sentence."""
    pictures = []
    per_folder: collections.Counter[str] = collections.Counter()
    for text in sorted(root.rglob("*.txt")):
        folder = text.parent.relative_to(root).as_posix()
        source = next((p for p in (text.with_suffix(".png"), text.with_suffix(".svg")) if p.exists()), None)
        if source is None or STAMPS_LEFT_OUT.search(f"{folder}/"):
            continue
        english, chinese = read_stamp_text(text.read_text(encoding="utf-8", errors="replace"))
        if english is None:
            continue
        per_folder[folder] += 1
        if any(folder.startswith(start) and per_folder[folder] > most for start, most in STAMPS_PER_FOLDER.items()):
            continue
        pictures.append(
            Picture(
                name=f"stamps/{folder.replace('/', '-')}-{text.stem}.png",
                source=source,
                english=english,
                chinese=chinese,
                kind=None if STAMPS_WITHOUT_KIND.search(english) else stamp_kind(folder),
                family=f"stamp {family_of(english.rstrip('.'), None)}",
            )
        )
    return pictures


def stamp_kind(folder: str) -> str | None:
    """
    >>> stamp_kind("vehicles/ship"), stamp_kind("plants/mushrooms"), stamp_kind("seasonal")
    ('vehicle', None, None)
    """
    return next((kind for start, kind in STAMP_KINDS.items() if f"{folder}/".startswith(start)), None)


def read_stamp_text(text: str) -> tuple[str | None, str | None]:
    """The first sentence in English and in Chinese; None where there is none, or none that is short.

    >>> read_stamp_text("A bulldozer. It pushes dirt.\\nde.utf8=Ein Bulldozer.\\nzh_CN.utf8=推土机。它推土。")
    ('A bulldozer.', '推土机。')
    """
    lines = text.splitlines()
    english = re.split(r"(?<=[a-z][.!?])\s+(?=[A-Z0-9])", lines[0].strip())[0] if lines else ""
    if not english or "�" in english or not english[0].isalnum() or len(english) > LONGEST_CAPTION:
        return None, None
    chinese = next((line.partition("=")[2].strip() for line in lines if line.startswith("zh_CN.utf8=")), "")
    chinese = re.split(r"(?<=[。！？])(?=.)", chinese)[0]
    return sentence(english), chinese or None


def join_look_alikes(pictures: Sequence[Picture], thumbnails: Sequence[np.ndarray]) -> list[Picture]:
    """Put pictures that look the same into one family, whatever their names.

    Args:
        thumbnails: of each picture, from `render`.
    """
    import numpy as np

    thumbs = np.stack(thumbnails).reshape(len(pictures), -1).astype(np.float32) / 255
    squares = (thumbs**2).mean(1)
    distances = squares[:, None] + squares - 2 * (thumbs @ thumbs.T) / thumbs.shape[1]  # squared
    alike = distances < NEAR_COPY**2
    # A picture with a near copy joins that copy's family; chains of them end in the first one's.
    family = [picture.family for picture in pictures]
    for number, other in np.argwhere(np.tril(alike, -1)):
        old, new = family[number], family[other]
        if old != new:
            family = [new if name == old else name for name in family]
    return [replace(picture, family=name) for picture, name in zip(pictures, family, strict=True)]


def render_all(pictures: Sequence[Picture], images: Path) -> Iterator[np.ndarray | str]:
    """Write every picture below `images`, several at a time. Yields its thumbnail, or why it could not be drawn."""
    context = multiprocessing.get_context("spawn")  # forked, it could hang in a lock of torch's threads
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        yield from pool.map(partial(_render_below, images), pictures, chunksize=32)


def render(picture: Picture, target: Path) -> np.ndarray:
    """Write the picture as PNG on white, at most SIDE pixels a side.

    Returns:
        its thumbnail, uint8 [32, 32, 3].

    Raises:
        ValueError: resvg cannot draw the SVG; a dozen of the stamps state no size.
        RecordError: the file is no picture.
    """
    import numpy as np
    import resvg_py
    from PIL import Image

    from vlm.data.images import load_image

    content: bytes | str = str(picture.source)
    if picture.source.suffix == ".svg":
        content = bytes(resvg_py.svg_to_bytes(svg_path=str(picture.source), width=SIDE))
    image = load_image(content)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(target, format="PNG", compress_level=1)
    return np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BOX))


def _render_below(images: Path, picture: Picture) -> np.ndarray | str:
    from vlm.errors import RecordError

    try:
        return render(picture, images / picture.name)
    except (ValueError, RecordError) as error:
        return str(error)


def clean_name(name: str) -> str:
    """
    >>> clean_name(":grinning_face:")
    'grinning face'
    """
    return name.strip(":").replace("_", " ").replace("’", "'").strip()


def sentence(text: str) -> str:
    """
    >>> sentence("red apple")
    'Red apple.'
    """
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?" else f"{text}."


def family_of(english: str, kind: str | None) -> str:
    """The name without what tells near copies apart: gender, colour of hearts and squares, the hour of a clock.

    >>> family_of("blue heart", "symbol"), family_of("man dancing", "person"), family_of("red apple", "food")
    ('heart', 'person dancing', 'red apple')
    """
    text = re.sub(r"\b(man|woman|men|women|person|people|boy|girl|mr|mrs|mx)\b", "person", english.casefold())
    if found := re.search(rf"\b({FAMILY_WORDS})\b", text):
        return {"o'clock": "clock", "thirty": "clock"}.get(found[0], found[0])
    if kind == "person":
        text = re.sub(r"\b(with .*|facing right|holding hands)\b", "", text)
        text = "family" if text.startswith(("family", "couple", "kiss")) else text
    return text.strip()


def _svg_of(svgs: Path, character: str) -> Path | None:
    for text in (character, character.replace(VARIATION, "")):
        path = svgs / ("-".join(f"{ord(c):04X}" for c in text) + ".svg")
        if path.exists():
            return path
    return None


def _is_gendered_copy(english: str, character: str) -> bool:
    """`man running` and `woman running` beside `person running`."""
    is_sequence = "\u200d" in character
    return is_sequence and ("♂" in character or "♀" in character or bool(re.match(r"(man|woman)\b", english)))
