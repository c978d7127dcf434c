"""No shipped project is refused: each is proven with the kinds of its parts at toy size, and tiny with its own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from demo.tiny import write_data, write_encoder, write_llm

from vlm.cli.main import app
from vlm.cli.process import run
from vlm.config import load_config, shipped_projects
from vlm.prepare import prepare_run
from vlm.proof.prove import prove
from vlm.run import with_first_reference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
REPOSITORY = Path(__file__).parents[2]
RECIPES = [name for name in shipped_projects() if not name.startswith("tiny/")]


def family_of(path: str) -> str:
    """Model type by the name of a shipped model."""
    names = {"qwen3": "qwen3", "qwen2": "qwen2", "internlm3": "internlm3", "smollm2": "llama", "baichuan": "llama",
             "yuren": "llama", "internlm2": "llama", "qwen7b": "qwen2", "qwen14b": "qwen2"}  # fmt: skip
    return next(family for part, family in names.items() if part in path.lower())


def toy_llm(root: Path, family: str) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = root / family
    if not folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(root / "llm")
        tokenizer.bos_token = "<|endoftext|>"
        torch.manual_seed(0)
        settings = AutoConfig.for_model(
            family, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def toy_vision(root: Path, vision: dict[str, Any]) -> dict[str, Any]:
    """The same library and class at toy size; what else the recipe says of the encoder is kept."""
    if vision.get("fuse_with"):
        others = [toy_vision(root, each) for each in vision["fuse_with"]]
        return toy_vision(root, {**vision, "fuse_with": []}) | {"fuse_with": others}
    kinds = {"siglip": "siglip_vision_model", "dinov2": "dinov2", "clip": "clip_vision_model"}
    if vision["backend"] == "hf":
        kind = next(kind for part, kind in kinds.items() if part in vision["path"])
        return {**vision, "path": hf_encoder(root, kind), "image_size": None}
    if "efficientnet" in vision["path"]:
        return {**vision, "path": str(timm_folder(root, "test_efficientnet")), "image_size": 192}
    folder = timm_folder(root, "eva02_tiny_patch14_224")
    if vision["backend"] == "timm":
        return {**vision, "path": str(folder), "pretrained": None, "image_size": 56}
    return {**vision, "path": str(open_clip_folder(root)), "pretrained": None, "image_size": 56}


def hf_encoder(root: Path, kind: str) -> str:
    from transformers import AutoConfig, AutoModel

    folder = root / kind
    if not folder.exists():
        torch.manual_seed(1)
        settings = AutoConfig.for_model(
            kind, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
            image_size=84, patch_size=14,
        )  # fmt: skip
        AutoModel.from_config(settings).save_pretrained(folder)
    return str(folder)


def timm_folder(root: Path, architecture: str) -> Path:
    import timm
    from safetensors.torch import save_file

    folder = root / architecture
    if not folder.exists():
        torch.manual_seed(1)
        model = timm.create_model(architecture, pretrained=False)
        folder.mkdir()
        keys = ("input_size", "mean", "std", "first_conv", "classifier")
        settings = {key: model.pretrained_cfg[key] for key in keys} | {"num_classes": 1000}
        record = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": settings}
        (folder / "config.json").write_text(json.dumps(record))
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
    return folder


def open_clip_folder(root: Path) -> Path:
    import open_clip
    from safetensors.torch import save_file

    folder = root / "open_clip"
    if not folder.exists():
        folder.mkdir()
        shape = {"image_size": 56, "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None}
        text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
        settings = {"model_cfg": {"embed_dim": 192, "vision_cfg": shape, "text_cfg": text}, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(settings))
        torch.manual_seed(1)
        tensors = open_clip.create_model(f"local-dir:{folder}", load_weights=False).state_dict()
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "open_clip_model.safetensors")
    return folder


def write_text(path: Path, part: str) -> str:
    """Texts for stage pt, instructions for the others."""
    colors = ["a red circle", "a blue square", "a green star"]
    texts = [{"text": f"This is {colors[n % 3]}."} for n in range(32)]
    pairs = [{"instruction": f"What is this? {n}", "output": text["text"]} for n, text in enumerate(texts)]
    path.write_text("".join(f"{json.dumps(each)}\n" for each in (texts if part == "pretrain" else pairs)))
    return str(path)


def write_first_questions(path: Path, conversations: Path, kind: str) -> str:
    """The first question of every conversation, with its reply preferred to another or as the answer to verify."""
    asked = []
    for line in conversations.read_text().splitlines():
        record = json.loads(line)
        question, reply = (turn["value"] for turn in record["conversations"][:2])
        known = {"answer": reply} if kind in ("grpo", "ppo") else {"chosen": reply, "rejected": f"Not {reply}"}
        asked.append({"image": record["image"], "prompt": question} | known)
    path.write_text("".join(f"{json.dumps(each)}\n" for each in asked))
    return str(path)


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    from vlm.compat import prepare as prepare_libraries

    prepare_libraries()
    folder = tmp_path_factory.mktemp("toys")
    write_llm(folder / "llm", write_data(folder / "data"))
    return folder


@pytest.fixture(scope="module")
def proven() -> set[str]:
    """Configs that passed."""
    return set()


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_is_not_refused_at_toy_size(name, toys, proven, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    values = load_config(name).model_dump(mode="json")
    values["model"]["llm"]["path"] = toy_llm(toys, family_of(values["model"]["llm"]["path"]))
    is_text = values["model"]["vision"] is None
    if not is_text:
        values["model"]["vision"] = toy_vision(toys, values["model"]["vision"])
    if values["model"]["projector"]["kind"] == "qformer":
        values["model"]["projector"] |= {
            "pretrained": None,
            "frozen": False,
            "num_blocks": 2,
            "width": 48,
            "num_heads": 4,
        }
    values |= {"init_from": None, "name": None, "output_dir": f"{toys}/run"}
    part = "pretrain" if values["data"]["template"] == "plain" else "finetune"
    source = {"path": str(toys / f"data/{part}.jsonl"), "images": str(toys / "data/images")}
    if is_text:
        source = {"path": write_text(toys / f"{part}-text.jsonl", part)}
    elif (kind := values["objective"]["kind"]) != "lm":
        source["path"] = write_first_questions(toys / f"{kind}.jsonl", toys / "data/finetune.jsonl", kind)
    values["data"] |= {"sources": [source], "eval_sources": [], "held_out": 0, "workers": 0, "cache": f"{toys}/cache"}
    values["train"] |= {"precision": "fp32", "samples": [], "global_batch_size": 8, "micro_batch_size": 2}
    values["evaluation"] = {}
    if values["objective"].get("kl"):  # it holds the model to an export, which a toy has none of
        values["objective"]["kl"] = 0
    values["engine"] = {"device": "cpu"}  # the engines have a test of their own
    path = toys / "run.yaml"
    text = json.dumps(values)
    if text in proven:  # the toy of another recipe, such as the same run with another engine
        return
    path.write_text(text)
    parts = with_first_reference(prepare_run(load_config(path), torch.device("cpu")))
    proof = prove(parts, seconds=math.inf)
    assert proof.failed == [], proof.table()
    left = {name: finding.note for name, finding in proof.findings.items() if finding.passed is None}
    proven.add(text)
    if not is_text and values["objective"]["kind"] == "lm":
        assert left.keys() - {"shared_image"} == {"initial_weights"}, left  # rows of one record share no image


def test_both_stages_of_tiny_are_not_refused(tmp_path, monkeypatch):
    from vlm.compat import prepare as prepare_libraries

    prepare_libraries()
    monkeypatch.chdir(tmp_path)
    write_llm(Path("cache/tiny/llm"), write_data(Path("cache/tiny/data")))
    write_encoder(Path("cache/tiny/encoder"))

    def vlm(*words: str) -> int:
        return run(lambda: app(list(words), standalone_mode=False))

    assert vlm("train", "tiny/pretrain") == 0
    assert vlm("export", "cache/runs/tiny/pretrain") == 0
    assert vlm("train", "tiny/finetune", "--options", "train.max_steps=2") == 0
    for stage, passed in (("pretrain", 20), ("finetune", 21)):
        proof = json.loads(Path(f"cache/runs/tiny/{stage}/proof.json").read_text())
        assert sum(check["passed"] is True for check in proof["checks"]) == passed
