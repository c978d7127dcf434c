"""Every way of tuning, from training to plain transformers and peft: the matrix of docs/tuning.md."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from prove_engines import Case, run_cases, worst_differences
from tiny_export import write_clip, write_image, write_llm
from toy_runs import start_warm

import vlm.run
from vlm.artifacts.initial import load_init
from vlm.artifacts.peft_adapter import read_peft
from vlm.blame import blame_step
from vlm.config import load_config
from vlm.data.build import build_conversation_tokenizer, build_reader
from vlm.data.scan import scan_records
from vlm.errors import CheckpointError, ConfigError
from vlm.export.merge import merge_folder
from vlm.export.run import export_run
from vlm.inference.load import load
from vlm.models.build import build_model
from vlm.models.config import QuantizationConfig
from vlm.models.llm import load_tokenizer
from vlm.models.trainable import load_weights, part_of
from vlm.plan.records import read_some
from vlm.run import train
from vlm.train.checkpoint import checkpoint_of, newest_verified
from vlm.train.fragments import read_weights

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
LORA = {"rank": 4, "alpha": 8}
IDS = torch.tensor([[5, 17, 42, 99, 7, 300, 11, 64]])
COLOURS = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))  # of an image, 16 tokens
# method -> settings of `model`; of a VLM the projector trains too
METHODS = {
    "full": {"trainable": ["llm"]},
    "last block": {"trainable": ["llm"], "partial": {"llm": {"last_blocks": 1}}},
    "named modules": {"trainable": ["llm"], "partial": {"llm": {"modules": ["*.layers.0.mlp", "lm_head"]}}},
    "lora": {"trainable": ["llm.lora"], "lora": LORA},
    "rslora, dropout, targets": {
        "trainable": ["llm.lora"],
        "lora": {**LORA, "dropout": 0.1, "rslora": True, "targets": ["q_proj", "*.1.mlp.*"]},
    },
    "dora": {"trainable": ["llm.lora"], "lora": {**LORA, "dora": True}},
    "modules_to_save": {"trainable": ["llm.lora"], "lora": {**LORA, "modules_to_save": ["lm_head"]}},
    "qlora nf4": {"trainable": ["llm.lora"], "lora": LORA, "quantization": {"format": "nf4"}},
    "qlora fp4, dora": {
        "trainable": ["llm.lora"], "lora": {**LORA, "dora": True}, "quantization": {"format": "fp4", "double": False}
    },
    "qlora int8": {"trainable": ["llm.lora"], "lora": LORA, "quantization": {"format": "int8"}},
    "encoder lora": {"trainable": ["llm.lora", "vision.lora"], "lora": LORA, "vision_lora": {"rank": 2, "alpha": 4}},
    "first block, encoder's last": {
        "trainable": ["llm", "vision"], "partial": {"llm": {"first_blocks": 1}, "vision": {"last_blocks": 1}}
    },
}  # fmt: skip
BOUND = 1e-4  # of the logits' norm
# who computes the logits of the model that trained; beside the bound the worst seen in all cells
BOUNDS = {
    "transformers, full export": 2e-5,  # 2.1e-6
    "vlm.load, export": 2e-5,  # 2.1e-6
    "peft, adapter": 1e-5,  # 0
    "transformers, vlm merge": 2e-5,  # 2.1e-6
    "vlm.load, base and adapter": 2e-5,  # 2.1e-6
}
CELLS = [
    (what, method)
    for what in ("pt of an LLM", "sft of an LLM", "pt of a VLM", "sft of a VLM")
    for method in METHODS
    if what.endswith("VLM") or "encoder" not in method
]


@pytest.fixture(autouse=True)
def lean(monkeypatch):
    """Without loss.png and without the memory plan in the log: other tests read them."""
    monkeypatch.setattr("vlm.run._plot", lambda *_: None)
    monkeypatch.setattr("vlm.prepare._tell_plan", lambda *_: "")


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toys")
    write_llm(root / "llm", width=64, tied=False)
    write_clip(root / "clip")
    (root / "book.txt").write_text("".join(f"What is this? A red square {n}. It is a bird.\n" for n in range(40)))
    records = []
    for number in range(8):
        write_image(root / f"{number}.png", seed=number)
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A red square."}]
        records.append({"image": f"{number}.png", "conversations": turns})
    (root / "records.json").write_text(json.dumps(records))
    pairs = [{"instruction": f"What is this? {n}", "output": "A red square."} for n in range(8)]
    (root / "pairs.json").write_text(json.dumps(pairs))
    return root


def config_of(toys: Path, run: Path, what: str, method: dict, **train_settings) -> Path:
    values = {**method}
    llm = {"path": str(toys / "llm"), "quantization": values.pop("quantization", None)}
    is_vlm = what.endswith("VLM")
    vision = {"backend": "hf", "path": str(toys / "clip"), "layer": -2} if is_vlm else None
    values["trainable"] = (["projector"] if is_vlm else []) + values["trainable"]
    is_pt = what.startswith("pt")
    source = "records.json" if is_vlm else "book.txt" if is_pt else "pairs.json"
    settings = {
        "output_dir": str(run),
        "model": {"vision": vision, "llm": llm, **values},
        "data": {
            "template": "plain" if is_pt else "chatml", "max_length": 64, "cache": str(toys / "cache"),
            "sources": [{"path": str(toys / source)}],
        },
        "train": {
            "max_steps": 2, "global_batch_size": 2, "micro_batch_size": 2, "learning_rate": 0.02, "precision": "fp32",
            "schedule": "constant", "save_every": 1, "prove": False, **train_settings,
        },
        "engine": {"kind": "local", "device": "cpu"},
    }  # fmt: skip
    path = run.parent / f"{run.name}.yaml"
    path.write_text(json.dumps(settings))
    return path


def trained(path: Path) -> Path:
    return train(load_config(path), path.read_text())


@pytest.fixture
def train_and_keep(monkeypatch):
    """`trained` that returns the model itself, packed where it was."""
    train_on, kept = vlm.run._train_on, []

    def keep(parts, *rest):
        kept.append(parts.built)
        return train_on(parts, *rest)

    def train_as(path: Path):
        with monkeypatch.context() as patch:
            patch.setattr("vlm.run._train_on", keep)
            trained(path)
        built = kept.pop()
        built.model.eval()
        return built

    return train_as


def weights(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    return read_weights(newest_verified(run) if step is None else checkpoint_of(run, step))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.logits(model(IDS, torch.arange(IDS.shape[1])[None]))


def about_image(image_token_id: int, mean, std) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with placeholders, and the pixels of an image as a model wants them."""
    ids = torch.cat([torch.full((1, 16), image_token_id), IDS], 1)
    return ids, (COLOURS - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@torch.no_grad()
def answers(model, spec) -> list[torch.Tensor]:
    """The logits of a text and, of a VLM, of an image and a text."""
    if model.vision is None:
        return [logits(model)]
    ids, pixels = about_image(model.image_token_id, spec.mean, spec.std)
    return [logits(model), model.logits(model(ids, torch.arange(ids.shape[1])[None], pixels))]


@torch.no_grad()
def by_transformers(folder: Path, is_vlm: bool = False) -> list[torch.Tensor]:
    """Of a folder that holds one model, read by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    if not is_vlm:
        return [model(IDS).logits]
    spec = json.loads((folder / "preprocessor_config.json").read_text())
    ids, pixels = about_image(model.config.image_token_id, spec["image_mean"], spec["image_std"])
    return [model(IDS).logits, model(input_ids=ids, pixel_values=pixels).logits]


@torch.no_grad()
def by_peft(toys: Path, folder: Path, quantization: dict | None = None) -> list[torch.Tensor]:
    """The adapter of an export, read by peft on the base model, packed by transformers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    packing = None
    if quantization is not None:
        packing = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization["format"],
            bnb_4bit_use_double_quant=quantization.get("double", True),
            bnb_4bit_compute_dtype=torch.float32,
        )
    base = AutoModelForCausalLM.from_pretrained(toys / "llm", dtype=torch.float32, quantization_config=packing)
    return [PeftModel.from_pretrained(base, folder / "adapter").eval()(IDS).logits]


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    found = found[..., : expected.shape[-1]]  # LLaVA's layout has rows more, of which one is the placeholder
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.one_in(5)
@pytest.mark.slow
@pytest.mark.parametrize(("what", "method"), CELLS, ids=[f"{what}: {method}" for what, method in CELLS])
def test_a_method_trains_resumes_exports_merges_and_computes_the_same_in_transformers_and_peft(
    toys, tmp_path, train_and_keep, record_property, what, method
):
    settings, is_vlm = METHODS[method], what.endswith("VLM")
    quantization = settings.get("quantization")
    if quantization is not None:
        pytest.importorskip("bitsandbytes")
    path = config_of(toys, tmp_path / "run", what, settings)
    run = trained(path)
    final, before = weights(run), weights(run, step=1)
    assert {part_of(name) for name in final} == set(load_config(path).model.trainable)  # QLoRA: without the base
    assert [name for name in final if torch.equal(final[name], before[name]) and "feature_" not in name] == []
    shutil.rmtree(checkpoint_of(run, 2))  # as if killed before the last step
    built = train_and_keep(path)
    assert all(torch.equal(tensor, final[name]) for name, tensor in weights(run).items())
    expected = answers(built.model, built.image_spec)
    export, full = export_run(run), export_run(run, full=True, dtype="fp32")
    loaded = load(export, device="cpu", precision="fp32")
    found = {
        "transformers, full export": by_transformers(full, is_vlm),
        "vlm.load, export": answers(loaded.model, loaded.image_spec),
    }
    if "llm.lora" in settings["trainable"]:
        merged = merge_folder(toys / "llm", [read_peft(export)], tmp_path / "merged", dtype="fp32")
        found["transformers, vlm merge"] = by_transformers(merged)
        chatted = load(toys / "llm", device="cpu", precision="fp32", adapter=export, template="chatml").model
        found["vlm.load, base and adapter"] = [logits(chatted)]
        if quantization is None or quantization["format"] != "int8":  # transformers' rounds inputs too
            found["peft, adapter"] = by_peft(toys, export, quantization)
    differences = {who: max(map(apart, said, expected)) for who, said in found.items()}
    for who, difference in differences.items():
        record_property(who, difference)  # pytest --junitxml=FILE keeps them
    assert {who: value for who, value in differences.items() if value >= BOUNDS[who]} == {}


def part_of_step(run: Path, step: int, part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(run, step).items() if part_of(name) == part}


@pytest.mark.slow
def test_a_part_stands_still_until_its_step_and_a_resume_goes_on_so(toys, tmp_path):
    method = METHODS["lora"]
    path = config_of(toys, tmp_path / "run", "sft of a VLM", method, thaw={"llm.lora": 2}, max_steps=3)
    run = trained(path)
    before, after = (part_of_step(run, step, "llm.lora") for step in (2, 3))
    assert all(not tensor.any() for name, tensor in before.items() if "lora_B" in name)  # as an adapter starts
    assert all(tensor.any() for name, tensor in after.items() if "lora_B" in name)
    for step in (1, 3):  # from right before it: the norm is of what trains in it
        blame = blame_step(load_config(path), step)
        assert blame.from_step == step - 1
        assert blame.grad_norm == pytest.approx(blame.told_grad_norm, rel=1e-5)
    final = weights(run)
    shutil.rmtree(checkpoint_of(run, 3))
    trained(path)
    assert all(torch.equal(tensor, final[name]) for name, tensor in weights(run).items())


@pytest.mark.slow
def test_another_adapter_starts_on_the_sum_that_a_full_export_wrote_and_on_no_adapter(toys, tmp_path):
    first = trained(config_of(toys, tmp_path / "first", "sft of a VLM", METHODS["lora"]))
    export, full = export_run(first), export_run(first, full=True, dtype="fp32", layout="vlm")
    wider = {**METHODS["lora"], "lora": {"rank": 8, "alpha": 32}}
    config = load_config(config_of(toys, tmp_path / "second", "sft of a VLM", wider)).model
    model = build_model(config).model
    with pytest.raises(
        CheckpointError, match=r"model.lora.rank: 4 -> 8\n(.|\n)*`vlm export RUN FOLDER --full --layout vlm`"
    ):
        load_init(model, config, export)
    load_init(model, config, full)
    before = logits(load(export, device="cpu", precision="fp32").model)
    assert apart(logits(model.eval()), before) < 2e-5
    second = config_of(toys, tmp_path / "second", "sft of a VLM", wider)
    second.write_text(json.dumps(json.loads(second.read_text()) | {"init_from": str(full)}))
    again = logits(load(export_run(trained(second)), device="cpu", precision="fp32").model)
    assert apart(again, before) > 1e-3  # it trained, and its export stands by itself


@pytest.mark.slow
@needs_bitsandbytes
def test_an_adapter_goes_on_beside_packed_weights_and_is_not_merged_into_them(toys, tmp_path):
    first = trained(config_of(toys, tmp_path / "first", "sft of a VLM", METHODS["qlora nf4"]))
    export = export_run(first)
    config = load_config(config_of(toys, tmp_path / "second", "sft of a VLM", METHODS["qlora nf4"])).model
    model = build_model(config).model
    load_init(model, config, export)
    assert apart(logits(model.eval()), logits(load(export, device="cpu", precision="fp32").model)) < 1e-4
    other = config.model_copy(update={"trainable": ("projector",), "lora": None})
    with pytest.raises(CheckpointError, match="cannot be merged into a layer that is packed"):
        load_init(build_model(other).model, other, export)


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.parametrize("method", ["qlora nf4", "qlora int8"])
def test_the_proof_before_the_first_step_holds_with_packed_weights(toys, tmp_path, method):
    run = trained(config_of(toys, tmp_path / "run", "sft of a VLM", METHODS[method], prove=True, max_steps=1))
    checks = json.loads((run / "proof.json").read_text())["checks"]
    assert len([check for check in checks if check["passed"]]) > 12


@pytest.mark.thorough
@pytest.mark.slow
@needs_bitsandbytes
def test_engines_that_spread_weights_keep_packed_ones_whole_and_train_as_one_process_does(toys, tmp_path):
    """Worst seen: loss 3e-7, norm 3e-7, weights 1e-9."""
    steps = {"global_batch_size": 4, "learning_rate": 3e-3}
    path = config_of(toys, tmp_path / "run", "sft of a VLM", METHODS["qlora nf4"], **steps)
    int8 = 'model.llm.quantization={"format": "int8"}'
    groups = [[Case(each, option) for each in ("local", "zero3*2", "fsdp*2")] for option in ((), (int8,))]
    outcomes = run_cases(str(path), [case for group in groups for case in group], 3, tmp_path, start_warm)
    for first, *others in groups:
        for case in others:
            found = worst_differences(outcomes[first], outcomes[case])
            assert all(value <= bound for value, bound in zip(found, (1e-5, 1e-5, 5e-6), strict=True)), (case, found)


@pytest.mark.parametrize(
    ("engine", "settings", "train_settings", "said"),
    [
        ({"kind": "pipeline"}, METHODS["qlora nf4"], {}, "model.llm.quantization needs the whole base model"),
        ({"kind": "zero", "stage": 3}, METHODS["dora"], {}, "model.lora.dora needs the whole base model"),
        ({"kind": "fsdp"}, METHODS["dora"], {}, "model.lora.dora needs the whole base model"),
        ({"kind": "pipeline"}, METHODS["modules_to_save"], {}, "model.lora.modules_to_save needs the whole base model"),
        ({"kind": "zero", "stage": 2}, METHODS["lora"], {"thaw": {"llm.lora": 5}}, "set engine.kind to local, ddp or"),
        ({"kind": "local"}, METHODS["lora"], {"thaw": {"vision": 5}}, "names vision, which model.trainable does not"),
        ({"kind": "local"}, {**METHODS["full"], "quantization": {}}, {}, "packed weights cannot train"),
        (
            {"kind": "local"},
            {**METHODS["lora"], "partial": {"llm": {"last_blocks": 1}}},
            {},
            "names llm, but trainable",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, engine, settings, train_settings, said):
    path = config_of(tmp_path, tmp_path / "run", "sft of a VLM", settings, **train_settings)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"engine": engine}))
    with pytest.raises(ConfigError, match=said):
        load_config(path)


@pytest.mark.slow
def test_adapters_that_start_from_replaced_weights_change_nothing_at_first(toys, tmp_path):
    """DoRA's lengths and the copies of saved modules are those of the weights that init_from brings."""
    export = export_run(trained(config_of(toys, tmp_path / "first", "pt of an LLM", METHODS["full"])))
    lora = {**LORA, "dora": True, "modules_to_save": ["lm_head"]}
    path = config_of(toys, tmp_path / "second", "pt of an LLM", {"trainable": ["llm.lora"], "lora": lora})
    config = load_config(path).model
    model = build_model(config).model
    load_init(model, config, export)
    assert apart(logits(model.eval()), logits(load(export, device="cpu", precision="fp32").model)) < BOUND
    packed = config.model_copy(update={"llm": config.llm.model_copy(update={"quantization": QuantizationConfig()})})
    with pytest.raises(CheckpointError, match="brings a language model of its own"):
        load_init(model, packed, export)


@pytest.mark.slow
def test_some_of_a_language_model_trains_on_an_adapter_that_init_from_brings(toys, tmp_path):
    """The export is the base with the adapter, and over it what trained."""
    export = export_run(trained(config_of(toys, tmp_path / "first", "sft of a VLM", METHODS["lora"])))
    path = config_of(toys, tmp_path / "second", "sft of a VLM", METHODS["last block"])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_from": str(export)}))
    run = trained(path)
    config = load_config(path).model
    model = build_model(config).model
    load_init(model, config, export)
    load_weights(model, weights(run), str(run))
    expected = logits(model.eval())
    second, full = export_run(run), export_run(run, full=True, dtype="fp32")
    assert apart(logits(load(second, device="cpu", precision="fp32").model), expected) < BOUND
    assert apart(by_transformers(full, is_vlm=True)[0], expected) < BOUND
    assert not (second / "adapter").exists()


@pytest.mark.slow
def test_a_plan_counts_the_pieces_of_a_long_text(toys, tmp_path):
    config = load_config(config_of(toys, tmp_path / "run", "pt of an LLM", METHODS["full"]))
    chat = build_conversation_tokenizer(config.data, load_tokenizer(str(toys / "llm")), None, None)
    scan = scan_records(build_reader(config.data, config.data.sources, chat), None)
    records = read_some(config)
    assert records.num_records == len(scan.lengths) > 5
    assert records.row.tokens * records.num_rows == pytest.approx(scan.lengths.sum())
