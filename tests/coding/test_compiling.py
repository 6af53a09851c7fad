"""The first use compiles: it says so, once, and does not count as coding time."""

import os
import subprocess
import sys
from pathlib import Path

MODULE = """
from lightning_tucodec.coding.compiling import compiled

@compiled
def {name}(n):
    total = 0
    for i in range(n):
        total += i * i
    return total
"""

PROGRAM = """
import time
from lightning_tucodec.coding.compiling import clock, seconds_spent
started, watched = time.perf_counter(), clock()
import first, second
assert first.squares(10) == 285 and second.cubes(10) == 285
took, coding = time.perf_counter() - started, clock() - watched
assert abs(took - coding - seconds_spent()) < 1e-3, (took, coding, seconds_spent())
print(seconds_spent() > 0)
"""


def run(folder: Path, program: str = PROGRAM) -> tuple[str, str]:
    """Output and messages of a process of its own."""
    place = {"PYTHONPATH": str(folder), "NUMBA_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **place},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_compiling_is_said_once_and_is_no_coding_time(tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(MODULE.format(name="squares"))
    (tmp_path / "second.py").write_text(MODULE.format(name="cubes"))

    compiled, said = run(tmp_path)
    assert compiled == "True"
    assert said.count("tucodec warmup") == 1
    assert len(said.splitlines()) == 1

    assert run(tmp_path) == ("False", "")


def test_whether_anything_is_compiled(tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(MODULE.format(name="squares"))
    program = (
        "import first; from lightning_tucodec.coding.compiling import cache_of\n"
        "folder, before = cache_of(first); first.squares(10); print(folder, before, cache_of(first)[1])"
    )
    folder, before, after = run(tmp_path, program)[0].split()
    assert folder.startswith(str(tmp_path / "cache"))
    assert (before, after) == ("False", "True")
