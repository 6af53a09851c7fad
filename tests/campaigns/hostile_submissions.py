"""Hostile submissions: changed manifests, streams, scripts and links must end in a verdict or a named error.

    python -m tests.campaigns.hostile_submissions --count 5000 --seed 1

Case i of a seed changes a small honest submission always in the same way, decodes it and verifies it as
`tucodec clic` does (in this process, for speed). It must end in a result or a named error of one line;
nothing but pictures in the target may be written; and `verify` may find nothing wrong only where the
script is the honest one and the files are regular ones that the manifest names. A finding is reproduced by
its number (`--only I`). Time and memory have the limits of `hostile`. Counts go to docs/campaigns.json under
the key "hostile_submissions"; the exit status is 1 when any case broke a rule.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from lightning_tucodec.errors import TucodecError
from lightning_tucodec.sets import clic
from lightning_tucodec.sets.contents import DECODE_TEXT, LITTER, contents
from lightning_tucodec.sets.limits import Requirements
from lightning_tucodec.sets.manifest import Limits, read_manifest
from lightning_tucodec.sets.submission import Candidates, build, decode
from tests.campaigns.hostile import LIMIT_BYTES, LIMIT_SECONDS
from tests.campaigns.streams import (
    RESULTS,
    bit_flips,
    insertion,
    measured,
    splice,
    survive,
    tally,
    truncation,
)
from tests.support import photo

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 0.5, 1 << 31, 1 << 70, 10**400, float("nan"), float("inf"), "", "x", "a\nb",
    "\ud800", "\0", "x" * 5000, "../secret", "/etc/passwd", "..", "0.png", "streams/0.bin", "models/x",
    "jpeg:q=40", "jpeg:q=040", "vvc:qp=30,threads=99", "vvc+postfilter:qp=30", "tiny-mse-2",
    [], {}, [[]], {"": None},
)  # fmt: skip
"""What a manifest's values are exchanged for."""

Mutation = Callable[[np.random.Generator, Path], None]


# --- Changes of a submission -----------------------------------------------------------------


def _damaged(rng: np.random.Generator, data: bytes) -> bytes:
    ways = (bit_flips, truncation, splice, insertion)
    return ways[int(rng.integers(len(ways)))](rng, [data])


def _stream(rng: np.random.Generator, folder: Path) -> Path:
    streams = sorted((folder / "streams").iterdir())
    return streams[int(rng.integers(len(streams)))]


def _edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def manifest_bytes(rng: np.random.Generator, folder: Path) -> None:
    """Bits, cuts, splices and insertions in the manifest's text."""
    path = folder / "manifest.json"
    path.write_bytes(_damaged(rng, path.read_bytes()))


def manifest_values(rng: np.random.Generator, folder: Path) -> None:
    """One to three values or keys of the manifest exchanged, removed, repeated or added."""

    def change(tree: Any) -> None:
        parent: Any
        key: Any
        parent, key = {"": tree}, ""
        while isinstance(tree, dict | list) and tree and rng.random() < 0.9:
            keys: Sequence[Any] = list(tree) if isinstance(tree, dict) else range(len(tree))
            parent, key = tree, keys[int(rng.integers(len(keys)))]
            tree = parent[key]
        way = rng.choice(["value", "value", "remove", "repeat", "rename"])
        if way == "remove":
            del parent[key]
        elif way == "repeat" and isinstance(tree, list):
            parent[key] = tree * 2
        elif way == "rename" and isinstance(parent, dict):
            parent["more"] = parent.pop(key)
        else:
            parent[key] = VALUES[int(rng.integers(len(VALUES)))]

    for _ in range(int(rng.integers(1, 4))):
        _edited(folder, change)


def stream_bytes(rng: np.random.Generator, folder: Path) -> None:
    """A damaged stream; every other time the manifest has its size and hash."""
    path = _stream(rng, folder)
    data = _damaged(rng, path.read_bytes())
    path.write_bytes(data)
    told = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def seal(manifest: dict[str, Any]) -> None:
        for entry in manifest["images"]:
            if (folder / entry["file"]) == path:
                entry.update(told)

    if rng.random() < 0.5:
        _edited(folder, seal)


def script(rng: np.random.Generator, folder: Path) -> None:
    """Another script, or none."""
    path = folder / "decode"
    data = _damaged(rng, path.read_bytes())
    path.unlink()
    if rng.random() < 0.9:
        path.write_bytes(data)


def links(rng: np.random.Generator, folder: Path) -> None:
    """A file of the submission, or one more, is a link: outwards, inwards, to itself; or a pipe."""
    names = [*contents(folder), "streams/9.bin", "models/x", "index.html"]
    path = folder / names[int(rng.integers(len(names)))]
    targets = [
        folder.parent / "secret",
        folder / "streams/0.bin",
        folder.parent,
        path,
        Path("/nowhere"),
    ]
    if path.exists():
        targets.append(path.rename(folder.parent / "outside"))
    place = int(rng.integers(len(targets) + 1))
    if place == len(targets):
        os.mkfifo(path)
    else:
        path.symlink_to(targets[place])


def more_files(rng: np.random.Generator, folder: Path) -> None:
    """Files and folders that the manifest does not name; modules that Python might find."""
    names = ["x", "streams/x", "models/streams/0.bin", "lightning_tucodec.py", ".DS_Store", "a\nb"]
    path = folder / names[int(rng.integers(len(names)))]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"raise SystemExit")


def folders(rng: np.random.Generator, folder: Path) -> None:
    """A folder where a file should be, or the reverse; or nothing."""
    path = folder / ["manifest.json", "decode", "streams", "streams/0.bin"][int(rng.integers(4))]
    was_file = path.is_file()
    if was_file:
        path.unlink()
    else:
        shutil.rmtree(path)
    if rng.random() < 0.3:
        return
    if was_file:
        path.mkdir()
    else:
        path.write_bytes(b"")


MUTATIONS: dict[str, Mutation] = {
    change.__name__: change
    for change in (
        *(manifest_bytes, manifest_values, stream_bytes, script),
        *(links, more_files, folders),
    )
}


def mutate(seed: int, case: int, folder: Path) -> str:
    """Change the submission in `folder` as a case does; returns the mutation's name."""
    name = list(MUTATIONS)[case % len(MUTATIONS)]
    MUTATIONS[name](np.random.default_rng([seed, case]), folder)
    return name


# --- One case --------------------------------------------------------------------------------


def _verify(folder: Path, originals: Path) -> list[str]:
    """`clic.verify`, decoding in this process."""
    with mock.patch.object(clic, "_decode_elsewhere", decode):
        return clic.verify(folder, [str(originals)], Requirements(Limits(max_bytes=10**6)))[1]


def _unsound(folder: Path) -> bool:
    """Whether a submission has something that `verify` must find."""
    listed = {entry["file"] for entry in read_manifest(folder)["images"]} | {
        "manifest.json",
        "decode",
    }
    names = {name for name in contents(folder) if os.path.basename(name) not in LITTER}
    linked = any((folder / name).is_symlink() for name in names)
    return linked or names != listed or (folder / "decode").read_text() != DECODE_TEXT


def _tree(folder: Path) -> dict[str, bytes | str]:
    """What lies below a folder, links unfollowed."""
    return {
        name: (folder / name).read_bytes() if os.path.isfile(folder / name) else "other"
        for name in contents(folder)
    }


def outcome(folder: Path, originals: Path, out: Path) -> str:
    """Decode and verify; "sound", "wrong" or the class of the named error; a broken rule begins with "!"."""
    before, found = _tree(folder.parent), "sound"
    try:
        rows = list(decode(folder, out))
        lines = [row["error"] for row in rows if "error" in row] + _verify(folder, originals)
        if lines:
            found = "wrong"
        elif _unsound(folder):
            found = "!accepted"
        if any("\n" in line for line in lines):
            found = "!several lines"
    except TucodecError as error:
        found = "!several lines" if "\n" in str(error) else type(error).__name__
    except Exception as error:  # any other kind is the finding
        found = f"!{type(error).__name__}: {error}"[:200].replace("\n", " ")
    if _tree(folder.parent) != before:
        return "!something beside the target was written"
    if any(path.suffix != ".png" or path.is_symlink() for path in out.rglob("*")):
        return "!something else than pictures was written"
    return found


def make_corpus(root: Path) -> Path:
    """An honest submission of three pictures; `root/originals` holds them."""
    (root / "originals").mkdir()
    for index, name in enumerate(("astronaut.png", "chelsea.png", "coffee.png")):
        Image.fromarray(photo(name, 48, 40)).save(root / "originals" / f"{index}.png")
    out = root / "submission"
    candidates = Candidates.of([str(root / "originals")], ["jpeg:q=40", "webp:q=30"], out)
    build(candidates, out, "sse", Requirements(Limits(max_bytes=1500)), workers=1)
    return out


def run_case(seed: int, case: int, honest: Path) -> tuple[str, tuple[str, float, int, float]]:
    """The mutation's name and outcome, seconds, peak bytes and their share of the limit of one case."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(honest, Path(place, "in", "submission")))
        (folder.parent / "secret").write_bytes(b"secret")
        name = mutate(seed, case, folder)
        originals, out = honest.parent / "originals", Path(place, "out")
        result, seconds, peak = measured(lambda: outcome(folder, originals, out))
        return name, (result, seconds, peak, peak / LIMIT_BYTES)


def _child(pipe: Connection, honest: Path, seed: int, cases: range) -> None:
    """Use the honest submission once, so that what is loaded once is loaded; then send each case's result."""
    with tempfile.TemporaryDirectory() as place:
        assert outcome(honest, honest.parent / "originals", Path(place, "out")) == "sound"
    pipe.send(None)
    for case in cases:
        pipe.send(run_case(seed, case, honest)[1])


# --- The campaign ----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=5_000, help="cases in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", type=int, help="run this case alone and print it")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as root:
        honest = make_corpus(Path(root))
        if arguments.only is not None:
            name, result = run_case(arguments.seed, arguments.only, honest)
            print(f"case {arguments.only}, {name}: {result}")
            return int(result[0].startswith("!"))
        limits = {"seconds": LIMIT_SECONDS, "bytes": LIMIT_BYTES}
        broken = tally(
            arguments.results, "hostile_submissions", {"seed": arguments.seed}, list(MUTATIONS), limits,
            LIMIT_SECONDS, 1.0, arguments.count,
            lambda cases: survive(_child, (honest, arguments.seed), cases),
        )  # fmt: skip
    print(f"{arguments.count} submissions, {broken} broken rules; {arguments.results.name} updated")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
