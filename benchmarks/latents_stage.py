"""The latents stage against the bare encoder loop on the same tensors in memory, in one run: images/s and
their ratio.

The loop only encodes. The stage reads tars, decodes, encodes, adds up statistics, writes and hashes, in a Ray
actor
with the same number of threads. Loading models and starting Ray are left out of both.

    python benchmarks/latents_stage.py --encoder FOLDER [--num-samples 2000] [--batch-size 64] [--rounds 3]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from pipelines.latents import LatentsConfig, LatentsWorker, decoded_batches
from pipelines.pool import ActorPool, ActorsConfig, RayConfig, ShardJob, ray_session, run_shards
from pipelines.scenes_source import to_uint8
from pipelines.store import ShardCommit, tar_shard
from repfusion.foundation import WEIGHTS
from repfusion.rae.encoder import RepresentationEncoder
from repfusion.scenes.world import WorldConfig, draw_scene, render


def write_images(folder: Path, image_size: int, num_samples: int, num_shards: int) -> list[ShardJob]:
    """Shards of scenes as `curate` leaves them."""
    import io

    from PIL import Image

    jobs = []
    config = WorldConfig(image_size=image_size)
    for shard, seeds in enumerate(np.array_split(np.arange(num_samples), num_shards)):
        with ShardCommit(folder, f"{shard:05d}", "f", {}) as commit:
            with tar_shard(commit) as samples:
                for seed in seeds.tolist():
                    stream = io.BytesIO()
                    Image.fromarray(to_uint8(render(draw_scene(seed, config), config))).save(stream, "PNG")
                    samples.write(f"{seed:09d}", {"png": stream.getvalue(), "txt": b"a thing"})
            commit.commit(f"{shard:05d}.tar")
        jobs.append(ShardJob(f"{shard:05d}", "f"))
    return jobs


def bare_loop(encoder: RepresentationEncoder, batches: list[torch.Tensor]) -> float:
    """Seconds to encode batches that lie in memory as float32 pixels."""
    start = time.perf_counter()
    for batch in batches:
        encoder(batch)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", type=Path, default=WEIGHTS / "vision_tower")
    parser.add_argument("--layer", type=int, default=-2)
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--num-shards", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    encoder = RepresentationEncoder.from_pretrained(args.encoder, args.layer)
    config = LatentsConfig(
        batch_size=args.batch_size, actors=ActorsConfig(num_actors=1, num_cpus=args.threads)
    )
    ratios, bare_rates, stage_rates = [], [], []
    with tempfile.TemporaryDirectory() as scratch, ray_session(RayConfig(num_cpus=args.threads)):
        source = Path(scratch) / "curate"
        jobs = write_images(source, encoder.image_size, args.num_samples, args.num_shards)
        batches = [
            torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255)
            for job in jobs
            for _, images in decoded_batches(
                source / f"{job.name}.tar", None, encoder.image_size, args.batch_size
            )
        ]
        pool = ActorPool()
        for round_index in range(args.rounds + 1):
            # the two take turns, so that a machine that grows slower or faster does not favour either
            bare_sec = bare_loop(encoder, batches)
            arguments = {
                "folder": Path(scratch) / f"latents{round_index}",
                "source": source,
                "config": config,
                "encoder": args.encoder,
                "layer": args.layer,
            }
            sidecars = run_shards(pool, "latents", LatentsWorker, arguments, jobs, config.actors)
            stage_sec = sum(sidecar.seconds for sidecar in sidecars)
            if round_index == 0:
                continue  # warms both up
            ratios.append(bare_sec / stage_sec)
            bare_rates.append(args.num_samples / bare_sec)
            stage_rates.append(args.num_samples / stage_sec)
        pool.close()
    result = {
        "bare_images_per_sec": round(statistics.median(bare_rates), 1),
        "stage_images_per_sec": round(statistics.median(stage_rates), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "target": 0.8,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
