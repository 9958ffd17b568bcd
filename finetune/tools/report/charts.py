"""Numbers as text, and curves and histograms as SVG."""

import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

MAX_POINTS = 160  # of a curve; more rows are drawn as means with their range as a band

# --- 1. Numbers ----------------------------------------------------------------------------------------------------

NumberFormat = Callable[[float], str]
format_percent: NumberFormat = "{:.1%}".format
format_seconds: NumberFormat = "{:.2f} s".format
format_count: NumberFormat = "{:,.0f}".format


def format_number(value: float) -> str:
    """Four significant digits, at most three after the point."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1e7 or abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.{max(0, min(3, 3 - math.floor(math.log10(abs(value)))))}f}"


def format_scientific(value: float) -> str:
    return f"{value:.2g}" if value == 0 or abs(value) >= 0.01 else f"{value:.1e}".replace("e-0", "e-")


def format_duration(value: float) -> str:
    """Seconds in the unit that a person would use."""
    if value < 90:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


# --- 2. Curves over steps ------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    style: str  # CSS class: train or held
    points: list[tuple[float, float]]  # step, value
    band: Sequence[tuple[float, float, float]] = ()  # step, lowest, highest


class Chart(NamedTuple):
    """A panel of the page; the template adds the caption."""

    title: str
    value: str  # the newest value
    base: str  # the base model's value, or ""
    hint: str
    svg: Markup
    data: str = ""  # JSON for script.js
    small: bool = False


def make_curve(style: str, rows: Sequence[dict], key: str) -> Curve:
    """The values under `key` over steps."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if len(points) <= MAX_POINTS:
        return Curve(style, points)
    parts = [part.T for part in np.array_split(np.array(points, dtype=float), MAX_POINTS)]
    means = [(float(steps.mean()), float(values.mean())) for steps, values in parts]
    band = [(float(steps.mean()), float(values.min()), float(values.max())) for steps, values in parts]
    return Curve(style, means, band)


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers in [low, high]."""
    span = high - low
    unit = 10 ** math.floor(math.log10(span / most))
    step = next(unit * factor for factor in (1, 2, 5, 10, 20) if span / (unit * factor) <= most)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def axis_limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a value axis that holds these values."""
    low, high = min(values), max(values)
    room = max(0.06 * (high - low), 0.002 * abs(high)) or 1.0
    return (0.0 if low >= 0 and low - room < 0.15 * high else low - room), high + room


def _tick_label(value: float, form: NumberFormat) -> str:
    if form is format_percent:
        return f"{100 * value:.6g}%"
    if form is format_scientific:
        return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    return f"{value / 1000:.6g}k" if abs(value) >= 1e4 else f"{value:.6g}"


class _Axes:
    """The plot area of a panel: pixels of a value on each axis, and the SVG that is drawn there."""

    def __init__(self, width: int, height: int, left: int, x_max: float, low: float, high: float):
        top, right, bottom = (6, 6, 16) if height < 140 else (8, 10, 22)  # margins; `left` is one too
        self.width, self.height = width, height
        self.left, self.right, self.top, self.bottom = left, width - right, top, height - bottom
        self.x_max, self.low, self.high = x_max, low, high
        self.parts: list[str] = []

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * value / self.x_max

    def y(self, value: float) -> float:
        value = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.top + (self.bottom - self.top) * (1 - value)

    def level(self, style: str, value: float) -> None:
        self.parts.append(f'<path class="{style}" d="M{self.left},{self.y(value):.1f}H{self.right}"/>')

    def shade(self, style: str, first: float, last: float) -> None:
        """Fill the area between two values."""
        shape = f"M{self.left},{self.y(first):.1f}H{self.right}V{self.y(last):.1f}H{self.left}Z"
        self.parts.append(f'<path class="{style}" d="{shape}"/>')

    def upright(self, style: str, x: str) -> None:
        self.parts.append(f'<path class="{style}" d="M{x},{self.top}V{self.bottom}"/>')

    def label_y(self, value: float, text: str) -> None:
        self.level("grid", value)
        self.parts.append(f'<text x="{self.left - 4}" y="{self.y(value) + 3.5:.1f}" text-anchor="end">{text}</text>')

    def label_x(self, value: float, text: str) -> None:
        self.parts.append(f'<text x="{self.x(value):.1f}" y="{self.height - 4}" text-anchor="middle">{text}</text>')

    def svg(self, label: str) -> Markup:
        head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(self.width, self.height, label)
        return head + Markup("".join(self.parts)) + Markup("</svg>")


def draw_chart(
    title: str,
    curves: Sequence[Curve],
    last_step: int,
    base: float | None = None,
    form: NumberFormat = format_number,
    hint: str = "",
    small: bool = False,
    limits: tuple[float, float] | None = None,
    recorded: float | None = None,
    allowed: tuple[float | None, float | None] | None = None,
) -> Chart | None:
    """Curves over steps; None if all points are of one step.

    Args:
        base: value of a dashed reference line.
        recorded: value of a dotted reference line, that of the recorded agents.
        allowed: lowest and highest value that the guard allows (None: any); the area beyond them is shaded.
        hint: unit of the value axis, or which direction is good.
        limits: of the value axis; fitted to the curves if None.
    """
    curves = [c for c in curves if c.points]
    if len({step for curve in curves for step, _ in curve.points}) < 2:
        return None
    low, high = limits or axis_limits([y for c in curves for _, y in c.points] + ([] if base is None else [base]))
    size = (176, 130, 30) if small else (340, 190, 46)
    axes = _Axes(*size, last_step, low, min(high, 1.0) if form is format_percent else high)
    for value in round_ticks(axes.low, axes.high, 3 if small else 5):
        axes.label_y(value, _tick_label(value, form))
    for step in round_ticks(0, last_step, 2 if small else 5):
        if step == round(step):
            axes.label_x(step, f"{step:,.0f}" if step < 1e4 else f"{step / 1000:g}k")
    for limit, edge in zip(allowed or (), (axes.low, axes.high)):
        if limit is not None:
            axes.shade("outside", limit, edge)
    if recorded is not None:
        axes.level("recorded", recorded)
    if base is not None:
        axes.level("base", base)
    at = lambda step, value: f"{axes.x(step):.1f},{axes.y(value):.1f}"
    for style, points, band in curves:
        if band:
            outline = [at(s, v) for s, _, v in band] + [at(s, v) for s, v, _ in reversed(band)]
            axes.parts.append(f'<path class="band {style}" d="M{"L".join(outline)}Z"/>')
        axes.parts.append(f'<path class="line {style}" d="M{"L".join(at(*point) for point in points)}"/>')
        if len(points) == 1 or (style == "held" and len(points) <= 60):
            radius = 1.8 if small else 2.6
            axes.parts += [
                f'<circle class="{style}" cx="{axes.x(s):.1f}" cy="{axes.y(v):.1f}" r="{radius}"/>' for s, v in points
            ]
    axes.upright("cursor", "0")
    data = {
        "left": axes.left / axes.width, "right": axes.right / axes.width, "width": axes.width, "last": last_step,
        "curves": [[style, [[round(s, 1), form(v)] for s, v in points]] for style, points, _ in curves],
    }  # fmt: skip
    step, newest = curves[-1].points[-1]
    reference = "" if base is None or small or step == 0 else form(base)  # step 0 is the base
    return Chart(title, form(newest), reference, hint, axes.svg(f"{title} over steps"), json.dumps(data), small)


class Estimate(NamedTuple):
    """A mean with its 95 % interval, as `evaluate` writes them to JSON."""

    mean: float
    low: float
    high: float


def draw_intervals(title: str, rows: Sequence[tuple[str, str, Estimate]], hint: str) -> Chart:
    """One line for each (label, CSS class, interval), on an axis that has zero."""
    known = [value for _, _, interval in rows for value in interval if math.isfinite(value)]
    low, high = min(0.0, *known), max(0.0, *known)
    room = 0.06 * (high - low) or 1.0
    low, high = low - room, high + room
    left, right, height = 96, 330, 20
    x = lambda value: left + (right - left) * (min(max(value, low), high) - low) / (high - low)
    bottom = height * len(rows) + 6
    parts = []
    for tick in round_ticks(low, high, 4):
        style = "zero" if abs(tick) < 1e-12 else "grid"
        parts.append(f'<path class="{style}" d="M{x(tick):.1f},4V{bottom}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 14}" text-anchor="middle">{tick:.6g}</text>')
    for i, (label, style, interval) in enumerate(rows):
        y = 4 + height * (i + 0.5)
        parts.append(f'<text x="{left - 8}" y="{y + 3.5}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<path class="line {style}" d="M{x(interval.low):.1f},{y}H{x(interval.high):.1f}"/>')
        parts.append(f'<circle class="{style}" cx="{x(interval.mean):.1f}" cy="{y}" r="3.2"/>')
    head = Markup('<svg viewBox="0 0 340 {}" role="img" aria-label="{}">').format(bottom + 20, title)
    return Chart(title, "", "", hint, head + Markup("".join(parts)) + Markup("</svg>"))


def draw_histogram(title: str, values: Sequence[float], mark: float | None) -> Chart:
    """Files by length in seconds; a dashed line marks the length of a window."""
    high = max(*values, mark or 0) * 1.03 or 1.0
    counts, edges = np.histogram(values, bins=30, range=(0, high))
    axes = _Axes(340, 150, 36, high, 0, int(counts.max()))
    for value in round_ticks(0, axes.high, 4):
        if value == round(value):
            axes.label_y(value, f"{value:,.0f}")
    for second in round_ticks(0, high, 6):
        axes.label_x(second, f"{second:g}")
    for n, a, b in zip(counts, edges, edges[1:]):
        if n:
            shape = f"M{axes.x(a) + 0.5:.1f},{axes.y(0):.1f}V{axes.y(n):.1f}H{axes.x(b) - 0.5:.1f}V{axes.y(0):.1f}Z"
            axes.parts.append(f'<path class="bin" d="{shape}"/>')
    hint = "seconds"
    if mark is not None:
        axes.upright("base", f"{axes.x(mark):.1f}")
        hint += f"; dashed: a window, {mark:g} s"
    return Chart(title, f"median {np.median(values):.1f} s", "", hint, axes.svg(title))
