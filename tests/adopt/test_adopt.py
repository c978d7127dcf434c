"""`vlm adopt`: what it finds of two tiny models, what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from demo.tiny import tiny_tokenizer, write_encoder, write_llm
from tokenizers_for_tests import TEXTS, sentencepiece_like

from vlm.adopt.adopt import Adopted, _removed_on_error, adopt, as_text
from vlm.adopt.encoders import find_backend
from vlm.adopt.look import choose_projector, look
from vlm.adopt.project import FINETUNE, LORA, Sources, write_project
from vlm.adopt.template import choose_template
from vlm.config import load_config
from vlm.config_checks import config_problems, load_checked
from vlm.data.template import TEMPLATES
from vlm.errors import ConfigError


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vlm.compat import prepare

    prepare()
    folder = tmp_path_factory.mktemp("parts")
    write_llm(folder / "llm", ["What is this? A red circle."])
    write_encoder(folder / "clip")
    return folder


def found(adopted: Adopted) -> dict[str, tuple[str, str]]:
    """Topic -> what was found, and what cannot be done."""
    return {line.topic: (line.text, line.limit) for line in adopted.lines}


@pytest.mark.slow
def test_a_project_is_written_whose_configs_are_valid_and_say_what_was_found(parts: Path, tmp_path: Path):
    adopted = adopt([str(parts / "clip")], str(parts / "llm"), tmp_path / "pair", memory="24GiB")
    lines = found(adopted)
    assert "56 x 56 pixels -> 16 patches of 32, layer -2" in lines["encoder"][0]
    assert lines["template"] == ("data.template tokenizer: the tokenizer's own, which is chatml here", "")
    assert lines["LoRA"][0].startswith("all-linear is 14 layers: q_proj, k_proj")
    assert lines["pipeline"][0] == "4 layers, inputs and output counted; 2 stages are cut before 3"
    assert lines["export"][0].startswith("vlm export --full writes transformers' LLaVA layout")
    assert all(lines[stage][0].startswith("fits: 0.") for stage in ("pretrain", "finetune", "finetune_lora"))
    assert [line.topic for line in adopted.lines if line.limit] == []
    config = load_checked(str(tmp_path / "pair/pretrain.yaml"))
    assert (config.model.vision.layer, config.data.packing, config.data.max_length) == (-2, True, 2048)
    # 36 records of 16 image and 40 text tokens in a row of 2,048, so 8 rows are about 256
    assert config.train.global_batch_size == 8
    lora = load_config(tmp_path / "pair/finetune_lora.yaml")
    assert "init_from" in str(config_problems(lora))  # stage 1 first; all else is there
    assert lora.init_from == "cache/runs/pair/pretrain/export"
    assert {"pretrain", "finetune", "finetune_lora", "trial"} == {p.stem for p in (tmp_path / "pair").glob("*.yaml")}
    assert all(command in (tmp_path / "pair/README.md").read_text() for command in adopted.commands)


def test_both_parts_are_refused_at_once_and_nothing_is_written(parts: Path, tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        adopt([str(parts / "llm")], str(parts / "clip"), tmp_path / "pair")
    assert "model type 'llama' is no encoder known here" in str(error.value)
    assert "holds a vision encoder (clip_vision_model), expected a language model" in str(error.value)
    assert not (tmp_path / "pair").exists()


def test_a_decoder_that_cannot_be_right_is_refused_by_name(parts: Path, tmp_path: Path):
    shutil.copytree(parts / "llm", tmp_path / "bert")
    settings = {"model_type": "bert", "architectures": ["BertLMHeadModel"], "vocab_size": 400}
    (tmp_path / "bert/config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="model type bert cannot be trained here: it is an encoder"):
        adopt([str(parts / "clip")], str(tmp_path / "bert"), tmp_path / "pair")


def test_a_folder_that_holds_something_is_left_alone(parts: Path, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already and is not empty"):
        adopt([str(parts / "clip")], str(parts / "llm"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_behind_a_link_is_as_it_was_after_an_error(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")

    def fail_halfway(folder: Path) -> None:
        with _removed_on_error(folder):
            (folder / "data").mkdir()
            (folder / "data/a.png").touch()
            (folder / "trial.yaml").touch()
            raise ConfigError("half way")

    for name in ("link", "new"):
        with pytest.raises(ConfigError, match="half way"):
            fail_halfway(tmp_path / name)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["empty", "link"]


def test_the_adapters_stage_keeps_its_own_rows_where_the_full_stage_gets_fewer(parts: Path, tmp_path: Path):
    pair = look([str(parts / "clip")], str(parts / "llm"))
    drawn = Sources.drawn(tmp_path / "data")
    for given, expected in (({}, (4, 4)), ({FINETUNE: 2}, (2, 4)), ({FINETUNE: 2, LORA: 1}, (2, 1))):
        write_project(tmp_path, pair, drawn, drawn, given)
        found = tuple(load_config(tmp_path / name).train.micro_batch_size for name in (FINETUNE, LORA))
        assert found == expected


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_what_to_do(parts: Path, tmp_path: Path):
    adopted = adopt([str(parts / "clip")], str(parts / "llm"), tmp_path / "pair", memory="1GiB")
    assert found(adopted)["finetune"][1].startswith("DOES NOT FIT: ")
    assert "  finetune: DOES NOT FIT" in as_text(adopted)


@pytest.mark.slow
def test_where_memory_is_short_fewer_rows_are_computed_at_once(parts: Path, tmp_path: Path):
    adopt([str(parts / "clip")], str(parts / "llm"), tmp_path / "pair", memory="1.07GiB")
    rows = {
        name: load_config(tmp_path / f"pair/{name}.yaml").train.micro_batch_size
        for name in ("pretrain", "finetune", "finetune_lora")
    }
    assert rows["pretrain"] == 4
    assert rows["finetune_lora"] < rows["finetune"] < 4


def test_a_base_model_gets_a_template_of_plain_words_and_the_command_that_prepares_it(parts: Path, tmp_path: Path):
    base = tmp_path / "base"
    write_llm(base, TEXTS)
    for file in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        (base / file).unlink()
    tokenizer = sentencepiece_like([text for text in TEXTS if "<|" not in text])
    tokenizer.save_pretrained(base)
    config = json.loads((base / "config.json").read_text()) | {"vocab_size": len(tokenizer)}
    (base / "config.json").write_text(json.dumps(config))
    adopted = adopt([str(parts / "clip")], str(base), tmp_path / "pair", memory="24GiB")
    template = next(line for line in adopted.lines if line.topic == "template")
    assert template.text.startswith("data.template vicuna")
    assert template.limit == "it is a base model: it knows no chat template"
    assert template.advice.startswith(f"vlm prepare-base-model {base} cache/ckpt/base-chatml, then vlm adopt ")


@pytest.mark.parametrize(
    ("words", "eos", "expected"),
    [
        (("<|im_start|>", "<|im_end|>"), "<|im_end|>", "chatml"),
        (("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), None, "llama3"),
        (("<start_of_turn>", "<end_of_turn>"), "<eos>", "gemma"),
        ((), "<eos>", "vicuna"),  # no control words: an end token is enough
        ((), None, None),  # nothing ends a reply
    ],
)
def test_the_template_is_the_one_whose_control_words_are_tokens(words: Any, eos: str | None, expected: str | None):
    tokenizer = tiny_tokenizer(["a"])
    tokenizer.eos_token = None
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [
        {**backend["added_tokens"][0], "id": 300 + number, "content": word}
        for number, word in enumerate(dict.fromkeys([*words, *([eos] if eos else [])]))
    ]
    for name in ("<|im_start|>", "<|im_end|>"):
        backend["model"]["vocab"].pop(name, None)
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token=eos)
    chosen = choose_template(plain, "llama")
    assert (chosen.name if chosen else None) == expected


def test_a_chat_template_that_is_not_known_is_said_and_another_taken():
    tokenizer = tiny_tokenizer(["a"])
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    chosen = choose_template(tokenizer, "llama")
    assert chosen is not None
    assert chosen.name == "chatml"
    assert chosen.limit.startswith("the tokenizer's own chat template is not known here")
    tokenizer.chat_template = TEMPLATES["chatml"].jinja(None, "<|im_end|>", tokenizer_adds_bos=False)
    assert choose_template(tokenizer, "llama").name == "tokenizer"


@pytest.mark.parametrize(
    ("patches", "most", "expected"),
    [
        (576, 576, {"kind": "mlp", "depth": 2}),  # CLIP-L/336: all of them
        (729, 576, {"kind": "mlp", "depth": 2, "unshuffle": 3}),  # SigLIP so400m/384: 27 x 27 -> 9 x 9
        (1369, 576, {"kind": "average", "num_tokens": 576}),  # DINOv2-L/518: 37 has no divisor
        (1000, 576, {"kind": "resampler", "num_tokens": 64}),  # no square
    ],
)
def test_an_image_takes_no_more_tokens_than_there_is_room_for(patches: int, most: int, expected: dict[str, Any]):
    assert choose_projector(patches, most) == expected


def test_the_library_is_told_by_the_files_of_a_folder(tmp_path: Path):
    files = {
        "hf": {"config.json": {"model_type": "dinov3_vit"}},
        "timm": {"config.json": {"architecture": "vit_tiny_patch16_224"}},
        "open_clip": {"open_clip_config.json": {"model_cfg": {}}},
    }
    for backend, contents in files.items():
        (tmp_path / backend).mkdir()
        for name, values in contents.items():
            (tmp_path / backend / name).write_text(json.dumps(values))
        assert find_backend(str(tmp_path / backend)) == backend
    assert find_backend("convnext_atto") == "timm"
    assert find_backend("hf-hub:timm/vit_tiny_patch16_224") == "timm"
    with pytest.raises(ConfigError, match="add --backend timm or --backend open_clip"):
        find_backend("hf-hub:laion/CLIP-ViT-L-14")
