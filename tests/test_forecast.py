"""Workers that the memory holds, and the minutes that an evaluation says it will take."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_tucodec.codecs.registry import codec
from lightning_tucodec.io.images import image_size
from lightning_tucodec.io.processes import cores
from lightning_tucodec.sets import forecast
from lightning_tucodec.sets.evaluate import evaluate
from lightning_tucodec.sets.forecast import BYTES_A_PIXEL, Forecast, affordable_workers


def test_workers_are_bounded_by_memory_and_pixels() -> None:
    assert affordable_workers(0, 1) == affordable_workers(1, 1 << 40) == cores()
    assert affordable_workers(10**7, BYTES_A_PIXEL * 10**7) == 1
    assert affordable_workers(10**9, 1) == 1  # one always works
    free = forecast.available_memory()
    assert free is None or free > 1 << 20


@pytest.mark.parametrize(
    ("limit", "used", "free"),
    [
        ("memory.max 300", "memory.current 100", 200),
        ("memory.max max", "memory.current 100", 1024),
        ("memory/memory.limit_in_bytes 300", "memory/memory.usage_in_bytes 100", 200),
        ("memory/memory.limit_in_bytes 300", "memory/memory.usage_in_bytes 301", 0),
        ("memory/memory.limit_in_bytes 9223372036854771712", "memory/memory.usage_in_bytes 9", 1024),
        ("none 1", "none 1", 1024),
    ],
)  # fmt: skip
def test_memory_is_that_of_the_container(limit: str, used: str, free: int, tmp_path: Path) -> None:
    files = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 1 kB"}
    files |= {f"sys/fs/cgroup/{name}": text for name, text in map(str.split, (limit, used))}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert forecast.available_memory(tmp_path) == free


def test_the_minutes_are_told_once_when_every_setting_has_been_timed() -> None:
    """Two settings, ten images of a megapixel: a takes 10 s a megapixel, b takes 50 s."""
    both = Forecast([(name, 10**6) for _ in range(10) for name in "ab"], workers=2)
    assert both.finished("a", 10**6, 10.0) is None
    line = both.finished("b", 10**6, 50.0)
    assert line is not None
    assert "about 4 min for the 18 codings that are left, 2 at a time" in line  # 9·60 s / 2
    assert both.finished("a", 10**6, 10.0) is None


def test_a_tiny_image_does_not_judge_large_ones() -> None:
    work = Forecast([("a", 1)] + [("a", 10**6)] * 100, workers=1)
    assert work.finished("a", 1, 0.5) is None
    line = work.finished("a", 10**6, 2.0)
    assert line is not None
    assert "about 4 min for the 99 codings" in line


def test_what_takes_no_minute_says_nothing() -> None:
    short = Forecast([("a", 10**6)] * 10, workers=1)
    assert [short.finished("a", 10**6, 1.0) for _ in range(10)] == [None] * 10


def test_evaluate_says_it_and_counts_what_the_journal_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "_TOLD_FROM", 0.0)
    for index in range(3):
        pixels = np.full((16, 16 + index, 3), 40 * index, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    images = sorted(tmp_path.glob("*.png"))
    assert [image_size(path) for path in images] == [(16, 16), (17, 16), (18, 16)]
    assert image_size(tmp_path / "none.png") is None
    codecs = [codec("jpeg:q=10"), codec("jpeg:q=90")]
    evaluate(images[:1], codecs[:1], tmp_path / "rows.jsonl", workers=1)
    capsys.readouterr()
    evaluate(images, codecs, tmp_path / "rows.jsonl", workers=1)
    (line,) = (text for text in capsys.readouterr().err.splitlines() if " min for " in text)
    assert "for the 4 codings that are left, 1 at a time" in line
    evaluate(images, codecs, tmp_path / "rows.jsonl", workers=1)
    assert " min for " not in capsys.readouterr().err  # nothing is left to code
