"""W&B as a view of a run: replayed in order, by a client that may fail in every way."""

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hits import at_step, kill_at_step, start, wait
from PIL import Image

from lightning_tucodec.cli import main
from lightning_tucodec.training import attempt
from lightning_tucodec.training.beside import wandb_view
from lightning_tucodec.training.module import TrainingModule
from lightning_tucodec.training.runs.folder import read_metrics
from tests.support import MICRO
from tests.training.test_fit import config, runs, state, write
from tests.wandb_server import WandbServer

STEPS = 4


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client keeps its files here, and tells nobody about its errors."""
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "w"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("API_KEY", "BASE_URL", "MODE", "SERVICE"):  # SERVICE: an earlier test's client
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setattr(TrainingModule, "count_step", TrainingModule.count_step)


@pytest.fixture
def words(tmp_path: Path, shard_folder: Path, val_folder: Path) -> list[str]:
    """A fit of four steps that saves after each and validates after the third."""
    values = config(tmp_path, shard_folder, MICRO, STEPS)
    values["data"]["val_images"] = str(val_folder)
    values["run"].update(
        checkpoint_minutes=0.0, group="lambdas", job_type="stage-1", tags=["mse", "first"]
    )
    return ["fit", "--config", write(tmp_path, values)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server on loopback, and a key for it."""
    with WandbServer().serving() as serving:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", serving.url)
        yield serving


def clients(folder: Path) -> dict[int, str]:
    """Processes that W&B's client consists of, by id: what they are called."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if f"WANDB_DATA_DIR={folder / 'w'}\0" in (entry / "environ").read_text():
                found[int(entry.name)] = (entry / "comm").read_text().strip()
        except (OSError, UnicodeDecodeError):
            continue
    return found


def all_gone(folder: Path) -> bool:
    deadline = time.monotonic() + 60
    while clients(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not clients(folder)


def check_rows(folder: Path, sent: list[dict[str, Any]]) -> None:
    """Every line of the metrics, in order, and with it what is drawn against the rate."""
    rows = read_metrics(folder / "metrics.jsonl")
    assert len(sent) == len(rows) == STEPS + 1
    for number, (row, items) in enumerate(zip(rows, sent, strict=True)):
        assert items["_step"] == number
        assert {k: items[k] for k in row} == row
        if "val/bpp" in row:
            assert items["rd/bpp"] == row["val/bpp"]
            assert items["rd/psnr"] == row["val/psnr"]
            assert any(name.startswith("pictures/validation") for name in items)


# --- what is replayed ------------------------------------------------------------------------


def offline_records(folder: Path) -> list[Any]:
    """Records of the one offline run below a folder; a `.wandb` file is a LevelDB log of protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, block, text, found = 7, 32768, b"", []
    while place + 7 <= len(data):
        if block - place % block < 7:  # too little is left of this block for a header
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        text += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in {1, 4}:  # whole, or the last piece
            found.append(Record.FromString(text))
            text = b""
    return found


def offline_rows(folder: Path) -> list[dict[str, Any]]:
    return [
        {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        for record in offline_records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


def test_a_replay_has_every_line_in_order_on_our_own_axes(words: list[str], tmp_path: Path) -> None:
    """Read back from the `.wandb` file; a second replay takes the place of the first."""
    baseline = {"bpp": [0.01, 0.1, 1, 10, 100], "psnr-rgb": [1, 11, 21, 31, 41]}
    published = tmp_path / "published.json"
    published.write_text(json.dumps({"name": "JPEG", "results": baseline}))
    assert main([*words, "--run.baseline", str(published)]) == 0
    (folder,) = runs(tmp_path)
    others_of_its_curve(folder)
    for _ in range(2):
        assert wait(start(["wandb-sync", "--offline", str(folder)])) == 0
    records = offline_records(folder)
    (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
    assert run.run_id == folder.name.removeprefix("test-")
    assert (run.run_group, run.job_type, list(run.tags)) == ("lambdas", "stage-1", ["mse", "first"])
    axes = {
        r.metric.name or r.metric.glob_name: r.metric.step_metric
        for r in records
        if r.WhichOneof("record_type") == "metric"
    }
    assert axes["*"] == "opt_step"
    assert axes["rd/*"] == "rd/bpp"
    check_rows(folder, offline_rows(folder))
    (row,) = [row for row in read_metrics(folder / "metrics.jsonl") if "val/bpp" in row]
    (items,) = [items for items in offline_rows(folder) if "val/bpp" in items]
    same = 10 ** ((row["val/psnr"] - 21) / 10)
    percent = 100 * (row["val/real_bpp"] / same - 1)
    assert items["baseline/rate_percent_at_psnr"] == pytest.approx(percent)
    images = json.loads((folder / "images" / f"step-{row['opt_step']:08d}.json").read_text())
    assert [image["index"] for image in images] == [0, 1]
    (files,) = folder.glob("wandb/offline-run-*/files")
    table = (files / items["images.path"]).read_text()
    assert all(f"<td>{image['psnr']:.4f}<td>{image['ms_ssim']:.4f}" in table for image in images)
    pictures = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)">', table)
    for data, (width, height) in zip(pictures, ((202, 75), (128, 50)), strict=True):
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.size == (width, height)
    summary = {
        item.key: json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert summary["baseline"] == "JPEG"
    # Half the rate throughout; the run itself costs more than the first for less, and does not count.
    assert summary["bd_rate/runs"] == 5
    assert summary["bd_rate/psnr"] == pytest.approx(-50)
    assert "no ms_ssim_db" in summary["bd_rate/ms_ssim_db"]


def others_of_its_curve(folder: Path) -> None:
    """Four runs of the same group and tags, and one of another stage."""
    for number, stage in enumerate(["mse"] * 4 + ["ssim"]):
        other = folder.parent / f"other-{number}"
        other.mkdir()
        (other / "config.yaml").write_text(
            yaml.safe_dump({"run": {"group": "lambdas", "tags": ["first", stage]}})
        )
        line = {"opt_step": 4, "val/bpp": 10 ** (number - 0.8) / 2, "val/psnr": 13.0 + 10 * number}
        (other / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_a_run_without_its_baseline_does_not_start(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--run.baseline", str(tmp_path / "none.json#jpeg")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "none.json: No such file" in line
    assert not (tmp_path / "runs").exists()


def test_sync_sends_what_the_server_lacks(
    words: list[str], tmp_path: Path, server: WandbServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """The client's own protocol, with a server on loopback that knows as much of it as is needed."""
    assert main(words) == 0
    (folder,) = runs(tmp_path)
    assert wait(start(["wandb-sync", str(folder)])) == 0
    ((identifier, run),) = server.runs.items()
    assert identifier == folder.name.removeprefix("test-")
    first = run.upserts[0]
    assert (first["project"], first["groupName"]) == ("lightning-tucodec", "lambdas")
    assert (first["jobType"], first["tags"]) == ("stage-1", ["mse", "first"])
    assert json.loads(first["config"])["model"]["value"]["lr"] == 1e-3
    check_rows(folder, run.rows)
    assert any(name.startswith("media/images/pictures/validation") for name in run.files)
    assert f"{STEPS + 1} lines sent" in capfd.readouterr().out

    for lost in (3, 4):  # as after an outage
        del run.history[lost]
    assert wait(start(["wandb-sync", str(folder)])) == 0
    assert "  2 lines sent" in capfd.readouterr().out
    assert list(server.runs) == [identifier]
    check_rows(folder, run.rows)
    assert all_gone(tmp_path)


def test_a_run_that_is_killed_goes_on_as_the_same_wandb_run(
    words: list[str], tmp_path: Path, server: WandbServer
) -> None:
    """Its client sends what is written and ends; the next attempt's goes on after that."""
    online = [*words, "--run.wandb", "true"]
    assert wait(start(online, kill_at_step(2))) == -9
    assert all_gone(tmp_path)
    ((identifier, run),) = server.runs.items()
    assert [row["opt_step"] for row in run.rows] == [1, 2]
    assert main(online) == 0
    assert list(server.runs) == [identifier]
    check_rows(runs(tmp_path)[0], run.rows)


# --- what fails ------------------------------------------------------------------------------


def test_a_hung_server_costs_nothing(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It takes connections and never answers; the run is trained on while the client waits."""
    monkeypatch.setitem(attempt._WANDB_SECONDS, "online", 1.0)
    held: list[socket.socket] = []
    connected = threading.Event()
    reached: list[float] = []

    def accept(server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # when it is closed
            while True:
                held.append(server.accept()[0])
                connected.set()

    def wait_for_the_client() -> None:
        assert connected.wait(300)
        reached.append(time.monotonic())

    at_step(1, wait_for_the_client)()
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=accept, args=[server])
        thread.start()
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert main([*words, "--run.wandb", "true"]) == 0
        seconds = time.monotonic() - reached[0]
        server.shutdown(socket.SHUT_RDWR)
    thread.join()
    for connection in held:
        connection.close()
    assert seconds < 30  # the client itself would wait for minutes
    assert "wandb_view did not get to its end" in capsys.readouterr().err
    (folder,) = runs(tmp_path)
    assert state(folder)["tucodec"]["opt_step"] == STEPS
    assert len(read_metrics(folder / "metrics.jsonl")) == STEPS + 1
    assert all_gone(tmp_path)


@pytest.mark.parametrize("killed", ["wandb-core", ""])
def test_a_killed_client_costs_nothing(words: list[str], tmp_path: Path, killed: str) -> None:
    """Its inner process, or all of it; the lines are all there, and are sent afterwards."""

    def kill() -> None:
        deadline = time.monotonic() + 300
        while "wandb-core" not in clients(tmp_path).values():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for pid, name in clients(tmp_path).items():
            if killed in name:
                os.kill(pid, signal.SIGKILL)

    at_step(1, kill)()
    assert main([*words, "--run.wandb", "true"]) == 0
    (folder,) = runs(tmp_path)
    assert state(folder)["tucodec"]["opt_step"] == STEPS
    if not killed:
        assert wait(start(["wandb-sync", "--offline", str(folder)])) == 0
    check_rows(folder, offline_rows(folder))
    assert all_gone(tmp_path)


def test_sync_names_what_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["wandb-sync", str(tmp_path)]) == 1
    assert "no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert main(["wandb-sync", str(tmp_path)]) == 1
    assert "WANDB_API_KEY" in capsys.readouterr().err
    assert wandb_view.mode() == "offline"


def test_a_key_in_netrc_is_as_good_as_one_in_the_environment(
    words: list[str],
    tmp_path: Path,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`wandb login` leaves it there; the client itself finds it when lines are sent."""
    monkeypatch.delenv("WANDB_API_KEY")
    assert wait(start(words)) == 0
    (folder,) = runs(tmp_path)
    host = server.url.partition("://")[2]
    netrc = tmp_path / "netrc"
    doctor = ["doctor", "--json", *words[1:]]
    values = yaml.safe_load(Path(words[-1]).read_text())
    values["run"]["wandb"] = True
    Path(words[-1]).write_text(yaml.safe_dump(values))

    def finding() -> str:
        main(doctor)
        found = json.loads(capsys.readouterr().out)
        return next(f["text"] for f in found if f["name"] == "wandb")

    for text in (None, "machine", f"machine other.example login user password {'1' * 40}\n"):
        if text is not None:
            netrc.write_text(text)
        assert wandb_view.mode() == "offline"
    assert finding() == "no key: offline"
    netrc.write_text(f"machine {host} login user password {'1' * 40}\n")
    netrc.chmod(0o600)
    assert wandb_view.mode() == "online"
    assert finding().startswith("there is a key")
    assert wait(start(["wandb-sync", str(folder)])) == 0
    (stored,) = server.runs.values()
    assert len(stored.rows) == len(read_metrics(folder / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("project", "a" * 128, True), ("project", "a" * 129, False), ("project", "a b-c_d.e", True),
        *[("project", f"a{letter}b", False) for letter in "/\\#?%:"],
        ("tags", ["a" * 64, "b"], True), ("tags", ["a" * 65], False), ("tags", ["a", ""], False),
    ],
)  # fmt: skip
def test_names_that_the_client_refuses_are_known_before_the_first_step(
    name: str,
    value: Any,
    taken: bool,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import wandb

    refused = (wandb.UsageError, ValueError)  # type: ignore[attr-defined]
    outcome = contextlib.nullcontext() if taken else pytest.raises(refused)
    with outcome:
        wandb.Settings(**{{"project": "project", "tags": "run_tags"}[name]: value})
    if taken:
        wandb_view.check_names({name: value})
        return
    values = yaml.safe_load(Path(words[-1]).read_text())
    values["run"].update({"wandb": True, name: value})
    Path(words[-1]).write_text(yaml.safe_dump(values))
    assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tucodec: run.{name}: W&B takes ")
    assert not (tmp_path / "runs").exists()
    assert main(["doctor", "--json", *words[1:]]) == 1
    failing = [f for f in json.loads(capsys.readouterr().out) if f["level"] == "fail"]
    assert [f["text"] for f in failing] == [line.removeprefix("tucodec: ")]
