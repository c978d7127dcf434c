"""Below the buttons of a run: what its export and its predictions are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import gradio as gr

from vlm.apps.studio.texts import tell
from vlm.apps.studio.watch import Run
from vlm.apps.web.texts import Language
from vlm.evaluation.task_kinds import MetricName
from vlm.train.checkpoint import best_step, steps_of


@dataclass
class AskedFor:
    """Its components, folded away at first."""

    export: gr.Accordion
    checkpoint: gr.Dropdown
    full: gr.Checkbox
    shard_size: gr.Textbox
    predict: gr.Accordion
    data: gr.Textbox
    images: gr.Textbox
    metrics: gr.Dropdown
    max_records: gr.Number
    out: gr.Textbox

    @property
    def inputs(self) -> list[Any]:
        """In the order of `actions.Asked.read`."""
        export = [self.checkpoint, self.full, self.shard_size]
        return [*export, self.data, self.images, self.metrics, self.max_records, self.out]


def lay_out() -> AskedFor:
    with gr.Accordion(open=False, elem_id="export-options") as export, gr.Row():
        checkpoint = gr.Dropdown([("", "")], value="", elem_id="checkpoint", scale=2)
        full = gr.Checkbox(elem_id="full", scale=2)
        shard_size = gr.Textbox(elem_id="shard-size", placeholder="5GB", max_lines=1, scale=1)
    with gr.Accordion(open=False, elem_id="predict-options") as predict, gr.Row():
        data = gr.Textbox(elem_id="data", max_lines=1, scale=3)
        images = gr.Textbox(elem_id="images", max_lines=1, scale=3)
        metrics = gr.Dropdown([*get_args(MetricName)], value=[], multiselect=True, elem_id="metrics", scale=3)
        max_records = gr.Number(0, precision=0, minimum=0, elem_id="max-records", scale=1, min_width=110)
        out = gr.Textbox(elem_id="out", placeholder="predictions", max_lines=1, scale=2)
    return AskedFor(export, checkpoint, full, shard_size, predict, data, images, metrics, max_records, out)


def texts_of(w: AskedFor, language: Language) -> dict[Any, Any]:
    plain = {
        w.export: "export_options", w.checkpoint: "checkpoint", w.shard_size: "shard_size",
        w.predict: "predict_options", w.out: "out",
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
    found = [(tell(language, "newest"), "")]
    if run is None:
        return found
    if (best := best_step(run.path)) is not None:
        found.append((tell(language, "best", step=best), "best"))
    return [*found, *((str(step), str(step)) for step in reversed(steps_of(run.path)))]
