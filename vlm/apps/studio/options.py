"""Below the buttons of a run: options of its export, its evaluation and its predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import gradio as gr

from vlm.apps.studio.actions import EXPORT, Name
from vlm.apps.studio.texts import tell
from vlm.apps.studio.watch import Run
from vlm.apps.web.texts import Language
from vlm.evaluation.task_kinds import MetricName
from vlm.train.checkpoint import best_step, steps_of


@dataclass
class Options:
    """The fields, folded away at first."""

    of_export: gr.Accordion
    checkpoint: gr.Dropdown
    full: gr.Checkbox
    shard_size: gr.Textbox
    of_predict: gr.Accordion
    export: gr.Dropdown
    data: gr.Textbox
    images: gr.Textbox
    metrics: gr.Dropdown
    max_records: gr.Number
    out: gr.Textbox

    @property
    def inputs(self) -> dict[Name, list[Any]]:
        """Of each action, in the order in which `actions` takes their values."""
        predict = [self.export, self.data, self.images, self.metrics, self.max_records, self.out]
        return {
            "export": [self.checkpoint, self.full, self.shard_size],
            "evaluate": [self.export],
            "predict": predict,
        }


def lay_out() -> Options:
    with gr.Accordion(open=False, elem_id="export-options") as of_export, gr.Row():
        checkpoint = _dropdown("checkpoint", scale=2)
        full = gr.Checkbox(elem_id="full", scale=2)
        shard_size = gr.Textbox(elem_id="shard-size", placeholder="5GB", max_lines=1, scale=1)
    with gr.Accordion(open=False, elem_id="predict-options") as of_predict:
        with gr.Row():
            export = _dropdown("of-export", scale=2)
            data = gr.Textbox(elem_id="data", max_lines=1, scale=3)
            images = gr.Textbox(elem_id="images", max_lines=1, scale=3)
        with gr.Row():
            metrics = gr.Dropdown([*get_args(MetricName)], value=[], multiselect=True, elem_id="metrics", scale=3)
            max_records = gr.Number(0, precision=0, elem_id="max-records", scale=1, min_width=110)
            out = gr.Textbox(elem_id="out", placeholder="predictions", max_lines=1, scale=2)
    return Options(of_export, checkpoint, full, shard_size, of_predict, export, data, images, metrics, max_records, out)


def _dropdown(name: str, scale: int) -> gr.Dropdown:
    """Any text is taken: what was chosen may be gone when it is sent, and the command says so."""
    return gr.Dropdown([("", "")], value="", allow_custom_value=True, elem_id=name, scale=scale)


def texts_of(w: Options, language: Language) -> dict[Any, Any]:
    plain = {
        w.of_export: "export_options", w.checkpoint: "checkpoint", w.shard_size: "shard_size",
        w.of_predict: "predict_options", w.export: "of_export", w.out: "out",
    }  # fmt: skip
    explained = {
        w.full: "full", w.data: "data", w.images: "images", w.metrics: "metrics", w.max_records: "max_records",
    }  # fmt: skip
    updates: dict[Any, Any] = {each: gr.update(label=tell(language, name)) for each, name in plain.items()}
    for each, name in explained.items():
        updates[each] = gr.update(label=tell(language, name), info=tell(language, f"{name}_info"))
    return updates


def checkpoints(run: Run | None, language: Language) -> list[tuple[str, str]]:
    """What an export can be of, as (shown, argument), newest first; nothing is verified."""
    newest = (tell(language, "newest"), "")
    if run is None:
        return [newest]
    best = best_step(run.path)
    marked = [] if best is None else [(tell(language, "best", step=best), "best")]
    return [newest, *marked, *((str(step), str(step)) for step in reversed(steps_of(run.path)))]


def exports(run: Run | None) -> list[tuple[str, str]]:
    """Of a run, as (shown, argument); the one that commands take by themselves first."""
    names = run.exports if run is not None and run.exports else (EXPORT,)
    return [(name, name) for name in names]


def kept(value: Any, offered: Sequence[tuple[str, str]]) -> str:
    """What was chosen where it still is offered, else the first.

    >>> kept("500", [("the newest", ""), ("500", "500")]), kept("400", [("the newest", "")])
    ('500', '')
    """
    return value if value in [argument for _, argument in offered] else offered[0][1]
