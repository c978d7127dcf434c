"""The machine that the program runs on, measured in at most 20 seconds and remembered.

With as many threads as training would have, the fastest of several rounds: other programs that run beside it only make
a call look slower. Of one thread its processor time counts, which leaves out when others had the core.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.batch import ImageSpec
from vlm.logs import warn
from vlm.plan.link import measure_link
from vlm.plan.machine import HEAD_DIM, HEADS, Machine
from vlm.precision import remember

_VERSION = 3  # of what is measured
_BUDGET = 0.03  # seconds that a call is repeated for, after a first one that warms up
_LONG_BUDGET = 0.3  # of calls that are few
_ROUNDS = 2  # of all products: what disturbs one of them is gone at the next
_LONGEST = 0.1  # seconds: a product that would take longer is taken to be as fast as the next smaller one

# powers of a number, so that steps on the logarithmic axes are equal; larger ones on a GPU
_SHAPES = {"cpu": ((16, 128, 1024), (16, 64, 256, 1024)), "cuda": ((64, 512, 4096), (64, 256, 1024, 4096, 16384))}
_NUMBERS = {"cpu": (100, 10_000, 100_000, 1_000_000, 4_000_000, 16_000_000), "cuda": (1000, 10**6, 10**7, 10**8)}
_LENGTHS = {"cpu": (16, 64, 256, 1024), "cuda": (64, 512, 4096)}
# A call that is repeated finds its numbers in a CPU's cache. In a step it does not, and takes so many times as long, as
# fitted to the 20 models of scripts/bench_plan_time.py. From so many numbers on it does not find them here either.
_IN_A_STEP, _BEYOND_CACHE = 2.8, 4_000_000
_ADAM_PARAMETERS = {"cpu": 16_000_000, "cuda": 50_000_000}
_LINKS = {"cpu": 1e9, "cuda": 25e9}  # bytes a second, where it is not measured
_LARGE, _SMALL = (640, 480), (64, 48)  # pixels of the images that are decoded
_SIDE, _LEAST = 336, 16  # of what an encoder sees of them


def measured_machine(device: torch.device, dtype: torch.dtype, again: bool = False, has_ranks: bool = False) -> Machine:
    """The machine here; measured when it is asked for the first time, for this device, format and number of threads.

    Args:
        dtype: that linear layers compute in.
        again: measure now, whatever is remembered.
        has_ranks: whether several processes train: on a CPU what they send each other is measured too.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    name = str(dtype).removeprefix("torch.")
    key = f"speed {_VERSION} of {device.type}, {name}, {threads} threads"
    found = remember(key, lambda: _measure(device, dtype), again, keep=is_undisturbed)
    link = remember(f"link {_VERSION}", measure_link, again) if has_ranks and device.type == "cpu" else None
    where = "the GPU here" if device.type == "cuda" else f"this CPU, {threads} thread{'s' if threads > 1 else ''}"
    return Machine(
        name=f"{where}, {name}, measured {found['when']}",
        products=tuple(map(tuple, found["products"])),
        sweeps=tuple(_in_a_step(*row) if device.type == "cpu" else tuple(row) for row in found["sweeps"]),
        attention=tuple(map(tuple, found["attention"])),
        adam=found["adam"],
        image=found["image"],
        decode=found["decode"],
        fit=found["fit"],
        link=link or _LINKS[device.type],
        is_link_assumed=link is None,
    )


def is_undisturbed(found: dict[str, Any]) -> bool:
    """Whether all threads together were at least half as fast as one of them in processor time, which nothing else on
    the machine slows down. Threads that wait for a core make a product slower by any factor; a warning says so."""
    fastest = max(rate for *_, rate in found["products"])
    if found["one_thread"] <= 2 * fastest:
        return True
    warn(
        f"matrix products took {found['one_thread'] / fastest:.0f} times as long on all threads as on one: other "
        "programs keep the cores busy. The times below are too long, and not remembered; ask again when those are done"
    )
    return False


def _in_a_step(numbers: float, light: float, heavy: float) -> tuple[float, float, float]:
    """
    >>> _in_a_step(100, 1e-6, 2e-6) == (100, _IN_A_STEP * 1e-6, _IN_A_STEP * 2e-6)
    True
    """
    factor = _IN_A_STEP if numbers < _BEYOND_CACHE else 1.0
    return numbers, factor * light, factor * heavy


def _measure(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    kind = device.type
    with torch.random.fork_rng(devices=[]):
        return {
            "when": time.strftime("%Y-%m-%d"),
            "products": _products(device, dtype),
            "one_thread": _one_thread(dtype) if kind == "cpu" else 0.0,
            "sweeps": [_sweep(numbers, device, dtype) for numbers in _NUMBERS[kind]],
            "attention": [_attention(length, device, dtype) for length in _LENGTHS[kind]],
            "adam": _adam(_ADAM_PARAMETERS[kind], device),
            **_decoding(),
        }


def _fastest(call: Callable[[], Any], device: torch.device, budget: float = _BUDGET) -> float:
    """Seconds of a call, which ends when its results are there.

    Of several threads the shortest reading counts, of one thread the lower quartile: a virtual machine takes the time
    that its host gave to others from the processor time of whichever call comes next, down to nothing.
    """
    is_processor_time = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if is_processor_time else time.perf_counter

    def once() -> float:
        started = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - started

    once()
    readings, started = [once()], time.perf_counter()
    while time.perf_counter() - started < budget or not any(readings):
        readings.append(once())
    readings = sorted(filter(None, readings))
    return readings[len(readings) // 4 if is_processor_time else 0]


@torch.no_grad()
def _products(device: torch.device, dtype: torch.dtype) -> list[list[float]]:
    """Rows, inner, columns, operations a second, the smaller ones first."""
    rows, others = _SHAPES[device.type]
    found: dict[tuple[int, int, int], float] = {}
    for m, k, n in [*product(rows, others, others)] * _ROUNDS:
        smaller = (place for place in found if place != (m, k, n) and place <= (m, k, n))
        before = [found[place] for place in smaller if place[1] <= k and place[2] <= n]
        operations = 2.0 * m * k * n
        if before and operations / before[-1] > _LONGEST:
            found[m, k, n] = before[-1]
            continue
        left, right = torch.ones(m, k, device=device, dtype=dtype), torch.ones(n, k, device=device, dtype=dtype)
        rate = operations / _fastest(lambda a=left, b=right: F.linear(a, b), device)  # type: ignore[misc]
        found[m, k, n] = max(rate, found.get((m, k, n), 0.0))
    return [[*place, rate] for place, rate in found.items()]


@torch.no_grad()
def _one_thread(dtype: torch.dtype) -> float:
    """Operations a second of a large product on one thread, in its processor time."""
    threads, side = torch.get_num_threads(), max(_SHAPES["cpu"][1])
    left, right = torch.ones(side, side, dtype=dtype), torch.ones(side, side, dtype=dtype)
    torch.set_num_threads(1)
    try:
        return 2.0 * side**3 / _fastest(lambda: F.linear(left, right), torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _sweep(numbers: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Numbers; seconds of a product of two tensors of so many; of an activation."""
    one, other = (torch.ones(numbers, device=device, dtype=dtype) for _ in range(2))
    return [numbers, *(_fastest(call, device, _LONG_BUDGET) for call in (lambda: one * other, lambda: F.silu(one)))]


def _attention(length: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Tokens; seconds of a causal call forward; backward."""
    shape = (1, HEADS, length, HEAD_DIM)
    query, key, value = (torch.ones(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def forward() -> Tensor:
        """[1, H, L, d]"""
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    out = forward()
    gradient = torch.ones_like(out)

    def backward() -> object:
        return torch.autograd.grad(out, (query, key, value), gradient, retain_graph=True)

    return [length, *(_fastest(call, device, _LONG_BUDGET) for call in (forward, backward))]


def _adam(parameters: int, device: torch.device) -> float:
    """Seconds a parameter of an optimizer's step."""
    weight = torch.nn.Parameter(torch.ones(parameters, device=device))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    return _fastest(optimizer.step, device, _LONG_BUDGET) / parameters


def _decoding() -> dict[str, float]:
    """Seconds of one process for each image, for each pixel of its file, and for each pixel that the encoder sees."""
    large, small, least = (_decode(*size, side) for size, side in ((_LARGE, _SIDE), (_SMALL, _SIDE), (_SMALL, _LEAST)))
    decode = max(0.0, large - small) / (math.prod(_LARGE) - math.prod(_SMALL))
    fit = max(0.0, small - least) / (_SIDE**2 - _LEAST**2)
    return {"image": max(0.0, least - decode * math.prod(_SMALL) - fit * _LEAST**2), "decode": decode, "fit": fit}


def _decode(width: int, height: int, side: int) -> float:
    """Seconds of a JPEG, for an encoder that sees `side` x `side`."""
    from PIL import Image

    from vlm.data.images import load_tiles

    spec = ImageSpec(size=side, mean=(0.5,) * 3, std=(0.5,) * 3, num_tokens=1)
    noise = torch.randint(0, 255, (60, 80, 3), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(noise.numpy()).resize((width, height)).save(file, "JPEG", quality=90)
    return _fastest(lambda: load_tiles(file.getvalue(), spec), torch.device("cpu"), _LONG_BUDGET)
