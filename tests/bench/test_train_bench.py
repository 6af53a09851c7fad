"""`tucodec bench train` at its smallest: every number belongs to the steps that were timed."""

import contextlib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_tucodec.bench import data, timing, train
from lightning_tucodec.bench.complexity import step_flops
from lightning_tucodec.nn.noise import Noise
from lightning_tucodec.training.arithmetic import Arithmetic
from lightning_tucodec.training.vae import VAE
from tests.support import MICRO


def test_speed_beside_compressais_loop(
    photo_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = train.run(
        str(photo_folder), steps=2, repeats=1, batch=2, crop=64, workers=1, codec=MICRO
    )
    ours, at_hand = "ours, 32-true", "ours, 32-true, batch at hand"
    seconds = {row["name"]: row["median_s"] for row in result["rows"]}
    assert list(seconds) == [train.PEER, ours, at_hand]
    for name, value in seconds.items():
        assert result["images_per_s"][name] == pytest.approx(2 / value, rel=0.05)
        assert result["flop_per_s"][name] == pytest.approx(
            result["flop_per_step"] / value, rel=0.05
        )
    assert 0 <= result["share_waiting_for_data"][ours] < 1
    assert result["matmul_peak_flop_per_s"]["32-true"] > 1e8
    assert "share_waiting_for_data" in timing.table_text(result)
    assert not [record for record in caplog.records if "lightning" in record.name]


def test_a_share_of_the_peak_is_of_the_same_arithmetic(
    photo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a GPU's convolutions are in TF32 and its matrices in float32: PyTorch's own choice."""
    kinds: list[str] = []
    measured: list[str] = []

    @contextlib.contextmanager
    def arithmetic(kind: str) -> Iterator[None]:
        kinds.append(kind)
        yield
        kinds.pop()

    def noting(name: str, value: float) -> Any:
        return lambda *_, **__: measured.append(f"{name} {kinds}") or value

    monkeypatch.setattr(train, "arithmetic", arithmetic)
    monkeypatch.setattr(train._Bench, "ours", noting("ours", 1.0))
    monkeypatch.setattr(train._Bench, "theirs", noting("theirs", 1.0))
    monkeypatch.setattr(train, "matmul_peak", noting("peak", 1e12))
    for kind in typing.get_args(Arithmetic):
        measured.clear()
        train.run(str(photo_folder), batch=2, crop=64, repeats=1, codec=MICRO, kind=kind)
        assert measured == [f"{name} ['{kind}']" for name in ("theirs", "ours", "ours", "peak")]


def test_flops_are_counted_without_computing() -> None:
    """The same number as of a step that is computed."""
    module = VAE(codec=MICRO)
    flops = step_flops(module, 2, 64)
    assert flops == 2 * step_flops(module, 1, 64)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        module.loss(module.network(x, Noise.of(0, torch.arange(2))), x).loss.backward()
    assert counter.get_total_flops() == flops


def test_the_examples_loop_trains() -> None:
    network = VAE(codec=MICRO).network
    before = [p.detach().clone() for p in network.parameters()]
    ticks: list[int] = []
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    train.example_loop(network, [x] * 5, "cpu", lambda: ticks.append(1), 3)
    assert len(ticks) == 3
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_what_a_node_feeds_and_eats() -> None:
    found = data.node({"ours, webp": 100.0})
    assert found["16_cores_feed_per_s"] == {"ours, webp": 1600}
    eaten = found["8_gpus_eat_per_s"]
    assert eaten["paper"] < eaten["fast"] < eaten["tiny"]
    flops = step_flops(VAE(preset="fast"), 1, data.PATCH)
    assert eaten["fast"] == round(8 * data.GPU_FLOP_PER_S / flops)
