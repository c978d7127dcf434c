"""The tab of chat: one question, two models, their answers side by side."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from vlm.apps.studio.compare import SideBySide
from vlm.apps.studio.texts import tell
from vlm.apps.web.state import MAX_QUESTION
from vlm.apps.web.texts import Language
from vlm.data.records import IMAGE_SUFFIXES
from vlm.generation.generate import GenerationSettings

Changes = dict[Any, Any]
SIDES = ("result", "base")
MAX_TOKENS = 1024


@dataclass
class Talk:
    """Its components."""

    models: tuple[gr.Dropdown, ...]  # of SIDES
    chatbots: tuple[gr.Chatbot, ...]
    box: gr.MultimodalTextbox
    tokens: gr.Slider
    clear: gr.Button
    unload: gr.Button


def lay_out() -> Talk:
    with gr.Row():
        models = tuple(gr.Dropdown([], value=None, elem_id=f"model-{side}") for side in SIDES)
    with gr.Row(elem_classes=["chats"]):
        chatbots = tuple(
            gr.Chatbot(
                elem_id=f"chat-{side}", height=440, show_label=False, buttons=["copy"], layout="bubble",
                latex_delimiters=[], feedback_options=None, resizable=False, group_consecutive_messages=False,
                allow_file_downloads=False,
            )
            for side in SIDES
        )  # fmt: skip
    box = gr.MultimodalTextbox(
        elem_id="box", file_count="multiple", file_types=list(IMAGE_SUFFIXES), show_label=False, sources=["upload"],
        stop_btn=False, max_plain_text_length=MAX_QUESTION, max_lines=6,
    )  # fmt: skip
    with gr.Row():
        tokens = gr.Slider(1, MAX_TOKENS, 64, step=1, elem_id="tokens", scale=4)
        clear = gr.Button(elem_id="clear", size="sm", scale=1)
        unload = gr.Button(elem_id="unload", size="sm", scale=1)
    return Talk(models, chatbots, box, tokens, clear, unload)


def texts_of(w: Talk, language: Language) -> Changes:
    updates: Changes = {
        model: gr.update(label=tell(language, side), info=tell(language, "model_info"))
        for model, side in zip(w.models, SIDES, strict=True)
    }
    return updates | {
        w.box: gr.update(placeholder=tell(language, "input"), label=tell(language, "input")),
        w.tokens: gr.update(label=tell(language, "tokens")),
        w.clear: gr.update(value=tell(language, "clear")),
        w.unload: gr.update(value=tell(language, "unload")),
    }


def offered(w: Talk, sides: SideBySide, run: Path | None, chosen: tuple[Any, Any]) -> Changes:
    """The models there are; of a run, its export and what it began from, where nothing else was chosen."""
    labels = [choice.label for choice in sides.choices.all()]
    pair = (None, None) if run is None else sides.choices.pair(run)
    kept = [label if label in labels else other for label, other in zip(chosen, pair, strict=True)]
    return {model: gr.update(choices=labels, value=label) for model, label in zip(w.models, kept, strict=True)}


def shown(w: Talk, sides: SideBySide) -> Changes:
    return dict(zip(w.chatbots, sides.messages(), strict=True))


def asked(w: Talk, sides: SideBySide, owner: str | None, message: dict[str, Any] | None) -> Changes:
    """Put what stands in the box. Raises PageError when it cannot be asked."""
    sides.ask(owner, (message or {}).get("text") or "", (message or {}).get("files") or [])
    return shown(w, sides) | {w.box: gr.update(value=None, interactive=False)}


def answered(w: Talk, sides: SideBySide, labels: tuple[Any, Any], tokens: Any) -> Generator[Changes, None, None]:
    count = int(tokens) if isinstance(tokens, int | float) and 1 <= tokens <= MAX_TOKENS else 64
    for messages in sides.answer(labels, GenerationSettings(max_new_tokens=count)):
        yield dict(zip(w.chatbots, messages, strict=True))
