"""Language models: packed rows, foreign code, pickled weights, tokenizers and vocabularies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import WORDS, write_llm, write_tokenizer
from toy_decoders import toy_decoder

from vlm.errors import CheckpointError, ConfigError
from vlm.models import llm as llm_module
from vlm.models.build import build_model
from vlm.models.config import LLMConfig, ModelConfig
from vlm.models.decoders import find_linears
from vlm.models.llm import (
    IMAGE_TOKEN,
    choose_attention,
    enable_gradient_checkpointing,
    keep_blocks_still,
    load_llm,
    load_tokenizer,
    pad_vocabulary,
)
from vlm.models.vlm import VisionLanguageModel

# packing


def positions(*lengths: int) -> torch.Tensor:
    """[1, L], restarting with every example.

    >>> positions(3, 2).tolist()
    [[0, 1, 2, 0, 1]]
    """
    return torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("attention", ["eager", "sdpa", "varlen"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "internlm3", "gemma"])
@pytest.mark.parametrize("training", [True, False])
def test_examples_of_a_packed_row_do_not_see_each_other(tmp_path: Path, family: str, attention: str, training: bool):
    path = write_llm(tmp_path / family, family)
    llm = load_llm(LLMConfig(path=str(path), attention=attention), torch.float32)
    model = VisionLanguageModel(llm).train(training)
    torch.manual_seed(0)
    rows = torch.randint(2, 28, (2, 12))
    places = torch.cat([positions(5, 4, 3), positions(2, 8, 1, 1)])  # the last two of row 1 are padding
    packed = model(rows, places)
    for row, lengths in enumerate([(5, 4, 3), (2, 8, 1)]):
        start = 0
        for length in lengths:
            one = rows[row : row + 1, start : start + length]
            alone = model(one, positions(length))
            assert (packed[row, start : start + length] - alone[0]).abs().max() < 1e-5  # worst seen: 2.6e-6
            start += length
    together = model(rows, torch.arange(12).expand(2, 12))
    assert (together[0, 5:] - packed[0, 5:]).abs().max() > 0.1  # so the comparison can fail


def test_rows_lie_end_to_end_for_flash_attention(tmp_path: Path):
    """FlashAttention honours restarts in a batch of one row only; end to end, any attention gives the same."""
    llm = load_llm(LLMConfig(path=str(write_llm(tmp_path / "llama"))), torch.float32)
    model = VisionLanguageModel(llm)
    rows, places = torch.randint(2, 28, (2, 6)), torch.cat([positions(4, 2), positions(3, 3)])
    two_rows = model(rows, places)
    shapes = []
    llm.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape)), with_kwargs=True
    )
    llm.config._attn_implementation_internal = "sdpa"  # what the layers run
    flash = _ReportsFlash(llm.config)
    model.llm.config = flash
    one_row = model(rows, places)
    assert shapes == [(1, 12, 32)]
    assert one_row.shape == (2, 6, 32)
    assert (one_row - two_rows).abs().max() < 1e-5  # worst seen: 1.1e-6


class _ReportsFlash:
    """The language model's own config sees FlashAttention; its layers hold the real config."""

    def __init__(self, config: object) -> None:
        self._config = config

    def __getattr__(self, name: str) -> object:
        return "flash_attention_2" if name == "_attn_implementation" else getattr(self._config, name)


def test_attention_is_chosen_by_device(monkeypatch: pytest.MonkeyPatch):
    assert choose_attention("auto", "cpu") is None
    assert choose_attention("varlen", "cpu") is None
    assert choose_attention("eager", "cpu") == "eager"
    with pytest.raises(ConfigError, match="flex_attention has no backward pass on the CPU"):
        choose_attention("flex_attention", "cpu")
    with pytest.raises(ConfigError, match="needs the package flash-attn"):
        choose_attention("flash_attention_2", "cuda:0")
    monkeypatch.setattr(llm_module.importlib.util, "find_spec", lambda name: object())
    assert choose_attention("auto", "cuda:0") == "flash_attention_2"
    assert choose_attention("auto", "cpu") is None
    with pytest.raises(ConfigError, match="needs a GPU"):
        choose_attention("flash_attention_2", "cpu")


def test_gradient_checkpointing_changes_no_gradient(llm: Path):
    def gradient(checkpointing: bool) -> torch.Tensor:
        config = {"llm": {"path": str(llm)}, "trainable": ["llm"], "gradient_checkpointing": checkpointing}
        model = build_model(ModelConfig.model_validate(config)).model.train()
        model.logits(model(torch.arange(2, 14)[None], positions(7, 5)))[..., 3].sum().backward()
        return model.llm.model.layers[0].mlp.up_proj.weight.grad

    plain = gradient(False)
    assert plain.abs().max() > 0.01
    assert (plain - gradient(True)).abs().max() == 0


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5}),
        ("opt", {"dropout": 0.5}),
        ("xglm", {"dropout": 0.5}),
        ("biogpt", {"hidden_dropout_prob": 0.5}),
        ("falcon", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
    ],
)
def test_a_frozen_model_drops_nothing_although_its_blocks_recompute(kind: str, changes: dict[str, float]):
    """Some classes drop out in the block's own forward, or the model's, and recompute in training mode only."""
    llm = toy_decoder(kind, **changes).requires_grad_(False)
    model = VisionLanguageModel(llm)
    enable_gradient_checkpointing(llm)
    keep_blocks_still(llm)
    words, places = model.embed(torch.arange(3, 11)[None]).requires_grad_(), torch.arange(8)[None]
    expected = model.eval().decode(words, places)
    calls: list[int] = []
    find_linears(llm)[next(iter(find_linears(llm)))].register_forward_hook(lambda *_: calls.append(1))
    states = model.train().decode(words, places)
    assert torch.equal(states, expected)
    states.sum().backward()
    assert len(calls) == 2  # once more in the backward pass


# what is refused


def write_foreign(folder: Path, marker: Path, model_type: str) -> Path:
    """A model folder whose Python files leave a marker when they run."""
    write_llm(folder)
    code = f"open({str(marker)!r}, 'w').write('ran')\n"
    (folder / "configuration_own.py").write_text(
        code + "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        code
        + "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        + "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = model_type
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies foreign code into a folder; keep that inside the test's."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_a_folder_that_needs_its_own_code_is_refused_and_the_code_does_not_run(tmp_path: Path):
    marker = tmp_path / "marker"
    folder = write_foreign(tmp_path / "own", marker, "own")
    with pytest.raises(CheckpointError, match=r"asks to run its own code \(auto_map\)\. Refused"):
        load_llm(LLMConfig(path=str(folder)), torch.float32)
    with pytest.raises(CheckpointError):
        build_model(ModelConfig.model_validate({"llm": {"path": str(folder)}, "trainable": ["llm"]}))
    assert not marker.exists()


def test_a_native_model_with_code_beside_it_loads_and_the_code_does_not_run(tmp_path: Path):
    marker = tmp_path / "marker"
    folder = write_foreign(tmp_path / "own", marker, "llama")
    assert type(load_llm(LLMConfig(path=str(folder)), torch.float32)).__name__ == "LlamaForCausalLM"
    load_tokenizer(str(folder))
    assert not marker.exists()


@pytest.mark.usefixtures("own_modules")
def test_trusted_code_runs_and_the_log_says_so(tmp_path: Path, capsys: pytest.CaptureFixture):
    marker = tmp_path / "marker"
    folder = write_foreign(tmp_path / "own", marker, "own")
    llm = load_llm(LLMConfig(path=str(folder)), torch.float32, trust_remote_code=True)
    assert type(llm).__name__ == "OwnForCausalLM"
    assert marker.read_text() == "ran"
    assert f"RUNNING THE PYTHON CODE of {folder}" in capsys.readouterr().err


def test_a_tokenizer_with_its_own_code_is_refused(tmp_path: Path):
    folder = write_llm(tmp_path / "llm")
    marker = tmp_path / "marker"
    (folder / "tokenization_own.py").write_text(f"open({str(marker)!r}, 'w').write('ran')\nclass Own: ...\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="cannot load its tokenizer"):
        load_tokenizer(str(folder))
    assert not marker.exists()


def test_pickled_weights_are_refused_with_the_step_that_converts_them(llm: Path):
    torch.save(load_file(llm / "model.safetensors"), llm / "pytorch_model.bin")
    (llm / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"no \.safetensors.*convert them once with transformers' save_pretrained"
    ):
        load_llm(LLMConfig(path=str(llm)), torch.float32)


def test_weights_that_lack_a_tensor_are_refused_instead_of_being_filled_with_random_ones(llm: Path):
    tensors = load_file(llm / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, llm / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 tensors of LlamaForCausalLM, e\.g\. model\.layers\.1\.mlp\.up"):
        load_llm(LLMConfig(path=str(llm)), torch.float32)


def test_a_damaged_file_and_a_missing_folder_are_checkpoint_errors(llm: Path, tmp_path: Path):
    file = llm / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot load its weights"):
        load_llm(LLMConfig(path=str(llm)), torch.float32)
    with pytest.raises(CheckpointError, match=r"model\.llm\.path: .*/nowhere does not exist\."):
        load_llm(LLMConfig(path=str(tmp_path / "nowhere")), torch.float32)


# tokenizer and vocabulary


def test_the_tokenizer_gains_a_placeholder_without_a_row_in_the_embedding(llm: Path):
    tokenizer = load_tokenizer(str(llm))
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == len(WORDS) == 28
    assert tokenizer.encode("a <image> b", add_special_tokens=False) == [2, 28, 3]
    tokenizer.save_pretrained(llm)
    assert len(load_tokenizer(str(llm))) == 29  # not added twice


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path: Path):
    write_llm(tmp_path)
    write_tokenizer(tmp_path, pad=False)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert len(tokenizer) == 29


@pytest.mark.parametrize("tied", [True, False])
def test_padded_rows_are_the_mean_of_the_real_ones(tmp_path: Path, tied: bool):
    path = write_llm(tmp_path / "llm", vocab_size=36, tie_word_embeddings=tied)  # 28 tokens, 8 rows of padding
    llm = load_llm(LLMConfig(path=str(path)), torch.float32)
    before = llm.get_input_embeddings().weight.detach().clone(), llm.get_output_embeddings().weight.detach().clone()
    pad_vocabulary(llm, num_real=28, multiple=32)
    after = llm.get_input_embeddings().weight, llm.get_output_embeddings().weight
    for old, new in zip(before, after, strict=True):
        assert new.shape == (64, 32)
        assert torch.equal(new[:36], old)  # the rows that were there stay, padding too
        assert torch.allclose(new[36:], old[:28].mean(0).expand(28, 32), atol=1e-7)
    assert (after[0] is after[1]) == tied
    assert llm.config.vocab_size == 64


def test_a_vocabulary_that_is_a_multiple_already_is_left_alone(llm: Path):
    built = build_model(ModelConfig.model_validate({"llm": {"path": str(llm), "pad_vocab_to_multiple_of": 4},
                                                    "trainable": ["llm"]}))  # fmt: skip
    assert built.model.llm.config.vocab_size == 28
