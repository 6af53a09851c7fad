"""Options of a build of shards."""

from dataclasses import dataclass

from data_pipelines.patches import EXTENSION
from lightning_tucodec.errors import ConfigError


@dataclass(frozen=True)
class BuildOptions:
    """Everything besides the photographs that decides the bytes of a build.

    Attributes:
        patch: side of a patch, pixels.
        count: patches in all; None takes all there are.
        shard_size: patches in a shard (the last one may hold fewer).
        seed: decides the places of the patches, their choice and their order.
        encoding: `webp` (lossless), `png` or `raw`.
        long_edge: photographs are scaled down to at most this many pixels first.
        scales: further factors at which patches are cut, each ≤ 1.
        max_overlap: the most that two patches of one scale share, as a fraction of the side.
        min_contrast: patches whose luma has a smaller standard deviation (gray levels of 255) are
            flat and not used.
        duplicate_bits: photographs whose 64-bit perceptual hashes differ in at most this many bits
            are the same; −1 keeps all but byte-identical files.
    """

    patch: int = 256
    count: int | None = None
    shard_size: int = 1024
    seed: int = 0
    encoding: str = "webp"
    long_edge: int = 2000
    scales: tuple[float, ...] = (1.0,)
    max_overlap: float = 0.0
    min_contrast: float = 3.0
    duplicate_bits: int = 4

    def check(self) -> None:
        """Raise ConfigError for values that cannot work."""
        for name, value in (("patch", self.patch), ("shard-size", self.shard_size)):
            if value < 1:
                raise ConfigError(f"--{name} {value}: must be at least 1")
        if self.count is not None and self.count < 1:
            raise ConfigError(f"--count {self.count}: must be at least 1")
        if self.encoding not in EXTENSION:
            raise ConfigError(f"--format {self.encoding}: use {', '.join(EXTENSION)}")
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ConfigError("--scales: every scale must lie in (0, 1]")
        if not 0 <= self.max_overlap < 1:
            raise ConfigError(f"--max-overlap {self.max_overlap}: must lie in [0, 1)")
        if not 0 <= self.min_contrast <= 255:
            raise ConfigError(f"--min-contrast {self.min_contrast}: must lie in [0, 255]")
        if not -1 <= self.duplicate_bits < 64:
            raise ConfigError(f"--duplicate-bits {self.duplicate_bits}: must lie in -1 … 63")
        if self.long_edge < self.patch:
            raise ConfigError(
                f"--long-edge {self.long_edge}: leaves no room for patches of {self.patch}"
            )
