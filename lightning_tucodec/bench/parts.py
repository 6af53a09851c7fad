"""Processor seconds of coding one photograph, and of the parts of `vvc+postfilter`.

Processor seconds, of this process and of the programs that it calls, hardly depend on what else the
machine does; wall-clock seconds do.
"""

import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from lightning_tucodec.bench.timing import machine
from lightning_tucodec.codecs.h266.codec import SEARCH_PRESET
from lightning_tucodec.codecs.h266.postfilter import FilterModel
from lightning_tucodec.codecs.h266.vvc import Vvc
from lightning_tucodec.codecs.registry import codecs, expand
from lightning_tucodec.coding.compiling import clock
from lightning_tucodec.io.images import read_image


def run(image: str, specifications: Sequence[str]) -> dict[str, Any]:
    """One row per codec: `codec, bpp`, and for `encode` and `decode` processor seconds, those a megapixel,
    wall-clock seconds, and the parts; also the machine's load at the start.

    Args:
        image: a photograph.
        specifications: as for `evaluate`.

    Raises:
        TucodecError: the image cannot be read, or a codec is unknown or fails.
    """
    pixels = read_image(image)
    area = pixels.shape[0] * pixels.shape[1] / 1e6
    load = os.getloadavg()[0]
    rows = []
    for coder in codecs(expand(specifications)):
        coder.decode(coder.encode(np.ascontiguousarray(pixels[:64, :64])))  # warm-up
        row: dict[str, Any] = {"codec": coder.name}
        with _timed() as parts:
            data = coder.encode(pixels)
        row |= {"bpp": 8e-6 * len(data) / area, "encode": _a_megapixel(parts, area)}
        with _timed() as parts:
            coder.decode(data)
        row["decode"] = _a_megapixel(parts, area)
        rows.append(row)
    return {
        "rows": rows,
        "image": f"{Path(image).name}, {area:.2f} megapixels",
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load": round(load, 1),
        "machine": machine(),
    }


def _a_megapixel(parts: dict[str, float], area: float) -> dict[str, Any]:
    total, wall = parts.pop("total"), parts.pop("wall")
    rounded = {name: round(seconds, 3) for name, seconds in parts.items()}
    values = {"processor_s": total, "processor_s_per_megapixel": total / area, "wall_s": wall}
    return {**{k: round(v, 3) for k, v in values.items()}, "parts": rounded}


@contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """Processor seconds of the block by part; when it has ended also `total` and `wall`."""
    parts: dict[str, float] = {}

    def timed(owner: type, method: str, name: str) -> Any:
        inner = getattr(owner, method)

        def outer(self: Any, *arguments: Any) -> Any:
            label = name
            if method == "encode_planes" and (self.preset, self.tools) == (SEARCH_PRESET, "preset"):
                label = f"{name}, preset {SEARCH_PRESET}"
            started = _processor()
            result = inner(self, *arguments)
            parts[label] = parts.get(label, 0.0) + _processor() - started
            return result

        return mock.patch.object(owner, method, outer)

    with ExitStack() as stack:
        for owner, method, name in (
            (Vvc, "encode_planes", "H.266 encoder"),
            (Vvc, "decode_planes", "H.266 decoder"),
            (FilterModel, "fit", "filter: weights and picture"),
            (FilterModel, "apply", "filter: picture"),
        ):
            stack.enter_context(timed(owner, method, name))
        started, processor = clock(), _processor()
        yield parts
        parts["total"], parts["wall"] = _processor() - processor, clock() - started


def _processor() -> float:
    """Processor seconds of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def table_text(result: dict[str, Any]) -> str:
    """The rows as a text table."""
    lines = [
        f"{result['image']}; {result['machine']}, threads {result['threads']}, load {result['load']}"
    ]
    for row in result["rows"]:
        lines.append(f"{row['codec']}  {row['bpp']:.4f} bpp")
        for kind in ("encode", "decode"):
            side = row[kind]
            lines.append(
                f"  {kind}: {side['processor_s']:.2f} processor seconds, "
                f"{side['processor_s_per_megapixel']:.2f} a megapixel ({side['wall_s']:.2f} s passed)"
            )
            lines += [f"    {name}: {seconds:.2f}" for name, seconds in side["parts"].items()]
    return "\n".join(lines)
