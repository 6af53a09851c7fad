"""Layers of any network in integers: beside PyTorch's, at the edge of the proof, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_tucodec.coding import products
from lightning_tucodec.coding.layers import FRACTION_BITS, LIMIT, convolution, peaks, quantised
from lightning_tucodec.errors import ModelFileError

LAYERS = {
    "conv 3": lambda: nn.Conv2d(5, 12, 3, padding=1),
    "conv 1": lambda: nn.Conv2d(33, 4, 1, bias=False),
    "conv 5": lambda: nn.Conv2d(2, 4, 5, padding=2),
    "transposed 5": lambda: nn.ConvTranspose2d(6, 4, 5, 2, padding=2, output_padding=1),
    "transposed 4": lambda: nn.ConvTranspose2d(3, 8, 4, 2, padding=1),
    "transposed 3": lambda: nn.ConvTranspose2d(3, 4, 3, 2, padding=1, output_padding=1),
    "transposed by 4": lambda: nn.ConvTranspose2d(3, 4, 6, 4, padding=1),
    "transposed by 1": lambda: nn.ConvTranspose2d(3, 4, 3, 1, padding=1),
}


@pytest.mark.parametrize("shuffle", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_say_what_pytorch_says(name, shuffle):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    integers = convolution(name, layer, 0.01, shuffle)
    x = 3 * torch.randn(4, 9, layer.in_channels)
    fixed = torch.round(x * 2**FRACTION_BITS).int().numpy()
    y = integers(fixed) * 2.0**-FRACTION_BITS
    with torch.inference_mode():
        expected = nn.functional.pixel_shuffle(layer(x.permute(2, 0, 1)[None]), shuffle)
        expected = nn.functional.leaky_relu(expected)[0].permute(1, 2, 0).numpy()
    assert y.shape == expected.shape == (4 * integers.factor, 9 * integers.factor, y.shape[2])
    np.testing.assert_allclose(y, expected, atol=3e-3)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
        nn.ConvTranspose2d(4, 4, 5, 2, padding=2),
        nn.ConvTranspose2d(4, 4, 1, 2, output_padding=1),
        nn.Linear(4, 4),
        type("Own", (nn.Conv2d,), {})(4, 4, 1),
    ],
)
def test_other_layers_are_none(layer):
    assert convolution("other", layer, 1.0, 1) is None


@pytest.mark.parametrize("inputs", [1, 15, 16, 17, 4800])
def test_sums_at_the_edge_of_the_proof_are_exact(inputs):
    """Largest activations against the largest weights of one sign, and of both."""
    rng = np.random.default_rng(inputs)
    rows = torch.from_numpy(rng.choice([-3.0, 3.0, 0.001], (6, inputs)))
    rows[0] = 3
    rows[1] = -3
    layer = quantised("edge", rows, torch.tensor([0.0, 1, -1, 100, 7, 3e4]))
    weight = layer.weight.astype(np.int64)
    assert (np.abs(weight).sum(1) < 1 << products.SUM_BITS).all()
    # As many bits as the proof leaves: one more would break it.
    limited = layer.shift[:2] < 24
    assert ((np.abs(weight[:2]).sum(1) >= 1 << 16) | (np.abs(weight[:2]).max(1) >= 1 << 13))[
        limited
    ].all()
    values = rng.choice([-LIMIT, LIMIT], (7, inputs)).astype(np.int32)
    values[0], values[1] = LIMIT, -LIMIT
    plane = values[:, None]
    out = np.empty((7, 1, 1, 1, 6), np.int32)
    products.convolve(layer, plane, peaks(plane), 0, 7, (0, 0), out)
    exponent = 14
    x = (values.astype(np.int64) + (1 << 13)) >> exponent
    expected = ((((x @ weight[:6, :inputs].T) << exponent) + layer.bias) >> layer.shift).clip(
        -LIMIT, LIMIT
    )
    np.testing.assert_array_equal(out.reshape(7, 6), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0**15, 1e30])
def test_weights_beyond_the_proof_are_refused(value):
    with pytest.raises(ModelFileError, match="weight"):
        quantised("large", torch.tensor([[1.0, value]]), None)
    with pytest.raises(ModelFileError, match="weight"):
        quantised("large", torch.ones(1, 2), torch.tensor([value]))


def test_many_large_weights_are_refused():
    with pytest.raises(ModelFileError, match="exact engine"):
        quantised("many", torch.full((1, 4000), 100.0), None)
    assert quantised("few", torch.full((1, 40), 100.0), None).shift.min() >= 1
