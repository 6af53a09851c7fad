"""A run that begins on one cluster and ends on another, with nothing but a bucket between them."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from lightning_tucodec.training.beside.mirror import read_index
from lightning_tucodec.training.runs.folder import RunFolder, read_metrics
from tests.campaigns.cluster import STEPS, Box, Subject, missing_programs, wait_for
from tests.wandb_server import WandbServer


def test_a_run_moves_to_another_cluster(
    box_recipe: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two controllers, other roots and shards, two nodes and one; the first is gone without a word."""
    why = missing_programs()
    if why:
        pytest.skip(why)
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "w"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    mirrored = [f"run.mirror={bucket}", "run.wandb=true"]
    with WandbServer().serving() as wandb:
        monkeypatch.setenv("WANDB_BASE_URL", wandb.url)
        first = Box(tmp_path / "first", 2)
        try:
            begun = Subject(first, "begun", box_recipe, sets=mirrored)

            def mirrored_step() -> int:
                index = read_index(RunFolder(begun.run), bucket)
                return max((entry["step"] for entry in index.get("checkpoints", [])), default=0)

            begun.freeze_at(60)
            wait_for("a mirrored checkpoint", lambda: mirrored_step() >= 10, 0.5)
            wait_for("lines at W&B", lambda: any(run.history for run in wandb.runs.values()), 0.5)
        finally:
            first.stop()
        step = mirrored_step()
        assert step < STEPS
        shards = tmp_path / "elsewhere"
        shutil.copytree(yaml.safe_load(box_recipe.read_text())["data"]["shards"], shards)
        second = Box(tmp_path / "second", 1)
        try:
            ended = Subject(second, "ended", box_recipe, sets=[*mirrored, f"data.shards={shards}"])
            ended.finish()
        finally:
            second.stop()
    assert ended.run != begun.run
    assert ended.run.name == begun.run.name
    manifest = json.loads((ended.run / "manifest.json").read_text())
    assert [
        (a["world_size"], a["from_step"], a["step"], a["exit"]) for a in manifest["attempts"]
    ] == [(2, 0, None, "killed"), (1, step, STEPS, "finished")]
    rows = read_metrics(ended.run / "metrics.jsonl")
    steps = [row["opt_step"] for row in rows if "train/loss" in row]
    assert steps == list(range(2, STEPS + 1, 2))
    # Both clusters have written one and the same run of W&B, which has each line once and in order.
    assert list(wandb.runs) == [manifest["run_id"]]
    sent = wandb.runs[manifest["run_id"]].rows
    assert [row["opt_step"] for row in sent] == [row["opt_step"] for row in rows]
