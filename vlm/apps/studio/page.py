"""The studio's page: its tabs joined, and what each click does. What it tells of runs stands in their folders."""

from __future__ import annotations

import html
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from vlm.apps.studio import actions, configure, overview, talk, watch
from vlm.apps.studio.compare import Choices, SideBySide
from vlm.apps.studio.draft import Draft
from vlm.apps.studio.look import MARK
from vlm.apps.studio.settings import Studio
from vlm.apps.studio.texts import tell
from vlm.apps.web.guard import cookie_of, owner_of
from vlm.apps.web.look import LANGUAGE_COOKIE, REMEMBER_LANGUAGE, START, THEME_SWITCH
from vlm.apps.web.page import never_fetch
from vlm.apps.web.state import PageError
from vlm.apps.web.texts import Language, preferred
from vlm.apps.web.uploads import Uploads
from vlm.errors import VLMError

Changes = dict[Any, Any]
TABS = ("configure", "runs", "chat")


class Session:
    """What one open page knows. Held by gradio on the server."""

    def __init__(self, sides: SideBySide) -> None:
        self.language: Language = "en"
        self.draft: Draft | None = None
        self.looked = overview.Looked()
        self.sides = sides

    def __deepcopy__(self, memo: object) -> Session:
        """Gradio copies the first one for every page that opens."""
        return Session(SideBySide(self.sides.choices, self.sides.chats[0].uploads))


@dataclass
class Widgets:
    """Every component of the page."""

    session: gr.State
    heading: gr.Markdown
    language: gr.Button
    theme: gr.Button
    notice: gr.HTML
    tabs: gr.Tabs
    tab: dict[str, gr.Tab]
    configure: configure.Configure
    overview: overview.Overview
    talk: talk.Talk


def build_page(studio: Studio, uploads: Uploads) -> gr.Blocks:
    """The page, not yet served."""
    never_fetch()
    first = Session(SideBySide(Choices(studio.runs, studio.device), uploads))
    with gr.Blocks(title=tell("en", "title"), analytics_enabled=False, fill_width=True, delete_cache=None) as page:
        widgets = _lay_out(studio, first)
        _connect(page, widgets, Actions(widgets, studio))
    page.queue(max_size=32, api_open=False, default_concurrency_limit=4)
    return page


def _lay_out(studio: Studio, first: Session) -> Widgets:
    with gr.Row(elem_id="top"):
        heading = gr.Markdown(elem_id="heading")
        language = gr.Button(elem_id="language", size="sm")
        theme = gr.Button("◐", elem_id="theme", size="sm")
    notice = gr.HTML(elem_id="notice", padding=False)
    tab: dict[str, gr.Tab] = {}
    with gr.Tabs(elem_id="tabs") as tabs:
        with gr.Tab(id="configure", elem_id="tab-configure") as tab["configure"]:
            of_configure = configure.lay_out(studio.runs)
        with gr.Tab(id="runs", elem_id="tab-runs") as tab["runs"]:
            of_runs = overview.lay_out()
        with gr.Tab(id="chat", elem_id="tab-chat") as tab["chat"]:
            of_chat = talk.lay_out()
    session = gr.State(first, time_to_live=24 * 3600)
    return Widgets(session, heading, language, theme, notice, tabs, tab, of_configure, of_runs, of_chat)


def texts_of(w: Widgets, language: Language, draft: Draft | None) -> Changes:
    """All texts of the page in a language."""
    updates: Changes = {
        w.heading: f"## {tell(language, 'title')}",
        w.language: tell(language, "language"),
        **{tab: gr.update(label=tell(language, name)) for name, tab in w.tab.items()},
    }
    updates |= configure.texts_of(w.configure, language, draft)
    return updates | overview.texts_of(w.overview, language) | talk.texts_of(w.talk, language)


@dataclass(frozen=True)
class Actions:
    """What the events do. Each returns changes; what is refused is told in the notice, nothing is raised."""

    w: Widgets
    studio: Studio

    def opened(self, session: Session, request: gr.Request) -> Changes:
        remembered = cookie_of(request.headers.get("cookie"), LANGUAGE_COOKIE)
        session.language = self.studio.language or preferred(request.headers.get("accept-language"), remembered)
        return self._in_language(session)

    def switched(self, session: Session) -> Changes:
        session.language = "en" if session.language == "zh" else "zh"
        return self._in_language(session)

    def chosen(self, session: Session, project: Any, nproc: Any) -> Changes:
        def act() -> Changes:
            session.draft = configure.typed(configure.chosen(project), "", nproc)
            changes = configure.texts_of(self.w.configure, session.language, session.draft)
            return changes | self._outcome(session)

        return self._told(act)

    def typed(self, session: Session, text: Any, nproc: Any) -> Changes:
        def act() -> Changes:
            if session.draft is None:
                return {}
            session.draft = configure.typed(session.draft, text, nproc)
            return self._outcome(session)

        return self._told(act)

    def working(self, session: Session) -> str:
        return configure.working(session.language)

    def showed_records(self, session: Session) -> Any:
        draft = session.draft
        return "" if draft is None else configure.show_records(draft, session.language, self.studio.call)

    def showed_plan(self, session: Session) -> Any:
        return "" if session.draft is None else configure.show_plan(session.draft, self.studio.call)

    def started(self, session: Session) -> Changes:
        def act() -> Changes:
            if session.draft is None:
                raise VLMError(tell(session.language, "nothing_loaded"))
            folder = configure.start(session.draft, session.language, self.studio.begin)
            label = watch.look_at(folder, self.studio.runs).label
            changes = self._look(session, overview.Chosen(label))
            said = tell(session.language, "started", run=folder)
            return changes | {self.w.tabs: gr.Tabs(selected="runs"), self.w.notice: _notice(said)}

        return self._told(act)

    def looked(self, session: Session, *chosen: Any) -> Changes:
        """Keeps the notice, which another click wrote."""
        return {self.w.overview.table: gr.skip()} | self._look(session, overview.Chosen(*chosen))

    def acted(self, name: actions.Name) -> Callable[..., Changes]:
        """Of a button: what the fields of the tab hold comes first, then those of its command."""

        def acted(session: Session, *values: Any) -> Changes:
            count = len(self.w.overview.chosen)
            chosen, options = overview.Chosen(*values[:count]), values[count:]

            def act() -> Changes:
                said = overview.act(name, self.studio.runs, chosen.run, session.language, self.studio.begin, options)
                return {self.w.notice: _notice(said)} | self._look(session, chosen)

            return self._told(act)

        return acted

    def offered(self, session: Session, label: Any, first: Any, second: Any) -> Changes:
        run = next((run for run in watch.list_runs(self.studio.runs) if run.label == label), None)
        return talk.offered(self.w.talk, session.sides, None if run is None else run.path, (first, second))

    def asked(self, session: Session, message: Any, request: gr.Request) -> Changes:
        return self._told(
            lambda: talk.asked(self.w.talk, session.sides, owner_of(request.headers.get("cookie")), message), session
        )

    def answered(self, session: Session, first: Any, second: Any, tokens: Any) -> Generator[Changes, None, None]:
        yield {self.w.notice: gr.skip()}  # of a generator that yields nothing, gradio empties the outputs
        yield from talk.answered(self.w.talk, session.sides, (first, second), tokens)

    def ready(self, session: Session) -> Changes:
        return talk.shown(self.w.talk, session.sides) | {self.w.talk.box: gr.update(interactive=True)}

    def cleared(self, session: Session) -> Changes:
        session.sides.clear()
        return talk.shown(self.w.talk, session.sides)

    def unloaded(self, session: Session) -> Changes:
        """Of all open pages, which share the models."""

        def act() -> Changes:
            store = session.sides.choices.store
            if store.is_busy:
                raise PageError("busy")
            with store.turn():
                return {self.w.notice: _notice(tell(session.language, "unloaded", count=store.unload()))}

        return self._told(act, session)

    def _in_language(self, session: Session) -> Changes:
        session.sides.speak(session.language)
        session.looked.forget()
        changes = texts_of(self.w, session.language, session.draft) | {self.w.notice: ""}
        return changes if session.draft is None else changes | self._outcome(session)

    def _outcome(self, session: Session) -> Changes:
        assert session.draft is not None
        return configure.outcome(self.w.configure, session.draft, self.studio.runs, session.language)

    def _look(self, session: Session, chosen: overview.Chosen) -> Changes:
        return overview.look(self.w.overview, self.studio.runs, chosen, session.language, session.looked)

    def _told(self, act: Callable[[], Changes], session: Session | None = None) -> Changes:
        """The notice says what was refused, or nothing."""
        try:
            return {self.w.notice: ""} | act()
        except VLMError as error:
            return {self.w.notice: _notice(str(error))}
        except PageError as error:
            return {self.w.notice: _notice(error.told(session.language if session is not None else "en"))}


def _connect(page: gr.Blocks, w: Widgets, do: Actions) -> None:
    """Quick events skip the queue; commands and answers go through it."""
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    texts = [*texts_of(w, "en", None), *w.configure.checked, w.notice]
    mark: dict[str, Any] = {"inputs": w.configure.wrong, "js": MARK, **quick}
    page.load(do.opened, w.session, texts, **quick).then(None, js=START, **quick)
    w.language.click(do.switched, w.session, texts, **quick).then(None, js=REMEMBER_LANGUAGE, **quick).then(
        None, **mark
    )
    w.theme.click(None, js=THEME_SWITCH, **quick)
    _connect_configure(w, do, quick, mark)
    _connect_runs(w, do, quick)
    _connect_chat(w, do, quick)


def _connect_configure(w: Widgets, do: Actions, quick: dict[str, Any], mark: dict[str, Any]) -> None:
    c = w.configure
    drawn = [*configure.texts_of(c, "en", None), *c.checked, w.notice]
    c.project.change(do.chosen, [w.session, c.project, c.nproc], drawn, **quick).then(None, **mark)
    for changed in (c.typed.change, c.nproc.input):
        changed(do.typed, [w.session, c.typed, c.nproc], [*c.checked, w.notice], **quick).then(None, **mark)
    queued: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 2}
    c.show_records.click(do.working, w.session, c.records, **quick).then(
        do.showed_records, w.session, c.records, **queued
    )
    c.show_plan.click(do.working, w.session, c.plan, **quick).then(do.showed_plan, w.session, c.plan, **queued)
    c.start.click(do.started, w.session, [w.tabs, w.notice, *w.overview.live], **quick)


def _connect_runs(w: Widgets, do: Actions, quick: dict[str, Any]) -> None:
    o = w.overview
    inputs = [w.session, *o.chosen]
    o.timer.tick(do.looked, inputs, o.live, **quick)
    for changed in (o.run.input, o.compare.input, o.number.input, w.tab["runs"].select):
        changed(do.looked, inputs, o.live, **quick)
    for name, button in o.buttons.items():
        button.click(do.acted(name), [*inputs, *o.options.inputs.get(name, [])], [w.notice, *o.live], **quick)


def _connect_chat(w: Widgets, do: Actions, quick: dict[str, Any]) -> None:
    t = w.talk
    models, chatbots = list(t.models), list(t.chatbots)
    w.tab["chat"].select(do.offered, [w.session, w.overview.run, *models], models, **quick)
    t.clear.click(do.cleared, w.session, chatbots, **quick)
    t.unload.click(do.unloaded, w.session, w.notice, **quick)
    answer = t.box.submit(do.asked, [w.session, t.box], [*chatbots, t.box, w.notice], **quick).then(
        do.answered, [w.session, *models, t.tokens], [*chatbots, w.notice], concurrency_limit=1,
        concurrency_id="model", show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    answer.then(do.ready, w.session, [*chatbots, t.box], **quick)


def _notice(text: str) -> str:
    return f"<div role='alert'>{html.escape(text)}</div>"
