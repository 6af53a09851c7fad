"""From the text of a specification to a codec.

    specification = name [":" key "=" value {"," key "=" value}]

Names are those of `CLASSES`, keys the fields of the class: `jpeg:q=30`, `hevc:qp=32,chroma=420`,
`vvc:qp=37,preset=slow,chroma_qp_offset=-6`. The shell's braces make a sweep of one:
`jpeg:q={10,30,50}`.
"""

from collections.abc import Callable

from lightning_tucodec.codecs.base import ImageCodec
from lightning_tucodec.codecs.classical import (
    Av1Aom,
    Av1Svt,
    Avif,
    Hevc,
    Jpeg,
    Jpeg2000,
    JpegXl,
    WebP,
)
from lightning_tucodec.codecs.options import Options
from lightning_tucodec.codecs.vvc import Vvc
from lightning_tucodec.errors import ConfigError

Resolver = Callable[[str, dict[str, str]], ImageCodec | None]

CLASSES: dict[str, type[Options]] = {
    codec.codec_name: codec
    for codec in (Jpeg, WebP, Avif, Jpeg2000, Hevc, Av1Aom, Av1Svt, JpegXl, Vvc)
}

RESOLVERS: list[Resolver] = []
"""Asked in turn for a name that is not in `CLASSES`, with name and options; None: not mine."""


def codec(specification: str) -> ImageCodec:
    """The codec that a specification describes.

    Raises:
        ConfigError: the text does not parse, or nobody knows the name or the options.
    """
    name, _, rest = specification.partition(":")
    options: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not (key and equals and value):
            raise ConfigError(f"{specification}: {item} is not KEY=VALUE")
        if key in options:
            raise ConfigError(f"{specification}: {key} is given twice")
        options[key] = value
    if name in CLASSES:
        built = CLASSES[name].parse(options)
        assert isinstance(built, ImageCodec)
        return built
    for resolver in RESOLVERS:
        found = resolver(name, options)
        if found is not None:
            return found
    raise ConfigError(f"no codec named {name}; there are {', '.join(sorted(CLASSES))}")
