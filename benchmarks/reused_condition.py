"""Sampling that asks the language model for a condition at every k-th evaluation only, and between them takes
the last one: quality and time against k, on a trained checkpoint and the scenes' detector.

`python benchmarks/reused_condition.py [--checkpoint FOLDER] [--every 1 2 4 8] [--num-prompts 120]`. Prompts,
noise and judge are those of the `scenes` suite; `distance` is that of the latents to those of k = 1,
relative. A line of JSON for each k.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repfusion.diffusion.flow import initial_noise
from repfusion.diffusion.sampler import SamplerConfig, sample
from repfusion.evaluation.parts import per_item
from repfusion.evaluation.suites.scenes import ScenesSuite, ScenesSuiteConfig
from repfusion.generate import decode, to_uint8
from repfusion.model.text_to_image import Prompted, TextToImage
from repfusion.request import Branch, Request
from repfusion.runs.checkpoint import load_checkpoint
from repfusion.weights import WEIGHTS


class ReusedCondition:
    """A model's velocities, with a condition of as many rows as it has, made at every `every`-th call."""

    def __init__(self, model: TextToImage, every: int):
        self.model, self.every = model, every
        self.latent_shape, self.shift, self.device = model.latent_shape, model.shift, model.device

    def read(self, requests: Sequence[Request], branches: Sequence[Branch]) -> Prompted:
        """Requests for the steps of one batch, which begin anew."""
        self.num_calls, self.rows, self.condition = 0, 0, None
        return self.model.read(requests, branches)

    def velocity(self, z_t: torch.Tensor, t: torch.Tensor, prompted: Prompted) -> torch.Tensor:
        """Velocity of noisy latents at noise level t, by a condition that may be of an earlier one."""
        if self.num_calls % self.every == 0 or self.rows != len(z_t):
            self.condition = self.model.conditioner.condition(prompted.prepared, z_t, t)
        self.num_calls, self.rows = self.num_calls + 1, len(z_t)
        return self.model.denoiser(z_t, t, self.condition, prompted.static)


def drawn(
    model: TextToImage, every: int, requests: Sequence[Request], config: SamplerConfig, batch_size: int
) -> torch.Tensor:
    """Latents of all requests."""
    velocities, made = ReusedCondition(model, every), []
    for start in range(0, len(requests), batch_size):
        part = requests[start : start + batch_size]
        noise = initial_noise(range(start, start + len(part)), model.latent_shape)
        made.append(sample(velocities, part, noise, config))
    return torch.cat(made)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=WEIGHTS / "base")
    parser.add_argument("--every", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--num-prompts", type=int, default=120)
    parser.add_argument("--num-steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=60)
    parser.add_argument(
        "--new", action="store_true", help="prompts with concepts that training never showed too"
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_checkpoint(args.checkpoint).to(device)
    decoder = model.load_decoder()
    suite = ScenesSuite(ScenesSuiteConfig(num_prompts=args.num_prompts, include_new=args.new), seed=0)
    items = suite.items()
    requests = [item.request for item in items for _ in range(item.num_outputs)]
    config = SamplerConfig(num_steps=args.num_steps, guidance_scale=args.guidance_scale)
    exact: torch.Tensor | None = None
    for every in args.every:
        started = time.perf_counter()
        latents = drawn(model, every, requests, config, args.batch_size)
        seconds = time.perf_counter() - started
        exact = latents if exact is None else exact
        noise = initial_noise(range(len(latents)), model.latent_shape)
        parts = zip(latents.split(60), noise.split(60), strict=True)
        images = np.concatenate([to_uint8(decode(model, decoder, *part)) for part in parts])
        scores = suite.score(items, suite.judge(device)(items, per_item(images, items)))
        said: dict[str, Any] = {
            "every": every,
            "seconds": round(seconds, 2),
            "distance": round(((latents - exact).norm() / exact.norm()).item(), 4),
            scores.headline: round(scores.headline_value, 4),
            "interval": scores.intervals.get(scores.headline),
        }
        print(json.dumps(said, default=str), flush=True)


if __name__ == "__main__":
    main()
