"""Tiles with measured halos equal the whole, for every preset and what recipes can switch on."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from lightning_tucodec.nn import tiles
from lightning_tucodec.nn.codec import PRESETS, CodecConfig, TucodecVAE
from lightning_tucodec.nn.transforms import STRIDE
from lightning_tucodec.training.vae import resolve_codec


def thin(config: CodecConfig) -> CodecConfig:
    """The same layers with a few channels each: what reaches where does not depend on widths."""
    t = config.transform
    return dataclasses.replace(
        config,
        transform=dataclasses.replace(
            t,
            widths=tuple(min(width, 4) for width in t.widths),
            latent_channels=4,
            attention_mask_channels=None if t.attention_mask_channels is None else 2,
        ),
    )


FAMILY = {
    **PRESETS,
    "non-local": resolve_codec("tiny", {"transform.non_local": True}),
    "paper, shuffled": resolve_codec("paper", {"transform.upsampling": "pixel_shuffle"}),
}


def network(name: str) -> TucodecVAE:
    torch.manual_seed(0)
    return TucodecVAE(thin(FAMILY[name])).double().eval()


def tiled(
    transform: nn.Module, x: Tensor, halo: tiles.Halo, stride_in: int, stride_out: int
) -> Tensor:
    """The transform of x in the smallest tiles."""

    def scaled(positions: slice, stride: int) -> slice:
        return slice(stride * positions.start, stride * positions.stop)

    height, width = (side // stride_in for side in x.shape[-2:])
    parts = tiles.tiles(height, width, halo, memory=0)
    assert len(parts) > 1
    whole: Tensor | None = None
    for rows, columns in parts:
        read = x[..., scaled(rows.read, stride_in), scaled(columns.read, stride_in)]
        tile = transform(read)[
            ..., scaled(rows.inside, stride_out), scaled(columns.inside, stride_out)
        ]
        if whole is None:
            whole = tile.new_full(
                (1, tile.shape[1], stride_out * height, stride_out * width), torch.nan
            )
        whole[..., scaled(rows.keep, stride_out), scaled(columns.keep, stride_out)] = tile
    assert whole is not None
    return whole


@pytest.mark.parametrize("name", FAMILY)
@torch.no_grad()
def test_tiles_equal_the_whole(name: str) -> None:
    codec = network(name)
    for transform, channels, stride_in, stride_out in (
        (codec.g_a, 3, STRIDE, 1),
        (codec.g_s, 4, 1, STRIDE),
    ):
        halo = tiles.measure(transform.float(), channels, stride_in, stride_out)
        transform.double()
        # Odd sizes, tall and wide, with at least two tiles a side.
        side = 2 * (-(-(halo.before + halo.after) // 16) * 16) + 17
        for height, width in ((side, 7), (5, side + 16)):
            x = torch.rand(1, channels, height * stride_in, width * stride_in).double()
            whole = transform(x)
            torch.testing.assert_close(
                tiled(transform, x, halo, stride_in, stride_out), whole, rtol=0, atol=1e-9
            )


@torch.no_grad()
def test_a_halo_one_position_short_is_seen() -> None:
    """The comparison above can fail: with less than was measured, tiles differ from the whole."""
    codec = network("tiny")
    halo = tiles.measure(codec.g_s.float(), 4, 1, STRIDE)
    codec.double()
    short = halo._replace(before=0, after=0)
    x = torch.rand(1, 4, 64, 5).double()
    assert not torch.allclose(tiled(codec.g_s, x, short, 1, STRIDE), codec.g_s(x), atol=1e-9)


def test_a_halo_can_be_counted_by_hand() -> None:
    chain = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, stride=2, padding=1),
        nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Conv2d(2, 2, 3, padding=1),
    )  # fmt: skip
    # What lies from an even row e on reaches e − 1, then half-size row e / 2 − 1, that is e − 2, then e − 3;
    # what lies before e reaches e, then half-size row e / 2, that is e + 1, then e + 2.
    assert tiles.measure(chain, 2, 1, 1)[:2] == (3, 3)


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (16, 700), (250, 375), (4096, 40), (97, 4096)]
)
def test_tiles_cover_every_position_once_within_memory(height: int, width: int) -> None:
    halo = tiles.Halo(9, 12, 1000)
    seen = torch.zeros(height, width, dtype=torch.int8)
    for rows, columns in tiles.tiles(height, width, halo, 12_000_000):
        seen[rows.keep, columns.keep] += 1
        for span, length in ((rows, height), (columns, width)):
            assert span.first == 0 or (
                span.first % tiles.ALIGNMENT == 0 and span.start - span.first >= halo.before
            )
            assert span.last == length or (
                span.last % tiles.ALIGNMENT == 0 and span.last - span.stop >= halo.after
            )
        assert (rows.last - rows.first) * (columns.last - columns.first) <= 12_000
    assert (seen == 1).all()
