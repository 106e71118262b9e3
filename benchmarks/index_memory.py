"""What a data set of many shards takes of each rank before a sample is read: bytes a sample, descriptors, and
how long opening it takes: `python benchmarks/index_memory.py`.

Shards are links to a few tars, so that the data set takes no room; the index knows nothing of that.
"""

import argparse
import io
import json
import os
import resource
import sys
import tarfile
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from repfusion.data.config import DataConfig
from repfusion.data.mixture import Mixture
from repfusion.data.readers import IMAGE_FEATURES, SampleArray

LINKS = 10_000
"""Names of one file; file systems bound them."""
READS = 2000


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_shards(root: Path, num_shards: int, samples: int) -> None:
    """`curate` and `image_features` of `num_shards` shards, each of as many samples."""
    stream = io.BytesIO()
    np.save(stream, np.zeros((1, 8), np.float16))
    keys = [f"{i:09d}" for i in range(samples)]
    texts = {f"{key}.{end}": data for key in keys for end, data in (("json", b"{}"), ("txt", b"a circle"))}
    arrays = {f"{key}.{IMAGE_FEATURES}.npy": stream.getvalue() for key in keys}
    for name, members in (("curate", texts), (IMAGE_FEATURES, arrays)):
        folder = root / name
        folder.mkdir()
        for i in range(num_shards):
            path = folder / f"{i:06d}.tar"
            if i % LINKS == 0:
                write_tar(path, members)
                source = path
            else:
                os.link(source, path)


def open_data_set(root: Path, result: Connection) -> None:
    """Opens the data set and reads some samples at random, in a process of its own."""
    columns = {IMAGE_FEATURES: root / IMAGE_FEATURES}
    config = DataConfig(images=root / "curate", columns=columns, cache_bytes=0)
    before, started = resident(), time.perf_counter()
    mixture = Mixture.open(config, {IMAGE_FEATURES: SampleArray()})
    opened, took = resident(), time.perf_counter() - started
    dataset = mixture.datasets["main"]
    rng, reading = np.random.default_rng(0), time.perf_counter()
    for index in rng.integers(0, len(dataset), READS).tolist():
        dataset[index].read(IMAGE_FEATURES)
    result.send(
        {
            "samples": len(dataset),
            "bytes_per_sample": round((opened - before) / len(dataset), 1),
            "open_sec": round(took, 1),
            "read_ms_per_sample": round(1e3 * (time.perf_counter() - reading) / READS, 3),
            "descriptors": len(os.listdir("/proc/self/fd")),
        }
    )


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-shards", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=100, help="of a shard")
    parser.add_argument("--open-files", type=int, help="limit of open files; as it is unless given")
    args = parser.parse_args()
    if args.open_files is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (args.open_files, hard))
    with tempfile.TemporaryDirectory() as scratch:
        write_shards(Path(scratch), args.num_shards, args.samples)
        receiver, sender = get_context("spawn").Pipe(duplex=False)
        process = get_context("spawn").Process(target=open_data_set, args=(Path(scratch), sender))
        process.start()
        sender.close()
        try:
            found = receiver.recv()
        except EOFError:
            sys.exit("the data set could not be opened")
        process.join()
    print(json.dumps({"num_shards": args.num_shards, **found}))


if __name__ == "__main__":
    main()
