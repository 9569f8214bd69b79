"""Line charts and sparklines as inline SVG: no script, no font, no file beside the page.

Colours are those of Okabe and Ito (2008), told apart under the common colour-vision deficiencies;
dashes and end marks repeat what the colour says.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import quantiles

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#b37400",
    "#6b4c9a",
    "#444444",
)
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 4", "1 4", "6 2 1 2 1 2")
MAX_COLOURED = len(COLOURS)
_CROWD = "#b8bec6"
_WIDTH, _HEIGHT = 460, 232
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 34


@dataclass(frozen=True)
class Line:
    """One site's values; ``style`` indexes the colours, None is one of a grey crowd."""

    name: str
    values: Mapping[int, float]
    style: int | None


@dataclass(frozen=True)
class _Frame:
    """Where rounds and values fall on the drawing."""

    first: int
    last: int
    marks: tuple[float, ...]

    @property
    def low(self) -> float:
        """Value at the bottom."""
        return self.marks[0]

    @property
    def high(self) -> float:
        """Value at the top."""
        return self.marks[-1]

    def x(self, number: float) -> float:
        span = max(self.last - self.first, 1)
        share = 0.5 if self.last == self.first else (number - self.first) / span
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def path(self, values: Mapping[int, float]) -> str:
        """A polyline that breaks where a round is missing."""
        parts, before = [], None
        for number in sorted(values):
            verb = "L" if before is not None and number == before + 1 else "M"
            parts.append(f"{verb}{self.x(number):.1f} {self.y(values[number]):.1f}")
            before = number
        return "".join(parts)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    gate: float | None = None,
    gate_label: str = "",
    rounds: tuple[int, int] | None = None,
    within: Sequence[float] = (),
) -> str:
    """Draw one metric of all sites over the rounds.

    With more sites than colours the median and the middle half of all sites are drawn over a
    grey crowd, and only lines with a style of their own stand out.

    Args:
        lines: a line for each site; sites without values are left out.
        title: what the chart shows; begins the text for those who cannot see it.
        gate: a value to draw as a dashed line across.
        gate_label: its name.
        rounds: first and last round of the horizontal axis; None takes those of the values.
        within: values that the vertical axis shall hold too, so that two charts share it.

    Returns:
        An ``<svg>`` element with all names escaped; empty when no line has a value.
    """
    drawn = [line for line in lines if line.values]
    if not drawn:
        return ""
    frame = _frame(drawn, gate, rounds, within)
    parts = [_axes(frame)]
    if any(line.style is None for line in drawn):
        parts += _crowd(frame, drawn)
    parts += [_curve(frame, line) for line in drawn if line.style is not None]
    if gate is not None:
        parts.append(_gate(frame, gate, gate_label))
    text = escape(_described(title, drawn, gate, gate_label))
    body = "".join(parts)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text}">{body}</svg>'


def sparkline(
    values: Mapping[int, float], *, limits: tuple[float, float], rounds: tuple[int, int]
) -> str:
    """A curve the size of a word on axes shared by all sites; empty when there is no value."""
    if not values:
        return ""
    width, height = 92, 22
    low, high = limits
    span = max(rounds[1] - rounds[0], 1)
    spread = (high - low) or 1.0
    points = [
        (
            3 + (number - rounds[0]) / span * (width - 8),
            height - 4 - (values[number] - low) / spread * (height - 8),
        )
        for number in sorted(values)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    last = points[-1]
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<polyline points="{path}"/><circle cx="{last[0]:.1f}" cy="{last[1]:.1f}" r="2.4"/></svg>'
    )


def swatch(style: int | None) -> str:
    """The sample of a line for the legend."""
    if style is None:
        return (
            f'<svg class="swatch" viewBox="0 0 34 10" aria-hidden="true"><path d="M2 5H32" '
            f'stroke="{_CROWD}" stroke-width="2"/></svg>'
        )
    return (
        f'<svg class="swatch" viewBox="0 0 34 10" aria-hidden="true"><path d="M2 5H32" stroke="'
        f'{COLOURS[style]}" stroke-width="2.4" stroke-dasharray="{DASHES[style]}"/></svg>'
    )


def short(value: float, *, trim: bool = True) -> str:
    """Three significant digits, as a person would write them; ``trim`` drops idle zeros."""
    if value == 0:
        return "0"
    size = abs(value)
    if 0.001 <= size < 100_000:
        digits = max(0, 2 - math.floor(math.log10(size)))
        text = f"{value:.{digits}f}"
        return text.rstrip("0").rstrip(".") if trim and "." in text else text
    return f"{value:.1e}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover [low, high]; the first and the last enclose it."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if rough <= factor * power * 1.0001)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(start, end + 1)]


def _frame(
    lines: Sequence[Line],
    gate: float | None,
    rounds: tuple[int, int] | None,
    within: Sequence[float],
) -> _Frame:
    values = [*within, *(value for line in lines for value in line.values.values())]
    numbers = [number for line in lines for number in line.values]
    low, high = min(values), max(values)
    if gate is not None:
        low, high = min(low, gate, 0.0), max(high, gate)
    elif low > 0 and low < 0.5 * high:
        low = 0.0
    first, last = rounds or (min(numbers), max(numbers))
    return _Frame(first, last, tuple(ticks(low, high)))


def _axes(frame: _Frame) -> str:
    parts = []
    for value in frame.marks:
        y = frame.y(value)
        parts.append(
            f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">'
            f"{_mark(value, frame.marks[1] - frame.marks[0])}</text>"
        )
    for number in _round_ticks(frame.first, frame.last):
        parts.append(
            f'<text class="tick" x="{frame.x(number):.1f}" y="{_HEIGHT - _BOTTOM + 16}" '
            f'text-anchor="middle">{number}</text>'
        )
    parts.append(
        f'<text class="tick" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 3}" '
        'text-anchor="middle">round</text>'
    )
    return "".join(parts)


def _mark(value: float, step: float) -> str:
    """A tick's number, with more than three digits where neighbours would look alike or wrong."""
    text = short(value)
    if abs(float(text) - value) < 0.01 * step:
        return text
    return f"{value:.{max(0, 2 - math.floor(math.log10(step)))}f}".rstrip("0").rstrip(".")


def _round_ticks(first: int, last: int) -> list[int]:
    step = max(1, round((last - first) / 6))
    return [number for number in range(first, last + 1) if (number - first) % step == 0]


def _curve(frame: _Frame, line: Line) -> str:
    style = line.style or 0
    end = max(line.values)
    return (
        f"<g><title>{escape(line.name)}: {short(line.values[end])} in round {end}</title><path "
        f'class="line" stroke="{COLOURS[style]}" stroke-dasharray="{DASHES[style]}" '
        f'd="{frame.path(line.values)}"/><circle cx="{frame.x(end):.1f}" '
        f'cy="{frame.y(line.values[end]):.1f}" r="3.4" fill="{COLOURS[style]}"/></g>'
    )


def _crowd(frame: _Frame, lines: Sequence[Line]) -> list[str]:
    parts = [
        f'<g><title>{escape(line.name)}</title><path class="crowd" stroke="{_CROWD}" '
        f'd="{frame.path(line.values)}"/></g>'
        for line in lines
        if line.style is None
    ]
    quarters = _quarters(lines)
    if not quarters:
        return parts
    above = [(number, three) for number, (_, _, three) in quarters.items()]
    below = [(number, one) for number, (one, _, _) in quarters.items()]
    outline = "L".join(f"{frame.x(n):.1f} {frame.y(v):.1f}" for n, v in above + below[::-1])
    middle = {number: two for number, (_, two, _) in quarters.items()}
    parts.append(f'<path class="band" d="M{outline}Z"/>')
    parts.append(
        f'<g><title>median of all sites</title><path class="median" d="{frame.path(middle)}"/></g>'
    )
    return parts


def _quarters(lines: Sequence[Line]) -> dict[int, tuple[float, float, float]]:
    found = {}
    for number in sorted({number for line in lines for number in line.values}):
        values = [line.values[number] for line in lines if number in line.values]
        if len(values) > 1:
            one, two, three = quantiles(values, n=4, method="inclusive")
            found[number] = (one, two, three)
    return found


def _gate(frame: _Frame, gate: float, label: str) -> str:
    y = frame.y(gate)
    return (
        f'<path class="gate" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/><text class="gatename" '
        f'x="{_WIDTH - _RIGHT - 2}" y="{y - 5:.1f}" text-anchor="end">{escape(label)}</text>'
    )


def _described(title: str, lines: Sequence[Line], gate: float | None, gate_label: str) -> str:
    ends = {line.name: line.values[max(line.values)] for line in lines}
    if len(ends) <= MAX_COLOURED:
        listed = ", ".join(f"{name} {short(value)}" for name, value in ends.items())
    else:
        low, high = min(ends, key=lambda n: ends[n]), max(ends, key=lambda n: ends[n])
        listed = f"lowest {low} {short(ends[low])}, highest {high} {short(ends[high])}"
    gated = "" if gate is None else f" Line at {short(gate)}: {gate_label}."
    return f"{title}, by site and round. Newest values: {listed}.{gated}"


MEDIAN_SWATCH = (
    '<svg class="swatch" viewBox="0 0 34 10" aria-hidden="true"><path class="band" '
    'd="M2 0H32V10H2Z"/><path d="M2 5H32" stroke="#111" stroke-width="2.4"/></svg>'
)
