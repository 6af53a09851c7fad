"""Environments that lack something: a home folder, open streams, an encoding, a reader of the output."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from lightning_tucodec.cli import main
from lightning_tucodec.io.processes import cores
from tests.support import photo

TUCODEC = [sys.executable, "-m", "lightning_tucodec.cli"]
NOBODY = [
    *("env", "-u", "HOME", "-u", "XDG_DATA_HOME", "-u", "XDG_CACHE_HOME", "setpriv"),
    *("--reuid=4711", "--regid=4711", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
]
"""A user without an entry, a home or a place to write, who can read everything."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with photo.png, and `out` for everybody."""
    Image.fromarray(photo("coffee.png", 40, 32)).save(tmp_path / "photo.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    return tmp_path


def shell(
    line: str, folder: Path, before: list[str] | None = None, **more: str
) -> "subprocess.CompletedProcess[str]":
    """A line of bash in which `tucodec` is the command."""
    script = f'tucodec() {{ "${{COMMAND[@]}}" "$@"; }}; COMMAND=("$@"); {line}'
    words = ["bash", "-c", script, "bash", *(before or []), *TUCODEC]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        words, cwd=folder, env=environment | more, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("line", "result"),
    [
        ("tucodec compress photo.png -o out/a.tuc --model tiny-mse-1", "out/a.tuc"),
        ("tucodec evaluate photo.png --codec jpeg:q=30 -o out/r.json --workers 1", "out/r.json"),
        (
            "tucodec allocate photo.png --candidate jpeg:q=30 -o out/s --max-bpp 9 --workers 1",
            "out/s/manifest.json",
        ),
        ("tucodec models > out/models", "out/models"),
    ],
)
def test_a_user_without_entry_home_or_cache(line: str, result: str, folder: Path) -> None:
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("becoming another user needs root and setpriv")
    if subprocess.run([*NOBODY, "true"], capture_output=True).returncode:
        pytest.skip("setpriv may not pass the right to read on")
    for parent in [folder, *folder.parents][:3]:  # pytest's own folders
        parent.chmod(0o755)
    done = shell(line, folder, NOBODY)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert (folder / result).stat().st_size > 0


def test_closed_streams(folder: Path) -> None:
    """The work is done as with open ones, and no result is mistaken for an output."""
    code = "photo.png --model tiny-mse-1 -o out"
    lines = [
        f"tucodec compress {code}/stderr.tuc 2>&-",
        f"tucodec compress {code}/all.tuc <&- >&- 2>&-",
        "tucodec info out/stderr.tuc >&-",
    ]
    done = shell(" && ".join(lines), folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "out/all.tuc").read_bytes() == (folder / "out/stderr.tuc").read_bytes()
    failed = shell("tucodec info none.tuc 2>&- <&-", folder)
    assert (failed.returncode, failed.stdout) == (1, "")


def test_files_are_made_also_when_the_reader_of_the_lines_has_gone(folder: Path) -> None:
    names = [f"copy{number}.png" for number in range(4)]
    copies = "; ".join(f"cp photo.png {name}" for name in names)
    line = f"tucodec compress {' '.join(names)} -o gone/ --model tiny-mse-2 | head -0"
    done = shell(f"{copies}; {line}; echo ${{PIPESTATUS[0]}}", folder)
    assert (done.stdout, done.stderr) == ("0\n", "")
    assert len(list((folder / "gone").glob("*.tuc"))) == 4


def test_a_plain_encoding_and_a_reader_that_has_gone(folder: Path) -> None:
    lines = ["tucodec evaluate --help", "tucodec info ünbekannt.tuc", "tucodec models | head -1"]
    done = shell(
        "; ".join(f"{line}; echo ${{PIPESTATUS[0]}}" for line in lines), folder,
        LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0",
    )  # fmt: skip
    printed = done.stdout.splitlines()
    assert [line for line in printed if line.isdigit()] == ["0", "1", "0"]
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("tucodec: ")


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("command", ["fit", "models"])
def test_an_interrupt_while_it_imports(command: str, wrapped: bool, folder: Path) -> None:
    """Everything that takes time is imported where Ctrl-C is answered; shown by a slow numpy and torch.

    A library, or Python 3.11 while it builds a class, makes an error of what it is interrupted by.
    """
    slow = "import pathlib, time\npathlib.Path('at it').touch()\ntime.sleep(60)\n"
    if wrapped:
        slow = slow.replace(
            "time.sleep(60)", "try: time.sleep(60)\nexcept BaseException: raise RuntimeError"
        )
    for name in ("numpy", "torch"):
        (folder / f"{name}.py").write_text(slow)
    path = os.pathsep.join([str(folder), *sys.path])
    words = [*TUCODEC, command]
    with subprocess.Popen(
        words, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True,
        # a shell that starts the tests in the background lets them ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        until = time.monotonic() + 60
        while not (folder / "at it").exists() and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "tucodec: interrupted\n")


def test_a_name_that_is_not_utf8_costs_no_line(folder: Path) -> None:
    """Neither its own nor those after it, in tables and on the terminal."""
    (folder / "photos").mkdir()
    for name in (b"bad\xff.png", b"z.png"):
        shutil.copy(folder / "photo.png", folder / "photos" / os.fsdecode(name))
    lines = [
        "tucodec evaluate photos --codec jpeg:q=30 -o r.json --workers 1 > table",
        "tucodec compress photos -o tuc/ --model tiny-mse-1",
    ]
    done = shell(" && ".join(lines), folder, PYTHONIOENCODING="utf-8")
    assert done.returncode == 0, done.stderr
    assert len((folder / "r.csv").read_text().splitlines()) == 3
    printed = [line.partition(" -> ")[0] for line in done.stdout.splitlines()]
    assert sorted(printed) == [r"photos/bad\udcff.png", "photos/z.png"]
    assert sorted(os.listdir(os.fsencode(folder / "tuc"))) == [b"bad\xff.tuc", b"z.tuc"]


def test_processors_are_counted_where_there_is_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cores() == (os.cpu_count() or 1)
    package = Path(__file__).parents[1]
    users = [
        path.relative_to(package).as_posix()
        for folder in ("lightning_tucodec", "tests", "data_pipelines", "experiments")
        for path in (package / folder).rglob("*.py")
        if "os.sched_getaffinity(" in path.read_text() and path != Path(__file__)
    ]
    assert users == ["lightning_tucodec/io/processes.py"]


@pytest.mark.parametrize(("variable", "kept"), [("TUCODEC", True), ("MALLOC_TOP_PAD_", False)])
def test_freed_memory_is_used_again(variable: str, kept: bool) -> None:
    """The console script has glibc keep it, unless the user has an opinion of his own."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("mallopt is glibc's")
    script = """
import contextlib, resource, sys
from lightning_tucodec.cli import main
with contextlib.suppress(SystemExit):
    main()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    before = faults()
    blocks = [bytearray(b"x") * (24 << 20) for _ in range(2)]
    del blocks
print(faults() - before)
"""
    command = [sys.executable, "-c", script, "--help"]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, variable: "131072"}
    )
    assert (int(done.stdout.split()[-1]) < 8) == kept


def test_no_folder_named_tilde(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nobody knows the home folder, `~/x` is refused, and models are named all the same."""
    monkeypatch.chdir(folder)
    for name in ("XDG_DATA_HOME", "TUCODEC_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert main(["info", "~/a.tuc"]) == 1
    assert capsys.readouterr().err == "tucodec: ~/a.tuc: this user has no home folder; set HOME\n"
    assert main(["models"]) == 0
    assert "tiny-mse-1" in capsys.readouterr().out
