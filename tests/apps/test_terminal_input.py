"""History file and completion of the terminal chat."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent, Completer
from prompt_toolkit.document import Document
from tiny_export import write_image

from vlm.apps.terminal.commands import completer
from vlm.apps.terminal.input import history_file, image_completer, open_history


def completions(completer: Completer, line: str) -> list[str]:
    found = completer.get_completions(Document(line, len(line)), CompleteEvent())
    return [line[: len(line) + completion.start_position] + completion.text for completion in found]


def test_the_history_lies_in_the_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "vlm" / "chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_file() == tmp_path / ".local" / "state" / "vlm" / "chat_history"


def test_only_the_owner_can_read_the_history(tmp_path: Path):
    path = tmp_path / "vlm" / "chat_history"
    open_history(path).append_string("这是什么？")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)  # by an older program
    assert list(open_history(path).load_history_strings()) == ["这是什么？"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_history_that_cannot_be_written_does_not_stop_the_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "vlm").write_text("a file where the folder should be")
    history = open_history(tmp_path / "vlm" / "chat_history")
    history.append_string("Hello")
    assert history.get_strings() == ["Hello"]
    assert "cannot be written" in capsys.readouterr().err


def test_a_history_that_is_lost_later_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "vlm" / "chat_history"
    history = open_history(path)
    path.unlink()
    path.mkdir()
    history.append_string("Hello")
    assert "this line is not kept" in capsys.readouterr().err


def test_commands_their_images_files_and_settings_are_completed(tmp_path: Path):
    write_image(tmp_path / "cat.png")
    (tmp_path / "cats").mkdir()
    (tmp_path / "cat.txt").write_text("no image")
    assert completions(completer(), ":cl") == [":clh", ":clear-his", ":clear", ":cl"]
    assert completions(completer(), "/sa") == ["/save"]
    for line in (f":img {tmp_path}/c", f":img + {tmp_path}/c"):
        assert sorted(completions(completer(), line)) == [f"{line}at.png", f"{line}ats"]
    assert f":save {tmp_path}/cat.txt" in completions(completer(), f":save {tmp_path}/cat.t")
    assert completions(completer(), ":conf do_sample=true top_") == [
        ":conf do_sample=true top_p=",
        ":conf do_sample=true top_k=",
    ]
    assert completions(completer(), "What is") == []
    assert completions(image_completer(), f"{tmp_path}/cat.p") == [f"{tmp_path}/cat.png"]
