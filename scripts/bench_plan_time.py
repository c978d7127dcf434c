"""The step time of `vlm plan` against what a step really takes, for 20 small models on the CPU.

    OMP_NUM_THREADS=1 python scripts/bench_plan_time.py
    OMP_NUM_THREADS=1 python scripts/bench_plan_time.py --only lora

Forward, backward, clipping and AdamW on packed rows, in float32, after steps that warm up. Counted is the processor
time of one thread, as other programs may use the machine, of the fastest step, as the machine's own numbers are of the
fastest calls. The machine is measured anew first (`vlm.plan.measure`, where `_IN_A_STEP` is the one constant that was
fitted to these cases).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_plan
import torch
from bench_plan import Case, llm


@dataclass(frozen=True)
class Timed:
    """A case of the memory bench, and how many records stand in each of its rows."""

    case: Case
    records: int = 4


_VIT = {
    "model_type": "clip_vision_model", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8,
    "num_attention_heads": 6, "image_size": 224, "patch_size": 16, "hidden_act": "quick_gelu",
}  # fmt: skip
_TINY = llm(256, 704, 4, 4, 2, 2000)
_SMALL = llm(512, 1408, 6, 8, 2, 8000)
_DEEP = llm(384, 1024, 12, 6, 6, 4000)
_WIDE = llm(1024, 2816, 3, 16, 4, 8000)
_WORDS = llm(512, 1408, 4, 8, 2, 32000)
_LORA = {"rank": 16}
_MLP = {"projector": {"kind": "mlp"}}


def _case(name: str, decoder: dict[str, Any], trainable: tuple[str, ...], rows: int, length: int, records: int = 4,
          **more: Any) -> Timed:  # fmt: skip
    if "vision" in more:
        more = {"images": records, "extra": _MLP} | more
    return Timed(Case(name, decoder, trainable, rows, length, precision="fp32", **more), records)


_FULL, _ADAPTERS, _BELOW = ("projector", "llm"), ("projector", "llm.lora"), ("projector",)
CASES = (
    _case("tiny, full", _TINY, ("llm",), 2, 512),
    _case("tiny, full, long record", _TINY, ("llm",), 1, 1024, 1),
    _case("tiny, full, 16 records", _TINY, ("llm",), 2, 1024, 16),
    _case("tiny, lora", _TINY, ("llm.lora",), 2, 512, lora=_LORA),
    _case("small, full", _SMALL, ("llm",), 2, 384),
    _case("small, full, one record", _SMALL, ("llm",), 1, 1024, 1),
    _case("small, full, 32 records", _SMALL, ("llm",), 1, 1024, 32),
    _case("small, full, checkpointing", _SMALL, ("llm",), 1, 512, checkpointing=True),
    _case("small, full, accumulation", _SMALL, ("llm",), 1, 256, micro_batches=3),
    _case("small, lora", _SMALL, ("llm.lora",), 2, 512, lora=_LORA),
    _case("small, lora, checkpointing", _SMALL, ("llm.lora",), 1, 512, lora=_LORA, checkpointing=True),
    _case("small, projector", _SMALL, _BELOW, 1, 512, 2, vision=bench_plan._CLIP),
    _case("small, projector, larger encoder", _SMALL, _BELOW, 1, 1024, 4, vision=_VIT),
    _case("small, full, encoder", _SMALL, _FULL, 1, 512, 2, vision=bench_plan._CLIP),
    _case("small, encoder trains", _SMALL, ("projector", "vision"), 1, 512, 2, vision=bench_plan._CLIP),
    _case("deep, full", _DEEP, ("llm",), 1, 512),
    _case("deep, lora and encoder", _DEEP, _ADAPTERS, 1, 1024, 4, vision=_VIT, lora=_LORA),
    _case("wide, full", _WIDE, ("llm",), 1, 512),
    _case("wide, projector", _WIDE, _BELOW, 1, 512, 2, vision=bench_plan._CLIP),
    _case("large vocabulary, full", _WORDS, ("llm",), 1, 512),
)


def measure(timed: Timed) -> float:
    """Seconds of processor time of the fastest step."""
    case = timed.case
    with tempfile.TemporaryDirectory() as folder:
        model = bench_plan.build(bench_plan.write_config(case, Path(folder)).model, case, "cpu")
    batch = bench_plan.make_batch(case, model, "cpu")
    each = case.length // timed.records
    batch.position_ids = torch.arange(each).repeat(timed.records).repeat(case.rows, 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    found, started = [], time.perf_counter()
    while len(found) < 5 or (len(found) < 20 and time.perf_counter() - started < 3):
        before = time.process_time()
        for _ in range(case.micro_batches):
            bench_plan.step_loss(model, batch, case, "cpu").backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(time.process_time() - before)
    return min(found[1:])


def estimated(timed: Timed) -> dict[str, float]:
    """Seconds of a step, by what takes them."""
    from vlm.plan.cost import Load
    from vlm.plan.estimate import estimate
    from vlm.plan.measure import measured_machine
    from vlm.plan.shapes import read_shapes
    from vlm.plan.step_time import step_parts

    case = timed.case
    with tempfile.TemporaryDirectory() as folder:
        config = bench_plan.write_config(case, Path(folder))
        shape = read_shapes(config.model)
    text = case.length - case.images * shape.tokens_per_image
    row = Load(case.images, text, ((case.length / timed.records, timed.records),))
    machine = measured_machine(torch.device("cpu"), torch.float32)
    parts = step_parts(config, estimate(config, 1, shape=shape), machine, row)
    parts.pop("waiting for data", None)  # pixels are ready here
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--json", help="write measured seconds and estimated parts here")
    arguments = parser.parse_args()
    from vlm.plan.measure import measured_machine

    started = time.perf_counter()
    machine = measured_machine(torch.device("cpu"), torch.float32, again=True)
    print(f"{machine.name}, in {time.perf_counter() - started:.1f} s")
    print(f"{'case':<36}{'measured':>10}{'estimated':>11}{'error':>8}  ms")
    rows = []
    for timed in CASES:
        if arguments.only in timed.case.name:
            measured, parts = measure(timed), estimated(timed)
            total = sum(parts.values())
            rows.append({"case": timed.case.name, "measured": measured, "parts": parts})
            shown = ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in parts.items())
            numbers = f"{measured * 1e3:>10.0f}{total * 1e3:>11.0f}{total / measured - 1:>8.1%}"
            print(f"{timed.case.name:<36}{numbers}  {shown}", flush=True)
    errors = sorted(abs(sum(row["parts"].values()) / row["measured"] - 1) for row in rows)
    print(f"errors: median {statistics.median(errors):.1%}, worst {errors[-1]:.1%}, "
          f"within 10 %: {sum(error <= 0.1 for error in errors)} of {len(errors)}")  # fmt: skip
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
