"""What comes from elsewhere writes nothing but its own files, and credentials stay at home."""

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_tucodec.cli import main
from lightning_tucodec.errors import DatasetError
from lightning_tucodec.training.beside import companions, mirror
from lightning_tucodec.training.beside.pull import pull
from lightning_tucodec.training.runs.folder import RunFolder, read_metrics
from lightning_tucodec.training.runs.manifest import Manifest
from tests.support import MICRO
from tests.training.test_fit import config, runs, write


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory, shard_folder: Path) -> tuple[Path, Path]:
    """A run of two steps, and the folder of its mirror."""
    tmp_path = tmp_path_factory.mktemp("mirrored")
    values = config(tmp_path, shard_folder, MICRO, steps=2)
    assert main(["fit", "--config", write(tmp_path, values)]) == 0
    (folder,) = runs(tmp_path)
    (folder / "images").mkdir()
    (folder / "images" / "step-00000002-a b.png").write_bytes(b"picture")
    (folder / "images" / "step-00000002.tmp").write_bytes(b"no picture")
    mirror.Mirror(RunFolder(folder), str(tmp_path / "mirror")).push()
    return folder, tmp_path / "mirror" / folder.name


def _files(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _entry(name: Any, data: bytes = b"x", **changes: Any) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    return {"name": name, "size": len(data), "sha256": digest, **changes}


NAMES = [
    "../../outside/sitecustomize.py", "/tmp/tucodec-hostile.py", "sitecustomize.py", ".lock",
    "images/../config.yaml", "images/step-00000001/../../x.png", "images/step-1.png",
    "images/step-00000001.py", "checkpoints/last.ckpt", "metrics.jsonl\n", "", ".",
]  # fmt: skip
INDICES: list[Any] = [
    *[{"files": {name: _entry(name)}} for name in NAMES],
    {"files": {"config.yaml": _entry("../../secret")}},
    {"files": {"config.yaml": _entry("config.yaml", size="1")}},
    {"files": {"config.yaml": _entry("config.yaml", sha256="../../etc/passwd")}},
    {"files": {"config.yaml": None}},
    {"files": 3},
    {"checkpoints": [{"step": 9, **_entry("../../outside/step-00000009.ckpt")}]},
    {"checkpoints": [{"step": 9, **_entry("checkpoints/step-00000008.ckpt")}]},
    {"checkpoints": [{"step": "9", **_entry("checkpoints/step-00000009.ckpt")}]},
    {"checkpoints": {"step": 9}},
    {"checkpoints": None},
]


@pytest.mark.parametrize("changes", [*INDICES, [], 3, None, "[" * 100_000], ids=lambda _: "")
def test_a_mirror_names_its_own_files_only(
    mirrored: tuple[Path, Path], tmp_path: Path, changes: Any
) -> None:
    """Neither taken nor written to, whatever the index is."""
    run, source = mirrored
    url = tmp_path / "a" / "b" / "mirror"
    shutil.copytree(source, url / run.name)
    index = url / run.name / mirror.INDEX
    content: Any = changes
    if isinstance(changes, dict):
        content = {**json.loads(index.read_text()), **changes}
        for kind in ("", "../", "../../"):  # what the names mean is there to be read
            (url / run.name / kind / "secret").write_text("secret")
    index.write_text(changes if isinstance(changes, str) else json.dumps(content))
    folder = RunFolder(tmp_path / "c" / "d" / run.name)
    before = _files(tmp_path)
    with pytest.raises(DatasetError, match=r"mirror\.json: damaged .* remove the mirror"):
        pull(folder, str(url), None)
    with pytest.raises(DatasetError, match="damaged"):
        mirror.Mirror(RunFolder(run), str(url))
    assert _files(tmp_path) == before
    assert not Path("/tmp/tucodec-hostile.py").exists()


def test_what_a_mirror_may_hold_comes_back(mirrored: tuple[Path, Path], tmp_path: Path) -> None:
    run, source = mirrored
    folder = RunFolder(tmp_path / run.name)
    assert pull(folder, str(source.parent), None) == 2
    kept = {path.relative_to(run).as_posix() for path in _files(run)}
    came = {path.relative_to(folder.path).as_posix() for path in _files(folder.path)}
    assert kept - came == {".lock", "images/step-00000002.tmp", "checkpoints/previous.ckpt"} & kept
    assert came <= kept


@pytest.mark.parametrize(
    "data",
    [
        b"\xff", b"[", b"3", b"[]", b'{"code": 3}', b'{"attempts": 3}', b'{"attempts": [3]}',
        b'{"attempts": [{}]}', b'{"attempts": {"start": 1}}',
        b'{"code": [{}], "attempts":[{"start":1,"host":"h","pid":1,"code":0,"exit":null}]}',
        b'{"code": [{}], "attempts":[{"start":"a","host":"h","pid":1,"code":7,"exit":null}]}',
        b'{"code": [{}], "attempts":[{"start":"a","host":"h","pid":1,"code":-1,"exit":null}]}',
    ],
)  # fmt: skip
def test_a_damaged_manifest_from_elsewhere_changes_nothing(
    mirrored: tuple[Path, Path], tmp_path: Path, data: bytes
) -> None:
    shutil.copytree(mirrored[0], tmp_path / "run")
    manifest = Manifest(RunFolder(tmp_path / "run"))
    before = manifest.read()
    assert before["attempts"]
    manifest.merge(data)
    assert manifest.read() == before
    manifest.path.write_bytes(data)
    assert manifest.read() == {}


def test_lines_that_are_none_are_dropped(
    mirrored: tuple[Path, Path], tmp_path: Path, shard_folder: Path
) -> None:
    """A write that was torn, or another's file: the run goes on."""
    values = config(tmp_path, shard_folder, MICRO, steps=2)
    (tmp_path / "runs").mkdir()
    folder = shutil.copytree(mirrored[0], tmp_path / "runs" / mirrored[0].name)
    rows = read_metrics(folder / "metrics.jsonl")
    with open(folder / "metrics.jsonl", "ab") as stream:
        stream.write(b'3\n[]\n{}\n{"opt_step": "x"}\n{"opt_step": 1, \xff\xfe\x00')
    assert main(["fit", "--config", write(tmp_path, values)]) == 0
    assert (folder / "metrics.jsonl").read_text() == "".join(json.dumps(r) + "\n" for r in rows)


def test_credentials_of_urls_are_written_nowhere(
    tmp_path: Path,
    shard_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither in the run folder nor in its mirror, in what is said, or in arguments of processes."""
    secret = "s3cr3t"
    started = []
    start = companions.subprocess.Popen

    def note(words: list[str], **more: Any) -> Any:
        started.extend(words)
        return start(words, **more)

    monkeypatch.setattr(companions.subprocess, "Popen", note)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards = shutil.copytree(shard_folder, tmp_path / f"in?token={secret}")
    values = config(tmp_path, shard_folder, MICRO, steps=2)
    values["data"]["shards"] = f"local://{shards}"
    values["run"].update(mirror=f"local://{tmp_path}/out?token={secret}", checkpoint_minutes=0.0)
    values["run"]["wandb"] = True
    path = write(tmp_path, values)
    assert main(["fit", "--config", path]) == 0
    (folder,) = runs(tmp_path)
    reached = tmp_path / f"out?token={secret}" / folder.name
    assert json.loads((reached / mirror.INDEX).read_text())["checkpoints"][0]["step"] == 2
    assert any("offline-run" in str(path) for path in _files(folder))
    kept = {**_files(folder), **_files(reached)}
    shutil.rmtree(folder)
    values["run"]["wandb"] = False  # it takes a while
    path = write(tmp_path, values)
    (newest,) = (reached / "checkpoints").glob("step-00000002-*.ckpt")
    newest.write_bytes(b"")
    assert main(["fit", "--config", path]) == 0
    assert main(["doctor", "--config", path]) == 0
    broken = copy.deepcopy(values)
    broken["run"]["mirror"] = f"nosuchprotocol://me:{secret}@host/a"
    broken["run"]["name"] = "other"
    path = write(tmp_path, broken)
    assert main(["fit", "--config", path]) == 1
    assert main(["doctor", "--config", path]) == 1
    assert main(["fit", "--config", path, "--run.threads", f"ftp://me:{secret}@host"]) == 2
    said = capsys.readouterr()
    assert secret not in said.err + said.out + " ".join(started)
    assert "token=***" in said.out
    assert "***@host" in said.err
    for file, data in [*kept.items(), *_files(folder).items(), *_files(reached).items()]:
        assert secret.encode() not in data, file
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["data"]["shards"].endswith("in?token=***")

    words = ["fit", "--config", str(folder / "config.yaml")]
    assert main(words) == 1
    assert "mirror: local://" in (line := capsys.readouterr().err)
    assert line.endswith("?token=*** has lost its credentials; give the URL again\n")
    words += ["--mirror", values["run"]["mirror"]]
    assert main(words) == 1
    assert "shards: local://" in capsys.readouterr().err
    assert main([*words, "--data.shards", values["data"]["shards"]]) == 0
    assert f"run {folder}: goes on at step 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--run.init_from", "sftp://user:S3cr3t@127.0.0.1:1/x.ckpt"],
        ["fit", "--run.init_from", "https://user:S3cr3t@127.0.0.1:1/x.ckpt"],
        ["fit", "--run.mirror", "s3://AKIA:S3cr3t@bucket/x"],
        ["export", "sftp://user:S3cr3t@127.0.0.1:1/run", "-o", "x.safetensors"],
    ],
)
def test_no_message_shows_a_password(
    words: list[str],
    tmp_path: Path,
    shard_folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if words[0] == "fit":
        values = config(tmp_path, shard_folder, MICRO, steps=2)
        words = [*words, "--config", write(tmp_path, values)]
    assert main(words) == 1
    told = "".join(capfd.readouterr())
    assert "***" in told
    assert "S3cr3t" not in told
    assert not (tmp_path / "runs").exists()
