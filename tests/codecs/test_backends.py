"""From the same latents the same bytes, from the same bytes the same symbols, whatever computes them.

The golden streams of the shipped models are decoded, and their symbols coded again, under every setting
that could change a floating-point sum. `python -m tests.golden.make` writes them anew for new weights.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import lightning_tucodec as tuc
from lightning_tucodec.codecs.learned.codec import TucModel
from lightning_tucodec.codecs.learned.latents import Latents, strip_bounds
from lightning_tucodec.coding import categorical, rans, wavefront
from lightning_tucodec.coding.container import unpack
from lightning_tucodec.coding.fixed_point import LIMIT, IntegerLinear
from lightning_tucodec.io.images import read_image
from tests.golden.make import FOLDER, fingerprint, names, read

NAMES = names()


def golden(name: str) -> tuple[TucModel, bytes, str]:
    """A shipped model, its stream and the fingerprint of its symbols."""
    record = json.loads((FOLDER / f"{name}.json").read_text())
    model = tuc.load(name)
    assert model.id.hex() == record["model"], "new weights: python -m tests.golden.make"
    data = (FOLDER / f"{name}.tuc").read_bytes()
    return model.of(unpack(data)), data, record["symbols"]


def latents_of(model: TucModel, data: bytes) -> Latents:
    """Everything that a file holds."""
    container = unpack(data)
    height, width = -(-container.height // 16), -(-container.width // 16)
    rows, z = [], []
    for (top, bottom), strip in zip(strip_bounds(height, width), container.strips, strict=True):
        assert strip is not None
        decoder = rans.RansDecoder(strip.removeprefix(model._head))
        strip_z, strip_y = wavefront.take(model.entropy_model, decoder, bottom - top, width)
        rows.append(strip_y)
        z.append(strip_z)
    return Latents(np.concatenate(rows), z)


def code_again(model: TucModel, data: bytes) -> bytes:
    """Decode a file and code its latents."""
    container = unpack(data)
    return model.write(latents_of(model, data), container.width, container.height)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True


@contextlib.contextmanager
def native_integers() -> Iterator[None]:
    """Layers multiply and shift 64-bit integers instead of integers held in float64."""

    def accumulate(self: IntegerLinear, x: Tensor) -> Tensor:
        sums = x.long() @ self.weight.long() + self.bias.long()
        return sums.double()  # below 2^52, so nothing is lost

    def finish(self: IntegerLinear, accumulated: Tensor) -> Tensor:
        return (accumulated.long() >> self.shift).clamp(-LIMIT, LIMIT).double()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IntegerLinear, "accumulate", accumulate)
        patch.setattr(IntegerLinear, "finish", finish)
        yield


@contextlib.contextmanager
def numpy_blas() -> Iterator[None]:
    """Matrix products by NumPy's BLAS (OpenBLAS) instead of PyTorch's (MKL or another)."""

    def accumulate(self: IntegerLinear, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() @ self.weight.numpy()) + self.bias

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IntegerLinear, "accumulate", accumulate)
        yield


@contextlib.contextmanager
def other_summation_order() -> Iterator[None]:
    """Inputs are added from the last one to the first."""

    def accumulate(self: IntegerLinear, x: Tensor) -> Tensor:
        return x.flip(1) @ self.weight.flip(0) + self.bias

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IntegerLinear, "accumulate", accumulate)
        yield


SETTINGS = {
    "1 thread": lambda: threads(1),
    "2 threads": lambda: threads(2),
    "4 threads": lambda: threads(4),
    "without oneDNN": without_onednn,
    "native integers": native_integers,
    "NumPy's BLAS": numpy_blas,
    "another order of sums": other_summation_order,
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_golden_streams_under_every_setting(name: str, setting: str) -> None:
    model, data, symbols = golden(name)
    with SETTINGS[setting]():
        assert fingerprint(read(model, data)) == symbols
        assert code_again(model, data) == data


@pytest.mark.parametrize("name", NAMES)
def test_eight_at_once(name: str) -> None:
    model, data, symbols = golden(name)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: code_again(model, data), range(8))) == {data}
        assert {fingerprint(y) for y in pool.map(lambda _: read(model, data), range(8))} == {
            symbols
        }


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_eight_gives_the_streams_of_single_images(name: str) -> None:
    """The coder is exact; transforms may round otherwise in a batch, which hardly ever shows."""
    model = tuc.load(name)
    shown = read_image(FOLDER / f"{name}.png")
    batch = [np.roll(shown, shift, axis=1) for shift in range(8)]
    equal = 0
    for pixels, latents in zip(batch, model.analyse_batch(batch), strict=True):
        assert (model.analyse(pixels).y != latents.y).mean() < 1e-4
        equal += model.write(latents, pixels.shape[1], pixels.shape[0]) == model.encode(pixels)
    assert equal >= 6


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("name", NAMES)
def test_pixels_in_either_layout(name: str, layout: torch.memory_format) -> None:
    model = TucModel(tuc.load(name).file)
    model.network.to(memory_format=layout)
    model.layout = layout
    _, data, symbols = golden(name)
    assert fingerprint(read(model, data)) == symbols
    shown = np.array(model.decompress(data)).astype(int)
    difference = np.abs(shown - read_image(FOLDER / f"{name}.png"))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_diagonals_say_what_the_whole_plane_says(name: str) -> None:
    """The compiled decoder against the encoder's networks, position by position."""
    model, data, _ = golden(name)
    entropy = model.entropy_model
    latents = latents_of(model, data)
    rows = strip_bounds(*latents.y.shape[:2])[0]
    symbols = wavefront.in_order(entropy, latents.z[0], latents.y[rows[0] : rows[1]])
    strip = unpack(data).strips[0]
    assert strip is not None
    decoder = rans.RansDecoder(strip.removeprefix(model._head))
    z = latents.z[0]
    categorical.decode_table(decoder, z[0].size, entropy.categorical)
    decoded = wavefront.decode_laplace(decoder, symbols.mu, symbols.scale, entropy.laplace)
    np.testing.assert_array_equal(decoded, symbols.symbol)
    decoder.finish()


@pytest.mark.parametrize(
    "environment",
    [
        {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"},
        {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    ],
    ids=["compatible kernels", "old instructions"],
)
def test_other_kernels_of_the_same_libraries(environment: dict[str, str]) -> None:
    code = (
        "import sys; from tests.codecs.test_backends import *\n"
        "for name in NAMES:\n"
        "    model, data, symbols = golden(name)\n"
        "    assert fingerprint(read(model, data)) == symbols\n"
        "    assert code_again(model, data) == data\n"
        "print('same')"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout == "same\n", done.stderr
