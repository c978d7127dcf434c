"""One conversation of the page: what was said, what is asked now, and how an answer is written."""

from __future__ import annotations

import html
import queue
import threading
import time
import traceback
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.apps.session import ChatSession, Exchange
from vlm.apps.web.models import ModelStore
from vlm.apps.web.texts import Language, tell
from vlm.apps.web.uploads import Uploads, check_image
from vlm.data.images import DEFAULT_MAX_PIXELS
from vlm.errors import ConfigError, RecordError, VLMError
from vlm.generation.generate import GenerationSettings
from vlm.inference.load import LoadedModel
from vlm.logs import warn

MAX_IMAGES = 8  # of one message
MAX_QUESTION = 20_000  # characters
MILLION_PIXELS = DEFAULT_MAX_PIXELS // 1_000_000
SECONDS_BETWEEN_UPDATES = 0.08  # each sends the growing answer to the browser
_BAR = "<progress max='1' value='{value:.2f}'></progress>"


class PageError(Exception):
    """What the page says; no more is told. `name` is that of a text of `web_texts`."""

    def __init__(self, name: str, /, **places: object) -> None:
        super().__init__(name)
        self.name = name
        self.places = places

    def told(self, language: Language) -> str:
        return tell(language, self.name, **self.places)


@dataclass(frozen=True)
class Stats:
    """Of one answer; seconds are those after its turn came and the model was there."""

    model: str
    tokens: int
    seconds: float
    first: float  # seconds to the first piece of text
    ended: str = ""  # "stopped" or "full_length"

    def told(self, language: Language) -> str:
        rate = self.tokens / self.seconds if self.seconds else 0.0
        parts = [
            self.model,
            tell(language, "stats", tokens=self.tokens, seconds=self.seconds, rate=rate),
            tell(language, "first", seconds=self.first),
        ]
        return " · ".join([*parts, tell(language, self.ended)] if self.ended else parts)


@dataclass
class Asked:
    """A question that waits for its turn, and how to go back when nothing comes of it."""

    question: str
    images: tuple[str, ...]
    exchanges: list[Exchange]  # before a retry or an edit took some away
    stats: list[Stats]
    is_new: bool  # typed into the box: there it goes again


class WebChat:
    """The state of one open page. Held by gradio on the server; the browser sees `messages` only.

    Not a dataclass: those gradio writes into the page.
    """

    def __init__(self, models: ModelStore, uploads: Uploads, language: Language = "en") -> None:
        self.models = models
        self.uploads = uploads
        self.language: Language = language
        self.owner: str | None = None  # the browser, by its cookie
        self.system: str | None = None
        self.exchanges: list[Exchange] = []
        self.stats: list[Stats] = []
        self.asked: Asked | None = None
        self._running: ChatSession | None = None
        self._stop = threading.Event()

    def __deepcopy__(self, memo: object) -> WebChat:
        """Gradio copies the first state for every page that opens: nothing said is in the copy."""
        return WebChat(self.models, self.uploads, self.language)

    def claim(self, owner: str | None) -> None:
        """Raises PageError when the request comes from another browser than the first did."""
        if self.owner is None:
            self.owner = owner
        if owner is None or owner != self.owner:
            raise PageError("other_browser")

    def ask(self, text: str, images: Sequence[str]) -> None:
        """Put a typed question. Raises PageError when it cannot be asked."""
        self._begin()
        if not text.strip() and not images:
            raise PageError("nothing_asked")
        if len(text) > MAX_QUESTION:
            raise PageError("question_too_long", limit=MAX_QUESTION)
        if len(images) > MAX_IMAGES:
            raise PageError("too_many_images", limit=MAX_IMAGES)
        for image in images:
            self._check(image)
        self._put(text, tuple(images), is_new=True)

    def retry(self, message: int) -> None:
        """Ask the question of a message again; what was said after it is forgotten."""
        self._begin()
        number = self.exchange_of(message)
        again = self.exchanges[number]
        self._put(again.question, again.images, number)

    def edit(self, message: int, text: str) -> None:
        """Ask a message's question in other words, with the same images."""
        self._begin()
        number = self.exchange_of(message)
        if len(text) > MAX_QUESTION:
            raise PageError("question_too_long", limit=MAX_QUESTION)
        if not text.strip() and not self.exchanges[number].images:
            raise PageError("nothing_asked")
        self._put(text, self.exchanges[number].images, number)

    def undo(self, message: int) -> Exchange:
        """Take back the question of a message and what was said after it."""
        self._begin()
        number = self.exchange_of(message)
        taken = self.exchanges[number]
        self._cut(number)
        return taken

    def clear(self) -> None:
        self.stop()
        self.asked = None
        self._cut(0)

    def stop(self) -> None:
        """End the answer that waits or is written; may be called from any thread."""
        self._stop.set()
        running = self._running
        if running is not None:
            running.stop()

    def answer(
        self, model: int, settings: GenerationSettings, system: str | None
    ) -> Generator[list[dict[str, Any]], None, None]:
        """The messages of the page, again and again while the asked question is answered.

        To be followed by `take_back`, however it ended.

        Raises:
            PageError: it failed.
        """
        asked = self.asked
        if asked is None or self._running is not None:
            return
        self.system = system
        try:
            with self.models.turn():
                if not self._stop.is_set():
                    yield from self._load(model)
                if not self._stop.is_set():
                    yield from self._write(asked, model, settings)
        except PageError:
            raise
        except RecordError as error:
            warn(f"webui: {error}")
            raise PageError(_reason(error), name="", limit=MILLION_PIXELS) from None
        except ConfigError as error:  # settings were checked before, so it is the length
            warn(f"webui: {error}")
            raise PageError("too_long") from None
        except Exception:
            warn(f"webui: an answer failed\n{traceback.format_exc()}")
            raise PageError("failed") from None
        finally:
            self._running = None

    def take_back(self) -> Asked | None:
        """What was asked and not answered, if anything; the conversation is then as it was before."""
        asked, self.asked = self.asked, None
        if asked is not None:
            self.exchanges, self.stats = list(asked.exchanges), list(asked.stats)
        return asked

    def messages(self, live: str | None = None) -> list[dict[str, Any]]:
        """All that was said, for gradio's Chatbot; with `live`, the asked question and its answer so far as well."""
        shown: list[dict[str, Any]] = []
        for exchange, stats in zip(self.exchanges, self.stats, strict=True):
            shown += _question(exchange.question, exchange.images)
            reply = exchange.reply or tell(self.language, "no_words")
            shown.append(_says("assistant", reply))
            shown.append(_says("assistant", _small(stats.told(self.language))))
        if self.asked is not None:
            shown += _question(self.asked.question, self.asked.images)
            if live is not None:
                shown.append(_says("assistant", live))
        return shown

    def exchange_of(self, message: int) -> int:
        """Which exchange the n-th of `messages` belongs to. Raises PageError when there is none."""
        first = 0
        for number, exchange in enumerate(self.exchanges):
            first += len(_question(exchange.question, exchange.images)) + 2
            if 0 <= message < first:
                return number
        raise PageError("no_turn")

    def _begin(self) -> None:
        if self.asked is not None or self._running is not None:
            raise PageError("busy")
        self._stop.clear()

    def _check(self, image: str) -> None:
        """The image is this browser's and can be decoded."""
        if not self.uploads.owns(self.owner, image):
            warn("webui: a message named an image that its browser had not uploaded")
            raise PageError("not_yours")
        name = Path(image).name
        try:
            check_image(image)
        except RecordError as error:
            warn(f"webui: {error}")
            raise PageError(_reason(error), name=name, limit=MILLION_PIXELS) from None

    def _put(self, question: str, images: tuple[Any, ...], keep: int | None = None, is_new: bool = False) -> None:
        self.asked = Asked(question, images, list(self.exchanges), list(self.stats), is_new)
        if keep is not None:
            self._cut(keep)

    def _cut(self, keep: int) -> None:
        self.exchanges, self.stats = self.exchanges[:keep], self.stats[:keep]

    def _load(self, model: int) -> Generator[list[dict[str, Any]], None, None]:
        """Bring the model into memory, with a bar; loading is not interrupted, others may want the same model."""
        if not 0 <= model < len(self.models.exports):
            raise PageError("no_model")
        label = self.models.labels[model]
        if self.models.is_loaded(model):
            return
        steps: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        failed: list[Exception] = []

        def work() -> None:
            try:
                self.models.get(model, steps.put)
            except Exception as error:
                failed.append(error)
            finally:
                steps.put(None)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        done: float | None = 0.0
        try:
            while done is not None:
                said = html.escape(tell(self.language, "loading", model=label))
                yield self.messages(f"{said}\n\n{_BAR.format(value=done)}")
                done = steps.get()
        finally:
            worker.join()  # the turn ends with it, also when the page was closed
        if failed:
            reason = "".join(traceback.format_exception(failed[0]))
            warn(f"webui: {label}: {failed[0] if isinstance(failed[0], VLMError) else reason}")
            raise PageError("load_failed", model=label)

    def _write(self, asked: Asked, model: int, settings: GenerationSettings) -> Generator[list[dict[str, Any]]]:
        loaded = self.models.get(model)
        session = ChatSession(loaded, self.system)
        session.exchanges = list(self.exchanges)
        yield self.messages(tell(self.language, "reading"))
        for image in asked.images:
            session.add_image(image)
        self._running = session
        begun = time.perf_counter()
        first = shown = 0.0
        pieces = session.ask(asked.question, settings)
        written = ""
        try:
            for piece in pieces:
                now = time.perf_counter() - begun
                first = first or now
                written += piece
                if self._stop.is_set():
                    session.stop()
                elif now - shown > SECONDS_BETWEEN_UPDATES:
                    shown = now
                    yield self.messages(written)
        finally:
            pieces.close()
        seconds = time.perf_counter() - begun
        reply = session.exchanges[-1].reply
        if self._stop.is_set() and not reply:
            return  # the caller takes the question back
        if self.asked is asked:  # not cleared in the meantime
            tokens = count_tokens(loaded, reply)
            ended = "stopped" if self._stop.is_set() else "full_length" if tokens >= settings.max_new_tokens else ""
            self.exchanges.append(session.exchanges[-1])
            self.stats.append(Stats(self.models.labels[model], tokens, seconds, first or seconds, ended))
            self.asked = None
        yield self.messages()


def count_tokens(loaded: LoadedModel, text: str) -> int:
    return len(loaded.tokenizer.encode(text, add_special_tokens=False))


def _reason(error: RecordError) -> str:
    known = {
        "image_too_large": "image_too_large",
        "image_unreadable": "bad_image",
        "image_missing": "image_gone",
        "image_without_encoder": "no_images",
    }
    return known.get(error.rule, "failed")


def _question(text: str, images: Sequence[Any]) -> list[dict[str, Any]]:
    shown = [{"role": "user", "content": {"path": image}} for image in images]
    return [*shown, _says("user", text)] if text or not images else shown


def _says(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _small(text: str) -> str:
    return f"<small class='stats'>{html.escape(text)}</small>"
