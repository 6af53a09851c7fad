"""Training noise that belongs to samples, not to ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_tucodec.io.hashing import derive, hash_positions

_NOISE = 0x6E6F69  # separates these random bits from those of order and augmentation


class SampleNoise(TorchFunctionMode):
    """Inside it `torch.rand_like` draws each sample's noise from a generator of that sample's own.

    So a batch gets the same noise however it is dealt out to ranks, and a resumed run what the
    straight run got. Tensors must have one entry a sample in their first dimension.

    Args:
        seed: of the run.
        index: global positions of the samples, int64 N.
        device: where noise is drawn; the numbers are the same on devices of one kind only.
    """

    def __init__(self, seed: int, index: Tensor, device: torch.device) -> None:
        super().__init__()
        seeds = hash_positions(derive(seed & 0xFFFFFFFFFFFFFFFF, _NOISE), index.cpu().numpy())
        self._generators = [torch.Generator(device).manual_seed(int(s) >> 1) for s in seeds]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Replace `rand_like`; everything else is as ever."""
        kwargs = kwargs or {}
        if func is not torch.rand_like or len(args[0]) != len(self._generators):
            return func(*args, **kwargs)
        noise = torch.empty_like(args[0], **kwargs)
        for sample, generator in zip(noise, self._generators, strict=True):
            sample.uniform_(generator=generator)
        return noise
