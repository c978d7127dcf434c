"""The whole program through a pipe and through a pseudo-terminal, started as a user starts it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from tiny_export import model_config, write_image, write_llm, write_run

from vlm.export.run import export_run

REPOSITORY = Path(__file__).parents[2]
CLI_DEMO = [str(REPOSITORY / "cli_demo.py"), "--cpu_only", "--dtype", "fp32"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pty")
    write_llm(root / "llm", max_positions=100_000)
    write_run(root / "run", model_config(root))
    export_run(root / "run")
    write_image(root / "cat.png")
    write_image(root / "dog.png", seed=2)
    (root / "page.png").write_text("<html>")
    return root


@pytest.fixture(scope="module")
def environment(root: Path) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name not in ("TMUX", "NO_COLOR", "TERM_PROGRAM")},
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
        "XDG_STATE_HOME": str(root / "state"),
        "PYTHONPATH": str(REPOSITORY),
    }


@pytest.fixture(scope="module")
def chat(root: Path, environment: dict[str, str]) -> Iterator[pexpect.spawn]:
    arguments = [*CLI_DEMO, "-c", str(root / "run" / "export"), "--max-new-tokens", "90000", "--bot_name", "bot"]
    chat = pexpect.spawn(
        sys.executable, arguments, env=environment, cwd=root, encoding="utf-8", timeout=120, dimensions=(40, 150)
    )
    yield chat
    chat.close(force=True)


def at_prompt(chat: pexpect.spawn, prompt: str, line: str) -> None:
    """Type a line once the prompt is up: what is typed before may be lost."""
    chat.expect(prompt)
    chat.expect("\\x1b\\[\\?25h")  # the cursor is shown again
    chat.sendline(line)


def test_a_whole_conversation(chat: pexpect.spawn, root: Path):
    at_prompt(chat, "image \\(empty for none\\)", "page.png")
    chat.expect("is an HTML page")
    chat.expect("image \\(empty for none\\)")
    chat.send("cat.p\t")
    chat.expect(r"cat\.p(\x1b\[[?\d;]*[A-Za-z])*ng")  # completed, maybe in a second refresh of the line
    chat.sendline()
    chat.expect("Image  图片: cat.png")
    chat.expect("▀")  # a thumbnail
    at_prompt(chat, "one more image", "dog.png")
    at_prompt(chat, "one more image", ":f")
    at_prompt(chat, "user>", "这是什么？")
    chat.expect("bot> ")
    chat.expect(".{20}")  # it is writing
    for _ in range(3):  # impatient
        chat.sendintr()
    chat.expect("\\[stopped  已中止\\]")
    at_prompt(chat, "user>", ":his")
    chat.expect("user> \\[cat.png\\] \\[dog.png\\] 这是什么？")
    chat.expect("bot> ")
    at_prompt(chat, "user>", ":save talks")
    chat.expect("Saved as a training record: talks.jsonl")
    at_prompt(chat, "user>", ":clh")
    chat.expect("images kept")
    at_prompt(chat, "user>", ":imgg")
    chat.expect("Did you mean :img")
    chat.expect("user>")
    chat.sendintr()  # at the prompt: drops the line, and stays
    at_prompt(chat, "user>", "/exit")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0
    assert (root / "talks.jsonl").read_text().count("data:image/png;base64") == 2
    history = root / "state" / "vlm" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+这是什么？\n" in history.read_text()


@pytest.mark.thorough
def test_through_a_pipe_it_is_plain_text(root: Path, environment: dict[str, str]):
    done = subprocess.run(
        [sys.executable, *CLI_DEMO, "-c", root / "run" / "export", "--max-new-tokens", "4", "--no-stream"],
        input=b"cat.png\nWhat is this?\n:help\n:img\n" + b"\xff\n:exit\n",
        capture_output=True, check=True, env=environment, cwd=root,
    )  # fmt: skip
    text = done.stdout.decode()
    assert "\033" not in text
    assert text.count("model> ") == 2  # bytes that are no text are a question too
    assert ":clh :clear-his" in text
    assert "\ncat.png\n" in text
