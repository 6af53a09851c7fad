import numpy as np
import pytest
from skimage.data import astronaut

from lightning_tucodec.codecs.base import ImageCodec
from lightning_tucodec.codecs.colour import (
    Planes,
    conversion_ceiling,
    pad,
    planes_to_rgb,
    rgb_to_planes,
)
from lightning_tucodec.codecs.registry import CLASSES, codec
from lightning_tucodec.errors import ConfigError, CorruptStreamError, ImageInputError
from lightning_tucodec.quality.decibels import psnr_from_sse
from lightning_tucodec.quality.metrics import sse

PHOTO = np.ascontiguousarray(astronaut()[40:168, 150:310])

# A coarse and a fine setting of each, and the least PSNR of the fine one.
SETTINGS = [
    ("jpeg:q=10", "jpeg:q=90,chroma=444", 36),
    ("jpeg:q=10,progressive=1", "jpeg:q=90", 35),
    ("webp:q=5", "webp:q=95", 36),
    ("avif:q=20,speed=8", "avif:q=90,chroma=444,speed=8", 38),
    ("jpeg2000:bpp=0.4", "jpeg2000:bpp=4", 38),
    ("hevc:qp=45,preset=fast", "hevc:qp=20,preset=fast", 39),
    ("hevc:qp=45,chroma=420,preset=fast", "hevc:qp=20,chroma=420,preset=fast", 36),
    ("av1-aom:q=55,speed=8", "av1-aom:q=15,speed=8", 38),
    ("av1-aom:q=55,chroma=420,speed=8", "av1-aom:q=15,chroma=420,speed=8", 35),
    ("av1-svt:q=55,preset=10", "av1-svt:q=15,preset=10", 35),
    ("jxl:distance=8,effort=3", "jxl:distance=0.5,effort=3", 36),
]


def quality(image: np.ndarray, back: np.ndarray) -> float:
    return psnr_from_sse(sse(image, back), image.size)


@pytest.mark.parametrize(("coarse", "fine", "least"), SETTINGS)
def test_round_trip(coarse: str, fine: str, least: float) -> None:
    sizes = []
    for text in (coarse, fine):
        coder = codec(text)
        assert isinstance(coder, ImageCodec)
        assert coder.name == text
        assert codec(coder.name) == coder
        data = coder.encode(PHOTO)
        assert data == coder.encode(PHOTO)
        back = coder.decode(data)
        assert back.dtype == np.uint8
        assert back.shape == PHOTO.shape
        sizes.append((len(data), quality(PHOTO, back)))
    assert sizes[0][0] < sizes[1][0]
    assert sizes[0][1] < sizes[1][1]
    assert sizes[1][1] >= least


@pytest.mark.parametrize("text", [fine for _, fine, _ in SETTINGS if "chroma=420" not in fine])
@pytest.mark.parametrize("shape", [(1, 1), (17, 30), (35, 5)])
def test_odd_and_tiny_sizes(text: str, shape: tuple[int, int]) -> None:
    coder = codec(text)
    image = PHOTO[: shape[0], : shape[1]]
    assert coder.decode(coder.encode(image)).shape == image.shape


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_description_names_version_and_setting(name: str) -> None:
    fine = next((fine for _, fine, _ in SETTINGS if fine.startswith(name + ":")), "vvc:qp=30")
    described = codec(fine).describe()
    assert described["codec"] == fine
    assert any(character.isdigit() for character in described["version"])
    assert described["colour"]
    assert described.get("command") or described["options"]


@pytest.mark.parametrize("text", [fine for _, fine, _ in SETTINGS])
def test_a_stream_that_is_cut_or_foreign_is_refused(text: str) -> None:
    coder = codec(text)
    data = coder.encode(PHOTO)
    damage = [b"", b"not a picture at all" * 9, data[: len(data) // 8]]
    if text.startswith("hevc"):
        damage.pop()  # its decoder hides a missing end
    for damaged in damage:
        with pytest.raises(CorruptStreamError):
            coder.decode(damaged)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jpeg", "jpeg needs q, as in jpeg:q="),
        ("jpeg:q=500", r"q=500 is not within 1 … 95"),
        ("jpeg:q=high", "q=high is not a number"),
        ("jpeg:q", "q is not KEY=VALUE"),
        ("jpeg:q=3,q=4", "q is given twice"),
        ("jpeg:quality=3", "no option quality; there are chroma, optimize, progressive, q"),
        ("hevc:qp=30,chroma=422", "chroma=422 is none of 420, 444"),
        ("nonsense", "no codec or model is named nonsense"),
        (
            "nonsense:q=3",
            "no codec or model is named nonsense; codecs: .*jpeg.*models: .*tiny-mse-2",
        ),
    ],
)
def test_specifications_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        codec(text)


def test_names_leave_out_what_is_default() -> None:
    assert codec("hevc:qp=30,chroma=444,preset=veryslow").name == "hevc:qp=30"
    assert codec("jxl:effort=7,distance=1.50").name == "jxl:distance=1.5"
    assert codec("vvc:qp=30,threads=4,timeout=9").name == "vvc:qp=30"


def test_webp_beyond_its_largest_side() -> None:
    with pytest.raises(ImageInputError, match="cannot code 16384×2 pixels"):
        codec("webp:q=30").encode(np.zeros((2, 16384, 3), np.uint8))


def test_444_conversion_alone_loses_nothing() -> None:
    assert conversion_ceiling(PHOTO, "444") == float("inf")


def test_420_conversion_alone_keeps_gray_and_its_size() -> None:
    gray = np.repeat(PHOTO[:31, :41, :1], 3, axis=2)
    assert conversion_ceiling(gray) == float("inf")
    assert 36 < conversion_ceiling(PHOTO[:31, :41]) < 60


def test_chroma_is_the_least_squares_fit_to_the_interpolation() -> None:
    rng = np.random.default_rng(0)
    image = PHOTO[:16, :16]
    planes = rgb_to_planes(image)
    full = rgb_to_planes(image, "444").cb.astype(float)

    def error(cb: np.ndarray) -> float:
        # Luma and Cr as they are: blue − luma is then the interpolated Cb.
        interpolated = np.repeat(np.repeat(cb.astype(float), 2, 0), 2, 1)
        for axis in (0, 1):
            before = np.take(interpolated, [0, *range(15)], axis)
            after = np.take(interpolated, [*range(1, 16), 15], axis)
            neighbour = np.where(np.arange(16) % 2, *[1, 0])
            shape = (-1, 1) if axis == 0 else (1, -1)
            # Samples in the centre of pairs: ¾ own, ¼ the nearer neighbour.
            nearer = np.where(neighbour.reshape(shape), after, before)  # type: ignore[attr-defined]
            interpolated = 0.75 * interpolated + 0.25 * nearer
        return float(np.square(interpolated - full).sum())

    best = error(planes.cb)
    for _ in range(50):
        other = planes.cb + rng.integers(-2, 3, planes.cb.shape) * (rng.random((8, 8)) < 0.1)
        assert error(other) >= best - 8  # rounding to 10 bits


def test_planes_to_bytes_and_back() -> None:
    planes = rgb_to_planes(PHOTO)
    data = planes.to_bytes()
    assert len(data) == 2 * 128 * 160 * 3 // 2
    again = Planes.from_bytes(data, 128, 160, "420")
    assert all(np.array_equal(a, b) for a, b in zip(planes, again, strict=True))
    assert np.array_equal(planes_to_rgb(again), planes_to_rgb(planes))
    with pytest.raises(CorruptStreamError, match="61438 bytes, but 160×128 in 4:2:0 has 61440"):
        Planes.from_bytes(data[:-2], 128, 160, "420")


def test_padding_repeats_the_edge() -> None:
    padded = pad(PHOTO[:3, :5], 2, 4)
    assert padded.shape == (4, 6, 3)
    assert np.array_equal(padded[3, :5], PHOTO[2, :5])
    assert pad(PHOTO, 2, 16) is PHOTO
