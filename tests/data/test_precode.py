"""Pre-coded shards: what is in them, that a stopped build goes on, and the batches made of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut

from data_pipelines import precode_vvc
from data_pipelines.precode_vvc import PrecodeOptions, precode
from data_pipelines.verify import stats, verify
from lightning_tucodec.cli import main
from lightning_tucodec.codecs.colour import planes_to_float
from lightning_tucodec.codecs.h266.vvc import Vvc
from lightning_tucodec.errors import ConfigError, DatasetError
from lightning_tucodec.training.input.batches import as_floats, data_plan
from lightning_tucodec.training.input.loader import PlanLoader
from lightning_tucodec.training.input.precoded import Precoded, PrecodedBatches, PrecodedSamples
from lightning_tucodec.training.input.shards import ShardReader
from lightning_tucodec.training.input.validation import in_order

CODECS = tuple(f"vvc:qp={qp},preset=faster,colour=orthonormal" for qp in (34, 44))
OPTIONS = PrecodeOptions(CODECS, per_photo=2, patch=32, shard_size=8, seed=3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    photo = astronaut()
    for number, (y, x) in enumerate(((40, 150), (300, 200))):
        Image.fromarray(photo[y : y + 65, x : x + 99]).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def built(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("precoded") / "out"
    precode([str(photos)], str(out), OPTIONS)
    return out


def test_samples_are_the_photo_and_its_decoded_planes(photos: Path, built: Path) -> None:
    reader = ShardReader(str(built))
    assert len(reader) == 2 * 2 * 6  # photos × settings × places
    assert len(reader.index.names) == 3
    images = {path.name: np.asarray(Image.open(path).convert("RGB")) for path in photos.iterdir()}
    decoded = {}
    for name, image in images.items():
        for text in CODECS:
            qp = int(text[7:9])
            codec = Vvc(qp, "faster", colour="orthonormal")
            decoded[name, qp] = codec.decode_picture(codec.encode(image))[0]
    found = set()
    for number in range(len(reader)):
        sample = Precoded.from_bytes(reader.encoded(number), 32)
        assert sample.transform == "orthonormal"
        for (name, qp), planes in decoded.items():
            whole = Precoded(images[name], planes, qp, "orthonormal")
            for y in range(0, 65 - 31, 2):
                for x in range(0, 99 - 31, 2):
                    if qp == sample.qp and np.array_equal(
                        images[name][y, x : x + 32], sample.original[0]
                    ):
                        assert whole.cut(x, y, 32).to_bytes() == sample.to_bytes()
                        found.add((name, qp, x, y))
    assert len(found) == len(reader)


def test_verify_reads_precoded_shards(built: Path, tmp_path: Path) -> None:
    assert verify(str(built)) == (24, 3, [])
    shutil.copytree(built, tmp_path / "bad")
    data = bytearray((built / "shard-000001.tar").read_bytes())
    data[json.loads((built / "index.json").read_text())["shards"][1]["offsets"][3]] ^= 1
    (tmp_path / "bad" / "shard-000001.tar").write_bytes(data)
    (wrong,) = verify(str(tmp_path / "bad")).wrong
    assert wrong.endswith("shard-000001.tar: SHA-256 differs from the index")
    with pytest.raises(DatasetError, match="no plain pictures"):
        stats(str(built), str(tmp_path / "stats.png"))


def test_a_stopped_build_goes_on_and_codes_nothing_twice(
    photos: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded = []
    original = Vvc.encode

    def encode(self: Vvc, image: np.ndarray) -> bytes:
        if len(coded) == 2 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        coded.append(self.qp)
        return original(self, image)

    monkeypatch.setattr(Vvc, "encode", encode)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        precode([str(photos)], str(out), OPTIONS)
    assert not (out / "index.json").exists()
    (tmp_path / "again").touch()
    precode([str(photos)], str(out), OPTIONS)
    assert len(coded) == 4
    for path in sorted(built.glob("*.tar")):
        assert path.read_bytes() == (out / path.name).read_bytes()
    # Other shards of the same photographs find the streams in the cache.
    other = PrecodeOptions(CODECS, per_photo=2, patch=48)
    precode([str(photos)], str(tmp_path / "other"), other, cache=str(out / "streams"))
    assert len(coded) == 4
    # Complete: nothing is done; other options are refused.
    assert precode([str(photos)], str(out), OPTIONS)["samples"] == 24
    with pytest.raises(DatasetError, match="holds a build of other photographs or options"):
        precode([str(photos)], str(out), other)


@pytest.mark.parametrize("step", ["_deal", "describe_shard"])
def test_another_process_may_complete_the_build_meanwhile(
    photos: Path, built: Path, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one ends, and takes the records away, before a step of this one."""
    honest, out = getattr(precode_vvc, step), str(tmp_path / "out")
    cache = str(built / "streams")

    def late(*arguments: Any) -> Any:
        monkeypatch.setattr(precode_vvc, step, honest)
        precode([str(photos)], out, OPTIONS, cache=cache)
        return honest(*arguments)

    monkeypatch.setattr(precode_vvc, step, late)
    precode([str(photos)], out, OPTIONS, cache=cache)
    for path in sorted(built.glob("*.tar")):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_a_photo_that_cannot_be_read_is_named(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(DatasetError, match=r"gone\.png cannot be read"):
        precode([str(tmp_path)], str(tmp_path / "out"), OPTIONS)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (PrecodeOptions(CODECS, patch=33), "--patch 33: must be even"),
        (PrecodeOptions(CODECS, per_photo=3), "--per-photo 3: there are 2 settings"),
        (PrecodeOptions(("hevc:qp=30",), 1), "only H.266"),
        (PrecodeOptions(CODECS, shard_size=0), "--shard-size 0"),
    ],
)
def test_options_that_cannot_work(photos: Path, options: PrecodeOptions, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        precode([str(photos)], "out", options)


def test_batches_do_not_depend_on_workers_and_fit_together(built: Path) -> None:
    reader = ShardReader(str(built))
    batches = PrecodedBatches(reader, data_plan(reader, 1), 5, 16, True)
    own, shared = PlanLoader(batches), PlanLoader(batches, num_workers=1)
    for first, second in zip(own, shared, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name]), name
        assert first["image"].shape == (5, 16, 16, 3)
        assert first["image"].dtype == torch.uint8
        assert first["chroma"].shape == (5, 2, 8, 8)
        error = (first["plain"] - as_floats(first["image"])).square().mean((1, 2, 3))
        assert (error < 10**-1.7).all()
    shared.close()
    with pytest.raises(ConfigError, match="must be even"):
        PrecodedBatches(reader, data_plan(reader, 1), 5, 15, True)


def test_workers_do_all_that_is_to_be_computed(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ShardReader(str(built))
    batches = PrecodedBatches(reader, data_plan(reader, 1), 5, 16, True)
    loader = PlanLoader(batches, num_workers=1)
    stream = iter(loader)
    next(stream)
    for name in ("decoded_picture", "Precoded"):
        monkeypatch.delattr(f"lightning_tucodec.training.input.precoded.{name}")
    assert len(list(stream)) == len(loader) - 1
    loader.close()


def test_whole_patches_in_order(built: Path) -> None:
    samples = PrecodedSamples(str(built))
    assert [len(batch["index"]) for batch in (samples[0], samples[1], samples[2])] == [8, 8, 8]
    first = samples[0]
    sample = Precoded.from_bytes(samples.reader.encoded(0), 32)
    plain = planes_to_float(sample.planes, sample.transform) / 255
    assert np.allclose(first["plain"][0].numpy(), plain, atol=1e-6)
    assert first["qp"][0] == sample.qp
    assert [int(i) for batch in in_order(samples) for i in batch["index"]] == list(range(24))


def test_command_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    words = ["shards", "precode", str(photos), "--out", out, "--patch", "48", "--workers", "1"]
    assert main([*words, "--codec", CODECS[1], "--per-photo", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == 4
    assert main([*words, "--per-photo", "1", "--codec", "jpeg:q=30"]) == 1
    assert "only H.266" in capsys.readouterr().err
