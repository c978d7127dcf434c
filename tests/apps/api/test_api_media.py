"""Images: data: URLs, files below the media folder, and the web where it is allowed. All else is refused."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from api_server import SMALL, ask, make_service, user, without_port
from PIL import Image

from vlm.apps.api.errors import ApiError
from vlm.apps.api.limits import Media
from vlm.apps.api.media import MediaLoader
from vlm.inference.load import LoadedModel

CHAT = "/v1/chat/completions"
Call = Callable[..., httpx.Response]


def png(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, format="PNG")
    return stream.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def bomb(width: int, height: int) -> bytes:
    """A PNG of 57 bytes whose header promises many pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


BAD_DATA = {
    "no base64": "data:image/png;base64,!!!!",
    "cut base64": "data:image/png;base64,iVBO",
    "letters outside ASCII": "data:image/png;base64,好",
    "not said to be base64": "data:image/png,abc",
    "not an image by its kind": data_url(png(), "text/html"),
    "empty": "data:image/png;base64,",
    "garbage": data_url(b"garbage" * 100),
    "HTML": data_url(b"<html><body>image</body></html>"),
    "SVG": data_url(b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="1" height="1"/></svg>', "image/svg+xml"),
    "EPS": data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"),
    "truncated": data_url(png()[:40]),
    "100 megapixels": data_url(bomb(10_000, 10_000)),
    "400 megapixels": data_url(bomb(20_000, 20_000)),
    "no pixels": data_url(bomb(0, 5)),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_what_is_no_image_gets_400_in_our_own_words(call: Call, name: str):
    response = call("POST", CHAT, json=ask(messages=user("What is this?", BAD_DATA[name])))
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message.startswith("image_url: ")
    assert not re.search(r"0x[0-9a-f]|/|Error|Pil|BytesIO|identify", message.replace("data:image/", ""))


def test_every_raster_format_is_read(call: Call):
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        stream = io.BytesIO()
        Image.new("RGB", (30, 20), "blue").save(stream, format=kind)
        message = user("What is this?", data_url(stream.getvalue(), f"image/{kind.lower()}"))
        assert call("POST", CHAT, json=ask(messages=message)).status_code == 200


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A media folder with neighbours that nobody may see, all of them good images."""
    root = tmp_path / "media"
    for folder in (root / "cats", tmp_path / "media-private", tmp_path / "secret"):
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(png())
    (root / "inner.png").symlink_to(root / "cats" / "1.png")
    (root / "out.png").symlink_to(tmp_path / "secret" / "1.png")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "loop").symlink_to(root / "loop")
    (root / "big.png").write_bytes(png() + b"\0" * 5000)
    os.mkfifo(root / "pipe.png")
    return root


def load(loader: MediaLoader, url: str) -> bytes:
    return asyncio.run(loader.load(url))


def outside(root: Path) -> dict[str, str]:
    return {
        "parent": "../secret/1.png",
        "parent inside": "cats/../../secret/1.png",
        "absolute": str(root.parent / "secret" / "1.png"),
        "file URL": f"file://{root.parent}/secret/1.png",
        "file URL of localhost": f"file://localhost{root.parent}/secret/1.png",
        "file URL with parents": f"file://{root}/../secret/1.png",
        "escaped parents": f"file://{root}/%2e%2e/secret/1.png",
        "sibling whose name begins alike": f"{root}-private/1.png",
        "sibling by parent": "../media-private/1.png",
        "link to a file outside": "out.png",
        "link to a folder outside": "out/1.png",
        "loop of links": "loop",
        "NUL": "cats/1.png\0",
        "escaped NUL": f"file://{root}/cats/1.png%00",
        "empty": "",
        "blank": " ",
        "folder": "cats",
        "pipe": "pipe.png",
        "missing": "cats/2.png",
        "missing outside": "../secret/2.png",
        "very long": "a" * 5000,
        "passwd": "file:///etc/passwd",
        "home": "~/1.png",
    }


@pytest.mark.parametrize("name", outside(Path("/media")))
def test_no_file_outside_the_media_folder_is_read(root: Path, name: str):
    with pytest.raises(ApiError) as caught:
        load(MediaLoader(Media(root)), outside(root)[name])
    assert caught.value.status == 400
    # the same words whether it exists or not
    assert caught.value.message == "image_url: there is no such image below the server's media folder"


INSIDE = [
    "cats/1.png",
    "./cats/../cats/1.png",
    "inner.png",
    "file:{root}/cats/1.png",
    "file://{root}/cats/1.png",
    "FILE://localhost{root}/cats/%31.png",
    "{root}/inner.png",
]


@pytest.mark.parametrize("url", INSIDE)
def test_files_inside_are_read(root: Path, url: str):
    assert load(MediaLoader(Media(root)), url.format(root=root)) == png()


def test_a_large_file_is_refused(root: Path):
    with pytest.raises(ApiError, match="larger than 1,000 bytes"):
        load(MediaLoader(Media(root, fetch_bytes=1000)), "big.png")


NO_IMAGES = [
    "cats/1.png",
    "file:///etc/passwd",
    "file://host/share/1.png",
    "\\\\host\\share\\1.png",
    "ftp://host/1.png",
    "gopher://127.0.0.1:6379/_x",
    "jar:file:///a",
    "smb://host/1.png",
]


@pytest.mark.parametrize("url", NO_IMAGES)
def test_without_a_media_folder_no_file_is_read(root: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(root)
    with pytest.raises(ApiError) as caught:
        load(MediaLoader(Media()), url)
    assert (caught.value.status, caught.value.code) == (400, "image_refused")


def test_a_link_put_in_place_of_a_file_after_the_look_is_not_followed(root: Path, monkeypatch: pytest.MonkeyPatch):
    from vlm.apps.api import media

    resolve = media.resolve_image

    def swap(folder: Path, name: str) -> Path:
        found = resolve(folder, name)
        found.unlink()
        found.symlink_to(root.parent / "secret" / "1.png")
        return found

    monkeypatch.setattr(media, "resolve_image", swap)
    with pytest.raises(ApiError, match="no such image"):
        load(MediaLoader(Media(root)), "cats/1.png")


def test_a_request_shows_a_file_of_the_media_folder(call: Call, root: Path):
    response = call("POST", CHAT, media=Media(root), json=ask(messages=user("What is this?", "cats/1.png")))
    same = call("POST", CHAT, json=ask(messages=user("What is this?", data_url(png()))))
    assert response.status_code == 200
    assert response.json()["choices"] == same.json()["choices"]


def test_images_from_files_count_as_if_they_had_been_sent(loaded: LoadedModel, root: Path):
    """Each request names 5 kB four times; 12 kB are allowed at a time."""
    service = make_service(loaded, replace(SMALL, all_bodies_bytes=12_000), Media(root))

    async def post() -> httpx.Response:
        async with without_port(service) as client:
            return await client.post(CHAT, json=ask(messages=user("What is this?", *["big.png"] * 4)))

    response = asyncio.run(post())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
    assert service.num_held == service.num_open == 0
