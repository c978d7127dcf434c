"""Chat in a terminal: one question, or a conversation with commands. Plain text when it is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm.apps.session import ChatSession
from vlm.apps.terminal.commands import BY_WORD, MARKS, Leave, completer, is_command, run_command
from vlm.apps.terminal.images import image_paths, is_file, looks_like_path
from vlm.apps.terminal.input import ReadLine, line_reader
from vlm.apps.terminal.screen import Screen
from vlm.apps.terminal.talk import Talk
from vlm.data.images import load_image
from vlm.generation.generate import GenerationSettings
from vlm.inference.load import LoadedModel


def run_terminal(
    load: Callable[[], LoadedModel],
    images: Sequence[str | Path] = (),
    prompt: str | None = None,
    system: str | None = None,
    settings: GenerationSettings | None = None,
    *,
    stop_words: Sequence[str] = (),
    streams: bool = True,
    bot_name: str = "model",
) -> None:
    """What `vlm chat` does. With `prompt`, print one reply and return; else converse until :exit.

    Args:
        load: called after the images were looked at, which takes less time than a model.
        system, stop_words, streams, bot_name: see `Talk`.

    Raises:
        VLMError: the export, an image or the conversation cannot be used.
    """
    for image in images:
        load_image(image)
    screen = Screen()
    if prompt is None and screen.is_terminal:
        screen.say("Loading the model  正在加载模型 ...", "dim")
    loaded = load()
    if prompt is None and screen.is_terminal:
        screen.say(f"The model {loaded.describe_compute()}.", "dim")
    talk = Talk(ChatSession(loaded), settings or GenerationSettings(), screen, tuple(stop_words), streams, bot_name)
    if system is not None:
        talk.set_system(system)
    for image in images:
        talk.session.add_image(image)
    if prompt is None:
        Terminal(talk).run()
        return
    pieces = talk.session.ask(prompt, talk.settings, talk.stop_words)
    for piece in pieces if streams else ["".join(pieces)]:
        screen.write(piece)
    screen.say("")


@dataclass
class Terminal:
    """The interactive loop.

    Args:
        read: reads a line after showing a prompt.
    """

    talk: Talk
    read: ReadLine | None = None

    def run(self) -> None:
        """Ask for images unless there are some, then answer until the user leaves."""
        read = self.read or line_reader(self.talk.screen.out, completer)
        self.talk.note("Type a question, or :help for commands.  输入问题，或输入 :help 查看命令。")
        try:
            question = self._first_images(read)
            while True:
                if question:
                    self._do(question)
                question = _one_line(read, "user> ")
        except Leave:
            return
        except EOFError:
            self.talk.screen.say("")

    def _first_images(self, read: ReadLine) -> str:
        """Add images until :f or an empty line, and return a question that was typed instead of a path, or ""."""
        session = self.talk.session
        if session.loaded.image_spec is None:
            self.talk.note("This model reads no images.  这个模型不看图片。")
            return ""
        if session.images:
            run_command(self.talk, ":img")
            return ""
        while True:
            prompt = "image (empty for none)  图片路径（可留空）> "
            if session.images:
                prompt = "one more image (:f ends)  再加一张图片（输入 :f 结束）> "
            line = _one_line(read, prompt, asks_for_image=True)
            if line.strip() in ("", ":f", "/f", "：f"):
                return ""
            names_files = any(is_file(path) for path in image_paths(line))
            if names_files or (looks_like_path(line) and not is_command(line)):
                self._do(f":img + {line}")
            elif line[0] in MARKS:
                self._do(line)
            else:
                return line

    def _do(self, line: str) -> None:
        try:
            line = BY_WORD.get(line, line)
            if line[0] in MARKS:
                run_command(self.talk, line)
            elif line.strip():
                self.talk.ask(line.strip())
        except KeyboardInterrupt:  # while an image was read, say; an answer ends by itself
            self.talk.note("[stopped  已中止]")


def _one_line(read: ReadLine, prompt: str, asks_for_image: bool = False) -> str:
    """A line, its beginning as typed; "" when Ctrl-C dropped it. Raises EOFError at the end of input."""
    try:
        return read(prompt, asks_for_image).rstrip()
    except KeyboardInterrupt:
        return ""
