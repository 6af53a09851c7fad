"""Optimisation at the encoder: for one image, better symbols than those of g_a and rounding.

A decoder accepts any symbols, so an encoder is free to choose them. This one minimises the model's
training loss J, a weighted sum of D and R, for this image. (Campos et al.,
"Content Adaptive Optimization for Neural Image Compression", CVPRW 2019, and Yang et al., "Improving
Inference for Neural Image Compression", NeurIPS 2020, do so by hundreds or thousands of gradient steps on
a relaxation of the quantiser; here every step moves between real symbols, and a dozen steps achieve most
of the gain.)

One backward pass at the present symbols gives g = ∂J/∂ŷ and ∂J/∂ẑ with each symbol's own
probability held fixed. Moving a symbol by δ to a neighbouring centre then changes J by about

    ΔJ ≈ own change of bits (exact) + g·δ + κ·h·δ²,

h the curvature of J along a symbol of this channel (Hutchinson's estimate: the gradient at a point that
differs by random signs). Moves are made together if they are predicted to lower J, by at least a share of
the best predicted move in their neighbourhood. The step is kept if J has fallen. Neighbours that move
together disturb each other. So κ grows for symbols in a step that gained less than predicted, as in
Levenberg and Marquardt's method, and then decreases slowly.
"""

import itertools
import time
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lightning_tucodec.codecs.learned.latents import Latents, strip_bounds
from lightning_tucodec.codecs.learned.transforms import Transforms
from lightning_tucodec.codecs.options import Options
from lightning_tucodec.coding.wavefront import Z_LIMIT
from lightning_tucodec.nn.hyperprior import LaplaceParameters
from lightning_tucodec.nn.losses import RateDistortionLoss
from lightning_tucodec.nn.tiles import ALIGNMENT
from lightning_tucodec.nn.transforms import STRIDE
from lightning_tucodec.quality.metrics import as_tensor

EFFORT_STEPS = (0, 2, 4, 6, 10, 16, 25, 40, 80, 160)
"""Steps of effort 0 … 9; a step costs about a forward and a backward pass of g_s."""


@dataclass(frozen=True)
class Refinement(Options):
    """How much an encoder does for one image; the options of a learned model's specification.

    Attributes:
        effort: 0 … 9, steps as in `EFFORT_STEPS`; the same steps on the same machine with as many
            threads give the same file.
        lmbda: λ in the convention of the model's recipe, when another balance of rate and
            distortion is wanted than the one it was trained for.
        seconds: of search; no further step begins that would end later, so the file depends on the
            machine's speed.
    """

    codec_name: ClassVar[str] = "a learned model"

    effort: int
    lmbda: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.effort, int):
            raise TypeError(f"effort is a whole number, got {self.effort!r}")
        self.check_range("effort", 0, len(EFFORT_STEPS) - 1)
        for key in ("lmbda", "seconds"):
            if getattr(self, key) is not None:
                self.check_range(key, 1e-9 if key == "lmbda" else 0, 1e9)


_KAPPA = 0.5
"""κ at the start, Taylor's."""
_FALL, _LEAST_KAPPA = 0.7, 0.2
"""κ falls where no move promises anything, and the search ends below the least."""
_EXCESS, _RECOVERY = 2.0, 0.9
"""Growth of a symbol's κ after a step that kept less than `_LITTLE` of its promise; what is left of that
a step later."""
_LITTLE = 0.3
_NEIGHBOURHOOD = 3
_SHARE_OF_BEST = 0.3
_PROBE = 0.25
"""Length of the curvature's random step, in latent units."""

_BAND_POSITIONS = 3072
"""g_s runs on bands of about this many positions of y (0.8 megapixels): it bounds the memory."""
_HALO = 8
"""Rows of y that a band sees beyond its ends, at least."""
_OVERLAP = 2
"""Rows of y beyond its strip whose pixels count among those that a symbol changes."""


def refine(
    model: Transforms,
    loss: RateDistortionLoss,
    pixels: NDArray[np.uint8],
    latents: Latents,
    steps: int,
    seconds: float | None = None,
) -> Latents:
    """Symbols of lower J than `latents` for an H×W×3 image.

    Strips are refined from top to bottom, each with its neighbours as they then are.

    Args:
        model: whose streams are to be written.
        loss: J; linear in distortion and rate.
        pixels: the image.
        latents: where to start.
        steps: at most, in every strip.
        seconds: no step begins that would end later, if given.
    """
    network = model.frozen_network
    x = as_tensor(pixels, model.device).float() / 255
    centres = model.centres
    y = torch.from_numpy(latents.y).to(model.device).long().permute(2, 0, 1)[None]
    strips = strip_bounds(*latents.y.shape[:2])
    medians = network.factorized_prior.medians()[:, None, None]
    refined_z = []
    started = time.monotonic()
    for number, ((top, bottom), z) in enumerate(zip(strips, latents.z, strict=True)):
        problem = _Strip(network, model.level, loss, x, centres, medians, y, top, bottom)
        until = None if seconds is None else started + seconds * (number + 1) / len(strips)
        best_y, best_z = problem.solve(torch.from_numpy(z).to(y).unsqueeze(0), steps, until)
        y[:, :, top:bottom] = best_y
        refined_z.append(best_z[0].to(torch.int32).cpu().numpy())
    symbols = y[0].permute(1, 2, 0).to(torch.int32).contiguous().cpu().numpy()
    return Latents(symbols, refined_z)


class _Point(NamedTuple):
    """Symbols of a strip and J with its derivatives there.

    Attributes:
        loss: J.
        y, z: symbols, int64 1×M×h×w and 1×Z×⌈h/4⌉×⌈w/4⌉.
        slope_y, slope_z: ∂J/∂ŷ and ∂J/∂ẑ, each symbol's own probability held.
        parameters: of y's probabilities.
    """

    loss: float
    y: Tensor
    z: Tensor
    slope_y: Tensor
    slope_z: Tensor
    parameters: LaplaceParameters


class _Strip:
    """The symbols of one strip, rows [top, bottom) of y, as the unknowns."""

    def __init__(
        self,
        network: Any,
        level: float | None,
        loss: RateDistortionLoss,
        x: Tensor,
        centres: Tensor,
        medians: Tensor,
        y: Tensor,
        top: int,
        bottom: int,
    ) -> None:
        self.network, self.level, self.loss, self.x = network, level, loss, x
        self.centres, self.medians = centres, medians
        edges = (centres[1:] + centres[:-1]) / 2
        infinity = centres.new_full((1,), torch.inf)
        self.below = centres - torch.cat([-infinity, edges])
        self.above = torch.cat([edges, infinity]) - centres
        self.plane = centres[y]
        self.top, self.bottom = top, bottom
        self.start = y[:, :, top:bottom].clone()
        height, width = x.shape[-2:]
        self.pixels = (min(STRIDE * bottom, height) - STRIDE * top) * width
        self.bands = _bands(top, bottom, *y.shape[-2:])

    def solve(self, z: Tensor, steps: int, until: float | None) -> tuple[Tensor, Tensor]:
        """Symbols of y and z after the steps, starting from the plane's and from z."""
        point = self.evaluate(self.start, z)
        curvature_y, curvature_z = self.curvature(point)
        kappa = _KAPPA
        excess_y, excess_z = torch.ones_like(point.slope_y), torch.ones_like(point.slope_z)
        longest, now = 0.0, time.monotonic()
        for _ in range(steps):
            if until is not None and now + longest > until:
                break
            y, gain_y = self.moves_of_y(point, kappa * excess_y * curvature_y)
            z, gain_z = self.moves_of_z(point, kappa * excess_z * curvature_z)
            promise = float(gain_y.sum() + gain_z.sum())
            if promise == 0:
                kappa *= _FALL
                if kappa < _LEAST_KAPPA:
                    break
                continue
            tried = self.evaluate(y, z)
            kept = (point.loss - tried.loss) / promise
            if kept < _LITTLE:
                excess_y = torch.where(gain_y > 0, excess_y * _EXCESS, excess_y)
                excess_z = torch.where(gain_z > 0, excess_z * _EXCESS, excess_z)
            excess_y = 1 + _RECOVERY * (excess_y - 1)
            excess_z = 1 + _RECOVERY * (excess_z - 1)
            if kept > 0:
                point = tried
            longest, now = max(longest, time.monotonic() - now), time.monotonic()
        return point.y, point.z

    def evaluate(self, y: Tensor, z: Tensor) -> _Point:
        """J and its derivatives at symbols."""
        y_hat, z_hat = self.centres[y], z + self.medians
        loss, slopes, parameters = self._differentiate(y, z, y_hat, z_hat)
        return _Point(loss, y, z, *slopes, parameters)

    def curvature(self, point: _Point) -> tuple[Tensor, Tensor]:
        """∂²J of one symbol of y and of z, a mean for every channel, by one probe."""
        generator = torch.Generator().manual_seed(0)
        signs = [
            torch.randint(0, 2, values.shape, generator=generator).to(values.device) * 2.0 - 1
            for values in (point.y, point.z)
        ]
        y_hat = self.centres[point.y] + _PROBE * signs[0]
        z_hat = point.z + self.medians + _PROBE * signs[1]
        _, slopes, _ = self._differentiate(point.y, point.z, y_hat, z_hat)
        before = (point.slope_y, point.slope_z)
        return tuple(  # type: ignore[return-value]
            ((new - old) * sign / _PROBE).mean((2, 3), keepdim=True).clamp(min=0)
            for new, old, sign in zip(slopes, before, signs, strict=True)
        )

    def moves_of_y(self, point: _Point, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """Symbols of y after this step's moves, and what each is expected to gain (0: stays)."""
        present = self._bits_of_y(point.y, point.parameters)
        options = []
        for direction in (-1, 1):
            target = (point.y + direction).clamp(0, len(self.centres) - 1)
            delta = self.centres[target] - self.centres[point.y]
            bits = self._bits_of_y(target, point.parameters) - present
            options.append((target, self._gain(bits, point.slope_y, delta, curvature)))
        return _choose(point.y, options)

    def moves_of_z(self, point: _Point, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """The same for z."""
        present = self._bits_of_z(point.z)
        options = []
        for direction in (-1, 1):
            target = (point.z + direction).clamp(-Z_LIMIT, Z_LIMIT)
            bits = self._bits_of_z(target) - present
            options.append((target, self._gain(bits, point.slope_z, target - point.z, curvature)))
        return _choose(point.z, options)

    def _gain(self, bits: Tensor, slope: Tensor, delta: Tensor, curvature: Tensor) -> Tensor:
        rate = self.loss.weights[1] * (bits / self.pixels)
        return -(rate + slope * delta + curvature * delta * delta)

    def _bits_of_y(self, y: Tensor, parameters: LaplaceParameters) -> Tensor:
        mass = self.network.prior(self.centres[y], self.below[y], self.above[y], *parameters)
        return -mass.log2()

    def _bits_of_z(self, z: Tensor) -> Tensor:
        return -self.network.factorized_prior.likelihood(z + self.medians).log2()

    def _differentiate(
        self, y: Tensor, z: Tensor, y_hat: Tensor, z_hat: Tensor
    ) -> tuple[float, tuple[Tensor, Tensor], LaplaceParameters]:
        """J of coding y and z where decoder and context see ŷ and ẑ; its slopes for those."""
        y_hat.requires_grad_()
        z_hat.requires_grad_()
        parameters = self.network.parameters_of(z_hat, y_hat, self.level)
        bits = self._bits_of_y(y, parameters).sum() + self._bits_of_z(z).sum()
        rate = self.loss.weights[1] * (bits / self.pixels)
        rate.backward()
        total = float(rate.detach())
        for band in self.bands:
            distortion = self._distortion(y_hat, *band)
            distortion.backward()
            total += float(distortion.detach())
        assert y_hat.grad is not None
        slope_z = torch.zeros_like(z_hat) if z_hat.grad is None else z_hat.grad
        mu, log_scale = parameters
        return (
            total,
            (y_hat.grad, slope_z),
            LaplaceParameters(mu.detach(), log_scale.detach()),
        )

    def _distortion(self, y_hat: Tensor, first: int, end: int) -> Tensor:
        """A band's part of J's distortion: the pixels of rows [first, end) of y."""
        rows, (height, width) = self.plane.shape[-2], self.x.shape[-2:]
        # Strided layers must fall on the same rows as they do in the whole plane.
        low = max(0, first - _HALO) // ALIGNMENT * ALIGNMENT
        high = min(rows, end + _HALO)
        inner = y_hat[:, :, max(low, self.top) - self.top : min(high, self.bottom) - self.top]
        parts = [
            self.plane[:, :, low : self.top],
            inner,
            self.plane[:, :, self.bottom : high],
        ]
        plane = torch.cat([p for p in parts if p.shape[2]], 2)
        shown = self.network.synthesise(plane, self.level)
        bottom = min(STRIDE * end, height)
        shown = shown[:, :, STRIDE * (first - low) : bottom - STRIDE * low, :width].clamp(0, 1)
        distortion = self.loss.distortion(shown, self.x[:, :, STRIDE * first : bottom])
        share = (bottom - STRIDE * first) * width / self.pixels
        return self.loss.weights[0] * (distortion * share)


def _bands(top: int, bottom: int, height: int, width: int) -> list[tuple[int, int]]:
    """Rows of y, the strip's and some beyond, in even bands of about `_BAND_POSITIONS`."""
    first, end = max(0, top - _OVERLAP), min(height, bottom + _OVERLAP)
    count = max(1, round((end - first) * width / _BAND_POSITIONS))
    count = min(count, max(1, (end - first) // (2 * _HALO)))
    ends = [first + (end - first) * i // count for i in range(count + 1)]
    return list(itertools.pairwise(ends))


def _choose(present: Tensor, options: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The moves worth making together: symbols, and gains where they change."""
    symbols, gain = present, torch.zeros_like(options[0][1])
    for target, promised in options:
        better = (promised > gain) & (target != present)
        symbols, gain = torch.where(better, target, symbols), torch.where(better, promised, gain)
    best = gain.amax(1, keepdim=True)
    near = F.max_pool2d(best, _NEIGHBOURHOOD, 1, _NEIGHBOURHOOD // 2)
    made = (gain > 0) & (gain >= _SHARE_OF_BEST * near)
    return torch.where(made, symbols, present), torch.where(made, gain, torch.zeros_like(gain))
