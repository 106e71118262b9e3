"""Options that the commands about GILL share."""

from pathlib import Path

import torch

from repfusion.display.options import Options


def add_checkpoint(group: Options) -> None:
    """Adds --checkpoint and --device."""
    group.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a checkpoint of GILL, an export, a training or a workflow's root",
    )
    group.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
