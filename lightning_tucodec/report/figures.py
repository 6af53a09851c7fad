"""Figures for papers: rate-distortion curves, and pictures side by side."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.quality.curves import Curve, Quality

AXES: dict[Quality, str] = {"psnr": "PSNR (RGB), dB", "ms_ssim_db": "MS-SSIM, dB"}
"""What the axis of a quality says."""
# Okabe and Ito's colours, told apart by readers with any colour vision; the yellow is left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DARK_COLOURS = ("#5AB4F0", "#F08A4B", "#2CC69A", "#E2A0C4", "#8CD0F5", "#F2B53A", "#E7EAEE")
"""`COLOURS` for a dark page."""
# Plotly's names, each with matplotlib's.
MARKERS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "x": "X", "triangle-down": "v",
    "cross": "P", "star": "*",
}  # fmt: skip
DASHES: dict[str, Any] = {
    "solid": "-", "longdash": (0, (7, 2)), "dashdot": "-.", "dash": "--", "dot": ":",
}  # fmt: skip
Dash = Literal["solid", "longdash", "dashdot", "dash", "dot"]


@dataclass(frozen=True)
class Style:
    """How a line is drawn, the same in every kind of figure.

    Attributes:
        colour: on a light page; None is the gray of auxiliary lines.
        dark: on a dark page.
        marker: a key of `MARKERS`, or None.
        dash: a key of `DASHES`.
    """

    colour: str | None
    dark: str | None
    marker: str | None
    dash: Dash


def style(index: int, measured: bool = True) -> Style:
    """The style of the curve with this number.

    Seven colours and eight markers have no common period, so any two of 56 curves differ in one of them. Any
    two of 21 measured ones differ in two of colour, marker and dash. Published curves are dotted.
    """
    colour = index % len(COLOURS)
    rounds: tuple[Dash, ...] = ("solid", "longdash", "dashdot")
    dash = rounds[index // len(COLOURS) % len(rounds)] if measured else "dot"
    marker = list(MARKERS)[index % len(MARKERS)]
    return Style(COLOURS[colour], DARK_COLOURS[colour], marker, dash)


def rd_figure(
    curves: Sequence[Curve],
    path: str | Path,
    quality: Quality = "psnr",
    title: str = "",
    bpp_range: tuple[float, float] | None = None,
    styles: Sequence[Style] | None = None,
) -> tuple[Path, Path]:
    """Draw curves, and write PNG and SVG.

    Args:
        curves: the first is drawn on top.
        path: of either file; the suffix is replaced.
        quality: the vertical axis.
        title: a line above the figure.
        bpp_range: cuts the horizontal axis.
        styles: one per curve; when None, `style` of its place.

    Returns:
        The paths of the PNG and the SVG.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tucodec", "font.size": 9}):
        figure = Figure(figsize=(6.4, 4.2), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        shown: list[str] = []
        for index, curve in enumerate(curves):
            rates, values = curve.points(quality)
            if bpp_range is not None:
                inside = (rates >= bpp_range[0]) & (rates <= bpp_range[1])
                rates, values = rates[inside], values[inside]
            if not len(rates):
                continue
            shown.append(curve.name)
            look = styles[index] if styles is not None else style(index)
            axes.plot(
                *(rates, values),
                label=f"curve {index}",
                color=look.colour or "0.5",
                linestyle=DASHES[look.dash],
                marker=MARKERS[look.marker] if look.marker else "",
                linewidth=1.4,
                markersize=7 if look.marker == "star" else 4.5,
                markeredgewidth=0,
                zorder=3 + len(curves) - index,
            )
        axes.set_xlabel("bits per pixel")
        axes.set_ylabel(AXES[quality])
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            legend = axes.legend(
                loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, handlelength=3.2
            )
            # Names are text: as labels, matplotlib would drop those that begin with _ and typeset $…$.
            for text, name in zip(legend.get_texts(), shown, strict=True):
                text.set_parse_math(False)
                # A long one would leave no room for the axes.
                text.set_text("\n".join(textwrap.wrap(name, 44, replace_whitespace=False)))
        base = Path(path)
        png, svg = base.with_suffix(".png"), base.with_suffix(".svg")
        for file, metadata in ((png, {"Software": None}), (svg, {"Date": None})):
            with atomic_write(file) as stream:
                figure.savefig(stream, format=file.suffix[1:], metadata=metadata)
    return png, svg


class Panel(NamedTuple):
    """One picture of a comparison: uint8 H×W×3, and the text above it."""

    title: str
    detail: str
    image: NDArray[np.uint8]


def comparison_figure(
    panels: Sequence[Panel],
    path: str | Path,
    columns: int = 3,
    crop: tuple[int, int, int, int] | None = None,
) -> Path:
    """Pictures of one size side by side, pixel for pixel, as one PNG.

    Args:
        panels: the original first, then reconstructions; `detail` usually names bpp and dB.
        path: of the PNG.
        columns: pictures per row.
        crop: left, top, width, height of the part to show; everything when None.

    Raises:
        ConfigError: the pictures differ in size.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if len({panel.image.shape for panel in panels}) != 1:
        raise ConfigError("the pictures of a comparison must have one size")
    images = [panel.image for panel in panels]
    if crop is not None:
        left, top, wide, tall = crop
        images = [image[top : top + tall, left : left + wide] for image in images]
    height, width = images[0].shape[:2]
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    gap, caption, dpi = 12, 46, 100
    full = columns * (width + gap) + gap, rows * (height + caption + gap)
    figure = Figure(figsize=(full[0] / dpi, full[1] / dpi), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    for index, (panel, image) in enumerate(zip(panels, images, strict=True)):
        x = gap + index % columns * (width + gap)
        y = full[1] - (index // columns + 1) * (height + caption + gap) + gap
        box = (x / full[0], y / full[1], width / full[0], height / full[1])
        axes = figure.add_axes(box)
        axes.imshow(image, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        figure.text(x / full[0], (y + height + 24) / full[1], panel.title, size=10, weight="bold")
        figure.text(x / full[0], (y + height + 7) / full[1], panel.detail, size=8.5, color="0.3")
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", metadata={"Software": None})
    return Path(path)
