"""The way of a run with a kind that only a test knows: plan, train, resume, export, load, chat, serve."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vlm
from vlm.apps.api.limits import Limits
from vlm.apps.api.prompt import PromptBuilder
from vlm.apps.api.schemas import ChatRequest
from vlm.config import load_config
from vlm.export.run import export_run
from vlm.plan.estimate import Plan, estimate
from vlm.run import train


@dataclass(frozen=True)
class Walked:
    plan: Plan
    run: Path
    log: str  # of both trainings
    export: Path
    card: str
    loaded: Any
    reply: str
    prompt: str  # what the server makes of a question about an image, decoded


def walk(path: Path, capsys: Any, *, image: Path) -> Walked:
    """Train the config's steps, half of them before a resume, and use the export as people do."""
    config = load_config(path)
    plan = estimate(config)
    train(load_config(path, [f"train.max_steps={(config.train.max_steps or 0) // 2}"]), path.read_text())
    run = train(config, path.read_text())
    log = capsys.readouterr().err
    assert f"resuming after step {(config.train.max_steps or 0) // 2}" in log
    export = export_run(run)
    loaded = vlm.load(export, device="cpu", precision="fp32")
    reply = loaded.chat("What is this?", [str(image)], max_new_tokens=4)
    card = (export / "README.md").read_text()
    return Walked(plan, run, log, export, card, loaded, reply, served_prompt(loaded, image))


def served_prompt(loaded: Any, image: Path) -> str:
    url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    request = ChatRequest.model_validate({"model": "x", "messages": [{"role": "user", "content": content}]})
    (prompt,) = PromptBuilder(loaded, 1000, Limits(), "messages")(request, [image.read_bytes()])
    return loaded.tokenizer.decode(prompt.input_ids)
