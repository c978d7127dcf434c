"""`vlm validate` opens the folders of models, and says what training would say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from model_folders import write_encoder_folder, write_llm_folder
from tokenizers_for_tests import sentencepiece_model

from vlm.config import RunConfig, load_config
from vlm.config_checks import load_checked, model_problems, run_notes
from vlm.errors import VLMError

CONFIG = """\
output_dir: runs/a
model:
  llm: {path: llm}
  vision: {backend: hf, path: clip}
data: {sources: [{path: a.json}]}
train: {epochs: 1}
"""


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model, an encoder and data, all as they should be."""
    monkeypatch.chdir(tmp_path)
    write_llm_folder("llm")
    write_encoder_folder("clip")
    Path("a.json").write_text("[]")
    Path("a.yaml").write_text(CONFIG)


def config(*options: str) -> RunConfig:
    return load_config("a.yaml", options)


def problems(*options: str) -> list[str]:
    return [f"{'.'.join(map(str, key))}: {text}" for key, text in model_problems(config(*options))]


def training_says(*options: str) -> str:
    """The message of loading the models, which a run does after `vlm validate` found nothing."""
    from vlm.models.build import build_model

    with pytest.raises(VLMError) as caught:
        build_model(config(*options).model)
    return str(caught.value)


def test_complete_folders_are_no_problem(vlm):
    assert problems() == []
    assert run_notes(config()) == []
    assert vlm("validate", "a.yaml") == (0, "a.yaml: valid\n", "")


def test_a_missing_tokenizer_is_a_problem_that_training_names_alike():
    Path("llm/tokenizer.json").unlink()
    reason = (
        "cannot load its tokenizer: the folder holds none (tokenizer.json, tokenizer.model, or vocab.json and "
        "merges.txt). Usually the download is incomplete, or the model was saved without its tokenizer"
    )
    assert problems() == [f"model.llm.path: llm: {reason}"]
    assert training_says() == f"model.llm.path llm: {reason}"


def test_pickled_weights_and_missing_shards_are_problems():
    Path("llm/model.safetensors").rename("llm/pytorch_model.bin")
    Path("clip/model.safetensors").unlink()
    (llm, clip) = problems()
    assert llm.startswith("model.llm.path: llm: cannot load its weights: the folder holds no .safetensors. Pickled")
    assert clip.startswith(
        "model.vision.path: clip: cannot load its weights: the folder holds no .safetensors. Pickled"
    )
    Path("llm/model-00001-of-00002.safetensors").touch()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    Path("llm/model.safetensors.index.json").write_text(json.dumps(index))
    assert problems()[0].endswith(
        "model.safetensors.index.json names ['model-00002-of-00002.safetensors'], which are not there. Usually the "
        "download is incomplete"
    )


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"model_type": "internlm2", "auto_map": {}}, "asks to run its own code (auto_map). Refused. Take a model of"),
        ({"model_type": "of_nobody"}, "'of_nobody' is not one that transformers"),
        ({"model_type": "qwen2_vl", "architectures": []}, "qwen2_vl is of no language model that transformers has"),
    ],
)
def test_model_types_that_transformers_does_not_load_are_problems(settings: dict[str, object], part: str):
    write_llm_folder("llm", **settings)
    (problem,) = problems()
    assert part in problem
    if settings["model_type"] != "qwen2_vl":  # training names the class of its config
        from vlm.models.llm import refuse_foreign_code

        with pytest.raises(VLMError) as caught:
            refuse_foreign_code("llm", False)
        assert str(caught.value).removeprefix("model.llm.path llm: ") in problem


def test_code_that_is_trusted_is_not_looked_into():
    write_llm_folder("llm", model_type="own", auto_map={"AutoConfig": "x.X"})
    assert len(problems()) == 1
    assert problems("model.trust_remote_code=true") == []


def test_an_encoder_of_another_type_is_a_problem_and_a_missing_preprocessor_a_note(capsys: pytest.CaptureFixture[str]):
    write_encoder_folder("clip", model_type="vit")
    (problem,) = problems()
    assert problem.startswith("model.vision.path: clip: model type 'vit' is no encoder known here; known: clip_vision_")
    write_encoder_folder("clip", model_type="clip", vision_config={"model_type": "clip_vision_model"})
    assert problems() == []
    Path("clip/preprocessor_config.json").unlink()
    (note,) = run_notes(config())
    assert note.startswith("model.vision.path clip: the folder holds no preprocessor_config.json, so images are norm")


def test_training_warns_of_the_missing_preprocessor_in_the_same_words(capsys: pytest.CaptureFixture[str]):
    from tiny_export import write_clip

    from vlm.models.vision import build_vision

    write_clip(Path("clip"))
    Path("clip/preprocessor_config.json").unlink()
    build_vision(config().model.vision)
    assert run_notes(config())[0] in capsys.readouterr().err.replace("\n", " ")


def test_a_template_whose_words_are_no_tokens_is_a_problem_or_a_note(vlm):
    write_llm_folder("llm", ["a", "b", "<|im_end|>"])
    assert problems() == []
    note = "data.template chatml: <|im_start|> is no single token of this tokenizer. Usually the template belongs to"
    assert run_notes(config())[0].startswith(note)
    assert vlm("validate", "a.yaml")[1].startswith(f"note: {note}")
    write_llm_folder("llm", ["a", "b", "c"])
    (problem,) = problems()
    assert problem.startswith(
        "data.template: template chatml ends replies with <|im_end|>, which is no token of this tokenizer"
    )
    assert problems("data.template=vicuna") == []  # ends with the tokenizer's own end token
    Path("llm/tokenizer_config.json").write_text('{"eos_token": null}')
    assert problems("data.template=vicuna")[0].endswith("ends replies with the tokenizer's end token; it has none")
    assert "this tokenizer has no chat template" in problems("data.template=tokenizer")[0]
    Path("llm/chat_template.jinja").write_text("x")
    assert problems("data.template=tokenizer") == []


def test_tokens_without_a_row_in_the_embedding_are_a_problem():
    write_llm_folder("llm", rows=3)
    (problem,) = problems()
    assert problem.startswith(
        "model.llm.path: llm: its embedding has 3 rows, and its tokenizer gives larger ids: <|im_end|> (3). Usually"
    )
    write_llm_folder("llm", rows=1)
    assert "its tokenizer has 2 tokens, its embedding 1 rows" in problems()[0]
    assert problems("model.llm.pad_vocab_to_multiple_of=8") == []


def test_training_refuses_tokens_without_a_row_in_the_same_words():
    from tiny_export import write_llm

    rows = json.loads((write_llm(Path("real")) / "config.json").read_text())["vocab_size"]
    backend = json.loads(Path("real/tokenizer.json").read_text())
    backend["model"]["vocab"] |= {f"more{number}": rows + number for number in range(5)}
    Path("real/tokenizer.json").write_text(json.dumps(backend))
    options = ("model.llm.path=real", "model.vision=null", "model.trainable=[llm]")
    reason = f"its tokenizer has {rows + 5} tokens, its embedding {rows} rows. Usually tokens were added"
    assert training_says(*options).startswith(f"model.llm.path real: {reason}")
    assert problems(*options) == [training_says(*options).replace("model.llm.path real", "model.llm.path: real")]


def test_a_sentencepiece_vocabulary_is_read_and_a_damaged_one_named(tmp_path: Path):
    Path("llm/tokenizer.json").unlink()
    Path("llm/tokenizer.model").write_bytes(sentencepiece_model())
    Path("llm/tokenizer_config.json").write_text("{}")
    (problem,) = problems("data.template=vicuna")
    assert "its tokenizer has 420 tokens, its embedding 4 rows" in problem
    Path("llm/tokenizer.model").write_bytes(b"\x00damaged")
    (problem,) = problems("data.template=vicuna")
    assert "tokenizer.model is neither a SentencePiece model nor a tiktoken vocabulary" in problem


def test_plan_reads_config_json_alone(vlm):
    Path("llm/tokenizer.json").unlink()
    Path("llm/model.safetensors").unlink()
    assert model_problems(config(), ()) == []
    load_checked("a.yaml", (), ("model",), ())
    assert vlm("validate", "a.yaml")[0] == 2


@pytest.mark.slow
def test_validate_imports_no_torch_and_is_quick_with_a_real_vocabularys_size():
    """150,000 tokens, as Qwen's: 0.3 s more than starting vlm (0.25 s). Processor time, as others may use the cores."""
    words = [f"token{number:012d}" for number in range(150_000)]
    write_llm_folder("llm", [*words, "<|im_start|>", "<|im_end|>"], rows=151_936)
    code = (
        "import sys, time; from vlm.cli.main import main; start = time.process_time()\n"
        "try: main(['validate', 'a.yaml'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules), time.process_time() - start)"
    )
    best = 9.0
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "a.yaml: valid\nset() " in done.stdout
        best = min(best, float(done.stdout.split()[-1]))
    assert best < 0.7
