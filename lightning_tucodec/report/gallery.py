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
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.images import read_image
from lightning_tucodec.quality.curve_files import family
from lightning_tucodec.report.page import Scene, View
from lightning_tucodec.report.sources import Evaluation
from lightning_tucodec.sets.evaluate import find_images
from lightning_tucodec.sets.measure import content_id, kept_data

Row = dict[str, Any]

BUDGET = 6_000_000
"""Bytes of all pictures together, before base64 adds a third; plotly takes 4.8 MB of the page's 15."""

_LOSSY = (95, 90, 85, 80, 70, 60)

_SCALES = (1, 2, 3, 4, 6, 8)
"""By what a picture is scaled down where even the coarsest quality does not fit: many large ones."""


def scenes(
    evaluations: Sequence[Evaluation],
    originals: Sequence[str],
    bpp: float | None = None,
    count: int = 6,
    kept: Path | None = None,
) -> list[Scene]:
    """The gallery of some evaluations.

    For every curve, each image is shown at the point whose rate is nearest to `bpp`, on a logarithmic
    scale; if `bpp` is None, nearest to the image's middle point of the first curve.

    Args:
        evaluations: results of `tucodec evaluate`.
        originals: images, or folders of them.
        bpp: the rate to match.
        count: images, the first ones that the results name.
        kept: folder of coded files, `<sha256>.bin`; one that is missing or damaged is coded again.

    Raises:
        ConfigError: no result, or none of the images is in them.
    """
    rows = [{**row, "from": n} for n, e in enumerate(evaluations) for row in e.rows]
    if not rows:
        raise ConfigError("the gallery needs a results.json of tucodec evaluate among the sources")
    by_picture: dict[str, list[Row]] = {}
    for row in rows:
        by_picture.setdefault(row.get("pixels", row["image"]), []).append(row)
    files = _Originals(originals)
    found: list[tuple[str, Path, list[Row]]] = []
    for own in by_picture.values():
        if len(found) < count and (path := files.find(own[0])) is not None:
            found.append((own[0]["image"], path, matched(own, bpp)))
    if not found:
        raise ConfigError("none of the images is in the results; give those that were coded")
    pictures = sum(1 + 2 * len(points) for _, _, points in found)
    coders = {
        (row["from"], row["codec"]): codec(evaluations[row["from"]].specification(row["codec"]))
        for _, _, points in found
        for row in points
    }
    return [
        _scene(name, read_image(path), points, coders, BUDGET // pictures, kept)
        for name, path, points in tqdm(found, "gallery", disable=None)
    ]


class _Originals:
    """Files of originals, found by their content; by their name where a result does not hold that."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.files = find_images(paths)
        self._contents: dict[Path, str] = {}

    def find(self, row: Mapping[str, Any]) -> Path | None:
        """The file of a row's original; None where there is none, or several of one name."""
        exact = [path for path in self.files if str(path) == row["image"]]
        named = exact or [path for path in self.files if path.name == Path(row["image"]).name]
        if "pixels" not in row:
            return named[0] if len(named) == 1 else None
        return next((p for p in [*named, *self.files] if self._content(p) == row["pixels"]), None)

    def _content(self, path: Path) -> str:
        if path not in self._contents:
            self._contents[path] = content_id(read_image(path))
        return self._contents[path]


def matched(rows: Sequence[Row], bpp: float | None) -> list[Row]:
    """One row per curve: the one with the rate nearest to the target, see `scenes`; none without a rate."""
    rows = [row for row in rows if row["bpp"] is not None and 0 < row["bpp"] < math.inf]
    families: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        families.setdefault((row.get("from", 0), family(row["codec"])), []).append(row)
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
    coders: Mapping[tuple[int, str], ImageCodec],
    share: int,
    kept: Path | None,
) -> Scene:
    height, width = image.shape[:2]
    scale = _fitting_scale(image, share)  # the same for all, as they are compared with each other
    uri, how = picture(image, share, scale)
    views = [View("original", f"{width}×{height}, 24 bpp · {how}", uri, width, height)]
    maps = []
    names = [row["codec"] for row in points]
    for row in points:
        coder = coders[row["from"], row["codec"]]
        label = row["codec"]
        if names.count(label) > 1:
            label = f"{label} ({1 + row['from']})"
        shown = _decoded(coder, image, row, kept)
        if shown.shape != image.shape:
            raise ConfigError(
                f"{name}: {row['codec']} decodes to another size than the original's; is it the image "
                "that was evaluated?"
            )
        uri, how = picture(shown, share, scale)
        views.append(View(label, f"{_caption(row)} · {how}", uri, width, height))
        if (bits := bit_map(coder, image)) is not None:
            maps.append(_map_view(label, bits, width, height))
    return Scene(name, width, height, [*views, *maps])


def _decoded(
    coder: ImageCodec, image: NDArray[np.uint8], row: Mapping[str, Any], kept: Path | None
) -> NDArray[np.uint8]:
    data = kept_data(kept, row)
    return coder.decode(coder.encode(image) if data is None else data)


def _caption(row: Mapping[str, Any]) -> str:
    psnr = "lossless" if row["psnr"] is None else f"{row['psnr']:.2f} dB"
    similar = "" if row["ms_ssim"] is None else f" · MS-SSIM {row['ms_ssim']:.4f}"
    return f"{row['bpp']:.3f} bpp · {psnr}{similar}"


def picture(image: NDArray[np.uint8], share: int, scale: int = 1) -> tuple[str, str]:
    """A data URI of about `share` bytes at most, and how the picture is stored in it.

    WebP, lossless where that fits; else at the highest quality that fits, or the lowest. With a
    `scale` above 1 each pixel is the mean of `scale`×`scale` pixels.
    """
    image = _reduced(image, scale)
    data = _webp(image, lossless=True, method=2)
    how = "shown exactly"
    if len(data) > share:
        for quality in _LOSSY:
            data = _webp(image, quality=quality, method=4)
            how = f"shown as WebP {quality}"
            if len(data) <= share:
                break
    return _uri(data, "webp"), how if scale == 1 else f"{how}, at 1/{scale} of its size"


def _fitting_scale(image: NDArray[np.uint8], share: int) -> int:
    """The finest of `_SCALES` at which the coarsest quality takes no more than `share` bytes."""
    for scale in _SCALES[:-1]:
        if len(_webp(_reduced(image, scale), quality=_LOSSY[-1], method=4)) <= share:
            return scale
    return _SCALES[-1]


def _reduced(image: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    return image if scale == 1 else np.asarray(Image.fromarray(image).reduce(scale))


def _webp(image: NDArray[np.uint8], **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", **options)
    return buffer.getvalue()


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def bit_map(coder: ImageCodec, image: NDArray[np.uint8]) -> NDArray[np.float64] | None:
    """Estimated bits at every latent position of a learned codec, h×w; None for other codecs."""
    from lightning_tucodec.codecs.learned.codec import RefinedModel, TucModel

    if isinstance(coder, RefinedModel):
        coder = coder.model  # the map is that of the bits before refinement
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
