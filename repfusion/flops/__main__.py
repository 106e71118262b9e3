"""Parameters, FLOPs and bytes of a configuration, by part: `python -m repfusion.flops --config CONFIG.yaml`.
No weights are read.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from repfusion.config import read_values, validate
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.display.redaction import redact_text
from repfusion.display.tables import aligned
from repfusion.display.terminal import printable_lines
from repfusion.flops.activations import activation_bytes
from repfusion.flops.count import Costs, eyes_cost, sample_costs, train_costs
from repfusion.flops.counter import Cost, Number
from repfusion.flops.memory import Frozen, column_bytes, rank_memory, sizes
from repfusion.flops.paper import paper_markdown
from repfusion.latents.load import Decoder
from repfusion.model.config import ModelConfig, flow_of
from repfusion.model.meta import GEOMETRY, absent_folders, meta_decoder, meta_from_config
from repfusion.model.text_to_image import TextToImage
from repfusion.runs.checkpoint import load_model_config, read_config
from repfusion.training.engine import EngineConfig
from repfusion.weights import WEIGHTS


def parts_table(
    model: TextToImage, decoder: Decoder | None, training: Costs, drawing: Mapping[str, Number]
) -> str:
    """Parameters, bytes, GFLOPs of a training sample and of an image, by part."""
    rows = [("part", "parameters", "trained", "MB", "train GFLOP", "image GFLOP")]
    totals = [0.0] * 5
    for part, size in sizes(model, decoder).items():
        cost, image = training.get(part, Cost()).total, drawing[part]
        values = size.num_parameters, size.num_trainable, size.num_bytes / 1e6, cost / 1e9, image / 1e9
        totals = [a + b for a, b in zip(totals, values, strict=True)]
        rows.append((part, *numbers(values)))
    return aligned([*rows, ("all", *numbers(totals))])


def numbers(values: Any) -> list[str]:
    return [f"{value:,.{digits}f}" for value, digits in zip(values, (0, 0, 1, 3, 2), strict=True)]


def memory_table(model: TextToImage, config: EngineConfig, num_ranks: int) -> str:
    """Memory of one rank under each ZeRO stage."""
    trained = sum(size.num_trainable for size in sizes(model).values())
    parts = ("weights", "masters", "gradients", "moments", "averages", "buckets", "frozen", "gathered")
    held = Frozen.of(model, config)
    name, unit = ("GB", 1e9) if trained + held.num_elements > 1e8 else ("MB", 1e6)
    rows = [(f"{name} a rank", *parts, "all", "of it on the host")]
    for stage in range(4):
        for frozen in ("replicated", "sharded") if stage == 3 and held.num_elements else ("replicated",):
            engine = config.model_copy(
                update={
                    "zero_stage": stage,
                    "frozen": frozen,
                    "offload_optimizer": config.offload_optimizer and stage > 0,
                }
            )
            found = rank_memory(trained, held, engine, num_ranks)
            name = f"ZeRO {stage}" + (", MLLM sharded" if frozen == "sharded" else "")
            values = [
                *(getattr(found, part) for part in parts),
                found.device + found.offloaded,
                found.offloaded,
            ]
            rows.append((name, *(f"{value / unit:,.2f}" for value in values)))
    return aligned(rows)


CARD_BYTES = 80e9
"""What torch can give out of an 80 GB card, whose 85.5e9 bytes also hold a context and holes."""


def activations_table(model: TextToImage, config: EngineConfig, num_ranks: int, num_text_tokens: int) -> str:
    """Bytes of a sample's activations, and the largest micro-batch beside what one of `num_ranks` ranks holds
    on a card of 80 GB.
    """
    trained = sum(size.num_trainable for size in sizes(model).values())
    free = CARD_BYTES - float(rank_memory(trained, Frozen.of(model, config), config, num_ranks).device)
    found = activation_bytes(model, num_text_tokens)
    rows = [("MB a sample", "counted", "fits 80 GB")]
    for name, size in (
        ("nothing computed again, eager", found.eager),
        ("selective", found.products),
        ("full", found.layer_inputs),
    ):
        rows.append((name, f"{size / 1e6:,.2f}", f"{max(0, int(free // size)):,}"))
    return aligned(rows)


def training_of(path: Path | None) -> tuple[EngineConfig, int | None]:
    """The engine of a training's YAML (or of a workflow's `train`), and the samples that it sees in all."""
    fields = {} if path is None else read_values(path)
    fields = fields.get("train", fields)
    steps, batch = fields.get("num_steps"), fields.get("global_batch_size")
    return validate(EngineConfig, fields.get("engine") or {}, str(path)), steps and batch and steps * batch


def say(config: ModelConfig, path: Path | None, args: argparse.Namespace) -> None:
    sampler = SamplerConfig(num_steps=args.num_steps, guidance_scale=args.guidance_scale)
    model = meta_from_config(config)
    engine, num_samples = training_of(path)
    print(config.describe())
    if absent := absent_folders(config):
        print(f"geometry from {GEOMETRY}, in place of {', '.join(map(str, absent))}")
    print()
    decoder = meta_decoder(config, model.grid)
    image = np.zeros((args.image_px, args.image_px, 3), np.uint8)
    images = [image] * args.images
    if images and not config.conditioning.reads_images:
        raise ValueError(f"--images {args.images}: the method {config.conditioning.method!r} reads no images")
    training = train_costs(model, args.text_tokens, has_text_features=False, images=images)
    drawing = sample_costs(model, args.text_tokens, sampler, decoder, images)
    print(parts_table(model, decoder, training, drawing))
    if decoder is None:
        print(f"the decoder {config.decoder} is not counted: a VAE, whose weights are not there")
    guided = "" if sampler.guidance_scale == 1 else ", with guidance"
    print(f"prompts of {args.text_tokens:g} tokens; an image takes {sampler.num_steps} steps{guided}")
    if (eyes := model.conditioner.llm.eyes) is not None:
        look = eyes.look(image)
        seeing = float(eyes_cost(eyes, look.inputs).total) / 1e9
        print(
            f"requests of {args.images} images; one of {args.image_px} px a side is {look.num_tokens:,} "
            f"tokens and takes {seeing:,.2f} GFLOP of the vision tower"
        )
    if num_samples:
        total = num_samples * float(sum(cost.total for cost in training.values()))
        print(f"training: {num_samples:,} samples, {total:.3g} FLOPs")
    columns = column_bytes(model, args.text_tokens).items()
    print("bytes a sample: " + ", ".join(f"{name} {size:,.0f}" for name, size in columns))
    print()
    print(memory_table(model, engine, args.ranks))
    where = "bfloat16 on a GPU" if engine.precision != "fp32" else f"in {config.mllm_dtype}"
    print(f"one of {args.ranks} ranks, frozen weights {where}; without activations:")
    print()
    if config.conditioning.reads_images:
        print("activations of a method that reads images are not counted")
        return
    print(activations_table(model, engine, args.ranks, round(args.text_tokens)))
    print(f"micro-batches under ZeRO {engine.zero_stage}; compiled, `none` lies between the first two rows")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m repfusion.flops", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--checkpoint", type=Path, default=WEIGHTS / "base", help="its config and the folders that it names"
    )
    which.add_argument("--config", type=Path, help="YAML of a training (its `model`) or of a model")
    which.add_argument("--paper", action="store_true", help="the published figures against ours, in markdown")
    parser.add_argument("--text-tokens", type=float, default=32.0, help="of a prompt, begin token included")
    parser.add_argument("--images", type=int, default=0, help="that a request shows the language model")
    parser.add_argument("--image-px", type=int, default=1024, help="side of each")
    parser.add_argument("--num-steps", type=int, default=SamplerConfig().num_steps)
    parser.add_argument("--guidance-scale", type=float, default=SamplerConfig().guidance_scale)
    parser.add_argument("--ranks", type=int, default=8, help="of the training whose memory is shown")
    args = parser.parse_args()
    try:
        if args.paper:
            print(paper_markdown())
            return
        if args.config:
            config = load_model_config(args.config)
        else:
            config = flow_of(read_config(args.checkpoint)[0], "this command")
        say(config, args.config, args)
    except (ValueError, OSError) as error:
        sys.exit(printable_lines(redact_text(f"error: {error}")))


if __name__ == "__main__":
    main()
