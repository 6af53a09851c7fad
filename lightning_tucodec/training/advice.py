"""What Lightning tells whoever uses it, and what a user of our commands need not read."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

_ADVICE = (
    ".*LightningCLI's args parameter is intended.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*Total length of `list` across ranks is zero.*",
    ".*does not have many workers.*",
    ".*It is recommended to use `self.log.*sync_dist=True.*",  # what is logged is a mean already
    # A login node or a notebook; `tucodec doctor` says what is wrong inside a job.
    ".*The `srun` command is available on your system but is not used.*",
    # It counts steps over all passes, whatever one pass holds.
    ".*number of training batches .* is smaller than the logging interval.*",
    ".*input value tensor is non-contiguous.*",  # compiled: Inductor has dropped our `contiguous`
)

TALKATIVE = ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.seed")
"""Loggers whose information is none to a user of this command."""


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """In this block Lightning's tips, found devices and internal deprecations are not printed.

    A caller's filters of warnings and levels of logs are given back.
    """
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        for message in _ADVICE:
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
