"""On a real Slurm cluster: a sweep from one command to its end, a run that everything hits, two clusters."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from lightning_tucodec.report.numbers import differences
from lightning_tucodec.report.sources import read_sources
from lightning_tucodec.sweeps.plan import Plan
from tests.campaigns.cluster import (
    HITS,
    REPOSITORY,
    STEPS,
    Box,
    Subject,
    difference,
    endure,
    lives,
    missing_programs,
    small_disk,
    wait_for,
    write_recipe,
)

LAMBDAS = [1.0, 6.0, 30.0, 150.0, 3000.0]


def rows(box: Box, plan: Plan) -> dict[str, dict[str, object]]:
    printed = json.loads(box.tucodec("sweep", "status", plan.folder, "--json"))
    return {row["task"]: row for row in printed}


@pytest.fixture(scope="module")
def straight(box: Box, box_recipe: Path) -> Subject:
    """A run that nothing hits, submitted."""
    return Subject(box, "straight", box_recipe)


@pytest.fixture(scope="module")
def swept(box: Box, box_recipe: Path, straight: Subject) -> Plan:
    """Five tasks after a common first stage, submitted by `sbatch slurm/sweep_lambdas.sh`, all complete.

    The straight run is trained beside them.
    """
    sweep = box.work / "lambdas.yaml"
    stages = {
        "first": {
            "config": str(box_recipe),
            "set": {"model.lmbda": 400.0, "trainer.max_steps": 30, "run.name": "first"},
        },
        "lambdas": {
            "config": str(box_recipe),
            "grid": {"model.lmbda": LAMBDAS},
            "init_from": {"stage": "first"},
        },
    }
    sweep.write_text(yaml.safe_dump({"name": "lambdas", "stages": stages}, sort_keys=False))
    folder = Path(box.tucodec("sweep", "plan", sweep))
    plan = Plan.open(box.work / folder)
    assert {row["state"] for row in rows(box, plan).values()} == {"planned"}
    box.call("sbatch", "--wait", "--output=planner.log", "slurm/sweep_lambdas.sh", sweep)
    states = {name: row["state"] for name, row in rows(box, plan).items()}
    assert states["first-0"] in ("pending", "running", "complete")
    assert states["lambdas-4"] == "waiting" or states["first-0"] == "complete"

    # Submitting again adds nothing to what is in the queue (the first stage may have left it by now).
    before = {name: job.array for name, job in box.queue(plan).items()}
    assert set(before) | {"first-0"} == set(plan.tasks)
    box.tucodec("sweep", "submit", folder)
    after = {name: job.array for name, job in box.queue(plan).items()}
    assert after.items() <= before.items()

    seen = set()

    def complete() -> bool:
        found = rows(box, plan)
        seen.update(str(row["state"]) for row in found.values())
        assert not {"failed", "lost"} & seen, found
        return all(row["state"] == "complete" for row in found.values())

    wait_for("the sweep", complete, 2.0)
    assert "running" in seen
    return plan


def test_five_tasks_with_ddp_complete_in_the_order_of_lambda(box: Box, swept: Plan) -> None:
    found = [row for name, row in rows(box, swept).items() if name.startswith("lambdas")]
    assert [row["label"] for row in found] == [{"model.lmbda": value} for value in LAMBDAS]
    assert [(row["step"], row["steps"], row["restarts"]) for row in found] == [
        (STEPS, STEPS, 0)
    ] * 5
    rates = [row["bpp"] for row in found]
    assert rates == sorted(rates), rates
    assert len(set(rates)) == 5
    for task in swept.tasks.values():
        log = swept.file("logs", task, ".log").read_text()
        assert "GLOBAL_RANK: 1, MEMBER: 2/2" in log
    table = box.tucodec("sweep", "status", swept.folder)
    assert f"{STEPS}/{STEPS}" in table
    assert "nothing to submit" in box.call(
        "bash", "-c", f"bash slurm/sweep_lambdas.sh {box.work}/lambdas.yaml 2>&1"
    )


def test_compare_draws_the_sweep_as_one_curve(box: Box, swept: Plan) -> None:
    report = box.work / "report.html"
    box.tucodec("compare", swept.folder, "--json", "-o", report)
    page = report.read_text()
    assert f"{swept.folder.name}: lambdas" in page
    assert "Centres that the validation images use" in page
    material = read_sources([str(swept.folder)])
    curves = {entry.curve.name: entry.curve for entry in material.entries}
    rates, _ = curves[f"{swept.folder.name}: lambdas"].lines["psnr"]
    assert len(rates) == len(LAMBDAS)
    assert differences(material.runs[1:])["model.lmbda"] == LAMBDAS


def test_a_task_that_cannot_work_is_shown_and_retried(box: Box, box_recipe: Path) -> None:
    sweep = box.work / "broken.yaml"
    stages = {
        "one": {"config": str(box_recipe), "set": {"model.preset": "huge", "trainer.max_steps": 2}},
        "two": {"config": str(box_recipe), "init_from": {"stage": "one"}},
    }
    sweep.write_text(yaml.safe_dump({"name": "broken", "stages": stages}, sort_keys=False))
    plan = Plan.open(box.work / box.tucodec("sweep", "submit", sweep))
    wait_for("the end", lambda: not box.queue(plan), 1.0)
    found = rows(box, plan)
    assert found["one-0"]["state"] == "failed"
    assert "huge" in str(found["one-0"]["note"])
    assert found["two-0"]["state"] == "planned"  # its job was never started, and is gone
    box.tucodec("sweep", "retry", plan.folder, "one-0")
    assert list(box.queue(plan)) == ["one-0"]
    box.call("scancel", box.queue(plan)["one-0"].array)
    wait_for("the end", lambda: not box.queue(plan), 0.5)


def test_a_cluster_that_hands_nothing_on_and_paths_with_spaces(box: Box, box_recipe: Path) -> None:
    """SBATCH_EXPORT=NONE: neither job nor processes know the environment that the job was submitted in."""
    checkout = box.work / "a checkout"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / "slurm").symlink_to(REPOSITORY / "slurm")
    program = checkout / ".venv" / "bin" / "tucodec"
    words = f'exec {shlex.quote(sys.executable)} -m lightning_tucodec.cli "$@"'
    program.write_text(f"#!/bin/sh\nPYTHONPATH={shlex.quote(str(REPOSITORY))} {words}\n")
    program.chmod(0o755)
    site = checkout / "the site.sh"
    site.write_text(f"source {shlex.quote(box.env['TUCODEC_SITE'])}\nSITE_TUCODEC=\n")
    write_recipe(
        checkout / "a recipe.yaml", yaml.safe_load(box_recipe.read_text())["data"], steps=3
    )
    job = box.call(
        "env", "SBATCH_EXPORT=NONE", f"TUCODEC_SITE={site}", "bash", "-c",
        "cd 'a checkout' && slurm/train.sh 'a recipe.yaml'",
    )  # fmt: skip
    wait_for("the job's end", lambda: job not in box.call("squeue", "--noheader", "--format=%A"), 1)
    (log,) = (checkout / "slurm-logs").glob("*.log")
    manifests = [json.loads(path.read_text()) for path in checkout.glob("runs/*/manifest.json")]
    assert manifests, log.read_text()
    (attempt,) = manifests[0]["attempts"]
    assert (attempt["exit"], attempt["world_size"]) == ("finished", 2)


def test_a_launcher_submitted_from_elsewhere_finds_its_repository(
    box: Box, box_recipe: Path, tmp_path: Path
) -> None:
    """Slurm runs a copy in its spool, without the environment; only Slurm knows where it comes from."""
    sweep = tmp_path / "a sweep.sh.yaml"
    sweep.write_text(yaml.safe_dump({"name": "far", "stages": {"a": {"config": str(box_recipe)}}}))
    told = f"TUCODEC_SITE={box.env['TUCODEC_SITE']},PYTHONPATH={REPOSITORY}"
    script = REPOSITORY / "slurm" / "sweep_lambdas.sh"
    box.call(
        "env", "--chdir", tmp_path, "sbatch", "--wait", f"--export={told}", "--output=log",
        script, sweep, "--dry-run",
    )  # fmt: skip
    log = (tmp_path / "log").read_text()
    assert f"{REPOSITORY}/slurm/train.sh --sweep sweeps/far-" in log, log


def test_what_one_process_refuses_ends_the_job(box: Box, box_recipe: Path) -> None:
    """Rank 0 alone finds that the folder is another run's; the other one waits for it. No requeue."""

    def occupy(run: Path) -> None:
        run.mkdir(parents=True)
        (run / "manifest.json").write_text('{"identity": {"model": "another"}}')

    subject = Subject(box, "refused", box_recipe, sets=["model.lmbda=201"], prepare=occupy)
    assert subject.wait_end() == 1
    wait_for("its job to leave the queue", lambda: not box.queue(subject.plan), 0.5)
    (row,) = rows(box, subject.plan).values()
    assert (row["state"], row["restarts"]) == ("failed", 0)
    assert "was begun with another configuration" in str(row["note"])


def test_a_job_that_is_killed_without_progress_stays_down_and_says_why(
    box: Box, box_recipe: Path
) -> None:
    """One of two processes is killed at each start, as for want of memory, before anything was saved.

    The other one only sees that its connection is closed.
    """
    sets = ["model.lmbda=202", "run.checkpoint_minutes=60"]
    subject = Subject(box, "greedy", box_recipe, sets=sets)
    for start in range(2):
        wait_for("the start", lambda number=start: len(subject.events("start")) > number)
        os.kill(subject.freeze_at(2)[1], signal.SIGKILL)
        os.kill(subject.ranks()[0], signal.SIGCONT)
    wait_for("three ends", lambda: len(subject.events("end")) == 3)
    wait_for("its job to leave the queue", lambda: not box.queue(subject.plan), 0.5)
    (row,) = rows(box, subject.plan).values()
    assert (row["state"], row["restarts"]) == ("failed", 2)
    assert "2 starts of this job in a row were killed or failed at step 0" in str(row["note"])
    attempts = json.loads((subject.run / "manifest.json").read_text())["attempts"]
    assert len(attempts) == 2
    assert all("another process ended first" in attempt["error"] for attempt in attempts), attempts


def test_scancel_ends_a_job_which_a_retry_brings_back(box: Box, box_recipe: Path) -> None:
    subject = Subject(box, "cancelled", box_recipe, sets=["model.lmbda=203"])
    wait_for("the start", lambda: subject.events("start"))
    subject.freeze_at(2)
    box.call("scancel", subject.job)
    for rank in subject.ranks():
        os.kill(rank, signal.SIGCONT)
    wait_for("the end", lambda: subject.events("end"))
    wait_for("its job to leave the queue", lambda: not box.queue(subject.plan), 0.5)
    (end,) = subject.events("end")
    assert "was cancelled" in end["reason"]
    (row,) = rows(box, subject.plan).values()
    assert (row["state"], row["restarts"]) == ("failed", 0)
    box.tucodec("sweep", "retry", subject.plan.folder)
    wait_for("the second end", lambda: len(subject.events("end")) == 2)
    (row,) = rows(box, subject.plan).values()
    assert row["state"] == "complete"


def test_a_job_that_is_killed_before_training_begins_stays_down(box: Box, box_recipe: Path) -> None:
    program = box.work / "too-big"
    program.write_text("#!/bin/bash\nkill -KILL $$\n")
    program.chmod(0o755)
    subject = Subject(box, "too-big-run", box_recipe, SITE_TUCODEC=program)
    wait_for("two ends", lambda: len(subject.events("end")) == 2)
    wait_for("its job to leave the queue", lambda: not box.queue(subject.plan), 0.5)
    (row,) = rows(box, subject.plan).values()
    assert (row["state"], row["restarts"]) == ("failed", 1)
    assert "was killed before training began, twice in a row" in str(row["note"])


def test_signals_reach_the_program_and_two_processes_a_node_are_one_run(
    box: Box, box_recipe: Path, straight: Subject
) -> None:
    """`scancel --signal` to a job of one process a GPU: it saves itself, is requeued and goes on."""
    shape = {"SITE_NODES": 1, "SITE_TASKS_PER_NODE": 2}
    subject = Subject(box, "one-node", box_recipe, **shape)
    for number, name in enumerate(("USR1", "TERM")):
        ranks = subject.freeze_at(10 + 60 * number)
        assert {_node_of(pid) for pid in ranks} == {"0"}
        starts = len(subject.events("start"))
        box.call("scancel", f"--signal={name}", subject.job)
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        assert subject.wait_end() == 75
        subject.keep_going(starts)
    subject.finish()
    straight.finish()
    manifest = json.loads((subject.run / "manifest.json").read_text())
    exits = [attempt["exit"] for attempt in manifest["attempts"]]
    assert exits == ["preempted (SIGUSR1)", "preempted (SIGTERM)", "finished"]
    assert difference(straight.run, subject.run) == ""


@pytest.mark.parametrize("hands_on", [True, False])
def test_signals_pass_a_container_that_hands_them_on(
    box: Box, box_recipe: Path, hands_on: bool
) -> None:
    """Wrappers that become the program do; one that waits for it is ended by the signal, and it too."""
    script = box.work / f"container-{hands_on}"
    script.write_text(f'#!/bin/bash\n{"exec " if hands_on else ""}"$@"\n')
    script.chmod(0o755)
    container = f"'env A=b setpriv --no-new-privs {script}'"
    subject = Subject(box, f"contained-{hands_on}", box_recipe, SITE_CONTAINER=container)
    ranks = subject.freeze_at(2)
    box.call("scancel", "--signal=USR1", subject.job)
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    assert subject.wait_end() == (75 if hands_on else 138)
    (first, *_) = json.loads((subject.run / "manifest.json").read_text())["attempts"]
    assert first["exit"] == ("preempted (SIGUSR1)" if hands_on else None)
    wait_for("the training to end", lambda: not any(map(lives, ranks)))
    subject.keep_going(1)
    subject.box.call("scancel", subject.job)
    wait_for("its job to leave the queue", lambda: not box.queue(subject.plan), 0.5)


def _node_of(pid: int) -> str:
    text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    return dict(part.split("=", 1) for part in text.split("\0") if "=" in part)["SLURM_NODEID"]


def test_hit_by_every_kind_a_run_ends_as_the_straight_one(
    box: Box, box_recipe: Path, straight: Subject, tmp_path: Path
) -> None:
    """A slice of `make campaign AREA=cluster`: on each of two clusters one run and half of the kinds."""
    straight.finish()
    other = Box(tmp_path / "other")
    kinds = list(HITS)

    def hit(half: int, cluster: Box, disk: Path | None) -> Subject:
        """Watched from the moment it is submitted: on a fast machine the run takes seconds."""
        subject = Subject(cluster, "hit", box_recipe, disk)
        endure(subject, kinds[half::2], random.Random(f"slice {half}"))
        return subject

    try:
        with small_disk(tmp_path / "disk") as disk, ThreadPoolExecutor(2) as threads:
            ends = [threads.submit(hit, 0, box, None), threads.submit(hit, 1, other, disk)]
            subjects = [end.result() for end in ends]
            assert [difference(straight.run, subject.run) for subject in subjects] == ["", ""]
    finally:
        other.stop()


def test_a_sweep_larger_than_an_array_and_two_plans_of_one_name(
    box_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stages of twelve tasks where arrays hold ten; each has its log and its own predecessor."""
    why = missing_programs()
    if why:
        pytest.skip(why)
    monkeypatch.setenv("MAX_ARRAY", "11")
    program = tmp_path / "trainer"
    program.write_text("#!/bin/bash\necho trained $3\n[[ $SLURM_ARRAY_TASK_ID != 1 ]]\n")
    program.chmod(0o755)
    small = Box(tmp_path / "box", 2, SITE_TUCODEC=program, SITE_STAGGER_SECONDS=0)
    try:
        sweep = small.work / "wide.yaml"
        grid = {"config": str(box_recipe), "grid": {"data.seed": list(range(12))}}
        stages = {"a": grid, "b": {**grid, "init_from": {"stage": "a"}}}
        sweep.write_text(yaml.safe_dump({"name": "wide", "stages": stages}, sort_keys=False))
        plan = Plan.open(Path(small.tucodec("sweep", "plan", sweep, "--out", small.work / "x")))
        twin = Plan.open(Path(small.tucodec("sweep", "plan", sweep, "--out", small.work / "y")))
        assert plan.folder.name == twin.folder.name
        small.tucodec("sweep", "submit", plan.folder)
        assert len({job.array for job in small.queue(plan).values()}) == 4
        assert small.queue(twin) == {}
        wait_for("the jobs' end", lambda: not small.queue(plan), 0.5)
        states = {name: row["state"] for name, row in rows(small, plan).items()}
        failed = {"a-1", "a-11"}
        never = {"b-1", "b-11"}
        assert {name for name, state in states.items() if state == "failed"} == failed
        assert {name for name, state in states.items() if state == "planned"} == never
        assert {name for name, state in states.items() if state == "complete"} == (
            set(plan.tasks) - failed - never
        )
        for name in set(plan.tasks) - never:
            assert f"{name}.yaml" in plan.file("logs", plan.task(name), ".log").read_text()
    finally:
        small.stop()


def test_two_clusters_side_by_side_leave_nothing_behind(tmp_path: Path) -> None:
    why = missing_programs()
    if why:
        pytest.skip(why)
    first, second = Box(tmp_path / "a", 1), Box(tmp_path / ("b" * 100), 3)
    try:
        assert first.call("sinfo", "--noheader", "--partition=normal", "--format=%D") == "1"
        assert second.call("sinfo", "--noheader", "--partition=normal", "--format=%D") == "3"
        third = subprocess.run(
            [REPOSITORY / "slurm" / "localcluster" / "start.sh", first.cluster],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert third.returncode == 1
        assert "is not empty" in third.stderr
        second.call("sbatch", "--nodes=3", "--output=/dev/null", "--wrap", "srun sleep 1000")
        wait_for("the job", lambda: len(second.processes()) > 3)
    finally:
        first.stop()
        second.stop()
    assert not first.cluster.exists()
    assert not second.cluster.exists()
    assert not second.processes()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and os.path.exists(entry / "cmdline"):
            assert str(tmp_path) not in (entry / "cmdline").read_text(errors="replace")
