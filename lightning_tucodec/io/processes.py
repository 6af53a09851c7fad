"""Worker threads and child processes, and how an interrupt ends all of them at once.

One file because each half needs the other: a signal that is not heeded in time ends the children, and while a
child is being started a signal has to wait.
"""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from lightning_tucodec.io.temporary import forget_temporary, remove_temporary

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a command: Ctrl-C, `kill` or Slurm, and a terminal that is closed."""

_PREFIX = "tucodec-worker"
_GRACE = 1.5
"""Seconds after a signal in which threads may end; then the process does, whatever they compute."""

_GRACE_OF_COMMANDS = 2.2
"""The same for commands of ours that were started as processes: they have their own grace before it."""

_pools: "weakref.WeakSet[ThreadPoolExecutor]" = weakref.WeakSet()
_children: dict[int, bool] = {}
"""Sessions of our own by their process; whether it is a command of ours, which ends itself when told."""

_inherited_server: int | None = None
"""The process that workers are forked from, of a parent that this process is a fork of."""


class Interrupted(BaseException):
    """A signal has told this command to end. Not an error: nothing but `main` may catch it for good."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.status = 128 + number


INTERRUPTS = (KeyboardInterrupt, Interrupted)
"""How work is told to end at once: by Python, which a caller of the library is in, and by `interruptible`."""


class _Watch:
    """The signals of one command, from when they are taken until they are given back."""

    def __init__(self, taken: Sequence[int]) -> None:
        self.taken = taken
        self.owner = os.getpid()
        self.told = False
        self.number: int | None = None
        """What it was told to end by."""
        self.children: Any = None
        """The function that handled SIGCHLD then, if one did."""
        self.announced = False
        self.ended = threading.Event()
        self.held = False
        self.waiting: int | None = None
        self.again: threading.Timer | None = None
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)

    def handle(self, number: int, _: object) -> None:
        if self.told:  # a second one must not break off what the first has begun
            return
        if self.held:
            self.waiting = number
            return
        self.told = True
        self.number = number
        if self.children is None and callable(signal.getsignal(signal.SIGCHLD)):
            # PyTorch's would raise, wherever this thread is, as each of its workers ends. Its place takes a
            # function: a signal that is here already would make Python print that it is ignored.
            self.children = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        raise Interrupted(number)

    def lost(self, number: int) -> None:
        """The interrupt came where Python drops what is raised: tell it once more, a moment later.

        That is so in a destructor and in a function that C calls, as while numba loads compiled code.
        """
        self.told = False
        thread = threading.main_thread().ident
        assert thread is not None
        self.again = threading.Timer(0.01, signal.pthread_kill, (thread, number))
        self.again.daemon = True
        self.again.start()

    def wait(self) -> None:
        """In a thread: end the process when the main one does not within its time.

        It may be in compiled code that is not left before its end, or in a library that ate the exception.
        """
        while data := os.read(self.reader, 1):
            if data[0] in self.taken and signal.getsignal(data[0]) == self.handle:
                until = time.monotonic() + _GRACE
                if not self.ended.wait(_GRACE):
                    announce()
                    _end(128 + data[0], until)
        os.close(self.reader)


_watch: _Watch | None = None


@contextmanager
def interruptible() -> Iterator[None]:
    """In this block `SIGNALS` raise Interrupted in the main thread; soon after, the process ends anyway.

    Handlers of a caller and signals that are ignored, as under nohup, stay; so does everything in a thread.
    """
    global _watch
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    main = threading.current_thread() is threading.main_thread()
    taken = [n for n in SIGNALS if signal.getsignal(n) in defaults] if main and not _watch else []
    if not taken:
        yield
        return
    previous = {number: signal.getsignal(number) for number in taken}
    watch = _watch = _Watch(taken)
    threading.Thread(target=watch.wait, name="tucodec-interrupts", daemon=True).start()
    wakeup = signal.set_wakeup_fd(watch.writer, warn_on_full_buffer=False)
    hook = sys.unraisablehook

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        if isinstance(what.exc_value, Interrupted):
            watch.lost(what.exc_value.number)
        else:
            hook(what)

    sys.unraisablehook = dropped
    try:
        for number in taken:
            signal.signal(number, watch.handle)
        yield
    finally:
        watch.told = True  # from here on nothing is broken off any more
        if watch.again is not None:
            watch.again.cancel()
            watch.again.join()
        sys.unraisablehook = hook
        for number, handler in previous.items():
            signal.signal(number, handler)
        if watch.children is not None:
            signal.signal(signal.SIGCHLD, watch.children)
        signal.set_wakeup_fd(wakeup)
        watch.ended.set()
        os.close(watch.writer)
        _watch = None


@contextmanager
def unwrapped() -> Iterator[None]:
    """What is raised in this block after a signal is the interrupt, whatever a library has made of it.

    Python 3.11 itself makes a RuntimeError of one that comes while it builds a class.
    """
    try:
        yield
    except Exception as error:
        if _watch is not None and _watch.number is not None:
            raise Interrupted(_watch.number) from error
        raise


@contextmanager
def _held() -> Iterator[None]:
    """What must not be broken off: signals are heeded when the block ends."""
    watch = _watch if threading.current_thread() is threading.main_thread() else None
    if watch is None:
        yield
        return
    watch.held = True
    try:
        yield
    finally:
        watch.held = False
    if watch.waiting is not None:
        watch.handle(watch.waiting, None)


def announced() -> None:
    """Take note that somebody has said that this command was interrupted."""
    if _watch is not None:
        _watch.announced = True


def announce() -> None:
    """Say that this command was interrupted, unless somebody has."""
    if _watch is not None and _watch.announced:
        return
    announced()
    with suppress(OSError, ValueError):
        print("tucodec: interrupted", file=sys.stderr, flush=True)


def _in_child() -> None:
    """A fork has nothing of its parent's to end, and signals that it was not asked about."""
    global _inherited_server, _watch
    # Forks by `multiprocessing` get the folder with their process object; they are not told to remove it.
    multiprocessing.current_process()._config.pop("tempdir", None)  # type: ignore[attr-defined]
    _inherited_server = _server()
    _children.clear()
    _pools.clear()
    forget_temporary()
    if _watch is not None:
        signal.set_wakeup_fd(-1)
        for number in _watch.taken:
            signal.signal(number, signal.SIG_DFL)
        os.close(_watch.writer)
        _watch = None


os.register_at_fork(after_in_child=_in_child)


def cores() -> int:
    """Number of processors that this process may use."""
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
    except (*INTERRUPTS, GeneratorExit):
        interrupted = True
        raise
    finally:
        pool.shutdown(wait=not interrupted, cancel_futures=True)


@contextmanager
def child(
    command: Sequence[str], ours: bool = False, **options: Any
) -> Iterator["subprocess.Popen[Any]"]:
    """A process in a session of its own, which has ended when the block ends, come what may.

    The whole session is killed, so that nothing that a wrapper script has started lives on.

    Args:
        command: its words.
        ours: a command of this package: it has children in sessions of their own and files half written, so
            it is told to end, and killed only if it does not.
        options: of Popen.
    """
    process: subprocess.Popen[Any] | None = None
    try:
        with _held():
            process = subprocess.Popen(command, start_new_session=True, **options)
            _children[process.pid] = ours
        yield process
    except BaseException:
        if process is not None:
            if ours:
                _signal(process.pid, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_OF_COMMANDS)
            _signal(process.pid, signal.SIGKILL)
        raise
    finally:
        if process is not None:
            with process:  # waits for its end and closes the pipes
                pass
            del _children[process.pid]


def run(
    command: Sequence[str], check: bool = False, **options: Any
) -> "subprocess.CompletedProcess[Any]":
    """`subprocess.run` of a command of ours, as a `child`.

    Raises:
        CalledProcessError: with `check`, it failed.
    """
    with child(command, ours=True, **options) as process:
        out, errors = process.communicate()
    done = subprocess.CompletedProcess(command, process.returncode, out, errors)
    if check:
        done.check_returncode()
    return done


def stop(status: int) -> None:
    """End child processes and workers; the process itself if a thread goes on regardless.

    A thread inside a long computation cannot be ended otherwise. Half-written files are removed.
    """
    for pool in list(_pools):
        pool.shutdown(wait=False, cancel_futures=True)
    until = time.monotonic() + _GRACE
    told: set[int] = set()
    while (
        _children
        or multiprocessing.active_children()
        or any(thread.name.startswith(_PREFIX) for thread in threading.enumerate())
    ):
        if time.monotonic() > until:
            _end(status, until)
        for pid, ours in list(_children.items()):
            if not ours:
                _signal(pid, signal.SIGKILL)
            elif pid not in told:
                told.add(pid)
                _signal(pid, signal.SIGTERM)
        time.sleep(0.02)
    remove_temporary()  # multiprocessing's folder stays: a caller of `main` may start more workers


def when_parent_ends(parent: int, act: Callable[[], object]) -> None:
    """Do something, in a thread, soon after this process's parent is gone, or now if it is."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        act()

    threading.Thread(target=watch, daemon=True).start()


def end_on_interrupt() -> None:
    """Let a signal end this worker process at once; without a traceback, with its children."""
    for number in SIGNALS:
        signal.signal(number, end_now)


def interrupt_children() -> None:
    """Interrupt the worker processes of this one: a signal may have been sent to this one alone."""
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGINT)


def end_now(number: int, _: object = None) -> None:
    """End this process and its children without waiting for threads; a handler of signals."""
    end(128 + number)


def end(status: int) -> None:
    """End this process and its children at once, without what the interpreter does at its end."""
    _end(status, time.monotonic())


def _end(status: int, until: float) -> None:
    """End the process; children that are commands of ours have a little longer than `until`."""
    for pid, ours in list(_children.items()):
        _signal(pid, signal.SIGTERM if ours else signal.SIGKILL)
    for worker in multiprocessing.active_children():
        worker.kill()
    if multiprocessing.parent_process() is None:
        _end_server()
        if util := sys.modules.get("multiprocessing.util"):
            util._run_finalizers(0)  # else its tracker names semaphores left
    _tidy()
    until += _GRACE_OF_COMMANDS - _GRACE
    while any(map(_lives, list(_children))) and time.monotonic() < until:
        time.sleep(0.02)
    for pid in list(_children):
        _signal(pid, signal.SIGKILL)
    _tidy()  # a thread that was starting workers may have made a folder meanwhile
    os._exit(status)


def _end_server() -> None:
    """Kill the process that workers are forked from.

    By itself it would first import all that it was told to, which takes seconds, and then close its
    interpreter.
    """
    pid = _server()
    if pid is not None and pid != _inherited_server:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _server() -> int | None:
    """The process that workers are forked from, if there is one."""
    server = getattr(sys.modules.get("multiprocessing.forkserver"), "_forkserver", None)
    return getattr(server, "_forkserver_pid", None)


def _tidy() -> None:
    """Remove temporary files; also multiprocessing's folder, which it removes when the interpreter ends."""
    remove_temporary()
    if multiprocessing.parent_process() is None:
        folder = getattr(multiprocessing.current_process(), "_config", {}).get("tempdir")
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _lives(pid: int) -> bool:
    """Whether a child has not ended."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
