"""Hostile files beside the streams: models, submissions, shard indexes, mirrors, results and sweeps.

    python -m tests.campaigns.hostile --count 21000 --seed 1

Case i of a seed changes one file of a small honest folder and uses that folder as the commands do. It must
end well or in a named error of one line, within LIMIT_SECONDS and LIMIT_BYTES of resident memory above
what was in use before, and without opening, renaming or removing a file outside the folders of its own, a
connection, or a program other than Python's. The cases run in a child process, which is started anew when
it dies or hangs; a finding is reproduced by its number (`--only I`). Some cases of each kind do more, as
`_seldom` says: the whole command. Counts go to docs/campaigns.json under the key "hostile"; the exit status
is 1 when any case broke a rule.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from lightning_tucodec.errors import TucodecError
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
from tests.support import MICRO, photo

LIMIT_SECONDS = 5.0
LIMIT_BYTES = 400 << 20
HANG_SECONDS = 300.0  # of the wall: a verification starts several processes
OUTSIDE = "/tmp/tucodec-hostile-outside"

Generator = np.random.Generator


# --- Changes of a file -----------------------------------------------------------------------


def deep(depth: int) -> Any:
    """A list in a list in a list …."""
    tree: Any = 0
    for _ in range(depth):
        tree = [tree]
    return tree


VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 70, 10**400, 0.5, -0.0, 1e-300,
    1e308, float("nan"), float("inf"), float("-inf"), "", " ", "x", "nan", "0", "a\nb", "\x00", "\ud800",
    "ä" * 200, "x" * 100_000, "../../escape", f"{OUTSIDE}/x", "~/x", "$HOME/x", ".", "..", "a/b", "%s", "1e9",
    "http://127.0.0.1:9/x", [], {}, [[]], [None], {"": None}, deep(60), list(range(3000)), [1e308] * 3,
    "\x1b[2J", "jpeg:q=40", "vvc:qp=30", "micro",
]  # fmt: skip


def edit_tree(rng: Generator, tree: Any) -> Any:
    """One to three edits of what JSON or YAML hold: other values, keys, lengths and kinds."""
    tree = [copy.deepcopy(tree)]
    for _ in range(int(rng.integers(1, 4))):
        _edit_once(rng, tree)
    return tree[0]


def _edit_once(rng: Generator, tree: list[Any]) -> None:
    """Walk down at random, so that a long list does not draw all edits, and change what is there."""
    parent: Any = tree
    key: Any = 0
    while isinstance(parent[key], dict | list) and parent[key] and rng.random() > 0.15:
        parent = parent[key]
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        key = keys[int(rng.integers(len(keys)))]
    value = parent[key]
    way = rng.choice(
        ["value", "value", "value", "delete", "repeat", "wrap", "nudge", "text", "key"]
    )
    if way == "delete" and parent is not tree:
        del parent[key]
    elif way == "repeat" and isinstance(value, list):
        parent[key] = value * int(rng.integers(2, 4))
    elif way == "wrap":
        parent[key] = [value] if rng.random() < 0.5 else {"x": value}
    elif way == "nudge" and isinstance(value, int | float):
        half = value / 2 if abs(value) < 1e300 else value // 2
        parent[key] = [value + 1, value - 1, -value, value * 1000, half][int(rng.integers(5))]
    elif way == "text":
        parent[key] = str(value)
    elif way == "key" and isinstance(parent, dict):
        parent["unknown"] = parent.pop(key)
    else:
        parent[key] = copy.deepcopy(VALUES[int(rng.integers(len(VALUES)))])


WHOLE = [
    b"", b"null", b"[]", b"{}", b"0", b'"x"', b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}", b"9" * 5000, b"{\x00}", b"\xe4\xf6\xfc: 1\n", b"a: &a [x]\nb: *a\n", b"? [a]\n: b\n",
    b"!!python/object:os.system x\n",
    b"\n".join([b"a0: &a0 [x,x,x,x,x,x,x,x,x]",
                *(b"a%d: &a%d [%s]" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 9))]),
]  # fmt: skip
"""Whole files: empty, of other kinds, deep, in other encodings, with YAML's references that multiply."""


def damage(rng: Generator, data: bytes) -> bytes:
    """Flipped bits, a cut, a splice, an insertion, or another file altogether."""
    ways = (bit_flips, truncation, splice, insertion)
    place = int(rng.integers(len(ways) + 1))
    if place == len(ways) or len(data) < 2:
        return WHOLE[int(rng.integers(len(WHOLE)))]
    return ways[place](rng, [data])


def edit_json(rng: Generator, data: bytes) -> bytes:
    """`edit_tree` of a JSON file."""
    return json.dumps(edit_tree(rng, json.loads(data))).encode()


def edit_yaml(rng: Generator, data: bytes) -> bytes:
    """`edit_tree` of a YAML file."""
    tree = edit_tree(rng, yaml.safe_load(data))
    return yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "surrogatepass")


def edit_model(rng: Generator, data: bytes) -> bytes:
    """Another description, header or tensors in a file of safetensors whose lengths agree."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    way = rng.choice(["description", "description", "description", "header", "values"])
    if way == "description":
        tree = edit_tree(rng, json.loads(header["__metadata__"]["tucodec"]))
        header["__metadata__"]["tucodec"] = json.dumps(tree)
    elif way == "header":
        header = edit_tree(rng, header)
    else:
        names = [name for name in header if name != "__metadata__"]
        start, end = header[names[int(rng.integers(len(names)))]]["data_offsets"]
        filled = [bytes(end - start), b"\xff" * (end - start), rng.bytes(end - start)]
        body[start:end] = filled[int(rng.integers(3))]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(body)


# --- Kinds of folders: how they are made, changed and used ------------------------------------


Change = Callable[[Generator, bytes], bytes]


@dataclass(frozen=True)
class Kind:
    """One kind of folder.

    Attributes:
        build: fills an empty folder.
        files: file to what may be done to it; a pattern stands for the files that it finds.
        use: what commands do with the folder; the second is where they may write.
        seal: makes a manifest's hashes right again after another file was changed.
    """

    build: Callable[[Path], None]
    files: Mapping[str, Sequence[Change]]
    use: Callable[[Path, Path, bool], None]
    seal: Callable[[Path, str], None] = lambda folder, name: None


def command(*words: str) -> None:
    """A command of the console script, whose errors are judged as an exception's are.

    Raises:
        TucodecError: it ended with an error of one line.
        AssertionError: it ended in another way.
    """
    from lightning_tucodec.cli import main

    said, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(told):
        status = main(list(words))
    lines = [line for line in said.getvalue().splitlines() if line.startswith("tucodec: ")]
    if status and told.getvalue():  # a verification that lists what is wrong
        lines = lines or told.getvalue().splitlines()
    if status not in (0, 1) or (status and not lines):
        raise AssertionError(f"{words[0]} ended with {status} and said {said.getvalue()[-200:]}")
    if status:
        raise TucodecError(lines[-1])


def each(*steps: Callable[[], object]) -> None:
    """Take all steps, also after one has failed with a named error; the first one is raised."""
    errors = []
    for step in steps:
        try:
            step()
        except TucodecError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _micro(path: Path) -> None:
    from lightning_tucodec.codecs.learned.model_file import freeze
    from lightning_tucodec.nn.codec import TucodecVAE
    from lightning_tucodec.training.vae import resolve_codec

    card = {"recipe": "mse", "lmbda": 100.0, "opt_step": 10, "kodak": {"bpp": 0.5}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = TucodecVAE(resolve_codec("tiny", MICRO))
    freeze(network, "micro", card).save(path)


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo("coffee.png", 40, 24)).save(path)


def build_model(folder: Path) -> None:
    """A model of a few thousand weights, and a picture."""
    _micro(folder / "micro.safetensors")
    _picture(folder / "picture.png")


def use_model(folder: Path, out: Path, seldom: bool) -> None:
    """List it, code with it and decode; seldom refine as well."""
    import lightning_tucodec
    from lightning_tucodec.codecs import library
    from lightning_tucodec.codecs.registry import codec

    path = folder / "micro.safetensors"
    with Image.open(folder / "picture.png") as picture:
        image = np.array(picture)

    def code() -> None:
        decoded = lightning_tucodec.decompress(library.load(path).compress(image))
        assert decoded.size == image.shape[1::-1]

    def refined() -> None:
        coder = codec(f"{path}:effort=1")
        assert coder.decode(coder.encode(image)).shape == image.shape

    with _only_models_of(folder):
        each(lambda: command("models", "--json"), code)
        if seldom:
            refined()


@contextlib.contextmanager
def _only_models_of(folder: Path) -> Iterator[None]:
    from lightning_tucodec.codecs import cards, library

    shipped, before = cards.SHIPPED, os.environ.get("TUCODEC_MODELS")
    cards.SHIPPED, os.environ["TUCODEC_MODELS"] = folder / "none", str(folder)
    try:
        yield
    finally:
        cards.SHIPPED = shipped
        del os.environ["TUCODEC_MODELS"]
        if before is not None:
            os.environ["TUCODEC_MODELS"] = before
        library._load.forget()
        library._card.forget()


def build_submission(folder: Path) -> None:
    """Two pictures by a learned model, with their originals beside."""
    from lightning_tucodec.sets.limits import Requirements
    from lightning_tucodec.sets.manifest import Limits
    from lightning_tucodec.sets.submission import Candidates, build

    _micro(folder / "micro.safetensors")
    for name in ("a", "b"):
        _picture(folder / "originals" / f"{name}.png")
    out = folder / "submission"
    chosen = Candidates.of([str(folder / "originals")], [str(folder / "micro.safetensors")], out)
    build(chosen, out, "sse", Requirements(Limits(max_bytes=10**6)), workers=1)
    shutil.rmtree(folder / "submission-candidates")
    (folder / "micro.safetensors").unlink()


def seal_submission(folder: Path, name: str) -> None:
    """Make the manifest's hash of a changed stream or model right."""
    path = folder / "submission" / "manifest.json"
    if path == folder / name:
        return
    manifest = json.loads(path.read_text())
    file = name.removeprefix("submission/")
    data = (folder / name).read_bytes()
    told = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for entry in manifest["images"]:
        if entry["file"] == file:
            entry.update(told)
    if file in manifest["models"]:
        manifest["models"][file] = told
    path.write_text(json.dumps(manifest))


def use_submission(folder: Path, out: Path, seldom: bool) -> None:
    """Decode it; seldom verify it, which takes another process."""
    submission = str(folder / "submission")
    with _only_models_of(folder / "none"):
        command("clic", "decode", submission, "-o", str(out))
        if seldom:
            command("clic", "verify", submission, "--originals", str(folder / "originals"))


def build_index(folder: Path) -> None:
    """Three shards of four patches."""
    from data_pipelines.options import BuildOptions
    from data_pipelines.shards import build

    for name in ("chelsea.png", "coffee.png"):
        (folder / "photos").mkdir(exist_ok=True)
        Image.fromarray(photo(name, 130, 130)).save(folder / "photos" / name)
    options = BuildOptions(patch=32, count=12, shard_size=4, duplicate_bits=-1)
    build([str(folder / "photos")], str(folder / "shards"), options, workers=1)
    shutil.rmtree(folder / "photos")


def seal_index(folder: Path, name: str) -> None:
    """Make the index's size and hash of a changed shard right."""
    path = folder / "shards" / "index.json"
    if path == folder / name:
        return
    index = json.loads(path.read_text())
    data = (folder / name).read_bytes()
    for shard in index["shards"]:
        if name.endswith(f"/{shard['name']}"):
            shard.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    path.write_text(json.dumps(index))


def use_index(folder: Path, out: Path, seldom: bool) -> None:
    """Read every patch, where it lies and through a cache; seldom verify."""
    import fsspec

    from lightning_tucodec.training.input.shards import ShardReader

    def read(location: str) -> None:
        reader = ShardReader(location, cache_dir=str(out / "cache"))
        reader.check_cache(1)
        for sample in range(min(len(reader), 50)):
            assert reader.pixels(sample).shape == (reader.index.patch, reader.index.patch, 3)

    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for path in (folder / "shards").iterdir():
        if path.is_file():
            memory.pipe_file(f"/case/{path.name}", path.read_bytes())
    each(lambda: read(str(folder / "shards")), lambda: read("memory://case"))
    if seldom:
        command("shards", "verify", str(folder / "shards"))


def build_mirror(folder: Path) -> None:
    """What `Mirror` keeps of a run: a checkpoint, metrics, manifest, configuration, a picture."""
    from lightning_tucodec.training.beside.mirror import Mirror
    from lightning_tucodec.training.runs.folder import RunFolder

    run = RunFolder(folder / "run")
    run.checkpoints.mkdir(parents=True)
    torch.save({"tucodec": {"opt_step": 7}}, run.checkpoints / "last.ckpt")
    run.metrics.write_text(json.dumps({"opt_step": 7}) + "\n")
    attempt = {
        "start": "2026-01-01T00:00:00",
        "end": None,
        "host": "h",
        "pid": 1,
        "code": 0,
        "exit": None,
    }
    manifest = {"run_id": "x", "code": [{"commit": "c"}], "attempts": [attempt]}
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    (run.path / "config.yaml").write_text("seed_everything: 0\n")
    run.images.mkdir()
    _picture(run.images / "step-00000007.png")
    Mirror(run, str(folder / "mirror")).push()
    shutil.rmtree(run.path)


def seal_mirror(folder: Path, name: str) -> None:
    """Make the index's size and hash of a changed file right, and its name where that holds the hash."""
    path = folder / "mirror" / "run" / "mirror.json"
    if path == folder / name:
        return
    index = json.loads(path.read_text())
    data = (folder / name).read_bytes()
    for entry in [*index["checkpoints"], *index["files"].values()]:
        if name == f"mirror/run/{entry['name']}":
            digest = hashlib.sha256(data).hexdigest()
            named = entry["name"].replace(entry["sha256"][:16], digest[:16])
            (path.parent / entry["name"]).rename(path.parent / named)
            entry.update(name=named, size=len(data), sha256=digest)
    path.write_text(json.dumps(index))


def use_mirror(folder: Path, out: Path, seldom: bool) -> None:
    """Bring a run's state here, and go on with the mirror."""
    from lightning_tucodec.training.beside.mirror import Mirror
    from lightning_tucodec.training.beside.pull import pull
    from lightning_tucodec.training.runs.folder import RunFolder

    run = RunFolder(out / "run")
    run.checkpoints.mkdir(parents=True)
    own = {"start": "2026-02-01T00:00:00", "host": "g", "pid": 2, "code": 0}
    (run.path / "manifest.json").write_text(json.dumps({"code": [{}], "attempts": [own]}))
    url = str(folder / "mirror")

    def push() -> None:
        torch.save({"tucodec": {"opt_step": 9}}, run.checkpoints / "last.ckpt")
        Mirror(run, url).push()

    each(lambda: pull(run, url, None), push)


def build_results(folder: Path) -> None:
    """Two pictures under two families of codecs, without what a clock said."""
    from lightning_tucodec.codecs.registry import codec
    from lightning_tucodec.sets.evaluate import evaluate
    from lightning_tucodec.sets.results import summarise, write_results

    for name in ("a", "b"):
        _picture(folder / "images" / f"{name}.png")
    codecs = [codec(f"{name}:q={q}") for name in ("jpeg", "webp") for q in (10, 30, 60, 90)]
    images = sorted((folder / "images").iterdir())
    rows = evaluate(images, codecs, folder / "rows.jsonl", workers=1)
    rows = [{k: 0.01 if k.endswith("_seconds") else v for k, v in row.items()} for row in rows]
    write_results(folder / "results.json", rows, summarise(rows, codecs), codecs)
    curve = {
        "bpp": [0.5, 1, 2, 4],
        "psnr-rgb": [25, 30, 35, 40],
        "ms-ssim-rgb": [0.8, 0.9, 0.95, 0.98],
    }
    (folder / "curve.json").write_text(
        json.dumps({"name": "c", "description": "d", "results": curve})
    )


def use_results(folder: Path, out: Path, seldom: bool) -> None:
    """Numbers and gallery of a comparison; seldom the whole page."""
    from lightning_tucodec.report.compare import bd_text, build_page
    from lightning_tucodec.report.gallery import scenes
    from lightning_tucodec.report.sources import read_sources

    sources = [str(folder / "results.json"), str(folder / "curve.json")]
    if seldom:
        words = ["-o", str(out / "r.html"), "--samples", "3", "--images", str(folder / "images")]
        command("compare", *sources, *words)
        return
    material = read_sources(sources)
    _, rows = build_page(material, None, "t", samples=3)
    bd_text(rows, None)
    scenes(material.evaluations, [str(folder / "images")], None, 1)


def build_sweep(folder: Path) -> None:
    """Two stages over one recipe."""
    recipe = {"seed_everything": 0, "model": {"recipe": "mse", "lmbda": 100.0, "preset": "tiny"},
              "data": {"shards": "shards", "batch_size": 2}, "trainer": {"max_steps": 4}}  # fmt: skip
    (folder / "shards").mkdir()
    (folder / "shards" / "index.json").write_text("{}")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    grid = {"model.lmbda": [1.0, 2.0], "data.seed": [5, 6]}
    stages = {
        "mse": {"config": "recipe.yaml", "set": {"model.lmbda": 100.0}},
        "ssim": {"config": ["recipe.yaml"], "grid": grid, "init_from": {"stage": "mse"}},
        "chain": {"config": "recipe.yaml", "grid": {"model.lmbda": [1, 2]}, "chain": True},
    }
    text = yaml.safe_dump({"name": "try", "stages": stages}, sort_keys=False)
    (folder / "sweep.yaml").write_text(text)


def use_sweep(folder: Path, out: Path, seldom: bool) -> None:
    """Read it; seldom resolve all its tasks."""
    from lightning_tucodec.sweeps.spec import read_sweep

    with contextlib.chdir(folder):
        if seldom:
            command("sweep", "plan", "sweep.yaml", "--out", str(out / "sweeps"))
        else:
            read_sweep(Path("sweep.yaml"))


KINDS = {
    "model": Kind(build_model, {"micro.safetensors": [edit_model, edit_model, damage]}, use_model),
    "submission": Kind(
        build_submission,
        {"submission/manifest.json": [edit_json, edit_json, edit_json, damage],
         "submission/streams/*": [damage], "submission/models/*": [edit_model]},
        use_submission, seal_submission,
    ),
    "index": Kind(
        build_index,
        {"shards/index.json": [edit_json, edit_json, edit_json, damage], "shards/*.tar": [damage]},
        use_index, seal_index,
    ),
    "mirror": Kind(
        build_mirror,
        {"mirror/run/mirror.json": [edit_json, edit_json, damage],
         "mirror/run/manifest-*.json": [edit_json, damage], "mirror/run/checkpoints/*": [damage]},
        use_mirror, seal_mirror,
    ),
    "results": Kind(
        build_results,
        {"results.json": [edit_json, edit_json, edit_json, damage], "curve.json": [edit_json]},
        use_results,
    ),
    "sweep": Kind(
        build_sweep,
        {"sweep.yaml": [edit_yaml, edit_yaml, damage], "recipe.yaml": [edit_yaml, damage]}, use_sweep,
    ),
}  # fmt: skip


TURNS = [
    *("model", "submission"), *("index", "mirror", "results", "sweep") * 5, "index", "results",
]  # fmt: skip
"""The kinds take turns; those that cost tenths of a second have fewer."""


# --- One case --------------------------------------------------------------------------------


def build_corpus(root: Path) -> dict[str, Path]:
    """The honest folder of each kind."""
    folders = {name: root / name for name in KINDS}
    for name, folder in folders.items():
        folder.mkdir()
        KINDS[name].build(folder)
    return folders


def mutated(seed: int, case: int, corpus: Mapping[str, Path]) -> tuple[str, str, bytes]:
    """Case number `case` of a campaign: its kind, the file that is changed and its bytes."""
    rng = np.random.default_rng([seed, case])
    name = TURNS[case % len(TURNS)]
    ways = [(pattern, way) for pattern, changes in KINDS[name].files.items() for way in changes]
    pattern, change = ways[int(rng.integers(len(ways)))]
    files = sorted(corpus[name].glob(pattern))
    file = files[int(rng.integers(len(files)))]
    return name, str(file.relative_to(corpus[name])), change(rng, file.read_bytes())


class Guard:
    """Notes what a case opens for writing, renames, removes or starts outside of its folders.

    Audit hooks stay for the life of a process; this one looks only while `allowed` is not empty.
    """

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        self.broken: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.allowed:
            return
        paths: Sequence[Any] = ()
        if event == "open" and isinstance(arguments[2], int):
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            paths = arguments[:1] if writes else ()
        elif event in ("os.rename", "os.link", "os.symlink", "shutil.move"):
            paths = arguments[:2] if event in ("os.rename", "shutil.move") else arguments[1:2]
        elif event in (
            "os.remove",
            "os.mkdir",
            "os.rmdir",
            "os.truncate",
            "shutil.rmtree",
            "os.chmod",
        ):
            paths = arguments[:1]
        elif event in ("os.system", "socket.connect", "os.exec", "os.posix_spawn"):
            self.broken.append(f"{event} {arguments[-1]!r}"[:100])
        for path in paths:
            if isinstance(path, int | None):
                continue
            real = os.path.realpath(os.fsdecode(path))
            if event == "open" and os.path.isdir(real):  # a temporary file without a name
                continue
            if not real.startswith((*self.allowed, "/dev/")):
                self.broken.append(f"{event} {real}"[:100])


def outcome(kind: Kind, folder: Path, out: Path, seldom: bool, guard: Guard) -> str:
    """What a use made of a folder.

    Returns:
        "success" or the class of the named error; a broken rule begins with "!".
    """
    guard.broken = []
    temporary = os.path.realpath(tempfile.gettempdir())
    own = f"{os.path.realpath(folder.parent)}/"
    guard.allowed = (own, f"{temporary}/tmp", f"{temporary}/.tucodec.")
    try:
        kind.use(folder, out, seldom)
        result = "success"
    except TucodecError as error:
        one_line = len(str(error).splitlines()) == 1 and str(error).isprintable()
        result = type(error).__name__ if one_line else f"!a message of several lines: {error!r}"
    except BaseException as error:  # any other kind is the finding
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = (
            ""
            if trace is None
            else f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        )
        result = f"!{type(error).__name__}{place}: {error}"
    finally:
        guard.allowed = ()
    return f"!{guard.broken[0]}"[:200] if guard.broken else result[:200].replace("\n", " ")


def _seldom(case: int) -> bool:
    """Whether a case uses the slow commands too."""
    return case // len(TURNS) % 40 == 39


def attempt(
    seed: int, case: int, corpus: Mapping[str, Path], scratch: Path, guard: Guard
) -> tuple[str, float, int, float]:
    """(outcome, seconds, peak bytes, peak over its limit) of a case; leaves nothing behind."""
    name, file, data = mutated(seed, case, corpus)
    work = scratch / f"case-{case}"
    shutil.copytree(corpus[name], work / "in")
    (work / "out").mkdir()
    try:
        (work / "in" / file).write_bytes(data)
        KINDS[name].seal(work / "in", file)
        result, seconds, peak = measured(
            lambda: outcome(KINDS[name], work / "in", work / "out", _seldom(case), guard)
        )
    finally:
        shutil.rmtree(work)
    return result, seconds, peak, peak / LIMIT_BYTES


def _child(
    pipe: Connection, corpus: dict[str, Path], scratch: Path, seed: int, cases: range
) -> None:
    """Use the honest folders once, so that what is loaded once is loaded; then send each case's result."""
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # a case that imports something first would be a finding
    home = scratch / "home"
    for variable in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "TMPDIR"):
        os.environ[variable] = str(home)
    home.mkdir(exist_ok=True)
    os.chdir(home)
    tempfile.tempdir = str(home)
    guard = Guard()
    for name, kind in KINDS.items():
        honest = scratch / name
        shutil.copytree(corpus[name], honest / "in")
        (honest / "out").mkdir()
        kind.use(honest / "in", honest / "out", False)
        shutil.rmtree(honest)
    pipe.send(None)
    for case in cases:
        pipe.send(attempt(seed, case, corpus, scratch, guard))


# --- The campaign ----------------------------------------------------------------------------


def campaign(seed: int, count: int, results: Path) -> int:
    """Run what is left of a campaign; returns the number of broken rules."""
    limits = {"seconds": LIMIT_SECONDS, "bytes": LIMIT_BYTES}
    with tempfile.TemporaryDirectory() as root:
        scratch = Path(root) / "scratch"
        (Path(root) / "corpus").mkdir()
        scratch.mkdir()
        corpus = build_corpus(Path(root) / "corpus")
        return tally(
            results, "hostile", {"seed": seed}, TURNS, limits, LIMIT_SECONDS, 1.0, count,
            lambda cases: survive(_child, (corpus, scratch, seed), cases, HANG_SECONDS),
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=21_000, help="cases in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", type=int, help="run this case alone, here, and print it")
    arguments = parser.parse_args(argv)
    if arguments.only is not None:
        with tempfile.TemporaryDirectory() as root:
            corpus = build_corpus(Path(root))
            name, file, data = mutated(arguments.seed, arguments.only, corpus)
            print(f"case {arguments.only}, {name}, {file}: {data[:2000]!r}")
            result = attempt(arguments.seed, arguments.only, corpus, Path(root), Guard())
            print(result)
            return int(result[0].startswith("!"))
    broken = campaign(arguments.seed, arguments.count, arguments.results)
    print(f"{arguments.count} files, {broken} broken rules; {arguments.results.name} updated")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
