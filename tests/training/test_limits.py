"""Numbers that nothing can work with, and files that are not text or no checkpoints: one line each."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_tucodec.cli import main
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.sweeps.spec import read_sweep
from lightning_tucodec.training import limits
from lightning_tucodec.training.limits import check_numbers
from lightning_tucodec.training.runs.identity import _LOCATIONS
from lightning_tucodec.training.runs.tracking import JsonlLogger, read_metrics
from tests.training.test_fit import config, write


@pytest.fixture
def values(tmp_path: Path, shard_folder: Path, micro: dict[str, Any]) -> dict[str, Any]:
    return config(tmp_path, shard_folder, micro)


def refused(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed_everything", -5),
        ("seed_everything", 2**32),
        ("seed_everything", "true"),
        ("seed_everything", "false"),
        ("trainer.limit_train_batches", 0),
        ("run.threads", -1),
        ("run.threads", 100000),
        ("data.num_workers", -1),
        ("data.num_workers", 100000),
        ("data.batch_size", 0),
        ("model.lr", -1),
        ("model.init_args.lr", -1),
        ("trainer.val_check_interval", 0),
        ("trainer.check_val_every_n_epoch", 0),
    ],
)
def test_fit_says_which_number_is_out_of_range(
    tmp_path: Path,
    values: dict[str, Any],
    option: str,
    value: int | str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["fit", "--config", write(tmp_path, values), f"--{option}={value}"]
    refused(words, f"{option.replace('init_args.', '')}: must be", capsys)
    assert not (tmp_path / "runs").exists()


GROUPS: dict[str, Any] = {
    "run": limits._RUN,
    "trainer": limits._TRAINER,
    "data": limits._DATA,
    "model": limits._MODEL,
}


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group, ranges in GROUPS.items() for name in ranges]
)
def test_every_range_has_two_ends(group: str, name: str) -> None:
    """Both ends are fine, what lies beyond and NaN are not; a class of the user's means what it likes."""
    least, most = GROUPS[group][name]

    def check(value: float | None, **more: str) -> None:
        options = {**more, "init_args": {name: value}} if more else {name: value}
        check_numbers({"run": {}, "data": {}, "model": {}, "trainer": {}, group: options})

    check(least)
    check(most)
    check(None)
    for wrong in (least - 1, math.nan, *([most + 1] if most < math.inf else [])):
        with pytest.raises(ConfigError, match=f"{group}.{name}: must be"):
            check(wrong)
        if group not in ("run", "trainer"):
            check(wrong, class_path="mine.Module")
            with pytest.raises(ConfigError):
                check(wrong, class_path="lightning_tucodec.training.gan.GANCodec")


def test_a_file_that_is_not_utf8_is_named(
    tmp_path: Path, values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("# Größe\n".encode("latin-1") + yaml.safe_dump(values).encode())
    text = f"{latin}: line 1 is not UTF-8"
    refused(["fit", "--config", str(latin)], text, capsys)
    refused(["fit", f"--config={latin}"], text, capsys)
    refused(["doctor", "--config", str(latin)], text, capsys)
    refused(["sweep", "plan", str(latin)], text, capsys)
    refused(["export", "tiny-mse-2", "-o", str(tmp_path / "a.safetensors"), "--card", str(latin)],
            text, capsys)  # fmt: skip
    sweep = {"name": "one", "stages": {"one": {"config": "latin.yaml"}}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    with pytest.raises(ConfigError, match="line 1 is not UTF-8"):
        read_sweep(tmp_path / "sweep.yaml")
    main(["doctor", "--script", str(latin)])
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group, names in _LOCATIONS.items() for name in names]
)
def test_a_name_with_a_null_byte_is_refused(
    group: str,
    name: str,
    tmp_path: Path,
    values: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """YAML can hold what no file system can."""
    values[group][name] = "a\0b"
    if name == "teacher":
        kind = "lightning_tucodec.training.postfilter.PostFilterModule"
        values["model"] = {"class_path": kind, "init_args": {"teacher": "a\0b"}}
    path = write(tmp_path, values)
    refused(["fit", "--config", path], "null byte", capsys)
    refused(["doctor", "--config", path], "null byte", capsys)


def test_a_sweep_names_a_file_with_a_null_byte(tmp_path: Path) -> None:
    sweep = {"name": "one", "stages": {"one": {"config": "a\0b"}}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    with pytest.raises(ConfigError, match="null byte"):
        read_sweep(tmp_path / "sweep.yaml")


@pytest.mark.parametrize(
    "tail",
    [
        b'{"opt_step": 2, "tr\xff\xfe',
        b"\xff\x00\xc3",
        b"7\n",
        b"[1]\n",
        b'{"time": 3}\n',
        b"\0" * 64,
    ],
)
def test_a_torn_line_of_metrics_does_not_stop_a_run(tmp_path: Path, tail: bytes) -> None:
    """Bytes that a crash leaves, of any kind, and rows that are no metrics."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"opt_step": step, "images_seen": 4 * step, "train/loss": 0.5} for step in (1, 2)]
    good = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(good + tail)
    assert read_metrics(path) == rows
    JsonlLogger(path).go_on_from({"opt_step": 2, "images_seen": 8})
    assert path.read_bytes() == good


def test_validate_says_what_is_wrong_with_a_checkpoint(
    tmp_path: Path, val_folder: Path, values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    values["data"]["val_images"] = str(val_folder)
    path = tmp_path / "some.ckpt"
    words = ["validate", "--config", write(tmp_path, values), "--ckpt_path", str(path)]
    refused(words, f"{path}: No such file", capsys)
    path.write_bytes(b"PK\x03\x04 no zip")
    refused(words, f"{path}: damaged, or not a checkpoint", capsys)
    torch.save({"tucodec": {"opt_step": 1}, "state_dict": {"other": torch.zeros(1)}}, path)
    refused(words, f"{path}: weights of another network", capsys)
