"""Images: found inside their folder, opened safely, upright, RGB, resized for the encoder."""

from __future__ import annotations

import io
import itertools
import math
import os
import stat
import struct
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import pad

from vlm.batch import ImageLayout, ImageSpec
from vlm.data.sniff import HEAD, describe, describe_text
from vlm.errors import RecordError
from vlm.logs import warn

T = TypeVar("T")

# Raster formats only: Pillow's other readers run interpreters (EPS), read files beside the image, or are rarely
# tried with hostile input. "JPEG" opens the MPO of phones too, which keeps a second view behind the first.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
DEFAULT_MAX_PIXELS = 50_000_000
_MAX_BETWEEN = 64_000_000  # pixels of an image on the way to its square; 192 MB
_BAND = 256  # rows that are converted at a time where that takes memory
_WHITE = (255, 255, 255)
_ORIENTATION = 0x0112  # the EXIF tag
_TURN_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAP_SIDES = (
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
)  # fmt: skip
_told: set[str] = set()  # warnings given once per process
_SUFFIXES = (".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_MAX_DEPTH = 20  # folders of a name that are looked at
_MAX_LISTED = 50_000  # files of a folder among which a near name is looked for
_KNOWN = ", ".join(FORMATS)
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks that say nothing of pixels


def resolve_image(root: Path, name: str, links: Sequence[Path] = ()) -> Path:
    """The file `name` below `root`, links followed.

    Args:
        root: an absolute, resolved folder.
        links: folders, resolved too, that links below `root` may lead to. The name itself must not lead out.

    Raises:
        RecordError: rules bad_image_field (empty, or with a NUL byte), image_missing, image_outside_root (`..`, an
            absolute path or a link that leads elsewhere).
    """
    if not name.strip() or "\0" in name:
        raise RecordError("bad_image_field", f"{name[:80]!r} is no file name")
    try:
        path = (root / name).resolve()
        inside, exists = path.is_relative_to(root), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, half a surrogate pair
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise RecordError("image_missing", f"image {name[:80]!r} cannot be looked up ({reason})") from None
    stays = not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] != ".."
    if not inside and not (stays and any(path.is_relative_to(folder) for folder in links)):
        raise RecordError("image_outside_root", f"image {name[:200]!r} {_way_out(root, path, stays)}")
    if not exists:
        raise RecordError("image_missing", f"image {name[:200]!r} is no file below {root.name}/")
    return path


def plain_file(root: str, name: str) -> str | None:
    """What `resolve_image` finds, in one system call, of a file that is no link; None says to ask that.

    Folders are looked up once in a process, so this is for data files and not for what a stranger asks for.
    """
    parent, base = os.path.split(name)
    if not name.strip() or os.path.isabs(name) or base in ("", ".", "..") or ".." in parent:
        return None
    folder = _real_folder(root, parent)
    try:
        is_file = folder is not None and stat.S_ISREG(os.lstat(f"{folder}{os.sep}{base}").st_mode)
    except (OSError, ValueError):
        return None
    return f"{folder}{os.sep}{base}" if is_file else None


@lru_cache(maxsize=1 << 16)
def _real_folder(root: str, parent: str) -> str | None:
    """A folder below the root with links followed; None if it leads elsewhere."""
    try:
        folder = os.path.realpath(os.path.join(root, parent))
    except (OSError, ValueError):
        return None
    return folder if folder == root or folder.startswith(f"{root.rstrip(os.sep)}{os.sep}") else None


def cache_links(root: Path) -> tuple[Path, ...]:
    """Where links of a Hugging Face cache lead: `blobs` beside the `snapshots` that `root` lies in."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir():
            return ((folder.parent.parent / "blobs").resolve(),)
    return ()


def near_name(root: Path, name: str) -> str:
    """The file that a name which is none probably means, as the end of a message; an empty text if none is found."""
    slashed = name.replace("\\", "/")
    path = PurePosixPath(slashed)
    forms = {slashed: "with /, not \\"}
    for form in ("NFC", "NFD"):
        forms.setdefault(unicodedata.normalize(form, slashed), "in another Unicode form")
    forms.setdefault(unquote(slashed), "without URL escapes")
    forms.setdefault(slashed.strip(), "without the blanks")
    if path.parts[:1] == (root.name,):
        forms[str(PurePosixPath(*path.parts[1:]))] = f"without {root.name}/, which images: names already"
    forms.setdefault(path.name, f"directly in {root.name}/")
    for suffix in _SUFFIXES:
        forms.setdefault(str(path.with_suffix(suffix)) if path.name else "", "with another ending")
        forms.setdefault(f"{slashed}{suffix}", "with an ending")
    found = next((form for form in forms if form and form != name and _is_file(root, form)), None)
    if found is not None:
        return f", but {found[:200]!r} is ({forms[found]})"
    other = _in_other_case(root, slashed)
    return f", but {other[:200]!r} is (in other letters)" if other else ""


def _is_file(root: Path, name: str) -> bool:
    try:
        return (root / name).is_file() and ".." not in PurePosixPath(name).parts
    except (OSError, ValueError):  # too long, half a surrogate pair
        return False


def _in_other_case(root: Path, name: str) -> str:
    """The file of nearly this name, as it is written: upper and lower case apart, and forms of letters."""
    folder, found = root, []
    for part in name.split("/")[:_MAX_DEPTH]:
        there = _names_by_folded(folder).get(_folded(part))
        if there is None:
            return ""
        found.append(there)
        folder /= there
    return "/".join(found) if _is_file(root, "/".join(found)) else ""


@lru_cache(8)
def _names_by_folded(folder: Path) -> dict[str, str]:
    """Names of a folder's files by their folded form; of a very large folder none, as that takes too long."""
    names: dict[str, str] = {}
    with suppress(OSError, ValueError), os.scandir(folder) as entries:
        for entry in itertools.islice(entries, _MAX_LISTED):
            names[_folded(entry.name)] = entry.name
    return names if len(names) < _MAX_LISTED else {}


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold().strip()


def _way_out(root: Path, path: Path, stays: bool) -> str:
    if not stays:
        return f"leads out of {root.name}/"
    return (
        f"is a link that leads out of {root.name}/, to {str(path)[:200]}. Name a folder that holds such files in "
        "data.sources[].links to allow it"
    )


def load_tiles(
    source: str | bytes | Path, spec: ImageSpec, max_pixels: int = DEFAULT_MAX_PIXELS, draft: bool = False
) -> Tensor:
    """What the encoder sees of an image: float32 [tiles, 3, S, S]. Raises RecordError as `load_image`.

    Args:
        draft: see `load_image`.
    """
    return to_tiles(load_image(source, max_pixels, spec.background, spec if draft else None), spec)


def load_image(
    source: str | bytes | Path,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    background: tuple[int, int, int] = _WHITE,
    draft_for: ImageSpec | None = None,
) -> Image.Image:
    """Open an image as upright RGB; of an animation, the first frame.

    16-bit and float greys are scaled to 8 bit, not clipped. Transparency is composited on `background` (RGB, 0-255),
    so that colour hidden under transparent pixels never shows.

    Args:
        source: a file, or the bytes of one.
        max_pixels: read from the header, before anything is decoded. Pillow has its own limit above that, 179 million.
        draft_for: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is at least twice what this encoder
            sees. Not where the layout depends on the size of the image.

    Raises:
        RecordError: rules image_missing, image_unreadable, image_too_large.
    """
    return _read_image(source, partial(_decode, max_pixels=max_pixels, background=background, draft_for=draft_for))


def _read_image(source: str | bytes | Path, read: Callable[[str | bytes | Path, str], T]) -> T:
    """What `read` makes of a source and its name for messages; whatever it raises becomes a RecordError."""
    label = "the image" if isinstance(source, bytes) else Path(source).name
    if not isinstance(source, bytes) and not os.path.isfile(source):  # a folder; a pipe would block
        reason = "is no file" if os.path.exists(source) else "does not exist"
        raise RecordError("image_unreadable" if os.path.exists(source) else "image_missing", f"{label} {reason}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # malformed EXIF and the like; what matters raises
            return _read_or_strip(source, label, read)
    except RecordError:
        raise
    except Image.DecompressionBombError:
        raise RecordError("image_too_large", f"{label} is over Pillow's own limit of pixels") from None
    except Exception as error:  # decoders raise many types on damaged files
        raise RecordError("image_unreadable", f"{label}{_what_it_is(source, error)}") from None


def _read_or_strip(source: str | bytes | Path, label: str, read: Callable[[str | bytes | Path, str], T]) -> T:
    try:
        return read(source, label)
    except ValueError:  # Pillow reads no text or colour profile of a PNG over 1 MB; pixels do not need it
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        stripped = _without_text(content)
        if len(stripped) == len(content):
            raise
        return read(stripped, label)


def _decode(
    source: str | bytes | Path,
    label: str,
    *,
    max_pixels: int,
    background: tuple[int, int, int],
    draft_for: ImageSpec | None,
) -> Image.Image:
    with _open(source) as image:
        _check_size(image.size, max_pixels, label)
        if draft_for is not None and not draft_for.reads_size:
            image.draft(None, draft_size(image.size, draft_for))  # of other formats than JPEG nothing changes
        image.load()
        rgb = _to_rgb(_upright(image), background)
        _tell_of_animation(image, label)  # looks at the second frame, so only now
        return rgb


def draft_size(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """Width and height that an image of `size` must have at least when it is decoded: twice those it is resized to, as
    for Pillow's thumbnails, for the encoder that sees most."""
    widths, heights = zip(*(_twice_resized(size, member) for member in spec.members), strict=True)
    return max(widths), max(heights)


def _twice_resized(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    if spec.resize == "squash":
        return 2 * spec.size, 2 * spec.size
    shrunk = min(size) if spec.resize == "crop" else max(size)
    width, height = (-(-2 * spec.size * side // shrunk) for side in size)
    return width, height


def _without_text(content: bytes) -> bytes:
    """A PNG without its text and colour profile; anything else as it is."""
    if not content.startswith(_PNG):
        return content
    kept, position = [_PNG], len(_PNG)
    while position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        if kind not in _PNG_TEXT:
            kept.append(content[position:end])
        position = end
    return b"".join(kept)


def _what_it_is(source: str | bytes | Path, error: Exception) -> str:
    """What stands where an image should, with what can be done; or what the decoder said of a damaged one."""
    said = f": {type(error).__name__}: {_reason(error)}"
    try:
        content = source[:HEAD] if isinstance(source, bytes) else _head(Path(source))
        size = len(content)
    except OSError:
        return said
    what = describe(content, size)
    if not what and isinstance(error, UnidentifiedImageError):
        what = describe_text(content)
    if not what:
        return said if not isinstance(error, UnidentifiedImageError) else f" is of no format that is read ({_KNOWN})"
    return f" is {what}. Read are {_KNOWN}"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def to_tiles(image: Image.Image, spec: ImageSpec) -> Tensor:
    """What the encoder sees of an image: float32 [tiles, 3, S, S], cut by `spec.layout`."""
    whole = (0, 0, *image.size)
    boxes = spec.layout(*image.size).tiles
    return torch.stack([to_pixels(image if box == whole else image.crop(box), spec) for box in boxes])


def to_pixels(tile: Image.Image, spec: ImageSpec) -> Tensor:
    """Resize one tile by `spec.resize` (bicubic, antialiased) and normalise.

    Returns:
        float32 [3, S, S], (value / 255 - mean) / std per RGB channel. Of several encoders three channels for each, the
        smaller ones' images in the upper left corner of zeros.
    """
    if len(spec.members) > 1:
        size = max(each.size for each in spec.members)
        parts = [to_pixels(tile, each) for each in spec.members]
        return torch.cat([pad(part, (0, size - part.shape[2], 0, size - part.shape[1])) for part in parts])
    values = torch.from_numpy(np.array(fit_square(tile, spec), dtype=np.float32))
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    return ((values / 255 - mean) / std).permute(2, 0, 1).contiguous()


def image_layout(source: str | bytes | Path, spec: ImageSpec) -> ImageLayout:
    """What an image becomes. Its header is read only where the layout depends on its size.

    Raises:
        RecordError: rules image_missing, image_unreadable.
    """
    return spec.layout(*upright_size(source)) if spec.reads_size else spec.typical()


def upright_size(source: str | bytes | Path, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Width and height in pixels as `load_image` gives them, from the header alone. Raises as it does."""
    return _read_image(source, partial(_header_size, max_pixels=max_pixels))


def _header_size(source: str | bytes | Path, label: str, *, max_pixels: int) -> tuple[int, int]:
    with _open(source) as image:
        _check_size(image.size, max_pixels, label)
        width, height = image.size
        if image.format == "TIFF":  # Pillow has turned its size already
            return width, height
        if image.format == "PNG":  # `getexif` would decode it
            exif = Image.Exif()
            with suppress(Exception):  # malformed EXIF says nothing
                exif.load(image.info.get("exif") or b"")
            turn = _TURN_BACK.get(exif.get(_ORIENTATION, 0))
        else:
            turn = _TURN_BACK.get(_orientation(image))
        return (height, width) if turn in _SWAP_SIDES else (width, height)


def _open(source: str | bytes | Path) -> Image.Image:
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)


def from_pixels(pixels: Tensor, spec: ImageSpec) -> Image.Image:
    """[3, S, S], as `to_pixels` made it, as an image again: what the encoder sees, of several the first."""
    first = pixels[:3, : spec.size, : spec.size]
    values = first.permute(1, 2, 0).float() * torch.tensor(spec.std) + torch.tensor(spec.mean)
    return Image.fromarray((values * 255).round().clamp(0, 255).to(torch.uint8).numpy())


def fit_square(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """The RGB image as an S x S square: padded with the background, cropped in the middle, or squashed."""
    size = (spec.size, spec.size)
    if spec.resize == "squash":
        return image.resize(size, Image.Resampling.BICUBIC)
    if spec.resize == "crop":
        return _middle(image, spec.size)
    return _padded(image, spec.background).resize(size, Image.Resampling.BICUBIC)


def _middle(image: Image.Image, size: int) -> Image.Image:
    """As CLIP's preprocessing, to the bit: the shorter side becomes `size`, then the middle is cut out."""
    short = min(image.size)
    width, height = (max(size, int(size * side / short)) for side in image.size)  # CLIP cuts the fraction off
    left, top = (width - size) // 2, (height - size) // 2
    if width * height <= _MAX_BETWEEN:
        scaled = image.resize((width, height), Image.Resampling.BICUBIC)
        return scaled.crop((left, top, left + size, top + size))
    # 1 x 1,000,000 pixels would become 336 x 336,000,000, so only the middle is resized; Pillow takes the box in
    # single precision, which is why this is not the usual way.
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, min(image.width, (left + size) * x), min(image.height, (top + size) * y))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _padded(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square, as LLaVA pads: before it is resized."""
    side = max(image.size)
    if side * side > _MAX_BETWEEN:  # shrunk first: the square round 1 x 50,000,000 pixels fits in no memory
        scale = _MAX_BETWEEN**0.5 / side
        width, height = (max(1, int(length * scale)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        side = max(image.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _check_size(size: tuple[int, int], max_pixels: int, label: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise RecordError("image_unreadable", f"{label} has {width} x {height} pixels")
    if width * height > max_pixels:
        raise RecordError(
            "image_too_large", f"{label} has {width} x {height} pixels, more than data.max_pixels {max_pixels:,}"
        )


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says. Not by `ImageOps.exif_transpose`: it writes EXIF anew and fails on any damaged tag of it."""
    turn = _TURN_BACK.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """EXIF's number; 0 where there is none."""
    try:
        return int(image.getexif().get(_ORIENTATION, 0))
    except Exception:  # malformed EXIF says nothing about orientation, so the image stays as stored
        return 0


def _tell_of_animation(image: Image.Image, label: str) -> None:
    try:
        animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:  # the second frame is damaged; the first is all that counts
        animated = True
    if animated and "animation" not in _told:
        _told.add("animation")
        warn(f"data: {label} has several frames; of such images the first is taken (said once)")


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        grey = _scaled_grey(image).convert("RGB")
        hidden = image.info.get("transparency")
        if isinstance(hidden, int):  # PNG: the one grey value that is transparent
            mask = Image.fromarray(np.where(np.asarray(image) == hidden, 255, 0).astype(np.uint8))
            grey.paste(background, (0, 0), mask)
        return grey
    return _flattened(image, background) if image.has_transparency_data else image.convert("RGB")


def _flattened(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Over the background; in bands, as whole images in between would take three times the memory."""
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, _BAND):
        band = image.crop((0, top, image.width, min(top + _BAND, image.height))).convert("RGBA")
        backdrop = Image.new("RGBA", band.size, (*background, 255))
        rgb.paste(Image.alpha_composite(backdrop, band).convert("RGB"), (0, top))
    return rgb


def _scaled_grey(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bit as 8 bit.

    The range is the file's for 16 bit. Where the file does not say (32 bit, float), it is the least of 0..1 (float
    only), 0..255 (float only), 0..65535 and 0..the highest value that holds all values; with negative values, it is
    from the lowest to the highest.
    """
    values = np.asarray(image)
    low, high = float(np.float32(values.min())), float(np.float32(values.max()))
    if not math.isfinite(low) or not math.isfinite(high):  # a NaN is its own minimum
        raise RecordError("image_unreadable", "grey values are not finite")
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    elif low >= 0:
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
        low, high = 0.0, next((top for top in ranges if high <= top), high)
    grey = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), _BAND):
        scaled = (values[top : top + _BAND].astype(np.float32) - low) * (255 / max(high - low, 1e-12))
        grey[top : top + _BAND] = scaled.round().clip(0, 255)
    return Image.fromarray(grey)


def _reason(error: Exception) -> str:
    """What a decoder said, without the addresses of objects that Pillow puts in."""
    return str(error).split(" <", 1)[0][:100]
