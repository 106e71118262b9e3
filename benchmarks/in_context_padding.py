"""A training step of the in-context DiT on a padded batch against the same tokens without padding;
`python benchmarks/in_context_padding.py`.

The DiT alone, random weights and tokens; no file is read. Prompts' lengths are drawn from the embedded
world's terse and plain captions (`--lengths scenes`) or evenly between two numbers (`--lengths 20-120`).
Padded: one batch as long as its longest prompt, with a mask. Unpadded: the rows in buckets of one length
each, without a mask, as many forward and backward passes as there are lengths; and packed, rows of the mean
length in one batch, which is what variable-length attention could reach at best. The last line is JSON.
"""

import argparse
import json
import time
from collections import Counter
from statistics import median

import numpy as np
import torch

from repfusion.conditioning.base import Condition, Context
from repfusion.devices.placing import multiplies_bf16
from repfusion.llm.tokenizer import load_tokenizer, plain_ids
from repfusion.model.dit import DiTConfig
from repfusion.model.in_context import InContextDiT
from repfusion.scenes.rewriting import caption_in
from repfusion.scenes.world import WorldConfig, draw_scene
from repfusion.weights import WEIGHTS

GEOMETRIES = {
    "ladder": (DiTConfig(hidden_size=128, depth=4, num_heads=2), 96, (4, 4), 192),
    "small": (DiTConfig(hidden_size=256, depth=6, num_heads=4), 64, (16, 16), 256),
    "1.3b": (DiTConfig(hidden_size=2048, depth=24, num_heads=16), 64, (32, 32), 2560),
}
"""A DiT, channels of a latent token, the latents' grid, channels of a condition token."""


def drawn_lengths(text: str, number: int) -> list[int]:
    """Tokens of prompts, begin token included."""
    rng = np.random.default_rng(0)
    if text != "scenes":
        least, most = (int(part) for part in text.split("-"))
        return rng.integers(least, most + 1, number).tolist()
    world = WorldConfig()
    captions = [caption_in(draw_scene(seed, world), rng, "varied") for seed in range(number)]
    return [1 + len(ids) for ids in plain_ids(load_tokenizer(WEIGHTS / "llava"), captions)]


Batch = tuple[torch.Tensor, Context]


def batch_of(lengths: list[int], geometry: str, device: torch.device) -> Batch:
    """Latents, and prompts of these lengths, padded where they differ."""
    _, latent_dim, (rows, columns), width = GEOMETRIES[geometry]
    most = max(lengths)
    z = torch.randn(len(lengths), rows * columns, latent_dim, device=device)
    mask = torch.arange(most, device=device) < torch.tensor(lengths, device=device)[:, None]
    tokens = torch.randn(len(lengths), most, width, device=device)
    return z, Context(tokens, mask if min(lengths) < most else None)


def step(dit: InContextDiT, batches: list[Batch]) -> None:
    """Forward and backward of all rows."""
    for z, context in batches:
        t = torch.full((len(z),), 0.5, device=z.device)
        dit(z, t, Condition(), dit.prefill((context,))).square().mean().backward()
    dit.zero_grad(set_to_none=True)


def seconds_of(dit: InContextDiT, batches: list[Batch]) -> tuple[float, float]:
    """Wall and CPU seconds of a step."""
    if batches[0][0].device.type == "cuda":
        torch.cuda.synchronize()
    start, start_cpu = time.perf_counter(), time.process_time()
    step(dit, batches)
    if batches[0][0].device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - start_cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="ladder")
    parser.add_argument("--lengths", default="scenes", help="scenes, or LEAST-MOST")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9, help="of which the medians are taken")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    config, latent_dim, grid, width = GEOMETRIES[args.geometry]
    with device:
        dit = InContextDiT(config, latent_dim, grid, None, (width,))
    lengths = drawn_lengths(args.lengths, args.batch)
    mean = round(sum(lengths) / len(lengths))
    ways = {
        "padded": [batch_of(lengths, args.geometry, device)],
        "buckets": [
            batch_of([length] * rows, args.geometry, device) for length, rows in Counter(lengths).items()
        ],
        "packed": [batch_of([mean] * len(lengths), args.geometry, device)],
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bf16(device)):
        for number in range(args.rounds + 1):
            for name, batches in ways.items():
                found = seconds_of(dit, batches)
                if number:  # the first warms up
                    seconds[name].append(found)
    clock = 0 if device.type == "cuda" else 1
    taken = {name: median(one[clock] for one in found) for name, found in seconds.items()}
    said = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu, CPU seconds",
        "geometry": args.geometry,
        "latent_tokens": grid[0] * grid[1],
        "prompt_tokens": {"mean": mean, "most": max(lengths)},
        "batch": args.batch,
        **{f"{name}_step_sec": round(value, 4) for name, value in taken.items()},
        "padded_to_buckets": round(taken["buckets"] / taken["padded"], 3),
        "padded_to_packed": round(taken["packed"] / taken["padded"], 3),
        "target": 0.9,
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
