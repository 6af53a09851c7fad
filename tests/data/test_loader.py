"""Shards to batches: the plan's samples exactly once, for any ranks, workers and interruptions."""

import copy
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import webdataset
from PIL import Image

from lightning_tucodec.errors import ConfigError, DatasetError
from lightning_tucodec.training.data import PatchDataModule
from lightning_tucodec.training.input.batches import RankBatches, data_plan
from lightning_tucodec.training.input.loader import PlanLoader
from lightning_tucodec.training.input.shards import ShardReader
from lightning_tucodec.training.input.validation import WholeImages, in_order

# More workers than this machine has cores are meant.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def loader(shards: Path, batch: int, rank: int = 0, world: int = 1, workers: int = 0) -> PlanLoader:
    reader = ShardReader(str(shards))
    plan = data_plan(reader, 5)
    return PlanLoader(RankBatches(reader, plan, batch, 24, True, rank, world), workers)


def take(loaders: list[PlanLoader], batches: int) -> list[dict[str, torch.Tensor]]:
    """Global batches, put together from the shares of all ranks."""
    streams = [endless(one) for one in loaders]
    return [
        {key: torch.cat([part[key] for part in parts]) for key in ("image", "index")}
        for parts in (list(map(next, streams)) for _ in range(batches))
    ]


def endless(one: PlanLoader) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from one


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x["index"], y["index"]) and torch.equal(x["image"], y["image"])
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("batch", [7, 138, 200])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_ranks_together_are_the_plan(shards: Path, batch: int, world: int) -> None:
    expected = take([loader(shards, batch)], 9)
    found = take([loader(shards, batch, rank, world) for rank in range(world)], 9)
    assert same(expected, found)
    positions = torch.cat([one["index"] for one in found])
    assert positions.tolist() == list(range(9 * batch))


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_workers_change_nothing(shards: Path, world: int, workers: int) -> None:
    expected = take([loader(shards, 10)], 30)
    found = take([loader(shards, 10, rank, world, workers) for rank in range(world)], 30)
    assert same(expected, found)


def test_batches_stay_as_they_were_handed_out(shards: Path) -> None:
    stream = endless(loader(shards, 10, workers=1))
    batches = [next(stream) for _ in range(12)]
    assert same(take([loader(shards, 10)], 12), batches)
    assert len({batch["image"].data_ptr() for batch in batches}) == 12


def test_a_batch_that_was_overwritten_is_refused(shards: Path) -> None:
    one = loader(shards, 10, workers=1)
    stream = endless(one)
    next(stream)
    assert one._shared is not None
    one._shared.starts = one._shared.starts - 1  # as if another batch lay in every slot
    with pytest.raises(RuntimeError, match="overwrote"):
        next(stream)


def test_samples_of_three_passes_are_each_there_three_times(shards: Path) -> None:
    one = loader(shards, 23)
    reader, plan = one.batches.reader, one.batches.plan
    positions = np.concatenate([batch["index"].numpy() for batch in take([one], 18)])
    counts = np.bincount(plan.indices(positions), minlength=len(reader))
    assert counts.tolist() == [3] * 138


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_world_size_changes_half_way(shards: Path, workers: int) -> None:
    expected = take([loader(shards, 12)], 24)
    found: list[dict[str, torch.Tensor]] = []
    state: dict[str, int] | None = None
    for world, batches in ((2, 5), (3, 6), (1, 2), (2, 11)):
        ranks = [loader(shards, 12, rank, world, workers) for rank in range(world)]
        if state is not None:
            for one in ranks:
                one.load_state_dict(state)
        found += take(ranks, batches)
        states = [one.state_dict() for one in ranks]
        assert states == [states[0]] * world
        state = states[0]
    assert same(expected, found)


def test_position_counts_what_was_handed_out_not_what_was_prefetched(shards: Path) -> None:
    one = loader(shards, 10, workers=2)
    stream = iter(one)
    next(stream)
    next(stream)
    assert one.state_dict()["position"] == 20


def test_an_iteration_ends_with_the_pass_and_the_next_goes_on(shards: Path) -> None:
    one = loader(shards, 20)
    assert len(one) == 7
    assert [len(list(one)) for _ in range(3)] == [7, 7, 7]
    one.load_state_dict({"position": 20 * 9, "samples": 138, "seed": 5})
    rest = list(one)
    assert len(rest) == 5
    assert rest[0]["index"].tolist() == list(range(180, 200))


def test_batches_are_bytes_and_stay_inside_the_patch(shards: Path) -> None:
    one = loader(shards, 64)
    batch = next(iter(one))
    assert batch["image"].shape == (64, 24, 24, 3)
    assert batch["image"].dtype == torch.uint8
    assert batch["index"].dtype == torch.int64
    reader = one.batches.reader
    samples = one.batches.plan.indices(batch["index"].numpy())
    flips = 0
    for image, sample in zip(batch["image"], samples.tolist(), strict=True):
        crop = image.numpy()
        patch = reader.pixels(sample)
        straight, mirrored = _contains(patch, crop), _contains(patch, crop[:, ::-1])
        assert straight or mirrored
        flips += mirrored and not straight
    assert 16 < flips < 48


def test_modules_get_floats_that_the_device_makes(shards: Path) -> None:
    """A sample goes over the bus as its bytes and its position; the values are exact."""
    data = PatchDataModule(str(shards), 8, crop=24)
    sent = next(iter(data.train_dataloader()))
    assert sum(value.nbytes for value in sent.values()) == 8 * (3 * 24 * 24 + 8)
    batch = data.on_after_batch_transfer(dict(sent), 0)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    expected = sent["image"].numpy().transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    assert np.array_equal(batch["image"].numpy(), expected)
    assert torch.equal(data.train_dataloader().batches.first(8), batch["image"])
    whole = {"image": torch.rand(1, 3, 30, 40), "index": torch.zeros(1)}
    assert data.on_after_batch_transfer(whole, 0)["image"].shape == (1, 3, 30, 40)


@pytest.mark.parametrize("workers", [0, 1])
def test_all_of_a_batch_is_in_memory_for_transfer(
    shards: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index too: CUDA may wait for its queue before it copies from memory that is not pinned."""
    made: list[torch.Tensor] = []

    def for_transfer(values: Any) -> torch.Tensor:
        made.append(torch.from_numpy(values.copy()))
        return made[-1]

    for module in ("batches", "loader"):
        path = f"lightning_tucodec.training.input.{module}.for_transfer"
        monkeypatch.setattr(path, for_transfer)
    batch = next(iter(loader(shards, 3, workers=workers)))
    assert {id(value) for value in batch.values()} == {id(value) for value in made}


def _contains(patch: Any, crop: Any) -> bool:
    side = len(crop)
    views = np.lib.stride_tricks.sliding_window_view(patch, (side, side), axis=(0, 1))
    return bool((views == crop.transpose(2, 0, 1)).all((2, 3, 4)).any())


def test_starting_leaves_the_global_random_state_alone(shards: Path) -> None:
    before = torch.random.get_rng_state()
    take([loader(shards, 10, workers=1)], 2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_checkpoint_of_other_shards_is_refused(shards: Path) -> None:
    one = loader(shards, 10)
    with pytest.raises(ConfigError, match="samples 99"):
        one.load_state_dict({"position": 10, "samples": 99, "seed": 5})
    with pytest.raises(ConfigError, match="seed 6"):
        one.load_state_dict({"position": 10, "samples": 138, "seed": 6})


@pytest.mark.filterwarnings("ignore:.*unclosed file:")  # webdataset leaves its streams open
def test_plain_webdataset_reads_the_shards(shards: Path) -> None:
    urls = sorted(str(path) for path in shards.glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
    reader = ShardReader(str(shards))
    count = 0
    for sample in dataset:
        assert np.array_equal(sample["webp"], reader.pixels(int(sample["__key__"])))
        assert sample["json"]["source"] == "set"
        count += 1
    assert count == len(reader) == 138


class _Recorder(pl.LightningModule):
    """Trains one weight and notes which positions it saw; stops or is reloaded at will."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], number: int) -> torch.Tensor:
        self.seen.append(batch["index"].tolist())
        return (self.weight - batch["image"].mean()) ** 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class _SaveAt(pl.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def _fit(
    shards: Path, root: Path, steps: int, save_at: int | None = None, resume: Path | None = None,
    workers: int = 0, **options: Any,
) -> tuple[list[list[int]], float]:  # fmt: skip
    module = _Recorder()
    data = PatchDataModule(str(shards), 16, crop=16, num_workers=workers, seed=3)
    callbacks = [] if save_at is None else [_SaveAt(save_at, root / "stop.ckpt")]
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, callbacks=callbacks,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=root, **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume)
    return module.seen, module.weight.item()


@pytest.mark.filterwarnings("ignore:.*(LeafSpec|`srun` command|but have no `validation_step`)")
@pytest.mark.parametrize("stop", [1, 4, 9, 13])
@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 4}])
def test_a_lightning_run_that_stops_anywhere_goes_on_exactly(
    shards: Path, tmp_path: Path, stop: int, options: dict[str, Any]
) -> None:
    whole, weight = _fit(shards, tmp_path, 21, **options)
    assert list(chain.from_iterable(whole)) == list(range(21 * 16))
    before, _ = _fit(shards, tmp_path, 21, save_at=stop, workers=stop % 2, **options)
    assert len(before) == stop
    after, resumed = _fit(shards, tmp_path, 21, resume=tmp_path / "stop.ckpt", **options)
    assert before + after == whole
    assert resumed == weight


@pytest.mark.filterwarnings("ignore:.*(LeafSpec|`srun` command|but have no `validation_step`)")
def test_reloading_the_loader_does_not_turn_back(shards: Path, tmp_path: Path) -> None:
    seen, _ = _fit(shards, tmp_path, 20, reload_dataloaders_every_n_epochs=1)
    assert list(chain.from_iterable(seen)) == list(range(20 * 16))


def test_validation_images(photos: Path) -> None:
    images = WholeImages(str(photos))
    assert [int(item["index"]) for item in in_order(images)] == list(range(23))
    image = images[4]["image"]
    expected = np.asarray(Image.open(photos / "photo004.png"))
    assert image.shape == (1, 70, 100, 3)
    assert np.array_equal(image[0].numpy(), expected)


def test_clear_errors(shards: Path, tmp_path: Path, photos: Path) -> None:
    with pytest.raises(DatasetError, match="not found"):
        ShardReader(str(tmp_path))
    with pytest.raises(ConfigError, match="crop 33"):
        PatchDataModule(str(shards), 4, crop=33).train_dataloader()
    with pytest.raises(DatasetError, match="no such folder"):
        PatchDataModule(str(shards), 4, val_images=str(tmp_path / "x")).val_dataloader()
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(DatasetError, match="damaged index"):
        ShardReader(str(tmp_path))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_is_named(shards: Path, tmp_path: Path, workers: int) -> None:
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = ShardReader(str(shards)).index
    with open(tmp_path / index.names[2], "r+b") as stream:
        stream.seek(int(index.offsets[35]))
        stream.write(bytes(64))
    with pytest.raises(DatasetError, match="sample 35 cannot be decoded") as caught:
        list(loader(tmp_path, 138, workers=workers))
    assert "\n" not in str(caught.value)


def test_a_missing_or_short_shard_is_named(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_bytes((shards / "index.json").read_bytes())
    with pytest.raises(DatasetError, match=r"shard-000000\.tar: is missing"):
        loader(tmp_path, 8)
    (tmp_path / "shard-000000.tar").write_bytes(b"short")
    with pytest.raises(DatasetError, match="has 5 bytes"):
        loader(tmp_path, 8)


def test_the_reader_can_be_copied_to_a_worker(shards: Path) -> None:
    reader = ShardReader(str(shards))
    before = reader.pixels(0)
    assert np.array_equal(copy.copy(reader).pixels(0), before)
