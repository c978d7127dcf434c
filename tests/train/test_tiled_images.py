"""Images that take tokens by their size, from a run's data to a chat with its export."""

from __future__ import annotations

import base64
import json

import pytest
import torch
from PIL import Image
from tiled_images import TiledSpec, register

import vlm
from vlm.apps.api.limits import Limits
from vlm.apps.api.prompt import PromptBuilder
from vlm.apps.api.schemas import ChatRequest
from vlm.config import load_config
from vlm.evaluation.config import EvaluationConfig
from vlm.evaluation.report import run_tasks
from vlm.evaluation.task_kinds import LossTask
from vlm.export.run import export_run
from vlm.inference.messages import to_conversation
from vlm.prepare import prepare_run
from vlm.proof.prove import prove
from vlm.run import train


@pytest.mark.one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True], ids=["pixels", "features"])
def test_a_run_its_export_and_a_chat_count_alike(config_file, tiny, tmp_path, monkeypatch, cached):
    records = []
    for number, size in enumerate([(20, 60), (60, 20), (30, 30), (64, 20), (20, 41)] * 4):
        Image.new("RGB", size, ("red", "green", "blue")[number % 3]).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
        records.append({"image": f"{number}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    path = config_file(
        data__sources=[{"path": str(tmp_path / "data.json"), "images": str(tmp_path)}], data__max_length=400,
        data__held_out=0.0, data__cache_features=cached, train__max_steps=2, train__save_every=2,
        train__global_batch_size=2, train__micro_batch_size=1,
    )  # fmt: skip
    register(monkeypatch)
    run = train(load_config(path), path.read_text())
    proof = json.loads((run / "proof.json").read_text())
    assert proof["passed"]
    loaded = vlm.load(export_run(run), device="cpu", precision="fp32")
    assert isinstance(loaded.image_spec, TiledSpec)
    for path, tiles in ((tmp_path / "0.png", 4), (tmp_path / "2.png", 1), (tmp_path / "4.png", 3)):
        shown = to_conversation("What?", [str(path)], loaded.template)
        placeholders = tiles * loaded.image_spec.num_tokens
        assert loaded.conversation_tokenizer.prompt(shown).count(loaded.image_token_id) == placeholders
        assert served(loaded, path) == (placeholders, tiles)
        assert isinstance(loaded.chat("What?", [str(path)], max_new_tokens=4), str)


@pytest.fixture
def unequal(config_file, tmp_path, monkeypatch):
    """A config whose records have images of 1 and of 4 tiles."""
    register(monkeypatch)
    records = []
    for number, size in enumerate([(30, 30), (20, 60)] * 4):
        Image.new("RGB", size, "red").save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is in this?"}, {"from": "gpt", "value": "Red, as ever."}]
        records.append({"image": f"{number}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    source = {"path": str(tmp_path / "data.json"), "images": str(tmp_path)}
    return config_file(data__sources=[source], data__max_length=200, data__held_out=0.0)


@pytest.mark.slow
def test_a_replaced_image_is_measured_again(unequal, tmp_path):
    def longest():
        return max(prepare_run(load_config(unequal), torch.device("cpu")).data.train.order.scan.lengths)

    before = longest()
    Image.new("RGB", (20, 60), "red").save(tmp_path / "0.png")  # four tiles in place of one
    scan = prepare_run(load_config(unequal), torch.device("cpu")).data.train.order.scan
    assert before == longest() == scan.lengths[0]


@pytest.mark.slow
def test_images_of_unequal_tiles_are_not_exchanged_where_losses_alone_are_seen(unequal, monkeypatch):
    parts = prepare_run(load_config(unequal), torch.device("cpu"))
    monkeypatch.setattr(type(parts.engine), "holds_whole_model", False)  # as where weights are spread
    findings = prove(parts, seconds=60).findings
    assert findings["feature_order"].passed is None
    assert "unequal numbers of tiles" in findings["feature_order"].note
    assert [name for name, finding in findings.items() if finding.passed is False] == []


@pytest.mark.slow
def test_another_images_tokens_do_not_fit_so_nothing_is_shuffled(unequal, tmp_path):
    train(load_config(unequal, ["train.max_steps=1"]), unequal.read_text())
    loaded = vlm.load(export_run(tmp_path / "run"), device="cpu", precision="fp32")
    records = [
        {
            "image": f"{n}.png",
            "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A."}],
        }
        for n in range(4)
    ]
    (tmp_path / "eval.json").write_text(json.dumps(records))
    task = LossTask(name="x", path=str(tmp_path / "eval.json"), images=str(tmp_path))
    (row,) = run_tasks(loaded, EvaluationConfig(tasks=(task,)), tmp_path / "cache")
    assert row.own.num_records == 4
    assert (row.shuffled, row.blank) == (None, None)


def served(loaded, path):
    """Placeholders and tiles of the prompt that `vlm serve` makes of the image."""
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    request = ChatRequest.model_validate({"model": "x", "messages": [{"role": "user", "content": content}]})
    (prompt,) = PromptBuilder(loaded, 1000, Limits(), "messages")(request, [path.read_bytes()])
    return prompt.input_ids.count(loaded.image_token_id), len(prompt.pixel_values)
