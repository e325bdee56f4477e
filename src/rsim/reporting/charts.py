"""Line and area charts as inline SVG strings, for pages that must stand alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from html import escape

# Nine colours that stay apart from each other, and 3 : 1 from light and dark paper (WCAG 1.4.11); more labels start over.
COLOURS = ("#4c78a8", "#d8742f", "#3d9a6d", "#d4525f", "#8465b8", "#b08d1c", "#2f97a6", "#c767a2", "#7d8590")

_WIDTH, _HEIGHT = 420, 224
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 10, 40
_X_LABEL = "training step"
_HOVERED = 400  # places along a chart that show their values

Row = tuple[float, list[str]]  # a step, and what the legend says there


@dataclass(frozen=True)
class Series:
    """``points`` are ``(x, y)``; ``band`` holds ``(x, low, high)``; ``dots`` draws marks as well as the line."""

    name: str
    points: list[tuple[float, float]]
    colour: str
    band: tuple[tuple[float, float, float], ...] = ()
    dots: bool = False


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def line_chart(title: str, series: list[Series], marks: list[tuple[float, str]], unit: str = "") -> str:
    """Lines over training steps; ``marks`` are vertical lines with a label (where a stage begins). Where ``unit``, the label of
    the other axis, begins with "share", numbers are shown in percent."""
    series = [s for s in series if s.points]
    if not series:
        return ""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + [v for s in series for _, low, high in s.band for v in (low, high)]
    frame = _Frame(min(xs), max(xs), *_nice_range(min(ys), max(ys)))
    body = frame.axes(marks, unit)
    values = [dict(s.points) for s in series]
    rows = [(x, [_value(v.get(x), unit) for v in values]) for x in sorted(set(xs))]
    for s in series:
        if s.band:
            edge = [(x, high) for x, _, high in s.band] + [(x, low) for x, low, _ in reversed(s.band)]
            body += f'<polygon points="{frame.path(edge)}" fill="{s.colour}" opacity="0.15"/>'
        body += f'<polyline points="{frame.path(s.points)}" fill="none" stroke="{s.colour}" stroke-width="1.6"/>'
        shown = s.points if s.dots or len(s.points) == 1 else []
        for x, y in shown:
            body += f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3" fill="{s.colour}"/>'
    legend = [(s.name, s.colour, _value(s.points[-1][1], unit)) for s in series]
    return _figure(title, frame, body, legend, rows)


def area_chart(title: str, names: list[str], rows: list[tuple[float, list[float]]], marks: list[tuple[float, str]]) -> str:
    """Shares of each name over training steps, stacked to 100%; ``rows`` are ``(step, shares)``."""
    if not rows:
        return ""
    frame = _Frame(rows[0][0], rows[-1][0], 0.0, 1.0)
    body, below = "", [0.0] * len(rows)
    for index, name in enumerate(names):
        above = [b + shares[index] for b, (_, shares) in zip(below, rows, strict=True)]
        upper = [(x, a) for (x, _), a in zip(rows, above, strict=True)]
        lower = [(x, b) for (x, _), b in zip(rows, below, strict=True)]
        outline = frame.path(upper + lower[::-1])
        body += f'<polygon points="{outline}" fill="{colour(index)}"><title>{escape(name)}</title></polygon>'
        below = above
    legend = [(name, colour(i), f"{rows[0][1][i]:.0%} → {rows[-1][1][i]:.0%}") for i, name in enumerate(names)]
    shown = [(x, [f"{share:.0%}" for share in shares]) for x, shares in rows]
    return _figure(title, frame, body + frame.axes(marks, "share of steps"), legend, shown)


@dataclass(frozen=True)
class _Frame:
    """Data coordinates to the drawing's."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / ((self.x_high - self.x_low) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (_HEIGHT - _TOP - _BOTTOM)

    def path(self, points: list[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def axes(self, marks: list[tuple[float, str]], unit: str) -> str:
        drawn = ""
        for value in _ticks(self.y_low, self.y_high, 4):
            y = self.y(value)
            drawn += f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            drawn += f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_tick(value, unit)}</text>'
        for value in _ticks(self.x_low, self.x_high, 6, whole=True):
            place = f'x="{self.x(value):.1f}" y="{_HEIGHT - 23}"'
            drawn += f'<text class="tick" {place} text-anchor="middle">{value:,.10g}</text>'
        x, y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
        drawn += f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{_X_LABEL}</text>'
        place = f'x="12" y="{y:.1f}" transform="rotate(-90 12 {y:.1f})"'
        drawn += f'<text class="tick" {place} text-anchor="middle">{escape(unit)}</text>'
        for value, label in marks:
            if self.x_low <= value <= self.x_high:
                x = self.x(value)
                drawn += f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
                drawn += f'<text class="tick" x="{x + 4:.1f}" y="{_TOP + 9}">{escape(label)}</text>'
        return drawn


def _figure(title: str, frame: _Frame, body: str, legend: list[tuple[str, str, str]], rows: list[Row]) -> str:
    """``rows`` is what the page's script shows in the legend where the pointer is."""
    keys = "".join(f'<li><i style="background:{c}"></i>{escape(name)} <b>{escape(value)}</b></li>' for name, c, value in legend)
    every = math.ceil(len(rows) / _HOVERED)
    places = [[round(frame.x(x), 1), f"{x:,.10g}", values] for x, values in rows[::every]]
    hidden = f'<line class="cursor" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" visibility="hidden"/>'
    about = f'role="img" aria-label="{escape(title)}" data-places="{escape(json.dumps(places))}"'
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" {about}>{body}{hidden}</svg>'
    return f"<figure><figcaption>{escape(title)} <span></span></figcaption>{picture}<ul>{keys}</ul></figure>"


def _nice_range(low: float, high: float) -> tuple[float, float]:
    low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        high = low + 1.0
    step = _step(low, high, 4)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _step(low: float, high: float, count: int) -> float:
    raw = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(raw))
    return next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= raw * 0.999)


def _ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Round numbers from ``low`` to ``high``.

    >>> _ticks(0.0, 1.0, 4), _ticks(0, 2, 6, whole=True), _ticks(0, 14, 6, whole=True)
    ([0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 1.0, 2.0], [0.0, 3.0, 6.0, 9.0, 12.0])
    """
    if high <= low:
        return [low]
    step = float(math.ceil(_step(low, high, count) - 1e-9)) if whole else _step(low, high, count)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 10) for i in range(int((high - first * step) / step + 1e-6) + 1)]


def _tick(value: float, unit: str) -> str:
    """
    >>> _tick(0.5, "share of steps"), _tick(0.0025, "share of steps"), _tick(1500000.0, "tokens")
    ('50%', '0.25%', '1,500,000')
    """
    return f"{100 * value:.6g}%" if unit.startswith("share") else f"{value:,.10g}"


def _value(value: float | None, unit: str) -> str:
    """A number of a legend: one that a series has not at some step is left out."""
    if value is None:
        return ""
    return f"{value:.1%}" if unit.startswith("share") else _short(value)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
