"""Chat in a terminal: one question, or a conversation with commands. Plain text when it is not a terminal."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from vlm.chat.session import ChatSession
from vlm.errors import RecordError, VLMError
from vlm.export.load import load
from vlm.models.generate import GenerationSettings

HELP = """\
:help            this list                                   显示本帮助
:img             path of the picture                         显示当前图片的路径
:img PATH        another picture; a new conversation         换一张图片，并开始新的对话
:his             the conversation so far                     显示对话历史
:clh             forget the conversation, keep the picture   清除对话历史，保留图片
:undo            take the last question back                 撤回上一个问题
:retry           ask the last question again                 重新回答上一个问题
:clear           clear the screen                            清屏
:exit :quit :q   leave (also Ctrl-D)                         退出（也可按 Ctrl-D）
Commands may begin with / as well. Ctrl-C stops an answer.   命令也可以用 / 开头。按 Ctrl-C 中止回答。"""
COMMANDS = ("help", "img", "his", "clh", "undo", "retry", "clear", "exit", "quit", "q")


def run_terminal(
    export: str | Path,
    images: Sequence[str | Path] = (),
    prompt: str | None = None,
    system: str | None = None,
    settings: GenerationSettings | None = None,
    device: str = "auto",
) -> None:
    """What `vlm chat` does. With `prompt`, print one reply and return; else converse until :exit.

    Raises:
        VLMError: the export, a picture or the conversation cannot be used.
    """
    session = ChatSession(load(export, device=device), system)
    for image in images:
        session.add_image(image)
    if prompt is None:
        Terminal(session, settings or GenerationSettings()).run()
        return
    for piece in session.ask(prompt, settings):
        print(piece, end="", flush=True)
    print()


@dataclass
class Terminal:
    """The interactive loop.

    Args:
        ask_line: reads a line after showing a prompt; raises EOFError at the end of input.
    """

    session: ChatSession
    settings: GenerationSettings
    out: TextIO = field(default_factory=lambda: sys.stdout)
    ask_line: Callable[[str], str] | None = None

    def run(self) -> None:
        """Ask for a picture unless there is one, then answer until the user leaves."""
        read = self.ask_line or _line_reader(self.out)
        self._say("Type a question, or :help for commands.  输入问题，或输入 :help 查看命令。")
        if not self._first_picture(read):
            return
        while (line := _one_line(read, "user> ")) is not None:
            if line and not self._do(line):
                return
        self._say("")

    def _first_picture(self, read: Callable[[str], str]) -> bool:
        """False at the end of input."""
        if self.session.loaded.image_spec is None:
            self._say("This model reads no pictures.  这个模型不看图片。")
            return True
        if self.session.images:
            self._show_picture()
            return True
        while (path := _one_line(read, "picture (empty for none)  图片路径（可留空）> ")) is not None:
            if not path or self._set_picture(path):
                return True
        return False

    def _do(self, line: str) -> bool:
        """One line of the user's. False when it says to leave."""
        if line[0] not in ":/":
            self._answer(lambda: self.session.ask(line, self.settings))
            return True
        name, _, argument = line[1:].strip().partition(" ")
        argument = argument.strip()
        if name in ("exit", "quit", "q"):
            return False
        actions = {
            "help": lambda: self._say(HELP),
            "img": lambda: self._set_picture(argument) if argument else self._show_picture(),
            "his": self._show_history,
            "clh": self._forget,
            "undo": self._undo,
            "retry": lambda: self._answer(lambda: self.session.retry(self.settings)),
            "clear": self._clear_screen,
        }
        if name in actions:
            actions[name]()
        else:
            near = difflib.get_close_matches(name, COMMANDS, 1, cutoff=0.5)
            hint = f"Did you mean :{near[0]}?  是不是 :{near[0]}？" if near else "See :help.  参见 :help。"
            self._say(f"No command {line[0]}{name}. {hint}")
        return True

    def _answer(self, begin: Callable[[], Generator[str, None, None]]) -> None:
        try:
            pieces = begin()
        except VLMError as error:
            self._say(str(error))
            return
        self._write("model> ")
        try:
            for piece in pieces:
                self._write(piece)
            self._say("")
        except KeyboardInterrupt:
            self.session.stop()
            pieces.close()
            self._say(" [stopped  已中止]")
        except VLMError as error:
            self._say(f"\n{error}")

    def _set_picture(self, path: str) -> bool:
        try:
            self.session.set_image(str(Path(path.strip("'\"")).expanduser()))
        except RecordError as error:
            self._say(f"{error}  （图片无法使用）")
            return False
        self._say(f"Picture: {path}  图片：{path}")
        return True

    def _show_picture(self) -> None:
        names = [image if isinstance(image, str) else "a picture in memory" for image in self.session.images]
        self._say("\n".join(names) if names else "No picture.  没有图片。")

    def _show_history(self) -> None:
        if not self.session.history:
            self._say("Nothing was said yet.  还没有对话。")
        for question, reply in self.session.history:
            self._say(f"user> {question}\nmodel> {reply}")

    def _forget(self) -> None:
        self.session.clear(keep_images=True)
        self._say("History cleared, picture kept.  已清除历史，图片保留。")

    def _undo(self) -> None:
        question = self.session.undo()
        self._say("Nothing to undo.  没有可撤回的问题。" if question is None else f"Taken back: {question}  已撤回。")

    def _clear_screen(self) -> None:
        if self.out.isatty():
            self._write("\033[H\033[2J\033[3J")

    def _say(self, text: str) -> None:
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def _one_line(read: Callable[[str], str], prompt: str) -> str | None:
    """A stripped line; "" when Ctrl-C dropped what was typed; None at the end of input."""
    try:
        return read(prompt).strip()
    except KeyboardInterrupt:
        return ""
    except EOFError:
        return None


def _line_reader(out: TextIO) -> Callable[[str], str]:
    """With editing and history at a terminal; plain lines, the prompt left out, when input comes from elsewhere."""
    if sys.stdin.isatty() and out.isatty():
        from prompt_toolkit import PromptSession

        session: PromptSession[str] = PromptSession()
        return session.prompt
    return lambda prompt: _plain_line()


def _plain_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
