"""`tucodec fit | validate | test | export | import | wandb-sync`: trainings, and what they leave."""

import argparse

from lightning_tucodec.cli.arguments import (
    Subparsers,
    add_force,
    add_trust,
    command,
    location,
    real,
    whole,
)

LIGHTNING = {
    "fit": "train; options come from --config FILE and the command line (LightningCLI)",
    "validate": "evaluate a checkpoint on the validation images (LightningCLI)",
    "test": "evaluate a checkpoint on the test images (LightningCLI)",
}
"""Commands whose options LightningCLI parses."""


def register(subparsers: Subparsers) -> None:
    """Commands of trainings; those of LightningCLI only by name."""
    for name, summary in LIGHTNING.items():
        subparsers.add_parser(name, help=summary)
    export = command(
        subparsers, "export", run_export, "write a run's weights and integer tables to one file"
    )
    add = export.add_argument
    add(
        "runs",
        type=location,
        nargs="+",
        metavar="RUN",
        help="a run folder, a checkpoint, or a model",
    )
    add("-o", "--out", type=location, required=True, metavar="MODEL.safetensors")
    add_force(export)
    add_trust(export)
    add("--average", nargs="+", type=real(), metavar="SHARE",
        help="average the weights of several runs with these shares (default: equal shares)")  # fmt: skip
    _add_card(export)
    imported = command(
        subparsers, "import", run_import, "turn a checkpoint of CompressAI's form into a model file"
    )
    add = imported.add_argument
    add("checkpoint", type=location, metavar="CHECKPOINT", help="a .pth.tar or .pth file")
    add("--network", required=True, metavar="NAME", help="a name of CompressAI's zoo, such as "
        "cheng2020-attn, or the path of a class, such as compressai.models.Elic2022Official")  # fmt: skip
    add("--quality", type=whole(1), metavar="N",
        help="quality of the zoo that the checkpoint must have the sizes of")  # fmt: skip
    add("--args", metavar="YAML", help="arguments of the class, as in '{N: 192, M: 320}'; found from the "
        "checkpoint where the class can do that")  # fmt: skip
    add("-o", "--out", type=location, metavar="MODEL.safetensors",
        help="default: the network's name and quality, in the current folder")  # fmt: skip
    add_force(imported)
    _add_card(imported)
    sync = command(
        subparsers,
        "wandb-sync",
        run_sync,
        "upload what W&B lacks of runs, from their metrics.jsonl",
    )
    sync.add_argument("runs", type=location, nargs="+", metavar="RUN", help="run folders")
    sync.add_argument(
        "--offline", action="store_true", help="write an offline run instead of uploading"
    )


def _add_card(parser: argparse.ArgumentParser) -> None:
    """What both commands that write a model file ask for."""
    parser.add_argument("--name", help="the model's name (default: the file's stem)")
    parser.add_argument(
        "--card",
        type=location,
        metavar="YAML",
        help="file with additional entries of the model card",
    )


def run_export(arguments: argparse.Namespace) -> int:
    """`tucodec export`."""
    from lightning_tucodec.training import export

    return export.run_export(arguments)


def run_import(arguments: argparse.Namespace) -> int:
    """`tucodec import`."""
    from lightning_tucodec.training import export

    return export.run_import(arguments)


def run_sync(arguments: argparse.Namespace) -> int:
    """`tucodec wandb-sync`."""
    from lightning_tucodec.training.beside import wandb_view

    return wandb_view.run_sync(arguments)
