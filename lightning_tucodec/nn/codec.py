"""TucodecVAE: transforms, quantiser, hyperprior, context and priors put together (Z19 Figs 1–2).

::

    x ─ g_a ─ y ─ Q ─ ŷ ──────────────┬─────────── g_s ─ x̂
              │       └─ context ─ Υ ─┐
              └─ h_a ─ z ─ Q ─ ẑ ─ h_s ─ Γ ─ entropy parameters ─ (μ, log b) ─ P(ŷ)
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_tucodec.nn.blocks import Block, Upsampling, pad_to_multiple
from lightning_tucodec.nn.context import CausalContext, ContextConfig
from lightning_tucodec.nn.hyperprior import (
    EntropyParameters,
    HyperAnalysis,
    HyperConfig,
    HyperSynthesis,
    LaplaceParameters,
)
from lightning_tucodec.nn.levels import RateLevels
from lightning_tucodec.nn.noise import RATE, Noise, uniform_like
from lightning_tucodec.nn.priors import FactorizedPrior, LaplacePrior
from lightning_tucodec.nn.quantizer import Quantized, QuantizerKind, make_quantizer
from lightning_tucodec.nn.transforms import (
    STRIDE,
    AnalysisTransform,
    SynthesisTransform,
    TransformConfig,
)

RateProxy = Literal["straight_through", "noise", "hard"]


@dataclass(frozen=True)
class CodecConfig:
    """Everything that shapes the network; stored in every exported model.

    Attributes:
        transform, hyper, context: sizes of the parts.
        quantizer: "centres" (learned, Z19), "companded" (learned by additive noise), "round" or "noise"
            (baselines).
        centres: M.
        hardness: see ClusterQuantizer.
        rate_proxy: where the training rate is taken, −log2[F(v + δ⁺) − F(v − δ⁻)]:
            "straight_through" at v = ŷ with the gradient of the soft assignment, "noise" at
            v = y + u, u uniform in the cell (additive noise when the spacing is one). "companded" has a
            rate of its own. "hard": ŷ and its rate are the decoder's, also in training; nothing of it
            reaches g_a, which must be trained by then.
        levels: rate levels of a variable-rate codec, see `RateLevels`; 1: one rate.
        level_ratio: λ of a level in proportion to that of the one below.
    """

    transform: TransformConfig = field(default_factory=TransformConfig)
    hyper: HyperConfig = field(default_factory=HyperConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    quantizer: QuantizerKind = "centres"
    centres: int = 200
    hardness: float = 2.0
    rate_proxy: RateProxy = "noise"
    levels: int = 1
    level_ratio: float = 2.0

    def __post_init__(self) -> None:
        """Refuse names that do not exist."""
        choices = (
            ("quantizer", self.quantizer, get_args(QuantizerKind)),
            ("rate_proxy", self.rate_proxy, get_args(RateProxy)),
            ("transform.upsampling", self.transform.upsampling, get_args(Upsampling)),
            ("transform.block", self.transform.block, get_args(Block)),
        )
        for name, value, known in choices:
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; choose one of {list(known)}")
        if self.levels < 1:
            raise ValueError(f"levels {self.levels}: starts at 1")


PRESETS: dict[str, CodecConfig] = {
    "paper": CodecConfig(),
    "fast": CodecConfig(
        transform=TransformConfig(widths=(96, 128, 160, 192), attention_quarter=False),
        hyper=HyperConfig(channels=128, latent_channels=128, entropy_widths=(384, 320)),
        context=ContextConfig(channels=64, levels=1),
    ),
    "tiny": CodecConfig(
        transform=TransformConfig(
            widths=(0, 0, 128, 192),
            latent_channels=96,
            blocks=(0, 0, 6, 3),
            head_blocks=0,
            gdn=False,
            pyramid=False,
            attention_quarter=False,
            attention_latent=False,
            upsampling="pointwise",
            block="depthwise",
        ),
        hyper=HyperConfig(
            channels=64, latent_channels=48, out_channels=128, entropy_widths=(192, 192)
        ),
        context=ContextConfig(channels=40, levels=1, out_channels=128),
    ),
}
"""`paper`: as drawn. `fast`: the same family without the quarter-resolution attention and with widths
that follow the resolution. `tiny`: trains on a CPU."""


class CodecOutput(NamedTuple):
    """What `TucodecVAE.forward` returns; N images of H×W pixels, latents of h×w positions.

    Attributes:
        x_hat: N×3×H×W, not clamped.
        y_likelihoods: N×M×h×w; hard cells' masses in eval mode, the proxy's in training.
        z_likelihoods: N×Z×⌈h/4⌉×⌈w/4⌉.
        y: the unquantised latent.
        index: assigned centres, int64.
    """

    x_hat: Tensor
    y_likelihoods: Tensor
    z_likelihoods: Tensor
    y: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index

    def bits(self) -> tuple[Tensor, Tensor]:
        """Estimated bits of y and of z for every image, each of shape (N,), float32."""
        return (
            -self.y_likelihoods.float().log2().flatten(1).sum(1),
            -self.z_likelihoods.float().log2().flatten(1).sum(1),
        )

    def as_dict(self) -> dict[str, Tensor | dict[str, Tensor]]:
        """CompressAI's form, `{"x_hat", "likelihoods": {"y", "z"}}`."""
        likelihoods = {"y": self.y_likelihoods, "z": self.z_likelihoods}
        return {"x_hat": self.x_hat, "likelihoods": likelihoods}


class TucodecVAE(nn.Module):
    """The learned codec in floating point; `coding` turns it into bytes."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.transform.latent_channels
        self.g_a = AnalysisTransform(config.transform)
        self.g_s = SynthesisTransform(config.transform)
        self.h_a = HyperAnalysis(latent, config.hyper)
        self.h_s = HyperSynthesis(config.hyper)
        has_context = config.context.channels > 0
        self.context = CausalContext(latent, config.context) if has_context else None
        self.entropy_parameters = EntropyParameters(
            latent, config.hyper, config.context.out_channels if has_context else 0
        )
        self.quantizer = make_quantizer(config.quantizer, config.centres, config.hardness)
        self.prior = LaplacePrior()
        self.factorized_prior = FactorizedPrior(config.hyper.latent_channels)
        self.levels = (
            RateLevels(config.levels, config.level_ratio, latent, config.hyper.entropy_widths[0])
            if config.levels > 1
            else None
        )

    @staticmethod
    def pad(x: Tensor) -> Tensor:
        """Repeat the right and bottom border until both sides are multiples of 16."""
        return pad_to_multiple(x, STRIDE)

    def parameters_of(
        self, z_hat: Tensor, y_hat: Tensor, level: Tensor | float | None = None
    ) -> LaplaceParameters:
        """(μ, log b) of every element of ŷ from ẑ and from earlier positions of ŷ."""
        gamma = self.h_s(z_hat, (y_hat.shape[-2], y_hat.shape[-1]))
        upsilon = None if self.context is None else self.context(y_hat)
        bias = None if self.levels is None else self.levels.biases(self._level(level, y_hat))
        return self.entropy_parameters(gamma, upsilon, bias)

    def _level(self, level: Tensor | float | None, like: Tensor) -> Tensor:
        """Levels of N images, the middle one where none is given."""
        assert self.levels is not None
        if isinstance(level, Tensor):
            return level
        one = self.levels.middle if level is None else level
        return like.new_full((like.shape[0],), one, dtype=torch.float32)

    def rate(
        self, y: Tensor, noise: Noise | None = None, level: Tensor | float | None = None
    ) -> tuple[Quantized, Tensor, Tensor]:
        """Quantise y and find the likelihoods of ŷ and ẑ; N×M×h×w.

        Args:
            y: the latent, with its gain.
            noise: what training adds; None draws it from PyTorch's global generator.
            level: of each image, or of all, in [0, levels − 1]; None: the middle one.

        Returns:
            The quantised latent, and the likelihoods of y and of z as in CodecOutput.
        """
        hard = self.config.rate_proxy == "hard"
        quantized = self.quantizer.hard(y) if hard else self.quantizer(y, noise)
        hyper_input = quantized.y_hat.abs() if self.config.hyper.as_drawn else y
        z_hat, z_likelihoods = self.factorized_prior(self.h_a(hyper_input), noise)
        mu, log_scale = self.parameters_of(z_hat, quantized.y_hat, level)
        value = quantized.y_hat
        if self.training and self.config.rate_proxy == "noise" and not self.quantizer.joint:
            uniform = uniform_like(y, noise, RATE)
            value = self._noisy(y.float(), uniform, quantized.below, quantized.above)
        y_likelihoods = self.prior(value, quantized.below, quantized.above, mu, log_scale)
        return quantized, y_likelihoods, z_likelihoods

    def analyse(self, x: Tensor, level: Tensor | float | None = None) -> Tensor:
        """y of images whose sides are multiples of 16, with its gain."""
        y = self.g_a(x)
        return y if self.levels is None else y * self.levels.gain(self._level(level, y))

    def synthesise(self, y_hat: Tensor, level: Tensor | float | None = None) -> Tensor:
        """x̂ of ŷ, which has the gain of its level."""
        if self.levels is not None:
            y_hat = y_hat * self.levels.inverse(self._level(level, y_hat))
        return self.g_s(y_hat)

    def forward(
        self, x: Tensor, noise: Noise | None = None, level: Tensor | float | None = None
    ) -> CodecOutput:
        """Code images in floating point: N×3×H×W in [0, 1], any H, W ≥ 1; on the others see `rate`."""
        height, width = x.shape[-2:]
        y = self.analyse(self.pad(x), level)
        quantized, y_likelihoods, z_likelihoods = self.rate(y, noise, level)
        x_hat = self.synthesise(quantized.y_hat, level)[..., :height, :width]
        return CodecOutput(x_hat, y_likelihoods, z_likelihoods, y, quantized.index)

    @staticmethod
    def _noisy(y: Tensor, uniform: Tensor, below: Tensor, above: Tensor) -> Tensor:
        """y + u with u ~ U(−δ⁺, δ⁻); an end cell's open side counts as wide as its closed one."""
        below, above = (
            torch.where(below.isinf(), above, below),
            torch.where(above.isinf(), below, above),
        )
        return y + uniform * (above + below) - above


def config_to_dict(config: CodecConfig) -> dict[str, object]:
    """Plain nested dictionary of a configuration, for model files and checkpoints."""
    values = dataclasses.asdict(config)
    if config.levels == 1:  # so that models of one rate keep their ids
        del values["levels"], values["level_ratio"]
    return values


def config_from_dict(values: dict[str, object]) -> CodecConfig:
    """The inverse of `config_to_dict`, also after a trip through JSON (lists become tuples)."""

    def build(kind: type, entries: object) -> object:
        if not isinstance(entries, dict):
            raise ValueError(f"{kind.__name__} must be a mapping, got {entries!r}")
        known = {f.name for f in dataclasses.fields(kind)}
        if unknown := set(entries) - known:
            raise ValueError(f"unknown fields {sorted(unknown)} for {kind.__name__}")
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in entries.items()})

    parts = {"transform": TransformConfig, "hyper": HyperConfig, "context": ContextConfig}
    nested = {k: build(parts[k], v) if k in parts else v for k, v in values.items()}
    config = build(CodecConfig, nested)
    assert isinstance(config, CodecConfig)
    return config
