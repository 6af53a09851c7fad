"""The sources of `tucodec compare`: curves, runs, evaluations.

| source | what |
|---|---|
| a run folder | `config.yaml` and `metrics.jsonl`: one point, training curves |
| a sweep's folder | its `runs/`: a curve a stage, training curves |
| `results.json` | of `tucodec evaluate`: a curve a codec, image by image |
| a curve in CompressAI's format, or a folder of them | published curves |
| `published:NAME`, `published:NAME#CURVE` | figures in `published/`, each curve with its source |
| `wandb:[ENTITY/]PROJECT[/GROUP]` | runs on a W&B server: as a sweep |
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.files import read_bytes, read_yaml
from lightning_tucodec.quality.curve_files import (
    check_entries,
    family,
    is_number,
    read_curve,
    read_results,
)
from lightning_tucodec.quality.curves import Curve, ImageCurves
from lightning_tucodec.report.published import mean_of, read_published
from lightning_tucodec.training.runs.folder import read_metrics, validation_point

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: for labels.
        config: resolved, nested.
        metrics: lines of `metrics.jsonl`.
    """

    name: str
    config: Row
    metrics: Sequence[Row]

    def point(self) -> tuple[float, float, float | None] | None:
        """See `validation_point`."""
        return validation_point(self.metrics)


@dataclass(frozen=True)
class Entry:
    """One curve of a comparison.

    Attributes:
        curve: mean over images.
        images: image by image, where that is known.
        measured: by this package, not published.
        count: number of images in the mean, where that is known.
        sizes: pixels of the images, by their names without a suffix, of a published table.
        rows: those of an evaluation that the curve is made of.
    """

    curve: Curve
    images: ImageCurves | None = None
    measured: bool = True
    count: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    rows: Sequence[Row] = ()


@dataclass(frozen=True)
class Evaluation:
    """A `results.json`.

    Attributes:
        path: of the file.
        sets: a row a codec.
        rows: a row a codec and image.
        codecs: the description of each.
        definitions: averaging rules.
    """

    path: Path
    sets: Sequence[Row]
    rows: Sequence[Row]
    codecs: Row
    definitions: Row

    def specification(self, codec: str) -> str:
        """What builds a codec of this evaluation again; for a model that was given as a file, the file."""
        return str(self.codecs.get(codec, {}).get("specification", codec))


@dataclass
class Material:
    """Everything that was named, in that order."""

    entries: list[Entry] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_sources(sources: Iterable[str]) -> Material:
    """Read them all; curves of one name get their source's name as well.

    Raises:
        ConfigError: one of them cannot be read; the message names it.
    """
    material = Material()
    for source in sources:
        if source.startswith("wandb:"):
            _add_runs(material, source, {source: read_wandb(source)})
        elif source.startswith("published:"):
            _add_published(material, source.removeprefix("published:"))
        else:
            _add_path(material, Path(source))
    if material.evaluations:
        _as_measured(material)
    material.notes += _copies(material.evaluations)
    if len(material.evaluations) > 1:
        material.notes += _identities(material.evaluations)
    names = [entry.curve.name for entry in material.entries]
    for index, entry in enumerate(material.entries):
        label = names[index]
        # Two results of one codec are compared as often as two codecs.
        if names.count(entry.curve.name) > 1:
            label = f"{entry.curve.name} ({names[: index + 1].count(entry.curve.name)})"
            material.notes.append(f"{label}: {entry.curve.source}")
            material.entries[index] = _renamed(entry, label)
        material.notes += [f"{label}: {text}" for text in entry.curve.left_out]
    return material


def _copies(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    """Notes on pictures that an evaluation holds under several names."""
    for evaluation in evaluations:
        pictures = {row["image"]: row["pixels"] for row in evaluation.rows if row.get("pixels")}
        first: dict[str, str] = {}
        for name, content in pictures.items():
            if first.setdefault(content, name) != name:
                yield (
                    f"{evaluation.path}: {name} is the same picture as {first[content]}; differences "
                    "and sets count it once"
                )


def _identities(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    """Warnings where images can only be matched by name, or one name has different content."""
    contents: dict[str, set[str]] = {}
    for evaluation in evaluations:
        if not all("pixels" in row for row in evaluation.rows):
            yield f"{evaluation.path}: does not hold its pictures' content, so they are matched by name"
        for row in evaluation.rows:
            contents.setdefault(row["image"], set()).add(row.get("pixels", ""))
    for name, found in contents.items():
        if len(found - {""}) > 1:
            yield f"{name}: is not the same picture in all results; different ones are not compared"


def _renamed(entry: Entry, name: str) -> Entry:
    images = None if entry.images is None else replace(entry.images, name=name)
    return replace(entry, curve=replace(entry.curve, name=name), images=images)


def _add_path(material: Material, path: Path) -> None:
    if (path / "config.yaml").is_file():
        run = read_run(path)
        _add_runs(material, str(path), {run.name: [run]})
    elif (path / "runs").is_dir():
        stages: dict[str, list[Run]] = {}
        for folder in sorted((path / "runs").iterdir(), key=lambda p: _numbers(p.name)):
            if (folder / "config.yaml").is_file():
                stage = f"{path.name}: {re.sub(r'-[0-9]+$', '', folder.name)}"
                stages.setdefault(stage, []).append(read_run(folder, folder.name))
        if not stages:
            raise ConfigError(f"{path}: no run of this sweep has started")
        _add_runs(material, str(path), stages)
    elif path.is_dir():
        curves = sorted(path.glob("*.json"))
        if not curves:
            raise ConfigError(f"{path}: neither a run, nor a sweep, nor a folder of curves")
        for file in curves:
            _add_path(material, file)
    elif not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    else:
        _add_file(material, path)


def _add_file(material: Material, path: Path) -> None:
    try:
        content = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict) or not {"rows", "results"} & set(content):
        raise ConfigError(f"{path}: neither a result of tucodec evaluate nor a published curve")
    if "results" in content:
        curve = read_curve(path)
        source = ", ".join(filter(None, [str(path), curve.source]))
        material.entries.append(Entry(replace(curve, source=source), measured=False))
        return
    for images in read_results(path):
        mean = images.mean()
        curve = replace(mean, source=f"{path}, {mean.source}")
        rows = [row for row in content["rows"] if family(row["codec"]) == images.name]
        material.entries.append(Entry(curve, images, count=len(images.images), rows=rows))
    try:
        material.evaluations.append(_evaluation(path, content))
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{path}: not a whole result of tucodec evaluate ({error})") from None


def _evaluation(path: Path, content: Row) -> Evaluation:
    """The evaluation, with the checks that `read_results` does not make.

    Raises:
        ValueError: it is not what `tucodec evaluate` writes.
    """
    rows, sets = content["rows"], content.get("sets", [])
    check_entries(sets, ["codec"], ["images", "encode_seconds", "decode_seconds"])
    for entry in [*rows, *sets]:
        if not all(is_number(entry.get(key)) for key in ("ceiling_psnr", "peak_memory")):
            raise ValueError("ceiling_psnr or peak_memory is not a number")
    if not all(re.fullmatch("[0-9a-f]{64}", str(row.get("sha256", "0" * 64))) for row in rows):
        raise ValueError("a row's sha256 is none")
    codecs, definitions = (content.get(key, {}) for key in ("codecs", "definitions"))
    if not isinstance(codecs, dict) or not all(isinstance(v, dict) for v in codecs.values()):
        raise ValueError("codecs must be a mapping of mappings")
    if not isinstance(definitions, dict) or not all(
        isinstance(v, str) for v in definitions.values()
    ):
        raise ValueError("definitions must be texts")
    return Evaluation(path, sets, rows, codecs, definitions)


def _add_runs(material: Material, source: str, groups: dict[str, list[Run]]) -> None:
    for name, runs in groups.items():
        material.runs += runs
        points = [point for run in runs if (point := run.point()) is not None]
        if not points:
            material.notes.append(f"{name}: no validation yet, so no point on the curves")
            continue
        bpp, psnr, similar = zip(*points, strict=True)
        quality: dict[str, Any] = {"psnr": psnr}
        if any(value is not None for value in similar):
            quality["ms_ssim_db"] = similar
        curve = Curve.of(name, bpp, quality, f"last validation of each run of {source}")
        material.entries.append(Entry(curve))


def read_run(path: Path, name: str = "") -> Run:
    """A run folder.

    Raises:
        ConfigError: its config cannot be read.
    """
    config = read_yaml(path / "config.yaml")
    return Run(name or path.name, config, read_metrics(path / "metrics.jsonl"))


def read_wandb(source: str) -> list[Run]:
    """Runs of a W&B project, or of one group in it, through W&B's public API.

    Args:
        source: `wandb:[ENTITY/]PROJECT[/GROUP]`.

    Raises:
        ConfigError: the server does not answer, refuses, or has no such run.
    """
    import wandb

    words = source.removeprefix("wandb:").strip("/").split("/")
    if not 1 <= len(words) <= 3 or not all(words):
        raise ConfigError(f"{source}: not wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/GROUP")
    filters = {"group": words[2]} if len(words) == 3 else None
    try:
        found = wandb.Api().runs("/".join(words[:2]), filters=filters)
        # W&B may hold lines in any order.
        runs = [Run(r.name, dict(r.config), sorted(r.scan_history(), key=_step)) for r in found]
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{source}: W&B could not be read ({reason})") from None
    if not runs:
        raise ConfigError(f"{source}: W&B has no such run")
    return sorted(runs, key=lambda run: _numbers(run.name))


def _add_published(material: Material, specification: str) -> None:
    for each in read_published(specification):
        material.entries.append(Entry(each.curve, each.images, False, each.count, each.sizes))
        if each.decibels_first:
            material.notes.append(
                f"{each.curve.name}: MS-SSIM in dB is the mean of the images' dB, above dB of the mean "
                "(of VTM-9.1 on Kodak by 0.2 to 0.3 dB)"
            )


def _as_measured(material: Material) -> None:
    """Restrict published curves to the images that were measured, or say that they are of others."""
    pictures: dict[tuple[str, int], Row] = {}
    for evaluation in material.evaluations:
        for row in evaluation.rows:
            width, height = (row.get(key) for key in ("width", "height"))
            if isinstance(width, int) and isinstance(height, int):
                pictures.setdefault((PurePath(row["image"]).stem, width * height), row)
    counts = sorted({e.count for e in material.entries if e.measured and e.count is not None})
    for index, entry in enumerate(material.entries):
        if entry.measured or entry.count is None:
            continue
        name, count = entry.curve.name, entry.count
        if entry.images is None:
            if counts != [count]:
                here = " or ".join(map(str, counts))
                material.notes.append(f"{name}: mean over {count} images; measured here are {here}")
            continue
        part = _over_measured(entry, entry.images, pictures)
        if part is None:
            material.notes.append(f"{name}: none of its {count} images is measured here")
            continue
        material.entries[index] = part
        if part.count != count:
            material.notes.append(
                f"{name}: over {part.count} of its {count} images, those measured here"
            )


def _over_measured(
    entry: Entry, images: ImageCurves, pictures: Mapping[tuple[str, int], Row]
) -> Entry | None:
    """A published table over the images that were measured, under their names; None if there are none.

    A picture is the same if its name without the suffix and its number of pixels are.
    """
    keys = [(image, entry.sizes[image]) for image in images.images]
    shared = [index for index, key in enumerate(keys) if key in pictures]
    if not shared:
        return None
    rows = [pictures[keys[index]] for index in shared]
    pixels = [str(row["pixels"]) for row in rows if row.get("pixels")]
    names = [row["image"] for row in rows]
    part = images.part(np.array(shared))
    part = replace(part, images=names, pixels=pixels if len(pixels) == len(rows) else ())
    curve = mean_of(part, entry.curve.source)
    return replace(entry, curve=curve, images=part, count=len(shared))


def _step(row: Row) -> float:
    return float(row.get("opt_step") or 0)


def _numbers(name: str) -> list[Any]:
    """A key that sorts x-2 before x-10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if part.isdigit() else part for part in parts]
