"""Charts and tables of a comparison."""

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_tucodec.nn.recipes import recipe_name
from lightning_tucodec.quality.curves import QUALITIES, Quality, convex_hull
from lightning_tucodec.report.figures import AXES, Style, style
from lightning_tucodec.report.numbers import (
    Row,
    complexity,
    differences,
    few_images,
    kept_samples,
    model_arguments,
    model_complexity,
    no_interval,
)
from lightning_tucodec.report.page import Chart, Range, Table, Trace
from lightning_tucodec.report.sources import Entry, Evaluation, Material, Run

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


def _ceiling(evaluations: Sequence[Evaluation]) -> float | None:
    """Mean over images of the PSNR that the conversion to 4:2:0 alone allows, where it was measured."""
    rows = [row for evaluation in evaluations for row in evaluation.rows]
    by_image = {r["image"]: r["ceiling_psnr"] for r in rows if _is_finite(r.get("ceiling_psnr"))}
    return float(np.mean(list(by_image.values()))) if by_image else None


def rd_charts(material: Material) -> list[Chart]:
    """A chart for each quality: all curves, the hull of the measured ones, the ceiling of 4:2:0."""
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
        note = "Means over the images. Dotted: published. Gray dashes: convex hull of what was measured here."
        caption = f"Rate and {label}"
        ranges = limits(entries, quality)
        if quality == "psnr" and ceiling is not None:
            right = max(float(entry.curve.lines[quality][0][-1]) for _, entry in own)
            traces.append(Trace("4:2:0 ceiling", [0, right], [ceiling] * 2, CEILING))
            note += (
                f" H.266 and whatever else works behind 4:2:0 stays below {ceiling:.1f} dB here."
            )
        charts.append(Chart(caption, "bits per pixel", AXES[quality], traces, note, "rd", *ranges))
    return charts


def limits(entries: Sequence[Entry], quality: Quality) -> tuple[Range, Range]:
    """Ranges of rate and quality in the initial view.

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


def point_table(entries: Sequence[Entry]) -> Table:
    """Every point of every curve, means over images."""
    rows: list[list[Any]] = []
    for entry in entries:
        lines = [entry.curve.lines.get(quality, (np.empty(0),) * 2) for quality in QUALITIES]
        # A rate that only one quality's line has leaves the other's cell empty.
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


def bd_table(rows: Sequence[Row], anchor: str) -> Table:
    """BD-rates with their intervals, from `numbers.bd_rows`."""
    cells: list[list[Any]] = []
    for row in rows:
        head = [row["codec"], QUALITIES[row["quality"]]]
        if "refused" in row:
            cells.append([*head, (None, "–"), "–", row["refused"], None, None, None])
            continue
        interval, verdict = "–", f"{no_interval(row) or 'one curve each'}; no interval"
        if row["low"] is not None:
            interval = f"{_signed(row['low'])} … {_signed(row['high'])} %{kept_samples(row)}"
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
    images = sorted({row["images"] for row in rows if row.get("low") is not None})
    note = f"Rate at equal quality against {anchor}; negative: fewer bits. Interpolation: {method}, by the "
    note += "bjontegaard package; refused below 30 % of shared range. "
    if images:
        note += f"Interval: 95 %, bootstrap over the {' or '.join(map(str, images))} images that both have."
    if remark := few_images(rows):
        note += f" Attention: {remark}."
    columns = ["codec", "quality", "BD-rate", "95 % interval", "verdict", "BD-quality", "range"]
    return Table(f"BD-rate against {anchor}", [*columns, "overlap"], cells, note)


def rate_table(rows: Sequence[Row], anchor: str) -> Table:
    """Gains in dB at equal rate, from `numbers.bd_rows`."""
    cells: list[list[Any]] = []
    for row in rows:
        gains = [None if gain is None else (gain, _signed(gain, 2)) for _, gain in row["at"]]
        cells.append([row["codec"], QUALITIES[row["quality"]], *gains])
    columns = ["codec", "quality", *(f"{bpp:g} bpp" for bpp, _ in rows[0]["at"])]
    note = f"Quality minus that of {anchor}, in dB; interpolated over the logarithm of the rate by PCHIP. "
    note += "Empty where one of the two curves does not reach."
    return _without_empty(Table(f"Quality against {anchor} at equal rate", columns, cells, note))


def _signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _cell(value: float | None, digits: int) -> Any:
    if value is None or not math.isfinite(value):
        return None
    return value, f"{value:.{digits}f}"


def training_charts(runs: Sequence[Run]) -> list[Chart]:
    """A chart for each metric that a run has, over its optimiser steps."""
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


def cost_tables(material: Material) -> list[Table]:
    """Complexity, seconds and memory of codecs; complexity, steps and hours of runs."""
    columns = ["parameters, M", "encoder, kMAC/px", "decoder, kMAC/px", "entropy path, kMAC/px"]
    empty = [None] * len(columns)
    tables = []
    rows: list[list[Any]] = []
    for evaluation in material.evaluations:
        for entry in evaluation.sets:
            counts = model_complexity(evaluation.specification(entry["codec"]))
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
        model = model_arguments(run.config)
        trainings.append(
            [
                run.name,
                *([_cell(v, 1) for v in counts] if counts else empty),
                (last, f"{last:,}".replace(",", " ")),
                _cell(hours, 2),
                f"{recipe_name(model.get('recipe', ''))} λ={model['lmbda']}"
                if "lmbda" in model
                else "",
            ]
        )
    if trainings:
        note = "λ: recipe mse minimises λ·MSE + bpp with MSE on [0, 1], ssim 0.2·MSE + "
        note += "0.8·(1 − MS-SSIM) + λ·bpp."
        head = ["run", *columns, "steps", "hours", "recipe"]
        tables.append(_without_empty(Table("Cost of training", head, trainings, note)))
    return tables


def _without_empty(table: Table) -> Table:
    """The table without its empty columns."""
    kept = [
        i for i in range(len(table.columns)) if any(row[i] not in (None, "") for row in table.rows)
    ]
    rows = [[row[i] for i in kept] for row in table.rows]
    return table._replace(columns=[table.columns[i] for i in kept], rows=rows)


def config_table(runs: Sequence[Run]) -> Table | None:
    """What differs between the configs; None for fewer than two runs."""
    table = differences(runs)
    if len(runs) < 2:
        return None
    rows = [[key, *(_short(value) for value in values)] for key, values in table.items()]
    note = "" if rows else "The configs are the same."
    return Table("What differs between the configs", ["key", *(r.name for r in runs)], rows, note)


def _short(value: Any) -> str:
    return "–" if value is None else str(value)


def source_table(material: Material) -> Table:
    """Where each number is from: sources, versions, commands, definitions."""
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
