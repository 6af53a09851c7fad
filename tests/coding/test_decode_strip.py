"""What `kernels.decode_strip` trusts, and clamped activations, at the real size of `tiny`."""

import dataclasses

import numpy as np
import pytest
import torch

from lightning_tucodec.codecs.learned.model_file import freeze
from lightning_tucodec.coding import wavefront
from lightning_tucodec.coding.fixed_point import IntegerEntropyModel, IntegerLinear
from lightning_tucodec.coding.integer_weights import quantise_network
from lightning_tucodec.errors import CorruptStreamError, ModelFileError
from lightning_tucodec.nn.codec import PRESETS, TucodecVAE
from lightning_tucodec.nn.context import ContextConfig

TINY = PRESETS["tiny"]
CONTEXTS = {
    "tiny": TINY.context,
    "levels": ContextConfig(channels=13, levels=3, out_channels=20),
    "no points": dataclasses.replace(TINY.context, point_blocks=False),
    "no context": dataclasses.replace(TINY.context, channels=0),
}
SIZES = [(1, 1), (1, 9), (9, 1), (2, 2), (3, 3), (5, 2), (7, 3), (4, 30), (13, 8)]


@pytest.fixture(scope="module", params=CONTEXTS)
def model(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = TucodecVAE(dataclasses.replace(TINY, context=CONTEXTS[request.param]))
    with torch.no_grad():  # livelier activations than those of a fresh network
        for name, parameter in network.named_parameters():
            if name.startswith(("context.", "h_s.", "entropy_parameters.")):
                parameter.mul_(1.8)
    return freeze(network, request.param, {}).entropy_model()


def latents(model, height, width, seed=0, uniform=False):
    """Symbols z and y; uniform ones drive the activations into their clamps."""
    rng = np.random.default_rng(seed)
    count = model.laplace.centres.size
    shape = (height, width, model.network.latent_channels)
    y = rng.integers(0, count, shape) if uniform else rng.laplace(count / 2, 2, shape)
    z = rng.integers(-6, 7, (model.network.hyper_channels, -(-height // 4), -(-width // 4)))
    return z.astype(np.int32), np.rint(y).clip(0, count - 1).astype(np.int32)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_decoder_finds_what_the_encoder_wrote(model, height, width, uniform):
    z, y = latents(model, height, width, uniform=uniform)
    stream = wavefront.encode(model, z, y)
    np.testing.assert_array_equal(wavefront.decode(model, stream, height, width), y)


def test_hostile_streams_end_in_an_error_or_in_symbols(model):
    z, y = latents(model, 5, 7)
    stream = wavefront.encode(model, z, y)
    rng = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(stream)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        end = len(damaged) if rng.random() < 0.5 else rng.integers(len(damaged) + 1)
        try:
            symbols = wavefront.decode(model, bytes(damaged[:end]), 5, 7)
        except CorruptStreamError:
            continue
        # Two cells of equal width can be exchanged unseen by rANS: the container's checksum finds it.
        assert symbols.min() >= 0
        assert symbols.max() < model.laplace.centres.size


def test_centres_beyond_the_bound_are_refused(model):
    centres = model.laplace.centres.copy()
    centres[-1] = wavefront.LIMIT + 1
    with pytest.raises(ModelFileError, match="beyond"):
        dataclasses.replace(model, laplace=dataclasses.replace(model.laplace, centres=centres))


def test_weights_beyond_16_bits_are_refused():
    with pytest.raises(ModelFileError, match="16 bits"):
        IntegerLinear("layer", torch.tensor([[2**15]]), torch.zeros(1, dtype=torch.int64), 18)


@pytest.mark.parametrize(
    "name", ["context.vertical.0.conv1", "parameters.upsilon", "parameters.hidden", "context.out"]
)
def test_layers_that_do_not_fit_are_refused(name):
    tensors = quantise_network(TucodecVAE(TINY))
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:-1]
    with pytest.raises(ModelFileError, match="is missing"):
        IntegerEntropyModel(tensors)
