"""The one HTML file of a report: template, style, script, plotly and all data inside, no network.

A content security policy in the page itself forbids every connection.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.report.figures import Style
from lightning_tucodec.sets.results import finite

MAX_BYTES = 15_000_000
"""A report that is larger cannot be sent by mail and is slow on a phone; it is refused."""

Range = tuple[float, float] | None


@dataclass(frozen=True)
class Trace:
    """One line of a chart.

    Attributes:
        name: in the legend.
        x: one value a point.
        y: one value a point.
        style: how it is drawn.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Style


class Chart(NamedTuple):
    """A chart; `part` is its section of the page, the ranges are the initial view."""

    caption: str
    x_label: str
    y_label: str
    traces: Sequence[Trace]
    note: str
    part: Literal["rd", "training"]
    x_range: Range = None
    y_range: Range = None


class Table(NamedTuple):
    """A sortable table. A cell is text, None, or (value to sort by, text)."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str


class View(NamedTuple):
    """One way to see an image.

    Attributes:
        name: of the codec.
        detail: rate, quality, and how the picture is stored here.
        uri: the picture as a data URI.
        width: what it spans, in pixels of the original.
        height: the same.
        is_map: a map of numbers: never smoothed when scaled.
    """

    name: str
    detail: str
    uri: str
    width: int
    height: int
    is_map: bool = False


class Scene(NamedTuple):
    """One image in all views; the original is the first."""

    name: str
    width: int
    height: int
    views: Sequence[View]


class Page(NamedTuple):
    """Everything that a report shows; `tables` by section, `summary` a line below the title."""

    title: str
    charts: Sequence[Chart]
    tables: Mapping[str, Sequence[Table]]
    scenes: Sequence[Scene]
    summary: str = ""


MARKER_PATHS = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "square": "M-3.5-3.5h7v7h-7z",
    "diamond": "M0-5 5 0 0 5-5 0z",
    "triangle-up": "M0-4.6 4.6 3.4h-9.2z",
    "x": "M0-2 2.5-4.5 4.5-2.5 2 0 4.5 2.5 2.5 4.5 0 2-2.5 4.5-4.5 2.5-2 0-4.5-2.5-2.5-4.5z",
    "triangle-down": "M0 4.6 4.6-3.4h-9.2z",
    "cross": "M-1.5-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "star": "M0-5.5 1.5-1.8 5.2-1.7 2.3.8 3.2 4.4 0 2.4-3.2 4.4-2.3.8-5.2-1.7-1.5-1.8z",
}
"""plotly's markers around (0, 0), for the legends, which stand outside of it: its own do not wrap."""

DASH_ARRAYS = {"solid": "", "longdash": "9 4", "dashdot": "7 3 2 3", "dash": "5 4", "dot": "2 3"}
"""Of lines two pixels wide."""

SECTIONS = {
    "curves": "Rate and quality",
    "bd": "BD-rate",
    "gallery": "Pictures",
    "training": "Training",
    "cost": "Cost",
    "configs": "Configurations",
    "sources": "Sources",
}
"""Headings, in the page's order; a section with nothing in it is left out."""


def render(page: Page) -> str:
    """The page's HTML."""
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    here = files("lightning_tucodec.report")
    template, style, script = (
        here.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js")
    )
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    filled = {
        "curves": any(chart.part == "rd" for chart in page.charts),
        "training": any(chart.part == "training" for chart in page.charts),
        "gallery": bool(page.scenes),
        **{part: bool(page.tables.get(part)) for part in ("bd", "cost", "configs", "sources")},
    }
    data = {
        "charts": [
            {**chart._asdict(), "traces": [asdict(trace) for trace in chart.traces]}
            for chart in page.charts
        ],
        "scenes": [
            {**scene._asdict(), "views": [view._asdict() for view in scene.views]}
            for scene in page.scenes
        ],
    }
    return environment.from_string(template).render(
        page=page,
        sections={key: title for key, title in SECTIONS.items() if filled[key]},
        data=finite(data),
        version=version("lightning-tucodec"),
        style=style,
        script=script,
        plotly=get_plotlyjs(),
        markers=MARKER_PATHS,
        dashes=DASH_ARRAYS,
    )


def write_page(path: Path, page: Page) -> None:
    """Write the page, whole or not at all.

    Raises:
        ConfigError: it would be larger than `MAX_BYTES`.
    """
    text = render(page).encode(errors="backslashreplace")
    if len(text) > MAX_BYTES:
        raise ConfigError(
            f"{path}: the report would have {len(text) / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}; "
            "show fewer pictures or runs"
        )
    with atomic_write(path) as stream:
        stream.write(text)
