"""The exact engine for raster-scan contexts beside the networks that it codes."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compressai.models import (
    Cheng2020Anchor,
    Cheng2020AnchorCheckerboard,
    Cheng2020Attention,
    Elic2022Official,
    JointAutoregressiveHierarchicalPriors,
    MeanScaleHyperprior,
)
from compressai.models.vbr import JointAutoregressiveHierarchicalPriorsVbr
from torch import nn

from lightning_tucodec.codecs.network.engine import ContextEngine
from lightning_tucodec.coding import rans, raster
from lightning_tucodec.coding.layers import FRACTION_BITS, LIMIT
from lightning_tucodec.errors import CorruptStreamError, ModelFileError
from tests.codecs.networks import latents, lively

SMALL = {
    "mbt2018": lambda: JointAutoregressiveHierarchicalPriors(8, 12),
    "cheng2020-anchor": lambda: Cheng2020Anchor(8),
    "cheng2020-attn": lambda: Cheng2020Attention(10),
}
SHIPPED = {
    "mbt2018, 1 to 4": lambda: JointAutoregressiveHierarchicalPriors(192, 192),
    "mbt2018, 5 to 8": lambda: JointAutoregressiveHierarchicalPriors(192, 320),
    "cheng2020-attn, 1 to 3": lambda: Cheng2020Attention(128),
    "cheng2020-attn, 4 to 6": lambda: Cheng2020Attention(192),
}


def made(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return lively(build(), seed)


@pytest.fixture(scope="module", params=SMALL)
def engine(request):
    return ContextEngine.of(made(SMALL[request.param]))


def code(engine, height, width, seed=0):
    """Segments of random latents, and the symbols of z."""
    y, z = latents(engine.network, height, width, seed)
    symbols = torch.round(z[0]).int().numpy()
    values = y[0].permute(1, 2, 0).contiguous().numpy()
    return [raster.encode(engine.model, symbols, values)], values, symbols


def said(network, y_hat, z_hat):
    """σ and μ of the network itself, all positions at once."""
    with torch.inference_mode():
        context = network.context_prediction(y_hat)
        both = torch.cat((network.h_s(z_hat), context), 1)
        return network.entropy_parameters(both).chunk(2, 1)


def z_hat_of(engine, symbols):
    medians = engine.network.entropy_bottleneck.quantiles[:, 0, 1].detach()
    return (torch.from_numpy(symbols) + medians[:, None, None])[None]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3), (3, 1), (2, 2), (3, 5)])
def test_decoder_finds_the_encoders_latents(engine, height, width):
    segments, values, _ = code(engine, height, width)
    y_hat = engine.decode(segments, (height, width))
    assert y_hat.shape == (1, engine.network.M, 4 * height, 4 * width)
    assert y_hat.dtype == torch.float32
    distance = y_hat[0].permute(1, 2, 0).numpy() - values
    assert np.abs(distance).max() <= 0.5 + 2**-FRACTION_BITS
    # What was decoded codes to the same bytes: k = round(ŷ − μ) is on no edge.
    again = raster.encode(engine.model, code(engine, height, width)[2], np.ascontiguousarray(
        y_hat[0].permute(1, 2, 0).numpy()))  # fmt: skip
    assert [again] == segments


def test_images_are_coded_by_the_networks_own_transforms(engine):
    x = torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(0))
    segments = engine.encode(x)
    y_hat = engine.decode(segments, (2, 3))
    with torch.inference_mode():
        y = engine.network.g_a(x)
        symbols = torch.round(engine.network.h_a(y) - z_hat_of(engine, np.zeros((1, 1, 1)))).int()
    assert (y_hat - y).abs().max() <= 0.5 + 2**-FRACTION_BITS
    values = y[0].permute(1, 2, 0).numpy()
    assert segments == [raster.encode(engine.model, symbols[0].numpy(), values)]
    with pytest.raises(ValueError, match="one image"):
        engine.encode(x.repeat(2, 1, 1, 1))
    with pytest.raises(ModelFileError, match="not finite"):
        engine.encode(x * torch.inf)


def test_diagonals_say_what_the_network_says(engine):
    """ŷ of the diagonals, entered into the network as a whole plane, has μ a whole number away."""
    segments, _, symbols = code(engine, 3, 5)
    y_hat = engine.decode(segments, (3, 5))
    _, mean = said(engine.network, y_hat, z_hat_of(engine, symbols))
    k = y_hat - mean
    assert (k - torch.round(k)).abs().mean() < 0.01


def integers_in_raster_order(model, z, symbols):
    """ŷ of symbols h×w×M: position by position from left to right, in 64-bit integers."""

    def affine(layer, x, start=0):
        exponent = max(0, int(np.abs(x).max()).bit_length() - 13)
        x = (x.astype(np.int64) + ((1 << exponent) >> 1)) >> exponent
        weight = layer.weight[: layer.bias.size, : x.size].astype(np.int64)
        value = start + ((((weight @ x) << exponent) + layer.bias) >> layer.shift)
        value = np.where(value < 0, (value * layer.slope) >> 16, value)
        return value.clip(-LIMIT, LIMIT)

    gamma = model.gamma(z).astype(np.int64)
    height, width = gamma.shape[:2]
    plane = np.zeros((height + 2, width + 4, model.channels), np.int64)
    for i in range(height):
        for j in range(width):
            x = np.concatenate([plane[i + a, j + b] for a, b in model.context.taps])
            x = affine(model.context, x)
            start = gamma[i, j]
            for layer in model.parameters:
                x, start = affine(layer, x, start), 0
            mean = x[model.channels :].clip(-raster.MEAN_LIMIT, raster.MEAN_LIMIT)
            plane[i + 2, j + 2] = (symbols[i, j] << 12) + mean
    return plane[2:, 2:-2] * 2.0**-12


def test_diagonals_are_the_raster_order(engine):
    rng = np.random.default_rng(1)
    symbols = rng.integers(-4, 5, (8, 12, engine.network.M))
    z = rng.integers(-3, 4, (engine.network.N, 2, 3)).astype(np.int32)
    slow = integers_in_raster_order(engine.model, z, symbols)
    stream = raster.encode(engine.model, z, slow.astype(np.float32))
    np.testing.assert_array_equal(raster.decode(engine.model, stream, 2, 3), slow)


def test_every_tap_of_the_mask_lies_on_an_earlier_diagonal():
    network = SMALL["mbt2018"]()
    di, dj = torch.nonzero(network.context_prediction.mask[0, 0], as_tuple=True)
    assert len(di) == 12
    assert ((dj - 2) + 3 * (di - 2) <= -1).all()


def test_bits_are_those_of_the_likelihoods(engine):
    segments, _, symbols = code(engine, 6, 9)
    y_hat = engine.decode(segments, (6, 9))
    z_hat = z_hat_of(engine, symbols)
    scale, mean = said(engine.network, y_hat, z_hat)
    conditional, bottleneck = engine.network.gaussian_conditional, engine.network.entropy_bottleneck
    with torch.inference_mode():
        k = torch.round(y_hat - mean)
        y_likelihood = conditional._likelihood(k, scale).clamp(min=1e-9)
        _, z_likelihood = bottleneck(z_hat)
        bits = -float(y_likelihood.double().log2().sum() + z_likelihood.double().log2().sum())
    assert 8 * len(segments[0]) - 40 <= 1.001 * bits  # 40: where a stream ends


@pytest.mark.parametrize("name", SHIPPED)
def test_networks_as_large_as_the_published_ones(name):
    engine = ContextEngine.of(made(SHIPPED[name]))
    segments, _, symbols = code(engine, 1, 2)
    y_hat = engine.decode(segments, (1, 2))
    scale, mean = said(engine.network, y_hat, z_hat_of(engine, symbols))
    k = y_hat - mean
    assert (k - torch.round(k)).abs().mean() < 0.02
    y_likelihood = engine.network.gaussian_conditional._likelihood(torch.round(k), scale)
    with torch.inference_mode():
        _, z_likelihood = engine.network.entropy_bottleneck(z_hat_of(engine, symbols))
    likelihoods = torch.cat([y_likelihood.clamp(min=1e-9).flatten(), z_likelihood.flatten()])
    assert 8 * len(segments[0]) <= 1.003 * -float(likelihoods.double().log2().sum())


@pytest.mark.parametrize("factor", [1e-6, 40.0, 3000.0])
def test_activations_of_any_size(factor):
    """Where they leave the integers' range they are clamped, alike in encoder and decoder."""
    network = made(SMALL["mbt2018"])
    with torch.no_grad():
        network.context_prediction.weight *= factor
        network.entropy_parameters[0].weight *= min(factor, 100)
    engine = ContextEngine.of(network)
    segments, values, _ = code(engine, 3, 4)
    y_hat = engine.decode(segments, (3, 4))[0].permute(1, 2, 0).numpy()
    if factor < 1:
        assert np.abs(y_hat - values).max() <= 0.5 + 2**-FRACTION_BITS
    assert np.isfinite(y_hat).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("part", ["h_s.0", "context_prediction", "entropy_parameters.2"])
def test_weights_that_have_no_exact_sums_are_refused(part, value):
    network = made(SMALL["mbt2018"])
    with torch.no_grad():
        network.get_submodule(part).weight.view(-1)[0] = value
    with pytest.raises(ModelFileError, match="weight"):
        ContextEngine.of(network)


def test_tables_that_were_never_made_are_asked_for():
    with pytest.raises(ModelFileError, match=r"update\(\)"):
        ContextEngine.of(SMALL["mbt2018"]())


class _OtherOrder(JointAutoregressiveHierarchicalPriors):
    """The parts of mbt2018 put together in another way: μ before σ."""

    def forward(self, x):
        y = self.g_a(x)
        z_hat, z_likelihoods = self.entropy_bottleneck(self.h_a(y))
        y_hat = self.gaussian_conditional.quantize(y, "dequantize")
        both = torch.cat((self.h_s(z_hat), self.context_prediction(y_hat)), 1)
        means, scales = self.entropy_parameters(both).chunk(2, 1)
        _, y_likelihoods = self.gaussian_conditional(y, scales, means=means)
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}


class _More(JointAutoregressiveHierarchicalPriors):
    """Has a weight that the engine knows nothing of."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(1))


def _with_tanh():
    network = JointAutoregressiveHierarchicalPriors(8, 12)
    network.entropy_parameters[1] = nn.Tanh()
    return network


def _with_holes():
    network = JointAutoregressiveHierarchicalPriors(8, 12)
    network.context_prediction.mask[:, :, 1, 2] = 0
    return network


OTHERS = {
    "no context": lambda: MeanScaleHyperprior(8, 12),
    "checkerboard": lambda: Cheng2020AnchorCheckerboard(8),
    "groups of channels": lambda: Elic2022Official(8, 320),
    "variable rate": lambda: JointAutoregressiveHierarchicalPriorsVbr(8, 12),
    "other order": lambda: lively(_OtherOrder(8, 12)),
    "another weight": lambda: lively(_More(8, 12)),
    "another activation": lambda: lively(_with_tanh()),
    "another mask": lambda: lively(_with_holes()),
    "no codec": lambda: nn.Conv2d(3, 3, 1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_have_no_engine(name):
    network = OTHERS[name]()
    if hasattr(network, "update"):
        network.update(force=True)
    assert ContextEngine.of(network.eval()) is None


def test_a_network_is_left_as_it_was():
    network = made(SMALL["mbt2018"]).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    random = torch.random.get_rng_state()
    assert ContextEngine.of(network) is not None
    assert network.training
    assert not network.g_a._forward_hooks
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())


def test_hostile_segments_end_in_one_named_error_or_in_latents(engine):
    segments, _, _ = code(engine, 2, 3)
    rng = np.random.default_rng(0)
    hostile = [[], [*segments, b""], [b""], [segments[0] + b"\0\0\0\0"], [segments[0][4:]]]
    for number in range(60):
        which = bytearray(segments[0])
        if number % 3 == 0:
            del which[int(rng.integers(len(which))) :]
        elif number % 3 == 1:
            which[int(rng.integers(len(which)))] ^= 1 << int(rng.integers(8))
        else:
            which[:] = rng.bytes(len(which))
        hostile.append([bytes(which)])
    refused = 0
    for case in hostile:
        try:
            assert torch.isfinite(engine.decode(case, (2, 3))).all()
        except CorruptStreamError:
            refused += 1
    assert refused >= len(hostile) - 3
    with pytest.raises(CorruptStreamError):
        engine.decode(segments, (2, 4))


def fingerprint(engine, segments, shape):
    """Of ŷ, and of the bytes that the same latents make again."""
    y_hat = engine.decode(segments, shape)
    z, values = raster.take(engine.model, rans.RansDecoder(segments[0]), *shape)
    assert [raster.encode(engine.model, z, values)] == segments
    return hashlib.sha256(y_hat.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_same_symbols_from_any_number_of_threads(engine, threads):
    segments, _, _ = code(engine, 3, 4)
    expected = fingerprint(engine, segments, (3, 4))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert fingerprint(engine, segments, (3, 4)) == expected
        assert fingerprint(ContextEngine.of(engine.network), segments, (3, 4)) == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "environment",
    [
        {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"},
        {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    ],
    ids=["compatible kernels", "old instructions"],
)
def test_the_same_symbols_from_other_instructions(environment, tmp_path):
    engine = ContextEngine.of(made(SMALL["cheng2020-attn"]))
    segments, _, _ = code(engine, 2, 3)
    torch.save(engine.network.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "segment").write_bytes(segments[0])
    program = (
        "import sys, pathlib; from tests.codecs.test_engine import *\n"
        "folder = pathlib.Path(sys.argv[1]); network = made(SMALL['cheng2020-attn'])\n"
        "network.load_state_dict(torch.load(folder / 'weights.pt'))\n"
        "segments = [(folder / 'segment').read_bytes()]\n"
        "print(fingerprint(ContextEngine.of(network), segments, (2, 3)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == fingerprint(engine, segments, (2, 3)), done.stderr
