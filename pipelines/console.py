"""`repfusion COMMAND ...`: every command of the project under one name, as `python -m MODULE ...` runs it."""

import os
import runpy
import sys
from pathlib import Path

from pipelines.arguments import COMMANDS as WORKFLOW

OWN = {
    "generate": ("repfusion.generate", "images from prompts"),
    "describe": ("repfusion.evaluation.describe", "captions of images, by a model of codes"),
    "export": ("repfusion.export", "a checkpoint as one folder for RepFusionPipeline"),
    "lineage": ("repfusion.lineage", "what an image, checkpoint or export was made from"),
    "retrieval": ("repfusion.retrieval", "images that a GILL finds by what is said of them"),
    "dialogue": ("repfusion.dialogue", "texts and images in, texts and images out, of a GILL"),
    "score": ("repfusion.evaluation", "score one checkpoint alone"),
    "train": ("repfusion.train", "one training without a workflow, also under torchrun"),
    "decoder": ("repfusion.decoding", "train an RAE decoder on own image shards"),
    "tokenizer": ("repfusion.decoding.codes", "train a tokenizer of images into codes"),
    "flops": ("repfusion.flops", "FLOPs, parameters and memory of a model"),
    "ladder": ("pipelines.ladder", "compare the conditioning methods"),
    "mlflow": ("repfusion.tracking", "the tracked runs in a browser"),
    "browse": ("pipelines.browse", "pictures, captions and drops of the data stages in a browser"),
    "doctor": ("pipelines.doctor", "whether this machine can do it"),
}
"""Commands that are no workflow's: module, and what it does."""
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
}
"""What the Makefile sets too: nothing here phones home."""


def usage() -> str:
    lines = {name: about for name, (about, _) in WORKFLOW.items()}
    lines |= {name: about for name, (_, about) in OWN.items()}
    width = max(map(len, lines))
    listed = "\n".join(f"  {name:<{width}}  {about}" for name, about in lines.items())
    return f"usage: repfusion COMMAND ...\n\n{listed}\n\n'repfusion COMMAND --help' says more of one."


def main() -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    command, rest = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if command in WORKFLOW:
        module, words = "pipelines", [command, *rest]
    elif command in OWN:
        module, words = OWN[command][0], rest
    else:
        is_asked = command in ("-h", "--help")
        print(usage() if is_asked else f"{usage()}\n\nerror: no command {command!r}", file=sys.stderr)
        sys.exit(0 if is_asked else 2)
    # what the module says of itself, and whoever looks at a lock, names this command
    sys.argv = [str(Path(sys.argv[0])), *words]
    runpy.run_module(module, run_name="__main__")
