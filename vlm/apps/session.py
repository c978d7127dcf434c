"""One conversation: its turns, its images, and the reply that is being written."""

from __future__ import annotations

import re
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm.data.conversation import Conversation, Turn
from vlm.data.images import load_image
from vlm.errors import ConfigError, RecordError
from vlm.generation.generate import GenerationSettings
from vlm.inference.load import LoadedModel
from vlm.inference.messages import show_images

Image = str | bytes


@dataclass(frozen=True)
class Exchange:
    """A question, the images it brought, and the reply."""

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
        self._waiting: list[Image] = []  # images that the next question brings
        self._stop = threading.Event()

    @property
    def history(self) -> list[tuple[str, str]]:
        """Questions and replies, oldest first."""
        return [(exchange.question, exchange.reply) for exchange in self.exchanges]

    @property
    def system_in_use(self) -> str | None:
        """What the model reads as system prompt: this session's, else the export's, else the template's; or none."""
        for text in (self.system, self.loaded.system):
            if text is not None:
                return text
        return self.loaded.template.default_system

    @property
    def images(self) -> list[Image]:
        """All images of the conversation, in order, with those that wait for the next question."""
        return [image for exchange in self.exchanges for image in exchange.images] + self._waiting

    def add_image(self, image: str | Path | bytes) -> None:
        """Show an image with the next question.

        Raises:
            RecordError: it is missing or cannot be read, or the model reads no images.
        """
        self.add_images([image])

    def add_images(self, images: Sequence[str | Path | bytes]) -> None:
        """Show images with the next question: all of them, or on an error none. Raises as `add_image`."""
        self._waiting = self._waiting + self._checked(images)

    def set_images(self, images: Sequence[str | Path | bytes]) -> None:
        """Start a new conversation about these images, or about none. Raises as `add_image`; then nothing changes."""
        self._waiting = self._checked(images)
        self.exchanges = []

    def clear(self, keep_images: bool = False) -> None:
        """Forget the conversation. With `keep_images` its images are shown again with the next question."""
        self._waiting = self.images if keep_images else []
        self.exchanges = []

    def undo(self) -> str | None:
        """Take the last question and its reply back; returns the question. Images that it brought wait again."""
        if not self.exchanges:
            return None
        last = self.exchanges.pop()
        self._waiting = [*last.images, *self._waiting]
        return last.question

    def retry(self, settings: GenerationSettings | None = None, stop: Sequence[str] = ()) -> Generator[str, None, None]:
        """Ask the last question again, with images added since. With sampling and no seed, the reply differs.

        The old reply stays until the new one ends.

        Raises:
            ConfigError: nothing was asked yet; and as `ask`.
        """
        if not self.exchanges:
            raise ConfigError("there is no question to ask again")
        *before, last = self.exchanges
        return self._ask(before, last.question, last.images, settings, stop)

    def ask(
        self, question: str, settings: GenerationSettings | None = None, stop: Sequence[str] = ()
    ) -> Generator[str, None, None]:
        """The reply, in pieces as they are written.

        The exchange is remembered when the reply ends, by itself or by `stop`; a reply that fails with an error, or
        whose iterator is thrown away before its first piece, leaves the conversation as it was.

        Args:
            stop: texts that end the reply; they are not part of it.

        Raises:
            ConfigError: the conversation has grown longer than the model can read; at once.
            RecordError: an image has become unreadable; at once.
        """
        return self._ask(self.exchanges, question, (), settings, stop)

    def stop(self) -> None:
        """End the reply that is being written after its next token. What was written stays."""
        self._stop.set()

    def conversation(self, question: str) -> Conversation:
        """All turns up to `question`, as the model will read them."""
        return self._conversation(self.exchanges, question, self._waiting)

    def _checked(self, images: Sequence[str | Path | bytes]) -> list[Image]:
        if images and self.loaded.image_spec is None:
            raise RecordError("image_without_encoder", "this model reads no images: it has no vision encoder")
        checked = [image if isinstance(image, bytes) else str(image) for image in images]
        for image in checked:
            if isinstance(image, str) and re.match(r"\w{2,}:/", image):
                raise RecordError("remote_image", f"{image[:80]!r}: images are read from disk, nothing is fetched")
            load_image(image)  # found out now, not in the middle of an answer
        return checked

    def _ask(
        self,
        before: Sequence[Exchange],
        question: str,
        images: Sequence[Image],
        settings: GenerationSettings | None,
        stop: Sequence[str],
    ) -> Generator[str, None, None]:
        """Answer `question` after the exchanges `before`, with `images` and those that wait."""
        self._stop.clear()
        taken = len(self._waiting)
        shown = (*images, *self._waiting)
        conversation = self._conversation(before, question, shown)
        pieces = self.loaded.stream(conversation, settings, stop, should_stop=self._stop.is_set)
        return self._remember([*before], question, shown, taken, pieces)

    def _conversation(self, before: Sequence[Exchange], question: str, images: Sequence[Image]) -> Conversation:
        turns = [] if self.system is None else [Turn("system", (self.system,))]
        shown: list[Image] = []
        for exchange in before:
            turns.append(show_images(Turn("user", (exchange.question,)), len(exchange.images)))
            turns.append(Turn("assistant", (exchange.reply,)))
            shown += exchange.images
        turns.append(show_images(Turn("user", (question,) if question else ()), len(images)))
        return Conversation(tuple(turns), (*shown, *images), "chat")

    def _remember(
        self,
        before: list[Exchange],
        question: str,
        images: tuple[Image, ...],
        taken: int,
        pieces: Generator[str, None, None],
    ) -> Generator[str]:
        """Hands the pieces on; at the end, the exchange follows `before` and the `taken` images wait no more."""
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
                self.exchanges = [*before, Exchange(question, images, written.strip())]
                self._waiting = self._waiting[taken:]
