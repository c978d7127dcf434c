"""Messages say what a file or image is, and what to do."""

from __future__ import annotations

import io
import json
import zlib

import pytest
from PIL import Image

from vlm.data.images import load_image
from vlm.data.index import open_index
from vlm.errors import DataError, RecordError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:8e661c\nsize 1050\n"
RECORD = {"image": "a.png", "caption": "Red."}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(99), "is a HEIC image"),
        (b"\0\0\0\x18ftypmif1" + bytes(99), "is a HEIC image"),
        (b"\0\0\0\x18ftypavif" + bytes(99), "is an AVIF image"),
        (b"\0\0\0\x18ftypisom" + bytes(99), "is an MP4 video"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG drawing"),
        (b"\n<!DOCTYPE html><html>404</html>", "is an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is an XML file"),
        (b"", "is an empty file"),
        (LFS, "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
        (b"/annex/objects/SHA256E-s1--aa.png\n", "is a git-annex pointer"),
        (b"../../blobs/0123", "is a link that was copied as text ('../../blobs/0123')"),
        (b'{"error": "not found"}', "is JSON text"),
        (b"Not found", "is text ('Not found')"),
        (b"%PDF-1.7 ...", "is a PDF document"),
        (b"PK\x03\x04....", "is a ZIP archive"),
        (b"RIFF\0\0\0\0WAVEfmt ", "is a WAV sound"),
        (b"\xff\x0a" + bytes(99), "is a JPEG XL image"),
        (bytes(128) + b"DICM" + bytes(99), "is a DICOM image"),
        (bytes(99), "is of no format that is read"),
    ],
)
def test_an_image_that_is_none_is_called_what_it_is(tmp_path, content, said):
    (tmp_path / "a.jpg").write_bytes(content)
    for source in (tmp_path / "a.jpg", content):
        with pytest.raises(RecordError) as caught:
            load_image(source)
        assert said in caught.value.message
        assert "PNG, JPEG, WEBP" in caught.value.message
        assert caught.value.rule == "image_unreadable"


def chunked(content: bytes, kind: bytes, body: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    chunk = len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    return content[:33] + chunk + content[33:]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (2 << 20))),
        (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"x" * (2 << 20))),
        (b"iCCP", b"ICC\0\0" + zlib.compress(b"x" * (2 << 20))),
    ],
)
def test_a_long_text_in_a_png_s_header_does_not_cost_the_image(kind, body):
    out = io.BytesIO()
    Image.new("RGB", (8, 4), (255, 0, 0)).save(out, "PNG")
    content = chunked(out.getvalue(), kind, body)
    assert load_image(content).getpixel((1, 1)) == (255, 0, 0)
    with pytest.raises(RecordError):
        load_image(content[:-40])  # damaged beside that


OBJECTS = {
    "coco": ({"images": [{"id": 1}], "annotations": [{"image_id": 1}]}, "two lists, images and annotations, as COCO"),
    "annotations": ({"annotations": [RECORD]}, "holds a list under 'annotations'. Take the list out: python -c"),
    "wrapped": ({"version": "1.0", "data": [RECORD]}, "holds a list under 'data'"),
    "internvl": ({"one": {"root": "images/", "annotation": "a.jsonl"}}, "{path: a.jsonl, images: images/}"),
    "columns": ({"image": {"0": "a.png"}, "caption": {"0": "Red."}}, "an object of columns"),
    "lists": ({"image": ["a.png"], "caption": ["Red."]}, "an object of columns"),
    "record": ({"conversations": [{"from": "human"}], "image": "a.png"}, "one object with the keys"),
    "named": ({"a": RECORD, "b": RECORD}, "an object of objects"),
}


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_in_place_of_a_list_is_described(tmp_path, name, indent):
    value, said = OBJECTS[name]
    (tmp_path / "a.json").write_text(json.dumps(value, indent=indent))
    with pytest.raises(DataError) as caught:
        open_index(tmp_path / "a.json", tmp_path / "cache")
    assert said in str(caught.value)
    assert "must be named .jsonl" not in str(caught.value)


def test_the_list_is_taken_out_as_the_message_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"data": [RECORD]}))
    with pytest.raises(DataError, match="python -c") as caught:
        open_index(tmp_path / "a.json", tmp_path / "cache")
    exec(str(caught.value).split('python -c "')[1].rstrip('"'))
    assert open_index(tmp_path / "a_list.json", tmp_path / "cache")[0] == RECORD


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", json.dumps([RECORD]).encode(), "is one JSON list, not an object per line. Name it a.json"),
        ("a.jsonl", json.dumps([RECORD] * 2, indent=1).encode(), "is one JSON list"),
        ("a.jsonl", b"[\n" + json.dumps(RECORD).encode() + b"\n]", "is one JSON list"),
        ("a.jsonl", json.dumps(RECORD, indent=1).encode(), "its objects are spread over several lines"),
        ("a.jsonl", json.dumps(RECORD).encode("utf-16"), "is UTF-16; expected UTF-8"),
        ("a.csv", "image,caption\n".encode("utf-16"), "is UTF-16; expected UTF-8"),
        ("a.csv", b"PAR1....", "is no .csv file. It is a Parquet table"),
        ("a.tsv", b"<html>", "is no .tsv file. It is an HTML page"),
        *((name, LFS, "It is a Git LFS pointer") for name in ("a.json", "a.jsonl", "a.csv", "a.tsv")),
    ],
)
def test_a_file_of_another_kind_is_refused_once_with_what_it_is(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_index(tmp_path / name, tmp_path / "cache")
    assert said in str(caught.value)
    assert not isinstance(caught.value, RecordError)


def test_a_comma_behind_an_object_of_jsonl_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"a": [1]}) + ",\n")
    with pytest.raises(RecordError, match="a comma ends the line; JSON Lines has none"):
        open_index(tmp_path / "a.jsonl", tmp_path / "cache")[0]
