"""The state of a terminal chat, and one answer of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from vlm.apps.session import ChatSession
from vlm.apps.terminal.screen import Screen
from vlm.errors import VLMError
from vlm.generation.generate import GenerationSettings

_DIM, _ERROR, _NAME = "dim", "red", "bold green"


@dataclass
class Talk:
    """What the commands work on.

    Args:
        stop_words: texts that end a reply.
        streams: show a reply while it is written, else when it is finished.
        bot_name: stands before replies, and for `{bot_name}` in a system prompt.
    """

    session: ChatSession
    settings: GenerationSettings
    screen: Screen
    stop_words: tuple[str, ...] = ()
    streams: bool = True
    bot_name: str = "model"
    first_settings: GenerationSettings = field(init=False)

    def __post_init__(self) -> None:
        self.first_settings = self.settings

    def note(self, text: str) -> None:
        self.screen.say(text, _DIM)

    def complain(self, text: str) -> None:
        self.screen.say(text, _ERROR)

    def set_system(self, text: str | None) -> None:
        self.session.system = None if text is None else text.replace("{bot_name}", self.bot_name)

    def ask(self, question: str) -> None:
        self.answer(lambda: self.session.ask(question, self.settings, self.stop_words))

    def retry(self) -> None:
        self.answer(lambda: self.session.retry(self.settings, self.stop_words))

    def answer(self, begin: Callable[[], Generator[str, None, None]]) -> None:
        """Show a reply as it is written. Ctrl-C ends it; what was written stays."""
        try:
            with _stops_at_ctrl_c(self.session) as was_stopped:
                pieces = begin()
                if was_stopped():  # while images were read, which `ask` does not look out for
                    self.session.stop()
                self.screen.write(f"{self.bot_name}> ", _NAME)
                self._show(pieces)
                self.screen.write(" [stopped  已中止]\n" if was_stopped() else "\n")
        except VLMError as error:
            self.complain(str(error))
        except (RuntimeError, MemoryError) as error:  # torch's out of memory is a RuntimeError
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self.complain(
                f"\n{type(error).__name__}: {first}\nThe conversation is as it was before the question. If memory ran "
                "out: :clh, fewer images, a smaller max_new_tokens, or start with --bits 4"
            )

    def _show(self, pieces: Generator[str, None, None]) -> None:
        if self.streams:
            for piece in pieces:
                self.screen.write(piece)
        else:
            self.screen.write("".join(pieces))


@contextmanager
def _stops_at_ctrl_c(session: ChatSession) -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C calls `session.stop` and raises nothing, however often it is pressed. Yields whether it was."""
    pressed = threading.Event()

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        pressed.set()
        session.stop()

    if threading.current_thread() is not threading.main_thread():  # handlers belong to the main thread
        yield pressed.is_set
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
