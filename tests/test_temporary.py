"""What a killed process leaves of its writing is removed by the next one; nothing else is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_tucodec.io import temporary
from lightning_tucodec.io.temporary import FORMER, atomic_write, temporary_folder

WRITES = """
import sys, time
from lightning_tucodec.io.temporary import atomic_write, temporary_folder
with atomic_write("out/photo.png") as stream, temporary_folder("out/set") as folder:
    stream.write(b"half")
    (folder / "former").mkdir()
    (folder / "former" / "manifest.json").write_text("an earlier submission")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "subprocess.Popen[str]":
    """A process in the middle of writing to the folder `out`."""
    (tmp_path / "out").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    monkeypatch.setattr(temporary, "_swept", set())
    return process


def ended(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def test_a_killed_process_leaves_nothing(
    writer: "subprocess.Popen[str]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while it lives, nor when others own the files, is anything touched."""
    out = tmp_path / "out"
    begun = {path.name for path in out.iterdir()}
    assert len(begun) == 3  # a file; a folder and its lock
    with atomic_write(out / "first") as stream:
        stream.write(b"x")
    assert {path.name for path in out.iterdir()} == begun | {"first"}
    foreign = [
        ".tucodec.photo.png.0123456789abcdef01234567.tmp",
        ".photo.png.abcdef.tmp",
        ".tucodec.x",
    ]
    for name in foreign:
        (out / name).write_bytes(b"somebody's")
    ended(writer)
    assert begun <= {path.name for path in out.iterdir()}
    monkeypatch.setattr(temporary, "_swept", set())
    with atomic_write(out / "second") as stream:
        stream.write(b"x")
    assert {path.name for path in out.iterdir()} == {*foreign, "first", "second", "set"}
    # It was killed between two renames: what stood at its target stands there again.
    assert (out / "set" / "manifest.json").read_text() == "an earlier submission"


def test_leavings_of_another_machine_are_removed_when_they_are_old(
    writer: "subprocess.Popen[str]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its locks may not be seen here."""
    out = tmp_path / "out"
    ended(writer)
    here = temporary._short(os.uname().nodename)
    for path in list(out.iterdir()):
        path.rename(out / path.name.replace(here, "0" * 8))
    left = {path.name for path in out.iterdir()}
    with atomic_write(out / "first") as stream:
        stream.write(b"x")
    assert {path.name for path in out.iterdir()} == left | {"first"}
    for path in out.iterdir():
        os.utime(path, (1, 1))
    monkeypatch.setattr(temporary, "_swept", set())
    with atomic_write(out / "second") as stream:
        stream.write(b"x")
    assert {path.name for path in out.iterdir()} == {"first", "second", "set"}


def test_what_stood_there_is_put_back_only_where_nothing_is(tmp_path: Path) -> None:
    target = tmp_path / "set"
    for text in ("new", "old"):
        with temporary_folder(target) as folder:
            (folder / FORMER).mkdir()
            (folder / FORMER / "file").write_text(text)
    assert (target / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["set"]
    shutil.rmtree(target)
