"""Model files as they describe themselves: where they lie, name, card and id. Needs no PyTorch."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lightning_tucodec.codecs.base import MODEL_SUFFIX
from lightning_tucodec.coding.container import MODEL_ID_BYTES
from lightning_tucodec.errors import ModelFileError, one_line
from lightning_tucodec.io.files import expanded, home
from lightning_tucodec.nn.recipes import recipe_name

FORMAT = 1
"""Version of the layout described above."""

SHIPPED = Path(__file__).parents[1] / "weights"
"""Models that come with the package."""

PREVIOUS = SHIPPED / "previous"
"""Their predecessors, by the same names: only for files that state their ids."""

_CARD: dict[str, tuple[Callable[[Any], bool], str]] = {
    "recipe": (lambda v: isinstance(v, str) and v.isprintable(), "a line of text"),
    "lmbda": (lambda v: type(v) in (int, float) and 0 < v < 1e300, "a number above 0"),
    "opt_step": (lambda v: type(v) is int and 0 <= v < 1 << 63, "a number of steps"),
}
"""What stands in a card and is reckoned with."""

UNFIT = (
    ArithmeticError, AttributeError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
"""What building a network from the values of a damaged or hostile file can raise."""


class Description(NamedTuple):
    """What a model file says of itself.

    Attributes:
        name: how commands call the model.
        config: of the network, as plain types.
        card: data and their terms, steps, λ and its convention, expected rate and distortion, ….
    """

    name: str
    config: dict[str, Any]
    card: dict[str, Any]


class Card(NamedTuple):
    """A model by its file alone.

    Attributes:
        name, config, card: see `Description`.
        id: see `identity`.
    """

    name: str
    config: dict[str, Any]
    card: dict[str, Any]
    id: bytes


def describe(path: Path, metadata: Mapping[str, str] | None) -> Description:
    """What the metadata of a safetensors file say, once they are sound.

    Raises:
        ModelFileError: none of a model, or another format.
        ValueError, LookupError, TypeError, …: see `UNFIT`; not the metadata of a model.
    """
    if "tucodec" not in (metadata := metadata or {}):
        raise ModelFileError(
            f"{path}: holds weights, but no model of this package; "
            "`tucodec export RUN -o MODEL.safetensors` writes one"
        )
    description = json.loads(metadata["tucodec"])
    if description["format"] != FORMAT:
        raise ModelFileError(
            f"{path}: model format {str(description['format'])[:20]!r} is unknown "
            f"(this program reads {FORMAT}): update lightning-tucodec"
        )
    name, config, card = (description[key] for key in ("name", "config", "card"))
    if not (isinstance(name, str) and name and name.isprintable()):
        raise ValueError("its name is not a line of text")
    if not all(isinstance(v, dict) for v in (config, card, card.get("kodak", {}))):
        raise ValueError("config, card and card.kodak must be mappings")
    for key, (fits, what) in _CARD.items():
        if card.get(key) is not None and not fits(card[key]):
            raise ValueError(f"card.{key} is not {what}")
    if "recipe" in card:
        card["recipe"] = recipe_name(card["recipe"])
    return Description(name, config, card)


def identity(config: Mapping[str, Any], tensors: Iterable[tuple[str, NDArray[Any]]]) -> bytes:
    """The first 8 bytes of the SHA-256 of a model's config and tensors, in order of name."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        # PyTorch's spelling, in which models had their ids first.
        digest.update(f"{name} torch.{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.digest()[:MODEL_ID_BYTES]


def read_card(path: Path) -> Card:
    """A model's own description and its id.

    Raises:
        ModelFileError: the file is missing, damaged, or of another kind or format.
    """
    try:
        with safe_open(path, framework="np") as content:
            description = describe(path, content.metadata())
            names = sorted(content.keys())
            pairs = ((name, content.get_tensor(name)) for name in names)
            return Card(*description, identity(description.config, pairs))
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such model file") from None
    except (OSError, SafetensorError, *UNFIT) as error:
        raise ModelFileError(f"{path}: not an exported model ({one_line(error)})") from None


def model_folder() -> Path | None:
    """The user's own models: $TUCODEC_MODELS, or `tucodec/models` below $XDG_DATA_HOME.

    None where neither is set and the user has no home folder.
    """
    if named := os.environ.get("TUCODEC_MODELS"):
        return Path(expanded(named))
    own = home()
    data = os.environ.get("XDG_DATA_HOME") or (own and own / ".local" / "share")
    return Path(data) / "tucodec" / "models" if data else None


def folder_problem() -> str | None:
    """What is wrong with the user's own folder of models; None where nothing is, or there is none."""
    folder = model_folder()
    if folder is None or folder.is_dir() or not folder.exists():
        return None
    return f"{folder}: not a folder, so no models are read from it (TUCODEC_MODELS names one)"


def model_files() -> list[Path]:
    """Files of all models known by name, the user's before the shipped ones."""
    return [
        path
        for folder in (model_folder(), SHIPPED)
        if folder is not None and folder.is_dir()
        for path in sorted(folder.glob(f"*{MODEL_SUFFIX}"))
        if path.is_file()
    ]


def coding_files() -> list[Path]:
    """Files of all models that a coded file may need: those known by name, then `PREVIOUS`."""
    return [*model_files(), *sorted(PREVIOUS.glob(f"*{MODEL_SUFFIX}"))]


def models() -> dict[str, dict[str, Any]]:
    """Model cards by name, of what is shipped and what lies in the model folder."""
    found = {}
    for path in model_files():
        with contextlib.suppress(ModelFileError):
            file = read_card(path)
            found[file.name] = {**file.card, "id": file.id.hex()}
    return found
