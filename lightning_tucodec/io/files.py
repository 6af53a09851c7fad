"""Names that a user gives, files that are read whole, and targets that may be written."""

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from lightning_tucodec.errors import ConfigError, OutputError

_LONGEST_PATH = 4096
"""Bytes, Linux's limit."""


def expanded(location: str) -> str:
    """A path or URL of a user, with `~` and `$NAME` replaced as a shell would.

    Unknown names stay, and so do those in the name of a file that exists.

    Raises:
        ConfigError: no file can have that name, whatever the file system, or nobody knows the home folder.
    """
    if "\0" in location:
        raise ConfigError(f"{location}: a name of a file holds no null byte")
    if os.path.isfile(location):
        return os.path.expanduser(location)
    location = os.path.expanduser(os.path.expandvars(location))
    if location.partition("/")[0] == "~":  # else a folder of that name would be made
        raise ConfigError(f"{location}: this user has no home folder; set HOME")
    return location


def home() -> Path | None:
    """The user's home folder. Some users have none, as in a container that is run as any number."""
    folder = os.path.expanduser("~")
    return None if folder == "~" else Path(folder)


def cut_path(text: str, separator: str, suffix: str = "") -> tuple[str, str]:
    """The path that a text begins with, and the rest; paths may contain the separator.

    Args:
        text: a path, or a path, a separator and more.
        separator: regular expression.
        suffix: of the files that are meant.

    Returns:
        The longest beginning that is a file. Where none is, the shortest that ends in `suffix`, or else all
        before the first separator. The rest is what follows the separator there.
    """
    cuts = [(found.start(), found.end()) for found in re.finditer(separator, text)]
    cuts.append((len(text), len(text)))
    # Texts out of files of others may be long; a path is not.
    files = [c for c in cuts if c[0] < _LONGEST_PATH and os.path.isfile(expanded(text[: c[0]]))]
    named = (cut for cut in cuts if suffix and text.endswith(suffix, 0, cut[0]))
    end, start = files[-1] if files else next(named, cuts[0])
    return text[:end], text[start:]


def check_name(name: object, what: str) -> str:
    """A name of the user that becomes part of paths, of job names and of lists of them.

    Args:
        name: as it was given.
        what: entry that it stands in.

    Raises:
        ConfigError: it could leave its folder, or cut a path, a list or an option in two.
    """
    if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,99}", name):
        return name
    raise ConfigError(
        f"{what}: {name!r} is no name: at most 100 letters (A-Z, a-z), digits and . _ + = -, "
        "a letter or digit first"
    )


_MOST_BYTES = 1 << 32
"""Larger files are no codings, curves or configurations, and would not fit into many a memory."""


class TooLargeError(OSError):
    """A file that would be read whole is too large for that."""


def read_bytes(path: str | Path, head: bytes = b"") -> bytes:
    """The bytes of a file that is read whole.

    Args:
        path: the file.
        head: what it begins with; of another one, which may have no end, only so many bytes are read.

    Raises:
        TooLargeError: it has more than 4 GiB.
        OSError: it cannot be read.
    """
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > _MOST_BYTES:
            raise TooLargeError(errno.ENOMEM, f"{size} bytes are too many to be read", str(path))
        start = stream.read(len(head))
        return start + stream.read() if start == head else start


def read_text(path: str | Path) -> str:
    """A text file that a user wrote.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: line {line} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # a null byte in the name
        raise ConfigError(f"{path}: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-4` is a number, as it is for `tucodec fit`."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Content of a YAML text.

    Raises:
        ConfigError: it is none.
    """
    try:
        return yaml.load(text, _Loader)
    # ValueError: a date that no calendar has; TypeError: a list as a key.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{where}: not YAML ({' '.join(str(error).split())})") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file of entries.

    Raises:
        ConfigError: it cannot be read, is not UTF-8 or no such file.
    """
    content = parse_yaml(read_text(path), str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds no entries")
    return content


def target_check(
    inputs: Iterable[str | Path] = (),
    force: bool = False,
    own: Callable[[Path], bool] = lambda _: False,
) -> Callable[[str | Path], None]:
    """A function that refuses to write over an input, or over a file that is there already.

    Links are followed, so the same file under another name is found as well. Every command that
    writes asks it before it spends time.

    Args:
        inputs: files that the same call reads; they are never replaced.
        force: whether the user allowed existing files to be replaced.
        own: whether an existing file is by its content one that the command continues or rewrites.

    Returns:
        What takes a target and raises OutputError, which says which file it is and what to do.
    """
    sources = {key for path in inputs for key in _keys(path)}

    def check(target: str | Path) -> None:
        if not sources.isdisjoint(_keys(target)):
            raise OutputError(f"{target}: is an input of this call; write somewhere else")
        if not force and os.path.lexists(target) and not own(Path(target)):
            raise OutputError(f"{target}: exists; name another place, or replace it with --force")

    return check


def check_targets(
    targets: Iterable[str | Path],
    inputs: Iterable[str | Path] = (),
    force: bool = False,
    own: Callable[[Path], bool] = lambda _: False,
) -> None:
    """`target_check` of several targets.

    Raises:
        OutputError: which file, and what to do.
    """
    check = target_check(inputs, force, own)
    for target in targets:
        check(target)


def _keys(path: str | Path) -> Iterator[object]:
    """What tells a file from all others: where it lies, and its number (names may ignore case)."""
    yield os.path.realpath(path)
    with suppress(OSError):
        found = os.stat(path)
        yield found.st_dev, found.st_ino


def begins_with(path: Path, heads: Iterable[str]) -> bool:
    """Whether a file is empty or begins with one of some texts; one that is cut short counts as well."""
    try:
        with path.open("rb") as stream:
            start = stream.read(256)
    except OSError:
        return False
    return any(start.startswith(head.encode()[: len(start)]) for head in heads)


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """All objects of a file of JSON lines; none if it is missing.

    What a kill or a crash of the machine has left of a line, whatever its bytes, is left out.
    """
    rows = []
    path = Path(path)
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def launchers() -> Path:
    """The folder `slurm` of the repository.

    Raises:
        ConfigError: this package was installed without it, and TUCODEC_ROOT does not say where it is.
    """
    for root in (os.environ.get("TUCODEC_ROOT"), Path.cwd(), Path(__file__).parents[2]):
        if root and (Path(root) / "slurm" / "submit.sh").is_file():
            return Path(root) / "slurm"
    raise ConfigError("no slurm/submit.sh here: call from the repository, or set TUCODEC_ROOT")
