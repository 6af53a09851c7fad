"""Validation measures each image once, whatever the number of images and ranks."""

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hits import rank_of, start, wait
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset

from lightning_tucodec.cli import main
from lightning_tucodec.codecs.learned.codec import TucModel
from lightning_tucodec.codecs.learned.model_file import freeze
from lightning_tucodec.io.processes import child, cores
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.nn.transforms import AnalysisTransform
from lightning_tucodec.training.input.validation import in_order
from lightning_tucodec.training.runs.folder import RunFolder, read_metrics
from lightning_tucodec.training.runs.weights import network_weights
from lightning_tucodec.training.vae import VAE, resolve_codec
from tests.support import MICRO, photo
from tests.training.test_exact import check
from tests.training.test_fit import config, runs, state, write


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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def fit_on(
    ranks: int,
    words: list[str],
    prepare: Callable[[int], None] | None = None,
    status: int = 0,
) -> None:
    """A fit of so many gloo processes, each of which begins with `prepare` and ends with the status."""
    port = free_port()
    shape = ["--trainer.devices", str(ranks), "--trainer.strategy", "ddp"]

    def begin(rank: int) -> None:
        rank_of(rank, ranks, port)()
        if prepare is not None:
            prepare(rank)

    children = [start(words + shape, lambda rank=rank: begin(rank)) for rank in range(ranks)]
    assert [wait(child) for child in children] == [status] * ranks


@pytest.mark.parametrize(("ranks", "images"), [(2, 5), (3, 1)])
def test_processes_measure_every_image_once(
    ranks: int,
    images: int,
    tmp_path: Path,
    shard_folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The pictures are those that one process would keep, and one process speaks for all."""
    (tmp_path / "val").mkdir()
    for number in range(images):
        picture = photo("coffee.png", 40, 24, left=100 + 40 * number)
        Image.fromarray(picture).save(tmp_path / "val" / f"{number}.png")
    values = config(tmp_path, shard_folder, MICRO, steps=1)
    values["data"].update(batch_size=6, val_images=str(tmp_path / "val"))
    values["trainer"]["val_check_interval"] = 1
    fit_on(ranks, ["fit", "--config", write(tmp_path, values)])
    (folder,) = runs(tmp_path)
    assert_measured_once(folder, images)
    names = {"step-00000001.png", "step-00000001-1.png", "step-00000001-2.png"}
    kept = {path.name for path in (folder / "images").glob("*.png")}
    assert kept == (names if images > 2 else {"step-00000001.png"})
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("run ")]
    assert told == [f"run {folder}: starts", f"run {folder}: finished at step 1"]


RANK = """
import pathlib, sys, torch
from lightning_tucodec.cli import main
from lightning_tucodec.training.vae import VAE
from tests.training.hits import rank_of

rank, port, told, *words = sys.argv[1:]
end = VAE.on_train_end

def tell(self):
    pathlib.Path(told).write_text(str(torch.get_num_threads()))
    end(self)

VAE.on_train_end = tell
rank_of(int(rank), 2, int(port))()
sys.exit(main(words))
"""


def test_every_process_has_the_threads_that_are_asked_for(
    tmp_path: Path, shard_folder: Path
) -> None:
    """Not a share of the cores, which Lightning would give it. New processes: see `hits.start`."""
    values = config(tmp_path, shard_folder, MICRO, steps=1)
    threads = values["run"]["threads"] = cores() // 2 + 1
    words = ["fit", "--config", write(tmp_path, values)]
    words += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    told = [tmp_path / f"threads-{rank}" for rank in range(2)]
    port = free_port()
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                child(
                    [sys.executable, "-c", RANK, str(rank), str(port), str(told[rank]), *words],
                    env=environment,
                )
            )
            for rank in range(2)
        ]
        assert [process.wait(300) for process in processes] == [0, 0]
    assert [path.read_text() for path in told] == [str(threads)] * 2


def test_processes_that_find_different_checkpoints_do_not_train(
    tmp_path: Path, shard_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A node whose view of the shared storage is old would go on from another state than rank 0."""
    words = ["fit", "--config", write(tmp_path, config(tmp_path, shard_folder, MICRO, steps=1))]
    assert main(words) == 0

    def prepare(rank: int) -> None:
        if rank == 1:
            RunFolder.latest = lambda _: None  # type: ignore[method-assign,assignment]

    fit_on(2, words, prepare, status=1)
    assert "the processes go on from steps 1, 0; run.runs_dir must" in capfd.readouterr().err


def assert_measured_once(folder: Path, images: int) -> None:
    rows: list[dict[str, Any]] = json.loads((folder / "images" / "step-00000001.json").read_text())
    assert [row["index"] for row in rows] == list(range(images))
    (line,) = [row for row in read_metrics(folder / "metrics.jsonl") if "val/psnr" in row]
    assert line["val/psnr"] == pytest.approx(np.mean([row["psnr"] for row in rows]))


@pytest.fixture(scope="module")
def five_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For two ranks three images each, the last one a repeat."""
    folder = tmp_path_factory.mktemp("five")
    for number in range(5):
        picture = photo("coffee.png", 40, 24, left=100 + 40 * number)
        Image.fromarray(picture).save(folder / f"{number}.png")
    return folder


def words_on_two(folder: Path, shards: Path, val: Path) -> list[str]:
    """Validates after the second and the fourth of four steps."""
    folder.mkdir()
    values = config(folder, shards, MICRO, steps=4)
    values["data"]["val_images"] = str(val)
    values["trainer"].update(val_check_interval=2, log_every_n_steps=3)
    return ["fit", "--config", write(folder, values)]


def signal_in_image(number: int, measured: Path) -> None:
    """TERM between two layers of this rank's image; whatever images come to their end leave a line."""
    original, measure = TucodecVAE.rate, VAE._measure
    calls = 0

    def rate(self: TucodecVAE, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        if not self.training:
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **options)

    def _measure(self: VAE, batch: Any) -> None:
        measure(self, batch)
        with measured.open("a") as stream:
            stream.write(f"{int(batch['index'])}\n")

    TucodecVAE.rate = rate  # type: ignore[method-assign]
    VAE._measure = _measure  # type: ignore[method-assign]


def test_processes_stop_together_within_an_image(
    tmp_path: Path, shard_folder: Path, five_images: Path
) -> None:
    """Whether all are told or one; what was measured is measured again, and the end is the straight run's."""
    fit_on(2, words_on_two(tmp_path / "straight", shard_folder, five_images))
    (straight,) = runs(tmp_path / "straight")
    words = words_on_two(tmp_path / "run", shard_folder, five_images)
    for attempt, (told, image, step) in enumerate((((0, 1), 1, 2), ((1,), 2, 2), ((0,), 6, 4))):
        measured = [tmp_path / f"measured-{attempt}-{rank}" for rank in range(2)]

        def prepare(
            rank: int,
            told: tuple[int, ...] = told,
            image: int = image,
            measured: list[Path] = measured,
        ) -> None:
            signal_in_image(image if rank in told else 0, measured[rank])

        fit_on(2, words, prepare, status=75)
        (folder,) = runs(tmp_path / "run")
        assert state(folder)["tucodec"]["opt_step"] == step
        assert "lines" in state(folder)["run"]  # the validation is still to be done
        ends = [len(path.read_text().split()) if path.exists() else 0 for path in measured]
        assert ends == [image - 1 if rank in told else image for rank in range(2)]
    fit_on(2, words)
    check(straight, folder)
    attempts = json.loads((folder / "manifest.json").read_text())["attempts"]
    assert [a["exit"] for a in attempts] == [*["preempted (SIGTERM)"] * 3, "finished"]
    assert [a["status"] for a in attempts] == [75, 75, 75, 0]


def test_a_real_file_is_made_of_the_latents_at_hand(
    tmp_path: Path, shard_folder: Path, val_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One analysis transform an image, where the training runs; any decoder shows what was measured."""
    files: list[tuple[bytes, torch.device]] = []
    transforms = 0
    write_file, g_a = TucModel.write, AnalysisTransform.forward

    def noted(self: TucModel, *args: Any) -> bytes:
        files.append((write_file(self, *args), self.device))
        return files[-1][0]

    def counted(self: AnalysisTransform, x: torch.Tensor) -> torch.Tensor:
        nonlocal transforms
        transforms += not self.training
        return g_a(self, x)

    values = config(tmp_path, shard_folder, MICRO, steps=2)
    values["data"]["val_images"] = str(val_folder)
    values["trainer"]["val_check_interval"] = 2
    with monkeypatch.context() as patch:
        patch.setattr(TucModel, "write", noted)
        patch.setattr(AnalysisTransform, "forward", counted)
        assert main(["fit", "--config", write(tmp_path, values)]) == 0
    assert transforms == len(files) == 2
    (folder,) = runs(tmp_path)
    network = TucodecVAE(resolve_codec("tiny", MICRO))
    network.load_state_dict(network_weights(state(folder)))
    model = TucModel(freeze(network, "validation", {}, torch.float32))
    rows = json.loads((folder / "images" / "step-00000002.json").read_text())
    for (data, device), row, label in zip(files, rows, ("", "-1"), strict=True):
        assert device == torch.device("cpu")
        shown = model.decode(data)
        assert row["real_bpp"] == 8 * len(data) / (shown.shape[0] * shown.shape[1])
        pair = np.asarray(Image.open(folder / "images" / f"step-00000002{label}.png"))
        original, measured = np.split(pair, 2, axis=1)
        assert data == model.encode(original)
        assert np.abs(shown.astype(int) - measured).max() <= 1  # rounding of fixed-point centres


def test_an_image_is_one_read_of_the_device(val_folder: Path) -> None:
    """All numbers of a row at once; beside it, what `watch` counts and the file's symbols."""
    from types import SimpleNamespace

    from lightning_tucodec.training.data import PatchDataModule
    from tests.training.traffic import Traffic

    torch.manual_seed(0)
    module = VAE(codec=MICRO, real_files=0).eval()
    module._trainer = SimpleNamespace(loggers=[])  # type: ignore[assignment]
    data = PatchDataModule("", 1, val_images=str(val_folder))
    module.on_validation_epoch_start()
    for batch in data.val_dataloader():
        batch = data.on_after_batch_transfer(batch, 0)
        with torch.no_grad(), Traffic() as traffic:
            module.validation_step(batch, 0)
        own = {k: n for k, n in traffic.reads.items() if "training/coding.py" in k}
        assert sum(own.values()) == 1, traffic.reads
    assert [row["index"] for row in module.validation_rows] == [0.0, 1.0]
    assert "real_bpp" not in module.validation_rows[0]
