"""Ctrl-C and `kill` end every long command at once, with its children, and the same command goes on."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from lightning_tucodec.cli import build_parser, main
from lightning_tucodec.codecs.library import find
from tests.support import options, photo, s3_environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")

Busy = Callable[["Command"], bool]


@dataclass(frozen=True)
class Command:
    """A command that runs."""

    folder: Path
    mark: str
    process: "subprocess.Popen[bytes]"

    def processes(self, *words: str) -> list[int]:
        """Its processes, ended ones aside, in whatever session, that have all the words in their command."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes()
                if self.mark.encode() in (folder / "environ").read_bytes() and all(
                    word.encode() in command for word in words
                ):
                    found.append(int(folder.name))
        return found

    def seconds(self) -> float:
        """Processor time of its first process."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def runs(*words: str) -> Busy:
    """A process with these words is there."""
    return lambda command: bool(command.processes(*words))


def wrote(pattern: str) -> Busy:
    """A file is there."""
    return lambda command: any(command.folder.glob(pattern))


def opened(name: str) -> Busy:
    """Its first process has a file open or mapped."""

    def look(command: Command) -> bool:
        with contextlib.suppress(OSError):
            return name in Path(f"/proc/{command.process.pid}/maps").read_text()
        return False

    return look


def connected(command: Command) -> bool:
    """Its first process has a connection to the silent server."""
    table = Path(f"/proc/{command.process.pid}/net/tcp")
    with contextlib.suppress(OSError):
        inodes = {
            line.split()[9] for line in table.read_text().splitlines() if line.split()[3] == "01"
        }
        for link in Path(f"/proc/{command.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(link).removeprefix("socket:[").rstrip("]") in inodes:
                    return True
    return False


def computes(command: Command) -> bool:
    """It has computed for some seconds."""
    return command.seconds() > 4


@dataclass(frozen=True)
class Case:
    """One command, when it is at its work, and how it is told to end."""

    words: str
    busy: Busy
    number: signal.Signals
    everybody: bool
    """All processes of its session are told, as a terminal does."""
    goes_on: bool = False
    """The same command is called again until it has ended."""
    status: int | None = None
    pause: float = 0.5
    """Seconds after which it is well into it."""
    promised: float = 3.0
    """Seconds to the end of its last process, on a machine that has time; a training saves itself first."""


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
SLOW = "vvc:qp=20,preset=slower"
LEARNED = "compress photos -o tuc --model tiny-mse-5 --effort 9"
CASES = {
    "evaluate": Case(
        f"evaluate photos --codec jpeg:q=30 {SLOW} -o e.json --workers 2",
        runs("libvvenc"), INT, False,
    ),
    "evaluate-learned": Case(
        "evaluate photos --codec tiny-mse-5:effort=9 -o l.json --workers 2", computes, TERM, True
    ),
    "evaluate-memory": Case(
        "evaluate photos --codec tiny-mse-2 -o m.json --memory", runs("spawn_main"), TERM, True, True
    ),
    "compress": Case(LEARNED, computes, INT, True),
    "compress-vvc": Case(
        "compress photos -o vvc/ --model vvc --qp 20 --preset slower", runs("libvvenc"), TERM, False
    ),
    "precode": Case(
        f"shards precode photos --out pre --codec {SLOW} --per-photo 1 --workers 2",
        runs("libvvenc"), TERM, True,
    ),
    "build": Case(
        "shards build photos --out built --patch 32 --max-overlap 0.5 --workers 2 --shard-size 64",
        wrote("built/shard-*.tar"), INT, True, True,
    ),
    "download": Case("shards verify s3://bucket/shards", connected, INT, False),
    "allocate": Case(
        "allocate photos --candidate jpeg:q=5 vvc:qp=45,preset=faster -o chosen --max-bpp 1",
        runs("libvvenc"), HUP, False, True,
    ),
    "allocate-highs": Case("bench allocate --repeats 9", computes, INT, False),
    "verify": Case(
        "clic verify submission --originals photos", runs("clic", "decode"), INT, False, True
    ),
    "verify-all": Case(
        "clic verify submission --originals photos", runs("clic", "decode"), TERM, True, True
    ),
    "clic-compare": Case(
        "clic compare submission --originals photos", runs("clic", "decode"), INT, True
    ),
    "decode": Case("clic decode submission -o png --force", wrote("png/*.png"), TERM, False, True),
    "bench-codec": Case(
        "bench codec --models tiny --peers --size 512 768 --repeats 999", computes, TERM, False
    ),
    "bench-h266": Case("bench h266 photos --preset slower --qp 30 33 36 39", runs("libvvenc"), INT, True),
    "bench-shards": Case("bench shards --count 60 --repeats 99", runs("forkserver"), INT, False),
    "demo": Case("demo", runs("cli", "shards", "build"), TERM, True),
    "compare": Case(
        "compare results.json -o page.html --samples 1000000", computes, INT, True
    ),
    "decompress": Case(
        f"decompress {' '.join(f'many/{i}.tuc' for i in range(200))} -o out/", computes, INT, True
    ),
    "stats": Case("shards stats s3://bucket/shards -o s.png", connected, TERM, False),
    "doctor": Case("doctor --config remote.yaml", connected, INT, True),
    "bench-effort": Case(
        "bench effort photos --model tiny-mse-5 --effort 9 --rows e.jsonl", computes, INT, False
    ),
    "bench-entropy": Case(
        "bench entropy --models tiny --peers --size 512 768 --repeats 9999", computes, INT, True
    ),
    "bench-loader": Case("bench loader --count 60 --repeats 999", computes, TERM, False),
    "bench-parts": Case(f"bench parts photos/0.png --codec {SLOW}", runs("libvvenc"), INT, True),
    "bench-fit": Case("bench fit --steps 5000", runs("bare loop"), INT, True),
    "bench-train": Case("bench train --steps 5000", computes, INT, True),
    # Trainings save themselves, also in a sweep; before they train there is nothing to save.
    "fit": Case("fit --config recipe.yaml", opened("libtorch_cpu"), INT, True),
    "fit-remote": Case("fit --config remote.yaml", connected, INT, False, status=75),
    "fit-mirror": Case(
        "fit --config recipe.yaml --mirror s3://bucket/runs", connected, TERM, True, status=75
    ),
    "validate": Case("validate --config recipe.yaml", opened("libtorch_cpu"), TERM, False),
    "sweep": Case(
        "sweep run sweep.yaml", wrote("runs/*/checkpoints/*.ckpt"), INT, False, status=75, promised=6.0
    ),
    "sweep-imports": Case("sweep run sweep.yaml", runs("cli", "fit"), INT, True),
    "sweep-starts": Case("sweep run sweep.yaml", runs("cli", "fit"), INT, False, pause=0.0),
    "warmup": Case("warmup", computes, INT, True),
    "export": Case(
        f"export {'model.safetensors ' * 40}-o x.safetensors",  # an average, which takes seconds
        opened("model.safetensors"), TERM, False, True,
    ),
}  # fmt: skip
"""Most take minutes."""


QUICK = {
    *("info", "models", "import", "clic check", "clic reach", "bench complexity", "wandb-sync"),
    *(f"sweep {name}" for name in ("plan", "submit", "retry", "status", "resolve")),
    *("test",),  # `validate` under another name
}
"""Commands without a case: those that end by themselves in seconds, and what waits for W&B's own client."""

RECIPE = """
run: {runs_dir: runs, checkpoint_minutes: 0}
model: {preset: tiny}
data: {shards: shards, batch_size: 2, crop: 16}
trainer: {accelerator: cpu, devices: 1, max_steps: 1000000}
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands name."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "photos").mkdir()
    for index in range(4):
        picture = Image.fromarray(photo("coffee.png", 400, 300, left=50 * index))
        picture.resize((800, 600)).save(folder / "photos" / f"{index}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        candidates = ["jpeg:q=5", "tiny-mse-5"]
        words = ["allocate", "photos", "--candidate", *candidates, "-o", "submission"]
        assert main([*words, "--min-psnr", "30"]) == 0
        codecs = [f"{name}:q={q}" for name in ("jpeg", "webp") for q in (10, 20, 40, 60)]
        assert main(["evaluate", "photos", "--codec", *codecs, "-o", "results.json"]) == 0
        for command in (
            "shards build photos --out shards --patch 32 --count 8 --workers 1",
            "compress photos/0.png -o photo.tuc --model tiny-mse-5",
        ):
            assert main(command.split()) == 0
    (folder / "many").mkdir()
    for index in range(200):
        (folder / "many" / f"{index}.tuc").write_bytes((folder / "photo.tuc").read_bytes())
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "remote.yaml").write_text(
        RECIPE.replace("shards: shards", "shards: s3://bucket/shards")
    )
    (folder / "sweep.yaml").write_text("name: s\nstages: {one: {config: recipe.yaml}}\n")
    (folder / "model.safetensors").write_bytes(find("tiny-mse-5").read_bytes())
    return folder


@contextlib.contextmanager
def started(words: str, folder: Path, **more: str) -> Iterator[Command]:
    """A command in a session of its own, whose output goes to the file `said`."""
    with process(
        [sys.executable, "-m", "lightning_tucodec.cli", *words.split()], folder, **more
    ) as it:
        yield it


@contextlib.contextmanager
def process(words: list[str], folder: Path, **more: str) -> Iterator[Command]:
    """Any process, otherwise as `started`."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, "TUCODEC_TEST": mark, "OMP_NUM_THREADS": "1", **more}
    with (
        (folder / "said").open("wb") as said,
        subprocess.Popen(
            words, cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True,
        ) as child,
    ):  # fmt: skip
        command = Command(folder, mark, child)
        try:
            yield command
        finally:
            for pid in command.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def until(wanted: Callable[[], bool], seconds: float) -> float:
    """Wait for something; how long it took."""
    begun = time.monotonic()
    while not wanted():
        assert time.monotonic() - begun < seconds
        time.sleep(0.02)
    return time.monotonic() - begun


def slowdown() -> float:
    """How many times longer the machine's other load lets a computation take; 1 where there is none."""
    begun, computed = time.monotonic(), time.thread_time()
    while time.thread_time() - computed < 0.3:
        pass
    return max(1.0, (time.monotonic() - begun) / 0.3)


def interrupt(command: Command, case: Case) -> tuple[float, int]:
    """Seconds from the signal to the end of the last process, and the status."""
    time.sleep(case.pause)
    assert command.process.poll() is None, (command.folder / "said").read_text()
    (os.killpg if case.everybody else os.kill)(command.process.pid, case.number)
    seconds = until(lambda: command.process.poll() is not None and not command.processes(), 60)
    return seconds, command.process.returncode


def test_every_command_has_a_case() -> None:
    names = {command for command, _ in options(build_parser()) if command}
    commands = {name for name in names if not any(n.startswith(f"{name} ") for n in names)}
    words = {case.words for case in CASES.values()}
    lacking = {name for name in commands if not any(f"{w} ".startswith(f"{name} ") for w in words)}
    assert lacking == QUICK


@pytest.mark.parametrize("name", CASES)
def test_a_signal_ends_it_at_once(name: str, material: Path, tmp_path: Path) -> None:
    case = CASES[name]
    for path in material.iterdir():
        if path.name != "said":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tmp").mkdir()
    with silent_server() as port, tempfile.TemporaryDirectory() as short:
        # Below pytest's own folder the name of a fork server's socket would be too long.
        (Path(short) / "t").symlink_to(tmp_path / "tmp")
        environment = {"TMPDIR": f"{short}/t"}
        if name == "warmup":
            environment["NUMBA_CACHE_DIR"] = str(tmp_path / "compiled")
        if case.busy is connected:
            environment |= s3_environment(f"http://127.0.0.1:{port}")
        before = slowdown()
        with started(case.words, tmp_path, **environment) as command:
            until(lambda: case.busy(command) or command.process.poll() is not None, 300)
            seconds, status = interrupt(command, case)
    slow = max(before, slowdown())
    text = (tmp_path / "said").read_text()
    print(f"{name}: {seconds:.2f} s, slowdown {slow:.1f}", file=sys.__stderr__, flush=True)
    assert status == (case.status or 128 + case.number), text
    assert seconds < case.promised * slow
    assert "Traceback" not in text
    assert "tucodec: interrupted" in text or case.status
    assert not left(tmp_path)
    if case.goes_on:
        environment["TMPDIR"] = str(tmp_path / "tmp")
        with started(case.words, tmp_path, **environment) as command:
            assert command.process.wait(300) == 0, (tmp_path / "said").read_text()
        assert not left(tmp_path)


SLOW_WORKER = """
import multiprocessing, signal, sys
from lightning_tucodec.io import processes
try:
    with processes.interruptible():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["slow"])
        context.Process(target=print).start()
except processes.Interrupted as interrupt:
    processes.end(interrupt.status)
"""


def test_nothing_outlives_it_that_still_imports(tmp_path: Path) -> None:
    """The server that workers are forked from imports torch first; it is not waited for."""
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\npathlib.Path('at it').touch()\ntime.sleep(60)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    with process([sys.executable, "-c", SLOW_WORKER], tmp_path, PYTHONPATH=path) as command:
        until(lambda: (tmp_path / "at it").exists(), 60)
        command.process.send_signal(INT)
        until(lambda: command.process.poll() is not None and not command.processes(), 15)
    assert command.process.returncode == 130
    assert (tmp_path / "said").read_text() == ""


FORKED = """
import multiprocessing, os, sys
from lightning_tucodec.io import processes

def work():
    process = multiprocessing.get_context("forkserver").Process(target=os.getpid)
    process.start()
    process.join()
    return process.exitcode

assert work() == 0
if not (child := os.fork()):
    processes.end(0)
assert os.waitpid(child, 0)[1] == 0
processes.stop(0)
assert work() == 0
"""


def test_workers_still_start_after_a_fork_has_ended_or_an_interrupt(tmp_path: Path) -> None:
    """The folder and the server of multiprocessing are their parent's, and the caller's of `main`."""
    with process([sys.executable, "-c", FORKED], tmp_path) as command:
        assert command.process.wait(60) == 0, (tmp_path / "said").read_text()
    assert (tmp_path / "said").read_text() == ""


DROPPED = """
import ctypes, os, signal, time
from lightning_tucodec.io import processes

class Object:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

def compare(*_):
    os.kill(os.getpid(), signal.SIGINT)
    return 0

try:
    with processes.interruptible():
        if CALLBACK:
            kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
            ctypes.CDLL(None).qsort((ctypes.c_int * 2)(), 2, 4, kind(compare))
        else:
            Object()
        time.sleep(60)
except processes.Interrupted as interrupt:
    raise SystemExit(interrupt.status)
"""


@pytest.mark.parametrize("callback", [True, False])
def test_an_interrupt_where_python_drops_exceptions_is_told_again(
    callback: bool, tmp_path: Path
) -> None:
    """In a function that C calls, as numba's while it loads compiled code, and in a destructor."""
    program = DROPPED.replace("CALLBACK", str(callback))
    with process([sys.executable, "-c", program], tmp_path) as command:
        assert command.process.wait(60) == 130
    # Without the announcement of the watch, which would have ended it when its time was over.
    assert (tmp_path / "said").read_text() == ""


STARTS = """
import pathlib, sys, time
if "fit" in sys.orig_argv:
    pathlib.Path("at it").touch()
    time.sleep(60)
"""


BOTH_AT_ONCE = """
import os, signal
from lightning_tucodec.io import processes

def ended(number, frame):
    raise RuntimeError("a worker of PyTorch has ended")

signal.signal(signal.SIGCHLD, ended)
try:
    with processes.interruptible():
        signals = {signal.SIGINT, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        for number in signals:
            os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
except processes.Interrupted:
    print("interrupted", signal.getsignal(signal.SIGCHLD) is ended)
"""


def test_the_end_of_a_child_beside_an_interrupt_is_not_told() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BOTH_AT_ONCE], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("interrupted True\n", "")


def test_a_task_whose_python_only_starts_hears_term(tmp_path: Path) -> None:
    """To Ctrl-C it would answer with a traceback; shown by a Python that takes long to start."""
    Image.fromarray(photo("coffee.png", 96, 64)).save(tmp_path / "photo.png")
    words = ["shards", "build", str(tmp_path / "photo.png"), "--out", str(tmp_path / "shards")]
    assert main([*words, "--patch", "32", "--count", "4", "--workers", "1"]) == 0
    (tmp_path / "sitecustomize.py").write_text(STARTS)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "sweep.yaml").write_text("name: s\nstages: {one: {config: recipe.yaml}}\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    with started("sweep run sweep.yaml", tmp_path, PYTHONPATH=path) as command:
        until(lambda: (tmp_path / "at it").exists() or command.process.poll() is not None, 120)
        command.process.send_signal(INT)
        until(lambda: command.process.poll() is not None and not command.processes(), 15)
    assert command.process.returncode == 130
    said = (tmp_path / "said").read_text().splitlines()
    assert said[-2:] == ["task one-0", "tucodec: interrupted"]


def left(folder: Path) -> list[Path]:
    """Temporary files."""
    found = [path for path in folder.rglob("*") if ".tucodec." in path.name]
    return found + [path for path in (folder / "tmp").iterdir() if "torch" not in path.name]


@contextlib.contextmanager
def silent_server() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
