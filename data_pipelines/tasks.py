"""Many independent tasks on a few processes, with progress on stderr."""

import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from tqdm import tqdm

from lightning_tucodec.errors import DatasetError
from lightning_tucodec.io.processes import INTERRUPTS, end_on_interrupt, interrupt_children

_TMPDIR_MAX = 70


def run_tasks(
    function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], total: int, workers: int,
    title: str,
) -> None:  # fmt: skip
    """Call `function(*task)` for every task, in any order; the first error ends it.

    Args:
        function: importable by name, it runs in other processes when `workers` > 1.
        tasks: read only as fast as they are done.
        total: their number, for the progress.
        workers: processes; 1 works in this one.
        title: what the progress says.
    """
    for _ in progress(_results(function, tasks, min(workers, total)), total, title):
        pass


def _results(
    function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], workers: int
) -> Iterator[None]:
    if workers <= 1:
        for task in tasks:
            function(*task)
            yield
        return
    # A fork server listens on a socket below TMPDIR, whose whole name must not exceed 107 bytes.
    short = len(os.fsencode(tempfile.gettempdir())) <= _TMPDIR_MAX
    context = multiprocessing.get_context("forkserver" if short else "spawn")
    context.set_forkserver_preload(["data_pipelines.shards", "webdataset.writer", "imagehash"])
    pool = ProcessPoolExecutor(workers, context, initializer=_die_with_parent)
    wait_for_all = True
    try:
        queue = iter(tasks)
        pending = {pool.submit(function, *task) for task in islice(queue, 2 * workers)}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                pending |= {pool.submit(function, *task) for task in islice(queue, 1)}
                yield
    except BrokenProcessPool:
        raise DatasetError(
            "a worker process was killed (out of memory?); use fewer --workers and run again"
        ) from None
    except INTERRUPTS:
        wait_for_all = False
        interrupt_children()
        raise
    finally:
        pool.shutdown(wait=wait_for_all, cancel_futures=True)


def _die_with_parent() -> None:
    """End this worker on an interrupt, and when its parent is gone, even by `kill -9`."""
    end_on_interrupt()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def progress(items: Iterable[Any], total: int, title: str) -> Iterator[Any]:
    """The items, with a bar on a terminal and a line every tenth of `total` elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=title)
        return
    for done, item in enumerate(items, 1):
        if done * 10 // total > (done - 1) * 10 // total:
            print(f"{title}: {done}/{total}", file=sys.stderr, flush=True)
        yield item
