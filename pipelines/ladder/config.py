"""YAML file and `key.path=value` -> one ladder: what runs, on what data, for how long, how it is scored."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from pipelines.ladder.plans.base import Plan
from pipelines.ladder.plans.choice import PlanName, plan_of
from pipelines.ladder.rows import Common
from pipelines.runtime.session import RayConfig
from pipelines.sources.scenes import ScenesConfig
from repfusion.config import Config
from repfusion.diffusion.flow import FlowConfig
from repfusion.evaluation.record import EvaluationConfig
from repfusion.evaluation.suites.scenes import ScenesSuiteConfig
from repfusion.model.dit import DiTConfig
from repfusion.training.engine import EngineConfig
from repfusion.weights import WEIGHTS

CONFIGS = Path(__file__).parent / "configs"


class LadderDataConfig(Config):
    """Scenes, encoded once in each latent space."""

    scenes: ScenesConfig = ScenesConfig(shard_size=1000)
    """What is drawn. Held-out combinations are in none of it."""
    num_validation: int = Field(default=256, ge=1)
    """Held-out scenes on which the velocity loss is taken, each at one fixed noise level and noise."""


class LadderTrainingConfig(Config):
    """What every row trains with."""

    num_steps: int = Field(default=4000, ge=1)
    """Updates."""
    global_batch_size: int = Field(default=32, ge=1)
    """Samples per update."""
    engine: EngineConfig = EngineConfig()
    """Optimizer and precision, one process."""
    ema_decay: float = Field(default=0.998, ge=0, lt=1)
    """Decay of the averaged weights, which are what is scored."""
    condition_dropout: float = Field(default=0.1, ge=0, le=1)
    """Fraction of samples trained on the empty prompt."""


class ScoringConfig(Config):
    """How checkpoints are scored."""

    final: EvaluationConfig = EvaluationConfig(
        suites={"scenes": ScenesSuiteConfig(num_prompts=480, include_new=False, split="train")}
    )
    """How the last checkpoint is scored; the rows are compared by the first suite's headline. Prompts and
    noise are the same for every row and seed.
    """
    curve_prompts: int = Field(default=120, ge=6)
    """Prompts of the checkpoints before it: the first so many of the same."""
    num_points: int = Field(default=4, ge=1)
    """Checkpoints, evenly spaced, the last one included."""


class ResourcesConfig(Config):
    """What each run takes. Changes no result but its speed."""

    one_by_one: bool = False
    """One run after the other, each in a process of its own, without Ray, which does not get to start on a
    busy machine at a low priority. The data, where they are still to be made, need Ray all the same.
    """

    num_cpus: float = Field(default=1, gt=0)
    """Cores; each run computes on one thread unless `training.engine.num_threads` says otherwise."""
    num_gpus: float | None = Field(default=None, ge=0, le=1)
    """Share of a GPU. None: a twelfth where the cluster has GPUs, else nothing."""


class ComputeConfig(Config):
    """Test-time compute: the final checkpoints of some rows, sampled with more or fewer steps."""

    rows: tuple[str, ...] = ()
    """Rows whose checkpoints are sampled; none stands for those of the plan."""
    num_steps: tuple[Annotated[int, Field(ge=1)], ...] = (2, 5, 10, 20, 30, 60)
    """Sampling steps."""
    num_prompts: int = Field(default=240, ge=6)
    """Prompts for each."""


class LadderConfig(Config):
    """One ladder. `name`, `data`, `training`, `scoring`, the DiT and the noise levels are its budget:
    results of another budget never share a table.
    """

    name: str = Field(default="base", pattern=r"^[\w-]+$")
    """Name of the ladder in tables, in MLflow, and of the folder under `root`."""
    plan: PlanName = "repfusion"
    """What is compared: the rows and claims of docs/ladder/plan.md, or of docs/unifusion/plan.md."""
    root: Path = Path("runs/ladder")
    """Data, checkpoints and evaluations."""
    results: Path = Path("docs/ladder/results.jsonl")
    """One JSON line for each (row, seed)."""
    compute_results: Path = Path("docs/ladder/compute.jsonl")
    """One JSON line for each (row, seed, number of sampling steps)."""
    report: Path = Path("docs/ladder.md")
    """The page that `table` writes; charts and notes lie in the folder of the same name."""
    rows: tuple[str, ...] = ()
    """Which rows to run now; none stands for all of the plan."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Seeds of initial weights, order of samples, noise and dropped conditions; data and prompts stay. None:
    as many as the plan has of each row.
    """
    weights: Path = WEIGHTS
    """Holds llava/, llava_noise_taught/, llava_large/, language/, vision_tower/, decoder/, vae/."""
    dit: DiTConfig = DiTConfig()
    """The denoiser of every row but those matched in FLOPs."""
    flow: FlowConfig = FlowConfig(base_dim=256)
    """Noise levels."""
    data: LadderDataConfig = LadderDataConfig()
    """What is trained on."""
    training: LadderTrainingConfig = LadderTrainingConfig()
    """What every row trains with: for how long, and how."""
    scoring: ScoringConfig = ScoringConfig()
    """How checkpoints are scored: on which prompts, how often."""
    compute: ComputeConfig = ComputeConfig()
    """Test-time compute."""
    prompt_tokens: int = Field(default=6, ge=1)
    """Tokens of the prompt for which FLOPs are counted, the begin token included.
    The scenes' prompts have 5.6."""
    resources: ResourcesConfig = ResourcesConfig()
    """What each run takes."""
    tracking_uri: str | None = "sqlite:///runs/mlflow.db"
    """MLflow's store; None tracks nothing."""
    ray: RayConfig = RayConfig()
    """The cluster. Changes no results."""

    @model_validator(mode="after")
    def _rows_exist(self) -> "LadderConfig":
        self.compared.check_rows((*self.rows, *self.compute.rows))
        return self

    @property
    def compared(self) -> Plan:
        """The plan, as data."""
        return plan_of(self.plan)

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the rows to run now."""
        return self.rows or tuple(self.compared.rows)

    @property
    def sampled_again(self) -> tuple[str, ...]:
        """Names of the rows whose final checkpoints are sampled with more and with fewer steps."""
        return self.compute.rows or self.compared.sampled_again

    @property
    def common(self) -> Common:
        return Common(
            weights=self.weights,
            dit=self.dit,
            flow=self.flow,
            sampler=self.scoring.final.sampler,
            prompt_tokens=self.prompt_tokens,
            image_size=self.data.scenes.world.image_size,
        )
