"""Networks from the path of their class and its arguments, as a recipe or a model file names them.

CompressAI's form, which is all that is asked of a class:

    forward(x)              -> {"x_hat": N×3×H×W, "likelihoods": {"y": …, "z": …, …}}, x in [0, 1]
    compress(x)             -> {"strings": [[bytes of each image], …], "shape": …}
    decompress(strings, shape) -> {"x_hat": …}
    update()                tables of the entropy coder
    aux_loss()              where it has parameters named `quantiles`

A recipe may name any class that Python finds. A model file, which may come from anywhere, may only name
classes of the packages in `allowed_packages`: to import a module is to run it.
"""

import contextlib
import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tucodec.coding.container import QUALITY_STEPS, quality_step
from lightning_tucodec.errors import ConfigError, one_line
from lightning_tucodec.io.quiet import without_warnings

PACKAGES = ("compressai", "lightning_tucodec")
"""Packages whose classes a model file may always name."""

TRUST = "TUCODEC_TRUST"
"""Environment variable with the names of more packages, separated by commas; child processes inherit it."""

DEFAULT_STRIDE = 64
"""Of a network that has no `downsampling_factor`: that of all hyperprior networks in CompressAI."""

METHODS = ("forward", "compress", "decompress", "update")


def allowed_packages() -> set[str]:
    """Top-level packages that a model file may have imported."""
    return {*PACKAGES, *filter(None, os.environ.get(TRUST, "").split(","))}


@contextlib.contextmanager
def trusting(packages: Sequence[str]) -> Iterator[None]:
    """Inside, model files may name classes of these packages too."""
    before = os.environ.get(TRUST)
    os.environ[TRUST] = ",".join([*filter(None, [before]), *packages])
    try:
        yield
    finally:
        os.environ.pop(TRUST) if before is None else os.environ.update({TRUST: before})


def check_trusted(class_path: str) -> None:
    """Refuse a class of another package.

    Raises:
        ConfigError: says how to allow it.
    """
    package = class_path.partition(".")[0]
    if package not in allowed_packages():
        raise ConfigError(
            f"needs the class {class_path}, and only code of {', '.join(sorted(allowed_packages()))} is "
            f"imported for a model; if you trust {package}, add --trust {package}"
        )


def imported(module: str) -> ModuleType:
    """A module that is CompressAI's, or may import it: all that do so come here.

    CompressAI compiles a helper with `torch.jit.script`, of which PyTorch would warn on each start.
    """
    with without_warnings("`torch.jit.script` is deprecated", FutureWarning):
        return importlib.import_module(module)


def find_class(class_path: str) -> type[nn.Module]:
    """The class of a network.

    Raises:
        ConfigError: there is none, or it has not CompressAI's form.
    """
    where, _, name = class_path.rpartition(".")
    if not where or not all(part.isidentifier() for part in class_path.split(".")):
        raise ConfigError(f"{class_path!r} is not the path of a class, such as my_networks.Mine")
    try:
        found = getattr(imported(where), name)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"{class_path} cannot be imported ({reason})") from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"{class_path} is no network: it must be a class of torch.nn.Module")
    for method in METHODS:
        own = getattr(found, method, None)
        if not callable(own) or own is nn.Module.forward:
            raise ConfigError(
                f"{class_path} has no method {method}: a network needs CompressAI's {', '.join(METHODS)}"
            )
    return found


def build(description: Any, allowed: Callable[[str], None] = lambda class_path: None) -> nn.Module:
    """The network of a description.

    Args:
        description: `{"class_path": …, "init_args": {…}}`; arguments of this form are built first, and may
            be any module.
        allowed: called with the path of every class before it is imported; refuses by raising.

    Raises:
        ConfigError: the class is none of a network, or its arguments are wrong.
    """
    class_path, arguments = parts(description)
    allowed(class_path)
    kind = find_class(class_path)
    if kind.__module__.partition(".")[0] != class_path.partition(".")[0]:
        allowed(f"{kind.__module__}.{kind.__qualname__}")
    values = {key: _built(value, allowed) for key, value in arguments.items()}
    try:
        inspect.signature(kind).bind(**values)
        network = kind(**values)
    except (ConfigError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items()) or "none"
        raise ConfigError(
            f"{class_path} does not take these arguments ({given}): {one_line(error)}"
        ) from None
    if any(
        True for name, _ in network.named_parameters() if name.endswith("quantiles")
    ) and not hasattr(network, "aux_loss"):
        raise ConfigError(f"{class_path} has quantiles and no method aux_loss that trains them")
    return network


def parts(description: Any) -> tuple[str, dict[str, Any]]:
    """Class path and arguments of a description.

    Raises:
        ConfigError: it is none.
    """
    fits = isinstance(description, dict) and isinstance(description.get("class_path"), str)
    arguments = description.get("init_args") or {} if fits else None
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise ConfigError(
            f"a network is class_path and init_args, as in {{class_path: compressai.models.FactorizedPrior, "
            f"init_args: {{N: 128, M: 192}}}}, not {description!r:.80}"
        )
    if unknown := sorted(set(description) - {"class_path", "init_args"}):
        raise ConfigError(f"a network is class_path and init_args; what is {unknown[0]}?")
    return description["class_path"], arguments


def packages_of(description: Any) -> list[str]:
    """Top-level packages of all classes that a description names."""
    if isinstance(description, list):
        return [name for item in description for name in packages_of(item)]
    if not isinstance(description, dict):
        return []
    own = description.get("class_path")
    inner = [name for value in description.values() for name in packages_of(value)]
    return [own.partition(".")[0], *inner] if isinstance(own, str) else inner


def _built(value: Any, allowed: Callable[[str], None]) -> Any:
    """An argument, or the module that it describes."""
    if isinstance(value, list):
        return [_built(item, allowed) for item in value]
    if not (isinstance(value, dict) and "class_path" in value):
        return value
    class_path, arguments = parts(value)
    allowed(class_path)
    where, _, name = class_path.rpartition(".")
    try:
        kind = getattr(imported(where), name)
        assert issubclass(kind, nn.Module)
        allowed(kind.__module__)
        return kind(**{key: _built(inner, allowed) for key, inner in arguments.items()})
    except (ConfigError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{class_path} cannot be built: {one_line(error)}") from None


class Budget(TorchDispatchMode):
    """Inside, tensors of so many values together are made at most: a small file claims no large network.

    Args:
        values: the limit.

    Raises:
        ConfigError: more is asked for; before it is allocated.
    """

    def __init__(self, values: int) -> None:
        super().__init__()
        self.left = values

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count what a call makes."""
        size = args[0] if args else None
        if isinstance(size, int):
            size = [size, size]  # a square, or a range
        if isinstance(size, list | tuple) and all(isinstance(side, int) for side in size):
            self._take(math.prod(size))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._take(1 + (0 if isinstance(size, list | tuple) else result.numel()))
        return result

    def _take(self, values: int) -> None:
        self.left -= values
        if self.left < 0:
            raise ConfigError("its arguments ask for a network larger than its weights")


def failure(error: BaseException, network: nn.Module) -> str:
    """An error of a network's own code in one line, with the place in the file of its class."""
    frames = traceback.extract_tb(error.__traceback__)
    file = getattr(sys.modules.get(type(network).__module__), "__file__", None)
    own = [frame for frame in frames if frame.filename == file] or frames
    where = f" ({os.path.basename(own[-1].filename)}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {one_line(error)}{where}"


def stride_of(network: nn.Module) -> int:
    """The multiple of pixels that both sides of a network's input must have."""
    stride = getattr(network, "downsampling_factor", DEFAULT_STRIDE)
    return stride if isinstance(stride, int) and 1 <= stride <= 4096 else DEFAULT_STRIDE


class Rates:
    """The rates of a variable-rate network: levels 0, 1, …, and everything between two.

    Such a network has the form of CompressAI's `…Vbr` classes (Kamisli, Racapé and Choi, DCC 2024): a
    parameter `Gain` with an entry a level, and calls that take `s`, the number of a level, or `inputscale`, a
    gain of one's own.

    Attributes:
        levels: their number.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.levels = len(network.Gain)  # type: ignore[arg-type]

    @classmethod
    def of(cls, network: nn.Module) -> "Rates | None":
        """The rates of a network, if it has several."""
        gain = getattr(network, "Gain", None)
        if not isinstance(gain, Tensor) or gain.ndim != 1 or len(gain) < 2:
            return None
        methods = (network.forward, network.compress, network.decompress)
        taken = [set(inspect.signature(method).parameters) for method in methods]  # type: ignore[arg-type]
        return cls(network) if all({"s", "inputscale"} <= names for names in taken) else None

    @property
    def lmbdas(self) -> list[float]:
        """λ of each level, by the network's own list `lmbda`.

        Raises:
            ConfigError: it has none.
        """
        values = getattr(self.network, "lmbda", None)
        if not isinstance(values, list | tuple) or len(values) != self.levels:
            raise ConfigError(
                f"{type(self.network).__name__} has no list lmbda with one for each level"
            )
        return [float(value) for value in values]

    def rounded(self, quality: float) -> float:
        """The quality that a file can hold.

        Raises:
            ConfigError: out of range.
        """
        return quality_step(quality, self.levels) / QUALITY_STEPS

    def arguments(self, quality: float) -> dict[str, Any]:
        """The arguments of a call of the network at a quality."""
        gains = self.network.Gain.detach().abs()  # type: ignore[operator]
        below = min(int(quality), self.levels - 2)
        share = quality - below
        gain = (gains[below].log() * (1 - share) + gains[below + 1].log() * share).exp()
        if share in (0.0, 1.0):
            gain = gains[below + int(share)]
        return {"inputscale": gain}

    def set_tables(self, quality: float) -> None:
        """Make the tables of a network whose hyperlatent is quantised more coarsely at lower rates."""
        bottleneck = getattr(self.network, "entropy_bottleneck", None)
        if hasattr(bottleneck, "update_variable"):
            gain = self.arguments(quality)["inputscale"]
            self.network.update(force=True, scale=gain)  # type: ignore[operator]
