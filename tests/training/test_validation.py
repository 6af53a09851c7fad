"""Validation measures each image once, whatever the number of images and ranks."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
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
from lightning_tucodec.errors import ModelFileError
from lightning_tucodec.io.processes import child, cores
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.nn.transforms import AnalysisTransform
from lightning_tucodec.training import coding
from lightning_tucodec.training.files import FileWorkers, threads_beside
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


def with_threads(count: int) -> None:
    """In a process that ends with the test."""
    coding.threads_beside = lambda _: count


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
    fit_on(ranks, ["fit", "--config", write(tmp_path, values)], lambda _: with_threads(2))
    (folder,) = runs(tmp_path)
    rows = assert_measured_once(folder, images)
    assert all(row["real_bpp"] > 0 for row in rows)
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


def assert_measured_once(folder: Path, images: int) -> list[dict[str, Any]]:
    """The rows of the first step's validation."""
    rows: list[dict[str, Any]] = json.loads((folder / "images" / "step-00000001.json").read_text())
    assert [row["index"] for row in rows] == list(range(images))
    (line,) = [row for row in read_metrics(folder / "metrics.jsonl") if "val/psnr" in row]
    assert line["val/psnr"] == pytest.approx(np.mean([row["psnr"] for row in rows]))
    return rows


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
            with_threads(2)

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


# --- Files by threads: as on a GPU --------------------------------------------------------------------


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "threads_beside", lambda _: 2)


def words_of(folder: Path, shards: Path, val: Path) -> list[str]:
    """One step and its validation."""
    folder.mkdir()
    values = config(folder, shards, MICRO, steps=1)
    values["data"]["val_images"] = str(val)
    values["trainer"]["val_check_interval"] = 1
    return ["fit", "--config", write(folder, values)]


def no_workers() -> bool:
    return not any(t.name.startswith("tucodec-worker") for t in threading.enumerate())


def at_image(number: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something before this image is measured, counted from 1."""
    run, images = VAE.run, 0

    def counted(self: VAE, x: torch.Tensor) -> Any:
        nonlocal images
        images += 1
        if images == number:
            action()
        return run(self, x)

    monkeypatch.setattr(VAE, "run", counted)


def test_files_are_finished_while_the_next_images_are_measured(
    tmp_path: Path, shard_folder: Path, five_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the first waits for the third image here; all ends as it does without threads."""
    assert main(words_of(tmp_path / "plain", shard_folder, five_images)) == 0
    (plain,) = runs(tmp_path / "plain")
    third, write_file, set_type = threading.Event(), TucModel.write, torch.set_default_dtype
    touched = set()

    def late(self: TucModel, *args: Any) -> bytes:
        assert third.wait(60)
        assert torch.get_num_threads() == 1
        return write_file(self, *args)

    def noted(dtype: torch.dtype) -> None:
        touched.add(threading.current_thread())
        set_type(dtype)

    at_image(3, third.set, monkeypatch)
    monkeypatch.setattr(TucModel, "write", late)
    monkeypatch.setattr(torch, "set_default_dtype", noted)
    monkeypatch.setattr(coding, "threads_beside", lambda _: 2)
    assert main(words_of(tmp_path / "threads", shard_folder, five_images)) == 0
    (folder,) = runs(tmp_path / "threads")
    check(plain, folder)
    rows = [f / "images" / "step-00000001.json" for f in (plain, folder)]
    assert rows[0].read_bytes() == rows[1].read_bytes()
    assert touched == {threading.main_thread()}  # it is of all threads
    assert no_workers()


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_thread_ends_the_run(
    tmp_path: Path,
    shard_folder: Path,
    five_images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(self: TucModel, *args: Any) -> bytes:
        raise ModelFileError("this file cannot be written")

    monkeypatch.setattr(TucModel, "write", broken)
    assert main(words_of(tmp_path / "run", shard_folder, five_images)) == 1
    assert "tucodec: this file cannot be written\n" in capsys.readouterr().err
    assert no_workers()


@pytest.mark.usefixtures("two_threads")
def test_a_stop_drops_the_files_that_wait(
    tmp_path: Path, shard_folder: Path, five_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the fourth image: two files are begun, the third is dropped, and all are made anew."""
    assert main(words_of(tmp_path / "straight", shard_folder, five_images)) == 0
    words = words_of(tmp_path / "run", shard_folder, five_images)
    begun, dropped, write_file, cancel = [], threading.Event(), TucModel.write, Future.cancel

    def held(self: TucModel, *args: Any) -> bytes:
        begun.append(args)
        assert dropped.wait(60)
        return write_file(self, *args)

    def cancelled(self: Future[Any]) -> bool:
        dropped.set()
        return cancel(self)

    with monkeypatch.context() as patch:
        at_image(4, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        patch.setattr(TucModel, "write", held)
        patch.setattr(Future, "cancel", cancelled)
        assert main(words) == 75
    assert len(begun) == 2
    assert no_workers()
    (folder,) = runs(tmp_path / "run")
    assert "lines" in state(folder)["run"]  # the validation is still to be done
    assert not list((folder / "images").glob("*.json"))
    assert main(words) == 0
    check(runs(tmp_path / "straight")[0], folder)


@pytest.fixture
def three_threads_of_pytorch() -> Iterator[None]:
    own = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(own)


@pytest.mark.usefixtures("three_threads_of_pytorch")
def test_threads_finish_files_beside_a_gpu() -> None:
    """As many as there are cores left; PyTorch has one core in each, and what it had everywhere else."""
    assert threads_beside(torch.device("cpu")) == 0
    assert threads_beside(torch.device("cuda")) == 2
    workers, seen = FileWorkers(), []
    workers.begin(2)
    for _ in range(9):
        workers.do(lambda: seen.append(torch.get_num_threads()))
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    workers.finish()
    assert sorted(seen) == [1] * 9 + [3]
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    assert threads_beside(torch.device("cuda")) == 0


def test_few_files_wait() -> None:
    """Two for each thread, with those that are begun."""
    workers, free, done = FileWorkers(), threading.Event(), []
    workers.begin(1)
    for number in range(2):
        workers.do(lambda number=number: (free.wait(60), done.append(number)))
    third = threading.Thread(target=workers.do, args=(lambda: done.append(2),))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    free.set()
    third.join(60)
    workers.finish()
    assert done == [0, 1, 2]
