"""Compiled loops: `numba.njit` at their first call, cached on disk where there is a place for it."""

import functools
import threading
from collections.abc import Callable
from typing import Any

_pending: list[Callable[..., Any]] = []
_compiling = threading.Lock()


def compiled(function: Callable[..., Any]) -> Any:
    """`numba.njit` without the global lock, for a function of a module.

    Importing numba takes longer than the rest of this package. So what a module finds at first is a
    stand-in; the first call of any puts the compiled functions in the places of all.
    """
    _pending.append(function)

    @functools.wraps(function)
    def first_call(*arguments: Any) -> Any:
        _compile_all()
        return function.__globals__[function.__name__](*arguments)

    return first_call


def _compile_all() -> None:
    from numba import njit

    with _compiling:
        for function in _pending:
            try:
                kernel = njit(cache=True, nogil=True, error_model="numpy")(function)
            except RuntimeError:  # neither the package's folder nor the user's cache can be written
                kernel = njit(nogil=True, error_model="numpy")(function)
            function.__globals__[function.__name__] = kernel
        _pending.clear()
