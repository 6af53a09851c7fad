"""Values that are built once, however many threads ask for them at the same time.

`functools.cache`, and `cached_property` from Python 3.12 on, build a value for each thread that asks before
the first has finished.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, overload

T = TypeVar("T")
P = ParamSpec("P")


class _Slot:
    """The value for some arguments, while it is built and after."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: list[Any] = []


class once(Generic[P, T]):
    """A function that is called once for the same arguments; an error is not kept.

    Args:
        build: takes arguments that can be keys.
        size: so many values are kept, those used last; all by default.
    """

    def __init__(self, build: Callable[P, T], size: int | None = None) -> None:
        self.build, self.size = build, size
        self.slots: OrderedDict[tuple[Any, ...], _Slot] = OrderedDict()
        self.lock = threading.Lock()
        functools.update_wrapper(self, build)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The value for these arguments; waits while another thread builds it."""
        key = (args, tuple(kwargs.items()))
        with self.lock:
            slot = self.slots.setdefault(key, _Slot())
            self.slots.move_to_end(key)
            while self.size is not None and len(self.slots) > self.size:
                self.slots.popitem(last=False)
        with slot.lock:
            if not slot.values:
                slot.values.append(self.build(*args, **kwargs))
            value: T = slot.values[0]
            return value

    def forget(self) -> None:
        """Build everything anew."""
        with self.lock:
            self.slots.clear()


class once_property(Generic[T]):
    """A property that is built when it is first asked for, and stays."""

    def __init__(self, build: Callable[[Any], T]) -> None:
        self.build = build
        self.__doc__ = build.__doc__
        self.lock = threading.RLock()  # one build may ask for the same of another object

    def __set_name__(self, owner: type, name: str) -> None:
        """The name under which the value is kept, where Python then finds it first."""
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> "once_property[T]": ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> T: ...
    def __get__(self, instance: object | None, owner: type | None = None) -> "T | once_property[T]":
        """The value of an object."""
        if instance is None:
            return self
        values = vars(instance)
        if self.name not in values:
            with self.lock:
                if self.name not in values:
                    values[self.name] = self.build(instance)
        value: T = values[self.name]
        return value
