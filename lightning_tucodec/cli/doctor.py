"""`tucodec doctor`: checks before a training."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from lightning_tucodec.cli.arguments import Subparsers, add_json, command, location
from lightning_tucodec.io.files import read_yaml


def register(subparsers: Subparsers) -> None:
    """`tucodec doctor`."""
    parser = command(subparsers, "doctor", run, "check what would fail in a training")
    add = parser.add_argument
    add("--config", type=location, metavar="YAML", help="configuration file of `fit`")
    add("--mirror", type=location, metavar="URL", help="mirror URL, as for `fit`")
    add("--script", type=location, metavar="FILE", help="a batch script, or an sbatch command")
    add("options", nargs="*", metavar="OPTION", help="after `--`: further options of `fit`")
    add_json(parser)


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
