"""`vlm webui`: what it refuses before it loads anything, and what it serves with."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

import vlm.inference.load  # noqa: F401 - before `read_model` is replaced, of which it keeps the one it finds
from vlm.cli.main import app
from vlm.cli.process import run


def webui(*arguments: str) -> int:
    return run(lambda: app(["webui", *arguments], standalone_mode=False))


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "runs" / "a" / "export"
    folder.mkdir(parents=True)
    (folder / "vlm.json").write_text("{}")
    monkeypatch.setattr("vlm.artifacts.plain.read_model", lambda folder: None)
    return folder


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Options that the page would be served with."""
    seen: list[Any] = []
    monkeypatch.setattr("vlm.apps.web.app.run_web", lambda models, options: seen.append((models, options)))
    return seen


def test_a_port_in_use_is_named_in_one_line(export: Path, capsys: pytest.CaptureFixture[str]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert webui(str(export), "--port", str(port)) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: port {port} of 127.0.0.1 is in use; choose another with --port, or --port 0")


def test_port_0_takes_a_free_one():
    from vlm.apps.address import choose_port

    assert 1024 <= choose_port("127.0.0.1", 0) <= 65535


def test_an_address_that_is_not_ours_is_named(capsys: pytest.CaptureFixture[str], export: Path):
    assert webui(str(export), "--host", "192.0.2.1", "--allow-anyone") == 2
    assert "cannot listen at 192.0.2.1:7860" in capsys.readouterr().err


def test_a_network_needs_a_password_or_a_word(export: Path, served: list[Any], capsys: pytest.CaptureFixture[str]):
    assert webui(str(export), "--host", "0.0.0.0", "--port", "0") == 2
    assert "--auth user:password" in capsys.readouterr().err
    assert webui(str(export), "--host", "127.lan.example", "--port", "0") == 2  # a name, which may lead anywhere
    assert "--auth user:password" in capsys.readouterr().err
    assert served == []
    assert webui(str(export), "--host", "0.0.0.0", "--port", "0", "--auth", "me:secret:more") == 0
    assert served[-1][1].auth == ("me", "secret:more")
    assert webui(str(export), "--host", "0.0.0.0", "--port", "0", "--allow-anyone") == 0
    for bad in ("me", ":", "me:", ":x"):
        assert webui(str(export), "--port", "0", "--auth", bad) == 2


def test_a_public_address_is_made_only_when_asked_and_with_a_password(export: Path, served: list[Any]):
    assert webui(str(export), "--port", "0") == 0
    assert served[-1][1].share is False
    assert webui(str(export), "--port", "0", "--share", "--allow-anyone") == 2
    assert webui(str(export), "--port", "0", "--share", "--auth", "me:secret") == 0
    assert served[-1][1].share is True


def test_the_defaults_are_closed(export: Path, served: list[Any]):
    webui(str(export), "--port", "0")
    models, options = served[-1]
    assert (options.host, options.auth, options.share, options.max_file_mb) == ("127.0.0.1", None, False, 20)
    assert models.exports[0].path == export


def test_what_gradio_is_started_with(export: Path, monkeypatch: pytest.MonkeyPatch):
    import gradio as gr

    from vlm.apps.web.app import WebOptions, serve
    from vlm.apps.web.models import Export, ModelStore

    seen: dict[str, Any] = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: seen.update(options))
    monkeypatch.setenv("GRADIO_SHARE", "True")
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    import os

    running = serve(ModelStore([Export("a", export)]), WebOptions(port=0))
    assert not running.page.analytics_enabled
    assert "GRADIO_SHARE" not in os.environ
    assert "GRADIO_ALLOWED_PATHS" not in os.environ
    for block in running.page.blocks.values():  # a request may name a URL as the path of a file, for any of them
        with pytest.raises(ValueError, match="URL"):
            asyncio.run(block.async_move_resource_to_block_cache("http://pictures.example/1.png"))
    assert seen["share"] is False
    assert running.url.startswith("http://127.0.0.1:")
    assert seen["max_file_size"] == 20 * 2**20
    assert (seen["show_error"], seen["run_history"], seen["mcp_server"], seen["num_workers"]) == (
        False,
        False,
        False,
        0,
    )
    assert running.folder.stat().st_mode & 0o077 == 0  # nobody else on the machine reads the images
    running.page.server = SimpleNamespace(config=SimpleNamespace())
    running.close()
    assert not running.folder.exists()


def test_exports_are_offered_without_naming_one(
    export: Path, served: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert webui("--runs", str(tmp_path / "runs"), "--port", "0") == 0
    assert served[-1][0].labels == ["a"]
    assert webui("--runs", str(tmp_path / "nothing"), "--port", "0") == 5
    assert "no export below" in capsys.readouterr().err
    assert webui(str(tmp_path / "nothing"), "--port", "0") == 5


def test_examples_are_images_with_the_question_beside_them(
    export: Path, served: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "examples"
    folder.mkdir()
    assert webui(str(export), "--port", "0", "--examples", str(folder)) == 2
    assert "no folder with images" in capsys.readouterr().err
    for name, question in (("a.png", "Which animal?\n"), ("b.jpg", None)):
        (folder / name).write_bytes(b"")
        if question is not None:
            (folder / name).with_suffix(".txt").write_text(question)
    assert webui(str(export), "--port", "0", "--examples", str(folder)) == 0
    assert served[-1][1].examples == (("Which animal?", folder / "a.png"), ("What is this?", folder / "b.jpg"))


@pytest.mark.parametrize("command", ["webui", "serve"])
def test_help_comes_quickly(command: str):
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "vlm.cli.main", command, "--help"], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - begun < 10  # a loaded machine; alone it is under 1 s, as nothing heavy is imported
    assert "--host" in done.stdout


@pytest.mark.parametrize("name", ["webui", "serve"])
def test_every_option_is_explained_in_both_languages(name: str):
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    texts = {"": command.help} | {option.name: option.help for option in command.params}
    assert len(texts) > 10
    for text in texts.values():
        assert re.match(r"[a-zA-Z0-9]", text)
        assert re.search("[一-鿿].*。$", text.strip())
