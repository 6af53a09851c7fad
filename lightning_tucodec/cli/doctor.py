"""`tucodec doctor`: checks of an installation, or before a training."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lightning_tucodec.cli.arguments import Subparsers, add_json, command, location
from lightning_tucodec.io.files import read_yaml


def register(subparsers: Subparsers) -> None:
    """`tucodec doctor`."""
    summary = "check this installation, or with a configuration what would fail in its training"
    parser = command(subparsers, "doctor", run, summary)
    add = parser.add_argument
    add("--config", type=location, metavar="YAML", help="configuration file of `fit`")
    add("--mirror", type=location, metavar="URL", help="mirror URL, as for `fit`")
    add("--script", type=location, metavar="FILE", help="a batch script, or an sbatch command")
    add(
        "options",
        nargs="*",
        metavar="OPTION",
        help="further options of `fit`, such as --data.shards DIR",
    )
    add_json(parser)


_OWN = ("--config", "--mirror", "--script", "--json", "--help")


def arranged(words: Sequence[str]) -> list[str]:
    """The command with `fit`'s options, which argparse does not know, at its end after `--`."""
    own: list[str] = []
    options: list[str] = []
    target = own
    for place, word in enumerate(words):
        if word == "--":
            options += words[place + 1 :]
            break
        if word.startswith("--"):
            name = word.partition("=")[0]
            target = own if any(one.startswith(name) for one in _OWN) else options
        target.append(word)
    return [*own, "--", *options] if options else own


def run(arguments: argparse.Namespace) -> int:
    """Print the table; status 1 when something would fail."""
    from lightning_tucodec.training.doctor import examine, table_text

    config = None
    if arguments.config or arguments.options:
        from lightning_tucodec.training.configuration import resolve

        mirror = [] if arguments.mirror is None else ["--mirror", arguments.mirror]
        layers = [read_yaml(arguments.config)] if arguments.config else []
        config = resolve(*layers, words=[*mirror, *arguments.options])
    findings = examine(config, Path(arguments.script) if arguments.script else None)
    if os.environ.get("SLURM_PROCID", "0") == "0":
        if arguments.json:
            print(json.dumps([asdict(finding) for finding in findings], indent=1))
        else:
            print(table_text(findings))
            sys.stdout.flush()
    return int(any(finding.level == "fail" for finding in findings))
