"""`overlap: true` against stage by stage, on a source whose downloads take as long as encoding: wall time of
the data stages, and their ratio; both make the same bytes, which is checked.

Pictures are served on loopback, one at a time and each after a wait, so that downloading takes no processor:
the wait is chosen such that a stage of downloads lasts as long as encoding does by itself. Both run in one
Ray session on warm actors.

    python benchmarks/overlap.py [--num-shards 16] [--shard-size 64] [--rounds 3]
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ingest import draw_pictures

from pipelines.build import build_stages
from pipelines.config import WorkflowConfig
from pipelines.runtime.pool import ActorPool
from pipelines.runtime.session import RayConfig, ray_session
from pipelines.workflow.run import StageResult, run
from repfusion.config import validate

RAY = RayConfig(num_cpus=4)
"""Logical ones: a stage that waits for downloads uses none."""


class Waiting(BaseHTTPRequestHandler):
    """Answers with a picture after a wait, to one client at a time."""

    pictures: list[bytes]
    wait_sec = 0.0
    turn = threading.Lock()

    def do_GET(self) -> None:
        with self.turn:
            time.sleep(self.wait_sec)
        data = self.pictures[int(self.path.strip("/").partition(".")[0]) % len(self.pictures)]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def configure(root: Path, urls: Path, shard_size: int, overlap: bool) -> WorkflowConfig:
    one = {"actors": {"num_actors": 1}}
    values: dict[str, Any] = {
        "root": root,
        "overlap": overlap,
        "last_stage": "image_features",
        "source": {"kind": "urls", "path": str(urls), "shard_size": shard_size},
        "ingest": {"image_size": 64, "allow_private_addresses": True, **one},
        "curate": {"duplicates": "keep", **one},
        "columns": {"image_features": one},
    }
    return validate(WorkflowConfig, values)


def timed(config: WorkflowConfig, pool: ActorPool) -> tuple[float, list[StageResult]]:
    before = time.perf_counter()
    results = run(build_stages(config), config.root, RAY, lambda text: None, pool, overlap=config.overlap)
    return time.perf_counter() - before, results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-shards", type=int, default=16)
    parser.add_argument("--shard-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    number = args.num_shards * args.shard_size
    Waiting.pictures = draw_pictures(96, 96)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Waiting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as scratch, ray_session(RAY):
        urls, pool = Path(scratch) / "urls.parquet", ActorPool()
        address = f"http://127.0.0.1:{server.server_port}"
        table = {
            "url": [f"{address}/{index}.jpg" for index in range(number)],
            "caption": [f"picture {index}" for index in range(number)],
        }
        pq.write_table(pa.table(table), urls)

        def once(name: str, overlap: bool) -> tuple[float, list[StageResult]]:
            return timed(configure(Path(scratch) / name, urls, args.shard_size, overlap), pool)

        _, results = once("warm", False)
        encode_sec = results[-1].manifest.seconds
        Waiting.wait_sec = encode_sec / number
        rounds = []
        for index in range(args.rounds):
            plain_sec, plain = once(f"plain{index}", False)
            flow_sec, flowing = once(f"flow{index}", True)
            digests = [[one.manifest.shards_digest for one in made] for made in (plain, flowing)]
            assert digests[0] == digests[1], "the bytes differ"
            stages = {one.name: one.manifest.seconds for one in plain}
            rounds.append(
                {
                    "stage_by_stage_sec": plain_sec,
                    "overlap_sec": flow_sec,
                    "of": flow_sec / plain_sec,
                    **stages,
                }
            )
        pool.close()
    server.shutdown()
    ratio = statistics.median(one["of"] for one in rounds)
    rounded = [{name: round(value, 3) for name, value in one.items()} for one in rounds]
    print(json.dumps({"num_samples": number, "ratio": round(ratio, 3), "asked": 0.6, "rounds": rounded}))


if __name__ == "__main__":
    main()
