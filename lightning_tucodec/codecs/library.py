"""Models by name, path or id, ready to code."""

import contextlib
import os
import re
from pathlib import Path

from lightning_tucodec.codecs.base import MODEL_SUFFIX
from lightning_tucodec.codecs.cards import (
    Card,
    coding_files,
    model_files,
    model_folder,
    read_card,
)
from lightning_tucodec.codecs.h266.postfilter import FilterModel
from lightning_tucodec.codecs.learned.codec import TucModel
from lightning_tucodec.codecs.learned.model_file import ModelFile, freeze
from lightning_tucodec.codecs.network.codec import NetworkModel
from lightning_tucodec.errors import ModelFileError, UnknownModelError
from lightning_tucodec.io.files import expanded
from lightning_tucodec.io.once import once

Model = TucModel | FilterModel | NetworkModel
"""A model of any kind."""


@once
def _load(path: Path, modified_ns: int, device: str) -> Model:
    file = ModelFile.load(path)
    kind = file.config.get("kind")
    model: Model
    if kind == FilterModel.KIND:
        model = FilterModel(file)
    else:
        model = NetworkModel(file, device) if kind == NetworkModel.KIND else TucModel(file, device)
    try:
        _ = file.checked if isinstance(model, TucModel) else model.checked
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None
    return model


@once
def _card(path: Path, modified_ns: int) -> Card:
    """Of the file alone: to build a model takes ten times as long."""
    return read_card(path)


def _version(path: Path) -> tuple[Path, int]:
    """What tells a file and its content apart from others."""
    try:
        return path.resolve(), path.stat().st_mtime_ns
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror}") from None


def load(name: str | Path, device: str = "cpu") -> TucModel:
    """A model of this package's own networks, by name, or from a path to an exported file.

    Args:
        name: of the model, or its path.
        device: where its networks run.

    Raises:
        UnknownModelError: no such model has this name.
        ModelFileError: the file is missing or damaged.
    """
    model = load_coder(name, device)
    if isinstance(model, NetworkModel):
        raise UnknownModelError(f"{name} is a network of another form than this package's own")
    return model


def load_coder(name: str | Path, device: str = "cpu") -> TucModel | NetworkModel:
    """A model that codes images, otherwise as `load`."""
    model = load_any(name, device)
    if isinstance(model, FilterModel):
        raise UnknownModelError(f"{name} is a post-filter; it works through vvc+postfilter")
    return model


def load_any(name: str | Path, device: str = "cpu") -> Model:
    """A model of any kind, otherwise as `load`."""
    return _load(*_version(find(name)), device)


def load_filter(name: str | Path) -> FilterModel:
    """A post-filter by name, or from a path to an exported file.

    Raises:
        UnknownModelError: no post-filter has this name.
        ModelFileError: the file is missing or damaged.
    """
    model = load_any(name)
    if not isinstance(model, FilterModel):
        raise UnknownModelError(f"{name} is not a post-filter")
    return model


def find(name: str | Path) -> Path:
    """The file of a model, by its name or path.

    Raises:
        UnknownModelError: no model has this name.
        ModelFileError: it is a folder, such as a run's.
    """
    text = str(name)
    if text.endswith(MODEL_SUFFIX) or os.sep in text:
        path = Path(expanded(text))
        if path.is_dir():
            raise ModelFileError(f"{path}: a folder; `tucodec export` makes a model file of a run")
        return path
    for path in model_files():
        if path.name == text + MODEL_SUFFIX:
            return path
    if members := family(text):
        raise UnknownModelError(f"{text} stands for several models; name one: {', '.join(members)}")
    if ":" in text:
        raise UnknownModelError(
            f"no model is called {text!r}: name it alone, without what follows the colon; "
            "quality and effort are given apart from the name here"
        )
    raise UnknownModelError(f"no model is called {text!r} (known: {known()}; or give a path)")


def known() -> str:
    """Names of all models, for messages."""
    return ", ".join(sorted({path.stem for path in model_files()})) or "none"


def family(name: str) -> list[str]:
    """Names of the models NAME-1, NAME-2, …, in this order; empty if a model itself has this name."""
    names = {path.stem for path in model_files()}
    ending = re.compile(re.escape(name) + r"-(\d+)")
    found = {int(match[1]): other for other in names if (match := ending.fullmatch(other))}
    return [] if name in names else [found[number] for number in sorted(found)]


def load_by_id(identity: bytes, device: str = "cpu") -> TucModel | NetworkModel:
    """The model that wrote a stream.

    Raises:
        UnknownModelError: no known model has this id.
        ModelFileError: it needs a class that is not allowed here.
    """
    model = _load_by_id(identity, device)
    if isinstance(model, FilterModel):
        raise _unknown(identity)
    return model


def load_filter_by_id(identity: bytes) -> FilterModel:
    """The post-filter whose id is in a stream.

    Raises:
        UnknownModelError: no known post-filter has this id.
    """
    model = _load_by_id(identity, "cpu")
    if not isinstance(model, FilterModel):
        raise _unknown(identity)
    return model


def _load_by_id(identity: bytes, device: str) -> Model:
    for path in coding_files():
        # `tucodec models` names a damaged file; here a damaged neighbour must not stop a decode.
        with contextlib.suppress(ModelFileError):
            version = _version(path)
            card = _card(*version)
            if card.id != identity:
                continue
            if card.config.get("kind") == NetworkModel.KIND:
                break
            return _load(*version, device)
    else:
        raise _unknown(identity)
    return _load(*version, device)  # which says it where its class is not allowed here


def _unknown(identity: bytes) -> UnknownModelError:
    folder = model_folder() or "a folder named by TUCODEC_MODELS"
    return UnknownModelError(
        f"the file needs model {identity.hex()}, which is neither shipped nor in {folder}; "
        "name its file with --model, or copy it there"
    )


def untrained(preset: str, seed: int = 0) -> TucModel:
    """A model of a preset's size with random weights, for timing and tests."""
    import torch

    from lightning_tucodec.nn.codec import PRESETS, TucodecVAE

    if preset not in PRESETS:
        raise UnknownModelError(f"no preset is called {preset!r} (known: {', '.join(PRESETS)})")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TucodecVAE(PRESETS[preset])
    return TucModel(freeze(network, f"untrained-{preset}", {"note": "random weights"}))
