"""GANNetwork: the adversarial game of networks that are not this package's own."""

import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.models import CompressionModel
from test_gan import Kill, Killed, data, final, trainer

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.training.gan import GANNetwork
from tests.training.test_fit import same

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")

NETWORK = {"class_path": "compressai.models.MeanScaleHyperprior", "init_args": {"N": 8, "M": 12}}
KINDS = {"pair": "pair", "patch": "hinge"}


def module(kind: str = "pair", network: dict[str, Any] = NETWORK, **options: Any) -> GANNetwork:
    """A game whose gate visits all three states; always with the same weights."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "network": network, "recipe": "compressai-mse", "lmbda": 0.01, "lr": 1e-3, "discriminator": kind,
        "adversarial": KINDS[kind], "discriminator_widths": [8, 8], "discriminator_lr": 3e-3,
        "gate_lower": 0.55, "gate_upper": 0.6, "ema": 0.9,
    }  # fmt: skip
    game = GANNetwork(**{**settings, **options})
    game.gate.momentum = 0.8
    return game


class Random(pl.Callback):
    """PyTorch's generator in the checkpoint, as `fit` keeps it."""

    saved: torch.Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"state": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved = state["state"]

    def on_train_start(self, *args: Any) -> None:
        if self.saved is not None:
            torch.set_rng_state(self.saved)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_game_ends_like_the_straight_one(
    tmp_path: Path, shard_folder: Path, kind: str
) -> None:
    straight, runner = module(kind), trainer(tmp_path / "straight", 12, Random())
    before = {name: value.clone() for name, value in straight.state_dict().items()}
    runner.fit(straight, data(shard_folder))
    expected = final(runner, tmp_path / "straight.ckpt")
    assert len(runner.optimizers) == 3
    assert straight.opt_step == runner.global_step == 12
    assert straight.discriminator_steps > 0
    for name in ("network.g_a.0.weight", "network.entropy_bottleneck.quantiles",
                 "discriminator.", "averaged.g_a.0.weight"):  # fmt: skip
        moved = [k for k, v in straight.state_dict().items() if k.startswith(name)
                 and not torch.equal(v, before[k])]  # fmt: skip
        assert moved, name
    assert same([v for k, v in before.items() if k.startswith("before.")],
                [v for k, v in straight.state_dict().items() if k.startswith("before.")])  # fmt: skip

    path = tmp_path / "killed.ckpt"
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", 12, Random(), Kill(6, path)).fit(
            module(kind), data(shard_folder)
        )
    resumed, runner = module(kind), trainer(tmp_path / "resumed", 12, Random())
    runner.fit(resumed, data(shard_folder), ckpt_path=str(path), weights_only=True)
    assert same(final(runner, tmp_path / "resumed.ckpt"), expected)


def test_pieces_of_a_batch_train_the_quantiles_once(tmp_path: Path, shard_folder: Path) -> None:
    """Their loss does not depend on the images."""
    ends = []
    for pieces in (1, 2):
        game = module(gate_lower=0.0, gate_upper=2.0, pieces=pieces)
        trainer(tmp_path / str(pieces), 2).fit(game, data(shard_folder))
        ends.append(game.network.entropy_bottleneck.quantiles)
    torch.testing.assert_close(*ends)


class Headless(CompressionModel):
    """Without hyperprior, and its synthesis has another name."""

    def __init__(self) -> None:
        super().__init__()
        self.down = torch.nn.Conv2d(3, 8, 8, 8)
        self.up = torch.nn.ConvTranspose2d(8, 3, 8, 8)
        self.entropy_bottleneck = EntropyBottleneck(8)

    def forward(self, x: torch.Tensor) -> Any:
        y_hat, likelihoods = self.entropy_bottleneck(self.down(x))
        return {"x_hat": self.up(y_hat), "likelihoods": {"y": likelihoods}}

    def compress(self, x: torch.Tensor) -> Any:
        y = self.down(x)
        return {"strings": [self.entropy_bottleneck.compress(y)], "shape": y.shape[-2:]}

    def decompress(self, strings: Any, shape: Any) -> Any:
        return {"x_hat": self.up(self.entropy_bottleneck.decompress(strings[0], shape))}


def test_any_network_plays_and_what_cannot_is_told(tmp_path: Path, shard_folder: Path) -> None:
    sys.modules.setdefault("tests.training.test_gan_network", sys.modules[__name__])
    own = {"class_path": "tests.training.test_gan_network.Headless", "init_args": {}}
    game = module("pair", own, gate_lower=0.0, gate_upper=2.0)
    trainer(tmp_path, 2).fit(game, data(shard_folder))
    assert game.opt_step == 2
    with pytest.raises(
        ConfigError, match="patch is conditional on what g_s gets, and Headless has no g_s"
    ):
        module("patch", own)
    variable = {
        "class_path": "compressai.models.ScaleHyperpriorVbr",
        "init_args": NETWORK["init_args"],
    }
    with pytest.raises(ConfigError, match="needs a network of one rate"):
        module("pair", variable, lmbda=None)
    with pytest.raises(ConfigError, match=r"model\.compile: not for the game of such a network"):
        module(compile=True)
