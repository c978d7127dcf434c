"""What `torch.compile` (dynamic=True) of a decoder block gives: forward and backward of rows of records, each of its
own length, without and with it, in turn.

    python scripts/bench_compile.py --threads 1 --rounds 30

The block is the benches' toy language model's (Qwen2's form, 512 wide), its attention goes record by record. Prints
seconds of processor time per row, what compiling took, and after how many rows through a block that is regained.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from bench_peers.parts import SHAPES
from torch import Tensor

Block = Callable[[Tensor, Tensor, Tensor], Tensor]  # [1, T, D], position_ids [1, T] and a layout -> [1, T, D]
TOLERANCE = 1e-5  # relative, of the sum of a row's states; worst seen 5e-7


def make_block() -> tuple[Block, torch.nn.Module]:
    """A block with rotary positions, and the module that holds its weights."""
    from vlm.models.varlen import VARLEN, register

    register()
    from transformers import Qwen2Config, Qwen2Model

    width, mlp, _, heads, key_heads = SHAPES["toy"].llm
    config = Qwen2Config(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=8, attn_implementation=VARLEN,
    )  # fmt: skip
    model = Qwen2Model(config)

    def block(hidden: Tensor, position_ids: Tensor, layout: Tensor) -> Tensor:
        embeddings = model.rotary_emb(hidden, position_ids)
        return model.layers[0](
            hidden, attention_mask=layout, position_ids=position_ids, position_embeddings=embeddings, use_cache=False
        )

    return block, model


def draw_row(rng: random.Random, length: int) -> tuple[Tensor, Tensor]:
    """position_ids int64 [1, T] and the layout of records of 200 to 600 tokens, as many as fit."""
    from vlm.models.varlen import lay_end_to_end

    lengths: list[int] = []
    while sum(lengths) + 600 <= length:
        lengths.append(rng.randint(200, 600))
    row = lay_end_to_end(torch.cat([torch.arange(each) for each in lengths])[None])
    return row.position_ids, row.layout


def run(block: Block, model: torch.nn.Module, hidden: Tensor, row: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Processor seconds of a forward and backward, and the sum of the states [1, T, D]."""
    model.zero_grad()
    leaf = hidden[:, : row[0].shape[1]].clone().requires_grad_()
    started = time.process_time()
    total = block(leaf, *row).square().sum()
    total.backward()
    return time.process_time() - started, total.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30, help="rows, each of its own length")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row, at most")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rng = random.Random(0)
    block, model = make_block()
    compiled = torch.compile(block, dynamic=True)
    hidden = torch.randn(1, arguments.length, SHAPES["toy"].llm[0])
    rows = [draw_row(rng, arguments.length) for _ in range(arguments.rounds)]
    started = time.perf_counter()
    for row in rows[:3]:  # of several lengths, so that nothing is compiled again later
        run(compiled, model, hidden, row)
    compiling = time.perf_counter() - started
    seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
    for row in rows[3:]:
        (eager, one), (other, two) = (run(each, model, hidden, row) for each in (block, compiled))
        seconds["eager"].append(eager)
        seconds["compiled"].append(other)
        assert abs(two / one - 1) < TOLERANCE, (one, two)
    eager, faster = (statistics.median(each) for each in seconds.values())
    print(f"eager {eager:.4f} s, compiled {faster:.4f} s a row and block: {eager / faster:.2f}")
    print(f"compiling, first rows included: {compiling:.1f} s of wall time")
    gain = eager - faster
    print(f"regained after {compiling / gain:,.0f} rows through one block" if gain > 0 else "never regained")


if __name__ == "__main__":
    main()
