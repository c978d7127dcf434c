"""The studio in headless Chromium, with a toy run: from the form to a chat with the result."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import warm
from browser_user import MARKS, WAIT
from tiny_export import write_clip, write_image, write_llm

from vlm.apps.studio import jobs, overview
from vlm.apps.studio.app import serve
from vlm.apps.studio.settings import Studio

pytest_plugins = ["browser_user"]
pytestmark = [*MARKS, pytest.mark.timeout(600)]  # its server imports all of training, if no test before it did

_STOPPED = "#table .state:is(.stopped, .interrupted)"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose run goes on until it is stopped."""
    root = tmp_path_factory.mktemp("studio")
    write_llm(root / "llm")
    write_clip(root / "clip")
    records = []
    for seed in range(4):
        write_image(root / f"{seed}.png", seed=seed)
        records.append({"image": f"{seed}.png", "caption": "A red square."})
    (root / "records.json").write_text(json.dumps(records * 20))  # many steps an epoch: a run lays all epochs out first
    questions = [{"image": f"{seed}.png", "prompt": "What is this?", "answers": ["A red square."]} for seed in range(2)]
    (root / "questions.json").write_text(json.dumps(questions))
    (root / "runs/earlier").mkdir(parents=True)  # drawn over the other
    (root / "runs/earlier/config.yaml").write_text("train: {max_steps: 2}\n")
    lines = [{"step": step, "loss": 9.0 - step, "learning_rate": 0.1} for step in (1, 2)]
    (root / "runs/earlier/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {"name": "asked", "metrics": ["exact_match"], "max_new_tokens": 4, "path": str(root / "questions.json")}
    config = {
        "output_dir": str(root / "runs/first"),
        "model": {
            "vision": {"backend": "hf", "path": str(root / "clip"), "layer": -2},
            "llm": {"path": str(root / "llm")},
            "trainable": ["projector"],
        },
        "data": {
            "template": "chatml", "sources": [{"path": str(root / "records.json"), "prompt": "What is this?"}],
            "max_length": 64, "cache": str(root / "cache"),
        },
        "train": {"max_steps": 4000, "global_batch_size": 2, "precision": "fp32", "prove": False},
        "evaluation": {"tasks": [task | {"kind": "generate"}]},
    }  # fmt: skip
    (root / "toy.yaml").write_text(json.dumps(config))
    return root


def call(arguments: Sequence[str]) -> tuple[int, str]:
    return warm.run_warm(warm.vlm, *arguments, FORCE_COLOR="1", TERM="xterm-256color", COLUMNS="100")


@pytest.fixture
def url(toy: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
            patch.setenv(name, "")  # what `serve` sets is undone at the end
        patch.setattr(overview, "SECONDS", 0.5)
        warm.run_warm(warm.vlm, "version")  # its server has imported all
        running = serve(Studio(toy / "runs", device="cpu", begin=warm.begin, call=call), port=0)
        yield running.url
        running.close()


def test_from_the_form_to_a_chat_with_the_result(toy: Path, url: str, chromium: Any):
    context = chromium.new_context(locale="en-US", viewport={"width": 1400, "height": 900})
    context.set_default_timeout(WAIT)
    page = context.new_page()
    problems, requests = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    assert page.goto(url.partition("?")[0]).status == 401
    page.goto(url)
    page.wait_for_function("document.documentElement.dataset.started === 'yes'")
    try:
        configure(page, toy)
        watch_stop_and_resume(page, toy / "runs/second")
        draw_over(page)
        export_evaluate_and_predict(page, toy)
        chat(page, toy)
        speak_chinese(page)
    finally:
        if (job := jobs.read(toy / "runs/second", "train")) is not None and job.is_running:
            jobs.stop(toy / "runs/second")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert problems == []
    assert {re.match(r"\w+:(//[^/]+)?", each)[0] for each in requests} <= {url.rpartition("/")[0], "data:", "blob:"}
    context.close()


def configure(page: Any, toy: Path) -> None:
    page.fill("#project input", str(toy / "toy.yaml"))
    page.press("#project input", "Enter")
    page.fill("[data-key=seed]", "x")
    page.wait_for_function("document.querySelector('[data-row=seed] .wrong').innerText.includes('a whole number')")
    page.click("#start")
    assert "Mend what is marked first." in page.inner_text("#notice [role=alert]")
    page.fill("[data-key=seed]", "3")
    page.fill("[data-key=output_dir]", str(toy / "runs/second"))
    page.wait_for_selector("#verdict .good")
    page.wait_for_function("document.querySelector('#yaml').innerText.includes('seed: 3')")
    command = page.inner_text("#command .cm-content")
    assert command == f"vlm train {toy}/toy.yaml --options output_dir={toy}/runs/second seed=3"
    page.click("button[role=tab]:has-text('Records')")
    page.click("#show-records")
    page.wait_for_selector("#records .reply:has-text('A red square.')")
    assert page.get_attribute("#records img", "src").startswith("data:image/png")
    page.click("button[role=tab]:has-text('Plan')")
    page.click("#show-plan")
    page.wait_for_function("document.querySelector('#plan pre')?.innerText.includes('fits: ')")


def watch_stop_and_resume(page: Any, run: Path) -> None:
    page.click("#start")
    page.wait_for_selector("#table .state.running")
    page.wait_for_function("parseInt(document.querySelector('#table td:nth-child(3)').innerText) > 1")
    page.wait_for_selector("#loss polyline", state="attached")
    assert "steps: 4000" in page.inner_text("#log")
    page.click("#stop")
    page.wait_for_selector(_STOPPED)
    stopped_at = sorted((run / "checkpoints").glob("step-*"))[-1].name
    page.click("#resume")
    page.wait_for_function(f"document.querySelector('#log').innerText.includes('{stopped_at}')")
    page.wait_for_selector("#table .state.running")
    page.click("#stop")
    page.wait_for_selector(_STOPPED)


def draw_over(page: Any) -> None:
    """The loss of another run beside this one's."""
    before = page.locator("#loss polyline").count()
    page.click("#compare input")
    page.click("[role=option]:has-text('earlier')")
    page.wait_for_function(f"document.querySelectorAll('#loss polyline').length === {before + 1}")
    assert "earlier" in page.inner_text("#loss figure div")
    page.keyboard.press("Escape")


def export_evaluate_and_predict(page: Any, toy: Path) -> None:
    run = toy / "runs/second"
    page.click("#export:not([disabled])")
    page.wait_for_selector("#evaluate:not([disabled])")
    assert (run / "export/vlm.json").is_file()
    page.click("#export-options button")
    page.check("#full input")
    page.fill("#shard-size input, #shard-size textarea", "100 KB")
    page.click("#export")
    page.wait_for_selector("#notice :text('100 KB')")
    page.fill("#shard-size input, #shard-size textarea", "100KB")
    page.click("#export")
    page.wait_for_selector("#notice :text('--full --max-shard-size 100KB')")
    page.wait_for_selector("#table :text('running: export')")
    page.wait_for_selector("#evaluate:not([disabled])")
    assert len([*(run / "export-full").rglob("*.safetensors")]) > 1
    page.click("#evaluate")
    page.click("button[role=tab]:has-text('Evaluation')")
    page.wait_for_selector("#figures td:has-text('exact match')")
    page.click("#predict-options button")
    page.fill("#data input, #data textarea", str(toy / "questions.json"))
    page.fill("#out input, #out textarea", "answers")
    page.click("#of-export input")
    page.click("[role=option]:has-text('export-full')")
    page.click("#predict:not([disabled])")
    page.click("button[role=tab]:has-text('Predictions')")
    page.wait_for_selector("#predictions td:has-text('A red square.')")
    assert len((run / "answers/questions.jsonl").read_text().splitlines()) == 2
    assert f"predict {run} --export {run}/export-full --data" in (run / "predict.log").read_text()


def chat(page: Any, toy: Path) -> None:
    page.click("button[role=tab]:has-text('Chat')")
    page.wait_for_function("document.querySelector('#model-result input').value === 'second'")
    assert page.input_value("#model-base input") == os.fspath(toy / "llm")
    page.fill("#box textarea", "What is this?")
    page.press("#box textarea", "Enter")
    for side in ("result", "base"):
        page.wait_for_selector(f"#chat-{side} .stats")
    assert page.inner_text("#chat-base .stats").startswith(str(toy / "llm"))
    page.wait_for_selector("#box button[data-name=Submit]")
    page.set_input_files("#box input[type=file]", str(toy / "0.png"))
    page.wait_for_selector("#box img")
    page.fill("#box textarea", "And this?")
    page.press("#box textarea", "Enter")
    page.wait_for_selector("#chat-base :text('This model reads no images.')")
    page.wait_for_function("document.querySelectorAll('#chat-result .stats').length === 2")
    page.wait_for_selector("#box button[data-name=Submit]")
    assert page.locator("#chat-result .message-buttons:visible").count() == 4  # copy the texts; nothing of the image
    page.click("#unload")
    page.wait_for_selector("#notice :text('2 of the models taken out of memory')")


def speak_chinese(page: Any) -> None:
    page.click("#language")
    page.click("button[role=tab]:has-text('训练')")
    page.wait_for_selector("#table .state:is(.stopped, .interrupted):has-text('已停止')")
    assert page.inner_text("#resume") == "继续"
    assert page.input_value("#of-export input") == "export-full"  # as it was chosen
    page.wait_for_function("document.querySelector('#checkpoint input').value === '最新'")
    page.click("button[role=tab]:has-text('配置')")
    page.fill("[data-key=seed]", "x")
    page.wait_for_selector("#verdict :text('1 处需要修改')")
