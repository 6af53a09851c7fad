"""Noise as a function of (seed, position, stream, element)."""

import shutil

import numpy as np
import pytest
import torch

from lightning_tucodec.nn.noise import HYPER, QUANTIZER, Noise, philox

ONES = 0xFFFFFFFF
DIGITS = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [
        (7, (0,) * 4, (0,) * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, (ONES,) * 4, (ONES,) * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (7, *DIGITS, "4dfccaba 190a87f0 c47362ba b6b5242a"),
        (10, (0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, (ONES,) * 4, (ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (10, *DIGITS, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(
    rounds: int, counter: tuple[int, ...], key: tuple[int, int], expected: str
) -> None:
    """Those that the authors of Philox publish (Random123, kat_vectors)."""
    a, b, c, d = (torch.tensor([word]) for word in counter)
    words = philox((a, b, c, d), key, rounds)
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_a_batch_may_be_divided_in_any_way() -> None:
    x, positions = torch.zeros(4, 3, 5, 7), torch.tensor([3, 2**40, 11, 4])
    whole = Noise.of(1, positions).uniform(x, HYPER)
    parts = [
        Noise.of(1, positions[part]).uniform(x[part], HYPER) for part in (slice(1), slice(1, 4))
    ]
    assert torch.equal(whole, torch.cat(parts))
    turned = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(whole, Noise.of(1, positions).uniform(turned, HYPER))
    assert torch.equal(
        whole.half().float(), Noise.of(1, positions).uniform(x.half(), HYPER).half().float()
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_it_is_the_same_to_the_bit(backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("Inductor needs a C++ compiler")
    x = torch.zeros(3, 2, 50, 40)

    def draw(noise: Noise) -> torch.Tensor:
        return noise.uniform(x, QUANTIZER)

    torch.compiler.reset()
    noise = Noise.of(7, torch.tensor([0, 5, 2**33 + 1]))
    compiled = torch.compile(draw, fullgraph=True, backend=backend)
    assert torch.equal(compiled(noise), draw(noise))


def test_seeds_positions_streams_and_elements_differ() -> None:
    x, positions = torch.zeros(8, 4, 16, 16), torch.arange(8)
    draws = [
        Noise.of(seed, positions + shift).uniform(x, stream)
        for seed in (0, 1, -1) for shift in (0, 8, 2**32) for stream in (QUANTIZER, HYPER)
    ]  # fmt: skip
    words = torch.cat([draw.flatten() for draw in draws])
    assert float(words.min()) >= 0
    assert float(words.max()) < 1
    # Of 147456 draws out of 2^24 about 650 are repeats.
    assert abs(words.numel() - words.unique().numel() - 646) < 130


def test_it_is_uniform_and_uncorrelated() -> None:
    draw = Noise.of(3, torch.arange(64)).uniform(torch.zeros(64, 4096), QUANTIZER).numpy()
    counts = np.histogram(draw, 256, (0, 1))[0]
    expected = draw.size / 256
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert 150 < chi_squared < 380  # 255 degrees of freedom
    centred = draw - 0.5
    for other in (np.roll(centred, 1, 0), np.roll(centred, 1, 1), np.roll(centred, 4, 1)):
        assert abs(float((centred * other).mean()) * 12) < 5 / draw.size**0.5
