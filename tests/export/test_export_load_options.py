"""Loading with another adapter, another template, fewer bits, and over several memories."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tiny_export import model_config, write_image, write_llm, write_run
from torch import Tensor

from vlm.errors import CheckpointError, ConfigError, MissingPackageError
from vlm.export.run import export_run
from vlm.inference.load import LoadedModel, load
from vlm.models.trainable import add_lora, load_weights, merge_lora, part_weights

TEXT_ONLY = {"vision": None, "trainable": ["llm.lora"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("options")
    write_image(root / "cat.png")
    write_run(root / "plain", model_config(root, trainable=["projector"], lora=None))
    write_run(root / "own", model_config(root))
    write_run(root / "style", model_config(root, **TEXT_ONLY, lora={"rank": 2, "alpha": 6}), seed=5)
    for name in ("plain", "own", "style"):
        export_run(root / name)
    write_run(root / "further", model_config(root), init_from=root / "own" / "export", seed=6)
    export_run(root / "further")
    return root


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of width 64, the least that 4-bit weights on a CPU can have."""
    root = tmp_path_factory.mktemp("wide")
    write_llm(root / "llm", width=64)
    write_run(root / "own", model_config(root))
    export_run(root / "own")
    return root


def loaded(root: Path, name: str, **options: object) -> LoadedModel:
    return load(root / name / "export", device="cpu", precision="fp32", **options)  # type: ignore[arg-type]


def llm(model: LoadedModel) -> dict[str, Tensor]:
    return part_weights(model.model, "llm")


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)


@pytest.mark.slow
def test_an_adapter_is_folded_in_to_the_bit_as_peft_merges_it(root: Path):
    from vlm.artifacts.layouts import open_parts
    from vlm.artifacts.manifest import read_manifest

    model = loaded(root, "plain").model
    manifest = read_manifest(root / "style" / "export")
    assert manifest.model.lora is not None
    add_lora(model, manifest.model.lora)
    load_weights(model, open_parts(root / "style" / "export", manifest, manifest.model), "", partial=True)
    merge_lora(model)
    folded = loaded(root, "plain", adapter=root / "style" / "export")
    assert_equal(llm(folded), part_weights(model, "llm"))


def test_another_adapter_counts_beside_the_exports_own(root: Path):
    base, own = llm(loaded(root, "plain")), llm(loaded(root, "own"))
    style = llm(loaded(root, "plain", adapter=root / "style" / "export" / "adapter"))
    both = llm(loaded(root, "own", adapter=root / "style" / "export"))
    name = "llm.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(own[name], both[name])
    assert_equal(both, {n: own[n] + style[n] - base[n] for n in base}, tolerance=1e-5)  # worst seen 2e-7


def test_an_adapter_that_went_on_from_the_exports_own_replaces_it(root: Path):
    assert_equal(llm(loaded(root, "own", adapter=root / "further" / "export")), llm(loaded(root, "further")))
    assert_equal(llm(loaded(root, "own", adapter=root / "own" / "export")), llm(loaded(root, "own")))


@pytest.mark.slow
def test_a_full_export_takes_an_adapter_unless_one_is_merged_into_it(root: Path, tmp_path: Path):
    plain = export_run(root / "plain", tmp_path / "plain", full=True)
    model = load(plain, device="cpu", precision="fp32", adapter=root / "style" / "export")
    name = "llm.model.layers.0.mlp.up_proj.weight"  # the embedding has a row more: the placeholder's
    assert torch.equal(llm(model)[name], llm(loaded(root, "plain", adapter=root / "style" / "export"))[name])
    own = export_run(root / "own", tmp_path / "own", full=True)
    with pytest.raises(CheckpointError, match="a --full one with an adapter merged in"):
        load(own, device="cpu", adapter=root / "style" / "export")


def test_adapters_that_are_none_or_another_models_are_refused(root: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="has no LoRA adapter: it holds projector"):
        loaded(root, "own", adapter=root / "plain" / "export")
    with pytest.raises(CheckpointError, match="does not exist"):
        loaded(root, "own", adapter=root / "nowhere")
    write_llm(tmp_path / "llm", seed=9)
    write_run(tmp_path / "run", model_config(tmp_path, **TEXT_ONLY))
    with pytest.raises(CheckpointError, match="was trained beside another language model"):
        loaded(root, "own", adapter=export_run(tmp_path / "run"))


def test_another_template_is_used(root: Path):
    assert loaded(root, "own", template="vicuna").template.name == "vicuna"
    with pytest.raises(ConfigError, match=r"'vicunna' is not known; did you mean vicuna\?"):
        loaded(root, "own", template="vicunna")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.05), (4, 0.35)])  # worst seen 0.02 and 0.21
def test_fewer_bits_take_less_memory_and_answer_nearly_the_same(wide: Path, root: Path, bits: int, tolerance: float):
    whole, small = loaded(wide, "own"), loaded(wide, "own", bits=bits)

    def layer(model: LoadedModel) -> torch.nn.Module:
        return model.model.llm.model.layers[0].mlp.up_proj

    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = layer(whole)(x), layer(small)(x)
    assert ((got - expected).norm() / expected.norm()).item() < tolerance
    assert layer(small).weight.nbytes == layer(whole).weight.nbytes * bits // 32
    assert isinstance(small.chat("What is this?", [root / "cat.png"], max_new_tokens=4), str)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_layers_that_bitsandbytes_cannot_pack_for_the_cpu_stay_whole(root: Path):
    question = ("What is this?", [root / "cat.png"])  # width 32: nothing can be packed
    assert loaded(root, "own", bits=4).chat(*question, max_new_tokens=6) == loaded(root, "own").chat(
        *question, max_new_tokens=6
    )


def test_bits_without_bitsandbytes_name_the_extra(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vlm.models.quantize.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"\[quant\]"):
        loaded(root, "own", bits=4)


def test_without_a_gpu_a_device_map_is_all_cpu_and_answers_the_same(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    reply = loaded(root, "own", device_map="auto").chat("What is this?", [root / "cat.png"], max_new_tokens=6)
    assert reply == loaded(root, "own").chat("What is this?", [root / "cat.png"], max_new_tokens=6)


def test_what_fits_in_no_memory_is_read_from_the_offload_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = loaded(root, "own")
    half = sum(tensor.nbytes for tensor in whole.model.llm.parameters()) * 3 // 4
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {"cpu": half})
    with pytest.raises(ConfigError, match="Add --offload-folder DIR"):
        loaded(root, "own", device_map="auto")
    spread = loaded(root, "own", device_map="auto", offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in spread.model.llm.parameters())
    assert len(list((tmp_path / "offload").glob("*.dat"))) > 0
    question = ("What is this?", [root / "cat.png"])
    assert spread.chat(*question, max_new_tokens=6) == whole.chat(*question, max_new_tokens=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "in 4 or 8 bits"),
        ({"device_map": "balanced"}, "known is auto"),
        ({"offload_folder": "x"}, "add --device-map auto"),
        ({"precision": "fp64"}, "'fp64' is not known"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_read(options: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        load("nowhere", **{"device": "cpu", "precision": "fp32", **options})  # type: ignore[arg-type]


def test_progress_ends_at_one(root: Path):
    shares: list[float] = []
    loaded(root, "own", on_progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
