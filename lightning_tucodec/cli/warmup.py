"""`tucodec warmup`."""

import argparse

from lightning_tucodec.cli.arguments import Subparsers, command


def register(subparsers: Subparsers) -> None:
    """`tucodec warmup`."""
    command(
        subparsers,
        "warmup",
        run,
        "compile the entropy coders and the allocation for this machine, as their first use would",
    )


def run(arguments: argparse.Namespace) -> int:
    """Code an image and allocate a set, both tiny."""
    import numpy as np

    from lightning_tucodec.codecs.decode import decompress
    from lightning_tucodec.codecs.library import load
    from lightning_tucodec.coding import raster
    from lightning_tucodec.coding.compiling import seconds_spent
    from lightning_tucodec.sets.allocation import Table, allocate

    decompress(load("tiny-mse-1").compress(np.zeros((64, 64, 3), np.uint8)))
    raster.try_out()
    size = np.arange(60, dtype=np.int64).reshape(3, 20) ** 2 + 100
    table = Table(
        [str(image) for image in range(3)],
        [str(candidate) for candidate in range(20)],
        np.full(3, 1 << 12),
        size,
        size[::-1, ::-1] % 1009,
        np.full(size.shape, 0.9),
    )
    allocate(table, "sse", max_bytes=4000)
    spent = seconds_spent()
    print(f"compiled in {spent:.0f} s" if spent else "nothing was left to compile")
    return 0
