"""Validation measures each image once, whatever the number of images and ranks."""

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hits import rank_of, start, wait
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset

from lightning_tucodec.training.data import in_order
from lightning_tucodec.training.runs import read_metrics
from tests.support import MICRO, photo
from tests.training.test_fit import config, runs, write


class Numbers(Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> int:
        return item


@given(st.integers(1, 60), st.integers(1, 17))
def test_every_item_is_on_a_rank(items: int, ranks: int) -> None:
    shares = [list(in_order(Numbers(items), rank, ranks)) for rank in range(ranks)]
    assert {len(share) for share in shares} == {-(-items // ranks)}
    seen = sorted(item for share in shares for item in share)
    assert sorted(set(seen)) == list(range(items))
    assert len(seen) - items < ranks  # no more repeats than ranks need to be equally long


def fit_on(ranks: int, words: list[str]) -> None:
    """A fit of so many gloo processes."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    shape = ["--trainer.devices", str(ranks), "--trainer.strategy", "ddp"]
    children = [start(words + shape, rank_of(rank, ranks, port)) for rank in range(ranks)]
    assert [wait(child) for child in children] == [0] * ranks


@pytest.mark.parametrize(("ranks", "images"), [(2, 5), (3, 1)])
def test_processes_measure_every_image_once(
    ranks: int, images: int, tmp_path: Path, shard_folder: Path
) -> None:
    (tmp_path / "val").mkdir()
    for number in range(images):
        picture = photo("coffee.png", 40, 24, left=100 + 40 * number)
        Image.fromarray(picture).save(tmp_path / "val" / f"{number}.png")
    values = config(tmp_path, shard_folder, MICRO, steps=1)
    values["data"].update(batch_size=6, val_images=str(tmp_path / "val"))
    values["trainer"]["val_check_interval"] = 1
    fit_on(ranks, ["fit", "--config", write(tmp_path, values)])
    assert_measured_once(runs(tmp_path)[0], images)


def assert_measured_once(folder: Path, images: int) -> None:
    rows: list[dict[str, Any]] = json.loads((folder / "images" / "step-00000001.json").read_text())
    assert [row["index"] for row in rows] == list(range(images))
    (line,) = [row for row in read_metrics(folder / "metrics.jsonl") if "val/psnr" in row]
    assert line["val/psnr"] == pytest.approx(np.mean([row["psnr"] for row in rows]))
