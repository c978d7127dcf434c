"""The estimate of `vlm plan` against what a training step really takes, for random models of several sizes.

    python scripts/bench_plan.py                 # small models on the CPU: allocations counted
    python scripts/bench_plan.py --device cuda   # 1.5B, 7B and both stages of 14B: torch.cuda.max_memory_allocated
    python scripts/bench_plan.py --only lora --rss

Every case runs in a fresh process: the peak of an optimizer step, after the optimizer's state was made. On the CPU the
bytes of every tensor that an operator makes are counted while the tensor lives; `--rss` prints the growth of the
process's resident size too.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import weakref
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass(frozen=True)
class Case:
    """A model, how it trains, and its micro-batch."""

    name: str
    llm: dict[str, Any]  # of transformers' config
    trainable: tuple[str, ...]
    rows: int
    length: int
    vision: dict[str, Any] | None = None
    images: int = 0  # per row
    lora: dict[str, Any] | None = None
    checkpointing: bool = False
    precision: str = "bf16"
    micro_batches: int = 1
    packed: bool = True
    stage: tuple[int, int] | None = None  # layers of one pipeline stage: first, and the one after the last
    num_stages: int = 1
    extra: dict[str, Any] = field(default_factory=dict)  # other keys of the model section
    attention: str = "auto"  # as model.llm has it; sdpa keeps a mask of every row


def llm(width: int, mlp: int, blocks: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen2", "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": blocks,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": 32768, "tie_word_embeddings": False, "use_cache": False,
        "bos_token_id": None, "eos_token_id": 0,
    } | more  # fmt: skip


_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 4, "image_size": 112, "patch_size": 14,
}  # fmt: skip
_CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "hidden_act": "quick_gelu",
}  # fmt: skip
_SMALL = llm(512, 1408, 6, 8, 2, 8000)
_WIDE_VOCAB = llm(256, 704, 2, 4, 4, 60000)
_PROJECTOR = {"projector": {"kind": "mlp"}}

SMALL = (
    Case("projector", _SMALL, ("projector",), 2, 512, _CLIP, 2, extra=_PROJECTOR),
    Case("projector, checkpointing", _SMALL, ("projector",), 4, 512, _CLIP, 2, checkpointing=True, extra=_PROJECTOR),
    Case("projector, long", _SMALL, ("projector",), 1, 2048, _CLIP, 4, extra=_PROJECTOR),
    Case("projector, bf16_autocast", _SMALL, ("projector",), 2, 512, _CLIP, 2, precision="bf16_autocast"),
    Case("projector, fp32", _SMALL, ("projector",), 2, 512, _CLIP, 2, precision="fp32"),
    Case("projector, no restarts", _SMALL, ("projector",), 2, 512, _CLIP, 2, packed=False),
    Case("encoder too", _SMALL, ("projector", "vision"), 2, 512, _CLIP, 4, extra=_PROJECTOR),
    Case("lora", _SMALL, ("projector", "llm.lora"), 2, 512, _CLIP, 2, {"rank": 16}),
    Case("lora, checkpointing", _SMALL, ("projector", "llm.lora"), 4, 512, _CLIP, 2, {"rank": 16}, True),
    Case("lora, dropout", _SMALL, ("llm.lora",), 2, 512, lora={"rank": 16, "dropout": 0.05}),
    Case("lora, fp32", _SMALL, ("llm.lora",), 2, 512, lora={"rank": 16}, precision="fp32"),
    Case("full", _SMALL, ("projector", "llm"), 2, 512, _CLIP, 2),
    Case("full, checkpointing", _SMALL, ("projector", "llm"), 4, 512, _CLIP, 2, checkpointing=True),
    Case("full, accumulation", _SMALL, ("llm",), 2, 512, micro_batches=2),
    Case("full, accumulation, checkpointing", _SMALL, ("llm",), 2, 512, micro_batches=2, checkpointing=True),
    Case("full, fp32", _SMALL, ("llm",), 2, 512, precision="fp32"),
    Case("full, tied", _SMALL | {"tie_word_embeddings": True}, ("llm",), 2, 512),
    Case("large vocabulary", _WIDE_VOCAB, ("projector",), 2, 512, _CLIP, 2),
    Case("large vocabulary, several chunks", _WIDE_VOCAB, ("llm",), 4, 512, checkpointing=True),
    Case("stage 0 of 2", _SMALL, ("projector", "llm.lora"), 2, 512, _CLIP, 2, {"rank": 16}, stage=(0, 5), num_stages=2),
    Case("stage 1 of 2", _SMALL, ("projector", "llm.lora"), 2, 512, _CLIP, 2, {"rank": 16}, stage=(5, 8), num_stages=2),
    Case("head norms", _SMALL | {"model_type": "qwen3", "head_dim": 64}, ("llm.lora",), 2, 512, lora={"rank": 16}),
)
_QWEN_1B = llm(1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True)
_QWEN_7B = llm(3584, 18944, 28, 28, 4, 152064)
_QWEN_14B = llm(5120, 13824, 48, 40, 8, 152064)
_LORA = {"rank": 128, "alpha": 256, "dropout": 0.05}
LARGE = (
    Case("1.5B full", _QWEN_1B, ("projector", "llm"), 2, 2048, _CLIP_L, 1, checkpointing=True, extra=_PROJECTOR),
    Case("1.5B projector, no checkpointing", _QWEN_1B, ("projector",), 2, 2048, _CLIP_L, 1, extra=_PROJECTOR),
    Case("7B projector", _QWEN_7B, ("projector",), 4, 2048, _CLIP_L, 1, checkpointing=True, extra=_PROJECTOR),
    Case("7B lora", _QWEN_7B, ("projector", "llm.lora"), 2, 2048, _CLIP_L, 1, _LORA, True, extra=_PROJECTOR),
    Case("7B lora, no checkpointing", _QWEN_7B, ("projector", "llm.lora"), 1, 2048, _CLIP_L, 1, _LORA),
    Case("14B lora, stage 0 of 2", _QWEN_14B, ("projector", "llm.lora"), 1, 2048, _CLIP_L, 1, _LORA, True,
         stage=(0, 25), num_stages=2),
    Case("14B lora, stage 1 of 2", _QWEN_14B, ("projector", "llm.lora"), 1, 2048, _CLIP_L, 1, _LORA, True,
         stage=(25, 50), num_stages=2),
)  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators made and that are still alive.

    Matrix products of bfloat16 tensors are computed in float32 and rounded: the same tensors live, and a CPU without
    bfloat16 units takes 80 times as long for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = _in_float32(function, args, kwargs or {})
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self.add(leaf)
        self.peak = max(self.peak, self.live)
        return output


_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::convolution", "aten::convolution_backward")
_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


def _in_float32(function: Any, args: Any, kwargs: Any) -> Any:
    """What the operator returns; if it is a product of bfloat16 tensors, from products of float32."""
    name = function.name().partition(".")[0]
    attends = name.startswith(_ATTENTION)
    if not (attends or name in _PRODUCTS) or args[0].dtype != torch.bfloat16:
        return function(*args, **kwargs)
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.float(), (args, kwargs))
    output = function(*args, **kwargs)
    if name == _ATTENTION:  # the logarithms beside the states are float32 always
        return output[0].bfloat16(), *output[1:]
    return tree_map_only(Tensor, lambda tensor: tensor.bfloat16(), output)


def write_config(case: Case, folder: Path, device: str = "cpu") -> Any:
    """The case as a RunConfig; its models are config.json files in `folder`."""
    from vlm.config import RunConfig

    for name, settings in (("llm", case.llm), ("vision", case.vision)):
        if settings:
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "config.json").write_text(json.dumps(settings))
    model: dict[str, Any] = {"llm": {"path": str(folder / "llm"), "attention": case.attention}, **case.extra}
    model |= {"trainable": case.trainable, "lora": case.lora, "gradient_checkpointing": case.checkpointing}
    if case.vision:
        model["vision"] = {"backend": "hf", "path": str(folder / "vision"), "layer": -2}
    return RunConfig.model_validate({
        "output_dir": "unused", "model": model,
        "data": {"sources": [{"path": "unused"}], "max_length": case.length, "max_images": max(1, case.images)},
        "train": {"max_steps": 2, "precision": case.precision, "micro_batch_size": case.rows,
                  "global_batch_size": case.rows * case.micro_batches},
        "engine": {"device": device} | (
            {"kind": "pipeline", "num_stages": case.num_stages, "cuts": [case.stage[1] if case.stage[0] == 0 else
                                                                         case.stage[0]]} if case.stage else {}
        ),
    })  # fmt: skip


def estimated(case: Case, device: str = "cpu") -> dict[str, int]:
    """Bytes that the plan gives for the case."""
    from vlm.plan.estimate import estimate
    from vlm.plan.numerics import Workload
    from vlm.plan.shapes import read_shapes

    with tempfile.TemporaryDirectory() as folder:
        config = write_config(case, Path(folder), device)
        shape = read_shapes(config.model)
    images = case.rows * case.images
    work = Workload(
        case.rows, case.length, images, case.rows * case.length - images * shape.tokens_per_image, case.packed
    )
    plan = estimate(config, case.num_stages, workload=work, shape=shape, has_flash_attention=False)
    found = plan.devices[0 if not case.stage or case.stage[0] == 0 else 1]
    total = found.total
    if case.stage:  # without DeepSpeed's buffers and its copy of the weights: 4 of 12 bytes
        total -= found.buffers + found.optimizer // 3
    return {"total": total, "static": found.parameters + found.optimizer, "gradients": found.gradients,
            "activations": found.activations, "moment": found.moment}  # type: ignore[dict-item]  # fmt: skip


def measure(case: Case, device: str) -> dict[str, Any]:
    """Peak bytes of an optimizer step that is not the first, in this process."""
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    counter = LiveBytes()
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(case, Path(folder), device)
        if device == "cpu":
            with counter:
                _train(case, config, device, counter)
            peak = counter.peak
        else:
            _train(case, config, device, None)
            peak = torch.cuda.max_memory_allocated()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start
    return {"measured": peak, "rss": grown}


def _train(case: Case, config: Any, device: str, counter: LiveBytes | None) -> None:
    model = build(config.model, case, device)
    if counter is not None:
        for tensor in (*model.parameters(), *model.buffers()):
            counter.add(tensor)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batch = make_batch(case, model, device)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the state
    optimizer.zero_grad(set_to_none=True)
    if counter is not None:
        counter.peak = counter.live
    else:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(case.micro_batches):
        step_loss(model, batch, case, device).backward()
    torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def build(config: Any, case: Case, device: str) -> Any:
    """The model with random weights; of a pipeline stage, its blocks alone with whatever else the stage holds."""
    from vlm.models.build import assemble
    from vlm.models.llm import llm_from_config, settle_attention
    from vlm.models.vision import build_vision

    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    with torch.device(device):
        decoder = llm_from_config(config.llm, dtype)
        settle_attention(decoder, config.llm.attention)
        vision = None if config.vision is None else build_vision(config.vision, dtype, weights=False)
    if case.stage:
        first, stop = case.stage
        decoder.model.layers = decoder.model.layers[max(0, first - 1) : stop - 1]
    model = assemble(config, decoder.eval(), vision, None)[0].to(device)
    model.image_token_id = case.llm["vocab_size"] - 1 if config.vision is not None else None
    model.picture_tokens = case.images * (model.projector.num_tokens if model.projector is not None else 0)  # per row
    if case.stage and case.stage[0] == 0:
        model.llm.model.norm = model.llm.lm_head = torch.nn.Identity()
    elif case.stage:
        model.vision = model.projector = None
        model.llm.model.embed_tokens = torch.nn.Identity()
    return model.train()


def make_batch(case: Case, model: Any, device: str) -> Any:
    """Full rows: pictures first, all other tokens supervised; two examples a row if packed."""
    from vlm.batch import IGNORE_INDEX, Batch

    ids = torch.randint(0, case.llm["vocab_size"] - 1, (case.rows, case.length))
    labels, pixels = ids.clone(), None
    labels[:, : model.picture_tokens] = IGNORE_INDEX
    if case.images and model.vision is not None:
        ids[:, : model.picture_tokens] = model.image_token_id
        side = model.vision.image_size
        pixels = torch.zeros(case.rows * case.images, 3, side, side)
    positions = torch.arange(case.length).repeat(case.rows, 1)
    if case.packed:
        positions[:, case.length // 2 :] -= case.length // 2
    return Batch(ids, labels, positions, pixels).to(torch.device(device))


def step_loss(model: Any, batch: Any, case: Case, device: str) -> Tensor:
    """The loss, or of a pipeline stage but the last, a number with the same graph below it."""
    from vlm.models.loss import chunked_cross_entropy

    with torch.autocast(device, torch.bfloat16, enabled=case.precision != "fp32"):
        if case.stage and case.stage[0]:
            shape = (*batch.input_ids.shape, case.llm["hidden_size"])
            received = torch.zeros(shape, dtype=torch.bfloat16, device=device, requires_grad=True)
            hidden = model.decode(received, batch.position_ids)
        else:
            hidden = model(batch.input_ids, batch.position_ids, batch.pixel_values, device=batch.device)
        if case.stage and not case.stage[0]:
            return hidden.sum()
        return chunked_cross_entropy(hidden, batch.labels, model.logits) / batch.num_supervised


def run_case(case: Case, device: str = "cpu") -> dict[str, Any]:
    """Estimate here, measure in a fresh process. `error` is (estimated - measured) / measured."""
    done = subprocess.run(
        [sys.executable, __file__, "--device", device, "--measure", json.dumps(asdict(case))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{case.name} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    planned = estimated(case, device)
    return found | planned | {"name": case.name, "error": planned["total"] / found["measured"] - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--rss", action="store_true", help="print the growth of the resident size too")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a case as JSON, measured in this process
    arguments = parser.parse_args()
    if arguments.measure:
        values = json.loads(arguments.measure)
        case = Case(**values | {"trainable": tuple(values["trainable"])})
        print(json.dumps(measure(case, arguments.device)))
        return
    print(f"{'case':<36}{'measured':>10}{'estimated':>11}{'error':>8}  MiB; the peak is at")
    for case in SMALL if arguments.device == "cpu" else LARGE:
        if arguments.only in case.name:
            row = run_case(case, arguments.device)
            rss = f", resident {row['rss'] / 2**20:,.0f}" if arguments.rss else ""
            print(
                f"{row['name']:<36}{row['measured'] / 2**20:>10,.0f}{row['total'] / 2**20:>11,.0f}"
                f"{row['error']:>8.1%}  {row['moment']}{rss}",
                flush=True,
            )


if __name__ == "__main__":
    main()
