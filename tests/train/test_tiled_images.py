"""Images that take tokens by their size, from a run's data to a chat with its export."""

from __future__ import annotations

import base64
import json

import pytest
from PIL import Image
from tiled_images import TiledSpec, tiled

import vlm
from vlm.apps.api.limits import Limits
from vlm.apps.api.prompt import PromptBuilder
from vlm.apps.api.schemas import ChatRequest
from vlm.config import load_config
from vlm.export.run import export_run
from vlm.inference.messages import to_conversation
from vlm.run import train


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
    with tiled(monkeypatch):
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


def served(loaded, path):
    """Placeholders and tiles of the prompt that `vlm serve` makes of the image."""
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    request = ChatRequest.model_validate({"model": "x", "messages": [{"role": "user", "content": content}]})
    (prompt,) = PromptBuilder(loaded, 1000, Limits(), "messages")(request, [path.read_bytes()])
    return prompt.input_ids.count(loaded.image_token_id), len(prompt.pixel_values)
