"""Which checkpoints are evaluated, when, on what and by what means."""

from typing import Any, Self

from pydantic import Field, model_validator

from repfusion.evaluation.record import EvaluationConfig


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
    every_minutes: float | None = Field(default=None, gt=0)
    """Evaluates by the clock instead: each time this has passed since the last one began, the newest
    checkpoint that has no scores; the last one in any case. Changes no scores.
    """
    beside_training: bool = True
    """Evaluate while training goes on, in the time that the machine has to spare, or all after it."""
    max_concurrent: int = Field(default=2, ge=1)
    """Evaluations at once after the training; beside it there is one."""
    num_cpus: float = Field(default=0, ge=0)
    """CPUs that each evaluation reserves, and its number of threads. 0 reserves none and runs one thread:
    beside the ranks on a small machine.
    """
    num_gpus: float = Field(default=0, ge=0)
    """GPUs, or a share of one, that each evaluation reserves."""
    memory_mib: int | None = Field(default=None, ge=1)
    """Memory that each evaluation reserves; None reserves none."""
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

    @property
    def scoring(self) -> EvaluationConfig:
        """What decides the scores."""
        return EvaluationConfig(**{name: getattr(self, name) for name in EvaluationConfig.model_fields})

    @property
    def decides(self) -> dict[str, Any]:
        """What decides the scores and of which checkpoints there are any."""
        fields = self.scoring.model_dump(mode="json")
        return {**fields, "versions": self.versions(), "every_steps": self.every_steps}

    @property
    def resources(self) -> dict[str, float]:
        """What each evaluation reserves, by Ray's names."""
        needs = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": (self.memory_mib or 0) << 20}
        return {name: amount for name, amount in needs.items() if amount}

    def includes(self, step: int, num_steps: int) -> bool:
        return self.every_steps is None or step % self.every_steps == 0 or step == num_steps
