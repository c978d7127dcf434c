"""Does every objective learn the same with every engine, of a language model and of a vision-language model, whole,
with adapters and with adapters on 4 bits? Trains toys for some steps and prints the differences from one process.

    python scripts/prove_objectives.py                          # 8 minutes on two cores
    python scripts/prove_objectives.py --objectives ppo grpo --forms whole --steps 2

Losses, gradient norms and trained weights are compared, and what the objective logs (rewards, KL divergence, ...).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from demo.tiny import COLOURS, SHAPES, write_data, write_encoder, write_llm
from prove_engines import Case, Outcome, run_cases, worst_differences

from vlm.compat import prepare
from vlm.config import load_config
from vlm.errors import ConfigError

ENGINES = ("local", "ddp*2", "zero1*2", "zero2*2", "zero3*2", "fsdp*2", "pipeline2*2")
PAIRS, LABELS, ASKED = "pairs", "labels", "asked"
RECORDS = {"dpo": PAIRS, "orpo": PAIRS, "simpo": PAIRS, "kto": LABELS, "reward": PAIRS, "grpo": ASKED, "ppo": ASKED}
WRITES = {"max_new_tokens": 4, "kl": 0.05, "updates": 2, "rewards": [{"kind": "regex", "pattern": "[a-z]"}]}
SETTINGS: dict[str, dict[str, Any]] = {"grpo": {"group_size": 4, **WRITES}, "ppo": {"group_size": 2, **WRITES}}
FORMS = {"whole": "llm", "adapters": "llm.lora", "adapters on nf4": "llm.lora"}
MODELS = ("text", "images")
VALUED = ("reward", "ppo")  # objectives of a value head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", choices=RECORDS, default=list(RECORDS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES[1:], default=list(ENGINES[1:]))
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    prepare()  # before torchvision is imported
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = write_toy(folder)
        teach_projector(config, folder)
        groups = {
            (objective, form, model): [
                Case(engine, options(folder, objective, form, model)) for engine in ("local", *arguments.engines)
            ]
            for objective, form, model in itertools.product(arguments.objectives, arguments.forms, arguments.models)
        }
        refused = {case: why for cases in groups.values() for case in cases if (why := why_not(config, case))}
        allowed = [case for cases in groups.values() for case in cases if case not in refused]
        outcomes = run_cases(str(config), allowed, arguments.steps, folder)
        print("| objective | trains | model | loss | gradient norm | weights | numbers | refuses |\n|" + "---|" * 8)
        for (objective, form, model), cases in groups.items():
            found = row({case: outcomes[case] for case in cases if case in outcomes})
            names = " ".join(case.engine.partition("*")[0] for case in cases if case in refused) or "-"
            print(f"| `{objective}` | {form} | {model} | {found} | {names} |")
    reasons = defaultdict(list)
    for case, why in refused.items():
        reasons[why].append(case)
    for why, cases in reasons.items():
        print(f"\nrefused {len(cases)} times: {why}")
    print("\nThe worst of all engines beside one process: relative differences of a step's loss and gradient norm, the")
    print("mean absolute difference of a trained tensor after the last step, the absolute one of a logged number.")


def write_toy(folder: Path) -> Path:
    """Models, records of each kind with and without images, and the config that options change."""
    texts = write_data(folder / "data")
    write_llm(folder / "llm", texts)
    write_encoder(folder / "encoder")
    for name, of_kind in {PAIRS: pair, LABELS: labelled, ASKED: asked}.items():
        records = [of_kind(*each) for each in enumerate(itertools.product(COLOURS, SHAPES))]
        for model in MODELS:
            kept = [record if model == "images" else {**record, "image": None} for record in records]
            lines = [json.dumps({key: value for key, value in record.items() if value is not None}) for record in kept]
            (folder / f"{name}-{model}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "output_dir": str(folder / "run"), "seed": 0, "engine": {"timeout_seconds": 120},
        "model": {"llm": {"path": str(folder / "llm")}, "trainable": ["llm"]},
        "data": {"template": "chatml", "cache": str(folder / "cache"), "max_length": 128, "held_out": 0.0,
                 "sources": [{"path": str(folder / "pairs-text.jsonl")}]},
        "train": {"precision": "fp32", "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 3e-3,
                  "max_steps": 8, "prove": False},
    }  # fmt: skip
    path = folder / "toy.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def teach_projector(config: Path, folder: Path) -> None:
    """The export that runs with images start from: a penalty for leaving a random projector is refused."""
    from vlm.export.run import export_run
    from vlm.run import train

    taught = json.loads(config.read_text(encoding="utf-8"))
    taught["model"] |= {"vision": vision_of(folder), "trainable": ["projector"]}
    taught["data"]["sources"] = [{"path": str(folder / "data/finetune.jsonl"), "images": str(folder / "data/images")}]
    taught["train"]["max_steps"] = 1
    path = folder / "projector.yaml"
    path.write_text(json.dumps(taught), encoding="utf-8")
    export_run(train(load_config(str(path)), path.read_text(encoding="utf-8")))


def vision_of(folder: Path) -> dict[str, Any]:
    return {"backend": "hf", "path": str(folder / "encoder"), "layer": -2}


def pair(number: int, kind: tuple[str, str]) -> dict[str, Any]:
    colour, shape = kind
    other = list(SHAPES)[(list(SHAPES).index(shape) + 1) % len(SHAPES)]
    return {"image": f"{colour}-{shape}-0.png", "prompt": "Which shape is it?", "chosen": f"A {shape}.",
            "rejected": f"A {other}, I think."}  # fmt: skip


def labelled(number: int, kind: tuple[str, str]) -> dict[str, Any]:
    found = pair(number, kind)
    return {"image": found["image"], "prompt": found["prompt"], "completion": found["chosen"], "label": number % 2 == 0}


def asked(number: int, kind: tuple[str, str]) -> dict[str, Any]:
    found = pair(number, kind)
    return {"image": found["image"], "prompt": found["prompt"], "answer": found["chosen"]}


def options(folder: Path, objective: str, form: str, model: str) -> tuple[str, ...]:
    """Changes of the toy's config."""
    source = {"path": str(folder / f"{RECORDS[objective]}-{model}.jsonl"), "images": str(folder / "data/images")}
    parts = [
        FORMS[form],
        *(["projector"] if model == "images" else []),
        *(["value_head"] if objective in VALUED else []),
    ]
    changes: dict[str, Any] = {
        "objective": {"kind": objective, **SETTINGS.get(objective, {})},
        "data.sources": [source],
        "model.trainable": parts,
        "model.vision": vision_of(folder) if model == "images" else None,
    }
    if model == "images":
        changes["init_from"] = str(folder / "run/export")
    if FORMS[form] == "llm.lora":
        changes["model.lora"] = {"rank": 4, "alpha": 8}
    if "nf4" in form:
        changes["model.llm.quantization"] = {"format": "nf4"}
    return tuple(f"{key}={json.dumps(value)}" for key, value in changes.items())


def why_not(config: Path, case: Case) -> str:
    """What the config says where it refuses an engine; empty where it does not."""
    try:
        load_config(str(config), case.overrides)
    except ConfigError as error:
        return str(error).splitlines()[-1].partition(f"{config.name}:1: ")[2].partition(" (engine is set")[0]
    return ""


def row(outcomes: dict[Case, Outcome]) -> str:
    reference, *others = outcomes.values()
    worst = [worst_differences(reference, other) for other in others]
    numbers = max(
        abs(expected[name] - found[name]) if math.isfinite(found.get(name, math.nan)) else math.inf
        for other in others
        for expected, found in zip(reference.metrics, other.metrics, strict=True)
        for name in expected
    )
    return " | ".join(f"{value:.1e}" for value in (*(max(each) for each in zip(*worst, strict=True)), numbers))


if __name__ == "__main__":
    main()
