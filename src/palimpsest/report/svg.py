"""From matplotlib to a picture that belongs to the page: SVG in the page's colours and fonts, with its own description.

Figures are drawn in stand-in colours, then cleaned: stand-ins become CSS variables, fonts are the page's, ids are made
unique, and everything a browser does not need is dropped.  Text stays text.  Knows nothing of what is drawn.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# drawn in these, shown in var(--name)
COLOURS = {
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

P = ParamSpec("P")


def in_our_settings(draw: Callable[P, str]) -> Callable[P, str]:
    """Draw under our settings alone: text reads them when it is made, not when it is written."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        import matplotlib

        settings: Any = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
        with matplotlib.rc_context(settings | _SETTINGS):
            return draw(*args, **kwargs)

    return drawn


def canvas(width: int, height: int, *, left: int, right: int, bottom: int, top: int) -> tuple[Figure, Axes]:
    """A figure of `width` by `height` pixels with one pair of axes, margins in pixels; only its lower edge is drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    )
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["rule"])
    axes.patch.set_visible(False)
    return figure, axes


def beside(axes: Axes, text: str, height: float, gap: int, **style: Any) -> None:
    """Text to the right of the axes, `gap` pixels off."""
    axes.annotate(
        text,
        (1, height),
        xytext=(gap, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="left",
        va="center",
        **{"color": COLOURS["ink"]} | style,
    )


def svg(figure: Figure, key: str, title: str, description: str) -> str:
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
    for name, stand_in in COLOURS.items():
        value = value.replace(stand_in, f"var(--{name})")
    value = re.sub(r"url\(#([\w-]+)\)", rf"url(#{key}-\1)", value)
    return re.sub(r"font-family: [^;]*;? ?", "", value)  # the page's
