"""The contents of a submission's folder, checked before any of it is used.

    submission/
        manifest.json     image, candidate, file, bytes and hashes of each; limits and totals
        streams/<n>.bin   the coded files, as the candidates' codecs wrote them
        models/<id>.safetensors   the learned models that the streams need
        decode            one command: everything to PNG files, without a network

A submission for several budgets has one such folder for each, named by the budget (`0.15`), and a `decode`
that runs theirs.

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
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from lightning_tucodec.codecs.registry import needs_model
from lightning_tucodec.errors import ConfigError, is_one_line

FORMAT = "tucodec-submission-2"
MANIFEST = "manifest.json"
DECODE = "decode"

# The text is part of the format: a change of it needs another number in FORMAT. Otherwise `verify` would
# reject submissions of earlier versions, and `allocate` refuse to replace them, without saying why.
# -P: Python imports no module from the working directory.
DECODE_TEXT = """\
#!/bin/sh
# Decodes this submission to PNG files in the folder $1 (default: decoded); --force behind it
# replaces pictures that are there. Needs the Python package lightning_tucodec and no network.
here=$(dirname "$(readlink -f "$0")")
out=${1:-decoded}
[ $# -eq 0 ] || shift
exec "${PYTHON:-python3}" -P -m lightning_tucodec.cli clic decode "$here" -o "$out" "$@"
"""

DECODE_ALL_TEXT = """\
#!/bin/sh
# Decodes the submissions of all budgets to PNG files, each into a folder of its own in $1 (default:
# decoded); --force behind it replaces pictures that are there.
here=$(dirname "$(readlink -f "$0")")
out=${1:-decoded}
[ $# -eq 0 ] || shift
for one in "$here"/*/decode; do
    "$one" "$out/$(basename "$(dirname "$one")")" "$@" || exit
done
"""

LITTER = frozenset({".DS_Store"})
"""Files that a file manager leaves in any folder."""

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

_BUDGET = _matches(r"[0-9]{1,9}(\.[0-9]{1,9})?")

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


def contents(folder: Path) -> Iterator[str]:
    """Relative names of everything in the folder except folders; links are not followed."""
    for parent, folders, files in os.walk(folder):
        inside = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in files + inside:
            yield os.path.relpath(os.path.join(parent, name), folder)


def wrong_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What is wrong with a submission's files other than its streams, a line each."""
    wrong = []
    for file, told in manifest["models"].items():
        try:
            told_file(folder, file, told)
        except ConfigError as error:
            wrong.append(f"{file}: {error}")
    wrong += _wrong_script(folder, DECODE_TEXT)
    listed = {entry["file"] for entry in manifest["images"]} | set(manifest["models"])
    listed |= {MANIFEST, DECODE}
    more = sorted(
        name
        for name in contents(folder)
        if name not in listed and os.path.basename(name) not in LITTER
    )
    shown = [name if name.isprintable() else repr(name) for name in more]
    folders = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir()}
    shown += [f"a folder {name!a}" for name in sorted(folders - {"streams", "models"})]
    return wrong + [f"{name}: not in the manifest" for name in shown]


def _wrong_script(folder: Path, text: str) -> list[str]:
    """Whether `DECODE` in a folder is this text, as at most one line of what is wrong."""
    try:
        if read_file(folder, DECODE) == text.encode():
            return []
    except ConfigError as error:
        return [f"{DECODE}: {error}"]
    return [f"{DECODE}: is not the script that tucodec allocate writes"]


def write_script(path: Path, text: str) -> None:
    """Write an executable script."""
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def budgets(folder: Path) -> list[str]:
    """Names of the folders of a submission for several budgets, by budget; none of another folder.

    What else is wrong with it, `wrong_beside` says.
    """
    if not folder.is_dir() or os.path.lexists(folder / MANIFEST):
        return []
    names = [path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    found = [name for name in names if _BUDGET(name) and f"{float(name):.10g}" == name]
    return sorted((name for name in found if (folder / name / MANIFEST).is_file()), key=float)


def wrong_beside(folder: Path, parts: Collection[str]) -> list[str]:
    """What is wrong with a submission for several budgets beside its parts, a line each."""
    listed = {DECODE, *LITTER, *parts}
    more = sorted(path.name for path in folder.iterdir() if path.name not in listed)
    shown = [name if name.isprintable() else repr(name) for name in more]
    wrong = _wrong_script(folder, DECODE_ALL_TEXT)
    return wrong + [f"{name}: is no part of the submission" for name in shown]


def foreign(folder: Path) -> str | None:
    """Why a folder is not exactly a complete submission of this program; None if it is.

    An empty folder passes; one for several budgets consists of submissions.

    Raises:
        OSError: the folder cannot be read.
    """
    if all(path.name in LITTER for path in folder.iterdir()):
        return None
    if parts := budgets(folder):
        reasons = (f"{name}: {why}" for name in parts if (why := foreign(folder / name)))
        return next(iter(wrong_beside(folder, parts)), None) or next(reasons, None)
    try:
        manifest = read_manifest(folder)
    except ConfigError as error:
        return str(error)
    if wrong := wrong_files(folder, manifest):
        return wrong[0]
    for entry in manifest["images"]:
        try:
            told_file(folder, entry["file"], entry)
        except ConfigError as error:
            return f"{entry['file']}: {error}"
    return None
