from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lightning_tucodec.codecs.learned.model_file import freeze
from lightning_tucodec.coding import wavefront
from lightning_tucodec.errors import CorruptStreamError
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.training.vae import resolve_codec
from tests.support import MICRO

VARIANTS: dict[str, dict[str, Any]] = {
    "one level": {},
    "two levels": {"context.levels": 2},
    "no context": {"context.channels": 0},
}
SIZES = [(1, 1), (1, 9), (9, 1), (2, 3), (3, 2), (4, 4), (5, 13), (17, 6)]


@pytest.fixture(scope="module", params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> wavefront.EntropyModel:
    torch.manual_seed(3)
    network = TucodecVAE(resolve_codec("tiny", {**MICRO, **VARIANTS[request.param]})).eval()
    with torch.no_grad():
        for parameter in network.entropy_parameters.parameters():
            parameter.mul_(3)  # means and scales that differ from place to place
    return freeze(network, "test", {}).entropy_model()


def latents(height: int, width: int, seed: int = 0) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    z = rng.integers(-3, 4, (4, -(-height // 4), -(-width // 4)), dtype=np.int32)
    y = (20 + rng.laplace(0, 2, (height, width, 8))).round().clip(0, 39).astype(np.int32)
    return z, y


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_diagonals_cover_the_plane_in_a_causal_order(height: int, width: int) -> None:
    seen: dict[tuple[int, int], int] = {}
    for d, top, bottom in wavefront.diagonals(height, width):
        for i in range(top, bottom):
            assert 0 <= d - 3 * i < width
            seen[i, d - 3 * i] = d
    assert len(seen) == height * width
    assert list(wavefront.diagonals(height, width))[-1].number == width + 3 * (height - 1) - 1


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_round_trip(model: wavefront.EntropyModel, height: int, width: int) -> None:
    z, y = latents(height, width)
    stream = wavefront.encode(model, z, y)
    np.testing.assert_array_equal(wavefront.decode(model, stream, height, width), y)


def test_bytes_do_not_depend_on_threads(model: wavefront.EntropyModel) -> None:
    z, y = latents(11, 14)
    before = torch.get_num_threads()
    try:
        streams = set()
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            streams.add(wavefront.encode(model, z, y))
            np.testing.assert_array_equal(wavefront.decode(model, min(streams), 11, 14), y)
    finally:
        torch.set_num_threads(before)
    assert len(streams) == 1


def test_hostile_streams_end_in_a_named_error(model: wavefront.EntropyModel) -> None:
    z, y = latents(6, 7)
    stream = wavefront.encode(model, z, y)
    rng = np.random.default_rng(1)
    for _ in range(30):
        damaged = bytearray(stream)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        cut = bytes(damaged[: rng.integers(len(damaged))])
        for bad in (bytes(damaged), cut):
            try:
                decoded = wavefront.decode(model, bad, 6, 7)
            except CorruptStreamError:
                continue
            assert decoded.shape == (6, 7, 8)  # the container's checksum is what finds these
