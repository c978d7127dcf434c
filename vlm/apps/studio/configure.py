"""The tab where a run is made: the form, what it comes to, its records, its plan, and the start."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from vlm.apps.studio import commands, jobs
from vlm.apps.studio.draft import Draft, begin, configs_to_begin_from
from vlm.apps.studio.form import form_html, problems_html
from vlm.apps.studio.texts import tell
from vlm.apps.web.texts import Language
from vlm.errors import ConfigError, VLMError

Changes = dict[Any, Any]  # component -> its new value, or an update
NUM_RECORDS = 4  # that a preview shows


@dataclass
class Configure:
    """Its components."""

    project: gr.Dropdown
    nproc: gr.Number
    form: gr.HTML
    typed: gr.Textbox  # hidden: what the form says, as JSON
    wrong: gr.Textbox  # hidden: problems by key, as JSON, for the form
    verdict: gr.HTML
    command: gr.Code
    yaml: gr.Code
    records_tab: gr.Tab
    records: gr.HTML
    show_records: gr.Button
    plan_tab: gr.Tab
    plan: gr.HTML
    show_plan: gr.Button
    yaml_tab: gr.Tab
    start: gr.Button

    @property
    def checked(self) -> list[Any]:
        """What changes when the draft does."""
        return [self.wrong, self.verdict, self.command, self.yaml]


def lay_out(runs: Path) -> Configure:
    with gr.Row():
        project = gr.Dropdown(
            configs_to_begin_from(runs), value=None, allow_custom_value=True, elem_id="project", scale=4
        )
        nproc = gr.Number(1, precision=0, minimum=1, maximum=1024, elem_id="nproc", scale=1, min_width=100)
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=340):
            form = gr.HTML(elem_id="form", padding=False)
        with gr.Column(scale=7, min_width=340, elem_id="outcome"):
            verdict = gr.HTML(elem_id="verdict", padding=False)
            command = gr.Code(
                language="shell", interactive=False, lines=1, max_lines=8, wrap_lines=True, show_line_numbers=False,
                buttons=["copy"], elem_id="command",
            )  # fmt: skip
            start = gr.Button(variant="primary", elem_id="start")
            with gr.Tabs(elem_id="outcome-tabs"):
                with gr.Tab() as yaml_tab:
                    yaml = gr.Code(
                        language="yaml", interactive=False, lines=4, max_lines=32, show_label=False, wrap_lines=True,
                        show_line_numbers=False, buttons=["copy", "download"], elem_id="yaml",
                    )  # fmt: skip
                with gr.Tab() as records_tab:
                    show_records = gr.Button(elem_id="show-records", size="sm")
                    records = gr.HTML(elem_id="records", padding=False)
                with gr.Tab() as plan_tab:
                    show_plan = gr.Button(elem_id="show-plan", size="sm")
                    plan = gr.HTML(elem_id="plan", padding=False)
    typed = gr.Textbox(visible="hidden", elem_id="typed")
    wrong = gr.Textbox(visible="hidden", elem_id="wrong")
    return Configure(
        project, nproc, form, typed, wrong, verdict, command, yaml, records_tab, records, show_records, plan_tab, plan,
        show_plan, yaml_tab, start,
    )  # fmt: skip


def texts_of(w: Configure, language: Language, draft: Draft | None) -> Changes:
    """All texts of the tab in a language."""
    updates: Changes = {
        w.project: gr.update(label=tell(language, "project"), info=tell(language, "project_info")),
        w.nproc: gr.update(label=tell(language, "nproc")),
        w.command: gr.update(label=tell(language, "command")),
        w.yaml_tab: gr.update(label=tell(language, "yaml")),
        w.records_tab: gr.update(label=tell(language, "records")),
        w.show_records: tell(language, "show_records"),
        w.plan_tab: gr.update(label=tell(language, "plan")),
        w.show_plan: tell(language, "show_plan"),
        w.start: gr.update(value=tell(language, "start"), interactive=draft is not None),
    }
    if draft is None:
        return updates | {w.form: _empty(tell(language, "nothing_loaded")), w.verdict: ""}
    return updates | {w.form: form_html(draft, language)}


def chosen(text: Any) -> Draft:
    """A draft of what was named. Raises ConfigError: there is none."""
    if not isinstance(text, str) or not text.strip():
        raise ConfigError("name a project, a run's config.yaml, or a YAML file; `vlm ls` lists the projects")
    draft = begin(text)
    draft.yaml()
    return draft


def typed(draft: Draft, text: Any, nproc: Any) -> Draft:
    """The draft with what the form says now. Raises ConfigError: no form says such a thing."""
    try:
        values = json.loads(text or "{}")
    except (TypeError, ValueError):
        values = None
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ConfigError("the form could not be read; reload the page")
    processes = nproc if isinstance(nproc, int) and not isinstance(nproc, bool) and 1 <= nproc <= 1024 else 1
    changed = Draft(draft.config, nproc=processes)
    for key, value in values.items():
        changed = changed.with_value(key, value)
    return changed


def outcome(w: Configure, draft: Draft, runs: Path, language: Language) -> Changes:
    """What a draft comes to: problems, command, YAML."""
    found = draft.check()
    notes, folder = list(found.notes), draft.output_dir()
    if folder is not None and not folder.resolve().is_relative_to(runs.resolve()):
        notes.append(tell(language, "outside", run=folder, runs=runs))
    return {
        w.wrong: json.dumps(dict(found.of_keys), ensure_ascii=False),
        w.verdict: problems_html(found.of_keys, found.others, notes, language),
        w.command: draft.command("train"),
        w.yaml: draft.yaml(),
    }


def show_records(draft: Draft, language: Language, call: commands.Call) -> str:
    found = commands.preview(draft, NUM_RECORDS, call)
    told = f"<p class='empty'>{html.escape(tell(language, 'show_records_info'))}</p>" if found.is_right else ""
    sheet = f"<img alt='' src='{found.sheet}'>" if found.sheet else ""
    return f"<div class='records'>{told}{found.html}{sheet}</div>"


def show_plan(draft: Draft, call: commands.Call) -> str:
    return f"<pre class='plain'>{html.escape(commands.plan(draft, call))}</pre>"


def start(draft: Draft, language: Language, begin_process: jobs.Begin | None) -> Path:
    """Begin the run. Returns its folder. Raises VLMError: the draft is not right yet, or a run is there."""
    folder = draft.output_dir()
    if folder is None or not draft.check().is_right:
        raise VLMError(tell(language, "mend_first"))
    jobs.begin(folder, "train", draft.arguments("train"), begin_process)
    return folder


def working(language: Language) -> str:
    return _empty(tell(language, "working"))


def _empty(text: str) -> str:
    return f"<p class='empty'>{html.escape(text)}</p>"
