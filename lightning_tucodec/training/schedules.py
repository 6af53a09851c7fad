"""Learning rates as pure functions of the number of optimiser steps, so a resume does not change them."""

import math


def warmup_cosine(
    step: int, max_steps: int, *, lr: float, final_lr: float, warmup_steps: int, decay_start: float
) -> float:
    """A linear warm-up, a plateau, then half a cosine down.

    Args:
        step: steps done; the rate is that of the next one.
        max_steps: of the whole run.
        lr: on the plateau.
        final_lr: at the end.
        warmup_steps: length of the warm-up.
        decay_start: fraction of `max_steps` at which the cosine begins.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    start = decay_start * max_steps
    if step < start:
        return lr
    progress = min(1.0, (step - start) / max(1.0, max_steps - start))
    return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * progress)) / 2
