"""From the text of a specification to a codec.

    specification = name [":" key "=" value {"," key "=" value}]

Names are those of `CLASSES`, keys the fields of the class: `jpeg:q=30`, `hevc:qp=32,chroma=420`,
`vvc:qp=37,preset=slow,chroma_qp_offset=-6`, and `vvc+postfilter:qp=42` for H.266 with a learned
filter. Any other name, or a path to a `.safetensors` file, is a learned model's, with the options of
`codecs.learned.refine`: `tiny-mse-2:effort=5`. A name without its number, `tiny-mse:effort=5`, means all
models of the family (`expand`). The shell's braces give several settings: `jpeg:q={10,30,50}`. A model of a
variable-rate network takes `quality`. `compressai:NAME,quality=N,metric=mse|ms-ssim[,weights=FILE]` is a
network of CompressAI's zoo (`codecs.network.zoo`).

A path, as name or value, may contain `:`, `,` and `=`: the longest existing one counts (`io.files.cut_path`).
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from lightning_tucodec.codecs.base import MODEL_SUFFIX, ZOO, ImageCodec
from lightning_tucodec.codecs.classical.codecs import (
    Av1Aom,
    Av1Svt,
    Avif,
    Hevc,
    Jpeg,
    Jpeg2000,
    JpegXl,
    WebP,
)
from lightning_tucodec.codecs.h266.vvc import Vvc
from lightning_tucodec.codecs.options import Options, options_of, pairs, quality_of
from lightning_tucodec.errors import ConfigError, UnknownModelError
from lightning_tucodec.io.files import cut_path, expanded

if TYPE_CHECKING:
    from lightning_tucodec.codecs.learned.codec import TucModel
    from lightning_tucodec.codecs.learned.model_file import ModelFile
    from lightning_tucodec.codecs.network.codec import NetworkModel

Variable = TypeVar("Variable", "TucModel", "NetworkModel")

CLASSES: dict[str, type[Options]] = {
    codec.codec_name: codec
    for codec in (Jpeg, WebP, Avif, Jpeg2000, Hevc, Av1Aom, Av1Svt, JpegXl, Vvc)
}
"""Codecs that are not learned; any other name is a learned model's."""


def split(specification: str) -> tuple[str, str]:
    """Name and options as text, without loading anything."""
    path, options = cut_path(specification, ":", MODEL_SUFFIX)
    if path.endswith(MODEL_SUFFIX) or os.sep in path:
        return path, options
    name, _, options = specification.partition(":")  # no file of that name is meant
    return name, options


def files(specification: str) -> list[str]:
    """Paths of the model files and checkpoints that a specification names."""
    name, options = split(specification)
    given = [("", name), *pairs(options)]
    return [expanded(v) for key, v in given if v.endswith(MODEL_SUFFIX) or key == "weights"]


def expand(specifications: Iterable[str]) -> list[str]:
    """Specifications with names of families replaced by their models, without repeats."""
    expanded = []
    for specification in specifications:
        name = split(specification)[0]
        rest = specification[len(name) :]
        members: list[str] = []
        if name not in CLASSES:
            from lightning_tucodec.codecs.library import family

            members = family(name)
        expanded += [f"{member}{rest}" for member in members] or [specification]
    return list(dict.fromkeys(expanded))


def codec(specification: str) -> ImageCodec:
    """The codec that a specification describes.

    Raises:
        ConfigError: the text does not parse, or the name or an option is unknown.
        ModelFileError: the file of a learned model is missing or damaged.
    """
    name, rest = split(specification)
    if name == ZOO:
        from lightning_tucodec.codecs.network.zoo import from_specification

        return from_specification(rest)
    options = options_of(specification, rest)
    if name in CLASSES:
        built = CLASSES[name].parse(options)
        assert isinstance(built, ImageCodec)
        return built
    # Only now: a codec that is not learned must not wait for torch.
    from lightning_tucodec.codecs import library
    from lightning_tucodec.codecs.h266.codec import H266

    if name == H266.codec_name:
        return H266.parse(options)
    try:
        model = library.load_coder(name)
    except UnknownModelError as error:
        if library.family(name):
            raise ConfigError(str(error)) from None
        known = ", ".join(sorted([*CLASSES, H266.codec_name, ZOO]))
        raise ConfigError(
            f"no codec or model is named {name}; codecs: {known}; models: {library.known()}"
        ) from None
    if not options:
        return model
    if isinstance(model, library.NetworkModel):
        return _at_quality(specification, model, options)
    from lightning_tucodec.codecs.learned.codec import RefinedModel
    from lightning_tucodec.codecs.learned.refine import Refinement

    if other := sorted(set(options) - {"quality", "effort", "lmbda", "seconds"}):
        raise ConfigError(
            f"{specification}: no option {other[0]}; there are quality, of a model of several rates, "
            "effort, lmbda and seconds"
        )
    if "quality" in options:
        model = _at(specification, model, options.pop("quality"))
    if options and "effort" not in options:
        raise ConfigError(f"{specification}: {min(options)} needs effort, as in {name}:effort=…")
    return RefinedModel(model, Refinement.parse(options)) if options else model


def own_model(specification: str, device: str = "cpu") -> "TucModel":
    """One of this package's own models, at the `quality` of its specification where it has several rates.

    Raises:
        ConfigError: another option, or no such quality.
        UnknownModelError, ModelFileError: see `library.load`.
    """
    from lightning_tucodec.codecs import library

    name, rest = split(specification)
    options = options_of(specification, rest)
    model = library.load(name, device)
    return _at_quality(specification, model, options) if options else model


def _at_quality(specification: str, model: Variable, options: dict[str, str]) -> Variable:
    """The model at `quality`, the only option that it takes.

    Raises:
        ConfigError: another option, or no such quality.
    """
    if other := sorted(set(options) - {"quality"}):
        raise ConfigError(f"{specification}: {model.name} takes quality=… here, and no {other[0]}")
    return _at(specification, model, options["quality"])


def _at(specification: str, model: Variable, quality: str) -> Variable:
    """A model at the quality that a specification gives.

    Raises:
        ConfigError: no number, or no such quality.
    """
    try:
        return model.at(quality_of(specification, quality))
    except ConfigError as error:
        raise ConfigError(f"{specification}: {error}") from None


def codecs(specifications: Iterable[str]) -> list[ImageCodec]:
    """The codecs of several specifications, none of which names a family.

    Different models with the same name, such as `a/model.safetensors` and `b/model.safetensors`, get `@` and
    the beginning of their ids as a suffix.

    Raises:
        ConfigError: two are the same codec, or see `codec`.
    """
    built = [codec(text) for text in specifications]
    count = Counter(coder.name for coder in built)
    told_apart = [_with_id(coder) if count[coder.name] > 1 else coder for coder in built]
    for name, times in Counter(coder.name for coder in told_apart).items():
        if times > 1:
            raise ConfigError(f"the codec {name} is given twice")
    return told_apart


def _with_id(coder: ImageCodec) -> ImageCodec:
    """The same codec, called by its model's name and id; one without a model of its own as it is."""
    if type(coder) in CLASSES.values():
        return coder
    from lightning_tucodec.codecs.learned.codec import RefinedModel, TucModel
    from lightning_tucodec.codecs.network.codec import NetworkModel

    if isinstance(coder, NetworkModel):
        return coder.renamed(f"{coder.file.name}@{coder.id.hex()[:8]}")
    if not isinstance(coder, TucModel | RefinedModel):
        return coder
    model = coder.model if isinstance(coder, RefinedModel) else coder
    name = f"{model.file.name}@{model.id.hex()[:8]}"
    renamed = TucModel(dataclasses.replace(model.file, name=name), str(model.device), model.level)
    return RefinedModel(renamed, coder.options) if isinstance(coder, RefinedModel) else renamed


def needs_model(specification: str) -> bool:
    """Whether the codec's decoder has a learned part, from the text alone, without loading anything."""
    name, options = split(specification)
    # vvc+postfilter:…,filter=none is H.266 alone.
    return name not in CLASSES and ("filter", "none") not in pairs(options)


def model_of(coder: ImageCodec) -> "ModelFile | None":
    """The model file that a codec's decoder needs, if it is a learned one."""
    if type(coder) in CLASSES.values():
        return None
    from lightning_tucodec.codecs.h266.codec import H266
    from lightning_tucodec.codecs.learned.codec import RefinedModel, TucModel
    from lightning_tucodec.codecs.network.codec import NetworkModel

    if isinstance(coder, H266):
        model = coder.model()
        return None if model is None else model.file
    return coder.file if isinstance(coder, TucModel | RefinedModel | NetworkModel) else None
