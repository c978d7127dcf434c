"""The demo's pictures, each with its names and its kind: OpenMoji, and Tux Paint's stamps."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

SIDE = 256  # pixels; what is larger is scaled down
VARIATION = "\ufe0f"
SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
FLAGS_PER_ONE_KEPT = 3  # of 270 flags: all of them would outnumber everything else

# Stamps by the start of their folder; what is not listed has no clear kind and is used for captions alone.
STAMP_KINDS = {
    "animals": "animal",
    "clothes": "object",
    "food": "food",
    "hobbies": "object",
    "household": "object",
    "medical": "object",
    "military/vehicles": "vehicle",
    "people/body_parts": None,
    "people": "person",
    "plants/mushrooms": None,
    "plants": "plant",
    "sports": "object",
    "symbols/faces": "face",
    "symbols": "symbol",
    "town/flags": "flag",
    "town/houses": "place",
    "town/monuments": "place",
    "town/roadsigns": "symbol",
    "vehicles": "vehicle",
}
# Words whose pictures are near copies of each other: hearts of all colours, clocks of all hours.
NEAR_COPIES = ("heart", "square", "circle", "clock", "o'clock", "thirty", "keycap", "moon", "button", "arrow", "globe")
# Near copies of other stamps, letter by letter.
STAMPS_LEFT_OUT = re.compile(r"outlined|alphabets/(german|spanish)|/filled/lowercase")
STAMPS_PER_FOLDER = 24  # of 65 cartoon houses and the like


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
    flags = 0
    for character, data in sorted(emoji.EMOJI_DATA.items()):
        plain = character.replace(VARIATION, "")
        svg = _svg_of(svgs, character)
        if data["status"] != emoji.STATUS["fully_qualified"] or SKIN_TONES.search(character) or svg is None:
            continue
        english = _clean(data["en"])
        if plain not in kind_of and "♂" not in plain and "♀" not in plain:
            kind_of.setdefault(plain, None)
        if _is_gendered_copy(english, plain):
            continue
        if kind_of.get(plain) == "flag":
            flags += 1
            if flags % FLAGS_PER_ONE_KEPT:
                continue
        pictures.append(
            Picture(
                name=f"emoji/{svg.stem}.png",
                source=svg,
                english=_sentence(english.removeprefix("flag: ") if kind_of.get(plain) != "flag" else _flag(english)),
                chinese=_clean(data["zh"]) + "。" if "zh" in data else None,
                kind=kind_of.get(plain),
                family=_family(english, kind_of.get(plain)),
            )
        )
    return pictures


def stamp_pictures(root: Path) -> list[Picture]:
    """Tux Paint's stamps that come with a sentence."""
    pictures = []
    per_folder: dict[str, int] = {}
    for text in sorted(root.rglob("*.txt")):
        folder = text.parent.relative_to(root).as_posix()
        source = next((p for p in (text.with_suffix(".png"), text.with_suffix(".svg")) if p.exists()), None)
        if source is None or STAMPS_LEFT_OUT.search(f"{folder}/"):
            continue
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        english = lines[0].strip() if lines else ""
        chinese = next((line.partition("=")[2].strip() for line in lines if line.startswith("zh_CN.utf8=")), None)
        per_folder[folder] = per_folder.get(folder, 0) + 1
        if not english or "�" in english or len(english) > 90 or per_folder[folder] > STAMPS_PER_FOLDER:
            continue
        pictures.append(
            Picture(
                name=f"stamps/{folder.replace('/', '-')}-{text.stem}.png",
                source=source,
                english=_sentence(english),
                chinese=chinese or None,
                kind=next((kind for start, kind in STAMP_KINDS.items() if folder.startswith(start)), None),
                family=f"stamp {folder if 'houses' in folder else english.casefold()}",
            )
        )
    return pictures


def render(picture: Picture, target: Path) -> None:
    """Write the picture as PNG on white, at most SIDE pixels a side."""
    import resvg_py
    from PIL import Image

    from vlm.data.images import load_image

    content: bytes | str = str(picture.source)
    if picture.source.suffix == ".svg":
        content = bytes(resvg_py.svg_to_bytes(svg_path=str(picture.source), width=SIDE))
    image = load_image(content)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".part")
    image.save(temporary, format="PNG")
    temporary.rename(target)


def _svg_of(svgs: Path, character: str) -> Path | None:
    for text in (character, character.replace(VARIATION, "")):
        path = svgs / ("-".join(f"{ord(c):04X}" for c in text) + ".svg")
        if path.exists():
            return path
    return None


def _clean(name: str) -> str:
    """`:grinning_face:` -> `grinning face`."""
    return name.strip(":").replace("_", " ").replace("’", "'").strip()


def _flag(english: str) -> str:
    return f"the flag of {english}" if "flag" not in english else english


def _sentence(text: str) -> str:
    """
    >>> _sentence("red apple")
    'Red apple.'
    """
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?" else f"{text}."


def _is_gendered_copy(english: str, character: str) -> bool:
    """`man running` and `woman running` beside `person running`."""
    is_sequence = "\u200d" in character
    return is_sequence and ("♂" in character or "♀" in character or bool(re.match(r"(man|woman)\b", english)))


def _family(english: str, kind: str | None) -> str:
    """Words that tell near copies apart are dropped: gender, colour of hearts and squares, the hour of a clock."""
    text = re.sub(r"\b(man|woman|men|women|person|people|boy|girl|mr|mrs|mx)\b", "person", english.casefold())
    for word in (
        "heart",
        "square",
        "circle",
        "clock",
        "o'clock",
        "thirty",
        "keycap",
        "moon",
        "button",
        "arrow",
        "globe",
    ):
        if re.search(rf"\b{word}\b", text):
            return {"o'clock": "clock", "thirty": "clock"}.get(word, word)
    if kind == "person":
        text = re.sub(r"\b(with .*|facing right|holding hands)\b", "", text)
        text = "family" if text.startswith(("family", "couple", "kiss")) else text
    return text.strip()
