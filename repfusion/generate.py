"""A checkpoint and prompts -> images; `python -m repfusion.generate --checkpoint DIR --prompt "a red circle"
--out x.png`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from repfusion.checkpoint import load_checkpoint
from repfusion.flow import draw
from repfusion.foundation import WEIGHTS
from repfusion.model import Generator
from repfusion.rae.decoder import RAEDecoder
from repfusion.sampler import SamplerConfig, sample


@torch.no_grad()
def generate(
    generator: Generator,
    decoder: RAEDecoder,
    prompts: list[str],
    seed: int = 0,
    config: SamplerConfig = SamplerConfig(),
    batch_size: int = 64,
) -> Float[Tensor, "b 3 h w"]:
    """Pixels in [0, 1] on the CPU. Image i depends on seed, i and its prompt, not on the batch size (but for
    rounding).
    """
    images = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        seeds = range(seed + start, seed + start + len(part))
        noise = draw(seeds, generator.latent_shape, generator.shift).noise
        latents = sample(generator, part, noise, config)
        images.append(decoder(generator.denormalise(latents)).float().clamp(0, 1).cpu())
    return torch.cat(images)


def to_uint8(pixels: Float[Tensor, "*b 3 h w"]) -> UInt8[np.ndarray, "*b h w 3"]:
    """Rounded, channels last, as image files want them."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m repfusion.generate", description="Draw images from prompts."
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=WEIGHTS / "base",
        help="checkpoint folder (default: the shipped base)",
    )
    parser.add_argument("--prompt", required=True, help="what to draw")
    parser.add_argument(
        "--out", type=Path, required=True, help="image file to write; its ending decides the format"
    )
    parser.add_argument(
        "--num-images", type=int, default=1, help="images side by side, each from its own noise"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scale", type=int, default=8, help="enlarge each pixel of small images to scale x scale"
    )
    parser.add_argument("--guidance-scale", type=float, default=SamplerConfig().guidance_scale)
    parser.add_argument("--num-steps", type=int, default=SamplerConfig().num_steps)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        generator = load_checkpoint(args.checkpoint).to(args.device)
        sampler = SamplerConfig(num_steps=args.num_steps, guidance_scale=args.guidance_scale)
        pixels = generate(
            generator, generator.load_decoder(), [args.prompt] * args.num_images, args.seed, sampler
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    strip = np.concatenate(list(to_uint8(pixels)), axis=1)
    image = Image.fromarray(strip).resize(
        (strip.shape[1] * args.scale, strip.shape[0] * args.scale), Image.Resampling.NEAREST
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    image.save(args.out)
    print(f"{args.prompt!r} -> {args.out} ({len(pixels)} image(s), checkpoint {args.checkpoint})")


if __name__ == "__main__":
    main()
