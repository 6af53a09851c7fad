"""Names and records of shards, for builds of every kind."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from lightning_tucodec.io.storage import sha256_file

INDEX = "index.json"


def describe_shard(path: Path, name: str, extension: str) -> dict[str, Any]:
    """What the index says about a finished tar; `extension` is that of the samples' data."""
    with tarfile.open(path, "r:") as tar:
        members = [m for m in tar if m.name.endswith(f".{extension}")]
    return {
        "name": name,
        "samples": len(members),
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "offsets": [member.offset_data for member in members],
        "sizes": [member.size for member in members],
    }


def named_stream(data: bytes, name: str) -> io.BytesIO:
    """A file in memory with a name, for messages."""
    stream = io.BytesIO(data)
    stream.name = name
    return stream


def json_line(value: Any) -> bytes:
    r"""One line of JSON in UTF-8; a byte of a name that is not UTF-8 becomes JSON's escape `\udcXX`."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"shard-{shard:06d}.tar"
