"""Encoding on one device, in one run: the bare encoder loop in each precision, compiled and not, and the
stage's worker, from JPEG tars to committed tars, with as many shards in flight as an actor has.

`python benchmarks/encoding.py [--geometry small]`. `published` is CLIP-L/14 at 336 px with random weights;
`small` runs anywhere. No Ray: the worker's threads are those of its actor. `host` is the worker with an
encoder that computes nothing: what decoding, hashing and writing alone allow. Distances to float32 are of
features before they are stored. The last line is JSON.
"""

import argparse
import io
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.runtime.pool import ActorsConfig, ShardJob, shards_in_flight
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit
from pipelines.shards.tars import tar_shard
from pipelines.stages.image_features import ImageFeaturesConfig, ImageFeaturesWorker
from repfusion.devices.compiling import Compilation
from repfusion.images.decode import read_image, read_pixels
from repfusion.latents.encoder import Encoding, PixelEncoder
from repfusion.latents.load import EncoderConfig
from repfusion.latents.statistics import TokenScale

NUM_IMAGES = 200
"""Different images, which repeat."""
GEOMETRIES = {
    "published": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    "small": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 16,
    },
}
"""Fields of CLIPVisionConfig."""


def jpegs(size: int) -> list[bytes]:
    """Noise of about the detail, and the bytes, of photographs."""
    rng, found = np.random.default_rng(0), []
    for _ in range(NUM_IMAGES):
        noise = rng.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        found.append(stream.getvalue())
    return found


def write_shards(folder: Folder, images: list[bytes], num_shards: int, num_samples: int) -> list[ShardJob]:
    """Shards as `curate` leaves them."""
    source, jobs = itertools.cycle(images), []
    for shard in range(num_shards):
        name = f"{shard:05d}"
        with ShardCommit(folder, name, "f", {}) as commit:
            with tar_shard(commit) as samples:
                for row in range(shard * num_samples, (shard + 1) * num_samples):
                    samples.write(f"{row:09d}", {"jpg": next(source), "txt": b"a thing"})
            commit.commit(f"{name}.tar")
        jobs.append(ShardJob(name, "f"))
    return jobs


def rate(work: Callable[[], Any], num: int, rounds: int = 3) -> float:
    """Items a second of the median round, after one that does not count."""

    def seconds() -> float:
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds()
    return num / median(seconds() for _ in range(rounds))


def bare_rates(encoder: EncoderConfig, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Images a second of batches that lie on the device, and how far features are from float32's."""
    size = GEOMETRIES[args.geometry]["image_size"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.batch_size, size, size, 3), dtype=torch.uint8, generator=generator)
    images, found, exact = images.to(device), {}, None
    for dtype in (torch.float32, torch.bfloat16):
        model, name = encoder.load(dtype=dtype).to(device), str(dtype).removeprefix("torch.")
        compilation = Compilation("the encoder", "", dynamic=False)
        for compiled in (False, True):
            encode = compilation(model.encode_images) if compiled else model.encode_images

            def loop(encode: Callable[..., Encoding] = encode) -> None:
                for _ in range(args.batches):
                    encode(images)

            key = f"{name}{'_compiled' if compiled else ''}"
            found[f"bare_{key}"] = rate(loop, args.batches * args.batch_size)
            features = encode(images).features.float()
            exact = features if exact is None else exact
            found[f"distance_{key}"] = {
                "cosine": torch.cosine_similarity(features, exact, dim=-1).mean().item(),
                "mean_absolute": (features - exact).abs().mean().item(),
            }
        found[f"compile_failure_{name}"] = compilation.failure
    return found


class Nothing(PixelEncoder):
    """Features of an encoder's shape that cost nothing."""

    def __init__(self, like: PixelEncoder):
        torch.nn.Module.__init__(self)
        self.image_size, self.grid, self.feature_dim = like.image_size, like.grid, like.feature_dim
        self.weight = torch.nn.Parameter(next(like.parameters()).new_zeros(1))

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> Encoding:
        shape = len(images), self.num_tokens
        scale = TokenScale(images.new_zeros(shape).float(), images.new_ones(shape).float())
        return Encoding(self.weight.new_zeros(*shape, self.feature_dim), scale)


def worker_rate(worker: ImageFeaturesWorker, jobs: list[ShardJob], num: int) -> dict[str, float]:
    """Images a second from tars to committed tars, and the cores that it used."""
    in_flight = shards_in_flight(ImageFeaturesWorker, worker.config.actors)
    with ThreadPoolExecutor(in_flight) as threads:
        list(threads.map(worker, jobs[:in_flight]))  # kernels are compiled and chosen
        started, cpu = time.perf_counter(), time.process_time()
        list(threads.map(worker, jobs))
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"images_per_sec": num / seconds, "cores": cpu / seconds, "shards_in_flight": in_flight}


def decode_rates(images: list[bytes], num_threads: int) -> dict[str, float]:
    """JPEGs decoded a second, by one thread through Pillow alone and as the stages do, and by many."""
    found = {
        "pillow": rate(lambda: [np.asarray(read_image(one)) for one in images], len(images)),
        "as_stages_do": rate(lambda: [read_pixels(one) for one in images], len(images)),
    }
    with ThreadPoolExecutor(num_threads) as threads:
        many = images * num_threads
        found["in_threads"] = rate(lambda: list(threads.map(read_pixels, many, chunksize=8)), len(many))
    return {**found, "num_threads": num_threads}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), default="published")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=10, help="of a round of the bare loop")
    parser.add_argument("--shards", type=int, default=32)
    parser.add_argument("--samples", type=int, default=256, help="of a shard")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1, help="of the worker")
    return parser.parse_args()


def main() -> None:
    args, is_gpu = parse(), torch.cuda.is_available()
    device = torch.device("cuda" if is_gpu else "cpu")
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        torch.manual_seed(0)
        CLIPVisionModel(CLIPVisionConfig(**GEOMETRIES[args.geometry])).save_pretrained(root / "tower")
        encoder = EncoderConfig(path=root / "tower")
        found = bare_rates(encoder, args, device)
        images = jpegs(GEOMETRIES[args.geometry]["image_size"])
        found["decode"] = decode_rates(images, args.cpus)
        source = Folder.at(root / "images")
        jobs = write_shards(source, images, args.shards, args.samples)
        actors = ActorsConfig(num_actors=1, num_cpus=args.cpus, num_gpus=int(is_gpu))
        config = ImageFeaturesConfig(batch_size=args.batch_size, actors=actors)
        worker = ImageFeaturesWorker(Folder.at(root / "image_features"), source, config, encoder)
        num = args.shards * args.samples
        found["stage"] = worker_rate(worker, jobs, num)
        worker.encoder = Nothing(worker.encoder)
        worker.batches.encode = worker.encoder.encode_images
        found["host"] = worker_rate(worker, jobs, num)
    best = found["bare_bfloat16_compiled" if is_gpu else "bare_float32"]
    name = torch.cuda.get_device_name() if is_gpu else "cpu"
    ratios = {"stage_to_bare": found["stage"]["images_per_sec"] / best}
    said = {"mode": "encoding", "geometry": args.geometry, "device": name, "torch": torch.__version__}
    print(json.dumps({**said, "batch": args.batch_size, **found, **ratios}))


if __name__ == "__main__":
    main()
