"""The data loader against the training step it must not hold up: how long the loop waits for data, samples/s
of the loader alone, and what the random draws of a sample cost.

`python benchmarks/data_wait.py`. Every batch is read from its tars (cache_bytes=0), joined, drawn and handed
over by the read-ahead thread; the tars come from the page cache where the operating system has them there.
The steps are matrix products that take as long as training would. All figures of a geometry come from
alternating rounds, so that a busy machine slows them alike.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from tiny_columns import SHIFT, collate
from tiny_training import make_columns

from repfusion.data.batches import batches
from repfusion.data.config import DataConfig
from repfusion.data.mixture import Mixture
from repfusion.data.order import sample_seed
from repfusion.data.readers import IMAGE_FEATURES, SampleArray
from repfusion.data.recipe import Recipe
from repfusion.diffusion.flow import draw


@dataclass(frozen=True)
class Geometry:
    grid: int
    width: int
    num_samples: int
    batch_size: int
    steps: int
    """Steps of one round."""
    step_sec: float
    """What a training step takes: of the demo on 2 cores, or of a 7B MLLM with a 1.3B DiT on one GPU."""


GEOMETRIES = {
    "16x64": Geometry(4, 64, 2048, 64, 40, step_sec=64 / 250),
    "576x1024": Geometry(24, 1024, 512, 16, 8, step_sec=16 / 25),
}


class Loader:
    def __init__(self, geometry: Geometry, columns: Path, rounds: int):
        self.geometry = geometry
        folders = {IMAGE_FEATURES: columns / IMAGE_FEATURES}
        config = DataConfig(images=columns / "curate", columns=folders, cache_bytes=0)
        self.mixture = Mixture.open(config, {IMAGE_FEATURES: SampleArray()})
        self.stream = batches(
            self.mixture,
            Recipe(condition_dropout=0.1),
            collate,
            seed=0,
            first_step=0,
            num_steps=(3 * rounds + 1) * max(8, geometry.steps),
            global_batch_size=geometry.batch_size,
            micro_batch_size=geometry.batch_size,
        )

    def seconds_of_loading(self) -> float:
        start = time.perf_counter()
        for _ in range(self.geometry.steps):
            next(self.stream)
        return time.perf_counter() - start

    def share_of_waiting(self) -> float:
        """The share of time spent waiting for batches, where a step works for `step_sec` between them."""
        waited, start, ones = 0.0, time.perf_counter(), torch.ones(256, 256)
        for _ in range(max(8, self.geometry.steps // 4)):
            waiting = time.perf_counter()
            next(self.stream)
            waited += time.perf_counter() - waiting
            stop = time.perf_counter() + self.geometry.step_sec
            while time.perf_counter() < stop:
                torch.mm(ones, ones)
        return waited / (time.perf_counter() - start)

    def seconds_of_reading(self) -> float:
        """The features of as many samples, by offset, in the order of the first epoch."""
        column, order = self.mixture.datasets["main"].columns[IMAGE_FEATURES], self.mixture.order(1)
        starts = self.mixture.datasets["main"].starts
        start = time.perf_counter()
        for position in range(self.geometry.steps * self.geometry.batch_size):
            index = order.at(position).index
            shard = int(starts.searchsorted(index, side="right")) - 1
            column.read(f"{IMAGE_FEATURES}.npy", shard, index - int(starts[shard]))
        return time.perf_counter() - start

    def seconds_of_drawing(self) -> float:
        size = self.geometry.batch_size
        start = time.perf_counter()
        for step in range(self.geometry.steps):
            seeds = [sample_seed(0, "main", 0, str(step * size + i)) for i in range(size)]
            draw(seeds, self.mixture.forms[IMAGE_FEATURES][0], SHIFT)
        return time.perf_counter() - start

    def close(self) -> None:
        self.stream.close()
        self.mixture.close()


def measure(geometry: Geometry, root: Path, rounds: int) -> dict[str, float]:
    columns = make_columns(root, geometry.num_samples, 256, geometry.grid, geometry.width)
    loader = Loader(geometry, columns, rounds)
    loader.seconds_of_loading()
    measures = (
        loader.seconds_of_loading,
        loader.seconds_of_reading,
        loader.seconds_of_drawing,
        loader.share_of_waiting,
    )
    found = [[measure() for measure in measures] for _ in range(rounds)]
    loader.close()
    loading, reading, drawing, waiting = (median(values) for values in zip(*found, strict=True))
    samples = geometry.steps * geometry.batch_size
    return {
        "loader_samples_per_sec": samples / loading,
        "loader_batches_per_sec": geometry.steps / loading,
        "loader_ms_per_sample": 1e3 * loading / samples,
        "read_ms_per_sample": 1e3 * reading / samples,
        "draw_ms_per_sample": 1e3 * drawing / samples,
        "step_ms": 1e3 * geometry.step_sec,
        "data_wait": waiting,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--geometry", choices=GEOMETRIES, nargs="*", default=list(GEOMETRIES))
    parser.add_argument(
        "--folder", type=Path, help="where the tars are written; a temporary folder unless given"
    )
    parser.add_argument("--threads", type=int, default=1, help="of the steps that stand for training")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        for name in args.geometry:
            result = measure(GEOMETRIES[name], Path(temporary) / name, args.rounds)
            print(json.dumps({"geometry": name, **{key: round(value, 4) for key, value in result.items()}}))


if __name__ == "__main__":
    main()
