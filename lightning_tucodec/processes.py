"""Worker threads and child processes, and how an interrupt ends all of them at once."""

import multiprocessing
import os
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from lightning_tucodec.files import remove_temporary_files

_PREFIX = "tucodec-worker"
_GRACE = 1.5
"""Seconds that threads have to end in after an interrupt, once their child processes are gone."""

_pools: "weakref.WeakSet[ThreadPoolExecutor]" = weakref.WeakSet()
_children: set[int] = set()


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def worker_threads(
    count: int, initializer: Callable[..., object] | None = None, initargs: tuple[Any, ...] = ()
) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads. An error waits for what is running; an interrupt does not."""
    pool = ThreadPoolExecutor(count, _PREFIX, initializer, initargs)
    _pools.add(pool)
    interrupted = False
    try:
        yield pool
    except (KeyboardInterrupt, GeneratorExit):
        interrupted = True
        raise
    finally:
        pool.shutdown(wait=not interrupted, cancel_futures=True)


@contextmanager
def child(command: list[str], **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """A process in a session of its own, which has ended when the block ends, come what may.

    The whole session is killed, so that nothing that a wrapper script has started lives on.
    """
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        _children.add(process.pid)
        try:
            yield process
        except BaseException:
            _kill(process.pid)
            raise
        finally:
            process.wait()
            _children.discard(process.pid)


def stop() -> None:
    """End child processes and workers; the process itself if a thread goes on regardless.

    A thread inside a long computation cannot be ended otherwise. Half-written files are removed.
    """
    for pool in list(_pools):
        pool.shutdown(wait=False, cancel_futures=True)
    until = time.monotonic() + _GRACE
    while multiprocessing.active_children() or any(
        thread.name.startswith(_PREFIX) for thread in threading.enumerate()
    ):
        if time.monotonic() > until:
            for worker in multiprocessing.active_children():
                worker.kill()
            end_now()
        for pid in list(_children):
            _kill(pid)
        time.sleep(0.02)


def when_parent_ends(parent: int, act: Callable[[], object]) -> None:
    """Do something, in a thread, soon after this process's parent is gone, or now if it is."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        act()

    threading.Thread(target=watch, daemon=True).start()


def end_on_interrupt() -> None:
    """Let an interrupt end this worker process at once; without a traceback, with its children."""
    signal.signal(signal.SIGINT, end_now)


def interrupt_children() -> None:
    """Interrupt the worker processes of this one: a signal may have been sent to this one alone."""
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGINT)


def end_now(*_: object) -> None:
    """End this process and its children without waiting for anything; a handler of signals."""
    for pid in list(_children):
        _kill(pid)
    remove_temporary_files()
    os._exit(130)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
