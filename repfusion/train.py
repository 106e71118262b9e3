"""Config and columns of tars -> checkpoints: `python -m repfusion.train CONFIG.yaml [key.path=value
...]`, or under torchrun.
"""

import argparse
import json
import logging
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field, field_validator, model_validator
from tqdm import tqdm

from repfusion.codes.column import CODES, check_column
from repfusion.config import WeightsFolder, copy_of, load_config, weights_of
from repfusion.data.batches import batches
from repfusion.data.config import DataConfig
from repfusion.data.mixture import Mixture
from repfusion.data.recipe import Recipe, RecipeConfig
from repfusion.devices.compiling import Compilation, RecompilationWatch, compilation_for
from repfusion.display.redaction import RedactingFormatter, redact_text, redact_tracebacks
from repfusion.display.terminal import printable_lines
from repfusion.files import write_json
from repfusion.flops import batch_flops, peak_flops, train_flops
from repfusion.inputs import Inputs
from repfusion.latents.statistics import LatentStatistics
from repfusion.lineage.describe import lineage_record
from repfusion.model.build import build_code_model, build_model
from repfusion.model.check import check_model
from repfusion.model.config import AnyModelConfig, ModelConfig
from repfusion.model.text_to_image import TextToImage
from repfusion.model.trainable import Trainable
from repfusion.pretrained.cache import fetch
from repfusion.runs.checkpoint import (
    check_continues,
    continued_model,
    files_to_load,
    frozen_digests,
    load_start,
    load_weights,
    prune,
)
from repfusion.runs.completion import read_complete
from repfusion.runs.folder import CONFIG, STATISTICS, RunFolder, checkpoint_folder
from repfusion.runs.remote import RemoteRun
from repfusion.tracking import StoreError, Tracker, TrackingConfig, store_identity
from repfusion.training.captions import check_captions
from repfusion.training.choice import Warn, check_together, choose
from repfusion.training.distributed import (
    alone_in,
    broadcast_object,
    failures,
    init_process_group,
    is_first_of_node,
    prepare_environment,
    shut_down,
)
from repfusion.training.ema import EMA
from repfusion.training.engine import Engine, EngineConfig
from repfusion.training.meters import Meters, Report
from repfusion.training.remote import bring_newest, prune_remote, upload, upload_notes
from repfusion.training.room import accumulate
from repfusion.training.snapshot import check_resumes, resume, snapshot

log = logging.getLogger(__name__)
FINAL_LOSS_STEPS = 100
COST_OF_EAGER = (
    "A step takes 1.4 to 1.7 times as long so, and more memory: measured on an H200 at 7B + 1.3B and on two "
    "CPU cores; engine.compile=false leaves compiling out"
)
EXAMPLE_SAMPLES = 8
"""Whose FLOPs are counted at the start."""


class TrainConfig(RecipeConfig):
    output_dir: Path
    """Folder of this training: checkpoints/, config.json, train.json. All ranks have to see it."""
    output_url: str | None = None
    """An fsspec URL such as s3://bucket/run, for training on machines whose disks may go: every checkpoint is
    put there too, the last one is taken from there, and retention is the same. A workflow keeps each
    configuration of a training in a folder of its own there. Credentials and endpoint come from the
    environment.
    """
    data: DataConfig
    """The columns to train on."""
    model: AnyModelConfig = ModelConfig()
    """What is trained, by its `kind`, and the frozen parts it stands on. What names no kind draws by a flow
    in a latent space. With `init_from`, fields that are not given are
    that checkpoint's.
    """
    engine: EngineConfig = EngineConfig()
    """Optimizer, precision, sharding."""
    tracking: TrackingConfig = TrackingConfig()
    """Where metrics go."""
    init_from: WeightsFolder | None = None
    """Checkpoint whose averaged weights and latent statistics the run starts from; None starts from
    scratch.
    """
    num_steps: int = Field(default=1000, ge=0)
    """Updates in all, those before a resume included."""
    global_batch_size: int = Field(default=64, ge=1)
    """Samples per update over all ranks."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides initial weights, the order of samples, captions, noise and dropped conditions."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the averaged weights, which sampling uses."""
    checkpoint_every_steps: int = Field(default=500, ge=1)
    """Steps between checkpoints; there is always one after the last step."""
    keep_resume: int = Field(default=2, ge=1)
    """How many checkpoints keep their optimizer state; the older ones keep weights only."""
    keep_last: int | None = Field(default=None, ge=1)
    """How many checkpoints stay; None keeps all. One that an evaluation is at work on, the best so far and
    the base stay longer.
    """
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this stay for good."""
    log_every_steps: int = Field(default=20, ge=1)
    """Steps between lines of metrics."""

    @model_validator(mode="after")
    def _shares_are_of_a_method_that_reads_images(self) -> "TrainConfig":
        if self.shares_of_images and not self.model.reads_images:
            raise ValueError(
                f"{', '.join(self.shares_of_images)}: {self.model.label} reads no images; leave them out, or "
                "take one that does"
            )
        return self

    @model_validator(mode="after")
    def _frozen_parts_come_from_a_start(self) -> "TrainConfig":
        if self.model.needs_start and self.init_from is None:
            raise ValueError(
                f"init_from is not given: {self.model.label}, as it is set, keeps weights frozen that come "
                "from a checkpoint; name one, or have them trained too"
            )
        return self

    @field_validator("output_dir", "output_url")
    @classmethod
    def _one_is_local(cls, place: Path | str | None) -> Path | str | None:
        if isinstance(place, Path) and re.match(r"[a-z0-9]+:/", str(place)):
            raise ValueError(
                f"{place} is a URL; expected a local folder, and the URL as output_url, where every "
                "checkpoint is put too"
            )
        if isinstance(place, str) and not re.match(r"[a-z0-9]+://.", place):
            raise ValueError(f"{place!r} is no URL such as s3://bucket/run; leave it out, or see output_dir")
        return place

    @property
    def tracking_address(self) -> str | None:
        """Where the run is tracked, as it may be written."""
        return self.as_written()["tracking"]["uri"]

    @model_validator(mode="before")
    @classmethod
    def _continue_from(cls, values: Any) -> Any:
        """Model fields that are not given come from `init_from`; a checkpoint that is not there is an
        error of `train`.
        """
        given = values.get("model") if isinstance(values, dict) else None
        if not isinstance(values, dict) or not values.get("init_from") or not isinstance(given, dict | None):
            return values
        folder = Path(copy_of(values["init_from"]))
        fetch([folder])
        if not (folder / CONFIG).is_file():
            return values
        return {**values, "model": continued_model(folder, given or {})}


class TrainingStopped(RuntimeError):
    """A rank was asked to stop; a checkpoint of the last step was written."""


def build_trainable(config: TrainConfig, dataset: Mixture, resume_from: Path | None = None) -> Trainable:
    """The model to train: from scratch, a text-to-image model on the data set's statistics, or from a
    checkpoint with its own: the averaged weights of `config.init_from`, or the weights of this training's own
    `resume_from`, whose files were compared with their sha256 already (`choice.py`).

    Raises:
        ValueError: the checkpoint is of another model, geometry, encoder or noise schedule, or the columns
            are not those of its encoder or tokenizer.
    """
    start = resume_from or config.init_from
    if start is not None:
        read_complete(start)
    torch.manual_seed(config.seed)
    if isinstance(config.model, ModelConfig):
        source = start or config.data.columns[config.model.features]
        model = build_model(config.model, LatentStatistics.load(source / STATISTICS))
        model.conditioner.llm.reads_apart = config.engine.reads_prompts_apart
    else:
        for one in config.data.datasets.values():
            check_column(one.columns[CODES], config.model.tokenizer)
        model = build_code_model(config.model)
    if resume_from is not None:
        load_weights(model, resume_from, use_ema=False)
        check_continues(model, resume_from)
    elif start is not None:
        check_continues(model, start)
        load_start(model, start)
    if model.kept and config.engine.zero_stage == 3:
        raise ValueError(
            f"engine.zero_stage 3 shards the frozen weights of {config.model.label}, which checkpoints hold "
            "whole; set engine.zero_stage: 2"
        )
    if config.engine.activation_checkpointing != "none":
        model.checkpoint_activations(config.engine.activation_checkpointing)
    if isinstance(model, TextToImage):
        check_features(config, model, dataset)
    return model


def check_features(config: TrainConfig, model: TextToImage, dataset: Mixture) -> None:
    """Raises ValueError where the features are not the encoder's."""
    features = model.config.features
    shape, _ = dataset.forms[features]
    if shape != model.latent_shape:
        raise ValueError(
            f"{config.data.columns[features]}: features are {shape}, the model makes "
            f"{model.latent_shape}; re-run the '{features}' stage, or point model.encoder at the "
            "tower that made them"
        )


def compile_layers(model: Trainable, config: EngineConfig) -> Compilation | None:
    """Compiles a model's layers where the configuration says so and this machine can; see `Compilation`."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if not config.compiles(device_type):
        return None
    made = compilation_for(device_type, "the model's layers", COST_OF_EAGER)
    model.compile_blocks(made)
    return made


def refuse_long_captions(model: Trainable, dataset: Mixture) -> None:
    """Raises ValueError, on all ranks, where a caption is longer than the model takes: each looks at its
    share.
    """
    error = None
    try:
        check_captions(dataset, model, dist.get_rank(), dist.get_world_size())
    except ValueError as caught:
        error = caught
    if found := failures(error):
        raise ValueError(next(iter(found.values())).removeprefix("ValueError: "))


def loop_state(config: TrainConfig, dataset: Mixture) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that resumes from it."""
    return {
        "seed": config.seed,
        "global_batch_size": config.global_batch_size,
        "datasets": dataset.identity,
    }


def resumed_config(config: EngineConfig, saved: Mapping[str, Any] | None) -> EngineConfig:
    """The engine's configuration, whose precision `auto` is that in which the run began: another machine
    would go on with other sums.
    """
    if config.precision != "auto" or saved is None or "precision" not in saved:
        return config
    return config.model_copy(update={"precision": saved["precision"]})


def start_tracking(config: TrainConfig, dataset: Mixture, precision: str) -> Tracker:
    """A new MLflow run, or the one that this output folder started before. Called by all ranks: rank 0 has
    the run, the first rank of every other node watches that node, the others track nothing.
    """
    tracker, is_main = Tracker(TrackingConfig()), dist.get_rank() == 0
    error = None
    try:
        if is_main:
            tracker = start_run(config, dataset, precision)
    except StoreError as caught:
        error = caught
    if found := failures(error):
        raise ValueError(f"tracking could not start: {found[0]}")
    run_id = broadcast_object(tracker.run_id)
    if run_id is not None and is_first_of_node():
        if not is_main:
            tracker = Tracker(config.tracking.model_copy(update={"run_id": run_id}), attach=True)
        tracker.start_system_metrics()
    return tracker


def start_run(config: TrainConfig, dataset: Mixture, precision: str) -> Tracker:
    """Rank 0's. Raises StoreError where the store cannot be reached."""
    tracker = Tracker(remembered_run(config))
    if tracker.uri is not None:
        run = {"uri": config.tracking_address, "store": store_identity(tracker.uri), "run_id": tracker.run_id}
        write_json(RunFolder(config.output_dir).tracked, run)
    tracker.log_config(config.as_written())
    tracker.log_environment(world_size=dist.get_world_size(), precision=precision)
    for name, columns in dataset.folders.items():
        tracker.log_dataset(name, columns, dataset.num_samples[name])
    return tracker


def remembered_run(config: TrainConfig) -> TrackingConfig:
    """The run that a resumed training continues."""
    path, tracking = RunFolder(config.output_dir).tracked, config.tracking
    if tracking.uri is None or tracking.run_id is not None or not path.exists():
        return tracking
    saved = json.loads(path.read_text())
    is_same = saved.get("store") == store_identity(tracking.uri)
    return tracking.model_copy(update={"run_id": saved["run_id"]}) if is_same else tracking


def flops_per_sample(model: Trainable, dataset: Mixture, condition_dropout: float) -> float:
    """FLOPs of training on a sample: of text to images at the mean length of some prompts, of another model
    as in a batch of some samples.
    """
    first = next(iter(dataset.datasets.values()))
    if not isinstance(model, TextToImage):
        samples = [first[i] for i in range(min(EXAMPLE_SAMPLES, len(first)))]
        inputs = model.collate(samples, Recipe(condition_dropout), range(len(samples)))
        return float(batch_flops(model, inputs)) / len(samples)
    captions = [
        text for i in range(min(256, len(first))) for texts in first[i].captions.values() for text in texts
    ]
    mask = model.conditioner.llm.tokenise(captions).mask
    length = float(mask.sum() / len(mask))
    num_tokens = (1 - condition_dropout) * length + condition_dropout
    return train_flops(model, num_tokens, num_caption_tokens=length)


def train(
    config: TrainConfig,
    on_checkpoint: Callable[[Path, int, float], None] | None = None,
    on_report: Callable[[Report], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    warn: Warn = log.warning,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Trains to `num_steps`, resuming from the last whole checkpoint of `output_dir`; returns what train.json
    says.

    The callbacks are called on every rank: after a checkpoint is complete (folder, step, seconds it took),
    after each log line, `on_step` after each step with its number, and `should_stop` in each step: where one
    rank says so, all write a checkpoint and stop. `warn` is told on rank 0 of checkpoints that are damaged.

    Raises:
        ValueError: data, model or resume state do not fit, or all checkpoints are damaged.
        NonFiniteError: a loss or gradient is not finite; the weights were not updated.
        NoRoomError: a micro-batch does not fit into memory; the error names one that does.
        CheckpointError: a checkpoint could not be written; the ones before are as they were.
        TrainingStopped: after the checkpoint that `should_stop` led to.
    """
    fetch(weights_of(config).values())
    check_model(config.model)  # needs no weights, and touches nothing
    prepare_environment()
    init_process_group()
    with alone_in(config.output_dir):
        return _train(config, on_checkpoint, on_report, should_stop, warn, on_step)


def _train(
    config: TrainConfig,
    on_checkpoint: Callable[[Path, int, float], None] | None,
    on_report: Callable[[Report], None] | None,
    should_stop: Callable[[], bool] | None,
    warn: Warn,
    on_step: Callable[[int], None] | None,
) -> dict[str, Any]:
    dataset = Mixture.open(config.data, config.model.columns, config.model.reads_images)
    checkpoints = RunFolder(config.output_dir).checkpoints
    checkpoints.mkdir(parents=True, exist_ok=True)
    remote = None if config.output_url is None else RemoteRun(config.output_url)
    if remote is not None:
        bring_newest(remote, RunFolder(config.output_dir), warn)
    last = choose(checkpoints, warn)
    if remote is not None and last is not None:
        upload(remote, last)  # its upload may have been cut short
    if last is None and config.init_from is not None:
        check_together(config.init_from, files_to_load)
    state = loop_state(config, dataset)
    saved = None if last is None else check_resumes(last, state)
    engine_config = resumed_config(config.engine, saved)

    # Build
    model = build_trainable(config, dataset, resume_from=last)
    refuse_long_captions(model, dataset)
    digests = frozen_digests(model)
    flops = flops_per_sample(model, dataset, config.condition_dropout)
    compilation = compile_layers(model, engine_config)
    engine = Engine(
        model,
        engine_config,
        config.global_batch_size,
        config.num_steps,
        model.frozen_parts(),
        layers=() if compilation is None else model.layers(),
    )
    is_main, state = engine.rank == 0, {**state, "precision": engine.precision}
    ema = EMA(engine.partition.masters, config.ema_decay, ramp=config.init_from is None)

    # Resume
    first_step = 0 if last is None or saved is None else resume(last, saved, engine, ema)
    if is_main:
        write_json(RunFolder(config.output_dir).config, config.as_written())
        said = "training steps %d to %d on %d samples, products in %s"
        log.info(said, first_step, config.num_steps, len(dataset), engine.precision)
    tracker = start_tracking(config, dataset, engine.precision)
    if remote is not None:
        upload_notes(remote, RunFolder(config.output_dir))
    run = {"run_id": tracker.run_id, "tracking_uri": tracker.uri and config.tracking_address}
    made_of = {"datasets": dataset.folders, "digests": digests, "init_from": config.init_from}
    lineage = lineage_record(step=first_step, **made_of, **run) if is_main else {}
    status = "FAILED"

    retention = config.keep_resume, config.keep_last, config.keep_every_steps

    def save(step: int) -> None:
        begun = time.perf_counter()
        folder = snapshot(checkpoints, step, model, ema, engine, digests, state, lineage)
        if remote is not None:
            upload(remote, folder)
        if is_main:
            tracker.log_checkpoint(folder, step)
            for gone in prune(checkpoints, *retention):
                tracker.forget_checkpoint(gone)
        if remote is not None:
            prune_remote(remote, checkpoints, retention)
        if on_checkpoint is not None:
            on_checkpoint(folder, step, time.perf_counter() - begun)

    read = partial(
        batches,
        dataset,
        config.recipe,
        model.collate,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        rank=engine.rank,
        world_size=engine.world_size,
        prefetch_steps=config.data.prefetch_steps,
    )
    micro_batch_size = config.engine.micro_batch_size
    stream = read(first_step=first_step, num_steps=config.num_steps, micro_batch_size=micro_batch_size)

    def first_of(step: int, size: int) -> Inputs:
        with closing(read(first_step=step, num_steps=step + 1, micro_batch_size=size)) as again:
            return next(again)[0].inputs

    show_bar = is_main and sys.stderr.isatty()
    bar = tqdm(total=config.num_steps, initial=first_step, unit="step", desc="train", disable=not show_bar)
    recent: deque[float] = deque(maxlen=FINAL_LOSS_STEPS)
    meters = Meters(engine.device, config.global_batch_size, len(dataset), flops / engine.world_size)
    watch = RecompilationWatch(compilation)
    peak = peak_flops(engine.device)
    aside_sec = 0.0
    try:
        if last is None and config.init_from is not None:
            # The base itself is step 0: evaluations compare with it.
            save(0)
            meters.clear()
        started = time.perf_counter()

        for step in range(first_step, config.num_steps):
            # Data
            waiting = time.perf_counter()
            parts = next(stream)
            meters.waited_sec += time.perf_counter() - waiting

            # Accumulate
            for batch in parts:
                losses = accumulate(engine, batch, partial(first_of, step))
                meters.add_losses(batch.inputs["t"].to(engine.device, non_blocking=True), losses)

            # Step and EMA
            stats = engine.update(step, stop=should_stop is not None and should_stop())
            ema.update(step)
            recent.append(stats.loss)
            meters.add_step(stats)
            watch.step()
            done = step + 1
            is_last = done == config.num_steps
            bar.update()
            if on_step is not None:
                on_step(done)

            # Report
            if done % config.log_every_steps == 0 or is_last:
                watch.report()
                report = meters.report(done, stats, peak, watch.num_recompilations)
                rate = report.samples_per_sec
                bar.set_postfix(loss=f"{report.loss:.4f}", samples_per_sec=f"{rate:.0f}")
                if is_main and not show_bar:
                    log.info(
                        "step %d/%d loss %.4f, %.0f samples/s", done, config.num_steps, report.loss, rate
                    )
                if is_main:
                    tracker.log_metrics(report.metrics(), done)
                if on_report is not None:
                    on_report(report)

            # Snapshot; its time is not training time
            if done % config.checkpoint_every_steps == 0 or is_last or stats.stop:
                aside = time.perf_counter()
                save(done)
                meters.set_aside(time.perf_counter() - aside)
                aside_sec += time.perf_counter() - aside
            if stats.stop and not is_last:
                status = "KILLED"
                raise TrainingStopped(
                    f"stopped after step {done}, whose checkpoint is written; run it again to go on"
                )

        seconds = time.perf_counter() - started - aside_sec
        summary = summarise(config, first_step, seconds, list(recent), engine.world_size, tracker)
        if is_main:
            write_json(RunFolder(config.output_dir).summary, summary)
        if remote is not None:
            upload_notes(remote, RunFolder(config.output_dir))
        status = "FINISHED"
    finally:
        stream.close()
        bar.close()
        dataset.close()
        tracker.finish(status)
    return broadcast_object(summary)


def summarise(
    config: TrainConfig,
    first_step: int,
    seconds: float,
    recent: list[float],
    world_size: int,
    tracker: Tracker,
) -> dict[str, Any]:
    """What train.json says. Nothing left to train: what it said before."""
    path = RunFolder(config.output_dir).summary
    if first_step >= config.num_steps and path.exists():
        return json.loads(path.read_text())
    num_steps = max(0, config.num_steps - first_step)
    return {
        "steps": config.num_steps,
        "resumed_at_step": first_step,
        "samples_per_sec": num_steps * config.global_batch_size / seconds,
        "final_loss": sum(recent) / len(recent) if recent else None,
        "train_sec": seconds,
        "world_size": world_size,
        "tracking_uri": config.tracking_address,
        "run_id": tracker.run_id,
        "checkpoint": str(checkpoint_folder(RunFolder(config.output_dir).checkpoints, config.num_steps)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    args = parser.parse_intermixed_args()
    try:
        config = load_config(TrainConfig, args.config, args.overrides)
    except (ValueError, OSError) as error:
        sys.exit(printable_lines(redact_text(f"error: {error}")))
    if args.dry_run:
        print(json.dumps(config.as_written(), indent=2))
        return
    stop = Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    is_main = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if is_main else logging.WARNING
    shown = logging.StreamHandler()
    shown.setFormatter(RedactingFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[shown])
    redact_tracebacks()
    try:
        summary = train(config, should_stop=stop.is_set)
    except TrainingStopped as stopped:
        log.info("%s", stopped)
        sys.exit(128 + signal.SIGTERM)
    finally:
        shut_down()
    log.info("done: %s", json.dumps(summary))


if __name__ == "__main__":
    main()
