"""Training and sampling at the published scale: random weights, no file read, on the GPU at hand.

`python benchmarks/full_size.py train --micro-batch auto --compile --profile profile.md`, then `... sample`.
The language model (7B, frozen) is held in bfloat16, the trained parts (1.3B) in float32; 576 tokens of width
1024. Training is the project's own: Engine, EMA, inputs made ahead, captions of about 32 tokens, every tenth
dropped. FLOPs are those of `repfusion.flops`: padding, and activations that are computed again, count for
nothing. The last line is JSON. `--geometry small` runs anywhere, a CPU included.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from kernel_shares import kernel_shares
from random_model import CONDITION_DROPOUT, captions, fill, make_batches, small

from repfusion.devices.compiling import Compilation
from repfusion.diffusion.flow import initial_noise
from repfusion.diffusion.sampler import SamplerConfig, sample
from repfusion.flops import peak_flops, sample_flops, train_flops
from repfusion.inputs import to_device
from repfusion.model.meta import published
from repfusion.model.text_to_image import TextToImage
from repfusion.request import Request
from repfusion.training.distributed import shut_down
from repfusion.training.ema import EMA
from repfusion.training.engine import Engine, EngineConfig
from repfusion.training.meters import memory_bytes

OUT_OF_MEMORY = 3
"""Exit status of a probe that does not fit."""


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any]) -> float:
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def matrix_rate(device: torch.device, rounds: int = 5) -> float:
    """FLOP/s of a large square bfloat16 product of random matrices, the best of several rounds."""
    side, repeats = (8192, 20) if device.type == "cuda" else (512, 2)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def work() -> None:
        for _ in range(repeats):
            a @ b

    work()
    return 2 * side**3 * repeats / min(seconds_of(work) for _ in range(rounds))


def rates(flops: float, seconds: float, matrix: float, device: torch.device) -> dict[str, Any]:
    peak = peak_flops(device)
    return {
        "tflops": flops / seconds / 1e12,
        "matrix_tflops": matrix / 1e12,
        "of_matrix_rate": flops / seconds / matrix,
        "peak_tflops": peak and peak / 1e12,
        "mfu": peak and flops / seconds / peak,
        "memory_gib": memory_bytes(device) / 2**30,
        "of_memory_gib": torch.cuda.mem_get_info()[1] / 2**30 if device.type == "cuda" else None,
    }


def compiled(args: argparse.Namespace, compile_blocks: Callable[[Compilation], None]) -> Compilation | None:
    """Compiles where that is asked for; a failure is in the result."""
    if not args.compile:
        return None
    made = Compilation("the model's layers", "")
    compile_blocks(made)
    return made


def graphs_of(compilation: Compilation | None, settled: int) -> dict[str, Any]:
    """What was compiled, of it since the warm-up, and why not all."""
    if compilation is None:
        return {"num_graphs": 0, "recompilations": 0, "compile_failure": None}
    found = compilation.num_graphs
    return {"num_graphs": found, "recompilations": found - settled, "compile_failure": compilation.failure}


def train_step(
    args: argparse.Namespace, model: TextToImage, micro_batch: int
) -> tuple[Callable[[], None], Compilation | None]:
    """One step of the project's loop: inputs, micro-batches, update, average; and what is compiled."""
    if args.activation_checkpointing != "none":
        model.checkpoint_activations(args.activation_checkpointing)
    model.conditioner.llm.reads_apart = args.reads_prompts_apart
    compilation = compiled(args, model.compile_blocks)
    global_batch = micro_batch * args.grad_accum_steps
    config = EngineConfig(
        micro_batch_size=micro_batch, zero_stage=args.zero_stage, num_threads=torch.get_num_threads()
    )
    stream, steps = make_batches(model, micro_batch, args.text_tokens), count()
    layers = () if compilation is None else model.layers()
    engine = Engine(model, config, global_batch, 10**6, model.frozen_parts(), layers)
    ema = EMA(engine.partition.masters, decay=0.999)

    def step() -> None:
        for _ in range(engine.grad_accum_steps):
            batch = next(stream)
            engine.accumulate(batch.keys, inputs=to_device(batch.inputs, engine.device))
        number = next(steps)
        engine.update(number)
        ema.update(number)

    return step, compilation


def train(args: argparse.Namespace, model: TextToImage, micro_batch: int) -> dict[str, Any]:
    device = model.device
    num_tokens = (1 - CONDITION_DROPOUT) * args.text_tokens + CONDITION_DROPOUT
    flops = train_flops(model, num_tokens)
    matrix = matrix_rate(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step, compilation = train_step(args, model, micro_batch)
    for _ in range(args.warmup):
        step()
    settled = 0 if compilation is None else compilation.num_graphs
    seconds = median(seconds_of(step) for _ in range(args.steps))
    samples = micro_batch * args.grad_accum_steps
    result = {
        "micro_batch": micro_batch,
        "grad_accum_steps": args.grad_accum_steps,
        "zero_stage": args.zero_stage,
        "activation_checkpointing": args.activation_checkpointing,
        "reads_prompts_apart": args.reads_prompts_apart,
        **graphs_of(compilation, settled),
        "step_sec": seconds,
        "samples_per_sec": samples / seconds,
        "flops_per_sample": flops,
        **rates(samples * flops, seconds, matrix, device),
    }
    return result | shares(args, step)


def draw_images(args: argparse.Namespace, model: TextToImage, micro_batch: int) -> dict[str, Any]:
    device, config = model.device, SamplerConfig(num_steps=args.num_steps)
    language_model = model.conditioner.llm.language_model
    rng = np.random.default_rng(0)
    texts = captions(micro_batch, args.text_tokens, language_model.config.vocab_size, rng)
    requests = [Request(text) for text in texts]
    noise = initial_noise(range(micro_batch), model.latent_shape)
    flops = sample_flops(model, args.text_tokens, config)
    if args.graphs:
        model.speed_up_sampling(compiles=args.compile)
    elif args.compile:
        model.compile_blocks(Compilation("the model's layers", ""))
    matrix = matrix_rate(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        sample(model, requests, noise, config)

    for _ in range(args.warmup):
        step()
    seconds = median(seconds_of(step) for _ in range(args.steps))
    result = {
        "batch": micro_batch,
        "num_steps": config.num_steps,
        "guidance_scale": config.guidance_scale,
        "graphs": args.graphs,
        "captured": model.graphs is not None and not model.graphs.is_plain,
        "batch_sec": seconds,
        "images_per_sec": micro_batch / seconds,
        "flops_per_image": flops,
        **rates(micro_batch * flops, seconds, matrix, device),
    }
    return result | shares(args, step)


def shares(args: argparse.Namespace, step: Callable[[], None]) -> dict[str, Any]:
    if args.profile is None:
        return {}
    found = kernel_shares(step)
    args.profile.write_text(found.markdown() + "\n")
    print(found.markdown())
    return {"profile": {group: round(share, 4) for group, share in found.groups.items()}}


def fits(arguments: list[str], micro_batch: int) -> bool:
    """Steps in a fresh process, of which nothing stays behind. RuntimeError where they fail otherwise."""
    probe = [sys.executable, __file__, *arguments, "--micro-batch", str(micro_batch), "--probe"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode not in (0, OUT_OF_MEMORY):
        raise RuntimeError(f"micro-batch {micro_batch} failed:\n{done.stderr[-4000:]}")
    print(f"micro-batch {micro_batch}: {'too large' if done.returncode else 'fits'}", flush=True)
    return done.returncode == 0


def largest(fits: Callable[[int], bool], first: int, limit: int) -> int:
    """The largest size up to `limit` that fits: doubled from `first`, then bisected; 0 where none does."""
    low, high = 0, limit + 1
    size = min(first, limit)
    while high - low > 1:
        low, high = (size, high) if fits(size) else (low, size)
        size = min(2 * low, limit) if high > limit else (low + high) // 2
    return low


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=("train", "sample"))
    parser.add_argument("--geometry", choices=("published", "small"), default="published")
    parser.add_argument("--micro-batch", default="8", help="samples of a pass (sample: images), or auto")
    parser.add_argument("--first", type=int, default=4, help="what auto tries first")
    parser.add_argument("--limit", type=int, default=256, help="what auto tries at most")
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--activation-checkpointing", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--reads-prompts-apart", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--graphs", action="store_true", help="sample: a CUDA graph a step, weights held ready"
    )
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--text-tokens", type=int, default=32, help="of a prompt, on the average")
    parser.add_argument("--num-steps", type=int, default=30, help="of the sampler")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="steps (sample: batches) whose median counts")
    parser.add_argument("--profile", type=Path, help="where to write three steps' kernels as markdown")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    # Before the first allocation: what varies with the prompts' lengths leaves no holes.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if args.micro_batch == "auto":
        micro_batch = largest(lambda size: fits(arguments, size), args.first, args.limit)
        if micro_batch == 0:
            sys.exit("not even one sample fits")
    else:
        micro_batch = int(args.micro_batch)
    if args.probe:
        args.profile, args.warmup, args.steps = None, 1, 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = fill(small() if args.geometry == "small" else published()[0], device)
    work = train if args.mode == "train" else draw_images
    try:
        result = work(args, model, micro_batch)
    except RuntimeError as error:
        # cuBLAS has an error of its own where it finds no room for its workspace
        is_memory = isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)
        if args.probe and is_memory:
            sys.exit(OUT_OF_MEMORY)
        raise
    finally:
        shut_down()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    found = {"mode": args.mode, "geometry": args.geometry, "device": name, "torch": torch.__version__}
    print(json.dumps({**found, "text_tokens": args.text_tokens, "compile": args.compile, **result}))


if __name__ == "__main__":
    main(sys.argv[1:])
