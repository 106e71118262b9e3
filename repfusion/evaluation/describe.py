"""A checkpoint of a model of codes and images -> captions, whole or from a beginning on; `python -m
repfusion.evaluation.describe --checkpoint RUN --image x.png`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from repfusion.codes.tokenizer import ImageTokenizer
from repfusion.config import validate
from repfusion.diffusion.flow import initial_noise
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.display.options import WithDefaults
from repfusion.display.redaction import redact_text
from repfusion.display.terminal import printable_lines
from repfusion.generate import read_images
from repfusion.generation.device import usable_device
from repfusion.images.square import square
from repfusion.model.discrete.base import CodeModel
from repfusion.runs.exported import load_any
from repfusion.runs.named import named_model


def parser_of_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m repfusion.evaluation.describe",
        description="Say what images show, by a model of codes.",
        formatter_class=WithDefaults,
    )
    sampler = SamplerConfig()
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FOLDER", help="as of generate")
    parser.add_argument(
        "--image", type=Path, action="append", required=True, metavar="FILE", help="several have a line each"
    )
    parser.add_argument("--begin", default="", metavar="TEXT", help="how every caption begins")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next ones have the next")
    parser.add_argument("--num-steps", type=int, default=sampler.num_steps, help="of masked diffusion")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="how much the image is followed")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    return parser


def say(args: argparse.Namespace) -> list[str]:
    """The captions of a command line.

    Raises:
        ValueError: an option that does not hold, an image that is none, or a checkpoint of a model that
            describes nothing.
    """
    given = {"num_steps": args.num_steps, "guidance_scale": args.guidance_scale}
    config, device = validate(SamplerConfig, given, "options"), usable_device(args.device)
    images = read_images(args.image)
    folder = named_model(args.checkpoint)
    model = load_any(folder)
    if not isinstance(model, CodeModel):
        raise ValueError(f"checkpoint {folder}: {model.config.label} draws, and describes nothing")
    model = model.to(device)
    tokenizer = ImageTokenizer.from_pretrained(model.config.tokenizer, with_tower=True).to(device)
    pixels = np.stack([square(image, tokenizer.image_size) for image in images])
    codes = tokenizer.encode_images(torch.from_numpy(pixels).to(device))
    noise = initial_noise(range(args.seed, args.seed + len(codes)), model.noise_shape(config))
    return model.describe(codes, noise, config, [args.begin] * len(codes))


def show(paths: Sequence[Path], captions: Sequence[str]) -> None:
    for path, caption in zip(paths, captions, strict=True):
        print(printable_lines(f"{path}: {caption}"))


def main() -> None:
    args = parser_of_options().parse_args()
    try:
        show(args.image, say(args))
    except (ValueError, OSError) as error:
        sys.exit(printable_lines(redact_text(f"error: {error}")))


if __name__ == "__main__":
    main()
