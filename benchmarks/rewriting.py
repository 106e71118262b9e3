"""Rewriting prompts: a batch at once against one at a time, and the stage's worker against the bare batched
loop, in one process and one run; `python benchmarks/rewriting.py`.

The shipped LLaVA, the embedded world's terse prompts, greedy decoding with keys and values kept. The worker
reads tars, decodes, mends, writes, hashes and commits; it is called here without Ray, whose actor adds what
`benchmarks/image_features.py` measures. Ways take turns; ratios are of CPU seconds, which other work on the
machine disturbs least, and of wall time beside them. The last line is JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from pipelines.runtime.pool import ShardJob
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, shard_name
from pipelines.shards.tars import tar_shard
from pipelines.stages.rewrites import RewritesConfig, RewritesWorker
from repfusion.llm.base import LanguageModel
from repfusion.llm.chats.batch import tokenise_chats
from repfusion.llm.chats.format import Chat
from repfusion.llm.chats.rewriting import rewrite
from repfusion.scenes.rewriting import caption_in
from repfusion.scenes.world import WorldConfig, draw_scene
from repfusion.weights import WEIGHTS

SYSTEM = "rewrite"


def terse_prompts(number: int) -> list[str]:
    """Distinct prompts, short ones first, as the stage orders them."""
    found: dict[str, None] = {}
    seed = 0
    while len(found) < number:
        scene = draw_scene(seed, WorldConfig())
        found[caption_in(scene, np.random.default_rng(seed), "terse")] = None
        seed += 1
    return sorted(found, key=lambda prompt: (len(prompt), prompt))


def write_prompts(folder: Folder, prompts: Sequence[str]) -> ShardJob:
    """A shard as `curate` leaves it, but for its images."""
    name = shard_name(0)
    with ShardCommit(folder, name, "f", {}) as commit:
        with tar_shard(commit) as samples:
            for row, prompt in enumerate(prompts):
                samples.write(f"{row:09d}", {"txt": prompt.encode()})
        commit.commit(f"{name}.tar")
    return ShardJob(name, "f")


def bare_loop(llm: LanguageModel, prompts: Sequence[str], batch_size: int, most: int) -> None:
    """Rewrites prompts that lie in memory."""
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        rewrite(llm, tokenise_chats(llm, [Chat(prompt, system=SYSTEM) for prompt in part]), part, most)


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - start_cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mllm", type=Path, default=WEIGHTS / "llava")
    parser.add_argument("--num-prompts", type=int, default=512)
    parser.add_argument("--alone", type=int, default=64, help="prompts that are rewritten one at a time")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians are taken")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompts, most = terse_prompts(args.num_prompts), args.max_new_tokens
    alone = prompts[:: max(1, len(prompts) // args.alone)]
    seconds: dict[str, list[tuple[float, float]]] = {"batched": [], "alone": [], "stage": []}
    with tempfile.TemporaryDirectory() as scratch:
        root = Folder.at(scratch)
        job = write_prompts(root / "curate", prompts)
        config = RewritesConfig(batch_size=args.batch_size, system=SYSTEM, max_new_tokens=most)
        worker = RewritesWorker(
            root / "rewrites", root / "curate", config, mllm=args.mllm, mllm_dtype="float32"
        )
        ways: dict[str, Callable[[], object]] = {
            "batched": lambda: bare_loop(worker.mllm, prompts, args.batch_size, most),
            "alone": lambda: bare_loop(worker.mllm, alone, 1, most),
            "stage": lambda: worker(job),
        }
        for number in range(args.rounds + 1):
            for name, way in ways.items():
                found = seconds_of(way)
                if number:  # the first warms up
                    seconds[name].append(found)
    counts = {"batched": len(prompts), "alone": len(alone), "stage": len(prompts)}
    wall, cpu = (
        {name: counts[name] / median(one[clock] for one in found) for name, found in seconds.items()}
        for clock in (0, 1)
    )
    said = {
        "batch_size": args.batch_size,
        **{f"{name}_prompts_per_cpu_sec": round(rate, 1) for name, rate in cpu.items()},
        "batched_to_alone": round(cpu["batched"] / cpu["alone"], 2),
        "stage_to_batched": round(cpu["stage"] / cpu["batched"], 3),
        "batched_to_alone_wall": round(wall["batched"] / wall["alone"], 2),
        "stage_to_batched_wall": round(wall["stage"] / wall["batched"], 3),
        "targets": {"batched_to_alone": 5, "stage_to_batched": 0.9},
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
