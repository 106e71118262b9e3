"""Our training loop against a bare PyTorch loop: same model, same batch in memory, one process, samples/s as
a ratio (target 0.95).

`python benchmarks/training.py`. The two are timed in alternating rounds, so that a busy machine slows both
alike. Ours reads tars through the data loader, draws the noise, clips, averages weights; the bare one repeats
forward, backward and AdamW on one prepared batch.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from tiny_training import make_columns, make_foundation, tiny_data, tiny_model

from repfusion.data.batches import batches
from repfusion.data.mixture import Mixture
from repfusion.data.recipe import Recipe
from repfusion.devices.placing import multiplies_bf16
from repfusion.inputs import to_device
from repfusion.model.build import columns_of
from repfusion.model.dit import DiTConfig
from repfusion.train import TrainConfig, build_trainable
from repfusion.training.distributed import num_cores, shut_down
from repfusion.training.ema import EMA
from repfusion.training.engine import Engine, EngineConfig
from repfusion.training.meters import Meters


class BareLoop:
    def __init__(self, config: TrainConfig, dataset: Mixture):
        self.module = build_trainable(config, dataset)
        stream = batches(
            dataset,
            Recipe(config.condition_dropout),
            self.module.collate,
            seed=0,
            first_step=0,
            num_steps=1,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.global_batch_size,
        )
        self.inputs = next(stream)[0].inputs
        stream.close()
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(self) -> None:
        self.optimizer.zero_grad()
        attention = sdpa_kernel(SDPBackend.MATH) if not torch.cuda.is_available() else nullcontext()
        with attention, torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16(torch.device("cpu"))):
            loss = self.module(self.inputs)["velocity"].mean()
        loss.backward()
        self.optimizer.step()


class OurLoop:
    def __init__(self, config: TrainConfig, dataset: Mixture):
        self.model = build_trainable(config, dataset)
        frozen = self.model.frozen_parts()
        self.engine = Engine(self.model, config.engine, config.global_batch_size, config.num_steps, frozen)
        self.meters = Meters(self.engine.device, config.global_batch_size, len(dataset), 1.0)
        self.ema = EMA(self.engine.partition.masters, config.ema_decay)
        self.stream = batches(
            dataset,
            Recipe(config.condition_dropout),
            self.model.collate,
            seed=0,
            first_step=0,
            num_steps=config.num_steps,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.engine.micro_batch_size,
        )
        self.done, self.waited_sec = 0, 0.0

    def step(self) -> None:
        waiting = time.perf_counter()
        parts = next(self.stream)
        self.waited_sec += time.perf_counter() - waiting
        for batch in parts:
            inputs = to_device(batch.inputs, self.engine.device)
            self.meters.add_losses(inputs["t"], self.engine.accumulate(batch.keys, inputs=inputs))
        self.engine.update(self.done)
        self.ema.update(self.done)
        self.done += 1


def seconds(loop: BareLoop | OurLoop, steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        loop.step()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=1, help="steps of each loop in a round")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=num_cores())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        geometry = {"tower_width": 64, "text_width": 128, "text_layers": 4, "grid": 4}
        foundation = make_foundation(root, **geometry)
        columns = make_columns(root / "data", 512, 256, grid=geometry["grid"], width=geometry["tower_width"])
        model = tiny_model(foundation).model_copy(update={"dit": DiTConfig()})
        config = TrainConfig(
            output_dir=root / "out",
            data=tiny_data(columns, cache_bytes=0),
            model=model,
            engine=EngineConfig(micro_batch_size=args.batch_size, num_threads=args.threads),
            num_steps=(args.rounds + 1) * args.steps,
            global_batch_size=args.batch_size,
        )
        dataset = Mixture.open(config.data, columns_of(config.model))
        ours, bare = OurLoop(config, dataset), BareLoop(config, dataset)
        for loop in (ours, bare):
            seconds(loop, args.steps)
        ours.waited_sec = 0.0
        pairs = [(seconds(ours, args.steps), seconds(bare, args.steps)) for _ in range(args.rounds)]
        ours.stream.close()
    shut_down()
    samples = args.steps * args.batch_size
    result = {
        "ours_samples_per_sec": samples / median(a for a, _ in pairs),
        "bare_samples_per_sec": samples / median(b for _, b in pairs),
        "ratio": median(b / a for a, b in pairs),
        "data_wait": ours.waited_sec / sum(a for a, _ in pairs),
        "threads": args.threads,
    }
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))


if __name__ == "__main__":
    main()
