"""Loading an export: to talk to it, to start the next stage from it, and what is refused."""

from __future__ import annotations

import doctest
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_export import model_config, write_clip, write_image, write_llm, write_run

import vlm.inference.load as load_module
from vlm.artifacts.initial import load_init
from vlm.errors import CheckpointError, ConfigError, RecordError
from vlm.export.run import export_run
from vlm.generation.generate import GenerationSettings
from vlm.inference.load import LoadedModel, load
from vlm.inference.messages import to_conversation
from vlm.models.build import build_model
from vlm.models.trainable import part_weights


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip/, llm/, a run and its export. Not to be changed; copy it."""
    root = tmp_path_factory.mktemp("load")
    write_run(root / "run", model_config(root))
    export_run(root / "run")
    write_image(root / "cat.png")
    return root


@pytest.fixture(scope="module")
def loaded(root: Path) -> LoadedModel:
    return load(root / "run" / "export", device="cpu", precision="fp32")


@pytest.fixture
def export(root: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(root / "run" / "export", tmp_path / "export"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Talking to it


@pytest.mark.slow
def test_the_example_in_the_documentation_works(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(root)
    found = doctest.DocTestFinder().find(load, "load", globs={**vars(load_module), "export": root / "run" / "export"})
    for example in found:
        result = doctest.DocTestRunner().run(example)
        assert result.failed == 0
        assert result.attempted == 7


def test_all_forms_of_a_question_with_an_image_get_the_same_reply(loaded: LoadedModel, root: Path):
    path = root / "cat.png"
    with Image.open(path) as image:
        in_memory = image.convert("RGB")
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    forms = [
        loaded.chat("What is this?", [path], max_new_tokens=8),
        loaded.chat("What is this?", [in_memory], max_new_tokens=8),
        loaded.chat([{"role": "user", "content": parts}], [path], max_new_tokens=8),
    ]
    assert forms[0] != ""
    assert len(set(forms)) == 1


def test_the_reply_depends_on_the_image(loaded: LoadedModel, root: Path):
    replies = {
        loaded.chat("What is this?", [write_image(root / f"{seed}.png", seed=seed)], max_new_tokens=8)
        for seed in range(4)
    }
    assert len(replies) > 1


def test_the_pieces_of_a_stream_are_the_reply(loaded: LoadedModel, root: Path):
    pieces = list(
        loaded.stream(to_conversation("这是什么？", [root / "cat.png"]), GenerationSettings(max_new_tokens=20))
    )
    assert all(pieces)
    assert "".join(pieces).strip() == loaded.chat("这是什么？", [root / "cat.png"], max_new_tokens=20)


def test_a_begun_reply_goes_on_and_its_next_word_keeps_its_space(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    seen: list[list[int]] = []
    next_ids = loaded.tokenizer(" red square.").input_ids

    def generate(model: Any, ids: list[int], *rest: Any) -> list[int]:
        seen.append(ids)
        return next_ids

    monkeypatch.setattr(load_module, "generate", generate)
    question = {"role": "user", "content": "What is this?"}
    assert loaded.chat([question]) == "red square."
    assert loaded.chat([question, {"role": "assistant", "content": "A"}]) == " red square."
    assert loaded.chat([question, {"role": "assistant", "content": " "}]) == "red square."  # says nothing yet
    assert loaded.tokenizer.decode(seen[1]) == loaded.tokenizer.decode(seen[0]) + "A"
    assert seen[2] == seen[0]


def test_sampling_with_a_seed_repeats_itself(loaded: LoadedModel):
    def sample(seed: int) -> str:
        return loaded.chat("Hello", max_new_tokens=10, do_sample=True, temperature=2.0, seed=seed)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_beams_stream_too(loaded: LoadedModel):
    assert loaded.chat("Hello", max_new_tokens=6, num_beams=2) != ""


def test_a_stop_string_ends_the_reply_and_the_generation(loaded: LoadedModel):
    reply = loaded.chat("Hello", max_new_tokens=30)
    stop = reply[4:6]
    assert loaded.chat("Hello", max_new_tokens=30, stop=stop) == reply[: reply.index(stop)].strip()


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that each generation really made, whoever read them."""
    made: list[int] = []

    def generate(*arguments: Any) -> list[int]:
        ids = load_module_generate(*arguments)
        made.append(len(ids))
        return ids

    load_module_generate = load_module.generate
    monkeypatch.setattr(load_module, "generate", generate)
    return made


@pytest.mark.slow
def test_closing_the_stream_ends_the_generation(loaded: LoadedModel, lengths: list[int]):
    stream = loaded.stream(to_conversation("Hello"), GenerationSettings(max_new_tokens=200))
    next(stream)
    stream.close()
    list(loaded.stream(to_conversation("Hello"), GenerationSettings(max_new_tokens=200)))
    assert lengths[0] < lengths[1] == 200


def test_a_request_to_stop_ends_the_generation_with_the_next_token(loaded: LoadedModel, lengths: list[int]):
    list(loaded.stream(to_conversation("Hello"), GenerationSettings(max_new_tokens=200), should_stop=lambda: True))
    assert lengths == [1]


def test_a_conversation_longer_than_the_model_reads_is_refused_with_numbers(loaded: LoadedModel):
    with pytest.raises(ConfigError, match=r"the model reads at most 256"):
        loaded.chat("one two three " * 100)


@pytest.mark.slow
def test_the_reply_is_cut_where_the_model_ends(loaded: LoadedModel):
    prompt = len(loaded.conversation_tokenizer.prompt(to_conversation("one " * 60)))
    assert 200 < prompt < 256 or prompt < 256
    assert loaded.chat("one " * 60, max_new_tokens=10_000) is not None


def test_an_unknown_setting_is_named(loaded: LoadedModel):
    with pytest.raises(ConfigError, match="unknown generation setting max_tokens"):
        loaded.chat("Hello", max_tokens=3)
    with pytest.raises(ConfigError, match="temperature > 0"):
        loaded.chat("Hello", do_sample=True, temperature=0.0)


def test_an_error_in_the_generation_thread_reaches_the_caller(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(load_module, "generate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loaded.chat("Hello")


@pytest.mark.slow
def test_an_image_for_a_plain_language_model_is_refused(root: Path, tmp_path: Path):
    write_run(tmp_path / "run", model_config(root, vision=None, trainable=["llm.lora"]))
    plain = load(export_run(tmp_path / "run"), "cpu", "fp32")
    assert plain.image_spec is None
    with pytest.raises(RecordError, match="image"):
        plain.chat("What?", [root / "cat.png"])


def test_bfloat16_computes_in_bfloat16(root: Path):
    half = load(root / "run" / "export", device="cpu", precision="bf16")
    assert half.model.llm.dtype == torch.bfloat16
    assert half.chat("What?", [root / "cat.png"], max_new_tokens=4) is not None


# The next stage


def fresh(root: Path, **changes: Any) -> Any:
    return build_model(model_config(root, **changes), seed=5).model


def begin(root: Path, export: Path, **changes: Any) -> list[str]:
    return load_init(fresh(root, **changes), model_config(root, **changes), export)


def test_projector_and_adapter_continue(root: Path):
    model = fresh(root)
    report = load_init(model, model_config(root), root / "run" / "export")
    assert report == ["projector: 4 tensors loaded", "llm.lora: 28 tensors loaded"]
    stored = load_file(root / "run" / "export" / "projector.safetensors")
    own = part_weights(model, "projector")
    assert all(torch.equal(own[name], stored[name]) for name in stored)


@pytest.mark.slow
def test_a_new_adapter_starts_fresh_and_is_said_to(root: Path, tmp_path: Path):
    write_run(tmp_path / "run", model_config(root, trainable=["projector"], lora=None))
    assert begin(root, export_run(tmp_path / "run")) == [
        "projector: 4 tensors loaded",
        "llm.lora: not in the export, starts fresh",
    ]


@pytest.mark.parametrize("trainable", [["projector"], ["projector", "llm"]])
def test_an_adapter_that_is_not_trained_on_is_merged(root: Path, loaded: LoadedModel, trainable: list[str]):
    changes = {"trainable": trainable, "lora": None}
    model = fresh(root, **changes)
    trained_before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    report = load_init(model, model_config(root, **changes), root / "run" / "export")
    assert "llm.lora: 28 tensors merged into the language model, as this config trains no adapter" in report
    assert not part_weights(model, "llm.lora")
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained_before
    ids = torch.arange(3, 13).unsqueeze(0)
    with torch.no_grad():  # worst difference seen: 0
        assert (model.llm(ids).logits - loaded.model.llm(ids).logits).abs().max().item() < 1e-5


@pytest.mark.slow
def test_a_whole_language_model_is_the_start_of_an_adapter(root: Path, tmp_path: Path):
    built = write_run(tmp_path / "run", model_config(root, trainable=["projector", "llm"], lora=None))
    model = fresh(root)
    assert any(line.startswith("llm: ") for line in load_init(model, model_config(root), export_run(tmp_path / "run")))
    ids = torch.arange(3, 13).unsqueeze(0)
    with torch.no_grad():  # a new adapter adds nothing
        assert torch.equal(model.llm(ids).logits, built.model.llm(ids).logits)


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"lora": {"rank": 8, "alpha": 8}}, [r"model\.lora\.rank: 4 -> 8"]),
        ({"lora": {"rank": 4, "alpha": 16}}, [r"model\.lora\.alpha: 8 -> 16"]),
        (
            {"projector": {"kind": "mlp", "depth": 2}},
            [r"projector\.feature_mean: not in the model", r"projector\.feature_std: not in the model"],
        ),
        (
            {"projector": {"unshuffle": 2, "normalize": True}},
            [r"projector\.layers\.0\.weight: \[32, 32\] -> \[32, 128\]"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_line_by_line(root: Path, changes: dict[str, Any], lines: list[str]):
    with pytest.raises(CheckpointError) as caught:
        begin(root, root / "run" / "export", **changes)
    for line in lines:
        assert caught.match(line)


@pytest.mark.slow
def test_another_width_of_encoder_or_language_model_is_refused_line_by_line(root: Path, tmp_path: Path):
    wide = {"backend": "hf", "path": str(write_clip(tmp_path / "wide", width=64)), "layer": -2}
    with pytest.raises(CheckpointError, match=r"projector\.layers\.0\.weight: \[32, 32\] -> \[32, 64\]"):
        begin(root, root / "run" / "export", vision=wide)
    wide_llm = {"path": str(write_llm(tmp_path / "wide_llm", width=48))}
    write_run(tmp_path / "run", model_config(root, trainable=["projector"], lora=None))
    with pytest.raises(CheckpointError, match=r"\[32, 32\] -> \[48, 32\]"):
        begin(root, export_run(tmp_path / "run"), llm=wide_llm)


def test_another_vocabulary_is_refused(root: Path, tmp_path: Path):
    write_run(tmp_path / "run", model_config(root, trainable=["projector", "llm"], lora=None))
    padded = {"path": str(root / "llm"), "pad_vocab_to_multiple_of": 512}
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: \[\d+, 32\] -> \[512, 32\]"):
        begin(root, export_run(tmp_path / "run"), llm=padded)


def test_an_adapter_beside_another_language_model_of_the_same_shape_is_refused(root: Path, tmp_path: Path):
    other = {"path": str(write_llm(tmp_path / "other", seed=9))}
    with pytest.raises(CheckpointError, match="trained beside another language model"):
        begin(root, root / "run" / "export", llm=other)


@pytest.mark.slow
def test_a_projector_may_move_to_another_language_model_of_its_width_and_this_is_said(root: Path, tmp_path: Path):
    write_run(tmp_path / "run", model_config(root, trainable=["projector"], lora=None))
    other = {"path": str(write_llm(tmp_path / "other", seed=9))}
    report = begin(root, export_run(tmp_path / "run"), llm=other)
    assert report[0] == "the language model is another one than the projector was trained beside"


def test_the_same_base_in_bfloat16_is_the_same_base(root: Path):
    model = build_model(model_config(root), precision="bf16").model
    assert load_init(model, model_config(root), root / "run" / "export")[0] == "projector: 4 tensors loaded"


@pytest.mark.slow
def test_a_merged_llava_folder_is_no_start_and_says_what_is(root: Path, tmp_path: Path):
    full = export_run(root / "run", out=tmp_path / "full", full=True)
    with pytest.raises(CheckpointError, match="without --full"):
        begin(root, full)


# What is refused


def test_what_is_no_export_says_what_it_is(root: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no vlm\.json"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"vlm export .*run"):
        load(root / "run")


@pytest.mark.slow
def test_another_base_model_at_the_same_path_is_refused_tensor_by_tensor(root: Path, tmp_path: Path):
    write_run(tmp_path / "run", model_config(tmp_path))
    export = export_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "llm")
    write_llm(tmp_path / "llm", seed=9)  # same shapes
    with pytest.raises(CheckpointError, match=r"other weights.*\n  model\.layers\.\d.*: [0-9a-f]{16} -> [0-9a-f]{16}"):
        load(export)
    shutil.rmtree(tmp_path / "llm")
    write_llm(tmp_path / "llm")
    assert load(export, "cpu", "fp32").chat("Hello", max_new_tokens=2) is not None


@pytest.mark.slow
def test_another_encoder_at_the_same_path_is_refused(tmp_path: Path):
    write_run(tmp_path / "run", model_config(tmp_path))
    export = export_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "clip")
    write_clip(tmp_path / "clip", seed=9)
    with pytest.raises(CheckpointError, match=r"model\.vision\.path .* holds other weights"):
        load(export)


def test_a_missing_base_model_is_named(tmp_path: Path):
    write_run(tmp_path / "run", model_config(tmp_path))
    export = export_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "llm")
    with pytest.raises(CheckpointError, match="llm"):
        load(export)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, r"r: 4 -> 8"),
        ({"lora_alpha": 64}, r"lora_alpha: 8 -> 64"),
        ({"r": None}, r"r: 4 -> None"),
    ],
)
def test_an_edited_adapter_config_is_refused(export: Path, change: dict[str, Any], message: str):
    edit(export / "adapter" / "adapter_config.json", **change)
    with pytest.raises(CheckpointError, match=message):
        load(export)


def test_an_adapter_of_another_rank_is_refused_tensor_by_tensor(export: Path):
    path = export / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t[:2].contiguous() if "lora_A" in n else t[:, :2].contiguous() for n, t in tensors.items()}, path)
    with pytest.raises(CheckpointError, match=r"lora_A\.weight: \[2, 32\] -> \[4, 32\]"):
        load(export)


def test_a_missing_adapter_tensor_is_named(export: Path):
    path = export / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"{name.removeprefix('base_model.model.')}: missing"):
        load(export)


def test_missing_projector_statistics_are_named(export: Path):
    path = export / "projector.safetensors"
    tensors = load_file(path)
    del tensors["projector.feature_std"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"feature_std"):
        load(export)


@pytest.mark.parametrize("damage", [b"", b"not a tensor file", None])
def test_a_damaged_weight_file_is_named(export: Path, damage: bytes | None):
    path = export / "projector.safetensors"
    path.write_bytes(path.read_bytes()[:-7] if damage is None else damage)
    with pytest.raises(CheckpointError, match=r"projector\.safetensors is damaged"):
        load(export)


def test_a_pickle_in_the_place_of_weights_is_never_opened(export: Path, tmp_path: Path):
    class Harmful:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harm",)

    torch.save({"projector.layers.0.weight": Harmful()}, export / "projector.safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        load(export)
    assert not (tmp_path / "harm").exists()


def test_a_newer_format_names_the_version_that_wrote_it(export: Path):
    edit(export / "vlm.json", format_version=99, vlm_version="9.9")
    with pytest.raises(CheckpointError, match=r"format version 99, this program reads up to 1.*vlm 9\.9"):
        load(export)


def test_an_older_format_without_a_way_is_refused_and_one_with_a_way_is_migrated(
    export: Path, monkeypatch: pytest.MonkeyPatch
):
    from vlm.artifacts import manifest

    edit(export / "vlm.json", format_version=0, chat_template="chatml")
    values = json.loads((export / "vlm.json").read_text())
    del values["template"]
    (export / "vlm.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="format version 0"):
        load(export)
    monkeypatch.setitem(manifest._MIGRATIONS, 0, lambda old: {**old, "template": old["chat_template"]})
    assert load(export, "cpu", "fp32").template.name == "chatml"


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "gguf"}', '{"format": "vlm"}', "[" * 100_000])
def test_an_unreadable_description_is_an_error_with_its_place(export: Path, text: str):
    (export / "vlm.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"vlm\.json"):
        load(export)


def test_code_beside_the_weights_is_never_run(export: Path, tmp_path: Path):
    """Custom code named in config files of the export, and a base model that brings its own."""
    (export / "evil.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')")
    edit(export / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    load(export, "cpu", "fp32")
    assert not (tmp_path / "harm").exists()


def test_a_gpu_where_there_is_none_is_refused(export: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no GPU"):
        load(export, device="cuda")
