"""Is every decoder that transformers has trained, generated and quantized rightly? Measures each and writes a table.

    python scripts/prove_decoders.py                          # all types, docs/models.md and what `vlm models` reads
    python scripts/prove_decoders.py llama mamba --out -      # some, printed

Every type is built at toy size from its config class (scripts/toy_decoders.py), in a process of its own. A type whose
numbers are wrong and that is not refused is a silent leak: the exit status is then 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from toy_decoders import toy_config, toy_decoder

from vlm.compat import prepare
from vlm.errors import ConfigError
from vlm.generation.batched import BatchedGenerator, Reply
from vlm.generation.generate import GenerationSettings, generate
from vlm.generation.sampling import SamplingSettings
from vlm.models.config import LLMConfig, LoRAConfig, ModelConfig
from vlm.models.decoders import find_linears
from vlm.models.families import FAMILIES, family_of, refuse_decoder
from vlm.models.head import find_logits_rule
from vlm.models.known import MEASURED
from vlm.models.llm import enable_gradient_checkpointing, settle_attention
from vlm.models.row_decoders import PlainDecoder, RowByRowDecoder
from vlm.models.trainable import set_trainable
from vlm.models.varlen import VARLEN
from vlm.models.vlm import VisionLanguageModel

prepare()

LENGTHS = ((11, 9, 12, 1, 1), (20, 14))  # records of the two rows; the last token of the first is padding
WORST = 1e-3  # of the largest value; where blocks run in loops (dory) rounding reaches 3e-4, the least leak is over 0.1
SECONDS = 600  # for one type; the slowest take 60 on a free core


@dataclass
class Measured:
    """One type. Differences are relative to the largest value of what they are compared with."""

    type: str
    state: str  # right, wrong, refused, not built
    reason: str = ""  # why it is not right
    model: str = ""  # transformers' class
    packing: str = ""  # varlen, positions, or one by one
    logits: float = 0.0  # packed through vlm, against the class's own forward of each record alone
    gradient: float = 0.0  # of the same, in all weights
    checkpointing: str = ""
    reply: str = ""  # as `vlm chat` writes it, against one without a cache
    serve: str = ""  # the same for `vlm serve`
    lora: str = ""
    targets: tuple[str, ...] = ()  # last parts of the names of those layers
    pipeline: str = ""
    plan: str = ""
    bits: str = ""


def measure(model_type: str) -> Measured:
    """Everything about one type. Raises nothing: what goes wrong is in `state` and `reason`."""
    family = FAMILIES.get(model_type)
    if family is not None and family.refused is not None:
        return Measured(model_type, "refused", family.refused)
    try:
        llm = toy_decoder(model_type)
    except Exception as error:
        return Measured(model_type, "not built", _one_line(error))
    row = Measured(model_type, "right", model=type(llm).__name__)
    try:
        refuse_decoder(llm.config.to_dict(), "toy")
    except ConfigError as error:
        return Measured(model_type, "refused", str(error).partition(" here: ")[2].partition(". docs")[0], row.model)
    for step in (_measure_packing, _measure_generation, _measure_plan, _measure_lora, _measure_bits):
        try:
            decoder = toy_decoder(model_type)
            settle_attention(decoder, "auto")
            step(row, decoder)
        except Exception as error:
            row.state, row.reason = "wrong", f"{step.__name__.removeprefix('_measure_')}: {_one_line(error)}"
            break
    return row


def _measure_packing(row: Measured, llm: Any) -> None:
    find_logits_rule(llm, "toy")
    model = VisionLanguageModel(llm)
    is_varlen = llm.config._attn_implementation == VARLEN
    row.packing = "varlen" if is_varlen else "positions" if model.packing.by_positions else "one by one"
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (2, sum(LENGTHS[0])))
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])
    together = model.logits(model(ids, positions))
    alone, packed = [], []
    for number, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths if number else lengths[:-1]:
            part = slice(start, start + length)
            alone.append(llm(input_ids=ids[number : number + 1, part], use_cache=False).logits[0])
            packed.append(together[number, part])
            start += length
    row.logits = _relative(torch.cat(packed), torch.cat(alone))
    ours, theirs = (_gradients(llm, torch.cat(part)) for part in (packed, alone))
    row.gradient = max(_relative(ours[name], theirs[name], floor=1e-3 * _largest(theirs)) for name in theirs)
    if max(row.logits, row.gradient) > WORST:
        row.state, row.reason = "wrong", "packed records are not what they are alone"


def _gradients(llm: Any, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    llm.zero_grad()
    logits.float().log_softmax(-1)[:, 5].sum().backward()
    return {name: p.grad.clone() for name, p in llm.named_parameters() if p.grad is not None}


def _largest(tensors: dict[str, torch.Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors.values())


@torch.no_grad()
def _measure_generation(row: Measured, llm: Any) -> None:
    model = VisionLanguageModel(llm).eval()
    torch.manual_seed(1)
    prompt = torch.randint(3, 60, (13,)).tolist()
    plain = list(prompt)
    for _ in range(10):
        plain.append(int(llm(input_ids=torch.tensor([plain]), use_cache=False).logits[0, -1].argmax()))
    expected = plain[len(prompt) :]
    row.reply = "same" if generate(model, prompt, None, set(), GenerationSettings(10)) == expected else "differs"
    served = {}
    for pieces in (512, 5):
        server = BatchedGenerator(model, max_tokens=1024, prefill_tokens=pieces)
        replies = [Reply(prompt, None, 10, set(), SamplingSettings(), lambda _: True, lambda _: None) for _ in range(2)]
        for reply in replies:
            server.add(reply)
        while server.step():
            pass
        served[pieces] = all(reply.new_ids == expected for reply in replies)
    kind = type(server.decoder)
    way = {PlainDecoder: "no cache", RowByRowDecoder: "row by row"}.get(kind, "all rows at once")
    row.serve = f"same, {way}" if all(served.values()) else "differs"
    if "differs" in (row.reply, row.serve):
        row.state, row.reason = "wrong", "a reply is not what the model writes without a cache"


def _measure_lora(row: Measured, llm: Any) -> None:
    model = VisionLanguageModel(llm).train()
    set_trainable(model, ["llm.lora"], LoRAConfig(rank=2))
    ids, positions = torch.arange(3, 23)[None], torch.cat([torch.arange(9), torch.arange(11)])[None]

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)  # some routers draw noise
        model.logits(model(ids, positions)).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "lora_B" in name}

    plain = gradients()
    row.targets = tuple(dict.fromkeys(name.rpartition(".")[2] for name in find_linears(toy_decoder(row.type))))
    count = sum("lora_B" in name for name, _ in model.named_parameters())
    idle = count - sum(bool(gradient.any()) for gradient in plain.values())
    row.lora = f"{count}" + (f", {idle} idle" if idle else "")
    try:
        enable_gradient_checkpointing(llm)
    except ValueError:
        row.checkpointing = "no"
        return
    again = gradients()
    row.checkpointing = "yes"
    if max(_relative(again[name], plain[name], floor=1e-3 * _largest(plain)) for name in plain) > WORST:
        row.state, row.reason, row.checkpointing = "wrong", "checkpointing changes a gradient", "differs"


def _measure_plan(row: Measured, llm: Any) -> None:
    from vlm.plan.shapes import read_shapes

    row.pipeline = "yes" if family_of(llm.config).parts else "refused"
    with tempfile.TemporaryDirectory() as folder:
        toy_config(row.type).save_pretrained(folder)
        shape = read_shapes(ModelConfig(llm=LLMConfig(path=folder), trainable=("llm",))).llm
    row.plan = f"{len(shape.blocks)} blocks"


@torch.no_grad()
def _measure_bits(row: Measured, llm: Any) -> None:
    from vlm.inference.quantize import quantize_linears

    counts = []
    for bits in (8, 4):
        model = toy_decoder(row.type) if bits == 4 else llm
        counts.append(quantize_linears(model, bits, torch.float32, torch.device("cpu")))
        hidden_states = VisionLanguageModel(model)(torch.arange(3, 15)[None], torch.arange(12)[None])
        if not hidden_states.isfinite().all():
            row.state, row.reason = "wrong", f"{bits} bits: not finite"
    row.bits = f"{counts[0]} / {counts[1]}"


def _relative(ours: torch.Tensor, theirs: torch.Tensor, floor: float = 1e-9) -> float:
    return float((ours - theirs).abs().max()) / max(float(theirs.abs().max()), floor)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _worker(model_type: str, path: str) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    torch.set_num_threads(1)
    Path(path).write_text(json.dumps(asdict(measure(model_type))))


def measure_apart(model_type: str, folder: str) -> Measured:
    """`measure` in a process of its own, so that a crash or an endless loop is a line of the table too."""
    path = Path(folder) / f"{model_type}.json"
    process = multiprocessing.get_context("fork").Process(target=_worker, args=(model_type, str(path)))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return Measured(model_type, "not built", f"did not end in {SECONDS} s")
    if not path.exists():
        return Measured(model_type, "not built", f"its process ended with {process.exitcode}")
    return Measured(**json.loads(path.read_text()))


def as_markdown(rows: Sequence[Measured], seconds: float) -> str:
    """docs/models.md."""
    import bitsandbytes
    import peft
    import transformers

    right = [row for row in rows if row.state == "right"]
    by_state = {state: [row for row in rows if row.state == state] for state in ("wrong", "refused", "not built")}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    lines = [
        _HEAD.format(
            versions=f"{versions}, bitsandbytes {bitsandbytes.__version__}", seconds=seconds, right=len(right),
            one_by_one=sum(row.packing == "one by one" for row in right), wrong=len(by_state["wrong"]),
            refused=len(by_state["refused"]), left=len(by_state["not built"]),
        ),
        _line("type", *_COLUMNS),
        "|---" * (len(_COLUMNS) + 1) + "|",
        *(_line(f"`{row.type}`", *(_cell(row, name) for name in _COLUMNS.values())) for row in right),
    ]  # fmt: skip
    titles = {"wrong": "Wrong", "refused": "Refused by name, before weights are loaded", "not built": "Not measured"}
    for state, title in titles.items():
        if by_state[state]:
            lines += ["", f"## {title}", "", "| type | why |", "|---|---|"]
            lines += [f"| `{row.type}` | {row.reason.replace('|', ' ')} |" for row in by_state[state]]
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[Measured]) -> str:
    """What `vlm models` reads: one type a line, without what is empty or was not measured."""
    lines = [
        {
            key: float(f"{value:.0e}") if isinstance(value, float) else value  # one digit of a difference is enough
            for key, value in asdict(row).items()
            if value not in ("", ()) and (value or row.state == "right")
        }
        for row in rows
    ]
    return "[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n"


_COLUMNS = {
    "packed rows": "packing", "logits": "logits", "gradient": "gradient", "checkpointing": "checkpointing",
    "reply": "reply", "serve": "serve", "LoRA": "lora", "pipeline": "pipeline", "plan": "plan", "8 / 4 bits": "bits",
}  # fmt: skip


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(row: Measured, name: str) -> str:
    value = getattr(row, name)
    return f"{value:.0e}" if isinstance(value, float) else value


_HEAD = """# Decoders

Written by `python scripts/prove_decoders.py`: every causal language model of transformers, built at toy size (width 64,
4 blocks or so, windows of 6 tokens) from its config class with random weights, and measured on a CPU without CUDA
kernels. {versions}; {seconds:.0f} s.

**{right} types are right, {one_by_one} of them with records decoded one by one; {wrong} leak in silence; {refused} are
refused by name; {left} could not be built at toy size.** A type that is not listed (newer, or with code of its own) is
decoded one by one. Of every type, head and embeddings are compared with its own forward when it is loaded.

- packed rows: `varlen`: attention is told where records end and computes each by itself, without a mask. `positions`:
  transformers' mask keeps them apart, made of restarting positions. `one by one`: the
  class would let them see each other, so each is a row of its own inside the forward: slower, and one line of the log
  says so. No class's segment arguments (`seq_idx`, `cu_seq_lens_q`) are honoured on a CPU, so they are not used. ZeRO 3
  and fsdp on several ranks refuse these types by name.
- logits: of records in packed rows, as `vlm` computes them, against transformers' own forward of each record alone,
  scale and soft cap of the head included: the largest difference, relative to the largest logit.
- gradient: the same for the gradient of every weight.
- checkpointing: whether `model.gradient_checkpointing` works; it changes no gradient.
- reply: ten tokens as `vlm chat` writes them, against the model without a cache.
- serve: two requests as `vlm serve` writes them, the prompt read at once and in pieces, and how: all rows in one
  forward, row by row with a cache, or row by row without one (slow).
- LoRA: linear layers that `targets: all-linear` finds; idle ones got no gradient.
- pipeline: whether `engine.kind: pipeline` can cut it; the others are refused by name.
- plan: blocks that `vlm plan` finds.
- 8 / 4 bits: linear layers that `--bits` quantizes. Experts that lie in one tensor stay as they are, and the log says
  so.

Chat templates belong to a folder's tokenizer, not to a type: see [data.md](data.md).
"""


def main() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for name in ("bitsandbytes", "peft"):  # once, and not in every process
        importlib.import_module(name)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types of transformers; none: all")
    parser.add_argument("--out", default="docs/models.md", help="where to write; - prints")
    parser.add_argument("--jobs", type=int, default=1, help="types measured at the same time")
    arguments = parser.parse_args()
    began, rows = time.monotonic(), []
    types = arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(lambda model_type: measure_apart(model_type, folder), types):
            rows.append(row)
            print(f"{row.type}: {row.state} {row.reason}", file=sys.stderr, flush=True)
    text = as_markdown(rows, time.monotonic() - began)
    if arguments.out == "-":
        print(text)
    else:
        Path(arguments.out).write_text(text, encoding="utf-8")
        MEASURED.write_text(as_json(rows), encoding="utf-8")
    sys.exit(any(row.state == "wrong" for row in rows))


if __name__ == "__main__":
    main()
