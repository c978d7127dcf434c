"""The way of a kind that only its test knows: trained, resumed, exported, loaded, asked, served."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from starlette.testclient import TestClient

import vlm
from vlm.apps.api.app import build_app
from vlm.apps.api.limits import Limits, Media
from vlm.apps.api.media import MediaLoader
from vlm.apps.api.server import build_service
from vlm.config import RunConfig, load_config
from vlm.evaluation.config import EvaluationConfig
from vlm.export.run import export_run
from vlm.inference.load import LoadedModel
from vlm.inference.messages import to_conversation
from vlm.models.config import ModelConfig
from vlm.run import train

QUESTION, NEW_TOKENS = "What is this?", 4


@contextmanager
def named(name: str, field: str, *sections: Any) -> Iterator[None]:
    """`name` is among the values that a field of the config takes.

    Args:
        sections: the one that has the field, and those around it, up to RunConfig.
    """
    info = sections[0].model_fields[field]
    before = info.annotation

    def rebuild(annotation: Any) -> None:
        info.annotation = annotation
        for section in sections:
            section.model_rebuild(force=True)

    rebuild(Literal[(*get_args(before), name)])
    try:
        yield
    finally:
        rebuild(before)


@contextmanager
def registered(kinds: dict[str, Any], section: Any) -> Iterator[None]:
    """A line in the dict of the kinds of a section: `engine`, `model.projector`, an evaluation task."""
    name = section.model_fields["kind"].default
    kinds[name] = section
    _rebuild()
    try:
        yield
    finally:
        del kinds[name]
        _rebuild()


def _rebuild() -> None:
    for around in (ModelConfig, EvaluationConfig, RunConfig):
        around.model_rebuild(force=True)


@dataclass(frozen=True)
class Walked:
    """Where a walk ended."""

    run: Path
    log: str  # of both trainings
    export: Path  # what trained, beside its base models
    full: Path  # everything
    loaded: LoadedModel  # of `full`
    prompt: list[int]  # `QUESTION` and its image

    @property
    def card(self) -> str:
        return (self.export / "README.md").read_text()


def walk(config: Path, image: Path, capsys: Any) -> Walked:
    """Train two steps of a config, resume it to its end, export it, and ask what was exported.

    Args:
        config: with more than two steps, and a checkpoint after the second.
        image: shown with every question.
    """
    run, log = train_and_resume(config, capsys)
    export, full = export_run(run), export_run(run, full=True)
    part, whole = (vlm.load(folder, device="cpu", precision="fp32") for folder in (export, full))
    reply = part.chat(QUESTION, [str(image)], max_new_tokens=NEW_TOKENS)
    assert whole.chat(QUESTION, [str(image)], max_new_tokens=NEW_TOKENS) == reply
    prompt = whole.conversation_tokenizer.prompt(to_conversation(QUESTION, [str(image)], whole.template))
    assert ask_server(whole, image) == (reply, len(prompt))
    return Walked(run, log, export, full, whole, prompt)


def train_and_resume(config: Path, capsys: Any) -> tuple[Path, str]:
    """Two steps, and from their checkpoint to the end. Returns the run's folder, and what was logged."""
    text = config.read_text()
    train(load_config(config, ["train.max_steps=2"]), text)
    run = train(load_config(config), text)
    log = capsys.readouterr().err
    assert "resuming after step 2" in log
    return run, log


def ask_server(loaded: LoadedModel, image: Path) -> tuple[str, int]:
    """The reply of an API server to `QUESTION` with an image, and how many tokens it counted before it."""
    limits = Limits(max_tokens=4096, default_new_tokens=NEW_TOKENS)
    url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    body = {"model": "new", "messages": [{"role": "user", "content": content}], "temperature": 0}
    app = build_app(build_service(loaded, "new", MediaLoader(Media()), limits))
    with TestClient(app, base_url="http://localhost") as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    values = answer.json()
    return values["choices"][0]["message"]["content"].strip(), values["usage"]["prompt_tokens"]
