"""The adversarial game: a codec of any kind fine-tuned against a discriminator; `gan` has its codecs."""

import copy
import math
import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd import grad

from lightning_tucodec.errors import ConfigError, TucodecError
from lightning_tucodec.io.images import write_png
from lightning_tucodec.nn.discriminator import DiscriminatorKind, make_discriminator
from lightning_tucodec.nn.losses import AdversarialKind, Reconstruction, make_adversarial_loss
from lightning_tucodec.nn.noise import ORDER, Noise
from lightning_tucodec.quality.metrics import as_tensor
from lightning_tucodec.training.coding import CodingModule, eight_bits
from lightning_tucodec.training.game import BATCH, Alarms, Gate, Observed, RateController, Turn
from lightning_tucodec.training.module import NonFiniteLossError
from lightning_tucodec.training.optimizers import FusedAdam, follow


class GameError(TucodecError):
    """The training cannot continue: the discriminator does not learn, so the codec is never trained."""


class Coded(NamedTuple):
    """What a codec in training makes of N crops.

    Attributes:
        output: a named tuple with `x_hat`.
        latent: N×M×h×w, which a conditional discriminator sees; None for one that does not ask.
    """

    output: Any
    latent: Tensor | None


class AdversarialModule(CodingModule):
    """Trains a codec for rate, distortion and an adversarial loss.

    A codec's own module, derived from this class and then from that of its plain training, says how crops are
    coded (`coded`, `rate_before`, `reconstructed`, `latent_channels`).

    Both sides learn from the same batch at the same time (Rippel and Bourdev); the gate decides which
    side is trained. `opt_step`, which schedules, checkpoints and logs count, is the number of optimiser steps
    of the codec, and so is Lightning's `global_step`. Batches that train only the discriminator do not
    count.

    The gradient at x̂ is the sum of the distortion's and the adversary's gradient. The adversary's has a
    fixed weight or is scaled to a share of the distortion's norm. A controller adjusts the rate's weight to
    keep bpp constant: a frozen copy of the codec from before this stage gives the target rate of the same
    crops.

    Gate, controller and alarms are rules of the host. They know of a batch when the one after it has been
    enqueued: so a GPU computes a batch while the numbers of the one before come over, and never waits.

    Gradients are averaged over ranks by one all-reduce per side, since DDP's own reduction supports only one
    backward pass per batch.

    Args:
        recipe: rate and distortion, see `nn.losses.make_loss`; the codec's module takes all other arguments.
        lmbda: λ of that recipe.
        discriminator: "pair" (Rippel and Bourdev) or "patch" (HiFiC, conditional).
        discriminator_widths: its channels, finest level first; None: as published or usual.
        discriminator_lr: its constant learning rate (Adam).
        adversarial: "pair", "non_saturating" or "hinge".
        adversarial_share: norm of the adversarial gradient at x̂ over that of the distortion's.
        adversarial_weight: a fixed weight of the adversarial loss instead.
        gate_lower, gate_upper: see Gate; (0, 2) always trains both.
        target_bpp: None: the rate before the game.
        pieces: number of pieces in which a batch is processed, to save memory.
        ema: share of the old average of weights that a step keeps; 0: no average. Validation and export
            use the average.
        patience: batches until a gate that does not open raises the alarm; after ten times as many
            the run ends.
    """

    network: Any
    before: Any
    averaged: Any

    def __init__(
        self,
        recipe: str = "ssim",
        lmbda: float = 0.4,
        discriminator: DiscriminatorKind = "pair",
        discriminator_widths: list[int] | None = None,
        discriminator_lr: float = 1e-4,
        adversarial: AdversarialKind = "pair",
        adversarial_share: float = 0.2,
        adversarial_weight: float | None = None,
        gate_lower: float = 0.8,
        gate_upper: float = 0.95,
        target_bpp: float | None = None,
        pieces: int = 1,
        ema: float = 0.0,
        patience: int = 500,
        **kwargs: Any,
    ) -> None:
        super().__init__(recipe=recipe, lmbda=lmbda, **kwargs)
        self.automatic_optimization = False
        self.optimizers_a_step = 1  # others step past Lightning's count
        if not gate_lower < gate_upper:
            raise ConfigError(f"gate_lower {gate_lower} must lie below gate_upper {gate_upper}")
        if pieces < 1 or patience < 1 or not 0 <= ema < 1:
            raise ConfigError("pieces and patience start at 1; ema lies in [0, 1)")
        if target_bpp is not None and not target_bpp > 0:
            raise ConfigError(f"target_bpp must be positive, got {target_bpp}")
        self.is_conditional = discriminator == "patch"
        latent = self.latent_channels()
        try:
            self.discriminator = make_discriminator(discriminator, latent, discriminator_widths)
        except ValueError as error:
            raise ConfigError(f"discriminator: {error}") from None
        self.discriminator.to(memory_format=torch.channels_last)
        self.discriminator_lr = discriminator_lr
        self.adversary = make_adversarial_loss(adversarial)
        self.share, self.weight = adversarial_share, adversarial_weight
        self.gate = Gate(gate_lower, gate_upper)
        self.rate = RateController(target_bpp)
        self.alarms = Alarms(patience)
        self.pieces = pieces
        self.ema = ema
        self.before = copy.deepcopy(self.network).requires_grad_(False)
        self.averaged = copy.deepcopy(self.before) if ema else None
        self.discriminator_steps = 0
        self.observed: list[Observed] = []
        self.row: dict[str, float] = {}

    # --- What a codec of its own kind says ---------------------------------------------------------

    def coded(self, x: Tensor, index: Tensor) -> Coded:
        """Code crops N×3×H×W in [0, 1] at the global positions `index`, (N,), with the training's noise."""
        raise NotImplementedError

    def rate_before(self, x: Tensor, index: Tensor) -> Tensor:
        """bpp that the codec before the game needs for these crops, by the same proxy; a scalar."""
        raise NotImplementedError

    def reconstructed(self, network: nn.Module, x: Tensor) -> Reconstruction:
        """What a copy of the codec makes of one image, as validation does."""
        raise NotImplementedError

    def latent_channels(self) -> int:
        """M of `Coded.latent`; 0 where the game is not conditional.

        Raises:
            ConfigError: this codec cannot play.
        """
        raise NotImplementedError

    # --- The game ------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Those of the codec, the main one first, then the discriminator's."""
        parameters = self.discriminator.parameters()
        own = FusedAdam(parameters, lr=self.discriminator_lr, betas=(0.5, 0.99))
        codec = super().configure_optimizers()
        return [*codec, own] if isinstance(codec, list) else [codec, own]

    @property
    def shown(self) -> Any:
        """The averaged network where there is one."""
        return self.network if self.averaged is None else self.averaged

    def on_fit_start(self) -> None:
        """Frozen copy and average start with the network's initial weights."""
        super().on_fit_start()
        if self.is_fresh:
            for copied in (self.before, self.averaged):
                if copied is not None:
                    copied.load_state_dict(self.network.state_dict())

    def keep_picture(
        self, number: int, original: NDArray[np.uint8], shown: NDArray[np.uint8]
    ) -> None:
        """Original, reconstruction before this stage and now, side by side."""
        x = as_tensor(original, self.device) / 255
        before = eight_bits(self.reconstructed(self.before, x).x_hat.clamp(0, 1))
        panels = np.concatenate([original, before, shown], axis=1)
        write_png(self.picture_path(str(number)), panels)

    def swapped(self, index: Tensor) -> Tensor:
        """In which pairs the reconstruction comes first, a function of (seed, position); (N,) bool."""
        return Noise.of(self.seed, index).uniform(index[:, None], ORDER)[:, 0] >= 0.5

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Train on one batch: gradients and steps of the sides that are trained, gate and controller.

        Raises:
            NonFiniteLossError: before the step.
            GameError: the gate has kept the codec from training for too long.
        """
        while len(self.observed) > 1:
            self._keep_rules(self.observed.pop(0))
        turn = self.gate.turn
        rated = turn.codec and self.rate.due(self.opt_step)
        images = batch["image"].contiguous(memory_format=torch.channels_last)
        self.discriminator.requires_grad_(turn.discriminator).train(turn.discriminator)
        self.zero_grad(set_to_none=True)
        batch_means = torch.zeros(len(BATCH), device=self.device)
        with self.without_reduction():
            places = batch["index"].chunk(self.pieces)
            for x, index in zip(images.chunk(self.pieces), places, strict=True):
                batch_means += self.play(x, index, turn, len(x) / len(images), rated)
        self.observed.append(Observed.of(turn, rated, self.mean_of_ranks(batch_means)))
        self.images_seen += len(images) * self.trainer.world_size
        self.norms: dict[str, Tensor] = {}
        logged = turn.codec and self.logging_is_due
        if turn.codec:
            self._step_codec(logged)
        if turn.discriminator:
            self._step_discriminator()
        self.row = {}
        if logged:
            means = self.observed[-1].means()
            self.row = self._row(means)
            bar = torch.tensor([means["bpp"], self.gate.accuracy])
            self.log_step({}, dict(zip(("bpp", "a"), bar, strict=True)))

    def play(
        self, x: Tensor, index: Tensor, turn: Turn, share: float, rated: bool = False
    ) -> Tensor:
        """Add to the gradients of whoever has a turn; the codec's never reach the discriminator.

        Args:
            x: N×3×H×W in [0, 1].
            index: global positions of the samples, (N,).
            turn: who is trained.
            share: of the piece in the batch.
            rated: measure the frozen codec's rate as well.

        Returns:
            `share` times the piece's means, named by `BATCH`.
        """
        with torch.set_grad_enabled(turn.codec):
            output, latent = self.coded(x, index)
        # The cut between the two sides: what they ask of x̂ comes together here, and nowhere else.
        x_hat = output.x_hat.detach().float().requires_grad_(turn.codec)
        terms = self.loss(output._replace(x_hat=x_hat), x)
        bpp = terms.bpp_y + terms.bpp_z
        with torch.set_grad_enabled(turn.codec or turn.discriminator):
            latent = None if latent is None else latent.detach()
            verdict = self.discriminator(x, x_hat, latent, self.swapped(index))
        own = self.adversary.discriminator(verdict)
        adversarial = self.adversary.codec(verdict)
        pull = push = torch.zeros((), device=x.device)
        if turn.codec:
            of_distortion, of_rate = self.loss.weights
            (pull,) = grad(of_distortion * terms.distortion, x_hat)
            (push,) = grad(adversarial, x_hat, retain_graph=turn.discriminator)
            # Not the colours' means: MS-SSIM hardly defends them, so they would go where the adversary likes.
            push = push - push.mean((2, 3), keepdim=True)
            weight = self.weight
            if weight is None:
                push = push * (self.share * pull.norm() / push.norm().clamp_min(1e-20))
            else:
                push = push * weight
            rate = of_rate * (self.rate.factor * bpp)
            # Its gradient at x̂ is pull + push, also under a precision that scales losses.
            total = rate + (output.x_hat.float() * (pull + push)).sum()
            if (auxiliary := self.auxiliary_loss()) is not None:
                total = total + auxiliary
            self.manual_backward(total * share)
        if turn.discriminator:
            self.manual_backward(own * share)
        colour = (x_hat.detach() - x).mean((0, 2, 3))
        means = [
            verdict.right().mean(), bpp, terms.bpp_z, self.rate_before(x, index) if rated else bpp,
            terms.mse, terms.loss, own, adversarial, pull.norm(), push.norm(), *colour,
        ]  # fmt: skip
        return share * torch.stack([value.detach().float() for value in means])

    def _step_codec(self, logged: bool) -> None:
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        self.average_gradients(list(self.network.parameters()))
        if logged:
            for name, part in self.network.named_children():
                grads = [p.grad for p in part.parameters() if p.grad is not None]
                if grads:
                    self.norms[name] = torch.nn.utils.get_total_norm(grads)
        optimizers[0].step()  # the one that Lightning counts
        for auxiliary in self.trainer.optimizers[1:-1]:
            self._step_uncounted(auxiliary)
        self.count_step()
        if self.averaged is not None:
            follow(self.averaged, self.network, self.ema, self.opt_step, self.found_inf)

    def _step_discriminator(self) -> None:
        self.average_gradients(list(self.discriminator.parameters()))
        self._step_uncounted(self.trainer.optimizers[-1])
        self.discriminator_steps += 1

    def _step_uncounted(self, optimizer: torch.optim.Optimizer) -> None:
        """Past Lightning's own wrapper, which would count the step."""
        self.trainer.strategy.optimizer_step(optimizer, closure=lambda: None, model=self)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip each side by itself."""
        main, *auxiliary, discriminator = self.trainer.optimizers
        if optimizer is main:
            self.norms["codec"] = self.clip(main, *auxiliary)
        elif optimizer is discriminator:
            self.norms["discriminator"] = self.clip(discriminator)

    def _keep_rules(self, observed: Observed) -> None:
        means = observed.means()
        if not all(map(math.isfinite, means.values())):
            self.check_finite()
            raise NonFiniteLossError(self.opt_step)
        self.gate.update(means["accuracy"])
        if observed.rated:
            self.rate.update(means["bpp"], means["bpp_before"])
        lines = self.alarms.update(self.gate, [means[c] for c in ("red", "green", "blue")])
        if self.trainer.is_global_zero:
            for line in lines:
                print(f"step {self.opt_step}: {line}", file=sys.stderr)
        gate = self.gate
        if gate.accuracy < gate.lower and gate.streak >= 10 * self.alarms.patience:
            raise GameError(
                f"step {self.opt_step}: the discriminator, trained alone for {gate.streak} batches, is "
                f"right in {gate.accuracy:.2f} of the cases and the codec waits for {gate.lower}: is "
                "this codec transparent already? Otherwise try wider levels or another learning rate"
            )

    def _row(self, means: dict[str, float]) -> dict[str, float]:
        """What is watched, by name."""
        row = {
            "train/loss": means["loss"],
            "train/bpp": means["bpp"],
            "train/bpp_z": means["bpp_z"],
            "train/psnr": -10 * float(np.log10(max(means["mse"], 1e-12))),
            "gan/accuracy": self.gate.accuracy,
            "gan/accuracy_of_batch": means["accuracy"],
            "gan/discriminator_trained": float("discriminator" in self.norms),
            "gan/discriminator_steps": self.discriminator_steps,
            "gan/discriminator_loss": means["discriminator"],
            "gan/adversarial_loss": means["adversarial"],
            "gan/gradient_distortion": means["pull"],
            "gan/gradient_adversarial": means["push"],
            "rate/target": self.rate.wanted,
            "rate/error": self.rate.error,
            "rate/factor": self.rate.factor,
        }
        norms = torch.stack(list(self.norms.values())).tolist()
        row |= {f"grad_norm/{part}": norm for part, norm in zip(self.norms, norms, strict=True)}
        colours = zip(("red", "green", "blue"), self.alarms.colour, strict=True)
        row |= {f"colour/{name}": value for name, value in colours}
        names = ("collapsed", "unbeatable", "colour")
        return row | {f"alarm/{name}": float(name in self.alarms.raised) for name in names}

    def on_train_batch_end(self, *args: Any) -> None:
        """Log every so many steps of the codec; Lightning would count batches."""
        if self.row:
            for logger in self.trainer.loggers:
                logger.log_metrics(self.row, step=self.opt_step)
        self.row = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also where the game stands."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["tucodec"]["game"] = {
            "gate": self.gate.state(),
            "rate": self.rate.state(),
            "alarms": self.alarms.state(),
            "discriminator_steps": self.discriminator_steps,
            "observed": [[list(o.turn), o.rated, list(o.means().values())] for o in self.observed],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also where the game stands."""
        super().on_load_checkpoint(checkpoint)
        game = checkpoint["tucodec"]["game"]
        self.gate.load(game["gate"])
        self.rate.load(game["rate"])
        self.alarms.load(game["alarms"])
        self.discriminator_steps = game["discriminator_steps"]
        self.observed = [
            Observed(Turn(*turn), rated, torch.tensor(values))
            for turn, rated, values in game.get("observed", [])
        ]
