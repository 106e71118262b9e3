"""`python -m repfusion.foundation CONFIG.yaml [key=value ...]`: trains and measures the small foundation,
part by part, and records its quality.

A part that was cut off goes on where it was when it is asked for again; one that is done is left as it is.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import torch

from repfusion.config import ConfigError, load_config
from repfusion.files import write_json
from repfusion.foundation.config import FoundationConfig
from repfusion.foundation.dialogues import train_tokenizer
from repfusion.foundation.measure import measure
from repfusion.foundation.perception import polish_decoder, train_perception
from repfusion.foundation.pool import ScenePool
from repfusion.foundation.vae import train_vae
from repfusion.foundation.variants import SeenPool, train_language, train_large, train_noise_taught
from repfusion.latents.tower import RepresentationEncoder
from repfusion.weights import WEIGHTS

PARTS = ("perception", "polish", "noise_taught", "language", "large", "vae", "measure")
MODELS = ("vision_tower", "decoder", "llava", "llava_noise_taught", "llava_large", "language", "vae")
RECORD = "foundation.json"


class Foundation:
    """The parts of one configuration, their folder and the states from which they go on, scenes among them.

    Args:
        config: sizes and lengths.
        folder: is written.
        until: a deadline, in seconds of `time.monotonic`; None is none.
    """

    def __init__(self, config: FoundationConfig, folder: Path, until: float | None = None):
        self.config, self.folder, self.until = config, folder, until
        self.states = folder / "states"
        self._pool: ScenePool | None = None
        self._seen: SeenPool | None = None

    @property
    def pool(self) -> ScenePool:
        """Drawn when the first part needs it."""
        if self._pool is None:
            kept = self.states / "scenes"
            self._pool = ScenePool(self.config, self.folder / "llava", kept=kept, until=self.until)
        return self._pool

    @property
    def seen(self) -> SeenPool:
        if self._seen is None:
            self._seen = SeenPool(self.pool, self.folder)
        return self._seen

    def train(self, part: str) -> dict[str, float]:
        """Trains a part, from its state if it was cut off; returns the last losses.

        Raises:
            OutOfTime: the deadline came first; the part goes on when it is trained again.
        """
        common = self.config, self.folder, self.states / f"{part}.safetensors", self.until
        match part:
            case "perception":
                return train_perception(self.pool, *common)
            case "polish":
                encoder = RepresentationEncoder.from_pretrained(self.folder / "vision_tower")
                return polish_decoder(self.pool, encoder.to(self.pool.device), *common)
            case "noise_taught":
                return train_noise_taught(self.seen, *common)
            case "language":
                return train_language(self.pool, *common)
            case "large":
                return train_large(self.seen, *common)
            case "vae":
                return train_vae(self.pool, *common)
        raise ValueError(f"no part {part!r}; there are {', '.join(PARTS)}")


def bring_up_to_date(foundation: Foundation, parts: tuple[str, ...], num_measured: int = 200) -> None:
    """Trains the parts that are not done, in their order; measuring, on so many texts of each kind, is done
    whenever it is asked for.

    Raises:
        ValueError: the folder holds parts of another configuration.
        OutOfTime: the deadline came first.
    """
    folder, config = foundation.folder, foundation.config
    folder.mkdir(parents=True, exist_ok=True)
    path, said = folder / RECORD, config.model_dump(mode="json", exclude={"device", "save_every_sec"})
    record = json.loads(path.read_text()) if path.is_file() else {"config": said, "parts": {}}
    if record["config"] != said:
        differing = sorted(key for key in said if record["config"].get(key) != said[key])
        raise ValueError(
            f"{path}: made with other {', '.join(differing)}; choose another folder (--out), or remove it"
        )
    if not (folder / "llava" / "tokenizer.json").is_file():
        train_tokenizer(folder / "llava")
    for part in parts:
        started = time.perf_counter()
        if part == "measure":
            record["quality"] = measure(folder, config, num_measured)
        elif part not in record["parts"]:
            losses = foundation.train(part)
            seconds = round(time.perf_counter() - started, 1)
            record["parts"][part] = {"seconds_of_the_last_call": seconds, "losses": losses}
        write_json(path, record)


def release(folder: Path, weights: Path) -> None:
    """Copies the models and their record in the place of the shipped ones, each folder as a whole.

    Raises:
        ValueError: not all parts are done and measured.
    """
    path = folder / RECORD
    record = json.loads(path.read_text()) if path.is_file() else {"parts": {}}
    if missing := [part for part in PARTS[:-1] if part not in record["parts"]]:
        raise ValueError(f"{path}: {', '.join(missing)} not done; train them first")
    if "quality" not in record:
        raise ValueError(f"{path}: not measured; run the part measure first")
    for name in MODELS:
        old, new = weights / f".old-{name}", weights / f".new-{name}"
        for leftover in (old, new):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(folder / name, new)
        if (weights / name).is_dir():
            (weights / name).rename(old)
        new.rename(weights / name)
        shutil.rmtree(old, ignore_errors=True)
    write_json(weights / RECORD, record)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m repfusion.foundation", description=__doc__)
    parser.add_argument("config", type=Path, help="a YAML file of FoundationConfig")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the configuration")
    parser.add_argument("--out", type=Path, default=Path("runs/foundation"), help="folder to write")
    parser.add_argument("--release", action="store_true", help="then put them in the place of the shipped")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)} (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        config = load_config(FoundationConfig, args.config, args.overrides)
        parts = tuple(args.parts.split(","))
        if unknown := set(parts) - set(PARTS):
            raise ValueError(f"no parts {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
        bring_up_to_date(Foundation(config, args.out), parts)
        if args.release:
            release(args.out, WEIGHTS)
    except (ConfigError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
