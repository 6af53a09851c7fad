"""Limits relative to the number of pixels, and their absolute values for a set of images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.sets.manifest import Limits, budget_name, byte_budget


@dataclass(frozen=True)
class Requirements:
    """The limits that a set must meet, as given to a command.

    Attributes:
        limits: of the set, absolute.
        budgets: rates of the set in bits a pixel; a submission meets each of them.
        max_seconds_per_megapixel: decoding time of the set.
        max_image_bpp: bits a pixel that no image may exceed.

    Raises:
        ConfigError: a budget is given twice, or beside a limit on bytes.
    """

    limits: Limits
    budgets: Sequence[float] = ()
    max_seconds_per_megapixel: float | None = None
    max_image_bpp: float | None = None

    def __post_init__(self) -> None:
        for rate in (*self.budgets, *filter(None, [self.max_image_bpp])):
            byte_budget(rate, 1)  # refuses an invalid rate now
        if len(set(self.budgets)) < len(self.budgets):
            raise ConfigError("--max-bpp: a budget is given twice")

    @classmethod
    def of(cls, arguments: Any) -> "Requirements":
        """From the options of `cli.arguments.add_limits`."""
        seconds = getattr(arguments, "max_decode_seconds", None)
        pace = arguments.max_decode_seconds_per_megapixel
        if seconds is not None and pace is not None:
            raise ConfigError(
                "give --max-decode-seconds or --max-decode-seconds-per-megapixel, not both"
            )
        limits = Limits(arguments.max_bytes, arguments.min_psnr, arguments.min_ms_ssim, seconds)
        return cls(limits, arguments.max_bpp or (), pace, arguments.max_image_bpp)

    def parts(self) -> "dict[str, Requirements]":
        """Those of each budget by the name of its folder; a single one has the name ""."""
        if len(self.budgets) < 2:
            return {"": self}
        return {budget_name(budget): self.only(budget) for budget in self.budgets}

    def only(self, budget: float) -> "Requirements":
        """The same with this budget alone."""
        return replace(self, budgets=(budget,))

    def one(self) -> "Requirements":
        """The same, where a set has one budget at most.

        Raises:
            ConfigError: several were given.
        """
        if len(self.budgets) > 1:
            raise ConfigError("--max-bpp: several budgets belong to a submission of as many parts")
        return self

    def given(self) -> bool:
        """Whether the set is limited at all."""
        pace = self.max_seconds_per_megapixel
        return bool(self.limits.given()) or bool(self.budgets) or pace is not None

    def over(self, pixels: int) -> Limits:
        """The limits of a set of this many pixels under one budget."""
        limits = self.limits
        if self.budgets:
            allowed = byte_budget(self.one().budgets[0], pixels)
            other = limits.max_bytes
            limits = replace(limits, max_bytes=allowed if other is None else min(other, allowed))
        if self.max_seconds_per_megapixel is not None:
            limits = replace(limits, max_seconds=self.max_seconds_per_megapixel * pixels / 1e6)
        return limits
