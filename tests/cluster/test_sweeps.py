"""Sweeps without a cluster: files to plans, plans to the commands of sbatch, files to the status table."""

import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_tucodec.cli import main
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.sweeps import commands
from lightning_tucodec.sweeps.plan import Plan
from lightning_tucodec.sweeps.queue import Job, queued, submit
from lightning_tucodec.sweeps.spec import Config, Task, read_sweep
from lightning_tucodec.sweeps.status import status
from lightning_tucodec.training.configuration import resolve
from lightning_tucodec.training.runs.folder import RunFolder
from lightning_tucodec.training.runs.identity import flat
from tests.campaigns.cluster import REPOSITORY, lives, wait_for, write_recipe
from tests.training.hits import kill_at_step, start, wait

STAGES: dict[str, Any] = {
    "mse": {"config": "recipe.yaml", "set": {"model.lmbda": 100.0}},
    "ssim": {
        "config": "recipe.yaml",
        "grid": {"model.lmbda": [1.0, 2.0], "data.seed": [5, 6]},
        "init_from": {"stage": "mse"},
    },
}


@pytest.fixture
def recipe(tmp_path: Path, shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUCODEC_ROOT", str(REPOSITORY))
    monkeypatch.setenv("TUCODEC_SITE", str(REPOSITORY / "slurm" / "site.sh"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    path = tmp_path / "recipe.yaml"
    write_recipe(path, {"shards": str(shard_folder)})
    return path


def write(folder: Path, stages: dict[str, Any]) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"name": "try", "stages": stages}, sort_keys=False))
    return path


def plan(folder: Path, stages: dict[str, Any]) -> Plan:
    made, writer = Plan.make(write(folder, stages), [], folder / "sweeps")
    writer()
    return made


def finish(made: Plan, name: str, status: int = 0) -> None:
    lines = ['{"event": "start", "job": "1_0", "restart": 0, "time": 1, "status": null}']
    lines.append(f'{{"event": "end", "job": "1_0", "restart": 0, "time": 2, "status": {status}}}')
    made.file("attempts", made.task(name), ".jsonl").write_text("\n".join(lines) + "\n")


def test_the_shipped_sweeps_are_understood() -> None:
    for path in sorted((REPOSITORY / "experiments" / "sweeps").glob("*.yaml")):
        name, tasks = read_sweep(path)
        assert name == path.stem
        assert len(tasks) > 1
    ssim = [t for t in read_sweep(path.parent / "tucodecssim.yaml")[1] if t.stage == "ssim"]
    assert [task.label["model.lmbda"] for task in ssim] == [0.2, 0.3, 0.4, 0.5, 0.6]


def test_a_grid_is_a_product_and_overrides_come_last(recipe: Path) -> None:
    _, tasks = read_sweep(write(recipe.parent, STAGES), ["data.batch_size=4"])
    assert [task.name for task in tasks] == ["mse-0", "ssim-0", "ssim-1", "ssim-2", "ssim-3"]
    found = [
        tuple(draft.get(key) for key in ("model.lmbda", "data.seed", "data.batch_size"))
        for draft in tasks.values()
    ]
    assert found == [(100.0, None, 4), (1.0, 5, 4), (1.0, 6, 4), (2.0, 5, 4), (2.0, 6, 4)]
    assert [task.after for task in tasks] == [None, *["mse-0"] * 4]


@pytest.mark.parametrize(
    ("init_from", "chain", "after"),
    [
        ({"stage": "first"}, False, ["first-0", "first-1"]),
        ({"stage": "first", "model.lmbda": 2.0}, False, ["first-1", "first-1"]),
        ({"stage": "first", "model.lmbda": 2.0}, True, ["first-1", "second-0"]),
        (None, True, [None, "second-0"]),
    ],
)
def test_where_tasks_start_from(
    recipe: Path, init_from: Any, chain: bool, after: list[str | None]
) -> None:
    grid = {"config": "recipe.yaml", "grid": {"model.lmbda": [1.0, 2.0]}}
    second = {**grid, "init_from": init_from, "chain": chain}
    _, tasks = read_sweep(write(recipe.parent, {"first": grid, "second": second}))
    assert [task.after for task in tasks if task.stage == "second"] == after


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        ({"config": "none.yaml"}, "none.yaml: No such file"),
        ({"configs": "recipe.yaml"}, "needs `config`"),
        ({"config": "recipe.yaml", "grid": {"model.lmbda": 3}}, "must be a list"),
        ({"config": "recipe.yaml", "init_from": {"stage": "other"}}, "no earlier stage 'other'"),
        ({"config": "recipe.yaml", "set": {"model.lmbda.x": 3}}, "no such entry"),
        ({"config": "recipe.yaml", "set": {"model.lamda": 3}}, "lamda"),
        ({"config": "recipe.yaml", "set": {"data.shards": "/nowhere"}}, "/nowhere"),
        (None, "stage one: needs `config`"),
        ([], "stage one: needs `config`"),
        ({"config": 3}, "config: must be a file or a list of files"),
        ({"config": []}, "config: must be a file or a list of files"),
        ({"config": [3]}, "config: must be a file or a list of files"),
        ({"config": "latin.yaml"}, "latin.yaml: line 2 is not UTF-8"),
        ({"config": "date.yaml"}, "date.yaml: not YAML"),
        ({"config": "list.yaml"}, "list.yaml: not YAML"),
        ({"config": "recipe.yaml", "grid": []}, "grid: must be"),
        ({"config": "recipe.yaml", "grid": ["model.lmbda"]}, "grid: must be"),
        ({"config": "recipe.yaml", "set": 3}, "set: must be"),
        ({"config": "recipe.yaml", "set": {3: 4}}, "3"),
        ({"config": "recipe.yaml", "set": {"model..lmbda": 4}}, "a key is written as in"),
        ({"config": "recipe.yaml", "set": {"model": 3}}, "model"),
        ({"config": "recipe.yaml", "set": {"seed_everything.x": 3}}, "seed_everything"),
        ({"config": "recipe.yaml", "grid": {"data.seed": [datetime.date(2026, 1, 1)]}}, "seed"),
        ({"config": "recipe.yaml", "init_from": 3}, "init_from: must be"),
        ({"config": "recipe.yaml", "init_from": {3: 4}}, "no earlier stage None"),
        ({"config": "recipe.yaml", "chain": "no"}, "chain: must be"),
        ({"config": "recipe.yaml", "set": {"run.name": "x/../../up"}}, "run.name: 'x/../../up'"),
    ],
)
def test_mistakes_are_one_line(
    recipe: Path, stage: Any, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe.parent / "latin.yaml").write_bytes("run:\n  name: grün\n".encode("latin-1"))
    (recipe.parent / "date.yaml").write_text("run: 2026-99-99\n")
    (recipe.parent / "list.yaml").write_text("? [a, b]\n: 3\n")
    assert main(["sweep", "plan", str(write(recipe.parent, {"one": stage}))]) == 1
    errors = capsys.readouterr().err
    assert text in errors
    assert len(errors.splitlines()) == 1
    assert not (recipe.parent / "sweeps").exists()


@pytest.mark.parametrize("setting", ["x", "x=[", "=3", "a..b=3", "model.lmbda.x=1"])
def test_a_mistake_in_set_is_one_line(
    recipe: Path, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = str(write(recipe.parent, {"one": {"config": "recipe.yaml"}}))
    assert main(["sweep", "plan", sweep, "--set", setting]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert setting.partition("=")[0] in line


@pytest.mark.parametrize(
    "name",
    ["", ".", "../up", "a/b", "a,b", "p|q", "50%A", "a b", "a\nb", "-x", "é", "x" * 101, None],
)
def test_names_cannot_leave_their_place(recipe: Path, name: Any) -> None:
    """Those of sweeps and of runs, which stand in paths, in names of jobs and in lists of them."""
    path = recipe.parent / "sweep.yaml"
    path.write_text(yaml.safe_dump({"name": name, "stages": {"one": {"config": "recipe.yaml"}}}))
    with pytest.raises(ConfigError, match=r"name: .* is no name"):
        read_sweep(path)
    config = {"run": {"name": name, "runs_dir": "runs"}}
    with pytest.raises(ConfigError, match=r"run\.name: .* is no name"):
        RunFolder.of(config)


@pytest.mark.parametrize("name", ["try", "a.b_c-2+x=3", "2019", "x" * 100])
def test_names_that_are_fine(recipe: Path, name: str) -> None:
    path = recipe.parent / "sweep.yaml"
    path.write_text(yaml.safe_dump({"name": name, "stages": {"one": {"config": "recipe.yaml"}}}))
    assert read_sweep(path)[0] == name


VAE = "lightning_tucodec.training.vae.VAE"
GAN = "lightning_tucodec.training.gan.GANCodec"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"model": {"codec": {"centres": 9}}}, {"model": {"codec": {"hyper.channels": 8}}}),
        (
            {"model": {"codec": {"centres": 9}}},
            {"model": {"class_path": VAE, "init_args": {"lr": 0.5}}},
        ),
        ({"model": {"class_path": GAN, "init_args": {"lr": 0.5}}}, {"model": {"lmbda": 3.0}}),
        ({"trainer": {"max_steps": 9}}, {"trainer": {"devices": 2}}),
    ],
)
def test_several_files_are_read_as_fit_reads_them(
    recipe: Path, capsys: pytest.CaptureFixture[str], first: Config, second: Config
) -> None:
    """A later file's dictionary takes the place of an earlier one's; groups and classes are merged."""
    names = ["recipe.yaml"]
    for name, content in (("first.yaml", first), ("second.yaml", second)):
        (recipe.parent / name).write_text(yaml.safe_dump(content))
        names.append(name)
    _, tasks = read_sweep(write(recipe.parent, {"one": {"config": names}}))
    (draft,) = tasks.values()
    with pytest.raises(SystemExit):
        main(["fit", *(word for name in names for word in ("--config", name)), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    for name in ("config", "mirror"):  # `--mirror` stands in `run` once it is resolved
        printed.pop(name, None)
    assert resolve(*draft.layers()) == flat(printed)


@pytest.mark.parametrize("base", [{}, {"class_path": VAE}])
@pytest.mark.parametrize("dots", ["model", "model.init_args"])
def test_values_go_into_either_way_to_write_a_class(recipe: Path, base: Config, dots: str) -> None:
    """`model.codec.x` and `model.init_args.codec.x` are the same, whatever way the file is written."""
    content = yaml.safe_load(recipe.read_text())
    codec = content["model"]["codec"]
    content["model"] = {**base, "init_args": content["model"]} if base else content["model"]
    recipe.write_text(yaml.safe_dump(content))
    values = {
        f"{dots}.codec.quantizer": "round",
        f"{dots}.codec.hyper.channels": 9,
        f"{dots}.lr": 0.5,
    }
    stage = {"config": "recipe.yaml", "set": values}
    (draft,) = read_sweep(write(recipe.parent, {"one": stage}))[1].values()
    model = resolve(*draft.layers())["model"]
    assert model["codec"] == {**codec, "quantizer": "round", "hyper.channels": 9}
    assert (model["lr"], model["lmbda"]) == (0.5, 200.0)
    assert draft.get("model.codec.hyper.channels") == 9


def test_numbers_of_a_grid_are_those_of_fit(recipe: Path) -> None:
    """`1e-4` is text in YAML 1.1."""
    path = recipe.parent / "sweep.yaml"
    path.write_text(
        "name: try\nstages:\n"
        "  a: {config: recipe.yaml, grid: {model.lr: [1e-4, 2E-4, -1.e+3, .5e1]}}\n"
        "  b: {config: recipe.yaml, init_from: {stage: a, model.lr: 0.0001}}\n"
        "  c: {config: recipe.yaml, init_from: {stage: a, model.init_args.lr: 2e-4}}\n"
    )
    tasks = list(read_sweep(path)[1])
    assert [task.label["model.lr"] for task in tasks[:4]] == [1e-4, 2e-4, -1e3, 5.0]
    assert [task.after for task in tasks[4:]] == ["a-0", "a-1"]


def test_the_queue_is_that_of_this_user(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of others' jobs none counts, of one's own those of this plan, whatever stands in their names."""
    made = plan(recipe.parent, {"one": {"config": "recipe.yaml"}})
    tools = recipe.parent / "bin"
    tools.mkdir()
    (tools / "squeue").write_text(
        f"""#!/bin/bash
fields="7|0|RUNNING|None"
user=""
for word in "$@"; do
    [[ $word != --user=* ]] || user=${{word#--user=}}
    [[ $word != --name=* ]] || exit 9
done
[[ $user == {os.getuid()} ]] || echo "$fields|{made.folder.name}-one"
[[ -z $OWN ]] || echo "$fields|$OWN"
echo "$fields|p|q-$'\\xfc'-one"
"""
    )
    (tools / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("OWN", "")
    assert queued(made) == {}
    monkeypatch.setenv("OWN", f"{made.folder.name}-one")
    assert queued(made) == {"one-0": Job("7", "running", "None")}


def test_a_percent_sign_in_a_path_is_none_of_sbatch(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = write(recipe.parent, {"one": {"config": "recipe.yaml"}})
    assert main(["sweep", "submit", str(sweep), "--dry-run", "--out", "50%A"]) == 0
    assert "--output=50%%A/try-" in capsys.readouterr().out


def test_a_plan_is_immutable_and_finds_its_runs(recipe: Path) -> None:
    first = plan(recipe.parent, STAGES)
    assert plan(recipe.parent, STAGES).folder == first.folder
    changed = {**STAGES, "mse": {"config": "recipe.yaml", "set": {"model.lmbda": 101.0}}}
    assert plan(recipe.parent, changed).folder != first.folder

    mse, ssim = first.task("mse-0"), first.task("ssim-3")
    run = first.run_folder(mse)
    assert run is not None
    assert run.name.startswith("box-")
    assert first.run_folder(ssim) is None
    with pytest.raises(ConfigError, match="mse-0, which is not complete"):
        first.finish_config(ssim)
    finish(first, "mse-0")
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").write_bytes(b"weights")
    config = yaml.safe_load(first.finish_config(ssim).read_text())
    assert config["run"]["init_from"].endswith("last.ckpt")
    assert config["model"]["lmbda"] == 2.0
    found = first.run_folder(ssim)
    assert found is not None
    assert found != run
    # What decides the run's id are the weights that it starts from; it does not change any more.
    (run / "checkpoints" / "last.ckpt").write_bytes(b"others")
    assert first.finish_config(ssim) == first.file("configs", ssim, ".yaml")
    assert first.run_folder(ssim) == found


def test_arrays_and_dependencies(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"config": "recipe.yaml", "grid": {"model.lmbda": [1.0, 2.0]}}
    stages = {
        "first": grid,
        "same": {**grid, "init_from": {"stage": "first"}},
        "one": {**grid, "init_from": {"stage": "first", "model.lmbda": 2.0}},
        "links": {**grid, "chain": True},
    }
    made = plan(recipe.parent, stages)

    def commands(names: list[str], jobs: dict[str, Job]) -> list[tuple[str, str, str]]:
        submit(made, [made.task(name) for name in names], jobs, dry=True)
        found = []
        for line in capsys.readouterr().out.splitlines():
            words = dict(
                word.split("=", 1) for word in line.replace("\\", "").split() if "=" in word
            )
            stage = words["--job-name"].removeprefix(f"{made.folder.name}-")
            found.append((stage, words["--array"], words.get("--dependency", "")))
        return found

    assert commands(list(made.tasks), {}) == [
        ("first", "0,1", ""),
        ("links", "0", ""),
        ("same", "0,1", "aftercorr:<first>"),
        ("one", "0,1", "afterok:<first>_1"),
        ("links", "1", "afterok:<links>_0"),
    ]
    finish(made, "first-1")
    queue = {"first-0": Job("77", "running", "None")}
    assert commands(["same-0", "same-1", "one-0"], queue) == [
        ("same", "0", "aftercorr:77"),
        ("same", "1", ""),
        ("one", "0", ""),
    ]
    with pytest.raises(ConfigError, match="starts from links-0, which is not submitted"):
        submit(made, [made.task("links-1")], {}, dry=True)


def test_a_stage_beyond_the_clusters_limit_is_several_arrays(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Indices begin at 0 in each; what corresponds by number still corresponds, else it is waited for."""
    tools = recipe.parent / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/bash\necho 'MaxArraySize            = 11'\n")
    (tools / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    names = [f"{stage}-{number}" for stage in "ab" for number in range(12)]
    tasks = [Task(n[0], int(n[2:]), {}, f"a-{n[2:]}" if n[0] == "b" else None) for n in names]
    made = Plan(recipe.parent / "try", tasks, "key")

    def commands(jobs: dict[str, Job]) -> list[list[str]]:
        submit(made, [task for task in tasks if task.name not in jobs], jobs, dry=True)
        printed = capsys.readouterr().out.replace("\\", "").splitlines()
        options = ("--job-name", "--array", "--output", "--dependency")
        return [
            [word.partition("=")[2].removeprefix(str(made.folder)) for word in line.split()
             if word.startswith(options)] for line in printed
        ]  # fmt: skip

    all_ten = ",".join(map(str, range(10)))
    assert commands({}) == [
        ["try-a.key", all_ten, "/logs/a-%a.log"],
        ["try-a.key+10", "0,1", "/logs/a-1%1a.log"],
        ["try-b.key", all_ten, "/logs/b-%a.log", "aftercorr:<a>"],
        ["try-b.key+10", "0,1", "/logs/b-1%1a.log", "aftercorr:<a+10>"],
    ]
    # Submitted when the limit was another one: the indices differ, so each is waited for by itself.
    jobs = {task.name: Job("77", "running", "None") for task in tasks[:12]}
    assert commands(jobs)[1:] == [
        ["try-b.key+10", str(i), "/logs/b-1%1a.log", f"afterok:77_{10 + i}"] for i in (0, 1)
    ]
    (tools / "squeue").write_text(
        "#!/bin/bash\necho '78|1|RUNNING|None|try-b.key+10'; echo '79|1|RUNNING|None|try-b.other'\n"
    )
    (tools / "squeue").chmod(0o755)
    assert queued(made) == {"b-11": Job("78", "running", "None", 10)}


def test_the_status_of_every_kind(recipe: Path) -> None:
    values = [float(value) for value in range(6)]
    stages = {
        "a": {"config": "recipe.yaml", "grid": {"model.lmbda": values}},
        "b": {"config": "recipe.yaml", "init_from": {"stage": "a", "model.lmbda": 0.0}},
    }
    made = plan(recipe.parent, stages)
    finish(made, "a-0")
    finish(made, "a-1", status=1)
    made.file("logs", made.task("a-1"), ".log").write_text(
        "step 3\ntucodec: no room\nsrun: error\n"
    )
    lost = made.file("attempts", made.task("a-2"), ".jsonl")
    lost.write_text('{"event": "start", "status": null}\n{"event": "start", "status": null}\n{"eve')
    folder = made.run_folder(made.task("a-2"))
    assert folder is not None
    folder.mkdir(parents=True)
    rows = [{"opt_step": 4, "val/bpp": 0.5, "val/psnr": 30.0}, {"opt_step": 6, "train/bpp": 0.7}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    queue = {
        "a-3": Job("9", "running", "None"),
        "a-4": Job("9", "pending", "Resources"),
        "b-0": Job("10", "pending", "Dependency"),
    }
    found = {row.task: row for row in status(made, queue)}
    states = {name: row.state for name, row in found.items()}
    assert states == {
        "a-0": "complete", "a-1": "failed", "a-2": "lost", "a-3": "running", "a-4": "pending",
        "a-5": "planned", "b-0": "waiting",
    }  # fmt: skip
    assert (found["a-0"].step, found["a-0"].steps) == (240, 240)
    assert found["a-1"].note == "tucodec: no room"
    assert found["a-4"].note == "Resources"
    assert found["b-0"].note == "for a-0"
    queue["a-4"] = Job("9", "pending", "launch failed requeued held", 3)
    note = "launch failed requeued held; when the cause is mended: scontrol release 9_1"
    assert {row.task: row for row in status(made, queue)}["a-4"].note == note
    lost_row = found["a-2"]
    assert (lost_row.step, lost_row.bpp, lost_row.psnr, lost_row.restarts) == (6, 0.5, 30.0, 1)


def test_what_sweep_run_left_is_told_without_a_queue(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task that saved itself has not failed; a Slurm that does not answer has no part in it."""
    made = plan(recipe.parent, {"a": {"config": "recipe.yaml"}})
    tools = recipe.parent / "bin"
    tools.mkdir()
    (tools / "squeue").write_text("#!/bin/bash\necho no configuration source >&2\nexit 1\n")
    (tools / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    assert main(["sweep", "status", str(made.folder)]) == 0
    assert "the queue is not known" in capsys.readouterr().err  # a job may wait there
    finish(made, "a-0", status=75)
    rows = made.file("attempts", made.task("a-0"), ".jsonl")
    rows.write_text(rows.read_text().replace("1_0", "here"))
    folder = made.run_folder(made.task("a-0"))
    assert folder is not None
    folder.mkdir(parents=True)
    attempt = {"start": "2026-01-01T00:00:00+00:00", "host": "h", "pid": 1, "code": 0}
    attempts = [{**attempt, "exit": "preempted", "step": 7}]
    (folder / "manifest.json").write_text(json.dumps({"code": [{}], "attempts": attempts}))
    assert main(["sweep", "status", str(made.folder), "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    (row,) = json.loads(said.out)
    assert (row["state"], row["step"]) == ("stopped", 7)
    assert row["note"] == "saved; `tucodec sweep run` goes on"


def test_the_cause_of_a_failure_is_shown_not_its_echo(recipe: Path) -> None:
    """The manifest's last error may be an older one's, or only say that another process has ended."""
    made = plan(recipe.parent, {"a": {"config": "recipe.yaml"}})
    task = made.task("a-0")
    folder = made.run_folder(task)
    assert folder is not None
    folder.mkdir(parents=True)
    manifest = {
        "start": "2026-01-01T00:00:00+00:00",
        "host": "h",
        "pid": 1,
        "code": 0,
        "exit": "failed",
    }
    started = 1767225600

    def note(error: str, start: int, log: str, reason: str | None = None) -> str:
        content = {"code": [{}], "attempts": [{**manifest, "error": error}]}
        (folder / "manifest.json").write_text(json.dumps(content))
        rows = [{"event": "start", "time": start}, {"event": "begun", "time": start}]
        rows.append({"event": "end", "status": 1} | ({"reason": reason} if reason else {}))
        made.file("attempts", task, ".jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        head = "train.sh: job 7, start 0, on n1: c.yaml\n"
        made.file("logs", task, ".log").write_text(f"{head}tucodec: old\n{head}{log}\n")
        (row,) = status(made, {})
        assert row.state == "failed"
        return row.note

    echo = "another process ended first: Connection closed by peer"
    assert note("no room", started, "Error: x") == "no room"
    assert note("no room", started + 60, "tucodec: refused\nError: x") == "tucodec: refused"
    assert note("no room", started + 60, "srun: error: x") == "srun: error: x"
    assert note(echo, started, "tucodec: the other's\nError: x") == "tucodec: the other's"
    assert note(echo, started, "Error: x") == echo
    assert note(echo, started, "Error: x", "was killed: it stays down").endswith("stays down")


def test_where_sbatch_is_missing_the_command_is_said(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "sed"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tools))
    assert main(["sweep", "submit", str(write(recipe.parent, STAGES))]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    (folder,) = (recipe.parent / "sweeps").iterdir()
    assert "this node may not submit" in error
    assert error.endswith(f"tucodec sweep submit sweeps/{folder.name}")


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        (
            "train.sh",
            ["c.yaml"],
            ["--nodes=1", "--ntasks-per-node=8", "--signal=USR1@300", "train.sh c.yaml"],
        ),
        ("evaluate.sh", ["photos", "o.json", "run"], ["sbatch", "evaluate.sh photos o.json run"]),
        (
            "build_shards.sh",
            ["photos", "--out", "s"],
            ["shards-inspect", "shards-write", "afterany"],
        ),
    ],
)
def test_launchers_show_what_they_would_do(
    recipe: Path, script: str, words: list[str], expected: list[str]
) -> None:
    command = [str(REPOSITORY / "slurm" / script), "--dry-run", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for text in expected:
        assert text in done.stdout
    assert not (recipe.parent / "slurm-logs").exists()


@pytest.mark.parametrize(
    ("status", "restarts", "expected", "text"),
    [
        (0, 0, 0, ""),
        (1, 0, 1, "ended with status 1"),
        (201, 0, 1, "ended with status 1"),
        (202, 0, 2, "ended with status 2"),
        (75, 0, 75, "was told to stop; no scontrol here"),
        (143, 0, 75, "was killed; no scontrol here"),
        (137, 0, 75, "was killed; no scontrol here"),
        (75, 100, 1, "stays down"),
    ],
)
def test_without_scontrol_a_job_says_so(
    tmp_path: Path, status: int, restarts: int, expected: int, text: str
) -> None:
    """As inside a container: srun is there, scontrol is not."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "sed", "sleep", "date", "cat", "mkdir", "tail"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    (tools / "srun").write_text(f'#!/bin/bash\necho "$@" >{tmp_path}/words\nexit {status}\n')
    (tools / "srun").chmod(0o755)
    env = {
        "PATH": str(tools), "SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_PER_TASK": "4",
    }  # fmt: skip
    command = [str(REPOSITORY / "slurm" / "train.sh"), "c.yaml", "--run.threads", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=env, cwd=tmp_path
    )
    assert done.returncode == expected
    assert text in done.stderr
    words = (tmp_path / "words").read_text()
    assert "fit --config c.yaml --trainer.num_nodes 3 --trainer.devices 2 --run.threads 1" in words


@pytest.mark.parametrize(
    ("history", "status", "stays"),
    [
        ("", 137, False),
        ("start 137", 137, True),
        ("start 137", 143, True),  # srun ended the others, and says so
        ("start 137", 138, False),  # USR1 at the time limit
        ("start 137", 75, False),
        ("start begun 137", 137, False),
        ("start 137 start begun 137", 137, False),
        ("start begun 137 start 137", 137, True),
        ("start 137 start 75", 137, False),
        ("start 137 start lost", 137, True),
    ],
)
def test_starts_that_are_killed_before_training_begins_are_counted(
    tmp_path: Path, history: str, status: int, stays: bool
) -> None:
    """A job whose memory does not even hold the program would be requeued for ever."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(f"#!/bin/bash\nexit {status}\n")
    requeued = tmp_path / "requeued"
    (tools / "scontrol").write_text(f"#!/bin/bash\n[[ $1 != requeue ]] || touch {requeued}\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (tmp_path / "slurm-logs").mkdir()
    attempts = tmp_path / "slurm-logs" / "5.jsonl"
    reasons = {"75": "was told to stop", "137": "was killed"}
    for word in history.split():
        end = {"event": "end", "job": "5", "restart": 0, "time": 1, "status": 0}
        row = end | {"reason": reasons[word]} if word in reasons else end | {"event": word}
        with attempts.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
    env = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "3"}
    command = [str(REPOSITORY / "slurm" / "train.sh"), "c.yaml"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=env, cwd=tmp_path
    )
    assert done.returncode == (1 if stays else 75)
    assert requeued.exists() != stays
    assert ("killed before training began" in done.stderr) == stays
    last = json.loads(attempts.read_text().splitlines()[-1])
    assert (last["event"], last["restart"]) == ("end", 3)
    assert last["reason"] in done.stderr


def test_an_array_beyond_the_clusters_limit_is_split(tmp_path: Path) -> None:
    """MaxArraySize is 3: five shares are three arrays, and each job finds its own share."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/bash\necho 'MaxArraySize            = 3'\n")
    script = f"cd {tmp_path}; n=$(ls | grep -c ^job); cat >job$n; echo $@ >words$n; echo 7$n"
    (tools / "sbatch").write_text(f"#!/bin/bash\n{script}\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    site = tmp_path / "a site.sh"
    site.write_text("SITE_TUCODEC=echo\n")
    env = {"PATH": f"{tools}:/usr/bin:/bin", "TUCODEC_SITE": str(site)}
    launchers = REPOSITORY / "slurm"
    command = [launchers / "submit.sh", "--cpu", "--shares", "5", "--job-name=x", "--"]
    command += [launchers / "allocate.sh", "--share", "5", "a photo"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert done.stdout == "70:71:72\n"  # as --dependency takes them
    found = []
    for number, jobs in enumerate((2, 2, 1)):
        assert f"--array=1-{jobs}" in (tmp_path / f"words{number}").read_text().split()
        for task in range(1, jobs + 1):
            ran = subprocess.run(
                ["bash", tmp_path / f"job{number}"],
                capture_output=True, text=True, check=True,
                env={
                    "PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)
                },
            )  # fmt: skip
            found.append(ran.stdout)
    assert found == [f"allocate --workers 1 a photo --part {n}/5\n" for n in range(1, 6)]


def test_runs_of_one_name_are_exported_to_files_of_their_own(tmp_path: Path) -> None:
    command = [REPOSITORY / "slurm" / "evaluate.sh", "--dry-run", "photos", "o.json"]
    env = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    for runs, models in (
        (("runs/a", "other/b/"), ("a", "b")),
        (
            ("runs/a", "other/a", "b"),
            (f"{tmp_path}/runs/a", f"{tmp_path}/other/a", f"{tmp_path}/b"),
        ),
    ):
        done = subprocess.run(
            [*command, *runs], capture_output=True, text=True, check=True, env=env, cwd=tmp_path
        )
        *exports, evaluation = (line.split() for line in done.stdout.splitlines())
        files = [f"o-models/{model.lstrip('/')}.safetensors" for model in models]
        assert [words[words.index("-o") + 1] for words in exports] == files
        assert evaluation[evaluation.index("--codec") + 1 :][: len(files)] == files


def test_a_sweep_runs_here_stage_by_stage(
    tmp_path: Path, recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two tasks of two processes each, the second from the weights of the first."""
    write_recipe(recipe, {"shards": yaml.safe_load(recipe.read_text())["data"]["shards"]}, steps=3)
    two = {"trainer.devices": 2, "trainer.strategy": "ddp"}
    stages = {
        "mse": {"config": "recipe.yaml", "set": two},
        "ssim": {"config": "recipe.yaml", "set": two, "init_from": {"stage": "mse"}},
    }
    stages["ssim"]["grid"] = {"model.lmbda": [2.0]}
    words = ["sweep", "run", str(write(tmp_path, stages)), "--out", str(tmp_path / "sweeps")]
    assert main(words) == 0
    assert not {"LOCAL_RANK", "TUCODEC_ATTEMPT"} & os.environ.keys()
    captured = capfd.readouterr()
    assert len(re.findall("^run .* starts$", captured.err, re.MULTILINE)) == 2  # rank 0 speaks
    made = Plan.open(Path(captured.out.strip().splitlines()[-1]))
    assert [row.state for row in status(made, {})] == ["complete"] * 2
    for task in made.tasks.values():
        folder = made.run_folder(task)
        assert folder is not None
        (attempt,) = json.loads((folder / "manifest.json").read_text())["attempts"]
        assert (attempt["world_size"], attempt["status"]) == (2, 0)
    config = yaml.safe_load((made.folder / "configs" / "ssim-0.yaml").read_text())
    first = made.run_folder(made.task("mse-0"))
    assert config["run"]["init_from"] == f"{first}/checkpoints/last.ckpt"
    assert main(words) == 0
    assert "starts" not in capfd.readouterr().err


def test_a_mirror_that_fails_holds_up_no_other_task(
    tmp_path: Path, recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A task whose mirror lacks its end is complete; the status of the whole says it."""
    mirror = tmp_path / "mirror"
    one = {"config": "recipe.yaml", "set": {"trainer.max_steps": 3}}
    mirrored = {**one, "set": {**one["set"], "run.mirror": str(mirror), "run.name": "mirrored"}}
    stages = {"first": mirrored, "second": one}
    words = ["sweep", "run", str(write(tmp_path, stages)), "--out", str(tmp_path / "sweeps")]
    made = plan(tmp_path, stages)
    begun = ["fit", "--config", str(made.folder / "configs" / "first-0.yaml")]
    assert wait(start([*begun, "--run.checkpoint_minutes", "0"], kill_at_step(2))) == -9

    def obstruct() -> bool:
        """The process that copies may outlive the killed run for a moment, and make the folder anew."""
        shutil.rmtree(mirror, ignore_errors=True)
        with contextlib.suppress(IsADirectoryError):
            mirror.write_text("in the way")
        return mirror.is_file()

    wait_for("the mirror to be a file", obstruct)
    assert main(words) == 3
    captured = capfd.readouterr()
    assert "the end of this run, step 3, is not in its mirror" in captured.err
    assert [row.state for row in status(made, {})] == ["complete"] * 2
    assert main(words) == 0  # there is nothing left to train


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_stopped_stops_its_task(
    tmp_path: Path, recipe: Path, number: signal.Signals
) -> None:
    """TERM or KILL at the sweep's process: the task saves itself, no process stays; after TERM it says 75."""
    write(tmp_path, {"one": {"config": "recipe.yaml", "set": {"trainer.max_steps": 1000000}}})
    words = [sys.executable, "-m", "lightning_tucodec.cli", "sweep", "run", "sweep.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(words, cwd=tmp_path, env=environment)
    try:
        wait_for("a step", lambda: any(tmp_path.glob("runs/*/metrics.jsonl")))
        process.send_signal(number)
        assert process.wait(timeout=300) == (75 if number == signal.SIGTERM else -number)
    finally:
        process.kill()
    (manifest,) = tmp_path.glob("runs/*/manifest.json")

    def attempt() -> dict[str, Any]:
        (found,) = json.loads(manifest.read_text())["attempts"]
        return dict(found)

    wait_for("the task's end", lambda: attempt()["exit"])
    assert attempt()["exit"] == "preempted (SIGTERM)"
    wait_for("its process to go", lambda: not lives(attempt()["pid"]))
    assert (manifest.parent / "checkpoints" / "last.ckpt").exists()
    (attempts,) = tmp_path.glob("sweeps/*/attempts/one-0.jsonl")
    last = json.loads(attempts.read_text().splitlines()[-1])
    assert last["status"] == (75 if number == signal.SIGTERM else None)


def test_a_sweep_that_is_told_to_stop_between_two_tasks_stops(
    tmp_path: Path,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The signal comes when the first task has ended and the second one has not begun."""
    write(tmp_path, {"one": {"config": "recipe.yaml", "grid": {"model.lmbda": [1.0, 2.0]}}})
    monkeypatch.chdir(tmp_path)
    begun: list[Path] = []

    def fit(config: Path) -> tuple[int, int]:
        begun.append(config)
        return 0, signal.SIGINT

    monkeypatch.setattr(commands, "_fit", fit)
    assert main(["sweep", "run", "sweep.yaml"]) == 130
    assert len(begun) == 1
    assert capsys.readouterr().err.splitlines() == ["task one-0", "tucodec: interrupted"]


@pytest.mark.parametrize(
    ("history", "waits"),
    [
        ("", False),
        ("start", True),
        ("start begun", True),
        ("start end", False),
        ("start begun end", False),
    ],
)
def test_an_attempt_waits_for_a_predecessor_without_an_end(
    tmp_path: Path, history: str, waits: bool
) -> None:
    """As long as its node may take to see that it is superseded: on NFS a minute, and its look every 3 s."""
    attempts = tmp_path / "slurm-logs" / "5.jsonl"
    attempts.parent.mkdir()
    attempts.write_text(
        "".join(json.dumps({"event": word, "job": "5"}) + "\n" for word in history.split())
    )
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sleep").write_text(
        f'#!/bin/bash\necho "$1" >>{tmp_path}/pauses\nexec /bin/sleep 0.1\n'
    )
    (tools / "srun").write_text(f"#!/bin/bash\necho starts >>{tmp_path}/pauses\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    env = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "5"}
    command = [str(REPOSITORY / "slurm" / "train.sh"), "c.yaml"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=env, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 0, done.stderr
    pauses = (tmp_path / "pauses").read_text().split()
    before = [float(pause) for pause in pauses[: pauses.index("starts")] if pause != "0.5"]
    assert (sum(before) >= 60 + 2 * 3) == waits
    events = [json.loads(line)["event"] for line in attempts.read_text().splitlines()]
    assert events == [*history.split(), *(["lost"] if waits else []), "start", "end"]


def test_an_attempt_that_goes_on_elsewhere_ends(tmp_path: Path) -> None:
    """As after a lost node whose processes live on: the new attempt has written a line of its own."""
    attempts = tmp_path / "plan" / "attempts" / "one-0.jsonl"
    (tmp_path / "plan" / "configs").mkdir(parents=True)
    (tmp_path / "plan" / "configs" / "one-0.yaml").write_text("{}")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text("#!/bin/bash\nexec sleep 300\n")
    (tools / "srun").chmod(0o755)
    env = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "5"}
    command = [str(REPOSITORY / "slurm" / "train.sh"), "--sweep", "plan", "one", "0"]
    process = subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for("its start", lambda: attempts.exists() and attempts.read_text())
    time.sleep(0.5)
    assert process.poll() is None
    with open(attempts, "a") as stream:
        stream.write('{"event": "lost"}\n')
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75  # with 0, afterok of other jobs could fire
    assert "job 5 goes on elsewhere" in errors
    assert len(attempts.read_text().splitlines()) == 2  # it has not added an end
