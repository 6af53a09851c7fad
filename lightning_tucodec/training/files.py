"""Real files of validation images: threads finish them while the next images are measured.

What needs the network's device is done in the validation step. What is left, entropy coding of integers,
needs the CPU alone: a GPU does not wait for it.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import pytorch_lightning as pl
import torch

from lightning_tucodec.io.processes import worker_threads

MOST_THREADS = 16
"""Each needs memory for the entropy networks of one strip."""


def threads_beside(device: torch.device) -> int:
    """How many threads finish files beside a network on this device; 0: the validation step does it.

    On a GPU one fewer than PyTorch has on the CPU (`run.threads`, or the process's share of the cores),
    because one feeds the GPU. On a CPU none, because the network uses them all.
    """
    return 0 if device.type == "cpu" else min(torch.get_num_threads() - 1, MOST_THREADS)


class FileWorkers(pl.Callback):
    """Threads that a validation has; a callback, because Lightning tells callbacks of exceptions.

    A job runs no nn.Module and changes nothing that threads share, such as PyTorch's default type, since
    training code runs beside it. PyTorch computes on one core in each of the threads.
    """

    def __init__(self) -> None:
        self._jobs: deque[Future[None]] = deque()
        self._submit: Callable[[Callable[[], None]], Future[None]] | None = None
        self._most = 0
        self._ending = contextlib.ExitStack()

    def begin(self, threads: int) -> None:
        """A validation begins.

        Args:
            threads: that do its jobs; 0: `do` itself does them.
        """
        self._forget()
        self._ending.close()
        if not threads:
            return
        own = torch.get_num_threads()
        ready = threading.Barrier(threads + 1)

        def start() -> None:
            torch.set_num_threads(1)
            torch.get_num_threads()  # a thread keeps what is set when it asks for the first time
            ready.wait()

        pool = self._ending.enter_context(worker_threads(threads, start))
        try:
            for _ in range(threads):
                pool.submit(int)
            ready.wait()
        except BaseException:
            ready.abort()  # none waits for a thread that could not be started
            raise
        finally:
            # Threads that start later, of whomever, get the number that was set last by any thread.
            torch.set_num_threads(own)
        self._submit, self._most = pool.submit, 2 * threads

    def do(self, job: Callable[[], None]) -> None:
        """Do a job, or leave it to a thread; waits while two for each thread are not done.

        Raises:
            Exception: this job has failed, or an earlier one.
        """
        if self._submit is None:
            job()
            return
        while self._jobs and (len(self._jobs) >= self._most or self._jobs[0].done()):
            self._jobs.popleft().result()
        self._jobs.append(self._submit(job))

    def finish(self) -> None:
        """Wait until all jobs are done.

        Raises:
            Exception: one has failed.
        """
        while self._jobs:
            self._jobs.popleft().result()
        self._forget()
        self._ending.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Drop the jobs that no thread has begun: the validation has failed, or was stopped."""
        self._forget()
        self._ending.__exit__(type(exception), exception, exception.__traceback__)

    def _forget(self) -> None:
        self._jobs.clear()
        self._submit = None
