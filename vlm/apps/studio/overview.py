"""The tab of runs: the list, curves over each other, samples, log, figures; the buttons of what can be done."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from vlm.apps.studio import actions, jobs, options, watch
from vlm.apps.studio.chart import Curve, chart_html
from vlm.apps.studio.texts import tell
from vlm.apps.studio.watch import Run
from vlm.apps.web.texts import Language
from vlm.errors import ConfigError

Changes = dict[Any, Any]
SECONDS = 2.0  # between two looks at the run folders


@dataclass
class Overview:
    """Its components."""

    table: gr.HTML
    run: gr.Dropdown
    compare: gr.Dropdown
    number: gr.Dropdown
    buttons: dict[actions.Name, gr.Button]
    options: options.Options
    loss: gr.HTML
    second: gr.HTML
    log: gr.HTML
    log_tab: gr.Tab
    samples: gr.HTML
    samples_tab: gr.Tab
    figures: gr.Markdown
    figures_tab: gr.Tab
    predictions: gr.HTML
    predictions_tab: gr.Tab
    timer: gr.Timer

    @property
    def chosen(self) -> list[Any]:
        """The fields of `Chosen`."""
        return [self.run, self.compare, self.number, self.options.checkpoint, self.options.export]

    @property
    def live(self) -> list[Any]:
        """What changes by itself."""
        shown = [self.table, self.run, self.compare, self.number, self.loss, self.second, self.log, self.samples]
        return [
            *shown,
            self.figures,
            self.predictions,
            self.options.checkpoint,
            self.options.export,
            *self.buttons.values(),
        ]


def lay_out() -> Overview:
    table = gr.HTML(elem_id="table", padding=False, elem_classes=["wide"])
    with gr.Row():
        run = gr.Dropdown([], value=None, elem_id="run", scale=3)
        compare = gr.Dropdown([], value=[], multiselect=True, elem_id="compare", scale=4)
        number = gr.Dropdown([], value="learning_rate", allow_custom_value=True, elem_id="number", scale=2)
    with gr.Row():
        buttons = {
            name: gr.Button(
                interactive=False, size="sm", elem_id=name, variant="stop" if name == "stop" else "secondary"
            )
            for name in actions.NAMES
        }
    fields = options.lay_out()
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=340):
            loss = gr.HTML(elem_id="loss", padding=False)
            second = gr.HTML(elem_id="second", padding=False)
        with gr.Column(scale=5, min_width=340), gr.Tabs():
            with gr.Tab() as log_tab:
                log = gr.HTML(elem_id="log", padding=False)
            with gr.Tab() as samples_tab:
                samples = gr.HTML(elem_id="samples", padding=False, elem_classes=["wide"])
            with gr.Tab() as figures_tab:
                figures = gr.Markdown(elem_id="figures")
            with gr.Tab() as predictions_tab:
                predictions = gr.HTML(elem_id="predictions", padding=False, elem_classes=["wide"])
    return Overview(
        table, run, compare, number, buttons, fields, loss, second, log, log_tab, samples, samples_tab, figures,
        figures_tab, predictions, predictions_tab, gr.Timer(SECONDS),
    )  # fmt: skip


def texts_of(w: Overview, language: Language) -> Changes:
    updates: Changes = {
        w.run: gr.update(label=tell(language, "run")),
        w.compare: gr.update(label=tell(language, "compare")),
        w.number: gr.update(label=tell(language, "number")),
        w.log_tab: gr.update(label=tell(language, "log")),
        w.samples_tab: gr.update(label=tell(language, "samples")),
        w.figures_tab: gr.update(label=tell(language, "figures")),
        w.predictions_tab: gr.update(label=tell(language, "predictions")),
    }
    updates |= options.texts_of(w.options, language)
    return updates | {button: gr.update(value=tell(language, name)) for name, button in w.buttons.items()}


class Looked:
    """What a page was shown last, so that only what changed is sent: drawing anew would close an open list."""

    def __init__(self) -> None:
        self.run: Path | None = None  # whose checkpoints and exports were offered last
        self._shown: dict[str, Any] = {}

    def __deepcopy__(self, memo: object) -> Looked:
        return Looked()

    def forget(self) -> None:
        """All is sent at the next look: the language changed, or the page was loaded anew."""
        self._shown.clear()

    def update(self, name: str, value: Any, update: Any) -> Any:
        """`update` where `value` is another than the last one of this name, else nothing."""
        if self._shown.get(name, self) == value:
            return gr.skip()
        self._shown[name] = value
        return update


@dataclass(frozen=True)
class Chosen:
    """What the page's fields hold, of which some may be gone.

    Attributes:
        run: label of the run whose log, samples and figures are shown; None takes the first that runs.
        over: labels of the runs that are drawn too.
        number: name of the second curve.
        checkpoint, export: of the run, for its export and its predictions.
    """

    run: Any = None
    over: Any = ()
    number: Any = "learning_rate"
    checkpoint: Any = ""
    export: Any = ""


def look(w: Overview, folder: Path, chosen: Chosen, language: Language, looked: Looked) -> Changes:
    """All that the run folders say now."""
    runs = watch.list_runs(folder)
    by_label = {run.label: run for run in runs}
    busy = next((run.label for run in runs if run.can_stop), runs[-1].label if runs else None)
    label = chosen.run if chosen.run in by_label else busy
    run = by_label.get(label) if label is not None else None
    drawn = [by_label[name] for name in dict.fromkeys([label, *(chosen.over or [])]) if name in by_label]
    name = chosen.number if isinstance(chosen.number, str) and chosen.number else "learning_rate"
    labels = list(by_label)
    table = table_html(runs, folder, label, language)
    names = watch.numbers_of([each.path for each in drawn])
    changes: Changes = {
        w.table: looked.update("table", table, table),
        w.run: looked.update("run", (labels, label), gr.update(choices=labels, value=label)),
        w.compare: looked.update("compare", labels, gr.update(choices=labels)),
        w.number: looked.update("number", names, gr.update(choices=names)),
    }
    for place, each in ((w.loss, "loss"), (w.second, name)):
        chart = _chart(drawn, each, language)
        changes[place] = looked.update(f"chart-{place.elem_id}", chart, chart)
    return changes | _details(w, run, language, looked) | _offered(w, run, chosen, language, looked)


def _chart(runs: Sequence[Run], name: str, language: Language) -> str:
    """A number of several runs; beside the loss, the held-out loss as dashed lines."""
    groups = {run.label: group for group, run in enumerate(runs)}
    curves = [Curve(label, series, groups[label]) for label, series in watch.curves(runs, name).items()]
    if name == "loss":
        held_out = watch.curves(runs, "held_out_loss").items()
        told = tell(language, "held_out")
        curves += [Curve(f"{label} ({told})", series, groups[label], is_dashed=True) for label, series in held_out]
    return chart_html(tell(language, "loss") if name == "loss" else name, curves)


def _details(w: Overview, run: Run | None, language: Language, looked: Looked) -> Changes:
    path = None if run is None else run.path
    log = "" if path is None else _logs(path)
    log_html = f"<div class='tail'><pre>{html.escape(log)}</pre></div>" if log else _empty(tell(language, "no_log"))
    samples = samples_html(watch.samples(path) if path else [], language)
    figures = (watch.figures(path) if path else "") or tell(language, "nothing_yet")
    can = {
        "stop": run is not None and run.can_stop,
        "resume": run is not None and run.can_resume and not run.jobs,
        "export": run is not None and not run.jobs and bool(run.summary and run.summary.step),
        "evaluate": run is not None and not run.jobs and bool(run.exports),
        "predict": run is not None and not run.jobs and bool(run.exports),
    }
    written = predictions_html(watch.predictions(path) if path else [], language)
    changes: Changes = {
        w.log: looked.update("log", log_html, log_html),
        w.samples: looked.update("samples", samples, samples),
        w.figures: looked.update("figures", figures, figures),
        w.predictions: looked.update("predictions", written, written),
    }
    for name, button in w.buttons.items():
        changes[button] = looked.update(f"button-{name}", can[name], gr.update(interactive=can[name]))
    return changes


def _offered(w: Overview, run: Run | None, chosen: Chosen, language: Language, looked: Looked) -> Changes:
    """Checkpoints and exports of a run; what was chosen stays so while it is there, in the same run."""
    path = None if run is None else run.path
    changes: Changes = {}
    for field, value, offered in (
        (w.options.checkpoint, chosen.checkpoint, options.checkpoints(run, language)),
        (w.options.export, chosen.export, options.exports(run)),
    ):
        stays = options.kept(value, offered) if looked.run == path else offered[0][1]
        update = gr.update(choices=offered, value=stays)
        changes[field] = looked.update(f"choices of {field.elem_id}", (path, offered), update)
    looked.run = path
    return changes


def act(
    name: actions.Name, folder: Path, label: Any, language: Language, begin: jobs.Begin | None,
    values: Sequence[Any] = (),
) -> str:  # fmt: skip
    """Do something with the run of a label. Returns what was done, in words.

    Args:
        values: of the fields for it, as `actions.begin` takes them.

    Raises:
        VLMError: there is no such run, or it cannot be done now.
    """
    run = next((run for run in watch.list_runs(folder) if run.label == label), None)
    if run is None:
        raise ConfigError(tell(language, "choose_run"))
    if name == "stop":
        ended = jobs.stop(run.path)
        return tell(language, "asked_to_stop") if ended is None else tell(language, "ended", command=ended.command)
    return tell(language, "begun", command=actions.begin(name, run.path, values, begin).command)


def table_html(runs: Sequence[Run], folder: Path, chosen: str | None, language: Language) -> str:
    """One line for each run."""
    if not runs:
        return _empty(tell(language, "no_runs", runs=folder))
    left = ("run", "state", "step")
    has_rewards = any(run.summary is not None and run.summary.reward is not None for run in runs)
    right = ("loss", *(("reward",) if has_rewards else ()), "held_out", "rate", "speed", "left")
    head = "".join(f"<th>{html.escape(tell(language, name))}</th>" for name in left)
    head += "".join(f"<th class='number'>{html.escape(tell(language, name))}</th>" for name in right)
    lines = "".join(_line(run, run.label == chosen, has_rewards, language) for run in runs)
    return f"<table class='runs'><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _line(run: Run, is_chosen: bool, has_rewards: bool, language: Language) -> str:
    summary = run.summary
    state = f"<span class='state {run.state}'>{html.escape(tell(language, run.state))}</span>"
    if run.jobs:
        state += f" <small>{html.escape(tell(language, 'job_running', jobs=', '.join(run.jobs)))}</small>"
    why = _last_error(run)
    why = f"<div class='why'>{html.escape(why[:300])}</div>" if why else ""
    cells = [f"<td class='name'>{html.escape(run.label)}{why}</td><td>{state}</td>"]
    if summary is None:
        return f"<tr{' class=chosen' * is_chosen}>{cells[0]}<td></td>{'<td></td>' * (5 + has_rewards)}</tr>"
    total = summary.max_steps
    share = min(1.0, summary.step / total) if total else 0.0
    step = f"{summary.step:,}" + (f" / {total:,}" if total else "")
    cells.append(f"<td>{step}<div class='bar'><i style='width:{share:.0%}'></i></div></td>")
    numbers = (
        _short(summary.loss, ".4f"), *([_short(summary.reward, ".4f")] if has_rewards else []),
        _short(summary.held_out_loss, ".4f"), _short(summary.learning_rate, ".2e"),
        _short(summary.tokens_per_second, ",.0f"),
        _time_left(summary.hours_left) if run.is_training else "",
    )  # fmt: skip
    cells += [f"<td class='number'>{number}</td>" for number in numbers]
    return f"<tr{' class=chosen' * is_chosen}>{''.join(cells)}</tr>"


def samples_html(samples: Sequence[dict[str, Any]], language: Language) -> str:
    if not samples:
        return _empty(tell(language, "nothing_yet"))
    lines = ""
    for sample in samples:
        step, prompt, image, answer = (
            html.escape(str(sample.get(name) or "")) for name in ("step", "prompt", "image", "answer")
        )
        lines += f"<tr><td>{step}</td><td>{prompt}<br><small>{image}</small></td><td>{answer}</td></tr>"
    return f"<table class='samples'><tbody>{lines}</tbody></table>"


def predictions_html(lines: Sequence[dict[str, Any]], language: Language) -> str:
    """What `vlm predict` wrote: the question, what would be right, and the answer, or a reward model's scores."""
    if not lines:
        return _empty(tell(language, "nothing_yet"))
    head = "".join(f"<th>{html.escape(tell(language, name))}</th>" for name in ("question", "reference", "answer"))
    body = ""
    for line in lines:
        scores = [f"{name} {value:.4f}" for name, value in line.items() if isinstance(value, float)]
        cells = [str(line.get("prompt") or line.get("record") or ""), " / ".join(map(str, line.get("answers") or []))]
        cells.append(str(line.get("prediction", "; ".join(scores))))
        shown = [html.escape(cell) for cell in cells]
        images = html.escape(", ".join("/".join(Path(str(each)).parts[-2:]) for each in line.get("images") or []))
        body += f"<tr><td>{shown[0]}<br><small>{images}</small></td><td>{shown[1]}</td><td>{shown[2]}</td></tr>"
    return f"<table class='samples predictions'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _logs(run: Path) -> str:
    """Of training, and of what was begun after it."""
    found = {kind: jobs.read_log(run, kind) for kind in jobs.KINDS}
    return "\n\n".join(text for text in found.values() if text)


def _last_error(run: Run) -> str:
    """Why the command that was begun last failed, of training or after it."""
    if run.failed is None and run.summary is not None and run.summary.error:
        return run.summary.error
    if run.failed is None and run.state not in ("not_started", "failed"):
        return ""
    kind: jobs.Kind = "train" if run.failed is None else run.failed.kind
    lines = jobs.read_log(run.path, kind).split("\n")
    begun = max((place for place, line in enumerate(lines) if line.startswith("$ vlm ")), default=0)
    said = [line for line in lines[begun:] if line.startswith("error:") or "Error: " in line]
    if run.failed is None:
        return said[-1] if said else ""
    return f"{kind}: {said[-1] if said else f'ended with {run.failed.code}'}"


def _short(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _time_left(hours: float | None) -> str:
    """
    >>> _time_left(0.01), _time_left(0.5), _time_left(30.25), _time_left(None)
    ('36 s', '30 min', '30.2 h', '')
    """
    if hours is None:
        return ""
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:.1f} h"


def _empty(text: str) -> str:
    return f"<p class='empty'>{html.escape(text)}</p>"
