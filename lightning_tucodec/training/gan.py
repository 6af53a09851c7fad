"""The GAN recipe: a TucodecVAE, or a network of CompressAI's form, fine-tuned against a discriminator."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.nn.codec import CodecOutput
from lightning_tucodec.nn.noise import Noise
from lightning_tucodec.training.adversarial import AdversarialModule, Coded
from lightning_tucodec.training.network import NetworkModule, NetworkOutput
from lightning_tucodec.training.vae import CodecModule


class GANCodec(AdversarialModule, CodecModule):
    """Trains a TucodecVAE; see `AdversarialModule` for the game, `CodecModule` for the codec.

    Raises:
        ConfigError: a variable-rate network, whose rate there is no one target for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.network.levels is not None:
            raise ConfigError("model: the adversarial stage needs a network of one rate")

    def coded(self, x: Tensor, index: Tensor) -> Coded:
        """See `AdversarialModule.coded`."""
        output = self.code(x, Noise.of(self.seed, index))
        return Coded(output, output.y)

    @torch.no_grad()
    def rate_before(self, x: Tensor, index: Tensor) -> Tensor:
        """See `AdversarialModule.rate_before`; with the same noise."""
        noise = Noise.of(self.seed, index)
        _, *likelihoods = self.before.rate(self.before.g_a(self.before.pad(x)), noise)
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        return torch.stack([-part.float().log2().sum() for part in likelihoods]).sum() / pixels

    def reconstructed(self, network: nn.Module, x: Tensor) -> CodecOutput:
        """See `AdversarialModule.reconstructed`."""
        output: CodecOutput = network(x)
        return output

    def latent_channels(self) -> int:
        """See `AdversarialModule.latent_channels`."""
        return self.network.config.transform.latent_channels


class GANNetwork(AdversarialModule, NetworkModule):
    """Trains a network of CompressAI's form; see `AdversarialModule` and `NetworkModule`.

    The discriminator "patch" sees what the network's part `g_s` gets. The noise of the frozen copy, whose
    rate the controller holds, is drawn anew.

    Raises:
        ConfigError: a variable-rate network, whose rate there is no one target for; or `compile`, as the game
            looks into the network between its layers.
    """

    def __init__(self, *args: Any, compile: bool = False, **kwargs: Any) -> None:
        if compile:
            raise ConfigError("model.compile: not for the game of such a network; leave it out")
        super().__init__(*args, **kwargs)

    def coded(self, x: Tensor, index: Tensor) -> Coded:
        """See `AdversarialModule.coded`."""
        seen: list[Tensor] = []
        if not self.is_conditional:
            return Coded(self(x), None)
        hook = self.network.g_s.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            return Coded(self(x), seen[-1])
        finally:
            hook.remove()

    @torch.no_grad()
    def rate_before(self, x: Tensor, index: Tensor) -> Tensor:
        """See `AdversarialModule.rate_before`."""
        terms = self.loss(self.reconstructed(self.before, x), x)
        return terms.bpp_y + terms.bpp_z

    def reconstructed(self, network: nn.Module, x: Tensor) -> NetworkOutput:
        """See `AdversarialModule.reconstructed`."""
        return self.code(network, x)

    def latent_channels(self) -> int:
        """See `AdversarialModule.latent_channels`; by a small image."""
        if self.rates is not None:
            raise ConfigError("model: the adversarial stage needs a network of one rate")
        if not self.is_conditional:
            return 0
        if not isinstance(getattr(self.network, "g_s", None), nn.Module):
            raise ConfigError(
                f"model.discriminator: patch is conditional on what g_s gets, and "
                f"{type(self.network).__name__} has no g_s; choose pair"
            )
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            coded = self.coded(torch.zeros(1, 3, self.stride, self.stride), torch.arange(1))
        assert coded.latent is not None
        return coded.latent.shape[1]
