"""Ranges of the numbers in a configuration; outside of them Lightning, PyTorch or the loop itself fails."""

from collections.abc import Iterator
from math import inf
from typing import Any

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.training.runs.identity import DEFAULT_DATA, DEFAULT_MODEL, arguments

_ABOVE_0 = 5e-324
# PyTorch ends with a segmentation fault where it cannot start its threads.
_RUN = {"checkpoint_minutes": (0, inf), "threads": (1, 1024)}
_DATA = {"batch_size": (1, inf), "crop": (1, inf), "num_workers": (0, 1024), "cache_gb": (0, inf)}
_MODEL = {
    "lmbda": (0, inf), "lr": (0, inf), "final_lr": (0, inf), "warmup_steps": (0, inf), "decay_start": (0, 1),
    "aux_lr": (0, inf), "clip_norm": (0, inf), "ema": (0, 1), "discriminator_lr": (0, inf),
    "adversarial_share": (0, inf), "adversarial_weight": (0, inf),
}  # fmt: skip
_TRAINER = {
    "accumulate_grad_batches": (1, inf), "check_val_every_n_epoch": (1, inf), "devices": (-1, inf),
    "gradient_clip_val": (0, inf), "limit_train_batches": (_ABOVE_0, inf), "limit_val_batches": (0, inf),
    "log_every_n_steps": (0, inf), "max_epochs": (-1, inf), "num_nodes": (1, inf),
    "num_sanity_val_steps": (-1, inf), "val_check_interval": (_ABOVE_0, inf),
}  # fmt: skip
"""Least and greatest value of an option."""


def check_numbers(config: Any) -> None:
    """Refuse numbers that are out of range, in the groups of this package and in its own classes.

    Args:
        config: parsed by `fit`, as a dictionary or as jsonargparse's namespace.

    Raises:
        ConfigError: which option it is and what it can be.
    """
    if isinstance(seed := config.get("seed_everything"), bool):
        raise ConfigError(f"seed_everything: must be a whole number, got {str(seed).lower()}")
    for name, value, least, most in _numbers(config):
        # Written so that a NaN is refused as well.
        if isinstance(value, int | float) and not least <= value <= most:
            bound = f"between {least} and {most}" if most < inf else f"{least} or more"
            bound = "above 0" if least == _ABOVE_0 else bound
            raise ConfigError(f"{name}: must be {bound}, got {value}")


def _numbers(config: Any) -> Iterator[tuple[str, Any, float, float]]:
    """Every option with a range: name, value, least, greatest."""
    yield "seed_everything", config.get("seed_everything"), 0, 2**32 - 1
    for group, default, ranges in (
        ("run", None, _RUN), ("trainer", None, _TRAINER), ("data", DEFAULT_DATA, _DATA),
        ("model", DEFAULT_MODEL, _MODEL),
    ):  # fmt: skip
        # A user's own class may mean something else by these names.
        if (
            str(config[group].get("class_path", default)).startswith("lightning_tucodec.")
            or not default
        ):
            values = arguments(config, group) if default else config.get(group) or {}
            for name, (least, most) in ranges.items():
                yield f"{group}.{name}", values.get(name), least, most
