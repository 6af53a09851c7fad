"""Real photographs, a network of a few thousand weights, surroundings, and what the parser has."""

import argparse
import contextlib
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
"""Photographs inside scikit-image's wheel; its other ones would be downloaded."""

MICRO: dict[str, Any] = {
    "transform.widths": [0, 8, 12, 16],
    "transform.latent_channels": 8,
    "transform.attention_mask_channels": 8,
    "hyper.channels": 8,
    "hyper.latent_channels": 4,
    "hyper.out_channels": 12,
    "hyper.entropy_widths": [16, 16],
    "context.channels": 6,
    "context.out_channels": 12,
    "centres": 40,
}
"""Overrides of `tiny` that make everything that costs time small."""

MUON = {"transform.widths": [0, 8, 12, 32]}
"""Overrides of `MICRO`, in which Muon would leave every weight to Adam as too small a matrix."""


def photo(name: str, width: int, height: int, left: int = 100, top: int = 60) -> NDArray[np.uint8]:
    """A part of a photograph, H×W×3."""
    with Image.open(str(files("skimage") / "data" / name)) as image:
        box = (left, top, left + width, top + height)
        return np.array(image.convert("RGB").crop(box))


def s3_environment(endpoint: str) -> dict[str, str]:
    """Environment variables that lead to an S3 server of a test."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


CALLER_MODES = ("no_grad", "inference", "float64", "autocast", "device")
"""What `caller_mode` knows."""


@contextlib.contextmanager
def caller_mode(name: str) -> Iterator[None]:
    """PyTorch as a program that uses this package may have set it."""
    if name == "float64":
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
        return
    modes = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "device": lambda: torch.device("meta"),
    }
    with modes[name]():
        yield


def options(
    parser: argparse.ArgumentParser, *command: str
) -> Iterator[tuple[str, argparse.Action]]:
    """Every subcommand and each of its arguments."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from options(inner, *command, name)
        else:
            yield " ".join(command), action
