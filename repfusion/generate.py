"""A checkpoint and prompts -> images, or clips.

`python -m repfusion.generate --prompt "a red circle" --out x.png`.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from repfusion.codes.tokenizer import ImageTokenizer
from repfusion.config import validate
from repfusion.diffusion.flow import initial_noise, seeds_of
from repfusion.diffusion.sampler import SamplerConfig, Solver, sample
from repfusion.display.options import Options, WithDefaults
from repfusion.display.redaction import redact_text
from repfusion.display.terminal import printable_lines
from repfusion.files import bytes_sha256
from repfusion.generation.clips import clip_files, enlarged, save_clip
from repfusion.generation.device import usable_device
from repfusion.generation.outputs import Output, check_size, fitting_scale, grid
from repfusion.generation.prompts import PromptRow, chosen_seeds, read_prompts
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
from repfusion.model.config import ModelConfig
from repfusion.model.discrete.base import CodeModel
from repfusion.model.text_to_image import TextToImage
from repfusion.request import Request
from repfusion.runs.exported import MARK, is_export, load_any
from repfusion.runs.named import named_model
from repfusion.weights import WEIGHTS

MAX_RATE = 240
"""Frames a second of a clip that is written."""
Kept = Literal["all", "portable", "none"]
Drawer = TextToImage | CodeModel
"""What draws images."""
AnyDecoder = Decoder | ImageTokenizer
"""What makes pixels of what it drew."""


def flow_alone(model: Drawer, what: str) -> TextToImage:
    """The model, as one that draws by a flow. Raises ValueError where it is another, which knows nothing of
    `what`.
    """
    if not isinstance(model, TextToImage):
        raise ValueError(f"{what}: {model.config.label} draws codes, which know nothing of it; leave it out")
    return model


@torch.no_grad()
def decode(
    model: TextToImage, decoder: Decoder, latents: Float[Tensor, "b n d"], noise: Float[Tensor, "b n d"]
) -> Float[Tensor, "b *f 3 h w"]:
    """Pixels of images or clips in [0, 1], on the CPU in float32. A decoder that draws takes each image's
    seed from the `noise` that its latents began from.
    """
    return decoder(model.denormalise(latents), seeds_of(noise)).float().clamp(0, 1).cpu()


@torch.no_grad()
def generate(
    model: Drawer,
    decoder: AnyDecoder,
    requests: Sequence[Request],
    seed: int | Sequence[int] = 0,
    config: SamplerConfig = SamplerConfig(),
    batch_size: int = 64,
) -> Float[Tensor, "b *f 3 h w"]:
    """Pixels of images or clips in [0, 1] on the CPU. Image i depends on its seed (number i of several, or
    else seed + i) and its request, not on the batch size (but for rounding).
    """
    seeds = range(seed, seed + len(requests)) if isinstance(seed, int) else seed
    model.captions.check_lengths([request.prompt for request in requests])
    images = []
    for start in range(0, len(requests), batch_size):
        part = requests[start : start + batch_size]
        noise = initial_noise(seeds[start : start + batch_size], noise_shape(model, config))
        images.append(draw_pixels(model, decoder, part, noise, config))
    return torch.cat(images)


def noise_shape(model: Drawer, config: SamplerConfig) -> tuple[int, int]:
    """Shape of the normal numbers that decide an image: noisy latents, or what tokens are drawn by."""
    return model.noise_shape(config) if isinstance(model, CodeModel) else model.latent_shape


def draw_pixels(
    model: Drawer,
    decoder: AnyDecoder,
    requests: Sequence[Request],
    noise: Float[Tensor, "b n d"],
    config: SamplerConfig,
) -> Float[Tensor, "b *f 3 h w"]:
    """Pixels of requests in [0, 1], on the CPU in float32. `noise` is of `noise_shape`."""
    if isinstance(model, CodeModel):
        return decode_codes(decoder, model.draw(requests, noise, config))
    assert not isinstance(decoder, ImageTokenizer)
    return decode(model, decoder, sample(model, requests, noise, config), noise)


@torch.no_grad()
def decode_codes(decoder: AnyDecoder, codes: Int[Tensor, "b n"]) -> Float[Tensor, "b 3 h w"]:
    """Pixels of rows of codes in [0, 1], on the CPU in float32."""
    assert isinstance(decoder, ImageTokenizer)
    return decoder.decode(codes).float().clamp(0, 1).cpu()


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
    folder: Path,
    rows: Sequence[PromptRow],
    config: SamplerConfig,
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]] = (),
    rewrite: str | Literal[False] | None = None,
) -> dict[str, Any]:
    """What a PNG says of itself: the prompts and seeds of its rows. `folder` is a checkpoint or an export;
    `lineage` is what the checkpoint says of its training, kept here lest the folder goes. Of images that
    were read, the digests of their pixels are kept.
    """
    record: dict[str, Any] = {
        "rows": [{"prompt": row.prompt, "seeds": list(row.seeds)} for row in rows],
        "images": [bytes_sha256(image.tobytes()) for image in images],
        "rewrite": rewrite,
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
        prog="python -m repfusion.generate",
        description="Draw images from prompts.",
        formatter_class=WithDefaults,
    )
    add_prompts(parser.add_argument_group("what to draw"))
    add_files(parser.add_argument_group("from what, and where to"))
    add_sampling(parser.add_argument_group("how"))
    return parser


def add_prompts(group: Options) -> None:
    group.add_argument(
        "--prompt", action="append", default=[], help="what to draw; several make a row of the picture each"
    )
    group.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help='a prompt a line, or .jsonl with {"prompt": "a red circle", "seeds": [3, 4]} a line',
    )
    group.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="an image to edit or to refer to, several in the order in which the prompts count them; of a "
        "checkpoint that reads images",
    )
    rewriting = group.add_mutually_exclusive_group()
    rewriting.add_argument(
        "--rewrite",
        metavar="SYSTEM",
        help="system prompt under which the language model rewrites the prompts",
    )
    rewriting.add_argument("--no-rewrite", action="store_true", help="take the prompts as they are")
    group.add_argument(
        "--seed", type=int, nargs="+", default=[0], help="of the noise; several draw each prompt as often"
    )
    group.add_argument(
        "--num-images", type=int, metavar="N", help="images of each prompt, of the seeds SEED, SEED + 1, ..."
    )


def add_files(group: Options) -> None:
    group.add_argument(
        "--checkpoint",
        type=Path,
        default=WEIGHTS / "base",
        metavar="FOLDER",
        help="a checkpoint, an export, a training or a workflow's root (of these two the best checkpoint); "
        "without it the shipped base draws",
    )
    group.add_argument(
        "--out",
        required=True,
        metavar="FILE.png|FILE.mp4|FOLDER/",
        help="one picture, a row for each prompt, in the format of its ending; or a folder, a .png for each "
        "image. A .png carries its lineage. Of a checkpoint that draws clips FILE.mp4, with its frames in a "
        "row in FILE.png, or a folder of such pairs",
    )
    group.add_argument(
        "--rate", type=float, default=8.0, metavar="HZ", help="frames a second of clips, as they were trained"
    )
    group.add_argument(
        "--lineage",
        choices=get_args(Kept),
        default="all",
        help="what a .png carries: all; portable, without this machine's folders and the tracking "
        "address, for images that are given away; none",
    )
    group.add_argument(
        "--scale", type=int, metavar="N", help="enlarge each pixel to N x N (default: images of about 512 px)"
    )


def add_sampling(group: Options) -> None:
    sampler = SamplerConfig()
    group.add_argument("--num-steps", type=int, default=sampler.num_steps, help="from noise to image")
    group.add_argument(
        "--solver",
        choices=get_args(Solver),
        default=sampler.solver,
        help="euler and dpm read the model once a step, heun twice (but for the last)",
    )
    group.add_argument(
        "--guidance-scale",
        type=float,
        default=sampler.guidance_scale,
        help="how much the prompt is followed; 1 is off",
    )
    group.add_argument(
        "--image-guidance-scale",
        type=float,
        help="of the images alone, beside --guidance-scale, which is then the prompt's",
    )
    group.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=sampler.guidance_interval,
        metavar=("LOW", "HIGH"),
        help="guide where LOW < noise level <= HIGH",
    )
    group.add_argument("--batch-size", type=int, default=16, help="images that are sampled at once")
    group.add_argument(
        "--fast",
        action="store_true",
        help="compile, and on a GPU draw each step as one CUDA graph: worth it for many images of a size",
    )
    group.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )


def sampler_of(args: argparse.Namespace) -> SamplerConfig:
    """The sampler of the options. Raises ValueError, which names the first bad one."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: expected at least 1")
    names = ("num_steps", "solver", "guidance_scale", "image_guidance_scale", "guidance_interval")
    return validate(SamplerConfig, {name: getattr(args, name) for name in names}, "options")


def rows_of(args: argparse.Namespace) -> list[PromptRow]:
    """The prompts of the options and of their file. Raises ValueError where there is none, or a bad one."""
    seeds = chosen_seeds(args.seed, args.num_images)
    rows = [PromptRow(prompt, seeds) for prompt in args.prompt]
    if args.prompts_file is not None:
        rows += read_prompts(args.prompts_file, seeds)
    if not rows:
        raise ValueError("no prompt; expected --prompt TEXT or --prompts-file FILE")
    return rows


def draw(args: argparse.Namespace) -> list[Path]:
    """The files of a command line, all of which is checked before anything is sampled.

    Raises:
        ValueError: an option that does not hold, a damaged checkpoint, or a prompt that does not fit.
    """
    output, rows, sampler = Output.parse(args.out), rows_of(args), sampler_of(args)
    device, images = usable_device(args.device), read_images(args.image)
    rewrite = False if args.no_rewrite else args.rewrite
    fitting_scale(1, args.scale)
    if not 0 < args.rate <= MAX_RATE:
        raise ValueError(f"--rate {args.rate:g}: expected more than 0 and at most {MAX_RATE}")
    folder = named_model(args.checkpoint)
    model, sampler = load_any(folder).to(device), sampler.on(device)
    if args.fast:
        flow_alone(model, "--fast").speed_up_sampling(sampler.precision)
    is_clip = isinstance(model.config, ModelConfig) and model.config.draws_clips
    if output.is_clip and not is_clip:
        raise ValueError(f"--out {args.out}: the model draws images; expected FILE.png or FOLDER/")
    clips = clip_files(output, rows) if is_clip else []
    decoder = model.load_decoder()
    files = [] if is_clip else output.files(rows)
    scale = (args.scale or 1) if is_clip else fitting_scale(decoder.image_size, args.scale)
    for _, shown in files:
        check_size(shown, decoder.image_size * scale)
    if said := unread(model.captions.folder, [row.prompt for row in rows]):
        print(redact_text(f"warning: {said}"), file=sys.stderr)
    requests = [Request(row.prompt, images, rewrite) for row in rows for _ in row.seeds]
    seeds = [seed for row in rows for seed in row.seeds]
    what = "clip" if is_clip else "image"
    if is_clip:
        for first in range(0, len(seeds), args.batch_size):
            part = slice(first, first + args.batch_size)
            drawn = to_uint8(generate(model, decoder, requests[part], seeds[part], sampler, args.batch_size))
            for (path, row), frames in zip(clips[part], drawn, strict=True):
                record = kept_of(image_record(folder, [row], sampler, images, rewrite), args.lineage)
                save_clip(enlarged(frames, scale), args.rate, path, record)
    else:
        pixels = iter(to_uint8(generate(model, decoder, requests, seeds, sampler, args.batch_size)))
        for path, shown in files:
            widths = [len(row.seeds) for row in shown]
            record = kept_of(image_record(folder, shown, sampler, images, rewrite), args.lineage)
            save_image(grid(list(islice(pixels, sum(widths))), widths, scale), path, record)
    print(f"{len(seeds)} {what}(s) of {len(rows)} prompt(s) -> {args.out} (checkpoint {folder})")
    return [path for path, _ in (clips if is_clip else files)]


def main() -> None:
    args = parser_of_options().parse_args()
    try:
        draw(args)
    except (ValueError, OSError) as error:
        sys.exit(printable_lines(redact_text(f"error: {error}")))


if __name__ == "__main__":
    main()
