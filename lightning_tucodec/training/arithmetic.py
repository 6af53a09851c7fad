"""How a GPU computes in a training: reproducibly or as fast as it can, set in this one place."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch

Arithmetic = Literal["reproducible", "fast"]

_memory: Any = torch.utils.deterministic  # mypy does not see what it sets


@contextlib.contextmanager
def arithmetic(kind: Arithmetic) -> Iterator[None]:
    """Inside it a GPU computes so; a CPU, whose results do not depend on it, is left alone.

    `trainer.benchmark` and `trainer.deterministic`, where they are given, have the last word.

    Args:
        kind: "reproducible": products of float32 in float32, deterministic kernels, no choice of kernels by
            the clock, so that a resumed run ends with the bits of the straight one. "fast": products of
            float32 in TF32 (10 bits of mantissa), whatever kernel cuDNN finds fastest for these shapes.
    """
    if not torch.cuda.is_available():
        yield
        return
    fast = kind == "fast"
    before = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        _memory.fill_uninitialized_memory,
    )
    if not fast:
        # cuBLAS reads it when it starts; without it, its results may depend on the order of streams.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        # PyTorch would also fill every tensor that it makes before a kernel writes there: time for nothing.
        _set("high" if fast else "highest", fast, fast, not fast, True, False)
        yield
    finally:
        _set(*before)


def _set(
    precision: str, tf32: bool, benchmark: bool, deterministic: bool, warn_only: bool, fill: bool
) -> None:
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = benchmark
    # A layer of a user's own may have no such kernel: PyTorch names it once.
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    _memory.fill_uninitialized_memory = fill
