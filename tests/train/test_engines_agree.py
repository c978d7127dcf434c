"""The proof: every engine trains as one process does. See docs/parallel.md for the table."""

import json
from types import SimpleNamespace

import pytest
import toy_objective
from prove_engines import ENGINES as ALL
from prove_engines import Case, run_cases, work, worst_differences
from toy_runs import start_warm
from warm import run_warm

from vlm.compat import prepare
from vlm.train.engines.zero import gather_blocks_whole

ENGINES = ALL[1:]  # but local
LORA = ("model.lora={rank: 4, alpha: 8}", "model.trainable=[projector, llm.lora]")
EVERYTHING = ("model.lora=null", "model.trainable=[projector, llm, vision]")
STEPS = 4  # an epoch, whose last step is not full, and the first of the next

# Allowed differences of loss, gradient norm (relative) and weights (mean absolute). Worst seen over nine steps in fp32
# 1.3e-7, 1.6e-6, 1.3e-6; in bf16 7.0e-4, 1.3e-3, 5.0e-5 (of a whole language model too, by scripts/prove_engines.py).
BOUNDS = {"fp32": (1e-6, 1e-5, 5e-6), "bf16": (1e-3, 5e-3, 2e-4)}


@pytest.fixture
def config(config_file, tiny, tmp_path):
    """Rows of unequal answers, some with text alone, fewer records than fill the epoch's last step, clipping on."""
    lines = (tiny / "data/finetune.jsonl").read_text().splitlines()[:9]
    talk = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A red circle. " * 3}]}
    mixed = [line for pair in zip(lines, [json.dumps(talk)] * 9, strict=True) for line in pair][:15]
    (tmp_path / "mixed.jsonl").write_text("\n".join(mixed))
    return config_file(
        data__sources=[{"path": str(tmp_path / "mixed.jsonl"), "images": str(tiny / "data/images")}],
        data__held_out=0.0,
        data__max_length=80,
        train__micro_batch_size=1,
        train__max_grad_norm=0.5,
        engine={"timeout_seconds": 60},
    )


def test_under_zero_3_deepspeed_sees_each_decoder_block_as_one_layer():
    prepare()
    from deepspeed.utils import z3_leaf_module
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "vocab_size": 9,
    }
    llm = LlamaForCausalLM(LlamaConfig(**sizes))
    gather_blocks_whole(SimpleNamespace(llm=llm))
    assert [name for name, each in llm.named_modules() if z3_leaf_module(each)] == [
        f"model.layers.{n}" for n in range(3)
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_engine_trains_as_one_process_does(config, tmp_path):
    """Adapters in fp32 beside an encoder that runs are those of the other test."""
    cached = (*LORA, "data.cache_features=true", f"data.cache={tmp_path / 'features'}")
    variants = {
        (name, precision): (*options, f"train.precision={precision}")
        for name, options, precision in (
            ("everything", EVERYTHING, "fp32"),
            ("cached", cached, "fp32"),
            ("lora", LORA, "bf16"),
        )
    }
    cases = [Case(engine, options) for options in variants.values() for engine in ("local", *ENGINES)]
    outcomes = run_cases(str(config), cases, STEPS, tmp_path, start_warm)
    failed = []
    for (name, precision), options in variants.items():
        reference = outcomes[Case("local", options)]
        assert len(reference.losses) == STEPS
        assert reference.losses[-1] < reference.losses[0]
        for engine in ENGINES:
            found = worst_differences(reference, outcomes[Case(engine, options)])
            print(f"{name:10} {precision} {engine:8} " + " ".join(f"{value:.1e}" for value in found))
            if any(value > bound for value, bound in zip(found, BOUNDS[precision], strict=True)):
                failed.append((name, precision, engine, found))
    assert not failed


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_another_objective_trains_alike_on_every_engine_and_so_do_its_metrics(config, tmp_path):
    """Worst seen: loss 1.2e-7, norm 9e-7, weights 9e-7, metrics 2e-7."""
    options = (*LORA, "train.precision=fp32", "objective={kind: even_words, power: 1.5}")
    cases = [Case(engine, options) for engine in ALL]
    outcomes = run_cases(str(config), cases, STEPS, tmp_path, start_with_toy_objective)
    reference = outcomes[cases[0]]
    assert reference.losses[-1] < reference.losses[0] < 1  # a doubt is at most 1; nats would be about 6
    assert {name for each in reference.metrics for name in each} == {"accuracy", "doubt"}
    for case in cases[1:]:
        found = worst_differences(reference, outcomes[case])
        assert all(value <= bound for value, bound in zip(found, BOUNDS["fp32"], strict=True)), (case, found)
        for own, expected in zip(outcomes[case].metrics, reference.metrics, strict=True):
            assert own == pytest.approx(expected, rel=1e-5), case


def start_with_toy_objective(job, processes):
    code, output = run_warm(work_with_toy_objective, job, nproc=processes, timeout=500)
    assert code == 0, output[-6000:]


def work_with_toy_objective(job):
    toy_objective.register()
    try:
        work(job)
    finally:
        toy_objective.unregister()
