"""Builds: the same bytes however the work is split, and clear words when something is wrong."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generated import OPTIONS, photo_folder, picture
from PIL import Image

from data_pipelines import shards as builder
from data_pipelines.duplicates import near_duplicates
from data_pipelines.options import BuildOptions
from data_pipelines.patches import contrast, decode_patch, encode_patch, grid, luma
from data_pipelines.shards import Part, build
from data_pipelines.verify import stats, verify
from lightning_tucodec.cli import main
from lightning_tucodec.errors import ConfigError, DatasetError
from lightning_tucodec.io.storage import Storage
from lightning_tucodec.training.input.shards import ShardIndex

Content = Callable[[Path], dict[str, bytes]]


def samples(folder: Path) -> list[dict[str, Any]]:
    """Metadata of all samples in order."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = [member for member in tar if member.name.endswith(".json")]
            found += [json.loads(tar.extractfile(member).read()) for member in members]  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    "parts", [[], ["1/1"], ["2/2", "1/2", "2/2"], ["3/3", "1/3", "3/3", "2/3"]]
)
def test_any_split_gives_the_same_bytes(
    photos: Path, shards: Path, tmp_path: Path, content: Content, workers: int, parts: list[str]
) -> None:
    for text in parts:
        part = Part(*map(int, text.split("/")))
        assert build([str(photos)], str(tmp_path / "out"), OPTIONS, part=part).contents is None
    build([str(photos)], str(tmp_path / "out"), OPTIONS, workers=workers)
    assert content(tmp_path / "out") == content(shards)


def test_parts_write_their_shards_once_all_have_inspected(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = build([str(photos)], str(out), OPTIONS, part=Part(1, 2))
    assert "to inspect" in first.missing
    assert not list(out.glob("*.tar"))
    second = build([str(photos)], str(out), OPTIONS, part=Part(2, 2))
    assert "5 of 9 shards" in second.missing
    assert build([str(photos)], str(out), OPTIONS, part=Part(1, 2)).missing == ""
    assert not (out / "index.json").exists()


def test_the_folder_may_be_mounted_elsewhere(
    photos: Path, shards: Path, tmp_path: Path, content: Content
) -> None:
    shutil.copytree(photos, tmp_path / "mount" / "set")
    build([str(tmp_path / "mount" / "set")], str(tmp_path / "out"), OPTIONS)
    assert content(tmp_path / "out") == content(shards)


def test_a_tar_gives_the_same_patches(photos: Path, shards: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(photos, arcname=".")
    build([str(tmp_path / "set.tar")], str(tmp_path / "out"), OPTIONS)
    hashes = [one["sha256"] for one in samples(shards)]
    assert Counter(hashes) == Counter(one["sha256"] for one in samples(tmp_path / "out"))
    whole = (tmp_path / "set.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    for name in ("cut.tar", "bad.tar"):
        with pytest.raises(DatasetError, match="not an uncompressed tar"):
            build([str(tmp_path / name)], str(tmp_path / "other"), OPTIONS)


@pytest.mark.parametrize("encoding", ["webp", "png", "raw"])
def test_samples_are_the_pixels_of_the_photographs(
    photos: Path, tmp_path: Path, encoding: str
) -> None:
    build([str(photos)], str(tmp_path), replace(OPTIONS, encoding=encoding, count=40))
    assert verify(str(tmp_path)).wrong == []
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert {member.mtime for member in tar} == {0}
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    for name, data in files.items():
        if not name.endswith(".json"):
            meta = json.loads(files[f"{name.split('.')[0]}.json"])
            photo = np.asarray(Image.open(photos / meta["image"]))
            x, y = meta["x"], meta["y"]
            assert np.array_equal(decode_patch(data, encoding), photo[y : y + 32, x : x + 32])


def test_no_image_of_a_source_is_left_out(
    photos: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linked folders and files, a link as source, `file://`, `~`: the same photographs every time."""
    expected = Counter(one["sha256"] for one in samples(shards))
    source = tmp_path / "home" / "source"
    source.mkdir(parents=True)
    (source / "sub").symlink_to(photos)
    (source / "loop").symlink_to(source)
    (tmp_path / "link").symlink_to(photos)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for number, location in enumerate(
        (str(source), str(tmp_path / "link"), photos.as_uri(), "~/source")
    ):
        out = tmp_path / f"out{number}"
        build([location], str(out), OPTIONS)
        assert Counter(one["sha256"] for one in samples(out)) == expected, location
        assert (out / "rejected.jsonl").read_text() == ""
    (tmp_path / "one.png").symlink_to(photos / "photo000.png")
    build([str(tmp_path / "one.png")], str(tmp_path / "single"), OPTIONS)
    assert {one["image"] for one in samples(tmp_path / "single")} == {"photo000.png"}


def test_names_that_are_not_utf8_are_sound_metadata(photos: Path, tmp_path: Path) -> None:
    source = tmp_path / "set"
    source.mkdir()
    name = os.fsdecode(b"bad\xff.png")
    shutil.copy(photos / "photo000.png", source / name)
    out = tmp_path / "out"
    build([str(source)], str(out), OPTIONS)
    for shard in out.glob("*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    data = tar.extractfile(member)
                    assert data is not None
                    assert json.loads(data.read().decode("utf-8"))["image"] == name
    assert main(["shards", "verify", str(out)]) == 0


def test_shards_below_the_photographs_are_none_of_them(photos: Path, tmp_path: Path) -> None:
    source = tmp_path / "set"
    shutil.copytree(photos, source)
    with pytest.raises(DatasetError, match="is the folder of the photographs"):
        build([str(source)], str(source), OPTIONS)
    first = build([str(source)], str(source / "shards"), OPTIONS)
    again = build([str(source)], str(source / "shards"), OPTIONS)
    assert json.dumps(again.contents) == json.dumps(first.contents)
    assert first.contents is not None
    assert first.contents["rejected"].get("unreadable", 0) == 0


def test_what_cannot_be_read_is_listed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder without permission and a link that leads nowhere; root reads all, so scandir refuses."""
    source = tmp_path / "set"
    shutil.copytree(photos, source)
    (source / "secret").mkdir()
    (source / "gone.png").symlink_to(tmp_path / "nothing")
    (source / "more").symlink_to(tmp_path / "nothing")
    os.mkfifo(source / "pipe.jpg")  # to open it would wait for ever
    for name in ("rest.tar", "rest.zip", "._rest.tar", "notes.txt"):
        (source / name).write_bytes(b"x")
    with tarfile.open(tmp_path / "inner.tar", "w") as tar:
        for name in ("photo000.png", "rest.tar"):
            tar.add(source / name, name)
    honest = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return honest(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", scandir)
        sources = [str(source), str(tmp_path / "inner.tar")]
        summary = build(sources, str(tmp_path / "out"), OPTIONS)
    rows = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert sorted(
        (row["source"], row["image"], row["reason"].split(":")[0])
        for row in rows
        if row["kind"] == "unreadable"
    ) == [
        ("inner.tar", "rest.tar", "an archive inside a source; name it as a source"),
        ("set", "gone.png", "[Errno 2] No such file or directory"),
        ("set", "more", "[Errno 2] No such file or directory"),
        ("set", "pipe.jpg", "a pipe, socket or device, not a file"),
        ("set", "rest.tar", "an archive inside a source; name it as a source"),
        ("set", "rest.zip", "an archive inside a source; name it as a source"),
        ("set", "secret/", "the folder may not be read (permissions)"),
    ]
    assert summary.contents is not None
    assert summary.contents["rejected"]["unreadable"] == 7
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "rest.tar").touch()
    with pytest.raises(DatasetError, match=r"no images .* found; name rest\.tar as a source"):
        build([str(tmp_path / "empty")], str(tmp_path / "none"), OPTIONS)


@pytest.mark.parametrize("name", ["set.tar.gz", "set.tgz", "set.zip", "set.tar.zst"])
def test_packed_archives_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"packed")
    with pytest.raises(DatasetError, match="packed archive; unpack it first"):
        build([str(tmp_path / name)], str(tmp_path / "out"), OPTIONS)


@pytest.mark.parametrize("step", ["_inspect", "_notes", "_write", "_finish"])
def test_another_process_may_complete_the_build_meanwhile(
    photos: Path, shards: Path, tmp_path: Path, content: Content, step: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The other one ends, and takes the notes away, right before a step of this one."""
    honest = getattr(builder._Build, step)
    out = str(tmp_path / "out")

    def late(job: Any, *rest: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(builder._Build, step, honest)
            build([str(photos)], out, OPTIONS)
        return honest(job, *rest)

    monkeypatch.setattr(builder._Build, step, late)
    build([str(photos)], out, OPTIONS)
    assert content(tmp_path / "out") == content(shards)


def _spoilt(index: dict[str, Any], place: str, value: Any) -> bytes:
    if place == "whole":
        return value if isinstance(value, bytes) else json.dumps(value).encode()
    (index["shards"][1] if place.startswith("shard ") else index)[place.split()[-1]] = value
    return json.dumps(index).encode()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("whole", []), ("whole", b"[" * 100_000), ("whole", b"\xff"), ("shards", []),
        ("shards", [3]), ("patch", 0), ("patch", 1 << 40), ("patch", float("inf")),
        ("shard sha256", "../../outside"), ("shard sha256", "A" * 64), ("shard sha256", None),
        ("shard name", "../shard.tar"), ("shard name", "/etc/passwd"), ("shard name", ".hidden"),
        ("shard name", "shard-000000.tar"), ("shard name", ""), ("shard bytes", 100),
        ("shard bytes", -1), ("shard bytes", 1 << 70), ("shard samples", 15),
        ("shard samples", -1), ("shard offsets", [0] * 15), ("shard offsets", [-1] * 16),
        ("shard offsets", [1 << 62] * 16), ("shard offsets", [[0]] * 16),
        ("shard sizes", [1 << 62] * 16), ("shard sizes", "many"),
    ],
)  # fmt: skip
def test_an_index_that_cannot_be_is_refused(
    shards: Path, tmp_path: Path, place: str, value: Any
) -> None:
    index = json.loads((shards / "index.json").read_text())
    (tmp_path / "index.json").write_bytes(_spoilt(index, place, value))
    with pytest.raises(DatasetError, match=r"index\.json: damaged index") as caught:
        ShardIndex.read(Storage(tmp_path))
    assert "\n" not in str(caught.value)


def test_count_is_dealt_out_evenly(photos: Path, tmp_path: Path) -> None:
    summary = build([str(photos)], str(tmp_path), replace(OPTIONS, count=60))
    assert summary.contents is not None
    assert summary.contents["samples"] == 60
    shares = Counter(one["image"] for one in samples(tmp_path))
    assert len(shares) == 23
    assert set(shares.values()) == {2, 3}
    index = json.loads((tmp_path / "index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [16, 16, 16, 12]


def test_too_few_patches_are_said(photos: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["shards", "build", str(photos), "--out", str(tmp_path), "--patch", "32"]
    assert main([*words, "--count", "10000", "--workers", "1", "--duplicate-bits", "-1"]) == 0
    out, err = capsys.readouterr()
    assert "138 patches in 1 shards" in out
    assert f"{tmp_path}: the images have 138 patches within these limits" in err
    assert "fewer than --count 10000 allows" in err
    assert "tucodec:" not in err  # which begins an error


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_overlap_stays_below_its_limit(overlap: float) -> None:
    for key in range(20):
        corners = grid(211, 160, 32, overlap, key)
        assert len(corners) >= 30
        for (x1, y1), (x2, y2) in combinations(corners, 2):
            across, down = 32 - abs(x1 - x2), 32 - abs(y1 - y2)
            assert min(across, down) <= overlap * 32
        assert all(0 <= x <= 211 - 32 and 0 <= y <= 160 - 32 for x, y in corners)
    assert grid(31, 100, 32, 0.0, 1) == []


def test_scales_and_long_edge(photos: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, long_edge=80, scales=(1.0, 0.8))
    build([str(photos)], str(tmp_path), options)
    assert {one["scale"] for one in samples(tmp_path)} == {0.8, 0.64}
    assert verify(str(tmp_path)).wrong == []


def test_unusable_images_are_listed_and_do_not_stop_the_build(tmp_path: Path) -> None:
    source = photo_folder(tmp_path / "set", 3)
    (source / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    whole = (source / "photo000.png").read_bytes()
    (source / "cut.png").write_bytes(whole[:500])
    (source / "same.png").write_bytes(whole)
    Image.fromarray(picture(1)).save(source / "photo001.jpg", quality=80)
    Image.fromarray(picture(2)).resize((120, 84)).save(source / "larger.png")
    Image.new("RGB", (80, 80), (9, 9, 9)).save(source / "flat.png")
    Image.new("RGB", (10, 80)).save(source / "small.png")
    options = replace(OPTIONS, duplicate_bits=4)
    summary = build([str(source)], str(tmp_path / "out"), options)
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    ]
    assert {row["image"]: row["kind"] for row in rows} == {
        "damaged.jpg": "unreadable", "cut.png": "unreadable", "same.png": "duplicate",
        "photo001.png": "duplicate", "photo002.png": "duplicate", "flat.png": "flat",
        "small.png": "small",
    }  # fmt: skip
    reasons = {row["image"]: row["reason"] for row in rows}
    assert reasons["photo002.png"] == "same picture as set/larger.png"
    assert reasons["same.png"] == "same picture as set/photo000.png"
    assert "truncated" in reasons["cut.png"]
    assert summary.contents is not None
    assert summary.contents["rejected"] == {"duplicate": 3, "flat": 1, "small": 1, "unreadable": 2}


def test_near_duplicates_match_all_pairs() -> None:
    rng = np.random.default_rng(1)
    base = rng.integers(0, 2**63, 60, dtype=np.uint64)
    flips = np.array([sum(1 << int(b) for b in rng.choice(64, k, False)) for k in range(7)], object)
    hashes = np.array([int(h) ^ int(f) for h in base for f in flips], np.uint64)
    hashes = hashes[rng.permutation(len(hashes))]
    for bits in (0, 3, 5):
        kept: list[int] = []
        expected = {}
        for number, value in enumerate(hashes.tolist()):
            near = [k for k in kept if (value ^ hashes.tolist()[k]).bit_count() <= bits]
            if near:
                expected[number] = near[0]
            else:
                kept.append(number)
        assert near_duplicates([str(n) for n in range(len(hashes))], hashes, bits) == expected


def test_licences(photos: Path, tmp_path: Path) -> None:
    def noted(name: str, **more: Any) -> list[str]:
        summary = build([str(photos), str(other)], str(tmp_path / name), OPTIONS, **more)
        assert summary.contents is not None
        return [source["licence"] for source in summary.contents["sources"]]

    other = photo_folder(tmp_path / "other", 2)
    (other / "LICENSE").write_text("CC0 1.0\n")
    assert noted("a") == ["not stated", "CC0 1.0"]
    assert noted("b", licences=["all rights"]) == ["all rights", "all rights"]
    assert noted("c", licences=["one", "two"]) == ["one", "two"]
    with pytest.raises(ConfigError, match="3 licence notes for 2"):
        noted("d", licences=["1", "2", "3"])


def test_an_interrupted_build_goes_on(
    photos: Path, shards: Path, tmp_path: Path, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "out", []
    honest = builder._write_shard

    def dies(locations: Any, where: str, number: int, *rest: Any) -> None:
        calls.append(number)
        if number == 4 and len(calls) < 6:
            raise KeyboardInterrupt
        honest(locations, where, number, *rest)

    monkeypatch.setattr(builder, "_write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        build([str(photos)], str(out), OPTIONS)
    build([str(photos)], str(out), OPTIONS)
    assert calls == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert content(out) == content(shards)
    (out / "shard-000006.tar").unlink()  # and a complete one mends what is missing
    build([str(photos)], str(out), OPTIONS)
    assert calls[10:] == [6]
    assert content(out) == content(shards)


def test_other_options_or_photographs_are_refused(
    shards: Path, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match="other photographs"):
        build([str(photos)], str(shards), replace(OPTIONS, seed=9))
    other = photo_folder(tmp_path / "set", 22)
    with pytest.raises(DatasetError, match="other photographs"):
        build([str(other)], str(shards), OPTIONS)


def test_a_photograph_that_changes_during_the_build_is_named(tmp_path: Path) -> None:
    source = photo_folder(tmp_path / "set", 17)
    build([str(source)], str(tmp_path / "out"), OPTIONS, part=Part(1, 2))
    data = bytearray((source / "photo001.png").read_bytes())
    data[-20] ^= 1
    (source / "photo001.png").write_bytes(data)
    with pytest.raises(DatasetError, match=r"photo001\.png changed"):
        build([str(source)], str(tmp_path / "out"), OPTIONS)


def test_a_full_disk_is_said_and_survived(
    photos: Path, shards: Path, tmp_path: Path, content: Content
) -> None:
    """The kernel refuses to write more than 30 kB a file, as a full disk would."""
    words = ["shards", "build", str(photos), "--out", str(tmp_path / "out"), "--patch", "32",
             "--shard-size", "16", "--duplicate-bits", "-1", "--workers", "1"]  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-m", "lightning_tucodec.cli", *words],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)),
    )
    assert ended.returncode == 1
    assert "no space left" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list((tmp_path / "out").glob("*.tar"))
    assert not list((tmp_path / "out").glob(".shard*"))
    assert main(words) == 0
    assert content(tmp_path / "out") == content(shards)


def test_verify_names_what_is_wrong(shards: Path, tmp_path: Path, capsys: Any) -> None:
    assert verify(str(shards)) == (138, 9, [])
    shutil.copytree(shards, tmp_path / "bad")
    index = json.loads((shards / "index.json").read_text())
    (tmp_path / "bad" / "shard-000001.tar").unlink()
    with open(tmp_path / "bad" / "shard-000002.tar", "r+b") as stream:
        stream.truncate(5000)
    with open(tmp_path / "bad" / "shard-000003.tar", "r+b") as stream:
        stream.seek(index["shards"][3]["offsets"][5] + 40)
        stream.write(b"\0\0\0\0\0\0")
    wrong = verify(str(tmp_path / "bad")).wrong
    text = "\n".join(wrong)
    assert "shard-000001.tar: is missing" in text
    assert "shard-000002.tar: has 5000 bytes" in text
    assert "shard-000003.tar: SHA-256 differs" in text
    assert "shard-000003.tar: sample 000000053" in text
    assert "shard-000004" not in text
    assert main(["shards", "verify", str(tmp_path / "bad"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["wrong"] == wrong
    assert main(["shards", "verify", str(shards)]) == 0
    assert "all as the index says" in capsys.readouterr().out


def test_stats_draws_a_picture(shards: Path, tmp_path: Path) -> None:
    report = stats(str(shards), str(tmp_path / "stats.png"))
    assert report["samples"] == 138
    assert report["sources"] == {"set": 1.0}
    with Image.open(tmp_path / "stats.png") as image:
        assert image.size == (1600, 900)


def test_user_errors_are_one_line(tmp_path: Path, photos: Path, capsys: Any) -> None:
    out = ["--out", str(tmp_path / "out")]
    for words in (
        ["shards", "build", str(tmp_path / "none"), *out],
        ["shards", "build", str(tmp_path), *out],
        ["shards", "build", str(photos), *out, "--max-overlap", "1"],
        ["shards", "build", str(photos), *out, "--patch", "0"],
        ["shards", "build", str(photos), *out, "--scales", "2"],
        ["shards", "build", str(photos), *out, "--min-contrast", "nan"],
        ["shards", "build", str(photos), *out, "--min-contrast", "inf"],
        ["shards", "build", str(photos), *out, "--max-overlap", "nan"],
        ["shards", "build", str(photos), *out, "--scales", "1,nan"],
        ["shards", "build", str(photos), *out, "--duplicate-bits", "99"],
        ["shards", "build", str(photos), *out, "--workers", "-1"],
        ["shards", "build", str(photos), *out, "--part", "3/2"],
        ["shards", "build", str(photos), *out, "--patch", "500", "--workers", "1"],
        ["shards", "verify", str(tmp_path)],
        ["shards", "stats", str(tmp_path)],
    ):
        assert main(words) == 1, words
        err = [line for line in capsys.readouterr().err.splitlines() if "inspect:" not in line]
        assert len(err) == 1
        assert err[0].startswith("tucodec: ")
    with pytest.raises(SystemExit):
        main(["shards", "build", str(photos), *out, "--part", "half"])


def test_contrast_and_encodings() -> None:
    assert contrast(luma(np.full((8, 8, 3), 77, np.uint8))) == 0
    pixels = picture(3, 40, 40)
    assert contrast(luma(pixels)) > 10
    for encoding in ("webp", "png", "raw"):
        assert np.array_equal(decode_patch(encode_patch(pixels, encoding), encoding), pixels)


def test_defaults_are_checked() -> None:
    BuildOptions().check()
    with pytest.raises(ConfigError, match="long-edge"):
        BuildOptions(patch=256, long_edge=200).check()
    with pytest.raises(ConfigError, match="format"):
        BuildOptions(encoding="gif").check()


def test_a_long_tmpdir_holds_no_socket_and_needs_none(photo_folder: Path, tmp_path: Path) -> None:
    """Slurm's job folders, or pytest's, may be longer than a socket's name can be."""
    far = tmp_path / ("x" * 60) / ("y" * 40)
    far.mkdir(parents=True)
    words = ["shards", "build", str(photo_folder), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lightning_tucodec.cli",
            *words,
            "--patch",
            "32",
            "--workers",
            "2",
            "--shard-size",
            "2",
        ],
        env={**os.environ, "TMPDIR": str(far)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "index.json").exists()
    assert list(far.iterdir()) == []
