"""The format of the raster engine's streams, from a model whose weights are whole numbers of 1/64."""

import hashlib

import numpy as np
import pytest
import torch

from lightning_tucodec.coding import raster
from lightning_tucodec.coding.categorical import CategoricalTables, build_cdf
from lightning_tucodec.coding.layers import Convolution, quantised
from lightning_tucodec.coding.raster import RasterModel

TAPS = [(i, j) for i in range(3) for j in range(5) if (i, j) < (2, 2)]


def model(channels: int = 3, hyper: int = 2) -> RasterModel:
    rng = np.random.default_rng(0)

    def dyadic(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(-24, 25, shape) / 64)

    around = [(i, j) for i in range(3) for j in range(3)]
    phases = [
        quantised(f"h_s {n}", dyadic(8, 9 * hyper), dyadic(8), around, 0.01) for n in range(16)
    ]
    bias = dyadic(2 * channels)
    bias[:channels] = bias[:channels].abs() + 1
    return RasterModel(
        (
            Convolution(tuple(phases), 1, 4),
            Convolution((quantised("gamma", dyadic(10, 8), dyadic(10)),), 0, 1),
        ),
        quantised("context", dyadic(7, 12 * channels) / 4, dyadic(7), TAPS),
        (
            quantised("first", dyadic(10, 7), None, slope=0.01),
            quantised("second", dyadic(2 * channels, 10), bias),
        ),
        CategoricalTables(
            build_cdf(np.array([[1, 2, 4, 2, 1, 0.5]] * hyper)), np.full(hyper, -2, np.int32)
        ),
        np.array([100, -3000], np.int32),
        450,
    )


def test_streams_are_frozen() -> None:
    """Files of users depend on them."""
    rng = np.random.default_rng(1)
    z = rng.integers(-4, 5, (2, 3, 5)).astype(np.int32)
    y = (rng.integers(-1024, 1025, (12, 20, 3)) / 256).astype(np.float32)
    stream = raster.encode(model(), z, y)
    y_hat = raster.decode(model(), stream, 3, 5)
    assert np.abs(y_hat - y).max() <= 0.5 + 2**-12
    digest = hashlib.sha256(stream + y_hat.astype("<f4").tobytes())
    assert digest.hexdigest()[:16] == "a90336dc39ec5fae"


@pytest.mark.parametrize("size", [1e9, 3000.0])
def test_latents_beyond_the_limits_are_clamped_alike(size: float) -> None:
    z = np.full((2, 1, 1), int(size), np.int32)
    y = np.full((4, 4, 3), size, np.float32)
    y_hat = raster.decode(model(), raster.encode(model(), z, y), 1, 1)
    assert np.isfinite(y_hat).all()
    assert np.abs(y_hat).max() < 4096
    assert (y_hat * 4096 == np.rint(y_hat * 4096)).all()
