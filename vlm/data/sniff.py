"""What a file is, by its first bytes, where it is not what its name says: for messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HEAD = 512  # bytes that `describe` wants
_MAX_PARSED = 128 << 20  # bytes of a JSON file that are read to say what it holds
_STARTS = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself: run `git lfs pull` there"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself: run `git annex get` there"),
    (b"outs:\n", "a DVC pointer, not the file itself: run `dvc pull` there"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip-packed"),
    (b"BZh", "bzip2-packed"),
    (b"\xfd7zXZ", "xz-packed"),
    (b"\x28\xb5\x2f\xfd", "zstd-packed"),
    (b"PAR1", "a Parquet table"),
    (b"ARROW1", "an Arrow table"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"8BPS", "a Photoshop image"),
    (b"%!PS", "a PostScript drawing"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (b"\x00\x00\x00\x0cjP", "a JPEG 2000 image"),
    (b"\x00\x00\x01\x00", "an icon (ICO)"),
    (b"\x76\x2f\x31\x01", "an OpenEXR image"),
    (b"\x1aE\xdf\xa3", "a WEBM or MKV video"),
    (b"FLV\x01", "an FLV video"),
    (b"OggS", "an OGG sound"),
    (b"ID3", "an MP3 sound"),
    (b"\xff\xfb", "an MP3 sound"),
    (b"fLaC", "a FLAC sound"),
)  # fmt: skip
_BRANDS = {  # of files that begin with a size and "ftyp"
    b"heic": "a HEIC image", b"heix": "a HEIC image", b"hevc": "a HEIC image", b"heim": "a HEIC image",
    b"heis": "a HEIC image", b"mif1": "a HEIC image", b"msf1": "a HEIC image", b"avif": "an AVIF image",
    b"avis": "an AVIF image", b"crx ": "a Canon raw image", b"M4A ": "an MP4 sound",
}  # fmt: skip
_DATASET_INFO_KEYS = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")


def describe(head: bytes, size: int) -> str:
    """What a file is, or an empty text.

    Args:
        head: its first `HEAD` bytes.
        size: all its bytes.

    >>> describe(b"<!DOCTYPE html><html>", 5000), describe(b"", 0), describe(bytes([0, 0, 0, 24]) + b"ftypheic", 9000)
    ('an HTML page, usually of a download that failed', 'an empty file', 'a HEIC image')
    """
    if size == 0:
        return "an empty file"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "an MP4 video")
    if head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"WAVE"):
        return "an AVI video" if head[8:12] == b"AVI " else "a WAV sound"
    if head[128:132] == b"DICM":
        return "a DICOM image"
    if head[257:262] == b"ustar":
        return "a tar archive"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    named = next((what for magic, what in _STARTS if (start if magic[:1].isalnum() else head).startswith(magic)), "")
    return named or _markup(start.lower())


def describe_text(head: bytes) -> str:
    """What a text is that stands where an image should; an empty text if the bytes are no text."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] in (b"{", b"["):
        return "JSON text"
    words = start[:60].split(b"\n")[0].decode("latin-1")
    is_text = len(start) > 0 and all(32 <= byte < 127 or byte in b"\r\n\t" for byte in start[:200])
    if is_text and len(start) < 300 and "/" in words and " " not in words:
        return f"a link that was copied as text ({words!r}): copy the folder again, with its links or what they lead to"
    return f"text ({words!r})" if is_text else ""


def describe_json(path: Path, name: str) -> str:
    """What a .json file is that is no list of records, and what to do with it.

    Args:
        name: of the file, for messages.
    """
    value = load_object(path)
    if value is None:
        return "A file with one object per line must be named .jsonl"
    if isinstance(value.get("images"), list) and isinstance(value.get("annotations"), list):
        return (
            "It is an object of two lists, images and annotations, as COCO has them. Write a list with one object per "
            'image: {"image": its file_name, "caption": its caption}'
        )
    objects = [entry for entry in value.values() if isinstance(entry, dict)]
    if objects and len(objects) == len(value):
        return _describe_objects(value, objects[0])
    lists = [key for key, entry in value.items() if isinstance(entry, list)]
    records = [key for key in lists if value[key] and isinstance(value[key][0], dict)]
    if records and not {"conversations", "conversation", "messages"} & set(records):
        target = f"{Path(name).stem}_list.json"
        return (
            f"It is an object that holds a list under {records[0]!r}. Take the list out: python -c "
            f'"import json; json.dump(json.load(open({name!r}))[{records[0]!r}], open({target!r}, {"w"!r}))"'
        )
    if lists and len(lists) == len(value):
        return _COLUMNS
    return f"It is one object with the keys {[key[:40] for key in list(value)[:6]]}; put records into a list: [...]"


def is_dataset_info(value: dict[str, Any]) -> bool:
    """LLaMA-Factory's list of data sets: name -> where it is."""
    return bool(value) and all(
        isinstance(entry, dict) and any(key in entry for key in _DATASET_INFO_KEYS) for entry in value.values()
    )


def load_object(path: Path) -> dict[str, Any] | None:
    """The object that a JSON file is as a whole; None if it is none, or too large to look."""
    with path.open("rb") as file:
        if path.stat().st_size > _MAX_PARSED or not file.read(HEAD).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(
            b"{"
        ):
            return None
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


_COLUMNS = (
    "It is an object of columns, as pandas writes. Write records: pandas.read_json(...).to_json(..., orient='records')"
)


def _describe_objects(value: dict[str, Any], first: dict[str, Any]) -> str:
    if all(isinstance(entry, dict) and "annotation" in entry for entry in value.values()):
        sources = [
            f"{{path: {entry['annotation']}, images: {entry.get('root', '...')}}}" for entry in list(value.values())[:3]
        ]
        return f"It is InternVL's list of data sets. List each under data.sources: {', '.join(sources)}"
    if all(re.fullmatch(r"\d+", key) for key in first):
        return _COLUMNS
    return f"It is an object of objects ({[key[:40] for key in list(value)[:4]]}); put these into a list: [...]"


def _markup(start: bytes) -> str:
    if re.match(rb"(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*(?:<!doctype svg[^>]*>\s*)?<svg", start, re.DOTALL):
        return "an SVG drawing"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page, usually of a download that failed"
    return "an XML file, usually an answer of a server" if start.startswith((b"<?xml", b"<error")) else ""
