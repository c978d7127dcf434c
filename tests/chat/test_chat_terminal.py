"""The terminal: every command with lines from a list, then the whole through a pseudo-terminal."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest
from tiny_export import model_config, write_llm, write_picture, write_run

from vlm.chat.session import ChatSession
from vlm.chat.terminal import HELP, Terminal, run_terminal
from vlm.export.load import LoadedModel, load
from vlm.export.weights import export_run
from vlm.models.generate import GenerationSettings


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("terminal")
    write_llm(root / "llm", max_positions=100_000)
    write_run(root / "run", model_config(root))
    export_run(root / "run")
    write_picture(root / "cat.png")
    write_picture(root / "dog.png", seed=2)
    return root


@pytest.fixture(scope="module")
def loaded(root: Path) -> LoadedModel:
    return load(root / "run" / "export", device="cpu", precision="fp32")


@pytest.fixture
def converse(loaded: LoadedModel) -> Callable[..., tuple[str, ChatSession]]:
    def converse(*lines: str | type[BaseException]) -> tuple[str, ChatSession]:
        left: Iterator[str | type[BaseException]] = iter((*lines, EOFError))

        def ask_line(prompt: str) -> str:
            line = next(left)
            if isinstance(line, str):
                return line
            raise line

        session, out = ChatSession(loaded), io.StringIO()
        Terminal(session, GenerationSettings(max_new_tokens=4), out, ask_line).run()
        return out.getvalue(), session

    return converse


def test_it_asks_for_a_picture_and_none_is_fine(converse: Callable[..., tuple[str, ChatSession]], root: Path):
    assert converse("", "Hello")[1].images == []
    text, session = converse(str(root / "missing.png"), str(root / "cat.png"), "What?")
    assert "does not exist" in text
    assert session.images == [str(root / "cat.png")]
    assert len(session.history) == 1


def test_the_reply_is_written_behind_its_mark(converse: Callable[..., tuple[str, ChatSession]]):
    text, session = converse("", "Hello")
    assert f"model> {session.history[0][1]}" in text


@pytest.mark.parametrize("leave", [":exit", ":quit", ":q", "/exit", "/q", EOFError])
def test_every_way_to_leave(converse: Callable[..., tuple[str, ChatSession]], leave: str | type[BaseException]):
    assert converse("", leave, "never asked")[1].history == []


def test_clh_forgets_the_conversation_and_keeps_the_picture(
    converse: Callable[..., tuple[str, ChatSession]], root: Path
):
    text, session = converse(str(root / "cat.png"), "What?", ":clh", "/img")
    assert session.history == []
    assert session.images == [str(root / "cat.png")]
    assert text.rstrip().endswith("cat.png")


def test_img_shows_and_changes_the_picture(converse: Callable[..., tuple[str, ChatSession]], root: Path):
    text, session = converse("", ":img", f":img {root / 'dog.png'}", ":img")
    assert "No picture." in text
    assert session.images == [str(root / "dog.png")]
    text, session = converse(str(root / "cat.png"), "What?", ":img nothing.png", ":img '" + str(root / "dog.png") + "'")
    assert "nothing.png" in text
    assert session.images == [str(root / "dog.png")]


def test_history_undo_and_retry(converse: Callable[..., tuple[str, ChatSession]]):
    text, session = converse("", ":his", ":undo", ":retry", "Hello", "Second", ":undo", ":retry", ":his")
    assert "Nothing was said yet." in text
    assert "Nothing to undo." in text
    assert "no question to ask again" in text
    assert "Taken back: Second" in text
    assert [question for question, _ in session.history] == ["Hello"]
    assert f"user> Hello\nmodel> {session.history[0][1]}" in text


@pytest.mark.parametrize(("typed", "meant"), [(":hlep", ":help"), ("/histroy", ":his"), (":imgg", ":img")])
def test_a_typo_gets_the_nearest_command(converse: Callable[..., tuple[str, ChatSession]], typed: str, meant: str):
    text, session = converse("", typed)
    assert f"Did you mean {meant}?" in text
    assert session.history == []


def test_help_lists_every_command_in_both_languages(converse: Callable[..., tuple[str, ChatSession]]):
    text, _ = converse("", ":help")
    assert HELP in text
    for word in (":help", ":clear", ":clh", ":his", ":img", ":exit", ":quit", ":q", "清除对话历史", "退出"):
        assert word in text


def test_clear_writes_no_control_codes_into_a_file(converse: Callable[..., tuple[str, ChatSession]]):
    assert "\033" not in converse("", ":clear")[0]


def test_ctrl_c_at_the_prompt_drops_the_line_and_stays(converse: Callable[..., tuple[str, ChatSession]]):
    assert len(converse("", KeyboardInterrupt, "Hello")[1].history) == 1


def test_an_over_long_question_says_so_and_the_chat_goes_on(
    converse: Callable[..., tuple[str, ChatSession]], loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loaded.model.llm.config, "max_position_embeddings", 64)
    text, session = converse("", "one two three " * 50, "Hello")
    assert "the model reads at most 64" in text
    assert [question for question, _ in session.history] == ["Hello"]


def test_one_shot_prints_the_reply_alone(root: Path, loaded: LoadedModel, capsys: pytest.CaptureFixture[str]):
    settings = GenerationSettings(max_new_tokens=6)
    run_terminal(root / "run" / "export", [root / "cat.png"], "What is this?", None, settings, "cpu")
    out = capsys.readouterr().out
    assert out.endswith("\n")
    assert out.strip() != ""
    assert "model>" not in out


CHAT = """
import sys
from vlm.chat.terminal import run_terminal
from vlm.models.generate import GenerationSettings
run_terminal(sys.argv[1], settings=GenerationSettings(max_new_tokens=int(sys.argv[2])), device="cpu")
"""


def test_through_a_pipe_it_is_plain_text(root: Path):
    done = subprocess.run(
        [sys.executable, "-c", CHAT, str(root / "run" / "export"), "4"],
        input=f"{root / 'cat.png'}\nWhat is this?\n:img\n:exit\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\033" not in done.stdout
    assert "model> " in done.stdout
    assert done.stdout.rstrip().endswith("cat.png")


def test_a_whole_conversation_in_a_terminal_and_ctrl_c_stops_the_answer_only(root: Path):
    environment = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    arguments = ["-c", CHAT, str(root / "run" / "export"), "90000"]
    chat = pexpect.spawn(sys.executable, arguments, env=environment, encoding="utf-8", timeout=120)
    chat.expect("picture \\(empty for none\\)")
    chat.sendline(str(root / "cat.png"))
    chat.expect("Picture: ")
    chat.expect("user>")
    chat.sendline("这是什么？")
    chat.expect("model> ")
    chat.expect(".{20}")  # it is writing
    chat.sendintr()
    chat.expect("\\[stopped")
    chat.expect("user>")
    chat.sendline(":his")
    chat.expect("user> 这是什么？")
    chat.expect("model> ")
    chat.expect("user>")  # what is typed before the prompt is up may be lost
    chat.sendline(":clh")
    chat.expect("picture kept")
    chat.expect("user>")
    chat.sendline("/exit")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0
