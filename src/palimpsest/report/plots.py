"""Small figures as inline SVG that take their colours from the page, so that one picture serves light, dark and paper.

Each is drawn by matplotlib and made the page's by `report.svg`.  A figure carries its own description; its numbers
belong in a table beside it, which is the caller's work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.audit.cards import card
from palimpsest.core.records import Measurement
from palimpsest.report.svg import COLOURS, beside, canvas, in_our_settings, svg
from palimpsest.report.words import DIRECTIONS, given, interval, number, places_of, reference_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 240  # of a curve; more cannot be seen at this width

Interval3 = tuple[float, float | None, float | None]  # mean, low, high


@dataclass(frozen=True)
class Lane:
    """One row of a panel: a name, a value and its interval."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    role: str = "after"  # before | after | reference: how it is drawn


def panel(m: Measurement, key: str) -> str:
    """Before, after and reference of one measurement on one axis, with intervals and the target marked.

    `key` must be unique on the page and usable in an id.
    """
    bounds = reference_interval(m)
    low, high = bounds or (None, None)
    lanes = [
        Lane("before", m.before, role="before"),
        Lane("after", m.after, m.low, m.high),
        Lane("reference", m.reference, low, high, role="reference"),
    ]
    return lanes_figure(m, lanes, key, bounds=bounds)


@in_our_settings
def lanes_figure(
    m: Measurement, lanes: Sequence[Lane], key: str, *, bounds: tuple[float, float] | None = None, margin: int = 68
) -> str:
    """Named values on one axis, drawn for the measurement `m`: its range, its reference and its direction.

    `bounds`: the reference's interval.  `margin`: pixels for the names.
    """
    width, height = 320, 34 + 25 * len(lanes)
    figure, axes = canvas(width, height, left=margin, right=54, bottom=28, top=6)
    lowest, highest = _limits(m, lanes)
    axes.set_xlim(lowest, highest)
    axes.set_ylim(len(lanes) - 0.45, -0.55)
    if bounds and bounds[1] > bounds[0]:
        axes.axvspan(*bounds, color=COLOURS["reference"], alpha=0.13, linewidth=0)
    if m.better == "zero":
        axes.axvline(0, color=COLOURS["reference"], linewidth=1, dashes=(3, 3))
    elif given(m.reference):
        assert m.reference is not None
        axes.axvline(m.reference, color=COLOURS["reference"], linewidth=1, dashes=(3, 3))
    places = places_of(m)
    for row, lane in enumerate(lanes):
        _draw_lane(axes, row, lane, places)
    axes.set_yticks(range(len(lanes)), [_short(lane.name, margin) for lane in lanes])
    axes.tick_params(axis="y", length=0, pad=8, labelcolor=COLOURS["muted"])
    _ticks(axes, places)
    told = "; ".join(_told(lane, places) for lane in lanes)
    return svg(figure, key, card(m.name).title, f"{told}. {DIRECTIONS[m.better].capitalize()}.")


@in_our_settings
def expectation(
    title: str, measured: Interval3, control: Interval3, key: str, *, low: float = -math.inf, high: float = math.inf
) -> str:
    """What a claim measured and what its control did, each (mean, low, high), against the shaded side where the claim
    expects the interval to lie, from `low` to `high`.
    """
    lanes = [Lane("claim", *measured), Lane("control", *control, role="before")]
    finite = [v for v in (*measured, *control, low, high) if v is not None and math.isfinite(v)]
    lowest, highest = (min(finite), max(finite)) if finite else (0.0, 1.0)
    reach = 0.08 * ((highest - lowest) or abs(highest) or 1.0)
    lowest, highest = lowest - reach, highest + reach
    places = max(0, min(6, 1 - math.floor(math.log10(highest - lowest))))
    figure, axes = canvas(320, 34 + 25 * len(lanes), left=68, right=64, bottom=28, top=6)
    axes.set_xlim(lowest, highest)
    axes.set_ylim(len(lanes) - 0.45, -0.55)
    axes.axvspan(max(low, lowest), min(high, highest), color=COLOURS["reference"], alpha=0.13, linewidth=0)
    for bound in (low, high):
        if math.isfinite(bound):
            axes.axvline(bound, color=COLOURS["reference"], linewidth=1, dashes=(3, 3))
    for row, lane in enumerate(lanes):
        _draw_lane(axes, row, lane, places)
    axes.set_yticks(range(len(lanes)), [lane.name for lane in lanes])
    axes.tick_params(axis="y", length=0, pad=8, labelcolor=COLOURS["muted"])
    _ticks(axes, places)
    return svg(figure, key, title, "; ".join(_told(lane, places) for lane in lanes) + ".")


@in_our_settings
def curve(values: Sequence[float], key: str, title: str) -> str:
    """A loss per step: every step faintly (thinned to means of equal stretches), a running mean on top."""
    figure, axes = canvas(480, 180, left=48, right=16, bottom=24, top=10)
    loss = np.asarray(values, dtype=np.float64)
    loss = np.where(np.isfinite(loss), loss, np.nan)
    steps = np.arange(1, loss.size + 1)
    thin_steps, thin = _thinned(steps, loss)
    axes.plot(thin_steps, thin, color=COLOURS["after"], linewidth=1, alpha=0.35, solid_joinstyle="round")
    smooth = _running_mean(thin, max(1, thin.size // 12))
    axes.plot(thin_steps, smooth, color=COLOURS["after"], linewidth=1.8, solid_joinstyle="round")
    axes.margins(x=0.01, y=0.12)
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    _ruled(axes)
    shown = loss[np.isfinite(loss)]
    told = f"from {shown[0]:.4g} to {shown[-1]:.4g} in {loss.size} steps" if shown.size else "no finite value"
    return svg(figure, key, title, f"Training loss {told}.")


@in_our_settings
def course(rows: Sequence[float], lines: Mapping[str, Sequence[float]], key: str, title: str) -> str:
    """Scores (0 to 100) after each request, over the records forgotten so far; the first line is the one to watch."""
    figure, axes = canvas(480, 200, left=48, right=104, bottom=24, top=10)
    ends = []
    for place, (name, values) in enumerate(lines.items()):
        colour, width = (COLOURS["after"], 1.8) if place == 0 else (COLOURS["before"], 1.3)
        dashes = (None, None) if place == 0 else ((4, 2), (1.5, 2))[(place - 1) % 2]
        axes.plot(rows, values, color=colour, linewidth=width, marker="o", markersize=5, dashes=dashes)
        ends.append((float(values[-1]), name.replace("_", " "), colour))
    _percentages(axes, ends)
    axes.set_xticks(rows, [f"{row:g}" for row in rows])
    _ruled(axes)
    told = "; ".join(f"{name} {', '.join(number(value) for value in values)}" for name, values in lines.items())
    return svg(figure, key, title, f"After {', '.join(f'{row:g}' for row in rows)} records forgotten: {told}.")


@in_our_settings
def trio(places: Sequence[float], lines: Mapping[str, Sequence[float]], key: str, title: str, along: str) -> str:
    """Percentages of the models before, after and reference along steps or layers (`along` says which)."""
    figure, axes = canvas(480, 200, left=48, right=84, bottom=24, top=10)
    ends = []
    for name, values in lines.items():
        style: dict[str, Any] = {"linewidth": 1.8 if name == "after" else 1.3, "markersize": 5}
        colour = COLOURS[name]
        face = COLOURS["paper"] if name == "before" else colour
        marker = "D" if name == "reference" else "o"
        axes.plot(places, values, color=colour, marker=marker, markerfacecolor=face, clip_on=False, **style)
        ends.append((float(values[-1]), name, colour))
    _percentages(axes, ends)
    axes.set_xticks(list(places), [f"{place:g}" for place in places])
    _ruled(axes)
    told = "; ".join(f"{name} {', '.join(number(value) for value in values)}" for name, values in lines.items())
    return svg(figure, key, title, f"By {along} {', '.join(f'{place:g}' for place in places)}: {told}.")


@dataclass(frozen=True)
class Line:
    """One line of a `sweep`."""

    name: str
    values: Sequence[float]
    role: str = "after"  # ink | muted | before | after | reference: its colour
    dashed: bool = False


@in_our_settings
def sweep(
    settings: Sequence[str],
    lines: Sequence[Line],
    key: str,
    title: str,
    *,
    along: str,
    level: float | None = None,
    percent: bool = True,
) -> str:
    """Percentages over a row of settings, evenly spaced (`along` says of what); `level`: a rule, such as chance.

    `percent=False`: numbers from 0 to the largest.
    """
    figure, axes = canvas(480, 220, left=48, right=132, bottom=40, top=10)
    places = range(len(settings))
    if level is not None:
        axes.axhline(level, color=COLOURS["muted"], linewidth=1, dashes=(1.5, 2))
    for line in lines:
        style: dict[str, Any] = {"dashes": (4, 2)} if line.dashed else {"marker": "o", "markersize": 5}
        axes.plot(places, line.values, color=COLOURS[line.role], linewidth=1.3 if line.dashed else 1.8, **style)
    top = 100.0 if percent else max(max(line.values) for line in lines) or 1.0
    _percentages(axes, [(float(line.values[-1]), line.name, COLOURS[line.role]) for line in lines], top)
    axes.set_xticks(list(places), list(settings))
    axes.set_xlabel(along, color=COLOURS["muted"])
    _ruled(axes)
    told = "; ".join(f"{line.name} {', '.join(number(value) for value in line.values)}" for line in lines)
    chance = "" if level is None else f" The dotted rule is at {number(level)}."
    return svg(figure, key, title, f"By {along}, {', '.join(settings)}: {told}.{chance}")


def _percentages(axes: Axes, ends: Sequence[tuple[float, str, str]], top: float = 100.0) -> None:
    """A scale from 0 to `top`, and each line's name beside its end: (height, name, colour)."""
    axes.set_ylim(-0.03 * top, 1.03 * top)
    for height, (_, name, colour) in zip(_apart([end[0] for end in ends], 0.09 * top), ends, strict=True):
        beside(axes, name, height, 8, color=colour)


def _ruled(axes: Axes) -> None:
    """Faint rules behind the lines, and quiet labels."""
    axes.yaxis.grid(True, color=COLOURS["rule"], linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=COLOURS["muted"], pad=6)


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """The heights moved as little as needed upwards from the lowest so that labels do not overlap."""
    placed = list(heights)
    for before, after in itertools.pairwise(sorted(range(len(placed)), key=placed.__getitem__)):
        placed[after] = max(placed[after], placed[before] + least)
    return placed


def _draw_lane(axes: Axes, row: int, lane: Lane, places: int) -> None:
    colour = COLOURS[lane.role]
    if lane.value is None or not math.isfinite(lane.value):
        axes.annotate(
            "not measured",
            (1, row),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            color=COLOURS["muted"],
            style="italic",
        )
        return
    if given(lane.low) and given(lane.high):
        assert lane.low is not None
        assert lane.high is not None
        axes.plot([lane.low, lane.high], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt", alpha=0.75)
        for end in (lane.low, lane.high):
            axes.plot([end, end], [row - 0.16, row + 0.16], color=colour, linewidth=1.6, solid_capstyle="butt")
    hollow = lane.role == "before"
    axes.plot(
        [lane.value],
        [row],
        marker="D" if lane.role == "reference" else "o",
        markersize=7 if lane.role == "reference" else 9,
        markerfacecolor=COLOURS["paper"] if hollow else colour,
        markeredgecolor=colour,
        markeredgewidth=2,
        clip_on=False,
        zorder=3,
    )
    beside(axes, number(lane.value, places), row, 10, weight="bold" if lane.role == "after" else "normal")


def _limits(m: Measurement, lanes: Sequence[Lane]) -> tuple[float, float]:
    """The metric's own range where it has one (so that panels do not exaggerate), else what the values need."""
    values = [v for lane in lanes for v in (lane.value, lane.low, lane.high) if v is not None and math.isfinite(v)]
    low, high = card(m.name).range
    if m.better == "zero":
        reach = max([abs(v) for v in values] + [abs(low) if low is not None else 0.0, 1e-9]) * 1.04
        return -reach, reach
    if low is None or (values and min(values) < low):
        low = min([*values, 0.0])
    if high is None or (values and max(values) > high):
        high = max([*values, 0.0]) * (1.08 if values and max(values) > 0 else 1.0)
    return (low, high) if high > low else (low, low + 1.0)


def _ticks(axes: Axes, places: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "\N{MINUS SIGN}")))
    axes.tick_params(axis="x", length=4, color=COLOURS["rule"], labelcolor=COLOURS["muted"], pad=4)


def _short(name: str, margin: int) -> str:
    room = max(8, (margin - 8) // 6)
    return name if len(name) <= room else f"{name[: room - 1]}\N{HORIZONTAL ELLIPSIS}"


def _told(lane: Lane, places: int) -> str:
    between = interval(lane.low, lane.high, places)
    value = number(lane.value, places) if given(lane.value) else "not measured"
    return f"{lane.name} {value}{f' ({between})' if between else ''}"


def _thinned(steps: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if loss.size <= _POINTS:
        return steps, loss
    edges = np.linspace(0, loss.size, _POINTS + 1).astype(int)
    stretches = [slice(a, b) for a, b in itertools.pairwise(edges)]
    means = [np.nan if np.isnan(loss[s]).all() else float(np.nanmean(loss[s])) for s in stretches]
    return np.array([steps[s].mean() for s in stretches]), np.array(means)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` neighbours either side, over those that are there."""
    there = np.isfinite(values)
    kernel = np.ones(2 * width + 1)
    total = np.convolve(np.where(there, values, 0.0), kernel, "full")[width:-width]
    count = np.convolve(there.astype(float), kernel, "full")[width:-width]
    return np.where(there, total / np.maximum(count, 1), np.nan)
