"""A full export is what the LLaVA loaders of vLLM and SGLang look for: names, shapes, settings, processor, template.

Neither engine is run here. What their loaders expect was read in their sources and is written down below as lists:

- vLLM 0.33.0 (commit 4ba787ec9), its own classes: vllm/model_executor/models/llava.py, clip.py, siglip.py, utils.py.
- SGLang 0.5.23 with `--model-impl transformers`: sglang/srt/models/transformers.py, utils.py. Its own LLaVA class has
  neither CLIP nor SigLIP towers (srt/multimodal/processors/llava.py; EntryClass of srt/models/clip.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2.nodes
import pytest
from safetensors import safe_open
from tiny_export import model_config, write_image, write_run, write_siglip, write_tokenizer

from vlm.data.conversation import IMAGE, Conversation, Turn
from vlm.data.template import TEMPLATES
from vlm.data.tokenize import ConversationTokenizer
from vlm.export.run import export_run
from vlm.models.build import Assembled

Shape = tuple[int, ...]
Place = tuple[str, str]  # parameter of the engine's model, and which part of it where several tensors are stacked

MLP = {"kind": "mlp", "depth": 2}
CASES: dict[str, dict[str, Any]] = {
    "clip, llama": {},
    "clip, qwen2": {"family": "qwen2"},
    "clip, qwen3, untied": {"family": "qwen3", "tied": False},
    "clip, class token kept": {"vision": {"layer": -1, "keep_class_token": True}},
    "clip, other image size": {"vision": {"image_size": 42}},
    "siglip, llama": {"tower": "siglip"},
    "siglip, qwen2": {"tower": "siglip", "family": "qwen2", "vision": {"layer": -1}},
}

# vLLM: prefixes in files of transformers from 4.52 -> its modules; names of older files are its modules' already
VLLM_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
# vLLM: tensors that are put into one parameter, in the language model and in the tower
VLLM_STACKED = {
    ".q_proj.": (".qkv_proj.", "q"),
    ".k_proj.": (".qkv_proj.", "k"),
    ".v_proj.": (".qkv_proj.", "v"),
    ".gate_proj.": (".gate_up_proj.", "0"),
    ".up_proj.": (".gate_up_proj.", "1"),
}
VLLM_SKIPPED = "vision_tower.vision_model.post_layernorm."  # LLaVA's tower is built without it
VLLM_ACTIVATIONS = ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "tanh")
VLLM_LANGUAGE_MODELS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# SGLang: the longest prefix that fits -> modules of transformers' own model, which it builds from config.json
SGLANG_PREFIXES = {
    "vision_tower.vision_model.": "model.vision_tower.",  # where the tower has no such level, so from transformers 5.6
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


@dataclass(frozen=True)
class Export:
    folder: Path
    built: Assembled
    config: dict[str, Any]  # config.json
    processor: dict[str, Any]  # processor_config.json
    shapes: dict[str, Shape]  # of the tensors in the files, by name


def make_export(root: Path, changes: dict[str, Any]) -> Export:
    model_config(root)
    write_siglip(root / "siglip")
    family = changes.get("family", "llama")
    write_family(root / family, family, changes.get("tied", True))
    vision = {"backend": "hf", "path": str(root / changes.get("tower", "clip")), "layer": -2}
    values: dict[str, Any] = {
        "vision": {**vision, **changes.get("vision", {})},
        "llm": {"path": str(root / family)},
        "projector": changes.get("projector", MLP),
    }
    built = write_run(root / "run", model_config(root, **values))
    folder = export_run(root / "run", full=True, max_shard_size="100KB")
    shapes: dict[str, Shape] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return Export(folder, built, read(folder / "config.json"), read(folder / "processor_config.json"), shapes)


def write_family(folder: Path, family: str, tied: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    write_tokenizer(folder)
    config = AutoConfig.for_model(
        family, vocab_size=len(AutoTokenizer.from_pretrained(folder)), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=list(CASES))
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return make_export(tmp_path_factory.mktemp("export"), CASES[request.param])


# --- vLLM's parameters, from the settings that its classes read


def language_model_places(text: dict[str, Any]) -> dict[Place, Shape]:
    width, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    head = text.get("head_dim") or width // heads
    queries, keys = heads * head, text["num_key_value_heads"] * head
    places: dict[Place, Shape] = {
        ("model.embed_tokens.weight", ""): (text["vocab_size"], width),
        ("model.norm.weight", ""): (width,),
    }
    if not text["tie_word_embeddings"]:
        places["lm_head.weight", ""] = (text["vocab_size"], width)
    for number in range(text["num_hidden_layers"]):
        block = f"model.layers.{number}"
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            places[f"{block}.self_attn.qkv_proj.weight", part] = (rows, width)
            if text["model_type"] == "qwen2":
                places[f"{block}.self_attn.qkv_proj.bias", part] = (rows,)
        if text["model_type"] == "qwen3":
            places[f"{block}.self_attn.q_norm.weight", ""] = places[f"{block}.self_attn.k_norm.weight", ""] = (head,)
        places[f"{block}.self_attn.o_proj.weight", ""] = (width, queries)
        places[f"{block}.mlp.gate_up_proj.weight", "0"] = places[f"{block}.mlp.gate_up_proj.weight", "1"] = (
            inner,
            width,
        )
        places[f"{block}.mlp.down_proj.weight", ""] = (width, inner)
        places[f"{block}.input_layernorm.weight", ""] = (width,)
        places[f"{block}.post_attention_layernorm.weight", ""] = (width,)
    return places


def tower_places(vision: dict[str, Any], feature_layer: int) -> dict[Place, Shape]:
    width, inner, side = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    is_clip = vision["model_type"] == "clip_vision_model"
    num_positions = (vision["image_size"] // side) ** 2 + int(is_clip)
    places: dict[Place, Shape] = {
        ("embeddings.patch_embedding.weight", ""): (width, 3, side, side),
        ("embeddings.position_embedding.weight", ""): (num_positions, width),
    }
    if is_clip:
        places["embeddings.class_embedding", ""] = (width,)
        places["pre_layrnorm.weight", ""] = places["pre_layrnorm.bias", ""] = (width,)
    else:
        places["embeddings.patch_embedding.bias", ""] = (width,)
    for number in range(num_loaded_blocks(vision, feature_layer)):
        block = f"encoder.layers.{number}"
        for part in "qkv":
            places[f"{block}.self_attn.qkv_proj.weight", part] = (width, width)
            places[f"{block}.self_attn.qkv_proj.bias", part] = (width,)
        shapes = {"self_attn.out_proj": (width, width), "mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
        for name, shape in shapes.items():
            places[f"{block}.{name}.weight", ""] = shape
            places[f"{block}.{name}.bias", ""] = shape[:1]
        for norm in ("layer_norm1", "layer_norm2"):
            places[f"{block}.{norm}.weight", ""] = places[f"{block}.{norm}.bias", ""] = (width,)
    return places


def num_loaded_blocks(vision: dict[str, Any], feature_layer: int) -> int:
    return vision["num_hidden_layers"] + feature_layer + 1 if feature_layer < 0 else feature_layer


def projector_places(config: dict[str, Any]) -> dict[Place, Shape]:
    width = config["text_config"]["hidden_size"]
    places: dict[Place, Shape] = {}
    for layer, columns in (("linear_1", config["vision_config"]["hidden_size"]), ("linear_2", width)):
        places[f"{layer}.weight", ""] = (width, columns)
        if config["multimodal_projector_bias"]:
            places[f"{layer}.bias", ""] = (width,)
    return places


def vllm_places(config: dict[str, Any]) -> dict[Place, Shape]:
    """Every parameter that vLLM's LlavaForConditionalGeneration makes of a config.json."""
    parts = {
        "language_model.": language_model_places(config["text_config"]),
        "vision_tower.vision_model.": tower_places(config["vision_config"], config["vision_feature_layer"]),
        "multi_modal_projector.": projector_places(config),
    }
    return {(prefix + name, part): shape for prefix, places in parts.items() for (name, part), shape in places.items()}


def vllm_place(name: str) -> Place:
    """Where vLLM puts a tensor of a file."""
    for old, new in VLLM_PREFIXES.items():
        if name.startswith(old):
            name = name.replace(old, new, 1)
    for old, (new, part) in VLLM_STACKED.items():
        if old in name:
            return name.replace(old, new, 1), part
    return name, ""


def sglang_name(name: str) -> str:
    old = max((prefix for prefix in SGLANG_PREFIXES if name.startswith(prefix)), key=len)
    return SGLANG_PREFIXES[old] + name.removeprefix(old)


def misplaced(names: dict[str, Shape], places: dict[Place, Shape]) -> list[str]:
    """What keeps vLLM from loading tensors of these names and shapes, or leaves a parameter of it unset."""
    found = {vllm_place(name): shape for name, shape in names.items() if not name.startswith(VLLM_SKIPPED)}
    wrong = {place: shape for place, shape in found.items() if places.get(place) != shape}
    problems = [f"{place}: {shape} in the file, {places.get(place)} in the model" for place, shape in wrong.items()]
    return problems + [f"{place}: missing" for place in places if place not in found]


# --- weights


@pytest.mark.one_in(6)
@pytest.mark.slow
def test_every_tensor_lands_on_a_parameter_of_vllm_and_none_stays_unset(export: Export):
    assert misplaced(export.shapes, vllm_places(export.config)) == []


@pytest.mark.one_in(3)
@pytest.mark.slow
def test_every_tensor_lands_on_a_parameter_of_sglang_and_none_stays_unset(export: Export):
    """It builds transformers' model without weights, as done here, and refuses a file that lacks a parameter of it."""
    import torch
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(export.folder))
    wanted = {f"model.{name}": tuple(parameter.shape) for name, parameter in model.named_parameters()}
    text = export.config["text_config"]
    if not text["tie_word_embeddings"]:
        wanted["lm_head.weight"] = (text["vocab_size"], text["hidden_size"])
    assert {sglang_name(name): shape for name, shape in export.shapes.items()} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_the_check_finds_what_older_exports_had_wrong(tower: str, tmp_path: Path):
    """Without the level `vision_model`, with SigLIP's pooling head, with one more block, with a tensor left out."""
    export = make_export(tmp_path, {"tower": tower})
    places = vllm_places(export.config)
    flat = {name.replace(".vision_model.", "."): shape for name, shape in export.shapes.items()}
    assert any("vision_tower.embeddings" in line for line in misplaced(flat, places))
    head = {**export.shapes, "vision_tower.vision_model.head.probe": (1, 1, 32)}
    assert len(misplaced(head, places)) == 1
    config = {**export.config, "vision_config": {**export.config["vision_config"], "num_hidden_layers": 3}}
    assert any("layers.2" in line for line in misplaced(export.shapes, vllm_places(config)))
    less = {name: shape for name, shape in export.shapes.items() if not name.endswith("0.self_attn.k_proj.weight")}
    assert len(misplaced(less, places)) == 2  # one of the tower, one of the language model


# --- config.json


def test_the_settings_name_classes_that_both_engines_have(export: Export):
    config = export.config
    text, vision = config["text_config"], config["vision_config"]
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["model_type"] == "llava"
    assert text["architectures"] == [VLLM_LANGUAGE_MODELS[text["model_type"]]]
    assert vision["model_type"] in ("clip_vision_model", "siglip_vision_model")
    assert config["projector_hidden_act"] in VLLM_ACTIVATIONS
    assert vision["hidden_act"] in VLLM_ACTIVATIONS
    assert config["tie_word_embeddings"] == text["tie_word_embeddings"]  # vLLM reads the one, transformers the other
    assert config["dtype"] in ("float32", "bfloat16", "float16")


def test_the_tower_yields_what_was_trained_on(export: Export):
    """vLLM takes the output of the last block it built, before the final norm, and drops the class token or not."""
    config, vision = export.config, export.config["vision_config"]
    assert num_loaded_blocks(vision, config["vision_feature_layer"]) == vision["num_hidden_layers"]
    assert config["vision_feature_select_strategy"] in ("default", "full")
    if vision["model_type"] == "siglip_vision_model":
        assert vision["vision_use_head"] is False  # some versions of vLLM put the pooling head before the projector
        assert config["vision_feature_select_strategy"] == "full"


def test_all_count_the_same_tokens_an_image(export: Export):
    """vLLM counts from the tower's settings, the processor from its own; 16 for 28 x 28 pixels in patches of 7."""
    config, vision, processor = export.config, export.config["vision_config"], export.processor
    is_clip = vision["model_type"] == "clip_vision_model"
    drops_one = config["vision_feature_select_strategy"] == "default"
    of_vllm = (vision["image_size"] // vision["patch_size"]) ** 2 + int(is_clip) - int(drops_one)
    crop = processor["image_processor"]["crop_size"]
    of_processor = (crop["height"] // processor["patch_size"]) * (crop["width"] // processor["patch_size"])
    of_processor += processor["num_additional_image_tokens"] - int(drops_one)
    spec = export.built.image_spec
    assert spec is not None
    assert of_vllm == of_processor == config["image_seq_length"] == spec.num_tokens
    assert processor["vision_feature_select_strategy"] == config["vision_feature_select_strategy"]


def test_the_placeholder_is_one_token_with_a_row_in_the_embedding(export: Export):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export.folder)
    index = export.config["image_token_index"]
    assert export.processor["image_token"] == "<image>"
    assert tokenizer.convert_tokens_to_ids("<image>") == index
    assert tokenizer("a<image>b", add_special_tokens=False).input_ids.count(index) == 1
    assert index < export.config["text_config"]["vocab_size"]


@pytest.mark.slow
def test_a_linear_projector_is_for_transformers_only(tmp_path: Path):
    export = make_export(tmp_path, {"projector": {"kind": "linear"}})
    assert export.config["projector_hidden_act"] == "linear"
    assert export.config["projector_hidden_act"] not in VLLM_ACTIVATIONS


# --- processor, template and where a reply ends


def test_the_processor_makes_images_of_the_size_that_the_tower_takes(export: Export, tmp_path: Path):
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(export.folder)
    assert type(processor).__name__ == "LlavaProcessor"  # vLLM asks for this class by name
    image = Image.open(write_image(tmp_path / "image.png", size=(61, 33)))
    made = processor(text="<image>\nWhat?", images=image, return_tensors="pt")
    size = export.config["vision_config"]["image_size"]
    assert tuple(made["pixel_values"].shape) == (1, 3, size, size)
    ids = made["input_ids"][0].tolist()
    assert ids.count(export.config["image_token_index"]) == export.config["image_seq_length"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alpaca", "chatml", "internlm2", "llama2"])  # llama3 needs tokens of its own
def test_a_request_of_openais_client_becomes_the_tokens_of_training(name: str, tmp_path: Path):
    """Both engines hand an image on as `{"type": "image"}` and text as it came, without the line break between."""
    from PIL import Image
    from transformers import AutoProcessor

    built = write_run(tmp_path / "run", model_config(tmp_path, projector=MLP), template=name)
    processor = AutoProcessor.from_pretrained(export_run(tmp_path / "run", full=True), backend="pil")
    tokens = ConversationTokenizer(
        built.tokenizer, TEMPLATES[name], image_token_id=built.image_token_id, tokens_per_image=16
    )
    image = write_image(tmp_path / "image.png")
    trained = tokens.prompt(Conversation((Turn("user", (IMAGE, "\nWhat is this?")),), (str(image),)))
    for text in ("What is this?", "\nWhat is this?"):
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        found = processor(images=Image.open(image), text=prompt, add_special_tokens=False)["input_ids"][0]
        assert list(found) == trained


@pytest.mark.slow
def test_the_system_prompt_of_the_run_is_the_templates_default(tmp_path: Path):
    from transformers import AutoTokenizer

    write_run(tmp_path / "run", model_config(tmp_path, projector=MLP))
    config = read(tmp_path / "run" / "config.yaml")  # JSON is YAML
    config["data"]["system"] = 'Be "brief".'
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(config))
    for full in (False, True):
        tokenizer = AutoTokenizer.from_pretrained(export_run(tmp_path / "run", full=full))
        asked = [{"role": "user", "content": "Hi"}]
        begin = '<|im_start|>system\nBe "brief".<|im_end|>\n<|im_start|>user\nHi'
        assert str(tokenizer.apply_chat_template(asked, tokenize=False)).startswith(begin)
        own = [{"role": "system", "content": "Sing."}, *asked]
        assert "brief" not in str(tokenizer.apply_chat_template(own, tokenize=False))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("order", ["keep", "first", "last"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_is_recognised_as_one_that_takes_lists_of_parts(name: str, order: Any):
    """vLLM looks for a loop over `message['content']`, in a macro that gets it too; SGLang for the word `image`."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = replace(TEMPLATES[name], image_order=order).jinja("<s>", "</s>", tokenizer_adds_bos=True)
    tree = _compile_jinja_template(template).environment.parse(template)
    macro = next(tree.find_all(jinja2.nodes.Macro))
    loops = {loop.iter.name for loop in macro.find_all(jinja2.nodes.For)}
    assert (macro.name, macro.args[0].name, loops) == ("flat", "content", {"content"})
    assert "flat(message['content'], " in template
    assert "image" in template


def test_replies_end_where_the_template_ends_them(export: Export):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export.folder)
    assert read(export.folder / "generation_config.json")["eos_token_id"] == [
        tokenizer.convert_tokens_to_ids("<|im_end|>")
    ]
    assert (export.folder / "chat_template.jinja").read_text(encoding="utf-8") == tokenizer.chat_template


def test_files_stand_where_the_engines_look(export: Export):
    """Weights as safetensors with an index; no setting asks for code from the folder."""
    names = {path.name for path in export.folder.iterdir()}
    assert {"config.json", "generation_config.json", "processor_config.json", "chat_template.jinja"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"} <= names
    assert set(read(export.folder / "model.safetensors.index.json")["weight_map"]) == set(export.shapes)
    assert "auto_map" not in json.dumps([export.config, export.processor])
