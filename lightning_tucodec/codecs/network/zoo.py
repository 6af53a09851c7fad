"""CompressAI's checkpoints and its zoo of pretrained networks as models.

Checkpoints are read without unpickling anything but tensors and plain values. The names of the zoo are those
of `compressai.zoo`; other networks are named by the path of their class.
"""

import inspect
import itertools
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tucodec.codecs.base import ZOO
from lightning_tucodec.codecs.cards import UNFIT
from lightning_tucodec.codecs.learned.model_file import ModelFile
from lightning_tucodec.codecs.network.build import Budget, build, find_class, imported
from lightning_tucodec.codecs.network.codec import NetworkModel, freeze_network
from lightning_tucodec.codecs.options import options_of, quality_of
from lightning_tucodec.errors import ConfigError, one_line
from lightning_tucodec.io.files import expanded
from lightning_tucodec.io.once import once

METRICS = ("mse", "ms-ssim")

_STATES = ("state_dict", "network", "model_state_dict")
"""Where a checkpoint holds the weights; else it is them itself."""


def from_specification(options: str) -> NetworkModel:
    """The codec of what follows `compressai:`.

    Raises:
        ConfigError: it does not parse, or there are no weights on this machine.
    """
    name, _, rest = options.partition(",")
    text = f"{ZOO}:{options}"
    values = options_of(text, rest)
    if unknown := sorted(set(values) - {"quality", "metric", "weights"}):
        raise ConfigError(
            f"{text}: {unknown[0]!r} is none of quality=N, metric=mse|ms-ssim, weights=FILE"
        )
    metric = values.get("metric", "mse")
    if metric not in METRICS:
        raise ConfigError(f"{text}: metric is {' or '.join(METRICS)}, not {metric}")
    if "quality" not in values:
        raise ConfigError(f"{text}: needs a quality, as in {ZOO}:{name},quality=3")
    quality = quality_of(text, values["quality"])
    several = _is_variable(name)
    if not several and quality != int(quality):
        raise ConfigError(f"{text}: quality is a whole number")
    weights = values.get("weights")
    if weights is None:
        path = _downloaded(name, None if several else int(quality), metric)
    else:
        path = Path(expanded(weights))
    shown = [name, *([] if several else [f"quality={int(quality)}"]), f"metric={metric}"]
    shown += [f"weights={weights}"] if weights else []
    try:
        modified = path.stat().st_mtime_ns
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    card = (("source", f"{name} of CompressAI's zoo, trained for {metric}"),)
    # Weights of one's own have sizes of their own.
    sizes = None if several or weights else int(quality)
    model = _imported(path, modified, name, sizes, ",".join(shown), card)
    try:
        return model.at(quality) if several else model
    except ConfigError as error:
        raise ConfigError(f"{text}: {error}") from None


@once
def _imported(
    path: Path, modified_ns: int, name: str, quality: int | None, shown: str, card: tuple[Any, ...]
) -> NetworkModel:
    return NetworkModel(import_checkpoint(path, name, quality, None, f"{ZOO}:{shown}", dict(card)))


def import_checkpoint(
    path: Path,
    network: str,
    quality: int | None,
    arguments: Mapping[str, Any] | None,
    name: str,
    card: dict[str, Any],
) -> ModelFile:
    """A model file of a checkpoint in one of CompressAI's forms, old ones included.

    Args:
        path: of a `.pth.tar`: weights, or a dictionary that holds them as `state_dict`.
        network: a name of the zoo, or the path of a class.
        quality: of the zoo; the checkpoint must have the sizes that the zoo's network has there.
        arguments: of the class; None: those that its `from_state_dict` finds.
        name: of the model.
        card: plain types.

    Raises:
        ConfigError: the file cannot be read, or is a checkpoint of another network.
    """
    if quality is not None and "." in network:
        raise ConfigError(
            f"--quality is for networks of the zoo; {network} is a class, with --args"
        )
    if quality is not None and _is_variable(network):
        raise ConfigError(
            f"--quality is chosen when {network} codes: one checkpoint holds all of them"
        )
    if arguments is not None and "." not in network:
        raise ConfigError(f"--args is for a class; {network} is of the zoo, with --quality")
    state = read_checkpoint(path)
    description: dict[str, Any]
    kind = find_class(network) if "." in network else type(of_zoo(network, quality))
    try:
        if quality is not None:
            made = of_zoo(network, quality)
            _load(made, state)
            description = _described(made)
        elif arguments is not None:
            description = {"class_path": network, "init_args": dict(arguments)}
            values = sum(value.numel() for value in state.values())
            try:
                with Budget(16 * values + (1 << 22)):
                    made = build(description)
            except ConfigError as error:
                raise ConfigError(f"--args: {error}") from None
            _load(made, state)
        else:
            made, description = _from_state(kind, state)
    except ConfigError:
        raise
    except UNFIT as error:
        at = f" at quality {quality}" if quality is not None else ""
        advice = "; --args gives the class's arguments" if "." in network and not arguments else ""
        raise ConfigError(
            f"{path}: not a checkpoint of {network}{at} ({_told(error)}){advice}"
        ) from None
    return freeze_network(made, description, name, card)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Weights by their names in today's CompressAI.

    Raises:
        ConfigError: it is missing, no checkpoint, or holds objects other than tensors and plain values.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # devices and pipes may have no end
            raise ConfigError(f"{path}: not a file")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or one_line(error)}") from None
    except Exception as error:  # zip, pickle, and what else a file can be
        reason = one_line(error).partition(". ")[0][:120]
        raise ConfigError(
            f"{path}: not a checkpoint of tensors and plain values ({reason})"
        ) from None
    for key in _STATES:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
        )
    ):
        raise ConfigError(f"{path}: holds no weights of a network")
    renamed: dict[str, Tensor] = dict(_zoo().load_state_dict(dict(content)))
    return renamed


def _load(network: nn.Module, state: dict[str, Tensor]) -> None:
    network.load_state_dict(dict(state))


def _from_state(
    kind: type[nn.Module], state: dict[str, Tensor]
) -> tuple[nn.Module, dict[str, Any]]:
    """A network by its class's `from_state_dict`, and the arguments that this found."""
    method = getattr(kind, "from_state_dict", None)
    if method is None:
        raise ConfigError(
            f"{kind.__qualname__} has no from_state_dict; give its arguments with --args, as in "
            "--args '{N: 128}'"
        )
    found: list[dict[str, Any]] = []

    class Noting(kind):  # type: ignore[valid-type,misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if not found:
                bound = inspect.signature(kind).bind(*args, **kwargs).arguments
                kwargs_given = bound.pop("kwargs", {})
                found.append({**bound, **kwargs_given})
            super().__init__(*args, **kwargs)

    parameters = inspect.signature(method).parameters.values()
    flags = [p.name for p in parameters if isinstance(p.default, bool)]
    error: Exception | None = None
    for values in itertools.product((False, True), repeat=len(flags)):
        found.clear()
        try:
            made = Noting.from_state_dict(dict(state), **dict(zip(flags, values, strict=True)))
        except UNFIT as failure:
            error = error or failure
            continue
        made.__class__ = kind
        path = f"{kind.__module__}.{kind.__qualname__}"
        return made, {"class_path": path, "init_args": found[0]}
    assert error is not None
    raise error


def _described(network: nn.Module) -> dict[str, Any]:
    """How a network of the zoo is built again."""
    return _from_state(type(network), network.state_dict())[1]


def _told(error: Exception) -> str:
    """The first difference in PyTorch's account of a state that does not fit."""
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[1] if len(lines) > 1 and lines[0].startswith("Error(s)") else " ".join(lines)
    return " ".join(text.split())[:160].rstrip(". ") or type(error).__name__


# --- The zoo -------------------------------------------------------------------------------------


def _zoo() -> Any:
    return imported("compressai.zoo")


def _is_variable(name: str) -> bool:
    """Whether one network of this name has all rates."""
    return _urls(name, "mse", str) is not None


def _zoo_function(name: str) -> Any:
    models = _zoo().image_models
    if name not in models:
        raise ConfigError(
            f"{name!r} is no network of CompressAI's zoo ({', '.join(models)}); others are named by the path "
            "of their class, such as compressai.models.Elic2022Official"
        )
    return models[name]


def of_zoo(name: str, quality: int | None) -> nn.Module:
    """A network of the zoo without its weights.

    Raises:
        ConfigError: the zoo has none of this name and quality.
    """
    function = _zoo_function(name)
    with torch.random.fork_rng(devices=[]):
        try:
            network: nn.Module = function(1 if quality is None else quality)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{name}, quality {quality}: {one_line(error)}") from None
    return network


def _urls(name: str, metric: str, kind: type) -> Any:
    """What the zoo says of a network's weights, if it is of this type: one URL, or one a quality."""
    urls = getattr(sys.modules[_zoo_function(name).__module__], "model_urls", {})
    found = urls.get(name, {}).get(metric)
    return found if isinstance(found, kind) else None


def _downloaded(name: str, quality: int | None, metric: str) -> Path:
    """Where PyTorch keeps pretrained weights that the user has downloaded.

    Raises:
        ConfigError: there are none.
    """
    url = (
        _urls(name, metric, str)
        if quality is None
        else (_urls(name, metric, dict) or {}).get(quality)
    )
    at = "" if quality is None else f", quality {quality}"
    if url is None:
        raise ConfigError(
            f"{name}{at}: CompressAI has no weights trained for {metric}; give weights=FILE"
        )
    path = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(url)
    if not path.is_file():
        raise ConfigError(
            f"{name}{at}: its weights are not on this machine; download {url} to {path.parent}, or give "
            "weights=FILE"
        )
    return path
