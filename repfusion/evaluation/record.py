"""What an evaluation is made with, and what `scores.json` holds of it."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from repfusion.config import Config, Strict
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.evaluation.suites.base import Scores, Suite
from repfusion.evaluation.suites.build import SuiteConfig, build_suite
from repfusion.evaluation.suites.scenes import ScenesSuiteConfig

SCORES = "scores.json"
GALLERY = "gallery.png"
GALLERIES = "galleries"
"""Folder of a picture for each titled row of the gallery, such as a task's."""
SuiteName = Annotated[str, Field(pattern=r"^[\w-]+$")]


class EvaluationConfig(Config):
    suites: dict[SuiteName, SuiteConfig] = Field({"scenes": ScenesSuiteConfig()}, min_length=1)
    """What is asked for and how it is judged, by a name of one's own; a suite's `kind` is that name unless it
    says otherwise. The first one picks the best checkpoint.
    """
    max_items: int | None = Field(default=None, ge=1)
    """The first so many items of each suite; None takes all."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides noise and whatever a suite draws: the same seed gives every checkpoint the same."""
    batch_size: int = Field(default=60, ge=1)
    """Images sampled at once; they do not depend on it."""
    sampler: SamplerConfig = SamplerConfig()
    """Steps and guidance."""
    use_ema: bool = True
    """Averaged weights rather than the last ones."""
    dropped_taps: tuple[int, ...] = ()
    """Layers that a trained LAP does without, by the numbers of its taps."""
    device: str | None = None
    """Torch device; None takes CUDA where there is one."""
    fast: bool = False
    """Compile, and on a GPU draw each step as one CUDA graph. Images change by rounding, as by the device."""

    @field_validator("suites", mode="before")
    @classmethod
    def _kinds_are_names(cls, suites: Any) -> Any:
        if not isinstance(suites, dict):
            return suites
        return {n: {"kind": n, **one} if isinstance(one, dict) else one for n, one in suites.items()}

    def build_suites(self) -> dict[str, Suite]:
        """Every suite by its name."""
        return {name: build_suite(one, self.seed) for name, one in self.suites.items()}

    def versions(self) -> dict[str, dict[str, str]]:
        """The present versions of judge and rule, by the suite's name."""
        suites = self.build_suites().items()
        return {name: {"judge": one.judge_version, "rule": one.rule_version} for name, one in suites}


class SuiteResult(Strict):
    """What one suite found."""

    num_items: int
    judge: str
    """Version of the judge that answered."""
    rule: str
    """Version of the rule that scored."""
    scores: Scores


class Evaluation(Strict):
    """What `scores.json` holds."""

    checkpoint: str
    step: int | None
    """Training step of the checkpoint; None where it does not say."""
    config: EvaluationConfig
    suites: dict[str, SuiteResult]
    """What each suite found, by its name, in the configuration's order."""
    seconds: float
    """Loading, sampling, judging and scoring, as far as these had to be done."""

    @property
    def first(self) -> SuiteResult:
        """The result of the suite whose headline picks the best checkpoint."""
        return next(iter(self.suites.values()))

    def is_made_with(self, config: EvaluationConfig) -> bool:
        """Whether this configuration, with the present judges and rules, would make the same scores."""
        if self.config != config:
            return False
        made = {name: {"judge": one.judge, "rule": one.rule} for name, one in self.suites.items()}
        return made == config.versions()

    def metric(self, suite: str, value: str) -> str:
        """A value's name in a tracker: `eval/VALUE` of the first suite, `eval/SUITE/VALUE` of the others."""
        return f"eval/{value}" if suite == next(iter(self.suites)) else f"eval/{suite}/{value}"

    def metrics(self) -> dict[str, float]:
        """Flat names for a tracker: `eval/overall`, `eval/task/counting`, ...; limits of 95% intervals as
        `eval/interval/overall_low`, ...
        """
        return {
            self.metric(name, value): number
            for name, one in self.suites.items()
            for value, number in (one.scores.values | _limits(one.scores)).items()
        }

    def best_metric(self, best_by: str | None) -> str:
        """The metric that picks the best checkpoint: `best_by` is SUITE/VALUE, None the first headline."""
        suite, _, value = (best_by or "").partition("/")
        return self.metric(suite, value) if suite else f"eval/{self.first.scores.headline}"


def _limits(scores: Scores) -> dict[str, float]:
    """The limits of all intervals, by flat names."""
    return {
        f"interval/{value}_{end}": number
        for value, one in scores.intervals.items()
        for end, number in (("low", one.low), ("high", one.high))
    }


def read_evaluation(folder: Path) -> Evaluation | None:
    """A finished evaluation, or None where there is none.

    Raises:
        ValueError: where `scores.json` is not one (pydantic names the field).
    """
    path = folder / SCORES
    return Evaluation.model_validate_json(path.read_text()) if path.is_file() else None
