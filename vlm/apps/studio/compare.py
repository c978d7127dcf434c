"""Chat with two models side by side: what a run made, and what it began from."""

from __future__ import annotations

import traceback
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.apps.web.models import Export, ModelStore, OnProgress, find_exports
from vlm.apps.web.state import PageError, WebChat
from vlm.apps.web.texts import Language
from vlm.apps.web.uploads import Uploads
from vlm.artifacts.manifest import NAME
from vlm.errors import VLMError
from vlm.generation.generate import GenerationSettings
from vlm.inference.load import LoadedModel, load
from vlm.kept_config import read_kept_config
from vlm.logs import warn

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Choice:
    """A model that can be asked, by the label the page shows."""

    label: str
    path: Path

    @property
    def stamp(self) -> float:
        """Changes when the folder is written anew."""
        manifest = self.path / NAME
        file = manifest if manifest.is_file() else self.path / "config.json"
        return file.stat().st_mtime if file.is_file() else 0.0


class Choices:
    """Exports below a folder and what their runs began from; found anew at each look, since runs add to them.

    Args:
        device: where they are loaded.
    """

    def __init__(self, runs: Path, device: str = "auto") -> None:
        self.runs = runs
        self.device = device
        self.store = ModelStore([], max_loaded=2, load_export=self._load)
        self._numbers: dict[tuple[Path, float], int] = {}

    def all(self) -> list[Choice]:
        """Exports by path, then base models."""
        exports = [Choice(export.label, export.path) for export in find_exports(None, self.runs)]
        bases = [base for export in exports if (base := base_of(export.path.parent)) is not None]
        found: dict[Path, Choice] = {}
        for choice in [*exports, *(Choice(str(path), path) for path in bases)]:
            found.setdefault(choice.path.resolve(), choice)
        return list(found.values())

    def pair(self, run: Path) -> tuple[str | None, str | None]:
        """Labels of a run's export and of what it began from; None for what is not there."""
        labels = {choice.path.resolve(): choice.label for choice in self.all()}
        base = base_of(run)
        return labels.get((run / "export").resolve()), None if base is None else labels.get(base.resolve())

    def number(self, label: str | None) -> int:
        """Of a label's model in the store; one that was written anew gets a new number.

        Raises:
            PageError: there is none.
        """
        choice = next((choice for choice in self.all() if choice.label == label), None)
        if choice is None:
            raise PageError("no_model")
        key = choice.path.resolve(), choice.stamp
        if key not in self._numbers:
            self._numbers[key] = len(self.store.exports)
            self.store.exports.append(Export(choice.label, choice.path))
        return self._numbers[key]

    def _load(self, path: Path, on_progress: OnProgress) -> LoadedModel:
        """A language model is asked as the runs that began from it ask it: it may have no chat template of its own."""
        runs = [export.path.parent for export in find_exports(None, self.runs)]
        run = next((run for run in runs if not (path / NAME).is_file() and base_of(run) == path), None)
        template = None if run is None else read_kept_config(run / "config.yaml").data.template
        template = None if template == "plain" else template  # which has no words for a question
        return load(path, device=self.device, on_progress=on_progress, template=template)


def base_of(run: Path) -> Path | None:
    """The export that a run began from, else its language model; None for a name of a hub or what is not there."""
    try:
        kept = read_kept_config(run / "config.yaml")
    except VLMError:
        return None
    path = Path(kept.init_from or kept.model.llm.path)
    return path if path.is_dir() else None


class SideBySide:
    """Two conversations that are asked the same. Held by gradio on the server for one open page."""

    def __init__(self, choices: Choices, uploads: Uploads, language: Language = "en") -> None:
        self.choices = choices
        self.chats = tuple(WebChat(choices.store, uploads, language) for _ in range(2))
        self._notes: list[str | None] = [None, None]  # why a side did not answer the last question
        self._refused: list[Messages] = [[], []]  # that question, on the sides that did not

    def speak(self, language: Language) -> None:
        for chat in self.chats:
            chat.language = language

    def ask(self, owner: str | None, text: str, images: Sequence[str]) -> None:
        """Put a question to both. Raises PageError when it cannot be asked; then neither has it."""
        self._notes, self._refused = [None, None], [[], []]
        asked: list[WebChat] = []
        try:
            for chat in self.chats:
                chat.claim(owner)
                chat.ask(text, images)
                asked.append(chat)
        except PageError:
            for chat in asked:
                chat.take_back()
            raise

    def answer(
        self, labels: Sequence[str | None], settings: GenerationSettings
    ) -> Generator[tuple[Messages, Messages], None, None]:
        """The messages of both sides, again and again: the first model answers, then the second."""
        for side, (chat, label) in enumerate(zip(self.chats, labels, strict=True)):
            try:
                for live in chat.answer(self.choices.number(label), settings, None):
                    yield self._with(side, live)
            except PageError as error:
                self._refuse(side, error.told(chat.language))
            except Exception:
                warn(f"studio: an answer failed\n{traceback.format_exc()}")
                self._refuse(side, PageError("failed").told(chat.language))
            else:
                chat.take_back()  # what was stopped before its first word
            yield self.messages()

    def messages(self) -> tuple[Messages, Messages]:
        return self._of(0), self._of(1)

    def clear(self) -> None:
        self._notes, self._refused = [None, None], [[], []]
        for chat in self.chats:
            chat.clear()

    def _refuse(self, side: int, why: str) -> None:
        """Show the question and why it was not answered, until the next one; the conversation is as before."""
        chat = self.chats[side]
        asked = chat.messages()
        chat.take_back()
        self._refused[side], self._notes[side] = asked[len(chat.messages()) :], why

    def _of(self, side: int) -> Messages:
        note = self._notes[side]
        shown = self.chats[side].messages() + self._refused[side]
        return shown if note is None else [*shown, {"role": "assistant", "content": [{"type": "text", "text": note}]}]

    def _with(self, side: int, live: Messages) -> tuple[Messages, Messages]:
        other = self._of(1 - side)
        return (live, other) if side == 0 else (other, live)
