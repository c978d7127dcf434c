"""One conversation: its turns, its pictures, and the reply that is being written."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm.data.conversation import Conversation, Turn
from vlm.data.images import load_image
from vlm.errors import ConfigError, RecordError
from vlm.export.load import LoadedModel
from vlm.export.messages import show_pictures
from vlm.models.generate import GenerationSettings

Image = str | bytes


@dataclass(frozen=True)
class Exchange:
    """A question, the pictures it brought, and the reply."""

    question: str
    images: tuple[Image, ...]
    reply: str


class ChatSession:
    """Asks a model, and remembers. One question at a time; `stop` may be called from another thread.

    Args:
        loaded: what `vlm.load` returns; several sessions may share it, one after the other.
        system: system prompt; None takes the export's.
    """

    def __init__(self, loaded: LoadedModel, system: str | None = None) -> None:
        self.loaded = loaded
        self.system = system
        self.exchanges: list[Exchange] = []
        self._waiting: list[Image] = []  # pictures that the next question brings
        self._stop = threading.Event()

    @property
    def history(self) -> list[tuple[str, str]]:
        """Questions and replies, oldest first."""
        return [(exchange.question, exchange.reply) for exchange in self.exchanges]

    @property
    def images(self) -> list[Image]:
        """All pictures of the conversation, in order, with those that wait for the next question."""
        return [image for exchange in self.exchanges for image in exchange.images] + self._waiting

    def add_image(self, image: str | Path | bytes) -> None:
        """Show a picture with the next question.

        Raises:
            RecordError: it is missing or cannot be read, or the model reads no pictures.
        """
        if self.loaded.image_spec is None:
            raise RecordError("image_without_encoder", "this model reads no pictures: it has no vision encoder")
        image = image if isinstance(image, bytes) else str(image)
        load_image(image)  # found out now, not in the middle of an answer
        self._waiting.append(image)

    def set_image(self, image: str | Path | bytes | None) -> None:
        """Start a new conversation about another picture, or about none.

        Raises:
            RecordError: as `add_image`; then nothing changes.
        """
        before = self._waiting
        self._waiting = []
        try:
            if image is not None:
                self.add_image(image)
        except RecordError:
            self._waiting = before
            raise
        self.exchanges = []

    def clear(self, keep_images: bool = False) -> None:
        """Forget the conversation. With `keep_images` its pictures are shown again with the next question."""
        self._waiting = self.images if keep_images else []
        self.exchanges = []

    def undo(self) -> str | None:
        """Take the last question and its reply back; returns the question. Pictures that it brought wait again."""
        if not self.exchanges:
            return None
        last = self.exchanges.pop()
        self._waiting = [*last.images, *self._waiting]
        return last.question

    def retry(self, settings: GenerationSettings | None = None, stop: Sequence[str] = ()) -> Generator[str, None, None]:
        """Ask the last question again. With sampling and no seed, the reply differs."""
        question = self.undo()
        if question is None:
            raise ConfigError("there is no question to ask again")
        return self.ask(question, settings, stop)

    def ask(
        self, question: str, settings: GenerationSettings | None = None, stop: Sequence[str] = ()
    ) -> Generator[str, None, None]:
        """The reply, in pieces as they are written.

        The exchange is remembered when the reply ends, by itself or by `stop`; a reply that fails with an error, or
        whose iterator is thrown away before its first piece, leaves the conversation as it was.

        Raises:
            ConfigError: the conversation has grown longer than the model can read; at once.
            RecordError: a picture has become unreadable; at once.
        """
        self._stop.clear()
        images = tuple(self._waiting)
        conversation = self.conversation(question)
        pieces = self.loaded.stream(conversation, settings, stop, should_stop=self._stop.is_set)
        return self._remember(question, images, pieces)

    def stop(self) -> None:
        """End the reply that is being written after its next token. What was written stays."""
        self._stop.set()

    def conversation(self, question: str) -> Conversation:
        """All turns up to `question`, as the model will read them."""
        turns = [] if self.system is None else [Turn("system", (self.system,))]
        for exchange in self.exchanges:
            turns.append(show_pictures(Turn("user", (exchange.question,)), len(exchange.images)))
            turns.append(Turn("assistant", (exchange.reply,)))
        turns.append(show_pictures(Turn("user", (question,) if question else ()), len(self._waiting)))
        return Conversation(tuple(turns), tuple(self.images), "chat")

    def _remember(self, question: str, images: tuple[Image, ...], pieces: Generator[str, None, None]) -> Generator[str]:
        written = ""
        failed = False
        try:
            for piece in pieces:
                if self._stop.is_set():
                    break
                written += piece
                yield piece
        except GeneratorExit:
            raise
        except Exception:
            failed = True
            raise
        finally:
            pieces.close()
            if not failed:
                self.exchanges.append(Exchange(question, images, written.strip()))
                self._waiting = self._waiting[len(images) :]
