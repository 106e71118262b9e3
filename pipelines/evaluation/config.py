"""Which checkpoints are evaluated, when, on what and by what means."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from repfusion.evaluation.record import EvaluationConfig, SuiteName


class EvaluateConfig(EvaluationConfig):
    """Which checkpoints are evaluated, and the suites, sampler and seed of each evaluation."""

    best_by: str | None = None
    """SUITE/VALUE that picks the best checkpoint, such as scenes/task/counting, the higher the better; None
    takes the headline of the first suite. Changes no scores.
    """
    training: str | None = None
    """Name of the workflow's training whose checkpoints these are; None takes the last."""
    every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this, the first and the last; None takes every checkpoint."""
    suite_every_steps: dict[SuiteName, Annotated[int, Field(ge=1)]] = {}
    """Suites, by name, that are scored at multiples of so many steps and at the last step alone, such as one
    of 50,000 images; the others each time.
    """
    every_minutes: float | None = Field(default=None, gt=0)
    """Evaluates by the clock instead: each time this has passed since the last one began, the newest
    checkpoint that has no scores; the last one in any case. Changes no scores.
    """
    beside_training: bool = True
    """Evaluate while training goes on, in the time that the machine has to spare, or all after it."""
    max_concurrent: int = Field(default=2, ge=1)
    """Evaluations at once after the training; beside it there is one."""
    num_processes: int = Field(default=1, ge=1)
    """Processes of each evaluation, such as one a GPU, that share its images out: the first one, and as many
    more as there is room for. Each reserves what follows. Changes no scores.
    """
    num_cpus: float = Field(default=0, ge=0)
    """CPUs that each process of an evaluation reserves, and its threads. 0 reserves none and runs one thread:
    beside the ranks on a small machine.
    """
    num_gpus: float = Field(default=0, ge=0)
    """GPUs, or a share of one, that each process of an evaluation reserves."""
    memory_mib: int | None = Field(default=None, ge=1)
    """Memory that each process of an evaluation reserves; None reserves none."""
    max_attempts: int = Field(default=3, ge=1)
    """How often an evaluation that fails is tried; each further run of the workflow tries it once more."""
    backoff_sec: float = Field(default=10.0, ge=0)
    """Wait before the second attempt; doubled for each further one."""
    deadline_sec: float | None = Field(default=7200.0, gt=0)
    """How long an attempt may take before it is stopped and counts as failed, without the time in which it
    waited for a processor that training used; None waits for ever.
    """

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        if self.every_steps is not None and self.every_minutes is not None:
            raise ValueError("every_steps and every_minutes are two schedules; give one of them")
        return self

    @model_validator(mode="after")
    def _best_by_is_a_value(self) -> Self:
        if self.best_by is None:
            return self
        known = [f"{name}/{one.name}" for name, suite in self.build_suites().items() for one in suite.values]
        if self.best_by not in known:
            raise ValueError(f"best_by {self.best_by!r} is no value of a suite; expected one of {known}")
        return self

    @model_validator(mode="after")
    def _rare_suites_are_suites_and_pick_no_best(self) -> Self:
        for name in self.suite_every_steps:
            if name not in self.suites:
                raise ValueError(f"suite_every_steps names {name!r}; the suites are {', '.join(self.suites)}")
        first = next(iter(self.suites)) if self.best_by is None else self.best_by.partition("/")[0]
        if first in self.suite_every_steps:
            raise ValueError(
                f"suite {first!r} picks the best checkpoint, so every evaluation needs it; leave it out of "
                "suite_every_steps, or name another in best_by"
            )
        return self

    @property
    def scoring(self) -> EvaluationConfig:
        """What decides the scores where all suites are scored."""
        return EvaluationConfig(**{name: getattr(self, name) for name in EvaluationConfig.model_fields})

    def scoring_at(self, step: int, num_steps: int) -> EvaluationConfig:
        """What decides the scores of a checkpoint: the suites whose turn it is, all at the last step."""
        due = {
            name: suite
            for name, suite in self.suites.items()
            if step == num_steps or step % self.suite_every_steps.get(name, 1) == 0
        }
        return self.scoring.model_copy(update={"suites": due})

    @property
    def decides(self) -> dict[str, Any]:
        """What decides the scores and of which checkpoints there are any."""
        fields = self.scoring.model_dump(mode="json")
        rare = {"suite_every_steps": self.suite_every_steps} if self.suite_every_steps else {}
        return {**fields, "versions": self.versions(), "every_steps": self.every_steps, **rare}

    @property
    def resources(self) -> dict[str, float]:
        """What each process of an evaluation reserves, by Ray's names."""
        needs = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": (self.memory_mib or 0) << 20}
        return {name: amount for name, amount in needs.items() if amount}

    def includes(self, step: int, num_steps: int) -> bool:
        return self.every_steps is None or step % self.every_steps == 0 or step == num_steps
