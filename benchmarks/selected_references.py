"""An image with references of which a share of the tokens is kept (MaVEn's selection) against one with all of
them; `benchmarks/selected_references.py`.

What follows the language model alone: selection, LAP and DiT, random weights and states; no file is read. The
language model reads the same either way. `--geometry small` runs on a CPU in a minute, `1.3b` is for a GPU.
Four ways take turns in one process: all tokens or selected ones, in the DiT's sequence or as kept references.
The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn

from repfusion.conditioning.base import Condition, Context
from repfusion.conditioning.lap import LayerwisePooling
from repfusion.conditioning.related.maven import ImageTokens, ReferenceSelection, SelectionConfig
from repfusion.llm.chats.batch import ChatBatch, pack
from repfusion.llm.chats.eyes import beside, in_rows
from repfusion.llm.chats.format import ChatPart
from repfusion.model.dit import DiTConfig
from repfusion.model.in_context import InContextDiT, ReferencesDiT

GEOMETRIES = {
    "small": (DiTConfig(hidden_size=256, depth=6, num_heads=4), 64, (16, 16), 256),
    "1.3b": (DiTConfig(hidden_size=2048, depth=24, num_heads=16), 64, (32, 32), 2560),
}
"""A DiT, channels of a latent token, the latents' grid, channels of the language model."""


def chats(args: argparse.Namespace, device: torch.device) -> ChatBatch:
    """Rows of square images before a text."""
    size = args.side**2
    image_of = torch.arange(args.images).repeat_interleave(size)
    image_of = torch.cat([image_of, torch.full((args.text_tokens,), -1)]).expand(args.batch, -1)
    parts = torch.where(image_of < 0, int(ChatPart.INSTRUCTION), int(ChatPart.IMAGE))
    places = beside([in_rows(args.side, args.side)] * args.images).repeat(args.batch, 1)
    rows = [one.to(device) for one in (torch.zeros_like(parts), parts, image_of, image_of)]
    return ChatBatch(*rows, {}, places.to(device))


class Reader(nn.Module):
    """States of a chat -> contexts of text and of images, of all tokens or of selected ones."""

    def __init__(self, batch: ChatBatch, width: int, num_taps: int, config: SelectionConfig):
        super().__init__()
        self.batch, self.lap = batch, LayerwisePooling(width, num_taps)
        self.select, self.images = ReferenceSelection(width, config), ImageTokens.of(batch, config)

    def contexts(self, states: Sequence[Tensor], selects: bool) -> tuple[Context, Context]:
        """Both contexts, as UniFusion makes them; the first state is that of the embeddings."""
        is_image, keep, gates = self.batch.is_any(ChatPart.IMAGE), self.batch.mask, None
        num_text = int((~is_image[0]).sum())
        num_images = is_image.shape[1] - num_text
        if selects:
            chosen = self.select(states[0], states[-1], ~is_image, self.images)
            keep, gates, num_images = ~is_image | chosen.keep, chosen, self.images.num_kept[0]
        packed, mask = pack(states[1:], keep, num_images + num_text)
        tokens = self.lap(packed, mask)
        images, text = tokens.split([num_images, num_text], dim=1)
        if gates is not None:
            (weights,), _ = pack([gates.gates[..., None]], keep, num_images + num_text)
            images = torch.cat([images * weights[:, :num_images], gates.tokens], dim=1)
        return Context(text), Context(images)


def seconds_of(work, device: torch.device) -> float:
    """How long a call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="small")
    parser.add_argument("--images", type=int, default=2, help="references of each image")
    parser.add_argument("--side", type=int, default=16, help="rows and columns of a reference's tokens")
    parser.add_argument("--share", type=float, default=0.25, help="of a reference's tokens")
    parser.add_argument("--num-discrete", type=int, default=32, help="tokens beside them")
    parser.add_argument("--taps", type=int, default=4, help="layers that are pooled")
    parser.add_argument("--text-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--num-steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="of which the medians are taken")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config, latent_dim, grid, width = GEOMETRIES[args.geometry]
    batch = chats(args, device)
    selection = SelectionConfig(share=args.share, num_discrete=args.num_discrete)
    with device:
        reader = Reader(batch, width, args.taps, selection).eval()
        dits = {
            "in_context": InContextDiT(config, latent_dim, grid, None, (width,)).eval(),
            "kept": ReferencesDiT(config, latent_dim, grid, None, (width, width)).eval(),
        }
        states = [torch.randn(*batch.ids.shape, width) for _ in range(1 + args.taps)]
        z = torch.randn(args.batch, grid[0] * grid[1], latent_dim)

    def image(name: str, selects: bool) -> None:
        text, images = reader.contexts(states, selects)
        whole = (text, images) if name == "kept" else (Context(torch.cat([text.tokens, images.tokens], 1)),)
        static = dits[name].prefill(whole)
        for step in range(args.num_steps, 0, -1):
            dits[name](z, torch.full((len(z),), step / args.num_steps, device=device), Condition(), static)

    ways = [(name, selects) for name in dits for selects in (False, True)]
    seconds: dict[tuple[str, bool], list[float]] = {way: [] for way in ways}
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for repeat in range(args.repeats + 1):
            for way in ways:
                found = seconds_of(lambda way=way: image(*way), device)
                if repeat:  # the first warms up
                    seconds[way].append(found)
    found = {way: median(times) for way, times in seconds.items()}
    said = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "geometry": args.geometry,
        "latent_tokens": z.shape[1],
        "text_tokens": args.text_tokens,
        "reference_tokens": args.images * args.side**2,
        "selected_tokens": reader.images.num_kept[0] + args.images * args.num_discrete,
        "batch": args.batch,
        "num_steps": args.num_steps,
    }
    for name in dits:
        said[f"{name}_all_sec"], said[f"{name}_selected_sec"] = found[name, False], found[name, True]
        said[f"{name}_ratio"] = found[name, False] / found[name, True]
    print(json.dumps(said))


if __name__ == "__main__":
    main()
