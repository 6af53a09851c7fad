"""Batches of an endless plan from any position, decoded ahead by worker processes."""

import itertools
import math
import mmap
import os
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from lightning_tucodec.errors import ConfigError, TucodecError
from lightning_tucodec.io.processes import when_parent_ends
from lightning_tucodec.training.input.batches import Batch, RankBatches, for_transfer

_PREFETCH = 2  # batches that a worker has been asked for, at most


class PlanLoader:
    """Batches of an endless plan, one pass over the samples at a time, from any position.

    Lightning stores `state_dict()` in its checkpoints. The position counts the batches that were
    handed out, not those that workers have prefetched. Length is known, so Lightning asks for a
    batch only when it trains on it.

    Args:
        batches: see `RankBatches`.
        num_workers: processes that decode ahead; 0 decodes in this one.
    """

    def __init__(self, batches: RankBatches, num_workers: int = 0) -> None:
        self.batches = batches
        self.num_workers = num_workers
        self.position = 0
        self._pass = len(self)
        self._shared: _SharedBatches | None = None
        self._stream: Iterator[tuple[int, int]] = iter(())

    def __len__(self) -> int:
        """Batches in one pass over the samples; the last one may reach into the next pass."""
        return -(-self.batches.plan.samples // self.batches.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield image uint8 N×crop×crop×3 and index int64 N, up to the pass's end."""
        size = self.batches.batch_size
        for _ in range(self._pass - self.position // size % self._pass):
            batch = self._next()
            self.position += size
            yield batch

    def limit(self, batches: int | float) -> None:
        """Iterate over so many batches (or that fraction of all) at a time, as Lightning will."""
        full = len(self)
        self._pass = max(1, min(batches, full) if isinstance(batches, int) else int(batches * full))

    def state_dict(self) -> dict[str, int]:
        """The position of the run; all samples before `position` were handed out."""
        plan = self.batches.plan
        return {"position": self.position, "samples": plan.samples, "seed": plan.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state`, for any number of ranks and workers.

        Raises:
            ConfigError: it belongs to other shards or another seed.
        """
        for key, own in self.state_dict().items():
            if key != "position" and state.get(key, own) != own:
                raise ConfigError(
                    f"the checkpoint was made with {key} {state[key]}, now it is {own}: its place "
                    "in the data means nothing here; use the same shards and seed, or `init_from`"
                )
        self.close()
        self.position = int(state["position"])

    def close(self) -> None:
        """Stop the workers; iterating again starts new ones."""
        self._stream, self._shared = iter(()), None

    def _next(self) -> Batch:
        # Also pinned: CUDA may wait for the queue before it copies from other memory.
        positions = for_transfer(self.batches.positions(self.position))
        if not self.num_workers:
            pixels = np.empty(self.batches.shape, np.uint8)
            self.batches.read(self.position, pixels)
            return {**self.batches.tensors(pixels), "index": positions}
        if self._shared is None:
            self._start_workers()
        assert self._shared is not None
        try:
            worker, slot = next(self._stream)
        except TucodecError as error:
            # From a worker the message comes with a traceback around it.
            self.close()
            last = str(error).strip().splitlines()[-1]
            raise type(error)(
                last.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
            ) from None
        batch = self.batches.tensors(self._shared.pixels[worker, slot])
        if self._shared.starts[worker, slot] != self.position:
            raise RuntimeError("a worker overwrote a batch before it was read")
        return {**batch, "index": positions}

    def _start_workers(self) -> None:
        self._shared = _SharedBatches(self.batches, self.num_workers)
        # The stream has no end, so that workers decode across the ends of passes as well.
        loader = DataLoader(
            self._shared,
            batch_size=None,
            sampler=_Starts(self.position, self.batches.batch_size),
            num_workers=self.num_workers,
            prefetch_factor=_PREFETCH,
            generator=torch.Generator(),  # or else starting would advance the global one
            # Forked workers share the index and the memory for batches, and end when this process
            # is killed; those of a fork server would wait for ever.
            multiprocessing_context="fork",
            worker_init_fn=partial(_end_with_parent, os.getpid()),
        )
        self._stream = iter(loader)


class _SharedBatches(Dataset[tuple[int, int]]):
    """Memory in which workers leave their batches for the main process, used again and again.

    Sending each batch through memory of its own, as PyTorch does, costs page faults on both sides
    that take a good part of the time of decoding. A worker has been asked for `_PREFETCH` batches
    at most while the main process copies one more out, so with one slot more than that it never
    writes where somebody reads.

    Attributes:
        pixels: uint8 workers×slots×N×crop×crop×3.
        starts: int64 workers×slots, the position of the batch in each slot.
    """

    def __init__(self, batches: RankBatches, workers: int) -> None:
        self.batches = batches
        slots = (workers, _PREFETCH + 1)
        # Anonymous, so that small limits of /dev/shm do not matter.
        pixels = mmap.mmap(-1, math.prod(slots + batches.shape))
        self.pixels = np.frombuffer(pixels, np.uint8).reshape(slots + batches.shape)
        self.starts = np.frombuffer(mmap.mmap(-1, 8 * math.prod(slots)), np.int64).reshape(slots)
        self._slot = 0  # each worker counts its own

    def __getitem__(self, start: int) -> tuple[int, int]:
        """Decode a batch; returns where it lies: worker and slot."""
        info = get_worker_info()
        assert info is not None
        place = info.id, self._slot
        self._slot = (self._slot + 1) % self.starts.shape[1]
        self.starts[place] = start
        self.batches.read(start, self.pixels[place])
        return place


def _end_with_parent(parent: int, worker: int) -> None:
    """End this worker when its parent is gone.

    PyTorch watches too, but not if the parent was killed before the worker first looked.
    """
    when_parent_ends(parent, lambda: os._exit(1))


class _Starts(Sampler[int]):
    """Global positions at which batches start, without end."""

    def __init__(self, first: int, step: int) -> None:
        self.first, self.step = first, step

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first, self.step)
