"""The ingest stage against img2dataset alone on the same list, in one run: images/s and their ratio.

Both download the same JPEGs from a server process on loopback, resize and encode them alike and write tars,
with the same number of processes and of downloads at a time in each. Starting processes and importing is left
out of both: ours runs on warm actors, img2dataset counts from the start of its first shard to the end of its
last. Ours also checks addresses, limits, headers and end marks, writes in the order of keys and hashes;
img2dataset's own hashing and EXIF are switched off.

    python benchmarks/ingest.py [--num-images 4000] [--processes 2] [--threads 16] [--rounds 3]
"""

import argparse
import asyncio
import io
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.runtime.pool import ActorPool, ActorsConfig, ShardJob, run_shards
from pipelines.runtime.session import RayConfig, ray_session
from pipelines.shards.storage import Folder
from pipelines.shards.store import sample_key, shard_name
from pipelines.sources.ingest import IngestConfig, IngestWorker

PICTURES = 200
"""Different ones that the server has; the list repeats them."""


def draw_pictures(width: int, height: int) -> list[bytes]:
    """JPEGs of smooth colours with some noise, of about a photograph's size in bytes."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        noisy = (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noisy).save(stream, "JPEG", quality=90)
        pictures.append(stream.getvalue())
    return pictures


def serve(pictures: list[bytes], ports: Any) -> None:
    """Answers `/NUMBER.jpg` until it is terminated; puts its port into the queue."""
    heads = [
        f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n" for data in pictures
    ]
    answers = [head.encode() + data for head, data in zip(heads, pictures, strict=True)]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        asked = re.match(rb"GET /(\d+)\.jpg", request)
        assert asked is not None
        writer.write(answers[int(asked[1]) % PICTURES])
        await writer.drain()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=512)
        ports.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


IMG2DATASET = """
import json, sys
from img2dataset import download
download(**json.loads(sys.argv[1]))
"""


def img2dataset_seconds(urls: Path, output: Path, config: IngestConfig, args: argparse.Namespace) -> float:
    """Seconds that img2dataset's own main entry takes, in processes of its own."""
    settings = {
        "url_list": str(urls),
        "input_format": "parquet",
        "caption_col": "caption",
        "output_folder": str(output),
        "output_format": "webdataset",
        "processes_count": args.processes,
        "thread_count": args.threads,
        "number_sample_per_shard": args.shard_size,
        "image_size": config.image_size,
        "resize_mode": config.resize,
        "encode_format": config.encode,
        "encode_quality": config.quality,
        "timeout": config.timeout_sec,
        "user_agent_token": "img2dataset",
        "extract_exif": False,
        "compute_hash": None,
    }
    command = [sys.executable, "-c", IMG2DATASET, json.dumps(settings)]
    subprocess.run(command, check=True, capture_output=True)
    stats = [json.loads(path.read_text()) for path in output.glob("*_stats.json")]
    assert sum(one["successes"] for one in stats) == args.num_images
    return max(one["end_time"] for one in stats) - min(one["start_time"] for one in stats)


def our_seconds(
    pool: ActorPool, jobs: list[ShardJob], arguments: dict[str, Any], args: argparse.Namespace
) -> float:
    actors = ActorsConfig(num_actors=args.processes)
    start = time.perf_counter()
    done = run_shards(pool, "ingest", IngestWorker, arguments, jobs, actors)
    seconds = time.perf_counter() - start
    assert sum(sidecar.samples for sidecar in done.values()) == args.num_images
    return seconds


def write_lists(folder: Path, address: str, args: argparse.Namespace) -> list[ShardJob]:
    """The whole list as img2dataset reads it, and its shards as our source stage leaves them."""
    numbers = range(args.num_images)
    listed = pa.table(
        {
            "key": [sample_key(number) for number in numbers],
            "url": [f"{address}{number}.jpg" for number in numbers],
            "caption": [f"picture {number}" for number in numbers],
        }
    )
    pq.write_table(listed, folder / "list.parquet")
    (folder / "source").mkdir()
    jobs = []
    for index, start in enumerate(range(0, args.num_images, args.shard_size)):
        pq.write_table(
            listed.slice(start, args.shard_size), folder / "source" / f"{shard_name(index)}.parquet"
        )
        jobs.append(ShardJob(shard_name(index), "f"))
    return jobs


def measure(scratch: Path, address: str, args: argparse.Namespace) -> dict[str, Any]:
    config = IngestConfig(
        image_size=256,
        encode="jpg",
        quality=95,
        num_threads=args.threads // IngestWorker.concurrency,
        retries=0,
        allow_private_addresses=True,
    )
    jobs = write_lists(scratch, address, args)
    ours, theirs = [], []
    with ray_session(RayConfig(num_cpus=args.processes)):
        pool = ActorPool()
        for round_index in range(args.rounds + 1):
            # the two take turns, so that a machine that grows slower or faster does not favour either
            folder = Folder.at(scratch / f"ours{round_index}")
            arguments = {"folder": folder, "source": Folder.at(scratch / "source"), "config": config}
            ours.append(our_seconds(pool, jobs, arguments, args))
            alone = scratch / f"alone{round_index}"
            theirs.append(img2dataset_seconds(scratch / "list.parquet", alone, config, args))
        pool.close()
    # the first round warms up
    ratios = [their / our for our, their in zip(ours[1:], theirs[1:], strict=True)]
    return {
        "images": args.num_images,
        "processes": args.processes,
        "threads": args.threads,
        "img2dataset_images_per_sec": round(args.num_images / statistics.median(theirs[1:]), 1),
        "ingest_images_per_sec": round(args.num_images / statistics.median(ours[1:]), 1),
        "img2dataset_seconds": [round(seconds, 2) for seconds in theirs[1:]],
        "ingest_seconds": [round(seconds, 2) for seconds in ours[1:]],
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "target": 0.95,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=4000)
    parser.add_argument("--shard-size", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=16, help="downloads at a time in each process")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ports: Any = context.Queue()
    server = context.Process(target=serve, args=(draw_pictures(320, 256), ports), daemon=True)
    server.start()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(measure(Path(scratch), f"http://127.0.0.1:{ports.get()}/", args)))
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
