"""Folders, manifests, mirrors, warm starts, other modules: what stands around a training."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hits import kill_at_step, start, wait

from lightning_tucodec.cli import main
from lightning_tucodec.codecs.cards import SHIPPED
from lightning_tucodec.training.beside import companions
from lightning_tucodec.training.runs import folder, identity
from lightning_tucodec.training.runs.folder import RunFolder, read_metrics
from lightning_tucodec.training.runs.identity import run_id
from lightning_tucodec.training.runs.manifest import Manifest
from lightning_tucodec.training.runs.writer import BackgroundWriter
from tests.support import MICRO
from tests.training.test_fit import config, same, state, write
from tests.training.test_fit import runs as run_folders


@pytest.fixture
def words(tmp_path: Path, shard_folder: Path) -> list[str]:
    """A fit of four steps that saves after each."""
    values = config(tmp_path, shard_folder, MICRO, steps=4)
    values["run"]["checkpoint_minutes"] = 0.0
    return ["fit", "--config", write(tmp_path, values)]


def killed_with_the_save_done() -> None:
    """SIGKILL in the third step, once the save of the second is on disk."""
    publish = BackgroundWriter.publish

    def published(self: BackgroundWriter) -> None:
        publish(self)
        if self._future is not None:
            self._future.result()

    BackgroundWriter.publish = published  # type: ignore[method-assign]
    kill_at_step(2)()


def test_the_manifest_says_what_ran(words: list[str], tmp_path: Path) -> None:
    assert wait(start(words, killed_with_the_save_done)) == -9
    assert main(words) == 0
    (folder,) = run_folders(tmp_path)
    content = json.loads((folder / "manifest.json").read_text())
    assert content["run_id"] == folder.name.removeprefix("test-")
    assert content["identity"]["model"]["lr"] == 1e-3
    (code,) = content["code"]
    assert code["packages"]["torch"] == torch.__version__.partition("+")[0]
    killed, finished = content["attempts"]
    assert (killed["exit"], killed["end"]) == ("killed", None)
    assert (finished["exit"], finished["status"], finished["step"]) == ("finished", 0, 4)
    assert finished["from_step"] == 2
    assert finished["pid"] == os.getpid()


def test_slurm_ids_are_noted(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_NTASKS", "4")  # as a shell of salloc has it
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert main(words) == 0
    (attempt,) = Manifest(RunFolder(run_folders(tmp_path)[0])).read()["attempts"]
    assert attempt["slurm"]["job_id"] == "17"
    assert attempt["slurm"]["restart_count"] == "2"


def test_another_configuration_in_the_folder_is_refused_with_what_differs(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    (folder,) = run_folders(tmp_path)
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["identity"]["model"]["lr"] = 0.5
    path.write_text(json.dumps(content))
    capsys.readouterr()
    assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "another configuration (model.lr: 0.5 -> 0.001)" in line


def test_a_folder_in_use_is_refused(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(folder, "_OWN_START", 0.0)
    assert main(words) == 0
    with RunFolder(run_folders(tmp_path)[0]).locked():
        assert main(words) == 1
    assert f"process {os.getpid()} on {socket.gethostname()} trains this run" in (
        capsys.readouterr().err
    )


def test_a_lock_whose_file_went_with_its_folder_is_none(tmp_path: Path) -> None:
    """Whoever waits while a run is refused gets a lock in a folder of its own."""
    folder = RunFolder(tmp_path / "runs" / "a")
    with contextlib.ExitStack() as first:
        first.enter_context(folder.locked())
        waiting = start_waiting(folder)
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == b"waits\n"
        time.sleep(0.5)
        assert waiting.poll() is None
    output, told = waiting.communicate(timeout=60)
    assert output == b""
    assert f"run {folder.path}: waits for process {os.getpid()} on " in told.decode()
    assert waiting.returncode == 0
    assert not folder.path.exists()


def start_waiting(folder: RunFolder) -> "subprocess.Popen[bytes]":
    """Another process that takes the lock, and checks that a third one would find it."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from lightning_tucodec.training.runs.folder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1]))\n"
        "print('waits', flush=True)\n"
        "with folder.locked():\n"
        "    assert f'process {os.getpid()} ' in (folder.path / '.lock').read_text()\n"
    )
    words = [sys.executable, "-c", code, str(folder.path)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_where_a_run_is_tracked_does_not_name_it(tmp_path: Path, shard_folder: Path) -> None:
    values = config(tmp_path, shard_folder, {})
    base = run_id(values)
    values["run"].update(mirror="s3://b", group="g", tags=["t"], job_type="j")
    assert run_id(values) == base
    nested = {"class_path": identity.DEFAULT_MODEL, "init_args": values["model"]}
    assert run_id({**values, "model": nested}) == base
    nested["class_path"] = "tests.training.hits.Duel"
    assert run_id({**values, "model": nested}) != base


def test_a_module_with_two_optimisers_is_stopped_and_goes_on(
    tmp_path: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chosen in the recipe; steps count batches; the global random state is every rank's own."""
    states = []
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
        values = config(tmp_path / name, shard_folder, {}, steps=6)
        values["run"]["checkpoint_minutes"] = 0.0
        values["model"] = {"class_path": "hits.Duel", "init_args": {"width": 5}}
        path = write(tmp_path / name, values)
        if name == "killed":
            assert wait(start(["fit", "--config", path], kill_at_step(3))) == -9
        assert main(["fit", "--config", path]) == 0
        (folder,) = run_folders(tmp_path / name)
        states.append(state(folder))
        rows = read_metrics(folder / "metrics.jsonl")
        assert [row["opt_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for part in ("state_dict", "optimizer_states", "tucodec", "run"):
        assert same(states[0][part], states[1][part]), part
    assert states[0]["tucodec"] == {"opt_step": 6, "images_seen": 24, "width": 5}
    values["run"]["init_from"] = "tiny-mse-2"
    assert main(["fit", "--config", write(tmp_path / name, values)]) == 1
    assert "Duel has no warm start" in capsys.readouterr().err


def test_a_shipped_model_and_a_run_folder_are_warm_starts(
    tmp_path: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = config(tmp_path, shard_folder, {}, steps=1)
    values["data"]["crop"] = 64
    values["model"]["codec"] = None
    values["run"]["init_from"] = "tiny-mse-2"
    assert main(["fit", "--config", write(tmp_path, values)]) == 0
    (folder,) = run_folders(tmp_path)
    shipped = read_metrics(folder / "metrics.jsonl")[0]["train/psnr"]
    assert shipped > 20  # trained weights, not those of a beginning
    capsys.readouterr()
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((SHIPPED / "tiny-mse-2.safetensors").read_bytes()[:3000])
    for source, text in [
        (str(damaged), "not an exported model"),
        ("huge-mse", "no model is called 'huge-mse'"),
        (str(tmp_path / "none.ckpt"), "No such file"),
    ]:
        values["run"]["init_from"] = source
        assert main(["fit", "--config", write(tmp_path, values)]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("tucodec: ")
        assert text in line


def test_an_exported_model_is_a_warm_start(
    words: list[str], tmp_path: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    (folder,) = run_folders(tmp_path)
    model = tmp_path / "model.safetensors"
    assert main(["export", str(folder), "-o", str(model)]) == 0
    losses = []
    for source in (None, str(model), str(folder)):
        values = config(tmp_path, shard_folder, MICRO, steps=1)
        values["run"].update(name="fine", init_from=source)
        assert main(["fit", "--config", write(tmp_path, values)]) == 0
        newest = max(run_folders(tmp_path), key=lambda path: path.stat().st_mtime_ns)
        losses.append(read_metrics(newest / "metrics.jsonl")[0]["train/loss"])
    assert losses[1] == pytest.approx(losses[2], rel=0.02)  # half precision and fixed point
    assert losses[0] != pytest.approx(losses[2], rel=0.02)
    damaged = folder / "checkpoints" / "damaged.ckpt"
    damaged.write_bytes((folder / "checkpoints" / "last.ckpt").read_bytes()[:999])
    values["run"]["init_from"] = str(damaged)
    capsys.readouterr()
    assert main(["fit", "--config", write(tmp_path, values)]) == 1
    assert "damaged.ckpt: damaged, or not a checkpoint" in capsys.readouterr().err.splitlines()[-1]


# --- processes beside a run -------------------------------------------------------------------


def test_a_companion_that_dies_or_hangs_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(1000)\n")
    (tmp_path / "dies.py").write_text("raise SystemExit(3)\n")
    sys.path.insert(0, str(tmp_path))
    try:
        os.environ["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        for module in ("hangs", "dies"):
            companion = companions.Companion(module, [], tmp_path / "log")
            assert not companion.finish(3.0)
    finally:
        sys.path.remove(str(tmp_path))
        os.environ["PYTHONPATH"] = os.environ["PYTHONPATH"].partition(os.pathsep)[2]


def test_companions_start_without_torch() -> None:
    """They are up in a fraction of a second and cost little memory."""
    package = "lightning_tucodec.training.beside"
    code = f"import sys, {package}.mirror, {package}.wandb_view; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- doctor ----------------------------------------------------------------------------------


def test_doctor_is_content_with_a_sound_configuration(
    tmp_path: Path, shard_folder: Path, val_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = config(tmp_path, shard_folder, MICRO)
    values["data"]["val_images"] = str(val_folder)
    call = ["doctor", "--config", write(tmp_path, values), "--mirror", str(tmp_path / "mirror")]
    assert main([*call, "--json"]) == 0
    findings = {f["name"]: f for f in json.loads(capsys.readouterr().out)}
    assert {"glibc", "shards", "validation", "run", "runs_dir", "disk", "shared storage", "mirror",
            "slurm", "gloo", "wandb"} <= set(findings)  # fmt: skip
    assert not [f for f in findings.values() if f["level"] == "fail"]
    assert list((tmp_path / "mirror").iterdir()) == []


def test_doctor_names_what_would_fail_and_what_to_do(
    tmp_path: Path,
    shard_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(shard_folder, shards)
    next(shards.glob("*.tar")).unlink()
    values = config(tmp_path, shards, MICRO)
    values["data"]["val_images"] = str(tmp_path / "none")
    values["run"]["mirror"] = "nosuchprotocol://x"
    script = tmp_path / "job.sh"
    script.write_text("#SBATCH --signal=B:USR1@300\nsrun tucodec fit\n")
    for name, value in {"JOB_ID": "1", "NTASKS": "1", "NNODES": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", str(tmp_path))  # no scontrol
    values["trainer"]["devices"] = 2
    call = ["doctor", "--config", write(tmp_path, values), "--script", str(script)]
    assert main(call) == 1
    lines = capsys.readouterr().out.splitlines()
    failing = {line[6:].split("  ")[0].strip() for line in lines if line.startswith("fail")}
    assert {"shards", "validation", "mirror", "tasks", "signal", "requeue option"} <= failing
    for number, line in enumerate(lines):
        if line.startswith("fail"):
            assert lines[number + 1].strip().startswith("→")


def test_doctor_takes_the_options_of_fit(
    tmp_path: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["doctor", "--config", write(tmp_path, config(tmp_path, shard_folder, MICRO))]

    for words in (["--json", "--", "--run.name", "another"], ["--run.name", "another", "--json"],
                  ["--run.name=another", "--json"]):  # fmt: skip
        assert main([*call, *words]) == 0
        findings = {f["name"]: f["text"] for f in json.loads(capsys.readouterr().out)}
        assert "/another-" in findings["run"]
    assert main(["doctor", "--data.crop", "1000", *call[1:]]) == 1
    assert "crop" in capsys.readouterr().out
    assert main([*call, "--", "--model.nonsense", "3"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "nonsense" in line


def test_doctor_alone_checks_the_installation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def findings(status: int) -> dict[str, dict[str, str]]:
        capsys.readouterr()
        assert main(["doctor", "--json"]) == status
        return {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}

    monkeypatch.setenv("TUCODEC_MODELS", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    found = findings(0)
    assert {"glibc", "python", "torch", "training", "models", "compiled", "h266", "slurm",
            "wandb"} == set(found)  # fmt: skip
    assert found["h266"]["text"].startswith("libvvenc ")
    assert "a key for " in found["wandb"]["text"]
    (tmp_path / "broken.safetensors").write_bytes(b"no model")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = findings(1)
    assert found["models"]["level"] == "fail"
    assert "broken.safetensors" in found["models"]["text"]
    assert found["h266"]["level"] == "warn"
    assert found["h266"]["fix"]
    assert found["wandb"]["text"].startswith("no key")
    assert found["slurm"]["text"].startswith("no sbatch")


def test_doctor_says_a_damaged_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("run: [")
    assert main(["doctor", "--config", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tucodec: {path}: ")
