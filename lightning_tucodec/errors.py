"""Errors that a user can cause. Each message is one line: which file, what is wrong, what to do.

`tucodec` prints such an error without a traceback and exits with status 1.
"""

import os
import re
import unicodedata

_SECRET = re.compile(
    r"(?<=://)[^/\s'\"]+(?=@)"  # user and password of a URL
    r"|(?<=[a-z]:/)[^/\s'\"]+:[^/\s'\"]+(?=@)"  # the same of one that was taken for a path
    r"|(?<=['\"])[^/\s'\":@]+:[^/\s'\"@]+(?=@)"  # and of one whose beginning a library has cut off
    r"|(?<=[?&;])([\w-]*(?:sig|signature|token|key|secret|password|credential)=)[^&\s'\"]+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """A text in which `***` stands for the credentials of every URL: user, password, signed parameters."""
    return _SECRET.sub(lambda found: f"{found[1] or ''}***", text)


def first_sentence(error: Exception) -> str:
    """Of an error whose text goes on for lines, as that of a GPU without memory does."""
    return redacted(str(error).strip().partition(". ")[0].partition("\n")[0])


def reason(error: Exception) -> str:
    """An error on one line; that of a file as its name and what is wrong with it."""
    if isinstance(error, OSError) and error.strerror:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        if isinstance(error, NotADirectoryError | FileExistsError):
            place = name
            while place.strip("/") and not os.path.lexists(place):
                place = os.path.dirname(place.rstrip("/"))
            if os.path.lexists(place) and not os.path.isdir(place):
                return redacted(f"{place}: is no folder; a folder is needed here")
        return redacted(f"{name}: {error.strerror}" if name else error.strerror)
    return redacted(str(error) or type(error).__name__)


def printable(text: str) -> str:
    """A text on one line: what a terminal would not print, as in a file's name, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_one_line(text: str) -> bool:
    """Whether a text, such as a file's name, has no control characters and no ends of lines."""
    return not any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in text)


class TucodecError(Exception):
    """Base of every error caused by the input, the command or the environment."""

    def __str__(self) -> str:
        """One line without credentials; what a terminal would not print, as in a file's name, is escaped."""
        return printable(redacted(super().__str__()))


class ImageInputError(TucodecError):
    """A file is not an image that can be read, or its size is outside what is supported."""


class CorruptStreamError(TucodecError):
    """A `.tuc` stream is truncated, altered or claims something impossible."""


class UnsupportedVersionError(CorruptStreamError):
    """A `.tuc` stream was written by a format version that this program does not know."""


class UnknownModelError(TucodecError):
    """A stream or a command names a model that is neither shipped nor in the model folder."""


class ModelFileError(TucodecError):
    """An exported model file is damaged or does not describe a model of this package."""


class ConfigError(TucodecError):
    """A configuration cannot work; raised before any work starts."""


class ExternalToolError(TucodecError):
    """A program that this package calls is missing, failed or did not end in time."""


class DatasetError(TucodecError):
    """Shards, an index or an image folder cannot be used as they are."""


class OutputError(TucodecError):
    """A result cannot be written where the user wants it, or would replace an existing file."""


def one_line(error: BaseException) -> str:
    """What went wrong in words, for a message of one line."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, KeyError):
        return f"no entry {text}"
    return text or type(error).__name__
