"""Everything that is measured on one GPU, in parts: `make bench-gpu`, again until it says that all is done.

Each part is a program of this folder in a process of its own, whose last line is JSON; what is done on the
same device, at the same commit, is not done again. No network, no Ray: torch, transformers, deepspeed and
what `repfusion` itself imports. Without a GPU it rehearses at a small size, which says that it runs and
nothing of speed.

    python benchmarks/gpu.py [--geometry small] [--minutes 9] [--parts train_compiled sample_8] [--out FOLDER]
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
LIBRARIES = ("torch", "transformers", "triton", "deepspeed", "numpy", "pillow", "opencv-python-headless")
TRAIN = ("full_size.py", "train", "--steps", "6", "--micro-batch")
SAMPLE = ("full_size.py", "sample", "--warmup", "2", "--steps", "3", "--micro-batch")
FAST = ("--compile", "--graphs")
PARTS: dict[str, tuple[str, ...]] = {
    "encoding": ("encoding.py",),
    "train_eager": (*TRAIN, "16"),
    "train_compiled": (*TRAIN, "16", "--compile"),
    "train_compiled_32": (*TRAIN, "32", "--compile", "--profile", "{out}/train_compiled_32.md"),
    "train_apart": (*TRAIN, "16", "--compile", "--reads-prompts-apart"),
    "train_selective": (*TRAIN, "32", "--compile", "--activation-checkpointing", "selective"),
    "train_full": (*TRAIN, "64", "--compile", "--activation-checkpointing", "full"),
    "train_zero_3": (*TRAIN, "16", "--compile", "--zero-stage", "3"),
    "sample_8_plain": (*SAMPLE, "8"),
    "sample_8_compiled": (*SAMPLE, "8", "--compile"),
    "sample_8": (*SAMPLE, "8", *FAST, "--profile", "{out}/sample_8.md"),
    "sample_1": (*SAMPLE, "1", *FAST),
    "sample_32": (*SAMPLE, "32", *FAST),
    "prefix_cache": ("prefix_cache.py", "--text-tokens", "32", "--batch", "8", "--num-steps", "30"),
}
"""Programs and their arguments. `prefix_cache` has a loop that reads prompts at every step, as a plain
sampler of such a model does."""
SMALL: dict[str, tuple[str, ...]] = {
    "encoding.py": (
        "--batch-size",
        "16",
        "--batches",
        "2",
        "--shards",
        "2",
        "--samples",
        "40",
        "--cpus",
        "1",
    ),
    "full_size.py": ("--micro-batch", "2", "--warmup", "1", "--steps", "2"),
    "prefix_cache.py": ("--geometry", "medium", "--batch", "1", "--num-steps", "2", "--repeats", "1"),
}
"""Arguments that take the place of others in a rehearsal."""
RATIOS = (
    ("stage / bare encoder", "encoding", "stage_to_bare", 0.9),
    ("training, MFU", "train_compiled_32", "mfu", 0.6),
    ("training, selective, MFU", "train_selective", "mfu", None),
    ("training, checkpointed, MFU", "train_full", "mfu", 0.48),
    ("sampling, batch 1, of the matrix rate", "sample_1", "of_matrix_rate", 0.5),
    ("sampling, batch 8, of the matrix rate", "sample_8", "of_matrix_rate", 0.75),
    ("sampling, batch 32, of the matrix rate", "sample_32", "of_matrix_rate", 0.8),
)
"""What the table says: a part's figure and its goal on an H100 or H200."""


def command_of(part: str, geometry: str, out: Path) -> list[str]:
    """A part's program with its arguments."""
    program, *arguments = (one.format(out=out) for one in PARTS[part])
    if geometry == "small":
        chosen = ("--geometry", "small") if program != "prefix_cache.py" else ()
        arguments += [*chosen, *SMALL[program]]
    elif program == "prefix_cache.py":
        arguments += ["--geometry", "published"]
    return [sys.executable, str(HERE / program), *arguments]


def machine() -> dict[str, Any]:
    """Device, versions, commit: parts that differ in one of them are not put beside each other."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    # a copy of the working tree has no history
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": name, "versions": versions, "commit": told.stdout.strip() or None}


def run_part(part: str, geometry: str, out: Path, limit_sec: float) -> dict[str, Any]:
    """What a part says; `error` where it failed, its own words."""
    started = time.perf_counter()
    command = command_of(part, geometry, out)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_sec, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {limit_sec:.0f} s"}
    seconds = round(time.perf_counter() - started, 1)
    if done.returncode:
        return {"error": done.stderr.strip()[-2000:], "seconds": seconds}
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": seconds}


def table(parts: dict[str, dict[str, Any]]) -> str:
    """The ratios with their goals, as markdown."""
    lines = ["| what | measured | goal |", "|---|---|---|"]
    for what, part, field, goal in RATIOS:
        value = parts.get(part, {}).get(field)
        shown = "failed" if "error" in parts.get(part, {}) else "-" if value is None else f"{value:.3f}"
        lines.append(f"| {what} | {shown} | {'' if goal is None else f'{goal:g}'} |")
    plain, fast = (parts.get(one, {}).get("batch_sec") for one in ("sample_8_plain", "sample_8"))
    ratio = f"{plain / fast:.2f}" if plain and fast else "-"
    return "\n".join([*lines, f"| sampling, batch 8, eager over fast | {ratio} | 2 |"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = "published" if torch.cuda.is_available() else "small"
    parser.add_argument("--geometry", choices=("published", "small"), default=default)
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no further part is begun")
    parser.add_argument("--part-minutes", type=float, default=9.0, help="that a part may take")
    parser.add_argument("--parts", nargs="*", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/bench_gpu"))
    parser.add_argument("--again", action="store_true", help="do what failed once more")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "bench.json"
    here = {**machine(), "geometry": args.geometry}
    kept = json.loads(path.read_text()) if path.exists() else {}
    parts = kept.pop("parts", {}) if all(kept.get(name) == value for name, value in here.items()) else {}
    ends = time.monotonic() + 60 * args.minutes
    for part in args.parts:
        if part in parts and not (args.again and "error" in parts[part]):
            continue
        left = ends - time.monotonic()
        if left <= 0:
            break
        print(f"{part} ...", flush=True)
        limit_sec = 60 * args.part_minutes
        found = run_part(part, args.geometry, args.out, min(left, limit_sec))
        if left < limit_sec and found.get("error", "").startswith("took longer"):
            print(f"{part}: cut off, begins anew in the next call")
            break
        parts[part] = found
        path.write_text(json.dumps({**here, "parts": parts}, indent=1))
        print(f"{part}: {found.get('error', 'done')}", flush=True)
    left_over = [part for part in args.parts if part not in parts]
    print(table(parts))
    print(f"{path}; " + (f"left: {', '.join(left_over)}; call again" if left_over else "all parts are done"))
    if any("error" in parts[part] for part in args.parts if part in parts):
        sys.exit(1)


if __name__ == "__main__":
    main()
