"""The rules of the adversarial game, and what they know of a batch: small objects without networks.

All are updated with numbers that were averaged over the ranks, so that every rank holds the same; `state`
and `load` carry them through checkpoints as plain types.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

_LARGEST = 2.77  # logarithm of 16


BATCH = (
    "accuracy", "bpp", "bpp_z", "bpp_before", "mse", "loss", "discriminator", "adversarial", "pull",
    "push", "red", "green", "blue",
)  # fmt: skip
"""What is averaged over a batch and over the ranks."""


class Turn(NamedTuple):
    """The sides that are trained on a batch."""

    discriminator: bool
    codec: bool


class Observed(NamedTuple):
    """The measured values of a batch, while they are copied to the host.

    Attributes:
        turn: who was trained.
        rated: the frozen codec's rate was measured too.
        values: as named by `BATCH`, on the host when `arrived` is over.
        arrived: a CUDA event; None where nothing is to be waited for.
    """

    turn: Turn
    rated: bool
    values: Tensor
    arrived: torch.cuda.Event | None = None

    @classmethod
    def of(cls, turn: Turn, rated: bool, values: Tensor) -> "Observed":
        """Start to copy a batch's means to the host."""
        if values.device.type != "cuda":
            return cls(turn, rated, values.cpu())
        values = values.to("cpu", non_blocking=True)  # into pinned memory
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(turn, rated, values, arrived)

    def means(self) -> dict[str, float]:
        """The values by name; waits for the copy."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(BATCH, self.values.tolist(), strict=True))


class _Plain:
    """State of a dataclass as plain types."""

    def state(self) -> dict[str, Any]:
        """Every field."""
        return dict(vars(self))

    def load(self, state: dict[str, Any]) -> Self:
        """Take over fields; those that `state` lacks stay."""
        for name, value in state.items():
            setattr(self, name, value)
        return self


@dataclass
class Gate(_Plain):
    """Rippel and Bourdev's gate on the discriminator's running accuracy a (ICML 2017, section 4.2).

    a < lower: the discriminator alone; lower ≤ a < upper: both; a ≥ upper: the codec alone.

    Attributes:
        lower, upper: the two thresholds; (0, 2) always trains both.
        momentum: share of the old accuracy that a batch keeps.
        accuracy: running, starts at chance.
        streak: batches since both were last trained.
    """

    lower: float = 0.8
    upper: float = 0.95
    momentum: float = 0.95
    accuracy: float = 0.5
    streak: int = 0

    @property
    def turn(self) -> Turn:
        """Who is to be trained on the next batch."""
        return Turn(self.accuracy < self.upper, self.accuracy >= self.lower)

    def update(self, accuracy: float) -> None:
        """Take note of the accuracy on a batch."""
        self.streak = 0 if self.turn == (True, True) else self.streak + 1
        self.accuracy = self.momentum * self.accuracy + (1 - self.momentum) * accuracy


@dataclass
class RateController(_Plain):
    """Holds bpp at a target with a factor on the rate's weight.

    A PI controller, in the factor's logarithm, on the relative error of the running rate. Crops differ in
    their rate by far more than the tolerance of 3 %, so every observation comes with the rate
    of a frozen codec on the same crops: only the ratio of the two is averaged.

    Attributes:
        target: bpp; None: the frozen codec's.
        every: steps of the codec between two observations.
        horizon: observations that the running ratio looks back.
        gain: on the error.
        speed: share of the error that is integrated at an observation.
        ratio: running bpp over that of the frozen codec.
        reference: mean bpp of the frozen codec over all observations.
        observations: so far.
        integral: what was integrated.
    """

    target: float | None = None
    every: int = 4
    horizon: int = 12
    gain: float = 5.0
    speed: float = 0.1
    ratio: float = 1.0
    reference: float = 0.0
    observations: int = 0
    integral: float = 0.0

    @property
    def wanted(self) -> float:
        """The target in bpp; 0 before the first observation."""
        return self.reference if self.target is None else self.target

    @property
    def error(self) -> float:
        """Running rate over target, less one; 0 before the first observation."""
        return self.ratio * self.reference / self.wanted - 1 if self.reference else 0.0

    @property
    def factor(self) -> float:
        """What the rate's weight is multiplied with, within 1/16 … 16."""
        exponent = self.gain * self._bounded + self.integral
        return math.exp(max(-_LARGEST, min(_LARGEST, exponent)))

    @property
    def _bounded(self) -> float:
        return max(-0.5, min(0.5, self.error))

    def due(self, step: int) -> bool:
        """Whether the codec's step that follows `step` steps is to be observed."""
        return step % self.every == 0

    def update(self, bpp: float, reference: float) -> None:
        """A step of the codec had this rate, and the frozen codec that one on the same crops."""
        self.observations += 1
        self.reference += (reference - self.reference) / self.observations
        weight = 1 / min(self.observations, self.horizon)
        self.ratio += weight * (bpp / reference - self.ratio)
        self.integral += self.speed * self._bounded
        self.integral = max(-_LARGEST, min(_LARGEST, self.integral))


@dataclass
class Alarms(_Plain):
    """Reports a problem once when it begins, and again only after it was solved.

    Attributes:
        patience: batches without both sides trained before the discriminator counts as collapsed, or
            as beyond the codec's reach.
        colour_limit: largest running mean of x̂ − x in a colour, on [0, 1].
        momentum: of the colours' running means.
        colour: running mean of x̂ − x in red, green and blue.
        raised: names of the alarms that are on.
    """

    patience: int = 500
    colour_limit: float = 1.5 / 255
    momentum: float = 0.98
    colour: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    raised: list[str] = field(default_factory=list)

    def update(self, gate: Gate, colour: list[float]) -> list[str]:
        """Look at a batch.

        Args:
            gate: after its own update.
            colour: the batch's mean of x̂ − x in each colour.

        Returns:
            A line for each alarm that has just begun.
        """
        self.colour = [
            self.momentum * old + (1 - self.momentum) * new
            for old, new in zip(self.colour, colour, strict=True)
        ]
        stuck = gate.streak >= self.patience
        low = gate.accuracy < gate.lower
        worst = max(self.colour, key=abs)
        found = {
            "collapsed": (
                stuck and low,
                f"the discriminator is trained alone for {gate.streak} batches and right in only "
                f"{gate.accuracy:.2f} of the cases",
            ),
            "unbeatable": (
                stuck and not low,
                f"the codec is trained alone for {gate.streak} batches and the discriminator still "
                f"right in {gate.accuracy:.2f} of the cases",
            ),
            "colour": (
                abs(worst) > self.colour_limit,
                "colours drift: reconstructions differ from their originals by "
                + ", ".join(f"{255 * c:+.1f}" for c in self.colour)
                + " of 255 in red, green, blue on average",
            ),
        }
        begun = [text for name, (on, text) in found.items() if on and name not in self.raised]
        self.raised = [name for name, (on, _) in found.items() if on]
        return begun
