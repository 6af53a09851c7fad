"""Writing files so that nobody ever sees half of one, and reading what was appended to."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on a clean exit flush it to disk and rename it to `path`.

    If the block raises, `path` keeps what it held before and the temporary file is removed.
    The parent folder is made when it is missing.

    Args:
        path: the final name.
        mode: "wb" or "w" (text is UTF-8).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        os.fchmod(handle, 0o666 & ~_umask())
        with os.fdopen(handle, mode, encoding=encoding) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """All complete lines of a file of JSON lines, without one cut short by a kill; none if it is missing."""
    rows = []
    path = Path(path)
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def _umask() -> int:
    """The process's umask, which Python can only read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
