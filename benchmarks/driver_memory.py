"""Peak memory of the driver against the number of samples, at the same number of shards, in MiB.

Runs the data stages up to curate, duplicates included, on scenes, once for each number of samples.

    python benchmarks/driver_memory.py [--num-samples 2000 20000] [--num-shards 8]
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEMO = Path(__file__).parents[1] / "pipelines" / "configs" / "demo.yaml"
PEAK = re.compile(r"VmHWM:\s+(\d+) kB")


def peak_mib(process: subprocess.Popen[bytes]) -> float:
    """Peak memory of this process alone: a parent's `ru_maxrss` counts its children too."""
    status = Path(f"/proc/{process.pid}/status")
    peak = 0
    while process.poll() is None:
        if found := PEAK.search(status.read_text()):
            peak = max(peak, int(found[1]))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the run failed with exit status {process.returncode}")
    return peak / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-samples", type=int, nargs="+", default=[2000, 20000])
    parser.add_argument("--num-shards", type=int, default=8)
    args = parser.parse_args()
    peaks = {}
    for number in args.num_samples:
        with tempfile.TemporaryDirectory() as scratch:
            values = {
                "root": Path(scratch) / "run",
                "last_stage": "curate",
                "source.shard_size": -(-number // args.num_shards),
                "source.num_samples": number,
            }
            overrides = [f"{key}={value}" for key, value in values.items()]
            command = [sys.executable, "-m", "pipelines", "run", str(DEMO), *overrides]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
                peaks[number] = round(peak_mib(process), 1)
    print(json.dumps({"num_shards": args.num_shards, "driver_peak_mib": peaks}))


if __name__ == "__main__":
    main()
