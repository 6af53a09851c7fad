"""`tucodec compare`: everything about some codecs and runs on one page that opens anywhere.

Sources are read by `sources`, numbers made here, pictures by `gallery`, the page by `page`.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_tucodec.errors import ConfigError, TucodecError
from lightning_tucodec.io.files import check_targets
from lightning_tucodec.quality.curves import (
    QUALITIES,
    Curve,
    Quality,
    bd_quality,
    bd_rate,
    bd_rate_interval,
    convex_hull,
    paired,
    quality_at_rate,
)
from lightning_tucodec.report.figures import AXES, Style, rd_figure, style
from lightning_tucodec.report.page import Chart, Limits, Page, Table, Trace, write_page
from lightning_tucodec.report.sources import Entry, Evaluation, Material, Run, read_sources

Row = dict[str, Any]

_TRAINING = {
    "train/loss": "Loss",
    "train/bpp": "Rate in training, bpp",
    "train/psnr": "PSNR in training, dB",
    "val/bpp": "Rate of the validation images, bpp",
    "val/psnr": "PSNR of the validation images, dB",
    "val/ms_ssim": "MS-SSIM of the validation images",
    "val/centres_used": "Centres that the validation images use",
    "val/beyond_ends": "Share of latents beyond the last centres",
}
"""Metrics that are drawn over optimiser steps."""

HULL = Style(None, None, None, "dash")
CEILING = Style(None, None, None, "dot")

_POINTS = 400
"""A training curve is thinned out to about so many points."""


RATES = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Where curves are compared at equal rate, in bpp."""


def bd_rows(
    entries: Sequence[Entry], anchor: str, samples: int = 500, rates: Sequence[float] = RATES
) -> list[Row]:
    """Every curve against the anchor.

    Args:
        entries: all curves, the anchor's among them.
        anchor: its name.
        samples: of the bootstrap over images.
        rates: in bpp.

    Returns:
        A row a curve and quality: `codec`, `quality`, `at` (a pair a rate: bpp, and the difference in dB or
        None where one of the curves does not reach), then `percent` (BD-rate), `low` and `high` (95 %
        interval; None without rows of images), `samples` and `kept` (of the bootstrap), `decibels`
        (BD-quality, or None), `range`, `overlap`, `method`, `images` (that both have, or None), `counts` (of
        the anchor's and this mean's images, None where unknown), or `refused`, why there is none.
    """
    reference = next(entry for entry in entries if entry.curve.name == anchor)
    rows: list[Row] = []
    for entry in entries:
        if entry is reference:
            continue
        for quality in QUALITIES:
            if quality not in entry.curve.lines or quality not in reference.curve.lines:
                continue
            row: Row = {"codec": entry.curve.name, "quality": quality}
            row["at"] = [[r, None] for r in rates]
            try:
                curves = _comparable(reference, entry, quality)
                row["at"] = [[r, _gain(*curves, quality, r)] for r in rates]
                row.update(_bd(reference, entry, quality, samples))
            except ConfigError as error:
                row["refused"] = str(error)
            rows.append(row)
    return rows


def _comparable(anchor: Entry, test: Entry, quality: Quality) -> tuple[Curve, Curve]:
    """Means over the images that both have, where both are known image by image.

    Raises:
        ConfigError: they share none.
    """
    if anchor.images is None or test.images is None:
        return anchor.curve, test.curve
    first, second = paired(anchor.images, test.images, quality)
    return first.mean(), second.mean()


def _gain(anchor: Curve, test: Curve, quality: Quality, bpp: float) -> float | None:
    """Quality of a curve above the anchor's at one rate, in dB."""
    values = [quality_at_rate(curve, bpp, quality) for curve in (test, anchor)]
    return None if values[0] is None or values[1] is None else values[0] - values[1]


def _bd(anchor: Entry, test: Entry, quality: Quality, samples: int) -> Row:
    row: Row = {"low": None, "high": None, "images": None, "samples": None, "kept": None}
    if anchor.images is not None and test.images is not None:
        interval = bd_rate_interval(anchor.images, test.images, quality, samples=samples)
        estimate = interval.estimate
        row |= {key: getattr(interval, key) for key in ("low", "high", "images", "samples", "kept")}
    else:
        estimate = bd_rate(anchor.curve, test.curve, quality)
    row |= {"counts": [anchor.count, test.count]}
    row |= {"percent": estimate.percent, "range": [estimate.low, estimate.high]}
    row |= {"overlap": estimate.overlap, "method": estimate.method}
    try:
        row["decibels"] = bd_quality(*_comparable(anchor, test, quality), quality)
    except ConfigError:
        row["decibels"] = None
    return row


def choose_anchor(entries: Sequence[Entry], name: str | None) -> str | None:
    """The curve that others are compared with: the one named, else the first with four points.

    Raises:
        ConfigError: no curve has this name.
    """
    names = [entry.curve.name for entry in entries]
    if name is not None:
        if name not in names:
            raise ConfigError(f"no curve is called {name}; there are {', '.join(names) or 'none'}")
        return name
    for entry in entries:
        if any(len(entry.curve.points(q)[0]) >= 4 for q in QUALITIES if q in entry.curve.lines):
            return entry.curve.name
    return None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names; jsonargparse's `init_args` are left out of them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key == "init_args" and isinstance(value, Mapping):
            flat.update(flatten(value, prefix))
        elif isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Entries of the runs' configs that are not the same in all, one value a run."""
    flat = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for entry in flat for key in entry)
    table = {key: [entry.get(key) for entry in flat] for key in keys}
    return {k: v for k, v in table.items() if any(value != v[0] for value in v)}


def complexity(config: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """Millions of parameters, and kMAC a pixel of encoder, decoder and entropy path, of a run's network."""
    from lightning_tucodec.nn.codec import TucodecVAE
    from lightning_tucodec.nn.complexity import of_network
    from lightning_tucodec.training.vae import resolve_codec

    model = _model(config)
    if "preset" not in model:
        return None
    try:
        network = TucodecVAE(resolve_codec(model["preset"], model.get("codec"))).eval()
    except (ConfigError, TypeError, ValueError, RuntimeError):
        return None  # a run of another version of this package
    return of_network("", network)[1:]


def _model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a run's model."""
    from lightning_tucodec.training.runs.identity import arguments

    is_known = isinstance(config.get("model"), Mapping)
    return arguments(dict(config), "model") if is_known else {}


def _model_complexity(name: str) -> tuple[float, float, float, float] | None:
    """The same of a learned model that `tucodec` knows by this name; None for other codecs."""
    from lightning_tucodec.codecs.learned.refine import RefinedModel
    from lightning_tucodec.codecs.registry import CLASSES, codec, split
    from lightning_tucodec.nn.codec import TucodecVAE
    from lightning_tucodec.nn.complexity import of_network

    if split(name)[0] in CLASSES:
        return None
    try:
        coder = codec(name)
    except TucodecError:
        return None
    network = getattr(coder.model if isinstance(coder, RefinedModel) else coder, "network", None)
    return of_network("", network)[1:] if isinstance(network, TucodecVAE) else None


# --- Tables and charts -----------------------------------------------------------------------


def _ceiling(evaluations: Sequence[Evaluation]) -> float | None:
    """Mean over images of the PSNR that the conversion to 4:2:0 alone allows, where it was measured."""
    rows = [row for evaluation in evaluations for row in evaluation.rows]
    by_image = {r["image"]: r["ceiling_psnr"] for r in rows if _is_finite(r.get("ceiling_psnr"))}
    return float(np.mean(list(by_image.values()))) if by_image else None


def _rd_charts(material: Material) -> list[Chart]:
    charts = []
    entries, ceiling = material.entries, _ceiling(material.evaluations)
    for quality, label in QUALITIES.items():
        own = [
            (index, entry) for index, entry in enumerate(entries) if quality in entry.curve.lines
        ]
        if not own:
            continue
        traces = []
        for index, entry in own:
            bpp, values = entry.curve.lines[quality]
            look = style(index, entry.measured)
            traces.append(Trace(entry.curve.name, bpp.tolist(), values.tolist(), look))
        measured = [entry.curve.lines[quality] for _, entry in own if entry.measured]
        if sum(len(bpp) for bpp, _ in measured) > 2:
            x, y = convex_hull(*map(np.concatenate, zip(*measured, strict=True)))
            traces.append(Trace("convex hull", x.tolist(), y.tolist(), HULL))
        note = "Dotted: published. Gray dashes: convex hull of what was measured here."
        caption = f"Rate and {label}"
        limits = _limits(entries, quality)
        if quality == "psnr" and ceiling is not None:
            right = max(float(entry.curve.lines[quality][0][-1]) for _, entry in own)
            traces.append(Trace("4:2:0 ceiling", [0, right], [ceiling] * 2, CEILING))
            note += (
                f" H.266 and whatever else works behind 4:2:0 stays below {ceiling:.1f} dB here."
            )
        charts.append(Chart(caption, "bits per pixel", AXES[quality], traces, note, "rd", *limits))
    return charts


def _limits(entries: Sequence[Entry], quality: Quality) -> tuple[Limits, Limits]:
    """Ranges of rate and quality that are shown first.

    Published curves may reach far beyond what was measured; None where nothing was.
    """
    lines = [(e.measured, *e.curve.lines[quality]) for e in entries if quality in e.curve.lines]
    rates = [bpp for measured, bpp, _ in lines if measured]
    if sum(map(len, rates)) < 2:
        return None, None
    right = 1.15 * max(float(bpp[-1]) for bpp in rates)
    values = np.concatenate([values[bpp <= right] for _, bpp, values in lines])
    margin = 0.04 * (values.max() - values.min()) + 0.05
    return (0.0, right), (float(values.min() - margin), float(values.max() + margin))


def _point_table(entries: Sequence[Entry]) -> Table:
    rows: list[list[Any]] = []
    for entry in entries:
        lines = [entry.curve.lines.get(quality, (np.empty(0),) * 2) for quality in QUALITIES]
        # What is left out of one quality only leaves a rate without the other, or two rates.
        for bpp in sorted({float(bpp) for rates, _ in lines for bpp in rates}):
            at = [[v for b, v in zip(*line, strict=True) if b == bpp] for line in lines]
            rows += [
                [entry.curve.name, (bpp, f"{bpp:.4f}"), *(_cell(v, 3) for v in values)]
                for values in itertools.zip_longest(*at)
            ]
    return Table(
        "All points of the curves",
        ["codec", "bpp", "PSNR, dB", "MS-SSIM, dB"],
        rows,
        "Means over images; MS-SSIM in dB is that of the mean.",
    )


def _bd_table(rows: Sequence[Row], anchor: str) -> Table:
    cells: list[list[Any]] = []
    for row in rows:
        head = [row["codec"], QUALITIES[row["quality"]]]
        if "refused" in row:
            cells.append([*head, (None, "–"), "–", row["refused"], None, None, None])
            continue
        interval, verdict = "–", f"{_other_images(row) or 'one curve each'}; no interval"
        if row["low"] is not None:
            interval = f"{_signed(row['low'])} … {_signed(row['high'])} %{_kept(row)}"
            apart = row["low"] > 0 or row["high"] < 0
            better = "needs fewer bits" if row["percent"] < 0 else "needs more bits"
            verdict = better if apart else "no significant difference"
        low, high = row["range"]
        cells.append(
            [
                *head,
                (row["percent"], f"{_signed(row['percent'])} %"),
                interval,
                verdict,
                None
                if row["decibels"] is None
                else (row["decibels"], f"{_signed(row['decibels'], 2)} dB"),
                f"{low:.1f} … {high:.1f} dB",
                (row["overlap"], f"{row['overlap']:.0%}"),
            ]
        )
    method = next((row["method"] for row in rows if "method" in row), "akima")
    images = sorted({row["images"] for row in rows if row.get("images")})
    note = f"Rate at equal quality against {anchor}; negative: fewer bits. Interpolation: {method}, by the "
    note += "bjontegaard package; refused below 30 % of shared range. "
    if images:
        note += f"Interval: 95 %, bootstrap over the {' or '.join(map(str, images))} images that both have."
    columns = ["codec", "quality", "BD-rate", "95 % interval", "verdict", "BD-quality", "range"]
    return Table(f"BD-rate against {anchor}", [*columns, "overlap"], cells, note)


def _rate_table(rows: Sequence[Row], anchor: str) -> Table:
    cells: list[list[Any]] = []
    for row in rows:
        gains = [None if gain is None else (gain, _signed(gain, 2)) for _, gain in row["at"]]
        cells.append([row["codec"], QUALITIES[row["quality"]], *gains])
    columns = ["codec", "quality", *(f"{bpp:g} bpp" for bpp, _ in rows[0]["at"])]
    note = f"Quality minus that of {anchor}, in dB; interpolated over the logarithm of the rate by PCHIP. "
    note += "Empty where one of the two curves does not reach."
    return _without_empty(Table(f"Quality against {anchor} at equal rate", columns, cells, note))


def _kept(row: Row) -> str:
    """Of how many samples an interval is, where some have no BD-rate."""
    lacking = row["kept"] < row["samples"]
    return f" ({row['kept']} of {row['samples']} samples)" if lacking else ""


def _other_images(row: Row) -> str:
    """What to say of a BD-rate between means over sets of images that cannot be the same."""
    anchor, test = row["counts"]
    is_apart = row["images"] is None and None not in (anchor, test) and anchor != test
    return f"means over {test} and {anchor} images" if is_apart else ""


def _signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _cell(value: float | None, digits: int) -> Any:
    if value is None or not math.isfinite(value):
        return None
    return value, f"{value:.{digits}f}"


def _training_charts(runs: Sequence[Run]) -> list[Chart]:
    charts = []
    for key, label in _TRAINING.items():
        traces = []
        for index, run in enumerate(runs):
            pairs = [
                (row["opt_step"], row[key])
                for row in run.metrics
                if row.get("opt_step") is not None and _is_finite(row.get(key))
            ]
            if pairs:
                # The last point always stays.
                kept = pairs[:: -max(1, len(pairs) // _POINTS)][::-1]
                steps, values = zip(*kept, strict=True)
                traces.append(Trace(run.name, list(steps), list(values), style(index)))
        if traces:
            charts.append(Chart(label, "optimiser steps", label, traces, "", "training"))
    return charts


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _cost_tables(material: Material) -> list[Table]:
    columns = ["parameters, M", "encoder, kMAC/px", "decoder, kMAC/px", "entropy path, kMAC/px"]
    empty = [None] * len(columns)
    tables = []
    rows: list[list[Any]] = []
    for evaluation in material.evaluations:
        for entry in evaluation.sets:
            counts = _model_complexity(evaluation.specification(entry["codec"]))
            seconds = [
                entry[k] / entry["images"] if entry[k] is not None and entry["images"] else None
                for k in ("encode_seconds", "decode_seconds")
            ]
            memory = entry.get("peak_memory")
            memory = memory if _is_finite(memory) else None
            version = evaluation.codecs.get(entry["codec"], {}).get("version", "")
            rows.append(
                [
                    entry["codec"],
                    *([_cell(v, 1) for v in counts] if counts else empty),
                    *(_cell(value, 3) for value in seconds),
                    None if memory is None else (memory, f"{memory / (1 << 20):.0f} MiB"),
                    version,
                ]
            )
    if rows:
        note = "Seconds an image on one machine, start of external programs included; "
        note += "machines under load differ. kMAC/px counts matrix products and convolutions."
        head = ["codec", *columns, "encode, s", "decode, s", "peak memory", "version"]
        tables.append(_without_empty(Table("Cost of coding", head, rows, note)))
    trainings: list[list[Any]] = []
    for run in material.runs:
        counts = complexity(run.config)
        times = [row["time"] for row in run.metrics if "time" in row]
        # Gaps of more than ten minutes are pauses between two sittings, not training.
        hours = sum(g for g in np.diff(times).tolist() if 0 < g < 600) / 3600 if times else None
        last = max((row.get("opt_step") or 0 for row in run.metrics), default=0)
        model = _model(run.config)
        trainings.append(
            [
                run.name,
                *([_cell(v, 1) for v in counts] if counts else empty),
                (last, f"{last:,}".replace(",", " ")),
                _cell(hours, 2),
                f"{model.get('recipe', '')} λ={model['lmbda']}" if "lmbda" in model else "",
            ]
        )
    if trainings:
        note = "λ: recipe transparent minimises λ·MSE + bpp with MSE on [0, 1], ssim 0.2·MSE + "
        note += "0.8·(1 − MS-SSIM) + λ·bpp."
        head = ["run", *columns, "steps", "hours", "recipe"]
        tables.append(_without_empty(Table("Cost of training", head, trainings, note)))
    return tables


def _without_empty(table: Table) -> Table:
    """Without the columns in which no row has anything."""
    kept = [
        i for i in range(len(table.columns)) if any(row[i] not in (None, "") for row in table.rows)
    ]
    rows = [[row[i] for i in kept] for row in table.rows]
    return table._replace(columns=[table.columns[i] for i in kept], rows=rows)


def _config_table(runs: Sequence[Run]) -> Table | None:
    table = differences(runs)
    if len(runs) < 2:
        return None
    rows = [[key, *(_short(value) for value in values)] for key, values in table.items()]
    note = "" if rows else "The configs are the same."
    return Table("What differs between the configs", ["key", *(r.name for r in runs)], rows, note)


def _short(value: Any) -> str:
    return "–" if value is None else str(value)


def _source_table(material: Material) -> Table:
    rows: list[list[Any]] = [
        [e.curve.name, "measured" if e.measured else "published", e.curve.source]
        for e in material.entries
    ]
    for evaluation in material.evaluations:
        for name, entry in evaluation.codecs.items():
            command = entry.get("command") or json.dumps(entry.get("options", {}))
            text = f"{entry.get('version', '')}; {entry.get('colour', '')}; {command}"
            rows.append([name, "codec", text])
        rows += [[key, "definition", text] for key, text in evaluation.definitions.items()]
    rows += [["", "note", note] for note in material.notes]
    return Table("Where the numbers are from", ["name", "kind", "source"], rows, "")


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
    tables = {
        "bd": [_bd_table(rows, name), _rate_table(rows, name)] if name is not None and rows else [],
        "points": [_point_table(entries)] if entries else [],
        "cost": _cost_tables(material),
        "configs": [table] if (table := _config_table(material.runs)) else [],
        "sources": [_source_table(material)],
    }
    charts = [*_rd_charts(material), *_training_charts(material.runs)]
    counts = {"curves": len(entries), "trainings": len(material.runs)}
    facts = [f"{number} {what}" for what, number in counts.items() if number]
    if rows:
        facts.append(f"BD-rates against {name}")
    return Page(title, charts, tables, [], " · ".join(facts)), rows


def bd_text(rows: Sequence[Row], anchor: str | None) -> str:
    """The BD rows for people."""
    if not rows:
        return "no BD-rate: it needs two curves of four points"
    lines = [f"BD-rate against {anchor}"]
    width = max(len(row["codec"]) for row in rows)
    for row in rows:
        head = f"{row['codec']:{width}}  {QUALITIES[row['quality']]:7}  "
        if "refused" in row:
            lines.append(f"{head}–  {row['refused']}")
            continue
        interval = ""
        if row["low"] is not None:
            interval = f"  [{row['low']:+.1f}, {row['high']:+.1f}]{_kept(row)}"
        elif others := _other_images(row):
            interval = f"  ({others})"
        lines.append(f"{head}{row['percent']:+7.1f} %{interval}")
    rates = [bpp for bpp, _ in rows[0]["at"]]
    lines += ["", f"dB above {anchor} at equal rate, bpp"]
    lines.append(" " * (width + 9) + "".join(f"{bpp:8g}" for bpp in rates))
    for row in rows:
        gains = "".join("       –" if gain is None else f"{gain:+8.2f}" for _, gain in row["at"])
        lines.append(f"{row['codec']:{width}}  {QUALITIES[row['quality']]:7}{gains}")
    return "\n".join(lines)


def _picture(report: Path, label: str) -> Path:
    """Where the curves of a quality are drawn; the same as SVG lies beside."""
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
            limits = _limits(material.entries, quality)[0]
            written += rd_figure(curves, path, quality, bpp_range=limits, styles=styles)
    anchor = choose_anchor(material.entries, arguments.anchor)
    for note in material.notes:
        print(note, file=sys.stderr)
    print(json.dumps(rows) if arguments.json else bd_text(rows, anchor))
    print("wrote", ", ".join(map(str, written)), file=sys.stderr)
    return 0
