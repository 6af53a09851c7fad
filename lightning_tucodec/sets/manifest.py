"""The manifest of a submission, checked before any of it is used, and the files that it tells of.

    submission/
        manifest.json     image, candidate, file, bytes and hashes of each; limits and totals
        streams/<n>.bin   the coded files, as the candidates' codecs wrote them
        models/<id>.safetensors   the learned models that the streams need
        decode            one command: everything to PNG files, without a network

Whoever wrote the folder is not trusted: the manifest has exactly these keys, of these types; files are
regular ones inside the folder, behind no link, and of the size and SHA-256 that the manifest tells.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from lightning_tucodec.codecs.registry import needs_model
from lightning_tucodec.errors import ConfigError, is_one_line

FORMAT = "tucodec-submission-2"
MANIFEST = "manifest.json"
_MOST_BYTES = 1 << 31
"""No file of a submission is larger: a hostile one must not fill the memory."""

_LARGEST = 1e15

Check = Callable[[Any], bool]


@dataclass(frozen=True)
class Limits:
    """The limits that the set must meet; None: no such limit.

    Attributes:
        max_bytes: sum of the streams' bytes.
        min_psnr: pooled PSNR, dB.
        min_ms_ssim: pixel-weighted MS-SSIM.
        max_seconds: sum of decoding times.

    Raises:
        ConfigError: a limit is negative, not finite or absurdly large.
    """

    max_bytes: int | None = None
    min_psnr: float | None = None
    min_ms_ssim: float | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            if not 0 <= value <= _LARGEST:
                raise ConfigError(f"the limit {name} cannot be {value}")

    def given(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def byte_budget(bpp: float, pixels: int) -> int:
    """Most bytes that `pixels` pixels may take at `bpp` bits each.

    Raises:
        ConfigError: `bpp` is negative or not finite.
    """
    if not 0 <= bpp <= _LARGEST:
        raise ConfigError(f"{bpp} bits a pixel cannot be a limit")
    return math.floor(Fraction(str(bpp)) * pixels / 8)


def budget_name(budget: float) -> str:
    """Name of a budget's folder in a submission for several, in bits per pixel."""
    return f"{budget:.9f}".rstrip("0").rstrip(".")


def is_image_name(name: str) -> bool:
    """Whether a manifest may use this image name: a file name without control characters."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return is_one_line(name) and "/" not in name and name not in ("", ".", "..")


def png_name(entry: Mapping[str, Any]) -> str:
    """What a manifest's image is decoded to."""
    return f"{Path(entry['image']).stem}.png"


# --- The manifest --------------------------------------------------------------------------------


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _side(value: Any) -> bool:
    return type(value) is int and 1 <= value < 1 << 31


def _size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST_BYTES


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1 << 62


def _limit(value: Any) -> bool:
    return value is None or (_number(value) and 0 <= value <= _LARGEST)


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _image(value: Any) -> bool:
    return isinstance(value, str) and is_image_name(value)


def _matches(pattern: str) -> Check:
    compiled = re.compile(pattern)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


_OTHER_FORMAT = _matches("tucodec-submission-[0-9]{1,9}")
_SHA256 = _matches("[0-9a-f]{64}")

_KEYS: dict[str, Check] = {
    "format": lambda value: value == FORMAT,
    "minimised": lambda value: value in ("bytes", "sse", "ms_ssim"),
    "limits": _mapping,
    "totals": _mapping,
    "codecs": _mapping,
    "models": _mapping,
    "images": lambda value: isinstance(value, list) and len(value) > 0,
}
_LIMIT_KEYS: dict[str, Check] = {
    "max_bytes": lambda value: _limit(value) and type(value) is not float,
    "min_psnr": _limit,
    "min_ms_ssim": _limit,
    "max_seconds": _limit,
}
_TOTAL_KEYS: dict[str, Check] = {
    "bytes": _count,
    "bpp": _number,
    "psnr": _or_none(_number),
    "ms_ssim": _number,
    "bound": _or_none(_number),
    "gap": _or_none(_number),
    "method": _text,
}
_IMAGE_KEYS: dict[str, Check] = {
    "file": _matches(r"streams/[0-9]{1,9}\.bin"),
    "image": _image,
    "codec": _text,
    "width": _side,
    "height": _side,
    "bytes": _size,
    "sse": _count,
    "ms_ssim": _number,
    "sha256": _SHA256,
}
_MODEL_KEYS: dict[str, Check] = {"bytes": _size, "sha256": _SHA256}
_MODEL_FILE = _matches(r"models/[0-9a-f]{16}\.safetensors")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a submission; its keys, types and references are as this program writes them.

    Raises:
        ConfigError: there is none, or it is not one; says what is wrong first.
    """
    path = folder / MANIFEST
    if folder.is_dir() and not os.path.lexists(path):
        raise ConfigError(f"{folder}: not a submission of tucodec allocate, it has no {MANIFEST}")
    try:
        content = json.loads(read_file(folder, MANIFEST), object_pairs_hook=_object)
        _check_manifest(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not the manifest of a submission (too deep)") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not the manifest of a submission ({error})") from None
    assert isinstance(content, dict)
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key is given twice")
    return content


def _check_keys(value: Any, where: str, keys: Mapping[str, Check]) -> None:
    """Raise ValueError unless `value` is an object of exactly these keys with values that fit."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no object")
    for key in sorted(keys.keys() ^ value.keys()):
        raise ValueError(f"{where}: {_shown(key)} is {'missing' if key in keys else 'unknown'}")
    for key, fits in keys.items():
        if not fits(value[key]):
            raise ValueError(f"{where}: {key} cannot be {_shown(value[key])}")


def _check_manifest(content: Any) -> None:
    written = content.get("format") if isinstance(content, dict) else None
    if written != FORMAT:
        if _OTHER_FORMAT(written):
            raise ValueError(
                f"another version of this program wrote it, as {written}; this one reads {FORMAT}: "
                "write it again with `tucodec allocate`, in a new folder"
            )
        raise ValueError(f"its format is not {FORMAT}")
    _check_keys(content, "the manifest", _KEYS)
    _check_keys(content["limits"], "limits", _LIMIT_KEYS)
    _check_keys(content["totals"], "totals", _TOTAL_KEYS)
    for number, entry in enumerate(content["images"]):
        _check_keys(entry, f"image {number}", _IMAGE_KEYS)
    for file, told in content["models"].items():
        if not _MODEL_FILE(file):
            raise ValueError(f"a model's file cannot be {_shown(file)}")
        _check_keys(told, file, _MODEL_KEYS)
    entries, codecs = content["images"], content["codecs"]
    for what, names in (
        ("image", [entry["image"] for entry in entries]),
        ("file", [entry["file"] for entry in entries]),
        ("picture", [png_name(entry) for entry in entries]),
    ):
        for name, count in Counter(names).items():
            if count > 1:
                raise ValueError(f"{what} {_shown(name)} is there {count} times")
    used = {entry["codec"] for entry in entries}
    for name in sorted(used ^ codecs.keys()):
        raise ValueError(f"codec {_shown(name)} is not {'described' if name in used else 'used'}")
    models = set()
    for name, described in codecs.items():
        if not isinstance(described, dict):
            raise ValueError(f"codec {_shown(name)} is no object")
        model = described.get("model")
        if (model is not None) != needs_model(name):
            says = "has no model" if model is None else "needs no model"
            raise ValueError(f"codec {_shown(name)} {says}")
        if model is not None:
            if not isinstance(model, str) or model not in content["models"]:
                raise ValueError(f"codec {_shown(name)}: no model {_shown(model)}")
            models.add(model)
    for file in sorted(content["models"].keys() - models):
        raise ValueError(f"{file} is not used")


def _shown(value: Any) -> str:
    """A value for a message of one line."""
    return repr(value)[:80]


# --- The files -----------------------------------------------------------------------------------


def read_file(folder: Path, name: str, size: int | None = None) -> bytes:
    """A regular file inside a submission.

    Args:
        folder: the submission.
        name: of the file, below it.
        size: bytes that it must have.

    Raises:
        ConfigError: what is wrong, without the file's name.
    """
    path = folder / name
    try:
        found = path.lstat()
        if os.path.realpath(path) != os.path.join(os.path.realpath(folder), name):
            raise ConfigError("is a link, or lies behind one")
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError("is not a file")
        if size is not None and found.st_size != size:
            raise ConfigError(f"is damaged or another file: {found.st_size} bytes, not {size}")
        if found.st_size > _MOST_BYTES:
            raise ConfigError(f"has {found.st_size} bytes, more than {_MOST_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(str(error.strerror)) from None


def told_file(folder: Path, name: str, told: Mapping[str, Any]) -> bytes:
    """A file of a submission, checked against the manifest's `bytes` and `sha256`.

    Raises:
        ConfigError: it is missing or not the one the manifest means; without the file's name.
    """
    data = read_file(folder, name, told["bytes"])
    if hashlib.sha256(data).hexdigest() != told["sha256"]:
        raise ConfigError("is damaged or another file: its SHA-256 is not the manifest's")
    return data
