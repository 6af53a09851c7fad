"""What lies in a submission's folder, and whether that is all `tucodec allocate` writes, and nothing else.

`manifest` has the layout. A submission for several budgets has one such folder for each, named by the budget
(`0.15`), and a `decode` that runs theirs.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.sets.manifest import (
    MANIFEST,
    budget_name,
    read_file,
    read_manifest,
    told_file,
)

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

_BUDGET = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


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
    found = [name for name in names if _BUDGET.fullmatch(name) and budget_name(float(name)) == name]
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
