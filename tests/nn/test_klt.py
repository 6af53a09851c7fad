"""The KLT start: an orthogonal projection close to the best one, and its place in a run."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_tucodec.nn.blocks import PixelUnshuffle
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.nn.klt import REACH, start_as_klt
from lightning_tucodec.training.vae import resolve_codec
from tests.support import MICRO, PHOTOS, photo


def crops() -> Tensor:
    pixels = [photo(name, 128, 128) for name in PHOTOS]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255


def network(latent: int, **changes: Any) -> TucodecVAE:
    torch.manual_seed(0)
    widths = [0, 0, 64, 48]
    values = {**MICRO, "transform.widths": widths, "transform.latent_channels": latent, **changes}
    return TucodecVAE(resolve_codec("tiny", values))


@pytest.mark.parametrize("latent", [48, 32, 24])
def test_it_projects_nearly_as_well_as_one_klt_of_whole_blocks(latent: int) -> None:
    made, x = network(latent, **{"transform.gain": 3.0}), crops()
    before = (made.g_s(made.g_a(x)) - x).square().mean()
    start_as_klt(made, x)
    shown = made.g_s(made.g_a(x))
    assert torch.allclose(made.g_s(made.g_a(shown)), shown, atol=1e-4)
    blocks = PixelUnshuffle(16)(x - 0.5).transpose(0, 1).flatten(1)
    best = torch.linalg.eigvalsh((blocks @ blocks.T).double())[:-latent].sum() / x.numel()
    error = (shown - x).square().mean()
    assert best <= error * (1 + 1e-6)
    assert error < 1.3 * best < before


def test_the_centres_reach_over_every_channel() -> None:
    made, x = network(48, **{"transform.gain": 50.0}), crops()
    start_as_klt(made, x)
    y = made.g_a(x)
    reach = made.quantizer.centres().abs().max()
    assert (y.std((0, 2, 3)) <= reach / REACH * 1.001).all()
    free = network(48, **{"transform.gain": 50.0, "centres": 500})
    start_as_klt(free, x)
    assert torch.allclose(made.g_s(y), free.g_s(free.g_a(x)), atol=1e-4)


def test_other_networks_are_refused() -> None:
    for wrong in ({"transform.gdn": True}, {"transform.block": "residual"}):
        with pytest.raises(ValueError, match="KLT start needs"):
            start_as_klt(network(48, **wrong), crops())
