"""Sampling where prompts are read once against reading them at every step; `benchmarks/prefix_cache.py`.

Random weights, no file read. `--geometry medium`, a language model of 25M parameters before a denoiser of 1M,
runs on a CPU in minutes; `published` is LLaVA-1.5-7B's with 576 latent tokens and a DiT of 1.3B, for a GPU.
The two ways take turns in one process on the same prompts and noise. The last line is JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import numpy as np
import torch
from random_model import fill, llava_of

from repfusion.diffusion.flow import initial_noise
from repfusion.diffusion.sampler import SamplerConfig, sample
from repfusion.model.dit import DiTConfig
from repfusion.model.meta import published
from repfusion.model.text_to_image import TextToImage
from repfusion.request import Request


def medium() -> TextToImage:
    """The published model's proportions, 64 latent tokens; no memory."""
    text = {
        "vocab_size": 1000,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "max_position_embeddings": 1024,
    }
    return llava_of("medium", text, DiTConfig(hidden_size=128, depth=4, num_heads=2), grid=8, latent_dim=64)


@contextmanager
def uncached(model: TextToImage) -> Iterator[None]:
    """Inside, the language model reads the prompts at every step, as in training."""
    model.conditioner.prepare = lambda inputs, reuse=False: type(model.conditioner).prepare(
        model.conditioner, inputs
    )
    yield
    del model.conditioner.prepare


def seconds_of(
    model: TextToImage, requests: list[Request], config: SamplerConfig
) -> tuple[float, torch.Tensor]:
    noise = initial_noise(range(len(requests)), model.latent_shape)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    made = sample(model, requests, noise, config).cpu()
    return time.perf_counter() - started, made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=("medium", "published"), default="medium")
    parser.add_argument("--text-tokens", type=int, default=256, help="of every prompt, begin token included")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--num-steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="of which the medians are taken")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, else fp32")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = fill(published()[0] if args.geometry == "published" else medium(), device).eval()
    vocab_size = model.conditioner.llm.language_model.config.vocab_size
    rng = np.random.default_rng(0)
    rows = rng.integers(3, vocab_size, (args.batch, args.text_tokens - 1))
    requests = [Request(" ".join(map(str, row))) for row in rows]
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    config = SamplerConfig(num_steps=args.num_steps, precision=precision)

    with_cache, without, apart = [], [], 0.0
    for repeat in range(args.repeats + 1):
        reused, images = seconds_of(model, requests, config)
        with uncached(model):
            anew, expected = seconds_of(model, requests, config)
        apart = max(apart, ((images - expected).norm() / expected.norm()).item())
        if repeat:  # the first warms up
            with_cache.append(reused)
            without.append(anew)
            print(f"read once {reused:.3f} s, at every step {anew:.3f} s", file=sys.stderr)
    said = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "geometry": args.geometry,
        "precision": precision,
        "text_tokens": args.text_tokens,
        "latent_tokens": model.latent_shape[0],
        "batch": args.batch,
        "num_steps": args.num_steps,
        "guidance_scale": config.guidance_scale,
        "cached_sec": median(with_cache),
        "uncached_sec": median(without),
        "ratio": median(without) / median(with_cache),
        "lowest_ratio": min(anew / reused for anew, reused in zip(without, with_cache, strict=True)),
        "relative_difference": apart,
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
