"""Peak memory and time of the chunked loss against the full one, timed in turn in one process each.

    python scripts/bench_loss.py --tokens 2048 --supervised 0.3 --vocab 152064 --width 896

Prints one line per variant and the ratios. Peak memory is the growth of the process's resident size over a
forward and backward pass, or the allocator's peak on a GPU; every variant runs in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

VARIANTS = ("full", "chunked")


def measure(variant: str, arguments: argparse.Namespace) -> dict[str, float]:
    import torch
    import torch.nn.functional as F

    from vlm.models.loss import chunked_cross_entropy

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16
    hidden = torch.randn(1, arguments.tokens, arguments.width, device=device, dtype=dtype, requires_grad=True)
    head = torch.randn(arguments.vocab, arguments.width, device=device, dtype=dtype)  # frozen
    labels = torch.randint(0, arguments.vocab, (1, arguments.tokens), device=device)
    labels[torch.rand(labels.shape, device=device) > arguments.supervised] = -100

    def full() -> torch.Tensor:
        logits = (hidden @ head.T).float()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")

    def chunked() -> torch.Tensor:
        return chunked_cross_entropy(hidden, labels, lambda states: states @ head.T, arguments.chunk)

    compute = {"full": full, "chunked": chunked}[variant]
    before = _peak_bytes(device)
    started = time.perf_counter()
    loss = compute()
    loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {"loss": loss.item(), "peak_mib": (_peak_bytes(device) - before) / 2**20, "seconds": seconds}


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="L, tokens in the batch")
    parser.add_argument("--supervised", type=float, default=0.3, help="share of tokens that carry a label")
    parser.add_argument("--vocab", type=int, default=152_064, help="V, Qwen2.5's is 152,064")
    parser.add_argument("--width", type=int, default=896, help="D, Qwen2.5-0.5B's is 896")
    parser.add_argument("--chunk", type=int, default=256, help="supervised positions per chunk")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(measure(arguments.variant, arguments)))
        return
    results = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        results[variant] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(variant, json.dumps(results[variant]))
    full, chunked = results["full"], results["chunked"]
    print(f"peak memory full / chunked: {full['peak_mib'] / chunked['peak_mib']:.1f}")
    print(f"time full / chunked: {full['seconds'] / chunked['seconds']:.2f}")
    print(f"relative difference of the losses: {abs(full['loss'] / chunked['loss'] - 1):.1e}")


if __name__ == "__main__":
    main()
