"""The parameter sets of our own H.266 pictures, in three bytes instead of seventy.

libvvenc writes a sequence and a picture parameter set before the picture. For one picture of ours they
depend on the size, which the container states anyway, on the level, the preset, its tools and the
chroma QP offset. `strip` removes them where they equal those of `_sets`, and `restore` puts them
back, bit for bit. Other parameter sets, such as those of another version of libvvenc, stay in the stream.

Syntax: ITU-T H.266 (04/2022), 7.3.2.4 and 7.3.2.5; Exp-Golomb codes, 9.2; emulation prevention, 7.4.2.
"""

import re

from lightning_tucodec.errors import CorruptStreamError

_START = b"\x00\x00\x01"
_SPS, _PPS = b"\x00\x79", b"\x00\x81"
_ADAPTATION = 17  # type of the parameter set that holds filter coefficients and the luma mapping
_VERBATIM = b"\xff"

_SETTINGS = {
    "faster": ("0b", "9a80fffd6109b2b182041382a86608ce2800000008000000098", "0000000"),
    "fast": ("0b", "13501fa2134527bce136563040827055f7a5d8ace4800000008000000098", "1011000000"),
    "medium": ("0d", "9a80fa6dd32348a4de709b2b182041382affd2ecbfce4800000008000000098", "1011000000"),
    "slow": ("0d", "26a03e88dd108d329326709b2b182041382afffbbe4fce4800000008000000098", "1011000000"),
    "slower": ("0d", "26a03e88dd108d329327709b2b182041382afffbbe4fce4800000008000000098", "1011000000"),
    "faster, splits": ("0b", "9a80fc84264293d7109b2b182041382a86608ce2800000008000000098", "0000000"),
    "fast, splits": ("0b", "13501f9084c8527bee136563040827055f7a5d8ace4800000008000000098", "1011000000"),
    "medium, deep": ("0d", "9a80fa237442348a4df709b2b182041382affd2ecbfce4800000008000000098", "1011000000"),
    "faster, deep": ("0b", "9a80fc84264293d7109b2b182041382a8660cce2800000008000000098", "0000000"),
    "fast, deep": ("0b", "13501f9084c8527bee136563040827055f7a5d8ece4800000008000000098", "1011000000"),
    "faster, wide": ("0b", "9a80fffd7109b2b182041382a8660cce2800000008000000098", "0000000"),
    "fast, wide": ("0b", "13501fa2134527bee136563040827055f7a5d8ece4800000008000000098", "1011000000"),
    "medium, wide": ("0d", "9a80fa6dd32348a4df709b2b182041382affd2ecbfce4800000008000000098", "1011000000"),
}  # fmt: skip
"""For each preset: the byte with the size of coding tree units, the tools in the sequence parameter set
(after a leading one), the end of the picture parameter set. With more tools `slow` has the same parameter
sets as `slower`, and `thorough` the same as `deep`. `splits` is an earlier version of the deep tools. Streams
hold the index into this table, so new lines go to its end.
"""

_NAMES = tuple(_SETTINGS)


def strip(stream: bytes, height: int, width: int) -> bytes:
    """A bare stream without what `restore` can put back.

    Args:
        stream: as libvvenc wrote it for planes of this size.
        height: of luma, even.
        width: of luma, even.
    """
    parts = re.split(b"\x00?\x00\x00\x01", stream, maxsplit=3)
    if len(parts) == 4 and parts[0] == b"" and len(parts[1]) > 5:
        level = parts[1][5]
        for number in range(len(_NAMES)):
            for offset in range(-12, 13):
                if parts[1:3] == list(_sets(number, level, offset, height, width)):
                    short = bytes([number, level, offset + 12]) + parts[3]
                    # The rest may be framed otherwise.
                    return short if restore(short, height, width) == stream else _VERBATIM + stream
    return _VERBATIM + stream


def restore(data: bytes, height: int, width: int) -> bytes:
    """The stream that `strip` was given.

    Raises:
        CorruptStreamError: `data` does not begin as `strip` lets it begin.
    """
    if data[:1] == _VERBATIM:
        return data[1:]
    if len(data) < 5 or data[0] >= len(_NAMES) or data[2] > 24:
        raise CorruptStreamError("the H.266 picture does not begin as one of ours")
    sps, pps = _sets(data[0], data[1], data[2] - 12, height, width)
    # Parameter sets have long start codes, an adaptive one before the slice as well.
    zero = b"\x00" if data[4] >> 3 == _ADAPTATION else b""
    return b"".join([b"\x00", _START, sps, b"\x00", _START, pps, zero, _START, data[3:]])


def _sets(number: int, level: int, offset: int, height: int, width: int) -> tuple[bytes, bytes]:
    """Sequence and picture parameter set, with headers, without start codes."""
    tree, tools, end = _SETTINGS[_NAMES[number]]
    # Coded sides are multiples of eight; the rest is cut off by a window, in chroma samples.
    coded = [-(-side // 8) * 8 for side in (width, height)]
    size = "".join(map(_unsigned, coded))
    cut = [(full - side) // 2 for full, side in zip(coded, (width, height), strict=True)]
    window = "1" + "".join(_unsigned(0) + _unsigned(c) for c in cut) if any(cut) else "0"
    sps = f"{int(tree, 16):016b}00000010{level:08b}100000000000000010"
    sps += size + window + f"{int(tools, 16):b}"[1:]
    offsets = "11" + 2 * _signed(offset) + end
    # No offsets, and no joint coding of chroma.
    if offset == 0 and _NAMES[number].startswith("faster"):
        offsets = "100000"
    pps = "00000000000" + size + "0001001100001" + offsets
    return _SPS + _payload(sps), _PPS + _payload(pps)


def _unsigned(value: int) -> str:
    """Exp-Golomb code ue(v)."""
    bits = f"{value + 1:b}"
    return "0" * (len(bits) - 1) + bits


def _signed(value: int) -> str:
    """Exp-Golomb code se(v)."""
    return _unsigned(2 * value - 1 if value > 0 else -2 * value)


def _payload(bits: str) -> bytes:
    """Stop bit, alignment, and emulation prevention."""
    bits += "1"
    bits += "0" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return re.sub(b"\x00\x00(?=[\x00-\x03])", b"\x00\x00\x03", data)
