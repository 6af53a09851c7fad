"""A codec's setting as text: `NAME` or `NAME:KEY=VALUE[,KEY=VALUE…]`."""

import dataclasses
import math
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from lightning_tucodec.codecs.base import MODEL_SUFFIX
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.files import cut_path


@dataclass(frozen=True)
class Options:
    """Base of codecs whose setting is the fields of a frozen dataclass.

    The keys of a specification are the names of the fields; a field without default must be given.
    Subclasses check ranges in `__post_init__` through `check_range` and `check_choice`.
    """

    codec_name: ClassVar[str]

    @property
    def name(self) -> str:
        """The shortest specification of this setting, without what does not change the bytes."""
        given = [
            f"{field.name}={_text(value)}"
            for field in dataclasses.fields(self)
            if field.compare and (value := getattr(self, field.name)) != field.default
        ]
        return ":".join([self.codec_name, *filter(None, [",".join(given)])])

    @classmethod
    def parse(cls, options: dict[str, str]) -> Self:
        """Build the codec from texts.

        Raises:
            ConfigError: an unknown key, a missing one, or a value of the wrong kind or range.
        """
        types = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(options) - set(fields))
        if unknown:
            raise ConfigError(
                f"{cls.codec_name}: no option {unknown[0]}; there are {', '.join(sorted(fields))}"
            )
        for key, field in fields.items():
            if field.default is dataclasses.MISSING and key not in options:
                raise ConfigError(f"{cls.codec_name} needs {key}, as in {cls.codec_name}:{key}=…")
        values: dict[str, Any] = {}
        for key, text in options.items():
            kind = next(kind for kind in (int, float, str) if kind in _alternatives(types[key]))
            try:
                values[key] = kind(text)
                if kind is float and not math.isfinite(values[key]):
                    raise ValueError
            except ValueError:
                raise ConfigError(f"{cls.codec_name}: {key}={text} is not a number") from None
        return cls(**values)

    def check_range(self, key: str, low: float, high: float) -> None:
        """Raise `ConfigError` unless low ≤ the field ≤ high."""
        value = getattr(self, key)
        if not low <= value <= high:
            raise ConfigError(f"{self.codec_name}: {key}={value} is not within {low} … {high}")

    def check_process(self) -> None:
        """Raise `ConfigError` unless `threads` and `timeout`, if it is given, are possible."""
        self.check_range("threads", 0, 256)
        if getattr(self, "timeout", None) is not None:
            self.check_range("timeout", 0.001, 1_000_000)

    def check_choice(self, key: str, *choices: str) -> None:
        """Raise `ConfigError` unless the field is one of the choices."""
        value = getattr(self, key)
        if value not in choices:
            raise ConfigError(f"{self.codec_name}: {key}={value} is none of {', '.join(choices)}")


def _text(value: object) -> str:
    """A value, as short as tells it from all others."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def _alternatives(hint: object) -> tuple[object, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) or (hint,)


def pairs(options: str) -> Iterator[tuple[str, str]]:
    """Keys and values of a specification's options; an option without value has an empty one."""
    while options:
        key = re.match("[^,=]*", options)[0]  # type: ignore[index]
        sign, options = options[len(key) : len(key) + 1], options[len(key) + 1 :]
        value = ""
        if sign == "=":
            suffix = MODEL_SUFFIX if key == "filter" else ""
            value, options = cut_path(options, r",(?=\w+=|,|$)", suffix)
        if key or sign == "=":
            yield key, value


def options_of(specification: str, text: str) -> dict[str, str]:
    """The options that a specification gives, by key.

    Raises:
        ConfigError: one has no value, or is given twice.
    """
    options: dict[str, str] = {}
    for key, value in pairs(text):
        if not (key and value):
            raise ConfigError(f"{specification}: {key or f'={value}'} is not KEY=VALUE")
        if key in options:
            raise ConfigError(f"{specification}: {key} is given twice")
        options[key] = value
    return options


def quality_of(specification: str, text: str) -> float:
    """The value of `quality` in a specification.

    Raises:
        ConfigError: it is no finite number.
    """
    try:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError
    except ValueError:
        raise ConfigError(f"{specification}: quality={text} is not a number") from None
    return value
