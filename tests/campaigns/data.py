"""Kills: shard builds and training loaders that die by SIGKILL must end as if they had not.

    python -m tests.campaigns.data --kills 60 --seed 1

Case i of a seed always has the same set-up; the moment of a kill depends on the machine as well. A
build must end with the bytes of an undisturbed one and keep the shards that it had completed. A
loader, resumed from its last saved state with any number of ranks and workers, must have handed out
exactly the plan's batches. Counts go to docs/campaigns.json under the key "data"; an interrupted
campaign goes on where it stopped. The exit status is 1 when any case broke a rule.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.options import BuildOptions
from data_pipelines.shards import build
from lightning_tucodec.io.temporary import atomic_write

RESULTS = Path(__file__).parents[2] / "docs" / "campaigns.json"
KILLS_PER_CASE = 4
HANG_SECONDS = 120.0
BATCHES = 40
SAVE_EVERY = 3


def context() -> Any:
    """Processes that start in milliseconds, with everything imported."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(
        [
            "data_pipelines.shards",
            "imagehash",
            "lightning_tucodec.training.data",
            "webdataset.writer",
        ]
    )
    return found


def make_photos(folder: Path, count: int = 20) -> None:
    """Noise pictures of 130×100, one that is damaged and one that is there twice."""
    folder.mkdir()
    for number in range(count):
        rng = np.random.default_rng(number)
        small = Image.fromarray(rng.integers(0, 256, (10, 13, 3), dtype=np.uint8))
        small.resize((130, 100), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.png")
    shutil.copy(folder / "003.png", folder / "copy.png")
    (folder / "damaged.png").write_bytes((folder / "004.png").read_bytes()[:900])


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run_and_kill(
    rng: random.Random, target: Callable[..., None], arguments: Callable[[], tuple[Any, ...]],
    honest_seconds: float, between: Callable[[], None],
) -> int:  # fmt: skip
    """Start `target` again and again, kill it at a random moment, at last let it end.

    Args:
        rng: decides the moments.
        target: runs in a process of its own.
        arguments: for the next start.
        honest_seconds: time of an undisturbed run.
        between: called after each kill.

    Returns:
        The number of kills that hit a running process.

    Raises:
        RuntimeError: the undisturbed end failed or did not come in time.
    """
    kills = 0
    for attempt in range(KILLS_PER_CASE + 1):
        process = context().Process(target=_quiet, args=(target, *arguments()))
        process.start()
        last = attempt == KILLS_PER_CASE
        process.join(HANG_SECONDS if last else rng.uniform(0, honest_seconds))
        if process.exitcode is None:
            process.kill()
            process.join()
            if last:
                raise RuntimeError(f"no end after {HANG_SECONDS:.0f} s")
            kills += 1
        elif process.exitcode != 0:
            raise RuntimeError(f"exit status {process.exitcode}")
        between()
    return kills


def _quiet(target: Callable[..., None], *arguments: Any) -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        target(*arguments)


# --- Builds ----------------------------------------------------------------------------------


def _build(photos: str, out: str, options: BuildOptions, workers: int) -> None:
    build([photos], out, options, workers=workers)


def build_case(seed: int, case: int, scratch: Path) -> tuple[int, str]:
    """One build, killed several times. Returns the kills and what is wrong (or nothing)."""
    rng = random.Random(f"build {seed} {case}")
    photos = scratch / "photos"
    make_photos(photos)
    options = BuildOptions(
        patch=rng.choice((32, 48)), shard_size=rng.choice((7, 16, 40)), seed=rng.randrange(100),
        encoding=rng.choice(("webp", "png", "raw")), count=rng.choice((None, 90)),
    )  # fmt: skip
    workers = rng.choice((1, 1, 2))
    start = time.perf_counter()
    undisturbed = (_build, str(photos), str(scratch / "honest"), options, workers)
    honest = context().Process(target=_quiet, args=undisturbed)
    honest.start()
    honest.join()
    seconds = time.perf_counter() - start
    out = scratch / "killed"
    complete: dict[str, int] = {}
    redone = []

    def between() -> None:
        for name, inode in complete.items():
            if (out / name).stat().st_ino != inode:
                redone.append(name)
        complete.clear()
        for record in (out / ".build").glob("shard-*.json"):
            complete[record.stem] = (out / record.stem).stat().st_ino

    kills = run_and_kill(
        rng, _build, lambda: (str(photos), str(out), options, workers), seconds, between
    )
    if redone:
        return kills, f"complete shards were written again: {sorted(set(redone))}"
    found, expected = fingerprint(out), fingerprint(scratch / "honest")
    other = [name for name in found | expected if found.get(name) != expected.get(name)]
    return kills, f"not the same: {', '.join(sorted(other))}" if other else ""


# --- Loaders ---------------------------------------------------------------------------------


def _train(shards: str, state: str, log: str, batch: int, world: int, workers: int) -> None:
    """A stand-in for training: notes what each global batch held, saves its state now and then."""
    from lightning_tucodec.training.input.batches import RankBatches, data_plan
    from lightning_tucodec.training.input.loader import PlanLoader
    from lightning_tucodec.training.input.shards import ShardReader

    reader = ShardReader(shards)
    ranks = [
        PlanLoader(RankBatches(reader, data_plan(reader, 1), batch, 24, True, rank, world), workers)
        for rank in range(world)
    ]
    done = 0
    if Path(state).exists():
        saved = json.loads(Path(state).read_text())
        for loader in ranks:
            loader.load_state_dict(saved)
        done = saved["position"] // batch
    lines = Path(log).read_text().splitlines()[:done] if done else []
    with open(log, "w") as stream:
        stream.writelines(f"{line}\n" for line in lines)
        stream.flush()
        streams = [_endless(loader) for loader in ranks]
        while done < BATCHES:
            digest = hashlib.sha256()
            for part in map(next, streams):
                digest.update(part["index"].numpy().tobytes())
            stream.write(f"{done} {digest.hexdigest()}\n")
            stream.flush()
            done += 1
            if done % SAVE_EVERY == 0:
                with atomic_write(state, "w") as output:
                    json.dump(ranks[-1].state_dict(), output)


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def loader_case(seed: int, case: int, scratch: Path) -> tuple[int, str]:
    """One training loader, killed several times with ranks and workers changing in between."""
    rng = random.Random(f"loader {seed} {case}")
    make_photos(scratch / "photos")
    shards = str(scratch / "shards")
    build([str(scratch / "photos")], shards, BuildOptions(patch=32, shard_size=16))
    batch = rng.choice((6, 13, 40))
    start = time.perf_counter()
    honest = context().Process(
        target=_train, args=(shards, str(scratch / "a.json"), str(scratch / "a.log"), batch, 1, 0)
    )
    honest.start()
    honest.join()
    seconds = time.perf_counter() - start

    def arguments() -> tuple[Any, ...]:
        files = (str(scratch / "b.json"), str(scratch / "b.log"))
        return (shards, *files, batch, rng.choice((1, 2, 3)), rng.choice((0, 0, 1, 2)))

    kills = run_and_kill(rng, _train, arguments, 1.5 * seconds, lambda: None)
    same = (scratch / "a.log").read_text() == (scratch / "b.log").read_text()
    return kills, "" if same else "other batches"


AREAS = {"build": build_case, "loader": loader_case}


def campaign(seed: int, kills: int, results: Path) -> int:
    """Run cases of both areas until each has had `kills` kills; returns the broken rules."""
    for area, run in AREAS.items():
        counts = _read(results).get(area, {})
        if counts.get("seed") != seed:
            counts = {"seed": seed, "cases": 0, "kills": 0, "broken": []}
        while counts["kills"] < kills:
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    hits, wrong = run(seed, counts["cases"], Path(scratch))
                except RuntimeError as error:
                    hits, wrong = 0, str(error)
            if wrong:
                counts["broken"].append({"case": counts["cases"], "what": wrong})
            counts["cases"] += 1
            counts["kills"] += hits
            _save(results, area, counts)
            print(f"{area}: {counts['kills']}/{kills} kills", file=sys.stderr, flush=True)
    return sum(len(_read(results)[area]["broken"]) for area in AREAS)


def _read(results: Path) -> dict[str, Any]:
    found: dict[str, Any] = (
        json.loads(results.read_text()).get("data", {}) if results.exists() else {}
    )
    return found


def _save(results: Path, area: str, counts: dict[str, Any]) -> None:
    everything = json.loads(results.read_text()) if results.exists() else {}
    everything.setdefault("data", {})[area] = counts
    with atomic_write(results, "w") as stream:
        stream.write(json.dumps(everything, indent=2, sort_keys=True) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=60, help="in each area")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    broken = campaign(arguments.seed, arguments.kills, arguments.results)
    print(f"{arguments.kills} kills of builds and of loaders, {broken} broken rules")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
