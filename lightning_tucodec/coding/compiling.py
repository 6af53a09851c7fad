"""Compiled loops: `numba.njit` at their first call, cached on disk where a folder is writable.

The first use on a machine compiles for about half a minute. It is announced by one line of this
module's logger, and `clock` leaves it out.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

_pending: list[Callable[..., Any]] = []
_emitters: list[Callable[..., Any]] = []
_compiling = threading.Lock()
_spent = 0.0  # seconds

_log = logging.getLogger(__name__)


def compiled(function: Callable[..., Any]) -> Any:
    """`numba.njit` without the global lock, for a function of a module.

    Importing numba takes longer than the rest of this package. So a module gets a stand-in first; the
    first call of any stand-in replaces all of them by the compiled functions.
    """
    _pending.append(function)

    @functools.wraps(function)
    def first_call(*arguments: Any) -> Any:
        _compile_all()
        return function.__globals__[function.__name__](*arguments)

    return first_call


def clock() -> float:
    """`time.perf_counter`, in seconds, as if compiling took no time.

    Only one thread compiles at a time, and the others wait for it.
    """
    return time.perf_counter() - _spent


def seconds_spent() -> float:
    """Seconds that this process has compiled so far."""
    return _spent


def emitted(function: Callable[..., Any]) -> Any:
    """`numba.extending.intrinsic` for a function of a module, which compiled functions call."""
    _emitters.append(function)
    return function


def cache_of(module: ModuleType) -> tuple[Path | None, bool]:
    """The folder for a module's compiled functions, None where none can be written; whether it has any."""
    _compile_all()
    folders = [value.stats.cache_path for value in vars(module).values() if hasattr(value, "stats")]
    if not any(folders):
        return None, False
    folder = Path(next(filter(None, folders)))
    return folder, any(folder.glob(f"{module.__name__.rpartition('.')[2]}.*.nbi"))


def _compile_all() -> None:
    from numba import njit
    from numba.extending import intrinsic

    with _compiling:
        _watch_compiler()
        for function in _emitters:
            function.__globals__[function.__name__] = intrinsic(function)
        _emitters.clear()
        for function in _pending:
            try:
                kernel = njit(cache=True, nogil=True, error_model="numpy")(function)
            except RuntimeError:  # neither the package's folder nor the user's cache can be written
                kernel = njit(nogil=True, error_model="numpy")(function)
            function.__globals__[function.__name__] = kernel
        _pending.clear()


@functools.cache
def _watch_compiler() -> None:
    """Announce compiling and count its seconds; what the cache on disk has is not compiled."""
    from numba.core import event

    class Watch(event.Listener):
        def __init__(self) -> None:
            self.depth = 0  # a function compiles those that it calls
            self.started = 0.0

        def on_start(self, event: Any) -> None:
            self.depth += 1
            if self.depth == 1:
                self.started = time.perf_counter()
                if not _spent:
                    _log.warning(
                        "tucodec: compiling for this machine, once, about half a minute"
                        " (`tucodec warmup` does it ahead of time)"
                    )

        def on_end(self, event: Any) -> None:
            global _spent
            self.depth -= 1
            if not self.depth:
                _spent += time.perf_counter() - self.started

    event.register("numba:compile", Watch())
