"""What all rows share, fixed once before the first of them: OUT/plan.json."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from pipelines.ladder.rows import Common
from repfusion.config import Config, load_config
from repfusion.diffusion.flow import FlowConfig
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.evaluation.suites.scenes import ScenesSuiteConfig
from repfusion.files import digest_of, write_json
from repfusion.foundation.config import FoundationConfig
from repfusion.model.dit import DiTConfig
from repfusion.scenes.world import BASE_COLOURS, BASE_SHAPES, WorldConfig
from repfusion.training.engine import EngineConfig

FILE = "plan.json"


class SciencePlan(Config):
    """Everything but row, seed and foundation that decides a score."""

    num_scenes: int = Field(default=50_000, ge=1)
    """Training scenes of the rows."""
    world: WorldConfig = WorldConfig(
        image_size=64, jitter=0.5, relation_share=0.5, shapes=BASE_SHAPES, colours=BASE_COLOURS
    )
    """What they are drawn from."""
    captions_per_scene: int = Field(default=4, ge=1)
    """Captions of each, in plain words."""
    batch_size: int = Field(default=512, ge=1)
    """Samples of a step."""
    num_steps: int = Field(default=0, ge=0)
    """Steps of every row; 0 as long as it is not fixed."""
    most_steps: int = Field(default=1750, ge=1)
    """The most that a measured rate is to give."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.02, ge=0)
    """AdamW's, on matrices."""
    decay_share: float = Field(default=0.35, ge=0, le=1)
    """Share of the steps over which the learning rate falls to a fiftieth."""
    ema_decay: float = Field(default=0.998, ge=0, lt=1)
    """Decay of the averaged weights, which are what is scored."""
    condition_dropout: float = Field(default=0.1, ge=0, le=1)
    """Fraction of samples trained on the empty prompt."""
    dit: DiTConfig = DiTConfig(hidden_size=192, depth=6, num_heads=3)
    """The denoiser of every row but those matched in FLOPs."""
    base_dim: int = Field(default=64, ge=1)
    """Latent dimension at which noise levels are not shifted; the foundation has the same."""
    suite: ScenesSuiteConfig = ScenesSuiteConfig(num_prompts=480, include_new=False, split="train")
    """What rows are scored on."""
    sampler: SamplerConfig = SamplerConfig()
    """Steps and guidance of their images."""
    num_paired: int = Field(default=128, ge=2)
    """Scenes of each kind of fact on which velocity losses are compared."""
    dits: dict[str, DiTConfig] = {}
    """Denoisers matched in FLOPs, by row; found when the steps are fixed."""
    rates: dict[str, float] = {}
    """Steps per second by row from which the steps were taken; none where they were given."""

    @property
    def digest(self) -> str:
        """Plans of one digest give rows that may be compared; how fast a machine was is no part of it."""
        return digest_of(self.model_dump(mode="json", exclude={"rates", "most_steps"}))

    @property
    def engine(self) -> EngineConfig:
        """The learning rate's course and AdamW's settings."""
        return EngineConfig(
            lr=self.lr,
            weight_decay=self.weight_decay,
            warmup_steps=min(200, self.num_steps // 5),
            schedule="wsd",
            decay_steps=round(self.decay_share * self.num_steps),
            min_lr_ratio=0.02,
        )

    def common(self, foundation: Path) -> Common:
        """What the rows share as models, on the weights of a foundation."""
        return Common(
            weights=foundation,
            dit=self.dit,
            flow=FlowConfig(base_dim=self.base_dim),
            sampler=self.sampler,
            prompt_tokens=6,
            image_size=self.world.image_size,
        )


def asked_plan(foundation: FoundationConfig, overrides: Sequence[str]) -> SciencePlan:
    """The plan of docs/ladder/plan.md on a foundation of these sizes, with what is given otherwise.

    Raises:
        ConfigError: an override that does not hold.
    """
    on_gpu = foundation.device != "cpu"
    own = SciencePlan().model_dump(mode="json")
    values: dict[str, Any] = {
        **own,
        "num_scenes": foundation.num_scenes,
        "batch_size": 512 if on_gpu else 64,
        "base_dim": foundation.base_dim,
        "world": {**own["world"], "image_size": foundation.image_size},
    }
    return load_config(SciencePlan, values, overrides, "plan")


def read_plan(out: Path) -> SciencePlan | None:
    """The plan that was fixed in a folder; None where there is none yet."""
    path = out / FILE
    return SciencePlan.model_validate(json.loads(path.read_text())) if path.is_file() else None


def write_plan(out: Path, plan: SciencePlan) -> None:
    """Fixes a plan."""
    write_json(out / FILE, plan.model_dump(mode="json"))


def check_asked(fixed: SciencePlan, asked: SciencePlan, out: Path) -> None:
    """Raises ValueError, naming them, where a fixed plan has other fields than are asked for."""
    found = {"rates", "dits"} | (set() if asked.num_steps else {"num_steps"})
    before, now = (plan.model_dump(mode="json", exclude=found) for plan in (fixed, asked))
    if differing := sorted(name for name in now if before[name] != now[name]):
        named = ", ".join(f"{name} {before[name]}, asked for {now[name]}" for name in differing)
        raise ValueError(
            f"{out / FILE}: fixed with {named}; choose another folder (--out), or ask for the same"
        )
