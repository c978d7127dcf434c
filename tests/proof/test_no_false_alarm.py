"""Runs in which nothing is wrong pass, whatever is unusual about their records or their model."""

import json
import math

import pytest
import torch
from proof_setups import make_parts

from vlm.proof.checks import Proof, at_most
from vlm.proof.forward import has_experts
from vlm.proof.gradients import Gradients, _presence
from vlm.proof.prove import prove
from vlm.proof.text import _windows
from vlm.train.engines.local import LocalEngine


@pytest.fixture
def records(root, tmp_path):
    """Changes to a config, whose data are these conversations: (image or None, then what each says, the user first)."""

    def write(*conversations):
        images = sorted(path.name for path in (root / "data/images").glob("*.png"))
        lines = []
        for number, (has_image, *said) in enumerate(conversations):
            turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]
            lines.append({"conversations": turns} | ({"image": images[number]} if has_image else {}))
        (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {"sources": [{"path": str(tmp_path / "records.jsonl"), "images": str(root / "data/images")}]}

    return write


@pytest.mark.slow
def test_records_that_were_cut_end_with_the_last_reply_that_fits(root, records):
    """The question that follows it would fit too, but the answer to that does not."""
    talk = ("<image>\nWhat is this?", "A red circle.", "What else?", "A blue square and a green circle. " * 30)
    data = records((True, *talk), (True, *talk)) | {"over_long": "cut"}
    proof = prove(make_parts(root, "lora", data=data), seconds=math.inf)
    assert proof.failed == []
    assert proof.findings["text"].passed is True


@pytest.mark.slow
def test_a_trained_encoder_may_move_its_own_statistics_beside_a_frozen_language_model(root):
    changes = {"path": "{root}/resnet", "backend": "timm", "image_size": 64}
    parts = make_parts(
        root, "batch norm", model={"vision": changes, "trainable": ["projector", "vision"], "lora": None}
    )
    proof = prove(parts, seconds=math.inf)
    assert proof.failed == []
    assert proof.findings["frozen_steady"].passed is True


@pytest.mark.slow
def test_a_proof_puts_back_statistics_that_moved_before_it_goes_on(root):
    """The checks that follow compare what was computed before with what is computed after."""
    parts = make_parts(root, "batch norm")
    vision = parts.built.model.vision
    vision.train = lambda mode=True: torch.nn.Module.train(vision, mode)  # the fault: it leaves evaluation mode
    proof = prove(parts, seconds=math.inf)
    assert proof.failed == ["frozen_steady"]


TALK = ("What is a circle?", "A round shape.")
LATE = ("What is a circle?", "A round shape.", "<image>\nAnd this?")


@pytest.mark.parametrize("setup", ["lora", "projector"])
def test_first_records_without_an_image_do_not_make_a_projector_a_fault(root, records, setup):
    projector = {"kind": "linear", "normalize": False}  # no image to take statistics from
    data = records((False, *TALK), (False, *TALK))
    proof = prove(make_parts(root, setup, data=data, model={"projector": projector}), seconds=math.inf)
    assert proof.failed == []
    gradients = proof.findings["gradients"]
    assert gradients.passed is (True if setup == "lora" else None)
    assert gradients.note == ("" if setup == "lora" else "no image in the first records")


@pytest.mark.parametrize("setup", ["lora", "projector"])
def test_an_image_after_the_last_reply_is_not_asked_to_change_it(root, records, setup):
    proof = prove(make_parts(root, setup, data=records((True, *LATE), (True, *LATE))), seconds=math.inf)
    assert proof.failed == []
    assert proof.findings["image_read"].note == "no image stands before a reply in the first records"


def test_of_the_first_records_one_is_computed_whose_reply_follows_its_image(root, records):
    asked = ("<image>\nWhat is this? Say all that you see.", "A red circle beside a blue square.")
    proof = prove(make_parts(root, "lora", data=records((True, *LATE), (True, *asked))), seconds=math.inf)
    assert proof.failed == []
    assert proof.findings["image_read"].passed is True


@pytest.mark.parametrize("name", ["gate.e_score_correction_bias", "expert_bias", "attn.indexer.weight", "tower.weight"])
def test_weights_that_no_loss_reaches_need_no_gradient(root, name):
    """They only choose experts, or the tokens that attention sees; or they are an encoder inside a composite class."""
    model = make_parts(root, "full").built.model
    gradients = Gradients({name: 1.0 for name, weight in model.named_parameters() if weight.requires_grad}, {})
    owner = model.llm if name.startswith("tower") else model.llm.model.layers[0]
    *modules, leaf = name.split(".")
    for module in modules:
        owner.add_module(module, torch.nn.Module())
        owner = owner.get_submodule(module)
    owner.register_parameter(leaf, torch.nn.Parameter(torch.ones(2)))
    assert _presence(model, gradients, reads_image=True).passed is True
    model.llm.model.layers[0].forgotten = torch.nn.Linear(2, 2)
    assert "forgotten" in _presence(model, gradients, reads_image=True).note


def test_a_model_that_rounding_moves_without_limit_is_not_judged_by_widened_bounds(root, monkeypatch):
    monkeypatch.setattr("vlm.proof.prove.measure_rounding", lambda *_: math.inf)
    proof = prove(make_parts(root, "lora"), seconds=math.inf)
    assert proof.failed == []
    rough = {name for name, finding in proof.findings.items() if finding.note.startswith("rounding alone")}
    assert rough == {"packed_alone", "shared_image", "feature_order", "loss", "micro_batches", "frozen_steady"}
    json.dumps(proof.as_json(), allow_nan=False)


def test_proof_json_has_no_infinity():
    proof = Proof({"loss": at_most(math.inf, 1e-5)}, 1.0, {})
    (check,) = json.loads(json.dumps(proof.as_json(), allow_nan=False))["checks"]
    assert (check["passed"], check["measured"]) == (False, None)


@pytest.mark.parametrize(("rounding", "bound"), [(0.01, 0.04), (math.inf, 0.3)])
def test_experts_may_round_other_tokens_another_way(root, monkeypatch, rounding, bound):
    """Which tokens an expert gets decides the shape of its product."""
    monkeypatch.setattr("vlm.proof.prove.measure_rounding", lambda *_: rounding)
    monkeypatch.setattr("vlm.proof.prove.has_experts", lambda _: True)
    proof = prove(make_parts(root, "lora"), seconds=math.inf)
    assert [proof.findings[name].bound for name in ("causal", "own_image")] == [bound, bound]


def test_a_mixture_has_experts_and_llama_has_none():
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    assert has_experts(MixtralForCausalLM(MixtralConfig(num_key_value_heads=2, num_local_experts=2, **sizes)))
    assert not has_experts(LlamaForCausalLM(LlamaConfig(**sizes)))


def test_a_proof_ends_in_time_where_no_process_holds_the_whole_model_too(root, monkeypatch):
    monkeypatch.setattr(LocalEngine, "holds_whole_model", False)
    findings = prove(make_parts(root, "lora"), seconds=0).findings
    assert findings["labels"].passed is True
    assert findings["packed_alone"].note == "the 0 s that a proof may take here were over"


def test_long_texts_are_compared_near_their_first_difference():
    same = "a circle " * 5000
    found, expected = _windows(same + "red" + same, same + "blue" + same)
    assert len(found) == len(expected) == 2000
    assert found[1000:1003] == "red"
    assert expected[1000:1004] == "blue"
    assert _windows("red", "blue") == ("red", "blue")
