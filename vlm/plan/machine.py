"""How fast a machine does what a training step is made of.

`vlm.plan.measure` measures the machine that the program runs on; `DATA_SHEETS` describe some that are not at hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from vlm.errors import ConfigError
from vlm.plan.cost import Attention, Product, Sweep

HEADS, HEAD_DIM = 8, 64  # of the attention that is timed
_EVERYTHING_SEEN = 1.5  # times as long on a length as with a causal mask: half of the pairs more, at a higher rate

Row = tuple[float, ...]


@dataclass(frozen=True)
class Machine:
    """Seconds of each kind of work on one device."""

    name: str
    products: tuple[Row, ...]  # rows, inner, columns, operations a second
    sweeps: tuple[Row, ...]  # numbers; seconds of a sum of two tensors of so many; of an activation
    attention: tuple[Row, ...]  # tokens; seconds of a causal call with 8 heads of 64, forward; backward
    adam: float  # seconds a trained parameter
    image: float  # seconds of one core for each image
    decode: float  # and for each pixel of its file
    fit: float  # and for each pixel that the encoder sees of it
    link: float  # bytes a second that a device sends to another
    assumption: str = ""  # what of it is not measured
    is_link_assumed: bool = False

    def seconds(self, work: Product | Attention | Sweep) -> float:
        if not work.times:
            return 0.0
        if isinstance(work, Product):
            return self._product(work)
        return self._attention(work) if isinstance(work, Attention) else self._sweep(work)

    def reading(self, pixels: float, side: int) -> float:
        """Seconds of one core for an image file of so many pixels, for an encoder that sees `side` x `side`."""
        return self.image + self.decode * pixels + self.fit * side**2

    def _product(self, work: Product) -> float:
        """Between the measured shapes seconds per operation are linear in the logarithm of each size."""
        if not work.operations:
            return 0.0
        rates = {row[:3]: row[3] for row in self.products}
        axes = [sorted({place[axis] for place in rates}) for axis in range(3)]
        wanted = (work.rows, work.inner, work.columns)
        corners = product(*(_between(axis, value) for axis, value in zip(axes, wanted, strict=True)))
        each = sum(a * b * c / rates[x, y, z] for (x, a), (y, b), (z, c) in corners)
        return work.operations * each

    def _sweep(self, work: Sweep) -> float:
        column = 2 if work.is_heavy else 1
        return work.times * _along([(row[0], row[column]) for row in self.sweeps], work.numbers)

    def _attention(self, work: Attention) -> float:
        forward, backward = (_along([(row[0], row[i]) for row in self.attention], work.length, power=2) for i in (1, 2))
        scale = work.width / (HEADS * HEAD_DIM) * (1 if work.is_causal else _EVERYTHING_SEEN)
        return work.times * scale * (forward * work.forwards + backward * work.backwards)


def _between(axis: Sequence[float], value: float) -> list[tuple[float, float]]:
    """The neighbours of a value and their shares, by its logarithm; at the ends, the last one alone.

    >>> _between([16, 64, 256], 32)
    [(16, 0.5), (64, 0.5)]
    """
    if value <= axis[0]:
        return [(axis[0], 1.0)]
    for low, high in pairwise(axis):
        if value < high:
            share = math.log(value / low) / math.log(high / low)
            return [(low, 1 - share), (high, share)]
    return [(axis[-1], 1.0)]


def _along(points: Sequence[tuple[float, float]], size: float, power: int = 1) -> float:
    """Seconds at a size, between measured ones on logarithmic axes; beyond the last, by a power of the size.

    >>> round(_along([(1, 1.0), (100, 10.0)], 10), 3), _along([(1, 1.0), (100, 10.0)], 200)
    (3.162, 20.0)
    """
    last, seconds = points[-1]
    if size >= last:
        return seconds * (size / last) ** power
    at = dict(points)
    return math.exp(sum(share * math.log(at[place]) for place, share in _between(list(at), size)))


@dataclass(frozen=True)
class DataSheet:
    """What the maker says of a GPU."""

    tflops: float  # dense, bfloat16 with float32 sums
    memory: float  # GB
    bandwidth: float  # GB/s of memory
    link: float  # GB/s to another GPU of the machine, one way


DATA_SHEETS = {
    "H200": DataSheet(989, 141, 4800, 450),
    "H100": DataSheet(989, 80, 3350, 450),
    "A100": DataSheet(312, 80, 2039, 300),
    "L40S": DataSheet(362, 48, 864, 32),
    "4090": DataSheet(165, 24, 1008, 32),
    "3090": DataSheet(71, 24, 936, 56),
}
SHARE_OF_PEAK = 0.6  # of the operations a second, in large products; 0.4 inside attention
_SHARE_IN_ATTENTION, _SHARE_OF_BANDWIDTH, _SHARE_OF_LINK = 0.4, 0.75, 0.6
_LAUNCH = 6e-6  # seconds from one operator to the next, which no kernel is shorter than
_HALF_SPEED = 192  # rows, inner or columns at which a product runs at half its rate
_HOST_IMAGE, _HOST_DECODE, _HOST_FIT = 3e-4, 1.4e-8, 1.2e-8  # on one core: 6 ms for 640 x 480 to 336 x 336


def sheet_of(name: str) -> DataSheet:
    """Raises ConfigError where the data sheet is not known here."""
    sheet = DATA_SHEETS.get(name.upper())
    if sheet is None:
        raise ConfigError(f"--gpu {name}: expected one whose data sheet is known: {', '.join(DATA_SHEETS)}")
    return sheet


def machine_of_sheet(name: str) -> Machine:
    """A GPU that is not at hand, from its data sheet and assumed shares of it. Raises ConfigError as `sheet_of`."""
    sheet = sheet_of(name)
    peak = sheet.tflops * 1e12
    sizes = (16, 64, 256, 1024, 4096, 16384)

    def share(size: float) -> float:
        return size / (size + _HALF_SPEED)

    products = tuple(
        (*place, SHARE_OF_PEAK * peak * share(place[0]) * share(place[1]) * share(place[2]))
        for place in product(sizes, sizes, sizes)
    )
    sweeps = []
    for numbers in (1e3, 1e5, 1e6, 1e7, 1e8):
        seconds = _LAUNCH + 3 * 2 * numbers / (sheet.bandwidth * 1e9 * _SHARE_OF_BANDWIDTH)
        sweeps.append((numbers, seconds, seconds))
    attention = []
    for length in (16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0):
        forward = 2 * length**2 * HEADS * HEAD_DIM / (peak * _SHARE_IN_ATTENTION * share(length))
        attention.append((length, _LAUNCH / 8 + forward, _LAUNCH / 4 + 2.5 * forward))
    return Machine(
        name=f"one {name.upper()}, by its data sheet",
        products=products,
        sweeps=tuple(sweeps),
        attention=tuple(attention),
        adam=28 / (sheet.bandwidth * 1e9 * _SHARE_OF_BANDWIDTH),
        image=_HOST_IMAGE,
        decode=_HOST_DECODE,
        fit=_HOST_FIT,
        link=sheet.link * 1e9 * _SHARE_OF_LINK,
        assumption=(
            f"not measured: {SHARE_OF_PEAK:.0%} of {sheet.tflops:g} bf16 TFLOPS in large products, "
            f"{_SHARE_IN_ATTENTION:.0%} in attention, {_SHARE_OF_BANDWIDTH:.0%} of {sheet.bandwidth:,g} GB/s of "
            f"memory, {_SHARE_OF_LINK:.0%} of {sheet.link:g} GB/s between GPUs are assumed"
        ),
    )
