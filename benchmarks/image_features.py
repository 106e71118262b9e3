"""Image features against the bare encoder loop on the same tensors in memory, in one run: images/s and
their ratio.

The loop only encodes. The stage reads tars, decodes, encodes, adds up statistics, writes, hashes and
commits, in a Ray actor with the same number of compute threads; it keeps two shards in flight, so its other
threads may use a second core where there is one: `stage_cores` says how much it used. `--pin` holds each of
the two to as many cores as it has compute threads; `ratio_of_cpu_sec` compares what they cost, on a busy
machine too. The stage has malloc keep freed memory; `--keep-freed-memory` lets the bare loop do so. Loading
models and starting Ray are left out of both.

    python benchmarks/image_features.py [--geometry vit-b-32] [--pin] [--num-samples 4000] [--rounds 5]
"""

import argparse
import io
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.runtime.pool import ActorPool, ActorsConfig, ShardJob, run_shards
from pipelines.runtime.session import RayConfig, ray_session
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit
from pipelines.shards.tars import tar_shard
from pipelines.stages.image_features import (
    ImageFeaturesConfig,
    ImageFeaturesWorker,
    decode_image,
    decoded_batches,
    keep_freed_memory,
)
from repfusion.latents.load import EncoderConfig
from repfusion.latents.tower import RepresentationEncoder
from repfusion.scenes.world import WorldConfig, draw_scene, render, to_uint8

GEOMETRIES = ("shipped", "vit-b-32")
"""The shipped tower on scenes of 32 px (png), or CLIP ViT-B/32's geometry with random weights on 224 px
(jpg).
"""


def make_encoder(geometry: str, folder: Path) -> EncoderConfig:
    """The shipped tower, or one written into a folder."""
    if geometry == "shipped":
        return EncoderConfig()
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig()).save_pretrained(folder)
    return EncoderConfig(path=folder)


def make_image(geometry: str, seed: int) -> dict[str, bytes]:
    """A scene; or noise of about the detail (and the bytes) of a photograph."""
    stream = io.BytesIO()
    if geometry == "shipped":
        config = WorldConfig(image_size=32)
        Image.fromarray(to_uint8(render(draw_scene(seed, config), config))).save(stream, "PNG")
        return {"png": stream.getvalue()}
    noise = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((224, 224), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return {"jpg": stream.getvalue()}


def write_images(folder: Folder, geometry: str, num_samples: int, num_shards: int) -> list[ShardJob]:
    """Shards as `curate` leaves them; the images repeat after 1,000."""
    jobs = []
    images = [make_image(geometry, seed) for seed in range(min(num_samples, 1000))]
    for shard, rows in enumerate(np.array_split(np.arange(num_samples), num_shards)):
        name = f"{shard:05d}"
        with ShardCommit(folder, name, "f", {}) as commit:
            with tar_shard(commit) as samples:
                for row in rows.tolist():
                    samples.write(f"{row:09d}", {**images[row % len(images)], "txt": b"a thing"})
            commit.commit(f"{name}.tar")
        jobs.append(ShardJob(name, "f"))
    return jobs


def read_batches(
    source: Folder, jobs: list[ShardJob], image_size: int, batch_size: int
) -> list[torch.Tensor]:
    """All images as float32 pixels in memory."""
    decode, shape = partial(decode_image, size=image_size), (image_size, image_size, 3)
    return [
        torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255)
        for job in jobs
        for _, images in decoded_batches(source, job.name, None, decode, shape, batch_size)
    ]


def bare_loop(encoder: RepresentationEncoder, batches: list[torch.Tensor]) -> tuple[float, float]:
    """Wall and CPU seconds to encode batches that lie in memory as float32 pixels."""
    start, start_cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        encoder(batch)
    return time.perf_counter() - start, time.process_time() - start_cpu


class TimedWorker:
    """The stage's worker; says for each shard when it began and ended, and the process's CPU seconds then."""

    concurrency = ImageFeaturesWorker.concurrency

    def __init__(self, cores: int | None, **arguments: Any):
        if cores is not None:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
        self.worker = ImageFeaturesWorker(**arguments)

    def __call__(self, job: ShardJob) -> tuple[float, float, float, float]:
        start, start_cpu = time.perf_counter(), time.process_time()
        self.worker(job)
        return start, time.perf_counter(), start_cpu, time.process_time()


def stage_seconds(
    pool: ActorPool, arguments: dict[str, Any], jobs: list[ShardJob], actors: ActorsConfig
) -> tuple[float, float]:
    """Wall and CPU seconds from the first shard's beginning to the last one's end, of one actor."""
    times = list(run_shards(pool, "image_features", TimedWorker, arguments, jobs, actors).values())
    starts, ends, starts_cpu, ends_cpu = zip(*times, strict=True)
    return max(ends) - min(starts), max(ends_cpu) - min(starts_cpu)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=GEOMETRIES, default="shipped")
    parser.add_argument("--num-samples", type=int)
    parser.add_argument("--num-shards", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="compute threads of each")
    parser.add_argument("--pin", action="store_true", help="hold both to as many cores as compute threads")
    parser.add_argument(
        "--keep-freed-memory", action="store_true", help="give the bare loop the stage's malloc settings"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    num_samples = args.num_samples or (8000 if args.geometry == "shipped" else 256)
    cores = args.threads if args.pin else None
    actors = ActorsConfig(num_actors=1, num_cpus=args.threads)
    bare, stage = [], []
    with tempfile.TemporaryDirectory() as scratch, ray_session(RayConfig(num_cpus=args.threads)):
        torch.set_num_threads(args.threads)
        if args.keep_freed_memory:
            keep_freed_memory()
        if cores is not None:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
        root = Folder.at(scratch)
        config = make_encoder(args.geometry, Path(scratch) / "tower")
        encoder = config.load()
        jobs = write_images(root / "curate", args.geometry, num_samples, args.num_shards)
        batches = read_batches(root / "curate", jobs, encoder.image_size, args.batch_size)
        arguments = {
            "cores": cores,
            "folder": root / "image_features",
            "source": root / "curate",
            "config": ImageFeaturesConfig(batch_size=args.batch_size, actors=actors),
            "encoder": config,
        }
        pool = ActorPool()
        for round_index in range(args.rounds + 1):
            # the two take turns, so that a machine that grows slower or faster does not favour either
            bare_round = bare_loop(encoder, batches)
            stage_round = stage_seconds(pool, arguments, jobs, actors)
            if round_index > 0:  # the first warms both up
                bare.append(bare_round)
                stage.append(stage_round)
        pool.close()
    (bare_sec, bare_cpu), (stage_sec, stage_cpu) = (zip(*rounds, strict=True) for rounds in (bare, stage))
    ratios = [b / s for b, s in zip(bare_sec, stage_sec, strict=True)]
    result = {
        "geometry": args.geometry,
        "threads": args.threads,
        "pinned": args.pin,
        "bare_images_per_sec": round(num_samples / median(bare_sec), 1),
        "stage_images_per_sec": round(num_samples / median(stage_sec), 1),
        "stage_cores": round(median(c / s for c, s in zip(stage_cpu, stage_sec, strict=True)), 2),
        "ratio": round(median(ratios), 3),
        "ratio_of_fastest_rounds": round(min(bare_sec) / min(stage_sec), 3),
        "ratio_of_cpu_sec": round(median(bare_cpu) / median(stage_cpu), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "target": 0.9,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
