"""Exports read by transformers 4.57, in an environment of its own that is made once in pytest's cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from environments import make_environment
from tiny_export import model_config, write_decoder, write_image, write_llm, write_run, write_siglip

from vlm.data.conversation import IMAGE, Conversation, Turn
from vlm.data.images import load_image, to_pixels
from vlm.export.run import export_run
from vlm.inference.load import load

VERSION = "4.57.6"
PACKAGES = [f"transformers=={VERSION}", "tokenizers==0.22.2", "huggingface-hub==0.36.2"]  # of one another's time
BORROWED = ["torch", "pillow", "numpy", "jinja2", "pyyaml", "regex", "requests", "safetensors", "tqdm", "packaging"]
READER = Path(__file__).parent.parent / "transformers4_reader.py"
ROPE = {"rope_type": "default", "rope_theta": 2e4}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5,
          "original_max_position_embeddings": 16}  # fmt: skip
GEMMA = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
    },
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6,
}  # fmt: skip
# every one would be computed with a default of transformers 4 if its own names were not written
LLAVA: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": ROPE}),
    "llama 3.1": ("llama", {"rope_parameters": SCALED}),
    "qwen2": ("qwen2", {"rope_parameters": ROPE}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6,
                                                  "original_max_position_embeddings": 64}}),
    "qwen3": ("qwen3", {"rope_parameters": ROPE}),
    "mistral": ("mistral", {"rope_parameters": ROPE}),
    "gemma3": ("gemma3_text", GEMMA),
    "stablelm": ("stablelm", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}),
    "mixtral": ("mixtral", {"rope_parameters": ROPE, "num_local_experts": 4}),
}  # fmt: skip
TEXT = {"phi": ("phi", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}), "qwen2 text": LLAVA["qwen2"]}

pytestmark = [pytest.mark.slow, pytest.mark.thorough, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> Path:
    """The interpreter of an environment with transformers 4 and this one's torch, without torchvision."""
    folder = request.config.cache.mkdir(f"transformers-{VERSION}")
    interpreter, done = folder / "bin" / "python", folder / "done"
    if not done.exists():
        make_environment(folder, PACKAGES, borrowed=BORROWED)
        done.touch()
    return interpreter


def make_llava(root: Path, name: str) -> Path:
    """An export with what vlm itself answers beside it."""
    family, changes = LLAVA[name]
    tower = "siglip" if name == "qwen2" else "clip"
    write_siglip(root / "siglip")
    write_decoder(root / name / "llm", family, **changes)
    vision = {"backend": "hf", "path": str(root / tower), "layer": -2}
    config = model_config(
        root, vision=vision, llm={"path": str(root / name / "llm")}, projector={"kind": "mlp", "depth": 2}, lora=None,
        trainable=["projector"],
    )  # fmt: skip
    write_run(root / name / "run", config)
    export, image = export_run(root / name / "run", root / "exports" / name, full=True), root / "image.png"
    write_image(image)
    model = load(export, "cpu", "fp32")
    assert model.image_spec is not None
    pixels = to_pixels(load_image(str(image), background=model.image_spec.background), model.image_spec)[None]
    conversation = Conversation((Turn("user", (IMAGE, "\nWhat is this?")),), (str(image),))
    write_answers(export, model, conversation, pixels, str(image))
    return export


def make_text(root: Path, name: str) -> Path:
    family, changes = TEXT[name]
    write_decoder(root / name / "llm", family, **changes)
    config = model_config(root, vision=None, llm={"path": str(root / name / "llm")}, lora=None, trainable=["llm"])
    write_run(root / name / "run", config)
    export = export_run(root / name / "run", root / "exports" / name, full=True)
    write_answers(export, load(export, "cpu", "fp32"), Conversation((Turn("user", ("What is this?",)),)), None)
    return export


@torch.no_grad()
def write_answers(
    export: Path, model: Any, conversation: Conversation, pixels: torch.Tensor | None, image: str = ""
) -> None:
    ids = model.conversation_tokenizer.prompt(conversation)
    hidden_states = model.model(torch.tensor([ids]), torch.arange(len(ids))[None], pixels)
    shown = {} if pixels is None else {"pixels": pixels.numpy(), "image": image}
    np.savez(export / "asked.npz", ids=np.array(ids), logits=model.model.logits(hidden_states)[0].numpy(), **shown)


@pytest.fixture(scope="module")
def answers(python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("transformers4")
    write_llm(root / "llm")
    folders = [make_llava(root, name) for name in LLAVA] + [make_text(root, name) for name in TEXT]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    read = subprocess.run(
        [python, READER, *folders],
        capture_output=True,
        text=True,
        check=True,
        env=environment | {"HF_HUB_OFFLINE": "1"},
    )
    return {line["name"]: line for line in map(json.loads, read.stdout.splitlines())}


@pytest.mark.parametrize("name", [*LLAVA, *TEXT])
def test_transformers_4_computes_the_same(name: str, answers: dict[str, Any]):
    answer = answers[name]
    assert answer.get("error") is None
    assert answer["version"] == VERSION
    assert answer["unread"] == []
    assert answer["logits"] < 1e-5  # worst seen: 0
    assert answer["ids"] == [True] * len(answer["ids"])  # whoever tokenizes
    assert answer["pixels"] == 0
    assert answer["ends"] in (2, [2], [0, 2])


def test_the_environment_is_not_this_one(python: Path):
    assert python.parent.parent != Path(sys.prefix)
    code = "import importlib.util as u; print([n for n in ('vlm', 'torchvision', 'torch') if u.find_spec(n) is None])"
    seen = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout == "['vlm', 'torchvision']\n"
