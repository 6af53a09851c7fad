"""Copies of runs elsewhere: what comes back is what was stored, from whatever server, or nothing."""

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hits import kill_at_step, start, wait

from lightning_tucodec.cli import main
from lightning_tucodec.errors import DatasetError
from lightning_tucodec.training.beside import companions, mirror
from lightning_tucodec.training.beside import pull as pulling
from lightning_tucodec.training.beside.pull import pull
from lightning_tucodec.training.runs.folder import RunFolder, read_metrics
from lightning_tucodec.training.runs.manifest import Manifest
from tests.support import MICRO, s3_environment
from tests.training.test_fit import config, same, state, without_time, write
from tests.training.test_fit import runs as run_folders


@pytest.fixture
def words(tmp_path: Path, shard_folder: Path) -> list[str]:
    """A fit of four steps that saves after each."""
    values = config(tmp_path, shard_folder, MICRO, steps=4)
    values["run"]["checkpoint_minutes"] = 0.0
    return ["fit", "--config", write(tmp_path, values)]


def test_two_clusters_with_a_bucket_between_them(
    tmp_path: Path, shard_folder: Path, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other roots; the second goes on where the mirror stands, and ends as the straight run does."""
    paths = {}
    for name in ("straight", "first", "second"):
        (tmp_path / name).mkdir()
        values = config(tmp_path / name, shard_folder, MICRO, steps=6)
        values["run"]["checkpoint_minutes"] = 0.0
        paths[name] = write(tmp_path / name, values)
    assert main(["fit", "--config", paths["straight"]]) == 0
    (straight,) = run_folders(tmp_path / "straight")

    assert wait(start(["fit", "--config", paths["first"]], kill_at_step(3))) == -9
    (first,) = run_folders(tmp_path / "first")
    copier = mirror.Mirror(RunFolder(first), bucket)
    assert copier.push()
    assert not copier.push()  # nothing has changed
    reached = state(first)["tucodec"]["opt_step"]

    capsys.readouterr()
    assert main(["fit", "--config", paths["second"], "--mirror", bucket]) == 0
    assert f"step {reached} comes from {bucket}" in capsys.readouterr().err
    (second,) = run_folders(tmp_path / "second")
    assert second.name == first.name == straight.name
    for part in ("state_dict", "optimizer_states", "tucodec", "run"):
        assert same(state(straight)[part], state(second)[part]), part
    expected = without_time(read_metrics(straight / "metrics.jsonl"))
    assert without_time(read_metrics(second / "metrics.jsonl")) == expected
    # The process beside the second run has brought its end to the mirror.
    index = mirror.read_index(RunFolder(second), bucket)
    assert index["checkpoints"][0]["step"] == 6
    attempts = Manifest(RunFolder(second)).read()["attempts"]
    assert [a["exit"] for a in attempts] == ["killed", "finished"]
    # Back on the first cluster there is nothing left to do, and the history is whole.
    assert main(["fit", "--config", paths["first"], "--mirror", bucket]) == 0
    assert state(first)["tucodec"]["opt_step"] == 6
    assert without_time(read_metrics(first / "metrics.jsonl")) == expected


def test_a_damaged_mirror_gives_its_older_generation(words: list[str], tmp_path: Path) -> None:
    url = str(tmp_path / "mirror")
    assert wait(start(words, kill_at_step(2))) == -9
    (folder,) = run_folders(tmp_path)
    mirror.Mirror(RunFolder(folder), url).push()
    older = state(folder)["tucodec"]["opt_step"]
    assert main(words) == 0
    mirror.Mirror(RunFolder(folder), url).push()
    checkpoints = tmp_path / "mirror" / folder.name / "checkpoints"
    (newest,) = checkpoints.glob("step-00000004-*.ckpt")
    newest.write_bytes(b"x" * newest.stat().st_size)
    elsewhere = RunFolder(tmp_path / "elsewhere" / folder.name)
    assert pull(elsewhere, url, None) == older
    assert state(elsewhere.path)["tucodec"]["opt_step"] == older
    images = state(elsewhere.path)["tucodec"]["images_seen"]
    assert pull(elsewhere, url, (older, images)) is None


def test_a_mirror_that_is_further_is_left_alone(words: list[str], tmp_path: Path) -> None:
    url = str(tmp_path / "mirror")
    assert main(words) == 0
    (folder,) = run_folders(tmp_path)
    mirror.Mirror(RunFolder(folder), url).push()
    behind = RunFolder(tmp_path / "behind" / folder.name)
    behind.checkpoints.mkdir(parents=True)
    content = {"tucodec": {"opt_step": 2}, "state_dict": {}}
    torch.save(content, behind.checkpoints / "last.ckpt")
    assert not mirror.Mirror(behind, url).push()
    assert mirror.read_index(behind, url)["checkpoints"][0]["step"] == 4


def test_a_state_before_the_first_step_comes_from_the_mirror(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a GAN has it whose discriminator has played alone."""
    url = str(tmp_path / "mirror")
    assert main(words) == 0
    (folder,) = run_folders(tmp_path)
    last = folder / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    content["tucodec"].update(opt_step=0, images_seen=0)
    torch.save(content, last)
    mirror.Mirror(RunFolder(folder), url).push()
    shutil.rmtree(folder)
    capsys.readouterr()
    assert main([*words, "--mirror", url]) == 0
    assert "step 0 comes from" in capsys.readouterr().err


@pytest.fixture(params=["no such protocol", "a file is in the way"])
def bad_mirror(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """One that cannot even be read, and one that is only found out by writing."""
    if request.param == "no such protocol":
        return "nosuchprotocol://x"
    (tmp_path / "file").write_text("in the way")
    return f"{tmp_path}/file"


def test_a_mirror_that_cannot_be_written_stops_only_a_run_that_has_nothing(
    words: list[str], tmp_path: Path, bad_mirror: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step, leaving nothing; later it is said at the start, at the end and by the status."""
    bad = ["--mirror", bad_mirror]
    assert main([*words, *bad]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tucodec: ")
    assert bad_mirror in line
    assert not (tmp_path / "runs").exists()

    assert wait(start(words, kill_at_step(2))) == -9
    assert main([*words, *bad]) == companions.UNMIRRORED
    lines = [line for line in capsys.readouterr().err.splitlines() if "tucodec: " in line]
    assert len(lines) == 2
    assert "goes on with what is here" in lines[0]
    assert "the end of this run, step 4, is not in its mirror" in lines[1]
    (folder,) = run_folders(tmp_path)
    attempt = Manifest(RunFolder(folder)).read()["attempts"][-1]
    assert (attempt["exit"], attempt["status"]) == (
        "finished",
        0,
    )  # the training itself is complete
    # The same command brings it there once the mirror works.
    good = str(tmp_path / "works")
    assert main([*words, "--mirror", good]) == 0
    assert mirror.read_index(RunFolder(folder), good)["checkpoints"][0]["step"] == 4


def test_two_states_of_one_step_are_two_files_of_a_mirror(words: list[str], tmp_path: Path) -> None:
    """As a GAN has them while its discriminator plays alone; the one with more images is further."""
    url = str(tmp_path / "mirror")
    assert main(words) == 0
    (folder,) = run_folders(tmp_path)
    last = folder / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    copier = mirror.Mirror(RunFolder(folder), url)
    for images in (4, 8):
        content["tucodec"].update(opt_step=0, images_seen=images)
        torch.save(content, last)
        assert copier.push()
    entries = mirror.read_index(RunFolder(folder), url)["checkpoints"]
    assert [(e["step"], e["images"]) for e in entries] == [(0, 8), (0, 4)]
    kept = {f"checkpoints/{p.name}" for p in (tmp_path / "mirror").glob("*/checkpoints/*")}
    assert kept == {e["name"] for e in entries}
    newest = tmp_path / "mirror" / folder.name / entries[0]["name"]
    elsewhere = RunFolder(tmp_path / "elsewhere" / folder.name)
    assert pull(elsewhere, url, (0, 4)) == 0
    assert state(elsewhere.path)["tucodec"]["images_seen"] == 8
    newest.write_bytes(b"")
    assert pull(elsewhere, url, None) == 0
    assert state(elsewhere.path)["tucodec"]["images_seen"] == 4
    assert pull(elsewhere, url, (0, 8)) is None


def test_a_mirror_that_is_removed_is_made_whole_again(words: list[str], tmp_path: Path) -> None:
    url = str(tmp_path / "mirror")
    assert main(words) == 0
    (folder,) = run_folders(tmp_path)
    copier = mirror.Mirror(RunFolder(folder), url)
    assert copier.push()
    there = tmp_path / "mirror" / folder.name
    before = {p.relative_to(there): p.read_bytes() for p in there.rglob("*") if p.is_file()}
    shutil.rmtree(there)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"opt_step": 99}\n')
    assert copier.push()
    after = {p.relative_to(there): p.read_bytes() for p in there.rglob("*") if p.is_file()}
    (old,), (new,) = ([p for p in f if p.name.startswith("metrics-")] for f in (before, after))
    assert after[new] == before[old] + b'{"opt_step": 99}\n'
    assert before.keys() - {old} == after.keys() - {new}
    changed = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    assert changed == {Path("mirror.json")}
    elsewhere = RunFolder(tmp_path / "elsewhere" / folder.name)
    assert pull(elsewhere, url, None) is not None


def test_a_mirror_of_an_earlier_version_is_read_and_goes_on(
    words: list[str], tmp_path: Path
) -> None:
    """It named checkpoints by their step alone, and wrote metrics over metrics before the index."""
    url = tmp_path / "mirror"
    assert wait(start(words, kill_at_step(2))) == -9
    (folder,) = run_folders(tmp_path)
    mirror.Mirror(RunFolder(folder), str(url)).push()
    index = url / folder.name / mirror.INDEX
    content = json.loads(index.read_text())
    for entry in content["checkpoints"]:
        del entry["images"]
        name = f"checkpoints/step-{entry['step']:08d}.ckpt"
        (index.parent / entry["name"]).rename(index.parent / name)
        entry["name"] = name
    for name, entry in content["files"].items():
        (index.parent / entry["name"]).rename(index.parent / name)
        entry["name"] = name
    with (index.parent / "metrics.jsonl").open("a") as stream:
        stream.write('{"opt_step": 99}\n')
    index.write_text(json.dumps(content))
    reached = state(folder)["tucodec"]["opt_step"]
    shutil.rmtree(folder)
    assert main([*words, "--mirror", str(url)]) == 0
    attempt = Manifest(RunFolder(folder)).read()["attempts"][-1]
    assert attempt["from_step"] == reached
    steps = [e["step"] for e in mirror.read_index(RunFolder(folder), str(url))["checkpoints"]]
    assert steps[0] == 4
    assert read_metrics(folder / "metrics.jsonl")[-1]["opt_step"] == 4
    # Replaced by what is named by content.
    mirror.Mirror(RunFolder(folder), str(url)).push()
    left = {path.name for path in index.parent.iterdir()}
    assert not left & {"metrics.jsonl", "manifest.json", "config.yaml"}


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory, shard_folder: Path) -> tuple[Path, Path]:
    """A run of two steps, and the folder of its mirror."""
    tmp_path = tmp_path_factory.mktemp("mirrored")
    values = config(tmp_path, shard_folder, MICRO, steps=2)
    assert main(["fit", "--config", write(tmp_path, values)]) == 0
    (folder,) = run_folders(tmp_path)
    (folder / "images").mkdir()
    (folder / "images" / "step-00000002.png").write_bytes(b"picture")
    mirror.Mirror(RunFolder(folder), str(tmp_path / "mirror")).push()
    return folder, tmp_path / "mirror" / folder.name


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [cut, changed, Path.unlink])
@pytest.mark.parametrize("kind", ["metrics", "manifest", "config"])
def test_a_damaged_file_of_a_mirror_is_refused(
    mirrored: tuple[Path, Path], tmp_path: Path, kind: str, harm: Any
) -> None:
    """By its name, and what is here stays as it is."""
    run, source = mirrored
    there = shutil.copytree(source, tmp_path / "mirror" / run.name)
    (path,) = there.glob(f"{kind}-*")
    harm(path)
    here = RunFolder(tmp_path / "here" / run.name)
    here.path.mkdir(parents=True)
    here.metrics.write_text("mine\n")
    with pytest.raises(DatasetError, match=rf"^{path}: .*; restore it, or remove {there}$"):
        pull(here, str(there.parent), None)
    assert here.metrics.read_text() == "mine\n"
    assert [p.name for p in here.path.rglob("*") if p.is_file()] == ["metrics.jsonl"]


def test_a_damaged_mirror_refuses_a_run_that_has_nothing_else(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = tmp_path / "mirror"
    assert main([*words, "--mirror", str(url)]) == 0
    (folder,) = run_folders(tmp_path)
    index = mirror.read_index(RunFolder(folder), str(url))
    path = url / folder.name / index["files"]["metrics.jsonl"]["name"]
    cut(path)
    shutil.rmtree(folder)
    capsys.readouterr()
    assert main([*words, "--mirror", str(url)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tucodec: {path}: its bytes are not what was stored")
    assert run_folders(tmp_path) == []


def test_a_damaged_picture_is_left_out(
    mirrored: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, source = mirrored
    there = shutil.copytree(source, tmp_path / "mirror" / run.name)
    picture = there / "images" / "step-00000002.png"
    picture.write_bytes(b"another")
    here = RunFolder(tmp_path / "here" / run.name)
    assert pull(here, str(there.parent), None) == 2
    assert capsys.readouterr().err == (
        f"tucodec: {picture}: its bytes are not what was stored; left out\n"
    )
    assert not here.images.exists()


def test_a_mirror_whose_copying_stops_anywhere_gives_a_whole_state(
    words: list[str], tmp_path: Path
) -> None:
    """After each write of a push and each removal: the old state or the new one, each with its files."""
    url = str(tmp_path / "mirror")
    assert wait(start(words, kill_at_step(2))) == -9
    (folder,) = run_folders(tmp_path)
    mirror.Mirror(RunFolder(folder), url).push()
    older = state(folder)["tucodec"]["opt_step"]
    lines = {older: read_metrics(folder / "metrics.jsonl")}
    before = shutil.copytree(tmp_path / "mirror", tmp_path / "before")
    assert main(words) == 0
    # As after a resume: not the former lines and more of them.
    rows = [{**row, "time": 0.0} for row in read_metrics(folder / "metrics.jsonl")]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines[4] = rows

    class StoppedError(Exception):
        pass

    came = []
    for stop in range(20):
        shutil.rmtree(url)
        shutil.copytree(before, url)
        copier = mirror.Mirror(RunFolder(folder), url)
        calls = iter(range(20))

        def counted(action: Any, calls: Any = calls, stop: int = stop) -> Any:
            def call(*arguments: Any) -> None:
                if next(calls) == stop:
                    raise StoppedError
                action(*arguments)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name in ("write", "remove"):
                patch.setattr(copier.storage, name, counted(getattr(copier.storage, name)))
            try:
                copier.push()
                ended = True
            except StoppedError:
                ended = False
        here = RunFolder(tmp_path / "here" / str(stop) / folder.name)
        step = pull(here, url, None)
        assert step is not None
        came.append(step)
        assert read_metrics(here.metrics) == lines[step]
        if ended:
            break
    assert came[0] == older
    assert came[-1] == 4
    assert came == sorted(came)
    assert len(came) > 5


def test_small_files_that_nobody_can_be_reading_any_more_are_removed(
    mirrored: tuple[Path, Path], tmp_path: Path
) -> None:
    run, _ = mirrored
    folder = RunFolder(shutil.copytree(run, tmp_path / "run" / run.name))
    copier = mirror.Mirror(folder, str(tmp_path / "mirror"))
    for number in range(4):
        with folder.metrics.open("a") as stream:
            stream.write(json.dumps({"opt_step": 10 + number}) + "\n")
        assert copier.push()
        kept = list((tmp_path / "mirror" / run.name).glob("metrics-*.jsonl"))
        assert len(kept) == min(number + 1, 2)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a server that takes connections and never answers."""
    import s3fs

    server = socket.create_server(("127.0.0.1", 0))
    accepted: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                accepted.append(server.accept()[0])
            except OSError:
                return

    thread = threading.Thread(target=accept)
    thread.start()
    for name, value in s3_environment(f"http://127.0.0.1:{server.getsockname()[1]}").items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield "s3://hangs/runs"
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()
    for connection in accepted:
        connection.close()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_server_that_hangs_does_not_hold_up_the_start(
    words: list[str],
    tmp_path: Path,
    hanging: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pulling, "ANSWER_SECONDS", 1.0)
    assert main([*words, "--mirror", hanging]) == 1
    assert capsys.readouterr().err == (
        f"tucodec: mirror {hanging}: no answer within 1 s; is its server up?\n"
    )
    assert not (tmp_path / "runs").exists()
    with pytest.raises(DatasetError, match="no answer within 1 s"):
        pulling.check_writable(hanging)
    # A run that has begun goes on without it.
    monkeypatch.setattr("lightning_tucodec.training.attempt._MIRROR_SECONDS", {"finished": 1.0})
    assert wait(start(words, kill_at_step(2))) == -9
    assert main([*words, "--mirror", hanging]) == companions.UNMIRRORED
    assert "no answer within 1 s; is its server up?; goes on with what is here" in (
        capsys.readouterr().err
    )
