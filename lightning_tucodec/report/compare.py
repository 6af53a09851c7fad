"""`tucodec compare`: everything about some codecs and runs on one page that opens anywhere.

Sources are read by `sources`; `numbers`, `tables`, `figures` and `gallery` make what `page` shows.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_tucodec.errors import ConfigError, printable
from lightning_tucodec.io.files import check_targets
from lightning_tucodec.quality.curves import QUALITIES
from lightning_tucodec.report.figures import rd_figure, style
from lightning_tucodec.report.measures import measure_rows, measure_table, measure_text
from lightning_tucodec.report.numbers import (
    RATES,
    Row,
    bd_rows,
    choose_anchor,
    few_images,
    kept_samples,
    no_interval,
)
from lightning_tucodec.report.page import Page, write_page
from lightning_tucodec.report.sources import Material, read_sources
from lightning_tucodec.report.tables import (
    bd_table,
    config_table,
    cost_tables,
    limits,
    point_table,
    rate_table,
    rd_charts,
    source_table,
    training_charts,
)


def build_page(
    material: Material,
    anchor: str | None,
    title: str,
    samples: int = 500,
    rates: Sequence[float] = RATES,
) -> tuple[Page, list[Row]]:
    """The page without pictures, and the BD rows.

    Raises:
        ConfigError: there is nothing to show, or the anchor is unknown.
    """
    if not material.entries and not material.runs:
        raise ConfigError("nothing to compare")
    entries = material.entries
    name = choose_anchor(entries, anchor)
    rows = bd_rows(entries, name, samples, rates) if name is not None else []
    bd_tables = [bd_table(rows, name), rate_table(rows, name)] if name and rows else []
    if name and (further := measure_rows(material.entries, name)):
        bd_tables.append(measure_table(further, name))
    tables = {
        "bd": bd_tables,
        "points": [point_table(entries)] if entries else [],
        "cost": cost_tables(material),
        "configs": [table] if (table := config_table(material.runs)) else [],
        "sources": [source_table(material)],
    }
    charts = [*rd_charts(material), *training_charts(material.runs)]
    counts = {"curves": len(entries), "trainings": len(material.runs)}
    facts = [f"{number} {what}" for what, number in counts.items() if number]
    if rows:
        facts.append(f"BD-rates against {name}")
    return Page(title, charts, tables, [], " · ".join(facts)), rows


def bd_text(rows: Sequence[Row], anchor: str | None) -> str:
    """The BD rows as text."""
    if not rows:
        return "no BD-rate: it needs two curves of four points"
    lines = [f"BD-rate against {anchor}, of means over the images"]
    width = max(len(row["codec"]) for row in rows)
    for row in rows:
        head = f"{row['codec']:{width}}  {QUALITIES[row['quality']]:7}  "
        if "refused" in row:
            lines.append(f"{head}–  {row['refused']}")
            continue
        interval = ""
        if row["low"] is not None:
            interval = f"  [{row['low']:+.1f}, {row['high']:+.1f}]{kept_samples(row)}"
        elif others := no_interval(row):
            interval = f"  ({others})"
        lines.append(f"{head}{row['percent']:+7.1f} %{interval}")
    if remark := few_images(rows):
        lines.append(f"({remark})")
    rates = [bpp for bpp, _ in rows[0]["at"]]
    lines += ["", f"dB above {anchor} at equal rate, bpp"]
    lines.append(" " * (width + 9) + "".join(f"{bpp:8g}" for bpp in rates))
    for row in rows:
        gains = "".join("       –" if gain is None else f"{gain:+8.2f}" for _, gain in row["at"])
        lines.append(f"{row['codec']:{width}}  {QUALITIES[row['quality']]:7}{gains}")
    return "\n".join(lines)


def _picture(report: Path, label: str) -> Path:
    """The picture of a quality's curves; the same as SVG lies beside it."""
    return report.with_name(f"{report.stem}-{label.lower()}.png")


def run_compare(arguments: argparse.Namespace) -> int:
    """`tucodec compare`: the page, and PNG and SVG of its curves beside it."""
    from lightning_tucodec.report.gallery import scenes

    out = Path(arguments.out)
    if out.suffix != ".html":
        raise ConfigError(f"{out}: the name of the report must end in .html")
    pictures = {quality: _picture(out, label) for quality, label in QUALITIES.items()}
    drawings = [path.with_suffix(kind) for path in pictures.values() for kind in (".png", ".svg")]
    check_targets([out, *drawings], arguments.sources + (arguments.images or []), arguments.force)
    if arguments.kept and not Path(arguments.kept).is_dir():
        raise ConfigError(f"--kept {arguments.kept}: no such folder")
    material = read_sources(arguments.sources)
    page, rows = build_page(
        material, arguments.anchor, arguments.title, arguments.samples, arguments.at or RATES
    )
    if arguments.images:
        gallery = scenes(
            material.evaluations,
            arguments.images,
            arguments.bpp,
            arguments.pictures,
            Path(arguments.kept) if arguments.kept else None,
        )
        page = page._replace(scenes=gallery)
    write_page(out, page)
    written = [out]
    for quality, path in pictures.items():
        drawn = [
            (entry.curve, style(index, entry.measured))
            for index, entry in enumerate(material.entries)
            if quality in entry.curve.lines
        ]
        if drawn:
            curves, styles = zip(*drawn, strict=True)
            bpp, _ = limits(material.entries, quality)
            written += rd_figure(curves, path, quality, bpp_range=bpp, styles=styles)
    anchor = choose_anchor(material.entries, arguments.anchor)
    for note in material.notes:
        print(printable(note), file=sys.stderr)
    print(json.dumps(rows) if arguments.json else bd_text(rows, anchor))
    if anchor and not arguments.json and (further := measure_rows(material.entries, anchor)):
        print(f"\n{measure_text(further, anchor)}")
    print("wrote", ", ".join(map(str, written)), file=sys.stderr)
    return 0
