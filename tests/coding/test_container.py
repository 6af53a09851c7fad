"""The `.tuc` container: small, exact, and suspicious of every byte."""

import dataclasses
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_tucodec.coding.container import (
    MAX_PIXELS,
    MAX_SIDE,
    CodecKind,
    Container,
    check_size,
    pack,
    unpack,
)
from lightning_tucodec.errors import (
    CorruptStreamError,
    ImageInputError,
    TucodecError,
    UnsupportedVersionError,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "container.tuc"

THREE = Container(
    CodecKind.LEARNED, b"model-id", 300, 200, (b"first strip", b"", b"third, the last"), flags=5
)

containers = st.builds(
    Container,
    kind=st.sampled_from(CodecKind),
    model_id=st.binary(min_size=8, max_size=8),
    width=st.integers(1, 4096),
    height=st.integers(8, MAX_SIDE),
    strips=st.lists(st.binary(max_size=300), min_size=1, max_size=8).map(tuple),
    flags=st.integers(0, 15),
)


def forge(kind_and_flags: int, numbers: list[bytes], strips: list[bytes]) -> bytes:
    """A file with valid checksums over any header."""
    header = b"TUC\x01" + bytes([kind_and_flags]) + b"model-id" + b"".join(numbers)
    crc = zlib.crc32(header)
    out = header + crc.to_bytes(4, "little")
    for i, strip in enumerate(strips):
        out += strip + zlib.crc32(strip, (crc + i) % 2**32).to_bytes(4, "little")
    return out


@given(containers)
def test_what_is_packed_comes_back(container: Container) -> None:
    data = pack(container)
    assert unpack(data) == container
    assert unpack(data, salvage=True) == container


def test_format_is_the_documented_one() -> None:
    numbers = [b"\xac\x02", b"\xc8\x01", b"\x03", b"\x0b", b"\x00", b"\x0f"]
    assert pack(THREE) == forge(0x50, numbers, [b"first strip", b"", b"third, the last"])


def test_golden_file() -> None:
    """A file of format version 1 must be readable, and written the same, for ever."""
    data = GOLDEN.read_bytes()
    assert unpack(data) == THREE
    assert pack(THREE) == data


@pytest.mark.parametrize(
    ("width", "height", "payload", "overhead"),
    [
        (16, 16, 20, 26),
        (768, 512, 15_000, 29),
        (2000, 2000, 100_000, 29),
        (MAX_SIDE, 4096, 1 << 21, 32),
    ],
)
def test_overhead_of_one_strip(width: int, height: int, payload: int, overhead: int) -> None:
    strip = bytes(payload)
    assert len(pack(Container(CodecKind.LEARNED, bytes(8), width, height, (strip,)))) - payload in (
        overhead - 1,
        overhead,
    )


def test_every_changed_byte_is_found() -> None:
    data = pack(THREE)
    for i in range(len(data)):
        for change in range(1, 256):
            broken = data[:i] + bytes([data[i] ^ change]) + data[i + 1 :]
            with pytest.raises(CorruptStreamError):
                unpack(broken)


def test_every_truncation_and_extension_is_found() -> None:
    data = pack(THREE)
    for size in range(len(data)):
        with pytest.raises(CorruptStreamError):
            unpack(data[:size])
    for tail in (b"\0", b"\0" * 4, data):
        with pytest.raises(CorruptStreamError, match="goes on after its end"):
            unpack(data + tail)


@given(containers.filter(lambda c: len(c.strips) > 1), st.data())
def test_damage_costs_one_strip(container: Container, data: st.DataObject) -> None:
    whole = pack(container)
    sizes = [len(strip or b"") + 4 for strip in container.strips]
    lost = data.draw(st.integers(0, len(sizes) - 1))
    position = len(whole) - sum(sizes[lost:]) + data.draw(st.integers(0, sizes[lost] - 1))
    broken = bytearray(whole)
    broken[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptStreamError, match=f"strip {lost + 1} of {len(sizes)}"):
        unpack(bytes(broken))
    strips = tuple(None if i == lost else s for i, s in enumerate(container.strips))
    expected = dataclasses.replace(container, strips=strips)
    assert unpack(bytes(broken), salvage=True) == expected


def test_salvage_of_a_truncated_file_keeps_the_whole_strips() -> None:
    data = pack(THREE)
    assert unpack(data[:-1], salvage=True).strips == (b"first strip", b"", None)
    assert unpack(data[:-20], salvage=True).strips == (b"first strip", None, None)
    assert unpack(data + b"tail", salvage=True) == THREE


def test_salvage_needs_a_sound_header() -> None:
    data = bytearray(pack(THREE))
    data[6] ^= 1
    with pytest.raises(CorruptStreamError, match="header"):
        unpack(bytes(data), salvage=True)


def test_exchanged_strips_are_found() -> None:
    one = Container(CodecKind.LEARNED, bytes(8), 64, 64, (b"upper", b"lower"))
    data = pack(one)
    upper, lower = data[-18:-9], data[-9:]
    with pytest.raises(CorruptStreamError, match="strip 1 of 2"):
        unpack(data[:-18] + lower + upper)
    other = pack(dataclasses.replace(one, width=65))
    with pytest.raises(CorruptStreamError, match="strip 2 of 2"):
        unpack(data[:-9] + other[-9:])


def test_not_a_tuc_file() -> None:
    for data in (b"", b"T", b"\x89PNG\r\n\x1a\n" + bytes(100)):
        with pytest.raises(CorruptStreamError, match=r"not a \.tuc file"):
            unpack(data)


def test_unknown_version_and_kind_are_named() -> None:
    data = pack(THREE)
    with pytest.raises(UnsupportedVersionError, match="version 2"):
        unpack(data[:3] + b"\x02" + data[4:])
    with pytest.raises(UnsupportedVersionError, match="kind 9"):
        unpack(forge(0x09, [b"\x10", b"\x10", b"\x01", b"\x00"], [b""]))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([b"\x00", b"\x10", b"\x01", b"\x00"], "impossible image"),
        ([b"\xff\xff\x07", b"\x10", b"\x01", b"\x00"], "impossible image"),
        ([b"\xff\xff\x03", b"\xff\xff\x03", b"\x01", b"\x00"], "impossible image"),
        ([b"\x10", b"\x10", b"\x00"], "0 strips"),
        ([b"\x10", b"\x02", b"\x03", b"\x00", b"\x00", b"\x00"], "3 strips for 2 rows"),
        ([b"\x10", b"\x10", b"\xff\xff\xff\xff\x0f"], "strips in"),
        ([b"\x10", b"\x10", b"\x01", b"\xff\xff\xff\xff\x0f"], "truncated"),
        ([b"\x90\x00", b"\x10", b"\x01", b"\x00"], "malformed"),
        ([b"\xff" * 6, b"\x10", b"\x01", b"\x00"], "malformed"),
    ],
)
def test_valid_checksums_over_impossible_headers(numbers: list[bytes], message: str) -> None:
    data = forge(0, numbers, [b""])
    tracemalloc.start()
    try:
        with pytest.raises(CorruptStreamError, match=message):
            unpack(data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_any_bytes_end_in_a_container_or_a_named_error(
    data: bytes, prefixed: bool, salvage: bool
) -> None:
    try:
        container = unpack(b"TUC\x01" + data if prefixed else data, salvage=salvage)
    except TucodecError:
        return
    assert container.width * container.height <= MAX_PIXELS


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (MAX_SIDE + 1, 1), (16_385, 16_385), (-1, -1)])
def test_sizes_outside_the_format_are_refused(size: tuple[int, int]) -> None:
    message = "the image is empty" if min(size) < 1 else "do not fit"
    with pytest.raises(ImageInputError, match=message):
        check_size(*size)
    with pytest.raises(ImageInputError, match=message):
        pack(dataclasses.replace(THREE, width=size[0], height=size[1]))


@pytest.mark.parametrize(
    "change",
    [
        {"strips": ()},
        {"strips": (b"", None)},
        {"height": 2},
        {"model_id": b"short"},
        {"flags": 16},
        {"flags": -1},
    ],
)
def test_fields_that_cannot_be_written_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"strips|model id"):
        pack(dataclasses.replace(THREE, **change))  # type: ignore[arg-type]
