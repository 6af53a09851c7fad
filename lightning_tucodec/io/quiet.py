"""Warnings of libraries about what a user can do nothing about."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_FILTERS = threading.RLock()


@contextmanager
def without_warnings(message: str = "", category: type[Warning] = Warning) -> Iterator[None]:
    """In this block warnings of a category that begin with a message are not shown.

    Python's filters belong to the process: two threads that change them at once leave them changed.
    """
    with _FILTERS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, category)
        yield
