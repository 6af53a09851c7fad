"""The journal of an evaluation: a line of JSON for each finished measurement.

A row's key is made of the image's pixels and the codec's description (name, version, command, colour path).
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path

from lightning_tucodec.codecs.base import ImageCodec
from lightning_tucodec.errors import OutputError
from lightning_tucodec.io.files import begins_with
from lightning_tucodec.quality.curve_files import contradiction
from lightning_tucodec.sets.measure import Row

_BEGINNING = '{"key": "'
"""How rows of measurements begin."""

_NUMBERS = (
    *("width", "height", "bytes", "bpp", "sse", "sse_y", "psnr", "psnr_y"),
    *("encode_seconds", "decode_seconds"),
)
_SIMILARITY = ("ms_ssim", "ms_ssim_db")
"""What every row of `measure` holds; MS-SSIM may be None."""


class Journal:
    """Finished measurements by key; additions are written to the file at once.

    Args:
        path: JSON lines; the file and its folder are made where they are missing.
        others: journals of other processes, which are only read. Their rows come first.

    Raises:
        OutputError: a file exists and is no journal.
    """

    def __init__(self, path: Path, others: Iterable[Path] = ()) -> None:
        self._lock = threading.Lock()
        self._path = path
        self._rows: dict[str, Row] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._read(path)
        with path.open("a", encoding="utf-8") as stream:
            stream.write("" if whole else "\n")
        for other in others:
            self._read(other)

    def get(self, key: str) -> Row | None:
        """The measurement of a key, if it is known."""
        return self._rows.get(key)

    def add(self, key: str, row: Row) -> None:
        """Keep a measurement."""
        with self._lock, self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"key": key, **row}) + "\n")
        self._rows[key] = row

    def _read(self, path: Path) -> bool:
        """Take the rows of a file.

        Returns:
            Whether its last line is whole. A killed process may have left half a line.
        """
        if not os.path.lexists(path):
            return True
        if not begins_with(path, [_BEGINNING]):
            raise OutputError(f"{path}: exists and holds no measurements; name another place")
        line = "\n"
        with path.open(encoding="utf-8", errors="replace") as stream:
            for line in stream:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                key = row.pop("key", None) if isinstance(row, dict) else None
                if isinstance(key, str) and _whole(row):
                    self._rows[key] = row
        return line.endswith("\n")


def codec_digest(codec: ImageCodec) -> str:
    """A short digest of a codec's description."""
    described = json.dumps(codec.describe(), sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _whole(row: Row) -> bool:
    """Whether a row that was read holds all of a measurement, of the right kinds and in agreement."""
    if isinstance(row.get("peak_memory"), int):
        return True
    numbers = all(type(row.get(key)) in (int, float) for key in _NUMBERS)
    similarity = all(row.get(key, "") is None or type(row.get(key)) is float for key in _SIMILARITY)
    digest = row.get("sha256")
    kept = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None
    return numbers and similarity and kept and contradiction(row) is None
