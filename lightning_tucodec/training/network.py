"""Any network of CompressAI's form as a LightningModule: named in a recipe, nothing to write."""

import sys
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_tucodec.codecs.base import MODEL_SUFFIX
from lightning_tucodec.codecs.learned.model_file import ModelFile
from lightning_tucodec.codecs.network.build import (
    Rates,
    build,
    failure,
    packages_of,
    parts,
    stride_of,
    trusting,
)
from lightning_tucodec.codecs.network.codec import NetworkModel, freeze_network
from lightning_tucodec.errors import ConfigError, CorruptStreamError, ModelFileError, TucodecError
from lightning_tucodec.io.hashing import derive, hash_positions
from lightning_tucodec.nn.blocks import pad_to_multiple
from lightning_tucodec.nn.losses import RateDistortion, make_loss
from lightning_tucodec.training.coding import BeginFile, CodingModule
from lightning_tucodec.training.optimizers import FusedAdam
from lightning_tucodec.training.runs.weights import (
    initial_weights,
    load_checkpoint,
    load_trained,
    network_weights,
)

_LEVEL = 0x6C6576656C  # separates the levels of steps from other random bits

USED_BITS = 1.0
"""A channel of y is used by an image if one of its symbols costs so many bits."""


class NetworkOutput(NamedTuple):
    """What a network makes of N images.

    Attributes:
        x_hat: N×3×H×W, not clamped.
        likelihoods: by name, each with N as first dimension; `z` is the side information.
    """

    x_hat: Tensor
    likelihoods: dict[str, Tensor]

    def bits(self) -> tuple[Tensor, Tensor]:
        """Estimated bits of the latents and of the side information for every image, (N,), float32."""
        z = self.x_hat.new_zeros(len(self.x_hat), dtype=torch.float32)
        y = z
        for name, values in self.likelihoods.items():
            bits = -values.float().log2().flatten(1).sum(1)
            y, z = (y, z + bits) if name == "z" else (y + bits, z)
        return y, z


class NetworkModule(CodingModule):
    """Trains a network of CompressAI's form (`codecs.network.build`) for rate and distortion.

    Two optimisers, both Adam, as in CompressAI's example: the main one, and an auxiliary one for the
    parameters named `quantiles`, which a network's `aux_loss` trains.

    A variable-rate network (`codecs.network.build.Rates`) trains one of its levels in each step, drawn from
    the seed and the number of the step, with the λ that the network lists for it.

    The networks draw their noise from PyTorch's generator: it is saved with a run, and differs between ranks.

    Args:
        network: class_path and init_args, of a class that Python finds.
        recipe: see `nn.losses.make_loss`; CompressAI's are "compressai-mse" and "compressai-ms-ssim".
        lmbda: λ in that recipe's convention; None for a variable-rate network, which has its own.
        lr: learning rate on the plateau.
        aux_lr: constant learning rate of the auxiliary optimiser.
        final_lr, warmup_steps, decay_start, clip_norm: see `ScheduledModule`.
        seed: of the levels of a variable-rate network.
        real_files: number of validation images, from the first, that are coded to real files; None: all.
        quality: level of a variable-rate network that validation measures; None: the middle one.
        channels_last: layout of weights and images; whether it is faster depends on the network.
        compile: see `training.vae.CodecModule`; for networks of one rate.
    """

    def __init__(
        self,
        network: dict[str, Any],
        recipe: str = "compressai-mse",
        lmbda: float | None = None,
        lr: float = 1e-4,
        aux_lr: float = 1e-3,
        final_lr: float = 1e-6,
        warmup_steps: int = 0,
        decay_start: float = 0.5,
        clip_norm: float = 1.0,
        seed: int = 0,
        real_files: int | None = None,
        quality: float | None = None,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        # An argument on the command line comes beside them: --model.init_args.network.init_args.N 32.
        more = {k: v for k, v in network.items() if k not in ("class_path", "init_args")}
        if more:
            arguments = {**(network.get("init_args") or {}), **more}
            network = {"class_path": network.get("class_path"), "init_args": arguments}
        built = build(network)
        rates = Rates.of(built)
        if rates is None and (lmbda is None or quality is not None):
            what = "lmbda is missing" if lmbda is None else "quality: the network has one rate"
            raise ConfigError(f"model.{what}")
        if rates is not None and lmbda is not None:
            raise ConfigError(
                "model.lmbda: this network has its own λ for each level; leave it out"
            )
        if rates is not None and compile:
            raise ConfigError(
                "model.compile: a variable-rate network has a graph for each level; leave it out"
            )
        first = rates.lmbdas[-1] if rates is not None else float(lmbda or 0)
        super().__init__(
            recipe, first, lr, final_lr, warmup_steps, decay_start, clip_norm, seed, real_files
        )
        self.automatic_optimization = False
        class_path, arguments = parts(network)
        self.description = {"class_path": class_path, "init_args": arguments}
        _spare_reads(built)
        self.network = built
        self.stride = stride_of(built)
        self.aux_lr = aux_lr
        self.rates = rates
        self.level_losses = (
            [] if rates is None else [make_loss(recipe, value) for value in rates.lmbdas]
        )
        self.quality = quality
        if rates is not None:
            self.quality = rates.rounded((rates.levels - 1) // 2 if quality is None else quality)
            self.loss = self.level_losses[round(self.quality)]
        self.main = [p for n, p in self._trained() if not n.endswith("quantiles")]
        self.auxiliary = [p for n, p in self._trained() if n.endswith("quantiles")]
        if not self.main:
            raise ConfigError(f"{class_path} has no parameters to train")
        self.optimizers_a_step = 2 if self.auxiliary else 1
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(memory_format=self.layout)
        self.used_channels: Tensor | None = None
        self.terms = self.whole(self._terms, compile)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in sorted(self.network.named_parameters()) if p.requires_grad]

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The main optimiser, then that of the quantiles."""
        groups = [(self.main, self.lr), (self.auxiliary, self.aux_lr)]
        return [FusedAdam(some, lr=lr) for some, lr in groups if some]

    def on_fit_start(self) -> None:
        """Check the crops; ranks draw different noise."""
        super().on_fit_start()
        if self.is_fresh and self.global_rank:
            torch.manual_seed(derive(torch.initial_seed(), self.global_rank) >> 1)

    def level(self, step: int) -> int:
        """The level of a variable-rate network that the step after `step` steps trains."""
        assert self.rates is not None
        bits = hash_positions(derive(self.seed & (2**64 - 1), _LEVEL), np.array([step]))
        return int(bits[0] % np.uint64(self.rates.levels))

    def forward(self, x: Tensor, **options: Any) -> NetworkOutput:
        """Code images with the network that is trained; see `code`."""
        return self.code(self.network, x, **options)

    def code(self, network: nn.Module, x: Tensor, **options: Any) -> NetworkOutput:
        """Code images N×3×H×W in [0, 1] of any size with the network or a copy of it.

        Args:
            network: codes them.
            x: the images.
            options: more arguments of the network.

        Raises:
            ConfigError: the network fails, or does not answer in CompressAI's form.
        """
        height, width = x.shape[-2:]
        padded = pad_to_multiple(x, self.stride).contiguous(memory_format=self.layout)
        try:
            output = network(padded, **options)
        except TucodecError:
            raise
        except Exception as error:
            sizes = "×".join(map(str, padded.shape))
            raise ConfigError(
                f"{type(network).__name__}.forward fails on {sizes}: {failure(error, network)}"
            ) from error
        try:
            if not isinstance(output, Mapping):
                raise TypeError(f"it returns a {type(output).__name__}")
            x_hat, likelihoods = output["x_hat"], dict(output["likelihoods"])
            if not likelihoods:
                raise ValueError("there are no likelihoods")
            if x_hat.shape[:2] != x.shape[:2]:
                raise ValueError(f"x_hat has shape {tuple(x_hat.shape)}")
            for key, values in likelihoods.items():
                if not isinstance(values, Tensor) or len(values) != len(x):
                    raise ValueError(f"likelihoods[{key!r}] is no tensor of {len(x)} images")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            name = type(network).__name__
            raise ConfigError(
                f"{name}.forward does not return x_hat and likelihoods as CompressAI's networks do ({error})"
            ) from None
        return NetworkOutput(x_hat[..., :height, :width], likelihoods)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One step of both optimisers on a batch of crops.

        Raises:
            ConfigError: the network fails, or is no compiled graph where one is asked for.
            NonFiniteLossError: before the step.
        """
        x = batch["image"]
        level = None if self.rates is None else self.level(self.opt_step)
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        with self.without_reduction():
            terms, auxiliary = self.terms(x, level)
            # In one backward pass: no parameter has a gradient of both.
            self.manual_backward(terms.loss if auxiliary is None else terms.loss + auxiliary)
        self.average_gradients([*self.main, *self.auxiliary])
        self.clip_and_log(*self.trainer.optimizers)
        for optimizer in optimizers:
            optimizer.step()
        self.images_seen += len(x) * self.trainer.world_size
        self.log_terms(terms)
        self.count_step()

    def _terms(self, x: Tensor, level: int | None) -> tuple[RateDistortion, Tensor | None]:
        options, loss = {}, self.loss
        if level is not None:
            options, loss = {"s": level}, self.level_losses[level]
        return loss(self(x, **options), x), self.auxiliary_loss()

    def auxiliary_loss(self) -> Tensor | None:
        """The auxiliary loss of the quantiles; None where the network has no quantiles or no such loss.

        Raises:
            ConfigError: the network's method fails, or returns no scalar.
        """
        if not self.auxiliary:
            return None
        name = type(self.network).__name__
        try:
            loss = self.network.aux_loss()  # type: ignore[operator]
        except Exception as error:
            raise ConfigError(f"{name}.aux_loss fails: {failure(error, self.network)}") from error
        if isinstance(loss, Tensor) and loss.numel() == 1:
            return loss
        if isinstance(loss, int | float):  # a sum over nothing
            return None
        raise ConfigError(f"{name}.aux_loss returns no scalar")

    def on_validation_epoch_start(self) -> None:
        """Count the used channels anew."""
        super().on_validation_epoch_start()
        self.used_channels = None

    @property
    def shown(self) -> nn.Module:
        """The network that validation measures."""
        return self.network

    def run(self, x: Tensor) -> NetworkOutput:
        """See `CodingModule.run`; a variable-rate network at `quality`."""
        options = {} if self.rates is None else self.rates.arguments(self.quality or 0.0)
        return self.code(self.shown, x, **options)

    def coder(self) -> BeginFile:
        """See `CodingModule.coder`; the network's own `compress` does all on the device and at once."""
        file = freeze_network(self.shown, self.description, "validation", {})
        with trusting(packages_of(self.description)):  # they have been imported already
            model = NetworkModel(file, str(self.device), self.quality)
            small = torch.zeros(1, 3, self.stride, self.stride, device=self.device)
            try:
                model.decode(model.write(small))
            except CorruptStreamError as error:
                name = type(self.network).__name__
                raise ModelFileError(f"{name} does not decode what it codes: {error}") from None

        def begin(output: Any, x: Tensor) -> Callable[[], bytes]:
            data = model.write(x)
            return lambda: data

        return begin

    def watch(self, output: Any) -> dict[str, float]:
        """Counts the channels of y that carry bits."""
        values = output.likelihoods.get("y")
        if values is not None and values.ndim == 4:
            least = values.amin((0, 2, 3)).cpu()
            used = least <= 2**-USED_BITS
            self.used_channels = used if self.used_channels is None else self.used_channels | used
        return {}

    def means(self, rows: list[dict[str, float]]) -> dict[str, float]:
        """Means over the images, and how many channels of y were used."""
        means = super().means(rows)
        if self.used_channels is not None:
            used = self.sum_of_ranks(self.used_channels.to(torch.int64))
            means["channels_used"] = float((used > 0).sum())
            means["channels_dead"] = float((used == 0).sum())
        return means

    def describe(self) -> dict[str, Any]:
        """What is needed to rebuild the network, and what it was trained for."""
        card = {"recipe": self.recipe, "convention": self.loss.convention}
        if self.rates is None:
            card["lmbda"] = self.loss.lmbda  # type: ignore[assignment]
        return {"network": self.description, **card}

    def warm_start(self, source: str) -> None:
        """Start with the weights of a checkpoint or of an exported model of the same network.

        Raises:
            ConfigError: it is damaged or of another network.
            ModelFileError: the same of an exported model.
        """
        path = initial_weights(source)
        if path.suffix == MODEL_SUFFIX:
            tensors = ModelFile.load(path).tensors
            weights = {k.removeprefix("network."): v for k, v in tensors.items()}
        else:
            weights = network_weights(load_checkpoint(path))
        load_trained(self.network, weights, path)


def _spare_reads(network: nn.Module) -> None:
    """Let CompressAI's factorised priors compute what they do, and read nothing from the device for it.

    Their own forward pass holds a permutation on the device and reads its numbers three times, twelve waits
    for a GPU; it is no compiled graph for the same reason.
    """
    module = sys.modules.get("compressai.entropy_models.entropy_models")
    theirs = None if module is None else module.EntropyBottleneck.forward
    for part in network.modules():
        if type(part).forward is theirs:
            part.forward = MethodType(_likelihoods, part)


def _likelihoods(bottleneck: Any, x: Tensor, training: bool | None = None) -> tuple[Tensor, Tensor]:
    """`EntropyBottleneck.forward` of CompressAI 1.2.8, to the bit."""
    training = bottleneck.training if training is None else training
    values = x.transpose(0, 1).contiguous()
    shape = values.shape
    mode = "noise" if training else "dequantize"
    outputs = bottleneck.quantize(
        values.reshape(len(values), 1, -1), mode, bottleneck._get_medians()
    )
    likelihood, _, _ = bottleneck._likelihood(outputs)
    if bottleneck.use_likelihood_bound:
        likelihood = bottleneck.likelihood_lower_bound(likelihood)
    x_hat, likelihood = (
        tensor.reshape(shape).transpose(0, 1).contiguous() for tensor in (outputs, likelihood)
    )
    return x_hat, likelihood
