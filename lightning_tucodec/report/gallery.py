"""Pictures of a report: original and reconstructions at matched rates, and maps of where bits go."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from lightning_tucodec.codecs.base import ImageCodec
from lightning_tucodec.codecs.registry import codec
from lightning_tucodec.curves import family
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.evaluate import find_images
from lightning_tucodec.images import read_image
from lightning_tucodec.report.page import Scene, View
from lightning_tucodec.report.sources import Evaluation

Row = dict[str, Any]

BUDGET = 6_000_000
"""Bytes of all pictures together, before base64 adds a third; plotly takes 4.8 MB of the page's 15."""

_LOSSY = (95, 90, 85, 80, 70, 60)


def scenes(
    evaluations: Sequence[Evaluation],
    originals: Sequence[str],
    bpp: float | None = None,
    count: int = 6,
    kept: Path | None = None,
) -> list[Scene]:
    """The gallery of some evaluations.

    Of every curve each image is shown at the point whose rate is nearest to `bpp`, on a logarithmic
    scale; where that is None, nearest to the image's middle point of the first curve.

    Args:
        evaluations: results of `tucodec evaluate`.
        originals: images, or folders of them.
        bpp: the rate to match.
        count: images, the first ones that the results name.
        kept: folder of coded files, `<sha256>.bin`; a file that is not there is coded again.

    Raises:
        ConfigError: no result, or none of the images is in them.
    """
    rows = [row for evaluation in evaluations for row in evaluation.rows]
    if not rows:
        raise ConfigError("the gallery needs a results.json of tucodec evaluate among the sources")
    files = {path.name: path for path in find_images(originals)}
    names = [name for name in dict.fromkeys(row["image"] for row in rows) if name in files][:count]
    if not names:
        raise ConfigError("none of the images is named in the results; give those that were coded")
    chosen = {name: matched([r for r in rows if r["image"] == name], bpp) for name in names}
    pictures = sum(1 + 2 * len(points) for points in chosen.values())
    share = BUDGET // pictures
    used = dict.fromkeys(row["codec"] for points in chosen.values() for row in points)
    asked = {name: e.specification(name) for e in evaluations for name in e.codecs}
    coders = {name: codec(asked.get(name, name)) for name in used}
    found = []
    for name in tqdm(names, "gallery", disable=None):
        image = read_image(files[name])
        found.append(_scene(name, image, chosen[name], coders, share, kept))
    return found


def matched(rows: Sequence[Row], bpp: float | None) -> list[Row]:
    """One row a curve: the one whose rate is nearest to the target, see `scenes`; none without a rate."""
    rows = [row for row in rows if row["bpp"] is not None and 0 < row["bpp"] < math.inf]
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(family(row["codec"]), []).append(row)
    if not families:
        return []
    if bpp is None:
        first = sorted(row["bpp"] for row in next(iter(families.values())))
        bpp = first[(len(first) - 1) // 2]
    target = math.log(bpp)
    return [
        min(points, key=lambda row: abs(math.log(row["bpp"]) - target))
        for points in families.values()
    ]


def _scene(
    name: str,
    image: NDArray[np.uint8],
    points: Sequence[Row],
    coders: Mapping[str, ImageCodec],
    share: int,
    kept: Path | None,
) -> Scene:
    height, width = image.shape[:2]
    uri, how = picture(image, share)
    views = [View("original", f"{width}×{height}, 24 bpp · {how}", uri, width, height)]
    maps = []
    for row in points:
        coder = coders[row["codec"]]
        shown = _decoded(coder, image, row, kept)
        if shown.shape != image.shape:
            raise ConfigError(
                f"{name}: {row['codec']} decodes to another size than the original's; is it the image "
                "that was evaluated?"
            )
        uri, how = picture(shown, share)
        views.append(View(row["codec"], f"{_caption(row)} · {how}", uri, width, height))
        if (bits := bit_map(coder, image)) is not None:
            maps.append(_map_view(row["codec"], bits, width, height))
    return Scene(name, width, height, [*views, *maps])


def _decoded(
    coder: ImageCodec, image: NDArray[np.uint8], row: Mapping[str, Any], kept: Path | None
) -> NDArray[np.uint8]:
    file = kept / f"{row.get('sha256')}.bin" if kept is not None else None
    data = file.read_bytes() if file is not None and file.exists() else coder.encode(image)
    return coder.decode(data)


def _caption(row: Mapping[str, Any]) -> str:
    psnr = "lossless" if row["psnr"] is None else f"{row['psnr']:.2f} dB"
    similar = "" if row["ms_ssim"] is None else f" · MS-SSIM {row['ms_ssim']:.4f}"
    return f"{row['bpp']:.3f} bpp · {psnr}{similar}"


def picture(image: NDArray[np.uint8], share: int) -> tuple[str, str]:
    """A data URI of about `share` bytes at most, and how the picture is stored in it.

    WebP, without loss where that fits; else the finest quality that does, or the coarsest.
    """
    data = _webp(image, lossless=True, method=2)
    how = "shown exactly"
    if len(data) > share:
        for quality in _LOSSY:
            data = _webp(image, quality=quality, method=4)
            how = f"shown as WebP {quality}"
            if len(data) <= share:
                break
    return _uri(data, "webp"), how


def _webp(image: NDArray[np.uint8], **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", **options)
    return buffer.getvalue()


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def bit_map(coder: ImageCodec, image: NDArray[np.uint8]) -> NDArray[np.float64] | None:
    """Estimated bits at every latent position of a learned codec, h×w; None for other codecs."""
    from lightning_tucodec.codecs.refine import RefinedModel
    from lightning_tucodec.codecs.tuc import TucModel

    if isinstance(coder, RefinedModel):
        coder = coder.model  # where the bits are before refinement
    return coder.bit_map(image) if isinstance(coder, TucModel) else None


def _map_view(name: str, bits: NDArray[np.float64], width: int, height: int) -> View:
    import matplotlib as mpl

    from lightning_tucodec.nn.transforms import STRIDE

    top = float(bits.max())
    scaled = bits / top if top > 0 else bits
    colours = (mpl.colormaps["viridis"](scaled)[..., :3] * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "PNG", optimize=True)
    rows, columns = bits.shape
    total = bits.sum() / (width * height)
    scale = f"dark 0 … bright {top:.0f} bits a position of {STRIDE}×{STRIDE} pixels"
    detail = f"{scale} · {total:.3f} bpp estimated"
    return View(
        f"{name}: bits",
        detail,
        _uri(buffer.getvalue(), "png"),
        columns * STRIDE,
        rows * STRIDE,
        True,
    )
