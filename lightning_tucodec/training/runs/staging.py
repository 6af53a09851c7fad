"""Copying a checkpoint from the device to the host while training goes on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def stage(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
    """A copy of all tensors on the CPU, and a function that waits until the copy is complete.

    From a GPU the values go through pinned memory, in a stream beside the step's: the host enqueues the
    copies and goes on. The step's own stream first copies each tensor on the GPU, because the next step
    changes it.
    """
    pairs: list[tuple[Tensor, Tensor]] = []

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            if not value.is_cuda:
                return value.detach().to("cpu", copy=True)
            own = value.detach().clone()
            host = torch.empty_like(own, device="cpu", pin_memory=True)
            pairs.append((own, host))
            return host
        if isinstance(value, dict):
            return {key: copied(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copied(item) for item in value)
        return value

    result = copied(checkpoint)
    if not pairs:
        return result, lambda: None
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for own, host in pairs:
            host.copy_(own, non_blocking=True)
            own.record_stream(beside)
    return result, beside.synchronize
