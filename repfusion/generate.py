"""A checkpoint and prompts -> images; `python -m repfusion.generate --checkpoint DIR --prompt "a red circle"
--out x.png`.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from repfusion.diffusion.sampler import SamplerConfig, sample
from repfusion.display.redaction import redact_text
from repfusion.display.terminal import printable_lines
from repfusion.files import bytes_sha256
from repfusion.images.decode import read_pixels
from repfusion.latents.load import Decoder
from repfusion.lineage.describe import (
    checkpoint_record,
    folder_record,
    png_info,
    read_lineage,
    without_places,
)
from repfusion.llm.chats.eyes import check_image
from repfusion.llm.words import unread
from repfusion.model.text_to_image import TextToImage
from repfusion.request import Request
from repfusion.runs.exported import MARK, is_export, load_any
from repfusion.weights import WEIGHTS

Kept = Literal["all", "portable", "none"]


def initial_noise(seeds: Iterable[int], shape: tuple[int, int]) -> Float[Tensor, "b n d"]:
    """Each image's noise is the first draw of a generator of its own, on the CPU: the same on every device,
    whatever else is in the batch.
    """
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def decode(model: TextToImage, decoder: Decoder, latents: Float[Tensor, "b n d"]) -> Float[Tensor, "b 3 h w"]:
    """Pixels in [0, 1], on the CPU in float32."""
    return decoder(model.denormalise(latents)).float().clamp(0, 1).cpu()


@torch.no_grad()
def generate(
    model: TextToImage,
    decoder: Decoder,
    requests: Sequence[Request],
    seed: int = 0,
    config: SamplerConfig = SamplerConfig(),
    batch_size: int = 64,
) -> Float[Tensor, "b 3 h w"]:
    """Pixels in [0, 1] on the CPU. Image i depends on seed + i and its request, not on the batch size (but
    for rounding).
    """
    model.conditioner.llm.check_lengths([request.prompt for request in requests])
    images = []
    for start in range(0, len(requests), batch_size):
        part = requests[start : start + batch_size]
        seeds = range(seed + start, seed + start + len(part))
        latents = sample(model, part, initial_noise(seeds, model.latent_shape), config)
        images.append(decode(model, decoder, latents))
    return torch.cat(images)


def read_images(paths: Sequence[Path]) -> tuple[UInt8[np.ndarray, "h w 3"], ...]:
    """Image files as requests hold them. Raises ValueError, which names the file, where one is none or has
    but a line of pixels.
    """
    found = []
    for path in paths:
        try:
            found.append(read_pixels(path.read_bytes()))
            check_image(found[-1])
        except (OSError, ValueError) as error:
            raise ValueError(f"image {path}: {error}") from error
    return tuple(found)


def to_uint8(pixels: Float[Tensor, "*b 3 h w"]) -> UInt8[np.ndarray, "*b h w 3"]:
    """Rounded, channels last, as image files want them."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).numpy()


def image_record(
    folder: Path, request: Request, seed: int, config: SamplerConfig, num_images: int = 1
) -> dict[str, Any]:
    """What a PNG says of itself: image i of a strip has the seed `seed` + i. `folder` is a checkpoint or an
    export; `lineage` is what the checkpoint says of its training, kept here lest the folder goes. Of images
    that were read, the digests of their pixels are kept.
    """
    record: dict[str, Any] = {
        "prompt": request.prompt,
        "images": [bytes_sha256(image.tobytes()) for image in request.images],
        "rewrite": request.rewrite,
        "seed": seed,
        "num_images": num_images,
        **config.model_dump(mode="json"),
    }
    if not is_export(folder):
        return {**record, "checkpoint": checkpoint_record(folder), "lineage": read_lineage(folder)}
    origin = read_lineage(folder)
    assert origin is not None
    return {
        **record,
        "checkpoint": origin["checkpoint"],
        "export": folder_record(folder, MARK),
        "lineage": origin["training"],
    }


def kept_of(record: dict[str, Any], kept: Kept) -> dict[str, Any] | None:
    """What of a record a file is to carry."""
    match kept:
        case "all":
            return record
        case "portable":
            return without_places(record)
        case "none":
            return None


def save_image(image: Image.Image, path: Path, record: dict[str, Any] | None) -> None:
    """The ending decides the format; PNG files carry the record, where there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"pnginfo": png_info(record)} if record and path.suffix.lower() == ".png" else {}
    image.save(path, **options)


def parser_of_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m repfusion.generate", description="Draw images from prompts."
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=WEIGHTS / "base",
        help="folder of a checkpoint or an export (default: the shipped base)",
    )
    parser.add_argument("--prompt", required=True, help="what to draw")
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="an image to edit or to refer to, several in the order in which the prompt counts them; of a "
        "checkpoint that reads images",
    )
    rewriting = parser.add_mutually_exclusive_group()
    rewriting.add_argument(
        "--rewrite", metavar="SYSTEM", help="system prompt under which the language model rewrites the prompt"
    )
    rewriting.add_argument("--no-rewrite", action="store_true", help="take the prompt as it is")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="image file to write; its ending decides the format, and .png carries the lineage",
    )
    parser.add_argument(
        "--lineage",
        choices=get_args(Kept),
        default="all",
        help="what a .png carries: all; portable, without this machine's folders and the tracking "
        "address, for images that are given away; none (default: all)",
    )
    parser.add_argument(
        "--num-images", type=int, default=1, help="images side by side, of the seeds SEED, SEED + 1, ..."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scale", type=int, default=8, help="enlarge each pixel of small images to scale x scale"
    )
    parser.add_argument("--guidance-scale", type=float, default=SamplerConfig().guidance_scale)
    parser.add_argument(
        "--image-guidance-scale",
        type=float,
        help="of the images alone, beside --guidance-scale, which is then the prompt's",
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=SamplerConfig().guidance_interval,
        metavar=("LOW", "HIGH"),
        help="guide where LOW < noise level <= HIGH (default: 0 1, everywhere)",
    )
    parser.add_argument("--num-steps", type=int, default=SamplerConfig().num_steps)
    parser.add_argument(
        "--solver",
        choices=("euler", "heun"),
        default=SamplerConfig().solver,
        help="euler reads the model once a step, heun twice (but for the last)",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="compile, and on a GPU draw each step as one CUDA graph: worth it for many images of a size",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main() -> None:
    args = parser_of_options().parse_args()
    try:
        model = load_any(args.checkpoint).to(args.device)
        if args.fast:
            model.speed_up_sampling()
        if said := unread(model.conditioner.llm.folder, [args.prompt]):
            print(redact_text(f"warning: {said}"), file=sys.stderr)
        sampler = SamplerConfig(
            num_steps=args.num_steps,
            solver=args.solver,
            guidance_scale=args.guidance_scale,
            image_guidance_scale=args.image_guidance_scale,
            guidance_interval=args.guidance_interval,
        )
        rewrite = False if args.no_rewrite else args.rewrite
        request = Request(args.prompt, read_images(args.image), rewrite)
        record = image_record(args.checkpoint, request, args.seed, sampler, args.num_images)
        pixels = generate(model, model.load_decoder(), [request] * args.num_images, args.seed, sampler)
    except ValueError as error:
        sys.exit(printable_lines(redact_text(f"error: {error}")))
    strip = np.concatenate(list(to_uint8(pixels)), axis=1)
    image = Image.fromarray(strip).resize(
        (strip.shape[1] * args.scale, strip.shape[0] * args.scale), Image.Resampling.NEAREST
    )
    save_image(image, args.out, kept_of(record, args.lineage))
    print(f"{args.prompt!r} -> {args.out} ({len(pixels)} image(s), checkpoint {args.checkpoint})")


if __name__ == "__main__":
    main()
