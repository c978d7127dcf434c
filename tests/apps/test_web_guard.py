"""What passes between the network and the page, and who may read which image."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.requests import ClientDisconnect
from tiny_export import write_image

from vlm.apps.web.guard import COOKIE, Guard, owner_of
from vlm.apps.web.uploads import UploadRefused, Uploads

ANNA, BERT = "a" * 32, "b" * 32
OVERHEAD = 16 << 10  # bytes counted for a file beside its own


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    (tmp_path / "up").mkdir()
    return Uploads(tmp_path / "up")


def files_of(uploads: Uploads) -> list[Path]:
    return [path for path in uploads.folder.rglob("*") if path.is_file()]


def ask(
    guard: Guard, path: str, *, method: str = "GET", owner: str | None = ANNA, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one request."""
    given = {"host": "127.0.0.1:7860"} | ({"cookie": f"{COOKIE}={owner}"} if owner else {}) | (headers or {})
    scope = {
        "type": "http",
        "path": path,
        "method": method,
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    asyncio.run(guard(scope, receive, send))
    answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], answered, b"".join(message.get("body", b"") for message in sent)


def app_that_answers(body: bytes, status: int = 200, seen: list[Any] | None = None) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if seen is not None:
            seen.append(scope)
        headers = [(b"content-type", b"text/html"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def guard_of(uploads: Uploads, app: Any, local_only: bool = True) -> Guard:
    return Guard(app, uploads, local_only, max_file_size=1000, max_body=5000, head="<script>1</script>")


# Uploads


def test_only_the_browser_that_uploaded_an_image_owns_it(uploads: Uploads):
    path = str(write_image(uploads.folder / "cat.png"))
    uploads.accept(ANNA, [path])
    assert uploads.owns(ANNA, path)
    assert not uploads.owns(BERT, path)
    assert not uploads.owns(None, path)


def test_a_path_is_looked_up_with_links_and_dots_followed(uploads: Uploads, tmp_path: Path):
    path = write_image(uploads.folder / "cat.png")
    uploads.accept(ANNA, [str(path)])
    (uploads.folder / "sub").mkdir()
    assert uploads.owns(ANNA, str(uploads.folder / "sub" / ".." / "cat.png"))
    secret = write_image(tmp_path / "secret.png")
    (uploads.folder / "link.png").symlink_to(secret)
    for other in (str(secret), "/etc/passwd", "", "\0", str(uploads.folder), str(uploads.folder / "link.png")):
        assert not uploads.owns(ANNA, other)


def test_a_file_outside_the_folder_is_never_owned(uploads: Uploads, tmp_path: Path):
    outside = str(write_image(tmp_path / "outside.png"))
    uploads.accept(ANNA, [outside])
    assert not uploads.owns(ANNA, outside)
    assert Path(outside).exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.png", b"<html><script>alert(1)</script>"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"),
        ("page.html", b"<html></html>"),
        ("cut.png", b"\x89PNG\r\n\x1a\n\0\0"),
        ("empty.jpg", b""),
    ],
)
def test_what_is_no_image_is_refused_and_removed(uploads: Uploads, name: str, content: bytes):
    with uploads.receive():
        good, bad = write_image(Path(uploads) / "good.png"), Path(uploads) / name
        bad.write_bytes(content)
        with pytest.raises(UploadRefused, match=name) as refused:
            uploads.accept(ANNA, [str(good), str(bad)])
    assert refused.value.status == 415
    assert files_of(uploads) == []
    assert not re.search(r"0x|/|Error|identify", str(refused.value))  # nothing of the decoder's, no folder


def test_an_image_under_the_name_of_a_page_is_refused(uploads: Uploads):
    path = uploads.folder / "cat.html"
    write_image(uploads.folder / "cat.png").rename(path)
    with pytest.raises(UploadRefused):
        uploads.accept(ANNA, [str(path)])
    assert not uploads.owns(ANNA, str(path))


def test_too_many_pixels_are_refused_in_words(uploads: Uploads):
    path = uploads.folder / "huge.png"
    Image.new("1", (8000, 8000)).save(path)
    with pytest.raises(UploadRefused, match="at most 50 million"):
        uploads.accept(ANNA, [str(path)])


def test_an_upload_leaves_nothing_but_what_was_accepted(uploads: Uploads):
    with uploads.receive():
        for name in ("hash", "empty"):
            (Path(uploads) / name).mkdir()
        cat = write_image(Path(uploads) / "hash" / "cat.png")
        (Path(uploads) / "tmp123").write_bytes(b"of no one")
        uploads.accept(ANNA, [str(cat)])
    assert files_of(uploads) == [cat]
    assert not (cat.parents[1] / "empty").exists()
    with suppress(ClientDisconnect), uploads.receive():
        write_image(Path(uploads) / "dog.png")
        raise ClientDisconnect
    assert list(uploads.folder.iterdir()) == [cat.parents[1]]


def test_an_upload_that_ends_removes_nothing_of_one_in_progress(uploads: Uploads):
    with uploads.receive():
        going_on = Path(uploads) / "tmp123"
        going_on.write_bytes(b"half")
        asyncio.run(upload_in_another_task(uploads))
        assert files_of(uploads) == [going_on]


async def upload_in_another_task(uploads: Uploads) -> None:
    with uploads.receive():
        (Path(uploads) / "tmp456").write_bytes(b"whole")


def keep(uploads: Uploads, size: int, name: str = "cat.bmp") -> Path:
    """Upload an image of so many bytes, all that is counted for it included."""
    with uploads.receive() as count:
        path = write_image(Path(uploads) / name)
        with path.open("ab") as file:
            file.truncate(size - OVERHEAD)
        count(size - OVERHEAD)
        uploads.accept(ANNA, [str(path)])
    return path


def test_the_oldest_images_go_when_the_folder_is_full(uploads: Uploads):
    uploads.max_total = 300_000
    paths = [keep(uploads, 100_000) for _ in range(4)]
    assert [path.exists() for path in paths] == [False, True, True, True]
    assert not uploads.owns(ANNA, str(paths[0]))
    assert len(list(uploads.folder.iterdir())) == 3


def test_what_is_still_coming_counts_too(uploads: Uploads):
    uploads.max_total = 300_000
    paths = [keep(uploads, 100_000) for _ in range(3)]
    with uploads.receive() as count:
        count(100_000)
        assert [path.exists() for path in paths] == [False, True, True]
        with pytest.raises(UploadRefused, match="too many images") as refused:
            count(250_000)
        assert refused.value.status == 503
    assert keep(uploads, 100_000).exists()
    assert paths[2].exists()  # what came before counts no more


def test_many_small_files_count_as_the_room_they_take(uploads: Uploads):
    uploads.max_total = 10 * OVERHEAD
    for number in range(20):
        keep(uploads, OVERHEAD + 1000, f"{number}.png")
    assert len(files_of(uploads)) < 10


# The guard


def test_a_new_browser_gets_a_cookie_that_the_request_itself_carries(uploads: Uploads):
    seen: list[Any] = []
    guard = guard_of(uploads, app_that_answers(b"{}", seen=seen))
    _, headers, _ = ask(guard, "/config", owner=None)
    owner = owner_of(headers["set-cookie"])
    assert owner is not None
    assert "HttpOnly" in headers["set-cookie"]
    assert owner_of(dict(seen[0]["headers"])[b"cookie"].decode()) == owner
    assert "set-cookie" not in ask(guard, "/config", owner=ANNA)[1]
    assert "set-cookie" in ask(guard, "/config", owner="x; drop")[1]  # not of our form


def test_images_are_served_to_their_owner_only(uploads: Uploads):
    path = str(write_image(uploads.folder / "cat.png"))
    uploads.accept(ANNA, [path])
    guard = guard_of(uploads, app_that_answers(b"image"))
    status, headers, body = ask(guard, f"/gradio_api/file={path}")
    assert (status, body) == (200, b"image")
    assert headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert headers["x-content-type-options"] == "nosniff"
    assert ask(guard, f"/gradio_api/file={path}", owner=BERT)[0] == 403
    assert ask(guard, f"/gradio_api/file={path}", owner=None)[0] == 403
    for other in ("/etc/passwd", "http://127.0.0.1/x.png", f"{path}/../../../etc/passwd"):
        assert ask(guard, f"/gradio_api/file={other}")[0] == 403


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/proxy=http://x", "/gradio_api/deep_link", "/monitoring", "/gradio_api/component_server", "/docs",
     "/gradio_api/process_recording", "/gradio_api/runs", "/gradio_api/file/x", "/gradio_api/stream/x", "/x"],
)  # fmt: skip
def test_what_the_page_does_not_need_is_not_there(uploads: Uploads, path: str):
    assert ask(guard_of(uploads, app_that_answers(b"reached")), path)[0] == 404


@pytest.mark.parametrize("path", ["/", "/config", "/assets/index.js", "/gradio_api/queue/join", "/theme.css"])
def test_what_the_page_needs_is_there(uploads: Uploads, path: str):
    assert ask(guard_of(uploads, app_that_answers(b"reached")), path)[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example:7860", 403), ("127.lan.example", 403), ("", 403), ("localhost:7860", 200), ("127.0.0.2:7860", 200),
     ("[::1]:7860", 200)],
)  # fmt: skip
def test_a_foreign_name_for_this_machine_is_refused(uploads: Uploads, host: str, status: int):
    app = app_that_answers(b"reached")
    assert ask(guard_of(uploads, app), "/config", headers={"host": host})[0] == status
    assert ask(guard_of(uploads, app, local_only=False), "/config", headers={"host": host})[0] == 200


def test_a_body_needs_a_length_within_the_limit(uploads: Uploads):
    guard = guard_of(uploads, app_that_answers(b"[]"))
    assert ask(guard, "/gradio_api/upload", method="POST")[0] == 411
    assert ask(guard, "/gradio_api/upload", method="POST", headers={"content-length": "5001"})[0] == 413
    assert ask(guard, "/gradio_api/upload", method="POST", headers={"content-length": "5000"})[0] == 200


def app_that_writes(uploads: Uploads, name: str, content: bytes, others: int = 0) -> Any:
    """As gradio does: answers with the names of some files, and says nothing of others."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b""
        path = Path(uploads) / "hash" / name
        path.parent.mkdir()
        path.write_bytes(content)
        for number in range(others):
            (Path(uploads) / f"tmp{number}").write_bytes(b"<html>")
        await app_that_answers(json.dumps([str(path)]).encode())(scope, receive, send)

    return app


def test_an_upload_is_answered_after_it_was_looked_at(uploads: Uploads, tmp_path: Path):
    cat = write_image(tmp_path / "cat.png").read_bytes()
    length = {"content-length": "10"}
    guard = guard_of(uploads, app_that_writes(uploads, "cat.png", cat, others=3))
    status, _, body = ask(guard, "/gradio_api/upload", method="POST", headers=length)
    assert status == 200
    assert uploads.owns(ANNA, json.loads(body)[0])
    assert [path.name for path in files_of(uploads)] == ["cat.png"]
    guard = guard_of(uploads, app_that_writes(uploads, "bad.png", b"<html>"))
    status, headers, body = ask(guard, "/gradio_api/upload", method="POST", headers=length)
    assert status == 415
    assert headers["content-type"].startswith("text/plain")
    assert "bad.png is no image" in body.decode()
    assert "无法读取图片 bad.png" in body.decode()
    assert [path.name for path in files_of(uploads)] == ["cat.png"]


def test_an_upload_that_stalls_is_ended(uploads: Uploads, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vlm.apps.web.guard._STALL_SECONDS", 0.01)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        (Path(uploads) / "tmp123").write_bytes(b"half")
        await receive()

    async def never() -> Any:
        await asyncio.sleep(60)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-length", b"10"), (b"cookie", f"{COOKIE}={ANNA}".encode())]
    scope = {"type": "http", "path": "/gradio_api/upload", "method": "POST", "headers": headers}
    asyncio.run(guard_of(uploads, app)(scope, never, send))
    assert sent[0]["status"] == 408
    assert list(uploads.folder.iterdir()) == []


FOREIGN = [
    {"origin": "https://evil.example"},
    {"origin": "http://127.0.0.1:3000"},
    {"origin": "null"},
    {"origin": "http://evil.example/127.0.0.1:7860"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site", "origin": "http://127.0.0.1:3000"},
    {"sec-fetch-site": "cross-site", "origin": "http://127.0.0.1:7860"},
]
OWN = [
    {},  # a program
    {"origin": "http://127.0.0.1:7860"},
    {"origin": "https://127.0.0.1:7860"},  # a proxy with TLS is in between
    {"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1:7860"},
    {"sec-fetch-site": "same-origin", "origin": "https://chat.example"},  # a proxy that puts its own Host
]


@pytest.mark.parametrize("local_only", [True, False])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_the_page_of_another_site_can_change_nothing(uploads: Uploads, method: str, local_only: bool):
    seen: list[Any] = []
    guard = guard_of(uploads, app_that_answers(b"[]", seen=seen), local_only)
    for path in ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/run/x", "/login"):
        for headers in FOREIGN:
            assert ask(guard, path, method=method, headers={"content-length": "0"} | headers)[0] == 403
    assert seen == []
    for headers in OWN:
        assert ask(guard, "/login", method=method, headers={"content-length": "0"} | headers)[0] == 200
    assert ask(guard, "/config", headers=FOREIGN[0])[0] == 200  # a link to the page


def test_gradios_own_refusals_are_told_in_our_words(uploads: Uploads):
    length = {"content-length": "10"}
    too_large = guard_of(uploads, app_that_answers(b"exceeded /srv/x", status=413))
    status, _, body = ask(too_large, "/gradio_api/upload", method="POST", headers=length)
    assert status == 413
    assert b"/srv" not in body
    status, _, body = ask(
        guard_of(uploads, app_that_answers(b"at /x", 500)), "/gradio_api/upload", method="POST", headers=length
    )
    assert (status, b"/x" in body) == (400, False)


def test_the_page_carries_our_script_first_and_may_load_nothing_from_elsewhere(uploads: Uploads):
    guard = guard_of(uploads, app_that_answers(b"<html><head><script>gradio</script></head></html>"))
    _, headers, body = ask(guard, "/")
    assert body == b"<html><head><script>1</script><script>gradio</script></head></html>"
    assert int(headers["content-length"]) == len(body)
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
