import contextlib
import os
import time
from pathlib import Path

import numpy as np
import pytest
from skimage.data import astronaut

from lightning_tucodec.codecs.colour import conversion_ceiling, rgb_to_planes
from lightning_tucodec.codecs.h266.vvc import Vvc
from lightning_tucodec.errors import (
    ConfigError,
    CorruptStreamError,
    ExternalToolError,
    ImageInputError,
)
from lightning_tucodec.quality.decibels import psnr_from_sse
from lightning_tucodec.quality.metrics import sse

PHOTO = np.ascontiguousarray(astronaut()[40:168, 150:310])


def quality(image: np.ndarray, back: np.ndarray) -> float:
    return psnr_from_sse(sse(image, back), image.size)


def binary(path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a shell script in the place of ffmpeg."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))


def test_rate_falls_and_quality_with_it_as_qp_rises() -> None:
    points = []
    for qp in (10, 25, 37, 50):
        codec = Vvc(qp, preset="faster")
        data = codec.encode(PHOTO)
        points.append((len(data), quality(PHOTO, codec.decode(data))))
    assert points == sorted(points, reverse=True)
    assert points[0][1] > conversion_ceiling(PHOTO) - 1.5
    assert all(value < conversion_ceiling(PHOTO) for _, value in points)


def test_the_bitstream_is_exact_and_repeats_for_any_threads() -> None:
    one, two = Vvc(37, preset="faster"), Vvc(37, preset="faster", threads=2)
    assert one == two
    data = one.encode(PHOTO)
    assert data == two.encode(PHOTO)
    assert data[:4] == bytes([0, 160, 0, 128])
    # A start code and a sequence parameter set (type 15), no access unit delimiter before it.
    assert data[4:8] in (b"\x00\x00\x00\x01", b"\x00\x00\x01\x00")
    assert data[data.index(b"\x00\x00\x01", 4) + 4] >> 3 == 15
    assert np.array_equal(one.decode(data), two.decode(data))
    planes = rgb_to_planes(PHOTO)
    assert one.encode_planes(planes) == data[4:]
    assert one.decode_planes(data[4:], 128, 160).cb.shape == (64, 80)


def test_chroma_offset_moves_bits_to_chroma() -> None:
    plain, finer = Vvc(40, preset="faster"), Vvc(40, preset="faster", chroma_qp_offset=-6)
    assert finer.name == "vvc:qp=40,preset=faster,chroma_qp_offset=-6"
    data, more = plain.encode(PHOTO), finer.encode(PHOTO)
    assert len(more) > len(data)
    assert quality(PHOTO, finer.decode(more)) > quality(PHOTO, plain.decode(data))
    assert "CbQpOffset=-6:CrQpOffset=-6" in finer.describe()["command"]


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (15, 33), (127, 9)])
def test_any_size(shape: tuple[int, int]) -> None:
    codec = Vvc(22, preset="faster")
    image = PHOTO[: shape[0], : shape[1]]
    back = codec.decode(codec.encode(image))
    assert back.shape == image.shape
    assert quality(image, back) > 30


def test_16384_pixels_wide_are_coded_and_more_refused() -> None:
    codec = Vvc(50, preset="faster")
    wide = np.zeros((16, 16384, 3), np.uint8)
    assert codec.decode(codec.encode(wide)).shape == wide.shape
    with pytest.raises(ImageInputError, match=r"16385×1 pixels.* sides up to 16384"):
        codec.encode(np.zeros((1, 16385, 3), np.uint8))


def test_damaged_streams() -> None:
    codec = Vvc(30, preset="faster")
    data = codec.encode(PHOTO)
    taller = data[:2] + b"\x00\xff" + data[4:]
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    for damaged in (b"", data[:4], data[:60], data[:-20], b"\0\0" + data[2:], taller):
        with pytest.raises(CorruptStreamError):
            codec.decode(damaged)
    # Without a checksum a changed byte may decode to other pixels, but to nothing worse.
    with contextlib.suppress(CorruptStreamError):
        assert codec.decode(bytes(flipped)).shape == PHOTO.shape


@pytest.mark.parametrize(("option", "value"), [("qp", 64), ("preset", "best")])
def test_settings_that_cannot_be(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=option):
        Vvc(**{"qp": 30, option: value})  # type: ignore[arg-type]


def test_missing_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    with pytest.raises(ExternalToolError, match=r"cannot start .*none: No such file"):
        Vvc(30).encode(PHOTO)


def test_binary_without_libvvenc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary(tmp_path / "ffmpeg", "echo \"Unknown encoder 'libvvenc'\" >&2; exit 8", monkeypatch)
    with pytest.raises(ExternalToolError, match="has no encoder libvvenc: use the binary of"):
        Vvc(30).encode(PHOTO)


def test_failing_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary(tmp_path / "ffmpeg", "echo '[x @ 0x1] disk on fire' >&2; exit 3", monkeypatch)
    with pytest.raises(ExternalToolError, match="libvvenc failed with status 3: disk on fire"):
        Vvc(30).encode(PHOTO)


def test_a_binary_that_hangs_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary(tmp_path / "ffmpeg", f"sleep 600 & echo $! > {tmp_path}/child; wait", monkeypatch)
    with pytest.raises(ExternalToolError, match=r"libvvenc did not end within 0.5 s"):
        Vvc(30, timeout=0.5).encode(PHOTO)
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            break
        if state == "Z":  # dead, its new parent has not asked yet
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        pytest.fail("the child of the hanging binary lives on")
