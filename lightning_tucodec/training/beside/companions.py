"""Processes beside a run: all communication with other machines is outside of the training process.

So a server that hangs, a client that is killed or a library that blocks at exit cannot delay a step. A
companion ends when its standard input says so, or when it is closed because the run has ended or died.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""What tells a run to save itself and stop; companions wait for its word instead."""


UNMIRRORED = 3
"""Exit status of a run that is complete here, and whose end its mirror does not have."""


def wait(seconds: float) -> bool:
    """In a companion: pause, but return at once, with True, when the run has ended."""
    ready, _, _ = select.select([0], [], [], seconds)
    return bool(ready)  # a byte says so, or the end of the pipe when the run was killed


class Companion:
    """A Python module that runs beside the training process.

    Args:
        module: its full name.
        arguments: words for it.
        log: file that gets what it says.
        secrets: more of its environment, which other users do not see, as they see arguments.
    """

    def __init__(self, module: str, arguments: list[str], log: Path, **secrets: str) -> None:
        self.name, self.log = module.rpartition(".")[2], log
        # Slurm sends USR1 and TERM to every process of a step. The mask is inherited for good.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with open(log, "ab") as stream:
                self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=stream,
                    stderr=stream,
                    env={**os.environ, "OMP_NUM_THREADS": "1", **secrets},
                    start_new_session=True,
                )
        except OSError as error:
            self._process = None
            print(f"tucodec: {self.name} does not start: {error}", file=sys.stderr, flush=True)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def finish(self, seconds: float) -> bool:
        """Give it time to finish, then end it; returns whether it ended by itself."""
        if self._process is None:
            return False
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone already
            self._process.stdin.write(b"\n")  # loader workers may still hold the pipe open
            self._process.stdin.close()
        try:
            done = self._process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            # W&B has a process of its own, which would live on.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            done = False
        self._process = None
        return done
