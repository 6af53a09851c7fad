"""Threads that ask for one thing at the same time get one, built once."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_tucodec.codecs import library, registry
from lightning_tucodec.codecs.learned.model_file import ModelFile
from lightning_tucodec.io.once import once, once_property
from lightning_tucodec.sets import evaluate as evaluation
from tests.support import photo

THREADS = 16


def together(ask: Callable[[int], object]) -> list[object]:
    """What each of some threads gets, which ask at the same moment."""
    ready = threading.Barrier(THREADS)

    def one(number: int) -> object:
        ready.wait()
        return ask(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, range(THREADS)))


def test_a_function_is_called_once_for_each_argument() -> None:
    calls: list[int] = []

    def build(number: int) -> object:
        calls.append(number)
        time.sleep(0.02)
        return object()

    get = once(build)
    assert len(set(map(id, together(lambda number: get(number % 2))))) == 2
    assert sorted(calls) == [0, 1]


def test_an_error_is_not_kept_and_the_values_used_last_are() -> None:
    calls: list[int] = []

    def build(number: int) -> int:
        calls.append(number)
        if len(calls) == 1:
            raise OSError("not yet")
        return number

    get = once(build, 2)
    with pytest.raises(OSError, match="not yet"):
        get(1)
    assert [get(number) for number in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert calls == [1, 1, 2, 3, 2]


def test_a_property_is_built_once() -> None:
    built: list[object] = []

    class Slow:
        @once_property
        def value(self) -> object:
            """Said of it."""
            time.sleep(0.02)
            built.append(self)
            return object()

    slow = Slow()
    assert len(set(map(id, together(lambda _: slow.value)))) == 1
    assert built == [slow]
    assert Slow.value.__doc__ == "Said of it."


def test_a_model_is_loaded_and_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(library.find("tiny-mse-2").read_bytes())
    counts: Counter[str] = Counter()
    load, network = ModelFile.load, ModelFile.network

    def counted_load(path: Path) -> ModelFile:
        counts["load"] += 1
        return load(path)

    def counted_network(self: ModelFile) -> object:
        counts["network"] += 1
        return network(self)

    monkeypatch.setattr(ModelFile, "load", counted_load)
    monkeypatch.setattr(ModelFile, "network", counted_network)
    found = together(lambda _: library.load(path).network)
    assert len(set(map(id, found))) == 1
    assert counts == {"load": 1, "network": 1}


def test_evaluate_decodes_an_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many codecs and workers wait for it."""
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    for path in paths:
        Image.fromarray(photo("coffee.png", 64, 48)).save(path)
    read: Counter[Path] = Counter()

    def counted(path: Path, lost: object) -> "np.ndarray":
        read[path] += 1
        time.sleep(0.05)
        return np.array(Image.open(path))

    monkeypatch.setattr(evaluation, "read_image", counted)
    codecs = registry.codecs([f"jpeg:q={q}" for q in range(10, 40, 2)])
    rows = evaluation.evaluate(paths, codecs, tmp_path / "rows.jsonl", workers=8)
    assert len(rows) == 30
    assert read == dict.fromkeys(paths, 1)
