"""Image features against Ray Data with the same encoder, machine, number of actors, threads and batch
size: images/s and their ratio.

Ray Data reads tars, encodes on an actor pool and writes tars: `read_webdataset -> map_batches ->
write_webdataset`. It decodes either in its read tasks (its own decoder) or in the actors; the faster of the
two counts. Both leave a float16 npy for each key, which is compared. Ours also checks what it reads, adds up
statistics, hashes and commits. `ratio` leaves out the start of actors and loading of models,
`ratio_with_start` has them. The cluster has one CPU more than the actors hold: Ray Data reads and writes on
it, our actors' second threads may run there.

    python benchmarks/ray_data.py [--geometry vit-b-32] [--num-samples 8000] [--rounds 3]
"""

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.image_features import GEOMETRIES, make_encoder, stage_seconds, write_images
from pipelines.runtime.pool import ActorPool, ActorsConfig, ShardJob
from pipelines.runtime.session import RayConfig, ray_session
from pipelines.shards.storage import Folder
from pipelines.stages.image_features import ImageFeaturesConfig
from repfusion.latents.load import EncoderConfig

Place = Literal["read", "actor"]


class Encode:
    """What users of Ray Data write: a batch of images -> a batch of features."""

    def __init__(self, encoder: EncoderConfig, column: str, threads: int, ready: Path):
        torch.set_num_threads(threads)
        self.encoder, self.column = encoder.load(), column
        (ready / str(os.getpid())).write_text(str(time.time()))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = batch[self.column]
        if not isinstance(images[0], np.ndarray):
            from PIL import Image

            images = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in images])
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div(255)
        return {"__key__": batch["__key__"], "image_features.npy": self.encoder(pixels).half().numpy()}


def ray_data_seconds(
    source: Folder, target: Path, encoder: EncoderConfig, column: str, place: Place, args: argparse.Namespace
) -> tuple[float, float]:
    """Seconds with and without the start of the actors."""
    import ray

    ready = target.with_name(f"{target.name}.ready")
    ready.mkdir()
    start = time.time()
    data = ray.data.read_webdataset(
        sorted(str(path) for path in source.path.glob("*.tar")),
        suffixes=[f".{column}"],
        decoder=True if place == "read" else None,
    )
    data.map_batches(
        Encode,
        fn_constructor_args=(encoder, column, args.threads, ready),
        batch_size=args.batch_size,
        num_cpus=args.threads,
        compute=ray.data.ActorPoolStrategy(size=args.num_actors),
    ).write_webdataset(str(target))
    end = time.time()
    return end - start, end - max(float(path.read_text()) for path in ready.iterdir())


def our_seconds(
    root: Folder, name: str, encoder: EncoderConfig, jobs: list[ShardJob], args: argparse.Namespace
) -> tuple[float, float]:
    """Seconds with and without the start of the actors."""
    actors = ActorsConfig(num_actors=args.num_actors, num_cpus=args.threads)
    arguments = {
        "cores": None,
        "folder": root / name,
        "source": root / "curate",
        "config": ImageFeaturesConfig(batch_size=args.batch_size, actors=actors),
        "encoder": encoder,
    }
    pool = ActorPool()
    start = time.time()
    seconds, _ = stage_seconds(pool, arguments, jobs, actors)
    whole = time.time() - start
    pool.close()
    return whole, seconds


def read_features(folder: Path) -> dict[str, np.ndarray]:
    """Every array of a folder of tars, by key."""
    found = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as archive:
            for info in archive:
                stream = archive.extractfile(info)
                assert stream is not None
                found[info.name.partition(".")[0]] = np.load(io.BytesIO(stream.read()))
    return found


def check_same(ours: Path, theirs: Path, num_samples: int) -> float:
    """The largest difference of any value: batches differ, so the last bit may. Raises ValueError for other
    keys.
    """
    left, right = read_features(ours), read_features(theirs)
    if left.keys() != right.keys() or len(left) != num_samples:
        raise ValueError(
            f"{len(left)} keys of ours, {len(right)} of Ray Data's, expected the same {num_samples}"
        )
    return max(float(np.abs(left[key].astype(np.float32) - right[key]).max()) for key in left)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=GEOMETRIES, default="shipped")
    parser.add_argument("--num-samples", type=int)
    parser.add_argument("--num-shards", type=int, default=8)
    parser.add_argument("--num-actors", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="compute threads, and CPUs, of each actor")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    num_samples = args.num_samples or (8000 if args.geometry == "shipped" else 256)
    column = "png" if args.geometry == "shipped" else "jpg"
    ours: list[tuple[float, float]] = []
    theirs: dict[Place, list[tuple[float, float]]] = {"read": [], "actor": []}
    cluster = RayConfig(num_cpus=args.num_actors * args.threads + 1, object_store_mib=1024)
    with tempfile.TemporaryDirectory() as scratch, ray_session(cluster):
        import ray

        ray.data.DataContext.get_current().enable_progress_bars = False
        root = Folder.at(scratch)
        encoder = make_encoder(args.geometry, Path(scratch) / "tower")
        jobs = write_images(root / "curate", args.geometry, num_samples, args.num_shards)
        difference = 0.0
        for index in range(args.rounds):
            ours.append(our_seconds(root, f"ours{index}", encoder, jobs, args))
            for place, rounds in theirs.items():
                target = Path(scratch) / f"{place}{index}"
                rounds.append(ray_data_seconds(root / "curate", target, encoder, column, place, args))
                difference = max(difference, check_same(root.path / f"ours{index}", target, num_samples))
    fastest: Place = min(theirs, key=lambda place: median(steady for _, steady in theirs[place]))
    ratios = [theirs[fastest][i][1] / ours[i][1] for i in range(args.rounds)]
    result = {
        "geometry": args.geometry,
        "actors": args.num_actors,
        "threads": args.threads,
        "ours_images_per_sec": round(num_samples / median(steady for _, steady in ours), 1),
        **{
            f"ray_data_decoding_in_{place}_images_per_sec": round(
                num_samples / median(steady for _, steady in rounds), 1
            )
            for place, rounds in theirs.items()
        },
        "ratio": round(median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio_with_start": round(
            median(whole for whole, _ in theirs[fastest]) / median(whole for whole, _ in ours), 3
        ),
        "largest_difference": difference,
        "target": 1.3,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
