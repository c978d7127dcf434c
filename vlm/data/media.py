"""Values of a record that are an image, a video or a sound: in it, or named by it."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from vlm.data.fields import Fields, has_content, short
from vlm.errors import RecordError

Image = str | bytes  # a name below the images folder, or an encoded image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_OTHER_SUFFIXES = (
    "jfif jpe jp2 jxl heic heif avif svg ico ppm pgm tga exr hdr psd dcm nii npy cr2 nef dng eps pdf djvu "
    "mp4 m4v mov avi mkv webm mpg mpeg wmv flv 3gp ogv wav mp3 flac ogg oga opus m4a aac wma aiff amr"
)
_ENDINGS = "|".join([*(suffix[1:] for suffix in IMAGE_SUFFIXES), *_OTHER_SUFFIXES.split()])
_MEDIA_FILE = re.compile(rf"[^\n]{{0,1000}}\.(?:{_ENDINGS})(?:[?#]\S*)?\s*", re.IGNORECASE)
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_DATA_URL = re.compile(r"data:(?:image|video|audio|application)/[\w.+-]+;base64,", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_MAGIC = {  # how base64 of these files begins
    "iVBORw0KGgo": "a PNG image", "/9j/": "a JPEG image", "R0lGOD": "a GIF image", "UklGR": "a WEBP image or WAV sound",
    "Qk": "a BMP image", "SUkqA": "a TIFF image", "TU0AK": "a TIFF image", "AAAA": "an MP4 video or HEIC image",
    "GkXfo": "a WEBM video", "SUQz": "an MP3 sound", "//uQ": "an MP3 sound", "//vQ": "an MP3 sound",
    "T2dnUw": "an OGG sound", "ZkxhQw": "a FLAC sound",
}  # fmt: skip
_MIN_BASE64 = 60  # letters; a shorter word of these letters may be a name
_MIN_UNKNOWN_BASE64 = 1000  # without a known beginning
_MEDIUM_KEY = re.compile(
    r"image|img|picture|photo|video|audio|frame|visual|pixel|sound|speech|thumbnail|screenshot"
    r"|(?<![a-z])(?:pic|pics|clip|wav|media|figure|vision|jpg|jpeg|png|webp|gif|mp3|mp4)(?![a-z])"
)
_MEDIUM_NAME = re.compile(r"(?:image|img|picture|photo|video|audio)s?_?(?:id|name|key|idx|index)s?")
_ABOUT = re.compile(  # words of keys that say something of a medium and are none
    r"(?<![a-z])(?:id|ids|idx|index|name|key|size|width|height|shape|format|type|mode|count|num|number|length|duration|fps"
    r"|hash|md5|sha\d*|phash|source|src|dataset|captions?|descriptions?|desc|summary|labels?|class|title|alt|text|ocr|score"
    r"|quality|similarity|has|is|no|n|dpi|orientation|rotation|resolution|ratio|tags?|attributes?|category|metadata|meta"
    r"|info|prompt|query|questions?|answers?|keywords|objects|boxes|bbox|author|credit|copyright|licen[cs]e|date|time"
    r"|location|style|page|homepage|website)(?![a-z])"
)
_LINK = re.compile(r"(?<![a-z])(?:urls?|link|source|src|page|homepage|website|licen[cs]e|credit|href|ref)(?![a-z])")
_REPEATS = re.compile(r"(?<![a-z])(?:ids?|names?|key|source|src|origin\w*|hash|title)(?![a-z])")
_METADATA = re.compile(r"(?<![a-z])(?:meta|metadata|info)(?![a-z])")
_SHOWN = re.compile(r"!\[[^\]\n]*\]\([^)\n]+\)|<(?:img|video|audio|source)\s[^>\n]*\bsrc\s*=[^>\n]*>", re.IGNORECASE)
_MAX_VALUES = 2000  # of an unread key that are looked at


def read_image(value: Any, fields: Fields | None = None) -> Image:
    """An image as records give it: a path, base64 (bare or in a data: URL), or an object with one of these or bytes.

    Args:
        fields: the object that holds the value; keys of an image object that are not read are reported with its own.

    Raises:
        RecordError: rules bad_image_field, remote_image.
    """
    if isinstance(value, dict):
        return _from_object((fields or Fields({})).inner(value, "image."))
    if not isinstance(value, str):
        raise RecordError("bad_image_field", f"an image is given as {short(value)}; expected a path")
    if value.startswith("data:"):
        return decode_data_url(value)
    if _URL.match(value):
        raise RecordError("remote_image", f"{value[:80]!r}: images are named by path, nothing is fetched")
    if is_base64(value):
        return _decode(value)
    return value


def decode_data_url(url: str) -> bytes:
    """The bytes of a `data:image/...;base64,` URL. Raises RecordError rule bad_image_field."""
    head, _, body = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise RecordError("bad_image_field", f"{head[:40]!r}: expected data:image/...;base64,...")
    return _decode(body)


def is_base64(text: str) -> bool:
    """A file in base64: long, of these letters only, and beginning as one (or too long for a name)."""
    if len(text) < _MIN_BASE64:
        return False
    known = text.startswith(tuple(_MAGIC)) and not _MEDIA_FILE.fullmatch(text[-200:])
    return (known or len(text) >= _MIN_UNKNOWN_BASE64) and _BASE64.fullmatch(re.sub(r"\s+", "", text)) is not None


def find_medium(key: str, value: Any, images: Collection[str]) -> str:
    """What medium an unread key holds or names, or an empty text.

    Args:
        images: names of the record's images that are read. Beside them, `image_id`, `coco_url` and the like only say
            more of the same images.
    """
    says = _read_key(key)
    if not images and says.is_name and not isinstance(value, bool | float):
        return f"the name of a medium ({short(value)})"
    is_link = says.is_link
    may_repeat = bool(images) and (says.is_metadata or (isinstance(value, str) and says.repeats))
    for inner in _values(value):
        named = _named(inner, is_link)
        is_source = bool(images) and is_link and named.startswith("a link")
        if named and (may_repeat or is_source or _is_known(inner, images)):
            named = ""
        if found := _held(inner) or named:
            return found
    names_medium = says.is_medium and not says.is_about and not (images and is_link)
    return short(value) if names_medium and not isinstance(value, bool | int | float) else ""


def _is_known(name: str, images: Collection[str]) -> bool:
    base = PurePosixPath(name).name
    return any(PurePosixPath(image).name == base for image in images)


class _KeySays(NamedTuple):
    """What the words of a key say of its value."""

    is_name: bool
    is_link: bool
    is_metadata: bool
    repeats: bool
    is_about: bool
    is_medium: bool


@lru_cache(maxsize=4096)
def _read_key(key: str) -> _KeySays:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()
    searched = (_LINK, _METADATA, _REPEATS, _ABOUT, _MEDIUM_KEY)
    return _KeySays(bool(_MEDIUM_NAME.fullmatch(words)), *(bool(pattern.search(words)) for pattern in searched))


def named_medium(text: str) -> str:
    """The Markdown or HTML that shows a medium within a text, or an empty text.

    >>> named_medium("Look: ![a dog](dog.png)"), named_medium("Use <b> or <img>.")
    ('![a dog](dog.png)', '')
    """
    found = _SHOWN.search(text) if "](" in text or "src" in text else None
    return found[0] if found else ""


def embedded_medium(text: str) -> str:
    """The data: URL of a medium within a text, or an empty text."""
    found = _DATA_URL.search(text) if "data:" in text else None
    return found[0] if found and _BASE64.match(text[found.end() : found.end() + _MIN_BASE64]) else ""


def _from_object(fields: Fields) -> Image:
    content = fields.take("bytes", "base64", "data")
    name = fields.take("path", "url", "file_name", "image", "image_url")
    kind = fields.values.get("type")
    fields.settle("type", "media_type", "mime_type", "filename")
    if isinstance(content, list) and all(isinstance(byte, int) and 0 <= byte < 256 for byte in content):
        return bytes(content)
    if isinstance(content, str):
        return decode_data_url(content) if content.startswith("data:") else _decode(content)
    if content is None and isinstance(name, str):
        return read_image(name, fields)
    if content is None and isinstance(fields.values.get("source"), dict):
        return read_image(fields.take("source"), fields)
    given = short(kind) if content is None and name is None else short(content if content is not None else name)
    raise RecordError("bad_image_field", f"an image is an object with {given}; expected path, url, bytes or base64")


def _decode(body: str) -> bytes:
    try:
        return base64.b64decode(re.sub(r"\s+", "", body).replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: letters outside ASCII
        raise RecordError("bad_image_field", f"not base64 ({error})") from None


def _values(value: Any) -> Iterator[Any]:
    """Texts within a value, and its objects, as far as anyone wants to look."""
    waiting, count = [value], 0
    while waiting and count < _MAX_VALUES:
        value, count = waiting.pop(), count + 1
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value[:_MAX_VALUES]
        yield value


def _held(value: Any) -> str:
    """What file a value holds, whatever its key; an empty text if none."""
    if isinstance(value, dict):
        is_file = has_content(value.get("bytes")) or ("array" in value and "sampling_rate" in value)
        return "a file in the record" if is_file else ""
    if not isinstance(value, str):
        return ""
    if embedded_medium(value):
        return "a data: URL"
    if is_base64(value):
        return next((name for magic, name in _MAGIC.items() if value.startswith(magic)), "data") + " in base64"
    return ""


def _named(value: Any, is_link_key: bool) -> str:
    """What file or link a value names; a link to a page is none under a key for links."""
    if not isinstance(value, str) or len(value.split()) > 8:
        return ""
    if _URL.match(value) and not re.search(r"\s", value.strip()):
        return "" if is_link_key and not _MEDIA_FILE.fullmatch(value) else f"a link, {value[:60]!r}"
    return repr(value[:60]) if _MEDIA_FILE.fullmatch(value) else ""
