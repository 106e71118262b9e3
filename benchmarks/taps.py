"""Conditions of a training from token ids, teacher-forced through the frozen language model at every step,
against the same hidden states kept as a column: bytes of a caption, and training samples/s of both;
`python benchmarks/taps.py`.

The shipped LLaVA in the row `unifusion_verifi` of docs/unifusion/plan.md. No stage writes such a column: here
the states are handed over in memory, so that reading it from disk is left out, in its favour. A step is
forward, backward and AdamW. The bytes of UniFusion's own sizes (10 taps of width 4096, 300
tokens) stand beside. The last line is JSON.
"""

import argparse
import json
import time
from contextlib import nullcontext
from statistics import median
from unittest.mock import patch

import numpy as np
import torch

from repfusion.conditioning import unifusion
from repfusion.data.readers import REWRITES
from repfusion.devices.placing import multiplies_bf16
from repfusion.diffusion.flow import FlowConfig, draw
from repfusion.latents.statistics import LatentStatistics
from repfusion.llm.chats.read import read_chats
from repfusion.model.build import build_model
from repfusion.model.config import ModelConfig
from repfusion.model.dit import DiTConfig
from repfusion.request import Request
from repfusion.runs.folder import STATISTICS
from repfusion.scenes.rewriting import draw_rewriting
from repfusion.scenes.world import WorldConfig, draw_scene
from repfusion.weights import WEIGHTS

CONDITIONING = {
    "method": "unifusion",
    "lap": {"taps": [1, 2, 3, 4]},
    "rewriting": {"system": "rewrite", "max_new_tokens": 32},
}


def requests_of(number: int, model: torch.nn.Module) -> list[Request]:
    """Terse prompts with their rewritings' token ids."""
    found = []
    for seed in range(number):
        rng = np.random.default_rng(seed)
        one = draw_rewriting(draw_scene(seed, WorldConfig()), rng, quoted_share=0.0)
        (ids,) = model.conditioner.llm.token_ids([one.plain])
        found.append(Request(one.terse, computed={REWRITES: torch.tensor(ids, dtype=torch.int32)}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7, help="of which the medians are taken")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ModelConfig.model_validate(
        {
            "conditioning": CONDITIONING,
            "dit": DiTConfig(hidden_size=128, depth=4, num_heads=2),
            "flow": FlowConfig(base_dim=64),
        }
    )
    model = build_model(config, LatentStatistics.load(WEIGHTS / "base" / STATISTICS))
    requests, seeds = requests_of(args.batch, model), list(range(args.batch))
    t, noise = draw(seeds, model.latent_shape, model.shift)
    asked = model.conditioner.collate(requests, ["full"] * args.batch, seeds)
    features = torch.randn(noise.shape).half()
    inputs = {"request": asked, "features": features, "t": t, "noise": noise}
    optimizer = torch.optim.AdamW(model.trainable_state().values(), fused=True)
    with torch.no_grad():
        states = read_chats(model.conditioner.llm, asked["chats"], model.conditioner.taps)
    seconds: dict[str, list[float]] = {"ids": [], "column": []}
    for number in range(args.rounds + 1):
        for name in seconds:
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16(torch.device("cpu")))
            known = patch.object(unifusion, "read_chats", lambda *_: states)
            with known if name == "column" else nullcontext(), autocast:
                start = time.process_time()
                loss = model(inputs)["velocity"].mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if number:  # the first warms up
                seconds[name].append(time.process_time() - start)
    kept = asked["kept"].keep.sum(1).float().mean().item()
    ids = float(np.mean([request.computed[REWRITES].numel() for request in requests]))
    taps, width = len(model.conditioner.taps), model.conditioner.llm.width
    rate = {name: args.batch / median(found) for name, found in seconds.items()}
    said = {
        "batch": args.batch,
        "tokens_kept_of_a_caption": round(kept, 1),
        "ids_bytes_a_caption": round(4 * ids),
        "taps_bytes_a_caption": round(2 * taps * width * kept),
        **{f"{name}_samples_per_cpu_sec": round(value, 1) for name, value in rate.items()},
        "ids_to_column": round(rate["ids"] / rate["column"], 3),
        "published_bytes_a_caption": {"ids": 4 * 300, "taps": 2 * 10 * 4096 * 300},
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
