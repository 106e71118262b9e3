"""The rows of one call: what they share, and how one of them is trained and scored."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pipelines.ladder.plans.base import Space
from pipelines.ladder.plans.repfusion import REPFUSION
from pipelines.ladder.rows import SPACES, model_of
from pipelines.ladder.science.data import FeatureSpace, Pictures, draw_pictures, encode_pictures
from pipelines.ladder.science.feed import Feed
from pipelines.ladder.science.losses import Described, describe, paired_losses
from pipelines.ladder.science.plan import SciencePlan
from pipelines.ladder.science.results import RowResult
from pipelines.ladder.science.training import Training
from pipelines.ladder.worker import hardware, now
from repfusion.evaluation.parts import per_item
from repfusion.evaluation.suites.build import build_suite
from repfusion.files import digest_of, weights_digest
from repfusion.foundation.measure import LLAVAS
from repfusion.generate import generate, to_uint8
from repfusion.latents.encoder import PixelEncoder
from repfusion.latents.load import Decoder, EncoderConfig
from repfusion.lineage.environment import git_commit, has_local_changes
from repfusion.model.build import build_model
from repfusion.model.text_to_image import TextToImage
from repfusion.runs.checkpoint import frozen_digests, write_model
from repfusion.runs.completion import begin_checkpoint, finish_checkpoint
from repfusion.runs.folder import WEIGHTS_FILE
from repfusion.training.engine import NonFiniteError

FOLDERS = (*LLAVAS, "language", "vision_tower", "decoder", "vae")
"""Folders of a foundation."""
SEED = 0
"""Decides prompts and noise of scores: the same for every row."""
IMAGES_AT_ONCE = {"cuda": 512, "cpu": 60}


class Workbench:
    """What the rows of one call share, each made when a row first needs it.

    Args:
        foundation: folder of the trained parts.
        plan: what the rows have in common.
        device: where they are trained.
        out: folder of results and states.
        until: when trainings stop, in seconds of `time.monotonic`.
    """

    def __init__(
        self, foundation: Path, plan: SciencePlan, device: torch.device, out: Path, until: float | None = None
    ):
        self.foundation, self.plan, self.device, self.out, self.until = foundation, plan, device, out, until
        self._spaces: dict[Space, FeatureSpace] = {}
        self._described: dict[Space, list[Described]] = {}

    @cached_property
    def pictures(self) -> Pictures:
        return draw_pictures(self.plan, self.foundation / "llava", self.out / "scenes", self.until)

    @cached_property
    def digests(self) -> dict[str, str]:
        """sha256 of the weights of every part of the foundation."""
        return {name: weights_digest(self.foundation / name) for name in FOLDERS}

    def encoder(self, space: Space) -> PixelEncoder:
        size = self.plan.world.image_size
        return EncoderConfig(path=self.foundation / SPACES[space][0], image_size=size).load().to(self.device)

    def space(self, space: Space) -> FeatureSpace:
        if space not in self._spaces:
            self._spaces[space] = encode_pictures(self.pictures, self.encoder(space), self.device)
        return self._spaces[space]

    def described(self, space: Space) -> list[Described]:
        if space not in self._described:
            self._described[space] = describe(self.plan, self.encoder(space), self.device)
        return self._described[space]

    def model(self, name: str, seed: int) -> TextToImage:
        """A row's model with fresh weights, on the device; frozen ones there in bfloat16, as the engine holds
        them.
        """
        torch.manual_seed(seed)
        row = REPFUSION.rows[name]
        config = model_of(row, self.plan.common(self.foundation), self.plan.dits)
        model = build_model(config, self.space(row.space).statistics).to(self.device)
        if self.device.type == "cuda":
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        return model

    def state(self, name: str, seed: int) -> Path:
        """The file of a training that was cut off."""
        return self.out / "states" / f"{name}-{seed}.safetensors"

    def training(self, name: str, seed: int, state: Path) -> Training:
        """A row's training, from its state if it was cut off."""
        model = self.model(name, seed)
        feed = Feed(model, self.space(REPFUSION.rows[name].space), self.pictures.captions, self.plan)
        return Training(model, feed, self.plan, seed, state)


def run_row(
    bench: Workbench, name: str, seed: int, perception: dict[str, Any], lacking: tuple[str, ...]
) -> RowResult:
    """Trains a row, from its state if it was cut off, and scores it. What its language model perceives, and
    lacks, goes into the result.

    Raises:
        OutOfTime: it goes on in the next call.
    """
    state = bench.state(name, seed)
    training = bench.training(name, seed, state)
    model, plan = training.model, bench.plan
    decoder: Decoder = model.load_decoder()
    fields: dict[str, Any] = {
        "row": name,
        "seed": seed,
        "budget_name": "science",
        "budget": plan.digest,
        "model": digest_of(bench.digests),
        "num_steps": plan.num_steps,
        "num_trained": sum(p.numel() for p in training.named.values()),
        "num_frozen": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "dit": model.config.dit.model_dump(mode="json"),
        "foundation": bench.digests,
        "perception": perception,
        "shortfalls": lacking,
        "hardware": hardware(),
        "commit": git_commit(),
        "local_changes": has_local_changes(),
    }
    try:
        progress = training.run(lambda: score(model, decoder, plan), bench.until)
    except NonFiniteError as error:
        state.unlink(missing_ok=True)
        return RowResult(**fields, status="failed", error=str(error), time=now())
    training.keep()  # scoring may be cut off
    with training.averaged():
        scores = score(model, decoder, plan)
        paired = paired_losses(model, bench.described(REPFUSION.rows[name].space))
    save_averages(bench.out / "rows" / f"{name}-{seed}", training)
    return RowResult(
        **fields,
        time=now(),
        scores=scores,
        half=progress.half or {},
        paired=paired,
        curve=tuple(progress.curve),
        seconds=round(progress.seconds, 2),
        steps_per_sec=round(plan.num_steps / progress.seconds, 3),
    )


def save_averages(folder: Path, training: Training) -> None:
    """Averaged weights in half precision, as a checkpoint to generate from."""
    half = {name: one.half() for name, one in training.averages().items()}
    working = begin_checkpoint(folder)
    write_model(working, training.model, {}, half, frozen_digests(training.model))
    (working / WEIGHTS_FILE).unlink()
    finish_checkpoint(working, folder, {"step": training.progress.step})


def score(model: TextToImage, decoder: Decoder, plan: SciencePlan) -> dict[str, Any]:
    """Values, counts and 95% intervals over prompts, as JSON holds them."""
    suite = build_suite(plan.suite, SEED)
    items = suite.items()
    requests = [item.request for item in items]
    size = IMAGES_AT_ONCE[model.device.type]
    images = to_uint8(generate(model, decoder, requests, SEED, plan.sampler, size))
    answers = suite.judge(model.device.type)(items, per_item(images, items))
    found = suite.score(items, answers).model_dump(mode="json")
    return {name: found[name] for name in ("values", "counts", "intervals")}
