"""What one run is: a row, a seed, and all that decides its result; another process can take it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.ladder.config import LadderConfig
from pipelines.ladder.data import Columns
from pipelines.ladder.plans.base import Row
from pipelines.ladder.rows import SPACES, matched_dits, model_of
from pipelines.shards.digests import Digests
from pipelines.stages.train import ROUNDING
from repfusion.evaluation.record import EvaluationConfig
from repfusion.files import digest_of
from repfusion.model.config import ModelConfig
from repfusion.tracking import TrackingConfig
from repfusion.train import TrainConfig

EXPERIMENT = "ladder"


@dataclass(frozen=True)
class Task:
    """One training and its scoring; paths are relative to `directory`."""

    row: str
    seed: int
    budget_name: str
    budget: str
    model: str
    settings: dict[str, Any]
    weights: dict[str, str]
    train: TrainConfig
    final: EvaluationConfig
    curve: EvaluationConfig
    num_validation: int
    world: dict[str, Any]
    wording: str
    ladders: tuple[str, ...]
    prompt_tokens: int
    directory: str

    @property
    def key(self) -> tuple[Any, ...]:
        return self.row, self.seed, self.budget, self.model

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies the result's line."""
        return {name: getattr(self, name) for name in ("row", "seed", "budget_name", "budget", "model")}


def budget_of(config: LadderConfig, data: str) -> dict[str, Any]:
    """Everything but row, seed and weights that decides a score; `data` is the images' fingerprint."""
    training = config.training.model_dump(mode="json")
    training["engine"] = {k: v for k, v in training["engine"].items() if k not in ROUNDING}
    scoring = config.scoring.model_dump(mode="json")
    for name in ("batch_size", "device"):  # they change no score
        scoring["final"].pop(name)
    return {
        "name": config.name,
        "data": data,
        "num_samples": config.data.scenes.num_samples,
        "num_validation": config.data.num_validation,
        "world": config.data.scenes.world.model_dump(mode="json"),
        "training": training,
        "scoring": scoring,
        "dit": config.dit.model_dump(mode="json"),
        "flow": config.flow.model_dump(mode="json"),
    }


def folders_of(row: Row) -> tuple[str, ...]:
    """Names of the folders of weights that a row stands on."""
    second = () if row.second is None else (row.second,)
    return tuple(dict.fromkeys((row.llm, *second, *SPACES[row.space])))


def tasks_of(config: LadderConfig, columns: Columns) -> list[Task]:
    """The runs of a ladder, in the order in which they are taken.

    Raises:
        ValueError: a folder of weights is missing, or parts of a row do not fit.
    """
    settings, digests = budget_of(config, columns.fingerprint), Digests(config.root / config.name)
    budget, common, plan = digest_of(settings), config.common, config.compared
    dits = matched_dits(plan, common, config.chosen)
    tasks = []
    for name, seed in plan.in_order(config.chosen, config.seeds):
        row = plan.rows[name]
        weights = {
            part: digests.folder(config.weights / part, f"weights ({part})") for part in folders_of(row)
        }
        model = model_of(row, common, dits)
        digest = model_digest(row, model, weights)
        folder = run_folder(config, name, seed, budget, digest)
        tasks.append(
            Task(
                row=name,
                seed=seed,
                budget_name=config.name,
                budget=budget,
                model=digest,
                settings=settings,
                weights=weights,
                train=_train_config(config, row, model, seed, folder, columns, budget),
                final=config.scoring.final,
                curve=config.scoring.final.model_copy(update={"max_items": config.scoring.curve_prompts}),
                num_validation=config.data.num_validation,
                world=config.data.scenes.world.model_dump(mode="json"),
                wording=config.data.scenes.wording,
                ladders=tuple(plan.ladders_of(name)),
                prompt_tokens=config.prompt_tokens,
                directory=os.getcwd(),
            )
        )
    return tasks


def model_digest(row: Row, model: ModelConfig, weights: dict[str, str]) -> str:
    """Digest of the model and the weights it stands on, wherever they lie."""
    fields = model.model_dump(mode="json", exclude={"mllm", "decoder"})
    fields["encoder"].pop("path")
    encoder, decoder = SPACES[row.space]
    named = {"mllm": weights[row.llm], "encoder": weights[encoder], "decoder": weights[decoder]}
    if row.second is not None:
        fields["conditioning"].pop("second")
        named["second"] = weights[row.second]
    return digest_of({"fields": fields, "weights": named})


def run_folder(config: LadderConfig, row: str, seed: int, budget: str, model: str) -> Path:
    return config.root / config.name / "runs" / f"{row}-{seed}-{digest_of([budget, model])[:8]}"


def _train_config(
    config: LadderConfig, row: Row, model: ModelConfig, seed: int, folder: Path, columns: Columns, budget: str
) -> TrainConfig:
    training, points = config.training, config.scoring.num_points
    return TrainConfig.model_validate(
        {
            "output_dir": folder,
            "data": {"images": columns.images, "columns": columns.of(row)},
            "model": model,
            "engine": training.engine,
            "tracking": TrackingConfig(
                uri=config.tracking_uri,
                experiment=EXPERIMENT,
                run_name=f"{row.name} seed {seed}",
                sweep=f"ladder {config.name} {budget[:8]}",
                system_metrics_sec=None,
            ),
            "num_steps": training.num_steps,
            "global_batch_size": training.global_batch_size,
            "seed": seed,
            "condition_dropout": training.condition_dropout,
            "ema_decay": training.ema_decay,
            "checkpoint_every_steps": max(1, -(-training.num_steps // points)),
            "log_every_steps": max(1, training.num_steps // 40),
        }
    )
