"""Many files at once: networks on whole batches, while all cores read, code and write.

::

    files ─ prepare (pool) ─ batches of equal size ─ network (the caller's thread, any device) ─ finish (pool)

The number of pixels in flight is bounded. One bad file costs only itself.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from lightning_tucodec.errors import TucodecError
from lightning_tucodec.io.processes import cores, worker_threads

PIXELS_IN_FLIGHT = 1 << 25
"""Images are read ahead until they have so many pixels together (33 million: 100 MB)."""

Job = TypeVar("Job")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")
Row = dict[str, Any]


@dataclass(frozen=True)
class Stages(Generic[Job, Prepared, Result]):
    """What is done with each file.

    Attributes:
        pixels: of a file, from its header; 0 when it has none that can be read.
        prepare: anything before the network, in a thread of the pool.
        group: prepared files of equal groups go through the network together.
        batch: at most so many like this one.
        network: of a batch, in the thread of the caller.
        finish: anything after the network, in a thread of the pool.
    """

    pixels: Callable[[Job], int]
    prepare: Callable[[Job], Prepared]
    group: Callable[[Prepared], Hashable]
    batch: Callable[[Prepared], int]
    network: Callable[[Sequence[Prepared]], Sequence[Result]]
    finish: Callable[[Job, Prepared, Result], Row]


def run(
    stages: Stages[Job, Prepared, Result], jobs: Sequence[Job]
) -> Iterator[tuple[Job, Row | Exception]]:
    """Every job in order, with its row or with the error (TucodecError, OSError) that ended it."""
    workers = max(1, min(cores(), len(jobs)))
    # As many threads as the caller's: what an encoder shows is to the bit what a decoder will show, and
    # sums of floating-point numbers depend on that number.
    with worker_threads(workers, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        yield from _run(stages, jobs, pool)


def _run(
    stages: Stages[Job, Prepared, Result], jobs: Sequence[Job], pool: ThreadPoolExecutor
) -> Iterator[tuple[Job, Row | Exception]]:
    left = deque(range(len(jobs)))
    sizes: dict[int, int] = {}  # pixels of what is in flight
    preparing: deque[tuple[int, Future[Prepared]]] = deque()
    groups: dict[Hashable, list[tuple[int, Prepared]]] = {}
    done: dict[int, Future[Row] | Exception] = {}
    shown = 0

    def read_ahead() -> None:
        while left and (not sizes or sum(sizes.values()) < PIXELS_IN_FLIGHT):
            number = left.popleft()
            sizes[number] = stages.pixels(jobs[number])
            preparing.append((number, pool.submit(stages.prepare, jobs[number])))

    def collect() -> list[tuple[int, Prepared]]:
        """The next batch that is full, or the largest one when nothing more is being prepared."""
        while preparing:
            number, future = preparing.popleft()
            try:
                prepared = future.result()
            except (TucodecError, OSError) as error:
                done[number] = error
                continue
            group = groups.setdefault(stages.group(prepared), [])
            group.append((number, prepared))
            if len(group) >= stages.batch(prepared):
                return groups.pop(stages.group(prepared))
        return groups.pop(max(groups, key=lambda key: len(groups[key]))) if groups else []

    while shown < len(jobs):
        read_ahead()
        batch = collect()
        if batch:
            results = stages.network([prepared for _, prepared in batch])
            for (number, prepared), result in zip(batch, results, strict=True):
                done[number] = pool.submit(stages.finish, jobs[number], prepared, result)
        while shown in done:
            outcome = done[shown]
            # More is prepared while files are being finished, if there is anything and room for it.
            more = left or preparing or groups
            room = sum(sizes.values()) < PIXELS_IN_FLIGHT
            if more and room and isinstance(outcome, Future) and not outcome.done():
                break
            yield jobs[shown], _outcome(done.pop(shown))
            del sizes[shown]
            shown += 1


def _outcome(result: "Future[Row] | Exception") -> Row | Exception:
    if isinstance(result, Exception):
        return result
    try:
        return result.result()
    except (TucodecError, OSError) as error:
        return error
