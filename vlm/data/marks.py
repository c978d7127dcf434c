"""Words that stand for the place of an image, video or sound: ours, `<image>`, and those of other tools.

Of other tools anything is a mark that has the form of one. The tokens of LLaVA, MiniGPT-4, BLIP-3, InternVL,
InternLM-XComposer, XTuner, Qwen-VL to Qwen2.5-Omni, MiniCPM-V, Phi-3/4, DeepSeek-VL, Janus, Llama 3.2 and 4, Gemma 3,
Pixtral, CogVLM, GLM-4V, Idefics, SmolVLM, mPLUG-Owl, Kimi-VL, Molmo, Aria, SEED, Emu, MMMU, ms-swift and LLaMA-Factory
are in tests/data/test_marks.py.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal, NamedTuple

IMAGE_MARK = "<image>"
Medium = Literal["image", "video", "audio"]
Strength = Literal["ours", "sure", "variant", "tag"]


class Mark(NamedTuple):
    """One place in a text.

    strength: "ours" is `<image>`, alone or between another tool's start and end; "sure" can be nothing but a mark
    (`<|image_1|>`, `<ImageHere>`); "variant" is another spelling of ours (`<Image>`, `[image]`); "tag" may be HTML or
    a word to be filled in (`<img>`, `<image_name>`).
    """

    text: str
    medium: Medium
    strength: Strength
    number: int | None = None  # of the image it names, as written
    path: str | None = None  # Qwen-VL's <img>a.png</img>
    stands_apart: bool = False  # begins the text, or has a line to itself

    @property
    def is_place(self) -> bool:
        """Whether it stands for an image where one is without a place: a tag within a sentence may be a word."""
        return self.medium == "image" and (self.strength != "tag" or self.stands_apart)


Piece = str | Mark

_TOKEN = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|<{1,3}/?[A-Za-z][\w .:-]{0,40}>{1,3}"
    r"|\[/?[A-Za-z][\w ]{0,20}\]|\{{1,2}[A-Za-z][\w ]{0,20}\}{1,2}"
)
_STEMS: dict[Medium, re.Pattern[str]] = {
    "video": re.compile(r"video|(?<![a-z])(?:vid|vi|frame|clip)(?![a-z])", re.IGNORECASE),
    "audio": re.compile(r"audio|(?<![a-z])(?:sound|speech|voice|wav)(?![a-z])", re.IGNORECASE),
    "image": re.compile(
        r"image|img|vision|visual|picture|photo|(?<![a-z])(?:pic|pixel|im|boi|eoi|media)(?![a-z])", re.IGNORECASE
    ),
}
# words that only a tokenizer's vocabulary puts beside "image"
_JARGON = re.compile(
    r"here|place_?holder|token|context|pad|patch|start|end(?![a-z])|begin|[be]os(?![a-z])|(?<![a-z])[be]oi|soft|slot|embed|feature|around"
    r"|break|newline|(?<![a-z])col(?![a-z])|global",
    re.IGNORECASE,
)
_OPENS = re.compile(r"start|begin|bos|boi|around", re.IGNORECASE)
_CLOSES = re.compile(r"(?<![a-z])end|eos|eoi|around", re.IGNORECASE)
_REPEATED = re.compile(r"context|pad(?![a-z])|patch|soft", re.IGNORECASE)
_NUMBER = re.compile(r"\d+$")
_NAMED = re.compile(r"[A-Za-z]+[ _-]?\d+$")
_CHATML = ("<|im_start|>", "<|im_end|>", "<|im_sep|>")  # "im" is "message" here; <im_start> is LLaVA's image
_TILES = ("<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>")  # Llama 4's
_WRAPS = ("<img>", "<Img>", "<IMG>", "<Image>", "<image>", "<video>", "<audio>")  # with a closing tag: round something
_BETWEEN = re.compile(
    r"\./|image|video|<\|endoftext\|>|\s*"
)  # MiniCPM: <image>./</image>; Kimi: <|media_start|>image<|media_content|>
_FILE = re.compile(r"[^<>\n]{1,400}\.[A-Za-z0-9]{2,5}|[a-z]+://[^<>\s]{1,2000}|data:[^<>\s]+")


class _Token(NamedTuple):
    text: str
    start: int
    end: int
    medium: Medium
    strength: Strength

    @property
    def name(self) -> str:
        return self.text.strip("<>|[]{}/ ")

    @property
    def is_closing_tag(self) -> bool:
        return self.text.startswith(("</", "[/"))

    @property
    def opens(self) -> bool:
        return not self.is_closing_tag and (self.text in _WRAPS or bool(_OPENS.search(self.name)))

    @property
    def closes(self) -> bool:
        return self.is_closing_tag or bool(_CLOSES.search(self.name))


def find_marks(text: str) -> list[Piece]:
    """A text as its pieces: words, and marks of images, videos and sounds. Line ends beside a mark stay.

    >>> [piece if isinstance(piece, str) else piece.strength for piece in find_marks("<image>\\nIs <|image_2|>?")]
    ['ours', '\\nIs ', 'sure', '?']
    """
    tokens = _tokens(text)
    if not tokens:
        return [text] if text else []
    pieces: list[Piece] = []
    position, number, is_first = 0, 0, True
    while number < len(tokens):
        group, path = _group(text, tokens, number)
        number += len(group)
        mark, start, end = _joined(text, group, path)
        if text[position:start].strip():
            is_first = False
        apart = is_first or _has_its_line(text, start, end)
        pieces += [text[position:start], mark._replace(stands_apart=apart)]
        position = end
    pieces.append(text[position:])
    return [piece for piece in pieces if piece != ""]


def without_marks(text: str) -> str:
    """The text with a blank in every mark, so that it is read back as words.

    >>> without_marks("an <image> or <|image_1|>")
    'an < image> or < |image_1|>'
    """
    return "".join(
        piece if isinstance(piece, str) else re.sub(r"([<\[{])(?=\S)", r"\1 ", piece.text) for piece in find_marks(text)
    )


def _tokens(text: str) -> list[_Token]:
    if "<" not in text and "[" not in text and "{" not in text:
        return []
    found = ((match, _kind(match[0])) for match in _TOKEN.finditer(text))
    return [_Token(match[0], match.start(), match.end(), *kind) for match, kind in found if kind is not None]


@lru_cache(maxsize=4096)
def _kind(token: str) -> tuple[Medium, Strength] | None:
    """What a word in brackets stands for, and how surely; None if it has nothing to do with media."""
    if token in _CHATML:
        return None
    if token == IMAGE_MARK:
        return "image", "ours"
    name = token.strip("<>|[]{}/ ")
    medium = next((medium for medium, stem in _STEMS.items() if stem.search(name)), None)
    if medium is None:
        return ("image", "sure") if token in _TILES else None
    if token.startswith(("<|", "<<")) or token in ("[IMG]", "[IMG_BREAK]", "[IMG_END]"):
        return medium, "sure"
    is_word = re.fullmatch(r"image|img|picture|photo|pic", name, re.IGNORECASE) is not None
    if token[0] in "[{":
        fits = is_word or re.fullmatch(r"(?:image|img|picture)[ _]?\d+", name, re.IGNORECASE)
        is_jargon = name.isupper() and _JARGON.search(name)
        return (medium, "sure" if token.startswith("[IMG") else "variant") if fits or is_jargon else None
    if token.startswith("</"):
        return medium, "tag"
    if _NAMED.match(name) or _JARGON.search(name):
        return medium, "sure"
    return medium, "variant" if name.lower() == "image" or name == "PIC" else "tag"


def _group(text: str, tokens: list[_Token], number: int) -> tuple[list[_Token], str | None]:
    """The tokens that make one mark together, from the given one on; and the path that stands between them."""
    first = tokens[number]
    group, path = [first], None
    if number + 1 == len(tokens):
        return group, path
    following = (tokens[n] for n in range(number + 1, len(tokens)))
    if first.opens:
        for token in following:
            gap = text[group[-1].end : token.start]
            if len(group) == 1 and token.is_closing_tag and _FILE.fullmatch(gap) and not _BETWEEN.fullmatch(gap):
                path = gap
            elif not _BETWEEN.fullmatch(gap) or (token.opens and not token.closes and not _is_inside(token, group)):
                break
            group.append(token)
            if token.closes:
                break
        if first.text in _WRAPS and not group[-1].closes:  # an <img> without its end is a mark by itself
            group = group[:1]
    elif _REPEATED.search(first.name):
        for token in following:
            if token.text != first.text or token.start != group[-1].end:
                break
            group.append(token)
    return group, path


def _is_inside(token: _Token, group: list[_Token]) -> bool:
    """`<img><image></img>`: a mark of ours between another tool's start and end."""
    return token.strength == "ours" and all(other.strength != "ours" for other in group)


def _joined(text: str, group: list[_Token], path: str | None) -> tuple[Mark, int, int]:
    """The mark that tokens make, and where it begins and ends."""
    start, end = group[0].start, group[-1].end
    if text[group[0].end : end].startswith("./") and text[start - 1 : start] == "(" and text[end : end + 1] == ")":
        start, end = start - 1, end + 1
    order: tuple[Strength, ...] = ("ours", "sure", "variant", "tag")
    strength = min((token.strength for token in group), key=order.index)
    if path is not None or (len(group) > 1 and strength != "ours"):
        strength = "sure"
    numbers = (found[0] for token in group if (found := _NUMBER.search(token.name)))
    number = next((int(digits) for digits in numbers if len(digits) < 6), None)
    return Mark(text[start:end], group[0].medium, strength, number, path), start, end


def _has_its_line(text: str, start: int, end: int) -> bool:
    before, after = text.rfind("\n", 0, start) + 1, text.find("\n", end)
    return not text[before:start].strip() and not text[end : None if after < 0 else after].strip()
