"""`python -m repfusion.foundation`: trains and measures the small foundation, part by part, and records its
quality.
"""

import argparse
import json
import time
from pathlib import Path

from repfusion.foundation.decoder import train_decoder
from repfusion.foundation.dialogues import train_tokenizer
from repfusion.foundation.fluent import train_fluent
from repfusion.foundation.large import train_large
from repfusion.foundation.measure import measure
from repfusion.foundation.perception import (
    FoundationConfig,
    ScenePool,
    refine,
    train_language_twin,
    train_llava,
)
from repfusion.foundation.vae import train_vae
from repfusion.llm.tokenizer import load_tokenizer
from repfusion.weights import WEIGHTS

PARTS = (
    "llava",
    "decoder",
    "refine",
    "polish",
    "language",
    "fluent",
    "large",
    "vae",
    "vae_polish",
    "measure",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m repfusion.foundation", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=WEIGHTS, help="folder to write (default: the shipped one)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to train")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of FoundationConfig"
    )
    args = parser.parse_args()
    config = FoundationConfig(**dict(item.split("=", 1) for item in args.set))
    args.out.mkdir(parents=True, exist_ok=True)
    record_path = args.out / "foundation.json"
    record = json.loads(record_path.read_text()) if record_path.is_file() else {"seconds": {}}
    record["config"] = config.model_dump()
    pool = ScenePool(config)
    for part in args.parts:
        started = time.perf_counter()
        match part:
            case "llava":
                train_llava(pool, train_tokenizer(args.out / "llava"), config, args.out)
            case "language":
                tokenizer = load_tokenizer(args.out / "llava")
                train_language_twin(pool, tokenizer, config, args.out / "language")
            case "decoder" | "polish":
                train_decoder(pool, config, args.out, polish=part == "polish")
            case "fluent":
                train_fluent(pool, load_tokenizer(args.out / "llava"), config, args.out)
            case "large":
                train_large(pool, load_tokenizer(args.out / "llava"), config, args.out)
            case "vae" | "vae_polish":
                train_vae(pool, config, args.out, polish=part == "vae_polish")
            case "refine":
                refine(pool, load_tokenizer(args.out / "llava"), config, args.out)
            case "measure":
                record["quality"] = measure(args.out, config)
        record["seconds"][part] = round(time.perf_counter() - started, 1)
        record_path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
