"""Memory and time of `find_duplicates` over synthetic verdicts: 5% exact duplicates, 5% with 1 to 4 bits
changed, the rest random. Each size runs in a process of its own; memory is its peak beyond what the imports
took.

    python benchmarks/duplicates.py [--millions 1 4] [--duplicates exact near] [--bits 4] [--shard-size 10000]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipelines.duplicates.find import DIGEST_BYTES, DUPLICATES, find_duplicates
from pipelines.shards.manifest import ShardTable
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, Sidecar
from pipelines.stages.curate import CurateConfig


def write_verdicts(folder: Folder, num_samples: int, shard_size: int) -> ShardTable:
    """Shards as `judge` leaves them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    digests = rng.integers(0, 256, (num_samples, DIGEST_BYTES), dtype=np.uint8)
    hashes = rng.integers(0, 2**64, num_samples, dtype=np.uint64)
    changed = rng.choice(num_samples, num_samples // 10, replace=False)
    sources = rng.integers(0, num_samples, len(changed))
    hashes[changed] = hashes[sources]
    exact, near = np.array_split(np.arange(len(changed)), 2)
    digests[changed[exact]] = digests[sources[exact]]
    for _ in range(4):
        hashes[changed[near]] ^= np.uint64(1) << rng.integers(0, 64, len(near), dtype=np.uint64)
    sidecars: list[Sidecar] = []
    for index, start in enumerate(range(0, num_samples, shard_size)):
        stop, name = min(start + shard_size, num_samples), f"{index:05d}"
        columns = {
            "key": pa.array([f"{i:09d}" for i in range(start, stop)]),
            "reason": pa.nulls(stop - start, pa.string()),
            "detail": pa.array([""] * (stop - start)),
            "digest": pa.array([row.tobytes() for row in digests[start:stop]], pa.binary(DIGEST_BYTES)),
            "hash": pa.array(hashes[start:stop]),
        }
        with ShardCommit(folder, name, "f", {}) as commit:
            commit.samples = stop - start
            pq.write_table(pa.table(columns), commit.staging / f"{name}.parquet")
            sidecars.append(commit.commit(f"{name}.parquet"))
    return ShardTable.of(sidecars)


def peak_mib() -> float:
    """Largest resident set of this process so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure(folder: Path, config: CurateConfig) -> None:
    """Prints what a run over the shards of a folder takes, as JSON."""
    import pyarrow.parquet as pq

    shards = ShardTable.read(Folder.at(folder))
    before = peak_mib()
    start = time.perf_counter()
    find_duplicates(Folder.at(folder), shards, config.duplicates, config.near_duplicate_bits)
    seconds, mib = time.perf_counter() - start, peak_mib() - before
    found = pq.read_table(folder / DUPLICATES)["reason"].value_counts().to_pylist()
    result = {
        "duplicates": config.duplicates,
        "samples": shards.samples,
        "seconds": round(seconds, 2),
        "mib": round(mib, 1),
        "mb_per_million": round(mib * 1.048576 / (shards.samples / 1e6), 1),
        "found": {row["values"]: row["counts"] for row in found},
    }
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 4])
    parser.add_argument("--duplicates", nargs="+", default=["exact", "near"], choices=["exact", "near"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--shard-size", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is not None:
        measure(args.folder, CurateConfig(duplicates=args.duplicates[0], near_duplicate_bits=args.bits))
        return
    for millions in args.millions:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Folder.at(scratch)
            write_verdicts(folder, int(millions * 1e6), args.shard_size).write(folder)
            for duplicates in args.duplicates:
                command = [sys.executable, __file__, "--folder", scratch, "--bits", str(args.bits)]
                subprocess.run([*command, "--duplicates", duplicates], check=True)


if __name__ == "__main__":
    main()
