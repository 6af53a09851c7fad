"""The ffmpeg binary of the imageio-ffmpeg wheel: bytes in, bytes out, errors in words."""

import re
import subprocess
import tempfile
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.errors import CorruptStreamError, ExternalToolError
from lightning_tucodec.io import processes
from lightning_tucodec.io.once import once


def executable() -> str:
    """Path of the binary: `IMAGEIO_FFMPEG_EXE` if set, else the one inside the wheel.

    Raises:
        ExternalToolError: there is none.
    """
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise ExternalToolError(
            "no ffmpeg found: reinstall imageio-ffmpeg, or point IMAGEIO_FFMPEG_EXE to a binary"
        ) from None


def encode(
    source: Sequence[str], coder: Sequence[str], data: bytes, *, encoder: str, timeout: float
) -> bytes:
    """Run one encoder over one raw picture.

    Args:
        source: options of the input.
        coder: options of the output, `-c:v` aside.
        data: the raw picture.
        encoder: ffmpeg's name of the encoder.
        timeout: seconds until the process is killed.

    Raises:
        ExternalToolError: the binary is missing or lacks the encoder, or the process failed or did
            not end in time.
    """
    arguments = [*source, "-i", "pipe:0", "-frames:v", "1", "-c:v", encoder, *coder]
    status, output, complaint = _run(arguments, data, timeout, encoder)
    if "Unknown encoder" in complaint:
        raise ExternalToolError(
            f"{executable()} has no encoder {encoder}: use the binary of imageio-ffmpeg >= 0.6 "
            "(unset IMAGEIO_FFMPEG_EXE)"
        )
    if status or not output:
        raise ExternalToolError(f"{encoder} failed with status {status}: {_reason(complaint)}")
    return output


def decode(
    source: Sequence[str], sink: Sequence[str], data: bytes, *, decoder: str, timeout: float
) -> bytes:
    """Run one decoder over one coded picture; the raw picture comes back.

    Args:
        source: options of the input, `-c:v` aside.
        sink: options of the raw output.
        data: the coded picture.
        decoder: ffmpeg's name of the decoder.
        timeout: seconds until the process is killed.

    Raises:
        CorruptStreamError: the decoder refused the stream or made no picture of it.
        ExternalToolError: the binary is missing or lacks the decoder, or did not end in time.
    """
    # -xerror: a picture with a damaged part is not a picture.
    arguments = [
        "-xerror",
        "-err_detect",
        "explode",
        *source,
        "-c:v",
        decoder,
        "-i",
        "pipe:0",
        "-frames:v",
        "1",
    ]
    arguments += list(sink)
    status, output, complaint = _run(arguments, data, timeout, decoder)
    if "Unknown decoder" in complaint:
        raise ExternalToolError(
            f"{executable()} has no decoder {decoder}: use the binary of imageio-ffmpeg >= 0.6 "
            "(unset IMAGEIO_FFMPEG_EXE)"
        )
    if status or not output:
        raise CorruptStreamError(f"the {decoder} decoder refused the stream: {_reason(complaint)}")
    return output


def compare(
    measure: str,
    original: NDArray[np.uint8],
    decoded: NDArray[np.uint8],
    *,
    pixel_format: str,
    timeout: float,
) -> str:
    """What a filter that compares two pictures says.

    Args:
        measure: the filter with its options; its inputs are the decoded picture and the original.
        original: H×W×3.
        decoded: the same shape.
        pixel_format: what the filter gets, BT.709, limited range.
        timeout: seconds until the process is killed.

    Raises:
        ExternalToolError: the binary is missing or lacks the filter, or the process failed or did not
            end in time.
    """
    height, width = original.shape[:2]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "1"]
    convert = f"scale=out_range=tv:out_color_matrix=bt709,format={pixel_format}"
    graph = (
        f"[0:v]{convert},split[a][b];[a]trim=end_frame=1[original];"
        f"[b]trim=start_frame=1,setpts=PTS-STARTPTS[decoded];[decoded][original]{measure}"
    )
    arguments = [*source, "-i", "pipe:0", "-filter_complex", graph, "-frames:v", "1", "-f", "null"]
    data = original.tobytes() + decoded.tobytes()
    name = measure.partition("=")[0]
    status, _, said = _run(arguments, data, timeout, name, level="info")
    if "No such filter" in said or "Filter not found" in said:
        raise ExternalToolError(
            f"{executable()} has no filter {name}: use the binary of imageio-ffmpeg >= 0.6 "
            "(unset IMAGEIO_FFMPEG_EXE)"
        )
    if status:
        raise ExternalToolError(f"{name} failed with status {status}")
    return said


@once
def version(encoder: str) -> str:
    """The version of ffmpeg, the encoder and, where it prints it, the encoder's version."""
    import imageio_ffmpeg

    executable()
    ffmpeg = f"ffmpeg {imageio_ffmpeg.get_ffmpeg_version().lstrip('n')}"
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x64", "-r", "1", "-i", "pipe:0"]
    arguments = [*source, "-frames:v", "1", "-c:v", encoder, "-f", "rawvideo"]
    messages = _run(arguments, bytes(64 * 64 * 3), 60.0, encoder, level="verbose")[2]
    own = re.search(r"(?i)(?:version\W*\s(?:.*\sv)?|\] v)(\d\S*)", messages)
    return f"{encoder} {own.group(1)} in {ffmpeg}" if own else f"{encoder} in {ffmpeg}"


def _run(
    arguments: list[str], data: bytes, timeout: float, what: str, level: str = "error"
) -> tuple[int, bytes, str]:
    """Exit status, output and messages of one process that ends before we return, come what may."""
    binary = executable()
    # Coders print to stdout (libvvenc its warnings), so the result goes to a descriptor of its own.
    with tempfile.TemporaryFile() as result:
        command = [binary, "-hide_banner", "-nostdin", "-v", level, *arguments]
        try:
            with processes.child(
                [*command, f"pipe:{result.fileno()}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(result.fileno(),),
            ) as process:
                _, complaint = process.communicate(data, timeout)
        except OSError as error:
            raise ExternalToolError(f"cannot start {binary}: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise ExternalToolError(f"{what} did not end within {timeout:g} s") from None
        result.seek(0)
        return process.returncode, result.read(), complaint.decode(errors="replace")


def _reason(complaint: str) -> str:
    """The first line of the messages, which names the cause; the later ones follow from it."""
    lines = [re.sub(r"^\[[^]]*\]\s*", "", line) for line in complaint.splitlines() if line.strip()]
    return lines[0] if lines else "it said nothing"
