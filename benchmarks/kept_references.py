"""A step of sampling where references' keys and values are kept against one that computes them;
`benchmarks/kept_references.py`.

The DiT alone, random weights and tokens; no file is read. `--geometry small` runs on a CPU in a minute,
`1.3b` is for a GPU. Three ways take turns in one process on the same tokens: keys and values kept, what is
kept computed anew at every step, and references in the one sequence, where they change with the latents
(`kept_references: false`, another model). What is computed once is part of the time. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch

from repfusion.conditioning.base import Condition, Context
from repfusion.llm.chats.eyes import beside, in_rows
from repfusion.model.dit import DiTConfig
from repfusion.model.in_context import InContextDiT, ReferencesDiT

GEOMETRIES = {
    "small": (DiTConfig(hidden_size=256, depth=6, num_heads=4), 64, (16, 16), 256),
    "1.3b": (DiTConfig(hidden_size=2048, depth=24, num_heads=16), 64, (32, 32), 2560),
}
"""A DiT, channels of a latent token, the latents' grid, channels of a condition token."""


Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def drawn_contexts(args: argparse.Namespace, width: int, device: torch.device) -> tuple[Context, Context]:
    """Text tokens in a line; tokens of square images beside each other."""
    lines = torch.arange(args.text_tokens)[:, None].expand(-1, 2)
    places = beside([in_rows(args.side, args.side)] * args.images)
    found = []
    for positions in (lines, places):
        rows = positions.to(device).expand(args.batch, -1, -1)
        tokens = torch.randn(*rows.shape[:2], width, device=device)
        found.append(Context(tokens, torch.ones(rows.shape[:2], dtype=torch.bool, device=device), rows))
    return found[0], found[1]


def together(text: Context, images: Context) -> Context:
    """Both as one context."""
    found = []
    for name in ("tokens", "mask", "positions"):
        found.append(torch.cat([getattr(text, name), getattr(images, name)], dim=1))
    return Context(*found)


def seconds_of(way: Callable[[], Velocity], z: torch.Tensor, num_steps: int) -> tuple[float, torch.Tensor]:
    """Seconds of a step, and where Euler's steps end."""
    if z.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    velocity = way()
    for step in range(num_steps, 0, -1):
        z = z - velocity(z, torch.full((len(z),), step / num_steps, device=z.device)).float() / num_steps
    z = z.cpu()
    return (time.perf_counter() - started) / num_steps, z


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="small")
    parser.add_argument("--images", type=int, default=2, help="references of each image")
    parser.add_argument("--side", type=int, default=16, help="rows and columns of a reference's tokens")
    parser.add_argument("--text-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--num-steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="of which the medians are taken")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config, latent_dim, grid, width = GEOMETRIES[args.geometry]
    with device:
        references = ReferencesDiT(config, latent_dim, grid, None, (width, width)).eval()
        plain = InContextDiT(config, latent_dim, grid, None, (width,)).eval()
    for parameter in references.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    plain.load_state_dict(references.state_dict())
    text, images = drawn_contexts(args, width, device)
    z = torch.randn(args.batch, grid[0] * grid[1], latent_dim, device=device)

    def kept() -> Velocity:
        static = references.prefill((text, images))
        return lambda z, t: references(z, t, Condition(), static)

    def anew() -> Velocity:
        return lambda z, t: references(z, t, Condition(), references.prefill((text, images)))

    def one_sequence() -> Velocity:
        static = plain.prefill((together(text, images),))
        return lambda z, t: plain(z, t, Condition(), static)

    ways = {"kept": kept, "anew": anew, "one_sequence": one_sequence}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    ends: dict[str, torch.Tensor] = {}
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for repeat in range(args.repeats + 1):
            for name, way in ways.items():
                found, ends[name] = seconds_of(way, z, args.num_steps)
                if repeat:  # the first warms up
                    seconds[name].append(found)
    step = {name: median(times) for name, times in seconds.items()}
    said = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "geometry": args.geometry,
        "latent_tokens": z.shape[1],
        "text_tokens": args.text_tokens,
        "reference_tokens": images.tokens.shape[1],
        "batch": args.batch,
        "num_steps": args.num_steps,
        **{f"{name}_step_sec": value for name, value in step.items()},
        "ratio_to_anew": step["anew"] / step["kept"],
        "ratio_to_one_sequence": step["one_sequence"] / step["kept"],
        "difference_to_anew": (ends["kept"] - ends["anew"]).abs().max().item(),
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
