"""Ctrl-C ends every long command at once, with its children, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from PIL import Image

from lightning_tucodec.cli import main
from tests.support import photo

SLOW = "vvc:qp=20,preset=slower"
COMMANDS = {
    "evaluate": f"evaluate photos --codec jpeg:q=30 {SLOW} -o results.json --workers 2",
    "evaluate-learned": "evaluate photos --codec tiny-mse-5:effort=9 -o learned.json --workers 2",
    "compress-vvc": "compress photos -o vvc/ --model vvc --qp 20 --preset slower",
    "precode": f"shards precode photos --out shards --codec {SLOW} --per-photo 1 --workers 2",
}
"""Each takes minutes."""


def marked(mark: str, program: str = "") -> list[int]:
    """Processes, ended ones aside, that have the mark in their environment and the text in their command."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            if mark.encode() in (folder / "environ").read_bytes() and program.encode() in command:
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupt_ends_it_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    for index in range(2):
        Image.fromarray(photo("coffee.png", 400, 300)).resize((1200, 900)).save(
            tmp_path / "photos" / f"{index}.png"
        )
    mark = uuid.uuid4().hex
    words = [sys.executable, "-m", "lightning_tucodec.cli", *COMMANDS[name].split()]
    environment = {**os.environ, "TUCODEC_TEST": mark, "OMP_NUM_THREADS": "1"}
    with (
        (tmp_path / "said").open("wb") as said,
        subprocess.Popen(
            words, cwd=tmp_path, env=environment, stdout=said, stderr=said, start_new_session=True
        ) as process,
    ):
        try:
            learned = "effort" in COMMANDS[name]
            until = time.monotonic() + 120
            while not busy(process, mark, learned):
                assert process.poll() is None, (tmp_path / "said").read_text()
                assert time.monotonic() < until
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            # 3 s on a machine that has time; whole minutes without the mechanism.
            assert process.wait(15) == 130
            until = time.monotonic() + 5
            while marked(mark) and time.monotonic() < until:
                time.sleep(0.02)
            assert not marked(mark)
        finally:
            for pid in marked(mark):
                os.kill(pid, signal.SIGKILL)
    text = (tmp_path / "said").read_text()
    assert text.splitlines()[-1] == "tucodec: interrupted"
    assert "Traceback" not in text
    if name == "evaluate":  # what was measured stays, and the command goes on
        monkeypatch.chdir(tmp_path)
        assert main(["evaluate", "photos", "--codec", "jpeg:q=30", "-o", "results.json"]) == 0
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


def busy(process: "subprocess.Popen[bytes]", mark: str, learned: bool) -> bool:
    """Whether the command is at its long work: an encoder runs, or it has computed for some seconds."""
    if not learned:
        return bool(marked(mark, "libvvenc"))
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK") > 4
