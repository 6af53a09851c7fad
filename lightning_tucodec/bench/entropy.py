"""Time of the entropy path alone, encoding and decoding, and how it grows with the image.

Networks and coder run from symbols to bytes and back, without transforms. So do CompressAI's (their
`compress` and `decompress` with g_a and g_s removed). Every row is measured at one size and at twice its
sides, so at four times the pixels. `ratio_to` is a row's median divided by its reference's.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_tucodec.bench.codec import (
    RATES,
    SIZE,
    coded,
    entropy_decode,
    entropy_encode,
    subjects_of,
)
from lightning_tucodec.bench.subjects import PEERS, Peer, Subject, picture
from lightning_tucodec.bench.timing import in_turns, machine, rows_of


def run(
    models: Sequence[str],
    rates: Sequence[float] = RATES,
    peers: Sequence[str] = PEERS,
    size: tuple[int, int] = SIZE,
    repeats: int = 5,
) -> dict[str, Any]:
    """The rows, what was coded, and the machine; arguments as in `codec.run`."""
    actions: dict[str, Callable[[], Any]] = {}
    held: dict[str, dict[str, Any]] = {}
    names: list[str] = []
    for factor in (1, 2):
        pixels = picture(factor * size[0], factor * size[1])
        place = f"{pixels.shape[1]}x{pixels.shape[0]}"
        for subject in subjects_of(models, rates, pixels):
            actions |= _actions(subject, place)
            held[f"{subject.name} {place}"] = coded(subject.bpp, subject.constant_channels)
            names.append(subject.name)
    small = f"{size[1]}x{size[0]}"
    for name in peers:
        # Only at the small size: that takes ten seconds already, and their loop is serial over the pixels.
        peer = Peer(name, rates[0], picture(*size)).entropy_only()
        actions[f"{name} entropy encode {small}"] = peer.compress
        actions[f"{name} entropy decode {small}"] = peer.decompress
        actions[f"{name} exact entropy encode {small}"] = peer.exact_compress
        actions[f"{name} exact entropy decode {small}"] = peer.exact_latents
        held[f"{name} {small}"] = coded(peer.bpp, peer.constant_channels)
    for name, action in actions.items():
        if not name.startswith(tuple(peers)):
            action()
    times = in_turns(actions, repeats)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    large = f"{2 * size[1]}x{2 * size[0]}"
    ratios: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(names):
        for way in ("entropy encode", "entropy decode"):
            little, big = f"{name} {way} {small}", f"{name} {way} {large}"
            against = [f"{peer} {way} {small}" for peer in peers]
            ratios[little] = {other: median[little] / median[other] for other in against}
            ratios[big] = {little: median[big] / median[little]}
    for name in peers:
        for way in ("entropy encode", "entropy decode"):
            key, other = f"{name} exact {way} {small}", f"{name} {way} {small}"
            ratios[key] = {other: median[key] / median[other]}
    return {
        "rows": rows_of(times, ratios),
        "coded": held,
        "threads": torch.get_num_threads(),
        "machine": machine(),
    }


def _actions(subject: Subject, place: str) -> dict[str, Callable[[], Any]]:
    forth, back = subject.coder()
    return {
        f"{subject.name} entropy encode {place}": lambda: entropy_encode(subject),
        f"{subject.name} coder forth {place}": forth,
        f"{subject.name} entropy decode {place}": lambda: entropy_decode(subject),
        f"{subject.name} coder back {place}": back,
    }
