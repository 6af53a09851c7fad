"""bf16-mixed against float32: loss curves of 300 steps, beside what another draw of the noise changes.

    python -m tests.campaigns.precision            # a few minutes of one core; prints JSON

A short slice is in tests/training/test_fit.py.
"""

import json
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_tucodec.nn.noise import Noise
from lightning_tucodec.training.vae import VAE
from tests.support import PHOTOS, photo

STEPS, BATCH, CROP = 300, 4, 64
PARTS = (0, 50, 100, 200, 300)


def crops(step: int, images: list[Tensor]) -> Tensor:
    """The batch of a step, the same for all curves."""
    rng = np.random.default_rng(step)
    found = []
    for image in (images[i] for i in rng.integers(0, len(images), BATCH)):
        top, left = (int(rng.integers(0, side - CROP + 1)) for side in image.shape[1:])
        found.append(image[:, top : top + CROP, left : left + CROP])
    return torch.stack(found).contiguous(memory_format=torch.channels_last)


def curve(bfloat16: bool, noise: int, images: list[Tensor], **options: Any) -> list[float]:
    """Means of the loss over the `PARTS`."""
    torch.manual_seed(0)
    module = VAE(lmbda=256.0, lr=1e-3, **options).train()
    optimizer = module.configure_optimizers()
    losses = []
    for step in range(STEPS):
        x = crops(step, images)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            terms = module.terms(x, Noise.of(noise, torch.arange(BATCH) + step * BATCH))
        assert all(term.dtype == torch.float32 for term in terms)
        terms.loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        losses.append(float(terms.loss.detach()))
    return [float(np.mean(losses[first:end])) for first, end in pairwise(PARTS)]


def main() -> None:
    """Both precisions, three draws of the noise each."""
    torch.set_num_threads(1)
    images = [
        torch.from_numpy(photo(name, 320, 240)).permute(2, 0, 1).float() / 255 for name in PHOTOS
    ]
    curves = {
        f"{name}, noise {seed}": curve(bfloat16, seed, images, codec={"quantizer": "noise"})
        for name, bfloat16 in (("float32", False), ("bf16-mixed", True))
        for seed in range(3)
    }
    print(json.dumps({"steps": list(PARTS), "mean loss": curves}, indent=1))


if __name__ == "__main__":
    main()
