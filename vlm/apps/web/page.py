"""The page: gradio's components, and what each click does. All that is remembered lives in `WebChat`."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from vlm.apps.record import record_line
from vlm.apps.web.guard import cookie_of, owner_of
from vlm.apps.web.look import DOWNLOAD, LANGUAGE_COOKIE, REMEMBER_LANGUAGE, START, THEME_SWITCH
from vlm.apps.web.models import ModelStore
from vlm.apps.web.state import MAX_QUESTION, PageError, WebChat
from vlm.apps.web.texts import Language, preferred, tell
from vlm.apps.web.uploads import Uploads
from vlm.data.records import IMAGE_SUFFIXES
from vlm.errors import RecordError
from vlm.generation.generate import GenerationSettings

MAX_SYSTEM = 4000  # characters
_FETCH = "async_move_resource_to_block_cache"  # gradio's, for every file that a request or an answer names
EXAMPLES = ("example_1", "example_2", "example_3")
# name -> least, greatest; checked on the server as well, since requests need not come from the page
RANGES = {
    "temperature": (0.05, 5.0),
    "top_p": (0.01, 1.0),
    "top_k": (0, 1000),
    "num_beams": (1, 8),
    "max_new_tokens": (1, 4096),
    "repetition_penalty": (0.5, 3.0),
    "length_penalty": (-2.0, 4.0),
    "seed": (-1, 2**53),  # -1: none
}
_WHOLE = ("top_k", "num_beams", "max_new_tokens", "seed")
_NAMES = ["do_sample", *RANGES]


def settings_of(values: dict[str, Any]) -> GenerationSettings:
    """Raises PageError naming the setting that is no number in its range."""
    checked: dict[str, Any] = {"do_sample": bool(values["do_sample"])}
    for name, (least, greatest) in RANGES.items():
        value = values[name]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not least <= value <= greatest or (name in _WHOLE and value != int(value)):
            raise PageError("bad_setting", name=name)
        checked[name] = int(value) if name in _WHOLE else float(value)
    checked["seed"] = None if checked["seed"] < 0 else checked["seed"]
    return GenerationSettings(**checked)


async def _never_fetch(block: Any, path: str | None) -> str | None:
    """In place of gradio's: where a request names a URL as a file's path, it would download that, of any size."""
    if path is not None and "://" in path:
        raise ValueError("the path of a file is a URL")
    return path


def never_fetch() -> None:
    """Let gradio download nothing that a request names, in every page of this process."""
    setattr(gr.blocks.Block, _FETCH, _never_fetch)


@dataclass
class Widgets:
    """Every component that has a text or a value."""

    state: gr.State
    notice: gr.HTML  # why something was refused
    heading: gr.Markdown
    chatbot: gr.Chatbot
    box: gr.MultimodalTextbox
    model: gr.Dropdown
    system: gr.Textbox
    settings: dict[str, Any]
    sampling: gr.Accordion
    language: gr.Button
    theme: gr.Button
    clear: gr.Button
    save: gr.Button
    record: gr.Textbox  # hidden; on its way to the browser's downloads

    @property
    def setting_list(self) -> list[Any]:
        return [self.settings[name] for name in _NAMES]


def build_page(
    models: ModelStore,
    uploads: Uploads,
    language: Language | None = None,
    settings: GenerationSettings | None = None,
    examples: Sequence[tuple[str, Path | None]] = (),
    max_waiting: int = 16,
) -> gr.Blocks:
    """The page, not yet served.

    Args:
        language: None takes that of the browser.
        examples: questions to click, each with an image that is shared in `uploads`, or none; empty takes `EXAMPLES`.
        max_waiting: questions of all pages that wait for their turn; the next ones are refused.
    """
    first = language or "en"
    settings = settings or GenerationSettings()
    never_fetch()
    with gr.Blocks(title=tell(first, "title"), analytics_enabled=False, fill_height=True, delete_cache=None) as page:
        widgets = _lay_out(WebChat(models, uploads, first), first, settings, examples)
        _connect(page, widgets, language, examples)
    page.queue(max_size=max_waiting, api_open=False, default_concurrency_limit=8)
    return page


def _lay_out(
    chat: WebChat, language: Language, settings: GenerationSettings, examples: Sequence[tuple[str, Path | None]]
) -> Widgets:
    with gr.Row(elem_id="top"):
        heading = gr.Markdown(elem_id="heading")
        clear = gr.Button(elem_id="clear", size="sm")
        language_button = gr.Button(elem_id="language", size="sm")
        theme = gr.Button("◐", elem_id="theme", size="sm")
    with gr.Sidebar(position="right", open=False, width=340, elem_id="panel"):
        labels = [(label, number) for number, label in enumerate(chat.models.labels)]
        model = gr.Dropdown(labels, value=0, elem_id="model")
        system = gr.Textbox(lines=2, max_lines=6, max_length=MAX_SYSTEM, elem_id="system")
        panel, sampling = _settings_panel(settings)
        save = gr.Button(elem_id="save", size="sm")
    chatbot = gr.Chatbot(
        elem_id="chat", scale=1, height="100%", min_height=260, show_label=False, editable="user", buttons=["copy"],
        layout="bubble", examples=None, latex_delimiters=[], feedback_options=None, resizable=False,
        group_consecutive_messages=False, allow_file_downloads=False,
    )  # fmt: skip
    notice = gr.HTML(elem_id="notice", padding=False)
    box = gr.MultimodalTextbox(
        elem_id="box", file_count="multiple", file_types=list(IMAGE_SUFFIXES), show_label=False, sources=["upload"],
        stop_btn=False, autofocus=True, max_plain_text_length=MAX_QUESTION, max_lines=8,
    )  # fmt: skip
    state = gr.State(chat, time_to_live=24 * 3600)
    record = gr.Textbox(visible="hidden", elem_id="record")
    return Widgets(
        state, notice, heading, chatbot, box, model, system, panel, sampling, language_button, theme, clear, save,
        record,
    )  # fmt: skip


def _settings_panel(settings: GenerationSettings) -> tuple[dict[str, Any], gr.Accordion]:
    def slider(name: str, step: float) -> gr.Slider:
        least, greatest = RANGES[name]
        return gr.Slider(least, greatest, getattr(settings, name), step=step, elem_id=f"set-{name}")

    panel: dict[str, Any] = {"max_new_tokens": slider("max_new_tokens", 1)}
    with gr.Accordion(open=True) as sampling:
        panel["do_sample"] = gr.Checkbox(settings.do_sample, elem_id="set-do_sample")
        panel["temperature"] = slider("temperature", 0.05)
        panel["top_p"] = slider("top_p", 0.01)
        panel["top_k"] = slider("top_k", 1)
        panel["seed"] = gr.Number(
            -1 if settings.seed is None else settings.seed, precision=0, minimum=-1, elem_id="set-seed"
        )
    panel["num_beams"] = slider("num_beams", 1)
    panel["length_penalty"] = slider("length_penalty", 0.1)
    panel["repetition_penalty"] = slider("repetition_penalty", 0.05)
    return panel, sampling


def texts_of(widgets: Widgets, language: Language, examples: Sequence[tuple[str, Path | None]]) -> dict[Any, Any]:
    """All texts of the page in a language, as gradio's updates."""

    def text(name: str) -> str:
        return tell(language, name)

    updates: dict[Any, Any] = {
        widgets.heading: f"## {text('title')}",
        widgets.chatbot: gr.update(
            placeholder=f"### {text('welcome')}\n\n{text('welcome_more')}", examples=_cards(language, examples)
        ),
        widgets.box: gr.update(placeholder=text("input"), label=text("input")),
        widgets.record: gr.update(label=text("save")),
        widgets.model: gr.update(label=text("model"), info=text("model_info")),
        widgets.system: gr.update(label=text("system"), info=text("system_info")),
        widgets.sampling: gr.update(label=text("sampling")),
        widgets.language: text("language"),
        widgets.clear: text("clear"),
        widgets.save: text("save"),
    }
    for name, component in widgets.settings.items():
        info = text(f"{name}_info") if name in ("do_sample", "top_k", "num_beams", "length_penalty", "seed") else None
        updates[component] = gr.update(label=text(name), info=info)
    return updates


def _cards(language: Language, examples: Sequence[tuple[str, Path | None]]) -> list[dict[str, Any]]:
    if not examples:
        return [{"text": tell(language, name)} for name in EXAMPLES]
    return [{"text": text, **({"files": [str(image)]} if image else {})} for text, image in examples]


Changes = dict[Any, Any]  # component -> its new value, or an update


@dataclass
class Actions:
    """What the events do. Each returns changes; what is refused is told in the notice, nothing is raised."""

    w: Widgets
    language: Language | None
    examples: Sequence[tuple[str, Path | None]]

    def opened(self, chat: WebChat, request: gr.Request) -> Changes:
        def act() -> Changes:
            remembered = cookie_of(request.headers.get("cookie"), LANGUAGE_COOKIE)
            chat.language = self.language or preferred(request.headers.get("accept-language"), remembered)
            return texts_of(self.w, chat.language, self.examples)

        return self._told(chat, request, act)

    def switched(self, chat: WebChat, request: gr.Request) -> Changes:
        def act() -> Changes:
            chat.language = "en" if chat.language == "zh" else "zh"
            updates = texts_of(self.w, chat.language, self.examples)
            if chat.asked is None:  # else the answer that is written brings it
                updates[self.w.chatbot]["value"] = chat.messages()
            return updates

        return self._told(chat, request, act)

    def submitted(self, chat: WebChat, message: dict[str, Any] | None, request: gr.Request) -> Changes:
        message = message or {}

        def act() -> Changes:
            chat.ask(message.get("text") or "", message.get("files") or [])
            return self._asking(chat, empty_box=True)

        return self._told(chat, request, act)

    def chosen(
        self, chat: WebChat, message: dict[str, Any] | None, request: gr.Request, event: gr.SelectData
    ) -> Changes:
        """An example was clicked. One without an image is asked of those in the box."""

        def act() -> Changes:
            number = _index(event.index)
            cards = self.examples or [(tell(chat.language, name), None) for name in EXAMPLES]
            if not 0 <= number < len(cards):
                raise PageError("no_turn")
            text, image = cards[number]
            chat.ask(text, [str(image)] if image else (message or {}).get("files") or [])
            return self._asking(chat, empty_box=True)

        return self._told(chat, request, act)

    def retried(self, chat: WebChat, request: gr.Request, event: gr.RetryData) -> Changes:
        def act() -> Changes:
            chat.retry(_index(event.index))
            return self._asking(chat)

        return self._told(chat, request, act)

    def edited(self, chat: WebChat, request: gr.Request, event: gr.EditData) -> Changes:
        def act() -> Changes:
            chat.edit(_index(event.index), _text(event.value))
            return self._asking(chat)

        return self._told(chat, request, act)

    def undone(self, chat: WebChat, request: gr.Request, event: gr.UndoData) -> Changes:
        def act() -> Changes:
            taken = chat.undo(_index(event.index))
            box = {"text": taken.question, "files": list(taken.images)}
            return {self.w.chatbot: chat.messages(), self.w.box: box}

        return self._told(chat, request, act)

    def answered(
        self, chat: WebChat, model: Any, system: str | None, request: gr.Request, *values: Any
    ) -> Generator[Changes, None, None]:
        writing: Generator[Any, None, None] | None = None
        yield {self.w.notice: gr.skip()}  # of a generator that yields nothing, gradio empties the outputs
        try:
            chat.claim(owner_of(request.headers.get("cookie")))
            settings = settings_of(dict(zip(_NAMES, values, strict=True)))
            number = model if isinstance(model, int) and not isinstance(model, bool) else -1
            writing = chat.answer(number, settings, (system or "").strip()[:MAX_SYSTEM] or None)
            for messages in writing:
                yield {self.w.chatbot: messages}
        except PageError as error:
            yield {self.w.notice: _notice(error, chat.language)}
        finally:
            if writing is not None:
                writing.close()  # now, as it holds the turn

    def finished(self, chat: WebChat, request: gr.Request) -> Changes:
        """After an answer, however it ended: a question without an answer goes back into the box."""
        box = gr.update(submit_btn=True, stop_btn=False)

        def act() -> Changes:
            left = chat.take_back()
            if left is not None and left.is_new:
                box["value"] = {"text": left.question, "files": list(left.images)}
            return {self.w.chatbot: chat.messages()}

        changes = self._told(chat, request, act)
        changes.pop(self.w.notice, None)  # that of the answer stays
        return {**changes, self.w.box: box}

    def refused(self, chat: WebChat, request: gr.Request) -> Changes:
        """Gradio's queue was full."""
        notice = {self.w.notice: _notice(PageError("too_many_wait"), chat.language)}
        return self.finished(chat, request) | notice

    def stopped(self, chat: WebChat, request: gr.Request) -> Changes:
        def act() -> Changes:
            chat.stop()
            return {}

        return self._told(chat, request, act)

    def cleared(self, chat: WebChat, request: gr.Request) -> Changes:
        def act() -> Changes:
            chat.clear()
            return {self.w.chatbot: []}

        return self._told(chat, request, act)

    def saved(self, chat: WebChat, request: gr.Request) -> Changes:
        def act() -> Changes:
            try:
                return {self.w.record: record_line(chat)}
            except RecordError as error:
                gone = error.rule != "empty_conversation"
                raise PageError("image_gone" if gone else "nothing_to_save") from None

        return {self.w.record: ""} | self._told(chat, request, act)

    def _told(self, chat: WebChat, request: gr.Request, act: Callable[[], Changes]) -> Changes:
        """Act for the browser that the page belongs to; the notice says what was refused, or nothing."""
        try:
            chat.claim(owner_of(request.headers.get("cookie")))
            return {self.w.notice: ""} | act()
        except PageError as error:
            return {self.w.notice: _notice(error, chat.language)}

    def _asking(self, chat: WebChat, empty_box: bool = False) -> Changes:
        waiting = tell(chat.language, "waiting" if chat.models.is_busy else "reading")
        box = gr.update(submit_btn=False, stop_btn=True)
        if empty_box:
            box["value"] = None
        return {self.w.chatbot: chat.messages(waiting), self.w.box: box}


def _connect(
    page: gr.Blocks, w: Widgets, language: Language | None, examples: Sequence[tuple[str, Path | None]]
) -> None:
    """Quick events skip the queue. Answers share it, one at a time."""
    do = Actions(w, language, examples)
    texts = [*texts_of(w, "en", examples), w.notice]
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    page.load(do.opened, w.state, texts, **quick).then(None, js=START, **quick)
    w.language.click(do.switched, w.state, texts, **quick).then(None, js=REMEMBER_LANGUAGE, **quick)
    w.theme.click(None, js=THEME_SWITCH, **quick)
    w.box.stop(do.stopped, w.state, w.notice, **quick)
    w.clear.click(do.cleared, w.state, [w.chatbot, w.notice], **quick)
    w.chatbot.clear(do.cleared, w.state, [w.chatbot, w.notice], **quick)
    w.chatbot.undo(do.undone, w.state, [w.chatbot, w.box, w.notice], **quick)
    w.save.click(do.saved, w.state, [w.record, w.notice], **quick).then(None, w.record, js=DOWNLOAD, **quick)
    inputs = [w.state, w.model, w.system, *w.setting_list]
    for event, handler, more in (
        (w.box.submit, do.submitted, [w.box]),
        (w.chatbot.example_select, do.chosen, [w.box]),
        (w.chatbot.retry, do.retried, []),
        (w.chatbot.edit, do.edited, []),
    ):
        answer = event(handler, [w.state, *more], [w.chatbot, w.box, w.notice], **quick).then(
            do.answered, inputs, [w.chatbot, w.notice], concurrency_limit=1, concurrency_id="model",
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        answer.success(do.finished, w.state, [w.chatbot, w.box], **quick)
        answer.failure(do.refused, w.state, [w.chatbot, w.box, w.notice], **quick)


def _notice(error: PageError, language: Language) -> str:
    return f"<div role='alert'>{html.escape(error.told(language))}</div>"


def _index(index: Any) -> int:
    index = index[0] if isinstance(index, (list, tuple)) and index else index
    return index if isinstance(index, int) else -1


def _text(value: Any) -> str:
    """Of an edited message: plain text, or gradio's list of one part."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("text", "")
    return value if isinstance(value, str) else ""
