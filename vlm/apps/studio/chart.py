"""Curves of several runs as an SVG, in the page's colours."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlm.runs import Series

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 240, 64, 12, 10, 24  # units of the drawing
# told apart by the colour-blind too (Okabe and Ito 2008)
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    label: str
    series: Series
    group: int = 0  # curves of a group have one colour
    is_dashed: bool = False


def chart_html(title: str, curves: Sequence[Curve]) -> str:
    """A chart with its title, axes and a legend that has each curve's last value; empty where nothing can be drawn.

    Values that are not finite are left out.
    """
    lines = [(curve, found) for curve in curves if (found := _finite(curve.series))]
    every = [point for _, found in lines for point in found]
    if not every:
        return ""
    first, last = min(step for step, _ in every), max(step for step, _ in every)
    low, high = min(value for _, value in every), max(value for _, value in every)
    margin = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * (step - first) / max(last - first, 1)
        return x, _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    parts = [_horizontal(place(first, value)[1], value) for value in ticks(low, high)]
    parts += [_vertical(place(step, low)[0], step) for step in ticks(first, last) if step == int(step)]
    for curve, found in lines:
        shape = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in found))
        dash = " stroke-dasharray='5 3'" if curve.is_dashed else ""
        line = f"<polyline points='{shape}' stroke='{colour(curve.group)}'{dash}/>"
        dot = place(*found[-1])
        parts.append(f"{line}<circle cx='{dot[0]:.1f}' cy='{dot[1]:.1f}' r='2.5' fill='{colour(curve.group)}'/>")
    legend = "".join(_legend(curve, found[-1][1]) for curve, found in lines)
    svg = f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{html.escape(title)}'>{''.join(parts)}</svg>"
    return f"<figure class='chart'><figcaption>{html.escape(title)}</figcaption>{svg}<div>{legend}</div></figure>"


def colour(group: int) -> str:
    return _COLOURS[group % len(_COLOURS)]


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them.

    >>> ticks(0.3, 5.2), ticks(0, 60), ticks(3, 3)
    ([1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0], [3.0])
    """
    if high <= low:
        return [float(low)]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [float(f"{number * step:.12g}") for number in numbers]


def _finite(series: Series) -> list[tuple[int, float]]:
    return [point for point in zip(series.steps, series.values, strict=True) if math.isfinite(point[1])]


def _horizontal(y: float, value: float) -> str:
    line = f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>"
    return f"{line}<text x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{value:,.4g}</text>"


def _vertical(x: float, step: float) -> str:
    line = f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{_TOP}' y2='{_HEIGHT - _BOTTOM}'/>"
    return f"{line}<text x='{x:.1f}' y='{_HEIGHT - 8}' text-anchor='middle'>{step:,.0f}</text>"


def _legend(curve: Curve, value: float) -> str:
    style = "dashed" if curve.is_dashed else "solid"
    mark = f"<i style='border-top: 2px {style} {colour(curve.group)}'></i>"
    return f"<span>{mark}{html.escape(curve.label)} <b>{value:,.4g}</b></span>"
