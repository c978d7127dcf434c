"""Arguments that transformers renames within the range that setup.py allows, and the lowest version of that range."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from environments import make_environment
from tiny_models import write_llm

from vlm.batch import Batch
from vlm.compat import cache_argument
from vlm.generation.batched import BatchedGenerator, Reply
from vlm.generation.generate import GenerationSettings, generate
from vlm.generation.sampling import SamplingSettings
from vlm.models.build import build_model
from vlm.models.config import LLMConfig, ModelConfig
from vlm.models.llm import load_llm
from vlm.models.loss import chunked_cross_entropy
from vlm.models.pipeline import pipeline_layers, run_layers
from vlm.models.vlm import VisionLanguageModel

ROOT = Path(__file__).parents[2]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2"]  # the last cannot be cut for a pipeline


def packed_batch() -> Batch:
    """One row of three records."""
    torch.manual_seed(0)
    ids = torch.randint(2, 28, (1, 12))
    return Batch(ids, ids.clone(), torch.cat([torch.arange(n) for n in (5, 4, 3)])[None])


def replies(model: VisionLanguageModel, prompt: list[int], count: int) -> dict[str, list[int]]:
    """`count` greedy tokens: without a cache, as `vlm chat` writes them, and as `vlm serve` does."""
    uncached = list(prompt)
    for _ in range(count):
        output = model.llm(input_ids=torch.tensor([uncached]), use_cache=False)
        uncached.append(int(output.logits[0, -1].argmax()))
    generator = BatchedGenerator(model, max_tokens=1024)
    served = Reply(prompt, None, count, {-1}, SamplingSettings(), lambda token: True, lambda end: None)
    generator.add(served)
    while generator.step():
        pass
    chat = generate(model, prompt, None, {-1}, GenerationSettings(max_new_tokens=count))
    return {"uncached": uncached[len(prompt) :], "chat": list(chat), "serve": served.new_ids}


def test_the_cache_goes_by_the_name_that_a_forward_has():
    def old(past_key_values: object) -> None: ...

    def new(cache: object, **kwargs: object) -> None: ...

    assert (cache_argument(old), cache_argument(new)) == ("past_key_values", "cache")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_and_no_reply_uses_an_argument_that_transformers_gives_up(tmp_path: Path, family: str):
    model = build_model(ModelConfig.model_validate({"llm": {"path": str(write_llm(tmp_path, family))},
                                                    "trainable": ["llm"]})).model  # fmt: skip
    batch = packed_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        loss = chunked_cross_entropy(model(batch.input_ids, batch.position_ids), batch.labels, model.logits)
        if family != "gemma2":
            states = run_layers(model, pipeline_layers(model), batch)
            piped = chunked_cross_entropy(states, batch.labels, model.logits)
            piped.backward()
            assert piped.item() == loss.item()
        with torch.no_grad():
            written = replies(model.eval(), [5, 6, 7, 8], 6)
    assert written["chat"] == written["serve"] == written["uncached"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_lowest_transformers_of_setup_py_computes_the_same(tmp_path: Path):
    """In an environment of its own, which sees this one's other packages behind its three."""
    python = lowest_environment(tmp_path / "environment")
    code = (
        "import sys; from pathlib import Path; import transformers, test_transformers_range as t; "
        "t.check_the_installed_version(Path(sys.argv[1])); print(transformers.__version__)"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-W", "error::FutureWarning", "-c", code, str(tmp_path / "models")],
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == lowest_version() + ".0"


def check_the_installed_version(folder: Path) -> None:
    """Packed = alone, pipeline layers = the whole model, replies with a cache = without."""
    for family in FAMILIES:
        path = write_llm(folder / family, family)
        model = VisionLanguageModel(load_llm(LLMConfig(path=str(path)), torch.float32)).eval()
        batch = packed_batch()
        with torch.no_grad():
            packed = model(batch.input_ids, batch.position_ids)
            for first, stop in ((0, 5), (5, 9), (9, 12)):
                alone = model(batch.input_ids[:, first:stop], torch.arange(stop - first)[None])
                assert (packed[:, first:stop] - alone).abs().max() < 1e-5, family
            if family != "gemma2":
                loss = chunked_cross_entropy(packed, batch.labels, model.logits)
                states = run_layers(model, pipeline_layers(model), batch)
                assert chunked_cross_entropy(states, batch.labels, model.logits).item() == loss.item(), family
            written = replies(model, [5, 6, 7, 8], 6)
        assert written["chat"] == written["serve"] == written["uncached"], family


def lowest_version() -> str:
    """Of setup.py: "5.6" of "transformers>=5.6,<6"."""
    found = re.search(r'"transformers>=([\d.]+),', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def lowest_environment(folder: Path) -> str:
    """An interpreter with the lowest transformers and what only fits it; skips the test where no index answers."""
    wanted = [f"transformers=={lowest_version()}.0", "tokenizers==0.22.2", "huggingface_hub==1.33.0"]
    return str(make_environment(folder, wanted, behind=[path for path in sys.path if path.endswith("-packages")]))
