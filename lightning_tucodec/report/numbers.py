"""What a comparison says in numbers: BD-rates, gains at equal rate, differences of configs, complexity."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_tucodec.errors import ConfigError, TucodecError
from lightning_tucodec.quality.curves import QUALITIES, Curve, Quality, paired
from lightning_tucodec.quality.deltas import bd_quality, bd_rate, bd_rate_interval, quality_at_rate
from lightning_tucodec.report.sources import Entry, Run

Row = dict[str, Any]

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
        One row per curve and quality: `codec`, `quality`, `at` (per rate: bpp, and the difference in dB, or
        None where a curve does not reach it), then `percent` (BD-rate), `low` and `high` (95 %
        interval; None without rows of two images), `samples` and `kept` (of the bootstrap), `decibels`
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
    """Means over the images that both have, if both curves are known image by image.

    Raises:
        ConfigError: they share no image.
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
        row["images"] = interval.images
        if interval.images > 1:  # one image says nothing of others
            row |= {key: getattr(interval, key) for key in ("low", "high", "samples", "kept")}
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
    """Entries that differ between the runs' configs, one value per run."""
    flat = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for entry in flat for key in entry)
    table = {key: [entry.get(key) for entry in flat] for key in keys}
    return {k: v for k, v in table.items() if any(value != v[0] for value in v)}


def complexity(config: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """Millions of parameters, and kMAC a pixel of encoder, decoder and entropy path, of a run's network."""
    from lightning_tucodec.nn.codec import TucodecVAE
    from lightning_tucodec.nn.complexity import of_network
    from lightning_tucodec.training.vae import resolve_codec

    model = model_arguments(config)
    if "preset" not in model:
        return None
    try:
        network = TucodecVAE(resolve_codec(model["preset"], model.get("codec"))).eval()
    except (ConfigError, TypeError, ValueError, RuntimeError):
        return None  # a run of another version of this package
    return of_network("", network)[1:]


def model_arguments(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a run's model."""
    from lightning_tucodec.training.runs.identity import arguments

    is_known = isinstance(config.get("model"), Mapping)
    return arguments(dict(config), "model") if is_known else {}


def model_complexity(name: str) -> tuple[float, float, float, float] | None:
    """The same of a learned model that `tucodec` knows by this name; None for other codecs."""
    from lightning_tucodec.codecs.learned.codec import RefinedModel
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


def kept_samples(row: Row) -> str:
    """A note on how many samples an interval is of, if some have no BD-rate."""
    lacking = row["kept"] < row["samples"]
    return f" ({row['kept']} of {row['samples']} samples)" if lacking else ""


FEW_IMAGES = 5
"""Of fewer images a bootstrap's interval says little: it draws from nothing but them."""


def few_images(rows: Sequence[Row]) -> str:
    """A note on intervals over very few images; empty if there are none."""
    few = sorted({n for row in rows if (n := row.get("images")) and 1 < n < FEW_IMAGES})
    if not few:
        return ""
    number = " or ".join(map(str, few))
    return f"intervals over {number} images are rough: use {FEW_IMAGES} at least"


def no_interval(row: Row) -> str:
    """A note on a BD-rate without an interval: of one image, or between means over other images."""
    if row["images"] == 1:
        return "of one image"
    anchor, test = row["counts"]
    is_apart = row["images"] is None and None not in (anchor, test) and anchor != test
    return f"means over {test} and {anchor} images" if is_apart else ""
