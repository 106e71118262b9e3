"""Numbers -> inline SVG line charts; the style sheet and the script that pages share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

INK = "#1f2a44"
STYLE = """
:root { color-scheme: light dark; --ink: #1f2a44; --line: #e3e2dd; --muted: #6d6d74; --bar: #dfe5ee;
  --page: #fafaf8; --text: #26262a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #c3d0f0; --line: #3a3a40; --muted: #a0a0a8; --bar: #2f3c55;
    --page: #17171a; --text: #dededf; }
  svg [stroke="#1f2a44"] { stroke: #c3d0f0; }
  svg [fill="#1f2a44"] { fill: #c3d0f0; }
  svg [stroke="#e3e2dd"] { stroke: #3a3a40; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 940px; margin: 0 auto; padding: 40px 30px 80px; }
h1 { font-size: 30px; margin: 0 0 20px; color: var(--ink); }
h2 { font-size: 19px; margin: 44px 0 10px; padding-bottom: 6px; color: var(--ink);
  border-bottom: 1px solid var(--line); }
p { max-width: 75ch; }
.facts { display: flex; flex-wrap: wrap; gap: 12px 36px; }
.facts b { display: block; font-size: 24px; font-weight: 600; color: var(--ink); }
.facts span { color: var(--muted); font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { font-weight: 500; color: var(--muted); font-size: 12.5px; vertical-align: bottom; }
th, td { text-align: left; padding: 5px 8px; border-bottom: 1px solid var(--line); }
.n { text-align: right; }
.left { display: block; text-align: left; }
.bar { display: inline-block; min-width: 42px; padding: 0 5px;
  background: linear-gradient(var(--bar), var(--bar)) no-repeat left / calc(100% * var(--share)) 100%; }
td small { display: block; color: var(--muted); white-space: nowrap; }
code { font: 12.5px ui-monospace, monospace; overflow-wrap: anywhere; }
details { margin: 12px 0; }
summary { cursor: pointer; color: var(--ink); }
img { max-width: 100%; margin-top: 8px; border: 1px solid var(--line); }
svg { max-width: 100%; height: auto; display: block; }
svg text { font: 11.5px system-ui, sans-serif; fill: var(--muted); }
.steps input { width: 100%; accent-color: var(--ink); }
.steps img { display: none; }
.steps img.shown { display: block; }
@media (max-width: 640px) {
  main { padding: 20px 14px 60px; }
  table { display: block; overflow-x: auto; }
}
main svg, main img { cursor: zoom-in; }
dialog { max-width: 96vw; max-height: 96vh; padding: 14px; color: var(--text); background: var(--page);
  border: 1px solid var(--line); }
dialog::backdrop { background: rgb(0 0 0 / 60%); }
dialog.whole { width: 96vw; cursor: zoom-out; }
dialog.whole svg, dialog.whole img { display: block; width: 100%; max-height: 90vh; margin: 0;
  object-fit: contain; image-rendering: pixelated; }
circle.point:hover { fill: var(--muted); fill-opacity: .5; }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr));
  gap: 10px 16px; margin: 14px 0 18px; }
"""

ENLARGE = """
const whole = document.body.appendChild(document.createElement('dialog'));
whole.className = 'whole';
whole.addEventListener('click', () => whole.close());
document.querySelector('main').addEventListener('click', event => {
  const shown = event.target.closest('svg, img');
  if (!shown || shown.closest('dialog, a, .pictures')) return;
  whole.replaceChildren(shown.cloneNode(true));
  whole.showModal();
});
"""
"""What a page does when somebody clicks on a chart or a picture of it: it shows that as large as the window,
until a click or Escape.
"""
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 26, 36
POINTS_SAID = 200
"""Points of a curve up to which each says its numbers to who points at it."""
LEGEND_ROW = 18


@dataclass(frozen=True)
class Line:
    """Points of one curve by x; `name` goes into the legend unless empty."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at most about `most` of them."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from `low` to `high`, both above 0."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    return [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def chart(
    lines: Sequence[Line],
    width: int,
    height: int,
    x_title: str = "",
    title: str = "",
    y_range: tuple[float, float] | None = None,
    x_log: bool = False,
) -> str:
    """An SVG of curves over a common x; empty without points. `y_range` None spans the finite values. With
    `x_log` every x is above 0.
    """
    finite = [
        Line(line.name, [p for p in line.points if math.isfinite(p[1])], line.colour, line.dashed)
        for line in lines
    ]
    points = [point for line in finite for point in line.points]
    if not points:
        return ""
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = y_range or (min(y for _, y in points), max(y for _, y in points))
    if y_range is None:
        margin = 0.06 * (y_high - y_low) or 0.5
        y_low, y_high = y_low - margin, y_high + margin
    legend, rows = _legend([line for line in finite if line.name and len(finite) > 1], title, width)
    top = TOP + LEGEND_ROW * (rows - 1)
    inner_width, inner_height = width - LEFT - RIGHT, height - top - BOTTOM
    scale = math.log10 if x_log else float

    def place(x: float, y: float) -> tuple[float, float]:
        across = (scale(x) - scale(x_low)) / (scale(x_high) - scale(x_low)) if x_high > x_low else 0.5
        return LEFT + across * inner_width, top + (y_high - y) / (y_high - y_low) * inner_height

    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{escape(title or "chart")}">'
    ]
    for value in ticks(y_low, y_high, max(2, inner_height // 45)):
        _, y = place(x_low, value)
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e2dd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    marks = log_ticks(x_low, x_high) if x_log else ticks(x_low, x_high, max(2, inner_width // 110))
    for value in marks:
        x, _ = place(value, y_low)
        parts.append(f'<text x="{x:.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    if x_title:
        parts.append(f'<text x="{width - RIGHT}" y="{height - 4}" text-anchor="end">{escape(x_title)}</text>')
    for line in finite:
        if line.points:
            parts += _curve(line, [place(*point) for point in line.points])
    return "".join([*parts, *legend]) + "</svg>"


def _curve(line: Line, places: list[tuple[float, float]]) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    style = f'fill="none" stroke="{line.colour}" stroke-width="1.8" stroke-linejoin="round"{dash}'
    parts = [f'<polyline points="{path}" {style}/>']
    if len(places) <= 20:  # few enough to be told apart
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.8" fill="{line.colour}"/>' for x, y in places]
    if len(places) <= POINTS_SAID:
        name = f"{escape(line.name)} " if line.name else ""
        parts += [
            f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="7" fill="transparent">'
            f"<title>{name}{at:g}: {value:.4g}</title></circle>"
            for (x, y), (at, value) in zip(places, line.points, strict=True)
        ]
    return parts


def _legend(lines: Sequence[Line], title: str, width: int) -> tuple[list[str], int]:
    """Title and names, in as many rows as the width asks for, and how many these are."""
    parts = [f'<text x="{LEFT}" y="14" style="fill:{INK}">{escape(title)}</text>'] if title else []
    x, row = LEFT + 9 * len(title), 0
    for line in lines:
        room = 26 + 7 * len(line.name)
        if x + room > width - RIGHT and x > LEFT:
            x, row = LEFT, row + 1
        y = 14 + LEGEND_ROW * row
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        style = f'stroke="{line.colour}" stroke-width="2"{dash}'
        parts.append(f'<line x1="{x}" x2="{x + 20}" y1="{y - 4}" y2="{y - 4}" {style}/>')
        parts.append(f'<text x="{x + 26}" y="{y}">{escape(line.name)}</text>')
        x += room + 20
    return parts, row + 1
