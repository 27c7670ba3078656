"""Small figures as inline SVG that take their colours from the page, so that one picture serves light, dark and paper.

Every figure is drawn by matplotlib in stand-in colours, then cleaned: stand-ins become CSS variables, fonts are the
page's, ids are made unique, and everything a browser does not need is dropped.  Text stays text.  A figure carries its
own description; its numbers belong in a table beside it, which is the caller's work.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec
from xml.etree import ElementTree

import numpy as np

from palimpsest.audit.cards import card
from palimpsest.core.records import Measurement
from palimpsest.report.words import DIRECTIONS, given, interval, number, places_of, reference_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# drawn in these, shown in var(--name)
_STAND_INS = {
    "ink": "#010101",
    "muted": "#020202",
    "rule": "#030303",
    "paper": "#040404",
    "before": "#050505",
    "after": "#060606",
    "reference": "#070707",
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "palimpsest",
    "text.parse_math": False,  # a dollar sign in somebody's method name is a dollar sign
    "font.size": 11,
    "axes.linewidth": 1,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_POINTS = 240  # of a curve; more cannot be seen at this width

P = ParamSpec("P")
Interval3 = tuple[float, float | None, float | None]  # mean, low, high


def _with_settings(draw: Callable[P, str]) -> Callable[P, str]:
    """Draw under our settings alone: text reads them when it is made, not when it is written."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        import matplotlib

        settings: Any = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
        with matplotlib.rc_context(settings | _SETTINGS):
            return draw(*args, **kwargs)

    return drawn


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


@_with_settings
def lanes_figure(
    m: Measurement, lanes: Sequence[Lane], key: str, *, bounds: tuple[float, float] | None = None, margin: int = 68
) -> str:
    """Named values on one axis, drawn for the measurement `m`: its range, its reference and its direction.

    `bounds`: the reference's interval.  `margin`: pixels for the names.
    """
    width, height = 320, 34 + 25 * len(lanes)
    figure, axes = _canvas(width, height, left=margin, right=54, bottom=28, top=6)
    lowest, highest = _limits(m, lanes)
    axes.set_xlim(lowest, highest)
    axes.set_ylim(len(lanes) - 0.45, -0.55)
    if bounds and bounds[1] > bounds[0]:
        axes.axvspan(*bounds, color=_STAND_INS["reference"], alpha=0.13, linewidth=0)
    if m.better == "zero":
        axes.axvline(0, color=_STAND_INS["reference"], linewidth=1, dashes=(3, 3))
    elif given(m.reference):
        assert m.reference is not None
        axes.axvline(m.reference, color=_STAND_INS["reference"], linewidth=1, dashes=(3, 3))
    places = places_of(m)
    for row, lane in enumerate(lanes):
        _draw_lane(axes, row, lane, places)
    axes.set_yticks(range(len(lanes)), [_short(lane.name, margin) for lane in lanes])
    axes.tick_params(axis="y", length=0, pad=8, labelcolor=_STAND_INS["muted"])
    _ticks(axes, places)
    told = "; ".join(_told(lane, places) for lane in lanes)
    return _svg(figure, key, card(m.name).title, f"{told}. {DIRECTIONS[m.better].capitalize()}.")


@_with_settings
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
    figure, axes = _canvas(320, 34 + 25 * len(lanes), left=68, right=64, bottom=28, top=6)
    axes.set_xlim(lowest, highest)
    axes.set_ylim(len(lanes) - 0.45, -0.55)
    axes.axvspan(max(low, lowest), min(high, highest), color=_STAND_INS["reference"], alpha=0.13, linewidth=0)
    for bound in (low, high):
        if math.isfinite(bound):
            axes.axvline(bound, color=_STAND_INS["reference"], linewidth=1, dashes=(3, 3))
    for row, lane in enumerate(lanes):
        _draw_lane(axes, row, lane, places)
    axes.set_yticks(range(len(lanes)), [lane.name for lane in lanes])
    axes.tick_params(axis="y", length=0, pad=8, labelcolor=_STAND_INS["muted"])
    _ticks(axes, places)
    return _svg(figure, key, title, "; ".join(_told(lane, places) for lane in lanes) + ".")


@_with_settings
def curve(values: Sequence[float], key: str, title: str) -> str:
    """A loss per step: every step faintly (thinned to means of equal stretches), a running mean on top."""
    figure, axes = _canvas(480, 180, left=48, right=16, bottom=24, top=10)
    loss = np.asarray(values, dtype=np.float64)
    loss = np.where(np.isfinite(loss), loss, np.nan)
    steps = np.arange(1, loss.size + 1)
    thin_steps, thin = _thinned(steps, loss)
    axes.plot(thin_steps, thin, color=_STAND_INS["after"], linewidth=1, alpha=0.35, solid_joinstyle="round")
    smooth = _running_mean(thin, max(1, thin.size // 12))
    axes.plot(thin_steps, smooth, color=_STAND_INS["after"], linewidth=1.8, solid_joinstyle="round")
    axes.margins(x=0.01, y=0.12)
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.grid(True, color=_STAND_INS["rule"], linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=_STAND_INS["muted"], pad=6)
    shown = loss[np.isfinite(loss)]
    told = f"from {shown[0]:.4g} to {shown[-1]:.4g} in {loss.size} steps" if shown.size else "no finite value"
    return _svg(figure, key, title, f"Training loss {told}.")


@_with_settings
def course(rows: Sequence[float], lines: Mapping[str, Sequence[float]], key: str, title: str) -> str:
    """Scores (0 to 100) after each request, over the records forgotten so far; the first line is the one to watch."""
    figure, axes = _canvas(480, 200, left=48, right=104, bottom=24, top=10)
    ends = []
    for place, (name, values) in enumerate(lines.items()):
        colour, width = (_STAND_INS["after"], 1.8) if place == 0 else (_STAND_INS["before"], 1.3)
        dashes = (None, None) if place == 0 else ((4, 2), (1.5, 2))[(place - 1) % 2]
        axes.plot(rows, values, color=colour, linewidth=width, marker="o", markersize=5, dashes=dashes)
        ends.append((float(values[-1]), name, colour))
    axes.set_ylim(-3, 103)
    for height, (_, name, colour) in zip(_apart([end[0] for end in ends], 9.0), ends, strict=True):
        _beside(axes, name.replace("_", " "), height, 8, color=colour)
    axes.set_xticks(rows, [f"{row:g}" for row in rows])
    axes.yaxis.grid(True, color=_STAND_INS["rule"], linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=_STAND_INS["muted"], pad=6)
    told = "; ".join(f"{name} {', '.join(number(value) for value in values)}" for name, values in lines.items())
    return _svg(figure, key, title, f"After {', '.join(f'{row:g}' for row in rows)} records forgotten: {told}.")


@_with_settings
def trio(places: Sequence[float], lines: Mapping[str, Sequence[float]], key: str, title: str, along: str) -> str:
    """Percentages of the models before, after and reference along steps or layers (`along` says which)."""
    figure, axes = _canvas(480, 200, left=48, right=84, bottom=24, top=10)
    ends = []
    for name, values in lines.items():
        style: dict[str, Any] = {"linewidth": 1.8 if name == "after" else 1.3, "markersize": 5}
        colour = _STAND_INS[name]
        face = _STAND_INS["paper"] if name == "before" else colour
        marker = "D" if name == "reference" else "o"
        axes.plot(places, values, color=colour, marker=marker, markerfacecolor=face, clip_on=False, **style)
        ends.append((float(values[-1]), name, colour))
    axes.set_ylim(-3, 103)
    for height, (_, name, colour) in zip(_apart([end[0] for end in ends], 9.0), ends, strict=True):
        _beside(axes, name, height, 8, color=colour)
    axes.set_xticks(list(places), [f"{place:g}" for place in places])
    axes.yaxis.grid(True, color=_STAND_INS["rule"], linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=_STAND_INS["muted"], pad=6)
    told = "; ".join(f"{name} {', '.join(number(value) for value in values)}" for name, values in lines.items())
    return _svg(figure, key, title, f"By {along} {', '.join(f'{place:g}' for place in places)}: {told}.")


@dataclass(frozen=True)
class Line:
    """One line of a `sweep`."""

    name: str
    values: Sequence[float]
    role: str = "after"  # ink | muted | before | after | reference: its colour
    dashed: bool = False


@_with_settings
def sweep(
    settings: Sequence[str], lines: Sequence[Line], key: str, title: str, *, along: str, level: float | None = None
) -> str:
    """Percentages over a row of settings, evenly spaced (`along` says of what); `level`: a rule, such as chance."""
    figure, axes = _canvas(480, 220, left=48, right=132, bottom=40, top=10)
    places = range(len(settings))
    if level is not None:
        axes.axhline(level, color=_STAND_INS["muted"], linewidth=1, dashes=(1.5, 2))
    for line in lines:
        style: dict[str, Any] = {"dashes": (4, 2)} if line.dashed else {"marker": "o", "markersize": 5}
        axes.plot(places, line.values, color=_STAND_INS[line.role], linewidth=1.3 if line.dashed else 1.8, **style)
    axes.set_ylim(-3, 103)
    for height, line in zip(_apart([float(line.values[-1]) for line in lines], 8.0), lines, strict=True):
        _beside(axes, line.name, height, 8, color=_STAND_INS[line.role])
    axes.set_xticks(list(places), list(settings))
    axes.set_xlabel(along, color=_STAND_INS["muted"])
    axes.yaxis.grid(True, color=_STAND_INS["rule"], linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=_STAND_INS["muted"], pad=6)
    told = "; ".join(f"{line.name} {', '.join(number(value) for value in line.values)}" for line in lines)
    chance = "" if level is None else f" The dotted rule is at {number(level)}."
    return _svg(figure, key, title, f"By {along}, {', '.join(settings)}: {told}.{chance}")


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """The heights moved as little as needed upwards from the lowest so that labels do not overlap."""
    placed = list(heights)
    for before, after in itertools.pairwise(sorted(range(len(placed)), key=placed.__getitem__)):
        placed[after] = max(placed[after], placed[before] + least)
    return placed


def _canvas(width: int, height: int, *, left: int, right: int, bottom: int, top: int) -> tuple[Figure, Axes]:
    """A figure of `width` by `height` pixels with one pair of axes, margins in pixels; only its lower edge is drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    )
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_STAND_INS["rule"])
    axes.patch.set_visible(False)
    return figure, axes


def _draw_lane(axes: Axes, row: int, lane: Lane, places: int) -> None:
    colour = _STAND_INS[lane.role]
    if lane.value is None or not math.isfinite(lane.value):
        axes.annotate(
            "not measured",
            (1, row),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            color=_STAND_INS["muted"],
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
        markerfacecolor=_STAND_INS["paper"] if hollow else colour,
        markeredgecolor=colour,
        markeredgewidth=2,
        clip_on=False,
        zorder=3,
    )
    _beside(axes, number(lane.value, places), row, 10, weight="bold" if lane.role == "after" else "normal")


def _beside(axes: Axes, text: str, height: float, gap: int, **style: Any) -> None:
    """Text to the right of the axes, `gap` pixels off."""
    axes.annotate(
        text,
        (1, height),
        xytext=(gap, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="left",
        va="center",
        **{"color": _STAND_INS["ink"]} | style,
    )


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
    axes.tick_params(axis="x", length=4, color=_STAND_INS["rule"], labelcolor=_STAND_INS["muted"], pad=4)


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


def _svg(figure: Figure, key: str, title: str, description: str) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with warnings.catch_warnings():
        # names may be in any script: the browser has the font, only the layout here is a guess
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return _clean(buffer.getvalue(), key, title, description)


def _clean(text: str, key: str, title: str, description: str) -> str:
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(text)
    _prune(root)
    used = {
        name
        for element in root.iter()
        for attribute, value in element.attrib.items()
        if attribute != "id"
        for name in _ids_in(value)
    }
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            if name == "id":
                if value in used:
                    element.set("id", f"{key}-{value}")
                else:
                    del element.attrib["id"]
            elif name == f"{{{_XLINK}}}href":
                del element.attrib[name]
                element.set("href", f"#{key}-{value[1:]}")
            elif name == "transform" and value.startswith("rotate(-0 "):
                del element.attrib[name]
            else:
                element.set(name, _restyled(value, key))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{key}-title {key}-desc")
    for place, (tag, content) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{key}-{tag}"})
        element.text = content
        root.insert(place, element)
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode"))


def _prune(element: ElementTree.Element) -> None:
    """Drop metadata, the global style sheet, groups without content and paths without ink."""
    for child in list(element):
        _prune(child)
        tag = child.tag.removeprefix(f"{{{_SVG}}}")
        empty = tag in ("g", "defs") and len(child) == 0
        invisible = tag == "path" and (
            child.get("style", "").startswith("fill: none") and "stroke:" not in child.get("style", "")
        )
        point = tag == "path" and "L" not in child.get("d", "") and "C" not in child.get("d", "")  # a marker's own line
        if tag in ("metadata", "style") or empty or invisible or point:
            element.remove(child)


def _ids_in(value: str) -> list[str]:
    return re.findall(r"(?:^#|url\(#)([\w-]+)", value)


def _restyled(value: str, key: str) -> str:
    for name, stand_in in _STAND_INS.items():
        value = value.replace(stand_in, f"var(--{name})")
    value = re.sub(r"url\(#([\w-]+)\)", rf"url(#{key}-\1)", value)
    return re.sub(r"font-family: [^;]*;? ?", "", value)  # the page's
