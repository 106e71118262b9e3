"""`python -m repfusion.foundation CONFIG.yaml [key=value ...]`: trains and measures the small foundation,
part by part, and records its quality.

A part that was cut off goes on where it was when it is asked for again; one that is done is left as it is.
On a CPU parts are trained side by side, one a core: a second thread hardly helps a step this small.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from repfusion.config import ConfigError, load_config
from repfusion.files import write_json
from repfusion.foundation.config import FoundationConfig
from repfusion.foundation.dialogues import train_tokenizer
from repfusion.foundation.measure import measure
from repfusion.foundation.perception import polish_decoder, train_perception
from repfusion.foundation.pool import ScenePool
from repfusion.foundation.vae import train_vae
from repfusion.foundation.variants import (
    SeenPool,
    train_judgement,
    train_language,
    train_large,
    train_noise_taught,
)
from repfusion.latents.tower import RepresentationEncoder
from repfusion.weights import WEIGHTS

PARTS = ("perception", "judgement", "polish", "noise_taught", "language", "large", "vae", "measure")
BEGINS_FROM = {
    "judgement": "perception",
    "polish": "perception",
    "noise_taught": "judgement",
    "large": "judgement",
}
"""Parts that begin from another's models; the rest read scenes alone."""
DECIDES_NOTHING = {"device", "compile", "save_every_sec"}
"""Fields that a folder may have been made with otherwise."""
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

    def keep_scenes(self) -> None:
        """Draws the scenes on all cores, for other processes to read."""
        ScenePool(self.config, self.folder / "llava", kept=self.states / "scenes", until=self.until)

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
            case "judgement":
                return train_judgement(self.seen, *common)
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


def bring_up_to_date(
    foundation: Foundation, parts: tuple[str, ...], num_measured: int = 200, num_processes: int = 1
) -> None:
    """Trains the parts that are not done, in their order, or in so many processes of one thread each;
    measuring, on so many texts of each kind, is done whenever it is asked for.

    Raises:
        ValueError: the folder holds parts of another configuration, or lacks one that a part begins from.
        OutOfTime: the deadline came first.
    """
    folder, config = foundation.folder, foundation.config
    folder.mkdir(parents=True, exist_ok=True)
    path, said = (
        folder / RECORD,
        config.model_dump(mode="json", exclude=DECIDES_NOTHING),
    )
    record = json.loads(path.read_text()) if path.is_file() else {"config": said, "parts": {}}
    if record["config"] != said:
        differing = sorted(key for key in said if record["config"].get(key) != said[key])
        raise ValueError(
            f"{path}: made with other {', '.join(differing)}; choose another folder (--out), or remove it"
        )
    if not (folder / "llava" / "tokenizer.json").is_file():
        train_tokenizer(folder / "llava")
    missing = tuple(part for part in parts if part != "measure" and part not in record["parts"])
    for part in missing:
        first = BEGINS_FROM.get(part)
        if first is not None and first not in (*record["parts"], *missing):
            raise ValueError(f"{folder}: {part} begins from {first}; train it first")
    trained = (
        trained_alone(foundation, missing)
        if min(num_processes, len(missing)) < 2
        else trained_side_by_side(foundation, missing, num_processes)
    )
    for part, report in trained:
        record["parts"][part] = report
        write_json(path, record)
    if "measure" in parts:
        record["quality"] = measure(folder, config, num_measured)
        write_json(path, record)


Report = dict[str, Any]
"""A part's seconds of the last call, and its last losses."""


def trained_alone(foundation: Foundation, parts: tuple[str, ...]) -> Iterator[tuple[str, Report]]:
    """The parts as they are done, one after the other in this process."""
    for part in parts:
        yield part, train_part(foundation, part)


def trained_side_by_side(
    foundation: Foundation, parts: tuple[str, ...], num_processes: int
) -> Iterator[tuple[str, Report]]:
    """The parts as they are done, each in a process of one thread, from when what it reads is done.

    Raises:
        Exception: what ended a part; those that had begun have kept their states.
    """
    # other processes import what they are to call, and `__main__` is no name to import it by
    from repfusion.foundation.__main__ import train_in_process as train_apart

    foundation.keep_scenes()
    left, running = list(parts), dict[Future[Report], str]()
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as executor:
        while left or running:
            undone = {*left, *running.values()}
            for part in [part for part in left if BEGINS_FROM.get(part) not in undone]:
                left.remove(part)
                running[executor.submit(train_apart, foundation.config, foundation.folder, part)] = part
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def train_in_process(config: FoundationConfig, folder: Path, part: str) -> Report:
    torch.set_num_threads(1)
    return train_part(Foundation(config, folder), part)


def train_part(foundation: Foundation, part: str) -> Report:
    started = time.perf_counter()
    losses = foundation.train(part)
    return {"seconds_of_the_last_call": round(time.perf_counter() - started, 1), "losses": losses}


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
        num_processes = torch.get_num_threads() if config.device == "cpu" else 1
        bring_up_to_date(Foundation(config, args.out), parts, num_processes=num_processes)
        if args.release:
            release(args.out, WEIGHTS)
    except (ConfigError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
